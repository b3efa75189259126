//! The legacy interface: one I/O window, for drivers from before virtio 1.0 (FreeBSD up to 12 has no other on PCI).
//!
//! A queue is given by one page number; its three parts lie one after the other from there. There is no FEATURES_OK:
//! what the driver wrote counts when it gives its first queue. All fields are little endian on this machine.
//!
//! Facts: virtio 1.2 clauses 4.1.4.8 (registers), 4.1.5.1.1, 2.7.2 (layout of a legacy queue), 3.1.2; FreeBSD 12's
//! `sys/dev/virtio/pci/virtio_pci.c`.

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};
use virtio_queue::{Queue, QueueT};

use super::VirtioFunction;
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::read_space;
use crate::vmm::virtio::transport::Transport;

/// Bytes of the window: the registers and any device's configuration.
pub const WINDOW_BYTES: u32 = 0x80;

const DEVICE_FEATURES: usize = 0;
const DRIVER_FEATURES: usize = 4;
const QUEUE_PAGE: usize = 8;
const QUEUE_SIZE: usize = 12;
const QUEUE_SELECT: usize = 14;
const QUEUE_NOTIFY: usize = 16;
const STATUS: usize = 18;
const CAUSES: usize = 19;
/// With MSI-X on only; else the device's configuration begins here.
const CONFIG_VECTOR: usize = 20;
const QUEUE_VECTOR: usize = 22;
const REGISTERS_END: usize = 24;

const PAGE_BYTES: u64 = 4096;

impl VirtioFunction {
    fn legacy_config_start(&self) -> usize {
        if self.interrupts.message_signalled() { REGISTERS_END } else { CONFIG_VECTOR }
    }

    pub(super) fn legacy_read(&self, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        // Without the transport's lock, and with an effect: by itself only.
        if let (CAUSES, [byte]) = (at, &mut *data) {
            *byte = self.interrupts.take_causes();
            return;
        }
        let config_start = self.legacy_config_start();
        let mut t = self.lock();
        if let Some(config_offset) = at.checked_sub(config_start) {
            return t.device.read_config(config_offset as u64, data);
        }
        (t.device_features_select, t.driver_features_select) = (0, 0);
        let queue = t.queue_select;
        let (page, size) = t.selected().map_or((0, 0), |queue| {
            (if queue.ready() { (queue.desc_table() / PAGE_BYTES) as u32 } else { 0 }, queue.max_size())
        });
        let mut image = [0; REGISTERS_END];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(DEVICE_FEATURES, &t.device_features_word().to_le_bytes());
        put(DRIVER_FEATURES, &t.driver_features_word().to_le_bytes());
        put(QUEUE_PAGE, &page.to_le_bytes());
        put(QUEUE_SIZE, &size.to_le_bytes());
        put(QUEUE_SELECT, &(queue as u16).to_le_bytes());
        // Legacy drivers know no FEATURES_OK.
        put(STATUS, &[(t.status & !VIRTIO_CONFIG_S_FEATURES_OK) as u8]);
        put(CONFIG_VECTOR, &self.interrupts.config_vector().to_le_bytes());
        put(QUEUE_VECTOR, &self.interrupts.queue_vector(queue).to_le_bytes());
        read_space(&image, offset, data);
    }

    pub(super) fn legacy_write(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        let value = little_endian(data);
        if let (QUEUE_NOTIFY, 2 | 4) = (at, data.len()) {
            return self.doorbell.ring(value & 0xffff);
        }
        let config_start = self.legacy_config_start();
        let mut t = self.lock();
        if let Some(config_offset) = at.checked_sub(config_start) {
            return t.device.write_config(config_offset as u64, data);
        }
        match (at, data.len()) {
            (DRIVER_FEATURES, 4) => {
                t.driver_features_select = 0;
                t.set_driver_features_word(value);
            }
            (QUEUE_PAGE, 4) => set_queue_page(&mut t, value, &self.memory),
            (QUEUE_SELECT, 2) => t.queue_select = value,
            (STATUS, 1) => {
                let value = value & !VIRTIO_CONFIG_S_FEATURES_OK;
                if value & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                    t.agree_as_legacy();
                }
                t.set_status(value);
            }
            (CONFIG_VECTOR, 2) => self.interrupts.set_config_vector(value as u16),
            (QUEUE_VECTOR, 2) => self.interrupts.set_queue_vector(t.queue_select, value as u16),
            _ => {}
        }
    }
}

/// Gives the selected queue its memory, or takes it away (page 0).
fn set_queue_page(t: &mut Transport, page: u32, memory: &GuestMemory) {
    if page == 0 {
        t.set_queue_ready(0, memory);
        if let Some(queue) = t.queues.get_mut(t.queue_select as usize) {
            queue.reset();
        }
        return;
    }
    t.agree_as_legacy();
    t.configure(|queue| place(queue, u64::from(page) * PAGE_BYTES));
    t.set_queue_ready(1, memory);
}

/// Clause 2.7.2: descriptors, available ring, and the used ring at the next page.
fn place(queue: &mut Queue, start: u64) {
    // The driver cannot choose the size, and takes the one it is told.
    let size = queue.max_size();
    queue.set_size(size);
    let available = start + 16 * u64::from(size);
    // Flags, index, the ring, and the event index.
    let used = (available + 4 + 2 * u64::from(size) + 2).next_multiple_of(PAGE_BYTES);
    let half = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    let ((low, high), (a_low, a_high), (u_low, u_high)) = (half(start), half(available), half(used));
    queue.set_desc_table_address(low, high);
    queue.set_avail_ring_address(a_low, a_high);
    queue.set_used_ring_address(u_low, u_high);
}

/// Up to four bytes as a number.
pub(super) fn little_endian(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}
