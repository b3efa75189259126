//! What this host can do, looked at once: each trial names what it needs and is ignored with the reason if it is
//! not there.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::OnceLock;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// What a trial may need. The error is the reason shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A /dev/kvm that runs guests at all.
    Kvm,
    /// A KVM that runs any kernel, not only the embedded guest.
    KernelMode,
    /// userfaultfd for this user.
    Userfault,
    /// Memory for a VM with RAM above 4 GiB.
    LargeMemory,
    /// Permission to mount a small tmpfs.
    Mount,
    /// Permission to be another user.
    Root,
    /// The inner Linux guest of the rig.
    LinuxGuest,
    /// Permission to make a TAP.
    Tap,
    /// Permission to make a network namespace, and iproute2.
    Netns,
    /// The same, and nftables and nsenter.
    Slots,
    /// The same, and Docker's daemon with both kinds of iptables.
    Dockerd,
    /// A machine of its own with systemd.
    Systemd,
    /// A FreeBSD kernel and disk of the user's.
    FreeBsd,
    /// One like GENERIC, without virtio_mmio; and the disk.
    FreeBsdGeneric,
    /// Its userland has network commands.
    FreeBsdNetwork,
    /// Those commands and its kernel know IPv6, and so does this host.
    FreeBsdNetwork6,
    /// A FreeBSD kernel without IPv6, and the disk with the agent.
    FreeBsdWithout6,
    /// Its userland powers off when the kernel tells it to.
    FreeBsdPower,
    /// Debian's Python with grpcio, and protoc with its plugin.
    PythonGrpc,
    /// Its userland runs the agent.
    FreeBsdAgent,
    /// The wish for a long run.
    FreeBsdSoak,
    /// Control groups with the controllers memory and cpu that this user may make groups in.
    Limits,
    /// A Firecracker to compare with.
    Firecracker,
    /// A QEMU to compare with.
    Qemu,
}

impl Need {
    /// `Err` with the reason when the host has not got it.
    pub fn check(self) -> Result<(), String> {
        match self {
            Need::Kvm => kvm().clone().map(|_| ()),
            Need::KernelMode => match kvm() {
                Ok(KernelMode::Native) => Ok(()),
                Ok(KernelMode::Emulated) => Err("this KVM emulates kernel mode; runs in the rig".into()),
                Err(reason) => Err(reason.clone()),
            },
            Need::Userfault => userfault().clone(),
            Need::LargeMemory => large_memory(),
            Need::Mount => is_root().then_some(()).ok_or_else(|| "only root can mount a small tmpfs".into()),
            Need::Root => is_root().then_some(()).ok_or_else(|| "only root can be another user".into()),
            Need::LinuxGuest => linux_guest().map(|_| ()),
            Need::Tap => tap().clone(),
            Need::Netns => netns().clone(),
            Need::Slots => slots().clone(),
            Need::Dockerd => docker_starts().clone(),
            Need::Systemd => crate::systemd::available(),
            Need::FreeBsd => freebsd().map(|_| ()),
            Need::FreeBsdGeneric => freebsd_generic().map(|_| ()),
            Need::PythonGrpc => python_grpc().clone(),
            Need::FreeBsdAgent => freebsd_agent().map(|_| ()),
            Need::FreeBsdSoak => freebsd_soak().map(|_| ()),
            Need::Limits => coldspark::fleet::cgroup::look().map(drop),
            Need::Firecracker => firecracker().map(|_| ()),
            Need::Qemu => qemu().map(|_| ()),
            Need::FreeBsdNetwork => {
                yes("COLDSPARK_FREEBSD_NETWORK", "no FreeBSD userland with network commands")
            }
            Need::FreeBsdNetwork6 => {
                yes("COLDSPARK_FREEBSD_NETWORK6", "no FreeBSD whose network commands know IPv6")?;
                crate::tap::six::available()
            }
            Need::FreeBsdWithout6 => freebsd_without6().map(|_| ()),
            Need::FreeBsdPower => {
                yes("COLDSPARK_FREEBSD_POWER", "no FreeBSD userland that powers off when told")
            }
        }
    }
}

