//! `coldspark bench neighbours`: what a clone's first answer takes beside guests that do their worst.
//!
//! All kinds of neighbours take turns, and so does being alone, so that each sees the same host: what counts is the ratio.

use std::collections::HashMap;
use std::fs::File;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{Latencies, guest, host, ms, sort, spread, tell, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::limits::LimitArguments;
use crate::cli::output::Table;
use crate::cli::private::PrivateService;
use crate::cli::units;
use proto::agent_call_request::Op;

/// Clones before those that count, in each turn.
const WARM_UP: u32 = 3;
/// Of the neighbours' disk.
const DISK_BYTES: u64 = 64 << 20;
/// Each takes the guest some seconds.
const COMPUTATIONS: u64 = 32;
/// How long they would go on if they were not ended.
const MS: &str = "3600000";

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones beside each kind of neighbours, and alone
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// How many neighbours at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    neighbours: u32,
    /// Turns of each kind
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// What the neighbours may take
    #[command(flatten)]
    limits: LimitArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the neighbours do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Idle,
    Spin,
    Console,
    Interrupts,
    Memory,
    Disk,
    Silent,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Self::None,
        Self::Idle,
        Self::Spin,
        Self::Console,
        Self::Interrupts,
        Self::Memory,
        Self::Disk,
        Self::Silent,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::None => "alone",
            Self::Idle => "idle",
            Self::Spin => "spinning",
            Self::Console => "flooding their consoles",
            Self::Interrupts => "flooding interrupts",
            Self::Memory => "writing memory",
            Self::Disk => "writing and flushing a disk",
            Self::Silent => "never answering",
        }
    }

    /// The embedded guest's command for it.
    fn command(self) -> Option<Vec<String>> {
        let words: &[&str] = match self {
            Self::None | Self::Idle | Self::Silent => return None,
            Self::Spin => &["spin", MS],
            Self::Console => &["flood", "console", MS],
            Self::Interrupts => &["flood", "interrupts", MS],
            Self::Memory => &["flood", "memory", MS],
            Self::Disk => &["flood", "disk", MS],
        };
        Some(words.iter().map(|word| (*word).to_owned()).collect())
    }
}

