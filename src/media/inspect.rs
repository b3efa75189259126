//! A whole disk looked through: its volumes, what is wrong with its table, and where its kernel is.
//!
//! Used by the boot builder, which wants the root file system, and by imports, which want a kernel and refuse a disk that
//! cannot be whole.

use std::io::{self, Write};

use super::kernel::{self, Look};
use super::partitions::{self, Kind, Scheme, TableError};
use super::ufs::{self, Inode, Ufs, UfsError};
use super::{ReadAt, size};

/// Where a FreeBSD keeps its kernel; a compressed one is unpacked.
const KERNELS: [(&str, bool); 2] = [("/boot/kernel/kernel", false), ("/boot/kernel/kernel.gz", true)];
/// Names of the file system that is most likely the root.
pub const ROOT_NAMES: [&str; 2] = ["rootfs", "root"];

/// A place on a disk that can hold a file system.
pub struct Volume<'a> {
    /// What FreeBSD adds to the disk's name: `p4`, `s1a`; empty: the whole disk.
    pub suffix: String,
    /// For people.
    pub place: String,
    pub kind: Kind,
    /// GPT name.
    pub name: Option<String>,
    pub bytes: u64,
    pub ufs: Option<Ufs<'a>>,
}

/// A disk.
pub struct Inspection<'a> {
    pub scheme: Scheme,
    pub volumes: Vec<Volume<'a>>,
    pub problem: Option<TableError>,
    pub notes: Vec<String>,
}

/// Looks through a disk of `bytes` bytes.
pub fn disk(content: &dyn ReadAt, bytes: u64) -> io::Result<Inspection<'_>> {
    let table = partitions::table(content, bytes)?;
    let mut found =
        Inspection { scheme: table.scheme, volumes: Vec::new(), problem: table.problem, notes: table.notes };
    // A file system on the whole disk may have a loader, and with it an MBR's signature, in its first sector.
    if table.scheme != Scheme::Gpt
        && let Some(ufs) = ufs::open(content, 0, bytes)?
    {
        found.scheme = Scheme::None;
        found.problem = None;
        found.volumes.push(Volume {
            suffix: String::new(),
            place: "whole disk".into(),
            kind: Kind::Ufs,
            name: None,
            bytes,
            ufs: Some(ufs),
        });
        return Ok(found);
    }
    for partition in table.partitions {
        let ufs = match partition.kind {
            Kind::Ufs | Kind::Slice => ufs::open(content, partition.start, partition.bytes)?,
            _ => None,
        };
        found.volumes.push(Volume {
            suffix: partition.suffix,
            place: partition.place,
            kind: partition.kind,
            name: partition.name,
            bytes: partition.bytes,
            ufs,
        });
    }
    Ok(found)
}

impl Volume<'_> {
    /// It bears one of the names by which a root file system is known.
    pub fn is_named(&self, name: &str) -> bool {
        let label = self.ufs.as_ref().and_then(|ufs| ufs.label.as_deref());
        label == Some(name) || self.ufs.is_some() && self.name.as_deref() == Some(name)
    }

    fn describe(&self) -> String {
        let mut text = match self.suffix.as_str() {
            "" => self.place.clone(),
            suffix => format!("{suffix} {}", self.place.rsplit(", ").next().unwrap_or_default()),
        };
        if let Some(ufs) = &self.ufs {
            text += &format!(" (UFS{}", ufs.version);
            if let Some(label) = &ufs.label {
                text += &format!(" \"{label}\"");
            }
            text += ")";
        }
        format!("{text} {}", size(self.bytes))
    }
}

impl Inspection<'_> {
    /// One line about the disk.
    pub fn describe(&self) -> String {
        let volumes: Vec<String> = self.volumes.iter().take(16).map(Volume::describe).collect();
        let scheme = match self.scheme {
            Scheme::Gpt => "GPT: ",
            Scheme::Mbr => "MBR: ",
            Scheme::None if self.volumes.is_empty() => "no partition table and no UFS",
            Scheme::None => "",
        };
        format!("{scheme}{}", volumes.join(", "))
    }

    /// The volumes with a UFS, the likeliest root first.
    pub fn likely_roots(&self) -> Vec<&Volume<'_>> {
        let rank = |volume: &&Volume<'_>| {
            ROOT_NAMES.iter().position(|name| volume.is_named(name)).unwrap_or(ROOT_NAMES.len())
        };
        let mut volumes: Vec<_> = self.volumes.iter().filter(|volume| volume.ufs.is_some()).collect();
        volumes.sort_by_key(rank);
        volumes
    }
}

