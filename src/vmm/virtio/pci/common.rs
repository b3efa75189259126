//! The common configuration structure of the modern interface.
//!
//! Drivers access each field in its own width, 64-bit ones also as two halves; a write of any other shape is ignored.
//!
//! Facts: virtio 1.2 clause 4.1.4.3.

use virtio_queue::QueueT;

use super::VirtioFunction;
use super::legacy::little_endian;
use crate::vmm::virtio::read_space;

const DEVICE_FEATURES_SELECT: usize = 0x00;
const DEVICE_FEATURES: usize = 0x04;
const DRIVER_FEATURES_SELECT: usize = 0x08;
const DRIVER_FEATURES: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const QUEUE_COUNT: usize = 0x12;
const STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
/// Bytes of the structure; what later versions added needs features that are not offered.
pub const STRUCTURE_BYTES: usize = 0x38;

impl VirtioFunction {
    pub(super) fn common_read(&self, offset: u64, data: &mut [u8]) {
        let t = self.lock();
        let mut image = [0; STRUCTURE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(DEVICE_FEATURES_SELECT, &t.device_features_select.to_le_bytes());
        put(DEVICE_FEATURES, &t.device_features_word().to_le_bytes());
        put(DRIVER_FEATURES_SELECT, &t.driver_features_select.to_le_bytes());
        put(DRIVER_FEATURES, &t.driver_features_word().to_le_bytes());
        put(CONFIG_VECTOR, &self.interrupts.config_vector().to_le_bytes());
        put(QUEUE_COUNT, &(t.queue_count() as u16).to_le_bytes());
        put(STATUS, &[t.status as u8]);
        put(CONFIG_GENERATION, &[t.config_generation() as u8]);
        put(QUEUE_SELECT, &(t.queue_select as u16).to_le_bytes());
        put(QUEUE_VECTOR, &self.interrupts.queue_vector(t.queue_select).to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(queue) = t.selected() {
            put(QUEUE_SIZE, &queue.size().to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.ready()).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &(t.queue_select as u16).to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.desc_table().to_le_bytes());
            put(QUEUE_DRIVER, &queue.avail_ring().to_le_bytes());
            put(QUEUE_DEVICE, &queue.used_ring().to_le_bytes());
        }
        drop(t);
        read_space(&image, offset, data);
    }

    pub(super) fn common_write(&self, offset: u64, data: &[u8]) {
        if let (8, Some((low, high))) = (data.len(), data.split_at_checked(4)) {
            if offset as usize >= QUEUE_DESCRIPTORS && offset.is_multiple_of(8) {
                self.common_write(offset, low);
                self.common_write(offset + 4, high);
            }
            return;
        }
        let value = little_endian(data);
        let (half, kept) = (Some(value), None);
        let mut t = self.lock();
        match (offset as usize, data.len()) {
            (DEVICE_FEATURES_SELECT, 4) => t.device_features_select = value,
            (DRIVER_FEATURES_SELECT, 4) => t.driver_features_select = value,
            (DRIVER_FEATURES, 4) => t.set_driver_features_word(value),
            (CONFIG_VECTOR, 2) => self.interrupts.set_config_vector(value as u16),
            (STATUS, 1) => t.set_status(value),
            (QUEUE_SELECT, 2) => t.queue_select = value,
            (QUEUE_SIZE, 2) => t.set_queue_size(value),
            (QUEUE_VECTOR, 2) => self.interrupts.set_queue_vector(t.queue_select, value as u16),
            // Only a reset disables a queue.
            (QUEUE_ENABLE, 2) if value == 1 => t.set_queue_ready(1, &self.memory),
            (QUEUE_DESCRIPTORS, 4) => t.configure(|queue| queue.set_desc_table_address(half, kept)),
            (0x24, 4) => t.configure(|queue| queue.set_desc_table_address(kept, half)),
            (QUEUE_DRIVER, 4) => t.configure(|queue| queue.set_avail_ring_address(half, kept)),
            (0x2c, 4) => t.configure(|queue| queue.set_avail_ring_address(kept, half)),
            (QUEUE_DEVICE, 4) => t.configure(|queue| queue.set_used_ring_address(half, kept)),
            (0x34, 4) => t.configure(|queue| queue.set_used_ring_address(kept, half)),
            _ => {}
        }
    }
}
