//! Partition tables: GPT, MBR with FreeBSD slices and BSD labels, or none.
//!
//! A table that is there but wrong is an error that says what is wrong with it; the volumes that can be told all the same are
//! given too. A GPT whose first copy is damaged is read from its second, as FreeBSD does.
//!
//! Facts: UEFI specification, chapter 5 (GPT, MBR); FreeBSD's `sys/sys/disk/gpt.h`, `sys/sys/disk/mbr.h`,
//! `sys/sys/disklabel.h` (types), `sys/geom/part` (partition names, which copy counts).

use std::io;

use super::{ReadAt, read, u16_at, u32_at, u64_at};

pub const SECTOR_BYTES: u64 = 512;
/// GPT's own minimum is 128; more than this is no real disk.
const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES_MAX: u32 = 4096;
const GPT_HEADER_BYTES: usize = 92;
/// 516e7cb6-6ecf-11d6-8ff8-00022d09712b as it lies on disk; the first byte tells FreeBSD's types apart.
const FREEBSD: [u8; 16] =
    [0xb6, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
const FREEBSD_SWAP: u8 = 0xb5;
const FREEBSD_UFS: u8 = 0xb6;
const FREEBSD_ZFS: u8 = 0xba;
/// 83bd6b9d-7f41-11dc-be0b-001560b84f0f.
const FREEBSD_BOOT: [u8; 16] =
    [0x9d, 0x6b, 0xbd, 0x83, 0x41, 0x7f, 0xdc, 0x11, 0xbe, 0x0b, 0x00, 0x15, 0x60, 0xb8, 0x4f, 0x0f];
/// c12a7328-f81f-11d2-ba4b-00a0c93ec93b.
const EFI_SYSTEM: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
const MBR_FREEBSD: u8 = 0xa5;
const MBR_PROTECTIVE: u8 = 0xee;
const BSD_LABEL_MAGIC: u32 = 0x8256_4557;
const BSD_PARTITIONS_MAX: usize = 20;
const BSD_TYPE_SWAP: u8 = 1;
const BSD_TYPE_FFS: u8 = 7;

/// What is wrong with a partition table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    #[error("the GPT's {copy} header is damaged ({what})")]
    Header { copy: &'static str, what: String },
    #[error("the GPT is damaged in both copies: {first}; {second}")]
    BothCopies { first: Box<TableError>, second: Box<TableError> },
    #[error("the GPT's {copy} list of partitions is damaged (its checksum is wrong)")]
    Entries { copy: &'static str },
    #[error(
        "the partition table is that of a disk of {needed} bytes, but the disk has {bytes}: it was truncated"
    )]
    Truncated { needed: u64, bytes: u64 },
    #[error("partition {name} lies outside the disk (sectors {first} to {last}, the disk has {sectors})")]
    Outside { name: String, first: u64, last: u64, sectors: u64 },
}

/// Kind of table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    None,
    Gpt,
    Mbr,
}

/// What a partition says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ufs,
    Zfs,
    Swap,
    Boot,
    Efi,
    /// An MBR slice of FreeBSD's without a label of its own.
    Slice,
    Other,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// What FreeBSD adds to the disk's name: `p4`, `s1`, `s1a`.
    pub suffix: String,
    /// For people: "GPT partition 4, freebsd-ufs".
    pub place: String,
    pub kind: Kind,
    /// GPT name, if it is one that `/dev/gpt` shows as it is.
    pub name: Option<String>,
    /// Bytes from the disk's start.
    pub start: u64,
    pub bytes: u64,
}

/// A disk's partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub scheme: Scheme,
    pub partitions: Vec<Partition>,
    /// What is wrong, so that a system on this disk may not come up.
    pub problem: Option<TableError>,
    /// What is odd, and works.
    pub notes: Vec<String>,
}

/// A name that needs no escaping anywhere.
pub fn plain_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    !name.is_empty() && name.len() <= 64 && name.bytes().all(plain)
}

/// Reads the table of a disk of `bytes` bytes.
pub fn table(content: &dyn ReadAt, bytes: u64) -> io::Result<Table> {
    let disk = Disk { content, bytes, sectors: bytes / SECTOR_BYTES };
    let none = Table { scheme: Scheme::None, partitions: Vec::new(), problem: None, notes: Vec::new() };
    let Some(first) = disk.read::<512>(0)? else { return Ok(none) };
    let header = disk.read::<GPT_HEADER_BYTES>(SECTOR_BYTES)?;
    let primary = header.is_some_and(|header| header.starts_with(b"EFI PART"));
    if primary || protective(&first) {
        return disk.gpt();
    }
    match first.ends_with(&[0x55, 0xaa]) {
        true => disk.mbr(&first),
        false => Ok(none),
    }
}

/// Whether an MBR says that a GPT follows.
fn protective(first: &[u8; 512]) -> bool {
    first.ends_with(&[0x55, 0xaa])
        && mbr_entries(first).any(|entry| entry.get(4) == Some(&MBR_PROTECTIVE) && u32_at(entry, 8) == 1)
}

