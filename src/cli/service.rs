//! Where the service is, for every command that calls it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use crate::api::client::{self, Client, Remote};

/// Where `deploy/coldspark.service` has it.
const OF_THE_SYSTEM: &str = "/run/coldspark/coldspark.sock";
/// Longest token file of a client.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;

/// The service's socket.
#[derive(Debug, Clone, Args)]
pub struct SocketPath {
    /// The service's Unix socket [default: $XDG_RUNTIME_DIR/coldspark.sock, for root /run/coldspark.sock; for
    /// clients, if it is not there, /run/coldspark/coldspark.sock]
    #[arg(long, env = "COLDSPARK_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl SocketPath {
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = &self.socket {
            return Ok(path.clone());
        }
        if rustix::process::geteuid().is_root() {
            return Ok("/run/coldspark.sock".into());
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(folder) if !folder.is_empty() => Ok(PathBuf::from(folder).join("coldspark.sock")),
            _ => anyhow::bail!("XDG_RUNTIME_DIR is not set: name the service's socket with --socket"),
        }
    }

    /// Where a client looks: if there is none of its user's own, for that of the system's service.
    fn of_a_service(&self) -> anyhow::Result<PathBuf> {
        let own = self.path();
        let system = Path::new(OF_THE_SYSTEM);
        match self.socket {
            None if !own.as_ref().is_ok_and(|own| own.exists()) && system.exists() => Ok(system.to_owned()),
            _ => own.with_context(|| format!("there is no service at {OF_THE_SYSTEM}")),
        }
    }
}

/// The service's socket, or a service on another host.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Which service")]
pub struct SocketArgument {
    #[command(flatten)]
    socket: SocketPath,
    /// A service on another host, instead of the socket: https://HOST:PORT
    #[arg(long, env = "COLDSPARK_HOST", value_name = "URL")]
    host: Option<String>,
    /// File with the bearer token [or the token itself in COLDSPARK_TOKEN]
    #[arg(
        long,
        env = "COLDSPARK_TOKEN_FILE",
        value_name = "FILE",
        requires = "host",
        hide_short_help = true
    )]
    token_file: Option<PathBuf>,
    /// CA of the service's certificate, PEM [default: the public CAs]
    #[arg(long, env = "COLDSPARK_CA", value_name = "FILE", hide_short_help = true)]
    ca: Option<PathBuf>,
    /// This client's certificate, PEM
    #[arg(long, env = "COLDSPARK_CERT", value_name = "FILE", requires = "key", hide_short_help = true)]
    cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, env = "COLDSPARK_KEY", value_name = "FILE", requires = "cert", hide_short_help = true)]
    key: Option<PathBuf>,
}

impl SocketArgument {
    pub async fn connect(&self) -> anyhow::Result<Client> {
        let Some(host) = &self.host else { return Ok(client::connect(&self.socket.of_a_service()?).await?) };
        let remote = Remote {
            host: host.clone(),
            token: self.token()?,
            ca: self.ca.clone(),
            identity: self.cert.clone().zip(self.key.clone()),
        };
        Ok(client::connect_remote(&remote).await?)
    }

    fn token(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.token_file else {
            let token = std::env::var("COLDSPARK_TOKEN").ok();
            return Ok(token.filter(|token| !token.is_empty()));
        };
        let read = || -> anyhow::Result<String> {
            anyhow::ensure!(fs::metadata(path)?.len() <= TOKEN_FILE_BYTES_MAX, "too long for a token");
            Ok(fs::read_to_string(path)?)
        };
        let text = read().with_context(|| format!("cannot read the token file {}", path.display()))?;
        Ok(Some(text.trim().to_owned()))
    }
}
