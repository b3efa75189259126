//! What a vCPU's exits reach: the port bus with the chipset, and the memory-mapped devices.
//!
//! Two kinds of machine: one with virtio-mmio windows and nothing else, one with PCI and ACPI's fixed hardware ([`Pc`]).

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::errno;

use super::chipset::ioapic::{IOAPIC_BYTES, IOAPIC_START};
use super::chipset::pci::PciBus;
use super::chipset::power::Power;
use super::chipset::{Chipset, PortEffect};
use super::memory::{GuestMemory, VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START};
use super::milestones::Milestones;
use super::virtio::mmio::MmioTransport;
use super::virtio::pci::VirtioFunction;
use super::virtio::transport::Transport;

/// Shared by all vCPU threads and the device thread.
pub struct Bus {
    pub chipset: Chipset,
    /// All virtio devices, for the device thread.
    pub virtio: Vec<Arc<Mutex<Transport>>>,
    /// Their windows, on a machine without PCI.
    mmio: Vec<MmioTransport>,
    /// What only the machine kind with ACPI and PCI has.
    pub pc: Option<Pc>,
    pub memory: GuestMemory,
    /// Exits to this process, all vCPUs.
    pub exits: AtomicU64,
    pub milestones: Milestones,
}

/// Host bridge, power block and functions.
pub struct Pc {
    pub pci: PciBus,
    pub power: Power,
    /// In the order of [`Bus::virtio`]: devices 1, 2, ... of the bus.
    pub functions: Vec<Arc<VirtioFunction>>,
    /// The functions have the legacy interface, too.
    pub transitional: bool,
}

enum Target<'a> {
    IoApic(u64),
    Virtio(&'a MmioTransport, u64),
    Nothing,
}

/// Takes a lock whether or not a thread died holding it: device state is plain data, and the VM is being ended then.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with one virtio-mmio window for each of `virtio`, from [`VIRTIO_MMIO_START`] on.
    pub fn new(chipset: Chipset, mmio: Vec<MmioTransport>, memory: GuestMemory) -> Self {
        let virtio = mmio.iter().map(|window| window.transport().clone()).collect();
        Bus::of(chipset, virtio, mmio, None, memory)
    }

    /// A bus with PCI and the functions on it.
    pub fn with_pc(chipset: Chipset, pc: Pc, memory: GuestMemory) -> Self {
        let virtio = pc.functions.iter().map(|function| function.transport().clone()).collect();
        Bus::of(chipset, virtio, Vec::new(), Some(pc), memory)
    }

    fn of(
        chipset: Chipset,
        virtio: Vec<Arc<Mutex<Transport>>>,
        mmio: Vec<MmioTransport>,
        pc: Option<Pc>,
        memory: GuestMemory,
    ) -> Self {
        Bus { chipset, virtio, mmio, pc, memory, exits: AtomicU64::new(0), milestones: Milestones::default() }
    }

    /// A guest `in` of `data.len()` bytes (1, 2 or 4) from `port`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let taken =
            self.pc.as_ref().is_some_and(|pc| pc.pci.port_read(port, data) || pc.power.port_read(port, data));
        if !taken {
            self.chipset.port_read(port, data);
        }
    }

    /// A guest `out` of `data.len()` bytes (1, 2 or 4) to `port`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortEffect {
        let Some(pc) = self.pc.as_ref().filter(|_| !self.chipset.is_ready_port(port)) else {
            return self.chipset.port_write(port, data);
        };
        match pc.power.port_write(port, data) {
            Some(true) => PortEffect::PowerOff,
            Some(false) => PortEffect::None,
            None if pc.pci.port_write(port, data) => PortEffect::None,
            None => self.chipset.port_write(port, data),
        }
    }

    fn target(&self, address: u64) -> Target<'_> {
        if let Some(offset) = address.checked_sub(IOAPIC_START).filter(|offset| *offset < IOAPIC_BYTES) {
            return Target::IoApic(offset);
        }
        let Some(offset) = address.checked_sub(VIRTIO_MMIO_START) else {
            return Target::Nothing;
        };
        let slot = (offset / VIRTIO_MMIO_BYTES) as usize;
        match self.mmio.get(slot) {
            Some(window) => Target::Virtio(window, offset % VIRTIO_MMIO_BYTES),
            None => Target::Nothing,
        }
    }

    /// A guest read of memory that is not RAM. Nothing there: ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.target(address) {
            Target::IoApic(offset) => self.chipset.ioapic.read(offset, data),
            Target::Virtio(window, offset) => window.read(offset, data),
            Target::Nothing => {
                if !self.pc.as_ref().is_some_and(|pc| pc.pci.memory_read(address, data)) {
                    data.fill(0xff);
                }
            }
        }
    }

    /// A guest write to memory that is not RAM. Fails only if KVM refuses new interrupt routes.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), errno::Error> {
        match self.target(address) {
            Target::IoApic(offset) => return self.chipset.ioapic.write(offset, data),
            Target::Virtio(window, offset) => window.write(offset, data, &self.memory),
            Target::Nothing => {
                // Nothing there: the write is lost.
                let _ = self.pc.as_ref().is_some_and(|pc| pc.pci.memory_write(address, data));
            }
        }
        Ok(())
    }
}

/// A bus that several threads hold.
pub type SharedBus = Arc<Bus>;
