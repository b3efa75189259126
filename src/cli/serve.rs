//! `coldspark serve`: the service in this process.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use ipnet::{Ipv4Net, Ipv6Net};
use rustix::process::{Resource, Rlimit};
use tokio::signal::unix::{SignalKind, signal};

use super::config::ConfigArgument;
use super::notify;
use super::service::SocketPath;
use super::units;
use crate::api::auth::guard::{Guard, Policy};
use crate::api::auth::rules::Rule;
use crate::api::auth::tls::TlsFiles;
use crate::api::listen::{Listeners, Port, Socket};
use crate::api::{scrape, server};
use crate::fleet::process::WorkerProgram;
use crate::fleet::slots::addresses::{self, Plan};
use crate::fleet::snapshots::signing::{Signing, SigningKey, TrustedKeys};
use crate::fleet::{Config, Fleet, JailMode, jail};
use crate::telemetry::trace::{Collector, Traces};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    _file: ConfigArgument,
    #[command(flatten)]
    socket: SocketPath,
    /// Where snapshots/, images/ and vms/ are
    #[arg(long, alias = "data", env = "COLDSPARK_DATA_DIR", value_name = "FOLDER", default_value = ".")]
    data_dir: PathBuf,
    /// Worker processes kept ready for the next clones (at most 64)
    #[arg(long, env = "COLDSPARK_SHELLS", value_name = "N", default_value_t = 4)]
    shells: usize,
    /// Do not learn what clones of a snapshot touch first, and do not have it ready for them
    #[arg(long, env = "COLDSPARK_NO_WORKING_SETS", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    no_working_sets: bool,
    /// Memory of the host that is to stay free: no VM is started while there is less [usually: a twentieth, at least 256M]
    #[arg(long, env = "COLDSPARK_MEMORY_RESERVE", value_name = "BYTES", value_parser = units::parse_bytes)]
    memory_reserve: Option<u64>,
    /// Of the time of the CPUs that make what pools keep ready (half of all), how much may go into it, in percent
    #[arg(long, env = "COLDSPARK_REFILL_SHARE", value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100))]
    refill_share: u32,
    /// Most VMs at once
    #[arg(long, env = "COLDSPARK_VMS_MAX", value_name = "N", default_value_t = 1024)]
    vms_max: usize,
    /// When this service is killed its VMs go on; how many seconds they wait for the next one before they end [0: they end with this one]
    #[arg(long, env = "COLDSPARK_ORPHAN_TIME", value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(..=604_800))]
    orphan_time: u64,
    /// End a VM that was taken over from a killed service, of which its caller may never have heard: no call has ever named it, and in so many seconds none does [0: never]
    #[arg(long, env = "COLDSPARK_UNCLAIMED_TIME", value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=604_800))]
    unclaimed_time: u64,
    /// When this service is stopped leave its VMs running, for the next one to take over within --orphan-time: to replace the program
    #[arg(long, env = "COLDSPARK_KEEP_VMS", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    keep_vms: bool,
    /// How workers, the processes in which guests run, are jailed; `coldspark doctor` tells which layers there are here
    #[arg(long, env = "COLDSPARK_JAIL", value_name = "MODE", value_enum, default_value_t = JailArgument::Best)]
    jail: JailArgument,
    /// How the log on stderr is written; COLDSPARK_LOG says how much (info, coldspark=debug, ...)
    #[arg(long, env = "COLDSPARK_LOG_FORMAT", value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(flatten)]
    trust: TrustArguments,
    #[command(flatten)]
    network: NetworkArguments,
    #[command(flatten)]
    access: AccessArguments,
    #[command(flatten)]
    seeing: SeeingArguments,
}

/// Which snapshots are used.
#[derive(Debug, Args)]
#[command(next_help_heading = "Signed snapshots")]
struct TrustArguments {
    /// Sign snapshots with the key of this file (`coldspark snapshot key new`)
    #[arg(long, env = "COLDSPARK_SIGN_KEY", value_name = "FILE")]
    sign_key: Option<PathBuf>,
    /// Use only snapshots that were signed by a key of this file, of lines `NAME ed25519:KEY`, and compare all their bytes before the first use
    #[arg(long, env = "COLDSPARK_TRUSTED_KEYS", value_name = "FILE")]
    trusted_keys: Option<PathBuf>,
}

