//! Disks of a VM that are files of the caller's, by path: raw images and block devices, beside those of its image.
//!
//! The daemon opens them, as it opens every file; the worker is handed descriptors. A file is locked as long as a VM uses
//! it (`flock`, on the open file that daemon and worker share): for one VM alone if it is written directly, else shared by
//! those that only read it. So two VMs never write to one file, and none reads what another writes. Programs that take no
//! locks are not kept out.

use std::fs::{File, FileType, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disks::{FrozenFile, VmDisk, VmFolder};
use super::error::FleetError;
use super::limits::DISKS_MAX;
use crate::media::partitions;
use crate::snapshot::layers::{DISK_BYTES_MAX, SECTOR_BYTES};

/// What becomes of writes to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskMode {
    /// They go into an overlay that ends with the VM; the file stays as it is.
    Overlay,
    /// There are none.
    ReadOnly,
    /// They go into the file.
    Persist,
}

/// A disk asked for by path.
#[derive(Debug, Clone)]
pub struct DiskFile {
    pub path: PathBuf,
    pub mode: DiskMode,
}

/// Beginnings of files that are given by mistake, with what to say.
const NOT_RAW: &[(&[u8], &str)] = &[
    (b"QFI\xfb", "a qcow2 image; convert it with `qemu-img convert -O raw`, or import it as an image"),
    (b"\xfd7zXZ\0", "compressed with xz; decompress it, or import it as an image"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it, or import it as an image"),
    (b"\x1f\x8b", "compressed with gzip; decompress it, or import it as an image"),
    (b"KDMV", "a VMDK image; convert it with `qemu-img convert -O raw`"),
    (b"vhdxfile", "a VHDX image; convert it with `qemu-img convert -O raw`"),
];

/// Opens the disks that a VM gets beside its image's `before`. Blocks.
pub fn open(files: &[DiskFile], before: usize, folder: &mut VmFolder) -> Result<Vec<VmDisk>, FleetError> {
    if before + files.len() > DISKS_MAX {
        return Err(FleetError::Invalid(format!(
            "{} disks, {before} of them the image's; the most is {DISKS_MAX}",
            before + files.len()
        )));
    }
    let mut disks = Vec::with_capacity(files.len());
    for (n, file) in files.iter().enumerate() {
        let n = before + n;
        let (opened, bytes) = open_one(file)?;
        disks.push(VmDisk {
            read_only: file.mode == DiskMode::ReadOnly,
            direct: file.mode == DiskMode::Persist,
            bytes,
            serial: format!("coldspark-{n}"),
            base: FrozenFile { file: Arc::new(opened), known: None, foreign: true },
            layers: Vec::new(),
            overlay: match file.mode {
                DiskMode::Overlay => Some(folder.overlay(n)?),
                DiskMode::ReadOnly | DiskMode::Persist => None,
            },
        });
    }
    Ok(disks)
}

fn open_one(disk: &DiskFile) -> Result<(File, u64), FleetError> {
    let path = &disk.path;
    let wrong = |what: String| FleetError::Invalid(format!("disk {}: {what}", path.display()));
    if !path.is_absolute() {
        return Err(wrong("give its absolute path: the service has a working folder of its own".into()));
    }
    let persist = disk.mode == DiskMode::Persist;
    // A FIFO or a terminal must not keep the service waiting, nor become its own.
    let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    if persist && file_type(path)?.is_block_device() {
        // The kernel refuses a device that is mounted.
        flags |= libc::O_EXCL;
    }
    let file = OpenOptions::new().read(true).write(persist).custom_flags(flags).open(path);
    let file = file.map_err(|source| cannot_open(path, persist, source))?;
    let kind =
        file.metadata().map_err(FleetError::io(format!("cannot read {}", path.display())))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(wrong("neither a file nor a block device; give a raw disk image".into()));
    }
    let locked = if persist { file.try_lock() } else { file.try_lock_shared() };
    match locked {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(FleetError::WrongState(format!(
                "disk {} is in use: {}; stop the VM that has it, or give this one a copy",
                path.display(),
                match persist {
                    true => "another VM or program has locked it",
                    false => "another VM or program writes to it",
                }
            )));
        }
        Err(TryLockError::Error(source)) => {
            return Err(FleetError::io(format!("cannot lock the disk {}", path.display()))(source));
        }
    }
    let bytes =
        length(&file).map_err(FleetError::io(format!("cannot find the size of {}", path.display())))?;
    check_raw(&file, bytes).map_err(wrong)?;
    Ok((file, bytes))
}

fn file_type(path: &Path) -> Result<FileType, FleetError> {
    match std::fs::metadata(path) {
        Ok(data) => Ok(data.file_type()),
        Err(source) => Err(cannot_open(path, true, source)),
    }
}

