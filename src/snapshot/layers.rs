//! Copy-on-write disks: a read-only base, frozen layers over it, and one private writable overlay on top.
//!
//! A VM writes into its overlay only. A snapshot *freezes* the overlay: it gets a bitmap and a footer (see [`format`])
//! and becomes the top of the frozen stack, and the VM goes on with a new, empty overlay. All clones of a snapshot
//! share the frozen files and the base, through the page cache, and none can write them.
//!
//! The unit is a block of 4 KiB; a write of less copies the rest of its block up first. The overlay's own bitmap is
//! in memory until the freeze: an overlay whose process died is worthless, like the memory of that VM. Opening costs
//! one footer and one mapping for each layer, whatever the size of the disk.
//!
//! May touch: the files it is handed. The shape (backing file, layers over it) is the usual one of disk images; the
//! format is our own.

pub mod format;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use self::format::{BLOCK_BYTES, Bitmap, FrozenBitmap, Layout};
use super::cause::Cause;
pub use super::limits::{DISK_BYTES_MAX, LAYERS_MAX, SECTOR_BYTES};

/// Why a disk cannot be opened, read, written or frozen.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error(
        "a disk of {0} bytes is not possible: it must be a multiple of {SECTOR_BYTES}, from {SECTOR_BYTES} to {DISK_BYTES_MAX}"
    )]
    DiskSize(u64),
    #[error(
        "the base file has {base_bytes} bytes but the disk is to have {disk_bytes}: the file was truncated, or the image's size is recorded wrongly; import the image again"
    )]
    BaseTooShort { base_bytes: u64, disk_bytes: u64 },
    #[error(
        "{0} frozen layers are more than the {LAYERS_MAX} that a disk may have: import the disk's content as a new image"
    )]
    TooManyLayers(usize),
    #[error(
        "disk layer {layer} (0 is the lowest) is damaged or no layer: {what}; restore the file from a copy, or take the snapshot again"
    )]
    Damaged { layer: usize, what: String },
    #[error("the overlay handed over has {0} bytes; it must be an empty file of its own")]
    OverlayNotEmpty(u64),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("bytes {offset} to {offset} + {bytes} lie outside the disk of {disk_bytes} bytes")]
    OutOfRange { offset: u64, bytes: u64, disk_bytes: u64 },
}

impl LayerError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            LayerError::Io { source, .. } => Cause::of_io(source),
            LayerError::BaseTooShort { .. } | LayerError::Damaged { .. } => Cause::Damaged,
            LayerError::TooManyLayers(_) => Cause::Unsupported,
            LayerError::DiskSize(_)
            | LayerError::OverlayNotEmpty(_)
            | LayerError::ReadOnly
            | LayerError::OutOfRange { .. } => Cause::InvalidInput,
        }
    }
}

/// What [`LayeredDisk::freeze`] made of the overlay.
#[derive(Debug)]
pub enum Freeze {
    /// Nothing had been written: the old overlay is in no use any more, the snapshot needs no file for it.
    Unused,
    /// The old overlay is now the topmost frozen layer; this is another handle on its file, written but not synced.
    Layer(File),
}

/// A disk made of layers. One owner; reads take `&self`.
#[derive(Debug)]
pub struct LayeredDisk {
    layout: Layout,
    base: Option<File>,
    /// From the lowest.
    frozen: Vec<Frozen>,
    overlay: Option<Overlay>,
}

#[derive(Debug)]
struct Frozen {
    file: File,
    bitmap: FrozenBitmap,
}

#[derive(Debug)]
struct Overlay {
    file: File,
    bitmap: Bitmap,
    /// The file has the disk's length (it gets it with the first change, not at restore).
    sized: bool,
    /// Changed since the last flush.
    dirty: bool,
}

/// Which file holds a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Base,
    Frozen(usize),
    Overlay,
}

