//! Finding a FreeBSD root file system on the disks, so that `vfs.root.mountfrom` need not be written by hand.
//!
//! What is on the disks is read by [`crate::media`]; here is the choice. Facts: FreeBSD's `sys/geom/label` (when
//! /dev/ufs/LABEL and /dev/gpt/NAME appear), `sys/kern/vfs_mountroot.c`.
//!
//! Order of preference: a UFS labelled "rootfs" or "root" (its own label, or its GPT partition's name), then other UFS volumes:
//! GPT freebsd-ufs partitions, MBR slices and the BSD partitions in them, a bare file system; disks in their order.

use super::DiskView;
use crate::media::inspect::{self, ROOT_NAMES, Volume};
use crate::media::partitions::Kind;

/// The answer: what to mount, and lines for people.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub mount_from: Option<String>,
    pub choices: Vec<String>,
}

/// A place where a UFS is.
struct Candidate {
    device: String,
    place: String,
    version: u8,
    /// /dev/ufs/LABEL.
    label: Option<String>,
    /// /dev/gpt/NAME.
    name: Option<String>,
    read_only: bool,
}

impl Candidate {
    fn new(disk: &str, volume: Volume<'_>, read_only: bool) -> Option<Self> {
        let ufs = volume.ufs?;
        Some(Candidate {
            device: format!("{disk}{}", volume.suffix),
            place: volume.place,
            version: ufs.version,
            label: ufs.label,
            name: volume.name,
            read_only,
        })
    }

    fn is_named(&self, name: &str) -> bool {
        self.label.as_deref() == Some(name) || self.name.as_deref() == Some(name)
    }
}

/// Looks for a root file system on `disks`.
pub fn find_root(disks: &[DiskView]) -> Found {
    let mut candidates = Vec::new();
    let mut zfs = None;
    let mut choices = Vec::new();
    for (unit, disk) in disks.iter().enumerate() {
        let name = format!("vtbd{unit}");
        let found = match inspect::disk(disk.content, disk.bytes) {
            Ok(found) => found,
            Err(error) => {
                choices.push(format!("root: {name} cannot be read: {error}"));
                continue;
            }
        };
        choices.extend(found.problem.map(|problem| format!("root: {name}: {problem}")));
        choices.extend(found.notes.into_iter().map(|note| format!("root: {name}: {note}")));
        for volume in found.volumes {
            if volume.kind == Kind::Zfs {
                zfs.get_or_insert(format!("{name}{}", volume.suffix));
            }
            candidates.extend(Candidate::new(&name, volume, disk.read_only));
        }
    }
    let named = |name: &&str| candidates.iter().position(|candidate| candidate.is_named(name));
    let chosen = ROOT_NAMES.iter().find_map(named).unwrap_or(0);
    let Some(candidate) = candidates.get(chosen) else {
        choices.push(match zfs {
            Some(device) => format!(
                "root: none chosen; {device} is ZFS: name the dataset with vfs.root.mountfrom=zfs:POOL/ROOT/default"
            ),
            None if disks.is_empty() => "root: no disk, no memory disk; the kernel must bring its own".into(),
            None => "root: no UFS found on the disks; name it with vfs.root.mountfrom=TYPE:DEVICE".into(),
        });
        return Found { mount_from: None, choices };
    };
    // Two providers of one name: which of them gets it is chance.
    let unique = |of: fn(&Candidate) -> &Option<String>| {
        let name = of(candidate).as_deref()?;
        let same = candidates.iter().filter(|other| of(other).as_deref() == Some(name));
        (same.count() == 1).then_some(name)
    };
    let mount_from = match (unique(|candidate| &candidate.label), unique(|candidate| &candidate.name)) {
        (Some(label), _) => format!("ufs:/dev/ufs/{label}"),
        (None, Some(name)) => format!("ufs:/dev/gpt/{name}"),
        (None, None) => format!("ufs:/dev/{}", candidate.device),
    };
    let named = candidate.label.is_some() || candidate.name.is_some();
    let device = if named { format!(", {}", candidate.device) } else { String::new() };
    let read_only = if candidate.read_only { ", read-only disk" } else { "" };
    let version = candidate.version;
    choices.push(format!("root: {mount_from} ({}, UFS{version}{device}{read_only})", candidate.place));
    let others: Vec<_> =
        candidates.iter().enumerate().filter(|(i, _)| *i != chosen).map(|(_, c)| c.device.as_str()).collect();
    if !others.is_empty() {
        choices.push(format!("root: also UFS, not chosen: {}", others.join(", ")));
    }
    Found { mount_from: Some(mount_from), choices }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
