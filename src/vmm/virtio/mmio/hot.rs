//! The registers that a driver touches all the time, without a lock.
//!
//! While the device thread works on a queue it holds the transport's lock. An interrupt
//! handler that reads and acknowledges the interrupt status must not wait for that, nor a driver that notifies. So
//! these three registers (`QueueNotify`, `InterruptStatus`, `InterruptACK`) and the list of notified queues live here,
//! in atomics; vCPU threads ask [`HotRegisters`] first and take the lock only for what it does not know.

use std::sync::Arc;

use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_NOTIFY,
};

use super::causes::Causes;
use crate::vmm::irq::Interrupt;
use crate::vmm::virtio::transport::{CAUSE_CHANGED, CAUSE_USED, Doorbell, Signal};

const NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
const STATUS: u64 = VIRTIO_MMIO_INTERRUPT_STATUS as u64;
const ACKNOWLEDGE: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// Registers of one transport that any thread may access at any time, and its interrupt line.
pub struct HotRegisters {
    doorbell: Arc<Doorbell>,
    interrupt_status: Causes,
    line: Arc<dyn Interrupt>,
}

impl HotRegisters {
    pub(super) fn new(doorbell: Arc<Doorbell>, line: Arc<dyn Interrupt>) -> Self {
        Self { doorbell, interrupt_status: Causes::new(), line }
    }

    /// Answers a read, if it is one of these registers: true.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        match (offset, <&mut [u8; 4]>::try_from(data)) {
            (STATUS, Ok(data)) => {
                *data = self.causes().to_le_bytes();
                true
            }
            _ => false,
        }
    }

    /// Takes a write, if it is to one of these registers: true.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return false };
        match offset {
            NOTIFY => {
                self.doorbell.ring(value);
                true
            }
            ACKNOWLEDGE => {
                self.interrupt_status.acknowledge(value);
                true
            }
            _ => false,
        }
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.raise(cause, || self.line.raise());
    }
}

impl Signal for HotRegisters {
    fn used(&self, _queues: u32) {
        self.raise(CAUSE_USED);
    }

    fn changed(&self) {
        self.raise(CAUSE_CHANGED);
    }

    fn causes(&self) -> u32 {
        self.interrupt_status.get()
    }

    fn reset(&self) {
        self.interrupt_status.set(0);
    }

    fn restore(&self, causes: u32) {
        self.interrupt_status.set(causes);
    }

    fn again(&self) {
        self.line.raise();
    }
}
