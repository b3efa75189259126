//! Compiles `proto/` into Rust and a descriptor set for reflection. No `protoc` is needed: protox is Rust.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

const FILES: [&str; 10] = [
    "coldspark/v1/common.proto",
    "coldspark/v1/images.proto",
    "coldspark/v1/network.proto",
    "coldspark/v1/vms.proto",
    "coldspark/v1/snapshots.proto",
    "coldspark/v1/agent.proto",
    "coldspark/v1/pools.proto",
    "coldspark/v1/functions.proto",
    "coldspark/v1/events.proto",
    "coldspark/v1/metrics.proto",
];

/// Writes `coldspark.v1.rs` and `coldspark.v1.bin` to `OUT_DIR`.
pub fn build() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    fs::write(out.join("coldspark.v1.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().bytes(".").compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
