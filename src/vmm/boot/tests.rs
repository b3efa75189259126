//! Whole loads: synthetic kernels in temporary files, and what they find in memory afterwards.

use std::io::Write;

use vm_memory::{Bytes, GuestAddress};

use super::elf::KERNBASE;
use super::*;

/// Builds ELF files for tests.
pub(super) struct ElfBuilder {
    pub entry: u64,
    pub osabi: u8,
    pub machine: u16,
    /// Virtual address, physical address, content, bytes in memory.
    pub segments: Vec<(u64, u64, Vec<u8>, u64)>,
    /// Content of a PT_NOTE segment.
    pub notes: Vec<u8>,
    /// The same notes only in a section.
    pub notes_in_section: bool,
    pub interpreter: Option<&'static [u8]>,
    pub section_name: Option<&'static [u8]>,
}

pub(super) const KERNEL_START: u64 = 0x20_0000;

impl ElfBuilder {
    pub fn freebsd() -> Self {
        ElfBuilder {
            entry: KERNBASE + KERNEL_START + 0x10,
            osabi: 9,
            machine: 62,
            segments: vec![(
                KERNBASE + KERNEL_START,
                KERNEL_START,
                b"first segment, with code".to_vec(),
                0x3000,
            )],
            notes: note(b"Xen", 18, &((KERNEL_START + 0x20) as u32).to_le_bytes()),
            notes_in_section: false,
            interpreter: None,
            section_name: None,
        }
    }

    pub fn linux() -> Self {
        let start = 0x100_0000;
        ElfBuilder {
            entry: start,
            osabi: 0,
            segments: vec![
                (KERNBASE + start, start, vec![0xcc; 5000], 0x9000),
                (0, start + 0x9000, vec![1; 16], 16),
            ],
            notes: [note(b"Linux", 0x100, b"salt"), note(b"Xen", 18, &(start as u32).to_le_bytes())].concat(),
            ..Self::freebsd()
        }
    }

    pub fn build(&self) -> Vec<u8> {
        let mut programs: Vec<(u32, u64, u64, Vec<u8>, u64)> =
            self.segments.iter().map(|(v, p, content, bytes)| (1, *v, *p, content.clone(), *bytes)).collect();
        if !self.notes.is_empty() && !self.notes_in_section {
            programs.push((4, 0, 0, self.notes.clone(), self.notes.len() as u64));
        }
        if let Some(name) = self.interpreter {
            programs.push((3, 0, 0, name.to_vec(), name.len() as u64));
        }
        let mut file = vec![0u8; 64 + programs.len() * 56];
        for (i, (kind, v, p, content, bytes)) in programs.iter().enumerate() {
            let offset = file.len() as u64;
            file.extend_from_slice(content);
            file.resize(file.len().next_multiple_of(8), 0);
            let at = 64 + i * 56;
            file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            for (j, value) in [offset, *v, *p, content.len() as u64, *bytes, 4].into_iter().enumerate() {
                file[at + 8 + j * 8..at + 16 + j * 8].copy_from_slice(&value.to_le_bytes());
            }
        }
        let mut sections: Vec<(u32, Vec<u8>)> = Vec::new();
        if self.notes_in_section {
            sections.push((7, self.notes.clone()));
        }
        if let Some(name) = self.section_name {
            sections.push((3, [b"\0.text\0".as_slice(), name, b"\0"].concat()));
        }
        let mut headers = vec![0u8; 64];
        for (kind, content) in &sections {
            let mut header = [0u8; 64];
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[24..32].copy_from_slice(&(file.len() as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            header[48] = 4;
            headers.extend_from_slice(&header);
            file.extend_from_slice(content);
            file.resize(file.len().next_multiple_of(8), 0);
        }
        let section_start = file.len() as u64;
        file.extend_from_slice(&headers);
        file[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, self.osabi]);
        file[16..18].copy_from_slice(&2u16.to_le_bytes());
        file[18..20].copy_from_slice(&self.machine.to_le_bytes());
        file[20] = 1;
        file[24..32].copy_from_slice(&self.entry.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[40..48].copy_from_slice(&section_start.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(programs.len() as u16).to_le_bytes());
        file[58..60].copy_from_slice(&64u16.to_le_bytes());
        file[60..62].copy_from_slice(&(sections.len() as u16 + 1).to_le_bytes());
        file[62..64].copy_from_slice(&(sections.len() as u16).to_le_bytes());
        file
    }

    pub fn file(&self) -> File {
        file(&self.build())
    }
}

pub(super) fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    note.extend_from_slice(&(name.len() as u32 + 1).to_le_bytes());
    note.extend_from_slice(&(value.len() as u32).to_le_bytes());
    note.extend_from_slice(&kind.to_le_bytes());
    note.extend_from_slice(name);
    note.push(0);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend_from_slice(value);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

pub(super) fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("temporary file");
    file.write_all(content).expect("written");
    file
}

pub(super) fn memory(mib: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).expect("memory")
}

