//! The function as drivers see it: through configuration space and windows, modern and legacy, and with lies.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use super::interrupts::{CONTROL_ENABLE, CONTROL_MASK_ALL, NO_VECTOR};
use super::*;
use crate::vmm::virtio::rng::Rng;
use crate::vmm::virtio::testing::{BUFFERS, MEMORY_BYTES, guest_memory};

const UP: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;
/// The legacy queue's pages: descriptors, available and used ring of 64 entries.
const LEGACY_PAGE: u64 = 0x40;

/// Keeps the messages sent.
#[derive(Default)]
struct Sent(Mutex<Vec<(u64, u32)>>);

impl Messages for Sent {
    fn send(&self, address: u64, data: u32) {
        self.0.lock().unwrap().push((address, data));
    }
}

struct Pin(Arc<AtomicBool>);

impl Level for Pin {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

/// A function with an rng device behind it, and a driver's view of it.
struct Machine {
    function: VirtioFunction,
    memory: GuestMemory,
    sent: Arc<Sent>,
    pin: Arc<AtomicBool>,
}

impl Machine {
    fn new(transitional: bool) -> Self {
        let (sent, pin) = (Arc::new(Sent::default()), Arc::new(AtomicBool::new(false)));
        let wires = Wires { messages: sent.clone(), intx: Box::new(Pin(pin.clone())) };
        let memory = guest_memory();
        let function = VirtioFunction::new(Box::new(Rng::new()), 3, transitional, wires, memory.clone());
        Machine { function: function.unwrap(), memory, sent, pin }
    }

    fn read(&self, bar: usize, offset: u64, bytes: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read(bar, offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    }

    fn write(&self, bar: usize, offset: u64, bytes: usize, value: u64) {
        self.function.write(bar, offset, &value.to_le_bytes()[..bytes]);
    }

    fn config(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, offset: usize, data: &[u8]) {
        self.function.config_write(offset, data);
    }

    /// Capabilities: offset, id, kind of virtio structure.
    fn capabilities(&self) -> Vec<(usize, u8, u8)> {
        let (mut at, mut list) = ((self.config(0x34) & 0xff) as usize, Vec::new());
        while at != 0 {
            let word = self.config(at);
            list.push((at, word as u8, (word >> 24) as u8));
            at = (word >> 8 & 0xff) as usize;
        }
        list
    }

    fn control_at(&self) -> usize {
        self.capabilities().iter().find(|(_, id, _)| *id == CAPABILITY_MSIX).unwrap().0 + 2
    }

    fn set_control(&self, control: u16) {
        self.set_config(self.control_at(), &control.to_le_bytes());
    }

    /// Does what a modern driver does, with every feature but `without`.
    fn start(&self, without: u64) {
        self.write(4, 0x14, 1, 0);
        self.write(4, 0x14, 1, 3);
        for word in 0..2u64 {
            self.write(4, 0x00, 4, word);
            let offered = self.read(4, 0x04, 4);
            self.write(4, 0x08, 4, word);
            self.write(4, 0x0c, 4, offered & !(without >> (32 * word)));
        }
        self.write(4, 0x14, 1, (UP & !VIRTIO_CONFIG_S_DRIVER_OK).into());
        self.write(4, 0x16, 2, 0);
        self.write(4, 0x18, 2, 8);
        self.write(4, 0x20, 8, 0x1000);
        self.write(4, 0x28, 4, 0x2000);
        self.write(4, 0x2c, 4, 0);
        self.write(4, 0x30, 4, 0x3000);
        self.write(4, 0x34, 4, 0);
        self.write(4, 0x1c, 2, 1);
        assert_eq!(self.read(4, 0x1c, 2), 1);
        self.write(4, 0x14, 1, UP.into());
        assert_eq!(self.read(4, 0x14, 1), u64::from(UP));
    }

    /// Puts a request of 16 bytes into a ring.
    fn request(&self, table: u64, available: u64, size: u16) {
        self.memory.write_obj(BUFFERS, GuestAddress(table)).unwrap();
        self.memory.write_obj(16u32, GuestAddress(table + 8)).unwrap();
        self.memory.write_obj(2u16, GuestAddress(table + 12)).unwrap();
        let index: u16 = self.memory.read_obj(GuestAddress(available + 2)).unwrap();
        let slot = available + 4 + 2 * u64::from(index % size);
        self.memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        self.memory.write_obj(index.wrapping_add(1), GuestAddress(available + 2)).unwrap();
    }

    /// The device thread.
    fn run(&self) {
        let kick = lock(self.function.transport()).host_interest()[0].fd;
        lock(self.function.transport()).host_event(kick, &self.memory);
    }

    /// Asks for random bytes by the modern rings.
    fn ask(&self) -> u16 {
        self.request(0x1000, 0x2000, 8);
        self.write(4, NOTIFY_OFFSET, 2, 0);
        self.run();
        self.memory.read_obj(GuestAddress(0x3002)).unwrap()
    }

    fn sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.sent.0.lock().unwrap())
    }

