//! One VM as the rest of the daemon sees it. Only its owner task ([`super::owner`]) changes it.
//!
//! ```text
//!            cold boot                    clone
//!                |                          |
//!             BOOTING --ready point--> READY    RUNNING          any of these
//!                                        |  \    /  |                 |
//!                                        | PAUSED   |      worker gone, guest off, deleted
//!                                        |          |                 |
//!                                      SNAPSHOTTING (then back)     EXITED
//! ```
//!
//! A guest that resets itself when READY is booted again in place, and stays READY (see `on_reset`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::agent::AgentClient;
use super::cgroup::Limits;
use super::console::Console;
use super::disks::VmDisk;
use super::error::FleetError;
use super::events::{Change, Event, Events, Kind};
use super::network::{LinkRequest, VmNetwork};
use super::process::Process;
use super::record::Papers;
use super::slots::SlotLink;
pub use crate::snapshot::memory::pager::Counts as PagerCounts;
use crate::snapshot::store::Draft;
use crate::snapshot::working_set::Touched;
use crate::worker::protocol::{BootProtocol, Frozen, MemoryMode, Stats, Step, VcpuLook};

/// What a VM was started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    Image(String),
    Embedded,
    /// A snapshot's id.
    Snapshot(String),
}

/// What is known of the random numbers of a clone's system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entropy {
    /// It was not told that it is a clone, or is none.
    #[default]
    Unknown,
    /// Its generator was given entropy of its own, and will draw on it sooner or later.
    Pending,
    /// It has drawn on it: what it gives from now on is this clone's alone.
    Drawn,
}

/// Where in its life a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Booting,
    Ready,
    Running,
    Paused,
    Snapshotting,
    Exited,
}

/// What changes in a VM's life.
#[derive(Debug, Clone)]
pub struct Status {
    pub state: State,
    /// Why it ended.
    pub exit_reason: Option<String>,
    /// Known when it has booted.
    pub protocol: Option<BootProtocol>,
    /// From the request to the ready point or hand-over; 0 until then.
    pub start_us: u64,
    pub steps: Vec<Step>,
    /// How many times it was booted again after a reset of its own.
    pub restarts: u32,
}

/// A VM.
#[derive(Debug)]
pub struct Vm {
    pub id: String,
    /// Given when it is made, or when it is taken out of a pool.
    pub(super) name: OnceLock<String>,
    /// Name of the pool that it was made for.
    pub pool: Option<Arc<str>>,
    /// It stands ready in that pool: nobody's yet.
    pub(super) held: AtomicBool,
    pub origin: Origin,
    /// What the first VM of its line was booted from, for people.
    pub kernel: String,
    /// How it was known to be ready, for people.
    pub ready: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub generation: Option<[u8; 16]>,
    /// What its guest was told to be called, and has confirmed; empty: it was not told.
    pub(super) host_name: Mutex<String>,
    pub(super) entropy: Mutex<Entropy>,
    pub memory_mode: Option<MemoryMode>,
    pub(super) networks: Mutex<Vec<VmNetwork>>,
    pub limits: Limits,
    pub created_unix_ms: u64,
    /// Order of creation.
    pub number: u64,
    pub console: Arc<Console>,
    pub agent: AgentClient,
    pub process: Process,
    /// What the next daemon must know of it.
    pub(super) papers: Papers,
    /// Why the daemon ended it, if it did.
    pub(super) trouble: Arc<Mutex<Option<String>>>,
    pub(super) status: watch::Sender<Status>,
    pub(super) events: Events,
    pub(super) commands: mpsc::Sender<Command>,
    /// What the guest last wrote to the ready port.
    pub(super) ready_port: watch::Sender<Option<u32>>,
}

type Answer<T> = oneshot::Sender<Result<T, FleetError>>;

/// What the owner task can be told.
#[derive(Debug)]
pub enum Command {
    Pause(Answer<()>),
    Resume(Answer<()>),
    /// Freeze into the draft's files. With `stop_after` the VM stays paused if that goes well.
    Freeze {
        draft: Box<Draft>,
        stop_after: bool,
        answer: Answer<FrozenVm>,
    },
    /// Press its power button. A reset is its end from now on.
    PowerButton(Answer<()>),
    /// End it, giving this reason.
    Stop(String),
    Stats(Answer<(Stats, PagerCounts)>),
    /// What it has touched of its snapshot's memory.
    Touched(Answer<Touched>),
    Inspect(Answer<Vec<VcpuLook>>),
    /// Leave it running for the next daemon.
    Release(Answer<()>),
}

