//! What a VM may take of its host: a control group for each VM that has a limit, named like the VM, in a group of this service's data folder.
//!
//! Both versions are used as they are found: of version 2 the part of the tree in which this service is (systemd: `Delegate=cpu memory`), of
//! version 1 the trees of `memory` and `cpu`. A VM's worker is moved into its group before it has any memory of its guest, so that what the guest
//! writes is counted there; pages that clones share are counted where they were read first, if at all.
//!
//! Facts: Linux's `Documentation/admin-guide/cgroup-v2.rst` ("No Internal Process Constraint") and `cgroup-v1/memory.rst`.

mod places;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::places::Places;
pub use self::places::look;
use super::error::FleetError;
use crate::worker::protocol::{Rate, Rates};

/// Least memory limit: a worker itself takes some MiB.
pub const MEMORY_LIMIT_MIN: u64 = 16 << 20;
/// Limits of processor time, in thousandths of a CPU: the least that the kernel takes, and more than any host has.
pub const CPU_MILLIS_MIN: u32 = 10;
pub const CPU_MILLIS_MAX: u32 = 1024 * 1000;
/// Bytes a second of a disk or a network interface: less than a second's worth of one request would let everything through late;
/// more no device has.
pub const RATE_BYTES_MIN: u64 = 4096;
pub const RATE_BYTES_MAX: u64 = 1 << 50;
/// Microseconds in which the processor time is given out (the kernel's usual).
const PERIOD_US: u64 = 100_000;
/// Longest file that is read.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// How long groups may take to be empty at the end, and how often that is looked at.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
const CLOSE_LOOK: Duration = Duration::from_millis(10);

/// What a VM may take; `None`: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory that only this VM has: what its guest has written, and what its worker needs.
    pub memory_bytes: Option<u64>,
    /// Thousandths of a CPU, over all its vCPUs and devices.
    pub cpu_millis: Option<u32>,
    /// What each disk may do in a second.
    #[serde(default)]
    pub disk: Rate,
    /// What each network interface may do in a second, in each direction.
    #[serde(default)]
    pub network: Rate,
}

impl Limits {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// True if control groups have to keep some of them.
    pub fn need_group(&self) -> bool {
        self.memory_bytes.is_some() || self.cpu_millis.is_some()
    }

    /// Those that the VM's own devices keep, if there are any.
    pub fn rates(&self) -> Option<Rates> {
        let rates = Rates { disk: self.disk, network: self.network };
        (rates != Rates::default()).then_some(rates)
    }

    /// Refuses what cannot be kept.
    pub fn check(&self) -> Result<(), FleetError> {
        if let Some(bytes) = self.memory_bytes.filter(|bytes| *bytes < MEMORY_LIMIT_MIN) {
            return Err(FleetError::Invalid(format!(
                "a memory limit of {bytes} bytes; the least is {} MiB",
                MEMORY_LIMIT_MIN >> 20
            )));
        }
        if let Some(millis) =
            self.cpu_millis.filter(|millis| !(CPU_MILLIS_MIN..=CPU_MILLIS_MAX).contains(millis))
        {
            return Err(FleetError::Invalid(format!(
                "a CPU limit of {millis} thousandths; give {CPU_MILLIS_MIN} to {CPU_MILLIS_MAX} (1000 is one CPU)"
            )));
        }
        for (what, rate) in [("disks", self.disk), ("network interfaces", self.network)] {
            if let Some(bytes) = rate.bytes.filter(|bytes| !(RATE_BYTES_MIN..=RATE_BYTES_MAX).contains(bytes))
            {
                return Err(FleetError::Invalid(format!(
                    "{what} limited to {bytes} bytes a second; give {RATE_BYTES_MIN} to {RATE_BYTES_MAX}"
                )));
            }
            if rate.operations == Some(0) {
                return Err(FleetError::Invalid(format!(
                    "{what} limited to 0 operations a second; give 1 or more"
                )));
            }
        }
        Ok(())
    }
}

/// Which groups of a folder are the VMs'.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    folder: PathBuf,
    /// Of their names; the rest is the VM's. Empty: the folder is for them alone.
    prefix: String,
}

impl Holder {
    fn group(&self, vm: &str) -> PathBuf {
        self.folder.join(format!("{}{vm}", self.prefix))
    }

    /// Those that there are, with their VMs' names.
    fn groups(&self) -> Vec<(String, PathBuf)> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let groups = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        groups
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                Some((name.strip_prefix(&self.prefix)?.to_owned(), entry.path()))
            })
            .collect()
    }

    fn is_used(&self) -> bool {
        if self.prefix.is_empty() { self.folder.exists() } else { !self.groups().is_empty() }
    }

    /// Removes the groups of VMs that do not live.
    fn sweep(&self, living: &HashSet<String>) {
        for (vm, folder) in self.groups() {
            if !living.contains(&vm) {
                remove(&folder);
            }
        }
    }
}

