//! The disk against a plain vector of bytes, and files that lie.

#![allow(unsafe_code)]

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::format::FOOTER_BYTES;
use super::*;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn base(bytes: &[u8]) -> File {
    let mut file = file();
    file.write_all(bytes).unwrap();
    file
}

fn content(disk: &LayeredDisk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.disk_bytes() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn freeze(disk: &LayeredDisk) -> Result<Freeze, LayerError> {
    disk.freeze(file(), disk.reopened())
}

/// A frozen layer for a disk of 5 blocks with block 1 full of 7; open for writing, to damage it.
fn frozen_layer() -> File {
    let overlay = file();
    let handle = overlay.try_clone().unwrap();
    let disk = LayeredDisk::open(None, vec![], Some(overlay), 5 * BLOCK_BYTES).unwrap();
    disk.write_at(&[7; 4096], BLOCK_BYTES).unwrap();
    match freeze(&disk).unwrap() {
        Freeze::Layer(_) => handle,
        Freeze::Unused => panic!("a written overlay is used"),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, bytes: u64, value: u8 },
    Zero { offset: u64, bytes: u64 },
    Discard { offset: u64, bytes: u64 },
    Freeze,
    Reopen,
}

/// 37 sectors: the last block is short.
const SECTORS: u64 = 37;

fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..SECTORS)
        .prop_flat_map(|first| (Just(first * 512), (0..=SECTORS - first).prop_map(|count| count * 512)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (range(), 1u8..).prop_map(|((offset, bytes), value)| Step::Write { offset, bytes, value }),
        2 => range().prop_map(|(offset, bytes)| Step::Zero { offset, bytes }),
        1 => range().prop_map(|(offset, bytes)| Step::Discard { offset, bytes }),
        2 => Just(Step::Freeze),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #[test]
    fn a_layered_disk_is_a_vector_of_bytes(
        with_base in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..40),
        (probe_offset, probe_bytes) in range(),
    ) {
        let disk_bytes = SECTORS * 512;
        let mut model = vec![0u8; disk_bytes as usize];
        let base = with_base.then(|| {
            model.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 100) as u8);
            base(&model)
        });
        let clone_base = || base.as_ref().map(|file| file.try_clone().unwrap());
        let mut layers: Vec<File> = vec![];
        let mut disk = LayeredDisk::open(clone_base(), vec![], Some(file()), disk_bytes).unwrap();
        for step in steps {
            match step {
                Step::Write { offset, bytes, value } => {
                    let data: Vec<u8> = (0..bytes).map(|at| value.wrapping_add(at as u8)).collect();
                    disk.write_at(&data, offset).unwrap();
                    model[offset as usize..(offset + bytes) as usize].copy_from_slice(&data);
                }
                Step::Zero { offset, bytes } => {
                    disk.write_zeroes(offset, bytes).unwrap();
                    model[offset as usize..(offset + bytes) as usize].fill(0);
                }
                Step::Discard { offset, bytes } => {
                    disk.discard(offset, bytes).unwrap();
                    let end = offset + bytes;
                    let from = offset.next_multiple_of(4096);
                    let to = if end == disk_bytes { end } else { end / 4096 * 4096 };
                    if from < to {
                        model[from as usize..to as usize].fill(0);
                    }
                }
                Step::Freeze | Step::Reopen if layers.len() == LAYERS_MAX => {}
                Step::Freeze => {
                    if let Freeze::Layer(layer) = freeze(&disk).unwrap() {
                        prop_assert!(LayeredDisk::verify_layer(&layer, disk_bytes).unwrap() > 0);
                        layers.push(layer);
                    }
                    prop_assert_eq!(disk.overlay_bytes(), 0);
                    prop_assert_eq!(disk.frozen_layers(), layers.len());
                }
                Step::Reopen => {
                    if let Freeze::Layer(layer) = freeze(&disk).unwrap() {
                        layers.push(layer);
                    }
                    let frozen = layers.iter().map(|layer| layer.try_clone().unwrap()).collect();
                    disk = LayeredDisk::open(clone_base(), frozen, Some(file()), disk_bytes).unwrap();
                }
            }
            prop_assert_eq!(&content(&disk), &model);
        }
        let mut probe = vec![0xee; probe_bytes as usize];
        disk.read_at(&mut probe, probe_offset).unwrap();
        prop_assert_eq!(&probe[..], &model[probe_offset as usize..(probe_offset + probe_bytes) as usize]);
    }

    #[test]
    fn a_layer_with_any_changed_byte_in_its_footer_is_refused(at in 0u64..112, flip in 1u8..) {
        let layer = frozen_layer();
        let place = format::length(&layer).unwrap() - FOOTER_BYTES + at;
        let mut byte = [0];
        layer.read_exact_at(&mut byte, place).unwrap();
        layer.write_all_at(&[byte[0] ^ flip], place).unwrap();
        let opened = LayeredDisk::open(None, vec![layer], None, 5 * BLOCK_BYTES);
        let is_damaged = matches!(opened, Err(LayerError::Damaged { layer: 0, .. }));
        prop_assert!(is_damaged);
    }

    #[test]
    fn a_layer_cut_anywhere_is_refused(bytes in 0u64..5 * 4096 + 2 * 4096) {
        let layer = frozen_layer();
        layer.set_len(bytes).unwrap();
        let opened = LayeredDisk::open(None, vec![layer], None, 5 * BLOCK_BYTES);
        let is_damaged = matches!(opened, Err(LayerError::Damaged { .. }));
        prop_assert!(is_damaged);
    }
}