/// How a VM was stopped.
#[derive(Debug)]
pub struct Stopped {
    pub vm: Arc<Vm>,
    /// The guest ended by itself.
    pub by_itself: bool,
    /// Why the guest was not asked.
    pub not_asked: Option<String>,
    pub took: Duration,
}

/// A frozen VM that is not published yet.
#[derive(Debug)]
pub struct FrozenVm {
    pub draft: Box<Draft>,
    pub frozen: Frozen,
    pub disks: Vec<VmDisk>,
}

impl Vm {
    pub fn name(&self) -> Option<&str> {
        self.name.get().map(String::as_str)
    }

    /// What its guest was told to be called, and has confirmed; empty: it was not told.
    pub fn host_name(&self) -> String {
        self.host_name.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is known of its system's random numbers.
    pub fn entropy(&self) -> Entropy {
        *self.entropy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn learn_entropy(&self, entropy: Entropy) {
        *self.entropy.lock().unwrap_or_else(PoisonError::into_inner) = entropy;
    }

    pub fn networks(&self) -> Vec<VmNetwork> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its network slot, if it has one.
    pub fn slot(&self) -> Option<SlotLink> {
        let networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        networks.iter().find_map(|network| match &network.link {
            LinkRequest::Slot(link) => Some(SlotLink::clone(link)),
            _ => None,
        })
    }

    /// Its network slot has other ports now.
    pub(super) fn slot_changed(&self, link: SlotLink) {
        let mut networks = self.networks.lock().unwrap_or_else(PoisonError::into_inner);
        for network in networks.iter_mut() {
            if let LinkRequest::Slot(old) = &mut network.link {
                **old = link.clone();
            }
        }
    }

    /// Whether it stands ready in its pool and is nobody's yet.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    /// What watchers are told of it.
    pub(super) fn event(&self, change: Change) -> Event {
        let status = self.status.borrow();
        Event {
            state: Some(status.state),
            reason: status.exit_reason.clone(),
            held: self.is_held(),
            ..Event::new(Kind::Vm, change, &self.id, self.name())
        }
    }

    /// Changes its status; watchers are told if it is in another state then.
    pub(super) fn change(&self, change: impl FnOnce(&mut Status)) {
        let mut moved = false;
        self.status.send_modify(|status| {
            let before = (status.state, status.restarts);
            change(status);
            moved = before != (status.state, status.restarts);
        });
        if moved {
            self.events.tell(|| self.event(Change::Changed));
        }
    }

    /// Ends it, giving the reason. [`Vm::ended`] tells when it is done.
    pub(super) fn kill(&self, reason: &str) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.get_or_insert_with(|| reason.to_owned());
        self.process.kill();
    }

    /// Waits for its end; gives the reason.
    pub async fn ended(&self) -> String {
        let mut status = self.status.subscribe();
        let ended = status.wait_for(|status| status.state == State::Exited).await;
        ended.ok().and_then(|status| status.exit_reason.clone()).unwrap_or_else(|| "it is gone".to_owned())
    }

    /// Tells the owner something and waits for the answer.
    pub(super) async fn command<T>(
        &self,
        command: impl FnOnce(Answer<T>) -> Command,
    ) -> Result<T, FleetError> {
        self.check_lives()?;
        let (answer, answered) = oneshot::channel();
        if self.commands.send(command(answer)).await.is_ok()
            && let Ok(result) = answered.await
        {
            return result;
        }
        Err(FleetError::Ended(self.ended().await))
    }

    pub async fn pause(&self) -> Result<(), FleetError> {
        self.command(Command::Pause).await
    }

    pub async fn resume(&self) -> Result<(), FleetError> {
        self.command(Command::Resume).await
    }

    /// Counters of its worker, and of the pager for it.
    pub async fn stats(&self) -> Result<(Stats, PagerCounts), FleetError> {
        self.command(Command::Stats).await
    }

    /// Where each of its vCPUs is, also while it boots. The guest stands still for a moment.
    pub async fn inspect(&self) -> Result<Vec<VcpuLook>, FleetError> {
        self.command(Command::Inspect).await
    }

    /// Refuses what needs a VM that has not ended.
    pub fn check_lives(&self) -> Result<(), FleetError> {
        match &*self.status.borrow() {
            Status { state: State::Exited, exit_reason, .. } => {
                let reason = exit_reason.as_deref().unwrap_or("it is gone");
                Err(FleetError::WrongState(format!("VM {} has ended: {reason}", self.id)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what needs a guest that runs.
    pub fn check_runs(&self) -> Result<(), FleetError> {
        self.check_lives()?;
        match self.state() {
            State::Paused => {
                Err(FleetError::WrongState(format!("VM {} is paused; resume it first", self.id)))
            }
            _ => Ok(()),
        }
    }
}
