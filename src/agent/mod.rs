//! The frames spoken with the program inside a guest.
//!
//! The wire format is one `no_std` file that guest and host both compile, `guest/protocol/wire.rs`; what the test
//! guest computes is `guest/protocol/pattern.rs`. This room gives them types ([`ops`], [`streams`]), cuts a byte stream
//! into frames ([`frame`]), and computes again what the test guest must have answered ([`expect`]). [`resync`] finds the place again when an agent was killed. [`testguest`] is the test guest's kernel file. Nothing here does I/O: the
//! owner of the console port moves the bytes. A guest is hostile: nothing here trusts a length or a count.

#![forbid(unsafe_code)]

pub mod expect;
/// The agent for FreeBSD guests: an ELF file that a FreeBSD/amd64 kernel runs, built from `guest/agent` by
/// `build/agent.rs`.
pub const FREEBSD_AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/coldspark-agent"));

pub mod frame;
pub mod ops;
#[path = "../../guest/protocol/pattern.rs"]
pub mod pattern;
pub mod resync;
pub mod streams;
pub mod testguest;
#[path = "../../guest/protocol/wire.rs"]
pub mod wire;

pub use frame::{Frame, FrameDecoder, FrameError};
pub use ops::{AgentError, AgentReply, AgentRequest, Confirmed, Hello, Host, More};
pub use streams::{End, Opened, Opening, Said, Word};

// Those parts of the agent for FreeBSD that make no system calls.
#[cfg(test)]
#[allow(dead_code)]
#[path = "../../guest/agent/accounts.rs"]
mod freebsd_accounts;
#[cfg(test)]
#[allow(dead_code)]
#[path = "../../guest/agent/port.rs"]
mod freebsd_port;
