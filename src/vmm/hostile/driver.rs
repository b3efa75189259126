//! A driver that keeps to the rules, for all three fronts: it goes through the bus, and rings lie in guest memory.

use std::io::{Read, Write};

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::{Front, MAC, Machine, NAMES};
use crate::vmm::bus::lock;
use crate::vmm::chipset::PortEffect;
use crate::vmm::chipset::pci::{ECAM_START, MEMORY_START};
use crate::vmm::memory::{VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START};

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Rings lie from here on, and buffers.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x4000;
pub const BUFFERS: u64 = 0x10_0000;

/// Where a function's windows lie as the machine placed them.
pub fn modern_window(device: usize) -> u64 {
    MEMORY_START + (device as u64 + 1) * 0x8000
}

pub fn legacy_window(device: usize) -> u16 {
    0xc000 + (device as u16 + 1) * 0x80
}

pub fn config_space(device: usize) -> u64 {
    ECAM_START + ((device as u64 + 1) << 15)
}

pub fn mmio_window(device: usize) -> u64 {
    VIRTIO_MMIO_START + device as u64 * VIRTIO_MMIO_BYTES
}

/// Where a queue lies: in the legacy layout, which is as good as any for the others.
#[derive(Debug, Clone, Copy)]
pub struct Ring {
    pub start: u64,
    pub size: u16,
    /// How far the driver has read the used ring.
    pub seen: u16,
}

impl Ring {
    pub fn available(&self) -> u64 {
        self.start + 16 * u64::from(self.size)
    }

    pub fn used(&self) -> u64 {
        (self.available() + 6 + 2 * u64::from(self.size)).next_multiple_of(0x1000)
    }
}

pub struct Driver<'m> {
    pub machine: &'m Machine,
    /// Index in [`NAMES`].
    pub device: usize,
    pub rings: Vec<Ring>,
}

impl<'m> Driver<'m> {
    pub fn new(machine: &'m Machine, device: usize) -> Self {
        // One that was never started knows where the rings would be, too.
        let queues = [1, 2, 1, 3][device];
        let rings = (0..queues).map(|queue| Ring { start: ring_start(queue), size: 8, seen: 0 }).collect();
        Self { machine, device, rings }
    }

    fn set(&self, address: u64, bytes: usize, value: u64) {
        self.machine.bus.mmio_write(address, &value.to_le_bytes()[..bytes]).unwrap();
    }

