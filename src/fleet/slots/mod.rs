//! Networks made by the service: a pool of *slots*, each a network namespace with a TAP for one VM, made ahead.
//!
//! All guests have the same addresses ([`addresses`]); in its slot each is given the slot's own ([`rules`]). A slot is one VM's and is never given again: it
//! is taken down when its VM has ended, and another one is made, with another number as long as there are others. What a client asks for gets into
//! a rule only as a typed value ([`access`]).
//!
//! The kernel has all of it, so networks go on without the daemon. The next one finds slots by their names: those of VMs that it takes over
//! go on as they are, the others are taken down.
//!
//! Making one is a matter of tens of milliseconds and a handful of processes ([`tools`]), so one task does that behind everybody's back ([`maker`]).

#![forbid(unsafe_code)]

pub mod access;
pub mod addresses;
pub mod error;
pub mod host;
pub mod maker;
pub mod ports;
pub mod rules;
pub mod tools;

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

use self::access::Access;
use self::addresses::{Place, Plan};
use self::error::SlotError;
use self::maker::Made;
use self::ports::Ports;
use self::rules::Rules;
use super::error::FleetError;
use super::id;
use super::network::NetworkError;
use super::snapshots::blocking;

/// Most slots that are kept ready.
pub const READY_MAX: usize = 256;
/// How long a request waits for one.
const WAIT: Duration = Duration::from_secs(1);
/// After a failure nothing is tried for so long, and then for twice as long, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Taken down at once.
const DOWN_MAX: usize = 16;

/// A VM's link that is a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotLink {
    pub access: Access,
    /// Which, when it has one.
    pub place: Option<Place>,
    /// It has IPv6, too.
    pub six: bool,
}

/// The pool.
#[derive(Debug)]
pub struct Slots {
    size: usize,
    rules: Rules,
    state: Mutex<State>,
    /// As many permits as there are slots ready.
    ready: Semaphore,
    /// There may be something to do.
    work: Notify,
    /// The host's table is written by one at a time.
    host: tokio::sync::Mutex<()>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Made>,
    used: HashMap<u32, (Place, Access)>,
    ports: Ports,
    /// To be taken down: numbers, and whether the host's table tells of them.
    gone: VecDeque<(u32, bool)>,
    /// From which number on one is looked for that is free.
    next: u32,
    /// Why the last one could not be made.
    problem: Option<String>,
    closed: bool,
}

/// What the pool's task does next.
enum Step {
    TakeDown(Vec<u32>, bool),
    Make(Place),
    Wait,
    End,
}

/// A slot that is a VM's; taken down when it is dropped.
#[derive(Debug)]
pub struct Lease {
    slots: Arc<Slots>,
    place: Place,
    left: bool,
}

impl Lease {
    /// The VM goes on without this daemon, and so does its slot.
    pub fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.left {
            self.slots.release(self.place.number);
        }
    }
}

impl Slots {
    /// A pool that keeps `size` ready, for the service on this data folder. Nothing is made before [`Self::begin`].
    pub fn new(size: usize, plan: Plan, data_dir: &Path) -> Result<Arc<Self>, FleetError> {
        let folder = data_dir.canonicalize().map_err(FleetError::io("cannot look at the data folder"))?;
        let hash = blake3::hash(folder.as_os_str().as_encoded_bytes()).to_hex();
        let tag = hash.as_str().chars().take(6).collect();
        let six = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
        let six = six.is_ok_and(|text| text.trim() == "0");
        // Anywhere: what others remember of an address is the longer past the later the address comes again.
        let next = u32::from_le_bytes(id::random()?) % plan.capacity();
        Ok(Arc::new(Self {
            size: size.min(READY_MAX),
            rules: Rules { tag, plan, six },
            state: Mutex::new(State { next, ..State::default() }),
            ready: Semaphore::new(0),
            work: Notify::new(),
            host: tokio::sync::Mutex::default(),
            task: Mutex::default(),
        }))
    }

    /// Whether this process can make slots, if it is to. Blocks.
    pub fn check(&self) -> Result<(), FleetError> {
        match self.size {
            0 => Ok(()),
            _ => Ok(host::check(&self.rules).map_err(NetworkError::from)?),
        }
    }

