//! `deploy/coldspark.service` as a user of the host installs and uses it, under a real systemd, which is the first process of the rig's outer machine
//! (`rig run --system`). What is done to that machine is what the head of the unit file says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::Client;
use crate::commands::run;
use crate::daemon::{connect, eventually, program};
use crate::host::Need;
use crate::trial::{Stage, trial};

const UNIT: &str = include_str!("../../deploy/coldspark.service");
const NETWORKS: &str = include_str!("../../deploy/networks.conf");
const UNIT_FILE: &str = "/etc/systemd/system/coldspark.service";
const DROP_INS: &str = "/etc/systemd/system/coldspark.service.d";
const CONFIGURATION: &str = "/etc/coldspark/coldspark.toml";
const PROGRAM: &str = "/usr/local/bin/coldspark";
const SOCKET: &str = "/run/coldspark/coldspark.sock";
const DATA: &str = "/var/lib/coldspark";
const GROUP: &str = "/sys/fs/cgroup/system.slice/coldspark.service";
const NEEDS: &[Need] = &[Need::Kvm, Need::Systemd];

const LIMIT: u64 = 64 << 20;
/// Pages that do not fit into it.
const MANY: u64 = 24 << 10;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("systemd/used", NEEDS, 60, used),
        trial("systemd/killed", NEEDS, 60, killed),
        trial("systemd/replaced", NEEDS, 60, replaced),
        trial("systemd/networks", NEEDS, 60, networks),
    ]
}

/// Whether this machine is one that may be changed, with a systemd that starts units.
pub fn available() -> Result<(), String> {
    match crate::host::in_rig() && Path::new("/run/systemd/system").is_dir() {
        true => Ok(()),
        false => {
            Err("it installs a unit, in a Debian of its own (tests/rig/rig debian); runs in the rig".into())
        }
    }
}

/// A service that was installed; at the end it is stopped, and the machine as it was.
struct Installed;

impl Installed {
    /// Up to where it is enabled and started; `configuration` besides who is let in.
    fn new(configuration: &str) -> anyhow::Result<Installed> {
        let installed = Installed;
        shell(
            "useradd --user-group --groups '' friend; groupadd team; usermod -a -G team friend; useradd --user-group stranger",
        )?;
        fs::write(UNIT_FILE, UNIT)?;
        let _ = fs::remove_file(PROGRAM);
        fs::copy(program(), PROGRAM)?;
        configure(configuration)?;
        // Word for word what it says.
        let head = UNIT.lines().take_while(|line| line.starts_with('#'));
        let commands: Vec<&str> = head.filter_map(|line| line.strip_prefix("#   ")).collect();
        ensure!(commands.len() == 2 && commands[1].contains("enable --now"), "{commands:?}");
        commands.into_iter().try_for_each(|command| shell(command).map(drop))?;
        Ok(installed)
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        // In the journal is what went wrong; the rig keeps it.
        let _ = fs::write(CONFIGURATION, "");
        for command in [
            "systemctl disable --now coldspark",
            "systemctl reset-failed coldspark",
            "rm -rf /etc/coldspark /var/lib/coldspark /etc/systemd/system/coldspark.service*",
            "systemctl daemon-reload",
            "userdel coldspark; userdel friend; userdel stranger; groupdel team",
        ] {
            let _ = shell(command);
        }
    }
}

/// As somebody does who builds and copies: the file is another one, whoever runs the old one.
fn replace_program() -> anyhow::Result<()> {
    let new = format!("{PROGRAM}.new");
    fs::copy(program(), &new)?;
    Ok(fs::rename(new, PROGRAM)?)
}

fn configure(more: &str) -> anyhow::Result<()> {
    fs::create_dir_all("/etc/coldspark")?;
    Ok(fs::write(CONFIGURATION, format!("allow = [\"group:team=run\"]\n{more}\n"))?)
}

fn shell(command: &str) -> anyhow::Result<String> {
    let output = Command::new("sh").args(["-c", command]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command}: {}{}, {}",
        said,
        String::from_utf8_lossy(&output.stderr),
        output.status
    );
    Ok(said)
}

/// `coldspark` as a user who has just logged in runs it.
fn coldspark(user: &str, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--init-groups", "--reset-env"]);
    Ok(command.arg(PROGRAM).args(arguments).output()?)
}

