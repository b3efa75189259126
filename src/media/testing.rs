//! Disks for tests, made from nothing: GPT tables and small UFS2 file systems as FreeBSD's tools lay them out. Also taken into the
//! system tests by path, so it uses nothing of this crate.

#![allow(dead_code)] // Each of its users wants another part.

/// A type of partition as it lies on disk: freebsd-ufs, freebsd-zfs, freebsd-boot, efi.
pub const UFS: [u8; 16] =
    [0xb6, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
pub const ZFS: [u8; 16] =
    [0xba, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
pub const BOOT: [u8; 16] =
    [0x9d, 0x6b, 0xbd, 0x83, 0x41, 0x7f, 0xdc, 0x11, 0xbe, 0x0b, 0x00, 0x15, 0x60, 0xb8, 0x4f, 0x0f];

const SECTOR: u64 = 512;
const ENTRIES: u64 = 128;

/// A partition to be made: type, first byte, bytes, name.
pub type Wanted<'a> = (&'a [u8; 16], u64, u64, &'a str);

/// The pieces of a GPT for a disk of `bytes` bytes: offset and content, both copies and the protective MBR.
pub fn gpt(bytes: u64, partitions: &[Wanted<'_>]) -> Vec<(u64, Vec<u8>)> {
    let sectors = bytes / SECTOR;
    let mut entries = vec![0u8; (ENTRIES * 128) as usize];
    for (entry, (kind, start, length, name)) in entries.chunks_exact_mut(128).zip(partitions) {
        entry[..16].copy_from_slice(*kind);
        entry[16] = 1;
        entry[32..40].copy_from_slice(&(start / SECTOR).to_le_bytes());
        entry[40..48].copy_from_slice(&((start + length) / SECTOR - 1).to_le_bytes());
        for (unit, letter) in entry[56..].chunks_exact_mut(2).zip(name.encode_utf16()) {
            unit.copy_from_slice(&letter.to_le_bytes());
        }
    }
    let header = |own: u64, other: u64, list: u64| {
        let mut header = vec![0u8; 512];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&[0, 0, 1, 0]);
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&own.to_le_bytes());
        header[32..40].copy_from_slice(&other.to_le_bytes());
        header[40..48].copy_from_slice(&34u64.to_le_bytes());
        header[48..56].copy_from_slice(&(sectors - 34).to_le_bytes());
        header[72..80].copy_from_slice(&list.to_le_bytes());
        header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let sum = crc32fast::hash(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        header
    };
    let mut mbr = vec![0u8; 512];
    mbr[450] = 0xee;
    mbr[454] = 1;
    mbr[458..462].copy_from_slice(&u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    vec![
        (0, mbr),
        (SECTOR, header(1, sectors - 1, 2)),
        (2 * SECTOR, entries.clone()),
        ((sectors - 33) * SECTOR, entries.clone()),
        ((sectors - 1) * SECTOR, header(sectors - 1, 1, sectors - 33)),
    ]
}

/// Puts pieces into a disk.
pub fn put(disk: &mut [u8], pieces: &[(u64, Vec<u8>)]) {
    for (at, piece) in pieces {
        disk[*at as usize..*at as usize + piece.len()].copy_from_slice(piece);
    }
}

const BLOCK: u64 = 4096;
const FRAGMENT: u64 = 1024;
const BLOCK_FRAGMENTS: u64 = BLOCK / FRAGMENT;
const INODES_AT: u64 = 80;
const INODES: u64 = 64;

/// A UFS2 of `bytes` bytes with these files (absolute paths; folders are made). Blocks of 4 KiB, so that a file over
/// 48 KiB has an indirect block, and one over 2 MiB has two levels of them.
pub fn ufs2(bytes: u64, label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut new = Maker { disk: vec![0; bytes as usize], next_fragment: 128, next_inode: 3 };
    let mut root = Folder::default();
    for (path, content) in files {
        root.add(&mut path.split('/').filter(|name| !name.is_empty()), content);
    }
    new.folder(&root, 2);
    let mut block = vec![0u8; 1376];
    let fragments = bytes / FRAGMENT;
    let mut put = |at: usize, value: u64, width: usize| {
        block[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    };
    for (at, value) in [(16, INODES_AT), (44, 1), (48, BLOCK), (52, FRAGMENT), (56, BLOCK_FRAGMENTS)] {
        put(at, value, 4);
    }
    for (at, value) in [(104, 1376), (184, INODES), (188, fragments), (1372, 0x1954_0119)] {
        put(at, value, 4);
    }
    for (at, value) in [(872, fragments), (1000, 65536), (1080, fragments)] {
        put(at, value, 8);
    }
    block[680..680 + label.len()].copy_from_slice(label.as_bytes());
    new.disk[65536..65536 + 1376].copy_from_slice(&block);
    new.disk
}

#[derive(Default)]
struct Folder<'a> {
    folders: Vec<(String, Folder<'a>)>,
    files: Vec<(String, &'a [u8])>,
}

impl<'a> Folder<'a> {
    fn add(&mut self, names: &mut dyn Iterator<Item = &str>, content: &'a [u8]) {
        let Some(name) = names.next().map(str::to_owned) else { return };
        let mut rest = names.peekable();
        if rest.peek().is_none() {
            self.files.push((name, content));
            return;
        }
        let at = match self.folders.iter().position(|(other, _)| *other == name) {
            Some(at) => at,
            None => {
                self.folders.push((name, Folder::default()));
                self.folders.len() - 1
            }
        };
        let names: Vec<String> = rest.map(str::to_owned).collect();
        self.folders[at].1.add(&mut names.iter().map(String::as_str), content);
    }
}

struct Maker {
    disk: Vec<u8>,
    next_fragment: u64,
    next_inode: u32,
}

impl Maker {
    fn number(&mut self) -> u32 {
        self.next_inode += 1;
        assert!(u64::from(self.next_inode) < INODES);
        self.next_inode - 1
    }

    fn folder(&mut self, folder: &Folder<'_>, number: u32) {
        let mut entries = vec![(number, 4, ".".to_owned()), (number, 4, "..".to_owned())];
        for (name, inner) in &folder.folders {
            let number = self.number();
            self.folder(inner, number);
            entries.push((number, 4, name.clone()));
        }
        for (name, content) in &folder.files {
            let number = self.number();
            self.file(content, number, 0o100_644);
            entries.push((number, 8, name.clone()));
        }
        let mut bytes = Vec::new();
        for (at, (number, kind, name)) in entries.iter().enumerate() {
            let mut length = (8 + name.len() + 1).next_multiple_of(4);
            if at + 1 == entries.len() {
                length = 512 - bytes.len();
            }
            let start = bytes.len();
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(&(length as u16).to_le_bytes());
            bytes.extend_from_slice(&[*kind, name.len() as u8]);
            bytes.extend_from_slice(name.as_bytes());
            bytes.resize(start + length, 0);
        }
        assert_eq!(bytes.len(), 512);
        self.file(&bytes, number, 0o040_755);
    }

    /// Takes a block and returns the fragment where it begins.
    fn block(&mut self, content: &[u8]) -> u64 {
        let at = self.next_fragment;
        self.next_fragment += BLOCK_FRAGMENTS;
        let start = (at * FRAGMENT) as usize;
        self.disk[start..start + content.len()].copy_from_slice(content);
        at
    }

    fn file(&mut self, content: &[u8], number: u32, mode: u16) {
        // A block of zeros is a hole.
        let mut blocks: Vec<u64> = content
            .chunks(BLOCK as usize)
            .map(|chunk| if chunk.iter().all(|byte| *byte == 0) { 0 } else { self.block(chunk) })
            .collect();
        let mut addresses = [0u64; 15];
        let beyond = blocks.split_off(blocks.len().min(12));
        addresses[..blocks.len()].copy_from_slice(&blocks);
        let per_block = (BLOCK / 8) as usize;
        let mut rest = &beyond[..];
        for level in 0..3u32 {
            if rest.is_empty() {
                break;
            }
            let (here, after) = rest.split_at(rest.len().min(per_block.pow(level + 1)));
            addresses[12 + level as usize] = self.indirect(here, level);
            rest = after;
        }
        let at = (INODES_AT * FRAGMENT) as usize + number as usize * 256;
        self.disk[at..at + 2].copy_from_slice(&mode.to_le_bytes());
        self.disk[at + 16..at + 24].copy_from_slice(&(content.len() as u64).to_le_bytes());
        for (n, address) in addresses.iter().enumerate() {
            self.disk[at + 112 + 8 * n..at + 120 + 8 * n].copy_from_slice(&address.to_le_bytes());
        }
    }

    fn indirect(&mut self, blocks: &[u64], level: u32) -> u64 {
        let below = ((BLOCK / 8) as usize).pow(level);
        let table: Vec<u8> = blocks
            .chunks(below)
            .map(|part| if level == 0 { part[0] } else { self.indirect(part, level - 1) })
            .flat_map(u64::to_le_bytes)
            .collect();
        self.block(&table)
    }
}
