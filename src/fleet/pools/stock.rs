//! What a pool has, and what is to be done about it: decisions only, so that they can be tried without a VM.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::demand::Demand;
use super::settings::{Mode, READY_MAX, Settings};

/// Nothing is made for this long after something was asked for, if at least half of what is needed is ready: who asks for one is likely to
/// ask for another, and is to have the CPUs.
const QUIET: Duration = Duration::from_millis(50);
/// How often a target that is above the promised number is looked at again: it falls by itself.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// After a failure to make one; twice as long after each further one, up to the latter.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// What the want of a network slot is called.
const NO_SLOT: &str = "NETWORK_SLOTS_EXHAUSTED";

/// Something that can stand ready.
pub trait Thing {
    /// It ended by itself.
    fn is_dead(&self) -> bool;
}

/// What a pool has.
#[derive(Debug)]
pub struct Stock<T> {
    settings: Arc<Settings>,
    /// Of what is to be made; what was made for an older one is stale.
    revision: u64,
    /// Oldest first.
    ready: VecDeque<Ready<T>>,
    making: u32,
    /// That one waits for its turn: it is not begun yet.
    waits: bool,
    /// Taken, and alive.
    out: u32,
    demand: Demand,
    asked_at: Option<Instant>,
    failed: Option<Failed>,
    counts: Counts,
    closed: bool,
}

/// Why one could not be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub text: String,
    /// Its name for programs ([`crate::fleet::reason`]).
    pub reason: &'static str,
}

#[derive(Debug)]
struct Failed {
    problem: Problem,
    /// No further attempt before then.
    until: Instant,
    pause: Duration,
}

/// What stands ready.
#[derive(Debug)]
pub struct Ready<T> {
    pub what: T,
    /// What the pool was to be when this was begun.
    pub settings: Arc<Settings>,
    revision: u64,
    since: Instant,
}

/// What became of what since the pool was begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Handed over, having been ready.
    pub taken_ready: u64,
    /// Handed over, having been started for the request.
    pub taken_cold: u64,
    /// Asked for and refused.
    pub refused: u64,
    /// Made ready.
    pub made: u64,
    /// Could not be made ready.
    pub failed: u64,
    /// Ended by itself while it stood ready.
    pub died: u64,
    /// Ended because it was needed no more, or of an older snapshot.
    pub ended: u64,
    /// Of the failed ones, those for which there was no network slot.
    pub without_slot: u64,
}

/// A pool as it is.
#[derive(Debug, Clone)]
pub struct Look {
    pub settings: Arc<Settings>,
    pub ready: u32,
    /// Of the ready ones, those that will be replaced.
    pub stale: u32,
    pub making: u32,
    pub out: u32,
    /// How many are to be ready now.
    pub target: u32,
    /// Asked for in a second, of late.
    pub rate: f64,
    pub counts: Counts,
    /// Why none could be made, the last time.
    pub problem: Option<Problem>,
}

/// What there is for somebody who asks.
#[derive(Debug)]
pub enum Found<T> {
    /// It is out now.
    Ready(Ready<T>),
    /// None is ready, but there is room for one more, and that is out now.
    Room(Arc<Settings>),
    /// The last that there is room for is being made.
    Soon,
    /// There is no room; at most so many.
    Full(u32),
    Closed,
}

