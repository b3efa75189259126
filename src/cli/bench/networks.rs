//! `coldspark bench networks`: what a network slot adds to a clone.
//!
//! Clones without a link, with a slot, and with a slot and a list of its own take turns, so that each sees the same host. All of them are
//! asked for when shells and slots stand ready, as in a service that is not at its limit.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{Latencies, guest, host, ms, sort, spread, tell, with};
use crate::api::proto;
use crate::cli::output::Table;
use crate::cli::private::{PrivateService, Setting};
use crate::cli::units;
use proto::network_interface::Link;

/// Clones before those that count, in each turn.
const WARM_UP: u32 = 3;
/// Slots that stand ready.
const SLOTS: usize = 4;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones of each kind
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Turns of each kind
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = units::parse_bytes)]
    memory: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a clone is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Slot,
    Listed,
}

impl Kind {
    const ALL: [Kind; 3] = [Self::None, Self::Slot, Self::Listed];

    fn name(self) -> &'static str {
        match self {
            Self::None => "no link",
            Self::Slot => "a slot",
            Self::Listed => "a slot and a list",
        }
    }

    fn networks(self) -> Vec<proto::NetworkInterface> {
        let allow = match self {
            Self::None => return Vec::new(),
            Self::Slot => Vec::new(),
            Self::Listed => vec![proto::AllowedDestination {
                network: "192.0.2.0/24".to_owned(),
                port: 443,
                transport: proto::Transport::Tcp.into(),
            }],
        };
        let slot = proto::SlotLink { allow, ..proto::SlotLink::default() };
        vec![proto::NetworkInterface { link: Some(Link::Slot(slot)), ..proto::NetworkInterface::default() }]
    }
}

/// Milliseconds of one kind.
struct Samples {
    kind: Kind,
    /// From the request to the answer, as the caller sees it.
    clone: Vec<f64>,
    delete: Vec<f64>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let setting = Setting { shells: 16, working_sets: true, networks: SLOTS };
    let service = PrivateService::start_as(setting).await?;
    let mut all = with(service, async |service| measure(service, &arguments).await).await?;
    for samples in &mut all {
        sort([&mut samples.clone, &mut samples.delete]);
    }
    tell(arguments.json, || to_json(&all, &arguments), || text(&all, &arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Vec<Samples>> {
    let mut client = service.client.clone();
    let snapshot = snapshot(service, arguments.memory).await?;
    let per_turn = arguments.count.div_ceil(arguments.turns);
    let bar = ProgressBar::new(u64::from(per_turn) * u64::from(arguments.turns) * Kind::ALL.len() as u64);
    let mut all: Vec<Samples> =
        Kind::ALL.iter().map(|kind| Samples { kind: *kind, clone: Vec::new(), delete: Vec::new() }).collect();
    for _ in 0..arguments.turns {
        for samples in &mut all {
            for n in 0..per_turn + WARM_UP {
                if service.shells_ready() <= 1 {
                    service.settle().await?;
                }
                service.slots_ready().await?;
                let request = proto::CloneVmRequest {
                    snapshot: snapshot.clone(),
                    memory_mode: proto::MemoryMode::Mapped.into(),
                    identity: proto::Identity::Managed.into(),
                    networks: samples.kind.networks(),
                    ..proto::CloneVmRequest::default()
                };
                let begin = Instant::now();
                let vms = client.vms.clone_vm(request).await?.into_inner().vms;
                let clone_ms = ms(begin);
                let vm = vms.into_iter().next().context("no clone in the answer")?;
                let deleting = Instant::now();
                client.vms.delete_vm(proto::DeleteVmRequest { vm: vm.id }).await?;
                if n >= WARM_UP {
                    samples.clone.push(clone_ms);
                    samples.delete.push(ms(deleting));
                    bar.inc(1);
                }
            }
        }
    }
    bar.finish_and_clear();
    Ok(all)
}

/// Of the embedded guest with an interface that is up.
async fn snapshot(service: &PrivateService, memory_bytes: u64) -> anyhow::Result<String> {
    let mut client = service.client.clone();
    let vm = guest::boot_networked(&mut client, memory_bytes, Kind::Slot.networks()).await?;
    guest::freeze(&mut client, vm).await
}

/// Milliseconds more than without a link.
fn added(all: &[Samples], samples: &Samples, share: f64) -> f64 {
    let none = all.iter().find(|samples| samples.kind == Kind::None);
    let none = none.map_or(f64::NAN, |none| units::percentile(&none.clone, share));
    units::percentile(&samples.clone, share) - none
}

fn to_json(all: &[Samples], arguments: &Arguments) -> Value {
    let rows: Vec<Value> = all
        .iter()
        .map(|samples| {
            json!({
                "link": samples.kind.name(),
                "clone_ms": spread(&samples.clone),
                "delete_ms": spread(&samples.delete),
                "p50_added_ms": units::round3(added(all, samples, 0.5)),
                "p99_added_ms": units::round3(added(all, samples, 0.99)),
            })
        })
        .collect();
    json!({
        "bench": "networks",
        "host": host::description(),
        "date_unix_s": host::unix_s(),
        "n": arguments.count,
        "turns": arguments.turns,
        "slots": SLOTS,
        "memory_bytes": arguments.memory,
        "with": rows,
    })
}

fn text(all: &[Samples], arguments: &Arguments) -> String {
    let mut times = Latencies::new();
    let mut more = Table::new(&["WITH", "MEDIAN", "P99"]);
    for samples in all {
        times.row(samples.kind.name(), &samples.clone, 1.0);
        let times = |share| units::ms(added(all, samples, share));
        more.row([samples.kind.name().to_owned(), times(0.5), times(0.99)]);
    }
    format!(
        "request to hand-over of {} clones of each kind, in {} turns\n\n{}\nmore than without a link\n\n{}",
        arguments.count,
        arguments.turns,
        times.text(),
        more.text(),
    )
}
