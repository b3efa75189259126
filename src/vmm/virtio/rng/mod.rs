//! virtio-rng: random bytes of the host for the guest.
//!
//! Every clone of a snapshot draws its own bytes here, which is what makes its kernel's entropy its own again.
//! Bytes come from getrandom(2), never from a buffer that a snapshot could freeze.
//!
//! Facts: virtio 1.2 clause 5.4; FreeBSD's `sys/dev/virtio/random/virtio_random.c` asks for a few bytes at a time and
//! polls for them.

#![forbid(unsafe_code)]

#[cfg(test)]
mod tests;

use std::os::fd::RawFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;

use super::queue::{Outcome, work};
use super::{DeviceError, HostInterest, Progress, RING_FEATURES, VirtioDevice};
use crate::snapshot::codec;
use crate::snapshot::state::virtio::RngState;
use crate::vmm::memory::GuestMemory;
use crate::vmm::random;

/// Most bytes given for one request; the driver sees how many it got and asks again.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Most bytes given in one call, so that one guest's thirst does not hold up its other devices.
const CALL_BYTES_MAX: u64 = 256 << 10;
const QUEUE_SIZES: [u16; 1] = [64];

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {}

impl Rng {
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _acked_features: u64) {}

    fn reset(&mut self) {}

    fn queue_event(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(index).ok_or(DeviceError::NoQueue(index))?;
        let mut left = CALL_BYTES_MAX;
        let worked = work(queue, memory, |chain| {
            let wanted = chain.writable_bytes().min(REQUEST_BYTES_MAX);
            if wanted > left {
                return Ok(Outcome::Keep);
            }
            left -= wanted;
            let mut buffer = [0u8; 4096];
            let mut given = 0;
            while given < wanted {
                let part = (wanted - given).min(buffer.len() as u64);
                let Some(part) = buffer.get_mut(..part as usize) else { break };
                random::fill(part).map_err(DeviceError::Random)?;
                chain.write(given, part)?;
                given += part.len() as u64;
            }
            Ok(Outcome::Used(given as u32))
        })?;
        // What ends the work with chains left is the limit, of chains or of bytes.
        Ok(Progress { more: !worked.empty, ..worked.progress })
    }

    fn host_interest(&self) -> Vec<HostInterest> {
        vec![]
    }

    fn host_event(&mut self, _: RawFd, _: &mut [Queue], _: &GuestMemory) -> Result<Progress, DeviceError> {
        Ok(Progress::default())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        codec::encode(&RngState::V1).map_err(|source| DeviceError::Codec { device: self.name(), source })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let RngState::V1 =
            codec::decode(bytes).map_err(|source| DeviceError::Codec { device: self.name(), source })?;
        Ok(())
    }
}