/// Milliseconds beside one kind.
struct Samples {
    kind: Kind,
    first_answer: Vec<f64>,
    delete: Vec<f64>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let mut all = with_service(16, async |service| measure(service, &arguments).await).await?;
    for samples in &mut all {
        sort([&mut samples.first_answer, &mut samples.delete]);
    }
    tell(arguments.json, || to_json(&all, &arguments), || text(&all, &arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Vec<Samples>> {
    let mut client = service.client.clone();
    let measured = guest::snapshot(&mut client, arguments.memory, 1).await?;
    let worst = neighbour_snapshot(service, arguments.memory).await?;
    let per_turn = arguments.count.div_ceil(arguments.turns);
    let bar = ProgressBar::new(u64::from(per_turn) * u64::from(arguments.turns) * Kind::ALL.len() as u64);
    let mut all: Vec<Samples> = Kind::ALL
        .iter()
        .map(|kind| Samples { kind: *kind, first_answer: Vec::new(), delete: Vec::new() })
        .collect();
    for _ in 0..arguments.turns {
        for samples in &mut all {
            let neighbours = Neighbours::start(service, &worst, samples.kind, arguments).await?;
            for n in 0..per_turn + WARM_UP {
                // Shells are made beside the neighbours too, but not beside a clone that is measured.
                if service.shells_ready() <= 1 {
                    service.settle().await?;
                }
                let begin = Instant::now();
                let vm =
                    guest::answering_clone(&mut client, &measured, proto::MemoryMode::Mapped.into()).await?;
                let first_answer_ms = ms(begin);
                let deleting = Instant::now();
                client.vms.delete_vm(proto::DeleteVmRequest { vm: vm.id }).await?;
                if n >= WARM_UP {
                    samples.first_answer.push(first_answer_ms);
                    samples.delete.push(ms(deleting));
                    bar.inc(1);
                }
            }
            neighbours.end(&mut client).await?;
        }
    }
    bar.finish_and_clear();
    Ok(all)
}

/// Of a guest with a disk to write to.
async fn neighbour_snapshot(service: &PrivateService, memory_bytes: u64) -> anyhow::Result<String> {
    let path = service.folder().join("neighbour.img");
    let file = File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.set_len(DISK_BYTES)?;
    let path = path.to_str().context("the temporary folder's name is no UTF-8")?.to_owned();
    let mode = proto::DiskMode::Overlay.into();
    let mut client = service.client.clone();
    let vm = guest::boot_with(&mut client, memory_bytes, 1, vec![proto::DiskFile { path, mode }]).await?;
    guest::freeze(&mut client, vm).await
}

/// Those of one turn, at it.
struct Neighbours {
    kind: Kind,
    vms: Vec<String>,
    /// Calls under way in them.
    calls: JoinSet<()>,
}

impl Neighbours {
    async fn start(
        service: &PrivateService,
        snapshot: &str,
        kind: Kind,
        arguments: &Arguments,
    ) -> anyhow::Result<Self> {
        let mut neighbours = Self { kind, vms: Vec::new(), calls: JoinSet::new() };
        if kind == Kind::None {
            return Ok(neighbours);
        }
        let mut client = service.client.clone();
        let request = proto::CloneVmRequest {
            snapshot: snapshot.to_owned(),
            count: arguments.neighbours,
            memory_mode: proto::MemoryMode::Mapped.into(),
            identity: proto::Identity::Managed.into(),
            limits: arguments.limits.limits(),
            ..proto::CloneVmRequest::default()
        };
        for vm in client.vms.clone_vm(request).await?.into_inner().vms {
            if kind == Kind::Silent {
                // It computes for minutes, and hears nobody meanwhile.
                for seed in 0..COMPUTATIONS {
                    let op = Op::RunOnAll(proto::RunOnAllOp { seed, rounds: 1 << 32 });
                    let call =
                        proto::AgentCallRequest { vm: vm.id.clone(), timeout_ms: 600_000, op: Some(op) };
                    neighbours.ask(&client, call);
                }
                neighbours.pester(&client, vm.id.clone());
            } else if let Some(command) = kind.command() {
                neighbours.exec(&mut client, vm.id.clone(), command).await?;
            }
            neighbours.vms.push(vm.id);
        }
        Ok(neighbours)
    }

    fn ask(&mut self, client: &Client, call: proto::AgentCallRequest) {
        let mut agent = client.agent.clone();
        self.calls.spawn(async move {
            // Until the VM's end: an answer is no end, and nothing to wait for.
            if agent.call(call).await.is_ok() {
                std::future::pending::<()>().await;
            }
        });
    }

    /// Somebody asks again and again.
    fn pester(&mut self, client: &Client, vm: String) {
        let mut agent = client.agent.clone();
        self.calls.spawn(async move {
            loop {
                let op = Some(Op::Time(proto::TimeOp {}));
                let call = proto::AgentCallRequest { vm: vm.clone(), timeout_ms: 50, op };
                match agent.call(call).await {
                    Err(status)
                        if !matches!(status.code(), Code::DeadlineExceeded | Code::ResourceExhausted) =>
                    {
                        return;
                    }
                    _ => {}
                }
            }
        });
    }

    /// Starts a command that goes on until the VM is ended.
    async fn exec(&mut self, client: &mut Client, vm: String, args: Vec<String>) -> anyhow::Result<()> {
        use proto::exec_request::Message;
        use proto::exec_response::Message as Answer;
        let start = proto::ExecStart { vm, args, env: HashMap::new(), ..proto::ExecStart::default() };
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        requests.send(proto::ExecRequest { message: Some(Message::Start(start)) }).await?;
        let mut answers = client.agent.exec(ReceiverStream::new(stream)).await?.into_inner();
        let first = answers.message().await?.and_then(|answer| answer.message);
        ensure!(matches!(first, Some(Answer::Started(_))), "a neighbour's command did not start: {first:?}");
        self.calls.spawn(async move {
            let _requests = requests;
            while let Ok(Some(_)) = answers.message().await {}
        });
        Ok(())
    }

    /// Looks that they are alive and at it, and ends them.
    async fn end(mut self, client: &mut Client) -> anyhow::Result<()> {
        let name = self.kind.name();
        ensure!(self.calls.try_join_next().is_none(), "a neighbour that was {name} did not go on to the end");
        for vm in self.vms {
            client.vms.delete_vm(proto::DeleteVmRequest { vm }).await?;
        }
        self.calls.shutdown().await;
        Ok(())
    }
}

/// How many times as long as alone.
fn factor(all: &[Samples], samples: &Samples, share: f64) -> f64 {
    let alone = all.iter().find(|samples| samples.kind == Kind::None);
    let alone = alone.map_or(f64::NAN, |alone| units::percentile(&alone.first_answer, share));
    units::percentile(&samples.first_answer, share) / alone
}

fn to_json(all: &[Samples], arguments: &Arguments) -> Value {
    let rows: Vec<Value> = all
        .iter()
        .map(|samples| {
            json!({
                "neighbours": samples.kind.name(),
                "first_answer_ms": spread(&samples.first_answer),
                "delete_ms": spread(&samples.delete),
                "p50_factor": units::round3(factor(all, samples, 0.5)),
                "p99_factor": units::round3(factor(all, samples, 0.99)),
            })
        })
        .collect();
    let limits = arguments.limits.limits().unwrap_or_default();
    json!({
        "bench": "neighbours",
        "host": host::description(),
        "date_unix_s": host::unix_s(),
        "n": arguments.count,
        "turns": arguments.turns,
        "neighbours": arguments.neighbours,
        "memory_bytes": arguments.memory,
        "limits": { "memory_bytes": limits.memory_bytes, "cpu_millis": limits.cpu_millis },
        "beside": rows,
    })
}

fn text(all: &[Samples], arguments: &Arguments) -> String {
    let mut times = Latencies::new();
    let mut factors = Table::new(&["BESIDE", "MEDIAN", "P99"]);
    for samples in all {
        times.row(samples.kind.name(), &samples.first_answer, 1.0);
        let times = |share| format!("{:.2} x", factor(all, samples, share));
        factors.row([samples.kind.name().to_owned(), times(0.5), times(0.99)]);
    }
    let limits = match arguments.limits.limits() {
        Some(limits) => format!("limited to {} thousandths of a CPU", limits.cpu_millis),
        None => "without limits".to_owned(),
    };
    format!(
        "request to first answer of {} clones beside each kind of {} neighbour(s), {limits}\n\n{}\nas against alone\n\n{}",
        arguments.count,
        arguments.neighbours,
        times.text(),
        factors.text(),
    )
}