    fn intx(&self) -> bool {
        self.pin.load(Ordering::SeqCst)
    }
}

/// No event index: an interrupt for each request.
const WITHOUT: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

#[test]
fn a_function_says_what_it_is_and_where_its_structures_are() {
    let machine = Machine::new(false);
    assert_eq!(machine.config(0), 0x1044_1af4);
    assert_eq!(machine.config(0x10), 0, "no legacy window");
    let old = Machine::new(true);
    assert_eq!((old.config(0), old.config(8) & 0xff, old.config(0x2c)), (0x1005_1af4, 0, 0x0004_1af4));
    assert_eq!(old.config(0x10) & 3, 1);
    for machine in [machine, old] {
        let capabilities = machine.capabilities();
        let kinds: Vec<u8> = capabilities
            .iter()
            .filter(|(_, id, _)| *id == CAPABILITY_VENDOR)
            .map(|(.., kind)| *kind)
            .collect();
        assert_eq!(kinds, [COMMON, CAUSES, DEVICE, NOTIFY, ACCESS]);
        for (at, _, kind) in capabilities.iter().filter(|(_, id, kind)| *id == 9 && *kind != ACCESS) {
            assert_eq!(machine.config(at + 4) & 0xff, 4, "structure {kind} is in window 4");
            assert!(machine.config(at + 8) + machine.config(at + 12) <= MODERN_BYTES);
        }
        // Two vectors: one queue, and changes.
        assert_eq!(machine.config(machine.control_at() - 2) >> 16, 1);
    }
}

#[test]
fn a_modern_driver_works_by_intx() {
    let machine = Machine::new(false);
    machine.start(WITHOUT);
    assert_eq!(machine.ask(), 1);
    assert!(machine.intx() && machine.config(4) >> 16 & 8 != 0);
    assert_eq!(machine.read(4, CAUSES_OFFSET, 1), 1);
    assert!(!machine.intx(), "reading the status ends the interrupt");
    assert_eq!(machine.read(4, CAUSES_OFFSET, 1), 0);
    // The command register's bit holds the line back, not the cause.
    machine.set_config(4, &0x0407u16.to_le_bytes());
    machine.ask();
    assert!(!machine.intx() && machine.config(4) >> 16 & 8 != 0);
    machine.set_config(4, &0x0007u16.to_le_bytes());
    assert!(machine.intx());
    machine.write(4, 0x14, 1, 0);
    assert!(!machine.intx(), "a reset device interrupts nobody");
    assert!(machine.sent().is_empty());
}

#[test]
fn messages_follow_their_vectors_and_masks() {
    let machine = Machine::new(false);
    machine.set_control(CONTROL_ENABLE);
    for (vector, data) in [(0u64, 0x40), (1, 0x41)] {
        machine.write(1, vector * 16, 8, 0xfee0_0000);
        machine.write(1, vector * 16 + 8, 4, data);
        machine.write(1, vector * 16 + 12, 4, 0);
    }
    machine.start(WITHOUT);
    machine.write(4, 0x10, 2, 0);
    machine.write(4, 0x1a, 2, 1);
    assert_eq!((machine.read(4, 0x10, 2), machine.read(4, 0x1a, 2)), (0, 1));
    machine.write(4, 0x10, 2, 2);
    assert_eq!(machine.read(4, 0x10, 2), u64::from(NO_VECTOR), "no such vector");
    machine.ask();
    assert_eq!(machine.sent(), [(0xfee0_0000, 0x41)]);
    assert!(!machine.intx());
    // Masked: pending, once.
    machine.write(1, 16 + 12, 4, 1);
    machine.ask();
    machine.ask();
    assert!(machine.sent().is_empty());
    assert_eq!(machine.read(1, PENDING_OFFSET, 8), 2);
    machine.write(1, 16 + 12, 4, 0);
    assert_eq!(machine.sent(), [(0xfee0_0000, 0x41)]);
    assert_eq!(machine.read(1, PENDING_OFFSET, 8), 0);
    // The whole function masked.
    machine.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
    machine.ask();
    assert!(machine.sent().is_empty());
    machine.set_control(CONTROL_ENABLE);
    assert_eq!(machine.sent().len(), 1);
    // A reset forgets the vectors, not the table.
    machine.start(WITHOUT);
    assert_eq!(machine.read(4, 0x1a, 2), u64::from(NO_VECTOR));
    assert_eq!(machine.read(1, 16 + 8, 4), 0x41);
}

