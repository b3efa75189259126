//! The network device between a driver and the other end of its link.

#![allow(unsafe_code)]

mod restore;

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::vmm::virtio::rate::Rate;
use crate::vmm::virtio::testing::{BUFFERS, Machine};

const RX: u16 = RECEIVE as u16;
const TX: u16 = TRANSMIT as u16;
const CTRL: u16 = CONTROL as u16;
const MAC: Mac = [2, 0x11, 0x22, 0x33, 0x44, 0x55];
const OTHER: Mac = [2, 9, 9, 9, 9, 9];
/// Where tests put frames to be sent; received ones go to `BUFFERS`.
const OUT: u64 = BUFFERS + 0x20_0000;
const COMMAND: u64 = BUFFERS + 0x40_0000;
const ANSWER: u64 = COMMAND + 0x10_0000;

fn config() -> NetConfig {
    NetConfig { mac: MAC, mtu: Some(1400) }
}

/// A device on a wire, and the wire's other end.
fn wire() -> (Box<Net>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Box::new(Net::new(Link::wire(ours.into()).unwrap(), config())), theirs)
}

/// A device on something that behaves like a TAP, what is at its other end, and the offloads it was told.
fn tap() -> (Box<Net>, UnixDatagram, Arc<AtomicU32>) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let told = Arc::<AtomicU32>::default();
    (Box::new(Net::new(Link::imitation(ours.into(), told.clone()), config())), theirs, told)
}

/// Header and frame to `mac`: `bytes` long without the header, its content told by `mark`.
fn frame_to(mac: Mac, bytes: usize, mark: u8) -> Vec<u8> {
    let mut all = vec![0; HEADER_BYTES];
    all.extend(mac);
    all.extend(OTHER);
    all.extend([8, 0]);
    all.extend((all.len()..HEADER_BYTES + bytes).map(|at| (at as u8).wrapping_mul(7) ^ mark));
    all.truncate(HEADER_BYTES + bytes);
    all
}

fn frame(bytes: usize, mark: u8) -> Vec<u8> {
    frame_to(MAC, bytes, mark)
}

fn receive(peer: &UnixDatagram) -> Option<Vec<u8>> {
    let mut data = vec![0; 70_000];
    let bytes = peer.recv(&mut data).ok()?;
    data.truncate(bytes);
    Some(data)
}

/// Makes a frame available to the device.
fn offer(machine: &mut Machine, at: u16, frame: &[u8]) {
    let place = OUT + u64::from(at) * 0x1_0000;
    machine.write_bytes(place, frame);
    machine.add(TX, at, &[(place, frame.len() as u32, false)]);
}

/// Gives the command to the device: the answer, and how many bytes were said to be written.
fn command(machine: &mut Machine, bytes: &[u8]) -> (u8, u32) {
    machine.write_bytes(COMMAND, bytes);
    machine.write_bytes(ANSWER, &[0xee]);
    let (head, data) = bytes.split_at(bytes.len().min(2));
    let mut buffers = vec![];
    for (at, part) in [(COMMAND, head), (COMMAND + head.len() as u64, data)] {
        if !part.is_empty() {
            buffers.push((at, part.len() as u32, false));
        }
    }
    buffers.push((ANSWER, 1, true));
    machine.add(CTRL, 0, &buffers);
    machine.notify(CTRL);
    let (head, written) = machine.take_used(CTRL).expect("every command is answered");
    assert_eq!(head, 0);
    (machine.read_bytes(ANSWER, 1)[0], written)
}

const OK: (u8, u32) = (VIRTIO_NET_OK as u8, 1);
const ERR: (u8, u32) = (VIRTIO_NET_ERR as u8, 1);

fn read_config<const BYTES: usize>(machine: &mut Machine, offset: u64) -> [u8; BYTES] {
    let mut data = [0; BYTES];
    machine.transport.read(u64::from(VIRTIO_MMIO_CONFIG) + offset, &mut data);
    data
}

fn status(machine: &mut Machine) -> u16 {
    u16::from_le_bytes(read_config(machine, 6))
}

fn link_interest(machine: &Machine) -> Option<(bool, bool)> {
    machine.transport.lock().host_interest().get(1).map(|interest| (interest.readable, interest.writable))
}

