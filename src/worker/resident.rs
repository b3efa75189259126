//! The memory of a clone, with what its snapshot's working set says it will touch first in place.
//!
//! Of a *mapped* clone all is mapped from the memory file anyway. What will be touched is brought into its page
//! table too, so that the guest need not wait for the host's half of its faults; and pieces of 2 MiB that will be written in many places get a copy of
//! their own, in one huge page if the host has one. Such a clone is told its working set only if it is made ahead ([`super::ahead::Seat`]): a copy takes a quarter
//! of a millisecond, for nothing if this guest does something else.
//!
//! Of a *userfault* clone the pieces of the working set are mapped from the file instead of being asked for page by page: they are shared with all other
//! clones, as long as they are not written.

use std::fs::File;
use std::ops::Range;

use userfaultfd::Uffd;

use crate::snapshot::limits::{HUGE_BYTES, PAGE_BYTES};
use crate::snapshot::memory::mapped::{MapError, Mapping};
use crate::snapshot::state::machine::RegionState;
use crate::snapshot::working_set::{PIECE_PAGES, Run, Touched, joined, push, without};

/// A piece in which so many pages will be written is copied as a whole.
const DENSE_PAGES: u32 = PIECE_PAGES / 4;

/// Maps a clone's memory from `file`.
pub fn map(
    memory: &mut [(RegionState, Mapping)],
    file: &File,
    working_set: &Touched,
) -> Result<(), MapError> {
    let dense = dense(&working_set.written);
    let dense_pages: Vec<Run> = dense
        .iter()
        .map(|run| Run { first: run.first * PIECE_PAGES, count: run.count * PIECE_PAGES })
        .collect();
    let written = without(&working_set.written, &dense_pages);
    // A page of its own splits a piece: mapping the rest of it page by page costs more than the few faults it saves.
    let read = without(&working_set.pieces, &joined(&dense, &pieces_with(&written)));
    for (region, mapping) in memory {
        mapping.back_with_file(file, region.file_offset)?;
        for part in parts(region, &dense, HUGE_BYTES) {
            let offset = region.file_offset + part.start as u64;
            mapping.back_part_with_copy(part, file, offset)?;
        }
        parts(region, &read, HUGE_BYTES).for_each(|part| mapping.populate(part, false));
        parts(region, &written, PAGE_BYTES).for_each(|part| mapping.populate(part, true));
    }
    Ok(())
}

/// Registers a clone's memory at `uffd`, but for the pieces of the working set.
pub fn register(
    memory: &mut [(RegionState, Mapping)],
    file: &File,
    working_set: &Touched,
    uffd: &Uffd,
) -> Result<(), MapError> {
    for (region, mapping) in memory {
        let whole = [pieces_of(region)];
        let asked_for = without(&whole, &working_set.pieces);
        if !is_aligned(region) || asked_for == whole {
            mapping.back_with_userfault(uffd)?;
            continue;
        }
        mapping.back_with_file(file, region.file_offset)?;
        for part in parts(region, &asked_for, HUGE_BYTES) {
            mapping.back_part_with_userfault(uffd, part)?;
        }
    }
    Ok(())
}

/// All pieces of a region. One that it has only a part of counts as its own.
fn pieces_of(region: &RegionState) -> Run {
    let piece = |at: u64| u32::try_from(at).unwrap_or(u32::MAX);
    let first = piece(region.file_offset / HUGE_BYTES);
    let end = piece(region.file_offset.saturating_add(region.bytes).div_ceil(HUGE_BYTES));
    Run { first, count: end.saturating_sub(first) }
}

/// Pieces in which some of these pages are.
fn pieces_with(pages: &[Run]) -> Vec<Run> {
    let mut pieces = Vec::new();
    for run in pages {
        push(&mut pieces, run.first / PIECE_PAGES, run.end().div_ceil(PIECE_PAGES));
    }
    pieces
}

/// Pieces that will be written in many places.
fn dense(written: &[Run]) -> Vec<Run> {
    let mut dense = Vec::new();
    let mut counted = (0, 0);
    for run in written {
        let mut at = run.first;
        while at < run.end() {
            let piece = at / PIECE_PAGES;
            let end = run.end().min((piece + 1) * PIECE_PAGES);
            counted = if counted.0 == piece { (piece, counted.1 + end - at) } else { (piece, end - at) };
            if counted.1 >= DENSE_PAGES {
                push(&mut dense, piece, piece + 1);
            }
            at = end;
        }
    }
    dense
}

/// Regions that we lay out ourselves are; in others pieces of the file are not pieces of the memory.
fn is_aligned(region: &RegionState) -> bool {
    region.file_offset.is_multiple_of(HUGE_BYTES)
}

/// What of `runs`, in units of the memory file, is in the region: bytes from its first.
fn parts(region: &RegionState, runs: &[Run], unit_bytes: u64) -> impl Iterator<Item = Range<usize>> {
    let (start, bytes) = (region.file_offset, region.bytes);
    let runs = if is_aligned(region) { runs } else { &[] };
    runs.iter().filter_map(move |run| {
        let place = |unit: u32| (u64::from(unit) * unit_bytes).saturating_sub(start).min(bytes) as usize;
        let part = place(run.first)..place(run.end());
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u32, count: u32) -> Run {
        Run { first, count }
    }

    fn region(file_offset: u64, bytes: u64) -> RegionState {
        RegionState { guest_address: 0, bytes, file_offset }
    }

    #[test]
    fn pieces_that_will_be_written_in_many_places_are_found() {
        assert_eq!(
            dense(&[run(0, 127), run(512, 128), run(2 * 512 + 400, 200), run(5 * 512, 1024)]),
            [run(1, 1), run(5, 2)]
        );
        assert_eq!(dense(&[run(512, 100), run(700, 27)]), []);
        assert_eq!(dense(&[run(512, 100), run(700, 28), run(900, 1)]), [run(1, 1)]);
        assert_eq!(dense(&[]), []);
    }

    #[test]
    fn pieces_are_found_by_their_pages() {
        let pages = [run(0, 1), run(511, 2), run(5 * 512 + 3, 1), run(5 * 512 + 9, 1), run(7 * 512, 512)];
        assert_eq!(pieces_with(&pages), [run(0, 2), run(5, 1), run(7, 1)]);
    }

    #[test]
    fn parts_are_cut_to_the_region() {
        let of = |region: &RegionState, runs: &[Run]| parts(region, runs, HUGE_BYTES).collect::<Vec<_>>();
        let huge = HUGE_BYTES as usize;
        let upper = region(4 * HUGE_BYTES, 3 * HUGE_BYTES - 8192);
        assert!(of(&upper, &[run(0, 4), run(7, 2)]).is_empty());
        assert_eq!(of(&upper, &[run(0, 5), run(6, 2)]), [0..huge, 2 * huge..3 * huge - 8192]);
        assert!(of(&region(4096, HUGE_BYTES), &[run(0, 5)]).is_empty());
    }
}
