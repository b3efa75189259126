//! Synthetic disks: partition tables and superblocks as FreeBSD's tools write them, and broken ones.

use std::io;

use proptest::prelude::*;

use super::*;
use crate::media::ReadAt;
use crate::media::testing::{self, UFS as FREEBSD_UFS, ZFS as FREEBSD_ZFS};

const UFS2_MAGIC: u32 = 0x1954_0119;
const UFS1_MAGIC: u32 = 0x0001_1954;
const BSD_LABEL_MAGIC: u32 = 0x8256_4557;

/// A disk that is mostly zeros.
#[derive(Default)]
struct Image {
    bytes: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl ReadAt for Image {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset + buffer.len() as u64 <= self.bytes, "read beyond the disk");
        buffer.fill(0);
        for (start, part) in &self.parts {
            for (i, byte) in part.iter().enumerate() {
                let at = (start + i as u64).checked_sub(offset).map(|at| at as usize);
                if let Some(slot) = at.and_then(|at| buffer.get_mut(at)) {
                    *slot = *byte;
                }
            }
        }
        Ok(())
    }
}

struct Broken;

impl ReadAt for Broken {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::Error::other("unreadable sector"))
    }
}

impl Image {
    fn new(mib: u64) -> Self {
        Image { bytes: mib << 20, parts: Vec::new() }
    }

    /// A UFS of `bytes` at `start`, its label if any.
    fn ufs(self, start: u64, bytes: u64, version: u8, label: &str) -> Self {
        self.ufs_at(start, bytes, version, label, if version == 2 { 65536 } else { 8192 })
    }

    fn ufs_at(mut self, start: u64, bytes: u64, version: u8, label: &str, at: u64) -> Self {
        let mut block = vec![0u8; 1376];
        let fragments = bytes / 4096;
        block[44..48].copy_from_slice(&4u32.to_le_bytes());
        block[48..52].copy_from_slice(&32768u32.to_le_bytes());
        block[52..56].copy_from_slice(&4096u32.to_le_bytes());
        block[36..40].copy_from_slice(&(fragments as u32).to_le_bytes());
        block[104..108].copy_from_slice(&1376u32.to_le_bytes());
        block[680..680 + label.len()].copy_from_slice(label.as_bytes());
        block[1000..1008].copy_from_slice(&at.to_le_bytes());
        block[1080..1088].copy_from_slice(&fragments.to_le_bytes());
        let magic = if version == 2 { UFS2_MAGIC } else { UFS1_MAGIC };
        block[1372..].copy_from_slice(&magic.to_le_bytes());
        self.parts.push((start + at, block));
        self
    }

    /// GPT entries: type, first MiB, number of MiB.
    fn gpt(self, entries: &[(&[u8; 16], u64, u64)]) -> Self {
        let named: Vec<_> = entries.iter().map(|(kind, start, mib)| (*kind, *start, *mib, "")).collect();
        self.gpt_named(&named)
    }

