//! Finding a FreeBSD root file system on the disks, so that `vfs.root.mountfrom` need not be written by hand.
//!
//! Reads disks through [`super::ReadAt`]; their content is hostile. Facts: UEFI specification, chapter 5 (GPT, MBR); FreeBSD's
//! `sys/sys/disk/gpt.h`, `sys/sys/disk/mbr.h`, `sys/sys/disklabel.h` (types), `sys/ufs/ffs/fs.h` (superblock),
//! `sys/geom/label/g_label_ufs.c` (when /dev/ufs/LABEL appears), `sys/geom/part` (partition names).
//!
//! Order of preference: a UFS labelled "rootfs" or "root", then other UFS volumes: GPT freebsd-ufs partitions, MBR slices
//! and the BSD partitions in them, a bare file system; disks in their order.

use super::DiskView;
use super::elf::{u16_at, u32_at, u64_at};

/// The answer: what to mount, and lines for people.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub mount_from: Option<String>,
    pub choices: Vec<String>,
}

const SECTOR_BYTES: u64 = 512;
/// GPT's own minimum is 128; more than this is no real disk.
const GPT_ENTRIES_MAX: u32 = 1024;
/// 516e7cb6-6ecf-11d6-8ff8-00022d09712b as it lies on disk.
const FREEBSD_UFS: [u8; 16] =
    [0xb6, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
/// 516e7cba-6ecf-11d6-8ff8-00022d09712b.
const FREEBSD_ZFS: [u8; 16] =
    [0xba, 0x7c, 0x6e, 0x51, 0xcf, 0x6e, 0xd6, 0x11, 0x8f, 0xf8, 0x00, 0x02, 0x2d, 0x09, 0x71, 0x2b];
const MBR_FREEBSD: u8 = 0xa5;
const BSD_LABEL_MAGIC: u32 = 0x8256_4557;
const BSD_PARTITIONS_MAX: usize = 20;
const BSD_TYPE_FFS: u8 = 7;

/// Where FreeBSD looks for a superblock, in its order (`SBLOCKSEARCH`). Image makers put UFS2's at 8 KiB too.
const SUPERBLOCK_STARTS: [u64; 4] = [65536, 8192, 0, 262_144];
const SUPERBLOCK_BYTES: usize = 1376;
const UFS2_MAGIC: u32 = 0x1954_0119;
const UFS1_MAGIC: u32 = 0x0001_1954;
/// A label's provider appears only if the file system is about as large as the partition: within 256 fragments.
const LABEL_FRAGMENTS_OFF_MAX: u64 = 0x100;

/// A UFS file system.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ufs {
    version: u8,
    /// Volume label, if FreeBSD would make /dev/ufs/LABEL of it.
    label: Option<String>,
}

/// A place where a UFS is.
struct Candidate {
    device: String,
    place: String,
    ufs: Ufs,
    read_only: bool,
}

/// Looks for a root file system on `disks`.
pub fn find_root(disks: &[DiskView]) -> Found {
    let mut candidates = Vec::new();
    let mut zfs = None;
    let mut choices = Vec::new();
    for (unit, disk) in disks.iter().enumerate() {
        let disk = Disk { view: disk, name: format!("vtbd{unit}") };
        if let Err(error) = disk.scan(&mut candidates, &mut zfs) {
            choices.push(format!("root: {} cannot be read: {error}", disk.name));
        }
    }
    let by_label = |name: &str| candidates.iter().position(|c| c.ufs.label.as_deref() == Some(name));
    let chosen = by_label("rootfs").or_else(|| by_label("root")).unwrap_or(0);
    let Some(candidate) = candidates.get(chosen) else {
        choices.push(match zfs {
            Some(device) => format!(
                "root: none chosen; {device} is ZFS: name the dataset with vfs.root.mountfrom=zfs:POOL/ROOT/default"
            ),
            None if disks.is_empty() => "root: no disk, no memory disk; the kernel must bring its own".into(),
            None => "root: no UFS found on the disks; name it with vfs.root.mountfrom=TYPE:DEVICE".into(),
        });
        return Found { mount_from: None, choices };
    };
    let unique =
        |label: &str| candidates.iter().filter(|c| c.ufs.label.as_deref() == Some(label)).count() == 1;
    let Ufs { version, label } = &candidate.ufs;
    let mount_from = match label.as_deref().filter(|label| unique(label)) {
        Some(label) => format!("ufs:/dev/ufs/{label}"),
        None => format!("ufs:/dev/{}", candidate.device),
    };
    let device = if label.is_some() { format!(", {}", candidate.device) } else { String::new() };
    let read_only = if candidate.read_only { ", read-only disk" } else { "" };
    choices.push(format!("root: {mount_from} ({}, UFS{version}{device}{read_only})", candidate.place));
    let others: Vec<_> =
        candidates.iter().enumerate().filter(|(i, _)| *i != chosen).map(|(_, c)| c.device.as_str()).collect();
    if !others.is_empty() {
        choices.push(format!("root: also UFS, not chosen: {}", others.join(", ")));
    }
    Found { mount_from: Some(mount_from), choices }
}

