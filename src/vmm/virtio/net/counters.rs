//! What went through a network device, counted for people. Directions are the guest's: *in* is what it receives.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of one device, shared with whoever shows them. They begin at zero in every VM, also in a clone.
#[derive(Debug, Default)]
pub struct Counters {
    pub frames_in: AtomicU64,
    pub bytes_in: AtomicU64,
    pub frames_out: AtomicU64,
    pub bytes_out: AtomicU64,
    /// Not for this guest, by its own filter.
    pub filtered_in: AtomicU64,
    /// Larger than the guest's receive buffers.
    pub dropped_in_too_long: AtomicU64,
    /// Asks of the guest's driver what it did not agree to, or is no sensible frame.
    pub dropped_in_bad: AtomicU64,
    /// Not a frame, or a header that the host does not take.
    pub dropped_out_bad: AtomicU64,
    /// Nobody took it: no link, or the interface at its other end is down.
    pub dropped_out_no_link: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    pub frames_in: u64,
    pub bytes_in: u64,
    pub frames_out: u64,
    pub bytes_out: u64,
    pub filtered_in: u64,
    pub dropped_in_too_long: u64,
    pub dropped_in_bad: u64,
    pub dropped_out_bad: u64,
    pub dropped_out_no_link: u64,
}

impl Counters {
    pub fn read(&self) -> Counted {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            frames_in: read(&self.frames_in),
            bytes_in: read(&self.bytes_in),
            frames_out: read(&self.frames_out),
            bytes_out: read(&self.bytes_out),
            filtered_in: read(&self.filtered_in),
            dropped_in_too_long: read(&self.dropped_in_too_long),
            dropped_in_bad: read(&self.dropped_in_bad),
            dropped_out_bad: read(&self.dropped_out_bad),
            dropped_out_no_link: read(&self.dropped_out_no_link),
        }
    }
}

/// Counts one more.
pub fn one(counter: &AtomicU64) {
    add(counter, 1);
}

pub fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
