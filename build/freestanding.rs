//! Compiling programs that run on nothing: no crates, no C, no libraries.
//!
//! They are made for `x86_64-unknown-linux-gnu` because a stock toolchain has no bare-metal target installed; nothing of Linux is
//! linked. They are always optimized: a debug build of the crate carries the same programs.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// ELF identification: byte and value by which a program is FreeBSD's.
const OSABI_AT: usize = 7;
const OSABI_FREEBSD: u8 = 9;

pub struct Program<'a> {
    /// Its first source file, from the top of the repository.
    pub entry: &'a str,
    /// As a crate.
    pub name: &'a str,
    /// What the linker is told besides.
    pub link: &'a [&'a str],
}

impl Program<'_> {
    pub fn compile(&self, elf: &Path) -> Result<(), Box<dyn Error>> {
        let mut rustc = Command::new(variable("RUSTC")?);
        rustc.current_dir(root()?).arg(self.entry).arg(format!("--crate-name={}", self.name));
        rustc.args(["--crate-type=bin", "--edition=2024"]);
        rustc.arg(format!("--target={TARGET}")).arg("-o").arg(elf);
        for option in
            ["panic=abort", "opt-level=2", "codegen-units=1", "relocation-model=static", "code-model=small"]
        {
            rustc.arg(format!("-C{option}"));
        }
        rustc.args(["-Cforce-unwind-tables=no", "-Cdebuginfo=0", "-Cstrip=debuginfo", "-Ctarget-cpu=x86-64"]);
        // Through the C compiler that links everything else, whatever linker it drives.
        let common =
            ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-znorelro"];
        for argument in common.iter().chain(&["-Wl,-zmax-page-size=4096"]).chain(self.link) {
            rustc.arg(format!("-Clink-arg={argument}"));
        }
        if let Ok(linker) = env::var("RUSTC_LINKER") {
            rustc.arg(format!("-Clinker={linker}"));
        }
        let status =
            rustc.status().map_err(|error| format!("cannot run the compiler for {}: {error}", self.entry))?;
        if !status.success() {
            return Err(format!(
                "{} did not build ({status}); it needs the {TARGET} standard library and a C compiler as linker",
                self.entry
            )
            .into());
        }
        Ok(())
    }
}

/// Says in the file that it is FreeBSD's. `None`: it is no ELF file.
pub fn brand(bytes: &mut [u8]) -> Option<()> {
    if bytes.get(..4)? != b"\x7fELF" {
        return None;
    }
    *bytes.get_mut(OSABI_AT)? = OSABI_FREEBSD;
    Some(())
}

/// Where a product is put.
pub fn out(name: &str) -> Result<PathBuf, Box<dyn Error>> {
    Ok(PathBuf::from(variable("OUT_DIR")?).join(name))
}

pub fn root() -> Result<PathBuf, Box<dyn Error>> {
    Ok(PathBuf::from(variable("CARGO_MANIFEST_DIR")?))
}

fn variable(name: &str) -> Result<String, Box<dyn Error>> {
    env::var(name).map_err(|error| format!("{name}: {error}").into())
}
