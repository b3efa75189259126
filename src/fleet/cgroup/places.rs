//! Where this service may make groups, and how it makes room for them.
//!
//! Under systemd the next service is started in the same unit's group while VMs of the last one live below it. From 254 on systemd puts it into a
//! group of its own there (`DelegateSubgroup=service`). Before, it puts it where no process may be that has groups with controllers below it; so the
//! unit switches the controllers off when the service has ended (`ExecStopPost=`), which the kernel does only if no group below hands them on. So
//! there the VMs' groups lie flat, and their limits are set again when the VMs are taken over.
//!
//! Facts: proc(5), `/proc/PID/cgroup` and `mountinfo`; Linux's `Documentation/admin-guide/cgroup-v2.rst` ("Delegation"); systemd's
//! CGROUP_DELEGATION.md. What systemd 252 and 257 do was tried (trials `systemd/...`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Failed, Holder, make, read, write};

/// The group below its own in which the service and its workers without limits are.
const LEAF: &str = "service";
/// By which the unit says that its `ExecStopPost=` makes room for the next service.
const MAKES_ROOM: &str = "COLDSPARK_MAKES_ROOM";

/// Where groups are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Places {
    /// The group that is this service's to divide. `flat`: the next service is put into it, too, and not below.
    Unified { own: PathBuf, flat: bool },
    /// The groups that this service is in, of the controllers `memory` and `cpu`.
    Split { memory: PathBuf, cpu: PathBuf },
}

/// Which version this process could use; says what is missing otherwise. Changes nothing.
pub fn look() -> Result<&'static str, String> {
    let (version, folders) = match find()? {
        Places::Unified { own, .. } => ("version 2", vec![own]),
        Places::Split { memory, cpu } => ("version 1", vec![memory, cpu]),
    };
    for folder in folders {
        rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK).map_err(|error| {
            format!("no groups can be made in {}: {}", folder.display(), io::Error::from(error))
        })?;
    }
    Ok(version)
}

/// Where groups can be made. Changes nothing.
pub(super) fn find() -> Result<Places, String> {
    let text = |path: &str| read(Path::new(path)).map_err(|error| format!("{path}: {error}"));
    let places = places_of(&text("/proc/self/cgroup")?, &text("/proc/self/mountinfo")?)?;
    if let Places::Unified { own, flat } = &places {
        let is_service = own.extension().is_some_and(|kind| kind == "service");
        if *flat && is_service && std::env::var_os(MAKES_ROOM).is_none() {
            return Err(format!(
                "systemd could not start {} again while VMs with limits live: its unit needs DelegateSubgroup={LEAF} (systemd 254), or ExecStopPost= and {MAKES_ROOM}=yes as in deploy/coldspark.service",
                own.display()
            ));
        }
        let controllers = read(&own.join("cgroup.controllers")).unwrap_or_default();
        for needed in ["memory", "cpu"] {
            if !controllers.split_whitespace().any(|controller| controller == needed) {
                return Err(format!("{} has no controller {needed}", own.display()));
            }
        }
    }
    Ok(places)
}

/// Where this process is, by proc(5)'s `/proc/PID/cgroup` and `mountinfo`.
fn places_of(groups: &str, mounts: &str) -> Result<Places, String> {
    // "36 35 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory": root, place, then behind the dash type and options.
    let mounted = |wanted: &dyn Fn(&str, &str) -> bool| {
        mounts.lines().find_map(|line| {
            let (first, second) = line.split_once(" - ")?;
            let mut first = first.split(' ').skip(3);
            let (root, place) = (first.next()?, first.next()?);
            let mut second = second.split(' ');
            let (kind, options) = (second.next()?, second.nth(1)?);
            wanted(kind, options).then(|| (root.to_owned(), PathBuf::from(place)))
        })
    };
    // "4:memory:/some/group", "0::/system.slice/coldspark.service".
    let group = |wanted: &dyn Fn(&str) -> bool| {
        groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            wanted(controllers).then(|| path.to_owned())
        })
    };
    let below = |(root, place): (String, PathBuf), path: String| {
        // A container may see a part of the tree only.
        let path =
            path.strip_prefix(root.trim_end_matches('/')).unwrap_or(&path).trim_start_matches('/').to_owned();
        place.join(path)
    };
    let has = |list: &str, wanted: &str| list.split(',').any(|word| word == wanted);
    let split = |name: &str| {
        let mount = mounted(&|kind, options| kind == "cgroup" && has(options, name))?;
        Some(below(mount, group(&|controllers| has(controllers, name))?))
    };
    if let (Some(memory), Some(cpu)) = (split("memory"), split("cpu")) {
        return Ok(Places::Split { memory, cpu });
    }
    let mount = mounted(&|kind, _| kind == "cgroup2").ok_or("no control groups are mounted")?;
    let path = group(&str::is_empty).ok_or("this service is in no control group")?;
    // The root may hold processes, so nobody is ever moved out of it.
    let flat = path != "/";
    let own = below(mount, path);
    // Where systemd has put it, or it has moved to itself; then the places are kept. And where systemd runs what belongs to a service (`doctor`).
    match own.parent().filter(|_| own.ends_with(LEAF) || own.ends_with(".control")) {
        Some(parent) => Ok(Places::Unified { own: parent.to_owned(), flat: false }),
        None => Ok(Places::Unified { own, flat }),
    }
}

