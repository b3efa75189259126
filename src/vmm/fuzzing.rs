//! What hostile bytes are given to in this room: devices, ports, kernels and disks. And the tables that are made for guests, read again.

use std::fs::File;
use std::io::{self, Write};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::boot::{self, BootInput, BootProtocol, DiskView, Hardware, HardwareWish, MmioSlot, ModuleKind};
use super::chipset::AgentPort;
use super::hostile;
use super::memory::GuestMemory;
use super::x86::{acpi, mptable};
use crate::media::ReadAt;

const MEMORY_BYTES: usize = 24 << 20;
/// Longest kernel or disk.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Any registers, rings and saved states of each virtio device, behind each front.
pub fn devices(data: &[u8]) {
    hostile::virtio::fuzz(data);
}

/// Any accesses to ports and to the memory of I/O APIC and PCI, and any saved state of them.
pub fn ports(data: &[u8]) {
    hostile::chipset::fuzz(data);
}

/// A disk of bytes, with nothing behind them.
struct Slice<'a>(&'a [u8]);

impl ReadAt for Slice<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn file(data: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"fuzz", MemfdFlags::CLOEXEC).expect("a memory file"));
    file.write_all(data).expect("written");
    file
}

/// Any kernel file, with any command line, entered any way; its first bytes choose.
pub fn kernels(data: &[u8]) {
    let Some((&[choice, line_bytes], rest)) = data.split_first_chunk() else { return };
    let (line, kernel) = rest.split_at(usize::from(line_bytes).min(rest.len()));
    if kernel.is_empty() || kernel.len() > FILE_BYTES_MAX {
        return;
    }
    let command_line = String::from_utf8_lossy(line);
    let (kernel_file, module_file) = (file(kernel), file(b"module"));
    let wish = [HardwareWish::Auto, HardwareWish::Microvm, HardwareWish::Pc][usize::from(choice) % 3];
    let Ok((hardware, _)) = boot::hardware(&kernel_file, wish) else { return };
    let protocols = [BootProtocol::Auto, BootProtocol::FreeBsd, BootProtocol::Pvh, BootProtocol::Linux];
    let modules = [None, Some(ModuleKind::MemoryDisk), Some(ModuleKind::Initrd), None];
    let memory = memory();
    let disk = Slice(kernel);
    let slots = [MmioSlot { base: 0xd000_0000, bytes: 0x1000, irq: 5 }];
    let loaded = boot::load(&BootInput {
        memory: &memory,
        kernel: &kernel_file,
        module: modules[usize::from(choice >> 4 & 3)].map(|kind| (kind, &module_file)),
        protocol: protocols[usize::from(choice >> 2 & 3)],
        hardware,
        command_line: &command_line,
        vcpus: 1 + (choice >> 6),
        disks: &[DiskView { content: &disk, bytes: kernel.len() as u64, read_only: false }],
        mmio: if hardware == Hardware::Microvm { &slots } else { &[] },
        agent_port: if choice & 1 == 0 { AgentPort::Virtio } else { AgentPort::Serial },
    });
    match loaded {
        // The first instruction is in memory.
        Ok(loaded) => assert!(memory.read_obj::<u8>(GuestAddress(physical(loaded.entry.rip()))).is_ok()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// FreeBSD's native entry is an address of its kernel window.
fn physical(address: u64) -> u64 {
    const KERNBASE: u64 = 0xffff_ffff_8000_0000;
    address.checked_sub(KERNBASE).unwrap_or(address)
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory")
}

/// Any number of vCPUs, lines and windows: refused, or tables that their readers find whole.
pub fn tables(data: &[u8]) {
    let Some((&[vcpus, choice], rest)) = data.split_first_chunk() else { return };
    let memory = memory();
    let agent = if choice & 1 == 0 { AgentPort::Virtio } else { AgentPort::Serial };
    let devices: Vec<_> = rest
        .chunks_exact(5)
        .map(|chunk| acpi::MmioDevice {
            address: u64::from(u32::from_le_bytes([0, chunk[0], chunk[1], chunk[2]])) << (chunk[3] & 7),
            bytes: 0x1000,
            line: chunk[4].into(),
        })
        .collect();
    let root = match choice & 2 {
        0 => acpi::write(&memory, vcpus, agent, &devices),
        _ => acpi::write_pc(&memory, vcpus, agent),
    };
    if let Ok(root) = root {
        check_acpi(&memory, root, vcpus);
    }
    let lines: Vec<u8> = rest.iter().copied().take(40).collect();
    if mptable::write(&memory, vcpus, &lines).is_ok() {
        check_mptable(&memory, vcpus, &lines);
    }
}

fn bytes(memory: &GuestMemory, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    memory.read_slice(&mut bytes, GuestAddress(at)).expect("within memory");
    bytes
}

fn number(bytes: &[u8], at: usize, count: usize) -> u64 {
    bytes[at..at + count].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// ACPI 6.4, 5.2.5 to 5.2.12: what a reader walks.
fn check_acpi(memory: &GuestMemory, root: u64, vcpus: u8) {
    let pointer = bytes(memory, root, 36);
    assert!(pointer.starts_with(b"RSD PTR ") && sums_to_zero(&pointer[..20]) && sums_to_zero(&pointer));
    let table = |at: u64| {
        let length = number(&bytes(memory, at, 8), 4, 4) as usize;
        let table = bytes(memory, at, length);
        assert!(at + length as u64 <= 1 << 20 && sums_to_zero(&table), "the table at {at:#x}");
        table
    };
    let directory = table(number(&pointer, 24, 8));
    let mut processors = None;
    for entry in directory[36..].chunks_exact(8) {
        let table = table(number(entry, 0, 8));
        if table.starts_with(b"APIC") {
            let (mut at, mut count) = (44, 0);
            while at < table.len() {
                count += usize::from(matches!(table[at], 0 | 9));
                assert!(table[at + 1] >= 2);
                at += usize::from(table[at + 1]);
            }
            assert_eq!(at, table.len());
            processors = Some(count);
        }
    }
    assert_eq!(processors, Some(usize::from(vcpus)));
}

/// MultiProcessor Specification 1.4, chapter 4.
fn check_mptable(memory: &GuestMemory, vcpus: u8, lines: &[u8]) {
    let pointer = bytes(memory, mptable::TABLE_START, 16);
    assert!(pointer.starts_with(b"_MP_") && sums_to_zero(&pointer));
    let at = number(&pointer, 4, 4);
    let header = bytes(memory, at, 44);
    let table = bytes(memory, at, number(&header, 4, 2) as usize);
    assert!(header.starts_with(b"PCMP") && sums_to_zero(&table));
    let (mut at, mut kinds) = (44, [0usize; 5]);
    for _ in 0..number(&header, 34, 2) {
        let kind = usize::from(table[at]);
        kinds[kind] += 1;
        at += if kind == 0 { 20 } else { 8 };
    }
    assert_eq!(at, table.len());
    assert_eq!((kinds[0], kinds[2]), (usize::from(vcpus), 1));
    // The ISA interrupts without the cascade, and each line above them once, however many devices share it.
    let above: std::collections::BTreeSet<_> = lines.iter().filter(|line| **line > 15).collect();
    assert_eq!(kinds[3], 15 + above.len());
}
