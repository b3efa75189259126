//! What a worker holds so that its VM outlives the daemon, and the door at which the next daemon takes it over.
//!
//! The daemon's ends of the console and agent sockets and of the stderr pipe are held here too, so for the devices nothing
//! changes when the daemon goes: what the guest says waits in the sockets, and what has no room there in the guest, as for a slow daemon.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with, listen};
use rustix::process::setpgid;

use super::channel::Channel;
use super::fault;
use super::protocol::{CONTROL_VERSION, DiskSpec, Fault, Greeting};
use super::say;

/// How long somebody at the door may take to say who they are.
const GREETING_WITHIN: Duration = Duration::from_secs(10);
/// Connections that may wait at the door.
const WAITING_MAX: i32 = 8;

/// What a disk is made of.
pub struct DiskFiles {
    pub spec: DiskSpec,
    /// Base, layers from the lowest, overlay.
    pub files: Vec<OwnedFd>,
}

impl DiskFiles {
    /// Holds one more.
    pub fn add(&mut self, file: &File) -> Result<(), Fault> {
        self.files.push(file.as_fd().try_clone_to_owned().map_err(fault::io("a disk's file"))?);
        Ok(())
    }
}

/// What a frozen disk goes on with.
pub struct Next {
    /// The old overlay, for reading only.
    pub sealed: OwnedFd,
    pub overlay: OwnedFd,
}

/// The disks were frozen: those with an overlay go on with these, from the first; where `became_layer` the old one is a layer now. What was
/// open for writing is closed.
pub fn frozen(disks: &mut [DiskFiles], became_layer: &[bool], overlays: Vec<Next>) {
    let mut overlays = overlays.into_iter();
    for (n, disk) in
        disks.iter_mut().enumerate().filter(|(_, disk)| !disk.spec.read_only && !disk.spec.direct)
    {
        let Some(next) = overlays.next() else { return };
        disk.files.pop();
        if became_layer.get(n).copied().unwrap_or(false) {
            disk.spec.layers = disk.spec.layers.saturating_add(1);
            disk.files.push(next.sealed);
        }
        disk.files.push(next.overlay);
    }
}

/// See the module.
pub struct Keep {
    door: OwnedFd,
    console: OwnedFd,
    /// Another one when the guest is booted again.
    pub agent: OwnedFd,
    stderr: OwnedFd,
    orphan_time: Duration,
    /// The user whose daemon it is: who is let in besides root.
    owner: u32,
}

impl Keep {
    /// From the descriptors of [`Request::Keep`](super::protocol::Request::Keep).
    pub fn new(fds: Vec<OwnedFd>, orphan_time: Duration, owner: u32) -> Result<Self, Fault> {
        let Ok([door, console, agent, stderr]) = <[OwnedFd; 4]>::try_from(fds) else {
            return Err(fault::descriptors("not as many as Keep has"));
        };
        let io = |error: rustix::io::Errno| io::Error::from(error);
        // By this process: who connects is told by the kernel who listens.
        listen(&door, WAITING_MAX).map_err(io).map_err(fault::io("the door cannot be opened"))?;
        // A pipe that nobody reads for a while must not hold a thread up: what has no room is lost.
        rustix::fs::fcntl_setfl(io::stderr().as_fd(), rustix::fs::OFlags::NONBLOCK)
            .map_err(io)
            .map_err(fault::io("stderr"))?;
        // What a terminal sends to the daemon (Ctrl-C) is not for the VMs that it leaves behind. It fails for one that leads its group already.
        let _ = setpgid(None, None);
        Ok(Self { door, console, agent, stderr, orphan_time, owner })
    }

    /// What the next daemon is given.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.stderr.as_fd(), self.console.as_fd(), self.agent.as_fd()]
    }

    /// Waits for the next daemon; `None` when none came in time.
    pub fn wait(&self) -> io::Result<Option<Channel>> {
        let until = Instant::now() + self.orphan_time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            let mut door = [PollFd::new(&self.door, PollFlags::IN)];
            match poll(&mut door, Some(&timeout)) {
                Ok(0) if left.is_zero() => return Ok(None),
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match self.accept() {
                Ok(Some(channel)) => return Ok(Some(channel)),
                Ok(None) => {}
                Err(error) => say(&format!("somebody at the door of this VM: {error}")),
            }
        }
    }

    /// One who has come; `None`: they are not let in.
    fn accept(&self) -> io::Result<Option<Channel>> {
        let socket = accept_with(&self.door, SocketFlags::CLOEXEC)?;
        let channel = Channel::from_fd(socket);
        let who = channel.peer_user()?;
        if who != self.owner && who != 0 {
            return Err(io::Error::other(format!("user {who} is not let in")));
        }
        channel.set_timeout(GREETING_WITHIN)?;
        let theirs = match channel.recv::<Greeting>() {
            Ok((greeting, _)) => greeting.version(),
            // It was killed, too.
            Err(super::ChannelError::Closed) => return Ok(None),
            Err(error) => return Err(io::Error::other(error.to_string())),
        };
        // Also to another version: it is to know why it is not let in.
        channel.send(&Greeting::ours(), &[]).map_err(|error| io::Error::other(error.to_string()))?;
        match theirs {
            Some(CONTROL_VERSION) => {
                channel.set_timeout(Duration::ZERO)?;
                Ok(Some(channel))
            }
            Some(version) => Err(io::Error::other(format!(
                "a service of control protocol {version}, and this is {CONTROL_VERSION}: it is not let in"
            ))),
            None => Err(io::Error::other("it is no service of ours")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, connect, socket_with};
    use std::path::Path;

    fn socket() -> OwnedFd {
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn keep(path: &Path, orphan_time: Duration) -> Keep {
        let door = socket();
        bind(&door, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&door, WAITING_MAX).unwrap();
        let other = || File::open("/dev/null").unwrap().into();
        let owner = rustix::process::geteuid().as_raw();
        Keep { door, console: other(), agent: other(), stderr: other(), orphan_time, owner }
    }

    fn knock(path: &Path) -> Channel {
        let visitor = socket();
        connect(&visitor, &SocketAddrUnix::new(path).unwrap()).unwrap();
        Channel::from_fd(visitor)
    }

    #[test]
    fn only_one_of_its_own_version_is_let_in_and_the_others_hear_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("door");
        let keep = keep(&path, Duration::from_secs(60));
        // One that was killed at the door, one of another version, one that talks nonsense, and then the right one.
        drop(knock(&path));
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(b"CSADOPT\0");
        bytes[8..].copy_from_slice(&(CONTROL_VERSION + 1).to_le_bytes());
        let newer = knock(&path);
        newer.send(&bytes, &[]).unwrap();
        let stranger = knock(&path);
        stranger.send(&[7u8; 12], &[]).unwrap();
        let right = knock(&path);
        right.send(&Greeting::ours(), &[]).unwrap();
        let inside = keep.wait().unwrap().expect("the right one");
        for visitor in [&newer, &stranger, &right] {
            assert_eq!(visitor.recv::<Greeting>().unwrap().0.version(), Some(CONTROL_VERSION));
        }
        assert!(newer.recv::<Greeting>().is_err() && stranger.recv::<Greeting>().is_err());
        inside.send(&1u8, &[]).unwrap();
        assert_eq!(right.recv::<u8>().unwrap().0, 1);
    }

    #[test]
    fn when_nobody_comes_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let keep = keep(&folder.path().join("door"), Duration::from_millis(1));
        assert!(keep.wait().unwrap().is_none());
    }
}
