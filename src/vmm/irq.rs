//! How devices interrupt the guest, seen from the device's side.

use std::sync::Arc;

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

/// An edge-triggered interrupt line. [`crate::vmm::chipset`]'s IOAPIC gives one for each pin.
pub trait Interrupt: Send + Sync {
    /// Delivers one edge. Cheap, never blocks, may be called from any thread.
    fn raise(&self);
}

/// A device's input to a level-triggered pin that several devices share. [`crate::vmm::chipset`]'s IOAPIC gives them.
pub trait Level: Send + Sync {
    /// The device wants an interrupt, or wants none any more. Never blocks for long, may be called from any thread.
    fn set(&self, asserted: bool);
}

/// Takes message-signalled interrupts.
pub trait Messages: Send + Sync {
    /// Delivers the message that a device would write (SDM volume 3, 11.11). What means nothing is dropped.
    fn send(&self, address: u64, data: u32);
}

/// KVM's local APICs, by KVM_SIGNAL_MSI: no route to be set when the guest changes a message, none at restore.
pub struct KvmMessages(pub Arc<VmFd>);

impl Messages for KvmMessages {
    fn send(&self, address: u64, data: u32) {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // A guest that wrote nonsense into its own table loses the interrupt, as on hardware.
        let _ = self.0.signal_msi(message);
    }
}
