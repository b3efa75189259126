//! `coldspark bench snapshot`: how long a running guest stands still for its snapshot, and how long until that is published.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::steps::Steps;
use super::{guest, host, spread, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::output::{self, Table};
use crate::cli::private::PrivateService;
use crate::cli::units;
use proto::agent_call_request::Op;
use proto::agent_call_response::Result as Answer;

const PAGE_BYTES: u64 = 4096;
/// Snapshots before those that count.
const WARM_UP: u64 = 1;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many snapshots of one VM, which goes on after each
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// What the guest writes to before each
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = units::parse_bytes)]
    touch: u64,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Milliseconds, but for the size.
#[derive(Default)]
struct Samples {
    pause: Vec<f64>,
    total: Vec<f64>,
    stored_mib: Vec<f64>,
    steps: Steps,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    ensure!(
        arguments.touch >= PAGE_BYTES && arguments.touch <= arguments.memory / 2,
        "--touch is to be between a page and half of --memory"
    );
    let mut samples = with_service(1, async |service| measure(service, &arguments).await).await?;
    for list in [&mut samples.pause, &mut samples.total, &mut samples.stored_mib] {
        list.sort_by(f64::total_cmp);
    }
    samples.steps.sort();
    if arguments.json {
        output::json(&samples.json(&arguments))?;
    } else {
        output::print(&samples.text(&arguments))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Samples> {
    let mut client = service.client.clone();
    let vm = guest::boot(&mut client, arguments.memory, arguments.vcpus).await?;
    let bar = ProgressBar::new(arguments.count.into());
    let mut samples = Samples::default();
    for n in 0..u64::from(arguments.count) + WARM_UP {
        fill(&mut client, &vm, arguments.touch / PAGE_BYTES, n).await?;
        let request = proto::CreateSnapshotRequest { vm: vm.clone(), name: String::new(), stop_after: false };
        let taken = client.snapshots.create_snapshot(request).await?.into_inner();
        let snapshot = taken.snapshot.context("the service's answer has no snapshot")?;
        client.snapshots.delete_snapshot(proto::DeleteSnapshotRequest { snapshot: snapshot.id }).await?;
        if n < WARM_UP {
            continue;
        }
        // Times and sizes of one machine stay far below what a float holds exactly.
        samples.pause.push(taken.pause_us as f64 * 1e-3);
        samples.total.push(taken.total_us as f64 * 1e-3);
        samples.stored_mib.push(snapshot.stored_bytes as f64 / f64::from(1 << 20));
        samples.steps.take(taken.steps);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(samples)
}

/// Writes something new to all of `pages`.
async fn fill(client: &mut Client, vm: &str, pages: u64, seed: u64) -> anyhow::Result<()> {
    let mode = proto::TouchMode::Fill.into();
    let op = Op::Touch(proto::TouchOp { first_page: 0, pages, stride: 1, seed, mode });
    let request = proto::AgentCallRequest { vm: vm.to_owned(), timeout_ms: 0, op: Some(op) };
    match client.agent.call(request).await?.into_inner().result {
        Some(Answer::Touch(touch)) if touch.pages == pages => Ok(()),
        other => anyhow::bail!("asked to fill {pages} pages, the guest answered {other:?}"),
    }
}

impl Samples {
    fn json(&self, arguments: &Arguments) -> Value {
        json!({
            "bench": "snapshot",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "memory_bytes": arguments.memory,
            "touched_bytes": arguments.touch,
            "vcpus": arguments.vcpus,
            "pause_ms": spread(&self.pause),
            "total_ms": spread(&self.total),
            "stored_mib": spread(&self.stored_mib),
            "steps_us": self.steps.json(),
        })
    }

    fn text(&self, arguments: &Arguments) -> String {
        let mut table = Table::new(&["", "MEDIAN", "P90", "P99", "P99.9", "SLOWEST"]);
        let mut row = |name: &str, values: &[f64], scale: f64| {
            let at = |share| units::ms(units::percentile(values, share) * scale);
            table.row([name.to_owned(), at(0.5), at(0.9), at(0.99), at(0.999), at(1.0)]);
        };
        row("the guest stood still", &self.pause, 1.0);
        row("request to published snapshot", &self.total, 1.0);
        for (name, values) in self.steps.iter() {
            let indent = if name.contains('/') { "    " } else { "  " };
            row(&format!("{indent}{}", name.rsplit('/').next().unwrap_or(name)), values, 1e-3);
        }
        format!(
            "{} snapshots of a running embedded guest, {} of memory, {} vCPU(s), {} written to before each\n\n{}\n{:.1} MiB on disk (median)",
            arguments.count,
            units::bytes(arguments.memory),
            arguments.vcpus,
            units::bytes(arguments.touch),
            table.text(),
            units::percentile(&self.stored_mib, 0.5),
        )
    }
}
