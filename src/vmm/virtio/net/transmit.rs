//! From the guest to the link.
//!
//! A frame leaves whole or not at all: what the link has no room for stays at the head of the queue, so there is nothing
//! to remember of a half-sent frame, and a pause or a snapshot loses none.
//!
//! Facts: virtio 1.2 clause 5.1.6.2.

use virtio_queue::Queue;

use super::counters::{add, one};
use super::link::Sent;
use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Net, OUT, TRANSMIT};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::queue::{Outcome, work};
use crate::vmm::virtio::{DeviceError, Progress};

/// Most bytes sent in one call before the other devices have their turn.
const CALL_BYTES_MAX: usize = 1 << 20;

impl Net {
    pub(super) fn transmit(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(TRANSMIT).ok_or(DeviceError::NoQueue(TRANSMIT))?;
        self.transmit_blocked = false;
        let mut left = Some(CALL_BYTES_MAX);
        let worked = work(queue, memory, |chain| {
            let Some(budget) = left else { return Ok(Outcome::Keep) };
            if self.limiters[OUT].as_mut().is_some_and(|limiter| !limiter.ready()) {
                return Ok(Outcome::Keep);
            }
            let outcome = self.transmit_chain(chain)?;
            if let (Some(limiter), Outcome::Used(_)) = (&mut self.limiters[OUT], outcome) {
                limiter.charge(chain.readable_bytes());
            }
            left = budget.checked_sub(usize::try_from(chain.readable_bytes()).unwrap_or(usize::MAX));
            Ok(outcome)
        })?;
        Ok(Progress {
            more: !worked.empty && !self.transmit_blocked && !self.is_limited(OUT),
            ..worked.progress
        })
    }

    fn transmit_chain(&mut self, chain: &Chain<'_>) -> Result<Outcome, DeviceError> {
        let header_bytes = self.driver_header_bytes();
        let frame = usize::try_from(chain.readable_bytes())
            .ok()
            .and_then(|bytes| bytes.checked_sub(header_bytes))
            .filter(|bytes| (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(bytes))
            .and_then(|bytes| self.outgoing.get_mut(..HEADER_BYTES + bytes));
        let Some(frame) = frame else {
            one(&self.counters.dropped_out_bad);
            return Ok(Outcome::Used(0));
        };
        let (header, content) = frame.split_at_mut(HEADER_BYTES);
        header.fill(0);
        chain.read(0, header.get_mut(..header_bytes).unwrap_or_default())?;
        chain.read(header_bytes as u64, content)?;
        match self.link.send(frame) {
            Sent::Full => {
                self.transmit_blocked = true;
                return Ok(Outcome::Keep);
            }
            Sent::Done => {
                one(&self.counters.frames_out);
                add(&self.counters.bytes_out, frame.len() - HEADER_BYTES);
            }
            Sent::Refused => one(&self.counters.dropped_out_bad),
            Sent::Nobody => one(&self.counters.dropped_out_no_link),
            Sent::Gone => {
                one(&self.counters.dropped_out_no_link);
                self.lose_link();
            }
        }
        Ok(Outcome::Used(0))
    }
}