#[test]
fn clones_share_layers_and_see_nothing_of_each_other() {
    let layer = frozen_layer();
    let open = || {
        let frozen = vec![layer.try_clone().unwrap()];
        LayeredDisk::open(Some(base(&[3; 5 * 4096])), frozen, Some(file()), 5 * BLOCK_BYTES).unwrap()
    };
    let (one, two) = (open(), open());
    let before = content(&two);
    assert_eq!((before[0], before[4096], before[8192]), (3, 7, 3));
    one.write_at(&[9; 512], BLOCK_BYTES + 512).unwrap();
    assert_eq!(content(&two), before);
    let mut expected = before;
    expected[4096 + 512..4096 + 1024].fill(9);
    assert_eq!(content(&one), expected);
    assert_eq!(one.overlay_bytes(), BLOCK_BYTES);
}

#[test]
fn the_bitmap_decides_and_not_the_holes() {
    // A copy without holes has the same content: blocks that are not in the layer stay the base's.
    let mut layer = frozen_layer();
    let mut bytes = vec![];
    layer.seek(SeekFrom::Start(0)).unwrap();
    layer.read_to_end(&mut bytes).unwrap();
    let copy = base(&bytes);
    let disk = LayeredDisk::open(Some(base(&[3; 5 * 4096])), vec![copy], None, 5 * BLOCK_BYTES).unwrap();
    let content = content(&disk);
    assert_eq!((content[0], content[4096], content[8192]), (3, 7, 3));
}

#[test]
fn an_untouched_overlay_is_reported_as_unused() {
    let disk = LayeredDisk::open(None, vec![], Some(file()), 4096).unwrap();
    assert!(matches!(freeze(&disk).unwrap(), Freeze::Unused));
    assert_eq!(disk.frozen_layers(), 0);
    disk.write_at(&[1; 512], 0).unwrap();
    assert!(matches!(freeze(&disk).unwrap(), Freeze::Layer(_)));
    assert_eq!(content(&disk)[0], 1);
}

#[test]
fn what_is_frozen_cannot_be_written_to_any_more_and_only_its_own_file_is_taken_for_it() {
    use crate::snapshot::writers;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("overlay");
    let overlay = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let disk = LayeredDisk::open(None, vec![], Some(overlay), 4096).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    assert!(matches!(disk.freeze(file(), file()), Err(LayerError::NotTheOverlay)));
    disk.write_at(&[2; 512], 0).unwrap();
    let reader = File::open(&path).unwrap();
    let quiet = |seconds| {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
        writers::wait_for_none(&reader, &path, until).unwrap()
    };
    assert!(!quiet(0));
    let Freeze::Layer(mut layer) = freeze(&disk).unwrap() else { panic!("a written overlay is used") };
    // Neither a descriptor nor the bitmap's mapping is left with which it could be written to.
    assert!(quiet(10));
    assert!(layer.write_all(&[3]).is_err() && layer.set_len(0).is_err());
    assert_eq!(content(&disk)[0], 2);
}

#[test]
fn zeros_hide_what_lies_below() {
    let disk = LayeredDisk::open(Some(base(&[3; 16384])), vec![], Some(file()), 16384).unwrap();
    disk.write_zeroes(4096, 8192).unwrap();
    assert!(matches!(freeze(&disk).unwrap(), Freeze::Layer(_)));
    let content = content(&disk);
    assert!(content[4096..12288].iter().all(|byte| *byte == 0) && content[4095] == 3 && content[12288] == 3);
}

#[test]
fn a_base_that_is_too_short_is_refused_with_both_sizes() {
    let opened = LayeredDisk::open(Some(base(&[0; 4096])), vec![], None, 8192);
    let message = opened.unwrap_err().to_string();
    assert!(message.contains("4096") && message.contains("8192"), "{message}");
}

