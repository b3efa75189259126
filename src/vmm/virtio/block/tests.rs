//! The block device behind its transport, with a driver that is honest, odd, or hostile.

use std::fs::File;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::*;
use crate::vmm::virtio::rate::Rate;
use crate::vmm::virtio::testing::{BUFFERS, INDIRECT, Machine, NEXT, WRITE};

const DISK_BYTES: u64 = 1 << 20;
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;
const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn shared(overlay: Option<File>) -> SharedDisk {
    Arc::new(LayeredDisk::open(None, vec![], overlay, DISK_BYTES).unwrap())
}

fn block(disk: SharedDisk, serial: &str) -> Block {
    Block::new(disk, serial, Pool::new()).unwrap()
}

fn started() -> (Machine, SharedDisk) {
    let disk = shared(Some(file()));
    (Machine::started(Box::new(block(disk.clone(), "serial-of-a-disk-that-is-long")), 16, 0), disk)
}

/// Sends one request in the usual three parts and returns its status and used length.
fn request(machine: &mut Machine, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
    put_header(machine, HEADER, kind, sector);
    machine.write_bytes(STATUS, &[0xee]);
    let mut buffers = vec![(HEADER, 16, false)];
    buffers.extend_from_slice(data);
    buffers.push((STATUS, 1, true));
    machine.add(0, 0, &buffers);
    machine.notify(0);
    let (head, bytes) = machine.take_used(0).expect("the request is answered");
    assert_eq!(head, 0);
    (machine.read_bytes(STATUS, 1)[0], bytes)
}

fn put_header(machine: &Machine, at: u64, kind: u32, sector: u64) {
    machine.write_bytes(at, &kind.to_le_bytes());
    machine.write_bytes(at + 4, &[0; 4]);
    machine.write_bytes(at + 8, &sector.to_le_bytes());
}

fn put_range(machine: &Machine, at: u64, sector: u64, sectors: u32, flags: u32) {
    machine.write_bytes(at, &sector.to_le_bytes());
    machine.write_bytes(at + 8, &sectors.to_le_bytes());
    machine.write_bytes(at + 12, &flags.to_le_bytes());
}

#[test]
fn what_is_written_is_read() {
    let (mut machine, disk) = started();
    let pattern: Vec<u8> = (0..8192u32).map(|at| (at / 3) as u8).collect();
    machine.write_bytes(DATA, &pattern);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_OUT, 9, &[(DATA, 8192, false)]), (OK, 1));
    let mut on_disk = vec![0; 8192];
    disk.read_at(&mut on_disk, 9 * 512).unwrap();
    assert_eq!(on_disk, pattern);
    let parts = [(DATA + 0x10000, 512, true), (DATA + 0x20000, 7680, true)];
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 9, &parts), (OK, 8193));
    assert_eq!(machine.read_bytes(DATA + 0x10000, 512), pattern[..512]);
    assert_eq!(machine.read_bytes(DATA + 0x20000, 7680), pattern[512..]);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(machine.edges.take(), 3);
}

#[test]
fn the_serial_is_cut_to_20_bytes() {
    let (mut machine, _) = started();
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(machine.read_bytes(DATA, 20), b"serial-of-a-disk-tha");
    // FreeBSD gives more room than 20 bytes in some versions; the rest is not touched, and not claimed.
    machine.write_bytes(DATA, &[7; 64]);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 64, true)]), (OK, 20));
    assert_eq!(machine.read_bytes(DATA + 20, 44), [7; 44]);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)]).0, IOERR);
}

#[test]
fn the_configuration_space_tells_the_disk() {
    let (mut machine, _) = started();
    let field = |machine: &mut Machine, offset: u64, bytes: usize| {
        let mut data = [0; 8];
        machine.transport.read(0x100 + offset, &mut data[..bytes]);
        u64::from_le_bytes(data)
    };
    assert_eq!(field(&mut machine, 0, 8), DISK_BYTES / 512);
    assert_eq!(field(&mut machine, 4, 4), 0);
    assert_eq!(field(&mut machine, 12, 4), 254);
    assert_eq!(field(&mut machine, 20, 4), 512);
    assert_eq!(field(&mut machine, 24, 1), 3);
    assert_eq!(field(&mut machine, 26, 2), 8);
    let mut data = [0xff; 16];
    machine.transport.read(0x100 + 56, &mut data);
    assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    machine.transport.read(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 16]);
    let offered = machine.offered();
    assert_eq!(offered & (1 << VIRTIO_BLK_F_SIZE_MAX), 0);
    for feature in [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, 28, 29, 32] {
        assert_ne!(offered & (1 << feature), 0, "feature {feature}");
    }
    assert_eq!(offered & (1 << VIRTIO_BLK_F_RO), 0);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut machine = Machine::started(Box::new(block(shared(None), "x")), 16, 0);
    let offered = machine.offered();
    assert_ne!(offered & (1 << VIRTIO_BLK_F_RO), 0);
    assert_eq!(offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]).0, IOERR);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]).0, OK);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, UNSUPP);
}

