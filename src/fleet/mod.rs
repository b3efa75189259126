//! The daemon's domain: images, VMs, snapshots. One owner task per VM.
//!
//! | module | what it holds |
//! |---|---|
//! | [`vm`], [`owner`] | a VM as others see it, and the task that alone changes it |
//! | [`adopt`], [`record`] | VMs that outlived an earlier daemon, and what that left of them |
//! | [`boot`] | cold boots up to the ready point |
//! | [`profile`] | where a cold boot's time went |
//! | [`watchdog`] | where a guest is that hangs |
//! | [`claims`] | requests that are sent again to the next daemon |
//! | [`clones`], [`identity`] | starting clones of a snapshot, making each somebody of its own |
//! | [`functions`] | commands run in fresh clones |
//! | [`pools`] | clones that stand ready |
//! | [`snapshots`] | freezing, publishing, listing, verifying |
//! | [`sources`] | snapshots that are open: everything that clones are made of |
//! | [`tasks`] | work that must not hold others up, and work that must not be given up |
//! | [`images`] | importing and opening images |
//! | [`registry`] | which VMs there are |
//! | [`events`] | what happens, for those who watch |
//! | [`shells`], [`process`], [`zygote`], [`child`], [`link`] | worker processes and the control channel |
//! | [`jail`] | which layers the workers' jail has |
//! | [`console`], [`agent`] | a VM's serial console, and the agent in it |
//! | [`streams`], [`exec`] | commands and files that the agent has under way |
//! | [`disks`] | files behind a VM's disks |
//! | [`network`], [`slots`] | what network interfaces are plugged into, and the networks made here |
//! | [`headroom`] | whether the host has memory for one more |
//! | [`gauges`], [`sampling`], [`reason`] | what metrics tell: what there is, what clones touch, why something failed |
//! | [`stored`] | settings that outlive the service |
//! | [`error`], [`limits`], [`id`] | small things |
//!
//! Facts about guests come only through the control protocol, the console and the agent port, and all three are
//! hostile: whatever they carry is bounded where it comes in.

pub mod addresses;
pub mod adopt;
pub mod agent;
pub mod boot;
pub mod cgroup;
pub mod child;
pub mod claims;
pub mod clones;
pub mod console;
pub mod disk_files;
pub mod disks;
pub mod error;
pub mod events;
pub mod exec;
pub mod functions;
pub mod gauges;
pub mod headroom;
pub mod id;
pub mod identity;
pub mod images;
pub mod jail;
pub mod keeping;
pub mod kernel_words;
pub mod learning;
pub mod limits;
pub mod link;
pub mod network;
pub mod owner;
pub mod pace;
pub mod panics;
pub mod pools;
pub mod process;
pub mod profile;
pub mod reason;
pub mod record;
pub mod registry;
pub mod sampling;
pub mod shells;
pub mod slots;
pub mod snapshots;
pub mod sources;
pub mod stored;
pub mod streams;
mod tasks;
pub mod vm;
pub mod watchdog;
pub mod zygote;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cgroup::Cgroups;
use claims::Claims;
use error::FleetError;
use functions::Functions;
use headroom::Headroom;
use images::Images;
use pools::Pools;
use process::{Spawner, WorkerProgram};
use registry::Registry;
use sampling::Sampling;
use shells::Shells;
use slots::Slots;
use slots::addresses::Plan;
use snapshots::Snapshots;

use crate::snapshot::folder::{self, Lock};
use crate::snapshot::memory::pager::Pager;
pub use crate::worker::protocol::{
    Activity, AgentPort, BootProtocol, Hardware, Jail, JailMode, Layer, MemoryMode, ModuleKind, NetworkStats,
    Rate, Stats, Step, VcpuLook,
};

/// Threads that answer page faults of userfault clones.
const PAGER_THREADS: usize = 2;

