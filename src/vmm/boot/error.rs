//! What can be wrong with a kernel file, a command line or the size of memory, told so that a person can act on it.

use std::io;

use crate::vmm::x86::acpi::AcpiError;
use crate::vmm::x86::mptable::MpTableError;

/// Why a machine cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot read the {what}: {source}")]
    Read { what: &'static str, source: io::Error },
    #[error("the {what} file is empty")]
    Empty { what: &'static str },
    #[error("the kernel file is not a kernel: {0}")]
    NotAKernel(String),
    #[error("the kernel file is compressed with {0}: decompress it first")]
    Compressed(&'static str),
    #[error("the file is truncated: {part} reaches to byte {needed}, the file has {bytes}; copy it again")]
    Truncated { part: String, needed: u64, bytes: u64 },
    #[error("the kernel's ELF file is damaged: {0}")]
    BadElf(String),
    #[error("the bzImage is damaged or too old: {0}")]
    BadBzImage(String),
    #[error("boot protocol {protocol} does not go with this kernel: {reason}")]
    Protocol { protocol: &'static str, reason: String },
    #[error(
        "memory is too small: {what} needs RAM up to {needed_mib} MiB; give the VM at least that much memory"
    )]
    MemoryTooSmall { what: String, needed_mib: u64 },
    #[error("{what} does not fit: it would reach to {end:#x}, and {limit}")]
    TooLarge { what: String, end: u64, limit: &'static str },
    #[error("guest memory at {address:#x} cannot be written for the {what}: {source}")]
    Memory { what: &'static str, address: u64, source: vm_memory::GuestMemoryError },
    #[error("command line: {0}")]
    CommandLine(String),
    #[error("module: {0}")]
    Module(String),
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
}

impl BootError {
    /// For `map_err` on a write to guest memory.
    pub(super) fn memory(
        what: &'static str,
        address: u64,
    ) -> impl FnOnce(vm_memory::GuestMemoryError) -> BootError {
        move |source| BootError::Memory { what, address, source }
    }
}
