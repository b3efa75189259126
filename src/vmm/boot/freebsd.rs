//! FreeBSD's own 64-bit loader protocol: any amd64 kernel of 12.x to 15.x, with no firmware and no loader program.
//!
//! Writes guest memory: kernel, optional memory disk, metadata records, environment, page tables, stack. Facts: FREEBSD.md
//! section 2; FreeBSD's `sys/amd64/amd64/locore.S` (stack at entry), `machdep.c` (`hammer_time`, `amd64_loadaddr`,
//! `native_parse_memmap`), `sys/kern/subr_module.c` (how records are walked), `stand/i386/libi386/bootinfo64.c` (their
//! order and padding), `sys/sys/linker.h` and `sys/x86/include/metadata.h` (their numbers).
//!
//! From the kernel's start upwards, each page-aligned: segments, memory disk, metadata, environment, `kernend`. All addresses in
//! records are offsets from KERNBASE, which with the kernel at its link address are physical addresses.

use super::elf::{self, Addressing, Elf, KERNBASE};
use super::error::BootError;
use super::layout::{self, MapEntry, STACK_TOP};
use super::words::Environment;
use super::{BootInput, Entry, Hardware, MmioSlot, ModuleKind};
use crate::vmm::chipset::AgentPort;
use crate::vmm::random;
use crate::vmm::x86::gdt::{self, Mode};
use crate::vmm::x86::paging;

const NAME: u32 = 0x1;
const TYPE: u32 = 0x2;
const ADDR: u32 = 0x3;
const SIZE: u32 = 0x4;
const METADATA: u32 = 0x8000;
const ENVP: u32 = METADATA | 0x6;
const HOWTO: u32 = METADATA | 0x7;
const KERNEND: u32 = METADATA | 0x8;
const SMAP: u32 = METADATA | 0x1001;
const MODULEP: u32 = METADATA | 0x1006;

/// Seed for FreeBSD's random number generator, of the size that its own boot scripts keep in /boot/entropy. A kernel without
/// RDRAND and without it would wait long for its first random number.
const ENTROPY_BYTES: usize = 4096;
/// RAM needed beyond `kernend`: kernels from 14 add their load address (2 MiB) to it once more, and then take their first
/// stack, per-CPU area and page tables from there.
const EARLY_BYTES: u64 = 4 << 20;

/// The variables that make a kernel find this machine's devices, and spare it waiting for those that are not there.
pub fn default_environment(
    hardware: Hardware,
    agent_port: AgentPort,
    mmio: &[MmioSlot],
    root: Option<&str>,
) -> Environment {
    let mut environment = Environment::default();
    for (name, value) in [
        ("kernelname", "/boot/kernel/kernel"),
        ("console", "comconsole"),
        ("boot_serial", "YES"),
        // The ISA devices there are: nothing else tells of them without ACPI and a loader's device.hints.
        ("hint.uart.0.at", "isa"),
        ("hint.uart.0.port", "0x3F8"),
        ("hint.uart.0.irq", "4"),
        ("hint.uart.0.flags", "0x10"),
        ("hint.uart.0.baud", "115200"), // Waits between looks at the transmitter shrink with it.
        ("hint.atrtc.0.at", "isa"),
        ("hint.atrtc.0.port", "0x70"),
        ("hint.atrtc.0.irq", "8"),
        ("hint.attimer.0.at", "isa"),
        ("hint.attimer.0.port", "0x40"),
        ("hint.attimer.0.irq", "0"),
        // Those there are not: each probe of an absent one is many exits, or a wait.
        ("hint.uart.2.disabled", "1"),
        ("hint.uart.3.disabled", "1"),
        ("hint.atkbdc.0.disabled", "1"),
        ("hint.atkbd.0.disabled", "1"),
        ("hint.psm.0.disabled", "1"),
        // "Power off" waits this long for hardware that would do it.
        ("kern.shutdown.poweroff_delay", "0"),
    ] {
        environment.set(name, value);
    }
    let second: &[(&str, &str)] = match agent_port {
        AgentPort::Virtio => &[("hint.uart.1.disabled", "1")],
        // The last tells the agent's start script.
        AgentPort::Serial => &[
            ("hint.uart.1.at", "isa"),
            ("hint.uart.1.port", "0x2F8"),
            ("hint.uart.1.irq", "3"),
            ("hint.uart.1.baud", "115200"),
            ("coldspark.agent_port", "/dev/cuau1"),
        ],
    };
    for (name, value) in second {
        environment.set(*name, *value);
    }
    if hardware == Hardware::Microvm {
        environment.set("hint.acpi.0.disabled", "1");
        environment.set("hint.pcib.0.disabled", "1");
    }
    for (i, slot) in mmio.iter().enumerate() {
        let name = if i == 0 { "virtio_mmio.device".to_owned() } else { format!("virtio_mmio.device_{i}") };
        environment.set(name, slot.to_words());
    }
    if let Some(root) = root {
        environment.set("vfs.root.mountfrom", root);
    }
    environment
}

