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

#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range};

use super::{
    extents::{self, Extents},
    view::{self, View},
};
use crate::snapshot::{
    limits::HUGE_BYTES,
    working_set::{Run, common, push, without},
};

/// Folds the 2 MiB pieces of `file` that have data in them, those of `first` before the others, until `bytes_max` bytes of page cache are used
/// for it (the kernel reads a little ahead besides). Returns the bytes folded. Blocks while the disk reads; the file must have been synced, or its dirty pages
/// stay as they are.
///
/// # Errors
/// What mapping or reading gives; nothing is lost.
pub fn fold(file: &File, extents: &Extents, first: &[Run], bytes_max: u64) -> io::Result<u64> {
    let all = pieces(extents);
    let Some(last) = all.last() else { return Ok(0) };
    let view = View::new(file, bytes_of(*last).end)?;
    let mut folded = 0;
    for run in common(&all, first).into_iter().chain(without(&all, first)) {
        let Range { start, end } = bytes_of(run);
        // Whole pieces, as many as there is room for.
        let end = start + (end - start).min((bytes_max - folded) / HUGE_BYTES * HUGE_BYTES);
        if start == end {
            break;
        }
        view::drop_unmapped(file, &(start..end));
        view.read(&(start..end))?;
        folded += end - start;
    }
    Ok(folded)
}

/// A run of pieces as file offsets.
pub(super) fn bytes_of(run: Run) -> Range<u64> {
    u64::from(run.first) * HUGE_BYTES..u64::from(run.end()) * HUGE_BYTES
}

/// Runs of whole 2 MiB pieces that have data.
fn pieces(extents: &Extents) -> Vec<Run> {
    // A memory file has at most 1 TiB; what is longer is not looked at.
    let whole = u32::try_from(extents.file_bytes() / HUGE_BYTES).unwrap_or(u32::MAX);
    let mut runs = Vec::new();
    let mut piece = 0;
    while piece < whole {
        let at = u64::from(piece) * HUGE_BYTES;
        piece = match extents.run_at(at) {
            // To the piece in which the hole ends.
            extents::Run::Hole { end } if end >= at + HUGE_BYTES => {
                u32::try_from(end / HUGE_BYTES).unwrap_or(whole)
            }
            _ => {
                push(&mut runs, piece, piece + 1);
                piece + 1
            }
        };
    }
    runs
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::memory::mapped::Mapping;

    const PIECE: u64 = HUGE_BYTES;

    pub(in crate::snapshot::memory) fn sparse(pieces: u64, data: &[u64]) -> File {
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
    fn pieces_with_data_are_chosen() {
        let run = |first, count| Run { first, count };
        let extents = Extents::of_file(&sparse(20, &[2, 3, 9, 19])).unwrap();
        assert_eq!(pieces(&extents), [run(2, 2), run(9, 1), run(19, 1)]);
        assert_eq!(pieces(&Extents::all_data(3 * PIECE - 1)), [run(0, 2)]);
        assert_eq!(pieces(&Extents::all_data(0)), []);
    }

    #[test]
    fn the_limit_is_kept_and_what_is_wanted_first_comes_first() {
        let file = sparse(20, &[2, 3, 9, 19]);
        let extents = Extents::of_file(&file).unwrap();
        let first = [Run { first: 7, count: 100 }];
        for (bytes_max, folded) in [(u64::MAX, 4), (3 * PIECE, 3), (2 * PIECE - 1, 1), (PIECE - 1, 0)] {
            assert_eq!(fold(&file, &extents, &first, bytes_max).unwrap(), folded * PIECE);
        }
        // Out of the cache, and with room for two.
        view::drop_unmapped(&file, &(0..20 * PIECE));
        assert_eq!(fold(&file, &extents, &first, 2 * PIECE).unwrap(), 2 * PIECE);
        assert!(is_cached(&file, 9) && is_cached(&file, 19) && !is_cached(&file, 2));
    }

    /// Whether the page of a piece in which `sparse` has data is in the page cache.
    fn is_cached(file: &File, piece: u64) -> bool {
        let mapping = Mapping::of_file(file, 0, (piece + 1) * PIECE).unwrap();
        let mut state = 0u8;
        // SAFETY: one page of the mapping, one byte for its state.
        let result = unsafe {
            libc::mincore(mapping.address().add((piece * PIECE) as usize + 40_960).cast(), 4096, &mut state)
        };
        assert_eq!(result, 0);
        state & 1 == 1
    }

    #[test]
    fn folding_changes_the_cache_and_not_the_content() {
        let file = sparse(8, &[1, 2, 5]);
        assert_eq!(fold(&file, &Extents::of_file(&file).unwrap(), &[], u64::MAX).unwrap(), 3 * PIECE);
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
        assert!(fold(&file, &extents, &[], u64::MAX).is_err());
    }

    /// KiB of a mapping that are mapped huge.
    pub(in crate::snapshot::memory) fn huge_kib(mapping: &Mapping) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.address().addr());
        let lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let line = lines
            .take_while(|line| !line.starts_with("VmFlags"))
            .find(|line| line.starts_with("FilePmdMapped"));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    }
}
