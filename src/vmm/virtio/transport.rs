//! What all transports have in common: the status, the features and the queues of one device, and the device itself.
//!
//! A *front* ([`super::mmio`], [`super::pci`]) gives the guest registers and works on a [`Transport`] by them; the device
//! thread works on it by [`HostInterest`] descriptors. vCPU threads only note what a register write asks of the queues:
//! it is handed to the device thread through the transport's own event descriptor ([`Doorbell`]), which is always among
//! [`Transport::host_interest`]. So whatever changes the descriptors to be watched happens on, or wakes, the thread
//! that watches them. What a driver touches all the time needs no lock: the front keeps it beside the transport, in
//! the doorbell and in its [`Signal`].
//!
//! May touch: guest memory (rings and buffers), on the device thread only: a restored guest's memory may need a pager
//! that is not there yet while registers are being restored.
//!
//! Facts: virtio 1.2 clauses 2.1, 2.2, 2.7, 3.1; FreeBSD's `sys/dev/virtio/mmio/virtio_mmio.c`, `pci/virtio_pci_modern.c`
//! and `pci/virtio_pci_legacy.c`: wait for status 0 after a reset, read back FEATURES_OK, notify queues (and poll them)
//! before DRIVER_OK.

#![forbid(unsafe_code)]

mod doorbell;
mod pending;
mod persist;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

pub use self::doorbell::Doorbell;
pub use self::persist::RestoreError;
use super::rate::Rates;
use super::{DeviceError, HostInterest, Progress, VirtioDevice};
use crate::vmm::memory::GuestMemory;

/// Most queues of a device: the bits of a mask.
pub const QUEUES_MAX: usize = 32;
/// Cause of an interrupt: buffers were used.
pub const CAUSE_USED: u32 = 1;
/// Cause of an interrupt: the configuration, or the status by itself, changed.
pub const CAUSE_CHANGED: u32 = 2;
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

/// How a front tells the driver. Cheap, never blocks for long, may be called from any thread.
pub trait Signal: Send + Sync {
    /// Buffers of these queues were used (bit = number), and the driver wants to hear of it.
    fn used(&self, queues: u32);
    /// [`CAUSE_CHANGED`].
    fn changed(&self);
    /// Causes that the driver did not acknowledge.
    fn causes(&self) -> u32;
    /// The device was reset: no causes, and nothing that the driver chose.
    fn reset(&self);
    /// Sets the causes of a saved state, and interrupts nobody.
    fn restore(&self, causes: u32);
    /// Interrupts again for causes that were not acknowledged.
    fn again(&self);
}

/// One device with its queues.
pub struct Transport {
    pub(super) device: Box<dyn VirtioDevice>,
    signal: Arc<dyn Signal>,
    doorbell: Arc<Doorbell>,
    pub(super) queues: Vec<Queue>,
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    driver_features: u64,
    pub(super) queue_select: u32,
    config_generation: u32,
    /// The driver came by the legacy interface: it knows neither FEATURES_OK nor VERSION_1.
    legacy: bool,
    complaints: u32,
}

/// A doorbell for `device`, from which its front makes its [`Signal`]; then both go to [`Transport::new`].
pub fn doorbell(device: &dyn VirtioDevice) -> Result<Arc<Doorbell>, TransportError> {
    let sizes = device.queue_sizes();
    if sizes.len() > QUEUES_MAX {
        return Err(TransportError::Queues(sizes.to_vec()));
    }
    Doorbell::new(sizes.len()).map(Arc::new).map_err(TransportError::Kick)
}

