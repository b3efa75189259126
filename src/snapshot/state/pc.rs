//! Saved state of what only the machine kind with ACPI and PCI has.

use serde::{Deserialize, Serialize};

/// Host bridge and power block. That a state file has this section says that the machine is of that kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcState {
    /// The virtio functions have the legacy interface, too.
    pub transitional: bool,
    /// The register of port 0xcf8.
    pub config_address: u32,
    /// The host bridge's 256 configuration bytes.
    pub bridge: Vec<u8>,
    pub power: PowerState,
}

/// ACPI's fixed hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerState {
    pub status: u16,
    pub enable: u16,
    pub control: u16,
    /// The PM timer's count.
    pub timer_ticks: u32,
}

/// ACPI's general-purpose events. A section of its own: snapshots of machines without them do not have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventState {
    pub status: u8,
    pub enable: u8,
}

/// The PCI half of a virtio function; the rest is its `TransportState`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// Its 256 configuration bytes.
    pub config: Vec<u8>,
    /// Its driver came by the legacy interface.
    pub legacy: bool,
    /// Entry of the vector table for configuration changes, and for each queue; 0xffff: none.
    pub config_vector: u16,
    pub queue_vectors: Vec<u16>,
    pub vectors: Vec<VectorState>,
    /// Vectors that were raised while they were masked; bit = number.
    pub pending: u64,
}

/// One entry of an MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    pub address: u64,
    pub data: u32,
    /// Bit 0: masked.
    pub control: u32,
}
