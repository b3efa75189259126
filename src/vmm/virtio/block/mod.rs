//! virtio-blk on a [`LayeredDisk`].
//!
//! The device thread takes requests off the ring and gives them back; [`pool`] carries them out, up to
//! [`IN_FLIGHT_MAX`] of a disk at once and in any order, as the specification allows. A flush covers the writes that
//! had been given back before it was made available, which is what a driver may rely on. The disk is shared with
//! the machine, which freezes it for a snapshot after [`VirtioDevice::quiesce`].
//!
//! What is stable when: with FLUSH agreed on, what was written before a flush; without it, every write when it is given back
//! (clause 5.2.6.2). Both hold for disks whose writes outlive the VM; an overlay ends with its VM, flushed or not
//! ([`crate::snapshot::layers`]).
//!
//! Facts: virtio 1.2 clause 5.2; FreeBSD's `sys/dev/virtio/block/virtio_blk.c`: wants `SEG_MAX` and `INDIRECT_DESC`,
//! refuses a `SIZE_MAX` below 1 MiB (never offered here), asks GET_ID at attach and polls for the answer.

#![forbid(unsafe_code)]

pub mod pool;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueT};

use self::pool::{Lane, Pool};
use self::request::Target;
use super::chain::{Chain, ChainError};
use super::queue::{Outcome, give_back, work};
use super::rate::{Limiter, Rates};
use super::{DeviceError, HostInterest, Progress, RING_FEATURES, VirtioDevice, read_space};
use crate::snapshot::codec;
use crate::snapshot::layers::LayeredDisk;
use crate::snapshot::state::virtio::BlockState;
use crate::vmm::memory::GuestMemory;

/// A disk in the hands of its device and of the machine that freezes it.
pub type SharedDisk = Arc<LayeredDisk>;

/// Length of the serial that GET_ID tells.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: what a chain can have besides header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most ranges in one discard or write-zeroes request, and most sectors in one of them (2 GiB).
const RANGES_MAX: u32 = 32;
const RANGE_SECTORS_MAX: u32 = 4 << 20;
/// Most requests of a disk under way. A driver that reuses buffers before they are given back could otherwise pile up
/// more than the ring has room for.
pub const IN_FLIGHT_MAX: usize = QUEUE_SIZE as usize;
/// Sectors of 512 bytes in a block of the disk's layers, as a power of two.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const CONFIG_BYTES: usize = 60;

/// The block device.
#[derive(Debug)]
pub struct Block {
    target: Arc<Target>,
    config: [u8; CONFIG_BYTES],
    read_only: bool,
    pool: Arc<Pool>,
    lane: Arc<Lane<Answer>>,
    /// The queue was left alone because too much was under way.
    starved: bool,
    limiter: Option<Limiter>,
}

/// What a request ended with: bytes written at the start of its writable part.
type Answer = Result<u32, DeviceError>;

