//! What is made before the crate is compiled. One file for each product.

use std::error::Error;

#[path = "build/agent.rs"]
mod agent;
#[path = "build/freestanding.rs"]
mod freestanding;
#[path = "build/proto.rs"]
mod proto;
#[path = "build/testguest.rs"]
mod testguest;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    testguest::build()?;
    agent::build()?;
    proto::build()
}
