//! The bus with functions that remember what they were told.

use proptest::prelude::*;

use super::config::COMMAND_MEMORY;
use super::*;

const START: u32 = 0xc100_0000;

/// A function with one memory and one I/O window that hold what is written to them.
struct Memory {
    config: Mutex<ConfigSpace>,
    bytes: Mutex<[u8; 0x1000]>,
}

impl Function for Memory {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: usize, data: &[u8]) -> bool {
        self.config.lock().unwrap().write(offset, data)
    }
    fn window(&self, bar: usize) -> Option<Window> {
        self.config.lock().unwrap().window(bar)
    }
    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        let start = offset as usize + bar * 0x800;
        data.copy_from_slice(&self.bytes.lock().unwrap()[start..][..data.len()]);
    }
    fn write(&self, bar: usize, offset: u64, data: &[u8]) {
        let start = offset as usize + bar * 0x800;
        self.bytes.lock().unwrap()[start..][..data.len()].copy_from_slice(data);
    }
}

fn bus() -> PciBus {
    let function = |slot: u32| -> Arc<dyn Function> {
        let mut config = ConfigSpace::new(Identity { device: slot as u16, ..BRIDGE });
        config.add_bar(0, Space::Memory, 0x800, START + slot * 0x1000);
        config.add_bar(1, Space::Io, 0x40, 0xc000 + slot * 0x40);
        Arc::new(Memory { config: Mutex::new(config), bytes: Mutex::new([0; 0x1000]) })
    };
    PciBus::new(vec![function(1), function(2)])
}

fn select(bus: &PciBus, slot: u32, register: u32) {
    assert!(bus.port_write(0xcf8, &(1 << 31 | slot << 11 | register).to_le_bytes()));
}

fn data(bus: &PciBus, port: u16, bytes: usize) -> u32 {
    let mut data = [0u8; 4];
    assert!(bus.port_read(port, &mut data[..bytes]));
    u32::from_le_bytes(data)
}

#[test]
fn both_mechanisms_show_the_same_registers() {
    let bus = bus();
    for slot in 0..4u32 {
        for register in (0..256).step_by(4) {
            select(&bus, slot, register);
            let mut mapped = [0; 4];
            assert!(bus.memory_read(ECAM_START + u64::from(slot << 15 | register), &mut mapped));
            assert_eq!(
                data(&bus, 0xcfc, 4),
                u32::from_le_bytes(mapped),
                "device {slot} register {register:#x}"
            );
            assert_eq!(data(&bus, 0xcfe, 2), u32::from_le_bytes(mapped) >> 16);
            assert_eq!(data(&bus, 0xcff, 1), u32::from_le_bytes(mapped) >> 24);
        }
    }
    select(&bus, 0, 0);
    assert_eq!(data(&bus, 0xcfc, 4), 0x0008_1b36);
    select(&bus, 3, 0);
    assert_eq!(data(&bus, 0xcfc, 4), u32::MAX, "nobody");
    // Another function, another bus, the mechanism switched off.
    for address in [1 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 1 << 16, 1 << 11] {
        bus.port_write(0xcf8, &u32::to_le_bytes(address));
        assert_eq!(data(&bus, 0xcfc, 4), u32::MAX);
    }
    let mut extended = [0xee; 4];
    assert!(bus.memory_read(ECAM_START + 0x100, &mut extended));
    assert_eq!(extended, [0; 4], "no extended capabilities");
    // The reset port lies in the middle of the address register.
    assert!(!bus.port_write(0xcf9, &[6]) && !bus.port_read(0xcf9, &mut [0]));
}

#[test]
fn a_moved_window_is_found_at_its_new_place_only() {
    let bus = bus();
    let old = u64::from(START) + 0x1000;
    assert!(bus.memory_write(old + 8, &[1, 2, 3, 4]));
    select(&bus, 1, 0x10);
    bus.port_write(0xcfc, &0xd000_0000u32.to_le_bytes());
    let mut value = [0; 4];
    assert!(!bus.memory_read(old + 8, &mut value));
    assert!(bus.memory_read(0xd000_0008, &mut value));
    assert_eq!(value, [1, 2, 3, 4]);
    assert!(!bus.memory_read(0xd000_07fe, &mut value), "over the window's end");
    // Ports, too.
    assert!(bus.port_write(0xc044, &[7]) && !bus.port_write(0xc0c0, &[7]));
    // Decoding off.
    bus.memory_write(ECAM_START + (1 << 15) + 4, &[0, 0]);
    assert!(!bus.memory_read(0xd000_0008, &mut value) && !bus.port_write(0xc044, &[7]));
    bus.memory_write(ECAM_START + (1 << 15) + 4, &COMMAND_MEMORY.to_le_bytes());
    assert!(bus.memory_read(0xd000_0008, &mut value));
}

#[test]
fn a_window_outside_the_bridges_is_not_decoded() {
    let bus = bus();
    for address in [0u32, 0x10_0000, 0xbfff_f800, 0xe000_0000, 0xfec0_0000, 0xfee0_0000, 0xffff_f800] {
        select(&bus, 1, 0x10);
        bus.port_write(0xcfc, &address.to_le_bytes());
        assert_eq!(data(&bus, 0xcfc, 4), address, "the register takes any address");
        let hit = bus.target(Space::Memory, address.into(), 1);
        assert!(hit.is_none(), "at {address:#x}");
    }
    for port in [0x20u32, 0x3f8, 0xfc0] {
        select(&bus, 1, 0x14);
        bus.port_write(0xcfc, &port.to_le_bytes());
        assert!(!bus.port_write(port as u16, &[0xfe]));
    }
}

#[test]
fn saved_registers_bring_the_windows_back() {
    let bus_a = bus();
    select(&bus_a, 1, 0x10);
    bus_a.port_write(0xcfc, &0xd000_0000u32.to_le_bytes());
    let (address, bridge) = bus_a.save();
    let bus_b = bus();
    let mut registers = [0; 256];
    bus_a.functions[0].config_read(0, &mut registers);
    bus_b.functions[0].config_write(0, &registers);
    bus_b.restore(address, &bridge).unwrap();
    assert!(bus_b.memory_read(0xd000_0000, &mut [0; 4]));
    assert_eq!(data(&bus_b, 0xcfc, 4), 0xd000_0000, "the address register came along");
    assert!(bus_b.restore(0, &[0; 256]).is_err());
}

proptest! {
    #[test]
    fn any_access_is_safe(
        accesses in prop::collection::vec((any::<bool>(), any::<bool>(), any::<u32>(), prop::collection::vec(any::<u8>(), 1..9)), 0..80)
    ) {
        let bus = bus();
        for (ports, wild, at, mut bytes) in accesses {
            if ports {
                bytes.truncate(4);
                let port = if wild { at as u16 } else { 0xcf8 + (at % 8) as u16 };
                bus.port_write(port, &bytes);
                bus.port_read(port, &mut bytes);
            } else {
                let address = if wild { u64::from(at) << 4 } else { ECAM_START + u64::from(at % (4 << 15)) };
                bus.memory_write(address, &bytes);
                bus.memory_read(address, &mut bytes);
            }
        }
        prop_assert!(bus.windows.read().unwrap().iter().all(|decoded| inside(&decoded.window)));
    }
}