/// How a fleet is to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// `snapshots/`, `images/`, `pools/`, `functions/` and `vms/` are below it.
    pub data_dir: PathBuf,
    /// Shells kept in reserve.
    pub shells: usize,
    /// Learn what clones of a snapshot touch first, and have it ready for later ones.
    pub working_sets: bool,
    /// Most living VMs.
    pub vms_max: usize,
    /// Of the time of the CPUs that may make what pools keep ready (half of all), how much goes into it, in hundredths.
    pub refill_share: u32,
    /// Bytes of the host's memory that are to stay free: no VM is started while there are fewer. `None`: a twentieth, at least 256 MiB.
    pub memory_reserve: Option<u64>,
    /// How long VMs outlive this daemon when it is killed, waiting for the next one; `None`: they end with it.
    pub orphan_time: Option<Duration>,
    /// How long a VM that was taken over lives when nobody has ever named it in a call; `None`: as any.
    pub unclaimed_time: Option<Duration>,
    /// What snapshots are signed with, and whose may be used.
    pub signing: snapshots::signing::Signing,
    /// Network slots kept ready; 0: none are made.
    pub networks: usize,
    /// Which addresses guests and slots have.
    pub network_plan: Plan,
    pub worker: WorkerProgram,
}

impl Config {
    /// With the usual limits.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            shells: 4,
            working_sets: true,
            vms_max: 1024,
            refill_share: 50,
            memory_reserve: None,
            orphan_time: None,
            unclaimed_time: None,
            signing: Default::default(),
            networks: 0,
            network_plan: Plan::default(),
            worker: WorkerProgram::default(),
        }
    }
}

/// All of the daemon's domain.
#[derive(Debug)]
pub struct Fleet {
    pub(crate) shells: Arc<Shells>,
    pub(crate) registry: Registry,
    pub(crate) snapshots: Snapshots,
    pub(crate) images: Images,
    pub(crate) pools: Pools,
    pub(crate) functions: Functions,
    pub(crate) headroom: Arc<Headroom>,
    pub(crate) cgroups: Arc<Cgroups>,
    pub(crate) pager: Arc<Pager>,
    pub(crate) events: events::Events,
    pub(crate) slots: Arc<Slots>,
    pub(crate) claims: Claims,
    sampling: Sampling,
    unclaimed_time: Option<Duration>,
    vms_dir: PathBuf,
    /// What an earlier daemon left in `vms/`, by name.
    left: Mutex<Vec<String>>,
    /// Held as long as this fleet lives: nobody else works in `vms/`.
    _lock: Lock,
}

impl Fleet {
    /// Opens the stores below the data folder and begins to keep shells; [`begin`](Self::begin) follows. Must be called in a tokio runtime;
    /// blocks on the disk.
    pub fn open(config: Config) -> Result<Arc<Self>, FleetError> {
        let vms_dir = config.data_dir.join("vms");
        fs::create_dir_all(&vms_dir)
            .map_err(FleetError::io(format!("cannot make the folder {}", vms_dir.display())))?;
        let lock = lock(&vms_dir)?;
        // Before this one makes any itself.
        let left = leftovers(&vms_dir);
        let folder = config.data_dir.join("snapshots");
        let snapshots =
            Snapshots::open(&folder, config.working_sets, config.signing, mark(&config.data_dir)?)?;
        let images = Images::open(&config.data_dir.join("images"))?;
        let pools = Pools::open(config.data_dir.join("pools"), config.refill_share)?;
        let functions = Functions::open(config.data_dir.join("functions"))?;
        let slots = Slots::new(config.networks, config.network_plan, &config.data_dir)?;
        slots.check()?;
        let pager = Pager::start(PAGER_THREADS).map_err(|error| FleetError::Internal(error.to_string()))?;
        let shells =
            Shells::start(Spawner::start(config.worker)?, config.shells, vms_dir.clone(), config.orphan_time);
        let fleet = Arc::new(Self {
            shells,
            registry: Registry::new(config.vms_max),
            snapshots,
            images,
            pools,
            functions,
            headroom: Headroom::start(config.memory_reserve),
            cgroups: Cgroups::new(&config.data_dir),
            pager: Arc::new(pager),
            events: events::Events::default(),
            slots,
            claims: Claims::default(),
            sampling: Sampling::default(),
            unclaimed_time: config.unclaimed_time,
            vms_dir,
            left: Mutex::new(left),
            _lock: lock,
        });
        let kept = Arc::downgrade(&fleet);
        let keep = move || keeping::run(kept.clone());
        tokio::spawn(panics::again("keeping working sets in the page cache", keep, |_| {}));
        Ok(fleet)
    }

