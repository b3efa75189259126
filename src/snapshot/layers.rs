//! Disks: a read-only base, frozen layers over it, and one private writable overlay on top; or one file, written directly.
//!
//! A VM writes into its overlay. A snapshot *freezes* the overlay: it gets a bitmap and a footer (see [`format`])
//! and becomes the top of the frozen stack, and the VM goes on with a new, empty overlay. All clones of a snapshot
//! share the frozen files and the base, through the page cache, and none can write them.
//!
//! The unit is a block of 4 KiB; a write of less copies the rest of its block up first. The overlay's own bitmap is
//! in memory until the freeze: an overlay whose process died is worthless, like the memory of that VM. Opening costs
//! one footer and one mapping for each layer, whatever the size of the disk.
//!
//! What survives what. A disk of one file ([`LayeredDisk::open_direct`]): a write is in the file when it returns, so it
//! outlives the process; after a [`LayeredDisk::flush`] it outlives the host's power too. An overlay: what a published
//! snapshot froze is durable; everything since belongs to the VM and ends with it, flushed or not (a flush still
//! writes it out, so that a full or broken disk is told where the guest asks).
//!
//! Any number of threads may read, write and flush at once. Overlapping writes that run at the same time leave each
//! sector as one of them wrote it. Most of that takes only a shared lock: a block's data is in the overlay before its
//! bit says so, and what must not be disturbed (a copy-up, a freeze) has the lock to itself.
//!
//! May touch: the files it is handed. The shape (backing file, layers over it) is the usual one of disk images; the
//! format is our own.

mod bitmap;
pub mod format;
mod overlay;
mod synced;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use self::format::{BLOCK_BYTES, FrozenBitmap, Layout};
use self::overlay::{Overlay, punch};
use self::synced::Synced;
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
    #[error("the file handed over to read the frozen overlay from is another file")]
    NotTheOverlay,
    #[error("the disk is read-only")]
    ReadOnly,
    #[error(
        "the disk is written directly to its file, so there is nothing that stands still to be frozen: start the VM without `persist` to take snapshots of it"
    )]
    Direct,
    #[error("bytes {offset} to {offset} + {bytes} lie outside the disk of {disk_bytes} bytes")]
    OutOfRange { offset: u64, bytes: u64, disk_bytes: u64 },
}

impl LayerError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            LayerError::Io { source, .. } => Cause::of_io(source),
            LayerError::BaseTooShort { .. } | LayerError::Damaged { .. } => Cause::Damaged,
            LayerError::TooManyLayers(_) | LayerError::Direct => Cause::Unsupported,
            LayerError::DiskSize(_)
            | LayerError::OverlayNotEmpty(_)
            | LayerError::NotTheOverlay
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
    /// The old overlay is now the topmost frozen layer; this is another handle on its file, written but not synced, for reading only.
    Layer(File),
}

/// A disk made of layers, or one file. To be shared: everything takes `&self`.
#[derive(Debug)]
pub struct LayeredDisk {
    layout: Layout,
    stack: RwLock<Stack>,
}

/// The files of a disk.
#[derive(Debug)]
struct Stack {
    layout: Layout,
    base: Option<File>,
    /// From the lowest.
    frozen: Vec<Frozen>,
    top: Top,
}

#[derive(Debug)]
struct Frozen {
    file: File,
    bitmap: FrozenBitmap,
}

