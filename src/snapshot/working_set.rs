//! The working set of a snapshot: what clones touch of its memory between their start and their first useful answer.
//!
//! It is learnt from the first clones ([`RECORDINGS`] of them), which run without it, and is then fixed. What later clones have of it
//! (`worker::resident`): pieces that were touched are mapped, and read in first if they are not in the page cache; pages that all of them
//! wrote are copied ahead, so that the guest finds its own.
//!
//! It is advice, in a file of its own that the manifest does not name: lost, damaged or wrong, clones are slower and nothing else. It comes from
//! workers, which may be hostile, so it says *where* and never *what*: the pages come from the published memory file.
//!
//! `working-set.bin`: bincode 2 of the format's number (1), the recordings, and the two lists of runs; then the BLAKE3 (32 bytes) of that.

use std::cmp::{max, min};

use serde::{Deserialize, Serialize};

use super::codec;
use super::limits::{HUGE_BYTES, PAGE_BYTES};
use super::sums::Sum;

/// How many clones it is learnt from.
pub const RECORDINGS: u32 = 3;
/// Most of the file that is read.
pub const FILE_BYTES_MAX: u64 = 64 << 10;
/// Most runs of pieces, and the most pieces in them (2 GiB).
pub const PIECE_RUNS_MAX: usize = 512;
pub const PIECES_MAX: u64 = 1024;
/// Most runs of written pages, and the most pages in them (32 MiB): each clone that stands ready holds its own.
pub const WRITTEN_RUNS_MAX: usize = 2048;
pub const WRITTEN_PAGES_MAX: u64 = 8192;

/// Pages of a piece.
pub const PIECE_PAGES: u32 = (HUGE_BYTES / PAGE_BYTES) as u32;

const FORMAT: u32 = 1;
const SUM_BYTES: usize = 32;

/// Neighbours, counted in units of a memory file: 2 MiB pieces or 4 KiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    pub first: u32,
    pub count: u32,
}

impl Run {
    /// One behind the last.
    pub fn end(self) -> u32 {
        self.first.saturating_add(self.count)
    }
}

/// Parts of a memory file. The lists are sorted, their runs not empty and apart from each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// 2 MiB pieces in which something was read or written.
    pub pieces: Vec<Run>,
    /// Pages that were written.
    pub written: Vec<Run>,
}

impl Touched {
    /// Whether it is in order and within a memory file of this length.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, file_bytes: u64) -> Result<(), &'static str> {
        check(&self.pieces, file_bytes.div_ceil(HUGE_BYTES), PIECE_RUNS_MAX, PIECES_MAX)?;
        check(&self.written, file_bytes.div_ceil(PAGE_BYTES), WRITTEN_RUNS_MAX, WRITTEN_PAGES_MAX)
    }

    /// Leaves out what is beyond the limits, from the end.
    pub fn limited(self) -> Touched {
        Touched {
            pieces: limited(self.pieces, PIECE_RUNS_MAX, PIECES_MAX),
            written: limited(self.written, WRITTEN_RUNS_MAX, WRITTEN_PAGES_MAX),
        }
    }

    /// Bytes of the pieces.
    pub fn piece_bytes(&self) -> u64 {
        units(&self.pieces) * HUGE_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.written.is_empty()
    }
}

/// What was learnt so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    recordings: u32,
    /// How many of them tell what was written.
    write_recordings: u32,
    touched: Touched,
}

impl WorkingSet {
    /// Adds what one more clone touched: pieces that any has touched belong to it, and pages that all have written. `writes`: which pages
    /// it has written can be told. (Those of a userfault clone are its own from the first reading on.)
    pub fn learn(&mut self, touched: &Touched, writes: bool) {
        let written = match (writes, self.write_recordings) {
            (false, _) => self.touched.written.clone(),
            (true, 0) => touched.written.clone(),
            (true, _) => common(&self.touched.written, &touched.written),
        };
        let pieces = joined(&self.touched.pieces, &touched.pieces);
        self.touched = Touched { pieces, written }.limited();
        self.recordings = self.recordings.saturating_add(1);
        self.write_recordings = self.write_recordings.saturating_add(writes.into());
    }

