//! `coldspark serve`: the service in this process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::SocketArgument;
use crate::api::server::{self, Socket};
use crate::fleet::{Config, Fleet};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Where snapshots/, images/ and vms/ are
    #[arg(long, alias = "data", env = "COLDSPARK_DATA_DIR", value_name = "FOLDER", default_value = ".")]
    data_dir: PathBuf,
    /// Worker processes kept ready for the next clones (at most 64)
    #[arg(long, value_name = "N", default_value_t = 4)]
    shells: usize,
    /// Most VMs at once
    #[arg(long, value_name = "N", default_value_t = 1024)]
    vms_max: usize,
}

/// How long calls under way may take to end after a signal, when all VMs have ended.
const GRACE: Duration = Duration::from_secs(5);

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    log_to_stderr("info");
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(arguments));
    runtime.shutdown_background();
    result
}

async fn serve(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let path = arguments.socket.path()?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let socket = Socket::bind(&path).await?;
    let config = Config {
        data_dir: arguments.data_dir.clone(),
        shells: arguments.shells,
        vms_max: arguments.vms_max,
        ..Config::new(".")
    };
    let fleet = Fleet::open(config)?;
    tracing::info!(socket = %path.display(), data_dir = %arguments.data_dir.display(), "serving");
    let closing = Arc::clone(&fleet);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = server::serve(fleet, socket, async {
        let _ = stopped.await;
    });
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => result?,
        _ = terminate.recv() => tracing::info!("told to terminate: ending all VMs"),
        _ = interrupt.recv() => tracing::info!("interrupted: ending all VMs"),
    }
    // Calls that wait for a VM end with it.
    let _ = stop.send(());
    tokio::select! {
        () = closing.close() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = tokio::time::timeout(GRACE, serving).await;
    Ok(ExitCode::SUCCESS)
}

/// Logs to stderr, as much as `COLDSPARK_LOG` says (`info`, `coldspark=debug`, ...).
pub fn log_to_stderr(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("COLDSPARK_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // Already set when a test starts two services in one process.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// Every VM takes about ten descriptors; the usual soft limit of 1024 is for select(2), which nobody uses here.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls only read or write the struct.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