/// Loads kernel, module and all that goes with them. `environment` is complete.
pub fn load(input: &BootInput, elf: &Elf, environment: &Environment) -> Result<Entry, BootError> {
    let memory = input.memory;
    environment.check()?;
    let kernel = elf.range(Addressing::Window)?;
    if !elf.entry.checked_sub(KERNBASE).is_some_and(|at| elf.covers(Addressing::Window, at)) {
        return Err(BootError::BadElf(format!("its entry {:#x} is outside its own segments", elf.entry)));
    }
    // A wrong machine is told before anything large is read.
    need_mapped(input, "the kernel", kernel.start, kernel.end)?;

    let mut files = vec![Preloaded {
        name: "kernel",
        kind: "elf kernel",
        start: kernel.start,
        bytes: kernel.end - kernel.start,
    }];
    let mut next = layout::page_up(kernel.end);
    let disk = memory_disk(input)?;
    if let Some((_, bytes)) = disk {
        let end = next.saturating_add(bytes);
        need_mapped(input, "the kernel with its memory disk", next, end)?;
        files.push(Preloaded { name: "mfsroot", kind: "md_image", start: next, bytes });
        next = layout::page_up(end);
    }

    let entropy_start = next;
    files.push(Preloaded {
        name: "/boot/entropy",
        kind: "boot_entropy_cache",
        start: entropy_start,
        bytes: ENTROPY_BYTES as u64,
    });
    next = layout::page_up(next.saturating_add(ENTROPY_BYTES as u64));

    let map = layout::memory_map(memory);
    let environment_bytes = environment.to_bytes();
    let metadata_start = next;
    let mut tail = Tail { howto: environment.howto(), envp: 0, kernend: 0, modulep: metadata_start };
    // The records' size does not depend on the numbers in them.
    let envp = layout::page_up(metadata_start.saturating_add(metadata(&files, &tail, &map).len() as u64));
    let kernend = layout::page_up(envp.saturating_add(environment_bytes.len() as u64));
    (tail.envp, tail.kernend) = (envp, kernend);
    let what = "the kernel with its modules and first allocations";
    need_mapped(input, what, kernel.start, kernend.saturating_add(EARLY_BYTES))?;

    elf.load(memory, input.kernel, Addressing::Window)?;
    if let (Some((file, bytes)), Some(placed)) = (disk, files.get(1)) {
        elf::stream(memory, "memory disk", file, 0, placed.start, bytes)?;
    }
    layout::put(memory, "random seed", entropy_start, &random_bytes()?)?;
    layout::put(memory, "loader metadata", metadata_start, &metadata(&files, &tail, &map))?;
    layout::put(memory, "kernel environment", envp, &environment_bytes)?;

    // 0(%rsp): return address, 4(%rsp): modulep, 8(%rsp): kernend; the kernel also pushes 8 bytes below.
    let stack = STACK_TOP - 16;
    let mut words = [0u8; 12];
    words[4..8].copy_from_slice(&low_word(metadata_start)?);
    words[8..12].copy_from_slice(&low_word(kernend)?);
    layout::put(memory, "entry stack", stack, &words)?;

    let page_table = paging::write_loader_tables(memory)
        .map_err(BootError::memory("page tables", paging::TABLES_START))?;
    let mode = Mode::Long { page_table };
    gdt::write(memory, mode).map_err(BootError::memory("descriptor table", gdt::GDT_START))?;
    Ok(Entry { mode, rip: elf.entry, rsp: stack, rbx: 0, rsi: 0 })
}

