//! The jail of workers: what a worker cannot do, tried in a worker's place; and what real workers have on.

use std::collections::BTreeSet;
use std::fs;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, bail, ensure};
use coldspark::fleet::process::{Process, Spawner, WorkerProgram};
use coldspark::worker::channel::{AsyncChannel, ChannelError};
use coldspark::worker::jail::attempts::{Attempt, Hello, Order, Outcome, Whereabouts};
use coldspark::worker::protocol::Layer;
use libtest_mimic::Trial;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::Value;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, program};
use crate::host::Need;
use crate::trial::{Stage, trial};
use coldspark::api::proto::*;

/// The first of the uids that workers have, and how many there are (docs/security.md).
const UIDS: std::ops::Range<u32> = 0x7000_0000..0x7040_0000;
/// A user who is nobody.
const NOBODY: u32 = 65534;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("jail/forbidden", &[Need::Kvm, Need::Root], 120, forbidden),
        trial("jail/forbidden-without-seccomp", &[Need::Kvm, Need::Root], 60, forbidden_without_seccomp),
        trial("jail/snapshots-are-let-go", &[Need::Kvm, Need::Root], 90, snapshots_are_let_go),
        trial("jail/real-workers", &[Need::Kvm, Need::Root], 60, real_workers),
        trial("jail/modes", &[Need::Kvm, Need::Root], 60, modes),
        trial("jail/doctor", &[Need::Kvm], 60, doctor),
        trial("jail/user-without-privileges", &[Need::Kvm, Need::Root], 120, without_privileges),
    ]
}

/// A worker that tries what it is told, jailed like any other.
struct Trier {
    process: Process,
    channel: AsyncChannel,
    jail: Hello,
    place: Whereabouts,
}

impl Trier {
    async fn start(spawner: &Spawner) -> anyhow::Result<Trier> {
        let (process, channel, _) = spawner.spawn().await?;
        let channel = AsyncChannel::new(channel)?;
        let (jail, _) = channel.recv::<Hello>().await.with_context(|| process.obituary(None))?;
        let (place, _) = channel.recv::<Whereabouts>().await?;
        Ok(Trier { process, channel, jail, place })
    }

    /// What comes of it; `Err`: how the worker ended.
    async fn tries(&self, attempt: Attempt, victim: &Trier) -> anyhow::Result<Result<Outcome, String>> {
        let order = Order { attempt, victim: victim.place.pid, address: victim.place.address };
        self.channel.send(&order, &[]).await?;
        match self.channel.recv::<Outcome>().await {
            Ok((outcome, _)) => Ok(Ok(outcome)),
            Err(ChannelError::Closed) => Ok(Err(self.process.obituary(self.process.ended().await))),
            Err(error) => bail!("{attempt:?}: {error}"),
        }
    }

    async fn is_well(&self) -> anyhow::Result<()> {
        match self.tries(Attempt::Nothing, self).await? {
            Ok(Outcome::Done) => Ok(()),
            other => bail!("the other worker is not well: {other:?}"),
        }
    }
}

fn spawner(more: &[&str]) -> anyhow::Result<Spawner> {
    let arguments = |zygote: &[&str]| {
        let usual = ["worker", "--die-with-parent", "--jail=best", "--try-forbidden"];
        usual.iter().chain(more).chain(zygote).map(Into::into).collect()
    };
    Ok(Spawner::start(WorkerProgram {
        program: program(),
        arguments: arguments(&[]),
        zygote: Some(arguments(&["--zygote"])),
    })?)
}

