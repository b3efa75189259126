//! Load and faults: clients that clone, ask, invoke and destroy, while workers and the daemon are killed, the disk is full at times, clones need
//! more memory than they may have, and other clients vanish in the middle of calls or read too slowly. Short by default; as long as
//! `COLDSPARK_FAULTS_SECONDS` says (docs/testing.md). Each request has an id and is sent again when its daemon was killed, so in the end no VM is
//! left that nobody knows of. What came of all is in the trial's `faults.txt`.

mod clients;
mod counts;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::deploy_event::Event;
use coldspark::api::proto::deploy_request::From;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::bad_input::SmallDisk;
use crate::client::Client;
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};
use clients::{Caller, Common};
use counts::Outcome;

const CLIENTS: u64 = 8;
/// The daemon is killed at most so many times in all, and no sooner than so many requests were answered since the last time:
/// on a slow host there is something to kill then, too.
const DAEMON_KILLS: u32 = 20;
const ANSWERED_A_KILL: u64 = 4;
/// How often the disk is full, for a third of the time between but no longer than this.
const FULL_TIMES: u32 = 10;
const FULL_AT_MOST: Duration = Duration::from_secs(5);
/// The data folder's disk.
const DISK_BYTES: u64 = 256 << 20;
/// Memory that the daemon may have more at the end than at the beginning.
const GROWN_KIB_MAX: u64 = 64 << 10;

/// Shells that the daemon keeps.
const SHELLS: usize = 4;

/// A worker is killed after so many requests.
fn requests_a_kill() -> u64 {
    if host::in_rig() { 3 } else { 40 }
}

pub fn trials() -> Vec<Trial> {
    let seconds = host::faults_seconds();
    let limit = 240 + 2 * seconds;
    let all = &[Need::Kvm, Need::Mount, Need::Limits];
    vec![
        trial("faults/load", &[Need::Kvm], limit, move |stage| load(stage, seconds, false)),
        trial("faults/load-full-disk-and-limits", all, limit, move |stage| load(stage, seconds, true)),
    ]
}

/// A file that takes all that is left of a disk.
struct Filler(PathBuf);

