//! The pool's task: makes slots, takes them down with what the host remembers of them, one after the other, behind everybody's back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::access::{Publish, Transport};
use super::addresses::Place;
use super::forget::{self, Forget};
use super::ports::Key;
use super::{DOWN_MAX, Gone, RETRY, Slots, maker};
use crate::fleet::child;
use crate::fleet::error::FleetError;
use crate::fleet::network::NetworkError;
use crate::fleet::tasks::blocking;

/// What the pool's task does next.
enum Step {
    /// With the ports that led to them.
    TakeDown(Vec<Gone>, Vec<Key>),
    /// Make the host forget their connections.
    Forget(Vec<Place>),
    Make(Place),
    /// For something to do, at most until then.
    Wait(Option<Instant>),
    End,
}

/// The host is made to forget after so long again, or so many times as long as it took: it tells all that it remembers for that, which may be much.
const FORGET_PAUSE: Duration = Duration::from_secs(1);
const FORGET_PACE: u32 = 10;
/// Slots after which it is made to all the same.
const REMEMBERED_MAX: usize = 256;

impl Slots {
    /// The pool's task.
    pub(super) async fn run(self: Arc<Self>) {
        let mut retry = RETRY.0;
        // When what could not be taken down is tried again.
        let (mut again_at, mut again_in) = (Instant::now(), RETRY.0);
        let mut was_down = false;
        let mut forget_at = Instant::now();
        loop {
            let step = self.next_step(was_down, forget_at, again_at);
            was_down = matches!(step, Step::TakeDown(..));
            match step {
                Step::End => return,
                Step::Wait(None) => self.work.notified().await,
                Step::Wait(Some(until)) => {
                    // What it comes back with says the same: look again.
                    let _ = tokio::time::timeout_at(until.into(), self.work.notified()).await;
                }
                Step::Forget(places) => {
                    let begun = Instant::now();
                    let ends = places
                        .iter()
                        .flat_map(|place| [IpAddr::V4(place.address4), IpAddr::V6(place.address6)]);
                    let what = Forget { addresses: ends.collect(), ..Forget::default() };
                    if let Err(error) = blocking(move || maker::behind(|| forget(&what))).await {
                        tracing::error!(%error, "the host's connections cannot be looked at");
                    }
                    forget_at = Instant::now() + FORGET_PAUSE.max(begun.elapsed() * FORGET_PACE);
                }
                Step::TakeDown(mut gone, ports) => {
                    if (!ports.is_empty() || gone.iter().any(|gone| gone.seen))
                        && let Err(error) = self.set_host().await
                    {
                        tracing::error!(%error, again_in_s = retry.as_secs(), "the host's rules for network slots cannot be set");
                        if self.put_back(&mut gone) {
                            self.rest(retry).await;
                            retry = (retry * 2).min(RETRY.1);
                            continue;
                        }
                    }
                    let slots = Arc::clone(&self);
                    let done = blocking(move || maker::behind(|| slots.down(&gone, &ports))).await;
                    match done.and_then(|done| Ok(done??)) {
                        Ok(()) => again_in = RETRY.0,
                        Err(error) if self.lock().stuck.is_empty() => {
                            tracing::error!(%error, "network slots are left behind");
                        }
                        Err(error) => {
                            tracing::error!(%error, again_in_s = again_in.as_secs(), "network slots cannot be taken down");
                            again_at = Instant::now() + again_in;
                            again_in = (again_in * 2).min(RETRY.1);
                        }
                    }
                }
                Step::Make(place) => {
                    let rules = self.rules.clone();
                    // Somebody may wait for it.
                    let is_urgent = self.lock().ready.is_empty();
                    let made = blocking(move || match is_urgent {
                        true => Ok(maker::make(&rules, place)),
                        false => maker::behind(|| maker::make(&rules, place)),
                    })
                    .await;
                    match made.and_then(|made| Ok(made??)) {
                        Ok(made) => {
                            retry = RETRY.0;
                            let mut state = self.lock();
                            state.problem = None;
                            if state.closed {
                                let number = made.place.number;
                                state.gone.push_back(Gone { number, place: None, seen: false });
                                continue;
                            }
                            state.ready.push_back(made);
                            drop(state);
                            self.ready.add_permits(1);
                            self.filled.notify_waiters();
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
    fn next_step(&self, was_down: bool, forget_at: Instant, again_at: Instant) -> Step {
        let mut state = self.lock();
        let state = &mut *state;
        // At the end once more, and then they are left behind.
        if state.closed || again_at <= Instant::now() {
            let again = state.stuck.drain(..).map(|number| Gone { number, place: None, seen: false });
            state.gone.extend(again);
        }
        if state.remembered.len() >= REMEMBERED_MAX {
            return Step::Forget(std::mem::take(&mut state.remembered));
        }
        let wanted = !state.closed && state.ready.len() < self.size;
        let make = if wanted { state.free(&self.rules) } else { None };
        if let Some(place) = make
            && (was_down || state.gone.is_empty())
        {
            let same = |old: &Place| old.address4 == place.address4 || old.address6 == place.address6;
            return match state.remembered.iter().any(same) {
                // Whoever talked to the last one is not to talk to the next.
                true => Step::Forget(std::mem::take(&mut state.remembered)),
                false => Step::Make(place),
            };
        }
        if state.gone.is_empty() && !state.ports.rest() {
            let is_due = !state.remembered.is_empty() && (state.closed || forget_at <= Instant::now());
            return match is_due {
                true => Step::Forget(std::mem::take(&mut state.remembered)),
                false if state.closed && state.awaited == 0 => Step::End,
                false => {
                    let forget = (!state.remembered.is_empty()).then_some(forget_at);
                    let again = (!state.stuck.is_empty()).then_some(again_at);
                    Step::Wait(forget.into_iter().chain(again).min())
                }
            };
        }
        let count = state.gone.len().min(DOWN_MAX);
        let gone = state.gone.drain(..count).collect();
        Step::TakeDown(gone, state.ports.resting())
    }

    /// These are to be taken down later: a rule of the host's may lead to them still, so nobody may have their addresses and ports. False: the
    /// pool is closed, so nobody will, and they go now.
    fn put_back(&self, gone: &mut Vec<Gone>) -> bool {
        let mut state = self.lock();
        let open = !state.closed;
        if open {
            gone.drain(..).rev().for_each(|gone| state.gone.push_front(gone));
        }
        open
    }

    /// Takes slots down, and lets the ports go that led to them. Blocks.
    fn down(&self, gone: &[Gone], ports: &[Key]) -> Result<(), NetworkError> {
        // Under the lock: a port is either there to be had again, or free.
        child::undisturbed(|| self.lock().ports.let_go(ports));
        let numbers: Vec<u32> = gone.iter().map(|gone| gone.number).collect();
        let result = maker::take_down(&self.rules, &numbers);
        let left = if result.is_err() { maker::left_of(&self.rules, &numbers) } else { Vec::new() };
        let mut state = self.lock();
        state.remembered.extend(gone.iter().filter_map(|gone| gone.place));
        if !state.closed {
            state.stuck.extend(left);
        }
        Ok(result?)
    }
}

/// Who has asked these ports by UDP before, and asks on, is led to where they lead now.
pub(super) async fn forget_ports(publish: &[Publish]) -> Result<(), FleetError> {
    let udp = publish.iter().filter(|publish| publish.transport == Transport::Udp);
    let what = Forget { udp_ports: udp.map(|publish| publish.host).collect(), ..Forget::default() };
    match what.is_empty() {
        true => Ok(()),
        false => blocking(move || forget(&what)).await,
    }
}

/// Makes the host forget connections, as well as it can.
fn forget(what: &Forget) {
    match forget::forget(what) {
        Ok(count) => tracing::debug!(count, "connections were forgotten"),
        Err(error) => tracing::warn!(
            %error,
            "the host's kernel cannot be made to forget connections of network slots; it does after some time without packets (is there the module nf_conntrack_netlink?)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::slots::addresses::Plan;

    #[tokio::test]
    async fn what_cannot_be_taken_down_is_tried_again_later_and_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let slots = Slots::new(0, Plan::default(), folder.path()).unwrap();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(3600));
        let taken_down = |step| match step {
            Step::TakeDown(gone, _) => gone.iter().map(|gone| gone.number).collect(),
            _ => Vec::new(),
        };
        slots.lock().stuck = vec![5, 6];
        assert!(matches!(slots.next_step(false, now, later), Step::Wait(Some(until)) if until == later));
        assert_eq!(taken_down(slots.next_step(false, now, now)), [5, 6]);
        assert!(matches!(slots.next_step(false, now, now), Step::Wait(None)));
        slots.lock().stuck = vec![7];
        slots.lock().closed = true;
        assert_eq!(taken_down(slots.next_step(false, now, later)), [7]);
        assert!(matches!(slots.next_step(false, now, later), Step::End));
    }
}