impl TrustArguments {
    fn signing(&self) -> anyhow::Result<Signing> {
        let key = self.sign_key.as_deref().map(SigningKey::read).transpose();
        let trusted = self.trusted_keys.as_deref().map(TrustedKeys::read).transpose();
        Ok(Signing {
            key: key.context("--sign-key")?.map(Arc::new),
            trusted: trusted.context("--trusted-keys")?.map(Arc::new),
        })
    }
}

/// Networks that it makes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Networks made by the service")]
struct NetworkArguments {
    /// Networks kept ready for VMs with `--net auto`, at most 256; 0: none are made. Needs root, or CAP_NET_ADMIN and CAP_SYS_ADMIN, and the
    /// programs ip (iproute2) and nft (nftables)
    #[arg(long, env = "COLDSPARK_NETWORKS", value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=256))]
    networks: u16,
    /// The network that every guest believes to be in: its second address is the guest's, the first the gateway's
    #[arg(long, env = "COLDSPARK_GUEST_NETWORK", value_name = "NETWORK", default_value = addresses::GUESTS4)]
    guest_network: Ipv4Net,
    /// The same of IPv6
    #[arg(long, env = "COLDSPARK_GUEST_NETWORK6", value_name = "NETWORK", default_value = addresses::GUESTS6)]
    guest_network6: Ipv6Net,
    /// The network out of which each VM gets an address by which this host reaches it: private, and nobody else's on this host; four
    /// addresses for each VM
    #[arg(long, env = "COLDSPARK_SLOT_NETWORK", value_name = "NETWORK", default_value = addresses::SLOTS4)]
    slot_network: Ipv4Net,
    /// The same of IPv6
    #[arg(long, env = "COLDSPARK_SLOT_NETWORK6", value_name = "NETWORK", default_value = addresses::SLOTS6)]
    slot_network6: Ipv6Net,
}

impl NetworkArguments {
    fn plan(&self) -> anyhow::Result<Plan> {
        Plan::new(self.guest_network, self.guest_network6, self.slot_network, self.slot_network6)
            .map_err(anyhow::Error::msg)
    }
}

/// What it tells of itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Seeing it")]
struct SeeingArguments {
    /// Give metrics to Prometheus here: plain HTTP, GET /metrics. An address of this host, or the path of a Unix socket, which is for
    /// this user and root
    #[arg(long, env = "COLDSPARK_METRICS", value_name = "ADDRESS:PORT|PATH")]
    metrics: Option<scrape::Address>,
    /// Let --metrics be an address that other hosts reach: they read the names of snapshots, pools and functions
    #[arg(long, env = "COLDSPARK_METRICS_INSECURE", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    metrics_insecure: bool,
    /// Send traces to this collector by OTLP over HTTP, as http://127.0.0.1:4318
    #[arg(long, env = "COLDSPARK_OTLP", value_name = "URL")]
    otlp: Option<Collector>,
    /// Of how many requests in a hundred, where the caller has not decided it (traceparent)
    #[arg(long, env = "COLDSPARK_OTLP_SHARE", value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=100))]
    otlp_share: u32,
}

impl SeeingArguments {
    /// Whether the settings go together.
    fn check(&self) -> anyhow::Result<()> {
        match &self.metrics {
            None if self.metrics_insecure => {
                anyhow::bail!("--metrics-insecure is about an address: add --metrics")
            }
            Some(address) if !address.is_local() && !self.metrics_insecure => anyhow::bail!(
                "other hosts can reach --metrics {address}, and nobody is asked who they are; choose an address of this host (127.0.0.1:PORT), or add --metrics-insecure"
            ),
            _ => Ok(()),
        }
    }

    /// Begins to send traces, if somewhere takes them.
    fn traces(&self) -> anyhow::Result<Option<Traces>> {
        let Some(collector) = &self.otlp else { return Ok(None) };
        Ok(Some(Traces::begin(collector, self.otlp_share)?))
    }

    /// Where metrics are given, if they are.
    async fn endpoint(&self) -> anyhow::Result<Option<scrape::Endpoint>> {
        self.check()?;
        let Some(address) = &self.metrics else { return Ok(None) };
        let endpoint = scrape::Endpoint::bind(address).await?;
        let address = endpoint.port().map_or_else(|| address.to_string(), |port| port.to_string());
        tracing::info!(%address, "giving metrics over HTTP");
        Ok(Some(endpoint))
    }
}

/// How workers are jailed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum JailArgument {
    /// By all layers; without one of them the service does not begin
    Required,
    /// By the layers that this host and user allow; the log tells those that are missing
    Best,
    /// Not at all
    Off,
}

