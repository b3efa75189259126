//! The files behind a VM's disks: shared base and frozen layers, and the overlay that only this VM writes.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

/// A VM's folder: its overlays. Removed with the VM.
#[derive(Debug)]
pub struct VmFolder {
    id: String,
    path: PathBuf,
    made: bool,
    overlays: u32,
}

impl VmFolder {
    /// The folder of `id` in `vms`. It is made when the first file is.
    pub fn new(vms: &Path, id: &str) -> Self {
        Self { id: id.to_owned(), path: vms.join(id), made: false, overlays: 0 }
    }

    /// The VM's id.
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// A new, empty overlay for disk `disk`.
    pub fn overlay(&mut self, disk: usize) -> Result<Arc<File>, FleetError> {
        if !self.made {
            fs::create_dir(&self.path)
                .map_err(FleetError::io(format!("cannot make the folder {}", self.path.display())))?;
            self.made = true;
        }
        let path = self.path.join(format!("disk-{disk}.overlay.{}", self.overlays));
        self.overlays += 1;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        Ok(Arc::new(
            file.map_err(FleetError::io(format!("cannot make the disk overlay {}", path.display())))?,
        ))
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

    /// Takes note that the worker froze the overlay (or had nothing in it) and goes on with `new`.
    pub fn frozen(&mut self, became_layer: bool, new: Arc<File>) {
        if let Some(old) = self.overlay.replace(new)
            && became_layer
        {
            self.layers.push(FrozenFile { file: old, known: None, foreign: false });
        }
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
