//! What a thread of a machine does before anything else.
//!
//! The machine knows which threads it has, the process around it how they are to be confined: it leaves word here once
//! ([`at_start`]), and each thread says its role before it touches anything of a guest.

use std::sync::OnceLock;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU and answers its exits.
    Vcpu,
    /// Works on virtqueues, the console and the interval timer.
    Devices,
    /// Carries disk requests out.
    Disk,
}

static FIRST: OnceLock<fn(Role)> = OnceLock::new();

/// From now on each new thread of a machine calls `first` with its role. Only the first word counts. `first` does not
/// return where a thread must not go on.
pub fn at_start(first: fn(Role)) {
    let _ = FIRST.set(first);
}

/// The first thing that a thread does.
pub(super) fn begin(role: Role) {
    if let Some(first) = FIRST.get() {
        first(role);
    }
}
