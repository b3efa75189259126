//! Working through a virtqueue: the loop every device shares, and the decision to interrupt.
//!
//! Built on `virtio-queue`, which checks indices and addresses on each access. Two things it leaves to its user: the
//! flag by which a driver without event indices asks for no interrupt, and the end of the work on a ring that the
//! guest keeps filling.
//!
//! Facts: virtio 1.2 clauses 2.7.7 (used buffer notification suppression), 2.7.10 (available buffer notifications).

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::{DeviceError, Progress};
use crate::vmm::memory::GuestMemory;

/// What a device did with a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done; so many bytes of the writable part, from its start, were written.
    Used(u32),
    /// Being worked on elsewhere; [`give_back`] follows.
    Taken,
    /// Not done: it stays at the head of the queue, and the work ends for now.
    Keep,
}

/// What [`work`] left behind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Worked {
    pub progress: Progress,
    /// The queue is empty, and the driver will notify when it adds to it.
    pub empty: bool,
}

/// Hands available chains to `handle`, at most as many as the queue has entries, and gives them back as used.
///
/// While it runs the driver is told that it need not notify; on return notifications are on again, and nothing that
/// was added meanwhile is lost: either it was handled, or `progress.more` says so.
pub fn work(
    queue: &mut Queue,
    memory: &GuestMemory,
    mut handle: impl FnMut(&Chain<'_>) -> Result<Outcome, DeviceError>,
) -> Result<Worked, DeviceError> {
    let mut worked = Worked::default();
    let mut used = false;
    let mut budget = queue.size();
    queue.disable_notification(memory)?;
    loop {
        if budget == 0 {
            worked.progress.more = queue.enable_notification(memory)?;
            worked.empty = !worked.progress.more;
            break;
        }
        budget -= 1;
        if queue.avail_idx(memory, Ordering::Acquire)?.0 == queue.next_avail() {
            if !queue.enable_notification(memory)? {
                worked.empty = true;
                break;
            }
            // Something was added between the two looks.
            queue.disable_notification(memory)?;
            continue;
        }
        let descriptors = queue.iter(memory)?.next().ok_or(DeviceError::Stuck)?;
        let chain = Chain::new(memory, descriptors)?;
        match handle(&chain)? {
            Outcome::Used(bytes) => {
                queue.add_used(memory, chain.head(), bytes)?;
                used = true;
            }
            Outcome::Taken => {}
            Outcome::Keep => {
                queue.go_to_previous_position();
                queue.enable_notification(memory)?;
                break;
            }
        }
    }
    worked.progress.interrupt = used && wants_interrupt(queue, memory)?;
    Ok(worked)
}

/// Gives back chains that were [`Outcome::Taken`]: head, and bytes written. True: the guest is to be interrupted.
pub fn give_back(
    queue: &mut Queue,
    memory: &GuestMemory,
    chains: impl IntoIterator<Item = (u16, u32)>,
) -> Result<bool, DeviceError> {
    let mut used = false;
    for (head, bytes) in chains {
        queue.add_used(memory, head, bytes)?;
        used = true;
    }
    Ok(used && wants_interrupt(queue, memory)?)
}

/// Whether the driver wants an interrupt for what was just used.
fn wants_interrupt(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, DeviceError> {
    // Its fence also orders the read of the flags below after the write of the used index.
    if !queue.needs_notification(memory)? {
        return Ok(false);
    }
    if queue.event_idx_enabled() {
        return Ok(true);
    }
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map_err(virtio_queue::Error::GuestMemory)?;
    Ok(u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}