/// Makes the groups that hold the VMs' groups.
pub(super) fn prepare(places: &Places, holders: &[Holder]) -> Result<(), String> {
    let text = |(path, error): Failed| format!("{}: {error}", path.display());
    if let Places::Unified { own, .. } = places {
        // The root has no such file, and may hold processes, too.
        if own.join("cgroup.events").exists() {
            step_down(own)?;
        }
        write(&own.join("cgroup.subtree_control"), "+memory +cpu").map_err(text)?;
    }
    for Holder { folder, .. } in holders.iter().filter(|holder| holder.prefix.is_empty()) {
        make(folder).map_err(text)?;
        if matches!(places, Places::Unified { .. }) {
            write(&folder.join("cgroup.subtree_control"), "+memory +cpu").map_err(text)?;
        }
    }
    Ok(())
}

/// A group of version 2 that has groups with controllers can hold no process itself: this service and its workers move into one below. They
/// move nobody else.
fn step_down(own: &Path) -> Result<(), String> {
    if !is_delegated(own) {
        // It would be divided until systemd next looks at it.
        return Err(format!(
            "systemd keeps {} for itself: its unit needs Delegate=cpu memory",
            own.display()
        ));
    }
    let ours = program("self");
    let leaf = own.join(LEAF);
    let procs = own.join("cgroup.procs");
    // Workers may be started meanwhile.
    for _ in 0..8 {
        let text = read(&procs).map_err(|error| format!("{}: {error}", procs.display()))?;
        if text.trim().is_empty() {
            return Ok(());
        }
        make(&leaf).map_err(|(path, error)| format!("{}: {error}", path.display()))?;
        for pid in text.split_whitespace() {
            if program(pid).is_some() && program(pid) != ours {
                return Err(format!(
                    "process {pid} is in the control group {}, too; start the service in one of its own (systemd: Delegate=cpu memory)",
                    own.display()
                ));
            }
            match write(&leaf.join("cgroup.procs"), pid) {
                // It has ended.
                Err((_, error)) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other.map_err(|(path, error)| format!("{}: {error}", path.display()))?,
            }
        }
    }
    Err(format!("processes keep coming in the control group {}", own.display()))
}

/// Whether a group is this service's, where systemd decides that. It says so to everybody from 251 on, and before by the owner.
fn is_delegated(own: &Path) -> bool {
    if std::env::var_os("INVOCATION_ID").is_none() || !rustix::process::geteuid().is_root() {
        return true;
    }
    let mut value = [0; 8];
    ["user.delegate", "trusted.delegate"]
        .iter()
        .any(|name| rustix::fs::getxattr(own, *name, &mut value).is_ok_and(|length| &value[..length] == b"1"))
}

/// The program that a process runs, also one that was replaced since; `None`: it is gone, or may not be looked at.
fn program(pid: &str) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let text = path.to_str().and_then(|text| text.strip_suffix(" (deleted)"));
    Some(text.map(PathBuf::from).unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "5:memory:/box/1\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n";
    const V1_MOUNTS: &str = "25 30 0:22 / /proc rw shared:5 - proc proc rw\n\
        36 35 0:30 / /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory\n\
        37 35 0:31 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        38 35 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn both_versions_are_found_where_they_are() {
        let split =
            Places::Split { memory: "/sys/fs/cgroup/memory/box/1".into(), cpu: "/sys/fs/cgroup/cpu/".into() };
        assert_eq!(places_of(V1, V1_MOUNTS).unwrap(), split);
        let mount = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let unified = |own: &str, flat| Places::Unified { own: own.into(), flat };
        // systemd puts it into the unit's group, or into one below.
        let unit = "/sys/fs/cgroup/system.slice/coldspark.service";
        assert_eq!(places_of("0::/system.slice/coldspark.service\n", mount).unwrap(), unified(unit, true));
        for below in ["service", ".control"] {
            let group = format!("0::/system.slice/coldspark.service/{below}\n");
            assert_eq!(places_of(&group, mount).unwrap(), unified(unit, false));
        }
        assert_eq!(places_of("0::/\n", mount).unwrap(), unified("/sys/fs/cgroup/", false));
        // A part of the tree, as a container sees it.
        let part = "29 23 0:26 /docker/1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(places_of("0::/docker/1/x\n", part).unwrap(), unified("/sys/fs/cgroup/x", true));
        for (groups, mounts) in
            [("", ""), ("0::/\n", ""), ("", mount), ("x", "- - -"), (V1, "1 2 3 - cgroup")]
        {
            assert!(places_of(groups, mounts).is_err(), "{groups:?} {mounts:?}");
        }
    }
}
