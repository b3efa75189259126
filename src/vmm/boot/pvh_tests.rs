//! Reads start information back as Xen's header defines it.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::boot::tests::{ElfBuilder, KERNEL_START, c_string, file, input, memory};
use crate::vmm::boot::{BootProtocol, load};
use crate::vmm::memory::GuestMemory;

fn words(memory: &GuestMemory, at: u64, count: usize) -> Vec<u64> {
    (0..count).map(|i| memory.read_obj(GuestAddress(at + i as u64 * 8)).expect("RAM")).collect()
}

fn info(memory: &GuestMemory, entry: &Entry) -> hvm_start_info {
    let w = words(memory, entry.rbx, 7);
    hvm_start_info {
        magic: w[0] as u32,
        version: (w[0] >> 32) as u32,
        flags: w[1] as u32,
        nr_modules: (w[1] >> 32) as u32,
        modlist_paddr: w[2],
        cmdline_paddr: w[3],
        rsdp_paddr: w[4],
        memmap_paddr: w[5],
        memmap_entries: w[6] as u32,
        reserved: (w[6] >> 32) as u32,
    }
}

fn map(memory: &GuestMemory, info: &hvm_start_info) -> Vec<hvm_memmap_table_entry> {
    words(memory, info.memmap_paddr, info.memmap_entries as usize * 3)
        .chunks_exact(3)
        .map(|w| hvm_memmap_table_entry {
            addr: w[0],
            size: w[1],
            type_: w[2] as u32,
            reserved: (w[2] >> 32) as u32,
        })
        .collect()
}

fn pvh<'a>(memory: &'a GuestMemory, kernel: &'a std::fs::File) -> BootInput<'a> {
    BootInput { protocol: BootProtocol::Pvh, ..input(memory, kernel) }
}

#[test]
fn freebsd_finds_start_information_low_in_memory() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let loaded = load(&BootInput { command_line: "-s a=b", ..pvh(&memory, &kernel) }).expect("loads");
    assert_eq!((loaded.protocol, loaded.entry.rip), (BootProtocol::Pvh, KERNEL_START + 0x20));
    let info = info(&memory, &loaded.entry);
    assert_eq!((info.magic, info.version, info.nr_modules, info.modlist_paddr), (0x336e_c578, 1, 0, 0));
    assert_eq!(info.rsdp_paddr, 0);
    for address in [loaded.entry.rbx, info.cmdline_paddr, info.memmap_paddr] {
        assert!(address < 0x9_0000, "{address:#x} would push FreeBSD's first free memory up");
    }
    let line = c_string(&memory, info.cmdline_paddr);
    assert!(line.contains(",virtio_mmio.device_1=0x1000@0xd0001000:6,"), "{line}");
    assert!(line.ends_with(",a=b,-s") && !line.contains(' '), "{line}");
    let entry = |addr, size, type_| hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
    assert_eq!(
        map(&memory, &info),
        [entry(0, 0x9fc00, 1), entry(0x9fc00, 0x60400, 2), entry(1 << 20, 63 << 20, 1)]
    );
}

#[test]
fn freebsd_lines_that_the_entry_cannot_carry_are_refused() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let long: String = (0..40).map(|i| format!("v{i}={} ", "x".repeat(100))).collect();
    for (line, part) in [("a=b,c", "separates"), ("a=\"b c\"", "separates"), (long.as_str(), "4096")] {
        let error =
            load(&BootInput { command_line: line, ..pvh(&memory, &kernel) }).expect_err(line).to_string();
        assert!(error.contains(part) && error.contains("native"), "{error}");
    }
}

#[test]
fn only_linux_gets_modules() {
    let memory = memory(64);
    let image = file(b"initrd content");
    let module = Some((ModuleKind::Initrd, &image));
    let kernel = ElfBuilder::freebsd().file();
    let error = load(&BootInput { module, ..pvh(&memory, &kernel) }).expect_err("refused").to_string();
    assert!(error.contains("native protocol"), "{error}");

    let kernel = ElfBuilder::linux().file();
    let loaded = load(&BootInput { module, ..pvh(&memory, &kernel) }).expect("loads");
    let info = info(&memory, &loaded.entry);
    assert_eq!(info.nr_modules, 1);
    let w = words(&memory, info.modlist_paddr, 4);
    let module = hvm_modlist_entry { paddr: w[0], size: w[1], cmdline_paddr: w[2], reserved: w[3] };
    assert_eq!((module.paddr % 4096, module.size, module.cmdline_paddr), (0, 14, 0));
    assert_eq!(c_string(&memory, module.paddr), "initrd content");
    assert!(info.memmap_paddr >= info.modlist_paddr + 32, "map over the module list");
    assert_eq!(map(&memory, &info).len(), 3);

    let disk = Some((ModuleKind::MemoryDisk, &image));
    assert!(load(&BootInput { module: disk, ..pvh(&memory, &kernel) }).is_err());
}

#[test]
fn an_initrd_that_does_not_fit_says_so() {
    let memory = memory(32);
    let kernel = ElfBuilder::linux().file();
    let image = tempfile::tempfile().expect("file");
    for (bytes, part) in [(17u64 << 20, "MiB"), (4 << 30, "3 GiB")] {
        image.set_len(bytes).expect("sparse");
        let module = Some((ModuleKind::Initrd, &image));
        let error = load(&BootInput { module, ..pvh(&memory, &kernel) }).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn an_entry_outside_the_kernel_is_refused() {
    let memory = memory(64);
    let notes = crate::vmm::boot::tests::note(b"Xen", 18, &0x10_0000u32.to_le_bytes());
    let kernel = ElfBuilder { notes, ..ElfBuilder::freebsd() }.file();
    assert!(matches!(load(&pvh(&memory, &kernel)), Err(BootError::BadElf(_))));
}
