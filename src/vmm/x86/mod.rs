//! What is particular to the x86-64 machine: CPUID, interrupt tables, page tables and descriptors for the boot CPU.
//!
//! Pure functions over guest memory and plain `kvm_bindings` structs; no KVM handle is used in this room.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod cpuid;
pub mod features;
pub mod gdt;
pub mod mptable;
pub mod paging;
