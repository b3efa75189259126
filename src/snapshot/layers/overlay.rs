//! The writable top of a disk: the overlay's file with its bitmap, and what bringing a file to stable storage needs.
//!
//! Every method but [`Overlay::seal`] may be called by several threads at once. Order that others rely on: a block's
//! data is in the file before its bit is set, and a write is noted for the next flush before it returns.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::LayerError;
use super::bitmap::Bitmap;
use super::format::{self, BLOCK_BYTES, FrozenBitmap, Layout};
use super::synced::Synced;

/// Brings what was written to stable storage, with what is needed to find it again.
pub fn flush(synced: &Synced, file: &File) -> Result<(), LayerError> {
    synced.flush(|| file.sync_data()).map_err(|source| LayerError::Io { what: "flush the disk", source })
}

/// The overlay.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    bitmap: Bitmap,
    /// The file has the disk's length (it gets it with the first change, not at restore).
    sized: AtomicBool,
    synced: Synced,
}

impl Overlay {
    /// An overlay in `file`, which must be empty.
    pub fn new(file: File, layout: &Layout) -> Result<Self, LayerError> {
        let bytes = format::length(&file)?;
        if bytes != 0 {
            return Err(LayerError::OverlayNotEmpty(bytes));
        }
        Ok(Self {
            file,
            bitmap: format::no_blocks(layout),
            sized: AtomicBool::new(false),
            synced: Synced::new(),
        })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Blocks in it.
    pub fn present(&self) -> u64 {
        self.bitmap.present()
    }

    pub fn contains(&self, block: u64) -> bool {
        self.bitmap.contains(block)
    }

    /// Gives the file the disk's length, once, so that holes up to the end can be read. Twice at the same time does no
    /// harm: the length is the same, and nothing is written behind it.
    fn size(&self, disk_bytes: u64) -> Result<(), LayerError> {
        if !self.sized.load(Ordering::Acquire) {
            self.file
                .set_len(disk_bytes)
                .map_err(|source| LayerError::Io { what: "size the disk's overlay", source })?;
            self.sized.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Writes, and marks every block that the range touches as present.
    pub fn write(&self, buffer: &[u8], offset: u64, disk_bytes: u64) -> Result<(), LayerError> {
        self.size(disk_bytes)?;
        let written = self.file.write_all_at(buffer, offset);
        self.synced.touched();
        written.map_err(|source| LayerError::Io { what: "write the disk's overlay", source })?;
        self.bitmap.insert(offset / BLOCK_BYTES, (offset + buffer.len() as u64).div_ceil(BLOCK_BYTES));
        Ok(())
    }

    /// Makes the blocks `first..end` zero.
    pub fn zero(&self, first: u64, end: u64, disk_bytes: u64) -> Result<(), LayerError> {
        self.size(disk_bytes)?;
        let punched = punch(&self.file, first * BLOCK_BYTES, (end * BLOCK_BYTES).min(disk_bytes));
        self.synced.touched();
        punched?;
        self.bitmap.insert(first, end);
        Ok(())
    }

    pub fn flush(&self) -> Result<(), LayerError> {
        flush(&self.synced, &self.file)
    }

    /// Makes the file a frozen layer, number `index` from the lowest, to be read through `sealed`.
    pub fn seal(&mut self, layout: &Layout, index: usize, sealed: &File) -> Result<FrozenBitmap, LayerError> {
        // Whatever length it gets, it is not the disk's any more, should the seal fail.
        self.sized.store(false, Ordering::Release);
        format::seal(&self.file, layout, &self.bitmap)?;
        format::open(sealed, layout, index)
    }
}

/// Makes `from..to` of a file zero and gives its room back where the file system can do that. Both are at most
/// `DISK_BYTES_MAX`.
pub fn punch(file: &File, from: u64, to: u64) -> Result<(), LayerError> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(file, mode, from, to - from) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            Err(error) => {
                return Err(LayerError::Io { what: "free a range of the disk", source: error.into() });
            }
        }
    }
    // Not on the stack, which is small in a disk's thread.
    let zeros = vec![0u8; 64 << 10];
    let mut position = from;
    while position < to {
        let bytes = (to - position).min(zeros.len() as u64);
        let part = zeros.get(..bytes as usize).unwrap_or(&zeros);
        file.write_all_at(part, position)
            .map_err(|source| LayerError::Io { what: "write zeros to the disk", source })?;
        position += bytes;
    }
    Ok(())
}
