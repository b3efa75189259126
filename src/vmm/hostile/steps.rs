//! What a hostile driver does with one device, and what its other end does meanwhile.

use std::io::Write;

use proptest::collection::vec;
use proptest::prelude::*;

use super::driver::{BUFFERS, Driver, NEXT, WRITE, config_space, legacy_window, mmio_window, modern_window};
use super::{Front, HIGH_START, LOW_BYTES, NAMES};
use crate::vmm::chipset::PortEffect;
use crate::vmm::virtio::testing::INDIRECT;

/// Where tables of indirect descriptors are put.
const TABLES: u64 = 0x8_0000;
/// Pages of buffers that steps like to meet in.
const PAGES: u64 = 8;

/// A place of the device's registers.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    /// Its everyday registers, by memory.
    Register(u16),
    /// By ports, where the front has them.
    Port(u16),
    /// Its vector table.
    Vectors(u16),
    /// Its PCI configuration.
    Config(u16),
}

pub type Descriptor = (u64, u32, u16, u16);

#[derive(Debug, Clone)]
pub enum Step {
    Read(Place, usize),
    Write(Place, Vec<u8>),
    /// A descriptor of a queue's table, whatever it says.
    Describe(u16, u16, Descriptor),
    /// A table of indirect descriptors.
    Table(u64, Vec<Descriptor>),
    /// A chain as the rules have it, with any buffers, made available.
    Chain(u16, u16, Vec<(u64, u32, bool)>),
    /// A head made available so many times.
    Offer(u16, u16, u16),
    /// The available index jumps.
    Jump(u16, u16),
    Notify(u16),
    /// Notified, and the driver goes on while the device is at it.
    Begin(u16),
    Enable(u16, bool),
    Status(u8),
    Scribble(u64, Vec<u8>),
    /// The header of a disk request.
    Request(u64, u32, u64),
    /// An honest start, with all features but these.
    Start(u16, u64),
    /// The other end sends.
    Feed(Vec<u8>),
    /// The other end takes what was sent.
    Drain,
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        6 => any::<u16>().prop_map(Place::Register),
        3 => any::<u16>().prop_map(Place::Port),
        1 => any::<u16>().prop_map(Place::Vectors),
        2 => any::<u16>().prop_map(Place::Config),
    ]
}

/// One to eight bytes: numbers of registers, bits, addresses, anything.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        4 => 0u64..16,
        2 => (0u32..64).prop_map(|bit| 1 << bit),
        3 => (0u64..0x80).prop_map(|page| page << 12),
        2 => any::<u64>(),
    ];
    let bytes = prop_oneof![4 => Just(4usize), 2 => Just(1), 2 => Just(2), 2 => Just(8), 1 => 1usize..9];
    (number, bytes).prop_map(|(number, bytes)| number.to_le_bytes()[..bytes].to_vec())
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        10 => (0..PAGES).prop_map(|page| BUFFERS + (page << 12)),
        3 => 0..LOW_BYTES,
        2 => 0u64..0x2_0000,
        2 => HIGH_START..HIGH_START + 0x1000,
        // Over the borders: of the regions, of the address space.
        2 => (1u64..20).prop_map(|before| LOW_BYTES - before),
        1 => (1u64..20).prop_map(|before| HIGH_START - before),
        1 => (1u64..20).prop_map(|before| u64::MAX - before),
        1 => any::<u64>(),
    ]
}

