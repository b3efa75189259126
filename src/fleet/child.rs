//! A child process of the daemon, however it came to be: its end is seen through a pidfd, which takes no signal handler and no thread, and it is
//! reaped by nobody but its owner, so until then its number is its own. Facts: pidfd_open(2), waitpid(2); Linux 5.3.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::{PoisonError, RwLock};

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, pidfd_send_signal, waitpid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A child has all of this process's descriptors until it has begun its program.
static SPAWNING: RwLock<()> = RwLock::new(());

/// Starts a program. Who starts one of this process's otherwise spoils [`undisturbed`].
pub fn spawn(command: &mut Command) -> io::Result<std::process::Child> {
    let _begun = SPAWNING.read().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

/// Does `work` while no child has descriptors of this process: what is closed in it is closed. Blocks while one is being started.
pub fn undisturbed<T>(work: impl FnOnce() -> T) -> T {
    let _none = SPAWNING.write().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// A child that is killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Child {
    owned: Owned,
    /// Readable when it has ended.
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Starts a program. With nothing to be run between fork and exec the standard library takes posix_spawn, which neither copies this
    /// process's page tables nor makes its next writes fault. Must be called inside a tokio runtime.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        Self::adopt(spawn(command)?.id())
    }

    /// Takes over the child with this number, for which nobody else waits; it is killed if that fails. Must be called inside a tokio runtime.
    pub fn adopt(pid: u32) -> io::Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let Some(number) = number else {
            return Err(io::Error::other(format!("{pid} is not the number of a process")));
        };
        let owned = Owned { pid: number, ended: None };
        let fd = pidfd_open(number, PidfdFlags::empty())?;
        // SAFETY: an `OwnedFd` is open and stays the same as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { owned, pidfd })
    }

    pub fn pid(&self) -> u32 {
        self.owned.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// SIGKILL. Harmless when it has ended.
    pub fn kill(&self) {
        self.owned.kill();
    }

    /// Waits until it has ended, and reaps it. May be given up and begun again.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            self.pidfd.readable().await?.clear_ready();
        }
    }

    /// It is nobody's child from now on: neither killed nor reaped.
    pub fn release(mut self) {
        self.owned.ended = Some(ExitStatus::default());
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.owned.wait(WaitOptions::NOHANG)
    }
}

/// A process that is somebody else's child. It is neither reaped here nor killed when this is dropped.
#[derive(Debug)]
pub struct Ward {
    pid: Pid,
    /// Readable when it has ended; it stands for this process also when its number has gone to another.
    pidfd: AsyncFd<OwnedFd>,
}

impl Ward {
    /// Must be called inside a tokio runtime. Whether it is the process that was meant must be seen afterwards: its number may have gone to
    /// another before.
    pub fn watch(pid: Pid) -> io::Result<Self> {
        let fd = pidfd_open(pid, PidfdFlags::empty())?;
        // SAFETY: an `OwnedFd` is open and stays the same as long as it lives.
        let pidfd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { pid, pidfd })
    }

    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// SIGKILL. Harmless when it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Waits until it has ended. May be given up and begun again.
    pub async fn ended(&self) -> io::Result<()> {
        self.pidfd.readable().await.map(drop)
    }
}

/// The child's number, until it is reaped.
#[derive(Debug)]
struct Owned {
    pid: Pid,
    ended: Option<ExitStatus>,
}

impl Owned {
    fn kill(&self) {
        if self.ended.is_none() {
            // A child that was not reaped: the number is still its own.
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }

    fn wait(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        while self.ended.is_none() {
            match waitpid(Some(self.pid), options) {
                Ok(None) => return Ok(None),
                Ok(Some((_, status))) => self.ended = Some(ExitStatus::from_raw(status.as_raw())),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.ended)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
        let _ = self.wait(WaitOptions::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    fn child(script: &str) -> Child {
        Child::spawn(Command::new("/bin/sh").arg("-c").arg(script)).unwrap()
    }

    #[tokio::test]
    async fn the_end_is_seen_and_how_it_came() {
        let mut child = child("exit 7");
        assert_eq!(child.wait().await.unwrap().code(), Some(7));
        // Once more, and harmless.
        child.kill();
        assert_eq!(child.wait().await.unwrap().code(), Some(7));
    }

    #[tokio::test]
    async fn it_can_be_killed_while_it_is_waited_for() {
        let mut child = child("exec sleep 1000");
        assert_eq!(child.try_wait().unwrap(), None);
        let waited = tokio::time::timeout(std::time::Duration::from_millis(1), child.wait()).await;
        assert!(waited.is_err());
        child.kill();
        assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
    }

    #[tokio::test]
    async fn nothing_is_left_of_one_that_is_dropped() {
        let child = child("exec sleep 1000");
        let place = format!("/proc/{}", child.pid());
        assert!(Path::new(&place).exists());
        drop(child);
        assert!(!Path::new(&place).exists(), "alive, or a zombie");
    }

    #[tokio::test]
    async fn one_that_is_released_lives_on_and_can_be_watched_as_a_strangers() {
        let child = child("exec sleep 1000");
        let pid = child.pid();
        child.release();
        let ward = Ward::watch(Pid::from_raw(pid.cast_signed()).unwrap()).unwrap();
        let waited = tokio::time::timeout(std::time::Duration::from_millis(1), ward.ended()).await;
        assert!(waited.is_err(), "it was killed with its name");
        ward.kill();
        ward.ended().await.unwrap();
        // A second word to one that has ended is harmless; the test's process reaps it.
        ward.kill();
        assert_eq!(Child::adopt(pid).unwrap().wait().await.unwrap().signal(), Some(libc::SIGKILL));
    }

    #[tokio::test]
    async fn what_is_no_child_is_refused() {
        assert!(Child::adopt(0).is_err());
        assert!(Child::adopt(u32::MAX).is_err());
    }
}
