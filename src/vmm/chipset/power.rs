//! ACPI's fixed hardware of the machine kind with ACPI: power button, sleep control, PM timer, and one general-purpose event.
//!
//! | ports | register |
//! |---|---|
//! | 0x600, 0x602 | PM1a status (write 1 to clear) and enable |
//! | 0x604 | PM1a control: S5 ends the VM as powered off |
//! | 0x608 | PM timer, 32 bits of 3.579545 MHz |
//! | 0x60c, 0x60d | status (write 1 to clear) and enable of the general-purpose event block: event 0 says that the machine is another one |
//!
//! The machine is always in ACPI mode (no SMI command), the SCI is level-triggered. A press of the power button sets
//! its status bit; the kernel (`acpi_button` in FreeBSD: `hw.acpi.power_button_state` S5 means a clean shutdown) does
//! the rest. The timer's overflow raises nothing: kernels that read 32 bits of it do not ask for that.
//!
//! Event 0 is raised in a clone, whose generation id (`crate::vmm::x86::acpi`) was renewed before: drivers (FreeBSD's `vmgenc`, Linux's
//! `vmgenid`) mix it into their random numbers.
//!
//! Facts: ACPI 6.4, 4.8.4.1 (general-purpose events), 4.8.3 (PM1 registers, PM timer), 4.8.2.2 (power button).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::snapshot::state::pc::{EventState, PowerState};
use crate::vmm::irq::Level;

/// First port, and how many.
pub const PORTS_START: u16 = 0x600;
pub const PORTS: u16 = 14;
/// Ports of the registers, as the FADT tells them.
pub const PM1_EVENT: u16 = PORTS_START;
pub const PM1_EVENT_BYTES: u8 = 4;
pub const PM1_CONTROL: u16 = PORTS_START + 4;
pub const PM1_CONTROL_BYTES: u8 = 2;
pub const PM_TIMER: u16 = PORTS_START + 8;
pub const PM_TIMER_BYTES: u8 = 4;
pub const EVENTS_BLOCK: u16 = PORTS_START + 12;
pub const EVENTS_BLOCK_BYTES: u8 = 2;
/// The general-purpose event that says that the generation id has changed; there is no other.
pub const GENERATION_EVENT: u8 = 0;
/// The interrupt, and its I/O APIC pin.
pub const SCI: u8 = 9;
/// What `\_S5` says is to be written as sleep type.
pub const SLEEP_TYPE_S5: u8 = 5;

const TIMER_HZ: u128 = 3_579_545;
/// Status and enable: global lock, power button, sleep button, clock alarm. (The timer's has no enable bit here.)
const EVENTS: u16 = 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const POWER_BUTTON: u16 = 1 << 8;
/// Control: SCI enabled (always), bus master reload; sleep type, sleep enable.
const SCI_ENABLED: u16 = 1;
const BUS_MASTER_RELOAD: u16 = 1 << 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_WRITABLE: u16 = BUS_MASTER_RELOAD | SLEEP_TYPE;

const GENERATION_BIT: u8 = 1 << GENERATION_EVENT;

struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    /// Of the general-purpose events.
    events: EventState,
    /// The timer stood at `ticks` at `since`.
    ticks: u32,
    since: Instant,
}

/// The power block.
pub struct Power {
    registers: Mutex<Registers>,
    sci: Box<dyn Level>,
}

impl Power {
    pub fn new(sci: Box<dyn Level>) -> Self {
        let registers = Registers {
            status: 0,
            enable: 0,
            control: 0,
            events: EventState::default(),
            ticks: 0,
            since: Instant::now(),
        };
        Power { registers: Mutex::new(registers), sci }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power button is pressed. False: the guest has no ear for it (now), and nothing happens until it has.
    pub fn press_button(&self) -> bool {
        let mut r = self.lock();
        r.status |= POWER_BUTTON;
        self.update(&r);
        r.enable & POWER_BUTTON != 0
    }

    /// The generation id has changed. It is kept until the guest hears it.
    pub fn tell_generation(&self) {
        let mut r = self.lock();
        r.events.status |= GENERATION_BIT;
        self.update(&r);
    }

    /// A guest `in`; false: not one of these ports.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        let Some(offset) = port.checked_sub(PORTS_START).filter(|offset| *offset < PORTS) else {
            return false;
        };
        let r = self.lock();
        let mut image = [0u8; PORTS as usize];
        for (at, value) in [(0, r.status), (2, r.enable), (4, r.control | SCI_ENABLED)] {
            image[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        image[8..12].copy_from_slice(&r.timer().to_le_bytes());
        image[12..].copy_from_slice(&[r.events.status, r.events.enable]);
        super::super::virtio::read_space(&image, offset.into(), data);
        true
    }

    /// A guest `out`; `None`: not one of these ports. Registers are written whole or by bytes. True: the guest powers
    /// itself off.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<bool> {
        let offset = port.checked_sub(PORTS_START).filter(|offset| *offset < PORTS)?;
        let mut r = self.lock();
        let mut off = false;
        for (index, value) in data.iter().enumerate() {
            let value = u16::from(*value);
            let at = usize::from(offset) + index;
            let (value, mask) = if at % 2 == 0 { (value, 0xff) } else { (value << 8, 0xff00) };
            match at {
                0 | 1 => r.status &= !value,
                2 | 3 => r.enable = (r.enable & !mask | value & mask) & EVENTS,
                4 | 5 => {
                    r.control = (r.control & !mask | value & mask) & CONTROL_WRITABLE;
                    // Other sleeping states are not offered.
                    off |= value & SLEEP_ENABLE != 0
                        && r.control & SLEEP_TYPE == u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT;
                }
                12 => r.events.status &= !data[index],
                13 => r.events.enable = data[index] & GENERATION_BIT,
                _ => {}
            }
        }
        self.update(&r);
        Some(off)
    }

