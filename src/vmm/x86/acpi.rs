//! ACPI tables: how a guest finds its CPUs, its devices and its power switch where it reads no MPTable.
//!
//! Two descriptions, one for each kind of machine:
//!
//! * [`write`]: the smallest ACPI that a Linux of a distribution needs to find its CPUs and its virtio-mmio devices, told
//!   to be hardware-reduced: no SCI, no PM timer, no fixed events. (Debian's kernels are built without MPTable support and
//!   without `virtio_mmio.device=`. FreeBSD's FIRECRACKER kernels have ACPI off and read the MPTable, [`super::mptable`].)
//!   In that mode Linux wires no legacy interrupt by itself, which is why COM1 is a DSDT device too.
//! * [`write_pc`]: a PC with PCI and ACPI's fixed hardware, for unmodified kernels such as FreeBSD's GENERIC.
//!
//! Touches guest memory only in [`TABLES_START`]..[`TABLES_END`]: the BIOS area, where an RSDP is also searched for.
//!
//! Facts: ACPI 6.4 (5.2.5 RSDP, 5.2.8 XSDT, 5.2.9 FADT, 5.2.10 FACS, 5.2.12 MADT); PCI Firmware 3.2, 4.1.2 (MCFG);
//! Linux `arch/x86/kernel/acpi/boot.c`; FreeBSD `sys/x86/acpica/madt.c`, `sys/dev/acpica`.

#![forbid(unsafe_code)]

mod dsdt;

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::chipset::AgentPort;
use crate::vmm::chipset::pci::{ECAM_BYTES, ECAM_START};
use crate::vmm::chipset::power;
use crate::vmm::memory::GuestMemory;
use crate::vmm::random;

/// First byte of the tables: the RSDP.
pub const TABLES_START: u64 = 0xe_0000;
/// End of the room for them.
pub const TABLES_END: u64 = 0x10_0000;
/// A PC's generation id, 16 bytes in a page of their own: random, and others in each clone.
pub const GENERATION_START: u64 = TABLES_END - 0x1000;
const GENERATION_BYTES: usize = 16;
/// Most vCPUs described.
pub const VCPUS_MAX: u8 = 32;
/// Most virtio-mmio devices described (their AML names hold two hexadecimal digits).
pub const DEVICES_MAX: usize = 256;

const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// The interval timer (ISA interrupt 0) arrives at this pin, as the MPTable says.
const TIMER_PIN: u32 = 2;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 0x06;

const RSDP_BYTES: usize = 36;
const HEADER_BYTES: usize = 36;
const FADT_BYTES: usize = 276;
const FACS_BYTES: usize = 64;

/// Fixed feature flags of the FADT (table 5.10).
mod flag {
    pub const WBINVD: u32 = 1;
    /// C1 on all CPUs.
    pub const PROC_C1: u32 = 1 << 2;
    /// No fixed sleep button. (The bit for the power button is clear: that one is there.)
    pub const NO_SLEEP_BUTTON: u32 = 1 << 5;
    /// The clock's alarm does not wake by a fixed event.
    pub const NO_FIXED_RTC: u32 = 1 << 6;
    /// The PM timer has 32 bits.
    pub const TIMER_32_BITS: u32 = 1 << 8;
    pub const RESET_REGISTER: u32 = 1 << 10;
    pub const HARDWARE_REDUCED: u32 = 1 << 20;
}

/// Boot architecture flags of the FADT (table 5.11).
mod boot_flag {
    pub const LEGACY_DEVICES: u16 = 1;
    pub const VGA_NOT_PRESENT: u16 = 1 << 2;
    pub const PCIE_ASPM_OFF: u16 = 1 << 4;
}

/// What is wrong with the machine that was to be described.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("{0} vCPUs: the ACPI tables describe 1 to {VCPUS_MAX}")]
    Vcpus(u8),
    #[error("{0} virtio devices: the ACPI tables describe at most {DEVICES_MAX}")]
    Devices(usize),
    #[error("virtio device at {0:#x}: ACPI's 32-bit windows lie below 4 GiB")]
    Window(u64),
    #[error("ACPI tables do not fit between 896 KiB and 1 MiB: {0} bytes; use fewer vCPUs or devices")]
    TooLarge(usize),
    #[error("ACPI tables cannot be written at {TABLES_START:#x}: give the VM at least 2 MiB of memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("the host has no random numbers: {0}")]
    Random(std::io::Error),
}

/// One virtio-mmio window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address, below 4 GiB.
    pub address: u64,
    pub bytes: u32,
    /// I/O APIC pin; edge-triggered, active high.
    pub line: u32,
}

