//! From the link to the guest.
//!
//! A frame is taken from the link only when the guest has given buffers: the others wait in the host's TAP, whose queue
//! is the only place that may overflow. With mergeable buffers one frame may need several chains; they are given back
//! together. A frame that needs more than there are is held until the guest gives more.
//!
//! Facts: virtio 1.2 clauses 5.1.6.3 and 5.1.6.4; FreeBSD's `if_vtnet.c` (a merged frame whose further buffers are not
//! there yet is thrown away by the driver, so they must show up together).

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_net::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::counters::{add, one};
use super::link::Received;
use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, IN, Net, RECEIVE, bit};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::{Chain, ChainError};
use crate::vmm::virtio::queue::{add_used_together, wants_interrupt};
use crate::vmm::virtio::{DeviceError, Progress};

/// Most frames taken in one call before the other devices have their turn.
const CALL_FRAMES_MAX: usize = 64;
/// Where the parts of `struct virtio_net_hdr` lie.
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const CHECKSUM_START: usize = 6;
const CHECKSUM_OFFSET: usize = 8;
const BUFFERS: usize = 10;

/// What became of the frame in hand.
enum Delivery {
    /// It is with the guest, or dropped.
    Over,
    /// It has to wait for more buffers.
    Wait,
}

impl Net {
    pub(super) fn receive(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(RECEIVE).ok_or(DeviceError::NoQueue(RECEIVE))?;
        let used_before = queue.next_used();
        // Buffers that come while there are some are seen without being told.
        queue.disable_notification(memory)?;
        self.receive_buffers = true;
        for _ in 0..CALL_FRAMES_MAX {
            if queue.avail_idx(memory, Ordering::Acquire)?.0 == queue.next_avail() {
                if !queue.enable_notification(memory)? {
                    self.receive_buffers = false;
                    break;
                }
                queue.disable_notification(memory)?;
            }
            if self.held == 0 {
                if self.limiters[IN].as_mut().is_some_and(|limiter| !limiter.ready()) {
                    // What comes stays in the link.
                    break;
                }
                match self.link.receive(&mut self.incoming) {
                    Received::Frame(bytes) => {
                        self.held = bytes;
                        if let Some(limiter) = &mut self.limiters[IN] {
                            limiter.charge(bytes.saturating_sub(HEADER_BYTES) as u64);
                        }
                    }
                    Received::Empty => break,
                    Received::Gone => {
                        self.lose_link();
                        break;
                    }
                }
                if !self.wanted() {
                    self.held = 0;
                    continue;
                }
            }
            match self.deliver(queue, memory)? {
                Delivery::Over => self.held = 0,
                Delivery::Wait => {
                    self.receive_buffers = false;
                    break;
                }
            }
        }
        // Frames that are left wait for the link's readiness, the one in hand for the guest's notification.
        Ok(Progress { more: false, interrupt: wants_interrupt(queue, memory, used_before)? })
    }