    fn update(&self, r: &Registers) {
        self.sci.set(r.status & r.enable & EVENTS != 0 || r.events.status & r.events.enable != 0);
    }

    pub fn save(&self) -> PowerState {
        let r = self.lock();
        PowerState { status: r.status, enable: r.enable, control: r.control, timer_ticks: r.timer() }
    }

    pub fn save_events(&self) -> EventState {
        self.lock().events
    }

    /// Takes on a saved state; bits that no guest could have set are dropped. The timer goes on where it was.
    pub fn restore(&self, state: &PowerState, events: EventState) {
        let mut r = self.lock();
        *r = Registers {
            status: state.status & EVENTS,
            enable: state.enable & EVENTS,
            control: state.control & CONTROL_WRITABLE,
            events: EventState {
                status: events.status & GENERATION_BIT,
                enable: events.enable & GENERATION_BIT,
            },
            ticks: state.timer_ticks,
            since: Instant::now(),
        };
        self.update(&r);
    }
}

impl Registers {
    fn timer(&self) -> u32 {
        let ticks = self.since.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        self.ticks.wrapping_add(ticks as u32)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Pin(Arc<AtomicBool>);

    impl Level for Pin {
        fn set(&self, asserted: bool) {
            self.0.store(asserted, Ordering::SeqCst);
        }
    }

    fn power() -> (Power, Arc<AtomicBool>) {
        let pin = Pin::default();
        let sci = pin.0.clone();
        (Power::new(Box::new(pin)), sci)
    }

    fn word(power: &Power, port: u16) -> u16 {
        let mut data = [0; 2];
        assert!(power.port_read(port, &mut data));
        u16::from_le_bytes(data)
    }

    #[test]
    fn a_press_is_an_interrupt_until_it_is_acknowledged() {
        let (power, sci) = power();
        assert!(!power.press_button(), "nobody listens yet");
        assert!(!sci.load(Ordering::SeqCst));
        assert_eq!(power.port_write(PM1_EVENT + 2, &POWER_BUTTON.to_le_bytes()), Some(false));
        assert!(sci.load(Ordering::SeqCst), "it was kept");
        assert_eq!(word(&power, PM1_EVENT), POWER_BUTTON);
        power.port_write(PM1_EVENT, &POWER_BUTTON.to_le_bytes());
        assert!(!sci.load(Ordering::SeqCst));
        assert!(power.press_button());
        assert!(sci.load(Ordering::SeqCst));
    }

    #[test]
    fn only_s5_powers_off() {
        let (power, _) = power();
        for kind in 0..8u16 {
            let value = (kind << SLEEP_TYPE_SHIFT | SLEEP_ENABLE).to_le_bytes();
            assert_eq!(power.port_write(PM1_CONTROL, &value), Some(kind == 5));
            assert_eq!(word(&power, PM1_CONTROL) & SLEEP_ENABLE, 0, "it does not stay");
        }
        // ACPICA writes the type first and the enable bit with it again.
        assert_eq!(power.port_write(PM1_CONTROL, &(5u16 << SLEEP_TYPE_SHIFT).to_le_bytes()), Some(false));
        assert_eq!(word(&power, PM1_CONTROL), 5 << SLEEP_TYPE_SHIFT | SCI_ENABLED);
    }

    #[test]
    fn another_generation_is_told_until_it_is_heard() {
        let (power, sci) = power();
        power.tell_generation();
        assert!(!sci.load(Ordering::SeqCst), "nobody listens yet");
        let saved = power.save_events();
        power.restore(&power.save(), saved);
        assert_eq!(power.port_write(EVENTS_BLOCK + 1, &[0xff]), Some(false));
        assert!(sci.load(Ordering::SeqCst), "it was kept");
        assert_eq!(word(&power, EVENTS_BLOCK), 0x0101);
        power.port_write(EVENTS_BLOCK, &[1]);
        assert!(!sci.load(Ordering::SeqCst));
        assert_eq!(word(&power, EVENTS_BLOCK), 0x0100);
    }

    #[test]
    fn the_timer_runs_on_from_a_saved_state() {
        let (power, _) = power();
        power.restore(
            &PowerState { status: 0, enable: 0, control: 0, timer_ticks: u32::MAX - 5 },
            EventState::default(),
        );
        let first = power.save().timer_ticks;
        assert!(first.wrapping_sub(u32::MAX - 5) < 1 << 30, "forwards, over the end too");
        while power.save().timer_ticks == first {}
    }

    proptest! {
        #[test]
        fn any_access_and_any_saved_state_is_safe(
            writes in prop::collection::vec((0u16..0x20, prop::collection::vec(any::<u8>(), 1..5)), 0..60),
            saved in any::<(u16, u16, u16, u32, u8, u8)>(),
        ) {
            let (power, sci) = power();
            power.restore(&PowerState { status: saved.0, enable: saved.1, control: saved.2, timer_ticks: saved.3 }, EventState { status: saved.4, enable: saved.5 });
            for (offset, mut data) in writes {
                let port = PORTS_START - 4 + offset;
                let ours = (PORTS_START..PORTS_START + PORTS).contains(&port);
                prop_assert_eq!(power.port_write(port, &data).is_some(), ours);
                prop_assert_eq!(power.port_read(port, &mut data), ours);
                let state = power.save();
                prop_assert_eq!(state.enable & !EVENTS, 0);
                let events = power.save_events();
                prop_assert_eq!(events.enable & !GENERATION_BIT, 0);
                let raised = state.status & state.enable != 0 || events.status & events.enable != 0;
                prop_assert_eq!(sci.load(Ordering::SeqCst), raised);
            }
        }
    }
}
