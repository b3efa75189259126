//! VMs that outlived an earlier daemon: it was killed, or left them running ([`Fleet::leave`]).
//!
//! For each folder in `vms/`: if nobody is behind its door, the VM has ended, and the folder is removed. If somebody is and the record is
//! empty, the VM was half made, or nobody's that this daemon could know: it is ended. Otherwise it is taken over with its console, its
//! agent's port, its page faults and its disks. Nothing here changes a VM before that is done, so a daemon that is killed meanwhile leaves it
//! as it was, for the next one. VMs of one request are its caller's all together: if one of them is not settled, none is.

use std::collections::{HashSet, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::Fleet;
use super::agent::AgentClient;
use super::child::Ward;
use super::console::Console;
use super::disks::{RECORD, VmFolder};
use super::error::FleetError;
use super::limits::{COMMANDS_MAX, DISKS_MAX, FREEZE_TIMEOUT, LAYERS_MAX};
use super::link::Link;
use super::network::LinkRequest;
use super::owner::{Again, Ears, Faults, Owner};
use super::process::Process;
use super::record::{FileId, Papers, Record, Unreadable};
use super::slots::Lease;
use super::tasks::blocking;
use super::vm::{Origin, State, Status, Vm};
use crate::snapshot::memory::pager::PagerSource;
use crate::worker::channel::{AsyncChannel, Channel};
use crate::worker::protocol::{Adopted, CONTROL_VERSION, Event, FromWorker, Greeting};

/// The service begins when all VMs are taken over, or this time has passed: a worker may be busy, with a snapshot for example.
const BEGIN_WITHIN: Duration = Duration::from_secs(10);

/// Most events of its guest that a worker may tell between the words that are waited for.
const EVENTS_BEFORE_MAX: u32 = 1024;

/// What became of what was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Adopted,
    /// It had ended.
    Gone,
    /// It was nobody's, and was ended.
    HalfMade,
    /// It could not be taken over, and was ended.
    Lost,
    /// It is of another version and was left.
    Left,
}

/// A folder, the record in it, and the network slot that it tells of.
type Found = (VmFolder, Result<Option<Record>, Unreadable>, Option<Lease>);

/// A worker that has let this daemon in.
struct Let {
    channel: AsyncChannel,
    adopted: Adopted,
    /// As in [`Event::Adopted`].
    fds: VecDeque<OwnedFd>,
    files: Vec<File>,
}

impl Fleet {
    /// Takes over, ends or removes what is in these folders of `vms/`.
    pub(super) async fn adopt(self: &Arc<Self>, left: Vec<String>) {
        if left.is_empty() {
            return;
        }
        // With their slots, before others are taken down.
        let mut found: Vec<Found> = left
            .into_iter()
            .map(|id| {
                let folder = VmFolder::reopen(&self.vms_dir, &id);
                let record = Record::read(folder.path());
                let slot =
                    record.as_ref().ok().and_then(Option::as_ref).and_then(|record| self.slot_of(record));
                (folder, record, slot)
            })
            .collect();
        let unsettled: HashSet<String> = found
            .iter()
            // A record that is missing is of a VM that was being deleted: its siblings are still somebody's.
            .filter(|(folder, record, _)| match record {
                Ok(None) => folder.path().join(RECORD).exists(),
                Err(error) => matches!(error, Unreadable::Damaged(_)),
                Ok(Some(_)) => false,
            })
            .map(|(folder, ..)| folder.id())
            .collect();
        for (folder, found, _) in &mut found {
            if let Ok(Some(record)) = found {
                match record.siblings.iter().any(|sibling| unsettled.contains(sibling)) {
                    // Killed in the middle of settling them: nobody has heard of any.
                    true => *found = Ok(None),
                    false => self.claims.found(&folder.id(), record, folder.path()),
                }
            }
        }
        // In the order in which they were made.
        found.sort_by_key(|(_, record, _)| match record {
            Ok(Some(record)) => (record.created_unix_ms, record.number),
            _ => (u64::MAX, u64::MAX),
        });
        let mut under_way = JoinSet::new();
        for (folder, record, slot) in found {
            let (fleet, number) = (Arc::clone(self), self.registry.next_number());
            under_way.spawn(async move {
                let id = folder.id();
                let fate = Arc::clone(&fleet).adopt_one(folder, record, slot, number).await;
                fleet.claims.done(&id);
                fate
            });
        }
        let mut fates = Vec::new();
        let all = async {
            while let Some(fate) = under_way.join_next().await {
                fates.extend(fate);
            }
        };
        let in_time = tokio::time::timeout(BEGIN_WITHIN, all).await.is_ok();
        let count = |of: Fate| fates.iter().filter(|fate| **fate == of).count();
        tracing::info!(
            adopted = count(Fate::Adopted),
            gone = count(Fate::Gone),
            half_made = count(Fate::HalfMade),
            lost = count(Fate::Lost),
            left = count(Fate::Left),
            waited_for = under_way.len(),
            "VMs of an earlier service"
        );
        if !in_time {
            tokio::spawn(async move { while under_way.join_next().await.is_some() {} });
        }
    }

