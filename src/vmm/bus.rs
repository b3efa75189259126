//! What a vCPU's exits reach: the port bus with the chipset, and the memory-mapped devices.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::errno;

use super::chipset::Chipset;
use super::chipset::ioapic::{IOAPIC_BYTES, IOAPIC_START};
use super::memory::{GuestMemory, VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START};
use super::virtio::mmio::{HotRegisters, MmioTransport};

/// Shared by all vCPU threads and the device thread.
pub struct Bus {
    pub chipset: Chipset,
    pub virtio: Vec<Mutex<MmioTransport>>,
    /// For each of them, what a vCPU may access while the device thread holds the lock for a disk.
    hot: Vec<Arc<HotRegisters>>,
    pub memory: GuestMemory,
    /// Exits to this process, all vCPUs.
    pub exits: AtomicU64,
}

enum Target<'a> {
    IoApic(u64),
    Virtio(&'a Mutex<MmioTransport>, &'a HotRegisters, u64),
    Nothing,
}

/// Takes a lock whether or not a thread died holding it: device state is plain data, and the VM is being ended then.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// A bus with one virtio-mmio window for each of `virtio`, from [`VIRTIO_MMIO_START`] on.
    pub fn new(chipset: Chipset, virtio: Vec<MmioTransport>, memory: GuestMemory) -> Self {
        let hot = virtio.iter().map(MmioTransport::hot_registers).collect();
        let virtio = virtio.into_iter().map(Mutex::new).collect();
        Bus { chipset, virtio, hot, memory, exits: AtomicU64::new(0) }
    }

    fn target(&self, address: u64) -> Target<'_> {
        if let Some(offset) = address.checked_sub(IOAPIC_START).filter(|offset| *offset < IOAPIC_BYTES) {
            return Target::IoApic(offset);
        }
        let Some(offset) = address.checked_sub(VIRTIO_MMIO_START) else {
            return Target::Nothing;
        };
        let slot = (offset / VIRTIO_MMIO_BYTES) as usize;
        match (self.virtio.get(slot), self.hot.get(slot)) {
            (Some(device), Some(hot)) => Target::Virtio(device, hot, offset % VIRTIO_MMIO_BYTES),
            _ => Target::Nothing,
        }
    }

    /// A guest read of memory that is not RAM. Nothing there: ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.target(address) {
            Target::IoApic(offset) => self.chipset.ioapic.read(offset, data),
            Target::Virtio(_, hot, offset) if hot.read(offset, data) => {}
            Target::Virtio(device, _, offset) => lock(device).read(offset, data),
            Target::Nothing => data.fill(0xff),
        }
    }

    /// A guest write to memory that is not RAM. Fails only if KVM refuses new interrupt routes.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), errno::Error> {
        match self.target(address) {
            Target::IoApic(offset) => return self.chipset.ioapic.write(offset, data),
            Target::Virtio(_, hot, offset) if hot.write(offset, data) => {}
            Target::Virtio(device, _, offset) => lock(device).write(offset, data, &self.memory),
            Target::Nothing => {}
        }
        Ok(())
    }
}

/// A bus that several threads hold.
pub type SharedBus = Arc<Bus>;
