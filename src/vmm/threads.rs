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
static LOST: OnceLock<fn(Role)> = OnceLock::new();

/// From now on each new thread of a machine calls `first` with its role. Only the first word counts. `first` does not
/// return where a thread must not go on.
pub fn at_start(first: fn(Role)) {
    let _ = FIRST.set(first);
}

/// From now on a thread of a machine that ends in a panic calls `lost` with its role: the machine stands still in part then, and nobody
/// else would notice. Only the first word counts. A disk's thread catches the panics of its requests itself.
pub fn at_loss(lost: fn(Role)) {
    let _ = LOST.set(lost);
}

/// The first thing that a thread does; what it gets is to be kept to its end.
pub(super) fn begin(role: Role) -> Alive {
    if let Some(first) = FIRST.get() {
        first(role);
    }
    Alive(role)
}

/// Sees how its thread ends.
#[must_use]
pub(super) struct Alive(Role);

impl Drop for Alive {
    fn drop(&mut self) {
        if let Some(lost) = LOST.get().filter(|_| std::thread::panicking()) {
            lost(self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread;

    use super::*;

    static HEARD: Mutex<Vec<Role>> = Mutex::new(Vec::new());

    #[test]
    fn a_thread_that_panics_is_told_of() {
        at_loss(|role| HEARD.lock().unwrap().push(role));
        let ends = |role, panics: bool| {
            let thread = thread::spawn(move || {
                let _alive = begin(role);
                assert!(!panics, "this one is to panic");
            });
            assert_eq!(thread.join().is_err(), panics);
        };
        ends(Role::Vcpu, false);
        assert_eq!(*HEARD.lock().unwrap(), []);
        ends(Role::Devices, true);
        assert_eq!(*HEARD.lock().unwrap(), [Role::Devices]);
    }
}
