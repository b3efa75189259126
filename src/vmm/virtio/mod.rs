//! virtio devices and their transports.
