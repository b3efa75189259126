//! Putting a kernel into guest memory and saying where the boot CPU starts.
//!
//! [`load`] looks into the kernel file and the disks, chooses the protocol, the root file system and the console, and writes
//! everything the kernel expects to find. It reads files and disks and writes guest memory; it holds no KVM handle. All
//! files are hostile. Each choice is told as a line, and the caller's command line overrides it.
//!
//! | file | what |
//! |---|---|
//! | `choose` | what kind of kernel a file is, and which protocol and machine go with it |
//! | `elf` | reader and loader of ELF kernels |
//! | `freebsd`, `pvh`, `linux` | one entry protocol each |
//! | `disk` | where a FreeBSD root file system is |
//! | `reader` | files without a shared position |
//! | `words` | command lines and FreeBSD's kernel environment |
//! | `layout` | what lies where below 1 MiB, and the memory map |

mod choose;
mod disk;
mod elf;
mod error;
mod freebsd;
mod layout;
mod linux;
mod pvh;
mod reader;
mod words;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use kvm_bindings::{kvm_regs, kvm_sregs};

pub use crate::media::ReadAt;
pub use error::BootError;

use crate::vmm::chipset::AgentPort;
use crate::vmm::memory::GuestMemory;
use crate::vmm::x86::acpi::AcpiError;
use crate::vmm::x86::gdt::{self, Mode};
use crate::vmm::x86::{acpi, mptable};
use choose::Kernel;

/// How the guest is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    /// Look into the kernel file and choose.
    Auto,
    /// FreeBSD's own 64-bit loader protocol.
    FreeBsd,
    /// PVH: 32-bit entry from the ELF note.
    Pvh,
    /// Linux's bzImage, 64-bit entry.
    Linux,
}

/// The kind of machine asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareWish {
    /// Look into the kernel file for the drivers it has.
    Auto,
    Microvm,
    Pc,
}

/// The kind of machine: what the guest's hardware is described by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hardware {
    /// virtio-mmio devices; MPTable, kernel environment and (Linux) the smallest ACPI.
    Microvm,
    /// PCI with virtio functions, ACPI with its fixed hardware: for unmodified kernels.
    Pc {
        /// The functions have the legacy interface, too.
        transitional: bool,
    },
}

/// What the optional module file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// A memory disk (FreeBSD `md_image`).
    MemoryDisk,
    /// A Linux initial RAM disk.
    Initrd,
}

/// A disk, in the order in which the guest finds it (the first is FreeBSD's vtbd0).
#[derive(Clone, Copy)]
pub struct DiskView<'a> {
    pub content: &'a dyn ReadAt,
    pub bytes: u64,
    pub read_only: bool,
}

/// A virtio-mmio device's window and interrupt line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    pub base: u64,
    pub bytes: u64,
    /// I/O APIC pin, told to the guest as ISA interrupt of the same number: 1, or 3 to 23.
    pub irq: u8,
}

impl MmioSlot {
    /// `<size>@<base>:<irq>`, as FreeBSD and Linux read it from `virtio_mmio.device=`.
    fn to_words(self) -> String {
        format!("{:#x}@{:#x}:{}", self.bytes, self.base, self.irq)
    }
}

/// A machine to be cold-booted. Its memory must be fresh (zero).
pub struct BootInput<'a> {
    pub memory: &'a GuestMemory,
    pub kernel: &'a File,
    pub module: Option<(ModuleKind, &'a File)>,
    pub protocol: BootProtocol,
    /// As [`hardware`] found it.
    pub hardware: Hardware,
    /// Added after what is chosen here, so it wins. FreeBSD: `name=value` words and flags such as `-s`. Linux: as it is.
    pub command_line: &'a str,
    pub vcpus: u8,
    pub disks: &'a [DiskView<'a>],
    /// The block devices first, in the order of `disks`. None on a [`Hardware::Pc`].
    pub mmio: &'a [MmioSlot],
    pub agent_port: AgentPort,
}

/// A machine ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The protocol used (never `Auto`).
    pub protocol: BootProtocol,
    /// One line for each choice made by looking into kernel and disks.
    pub choices: Vec<String>,
    pub entry: Entry,
}