    /// Looks at a frame just taken: whether the guest gets it, and its header as the guest may see it.
    fn wanted(&mut self) -> bool {
        let wire = self.link.is_wire();
        let offloads = self.receive_offloads;
        let Some((header, frame)) =
            self.incoming.get_mut(..self.held).and_then(|held| held.split_at_mut_checked(HEADER_BYTES))
        else {
            one(&self.counters.dropped_in_bad);
            return false;
        };
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.len())
            || !clean_header(header, frame, offloads, wire)
        {
            one(&self.counters.dropped_in_bad);
            return false;
        }
        if !self.filter.passes(&self.mac, frame) {
            one(&self.counters.filtered_in);
            return false;
        }
        true
    }

    /// Puts the frame in hand into the guest's buffers.
    fn deliver(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Delivery, DeviceError> {
        let mergeable = self.acked & bit(VIRTIO_NET_F_MRG_RXBUF) != 0;
        // A shorter header begins further back.
        let start = HEADER_BYTES - self.driver_header_bytes();
        let needed = self.held.saturating_sub(start) as u64;
        let first = queue.next_avail();
        let mut chains: Vec<Chain<'_>> = vec![];
        let mut room = 0u64;
        let mut descriptors = 0;
        while room < needed {
            let available = queue.avail_idx(memory, Ordering::Acquire)?.0;
            if available == queue.next_avail() {
                // Not enough. The driver is to tell when it adds to what is there now.
                let told_of_more = queue.enable_notification(memory)?;
                if told_of_more {
                    queue.disable_notification(memory)?;
                    continue;
                }
                queue.set_next_avail(first);
                if descriptors < usize::from(queue.size()) {
                    return Ok(Delivery::Wait);
                }
                // The whole ring would not do.
                one(&self.counters.dropped_in_too_long);
                queue.disable_notification(memory)?;
                return Ok(Delivery::Over);
            }
            if chains.len() >= usize::from(queue.size()) {
                // More than there can be: the driver goes on adding behind our back.
                return Err(DeviceError::Stuck);
            }
            let taken = queue.iter(memory)?.next().ok_or(DeviceError::Stuck)?;
            let chain = Chain::new(memory, taken)?;
            if chain.writable_bytes() == 0 {
                return Err(ChainError::TooShort(0, 1).into());
            }
            room = room.saturating_add(chain.writable_bytes());
            descriptors += chain.descriptors();
            chains.push(chain);
            if !mergeable && room < needed {
                one(&self.counters.dropped_in_too_long);
                queue.set_next_avail(first);
                return Ok(Delivery::Over);
            }
        }
        let buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX).to_le_bytes();
        if let Some(field) = self.incoming.get_mut(BUFFERS..BUFFERS + 2) {
            field.copy_from_slice(&buffers);
        }
        self.incoming.copy_within(..HEADER_BYTES - start, start);
        let mut rest = self.incoming.get(start..self.held).unwrap_or(&[]);
        let mut used = Vec::with_capacity(chains.len());
        for chain in &chains {
            let bytes = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(bytes);
            chain.write(0, part)?;
            // It fits: a frame has less than 4 GiB.
            used.push((chain.head(), bytes as u32));
            rest = after;
        }
        add_used_together(queue, memory, &used)?;
        one(&self.counters.frames_in);
        add(&self.counters.bytes_in, self.held - HEADER_BYTES);
        Ok(Delivery::Over)
    }
}

/// Makes the header one that the guest's driver agreed to; false: the frame cannot be given to it. A header from another
/// guest is not believed.
fn clean_header(header: &mut [u8], frame: &mut [u8], offloads: u64, wire: bool) -> bool {
    let at = |index: usize| header.get(index).copied().unwrap_or(0);
    let number = |index: usize| usize::from(u16::from_le_bytes([at(index), at(index + 1)]));
    let checksum_agreed = offloads & bit(VIRTIO_NET_F_GUEST_CSUM) != 0;
    let flags = u32::from(at(FLAGS));
    let gso = u32::from(at(GSO_TYPE));
    let (start, offset) = (number(CHECKSUM_START), number(CHECKSUM_OFFSET));
    let agreed = |feature: u32| !wire && offloads & bit(feature) != 0;
    let segment_agreed = match gso & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => gso == 0,
        VIRTIO_NET_HDR_GSO_TCPV4 => agreed(VIRTIO_NET_F_GUEST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => agreed(VIRTIO_NET_F_GUEST_TSO6),
        _ => false,
    };
    let ecn_agreed = gso & VIRTIO_NET_HDR_GSO_ECN == 0 || agreed(VIRTIO_NET_F_GUEST_ECN);
    if !segment_agreed || !ecn_agreed {
        return false;
    }
    let mut kept = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
    if kept != 0 && (wire || !checksum_agreed) {
        // Both numbers have 16 bits: no overflow.
        if start + offset + 2 > frame.len() {
            return false;
        }
        if !checksum_agreed {
            complete_checksum(frame, start, offset);
            kept = 0;
        }
    }
    if checksum_agreed && !wire {
        kept |= flags & VIRTIO_NET_HDR_F_DATA_VALID;
    }
    if let Some(byte) = header.get_mut(FLAGS) {
        *byte = kept as u8;
    }
    if kept & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        && let Some(fields) = header.get_mut(CHECKSUM_START..BUFFERS)
    {
        fields.fill(0);
    }
    true
}