/// What the keeper is to do next.
#[derive(Debug)]
pub enum Plan<T> {
    /// Make one: [`begin`](Stock::begin) when its turn has come, and [`put`](Stock::put) it or the failure.
    Make(Arc<Settings>, u64),
    /// End it, for this reason.
    End(T, &'static str),
    /// Nothing until then, or until something changes.
    Wait(Option<Instant>),
    Nothing,
}

impl<T: Thing> Stock<T> {
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings: Arc::new(settings),
            revision: 0,
            ready: VecDeque::new(),
            making: 0,
            waits: false,
            out: 0,
            demand: Demand::new(now),
            asked_at: None,
            failed: None,
            counts: Counts::default(),
            closed: false,
        }
    }

    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    pub fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// What it is to be from now on.
    pub fn change(&mut self, settings: Settings) {
        let same = Settings {
            min_ready: settings.min_ready,
            max: settings.max,
            idle_ttl: settings.idle_ttl,
            ..Settings::clone(&self.settings)
        };
        if same != settings {
            self.revision += 1;
        }
        self.settings = Arc::new(settings);
        self.failed = None;
    }

    /// What stands ready could be better by now.
    pub fn renew(&mut self, snapshot: &str) {
        if self.settings.snapshot == snapshot && self.settings.mode == Mode::Shell {
            self.revision += 1;
        }
    }

    /// Nothing is made or handed out any more; gives what stood ready.
    pub fn close(&mut self) -> Vec<Ready<T>> {
        self.closed = true;
        self.ready.drain(..).collect()
    }

    pub fn look(&self, now: Instant, pace: f64) -> Look {
        Look {
            settings: Arc::clone(&self.settings),
            ready: count(self.ready.len()),
            stale: count(self.ready.len() - self.fresh()),
            making: self.making,
            out: self.out,
            target: self.target(now, pace),
            rate: self.demand.rate(now),
            counts: self.counts,
            problem: self.failed.as_ref().map(|failed| failed.problem.clone()),
        }
    }

    /// Looks for one to hand over. `again`: it was asked for before.
    pub fn find(&mut self, now: Instant, again: bool) -> Found<T> {
        if self.closed {
            return Found::Closed;
        }
        if !again {
            self.demand.asked(now);
            self.asked_at = Some(now);
        }
        self.drop_dead();
        if let Some(ready) = self.take_ready() {
            self.out += 1;
            self.counts.taken_ready += 1;
            return Found::Ready(ready);
        }
        if self.room() > 0 {
            self.out += 1;
            self.counts.taken_cold += 1;
            return Found::Room(Arc::clone(&self.settings));
        }
        if std::mem::take(&mut self.waits) {
            // Its turn may be far off, and whoever asks needs none.
            self.making = self.making.saturating_sub(1);
            self.out += 1;
            self.counts.taken_cold += 1;
            return Found::Room(Arc::clone(&self.settings));
        }
        if self.making > 0 {
            return Found::Soon;
        }
        self.counts.refused += 1;
        Found::Full(self.settings.max)
    }

    /// One that was found ready was not well: nobody has seen it.
    pub fn was_bad(&mut self) {
        self.counts.taken_ready = self.counts.taken_ready.saturating_sub(1);
        self.counts.died += 1;
    }

    /// One is out that was taken before this was begun.
    pub fn adopt(&mut self) {
        self.out = self.out.saturating_add(1);
    }

    /// One that was out has ended.
    pub fn came_to_its_end(&mut self) {
        self.out = self.out.saturating_sub(1);
    }

    /// What is to be done next. `pace`: one is made in so many times the time that it takes.
    pub fn plan(&mut self, now: Instant, pace: f64) -> Plan<T> {
        if self.closed {
            return Plan::Nothing;
        }
        self.drop_dead();
        let target = self.target(now, pace) as usize;
        let fresh = self.fresh();
        let stale = self.ready.len() - fresh;
        if self.all() > self.settings.max && !self.ready.is_empty() {
            return self.end_oldest("its pool was made smaller");
        }
        if stale > 0 && (fresh >= target || self.room() == 0) {
            return self.end_oldest("its pool is of something newer now");
        }
        if fresh + (self.making as usize) < target {
            if let Some(failed) = self.failed.as_ref().filter(|failed| now < failed.until) {
                return Plan::Wait(Some(failed.until));
            }
            let quiet_at = self.asked_at.map_or(now, |asked| asked + QUIET);
            if now < quiet_at && self.ready.len() * 2 >= target.max(2) {
                return Plan::Wait(Some(quiet_at));
            }
            if self.room() == 0 {
                return Plan::Wait(None);
            }
            self.making += 1;
            self.waits = true;
            return Plan::Make(Arc::clone(&self.settings), self.revision);
        }
        let mut until = (target > self.settings.min_ready as usize).then(|| now + LOOK_AGAIN);
        if fresh > target
            && let Some(oldest) = self.ready.front()
        {
            let idle_until = oldest.since + self.settings.idle_ttl;
            if idle_until <= now {
                return self.end_oldest("its pool needed it no more");
            }
            until = Some(until.map_or(idle_until, |until| until.min(idle_until)));
        }
        Plan::Wait(until)
    }

    /// Whether the last one could not be made.
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// It is the turn of what is to be made. False: somebody who asked has taken its place.
    pub fn begin(&mut self) -> bool {
        std::mem::take(&mut self.waits)
    }

    /// The keeper, which makes one at a time, is gone, and another begins.
    pub fn keeper_failed(&mut self, now: Instant, problem: Problem) {
        self.could_not_make(now, self.revision, problem);
        self.making = 0;
    }

    /// What was being made is ready. Given back if the pool was closed meanwhile.
    pub fn put(
        &mut self,
        now: Instant,
        settings: Arc<Settings>,
        revision: u64,
        took: Duration,
        what: T,
    ) -> Option<T> {
        self.making = self.making.saturating_sub(1);
        self.waits = false;
        if self.closed {
            return Some(what);
        }
        self.demand.made(took);
        self.counts.made += 1;
        self.failed = None;
        self.ready.push_back(Ready { what, settings, revision, since: now });
        None
    }

    /// It could not be made. Says whether that is news; it is none if something else is to be made by now: its snapshot may be gone.
    pub fn could_not_make(&mut self, now: Instant, revision: u64, problem: Problem) -> bool {
        self.making = self.making.saturating_sub(1);
        self.waits = false;
        if revision != self.revision || self.closed {
            return false;
        }
        let (pause, news) = match &self.failed {
            Some(failed) => ((failed.pause * 2).min(RETRY_MAX), failed.problem != problem),
            None => (RETRY_FIRST, true),
        };
        self.counts.failed += 1;
        self.counts.without_slot += u64::from(problem.reason == NO_SLOT);
        self.failed = Some(Failed { problem, until: now + pause, pause });
        news
    }

    fn is_fresh(&self, ready: &Ready<T>) -> bool {
        ready.revision == self.revision
    }

    fn fresh(&self) -> usize {
        self.ready.iter().filter(|ready| self.is_fresh(ready)).count()
    }

    /// The newest fresh one: it has most of what it touched still in the caches, and the oldest are to go when fewer are needed.
    fn take_ready(&mut self) -> Option<Ready<T>> {
        let fresh = self.ready.iter().rposition(|ready| self.is_fresh(ready));
        let last = self.ready.len().checked_sub(1)?;
        self.ready.remove(fresh.unwrap_or(last))
    }

    /// The oldest, which a stale one is if there is one, but for one that was begun before a change and done after the first of the new.
    fn end_oldest(&mut self, reason: &'static str) -> Plan<T> {
        let stale = self.ready.iter().position(|ready| !self.is_fresh(ready));
        match self.ready.remove(stale.unwrap_or(0)) {
            Some(ready) => {
                self.counts.ended += 1;
                Plan::End(ready.what, reason)
            }
            None => Plan::Wait(None),
        }
    }

    fn drop_dead(&mut self) {
        let before = self.ready.len();
        self.ready.retain(|ready| !ready.what.is_dead());
        self.counts.died += (before - self.ready.len()) as u64;
    }

    fn all(&self) -> u32 {
        count(self.ready.len()).saturating_add(self.making).saturating_add(self.out)
    }

    /// How many more there may be.
    fn room(&self) -> u32 {
        self.settings.max.saturating_sub(self.all())
    }

    fn target(&self, now: Instant, pace: f64) -> u32 {
        let wanted = self.settings.min_ready.max(self.demand.target(now, pace));
        wanted.min(READY_MAX).min(self.settings.max.saturating_sub(self.out))
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "stock_tests.rs"]
mod tests;
