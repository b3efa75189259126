//! A daemon of a trial's own: started, watched, killed with everything it started.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint};

use crate::client::Client;
use crate::trial::{Stage, limit};

/// How often a condition is looked at again that nobody announces.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A running `coldspark serve`.
pub struct Daemon {
    child: Child,
    /// Its snapshots, images and VMs.
    pub data: PathBuf,
    /// Removes socket (and data, unless given) at the end.
    folder: tempfile::TempDir,
    logs: PathBuf,
    starts: u32,
    /// Further arguments.
    arguments: Vec<String>,
    /// The network namespace that it runs in; none: this one.
    netns: Option<String>,
    /// Processes that a killed daemon left running.
    orphans: Vec<Process>,
}

impl Daemon {
    /// Starts one with an empty data folder, and waits until it accepts connections.
    pub async fn start(stage: &Stage) -> anyhow::Result<Daemon> {
        Self::start_with(stage, &[]).await
    }

    /// The same, with further arguments of `coldspark serve`.
    pub async fn start_with(stage: &Stage, arguments: &[String]) -> anyhow::Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("coldspark-").tempdir()?;
        let data = folder.path().join("data");
        fs::create_dir(&data)?;
        Self::start_in(stage, folder, data, arguments.to_vec(), None).await
    }

    /// The same, in a network namespace of this host.
    pub async fn start_inside(stage: &Stage, netns: &str, arguments: &[String]) -> anyhow::Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("coldspark-").tempdir()?;
        let data = folder.path().join("data");
        fs::create_dir(&data)?;
        Self::start_in(stage, folder, data, arguments.to_vec(), Some(netns.to_owned())).await
    }

    /// Starts one on a data folder that is there.
    pub async fn start_at(stage: &Stage, data: &Path) -> anyhow::Result<Daemon> {
        let folder = tempfile::Builder::new().prefix("coldspark-").tempdir()?;
        Self::start_in(stage, folder, data.to_path_buf(), Vec::new(), None).await
    }

    async fn start_in(
        stage: &Stage,
        folder: tempfile::TempDir,
        data: PathBuf,
        arguments: Vec<String>,
        netns: Option<String>,
    ) -> anyhow::Result<Daemon> {
        let logs = stage.logs.clone();
        let child = spawn(netns.as_deref(), &socket(&folder), &data, &arguments, &log_file(&logs, 1))?;
        let mut daemon =
            Daemon { child, data, folder, logs, starts: 1, arguments, netns, orphans: Vec::new() };
        daemon.wait_until_ready().await?;
        Ok(daemon)
    }

    /// A new connection.
    pub async fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(connect(&socket(&self.folder)).await?, self.logs.clone()))
    }

    /// Kills the daemon alone, as a crash would; its workers are left.
    pub fn kill_hard(&mut self) -> anyhow::Result<()> {
        self.orphans.extend(descendants(self.child.id()));
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// What a killed daemon left running, and still runs.
    pub fn orphans(&self) -> Vec<Process> {
        without_holders(self.all_orphans())
    }

    /// The same, with what holds the pid namespaces of workers.
    pub fn all_orphans(&self) -> Vec<Process> {
        self.orphans.iter().filter(|process| process.lives()).cloned().collect()
    }

    /// Its workers and its zygote.
    pub fn processes(&self) -> Vec<Process> {
        without_holders(descendants(self.child.id()))
    }

    /// The process from which its workers are forked.
    pub fn zygote(&self) -> Option<Process> {
        self.processes().into_iter().find(|process| process.name == "zygote" && !process.zombie)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// How many descriptors the daemon has open.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count())
    }

    /// What they lead to, and how many to each; the numbers of sockets, pipes and VMs are left out.
    pub fn descriptors_lead_to(&self) -> anyhow::Result<BTreeMap<String, usize>> {
        let mut places = BTreeMap::new();
        for descriptor in fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            // One may be closed meanwhile.
            let Ok(place) = fs::read_link(descriptor?.path()) else { continue };
            let place = place.to_string_lossy();
            let place = match place.split_once(":[") {
                Some((kind, _)) => kind.to_owned(),
                None => place
                    .split('/')
                    .map(|part| part.split_once('-').map_or(part, |(kind, _)| kind))
                    .collect::<Vec<_>>()
                    .join("/"),
            };
            *places.entry(place).or_default() += 1;
        }
        Ok(places)
    }

    /// Further arguments from its next start on.
    pub fn set_arguments(&mut self, arguments: Vec<String>) {
        self.arguments = arguments;
    }

    /// Starts the daemon again on the same data and socket.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        self.start_unready()?;
        self.wait_until_ready().await
    }

    /// The same, without waiting for anything.
    pub fn start_unready(&mut self) -> anyhow::Result<()> {
        self.starts += 1;
        let log = log_file(&self.logs, self.starts);
        let netns = self.netns.as_deref();
        self.child = spawn(netns, &socket(&self.folder), &self.data, &self.arguments, &log)?;
        Ok(())
    }

    /// Tells it to read its tokens and certificates again (SIGHUP).
    pub fn hang_up(&self) {
        // SAFETY: plain kill of a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGHUP) };
    }

    /// What it has logged since it was started last.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(log_file(&self.logs, self.starts))?)
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    pub async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        self.orphans.extend(descendants(self.child.id()));
        // SAFETY: plain kill of a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        let deadline = Instant::now() + limit(30);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the daemon did not end after SIGTERM");
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    /// True while the daemon process is there.
    pub fn is_alive(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// The service's socket.
    pub fn socket(&self) -> PathBuf {
        socket(&self.folder)
    }

    /// Files below `folder` that its workers have open, also those that are deleted.
    pub fn open_in_workers(&self, folder: &Path) -> Vec<PathBuf> {
        descendants(self.child.id())
            .iter()
            .filter_map(|worker| fs::read_dir(format!("/proc/{}/fd", worker.pid)).ok())
            .flatten()
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| path.starts_with(folder))
            .collect()
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit(30);
        loop {
            if UnixStream::connect(socket(&self.folder)).await.is_ok() {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the daemon ended before it accepted a connection: {status}");
            }
            if Instant::now() > deadline {
                bail!("the daemon did not accept a connection");
            }
            sleep(LOOK_AGAIN).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let mut left = descendants(self.child.id());
        left.append(&mut self.orphans);
        // Both fail only when the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        left.iter().for_each(Process::kill);
    }
}

