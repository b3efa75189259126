//! What a frozen VM is: manifest, state, codec, store, memory sources, disk layers. Knows no KVM handle and no gRPC.
//!
//! | module | what it holds |
//! |---|---|
//! | [`limits`] | the most of everything that stored data may claim |
//! | [`cause`] | which kind of failure an error is, for the status code that a caller sees |
//! | [`manifest`] | `manifest.json`: what a snapshot is, and whether it fits this host |
//! | [`state`] | the machine state: plain, versioned structs |
//! | [`store`] | the folder of published snapshots: begin, publish, open, verify, delete |
//! | [`images`] | the folder of images that can be cold-booted |
//! | [`signing`] | who made a snapshot: signatures of manifests, and which are trusted |
//! | [`sums`] | BLAKE3 sums of whole and of sparse files |
//! | [`writers`] | whether anybody can still write to what is about to be published |
//! | [`memory`] | guest memory: writing the image, mapping it, answering page faults from it |
//! | [`working_set`] | what clones touch of the memory first |
//! | [`layers`] | copy-on-write disks: base, frozen layers, a private overlay |
//! | [`codec`] | bounded encoding of plain structs |
//!
//! The format on disk is written down in `docs/snapshot-format.md`.

pub mod cause;
pub mod codec;
pub mod folder;
pub mod images;
pub mod layers;
pub mod limits;
pub mod manifest;
pub mod memory;
mod shelf;
pub mod signing;
pub mod state;
pub mod store;
pub mod sums;
mod transfer;
pub mod working_set;
pub mod writers;
