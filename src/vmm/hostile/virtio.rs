//! Each virtio device, behind each front, against a hostile driver and hostile saved states.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

#[cfg(test)]
use super::driver::BUFFERS;
use super::driver::Driver;
#[cfg(test)]
use super::steps::steps;
use super::steps::{Step, step};
use super::{FRONTS, Front, HIGH_BYTES, HIGH_START, LOW_BYTES, Log, Machine, NAMES, from_bytes, logged};
use crate::snapshot::codec;
use crate::snapshot::state::pc::VirtioPciState;
use crate::snapshot::state::virtio::TransportState;
use crate::vmm::bus::lock;
use crate::vmm::virtio::transport::RestoreError;

/// Complaints that are logged of one device.
const COMPLAINTS: usize = 8;

/// What a snapshot has of one device.
#[derive(Debug, Clone, PartialEq)]
struct Saved {
    transport: TransportState,
    pci: Option<VirtioPciState>,
}

impl Machine {
    fn save_device(&self, device: usize) -> Saved {
        self.quiesce();
        let pci = self.bus.pc.as_ref().map(|pc| pc.functions[device].save());
        Saved { transport: lock(&self.bus.virtio[device]).save().unwrap(), pci }
    }

    fn restore_device(&self, device: usize, saved: &Saved) -> Result<(), RestoreError> {
        match (&self.bus.pc, &saved.pci) {
            (Some(pc), Some(pci)) => pc.functions[device].restore(pci, &saved.transport),
            _ => lock(&self.bus.virtio[device]).restore(&saved.transport, false, self.memory()),
        }
    }

    /// Another machine with a copy of this one's memory.
    fn copy(&self) -> Machine {
        let copy = Machine::new(self.front);
        let zeros = vec![0; 0x1_0000];
        for (start, bytes) in [(0, LOW_BYTES), (HIGH_START, HIGH_BYTES)] {
            // The larger part of it is never written.
            for page in (start..start + bytes).step_by(0x1_0000) {
                let data = self.peek(page, 0x1_0000);
                // One comparison of memory: byte by byte takes a fuzzer most of its time.
                if data != zeros {
                    copy.memory().write_slice(&data, GuestAddress(page)).unwrap();
                }
            }
        }
        copy
    }
}

/// Has a hostile driver do its worst.
fn wreck(driver: &mut Driver<'_>, steps: &[Step]) {
    let log = Log::default();
    let name = NAMES[driver.device];
    let mut complaints = 0;
    logged(&log, || {
        let mut broken = driver.broken();
        for step in steps {
            driver.carry_out(step);
            let told = log.take();
            complaints += told.matches("stopped until its driver resets it").count();
            let was_broken = std::mem::replace(&mut broken, driver.broken());
            if broken && !was_broken && complaints < COMPLAINTS {
                assert!(
                    told.contains(&format!("device=\"{name}\"")),
                    "{step:?} stopped {name}, told: {told:?}"
                );
            }
            assert!(!told.contains("defect"), "{told}");
            if broken {
                // Most drivers would: and a device that stands still proves nothing more.
                driver.start(8, 0);
                broken = driver.broken();
            }
        }
    });
}

/// A hostile driver, and then: what it left can be frozen, a clone takes it over, and source and clone work for an
/// honest driver.
fn no_driver_harms(device: usize, front: Front, steps: &[Step]) -> Result<(), TestCaseError> {
    let machine = Machine::new(front);
    let mut driver = Driver::new(&machine, device);
    driver.start(8, 0);
    wreck(&mut driver, steps);
    let saved = machine.save_device(device);
    let clone = machine.copy();
    let restored = clone.restore_device(device, &saved);
    prop_assert!(restored.is_ok(), "{:?}", restored);
    // The device at the clone's other end is another one: what depends on that may differ.
    if NAMES[device] != "net" {
        prop_assert_eq!(&clone.save_device(device), &saved);
    }
    lock(&clone.bus.virtio[device]).kick_after_restore();
    clone.run();
    for machine in [&machine, &clone] {
        Driver::new(machine, device).check_it_works();
    }
    Ok(())
}

/// Changes to encoded state: at a place, to a value.
type Changes = Vec<(prop::sample::Index, u8)>;

fn changed<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T, changes: &Changes) -> Option<T> {
    let mut bytes = codec::encode(value).unwrap();
    for (place, value) in changes {
        let place = place.index(bytes.len());
        bytes[place] = *value;
    }
    codec::decode(&bytes).ok()
}