/// Writes the tables for `vcpus` CPUs (APIC ids 0..vcpus), one I/O APIC with id `vcpus`, COM1, `agent`'s COM2 and `devices`.
/// Returns the RSDP's address: for `hvm_start_info.rsdp_paddr` or Linux's `boot_params.acpi_rsdp_addr`.
pub fn write(
    memory: &GuestMemory,
    vcpus: u8,
    agent: AgentPort,
    devices: &[MmioDevice],
) -> Result<u64, AcpiError> {
    put(memory, &build(vcpus, agent, devices)?)
}

/// Writes the tables of a PC for `vcpus` CPUs (APIC ids 0..vcpus) and one I/O APIC with id `vcpus`. Returns the RSDP's
/// address.
pub fn write_pc(memory: &GuestMemory, vcpus: u8, agent: AgentPort) -> Result<u64, AcpiError> {
    let tables = build_pc(vcpus, agent)?;
    if tables.len() as u64 > GENERATION_START - TABLES_START {
        return Err(AcpiError::TooLarge(tables.len()));
    }
    renew_generation(memory)?;
    put(memory, &tables)
}

/// Gives a PC another generation id.
pub fn renew_generation(memory: &GuestMemory) -> Result<(), AcpiError> {
    let mut id = [0; GENERATION_BYTES];
    random::fill(&mut id).map_err(AcpiError::Random)?;
    memory.write_slice(&id, GuestAddress(GENERATION_START))?;
    Ok(())
}

fn put(memory: &GuestMemory, tables: &[u8]) -> Result<u64, AcpiError> {
    if tables.len() as u64 > TABLES_END - TABLES_START {
        return Err(AcpiError::TooLarge(tables.len()));
    }
    memory.write_slice(tables, GuestAddress(TABLES_START))?;
    Ok(TABLES_START)
}

fn check_vcpus(vcpus: u8) -> Result<(), AcpiError> {
    match (1..=VCPUS_MAX).contains(&vcpus) {
        true => Ok(()),
        false => Err(AcpiError::Vcpus(vcpus)),
    }
}

/// All tables in one piece, to lie at [`TABLES_START`].
fn build(vcpus: u8, agent: AgentPort, devices: &[MmioDevice]) -> Result<Vec<u8>, AcpiError> {
    check_vcpus(vcpus)?;
    if devices.len() > DEVICES_MAX {
        return Err(AcpiError::Devices(devices.len()));
    }
    let mut tables = Tables::new();
    let dsdt = tables.place(table(b"DSDT", 2, dsdt::reduced(agent, devices)?));
    let fadt = tables.place(fadt_reduced(dsdt));
    let madt = tables.place(madt(vcpus, false));
    Ok(tables.finish(&[fadt, madt]))
}

fn build_pc(vcpus: u8, agent: AgentPort) -> Result<Vec<u8>, AcpiError> {
    check_vcpus(vcpus)?;
    let mut tables = Tables::new();
    let facs = tables.place(facs());
    let dsdt = tables.place(table(b"DSDT", 2, dsdt::pc(agent)));
    let fadt = tables.place(fadt_pc(facs, dsdt));
    let madt = tables.place(madt(vcpus, true));
    let mcfg = tables.place(mcfg());
    Ok(tables.finish(&[fadt, madt, mcfg]))
}

/// Tables one after the other, behind the room for the RSDP.
struct Tables(Vec<u8>);

impl Tables {
    /// What the FACS wants, and the others do not mind.
    const ALIGNMENT: usize = 64;

    fn new() -> Self {
        Tables(vec![0; RSDP_BYTES.next_multiple_of(Self::ALIGNMENT)])
    }

    /// Returns the table's address.
    fn place(&mut self, table: Vec<u8>) -> u64 {
        let address = TABLES_START + self.0.len() as u64;
        self.0.extend(table);
        self.0.resize(self.0.len().next_multiple_of(Self::ALIGNMENT), 0);
        address
    }