fn cannot_open(path: &Path, write: bool, source: io::Error) -> FleetError {
    let hint = match source.kind() {
        io::ErrorKind::NotFound => "there is no such file on the service's host",
        io::ErrorKind::PermissionDenied if write => {
            "the service may not write to it; change its permissions, or leave `persist` out"
        }
        io::ErrorKind::PermissionDenied => "the service may not read it; change its permissions",
        io::ErrorKind::ResourceBusy => "it is mounted, or another program has it; unmount it first",
        io::ErrorKind::ReadOnlyFilesystem => "it lies on a read-only file system; leave `persist` out",
        _ => return FleetError::io(format!("cannot open the disk {}", path.display()))(source),
    };
    let text = format!("disk {} cannot be opened: {hint}", path.display());
    match source.kind() {
        io::ErrorKind::ResourceBusy => FleetError::WrongState(text),
        _ => FleetError::Invalid(text),
    }
}

/// Also of a block device, which has no length of its own.
fn length(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

/// Whether these can be the bytes of a disk.
fn check_raw(file: &File, bytes: u64) -> Result<(), String> {
    if bytes == 0 {
        return Err("it has no bytes; make it with `truncate -s 10G`, or copy it again".into());
    }
    if bytes > DISK_BYTES_MAX {
        return Err(format!("it has {bytes} bytes; the most is {DISK_BYTES_MAX}"));
    }
    let mut head = [0u8; 16];
    let some = head.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
    file.read_exact_at(head.get_mut(..some).unwrap_or_default(), 0)
        .map_err(|error| format!("cannot be read: {error}"))?;
    if let Some((_, what)) = NOT_RAW.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(format!("it is {what}"));
    }
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(format!(
            "it has {bytes} bytes, and a disk's size is a multiple of {SECTOR_BYTES}; was it truncated? Copy it again, or extend it with `truncate -s %{SECTOR_BYTES}`"
        ));
    }
    let table = partitions::table(file, bytes).map_err(|error| format!("cannot be read: {error}"))?;
    match table.problem {
        Some(problem) => Err(format!("{problem}; copy it again, or repair it with `gpart recover`")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn one(path: &Path, mode: DiskMode) -> Result<(File, u64), String> {
        open_one(&DiskFile { path: path.into(), mode }).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_that_is_written_belongs_to_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, [0; 8192]).unwrap();
        let (first, bytes) = one(&path, DiskMode::Persist).unwrap();
        assert_eq!(bytes, 8192);
        for mode in [DiskMode::Persist, DiskMode::Overlay, DiskMode::ReadOnly] {
            let error = one(&path, mode).unwrap_err();
            assert!(error.contains("disk.raw is in use"), "{error}");
        }
        // The lock is the open file's, however many descriptors it has.
        let worker = first.try_clone().unwrap();
        drop(first);
        assert!(one(&path, DiskMode::ReadOnly).is_err());
        drop(worker);
        let _reader = one(&path, DiskMode::Overlay).unwrap();
        let _another = one(&path, DiskMode::ReadOnly).unwrap();
        assert!(one(&path, DiskMode::Persist).is_err());
    }

    #[test]
    fn a_file_that_is_only_read_is_open_for_reading_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, [0; 8192]).unwrap();
        for mode in [DiskMode::Overlay, DiskMode::ReadOnly] {
            let (file, _) = one(&path, mode).unwrap();
            assert!(file.write_all_at(b"x", 0).is_err() && file.set_len(0).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let cases: [(&str, Vec<u8>, &str); 5] = [
            ("empty", vec![], "no bytes"),
            ("odd", vec![1; 1000], "multiple of 512"),
            ("x.qcow2", [b"QFI\xfb".to_vec(), vec![0; 508]].concat(), "qcow2"),
            ("x.xz", [b"\xfd7zXZ\0".to_vec(), vec![0; 506]].concat(), "xz"),
            ("x.zst", [b"\x28\xb5\x2f\xfd".to_vec(), vec![0; 508]].concat(), "zstd"),
        ];
        for (name, bytes, says) in cases {
            fs::write(path(name), bytes).unwrap();
            let error = one(&path(name), DiskMode::Overlay).unwrap_err();
            assert!(error.contains(says) && error.contains(name), "{error}");
        }
        assert!(one(&path("missing"), DiskMode::Persist).unwrap_err().contains("no such file"));
        assert!(one(Path::new("relative"), DiskMode::Persist).unwrap_err().contains("absolute"));
        assert!(one(folder.path(), DiskMode::Overlay).unwrap_err().contains("neither a file nor"));
        assert!(one(Path::new("/dev/null"), DiskMode::Overlay).unwrap_err().contains("neither a file nor"));
    }
}
