//! A look at a memory file's pages in the page cache, in pieces of 2 MiB.

#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range, os::fd::AsRawFd, ptr};

use crate::snapshot::limits::HUGE_BYTES;

/// A read-only mapping, 2 MiB aligned, that is never read through: a truncated file is an error, not a SIGBUS.
#[derive(Debug)]
pub struct View {
    reserved: *mut libc::c_void,
    reserved_bytes: usize,
    start: *mut u8,
    /// Of the file.
    bytes: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing is read or written through it.
unsafe impl Send for View {}
// SAFETY: as above; all that `&View` offers is advice.
unsafe impl Sync for View {}

impl View {
    /// Maps the first `bytes` bytes.
    pub fn new(file: &File, bytes: u64) -> io::Result<View> {
        let file_bytes = bytes;
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
        let start = reserved.cast::<u8>().wrapping_add(forward);
        let view = View { reserved, reserved_bytes, start, bytes: file_bytes };
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

    /// Reads a part of the file into the page cache, and maps it.
    pub fn read(&self, part: &Range<u64>) -> io::Result<()> {
        self.advise(part, libc::MADV_POPULATE_READ)
    }

    /// Takes a part out of the page table. Its pages stay in the page cache, known as used.
    pub fn unmap(&self, part: &Range<u64>) -> io::Result<()> {
        self.advise(part, libc::MADV_DONTNEED)
    }

    /// Where a byte of the file would be mapped.
    pub fn address(&self, offset: u64) -> usize {
        self.start.addr().wrapping_add(offset as usize)
    }

    fn advise(&self, part: &Range<u64>, advice: libc::c_int) -> io::Result<()> {
        if part.start > part.end || part.end > self.bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = self.start.wrapping_add(part.start as usize);
        // SAFETY: within the mapping, through which nobody reads or writes.
        match unsafe { libc::madvise(address.cast(), (part.end - part.start) as usize, advice) } {
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

/// Drops clean pages of the page cache that nobody has mapped.
pub fn drop_unmapped(file: &File, part: &Range<u64>) {
    // SAFETY: plain integers, and advice.
    unsafe {
        libc::posix_fadvise(
            file.as_raw_fd(),
            part.start as i64,
            (part.end - part.start) as i64,
            libc::POSIX_FADV_DONTNEED,
        )
    };
}
