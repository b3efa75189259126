//! The devices of a PC that a kernel takes for granted, and the port map.
//!
//! | ports | device |
//! |---|---|
//! | 0x20 0x21 0xa0 0xa1 0x4d0 0x4d1 | [`pic`]: masked 8259s |
//! | 0x40-0x43 0x61 | [`pit`]: 8254 timer |
//! | 0x60 0x64 | i8042 keyboard controller (vm-superio): only its reset line is wired |
//! | 0x70 0x71 | [`cmos`]: clock |
//! | 0x92, 0xcf9 | reset, as `sys/x86/x86/cpu_machdep.c` tries them |
//! | 0x2f8-0x2ff | [`serial`]: COM2, if the agent talks through it |
//! | 0x3f8-0x3ff | [`serial`]: COM1 |
//! | the ready port | chosen by the caller; any write is the ready point |
//!
//! The machine kind with ACPI and PCI has two more rooms, reached before these ports ([`crate::vmm::bus`]): [`pci`] and
//! [`power`]. All other ports read as ones and ignore writes, as an empty bus does.

pub mod cmos;
pub mod ioapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
pub mod serial;

use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::snapshot::state::chipset::{AgentPortState, ChipsetState};
use crate::vmm::irq::Interrupt;

/// I/O APIC pin of the interval timer. The MPTable says the same.
pub const PIT_PIN: usize = 2;
/// I/O APIC pin of COM1.
pub const SERIAL_PIN: usize = 4;
/// I/O APIC pin of COM2.
pub const AGENT_PIN: usize = 3;

/// The guest's end of the agent channel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AgentPort {
    /// A virtio-console.
    #[default]
    Virtio,
    /// COM2, for kernels without a driver for that one. There is no virtio-console then.
    Serial,
}

/// What a port write asked of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEffect {
    None,
    /// The guest resets itself; by which door.
    Reset(&'static str),
    /// The guest powers itself off.
    PowerOff,
    /// The guest wrote this to the ready port.
    Ready(u32),
}

