//! Who a worker is and what it may have: uid, capabilities, limits.
//!
//! Each worker has the uid [`FIRST_UID`] + its process number, which no other process has as long as it lives; so no list of uids in use is to be kept, and
//! none to be handed over to the next daemon. The range is one that systemd's list of uids (<https://systemd.io/UIDS-GIDS/>) calls unused.
//!
//! Facts: credentials(7), capabilities(7), prctl(2), getrlimit(2).

use std::fs;

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// uid, and gid, of the process with the number 0, if there was one.
pub const FIRST_UID: u32 = 0x7000_0000;
/// Process numbers are smaller (proc_sys_kernel(5), pid_max).
const PIDS: u32 = 1 << 22;

/// Of a VM with all disks, layers and vCPUs that there can be, about 700.
const DESCRIPTORS_MAX: u64 = 1024;
/// vCPUs, disk threads, device and control thread, what KVM starts in this process's name, and room.
const THREADS_MAX: u64 = 128;

fn errno(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> String {
    move |error| format!("{what}: {}", std::io::Error::from(error))
}

/// Whether this process may become any of the uids; or why not.
pub fn may_choose_users() -> Result<(), String> {
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let has = capabilities(None).map_err(errno("capget"))?;
    if !has.effective.contains(needed) {
        return Err("the service is not root, and has not got CAP_SETUID and CAP_SETGID".to_owned());
    }
    for map in ["uid_map", "gid_map"] {
        let text = fs::read_to_string(format!("/proc/self/{map}")).unwrap_or_default();
        if !text.lines().any(covers) {
            return Err(format!(
                "this container's user namespace has not got the ids from {FIRST_UID} to {}",
                FIRST_UID + PIDS
            ));
        }
    }
    Ok(())
}

/// A line of user_namespaces(7)'s maps: first id inside, first id outside, how many.
fn covers(line: &str) -> bool {
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    matches!(numbers[..], [first, _, count]
        if first <= FIRST_UID.into() && first + count > u64::from(FIRST_UID) + u64::from(PIDS))
}

/// No supplementary groups.
pub fn leave_groups() -> Result<(), String> {
    set_thread_groups(&[]).map_err(errno("setgroups"))
}

/// A user of this process's own. `pid`: its number where the daemon is.
pub fn become_nobody_else(pid: Option<u32>) -> Result<(), String> {
    let pid =
        pid.filter(|pid| *pid < PIDS).ok_or("the process's number cannot be known: /proc is not there")?;
    let id = FIRST_UID + pid;
    let group = Gid::from_raw(id);
    set_thread_res_gid(group, group, group).map_err(errno("setresgid"))?;
    let user = Uid::from_raw(id);
    set_thread_res_uid(user, user, user).map_err(errno("setresuid"))
}

/// No capabilities but these, and no way to get any.
pub fn reduce(kept: CapabilitySet) -> Result<(), String> {
    set_no_new_privs(true).map_err(errno("no_new_privs"))?;
    let has = capabilities(None).map_err(errno("capget"))?;
    if has.permitted.contains(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
                Ok(()) => {}
                // The kernel knows no more.
                Err(rustix::io::Errno::INVAL) => break,
                Err(error) => return Err(errno("the bounding set")(error)),
            }
        }
        clear_ambient_capability_set().map_err(errno("the ambient set"))?;
    }
    let kept = kept & has.permitted;
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
    .map_err(errno("capset"))
}

/// No core file, and nobody without a capability reads or traces it.
pub fn undumpable() -> Result<(), String> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(errno("PR_SET_DUMPABLE"))
}

/// Limits that are the same for all.
pub fn limit() -> Result<(), String> {
    set(Resource::Core, 0)?;
    set(Resource::Memlock, 0)?;
    set(Resource::Msgqueue, 0)?;
    set(Resource::Nofile, DESCRIPTORS_MAX)
}

/// For one whose uid nobody shares.
pub fn limit_threads() -> Result<(), String> {
    set(Resource::Nproc, THREADS_MAX)
}

fn set(resource: Resource, most: u64) -> Result<(), String> {
    // A limit that is lower already stays.
    let most = rustix::process::getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(errno("a limit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_must_have_all_the_ids() {
        assert!(covers("         0          0 4294967295"));
        assert!(covers("1879048192 5 4194305"));
        assert!(!covers("1879048192 5 4194304"));
        assert!(!covers("1879048193 5 4194305"));
        assert!(!covers("         0     100000      65536"));
        assert!(!covers(""));
    }

    #[test]
    fn the_range_is_one_that_nobody_uses() {
        assert_eq!(FIRST_UID, 1_879_048_192);
        // systemd's list: unused up to here.
        const { assert!(FIRST_UID + PIDS <= 2_147_352_575) };
    }
}
