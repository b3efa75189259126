//! Worker processes: starting them, ending them, and knowing why they died.
//!
//! Workers are told to die with their parent. The kernel counts the *thread* that forked as the parent (prctl(2),
//! PR_SET_PDEATHSIG), and tokio's blocking threads come and go: so one thread that lives as long as the fleet
//! starts all of them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot, watch};

use super::error::FleetError;
use super::limits::{LAST_WORDS_MAX, STDERR_LINE_BYTES_MAX};
use crate::worker::channel::Channel;

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerProgram {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

impl Default for WorkerProgram {
    /// This very program, also when its file has been replaced meanwhile.
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            arguments: vec!["worker".into(), "--die-with-parent".into()],
        }
    }
}

/// A running or ended worker process. Clones of this name the same process.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    kill: Arc<Notify>,
    ended: watch::Receiver<Option<ExitStatus>>,
    tail: Arc<Mutex<VecDeque<String>>>,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks for SIGKILL; [`Process::ended`] tells when it is done. Harmless if it has ended.
    pub fn kill(&self) {
        self.kill.notify_one();
    }

    /// Waits until the process has ended and was reaped.
    pub async fn ended(&self) -> Option<ExitStatus> {
        let mut ended = self.ended.clone();
        let status = ended.wait_for(Option::is_some).await.ok()?;
        *status
    }

    /// Why it died, for a VM's exit reason: how it ended and what it wrote last.
    pub fn obituary(&self, status: Option<ExitStatus>) -> String {
        let mut text = match status {
            None => "its worker process was lost".to_owned(),
            Some(status) => match (status.signal(), status.code()) {
                (Some(signal), _) => format!("its worker was killed by {}", signal_name(signal)),
                (None, Some(code)) => format!("its worker ended with status {code}"),
                (None, None) => format!("its worker ended: {status}"),
            },
        };
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if !tail.is_empty() {
            let lines: Vec<&str> = tail.iter().map(String::as_str).collect();
            text = format!("{text}; its last words: {}", lines.join(" | "));
        }
        text
    }
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGKILL => "SIGKILL (by somebody, or by the kernel for want of memory: see dmesg)",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS (a memory file behind it became shorter, or the disk failed)",
        libc::SIGABRT => "SIGABRT",
        libc::SIGSYS => "SIGSYS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGILL => "SIGILL",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

type Started = Result<(Child, Channel), FleetError>;

/// The thread that starts workers. Ends, and with it every worker it started, when this is dropped.
#[derive(Debug)]
pub struct Spawner {
    orders: std::sync::mpsc::Sender<oneshot::Sender<Started>>,
}

impl Spawner {
    /// Must be called inside a tokio runtime.
    pub fn start(program: WorkerProgram) -> Result<Self, FleetError> {
        let (orders, inbox) = std::sync::mpsc::channel::<oneshot::Sender<Started>>();
        let runtime = Handle::current();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                let _runtime = runtime.enter();
                while let Ok(order) = inbox.recv() {
                    if !order.is_closed() {
                        let _ = order.send(start(&program));
                    }
                }
            })
            .map_err(FleetError::io("cannot start a thread"))?;
        Ok(Self { orders })
    }

    /// Starts one worker; gives the daemon's end of its control socket.
    pub async fn spawn(&self) -> Result<(Process, Channel), FleetError> {
        let (order, started) = oneshot::channel();
        let gone =
            || FleetError::Internal("the thread that starts workers has ended; restart the service".into());
        self.orders.send(order).map_err(|_| gone())?;
        let (mut child, channel) = started.await.map_err(|_| gone())??;
        let pid = child.id().unwrap_or_default();
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let reading = child.stderr.take().map(|stderr| tokio::spawn(listen(pid, stderr, Arc::clone(&tail))));
        let (ended_in, ended) = watch::channel(None);
        let kill = Arc::new(Notify::new());
        let process = Process { pid, kill: Arc::clone(&kill), ended, tail };
        tokio::spawn(async move {
            let status = loop {
                tokio::select! {
                    status = child.wait() => break status,
                    () = kill.notified() => {
                        // It may have ended by itself just now.
                        let _ = child.start_kill();
                    }
                }
            };
            // Its last words come before its end, unless somebody else holds its stderr open.
            if let Some(reading) = reading {
                let _ = tokio::time::timeout(std::time::Duration::from_millis(200), reading).await;
            }
            let status = status.unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL));
            let _ = ended_in.send(Some(status));
        });
        Ok((process, channel))
    }
}

fn start(program: &WorkerProgram) -> Started {
    let (ours, theirs) = Channel::pair().map_err(FleetError::io("cannot make a control socket"))?;
    let mut command = Command::new(&program.program);
    command.args(&program.arguments).arg0("coldspark");
    // The control socket is standard input, `CONTROL_FD`. With nothing to be run between fork and exec the standard library takes
    // posix_spawn, which neither copies this process's page tables nor makes its next writes fault.
    command
        .stdin(Stdio::from(theirs.into_fd()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(false);
    let child = command
        .spawn()
        .map_err(FleetError::io(format!("cannot start a worker process ({})", program.program.display())))?;
    Ok((child, ours))
}

/// Passes a worker's stderr on to the log and keeps the last lines.
async fn listen(pid: u32, stderr: ChildStderr, tail: Arc<Mutex<VecDeque<String>>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end is taken in pieces.
        match (&mut reader).take(STDERR_LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim_end().replace(char::is_control, "?");
        if text.is_empty() {
            continue;
        }
        tracing::info!(target: "coldspark::worker", pid, "{text}");
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.len() == LAST_WORDS_MAX {
            tail.pop_front();
        }
        tail.push_back(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::channel::{AsyncChannel, ChannelError};

    fn shell(script: &str) -> WorkerProgram {
        WorkerProgram { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] }
    }

    #[tokio::test]
    async fn a_worker_that_dies_leaves_its_last_words() {
        let spawner = Spawner::start(shell("echo one >&2; echo 'no memory' >&2; exit 3")).unwrap();
        let (process, channel) = spawner.spawn().await.unwrap();
        let status = process.ended().await;
        let text = process.obituary(status);
        assert_eq!(text, "its worker ended with status 3; its last words: one | no memory");
        let channel = AsyncChannel::new(channel).unwrap();
        assert!(matches!(channel.recv::<u8>().await, Err(ChannelError::Closed)));
    }

    #[tokio::test]
    async fn a_worker_has_the_control_socket_as_standard_input_and_can_be_killed() {
        // The word 7 as one packet, then wait.
        let spawner = Spawner::start(shell("printf '\\007' >&0; exec sleep 1000")).unwrap();
        let (process, channel) = spawner.spawn().await.unwrap();
        let channel = AsyncChannel::new(channel).unwrap();
        assert_eq!(channel.recv::<u8>().await.unwrap().0, 7);
        process.kill();
        let status = process.ended().await;
        assert!(process.obituary(status).starts_with("its worker was killed by SIGKILL"));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let spawner =
            Spawner::start(WorkerProgram { program: "/nonexistent".into(), arguments: vec![] }).unwrap();
        let error = spawner.spawn().await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