pub(super) fn input<'a>(memory: &'a GuestMemory, kernel: &'a File) -> BootInput<'a> {
    BootInput {
        memory,
        kernel,
        module: None,
        protocol: BootProtocol::Auto,
        hardware: Hardware::Microvm,
        command_line: "",
        vcpus: 2,
        disks: &[],
        mmio: &[
            MmioSlot { base: 0xd000_0000, bytes: 0x1000, irq: 5 },
            MmioSlot { base: 0xd000_1000, bytes: 0x1000, irq: 6 },
        ],
        agent_port: AgentPort::Virtio,
    }
}

pub(super) fn c_string(memory: &GuestMemory, at: u64) -> String {
    let bytes: Vec<u8> =
        (at..).map(|a| memory.read_obj(GuestAddress(a)).expect("RAM")).take_while(|b| *b != 0).collect();
    String::from_utf8(bytes).expect("text")
}

#[test]
fn auto_takes_the_native_protocol_for_freebsd_and_pvh_for_linux() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let loaded = load(&input(&memory, &kernel)).expect("loads");
    assert_eq!(loaded.protocol, BootProtocol::FreeBsd);
    assert!(loaded.choices[0].contains("FreeBSD native"), "{:?}", loaded.choices);
    assert_eq!(loaded.entry.rip(), KERNBASE + KERNEL_START + 0x10);
    let table: [u8; 4] = memory.read_obj(GuestAddress(0x9fc00)).expect("RAM");
    assert_eq!(&table, b"_MP_", "every protocol gets the interrupt table");

    let kernel = ElfBuilder::linux().file();
    let loaded = load(&input(&memory, &kernel)).expect("loads");
    assert_eq!(loaded.protocol, BootProtocol::Pvh);
}

#[test]
fn registers_are_complete() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let mut regs = kvm_regs { rax: 1, r15: 2, ..Default::default() };
    let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
    load(&input(&memory, &kernel)).expect("loads").entry.apply(&mut regs, &mut sregs);
    assert_eq!((regs.rax, regs.r15, regs.rflags), (0, 0, 2));
    assert_eq!(sregs.cr3, 0x2000);
    assert_eq!(sregs.apic_base, 0xfee0_0900);
}

