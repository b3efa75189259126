//! The zygote as the daemon knows it: a process that has done what is the same for every worker, and becomes one by a fork of itself
//! (`worker::zygote`). A worker made so is a child of the daemon, like one that was started by itself, and needs the zygote no more.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::child::Child;
use super::error::FleetError;
use super::limits::ZYGOTE_TIMEOUT;
use crate::worker::channel::Channel;
use crate::worker::protocol::{Forked, ToZygote};

/// A running zygote. Ends when this is dropped.
#[derive(Debug)]
pub struct Zygote {
    child: Child,
    channel: Channel,
}

impl Zygote {
    /// Starts one; it may not be ready yet. Must be called inside a tokio runtime.
    pub fn start(program: &Path, arguments: &[OsString]) -> Result<Self, FleetError> {
        let failed = |what: &str| FleetError::io(format!("cannot {what} a zygote ({})", program.display()));
        let (channel, theirs) = Channel::pair().map_err(failed("make a control socket for"))?;
        channel.set_timeout(ZYGOTE_TIMEOUT).map_err(failed("set the patience with"))?;
        let mut command = Command::new(program);
        command.args(arguments).arg0("coldspark").stdin(Stdio::from(theirs.into_fd())).stdout(Stdio::null());
        let child = Child::spawn(&mut command).map_err(failed("start"))?;
        Ok(Self { child, channel })
    }

    /// For the log: how it ended, if it has.
    pub fn end(&mut self) -> String {
        match self.child.try_wait() {
            Ok(Some(status)) => status.to_string(),
            _ => "it is ended now".to_owned(),
        }
    }

    /// Makes a worker with these as control socket and stderr.
    ///
    /// # Errors
    /// The zygote is of no more use then: it is dead, or what it does nobody knows.
    pub fn fork(&self, control: BorrowedFd<'_>, stderr: BorrowedFd<'_>) -> Result<Child, FleetError> {
        self.channel.send(&ToZygote::Fork, &[control, stderr])?;
        let answer = self.channel.recv::<Forked>().map_err(|error| match error {
            error if error.would_block() => FleetError::WorkerTimeout(ZYGOTE_TIMEOUT.as_secs()),
            error => FleetError::Channel(error),
        });
        match answer?.0 {
            Ok(pid) => Child::adopt(pid).map_err(FleetError::io("cannot watch a worker process")),
            Err(why) => Err(FleetError::Internal(why)),
        }
    }
}