/// What is to come of an attempt.
enum Expected {
    Done,
    /// With this error.
    Refused(i32),
    /// The end of the worker, with this system call as its last word.
    Caught(&'static str),
    /// The end of the worker.
    Ended,
}

fn expected(attempt: Attempt) -> Expected {
    use Expected::{Caught, Done, Ended, Refused};
    match attempt {
        Attempt::Nothing => Done,
        // The C library looks for files by itself, and goes on without them.
        Attempt::OpenPath | Attempt::OpenKvm | Attempt::ReadMemoryByFile => Refused(libc::EACCES),
        Attempt::ListRoot => Caught("getdents64"),
        Attempt::ReadMemory => Caught("process_vm_readv"),
        Attempt::ConnectInet | Attempt::ConnectUnix | Attempt::Netlink => Caught("socket"),
        Attempt::Ptrace => Caught("ptrace"),
        Attempt::Kill | Attempt::SignalAll => Caught("kill"),
        Attempt::KillThread => Caught("tgkill"),
        Attempt::Fork | Attempt::CloneNamespace => Caught("clone"),
        Attempt::OldFork => Caught("fork"),
        Attempt::Exec => Caught("execve"),
        Attempt::Mount => Caught("mount"),
        Attempt::PivotRoot => Caught("pivot_root"),
        Attempt::Chroot => Caught("chroot"),
        Attempt::Unshare => Caught("unshare"),
        Attempt::Setns => Caught("setns"),
        Attempt::SetUid => Caught("setresuid"),
        Attempt::SetGroups => Caught("setgroups"),
        Attempt::RaiseLimit => Caught("prlimit64"),
        Attempt::KeepCapabilities | Attempt::Dumpable => Caught("prctl"),
        Attempt::Keyctl => Caught("keyctl"),
        Attempt::Bpf => Caught("bpf"),
        Attempt::PerfEvent => Caught("perf_event_open"),
        Attempt::IoUring => Caught("io_uring_setup"),
        Attempt::Userfaultfd => Caught("userfaultfd"),
        Attempt::ExecutableMemory => Caught("mmap"),
        Attempt::MakeExecutable => Caught("mprotect"),
        Attempt::KvmRequest | Attempt::TerminalRequest => Caught("ioctl"),
        Attempt::CatchSigsys => Caught("rt_sigaction"),
        // Killed at once: the handler is for programs of this architecture.
        Attempt::OldSystemCall => Ended,
    }
}

/// Each attempt in a worker of its own, with all layers on.
async fn forbidden(_: Stage) -> anyhow::Result<()> {
    let spawner = spawner(&[])?;
    let victim = Trier::start(&spawner).await?;
    ensure!(victim.jail.lacks().is_none(), "{:?}", victim.jail.missing);
    for attempt in Attempt::ALL {
        let trier = Trier::start(&spawner).await?;
        ensure!(trier.place.pid != victim.place.pid);
        let came = trier.tries(attempt, &victim).await?;
        let right = match (expected(attempt), &came) {
            (Expected::Done, Ok(Outcome::Done)) => true,
            (Expected::Refused(error), Ok(Outcome::Refused(with))) => error == *with,
            (Expected::Caught(call), Err(end)) => {
                end.contains("SIGSYS") && end.contains(&format!("({call} 0x"))
            }
            (Expected::Ended, Err(end)) => end.contains("was killed by SIG"),
            _ => false,
        };
        ensure!(right, "{attempt:?}: {came:?}");
        victim.is_well().await?;
    }
    Ok(())
}

/// What the other layers hold by themselves, should the kernel's filter have a hole.
async fn forbidden_without_seccomp(_: Stage) -> anyhow::Result<()> {
    let spawner = spawner(&["--without=seccomp"])?;
    let (victim, trier) = (Trier::start(&spawner).await?, Trier::start(&spawner).await?);
    ensure!(!trier.jail.active.contains(&Layer::SystemCalls), "{:?}", trier.jail);
    // Somebody listens on this host.
    let name = SocketAddr::from_abstract_name("coldspark-jail-trial")?;
    let _listener = UnixListener::bind_addr(&name)?;
    for attempt in [
        Attempt::OpenPath,
        Attempt::OpenKvm,
        Attempt::ListRoot,
        Attempt::ReadMemory,
        Attempt::ReadMemoryByFile,
        Attempt::ConnectInet,
        Attempt::ConnectUnix,
        Attempt::Ptrace,
        Attempt::Kill,
        Attempt::KillThread,
        Attempt::Exec,
        Attempt::Mount,
        Attempt::PivotRoot,
        Attempt::Chroot,
        Attempt::SetUid,
        Attempt::SetGroups,
        Attempt::RaiseLimit,
        Attempt::Bpf,
    ] {
        match trier.tries(attempt, &victim).await? {
            Ok(Outcome::Refused(_)) => {}
            other => bail!("{attempt:?}: {other:?}"),
        }
        victim.is_well().await?;
    }
    // This is no trial if everything is refused to it.
    trier.is_well().await
}

/// A line of /proc/PID/status, without its name.
fn status(of: &str, line: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(format!("/proc/{of}/status"))?;
    let found = text.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    Ok(found.with_context(|| format!("{of}: no {line}"))?.trim().to_owned())
}

/// The uid of a worker that has all layers on.
fn check_worker(pid: u32, daemon: i32) -> anyhow::Result<u32> {
    let of = pid.to_string();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        ensure!(status(&of, set)? == "0000000000000000", "{set} {}", status(&of, set)?);
    }
    ensure!(status(&of, "NoNewPrivs")? == "1" && status(&of, "Groups")?.is_empty());
    let ids = |line: &str| -> anyhow::Result<BTreeSet<u32>> {
        Ok(status(&of, line)?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    };
    let (uids, gids) = (ids("Uid")?, ids("Gid")?);
    ensure!(
        uids.len() == 1 && uids == gids && uids.iter().all(|uid| UIDS.contains(uid)),
        "{uids:?} {gids:?}"
    );
    // Every thread, and those with a role of their own under one filter more.
    let mut roles = 0;
    for task in fs::read_dir(format!("/proc/{of}/task"))? {
        let task = format!("{of}/task/{}", task?.file_name().to_string_lossy());
        ensure!(status(&task, "Seccomp")? == "2", "{task}");
        let name = status(&task, "Name")?;
        let filters: u32 = status(&task, "Seccomp_filters")?.parse()?;
        // Its own threads: KVM has one here, too.
        if name.starts_with("kvm-") {
            continue;
        }
        let of_its_own = name.starts_with("vcpu") || name.starts_with("devices");
        roles += u32::from(of_its_own);
        ensure!(filters == if of_its_own { 3 } else { 2 }, "{name}: {filters} filters");
    }
    ensure!(roles >= 2, "no vCPU, no device thread");
    for space in ["mnt", "pid", "net", "ipc", "uts"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}"));
        ensure!(link(&of)? != link(&daemon.to_string())?, "{space} is the daemon's");
    }
    ensure!(fs::read_dir(format!("/proc/{of}/root"))?.next().is_none(), "its root is not empty");
    ensure!(fs::write(format!("/proc/{of}/root/x"), "x").is_err(), "its root can be written");
    let limits = fs::read_to_string(format!("/proc/{of}/limits"))?;
    for line in
        ["Max core file size        0 ", "Max locked memory         0 ", "Max processes             128 "]
    {
        ensure!(limits.contains(line), "{limits}");
    }
    uids.first().copied().context("no uid")
}

