//! Linux's bzImage by its 64-bit entry: zero page in RSI, kernel at its preferred address.
//!
//! Reads the image's header itself (it decides about memory), lets linux-loader copy the kernel, writes zero page, command line
//! and initrd. Facts: Linux `Documentation/arch/x86/boot.rst` ("64-bit BOOT PROTOCOL") and `zero-page.rst`.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage as Loader;
use vm_memory::{ByteValued, GuestAddress};

use super::elf::{self, u16_at, u32_at, u64_at};
use super::error::BootError;
use super::layout::{self, COMMAND_LINE_BYTES_MAX, COMMAND_LINE_START, ZERO_PAGE_START};
use super::reader::Reader;
use super::{BootInput, Entry, ModuleKind};
use crate::vmm::x86::gdt::{self, Mode};
use crate::vmm::x86::paging;

/// Offset of the 64-bit entry in the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// The oldest protocol version with all fields used here (Linux 3.8).
const VERSION_MIN: u16 = 0x020c;
/// xloadflags: has the 64-bit entry.
const HAS_ENTRY_64: u16 = 1;
/// loadflags: loaded high.
const LOADED_HIGH: u8 = 1;
/// Loader type "undefined", for loaders with no number of their own.
const LOADER_TYPE: u8 = 0xff;
/// Kernels say at most 2047 or more; this is what old ones take.
const E820_ENTRIES_MAX: usize = 128;

/// What a bzImage's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BzImage {
    /// Where it wants to lie.
    pub preferred_address: u64,
    /// Memory it needs from there on while it unpacks itself.
    pub init_bytes: u64,
    /// Bytes of the protected-mode kernel in the file.
    pub kernel_bytes: u64,
    /// Longest command line, without its NUL.
    pub command_line_bytes_max: u64,
    /// Highest address that an initrd's last byte may have.
    pub initrd_address_max: u64,
}

impl BzImage {
    /// Reads the header from the file's first KiB; the file has `bytes` bytes.
    pub fn read(head: &[u8], bytes: u64) -> Result<BzImage, BootError> {
        let bad = |reason: &str| Err(BootError::BadBzImage(reason.into()));
        if head.len() < 0x268 {
            let (part, needed) = ("the bzImage header".to_owned(), 0x268);
            return Err(BootError::Truncated { part, needed, bytes });
        }
        let version = u16_at(head, 0x206);
        if version < VERSION_MIN {
            return Err(BootError::BadBzImage(format!(
                "boot protocol {}.{:02}; 2.12 or later (Linux 3.8) is needed",
                version >> 8,
                version & 0xff
            )));
        }
        if head[0x211] & LOADED_HIGH == 0 {
            return bad("a zImage, which is loaded low");
        }
        if u16_at(head, 0x236) & HAS_ENTRY_64 == 0 {
            return bad("no 64-bit entry: a 32-bit kernel");
        }
        let setup_sectors = match head[0x1f1] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let setup_bytes = (setup_sectors + 1) * 512;
        // The header counts the kernel in 16-byte units; a signature may follow it.
        let needed = setup_bytes + u64::from(u32_at(head, 0x1f4)) * 16;
        if bytes < needed || bytes <= setup_bytes {
            return Err(BootError::Truncated { part: "the kernel's code".into(), needed, bytes });
        }
        let image = BzImage {
            preferred_address: u64_at(head, 0x258),
            init_bytes: u64::from(u32_at(head, 0x260)),
            kernel_bytes: bytes - setup_bytes,
            command_line_bytes_max: u64::from(u32_at(head, 0x238)),
            initrd_address_max: u64::from(u32_at(head, 0x22c)),
        };
        if image.init_bytes < image.kernel_bytes {
            return bad("it says it needs less memory than it has bytes");
        }
        Ok(image)
    }
}

/// Loads the kernel with `command_line`; `rsdp` is the address of ACPI's root pointer.
pub fn load(input: &BootInput, image: &BzImage, command_line: &str, rsdp: u64) -> Result<Entry, BootError> {
    let memory = input.memory;
    let start = image.preferred_address;
    let end = start.saturating_add(image.init_bytes);
    layout::need_ram(memory, "the kernel while it unpacks itself", start, end)?;
    if command_line.len() as u64 > image.command_line_bytes_max.min(COMMAND_LINE_BYTES_MAX - 1) {
        return Err(BootError::CommandLine(format!(
            "{} bytes with the words for the devices; this kernel takes {}",
            command_line.len(),
            image.command_line_bytes_max
        )));
    }
    let initrd = match input.module {
        None => None,
        Some((ModuleKind::MemoryDisk, _)) => {
            return Err(BootError::Module("a memory disk is for FreeBSD; give Linux an initrd".into()));
        }
        Some((ModuleKind::Initrd, file)) => {
            let bytes = super::file_bytes("initrd", file)?;
            let at = super::place_initrd(memory, bytes, end, image.initrd_address_max.saturating_add(1))?;
            Some((file, at, bytes))
        }
    };

    let bytes = super::file_bytes("kernel", input.kernel)?;
    let mut kernel = Reader::new(input.kernel, bytes, 0);
    let loaded = Loader::load(memory, Some(GuestAddress(start)), &mut kernel, None)
        .map_err(|error| BootError::BadBzImage(error.to_string()))?;
    let mut header = loaded.setup_header.ok_or_else(|| BootError::BadBzImage("no setup header".into()))?;
    header.type_of_loader = LOADER_TYPE;
    header.cmd_line_ptr = COMMAND_LINE_START as u32;
    if let Some((file, at, bytes)) = initrd {
        elf::stream(memory, "initrd", file, 0, at, bytes)?;
        let limit = "Linux is told of an initrd in 32 bits";
        let word = |value: u64| {
            u32::try_from(value).map_err(|_| BootError::TooLarge {
                what: "the initrd".into(),
                end: at,
                limit,
            })
        };
        header.ramdisk_image = word(at)?;
        header.ramdisk_size = word(bytes)?;
    }
    layout::put(memory, "command line", COMMAND_LINE_START, &[command_line.as_bytes(), b"\0"].concat())?;

    let mut page = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let map = layout::memory_map(memory);
    if map.len() > E820_ENTRIES_MAX {
        let (what, limit) = (format!("a memory map of {} entries", map.len()), "Linux's zero page holds 128");
        return Err(BootError::TooLarge { what, end: map.len() as u64, limit });
    }
    let mut table = page.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: entry.kind };
    }
    page.e820_table = table;
    page.e820_entries = map.len() as u8;
    layout::put(memory, "zero page", ZERO_PAGE_START, page.as_slice())?;

    let page_table = paging::write_identity_tables(memory)
        .map_err(BootError::memory("page tables", paging::TABLES_START))?;
    let mode = Mode::Long { page_table };
    gdt::write(memory, mode).map_err(BootError::memory("descriptor table", gdt::GDT_START))?;
    Ok(Entry { mode, rip: start + ENTRY_64, rsp: 0, rbx: 0, rsi: ZERO_PAGE_START })
}

#[cfg(test)]
#[path = "linux_tests.rs"]
mod tests;
