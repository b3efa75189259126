//! The PCI host bridge: bus 0, its configuration by ports and by memory, and the windows of its functions.
//!
//! | where | what |
//! |---|---|
//! | ports 0xcf8, 0xcfc-0xcff | configuration mechanism 1 |
//! | [`ECAM_START`] | the same registers in memory, as the MCFG table tells; 1 MiB: one bus |
//! | [`IO_START`]..[`IO_END`] | I/O windows of functions |
//! | [`MEMORY_START`]..[`MEMORY_END`] | their memory windows |
//!
//! Function 0 of each device; device 0 is the bridge itself. Base addresses are placed by us, as firmware would, and
//! the guest may move them: a window outside the bridge's own (or over another's) is not decoded, so no address can be
//! taken away from RAM, the interrupt controllers or the ports of the chipset.
//!
//! Facts: PCI Local Bus 3.0, 3.2.2.3.2 (mechanism 1); PCI Firmware 3.2, 4.1 (MCFG); FreeBSD's `sys/amd64/pci/pci_cfgreg.c`.

#![forbid(unsafe_code)]

pub mod config;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use self::config::{BARS, CONFIG_BYTES, ConfigSpace, Identity, Space, Window};

/// The memory-mapped configuration space: [`ECAM_BYTES`] for bus 0.
pub const ECAM_START: u64 = 0xe000_0000;
pub const ECAM_BYTES: u64 = 1 << 20;
/// Memory that functions may have: above the RAM below 4 GiB.
pub const MEMORY_START: u64 = 0xc000_0000;
pub const MEMORY_END: u64 = 0xe000_0000;
/// Ports that functions may have.
pub const IO_START: u64 = 0x1000;
pub const IO_END: u64 = 0x1_0000;
/// Devices of a bus, the bridge included.
pub const SLOTS: usize = 32;

/// The I/O APIC pins of INTx, and how many there are: device `slot` has pin `INTX_PIN + slot % INTX_PINS`.
pub const INTX_PIN: u8 = 16;
pub const INTX_PINS: u8 = 8;

const PORT_ADDRESS: u16 = 0xcf8;
const PORT_DATA: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;
const FUNCTION_CONFIG_BYTES: u64 = 0x1000;

/// Generic PCI Express host bridge, as virtual machines have it: no kernel has quirks for it.
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [0x06, 0, 0],
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// PCI Express capability, version 2, of an endpoint integrated into the root complex. FreeBSD takes a machine for one
/// whose chipset is too old for message-signalled interrupts unless some function has this (`pci_msi_blacklisted`).
const CAPABILITY_EXPRESS: u8 = 0x10;
const EXPRESS_INTEGRATED: u16 = 2 | 9 << 4;
const EXPRESS_BYTES: usize = 0x3c;

fn bridge_registers() -> ConfigSpace {
    let mut space = ConfigSpace::new(BRIDGE);
    let mut express = [0; EXPRESS_BYTES - 2];
    express[..2].copy_from_slice(&EXPRESS_INTEGRATED.to_le_bytes());
    space.add_capability(CAPABILITY_EXPRESS, &express, &[]);
    space
}

/// A function on the bus. Called by vCPU threads.
pub trait Function: Send + Sync {
    /// Reads configuration registers; bytes outside read zero.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes them. True if a window may have opened, closed or moved.
    fn config_write(&self, offset: usize, data: &[u8]) -> bool;
    /// Where base address register `bar` is decoded.
    fn window(&self, bar: usize) -> Option<Window>;
    /// An access to a window, `offset` bytes from its start.
    fn read(&self, bar: usize, offset: u64, data: &mut [u8]);
    fn write(&self, bar: usize, offset: u64, data: &[u8]);
}

/// The I/O APIC pin of a device's INTx.
pub fn intx_pin(slot: usize) -> u8 {
    INTX_PIN + (slot % usize::from(INTX_PINS)) as u8
}

struct Decoded {
    window: Window,
    slot: usize,
    bar: usize,
}

/// Bus 0.
pub struct PciBus {
    address: AtomicU32,
    bridge: Mutex<ConfigSpace>,
    /// Devices 1, 2, ...
    functions: Vec<Arc<dyn Function>>,
    windows: RwLock<Vec<Decoded>>,
}

impl PciBus {
    /// A bus with `functions` as devices 1, 2, ...: at most [`SLOTS`] - 1; further ones are out of reach.
    pub fn new(functions: Vec<Arc<dyn Function>>) -> Self {
        let bus = PciBus {
            address: AtomicU32::new(0),
            bridge: Mutex::new(bridge_registers()),
            functions,
            windows: RwLock::default(),
        };
        bus.find_windows();
        bus
    }

