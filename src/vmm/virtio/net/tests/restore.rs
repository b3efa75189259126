//! Network devices that are saved and restored.

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use super::*;

/// Restores `source`'s state into a machine with another link.
fn clone_of(source: &Machine, device: Net) -> Machine {
    let state = source.transport.lock().save().unwrap();
    let mut clone = source.copy_with(Box::new(device));
    clone.transport.lock().restore(&state, false, &clone.memory).unwrap();
    clone.transport.lock().kick_after_restore();
    clone.run();
    clone
}

#[test]
fn a_clone_goes_on_where_the_source_stood() {
    let (device, peer, _) = tap();
    let mut source = Machine::started(device, 256, 0);
    // A frame that waits for buffers.
    source.add(RX, 0, &[(BUFFERS, 100, true)]);
    source.notify(RX);
    peer.send(&frame(300, 7)).unwrap();
    source.run();
    assert_eq!(source.used_index(RX), 0);
    // More to send than the link takes.
    for at in 0..200u16 {
        large(&mut source, at);
    }
    source.notify(TX);
    let sent = source.used_index(TX);
    assert!((1..200).contains(&sent));
    // Commands that are to hold on.
    assert_eq!(command(&mut source, &[0, 0, 0]), OK);
    assert_eq!(command(&mut source, &[1, 1, 2, 3, 4, 5, 6, 7]), OK);
    assert_eq!(command(&mut source, &[2, 0, 9, 0]), OK);
    assert_eq!(command(&mut source, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), OK);

    let (ours, clones_peer) = UnixDatagram::pair().unwrap();
    clones_peer.set_nonblocking(true).unwrap();
    let told = Arc::<AtomicU32>::default();
    let mut clone = clone_of(&source, Net::for_restore(Link::imitation(ours.into(), told.clone())));
    assert_eq!(told.load(Ordering::SeqCst), libc::TUN_F_CSUM, "GUEST_CSUM alone, as commanded");
    for at in sent..200 {
        assert_eq!(receive(&clones_peer), Some(frame(8000, at as u8)), "frame {at}");
        clone.run();
    }
    assert_eq!(clone.used_index(TX), 200);
    clone.add(RX, 1, &[(BUFFERS + 0x1000, 2048, true)]);
    clone.notify(RX);
    assert_eq!(clone.take_used(RX), Some((0, 100)));
    assert_eq!(clone.take_used(RX), Some((1, 212)));
    assert_eq!(clone.read_bytes(BUFFERS + 0x1000, 212), frame(300, 7)[100..]);
    assert_eq!(read_config::<6>(&mut clone, 0), [2, 3, 4, 5, 6, 7]);
    assert_eq!(read_config::<2>(&mut clone, 10), 1400u16.to_le_bytes());
    // The filter came along.
    clone.add(RX, 2, &[(BUFFERS, 2048, true)]);
    clone.notify(RX);
    clones_peer.send(&frame(60, 1)).unwrap();
    clones_peer.send(&frame_to([2, 3, 4, 5, 6, 7], 61, 1)).unwrap();
    clone.run();
    assert_eq!(clone.take_used(RX), Some((2, 73)));
    // Its driver is asked to make itself known, once.
    assert_eq!(status(&mut clone), (VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE) as u16);
    assert_ne!(clone.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
    assert_eq!(command(&mut clone, &[3, 0]), OK);
    assert_eq!(status(&mut clone), VIRTIO_NET_S_LINK_UP as u16);
    // The source sends what it had to send, too.
    for at in 0..200 {
        assert_eq!(receive(&peer), Some(frame(8000, at as u8)), "frame {at} of the source");
        source.run();
    }
    // After a reset the clone shows what the source was made with.
    clone.start(16, 0);
    assert_eq!(read_config::<6>(&mut clone, 0), MAC);
}

#[test]
fn a_clone_without_a_link_sees_it_go_down_and_is_not_kept_waiting() {
    let (device, _peer, _) = tap();
    let mut source = Machine::started(device, 256, 0);
    for at in 0..200u16 {
        large(&mut source, at);
    }
    source.notify(TX);
    assert!(source.used_index(TX) < 200);
    source.set(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    let mut clone = source.copy_with(Box::new(Net::for_restore(Link::Down)));
    clone.transport.lock().restore(&source.transport.lock().save().unwrap(), false, &clone.memory).unwrap();
    clone.transport.lock().kick_after_restore();
    clone.run();
    assert_eq!(clone.used_index(TX), 200);
    assert_eq!(status(&mut clone), 0);
    assert_ne!(clone.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
    // A clone of that one with a link comes up again.
    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    clone.set(VIRTIO_MMIO_INTERRUPT_ACK, 3);
    let mut again = clone_of(&clone, Net::for_restore(Link::imitation(ours.into(), Arc::default())));
    assert_eq!(status(&mut again) & VIRTIO_NET_S_LINK_UP as u16, VIRTIO_NET_S_LINK_UP as u16);
    assert_ne!(again.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0);
}

/// Offers a frame of 8000 bytes.
fn large(machine: &mut Machine, at: u16) {
    let place = OUT + u64::from(at) * 0x2000;
    machine.write_bytes(place, &frame(8000, at as u8));
    machine.add(TX, at, &[(place, 8012, false)]);
}

#[test]
fn a_link_that_can_do_less_than_the_driver_uses_is_refused() {
    let (device, _peer, _) = tap();
    let source = Machine::started(device, 16, 0);
    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    let device = Net::for_restore(Link::wire(ours.into()).unwrap());
    let mut clone = source.copy_with(Box::new(device));
    let error = clone
        .transport
        .lock()
        .restore(&source.transport.lock().save().unwrap(), false, &clone.memory)
        .unwrap_err();
    assert!(error.to_string().contains("a link that can do as much"), "{error}");
    assert_eq!(clone.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}