#[test]
fn wrong_requests_get_an_error_status_and_the_device_goes_on() {
    let (mut machine, _) = started();
    let last = DISK_BYTES / 512;
    for (sector, bytes) in [(last, 512), (last - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, sector, &[(DATA, bytes, true)]).0, IOERR);
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_OUT, sector, &[(DATA, bytes, false)]).0, IOERR);
    }
    // Data outside guest memory, at its end, and at the end of the address space.
    for address in [1 << 40, crate::vmm::virtio::testing::MEMORY_BYTES - 256, u64::MAX - 100] {
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(address, 512, true)]), (IOERR, 0));
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_OUT, 0, &[(address, 512, false)]).0, IOERR);
    }
    for kind in [2, 3, 5, 15, 24, 0x8000_0000, u32::MAX] {
        assert_eq!(request(&mut machine, kind, 0, &[]).0, UNSUPP);
    }
    // A header that is too short.
    machine.add(0, 0, &[(HEADER, 15, false), (STATUS, 1, true)]);
    machine.notify(0);
    assert!(machine.take_used(0).is_some());
    assert_eq!(machine.read_bytes(STATUS, 1), [IOERR]);
    // More than fits one request: 4 GiB in one descriptor.
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 0xffff_fe00, true)]).0, IOERR);
    assert!(!machine.broken());
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn zeroes_and_discards() {
    let (mut machine, disk) = started();
    let fill = |value: u8| disk.write_at(&[value; 65536], 0).unwrap();
    let byte = |offset: u64| {
        let mut byte = [0xee];
        disk.read_at(&mut byte, offset).unwrap();
        byte[0]
    };
    fill(7);
    put_range(&machine, DATA, 1, 30, 1);
    put_range(&machine, DATA + 16, 64, 8, 0);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 32, false)]).0, OK);
    assert_eq!([byte(511), byte(512), byte(31 * 512 - 1), byte(31 * 512)], [7, 0, 0, 7]);
    assert_eq!([byte(64 * 512 - 1), byte(64 * 512), byte(72 * 512)], [7, 0, 7]);
    fill(7);
    put_range(&machine, DATA, 1, 30, 0);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, OK);
    assert_eq!([byte(512), byte(4096), byte(3 * 4096 - 1), byte(3 * 4096)], [7, 0, 0, 7]);
    // Flags that do not exist, ranges outside, no range, half a range, too many ranges.
    put_range(&machine, DATA, 0, 8, 1);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, UNSUPP);
    put_range(&machine, DATA, 0, 8, 2);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, UNSUPP);
    for (sector, sectors) in [(DISK_BYTES / 512, 1), (u64::MAX, 1), (0, u32::MAX), (0, 4096)] {
        put_range(&machine, DATA, sector, sectors, 0);
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, IOERR);
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, IOERR);
    }
    for bytes in [8, 24, 33 * 16] {
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, bytes, false)]).0, IOERR);
    }
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[]).0, IOERR);
    assert!(!machine.broken());
}

#[test]
fn discard_without_its_feature_is_unsupported() {
    let without = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    let mut machine = Machine::started(Box::new(block(shared(Some(file())), "x")), 16, without);
    put_range(&machine, DATA, 0, 8, 0);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, UNSUPP);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, UNSUPP);
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut machine, _) = started();
    put_header(&machine, HEADER, VIRTIO_BLK_T_IN, 0);
    let table = BUFFERS + 0x40000;
    let mut descriptors = vec![(HEADER, 16, NEXT, 1)];
    descriptors.extend((0..64).map(|at| (DATA + at * 4096, 4096, NEXT | WRITE, at as u16 + 2)));
    descriptors.push((STATUS, 1, WRITE, 0));
    machine.put_table(table, &descriptors);
    machine.put_descriptors(0, 3, &[(table, descriptors.len() as u32 * 16, INDIRECT, 0)]);
    machine.make_available(0, 3);
    machine.notify(0);
    assert_eq!(machine.take_used(0), Some((3, 64 * 4096 + 1)));
    assert_eq!(machine.read_bytes(STATUS, 1), [OK]);
}

