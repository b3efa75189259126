//! `coldspark bench throughput`: clones made, asked once and ended, by several clients at the same time; and whether anything is
//! left of them.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::json;
use tokio::task::JoinSet;

use super::resources::Held;
use super::{Latencies, guest, host, ms, spread, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::output::{self, Table};
use crate::cli::private::PrivateService;
use crate::cli::units;
use crate::cli::vm::MemoryMode;

/// Runs before those that count.
const WARM_UP: u32 = 20;
/// How long the last workers may take to be reaped.
const REAPED_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones in all
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Clients that each make one clone after the other
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    clients: u32,
    /// Shells that the service keeps ready
    #[arg(long, value_name = "N", default_value_t = 8)]
    shells: usize,
    #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
    memory_mode: MemoryMode,
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

struct Measured {
    seconds: f64,
    /// Sorted milliseconds of request to first answer, and of deletion.
    first_output: Vec<f64>,
    delete: Vec<f64>,
    before: Held,
    after: Held,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let measured = with_service(arguments.shells, async |service| measure(service, &arguments).await).await?;
    let rate = f64::from(arguments.count) / measured.seconds;
    if arguments.json {
        output::json(&json!({
            "bench": "throughput",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "clients": arguments.clients,
            "shells": arguments.shells,
            "memory_mode": arguments.memory_mode.name(),
            "memory_bytes": arguments.memory,
            "vcpus": arguments.vcpus,
            "seconds": units::round3(measured.seconds),
            "clones_per_second": units::round3(rate),
            "request_to_first_output_ms": spread(&measured.first_output),
            "delete_ms": spread(&measured.delete),
            "held_before": measured.before.json(),
            "held_after": measured.after.json(),
        }))?;
    } else {
        output::print(&text(&arguments, &measured, rate))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Measured> {
    let mut client = service.client.clone();
    let snapshot = guest::snapshot(&mut client, arguments.memory, arguments.vcpus).await?;
    turns(service, arguments, &snapshot, WARM_UP).await?;
    let before = quiet(service, None).await?;
    let begin = Instant::now();
    let (mut first_output, mut delete) = turns(service, arguments, &snapshot, arguments.count).await?;
    let seconds = begin.elapsed().as_secs_f64();
    let after = quiet(service, Some(before)).await?;
    first_output.sort_by(f64::total_cmp);
    delete.sort_by(f64::total_cmp);
    Ok(Measured { seconds, first_output, delete, before, after })
}

/// `count` clones, by all clients together.
async fn turns(
    service: &PrivateService,
    arguments: &Arguments,
    snapshot: &str,
    count: u32,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let left = Arc::new(AtomicU32::new(count));
    let mut clients = JoinSet::new();
    for _ in 0..arguments.clients {
        let (client, left, snapshot) = (service.client.clone(), Arc::clone(&left), snapshot.to_owned());
        let memory_mode = arguments.memory_mode.number();
        clients.spawn(async move { one_client(client, &snapshot, memory_mode, &left).await });
    }
    let (mut first_output, mut delete) = (Vec::new(), Vec::new());
    while let Some(ended) = clients.join_next().await {
        let (outputs, deletes) = ended.context("a client's task")??;
        first_output.extend(outputs);
        delete.extend(deletes);
    }
    Ok((first_output, delete))
}

async fn one_client(
    mut client: Client,
    snapshot: &str,
    memory_mode: i32,
    left: &AtomicU32,
) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let (mut first_output, mut delete) = (Vec::new(), Vec::new());
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
        let begin = Instant::now();
        let vm = guest::answering_clone(&mut client, snapshot, memory_mode).await?;
        first_output.push(ms(begin));
        let deleting = Instant::now();
        client.vms.delete_vm(proto::DeleteVmRequest { vm: vm.id }).await?;
        delete.push(ms(deleting));
    }
    Ok((first_output, delete))
}

/// What is held when no clone is left, the shells are there again, and what came to its end has been cleaned away: a number of workers and
/// descriptors that is the wanted one, or does not become it.
async fn quiet(service: &PrivateService, wanted: Option<Held>) -> anyhow::Result<Held> {
    let began = Instant::now();
    loop {
        service.settle().await?;
        let held = Held::now()?;
        let same = |wanted: Held| (held.workers, held.descriptors) <= (wanted.workers, wanted.descriptors);
        if wanted.is_none_or(same) || began.elapsed() > REAPED_WITHIN {
            return Ok(held);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn text(arguments: &Arguments, measured: &Measured, rate: f64) -> String {
    let mut table = Latencies::new();
    table.row("request to first answer", &measured.first_output, 1.0);
    table.row("ending a VM", &measured.delete, 1.0);
    let mut held = Table::new(&["HELD", "DESCRIPTORS", "THREADS", "WORKERS", "RESIDENT"]);
    for (when, what) in [("before", measured.before), ("after", measured.after)] {
        let resident = units::bytes(what.resident_bytes);
        let numbers = [what.descriptors.to_string(), what.threads.to_string(), what.workers.to_string()];
        let [descriptors, threads, workers] = numbers;
        held.row([when.to_owned(), descriptors, threads, workers, resident]);
    }
    format!(
        "{} clones of the embedded guest, {} of memory ({}), {} vCPU(s), {} client(s), {} shells: {rate:.0} a second\n\n{}\n{}",
        arguments.count,
        units::bytes(arguments.memory),
        arguments.memory_mode.name(),
        arguments.vcpus,
        arguments.clients,
        arguments.shells,
        table.text(),
        held.text(),
    )
}
