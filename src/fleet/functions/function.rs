//! One function: the turns of its invocations, and the VMs that wait for another one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::settings::{Made, Settings};
use crate::fleet::Fleet;
use crate::fleet::error::FleetError;
use crate::fleet::pools::pool::Pool;
use crate::fleet::vm::{State, Vm};

/// A function.
#[derive(Debug)]
pub struct Function {
    pub name: String,
    /// Where its VMs come from.
    pub pool: Arc<Pool>,
    now: Mutex<Now>,
    pub counts: Counts,
    /// Something may be to end among the VMs that wait.
    warm_changed: Notify,
}

/// What it is now.
#[derive(Debug)]
struct Now {
    made: Made,
    settings: Arc<Settings>,
    turns: Arc<Turns>,
    warm: Shelf<Arc<Vm>>,
    closed: bool,
}

/// What became of invocations since the service began.
#[derive(Debug, Default)]
pub struct Counts {
    /// The handler ended with status 0.
    pub succeeded: AtomicU64,
    /// It ended otherwise, or its VM did.
    pub failed: AtomicU64,
    pub timed_out: AtomicU64,
    /// There was no turn for it.
    pub refused: AtomicU64,
    /// Given up by their callers.
    pub cancelled: AtomicU64,
    /// Ran in a VM that had run others.
    pub reused: AtomicU64,
}

/// A VM that has run invocations and may run more.
#[derive(Debug)]
struct Warm<V> {
    vm: V,
    revision: u64,
    used: u32,
    since: Instant,
}

/// Those that wait for another one.
#[derive(Debug)]
struct Shelf<V> {
    warm: Vec<Warm<V>>,
    /// A task sees to it that they come to their ends. One: with one VM that is used again and again this is empty and not empty as often.
    is_watched: bool,
}

impl<V> Shelf<V> {
    fn new() -> Self {
        Self { warm: Vec::new(), is_watched: false }
    }

    /// Says whether nobody watches yet, and somebody is to from now on.
    fn put(&mut self, warm: Warm<V>) -> bool {
        self.warm.push(warm);
        !std::mem::replace(&mut self.is_watched, true)
    }

    /// For who watches: takes out what has waited long enough, or is of no more use; says when to look again, `None`: never, nothing waits.
    fn over(
        &mut self,
        at: Instant,
        ttl: Duration,
        is_useless: impl Fn(&Warm<V>) -> bool,
    ) -> (Vec<Warm<V>>, Option<Instant>) {
        let all = std::mem::take(&mut self.warm).into_iter();
        let (gone, kept) = all.partition(|warm| warm.since + ttl <= at || is_useless(warm));
        self.warm = kept;
        let next = self.warm.iter().map(|warm| warm.since + ttl).min();
        self.is_watched = next.is_some();
        (gone, next)
    }
}

/// A function as it is.
#[derive(Debug, Clone)]
pub struct Look {
    pub name: String,
    pub made: Made,
    pub settings: Arc<Settings>,
    pub running: u32,
    pub queued: u32,
    pub warm: u32,
    pub succeeded: u64,
    pub failed: u64,
    pub timed_out: u64,
    pub refused: u64,
    pub cancelled: u64,
    pub reused: u64,
}

/// Who may run, and who waits for that, in the order in which they came.
#[derive(Debug)]
pub struct Turns {
    running: Arc<Semaphore>,
    concurrency: u32,
    waiting: AtomicU32,
    queue: u32,
    queue_timeout: Duration,
}

/// Counts one that waits.
struct Waiting<'a>(&'a AtomicU32);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Turns {
    fn new(settings: &Settings) -> Arc<Self> {
        Arc::new(Self {
            running: Arc::new(Semaphore::new(settings.concurrency as usize)),
            concurrency: settings.concurrency,
            waiting: AtomicU32::new(0),
            queue: settings.queue,
            queue_timeout: settings.queue_timeout,
        })
    }

