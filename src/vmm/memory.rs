//! Guest memory: where it lies for the guest, and how it is mapped here.
//!
//! Guest-physical layout (FREEBSD.md section 11): RAM from 0 up to [`LOW_MEMORY_END`], a hole for devices below
//! 4 GiB, the rest of RAM from [`HIGH_MEMORY_START`]. In files the regions lie one after the other, each at a
//! multiple of 2 MiB, so that guest, host and file addresses agree modulo 2 MiB and huge pages can serve all three.

use vm_memory::GuestMemoryMmap;

/// Guest memory as devices and boot code see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// End of the RAM below the hole: 3 GiB.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Start of the RAM above the hole: 4 GiB.
pub const HIGH_MEMORY_START: u64 = 0x1_0000_0000;
/// First virtio-mmio window; device `n` has [`VIRTIO_MMIO_BYTES`] from `VIRTIO_MMIO_START + n * VIRTIO_MMIO_BYTES`.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
