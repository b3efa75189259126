//! A driver for tests: speaks to a transport through its registers, and to rings through guest memory, and can do
//! both wrongly. (`virtio-queue` has a mock of its own, which cannot wrap around nor loop.)

#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::mmio::MmioTransport;
use crate::vmm::irq::Interrupt;
use crate::vmm::memory::GuestMemory;

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Where tests put buffers; rings lie below.
pub const BUFFERS: u64 = 0x10_0000;
/// Size of the guest's memory.
pub const MEMORY_BYTES: u64 = 0x80_0000;
const QUEUE_BYTES: u64 = 0x4000;

/// Counts edges.
#[derive(Debug, Default)]
pub struct Edges(AtomicUsize);

impl Edges {
    /// Edges since the last call.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Interrupt for Edges {
    fn raise(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub fn guest_memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap()
}

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// A transport with a driver.
pub struct Machine {
    pub memory: GuestMemory,
    pub transport: MmioTransport,
    pub edges: Arc<Edges>,
    /// For each queue: entries, and how far the driver has read the used ring.
    queues: Vec<(u16, u16)>,
}

/// How often nothing must be left to do before a machine is at rest.
const RESTS: u32 = 3;

impl Machine {
    /// A transport in reset, nothing negotiated.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, guest_memory())
    }

