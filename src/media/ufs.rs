//! UFS, read-only: is there one, what is its label, and files by their path.
//!
//! Both versions, as FreeBSD and its image makers write them. Not read: checksums, journals (an unclean file system may show an
//! older state), symbolic links, extended attributes. Every number of the disk is checked before it is used; a file is read in one
//! pass of at most [`FILE_BYTES_MAX`], with at most three indirect blocks in memory.
//!
//! Facts: FreeBSD's `sys/ufs/ffs/fs.h` (superblock, where inodes lie), `sys/ufs/ffs/ffs_subr.c` (where superblocks are looked for),
//! `sys/ufs/ufs/dinode.h`, `sys/ufs/ufs/dir.h`, `sys/geom/label/g_label_ufs.c` (when /dev/ufs/LABEL appears).

use std::io;

use super::partitions::plain_name;
use super::{ReadAt, read, u16_at, u32_at, u64_at};

/// Where FreeBSD looks for a superblock, in its order (`SBLOCKSEARCH`). Image makers put UFS2's at 8 KiB too.
const SUPERBLOCK_STARTS: [u64; 4] = [65536, 8192, 0, 262_144];
const SUPERBLOCK_BYTES: usize = 1376;
const UFS2_MAGIC: u32 = 0x1954_0119;
const UFS1_MAGIC: u32 = 0x0001_1954;
/// A label's provider appears only if the file system is about as large as the partition: within 256 fragments.
const LABEL_FRAGMENTS_OFF_MAX: u64 = 0x100;

const ROOT_INODE: u32 = 2;
const DIRECT: u64 = 12;
const TYPE_MASK: u16 = 0o170_000;
const TYPE_DIRECTORY: u16 = 0o040_000;
const TYPE_REGULAR: u16 = 0o100_000;
/// Largest file that is read, and largest directory.
pub const FILE_BYTES_MAX: u64 = 512 << 20;
const DIRECTORY_BYTES_MAX: u64 = 4 << 20;
const PATH_NAMES_MAX: usize = 16;

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UfsError {
    #[error("the file system cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("the file system is damaged: {0}; check it with fsck_ffs")]
    Damaged(String),
    #[error("{path} is no regular file")]
    NotAFile { path: String },
    #[error("{what} has {bytes} bytes, more than the {limit} that are read")]
    TooLarge { what: String, bytes: u64, limit: u64 },
}

fn damaged<T>(what: impl Into<String>) -> Result<T, UfsError> {
    Err(UfsError::Damaged(what.into()))
}

/// A file system.
#[derive(Clone)]
pub struct Ufs<'a> {
    content: &'a dyn ReadAt,
    /// Where it lies on the disk.
    start: u64,
    bytes: u64,
    /// 1 or 2.
    pub version: u8,
    /// Volume label, if FreeBSD would make /dev/ufs/LABEL of it.
    pub label: Option<String>,
    geometry: Geometry,
}

/// Numbers of the superblock, as they are there.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    groups: u32,
    block_bytes: u32,
    fragment_bytes: u32,
    inodes_per_group: u32,
    fragments_per_group: u32,
    /// Fragments from a group's start to its inodes.
    inodes_at: u32,
    /// UFS1: how groups are shifted against each other.
    group_offset: u32,
    group_mask: u32,
}

/// A regular file.
#[derive(Debug, Clone)]
pub struct Inode {
    mode: u16,
    pub bytes: u64,
    direct: [u64; DIRECT as usize],
    indirect: [u64; 3],
}

/// Looks for a file system in `bytes` bytes from `start` of a disk, which must reach that far.
pub fn open<'a>(content: &'a dyn ReadAt, start: u64, bytes: u64) -> io::Result<Option<Ufs<'a>>> {
    let Some(end) = start.checked_add(bytes) else { return Ok(None) };
    for offset in SUPERBLOCK_STARTS {
        let Some(at) = start.checked_add(offset) else { continue };
        let Some(block) = read::<SUPERBLOCK_BYTES>(content, end, at)? else { continue };
        if let Some(version) = version(&block, offset) {
            let label = label(&block, version, bytes);
            let geometry = Geometry {
                groups: u32_at(&block, 44),
                block_bytes: u32_at(&block, 48),
                fragment_bytes: u32_at(&block, 52),
                inodes_per_group: u32_at(&block, 184),
                fragments_per_group: u32_at(&block, 188),
                inodes_at: u32_at(&block, 16),
                group_offset: u32_at(&block, 24),
                group_mask: u32_at(&block, 28),
            };
            return Ok(Some(Ufs { content, start, bytes, version, label, geometry }));
        }
    }
    Ok(None)
}

