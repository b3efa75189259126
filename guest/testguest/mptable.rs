//! The MPTable as FreeBSD looks for it and reads it (FREEBSD.md section 3).

use crate::checks::{Checks, check};
use crate::memory;

pub(crate) const CPUS_MAX: usize = 32;
const POINTER_BYTES: u64 = 16;
const HEADER_BYTES: u64 = 44;
const ONE_MIB: u64 = 1 << 20;

/// What the table told.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Topology {
    /// APIC ids of the enabled CPUs, the boot CPU not first by rule.
    apic_ids: [u8; CPUS_MAX],
    cpus: usize,
    /// APIC id of the boot CPU as the table has it.
    boot: Option<u8>,
    io_apic: Option<u32>,
    busses: usize,
    lines: usize,
    /// What is wrong with an entry.
    wrong: Option<&'static str>,
}

impl Topology {
    /// CPUs that another table told of; `None`: too many.
    pub(crate) fn of(apic_ids: impl Iterator<Item = u8>) -> Option<Topology> {
        let mut topology = Topology::default();
        for id in apic_ids {
            *topology.apic_ids.get_mut(topology.cpus)? = id;
            topology.cpus += 1;
        }
        Some(topology)
    }

    pub(crate) fn apic_ids(&self) -> &[u8] {
        self.apic_ids.get(..self.cpus).unwrap_or_default()
    }
}

pub(crate) fn check(checks: &mut Checks) -> Topology {
    let pointer = find();
    let config = pointer.and_then(|at| memory::read_u32(at + 4)).map_or(0, u64::from);
    let header = memory::bytes(config, HEADER_BYTES).filter(|_| config != 0 && config < ONE_MIB);
    let signed = header.is_some_and(|header| header.starts_with(b"PCMP"));
    check!(checks, "mptable.found", signed, "pointer {pointer:x?}, table {config:#x}");
    let (true, Some(pointer)) = (signed, pointer) else { return Topology::default() };

    let length = memory::read_u16(config + 4).map_or(0, u64::from);
    let sums = [sum(pointer, POINTER_BYTES), sum(config, length)];
    let inside = length >= HEADER_BYTES && config + length <= ONE_MIB;
    let no_imcr = memory::bytes(pointer, POINTER_BYTES).is_some_and(|pointer| pointer[12] & 0x80 == 0);
    check!(
        checks,
        "mptable.checksum",
        sums == [0, 0] && inside && no_imcr,
        "sums {sums:?}, {length} bytes, below 1 MiB {inside}, no IMCR {no_imcr}"
    );
    let count = memory::read_u16(config + 34).map_or(0, u64::from);
    let topology = entries(config + HEADER_BYTES, config + length, count);
    check!(
        checks,
        "mptable.entries",
        topology.wrong.is_none()
            && topology.boot.is_some()
            && topology.io_apic == Some(crate::interrupts::IO_APIC as u32)
            && topology.busses > 0
            && topology.lines > 0
            && memory::read_u32(config + 36) == Some(crate::interrupts::LOCAL_APIC as u32),
        "{count} entries: {} CPUs, boot CPU {:?}, IOAPIC {:x?}, {} busses, {} lines, wrong: {}",
        topology.cpus,
        topology.boot,
        topology.io_apic,
        topology.busses,
        topology.lines,
        topology.wrong.unwrap_or("nothing")
    );
    topology
}

/// The floating pointer: EBDA, last KiB of base memory, BIOS area.
fn find() -> Option<u64> {
    let ebda = u64::from(memory::read_u16(0x40e)?) << 4;
    let areas = [(ebda, 1024), (639 << 10, 1024), (0xf_0000, 0x1_0000)];
    areas.iter().filter(|(start, bytes)| *start != 0 && start + bytes <= ONE_MIB).find_map(
        |(start, bytes)| {
            (*start..start + bytes)
                .step_by(16)
                .find(|at| memory::bytes(*at, 4) == Some(b"_MP_") && sum(*at, POINTER_BYTES) == 0)
        },
    )
}

fn sum(at: u64, count: u64) -> u8 {
    memory::bytes(at, count).map_or(1, |bytes| bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte)))
}

fn entries(mut at: u64, end: u64, count: u64) -> Topology {
    let mut topology = Topology::default();
    if count == 0 {
        topology.wrong = Some("an entry count of 0");
    }
    // With a count of 0 the length tells (FreeBSD's MPTABLE_LINUX_BUG_COMPAT).
    let count = if count == 0 { (end - at) / 8 } else { count };
    for _ in 0..count {
        if at >= end {
            break;
        }
        let kind = memory::bytes(at, 1).map_or(u8::MAX, |kind| kind[0]);
        let bytes = match kind {
            0 => 20,
            1..=4 => 8,
            _ => {
                topology.wrong = Some("an entry type that makes FreeBSD panic");
                break;
            }
        };
        let Some(entry) = memory::bytes(at, bytes).filter(|_| at + bytes <= end) else {
            topology.wrong = Some("an entry beyond the table");
            break;
        };
        match kind {
            0 if entry[3] & 1 == 1 => {
                let id = entry[1];
                match topology.apic_ids.get_mut(topology.cpus) {
                    Some(slot) => *slot = id,
                    None => {
                        topology.wrong = Some("too many CPUs");
                        break;
                    }
                }
                topology.cpus += 1;
                if entry[3] & 2 != 0 && topology.boot.replace(id).is_some() {
                    topology.wrong = Some("two boot CPUs");
                }
            }
            1 => topology.busses += 1,
            2 if entry[3] & 1 == 1 => topology.io_apic = memory::read_u32(at + 4),
            3 => topology.lines += 1,
            _ => {}
        }
        at += bytes;
    }
    if at != end && topology.wrong.is_none() {
        topology.wrong = Some("bytes after the last entry");
    }
    topology
}