#[test]
fn a_chain_that_cannot_be_answered_stops_the_device_until_reset() {
    type Break = fn(&mut Machine);
    let table = BUFFERS + 0x40000;
    let breaks: [(&str, Break); 10] = [
        ("no status", |machine| machine.add(0, 0, &[(HEADER, 16, false)])),
        ("loop", |machine| {
            machine.put_descriptors(0, 0, &[(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)]);
            machine.make_available(0, 0);
        }),
        ("next outside", |machine| {
            machine.put_descriptors(0, 0, &[(HEADER, 16, NEXT, 16)]);
            machine.make_available(0, 0);
        }),
        ("head outside", |machine| machine.make_available(0, 16)),
        ("readable after writable", |machine| {
            machine.add(
                0,
                0,
                &[(HEADER, 16, false), (DATA, 512, true), (DATA, 512, false), (STATUS, 1, true)],
            );
        }),
        ("status outside memory", |machine| machine.add(0, 0, &[(HEADER, 16, false), (u64::MAX, 1, true)])),
        ("available index too far", |machine| {
            let index = machine.available_index(0);
            machine.set_available_index(0, index.wrapping_add(17));
        }),
        ("indirect table in an indirect table", |machine| {
            let table = BUFFERS + 0x40000;
            machine.put_table(table, &[(HEADER, 16, NEXT, 1), (table, 32, INDIRECT, 0)]);
            machine.put_descriptors(0, 0, &[(table, 32, INDIRECT, 0)]);
            machine.make_available(0, 0);
        }),
        ("indirect table of odd length", |machine| {
            machine.put_descriptors(0, 0, &[(BUFFERS + 0x40000, 31, INDIRECT, 0)]);
            machine.make_available(0, 0);
        }),
        ("indirect table outside memory", |machine| {
            machine.put_descriptors(0, 0, &[(1 << 40, 32, INDIRECT, 0)]);
            machine.make_available(0, 0);
        }),
    ];
    let (mut machine, _) = started();
    for (name, break_it) in breaks {
        machine.edges.take();
        break_it(&mut machine);
        machine.notify(0);
        assert!(machine.broken(), "{name}");
        assert_eq!(machine.edges.take(), 1, "{name}: the driver hears of it");
        // Nothing more happens, whatever is asked.
        machine.notify(0);
        assert_eq!(machine.edges.take(), 0, "{name}");
        machine.start(16, 0);
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513), "{name}");
    }
    // A table as long as a descriptor can tell, all of it one chain.
    let descriptors: Vec<_> = (0..65535).map(|at| (DATA, 1, NEXT | WRITE, at + 1)).collect();
    machine.put_table(table, &descriptors);
    machine.put_descriptors(0, 0, &[(table, 65535 * 16, INDIRECT, 0)]);
    machine.make_available(0, 0);
    machine.notify(0);
    assert!(machine.broken());
}

#[test]
fn the_ring_goes_round_with_and_without_event_indices() {
    for without in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut machine = Machine::started(Box::new(block(shared(Some(file())), "x")), 4, without);
        for round in 0..70_000u32 {
            let (status, _) = request(&mut machine, VIRTIO_BLK_T_FLUSH, 0, &[]);
            assert_eq!(status, OK, "round {round}");
        }
        assert_eq!(machine.used_index(0), 70_000u32 as u16);
    }
}

