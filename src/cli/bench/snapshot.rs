//! `coldspark bench snapshot`: how long a running guest stands still for its snapshot, and how long until that is published.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::steps::Steps;
use super::{Latencies, guest, host, sort, spread, tell, with_service};
use crate::api::proto;
use crate::cli::private::PrivateService;
use crate::cli::units;

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
    /// Snapshot a clone, whose parent has so much data in its memory
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    parent: Option<u64>,
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
    ensure!(
        arguments.parent.is_none_or(|data| data >= PAGE_BYTES && data <= arguments.memory / 2),
        "--parent is to be between a page and half of --memory"
    );
    let mut samples = with_service(1, async |service| measure(service, &arguments).await).await?;
    sort([&mut samples.pause, &mut samples.total, &mut samples.stored_mib]);
    samples.steps.sort();
    tell(arguments.json, || samples.json(&arguments), || samples.text(&arguments))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Samples> {
    let mut client = service.client.clone();
    let mut vm = guest::boot(&mut client, arguments.memory, arguments.vcpus).await?;
    if let Some(data) = arguments.parent {
        guest::fill(&mut client, &vm, data / PAGE_BYTES, u64::MAX).await?;
        let parent = guest::freeze(&mut client, vm).await?;
        let mapped = proto::MemoryMode::Mapped.into();
        let clone = guest::clones(&mut client, &parent, 1, mapped).await?.into_iter().next();
        vm = clone.context("there is no clone")?.id;
    }
    let bar = ProgressBar::new(arguments.count.into());
    let mut samples = Samples::default();
    for n in 0..u64::from(arguments.count) + WARM_UP {
        // Something new each time.
        guest::fill(&mut client, &vm, arguments.touch / PAGE_BYTES, n).await?;
        let request = proto::CreateSnapshotRequest {
            vm: vm.clone(),
            name: String::new(),
            stop_after: false,
            ..Default::default()
        };
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
            "parent_data_bytes": arguments.parent,
            "pause_ms": spread(&self.pause),
            "total_ms": spread(&self.total),
            "stored_mib": spread(&self.stored_mib),
            "steps_us": self.steps.json(),
        })
    }

    fn text(&self, arguments: &Arguments) -> String {
        let mut table = Latencies::new();
        table.row("the guest stood still", &self.pause, 1.0);
        table.row("request to published snapshot", &self.total, 1.0);
        table.steps(&self.steps);
        let parent = match arguments.parent {
            Some(data) => format!(" (a clone of a snapshot with {})", units::bytes(data)),
            None => String::new(),
        };
        format!(
            "{} snapshots of a running embedded guest{parent}, {} of memory, {} vCPU(s), {} written to before each\n\n{}\n{:.1} MiB on disk (median)",
            arguments.count,
            units::bytes(arguments.memory),
            arguments.vcpus,
            units::bytes(arguments.touch),
            table.text(),
            units::percentile(&self.stored_mib, 0.5),
        )
    }
}
