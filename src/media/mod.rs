//! What is on disks, and in the files in which people bring them.
//!
//! | file | what |
//! |---|---|
//! | `partitions` | partition tables: GPT, MBR with BSD labels, none |
//! | `ufs` | UFS1 and UFS2, read-only: superblock, label, files by path |
//! | `inspect` | a whole disk looked through: its volumes, its kernel, what is wrong with it |
//! | `kernel` | what a kernel file is, and for which processor |
//! | `unpack` | disk files as they are distributed: xz, zstd, gzip, qcow2 |
//! | `pull` | FreeBSD's published images: what they are called, their checksums, a download that resumes |
//!
//! May touch: disks through [`ReadAt`], the files and addresses it is given. Everything that is read here is hostile: each number is
//! checked before it is used, and there is a limit on every length, depth and count.

#![forbid(unsafe_code)]

pub mod inspect;
pub mod kernel;
pub mod partitions;
pub mod pull;
#[cfg(any(test, fuzzing))]
pub mod testing;
pub mod ufs;
pub mod unpack;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Something with bytes at offsets: a disk as the guest will see it.
pub trait ReadAt {
    /// Fills `buffer` from `offset`; an error if there are not as many bytes.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }
}

/// `N` bytes at `at` of something with `bytes` bytes; nothing if it ends before.
fn read<const N: usize>(content: &dyn ReadAt, bytes: u64, at: u64) -> io::Result<Option<[u8; N]>> {
    if at.checked_add(N as u64).is_none_or(|end| end > bytes) {
        return Ok(None);
    }
    let mut buffer = [0u8; N];
    content.read_at(&mut buffer, at)?;
    Ok(Some(buffer))
}

/// Little-endian numbers; what lies outside reads zero.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(number(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

/// A size as people read it.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{bytes} {name}") } else { format!("{value:.1} {name}") }
}
