//! Builds the agent for FreeBSD guests, `guest/agent`, as the test guest is built ([`super::freestanding`]): it makes FreeBSD's
//! system calls itself, so nothing of FreeBSD is needed, and users need no other toolchain.

use std::error::Error;
use std::fs;

use super::freestanding::{Program, out};

pub fn build() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=guest");
    let elf = out("coldspark-agent")?;
    let program =
        Program { entry: "guest/agent/main.rs", name: "coldspark_agent", link: &["-Wl,-znoseparate-code"] };
    program.compile(&elf)?;
    let mut bytes = fs::read(&elf)?;
    super::freestanding::brand(&mut bytes).ok_or_else(|| format!("{} is not an ELF file", elf.display()))?;
    fs::write(&elf, bytes)?;
    Ok(())
}
