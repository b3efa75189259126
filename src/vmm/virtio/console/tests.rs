//! The console between a driver and a socket's other end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::vmm::virtio::testing::{BUFFERS, MEMORY_BYTES, Machine};

const RX: u16 = RECEIVE as u16;
const TX: u16 = TRANSMIT as u16;

fn started() -> (Machine, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Machine::started(Box::new(Console::new(ours)), 16, 0), theirs)
}

/// Descriptors that the device wants watched besides its kick.
fn socket_interest(machine: &Machine) -> Option<(bool, bool)> {
    machine.transport.lock().host_interest().get(1).map(|interest| (interest.readable, interest.writable))
}

/// All that can be read now.
fn drain(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = vec![];
    let mut part = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut part) {
        all.extend_from_slice(&part[..count]);
    }
    all
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 253) as u8).collect()
}

#[test]
fn bytes_go_both_ways() {
    let (mut machine, mut peer) = started();
    machine.write_bytes(BUFFERS, b"hello from the guest");
    machine.add(TX, 0, &[(BUFFERS, 6, false), (BUFFERS + 6, 14, false)]);
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), Some((0, 0)));
    assert_eq!(drain(&mut peer), b"hello from the guest");
    peer.write_all(b"and back").unwrap();
    machine.run();
    assert_eq!(machine.take_used(RX), None, "no buffer, so the bytes stay in the socket");
    machine.add(RX, 0, &[(BUFFERS + 0x1000, 3, true), (BUFFERS + 0x2000, 100, true)]);
    machine.edges.take();
    machine.notify(RX);
    assert_eq!(machine.take_used(RX), Some((0, 8)));
    assert_eq!(machine.edges.take(), 1);
    assert_eq!(machine.read_bytes(BUFFERS + 0x1000, 3), b"and");
    assert_eq!(machine.read_bytes(BUFFERS + 0x2000, 5), b" back");
}

#[test]
fn the_socket_is_watched_only_while_there_is_something_to_do() {
    let (mut machine, mut peer) = started();
    assert_eq!(socket_interest(&machine), None);
    machine.add(RX, 0, &[(BUFFERS, 4, true)]);
    machine.notify(RX);
    assert_eq!(socket_interest(&machine), Some((true, false)));
    peer.write_all(b"0123456").unwrap();
    machine.run();
    assert_eq!(machine.take_used(RX), Some((0, 4)));
    assert_eq!(socket_interest(&machine), None, "the buffers are used up, bytes are left: no busy loop");
    machine.add(RX, 1, &[(BUFFERS, 4, true)]);
    machine.notify(RX);
    assert_eq!(machine.take_used(RX), Some((1, 3)));
    // A reset takes the interest away as well.
    machine.add(RX, 2, &[(BUFFERS, 4, true)]);
    machine.notify(RX);
    assert!(socket_interest(&machine).is_some());
    machine.set(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(socket_interest(&machine), None);
}

#[test]
fn buffers_given_before_driver_ok_are_used() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut machine = Machine::started(Box::new(Console::new(ours)), 16, 0);
    peer.write_all(b"early").unwrap();
    machine.add(RX, 0, &[(BUFFERS, 16, true)]);
    machine.notify(RX);
    assert_eq!(machine.take_used(RX), Some((0, 5)));
}

#[test]
fn a_full_socket_holds_the_chain_until_the_peer_reads() {
    let (mut machine, mut peer) = started();
    let data = pattern(2 << 20);
    machine.write_bytes(BUFFERS, &data);
    machine.add(TX, 0, &[(BUFFERS, data.len() as u32, false)]);
    machine.write_bytes(BUFFERS + data.len() as u64, b"next");
    machine.add(TX, 1, &[(BUFFERS + data.len() as u64, 4, false)]);
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), None);
    assert_eq!(socket_interest(&machine), Some((false, true)));
    // Another notification changes nothing.
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), None);
    let mut got = vec![];
    while machine.used_index(TX) < 2 {
        let part = drain(&mut peer);
        assert!(!part.is_empty(), "it must go on when the peer has read");
        got.extend(part);
        machine.run();
    }
    got.extend(drain(&mut peer));
    assert_eq!(got.len(), data.len() + 4);
    assert!(got[..data.len()] == data && &got[data.len()..] == b"next");
    assert_eq!(socket_interest(&machine), None);
}

