//! A driver that writes anything anywhere, a link that delivers anything, and a saved state that says anything: no panic,
//! no endless work, nothing outside guest memory; and a device that was reset works again.

use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::*;
use crate::vmm::virtio::testing::{BUFFERS, INDIRECT, MEMORY_BYTES, Machine, NEXT, WRITE};

const MAC: Mac = [2, 0, 0, 0, 0, 9];

fn device(tap: bool) -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let link =
        if tap { Link::imitation(ours.into(), Arc::default()) } else { Link::wire(ours.into()).unwrap() };
    (Net::new(link, NetConfig { mac: MAC, mtu: None }), theirs)
}

/// An address and a length, most of them in guest memory.
fn buffer() -> impl Strategy<Value = (u64, u32)> {
    let address = prop_oneof![
        8 => BUFFERS..MEMORY_BYTES,
        1 => 0u64..0x10_0000,
        1 => any::<u64>(),
        1 => Just(MEMORY_BYTES - 3),
    ];
    let bytes = prop_oneof![6 => 0u32..3000, 2 => 0u32..70_000, 1 => any::<u32>()];
    (address, bytes)
}

#[derive(Debug, Clone)]
enum Step {
    /// Descriptor `at` of a queue becomes this, and perhaps available.
    Describe {
        queue: u16,
        at: u16,
        buffer: (u64, u32),
        flags: u16,
        next: u16,
        available: bool,
    },
    /// The available index jumps.
    Jump {
        queue: u16,
        by: u16,
    },
    Notify(u16),
    /// Bytes in guest memory, the rings included.
    Scribble {
        at: u64,
        bytes: Vec<u8>,
    },
    /// A packet from the link's other end.
    Deliver(Vec<u8>),
    /// What was sent is taken.
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![4 => Just(0), 4 => Just(WRITE), 2 => Just(NEXT), 2 => Just(NEXT | WRITE), 1 => Just(INDIRECT), 1 => any::<u16>()];
    let header = prop_oneof![
        Just(vec![0; HEADER_BYTES]),
        proptest::collection::vec(any::<u8>(), HEADER_BYTES),
        // A checksum to complete.
        (any::<u16>(), any::<u16>()).prop_map(|(start, offset)| {
            let mut header = vec![1, 0, 0, 0, 0, 0];
            header.extend((start % 80).to_le_bytes());
            header.extend((offset % 40).to_le_bytes());
            header.extend([0, 0]);
            header
        }),
    ];
    let packet = (header, proptest::collection::vec(any::<u8>(), 0..5000))
        .prop_map(|(header, frame)| [header, frame].concat());
    prop_oneof![
        6 => (0u16..3, 0u16..8, buffer(), flags, 0u16..9, any::<bool>()).prop_map(
            |(queue, at, buffer, flags, next, available)| {
                Step::Describe { queue, at, buffer, flags, next, available }
            }
        ),
        1 => (0u16..3, any::<u16>()).prop_map(|(queue, by)| Step::Jump { queue, by }),
        4 => (0u16..4).prop_map(Step::Notify),
        1 => (0u64..0x10_000, proptest::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Step::Scribble { at, bytes }),
        3 => packet.prop_map(Step::Deliver),
        1 => Just(Step::Drain),
    ]
}

fn carry_out(machine: &mut Machine, peer: &UnixDatagram, step: Step) {
    match step {
        Step::Describe { queue, at, buffer: (address, bytes), flags, next, available } => {
            machine.put_descriptors(queue, at, &[(address, bytes, flags, next)]);
            if available {
                machine.make_available(queue, at);
            }
        }
        Step::Jump { queue, by } => {
            let index = machine.available_index(queue);
            machine.set_available_index(queue, index.wrapping_add(by));
        }
        Step::Notify(queue) => machine.notify(queue),
        Step::Scribble { at, bytes } => machine.write_bytes(at, &bytes),
        Step::Deliver(packet) => {
            // A full link drops it.
            let _ = peer.send(&packet);
            machine.run();
        }
        Step::Drain => drain(peer),
    }
}

fn drain(peer: &UnixDatagram) {
    let mut data = vec![0; 70_000];
    while peer.recv(&mut data).is_ok() {}
}

