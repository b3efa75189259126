//! Snapshots: freezing a VM into the store, finding what is there, and holding files open for clones.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::Fleet;
use super::addresses::Given;
use super::boot::{micros, step};
use super::claims::Claim;
use super::disks::{FrozenFile, VmDisk, VmFolder, link_into};
use super::error::FleetError;
use super::events::{Change, Event, Kind};
use super::keeping::{Keeping, KeptSoFar};
use super::learning::Learning;
use super::limits::{FOLD_BYTES_MAX, OPEN_SNAPSHOTS_MAX, VERIFIES_MAX};
use super::network::{LinkRequest, VmNetwork, mac_from_text, mac_text};
use super::vm::{Command, FrozenVm, Origin, State, Vm};
use crate::agent::{FrameDecoder, Hello};
use crate::snapshot::manifest::{
    Cpu, Facts, Guest, HostFacts, Identity, Memory, Network, Protocol, Refusal, Region, SnapshotId,
};
use crate::snapshot::memory::pager::PagerSource;
pub use crate::snapshot::signing;
use crate::snapshot::signing::{Signature, Signing};
use crate::snapshot::store::{Draft, Listed, OpenSnapshot, Snapshot, SnapshotStore, StoreError};
pub use crate::snapshot::working_set::WorkingSet;
use crate::telemetry::metrics;
use crate::worker::protocol::{BootProtocol, Frozen, HostReport, Step};

/// Label under which the agent's hello is kept, in hexadecimal.
const HELLO_LABEL: &str = "coldspark.agent.hello";

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

/// What is open, by snapshots' ids.
#[derive(Debug)]
struct Opened<S>(Mutex<HashMap<String, Arc<S>>>);

