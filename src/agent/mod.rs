//! The frames spoken with the program inside a guest.
//!
//! The wire format is one `no_std` file that guest and host both compile: `guest/protocol/wire.rs`.

#[path = "../../guest/protocol/wire.rs"]
pub mod wire;