fn bytes() -> impl Strategy<Value = u32> {
    prop_oneof![2 => Just(1u32), 3 => Just(512), 3 => 0u32..64, 3 => 0u32..0x3000, 1 => 0u32..0x20_0000, 1 => any::<u32>()]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![2 => Just(0), 2 => Just(WRITE), 4 => Just(NEXT), 4 => Just(NEXT | WRITE), 1 => any::<u16>()];
    let plain = (address(), bytes(), flags, prop_oneof![8 => 0u16..16, 1 => any::<u16>()]);
    let entries = prop_oneof![6 => 0u32..12, 1 => Just(0xffff), 1 => Just(0x1_0000)];
    let odd = prop_oneof![8 => Just(0u32), 1 => 1u32..16];
    let more = prop_oneof![6 => Just(0), 1 => Just(NEXT), 1 => Just(WRITE)];
    let table = prop_oneof![8 => (0u64..4).prop_map(|page| TABLES + (page << 12)), 1 => address()];
    let indirect = (table, entries, odd, more)
        .prop_map(|(table, entries, odd, more)| (table, entries.wrapping_mul(16) | odd, INDIRECT | more, 0));
    prop_oneof![3 => plain, 1 => indirect]
}

pub fn step() -> impl Strategy<Value = Step> {
    let queue = || prop_oneof![8 => 0u16..3, 1 => any::<u16>()];
    let head = || prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    // Types of disk requests, and the first bytes of network commands.
    let kind = prop_oneof![6 => 0u32..16, 1 => any::<u32>()];
    let sector = prop_oneof![6 => 0u64..2048, 1 => 2040u64..2056, 1 => any::<u64>()];
    prop_oneof![
        4 => (place(), 1usize..9).prop_map(|(place, bytes)| Step::Read(place, bytes)),
        10 => (place(), value()).prop_map(|(place, value)| Step::Write(place, value)),
        8 => (queue(), head(), descriptor()).prop_map(|(queue, at, descriptor)| Step::Describe(queue, at, descriptor)),
        3 => (0u64..4, vec(descriptor(), 1..12))
            .prop_map(|(page, descriptors)| Step::Table(TABLES + (page << 12), descriptors)),
        8 => (queue(), 0u16..16, vec((address(), bytes(), any::<bool>()), 1..6), any::<bool>())
            .prop_map(|(queue, at, mut buffers, sorted)| {
                if sorted {
                    buffers.sort_by_key(|(_, _, writable)| *writable);
                }
                Step::Chain(queue, at, buffers)
            }),
        6 => (queue(), head(), prop_oneof![6 => 1u16..4, 1 => 1u16..300])
            .prop_map(|(queue, head, times)| Step::Offer(queue, head, times)),
        1 => (queue(), any::<u16>()).prop_map(|(queue, by)| Step::Jump(queue, by)),
        8 => queue().prop_map(Step::Notify),
        6 => queue().prop_map(Step::Begin),
        3 => (queue(), any::<bool>()).prop_map(|(queue, enabled)| Step::Enable(queue, enabled)),
        2 => prop_oneof![1 => Just(0), 2 => any::<u8>()].prop_map(Step::Status),
        2 => (0u64..0x3_0000, vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Step::Scribble(at, bytes)),
        6 => ((0..PAGES).prop_map(|page| BUFFERS + (page << 12)), kind, sector)
            .prop_map(|(at, kind, sector)| Step::Request(at, kind, sector)),
        2 => (prop_oneof![Just(8u16), Just(1), Just(256)],
                prop_oneof![2 => Just(0u64), 2 => Just(1 << 29), 1 => Just(1 << 28), 1 => any::<u64>().prop_map(|bits| bits & !(1 << 32))])
            .prop_map(|(size, without)| Step::Start(size, without)),
        4 => vec(any::<u8>(), 0..2000).prop_map(Step::Feed),
        2 => Just(Step::Drain),
    ]
}

#[cfg(test)]
pub fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    vec(step(), 1..most)
}

