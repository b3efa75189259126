//! What a vCPU's exits reach: the port bus with the chipset, and the memory-mapped devices.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::errno;

use super::chipset::Chipset;
use super::chipset::ioapic::{IOAPIC_BYTES, IOAPIC_START};
use super::memory::{GuestMemory, VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START};
use super::virtio::mmio::MmioTransport;
use super::virtio::transport::Transport;

/// Shared by all vCPU threads and the device thread.
pub struct Bus {
    pub chipset: Chipset,
    /// All virtio devices, for the device thread.
    pub virtio: Vec<Arc<Mutex<Transport>>>,
    /// Their windows.
    mmio: Vec<MmioTransport>,
    pub memory: GuestMemory,
    /// Exits to this process, all vCPUs.
    pub exits: AtomicU64,
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
        Bus { chipset, virtio, mmio, memory, exits: AtomicU64::new(0) }
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
            Target::Nothing => data.fill(0xff),
        }
    }

    /// A guest write to memory that is not RAM. Fails only if KVM refuses new interrupt routes.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), errno::Error> {
        match self.target(address) {
            Target::IoApic(offset) => return self.chipset.ioapic.write(offset, data),
            Target::Virtio(window, offset) => window.write(offset, data, &self.memory),
            Target::Nothing => {}
        }
        Ok(())
    }
}

/// A bus that several threads hold.
pub type SharedBus = Arc<Bus>;