    /// Waits for a turn, which lasts until it is dropped.
    pub async fn take(&self, function: &str) -> Result<OwnedSemaphorePermit, FleetError> {
        if let Ok(turn) = Arc::clone(&self.running).try_acquire_owned() {
            return Ok(turn);
        }
        let full = |why: String| FleetError::FunctionBusy { function: function.to_owned(), why };
        let joined = self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| {
            (waiting < self.queue).then_some(waiting + 1)
        });
        joined
            .map_err(|_| full(format!("{} run and {} wait, as many as may", self.concurrency, self.queue)))?;
        let _waiting = Waiting(&self.waiting);
        match tokio::time::timeout(self.queue_timeout, Arc::clone(&self.running).acquire_owned()).await {
            Ok(turn) => turn.map_err(|_| FleetError::Internal("a function's turns were closed".to_owned())),
            Err(_) => Err(full(format!("there was no turn within {} ms", self.queue_timeout.as_millis()))),
        }
    }
}

impl Function {
    pub fn new(name: &str, made: Made, settings: Settings, pool: Arc<Pool>) -> Arc<Self> {
        let turns = Turns::new(&settings);
        Arc::new(Self {
            name: name.to_owned(),
            pool,
            now: Mutex::new(Now {
                made,
                settings: Arc::new(settings),
                turns,
                warm: Shelf::new(),
                closed: false,
            }),
            counts: Counts::default(),
            warm_changed: Notify::new(),
        })
    }

    pub fn made(&self) -> Made {
        self.lock().made.clone()
    }

    /// What an invocation that begins now goes by.
    pub fn begin(&self) -> Result<(Arc<Settings>, Arc<Turns>), FleetError> {
        let now = self.lock();
        match now.closed {
            true => Err(FleetError::NotFound { what: "function", name: self.name.clone() }),
            false => Ok((Arc::clone(&now.settings), Arc::clone(&now.turns))),
        }
    }

    /// Another deployment: invocations that begin from now on go by it. Gives what it was made of before.
    pub fn change(&self, fleet: &Fleet, made: Made, settings: Settings) -> Made {
        self.pool.change(settings.pool(made.snapshot.clone()));
        let (old, warm) = {
            let mut now = self.lock();
            // Those that run and wait go on by the old numbers.
            now.turns = Turns::new(&settings);
            now.settings = Arc::new(settings);
            (std::mem::replace(&mut now.made, made), std::mem::take(&mut now.warm.warm))
        };
        // Those of now may wait for less long.
        self.warm_changed.notify_one();
        end(fleet, warm, "its function was deployed anew");
        old
    }

    /// No invocation begins any more.
    pub fn close(&self, fleet: &Fleet) {
        let warm = {
            let mut now = self.lock();
            now.closed = true;
            std::mem::take(&mut now.warm.warm)
        };
        self.warm_changed.notify_one();
        end(fleet, warm, "its function was deleted");
    }

    pub fn look(&self) -> Look {
        let now = self.lock();
        let free = u32::try_from(now.turns.running.available_permits()).unwrap_or(u32::MAX);
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Look {
            name: self.name.clone(),
            made: now.made.clone(),
            settings: Arc::clone(&now.settings),
            running: now.turns.concurrency.saturating_sub(free),
            queued: now.turns.waiting.load(Ordering::Relaxed),
            warm: u32::try_from(now.warm.warm.len()).unwrap_or(u32::MAX),
            succeeded: count(&self.counts.succeeded),
            failed: count(&self.counts.failed),
            timed_out: count(&self.counts.timed_out),
            refused: count(&self.counts.refused),
            cancelled: count(&self.counts.cancelled),
            reused: count(&self.counts.reused),
        }
    }

    /// One that waits for another invocation, how many it has run, and of which revision it is. The newest, so that the others come to their end.
    pub fn take_warm(&self) -> Option<(Arc<Vm>, u32, u64)> {
        let mut now = self.lock();
        now.warm.warm.retain(|warm| warm.vm.state() != State::Exited);
        now.warm.warm.pop().map(|warm| (warm.vm, warm.used, warm.revision))
    }