    fn gpt_named(mut self, entries: &[testing::Wanted<'_>]) -> Self {
        let wanted: Vec<testing::Wanted<'_>> =
            entries.iter().map(|(kind, start, mib, name)| (*kind, start * MIB, mib * MIB, *name)).collect();
        self.parts.extend(testing::gpt(self.bytes, &wanted));
        self
    }

    fn mbr(mut self, index: u64, kind: u8, start_mib: u32, mib: u32) -> Self {
        let mut entry = vec![0u8; 16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&(start_mib * 2048).to_le_bytes());
        entry[12..].copy_from_slice(&(mib * 2048).to_le_bytes());
        self.parts.push((446 + index * 16, entry));
        self.parts.push((510, vec![0x55, 0xaa]));
        self
    }

    /// A BSD label in the slice at `start`: offset and size in MiB, type, for partitions from a.
    fn bsd(mut self, start: u64, partitions: &[(u32, u32, u8)]) -> Self {
        let mut label = vec![0u8; 276];
        label[..4].copy_from_slice(&BSD_LABEL_MAGIC.to_le_bytes());
        label[132..136].copy_from_slice(&BSD_LABEL_MAGIC.to_le_bytes());
        label[138..140].copy_from_slice(&(partitions.len() as u16).to_le_bytes());
        for (i, (offset, size, kind)) in partitions.iter().enumerate() {
            let at = 148 + i * 16;
            label[at..at + 4].copy_from_slice(&(size * 2048).to_le_bytes());
            label[at + 4..at + 8].copy_from_slice(&(offset * 2048).to_le_bytes());
            label[at + 12] = *kind;
        }
        self.parts.push((start + 512, label));
        self
    }
}

fn find(images: &[&dyn ReadAt]) -> Found {
    let views: Vec<_> =
        images.iter().map(|image| DiskView { content: *image, bytes: 64 << 20, read_only: false }).collect();
    find_root(&views)
}

fn root(image: Image) -> String {
    let found = find(&[&image]);
    let root = found.mount_from.unwrap_or_else(|| panic!("{:?}", found.choices));
    assert!(found.choices[0].starts_with(&format!("root: {root} (")), "{:?}", found.choices);
    root
}

const BOOT: [u8; 16] = [0x9d; 16];
const MIB: u64 = 1 << 20;

#[test]
fn a_gpt_partition_by_its_type() {
    let image = Image::new(64)
        .gpt(&[(&BOOT, 1, 1), (&BOOT, 2, 1), (&BOOT, 3, 1), (&FREEBSD_UFS, 8, 32)])
        .ufs(8 * MIB, 32 * MIB, 2, "");
    assert_eq!(root(image), "ufs:/dev/vtbd0p4");
}

#[test]
fn a_label_goes_before_the_partition() {
    let disk = |label| Image::new(64).gpt(&[(&FREEBSD_UFS, 8, 32)]).ufs(8 * MIB, 32 * MIB, 2, label);
    assert_eq!(root(disk("rootfs")), "ufs:/dev/ufs/rootfs");
    assert_eq!(root(disk("data")), "ufs:/dev/ufs/data");
    assert_eq!(root(disk("../x")), "ufs:/dev/vtbd0p1", "a name that is no plain file name");
}

#[test]
fn a_gpt_name_goes_before_the_partition_too() {
    let two = |first: &'static str, second: &'static str, label| {
        Image::new(64)
            .gpt_named(&[(&FREEBSD_UFS, 8, 16, first), (&FREEBSD_UFS, 32, 16, second)])
            .ufs(8 * MIB, 16 * MIB, 2, "")
            .ufs(32 * MIB, 16 * MIB, 2, label)
    };
    assert_eq!(root(two("data", "rootfs", "")), "ufs:/dev/gpt/rootfs");
    assert_eq!(root(two("data", "rootfs", "mine")), "ufs:/dev/ufs/mine");
    assert_eq!(root(two("same", "same", "")), "ufs:/dev/vtbd0p1");
    assert_eq!(root(two("not/plain", "", "")), "ufs:/dev/vtbd0p1");
}

#[test]
fn a_broken_table_is_told() {
    let mut image = Image::new(64).gpt(&[(&FREEBSD_UFS, 8, 32)]).ufs(8 * MIB, 32 * MIB, 2, "");
    // One bit of the first copy: the second counts.
    image.parts.push((512 + 60, vec![0xff]));
    let found = find(&[&image]);
    assert_eq!(found.mount_from.as_deref(), Some("ufs:/dev/vtbd0p1"));
    assert!(found.choices[0].contains("first header is damaged"), "{:?}", found.choices);
    // Both.
    image.parts.push((64 * MIB - 512 + 60, vec![0xff]));
    let found = find(&[&image]);
    assert_eq!(found.mount_from, None);
    assert!(found.choices[0].contains("both copies"), "{:?}", found.choices);
}

#[test]
fn a_label_that_freebsd_would_not_show_is_not_used() {
    let image = Image::new(64).gpt(&[(&FREEBSD_UFS, 8, 32)]).ufs(8 * MIB, 16 * MIB, 2, "rootfs");
    assert_eq!(root(image), "ufs:/dev/vtbd0p1");
}

#[test]
fn root_is_preferred_to_other_labels_and_equal_labels_are_told_by_device() {
    let two = |first, second| {
        Image::new(64)
            .gpt(&[(&FREEBSD_UFS, 8, 16), (&FREEBSD_UFS, 32, 16)])
            .ufs(8 * MIB, 16 * MIB, 2, first)
            .ufs(32 * MIB, 16 * MIB, 2, second)
    };
    assert_eq!(root(two("data", "rootfs")), "ufs:/dev/ufs/rootfs");
    assert_eq!(root(two("rootfs", "rootfs")), "ufs:/dev/vtbd0p1");
    let (first, second) = (two("", ""), two("", "root"));
    let found = find(&[&first, &second]);
    assert_eq!(found.mount_from.as_deref(), Some("ufs:/dev/ufs/root"));
    assert!(found.choices[1].ends_with("vtbd0p1, vtbd0p2, vtbd1p1"), "{:?}", found.choices);
}

#[test]
fn a_bare_file_system_fills_the_disk() {
    assert_eq!(root(Image::new(64).ufs(0, 64 * MIB, 2, "")), "ufs:/dev/vtbd0");
    assert_eq!(root(Image::new(64).ufs(0, 64 * MIB, 1, "")), "ufs:/dev/vtbd0");
    assert_eq!(root(Image::new(64).ufs(0, 64 * MIB, 2, "rootfs")), "ufs:/dev/ufs/rootfs");
}

#[test]
fn a_superblock_counts_where_freebsd_looks_and_nowhere_else() {
    let at = |version, at| Image::new(64).ufs_at(0, 64 * MIB, version, "", at);
    for (version, place) in [(2, 65536), (2, 8192), (2, 0), (2, 262_144), (1, 8192), (1, 0)] {
        assert_eq!(root(at(version, place)), "ufs:/dev/vtbd0", "UFS{version} at {place}");
    }
    assert_eq!(find(&[&at(1, 65536)]).mount_from, None, "a backup of UFS1's");
    let mut moved = at(2, 65536);
    moved.parts[0].0 = 8192;
    assert_eq!(find(&[&moved]).mount_from, None, "a backup that says where the first one is");
}

#[test]
fn mbr_slices_and_bsd_partitions() {
    let slice = Image::new(64).mbr(0, 0x83, 1, 8).mbr(1, 0xa5, 16, 32).ufs(16 * MIB, 32 * MIB, 2, "");
    assert_eq!(root(slice), "ufs:/dev/vtbd0s2");
    let relative = Image::new(64)
        .mbr(0, 0xa5, 16, 32)
        .bsd(16 * MIB, &[(4, 8, 7), (12, 8, 1), (0, 32, 0)])
        .ufs(20 * MIB, 8 * MIB, 2, "");
    assert_eq!(root(relative), "ufs:/dev/vtbd0s1a");
    let absolute = Image::new(64)
        .mbr(0, 0xa5, 16, 32)
        .bsd(16 * MIB, &[(20, 8, 7), (28, 8, 1), (16, 32, 0)])
        .ufs(20 * MIB, 8 * MIB, 2, "");
    assert_eq!(root(absolute), "ufs:/dev/vtbd0s1a");
}

#[test]
fn nothing_found_is_said() {
    let said = |found: Found| {
        assert_eq!(found.mount_from, None);
        found.choices.join("\n")
    };
    assert!(said(find(&[])).contains("no disk"));
    assert!(said(find(&[&Image::new(64)])).contains("no UFS found"));
    assert!(said(find(&[&Image::new(64).gpt(&[(&FREEBSD_ZFS, 8, 32)])])).contains("vtbd0p1 is ZFS"));
    assert!(said(find(&[&Broken])).contains("unreadable sector"));
}

#[test]
fn a_broken_disk_does_not_hide_a_good_one() {
    let good = Image::new(64).ufs(0, 64 * MIB, 2, "");
    let found = find(&[&Broken, &good]);
    assert_eq!(found.mount_from.as_deref(), Some("ufs:/dev/vtbd1"));
}

#[test]
fn a_read_only_root_is_told() {
    let image = Image::new(64).ufs(0, 64 * MIB, 2, "");
    let view = DiskView { content: &image, bytes: image.bytes, read_only: true };
    assert_eq!(find_root(&[view]).choices, ["root: ufs:/dev/vtbd0 (whole disk, UFS2, read-only disk)"]);
}

#[test]
fn a_disk_smaller_than_a_sector_is_no_error() {
    let image = Image::default();
    let view = DiskView { content: &image, bytes: 0, read_only: true };
    assert_eq!(find_root(&[view]).mount_from, None);
}

proptest! {
    #[test]
    fn hostile_tables_do_not_panic(
        header in prop::collection::vec(any::<u8>(), 84),
        entries in prop::collection::vec(any::<u8>(), 512),
        mbr in prop::collection::vec(any::<u8>(), 64),
        label in prop::collection::vec(any::<u8>(), 400),
        gpt in any::<bool>(),
    ) {
        let mut image = Image::new(64);
        if gpt {
            image = image.gpt(&[]);
            image.parts.push((520, header));
        }
        let mut entries = entries;
        entries[..16].copy_from_slice(&FREEBSD_UFS);
        image.parts.push((1024, entries));
        image.parts.push((446, mbr));
        image = image.mbr(0, 0xa5, 16, 32).bsd(16 * MIB, &[]);
        image.parts.push((16 * MIB + 512 + 136, label));
        let _ = find(&[&image]);
    }

    #[test]
    fn hostile_superblocks_do_not_panic(block in prop::collection::vec(any::<u8>(), 1000 - 108)) {
        let mut image = Image::new(64).ufs(0, 64 * MIB, 2, "");
        image.parts.push((65536 + 108, block));
        prop_assert!(find(&[&image]).mount_from.is_some());
    }
}
