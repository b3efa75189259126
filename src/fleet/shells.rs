//! The reserve of shells: worker processes started ahead, so that no clone waits for a fork.
//!
//! Most of them expect clones like the one that was started last: of the same snapshot, and if that one needed nothing that must be
//! asked for (a link, the pager), each is such a clone already, with disks and an id of its own, but for the moment in which its clocks
//! go on ([`Request::Seat`]); otherwise it has done what is the same for all clones of the snapshot ([`Request::Expect`]). One, if there is
//! more than one, is left as it is: for a cold boot, or the first clone of another snapshot. A shell that expected something else serves
//! too; it has to begin again.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, OnceCell, watch};
use tokio::task::AbortHandle;

use super::disks::{VmDisk, VmFolder};
use super::error::FleetError;
use super::id;
use super::jail::JailNotes;
use super::limits::WORKER_TIMEOUT;
use super::link::{Events, Link};
use super::network::{OpenLink, VmNetwork};
use super::panics;
use super::process::{Process, Spawner};
use super::slots::Lease;
use super::sources::Source;
use crate::worker::channel::AsyncChannel;
use crate::worker::protocol::{Event, HostReport, MemoryMode, Reply, Request, RestoreSpec};

/// Most shells that can be asked for.
pub const SHELLS_MAX: usize = 64;
/// The reserve is filled when no shell has been taken for this long: starting processes takes the CPUs from clones that are on their way,
/// and who asks for one now is likely to ask for another.
const QUIET: Duration = Duration::from_millis(50);
/// The same while it is being filled, and when only one is left. An empty reserve is filled at once.
const PAUSE: Duration = Duration::from_millis(5);
/// After a failure to start a worker.
const RETRY: Duration = Duration::from_secs(1);

/// A worker process that has been told nothing yet, and the sockets it will be given.
#[derive(Debug)]
pub struct Shell {
    pub process: Process,
    pub link: Arc<Link>,
    pub events: Events,
    /// What this host can show a guest.
    pub host: Arc<HostReport>,
    pub console: Socket,
    pub agent: Socket,
    /// Of the VM that it will be.
    pub folder: VmFolder,
    /// Its VM can outlive the daemon.
    pub kept: bool,
    pub lifeline: Lifeline,
    expects: Expects,
    /// It did not answer: what it is now nobody knows.
    unsure: bool,
}

/// Ends the process when it is dropped, unless it was let go.
#[derive(Debug)]
pub struct Lifeline(Option<Process>);

impl Lifeline {
    /// Somebody else sees to the process's end.
    pub fn let_go(mut self) {
        self.0 = None;
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            process.kill();
        }
    }
}

/// What a shell has done ahead.
#[derive(Debug)]
enum Expects {
    Nothing,
    /// A clone of the snapshot with this id.
    Clone(String),
    /// It is one.
    Seat(Seat),
}

impl Expects {
    /// The snapshot's id.
    fn snapshot(&self) -> Option<&str> {
        match self {
            Self::Nothing => None,
            Self::Clone(snapshot) => Some(snapshot),
            Self::Seat(seat) => Some(&seat.snapshot),
        }
    }

    fn is(&self, snapshot: &str, seat: bool) -> bool {
        self.snapshot() == Some(snapshot) && matches!(self, Self::Seat(_)) == seat
    }
}

/// A clone that was made ahead: it is let run by [`Request::Start`].
#[derive(Debug)]
pub struct Seat {
    snapshot: String,
    pub disks: Vec<VmDisk>,
    /// `None`: its links are down.
    plugged: Option<Plugged>,
}

/// The links of a clone that was made ahead, and the network slot that one of them may be.
#[derive(Debug)]
pub struct Plugged {
    pub networks: Vec<VmNetwork>,
    pub slot: Option<Lease>,
}

impl Shell {
    /// What the clone that it is was plugged into when it was made.
    pub fn take_plugged(&mut self) -> Option<Plugged> {
        match &mut self.expects {
            Expects::Seat(seat) => seat.plugged.take(),
            _ => None,
        }
    }

    /// The clone that it is, if it is one of this snapshot.
    pub fn take_seat(&mut self, snapshot: &str) -> Option<Seat> {
        match std::mem::replace(&mut self.expects, Expects::Nothing) {
            Expects::Seat(seat) if seat.snapshot == snapshot => Some(seat),
            // What it made is given up with the next request.
            Expects::Seat(_) => {
                self.folder.clear();
                None
            }
            _ => None,
        }
    }
}