#[test]
fn a_chain_half_sent_at_the_snapshot_is_finished_by_the_clone() {
    let (mut source, mut peer) = started();
    let data = pattern(1 << 20);
    source.write_bytes(BUFFERS, &data);
    source.add(TX, 0, &[(BUFFERS, data.len() as u32, false)]);
    source.notify(TX);
    let state = source.transport.lock().save().unwrap();
    let (ours, mut clones_peer) = UnixStream::pair().unwrap();
    clones_peer.set_nonblocking(true).unwrap();
    let mut clone = source.copy_with(Box::new(Console::new(ours)));
    clone.transport.lock().restore(&state, false, &clone.memory).unwrap();
    clone.transport.lock().kick_after_restore();
    clone.run();
    let finish = |machine: &mut Machine, peer: &mut UnixStream| {
        let mut got = vec![];
        while machine.used_index(TX) < 1 {
            got.extend(drain(peer));
            machine.run();
        }
        got.extend(drain(peer));
        got
    };
    let rest = finish(&mut clone, &mut clones_peer);
    let all = finish(&mut source, &mut peer);
    assert!(all == data, "the source sends all of it to its own peer");
    assert!(!rest.is_empty() && rest.len() < data.len() && data.ends_with(&rest), "the clone only the rest");
}

#[test]
fn receive_buffers_given_before_the_snapshot_serve_the_clone() {
    let (mut source, _peer) = started();
    source.add(RX, 0, &[(BUFFERS, 16, true)]);
    source.notify(RX);
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut clone = source.copy_with(Box::new(Console::new(ours)));
    clone.transport.lock().restore(&source.transport.lock().save().unwrap(), false, &clone.memory).unwrap();
    clone.transport.lock().kick_after_restore();
    peer.write_all(b"for the clone").unwrap();
    clone.run();
    assert_eq!(clone.take_used(RX), Some((0, 13)));
    assert_eq!(clone.read_bytes(BUFFERS, 13), b"for the clone");
}

#[test]
fn a_peer_that_is_gone_swallows_output_and_costs_nothing() {
    let (mut machine, peer) = started();
    machine.add(RX, 0, &[(BUFFERS, 16, true)]);
    machine.notify(RX);
    drop(peer);
    machine.run();
    assert_eq!(socket_interest(&machine), None, "the hang-up was seen, nothing is watched any more");
    assert_eq!(machine.take_used(RX), None);
    for at in 0..40 {
        machine.add(TX, at % 8, &[(BUFFERS, 1 << 20, false)]);
        machine.notify(TX);
        assert!(machine.take_used(TX).is_some());
    }
    assert!(!machine.broken());
}

#[test]
fn a_peer_that_goes_while_output_waits_lets_it_go() {
    let (mut machine, peer) = started();
    machine.add(TX, 0, &[(BUFFERS, 4 << 20, false)]);
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), None);
    drop(peer);
    machine.run();
    assert_eq!(machine.take_used(TX), Some((0, 0)));
    assert_eq!(socket_interest(&machine), None);
}

#[test]
fn a_peer_that_only_reads_still_gets_output() {
    let (mut machine, mut peer) = started();
    peer.shutdown(Shutdown::Write).unwrap();
    machine.add(RX, 0, &[(BUFFERS, 16, true)]);
    machine.notify(RX);
    assert_eq!(socket_interest(&machine), None);
    machine.write_bytes(BUFFERS, b"still here");
    machine.add(TX, 0, &[(BUFFERS, 10, false)]);
    machine.notify(TX);
    assert_eq!(drain(&mut peer), b"still here");
}

