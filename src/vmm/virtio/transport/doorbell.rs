//! Which queues the device thread is to look at, without a lock: drivers ring while the device works.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::QUEUES_MAX;
use super::pending::Pending;

/// The list of notified queues of one device, and what wakes the device thread.
#[derive(Debug)]
pub struct Doorbell {
    /// Queues that exist; bit = number.
    queues: u32,
    pending: Pending,
    /// Wakes the device thread.
    kick: EventFd,
}

impl Doorbell {
    pub(super) fn new(queue_count: usize) -> io::Result<Self> {
        let queues = (0..queue_count.min(QUEUES_MAX)).fold(0, |mask, queue| mask | 1 << queue);
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { queues, pending: Pending::new(), kick })
    }

    /// The driver notifies queue `number`. One that does not exist: nothing to do.
    pub fn ring(&self, number: u32) {
        match 1u32.checked_shl(number).unwrap_or(0) & self.queues {
            0 => {}
            mask => self.kick(mask),
        }
    }

    /// Has the device thread look at the queues of `mask` and those noted before.
    pub(super) fn kick(&self, mask: u32) {
        // It fails only if the counter is full, and then the thread is woken already.
        self.pending.note(mask, || drop(self.kick.write(1)));
    }

    pub(in crate::vmm::virtio) fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the queues to look at.
    pub(super) fn take_pending(&self) -> u32 {
        // It fails only if it is empty already.
        self.pending.take(|| drop(self.kick.read()))
    }

    pub(super) fn queues(&self) -> u32 {
        self.queues
    }

    pub(super) fn pending(&self) -> u32 {
        self.pending.get()
    }

    pub(super) fn set_pending(&self, pending: u32) {
        self.pending.set(pending);
    }
}
