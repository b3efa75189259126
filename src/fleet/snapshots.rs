//! Snapshots: freezing a VM into the store, finding what is there, and holding files open for clones.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::Fleet;
use super::boot::{micros, step};
use super::claims::Claim;
use super::disks::link_into;
use super::error::FleetError;
use super::events::{Change, Event, Kind};
use super::keeping::KeptSoFar;
use super::limits::VERIFIES_MAX;
use super::network::mac_text;
use super::sources::{HELLO_LABEL, Opened, Source, hello_text, protocol};
use super::tasks::{blocking, to_its_end};
use super::vm::{Command, FrozenVm, Origin, State, Vm};
use crate::snapshot::manifest::{Cpu, Facts, Guest, Identity, Memory, Network, Protocol, Region, SnapshotId};
pub use crate::snapshot::signing;
use crate::snapshot::signing::{Signature, Signing};
use crate::snapshot::store::{Draft, Listed, Snapshot, SnapshotStore, StoreError};
pub use crate::snapshot::working_set::WorkingSet;
use crate::telemetry::metrics;
use crate::worker::protocol::{BootProtocol, Frozen, Step};

/// Label of a snapshot that was made for a function, with the function's name, and the mark of the service whose function it is.
const FUNCTION_LABEL: &str = "coldspark.function";

impl From<StoreError> for FleetError {
    fn from(error: StoreError) -> Self {
        Self::Store { cause: error.cause(), message: error.to_string() }
    }
}

/// A snapshot to be taken.
#[derive(Debug, Clone)]
pub struct CreateSnapshot {
    /// Id or name.
    pub vm: String,
    pub name: Option<String>,
    pub stop_after: bool,
    /// The function that it is made for.
    pub function: Option<String>,
    /// The request, if it has an id.
    pub claim: Option<Claim>,
}

impl CreateSnapshot {
    /// What the manifest says of the request, by the service with this mark.
    fn labels(&self, mark: &str) -> BTreeMap<String, String> {
        let function = self.function.as_ref();
        let function = function.map(|function| (FUNCTION_LABEL.to_owned(), format!("{function} {mark}")));
        let claim = self.claim.as_ref().map(|claim| claim.label(mark));
        function.into_iter().chain(claim).collect()
    }
}

/// A snapshot that was taken.
#[derive(Debug)]
pub struct Taken {
    pub snapshot: Described,
    pub pause_us: u64,
    pub total_us: u64,
    pub steps: Vec<Step>,
}

/// A published snapshot, for listing.
#[derive(Debug, Clone)]
pub struct Described {
    pub id: String,
    pub name: Option<String>,
    pub created_unix_ms: u64,
    pub parent: Option<String>,
    pub kernel: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub stored_bytes: u64,
    pub protocol: BootProtocol,
    pub agent: bool,
    pub disks: u32,
    pub cpu_vendor: String,
    pub tsc_khz: u32,
    /// `None`: it is not signed.
    pub signed: Option<Signed>,
    pub working_set: WorkingSet,
    /// The working set in the page cache.
    pub kept: KeptSoFar,
}

/// A snapshot's signature, as far as this service knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// Whose it is; `Err`: why it is nobody's.
    pub key: Result<String, String>,
    /// What the key is called here.
    pub name: Option<String>,
    /// It is one of the trusted keys.
    pub trusted: bool,
}

impl Signed {
    fn of(signature: &Signature, signing: &Signing) -> Option<Self> {
        match signature {
            Signature::None => None,
            Signature::Wrong(problem) => Some(Self { key: Err(problem.clone()), name: None, trusted: false }),
            Signature::By(key) => Some(Self {
                key: Ok(key.to_string()),
                name: signing.name_of(*key).map(str::to_owned),
                trusted: signing.trusted.as_ref().is_some_and(|trusted| trusted.name_of(*key).is_some()),
            }),
        }
    }
}

/// What is in the store.
#[derive(Debug)]
pub struct Listing {
    pub whole: Vec<Described>,
    /// Id and problem.
    pub damaged: Vec<(String, String)>,
}

/// The store, and the open files of the snapshots that clones are made of.
#[derive(Debug)]
pub struct Snapshots {
    pub(super) store: Arc<SnapshotStore>,
    /// Tells what was made here from what was brought here: a label is believed of the former only.
    pub(super) mark: String,
    sources: Opened<Source>,
    /// Learn them, and use them.
    working_sets: bool,
    /// A permit for each that may be read through at a time.
    verifying: Arc<Semaphore>,
}

