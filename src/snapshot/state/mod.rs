//! Plain, versioned structs of a machine's state: what `state.bin` holds. No behaviour but checks.

pub mod chipset;