/// Files in `folder` that a process can write to, with the descriptors.
fn writable(pid: u32, folder: &Path) -> anyhow::Result<Vec<(i32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let number = entry?.file_name().to_string_lossy().into_owned();
        // One that is closed just now has neither.
        let Ok(path) = fs::read_link(format!("/proc/{pid}/fd/{number}")) else { continue };
        let Ok(info) = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).context("no flags")?;
        let flags = i32::from_str_radix(flags.trim(), 8)?;
        if path.starts_with(folder) && flags & libc::O_ACCMODE != libc::O_RDONLY {
            found.push((number.parse()?, path));
        }
    }
    Ok(found)
}

/// A worker has nothing of a snapshot open for writing when the snapshot is published, and while one has there is none.
async fn snapshots_are_let_go(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("disk", vec![vec![0; 4 << 20]]).await?;
    let vm = client.boot_image("disk", 1, BootProtocol::Unspecified).await?;
    let put = |byte: u8| DiskWriteOp {
        disk: 0,
        first_sector: u64::from(byte),
        data: vec![byte; 512].into(),
        flush: true,
    };
    ask!(&mut client, &vm.id, DiskWrite(put(1)));
    let of_workers = |folder: &Path| -> anyhow::Result<Vec<(i32, PathBuf)>> {
        let found = writable(vm.worker_pid, folder)?;
        ensure!(!found.is_empty() && found.iter().all(|(_, path)| path.parent() == found[0].1.parent()));
        Ok(found)
    };
    let overlays = of_workers(&daemon.data)?;
    ensure!(overlays.iter().all(|(_, path)| path.ends_with("disk-0.overlay.0")), "{overlays:?}");

    // The worker's own open file, which lives on when the worker closes it: as if it had kept a descriptor.
    let pid = Pid::from_raw(i32::try_from(vm.worker_pid)?).context("no pid")?;
    let worker = pidfd_open(pid, PidfdFlags::empty())?;
    let kept = pidfd_getfd(&worker, overlays[0].0, PidfdGetfdFlags::empty())?;
    let refused = client.snapshot(&vm.id, "kept").await;
    let why = expect_status("a layer that its worker kept", refused, &[Code::FailedPrecondition])?;
    ensure!(why.contains("disks/disk-0.layer-0") && why.contains("still be written to"), "{why}");
    let listed = client.list_snapshots().await?;
    ensure!(listed.snapshots.is_empty() && listed.damaged.is_empty(), "{listed:?}");
    let names: Vec<_> = fs::read_dir(daemon.data.join("snapshots"))?.collect::<Result<_, _>>()?;
    ensure!(names.iter().all(|entry| entry.file_name() == ".lock"), "{names:?}");
    ensure!(daemon.log()?.contains("is not to be trusted"), "the log does not tell");

    // Let go; the VM has gone on meanwhile, and that layer is one of the next snapshot's.
    drop(kept);
    ask!(&mut client, &vm.id, DiskWrite(put(2)));
    let snapshot = client.snapshot(&vm.id, "let-go").await?.id;
    let overlays = of_workers(&daemon.data)?;
    ensure!(overlays.iter().all(|(_, path)| path.ends_with("disk-0.overlay.2")), "{overlays:?}");
    let of_daemon = writable(u32::try_from(daemon.pid())?, &daemon.data.join("snapshots"))?;
    ensure!(of_daemon.iter().all(|(_, path)| path.ends_with(".lock")), "{of_daemon:?}");
    // Frozen layers are files of the VM's folder, too.
    let layers = writable(u32::try_from(daemon.pid())?, &daemon.data.join("vms").join(&vm.id))?;
    ensure!(
        layers.iter().all(|(_, path)| !["0", "1"].iter().any(|n| path.extension().is_some_and(|e| e == *n))),
        "{layers:?}"
    );

    // By the next daemon, which has the files from the worker.
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ask!(&mut client, &vm.id, DiskWrite(put(3)));
    client.snapshot(&vm.id, "adopted").await?;
    let overlays = of_workers(&daemon.data)?;
    ensure!(overlays.iter().all(|(_, path)| path.ends_with("disk-0.overlay.3")), "{overlays:?}");

    for (name, bytes) in [("let-go", 1..=2u8), ("adopted", 1..=3)] {
        client.verify(name).await?;
        let clone = client.clone_vms(name, 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
        for byte in bytes {
            let op = DiskReadOp { disk: 0, first_sector: u64::from(byte), sectors: 1 };
            let read = ask!(&mut client, &clone.id, DiskRead(op));
            ensure!(read.data.iter().all(|found| *found == byte), "{name}: sector {byte}");
        }
    }
    ensure!(client.list_snapshots().await?.snapshots.iter().any(|listed| listed.id == snapshot));
    Ok(())
}

/// Workers with VMs: booted, cloned, taken over by another daemon.
async fn real_workers(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&source.id, "").await?.id;
    let clones = client.clone_vms(&snapshot, 2, MemoryMode::Mapped, Identity::Managed).await?;
    let clone = client.clone_vms(&snapshot, 1, MemoryMode::Userfault, Identity::Managed).await;
    let vms: Vec<Vm> = clones.into_iter().chain(clone.into_iter().flatten()).chain([source]).collect();
    let check = |daemon: i32| -> anyhow::Result<BTreeSet<u32>> {
        vms.iter().map(|vm| check_worker(vm.worker_pid, daemon).with_context(|| vm.id.clone())).collect()
    };
    let uids = check(daemon.pid())?;
    ensure!(uids.len() == vms.len(), "two workers are the same user: {uids:?}");
    ensure!(daemon.log()?.contains("workers are jailed"), "the log does not tell");
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(check(daemon.pid())? == uids);
    // What is started now has other uids than those that are there.
    let more = client.clone_vms(&snapshot, 2, MemoryMode::Mapped, Identity::Managed).await?;
    for vm in &more {
        ensure!(!uids.contains(&check_worker(vm.worker_pid, daemon.pid())?));
    }
    for vm in vms.iter().chain(&more) {
        expect_echo(&mut client, vm).await?;
        client.delete_vm(&vm.id).await?;
    }
    Ok(())
}