/// A saved state with changes: refused under the device's name, or safe.
fn no_saved_state_harms(
    device: usize,
    front: Front,
    before: &[Step],
    [transport, inner, pci]: [Changes; 3],
    after: &[Step],
) -> Result<(), TestCaseError> {
    let source = Machine::new(front);
    let mut driver = Driver::new(&source, device);
    driver.start(8, 0);
    wreck(&mut driver, before);
    let good = source.save_device(device);
    let mut saved = good.clone();
    if let Some(changed) = changed(&good.transport, &transport) {
        saved.transport = changed;
    }
    for (place, value) in inner {
        if !saved.transport.device.is_empty() {
            let place = place.index(saved.transport.device.len());
            saved.transport.device[place] = value;
        }
    }
    if let Some(changed) = good.pci.as_ref().and_then(|good| changed(good, &pci)) {
        saved.pci = Some(changed);
    }
    let clone = source.copy();
    match clone.restore_device(device, &saved) {
        Ok(()) => {
            lock(&clone.bus.virtio[device]).kick_after_restore();
            clone.run();
            let mut driver = Driver::new(&clone, device);
            driver.rings = self::Driver::new(&source, device).rings;
            wreck(&mut driver, after);
            driver.check_it_works();
        }
        Err(error) => {
            let error = error.to_string();
            prop_assert!(error.contains(NAMES[device]), "{}", error);
        }
    }
    Ok(())
}

#[cfg(test)]
fn front() -> impl Strategy<Value = Front> {
    prop::sample::select(&FRONTS[..])
}

fn changes() -> impl Strategy<Value = [Changes; 3]> {
    let change = || (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), 0u8..4, 250u8..]);
    let some = || prop::collection::vec(change(), 0..3);
    [some(), some(), some()]
}

/// For fuzzers: what `data` makes of a driver, and of a saved state and the drivers before and after it.
pub fn fuzz(data: &[u8]) {
    let Some((&[device, front, before, c0, c1, c2, c3], data)) = data.split_first_chunk() else { return };
    let state = device >= 128;
    let (device, front) = (usize::from(device) % NAMES.len(), FRONTS[usize::from(front) % FRONTS.len()]);
    let mut steps = from_bytes(data, &step());
    let outcome = if state {
        let after = steps.split_off(usize::from(before).min(steps.len()));
        let Some(changes) = from_bytes(&[c0, c1, c2, c3], &changes()).pop() else { return };
        no_saved_state_harms(device, front, &steps, changes, &after)
    } else {
        no_driver_harms(device, front, &steps)
    };
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[cfg(test)]
macro_rules! hostile_tests {
    ($($device:literal, $any_driver:ident, $any_state:ident;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $any_driver(front in front(), steps in steps(60)) {
                    no_driver_harms($device, front, &steps)?;
                }

                #[test]
                fn $any_state(front in front(), before in steps(8), changes in changes(), after in steps(12)) {
                    no_saved_state_harms($device, front, &before, changes, &after)?;
                }
            )*
        }
    };
}

#[cfg(test)]
hostile_tests! {
    0, no_driver_harms_block, no_saved_state_harms_block;
    1, no_driver_harms_console, no_saved_state_harms_console;
    2, no_driver_harms_rng, no_saved_state_harms_rng;
    3, no_driver_harms_net, no_saved_state_harms_net;
}

/// The honest driver does what the tests above lean on.
#[test]
fn an_honest_driver_is_served_by_every_front() {
    for front in FRONTS {
        let machine = Machine::new(front);
        for device in 0..NAMES.len() {
            for _ in 0..2 {
                Driver::new(&machine, device).check_it_works();
            }
        }
    }
}

/// A driver that takes its queue away while requests are under way, again and again: what came of them is nobody's any
/// more, and does not spoil the snapshot.
#[test]
fn a_queue_taken_away_over_requests_leaves_a_state_that_can_be_restored() {
    for front in [Front::Mmio, Front::Legacy] {
        let machine = Machine::new(front);
        let mut driver = Driver::new(&machine, 0);
        // Before DRIVER_OK it can be given again.
        driver.prepare(8, 0);
        for _ in 0..100 {
            // Where the device takes the ring to begin.
            let begin = lock(&machine.bus.virtio[0]).save().unwrap().queues[0].next_available;
            driver.set_available_index(0, begin);
            for _ in 0..3 {
                driver.add(0, 0, &[(BUFFERS, 16, false), (BUFFERS + 0x1000, 0x1_0000, true)]);
            }
            driver.ring(0);
            machine.round();
            driver.enable(0, false);
            driver.enable(0, true);
        }
        let saved = machine.save_device(0);
        let queue = saved.transport.queues[0];
        assert_eq!(queue.next_available, queue.next_used, "{front:?}: {queue:?}");
        let clone = machine.copy();
        clone.restore_device(0, &saved).unwrap();
        Driver::new(&machine, 0).check_it_works();
        Driver::new(&clone, 0).check_it_works();
    }
}
