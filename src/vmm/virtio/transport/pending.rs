//! The list of notified queues, without a lock: drivers ring while the device works. Checked by `tests/models.rs`.

use crate::atomics::{AtomicU32, Ordering};

/// Queues that the device thread is to look at; bit = number.
#[derive(Debug)]
pub struct Pending(AtomicU32);

impl Pending {
    pub fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Notes the queues of `mask`, then wakes the device thread.
    pub fn note(&self, mask: u32, wake: impl FnOnce()) {
        self.0.fetch_or(mask, Ordering::SeqCst);
        wake();
    }

    /// Takes the list, after `empty` has forgotten the wakings until now: whatever is noted later wakes again.
    pub fn take(&self, empty: impl FnOnce()) -> u32 {
        empty();
        self.0.swap(0, Ordering::SeqCst)
    }

    pub fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    pub fn set(&self, pending: u32) {
        self.0.store(pending, Ordering::SeqCst);
    }
}
