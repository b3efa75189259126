//! The registers, the life of a device behind them, and saved states that lie.

#![allow(unsafe_code)]

use proptest::prelude::*;
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _};

use super::*;
use crate::snapshot::state::virtio::TransportState;
use crate::vmm::virtio::rng::Rng;
use crate::vmm::virtio::testing::{BUFFERS, MEMORY_BYTES, Machine, guest_memory};
use crate::vmm::virtio::transport::RestoreError;

const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const UP: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;

fn new() -> Machine {
    Machine::new(Box::new(Rng::new()))
}

fn started(without: u64) -> Machine {
    Machine::started(Box::new(Rng::new()), 8, without)
}

/// Asks for random bytes and notifies; true if they came.
fn ask(machine: &mut Machine) -> bool {
    machine.add(0, 0, &[(BUFFERS, 64, true)]);
    machine.notify(0);
    machine.take_used(0) == Some((0, 64))
}

#[test]
fn the_registers_tell_what_is_there() {
    let mut machine = new();
    assert_eq!(machine.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(machine.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(machine.get(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
    machine.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "no such queue");
    machine.set(VIRTIO_MMIO_QUEUE_SEL, u32::MAX);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(machine.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_ne!(machine.offered() & 1 << VIRTIO_F_VERSION_1, 0);
    machine.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(machine.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);
}

#[test]
fn every_width_reads_the_same_bytes() {
    let mut machine = new();
    let mut all = [0; 16];
    machine.transport.read(0, &mut all);
    assert_eq!(&all[..8], b"virt\x02\0\0\0");
    for offset in 0..16 {
        for width in [1usize, 2, 4, 8] {
            let mut data = [0xee; 8];
            machine.transport.read(offset, &mut data[..width]);
            for (index, byte) in data[..width].iter().enumerate() {
                let expected = all.get(offset as usize + index).copied().unwrap_or(*byte);
                assert_eq!(*byte, expected, "offset {offset} width {width}");
            }
        }
    }
    // Writes of another width, or not aligned, change nothing.
    machine.transport.write(VIRTIO_MMIO_STATUS.into(), &[1], &machine.memory);
    machine.transport.write(VIRTIO_MMIO_STATUS.into(), &[1, 0, 0, 0, 0, 0, 0, 0], &machine.memory);
    machine.transport.write(u64::from(VIRTIO_MMIO_STATUS) + 1, &[1, 0, 0, 0], &machine.memory);
    machine.transport.write(u64::MAX, &[1, 0, 0, 0], &machine.memory);
    assert_eq!(machine.status(), 0);
}

#[test]
fn a_driver_comes_up_works_and_resets() {
    let mut machine = started(0);
    assert_eq!(machine.status(), UP);
    assert!(ask(&mut machine));
    assert_eq!(machine.edges.take(), 1);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    machine.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_ne!(machine.read_bytes(BUFFERS, 64), [0; 64]);
    machine.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(machine.status(), 0);
    machine.set(VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
    machine.add(0, 0, &[(BUFFERS, 64, true)]);
    machine.notify(0);
    assert_eq!(machine.edges.take(), 0, "a device in reset does nothing");
    machine.start(8, 0);
    assert!(ask(&mut machine));
}

#[test]
fn what_is_notified_before_driver_ok_is_answered_on_the_device_thread() {
    // FreeBSD's vtblk polls for the disk's serial number while it attaches, before the bus sets DRIVER_OK.
    let mut machine = new();
    machine.set(VIRTIO_MMIO_STATUS, UP & !VIRTIO_CONFIG_S_DRIVER_OK & !VIRTIO_CONFIG_S_FEATURES_OK);
    machine.accept(1 << VIRTIO_F_VERSION_1);
    machine.set(VIRTIO_MMIO_STATUS, UP & !VIRTIO_CONFIG_S_DRIVER_OK);
    machine.add_queue(0, 8);
    assert!(ask(&mut machine));
    machine.set(VIRTIO_MMIO_STATUS, UP);
    machine.run();
    assert!(ask(&mut machine));
}

#[test]
fn features_that_do_not_fit_are_not_accepted() {
    for features in [0, EVENT_IDX, 1 << VIRTIO_F_VERSION_1 | 1 << 5, 1 << VIRTIO_F_VERSION_1 | 1 << 34] {
        let mut machine = new();
        machine.set(VIRTIO_MMIO_STATUS, 3);
        machine.accept(features);
        machine.set(VIRTIO_MMIO_STATUS, 3 | VIRTIO_CONFIG_S_FEATURES_OK);
        assert_eq!(machine.status(), 3, "features {features:#x}");
        machine.set(VIRTIO_MMIO_STATUS, UP);
        assert_eq!(machine.status(), 3, "and the device does not start");
    }
}

#[test]
fn features_do_not_change_after_features_ok() {
    let mut machine = started(EVENT_IDX);
    machine.accept(u64::MAX);
    let saved = machine.transport.lock().save().unwrap();
    assert_eq!(saved.driver_features & EVENT_IDX, 0);
    assert!(!saved.queues[0].event_idx);
}

#[test]
fn a_queue_that_does_not_lie_in_memory_is_not_ready() {
    let mut machine = new();
    let tries =
        [(0x1000u64, 0x2000u64, MEMORY_BYTES - 8), (MEMORY_BYTES, 0x2000, 0x3000), (0x1000, 1 << 40, 0x3000)];
    for (table, available, used) in tries {
        machine.set(VIRTIO_MMIO_QUEUE_NUM, 8);
        for (register, value) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, table),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            machine.set(register, value as u32);
            machine.set(register + 4, (value >> 32) as u32);
        }
        machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    let mut machine = new();
    machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0, "never configured");
}

#[test]
fn a_ready_queue_keeps_its_settings() {
    let mut machine = started(0);
    let before = machine.transport.lock().save().unwrap();
    for register in [
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ] {
        machine.set(register, 16);
    }
    assert_eq!(machine.transport.lock().save().unwrap(), before);
    // It may be taken away while the device runs, but not brought back.
    machine.set(VIRTIO_MMIO_QUEUE_READY, 0);
    machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(!ask(&mut machine));
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut machine = started(EVENT_IDX);
    let flags = Machine::available(0);
    machine.memory.write_obj(VRING_AVAIL_F_NO_INTERRUPT as u16, GuestAddress(flags)).unwrap();
    assert!(ask(&mut machine));
    assert_eq!((machine.edges.take(), machine.get(VIRTIO_MMIO_INTERRUPT_STATUS)), (0, 0));
    machine.memory.write_obj(0u16, GuestAddress(flags)).unwrap();
    assert!(ask(&mut machine));
    assert_eq!(machine.edges.take(), 1);
    // And with event indices: only when the index is passed.
    let mut machine = started(0);
    let used_event = Machine::available(0) + 4 + 2 * 8;
    machine.memory.write_obj(2u16, GuestAddress(used_event)).unwrap();
    for edges in [0, 0, 1] {
        machine.add(0, 0, &[(BUFFERS, 64, true)]);
        machine.notify(0);
        assert_eq!(machine.edges.take(), edges);
    }
}

#[test]
fn notifications_are_on_again_after_the_work() {
    let mut machine = started(EVENT_IDX);
    assert!(ask(&mut machine));
    let flags: u16 = machine.memory.read_obj(GuestAddress(Machine::used(0))).unwrap();
    assert_eq!(flags & VRING_USED_F_NO_NOTIFY as u16, 0);
    let mut machine = started(0);
    assert!(ask(&mut machine));
    let available_event: u16 = machine.memory.read_obj(GuestAddress(Machine::used(0) + 4 + 8 * 8)).unwrap();
    assert_eq!(available_event, 1);
}

#[test]
fn a_queue_that_does_not_exist_cannot_be_notified() {
    let mut machine = started(0);
    for queue in [1, 31, 32, 0xffff, u32::MAX] {
        machine.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
        machine.transport.lock().notify(queue as u16, &machine.memory);
        machine.run();
    }
    assert!(!machine.broken() && machine.edges.take() == 0);
}

/// A machine with the memory of `source` and a device restored from `state`.
fn clone_of(source: &Machine, state: &TransportState) -> (Machine, Result<(), RestoreError>) {
    let clone = source.copy_with(Box::new(Rng::new()));
    let result = clone.transport.lock().restore(state, false, &clone.memory);
    (clone, result)
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    for without in [0, EVENT_IDX] {
        let mut source = started(without);
        for _ in 0..11 {
            assert!(ask(&mut source));
        }
        source.edges.take();
        // Added and notified, but the device thread did not come to it: an interrupt is unacknowledged, too.
        source.add(0, 0, &[(BUFFERS, 64, true)]);
        source.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        let state = source.transport.lock().save().unwrap();
        assert_eq!(state.queues[0].next_available, 11);
        let (mut clone, result) = clone_of(&source, &state);
        result.unwrap();
        assert_eq!(clone.transport.lock().save().unwrap(), state);
        assert_eq!(clone.edges.take(), 0);
        clone.transport.lock().kick_after_restore();
        assert_eq!(clone.edges.take(), 1, "the unacknowledged interrupt");
        clone.run();
        assert_eq!(clone.used_index(0), 12);
        assert_eq!(clone.edges.take(), 1, "the pending request");
        // The source is none the wiser, and goes on as well.
        source.run();
        assert_eq!(source.used_index(0), 12);
        assert_ne!(source.read_bytes(BUFFERS, 64), clone.read_bytes(BUFFERS, 64));
    }
}

#[test]
fn a_device_in_reset_can_be_saved_and_restored() {
    let mut source = new();
    source.set(VIRTIO_MMIO_STATUS, 1);
    let state = source.transport.lock().save().unwrap();
    let (mut clone, result) = clone_of(&source, &state);
    result.unwrap();
    clone.transport.lock().kick_after_restore();
    clone.run();
    assert_eq!(clone.edges.take(), 0);
    clone.start(8, 0);
    assert!(ask(&mut clone));
}

#[test]
fn restoring_touches_no_guest_memory() {
    // Pages that may not be touched at all: a pager that is not there yet.
    let source = started(0);
    let state = source.transport.lock().save().unwrap();
    let memory = guest_memory();
    let address = memory.get_host_address(GuestAddress(0)).unwrap();
    // SAFETY: the range is the mapping that `memory` owns; nothing refers into it.
    let protected = unsafe { libc::mprotect(address.cast(), MEMORY_BYTES as usize, libc::PROT_NONE) };
    assert_eq!(protected, 0);
    let clone = Machine::with_memory(Box::new(Rng::new()), memory);
    clone.transport.lock().restore(&state, false, &clone.memory).unwrap();
    clone.transport.lock().kick_after_restore();
    assert!(!clone.transport.lock().host_interest().is_empty());
    assert_eq!(clone.transport.lock().save().unwrap(), state);
}

#[test]
fn a_saved_state_that_cannot_be_is_refused() {
    type Change = fn(&mut TransportState);
    let changes: [(&str, Change); 20] = [
        ("device", |state| state.device_id = 2),
        ("status", |state| state.status |= 0x10),
        ("status without features", |state| state.status &= !VIRTIO_CONFIG_S_FEATURES_OK),
        ("interrupt status", |state| state.interrupt_status = 4),
        ("feature not offered", |state| state.driver_features |= 1 << 5),
        ("no version 1", |state| state.driver_features &= !(1 << VIRTIO_F_VERSION_1)),
        ("pending queue", |state| state.pending = 2),
        ("no queue", |state| state.queues.clear()),
        ("too many queues", |state| state.queues.push(state.queues[0])),
        ("size 0", |state| state.queues[0].size = 0),
        ("size not a power", |state| state.queues[0].size = 7),
        ("size too big", |state| state.queues[0].size = 128),
        ("table outside", |state| state.queues[0].descriptor_table = MEMORY_BYTES),
        ("table not aligned", |state| state.queues[0].descriptor_table += 8),
        ("available at the end", |state| state.queues[0].available_ring = MEMORY_BYTES - 4),
        ("used at the end of the world", |state| state.queues[0].used_ring = u64::MAX - 3),
        ("no available ring", |state| state.queues[0].available_ring = 0),
        ("taken and never given back", |state| state.queues[0].next_available = 9),
        ("event index", |state| state.driver_features &= !EVENT_IDX),
        ("device bytes", |state| state.device.push(0)),
    ];
    let source = started(0);
    let good = source.transport.lock().save().unwrap();
    assert!(clone_of(&source, &good).1.is_ok());
    for (name, change) in changes {
        let mut state = good.clone();
        change(&mut state);
        let (mut clone, result) = clone_of(&source, &state);
        assert!(result.is_err(), "{name}");
        assert_eq!(clone.status(), 0, "{name}: nothing of it stays");
        clone.start(8, 0);
        assert!(ask(&mut clone), "{name}: the transport is usable");
    }
}

#[test]
fn saved_indices_that_do_not_agree_with_the_ring_stop_the_device() {
    let source = started(0);
    let mut state = source.transport.lock().save().unwrap();
    state.queues[0].next_available = 100;
    state.queues[0].next_used = 100;
    let (mut clone, result) = clone_of(&source, &state);
    result.unwrap();
    clone.transport.lock().kick_after_restore();
    clone.notify(0);
    assert!(clone.broken());
}

#[test]
fn the_registers_of_operation_need_no_lock() {
    let mut machine = started(0);
    let hot = machine.transport.hot_registers();
    machine.add(0, 0, &[(BUFFERS, 64, true)]);
    assert!(hot.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]));
    machine.run();
    assert_eq!(machine.take_used(0), Some((0, 64)));
    let mut data = [0; 4];
    assert!(hot.read(VIRTIO_MMIO_INTERRUPT_STATUS.into(), &mut data));
    assert_eq!(data, [1, 0, 0, 0]);
    assert!(hot.write(VIRTIO_MMIO_INTERRUPT_ACK.into(), &[1, 0, 0, 0]));
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    // All else is not theirs, nor another width.
    for offset in (0..0x200).chain([u64::MAX]) {
        let mut one = [0];
        assert_eq!(hot.read(offset, &mut data), offset == u64::from(VIRTIO_MMIO_INTERRUPT_STATUS));
        assert!(!hot.read(offset, &mut one) && !hot.write(offset, &one));
    }
    assert!(!hot.write(VIRTIO_MMIO_STATUS.into(), &[0; 4]));
    assert_eq!(machine.status(), UP);
}

#[test]
fn a_quiet_device_is_restored_without_waking_anybody() {
    let mut source = started(0);
    assert!(ask(&mut source));
    source.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    let (mut clone, result) = clone_of(&source, &source.transport.lock().save().unwrap());
    result.unwrap();
    clone.transport.lock().kick_after_restore();
    assert_eq!(clone.edges.take(), 0);
    let kick = clone.transport.lock().host_interest()[0];
    let mut polled = libc::pollfd { fd: kick.fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which lives through the call.
    assert_eq!(unsafe { libc::poll(&mut polled, 1, 0) }, 0);
    assert!(ask(&mut clone));
}

proptest! {
    #[test]
    fn no_register_access_harms(
        accesses in proptest::collection::vec((any::<bool>(), 0u64..0x140, 0usize..9, any::<u64>(), any::<bool>()), 1..200),
    ) {
        let mut machine = started(0);
        for (is_write, offset, width, value, small) in accesses {
            let value = if small { value & 0xf } else { value };
            let mut data = value.to_le_bytes();
            if is_write {
                machine.transport.write(offset, &data[..width], &machine.memory);
                machine.transport.write(offset & !3, &data[..4], &machine.memory);
            } else {
                machine.transport.read(offset, &mut data[..width]);
            }
        }
        machine.run();
        machine.start(8, 0);
        prop_assert!(ask(&mut machine));
    }

    #[test]
    fn no_saved_state_harms(
        status in prop_oneof![Just(UP), any::<u32>()],
        features in prop_oneof![Just(EVENT_IDX | 1 << 32), any::<u64>()],
        addresses in proptest::collection::vec(prop_oneof![0u64..0x8000, any::<u64>()], 3),
        (size, next_available, next_used) in (prop_oneof![Just(8u16), any::<u16>()], any::<u16>(), any::<u16>()),
        (ready, event_idx, same_index) in any::<(bool, bool, bool)>(),
    ) {
        let source = started(0);
        let mut state = source.transport.lock().save().unwrap();
        state.status = status;
        state.driver_features = features;
        let queue = &mut state.queues[0];
        *queue = crate::snapshot::state::virtio::QueueState {
            size,
            ready,
            descriptor_table: addresses[0] & !0xf,
            available_ring: addresses[1] & !1,
            used_ring: addresses[2] & !3,
            next_available,
            next_used: if same_index { next_available } else { next_used },
            event_idx,
        };
        let (mut clone, result) = clone_of(&source, &state);
        if result.is_ok() {
            clone.transport.lock().kick_after_restore();
            clone.run();
            clone.transport.lock().notify(0, &clone.memory);
        }
        clone.run();
        clone.start(8, 0);
        prop_assert!(ask(&mut clone));
    }
}