    pub fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let edges = Arc::new(Edges::default());
        let transport = MmioTransport::new(device, edges.clone()).unwrap();
        Self { memory, transport, edges, queues: vec![] }
    }

    /// A transport that a driver brought up, with every feature except `without`, all queues `size` entries long.
    pub fn started(device: Box<dyn VirtioDevice>, size: u16, without: u64) -> Self {
        let mut machine = Self::new(device);
        machine.start(size, without);
        machine
    }

    /// A copy of this machine, guest memory and driver, with `device` in it. The transport is in reset still.
    pub fn copy_with(&self, device: Box<dyn VirtioDevice>) -> Self {
        let memory = guest_memory();
        memory.write_slice(&self.read_bytes(0, MEMORY_BYTES as usize), GuestAddress(0)).unwrap();
        Machine { queues: self.queues.clone(), ..Self::with_memory(device, memory) }
    }

    /// Does what a driver does from reset to DRIVER_OK.
    pub fn start(&mut self, size: u16, without: u64) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        self.set(VIRTIO_MMIO_STATUS, status);
        let features = self.offered() & !without;
        self.accept(features);
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.set(VIRTIO_MMIO_STATUS, status);
        assert_eq!(self.get(VIRTIO_MMIO_STATUS), status);
        self.queues.clear();
        let queues = self.transport.lock().queue_count() as u16;
        for index in 0..queues {
            self.add_queue(index, size);
        }
        self.set(VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK);
        self.run();
    }

    pub fn offered(&mut self) -> u64 {
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES));
        self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        high << 32 | u64::from(self.get(VIRTIO_MMIO_DEVICE_FEATURES))
    }

    pub fn accept(&mut self, features: u64) {
        for (word, value) in [(1, (features >> 32) as u32), (0, features as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, value);
        }
    }

    pub fn add_queue(&mut self, index: u16, size: u16) {
        let table = Self::table(index);
        self.memory.write_slice(&[0; QUEUE_BYTES as usize], GuestAddress(table)).unwrap();
        self.set(VIRTIO_MMIO_QUEUE_SEL, index.into());
        self.set(VIRTIO_MMIO_QUEUE_NUM, size.into());
        self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, table as u32);
        self.set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 0);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, Self::available(index) as u32);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 0);
        self.set(VIRTIO_MMIO_QUEUE_USED_LOW, Self::used(index) as u32);
        self.set(VIRTIO_MMIO_QUEUE_USED_HIGH, 0);
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.get(VIRTIO_MMIO_QUEUE_READY), 1);
        self.queues.push((size, 0));
    }

    pub fn table(queue: u16) -> u64 {
        0x1000 + u64::from(queue) * QUEUE_BYTES
    }

    pub fn available(queue: u16) -> u64 {
        Self::table(queue) + 0x1000
    }

    pub fn used(queue: u16) -> u64 {
        Self::table(queue) + 0x2000
    }

    pub fn get(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set(&mut self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes(), &self.memory);
    }

    /// Status register.
    pub fn status(&mut self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    /// The device stopped because its driver broke it.
    pub fn broken(&mut self) -> bool {
        self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Writes descriptors from index `at` of a queue's table.
    pub fn put_descriptors(&self, queue: u16, at: u16, descriptors: &[Descriptor]) {
        self.put_table(Self::table(queue) + 16 * u64::from(at), descriptors);
    }

    /// Writes descriptors at an address.
    pub fn put_table(&self, table: u64, descriptors: &[Descriptor]) {
        for (index, (address, bytes, flags, next)) in descriptors.iter().enumerate() {
            let mut raw = [0; 16];
            raw[..8].copy_from_slice(&address.to_le_bytes());
            raw[8..12].copy_from_slice(&bytes.to_le_bytes());
            raw[12..14].copy_from_slice(&flags.to_le_bytes());
            raw[14..].copy_from_slice(&next.to_le_bytes());
            self.memory.write_slice(&raw, GuestAddress(table + 16 * index as u64)).unwrap();
        }
    }

    /// Writes a chain of (address, length, writable) from descriptor `at` on and makes it available.
    pub fn add(&mut self, queue: u16, at: u16, buffers: &[(u64, u32, bool)]) {
        let descriptors: Vec<Descriptor> = buffers
            .iter()
            .enumerate()
            .map(|(index, (address, bytes, writable))| {
                let next = if index + 1 < buffers.len() { NEXT } else { 0 };
                (*address, *bytes, next | if *writable { WRITE } else { 0 }, at + index as u16 + 1)
            })
            .collect();
        self.put_descriptors(queue, at, &descriptors);
        self.make_available(queue, at);
    }

    /// Puts a head into the available ring.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let index = self.available_index(queue);
        let slot = Self::available(queue) + 4 + 2 * u64::from(index % self.queues[queue as usize].0);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available_index(queue, index.wrapping_add(1));
    }

    pub fn available_index(&self, queue: u16) -> u16 {
        self.memory.read_obj(GuestAddress(Self::available(queue) + 2)).unwrap()
    }

    pub fn set_available_index(&self, queue: u16, index: u16) {
        self.memory.write_obj(index, GuestAddress(Self::available(queue) + 2)).unwrap();
    }

    pub fn used_index(&self, queue: u16) -> u16 {
        self.memory.read_obj(GuestAddress(Self::used(queue) + 2)).unwrap()
    }

    /// Next entry of the used ring: head and length.
    pub fn take_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let index = self.used_index(queue);
        let (size, seen) = &mut self.queues[queue as usize];
        if *seen == index {
            return None;
        }
        let slot = Self::used(queue) + 4 + 8 * u64::from(*seen % *size);
        *seen = seen.wrapping_add(1);
        let [head, bytes]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
        // With event indices: interrupt when the next one comes.
        let used_event = Self::available(queue) + 4 + 2 * u64::from(*size);
        self.memory.write_obj(*seen, GuestAddress(used_event)).unwrap();
        Some((head as u16, bytes))
    }

    /// Notifies a queue by the register and lets the device thread's part run.
    pub fn notify(&mut self, queue: u16) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
        self.run();
    }

    /// The device thread: answers every watched descriptor that is ready, until none is. At most so many rounds that
    /// a busy loop shows.
    pub fn run(&mut self) {
        let mut settled = 0;
        for _ in 0..10_000 {
            let mut polled: Vec<libc::pollfd> = self
                .transport
                .lock()
                .host_interest()
                .iter()
                .map(|interest| {
                    let readable = if interest.readable { libc::POLLIN } else { 0 };
                    let writable = if interest.writable { libc::POLLOUT } else { 0 };
                    libc::pollfd { fd: interest.fd, events: readable | writable, revents: 0 }
                })
                .collect();
            // SAFETY: pointer and length are those of the vector.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) };
            assert!(ready >= 0);
            if ready == 0 {
                if settled == RESTS {
                    return;
                }
                // Not at rest while requests are carried out elsewhere.
                self.transport.lock().quiesce(&self.memory);
                settled += 1;
                continue;
            }
            // The doorbell alone does not count for ever: a device that waits for its time rings it whenever it is asked to be quiet.
            if polled.iter().skip(1).any(|entry| entry.revents != 0) {
                settled = 0;
            }
            for entry in polled.iter().filter(|entry| entry.revents != 0) {
                self.transport.lock().host_event(entry.fd, &self.memory);
            }
        }
        panic!("the device thread never comes to rest");
    }

    /// Waits until a watched descriptor is ready, and runs.
    pub fn wait(&mut self) {
        let interest = self.transport.lock().host_interest();
        let mut polled: Vec<libc::pollfd> =
            interest.iter().map(|i| libc::pollfd { fd: i.fd, events: libc::POLLIN, revents: 0 }).collect();
        // SAFETY: pointer and length are those of the vector.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        assert!(ready > 0);
        self.run();
    }

    pub fn write_bytes(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read_bytes(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}
