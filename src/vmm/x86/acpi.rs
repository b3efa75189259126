//! The smallest ACPI that a Linux of a distribution needs to find its CPUs and its virtio-mmio devices.
//!
//! Debian's kernels are built without MPTable support and without `virtio_mmio.device=` on the command line, so the
//! MADT and a DSDT are the only way to tell them. FreeBSD's FIRECRACKER kernels have ACPI off and read the MPTable
//! ([`super::mptable`]); these tables are written for Linux guests only.
//!
//! The machine is told to be hardware-reduced ACPI: no SCI, no PM timer, no fixed events, so that the VMM needs no
//! port of ACPI's. In that mode Linux wires no legacy interrupt by itself, which is why COM1 is a DSDT device too.
//! Touches guest memory only in [`TABLES_START`]..[`TABLES_END`]: the BIOS area, where an RSDP is also searched for.
//!
//! Facts: ACPI 6.4 (5.2.5 RSDP, 5.2.8 XSDT, 5.2.9 FADT, 5.2.12 MADT, 6.4 resource data, 20.2 AML grammar);
//! Linux `drivers/virtio/virtio_mmio.c` (HID LNRO0005), `arch/x86/kernel/acpi/boot.c`.

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::memory::GuestMemory;

/// First byte of the tables: the RSDP.
pub const TABLES_START: u64 = 0xe_0000;
/// End of the room for them.
pub const TABLES_END: u64 = 0x10_0000;
/// Most vCPUs described.
pub const VCPUS_MAX: u8 = 32;
/// Most virtio-mmio devices described (their AML names hold two hexadecimal digits).
pub const DEVICES_MAX: usize = 256;

const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// The interval timer (ISA interrupt 0) arrives at this pin, as the MPTable says.
const TIMER_PIN: u32 = 2;
const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_PIN: u32 = 4;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 0x06;

const RSDP_BYTES: usize = 36;
const HEADER_BYTES: usize = 36;
const FADT_BYTES: usize = 276;

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

/// Writes the tables for `vcpus` CPUs (APIC ids 0..vcpus), one I/O APIC with id `vcpus`, COM1 and `devices`.
/// Returns the RSDP's address: for `hvm_start_info.rsdp_paddr` or Linux's `boot_params.acpi_rsdp_addr`.
pub fn write(memory: &GuestMemory, vcpus: u8, devices: &[MmioDevice]) -> Result<u64, AcpiError> {
    let tables = build(vcpus, devices)?;
    if tables.len() as u64 > TABLES_END - TABLES_START {
        return Err(AcpiError::TooLarge(tables.len()));
    }
    memory.write_slice(&tables, GuestAddress(TABLES_START))?;
    Ok(TABLES_START)
}

/// All tables in one piece, to lie at [`TABLES_START`].
fn build(vcpus: u8, devices: &[MmioDevice]) -> Result<Vec<u8>, AcpiError> {
    if vcpus == 0 || vcpus > VCPUS_MAX {
        return Err(AcpiError::Vcpus(vcpus));
    }
    if devices.len() > DEVICES_MAX {
        return Err(AcpiError::Devices(devices.len()));
    }
    let mut tables = vec![0; RSDP_BYTES.next_multiple_of(16)];
    let mut place = |table: Vec<u8>| {
        let address = TABLES_START + tables.len() as u64;
        tables.extend(table);
        tables.resize(tables.len().next_multiple_of(16), 0);
        address
    };
    let dsdt = place(dsdt(devices)?);
    let fadt = place(fadt(dsdt));
    let madt = place(madt(vcpus));
    let mut entries = Vec::new();
    for address in [fadt, madt] {
        entries.extend(address.to_le_bytes());
    }
    let xsdt = place(table(b"XSDT", 1, entries));

    let mut rsdp = Vec::with_capacity(RSDP_BYTES);
    rsdp.extend(b"RSD PTR \0COLDSP\x02"); // Checksum 0 for now, OEM id, revision 2.
    rsdp.extend(0u32.to_le_bytes()); // No RSDT.
    rsdp.extend((RSDP_BYTES as u32).to_le_bytes());
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    // The first checksum covers the 20 bytes of revision 0, the second all of it.
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    tables[..RSDP_BYTES].copy_from_slice(&rsdp);
    Ok(tables)
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

// --- FADT, MADT ---

fn fadt(dsdt: u64) -> Vec<u8> {
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const PCIE_ASPM_OFF: u16 = 1 << 4;
    const WBINVD: u32 = 1;
    const RESET_REGISTER: u32 = 1 << 10;
    const HARDWARE_REDUCED: u32 = 1 << 20;
    const SYSTEM_IO: u8 = 1;
    const BYTE_ACCESS: u8 = 1;

    // Offsets are those of ACPI 6.4 table 5.9, counted from the start of the header.
    let mut body = vec![0u8; FADT_BYTES - HEADER_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER_BYTES..][..bytes.len()].copy_from_slice(bytes);
    };
    // No LEGACY_DEVICES, no 8042 flag: Linux then does not spend time looking for a keyboard.
    put(109, &(VGA_NOT_PRESENT | PCIE_ASPM_OFF).to_le_bytes());
    put(112, &(WBINVD | RESET_REGISTER | HARDWARE_REDUCED).to_le_bytes());
    put(116, &[SYSTEM_IO, 8, 0, BYTE_ACCESS]);
    put(120, &RESET_PORT.to_le_bytes());
    put(128, &[RESET_VALUE]);
    put(131, &[4]); // Minor version.
    put(140, &dsdt.to_le_bytes());
    put(268, b"COLDSPRK"); // Hypervisor vendor.
    table(b"FACP", 6, body)
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(LAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes()); // No 8259s.
    for id in 0..vcpus {
        // Local APIC: processor uid, APIC id, enabled.
        body.extend([0, 8, id, id]);
        body.extend(1u32.to_le_bytes());
    }
    body.extend([1, 12, vcpus, 0]);
    body.extend(IOAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes()); // First interrupt.
    // Source override: ISA interrupt 0 at the timer's pin.
    body.extend([2, 10, 0, 0]);
    body.extend(TIMER_PIN.to_le_bytes());
    body.extend(0u16.to_le_bytes());
    // NMI at LINT1 of all CPUs.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    table(b"APIC", 5, body)
}

