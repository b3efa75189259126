//! Worker processes: starting them, ending them, and knowing why they died.
//!
//! Workers are told to die with their parent. The kernel counts the *thread* that forked as the parent (prctl(2),
//! PR_SET_PDEATHSIG), and tokio's blocking threads come and go: so one thread that lives as long as the fleet
//! starts all of them. (A worker that can be taken over by another daemon ends that dependence when it becomes a VM.)

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot, watch};

use super::child::{Child, Ward};
use super::error::FleetError;
use super::limits::{LAST_WORDS_MAX, LOG_LINE_EVERY, LOG_LINES_AT_ONCE, STDERR_LINE_BYTES_MAX, ZYGOTE_RETRY};
use super::zygote::Zygote;
use crate::worker::channel::Channel;
use crate::worker::protocol::JailMode;

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerProgram {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// With these instead it is a zygote; without, each worker is started by itself.
    pub zygote: Option<Vec<OsString>>,
}

impl Default for WorkerProgram {
    fn default() -> Self {
        Self::jailed(JailMode::default())
    }
}

impl WorkerProgram {
    /// This very program, also when its file has been replaced meanwhile.
    pub fn jailed(mode: JailMode) -> Self {
        let mut arguments: Vec<OsString> =
            vec!["worker".into(), "--die-with-parent".into(), format!("--jail={}", mode.name()).into()];
        let alone = arguments.clone();
        arguments.push("--zygote".into());
        Self { program: "/proc/self/exe".into(), arguments: alone, zygote: Some(arguments) }
    }
}

/// A running or ended worker process. Clones of this name the same process.
#[derive(Debug, Clone)]
pub struct Process {
    pid: u32,
    kill: Arc<Notify>,
    release: Arc<Notify>,
    /// When it has ended: how, where that can be known.
    ended: watch::Receiver<Option<Option<ExitStatus>>>,
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
        status.flatten()
    }

    /// Leaves it to another service: it is not ended with this one.
    pub async fn release(&self) {
        let mut ended = self.ended.clone();
        self.release.notify_one();
        while ended.changed().await.is_ok() {}
    }

    /// A worker that an earlier service has started, and its stderr.
    pub fn adopt(ward: Ward, stderr: pipe::Receiver) -> Self {
        let (process, mut watched) = Watched::begin(ward.pid(), stderr);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = ward.ended() => break,
                    () = watched.kill.notified() => ward.kill(),
                    () = watched.release.notified() => return,
                }
            }
            watched.ended(None).await;
        });
        process
    }

    /// The reading end of a worker's stderr.
    pub fn stderr(fd: OwnedFd) -> Result<pipe::Receiver, FleetError> {
        pipe::Receiver::from_owned_fd(fd).map_err(FleetError::io("cannot watch a worker's stderr"))
    }

    /// Why it died, for a VM's exit reason: how it ended and what it wrote last.
    pub fn obituary(&self, status: Option<ExitStatus>) -> String {
        let mut text = match status {
            None => "its worker has ended (how is told to the service only that started it)".to_owned(),
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
        libc::SIGSYS => "SIGSYS (it made a system call that its jail does not allow)",
        libc::SIGTERM => "SIGTERM",
        libc::SIGILL => "SIGILL",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

/// A worker that has just begun, and the daemon's ends of its control socket and its stderr.
type Started = Result<(Child, Channel, PipeReader), FleetError>;

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
                let mut starter = Starter::new(program);
                while let Ok(order) = inbox.recv() {
                    if !order.is_closed() {
                        let _ = order.send(starter.start());
                    }
                }
            })
            .map_err(FleetError::io("cannot start a thread"))?;
        Ok(Self { orders })
    }

    /// Starts one worker; gives the daemon's end of its control socket, and a second descriptor of that of its stderr.
    pub async fn spawn(&self) -> Result<(Process, Channel, OwnedFd), FleetError> {
        let (order, started) = oneshot::channel();
        let gone =
            || FleetError::Internal("the thread that starts workers has ended; restart the service".into());
        self.orders.send(order).map_err(|_| gone())?;
        let (mut child, channel, stderr) = started.await.map_err(|_| gone())??;
        let stderr = OwnedFd::from(stderr);
        let kept = stderr.try_clone().map_err(FleetError::io("cannot duplicate a worker's stderr"))?;
        let (process, mut watched) = Watched::begin(child.pid(), Process::stderr(stderr)?);
        tokio::spawn(async move {
            let status = loop {
                tokio::select! {
                    status = child.wait() => break status,
                    () = watched.kill.notified() => child.kill(),
                    () = watched.release.notified() => return child.release(),
                }
            };
            watched.ended(Some(status.unwrap_or_else(|_| ExitStatus::from_raw(libc::SIGKILL)))).await;
        });
        Ok((process, channel, kept))
    }
}