#[test]
fn a_read_only_disk_takes_no_write() {
    let disk = LayeredDisk::open(Some(base(&[3; 4096])), vec![], None, 4096).unwrap();
    assert!(disk.read_only());
    assert!(matches!(disk.write_at(&[0; 512], 0), Err(LayerError::ReadOnly)));
    assert!(matches!(disk.write_zeroes(0, 512), Err(LayerError::ReadOnly)));
    assert!(matches!(disk.discard(0, 4096), Err(LayerError::ReadOnly)));
    assert!(matches!(freeze(&disk), Err(LayerError::ReadOnly)));
    assert_eq!(content(&disk), vec![3; 4096]);
}

#[test]
fn a_range_outside_the_disk_is_refused() {
    let disk = LayeredDisk::open(None, vec![], Some(file()), 4096).unwrap();
    for (offset, bytes) in [(4096, 512), (3584, 1024), (u64::MAX - 511, 512), (u64::MAX, 1)] {
        let mut buffer = vec![0; bytes];
        assert!(matches!(disk.read_at(&mut buffer, offset), Err(LayerError::OutOfRange { .. })));
        assert!(matches!(disk.write_at(&buffer, offset), Err(LayerError::OutOfRange { .. })));
        assert!(matches!(disk.write_zeroes(offset, bytes as u64), Err(LayerError::OutOfRange { .. })));
        assert!(matches!(disk.discard(offset, bytes as u64), Err(LayerError::OutOfRange { .. })));
    }
}

#[test]
fn bad_sizes_too_many_layers_and_used_overlays_are_refused() {
    for bytes in [0, 511, 513, DISK_BYTES_MAX + 512, u64::MAX] {
        assert!(matches!(LayeredDisk::open(None, vec![], None, bytes), Err(LayerError::DiskSize(_))));
    }
    let layers = (0..=LAYERS_MAX).map(|_| frozen_layer()).collect();
    let opened = LayeredDisk::open(None, layers, None, 5 * BLOCK_BYTES);
    assert!(matches!(opened, Err(LayerError::TooManyLayers(17))));
    let opened = LayeredDisk::open(None, vec![], Some(base(&[1])), 4096);
    assert!(matches!(opened, Err(LayerError::OverlayNotEmpty(1))));
    let other_disk = LayeredDisk::open(None, vec![frozen_layer()], None, 6 * BLOCK_BYTES);
    assert!(matches!(other_disk, Err(LayerError::Damaged { .. })));
}

#[test]
fn a_full_stack_refuses_the_freeze_and_goes_on() {
    let layers = (0..LAYERS_MAX).map(|_| frozen_layer()).collect();
    let disk = LayeredDisk::open(None, layers, Some(file()), 5 * BLOCK_BYTES).unwrap();
    disk.write_at(&[5; 512], 0).unwrap();
    assert!(matches!(freeze(&disk), Err(LayerError::TooManyLayers(_))));
    disk.write_at(&[6; 512], 512).unwrap();
    let content = content(&disk);
    assert_eq!((content[0], content[512], content[4096]), (5, 6, 7));
}

#[test]
fn verify_finds_a_changed_bitmap() {
    let layer = frozen_layer();
    assert_eq!(LayeredDisk::verify_layer(&layer, 5 * BLOCK_BYTES).unwrap(), BLOCK_BYTES);
    layer.write_all_at(&[0b11], 5 * BLOCK_BYTES).unwrap();
    let verified = LayeredDisk::verify_layer(&layer, 5 * BLOCK_BYTES);
    assert!(matches!(verified, Err(LayerError::Damaged { .. })));
}

#[test]
fn a_huge_disk_opens_without_memory_of_its_size() {
    let disk = LayeredDisk::open(None, vec![], Some(file()), DISK_BYTES_MAX).unwrap();
    disk.write_at(&[1; 512], DISK_BYTES_MAX - 512).unwrap();
    let mut sector = [0; 512];
    disk.read_at(&mut sector, DISK_BYTES_MAX - 512).unwrap();
    assert_eq!(sector, [1; 512]);
}

