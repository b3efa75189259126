//! Networks made by the service: a pool of *slots*, each a network namespace with a TAP for one VM, made ahead.
//!
//! All guests have the same addresses ([`addresses`]); in its slot each is given the slot's own ([`rules`]). A slot is one VM's and is never given again: it
//! is taken down when its VM has ended, and another one is made, with another number as long as there are others. What a client asks for gets into
//! a rule only as a typed value ([`access`]).
//!
//! The kernel has all of it, so networks go on without the daemon. The next one finds slots by their names: those of VMs that it takes over
//! go on as they are, the others are taken down.
//!
//! Making one is a matter of tens of milliseconds and a handful of processes ([`tools`]), so one task does that behind everybody's back ([`keeper`], [`maker`]).

#![forbid(unsafe_code)]

pub mod access;
pub mod addresses;
pub mod barriers;
pub mod error;
pub mod forget;
pub mod host;
mod keeper;
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
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;

use self::access::{Access, Publish};
use self::addresses::{Place, Plan};
use self::error::SlotError;
use self::keeper::forget_ports;
use self::maker::Made;
use self::ports::Ports;
use self::rules::Rules;
use super::error::FleetError;
use super::id;
use super::network::NetworkError;
use super::panics;
use super::tasks::blocking;

/// Most slots that are kept ready.
pub const READY_MAX: usize = 256;
/// How long a request waits for one, and what is made ahead of requests for its turn.
const WAIT: Duration = Duration::from_secs(1);
/// After a failure nothing is tried for so long, and then for twice as long, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long the pool's end waits for what has slots.
const END_WITHIN: Duration = Duration::from_secs(10);
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
    /// Another one is ready.
    filled: Notify,
    /// The host's table is written by one at a time.
    host: Arc<tokio::sync::Mutex<()>>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Made>,
    used: HashMap<u32, (Place, Access)>,
    /// Leases that are to come back before the pool can end.
    awaited: usize,
    ports: Ports,
    /// To be taken down.
    gone: VecDeque<Gone>,
    /// Numbers of those that could not be: they are tried again.
    stuck: Vec<u32>,
    /// Of slots that are taken down: connections of theirs may be remembered by the host.
    remembered: Vec<Place>,
    /// From which number on one is looked for that is free.
    next: u32,
    /// Why the last one could not be made.
    problem: Option<String>,
    closed: bool,
}

/// A slot, and all that a VM needs to have it.
#[derive(Debug)]
pub struct Held {
    /// With its place.
    pub link: SlotLink,
    pub lease: Lease,
    pub tap: OwnedFd,
}

/// Ports of the host that are kept for a VM that is about to be handed over; free again when it is dropped.
#[derive(Debug)]
pub struct Reserved {
    slots: Arc<Slots>,
    publish: Vec<Publish>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.publish.is_empty() {
            self.slots.lock().ports.give_back(&self.publish);
            self.slots.work.notify_one();
        }
    }
}

/// A slot that is nobody's any more.
#[derive(Debug)]
struct Gone {
    number: u32,
    /// If it may have had any connections.
    place: Option<Place>,
    /// Whether the host's table tells of it.
    seen: bool,
}

/// A slot that is a VM's; taken down when it is dropped.
#[derive(Debug)]
pub struct Lease {
    slots: Arc<Slots>,
    place: Place,
    left: bool,
    /// The pool's end waits for it.
    awaited: bool,
}

impl Lease {
    /// The VM goes on without this daemon, and so does its slot.
    pub fn leave(mut self) {
        self.left = true;
    }

