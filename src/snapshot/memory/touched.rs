//! What a running clone has touched of its snapshot's memory: its page table, as the kernel shows it (Documentation/admin-guide/mm/pagemap.rst).
//!
//! A page that is present was read or written, by the guest or by the VMM for it; one that is not a file page is the clone's own: it was
//! written, or answered by the pager. The kernel maps a little more than was asked for (16 pages around a fault, all of a large folio), so reads are counted
//! in pieces of 2 MiB.

#![allow(unsafe_code)]

use super::image::{Entry, ImageError, PageMap};
use crate::snapshot::limits::PAGE_BYTES;
use crate::snapshot::working_set::{PIECE_PAGES, Touched, push};

const PAGE: usize = PAGE_BYTES as usize;
/// Entries read at once: those of a piece.
const ENTRIES: usize = PIECE_PAGES as usize;

/// Where a region of a clone's memory is.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// In this process.
    pub address: usize,
    /// A multiple of 4 KiB.
    pub bytes: usize,
    /// In the memory file; a multiple of 4 KiB.
    pub file_offset: u64,
}

/// Looks through the page table of `places`, while the guest runs on.
pub fn touched(places: &[Place], page_map: &PageMap) -> Result<Touched, ImageError> {
    let mut places = places.to_vec();
    places.sort_unstable_by_key(|place| place.file_offset);
    let mut found = Touched::default();
    let mut entries = [Entry::default(); ENTRIES];
    for place in places {
        let (first_page, pages) = (place.file_offset / PAGE_BYTES, place.bytes / PAGE);
        for start in (0..pages).step_by(ENTRIES) {
            let entries = entries.get_mut(..ENTRIES.min(pages - start)).unwrap_or_default();
            page_map.read(place.address + start * PAGE, entries)?;
            for (page, entry) in (first_page + start as u64..).zip(entries.iter()) {
                // A memory file has at most 2^28 pages.
                let Ok(page) = u32::try_from(page) else { break };
                if !entry.is_present() {
                    continue;
                }
                let piece = page / PIECE_PAGES;
                push(&mut found.pieces, piece, piece + 1);
                if entry.is_private() {
                    push(&mut found.written, page, page + 1);
                }
            }
        }
    }
    Ok(found.limited())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::limits::HUGE_BYTES;
    use crate::snapshot::memory::mapped::Mapping;
    use crate::snapshot::working_set::Run;

    const PIECE: u64 = HUGE_BYTES;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PIECE).unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        file
    }

    fn place(mapping: &Mapping, file_offset: u64) -> Place {
        Place { address: mapping.address().addr(), bytes: mapping.bytes(), file_offset }
    }

    #[test]
    fn readings_and_writings_are_found_where_they_lie_in_the_file() {
        let file = file();
        // The regions as a guest may have them: the upper one first.
        let upper = Mapping::of_file(&file, 4 * PIECE, 4 * PIECE).unwrap();
        let lower = Mapping::of_file(&file, 0, 3 * PIECE).unwrap();
        let places = [place(&upper, 4 * PIECE), place(&lower, 0)];
        let page_map = PageMap::open().unwrap();
        assert!(touched(&places, &page_map).unwrap().is_empty());
        // SAFETY: within the mappings, which nobody else uses.
        unsafe {
            lower.address().add(5 * 4096).write(1);
            lower.address().add(6 * 4096).write(1);
            lower.address().add(2 * PIECE as usize + 9).read_volatile();
            upper.address().add(PIECE as usize - 1).write(1);
        }
        let run = |first, count| Run { first, count };
        let found = touched(&places, &page_map).unwrap();
        assert_eq!(found.written, [run(5, 2), run(4 * 512 + 511, 1)]);
        assert_eq!(found.pieces, [run(0, 1), run(2, 1), run(4, 1)]);
        found.check(8 * PIECE).unwrap();
    }
}