/// Reads sizes from the disk.
pub(super) fn describe(snapshot: &Snapshot, signing: &Signing) -> Result<Described, FleetError> {
    let manifest = snapshot.manifest();
    let facts = &manifest.facts;
    Ok(Described {
        id: snapshot.id().to_string(),
        name: facts.name.clone(),
        created_unix_ms: unix_ms(&manifest.created).unwrap_or_default(),
        parent: facts.parent.as_ref().map(|id| id.to_string()),
        kernel: facts.guest.kernel.clone(),
        vcpus: facts.vcpus,
        memory_bytes: facts.memory.bytes,
        stored_bytes: snapshot.disk_usage_bytes()?,
        protocol: protocol(facts.guest.protocol),
        agent: facts.identity.agent,
        disks: u32::try_from(facts.disks.len()).unwrap_or(u32::MAX),
        cpu_vendor: facts.cpu.vendor.clone(),
        tsc_khz: facts.cpu.tsc_khz,
        signed: Signed::of(snapshot.signature(), signing),
        // One that cannot be read is learnt anew.
        working_set: snapshot.working_set().unwrap_or_default(),
        kept: KeptSoFar::default(),
    })
}

/// A manifest's `2026-11-22T12:00:00Z` in Unix milliseconds.
pub(super) fn unix_ms(text: &str) -> Option<u64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    // Days since 1970-03-01 of the proleptic Gregorian calendar, years beginning in March.
    let (years, months) = if month > 2 { (year, month - 3) } else { (year.checked_sub(1)?, month + 9) };
    let days = 365 * years + years / 4 - years / 100 + years / 400 + (153 * months + 2) / 5 + day;
    let days = days.checked_sub(719_469)?; // of 1970-01-01, counted the same way
    Some((((days * 24 + hour) * 60 + minute) * 60 + second) * 1000)
}

impl Snapshots {
    pub fn open(path: &Path, working_sets: bool, signing: Signing, mark: String) -> Result<Self, FleetError> {
        let store = Arc::new(SnapshotStore::open(path, signing)?);
        let verifying = Arc::new(Semaphore::new(VERIFIES_MAX));
        Ok(Self { store, mark, sources: Opened::new(), working_sets, verifying })
    }

    /// The open files of a snapshot, by id or name.
    pub async fn source(&self, id_or_name: &str) -> Result<Arc<Source>, FleetError> {
        let snapshot = self.store.get(id_or_name)?;
        let id = snapshot.id().to_string();
        if let Some(source) = self.lock().get(&id) {
            return Ok(Arc::clone(source));
        }
        let working_sets = self.working_sets;
        let source = Arc::new(blocking(move || Source::open(&snapshot, working_sets)).await??);
        self.keep(id, &source);
        let folding = Arc::clone(&source);
        tokio::task::spawn_blocking(move || folding.fold());
        Ok(source)
    }

    /// Those that are open.
    pub(super) fn sources(&self) -> Vec<Arc<Source>> {
        self.lock().values().cloned().collect()
    }

    /// How the snapshot's working set is kept, if it is open.
    fn kept(&self, id: &str) -> KeptSoFar {
        self.lock().get(id).map(|source| source.keeping.so_far()).unwrap_or_default()
    }

    /// A snapshot of the store, by id or name.
    pub(super) fn published(&self, id_or_name: &str) -> Result<Arc<Snapshot>, FleetError> {
        Ok(self.store.get(id_or_name)?)
    }

    /// Ids of the snapshots that were made here for functions, with the functions' names.
    pub(super) fn of_functions(&self) -> Vec<(String, String)> {
        let whole = self.store.list().into_iter().filter_map(|listed| match listed {
            Listed::Whole(snapshot) => Some(snapshot),
            Listed::Damaged { .. } => None,
        });
        let labelled = whole.filter_map(|snapshot| {
            let label = snapshot.manifest().facts.labels.get(FUNCTION_LABEL)?;
            let (function, mark) = label.split_once(' ')?;
            (mark == self.mark).then(|| (snapshot.id().to_string(), function.to_owned()))
        });
        labelled.collect()
    }

