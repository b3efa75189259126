//! The chipset, the I/O APIC, the PCI host bridge and the power block against accesses of any kind, through the bus.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::collection::vec;
use proptest::prelude::*;

use super::{FRONTS, Front, Machine, NAMES, READY_PORT, from_bytes};
use crate::snapshot::codec;
use crate::snapshot::state::chipset::{AgentPortState, ChipsetState};
use crate::snapshot::state::pc::PcState;
#[cfg(test)]
use crate::vmm::bus::lock;
use crate::vmm::chipset::ioapic::{IOAPIC_START, PINS};
use crate::vmm::chipset::pci::{ECAM_BYTES, ECAM_START, MEMORY_START};
use crate::vmm::chipset::{AGENT_PIN, PortEffect, SERIAL_PIN};
use crate::vmm::irq::Interrupt;

#[derive(Debug, Clone)]
enum Step {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    /// The local APIC's end of interrupt.
    End(u8),
    /// The interval timer's deadline, whether or not it has come.
    Tick,
    /// A device's edge.
    Raise(usize),
    PowerButton,
    Type(Vec<u8>),
    /// The console is read.
    Take,
    /// The device thread looks.
    Look,
}

fn port() -> impl Strategy<Value = u16> {
    let known = prop::sample::select(vec![
        0x20u16, 0x21, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0xa0, 0xa1, 0x4d0, 0x4d1,
        0xcf8, 0xcf9, 0xcfa, 0xcfc, 0xcfd, 0xcff, READY_PORT,
    ]);
    prop_oneof![
        8 => known,
        6 => 0x3f8u16..0x400,
        6 => 0x2f8u16..0x300,
        4 => 0x5feu16..0x610,
        1 => 0x3f5u16..0x3f8,
        2 => 0xc080u16..0xc300,
        2 => any::<u16>(),
        1 => 0xfffcu16..,
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => Just(IOAPIC_START),
        6 => Just(IOAPIC_START + 0x10),
        1 => (0u64..0x1000).prop_map(|offset| IOAPIC_START + offset),
        3 => (0u64..6 << 15).prop_map(|offset| ECAM_START + offset),
        3 => (0u64..6, 0u64..0x50).prop_map(|(slot, offset)| ECAM_START + (slot << 15) + offset),
        1 => (1u64..9).prop_map(|before| ECAM_START + ECAM_BYTES - before),
        2 => (0u64..6 << 15).prop_map(|offset| MEMORY_START + offset),
        1 => any::<u32>().prop_map(u64::from),
        1 => any::<u64>(),
        1 => u64::MAX - 8..,
    ]
}

fn value(most: usize) -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![3 => 0u64..0x40, 2 => any::<u64>(), 1 => (0u32..64).prop_map(|bit| 1 << bit)];
    (number, 1..=most).prop_map(|(number, bytes)| number.to_le_bytes()[..bytes].to_vec())
}

