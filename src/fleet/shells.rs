//! The reserve of shells: worker processes started ahead, so that no clone waits for a fork.
//!
//! Most of them expect clones of the snapshot that was cloned last, and have done what is the same for all of these
//! ([`Request::Expect`]). One, if there is more than one, is left as it is: for a cold boot, or the first clone of another snapshot. A shell
//! that expected something else serves too; it has to begin again.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::error::FleetError;
use super::limits::WORKER_TIMEOUT;
use super::link::{Events, Link};
use super::process::{Process, Spawner};
use crate::snapshot::store::OpenSnapshot;
use crate::worker::channel::AsyncChannel;
use crate::worker::protocol::{Event, HostReport, Request};

/// Most shells that can be asked for.
pub const SHELLS_MAX: usize = 64;
/// The reserve is filled when no clone has been started for this long: starting processes would take the CPUs
/// from clones that are on their way. An empty reserve is filled at once.
const QUIET: Duration = Duration::from_millis(5);
/// After a failure to start a worker.
const RETRY: Duration = Duration::from_secs(1);

/// A worker process that has been told nothing yet, and the sockets it will be given.
#[derive(Debug)]
pub struct Shell {
    pub process: Process,
    pub link: Arc<Link>,
    pub events: Events,
    /// What its host can show a guest.
    pub host: HostReport,
    pub console: Socket,
    pub agent: Socket,
    /// The snapshot whose clones it expects.
    expects: Option<String>,
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
    /// What was cloned last. Weak: a snapshot that is deleted must not keep its disk space because it was cloned once.
    expected: Mutex<Weak<OpenSnapshot>>,
    /// How many are ready.
    count: watch::Sender<usize>,
}

impl Shells {
    /// Starts filling in the background; a `size` of 0 keeps none.
    pub fn start(spawner: Spawner, size: usize) -> Arc<Self> {
        let shells = Arc::new(Self {
            spawner,
            size: size.min(SHELLS_MAX),
            ready: Mutex::new(VecDeque::new()),
            taken: Notify::new(),
            filler: OnceLock::new(),
            expected: Mutex::default(),
            count: watch::Sender::new(0),
        });
        let filler = tokio::spawn(fill(Arc::clone(&shells)));
        let _ = shells.filler.set(filler.abort_handle());
        shells
    }

    /// Takes a shell for a cold boot; starts one when there is none left.
    pub async fn take(&self) -> Result<Shell, FleetError> {
        self.take_best(None).await
    }

    /// Takes a shell for a clone, if possible one that expects it; those that follow will.
    pub async fn take_for(&self, snapshot: &Arc<OpenSnapshot>) -> Result<Shell, FleetError> {
        *self.expected() = Arc::downgrade(snapshot);
        let id = snapshot.manifest.id.to_string();
        self.take_best(Some(&id)).await
    }

    async fn take_best(&self, wanted: Option<&str>) -> Result<Shell, FleetError> {
        let ready = loop {
            let shell = {
                let mut ready = self.lock();
                let of =
                    |wanted: Option<&str>| ready.iter().position(|shell| shell.expects.as_deref() == wanted);
                let best = of(wanted).or_else(|| of(None)).unwrap_or(0);
                ready.remove(best)
            };
            match shell {
                Some(shell) if shell.link.is_closed() => shell.process.kill(),
                other => break other,
            }
        };
        self.count.send_replace(self.count());
        self.taken.notify_one();
        match ready {
            Some(shell) => Ok(shell),
            None => self.make().await,
        }
    }

    /// Stops filling and lets the shells go; each ends when its socket closes.
    pub fn close(&self) {
        if let Some(filler) = self.filler.get() {
            filler.abort();
        }
        self.lock().clear();
    }

    /// Waits until the reserve is full, as it is in a service that has been up for a moment.
    pub async fn full(&self) {
        // The sender lives as long as this.
        let _ = self.count.subscribe().wait_for(|count| *count >= self.size).await;
    }

    /// How many are ready.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    async fn make(&self) -> Result<Shell, FleetError> {
        let (process, channel) = self.spawner.spawn().await?;
        let channel = AsyncChannel::new(channel).map_err(FleetError::io("cannot watch a control socket"))?;
        let (link, mut events) = Link::start(channel);
        let first = tokio::time::timeout(WORKER_TIMEOUT, events.recv()).await;
        let host = match first {
            Ok(Some((Event::Hello(host), _))) => host.map_err(FleetError::Fault),
            Ok(None) => {
                let status = process.ended().await;
                Err(FleetError::Internal(format!("a worker did not start: {}", process.obituary(status))))
            }
            Ok(Some(_)) => Err(FleetError::WorkerConfused),
            Err(_) => Err(FleetError::WorkerTimeout(WORKER_TIMEOUT.as_secs())),
        };
        let host = host.inspect_err(|_| process.kill())?;
        tracing::debug!(?host, "a worker is ready");
        let (console, agent) = (Socket::new()?, Socket::new()?);
        Ok(Shell { process, link, events, host, console, agent, expects: None })
    }

    /// Tells a shell what to expect, if something is expected and another shell is left that was told nothing. It is not in the
    /// reserve meanwhile. One that cannot do it is still a shell.
    async fn tell(&self, shell: &mut Shell) {
        let blank = self.lock().iter().any(|shell| shell.expects.is_none());
        let expected = self.expected().upgrade();
        let Some(expected) = expected.filter(|_| blank || self.size < 2) else { return };
        let state = [expected.state.as_fd()];
        let told = shell.link.request(Request::Expect, &state);
        match tokio::time::timeout(WORKER_TIMEOUT, told).await {
            Ok(Ok(_)) => shell.expects = Some(expected.manifest.id.to_string()),
            Ok(Err(error)) => {
                // Nor could the next one: whoever clones it hears why.
                tracing::debug!(%error, "a shell could not prepare for clones of a snapshot");
                *self.expected() = Weak::new();
            }
            Err(_) => shell.process.kill(),
        }
    }

    /// Takes a shell out of the reserve that could expect what it does not, unless it is the last that was told nothing.
    fn take_idle(&self) -> Option<Shell> {
        let expected = self.expected().upgrade()?.manifest.id.to_string();
        let mut ready = self.lock();
        let blank = ready.iter().filter(|shell| shell.expects.is_none()).count();
        let other = ready.iter().position(|shell| shell.expects.as_ref().is_some_and(|is| *is != expected));
        let place = match other {
            Some(other) if blank > 0 || self.size < 2 => other,
            _ if blank > 1 || (blank > 0 && self.size < 2) => {
                ready.iter().position(|shell| shell.expects.is_none())?
            }
            _ => return None,
        };
        let idle = ready.remove(place);
        self.count.send_replace(ready.len());
        idle
    }

    fn expected(&self) -> MutexGuard<'_, Weak<OpenSnapshot>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, shell: Shell) {
        if shell.link.is_closed() {
            shell.process.kill();
        } else {
            self.lock().push_back(shell);
        }
        self.count.send_replace(self.count());
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Shell>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn fill(shells: Arc<Shells>) {
    let mut told = String::new();
    loop {
        let count = shells.count();
        if count > 0 && tokio::time::timeout(QUIET, shells.taken.notified()).await.is_ok() {
            // Another was taken meanwhile: not quiet yet.
            continue;
        }
        if let Some(mut shell) = shells.take_idle() {
            shells.tell(&mut shell).await;
            shells.put(shell);
        } else if count >= shells.size {
            shells.taken.notified().await;
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
