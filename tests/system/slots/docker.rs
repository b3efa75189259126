//! Rules of others that drop what guests send, as Docker makes them: the service says so when it starts, with commands that let it through, and `doctor`
//! does. Docker's own daemon makes them, with either kind of iptables, where there is one; and nft, where there is none.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::*;

use super::world::{BEYOND, BEYOND_PRIVATE, HOST, HOST6, World, call, inside};
use super::{addresses, base, clone, guest_asks, port, who, words};
use crate::client::Client;
use crate::daemon::{Daemon, eventually};
use crate::host;
use crate::trial::{Stage, limit};

/// Docker's daemon on a world's host, in namespaces of its own with nothing of this machine's state: `$1` is the kind of iptables, `$2` where
/// it was unpacked.
const BEGIN: &str = r#"
set -e
mount -t tmpfs none /run
mkdir /run/bin
for each in iptables ip6tables; do ln -s "/usr/sbin/$each-$1" "/run/bin/$each"; done
export PATH="/run/bin:$2/usr/bin:$2/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
exec dockerd --host unix:///run/docker.sock --pidfile /run/docker.pid --data-root /run/data --exec-root /run/exec \
    --storage-driver vfs --experimental --ip6tables --ipv6 --fixed-cidr-v6 fd00:d0c:d0c::/64
"#;

/// The namespaces it has.
const APART: [&str; 6] = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"];

