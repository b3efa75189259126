//! `coldspark pool`: clones that stand ready.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::limits::LimitArguments;
use super::output::{self, Shape, Table};
use super::vm::network::{self, PoolNetArguments, parse_publish};
use super::vm::{self, Identity, MemoryMode};
use super::{SocketArgument, units};
use crate::api::client::all_pages;
use crate::api::proto;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep clones of a snapshot ready
    #[command(
        after_help = "Examples:\n  coldspark pool create web --snapshot ready --min-ready 8 --max 100\n  coldspark pool create ci --snapshot built --mode running --idle-ttl 5m\n  coldspark pool create api --snapshot ready --net auto --allow 10.1.2.3:5432/tcp"
    )]
    Create {
        #[command(flatten)]
        socket: SocketArgument,
        /// Its name: a-z 0-9 -
        pool: String,
        /// Id or name
        #[arg(long)]
        snapshot: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// Change a pool; what stands ready is replaced one by one
    #[command(after_help = "Example:\n  coldspark pool set web --snapshot newer --min-ready 16")]
    Set {
        #[command(flatten)]
        socket: SocketArgument,
        pool: String,
        /// Id or name
        #[arg(long)]
        snapshot: Option<String>,
        #[command(flatten)]
        settings: Settings,
    },
    /// List pools
    #[command(after_help = "Example:\n  coldspark pool ls --json")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        #[command(flatten)]
        shape: Shape,
    },
    /// Remove pools; VMs that were taken from them go on
    #[command(after_help = "Example:\n  coldspark pool rm web")]
    Rm {
        #[command(flatten)]
        socket: SocketArgument,
        #[arg(required = true, value_name = "POOL")]
        pools: Vec<String>,
    },
    /// Take a VM out of a pool; it is yours, end it with `coldspark vm rm`
    #[command(
        after_help = "Examples:\n  coldspark pool take web\n  coldspark pool take api --publish 8080:80"
    )]
    Take {
        #[command(flatten)]
        socket: SocketArgument,
        pool: String,
        /// A name for the VM
        #[arg(long, default_value = "")]
        name: String,
        /// The same id gets the same VM, for 10 minutes
        #[arg(long, value_name = "ID", default_value = "")]
        request_id: String,
        /// A port of this host that leads to one of the guest, until the VM ends (may be given again); of a pool made with --net auto
        #[arg(long, value_name = "HOSTPORT:GUESTPORT[/tcp|/udp]", value_parser = parse_publish)]
        publish: Vec<proto::PublishedPort>,
        #[command(flatten)]
        shape: Shape,
        /// Show where the time went
        #[arg(long, conflicts_with = "quiet")]
        steps: bool,
    },
}

/// What can be set; what is not is left as it is, or usual.
#[derive(Debug, Args)]
pub struct Settings {
    /// How far what stands ready has come
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// So many are kept ready, whatever is asked for [usually: 1]
    #[arg(long, value_name = "N")]
    min_ready: Option<u32>,
    /// Most at once, those in use among them [usually: 64]
    #[arg(long, value_name = "N")]
    max: Option<u32>,
    /// One that is ready beyond what is needed is ended after this time, as 90s, 5m, 1h [usually: 60s]
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    idle_ttl: Option<Duration>,
    #[arg(long, value_enum)]
    memory_mode: Option<MemoryMode>,
    #[arg(long, value_enum)]
    identity: Option<Identity>,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    net: PoolNetArguments,
}

/// How far what stands ready has come.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Mode {
    /// Made, but its guest has not run
    Shell,
    /// Has its identity, and was paused
    Paused,
    /// Runs
    Running,
}

impl Mode {
    pub fn number(self) -> i32 {
        match self {
            Self::Shell => proto::PoolMode::Shell,
            Self::Paused => proto::PoolMode::Paused,
            Self::Running => proto::PoolMode::Running,
        }
        .into()
    }
}

