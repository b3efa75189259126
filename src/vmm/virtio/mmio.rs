//! virtio over MMIO, version 2: the registers of one device.
//!
//! The front of a [`Transport`] for the machine kind without PCI. The registers of everyday operation need no lock at
//! all ([`HotRegisters`]): no vCPU waits for a disk.
//!
//! The interrupt is an edge: the bit in the interrupt status is set first, then the line raised, every time; an edge
//! that meets a handler already running is latched by the interrupt controller.
//!
//! Facts: virtio 1.2 clauses 4.2.2, 4.2.3; FreeBSD's `sys/dev/virtio/mmio/virtio_mmio.c`: negotiates both feature words,
//! asks `QueueNumMax`, reads configuration fields in their own width between two reads of `ConfigGeneration`.

mod causes;
mod hot;
#[cfg(test)]
mod race;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_mmio::*;
use virtio_queue::QueueT;

pub use self::hot::HotRegisters;
use super::transport::{self, Transport, TransportError};
use super::{VirtioDevice, read_space};
use crate::vmm::bus::lock;
use crate::vmm::irq::Interrupt;
use crate::vmm::memory::GuestMemory;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "cspk": no driver looks at it.
const VENDOR: u32 = u32::from_le_bytes(*b"cspk");

/// One virtio-mmio device: a transport and its window.
pub struct MmioTransport {
    transport: Arc<Mutex<Transport>>,
    hot: Arc<HotRegisters>,
}

impl MmioTransport {
    /// A device in its reset state, behind registers.
    pub fn new(device: Box<dyn VirtioDevice>, interrupt: Arc<dyn Interrupt>) -> Result<Self, TransportError> {
        let doorbell = transport::doorbell(&*device)?;
        let hot = Arc::new(HotRegisters::new(doorbell.clone(), interrupt));
        let transport = Arc::new(Mutex::new(Transport::new(device, doorbell, hot.clone())?));
        Ok(Self { transport, hot })
    }

    /// For the device thread.
    pub fn transport(&self) -> &Arc<Mutex<Transport>> {
        &self.transport
    }

    /// The transport, locked.
    pub fn lock(&self) -> MutexGuard<'_, Transport> {
        lock(&self.transport)
    }

    /// The registers that need no lock on the transport.
    pub fn hot_registers(&self) -> Arc<HotRegisters> {
        self.hot.clone()
    }

    /// Answers a read of `data.len()` bytes at `offset` of the window. Any width; no read changes anything.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if self.hot.read(offset, data) {
            return;
        }
        let transport = self.lock();
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            transport.device.read_config(config_offset, data);
            return;
        }
        // Registers have 32 bits; other widths get the bytes that lie there.
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let register = u32::try_from(at & !3).map_or(0, |register| self.register(&transport, register));
            read_space(&register.to_le_bytes(), at & 3, std::slice::from_mut(byte));
        }
    }

    /// Takes a write of `data` at `offset` of the window.
    pub fn write(&self, offset: u64, data: &[u8], memory: &GuestMemory) {
        if self.hot.write(offset, data) {
            return;
        }
        let mut transport = self.lock();
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            transport.device.write_config(config_offset, data);
            return;
        }
        // Clause 4.2.2.2: drivers access registers with 32 bits, aligned. Anything else is ignored.
        if let (Ok(register), Ok(value)) = (u32::try_from(offset), data.try_into()) {
            set_register(&mut transport, register, u32::from_le_bytes(value), memory);
        }
    }

    fn register(&self, transport: &Transport, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => transport.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => transport.device_features_word(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => transport.selected().map_or(0, |queue| u32::from(queue.max_size())),
            VIRTIO_MMIO_QUEUE_READY => transport.selected().map_or(0, |queue| u32::from(queue.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => transport::Signal::causes(&*self.hot),
            VIRTIO_MMIO_STATUS => transport.status,
            // No shared memory region exists: length and base read as all ones (clause 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => transport.config_generation(),
            _ => 0,
        }
    }
}

fn set_register(transport: &mut Transport, register: u32, value: u32, memory: &GuestMemory) {
    // The value as one half of an address, and the half that stays.
    let (half, kept) = (Some(value), None);
    match register {
        VIRTIO_MMIO_DEVICE_FEATURES_SEL => transport.device_features_select = value,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL => transport.driver_features_select = value,
        VIRTIO_MMIO_DRIVER_FEATURES => transport.set_driver_features_word(value),
        VIRTIO_MMIO_QUEUE_SEL => transport.queue_select = value,
        VIRTIO_MMIO_QUEUE_NUM => transport.set_queue_size(value),
        VIRTIO_MMIO_QUEUE_READY => transport.set_queue_ready(value, memory),
        VIRTIO_MMIO_STATUS => transport.set_status(value),
        VIRTIO_MMIO_QUEUE_DESC_LOW => transport.configure(|queue| queue.set_desc_table_address(half, kept)),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => transport.configure(|queue| queue.set_desc_table_address(kept, half)),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => transport.configure(|queue| queue.set_avail_ring_address(half, kept)),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => transport.configure(|queue| queue.set_avail_ring_address(kept, half)),
        VIRTIO_MMIO_QUEUE_USED_LOW => transport.configure(|queue| queue.set_used_ring_address(half, kept)),
        VIRTIO_MMIO_QUEUE_USED_HIGH => transport.configure(|queue| queue.set_used_ring_address(kept, half)),
        _ => {}
    }
}