async fn expect_echo(client: &mut Client, vm: &Vm) -> anyhow::Result<()> {
    let echo = ask!(client, &vm.id, Echo(EchoOp { data: b"in here".to_vec().into() }));
    ensure!(echo.data[..] == b"in here"[..]);
    Ok(())
}

/// `--jail off` says so; `required` begins where all layers are, and not where one is missing.
async fn modes(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start_with(&stage, &["--jail".into(), "off".into()]).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    ensure!(status(&vm.worker_pid.to_string(), "Seccomp")? == "0");
    ensure!(status(&vm.worker_pid.to_string(), "Uid")?.starts_with("0\t"));
    ensure!(daemon.log()?.contains("workers are NOT jailed"), "the log does not warn");
    drop(daemon);

    let daemon = Daemon::start_with(&stage, &["--jail".into(), "required".into()]).await?;
    let vm = daemon.client().await?.boot_embedded(64 << 20).await?;
    check_worker(vm.worker_pid, daemon.pid())?;
    drop(daemon);

    let folder = folder_of_nobody()?;
    let serve = Command::new(folder.path().join("coldspark"))
        .args(["serve", "--jail", "required", "--socket"])
        .arg(folder.path().join("socket"))
        .arg("--data-dir")
        .arg(folder.path().join("data"))
        .uid(NOBODY)
        .gid(NOBODY)
        .output()?;
    let said = String::from_utf8_lossy(&serve.stderr);
    ensure!(!serve.status.success() && said.contains("the jail of workers lacks user"), "{said}");
    ensure!(!folder.path().join("data").exists(), "it has begun");
    Ok(())
}