impl Settings {
    fn idle_ttl_ms(&self) -> Option<u32> {
        // What is too long is refused by the service.
        self.idle_ttl.map(|ttl| u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX))
    }
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create { socket, pool, snapshot, settings } => {
            let request = proto::CreatePoolRequest {
                name: pool,
                snapshot,
                mode: settings.mode.map_or(0, Mode::number),
                min_ready: settings.min_ready,
                max: settings.max.unwrap_or_default(),
                idle_ttl_ms: settings.idle_ttl_ms(),
                memory_mode: settings.memory_mode.map_or(0, MemoryMode::number),
                identity: settings.identity.map_or(0, Identity::number),
                limits: settings.limits.limits(),
                networks: settings.net.interfaces()?,
            };
            let pool = socket.connect().await?.pools.create_pool(request).await?.into_inner();
            output::line(&pool.name)?;
        }
        Command::Set { socket, pool, snapshot, settings } => {
            let interfaces = settings.net.interfaces()?;
            let request = proto::UpdatePoolRequest {
                pool,
                snapshot,
                mode: settings.mode.map(Mode::number),
                min_ready: settings.min_ready,
                max: settings.max,
                idle_ttl_ms: settings.idle_ttl_ms(),
                memory_mode: settings.memory_mode.map(MemoryMode::number),
                identity: settings.identity.map(Identity::number),
                limits: settings.limits.limits(),
                networks: (!interfaces.is_empty()).then_some(proto::NetworkInterfaces { interfaces }),
            };
            let pool = socket.connect().await?.pools.update_pool(request).await?.into_inner();
            output::line(&pool.name)?;
        }
        Command::Ls { socket, shape } => list(&socket, shape).await?,
        Command::Rm { socket, pools } => {
            let mut client = socket.connect().await?.pools;
            for pool in pools {
                client.delete_pool(proto::DeletePoolRequest { pool: pool.clone() }).await?;
                output::line(&pool)?;
            }
        }
        Command::Take { socket, pool, name, request_id, publish, shape, steps } => {
            let request = proto::TakeVmRequest { pool, name, first_call: None, request_id, publish };
            let taken = socket.connect().await?.pools.take_vm(request).await?.into_inner();
            let vm = taken.vm.unwrap_or_default();
            if shape.quiet {
                output::line(&vm.id)?;
            } else if shape.json {
                output::json(&json!({ "vm": vm::value(&vm), "was_ready": taken.was_ready }))?;
            } else {
                let how = if taken.was_ready { "was ready" } else { "was started" };
                output::line(&format!(
                    "{}  {}  {how}{}",
                    vm.id,
                    units::us(vm.start_us),
                    network::reached(&vm)
                ))?;
                if steps {
                    vm::print_steps(&vm)?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(socket: &SocketArgument, shape: Shape) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.pools;
    let pools = all_pages(async |page_token| {
        let request = proto::ListPoolsRequest { page_token, page_size: 0 };
        let list = client.list_pools(request).await?.into_inner();
        Ok((list.pools, list.next_page_token))
    })
    .await?;
    if shape.json {
        return Ok(output::json(&json!({ "pools": pools.iter().map(value).collect::<Vec<_>>() }))?);
    }
    if shape.quiet {
        return Ok(output::lines(pools.iter().map(|one| one.name.as_str()))?);
    }
    let mut table = Table::new(&[
        "NAME",
        "SNAPSHOT",
        "MODE",
        "READY",
        "WANTED",
        "IN USE",
        "MAX",
        "TAKEN",
        "OF THEM READY",
        "PER SECOND",
    ]);
    for pool in &pools {
        let counts = pool.counts.unwrap_or_default();
        table.row([
            pool.name.clone(),
            pool.snapshot.clone(),
            mode_name(pool).to_owned(),
            pool.ready.to_string(),
            pool.target.to_string(),
            pool.in_use.to_string(),
            pool.max.to_string(),
            (counts.taken_ready + counts.taken_cold).to_string(),
            counts.taken_ready.to_string(),
            format!("{:.1}", pool.rate),
        ]);
    }
    output::print(&table.text())?;
    for pool in pools.iter().filter(|pool| !pool.problem.is_empty()) {
        output::note(&format!("{} cannot be kept ready: {}", pool.name, pool.problem));
    }
    Ok(())
}

fn mode_name(pool: &proto::Pool) -> &'static str {
    match pool.mode() {
        proto::PoolMode::Paused => "paused",
        proto::PoolMode::Running => "running",
        _ => "shell",
    }
}

fn value(pool: &proto::Pool) -> Value {
    let counts = pool.counts.unwrap_or_default();
    json!({
        "name": pool.name,
        "snapshot": pool.snapshot,
        "mode": mode_name(pool),
        "min_ready": pool.min_ready,
        "max": pool.max,
        "idle_ttl_ms": pool.idle_ttl_ms,
        "managed": pool.identity() == proto::Identity::Managed,
        "ready": pool.ready,
        "stale": pool.stale,
        "making": pool.making,
        "in_use": pool.in_use,
        "target": pool.target,
        "rate": pool.rate,
        "networks": network::made_ahead(&pool.networks),
        "problem": pool.problem,
        "problem_reason": pool.problem_reason,
        "counts": {
            "taken_ready": counts.taken_ready,
            "taken_cold": counts.taken_cold,
            "refused": counts.refused,
            "made": counts.made,
            "failed": counts.failed,
            "died": counts.died,
            "ended": counts.ended,
            "without_slot": counts.without_slot,
        },
    })
}