    /// The VM may go on after this daemon's end, which is not to wait for it.
    pub fn never_mind(&mut self) {
        if std::mem::take(&mut self.awaited) {
            self.slots.lock().awaited -= 1;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.never_mind();
        match self.left {
            true => self.slots.work.notify_one(),
            false => self.slots.release(self.place.number),
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
            filled: Notify::new(),
            host: Arc::default(),
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
            let place = |number| (number < self.rules.plan.capacity()).then(|| self.rules.plan.place(number));
            let gone = left.into_iter().map(|number| Gone { number, place: place(number), seen: false });
            state.gone.extend(gone);
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
        self.tell_barriers().await;
        let slots = Arc::clone(self);
        let keep = move || Arc::clone(&slots).run();
        let task = tokio::spawn(panics::again("making network slots", keep, |_| {}));
        *self.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
    }

    /// Says what of this host's drops what guests send, which nobody would see otherwise.
    async fn tell_barriers(&self) {
        let (prefix, own) = (self.rules.veth_prefix(), self.rules.table());
        let looked = blocking({
            let prefix = prefix.clone();
            move || barriers::find(&prefix, &own)
        });
        match looked.await.map(|found| found.map_err(NetworkError::from)) {
            Ok(Ok(found)) => {
                for barrier in found {
                    let [to, from] = barrier.remedies(&prefix);
                    tracing::warn!(
                        "guests reach nothing beyond this host, and are not reached from there: {}; `{to}` and `{from}` let them (docs/network.md)",
                        barrier.text()
                    );
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "other rules of this host cannot be looked at"),
            Err(error) => tracing::warn!(%error, "other rules of this host cannot be looked at"),
        }
    }

    /// Takes everything down but what VMs have that are left running.
    pub async fn close(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut task) = task else { return };
        {
            let mut state = self.lock();
            state.closed = true;
            let ready: Vec<Made> = state.ready.drain(..).collect();
            let gone = |made: Made| Gone { number: made.place.number, place: None, seen: false };
            state.gone.extend(ready.into_iter().map(gone));
        }
        self.ready.close();
        self.work.notify_one();
        // It ends when nothing is left to be taken down: what was being made when all else ended comes back, too.
        if tokio::time::timeout(END_WITHIN, &mut task).await.is_err() {
            task.abort();
            tracing::error!("network slots are left behind: what had them did not end in time");
        }
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

    /// Waits until as many are ready as there are to be.
    pub async fn full(&self) {
        loop {
            let filled = self.filled.notified();
            tokio::pin!(filled);
            filled.as_mut().enable();
            if self.lock().ready.len() >= self.size {
                return;
            }
            filled.await;
        }
    }

    /// How many are to be ready.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many are ready, and how many VMs have one.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.ready.len(), state.used.len())
    }

    /// Which addresses guests have.
    pub fn plan(&self) -> &Plan {
        &self.rules.plan
    }

    /// Refuses what a service that makes no slots cannot give.
    pub fn check_on(&self) -> Result<(), FleetError> {
        match self.size {
            0 => Err(NetworkError::from(SlotError::Off).into()),
            _ => Ok(()),
        }
    }

    /// Gives a VM a slot, and its TAP, when there is one, or becomes one in a moment.
    pub async fn take(self: &Arc<Self>, access: &Access) -> Result<Held, FleetError> {
        self.check_on()?;
        let permit = match tokio::time::timeout(WAIT, self.ready.acquire()).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(NetworkError::from(self.none_ready()).into()),
        };
        let (lease, tap) = self.give(&mut self.lock(), permit, access)?;
        if self.lock().ready.is_empty() {
            self.refill();
        }
        self.open_up(lease, tap, access, false).await
    }

    /// The same for what is made ahead of requests: only when as many are ready as there are to be, and another can be made in its place. So
    /// whoever asks for a VM finds them as if nothing were made ahead.
    pub async fn take_ahead(self: &Arc<Self>, access: &Access) -> Result<Held, FleetError> {
        self.check_on()?;
        let find = async {
            loop {
                let filled = self.filled.notified();
                tokio::pin!(filled);
                // From here on it hears.
                filled.as_mut().enable();
                if let Some(given) = self.spare(access) {
                    return given;
                }
                filled.await;
            }
        };
        let given = tokio::time::timeout(WAIT, find).await;
        let (lease, tap) = given.map_err(|_| NetworkError::from(self.none_to_spare()))??;
        self.refill();
        self.open_up(lease, tap, access, true).await
    }

    /// One of those that are ready, if it can be spared.
    fn spare(self: &Arc<Self>, access: &Access) -> Option<Result<(Lease, OwnedFd), FleetError>> {
        let mut state = self.lock();
        if state.ready.len() < self.size || !state.has_free(&self.rules) {
            return None;
        }
        // Somebody who asks for a VM comes first.
        let permit = self.ready.try_acquire().ok()?;
        Some(self.give(&mut state, permit, access))
    }

    fn give(
        self: &Arc<Self>,
        state: &mut State,
        permit: SemaphorePermit<'_>,
        access: &Access,
    ) -> Result<(Lease, OwnedFd), FleetError> {
        let Some(Made { place, tap }) = state.ready.pop_front() else {
            return Err(FleetError::Internal("a network slot was counted and is not there".to_owned()));
        };
        if let Err(error) = state.ports.take(&access.publish, Some(place.number)) {
            state.ready.push_front(Made { place, tap });
            return Err(NetworkError::from(error).into());
        }
        permit.forget();
        state.used.insert(place.number, (place, access.clone()));
        Ok((self.lease(state, place), tap))
    }

    /// Lets the guest reach what it may, before it has the slot.
    async fn open_up(
        &self,
        lease: Lease,
        tap: OwnedFd,
        access: &Access,
        ahead: bool,
    ) -> Result<Held, FleetError> {
        let place = lease.place;
        if !access.is_usual_inside() {
            let (rules, text) = (self.rules.clone(), self.rules.reach(access));
            let open = move || maker::open_up(&rules, place.number, &text);
            match ahead {
                true => blocking(move || maker::behind(open)).await???,
                false => blocking(open).await??,
            }
        }
        if access.is_seen_by_host() {
            self.set_host().await?;
            forget_ports(&access.publish).await?;
        }
        let link = SlotLink { access: access.clone(), place: Some(place), six: self.rules.six };
        Ok(Held { link, lease, tap })
    }

    /// Keeps ports for a VM that is to be found yet.
    pub fn reserve(self: &Arc<Self>, publish: &[Publish]) -> Result<Reserved, FleetError> {
        self.lock().ports.take(publish, None).map_err(NetworkError::from)?;
        Ok(Reserved { slots: Arc::clone(self), publish: publish.to_vec() })
    }

    /// Leads reserved ports to the VM in this slot, until its end.
    pub async fn publish(&self, link: &SlotLink, mut reserved: Reserved) -> Result<SlotLink, FleetError> {
        let gone = || FleetError::Ended("it ended before its ports were published".to_owned());
        let number = link.place.map(|place| place.number).ok_or_else(gone)?;
        let access = {
            let mut state = self.lock();
            let state = &mut *state;
            let (_, access) = state.used.get_mut(&number).ok_or_else(gone)?;
            let publish = std::mem::take(&mut reserved.publish);
            state.ports.assign(&publish, number);
            access.publish.extend(publish);
            access.clone()
        };
        self.set_host().await?;
        forget_ports(&access.publish).await?;
        Ok(SlotLink { access, ..link.clone() })
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
        Some(self.lease(&mut state, place))
    }

    fn lease(self: &Arc<Self>, state: &mut State, place: Place) -> Lease {
        state.awaited += 1;
        Lease { slots: Arc::clone(self), place, left: false, awaited: true }
    }

    fn none_ready(&self) -> SlotError {
        SlotError::NoneReady { waited_ms: WAIT.as_millis(), problem: self.problem() }
    }

    fn none_to_spare(&self) -> SlotError {
        let (ready, used) = self.counts();
        // Not in the match: that would hold the lock, which `problem` takes, too.
        let has_free = self.lock().has_free(&self.rules);
        let problem = match has_free {
            true => self.problem(),
            false => format!(" ({} have addresses, the most that --slot-network has)", ready + used),
        };
        SlotError::NoneToSpare { ready, size: self.size, problem }
    }

    fn problem(&self) -> String {
        self.lock().problem.as_ref().map(|problem| format!(" ({problem})")).unwrap_or_default()
    }

    fn release(&self, number: u32) {
        let mut state = self.lock();
        if let Some((place, access)) = state.used.remove(&number) {
            state.ports.give_back(&access.publish);
            state.gone.push_back(Gone { number, place: Some(place), seen: access.is_seen_by_host() });
        }
        drop(state);
        self.work.notify_one();
    }

    /// Writes the host's table as it is to be now.
    async fn set_host(&self) -> Result<(), FleetError> {
        let text = || {
            let state = self.lock();
            let seen = state.used.values().filter(|(place, access)| {
                access.is_seen_by_host() || !self.rules.plan.has(place.address4.into())
            });
            self.rules.host(seen.map(|(place, access)| (place, access)))
        };
        let done = one_by_one(&self.host, text, |text| maker::set_host(&text)).await?;
        Ok(done.map_err(NetworkError::from)?)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` with what `look` sees when it is its turn. Who is given up in the middle of it has its turn to the work's end all the same: what the next
/// one writes is not to be overtaken by something older.
async fn one_by_one<L: Send + 'static, T: Send + 'static>(
    turns: &Arc<tokio::sync::Mutex<()>>,
    look: impl FnOnce() -> L,
    work: impl FnOnce(L) -> T + Send + 'static,
) -> Result<T, FleetError> {
    let turn = Arc::clone(turns).lock_owned().await;
    let seen = look();
    blocking(move || {
        let _turn = turn;
        work(seen)
    })
    .await
}

impl State {
    /// Whether there is a place left for another.
    fn has_free(&self, rules: &Rules) -> bool {
        let taken = self.used.len() + self.ready.len();
        taken < usize::try_from(rules.plan.capacity()).unwrap_or(usize::MAX)
    }

    /// The next place that nobody has.
    fn free(&mut self, rules: &Rules) -> Option<Place> {
        let capacity = rules.plan.capacity();
        for _ in 0..capacity {
            let place = rules.plan.place(self.next % capacity);
            self.next = (self.next + 1) % capacity;
            let taken = self.used.contains_key(&place.number)
                || self.ready.iter().any(|made| made.place.number == place.number)
                || self.gone.iter().any(|gone| gone.number == place.number)
                || self.stuck.contains(&place.number)
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
        state.gone.push_back(Gone { number: 1, place: None, seen: false });
        let mut number = || state.free(&rules).map(|place| place.number);
        assert_eq!([number(), number(), number()], [Some(62), Some(0), Some(2)]);
        let place = rules.plan.place(3);
        state.used.insert(40, (Place { number: 40, ..place }, Access::default()));
        assert_eq!(state.free(&rules).map(|place| place.number), Some(4), "another's address");
    }

    #[tokio::test]
    async fn nothing_older_is_written_over_what_is_newer_when_a_caller_goes_away() {
        let (turns, written) = (Arc::default(), Arc::new(Mutex::new(Vec::new())));
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let (begun_in, begun) = tokio::sync::oneshot::channel();
        let (turns_1, written_1) = (Arc::clone(&turns), Arc::clone(&written));
        let first = tokio::spawn(async move {
            let slow = move |text| {
                begun_in.send(()).unwrap();
                gone.recv().unwrap();
                written_1.lock().unwrap().push(text);
            };
            one_by_one(&turns_1, || "older", slow).await
        });
        begun.await.unwrap();
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let written_2 = Arc::clone(&written);
        let second = one_by_one(&turns, || "newer", move |text| written_2.lock().unwrap().push(text));
        tokio::pin!(second);
        // It would be done at once if nobody were before it.
        let waited = tokio::time::timeout(Duration::from_millis(100), &mut second).await;
        assert!(waited.is_err(), "{:?}", written.lock().unwrap());
        go.send(()).unwrap();
        second.await.unwrap();
        assert_eq!(*written.lock().unwrap(), ["older", "newer"]);
    }

    #[tokio::test]
    async fn a_service_without_slots_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let slots = Slots::new(0, Plan::default(), folder.path()).unwrap();
        slots.begin().await;
        let error = slots.take(&Access::default()).await.unwrap_err();
        assert_eq!(
            (error.reason(), error.kind()),
            ("NO_NETWORK_SLOTS", super::super::error::Kind::FailedPrecondition)
        );
        slots.close().await;
    }
}
