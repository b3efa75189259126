//! virtio-blk on a [`LayeredDisk`].
//!
//! Requests are carried out one after the other, on the thread that calls (the device thread). The disk is shared with
//! the machine, which freezes it for a snapshot while no request is being handled.
//!
//! Facts: virtio 1.2 clause 5.2; FreeBSD's `sys/dev/virtio/block/virtio_blk.c`: wants `SEG_MAX` and `INDIRECT_DESC`,
//! refuses a `SIZE_MAX` below 1 MiB (never offered here), asks GET_ID at attach and polls for the answer.

mod request;
#[cfg(test)]
mod tests;

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;

use super::queue::{Outcome, work};
use super::{DeviceError, HostInterest, Progress, RING_FEATURES, VirtioDevice, read_space};
use crate::snapshot::codec;
use crate::snapshot::layers::LayeredDisk;
use crate::snapshot::state::virtio::BlockState;
use crate::vmm::memory::GuestMemory;

/// A disk in the hands of its device and of the machine that freezes it.
pub type SharedDisk = Arc<Mutex<LayeredDisk>>;

/// Length of the serial that GET_ID tells.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: what a chain can have besides header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most ranges in one discard or write-zeroes request, and most sectors in one of them (2 GiB).
const RANGES_MAX: u32 = 32;
const RANGE_SECTORS_MAX: u32 = 4 << 20;
/// Most bytes read and written in one call before the other devices have their turn.
const CALL_BYTES_MAX: u64 = 4 << 20;
/// Sectors of 512 bytes in a block of the disk's layers, as a power of two.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const CONFIG_BYTES: usize = 60;

/// The block device.
#[derive(Debug)]
pub struct Block {
    disk: SharedDisk,
    serial: [u8; SERIAL_BYTES],
    config: [u8; CONFIG_BYTES],
    disk_bytes: u64,
    read_only: bool,
    acked_features: u64,
    /// Data on its way between disk and guest memory.
    piece: Box<[u8]>,
}

impl Block {
    /// A device for `disk`. Of `serial` the first 20 bytes are shown. A disk without an overlay is read-only.
    pub fn new(disk: SharedDisk, serial: &str) -> Self {
        let mut id = [0; SERIAL_BYTES];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let (disk_bytes, read_only) = {
            let disk = lock(&disk);
            (disk.disk_bytes(), disk.read_only())
        };
        Self {
            disk,
            serial: id,
            config: config_space(disk_bytes),
            disk_bytes,
            read_only,
            acked_features: 0,
            piece: vec![0; request::PIECE_BYTES].into_boxed_slice(),
        }
    }

    fn acked(&self, feature: u32) -> bool {
        self.acked_features & 1 << feature != 0
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
        self.acked_features = acked_features;
    }

    fn reset(&mut self) {
        self.acked_features = 0;
    }

    fn queue_event(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(index).ok_or(DeviceError::NoQueue(index))?;
        let mut left = Some(CALL_BYTES_MAX);
        let worked = work(queue, memory, |chain| {
            let Some(budget) = left else { return Ok(Outcome::Keep) };
            left = budget.checked_sub(chain.readable_bytes() + chain.writable_bytes());
            Ok(Outcome::Used(self.handle(chain)?))
        })?;
        Ok(Progress { more: !worked.empty, ..worked.progress })
    }

    fn host_interest(&self) -> Vec<HostInterest> {
        vec![]
    }

    fn host_event(&mut self, _: RawFd, _: &mut [Queue], _: &GuestMemory) -> Result<Progress, DeviceError> {
        Ok(Progress::default())
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        codec::encode(&BlockState::V1 { disk_bytes: self.disk_bytes, read_only: self.read_only })
            .map_err(|source| DeviceError::Codec { device: self.name(), source })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let BlockState::V1 { disk_bytes, read_only } =
            codec::decode(bytes).map_err(|source| DeviceError::Codec { device: self.name(), source })?;
        if (disk_bytes, read_only) == (self.disk_bytes, self.read_only) {
            return Ok(());
        }
        let tell =
            |bytes, read_only| format!("{bytes} bytes, {}", if read_only { "read-only" } else { "writable" });
        Err(DeviceError::Mismatch {
            device: self.name(),
            what: format!(
                "the guest knows a disk of {}, but is given one of {}: give the snapshot's own disks",
                tell(disk_bytes, read_only),
                tell(self.disk_bytes, self.read_only)
            ),
        })
    }
}

fn lock(disk: &SharedDisk) -> MutexGuard<'_, LayeredDisk> {
    // Every step of the disk leaves it usable, so a panic elsewhere does not spoil it.
    disk.lock().unwrap_or_else(PoisonError::into_inner)
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
