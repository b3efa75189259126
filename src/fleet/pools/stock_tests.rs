use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

/// A thing that can be told to die.
#[derive(Debug, Clone)]
struct Dummy {
    number: u32,
    dead: Rc<Cell<bool>>,
}

impl Thing for Dummy {
    fn is_dead(&self) -> bool {
        self.dead.get()
    }
}

fn problem() -> Problem {
    Problem { text: "no".into(), reason: "NETWORK_SLOTS_EXHAUSTED" }
}

const PACE: f64 = 2.0;
const TOOK: Duration = Duration::from_millis(4);

fn settings(min_ready: u32, max: u32) -> Settings {
    Settings { snapshot: "snap-a".into(), min_ready, max, ..Settings::default() }
}

struct Bench {
    stock: Stock<Dummy>,
    now: Instant,
    numbers: u32,
}

impl Bench {
    fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { stock: Stock::new(settings, now), now, numbers: 0 }
    }

    fn look(&self) -> Look {
        self.stock.look(self.now, PACE)
    }

    /// Does what is planned until there is something to wait for; gives why things were ended, and until when it waits.
    fn settle(&mut self) -> (Vec<&'static str>, Option<Instant>) {
        let mut ended = Vec::new();
        for _ in 0..10_000 {
            match self.stock.plan(self.now, PACE) {
                Plan::Make(settings, revision) => self.made(settings, revision),
                Plan::End(_, reason) => ended.push(reason),
                Plan::Wait(until) => return (ended, until),
                Plan::Nothing => return (ended, None),
            }
        }
        panic!("it never comes to rest: {:?}", self.look());
    }

    fn made(&mut self, settings: Arc<Settings>, revision: u64) {
        self.numbers += 1;
        let thing = Dummy { number: self.numbers, dead: Rc::default() };
        let back = self.stock.put(self.now, settings, revision, TOOK, thing);
        assert!(back.is_none());
    }

    fn take(&mut self) -> Option<Dummy> {
        match self.stock.find(self.now, false) {
            Found::Ready(ready) => Some(ready.what),
            _ => None,
        }
    }
}

#[test]
fn the_promised_number_is_kept_ready_and_none_is_given_twice() {
    let mut bench = Bench::new(settings(3, 8));
    assert_eq!(bench.settle(), (vec![], None));
    assert_eq!((bench.look().ready, bench.look().counts.made), (3, 3));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        assert!(seen.insert(bench.take().unwrap().number));
        bench.now += QUIET;
        bench.settle();
    }
    let look = bench.look();
    assert_eq!((look.ready, look.out, look.counts.taken_ready), (3, 5, 5));
    // Full: the ready ones can still be had, and then no more.
    (0..3).for_each(|_| assert!(seen.insert(bench.take().unwrap().number)));
    assert!(matches!(bench.stock.find(bench.now, false), Found::Full(8)));
    assert_eq!((bench.settle().0, bench.look().ready), (vec![], 0));
    bench.stock.came_to_its_end();
    bench.now += QUIET;
    bench.settle();
    assert_eq!(bench.look().ready, 1);
}

#[test]
fn with_none_ready_one_may_be_started_and_the_last_one_is_waited_for() {
    let mut bench = Bench::new(settings(1, 2));
    assert!(matches!(bench.stock.find(bench.now, false), Found::Room(_)));
    bench.now += QUIET;
    let Plan::Make(settings, revision) = bench.stock.plan(bench.now, PACE) else { panic!("nothing is made") };
    assert!(bench.stock.begin());
    assert!(matches!(bench.stock.find(bench.now, false), Found::Soon));
    bench.made(settings, revision);
    assert!(matches!(bench.stock.find(bench.now, true), Found::Ready(_)));
    // The one that waited asked once.
    assert_eq!(bench.look().counts.taken_ready + bench.look().counts.taken_cold, 2);
    assert!(bench.look().rate < 0.25);
}