/// An access of the bus, as exits bring it: memory in any width, ports in one, two or four bytes.
fn access(driver: &Driver<'_>, place: Place, data: &mut [u8], write: bool) {
    let bus = &driver.machine.bus;
    let device = driver.device;
    let port = |at: u16| legacy_window(device) + at % 0x80;
    let (front, address) = (driver.machine.front, |at: u16| match at % 4 {
        // The configuration, interrupt status and notifications of a function.
        0 => modern_window(device) + 0x1000 * u64::from(at >> 4 & 3) + u64::from(at >> 6) % 0x10,
        _ => modern_window(device) + u64::from(at >> 2) % 0x40,
    });
    let at = match (front, place) {
        (Front::Mmio, Place::Register(at)) => mmio_window(device) + u64::from(at) % 0x140,
        (Front::Mmio, Place::Port(at) | Place::Vectors(at) | Place::Config(at)) => {
            // Registers of four bytes, aligned: most of what is anything.
            mmio_window(device) + u64::from(at % 0x44) * 4
        }
        (_, Place::Register(at)) => address(at),
        (_, Place::Vectors(at)) => {
            modern_window(device) + 0x4000 + u64::from(at) % 0x60 + (u64::from(at) & 0x800)
        }
        (_, Place::Config(at)) => config_space(device) + u64::from(at) % 0x108,
        (_, Place::Port(at)) => {
            let bytes = match data.len() {
                0 | 1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
            let data = &mut data[..bytes];
            match write {
                true => assert_eq!(bus.port_write(port(at), data), PortEffect::None),
                false => bus.port_read(port(at), data),
            }
            return;
        }
    };
    match write {
        true => bus.mmio_write(at, data).unwrap(),
        false => bus.mmio_read(at, data),
    }
}

impl Driver<'_> {
    pub fn carry_out(&mut self, step: &Step) {
        let machine = self.machine;
        // A queue that the device does not have is written about nowhere.
        let known = |queue: &u16| usize::from(*queue) < self.rings.len();
        match step {
            Step::Read(place, bytes) => access(self, *place, &mut vec![0; *bytes], false),
            Step::Write(place, bytes) => access(self, *place, &mut bytes.clone(), true),
            Step::Describe(queue, at, descriptor) if known(queue) => {
                self.put_descriptor(self.rings[usize::from(*queue)].start, *at, *descriptor);
            }
            Step::Table(address, descriptors) => {
                for (at, descriptor) in (0..).zip(descriptors) {
                    self.put_descriptor(*address, at, *descriptor);
                }
            }
            Step::Chain(queue, at, buffers) if known(queue) => self.add(*queue, *at, buffers),
            Step::Offer(queue, head, times) if known(queue) => {
                for _ in 0..*times {
                    self.offer(*queue, *head);
                }
            }
            Step::Jump(queue, by) if known(queue) => {
                self.set_available_index(*queue, self.available_index(*queue).wrapping_add(*by));
            }
            Step::Begin(queue) if known(queue) => {
                self.ring(*queue);
                machine.round();
            }
            Step::Enable(queue, enabled) if known(queue) => self.enable(*queue, *enabled),
            Step::Status(status) => self.set_status((*status).into()),
            Step::Describe(..)
            | Step::Chain(..)
            | Step::Offer(..)
            | Step::Jump(..)
            | Step::Begin(_)
            | Step::Enable(..) => {}
            Step::Notify(queue) if known(queue) => self.notify(*queue),
            Step::Notify(queue) => access(self, Place::Register(0x50), &mut queue.to_le_bytes(), true),
            Step::Scribble(address, bytes) => machine.scribble(*address, bytes),
            Step::Request(address, kind, sector) => {
                machine.scribble(*address, &[kind.to_le_bytes(), [0; 4]].concat());
                machine.scribble(*address + 8, &sector.to_le_bytes());
            }
            Step::Start(size, without) => self.start(*size, *without),
            Step::Feed(bytes) => {
                // What has no room is lost.
                let _ = match NAMES[self.device] {
                    "console" => (&machine.agent).write(bytes),
                    "net" => machine.wire.send(&[&[0; 12], bytes.as_slice()].concat()),
                    _ => Ok(0),
                };
            }
            Step::Drain => machine.drain(),
        }
        // Not after each step: what is under way then meets what is done in between.
        if matches!(step, Step::Notify(_) | Step::Feed(_) | Step::Drain) {
            machine.run();
        }
    }
}
