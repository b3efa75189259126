//! The DSDTs: devices that announce themselves by nothing else, as AML.
//!
//! Facts: ACPI 6.4, 6.1.5 (_HID), 6.2.2 (_CRS), 6.2.13 (_PRT), 7.4.2.6 (\_S5); Linux `drivers/virtio/virtio_mmio.c` (HID
//! LNRO0005); FreeBSD `sys/dev/acpica/acpi_pcib_acpi.c`, `acpi_pcib.c` (_PRT).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, PackageBuilder, Path, ResourceTemplate, Scope,
};

use super::{AcpiError, GENERATION_START, MmioDevice};
use crate::vmm::chipset::pci::{
    ECAM_BYTES, ECAM_START, IO_END, IO_START, MEMORY_END, MEMORY_START, SLOTS, intx_pin,
};
use crate::vmm::chipset::power;
use crate::vmm::chipset::{self, AgentPort};

/// Name, number, ports, line.
type SerialPort = (&'static str, u8, u16, u32);
const COM1: SerialPort = ("COM1", 0, 0x3f8, chipset::SERIAL_PIN as u32);
const COM2: SerialPort = ("COM2", 1, 0x2f8, chipset::AGENT_PIN as u32);

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// Device(name) { _HID, _UID, then `more` and _CRS of `resources` }.
fn device(
    name: &str,
    hid: &dyn Aml,
    uid: u8,
    more: &[(&str, &dyn Aml)],
    resources: Vec<&dyn Aml>,
) -> Vec<u8> {
    let template = ResourceTemplate::new(resources);
    let mut names = vec![Name::new("_HID".into(), hid), Name::new("_UID".into(), &uid)];
    names.extend(more.iter().map(|(name, value)| Name::new((*name).into(), *value)));
    names.push(Name::new("_CRS".into(), &template));
    bytes(&Device::new(name.into(), names.iter().map(|name| name as &dyn Aml).collect()))
}

/// An edge-triggered, active-high interrupt of its own.
fn edge(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

/// COM1, and COM2 if there is one: 16550s.
fn serial(agent: AgentPort) -> Vec<u8> {
    let port = |(name, number, start, pin): SerialPort| {
        let ports = IO::new(start, start, 1, 8);
        device(name, &EISAName::new("PNP0501"), number, &[], vec![&ports, &edge(pin)])
    };
    let mut aml = port(COM1);
    if agent == AgentPort::Serial {
        aml.extend(port(COM2));
    }
    aml
}

/// The serial ports and the virtio-mmio devices.
pub fn reduced(agent: AgentPort, devices: &[MmioDevice]) -> Result<Vec<u8>, AcpiError> {
    let mut scope = serial(agent);
    for (index, mmio) in devices.iter().enumerate() {
        let address = u32::try_from(mmio.address).map_err(|_| AcpiError::Window(mmio.address))?;
        let window = Memory32Fixed::new(true, address, mmio.bytes);
        let name = format!("VM{index:02X}");
        // The device is cache-coherent: without saying so Linux takes it for one that cannot do DMA.
        let coherent: &[(&str, &dyn Aml)] = &[("_CCA", &1u8)];
        scope.extend(device(&name, &"LNRO0005", index as u8, coherent, vec![&window, &edge(mmio.line)]));
    }
    Ok(Scope::raw("\\_SB_".into(), scope))
}

/// A PC: \_S5, the host bridge with its interrupt table, and what lies on the board.
pub fn pc(agent: AgentPort) -> Vec<u8> {
    // Sleep types for PM1a and PM1b control, two reserved.
    let off = power::SLEEP_TYPE_S5;
    let mut aml = bytes(&Name::new("\\_S5_".into(), &Package::new(vec![&off, &off, &0u8, &0u8])));
    let mut scope = host_bridge();
    scope.extend(serial(agent));
    let clock = IO::new(0x70, 0x70, 1, 2);
    scope.extend(device("RTC_", &EISAName::new("PNP0B00"), 0, &[], vec![&clock]));
    let timer = IO::new(0x40, 0x40, 1, 4);
    scope.extend(device("TIMR", &EISAName::new("PNP0100"), 0, &[], vec![&timer, &edge(0)]));
    // Not to be given to anybody: Linux uses the memory-mapped configuration space only if it is reserved here.
    let ecam = Memory32Fixed::new(true, ECAM_START as u32, ECAM_BYTES as u32);
    let block = IO::new(power::PORTS_START, power::PORTS_START, 1, power::PORTS as u8);
    scope.extend(device("MBRD", &EISAName::new("PNP0C02"), 0, &[], vec![&ecam, &block]));
    scope.extend(generation());
    aml.extend(Scope::raw("\\_SB_".into(), scope));
    aml.extend(generation_event());
    aml
}

/// The generation id: where it is, for drivers that know it by this compatible id.
fn generation() -> Vec<u8> {
    let (low, high) = (GENERATION_START as u32, (GENERATION_START >> 32) as u32);
    let place = Package::new(vec![&low, &high]);
    let names = [
        Name::new("_HID".into(), &"CLDS0001"),
        Name::new("_CID".into(), &"VM_Gen_Counter"),
        Name::new("_DDN".into(), &"VM_Gen_Counter"),
        Name::new("ADDR".into(), &place),
    ];
    bytes(&Device::new("VGEN".into(), names.iter().map(|name| name as &dyn Aml).collect()))
}

/// `Scope(\_GPE) { Method(_E00) { Notify(\_SB.VGEN, 0x80) } }`: what event 0 leads to.
fn generation_event() -> Vec<u8> {
    /// Status changed.
    const CHANGED: u8 = 0x80;
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &CHANGED);
    let name = format!("_E{:02X}", power::GENERATION_EVENT);
    let method = Method::new(name.as_str().into(), 0, false, vec![&notify]);
    Scope::raw("\\_GPE".into(), bytes(&method))
}

fn host_bridge() -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, 0);
    let mechanism = IO::new(0xcf8, 0xcf8, 1, 8);
    let io = AddressSpace::new_io(IO_START as u16, (IO_END - 1) as u16, None);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        MEMORY_START as u32,
        (MEMORY_END - 1) as u32,
        None,
    );
    // Device and any function, INTA, wired to this interrupt.
    let mut routes = PackageBuilder::new();
    for slot in 1..SLOTS {
        let address = (slot as u32) << 16 | 0xffff;
        routes.add_element(&Package::new(vec![&address, &0u8, &0u8, &intx_pin(slot)]));
    }
    let compatible = EISAName::new("PNP0A03");
    let more: &[(&str, &dyn Aml)] =
        &[("_CID", &compatible), ("_SEG", &0u8), ("_BBN", &0u8), ("_CCA", &1u8), ("_PRT", &routes)];
    device("PCI0", &EISAName::new("PNP0A08"), 0, more, vec![&buses, &mechanism, &io, &memory])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pc_says_how_to_power_off_and_where_interrupts_go() {
        let aml = pc(AgentPort::Virtio);
        // Name(\_S5_, Package(4) {5, 5, 0, 0})
        assert_eq!(&aml[..14], b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\0");
        // Package(4) {0x0001ffff, 0, 0, 17}
        let route = b"\x12\x0b\x04\x0c\xff\xff\x01\x00\0\0\x0a\x11";
        assert!(aml.windows(route.len()).any(|window| window == route));
        // Notify(\\_SB.VGEN, 0x80), and the id's address as a package of two halves.
        let notify = b"\x86\\\x2e_SB_VGEN\x0a\x80";
        assert!(aml.windows(notify.len()).any(|window| window == notify));
        let place = b"ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x00";
        assert!(aml.windows(place.len()).any(|window| window == place));
        let routes = aml.windows(5).filter(|window| window[0] == 0x0c && window[1..3] == [0xff; 2]);
        assert_eq!(routes.count(), SLOTS - 1);
    }

    #[test]
    fn the_agents_serial_port_is_told_of_only_if_it_is_there() {
        // IO(Decode16, 0x2f8, 0x2f8, 1, 8), and an edge of line 3.
        let ports = b"\x47\x01\xf8\x02\xf8\x02\x01\x08\x89\x06\x00\x03\x01\x03\x00\x00\x00";
        let told = |aml: &[u8]| aml.windows(ports.len()).filter(|window| window == ports).count();
        assert_eq!((told(&pc(AgentPort::Virtio)), told(&pc(AgentPort::Serial))), (0, 1));
        let reduced = |agent| super::reduced(agent, &[]).unwrap();
        assert_eq!((told(&reduced(AgentPort::Virtio)), told(&reduced(AgentPort::Serial))), (0, 1));
    }
}
