//! Whether this host has memory for one more VM: refused in time, a request fails with a reason; not refused, the kernel ends somebody.
//!
//! What a VM will need cannot be known: clones share what they have not written. So a part of the memory is kept free ([`Headroom::reserve`]), and VMs are
//! refused while there is less: those that run can write so much more before the host has none. A task reads what is available several times a
//! second; a request only looks at the number.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::error::FleetError;
use super::panics;

/// How often it is read. A clone that does nothing but write dirties some hundred MiB in this time.
const EVERY: Duration = Duration::from_millis(100);
/// Kept free where nothing else is wished: a twentieth of the memory, at least this.
const RESERVE_LEAST: u64 = 256 << 20;
const RESERVE_PART: u64 = 20;

/// What is available.
#[derive(Debug)]
pub struct Headroom {
    available: AtomicU64,
    reserve: u64,
}

impl Headroom {
    /// Reads it once, and then goes on reading it as long as somebody has this. `reserve`: bytes; `None`: the usual part.
    pub fn start(reserve: Option<u64>) -> Arc<Self> {
        let places = Places::find();
        let first = places.read();
        let total = first.map_or(0, |memory| memory.total);
        let reserve = reserve.unwrap_or((total / RESERVE_PART).max(RESERVE_LEAST).min(total / 2));
        let headroom = Arc::new(Self { available: AtomicU64::new(available(first)), reserve });
        let watched = Arc::downgrade(&headroom);
        let look = move || watch(watched.clone(), places.clone());
        tokio::spawn(panics::again("looking at the host's memory", look, |_| {}));
        headroom
    }

    /// Bytes that are available, and that are to stay free; `None`: they cannot be read.
    pub fn seen(&self) -> Option<(u64, u64)> {
        let available = self.available.load(Ordering::Relaxed);
        (available != u64::MAX).then_some((available, self.reserve))
    }

    /// Refuses when there is too little, before anything is made.
    pub fn check(&self) -> Result<(), FleetError> {
        let available = self.available.load(Ordering::Relaxed);
        match available >= self.reserve {
            true => Ok(()),
            false => Err(FleetError::LittleMemory {
                available_mib: available >> 20,
                reserve_mib: self.reserve >> 20,
            }),
        }
    }
}

async fn watch(headroom: Weak<Headroom>, places: Places) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(headroom) = headroom.upgrade() else { return };
        headroom.available.store(available(places.read()), Ordering::Relaxed);
    }
}

/// What cannot be read refuses nobody.
fn available(memory: Option<Memory>) -> u64 {
    memory.map_or(u64::MAX, |memory| memory.available)
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    total: u64,
    available: u64,
}

/// Where it is read: the host's, and that of the control group (version 2) in which this process is, and those above it, if they have a limit.
#[derive(Debug, Clone)]
struct Places {
    meminfo: PathBuf,
    groups: Vec<PathBuf>,
}

impl Places {
    fn find() -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // "0::/system.slice/coldspark.service"
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let root = Path::new("/sys/fs/cgroup");
        let mut groups = Vec::new();
        let mut group = root.join(own);
        while group.starts_with(root) && group != root {
            groups.push(group.clone());
            group.pop();
        }
        // In a container its own group looks like the root, and has a limit there.
        groups.push(root.to_owned());
        groups.retain(|group| limit(group).is_some());
        Self { meminfo: "/proc/meminfo".into(), groups }
    }

    fn read(&self) -> Option<Memory> {
        let host = meminfo(&fs::read_to_string(&self.meminfo).ok()?)?;
        let groups = self.groups.iter().filter_map(|group| group_memory(group));
        Some(groups.fold(host, |all, group| Memory {
            total: all.total.min(group.total),
            available: all.available.min(group.available),
        }))
    }
}

/// MemTotal and MemAvailable of /proc/meminfo (proc(5)), which are in KiB.
fn meminfo(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")? })
}

/// The group's `memory.max`; `None`: it has none.
fn limit(group: &Path) -> Option<u64> {
    fs::read_to_string(group.join("memory.max")).ok()?.trim().parse().ok()
}

/// What a group may take yet: page cache that nobody uses is given back for it (cgroup-v2, "inactive_file").
fn group_memory(group: &Path) -> Option<Memory> {
    let total = limit(group)?;
    let current: u64 = fs::read_to_string(group.join("memory.current")).ok()?.trim().parse().ok()?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse().ok());
    let available = total.saturating_sub(current.saturating_sub(cache.unwrap_or(0)));
    Some(Memory { total, available })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_and_what_is_none_is_not_believed() {
        let text = "MemTotal:       16384 kB\nMemFree:           1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(meminfo(text), Some(Memory { total: 16 << 20, available: 8 << 20 }));
        for wrong in [
            "",
            "MemTotal: 1 kB\n",
            "MemTotal: 1\nMemAvailable: 1 kB\n",
            "MemTotal: x kB\nMemAvailable: 1 kB",
        ] {
            assert_eq!(meminfo(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_group_with_a_limit_has_less_than_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n");
        let group = folder.path().to_owned();
        let places = Places { meminfo: group.join("meminfo"), groups: vec![group.clone()] };
        write("memory.max", "max\n");
        assert_eq!(places.read(), Some(Memory { total: 1 << 30, available: 512 << 20 }));
        write("memory.max", "104857600\n");
        write("memory.current", "94371840\n");
        write("memory.stat", "anon 1\ninactive_file 10485760\nactive_file 7\n");
        assert_eq!(places.read(), Some(Memory { total: 100 << 20, available: 20 << 20 }));
        write("memory.current", "204857600\n");
        assert_eq!(places.read().unwrap().available, 0);
    }

    #[tokio::test]
    async fn a_reserve_that_is_not_there_refuses_and_a_usual_one_does_not() {
        let error = Headroom::start(Some(u64::MAX)).check().unwrap_err();
        assert!(error.to_string().contains("--memory-reserve"), "{error}");
        Headroom::start(Some(0)).check().unwrap();
    }
}
