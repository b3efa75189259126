//! Mapping the program's own pages before they are needed: a shell that runs the road of a clone for the first time when a
//! caller waits for it would take a page fault at every turn. It takes most of a millisecond, so only for those that will.

#![allow(unsafe_code)]

use std::fs;

/// From asm-generic/mman-common.h; Linux 5.14.
const MADV_POPULATE_READ: libc::c_int = 22;
/// Most mappings that are looked at, and most bytes of one.
const MAPPINGS_MAX: usize = 64;
const MAPPING_BYTES_MAX: usize = 64 << 20;

/// Where this program's code and constants are.
#[derive(Debug, Default)]
pub struct OwnPages(Vec<(usize, usize)>);

impl OwnPages {
    /// Reads /proc. A fork of this process has them at the same places.
    pub fn find() -> Self {
        let (Ok(maps), Ok(program)) =
            (fs::read_to_string("/proc/self/maps"), fs::read_link("/proc/self/exe"))
        else {
            return Self::default();
        };
        let program = program.to_string_lossy();
        Self(maps.lines().filter_map(|line| mapping_of(line, &program)).take(MAPPINGS_MAX).collect())
    }

    /// Maps them. Advice only: where the kernel does not know it, faults come later.
    pub fn map(&self) {
        for (start, bytes) in &self.0 {
            // SAFETY: advice to map pages of this process for reading changes no content and no protection; a range
            // that is gone by now is refused.
            unsafe { libc::madvise(std::ptr::without_provenance_mut(*start), *bytes, MADV_POPULATE_READ) };
        }
    }
}

/// Address and length of a line of /proc/self/maps (proc(5)) that maps `program`.
fn mapping_of(line: &str, program: &str) -> Option<(usize, usize)> {
    let (range, rest) = line.split_once(' ')?;
    if !rest.starts_with('r') || !rest.trim_end().ends_with(program) {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let bytes = usize::from_str_radix(end, 16).ok()?.checked_sub(start)?;
    (bytes <= MAPPING_BYTES_MAX).then_some((start, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_programs_own_readable_mappings_count() {
        let line = "55d0c0a00000-55d0c0a02000 r-xp 00001000 08:01 77   /usr/bin/coldspark";
        assert_eq!(mapping_of(line, "/usr/bin/coldspark"), Some((0x55d0_c0a0_0000, 0x2000)));
        assert_eq!(mapping_of(&line.replace("r-xp", "---p"), "/usr/bin/coldspark"), None);
        assert_eq!(mapping_of(line, "/usr/bin/other"), None);
        assert_eq!(mapping_of("nonsense", "/usr/bin/coldspark"), None);
    }

    #[test]
    fn a_running_program_finds_itself() {
        let pages = OwnPages::find();
        assert!(!pages.0.is_empty());
        pages.map();
    }
}
