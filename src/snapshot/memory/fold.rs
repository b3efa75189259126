//! Folding: making the page cache hold a memory file in 2 MiB folios.
//!
//! A file that was written sparsely, page by page, lies in the page cache in small folios, and a clone pays a fault for each few
//! pages that it touches. Held in 2 MiB folios, and mapped 2 MiB aligned ([`super::mapped`]), one fault brings 512
//! pages, and guest, KVM and host can all use huge mappings; on nested hosts the first touch becomes a hundred times
//! cheaper. Clean pages stay shared between all clones either way.
//!
//! How: once the file is on disk, drop its pages and read it back through a mapping that asks for huge pages, which is
//! what makes the kernel's readahead allocate them (mm/filemap.c, `do_sync_mmap_readahead`; needs a file system with
//! large folios: ext4 from 6.16, xfs, btrfs, tmpfs). Where that is not to be had it costs one reading of the data and
//! changes nothing.
//!
//! All of it is advice about the cache: it can be done, left out or repeated at any time, clones running or not.

use std::{fs::File, io, os::fd::AsRawFd, ptr};

use super::extents::{Extents, Run};
use crate::snapshot::limits::HUGE_BYTES;

/// Folds the 2 MiB pieces of `file` that have data in them, from the front, until `bytes_max` bytes of page cache are used
/// for it (the kernel reads a little ahead besides). Returns the bytes folded. Blocks while the disk reads; the file must have been synced, or its dirty pages
/// stay as they are.
///
/// # Errors
/// What mapping or reading gives; nothing is lost.
pub fn fold(file: &File, extents: &Extents, bytes_max: u64) -> io::Result<u64> {
    let pieces = pieces(extents, bytes_max);
    let Some(&(_, end)) = pieces.last() else { return Ok(0) };
    let view = View::new(file, end)?;
    for &(start, end) in &pieces {
        // SAFETY: plain integers; advice to drop clean pages that nobody has mapped.
        unsafe {
            libc::posix_fadvise(
                file.as_raw_fd(),
                start as i64,
                (end - start) as i64,
                libc::POSIX_FADV_DONTNEED,
            )
        };
        view.read(start, end)?;
    }
    Ok(pieces.iter().map(|(start, end)| end - start).sum())
}

/// Runs of whole 2 MiB pieces that have data, as file offsets.
fn pieces(extents: &Extents, bytes_max: u64) -> Vec<(u64, u64)> {
    let whole = extents.file_bytes() - extents.file_bytes() % HUGE_BYTES;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let (mut at, mut left) = (0, bytes_max);
    while at < whole && left >= HUGE_BYTES {
        if let Run::Hole { end } = extents.run_at(at)
            && end >= at + HUGE_BYTES
        {
            // To the piece in which the hole ends.
            at = end - end % HUGE_BYTES;
            continue;
        }
        left -= HUGE_BYTES;
        match runs.last_mut() {
            Some((_, end)) if *end == at => *end = at + HUGE_BYTES,
            _ => runs.push((at, at + HUGE_BYTES)),
        }
        at += HUGE_BYTES;
    }
    runs
}

/// A read-only mapping, 2 MiB aligned, that is never read through: a truncated file is an error, not a SIGBUS.
struct View {
    reserved: *mut libc::c_void,
    reserved_bytes: usize,
    start: *mut u8,
}

impl View {
    fn new(file: &File, bytes: u64) -> io::Result<View> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let reserved_bytes = bytes.checked_add(HUGE_BYTES as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let reserved =
            unsafe { libc::mmap64(ptr::null_mut(), reserved_bytes, libc::PROT_NONE, flags, -1, 0) };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let forward = reserved.addr().next_multiple_of(HUGE_BYTES as usize) - reserved.addr();
        let view = View { reserved, reserved_bytes, start: reserved.cast::<u8>().wrapping_add(forward) };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: replaces a part of the reservation that was just made and is this value's own.
        let mapped =
            unsafe { libc::mmap64(view.start.cast(), bytes, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Where the kernel has no huge pages it refuses, and small ones are read.
        // SAFETY: advice on our own range.
        unsafe { libc::madvise(mapped, bytes, libc::MADV_HUGEPAGE) };
        Ok(view)
    }

    fn read(&self, start: u64, end: u64) -> io::Result<()> {
        let address = self.start.wrapping_add(start as usize);
        // SAFETY: within the mapping (`new` was given the last end); populating for reading changes no content.
        match unsafe { libc::madvise(address.cast(), (end - start) as usize, libc::MADV_POPULATE_READ) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the reservation, the mapping within it included, is this value's own.
        unsafe { libc::munmap(self.reserved, self.reserved_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::memory::mapped::Mapping;

    const PIECE: u64 = HUGE_BYTES;

    fn sparse(pieces: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pieces * PIECE).unwrap();
        for &piece in data {
            file.write_all_at(&[piece as u8; 8192], piece * PIECE + 40_960).unwrap();
            file.write_all_at(&[piece as u8; 4096], piece * PIECE + (1 << 20)).unwrap();
        }
        file.sync_all().unwrap();
        file
    }

    #[test]
    fn pieces_with_data_are_chosen_up_to_the_limit() {
        let extents = Extents::of_file(&sparse(20, &[2, 3, 9, 19])).unwrap();
        let all = [(2 * PIECE, 4 * PIECE), (9 * PIECE, 10 * PIECE), (19 * PIECE, 20 * PIECE)];
        assert_eq!(pieces(&extents, u64::MAX), all);
        assert_eq!(pieces(&extents, 3 * PIECE), all[..2]);
        assert_eq!(pieces(&extents, PIECE), [(2 * PIECE, 3 * PIECE)]);
        assert_eq!(pieces(&extents, PIECE - 1), []);
        assert_eq!(pieces(&Extents::all_data(3 * PIECE - 1), u64::MAX), [(0, 2 * PIECE)]);
        assert_eq!(pieces(&Extents::all_data(0), u64::MAX), []);
    }

    #[test]
    fn folding_changes_the_cache_and_not_the_content() {
        let file = sparse(8, &[1, 2, 5]);
        assert_eq!(fold(&file, &Extents::of_file(&file).unwrap(), u64::MAX).unwrap(), 3 * PIECE);
        let mapping = Mapping::of_file(&file, 0, 8 * PIECE).unwrap();
        for piece in 0..8 {
            // SAFETY: within the mapping.
            let byte = unsafe { mapping.address().add((piece * PIECE) as usize + 45_000).read_volatile() };
            assert_eq!(byte, if [1, 2, 5].contains(&piece) { piece as u8 } else { 0 });
        }
        // One touch each brought whole pieces, where kernel and file system have large folios.
        match huge_kib(&mapping) {
            0 => eprintln!("ignored: this kernel or file system has no 2 MiB folios for files"),
            // More is the kernel reading ahead.
            kib => assert!(kib >= 3 * 2048, "{kib}"),
        }
    }

    #[test]
    fn a_file_truncated_meanwhile_is_an_error() {
        let file = sparse(4, &[0, 3]);
        let extents = Extents::of_file(&file).unwrap();
        file.set_len(PIECE).unwrap();
        assert!(fold(&file, &extents, u64::MAX).is_err());
    }

    /// KiB of a mapping that are mapped huge.
    fn huge_kib(mapping: &Mapping) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.address().addr());
        let lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let line = lines
            .take_while(|line| !line.starts_with("VmFlags"))
            .find(|line| line.starts_with("FilePmdMapped"));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    }
}
