//! Random bytes for a driver that asks for few, many, or in the wrong way.

use super::*;
use crate::vmm::virtio::testing::{BUFFERS, MEMORY_BYTES, Machine};

fn started() -> Machine {
    Machine::started(Box::new(Rng::new()), 64, 0)
}

#[test]
fn every_request_gets_bytes_of_its_own() {
    let mut machine = started();
    machine.add(0, 0, &[(BUFFERS, 32, true), (BUFFERS + 0x1000, 1000, true)]);
    machine.notify(0);
    assert_eq!(machine.take_used(0), Some((0, 1032)));
    let first = (machine.read_bytes(BUFFERS, 32), machine.read_bytes(BUFFERS + 0x1000, 1000));
    assert!(first.0 != [0; 32] && first.1[968..] != [0; 32] && first.0 != first.1[..32]);
    machine.add(0, 0, &[(BUFFERS, 32, true)]);
    machine.notify(0);
    assert_ne!(machine.read_bytes(BUFFERS, 32), first.0);
}

#[test]
fn a_request_gets_64_kib_at_most() {
    let mut machine = started();
    machine.add(0, 0, &[(BUFFERS, 1 << 20, true)]);
    machine.notify(0);
    assert_eq!(machine.take_used(0), Some((0, 64 << 10)));
    assert_eq!(machine.read_bytes(BUFFERS + (64 << 10), 4096), [0; 4096]);
}

#[test]
fn a_call_has_a_limit_and_the_rest_follows_by_itself() {
    let mut machine = started();
    for at in 0..64 {
        machine.add(0, at, &[(BUFFERS, 64 << 10, true)]);
    }
    machine.transport.lock().notify(0, &machine.memory);
    let first = machine.used_index(0);
    assert!((1..64).contains(&first), "{first} in one call");
    machine.run();
    assert_eq!(machine.used_index(0), 64);
}

#[test]
fn nothing_to_fill_is_answered_and_wrong_memory_stops_the_device() {
    let mut machine = started();
    machine.add(0, 0, &[(BUFFERS, 16, false)]);
    machine.notify(0);
    assert_eq!(machine.take_used(0), Some((0, 0)));
    machine.add(0, 0, &[(MEMORY_BYTES - 8, 16, true)]);
    machine.notify(0);
    assert!(machine.broken());
}

#[test]
fn its_state_is_its_version() {
    let saved = Rng::new().save().unwrap();
    assert!(Rng::new().restore(&saved).is_ok());
    for wrong in [&[][..], &[1], &[0, 0]] {
        assert!(matches!(Rng::new().restore(wrong), Err(DeviceError::Codec { device: "rng", .. })));
    }
}