    async fn adopt_one(
        self: Arc<Self>,
        mut folder: VmFolder,
        record: Result<Option<Record>, Unreadable>,
        mut slot: Option<Lease>,
        number: u64,
    ) -> Fate {
        let id = folder.id();
        let (ward, door) = match meet(&folder) {
            // The folder goes with its name here.
            Ok(None) => {
                if let Ok(Some(_)) = record {
                    tracing::warn!(vm = %id, "a VM of an earlier service has ended meanwhile");
                }
                return Fate::Gone;
            }
            Ok(Some(found)) => found,
            Err(error) => {
                tracing::error!(vm = %id, %error, "a VM of an earlier service cannot be reached, and is left as it is");
                folder.leave();
                if let Some(slot) = slot {
                    slot.leave();
                }
                return Fate::Left;
            }
        };
        let (fate, problem) = match record {
            Ok(Some(record)) => {
                let talk = tokio::time::timeout(FREEZE_TIMEOUT, enter(door)).await;
                match talk.unwrap_or_else(|_| Err("it does not answer".to_owned())) {
                    Ok(Some(inside)) => {
                        match self.take_in(ward, inside, folder, record, &mut slot, number).await {
                            Ok(()) => return Fate::Adopted,
                            Err((ward, folder, problem)) => {
                                return ended(ward, folder, Fate::Lost, &problem).await;
                            }
                        }
                    }
                    Ok(None) => {
                        let problem =
                            format!("its worker speaks another control protocol than {CONTROL_VERSION}");
                        return left(ward, folder, slot, &problem);
                    }
                    Err(problem) => (Fate::Lost, problem),
                }
            }
            Ok(None) => (Fate::HalfMade, "it was half made, or nobody's".to_owned()),
            Err(other @ Unreadable::OtherVersion(_)) => return left(ward, folder, slot, &other.to_string()),
            Err(problem) => (Fate::Lost, problem.to_string()),
        };
        ended(ward, folder, fate, &problem).await
    }

    /// Makes it one of this daemon's VMs.
    async fn take_in(
        self: &Arc<Self>,
        ward: Ward,
        inside: Let,
        folder: VmFolder,
        record: Record,
        slot: &mut Option<Lease>,
        number: u64,
    ) -> Result<(), (Ward, VmFolder, String)> {
        let Let { channel, adopted, mut fds, files } = inside;
        macro_rules! or_lost {
            ($result:expr) => {
                match $result {
                    Ok(value) => value,
                    Err(problem) => return Err((ward, folder, problem.to_string())),
                }
            };
        }
        let (Some(stderr), Some(console), Some(agent)) = (fds.pop_front(), fds.pop_front(), fds.pop_front())
        else {
            return Err((ward, folder, "its worker gave too few descriptors".to_owned()));
        };
        let (console, agent) = (or_lost!(socket(console)), or_lost!(socket(agent)));
        let disks = or_lost!(record.disks(&adopted.disks, files));
        let faults = or_lost!(self.faults(&adopted, &record, &mut fds).await);
        let again = self.again(&record).await;
        let stderr = or_lost!(Process::stderr(stderr));
        let process = Process::adopt(ward, stderr);
        let (link, events) = Link::start(channel);
        let state = match adopted.running {
            true => Vm::running_state(record.generation),
            false => State::Paused,
        };
        let status = Status {
            state,
            exit_reason: None,
            protocol: record.protocol,
            start_us: record.start_us,
            steps: Vec::new(),
            restarts: record.restarts,
        };
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let vm = Arc::new(Vm {
            id: folder.id(),
            papers: Papers::adopted(folder.path(), &record),
            agent: AgentClient::resume(agent, record.hello()),
            console: Console::start(console, &[]),
            name: record.name.map(OnceLock::from).unwrap_or_default(),
            held: AtomicBool::new(false),
            pool: record.pool.map(Arc::from),
            origin: record.origin,
            kernel: record.kernel,
            ready: record.ready,
            vcpus: record.vcpus,
            memory_bytes: record.memory_bytes,
            generation: record.generation,
            host_name: Mutex::new(record.host_name),
            entropy: Mutex::new(record.entropy),
            memory_mode: record.memory_mode,
            networks: Mutex::new(record.networks),
            limits: record.limits,
            created_unix_ms: record.created_unix_ms,
            number,
            process,
            trouble: Arc::new(Mutex::new(None)),
            status: watch::Sender::new(status),
            events: self.events.clone(),
            commands,
            ready_port: watch::Sender::new(None),
        });
        let mut ears = Ears {
            vm: Arc::clone(&vm),
            events,
            phases: None,
            exit: None,
            reset: adopted.reset,
            deaf: false,
            faults,
            attachment: None,
        };
        if !adopted.regions.is_empty()
            && let Err(problem) = ears.attach(&adopted.regions, fds.into_iter().take(1).collect())
        {
            vm.kill(&format!("its page faults cannot be answered: {problem}"));
        }
        let owner = Owner {
            group: self.cgroups.find(&vm.id, vm.limits),
            vm: Arc::clone(&vm),
            link,
            commands: inbox,
            ears,
            presence: vm.agent.presence(),
            agent_gone: false,
            disks,
            folder,
            slot: slot.take(),
            again,
            restarts: VecDeque::new(),
            panics: 0,
        };
        self.registry.adopt(&vm);
        if let Some(pool) = &vm.pool {
            self.pools.adopt(pool, &vm);
        }
        tracing::info!(
            vm = %vm.id,
            pid = vm.process.pid(),
            unclaimed = vm.is_unclaimed(),
            "taken over from an earlier service"
        );
        if let Some(time) = self.unclaimed_time.filter(|_| vm.is_unclaimed()) {
            tokio::spawn(end_unclaimed(Arc::clone(&vm), time));
        }
        owner.spawn();
        Ok(())
    }