struct Disk<'a> {
    view: &'a DiskView<'a>,
    name: String,
}

impl Disk<'_> {
    fn candidate(&self, device: String, place: String, ufs: Ufs) -> Candidate {
        Candidate { device, place, ufs, read_only: self.view.read_only }
    }

    fn scan(&self, found: &mut Vec<Candidate>, zfs: &mut Option<String>) -> std::io::Result<()> {
        let Some(first) = self.read::<512>(0)? else { return Ok(()) };
        let header = self.read::<92>(SECTOR_BYTES)?;
        if let Some(header) = header.filter(|header| header.starts_with(b"EFI PART")) {
            return self.scan_gpt(&header, found, zfs);
        }
        if let Some(ufs) = self.ufs(0, self.view.bytes)? {
            found.push(self.candidate(self.name.clone(), "whole disk".into(), ufs));
            return Ok(());
        }
        if first.ends_with(&[0x55, 0xaa]) {
            self.scan_mbr(&first, found)?;
        }
        Ok(())
    }

    fn scan_gpt(
        &self,
        header: &[u8; 92],
        found: &mut Vec<Candidate>,
        zfs: &mut Option<String>,
    ) -> std::io::Result<()> {
        let (table, count, size) = (u64_at(header, 72), u32_at(header, 80), u32_at(header, 84));
        if !(128..=4096).contains(&size) {
            return Ok(());
        }
        for i in 0..count.min(GPT_ENTRIES_MAX) {
            let at =
                table.checked_mul(SECTOR_BYTES).and_then(|at| at.checked_add(u64::from(i) * u64::from(size)));
            let Some(entry) = at.map(|at| self.read::<128>(at)).transpose()?.flatten() else { break };
            let device = format!("{}p{}", self.name, i + 1);
            let kind = entry.first_chunk::<16>();
            if kind == Some(&FREEBSD_ZFS) {
                zfs.get_or_insert(device);
                continue;
            }
            if kind != Some(&FREEBSD_UFS) {
                continue;
            }
            let (start, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
            let bytes = last.checked_sub(start).and_then(|n| n.checked_add(1)?.checked_mul(SECTOR_BYTES));
            let Some((start, bytes)) = start.checked_mul(SECTOR_BYTES).zip(bytes) else { continue };
            // The type alone says so already; a superblock adds version and label.
            if let Some(ufs) = self.ufs(start, bytes)? {
                found.push(self.candidate(device, format!("GPT partition {}, freebsd-ufs", i + 1), ufs));
            }
        }
        Ok(())
    }

    fn scan_mbr(&self, first: &[u8; 512], found: &mut Vec<Candidate>) -> std::io::Result<()> {
        for (i, entry) in first[446..510].chunks_exact(16).enumerate() {
            if entry.get(4) != Some(&MBR_FREEBSD) {
                continue;
            }
            let start = u64::from(u32_at(entry, 8)) * SECTOR_BYTES;
            let bytes = u64::from(u32_at(entry, 12)) * SECTOR_BYTES;
            let slice = format!("{}s{}", self.name, i + 1);
            let before = found.len();
            self.scan_bsd_label(&slice, i + 1, start, found)?;
            if found.len() > before {
                continue;
            }
            if let Some(ufs) = self.ufs(start, bytes)? {
                found.push(self.candidate(slice, format!("MBR slice {}", i + 1), ufs));
            }
        }
        Ok(())
    }

    fn scan_bsd_label(
        &self,
        slice: &str,
        number: usize,
        start: u64,
        found: &mut Vec<Candidate>,
    ) -> std::io::Result<()> {
        let Some(label) =
            start.checked_add(SECTOR_BYTES).map(|at| self.read::<512>(at)).transpose()?.flatten()
        else {
            return Ok(());
        };
        if u32_at(&label, 0) != BSD_LABEL_MAGIC || u32_at(&label, 132) != BSD_LABEL_MAGIC {
            return Ok(());
        }
        let partitions = usize::from(u16_at(&label, 138)).min(BSD_PARTITIONS_MAX);
        let entries = || label[148..].chunks_exact(16).take(partitions);
        // Offsets in the label are relative to the slice or to the disk; partition c is the whole slice and tells which.
        let base = entries().nth(2).map_or(0, |c| u64::from(u32_at(c, 4)));
        for (letter, entry) in ('a'..='t').zip(entries()) {
            let (sectors, offset, kind) = (u32_at(entry, 0), u64::from(u32_at(entry, 4)), entry[12]);
            let Some(offset) = offset.checked_sub(base).filter(|_| kind == BSD_TYPE_FFS) else { continue };
            let Some(at) = start.checked_add(offset * SECTOR_BYTES) else { continue };
            if let Some(ufs) = self.ufs(at, u64::from(sectors) * SECTOR_BYTES)? {
                let place = format!("MBR slice {number}, BSD partition {letter}");
                found.push(self.candidate(format!("{slice}{letter}"), place, ufs));
            }
        }
        Ok(())
    }

    /// A UFS in `bytes` bytes from `start`.
    fn ufs(&self, start: u64, bytes: u64) -> std::io::Result<Option<Ufs>> {
        for offset in SUPERBLOCK_STARTS {
            let Some(at) = start.checked_add(offset) else { continue };
            if offset.saturating_add(SUPERBLOCK_BYTES as u64) > bytes {
                continue;
            }
            let Some(block) = self.read::<SUPERBLOCK_BYTES>(at)? else { continue };
            if let Some(version) = superblock_version(&block, offset) {
                return Ok(Some(Ufs { version, label: label(&block, version, bytes) }));
            }
        }
        Ok(None)
    }

    /// `N` bytes at `at`; nothing if the disk ends before.
    fn read<const N: usize>(&self, at: u64) -> std::io::Result<Option<[u8; N]>> {
        if at.checked_add(N as u64).is_none_or(|end| end > self.view.bytes) {
            return Ok(None);
        }
        let mut buffer = [0u8; N];
        self.view.content.read_at(&mut buffer, at)?;
        Ok(Some(buffer))
    }
}