/// True inside the nested rig: everything is slow there, so trials take fewer clones and longer deadlines.
pub fn in_rig() -> bool {
    std::env::var_os("COLDSPARK_IN_RIG").is_some()
}

/// The folder made by `tests/rig/rig linux-guest`.
pub fn linux_guest() -> Result<PathBuf, String> {
    path_from("COLDSPARK_LINUX_GUEST", "no inner Linux guest (tests/rig/rig linux-guest makes one)")
}

/// Kernel and disk of a FreeBSD.
pub fn freebsd() -> Result<(PathBuf, PathBuf), String> {
    let reason = "no FreeBSD given (docs/testing.md says how)";
    Ok((path_from("COLDSPARK_FREEBSD_KERNEL", reason)?, path_from("COLDSPARK_FREEBSD_DISK", reason)?))
}

/// A kernel like GENERIC, and the disk of [`freebsd`].
pub fn freebsd_generic() -> Result<(PathBuf, PathBuf), String> {
    let reason = "no unmodified FreeBSD kernel given (docs/testing.md says how)";
    Ok((path_from("COLDSPARK_FREEBSD_GENERIC", reason)?, path_from("COLDSPARK_FREEBSD_DISK", reason)?))
}

/// The kernel of [`freebsd`], and a disk whose userland runs the agent.
pub fn freebsd_agent() -> Result<(PathBuf, PathBuf), String> {
    let reason = "no FreeBSD with the agent given (docs/testing.md says how)";
    Ok((path_from("COLDSPARK_FREEBSD_KERNEL", reason)?, path_from("COLDSPARK_FREEBSD_AGENT_DISK", reason)?))
}

/// A kernel that is built without `options INET6`, and the disk of [`freebsd_agent`].
pub fn freebsd_without6() -> Result<(PathBuf, PathBuf), String> {
    let reason = "no FreeBSD kernel without IPv6 given (docs/testing.md says how)";
    let kernel = path_from("COLDSPARK_FREEBSD_KERNEL_WITHOUT_INET6", reason)?;
    Ok((kernel, path_from("COLDSPARK_FREEBSD_AGENT_DISK", reason)?))
}

/// Boots and restores to be done.
pub fn freebsd_soak() -> Result<(u32, u32), String> {
    const SOAK: &str = "COLDSPARK_FREEBSD_SOAK";
    let given = std::env::var(SOAK).unwrap_or_default();
    if given.is_empty() {
        return Err(format!("{SOAK} is not set: no long run is wanted (docs/testing.md)"));
    }
    let counts = given
        .split_once(',')
        .and_then(|(boots, restores)| Some((boots.parse().ok()?, restores.parse().ok()?)));
    counts.ok_or_else(|| format!("{SOAK} is {given:?}, not BOOTS,RESTORES"))
}

/// How long load and faults are to go on.
pub fn faults_seconds() -> u64 {
    let given = std::env::var("COLDSPARK_FAULTS_SECONDS").unwrap_or_default();
    given.parse().unwrap_or(if in_rig() { 60 } else { 20 })
}

/// The Firecracker of the user's.
pub fn firecracker() -> Result<PathBuf, String> {
    path_from("COLDSPARK_FIRECRACKER", "no Firecracker given to compare with")
}

/// The qemu-system-x86_64 of the user's, 9.0 or newer.
pub fn qemu() -> Result<PathBuf, String> {
    path_from("COLDSPARK_QEMU", "no qemu-system-x86_64 (9.0 or newer) given to compare with")
}

fn yes(variable: &str, reason: &str) -> Result<(), String> {
    let told = std::env::var(variable).is_ok_and(|value| value == "yes");
    told.then_some(()).ok_or_else(|| format!("{variable} is not `yes`: {reason}"))
}

fn path_from(variable: &str, reason: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .ok_or_else(|| format!("{variable} is not set: {reason}"))?;
    if path.exists() { Ok(path) } else { Err(format!("{variable}: {} does not exist", path.display())) }
}

/// 6 GiB to spare.
fn large_memory() -> Result<(), String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available_kib = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    if available_kib >= 6 << 20 { Ok(()) } else { Err("less than 6 GiB of memory available".into()) }
}

