//! Where a sparse file has data and where it has holes: `lseek(2)` with `SEEK_DATA` and `SEEK_HOLE`.
//!
//! A hole reads as zeros; the opposite need not hold. Calling data what is a hole is therefore always correct, only
//! slower, and that is what happens on file systems that cannot tell, and beyond [`EXTENTS_MAX`].

use std::{fs::File, io, ops::Range};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::snapshot::limits::PAGE_BYTES;

/// Most extents remembered of one file (16 bytes each); what lies behind the last counts as data.
pub const EXTENTS_MAX: usize = 1 << 18;

/// The data extents of a file, rounded outwards to pages, sorted, neither touching nor overlapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extents {
    data: Vec<Range<u64>>,
    bytes: u64,
}

/// What lies at an offset, and the end of the run of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    Data { end: u64 },
    Hole { end: u64 },
}

impl Extents {
    /// Asks the file system. Moves the file's offset.
    pub fn of_file(file: &File) -> io::Result<Extents> {
        Extents::of_file_at_most(file, EXTENTS_MAX)
    }

    fn of_file_at_most(file: &File, extents_max: usize) -> io::Result<Extents> {
        let bytes = file.metadata()?.len();
        let mut extents = Extents { data: Vec::new(), bytes };
        let mut at = 0;
        while at < bytes {
            let Some(start) = seek(file, SeekFrom::Data(at))? else { break };
            if start >= bytes {
                break;
            }
            let end = if extents.data.len() + 1 >= extents_max {
                bytes
            } else {
                // A file that shrinks meanwhile may have no hole to report.
                seek(file, SeekFrom::Hole(start))?.unwrap_or(bytes).clamp(start + 1, bytes)
            };
            extents.push(start..end);
            at = end;
        }
        Ok(extents)
    }

    /// All of a file of `bytes` bytes is data.
    pub fn all_data(bytes: u64) -> Extents {
        let mut extents = Extents { data: Vec::new(), bytes };
        if bytes > 0 {
            extents.push(0..bytes);
        }
        extents
    }

    fn push(&mut self, run: Range<u64>) {
        let start = run.start - run.start % PAGE_BYTES;
        let end = run.end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(run.end);
        match self.data.last_mut() {
            Some(last) if last.end >= start => last.end = end.max(last.end),
            _ => self.data.push(start..end),
        }
    }

    /// Length of the file, bytes.
    pub fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that are data, pages counted whole.
    pub fn data_bytes(&self) -> u64 {
        self.data.iter().map(|run| run.end - run.start).sum()
    }

    /// The data runs, in order.
    pub fn data(&self) -> &[Range<u64>] {
        &self.data
    }

    /// Whether any byte of `range` is data.
    pub fn any_data(&self, range: Range<u64>) -> bool {
        match self.run_at(range.start) {
            Run::Data { .. } => !range.is_empty(),
            Run::Hole { end } => end < range.end,
        }
    }

    /// What lies at `offset`. Behind the last extent the hole has no end (`u64::MAX`).
    pub fn run_at(&self, offset: u64) -> Run {
        let next = self.data.partition_point(|run| run.end <= offset);
        match self.data.get(next) {
            Some(run) if run.start <= offset => Run::Data { end: run.end },
            Some(run) => Run::Hole { end: run.start },
            None => Run::Hole { end: u64::MAX },
        }
    }
}

/// `None`: there is neither data nor hole from `offset` on (only `SEEK_DATA` says so, or a shrunken file).
fn seek(file: &File, whence: SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, whence) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        // The file system cannot tell, or files are not that long: all is data, then the end.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(match whence {
            SeekFrom::Data(offset) if i64::try_from(offset).is_ok() => Some(offset),
            _ => None,
        }),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn sparse(pages: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE_BYTES).unwrap();
        for page in data {
            file.write_all_at(b"x", page * PAGE_BYTES + 17).unwrap();
        }
        file
    }

    #[test]
    fn runs_are_found_and_looked_up() {
        let extents = Extents::of_file(&sparse(100, &[3, 4, 50])).unwrap();
        assert_eq!(extents.data(), &[3 * 4096..5 * 4096, 50 * 4096..51 * 4096]);
        assert_eq!(extents.data_bytes(), 3 * 4096);
        assert_eq!(extents.run_at(0), Run::Hole { end: 3 * 4096 });
        assert_eq!(extents.run_at(4 * 4096 + 1), Run::Data { end: 5 * 4096 });
        assert_eq!(extents.run_at(5 * 4096), Run::Hole { end: 50 * 4096 });
        assert_eq!(extents.run_at(51 * 4096), Run::Hole { end: u64::MAX });
        assert!(!extents.any_data(0..3 * 4096));
        assert!(extents.any_data(0..3 * 4096 + 1));
        assert!(!extents.any_data(3 * 4096..3 * 4096));
        assert!(!extents.any_data(51 * 4096..100 * 4096));
    }

    #[test]
    fn too_many_extents_end_in_one_that_holds_the_rest() {
        let extents = Extents::of_file_at_most(&sparse(100, &[1, 3, 5, 7, 9]), 3).unwrap();
        assert_eq!(extents.data(), &[4096..8192, 3 * 4096..4 * 4096, 5 * 4096..100 * 4096]);
    }

    #[test]
    fn an_empty_file_and_one_hole_have_no_data() {
        assert_eq!(Extents::of_file(&sparse(0, &[])).unwrap().data(), &[]);
        assert_eq!(Extents::of_file(&sparse(10, &[])).unwrap().data(), &[]);
        assert_eq!(Extents::all_data(5000).data_bytes(), 8192);
    }
}
