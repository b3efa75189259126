//! Builds the embedded test guest, a freestanding program with its own link script ([`super::freestanding`]).

use std::error::Error;
use std::fs;

use super::freestanding::{Program, brand, out, root};

const SCRIPT: &str = "guest/testguest/layout.ld";
const PROGRAM_HEADER_BYTES: usize = 56;
const VIRTUAL_ADDRESS_AT: usize = 16;
/// Start of the kernel's window on physical memory.
const KERNBASE: u64 = 0xffff_ffff_8000_0000;

pub fn build() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=guest");
    let elf = out("testguest.elf")?;
    let script = format!("-Wl,-T,{}", root()?.join(SCRIPT).display());
    Program { entry: "guest/testguest/main.rs", name: "testguest", link: &[&script] }.compile(&elf)?;

    let mut bytes = fs::read(&elf)?;
    dress(&mut bytes).ok_or_else(|| format!("{} is not an ELF file", elf.display()))?;
    fs::write(&elf, bytes)?;
    Ok(())
}

/// Gives the file a FreeBSD kernel's looks: OSABI, and segments in the KERNBASE window that the loader maps to where the guest
/// is linked. `None`: a header is not where it should be.
fn dress(bytes: &mut [u8]) -> Option<()> {
    brand(bytes)?;
    let headers = usize::try_from(u64::from_le_bytes(*bytes.get(32..)?.first_chunk()?)).ok()?;
    let count = usize::from(u16::from_le_bytes(*bytes.get(56..)?.first_chunk()?));
    for index in 0..count {
        let at = headers + index * PROGRAM_HEADER_BYTES + VIRTUAL_ADDRESS_AT;
        let field: &mut [u8; 8] = bytes.get_mut(at..)?.first_chunk_mut()?;
        *field = u64::from_le_bytes(*field).checked_add(KERNBASE)?.to_le_bytes();
    }
    Some(())
}