/// A good driver gets a frame through, both ways.
fn works(machine: &mut Machine, peer: &UnixDatagram) {
    machine.start(16, 0);
    drain(peer);
    machine.add(RECEIVE as u16, 0, &[(BUFFERS, 70_000, true)]);
    machine.notify(RECEIVE as u16);
    // What was delivered before comes first.
    while machine.take_used(RECEIVE as u16).is_some() {
        machine.make_available(RECEIVE as u16, 0);
        machine.notify(RECEIVE as u16);
    }
    let frame = [vec![0; HEADER_BYTES], MAC.to_vec(), vec![7; 50]].concat();
    peer.send(&frame).unwrap();
    machine.run();
    assert_eq!(machine.take_used(RECEIVE as u16), Some((0, 68)));
    machine.write_bytes(BUFFERS, &frame);
    machine.add(TRANSMIT as u16, 0, &[(BUFFERS, 68, false)]);
    machine.notify(TRANSMIT as u16);
    let mut data = [0; 100];
    assert_eq!(peer.recv(&mut data).unwrap(), 68);
    assert_eq!(data[..68], frame);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn no_driver_and_no_peer_harm(
        tap in any::<bool>(),
        without in prop_oneof![Just(0u64), any::<u64>().prop_map(|bits| bits & !(1 << 32))],
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let (device, peer) = device(tap);
        let mut machine = Machine::started(Box::new(device), 8, without);
        for step in steps {
            carry_out(&mut machine, &peer, step);
            if machine.broken() {
                machine.start(8, without);
            }
        }
        works(&mut machine, &peer);
    }

    #[test]
    fn every_command_has_one_answer(
        commands in proptest::collection::vec(
            (0u8..8, 0u8..6, proptest::collection::vec(any::<u8>(), 0..40), 0u32..3), 1..30),
    ) {
        let (device, _peer) = device(true);
        let mut machine = Machine::started(Box::new(device), 8, 0);
        for (class, command, data, room) in commands {
            let bytes = [vec![class, command], data].concat();
            machine.write_bytes(BUFFERS, &bytes);
            machine.write_bytes(BUFFERS + 0x1000, &[0xee; 2]);
            machine.add(CONTROL as u16, 0, &[(BUFFERS, bytes.len() as u32, false), (BUFFERS + 0x1000, room, true)]);
            machine.notify(CONTROL as u16);
            prop_assert_eq!(machine.take_used(CONTROL as u16), Some((0, room.min(1))));
            prop_assert_eq!(machine.take_used(CONTROL as u16), None);
            if room > 0 {
                prop_assert!(machine.read_bytes(BUFFERS + 0x1000, 1)[0] <= 1);
            }
            prop_assert!(!machine.broken());
        }
    }

    /// Frames of any size into buffers of any size: they arrive whole, in order, or are counted as too long.
    #[test]
    fn frames_fit_any_buffers(
        sizes in proptest::collection::vec((14usize..6000, proptest::collection::vec(1u32..3000, 1..9)), 1..20),
        without in prop_oneof![Just(0u64), Just(1 << 29), Just(bit(VIRTIO_NET_F_MRG_RXBUF))],
    ) {
        let (device, peer) = device(false);
        let counters = device.counters();
        let mut machine = Machine::started(Box::new(device), 8, without);
        for (bytes, buffers) in sizes {
            // A ring of its own for each frame, full.
            machine.start(8, without);
            let before = counters.read();
            let mut frame = [vec![0; HEADER_BYTES], MAC.to_vec()].concat();
            frame.extend((frame.len()..HEADER_BYTES + bytes).map(|at| at as u8));
            let room: u32 = buffers.iter().sum();
            let mut all: Vec<(u64, u32)> = vec![];
            for at in 0..8u16 {
                let size = buffers.get(usize::from(at)).copied().unwrap_or(1);
                all.push((BUFFERS + u64::from(at) * 0x1000, size));
                machine.add(RECEIVE as u16, at, &[(BUFFERS + u64::from(at) * 0x1000, size, true)]);
            }
            machine.notify(RECEIVE as u16);
            peer.send(&frame).unwrap();
            machine.run();
            let used: Vec<(u16, u32)> = std::iter::from_fn(|| machine.take_used(RECEIVE as u16)).collect();
            let whole: u64 = if without == bit(VIRTIO_NET_F_MRG_RXBUF) {
                buffers.first().copied().unwrap_or(0).into()
            } else {
                u64::from(room) + 8 - buffers.len() as u64
            };
            if whole >= frame.len() as u64 {
                let got: Vec<u8> = used
                    .iter()
                    .flat_map(|(head, bytes)| machine.read_bytes(all[usize::from(*head)].0, *bytes as usize))
                    .collect();
                frame[10] = used.len() as u8;
                prop_assert_eq!(got, frame);
            } else {
                prop_assert!(used.is_empty());
                prop_assert_eq!(counters.read().dropped_in_too_long, before.dropped_in_too_long + 1);
            }
        }
    }

    #[test]
    fn no_saved_state_harms(
        at in any::<prop::sample::Index>(),
        with in any::<u8>(),
        cut in any::<prop::sample::Index>(),
        noise in proptest::collection::vec(any::<u8>(), 0..80),
        steps in proptest::collection::vec(step(), 0..10),
    ) {
        let (device, peer) = device(true);
        let mut source = Machine::started(Box::new(device), 8, 0);
        source.add(RECEIVE as u16, 0, &[(BUFFERS, 100, true)]);
        source.notify(RECEIVE as u16);
        peer.send(&[vec![0; HEADER_BYTES], vec![1; 300]].concat()).unwrap();
        source.run();
        let good = source.transport.lock().save().unwrap();
        let mut changed = good.device.clone();
        let place = at.index(changed.len());
        changed[place] = with;
        let mut short = good.device.clone();
        short.truncate(cut.index(short.len()));
        for bytes in [changed, short, noise] {
            let (ours, peer) = UnixDatagram::pair().unwrap();
            peer.set_nonblocking(true).unwrap();
            let link = Link::imitation(ours.into(), Arc::default());
            let mut clone = source.copy_with(Box::new(Net::for_restore(link)));
            let mut state = good.clone();
            state.device = bytes;
            if clone.transport.lock().restore(&state, false, &clone.memory).is_ok() {
                clone.transport.lock().kick_after_restore();
                clone.run();
                for step in &steps {
                    carry_out(&mut clone, &peer, step.clone());
                }
            }
        }
    }
}
