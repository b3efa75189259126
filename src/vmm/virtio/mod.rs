//! virtio devices and the transport in front of them.
//!
//! A [`transport::Transport`] owns the status and the queues of one device and the device itself, a [`VirtioDevice`]; a
//! front ([`mmio`], [`pci`]) gives the guest registers for it. Everything a guest puts into registers, rings and buffers is hostile: whatever it says,
//! a device answers with an error status, or the transport marks it as needing a reset; work for one call is bounded.
//!
//! Threads: registers are read and written by vCPU threads, queues are worked on by the device thread only, which
//! waits for [`HostInterest`] descriptors. Buffers of a disk request are read and written by the threads of
//! [`block::pool`] between the time it is taken off the queue and the time it is given back. The machine guards a transport with a lock.
//!
//! May touch: guest memory, the files and sockets a device was built with, [`crate::vmm::irq`], and
//! [`crate::snapshot`]'s `state`, `codec` and `layers`.
//!
//! Facts: virtio 1.2, clauses 2.1 (status), 2.2 (features), 2.7 (split rings), 4.1 (pci), 4.2 (mmio), 5.1 (net), 5.2
//! (block), 5.3 (console), 5.4 (entropy); FreeBSD's `sys/dev/virtio` for what its drivers need.

pub mod block;
pub mod chain;
pub mod console;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rate;
pub mod rng;
#[cfg(any(test, fuzzing))]
pub mod testing;
pub mod transport;

use std::io;
use std::os::fd::RawFd;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;

use self::chain::ChainError;
use self::rate::Rates;
use crate::snapshot::codec::CodecError;
use crate::vmm::memory::GuestMemory;

/// Features of the rings, offered by every device here.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A device behind a transport.
pub trait VirtioDevice: Send {
    /// Device id, virtio 1.2 clause 5.
    fn device_id(&self) -> u32;

    /// "block", "console", "rng", "net".
    fn name(&self) -> &'static str;

    /// Largest size of each queue, in the order of their numbers; powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits offered. The transport adds `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// Reads the configuration space at `offset`, any width; bytes outside read zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what is not writable ignores it.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver has agreed on these features (`FEATURES_OK`); queues may be used from now on.
    fn activate(&mut self, acked_features: u64);

    /// The driver took queue `index` away: what was taken from it is to be given back to nobody. On return the device
    /// touches none of its buffers any more.
    fn stop_queue(&mut self, _index: usize) {}

    /// Back to the state after construction; host resources stay. On return nothing touches guest memory any more.
    fn reset(&mut self);

    /// Handles what is available on queue `index`, up to the device's own limit for one call. An error means that the
    /// driver broke the rules beyond what a status byte can say: the transport stops the device until it is reset.
    fn queue_event(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError>;

    /// Host descriptors to watch now. Only asked while the device is active; changes with every event.
    fn host_interest(&self) -> Vec<HostInterest>;

    /// A watched descriptor became ready. `Progress::interrupt` as in [`Self::queue_event`].
    fn host_event(
        &mut self,
        fd: RawFd,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError>;

    /// Waits until nothing that the device began is under way, and gives back what that finished. The device begins
    /// nothing new until it is called again. For devices with threads of their own; the others have nothing to do.
    fn quiesce(&mut self, _queues: &mut [Queue], _memory: &GuestMemory) -> Result<Progress, DeviceError> {
        Ok(Progress::default())
    }

    /// What the device wants of its transport besides, told once. Asked after every call to it, and when a restored VM
    /// is let go.
    fn take_wishes(&mut self) -> Wishes {
        Wishes::default()
    }

    /// Another peer takes the place of the one behind the device's socket, who writes no more: what of its last message has not come
    /// never will. Those that have no peer do nothing.
    fn new_peer(&mut self) {}

    /// Limits what the device may do in a second. Called once at most, before the VM is let go. Those that have nothing to
    /// limit do nothing.
    ///
    /// # Errors
    /// No timer descriptor.
    fn limit(&mut self, _rates: &Rates) -> io::Result<()> {
        Ok(())
    }

    /// The device's own state, encoded. Called after [`Self::quiesce`], while no vCPU runs and no event is being handled.
    fn save(&self) -> Result<Vec<u8>, DeviceError>;

    /// Takes state over, after [`Self::activate`] if the saved device was active. `bytes` is hostile.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError>;
}

/// What a call to a device did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// The guest is to be interrupted: buffers were used, and the driver wants to hear of it.
    pub interrupt: bool,
    /// The call stopped at its limit; the queue wants another call, without a new notification.
    pub more: bool,
}

/// What a device wants of its transport.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The configuration space changed by itself: the driver is to be told.
    pub config_changed: bool,
    /// Queues that the device thread is to look at; bit = number.
    pub queues: u32,
}

/// A host descriptor and what to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostInterest {
    pub fd: RawFd,
    pub readable: bool,
    pub writable: bool,
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the driver's queue is broken: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("the driver's buffers are broken: {0}")]
    Chain(#[from] ChainError),
    #[error("the driver made entries available that cannot be taken from the ring")]
    Stuck,
    #[error("a request died in the device; this is a defect, please report it with the log")]
    Died,
    #[error("the device has no queue {0}")]
    NoQueue(usize),
    #[error("host random numbers are not to be had: {0}")]
    Random(io::Error),
    #[error("the saved state of a {device} device {source}; the snapshot is damaged or from another version")]
    Codec { device: &'static str, source: CodecError },
    #[error("the saved {device} device does not fit: {what}")]
    Mismatch { device: &'static str, what: String },
}

/// Copies `data.len()` bytes at `offset` of `space`; what lies outside reads zero.
pub(super) fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let tail = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    for (to, from) in data.iter_mut().zip(tail) {
        *to = *from;
    }
}
