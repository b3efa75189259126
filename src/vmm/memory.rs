//! Guest memory: where it lies for the guest, and how it is mapped here.
//!
//! Guest-physical layout (FREEBSD.md section 11): RAM from 0 up to [`LOW_MEMORY_END`], a hole for devices below
//! 4 GiB, the rest of RAM from [`HIGH_MEMORY_START`]. In files the regions lie one after the other, each at a
//! multiple of 2 MiB, so that guest, host and file addresses agree modulo 2 MiB and huge pages can serve all three.

#![allow(unsafe_code)]

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::snapshot::state::machine::RegionState;

/// Guest memory as devices and boot code see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// End of the RAM below the hole: 3 GiB.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Start of the RAM above the hole: 4 GiB.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;
/// First virtio-mmio window; device `n` has [`VIRTIO_MMIO_BYTES`] from `VIRTIO_MMIO_START + n * VIRTIO_MMIO_BYTES`.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;

/// Regions in files start at multiples of this.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Least and most memory of a VM.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("{0} bytes of memory: a VM has a multiple of 2 MiB, from 16 MiB to 1 TiB")]
    Size(u64),
    #[error("the memory regions do not fit together: {0}")]
    Regions(String),
}

/// The regions of a VM with `memory_bytes` of RAM.
pub fn layout(memory_bytes: u64) -> Result<Vec<RegionState>, MemoryError> {
    if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&memory_bytes)
        || !memory_bytes.is_multiple_of(HUGE_PAGE_BYTES)
    {
        return Err(MemoryError::Size(memory_bytes));
    }
    let low = memory_bytes.min(LOW_MEMORY_END);
    let mut regions = vec![RegionState { guest_address: 0, bytes: low, file_offset: 0 }];
    if memory_bytes > low {
        regions.push(RegionState {
            guest_address: HIGH_MEMORY_START,
            bytes: memory_bytes - low,
            file_offset: low,
        });
    }
    Ok(regions)
}

/// Refuses regions, of a snapshot perhaps, that are not those of a VM with as much memory.
pub fn check(regions: &[RegionState]) -> Result<(), MemoryError> {
    let total = regions.iter().try_fold(0u64, |sum, r| sum.checked_add(r.bytes));
    let expected = total.ok_or_else(|| MemoryError::Regions("they overflow".into())).and_then(layout)?;
    match regions == expected {
        true => Ok(()),
        false => Err(MemoryError::Regions("they are not where this version puts them".into())),
    }
}

/// Host memory behind one region.
///
/// # Safety
/// `address` must be the start of `bytes` of mapped, writable memory that stays mapped, at the same place, as long as
/// the value lives, and that nothing else in this process refers to.
pub unsafe trait Backing: Send + Sync {
    fn address(&self) -> *mut u8;
    fn bytes(&self) -> u64;
}

/// A VM's RAM.
pub struct Ram {
    memory: GuestMemory,
    regions: Vec<(RegionState, Box<dyn Backing>)>,
}

impl Ram {
    /// RAM of regions and the memory behind each, in ascending order of guest addresses. The regions may come from a
    /// snapshot: they are checked.
    pub fn new(regions: Vec<(RegionState, Box<dyn Backing>)>) -> Result<Self, MemoryError> {
        check(&regions.iter().map(|(region, _)| *region).collect::<Vec<_>>())?;
        let mapped = regions
            .iter()
            .map(|(region, backing)| {
                let bytes = usize::try_from(region.bytes)
                    .map_err(|_| MemoryError::Regions("too large for this host".into()))?;
                if backing.bytes() != region.bytes {
                    return Err(MemoryError::Regions("the host memory has another size".into()));
                }
                // SAFETY: `Backing` promises mapped memory of this length for as long as `regions` lives, which is
                // as long as `memory`: both are fields of the same value, and clones of `memory` stay within the
                // machine that owns it.
                unsafe {
                    MmapRegion::build_raw(
                        backing.address(),
                        bytes,
                        libc::PROT_READ | libc::PROT_WRITE,
                        libc::MAP_PRIVATE | libc::MAP_NORESERVE,
                    )
                }
                .map_err(|e| MemoryError::Regions(e.to_string()))
                .and_then(|mmap| {
                    GuestRegionMmap::new(mmap, GuestAddress(region.guest_address))
                        .ok_or_else(|| MemoryError::Regions("they overflow".into()))
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let memory =
            GuestMemoryMmap::from_regions(mapped).map_err(|e| MemoryError::Regions(e.to_string()))?;
        Ok(Ram { memory, regions })
    }

    /// For devices and boot code.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Each region and its host address.
    pub fn regions(&self) -> impl Iterator<Item = (RegionState, *mut u8)> + '_ {
        self.regions.iter().map(|(region, backing)| (*region, backing.address()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lies_on_both_sides_of_the_hole() {
        assert_eq!(layout(512 << 20).unwrap().len(), 1);
        let both = layout(5 << 30).unwrap();
        assert_eq!(both[0].bytes, 3 << 30);
        assert_eq!(both[1], RegionState { guest_address: 4 << 30, bytes: 2 << 30, file_offset: 3 << 30 });
        assert!(layout((512 << 20) + 4096).is_err());
        assert!(layout(0).is_err());
        assert!(layout(u64::MAX).is_err());
    }
}