/// What the next clones are expected to be.
#[derive(Debug, Default)]
struct Expected {
    /// Weak: a snapshot that is deleted must not keep its disk space because it was cloned once.
    source: Weak<Source>,
    /// They need nothing that must be asked for.
    seats: bool,
}

/// A stream socket: the daemon's end, and the end that goes to the worker.
#[derive(Debug)]
pub struct Socket {
    pub ours: UnixStream,
    pub theirs: OwnedFd,
}

impl Socket {
    pub fn new() -> Result<Self, FleetError> {
        let failed = || FleetError::io("cannot make a socket pair");
        let (ours, theirs) = StdUnixStream::pair().map_err(failed())?;
        ours.set_nonblocking(true).map_err(failed())?;
        Ok(Self { ours: UnixStream::from_std(ours).map_err(failed())?, theirs: theirs.into() })
    }
}

/// The reserve.
#[derive(Debug)]
pub struct Shells {
    spawner: Spawner,
    size: usize,
    ready: Mutex<VecDeque<Shell>>,
    taken: Notify,
    filler: OnceLock<AbortHandle>,
    expected: Mutex<Expected>,
    /// Where the folders of VMs are.
    vms_dir: PathBuf,
    /// How long VMs outlive this daemon, waiting for the next; `None`: not at all.
    orphan_time: Option<Duration>,
    /// What the first worker said of this host.
    host: OnceCell<Arc<HostReport>>,
    /// What workers said of their jail.
    jail: JailNotes,
    /// Nothing is left to do in the background.
    settled: watch::Sender<bool>,
}

impl Shells {
    /// Starts filling in the background; a `size` of 0 keeps none.
    pub fn start(
        spawner: Spawner,
        size: usize,
        vms_dir: PathBuf,
        orphan_time: Option<Duration>,
    ) -> Arc<Self> {
        let shells = Arc::new(Self {
            spawner,
            size: size.min(SHELLS_MAX),
            ready: Mutex::new(VecDeque::new()),
            taken: Notify::new(),
            filler: OnceLock::new(),
            expected: Mutex::default(),
            vms_dir,
            orphan_time,
            host: OnceCell::new(),
            jail: JailNotes::default(),
            settled: watch::Sender::new(false),
        });
        let filled = Arc::clone(&shells);
        let filling = move || fill(Arc::clone(&filled));
        let filler = tokio::spawn(panics::again("filling the reserve of shells", filling, |_| {}));
        let _ = shells.filler.set(filler.abort_handle());
        shells
    }

    /// Takes a shell for a cold boot; starts one when there is none left.
    pub async fn take(&self) -> Result<Shell, FleetError> {
        self.take_best(&[&|expects| matches!(expects, Expects::Nothing)]).await
    }

    /// Starts a worker and makes it a clone of this snapshot that only needs to be let run, with these links; it belongs to no reserve.
    pub async fn seat_for(
        &self,
        source: &Source,
        links: Vec<OpenLink>,
        plugged: Plugged,
    ) -> Result<Shell, FleetError> {
        let mut shell = self.make().await?;
        match self.seat(&mut shell, source, &links, Some(plugged)).await {
            Ok(seat) => shell.expects = Expects::Seat(seat),
            Err(error) => {
                shell.process.kill();
                return Err(error);
            }
        }
        Ok(shell)
    }

    /// Takes a shell for a clone, if possible one that expects it; those that follow will. `seat`: a clone that was made ahead will do.
    pub async fn take_for(&self, source: &Arc<Source>, seat: bool) -> Result<Shell, FleetError> {
        *self.expected() = Expected { source: Arc::downgrade(source), seats: seat };
        let id = source.id();
        self.take_best(&[
            &|expects| expects.is(&id, seat),
            // It has less to do again than others have.
            &|expects| seat && expects.is(&id, false),
            &|expects| matches!(expects, Expects::Nothing),
        ])
        .await
    }

    /// Ends the shells that expect clones of a snapshot that is gone: they hold its files.
    pub fn forget(&self, snapshot: &str) {
        let mut expected = self.expected();
        if expected.source.upgrade().is_none_or(|source| source.id() == snapshot) {
            *expected = Expected::default();
        }
        drop(expected);
        self.renew(snapshot);
    }