/// Makes groups. Looks where when the first one is wanted.
#[derive(Debug)]
pub struct Cgroups {
    /// Of the group that holds the VMs' groups, or the beginning of theirs.
    name: String,
    places: Mutex<Option<Places>>,
    busy: Busy,
}

/// Groups that nobody needs and that could not be removed yet: of version 1 a process leaves its group a moment after its end is known, and a clone that is
/// given up is being killed still. They are tried again with every other one.
#[derive(Debug, Clone, Default)]
struct Busy(Arc<Mutex<Vec<PathBuf>>>);

impl Busy {
    /// Removes these, and those from before, as far as that can be done now.
    fn remove(&self, folders: Vec<PathBuf>) {
        let mut all = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        all.extend(folders);
        all.retain(|folder| !remove(folder));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).append(&mut all);
    }
}

/// A VM's group; removed when this is dropped, or as soon after that as its processes have ended.
#[derive(Debug)]
pub struct Group {
    folders: Vec<PathBuf>,
    busy: Busy,
    /// In which `oom_kill` counts processes that were killed because the memory was up.
    kills: PathBuf,
    pub limits: Limits,
}

impl Cgroups {
    /// Of a service with this data folder: two of them are not in each other's way.
    pub fn new(data_dir: &Path) -> Arc<Self> {
        let place = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let hash = blake3::hash(place.as_os_str().as_encoded_bytes()).to_hex();
        let name = format!("coldspark-{}", &hash[..16]);
        Arc::new(Self { name, places: Mutex::default(), busy: Busy::default() })
    }

    /// Makes a group with these limits and moves the process into it. Blocks for as long as the kernel takes.
    pub fn make(&self, vm: &str, limits: Limits, pid: u32) -> Result<Group, FleetError> {
        let places = self.places()?;
        self.busy.remove(Vec::new());
        let group = self.group(&places, vm, limits);
        let made = group.set_up(&places, &limits).and_then(|()| group.take(pid));
        // What is there already goes with `group`.
        made.map_err(|(path, source)| match source.raw_os_error() {
            // There is no such process any more.
            Some(libc::ESRCH) => FleetError::WorkerKilled("it ended before it could be limited".to_owned()),
            _ => FleetError::Io { what: format!("cannot limit the VM: {}", path.display()), source },
        })?;
        Ok(group)
    }

    /// The group of a VM that an earlier service has started, if it has one. Its limits are in force again.
    pub fn find(&self, vm: &str, limits: Limits) -> Option<Group> {
        if !limits.need_group() {
            return None;
        }
        let places = self.known()?;
        let group = self.group(&places, vm, limits);
        if !group.folders.iter().any(|folder| folder.exists()) {
            return None;
        }
        let set = self.places().map_err(|error| error.to_string()).and_then(|places| {
            group.set_up(&places, &limits).map_err(|(path, error)| format!("{}: {error}", path.display()))
        });
        if let Err(problem) = set {
            tracing::warn!(vm, problem, "it is not certain that the VM's limits are still kept");
        }
        Some(group)
    }

    /// Removes the groups that no VM needs any more.
    pub fn sweep(&self, living: &HashSet<String>) {
        let Some(places) = self.known() else { return };
        self.holders(&places).iter().for_each(|holder| holder.sweep(living));
    }

    /// Removes all groups, when all VMs have ended. Blocks for a moment: a process that was killed leaves its group after its end is known,
    /// and of version 1 the kernel does not tell when.
    pub fn close(&self) {
        let kept = self.places.lock().unwrap_or_else(PoisonError::into_inner).take();
        let holders: Vec<Holder> =
            kept.or_else(|| self.known()).iter().flat_map(|places| self.holders(places)).collect();
        let until = Instant::now() + CLOSE_WITHIN;
        loop {
            for holder in &holders {
                holder.sweep(&HashSet::new());
                if holder.prefix.is_empty() {
                    remove(&holder.folder);
                }
            }
            let left: Vec<&Holder> = holders.iter().filter(|holder| holder.is_used()).collect();
            if left.is_empty() {
                return;
            }
            if Instant::now() >= until {
                tracing::warn!(?left, "control groups are left: what is in them has not ended");
                return;
            }
            std::thread::sleep(CLOSE_LOOK);
        }
    }

