//! Builds the embedded test guest with the compiler that builds the crate, for the one target that is always there.
//!
//! The guest is a freestanding program (`guest/testguest`): no crates, no C, its own link script. It is made for
//! `x86_64-unknown-linux-gnu` because a stock toolchain has no bare-metal target installed; nothing of Linux is linked. It
//! is always optimized: a debug build of the crate boots the same guest.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ENTRY: &str = "guest/testguest/main.rs";
const SCRIPT: &str = "guest/testguest/layout.ld";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// ELF identification: byte and value by which a kernel is FreeBSD's.
const OSABI_AT: usize = 7;
const OSABI_FREEBSD: u8 = 9;
const PROGRAM_HEADER_BYTES: usize = 56;
const VIRTUAL_ADDRESS_AT: usize = 16;
/// Start of the kernel's window on physical memory.
const KERNBASE: u64 = 0xffff_ffff_8000_0000;

pub fn build() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=guest/testguest");
    println!("cargo:rerun-if-changed=guest/protocol");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let elf = PathBuf::from(variable("OUT_DIR")?).join("testguest.elf");
    compile(&root, &elf)?;

    let mut bytes = fs::read(&elf)?;
    dress(&mut bytes).ok_or_else(|| format!("{} is not an ELF file", elf.display()))?;
    fs::write(&elf, bytes)?;
    Ok(())
}

/// Gives the file a FreeBSD kernel's looks: OSABI, and segments in the KERNBASE window that the loader maps to where the guest
/// is linked. `None`: a header is not where it should be.
fn dress(bytes: &mut [u8]) -> Option<()> {
    if bytes.get(..4)? != b"\x7fELF" {
        return None;
    }
    *bytes.get_mut(OSABI_AT)? = OSABI_FREEBSD;
    let headers = usize::try_from(u64::from_le_bytes(*bytes.get(32..)?.first_chunk()?)).ok()?;
    let count = usize::from(u16::from_le_bytes(*bytes.get(56..)?.first_chunk()?));
    for index in 0..count {
        let at = headers + index * PROGRAM_HEADER_BYTES + VIRTUAL_ADDRESS_AT;
        let field: &mut [u8; 8] = bytes.get_mut(at..)?.first_chunk_mut()?;
        *field = u64::from_le_bytes(*field).checked_add(KERNBASE)?.to_le_bytes();
    }
    Some(())
}

fn compile(root: &Path, elf: &Path) -> Result<(), Box<dyn Error>> {
    let mut rustc = Command::new(variable("RUSTC")?);
    rustc.current_dir(root).args([ENTRY, "--crate-name=testguest", "--crate-type=bin", "--edition=2024"]);
    rustc.arg(format!("--target={TARGET}")).arg("-o").arg(elf);
    for option in
        ["panic=abort", "opt-level=2", "codegen-units=1", "relocation-model=static", "code-model=small"]
    {
        rustc.arg(format!("-C{option}"));
    }
    rustc.args(["-Cforce-unwind-tables=no", "-Cdebuginfo=0", "-Cstrip=debuginfo", "-Ctarget-cpu=x86-64"]);
    // Through the C compiler that links everything else, whatever linker it drives.
    for argument in
        ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-znorelro"]
    {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    rustc.arg("-Clink-arg=-Wl,-zmax-page-size=4096");
    rustc.arg(format!("-Clink-arg=-Wl,-T,{}", root.join(SCRIPT).display()));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let status =
        rustc.status().map_err(|error| format!("cannot run the compiler for the test guest: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the test guest did not build ({status}); it needs the {TARGET} standard library and a C compiler as linker"
        )
        .into());
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, Box<dyn Error>> {
    env::var(name).map_err(|error| format!("{name}: {error}").into())
}