/// Where writes go.
#[derive(Debug)]
enum Top {
    ReadOnly,
    Overlay(Overlay),
    /// Into the base itself.
    Base(Synced),
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
        let layout = layout(disk_bytes)?;
        if frozen.len() > LAYERS_MAX {
            return Err(LayerError::TooManyLayers(frozen.len()));
        }
        if let Some(base) = &base {
            check_base(base, disk_bytes)?;
        }
        let frozen = frozen
            .into_iter()
            .enumerate()
            .map(|(index, file)| Ok(Frozen { bitmap: format::open(&file, &layout, index)?, file }))
            .collect::<Result<_, LayerError>>()?;
        let top = match overlay {
            Some(file) => Top::Overlay(Overlay::new(file, &layout)?),
            None => Top::ReadOnly,
        };
        Ok(Self { layout, stack: RwLock::new(Stack { layout, base, frozen, top }) })
    }

    /// Opens a disk whose writes go into `file` itself. The caller sees to it that nobody else writes to it. Such a disk
    /// cannot be frozen: its content goes on changing.
    pub fn open_direct(file: File, disk_bytes: u64) -> Result<Self, LayerError> {
        let layout = layout(disk_bytes)?;
        check_base(&file, disk_bytes)?;
        let stack = Stack { layout, base: Some(file), frozen: Vec::new(), top: Top::Base(Synced::new()) };
        Ok(Self { layout, stack: RwLock::new(stack) })
    }

    /// Bytes of the disk.
    pub fn disk_bytes(&self) -> u64 {
        self.layout.disk_bytes
    }

    /// True if there is nothing to write to.
    pub fn read_only(&self) -> bool {
        matches!(self.shared().top, Top::ReadOnly)
    }

    /// True if what is written outlives the VM.
    pub fn direct(&self) -> bool {
        matches!(self.shared().top, Top::Base(_))
    }

    /// Bytes that the overlay holds, in whole blocks.
    pub fn overlay_bytes(&self) -> u64 {
        match &self.shared().top {
            Top::Overlay(overlay) => overlay.present() * BLOCK_BYTES,
            Top::ReadOnly | Top::Base(_) => 0,
        }
    }

    /// Number of frozen layers.
    pub fn frozen_layers(&self) -> usize {
        self.shared().frozen.len()
    }

    /// Fills `buffer` from the disk at `offset`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, buffer.len() as u64)?;
        self.shared().read(buffer, offset, end)
    }

    /// Writes `buffer` at `offset`. After an error the range may hold old and new bytes, nothing else has changed.
    pub fn write_at(&self, buffer: &[u8], offset: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, buffer.len() as u64)?;
        loop {
            let stack = self.shared();
            if stack.can_write(offset, end)? {
                return stack.write(buffer, offset);
            }
            drop(stack);
            // A freeze in between empties the overlay: then once more.
            self.alone().copy_up_edges(offset, end)?;
        }
    }

    /// Makes `bytes` from `offset` read as zeros; whole blocks give their room back.
    pub fn write_zeroes(&self, offset: u64, bytes: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, bytes)?;
        let (first, last) = self.whole_blocks(offset, end);
        if first >= last {
            return self.write_zero_bytes(offset, end);
        }
        self.write_zero_bytes(offset, first * BLOCK_BYTES)?;
        self.shared().zero_blocks(first, last)?;
        self.write_zero_bytes((last * BLOCK_BYTES).min(end), end)
    }

    /// The guest needs `bytes` from `offset` no more. Whole blocks in the range read as zeros afterwards, the parts of
    /// blocks at its edges stay as they are.
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), LayerError> {
        let end = self.check_range(offset, bytes)?;
        let (first, last) = self.whole_blocks(offset, end);
        if first < last { self.shared().zero_blocks(first, last) } else { Ok(()) }
    }

    /// Brings every write that returned before this call to stable storage, as far as the file can promise it.
    pub fn flush(&self) -> Result<(), LayerError> {
        let stack = self.shared();
        match (&stack.top, &stack.base) {
            (Top::Overlay(overlay), _) => overlay.flush(),
            (Top::Base(synced), Some(base)) => overlay::flush(synced, base),
            (Top::Base(_) | Top::ReadOnly, _) => Ok(()),
        }
    }

    /// Freezes the overlay and goes on with `new_overlay`, an empty file. After an error the disk is as before (and
    /// `new_overlay` is closed).
    ///
    /// `sealed`: the overlay's own file, opened for reading only. The layer is read through it, and nothing here can write to it any more.
    pub fn freeze(&self, new_overlay: File, sealed: File) -> Result<Freeze, LayerError> {
        let new_overlay = Overlay::new(new_overlay, &self.layout)?;
        let mut stack = self.alone();
        let Stack { frozen, top, .. } = &mut *stack;
        let overlay = match top {
            Top::Overlay(overlay) => overlay,
            Top::ReadOnly => return Err(LayerError::ReadOnly),
            Top::Base(_) => return Err(LayerError::Direct),
        };
        if overlay.present() == 0 {
            *overlay = new_overlay;
            return Ok(Freeze::Unused);
        }
        if frozen.len() >= LAYERS_MAX {
            return Err(LayerError::TooManyLayers(frozen.len() + 1));
        }
        let io = |what| move |source| LayerError::Io { what, source };
        let number = |file: &File| {
            let data = file.metadata().map_err(io("look at a disk layer's file"))?;
            Ok::<_, LayerError>((data.dev(), data.ino()))
        };
        if number(overlay.file())? != number(&sealed)? {
            return Err(LayerError::NotTheOverlay);
        }
        let handle = sealed.try_clone().map_err(io("duplicate a disk layer's descriptor"))?;
        let bitmap = overlay.seal(&self.layout, frozen.len(), &sealed)?;
        *overlay = new_overlay;
        frozen.push(Frozen { file: sealed, bitmap });
        Ok(Freeze::Layer(handle))
    }

    /// Reads the bitmap of a frozen layer's file in full and compares it with its checksum, which opening does not do.
    /// For whoever publishes or checks a snapshot. Returns the bytes that the layer holds.
    pub fn verify_layer(file: &File, disk_bytes: u64) -> Result<u64, LayerError> {
        Ok(format::verify(file, &layout(disk_bytes)?, 0)? * BLOCK_BYTES)
    }

    fn shared(&self) -> RwLockReadGuard<'_, Stack> {
        // Every step leaves the disk usable, so a panic elsewhere does not spoil it.
        self.stack.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Stack> {
        self.stack.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the overlay, as [`freeze`](Self::freeze) wants it; an empty file of a disk that has none.
    #[cfg(test)]
    pub fn reopened(&self) -> File {
        use std::os::fd::AsRawFd;
        match &self.shared().top {
            Top::Overlay(overlay) => {
                File::open(format!("/proc/self/fd/{}", overlay.file().as_raw_fd())).unwrap()
            }
            Top::ReadOnly | Top::Base(_) => tempfile::tempfile().unwrap(),
        }
    }

    /// Keeps every request from going on until the guard is dropped.
    #[cfg(test)]
    pub fn hold(&self) -> RwLockWriteGuard<'_, impl Sized> {
        self.alone()
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

    /// Writes zeros byte by byte, for the edges of a range.
    fn write_zero_bytes(&self, from: u64, to: u64) -> Result<(), LayerError> {
        let zeros = [0u8; BLOCK_BYTES as usize];
        let mut position = from;
        while position < to {
            let bytes = (to - position).min(BLOCK_BYTES);
            self.write_at(zeros.get(..bytes as usize).unwrap_or(&zeros), position)?;
            position += bytes;
        }
        Ok(())
    }
}