    /// Where groups can be made; says what is missing otherwise.
    pub fn check(&self) -> Result<&'static str, FleetError> {
        match self.places()? {
            Places::Unified { .. } => Ok("version 2"),
            Places::Split { .. } => Ok("version 1"),
        }
    }

    /// Without making anything: `None` also where there was never a limit.
    fn known(&self) -> Option<Places> {
        let kept = self.places.lock().unwrap_or_else(PoisonError::into_inner).clone();
        kept.or_else(|| {
            let found = places::find().ok()?;
            self.holders(&found).iter().any(Holder::is_used).then_some(found)
        })
    }

    fn places(&self) -> Result<Places, FleetError> {
        let mut kept = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = &*kept {
            return Ok(places.clone());
        }
        let places = places::find().and_then(|places| {
            places::prepare(&places, &self.holders(&places))?;
            Ok(places)
        });
        let places = places.map_err(FleetError::NoLimits)?;
        Ok(kept.insert(places).clone())
    }

    fn holders(&self, places: &Places) -> Vec<Holder> {
        let below = |folder: &Path| Holder { folder: folder.join(&self.name), prefix: String::new() };
        match places {
            Places::Unified { own, flat: true } => {
                vec![Holder { folder: own.clone(), prefix: format!("{}.", self.name) }]
            }
            Places::Unified { own, flat: false } => vec![below(own)],
            Places::Split { memory, cpu } => vec![below(memory), below(cpu)],
        }
    }

    fn group(&self, places: &Places, vm: &str, limits: Limits) -> Group {
        let folders: Vec<PathBuf> = self.holders(places).iter().map(|holder| holder.group(vm)).collect();
        let file = match places {
            Places::Unified { .. } => "memory.events",
            Places::Split { .. } => "memory.oom_control",
        };
        let kills = folders.first().map(|folder| folder.join(file)).unwrap_or_default();
        Group { folders, busy: self.busy.clone(), kills, limits }
    }
}

/// What was to be written or made, and why it could not be.
type Failed = (PathBuf, io::Error);

impl Group {
    /// What it has come to its end of, if the kernel killed its process for want of memory.
    pub fn ran_out(&self) -> Option<String> {
        let text = read(&self.kills).ok()?;
        let kills: u64 = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())?;
        (kills > 0).then(|| match self.limits.memory_bytes {
            Some(bytes) => format!("it needed more memory than its limit of {} MiB", bytes >> 20),
            None => "it needed more memory than its limit".to_owned(),
        })
    }

    /// It stays when this is gone, for the next service.
    pub fn leave(mut self) {
        self.folders.clear();
    }

    fn set_up(&self, places: &Places, limits: &Limits) -> Result<(), Failed> {
        for folder in &self.folders {
            make(folder)?;
        }
        let [memory, cpu] = match &self.folders[..] {
            [both] => [both, both],
            [memory, cpu, ..] => [memory, cpu],
            [] => return Ok(()),
        };
        let unified = matches!(places, Places::Unified { .. });
        if let Some(bytes) = limits.memory_bytes {
            let bytes = bytes.to_string();
            if unified {
                write(&memory.join("memory.max"), &bytes)?;
                // Its memory is not to go on growing in the swap; a kernel without swap has no such file.
                optional(write(&memory.join("memory.swap.max"), "0"))?;
            } else {
                write(&memory.join("memory.limit_in_bytes"), &bytes)?;
                optional(write(&memory.join("memory.memsw.limit_in_bytes"), &bytes))?;
            }
        }
        if let Some(millis) = limits.cpu_millis {
            let quota = u64::from(millis) * PERIOD_US / 1000;
            if unified {
                write(&cpu.join("cpu.max"), &format!("{quota} {PERIOD_US}"))?;
            } else {
                write(&cpu.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                write(&cpu.join("cpu.cfs_quota_us"), &quota.to_string())?;
            }
        }
        Ok(())
    }

    fn take(&self, pid: u32) -> Result<(), Failed> {
        self.folders.iter().try_for_each(|folder| write(&folder.join("cgroup.procs"), &pid.to_string()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.busy.remove(std::mem::take(&mut self.folders));
    }
}

/// Whether it is gone. One that is busy is somebody's yet.
fn remove(folder: &Path) -> bool {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(folder = %folder.display(), %error, "a control group cannot be removed yet");
            false
        }
        _ => true,
    }
}

fn make(folder: &Path) -> Result<(), Failed> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err((folder.to_owned(), error)),
        _ => Ok(()),
    }
}

/// A file that the kernel has made: this makes none.
fn write(path: &Path, text: &str) -> Result<(), Failed> {
    let written = fs::OpenOptions::new().write(true).open(path).and_then(|mut file| {
        // In one piece, as the kernel wants it.
        io::Write::write_all(&mut file, text.as_bytes())
    });
    written.map_err(|error| (path.to_owned(), error))
}