    /// How many clones it was learnt from.
    pub fn recordings(&self) -> u32 {
        self.recordings
    }

    /// For clones; `None` as long as it is being learnt.
    pub fn learnt(&self) -> Option<&Touched> {
        (self.recordings >= RECORDINGS).then_some(&self.touched)
    }

    /// Bytes of the pieces, and of the written pages.
    pub fn bytes(&self) -> (u64, u64) {
        (units(&self.touched.pieces) * HUGE_BYTES, units(&self.touched.written) * PAGE_BYTES)
    }

    /// The file.
    pub fn to_bytes(&self) -> Result<Vec<u8>, codec::CodecError> {
        let mut bytes = codec::encode(&(FORMAT, self))?;
        bytes.extend_from_slice(&Sum::of_bytes(&bytes).0);
        Ok(bytes)
    }

    /// Reads the file, which belongs to a memory file of `memory_bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_bytes(bytes: &[u8], memory_bytes: u64) -> Result<WorkingSet, String> {
        let (content, sum) = bytes.split_last_chunk::<SUM_BYTES>().ok_or("it is too short")?;
        if Sum::of_bytes(content).0 != *sum {
            return Err("its sum differs".to_owned());
        }
        let (format, set): (u32, WorkingSet) = codec::decode(content).map_err(|error| error.to_string())?;
        if format != FORMAT {
            return Err(format!("its format is {format}, not {FORMAT}"));
        }
        set.touched.check(memory_bytes)?;
        Ok(set)
    }
}

fn check(runs: &[Run], units_in_file: u64, runs_max: usize, units_max: u64) -> Result<(), &'static str> {
    if runs.len() > runs_max || units(runs) > units_max {
        return Err("it is too large");
    }
    let mut at = 0;
    for (n, run) in runs.iter().enumerate() {
        let first = u64::from(run.first);
        if run.count == 0 || first < at || (n > 0 && first == at) {
            return Err("its runs are not in order");
        }
        at = first + u64::from(run.count);
    }
    if at > units_in_file {
        return Err("it reaches beyond the memory file");
    }
    Ok(())
}

/// How many units there are in the runs.
pub fn units(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.count)).sum()
}

fn limited(mut runs: Vec<Run>, runs_max: usize, units_max: u64) -> Vec<Run> {
    runs.truncate(runs_max);
    let mut left = u32::try_from(units_max).unwrap_or(u32::MAX);
    for run in &mut runs {
        run.count = run.count.min(left);
        left -= run.count;
    }
    runs.retain(|run| run.count > 0);
    runs
}

/// Adds a run that begins at or behind the end of the last.
pub fn push(runs: &mut Vec<Run>, first: u32, end: u32) {
    match runs.last_mut() {
        Some(last) if last.end() >= first => last.count = max(last.end(), end) - last.first,
        _ if end > first => runs.push(Run { first, count: end - first }),
        _ => {}
    }
}

/// What is in either.
pub fn joined(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.first);
    let mut runs = Vec::with_capacity(all.len());
    for run in all {
        push(&mut runs, run.first, run.end());
    }
    runs
}

/// What is in both.
pub fn common(a: &[Run], b: &[Run]) -> Vec<Run> {
    let (mut runs, mut a, mut b) = (Vec::new(), a.iter().peekable(), b.iter().peekable());
    while let (Some(one), Some(other)) = (a.peek(), b.peek()) {
        push(&mut runs, max(one.first, other.first), min(one.end(), other.end()));
        match one.end() < other.end() {
            true => a.next(),
            false => b.next(),
        };
    }
    runs
}

