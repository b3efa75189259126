//! What a worker asks of the kernel for its own process: the socket it was born with, its end with its parent, its name, its heap.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::channel::Channel;
use super::keep::Keep;
use super::protocol::CONTROL_FD;

/// Takes over the inherited control socket, after a look at what it is.
pub fn control_socket() -> io::Result<Channel> {
    let mut kind: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `kind` and `length` are valid for the call; an unusable descriptor is an error, not undefined.
    let result = unsafe {
        libc::getsockopt(CONTROL_FD, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if kind != libc::SOCK_SEQPACKET {
        return Err(io::Error::other("another kind of socket"));
    }
    // SAFETY: it is open, as getsockopt showed, and by the protocol nobody else in this process owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    // SAFETY: an fcntl on our own descriptor, with a plain integer argument.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Channel::from_fd(socket))
}

/// A VM that can be taken over by another daemon does not end with this one any more.
pub fn outlive(keep: &Option<Keep>) {
    if keep.is_some() {
        // SAFETY: prctl with plain integer arguments.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
    }
}

/// Lets the kernel kill this process when its parent goes: a shell may wait for something that only that daemon would have done.
pub fn die_with(control: &Channel) -> Result<(), String> {
    // SAFETY: prctl with plain integer arguments.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(format!("PR_SET_PDEATHSIG: {}", io::Error::last_os_error()));
    }
    // It may have gone before; nobody else has the other end of this. (Who the parent is cannot be asked from a pid namespace of one's own.)
    let mut polled = [PollFd::new(control, PollFlags::empty())];
    match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(0) => Ok(()),
        Ok(_) => Err("the service is gone already".to_owned()),
        Err(error) => Err(format!("control socket: {error}")),
    }
}

/// What this process is called in lists of processes.
pub fn name(name: &CStr) {
    // SAFETY: a string that ends; at most 16 bytes of it are read.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// One heap for all threads: each further one costs system calls and pages, and these threads rarely allocate.
pub fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a limit; no allocation is touched.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}