    /// A guest `in`; false: not one of the bus's ports.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        match port {
            PORT_ADDRESS if data.len() == 4 => data.copy_from_slice(&self.address().to_le_bytes()),
            PORT_DATA..0xd00 => match self.selected(port) {
                Some((slot, offset)) => self.config_read(slot, offset, data),
                None => data.fill(0xff),
            },
            _ => return self.read(Space::Io, port.into(), data),
        }
        true
    }

    /// A guest `out`; false: not one of the bus's ports.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        match (port, <[u8; 4]>::try_from(data)) {
            (PORT_ADDRESS, Ok(value)) => {
                let value = u32::from_le_bytes(value) & ADDRESS_WRITABLE;
                self.address.store(value, Ordering::SeqCst);
            }
            (PORT_DATA..0xd00, _) => {
                if let Some((slot, offset)) = self.selected(port) {
                    self.config_write(slot, offset, data);
                }
            }
            _ => return self.write(Space::Io, port.into(), data),
        }
        true
    }

    /// A guest read of memory; false: nothing of the bus is there.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        match ecam(address) {
            Some((slot, offset)) => self.config_read(slot, offset, data),
            None => return self.read(Space::Memory, address, data),
        }
        true
    }

    /// A guest write to memory; false: nothing of the bus is there.
    pub fn memory_write(&self, address: u64, data: &[u8]) -> bool {
        match ecam(address) {
            Some((slot, offset)) => self.config_write(slot, offset, data),
            None => return self.write(Space::Memory, address, data),
        }
        true
    }

    /// The address register.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::SeqCst)
    }

    /// The bridge's registers, and the address register.
    pub fn save(&self) -> (u32, Vec<u8>) {
        (self.address(), self.bridge().save())
    }

    /// Takes over what [`Self::save`] gave, once the functions were restored.
    pub fn restore(&self, address: u32, bridge: &[u8]) -> Result<(), config::Differs> {
        self.bridge().restore(bridge)?;
        self.address.store(address & ADDRESS_WRITABLE, Ordering::SeqCst);
        self.find_windows();
        Ok(())
    }

    fn bridge(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.bridge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device and register that a data port stands for.
    fn selected(&self, port: u16) -> Option<(usize, usize)> {
        let address = self.address();
        let offset = (address & 0xfc) as usize + usize::from(port - PORT_DATA);
        (address & ADDRESS_ENABLE != 0)
            .then(|| slot(u64::from(address >> 8 & 0xffff)))
            .flatten()
            .map(|slot| (slot, offset))
    }

    fn config_read(&self, slot: usize, offset: usize, data: &mut [u8]) {
        match (slot.checked_sub(1), slot.checked_sub(1).and_then(|index| self.functions.get(index))) {
            (None, _) => self.bridge().read(offset, data),
            (_, Some(function)) => function.config_read(offset, data),
            // Nobody there: ones, which no vendor has.
            (_, None) => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: usize, offset: usize, data: &[u8]) {
        let moved =
            match (slot.checked_sub(1), slot.checked_sub(1).and_then(|index| self.functions.get(index))) {
                (None, _) => {
                    self.bridge().write(offset, data);
                    false
                }
                (_, Some(function)) => function.config_write(offset, data),
                (_, None) => false,
            };
        if moved {
            self.find_windows();
        }
    }

    /// Reads all base addresses again.
    fn find_windows(&self) {
        // Held while the registers are read: of two changes at once the last to come here sees both.
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.clear();
        for (index, function) in self.functions.iter().enumerate() {
            for bar in 0..BARS {
                if let Some(window) = function.window(bar).filter(inside) {
                    windows.push(Decoded { window, slot: index, bar });
                }
            }
        }
    }

    /// The function, register number and offset of an address. Of two windows over one another the first counts.
    fn target(&self, space: Space, address: u64, bytes: usize) -> Option<(&dyn Function, usize, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        windows.iter().find_map(|decoded| {
            let offset = address.checked_sub(decoded.window.start)?;
            let fits = offset.checked_add(bytes as u64)? <= decoded.window.bytes;
            let function = self.functions.get(decoded.slot)?;
            (decoded.window.space == space && fits).then_some((&**function, decoded.bar, offset))
        })
    }

    fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        let Some((function, bar, offset)) = self.target(space, address, data.len()) else { return false };
        function.read(bar, offset, data);
        true
    }

    fn write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        let Some((function, bar, offset)) = self.target(space, address, data.len()) else { return false };
        function.write(bar, offset, data);
        true
    }
}

/// The device of a bus, device and function number: 8, 5 and 3 bits. None but bus 0, function 0.
fn slot(number: u64) -> Option<usize> {
    (number & 7 == 0 && number < (SLOTS as u64) << 3).then_some((number >> 3) as usize)
}

/// Device and register of an address in the memory-mapped configuration space. (What lies there and is no function's
/// is told as device [`SLOTS`], which does not exist: it reads as ones.)
fn ecam(address: u64) -> Option<(usize, usize)> {
    let offset = address.checked_sub(ECAM_START).filter(|offset| *offset < ECAM_BYTES)?;
    let register = (offset % FUNCTION_CONFIG_BYTES) as usize;
    Some((slot(offset / FUNCTION_CONFIG_BYTES).unwrap_or(SLOTS), register))
}

fn inside(window: &Window) -> bool {
    let (start, end) = match window.space {
        Space::Io => (IO_START, IO_END),
        Space::Memory => (MEMORY_START, MEMORY_END),
    };
    window.start >= start && window.start.saturating_add(window.bytes) <= end
}

const _: () = assert!(CONFIG_BYTES as u64 <= FUNCTION_CONFIG_BYTES);

#[cfg(test)]
#[path = "pci/tests.rs"]
mod tests;
