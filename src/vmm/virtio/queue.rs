//! Working through a virtqueue: the loop every device shares, and the decision to interrupt.
//!
//! Built on `virtio-queue`, which checks indices and addresses on each access. Three things it leaves to its user: the
//! flag by which a driver without event indices asks for no interrupt, chains that must become visible together, and
//! the end of the work on a ring that the guest keeps filling.
//!
//! Facts: virtio 1.2 clauses 2.7.7 (used buffer notification suppression), 2.7.10 (available buffer notifications).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::Chain;
use super::{DeviceError, Progress};
use crate::vmm::memory::GuestMemory;

/// Layout of the rings, clauses 2.7.6 and 2.7.8.
const AVAILABLE_HEADER_BYTES: u64 = 4;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

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
    let used_before = queue.next_used();
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
            }
            Outcome::Taken => {}
            Outcome::Keep => {
                queue.go_to_previous_position();
                queue.enable_notification(memory)?;
                break;
            }
        }
    }
    worked.progress.interrupt = wants_interrupt(queue, memory, used_before)?;
    Ok(worked)
}

/// Gives back chains that were [`Outcome::Taken`]: head, and bytes written. True: the guest is to be interrupted.
pub fn give_back(
    queue: &mut Queue,
    memory: &GuestMemory,
    chains: impl IntoIterator<Item = (u16, u32)>,
) -> Result<bool, DeviceError> {
    let used_before = queue.next_used();
    for (head, bytes) in chains {
        queue.add_used(memory, head, bytes)?;
    }
    wants_interrupt(queue, memory, used_before)
}

/// Gives several chains, each with the bytes written to it, back at once: the driver sees all of them or none.
pub fn add_used_together(
    queue: &mut Queue,
    memory: &GuestMemory,
    used: &[(u16, u32)],
) -> Result<(), DeviceError> {
    let Some(((last_head, last_bytes), before)) = used.split_last() else { return Ok(()) };
    let mut next = queue.next_used();
    for (head, bytes) in before {
        let slot = u64::from(next % queue.size());
        let address = queue.used_ring().checked_add(USED_HEADER_BYTES + USED_ELEMENT_BYTES * slot);
        let element = [u32::from(*head).to_le(), bytes.to_le()];
        let address = address.ok_or(virtio_queue::Error::AddressOverflow)?;
        memory.write_obj(element, GuestAddress(address)).map_err(virtio_queue::Error::GuestMemory)?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    // It writes the last one and, after it, the index that shows them all.
    Ok(queue.add_used(memory, *last_head, *last_bytes)?)
}

/// Whether the driver wants an interrupt for what was used since the used index was `before`. To be asked once for each
/// run of used entries.
pub fn wants_interrupt(queue: &Queue, memory: &GuestMemory, before: u16) -> Result<bool, DeviceError> {
    let now = queue.next_used();
    if now == before {
        return Ok(false);
    }
    // Orders the reads below after the write of the used index.
    fence(Ordering::SeqCst);
    let load = |offset: u64| -> Result<u16, DeviceError> {
        let address = queue.avail_ring().checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?;
        let value: u16 = memory
            .load(GuestAddress(address), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(value))
    };
    if queue.event_idx_enabled() {
        let used_event = load(AVAILABLE_HEADER_BYTES + AVAILABLE_ELEMENT_BYTES * u64::from(queue.size()))?;
        return Ok(now.wrapping_sub(used_event).wrapping_sub(1) < now.wrapping_sub(before));
    }
    Ok(load(0)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0)
}