/// Computes the Internet checksum (RFC 1071) from `start` on into the 16 bits at `start + offset`, where the sum of the
/// pseudo header stands already.
fn complete_checksum(frame: &mut [u8], start: usize, offset: usize) {
    let Some(covered) = frame.get_mut(start..) else { return };
    let mut sum: u64 = 0;
    let mut words = covered.chunks_exact(2);
    for word in &mut words {
        sum += u64::from(u16::from_be_bytes([word[0], word[1]]));
    }
    if let [last] = words.remainder() {
        sum += u64::from(*last) << 8;
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let folded = match !(sum as u16) {
        // Zero means "none" in UDP, and both zeros are the same sum.
        0 => 0xffff,
        checksum => checksum,
    };
    if let Some(field) = covered.get_mut(offset..offset + 2) {
        field.copy_from_slice(&folded.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    const VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
    const CSUM: u64 = bit(VIRTIO_NET_F_GUEST_CSUM);
    const TSO4: u64 = bit(VIRTIO_NET_F_GUEST_TSO4);

    fn header(flags: u8, gso: u32, start: u16, offset: u16) -> Vec<u8> {
        let mut header = vec![flags, gso as u8, 0, 0, 0, 0];
        header.extend(start.to_le_bytes());
        header.extend(offset.to_le_bytes());
        header.extend([0, 0]);
        header
    }

    #[test]
    fn a_checksum_is_completed_for_a_driver_that_wants_it_done() {
        // RFC 1071's own example: 0001 f203 f4f5 f6f7 sums to ddf2.
        let mut frame = [vec![0xaa; 14], vec![0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7, 0, 0]].concat();
        let mut given = header(NEEDS, 0, 14, 8);
        assert!(clean_header(&mut given, &mut frame, 0, true));
        assert_eq!(given, header(0, 0, 0, 0));
        assert_eq!(frame[22..], (!0xddf2u16).to_be_bytes());
        // An odd length counts as if a zero followed.
        let mut odd = [0, 0, 0x12];
        complete_checksum(&mut odd, 0, 0);
        assert_eq!(odd, [0xed, 0xff, 0x12]);
    }

    #[test]
    fn flags_are_shown_only_to_drivers_that_agreed() {
        let mut frame = vec![0; 64];
        let mut clean = |flags, offloads, wire| {
            let mut given = header(flags, 0, 14, 16);
            clean_header(&mut given, &mut frame, offloads, wire).then(|| given[0])
        };
        assert_eq!(clean(VALID, 0, false), Some(0));
        assert_eq!(clean(VALID, CSUM, false), Some(VALID));
        // Another guest's word that a checksum is right is worth nothing.
        assert_eq!(clean(VALID, CSUM, true), Some(0));
        assert_eq!(clean(NEEDS, CSUM, true), Some(NEEDS));
        assert_eq!(clean(NEEDS, CSUM, false), Some(NEEDS));
    }

    #[test]
    fn what_a_driver_did_not_agree_to_is_not_given_to_it() {
        let mut frame = vec![0; 64];
        let mut clean =
            |given: Vec<u8>, offloads, wire| clean_header(&mut given.clone(), &mut frame, offloads, wire);
        let tcp4 = header(NEEDS, VIRTIO_NET_HDR_GSO_TCPV4, 34, 16);
        assert!(clean(tcp4.clone(), CSUM | TSO4, false));
        assert!(!clean(tcp4.clone(), CSUM, false));
        assert!(!clean(tcp4, CSUM | TSO4, true));
        let ecn = header(NEEDS, VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN, 34, 16);
        assert!(!clean(ecn, CSUM | TSO4, false));
        assert!(!clean(header(0, VIRTIO_NET_HDR_GSO_ECN, 0, 0), CSUM | TSO4, false));
        assert!(!clean(header(0, VIRTIO_NET_HDR_GSO_UDP, 0, 0), !0, false));
        // A checksum that lies behind the frame's end.
        assert!(!clean(header(NEEDS, 0, 63, 0), 0, false));
        assert!(!clean(header(NEEDS, 0, 0xffff, 0xffff), CSUM, true));
    }
}