#[test]
fn a_legacy_driver_works_by_ports() {
    let machine = Machine::new(true);
    machine.write(0, 18, 1, 3);
    let offered = machine.read(0, 0, 4);
    machine.write(0, 4, 4, offered & !WITHOUT);
    machine.write(0, 14, 2, 0);
    assert_eq!(machine.read(0, 12, 2), 64, "the size is told, not chosen");
    machine.write(0, 8, 4, LEGACY_PAGE);
    assert_eq!(machine.read(0, 8, 4), LEGACY_PAGE);
    machine.write(0, 18, 1, 7);
    assert_eq!(machine.read(0, 18, 1), 7, "no FEATURES_OK to be seen");
    let start = LEGACY_PAGE << 12;
    machine.request(start, start + 64 * 16, 64);
    machine.write(0, 16, 2, 0);
    machine.run();
    let used = (start + 64 * 16 + 4 + 2 * 64 + 2).next_multiple_of(4096);
    assert_eq!(machine.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap(), 1);
    assert!(machine.intx());
    assert_eq!(machine.read(0, 19, 1), 1);
    assert!(!machine.intx());
    // With MSI-X on there are two more registers.
    machine.set_control(CONTROL_ENABLE);
    machine.write(0, 22, 2, 1);
    assert_eq!((machine.read(0, 22, 2), machine.read(0, 20, 2)), (1, u64::from(NO_VECTOR)));
    machine.write(0, 8, 4, 0);
    assert_eq!(machine.read(0, 8, 4), 0);
    machine.write(0, 18, 1, 0);
    assert_eq!(machine.read(0, 18, 1), 0);
}

#[test]
fn windows_are_reached_through_the_configuration_space() {
    let machine = Machine::new(false);
    let access = machine.capabilities().iter().find(|(.., kind)| *kind == ACCESS).unwrap().0;
    let select = |bar: u8, offset: u32, bytes: u32| {
        machine.set_config(access + 4, &[bar]);
        machine.set_config(access + 8, &offset.to_le_bytes());
        machine.set_config(access + 12, &bytes.to_le_bytes());
    };
    select(4, 0x12, 2);
    assert_eq!(machine.config(access + 16) & 0xffff, 1, "number of queues");
    select(4, 0x14, 1);
    machine.set_config(access + 16, &[3]);
    assert_eq!(machine.read(4, 0x14, 1), 3, "status");
    for (bar, offset, bytes) in
        [(4, MODERN_BYTES - 1, 4), (5, 0, 4), (4, 1, 2), (4, 0, 3), (255, u32::MAX, 4)]
    {
        select(bar, offset, bytes);
        machine.set_config(access + 16, &[0; 4]);
        machine.config(access + 16);
    }
    assert_eq!(machine.read(4, 0x14, 1), 3, "nothing was reached");
}