#[test]
fn the_configuration_and_the_features_are_those_of_the_link() {
    let (device, _peer) = wire();
    let mut machine = Machine::started(device, 16, 0);
    assert_eq!(read_config::<6>(&mut machine, 0), MAC);
    assert_eq!(status(&mut machine), VIRTIO_NET_S_LINK_UP as u16);
    assert_eq!(read_config::<2>(&mut machine, 10), 1400u16.to_le_bytes());
    assert_eq!(read_config::<8>(&mut machine, 12), [0; 8]);
    let wire_offers = machine.offered();
    let (device, _peer, _) = tap();
    let tap_offers = device.features();
    assert_eq!(wire_offers & TRANSMIT_SEGMENTS, 0, "nobody cuts segments on a wire");
    assert_eq!(tap_offers & (TRANSMIT_SEGMENTS | RECEIVE_OFFLOADS), TRANSMIT_SEGMENTS | RECEIVE_OFFLOADS);
    for offers in [wire_offers, tap_offers] {
        assert_eq!(offers & bit(VIRTIO_NET_F_MQ), 0);
        assert_ne!(offers & bit(VIRTIO_NET_F_CTRL_VQ), 0);
        assert_ne!(offers & bit(VIRTIO_NET_F_MRG_RXBUF), 0);
    }
    let silent = Net::new(Link::Down, NetConfig { mac: MAC, mtu: None });
    assert_eq!(silent.features() & bit(VIRTIO_NET_F_MTU), 0);
    let mut machine = Machine::started(Box::new(silent), 16, 0);
    assert_eq!(status(&mut machine), 0);
}

#[test]
fn frames_leave_whole_and_in_order() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 16, 0);
    let frames = [frame(60, 1), frame(1514, 2), frame(14, 3)];
    for (at, frame) in frames.iter().enumerate() {
        offer(&mut machine, at as u16, frame);
    }
    // One in pieces that respect no boundary.
    machine.write_bytes(OUT + 0x3_0000, &frames[0]);
    let pieces = [(OUT + 0x3_0000, 5, false), (OUT + 0x3_0005, 20, false), (OUT + 0x3_0019, 47, false)];
    machine.add(TX, 8, &pieces);
    machine.notify(TX);
    for expected in frames.iter().chain([&frames[0]]) {
        assert_eq!(receive(&peer).as_ref(), Some(expected));
    }
    assert_eq!(receive(&peer), None);
    for head in [0, 1, 2, 8] {
        assert_eq!(machine.take_used(TX), Some((head, 0)));
    }
    let counted = counters.read();
    assert_eq!((counted.frames_out, counted.bytes_out), (4, 60 + 1514 + 14 + 60));
}

#[test]
fn a_full_link_makes_the_guest_wait_and_loses_nothing() {
    let (device, peer, _) = tap();
    let counters = device.counters();
    let mut machine = Machine::started(device, 256, 0);
    // More than a socket holds.
    for at in 0..200u16 {
        let place = OUT + u64::from(at) * 0x2000;
        machine.write_bytes(place, &frame(8000, at as u8));
        machine.add(TX, at, &[(place, 8012, false)]);
    }
    machine.notify(TX);
    let first = machine.used_index(TX);
    assert!(first < 200, "the socket took everything: the test is too small");
    assert_eq!(link_interest(&machine), Some((false, true)), "waits for room");
    let mut got = vec![];
    while got.len() < 200 {
        got.push(receive(&peer).expect("the device stopped sending"));
        machine.run();
    }
    for (at, got) in got.iter().enumerate() {
        assert_eq!(got, &frame(8000, at as u8), "frame {at}");
    }
    assert_eq!(machine.used_index(TX), 200);
    assert_eq!(link_interest(&machine), None);
    assert_eq!(counters.read().frames_out, 200);
}

#[test]
fn what_is_no_frame_is_dropped_and_counted() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 16, 0);
    for (at, bytes) in [(0u16, 1), (1, 12), (2, 25), (3, 65_566)] {
        machine.add(TX, at, &[(OUT, bytes, false)]);
    }
    // Nothing to read at all.
    machine.add(TX, 4, &[(OUT, 100, true)]);
    machine.notify(TX);
    for head in 0..5 {
        assert_eq!(machine.take_used(TX), Some((head, 0)));
    }
    assert_eq!(counters.read().dropped_out_bad, 5);
    assert_eq!(receive(&peer), None);
    // The largest is one.
    machine.write_bytes(OUT, &frame(65_553, 9));
    machine.add(TX, 0, &[(OUT, 65_565, false)]);
    machine.notify(TX);
    assert_eq!(receive(&peer).map(|frame| frame.len()), Some(65_565));
}

