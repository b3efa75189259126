//! Page tables for kernels that are entered in long mode.
//!
//! Touches guest memory only in [`TABLES_START`]..[`TABLES_END`]: below 1 MiB, so that no kernel allocates over the
//! tables before it has its own. Facts: FREEBSD.md section 2.2 and FreeBSD's amd64 `machdep.c` (`amd64_loadaddr` walks
//! CR3 by identity address and wants 2 MiB pages); Linux's `Documentation/arch/x86/boot.rst` (64-bit entry wants
//! kernel, zero page and command line identity-mapped).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::vmm::memory::GuestMemory;

/// The top table's page; the lower tables follow.
pub const TABLES_START: u64 = 0x2000;
/// End of the pages that either layout uses.
pub const TABLES_END: u64 = TABLES_START + 6 * PAGE_BYTES;
/// Physical memory reached through [`write_loader_tables`]: 1 GiB, at every gigabyte of the address space.
pub const LOADER_MAPPED_BYTES: u64 = 1 << 30;

const PAGE_BYTES: u64 = 0x1000;
const ENTRIES: u64 = 512;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const PRESENT_WRITE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

fn write_page(memory: &GuestMemory, at: u64, entry: impl Fn(u64) -> u64) -> Result<(), GuestMemoryError> {
    let mut page = [0u8; PAGE_BYTES as usize];
    for (i, bytes) in page.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&entry(i as u64).to_le_bytes());
    }
    memory.write_slice(&page, GuestAddress(at))
}

/// FreeBSD's loader layout: every entry of the two upper tables leads to one table that maps physical 0..1 GiB
/// with 2 MiB pages, so the identity window and the kernel's window (KERNBASE) both work. Returns CR3.
pub fn write_loader_tables(memory: &GuestMemory) -> Result<u64, GuestMemoryError> {
    let (top, middle, low) = (TABLES_START, TABLES_START + PAGE_BYTES, TABLES_START + 2 * PAGE_BYTES);
    write_page(memory, top, |_| middle | PRESENT_WRITE)?;
    write_page(memory, middle, |_| low | PRESENT_WRITE)?;
    write_page(memory, low, |i| (i * LARGE_PAGE_BYTES) | PRESENT_WRITE | LARGE)?;
    Ok(top)
}

/// Identity map of the first 4 GiB with 2 MiB pages, for Linux. Returns CR3.
pub fn write_identity_tables(memory: &GuestMemory) -> Result<u64, GuestMemoryError> {
    let (top, middle, low) = (TABLES_START, TABLES_START + PAGE_BYTES, TABLES_START + 2 * PAGE_BYTES);
    write_page(memory, top, |i| if i == 0 { middle | PRESENT_WRITE } else { 0 })?;
    write_page(memory, middle, |i| if i < 4 { (low + i * PAGE_BYTES) | PRESENT_WRITE } else { 0 })?;
    for table in 0..4 {
        let first = table * ENTRIES;
        write_page(memory, low + table * PAGE_BYTES, |i| {
            ((first + i) * LARGE_PAGE_BYTES) | PRESENT_WRITE | LARGE
        })?;
    }
    Ok(top)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory")
    }

    /// Walks the tables as the CPU does.
    fn translate(memory: &GuestMemory, cr3: u64, address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u32| {
            let e: u64 =
                memory.read_obj(GuestAddress(table + (address >> shift & 0x1ff) * 8)).expect("table in RAM");
            (e & 1 == 1).then_some(e)
        };
        let mask = 0x000f_ffff_ffff_f000;
        let pdpt = entry(cr3, 39)? & mask;
        let pd = entry(pdpt, 30)? & mask;
        let large = entry(pd, 21)?;
        assert_eq!(large & LARGE, LARGE);
        Some((large & mask & !(LARGE_PAGE_BYTES - 1)) + (address & (LARGE_PAGE_BYTES - 1)))
    }

    #[test]
    fn loader_tables_give_identity_and_kernel_window() {
        let memory = memory();
        let cr3 = write_loader_tables(&memory).expect("fits");
        for physical in [0u64, 0x472, 0x20_0000, 0x3fff_ffff] {
            assert_eq!(translate(&memory, cr3, physical), Some(physical));
            assert_eq!(translate(&memory, cr3, 0xffff_ffff_8000_0000 + physical), Some(physical));
        }
    }

    #[test]
    fn identity_tables_reach_4_gib_and_no_further() {
        let memory = memory();
        let cr3 = write_identity_tables(&memory).expect("fits");
        for physical in [0u64, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
            assert_eq!(translate(&memory, cr3, physical), Some(physical));
        }
        assert_eq!(translate(&memory, cr3, 1 << 32), None);
    }
}