#[test]
fn what_waits_for_its_turn_holds_nobody_up_who_asks() {
    let mut bench = Bench::new(settings(1, 1));
    let plan = bench.stock.plan(bench.now, PACE);
    assert!(matches!(plan, Plan::Make(..)));
    assert!(matches!(bench.stock.find(bench.now, false), Found::Room(_)));
    assert_eq!((bench.look().making, bench.look().out), (0, 1));
    assert!(!bench.stock.begin(), "its place is taken");
    assert!(matches!(bench.stock.find(bench.now, false), Found::Full(1)));
    // Without a slot it never came to its turn.
    bench.stock.could_not_make(bench.now, 0, problem());
    assert_eq!((bench.look().making, bench.look().out), (0, 1));
}

#[test]
fn a_keeper_that_failed_leaves_nothing_that_is_being_made_for_ever() {
    let mut bench = Bench::new(settings(1, 1));
    assert!(matches!(bench.stock.plan(bench.now, PACE), Plan::Make(..)));
    assert!(bench.stock.begin());
    assert!(matches!(bench.stock.find(bench.now, false), Found::Soon));
    bench.stock.keeper_failed(bench.now, problem());
    assert_eq!((bench.look().making, bench.look().problem), (0, Some(problem())));
    let Plan::Wait(Some(until)) = bench.stock.plan(bench.now, PACE) else { panic!("it is not tried again") };
    bench.now = until;
    assert_eq!((bench.settle().0.len(), bench.look().ready), (0, 1));
}

#[test]
fn more_is_kept_ready_while_more_is_asked_for_and_ended_when_it_idles() {
    let mut bench = Bench::new(Settings { idle_ttl: Duration::from_secs(5), ..settings(1, 100) });
    bench.settle();
    for _ in 0..2000 {
        bench.now += Duration::from_millis(5);
        let _ = bench.stock.find(bench.now, false);
        bench.stock.came_to_its_end();
        bench.settle();
    }
    bench.now += QUIET;
    bench.settle();
    let busy = bench.look();
    assert!(busy.target > 4 && busy.ready >= busy.target, "{busy:?}");
    let mut rounds = 0;
    while let (ended, Some(until)) = bench.settle() {
        assert!(ended.iter().all(|reason| *reason == "its pool needed it no more"), "{ended:?}");
        bench.now = bench.now.max(until);
        rounds += 1;
        assert!(rounds < 200);
    }
    assert_eq!((bench.look().ready, bench.look().target), (1, 1));
}

#[test]
fn a_new_snapshot_replaces_what_is_ready_one_by_one_and_something_is_always_ready() {
    let mut bench = Bench::new(settings(3, 4));
    bench.settle();
    let old = bench.numbers;
    bench.stock.change(Settings { snapshot: "snap-b".into(), ..settings(3, 4) });
    assert_eq!(bench.look().stale, 3);
    let mut ready = bench.look().ready;
    loop {
        match bench.stock.plan(bench.now, PACE) {
            Plan::Make(settings, revision) => bench.made(settings, revision),
            Plan::End(..) => {}
            Plan::Wait(_) => break,
            Plan::Nothing => panic!("closed"),
        }
        ready = ready.min(bench.look().ready);
    }
    assert_eq!((bench.look().ready, bench.look().stale), (3, 0));
    assert!(ready >= 2, "only {ready} were ready in between");
    assert!(bench.take().unwrap().number > old);
}

#[test]
fn only_what_would_be_made_otherwise_now_is_stale() {
    let mut bench = Bench::new(settings(2, 4));
    bench.settle();
    bench.stock.change(settings(1, 3));
    assert_eq!(bench.look().stale, 0);
    bench.stock.renew("snap-b");
    assert_eq!(bench.look().stale, 0);
    bench.stock.renew("snap-a");
    assert_eq!(bench.look().stale, 2);
    // What was stale is handed out while there is nothing else.
    assert!(bench.take().is_some());
}

#[test]
fn what_dies_is_not_handed_out_and_is_replaced() {
    let mut bench = Bench::new(settings(2, 4));
    bench.settle();
    let victim = bench.stock.ready.back().unwrap().what.clone();
    victim.dead.set(true);
    assert_ne!(bench.take().unwrap().number, victim.number);
    bench.now += QUIET;
    bench.settle();
    let look = bench.look();
    assert_eq!((look.ready, look.counts.died), (2, 1));
}

