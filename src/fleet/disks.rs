//! The files behind a VM's disks: shared base and frozen layers, and the overlay that only this VM writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};

use super::error::FleetError;
use crate::snapshot::manifest::{Disk, FileEntry};
use crate::snapshot::store::{Draft, StoreError};
use crate::worker::protocol::{DiskSpec, LAYERS_MAX};

/// A file that nobody writes to any more.
#[derive(Debug, Clone)]
pub struct FrozenFile {
    pub file: Arc<File>,
    /// Its sum, where it is known, so that a snapshot need not read it again.
    pub known: Option<FileEntry>,
    /// It belongs to somebody who may write to it after the VM's end: a snapshot takes a copy.
    pub foreign: bool,
}

/// One disk of a VM.
#[derive(Debug, Clone)]
pub struct VmDisk {
    pub read_only: bool,
    /// Writes go into the base itself.
    pub direct: bool,
    /// As the guest sees it.
    pub bytes: u64,
    pub serial: String,
    pub base: FrozenFile,
    /// From the lowest.
    pub layers: Vec<FrozenFile>,
    /// `None` if read-only or direct.
    pub overlay: Option<Arc<File>>,
}

/// What a disk with an overlay goes on with when it is frozen.
#[derive(Debug)]
pub struct Next {
    /// The overlay so far, opened for reading only.
    pub sealed: Arc<File>,
    /// The one after it, empty.
    pub overlay: Arc<File>,
}

/// The same file, opened for reading only.
fn for_reading(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Name of the socket at which the VM's worker waits for the next daemon, and of the VM's record ([`super::record`]).
const DOOR: &str = "door";
pub const RECORD: &str = "vm.json";
/// Blanks that an empty record holds: to write over them when a clone is handed over takes a sixth of the time of making the file longer.
pub const RECORD_ROOM: usize = 4096;
/// What an overlay's name begins with.
const OVERLAY: &str = "disk-";

/// A VM's folder: its overlays, its door, its record. Removed with the VM.
#[derive(Debug)]
pub struct VmFolder {
    id: String,
    path: PathBuf,
    made: bool,
    overlays: u32,
    /// The VM's empty record, until it is taken.
    record: Option<File>,
}

impl VmFolder {
    /// The folder of `id` in `vms`. It is made when the first file is.
    pub fn new(vms: &Path, id: &str) -> Self {
        Self { id: id.to_owned(), path: vms.join(id), made: false, overlays: 0, record: None }
    }

    /// The same, of a VM that an earlier daemon has made.
    pub fn reopen(vms: &Path, id: &str) -> Self {
        let mut folder = Self::new(vms, id);
        folder.made = true;
        let numbers = folder.overlay_paths();
        let numbers = numbers.iter().filter_map(|path| path.extension()?.to_str()?.parse::<u32>().ok());
        folder.overlays = numbers.max().map_or(0, |last| last.saturating_add(1));
        folder
    }

    /// The VM's id.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It is not removed with this.
    pub fn leave(&mut self) {
        self.made = false;
    }

    fn make(&mut self) -> Result<(), FleetError> {
        if !self.made {
            fs::create_dir(&self.path)
                .map_err(FleetError::io(format!("cannot make the folder {}", self.path.display())))?;
            self.made = true;
        }
        Ok(())
    }

    /// A new, empty overlay for disk `disk`.
    pub fn overlay(&mut self, disk: usize) -> Result<Arc<File>, FleetError> {
        self.make()?;
        let path = self.path.join(format!("{OVERLAY}{disk}.overlay.{}", self.overlays));
        self.overlays += 1;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        Ok(Arc::new(
            file.map_err(FleetError::io(format!("cannot make the disk overlay {}", path.display())))?,
        ))
    }

    /// Removes the overlays: they were for another VM than it is to be now.
    pub fn clear(&mut self) {
        for path in self.overlay_paths() {
            // It goes with the folder at the latest.
            let _ = fs::remove_file(path);
        }
    }

    fn overlay_paths(&self) -> Vec<PathBuf> {
        if !self.made {
            return Vec::new();
        }
        let all = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let overlays = all.filter(|entry| entry.file_name().to_string_lossy().starts_with(OVERLAY));
        overlays.map(|entry| entry.path()).collect()
    }

    /// Makes the door, for this user alone, and an empty record: the VM is not settled yet. Gives the socket, which does not listen yet.
    pub fn door(&mut self) -> Result<OwnedFd, FleetError> {
        self.make()?;
        let made = || -> io::Result<(OwnedFd, File)> {
            let mut record = File::create(self.path.join(RECORD))?;
            record.write_all(&[b' '; RECORD_ROOM])?;
            let (folder, address) = self.door_address()?;
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            // Of the socket, so that what bind makes has it from the beginning.
            rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
            bind(&socket, &address)?;
            drop(folder);
            Ok((socket, record))
        };
        let (door, record) =
            made().map_err(FleetError::io(format!("cannot make a door in {}", self.path.display())))?;
        self.record = Some(record);
        Ok(door)
    }

    /// The empty record, which has [`RECORD_ROOM`] bytes.
    pub fn take_record(&mut self) -> Option<File> {
        self.record.take()
    }

    /// Knocks at the door; `None`: nobody is behind it.
    pub fn knock(&self) -> io::Result<Option<OwnedFd>> {
        let (_folder, address) = match self.door_address() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(socket)),
            Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// By the folder's descriptor, which must be open meanwhile: a socket's address has room for no more than 107 bytes.
    fn door_address(&self) -> io::Result<(File, SocketAddrUnix)> {
        let folder = File::open(&self.path)?;
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{DOOR}", folder.as_raw_fd()))?;
        Ok((folder, address))
    }
}

impl Drop for VmFolder {
    fn drop(&mut self) {
        if self.made
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "a VM's folder could not be removed");
        }
    }
}