    /// With an XSDT of `entries`, and the RSDP.
    fn finish(mut self, entries: &[u64]) -> Vec<u8> {
        let xsdt =
            self.place(table(b"XSDT", 1, entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()));
        let mut rsdp = Vec::with_capacity(RSDP_BYTES);
        rsdp.extend(b"RSD PTR \0COLDSP\x02"); // Checksum 0 for now, OEM id, revision 2.
        rsdp.extend(0u32.to_le_bytes()); // No RSDT.
        rsdp.extend((RSDP_BYTES as u32).to_le_bytes());
        rsdp.extend(xsdt.to_le_bytes());
        rsdp.extend([0; 4]);
        // The first checksum covers the 20 bytes of revision 0, the second all of it.
        rsdp[8] = checksum(&rsdp[..20]);
        rsdp[32] = checksum(&rsdp);
        self.0[..RSDP_BYTES].copy_from_slice(&rsdp);
        self.0
    }
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// A system description table: the header before `body`.
fn table(signature: &[u8; 4], revision: u8, body: Vec<u8>) -> Vec<u8> {
    let mut table = Vec::with_capacity(HEADER_BYTES + body.len());
    table.extend(signature);
    table.extend(((HEADER_BYTES + body.len()) as u32).to_le_bytes());
    table.extend([revision, 0]);
    table.extend(b"COLDSP");
    table.extend(b"COLDSPRK");
    table.extend(1u32.to_le_bytes());
    table.extend(b"CLDS");
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[9] = checksum(&table);
    table
}

/// The fields of a FADT by their offsets in ACPI 6.4 table 5.9, counted from the start of the header.
struct Fadt(Vec<u8>);

impl Fadt {
    /// What both descriptions have: the reset register, no VGA, no 8042 (kernels then do not look for a keyboard).
    fn new(flags: u32, boot_flags: u16, dsdt: u64) -> Self {
        let mut fadt = Fadt(vec![0u8; FADT_BYTES - HEADER_BYTES]);
        let boot_flags = boot_flags | boot_flag::VGA_NOT_PRESENT | boot_flag::PCIE_ASPM_OFF;
        fadt.put(109, &boot_flags.to_le_bytes());
        fadt.put(112, &(flags | flag::WBINVD | flag::RESET_REGISTER).to_le_bytes());
        fadt.put(116, &io_register(RESET_PORT, 8, 1));
        fadt.put(128, &[RESET_VALUE]);
        fadt.put(131, &[4]); // Minor version.
        fadt.put(140, &dsdt.to_le_bytes());
        fadt.put(268, b"COLDSPRK"); // Hypervisor vendor.
        fadt
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset - HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
    }

