//! Learning what clones of a snapshot touch first, from the first few of them.
//!
//! A clone that is learnt from runs without the working set. When it has given its first useful answer (the first call, or else the first that its
//! agent is asked; a second after its start at the latest), its worker is asked what it has touched until then. That is off everybody's road.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Fleet;
use super::error::FleetError;
use super::limits::LEARN_WITHIN;
use super::sources::Source;
use super::tasks::blocking;
use super::vm::{Command, Vm};
use crate::snapshot::working_set::{RECORDINGS, Touched, WorkingSet};
use crate::worker::protocol::MemoryMode;

/// What is known of one snapshot.
#[derive(Debug)]
pub struct Learning {
    /// `None`: nothing is learnt, and nothing is given.
    state: Option<Mutex<State>>,
    memory_bytes: u64,
}

#[derive(Debug)]
struct State {
    set: WorkingSet,
    /// Clones that it is being learnt from.
    under_way: u32,
}

impl Learning {
    pub fn new(set: Option<WorkingSet>, memory_bytes: u64) -> Self {
        Self { state: set.map(|set| Mutex::new(State { set, under_way: 0 })), memory_bytes }
    }

    /// What clones are given; nothing as long as it is being learnt.
    pub fn learnt(&self) -> Touched {
        self.now().and_then(|state| state.set.learnt().cloned()).unwrap_or_default()
    }

    fn now(&self) -> Option<MutexGuard<'_, State>> {
        self.state.as_ref().map(|state| state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A worker says this, and its guest may have taken it over.
    pub fn check(&self, touched: &Touched) -> Result<(), &'static str> {
        touched.check(self.memory_bytes)
    }

    /// Whether one more clone is to be learnt from; then [`done`](Self::done) follows.
    fn begin(&self) -> bool {
        let Some(mut state) = self.now() else { return false };
        let wanted = state.set.recordings() + state.under_way < RECORDINGS;
        state.under_way += u32::from(wanted);
        wanted
    }

    /// Adds what a clone has touched, if it came so far; gives what is to be kept.
    fn done(&self, touched: Option<(Touched, bool)>) -> Option<WorkingSet> {
        let mut state = self.now()?;
        state.under_way -= 1;
        let (touched, writes) = touched?;
        if let Err(problem) = self.check(&touched) {
            tracing::warn!(problem, "a worker's account of what its VM touched is not used");
            return None;
        }
        state.set.learn(&touched, writes);
        Some(state.set.clone())
    }
}

impl Fleet {
    /// Learns from a clone, if one more is wanted. `answered`: it has given its first useful answer already.
    /// Otherwise it may be looked at whether it touches what was learnt; `given`: it was given that.
    pub(super) fn learn_from(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        source: &Arc<Source>,
        answered: bool,
        given: bool,
    ) {
        if !source.learning.begin() {
            return self.sample(vm, source, answered, given);
        }
        // Weak: a clone that is waited for must not keep a service from ending.
        let (fleet, vm, source) = (Arc::downgrade(self), Arc::clone(vm), Arc::clone(source));
        tokio::spawn(async move {
            let touched = match touched(&vm, answered).await {
                Ok(touched) => Some(touched),
                Err(error) => {
                    tracing::debug!(%error, vm = %vm.id, "nothing was learnt from a clone");
                    None
                }
            };
            drop(vm);
            if let Some(set) = source.learning.done(touched)
                && let Some(fleet) = fleet.upgrade()
                && let Err(error) = fleet.keep(&source, set).await
            {
                // It is deleted, or the disk is full; what was learnt serves as long as this daemon lives.
                tracing::debug!(%error, "a working set was not kept");
            }
        });
    }

    async fn keep(&self, source: &Source, set: WorkingSet) -> Result<(), FleetError> {
        let id = source.id();
        let snapshot = self.snapshots.published(&id)?;
        let learnt = set.learnt().is_some();
        blocking(move || snapshot.keep_working_set(&set)).await??;
        if learnt {
            // Those that were made ahead know nothing of it.
            self.shells.renew(&id);
            self.pools.renew(&id);
        }
        Ok(())
    }
}

/// What the clone touched until its first useful answer, and whether what it wrote can be told from what it read.
pub(super) async fn touched(vm: &Vm, answered: bool) -> Result<(Touched, bool), FleetError> {
    if !answered {
        let mut answers = vm.agent.answers();
        answers.mark_unchanged();
        tokio::select! {
            _ = answers.changed() => {}
            () = tokio::time::sleep(LEARN_WITHIN) => {}
            reason = vm.ended() => return Err(FleetError::Ended(reason)),
        }
    }
    let touched = vm.command(Command::Touched).await?;
    Ok((touched, vm.memory_mode == Some(MemoryMode::Mapped)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::working_set::Run;

    fn touched(piece: u32) -> Touched {
        Touched { pieces: vec![Run { first: piece, count: 1 }], written: Vec::new() }
    }

    #[test]
    fn as_many_clones_as_are_needed_are_learnt_from_and_no_more() {
        let learning = Learning::new(Some(WorkingSet::default()), 512 << 20);
        assert!((0..RECORDINGS).all(|_| learning.begin()));
        assert!(!learning.begin());
        // One came to nothing, another lied: the next are asked in their place.
        assert_eq!(learning.done(None), None);
        assert_eq!(learning.done(Some((touched(256), true))), None);
        assert!(learning.begin() && learning.begin() && !learning.begin());
        for piece in 0..RECORDINGS {
            assert_eq!(learning.learnt(), Touched::default());
            assert_eq!(learning.done(Some((touched(2 * piece), true))).unwrap().recordings(), piece + 1);
        }
        assert_eq!(learning.learnt().pieces.len(), RECORDINGS as usize);
        assert!(!learning.begin());
    }

    #[test]
    fn where_it_is_not_wanted_nothing_is_learnt() {
        let learning = Learning::new(None, 512 << 20);
        assert!(!learning.begin());
        assert!(learning.learnt().is_empty());
        // What is sampled is held against the memory all the same.
        assert_eq!(learning.check(&touched(255)), Ok(()));
        assert!(learning.check(&touched(256)).is_err());
    }
}
