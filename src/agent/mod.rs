//! The frames spoken with the program inside a guest.
//!
//! The wire format is one `no_std` file that guest and host both compile, `guest/protocol/wire.rs`; what the test
//! guest computes is `guest/protocol/pattern.rs`. This room gives them types ([`ops`]), cuts a byte stream into
//! frames ([`frame`]), and computes again what the test guest must have answered ([`expect`]). [`testguest`] is the test guest's kernel file. Nothing here does I/O: the
//! owner of the console port moves the bytes. A guest is hostile: nothing here trusts a length or a count.

#![forbid(unsafe_code)]

pub mod expect;
pub mod frame;
pub mod ops;
#[path = "../../guest/protocol/pattern.rs"]
pub mod pattern;
pub mod testguest;
#[path = "../../guest/protocol/wire.rs"]
pub mod wire;

pub use frame::{Frame, FrameDecoder, FrameError};
pub use ops::{AgentError, AgentReply, AgentRequest, Hello};
