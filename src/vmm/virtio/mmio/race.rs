//! A driver and the device thread at the same time: no notification and no interrupt may be lost, although each side
//! tells the other whenever it can do without.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_USED_F_NO_NOTIFY};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::virtio::rng::Rng;
use crate::vmm::virtio::testing::{BUFFERS, Machine};

/// How long a step may take before it counts as lost. Generous: nothing here measures time.
const LOST: Duration = Duration::from_secs(60);
const SIZE: u16 = 8;

/// An interrupt line that a thread can sleep on.
#[derive(Default)]
struct Line {
    edges: Mutex<u64>,
    raised: Condvar,
}

impl Interrupt for Line {
    fn raise(&self) {
        *self.edges.lock().unwrap() += 1;
        self.raised.notify_all();
    }
}

/// The driver's half of one queue, as drivers write it.
struct Driver {
    memory: GuestMemory,
    event_idx: bool,
    added: u16,
    seen: u16,
}

impl Driver {
    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, value: u16, address: u64) {
        self.memory.store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Makes a request available; true if the device wants to be notified.
    fn add(&mut self) -> bool {
        let old = self.added;
        let slot = Machine::available(0) + 4 + 2 * u64::from(self.added % SIZE);
        self.store(self.added % SIZE, slot);
        self.added = self.added.wrapping_add(1);
        self.store(self.added, Machine::available(0) + 2);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(Machine::used(0) + 4 + 8 * u64::from(SIZE));
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(old)
        } else {
            self.load(Machine::used(0)) & VRING_USED_F_NO_NOTIFY as u16 == 0
        }
    }

    /// Asks for an interrupt at the next used entry, or says that there is one already.
    fn arm(&self) -> bool {
        if self.event_idx {
            self.store(self.seen, Machine::available(0) + 4 + 2 * u64::from(SIZE));
        }
        fence(Ordering::SeqCst);
        self.load(Machine::used(0) + 2) == self.seen
    }
}

fn drive(without: u64) {
    let line = Arc::new(Line::default());
    let mut machine = Machine::new(Box::new(Rng::new()));
    machine.transport = MmioTransport::new(Box::new(Rng::new()), line.clone()).unwrap();
    machine.start(SIZE, without);
    let descriptors: Vec<_> = (0..u64::from(SIZE)).map(|at| (BUFFERS + at * 16, 16, 2, 0)).collect();
    machine.put_descriptors(0, 0, &descriptors);
    let Machine { memory, transport, .. } = machine;
    let hot = transport.hot_registers();
    let kick = transport.lock().host_interest()[0].fd;
    let stop = AtomicBool::new(false);
    let mut driver = Driver {
        memory: memory.clone(),
        event_idx: without & 1 << VIRTIO_RING_F_EVENT_IDX == 0,
        added: 0,
        seen: 0,
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let mut polled = libc::pollfd { fd: kick, events: libc::POLLIN, revents: 0 };
                // SAFETY: one entry, which lives through the call.
                if unsafe { libc::poll(&mut polled, 1, 100) } > 0 {
                    transport.lock().host_event(kick, &memory);
                }
            }
        });
        let mut lost = None;
        for round in 0..50_000u32 {
            // Mostly one request after the other, whenever there is room, so that the device is often just about to
            // rest when one comes; now and then everything is awaited. First by looking, then by sleeping.
            let target =
                if round.is_multiple_of(7) { driver.added } else { driver.added.wrapping_sub(SIZE - 1) };
            driver.seen = driver.load(Machine::used(0) + 2);
            for _ in 0..if round.is_multiple_of(64) { 0 } else { 20_000 } {
                if target.wrapping_sub(driver.seen) as i16 <= 0 {
                    break;
                }
                std::hint::spin_loop();
                driver.seen = driver.load(Machine::used(0) + 2);
            }
            while lost.is_none() && target.wrapping_sub(driver.seen) as i16 > 0 {
                let before = *line.edges.lock().unwrap();
                if driver.arm() {
                    let edges = line.edges.lock().unwrap();
                    let waited =
                        line.raised.wait_timeout_while(edges, LOST, |edges| *edges == before).unwrap();
                    if waited.1.timed_out() {
                        lost = Some(round);
                    }
                }
                driver.seen = driver.load(Machine::used(0) + 2);
            }
            if lost.is_some() {
                break;
            }
            if driver.add() {
                assert!(hot.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]));
            }
        }
        stop.store(true, Ordering::SeqCst);
        assert_eq!(lost, None, "a notification or an interrupt was lost in this round");
    });
    assert!(!transport.lock().save().unwrap().status & VIRTIO_CONFIG_S_NEEDS_RESET != 0);
}

#[test]
fn nothing_is_lost_with_event_indices() {
    drive(0);
}

#[test]
fn nothing_is_lost_with_flags() {
    drive(1 << VIRTIO_RING_F_EVENT_IDX);
}
