//! A split virtqueue of sixteen descriptors (virtio 1.2, 2.7).
//!
//! Waiting is polling for a short while, then halting with the queue's interrupt on: an idle guest burns nothing. While
//! something is due, the local APIC's timer watches, so that a device that never answers is noticed.

use core::hint::spin_loop;
use core::sync::atomic::{Ordering, fence};

use super::Failure;
use super::mmio::Device;
use crate::gate;
use crate::interrupts;

const SIZE: usize = 16;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const SPINS_BEFORE_HALT: u32 = 2_000;
const TIMEOUT_S: u32 = 20;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Available {
    flags: u16,
    index: u16,
    ring: [u16; SIZE],
    used_event: u16,
}

#[repr(C)]
struct UsedRing {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; SIZE],
    available_event: u16,
}

/// The shared memory of one queue.
#[repr(C, align(512))]
pub(crate) struct Rings {
    descriptors: [Descriptor; SIZE],
    available: Available,
    used: UsedRing,
}

impl Rings {
    pub(super) const SIZE: u16 = SIZE as u16;

    pub(super) const fn new() -> Rings {
        Rings {
            descriptors: [Descriptor { address: 0, bytes: 0, flags: 0, next: 0 }; SIZE],
            available: Available { flags: 0, index: 0, ring: [0; SIZE], used_event: 0 },
            used: UsedRing { flags: 0, index: 0, ring: [[0; 2]; SIZE], available_event: 0 },
        }
    }

    /// Of descriptors, driver area, device area.
    pub(super) fn addresses(&self) -> [u64; 3] {
        [&raw const self.descriptors as u64, &raw const self.available as u64, &raw const self.used as u64]
    }
}

/// A completed chain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used {
    /// Its first descriptor.
    pub(super) head: u16,
    /// Bytes that the device wrote.
    pub(super) bytes: u32,
}

pub(crate) struct Queue {
    device: Device,
    index: u32,
    rings: *mut Rings,
    given: u16,
    taken: u16,
    /// An interrupt may have come since the last acknowledgement.
    unacknowledged: bool,
}

impl Queue {
    pub(super) fn new(device: Device, index: u32, rings: &'static mut Rings) -> Queue {
        let queue = Queue { device, index, rings, given: 0, taken: 0, unacknowledged: true };
        queue.want_interrupts(false);
        queue
    }

    /// Writes a descriptor. `next`: the one after it in its chain.
    pub(super) fn describe(
        &mut self,
        at: u16,
        address: u64,
        bytes: u32,
        device_writes: bool,
        next: Option<u16>,
    ) {
        let flags = if device_writes { DEVICE_WRITES } else { 0 } | if next.is_some() { NEXT } else { 0 };
        let descriptor = Descriptor { address, bytes, flags, next: next.unwrap_or(0) };
        // SAFETY: in bounds; this queue's own rings.
        unsafe { (&raw mut (*self.rings).descriptors[usize::from(at) % SIZE]).write_volatile(descriptor) };
    }

