//! The PVH entry: 32-bit protected mode at the address in the kernel's Xen note, start information in EBX.
//!
//! Serves FreeBSD (12 and later with XENHVM) and Linux (CONFIG_PVH). Writes guest memory: kernel segments, start information,
//! memory map, command line, Linux's initrd. Facts: FREEBSD.md section 1; Xen's `docs/misc/pvh.pandoc` and
//! `xen/include/public/arch-x86/hvm/start_info.h`; FreeBSD's `sys/x86/xen/pv.c`; Linux's `arch/x86/platform/pvh/enlighten.c`.
//!
//! All that is ours lies below 1 MiB: FreeBSD takes its first memory after the highest of start information, map and modules, so
//! anything placed high would cost it the memory below.

use super::elf::{self, Addressing, Elf};
use super::error::BootError;
use super::layout::{self, COMMAND_LINE_BYTES_MAX, COMMAND_LINE_START, PAGE_BYTES, PVH_INFO_START};
use super::words::Environment;
use super::{BootInput, Entry, ModuleKind};
use crate::vmm::x86::gdt::{self, Mode};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;
const MAP_ENTRY_BYTES: u64 = 24;
/// RAM that a kernel needs right after its own end for its first allocations.
const EARLY_BYTES: u64 = 4 << 20;
/// FreeBSD's static environment on this path: one page, in which the kernel also sets `acpi.rsdp`.
const FREEBSD_ENVIRONMENT_BYTES: usize = 4096;
const FREEBSD_OWN_BYTES: usize = "acpi.rsdp=0xffffffffffffffff\0\0".len();

/// The command line for FreeBSD: comma-separated, because kernels before 14 know no other separator.
pub fn freebsd_command_line(environment: &Environment) -> Result<String, BootError> {
    environment.check()?;
    let mut words = Vec::new();
    let mut bytes = FREEBSD_OWN_BYTES;
    for (name, value) in environment.iter() {
        if let Some(c) = value.chars().find(|c| matches!(c, ',' | ' ' | '\t' | '\n')) {
            return Err(BootError::CommandLine(format!(
                "the value of {name} contains {c:?}, which separates words in FreeBSD's PVH entry; use the native protocol"
            )));
        }
        bytes += name.len() + value.len() + 2;
        words.push(format!("{name}={value}"));
    }
    if bytes > FREEBSD_ENVIRONMENT_BYTES {
        return Err(BootError::CommandLine(format!(
            "{bytes} bytes of variables; FreeBSD's PVH entry keeps {FREEBSD_ENVIRONMENT_BYTES}: use the native protocol"
        )));
    }
    let letters = environment.flag_letters();
    if !letters.is_empty() {
        words.push(format!("-{letters}"));
    }
    Ok(words.join(","))
}

/// Loads the kernel with `command_line` and the address of ACPI's root pointer, if there is one. Linux may have an initrd; FreeBSD takes no module this way.
pub fn load(input: &BootInput, elf: &Elf, command_line: &str, rsdp: Option<u64>) -> Result<Entry, BootError> {
    let memory = input.memory;
    let entry = elf.pvh_entry.map(u64::from).ok_or_else(|| BootError::Protocol {
        protocol: "PVH",
        reason: "it has no Xen PHYS32_ENTRY note (FreeBSD: build with options XENHVM; Linux: CONFIG_PVH)"
            .into(),
    })?;
    if !elf.covers(Addressing::Physical, entry) {
        return Err(BootError::BadElf(format!("its PVH entry {entry:#x} is outside its own segments")));
    }
    let range = elf.range(Addressing::Physical)?;
    let what = "the kernel with its first allocations";
    layout::need_ram(memory, what, range.start, range.end.saturating_add(EARLY_BYTES))?;
    let module = match input.module {
        None => None,
        Some(_) if elf.freebsd => {
            return Err(BootError::Module(
                "FreeBSD's PVH entry takes no modules (it would look for loader metadata in them): use the native protocol"
                    .into(),
            ));
        }
        Some((ModuleKind::MemoryDisk, _)) => {
            return Err(BootError::Module("a memory disk is for FreeBSD; give Linux an initrd".into()));
        }
        Some((ModuleKind::Initrd, file)) => {
            let bytes = super::file_bytes("initrd", file)?;
            let start = super::place_initrd(memory, bytes, range.end, u64::MAX)?;
            Some((file, start, bytes))
        }
    };
    elf.load(memory, input.kernel, Addressing::Physical)?;
    if let Some((file, start, bytes)) = module {
        elf::stream(memory, "initrd", file, 0, start, bytes)?;
    }

    if command_line.len() as u64 >= COMMAND_LINE_BYTES_MAX {
        return Err(BootError::CommandLine(format!("{} bytes are too long", command_line.len())));
    }
    layout::put(memory, "command line", COMMAND_LINE_START, &[command_line.as_bytes(), b"\0"].concat())?;

    let map = layout::memory_map(memory);
    let modules_start = PVH_INFO_START + INFO_BYTES.next_multiple_of(16);
    let map_start = modules_start + MODULE_BYTES;
    let mut page = Vec::with_capacity(PAGE_BYTES as usize);
    for word in [MAGIC, VERSION, 0, u32::from(module.is_some())] {
        page.extend_from_slice(&word.to_le_bytes());
    }
    let modules_address = if module.is_some() { modules_start } else { 0 };
    for address in [modules_address, COMMAND_LINE_START, rsdp.unwrap_or(0), map_start] {
        page.extend_from_slice(&address.to_le_bytes());
    }
    page.extend_from_slice(&(map.len() as u32).to_le_bytes());
    page.resize((modules_start - PVH_INFO_START) as usize, 0);
    let (start, bytes) = module.map_or((0, 0), |(_, start, bytes)| (start, bytes));
    for word in [start, bytes, 0, 0] {
        page.extend_from_slice(&word.to_le_bytes());
    }
    for entry in &map {
        page.extend_from_slice(&entry.start.to_le_bytes());
        page.extend_from_slice(&entry.bytes.to_le_bytes());
        page.extend_from_slice(&u64::from(entry.kind).to_le_bytes());
    }
    debug_assert_eq!(page.len() as u64, map_start - PVH_INFO_START + map.len() as u64 * MAP_ENTRY_BYTES);
    if page.len() as u64 > PAGE_BYTES {
        let limit = "PVH start information is given one page";
        let what = format!("a memory map of {} entries", map.len());
        return Err(BootError::TooLarge { what, end: PVH_INFO_START + page.len() as u64, limit });
    }
    layout::put(memory, "PVH start information", PVH_INFO_START, &page)?;

    gdt::write(memory, Mode::Protected).map_err(BootError::memory("descriptor table", gdt::GDT_START))?;
    Ok(Entry { mode: Mode::Protected, rip: entry, rsp: 0, rbx: PVH_INFO_START, rsi: 0 })
}

#[cfg(test)]
#[path = "pvh_tests.rs"]
mod tests;
