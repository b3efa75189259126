//! Saving and restoring a transport. Everything in a saved state is hostile.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{CAUSE_CHANGED, CAUSE_USED, DRIVER_BITS, Transport};
use crate::snapshot::state::virtio::{QueueState, TransportState};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::DeviceError;

/// Why a saved transport cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "the snapshot has virtio device {saved} where this machine has {here} ({name}): the device lists differ"
    )]
    DeviceId { saved: u32, here: u32, name: &'static str },
    #[error("the saved {name} device has {saved} queues, not {here}")]
    QueueCount { name: &'static str, saved: usize, here: usize },
    #[error(
        "the saved {name} device uses features {missing:#x} that are not offered here; use the version that took the snapshot, and for a net device a link that can do as much (a TAP, not a wire)"
    )]
    Features { name: &'static str, missing: u64 },
    #[error("the saved {name} device's {what} cannot be; the snapshot is damaged")]
    Register { name: &'static str, what: String },
    #[error("queue {index} of the saved {name} device cannot be: {what}; the snapshot is damaged")]
    Queue { name: &'static str, index: usize, what: String },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl Transport {
    /// The state of transport and device. Only while no vCPU runs and the device thread is quiet. Every queue with
    /// chains that were not looked at is then either noted as pending, or its driver has not notified it yet, or its
    /// device knows what it waits for: so a restored device touches guest memory only when there is work.
    pub fn save(&self) -> Result<TransportState, DeviceError> {
        let queues = self.queues.iter().map(|queue| QueueState {
            size: queue.size(),
            ready: queue.ready(),
            descriptor_table: queue.desc_table(),
            available_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
            event_idx: queue.event_idx_enabled(),
        });
        Ok(TransportState {
            device_id: self.device.device_id(),
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            interrupt_status: self.signal.causes(),
            config_generation: self.config_generation,
            pending: self.doorbell.pending(),
            queues: queues.collect(),
            device: self.device.save()?,
        })
    }

    /// Takes a saved state over. Checks addresses against the layout of `memory` and touches no page of it. After an
    /// error the transport is reset. Call [`Self::kick_after_restore`] once everything else is in place.
    ///
    /// `legacy`: its driver came by the legacy interface, so that VERSION_1 need not be among its features.
    pub fn restore(
        &mut self,
        state: &TransportState,
        legacy: bool,
        memory: &GuestMemory,
    ) -> Result<(), RestoreError> {
        self.reset();
        self.legacy = legacy;
        let result = self.take_over(state, memory);
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// Sets going what a restored device was about to do: the device thread will look at the queues that were
    /// pending, and an interrupt that was not acknowledged is raised again. Touches no guest memory. Harmless at any
    /// time.
    pub fn kick_after_restore(&mut self) {
        self.grant_wishes();
        if self.doorbell.pending() != 0 {
            self.doorbell.kick(0);
        }
        if self.signal.causes() != 0 {
            self.signal.again();
        }
    }

    fn take_over(&mut self, state: &TransportState, memory: &GuestMemory) -> Result<(), RestoreError> {
        let name = self.device.name();
        let here = self.device.device_id();
        if state.device_id != here {
            return Err(RestoreError::DeviceId { saved: state.device_id, here, name });
        }
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::QueueCount {
                name,
                saved: state.queues.len(),
                here: self.queues.len(),
            });
        }
        let register = |what: String| RestoreError::Register { name, what };
        let features_ok = state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let driver_ok = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if state.status & !(DRIVER_BITS | VIRTIO_CONFIG_S_NEEDS_RESET) != 0 || driver_ok && !features_ok {
            return Err(register(format!("status {:#x}", state.status)));
        }
        if state.interrupt_status & !(CAUSE_USED | CAUSE_CHANGED) != 0 {
            return Err(register(format!("interrupt status {:#x}", state.interrupt_status)));
        }
        if state.pending & !self.doorbell.queues() != 0 {
            return Err(register(format!("set of pending queues {:#x}", state.pending)));
        }
        self.driver_features = state.driver_features;
        if features_ok && !self.features_acceptable() {
            let missing = state.driver_features & !self.device_features();
            return Err(match missing {
                0 => register("set of features, without VERSION_1,".into()),
                missing => RestoreError::Features { name, missing },
            });
        }
        let event_idx = state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&state.queues).enumerate() {
            restore_queue(queue, saved, event_idx, memory).map_err(|what| RestoreError::Queue {
                name,
                index,
                what,
            })?;
        }
        self.status = state.status;
        self.doorbell.set_pending(state.pending);
        self.signal.restore(state.interrupt_status);
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.config_generation = state.config_generation;
        if features_ok {
            self.device.activate(self.driver_features);
        }
        Ok(self.device.restore(&state.device)?)
    }
}

/// Sets a fresh queue to its saved state. Whether the indices agree with the ring shows when the ring is used: more
/// chains ahead than the queue has entries are refused every time.
fn restore_queue(
    queue: &mut Queue,
    saved: &QueueState,
    event_idx: bool,
    memory: &GuestMemory,
) -> Result<(), String> {
    let tell = |error: virtio_queue::Error| error.to_string();
    queue.try_set_size(saved.size).map_err(tell)?;
    queue.try_set_desc_table_address(GuestAddress(saved.descriptor_table)).map_err(tell)?;
    queue.try_set_avail_ring_address(GuestAddress(saved.available_ring)).map_err(tell)?;
    queue.try_set_used_ring_address(GuestAddress(saved.used_ring)).map_err(tell)?;
    if saved.event_idx && !event_idx {
        return Err("it uses event indices, which the driver did not take".into());
    }
    queue.set_event_idx(saved.event_idx);
    queue.set_next_avail(saved.next_available);
    queue.set_next_used(saved.next_used);
    // Taken and not given back: at most all of them. (Devices here give chains back in order, before the next.)
    if saved.next_available.wrapping_sub(saved.next_used) > saved.size {
        return Err(format!(
            "{} chains were taken and {} given back, of {} entries",
            saved.next_available, saved.next_used, saved.size
        ));
    }
    if saved.ready {
        queue.set_ready(true);
        if !queue.is_valid(memory) || queue.avail_ring() == 0 {
            return Err("its rings do not lie in guest memory".into());
        }
    }
    Ok(())
}
