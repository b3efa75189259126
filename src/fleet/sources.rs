//! Snapshots that are open: everything that clones are made of.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::addresses::Given;
use super::disks::{FrozenFile, VmDisk, VmFolder};
use super::error::FleetError;
use super::keeping::Keeping;
use super::learning::Learning;
use super::limits::{FOLD_BYTES_MAX, OPEN_SNAPSHOTS_MAX};
use super::network::{LinkRequest, VmNetwork, mac_from_text};
use crate::agent::{FrameDecoder, Hello};
use crate::snapshot::manifest::{HostFacts, Network, Protocol, Refusal};
use crate::snapshot::memory::pager::PagerSource;
use crate::snapshot::store::{OpenSnapshot, Snapshot};
use crate::snapshot::working_set::WorkingSet;
use crate::worker::protocol::{BootProtocol, HostReport};

/// Label under which the agent's hello is kept, in hexadecimal.
pub(super) const HELLO_LABEL: &str = "coldspark.agent.hello";

/// What is open, by snapshots' ids.
#[derive(Debug)]
pub(super) struct Opened<S>(Mutex<HashMap<String, Arc<S>>>);

impl<S> Opened<S> {
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    pub fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<S>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what was opened, unless its snapshot was deleted meanwhile: its files would be held, and nobody would ever come for them. Who
    /// deletes it takes it out of here when it `is_there` no more. Gives which one is kept no longer, where there were too many.
    pub fn keep(&self, id: String, source: &Arc<S>, is_there: impl FnOnce(&str) -> bool) -> Option<String> {
        let given_up = {
            let mut sources = self.lock();
            let is_full = sources.len() >= OPEN_SNAPSHOTS_MAX && !sources.contains_key(&id);
            let any = sources.keys().next().filter(|_| is_full).cloned();
            if let Some(any) = &any {
                sources.remove(any);
            }
            sources.insert(id.clone(), Arc::clone(source));
            any
        };
        if !is_there(&id) {
            self.lock().remove(&id);
        }
        given_up
    }
}

/// Everything that a clone needs, opened once.
#[derive(Debug)]
pub struct Source {
    pub open: Arc<OpenSnapshot>,
    pub protocol: BootProtocol,
    pub hello: Option<Arc<Hello>>,
    /// For the pager.
    pub pages: Arc<PagerSource>,
    /// Without overlays.
    disks: Vec<VmDisk>,
    /// Without links.
    pub networks: Vec<VmNetwork>,
    /// What its clones touch first.
    pub learning: Learning,
    pub keeping: Keeping,
    /// Why this host cannot run it, if so; looked at once.
    fits: OnceLock<Option<Refusal>>,
}

impl Source {
    pub(super) fn open(snapshot: &Snapshot, working_sets: bool) -> Result<Self, FleetError> {
        let open = snapshot.open_for_restore()?;
        let manifest = &open.manifest;
        let mut disks = Vec::with_capacity(open.disks.len());
        for (facts, files) in manifest.facts.disks.iter().zip(&open.disks) {
            let frozen = |name: &String, file: &std::fs::File| -> Result<FrozenFile, FleetError> {
                let file =
                    file.try_clone().map_err(FleetError::io("cannot duplicate a disk's descriptor"))?;
                let known = manifest.disk_file(name).cloned();
                Ok(FrozenFile { file: Arc::new(file), known, foreign: false })
            };
            let layers = facts.layers.iter().zip(&files.layers);
            disks.push(VmDisk {
                read_only: facts.read_only,
                direct: false,
                bytes: facts.bytes,
                serial: facts.serial.clone(),
                base: frozen(&facts.base, &files.base)?,
                layers: layers.map(|(name, file)| frozen(name, file)).collect::<Result<_, _>>()?,
                overlay: None,
            });
        }
        let networks = manifest.facts.networks.iter().map(stored_network).collect::<Result<_, _>>()?;
        let protocol = protocol(manifest.facts.guest.protocol);
        let hello = match manifest.facts.identity.agent {
            true => Some(Arc::new(stored_hello(&manifest.facts.labels)?)),
            false => None,
        };
        let pages = open
            .pager_source()
            .map_err(|error| FleetError::Store { cause: error.cause(), message: error.to_string() })?;
        let known = || {
            snapshot.working_set().unwrap_or_else(|error| {
                tracing::warn!(%error, "a working set is learnt anew");
                WorkingSet::default()
            })
        };
        let learning = Learning::new(working_sets.then(known), manifest.facts.memory.file_bytes());
        Ok(Self {
            open,
            protocol,
            hello,
            pages,
            disks,
            networks,
            learning,
            keeping: Keeping::default(),
            fits: OnceLock::new(),
        })
    }