fn mbr_entries(first: &[u8; 512]) -> impl Iterator<Item = &[u8]> {
    first.get(446..510).unwrap_or(&[]).chunks_exact(16)
}

struct Disk<'a> {
    content: &'a dyn ReadAt,
    bytes: u64,
    sectors: u64,
}

/// A GPT header that was checked.
struct Header {
    entries_at: u64,
    count: u32,
    entry_bytes: u32,
    entries_sum: u32,
    alternate: u64,
    last_usable: u64,
}

impl Disk<'_> {
    fn read<const N: usize>(&self, at: u64) -> io::Result<Option<[u8; N]>> {
        read(self.content, self.bytes, at)
    }

    fn gpt(&self) -> io::Result<Table> {
        let mut table =
            Table { scheme: Scheme::Gpt, partitions: Vec::new(), problem: None, notes: Vec::new() };
        let (header, entries) = match self.gpt_copy("first", 1)? {
            Ok(copy) => copy,
            Err(first) => match self.gpt_copy("second", self.sectors.saturating_sub(1))? {
                Ok(copy) => {
                    table.notes.push(format!(
                        "{first}; the second copy is used, `gpart recover` in the guest repairs the first"
                    ));
                    copy
                }
                Err(second) => {
                    table.problem =
                        Some(TableError::BothCopies { first: Box::new(first), second: Box::new(second) });
                    return Ok(table);
                }
            },
        };
        // The second header is the disk's last sector when the table is made; a disk may have grown since.
        let needed = header.alternate.max(header.last_usable).saturating_add(1).saturating_mul(SECTOR_BYTES);
        if needed > self.bytes {
            table.problem = Some(TableError::Truncated { needed, bytes: self.bytes });
        }
        for (n, entry) in (1u32..).zip(entries.chunks_exact(header.entry_bytes as usize)) {
            self.gpt_entry(n, entry, &mut table);
        }
        Ok(table)
    }

    /// One of the two copies: its header, and its list of partitions.
    fn gpt_copy(&self, copy: &'static str, sector: u64) -> io::Result<Result<(Header, Vec<u8>), TableError>> {
        let wrong = |what: String| Ok(Err(TableError::Header { copy, what }));
        let Some(block) =
            sector.checked_mul(SECTOR_BYTES).map(|at| self.read::<512>(at)).transpose()?.flatten()
        else {
            return wrong("the disk ends before it".into());
        };
        if !block.starts_with(b"EFI PART") {
            return wrong("there is none where it should be".into());
        }
        let header_bytes = u32_at(&block, 12) as usize;
        let Some(summed) = block.get(..header_bytes).filter(|summed| summed.len() >= GPT_HEADER_BYTES) else {
            return wrong(format!("it claims a length of {header_bytes} bytes"));
        };
        let mut summed = summed.to_vec();
        if let Some(sum) = summed.get_mut(16..20) {
            sum.fill(0);
        }
        if crc32fast::hash(&summed) != u32_at(&block, 16) {
            return wrong("its checksum is wrong".into());
        }
        if u64_at(&block, 24) != sector {
            return wrong(format!("it says that it lies at sector {}, not {sector}", u64_at(&block, 24)));
        }
        let header = Header {
            alternate: u64_at(&block, 32),
            last_usable: u64_at(&block, 48),
            entries_at: u64_at(&block, 72),
            count: u32_at(&block, 80),
            entry_bytes: u32_at(&block, 84),
            entries_sum: u32_at(&block, 88),
        };
        if !(128..=GPT_ENTRY_BYTES_MAX).contains(&header.entry_bytes) || !header.entry_bytes.is_multiple_of(8)
        {
            return wrong(format!("it claims partition entries of {} bytes", header.entry_bytes));
        }
        if header.count == 0 || header.count > GPT_ENTRIES_MAX {
            return wrong(format!("it claims {} partition entries", header.count));
        }
        // At most 4 MiB, by the limits above.
        let list_bytes = u64::from(header.count) * u64::from(header.entry_bytes);
        let end = header.entries_at.checked_mul(SECTOR_BYTES).and_then(|at| at.checked_add(list_bytes));
        let Some(at) = end.filter(|end| *end <= self.bytes).map(|end| end - list_bytes) else {
            return wrong("its list of partitions lies outside the disk".into());
        };
        let mut entries = vec![0; list_bytes as usize];
        self.content.read_at(&mut entries, at)?;
        if crc32fast::hash(&entries) != header.entries_sum {
            return Ok(Err(TableError::Entries { copy }));
        }
        Ok(Ok((header, entries)))
    }

    fn gpt_entry(&self, n: u32, entry: &[u8], table: &mut Table) {
        let Some(kind) = entry.first_chunk::<16>().filter(|kind| **kind != [0; 16]) else { return };
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let suffix = format!("p{n}");
        if first > last || last >= self.sectors {
            table.problem.get_or_insert(TableError::Outside {
                name: suffix,
                first,
                last,
                sectors: self.sectors,
            });
            return;
        }
        let freebsd = kind.get(1..) == FREEBSD.get(1..);
        let (kind, word) = match kind.first() {
            Some(&FREEBSD_UFS) if freebsd => (Kind::Ufs, "freebsd-ufs"),
            Some(&FREEBSD_ZFS) if freebsd => (Kind::Zfs, "freebsd-zfs"),
            Some(&FREEBSD_SWAP) if freebsd => (Kind::Swap, "freebsd-swap"),
            _ if *kind == FREEBSD_BOOT => (Kind::Boot, "freebsd-boot"),
            _ if *kind == EFI_SYSTEM => (Kind::Efi, "efi"),
            _ => (Kind::Other, "of another type"),
        };
        table.partitions.push(Partition {
            place: format!("GPT partition {n}, {word}"),
            suffix,
            kind,
            name: gpt_name(entry),
            start: first * SECTOR_BYTES,
            bytes: (last - first + 1) * SECTOR_BYTES,
        });
    }

    fn mbr(&self, first: &[u8; 512]) -> io::Result<Table> {
        let mut table =
            Table { scheme: Scheme::None, partitions: Vec::new(), problem: None, notes: Vec::new() };
        // The signature alone also ends the first sector of a FAT file system, or a loader.
        let sound = |entry: &[u8]| matches!(entry.first(), Some(0 | 0x80));
        if !mbr_entries(first).all(sound) {
            return Ok(table);
        }
        for (n, entry) in (1u32..).zip(mbr_entries(first)) {
            let kind = entry.get(4).copied().unwrap_or(0);
            let (start, count) = (u64::from(u32_at(entry, 8)), u64::from(u32_at(entry, 12)));
            if kind == 0 || count == 0 {
                continue;
            }
            table.scheme = Scheme::Mbr;
            let suffix = format!("s{n}");
            if start + count > self.sectors {
                if kind == MBR_FREEBSD {
                    let (sectors, last) = (self.sectors, start + count - 1);
                    let outside = TableError::Outside { name: suffix, first: start, last, sectors };
                    table.problem.get_or_insert(outside);
                }
                continue;
            }
            let (start, bytes) = (start * SECTOR_BYTES, count * SECTOR_BYTES);
            let before = table.partitions.len();
            if kind == MBR_FREEBSD {
                self.bsd_label(&suffix, n, start, &mut table)?;
            }
            if table.partitions.len() == before {
                let (kind, place) = match kind {
                    MBR_FREEBSD => (Kind::Slice, format!("MBR slice {n}")),
                    0xef => (Kind::Efi, format!("MBR slice {n}, efi")),
                    _ => (Kind::Other, format!("MBR slice {n}, of another type")),
                };
                table.partitions.push(Partition { suffix, place, kind, name: None, start, bytes });
            }
        }
        Ok(table)
    }

    fn bsd_label(&self, slice: &str, number: u32, start: u64, table: &mut Table) -> io::Result<()> {
        let label = start.checked_add(SECTOR_BYTES).map(|at| self.read::<512>(at)).transpose()?.flatten();
        let Some(label) = label else { return Ok(()) };
        if u32_at(&label, 0) != BSD_LABEL_MAGIC || u32_at(&label, 132) != BSD_LABEL_MAGIC {
            return Ok(());
        }
        let partitions = usize::from(u16_at(&label, 138)).min(BSD_PARTITIONS_MAX);
        let entries = || label.get(148..).unwrap_or(&[]).chunks_exact(16).take(partitions);
        // Offsets in the label are relative to the slice or to the disk; partition c is the whole slice and tells which.
        let base = entries().nth(2).map_or(0, |c| u64::from(u32_at(c, 4)));
        for (letter, entry) in ('a'..='t').zip(entries()) {
            let (count, offset) = (u64::from(u32_at(entry, 0)), u64::from(u32_at(entry, 4)));
            let kind = match entry.get(12) {
                Some(&BSD_TYPE_FFS) => Kind::Ufs,
                Some(&BSD_TYPE_SWAP) => Kind::Swap,
                _ => continue,
            };
            let Some(offset) = offset.checked_sub(base).filter(|_| count > 0) else { continue };
            let suffix = format!("{slice}{letter}");
            let first = start / SECTOR_BYTES + offset;
            if first + count > self.sectors {
                let (sectors, last) = (self.sectors, first + count - 1);
                let outside = TableError::Outside { name: suffix, first, last, sectors };
                table.problem.get_or_insert(outside);
                continue;
            }
            table.partitions.push(Partition {
                suffix,
                place: format!("MBR slice {number}, BSD partition {letter}"),
                kind,
                name: None,
                start: first * SECTOR_BYTES,
                bytes: count * SECTOR_BYTES,
            });
        }
        Ok(())
    }
}

/// A GPT entry's name, UTF-16.
fn gpt_name(entry: &[u8]) -> Option<String> {
    let units: Vec<u16> = entry
        .get(56..128)?
        .chunks_exact(2)
        .map(|unit| u16_at(unit, 0))
        .take_while(|unit| *unit != 0)
        .collect();
    String::from_utf16(&units).ok().filter(|name| plain_name(name))
}

#[cfg(test)]
#[path = "partitions_tests.rs"]
mod tests;