impl<S> Opened<S> {
    fn new() -> Self {
        Self(Mutex::default())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<S>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what was opened, unless its snapshot was deleted meanwhile: its files would be held, and nobody would ever come for them. Who
    /// deletes it takes it out of here when it `is_there` no more. Gives which one is kept no longer, where there were too many.
    fn keep(&self, id: String, source: &Arc<S>, is_there: impl FnOnce(&str) -> bool) -> Option<String> {
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
    fn open(snapshot: &Snapshot, working_sets: bool) -> Result<Self, FleetError> {
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
    fn fold(&self) {
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

fn protocol(protocol: Protocol) -> BootProtocol {
    match protocol {
        Protocol::FreeBsd => BootProtocol::FreeBsd,
        Protocol::Pvh => BootProtocol::Pvh,
        Protocol::Linux => BootProtocol::Linux,
    }
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

/// The hello that was said before the snapshot was taken.
fn stored_hello(labels: &BTreeMap<String, String>) -> Result<Hello, FleetError> {
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

/// Runs what waits for the disk where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FleetError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| FleetError::Internal(format!("a task of the service failed: {error}")))
}

/// Does what must not be given up in its middle, also when its caller goes away.
pub(super) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, FleetError>> + Send + 'static,
) -> Result<T, FleetError> {
    tokio::spawn(work)
        .await
        .map_err(|error| FleetError::Internal(format!("a task of the service failed: {error}")))?
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
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::manifest::MEMORY_FILE;

    /// Publishes a snapshot of a VM without disks; gives its id.
    fn publish(store: &Arc<SnapshotStore>) -> String {
        const BYTES: u64 = 2 << 20;
        let draft = store.begin(SnapshotId::random()).unwrap();
        draft.state().write_all_at(b"state", 0).unwrap();
        draft.memory().set_len(BYTES).unwrap();
        let facts = Facts {
            name: None,
            labels: BTreeMap::new(),
            guest: Guest { kernel: "k".into(), protocol: Protocol::Pvh, ready: String::new() },
            vcpus: 1,
            memory: Memory {
                bytes: BYTES,
                regions: vec![Region { guest_address: 0, bytes: BYTES, file_offset: 0 }],
            },
            cpu: Cpu { vendor: "v".into(), features: Vec::new(), tsc_khz: 0 },
            kvm_capabilities: Vec::new(),
            parent: None,
            identity: Identity { agent: false },
            devices: Vec::new(),
            disks: Vec::new(),
            networks: Vec::new(),
        };
        draft.publish(facts).unwrap().id().to_string()
    }

    /// How many snapshots of this folder this process has open.
    fn open_in(folder: &Path) -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let paths = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        paths.filter(|path| path.starts_with(folder) && path.ends_with(MEMORY_FILE)).count()
    }

    #[test]
    fn files_of_many_snapshots_are_not_all_held_open() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(folder.path(), false, Signing::default(), "mark".to_owned()).unwrap();
        for _ in 0..OPEN_SNAPSHOTS_MAX + 5 {
            let id = publish(&snapshots.store);
            // As nobody holds them, and folding is not waited for: opened and kept, as `source` does.
            let source = Source::open(&snapshots.store.get(&id).unwrap(), false).unwrap();
            snapshots.keep(id, &Arc::new(source));
        }
        assert_eq!(open_in(folder.path()), OPEN_SNAPSHOTS_MAX);
    }

    #[test]
    fn one_that_was_deleted_while_it_was_opened_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(folder.path(), false, Signing::default(), "mark".to_owned()).unwrap();
        let id = publish(&snapshots.store);
        let source = Source::open(&snapshots.store.get(&id).unwrap(), false).unwrap();
        // By this its series are ended, open or not.
        assert_eq!(label_of(&snapshots.store.get(&id).unwrap()), source.label());
        snapshots.store.delete(&id).unwrap();
        snapshots.keep(id, &Arc::new(source));
        assert!(snapshots.lock().is_empty());
    }

    #[test]
    fn times_of_manifests_are_read() {
        assert_eq!(unix_ms("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(unix_ms("2026-11-22T12:00:01Z"), Some(1_795_348_801_000));
        assert_eq!(unix_ms("2024-02-29T23:59:59Z"), Some(1_709_251_199_000));
        assert_eq!(unix_ms(""), None);
    }

    #[test]
    fn what_was_deleted_while_it_was_opened_is_not_kept_open() {
        let (opened, source) = (Opened::new(), Arc::new(()));
        opened.keep("snap-a".to_owned(), &source, |_| true);
        opened.keep("snap-b".to_owned(), &source, |id| {
            // A deletion that comes from here on finds it.
            assert!(opened.lock().contains_key(id));
            false
        });
        let has = |id: &str| opened.lock().contains_key(id);
        assert!(has("snap-a") && !has("snap-b"));
        for n in 0..2 * OPEN_SNAPSHOTS_MAX {
            opened.keep(format!("snap-{n}"), &source, |_| true);
            opened.keep(format!("snap-{n}"), &source, |_| true);
        }
        assert_eq!(opened.lock().len(), OPEN_SNAPSHOTS_MAX);
    }

    #[tokio::test]
    async fn what_must_be_done_is_done_when_its_caller_goes_away() {
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let (begun_in, begun) = tokio::sync::oneshot::channel();
        let (done_in, done) = tokio::sync::oneshot::channel();
        let caller = tokio::spawn(to_its_end(async move {
            begun_in.send(()).unwrap();
            gone.await.unwrap();
            done_in.send(()).unwrap();
            Ok(())
        }));
        begun.await.unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        done.await.unwrap();
    }

    #[test]
    fn a_hello_survives_the_label() {
        let hello = Hello {
            version: crate::agent::wire::PROTOCOL_VERSION,
            agent: 1,
            boot: 2,
            cpus_found: 4,
            cpus_alive: 4,
            tsc_khz: 3_000_000,
            checks_run: 7,
            checks_failed: 0,
            kinds: u64::MAX,
            memory_bytes: 1 << 29,
            arena_bytes: 1 << 28,
            filled_bytes: 0,
            disks: 1,
            request_bytes: 0,
            name: "test guest".into(),
        };
        let mut labels = BTreeMap::from([(HELLO_LABEL.to_owned(), hello_text(&hello).unwrap())]);
        assert_eq!(stored_hello(&labels).unwrap(), hello);
        labels.insert(HELLO_LABEL.to_owned(), "zz".into());
        assert!(stored_hello(&labels).is_err());
        assert!(stored_hello(&BTreeMap::new()).is_err());
    }
}