/// What the task behind a [`Process`] has of it.
struct Watched {
    kill: Arc<Notify>,
    release: Arc<Notify>,
    ended: watch::Sender<Option<Option<ExitStatus>>>,
    reading: tokio::task::JoinHandle<()>,
}

impl Watched {
    fn begin(pid: u32, stderr: pipe::Receiver) -> (Process, Self) {
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let reading = tokio::spawn(listen(pid, stderr, Arc::clone(&tail)));
        let (ended_in, ended) = watch::channel(None);
        let (kill, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let process = Process { pid, kill: Arc::clone(&kill), release: Arc::clone(&release), ended, tail };
        (process, Self { kill, release, ended: ended_in, reading })
    }

    async fn ended(&mut self, status: Option<ExitStatus>) {
        // Its last words come before its end, unless somebody else holds its stderr open.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(200), &mut self.reading).await;
        let _ = self.ended.send(Some(status));
    }
}

/// How the thread starts workers: by its zygote, and each by itself where there is none.
struct Starter {
    program: WorkerProgram,
    zygote: Option<Zygote>,
    /// When the last zygote was started, or was to be.
    begun: Option<Instant>,
}

impl Starter {
    /// Starts the zygote, too, so that it is prepared when the first worker is wanted.
    fn new(program: WorkerProgram) -> Self {
        let mut starter = Self { program, zygote: None, begun: None };
        starter.renew();
        starter
    }

    /// Sees to it that there is a zygote, if there can be one.
    fn renew(&mut self) {
        let WorkerProgram { program, zygote: Some(arguments), .. } = &self.program else { return };
        if self.zygote.is_some() || self.begun.is_some_and(|begun| begun.elapsed() < ZYGOTE_RETRY) {
            return;
        }
        self.begun = Some(Instant::now());
        match Zygote::start(program, arguments) {
            Ok(zygote) => self.zygote = Some(zygote),
            Err(error) => {
                tracing::warn!(%error, "each worker is started by itself, which takes longer");
            }
        }
    }

    fn start(&mut self) -> Started {
        self.renew();
        let Some(zygote) = &mut self.zygote else { return self.start_alone() };
        let Pipes { ours, theirs, stderr, stderr_in } = Pipes::new()?;
        match zygote.fork(theirs.as_fd(), stderr_in.as_fd()) {
            Ok(child) => Ok((child, ours, stderr)),
            Err(error) => {
                let end = zygote.end();
                tracing::warn!(%error, end, "the zygote made no worker: this one is started by itself, and another zygote");
                self.zygote = None;
                let started = self.start_alone();
                self.renew();
                started
            }
        }
    }

    fn start_alone(&self) -> Started {
        let Pipes { ours, theirs, stderr, stderr_in } = Pipes::new()?;
        let WorkerProgram { program, arguments, .. } = &self.program;
        let mut command = Command::new(program);
        // The control socket is standard input, `CONTROL_FD`, and needs no step of our own between fork and exec.
        command
            .args(arguments)
            .arg0("coldspark")
            .stdin(Stdio::from(theirs.into_fd()))
            .stdout(Stdio::null())
            .stderr(Stdio::from(stderr_in));
        let child = Child::spawn(&mut command)
            .map_err(FleetError::io(format!("cannot start a worker process ({})", program.display())))?;
        Ok((child, ours, stderr))
    }
}

/// What a worker talks to the daemon on, both ends.
struct Pipes {
    ours: Channel,
    theirs: Channel,
    stderr: PipeReader,
    stderr_in: PipeWriter,
}

impl Pipes {
    fn new() -> Result<Self, FleetError> {
        let (ours, theirs) = Channel::pair().map_err(FleetError::io("cannot make a control socket"))?;
        let (stderr, stderr_in) = std::io::pipe().map_err(FleetError::io("cannot make a pipe"))?;
        Ok(Self { ours, theirs, stderr, stderr_in })
    }
}

/// How many lines of a worker are logged: a guest can have its worker complain as often as it likes.
struct Lines {
    left: u32,
    /// When `left` was right.
    since: Instant,
    left_out: u64,
}

impl Lines {
    fn new(now: Instant) -> Self {
        Self { left: LOG_LINES_AT_ONCE, since: now, left_out: 0 }
    }