/// Registers of the boot CPU; the others wait for their start-up interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    mode: Mode,
    rip: u64,
    rsp: u64,
    rbx: u64,
    rsi: u64,
}

impl Entry {
    /// Sets all general registers, and the special ones that the entry needs; `sregs` come from the fresh vCPU.
    pub fn apply(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        *regs = kvm_regs {
            rip: self.rip,
            rsp: self.rsp,
            rbx: self.rbx,
            rsi: self.rsi,
            rflags: 0x2, // The bit that is always set; interrupts off.
            ..Default::default()
        };
        gdt::apply(self.mode, sregs);
    }

    /// Address of the first instruction.
    pub fn rip(&self) -> u64 {
        self.rip
    }
}

/// Loads the machine into its memory: kernel, module, command line, tables.
///
/// # Errors
/// Every fault of the kernel file, the module, the command line and the size of memory, each with what to do.
/// Nothing is to be run after an error: guest memory may be half written.
pub fn load(input: &BootInput) -> Result<Loaded, BootError> {
    let kernel = choose::identify(input.kernel)?;
    let protocol = choose::protocol(&kernel, input.protocol)?;
    let mut choices = vec![choose::describe(&kernel, protocol, input.protocol)];

    let entry = match (&kernel, protocol) {
        (Kernel::Elf(elf), BootProtocol::FreeBsd) => {
            // Found by its mark, where a BIOS would have it.
            freebsd_acpi(input)?;
            let environment = freebsd_environment(input, &mut choices)?;
            freebsd::load(input, elf, &environment)?
        }
        (Kernel::Elf(elf), BootProtocol::Pvh) if elf.freebsd => {
            let environment = freebsd_environment(input, &mut choices)?;
            pvh::load(input, elf, &pvh::freebsd_command_line(&environment)?, freebsd_acpi(input)?)?
        }
        (Kernel::Elf(elf), BootProtocol::Pvh) => {
            pvh::load(input, elf, &linux_line(input, &mut choices)?, Some(linux_acpi(input)?))?
        }
        (Kernel::BzImage(image), BootProtocol::Linux) => {
            linux::load(input, image, &linux_line(input, &mut choices)?, linux_acpi(input)?)?
        }
        _ => {
            // choose::protocol gives no other pair.
            let reason = "no loader for this pair".to_owned();
            return Err(BootError::Protocol { protocol: choose::name(protocol), reason });
        }
    };
    if input.hardware == Hardware::Microvm {
        let lines: Vec<u8> = input.mmio.iter().map(|slot| slot.irq).collect();
        mptable::write(input.memory, input.vcpus, &lines)?;
    }
    Ok(Loaded { protocol, choices, entry })
}

/// The machine for a kernel, and a line for each choice. FreeBSD's GENERIC has no virtio-mmio and reads no MPTable, its
/// FIRECRACKER has ACPI off: each finds nothing, and says nothing, on the other's machine.
///
/// # Errors
/// Those of reading the kernel file.
pub fn hardware(kernel: &File, wish: HardwareWish) -> Result<(Hardware, Vec<String>), BootError> {
    let identified = choose::identify(kernel)?;
    let drivers = match &identified {
        Kernel::Elf(elf) if elf.freebsd => choose::freebsd_drivers(kernel, elf)?,
        _ => None,
    };
    Ok(choose::hardware(drivers, wish))
}

/// ACPI tables for FreeBSD: on a [`Hardware::Pc`] only. Returns the root pointer's address.
fn freebsd_acpi(input: &BootInput) -> Result<Option<u64>, BootError> {
    match input.hardware {
        Hardware::Microvm => Ok(None),
        Hardware::Pc { .. } => Ok(Some(acpi::write_pc(input.memory, input.vcpus, input.agent_port)?)),
    }
}