#[test]
fn frames_wait_in_the_link_until_the_guest_has_buffers() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 16, 0);
    assert_eq!(link_interest(&machine), None, "no buffers, so nothing is watched");
    for mark in 0..3 {
        peer.send(&frame(100, mark)).unwrap();
    }
    machine.run();
    assert_eq!(counters.read(), Default::default(), "nothing was taken from the link");
    machine.add(RX, 0, &[(BUFFERS, 2048, true)]);
    machine.add(RX, 1, &[(BUFFERS + 0x1000, 2048, true)]);
    machine.edges.take();
    machine.notify(RX);
    for (head, place) in [(0, BUFFERS), (1, BUFFERS + 0x1000)] {
        assert_eq!(machine.take_used(RX), Some((head, 112)));
        let mut expected = frame(100, head as u8);
        expected[10] = 1;
        assert_eq!(machine.read_bytes(place, 112), expected);
    }
    assert_eq!(machine.edges.take(), 1);
    assert_eq!(link_interest(&machine), None);
    machine.add(RX, 2, &[(BUFFERS, 2048, true)]);
    machine.notify(RX);
    assert_eq!(machine.take_used(RX), Some((2, 112)));
    let counted = counters.read();
    assert_eq!((counted.frames_in, counted.bytes_in), (3, 300));
}

#[test]
fn a_large_frame_is_spread_over_several_buffers_that_show_up_together() {
    for without in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let (device, peer) = wire();
        let mut machine = Machine::started(device, 8, without);
        // Two buffers of 1000 are not enough for 3012 bytes; the frame waits for more.
        machine.add(RX, 0, &[(BUFFERS, 1000, true)]);
        machine.add(RX, 1, &[(BUFFERS + 0x1000, 1000, true)]);
        machine.notify(RX);
        let mut expected = frame(3000, 5);
        peer.send(&expected).unwrap();
        machine.edges.take();
        machine.run();
        assert_eq!(machine.used_index(RX), 0);
        assert_eq!(machine.edges.take(), 0);
        assert_eq!(link_interest(&machine), None, "waits for the guest, not for the link");
        machine.add(RX, 2, &[(BUFFERS + 0x2000, 500, true)]);
        machine.notify(RX);
        assert_eq!(machine.used_index(RX), 0);
        machine.add(RX, 3, &[(BUFFERS + 0x3000, 300, true), (BUFFERS + 0x4000, 4000, true)]);
        machine.notify(RX);
        let used: Vec<_> = std::iter::from_fn(|| machine.take_used(RX)).collect();
        assert_eq!(used, [(0, 1000), (1, 1000), (2, 500), (3, 512)]);
        assert_eq!(machine.edges.take(), 1);
        expected[10] = 4;
        let parts = [(0, 1000), (0x1000, 1000), (0x2000, 500), (0x3000, 300), (0x4000, 212)];
        let got: Vec<u8> =
            parts.iter().flat_map(|(at, bytes)| machine.read_bytes(BUFFERS + at, *bytes)).collect();
        assert_eq!(got, expected);
        // And the next frame finds the ring where it should be.
        machine.add(RX, 0, &[(BUFFERS, 2000, true)]);
        machine.notify(RX);
        peer.send(&frame(64, 6)).unwrap();
        machine.run();
        assert_eq!(machine.take_used(RX), Some((0, 76)));
    }
}

#[test]
fn merging_works_round_the_end_of_the_ring() {
    let (device, peer) = wire();
    let mut machine = Machine::started(device, 4, 0);
    for round in 0..50u8 {
        let count = 1 + u16::from(round) % 4;
        for at in 0..count {
            machine.add(RX, at, &[(BUFFERS + u64::from(at) * 0x100, 100, true)]);
        }
        machine.notify(RX);
        let bytes = usize::from(count) * 100 - 12 - 7;
        peer.send(&frame(bytes, round)).unwrap();
        machine.edges.take();
        machine.run();
        assert_eq!(machine.edges.take(), 1, "round {round}");
        let used: Vec<_> = std::iter::from_fn(|| machine.take_used(RX)).collect();
        assert_eq!(used.len(), usize::from(count), "round {round}");
        let got: Vec<u8> = used
            .iter()
            .flat_map(|(head, bytes)| machine.read_bytes(BUFFERS + u64::from(*head) * 0x100, *bytes as usize))
            .collect();
        let mut expected = frame(bytes, round);
        expected[10] = count as u8;
        assert_eq!(got, expected, "round {round}");
    }
}