fn port_value() -> impl Strategy<Value = Vec<u8>> {
    value(4).prop_map(|mut value| {
        // As the processor has it: 1, 2 or 4 bytes.
        if value.len() == 3 {
            value.pop();
        }
        value
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (port(), prop::sample::select(vec![1usize, 1, 2, 4])).prop_map(|(port, bytes)| Step::In(port, bytes)),
        14 => (port(), port_value()).prop_map(|(port, value)| Step::Out(port, value)),
        4 => (address(), 1usize..9).prop_map(|(address, bytes)| Step::Read(address, bytes)),
        10 => (address(), value(8)).prop_map(|(address, value)| Step::Write(address, value)),
        2 => any::<u8>().prop_map(Step::End),
        2 => Just(Step::Tick),
        2 => (0..PINS).prop_map(Step::Raise),
        1 => Just(Step::PowerButton),
        2 => vec(any::<u8>(), 1..100).prop_map(Step::Type),
        1 => Just(Step::Take),
        4 => Just(Step::Look),
    ]
}

impl Machine {
    fn carry_out(&self, step: &Step) {
        let bus = &self.bus;
        match step {
            Step::In(port, bytes) => bus.port_read(*port, &mut vec![0; *bytes]),
            Step::Out(port, value) => match bus.port_write(*port, value) {
                PortEffect::Ready(_) => assert_eq!(*port, READY_PORT),
                PortEffect::Reset(how) => {
                    let doors = [("0x64", 0x64), ("0x92", 0x92), ("0xcf9", 0xcf9)];
                    let (_, door) = doors.iter().find(|(name, _)| how.contains(name)).unwrap();
                    assert!((u32::from(*port)..u32::from(*port) + 4).contains(door), "{how} by {port:#x}");
                }
                PortEffect::PowerOff => assert!((0x600..0x60c).contains(port)),
                PortEffect::None => {}
            },
            Step::Read(address, bytes) => bus.mmio_read(*address, &mut vec![0; *bytes]),
            Step::Write(address, value) => bus.mmio_write(*address, value).unwrap(),
            Step::End(vector) => bus.chipset.ioapic.end_of_interrupt(*vector),
            Step::Tick => bus.chipset.timer_expired(),
            Step::Raise(pin) => bus.chipset.ioapic.line(*pin).unwrap().raise(),
            Step::PowerButton => drop(bus.pc.as_ref().map(|pc| pc.power.press_button())),
            // What has no room is lost.
            Step::Type(bytes) => {
                let _ = (&self.serial).write(bytes);
                let _ = (&self.second).write(bytes);
            }
            Step::Take => {
                let _ = (&self.serial).read(&mut [0; 0x1_0000]);
                let _ = (&self.second).read(&mut [0; 0x1_0000]);
            }
            Step::Look => self.run(),
        }
    }

    fn out(&self, port: u16, value: u8) -> PortEffect {
        self.bus.port_write(port, &[value])
    }

    fn input(&self, port: u16) -> u8 {
        let mut value = [0];
        self.bus.port_read(port, &mut value);
        value[0]
    }

    fn double(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_double(&self, address: u64, value: u32) {
        self.bus.mmio_write(address, &value.to_le_bytes()).unwrap();
    }

    /// An honest kernel finds everything as it should be.
    fn check_chipset(&self) {
        let set = |writes: &[(u16, u8)]| {
            for (port, value) in writes {
                assert_eq!(self.out(*port, *value), PortEffect::None);
            }
        };
        // Interrupt controllers: initialized, masked.
        set(&[(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xfb)]);
        assert_eq!(self.input(0x21), 0xfb);
        // The interval timer counts.
        set(&[(0x43, 0x34), (0x40, 0x00), (0x40, 0x80), (0x43, 0x00)]);
        let count = u16::from(self.input(0x40)) | u16::from(self.input(0x40)) << 8;
        assert!((1..=0x8000).contains(&count), "{count:#x}");
        set(&[(0x43, 0x30)]);
        set(&[(0x70, 0x40), (0x71, 0x5a)]);
        assert_eq!(self.input(0x71), 0x5a);
        // An entry of the I/O APIC.
        for (index, value) in [(0x10 + 2 * 7, 0x1_0031), (0x11 + 2 * 7, 0x0300_0000)] {
            self.set_double(IOAPIC_START, index);
            self.set_double(IOAPIC_START + 0x10, value);
            assert_eq!(self.double(IOAPIC_START + 0x10) & !0x5000, value);
        }
        if let Some(pc) = &self.bus.pc {
            for slot in 0..=NAMES.len() as u32 {
                let address = (1 << 31 | slot << 11).to_le_bytes();
                assert_eq!(self.bus.port_write(0xcf8, &address), PortEffect::None);
                let (mut by_port, by_memory) = ([0; 4], self.double(ECAM_START + (u64::from(slot) << 15)));
                self.bus.port_read(0xcfc, &mut by_port);
                assert_eq!(u32::from_le_bytes(by_port), by_memory);
                assert_eq!(by_memory & 0xffff, if slot == 0 { 0x1b36 } else { 0x1af4 });
            }
            assert_eq!(self.bus.port_write(0x602, &[0x00, 0x01]), PortEffect::None);
            assert!(pc.power.press_button());
            assert_eq!(self.bus.port_write(0x604, &[0x00, 0x34]), PortEffect::PowerOff);
        }
        self.check_serial(0x3f8, &self.serial);
        self.check_serial(0x2f8, &self.second);
        assert_eq!(self.out(0x64, 0xfe), PortEffect::Reset("keyboard controller, port 0x64"));
        assert_eq!(self.bus.port_write(READY_PORT, &[7, 0]), PortEffect::Ready(7));
    }

    fn check_serial(&self, port: u16, mut line: &UnixStream) {
        // No latch, no loopback but ready to receive, no interrupts, FIFO on.
        for (register, value) in [(3, 3), (4, 2), (1, 0), (2, 0), (2, 1)] {
            assert_eq!(self.out(port + register, value), PortEffect::None);
        }
        // What was printed before, and typed before, comes first. (The line takes no more while nobody reads.)
        loop {
            self.run();
            // The agent's port is filled when the guest has seen it empty.
            self.input(port + 5);
            self.run();
            let typed = self.input(port + 5) & 1 != 0;
            if typed {
                self.input(port);
            }
            let printed = line.read(&mut [0; 0x1_0000]).is_ok_and(|count| count > 0);
            if !typed && !printed {
                break;
            }
        }
        assert_eq!(self.input(port + 5) & 0x61, 0x60);
        assert_eq!(self.out(port, b'x'), PortEffect::None);
        line.write_all(b"y").unwrap();
        self.run();
        let mut printed = [0; 8];
        assert_eq!(line.read(&mut printed).unwrap(), 1);
        assert_eq!((printed[0], self.input(port + 5) & 1, self.input(port)), (b'x', 1, b'y'));
    }

    fn save_chipset(&self) -> (ChipsetState, AgentPortState, Option<PcState>) {
        let mut chipset = self.bus.chipset.save();
        let agent = self.bus.chipset.save_agent().unwrap();
        // Clocks go on.
        chipset.pit.channels.iter_mut().for_each(|channel| channel.elapsed_ns = 0);
        let pc = self.bus.pc.as_ref().map(|pc| {
            let (config_address, bridge) = pc.pci.save();
            let mut power = pc.power.save();
            power.timer_ticks = 0;
            PcState { transitional: pc.transitional, config_address, bridge, power }
        });
        (chipset, agent, pc)
    }

    /// False: it was refused.
    fn restore_chipset(
        &self,
        (chipset, agent, pc): &(ChipsetState, AgentPortState, Option<PcState>),
    ) -> bool {
        self.bus.chipset.restore(chipset).unwrap();
        self.bus.chipset.restore_agent(agent);
        let (Some(here), Some(saved)) = (&self.bus.pc, pc) else { return true };
        here.power.restore(&saved.power, Default::default());
        here.pci.restore(saved.config_address, &saved.bridge).is_ok()
    }
}

/// Encoded, a few bytes changed, and decoded, if it can be.
fn changed<T: serde::Serialize + serde::de::DeserializeOwned>(
    value: T,
    changes: &[(prop::sample::Index, u8)],
) -> T {
    let mut bytes = codec::encode(&value).unwrap();
    for (place, value) in changes {
        let place = place.index(bytes.len());
        bytes[place] = *value;
    }
    codec::decode(&bytes).unwrap_or(value)
}

/// Accesses of any kind, and what was left of them in a clone.
fn no_access_harms(front: Front, steps: &[Step]) {
    let machine = Machine::new(front);
    steps.iter().for_each(|step| machine.carry_out(step));
    machine.run();
    let saved = machine.save_chipset();
    let clone = Machine::new(front);
    assert!(clone.restore_chipset(&saved));
    let mut again = clone.save_chipset();
    // A serial port raises its line in a clone if it has anything to say: an edge that the source may have had already.
    let serial = 1 << SERIAL_PIN | 1 << AGENT_PIN;
    assert_eq!(again.0.ioapic.pending & saved.0.ioapic.pending & serial, saved.0.ioapic.pending & serial);
    again.0.ioapic.pending &= saved.0.ioapic.pending | !serial;
    assert_eq!(again, saved);
    machine.check_chipset();
    clone.check_chipset();
}

/// A saved state with changes.
fn no_saved_state_harms(
    front: Front,
    before: &[Step],
    changes: &[(prop::sample::Index, u8)],
    after: &[Step],
) {
    let machine = Machine::new(front);
    before.iter().for_each(|step| machine.carry_out(step));
    let (chipset, agent, pc) = machine.save_chipset();
    let saved = (changed(chipset, changes), changed(agent, changes), changed(pc, changes));
    let clone = Machine::new(front);
    if clone.restore_chipset(&saved) {
        after.iter().for_each(|step| clone.carry_out(step));
        clone.check_chipset();
    }
}

#[cfg(test)]
fn front() -> impl Strategy<Value = Front> {
    prop::sample::select(&FRONTS[..])
}

fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), 0u8..4, 250u8..]), 1..6)
}

