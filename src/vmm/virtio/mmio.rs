//! virtio over MMIO, version 2: the registers of one device, its queues, and its interrupt.
//!
//! vCPU threads read and write registers; what a register write asks of the queues is only noted here and handed to
//! the device thread through the transport's own event descriptor (the *kick*), which is always among
//! [`MmioTransport::host_interest`]. So whatever changes the descriptors to be watched happens on, or wakes, the thread
//! that watches them. The registers of everyday operation need no lock at all ([`HotRegisters`]): no vCPU waits for a
//! disk. With an ioeventfd on `QueueNotify` the device thread calls [`MmioTransport::notify`] itself.
//!
//! The interrupt is an edge: the bit in the interrupt status is set first, then the line raised, every time; an edge
//! that meets a handler already running is latched by the interrupt controller.
//!
//! May touch: guest memory (rings and buffers), on the device thread only: a restored guest's memory may need a pager
//! that is not there yet while registers are being restored.
//!
//! Facts: virtio 1.2 clauses 2.1, 2.2, 4.2.2, 4.2.3; FreeBSD's `sys/dev/virtio/mmio/virtio_mmio.c`: waits for status 0
//! after a reset, negotiates both feature words, reads back FEATURES_OK, asks `QueueNumMax`, reads configuration fields
//! in their own width between two reads of `ConfigGeneration`, notifies queues (and polls them) before DRIVER_OK.

mod hot;
mod persist;
#[cfg(test)]
mod race;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

pub use self::hot::HotRegisters;
pub use self::persist::RestoreError;
use super::{DeviceError, HostInterest, Progress, VirtioDevice, read_space};
use crate::vmm::irq::Interrupt;
use crate::vmm::memory::GuestMemory;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "cspk": no driver looks at it.
const VENDOR: u32 = u32::from_le_bytes(*b"cspk");
/// Most queues of a device: the bits of a mask.
pub const QUEUES_MAX: usize = 32;
/// The bits of the status register that a driver may set.
const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_FAILED;
/// Complaints logged about one device: a hostile guest can break and reset it for ever.
const COMPLAINTS_MAX: u32 = 8;

/// Why a transport cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("no event descriptor for a virtio device: {0}; raise the process's limit of open files")]
    Kick(#[source] io::Error),
    #[error("a device asks for queues that cannot be: {0:?}")]
    Queues(Vec<u16>),
}

/// One virtio-mmio device.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<Queue>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    config_generation: u32,
    hot: Arc<HotRegisters>,
    complaints: u32,
}

impl MmioTransport {
    /// A device in its reset state, behind registers.
    pub fn new(device: Box<dyn VirtioDevice>, interrupt: Arc<dyn Interrupt>) -> Result<Self, TransportError> {
        let sizes = device.queue_sizes();
        let queues: Vec<Queue> = sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect();
        if queues.len() != sizes.len() || queues.len() > QUEUES_MAX {
            return Err(TransportError::Queues(sizes.to_vec()));
        }
        let hot = Arc::new(HotRegisters::new(queues.len()).map_err(TransportError::Kick)?);
        Ok(Self {
            device,
            interrupt,
            queues,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_generation: 0,
            hot,
            complaints: 0,
        })
    }

    /// Number of queues: as many values of `QueueNotify` are worth an ioeventfd.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The registers that need no lock on this transport.
    pub fn hot_registers(&self) -> Arc<HotRegisters> {
        self.hot.clone()
    }