    /// Ends the shells that stand ready for clones of a snapshot: others are made, that know what is known now.
    pub fn renew(&self, snapshot: &str) {
        let mut ready = self.lock();
        let (gone, kept): (VecDeque<Shell>, _) =
            ready.drain(..).partition(|shell| shell.expects.snapshot() == Some(snapshot));
        *ready = kept;
        drop(ready);
        for shell in gone {
            shell.process.kill();
        }
        self.taken.notify_one();
    }

    /// One that the first of `wishes` fits, or the second, and so on, or any.
    async fn take_best(&self, wishes: &[&(dyn Fn(&Expects) -> bool + Sync)]) -> Result<Shell, FleetError> {
        let ready = loop {
            let shell = {
                let mut ready = self.lock();
                let mut best =
                    wishes.iter().filter_map(|wish| ready.iter().position(|shell| wish(&shell.expects)));
                let best = best.next().unwrap_or(0);
                ready.remove(best)
            };
            match shell {
                Some(shell) if shell.link.is_closed() => shell.process.kill(),
                other => break other,
            }
        };
        self.settled.send_replace(false);
        self.taken.notify_one();
        match ready {
            Some(shell) => Ok(shell),
            None => self.make().await,
        }
    }

    /// Stops filling and ends the shells.
    pub fn close(&self) {
        if let Some(filler) = self.filler.get() {
            filler.abort();
        }
        self.lock().clear();
    }

    /// Waits until the reserve is full and all is done ahead that can be, as in a service that has been up for a moment.
    pub async fn full(&self) {
        // The sender lives as long as this.
        let _ = self.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// How many are to be ready.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many are ready.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    async fn make(&self) -> Result<Shell, FleetError> {
        let (process, channel, stderr) = self.spawner.spawn().await?;
        let lifeline = Lifeline(Some(process.clone()));
        let channel = AsyncChannel::new(channel).map_err(FleetError::io("cannot watch a control socket"))?;
        let (link, mut events) = Link::start(channel);
        let first = tokio::time::timeout(WORKER_TIMEOUT, events.recv()).await;
        let ready = match first {
            Ok(Some((Event::Hello { ready, jail }, _))) => {
                self.jail.note(jail);
                ready.map_err(FleetError::Fault)
            }
            Ok(None) => {
                let status = process.ended().await;
                Err(match status.and_then(|status| status.signal()) {
                    Some(_) => FleetError::WorkerKilled(process.obituary(status)),
                    None => {
                        FleetError::Internal(format!("a worker did not start: {}", process.obituary(status)))
                    }
                })
            }
            Ok(Some(_)) => Err(FleetError::WorkerConfused),
            Err(_) => Err(FleetError::WorkerTimeout(WORKER_TIMEOUT.as_secs())),
        };
        let (console, agent) = (Socket::new()?, Socket::new()?);
        let mut folder = VmFolder::new(&self.vms_dir, &id::vm_id()?);
        let asked = async {
            ready?;
            if let Some(orphan_time) = self.orphan_time {
                let door = folder.door()?;
                let orphan_ms = u64::try_from(orphan_time.as_millis()).unwrap_or(u64::MAX);
                let fds = [door.as_fd(), console.ours.as_fd(), agent.ours.as_fd(), stderr.as_fd()];
                link.request(Request::Keep { orphan_ms }, &fds).await?;
            }
            self.host.get_or_try_init(|| report(&link)).await.cloned()
        };
        let host = asked.await?;
        tracing::debug!("a worker is ready");
        Ok(Shell {
            process,
            link,
            events,
            host,
            console,
            agent,
            folder,
            kept: self.orphan_time.is_some(),
            lifeline,
            expects: Expects::Nothing,
            unsure: false,
        })
    }

    /// Tells a shell what to expect, if something is expected and another shell is left that was told nothing. It is not in the
    /// reserve meanwhile. One that cannot do it is still a shell.
    async fn tell(&self, shell: &mut Shell) {
        let blank = self.lock().iter().any(|shell| matches!(shell.expects, Expects::Nothing));
        let (source, seats) = {
            let expected = self.expected();
            (expected.source.upgrade(), expected.seats)
        };
        let Some(source) = source.filter(|_| blank || self.size < 2) else { return };
        shell.expects = Expects::Nothing;
        let telling = async {
            match seats {
                true => self.seat(shell, &source, &[], None).await.map(Expects::Seat),
                false => {
                    shell.link.request(Request::Expect, &[source.open.state.as_fd()]).await?;
                    Ok(Expects::Clone(source.id()))
                }
            }
        };
        match telling.await {
            Ok(expects) => shell.expects = expects,
            Err(error) => {
                // Nor could the next one: whoever clones it hears why.
                tracing::debug!(%error, "a shell could not prepare for clones of a snapshot");
                *self.expected() = Expected::default();
                shell.unsure = !matches!(error, FleetError::Fault(_));
            }
        }
    }

