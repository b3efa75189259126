//! The gRPC services: proto to domain and back, nothing else.

pub mod proto;