#[test]
fn a_frame_that_no_ring_could_hold_is_dropped() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 4, 0);
    for at in 0..4 {
        machine.add(RX, at, &[(BUFFERS + u64::from(at) * 0x1000, 500, true)]);
    }
    machine.notify(RX);
    peer.send(&frame(2500, 1)).unwrap();
    peer.send(&frame(60, 2)).unwrap();
    machine.run();
    assert_eq!(counters.read().dropped_in_too_long, 1);
    assert_eq!(machine.take_used(RX), Some((0, 72)), "the buffers are still there for the next");
    assert_eq!(machine.take_used(RX), None);
    // Without mergeable buffers one chain has to do.
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 8, bit(VIRTIO_NET_F_MRG_RXBUF));
    machine.add(RX, 0, &[(BUFFERS, 12, true), (BUFFERS + 0x100, 1514, true)]);
    machine.add(RX, 2, &[(BUFFERS + 0x1000, 12, true), (BUFFERS + 0x1100, 1514, true)]);
    machine.notify(RX);
    peer.send(&frame(1515, 1)).unwrap();
    peer.send(&frame(1514, 2)).unwrap();
    machine.run();
    assert_eq!(counters.read().dropped_in_too_long, 1);
    assert_eq!(machine.take_used(RX), Some((0, 1526)));
    assert_eq!(machine.read_bytes(BUFFERS + 0x100, 1514), frame(1514, 2)[12..]);
}

#[test]
fn a_legacy_driver_has_a_shorter_header_and_sets_its_address_in_the_configuration() {
    let (device, peer) = wire();
    let mut machine = Machine::started(device, 16, bit(VIRTIO_NET_F_MRG_RXBUF));
    machine.transport.lock().device.activate(bit(VIRTIO_NET_F_MAC));
    machine.write_bytes(OUT, &frame(60, 1)[2..]);
    machine.add(TX, 0, &[(OUT, 10, false), (OUT + 10, 60, false)]);
    machine.notify(TX);
    assert_eq!(receive(&peer), Some(frame(60, 1)));
    machine.add(RX, 0, &[(BUFFERS, 10, true), (BUFFERS + 0x100, 60, true)]);
    machine.notify(RX);
    peer.send(&frame(60, 2)).unwrap();
    machine.run();
    assert_eq!(machine.take_used(RX), Some((0, 70)));
    assert_eq!(machine.read_bytes(BUFFERS, 10), [0; 10]);
    assert_eq!(machine.read_bytes(BUFFERS + 0x100, 60), frame(60, 2)[HEADER_BYTES..]);
    for (at, byte) in [4, 5, 6, 7, 8, 9, 10].into_iter().enumerate() {
        machine.transport.write(u64::from(VIRTIO_MMIO_CONFIG) + at as u64, &[byte], &machine.memory);
    }
    assert_eq!(read_config::<6>(&mut machine, 0), [4, 5, 6, 7, 8, 9]);
    // With VERSION_1 it is read only.
    machine.start(16, 0);
    machine.transport.write(u64::from(VIRTIO_MMIO_CONFIG), &[8, 8], &machine.memory);
    assert_eq!(read_config::<6>(&mut machine, 0), MAC);
}

#[test]
fn a_flood_of_frames_is_taken_in_turns() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 256, 0);
    for at in 0..256u16 {
        machine.add(RX, at, &[(BUFFERS + u64::from(at) * 0x400, 0x400, true)]);
    }
    machine.set(VIRTIO_MMIO_QUEUE_NOTIFY, RX.into());
    let sent = (0..200).take_while(|mark| peer.send(&frame(60, *mark)).is_ok()).count();
    assert!(sent > 0);
    machine.run();
    let mut more = sent;
    while more < 200 {
        more += usize::from(peer.send(&frame(60, more as u8)).is_ok());
        machine.run();
    }
    assert_eq!(counters.read().frames_in, 200);
    for at in 0..200u16 {
        assert_eq!(machine.take_used(RX), Some((at, 72)));
    }
}

