//! What the service tells of itself to those who watch it: metrics and traces. (Its log is `tracing`'s, everywhere.)
//!
//! | module | what it holds |
//! |---|---|
//! | [`metrics`] | the instruments, one set for the process |
//! | [`exposition`] | the text that Prometheus reads, made and read |
//! | [`trace`] | spans of requests and what they were made of, sent by OTLP |
//! | [`labels`] | that label values stay few |
//!
//! The instruments are one set for the process, as Prometheus sees a process: whoever has something to count needs no handle.

#![forbid(unsafe_code)]

pub mod exposition;
pub mod labels;
pub mod metrics;
pub mod trace;

pub use metrics::metrics;
