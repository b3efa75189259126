//! How devices interrupt the guest, seen from the device's side.

/// An edge-triggered interrupt line. [`crate::vmm::chipset`]'s IOAPIC gives one for each pin.
pub trait Interrupt: Send + Sync {
    /// Delivers one edge. Cheap, never blocks, may be called from any thread.
    fn raise(&self);
}