/// Why no kernel was found.
#[derive(Debug, thiserror::Error)]
pub enum NoKernel {
    #[error(
        "there is no UFS on the disk in which a kernel could be ({0}); give the kernel as a file of its own"
    )]
    NoUfs(String),
    #[error("the disk's root is ZFS, which is not read here; give the kernel as a file of its own")]
    Zfs,
    #[error(
        "there is no /boot/kernel/kernel on the disk ({0} looked through); give the kernel as a file of its own"
    )]
    Missing(String),
    #[error("{path} on {volume}: {source}; give the kernel as a file of its own")]
    Ufs { path: &'static str, volume: String, source: UfsError },
    #[error("{path} on {volume} is {what}")]
    Wrong { path: &'static str, volume: String, what: String },
}

/// A kernel on a disk.
pub struct FoundKernel<'a> {
    pub path: &'static str,
    /// On which volume, for people.
    pub volume: String,
    ufs: Ufs<'a>,
    inode: Inode,
    gzip: bool,
}

/// Finds the kernel of the system on a disk.
pub fn kernel<'a>(disk: &'a Inspection<'a>) -> Result<FoundKernel<'a>, NoKernel> {
    let volumes = disk.likely_roots();
    let name = |volume: &Volume<'_>| match volume.suffix.as_str() {
        "" => "the whole disk".to_owned(),
        suffix => suffix.to_owned(),
    };
    let mut looked = Vec::new();
    for volume in &volumes {
        let Some(ufs) = &volume.ufs else { continue };
        for (path, gzip) in KERNELS {
            let failed = |source| NoKernel::Ufs { path, volume: name(volume), source };
            let Some(inode) = ufs.find(path).map_err(failed)? else { continue };
            let found = FoundKernel { path, volume: name(volume), ufs: ufs.clone(), inode, gzip };
            if !gzip {
                found.check()?;
            }
            return Ok(found);
        }
        looked.push(name(volume));
    }
    if looked.is_empty() {
        return Err(match disk.volumes.iter().any(|volume| volume.kind == Kind::Zfs) {
            true => NoKernel::Zfs,
            false => NoKernel::NoUfs(disk.describe()),
        });
    }
    Err(NoKernel::Missing(looked.join(", ")))
}

impl FoundKernel<'_> {
    /// Bytes of the file as it lies on the disk.
    pub fn stored_bytes(&self) -> u64 {
        self.inode.bytes
    }

    /// Refuses what is no kernel for this processor.
    fn check(&self) -> Result<(), NoKernel> {
        let (path, volume) = (self.path, self.volume.clone());
        let head = match self.ufs.head(&self.inode, kernel::HEAD_BYTES) {
            Ok(head) => head,
            Err(source) => return Err(NoKernel::Ufs { path, volume, source }),
        };
        match kernel::look(&head) {
            Ok(Look::Amd64 | Look::BzImage) => Ok(()),
            Ok(Look::Unknown) => Err(NoKernel::Wrong { path, volume, what: "not an ELF file".into() }),
            Err(what) => Err(NoKernel::Wrong { path, volume, what }),
        }
    }

    /// Hands the kernel's bytes to `each`, in order, unpacked; at most `bytes_max`.
    pub fn read(&self, bytes_max: u64, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut left = bytes_max;
        let mut limited = |piece: &[u8]| match left.checked_sub(piece.len() as u64) {
            Some(less) => {
                left = less;
                each(piece)
            }
            None => Err(io::Error::other(format!("the kernel has more than {bytes_max} bytes"))),
        };
        if !self.gzip {
            return self
                .ufs
                .read(&self.inode, |piece| limited(piece).map_err(Failed))
                .map_err(|f: Failed| f.0);
        }
        let mut decoder = flate2::write::GzDecoder::new(Each(limited));
        self.ufs
            .read(&self.inode, |piece| decoder.write_all(piece).map_err(Failed))
            .map_err(|failed: Failed| failed.0)?;
        decoder.finish().map(|_| ())
    }
}

/// An error on the way through [`Ufs::read`].
struct Failed(io::Error);

impl From<UfsError> for Failed {
    fn from(error: UfsError) -> Self {
        Failed(match error {
            UfsError::Io(error) => error,
            other => io::Error::other(other),
        })
    }
}

/// A closure as a place to write to.
struct Each<F>(F);

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Each<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.0)(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