/// Everything on the port bus, and the I/O APIC.
pub struct Chipset {
    pub serial: Arc<serial::Serial>,
    /// COM2, on a machine whose agent has no virtio-console.
    pub agent: Option<Arc<serial::Serial>>,
    pub ioapic: Arc<ioapic::IoApic>,
    pit: Mutex<pit::Pit>,
    pit_line: Arc<ioapic::Line>,
    cmos: Mutex<cmos::Cmos>,
    pic: Mutex<pic::Pic>,
    ready_port: Option<u16>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chipset {
    /// A chipset after reset. `console` and `agent` must be non-blocking; `interest_changed` is handed to the serial ports.
    /// With `agent` there is a COM2, which it is plugged into.
    pub fn new(
        ioapic: Arc<ioapic::IoApic>,
        console: UnixStream,
        agent: Option<UnixStream>,
        interest_changed: EventFd,
        ready_port: Option<u16>,
    ) -> Result<Self, errno::Error> {
        let serial_line = ioapic.line(SERIAL_PIN)?;
        let agent = match agent {
            Some(agent) => {
                let changed = interest_changed.try_clone().map_err(errno::Error::from)?;
                Some(Arc::new(serial::Serial::for_agent(agent, ioapic.line(AGENT_PIN)?, changed)?))
            }
            None => None,
        };
        Ok(Chipset {
            serial: Arc::new(serial::Serial::new(console, serial_line, interest_changed)?),
            agent,
            pit: Mutex::new(pit::Pit::new()?),
            pit_line: ioapic.line(PIT_PIN)?,
            ioapic,
            cmos: Mutex::default(),
            pic: Mutex::default(),
            ready_port,
        })
    }

    /// A guest `in` of `data.len()` bytes (1, 2 or 4) from `port`; a wide one reads consecutive ports.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let port = port.wrapping_add(index as u16);
            *byte = match port {
                0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => lock(&self.pic).read(port),
                0x40..=0x43 | 0x61 => lock(&self.pit).read(port),
                // No keyboard, no mouse: output buffer empty, nothing to say.
                0x60 | 0x64 => 0,
                0x70 | 0x71 => lock(&self.cmos).read(port),
                // A20 is on.
                0x92 => 0x02,
                0x2f8..=0x2ff => self.agent.as_ref().map_or(0xff, |agent| agent.read(port - 0x2f8)),
                0x3f8..=0x3ff => self.serial.read(port - 0x3f8),
                _ => 0xff,
            };
        }
    }

    /// The caller's ready port comes before whatever else may be there.
    pub fn is_ready_port(&self, port: u16) -> bool {
        Some(port) == self.ready_port
    }

    /// A guest `out` of `data.len()` bytes (1, 2 or 4) to `port`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortEffect {
        if Some(port) == self.ready_port {
            let mut value = [0u8; 4];
            for (to, from) in value.iter_mut().zip(data) {
                *to = *from;
            }
            return PortEffect::Ready(u32::from_le_bytes(value));
        }
        // 0xcf8 as a double word is the PCI address register, not the reset port beside it.
        if port == 0xcf8 && data.len() == 4 {
            return PortEffect::None;
        }
        for (index, &value) in data.iter().enumerate() {
            let port = port.wrapping_add(index as u16);
            match port {
                0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => lock(&self.pic).write(port, value),
                0x40..=0x43 | 0x61 => lock(&self.pit).write(port, value),
                0x64 if keyboard_reset(value) => return PortEffect::Reset("keyboard controller, port 0x64"),
                0x70 | 0x71 => lock(&self.cmos).write(port, value),
                0x92 if value & 0x01 != 0 => return PortEffect::Reset("system control, port 0x92"),
                0xcf9 if value & 0x04 != 0 => return PortEffect::Reset("reset control, port 0xcf9"),
                0x2f8..=0x2ff => {
                    if let Some(agent) = &self.agent {
                        agent.write(port - 0x2f8, value);
                    }
                }
                0x3f8..=0x3ff => self.serial.write(port - 0x3f8, value),
                _ => {}
            }
        }
        PortEffect::None
    }

    /// The descriptor that is readable when [`Chipset::timer_expired`] is to be called.
    pub fn timer_fd(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd;
        lock(&self.pit).timer().as_raw_fd()
    }

    /// The device thread: the interval timer's deadline came.
    pub fn timer_expired(&self) {
        if lock(&self.pit).expired() {
            self.pit_line.raise();
        }
    }

    /// The serial ports there are, COM1 first.
    pub fn serial_ports(&self) -> impl Iterator<Item = &Arc<serial::Serial>> {
        std::iter::once(&self.serial).chain(&self.agent)
    }

    /// What COM2 holds, if there is one.
    pub fn save_agent(&self) -> Option<AgentPortState> {
        Some(AgentPortState { serial: self.agent.as_ref()?.save() })
    }

    /// Takes on what COM2 held.
    pub fn restore_agent(&self, state: &AgentPortState) {
        if let Some(agent) = &self.agent {
            agent.restore(&state.serial);
        }
    }

    pub fn save(&self) -> ChipsetState {
        ChipsetState {
            serial: self.serial.save(),
            pit: lock(&self.pit).save(),
            cmos: lock(&self.cmos).save(),
            pic: lock(&self.pic).save(),
            ioapic: self.ioapic.save(),
        }
    }

    /// Takes on a saved state. Fails only if KVM refuses the interrupt routes.
    pub fn restore(&self, state: &ChipsetState) -> Result<(), errno::Error> {
        self.ioapic.restore(&state.ioapic)?;
        self.serial.restore(&state.serial);
        lock(&self.pit).restore(&state.pit);
        lock(&self.cmos).restore(&state.cmos);
        lock(&self.pic).restore(&state.pic);
        Ok(())
    }
}

/// A flag that vm-superio's i8042 sets when the guest pulls the reset line.
struct ResetFlag<'a>(&'a Cell<bool>);

impl vm_superio::Trigger for ResetFlag<'_> {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set(true);
        Ok(())
    }
}

/// True if command `value` on port 0x64 resets the machine. The controller keeps no state between commands.
fn keyboard_reset(value: u8) -> bool {
    let reset = Cell::new(false);
    let mut controller = vm_superio::I8042Device::new(ResetFlag(&reset));
    let Ok(()) = controller.write(0x04, value);
    reset.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert!(keyboard_reset(0xfe));
        assert!((0..=0xfd).all(|command| !keyboard_reset(command)));
    }
}