#[test]
fn wrong_chains_stop_the_device_and_lose_no_input() {
    let wrong: [&[(u64, u32, bool)]; 4] = [
        &[(BUFFERS, 16, false)],
        &[(u64::MAX, 16, true)],
        &[(MEMORY_BYTES - 1, 2, true)],
        &[(BUFFERS, 0, true)],
    ];
    for buffers in wrong {
        let (mut machine, mut peer) = started();
        peer.write_all(b"precious").unwrap();
        machine.add(RX, 0, buffers);
        machine.notify(RX);
        assert!(machine.broken(), "{buffers:?}");
        assert_eq!(socket_interest(&machine), None);
        machine.start(16, 0);
        machine.add(RX, 0, &[(BUFFERS, 16, true)]);
        machine.notify(RX);
        assert_eq!(machine.take_used(RX), Some((0, 8)), "{buffers:?}");
        assert_eq!(machine.read_bytes(BUFFERS, 8), b"precious");
    }
    let (mut machine, _peer) = started();
    machine.add(TX, 0, &[(u64::MAX - 4, 16, false)]);
    machine.notify(TX);
    assert!(machine.broken());
}

#[test]
fn odd_transmit_chains_are_harmless() {
    let (mut machine, mut peer) = started();
    machine.add(TX, 0, &[(BUFFERS, 0, false)]);
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), Some((0, 0)));
    // Only writable buffers: nothing to send.
    machine.add(TX, 0, &[(BUFFERS, 100, true)]);
    machine.notify(TX);
    assert_eq!(machine.take_used(TX), Some((0, 0)));
    assert!(drain(&mut peer).is_empty() && !machine.broken());
}

#[test]
fn a_saved_offset_beyond_its_chain_counts_as_sent() {
    for transmit_offset in [10, 11, u64::MAX] {
        let (mut source, _peer) = started();
        let mut state = source.transport.lock().save().unwrap();
        state.device = codec::encode(&ConsoleState::V1 {
            transmit_offset,
            transmit_blocked: true,
            receive_buffers: true,
        })
        .unwrap();
        source.transport.lock().restore(&state, false, &source.memory).unwrap();
        source.run();
        source.write_bytes(BUFFERS, &[b'x'; 10]);
        source.add(TX, 0, &[(BUFFERS, 10, false)]);
        source.notify(TX);
        assert_eq!(source.take_used(TX), Some((0, 0)));
        source.add(TX, 0, &[(BUFFERS, 10, false)]);
        source.notify(TX);
        assert_eq!(source.take_used(TX), Some((0, 0)));
    }
}

#[test]
fn the_configuration_space_is_short() {
    let (machine, _peer) = started();
    let mut data = [0xff; 64];
    machine.transport.read(0x100, &mut data);
    assert_eq!(data[4], 1);
    assert_eq!(data.iter().map(|byte| u32::from(*byte)).sum::<u32>(), 1);
    machine.transport.write(0x100, &[0xff; 8], &machine.memory);
    machine.transport.write(0x108, &[b'!', 0, 0, 0], &machine.memory);
}

