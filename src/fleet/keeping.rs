//! Keeping the working sets of snapshots that are in use in the page cache ([`Keeper`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use tokio::time::MissedTickBehavior;

use super::Fleet;
use super::limits::{KEEP_EVERY, KEEP_FOR};
use super::sources::Source;
use super::tasks::blocking;
use crate::snapshot::limits::HUGE_BYTES;
use crate::snapshot::memory::keep::Keeper;

/// What is kept of one snapshot.
#[derive(Debug, Default)]
pub struct Keeping(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last_clone: Option<Instant>,
    /// While nobody is at it.
    keeper: Option<Keeper>,
    kept: KeptSoFar,
}

/// How it is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptSoFar {
    /// In folios of 2 MiB, when last looked at.
    pub folded_bytes: u64,
    /// Pieces that were read again since the snapshot was opened.
    pub again: u64,
}

impl Keeping {
    /// The snapshot is in use.
    pub fn used(&self) {
        self.lock().last_clone = Some(Instant::now());
    }

    fn in_use(&self) -> bool {
        self.lock().last_clone.is_some_and(|last| last.elapsed() < KEEP_FOR)
    }

    pub fn so_far(&self) -> KeptSoFar {
        self.lock().kept
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    /// Looks at the working set once. Blocks while the disk reads.
    fn keep(&self) -> std::io::Result<()> {
        let pieces = self.learning.learnt().pieces;
        if pieces.is_empty() {
            return Ok(());
        }
        // Not under the lock: a clone asks for it.
        let keeper = self.keeping.lock().keeper.take();
        let mut keeper = match keeper {
            Some(keeper) => keeper,
            None => Keeper::new(Arc::clone(&self.open.memory), self.open.manifest.facts.memory.file_bytes())?,
        };
        let kept = keeper.keep(&pieces)?;
        if kept.again > 0 {
            tracing::debug!(snapshot = self.id(), pieces = kept.again, "read again, or folded again");
        }
        let mut state = self.keeping.lock();
        state.keeper = Some(keeper);
        state.kept = KeptSoFar {
            folded_bytes: u64::from(kept.folded) * HUGE_BYTES,
            again: state.kept.again + u64::from(kept.again),
        };
        Ok(())
    }
}

/// Until the fleet is gone.
pub async fn run(fleet: Weak<Fleet>) {
    let mut tick = tokio::time::interval(KEEP_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(sources) = fleet.upgrade().map(|fleet| fleet.snapshots.sources()) else { return };
        for source in sources.into_iter().filter(|source| source.keeping.in_use()) {
            let kept = blocking(move || source.keep()).await;
            // Clones that need what cannot be read will say so.
            if let Ok(Err(error)) = kept {
                tracing::debug!(%error, "a working set could not be kept in the page cache");
            }
        }
    }
}