impl VmDisk {
    /// What the worker is told.
    pub fn spec(&self) -> DiskSpec {
        DiskSpec {
            read_only: self.read_only,
            direct: self.direct,
            bytes: self.bytes,
            layers: u8::try_from(self.layers.len()).unwrap_or(u8::MAX),
            serial: self.serial.clone(),
        }
    }

    /// What the worker is handed: base, layers from the lowest, overlay.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let frozen = std::iter::once(&self.base).chain(&self.layers).map(|frozen| frozen.file.as_fd());
        frozen.chain(self.overlay.iter().map(|overlay| overlay.as_fd()))
    }

    /// What is handed over when the overlay is to be frozen, with the overlay that comes after it; `None`: there is nothing to be frozen.
    pub fn next(&self, number: usize, folder: &mut VmFolder) -> Result<Option<Next>, FleetError> {
        let Some(overlay) = &self.overlay else { return Ok(None) };
        let sealed = for_reading(overlay)
            .map_err(FleetError::io("cannot open a disk's overlay for reading; is /proc mounted?"))?;
        Ok(Some(Next { sealed: Arc::new(sealed), overlay: folder.overlay(number)? }))
    }

    /// Takes note that the worker froze the overlay (or had nothing in it) and goes on with `next`. What was open for writing is closed.
    pub fn frozen(&mut self, became_layer: bool, next: Next) {
        if self.overlay.replace(next.overlay).is_some() && became_layer {
            self.layers.push(FrozenFile { file: next.sealed, known: None, foreign: false });
        }
    }

    /// The same without what is written to.
    pub fn without_overlay(&self) -> Self {
        Self { overlay: None, ..self.clone() }
    }
}

/// Whether one more layer may come onto every writable disk.
pub fn check_room_for_a_layer(disks: &[VmDisk]) -> Result<(), FleetError> {
    if let Some(disk) = disks.iter().position(|disk| disk.direct) {
        return Err(FleetError::WrongState(format!(
            "disk {disk} is written directly to its file, so there is nothing that stands still for a snapshot; start the VM without `persist` to take snapshots of it"
        )));
    }
    match disks.iter().position(|disk| !disk.read_only && disk.layers.len() >= LAYERS_MAX) {
        None => Ok(()),
        Some(disk) => Err(FleetError::WrongState(format!(
            "disk {disk} has {LAYERS_MAX} layers from snapshots already, the most there can be; start from the image again"
        ))),
    }
}

/// Links frozen disks into a draft and gives their lines of the manifest. Blocks.
pub fn link_into(draft: &mut Draft, disks: &[VmDisk]) -> Result<Vec<Disk>, StoreError> {
    let mut lines = Vec::with_capacity(disks.len());
    for (n, disk) in disks.iter().enumerate() {
        let base = format!("disk-{n}.base");
        match disk.base.foreign {
            true => draft.copy_disk(&disk.base.file, &base)?,
            false => draft.link_disk(&disk.base.file, &base, disk.base.known.as_ref())?,
        }
        let mut layers = Vec::with_capacity(disk.layers.len());
        for (k, layer) in disk.layers.iter().enumerate() {
            let name = format!("disk-{n}.layer-{k}");
            draft.link_disk(&layer.file, &name, layer.known.as_ref())?;
            layers.push(name);
        }
        let (bytes, read_only, serial) = (disk.bytes, disk.read_only, disk.serial.clone());
        lines.push(Disk { bytes, read_only, serial, base, layers });
    }
    Ok(lines)
}
