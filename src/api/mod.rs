//! The gRPC services: proto to domain and back, nothing else.
//!
//! | module | what it holds |
//! |---|---|
//! | [`proto`] | generated messages, clients, servers |
//! | [`client`] | connecting to a service's socket |
//! | [`server`] | the socket, the services on it, and the end |
//! | `vms`, `snapshots`, `images`, `agent` | one service each |
//! | `convert`, `network`, `status` | messages and errors, translated |

mod agent;
pub mod client;
mod convert;
mod images;
mod network;
pub mod proto;
pub mod server;
mod snapshots;
mod status;
mod vms;

/// Largest message either side takes: a 1 MiB payload and room for its frame.
pub const MESSAGE_BYTES_MAX: usize = (1 << 20) + (64 << 10);
