//! Keeping a working set in the page cache, in 2 MiB folios.
//!
//! Under memory pressure the kernel drops pages of the page cache, and what faults bring back comes in small folios. So a snapshot that is in use is looked at
//! now and then: what is missing of its working set is read again, and what came back small is folded again.

use std::{collections::BTreeSet, fs::File, io, ops::Range, sync::Arc};

use super::{
    fold::bytes_of,
    image::{Entry, PageMap},
    view::{View, drop_unmapped},
};
use crate::snapshot::{
    limits::{HUGE_BYTES, PAGE_BYTES},
    working_set::Run,
};

/// Rounds for which a piece that did not come back in one folio is left alone: clones may have its small ones mapped, or memory is fragmented.
const PATIENCE: u32 = 60;

/// Keeps pieces of one memory file.
#[derive(Debug)]
pub struct Keeper {
    file: Arc<File>,
    view: View,
    page_map: PageMap,
    /// Pieces that are left alone for now.
    small: BTreeSet<u32>,
    round: u32,
}

/// What a round found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Pieces that are in the page cache as one folio now.
    pub folded: u32,
    /// Those among them that were not, before.
    pub again: u32,
}

impl Keeper {
    /// For the first `bytes` bytes of a file that was synced.
    pub fn new(file: Arc<File>, bytes: u64) -> io::Result<Keeper> {
        let view = View::new(&file, bytes)?;
        let page_map = PageMap::open().map_err(io::Error::other)?;
        Ok(Keeper { file, view, page_map, small: BTreeSet::new(), round: 0 })
    }

    /// Looks at `pieces`, and reads again what is not as it should be. Blocks while the disk reads.
    pub fn keep(&mut self, pieces: &[Run]) -> io::Result<Kept> {
        self.round = self.round.wrapping_add(1);
        if self.round.is_multiple_of(PATIENCE) {
            self.small.clear();
        }
        let mut kept = Kept::default();
        for piece in pieces.iter().flat_map(|run| run.first..run.end()) {
            let part = bytes_of(Run { first: piece, count: 1 });
            if self.small.contains(&piece) {
                // At least it is there.
                self.view.read(&part)?;
                self.view.unmap(&part)?;
                continue;
            }
            if self.is_folded(&part)? {
                kept.folded += 1;
                continue;
            }
            drop_unmapped(&self.file, &part);
            self.view.read(&part)?;
            if self.is_folded(&part)? {
                kept.folded += 1;
                kept.again += 1;
            } else {
                self.small.insert(piece);
            }
        }
        Ok(kept)
    }

    /// Whether a piece is one folio. A fault in its first page maps all of it then, and otherwise its neighbours (64 KiB) at most.
    fn is_folded(&self, part: &Range<u64>) -> io::Result<bool> {
        self.view.unmap(part)?;
        self.view.read(&(part.start..part.start + PAGE_BYTES))?;
        let mut last = [Entry::default()];
        let read = self.page_map.read(self.view.address(part.start + HUGE_BYTES - PAGE_BYTES), &mut last);
        read.map_err(io::Error::other)?;
        // Left mapped it could not be dropped by us; and leaving tells the kernel that it was used.
        self.view.unmap(part)?;
        Ok(last.iter().all(|entry| entry.is_present()))
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use rustix::fs::Advice;

    use super::*;
    use crate::snapshot::memory::{
        extents::Extents,
        fold::{
            fold,
            tests::{huge_kib, sparse},
        },
        mapped::Mapping,
    };

    fn run(first: u32, count: u32) -> Run {
        Run { first, count }
    }

    /// KiB of the file that a new mapping, touched once in each piece, has mapped huge.
    fn huge(file: &File) -> u64 {
        let mapping = Mapping::of_file(file, 0, 8 * HUGE_BYTES).unwrap();
        for piece in 0..8 {
            // SAFETY: within the mapping.
            unsafe { mapping.address().add(piece * HUGE_BYTES as usize + 45_000).read_volatile() };
        }
        huge_kib(&mapping)
    }

    #[test]
    fn what_was_dropped_comes_back_as_it_was() {
        let file = Arc::new(sparse(8, &[1, 2, 5]));
        fold(&file, &Extents::of_file(&file).unwrap(), &[], u64::MAX).unwrap();
        if huge(&file) == 0 {
            // Then it only has to do no harm.
            eprintln!("ignored: this kernel or file system has no 2 MiB folios for files");
        }
        let has_folios = huge(&file) > 0;
        let mut keeper = Keeper::new(Arc::clone(&file), 8 * HUGE_BYTES).unwrap();
        drop_unmapped(&file, &(0..8 * HUGE_BYTES));
        // Small pages in one of them: its first is read alone.
        let mut page = [0; 4096];
        // No reading ahead.
        rustix::fs::fadvise(&*file, 0, None, Advice::Random).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut page, 2 * HUGE_BYTES).unwrap();
        rustix::fs::fadvise(&*file, 0, None, Advice::Normal).unwrap();
        let first = keeper.keep(&[run(1, 2), run(5, 1)]).unwrap();
        let second = keeper.keep(&[run(1, 2), run(5, 1)]).unwrap();
        match has_folios {
            true => {
                assert_eq!(first.folded, 3, "{first:?}");
                assert!(first.again >= 1, "{first:?}");
                assert_eq!(second, Kept { folded: 3, again: 0 });
                assert!(huge(&file) >= 3 * 2048);
            }
            false => assert_eq!((first, second), (Kept::default(), Kept::default())),
        }
    }

    #[test]
    fn a_file_truncated_meanwhile_is_an_error() {
        let file = Arc::new(sparse(4, &[0, 3]));
        let mut keeper = Keeper::new(Arc::clone(&file), 4 * HUGE_BYTES).unwrap();
        file.set_len(HUGE_BYTES).unwrap();
        assert!(keeper.keep(&[run(0, 1)]).is_ok());
        assert!(keeper.keep(&[run(3, 1)]).is_err());
    }
}
