//! What of the system around KVM matters: userfaultfd, memory, limits, cgroup.

use std::fs;

use rustix::process::Resource;
use userfaultfd::UffdBuilder;

use super::Finding;
use crate::cli::units;
use crate::fleet::slots::barriers::{self, Barrier};
use crate::fleet::slots::tools;

/// Less than this and a few guests fill it.
const MEMORY_BYTES_MIN: u64 = 1 << 30;
/// Descriptors: about ten a VM.
const DESCRIPTORS_MIN: u64 = 4096;
/// Tasks: a worker has three threads and more.
const TASKS_MIN: u64 = 1024;

pub fn check() -> Vec<Finding> {
    let mut findings = vec![
        userfault(),
        memory(),
        huge_pages(),
        descriptors(),
        locked_memory(),
        networks(),
        limits(),
        leases(),
    ];
    findings.extend(cgroup());
    findings
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn userfault() -> Finding {
    const NAME: &str = "userfaultfd";
    // Faults of the kernel itself count: KVM touches guest memory from there.
    match UffdBuilder::new().close_on_exec(true).non_blocking(true).user_mode_only(false).create() {
        Ok(_) => {
            Finding::ok(NAME, "may be used, faults from the kernel included: memory mode USERFAULT works")
        }
        Err(error) => Finding::warn(
            NAME,
            format!(
                "cannot be used for faults from the kernel ({error}): memory mode USERFAULT is refused, MAPPED works"
            ),
            "sysctl vm.unprivileged_userfaultfd=1, or give the user access to /dev/userfaultfd, or run as root",
        ),
    }
}

/// A line of /proc/meminfo, in bytes.
fn memory_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

fn memory() -> Finding {
    const NAME: &str = "memory";
    let text = read("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(available)) = (memory_line(&text, "MemTotal"), memory_line(&text, "MemAvailable"))
    else {
        return Finding::warn(NAME, "/proc/meminfo cannot be read", "mount /proc");
    };
    let found = format!("{} available of {}", units::bytes(available), units::bytes(total));
    match available >= MEMORY_BYTES_MIN {
        true => Finding::ok(NAME, found),
        false => Finding::warn(NAME, found, "give the host more memory, or VMs less (--memory 64M)"),
    }
}

fn huge_pages() -> Finding {
    const NAME: &str = "huge pages";
    match read("/sys/kernel/mm/transparent_hugepage/enabled") {
        Some(modes) if !modes.contains("[never]") => Finding::ok(NAME, format!("transparent: {modes}")),
        Some(modes) => Finding::warn(
            NAME,
            format!("transparent huge pages are off ({modes})"),
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: clones touch memory much faster with them",
        ),
        None => Finding::warn(
            NAME,
            "this kernel has no transparent huge pages",
            "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE: clones touch memory much faster with them",
        ),
    }
}

/// Soft and hard limit.
fn limit(resource: Resource) -> (u64, u64) {
    let limit = rustix::process::getrlimit(resource);
    (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
}

fn amount(value: u64) -> String {
    if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() }
}

fn descriptors() -> Finding {
    const NAME: &str = "open files";
    let (_, hard) = limit(Resource::Nofile);
    let found = format!("up to {}, enough for about {} VMs", amount(hard), hard / 10);
    match hard >= DESCRIPTORS_MIN {
        true if hard == libc::RLIM_INFINITY => Finding::ok(NAME, "unlimited"),
        true => Finding::ok(NAME, found),
        false => {
            Finding::warn(NAME, found, "raise the hard limit (ulimit -Hn, LimitNOFILE= of a systemd unit)")
        }
    }
}

fn locked_memory() -> Finding {
    let (soft, _) = limit(Resource::Memlock);
    let found = match soft {
        libc::RLIM_INFINITY => "unlimited".to_owned(),
        bytes => units::bytes(bytes),
    };
    Finding::ok("locked memory", format!("{found} (nothing is locked by default)"))
}

/// For `--memory-limit` and `--cpu-limit`.
fn limits() -> Finding {
    const NAME: &str = "limits of VMs";
    match crate::fleet::cgroup::look() {
        Ok(version) => Finding::ok(NAME, format!("memory and CPU, by control groups of {version}")),
        Err(why) => Finding::warn(
            NAME,
            format!("not here ({why}): --memory-limit and --cpu-limit are refused"),
            "run the service as root, or give it a control group of its own (systemd: as in deploy/coldspark.service)",
        ),
    }
}

/// What a worker has written must be let go before it is published; leases tell.
fn leases() -> Finding {
    const NAME: &str = "file leases";
    match read("/proc/sys/fs/leases-enable").as_deref() {
        Some("1") => Finding::ok(NAME, "are on: no snapshot is published that a worker could still change"),
        _ => Finding::warn(
            NAME,
            "are off: that workers have let go of what they wrote is not checked before a snapshot is published",
            "sysctl -w fs.leases-enable=1; and keep the data folder on a local file system (ext4, XFS, btrfs)",
        ),
    }
}

fn networks() -> Finding {
    const NAME: &str = "networks";
    let missing: Vec<&str> =
        ["ip", "nft"].into_iter().filter(|program| tools::find(program).is_none()).collect();
    if !missing.is_empty() {
        return Finding::warn(
            NAME,
            format!("no program {}: `serve --networks` and `--net auto` do not work", missing.join(" and ")),
            "apt install iproute2 nftables; only needed for networks that the service makes",
        );
    }
    // None without the rights to look.
    let barriers = barriers::find("cs", "").unwrap_or_default();
    if !barriers.is_empty() {
        return Finding::warn(
            NAME,
            format!(
                "guests with `--net auto` reach nothing beyond this host, and are not reached from there: {}",
                barriers.iter().map(Barrier::text).collect::<Vec<_>>().join(", ")
            ),
            barriers.iter().flat_map(|barrier| barrier.remedies("cs")).collect::<Vec<_>>().join("; "),
        );
    }
    match read("/proc/sys/net/ipv4/ip_forward").as_deref() {
        Some("1") => Finding::ok(
            NAME,
            "ip and nft are there, and the host forwards: `serve --networks N` works as root",
        ),
        _ => Finding::warn(
            NAME,
            "ip and nft are there, but the host does not forward: guests with `--net auto` reach nothing beyond it",
            "sysctl -w net.ipv4.ip_forward=1, and for IPv6 net.ipv6.conf.all.forwarding=1; only needed for `serve --networks`",
        ),
    }
}

fn cgroup() -> Vec<Finding> {
    const NAME: &str = "cgroup";
    let own = read("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return vec![Finding::ok(NAME, "version 1 or none: its limits are not looked at")];
    };
    let mut findings = Vec::new();
    let value = |file: &str| read(&format!("/sys/fs/cgroup{}/{file}", path.trim_end_matches('/')));
    let number = |file: &str| value(file).and_then(|text| text.parse::<u64>().ok());
    if let Some(tasks) = number("pids.max").filter(|tasks| *tasks < TASKS_MIN) {
        findings.push(Finding::warn(
            NAME,
            format!("at most {tasks} tasks in {path}"),
            "raise pids.max (TasksMax= of a systemd unit): each VM is a process of three threads and more",
        ));
    }
    if let Some(bytes) = number("memory.max").filter(|bytes| *bytes < MEMORY_BYTES_MIN) {
        findings.push(Finding::warn(
            NAME,
            format!("at most {} of memory in {path}", units::bytes(bytes)),
            "raise memory.max (MemoryMax= of a systemd unit)",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(NAME, format!("version 2, no tight limit on {path}")));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0";
        assert_eq!(memory_line(text, "MemTotal"), Some(24_000_000 * 1024));
        assert_eq!(memory_line(text, "MemAvailable"), Some(1000 * 1024));
        assert_eq!(memory_line(text, "MemFree"), None);
        assert_eq!(memory_line("MemTotal: x kB", "MemTotal"), None);
    }
}
