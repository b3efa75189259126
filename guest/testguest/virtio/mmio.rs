//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2.2 and 4.2.3).

use super::Failure;
use super::queue::{Queue, Rings};
use crate::interrupts;
use crate::memory::{read_mmio, write_mmio};

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 0x40;
const VERSION_1: u64 = 1 << 32;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    base: u64,
    id: u32,
}

impl Device {
    /// `None`: an empty slot.
    pub(super) fn open(base: u64, line: u32) -> Result<Option<Device>, Failure> {
        if read_mmio(base + MAGIC) != MAGIC_VALUE {
            return Err(Failure::Setup("no virtio-mmio here"));
        }
        if read_mmio(base + VERSION) != 2 {
            return Err(Failure::Setup("not version 2"));
        }
        let id = read_mmio(base + DEVICE_ID);
        if id == 0 {
            return Ok(None);
        }
        if !interrupts::route_line(line) {
            return Err(Failure::Setup("no such interrupt line"));
        }
        Ok(Some(Device { base, id }))
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Resets the device, agrees on VERSION_1 and those of `wanted` that it offers, lets `queues` set the queues up, and goes.
    pub(super) fn start<T>(
        self,
        wanted: u64,
        queues: impl FnOnce(Device) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.set_status(0);
        if self.status() != 0 {
            return Err(Failure::Setup("no reset"));
        }
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = self.features();
        if offered & VERSION_1 == 0 {
            return Err(Failure::Setup("no VERSION_1"));
        }
        let taken = offered & (wanted | VERSION_1);
        for half in [0, 1] {
            write_mmio(self.base + DRIVER_FEATURES_SELECT, half);
            write_mmio(self.base + DRIVER_FEATURES, (taken >> (32 * half)) as u32);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            return Err(Failure::Setup("no FEATURES_OK"));
        }
        let made = queues(self)?;
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(made)
    }

    /// Sets a queue up on these rings.
    pub(super) fn queue(self, index: u32, rings: &'static mut Rings) -> Result<Queue, Failure> {
        write_mmio(self.base + QUEUE_SELECT, index);
        if read_mmio(self.base + QUEUE_READY) != 0 {
            return Err(Failure::Setup("queue is ready before it is set up"));
        }
        if read_mmio(self.base + QUEUE_SIZE_MAX) < u32::from(Rings::SIZE) {
            return Err(Failure::Setup("queue too small"));
        }
        write_mmio(self.base + QUEUE_SIZE, Rings::SIZE.into());
        let [descriptors, driver, device] = rings.addresses();
        for (register, address) in
            [(QUEUE_DESCRIPTORS, descriptors), (QUEUE_DRIVER, driver), (QUEUE_DEVICE, device)]
        {
            write_mmio(self.base + register, address as u32);
            write_mmio(self.base + register + 4, (address >> 32) as u32);
        }
        write_mmio(self.base + QUEUE_READY, 1);
        if read_mmio(self.base + QUEUE_READY) != 1 {
            return Err(Failure::Setup("queue does not get ready"));
        }
        Ok(Queue::new(self, index, rings))
    }

    pub(super) fn features(&self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            write_mmio(self.base + DEVICE_FEATURES_SELECT, half);
            u64::from(read_mmio(self.base + DEVICE_FEATURES))
        });
        high << 32 | low
    }

    pub(super) fn config32(&self, offset: u64) -> u32 {
        read_mmio(self.base + CONFIG + offset)
    }

    pub(super) fn notify(&self, queue: u32) {
        write_mmio(self.base + QUEUE_NOTIFY, queue);
    }

    /// Takes the device's interrupt back; a line that stays up gives no more edges.
    pub(super) fn acknowledge(&self) {
        write_mmio(self.base + INTERRUPT_ACK, 3);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    fn status(&self) -> u32 {
        read_mmio(self.base + STATUS)
    }

    fn set_status(&self, status: u32) {
        write_mmio(self.base + STATUS, status);
    }
}