    /// Makes a clone that only needs to be let run.
    async fn seat(
        &self,
        shell: &mut Shell,
        source: &Source,
        links: &[OpenLink],
        plugged: Option<Plugged>,
    ) -> Result<Seat, FleetError> {
        source.check_fits(&shell.host)?;
        shell.folder.clear();
        let disks = source.disks(&mut shell.folder)?;
        let spec = RestoreSpec {
            memory_mode: MemoryMode::Mapped,
            disks: disks.iter().map(VmDisk::spec).collect(),
            networks: links.iter().map(|link| link.kind).collect(),
            paused: false,
            ready_port: None,
            working_set: source.learning.learnt(),
        };
        let mut fds = vec![
            shell.console.theirs.as_fd(),
            shell.agent.theirs.as_fd(),
            source.open.state.as_fd(),
            source.open.memory.as_fd(),
        ];
        fds.extend(disks.iter().flat_map(VmDisk::fds));
        fds.extend(links.iter().flat_map(OpenLink::fd));
        shell.link.request(Request::Seat(spec), &fds).await?;
        Ok(Seat { snapshot: source.id(), disks, plugged })
    }

    /// Takes a shell out of the reserve that could expect what it does not, unless it is the last that was told nothing.
    fn take_idle(&self) -> Option<Shell> {
        let (id, seats) = {
            let expected = self.expected();
            (expected.source.upgrade()?.id(), expected.seats)
        };
        let mut ready = self.lock();
        let is_blank = |shell: &Shell| matches!(shell.expects, Expects::Nothing);
        let blank = ready.iter().filter(|shell| is_blank(shell)).count();
        let other = ready.iter().position(|shell| !is_blank(shell) && !shell.expects.is(&id, seats));
        let place = match other {
            Some(other) if blank > 0 || self.size < 2 => other,
            _ if blank > 1 || (blank > 0 && self.size < 2) => ready.iter().position(is_blank)?,
            _ => return None,
        };
        ready.remove(place)
    }

    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a shell into the reserve, unless it came to harm, or what it was told to expect is expected no more: that snapshot may be gone
    /// meanwhile, and the shell would hold its files.
    fn put(&self, shell: Shell) {
        // Locked before the question: `forget` looks through the reserve when it has changed the answer.
        let mut ready = self.lock();
        let expected = self.expected().source.upgrade().map(|source| source.id());
        let told = shell.expects.snapshot();
        let forgotten = told.is_some_and(|told| expected.as_deref() != Some(told));
        if shell.unsure || forgotten || shell.link.is_closed() {
            shell.process.kill();
        } else {
            ready.push_back(shell);
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Shell>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn report(link: &Link) -> Result<Arc<HostReport>, FleetError> {
    match link.request(Request::Report, &[]).await? {
        (Reply::Report(host), _) => Ok(Arc::new(host)),
        _ => Err(FleetError::WorkerConfused),
    }
}

async fn fill(shells: Arc<Shells>) {
    let mut told = String::new();
    // Nothing has been taken for a while.
    let mut quiet = true;
    loop {
        let count = shells.count();
        let pause = if quiet || count == 1 { PAUSE } else { QUIET };
        quiet = count == 0 || tokio::time::timeout(pause, shells.taken.notified()).await.is_err();
        if !quiet {
            continue;
        }
        if let Some(mut shell) = shells.take_idle() {
            shells.tell(&mut shell).await;
            shells.put(shell);
        } else if count >= shells.size {
            let taken = shells.taken.notified();
            shells.settled.send_replace(true);
            if shells.count() < shells.size {
                // Taken meanwhile.
                shells.settled.send_replace(false);
                continue;
            }
            taken.await;
            quiet = false;
        } else {
            match shells.make().await {
                Ok(mut shell) => {
                    shells.tell(&mut shell).await;
                    shells.put(shell);
                }
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::warn!(error, "no shell could be started; trying again every second");
                        told = error;
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}