/// The same for one who is let in, and what it says on stdout.
fn friend(arguments: &[&str]) -> anyhow::Result<String> {
    let output = coldspark("friend", arguments)?;
    let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    ensure!(
        output.status.success(),
        "coldspark {arguments:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// A snapshot `ready`.
async fn ready(client: &mut Client) -> anyhow::Result<()> {
    let vm = client.boot_embedded(256 << 20).await?;
    client.snapshot(&vm.id, "ready").await?;
    Ok(client.delete_vm(&vm.id).await?)
}

async fn clone(client: &mut Client, name: &str, limit: Option<u64>) -> anyhow::Result<()> {
    let limits = limit.map(|bytes| ResourceLimits { memory_bytes: bytes, ..ResourceLimits::default() });
    let request =
        CloneVmRequest { snapshot: "ready".into(), name: name.into(), limits, ..Default::default() };
    client.vms.clone_vm(request).await?;
    Ok(())
}

async fn answer(stage: &Stage, vms: &[&str]) -> anyhow::Result<()> {
    let client = client(stage).await?;
    for vm in vms {
        run(&client, vm, &["echo", "here"]).await?.expect(0, "here\n").with_context(|| vm.to_string())?;
    }
    Ok(())
}

/// Its limits are in force: by the files of its control group, and by what happens to it.
async fn ends_at_its_limit(vm: &str, stage: &Stage) -> anyhow::Result<()> {
    is_limited(vm, stage).await?;
    let fill = TouchOp { first_page: 0, pages: MANY, stride: 1, seed: 7, mode: TouchMode::Fill.into() };
    let filled = client(stage).await?.ask(vm, Op::Touch(fill)).await;
    let why = filled.err().with_context(|| format!("{vm} has more than its limit"))?;
    ensure!(format!("{why:#}").contains("more memory than its limit of 64 MiB"), "{vm}: {why:#}");
    Ok(())
}

async fn is_limited(vm: &str, stage: &Stage) -> anyhow::Result<()> {
    let pid = client(stage).await?.vm(vm).await?.worker_pid;
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let group = text.lines().find_map(|line| line.strip_prefix("0::")).context("no group")?;
    let folder = PathBuf::from(format!("/sys/fs/cgroup{group}"));
    ensure!(folder.starts_with(GROUP), "{vm} is in {group}");
    let limit = fs::read_to_string(folder.join("memory.max"))?;
    ensure!(limit.trim() == LIMIT.to_string(), "{vm} may have {limit} in {group}");
    Ok(())
}

/// As root, who is an admin.
async fn client(stage: &Stage) -> anyhow::Result<Client> {
    Ok(Client::new(connect(Path::new(SOCKET)).await?, stage.logs.clone()))
}

/// A property of the unit.
fn property(name: &str) -> anyhow::Result<String> {
    Ok(shell(&format!("systemctl show coldspark --property {name} --value"))?.trim().to_owned())
}

/// The service is killed, and the next one, which systemd starts by itself, answers.
async fn kill() -> anyhow::Result<()> {
    let pid = property("MainPID")?;
    shell("systemctl kill --kill-whom=main --signal=KILL coldspark")?;
    eventually("systemd has started it again", 20, async || {
        Ok(property("MainPID")? != pid && property("ActiveState")? == "active")
    })
    .await
}

/// Nothing is left of a service that was stopped.
async fn nothing_left() -> anyhow::Result<()> {
    ensure!(property("ActiveState")? == "inactive", "it is {}", property("ActiveState")?);
    eventually("its control group is gone", 10, async || Ok(!Path::new(GROUP).exists())).await?;
    ensure!(!Path::new("/run/coldspark").exists());
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(path) = fs::read_link(entry.path().join("exe")) else { continue };
        ensure!(!path.starts_with("/usr/local/bin"), "{} runs {}", entry.path().display(), path.display());
    }
    let left: Vec<_> =
        fs::read_dir(format!("{DATA}/vms"))?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left == [".lock"], "VMs are left: {left:?}");
    Ok(())
}

