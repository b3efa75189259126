//! How a vCPU's thread is told to stand still, wherever it is: about to enter KVM_RUN, inside it, or at an exit.
//! Checked by `tests/models.rs`.
//!
//! Two marks: our own flag, and KVM's `immediate_exit`, with which KVM_RUN returns EINTR at its entry (api.rst). A signal, sent
//! after both are set, ends a KVM_RUN that is under way; one that comes before it is entered is lost, and the byte is there for that.

use crate::atomics::{AtomicBool, AtomicU8, Ordering};

/// The marks of one vCPU.
#[derive(Clone, Copy)]
pub struct Stop<'a> {
    pub flag: &'a AtomicBool,
    pub immediate_exit: &'a AtomicU8,
}

impl Stop<'_> {
    // --- the handle's side ---

    /// Asks for it. A signal to the thread follows.
    pub fn ask(self) {
        self.flag.store(true, Ordering::SeqCst);
        // An exchange, as in `begin`: of two exchanges each knows whether it was the later one. (It is the same instruction.)
        self.immediate_exit.swap(1, Ordering::SeqCst);
    }

    /// Takes it back. The order to run follows.
    pub fn take_back(self) {
        self.immediate_exit.store(0, Ordering::SeqCst);
        self.flag.store(false, Ordering::SeqCst);
    }

    // --- the thread's side ---

    /// A run begins. A run that was ended late left `immediate_exit` set after the handle had cleared it. A stop that comes now sets
    /// its flag before the byte: if this clears that byte, [`asked`](Self::asked) sees the flag, because the exchange reads what it clears.
    pub fn begin(self) {
        self.immediate_exit.swap(0, Ordering::SeqCst);
    }

    /// Whether the thread is to stand still: to be looked at before each KVM_RUN.
    pub fn asked(self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// The next KVM_RUN finishes an exit that waits for its answer, and does not run the guest.
    pub fn finish(self) {
        self.immediate_exit.store(1, Ordering::SeqCst);
    }
}