    /// A VM that has run `used` invocations and may run another; given back if it may not.
    pub fn give_back(
        self: &Arc<Self>,
        fleet: &Arc<Fleet>,
        vm: Arc<Vm>,
        used: u32,
        revision: u64,
    ) -> Option<Arc<Vm>> {
        let mut now = self.lock();
        let is_wanted = !now.closed
            && now.made.revision == revision
            && used < now.settings.invocations_per_vm
            && vm.state() == State::Running;
        if !is_wanted {
            return Some(vm);
        }
        let is_to_be_watched = now.warm.put(Warm { vm, revision, used, since: Instant::now() });
        drop(now);
        if is_to_be_watched {
            tokio::spawn(sweep(Arc::downgrade(fleet), Arc::clone(self)));
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes out what has waited long enough; says when to look again, `None` when nothing waits any more.
    fn idle(&self, at: Instant) -> (Vec<Warm<Arc<Vm>>>, Option<Instant>) {
        let mut now = self.lock();
        let (ttl, revision) = (now.settings.idle_ttl, now.made.revision);
        now.warm.over(at, ttl, |warm| warm.revision != revision || warm.vm.state() == State::Exited)
    }
}

fn end(fleet: &Fleet, warm: Vec<Warm<Arc<Vm>>>, reason: &str) {
    for warm in warm {
        warm.vm.kill(reason);
        fleet.registry.remove(&warm.vm.id);
    }
}

/// Ends VMs that nothing has asked for, until none waits.
async fn sweep(fleet: std::sync::Weak<Fleet>, function: Arc<Function>) {
    loop {
        let (gone, next) = function.idle(Instant::now());
        match fleet.upgrade() {
            Some(fleet) => end(&fleet, gone, "its function did not need it"),
            None => return,
        }
        let Some(next) = next else { return };
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {}
            () = function.warm_changed.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(concurrency: u32, queue: u32, queue_timeout: Duration) -> Arc<Turns> {
        Turns::new(&Settings { concurrency, queue, queue_timeout, ..Settings::default() })
    }

    #[tokio::test]
    async fn so_many_run_so_many_wait_in_their_order_and_the_rest_are_refused() {
        let turns = turns(2, 2, Duration::from_secs(60));
        let first = turns.take("f").await.unwrap();
        let _second = turns.take("f").await.unwrap();
        let (order_in, mut order) = tokio::sync::mpsc::unbounded_channel();
        let mut waiting = Vec::new();
        for n in 0..2 {
            let (turns, order_in) = (Arc::clone(&turns), order_in.clone());
            waiting.push(tokio::spawn(async move {
                let turn = turns.take("f").await.unwrap();
                order_in.send(n).unwrap();
                turn
            }));
            tokio::task::yield_now().await;
        }
        assert_eq!(turns.waiting.load(Ordering::Relaxed), 2);
        assert!(matches!(turns.take("f").await, Err(FleetError::FunctionBusy { .. })));
        drop(first);
        assert_eq!(order.recv().await, Some(0));
        // One that is given up while it waits leaves its place.
        waiting.remove(1).abort();
        while turns.waiting.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        drop(waiting.remove(0).await.unwrap());
        drop(turns.take("f").await.unwrap());
    }

    #[tokio::test]
    async fn nobody_waits_longer_than_they_may() {
        let turns = turns(1, 1, Duration::from_millis(5));
        let _turn = turns.take("f").await.unwrap();
        let error = turns.take("f").await.unwrap_err();
        assert!(error.to_string().contains("within 5 ms"), "{error}");
        assert_eq!(turns.waiting.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn one_task_watches_whatever_is_taken_and_put_back() {
        let now = Instant::now();
        let (ttl, tick) = (Duration::from_secs(60), Duration::from_millis(1));
        let warm = |n: u32| Warm { vm: n, revision: 1, used: n, since: now + tick * n };
        let mut shelf = Shelf::new();
        assert!(shelf.put(warm(0)), "nobody watches");
        // One invocation after the other, each in the VM that the one before has left.
        for n in 1..1000 {
            assert!(shelf.warm.pop().is_some());
            assert!(!shelf.put(warm(n)), "a second task at the {n}th");
            assert_eq!(shelf.over(now, ttl, |_| false).1, Some(now + tick * n + ttl));
        }
        let (gone, next) = shelf.over(now + tick * 999 + ttl, ttl, |_| false);
        assert_eq!((gone.len(), next), (1, None));
        assert!(shelf.put(warm(0)), "the task has ended");
        let (gone, next) = shelf.over(now, ttl, |warm| warm.revision == 1);
        assert_eq!((gone.len(), next), (1, None));
    }
}