    /// Makes a chain available.
    pub(super) fn give(&mut self, head: u16) {
        // SAFETY: in bounds; this queue's own rings.
        unsafe {
            (&raw mut (*self.rings).available.ring[usize::from(self.given) % SIZE]).write_volatile(head)
        };
        self.given = self.given.wrapping_add(1);
        fence(Ordering::Release);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.rings).available.index).write_volatile(self.given) };
    }

    /// Gives one buffer, descriptor 0.
    pub(super) fn give_one(&mut self, address: u64, bytes: u32, device_writes: bool) {
        self.describe(0, address, bytes, device_writes, None);
        self.give(0);
    }

    /// Tells the device of new chains, unless it does not want to be told.
    pub(super) fn notify(&mut self) {
        fence(Ordering::SeqCst);
        // SAFETY: this queue's own rings.
        if unsafe { (&raw const (*self.rings).used.flags).read_volatile() } & NO_NOTIFY == 0 {
            self.device.notify(self.index);
        }
    }

    /// Takes a completed chain, if there is one.
    pub(super) fn take(&mut self) -> Result<Option<Used>, Failure> {
        if !self.has_used() {
            return Ok(None);
        }
        // SAFETY: in bounds; this queue's own rings.
        let [head, bytes] =
            unsafe { (&raw const (*self.rings).used.ring[usize::from(self.taken) % SIZE]).read_volatile() };
        if self.taken == self.given || head >= SIZE as u32 {
            return Err(Failure::Broken("it used what it was not given"));
        }
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(Used { head: head as u16, bytes }))
    }

    pub(super) fn has_used(&self) -> bool {
        // SAFETY: this queue's own rings.
        let index = unsafe { (&raw const (*self.rings).used.index).read_volatile() };
        fence(Ordering::Acquire);
        index != self.taken
    }

    /// Waits for a completion that is due.
    pub(super) fn wait(&mut self) -> Result<Used, Failure> {
        for _ in 0..SPINS_BEFORE_HALT {
            if let Some(used) = self.take()? {
                return Ok(used);
            }
            spin_loop();
        }
        self.halt_until_used()?;
        self.take()?.ok_or(Failure::Broken("used index went back"))
    }

    /// Notifies with interrupts on and halts until an interrupt has told of the completion. False: it had to be found
    /// by looking.
    pub(super) fn notify_and_halt(&mut self) -> Result<bool, Failure> {
        let before = gate::device_interrupts();
        self.want_interrupts(true);
        self.notify();
        interrupts::arm_timer();
        while gate::device_interrupts() == before && !gate::take_timer_note(0) {
            gate::halt();
        }
        interrupts::disarm_timer();
        let told = gate::device_interrupts() != before;
        self.halt_until_used()?;
        Ok(told)
    }

    /// Halts until a completion that is due has come.
    fn halt_until_used(&mut self) -> Result<(), Failure> {
        let mut seconds = 0;
        self.want_interrupts(true);
        // Another queue of the device may have left the line up.
        self.unacknowledged = true;
        interrupts::arm_timer();
        let outcome = loop {
            self.acknowledge();
            if self.has_used() {
                break Ok(());
            }
            gate::halt();
            self.unacknowledged = true;
            if gate::take_timer_note(0) {
                seconds += 1;
                if self.device.needs_reset() {
                    break Err(Failure::Broken("it needs a reset"));
                }
                if seconds == TIMEOUT_S {
                    break Err(Failure::Timeout);
                }
                interrupts::arm_timer();
            }
        };
        interrupts::disarm_timer();
        self.want_interrupts(false);
        outcome
    }

    /// Halts until the device has something to say, however long that takes.
    pub(super) fn idle(&mut self) {
        self.want_interrupts(true);
        if self.has_used() {
            return;
        }
        self.acknowledge();
        if !self.has_used() {
            gate::halt();
            self.unacknowledged = true;
        }
    }

    /// Whether something was used; if not, what is used from now on interrupts. For halts that several queues may end.
    pub(super) fn is_due(&mut self) -> bool {
        self.want_interrupts(true);
        if self.has_used() {
            return true;
        }
        self.acknowledge();
        self.has_used()
    }

    /// After such a halt: this device may have ended it.
    pub(super) fn woken(&mut self) {
        self.unacknowledged = true;
    }

    /// Once for each halt that may have been ended by the device, and after the answer: it costs an exit.
    fn acknowledge(&mut self) {
        if core::mem::take(&mut self.unacknowledged) {
            self.device.acknowledge();
        }
    }

    /// Asks the device to interrupt, or not to bother.
    pub(super) fn want_interrupts(&self, wanted: bool) {
        let flags = if wanted { 0 } else { NO_INTERRUPT };
        // SAFETY: this queue's own rings.
        unsafe {
            let place = &raw mut (*self.rings).available.flags;
            if place.read_volatile() != flags {
                place.write_volatile(flags);
            }
        }
        fence(Ordering::SeqCst);
    }
}
