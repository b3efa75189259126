//! The atomics and locks of the few files that are written without a lock, or whose order matters: the standard library's here.
//!
//! `tests/models.rs` compiles those same files with loom's in their place, which tries every order in which threads can come
//! and every value that the memory model lets a load see.

pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
pub use std::sync::{Mutex, PoisonError};