/// 1 or 2 if FreeBSD would take `block`, found at `offset`, for a superblock (`readsuper` in `ffs_subr.c`).
fn superblock_version(block: &[u8], offset: u64) -> Option<u8> {
    let version = match u32_at(block, 1372) {
        UFS2_MAGIC if u64_at(block, 1000) == offset => 2,
        UFS1_MAGIC if offset <= 8192 => 1,
        _ => return None,
    };
    let (groups, block_bytes, superblock_bytes) = (u32_at(block, 44), u32_at(block, 48), u32_at(block, 104));
    (groups >= 1 && (4096..=65536).contains(&block_bytes) && superblock_bytes <= 8192).then_some(version)
}

/// The volume label, under the conditions on which FreeBSD makes a device of it.
fn label(block: &[u8], version: u8, partition_bytes: u64) -> Option<String> {
    let fragment_bytes = u64::from(u32_at(block, 52));
    let fragments = partition_bytes.checked_div(fragment_bytes)?;
    let size = if version == 2 { u64_at(block, 1080) } else { u64::from(u32_at(block, 36)) };
    let provider = u64_at(block, 872);
    let close = |n: u64| n.abs_diff(fragments) < LABEL_FRAGMENTS_OFF_MAX;
    if !close(size) && !close(provider) {
        return None;
    }
    let name = block.get(680..680 + 32)?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    let name = std::str::from_utf8(name.get(..end)?).ok()?;
    // A name that needs no escaping anywhere; others are mounted by their partition.
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    (!name.is_empty() && name.bytes().all(plain)).then(|| name.to_owned())
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
