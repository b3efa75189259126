//! ACPI's list of CPUs, the MADT, found and read as FreeBSD does on a machine without firmware: the root pointer by its
//! mark in the BIOS area (FREEBSD.md section 4; ACPI 6.4, 5.2.5.1, 5.2.8, 5.2.12).

use crate::checks::{Checks, check};
use crate::memory;
use crate::mptable::Topology;

const BIOS_AREA: core::ops::Range<u64> = 0xe_0000..0x10_0000;
const RSDP_BYTES: u64 = 36;
const HEADER_BYTES: u64 = 36;
/// Tables longer than this are none of ours.
const TABLE_BYTES_MAX: u64 = 0x1_0000;
const LOCAL_APIC_ENTRY: u8 = 0;
const IO_APIC_ENTRY: u8 = 1;
const ENABLED: u8 = 1;

/// The CPUs of the MADT; `None` on a machine without ACPI.
pub(crate) fn check(checks: &mut Checks) -> Option<Topology> {
    let rsdp = BIOS_AREA
        .step_by(16)
        .find(|at| memory::bytes(*at, 8) == Some(b"RSD PTR ") && sum(*at, RSDP_BYTES) == Some(0))?;
    let xsdt = memory::read_u32(rsdp + 24).map_or(0, u64::from);
    let madt = table(xsdt, b"XSDT").and_then(|bytes| {
        let entries = bytes.get(HEADER_BYTES as usize..)?;
        let mut addresses = entries.chunks_exact(8).filter_map(|entry| entry.try_into().ok());
        addresses.find_map(|entry| table(u64::from_le_bytes(entry), b"APIC"))
    });
    check!(checks, "madt.tables", madt.is_some(), "RSDP {rsdp:#x}, XSDT {xsdt:#x}");
    let madt = madt?;

    let local_apic = madt.get(36..40).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes);
    // Flags that say that 8259s are there, too, lie in between.
    let entries = || Entries(madt.get(44..).unwrap_or_default());
    let cpus = entries().filter_map(|entry| match entry {
        [LOCAL_APIC_ENTRY, 8, _, id, flags, ..] if flags & ENABLED != 0 => Some(*id),
        _ => None,
    });
    let topology = Topology::of(cpus);
    let io_apic = entries().find_map(|entry| match entry {
        [IO_APIC_ENTRY, 12, _, _, address @ ..] => address.first_chunk().map(|word| u32::from_le_bytes(*word)),
        _ => None,
    });
    let whole = entries().map(<[u8]>::len).sum::<usize>() + 44 == madt.len();
    check!(
        checks,
        "madt.entries",
        whole
            && topology.is_some_and(|topology| !topology.apic_ids().is_empty())
            && io_apic == Some(crate::interrupts::IO_APIC as u32)
            && local_apic == crate::interrupts::LOCAL_APIC as u32,
        "{} CPUs, IOAPIC {io_apic:x?}, local APICs {local_apic:#x}, whole {whole}",
        topology.map_or(0, |topology| topology.apic_ids().len())
    );
    Some(topology.unwrap_or_default())
}

/// A table with this mark, if it lies there and its checksum is right.
fn table(at: u64, mark: &[u8; 4]) -> Option<&'static [u8]> {
    let header = memory::bytes(at, HEADER_BYTES)?;
    let bytes = u64::from(memory::read_u32(at + 4)?);
    let good = header.starts_with(mark) && (HEADER_BYTES..=TABLE_BYTES_MAX).contains(&bytes);
    if good && sum(at, bytes) == Some(0) { memory::bytes(at, bytes) } else { None }
}

fn sum(at: u64, count: u64) -> Option<u8> {
    Some(memory::bytes(at, count)?.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)))
}

/// Entries one after the other: kind, length, content. Ends at one that does not fit.
struct Entries(&'static [u8]);

impl Iterator for Entries {
    type Item = &'static [u8];

    fn next(&mut self) -> Option<&'static [u8]> {
        let length = usize::from(*self.0.get(1)?);
        let (entry, rest) = self.0.split_at_checked(length).filter(|_| length >= 2)?;
        self.0 = rest;
        Some(entry)
    }
}