impl Block {
    /// A device for `disk`. Of `serial` the first 20 bytes are shown. A disk without an overlay is read-only.
    ///
    /// # Errors
    /// No event descriptor.
    pub fn new(disk: SharedDisk, serial: &str, pool: Arc<Pool>) -> io::Result<Self> {
        let mut id = [0; SERIAL_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            config: config_space(disk.disk_bytes()),
            read_only: disk.read_only(),
            target: Arc::new(Target { disk, serial: id, acked_features: 0 }),
            pool,
            lane: Lane::new()?,
            starved: false,
            limiter: None,
        })
    }

    fn set_acked(&mut self, acked_features: u64) {
        let Target { disk, serial, .. } = &*self.target;
        self.target = Arc::new(Target { disk: Arc::clone(disk), serial: *serial, acked_features });
    }

    /// Gives back what is done.
    fn collect(&mut self, queues: &mut [Queue], memory: &GuestMemory) -> Result<Progress, DeviceError> {
        let mut chains = Vec::new();
        for (head, answer) in self.lane.take() {
            // One that died has written no status: the driver cannot be told but by stopping.
            chains.push((head, answer.unwrap_or(Err(DeviceError::Died))?));
        }
        let more = std::mem::take(&mut self.starved);
        let Some(queue) = queues.first_mut().filter(|queue| queue.ready()) else {
            // The driver took the queue away, and its buffers with it.
            return Ok(Progress { interrupt: false, more });
        };
        Ok(Progress { interrupt: give_back(queue, memory, chains)?, more })
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "block"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = RING_FEATURES
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // `writeback` is the only writable field, and CONFIG_WCE is not offered.
    }

    fn activate(&mut self, acked_features: u64) {
        self.set_acked(acked_features);
    }

    fn stop_queue(&mut self, _index: usize) {
        self.lane.abandon();
        self.starved = false;
        self.limiter.as_mut().map(Limiter::expired);
    }

    fn reset(&mut self) {
        self.lane.abandon();
        self.starved = false;
        self.limiter.as_mut().map(Limiter::expired);
        self.set_acked(0);
    }

    fn queue_event(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(index).ok_or(DeviceError::NoQueue(index))?;
        let Self { target, pool, lane, starved, limiter, .. } = self;
        let worked = work(queue, memory, |chain| {
            if lane.open() >= IN_FLIGHT_MAX {
                *starved = true;
                return Ok(Outcome::Keep);
            }
            // Without a byte for the status there is no way to tell the driver but to stop.
            if chain.writable_bytes() == 0 {
                return Err(ChainError::TooShort(0, 1).into());
            }
            if let Some(limiter) = limiter {
                if !limiter.ready() {
                    return Ok(Outcome::Keep);
                }
                limiter.charge(chain.readable_bytes().saturating_add(chain.writable_bytes()));
            }
            let (target, memory, buffers) = (Arc::clone(target), memory.clone(), chain.buffers().clone());
            lane.begin(pool, chain.head(), move |piece| {
                target.handle(&Chain::again(&memory, buffers), piece)
            });
            Ok(Outcome::Taken)
        })?;
        Ok(worked.progress)
    }

    fn host_interest(&self) -> Vec<HostInterest> {
        let waiting = self.limiter.as_ref().filter(|limiter| limiter.is_waiting());
        let fds = [Some(self.lane.fd()), waiting.map(Limiter::fd)];
        fds.into_iter().flatten().map(|fd| HostInterest { fd, readable: true, writable: false }).collect()
    }

    fn host_event(
        &mut self,
        fd: RawFd,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        if let Some(limiter) = self.limiter.as_mut().filter(|limiter| limiter.fd() == fd) {
            limiter.expired();
            return Ok(Progress { interrupt: false, more: true });
        }
        self.collect(queues, memory)
    }

    fn quiesce(&mut self, queues: &mut [Queue], memory: &GuestMemory) -> Result<Progress, DeviceError> {
        self.lane.wait();
        let mut progress = self.collect(queues, memory)?;
        // What waits in the ring is to be looked at by whoever goes on with it.
        progress.more |= self.limiter.as_ref().is_some_and(Limiter::is_waiting);
        Ok(progress)
    }

    fn limit(&mut self, rates: &Rates) -> io::Result<()> {
        self.limiter = Limiter::new(rates.disk)?;
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        codec::encode(&BlockState::V1 {
            disk_bytes: self.target.disk.disk_bytes(),
            read_only: self.read_only,
        })
        .map_err(|source| DeviceError::Codec { device: self.name(), source })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let BlockState::V1 { disk_bytes, read_only } =
            codec::decode(bytes).map_err(|source| DeviceError::Codec { device: self.name(), source })?;
        let here = self.target.disk.disk_bytes();
        if (disk_bytes, read_only) == (here, self.read_only) {
            return Ok(());
        }
        let tell =
            |bytes, read_only| format!("{bytes} bytes, {}", if read_only { "read-only" } else { "writable" });
        Err(DeviceError::Mismatch {
            device: self.name(),
            what: format!(
                "the guest knows a disk of {}, but is given one of {}: give the snapshot's own disks",
                tell(disk_bytes, read_only),
                tell(here, self.read_only)
            ),
        })
    }
}

/// `struct virtio_blk_config`, clause 5.2.4.
fn config_space(disk_bytes: u64) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(field) = config.get_mut(offset..offset + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &(disk_bytes / request::SECTOR_BYTES).to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &(request::SECTOR_BYTES as u32).to_le_bytes());
    // Topology: physical block, no offset, least and best transfer one block.
    put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]);
    put(26, &(1u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(28, &(1u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(34, &1u16.to_le_bytes());
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &(1u32 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &RANGES_MAX.to_le_bytes());
    put(56, &[1]);
    config
}
