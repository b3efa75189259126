//! The layout of a frozen layer's file, and reading it without trust.
//!
//! | where | what |
//! |---|---|
//! | 0 | the disk's data, at its own offsets; blocks that are not in this layer are holes |
//! | disk bytes, rounded up to 4 KiB | bitmap: bit `n` (little endian) says that block `n` is in this layer |
//! | end of the bitmap, rounded up to 4 KiB | footer, [`FOOTER_BYTES`] |
//!
//! Footer, little endian: magic (8 bytes), version u32, block bytes u32, disk bytes u64, bitmap offset u64, bitmap
//! bytes u64, number of blocks present u64, BLAKE3 of the bitmap (32), BLAKE3 of the footer's bytes before it (32),
//! zeros. The file ends with the footer. Holes decide nothing: only the bitmap says what is in the layer, so a file
//! survives a copy that fills or digs holes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::mem::ManuallyDrop;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Mmap, MmapOptions};

use super::LayerError;
use super::bitmap::Bitmap;

/// Bytes of a block: what is in a layer or not in it.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of the footer.
pub const FOOTER_BYTES: u64 = 4096;
const MAGIC: [u8; 8] = *b"CSPKLAYR";
const VERSION: u32 = 1;
/// Bytes of the footer that its own checksum covers.
const FOOTER_SUMMED_BYTES: usize = 80;
const SUM_BYTES: usize = blake3::OUT_LEN;

/// Where the parts of a layer's file lie; follows from the size of the disk alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    pub disk_bytes: u64,
    pub blocks: u64,
    pub bitmap_offset: u64,
    pub bitmap_bytes: u64,
    pub footer_offset: u64,
    pub file_bytes: u64,
}

impl Layout {
    /// The layout for a disk of `disk_bytes`, which must be at most [`super::DISK_BYTES_MAX`]: nothing overflows then.
    pub fn new(disk_bytes: u64) -> Self {
        let blocks = disk_bytes.div_ceil(BLOCK_BYTES);
        let bitmap_offset = disk_bytes.next_multiple_of(BLOCK_BYTES);
        let bitmap_bytes = blocks.div_ceil(64) * 8;
        let footer_offset = (bitmap_offset + bitmap_bytes).next_multiple_of(BLOCK_BYTES);
        Self {
            disk_bytes,
            blocks,
            bitmap_offset,
            bitmap_bytes,
            footer_offset,
            file_bytes: footer_offset + FOOTER_BYTES,
        }
    }
}

/// No block present, for a disk of this layout. The memory is the kernel's zero page until a bit is set.
pub fn no_blocks(layout: &Layout) -> Bitmap {
    // Asked for as plain zeros, which costs nothing until they are touched, whatever the size of the disk.
    let mut zeros = ManuallyDrop::new(vec![0u64; (layout.bitmap_bytes / 8) as usize]);
    let (pointer, length, capacity) = (zeros.as_mut_ptr(), zeros.len(), zeros.capacity());
    // SAFETY: the parts are those of a vector that is not dropped, and AtomicU64 has the size, alignment and bit
    // validity of u64 on this architecture, the only one of this program.
    Bitmap::new(unsafe { Vec::from_raw_parts(pointer.cast::<AtomicU64>(), length, capacity) })
}

/// The blocks of a frozen layer, as its file has them: mapped, so that opening costs the same for every size.
#[derive(Debug)]
pub struct FrozenBitmap {
    map: Mmap,
    present: u64,
}

impl FrozenBitmap {
    pub fn contains(&self, block: u64) -> bool {
        self.map.get((block / 8) as usize).is_some_and(|byte| byte >> (block % 8) & 1 == 1)
    }

    /// Number of blocks present, as the footer tells it.
    pub fn present(&self) -> u64 {
        self.present
    }
}

/// Length of a file or block device.
pub fn length(file: &File) -> Result<u64, LayerError> {
    let mut file = file;
    file.seek(SeekFrom::End(0))
        .map_err(|source| LayerError::Io { what: "find the length of a disk file", source })
}

