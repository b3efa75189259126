//! virtio over PCI: one function on [`crate::vmm::chipset::pci`]'s bus for each device.
//!
//! The front of a [`Transport`] for the machine kind with PCI. Windows of a function:
//!
//! | base address | what |
//! |---|---|
//! | 0, I/O | the legacy interface, of a transitional function only |
//! | 1, memory | MSI-X: table at 0, pending bits at 0x800 |
//! | 4, memory | common 0, interrupt status 0x1000, device configuration 0x2000, notifications 0x3000 |
//!
//! A notification and a read of the interrupt status take no lock of the transport: no vCPU waits for a disk. A
//! transitional function has the old device numbers; FreeBSD from 13 on drives such a one by its legacy interface, so the
//! machine has them only for kernels that know no other.
//!
//! Facts: virtio 1.2 clause 4.1; PCI Local Bus 3.0, 6.8.2; FreeBSD's `sys/dev/virtio/pci`; Linux's
//! `drivers/virtio/virtio_pci_modern_dev.c`.

#![forbid(unsafe_code)]

mod common;
mod interrupts;
mod legacy;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard};

use self::interrupts::Interrupts;
use super::VirtioDevice;
use super::transport::{self, Doorbell, RestoreError, Transport, TransportError};
use crate::snapshot::state::pc::VirtioPciState;
use crate::snapshot::state::virtio::TransportState;
use crate::vmm::bus::lock;
use crate::vmm::chipset::pci::config::{COMMAND_INTX_OFF, ConfigSpace, Identity, Space, Window};
use crate::vmm::chipset::pci::{Function, IO_START, MEMORY_START, intx_pin};
use crate::vmm::irq::{Level, Messages};
use crate::vmm::memory::GuestMemory;

const VENDOR: u16 = 0x1af4;
/// Device numbers: modern ones begin here ...
const MODERN: u16 = 0x1040;
/// ... and a modern one's subsystem is at least 0x40 (clause 4.1.2.1), like others'.
const MODERN_SUBSYSTEM: u16 = 0x1100;

const BAR_LEGACY: usize = 0;
const BAR_VECTORS: usize = 1;
const BAR_MODERN: usize = 4;
const VECTORS_BYTES: u32 = 0x1000;
const PENDING_OFFSET: u64 = 0x800;
const MODERN_BYTES: u32 = 0x4000;
const COMMON_OFFSET: u64 = 0;
const CAUSES_OFFSET: u64 = 0x1000;
const DEVICE_OFFSET: u64 = 0x2000;
const NOTIFY_OFFSET: u64 = 0x3000;
const STRUCTURE_BYTES: u64 = 0x1000;
/// Bytes between the notification registers of two queues.
const NOTIFY_STEP: u32 = 4;

/// Memory of a device's windows, from [`MEMORY_START`] on, and its ports, in the upper part of their range.
const MEMORY_BYTES_EACH: u64 = 0x8000;
const IO_FIRST: u64 = IO_START + 0xb000;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// Kinds of virtio structures.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const CAUSES: u8 = 3;
const DEVICE: u8 = 4;
const ACCESS: u8 = 5;

/// What a function's interrupts are wired to.
pub struct Wires {
    pub messages: Arc<dyn Messages>,
    /// On the pin that [`intx_pin`] says.
    pub intx: Box<dyn Level>,
}

/// One virtio-pci device: a transport and its function.
pub struct VirtioFunction {
    transport: Arc<Mutex<Transport>>,
    doorbell: Arc<Doorbell>,
    interrupts: Arc<Interrupts>,
    config: Mutex<ConfigSpace>,
    /// Where in `config`: MSI-X's message control, and the window of clause 4.1.4.9.
    control_at: usize,
    access_at: usize,
    memory: GuestMemory,
}

