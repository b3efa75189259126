//! Namespaces, and the process that holds a pid namespace.
//!
//! Facts: namespaces(7), user_namespaces(7), pid_namespaces(7), pivot_root(2).

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_move, unmount,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{chdir, chroot, getegid, geteuid, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, unshare_unsafe};

use super::{Outside, filter, privileges};

/// Where the empty root is put up; in a namespace in which nobody else is.
const PLACE: &str = "/proc";
const INIT_NAME: &CStr = c"jail-init";

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: this process has one thread, and none of the flags given here parts it from its descriptors.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

fn say(what: &'static str) -> impl FnOnce(io::Error) -> String {
    move |error| format!("{what}: {error}")
}

fn errno(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> String {
    move |error| say(what)(error.into())
}

/// A mount namespace, and if it takes that a user namespace, in which this user may have the others.
pub fn begin() -> Result<(), String> {
    match unshare(UnshareFlags::NEWNS) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() => {}
        result => return result.map_err(say("a mount namespace")),
    }
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    unshare(UnshareFlags::NEWUSER)
        .map_err(say("a user namespace, which it takes for a user that is not root"))?;
    let write = |file: &str, text: String| {
        fs::write(format!("/proc/self/{file}"), text).map_err(say("the maps of a user namespace"))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("{user} {user} 1"))?;
    write("gid_map", format!("{group} {group} 1"))?;
    unshare(UnshareFlags::NEWNS).map_err(say("a mount namespace"))
}

pub fn network() -> Result<(), String> {
    unshare(UnshareFlags::NEWNET).map_err(say("a network namespace"))
}

pub fn ipc() -> Result<(), String> {
    unshare(UnshareFlags::NEWIPC).map_err(say("an ipc namespace"))
}

pub fn host_name() -> Result<(), String> {
    unshare(UnshareFlags::NEWUTS).map_err(say("a uts namespace"))
}

/// Makes an empty, read-only folder the root, and lets go of all that was there.
pub fn empty_root() -> Result<(), String> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(errno("mounts cannot be made private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount("tmpfs", PLACE, "tmpfs", flags, c"size=4k,nr_inodes=2,mode=0555")
        .map_err(errno("an empty file system"))?;
    chdir(PLACE).map_err(errno("chdir"))?;
    match pivot_root(".", ".") {
        // The old root is on top of the new one.
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(errno("the old root cannot be let go"))?,
        // The root is the kernel's first one, which cannot be moved away: an initial RAM disk.
        Err(rustix::io::Errno::INVAL) => {
            mount_move(".", "/").map_err(errno("the empty root cannot be moved"))?;
            chroot(".").map_err(errno("chroot"))?;
        }
        Err(error) => return Err(errno("pivot_root")(error)),
    }
    chdir("/").map_err(errno("chdir"))
}

/// A pid namespace for the children of this process; it lasts as long as somebody has what is returned open.
///
/// Its first process must outlive the zygote, because the kernel kills all with it: so it is one that does nothing but to wait for the end of the others.
pub fn processes(outside: &Outside, own_user: bool) -> Result<OwnedFd, String> {
    // The daemon would not know who its workers are.
    outside.pid().ok_or("/proc is not there")?;
    let (ends, alive) = pipe_with(PipeFlags::CLOEXEC).map_err(errno("a pipe"))?;
    unshare(UnshareFlags::NEWPID).map_err(say("a pid namespace"))?;
    // SAFETY: there is one thread, so the child finds no lock held; it ends in `hold` and returns to nobody.
    match unsafe { libc::fork() } {
        -1 => Err(say("the first process of a pid namespace")(io::Error::last_os_error())),
        0 => {
            drop(alive);
            hold(outside, ends, own_user)
        }
        _ => Ok(alive),
    }
}

/// Waits until nobody has the other end any more. Before, it gives up what it can: what fails here has a second lock somewhere else.
fn hold(outside: &Outside, ends: OwnedFd, own_user: bool) -> ! {
    // SAFETY: a string that ends; at most 16 bytes of it are read.
    unsafe { libc::prctl(libc::PR_SET_NAME, INIT_NAME.as_ptr()) };
    // Whoever is short of memory must not take all VMs at once for it.
    if let Some(proc) = &outside.proc
        && let Ok(file) = openat(proc, "self/oom_score_adj", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
    {
        let _ = rustix::io::write(&file, b"-1000");
    }
    let _ = rustix::process::setsid();
    let pid = outside.pid();
    // SAFETY: nothing of this process but `ends` is used any more, and that has its place at 0 now.
    let ends = unsafe {
        libc::dup2(ends.as_raw_fd(), 0);
        libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0);
        OwnedFd::from_raw_fd(0)
    };
    if own_user {
        let _ = privileges::leave_groups();
        let _ = privileges::reduce(CapabilitySet::SETUID | CapabilitySet::SETGID);
        let _ = privileges::become_nobody_else(pid);
    }
    let _ = privileges::reduce(CapabilitySet::empty());
    let _ = privileges::undumpable();
    if let Ok(filter) = filter::init() {
        let _ = seccompiler::apply_filter(&filter);
    }
    loop {
        match rustix::io::read(&ends, &mut [0u8; 8]) {
            Ok(1..) | Err(rustix::io::Errno::INTR) => {}
            // SAFETY: it ends here; nothing is to be tidied up.
            _ => unsafe { libc::_exit(0) },
        }
    }
}