#[test]
fn a_restored_function_goes_on_where_it_was() {
    for (transitional, control) in [(false, 0), (true, CONTROL_ENABLE)] {
        let source = Machine::new(transitional);
        source.set_control(control);
        source.write(1, 16, 8, 0xfee0_1000);
        source.write(1, 24, 4, 0x55);
        source.start(WITHOUT);
        source.write(4, 0x1a, 2, 1);
        source.set_config(0x20, &0xd000_0000u32.to_le_bytes());
        source.ask();
        let (pci, transport) = (source.function.save(), lock(source.function.transport()).save().unwrap());
        let clone = Machine::new(transitional);
        let bytes: Vec<u8> =
            (0..MEMORY_BYTES).map(|at| source.memory.read_obj(GuestAddress(at)).unwrap()).collect();
        clone.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        clone.function.restore(&pci, &transport).unwrap();
        assert_eq!(clone.function.save(), pci);
        assert_eq!(lock(clone.function.transport()).save().unwrap(), transport);
        assert_eq!(clone.function.window(4).unwrap().start, 0xd000_0000);
        assert!(!clone.intx() && clone.sent().is_empty(), "not before it runs");
        lock(clone.function.transport()).kick_after_restore();
        assert_eq!(clone.intx(), control == 0, "the interrupt that nobody acknowledged");
        clone.write(1, 28, 4, 0);
        assert_eq!(clone.sent().len(), usize::from(control != 0), "the message that was masked");
        assert_eq!(clone.ask(), 2);
    }
}

#[test]
fn a_saved_legacy_driver_comes_back_and_a_lie_about_it_does_not() {
    let source = Machine::new(true);
    source.write(0, 8, 4, LEGACY_PAGE);
    source.write(0, 18, 1, 7);
    let (mut pci, transport) = (source.function.save(), lock(source.function.transport()).save().unwrap());
    assert!(pci.legacy);
    Machine::new(true).function.restore(&pci, &transport).unwrap();
    pci.legacy = false;
    assert!(Machine::new(true).function.restore(&pci, &transport).is_err(), "features without VERSION_1");
    pci.legacy = true;
    assert!(Machine::new(false).function.restore(&pci, &transport).is_err(), "another function");
}

proptest! {
    #[test]
    fn any_register_access_is_safe(
        transitional: bool,
        accesses in prop::collection::vec((0usize..8, any::<u16>(), any::<bool>(), 1usize..9, any::<u64>()), 0..120),
    ) {
        let machine = Machine::new(transitional);
        for (target, at, write, bytes, value) in accesses {
            let mut data = value.to_le_bytes();
            let data = &mut data[..bytes];
            match target {
                6 | 7 if write => drop(machine.function.config_write((at & 0xff).into(), data)),
                6 | 7 => machine.function.config_read(at.into(), data),
                bar => {
                    let room = [0x80u64, 0x1000, 0, 0, 0x4000, 0][bar];
                    if room != 0 {
                        let offset = u64::from(at) % (room - bytes as u64);
                        // Mostly the first bytes, where the registers are.
                        let offset = if value & 1 == 0 { offset % 0x40 } else { offset };
                        match write {
                            true => machine.function.write(bar, offset, data),
                            false => machine.function.read(bar, offset, data),
                        }
                    }
                }
            }
            machine.run();
        }
        let (pci, transport) = (machine.function.save(), lock(machine.function.transport()).save().unwrap());
        let clone = Machine::new(transitional);
        clone.memory.write_slice(&[0xff; 0x1000], GuestAddress(0x1000)).unwrap();
        prop_assert!(clone.function.restore(&pci, &transport).is_ok());
        prop_assert_eq!(clone.function.save(), pci);
    }

    #[test]
    fn any_saved_state_is_refused_or_safe(
        config_at in 0usize..256,
        byte: u8,
        config_vector: u16,
        queue_vectors in prop::collection::vec(any::<u16>(), 0..3),
        entries in prop::collection::vec(any::<(u64, u32, u32)>(), 0..4),
        pending: u64,
        legacy: bool,
    ) {
        use crate::snapshot::state::pc::VectorState;
        let source = Machine::new(true);
        source.start(WITHOUT);
        let transport = lock(source.function.transport()).save().unwrap();
        let mut pci = source.function.save();
        pci.config[config_at] = byte;
        pci.legacy = legacy;
        pci.config_vector = config_vector;
        if !queue_vectors.is_empty() {
            pci.queue_vectors = queue_vectors;
        }
        if !entries.is_empty() {
            pci.vectors = entries.iter().map(|&(address, data, control)| VectorState { address, data, control }).collect();
        }
        pci.pending = pending >> 60;
        let clone = Machine::new(true);
        if clone.function.restore(&pci, &transport).is_ok() {
            lock(clone.function.transport()).kick_after_restore();
            clone.ask();
            clone.set_control(CONTROL_ENABLE);
            clone.ask();
        }
    }
}
