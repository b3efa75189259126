//! A file read from a place of one's own.
//!
//! Kernel and modules arrive as descriptors that other workers may share, file position included: the daemon opens an image's file
//! once and hands it to many. So nothing here moves the file's own position; every read says where it reads.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// `file` with a position of its own, for readers that want a stream.
#[derive(Debug)]
pub struct Reader<'a> {
    file: &'a File,
    /// Size of the file, for seeks from its end.
    bytes: u64,
    at: u64,
}

impl<'a> Reader<'a> {
    /// Reads from `at`; the file has `bytes` bytes.
    pub fn new(file: &'a File, bytes: u64, at: u64) -> Self {
        Reader { file, bytes, at }
    }
}

impl ReadVolatile for Reader<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let at = libc::off_t::try_from(self.at)
            .map_err(|_| VolatileMemoryError::IOError(io::Error::from(io::ErrorKind::InvalidInput)))?;
        let guard = buffer.ptr_guard_mut();
        // SAFETY: the slice's constructor vouches for `buffer.len()` writable bytes at this pointer, and the guard keeps
        // them there through the call; the descriptor is that of a file borrowed for as long.
        let got = unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), buffer.len(), at) };
        let got =
            usize::try_from(got).map_err(|_| VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        buffer.bitmap().mark_dirty(0, got);
        self.at = self.at.saturating_add(got as u64);
        Ok(got)
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.at)?;
        self.at = self.at.saturating_add(got as u64);
        Ok(got)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(offset) => self.bytes.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.at.checked_add_signed(offset),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::boot::tests::file;
    use std::io::Write;

    #[test]
    fn the_files_own_position_is_left_alone() {
        let mut shared = file(b"0123456789");
        shared.seek(SeekFrom::Start(3)).expect("seek");
        let mut buffer = [0u8; 4];
        let mut reader = Reader::new(&shared, 10, 2);
        reader.read_exact_volatile(&mut VolatileSlice::from(&mut buffer[..])).expect("enough");
        assert_eq!(&buffer, b"2345");
        assert_eq!(reader.seek(SeekFrom::End(-1)).expect("inside"), 9);
        assert_eq!(reader.read(&mut buffer).expect("readable"), 1);
        assert_eq!(buffer[0], b'9');
        assert!(reader.read_exact_volatile(&mut VolatileSlice::from(&mut buffer[..])).is_err());
        assert!(reader.seek(SeekFrom::Current(-100)).is_err());
        assert_eq!(shared.stream_position().expect("position"), 3);
        shared.write_all(b"x").expect("the file is as usable as before");
    }
}