#[test]
fn every_command_is_answered() {
    let (device, _peer, told) = tap();
    let mut machine = Machine::started(device, 16, 0);
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    assert_eq!(told.load(Ordering::SeqCst), all);
    let mac_table = |unicast: u32, multicast: u32| {
        let mut bytes = vec![1, 0];
        for count in [unicast, multicast] {
            bytes.extend(count.to_le_bytes());
            bytes.extend(vec![2; 6 * count as usize]);
        }
        bytes
    };
    let offloads = |bits: u64| [vec![5, 0], bits.to_le_bytes().to_vec()].concat();
    let good: Vec<Vec<u8>> = vec![
        vec![0, 0, 0],
        vec![0, 1, 1],
        mac_table(0, 0),
        mac_table(3, 7),
        mac_table(500, 64),
        vec![1, 1, 2, 3, 4, 5, 6, 7],
        vec![2, 0, 7, 0],
        vec![2, 1, 0xff, 0x0f],
        vec![3, 0],
        offloads(bit(VIRTIO_NET_F_GUEST_CSUM)),
    ];
    for bytes in good {
        assert_eq!(command(&mut machine, &bytes), OK, "{bytes:?}");
    }
    assert_eq!(told.load(Ordering::SeqCst), libc::TUN_F_CSUM);
    assert_eq!(read_config::<6>(&mut machine, 0), [2, 3, 4, 5, 6, 7]);
    let mut short_table = mac_table(2, 2);
    short_table.pop();
    let mut endless_table = mac_table(2, 2);
    endless_table[2..6].fill(0xff);
    let bad: Vec<Vec<u8>> = vec![
        vec![],
        vec![0],
        vec![0, 0],
        vec![0, 0, 1, 1],
        // RX_EXTRA was not offered, nor several queue pairs.
        vec![0, 2, 1],
        vec![4, 0, 1, 0],
        short_table,
        endless_table,
        [mac_table(1, 1), vec![0]].concat(),
        vec![1, 1, 3, 3, 4, 5, 6, 7],
        vec![1, 1, 2],
        vec![1, 2, 0, 0],
        vec![2, 0, 0, 0x10],
        vec![2, 2, 0, 0],
        vec![3, 1],
        offloads(bit(VIRTIO_NET_F_GUEST_UFO)),
        vec![5, 0, 1],
        vec![0xff, 0xff],
    ];
    for bytes in bad {
        assert_eq!(command(&mut machine, &bytes), ERR, "{bytes:?}");
    }
    // No room for the answer, and a command that does not lie in memory: given back all the same.
    machine.add(CTRL, 0, &[(COMMAND, 3, false)]);
    machine.add(CTRL, 2, &[(!0xfff, 3, false), (ANSWER, 1, true)]);
    machine.add(CTRL, 4, &[(COMMAND, 3, false), (!0xfff, 1, true)]);
    machine.notify(CTRL);
    assert_eq!(machine.take_used(CTRL), Some((0, 0)));
    assert_eq!(machine.take_used(CTRL), Some((2, 1)));
    assert_eq!(machine.take_used(CTRL), Some((4, 0)));
    assert!(!machine.broken());
}

