//! The generated messages, clients and servers of `proto/coldspark/v1`, public for any Rust client.

#![allow(clippy::all, clippy::pedantic, missing_docs)] // Generated.

tonic::include_proto!("coldspark.v1");

/// All services as an encoded `FileDescriptorSet`, comments included: what reflection serves.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("coldspark.v1");
