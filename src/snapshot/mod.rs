//! What a frozen VM is: manifest, state, codec, store, memory sources, disk layers. Knows no KVM handle and no gRPC.

pub mod codec;
pub mod state;
