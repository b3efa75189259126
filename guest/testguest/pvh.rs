//! What PVH gives: start_info, memory map, command line (FREEBSD.md section 1).

use crate::checks::{Checks, check};
use crate::fail;
use crate::given::{Given, Range, Settings};
use crate::memory;

const MAGIC: u32 = 0x336e_c578;
const MAP_ENTRY_BYTES: u64 = 24;
const MAP_ENTRIES_MAX: u64 = 64;
const COMMAND_LINE_BYTES_MAX: usize = 4096;

pub(crate) fn read(checks: &mut Checks, start_info: u64) -> Given {
    let word = |offset| memory::read_u32(start_info + offset).unwrap_or(0);
    let long = |offset| u64::from(word(offset + 4)) << 32 | u64::from(word(offset));
    let (magic, version) = (word(0), word(4));
    let (command_line_at, map_at, map_entries) = (long(24), long(40), u64::from(word(48)));
    check!(
        checks,
        "pvh.start_info",
        magic == MAGIC && version >= 1 && start_info.is_multiple_of(4),
        "at {start_info:#x}, magic {magic:#x}, version {version}, {} modules",
        word(12)
    );
    let line = copy_command_line(command_line_at);
    check!(
        checks,
        "pvh.cmdline",
        line.is_some(),
        "at {command_line_at:#x}: {}",
        memory::text(line.unwrap_or(b"(none)"))
    );
    let entries = map_entries.min(MAP_ENTRIES_MAX);
    // A loader that puts its data high takes the memory below it away; the arena begins after it.
    let mut free_from = memory::image_end();
    for end in [start_info + 56, map_at + entries * MAP_ENTRY_BYTES] {
        if end > 1 << 20 && end < 1 << 30 {
            free_from = free_from.max(end);
        }
    }
    let mut given = Given::new(Settings::CommandLine(line.unwrap_or_default()), free_from);
    let mut room = map_entries <= MAP_ENTRIES_MAX;
    for index in 0..entries {
        let at = |offset| memory::read_u32(map_at + index * MAP_ENTRY_BYTES + offset).unwrap_or(0);
        let wide = |offset| u64::from(at(offset + 4)) << 32 | u64::from(at(offset));
        room &= given.add(Range { start: wide(0), bytes: wide(8), kind: at(16) });
    }
    let covers = given.is_ram(0x20_0000, free_from);
    check!(
        checks,
        "pvh.memmap",
        room && covers && map_entries > 1,
        "at {map_at:#x}, {map_entries} entries, covers the image {covers}"
    );
    if given.ram_bytes() == 0 {
        fail(format_args!("no RAM in the memory map"));
    }
    given
}

/// A copy, because the loader's own may lie where the arena or another CPU's start page will.
fn copy_command_line(at: u64) -> Option<&'static [u8]> {
    static mut COPY: [u8; COMMAND_LINE_BYTES_MAX] = [0; COMMAND_LINE_BYTES_MAX];
    let line = memory::c_string(at, COMMAND_LINE_BYTES_MAX as u64)?;
    // SAFETY: called once, by the only CPU that runs.
    let copy = unsafe { &mut *(&raw mut COPY) };
    let copy = copy.get_mut(..line.len())?;
    copy.copy_from_slice(line);
    Some(copy)
}