    fn finish(self) -> Vec<u8> {
        table(b"FACP", 6, self.0)
    }
}

/// Generic address of ports: `access` 0 says nothing, 1 bytes.
fn io_register(port: u64, bits: u8, access: u8) -> [u8; 12] {
    const SYSTEM_IO: u8 = 1;
    let mut register = [0; 12];
    register[..4].copy_from_slice(&[SYSTEM_IO, bits, 0, access]);
    register[4..].copy_from_slice(&port.to_le_bytes());
    register
}

fn fadt_reduced(dsdt: u64) -> Vec<u8> {
    Fadt::new(flag::HARDWARE_REDUCED, 0, dsdt).finish()
}

fn fadt_pc(facs: u64, dsdt: u64) -> Vec<u8> {
    let flags = flag::PROC_C1 | flag::NO_SLEEP_BUTTON | flag::NO_FIXED_RTC | flag::TIMER_32_BITS;
    let mut fadt = Fadt::new(flags, boot_flag::LEGACY_DEVICES, dsdt);
    // Tables lie below 1 MiB, so the 32-bit fields hold their addresses.
    fadt.put(36, &(facs as u32).to_le_bytes());
    fadt.put(40, &(dsdt as u32).to_le_bytes());
    fadt.put(46, &u16::from(power::SCI).to_le_bytes());
    // No SMI command: ACPI is on from the start. Each block twice: as a port, and as a generic address.
    for (offset, wide_offset, length_offset, port, bytes) in [
        (56, 148, 88, power::PM1_EVENT, power::PM1_EVENT_BYTES),
        (64, 172, 89, power::PM1_CONTROL, power::PM1_CONTROL_BYTES),
        (76, 208, 91, power::PM_TIMER, power::PM_TIMER_BYTES),
        (80, 220, 92, power::EVENTS_BLOCK, power::EVENTS_BLOCK_BYTES),
    ] {
        fadt.put(offset, &u32::from(port).to_le_bytes());
        fadt.put(length_offset, &[bytes]);
        fadt.put(wide_offset, &io_register(port.into(), bytes * 8, 0));
    }
    // Latencies that mean: no C2, no C3.
    fadt.put(96, &101u16.to_le_bytes());
    fadt.put(98, &1001u16.to_le_bytes());
    fadt.put(108, &[0x32]); // The clock's century.
    fadt.finish()
}

/// Firmware's and the kernel's shared words; the kernel writes to them (the global lock).
fn facs() -> Vec<u8> {
    let mut facs = b"FACS".to_vec();
    facs.extend((FACS_BYTES as u32).to_le_bytes());
    facs.resize(FACS_BYTES, 0);
    facs[32] = 2; // Version.
    facs
}

fn madt(vcpus: u8, pc: bool) -> Vec<u8> {
    /// The 8259s are there (and masked).
    const PCAT_COMPATIBLE: u32 = 1;
    /// Active high, level-triggered.
    const LEVEL_HIGH: u16 = 0b1101;

    let mut body = Vec::new();
    body.extend(LAPIC_ADDRESS.to_le_bytes());
    body.extend(if pc { PCAT_COMPATIBLE } else { 0 }.to_le_bytes());
    for id in 0..vcpus {
        // Local APIC: processor uid, APIC id, enabled.
        body.extend([0, 8, id, id]);
        body.extend(1u32.to_le_bytes());
    }
    body.extend([1, 12, vcpus, 0]);
    body.extend(IOAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes()); // First interrupt.
    // Source overrides: ISA interrupt 0 at the timer's pin; the SCI is no edge.
    let mut source = |isa: u8, pin: u32, flags: u16| {
        body.extend([2, 10, 0, isa]);
        body.extend(pin.to_le_bytes());
        body.extend(flags.to_le_bytes());
    };
    source(0, TIMER_PIN, 0);
    if pc {
        source(power::SCI, power::SCI.into(), LEVEL_HIGH);
    }
    // NMI at LINT1 of all CPUs.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, body)
}

fn mcfg() -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(ECAM_START.to_le_bytes());
    let buses = (ECAM_BYTES >> 20) as u8;
    body.extend([0, 0, 0, buses - 1, 0, 0, 0, 0]); // Segment 0, first and last bus.
    table(b"MCFG", 1, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: MmioDevice = MmioDevice { address: 0xd000_0000, bytes: 0x1000, line: 5 };

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at a guest address, its checksum proved.
    fn table_at(tables: &[u8], address: u64) -> &[u8] {
        let start = (address - TABLES_START) as usize;
        let length = u32_at(tables, start + 4) as usize;
        let table = &tables[start..start + length];
        assert_eq!(sum(table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
        table
    }

    #[test]
    fn a_reader_gets_from_the_rsdp_to_every_table() {
        let tables = build(2, AgentPort::Virtio, &[DISK]).unwrap();
        assert_eq!(&tables[..8], b"RSD PTR ");
        assert_eq!(sum(&tables[..20]), 0);
        assert_eq!(sum(&tables[..36]), 0);
        let xsdt = table_at(&tables, u64_at(&tables, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table_at(&tables, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], fadt.len()), (b"FACP".as_slice(), 276));
        assert_ne!(u32_at(fadt, 112) & 1 << 20, 0, "hardware-reduced");
        let madt = table_at(&tables, u64_at(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(&table_at(&tables, u64_at(fadt, 140))[..4], b"DSDT");
    }

    #[test]
    fn the_madt_counts_cpus() {
        for vcpus in [1, 2, 32] {
            let tables = build(vcpus, AgentPort::Virtio, &[]).unwrap();
            let xsdt = table_at(&tables, u64_at(&tables, 24));
            let madt = table_at(&tables, u64_at(xsdt, 44));
            let (mut at, mut cpus, mut ioapics) = (44, Vec::new(), Vec::new());
            while at < madt.len() {
                match madt[at] {
                    0 => cpus.push(madt[at + 3]),
                    1 => ioapics.push(madt[at + 2]),
                    _ => {}
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            assert_eq!(cpus, (0..vcpus).collect::<Vec<_>>());
            assert_eq!(ioapics, [vcpus]);
        }
    }

    #[test]
    fn a_pc_has_its_fixed_hardware_and_its_facs() {
        let tables = build_pc(4, AgentPort::Virtio).unwrap();
        let xsdt = table_at(&tables, u64_at(&tables, 24));
        let found: Vec<&[u8]> =
            (36..xsdt.len()).step_by(8).map(|at| table_at(&tables, u64_at(xsdt, at))).collect();
        let [fadt, madt, mcfg] = found[..] else { panic!("{} tables", found.len()) };
        assert_eq!([&fadt[..4], &madt[..4], &mcfg[..4]], [b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(u32_at(fadt, 112) & flag::HARDWARE_REDUCED, 0);
        assert_eq!(u32_at(fadt, 56), 0x600);
        assert_eq!((u32_at(fadt, 64), u32_at(fadt, 76), u32_at(fadt, 80)), (0x604, 0x608, 0x60c));
        assert_eq!(fadt[92], 2, "a byte of status, a byte of enable");
        assert_eq!(u64_at(fadt, 176), 0x604, "as a generic address");
        assert_eq!(u32_at(fadt, 48), 0, "no SMI command");
        let facs = u64::from(u32_at(fadt, 36));
        assert!(facs.is_multiple_of(64));
        assert_eq!(&tables[(facs - TABLES_START) as usize..][..4], b"FACS");
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        assert_eq!(&table_at(&tables, u64_at(fadt, 140))[..4], b"DSDT");
        assert_eq!(u64_at(mcfg, 44), ECAM_START);
        let sci = [2, 10, 0, 9, 9, 0, 0, 0, 0b1101, 0];
        assert!(madt.windows(sci.len()).any(|window| window == sci));
    }

    /// Decodes a PkgLength; returns (bytes of the length itself, length).
    fn package_length(aml: &[u8]) -> (usize, usize) {
        match aml[0] >> 6 {
            0 => (1, usize::from(aml[0] & 0x3f)),
            more => {
                let more = usize::from(more);
                let high: usize = (1..=more).map(|i| usize::from(aml[i]) << (4 + 8 * (i - 1))).sum();
                (1 + more, usize::from(aml[0] & 0xf) | high)
            }
        }
    }

    #[test]
    fn every_device_is_in_the_dsdt_with_its_window_and_line() {
        for count in [0usize, 1, 8, 40] {
            let devices: Vec<_> = (0..count as u32)
                .map(|n| MmioDevice {
                    address: 0xd000_0000 + u64::from(n) * 0x1000,
                    bytes: 0x1000,
                    line: 5 + n,
                })
                .collect();
            let aml = dsdt::reduced(AgentPort::Virtio, &devices).unwrap();
            assert_eq!(aml[0], 0x10);
            let (prefix, total) = package_length(&aml[1..]);
            assert_eq!(total, aml.len() - 1);
            let mut at = 1 + prefix;
            assert_eq!(&aml[at..at + 5], b"\\_SB_");
            at += 5;
            let mut seen = Vec::new();
            while at < aml.len() {
                assert_eq!(&aml[at..at + 2], b"\x5b\x82");
                let (prefix, total) = package_length(&aml[at + 2..]);
                let body = &aml[at + 2 + prefix..at + 2 + total];
                if body.windows(8).any(|window| window == b"LNRO0005") {
                    let memory = body.windows(4).position(|window| window == [0x86, 9, 0, 1]).unwrap();
                    let line = body.windows(5).position(|window| window == [0x89, 6, 0, 3, 1]).unwrap();
                    seen.push((u32_at(body, memory + 4), u32_at(body, line + 5)));
                    assert_eq!(&body[body.len() - 2..], [0x79, 0]);
                }
                at += 2 + total;
            }
            assert_eq!(seen, devices.iter().map(|d| (d.address as u32, d.line)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn each_machine_has_a_generation_of_its_own() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let id = || memory.read_obj::<[u8; GENERATION_BYTES]>(GuestAddress(GENERATION_START)).unwrap();
        write_pc(&memory, VCPUS_MAX, AgentPort::Virtio).unwrap();
        let first = id();
        renew_generation(&memory).unwrap();
        assert!(first != [0; 16] && id() != first);
    }

    #[test]
    fn what_cannot_be_described_is_refused() {
        assert!(matches!(build(0, AgentPort::Virtio, &[]), Err(AcpiError::Vcpus(0))));
        assert!(matches!(build(33, AgentPort::Virtio, &[]), Err(AcpiError::Vcpus(33))));
        assert!(matches!(build(1, AgentPort::Virtio, &[DISK; 257]), Err(AcpiError::Devices(257))));
        let high = MmioDevice { address: 1 << 32, ..DISK };
        assert!(matches!(build(1, AgentPort::Virtio, &[high]), Err(AcpiError::Window(0x1_0000_0000))));
        let small = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap();
        assert!(matches!(write(&small, 1, AgentPort::Virtio, &[DISK]), Err(AcpiError::Memory(_))));
        assert!(matches!(write_pc(&small, 1, AgentPort::Virtio), Err(AcpiError::Memory(_))));
        assert!(matches!(build_pc(0, AgentPort::Virtio), Err(AcpiError::Vcpus(0))));
    }

    #[test]
    fn the_largest_machine_fits() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert_eq!(write(&memory, VCPUS_MAX, AgentPort::Virtio, &[DISK; 64]).unwrap(), TABLES_START);
        assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(TABLES_START)).unwrap(), *b"RSD PTR ");
    }
}