/// Whether Docker starts here at all, which is asked once, in a network of its own; the error is the reason.
pub fn available(folder: &Path) -> Result<(), String> {
    let none = |error: std::io::Error| format!("Docker cannot be tried: {error}");
    let log = tempfile::NamedTempFile::new().map_err(none)?;
    let mut command = Command::new(APART[0]);
    command.arg("--net").args(&APART[1..]).args(["sh", "-c", BEGIN, "sh", "nft"]).arg(folder);
    let mut docker = Dockerd::spawn(command, log.path().to_owned()).map_err(|error| format!("{error:#}"))?;
    let until = Instant::now() + limit(20);
    while Instant::now() < until {
        let said = docker.said().unwrap_or_default();
        if said.contains(READY) {
            return Ok(());
        }
        if docker.child.try_wait().map_err(none)?.is_some() {
            let last = said.lines().last().unwrap_or_default();
            return Err(format!("Docker does not start here: {last}"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err("Docker does not come to answer here".into())
}

/// What it logs when it has set its rules.
const READY: &str = "API listen on";

struct Dockerd {
    child: Child,
    log: PathBuf,
}

impl Dockerd {
    /// It has set its rules when this comes back.
    async fn start(stage: &Stage, world: &World, kind: &str, start: u32) -> anyhow::Result<Dockerd> {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", world.host))
            .args(APART)
            .args(["sh", "-c", BEGIN, "sh", kind])
            .arg(host::dockerd().map_err(anyhow::Error::msg)?);
        let mut docker = Dockerd::spawn(command, stage.logs.join(format!("dockerd-{start}.log")))?;
        eventually("dockerd answers", 60, async || {
            ensure!(docker.child.try_wait()?.is_none(), "dockerd has ended: {}", docker.said()?);
            Ok(docker.said()?.contains(READY))
        })
        .await?;
        Ok(docker)
    }

    fn spawn(mut command: Command, log: PathBuf) -> anyhow::Result<Dockerd> {
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("{:?}", command.get_program()))?;
        Ok(Dockerd { child, log })
    }

    fn said(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        // All that it has started is in its pid namespace, and ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command line on a world's host.
fn on_host(world: &World, line: &str) -> anyhow::Result<String> {
    inside(&world.host, || {
        let output = Command::new("sh").args(["-c", line]).output()?;
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

/// A clone that publishes a port, behind rules that drop.
struct Behind {
    daemon: Daemon,
    client: Client,
    vm: Vm,
}

impl Behind {
    /// Sees that nothing passes, does word for word what the service says, and sees that everything passes that should.
    async fn mended(stage: &Stage, world: &World, keepers: [&str; 2]) -> anyhow::Result<Behind> {
        let daemon = Daemon::start_inside(stage, &world.host, &words(&["--networks", "1"])).await?;
        let mut client = daemon.client().await?;
        let snapshot = base(&mut client).await?;
        let link = SlotLink { publish: vec![port(8080, 80, Transport::Tcp)], ..SlotLink::default() };
        let vm = clone(&mut client, &snapshot, "one", link).await?;
        ensure!(guest_asks(&client, &vm, BEYOND).await?.is_none(), "the rules do not drop");
        for host in [HOST, HOST6] {
            ensure!(call(&world.beyond, host, 8080, "hello").is_err(), "the rules do not drop: {host}");
        }
        let program = crate::daemon::program();
        let doctor = on_host(world, &format!("{} doctor", program.display()))?;
        for keeper in keepers {
            let said = format!("the chain FORWARD ({keeper}) drops what it does not know");
            ensure!(doctor.contains(&said) && daemon.log()?.contains(&said), "{said}: {doctor}");
        }
        let log = daemon.log()?;
        let commands: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("drops what it does not know"))
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .collect();
        ensure!(commands.len() == 4, "two commands for each family: {commands:?}");
        // Where Docker wants them; for IPv6 an older one has no such place.
        ensure!(commands[..2].iter().all(|command| command.contains(" DOCKER-USER ")), "{commands:?}");
        commands.into_iter().try_for_each(|command| on_host(world, command).map(drop))?;
        let mut behind = Behind { daemon, client, vm };
        behind.works(world).await.context("what it says does not help")?;
        Ok(behind)
    }

    /// What should pass passes, and nothing else.
    async fn works(&mut self, world: &World) -> anyhow::Result<()> {
        ensure!(guest_asks(&self.client, &self.vm, BEYOND).await?.is_some(), "the guest reaches nothing");
        for host in [HOST, HOST6] {
            ensure!(call(&world.beyond, host, 8080, "hello")? == "one hello", "{host}");
        }
        ensure!(who(&world.beyond, &addresses(&self.vm)?[0])?.is_none(), "another machine reaches a slot");
        ensure!(guest_asks(&self.client, &self.vm, BEYOND_PRIVATE).await?.is_none(), "a private network");
        Ok(())
    }

    /// The next service, and `doctor`, see that it is put right.
    async fn seen(mut self, world: &World) -> anyhow::Result<()> {
        ensure!(self.daemon.stop().await?.success());
        self.daemon.start_again().await?;
        let log = self.daemon.log()?;
        ensure!(!log.contains("drops what it does not know"), "it does not see that it is put right: {log}");
        let doctor = on_host(world, &format!("{} doctor", crate::daemon::program().display()))?;
        ensure!(!doctor.contains("drops what it does not know"), "{doctor}");
        Ok(())
    }
}

/// The same rules, made with nft.
pub async fn rules(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    for family in ["ip", "ip6"] {
        for rule in [
            format!("add table {family} filter"),
            format!("add chain {family} filter DOCKER-USER"),
            format!(
                "add chain {family} filter FORWARD {{ type filter hook forward priority filter; policy drop; }}"
            ),
            format!("add rule {family} filter FORWARD counter jump DOCKER-USER"),
        ] {
            on_host(&world, &format!("nft '{rule}'"))?;
        }
    }
    let behind = Behind::mended(&stage, &world, ["table ip filter", "table ip6 filter"]).await?;
    behind.seen(&world).await
}

pub async fn nft(stage: Stage) -> anyhow::Result<()> {
    dockerd(stage, "nft", ["table ip filter", "table ip6 filter"]).await
}

pub async fn legacy(stage: Stage) -> anyhow::Result<()> {
    dockerd(stage, "legacy", ["iptables-legacy", "ip6tables-legacy"]).await
}

fn forward(world: &World, value: &str) -> anyhow::Result<()> {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        on_host(world, &format!("echo {value} >/proc/sys/net/{setting}"))?;
    }
    Ok(())
}

async fn dockerd(stage: Stage, kind: &str, keepers: [&str; 2]) -> anyhow::Result<()> {
    let world = World::new()?;
    // Docker drops what others forward only if it was it that switched forwarding on.
    forward(&world, "0")?;
    let docker = Dockerd::start(&stage, &world, kind, 1).await?;
    let on = on_host(&world, "cat /proc/sys/net/ipv4/ip_forward")?;
    ensure!(on.trim() == "1", "Docker has not switched forwarding on");
    forward(&world, "1")?;
    let mut behind = Behind::mended(&stage, &world, keepers).await?;
    // iptables itself, which Docker runs, can read what was added, and Docker leaves it where it is when it starts again.
    drop(docker);
    let docker = Dockerd::start(&stage, &world, kind, 2).await?;
    behind.works(&world).await.context("after another start of Docker")?;
    for program in ["iptables", "ip6tables"] {
        let rules = on_host(&world, &format!("{program}-{kind} -S"))?;
        ensure!(rules.contains("-P FORWARD DROP"), "Docker does not drop any more: {rules}");
        for which in ["-i", "-o"] {
            let ours = rules.lines().filter(|line| line.contains(&format!(" {which} cs")));
            ensure!(
                ours.clone().count() == 1 && ours.clone().all(|line| line.ends_with("+ -j ACCEPT")),
                "{rules}"
            );
        }
    }
    behind.seen(&world).await?;
    drop(docker);
    Ok(())
}