    /// The network slot that it has.
    fn slot_of(&self, record: &Record) -> Option<Lease> {
        let link = record.networks.iter().find_map(|network| match &network.link {
            LinkRequest::Slot(link) => Some(link),
            _ => None,
        });
        self.slots.resume(link?)
    }

    /// What answers its page faults, if it wants that: `fds` are then the userfaultfd and the memory file, of which the latter is taken.
    async fn faults(
        &self,
        adopted: &Adopted,
        record: &Record,
        fds: &mut VecDeque<OwnedFd>,
    ) -> Result<Option<Faults>, String> {
        if adopted.regions.is_empty() {
            return Ok(None);
        }
        let memory = fds.remove(1).map(File::from).ok_or("its worker gave no memory file")?;
        let id = FileId::of(&memory).map_err(|error| error.to_string())?;
        if record.memory != Some(id) {
            return Err("its worker gave another memory file than it had".to_owned());
        }
        let pager = Arc::clone(&self.pager);
        if let Origin::Snapshot(snapshot) = &record.origin
            && let Ok(source) = self.snapshots.source(snapshot).await
        {
            return Ok(Some(Faults { pager, source: Arc::clone(&source.pages) }));
        }
        // The snapshot was deleted; its clones keep what they have.
        let source = blocking(move || PagerSource::new(Arc::new(memory))).await;
        let source = source.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        Ok(Some(Faults { pager, source: Arc::new(source) }))
    }

    /// How to boot it again, if that can still be done with what it was booted from.
    async fn again(&self, record: &Record) -> Option<Again> {
        let again = record.again.as_ref()?;
        let image = match &record.origin {
            Origin::Image(name) => Some(name.as_str()),
            Origin::Embedded => None,
            Origin::Snapshot(_) => return None,
        };
        let bootable = match self.images.bootable(image).await {
            Ok(bootable) => bootable,
            Err(error) => {
                tracing::warn!(%error, "a VM that was taken over will not be booted again");
                return None;
            }
        };
        let same = |file: &File, id: FileId| FileId::of(file).is_ok_and(|found| found == id);
        let module_same = match (&bootable.module, again.module) {
            (Some(module), Some(id)) => same(module, id),
            (None, None) => true,
            _ => false,
        };
        // The embedded guest is this program's own, and in no store.
        if image.is_some() && !(same(&bootable.kernel, again.kernel) && module_same) {
            tracing::warn!("a VM that was taken over will not be booted again: its image is another one now");
            return None;
        }
        Some(Again { spec: again.spec.clone(), kernel: bootable.kernel, module: bootable.module })
    }
}

/// Ends a VM of which its caller may never have heard, if nobody names it for so long.
async fn end_unclaimed(vm: Arc<Vm>, time: Duration) {
    if tokio::time::timeout(time, vm.ended()).await.is_err() && vm.is_unclaimed() {
        let seconds = time.as_secs();
        tracing::warn!(vm = %vm.id, seconds, "a VM that was taken over and that nobody has ever named is ended");
        vm.kill(&format!(
            "an earlier service made it, and in {seconds} s (--unclaimed-time) no call has named it: its caller never heard of it"
        ));
    }
}