impl Filler {
    fn fill(folder: &Path) -> anyhow::Result<Filler> {
        let filler = Filler(folder.join("filler"));
        let file = File::create(&filler.0)?;
        let (mut bytes, mut piece) = (0_u64, 16_u64 << 20);
        while piece >= 4096 {
            // SAFETY: a call on a descriptor that is open; it touches no memory of ours.
            match unsafe {
                libc::fallocate(std::os::fd::AsRawFd::as_raw_fd(&file), 0, bytes as i64, piece as i64)
            } {
                0 => bytes += piece,
                _ => piece /= 2,
            }
        }
        ensure!(bytes > 0, "nothing could be filled");
        Ok(filler)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// What a daemon has when nobody asks it for anything.
#[derive(Debug, Clone, Copy)]
struct Rest {
    processes: usize,
    folders: usize,
    descriptors: usize,
    memory_kib: u64,
}

impl Rest {
    /// The zygote and the shells, each of which has a folder.
    fn is_reached(&self) -> bool {
        (self.processes, self.folders) == (1 + SHELLS, SHELLS)
    }

    fn of(daemon: &Daemon) -> anyhow::Result<Rest> {
        let folders = fs::read_dir(daemon.data.join("vms"))?.flatten();
        let folders = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with("vm-"));
        Ok(Rest {
            processes: daemon.processes().len(),
            folders: folders.count(),
            descriptors: daemon.descriptors()?,
            memory_kib: memory_kib(daemon.pid())?,
        })
    }
}

/// Memory that a process has for itself alone.
fn memory_kib(pid: i32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

async fn prepare(client: &mut Client, memory_bytes: u64) -> anyhow::Result<String> {
    let vm = client.boot_embedded(memory_bytes).await?;
    let snapshot = client.snapshot(&vm.id, "base").await?.id;
    client.delete_vm(&vm.id).await?;
    let handler = GuestCommand { args: vec!["upper".into()], ..Default::default() };
    let settings = FunctionSettings { handler: Some(handler), ..Default::default() };
    let request = DeployRequest {
        name: "shout".into(),
        from: Some(From::Snapshot("base".into())),
        settings: Some(settings),
        ..Default::default()
    };
    let mut events = client.functions.deploy(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(Event::Function(_)) = event.event {
            return Ok(snapshot);
        }
    }
    bail!("the function was not deployed")
}

async fn load(stage: Stage, seconds: u64, all: bool) -> anyhow::Result<()> {
    let disk = all.then(|| SmallDisk::mount(DISK_BYTES)).transpose()?;
    let mut daemon = match &disk {
        Some(disk) => {
            fs::create_dir(disk.data())?;
            Daemon::start_at(&stage, &disk.data()).await?
        }
        None => Daemon::start(&stage).await?,
    };
    let mut first = daemon.client().await?;
    let snapshot = prepare(&mut first, if all { clients::HOG_VM_BYTES } else { 64 << 20 }).await?;
    let common = Arc::new(Common::new(daemon.socket(), stage.logs.clone()));
    // Once round, so that all that a request needs is there when it is counted.
    let mut caller = Caller::new(&common, "first");
    let warm = [caller.clone("one", 0).await, caller.invoke("two").await];
    ensure!(warm == [Outcome::Ok, Outcome::Ok], "before any fault: {warm:?}");
    let mut before = Rest::of(&daemon)?;
    eventually("the daemon rests", 90, async || {
        before = Rest::of(&daemon)?;
        Ok(before.is_reached() && first.list_vms().await?.is_empty())
    })
    .await
    .with_context(|| format!("before any fault: {before:?}"))?;

    let mut tasks: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(clients::client(Arc::clone(&common), number))).collect();
    tasks.push(tokio::spawn(clients::slow_reader(Arc::clone(&common))));
    if all {
        tasks.push(tokio::spawn(clients::hog(Arc::clone(&common))));
    }

    let began = Instant::now();
    let length = Duration::from_secs(seconds);
    let (mut worker_kills, mut daemon_kills, mut restarts_ms) = (0_u64, 0_u32, Vec::new());
    let (mut descriptors, mut memory) = (Vec::new(), Vec::new());
    let (mut kill_at, mut daemon_kill_at) = (requests_a_kill(), ANSWERED_A_KILL);
    let (mut filler, mut filled, mut started_full) = (None, 0_u32, 0_u32);
    while began.elapsed() < length {
        // Woken by requests, and at the end.
        let left = length.saturating_sub(began.elapsed());
        let _ = tokio::time::timeout(left.min(Duration::from_millis(100)), common.more.notified()).await;
        if let Some(disk) = &disk {
            let every = length / (FULL_TIMES + 1);
            let since = began.elapsed().saturating_sub(every * (filled + 1));
            if filler.is_none() && filled < FULL_TIMES && !since.is_zero() {
                filler = Some(Filler::fill(&disk.data())?);
            } else if filler.is_some() && since >= (every / 3).min(FULL_AT_MOST) {
                filler = None;
                filled += 1;
            }
        }
        let due = length * (daemon_kills + 1) / (DAEMON_KILLS + 1);
        if daemon_kills < DAEMON_KILLS && began.elapsed() >= due && common.answered() >= daemon_kill_at {
            descriptors.push(daemon.descriptors()?);
            memory.push(memory_kib(daemon.pid())? >> 10);
            daemon.kill_hard()?;
            let down = Instant::now();
            daemon.start_again().await.with_context(|| format!("after kill {daemon_kills}"))?;
            restarts_ms.push(down.elapsed().as_millis());
            started_full += u32::from(filler.is_some());
            daemon_kills += 1;
            daemon_kill_at = common.answered() + ANSWERED_A_KILL;
        }
        let done = common.done();
        if done >= kill_at {
            kill_at = done + requests_a_kill();
            let workers: Vec<_> = daemon
                .processes()
                .into_iter()
                .filter(|process| process.name != "zygote" && !process.zombie)
                .collect();
            if let Some(worker) = workers.get(usize::try_from(done)? % workers.len().max(1)) {
                worker.kill();
                worker_kills += 1;
            }
        }
    }
    drop(filler);
    common.end();
    for task in tasks {
        tokio::time::timeout(crate::trial::limit(60), task).await.context("a client hangs")??;
    }

    // Every caller has ended what it was told of, so nothing is left.
    let mut last = daemon.client().await?;
    let left: Vec<String> = last.list_vms().await?.iter().map(|vm| format!("{vm:?}")).collect();
    eventually("no process of an earlier daemon is left", 60, async || Ok(daemon.orphans().is_empty()))
        .await?;
    ensure!(last.verify(&snapshot).await? > 0);
    let mut caller = Caller::new(&common, "last");
    let works = [caller.clone("one", 0).await, caller.invoke("after it all").await];
    let mut after = Rest::of(&daemon)?;
    let rests = eventually("the daemon rests", 90, async || {
        after = Rest::of(&daemon)?;
        Ok(after.is_reached())
    })
    .await;

    let mut counts = common.take_counts();
    let mut text = format!(
        "{seconds} s, {CLIENTS} clients; {worker_kills} workers killed, the daemon {daemon_kills} times (away for at most {} ms); \
         the disk was full {filled} times, {started_full} times when a daemon started; {} VMs left in nobody's hands\n",
        restarts_ms.iter().max().copied().unwrap_or(0),
        left.len()
    );
    text += &counts.text();
    text += &format!("at rest before: {before:?}\nat rest after:  {after:?}\n");
    text += &format!("at each kill: descriptors {descriptors:?}, MiB of memory {memory:?}\n");
    fs::write(stage.logs.join("faults.txt"), &text)?;
    let wrong = counts.wrong();
    ensure!(wrong.is_empty(), "{} answers that should not be:\n{}\n{text}", wrong.len(), wrong.join("\n"));
    ensure!(left.is_empty(), "VMs that nobody knows of:\n{}\n{text}", left.join("\n"));
    ensure!(works == [Outcome::Ok, Outcome::Ok], "after it all: {works:?}\n{text}");
    rests.with_context(|| text.clone())?;
    ensure!(after.descriptors <= before.descriptors + 40, "descriptors are left open:\n{text}");
    ensure!(after.memory_kib <= before.memory_kib + GROWN_KIB_MAX, "the daemon has grown:\n{text}");
    for what in ["clone", "invoke"] {
        ensure!(counts.of(what, &Outcome::Ok) > 0, "not one {what} went well:\n{text}");
    }
    ensure!(daemon_kills > 0 && worker_kills > 0, "nothing was killed:\n{text}");
    if all {
        ensure!(
            filled > 0 && counts.of("hog", &Outcome::Ok) > 0,
            "no disk was full, or no limit reached:\n{text}"
        );
    }
    Ok(())
}