#[test]
fn protocols_that_do_not_go_with_the_kernel_are_refused() {
    let memory = memory(64);
    let freebsd = ElfBuilder::freebsd().file();
    let linux = ElfBuilder::linux().file();
    let no_note = ElfBuilder { notes: Vec::new(), ..ElfBuilder::linux() }.file();
    for (kernel, protocol, part) in [
        (&freebsd, BootProtocol::Linux, "bzImage"),
        (&linux, BootProtocol::FreeBsd, "marks"),
        (&no_note, BootProtocol::Pvh, "PHYS32_ENTRY"),
        (&no_note, BootProtocol::Auto, "neither"),
    ] {
        let error = load(&BootInput { protocol, ..input(&memory, kernel) }).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_freebsd_program_is_not_a_kernel() {
    let memory = memory(64);
    let program = ElfBuilder {
        segments: vec![(0x20_0000, 0x20_0000, vec![0; 64], 64)],
        notes: Vec::new(),
        ..ElfBuilder::freebsd()
    };
    let error = load(&input(&memory, &program.file())).expect_err("refused");
    assert!(matches!(&error, BootError::NotAKernel(reason) if reason.contains("linked at")), "{error}");
}

#[test]
fn files_that_are_no_kernels_are_told_apart() {
    let memory = memory(64);
    let mut disk = vec![0u8; 4096];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    for (content, part) in [
        (b"\x1f\x8b\x08 and so on".to_vec(), "gzip"),
        (b"\xfd7zXZ\0".to_vec(), "xz"),
        (b"#!/bin/sh\n".to_vec(), "script"),
        (disk, "disk image"),
        (b"QFI\xfb".to_vec(), "QCOW"),
        (b"hello".to_vec(), "neither"),
        (Vec::new(), "empty"),
        (b"\x7fELF".to_vec(), "truncated"),
    ] {
        let error = load(&input(&memory, &file(&content))).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
    let directory = File::open("/").expect("root");
    let error = load(&input(&memory, &directory)).expect_err("refused").to_string();
    assert!(error.contains("directory"), "{error}");
}

#[test]
fn the_callers_words_win() {
    let memory = memory(64);
    let kernel = ElfBuilder::freebsd().file();
    let line = "vfs.root.mountfrom=ufs:/dev/vtbd9 console=vidconsole";
    let loaded = load(&BootInput { command_line: line, ..input(&memory, &kernel) }).expect("loads");
    assert!(
        loaded.choices.iter().any(|c| c == "root: ufs:/dev/vtbd9 (from the command line)"),
        "{:?}",
        loaded.choices
    );
    assert!(loaded.choices.iter().any(|c| c == "console: vidconsole"));
}

#[test]
fn linux_line_has_our_words_first() {
    let memory = memory(64);
    let kernel = ElfBuilder::linux().file();
    let line = "console=hvc0 quiet";
    load(&BootInput { command_line: line, ..input(&memory, &kernel) }).expect("loads");
    let line = c_string(&memory, layout::COMMAND_LINE_START);
    assert_eq!(
        line,
        "reboot=k pci=off virtio_mmio.device=0x1000@0xd0000000:5 virtio_mmio.device=0x1000@0xd0001000:6 console=hvc0 quiet"
    );
}

#[test]
fn missing_drivers_are_told() {
    for (text, warnings) in
        [("", 2), ("VirtIO MMIO adapter", 1), ("MPTable: <", 1), ("MPTable: <%s and VirtIO MMIO adapter", 0)]
    {
        let segments = vec![(KERNBASE + KERNEL_START, KERNEL_START, text.as_bytes().to_vec(), 8 << 20)];
        let kernel = ElfBuilder { segments, ..ElfBuilder::freebsd() }.file();
        let choices = hardware(&kernel, HardwareWish::Microvm).expect("readable").1;
        let told = choices.iter().filter(|c| c.starts_with("warning: this kernel has no")).count();
        assert_eq!(told, warnings, "{choices:?}");
    }
}

#[test]
fn a_pc_is_told_by_acpi_and_nothing_else() {
    let memory = memory(64);
    let text = b"MPTable: < VirtIO PCI %s adapter".to_vec();
    let segments = vec![(KERNBASE + KERNEL_START, KERNEL_START, text, 8 << 20)];
    let kernel = ElfBuilder { segments, ..ElfBuilder::freebsd() }.file();
    let found = hardware(&kernel, HardwareWish::Auto).expect("readable").0;
    assert_eq!(found, Hardware::Pc { transitional: true });
    for protocol in [BootProtocol::FreeBsd, BootProtocol::Pvh] {
        load(&BootInput { protocol, hardware: found, mmio: &[], ..input(&memory, &kernel) }).expect("loads");
        let root: [u8; 8] = memory.read_obj(GuestAddress(0xe0000)).expect("RAM");
        assert_eq!(&root, b"RSD PTR ");
        let table: [u8; 4] = memory.read_obj(GuestAddress(0x9fc00)).expect("RAM");
        assert_eq!(table, [0; 4], "no interrupt table that contradicts ACPI");
    }
    assert!(!c_string(&memory, layout::COMMAND_LINE_START).contains("acpi.0.disabled"));
    let kernel = ElfBuilder::linux().file();
    load(&BootInput { hardware: found, mmio: &[], ..input(&memory, &kernel) }).expect("loads");
    assert_eq!(c_string(&memory, layout::COMMAND_LINE_START), "console=ttyS0 reboot=k");
}