fn layout(disk_bytes: u64) -> Result<Layout, LayerError> {
    if disk_bytes == 0 || disk_bytes > DISK_BYTES_MAX || !disk_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(LayerError::DiskSize(disk_bytes));
    }
    Ok(Layout::new(disk_bytes))
}

fn check_base(base: &File, disk_bytes: u64) -> Result<(), LayerError> {
    let base_bytes = format::length(base)?;
    if base_bytes < disk_bytes {
        return Err(LayerError::BaseTooShort { base_bytes, disk_bytes });
    }
    Ok(())
}

// === impl Stack ===

impl Stack {
    fn source(&self, block: u64) -> Source {
        if let Top::Overlay(overlay) = &self.top
            && overlay.contains(block)
        {
            return Source::Overlay;
        }
        let layer = self.frozen.iter().rposition(|layer| layer.bitmap.contains(block));
        layer.map_or(Source::Base, Source::Frozen)
    }

    fn read(&self, buffer: &mut [u8], offset: u64, end: u64) -> Result<(), LayerError> {
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
            let file = match (source, &self.top) {
                (Source::Overlay, Top::Overlay(overlay)) => Some(overlay.file()),
                (Source::Frozen(index), _) => self.frozen.get(index).map(|layer| &layer.file),
                _ => self.base.as_ref(),
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

    /// The blocks that a write of `offset..end` covers in part (the disk's last block may be short).
    fn edges(&self, offset: u64, end: u64) -> impl Iterator<Item = u64> {
        let head = (!offset.is_multiple_of(BLOCK_BYTES)).then_some(offset / BLOCK_BYTES);
        let tail =
            (!end.is_multiple_of(BLOCK_BYTES) && end != self.layout.disk_bytes).then_some(end / BLOCK_BYTES);
        head.into_iter().chain(tail).filter(move |_| offset < end)
    }

    /// Whether a write needs no copy-up.
    fn can_write(&self, offset: u64, end: u64) -> Result<bool, LayerError> {
        match &self.top {
            Top::ReadOnly => Err(LayerError::ReadOnly),
            Top::Base(_) => Ok(true),
            Top::Overlay(overlay) => Ok(self.edges(offset, end).all(|block| overlay.contains(block))),
        }
    }

    fn write(&self, buffer: &[u8], offset: u64) -> Result<(), LayerError> {
        match (&self.top, &self.base) {
            _ if buffer.is_empty() => Ok(()),
            (Top::Overlay(overlay), _) => overlay.write(buffer, offset, self.layout.disk_bytes),
            (Top::Base(synced), Some(base)) => {
                let written = base.write_all_at(buffer, offset);
                synced.touched();
                written.map_err(|source| LayerError::Io { what: "write the disk", source })
            }
            (Top::Base(_) | Top::ReadOnly, _) => Err(LayerError::ReadOnly),
        }
    }

    /// Brings the blocks that a write covers in part into the overlay, unless they are there.
    fn copy_up_edges(&mut self, offset: u64, end: u64) -> Result<(), LayerError> {
        for block in self.edges(offset, end) {
            self.copy_up(block)?;
        }
        Ok(())
    }

    fn copy_up(&self, block: u64) -> Result<(), LayerError> {
        if self.source(block) == Source::Overlay {
            return Ok(());
        }
        let offset = block * BLOCK_BYTES;
        let bytes = BLOCK_BYTES.min(self.layout.disk_bytes - offset);
        let mut buffer = [0u8; BLOCK_BYTES as usize];
        let Some(buffer) = buffer.get_mut(..bytes as usize) else { return Ok(()) };
        self.read(buffer, offset, offset + bytes)?;
        self.write(buffer, offset)
    }

    /// Makes whole blocks zero.
    fn zero_blocks(&self, first: u64, end: u64) -> Result<(), LayerError> {
        let disk_bytes = self.layout.disk_bytes;
        let (from, to) = (first * BLOCK_BYTES, (end * BLOCK_BYTES).min(disk_bytes));
        match (&self.top, &self.base) {
            (Top::Overlay(overlay), _) => overlay.zero(first, end, disk_bytes),
            (Top::Base(synced), Some(base)) => {
                let punched = punch(base, from, to);
                synced.touched();
                punched
            }
            (Top::Base(_) | Top::ReadOnly, _) => Err(LayerError::ReadOnly),
        }
    }
}