/// Completes an overlay's file: bitmap, footer, exact length. The data is there already.
pub fn seal(file: &File, layout: &Layout, bitmap: &Bitmap) -> Result<(), LayerError> {
    let io = |what| move |source| LayerError::Io { what, source };
    let mut sum = blake3::Hasher::new();
    let mut page = [0u8; BLOCK_BYTES as usize];
    // Zero pages of the bitmap stay holes: a big disk with few blocks makes a small file.
    file.set_len(layout.bitmap_offset).map_err(io("cut a disk layer to its data"))?;
    for (index, words) in bitmap.words().chunks(page.len() / 8).enumerate() {
        let bytes = words.len() * 8;
        let mut any = 0;
        for (slot, word) in page.chunks_exact_mut(8).zip(words) {
            let word = word.load(Ordering::Acquire);
            any |= word;
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let Some(chunk) = page.get(..bytes) else { continue };
        sum.update(chunk);
        if any != 0 {
            let offset = layout.bitmap_offset + index as u64 * BLOCK_BYTES;
            file.write_all_at(chunk, offset).map_err(io("write a disk layer's bitmap"))?;
        }
    }
    let mut footer = Vec::with_capacity(FOOTER_BYTES as usize);
    footer.extend_from_slice(&MAGIC);
    footer.extend_from_slice(&VERSION.to_le_bytes());
    footer.extend_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
    for field in [layout.disk_bytes, layout.bitmap_offset, layout.bitmap_bytes, bitmap.present()] {
        footer.extend_from_slice(&field.to_le_bytes());
    }
    footer.extend_from_slice(sum.finalize().as_bytes());
    debug_assert_eq!(footer.len(), FOOTER_SUMMED_BYTES);
    let own_sum = blake3::hash(&footer);
    footer.extend_from_slice(own_sum.as_bytes());
    footer.resize(FOOTER_BYTES as usize, 0);
    file.write_all_at(&footer, layout.footer_offset).map_err(io("write a disk layer's footer"))
}

/// What a checked footer says beyond the layout.
struct Footer {
    present: u64,
    bitmap_sum: [u8; SUM_BYTES],
}

/// Reads and checks the footer of layer `index`.
fn read_footer(file: &File, layout: &Layout, index: usize) -> Result<Footer, LayerError> {
    let damaged = |what: String| LayerError::Damaged { layer: index, what };
    let file_bytes = length(file)?;
    if file_bytes < FOOTER_BYTES {
        return Err(damaged(format!("the file has {file_bytes} bytes, a footer alone has {FOOTER_BYTES}")));
    }
    let mut bytes = [0u8; FOOTER_SUMMED_BYTES + SUM_BYTES];
    file.read_exact_at(&mut bytes, file_bytes - FOOTER_BYTES)
        .map_err(|source| LayerError::Io { what: "read a disk layer's footer", source })?;
    let (summed, own_sum) = bytes.split_at(FOOTER_SUMMED_BYTES);
    let mut fields = Fields(summed);
    if fields.take::<8>() != MAGIC {
        return Err(damaged("the file does not end with a layer's footer".into()));
    }
    if blake3::hash(summed).as_bytes().as_slice() != own_sum {
        return Err(damaged("the footer's checksum is wrong".into()));
    }
    let version = u32::from_le_bytes(fields.take());
    if version != VERSION {
        return Err(damaged(format!("format version {version} is not known here (known: {VERSION})")));
    }
    let block_bytes = u32::from_le_bytes(fields.take());
    if u64::from(block_bytes) != BLOCK_BYTES {
        return Err(damaged(format!("its blocks have {block_bytes} bytes, not {BLOCK_BYTES}")));
    }
    let disk_bytes = u64::from_le_bytes(fields.take());
    if disk_bytes != layout.disk_bytes {
        return Err(damaged(format!(
            "it belongs to a disk of {disk_bytes} bytes, not {}",
            layout.disk_bytes
        )));
    }
    let bitmap_offset = u64::from_le_bytes(fields.take());
    let bitmap_bytes = u64::from_le_bytes(fields.take());
    if (bitmap_offset, bitmap_bytes, file_bytes)
        != (layout.bitmap_offset, layout.bitmap_bytes, layout.file_bytes)
    {
        return Err(damaged(format!(
            "its parts lie wrong: bitmap of {bitmap_bytes} bytes at {bitmap_offset} in a file of {file_bytes} bytes"
        )));
    }
    let present = u64::from_le_bytes(fields.take());
    if present > layout.blocks {
        return Err(damaged(format!("it claims {present} blocks of a disk with {}", layout.blocks)));
    }
    Ok(Footer { present, bitmap_sum: fields.take() })
}

/// Opens a frozen layer: checks its footer, maps its bitmap (the bitmap's content is not read: see [`verify`]).
pub fn open(file: &File, layout: &Layout, index: usize) -> Result<FrozenBitmap, LayerError> {
    let footer = read_footer(file, layout, index)?;
    // SAFETY: the mapping is shared and read-only, inside the file's length as just checked, and only ever read as
    // bytes, for which every value is valid. Layer files are written once and published read-only; should someone
    // truncate one all the same, this process gets SIGBUS, which ends one VM and corrupts nothing.
    let map = unsafe {
        MmapOptions::new().offset(layout.bitmap_offset).len(layout.bitmap_bytes as usize).map(file)
    };
    let map = map.map_err(|source| LayerError::Io { what: "map a disk layer's bitmap", source })?;
    Ok(FrozenBitmap { map, present: footer.present })
}

/// Reads a whole frozen layer's bitmap and compares it with the footer. Returns the number of blocks present.
pub fn verify(file: &File, layout: &Layout, index: usize) -> Result<u64, LayerError> {
    let footer = read_footer(file, layout, index)?;
    let bitmap = open(file, layout, index)?;
    if *blake3::hash(&bitmap.map).as_bytes() != footer.bitmap_sum {
        return Err(LayerError::Damaged { layer: index, what: "the bitmap's checksum is wrong".into() });
    }
    let present: u64 = bitmap.map.iter().map(|byte| u64::from(byte.count_ones())).sum();
    let beyond = (layout.blocks..layout.bitmap_bytes * 8).any(|block| bitmap.contains(block));
    if present != footer.present || beyond {
        return Err(LayerError::Damaged {
            layer: index,
            what: "the bitmap does not agree with the footer".into(),
        });
    }
    Ok(present)
}

/// Takes fixed-size fields off the front of a slice; past the end it yields zeros.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}