impl Transport {
    /// A device in its reset state.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        doorbell: Arc<Doorbell>,
        signal: Arc<dyn Signal>,
    ) -> Result<Self, TransportError> {
        let sizes = device.queue_sizes();
        let queues: Vec<Queue> = sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect();
        if queues.len() != sizes.len() || queues.len() != doorbell.queues().count_ones() as usize {
            return Err(TransportError::Queues(sizes.to_vec()));
        }
        Ok(Self {
            device,
            signal,
            doorbell,
            queues,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_generation: 0,
            legacy: false,
            complaints: 0,
        })
    }

    /// Number of queues: as many doorbells are worth an ioeventfd.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// Name of the device.
    pub fn device_name(&self) -> &'static str {
        self.device.name()
    }

    /// Device id, virtio 1.2 clause 5.
    pub fn device_id(&self) -> u32 {
        self.device.device_id()
    }

    /// Goes up when the device changes its configuration by itself.
    pub fn config_generation(&self) -> u32 {
        self.config_generation
    }

    /// The driver came by the legacy interface.
    pub fn legacy(&self) -> bool {
        self.legacy
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
        let mut interest =
            vec![HostInterest { fd: self.doorbell.kick_fd(), readable: true, writable: false }];
        if self.running() {
            interest.extend(self.device.host_interest());
        }
        interest
    }

    /// A watched descriptor is ready. On the device thread.
    pub fn host_event(&mut self, fd: RawFd, memory: &GuestMemory) {
        if fd == self.doorbell.kick_fd() {
            let pending = self.doorbell.take_pending();
            self.work_on(pending, memory);
        } else if self.running() {
            let before = self.next_used();
            let result = self.device.host_event(fd, &mut self.queues, memory);
            self.conclude(result, &before, None);
        }
    }

    /// Another peer takes the place of the device's ([`VirtioDevice::new_peer`]).
    pub fn new_peer(&mut self) {
        self.device.new_peer();
        self.grant_wishes();
    }

    /// Limits what the device may do in a second ([`VirtioDevice::limit`]).
    ///
    /// # Errors
    /// No timer descriptor.
    pub fn limit(&mut self, rates: &Rates) -> io::Result<()> {
        self.device.limit(rates)
    }

    /// Waits until nothing is under way in the device. On the device thread, before a pause: after it guest memory and
    /// disks stand still, and [`Self::save`] finds every chain either given back or still in its ring.
    pub fn quiesce(&mut self, memory: &GuestMemory) {
        if self.running() {
            let before = self.next_used();
            let result = self.device.quiesce(&mut self.queues, memory);
            self.conclude(result, &before, None);
        } else {
            // One that broke, or whose driver gave up: nothing it was asked for is wanted any more.
            self.device.reset();
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
            let before = self.next_used();
            let result = self.device.queue_event(index, &mut self.queues, memory);
            self.conclude(result, &before, Some(index));
        }
    }

    /// How far each queue's used ring is filled.
    fn next_used(&self) -> [u16; QUEUES_MAX] {
        let mut filled = [0; QUEUES_MAX];
        for (to, queue) in filled.iter_mut().zip(&self.queues) {
            *to = queue.next_used();
        }
        filled
    }

    /// What follows a call to the device. A device may answer on another queue than the one that it was called for
    /// (or the call was not for a queue at all), so the used rings tell whom the interrupt is for.
    fn conclude(
        &mut self,
        result: Result<Progress, DeviceError>,
        before: &[u16; QUEUES_MAX],
        queue: Option<usize>,
    ) {
        match result {
            Ok(progress) => {
                if progress.interrupt {
                    let moved = self.queues.iter().zip(before).enumerate();
                    let moved = moved.filter(|(_, (queue, before))| queue.next_used() != **before);
                    match moved.map(|(index, _)| 1u32 << index).sum() {
                        // It speaks of what an earlier call used.
                        0 => self.signal.used(self.doorbell.queues()),
                        queues => self.signal.used(queues),
                    }
                }
                match queue {
                    Some(index) if progress.more => self.doorbell.kick(1 << index),
                    // A host event may concern any queue.
                    None if progress.more => self.kick_all(),
                    _ => {}
                }
            }
            Err(error) => self.fail(&error),
        }
        self.grant_wishes();
    }

    /// Does what the device wants of its transport.
    fn grant_wishes(&mut self) {
        let wishes = self.device.take_wishes();
        if !self.running() {
            return;
        }
        if wishes.config_changed {
            self.config_generation = self.config_generation.wrapping_add(1);
            self.signal.changed();
        }
        match wishes.queues & self.doorbell.queues() {
            0 => {}
            queues => self.doorbell.kick(queues),
        }
    }

    /// Stops the device until the driver resets it (clause 2.1.2).
    fn fail(&mut self, error: &DeviceError) {
        if self.complaints < COMPLAINTS_MAX {
            self.complaints += 1;
            tracing::warn!(device = self.device.name(), %error, "virtio device stopped until its driver resets it");
        }
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        // What is still under way ends here: the driver may take its buffers back without asking again.
        self.device.reset();
        self.signal.changed();
    }

    fn kick_all(&mut self) {
        let mask =
            self.queues.iter().enumerate().filter(|(_, queue)| queue.ready()).map(|(index, _)| 1 << index);
        self.doorbell.kick(mask.sum());
    }

    pub(super) fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, if its settings may be changed now.
    pub(super) fn configurable(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize).filter(|queue| !queue.ready())
    }

    pub(super) fn configure(&mut self, change: impl FnOnce(&mut Queue)) {
        if let Some(queue) = self.configurable() {
            change(queue);
        }
    }

    /// Sets the selected queue's size. One that is no size for this queue keeps the old: the driver asked for the
    /// largest before.
    pub(super) fn set_queue_size(&mut self, value: u32) {
        if let (Some(queue), Ok(size)) = (self.configurable(), u16::try_from(value)) {
            let _ = queue.try_set_size(size);
        }
    }

    fn device_features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    /// The selected word of the features offered.
    pub(super) fn device_features_word(&self) -> u32 {
        word(self.device_features(), self.device_features_select)
    }

    /// The selected word of the features that the driver has written.
    pub(super) fn driver_features_word(&self) -> u32 {
        word(self.driver_features, self.driver_features_select)
    }

    pub(super) fn set_driver_features_word(&mut self, value: u32) {
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

    /// Enables the selected queue (1), or disables it (0).
    pub(super) fn set_queue_ready(&mut self, value: u32, memory: &GuestMemory) {
        let started = self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let index = self.queue_select as usize;
        let Some(queue) = self.queues.get_mut(index) else { return };
        match value {
            0 if queue.ready() => {
                self.device.stop_queue(index);
                // Given again, it begins anew: what was under way is forgotten, and no index may tell of it.
                queue.set_ready(false);
                queue.set_next_avail(0);
                queue.set_next_used(0);
            }
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

    pub(super) fn set_status(&mut self, value: u32) {
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

    /// A legacy driver has no FEATURES_OK: what it has written when it first gives a queue, or says DRIVER_OK, counts,
    /// less what was not offered (clauses 3.1.2 and 2.2.3).
    pub(super) fn agree_as_legacy(&mut self) {
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            self.legacy = true;
            self.driver_features &= self.device.features() & u64::from(u32::MAX);
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            self.device.activate(self.driver_features);
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features() == 0
            && (self.legacy || self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0)
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.doorbell.set_pending(0);
        self.signal.reset();
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.legacy = false;
    }
}

/// Word 0 or 1 of 64 feature bits; further ones are zero.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