fn freebsd_environment(
    input: &BootInput,
    choices: &mut Vec<String>,
) -> Result<words::Environment, BootError> {
    let memory_disk = matches!(input.module, Some((ModuleKind::MemoryDisk, _)));
    let root = if memory_disk {
        choices.push("root: ufs:/dev/md0 (the memory disk)".into());
        Some("ufs:/dev/md0".to_owned())
    } else {
        let found = disk::find_root(input.disks);
        choices.extend(found.choices);
        found.mount_from
    };
    let mut environment =
        freebsd::default_environment(input.hardware, input.agent_port, input.mmio, root.as_deref());
    environment.add_line(input.command_line)?;
    if let Some(given) = environment.get("vfs.root.mountfrom").filter(|given| root.as_deref() != Some(*given))
    {
        choices.push(format!("root: {given} (from the command line)"));
    }
    choices.push(format!("console: {}", environment.get("console").unwrap_or("the kernel's own choice")));
    Ok(environment)
}

/// Linux's command line: console, reset and devices, then the caller's words (of a repeated one, Linux takes the last).
fn linux_line(input: &BootInput, choices: &mut Vec<String>) -> Result<String, BootError> {
    words::check_plain(input.command_line)?;
    let given =
        |prefix: &str| input.command_line.split_ascii_whitespace().any(|word| word.starts_with(prefix));
    let mut words = Vec::new();
    if !given("console=") {
        words.push("console=ttyS0".to_owned());
        choices.push("console: ttyS0".into());
    }
    if !given("reboot=") {
        words.push("reboot=k".to_owned()); // By the keyboard controller: at once, without trying ACPI and EFI.
    }
    if input.hardware == Hardware::Microvm && !given("pci=") {
        words.push("pci=off".to_owned()); // There is no PCI; probing for it is slow and ends in an error line.
    }
    words.extend(input.mmio.iter().map(|slot| format!("virtio_mmio.device={}", slot.to_words())));
    words.extend(Some(input.command_line.trim().to_owned()).filter(|line| !line.is_empty()));
    Ok(words.join(" "))
}

/// ACPI tables for Linux: distributions build it without MPTable and without devices on the command line. Returns the
/// root pointer's address.
fn linux_acpi(input: &BootInput) -> Result<u64, BootError> {
    if input.hardware != Hardware::Microvm {
        return Ok(acpi::write_pc(input.memory, input.vcpus, input.agent_port)?);
    }
    let devices: Vec<_> = input
        .mmio
        .iter()
        .map(|slot| {
            let bytes = u32::try_from(slot.bytes).map_err(|_| AcpiError::Window(slot.base))?;
            Ok(acpi::MmioDevice { address: slot.base, bytes, line: slot.irq.into() })
        })
        .collect::<Result<_, AcpiError>>()?;
    Ok(acpi::write(input.memory, input.vcpus, input.agent_port, &devices)?)
}

/// Size of a file or block device, which must have at least one byte.
fn file_bytes(what: &'static str, mut file: &File) -> Result<u64, BootError> {
    let read = |source| BootError::Read { what, source };
    let metadata = file.metadata().map_err(read)?;
    if metadata.is_dir() {
        return Err(BootError::Read { what, source: io::Error::from(io::ErrorKind::IsADirectory) });
    }
    let bytes =
        if metadata.is_file() { metadata.len() } else { file.seek(SeekFrom::End(0)).map_err(read)? };
    if bytes == 0 {
        return Err(BootError::Empty { what });
    }
    Ok(bytes)
}

/// Where an initrd of `bytes` goes: at the top of low memory, below `limit`, above `after` (the kernel's end).
fn place_initrd(memory: &GuestMemory, bytes: u64, after: u64, limit: u64) -> Result<u64, BootError> {
    let page_down = |address: u64| address & !(layout::PAGE_BYTES - 1);
    let top = page_down(layout::low_memory_end(memory).min(limit));
    top.checked_sub(bytes).map(page_down).filter(|start| *start >= layout::page_up(after)).ok_or_else(|| {
        let needed = layout::page_up(after).saturating_add(layout::page_up(bytes));
        if needed > limit.min(crate::vmm::memory::LOW_MEMORY_END) {
            let limit = "an initrd must lie below 3 GiB and where the kernel can reach it; use a smaller one";
            return BootError::TooLarge { what: "the kernel with its initrd".into(), end: needed, limit };
        }
        BootError::MemoryTooSmall {
            what: "the kernel with its initrd".into(),
            needed_mib: needed.div_ceil(1 << 20),
        }
    })
}

#[cfg(test)]
mod tests;