    fn keep(&self, id: String, source: &Arc<Source>) {
        let given_up = self.sources.keep(id, source, |id| self.store.get(id).is_ok());
        // Those who run from it have it open by themselves.
        if let Some(Ok(snapshot)) = given_up.map(|id| self.store.get(&id)) {
            snapshot.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Source>>> {
        self.sources.lock()
    }
}

/// By what metrics tell a snapshot from others, whether or not it is open.
fn label_of(snapshot: &Snapshot) -> String {
    snapshot.name().map_or_else(|| snapshot.id().to_string(), str::to_owned)
}

impl Fleet {
    /// Takes a snapshot. The work goes on to its end even if the caller goes away.
    pub async fn create_snapshot(self: &Arc<Self>, request: CreateSnapshot) -> Result<Taken, FleetError> {
        let fleet = Arc::clone(self);
        to_its_end(async move { fleet.take_snapshot(request).await }).await
    }

    async fn take_snapshot(&self, request: CreateSnapshot) -> Result<Taken, FleetError> {
        let arrived = Instant::now();
        let labels = request.labels(&self.snapshots.mark);
        let vm = self.vm(&request.vm)?;
        let store = Arc::clone(&self.snapshots.store);
        if let Some(name) = &request.name {
            super::id::check_name("a snapshot", name)?;
            store.check_name(name)?;
        }
        let before = vm.state();
        let draft = blocking(move || store.begin(SnapshotId::random())).await??;
        let (draft, stop_after) = (Box::new(draft), request.stop_after);
        let frozen = vm.command(|answer| Command::Freeze { draft, stop_after, answer }).await?;
        let mut steps = vec![step("freeze", micros(arrived))];
        steps.extend(frozen.frozen.steps.iter().take(64).map(|inner| Step {
            name: format!("freeze/{}", inner.name.chars().take(40).collect::<String>()),
            us: inner.us,
        }));
        let pause_us = frozen.frozen.pause_us;
        metrics().snapshot_paused(Duration::from_micros(pause_us));
        let publishing = Instant::now();
        match self.publish(&vm, frozen, request.name, labels).await {
            Ok((snapshot, source)) => {
                self.events.tell(|| {
                    Event::new(Kind::Snapshot, Change::Made, &snapshot.id, snapshot.name.as_deref())
                });
                steps.push(step("publish", micros(publishing)));
                if let Some(source) = source {
                    self.snapshots.keep(snapshot.id.clone(), &source);
                }
                if stop_after {
                    let reason = format!("stopped after its snapshot {}", snapshot.id);
                    let _ = vm.commands.send(Command::Stop(reason)).await;
                    vm.ended().await;
                }
                Ok(Taken { snapshot, pause_us, total_us: micros(arrived), steps })
            }
            Err(error) => {
                if stop_after && before != State::Paused {
                    // It was to end, but now it is all there is.
                    vm.resume().await?;
                }
                Err(error)
            }
        }
    }

    async fn publish(
        &self,
        vm: &Arc<Vm>,
        frozen: FrozenVm,
        name: Option<String>,
        labels: BTreeMap<String, String>,
    ) -> Result<(Described, Option<Arc<Source>>), FleetError> {
        let FrozenVm { mut draft, frozen, disks } = frozen;
        let (vm, working_sets) = (Arc::clone(vm), self.snapshots.working_sets);
        let store = Arc::clone(&self.snapshots.store);
        blocking(move || {
            let lines = link_into(&mut draft, &disks)?;
            let facts = facts(&vm, &frozen, name, labels, lines)?;
            let draft: Draft = *draft;
            let snapshot = draft.publish(facts).inspect_err(|error| {
                if matches!(error, StoreError::StillWritten { .. }) {
                    tracing::error!(vm = %vm.id, pid = vm.process.pid(), %error, "the worker of this VM is not to be trusted");
                }
            })?;
            // It is published: what cannot be opened now may be when it is cloned.
            let source = Source::open(&snapshot, working_sets).map(Arc::new).inspect_err(|error| {
                tracing::warn!(%error, snapshot = %snapshot.id(), "a new snapshot cannot be opened yet");
            });
            if let Ok(source) = &source {
                source.fold();
            }
            Ok((describe(&snapshot, store.signing())?, source.ok()))
        })
        .await?
    }

    /// Everything in the store, oldest first.
    pub async fn list_snapshots(&self) -> Result<Listing, FleetError> {
        let store = Arc::clone(&self.snapshots.store);
        let mut listing = blocking(move || {
            let mut listing = Listing { whole: Vec::new(), damaged: Vec::new() };
            for listed in store.list() {
                match listed {
                    // One that is deleted just now has no sizes any more.
                    Listed::Whole(snapshot) => {
                        listing.whole.extend(describe(&snapshot, store.signing()).ok())
                    }
                    Listed::Damaged { id, problem } => listing.damaged.push((id.to_string(), problem)),
                }
            }
            listing.whole.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
            listing
        })
        .await?;
        for described in &mut listing.whole {
            described.kept = self.snapshots.kept(&described.id);
        }
        Ok(listing)
    }

    /// One snapshot, by id or name.
    pub async fn snapshot(&self, id_or_name: &str) -> Result<Described, FleetError> {
        let snapshot = self.snapshots.store.get(id_or_name)?;
        let store = Arc::clone(&self.snapshots.store);
        let mut described = blocking(move || describe(&snapshot, store.signing())).await??;
        described.kept = self.snapshots.kept(&described.id);
        Ok(described)
    }

    /// Removes a snapshot; clones keep what they have. One that a pool is made of is refused. What has begun is done, whether its caller waits or not.
    pub async fn delete_snapshot(self: &Arc<Self>, id_or_name: &str) -> Result<(), FleetError> {
        let (fleet, key) = (Arc::clone(self), id_or_name.to_owned());
        to_its_end(async move { fleet.remove_snapshot(&key).await }).await
    }

    async fn remove_snapshot(&self, id_or_name: &str) -> Result<(), FleetError> {
        // A damaged one can be removed too.
        let found = self.snapshots.store.get(id_or_name).ok();
        if let Some(pool) = found.as_ref().and_then(|snapshot| self.pools.of(&snapshot.id().to_string())) {
            return Err(FleetError::WrongState(format!(
                "the pool {0} is made of this snapshot; give it another (`coldspark pool set {0} --snapshot S`) or delete it first",
                pool.name
            )));
        }
        let (store, key) = (Arc::clone(&self.snapshots.store), id_or_name.to_owned());
        let id = blocking(move || store.delete(&key)).await??;
        let open = self.snapshots.lock().remove(id.as_str());
        // Also of one whose files were closed, as nothing used them any more.
        let label = found.map(|snapshot| label_of(&snapshot));
        if let Some(label) = label.or_else(|| open.map(|source| source.label().to_owned())) {
            metrics().forget_snapshot(&label);
        }
        self.shells.forget(id.as_str());
        self.events.tell(|| Event::new(Kind::Snapshot, Change::Gone, id.as_str(), None));
        Ok(())
    }

    /// Reads and compares all of a snapshot; gives the bytes read, and who has signed it.
    pub async fn verify_snapshot(&self, id_or_name: &str) -> Result<(u64, Option<Signed>), FleetError> {
        let (store, key) = (Arc::clone(&self.snapshots.store), id_or_name.to_owned());
        let signing = store.signing().clone();
        // Whoever may look may ask for this, and a caller that goes away does not end it.
        let turn = Arc::clone(&self.snapshots.verifying).acquire_owned().await;
        let verified = blocking(move || {
            let _turn = turn;
            store.verify(&key)
        });
        let (verified, signature) = verified.await??;
        Ok((verified.bytes, Signed::of(&signature, &signing)))
    }
}

/// What the manifest says.
fn facts(
    vm: &Vm,
    frozen: &Frozen,
    name: Option<String>,
    mut labels: BTreeMap<String, String>,
    disks: Vec<crate::snapshot::manifest::Disk>,
) -> Result<Facts, FleetError> {
    let hello = vm.agent.hello();
    if let Some(hello) = &hello {
        labels.insert(HELLO_LABEL.to_owned(), hello_text(hello)?);
    }
    let parent = match &vm.origin {
        Origin::Snapshot(id) => id.parse().ok(),
        _ => None,
    };
    let entered_by = match frozen.protocol {
        // A clone's worker does not know.
        BootProtocol::Auto => vm.status().protocol.unwrap_or(BootProtocol::Auto),
        known => known,
    };
    let protocol = match entered_by {
        BootProtocol::FreeBsd => Protocol::FreeBsd,
        BootProtocol::Pvh => Protocol::Pvh,
        BootProtocol::Linux => Protocol::Linux,
        BootProtocol::Auto => return Err(FleetError::WorkerConfused),
    };
    let regions: Vec<Region> = frozen
        .regions
        .iter()
        .map(|region| Region {
            guest_address: region.guest_address,
            bytes: region.bytes,
            file_offset: region.file_offset,
        })
        .collect();
    let bytes = regions.iter().try_fold(0u64, |sum, region| sum.checked_add(region.bytes));
    Ok(Facts {
        name,
        labels,
        guest: Guest { kernel: vm.kernel.clone(), protocol, ready: vm.ready.clone() },
        vcpus: frozen.vcpus,
        memory: Memory { bytes: bytes.ok_or(FleetError::WorkerConfused)?, regions },
        cpu: Cpu {
            vendor: frozen.cpu_vendor.clone(),
            features: frozen.cpu_features.clone(),
            tsc_khz: frozen.tsc_khz,
        },
        kvm_capabilities: Vec::new(),
        parent,
        identity: Identity { agent: hello.is_some() },
        devices: frozen.devices.clone(),
        networks: vm
            .networks()
            .iter()
            .map(|network| Network { mac: mac_text(&network.mac), mtu: network.mtu })
            .collect(),
        disks,
    })
}

#[cfg(test)]
#[path = "snapshots_tests.rs"]
mod tests;