fn memory_disk<'a>(input: &BootInput<'a>) -> Result<Option<(&'a std::fs::File, u64)>, BootError> {
    match input.module {
        None => Ok(None),
        Some((ModuleKind::Initrd, _)) => Err(BootError::Module(
            "an initrd is for Linux; give FreeBSD a memory disk (a file system image)".into(),
        )),
        Some((ModuleKind::MemoryDisk, file)) => {
            let bytes = super::file_bytes("memory disk", file)?;
            Ok(Some((file, bytes)))
        }
    }
}

fn random_bytes() -> Result<[u8; ENTROPY_BYTES], BootError> {
    let mut bytes = [0u8; ENTROPY_BYTES];
    random::fill(&mut bytes).map_err(|source| BootError::Read { what: "host's random numbers", source })?;
    Ok(bytes)
}

/// Both RAM and within the gigabyte that the entry page tables reach.
fn need_mapped(input: &BootInput, what: &str, start: u64, end: u64) -> Result<(), BootError> {
    if end > paging::LOADER_MAPPED_BYTES {
        let limit =
            "FreeBSD's loader protocol keeps kernel and modules in the first GiB; use a smaller memory disk";
        return Err(BootError::TooLarge { what: what.to_owned(), end, limit });
    }
    layout::need_ram(input.memory, what, start, end)
}

fn low_word(address: u64) -> Result<[u8; 4], BootError> {
    let limit = "the loader protocol passes 32-bit addresses";
    u32::try_from(address).map(u32::to_le_bytes).map_err(|_| BootError::TooLarge {
        what: "the kernel".into(),
        end: address,
        limit,
    })
}

/// A file that the loader has loaded.
struct Preloaded {
    name: &'static str,
    kind: &'static str,
    start: u64,
    bytes: u64,
}

/// The numbers that only the kernel's own record carries.
struct Tail {
    howto: u32,
    envp: u64,
    kernend: u64,
    modulep: u64,
}

fn metadata(files: &[Preloaded], tail: &Tail, map: &[MapEntry]) -> Vec<u8> {
    let mut records = Records(Vec::new());
    for (i, file) in files.iter().enumerate() {
        records.string(NAME, file.name); // Must be a file's first.
        records.string(TYPE, file.kind);
        records.put(ADDR, &file.start.to_le_bytes());
        records.put(SIZE, &file.bytes.to_le_bytes());
        if i == 0 {
            records.put(HOWTO, &tail.howto.to_le_bytes());
            records.put(ENVP, &tail.envp.to_le_bytes());
            records.put(KERNEND, &tail.kernend.to_le_bytes());
            records.put(MODULEP, &tail.modulep.to_le_bytes());
            records.put(SMAP, &smap(map));
        }
    }
    records.put(0, &[]);
    records.0
}

/// Packed {u64 base, u64 length, u32 type}; the kernel takes the count from the record's size.
fn smap(map: &[MapEntry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(map.len() * 20);
    for entry in map {
        bytes.extend_from_slice(&entry.start.to_le_bytes());
        bytes.extend_from_slice(&entry.bytes.to_le_bytes());
        bytes.extend_from_slice(&entry.kind.to_le_bytes());
    }
    bytes
}

/// Records: u32 type, u32 size, data, padded to 8.
struct Records(Vec<u8>);

impl Records {
    fn put(&mut self, kind: u32, data: &[u8]) {
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&(data.len() as u32).to_le_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    fn string(&mut self, kind: u32, text: &str) {
        self.put(kind, &[text.as_bytes(), b"\0"].concat());
    }
}

#[cfg(test)]
#[path = "freebsd_tests.rs"]
mod tests;