/// Where Debian's own Python is: another one, first in the path, has none of Debian's packages.
pub const PYTHON: &str = "/usr/bin/python3";

fn python_grpc() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let there = |program: &str, arguments: &[&str]| {
            let mut command = std::process::Command::new(program);
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        // The plugin reads a request from stdin; an empty one is refused, but it is there.
        let plugin = std::process::Command::new("grpc_python_plugin").stdin(Stdio::null()).output().is_ok();
        match there(PYTHON, &["-c", "import grpc, google.protobuf"])
            && there("protoc", &["--version"])
            && plugin
        {
            true => Ok(()),
            false => {
                Err("no grpcio for Python, or no protoc with its plugin (tests/run installs them as root)"
                    .into())
            }
        }
    })
}

fn tap() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(crate::tap::available)
}

fn netns() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(crate::netns::available)
}

fn slots() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        netns().clone()?;
        crate::slots::available()
    })
}

fn docker_starts() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(|| crate::slots::docker::available(&dockerd()?))
}

/// The folder made by `tests/rig/rig docker`.
pub fn dockerd() -> Result<PathBuf, String> {
    slots().clone()?;
    let folder =
        path_from("COLDSPARK_DOCKER", "no Docker (tests/rig/rig docker unpacks one; tests/run does it)")?;
    for program in ["iptables-nft", "iptables-legacy", "ip6tables-legacy"] {
        if !std::path::Path::new("/usr/sbin").join(program).exists() {
            return Err(format!("no {program} (tests/run installs iptables as root)"));
        }
    }
    Ok(folder)
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn userfault() -> &'static Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(|| {
        userfaultfd::UffdBuilder::new()
            .close_on_exec(true)
            .create()
            .map(|_| ())
            .map_err(|error| format!("userfaultfd is not allowed here: {error}"))
    })
}

/// How this KVM runs code of privilege level 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KernelMode {
    Native,
    Emulated,
}

fn kvm() -> &'static Result<KernelMode, String> {
    static FOUND: OnceLock<Result<KernelMode, String>> = OnceLock::new();
    FOUND.get_or_init(probe_kvm)
}

/// Runs `fninit; fldcw [0x2000]; hlt` in real mode. KVM's instruction emulator has no `fldcw`: a host that emulates
/// kernel mode gives up there, one that executes it arrives at `hlt`.
fn probe_kvm() -> Result<KernelMode, String> {
    const CODE: [u8; 7] = [0xdb, 0xe3, 0xd9, 0x2e, 0x00, 0x20, 0xf4];
    const START: usize = 0x1000;
    let unusable = |error: kvm_ioctls::Error| format!("/dev/kvm cannot be used: {error}");
    let kvm = Kvm::new().map_err(|error| format!("no usable /dev/kvm: {error}"))?;
    let vm = kvm.create_vm().map_err(unusable)?;
    let mut memory = vm_memory::MmapRegion::<()>::new(64 << 10).map_err(|error| error.to_string())?;
    write(&mut memory, START, &CODE);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 64 << 10,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the region is a private mapping of that size, and outlives the VM (dropped after it, in reverse order).
    unsafe { vm.set_user_memory_region(region) }.map_err(unusable)?;
    let mut vcpu = vm.create_vcpu(0).map_err(unusable)?;
    let mut sregs = vcpu.get_sregs().map_err(unusable)?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).map_err(unusable)?;
    let mut registers = vcpu.get_regs().map_err(unusable)?;
    registers.rip = START as u64;
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(unusable)?;
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(KernelMode::Native),
        Ok(VcpuExit::InternalError) => Ok(KernelMode::Emulated),
        Ok(other) => Err(format!("/dev/kvm runs guests in an unknown way: {other:?}")),
        Err(error) => Err(unusable(error)),
    }
}

fn write(memory: &mut vm_memory::MmapRegion<()>, offset: usize, bytes: &[u8]) {
    assert!(offset + bytes.len() <= memory.size());
    // SAFETY: in bounds of a mapping that nobody else uses yet.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.as_ptr().add(offset), bytes.len()) };
}
