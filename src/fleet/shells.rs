//! The reserve of shells: worker processes started ahead, so that no clone waits for a fork.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::error::FleetError;
use super::limits::WORKER_TIMEOUT;
use super::link::{Events, Link};
use super::process::{Process, Spawner};
use crate::worker::channel::AsyncChannel;
use crate::worker::protocol::{Event, HostReport};

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
            count: watch::Sender::new(0),
        });
        let filler = tokio::spawn(fill(Arc::clone(&shells)));
        let _ = shells.filler.set(filler.abort_handle());
        shells
    }

    /// Takes a shell; starts one when there is none left.
    pub async fn take(&self) -> Result<Shell, FleetError> {
        let ready = loop {
            let shell = self.lock().pop_front();
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
        Ok(Shell { process, link, events, host, console: Socket::new()?, agent: Socket::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Shell>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn fill(shells: Arc<Shells>) {
    let mut told = String::new();
    loop {
        let count = shells.count();
        if count >= shells.size {
            shells.taken.notified().await;
        } else if count > 0 && tokio::time::timeout(QUIET, shells.taken.notified()).await.is_ok() {
            // Another was taken meanwhile: not quiet yet.
        } else {
            match shells.make().await {
                Ok(shell) => {
                    shells.lock().push_back(shell);
                    shells.count.send_replace(shells.count());
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