impl LayeredDisk {
    /// Opens a disk of `disk_bytes`. No `base`: all zeros below the layers. `frozen` is given from the lowest. No
    /// `overlay`: the disk is read-only. The overlay must be an empty file that nobody else has.
    pub fn open(
        base: Option<File>,
        frozen: Vec<File>,
        overlay: Option<File>,
        disk_bytes: u64,
    ) -> Result<Self, LayerError> {
        if disk_bytes == 0 || disk_bytes > DISK_BYTES_MAX || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(LayerError::DiskSize(disk_bytes));
        }
        if frozen.len() > LAYERS_MAX {
            return Err(LayerError::TooManyLayers(frozen.len()));
        }
        if let Some(base) = &base {
            let base_bytes = format::length(base)?;
            if base_bytes < disk_bytes {
                return Err(LayerError::BaseTooShort { base_bytes, disk_bytes });
            }
        }
        let layout = Layout::new(disk_bytes);
        let frozen = frozen
            .into_iter()
            .enumerate()
            .map(|(index, file)| Ok(Frozen { bitmap: format::open(&file, &layout, index)?, file }))
            .collect::<Result<_, LayerError>>()?;
        let overlay = overlay.map(|file| Overlay::new(file, &layout)).transpose()?;
        Ok(Self { layout, base, frozen, overlay })
    }

    /// Bytes of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.layout.disk_bytes
    }

    /// True if there is no overlay to write to.
    pub fn read_only(&self) -> bool {
        self.overlay.is_none()
    }

    /// Bytes that the overlay holds, in whole blocks.
    pub fn overlay_bytes(&self) -> u64 {
        self.overlay.as_ref().map_or(0, |overlay| overlay.bitmap.present() * BLOCK_BYTES)
    }

    /// Number of frozen layers.
    pub fn frozen_layers(&self) -> usize {
        self.frozen.len()
    }

    /// Fills `buffer` from the disk at `offset`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, buffer.len() as u64)?;
        let mut position = offset;
        let mut rest = buffer;
        while position < end {
            let source = self.source(position / BLOCK_BYTES);
            let mut run_end = (position / BLOCK_BYTES + 1) * BLOCK_BYTES;
            while run_end < end && self.source(run_end / BLOCK_BYTES) == source {
                run_end += BLOCK_BYTES;
            }
            let run_end = run_end.min(end);
            let (run, after) = rest.split_at_mut((run_end - position) as usize);
            let file = match source {
                Source::Base => self.base.as_ref(),
                Source::Frozen(index) => self.frozen.get(index).map(|layer| &layer.file),
                Source::Overlay => self.overlay.as_ref().map(|overlay| &overlay.file),
            };
            match file {
                Some(file) => file
                    .read_exact_at(run, position)
                    .map_err(|source| LayerError::Io { what: "read the disk", source })?,
                None => run.fill(0),
            }
            rest = after;
            position = run_end;
        }
        Ok(())
    }

    /// Writes `buffer` at `offset`. After an error the range may hold old and new bytes, nothing else has changed.
    pub fn write_at(&mut self, buffer: &[u8], offset: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, buffer.len() as u64)?;
        if self.overlay.is_none() {
            return Err(LayerError::ReadOnly);
        }
        if buffer.is_empty() {
            return Ok(());
        }
        if !offset.is_multiple_of(BLOCK_BYTES) {
            self.copy_up(offset / BLOCK_BYTES)?;
        }
        if !end.is_multiple_of(BLOCK_BYTES) && end != self.layout.disk_bytes {
            self.copy_up(end / BLOCK_BYTES)?;
        }
        let disk_bytes = self.layout.disk_bytes;
        let overlay = self.overlay.as_mut().ok_or(LayerError::ReadOnly)?;
        overlay.write(buffer, offset, disk_bytes)
    }

    /// Makes `bytes` from `offset` read as zeros; whole blocks give their room in the overlay back.
    pub fn write_zeroes(&mut self, offset: u64, bytes: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, bytes)?;
        if self.overlay.is_none() {
            return Err(LayerError::ReadOnly);
        }
        let (first, last) = self.whole_blocks(offset, end);
        if first >= last {
            return self.write_zero_bytes(offset, end);
        }
        self.write_zero_bytes(offset, first * BLOCK_BYTES)?;
        self.zero_blocks(first, last)?;
        self.write_zero_bytes((last * BLOCK_BYTES).min(end), end)
    }

    /// The guest needs `bytes` from `offset` no more. Whole blocks in the range read as zeros afterwards, the parts of
    /// blocks at its edges stay as they are.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, bytes)?;
        let (first, last) = self.whole_blocks(offset, end);
        if first < last { self.zero_blocks(first, last) } else { Ok(()) }
    }

    /// Brings what was written to stable storage, as far as the overlay's file can promise it.
    pub fn flush(&mut self) -> Result<(), LayerError> {
        if let Some(overlay) = self.overlay.as_mut().filter(|overlay| overlay.dirty) {
            overlay
                .file
                .sync_data()
                .map_err(|source| LayerError::Io { what: "flush the disk's overlay", source })?;
            overlay.dirty = false;
        }
        Ok(())
    }

    /// Freezes the overlay and goes on with `new_overlay`, an empty file. After an error the disk is as before (and
    /// `new_overlay` is closed).
    pub fn freeze(&mut self, new_overlay: File) -> Result<Freeze, LayerError> {
        let new_overlay = Overlay::new(new_overlay, &self.layout)?;
        let overlay = self.overlay.as_mut().ok_or(LayerError::ReadOnly)?;
        if overlay.bitmap.present() == 0 {
            *overlay = new_overlay;
            return Ok(Freeze::Unused);
        }
        if self.frozen.len() >= LAYERS_MAX {
            return Err(LayerError::TooManyLayers(self.frozen.len() + 1));
        }
        format::seal(&overlay.file, &self.layout, &overlay.bitmap)?;
        let bitmap = format::open(&overlay.file, &self.layout, self.frozen.len())?;
        let handle = overlay
            .file
            .try_clone()
            .map_err(|source| LayerError::Io { what: "duplicate a disk layer's descriptor", source })?;
        let old = std::mem::replace(overlay, new_overlay);
        self.frozen.push(Frozen { file: old.file, bitmap });
        Ok(Freeze::Layer(handle))
    }

    /// Reads the bitmap of a frozen layer's file in full and compares it with its checksum, which opening does not do.
    /// For whoever publishes or checks a snapshot. Returns the bytes that the layer holds.
    pub fn verify_layer(file: &File, disk_bytes: u64) -> Result<u64, LayerError> {
        if disk_bytes == 0 || disk_bytes > DISK_BYTES_MAX || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(LayerError::DiskSize(disk_bytes));
        }
        Ok(format::verify(file, &Layout::new(disk_bytes), 0)? * BLOCK_BYTES)
    }

    /// Returns the end of the range.
    fn check_range(&self, offset: u64, bytes: u64) -> Result<u64, LayerError> {
        let disk_bytes = self.layout.disk_bytes;
        match offset.checked_add(bytes) {
            Some(end) if end <= disk_bytes => Ok(end),
            _ => Err(LayerError::OutOfRange { offset, bytes, disk_bytes }),
        }
    }

    /// The blocks that lie in `offset..end` in full (the disk's last block may be short): first, and one past the last.
    fn whole_blocks(&self, offset: u64, end: u64) -> (u64, u64) {
        let last = if end == self.layout.disk_bytes { self.layout.blocks } else { end / BLOCK_BYTES };
        (offset.div_ceil(BLOCK_BYTES), last)
    }

    fn source(&self, block: u64) -> Source {
        if self.overlay.as_ref().is_some_and(|overlay| overlay.bitmap.contains(block)) {
            return Source::Overlay;
        }
        let layer = self.frozen.iter().rposition(|layer| layer.bitmap.contains(block));
        layer.map_or(Source::Base, Source::Frozen)
    }

    /// Brings a block into the overlay, unless it is there.
    fn copy_up(&mut self, block: u64) -> Result<(), LayerError> {
        if self.source(block) == Source::Overlay {
            return Ok(());
        }
        let offset = block * BLOCK_BYTES;
        let disk_bytes = self.layout.disk_bytes;
        let bytes = BLOCK_BYTES.min(disk_bytes - offset) as usize;
        let mut buffer = [0u8; BLOCK_BYTES as usize];
        let Some(buffer) = buffer.get_mut(..bytes) else { return Ok(()) };
        self.read_at(buffer, offset)?;
        let overlay = self.overlay.as_mut().ok_or(LayerError::ReadOnly)?;
        overlay.write(buffer, offset, disk_bytes)
    }

    /// Writes zeros byte by byte, for the edges of a range.
    fn write_zero_bytes(&mut self, from: u64, to: u64) -> Result<(), LayerError> {
        let zeros = [0u8; BLOCK_BYTES as usize];
        let mut position = from;
        while position < to {
            let bytes = (to - position).min(BLOCK_BYTES);
            self.write_at(zeros.get(..bytes as usize).unwrap_or(&zeros), position)?;
            position += bytes;
        }
        Ok(())
    }

    /// Makes whole blocks zero.
    fn zero_blocks(&mut self, first: u64, end: u64) -> Result<(), LayerError> {
        let disk_bytes = self.layout.disk_bytes;
        let overlay = self.overlay.as_mut().ok_or(LayerError::ReadOnly)?;
        overlay.size(disk_bytes)?;
        overlay.punch(first * BLOCK_BYTES, (end * BLOCK_BYTES).min(disk_bytes))?;
        overlay.bitmap.insert(first, end);
        Ok(())
    }
}