// --- DSDT: a little AML ---

fn dsdt(devices: &[MmioDevice]) -> Result<Vec<u8>, AcpiError> {
    let mut scope = Vec::new();
    let mut resources = io_port(SERIAL_PORT, 8);
    resources.extend(interrupt(SERIAL_PIN));
    // PNP0501, a 16550, as a compressed EISA id.
    scope.extend(device(b"COM1", &[0x0c, 0x41, 0xd0, 0x05, 0x01], 0, resources));
    for (index, mmio) in devices.iter().enumerate() {
        let address = u32::try_from(mmio.address).map_err(|_| AcpiError::Window(mmio.address))?;
        let digit = |value: usize| b"0123456789ABCDEF"[value & 0xf];
        let mut resources = memory_window(address, mmio.bytes);
        resources.extend(interrupt(mmio.line));
        let name = [b'V', b'M', digit(index >> 4), digit(index)];
        scope.extend(device(&name, b"\x0dLNRO0005\0", index as u8, resources));
    }
    let mut aml = vec![0x10]; // Scope(\_SB_)
    aml.extend(package(&[b"\\_SB_".as_slice(), &scope].concat()));
    Ok(table(b"DSDT", 2, aml))
}

/// Device(NAME) { Name(_HID, hid) Name(_UID, uid) Name(_CCA, 1) Name(_CRS, ResourceTemplate) }.
fn device(name: &[u8; 4], hid: &[u8], uid: u8, mut resources: Vec<u8>) -> Vec<u8> {
    resources.extend([0x79, 0]); // End tag; a checksum of 0 is taken as right.
    let mut body = name.to_vec();
    body.extend(b"\x08_HID");
    body.extend(hid);
    body.extend(b"\x08_UID\x0a");
    body.push(uid);
    body.extend(b"\x08_CCA\x01");
    body.extend(b"\x08_CRS\x11");
    let mut buffer = vec![0x0b]; // Word constant: the buffer's size.
    buffer.extend((resources.len() as u16).to_le_bytes());
    buffer.extend(resources);
    body.extend(package(&buffer));
    [b"\x5b\x82".to_vec(), package(&body)].concat()
}

/// PkgLength and the bytes it counts (itself included): 20.2.4.
fn package(body: &[u8]) -> Vec<u8> {
    let mut package = match body.len() {
        length @ ..=62 => vec![length as u8 + 1],
        length @ ..=4093 => {
            let total = length + 2;
            vec![0x40 | (total & 0xf) as u8, (total >> 4) as u8]
        }
        length => {
            let total = length + 3;
            vec![0x80 | (total & 0xf) as u8, (total >> 4) as u8, (total >> 12) as u8]
        }
    };
    package.extend(body);
    package
}

/// Memory32Fixed, read-write.
fn memory_window(address: u32, bytes: u32) -> Vec<u8> {
    let mut descriptor = vec![0x86, 9, 0, 1];
    descriptor.extend(address.to_le_bytes());
    descriptor.extend(bytes.to_le_bytes());
    descriptor
}

/// Extended interrupt: consumer, edge, active high, exclusive.
fn interrupt(line: u32) -> Vec<u8> {
    let mut descriptor = vec![0x89, 6, 0, 0b0011, 1];
    descriptor.extend(line.to_le_bytes());
    descriptor
}

/// I/O port range, 16-bit decode.
fn io_port(port: u16, bytes: u8) -> Vec<u8> {
    let mut descriptor = vec![0x47, 1];
    descriptor.extend(port.to_le_bytes());
    descriptor.extend(port.to_le_bytes());
    descriptor.extend([1, bytes]);
    descriptor
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
        let tables = build(2, &[DISK]).unwrap();
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
            let tables = build(vcpus, &[]).unwrap();
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
    fn package_lengths_count_themselves_at_every_size() {
        for length in [0, 1, 62, 63, 64, 4093, 4094, 5000, 70000] {
            let (prefix, total) = package_length(&package(&vec![0; length]));
            assert_eq!(total, prefix + length);
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
            let table = dsdt(&devices).unwrap();
            let aml = &table[HEADER_BYTES..];
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
    fn what_cannot_be_described_is_refused() {
        assert!(matches!(build(0, &[]), Err(AcpiError::Vcpus(0))));
        assert!(matches!(build(33, &[]), Err(AcpiError::Vcpus(33))));
        assert!(matches!(build(1, &[DISK; 257]), Err(AcpiError::Devices(257))));
        let high = MmioDevice { address: 1 << 32, ..DISK };
        assert!(matches!(build(1, &[high]), Err(AcpiError::Window(0x1_0000_0000))));
        let small = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap();
        assert!(matches!(write(&small, 1, &[DISK]), Err(AcpiError::Memory(_))));
    }

    #[test]
    fn the_largest_machine_fits() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert_eq!(write(&memory, VCPUS_MAX, &[DISK; 64]).unwrap(), TABLES_START);
        assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(TABLES_START)).unwrap(), *b"RSD PTR ");
    }
}
