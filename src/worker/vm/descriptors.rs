//! What a request's descriptors are: files of disks, sockets, links.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::snapshot::layers::LayeredDisk;
use crate::vmm::machine::{self, DiskPart, NetworkPart, NextOverlay};
use crate::vmm::virtio::net::NetConfig;
use crate::vmm::virtio::net::link::Link;
use crate::worker::fault;
use crate::worker::keep::{self, DiskFiles};
use crate::worker::protocol::{DISKS_MAX, DiskSpec, Fault, LAYERS_MAX, LinkKind, NETWORKS_MAX, NetworkSpec};

/// A network interface that can be made again.
pub(super) struct Plug {
    pub(super) spec: NetworkSpec,
    pub(super) fd: Option<OwnedFd>,
}

impl Plug {
    /// The same interface, without a link if that has gone meanwhile: a guest can reboot all the same.
    pub(super) fn checked(self) -> Plug {
        match self.part() {
            Ok(_) => self,
            Err(fault) => {
                tracing::warn!(%fault, "a network interface has lost its link");
                Plug { fd: None, ..self }
            }
        }
    }

    pub(super) fn part(&self) -> Result<NetworkPart, Fault> {
        let NetworkSpec { link, mac, mtu } = self.spec;
        let fd = self.fd.as_ref().map(OwnedFd::try_clone).transpose();
        let link = plug(link, fd.map_err(fault::io("a network link"))?)?;
        Ok(NetworkPart { link, config: Some(NetConfig { mac, mtu }) })
    }
}

pub(super) fn plug(kind: LinkKind, fd: Option<OwnedFd>) -> Result<Link, Fault> {
    Ok(match (kind, fd) {
        (LinkKind::Tap, Some(fd)) => Link::tap(fd)?,
        (LinkKind::Wire, Some(fd)) => Link::wire(fd)?,
        _ => Link::Down,
    })
}

/// A request's descriptors, taken in the order of its message.
pub(super) struct Descriptors {
    fds: std::vec::IntoIter<OwnedFd>,
    /// Second descriptors of the disks' files that were taken.
    files: Vec<DiskFiles>,
}

impl Descriptors {
    pub(super) fn new(fds: Vec<OwnedFd>) -> Self {
        Descriptors { fds: fds.into_iter(), files: Vec::new() }
    }

    pub(super) fn next(&mut self) -> Result<OwnedFd, Fault> {
        self.fds.next().ok_or_else(|| fault::descriptors("too few"))
    }

    pub(super) fn file(&mut self) -> Result<File, Fault> {
        self.next().map(File::from)
    }

    pub(super) fn socket(&mut self) -> Result<UnixStream, Fault> {
        let socket = UnixStream::from(self.next()?);
        socket.set_nonblocking(true).map_err(fault::io("a console or agent socket"))?;
        Ok(socket)
    }

    pub(super) fn disks(&mut self, specs: &[DiskSpec]) -> Result<Vec<DiskPart>, Fault> {
        if specs.len() > DISKS_MAX {
            return Err(Fault::from(machine::MachineError::Disks(specs.len())));
        }
        specs.iter().map(|spec| self.disk(spec)).collect()
    }

    pub(super) fn disk(&mut self, spec: &DiskSpec) -> Result<DiskPart, Fault> {
        if usize::from(spec.layers) > LAYERS_MAX {
            return Err(fault::descriptors("too many disk layers"));
        }
        let base = self.file()?;
        let layers = (0..spec.layers).map(|_| self.file()).collect::<Result<Vec<_>, _>>()?;
        let mut kept = DiskFiles { spec: spec.clone(), files: Vec::with_capacity(layers.len() + 2) };
        kept.add(&base)?;
        layers.iter().try_for_each(|layer| kept.add(layer))?;
        let disk = if spec.direct {
            if spec.layers != 0 || spec.read_only {
                return Err(fault::descriptors(
                    "a disk that is written directly, but has layers or is read-only",
                ));
            }
            LayeredDisk::open_direct(base, spec.bytes)?
        } else {
            let overlay = if spec.read_only { None } else { Some(self.file()?) };
            overlay.iter().try_for_each(|overlay| kept.add(overlay))?;
            LayeredDisk::open(Some(base), layers, overlay, spec.bytes)?
        };
        self.files.push(kept);
        Ok(DiskPart { disk, serial: spec.serial.clone() })
    }

    /// All that is left: what frozen disks go on with, and second descriptors of that.
    pub(super) fn next_overlays(mut self) -> Result<(Vec<NextOverlay>, Vec<keep::Next>), Fault> {
        let (mut next, mut kept) = (Vec::new(), Vec::new());
        while !self.fds.as_slice().is_empty() {
            let (sealed, overlay) = (self.file()?, self.file()?);
            let second =
                |file: &File| file.try_clone().map(OwnedFd::from).map_err(fault::io("a disk's overlay"));
            kept.push(keep::Next { sealed: second(&sealed)?, overlay: second(&overlay)? });
            next.push(NextOverlay { sealed, overlay });
        }
        Ok((next, kept))
    }

    /// One for each of `kinds` that has a link.
    pub(super) fn links(&mut self, kinds: &[LinkKind]) -> Result<Vec<Option<OwnedFd>>, Fault> {
        if kinds.len() > NETWORKS_MAX {
            return Err(Fault::from(machine::MachineError::Networks(kinds.len())));
        }
        let link = |kind: &LinkKind| match kind {
            LinkKind::Down => Ok(None),
            LinkKind::Tap | LinkKind::Wire => self.next().map(Some),
        };
        kinds.iter().map(link).collect()
    }

    pub(super) fn plugs(&mut self, specs: &[NetworkSpec]) -> Result<Vec<Plug>, Fault> {
        let kinds: Vec<LinkKind> = specs.iter().map(|spec| spec.link).collect();
        let links = self.links(&kinds)?.into_iter();
        Ok(specs.iter().zip(links).map(|(spec, fd)| Plug { spec: *spec, fd }).collect())
    }

    /// Nothing is left; gives what the disks are made of.
    pub(super) fn end(mut self) -> Result<Vec<DiskFiles>, Fault> {
        match self.fds.next() {
            None => Ok(self.files),
            Some(_) => Err(fault::descriptors("too many")),
        }
    }
}