    /// Takes down what an earlier service left and nobody has, and begins to make slots.
    pub async fn begin(self: &Arc<Self>) {
        let rules = self.rules.clone();
        let found = blocking(move || maker::found(&rules)).await.unwrap_or_default();
        let is_needed = {
            let mut state = self.lock();
            let left: Vec<u32> =
                found.iter().filter(|number| !state.used.contains_key(number)).copied().collect();
            if !left.is_empty() {
                tracing::info!(slots = left.len(), "network slots of an earlier service are taken down");
            }
            state.gone.extend(left.into_iter().map(|number| (number, false)));
            self.size > 0 || !found.is_empty()
        };
        if !is_needed {
            return;
        }
        for setting in host::not_forwarding(&self.rules) {
            tracing::warn!(
                "guests reach nothing beyond this host, and are not reached from there: `sysctl -w {setting}=1` lets them"
            );
        }
        if let Err(error) = self.set_host().await {
            tracing::error!(%error, "the host's rules for network slots cannot be set");
        }
        let task = tokio::spawn(Arc::clone(self).run());
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    /// Takes everything down but what VMs have that are left running.
    pub async fn close(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(task) = task else { return };
        {
            let mut state = self.lock();
            state.closed = true;
            let ready: Vec<_> = state.ready.drain(..).map(|made| (made.place.number, false)).collect();
            state.gone.extend(ready);
        }
        self.ready.close();
        self.work.notify_one();
        // It ends when nothing is left to be taken down.
        let _ = task.await;
        let result = match self.lock().used.is_empty() {
            true => Some(self.rules.no_host()),
            false => None,
        };
        if let Some(text) = result {
            let done = blocking(move || maker::set_host(&text)).await;
            if let Ok(Err(error)) = done {
                tracing::error!(%error, "the host's rules for network slots cannot be removed");
            }
        }
    }

    /// How many are ready, and how many VMs have one.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.ready.len(), state.used.len())
    }

    /// Gives a VM a slot, and its TAP, when there is one, or becomes one in a moment.
    pub async fn take(self: &Arc<Self>, link: &mut SlotLink) -> Result<(Lease, OwnedFd), FleetError> {
        if self.size == 0 {
            return Err(NetworkError::from(SlotError::Off).into());
        }
        let access = &link.access;
        let (lease, tap) = {
            let permit = match tokio::time::timeout(WAIT, self.ready.acquire()).await {
                Ok(Ok(permit)) => permit,
                _ => return Err(NetworkError::from(self.none_ready()).into()),
            };
            let mut state = self.lock();
            let Some(Made { place, tap }) = state.ready.pop_front() else {
                return Err(FleetError::Internal("a network slot was counted and is not there".to_owned()));
            };
            if let Err(error) = state.ports.take(&access.publish, place.number) {
                state.ready.push_front(Made { place, tap });
                return Err(NetworkError::from(error).into());
            }
            permit.forget();
            state.used.insert(place.number, (place, access.clone()));
            (Lease { slots: Arc::clone(self), place, left: false }, tap)
        };
        if self.lock().ready.is_empty() {
            self.refill();
        }
        if !access.is_usual_inside() {
            let (rules, text) = (self.rules.clone(), self.rules.reach(access));
            let number = lease.place.number;
            blocking(move || maker::open_up(&rules, number, &text)).await??;
        }
        if access.is_seen_by_host() {
            self.set_host().await?;
        }
        link.place = Some(lease.place);
        link.six = self.rules.six;
        Ok((lease, tap))
    }

    /// Another one is made for each that was taken. Not done by [`Self::take`], so that it does not compete with the clone that takes it.
    pub fn refill(&self) {
        self.work.notify_one();
    }

    /// The slot of a VM that is taken over.
    pub fn resume(self: &Arc<Self>, link: &SlotLink) -> Option<Lease> {
        let place = link.place?;
        let mut state = self.lock();
        state.ports.take_again(&link.access.publish, place.number);
        state.used.insert(place.number, (place, link.access.clone()));
        Some(Lease { slots: Arc::clone(self), place, left: false })
    }

    fn none_ready(&self) -> SlotError {
        let problem = self.lock().problem.as_ref().map(|problem| format!(" ({problem})"));
        SlotError::NoneReady { waited_ms: WAIT.as_millis(), problem: problem.unwrap_or_default() }
    }

    fn release(&self, number: u32) {
        let mut state = self.lock();
        if let Some((_, access)) = state.used.remove(&number) {
            state.ports.give_back(&access.publish);
            state.gone.push_back((number, access.is_seen_by_host()));
        }
        drop(state);
        self.work.notify_one();
    }

    /// Writes the host's table as it is to be now.
    async fn set_host(&self) -> Result<(), FleetError> {
        let _one = self.host.lock().await;
        let text = {
            let state = self.lock();
            let seen = state.used.values().filter(|(place, access)| {
                access.is_seen_by_host() || !self.rules.plan.has(place.address4.into())
            });
            self.rules.host(seen.map(|(place, access)| (place, access)))
        };
        let done = blocking(move || maker::set_host(&text)).await?;
        Ok(done.map_err(NetworkError::from)?)
    }