    /// By what metrics tell it from others: its name, or its id.
    pub fn label(&self) -> &str {
        let facts = &self.open.manifest.facts;
        facts.name.as_deref().unwrap_or(self.open.manifest.id.as_str())
    }

    /// The snapshot's id.
    pub fn id(&self) -> String {
        self.open.manifest.id.to_string()
    }

    /// Refuses a host that lacks what the guest was shown.
    pub fn check_fits(&self, host: &HostReport) -> Result<(), FleetError> {
        let refusal = self.fits.get_or_init(|| {
            let host = HostFacts {
                cpu_vendor: host.cpu_vendor.clone(),
                cpu_features: host.cpu_features.iter().cloned().collect(),
                ..HostFacts::default()
            };
            self.open.manifest.facts.fits(&host).err()
        });
        match refusal {
            None => Ok(()),
            Some(refusal) => Err(FleetError::WrongState(format!(
                "the snapshot cannot run on this host: it {refusal}; clone it on a host like the one it was made on"
            ))),
        }
    }

    /// Puts the memory into the page cache in large folios; a failure only makes clones slower.
    pub(super) fn fold(&self) {
        if let Err(error) = self.open.fold(&self.learning.learnt().pieces, FOLD_BYTES_MAX) {
            tracing::debug!(%error, "a snapshot's memory was not folded");
        }
    }

    /// The disks of one clone, with overlays in `folder`.
    pub fn disks(&self, folder: &mut VmFolder) -> Result<Vec<VmDisk>, FleetError> {
        let mut disks = self.disks.clone();
        for (n, disk) in disks.iter_mut().enumerate().filter(|(_, disk)| !disk.read_only) {
            disk.overlay = Some(folder.overlay(n)?);
        }
        Ok(disks)
    }
}

/// An interface of a snapshot's guest, which has no link until a clone is given one.
fn stored_network(network: &Network) -> Result<VmNetwork, FleetError> {
    let mac = mac_from_text(&network.mac).ok_or_else(|| FleetError::Store {
        cause: crate::snapshot::cause::Cause::Damaged,
        message: format!("the snapshot's manifest has an address {:?}; take the snapshot again", network.mac),
    })?;
    Ok(VmNetwork { link: LinkRequest::Down, mac, mtu: network.mtu, given: Given::default() })
}

pub(super) fn protocol(protocol: Protocol) -> BootProtocol {
    match protocol {
        Protocol::FreeBsd => BootProtocol::FreeBsd,
        Protocol::Pvh => BootProtocol::Pvh,
        Protocol::Linux => BootProtocol::Linux,
    }
}

/// The hello that was said before the snapshot was taken.
pub(super) fn stored_hello(labels: &BTreeMap<String, String>) -> Result<Hello, FleetError> {
    let damaged = || FleetError::Store {
        cause: crate::snapshot::cause::Cause::Damaged,
        message: format!(
            "the snapshot's label {HELLO_LABEL} does not hold an agent's hello; take the snapshot again"
        ),
    };
    let text = labels.get(HELLO_LABEL).ok_or_else(damaged)?;
    hello_from_text(text).ok_or_else(damaged)
}

/// What [`hello_text`] made.
pub(super) fn hello_from_text(text: &str) -> Option<Hello> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
    let bytes: Vec<u8> =
        digits?.chunks(2).map(|pair| pair.iter().fold(0u8, |byte, digit| byte << 4 | digit)).collect();
    let frames = FrameDecoder::new().push(&bytes).ok()?;
    Hello::decode(frames.first()?).ok()
}

/// A hello's frame in hexadecimal.
pub(super) fn hello_text(hello: &Hello) -> Result<String, FleetError> {
    let bytes = hello.encode().map_err(|error| FleetError::Internal(error.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