/// What is in `a` and not in `b`.
pub fn without(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut gaps = Vec::with_capacity(b.len() + 1);
    let mut at = 0;
    for run in b {
        push(&mut gaps, at, run.first);
        at = run.end();
    }
    push(&mut gaps, at, u32::MAX);
    common(a, &gaps)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const FILE: u64 = 512 << 20;

    fn run(first: u32, count: u32) -> Run {
        Run { first, count }
    }

    fn runs_of(set: &BTreeSet<u32>) -> Vec<Run> {
        let mut runs = Vec::new();
        set.iter().for_each(|unit| push(&mut runs, *unit, unit + 1));
        runs
    }

    fn recorded(pieces: &[Run], written: &[Run]) -> Touched {
        Touched { pieces: pieces.to_vec(), written: written.to_vec() }
    }

    #[test]
    fn it_is_what_any_clone_touched_and_all_of_them_wrote() {
        let mut set = WorkingSet::default();
        set.learn(&recorded(&[run(1, 2)], &[run(512, 20)]), true);
        set.learn(&recorded(&[run(9, 1)], &[run(0, 1)]), false);
        assert_eq!(set.learnt(), None);
        set.learn(&recorded(&[run(3, 1)], &[run(500, 22), run(530, 9)]), true);
        assert_eq!(set.learnt(), Some(&recorded(&[run(1, 3), run(9, 1)], &[run(512, 10), run(530, 2)])));
        assert_eq!(set.bytes(), (4 * HUGE_BYTES, 12 * PAGE_BYTES));
    }

    #[test]
    fn the_file_gives_it_back_and_nothing_else() {
        let mut set = WorkingSet::default();
        set.learn(&recorded(&[run(0, 256)], &[run(7, 1), run(9, 4)]), true);
        let bytes = set.to_bytes().unwrap();
        assert_eq!(WorkingSet::from_bytes(&bytes, FILE), Ok(set));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(WorkingSet::from_bytes(&changed, FILE).is_err(), "{at}");
            assert!(WorkingSet::from_bytes(&bytes[..at], FILE).is_err(), "{at}");
        }
        let beyond = WorkingSet::from_bytes(&bytes, FILE - HUGE_BYTES);
        assert_eq!(beyond, Err("it reaches beyond the memory file".to_owned()));
    }

    #[test]
    fn what_a_hostile_worker_says_is_refused() {
        let whole = u32::MAX;
        for pieces in [
            vec![run(0, 257)],
            vec![run(256, 1)],
            vec![run(whole, whole)],
            vec![run(3, 0)],
            vec![run(3, 1), run(3, 1)],
            vec![run(3, 1), run(4, 1)],
            vec![run(4, 1), run(3, 1)],
            vec![run(0, 1); PIECE_RUNS_MAX + 1],
        ] {
            assert!(recorded(&pieces, &[]).check(FILE).is_err(), "{pieces:?}");
        }
        assert!(recorded(&[], &[run(0, 8193)]).check(FILE).is_err());
        assert!(recorded(&[], &[run(0, 8192)]).check(FILE).is_ok());
        assert!(recorded(&[run(0, 1)], &[]).check(0).is_err());
    }

    #[test]
    fn what_is_too_much_is_left_out_from_the_end() {
        let mut set = WorkingSet::default();
        let scattered: Vec<Run> = (0..5000).map(|n| run(2 * n, 1)).collect();
        set.learn(&recorded(&[run(5, 5000)], &scattered), true);
        let (pieces, written) = set.bytes();
        assert_eq!((pieces, written), (PIECES_MAX * HUGE_BYTES, WRITTEN_RUNS_MAX as u64 * PAGE_BYTES));
        set.touched.check(1 << 40).unwrap();
        assert!(set.to_bytes().unwrap().len() as u64 <= FILE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn the_lists_are_sets(a in prop::collection::btree_set(0u32..200, 0..80), b in prop::collection::btree_set(0u32..200, 0..80)) {
            let (left, right) = (runs_of(&a), runs_of(&b));
            prop_assert_eq!(joined(&left, &right), runs_of(&(&a | &b)));
            prop_assert_eq!(common(&left, &right), runs_of(&(&a & &b)));
            prop_assert_eq!(without(&left, &right), runs_of(&(&a - &b)));
            prop_assert_eq!(units(&left), a.len() as u64);
            prop_assert!(recorded(&left, &right).check(FILE).is_ok() || a.last() > Some(&255));
        }
    }
}