/// Looks at `condition` until it holds; fails after `seconds` (see [`limit`]), naming `what`.
pub async fn eventually(
    what: &str,
    seconds: u64,
    mut condition: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit(seconds);
    while !condition().await? {
        if Instant::now() > deadline {
            bail!("waited in vain: {what}");
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// The program under test.
pub fn program() -> PathBuf {
    std::env::var_os("COLDSPARK_BIN").map_or_else(|| env!("CARGO_BIN_EXE_coldspark").into(), PathBuf::from)
}

fn socket(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("socket")
}

fn log_file(logs: &Path, start: u32) -> PathBuf {
    logs.join(format!("daemon-{start}.log"))
}

fn spawn(
    netns: Option<&str>,
    socket: &Path,
    data: &Path,
    arguments: &[String],
    log: &Path,
) -> anyhow::Result<Child> {
    let log = File::create(log)?;
    let program = program();
    let mut command = match netns {
        None => Command::new(&program),
        // It becomes the program, and has its number.
        Some(netns) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{netns}")).arg(&program);
            command
        }
    };
    command
        .arg("serve")
        .arg("--socket")
        .arg(socket)
        .arg("--data-dir")
        .arg(data)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

pub async fn connect(socket: &Path) -> anyhow::Result<Channel> {
    let socket = socket.to_path_buf();
    // The address is not used: the connector knows the socket.
    let channel = Endpoint::from_static("http://coldspark.local")
        // As the program's own client: one that does not read a console is not to lose its connection.
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(16 << 20)
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await?;
    Ok(channel)
}

/// A process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    /// What it calls itself: `worker`, `zygote`.
    pub name: String,
    /// It has ended, and its parent has not taken notice.
    pub zombie: bool,
    parent: i32,
    started: u64,
}

impl Process {
    /// From `/proc/PID/stat`; the command's name (second field) may contain anything, its closing bracket ends it.
    fn read(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        Some(Process {
            pid,
            name: name.split_once('(')?.1.to_owned(),
            zombie: *fields.first()? == "Z",
            parent: fields.get(1)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid))?.count())
    }

    /// The same process, still there and not a zombie.
    fn lives(&self) -> bool {
        Process::read(self.pid).is_some_and(|now| now.started == self.started && !now.zombie)
    }

    pub fn kill(&self) {
        if self.lives() {
            // SAFETY: plain kill of a process that this test's daemon started.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
    }
}

/// A zygote's workers have a pid namespace, whose first process only holds it.
fn without_holders(mut processes: Vec<Process>) -> Vec<Process> {
    processes.retain(|process| process.name != "jail-init");
    processes
}

/// All processes below `ancestor`.
fn descendants(ancestor: u32) -> Vec<Process> {
    let all: Vec<Process> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Process::read(entry.file_name().to_str()?.parse().ok()?))
        .collect();
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![ancestor as i32];
    while let Some(parent) = parents.pop() {
        for process in all.iter().filter(|process| process.parent == parent) {
            found.push(process.clone());
            parents.push(process.pid);
        }
    }
    found
}
