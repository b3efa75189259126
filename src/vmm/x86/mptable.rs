//! The MultiProcessor table: which CPUs there are and how interrupts reach them, for guests without ACPI.
//!
//! Touches guest memory only in the reserved page fragment at [`TABLE_START`] and in the BIOS data area (0x40e,
//! 0x413). Facts: Intel MultiProcessor Specification 1.4; FREEBSD.md section 3 and FreeBSD's `sys/x86/x86/mptable.c`
//! (an entry of any other type than 0..4 is a panic there, counts are believed); Linux `arch/x86/kernel/mpparse.c`.
//!
//! Choices, made so that FreeBSD and Linux both find and like the table:
//! * It lies at 639 KiB. FreeBSD looks where 0x40e points first (we let it point here), Linux reads 639 KiB itself.
//! * ISA interrupt 0 (the timer) arrives at pin [`TIMER_PIN`], as on every PC, and interrupt 2 (the cascade) does not
//!   exist. The identity map is not usable: FreeBSD takes pin 0 of the first I/O APIC for an ExtINT pin and never
//!   gives it to a device. All other ISA interrupts are at the pin of their own number.
//! * Lines above 15 (virtio-mmio) are told as ISA bus interrupts too: an I/O APIC pin without an entry would be
//!   taken for level-triggered PCI.
//! * Every interrupt says edge and active-high itself instead of "as the bus does", so it does not depend on what the
//!   guest makes of ports 0x4d0/0x4d1.
//! * Local: ExtINT at LINT0 of the boot CPU, NMI at LINT1 of all. No IMCR: nothing for the guest to switch.

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::memory::GuestMemory;

/// Where the floating pointer lies; the table follows it. Also the end of usable low RAM.
pub const TABLE_START: u64 = 0x9_fc00;
/// The I/O APIC pin on which ISA interrupt 0 (PIT) arrives.
pub const TIMER_PIN: u8 = 2;
/// Pins of the I/O APIC.
pub const IOAPIC_PINS: u8 = 24;
/// Most vCPUs the table has room for (it must end below 640 KiB).
pub const VCPUS_MAX: u8 = 32;

const TABLE_END: u64 = 0xa_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Version register of an integrated local APIC, and of an 82093AA I/O APIC.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const ISA_BUS: u8 = 0;
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTINT: u8 = 3;
/// Active high (1), edge (1 << 2).
const EDGE_HIGH: u16 = 0b0101;
const CONFORM: u16 = 0;

/// What is wrong with the machine that was to be described.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    #[error("{0} vCPUs: the interrupt table describes 1 to {VCPUS_MAX}")]
    Vcpus(u8),
    #[error(
        "interrupt line {0} cannot be a device's: use 1, or 3 to {last} (0 is the timer, 2 the cascade)",
        last = IOAPIC_PINS - 1
    )]
    Line(u8),
    #[error("interrupt table does not fit below 640 KiB: {0} bytes; use fewer vCPUs or devices")]
    TooLarge(usize),
    #[error("interrupt table cannot be written at {TABLE_START:#x}: give the VM at least 2 MiB of memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes pointer, table and BIOS data area words for `vcpus` CPUs (APIC ids 0..vcpus) and one I/O APIC with id
/// `vcpus`. `lines` are the devices' interrupt lines; those up to 15 are in the table anyway.
pub fn write(memory: &GuestMemory, vcpus: u8, lines: &[u8]) -> Result<(), MpTableError> {
    let table = build(vcpus, lines)?;
    let table_address = TABLE_START + POINTER_BYTES as u64;
    let room = (TABLE_END - table_address) as usize;
    if table.len() > room {
        return Err(MpTableError::TooLarge(table.len()));
    }

    let mut pointer = [0u8; POINTER_BYTES];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(table_address as u32).to_le_bytes());
    pointer[8] = 1; // Length in 16-byte units.
    pointer[9] = 4; // Specification 1.4.
    pointer[10] = checksum(&pointer);
    memory.write_slice(&pointer, GuestAddress(TABLE_START))?;
    memory.write_slice(&table, GuestAddress(table_address))?;

    // BIOS data area: the extended area's segment, where FreeBSD looks first, and KiB of base memory for Linux.
    memory.write_slice(&((TABLE_START >> 4) as u16).to_le_bytes(), GuestAddress(0x40e))?;
    memory.write_slice(&((TABLE_START >> 10) as u16).to_le_bytes(), GuestAddress(0x413))?;
    Ok(())
}

/// The byte that makes the sum of `bytes` zero (where it is still zero itself).
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// The I/O APIC pins with their ISA interrupts, in order of the pins.
fn routes(lines: &[u8]) -> Result<Vec<(u8, u8)>, MpTableError> {
    for &line in lines {
        if line == 0 || line == TIMER_PIN || line >= IOAPIC_PINS {
            return Err(MpTableError::Line(line));
        }
    }
    let isa = (1..16u8).map(|pin| if pin == TIMER_PIN { (pin, 0) } else { (pin, pin) });
    let above = (16..IOAPIC_PINS).filter(|pin| lines.contains(pin)).map(|pin| (pin, pin));
    Ok(isa.chain(above).collect())
}

