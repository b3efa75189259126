//! What belongs to the machine as a whole.

use serde::{Deserialize, Serialize};

/// The machine's shape and its clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    pub vcpus: u8,
    pub memory: Vec<RegionState>,
    /// kvmclock's nanoseconds (KVM_GET_CLOCK).
    pub clock_ns: u64,
    /// The virtio-mmio slots in use, from the first: each device's name.
    pub devices: Vec<String>,
}

/// One region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    pub guest_address: u64,
    pub bytes: u64,
    /// Where it starts in the memory file.
    pub file_offset: u64,
}