#[test]
fn commands_for_features_that_were_not_taken_fail() {
    let (device, _peer, told) = tap();
    let without = bit(VIRTIO_NET_F_CTRL_RX)
        | bit(VIRTIO_NET_F_CTRL_VLAN)
        | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
        | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
        | bit(VIRTIO_NET_F_GUEST_ANNOUNCE)
        | RECEIVE_OFFLOADS;
    let mut machine = Machine::started(device, 16, without);
    assert_eq!(told.load(Ordering::SeqCst), 0);
    for bytes in [
        vec![0, 0, 1],
        vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        vec![1, 1, 2, 3, 4, 5, 6, 7],
        vec![2, 0, 7, 0],
        vec![3, 0],
        vec![5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(command(&mut machine, &bytes), ERR, "{bytes:?}");
    }
}

#[test]
fn the_filter_is_what_the_driver_says() {
    let (device, peer) = wire();
    let counters = device.counters();
    let mut machine = Machine::started(device, 64, 0);
    for at in 0..32 {
        machine.add(RX, at, &[(BUFFERS + u64::from(at) * 0x400, 0x400, true)]);
    }
    machine.notify(RX);
    let arrives = |machine: &mut Machine, to| {
        let before = counters.read();
        peer.send(&frame_to(to, 60, 1)).unwrap();
        machine.run();
        let after = counters.read();
        assert_eq!(after.frames_in + after.filtered_in, before.frames_in + before.filtered_in + 1);
        after.frames_in > before.frames_in
    };
    let new: Mac = [2, 7, 7, 7, 7, 7];
    assert!(arrives(&mut machine, OTHER));
    assert_eq!(command(&mut machine, &[0, 0, 0]), OK);
    assert!(arrives(&mut machine, MAC) && !arrives(&mut machine, OTHER));
    assert_eq!(command(&mut machine, &[vec![1, 1], new.to_vec()].concat()), OK);
    assert!(arrives(&mut machine, new) && !arrives(&mut machine, MAC));
    let table = [vec![1, 0, 1, 0, 0, 0], OTHER.to_vec(), vec![0; 4]].concat();
    assert_eq!(command(&mut machine, &table), OK);
    assert!(arrives(&mut machine, OTHER) && arrives(&mut machine, [0xff; 6]));
    // A reset forgets it all.
    machine.start(64, 0);
    machine.add(RX, 0, &[(BUFFERS, 0x400, true)]);
    machine.notify(RX);
    assert!(arrives(&mut machine, [4; 6]));
    assert_eq!(read_config::<6>(&mut machine, 0), MAC);
}

#[test]
fn a_wire_whose_other_end_closes_is_a_link_that_is_down() {
    let (ours, theirs) = socket_pair(libc::SOCK_SEQPACKET);
    let device = Box::new(Net::new(Link::wire(ours).unwrap(), config()));
    let counters = device.counters();
    let mut machine = Machine::started(device, 16, 0);
    machine.add(RX, 0, &[(BUFFERS, 0x800, true)]);
    machine.notify(RX);
    machine.set(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    let generation = machine.get(VIRTIO_MMIO_CONFIG_GENERATION);
    drop(theirs);
    machine.run();
    assert_eq!(status(&mut machine), 0);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_ne!(machine.get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    assert_eq!(link_interest(&machine), None);
    offer(&mut machine, 0, &frame(60, 1));
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), Some((0, 0)), "the guest is not kept waiting");
    assert_eq!(counters.read().dropped_out_no_link, 1);
}

fn socket_pair(kind: libc::c_int) -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    use std::os::fd::FromRawFd;
    let mut pair = [0; 2];
    // SAFETY: socketpair fills the array, and what it opened belongs to nobody else.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr()), 0);
        (FromRawFd::from_raw_fd(pair[0]), FromRawFd::from_raw_fd(pair[1]))
    }
}

#[test]
fn what_is_no_link_is_refused() {
    let (stream, _) = socket_pair(libc::SOCK_STREAM);
    assert!(matches!(Link::wire(stream), Err(link::LinkError::Wire)));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Link::wire(file.try_clone().unwrap().into()), Err(link::LinkError::Wire)));
    assert!(matches!(Link::tap(file.into()), Err(link::LinkError::Tap { call: "TUNGETIFF", .. })));
}

/// A limited interface lets frames wait: on their way out in the ring, on their way in at the link.
#[test]
fn a_limited_interface_drops_nothing() {
    let limited = || {
        let (mut device, peer) = wire();
        let rate = Rate { bytes: None, operations: Some(1) };
        device.limit(&Rates { network: rate, ..Rates::default() }).unwrap();
        (device, peer)
    };
    let (device, peer) = limited();
    let counters = device.counters();
    let mut machine = Machine::started(device, 16, 0);
    for at in 0..3 {
        offer(&mut machine, at, &frame(60, at as u8));
        machine.add(RX, at, &[(BUFFERS + u64::from(at) * 0x1000, 0x1000, true)]);
        peer.send(&frame(60, 100 + at as u8)).unwrap();
    }
    machine.notify(TX);
    machine.notify(RX);
    // A bucket's one, and one that it owes.
    assert_eq!((receive(&peer), receive(&peer)), (Some(frame(60, 0)), Some(frame(60, 1))));
    assert_eq!((receive(&peer), machine.used_index(RX)), (None, 2));

    // A clone's buckets are full: it sends what the source had not sent yet.
    let saved = machine.transport.lock().save().unwrap();
    let (device, its_peer) = limited();
    let mut copy = machine.copy_with(device);
    copy.transport.lock().restore(&saved, false, &copy.memory).unwrap();
    copy.transport.lock().kick_after_restore();
    copy.run();
    assert_eq!((receive(&its_peer), receive(&its_peer)), (Some(frame(60, 2)), None));

    let mut last = None;
    while last.is_none() || machine.used_index(RX) < 3 {
        machine.wait();
        last = last.or_else(|| receive(&peer));
    }
    assert_eq!(last, Some(frame(60, 2)));
    let counted = counters.read();
    assert_eq!((counted.frames_in, counted.frames_out), (3, 3));
    assert!(!machine.broken());
}