    fn get(&self, address: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.machine.bus.mmio_read(address, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    fn out(&self, port: u16, bytes: usize, value: u32) {
        let effect = self.machine.bus.port_write(port, &value.to_le_bytes()[..bytes]);
        assert_eq!(effect, PortEffect::None);
    }

    fn input(&self, port: u16, bytes: usize) -> u32 {
        let mut data = [0; 4];
        self.machine.bus.port_read(port, &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    fn register(&self, register: u32) -> u64 {
        mmio_window(self.device) + u64::from(register)
    }

    fn common(&self, offset: u64) -> u64 {
        modern_window(self.device) + offset
    }

    fn port(&self, offset: u16) -> u16 {
        legacy_window(self.device) + offset
    }

    /// What firmware does: all windows of all functions where they belong, no message-signalled interrupts.
    pub fn firmware(&self) {
        if self.machine.front == Front::Mmio {
            return;
        }
        for device in 0..NAMES.len() {
            let space = config_space(device);
            self.set(space + 0x10, 4, legacy_window(device).into());
            self.set(space + 0x14, 4, modern_window(device) + 0x4000);
            self.set(space + 0x20, 4, modern_window(device));
            self.set(space + 0x04, 2, 3);
            // The first capability is MSI-X's.
            assert_eq!(self.get(space + 0x40, 1), 0x11);
            self.set(space + 0x42, 2, 0);
        }
    }

    /// The device stopped. Looked at from behind: a hostile driver may have moved the register away.
    pub fn broken(&self) -> bool {
        let saved = lock(&self.machine.bus.virtio[self.device]).save().unwrap();
        saved.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    pub fn set_status(&self, status: u32) {
        match self.machine.front {
            Front::Mmio => self.set(self.register(VIRTIO_MMIO_STATUS), 4, status.into()),
            Front::Modern => self.set(self.common(0x14), 1, status.into()),
            Front::Legacy => self.out(self.port(18), 1, status),
        }
    }

    /// Takes all features but `without`.
    fn negotiate(&self, without: u64) {
        for word in 0..2u64 {
            let without = without >> (32 * word);
            match self.machine.front {
                Front::Mmio => {
                    self.set(self.register(VIRTIO_MMIO_DEVICE_FEATURES_SEL), 4, word);
                    let offered = self.get(self.register(VIRTIO_MMIO_DEVICE_FEATURES), 4);
                    self.set(self.register(VIRTIO_MMIO_DRIVER_FEATURES_SEL), 4, word);
                    self.set(self.register(VIRTIO_MMIO_DRIVER_FEATURES), 4, offered & !without);
                }
                Front::Modern => {
                    self.set(self.common(0x00), 4, word);
                    let offered = self.get(self.common(0x04), 4);
                    self.set(self.common(0x08), 4, word);
                    self.set(self.common(0x0c), 4, offered & !without);
                }
                Front::Legacy if word == 0 => {
                    let offered = self.input(self.port(0), 4);
                    self.out(self.port(4), 4, offered & !(without as u32));
                }
                Front::Legacy => {}
            }
        }
    }

    /// Sets a queue up, `size` entries at most where the driver may choose.
    fn add_queue(&mut self, queue: u16, size: u16) {
        let start = ring_start(queue);
        let number = u64::from(queue);
        let ring = |size| Ring { start, size, seen: 0 };
        let ring = match self.machine.front {
            Front::Mmio => {
                self.set(self.register(VIRTIO_MMIO_QUEUE_SEL), 4, number);
                let max = self.get(self.register(VIRTIO_MMIO_QUEUE_NUM_MAX), 4) as u16;
                ring(size.min(max))
            }
            Front::Modern => {
                self.set(self.common(0x16), 2, number);
                ring(size.min(self.get(self.common(0x18), 2) as u16))
            }
            Front::Legacy => {
                self.out(self.port(14), 2, queue.into());
                ring(self.input(self.port(12), 2) as u16)
            }
        };
        self.machine.scribble(start, &[0; RING_BYTES as usize]);
        match self.machine.front {
            Front::Mmio => {
                self.set(self.register(VIRTIO_MMIO_QUEUE_NUM), 4, ring.size.into());
                for (register, address) in [
                    (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.start),
                    (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available()),
                    (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used()),
                ] {
                    self.set(self.register(register), 4, address);
                    self.set(self.register(register + 4), 4, 0);
                }
                self.set(self.register(VIRTIO_MMIO_QUEUE_READY), 4, 1);
            }
            Front::Modern => {
                self.set(self.common(0x18), 2, ring.size.into());
                for (offset, address) in [(0x20, ring.start), (0x28, ring.available()), (0x30, ring.used())] {
                    self.set(self.common(offset), 8, address);
                }
                self.set(self.common(0x1c), 2, 1);
            }
            Front::Legacy => self.out(self.port(8), 4, (ring.start / 0x1000) as u32),
        }
        self.rings[usize::from(queue)] = ring;
    }

    /// From reset to DRIVER_OK.
    pub fn start(&mut self, size: u16, without: u64) {
        let status = self.prepare(size, without);
        self.set_status(status | VIRTIO_CONFIG_S_DRIVER_OK);
        self.machine.run();
    }

    /// From reset to queues that are ready; returns the status.
    pub fn prepare(&mut self, size: u16, without: u64) -> u32 {
        self.firmware();
        self.set_status(0);
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        self.set_status(status);
        self.negotiate(without);
        if self.machine.front != Front::Legacy {
            status |= VIRTIO_CONFIG_S_FEATURES_OK;
            self.set_status(status);
        }
        for queue in 0..self.rings.len() as u16 {
            self.add_queue(queue, size);
        }
        status
    }

    /// Enables a queue, or takes it away, as far as the front can.
    pub fn enable(&self, queue: u16, enabled: bool) {
        let ring = self.rings[usize::from(queue)];
        match (self.machine.front, enabled) {
            (Front::Mmio, _) => {
                self.set(self.register(VIRTIO_MMIO_QUEUE_SEL), 4, queue.into());
                self.set(self.register(VIRTIO_MMIO_QUEUE_READY), 4, enabled.into());
            }
            (Front::Modern, _) => {
                self.set(self.common(0x16), 2, queue.into());
                self.set(self.common(0x1c), 2, enabled.into());
            }
            (Front::Legacy, _) => {
                self.out(self.port(14), 2, queue.into());
                self.out(self.port(8), 4, if enabled { (ring.start / 0x1000) as u32 } else { 0 });
            }
        }
    }

    /// Notifies a queue, and nothing more.
    pub fn ring(&self, queue: u16) {
        match self.machine.front {
            Front::Mmio => self.set(self.register(VIRTIO_MMIO_QUEUE_NOTIFY), 4, queue.into()),
            Front::Modern => self.set(self.common(0x3000 + 4 * u64::from(queue)), 2, queue.into()),
            Front::Legacy => self.out(self.port(16), 2, queue.into()),
        }
    }

    /// Notifies a queue and waits until the device has done what it can.
    pub fn notify(&self, queue: u16) {
        self.ring(queue);
        self.machine.run();
    }

    pub fn put_descriptor(&self, table: u64, at: u16, (address, bytes, flags, next): (u64, u32, u16, u16)) {
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(bytes.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.machine.scribble(table.wrapping_add(16 * u64::from(at)), &raw);
    }

    fn word(&self, address: u64) -> u16 {
        let raw = self.machine.peek(address, 2);
        u16::from_le_bytes([raw[0], raw[1]])
    }

    pub fn available_index(&self, queue: u16) -> u16 {
        self.word(self.rings[usize::from(queue)].available() + 2)
    }

    pub fn set_available_index(&self, queue: u16, index: u16) {
        self.machine.scribble(self.rings[usize::from(queue)].available() + 2, &index.to_le_bytes());
    }

    pub fn offer(&self, queue: u16, head: u16) {
        let ring = self.rings[usize::from(queue)];
        let index = self.available_index(queue);
        self.machine.scribble(ring.available() + 4 + 2 * u64::from(index % ring.size), &head.to_le_bytes());
        self.set_available_index(queue, index.wrapping_add(1));
    }

    /// Writes a chain of (address, length, writable) from descriptor `at` on and makes it available.
    pub fn add(&self, queue: u16, at: u16, buffers: &[(u64, u32, bool)]) {
        let ring = self.rings[usize::from(queue)];
        for (index, (address, bytes, writable)) in (at..).zip(buffers) {
            let next = if usize::from(index - at) + 1 < buffers.len() { NEXT } else { 0 };
            let flags = next | if *writable { WRITE } else { 0 };
            self.put_descriptor(ring.start, index, (*address, *bytes, flags, index.wrapping_add(1)));
        }
        self.offer(queue, at);
    }

    /// Next entry of the used ring: head and length.
    pub fn take_used(&mut self, queue: u16) -> Option<(u32, u32)> {
        let ring = self.rings[usize::from(queue)];
        if ring.seen == self.word(ring.used() + 2) {
            return None;
        }
        let raw = self.machine.peek(ring.used() + 4 + 8 * u64::from(ring.seen % ring.size), 8);
        self.rings[usize::from(queue)].seen = ring.seen.wrapping_add(1);
        let number = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        Some((number(0), number(4)))
    }

    /// Starts the device, has it do what it is for, and looks at the result.
    pub fn check_it_works(&mut self) {
        self.start(16, 0);
        assert!(!self.broken(), "{} is broken after a reset", NAMES[self.device]);
        match NAMES[self.device] {
            "block" => self.check_block(),
            "console" => self.check_console(),
            "rng" => self.check_rng(),
            _ => self.check_net(),
        }
        assert!(!self.broken(), "an honest driver broke {}", NAMES[self.device]);
    }

    fn check_block(&mut self) {
        let sector: Vec<u8> = (0..512u32).map(|at| (at * 7) as u8).collect();
        let (header, data, status) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x2000);
        for kind in [1u32, 0] {
            self.machine.scribble(header, &[kind.to_le_bytes(), [0; 4], 5u32.to_le_bytes(), [0; 4]].concat());
            self.machine.scribble(data, &if kind == 1 { sector.clone() } else { vec![0; 512] });
            self.machine.scribble(status, &[0xee]);
            self.add(0, 0, &[(header, 16, false), (data, 512, kind == 0), (status, 1, true)]);
            self.notify(0);
            assert_eq!(self.take_used(0), Some((0, if kind == 1 { 1 } else { 513 })));
            assert_eq!(self.machine.peek(status, 1), [0]);
        }
        assert_eq!(self.machine.peek(data, 512), sector);
    }

    fn check_rng(&mut self) {
        self.machine.scribble(BUFFERS, &[0; 64]);
        self.add(0, 0, &[(BUFFERS, 64, true)]);
        self.notify(0);
        assert_eq!(self.take_used(0), Some((0, 64)));
        assert_ne!(self.machine.peek(BUFFERS, 64), [0; 64]);
    }

    fn check_console(&mut self) {
        const WORDS: &[u8] = b"<an honest driver's words>";
        self.machine.drain();
        self.machine.run();
        self.machine.drain();
        self.machine.scribble(BUFFERS, WORDS);
        self.add(1, 0, &[(BUFFERS, WORDS.len() as u32, false)]);
        self.notify(1);
        assert_eq!(self.take_used(1), Some((0, 0)));
        let mut sent = [0; 256];
        let count = (&self.machine.agent).read(&mut sent).unwrap();
        assert_eq!(&sent[..count], WORDS);
        self.take_all(0);
        (&self.machine.agent).write_all(WORDS).unwrap();
        self.machine.run();
        let (head, bytes) = self.take_used(0).expect("what was typed");
        assert_eq!((head, self.machine.peek(BUFFERS, bytes as usize)), (0, WORDS.to_vec()));
    }

    /// Offers a buffer until what came before is all taken; the last one stays offered.
    fn take_all(&mut self, queue: u16) {
        self.add(queue, 0, &[(BUFFERS, 70_000, true)]);
        self.notify(queue);
        while self.take_used(queue).is_some() {
            self.offer(queue, 0);
            self.notify(queue);
        }
    }

    fn check_net(&mut self) {
        let frame = [vec![0; 12], MAC.to_vec(), vec![7; 60]].concat();
        self.machine.drain();
        self.machine.scribble(BUFFERS, &frame);
        self.add(1, 0, &[(BUFFERS, frame.len() as u32, false)]);
        self.notify(1);
        assert_eq!(self.take_used(1), Some((0, 0)));
        let mut sent = vec![0; 256];
        let count = self.machine.wire.recv(&mut sent).unwrap();
        assert_eq!(sent[..count], frame);
        self.take_all(0);
        self.machine.wire.send(&frame).unwrap();
        self.machine.run();
        assert_eq!(self.take_used(0), Some((0, frame.len() as u32)));
        assert_eq!(self.machine.peek(BUFFERS + 12, 66), frame[12..]);
    }
}

fn ring_start(queue: u16) -> u64 {
    RINGS + u64::from(queue) * RING_BYTES
}
