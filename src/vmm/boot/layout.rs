//! Where things lie below 1 MiB, and the map of memory that every protocol tells the guest.
//!
//! The first 640 KiB are RAM to the guest, yet nothing that we put there is overwritten before it was read: kernels
//! copy start information and switch to tables of their own before their allocators run. Facts: FREEBSD.md sections
//! 1.4, 2.2, 2.5 and 11.
//!
//! | address | what |
//! |---|---|
//! | 0x40e, 0x413, 0x472 | BIOS data area words (written by `mptable`; 0x472 by FreeBSD itself) |
//! | 0x1000 | descriptor table (`x86::gdt`) |
//! | 0x2000..0x8000 | page tables (`x86::paging`) |
//! | 0x8000..0x9000 | entry stack (FreeBSD native) |
//! | 0xa000 | PVH start information, module list, memory map |
//! | 0xb000 | Linux zero page |
//! | 0x20000..0x30000 | command line |
//! | 0x9fc00..0xa0000 | reserved: interrupt table (`x86::mptable`) |
//! | 0xe0000..0x100000 | reserved: ACPI tables (`x86::acpi`) |

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::BootError;
use crate::vmm::memory::{GuestMemory, LOW_MEMORY_END};
use crate::vmm::x86::mptable::TABLE_START;

/// Top of the page for the entry stack.
pub const STACK_TOP: u64 = 0x9000;
pub const PVH_INFO_START: u64 = 0xa000;
pub const ZERO_PAGE_START: u64 = 0xb000;
pub const COMMAND_LINE_START: u64 = 0x2_0000;
/// Room for the command line with its NUL.
pub const COMMAND_LINE_BYTES_MAX: u64 = 0x1_0000;
/// No part of a kernel or module may lie below.
pub const KERNEL_START_MIN: u64 = 0x10_0000;

const MIB: u64 = 1 << 20;
pub const PAGE_BYTES: u64 = 0x1000;

/// RAM, as in E820, SMAP and PVH's memory map.
pub const KIND_RAM: u32 = 1;
/// Not to be touched.
pub const KIND_RESERVED: u32 = 2;

/// One line of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    pub start: u64,
    pub bytes: u64,
    pub kind: u32,
}

/// The memory map, ascending and without overlaps.
pub fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let mut map = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapEntry { start, bytes: end - start, kind });
        }
    };
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        add(start, end.min(TABLE_START), KIND_RAM);
        add(start.max(TABLE_START), end.min(KERNEL_START_MIN), KIND_RESERVED);
        add(start.max(KERNEL_START_MIN), end, KIND_RAM);
    }
    map
}

/// End of the RAM that begins at 0 (at most the start of the hole below 4 GiB).
pub fn low_memory_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .find(|region| region.start_addr().raw_value() == 0)
        .map_or(0, |region| region.len().min(LOW_MEMORY_END))
}

/// Checks that `start..end` is RAM above 1 MiB; `what` goes into the error.
pub fn need_ram(memory: &GuestMemory, what: &str, start: u64, end: u64) -> Result<(), BootError> {
    if start < KERNEL_START_MIN || start > end {
        return Err(BootError::BadElf(format!(
            "{what} wants the physical range {start:#x}..{end:#x}; kernels are loaded at 1 MiB or above"
        )));
    }
    if end > LOW_MEMORY_END {
        let limit = "a kernel and its modules must lie below 3 GiB, where the device hole begins";
        return Err(BootError::TooLarge { what: what.to_owned(), end, limit });
    }
    if end > low_memory_end(memory) {
        return Err(BootError::MemoryTooSmall { what: what.to_owned(), needed_mib: end.div_ceil(MIB) });
    }
    Ok(())
}

/// Writes `bytes` at `address`.
pub fn put(memory: &GuestMemory, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(BootError::memory(what, address))
}

/// `address` rounded up to a page, saturating (a saturated address never fits).
pub fn page_up(address: u64) -> u64 {
    address.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(ranges: &[(u64, u64)]) -> GuestMemory {
        let ranges: Vec<_> =
            ranges.iter().map(|(start, bytes)| (GuestAddress(*start), *bytes as usize)).collect();
        GuestMemory::from_ranges(&ranges).expect("memory")
    }

    #[test]
    fn map_has_the_low_reserved_part_and_the_high_region() {
        let entry = |start, bytes, kind| MapEntry { start, bytes, kind };
        assert_eq!(
            memory_map(&ranges(&[(0, 16 << 20), (1 << 32, 2 << 20)])),
            [
                entry(0, 0x9fc00, KIND_RAM),
                entry(0x9fc00, 0x60400, KIND_RESERVED),
                entry(0x10_0000, 15 << 20, KIND_RAM),
                entry(1 << 32, 2 << 20, KIND_RAM),
            ]
        );
    }

    #[test]
    fn ram_checks_say_what_to_do() {
        let memory = ranges(&[(0, 16 << 20)]);
        assert!(need_ram(&memory, "kernel", 0x20_0000, 16 << 20).is_ok());
        let error = need_ram(&memory, "kernel", 0x20_0000, (16 << 20) + 1).expect_err("too large");
        assert!(error.to_string().contains("17 MiB"), "{error}");
        assert!(matches!(need_ram(&memory, "kernel", 0x8000, 0x9000), Err(BootError::BadElf(_))));
        assert!(matches!(need_ram(&memory, "kernel", 1 << 20, u64::MAX), Err(BootError::TooLarge { .. })));
    }
}