impl From<JailArgument> for JailMode {
    fn from(argument: JailArgument) -> Self {
        match argument {
            JailArgument::Required => Self::Required,
            JailArgument::Best => Self::Best,
            JailArgument::Off => Self::Off,
        }
    }
}

/// How a log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    Text,
    /// A JSON object on each line
    Json,
}

/// Who is let in besides this user and root.
#[derive(Debug, Args)]
#[command(next_help_heading = "Who is let in")]
struct AccessArguments {
    /// Let somebody in: WHO=read|run|admin (may be given again). WHO is user:NAME or group:NAME of this host, on the Unix
    /// socket; or of a client certificate cn:NAME, dns:NAME, uri:NAME, or cert:any
    #[arg(long, env = "COLDSPARK_ALLOW", value_name = "WHO=ROLE", value_delimiter = ',')]
    allow: Vec<Rule>,
    /// Listen on this TCP port too, with TLS
    #[arg(long, env = "COLDSPARK_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The service's certificate and those between it and its CA, PEM
    #[arg(long, env = "COLDSPARK_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, env = "COLDSPARK_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Callers show a certificate of this CA, PEM; with --tokens they may
    #[arg(long, env = "COLDSPARK_CLIENT_CA", value_name = "FILE")]
    client_ca: Option<PathBuf>,
    /// Callers bring a bearer token of this file (`coldspark token new`)
    #[arg(long, env = "COLDSPARK_TOKENS", value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Most connections on the TCP port; the Unix socket has 1024 of its own
    #[arg(long, env = "COLDSPARK_CONNECTIONS_MAX", value_name = "N", default_value_t = 256, value_parser = parse_connections)]
    connections_max: usize,
    /// Listen without TLS, and let everybody who reaches the port do everything
    #[arg(long, env = "COLDSPARK_INSECURE", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    insecure: bool,
}

impl Arguments {
    /// Whether the settings go together, and the files that they name can be used.
    pub fn check(&self) -> anyhow::Result<()> {
        Guard::new(self.access.policy()?)?;
        self.trust.signing()?;
        self.network.plan()?;
        self.seeing.check()
    }
}

fn parse_connections(text: &str) -> Result<usize, String> {
    let number: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    (1..=65_536).contains(&number).then_some(number).ok_or_else(|| "choose 1 to 65536".into())
}

impl AccessArguments {
    /// What the arguments mean together, or why they mean nothing.
    fn policy(&self) -> anyhow::Result<Policy> {
        let mut policy = Policy { allow: self.allow.clone(), ..Policy::default() };
        let secured = self.tls_cert.is_some() || self.tls_key.is_some() || self.client_ca.is_some();
        match (self.listen, self.insecure) {
            (None, false) if !secured => policy.tokens = self.tokens.clone(),
            (None, _) => anyhow::bail!(
                "--tls-cert, --tls-key, --client-ca and --insecure are about a port: add --listen"
            ),
            (Some(_), true) if secured || self.tokens.is_some() => {
                anyhow::bail!(
                    "--insecure lets everybody in without TLS; it does not go with certificates or tokens"
                )
            }
            (Some(_), true) => {}
            (Some(_), false) => {
                let (Some(certificate), Some(key)) = (self.tls_cert.clone(), self.tls_key.clone()) else {
                    anyhow::bail!(
                        "--listen needs --tls-cert and --tls-key, and --tokens or --client-ca; or --insecure, where everybody who reaches the port is trusted"
                    );
                };
                policy.tls = Some(TlsFiles { certificate, key, client_ca: self.client_ca.clone() });
                policy.tokens = self.tokens.clone();
            }
        }
        Ok(policy)
    }

    async fn port(&self) -> anyhow::Result<Option<Port>> {
        let Some(address) = self.listen else { return Ok(None) };
        let port = Port::bind(address, self.connections_max).await?;
        let address = port.address()?;
        if self.insecure {
            tracing::warn!(%address, "listening WITHOUT TLS: everybody who reaches this port can do everything");
            return Ok(Some(port.insecure()));
        }
        tracing::info!(%address, "listening with TLS");
        Ok(Some(port))
    }
}

/// How long calls under way may take to end after a signal, when all VMs have ended.
const GRACE: Duration = Duration::from_secs(5);

/// The same when VMs are left running: calls to them do not end by themselves, and the next service waits.
const GRACE_KEPT: Duration = Duration::from_millis(500);

pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    log_to_stderr("info", arguments.log_format);
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
    let mut hang_up = signal(SignalKind::hangup())?;
    let guard = Guard::new(arguments.access.policy()?)?;
    let signing = arguments.trust.signing()?;
    let socket = Socket::bind_for(&path, guard.socket_for()).await?;
    let port = arguments.access.port().await?;
    let metrics = arguments.seeing.endpoint().await?;
    let traces = arguments.seeing.traces()?;
    let listeners = Listeners::new(socket, port, Arc::clone(&guard));
    let mode = JailMode::from(arguments.jail);
    if mode == JailMode::Required {
        // Before anything that is there is touched.
        jail::probe(WorkerProgram::jailed(mode)).await?.0?;
    }
    let config = Config {
        worker: WorkerProgram::jailed(mode),
        data_dir: arguments.data_dir.clone(),
        shells: arguments.shells,
        working_sets: !arguments.no_working_sets,
        vms_max: arguments.vms_max,
        memory_reserve: arguments.memory_reserve,
        refill_share: arguments.refill_share,
        networks: arguments.network.networks.into(),
        network_plan: arguments.network.plan()?,
        orphan_time: Some(Duration::from_secs(arguments.orphan_time)).filter(|time| !time.is_zero()),
        unclaimed_time: Some(Duration::from_secs(arguments.unclaimed_time)).filter(|time| !time.is_zero()),
        signing,
    };
    if let Err(problem) = config.signing.check_own() {
        tracing::warn!(problem, "no snapshots can be made here: they would not be trusted here");
    }
    let fleet = Fleet::open(config)?;
    fleet.begin().await;
    tracing::info!(socket = %path.display(), data_dir = %arguments.data_dir.display(), "serving");
    if let Some(metrics) = metrics {
        tokio::spawn(metrics.serve(scrape::exposition(&fleet)));
    }
    let closing = Arc::clone(&fleet);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = server::serve(fleet, listeners, async {
        let _ = stopped.await;
    });
    tokio::pin!(serving);
    // The socket is there already: who connects now is answered as soon as the loop below runs.
    notify::ready(&format!("serving at {}", path.display()));
    loop {
        tokio::select! {
            result = &mut serving => {
                result?;
                break;
            }
            _ = hang_up.recv() => reload(&guard),
            _ = terminate.recv() => {
                tracing::info!(keep_vms = arguments.keep_vms, "told to terminate");
                break;
            }
            _ = interrupt.recv() => {
                tracing::info!(keep_vms = arguments.keep_vms, "interrupted");
                break;
            }
        }
    }
    let keep = arguments.keep_vms;
    notify::stopping(if keep { "leaving VMs to the next service" } else { "ending all VMs" });
    // Calls that wait for a VM end with it.
    let _ = stop.send(());
    let close = async {
        match keep {
            true => closing.leave().await,
            false => closing.close().await,
        }
    };
    tokio::select! {
        () = close => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = tokio::time::timeout(if keep { GRACE_KEPT } else { GRACE }, serving).await;
    if let Some(traces) = traces {
        // A failure of the task is one of the exporter's.
        let _ = tokio::task::spawn_blocking(|| traces.end()).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads tokens, certificates and the numbers of users and groups again.
fn reload(guard: &Arc<Guard>) {
    let guard = Arc::clone(guard);
    tokio::task::spawn_blocking(move || match guard.reload() {
        Ok(()) => tracing::info!("tokens and certificates were read again"),
        Err(error) => tracing::error!(%error, "tokens and certificates stay as they were"),
    });
}

/// Logs to stderr, as much as `COLDSPARK_LOG` says (`info`, `coldspark=debug`, ...).
pub fn log_to_stderr(default: &str, format: LogFormat) {
    let wish = std::env::var("COLDSPARK_LOG").ok().filter(|wish| !wish.is_empty());
    let wish = wish.as_deref().map(tracing_subscriber::EnvFilter::try_new);
    let filter = wish.transpose().unwrap_or_else(|error| {
        super::output::note(&format!(
            "COLDSPARK_LOG is not heeded: {error}; write it as info, or coldspark=debug"
        ));
        None
    });
    let filter = filter.unwrap_or_else(|| tracing_subscriber::EnvFilter::new(default));
    // No colours in files and pipes.
    let colours =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    // Already set when a test starts two services in one process.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// Every VM takes about ten descriptors; the usual soft limit of 1024 is for select(2), which nobody uses here.
pub fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // One that cannot be raised stays.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
