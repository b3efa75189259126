//! A service of a command's own: in this process, on a socket and a data folder that nobody else knows.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::serve;
use crate::api::client::{self, Client};
use crate::api::listen::{Listeners, Socket};
use crate::api::server::{self, ServeError};
use crate::fleet::process::WorkerProgram;
use crate::fleet::{Config, Fleet, JailMode, id};

/// How long the service may take to end when its VMs are gone.
const GRACE: Duration = Duration::from_secs(5);

/// VMs can outlive it, as those of a service can, so that what a bench measures is what a service does; but nobody will come for them.
const ORPHAN_TIME: Duration = Duration::from_secs(1);

/// How long the first shells may take.
const SETTLE: Duration = Duration::from_secs(30);

/// A running private service. [`PrivateService::close`] it; dropped otherwise, its folder is removed all the same.
pub struct PrivateService {
    pub client: Client,
    setting: Setting,
    fleet: Arc<Fleet>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServeError>>,
    folder: TemporaryFolder,
}

/// How it is to run.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub shells: usize,
    pub working_sets: bool,
    /// Network slots that it keeps ready.
    pub networks: usize,
}

/// Drops `work` when the user interrupts it, so that what it was done with can still be ended.
pub async fn unless_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        interrupt = tokio::signal::ctrl_c() => interrupt.context("signals").and(Err(anyhow::anyhow!("interrupted"))),
    }
}

/// What COLDSPARK_JAIL says, as for `coldspark serve`.
fn jail_mode() -> anyhow::Result<JailMode> {
    let Some(name) = std::env::var_os("COLDSPARK_JAIL") else { return Ok(JailMode::default()) };
    let mode = name.to_str().and_then(JailMode::of_name);
    mode.with_context(|| format!("COLDSPARK_JAIL is {name:?}; it can be required, best or off"))
}

/// Removed when dropped.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn new() -> anyhow::Result<Self> {
        let [a, b, c, d] = id::random::<4>()?;
        let name = format!("coldspark-{}-{a:02x}{b:02x}{c:02x}{d:02x}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let made: io::Result<()> = fs::DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("cannot make {}; set TMPDIR to a folder with room", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl PrivateService {
    /// Starts one that keeps `shells` shells.
    pub async fn start(shells: usize) -> anyhow::Result<Self> {
        Self::start_as(Setting { shells, working_sets: true, networks: 0 }).await
    }

    pub async fn start_as(setting: Setting) -> anyhow::Result<Self> {
        serve::log_to_stderr("error", serve::LogFormat::Text);
        serve::raise_descriptor_limit();
        Self::start_in(TemporaryFolder::new()?, setting).await
    }

    /// Ends it and starts another on the same data.
    pub async fn restart(self) -> anyhow::Result<Self> {
        let setting = self.setting;
        Self::start_in(self.end().await, setting).await
    }

    async fn start_in(folder: TemporaryFolder, setting: Setting) -> anyhow::Result<Self> {
        let path = folder.0.join("socket");
        let listeners = Listeners::own(Socket::bind(&path).await?)?;
        let Setting { shells, working_sets, networks } = setting;
        let config = Config {
            shells,
            working_sets,
            networks,
            orphan_time: Some(ORPHAN_TIME),
            worker: WorkerProgram::jailed(jail_mode()?),
            ..Config::new(folder.0.join("data"))
        };
        let fleet = Fleet::open(config)?;
        fleet.begin().await;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server::serve(Arc::clone(&fleet), listeners, async {
            let _ = stopped.await;
        }));
        let client = client::connect(&path).await?;
        Ok(Self { client, setting, fleet, stop, serving, folder })
    }

    /// Waits until the shells are there, as in a service that has been up for a moment.
    pub async fn settle(&self) -> anyhow::Result<()> {
        let full = tokio::time::timeout(SETTLE, self.fleet.shells_full());
        full.await.context("worker processes do not start; `coldspark doctor` tells why")
    }

    /// Waits until the network slots are there.
    pub async fn slots_ready(&self) -> anyhow::Result<()> {
        let full = tokio::time::timeout(SETTLE, self.fleet.slots_full());
        full.await.context("network slots cannot be made; `coldspark doctor` tells why")
    }

    /// How many shells are left.
    pub fn shells_ready(&self) -> usize {
        self.fleet.shells_ready()
    }

    /// For files of the command's own; removed with the service.
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// The memory file of a snapshot.
    pub fn memory_file(&self, snapshot: &str) -> PathBuf {
        self.folder.0.join("data/snapshots").join(snapshot).join("memory.img")
    }

    /// Ends all VMs and the service, and removes what it wrote.
    pub async fn close(self) {
        drop(self.end().await);
    }

    async fn end(self) -> TemporaryFolder {
        self.fleet.close().await;
        let _ = self.stop.send(());
        drop(self.client);
        let _ = tokio::time::timeout(GRACE, self.serving).await;
        self.folder
    }
}
