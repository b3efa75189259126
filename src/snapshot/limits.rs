//! The most of everything that stored data may claim. What is read from disk is hostile until it was held
//! against these; what is written is held against them too, so that nothing unreadable is ever published.

/// Size of a page of guest memory, and the grain of `memory.img`.
pub const PAGE_BYTES: u64 = 4096;
/// Alignment of regions that we lay out ourselves: huge pages can then serve guest, host and file alike.
pub const HUGE_BYTES: u64 = 2 << 20;
/// Size of a disk sector.
pub const SECTOR_BYTES: u64 = 512;

/// Most vCPUs of a VM.
pub const VCPUS_MAX: u8 = 32;
/// Most regions of guest memory.
pub const REGIONS_MAX: usize = 8;
/// Most guest memory: 1 TiB.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Most disks of a VM.
pub const DISKS_MAX: usize = 8;
/// Most network interfaces.
pub const NETWORKS_MAX: usize = 4;
/// Most layers under a disk, the base not counted.
pub const LAYERS_MAX: usize = 16;
/// Largest disk: 8 TiB.
pub const DISK_BYTES_MAX: u64 = 8 << 40;
/// Largest file of a disk: all of it in a layer, and the layer's own tables.
pub const DISK_FILE_BYTES_MAX: u64 = DISK_BYTES_MAX + (DISK_BYTES_MAX >> 8);
/// Longest serial of a disk (virtio-blk GET_ID).
pub const SERIAL_BYTES_MAX: usize = 20;
/// Largest machine state file: what the codec is ready to decode.
pub const STATE_BYTES_MAX: u64 = super::codec::DECODE_BYTES_MAX as u64;
/// Largest kernel file.
pub const KERNEL_BYTES_MAX: u64 = 512 << 20;
/// Largest module file (memory disk or initial RAM disk).
pub const MODULE_BYTES_MAX: u64 = 16 << 30;

/// Largest `manifest.json` and `settings.json`.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Longest name of a snapshot or an image.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest file name inside a snapshot.
pub const FILE_NAME_BYTES_MAX: usize = 100;
/// Most labels.
pub const LABELS_MAX: usize = 64;
/// Longest label key, label value and other short text.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Longest kernel command line or environment.
pub const COMMAND_LINE_BYTES_MAX: usize = 16 << 10;
/// Longest console pattern that tells readiness.
pub const PATTERN_BYTES_MAX: usize = 256;
/// Most CPU features, KVM capabilities or devices listed.
pub const LIST_MAX: usize = 1024;
/// Most snapshots, or images, in one store.
pub const ENTRIES_MAX: usize = 16384;