/// A memory file that refuses what `seal` (`F_SEAL_*`) names from the moment it is set.
fn memory_file() -> File {
    // SAFETY: the name is a C string; a descriptor that is returned belongs to nobody else.
    unsafe {
        let fd = libc::memfd_create(c"overlay".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        std::os::fd::FromRawFd::from_raw_fd(fd)
    }
}

fn refuse(file: &File, seal: i32) {
    // SAFETY: changes nothing in this process's memory.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seal) }, 0);
}

#[test]
fn a_write_that_fails_leaves_the_old_content() {
    let overlay = memory_file();
    let handle = overlay.try_clone().unwrap();
    let disk = LayeredDisk::open(Some(base(&[3; 16384])), vec![], Some(overlay), 16384).unwrap();
    disk.write_at(&[4; 4096], 4096).unwrap();
    let before = content(&disk);
    refuse(&handle, libc::F_SEAL_WRITE);
    for result in [
        disk.write_at(&[9; 4096], 0),
        disk.write_at(&[9; 8192], 4608),
        disk.write_zeroes(8192, 4096),
        disk.discard(0, 4096),
    ] {
        assert!(matches!(result, Err(LayerError::Io { .. })));
    }
    assert_eq!(content(&disk), before);
    assert_eq!(disk.overlay_bytes(), 4096);
}

#[test]
fn a_freeze_that_fails_leaves_a_disk_that_goes_on() {
    let overlay = memory_file();
    let handle = overlay.try_clone().unwrap();
    let disk = LayeredDisk::open(Some(base(&[3; 16384])), vec![], Some(overlay), 16384).unwrap();
    disk.write_at(&[4; 512], 4096).unwrap();
    refuse(&handle, libc::F_SEAL_GROW);
    let error = freeze(&disk).unwrap_err();
    assert!(matches!(error, LayerError::Io { .. }), "{error}");
    assert_eq!((disk.frozen_layers(), disk.overlay_bytes()), (0, 4096));
    disk.write_at(&[5; 512], 8192).unwrap();
    let content = content(&disk);
    assert_eq!((content[0], content[4096], content[8192], content[8704]), (3, 4, 5, 3));
}

#[test]
fn a_full_disk_is_told_from_a_damaged_one() {
    let full = LayerError::Io { what: "write", source: io::Error::from_raw_os_error(libc::ENOSPC) };
    assert_eq!(full.cause(), Cause::Exhausted);
    let short = LayeredDisk::open(Some(base(&[0; 512])), vec![], None, 1024).unwrap_err();
    assert_eq!(short.cause(), Cause::Damaged);
}

#[test]
fn threads_that_share_blocks_lose_nothing_of_each_other() {
    const THREADS: u64 = 4;
    const BLOCKS: u64 = 32;
    let disk_bytes = BLOCKS * BLOCK_BYTES;
    for round in 0..8u8 {
        let disk =
            LayeredDisk::open(Some(base(&vec![3; disk_bytes as usize])), vec![], Some(file()), disk_bytes)
                .unwrap();
        // Thread n writes every sector that is n modulo 4, so every block is copied up by some and written by all.
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let disk = &disk;
                scope.spawn(move || {
                    for sector in (thread..disk_bytes / 512).step_by(THREADS as usize) {
                        disk.write_at(&[16 + round; 512], sector * 512).unwrap();
                        let mut back = [0; 512];
                        disk.read_at(&mut back, sector * 512).unwrap();
                        assert_eq!(back, [16 + round; 512]);
                        if sector % 64 == thread {
                            disk.flush().unwrap();
                        }
                    }
                });
            }
        });
        assert_eq!(content(&disk), vec![16 + round; disk_bytes as usize]);
        assert_eq!(disk.overlay_bytes(), disk_bytes);
        assert!(matches!(freeze(&disk).unwrap(), Freeze::Layer(_)));
        assert_eq!(content(&disk), vec![16 + round; disk_bytes as usize]);
    }
}

#[test]
fn a_direct_disk_is_its_file() {
    let handle = base(&[3; 16384]);
    let disk = LayeredDisk::open_direct(handle.try_clone().unwrap(), 16384).unwrap();
    assert!(disk.direct() && !disk.read_only());
    disk.write_at(&[9; 512], 512).unwrap();
    disk.write_zeroes(4096 + 512, 512).unwrap();
    disk.discard(8192, 8192).unwrap();
    disk.flush().unwrap();
    let mut bytes = vec![0; 16384];
    handle.read_exact_at(&mut bytes, 0).unwrap();
    let mut expected = vec![3; 16384];
    expected[512..1024].fill(9);
    expected[4608..5120].fill(0);
    expected[8192..].fill(0);
    assert_eq!(bytes, expected);
    assert_eq!(content(&disk), expected);
    assert!(matches!(freeze(&disk), Err(LayerError::Direct)));
    assert!(matches!(disk.write_at(&[0; 512], 16384), Err(LayerError::OutOfRange { .. })));
    let short = LayeredDisk::open_direct(handle.try_clone().unwrap(), 32768);
    assert!(matches!(short, Err(LayerError::BaseTooShort { .. })));
}

#[test]
fn a_flush_that_failed_is_tried_again() {
    // A pipe cannot be synced.
    let (_, writer) = io::pipe().unwrap();
    let broken = File::from(std::os::fd::OwnedFd::from(writer));
    let synced = Synced::new();
    let flush = |file: &File| overlay::flush(&synced, file);
    flush(&broken).unwrap();
    synced.touched();
    assert!(flush(&broken).is_err());
    assert!(flush(&broken).is_err(), "what was not written out is not forgotten");
    flush(&file()).unwrap();
    flush(&broken).unwrap();
}