/// For fuzzers: what `data` makes of both.
pub fn fuzz(data: &[u8]) {
    let Some((&[front, before, c0, c1, c2, c3], data)) = data.split_first_chunk() else { return };
    let state = front >= 128;
    let front = FRONTS[usize::from(front) % FRONTS.len()];
    let mut steps = from_bytes(data, &step());
    if state {
        let after = steps.split_off(usize::from(before).min(steps.len()));
        let Some(changes) = from_bytes(&[c0, c1, c2, c3], &changes()).pop() else { return };
        no_saved_state_harms(front, &steps, &changes, &after);
    } else {
        no_access_harms(front, &steps);
    }
}

#[cfg(test)]
proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_access_harms_the_chipset(front in front(), steps in vec(step(), 1..120)) {
        no_access_harms(front, &steps);
    }

    #[test]
    fn no_saved_state_harms_the_chipset(
        front in front(), before in vec(step(), 0..20), changes in changes(), after in vec(step(), 0..40),
    ) {
        no_saved_state_harms(front, &before, &changes, &after);
    }
}

/// The same checks on a machine that nobody has touched.
#[test]
fn an_honest_kernel_finds_the_chipset() {
    for front in FRONTS {
        let machine = Machine::new(front);
        machine.check_chipset();
        assert!(machine.bus.virtio.iter().all(|device| lock(device).device_id() != 0));
    }
}
