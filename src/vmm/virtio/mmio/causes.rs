//! The interrupt status register, without a lock. Checked by `tests/models.rs`.
//!
//! Order: the device writes the used ring, then sets the status bit, then raises the line. The driver acknowledges,
//! then reads the used ring; so a bit that is set once for two causes is enough, and one cleared is never missed.

use crate::atomics::{AtomicU32, Ordering};

/// Why the line was raised.
#[derive(Debug)]
pub struct Causes(AtomicU32);

impl Causes {
    pub fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Adds a cause, then raises the line.
    pub fn raise(&self, cause: u32, line: impl FnOnce()) {
        self.0.fetch_or(cause, Ordering::SeqCst);
        line();
    }

    /// The driver has seen the causes of `mask`.
    pub fn acknowledge(&self, mask: u32) {
        self.0.fetch_and(!mask, Ordering::SeqCst);
    }

    pub fn get(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }

    pub fn set(&self, causes: u32) {
        self.0.store(causes, Ordering::SeqCst);
    }
}
