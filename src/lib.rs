//! coldspark: FreeBSD virtual machines that start in about a millisecond.
//!
//! The map of the rooms, from the outside in. A room may use the rooms below it that are named in its line and
//! no others (`tests/rooms.rs` reads the imports and holds this):
//!
//! | room | what it is for | may use |
//! |---|---|---|
//! | [`cli`] | one file per subcommand; speaks gRPC, or starts the daemon | `api`, `fleet`, `worker`, `agent`, `media`, `telemetry` |
//! | [`api`] | tonic services: proto to domain and back | `fleet`, `agent`, `telemetry` |
//! | [`fleet`] | the daemon's domain: images, VMs, snapshots; one owner task per VM | `worker::protocol`, `worker::channel`, `snapshot`, `agent`, `media`, `telemetry` |
//! | [`worker`] | the process around one VM, its control protocol | `vmm`, `snapshot`, `agent::wire` |
//! | [`snapshot`] | what a frozen VM is: manifest, state, codec, store, memory, disk layers | `atomics` |
//! | [`vmm`] | the machine itself: no policy, no async, no network API | `snapshot::{state, codec, layers}`, `media`, `atomics` |
//! | [`media`] | what is on disks and in the files in which people bring them: partitions, UFS, compressed images, downloads | nothing of ours |
//! | [`telemetry`] | what the service tells of itself: metrics and traces | nothing of ours |
//! | `fuzzing` | what hostile bytes are given to; in tests and fuzzers only | `agent`, `api`, `fleet`, `worker::protocol`, `snapshot`, `media`, `vmm::fuzzing` |
//! | `atomics` | the standard library's, which `tests/models.rs` exchanges for loom's | nothing of ours |
//! | [`agent`] | the frames spoken with the program inside a guest | nothing of ours |

// Unsafe code is in files that say so at their head, or at a function's; tests/rooms.rs has the list. Every block says why it is sound.
#![deny(unsafe_code, clippy::undocumented_unsafe_blocks)]

pub mod agent;
pub mod api;
mod atomics;
pub mod cli;
pub mod fleet;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod media;
pub mod snapshot;
pub mod telemetry;
pub mod vmm;
pub mod worker;
