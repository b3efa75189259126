//! Plain, versioned structs of a machine's state: what `state.bin` holds. No behaviour but checks.
//!
//! They are encoded by [`crate::snapshot::codec`] and kept together by [`file`]. Whoever restores from one treats every
//! field as hostile; what can only be checked against a machine is checked by the part of the machine that takes the
//! struct over.

#![forbid(unsafe_code)]

pub mod chipset;
pub mod file;
pub mod machine;
pub mod pc;
pub mod vcpu;
pub mod virtio;