    /// The pool's task.
    async fn run(self: Arc<Self>) {
        let mut retry = RETRY.0;
        let mut was_down = false;
        loop {
            let step = self.next_step(was_down);
            was_down = matches!(step, Step::TakeDown(..));
            match step {
                Step::End => return,
                Step::Wait => self.work.notified().await,
                Step::TakeDown(numbers, seen) => {
                    if seen && let Err(error) = self.set_host().await {
                        tracing::error!(%error, "the host's rules for network slots cannot be set");
                    }
                    let rules = self.rules.clone();
                    match blocking(move || maker::behind(|| maker::take_down(&rules, &numbers))).await {
                        Ok(Ok(Ok(()))) => {}
                        Ok(Ok(Err(error))) => tracing::error!(%error, "network slots are left behind"),
                        Ok(Err(error)) => tracing::error!(%error, "network slots are left behind"),
                        Err(error) => tracing::error!(%error, "network slots are left behind"),
                    }
                }
                Step::Make(place) => {
                    let rules = self.rules.clone();
                    let made = blocking(move || maker::behind(|| maker::make(&rules, place))).await;
                    match made.and_then(|made| Ok(made??)) {
                        Ok(made) => {
                            retry = RETRY.0;
                            let mut state = self.lock();
                            state.problem = None;
                            state.ready.push_back(made);
                            drop(state);
                            self.ready.add_permits(1);
                        }
                        Err(error) => {
                            tracing::error!(%error, again_in_s = retry.as_secs(), "a network slot cannot be made");
                            self.lock().problem = Some(format!("one could not be made: {error}"));
                            self.rest(retry).await;
                            retry = (retry * 2).min(RETRY.1);
                        }
                    }
                }
            }
        }
    }

    /// Waits after a failure, unless the pool is closed.
    async fn rest(&self, time: Duration) {
        let rested = async {
            while !self.lock().closed {
                self.work.notified().await;
            }
        };
        let _ = tokio::time::timeout(time, rested).await;
    }

    /// Taking down and making take turns, so that neither waits for ever.
    fn next_step(&self, was_down: bool) -> Step {
        let mut state = self.lock();
        let wanted = !state.closed && state.ready.len() < self.size;
        let make = if wanted { state.free(&self.rules) } else { None };
        if let Some(place) = make
            && (was_down || state.gone.is_empty())
        {
            return Step::Make(place);
        }
        if state.gone.is_empty() {
            return if state.closed { Step::End } else { Step::Wait };
        }
        let count = state.gone.len().min(DOWN_MAX);
        let gone: Vec<(u32, bool)> = state.gone.drain(..count).collect();
        let seen = gone.iter().any(|(_, seen)| *seen);
        Step::TakeDown(gone.into_iter().map(|(number, _)| number).collect(), seen)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The next place that nobody has.
    fn free(&mut self, rules: &Rules) -> Option<Place> {
        let capacity = rules.plan.capacity();
        for _ in 0..capacity {
            let place = rules.plan.place(self.next % capacity);
            self.next = (self.next + 1) % capacity;
            let taken = self.used.contains_key(&place.number)
                || self.ready.iter().any(|made| made.place.number == place.number)
                || self.gone.iter().any(|(number, _)| *number == place.number)
                // Of an earlier service, that had other networks.
                || self.used.values().any(|(other, _)| other.address4 == place.address4 || other.address6 == place.address6);
            if !taken && !maker::is_there(rules, place.number) {
                return Some(place);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_round_and_leave_out_what_is_taken() {
        let rules = Rules {
            tag: "test00".to_owned(),
            plan: Plan { slots4: "10.77.0.0/24".parse().unwrap(), ..Plan::default() },
            six: true,
        };
        let mut state = State { next: 62, ..State::default() };
        state.used.insert(63, (rules.plan.place(63), Access::default()));
        state.gone.push_back((1, false));
        let mut number = || state.free(&rules).map(|place| place.number);
        assert_eq!([number(), number(), number()], [Some(62), Some(0), Some(2)]);
        let place = rules.plan.place(3);
        state.used.insert(40, (Place { number: 40, ..place }, Access::default()));
        assert_eq!(state.free(&rules).map(|place| place.number), Some(4), "another's address");
    }

    #[tokio::test]
    async fn a_service_without_slots_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let slots = Slots::new(0, Plan::default(), folder.path()).unwrap();
        slots.begin().await;
        let mut link = SlotLink { access: Access::default(), place: None, six: false };
        let error = slots.take(&mut link).await.unwrap_err();
        assert_eq!(
            (error.reason(), error.kind()),
            ("NO_NETWORK_SLOTS", super::super::error::Kind::FailedPrecondition)
        );
        slots.close().await;
    }
}