fn build(vcpus: u8, lines: &[u8]) -> Result<Vec<u8>, MpTableError> {
    if vcpus == 0 || vcpus > VCPUS_MAX {
        return Err(MpTableError::Vcpus(vcpus));
    }
    let ioapic = vcpus;
    let mut entries: Vec<u8> = Vec::with_capacity(1024);
    let mut count: u16 = 0;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };

    for cpu in 0..vcpus {
        let mut entry = [0u8; 20];
        entry[1] = cpu;
        entry[2] = LAPIC_VERSION;
        entry[3] = CPU_ENABLED | if cpu == 0 { CPU_BOOT } else { 0 };
        // Family 6 with FPU, CX8 and APIC: nobody reads more than this, CPUID tells the truth.
        entry[4..8].copy_from_slice(&0x0600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x0301u32.to_le_bytes());
        push(&entry);
    }

    let mut bus = [1, ISA_BUS, 0, 0, 0, 0, 0, 0];
    bus[2..8].copy_from_slice(b"ISA   ");
    push(&bus);

    let mut apic = [2, ioapic, IOAPIC_VERSION, 1, 0, 0, 0, 0];
    apic[4..8].copy_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    push(&apic);

    for (pin, source) in routes(lines)? {
        push(&interrupt(3, TYPE_INT, EDGE_HIGH, source, ioapic, pin));
    }
    push(&interrupt(4, TYPE_EXTINT, CONFORM, 0, 0, 0));
    push(&interrupt(4, TYPE_NMI, CONFORM, 0, 0xff, 1));

    let length = HEADER_BYTES + entries.len();
    let mut table = vec![0u8; HEADER_BYTES];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&(length as u16).to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"COLDSPRK");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    Ok(table)
}

/// An interrupt (type 3) or local interrupt (type 4) entry.
fn interrupt(entry: u8, kind: u8, flags: u16, source: u8, apic: u8, pin: u8) -> [u8; 8] {
    let [low, high] = flags.to_le_bytes();
    [entry, kind, low, high, ISA_BUS, source, apic, pin]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory")
    }

    /// Finds and walks the table as FreeBSD does; returns the entries, refuses what FreeBSD would panic on.
    fn walk(memory: &GuestMemory) -> Vec<Vec<u8>> {
        let segment: u16 = memory.read_obj(GuestAddress(0x40e)).expect("BDA");
        let start = u64::from(segment) << 4;
        let pointer: [u8; 16] = memory.read_obj(GuestAddress(start)).expect("pointer");
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(pointer.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        assert_eq!(pointer[12] & 0x80, 0, "no IMCR");
        let address = u64::from(u32::from_le_bytes([pointer[4], pointer[5], pointer[6], pointer[7]]));
        let length: u16 = memory.read_obj(GuestAddress(address + 4)).expect("length");
        assert!(address + u64::from(length) <= 0xa_0000);
        let mut table = vec![0u8; length.into()];
        memory.read_slice(&mut table, GuestAddress(address)).expect("table");
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let count = u16::from_le_bytes([table[34], table[35]]);
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        for _ in 0..count {
            let size = match rest[0] {
                0 => 20,
                1..=4 => 8,
                other => panic!("FreeBSD panics on entry type {other}"),
            };
            entries.push(rest[..size].to_vec());
            rest = &rest[size..];
        }
        assert!(rest.is_empty(), "count and length disagree");
        entries
    }

    #[test]
    fn largest_machine_fits_and_parses() {
        let memory = memory();
        let lines: Vec<u8> = (5..24).collect();
        write(&memory, VCPUS_MAX, &lines).expect("fits");
        let entries = walk(&memory);
        let cpus: Vec<_> = entries.iter().filter(|e| e[0] == 0).collect();
        assert_eq!(cpus.len(), 32);
        assert_eq!(cpus.iter().filter(|e| e[3] & CPU_BOOT != 0).count(), 1);
        let ioapic = entries.iter().find(|e| e[0] == 2).expect("I/O APIC");
        assert_eq!(ioapic[1], 32);
        assert_eq!(ioapic[4..8], 0xfec0_0000u32.to_le_bytes());
    }

    #[test]
    fn timer_is_on_pin_2_and_every_line_is_edge() {
        let memory = memory();
        write(&memory, 1, &[5, 16, 23]).expect("fits");
        let interrupts: Vec<_> = walk(&memory).into_iter().filter(|e| e[0] == 3).collect();
        let pins: Vec<(u8, u8)> = interrupts.iter().map(|e| (e[5], e[7])).collect();
        assert!(pins.contains(&(0, 2)));
        assert!(pins.contains(&(4, 4)) && pins.contains(&(16, 16)) && pins.contains(&(23, 23)));
        assert!(!pins.iter().any(|(source, pin)| *source == 2 || *pin == 0 || *pin == 17));
        assert!(interrupts.iter().all(|e| e[2] == 5 && e[3] == 0 && e[1] == 0));
    }

    #[test]
    fn bad_machines_are_refused() {
        let memory = memory();
        assert!(matches!(write(&memory, 0, &[]), Err(MpTableError::Vcpus(0))));
        assert!(matches!(write(&memory, 33, &[]), Err(MpTableError::Vcpus(33))));
        for line in [0, 2, 24, 255] {
            assert!(matches!(write(&memory, 1, &[line]), Err(MpTableError::Line(l)) if l == line));
        }
        let small = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).expect("memory");
        assert!(matches!(write(&small, 1, &[]), Err(MpTableError::Memory(_))));
    }
}
