//! Tables as tools write them, and damaged ones. (The boot builder's tests have more of the good ones.)

use proptest::prelude::*;

use super::*;
use crate::media::testing::{self, BOOT, UFS};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 16 * MIB;

fn disk() -> Vec<u8> {
    let mut disk = vec![0; BYTES as usize];
    testing::put(
        &mut disk,
        &testing::gpt(BYTES, &[(&BOOT, MIB, MIB, "boot0"), (&UFS, 4 * MIB, 8 * MIB, "rootfs")]),
    );
    disk
}

fn of(disk: &Vec<u8>) -> Table {
    table(disk, disk.len() as u64).unwrap()
}

#[test]
fn a_gpt_is_read_with_names_and_places() {
    let table = of(&disk());
    assert_eq!((table.scheme, table.problem, table.notes.len()), (Scheme::Gpt, None, 0));
    let kinds: Vec<_> = table.partitions.iter().map(|p| (p.kind, p.suffix.as_str())).collect();
    assert_eq!(kinds, [(Kind::Boot, "p1"), (Kind::Ufs, "p2")]);
    let root = &table.partitions[1];
    assert_eq!((root.start, root.bytes, root.name.as_deref()), (4 * MIB, 8 * MIB, Some("rootfs")));
}

#[test]
fn one_damaged_copy_is_a_note_and_two_are_an_error() {
    for at in [512 + 56, 1024 + 5] {
        let mut disk = disk();
        disk[at] ^= 1;
        let table = of(&disk);
        assert_eq!((table.problem, table.partitions.len(), table.notes.len()), (None, 2, 1), "at {at}");
        let end = disk.len();
        disk[end - 512 + 56] ^= 1;
        let table = of(&disk);
        assert!(matches!(table.problem, Some(TableError::BothCopies { .. })), "{:?}", table.problem);
        assert!(table.partitions.is_empty());
    }
}

#[test]
fn a_truncated_disk_is_told_with_both_sizes() {
    let mut disk = disk();
    disk.truncate(8 << 20);
    let problem = of(&disk).problem.unwrap();
    assert_eq!(problem, TableError::Truncated { needed: BYTES, bytes: 8 * MIB });
    assert!(problem.to_string().contains("16777216") && problem.to_string().contains("8388608"));
    // What lies whole inside is still told.
    assert_eq!(of(&disk).partitions.len(), 1);
    // A disk that has grown is as good as before.
    let mut grown = self::disk();
    grown.resize(32 << 20, 0);
    assert_eq!(of(&grown).problem, None);
}

#[test]
fn an_entry_outside_the_disk_is_told_by_name() {
    let mut disk = vec![0; BYTES as usize];
    testing::put(&mut disk, &testing::gpt(BYTES, &[(&UFS, 4 * MIB, 64 * MIB, "")]));
    let problem = of(&disk).problem.unwrap();
    assert!(matches!(&problem, TableError::Outside { name, .. } if name == "p1"), "{problem}");
}

#[test]
fn an_mbr_slice_outside_the_disk_is_told_and_other_signatures_are_none() {
    let mut disk = vec![0; BYTES as usize];
    disk[446 + 4] = 0xa5;
    disk[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&1_000_000u32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert!(matches!(of(&disk).problem, Some(TableError::Outside { name, .. }) if name == "s1"));
    // The first sector of a FAT file system ends like an MBR.
    disk[446] = 0x20;
    let table = of(&disk);
    assert_eq!((table.scheme, table.problem), (Scheme::None, None));
}

#[test]
fn empty_and_tiny_disks_have_no_table() {
    for bytes in [0, 1, 511, 512, 1024, 4096] {
        assert_eq!(of(&vec![0; bytes]).scheme, Scheme::None);
        // A protective MBR with nothing behind it.
        let mut disk = disk();
        disk.truncate(bytes);
        let table = of(&disk);
        assert_eq!(table.problem.is_some(), bytes >= 512, "{bytes} bytes");
    }
}

proptest! {
    #[test]
    fn damaged_tables_are_survived(
        changes in prop::collection::vec((0usize..34 * 512, any::<u8>()), 1..40),
        fix_sums in any::<bool>(),
    ) {
        let mut disk = disk();
        for (at, value) in changes {
            disk[at] = value;
        }
        if fix_sums {
            // So that the numbers behind the sums are looked at, too.
            let list = crc32fast::hash(&disk[1024..1024 + 16384]);
            disk[512 + 88..512 + 92].copy_from_slice(&list.to_le_bytes());
            disk[512 + 16..512 + 20].fill(0);
            let sum = crc32fast::hash(&disk[512..512 + 92]);
            disk[512 + 16..512 + 20].copy_from_slice(&sum.to_le_bytes());
        }
        for partition in of(&disk).partitions {
            prop_assert!(partition.start + partition.bytes <= BYTES);
        }
    }
}