impl VirtioFunction {
    /// A device in its reset state as device `slot` (1 to 31) of the bus.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        slot: usize,
        transitional: bool,
        wires: Wires,
        memory: GuestMemory,
    ) -> Result<Self, TransportError> {
        let doorbell = transport::doorbell(&*device)?;
        let queues = device.queue_sizes().len();
        let interrupts = Arc::new(Interrupts::new(queues, wires.messages, wires.intx));
        let mut config = ConfigSpace::new(identity(device.device_id(), transitional));
        config.set_interrupt(intx_pin(slot));
        let start = (MEMORY_START + slot as u64 * MEMORY_BYTES_EACH) as u32;
        if transitional {
            let ports = IO_FIRST + slot as u64 * u64::from(legacy::WINDOW_BYTES);
            config.add_bar(BAR_LEGACY, Space::Io, legacy::WINDOW_BYTES, ports as u32);
        }
        config.add_bar(BAR_VECTORS, Space::Memory, VECTORS_BYTES, start + MODERN_BYTES);
        config.add_bar(BAR_MODERN, Space::Memory, MODERN_BYTES, start);
        let control_at = add_msix(&mut config, interrupts.vectors());
        for (kind, offset, bytes) in [
            (COMMON, COMMON_OFFSET, common::STRUCTURE_BYTES as u64),
            (CAUSES, CAUSES_OFFSET, 1),
            (DEVICE, DEVICE_OFFSET, STRUCTURE_BYTES),
        ] {
            config.add_capability(CAPABILITY_VENDOR, &structure(kind, 16, offset, bytes), &[]);
        }
        let mut notify = structure(NOTIFY, 20, NOTIFY_OFFSET, STRUCTURE_BYTES);
        notify.extend(NOTIFY_STEP.to_le_bytes());
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        // Clause 4.1.4.9: the driver writes base address, offset, length, and then the data.
        let mut access = structure(ACCESS, 20, 0, 0);
        access.extend([0; 4]);
        let mut writable = [0xff; 18];
        writable[..2].fill(0); // Length and kind; then base address ...
        writable[3..6].fill(0); // ... and padding.
        let access_at = config.add_capability(CAPABILITY_VENDOR, &access, &writable);
        let transport = Arc::new(Mutex::new(Transport::new(device, doorbell.clone(), interrupts.clone())?));
        Ok(Self {
            transport,
            doorbell,
            interrupts,
            config: Mutex::new(config),
            control_at,
            access_at,
            memory,
        })
    }

    /// For the device thread.
    pub fn transport(&self) -> &Arc<Mutex<Transport>> {
        &self.transport
    }

    fn lock(&self) -> MutexGuard<'_, Transport> {
        lock(&self.transport)
    }

    /// The PCI half of the state; the other is the transport's own. Only while the transport may be saved.
    pub fn save(&self) -> VirtioPciState {
        let (legacy, queues) = {
            let transport = self.lock();
            (transport.legacy(), transport.queue_count())
        };
        let mut state = VirtioPciState {
            config: lock(&self.config).save(),
            legacy,
            config_vector: 0,
            queue_vectors: Vec::new(),
            vectors: Vec::new(),
            pending: 0,
        };
        self.interrupts.save(&mut state, queues);
        state
    }

    /// Takes over both halves of a saved state, which may be anything. Touches no page of guest memory.
    pub fn restore(&self, state: &VirtioPciState, transport: &TransportState) -> Result<(), RestoreError> {
        let mut guard = self.lock();
        // First: a transport that is reset forgets the vectors.
        guard.restore(transport, state.legacy, &self.memory)?;
        let name = guard.device_name();
        drop(guard);
        let register = |what: String| RestoreError::Register { name, what };
        let mut config = lock(&self.config);
        config
            .restore(&state.config)
            .map_err(|differs| register(format!("PCI configuration, at byte {:#x},", differs.0)))?;
        let (control, intx_off) = self.interrupt_settings(&config);
        self.interrupts.restore(state, control, intx_off).map_err(register)
    }

    fn interrupt_settings(&self, config: &ConfigSpace) -> (u16, bool) {
        (config.word(self.control_at), config.command() & COMMAND_INTX_OFF != 0)
    }

    /// The access that a driver makes through the configuration space: base address, offset and length, if it is one.
    fn access_window(&self, config: &ConfigSpace) -> Option<(usize, u64, usize)> {
        let bar = (config.word(self.access_at + 4) & 0xff) as usize;
        let offset = u64::from(config.double(self.access_at + 8));
        let bytes = config.double(self.access_at + 12);
        let fits = matches!(bytes, 1 | 2 | 4)
            && offset.is_multiple_of(bytes.into())
            && offset + u64::from(bytes) <= config.bar_bytes(bar);
        fits.then_some((bar, offset, bytes as usize))
    }

    fn touches_access_data(&self, offset: usize, bytes: usize) -> bool {
        let data = self.access_at + 16;
        offset < data + 4 && offset.saturating_add(bytes) > data
    }
}