/// Who is behind a folder's door, and the connection; `None`: nobody.
fn meet(folder: &VmFolder) -> io::Result<Option<(Ward, OwnedFd)>> {
    let Some(door) = folder.knock()? else { return Ok(None) };
    let ward = match Ward::watch(socket_peercred(&door)?.pid) {
        Ok(ward) => ward,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // Who listens is there still, so the number was still its own when it was watched.
    let mut polled = [PollFd::new(&door, PollFlags::HUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut polled, Some(&now))? {
        0 => Ok(Some((ward, door))),
        _ => Ok(None),
    }
}

/// Says who we are and hears what it is; `None`: it is of another version.
async fn enter(door: OwnedFd) -> Result<Option<Let>, String> {
    let text = |error: crate::worker::channel::ChannelError| error.to_string();
    let channel = AsyncChannel::new(Channel::from_fd(door)).map_err(|error| error.to_string())?;
    channel.send(&Greeting::ours(), &[]).await.map_err(text)?;
    let (greeting, _) = channel.recv::<Greeting>().await.map_err(text)?;
    match greeting.version() {
        Some(CONTROL_VERSION) => {}
        Some(_) => return Ok(None),
        None => return Err("what is behind its door is no worker".to_owned()),
    }
    let confused = || "it says something else than what it is".to_owned();
    let mut before = 0;
    let (mut adopted, fds) = loop {
        match channel.recv().await.map_err(text)? {
            (FromWorker::Event(Event::Adopted(adopted)), fds) => break (adopted, fds),
            // Its guest does something at this very moment; what is not over is said in `adopted`.
            (FromWorker::Event(_), _) if before < EVENTS_BEFORE_MAX => before += 1,
            _ => return Err(confused()),
        }
    };
    let count = usize::try_from(adopted.files).unwrap_or(usize::MAX);
    if adopted.disks.len() > DISKS_MAX || count > DISKS_MAX * (LAYERS_MAX + 2) {
        return Err(confused());
    }
    let mut files = Vec::with_capacity(count);
    while files.len() < count {
        match channel.recv().await.map_err(text)? {
            (FromWorker::Event(Event::AdoptedFiles), some) if !some.is_empty() => {
                files.extend(some.into_iter().map(File::from));
            }
            (FromWorker::Event(Event::GuestReset { how }), _) => adopted.reset = Some(how),
            (FromWorker::Event(_), _) if before < EVENTS_BEFORE_MAX => before += 1,
            _ => return Err(confused()),
        }
    }
    Ok(Some(Let { channel, adopted, fds: fds.into(), files }))
}

/// Leaves it to a service of its own version; when it has ended, its folder goes.
fn left(ward: Ward, mut folder: VmFolder, mut slot: Option<Lease>, problem: &str) -> Fate {
    if let Some(slot) = &mut slot {
        slot.never_mind();
    }
    tracing::error!(
        vm = %folder.id(),
        pid = ward.pid(),
        problem,
        "a VM of an earlier service is left to a service of its own version, and ends when none comes in time"
    );
    folder.leave();
    let path = folder.path().to_owned();
    tokio::spawn(async move {
        if ward.ended().await.is_ok() {
            // Nobody else works in it as long as this service lives.
            let _ = fs::remove_dir_all(path);
        }
        drop(slot);
    });
    Fate::Left
}

/// Ends it; its folder goes then.
async fn ended(ward: Ward, folder: VmFolder, fate: Fate, problem: &str) -> Fate {
    match fate {
        Fate::HalfMade => tracing::info!(vm = %folder.id(), problem, "a VM of an earlier service is ended"),
        _ => {
            tracing::error!(vm = %folder.id(), problem, "a VM of an earlier service cannot be taken over and is ended")
        }
    }
    ward.kill();
    if let Err(error) = ward.ended().await {
        tracing::warn!(%error, "the end of a worker cannot be seen");
    }
    drop(folder);
    fate
}

fn socket(fd: OwnedFd) -> Result<UnixStream, FleetError> {
    let failed = || FleetError::io("a socket that a worker gave");
    // One that is no socket says so here, and one that blocks would hold all others up.
    rustix::net::sockopt::socket_type(fd.as_fd()).map_err(io::Error::from).map_err(failed())?;
    let socket = StdUnixStream::from(fd);
    socket.set_nonblocking(true).map_err(failed())?;
    UnixStream::from_std(socket).map_err(failed())
}