/// Makes `count` reads of a sector available without waiting for them.
fn add_reads(machine: &mut Machine, count: u16, size: u16) {
    put_header(machine, HEADER, VIRTIO_BLK_T_IN, 0);
    for at in 0..count {
        let head = at * 3 % size;
        machine.add(0, head, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    }
}

#[test]
fn several_requests_are_under_way_and_a_pause_waits_for_them() {
    let (mut machine, disk) = started();
    machine.edges.take();
    let held = disk.hold();
    add_reads(&mut machine, 5, 16);
    machine.transport.lock().notify(0, &machine.memory);
    assert_eq!((machine.used_index(0), machine.edges.take()), (0, 0), "taken off the ring, not given back");
    drop(held);
    machine.transport.lock().quiesce(&machine.memory);
    assert_eq!(machine.used_index(0), 5);
    assert_eq!(machine.edges.take(), 1, "one interrupt for all");
    let saved = machine.transport.lock().save().unwrap();
    assert_eq!((saved.queues[0].next_available, saved.queues[0].next_used), (5, 5));
    // What was given back before is not given back again after.
    let mut copy = machine.copy_with(Box::new(block(disk, "x")));
    copy.transport.lock().restore(&saved, false, &copy.memory).unwrap();
    copy.transport.lock().kick_after_restore();
    copy.run();
    assert_eq!(copy.used_index(0), 5);
    let mut heads: Vec<u16> = (0..5).map(|_| machine.take_used(0).unwrap().0).collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 3, 6, 9, 12]);
    assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_driver_that_piles_up_requests_waits_and_none_is_lost() {
    let disk = shared(Some(file()));
    let mut machine = Machine::started(Box::new(block(disk.clone(), "x")), 256, 0);
    let held = disk.hold();
    // The ring is filled again before anything was given back: 200 and 200, of 256 at most.
    for _ in 0..2 {
        add_reads(&mut machine, 200, 240);
        machine.transport.lock().notify(0, &machine.memory);
    }
    let state = machine.transport.lock().save().unwrap();
    assert_eq!(state.queues[0].next_available, IN_FLIGHT_MAX as u16);
    drop(held);
    machine.run();
    assert_eq!(machine.used_index(0), 400);
    assert!(!machine.broken());
}

#[test]
fn a_reset_ends_what_is_under_way() {
    let (mut machine, disk) = started();
    for _ in 0..20 {
        std::thread::scope(|scope| {
            let (held, wait) = std::sync::mpsc::channel();
            let (go, gate) = std::sync::mpsc::channel::<()>();
            let disk = &disk;
            scope.spawn(move || {
                let _held = disk.hold();
                held.send(()).unwrap();
                let _ = gate.recv();
            });
            wait.recv().unwrap();
            add_reads(&mut machine, 5, 16);
            machine.transport.lock().notify(0, &machine.memory);
            drop(go);
            machine.start(16, 0);
        });
        assert_eq!(machine.used_index(0), 0, "nothing of before the reset reaches the new rings");
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
    }
}

#[test]
fn a_direct_disk_has_every_write_in_its_file() {
    let handle = file();
    handle.set_len(DISK_BYTES).unwrap();
    for without in [0, 1 << VIRTIO_BLK_F_FLUSH] {
        let disk = Arc::new(LayeredDisk::open_direct(handle.try_clone().unwrap(), DISK_BYTES).unwrap());
        let mut machine = Machine::started(Box::new(block(disk, "x")), 16, without);
        machine.write_bytes(DATA, &[without as u8 | 1; 1024]);
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_OUT, 4, &[(DATA, 1024, false)]), (OK, 1));
        assert_eq!(request(&mut machine, VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        let mut bytes = [0; 1024];
        std::os::unix::fs::FileExt::read_exact_at(&handle, &mut bytes, 2048).unwrap();
        assert_eq!(bytes, [without as u8 | 1; 1024]);
    }
}

#[test]
fn state_is_taken_over_only_for_the_same_disk() {
    let saved = block(shared(Some(file())), "x").save().unwrap();
    assert!(block(shared(Some(file())), "y").restore(&saved).is_ok());
    assert!(matches!(block(shared(None), "x").restore(&saved), Err(DeviceError::Mismatch { .. })));
    let other = Arc::new(LayeredDisk::open(None, vec![], Some(file()), 512).unwrap());
    let error = block(other, "x").restore(&saved).unwrap_err().to_string();
    assert!(error.contains("1048576") && error.contains("512"), "{error}");
    assert!(matches!(block(shared(None), "x").restore(&[9, 9]), Err(DeviceError::Codec { .. })));
}

