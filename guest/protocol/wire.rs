//! The agent protocol's wire format, compiled into the host program and into every guest program.
//!
//! `no_std`, no allocation. All integers little endian. A frame is a [`HEADER_BYTES`] header and `length` bytes of
//! payload. Host to guest: requests. Guest to host: [`KIND_HELLO`] when it is ready to serve, and one reply
//! (`kind | REPLY`, same `id`) for each request, in order.

/// "CSA1" read as a little-endian word.
pub const MAGIC: u32 = 0x3141_5343;
/// Bytes of a frame header: magic u32, kind u16, status u16, id u32, length u32.
pub const HEADER_BYTES: usize = 16;
/// Longest payload either side accepts.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Set in the kind of a reply.
pub const REPLY: u16 = 0x8000;

pub const KIND_HELLO: u16 = 0x01;
