//! The registers that a driver touches all the time, without a lock.
//!
//! While the device thread works on a queue it holds the transport's lock, for as long as the disk takes. An interrupt
//! handler that reads and acknowledges the interrupt status must not wait for that, nor a driver that notifies. So
//! these three registers (`QueueNotify`, `InterruptStatus`, `InterruptACK`) and the list of notified queues live here,
//! in atomics; vCPU threads ask [`HotRegisters`] first and take the lock only for what it does not know.
//!
//! Order: the device writes the used ring, then sets the status bit, then raises the line. The driver acknowledges,
//! then reads the used ring; so a bit that is set once for two causes is enough, and one cleared is never missed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_NOTIFY,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
const STATUS: u64 = VIRTIO_MMIO_INTERRUPT_STATUS as u64;
const ACKNOWLEDGE: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// Registers of one transport that any thread may access at any time.
#[derive(Debug)]
pub struct HotRegisters {
    /// Queues that exist; bit = number.
    queues: u32,
    interrupt_status: AtomicU32,
    /// Queues that the device thread is to look at.
    pending: AtomicU32,
    /// Wakes the device thread.
    kick: EventFd,
}

impl HotRegisters {
    pub(super) fn new(queue_count: usize) -> io::Result<Self> {
        let queues = (0..queue_count.min(super::QUEUES_MAX)).fold(0, |mask, queue| mask | 1 << queue);
        let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { queues, interrupt_status: AtomicU32::new(0), pending: AtomicU32::new(0), kick })
    }

    /// Answers a read, if it is one of these registers: true.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        match (offset, <&mut [u8; 4]>::try_from(data)) {
            (STATUS, Ok(data)) => {
                *data = self.interrupt_status().to_le_bytes();
                true
            }
            _ => false,
        }
    }

    /// Takes a write, if it is to one of these registers: true.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return false };
        match offset {
            NOTIFY => {
                // A queue that does not exist: nothing to do.
                match 1u32.checked_shl(value).unwrap_or(0) & self.queues {
                    0 => {}
                    mask => self.kick(mask),
                }
                true
            }
            ACKNOWLEDGE => {
                self.interrupt_status.fetch_and(!value, Ordering::SeqCst);
                true
            }
            _ => false,
        }
    }

    /// Has the device thread look at the queues of `mask` and those noted before.
    pub(super) fn kick(&self, mask: u32) {
        self.pending.fetch_or(mask, Ordering::SeqCst);
        // It fails only if the counter is full, and then the thread is woken already.
        let _ = self.kick.write(1);
    }

    pub(super) fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes the queues to look at. The descriptor is emptied first: whatever is noted after that wakes again.
    pub(super) fn take_pending(&self) -> u32 {
        // It fails only if it is empty already.
        let _ = self.kick.read();
        self.pending.swap(0, Ordering::SeqCst)
    }

    pub(super) fn queues(&self) -> u32 {
        self.queues
    }

    pub(super) fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::SeqCst)
    }

    pub(super) fn set_interrupt(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::SeqCst);
    }

    /// Sets both at once, at a reset or restore.
    pub(super) fn set(&self, pending: u32, interrupt_status: u32) {
        self.pending.store(pending, Ordering::SeqCst);
        self.interrupt_status.store(interrupt_status, Ordering::SeqCst);
    }
}