#[test]
fn failures_are_tried_again_ever_more_rarely_and_told_once() {
    let mut bench = Bench::new(settings(1, 4));
    let mut pauses = Vec::new();
    for n in 0..10 {
        let Plan::Make(_, revision) = bench.stock.plan(bench.now, PACE) else { panic!("nothing is tried") };
        assert_eq!(bench.stock.could_not_make(bench.now, revision, problem()), n == 0);
        let Plan::Wait(Some(until)) = bench.stock.plan(bench.now, PACE) else { panic!("no pause") };
        pauses.push(until - bench.now);
        bench.now = until;
    }
    assert!(pauses[0] == RETRY_FIRST && pauses[1] == 2 * RETRY_FIRST && pauses[9] == RETRY_MAX, "{pauses:?}");
    assert_eq!(bench.look().problem, Some(problem()));
    assert_eq!(bench.look().counts.without_slot, bench.look().counts.failed);
    bench.settle();
    assert_eq!((bench.look().problem, bench.look().ready), (None, 1));

    // What was begun before a change and cannot be made says nothing about what is to be made now.
    let mut bench = Bench::new(settings(1, 4));
    let Plan::Make(_, revision) = bench.stock.plan(bench.now, PACE) else { panic!("nothing is tried") };
    bench.stock.change(Settings { snapshot: "snap-b".into(), ..settings(1, 4) });
    assert!(!bench.stock.could_not_make(bench.now, revision, problem()));
    assert_eq!(bench.look().problem, None);
    assert!(matches!(bench.stock.plan(bench.now, PACE), Plan::Make(..)));
}

#[test]
fn a_closed_pool_gives_back_what_it_had_and_what_was_being_made() {
    let mut bench = Bench::new(settings(2, 4));
    let Plan::Make(settings, revision) = bench.stock.plan(bench.now, PACE) else { panic!("nothing is made") };
    bench.settle();
    assert_eq!(bench.stock.close().len(), 1);
    let late = Dummy { number: 99, dead: Rc::default() };
    assert_eq!(bench.stock.put(bench.now, settings, revision, TOOK, late).unwrap().number, 99);
    assert!(matches!(bench.stock.find(bench.now, false), Found::Closed));
    assert!(matches!(bench.stock.plan(bench.now, PACE), Plan::Nothing));
}

proptest! {
    /// Whatever is asked for, dies, ends or changes: there are never more than the limit that held when they were begun, none is given
    /// twice, and at rest the promised number is ready where there is room for it.
    #[test]
    fn whatever_happens_promises_are_kept(steps in prop::collection::vec((0u8..8, 0u32..8), 1..200)) {
        let mut bench = Bench::new(settings(2, 6));
        let mut seen = std::collections::BTreeSet::new();
        let mut out = 0u32;
        let mut max = 6;
        for (what, number) in steps {
            bench.now += Duration::from_millis(u64::from(number) * 20);
            match what {
                0..=2 => match bench.stock.find(bench.now, number == 0) {
                    Found::Ready(ready) => {
                        prop_assert!(seen.insert(ready.what.number));
                        prop_assert!(!ready.what.is_dead());
                        out += 1;
                    }
                    Found::Room(_) => out += 1,
                    Found::Full(_) => prop_assert!(out >= max),
                    Found::Soon | Found::Closed => {}
                },
                3 if out > 0 => {
                    out -= 1;
                    bench.stock.came_to_its_end();
                }
                4 => if let Some(ready) = bench.stock.ready.get(number as usize) {
                    ready.what.dead.set(true);
                },
                5 => {
                    max = number + 1;
                    bench.stock.change(settings(number.min(3), max));
                }
                6 => bench.stock.renew("snap-a"),
                _ => { bench.settle(); }
            }
            prop_assert_eq!(bench.look().out, out);
        }
        bench.now += QUIET;
        bench.settle();
        let look = bench.look();
        prop_assert_eq!(look.stale, 0);
        prop_assert!(look.ready + look.out <= max.max(out), "{:?}", look);
        prop_assert!(look.ready >= look.settings.min_ready.min(max.saturating_sub(out)), "{:?}", look);
    }
}
