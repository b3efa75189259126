//! The gRPC services: proto to domain and back, nothing else.
//!
//! | module | what it holds |
//! |---|---|
//! | [`proto`] | generated messages, clients, servers |
//! | [`client`] | connecting to a service |
//! | [`listen`] | the Unix socket and the TCP port, and who comes in |
//! | [`auth`] | who may call what |
//! | [`scrape`], `metrics`, `measure` | metrics over HTTP and as a service; requests, counted and timed |
//! | [`server`] | the services, and the end |
//! | `vms`, `snapshots`, `images`, `agent`, `pools`, `functions`, `events` | one service each |
//! | `exec` | AgentService's streams: commands and files |
//! | `pages` | lists, a page at a time |
//! | `replays` | answers kept for requests that are sent again |
//! | `convert`, `network`, `status` | messages and errors, translated |

mod agent;
pub mod auth;
pub mod client;
mod convert;
mod cut_off;
mod events;
mod exec;
mod functions;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod images;
pub mod listen;
mod measure;
mod metrics;
mod network;
mod pages;
mod pools;
pub mod proto;
mod replays;
pub mod scrape;
pub mod server;
mod snapshots;
mod status;
mod vms;

/// Largest message either side takes: a 1 MiB payload and room for its frame.
pub const MESSAGE_BYTES_MAX: usize = (1 << 20) + (64 << 10);