proptest! {
    /// Clause 2.7.4.3: a driver may split a request over descriptors as it likes.
    #[test]
    fn any_split_of_a_request_is_the_same_request(
        write in any::<bool>(),
        cuts in proptest::collection::btree_set(1u32..1040, 0..10),
    ) {
        let (mut machine, disk) = started();
        let pattern: Vec<u8> = (0..1024u32).map(|at| (at % 251) as u8).collect();
        // The request as one run of bytes: header, data, status; the parts are laid far from each other.
        let mut bytes = vec![0; 16];
        bytes[0] = if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN } as u8;
        bytes[8] = 2;
        let readable = if write { 1040 } else { 16 };
        if write {
            bytes.extend_from_slice(&pattern);
        } else {
            disk.write_at(&pattern, 1024).unwrap();
            bytes.extend_from_slice(&[0xee; 1024]);
        }
        bytes.push(0xee);
        let mut ends: Vec<u32> = cuts.into_iter().filter(|cut| *cut != readable).collect();
        ends.extend([readable, 1041]);
        ends.sort_unstable();
        let mut start = 0;
        let mut buffers = vec![];
        for end in ends {
            let address = BUFFERS + u64::from(start) * 64;
            machine.write_bytes(address, &bytes[start as usize..end as usize]);
            buffers.push((address, end - start, start >= readable));
            start = end;
        }
        machine.add(0, 0, &buffers);
        machine.notify(0);
        let answered = machine.take_used(0);
        prop_assert_eq!(answered, Some((0, if write { 1 } else { 1025 })));
        let mut after = vec![];
        for (address, length, _) in &buffers {
            after.extend(machine.read_bytes(*address, *length as usize));
        }
        prop_assert_eq!(after[1040], OK);
        let mut on_disk = vec![0; 1024];
        disk.read_at(&mut on_disk, 1024).unwrap();
        prop_assert_eq!(&on_disk, &pattern);
        prop_assert_eq!(&after[16..1040], &pattern[..]);
    }

    /// Any sequence of requests, good and bad, leaves the disk as a plain vector of bytes would be, and ends each with a status.
    #[test]
    fn random_requests_are_those_of_a_vector_of_bytes(
        requests in proptest::collection::vec(
            (0u32..16, prop_oneof![0u64..64, 2040u64..2056, any::<u64>()], 0u32..40, any::<u8>(), 0u32..3),
            1..30,
        ),
        read_only in any::<bool>(),
    ) {
        let disk = shared((!read_only).then(file));
        let mut machine = Machine::started(Box::new(block(disk.clone(), "x")), 16, 0);
        let mut model = vec![0u8; DISK_BYTES as usize];
        for (kind, sector, sectors, value, flags) in requests {
            let bytes = sectors * 512;
            let start = sector.saturating_mul(512);
            let inside = start.saturating_add(bytes.into()) <= DISK_BYTES;
            let range = inside.then(|| start as usize..start as usize + bytes as usize);
            let zeroes = kind == VIRTIO_BLK_T_DISCARD || kind == VIRTIO_BLK_T_WRITE_ZEROES;
            let data = if zeroes {
                put_range(&machine, DATA, sector, sectors, flags);
                vec![(DATA, 16, false)]
            } else {
                machine.write_bytes(DATA, &vec![value; bytes as usize]);
                vec![(DATA, bytes, kind == VIRTIO_BLK_T_IN)]
            };
            let data = if bytes == 0 && !zeroes { vec![] } else { data };
            let (status, _) = request(&mut machine, kind, sector, &data);
            prop_assert!([OK, IOERR, UNSUPP].contains(&status));
            match (kind, &range, status) {
                (VIRTIO_BLK_T_IN, Some(range), status) => {
                    prop_assert_eq!(status, OK);
                    prop_assert_eq!(&machine.read_bytes(DATA, bytes as usize)[..], &model[range.clone()]);
                }
                (VIRTIO_BLK_T_OUT, Some(range), status) => {
                    prop_assert_eq!(status, if read_only { IOERR } else { OK });
                    if status == OK {
                        model[range.clone()].fill(value);
                    }
                }
                (VIRTIO_BLK_T_WRITE_ZEROES, Some(range), OK) => model[range.clone()].fill(0),
                (VIRTIO_BLK_T_DISCARD, Some(range), OK) => {
                    let (from, to) = (range.start.next_multiple_of(4096), range.end / 4096 * 4096);
                    if from < to {
                        model[from..to].fill(0);
                    }
                }
                (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, None, status) => prop_assert_eq!(status, IOERR),
                _ => {}
            }
        }
        let mut on_disk = vec![0; DISK_BYTES as usize];
        disk.read_at(&mut on_disk, 0).unwrap();
        prop_assert!(on_disk == model);
        prop_assert!(!machine.broken());
    }

    /// Whatever a guest writes into its rings: no panic, no endless work, and after a reset all is well.
    #[test]
    fn random_rings_do_no_harm(
        ring in proptest::collection::vec(any::<u8>(), 0x300),
        near in any::<bool>(),
        available in proptest::collection::vec(0u16..40, 16),
        count in 0u16..20,
    ) {
        let (mut machine, _) = started();
        let mut ring = ring;
        if near {
            // Addresses and lengths that are mostly possible reach deeper than wild ones.
            for descriptor in ring.chunks_exact_mut(16) {
                descriptor[2] &= 0x3f;
                descriptor[3..8].fill(0);
                descriptor[10..12].fill(0);
                descriptor[12] &= 7;
                descriptor[14] &= 0x1f;
                descriptor[15] = 0;
            }
        }
        machine.write_bytes(Machine::table(0), &ring);
        for (at, head) in available.iter().enumerate() {
            machine.write_bytes(Machine::available(0) + 4 + 2 * at as u64, &head.to_le_bytes());
        }
        machine.set_available_index(0, count);
        machine.notify(0);
        machine.start(16, 0);
        prop_assert_eq!(request(&mut machine, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
    }
}

/// A limited disk leaves what is too much in the ring, and does it when its time has come: here, or in a clone, whose bucket is full.
#[test]
fn a_limited_disk_does_everything_in_its_time() {
    let limited = |bytes| {
        let mut device = block(shared(Some(file())), "x");
        let rates = Rates { disk: Rate { bytes: Some(bytes), operations: None }, ..Rates::default() };
        device.limit(&rates).unwrap();
        Box::new(device)
    };
    let mut machine = Machine::started(limited(4096), 16, 0);
    let begun = Instant::now();
    put_header(&machine, HEADER, VIRTIO_BLK_T_OUT, 0);
    for (at, status) in [(0, STATUS), (4, STATUS + 1)] {
        machine.write_bytes(status, &[0xee]);
        machine.add(0, at, &[(HEADER, 16, false), (DATA, 12 << 10, false), (status, 1, true)]);
    }
    machine.notify(0);
    assert_eq!(machine.take_used(0), Some((0, 1)));
    assert_eq!((machine.take_used(0), machine.read_bytes(STATUS + 1, 1)), (None, vec![0xee]));

    machine.transport.lock().quiesce(&machine.memory);
    let saved = machine.transport.lock().save().unwrap();
    let mut copy = machine.copy_with(limited(1 << 20));
    copy.transport.lock().restore(&saved, false, &copy.memory).unwrap();
    copy.transport.lock().kick_after_restore();
    copy.run();
    assert_eq!((copy.take_used(0), copy.read_bytes(STATUS + 1, 1)), (Some((4, 1)), vec![OK]));

    while machine.read_bytes(STATUS + 1, 1) != [OK] {
        machine.wait();
    }
    assert_eq!(machine.take_used(0), Some((4, 1)));
    // What had passed beyond the first second's worth had to be earned.
    assert!(begun.elapsed() >= Duration::from_secs_f64((12 << 10) as f64 / 4096.0 - 1.0));
    assert!(!machine.broken());
}

#[test]
fn a_reset_forgets_what_a_limited_disk_was_waiting_for() {
    let mut device = block(shared(Some(file())), "x");
    let rates = Rates { disk: Rate { bytes: None, operations: Some(1) }, ..Rates::default() };
    device.limit(&rates).unwrap();
    let mut machine = Machine::started(Box::new(device), 16, 0);
    for _ in 0..3 {
        put_header(&machine, HEADER, VIRTIO_BLK_T_FLUSH, 0);
        machine.add(0, 0, &[(HEADER, 16, false), (STATUS, 1, true)]);
        machine.notify(0);
    }
    assert_eq!(machine.used_index(0), 2);
    assert_eq!(machine.transport.lock().host_interest().len(), 3);
    machine.start(16, 0);
    assert_eq!(machine.transport.lock().host_interest().len(), 2);
}