// === impl Overlay ===

impl Overlay {
    fn new(file: File, layout: &Layout) -> Result<Self, LayerError> {
        match format::length(&file)? {
            0 => Ok(Self { file, bitmap: Bitmap::new(layout), sized: false, dirty: false }),
            bytes => Err(LayerError::OverlayNotEmpty(bytes)),
        }
    }

    /// Gives the file the disk's length, once, so that holes up to the end can be read.
    fn size(&mut self, disk_bytes: u64) -> Result<(), LayerError> {
        if !self.sized {
            self.file
                .set_len(disk_bytes)
                .map_err(|source| LayerError::Io { what: "size the disk's overlay", source })?;
            self.sized = true;
        }
        self.dirty = true;
        Ok(())
    }

    /// Writes, and marks every block that the range touches as present.
    fn write(&mut self, buffer: &[u8], offset: u64, disk_bytes: u64) -> Result<(), LayerError> {
        self.size(disk_bytes)?;
        self.file
            .write_all_at(buffer, offset)
            .map_err(|source| LayerError::Io { what: "write the disk's overlay", source })?;
        self.bitmap.insert(offset / BLOCK_BYTES, (offset + buffer.len() as u64).div_ceil(BLOCK_BYTES));
        Ok(())
    }

    /// Makes `from..to` of the file zero and gives its room back where the file system can do that.
    fn punch(&mut self, from: u64, to: u64) -> Result<(), LayerError> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        loop {
            // SAFETY: fallocate touches no memory of this process; the descriptor is open for as long as `self`. Both
            // numbers are at most DISK_BYTES_MAX, so they fit off_t.
            let done =
                unsafe { libc::fallocate(self.file.as_raw_fd(), mode, from as i64, (to - from) as i64) };
            if done == 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            match source.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => break,
                _ => return Err(LayerError::Io { what: "free a range of the disk's overlay", source }),
            }
        }
        let zeros = [0u8; 64 << 10];
        let mut position = from;
        while position < to {
            let bytes = (to - position).min(zeros.len() as u64);
            let part = zeros.get(..bytes as usize).unwrap_or(&zeros);
            self.file
                .write_all_at(part, position)
                .map_err(|source| LayerError::Io { what: "write zeros to the disk's overlay", source })?;
            position += bytes;
        }
        Ok(())
    }
}
