//! The machine itself: KVM, memory, vCPUs, chipset, virtio, boot protocols. No policy, no async, no network API.

pub mod boot;
pub mod chipset;
pub mod irq;
pub mod memory;
pub mod virtio;
pub mod x86;
