//! The zygote: a process that has done what is the same for every worker (it is linked, its memory is there, KVM is open and was asked what
//! it can do) and becomes one by a fork of itself.
//!
//! It stays single-threaded and knows nothing of any VM, so a fork finds no lock held, and has nothing of one worker that another could see. The
//! new process is not its child but its parent's (CLONE_PARENT, clone(2)): the daemon reaps it, it dies with the daemon if the zygote was told to, and
//! a zygote that dies takes nobody along. What workers of one zygote share, and workers started by themselves do not, is the layout of their address space and what the
//! C library drew at random when it began (stack guard, pointer guard).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::channel::{Channel, ChannelError};
use super::protocol::{CONTROL_FD, Forked, ToZygote};

const STDERR_FD: RawFd = 2;
const PR_GET_TID_ADDRESS: libc::c_int = 40;

/// Which of the two processes this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The daemon wants no more workers.
    Zygote,
    /// A worker, new: its control socket is where the zygote's was, its standard error is its own.
    Worker,
}

/// Forks as it is told to on `orders`, which is [`CONTROL_FD`], until that closes; and returns in every process that it made.
///
/// `pid`: tells a new process its number where the daemon is.
pub fn serve(orders: &Channel, pid: impl Fn() -> u32) -> Result<Side, String> {
    let tid = tid_place();
    loop {
        let fds = match orders.recv::<ToZygote>() {
            Ok((ToZygote::Fork, fds)) => fds,
            Err(ChannelError::Closed) => return Ok(Side::Zygote),
            Err(error) => return Err(format!("zygote: {error}")),
        };
        let Ok([control, stderr]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err("zygote: an order without its two descriptors".to_owned());
        };
        match fork(tid) {
            Ok(Side::Zygote) => {}
            Ok(Side::Worker) => {
                settle(orders, pid(), &control, &stderr).map_err(|e| format!("a new worker: {e}"))?;
                return Ok(Side::Worker);
            }
            Err(error) => {
                let why = format!("a worker cannot be made: fork: {error}");
                orders.send::<Forked>(&Err(why), &[]).map_err(|e| format!("zygote: {e}"))?;
            }
        }
    }
}

/// In the new process: tells its number and puts the descriptors into their places.
fn settle(orders: &Channel, pid: u32, control: &OwnedFd, stderr: &OwnedFd) -> Result<(), ChannelError> {
    orders.send::<Forked>(&Ok(pid), &[])?;
    put(stderr, STDERR_FD, 0).map_err(ChannelError::Io)?;
    // Last: `orders` is the control socket from here on, and nobody but the zygote hears its orders.
    put(control, CONTROL_FD, libc::O_CLOEXEC).map_err(ChannelError::Io)
}

pub(super) fn put(fd: &OwnedFd, place: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: both places belong to this process by the protocol; whoever has one of them as its own goes on with what is put there.
    match unsafe { libc::dup3(fd.as_raw_fd(), place, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// fork(2), but for a child of this process's parent. The C library's own cannot do that; what it would do besides is nothing in a process with one thread, but for
/// the thread's number, `tid`.
fn fork(tid: Option<usize>) -> io::Result<Side> {
    let flags = libc::CLONE_PARENT
        | if tid.is_some() { libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID } else { 0 };
    // SAFETY: without CLONE_VM the new process has a copy of this one's memory, stack included, and goes on in it; there is one thread, so no
    // lock is held and nothing is half done. Its descriptors are copies, each its own to close. `tid` is where this thread's number is kept.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, tid.unwrap_or(0), 0usize) };
    match result {
        0 => Ok(Side::Worker),
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(Side::Zygote),
    }
}

/// Where the C library keeps the number of this thread, so that it has the right one after a fork: the place that it named to the kernel, if that number is there.
fn tid_place() -> Option<usize> {
    let mut place: usize = 0;
    // SAFETY: writes one pointer to `place`.
    if unsafe { libc::prctl(PR_GET_TID_ADDRESS, &raw mut place) } != 0 || place == 0 {
        return None;
    }
    // SAFETY: the place that set_tid_address(2) was told, which is valid as long as the thread: the kernel writes there when it ends. One aligned word,
    // which nobody changes meanwhile.
    let there = unsafe { std::ptr::with_exposed_provenance::<libc::pid_t>(place).read_volatile() };
    // SAFETY: no arguments, cannot fail.
    (there == unsafe { libc::gettid() }).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_env = "gnu")]
    fn the_place_of_a_threads_number_is_found() {
        std::thread::spawn(|| assert!(tid_place().is_some())).join().unwrap();
    }

    #[test]
    fn an_order_without_descriptors_ends_it_and_so_does_the_end() {
        let (daemon, orders) = Channel::pair().unwrap();
        daemon.send(&ToZygote::Fork, &[]).unwrap();
        assert!(serve(&orders, std::process::id).unwrap_err().contains("two descriptors"));
        drop(daemon);
        assert_eq!(serve(&orders, std::process::id), Ok(Side::Zygote));
    }
}
