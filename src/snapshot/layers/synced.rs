//! What brings a file's writes to stable storage, with several writers and several flushes at once. Checked by `tests/models.rs`.

use crate::atomics::{AtomicBool, Mutex, Ordering, PoisonError};

/// Whether a file was written since it was synced.
#[derive(Debug)]
pub struct Synced {
    dirty: AtomicBool,
    /// Held while syncing: a second flush must not return before the first, which took its writes along, has ended.
    syncing: Mutex<()>,
}

impl Synced {
    pub fn new() -> Self {
        Self { dirty: AtomicBool::new(false), syncing: Mutex::new(()) }
    }

    /// A write has been done (not: is about to be). An exchange and not a store: a flush that sees the mark of one writer must see what
    /// others wrote that had marked it before.
    pub fn touched(&self) {
        self.dirty.swap(true, Ordering::AcqRel);
    }

    /// Brings what was written to stable storage by `sync`, unless it is there. What could not be synced stays to be.
    pub fn flush<E>(&self, sync: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let _syncing = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        sync().inspect_err(|_| self.touched())
    }
}