/// From the head of the unit file to `systemctl stop`.
async fn used(stage: Stage) -> anyhow::Result<()> {
    let _installed = Installed::new("")?;
    // It was started when the command ended: nobody waits.
    ensure!(friend(&["vm", "ls"])?.starts_with("ID "), "no list");
    ensure!(property("StatusText")?.starts_with("serving at "), "{}", property("StatusText")?);
    let refused = coldspark("stranger", &["vm", "ls"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("PERMISSION_DENIED"), "{said}");
    friend(&["vm", "create", "--embedded", "--memory", "256M", "--name", "first", "--quiet"])?;
    friend(&["vm", "snapshot", "first", "--name", "ready"])?;
    friend(&["vm", "clone", "ready", "--name", "free"])?;
    friend(&["vm", "clone", "ready", "--name", "limited", "--memory-limit", "64M", "--cpu-limit", "0.5"])?;
    for vm in ["free", "limited"] {
        let said = friend(&["vm", "exec", vm, "--", "echo", "here"])?;
        ensure!(said == "here", "{vm} says {said:?}");
    }
    ends_at_its_limit("limited", &stage).await?;
    // That was the kernel's doing, and systemd has heard of it.
    answer(&stage, &["free"]).await?;
    ensure!(property("NRestarts")? == "0" && property("ActiveState")? == "active");

    shell("systemctl reload coldspark")?;
    eventually("the service says that it has read again", 10, async || {
        Ok(shell("journalctl -u coldspark -o cat")?.contains("tokens and certificates were read again"))
    })
    .await?;
    answer(&stage, &["free"]).await?;
    doctor().await?;
    shell("systemctl stop coldspark")?;
    nothing_left().await
}

/// `coldspark doctor` in the unit's sandbox, as docs/operations.md says.
async fn doctor() -> anyhow::Result<()> {
    fs::create_dir_all(DROP_INS)?;
    fs::write(
        format!("{DROP_INS}/doctor.conf"),
        "[Service]\nExecStartPre=-/usr/local/bin/coldspark doctor\n",
    )?;
    shell("systemctl daemon-reload && systemctl restart coldspark")?;
    let mut said = String::new();
    eventually("the journal has its last line", 10, async || {
        said = shell("journalctl -u coldspark -o cat")?;
        Ok(said.contains("This host works"))
    })
    .await?;
    let finding = |name: &str| {
        let mut lines = said.lines().filter(|line| line.starts_with("ok ") || line.starts_with("warn "));
        lines.find(|line| line.contains(name)).unwrap_or_default()
    };
    ensure!(finding("limits of VMs").starts_with("ok "), "{said}");
    let jail = "workers have net, ipc, uts, mount, pid, rlimits, capabilities, landlock, seccomp, undumpable; they lack user (";
    ensure!(finding(" jail ").contains(jail), "{said}");
    Ok(())
}

/// VMs outlive the service, twice, with their limits; systemd starts the next one, whoever is in its control group.
async fn killed(stage: Stage) -> anyhow::Result<()> {
    let _installed = Installed::new("")?;
    let mut first = client(&stage).await?;
    ready(&mut first).await?;
    clone(&mut first, "free", None).await?;
    clone(&mut first, "one", Some(LIMIT)).await?;
    clone(&mut first, "two", Some(LIMIT)).await?;
    kill().await?;
    answer(&stage, &["free", "one", "two"]).await?;
    ends_at_its_limit("one", &stage).await?;
    clone(&mut client(&stage).await?, "three", Some(LIMIT)).await?;
    kill().await?;
    answer(&stage, &["free", "two"]).await?;
    is_limited("two", &stage).await?;
    ends_at_its_limit("three", &stage).await?;
    ensure!(property("NRestarts")? == "2", "{} restarts", property("NRestarts")?);
    shell("systemctl stop coldspark")?;
    nothing_left().await
}

/// The program is replaced while VMs run.
async fn replaced(stage: Stage) -> anyhow::Result<()> {
    let _installed = Installed::new("keep-vms = true")?;
    let mut first = client(&stage).await?;
    ready(&mut first).await?;
    clone(&mut first, "free", None).await?;
    replace_program()?;
    shell("systemctl restart coldspark")?;
    answer(&stage, &["free"]).await?;
    // The first limit, when workers of an older program are beside the service.
    clone(&mut client(&stage).await?, "limited", Some(LIMIT)).await?;
    // The last one ends what it has.
    configure("keep-vms = false")?;
    shell("systemctl restart coldspark")?;
    answer(&stage, &["free"]).await?;
    ends_at_its_limit("limited", &stage).await?;
    shell("systemctl stop coldspark")?;
    nothing_left().await
}

/// With the drop-in for networks.
async fn networks(stage: Stage) -> anyhow::Result<()> {
    let _installed = Installed::new("")?;
    fs::create_dir_all(DROP_INS)?;
    fs::write(format!("{DROP_INS}/networks.conf"), NETWORKS)?;
    let commands = NETWORKS.lines().find_map(|line| line.strip_prefix("#   ")).context("no commands")?;
    shell(commands)?;
    let mut client = client(&stage).await?;
    let slot = || NetworkInterface { link: Some(Link::Slot(SlotLink::default())), ..Default::default() };
    let request = CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 256 << 20,
        command_line: "coldspark.ip=10.76.0.2 coldspark.ip6=fd63:6f6c:6473::2".into(),
        networks: vec![slot()],
        ..Default::default()
    };
    let first = client.boot(request).await?.vm;
    client.snapshot(&first.id, "ready").await?;
    friend(&["vm", "clone", "ready", "--name", "one", "--net", "auto"])?;
    let one = client.vm("one").await?.networks;
    let reached = || -> anyhow::Result<()> {
        let address = &one.first().context("no interface")?.slot_address;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(10)))?;
        socket.send_to(b"you", (address.as_str(), 99))?;
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes)?;
        ensure!(&bytes[..length] == b"one you", "{:?}", String::from_utf8_lossy(&bytes[..length]));
        Ok(())
    };
    reached()?;
    // The host sees it, and the next service finds it.
    ensure!(shell("ip netns list")?.contains("cs-"), "no namespaces");
    kill().await?;
    reached()?;
    answer(&stage, &["one"]).await?;
    shell("systemctl stop coldspark")?;
    ensure!(shell("ip netns list")?.is_empty() && !shell("ip link")?.contains(": cs"));
    ensure!(!shell("nft list tables")?.contains("coldspark"));
    nothing_left().await
}