impl Function for VirtioFunction {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if self.touches_access_data(offset, data.len()) {
            let access = self.access_window(&lock(&self.config));
            if let Some((bar, at, bytes)) = access {
                let mut value = [0u8; 4];
                if let Some(value) = value.get_mut(..bytes) {
                    self.read(bar, at, value);
                }
                lock(&self.config).write(self.access_at + 16, &value);
            }
        }
        let pending = self.interrupts.intx_pending();
        let mut config = lock(&self.config);
        config.show_intx(pending);
        config.read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) -> bool {
        let mut config = lock(&self.config);
        let moved = config.write(offset, data);
        let (control, intx_off) = self.interrupt_settings(&config);
        let access = self.access_window(&config).filter(|_| self.touches_access_data(offset, data.len()));
        let value = config.double(self.access_at + 16).to_le_bytes();
        // Under the lock, so that of two writes the later one's settings stay.
        self.interrupts.configure(control, intx_off);
        drop(config);
        if let Some((bar, at, bytes)) = access {
            self.write(bar, at, value.get(..bytes).unwrap_or_default());
        }
        moved
    }

    fn window(&self, bar: usize) -> Option<Window> {
        lock(&self.config).window(bar)
    }

    fn read(&self, bar: usize, offset: u64, data: &mut [u8]) {
        match (bar, offset & !(STRUCTURE_BYTES - 1), offset & (STRUCTURE_BYTES - 1)) {
            (BAR_MODERN, COMMON_OFFSET, at) => self.common_read(at, data),
            (BAR_MODERN, CAUSES_OFFSET, at) => {
                data.fill(0);
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = self.interrupts.take_causes();
                }
            }
            (BAR_MODERN, DEVICE_OFFSET, at) => self.lock().device.read_config(at, data),
            (BAR_VECTORS, _, at) if at < PENDING_OFFSET => self.interrupts.read_table(at, data),
            (BAR_VECTORS, _, at) => self.interrupts.read_pending(at - PENDING_OFFSET, data),
            (BAR_LEGACY, _, at) => self.legacy_read(at, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, bar: usize, offset: u64, data: &[u8]) {
        match (bar, offset & !(STRUCTURE_BYTES - 1), offset & (STRUCTURE_BYTES - 1)) {
            // The register says which queue; the value, which is its number again, is not needed.
            (BAR_MODERN, NOTIFY_OFFSET, at) => self.doorbell.ring(at as u32 / NOTIFY_STEP),
            (BAR_MODERN, COMMON_OFFSET, at) => self.common_write(at, data),
            (BAR_MODERN, DEVICE_OFFSET, at) => self.lock().device.write_config(at, data),
            (BAR_VECTORS, _, at) if at < PENDING_OFFSET => self.interrupts.write_table(at, data),
            (BAR_LEGACY, _, at) => self.legacy_write(at, data),
            _ => {}
        }
    }
}

/// Numbers by clause 4.1.2, classes as other machines have them: some old drivers look at those.
fn identity(device_id: u32, transitional: bool) -> Identity {
    let id = device_id as u16;
    let (old, class) = match device_id {
        1 => (0x1000, [0x02, 0x00, 0]),
        2 => (0x1001, [0x01, 0x00, 0]),
        3 => (0x1003, [0x07, 0x80, 0]),
        4 => (0x1005, [0x00, 0xff, 0]),
        5 => (0x1002, [0x05, 0x00, 0]),
        _ => (0, [0x00, 0xff, 0]),
    };
    // A device that came after virtio 1.0 has no old number.
    match transitional && old != 0 {
        true => Identity {
            vendor: VENDOR,
            device: old,
            revision: 0,
            class,
            subsystem_vendor: VENDOR,
            subsystem: id,
        },
        false => Identity {
            vendor: VENDOR,
            device: MODERN.saturating_add(id),
            revision: 1,
            class,
            subsystem_vendor: VENDOR,
            subsystem: MODERN_SUBSYSTEM,
        },
    }
}

/// MSI-X; returns where its message control is.
fn add_msix(config: &mut ConfigSpace, vectors: usize) -> usize {
    let mut body = (vectors as u16 - 1).to_le_bytes().to_vec();
    body.extend((BAR_VECTORS as u32).to_le_bytes());
    body.extend((PENDING_OFFSET as u32 | BAR_VECTORS as u32).to_le_bytes());
    let writable = interrupts::CONTROL_ENABLE | interrupts::CONTROL_MASK_ALL;
    config.add_capability(CAPABILITY_MSIX, &body, &writable.to_le_bytes()) + 2
}

/// A virtio structure's capability, from its third byte on: length, kind, base address, id, padding, offset, bytes.
fn structure(kind: u8, length: u8, offset: u64, bytes: u64) -> Vec<u8> {
    let mut body = vec![length, kind, BAR_MODERN as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((bytes as u32).to_le_bytes());
    body
}
