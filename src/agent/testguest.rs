//! The embedded test guest: a kernel file that is part of the program, for machines without a FreeBSD at hand.
//!
//! Built from `guest/testguest` by `build/testguest.rs`. It looks like a FreeBSD kernel (ELF OSABI 9, text at KERNBASE +
//! 2 MiB) with a PVH note, so both boot protocols take it. It needs 16 MiB of memory and works from 32 MiB up.

/// The ELF file.
pub const TEST_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/testguest.elf"));
/// Port that the guest writes [`READY_VALUE`] or [`FAILED_VALUE`] to.
pub const STATUS_PORT: u16 = 0xf4;
/// Written when it is ready, right before HELLO.
pub const READY_VALUE: u8 = 0x52;
/// Written when a check, a driver or the guest itself failed; the last console line says why. A reset follows.
pub const FAILED_VALUE: u8 = 0xee;
/// Begins the console line that it prints when it is ready.
pub const READY_LINE: &str = "COLDSPARK-READY";
/// Begins the console line that it prints when it failed.
pub const FAILED_LINE: &str = "COLDSPARK-FAILED";

#[cfg(test)]
mod tests {
    use super::TEST_GUEST;

    fn number<const N: usize>(at: usize) -> u64 {
        TEST_GUEST[at..at + N].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    #[test]
    fn it_looks_like_a_freebsd_kernel_with_a_pvh_note() {
        assert_eq!(TEST_GUEST[..4], *b"\x7fELF");
        assert_eq!(TEST_GUEST[7], 9, "OSABI");
        assert_eq!(number::<8>(24), 0xffff_ffff_8020_0000, "entry");
        let (headers, count) = (number::<8>(32) as usize, number::<2>(56) as usize);
        let mut lowest = u64::MAX;
        let mut pvh_entry = 0;
        for header in (0..count).map(|index| headers + index * 56) {
            let [offset, window, physical] = [8, 16, 24].map(|at| number::<8>(header + at));
            assert_eq!(window, physical + 0xffff_ffff_8000_0000, "linked like a kernel");
            let offset = offset as usize;
            match number::<4>(header) {
                1 => lowest = lowest.min(physical),
                4 => {
                    assert_eq!(TEST_GUEST[offset + 12..offset + 16], *b"Xen\0");
                    assert_eq!(number::<4>(offset + 8), 18, "PHYS32_ENTRY");
                    pvh_entry = number::<8>(offset + 16);
                }
                _ => {}
            }
        }
        assert_eq!(lowest, 0x20_0000);
        assert!((0x20_0000..0x40_0000).contains(&pvh_entry), "{pvh_entry:#x}");
    }
}