    /// Takes over the VMs that an earlier daemon left running, removes what else it left, and begins to keep pools.
    pub async fn begin(self: &Arc<Self>) {
        let left = std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner));
        self.adopt(left).await;
        self.sweep_groups().await;
        self.slots.begin().await;
        self.pools.begin(self);
        self.functions.begin(self);
    }

    /// Refuses limits that this host cannot keep.
    async fn check_limits(&self, limits: cgroup::Limits) -> Result<(), FleetError> {
        limits.check()?;
        if limits.need_group() {
            let cgroups = Arc::clone(&self.cgroups);
            tasks::blocking(move || cgroups.check()).await??;
        }
        Ok(())
    }

    /// Removes what an earlier daemon's limited VMs left.
    async fn sweep_groups(&self) {
        let living = self.registry.list().iter().map(|vm| vm.id.clone()).collect();
        let cgroups = Arc::clone(&self.cgroups);
        let _ = tokio::task::spawn_blocking(move || cgroups.sweep(&living)).await;
    }

    /// Waits until the reserve of shells is full.
    pub async fn shells_full(&self) {
        self.shells.full().await;
    }

    /// Waits until as many network slots are ready as there are to be.
    pub async fn slots_full(&self) {
        self.slots.full().await;
    }

    /// How many shells are ready.
    pub fn shells_ready(&self) -> usize {
        self.shells.count()
    }

    /// Leaves the VMs that are their callers' to the next daemon, and ends the others.
    pub async fn leave(&self) {
        let vms = self.registry.close();
        self.pools.close(self);
        self.shells.close();
        for vm in vms {
            if !vm.is_settled() || vm.command(vm::Command::Release).await.is_err() {
                vm.kill("the service ended");
                vm.ended().await;
            }
        }
        self.slots.close().await;
    }

    /// Ends every VM and waits for their ends.
    pub async fn close(&self) {
        let vms = self.registry.close();
        self.pools.close(self);
        self.shells.close();
        for vm in &vms {
            vm.kill("the service ended");
        }
        for vm in vms {
            vm.ended().await;
            self.registry.remove(&vm.id);
        }
        let cgroups = Arc::clone(&self.cgroups);
        let _ = tokio::task::spawn_blocking(move || cgroups.close()).await;
        self.slots.close().await;
    }
}

fn lock(vms_dir: &Path) -> Result<Lock, FleetError> {
    let path = vms_dir.join(".lock");
    let file = File::create(&path).map_err(FleetError::io(format!("cannot make {}", path.display())))?;
    match Lock::of(file) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(FleetError::WrongState(format!(
            "another coldspark works in {}; stop it, or choose another --data-dir",
            vms_dir.display()
        ))),
        Err(source) => Err(FleetError::Io { what: format!("cannot lock {}", path.display()), source }),
    }
}

/// Random digits that are this data folder's for good. A copy of it has them, too; its snapshots alone have not.
fn mark(data_dir: &Path) -> Result<String, FleetError> {
    const DIGITS: usize = 32;
    let path = data_dir.join("mark");
    if let Ok(Some(bytes)) = folder::read_small(&path, DIGITS as u64)
        && bytes.len() == DIGITS
        && bytes.iter().all(u8::is_ascii_hexdigit)
        && let Ok(mark) = String::from_utf8(bytes)
    {
        return Ok(mark);
    }
    // New, or damaged: then what was made before is as if it had been brought here.
    let mark: String = id::random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect();
    if let Err(error) = folder::replace_small(&path, mark.as_bytes()) {
        // On a full disk, say. No reason not to serve.
        tracing::warn!(%error, "snapshots made now will not be known as made here by the next service");
    }
    Ok(mark)
}

/// Folders of VMs of an earlier daemon.
fn leftovers(vms_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(vms_dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(id::VM_PREFIX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_folder_keeps_its_mark_and_no_two_have_the_same() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = mark(one.path()).unwrap();
        assert_eq!(mark(one.path()).unwrap(), first);
        assert_ne!(mark(other.path()).unwrap(), first);
        for damaged in ["", "00", &"x".repeat(32), &"0".repeat(33)] {
            fs::write(one.path().join("mark"), damaged).unwrap();
            let new = mark(one.path()).unwrap();
            assert!(new.len() == 32 && new != damaged && mark(one.path()).unwrap() == new, "{damaged:?}");
        }
    }
}
