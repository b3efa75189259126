//! `coldspark agent`: the agent for FreeBSD guests, which this program carries.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;

use super::output;
use crate::agent::FREEBSD_AGENT;

/// Starts it when FreeBSD boots.
const RC_SCRIPT: &str = include_str!("../../guest/agent/coldspark_agent.rc");
/// Where the two belong in a guest, their permissions.
const PROGRAM: (&str, u32) = ("usr/local/sbin/coldspark-agent", 0o755);
const SCRIPT: (&str, u32) = ("usr/local/etc/rc.d/coldspark_agent", 0o755);
/// tar's unit, and the size that a disk is filled up to: readers may ask for blocks of 10 KiB.
const BLOCK_BYTES: usize = 512;
const DISK_STEP_BYTES: usize = 1 << 20;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a disk with the agent, to be unpacked in a FreeBSD guest by its tar
    #[command(
        after_help = "Example:\n  coldspark agent disk agent.disk\n\nIn the guest, where it is the second disk:\n  tar -xpf /dev/vtbd1 -C /\n  sysrc coldspark_agent_enable=YES && service coldspark_agent start"
    )]
    Disk {
        /// The file to write
        file: PathBuf,
    },
    /// Write the agent and its rc.d script into a folder, as they lie in a guest
    #[command(after_help = "Example:\n  coldspark agent write /mnt")]
    Write {
        /// The folder: a guest's root, or an empty one
        folder: PathBuf,
    },
}

pub fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Disk { file } => {
            fs::write(&file, disk()).with_context(|| format!("cannot write {}", file.display()))?;
            output::line(&format!(
                "{}: attach it, then in the guest: tar -xpf /dev/vtbd1 -C /",
                file.display()
            ))?;
        }
        Command::Write { folder } => {
            for ((path, mode), bytes) in files() {
                write(&folder.join(path), mode, bytes)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn files() -> [((&'static str, u32), &'static [u8]); 2] {
    [(PROGRAM, FREEBSD_AGENT), (SCRIPT, RC_SCRIPT.as_bytes())]
}

fn write(path: &Path, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || {
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, bytes)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    output::line(&path.display().to_string())?;
    Ok(())
}

/// An archive that any tar reads from a disk as it does from a file.
pub fn disk() -> Vec<u8> {
    let mut disk = Vec::new();
    for ((path, mode), bytes) in files() {
        disk.extend_from_slice(&header(path, mode, bytes.len()));
        disk.extend_from_slice(bytes);
        disk.resize(disk.len().next_multiple_of(BLOCK_BYTES), 0);
    }
    // Two empty blocks are the end.
    disk.resize((disk.len() + 2 * BLOCK_BYTES).next_multiple_of(DISK_STEP_BYTES), 0);
    disk
}

/// A ustar header (POSIX.1-1988): fields of octal digits at fixed places; root's.
fn header(path: &str, mode: u32, bytes: usize) -> [u8; BLOCK_BYTES] {
    let mut block = [0u8; BLOCK_BYTES];
    let mut put = |at: usize, text: &str| {
        for (place, byte) in block.iter_mut().skip(at).zip(text.bytes()) {
            *place = byte;
        }
    };
    put(0, path);
    put(100, &format!("{mode:07o}"));
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{bytes:011o}"));
    put(136, "00000000000");
    // The sum is made with blanks in its own place.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    put(265, "root");
    put(297, "wheel");
    let sum: u32 = block.iter().copied().map(u32::from).sum();
    for (place, byte) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0").bytes()) {
        *place = byte;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_a_static_freebsd_program() {
        assert_eq!(FREEBSD_AGENT[..8], *b"\x7fELF\x02\x01\x01\x09", "64 bits, little endian, FreeBSD's");
        assert_eq!(FREEBSD_AGENT[16..20], [2, 0, 62, 0], "an executable for x86-64");
        // PT_INTERP or PT_DYNAMIC would ask for what a guest need not have.
        let count = usize::from(FREEBSD_AGENT[56]);
        let kinds = (0..count).map(|index| FREEBSD_AGENT[64 + index * 56]);
        assert!(kinds.clone().all(|kind| kind != 2 && kind != 3) && kinds.clone().any(|kind| kind == 4));
        assert!(FREEBSD_AGENT.windows(8).any(|bytes| bytes == b"FreeBSD\0"), "the note");
    }

    #[test]
    fn tar_unpacks_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        fs::write(&file, disk()).unwrap();
        assert_eq!(disk().len() % DISK_STEP_BYTES, 0);
        let tar =
            std::process::Command::new("tar").arg("-xpf").arg(&file).arg("-C").arg(folder.path()).output();
        let tar = tar.expect("this machine has a tar");
        assert!(tar.status.success() && tar.stderr.is_empty(), "{tar:?}");
        for ((path, mode), bytes) in files() {
            let path = folder.path().join(path);
            assert_eq!(fs::read(&path).unwrap(), bytes);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        }
    }
}