/// 1 or 2 if FreeBSD would take `block`, found at `offset`, for a superblock (`readsuper` in `ffs_subr.c`).
fn version(block: &[u8], offset: u64) -> Option<u8> {
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
    // Others are mounted by their partition.
    plain_name(name).then(|| name.to_owned())
}

impl Geometry {
    /// Checks what files are found by.
    fn check(&self) -> Result<(), UfsError> {
        let (block, fragment) = (self.block_bytes, self.fragment_bytes);
        if !block.is_power_of_two() || !(4096..=65536).contains(&block) {
            return damaged(format!("its blocks have {block} bytes"));
        }
        if !fragment.is_power_of_two() || fragment < 512 || fragment > block || block / fragment > 8 {
            return damaged(format!("its fragments have {fragment} bytes"));
        }
        if self.inodes_per_group == 0 || self.fragments_per_group == 0 {
            return damaged("its cylinder groups are empty");
        }
        Ok(())
    }
}

impl Ufs<'_> {
    /// Finds a file by its path from the root, `/boot/kernel/kernel`. Nothing: there is no such file.
    pub fn find(&self, path: &str) -> Result<Option<Inode>, UfsError> {
        self.geometry.check()?;
        let mut inode = self.inode(ROOT_INODE)?;
        let mut names = path.split('/').filter(|name| !name.is_empty());
        for name in names.by_ref().take(PATH_NAMES_MAX) {
            if inode.mode & TYPE_MASK != TYPE_DIRECTORY {
                return Ok(None);
            }
            match self.lookup(&inode, name)? {
                Some(number) => inode = self.inode(number)?,
                None => return Ok(None),
            }
        }
        if names.next().is_some() || inode.mode & TYPE_MASK != TYPE_REGULAR {
            return Err(UfsError::NotAFile { path: path.to_owned() });
        }
        Ok(Some(inode))
    }

    /// Hands a file's bytes to `each`, in order, in pieces of a block at most.
    pub fn read<E: From<UfsError>>(
        &self,
        inode: &Inode,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check_size("the file", inode.bytes, FILE_BYTES_MAX)?;
        self.blocks(inode, |piece| each(piece).map(|()| true))
    }

    /// A file's first bytes, at most `bytes_max` (which is at most a block).
    pub fn head(&self, inode: &Inode, bytes_max: usize) -> Result<Vec<u8>, UfsError> {
        let mut head = Vec::new();
        let first = Inode { bytes: inode.bytes.min(bytes_max as u64), ..inode.clone() };
        self.blocks(&first, |piece| -> Result<bool, UfsError> {
            head.extend_from_slice(piece);
            Ok(true)
        })?;
        Ok(head)
    }

    fn check_size(&self, what: &str, bytes: u64, limit: u64) -> Result<(), UfsError> {
        match bytes <= limit {
            true => Ok(()),
            false => Err(UfsError::TooLarge { what: what.to_owned(), bytes, limit }),
        }
    }

    /// Fills `buffer` from byte `at` of the file system.
    fn fill(&self, buffer: &mut [u8], at: u64) -> Result<(), UfsError> {
        if at.checked_add(buffer.len() as u64).is_none_or(|end| end > self.bytes) {
            return damaged(format!("something lies at byte {at}, it has {}", self.bytes));
        }
        match self.start.checked_add(at) {
            Some(at) => Ok(self.content.read_at(buffer, at)?),
            None => damaged("it lies behind the end of all disks"),
        }
    }

    fn inode(&self, number: u32) -> Result<Inode, UfsError> {
        let Geometry { groups, block_bytes, fragment_bytes, inodes_per_group, .. } = self.geometry;
        let (group, index) = (number / inodes_per_group, number % inodes_per_group);
        if group >= groups {
            return damaged(format!("file number {number} does not exist"));
        }
        let inode_bytes: u32 = if self.version == 2 { 256 } else { 128 };
        let in_block = block_bytes / inode_bytes;
        let mut fragment = u64::from(self.geometry.fragments_per_group) * u64::from(group)
            + u64::from(self.geometry.inodes_at)
            + u64::from(index / in_block) * u64::from(block_bytes / fragment_bytes);
        if self.version == 1 {
            // The product of two large numbers on top of another one.
            let shift = u64::from(self.geometry.group_offset) * u64::from(group & !self.geometry.group_mask);
            fragment = fragment.saturating_add(shift);
        }
        let at = fragment
            .checked_mul(u64::from(fragment_bytes))
            .and_then(|at| at.checked_add(u64::from(index % in_block * inode_bytes)));
        let Some(at) = at else { return damaged(format!("file number {number} lies nowhere")) };
        let mut raw = [0u8; 256];
        let Some(bytes) = raw.get_mut(..inode_bytes as usize) else { return damaged("no inode") };
        self.fill(bytes, at)?;
        let mut inode = Inode { mode: u16_at(&raw, 0), bytes: 0, direct: [0; 12], indirect: [0; 3] };
        let addresses = inode.direct.iter_mut().chain(&mut inode.indirect).enumerate();
        if self.version == 2 {
            inode.bytes = u64_at(&raw, 16);
            addresses.for_each(|(n, address)| *address = u64_at(&raw, 112 + 8 * n));
        } else {
            inode.bytes = u64_at(&raw, 8);
            addresses.for_each(|(n, address)| *address = u64::from(u32_at(&raw, 40 + 4 * n)));
        }
        Ok(inode)
    }

    /// Finds a name in a directory.
    fn lookup(&self, directory: &Inode, name: &str) -> Result<Option<u32>, UfsError> {
        self.check_size("a directory", directory.bytes, DIRECTORY_BYTES_MAX)?;
        let mut found = None;
        self.blocks(directory, |block| -> Result<bool, UfsError> {
            let mut rest = block;
            // An entry: number u32, its own length u16, type u8, length of the name u8, name.
            while rest.len() >= 8 {
                let (number, length) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)));
                let name_bytes = rest.get(7).map_or(0, |length| usize::from(*length));
                if length < 8 + name_bytes || length % 4 != 0 || length > rest.len() {
                    return damaged("a directory has an entry that cannot be");
                }
                if number != 0 && rest.get(8..8 + name_bytes) == Some(name.as_bytes()) {
                    found = Some(number);
                    return Ok(false);
                }
                rest = rest.get(length..).unwrap_or(&[]);
            }
            Ok(true)
        })?;
        Ok(found)
    }

    /// Hands the bytes of a file to `each`, block by block, until it says false. The caller has limited the size.
    fn blocks<E: From<UfsError>>(
        &self,
        inode: &Inode,
        mut each: impl FnMut(&[u8]) -> Result<bool, E>,
    ) -> Result<(), E> {
        let block_bytes = u64::from(self.geometry.block_bytes);
        let mut buffer = vec![0u8; block_bytes as usize];
        let mut walk = Walk::default();
        for n in 0..inode.bytes.div_ceil(block_bytes) {
            let bytes = block_bytes.min(inode.bytes - n * block_bytes);
            let Some(piece) = buffer.get_mut(..bytes as usize) else { break };
            match self.address(inode, n, &mut walk)? {
                0 => piece.fill(0),
                address => self.fill(piece, self.byte(address)?)?,
            }
            if !each(piece)? {
                break;
            }
        }
        Ok(())
    }

    fn byte(&self, fragment: u64) -> Result<u64, UfsError> {
        match fragment.checked_mul(u64::from(self.geometry.fragment_bytes)) {
            Some(byte) => Ok(byte),
            None => damaged(format!("it speaks of block {fragment}")),
        }
    }

    /// Fragment at which block `n` of a file begins; 0: a hole.
    fn address(&self, inode: &Inode, n: u64, walk: &mut Walk) -> Result<u64, UfsError> {
        if let Some(address) = usize::try_from(n).ok().and_then(|n| inode.direct.get(n)) {
            return Ok(*address);
        }
        let width: u64 = if self.version == 2 { 8 } else { 4 };
        let per_block = u64::from(self.geometry.block_bytes) / width;
        let mut n = n - DIRECT;
        let mut covered = 1;
        for (level, top) in inode.indirect.iter().enumerate() {
            // per_block is at most 16384, so three levels stay below 2^42.
            covered *= per_block;
            if n >= covered {
                n -= covered;
                continue;
            }
            let (mut address, mut below) = (*top, covered);
            for depth in 0..=level {
                if address == 0 {
                    return Ok(0);
                }
                below /= per_block;
                let block = walk.block(self, depth, address)?;
                let slot = (n / below * width) as usize;
                address = if width == 8 { u64_at(block, slot) } else { u64::from(u32_at(block, slot)) };
                n %= below;
            }
            return Ok(address);
        }
        damaged("a file is longer than its blocks reach")
    }
}

/// The indirect blocks read last, one for each depth: a file is read in order, so that is all it takes.
#[derive(Default)]
struct Walk {
    levels: [Option<(u64, Vec<u8>)>; 3],
}

impl Walk {
    fn block(&mut self, ufs: &Ufs<'_>, depth: usize, address: u64) -> Result<&[u8], UfsError> {
        let Some(level) = self.levels.get_mut(depth) else { return damaged("too deep") };
        if level.as_ref().is_none_or(|(at, _)| *at != address) {
            let mut block = vec![0u8; ufs.geometry.block_bytes as usize];
            ufs.fill(&mut block, ufs.byte(address)?)?;
            *level = Some((address, block));
        }
        Ok(level.as_ref().map_or(&[], |(_, block)| block))
    }
}

#[cfg(test)]
#[path = "ufs_tests.rs"]
mod tests;
