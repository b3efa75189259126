//! When a machine reached what, for the boot profile: host times, and what the guest's time stamp counter said at one of them.
//!
//! Each mark is set once, by the thread that gets there, and costs one atomic load afterwards. The counter is read with
//! KVM_GET_MSRS before the first KVM_RUN, when nobody is disturbed; at other moments it follows from the time between and
//! its frequency (KVM_GET_TSC_KHZ). A guest that writes IA32_TSC itself makes that wrong; FreeBSD and Linux do not on the boot CPU.

use std::sync::OnceLock;
use std::time::Instant;

/// Marks of one machine.
#[derive(Debug, Default)]
pub struct Milestones {
    /// The boot CPU is about to enter the guest for the first time.
    pub entered: OnceLock<Instant>,
}

/// What the boot CPU's time stamp counter said at a moment of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestClock {
    pub at: Instant,
    pub tsc: u64,
    pub khz: u32,
}