    /// Name of the device.
    pub fn device_name(&self) -> &'static str {
        self.device.name()
    }

    /// Answers a read of `data.len()` bytes at `offset` of the window. Any width; no read changes anything.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.read_config(config_offset, data);
            return;
        }
        // Registers have 32 bits; other widths get the bytes that lie there.
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            let register = u32::try_from(at & !3).map_or(0, |register| self.register(register));
            read_space(&register.to_le_bytes(), at & 3, std::slice::from_mut(byte));
        }
    }

    /// Takes a write of `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8], memory: &GuestMemory) {
        if let Some(config_offset) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            self.device.write_config(config_offset, data);
            return;
        }
        if self.hot.write(offset, data) {
            return;
        }
        // Clause 4.2.2.2: drivers access registers with 32 bits, aligned. Anything else is ignored.
        if let (Ok(register), Ok(value)) = (u32::try_from(offset), data.try_into()) {
            self.set_register(register, u32::from_le_bytes(value), memory);
        }
    }

    /// The driver notified `queue`: handles what is available there. On the device thread. (Who learns of it by an
    /// ioeventfd must call this for a signal that came before a pause, too, or a snapshot does not know of it.)
    pub fn notify(&mut self, queue: u16, memory: &GuestMemory) {
        if usize::from(queue) < self.queues.len() {
            self.work_on(1 << queue, memory);
        }
    }

    /// Host descriptors to watch now. Ask again after every call that takes guest memory on the device thread. One
    /// that is not in the list must not be watched at all, not even for hang-ups.
    pub fn host_interest(&self) -> Vec<HostInterest> {
        let mut interest = vec![HostInterest { fd: self.hot.kick_fd(), readable: true, writable: false }];
        if self.running() {
            interest.extend(self.device.host_interest());
        }
        interest
    }

    /// A watched descriptor is ready. On the device thread.
    pub fn host_event(&mut self, fd: RawFd, memory: &GuestMemory) {
        if fd == self.hot.kick_fd() {
            let pending = self.hot.take_pending();
            self.work_on(pending, memory);
        } else if self.running() {
            let result = self.device.host_event(fd, &mut self.queues, memory);
            self.conclude(result, None);
        }
    }

    /// The device takes part in I/O: features are agreed upon and the driver did not break it since.
    ///
    /// Clause 3.1.1 has drivers wait for DRIVER_OK; FreeBSD's vtblk asks for the disk's serial number, and polls for
    /// the answer, in its attach routine, before the bus sets DRIVER_OK. A device that waits hangs it there.
    fn running(&self) -> bool {
        self.status & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)
            == VIRTIO_CONFIG_S_FEATURES_OK
    }

    /// Has the device look at the queues of `mask`.
    fn work_on(&mut self, mask: u32, memory: &GuestMemory) {
        for index in 0..self.queues.len() {
            if mask & 1 << index == 0 || !self.running() || !self.queues.get(index).is_some_and(Queue::ready)
            {
                continue;
            }
            let result = self.device.queue_event(index, &mut self.queues, memory);
            self.conclude(result, Some(index));
        }
    }

    /// What follows a call to the device.
    fn conclude(&mut self, result: Result<Progress, DeviceError>, queue: Option<usize>) {
        match result {
            Ok(progress) => {
                if progress.interrupt {
                    self.raise(VIRTIO_MMIO_INT_VRING);
                }
                match queue {
                    Some(index) if progress.more => self.hot.kick(1 << index),
                    // A host event may concern any queue.
                    None if progress.more => self.kick_all(),
                    _ => {}
                }
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Stops the device until the driver resets it (clause 2.1.2).
    fn fail(&mut self, error: &DeviceError) {
        if self.complaints < COMPLAINTS_MAX {
            self.complaints += 1;
            tracing::warn!(device = self.device.name(), %error, "virtio device stopped until its driver resets it");
        }
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&mut self, bit: u32) {
        self.hot.set_interrupt(bit);
        self.interrupt.raise();
    }

    fn kick_all(&mut self) {
        let mask =
            self.queues.iter().enumerate().filter(|(_, queue)| queue.ready()).map(|(index, _)| 1 << index);
        self.hot.kick(mask.sum());
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, if its settings may be changed now.
    fn configurable(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize).filter(|queue| !queue.ready())
    }

    fn device_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    fn register(&self, register: u32) -> u32 {
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device.device_id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_select {
                0 => self.device_features() as u32,
                1 => (self.device_features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| u32::from(queue.max_size())),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| u32::from(queue.ready())),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.hot.interrupt_status(),
            VIRTIO_MMIO_STATUS => self.status,
            // No shared memory region exists: length and base read as all ones (clause 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn set_register(&mut self, register: u32, value: u32, memory: &GuestMemory) {
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            VIRTIO_MMIO_QUEUE_NUM => {
                // A size that is no size for this queue keeps the old one: the driver asked QueueNumMax before.
                if let (Some(queue), Ok(size)) = (self.configurable(), u16::try_from(value)) {
                    let _ = queue.try_set_size(size);
                }
            }
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value, memory),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.configure(|queue| queue.set_desc_table_address(Some(value), None))
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.configure(|queue| queue.set_desc_table_address(None, Some(value)))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.configure(|queue| queue.set_avail_ring_address(Some(value), None))
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.configure(|queue| queue.set_avail_ring_address(None, Some(value)))
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.configure(|queue| queue.set_used_ring_address(Some(value), None))
            }
            VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.configure(|queue| queue.set_used_ring_address(None, Some(value)))
            }
            _ => {}
        }
    }

    fn configure(&mut self, change: impl FnOnce(&mut Queue)) {
        if let Some(queue) = self.configurable() {
            change(queue);
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let (kept, shift) = match self.driver_features_select {
            0 => (!0 << 32, 0),
            1 => (u64::from(u32::MAX), 32),
            _ => return,
        };
        self.driver_features = self.driver_features & kept | u64::from(value) << shift;
    }

    fn set_queue_ready(&mut self, value: u32, memory: &GuestMemory) {
        let started = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else { return };
        match value {
            0 => queue.set_ready(false),
            1 if !queue.ready() && !started => {
                queue.set_event_idx(event_idx);
                queue.set_ready(true);
                // A queue that does not lie in memory reads back as not ready. (Checks the ranges, touches nothing.)
                let good = queue.is_valid(memory) && queue.avail_ring() != 0;
                queue.set_ready(good);
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let new = value & DRIVER_BITS & !self.status;
        self.status |= new & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.features_acceptable() {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            self.device.activate(self.driver_features);
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            // What was filled before and not notified.
            self.kick_all();
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.hot.set(0, 0);
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }
}