    /// Whether one more may be logged, and how many before it were not.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_nanos() / LOG_LINE_EVERY.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned > 0 {
            self.since += LOG_LINE_EVERY.saturating_mul(earned);
            self.left = self.left.saturating_add(earned).min(LOG_LINES_AT_ONCE);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out += 1;
                None
            }
        }
    }
}

/// Passes a worker's stderr on to the log and keeps the last lines.
async fn listen(pid: u32, stderr: pipe::Receiver, tail: Arc<Mutex<VecDeque<String>>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    let mut lines = Lines::new(Instant::now());
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
        if let Some(left_out) = lines.admit(Instant::now()) {
            if left_out > 0 {
                tracing::warn!(target: "coldspark::worker", pid, left_out, "lines of this worker were left out: it said too much");
            }
            tracing::info!(target: "coldspark::worker", pid, "{text}");
        }
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
        WorkerProgram { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()], zygote: None }
    }

    #[tokio::test]
    async fn a_worker_that_dies_leaves_its_last_words() {
        let spawner = Spawner::start(shell("echo one >&2; echo 'no memory' >&2; exit 3")).unwrap();
        let (process, channel, _) = spawner.spawn().await.unwrap();
        let status = process.ended().await;
        let text = process.obituary(status);
        assert_eq!(text, "its worker ended with status 3; its last words: one | no memory");
        let channel = AsyncChannel::new(channel).unwrap();
        assert!(matches!(channel.recv::<u8>().await, Err(ChannelError::Closed)));
    }

    #[test]
    fn a_worker_that_says_too_much_is_logged_in_part() {
        let begun = Instant::now();
        let mut lines = Lines::new(begun);
        for _ in 0..LOG_LINES_AT_ONCE {
            assert_eq!(lines.admit(begun), Some(0));
        }
        assert!((0..1000).all(|_| lines.admit(begun).is_none()));
        // One each time that it has earned one, which tells how many were left out.
        assert_eq!(lines.admit(begun + LOG_LINE_EVERY), Some(1000));
        assert_eq!(lines.admit(begun + LOG_LINE_EVERY), None);
        assert_eq!(lines.admit(begun + LOG_LINE_EVERY * 5 / 2), Some(1));
        // No more is saved up than at the start.
        let later = begun + LOG_LINE_EVERY * (LOG_LINES_AT_ONCE * 10);
        assert_eq!((0..10_000).filter(|_| lines.admit(later).is_some()).count(), LOG_LINES_AT_ONCE as usize);
    }

    #[tokio::test]
    async fn a_worker_has_the_control_socket_as_standard_input_and_can_be_killed() {
        // The word 7 as one packet, then wait.
        let spawner = Spawner::start(shell("printf '\\007' >&0; exec sleep 1000")).unwrap();
        let (process, channel, _) = spawner.spawn().await.unwrap();
        let channel = AsyncChannel::new(channel).unwrap();
        assert_eq!(channel.recv::<u8>().await.unwrap().0, 7);
        process.kill();
        let status = process.ended().await;
        assert!(process.obituary(status).starts_with("its worker was killed by SIGKILL"));
    }

    #[tokio::test]
    async fn a_zygote_that_is_of_no_use_costs_no_worker() {
        // One dies at once, one takes an order along to its death.
        for zygote in ["exit 1", "head -c 1 >/dev/null"] {
            let zygote = Some(vec!["-c".into(), zygote.into()]);
            let spawner = Spawner::start(WorkerProgram { zygote, ..shell("echo mine >&2; exit 4") }).unwrap();
            for _ in 0..3 {
                let (process, _channel, _) = spawner.spawn().await.unwrap();
                let status = process.ended().await;
                let text = process.obituary(status);
                assert_eq!(text, "its worker ended with status 4; its last words: mine");
            }
        }
    }

    #[tokio::test]
    async fn a_worker_that_nobody_waits_for_is_ended() {
        let spawner = Spawner::start(shell("exec sleep 1000")).unwrap();
        let (child, ..) = {
            let (order, started) = oneshot::channel();
            spawner.orders.send(order).unwrap();
            started.await.unwrap().unwrap()
        };
        let place = PathBuf::from(format!("/proc/{}", child.pid()));
        assert!(place.exists());
        drop(child);
        assert!(!place.exists());
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        let spawner = Spawner::start(WorkerProgram {
            program: "/nonexistent".into(),
            arguments: vec![],
            zygote: Some(vec![]),
        })
        .unwrap();
        let error = spawner.spawn().await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
