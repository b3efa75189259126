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
use crate::api::server::{self, ServeError, Socket};
use crate::fleet::{Config, Fleet, id};

/// How long the service may take to end when its VMs are gone.
const GRACE: Duration = Duration::from_secs(5);

/// How long the first shells may take.
const SETTLE: Duration = Duration::from_secs(30);

/// A running private service. [`PrivateService::close`] it; dropped otherwise, its folder is removed all the same.
pub struct PrivateService {
    pub client: Client,
    fleet: Arc<Fleet>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServeError>>,
    folder: TemporaryFolder,
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
        serve::log_to_stderr("error");
        serve::raise_descriptor_limit();
        let folder = TemporaryFolder::new()?;
        let path = folder.0.join("socket");
        let socket = Socket::bind(&path).await?;
        let fleet = Fleet::open(Config { shells, ..Config::new(folder.0.join("data")) })?;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server::serve(Arc::clone(&fleet), socket, async {
            let _ = stopped.await;
        }));
        let client = client::connect(&path).await?;
        Ok(Self { client, fleet, stop, serving, folder })
    }

    /// Waits until the shells are there, as in a service that has been up for a moment.
    pub async fn settle(&self) -> anyhow::Result<()> {
        let full = tokio::time::timeout(SETTLE, self.fleet.shells_full());
        full.await.context("worker processes do not start; `coldspark doctor` tells why")
    }

    /// How many shells are left.
    pub fn shells_ready(&self) -> usize {
        self.fleet.shells_ready()
    }

    /// For files of the command's own; removed with the service.
    pub fn folder(&self) -> &Path {
        &self.folder.0
    }

    /// Ends all VMs and the service, and removes what it wrote.
    pub async fn close(self) {
        self.fleet.close().await;
        let _ = self.stop.send(());
        drop(self.client);
        let _ = tokio::time::timeout(GRACE, self.serving).await;
    }
}
