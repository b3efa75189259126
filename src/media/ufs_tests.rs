//! File systems made for the test, and made wrong.

use proptest::prelude::*;

use super::*;
use crate::media::testing;

const BYTES: u64 = 8 << 20;

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = self.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(from.expect("read beyond the disk"));
        Ok(())
    }
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 7 % 251) as u8).collect()
}

fn read_file(ufs: &Ufs<'_>, path: &str) -> Result<Option<Vec<u8>>, UfsError> {
    let Some(inode) = ufs.find(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    ufs.read(&inode, |piece| -> Result<(), UfsError> {
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(Some(bytes))
}

#[test]
fn files_of_every_depth_come_back() {
    // Direct blocks only; one level; two levels; holes.
    let (small, one, two) = (content(5000), content(300_000), content(3 << 20));
    let mut holes = content(400_000);
    holes[8192..300_000].fill(0);
    let disk = testing::ufs2(
        BYTES,
        "rootfs",
        &[("/boot/kernel/kernel", &two), ("/boot/loader.conf", &small), ("/one", &one), ("/holes", &holes)],
    );
    let ufs = open(&disk, 0, BYTES).unwrap().unwrap();
    assert_eq!((ufs.version, ufs.label.as_deref()), (2, Some("rootfs")));
    for (path, content) in
        [("/boot/kernel/kernel", &two), ("/boot/loader.conf", &small), ("one", &one), ("/holes", &holes)]
    {
        assert_eq!(read_file(&ufs, path).unwrap().as_ref(), Some(content), "{path}");
    }
    assert_eq!(read_file(&ufs, "/nothing").unwrap(), None);
    assert_eq!(read_file(&ufs, "/boot/kernel/kernel/below").unwrap(), None);
    assert!(matches!(read_file(&ufs, "/boot"), Err(UfsError::NotAFile { .. })));
    assert!(matches!(read_file(&ufs, &"/x".repeat(40)), Ok(None) | Err(UfsError::NotAFile { .. })));
    assert_eq!(ufs.head(&ufs.find("/one").unwrap().unwrap(), 100).unwrap(), one[..100]);
}

#[test]
fn a_file_system_in_a_partition_is_found_where_it_begins() {
    let inner = testing::ufs2(BYTES, "", &[("/f", &content(100_000))]);
    let mut disk = vec![0xee; 1 << 20];
    disk.extend_from_slice(&inner);
    assert!(open(&disk, 0, disk.len() as u64).unwrap().is_none());
    let ufs = open(&disk, 1 << 20, BYTES).unwrap().unwrap();
    assert_eq!(read_file(&ufs, "/f").unwrap(), Some(content(100_000)));
    // Cut off behind its superblock: the files are gone, and said to be.
    let cut = open(&disk, 1 << 20, 80_000).unwrap().unwrap();
    assert!(matches!(read_file(&cut, "/f"), Err(UfsError::Damaged(_))));
}

#[test]
fn a_file_of_impossible_length_is_refused() {
    let mut disk = testing::ufs2(BYTES, "", &[("/f", b"short")]);
    let inode = 80 * 1024 + 3 * 256;
    assert_eq!(disk[inode + 16], 5);
    disk[inode + 16..inode + 24].copy_from_slice(&(FILE_BYTES_MAX + 1).to_le_bytes());
    let ufs = open(&disk, 0, BYTES).unwrap().unwrap();
    assert!(matches!(read_file(&ufs, "/f"), Err(UfsError::TooLarge { .. })));
    // As long as it may be: mostly holes, and then an address outside.
    disk[inode + 16..inode + 24].copy_from_slice(&FILE_BYTES_MAX.to_le_bytes());
    disk[inode + 208..inode + 216].copy_from_slice(&u64::MAX.to_le_bytes());
    let ufs = open(&disk, 0, BYTES).unwrap().unwrap();
    assert!(matches!(read_file(&ufs, "/f"), Err(UfsError::Damaged(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Bytes of the superblock, inodes, indirect blocks and directories overwritten at random: an answer or an error, no panic,
    /// no endless walk.
    #[test]
    fn damaged_file_systems_are_survived(
        changes in prop::collection::vec((0usize..5, 0usize..8192, any::<u8>()), 1..60),
    ) {
        let mut disk = testing::ufs2(2 << 20, "rootfs", &[("/boot/kernel/kernel", &content(300_000))]);
        let areas = [65536, 80 * 1024, 80 * 1024, 128 * 1024, 128 * 1024 + 300_000];
        for (area, at, value) in changes {
            let limit = if area == 0 { 1376 } else { 8192 };
            disk[areas[area] + at % limit] = value;
        }
        let bytes = disk.len() as u64;
        if let Some(ufs) = open(&disk, 0, bytes).unwrap() {
            let _ = read_file(&ufs, "/boot/kernel/kernel");
        }
    }

    #[test]
    fn random_geometries_are_survived(numbers in prop::collection::vec(any::<u32>(), 8)) {
        let mut disk = testing::ufs2(1 << 20, "", &[("/a/b", &content(100_000))]);
        for (at, number) in [44, 48, 52, 184, 188, 16, 24, 28].iter().zip(&numbers) {
            disk[65536 + at..65536 + at + 4].copy_from_slice(&number.to_le_bytes());
        }
        let bytes = disk.len() as u64;
        if let Some(ufs) = open(&disk, 0, bytes).unwrap() {
            let _ = read_file(&ufs, "/a/b");
        }
    }
}

#[test]
fn no_numbers_of_a_superblock_are_too_large_to_be_added_up() {
    let disk = vec![0u8; 4096];
    for version in [1, 2] {
        let geometry = Geometry {
            groups: u32::MAX,
            block_bytes: 4096,
            fragment_bytes: 4096,
            inodes_per_group: 1,
            fragments_per_group: u32::MAX,
            inodes_at: u32::MAX,
            group_offset: u32::MAX,
            group_mask: 0,
        };
        let ufs = Ufs { content: &disk, start: 0, bytes: 4096, version, label: None, geometry };
        assert!(matches!(ufs.inode(u32::MAX - 1), Err(UfsError::Damaged(_))), "UFS{version}");
    }
}