proptest! {
    /// Whatever the sizes of writes, buffers and reads: the stream is the same, in both directions at once.
    #[test]
    fn streams_keep_every_byte_in_order(
        sizes in proptest::collection::vec((1u32..5000, 1u32..5000, 1usize..9000), 1..60),
        without in prop_oneof![Just(0u64), Just(1 << 29)],
    ) {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        let mut machine = Machine::started(Box::new(Console::new(ours)), 4, without);
        let (mut sent, mut received): (Vec<u8>, Vec<u8>) = (vec![], vec![]);
        let (mut to_guest, mut in_guest): (Vec<u8>, Vec<u8>) = (vec![], vec![]);
        let mut value = 0u8;
        let mut next = |bytes: usize| -> Vec<u8> {
            (0..bytes).map(|_| { value = value.wrapping_mul(5).wrapping_add(7); value }).collect()
        };
        for (transmit, buffer, feed) in sizes {
            let data = next(transmit as usize);
            machine.write_bytes(BUFFERS, &data);
            sent.extend(&data);
            machine.add(TX, 0, &[(BUFFERS, transmit / 2, false), (BUFFERS + u64::from(transmit / 2), transmit - transmit / 2, false)]);
            machine.notify(TX);
            received.extend(drain(&mut peer));
            machine.run();
            received.extend(drain(&mut peer));
            prop_assert_eq!(machine.take_used(TX), Some((0, 0)));
            let data = next(feed);
            if let Ok(count) = peer.write(&data) {
                to_guest.extend(&data[..count]);
            }
            machine.add(RX, 0, &[(BUFFERS + 0x10000, buffer, true)]);
            machine.notify(RX);
            let (_, got) = machine.take_used(RX).unwrap();
            in_guest.extend(machine.read_bytes(BUFFERS + 0x10000, got as usize));
        }
        prop_assert!(received == sent);
        prop_assert!(!in_guest.is_empty() && to_guest.starts_with(&in_guest));
    }
}

/// A byte that says how many KiB follow.
fn counted(bytes: &[u8]) -> Option<usize> {
    bytes.first().map(|count| 1 + usize::from(*count) * 1024)
}

/// As when the daemon is killed in the middle of a large request: the guest gets nothing of it, and what the next one says.
#[test]
fn of_a_message_whose_sender_died_in_the_middle_the_guest_gets_nothing() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut machine = Machine::started(Box::new(Console::of_messages(ours, counted)), 16, 0);
    for entry in 0..4 {
        machine.add(RX, entry, &[(BUFFERS + u64::from(entry) * 0x1_0000, 0x1_0000, true)]);
    }
    machine.notify(RX);
    let whole = [&[0u8][..], &[1], &[0x11; 1024]].concat();
    peer.write_all(&whole).unwrap();
    peer.write_all(&[&[200u8][..], &[0x22; 100_000]].concat()).unwrap();
    machine.run();
    machine.run();
    assert_eq!(machine.take_used(RX), Some((0, whole.len() as u32)), "what was whole");
    assert_eq!(machine.read_bytes(BUFFERS, whole.len()), whole);
    assert_eq!(machine.take_used(RX), None, "a part of a message");
    // More that was sent, and that the device has not looked at.
    peer.write_all(&[0x22; 20_000]).unwrap();
    machine.transport.lock().new_peer();
    peer.write_all(&[&[1u8][..], &[0x33; 1024]].concat()).unwrap();
    machine.run();
    assert_eq!(machine.take_used(RX), Some((1, 1025)));
    assert_eq!(machine.read_bytes(BUFFERS + 0x1_0000, 2), [1, 0x33]);
}

/// What is whole and waits in the device reaches the guest after the change, too.
#[test]
fn what_is_whole_outlives_its_sender() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let mut machine = Machine::started(Box::new(Console::of_messages(ours, counted)), 16, 0);
    peer.write_all(&[&[30u8][..], &[0x44; 30 << 10], &[9], &[0x55; 100]].concat()).unwrap();
    machine.transport.lock().new_peer();
    let mut got = 0;
    for entry in 0..8 {
        machine.add(RX, entry, &[(BUFFERS, 0x1000, true)]);
        machine.notify(RX);
        machine.run();
        got += machine.take_used(RX).map_or(0, |(_, bytes)| bytes);
    }
    assert_eq!(got, 1 + (30 << 10));
    // The buffer that was given in vain is for the next one.
    machine.add(RX, 8, &[(BUFFERS, 0x1000, true)]);
    machine.notify(RX);
    peer.write_all(&[0]).unwrap();
    machine.run();
    assert_eq!(machine.take_used(RX).map(|(_, bytes)| bytes), None.or(Some(1)));
}