/// A folder of nobody's, with the program in it.
fn folder_of_nobody() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix("coldspark-").tempdir()?;
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    // By another process: a fork for another trial would have the copy open for writing for a moment, and it could not be started.
    let copied = Command::new("cp").arg(program()).arg(folder.path().join("coldspark")).status()?;
    ensure!(copied.success());
    Ok(folder)
}

/// The finding "jail" of `coldspark doctor --json`.
fn jail_of(doctor: &Output) -> anyhow::Result<(String, String)> {
    let found: Value = serde_json::from_slice(&doctor.stdout)
        .with_context(|| String::from_utf8_lossy(&doctor.stderr).into_owned())?;
    let findings = found["findings"].as_array().context("no findings")?;
    let jail = findings.iter().find(|finding| finding["name"] == "jail").context("no jail")?;
    let text = |key: &str| jail[key].as_str().unwrap_or_default().to_owned();
    Ok((text("level"), text("found")))
}

/// It tells the layers that workers have, here and for a user who may do little.
async fn doctor(_: Stage) -> anyhow::Result<()> {
    let (level, found) = jail_of(&Command::new(program()).args(["doctor", "--json"]).output()?)?;
    ensure!(["ok", "warn"].contains(&level.as_str()) && found.contains("seccomp"), "{level} {found}");
    Ok(())
}

/// A user who may open /dev/kvm and nothing else: all layers but the uid, by a user namespace; and VMs run.
async fn without_privileges(_: Stage) -> anyhow::Result<()> {
    let folder = folder_of_nobody()?;
    let run = |arguments: &str| -> anyhow::Result<Output> {
        // In mounts of its own, so that nobody else finds a /dev/kvm for everybody.
        let script = format!(
            "mknod kvm c 10 232 && chmod 666 kvm && mount --bind kvm /dev/kvm && export TMPDIR=$PWD && \
             exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups ./coldspark {arguments}"
        );
        let _ = fs::remove_file(folder.path().join("kvm"));
        Ok(Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .current_dir(Path::new(folder.path()))
            .output()?)
    };
    let (level, found) = jail_of(&run("doctor --json")?)?;
    let (has, lacks) = found.split_once("they lack").context("nothing is missing")?;
    ensure!(level == "warn" && lacks.trim_start().starts_with("user ("), "{found}");
    for layer in Layer::ALL.into_iter().filter(|layer| *layer != Layer::User && !layer.is_extra()) {
        ensure!(has.contains(layer.name()), "{} is missing: {found}", layer.name());
    }
    let demo = run("demo --clones 2")?;
    let said = String::from_utf8_lossy(&demo.stdout);
    ensure!(demo.status.success(), "{said} {}", String::from_utf8_lossy(&demo.stderr));
    Ok(())
}