fn optional(result: Result<(), Failed>) -> Result<(), Failed> {
    match result {
        Err((_, error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read(path: &Path) -> io::Result<String> {
    let text = fs::read_to_string(path)?;
    match text.len() <= TEXT_BYTES_MAX {
        true => Ok(text),
        false => Err(io::Error::other("it is too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_no_group_takes_are_refused() {
        assert!(Limits::default().is_none());
        Limits {
            memory_bytes: Some(MEMORY_LIMIT_MIN),
            cpu_millis: Some(CPU_MILLIS_MAX),
            ..Limits::default()
        }
        .check()
        .unwrap();
        for wrong in [
            Limits { memory_bytes: Some(MEMORY_LIMIT_MIN - 1), cpu_millis: None, ..Limits::default() },
            Limits { memory_bytes: None, cpu_millis: Some(CPU_MILLIS_MIN - 1), ..Limits::default() },
            Limits { memory_bytes: None, cpu_millis: Some(CPU_MILLIS_MAX + 1), ..Limits::default() },
            Limits { disk: Rate { bytes: Some(RATE_BYTES_MIN - 1), operations: None }, ..Limits::default() },
            Limits { network: Rate { bytes: None, operations: Some(0) }, ..Limits::default() },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }

    fn cgroups() -> Cgroups {
        Cgroups { name: "coldspark-x".into(), places: Mutex::default(), busy: Busy::default() }
    }

    #[test]
    fn a_group_that_is_busy_when_its_vm_is_given_up_goes_with_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let (cgroups, places) = (cgroups(), Places::Unified { own: folder.path().to_owned(), flat: false });
        let at = |vm: &str| folder.path().join("coldspark-x").join(vm);
        let group = |vm: &str| {
            fs::create_dir_all(at(vm)).unwrap();
            cgroups.group(&places, vm, Limits::default())
        };
        let (first, second, third) = (group("vm-1"), group("vm-2"), group("vm-3"));
        // What is in it stands for a process that has not ended.
        fs::create_dir(at("vm-1").join("process")).unwrap();
        drop(first);
        drop(second);
        assert!(at("vm-1").exists() && !at("vm-2").exists());
        fs::remove_dir(at("vm-1").join("process")).unwrap();
        drop(third);
        assert!(!at("vm-1").exists() && !at("vm-3").exists());
        // The next service's is left.
        group("vm-4").leave();
        drop(group("vm-5"));
        assert!(at("vm-4").exists() && !at("vm-5").exists());
    }

    #[test]
    fn a_group_is_set_up_by_the_files_of_its_version_and_tells_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: Some(64 << 20), cpu_millis: Some(500), ..Limits::default() };
        let cgroups = cgroups();
        let own = folder.path().to_owned();
        let places = Places::Unified { own: own.clone(), flat: false };
        let at = own.join("coldspark-x/vm-1");
        fs::create_dir_all(&at).unwrap();
        for name in ["memory.max", "cpu.max", "cgroup.procs"] {
            fs::write(at.join(name), "").unwrap();
        }
        let group = cgroups.group(&places, "vm-1", limits);
        group.set_up(&places, &limits).unwrap();
        group.take(7).unwrap();
        let said = |name: &str| fs::read_to_string(at.join(name)).unwrap();
        assert_eq!(
            (said("memory.max"), said("cpu.max"), said("cgroup.procs")),
            ("67108864".into(), "50000 100000".into(), "7".into())
        );
        assert_eq!(group.ran_out(), None);
        fs::write(at.join("memory.events"), "low 0\noom 3\noom_kill 1\noom_group_kill 0\n").unwrap();
        assert_eq!(group.ran_out().unwrap(), "it needed more memory than its limit of 64 MiB");
        // What the kernel has not made is not made here.
        let places = Places::Split { memory: own.join("m"), cpu: own.join("c") };
        let group = cgroups.group(&places, "vm-1", limits);
        assert!(group.set_up(&places, &limits).is_err());
    }

    #[test]
    fn groups_that_lie_flat_are_told_from_others_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().to_owned();
        let cgroups = cgroups();
        let places = Places::Unified { own: own.clone(), flat: true };
        let holders = cgroups.holders(&places);
        let [holder] = &holders[..] else { panic!("{holders:?}") };
        for name in ["service", "coldspark-y.vm-1", "coldspark-x"] {
            fs::create_dir(own.join(name)).unwrap();
        }
        assert!(!holder.is_used());
        let limits = Limits { memory_bytes: Some(64 << 20), ..Limits::default() };
        let of = |vm: &str| cgroups.group(&places, vm, limits).folders.clone();
        assert_eq!(of("vm-1"), [own.join("coldspark-x.vm-1")]);
        for vm in ["vm-1", "vm-2"] {
            fs::create_dir(own.join(format!("coldspark-x.{vm}"))).unwrap();
        }
        assert!(holder.is_used());
        holder.sweep(&HashSet::from(["vm-2".to_owned()]));
        let mut left: Vec<_> = fs::read_dir(&own).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["coldspark-x", "coldspark-x.vm-2", "coldspark-y.vm-1", "service"]);
    }
}
