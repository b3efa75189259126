//! `coldspark bench density`: many clones of one snapshot alive at once: how long they take to start, what each costs in memory, and
//! whether the last ones still answer.

use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::resources::{self, Held, Memory};
use super::{guest, host, ms, spread, with_service};
use crate::api::proto;
use crate::cli::output::{self, Table};
use crate::cli::private::PrivateService;
use crate::cli::units;
use crate::cli::vm::MemoryMode;

/// Clones asked for at once.
const AT_ONCE: u32 = 32;
/// Shells kept by the service.
const SHELLS: usize = 16;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
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
    started_s: f64,
    /// Sorted, milliseconds, of each clone when all are alive.
    answer: Vec<f64>,
    /// Sorted, KiB.
    private_dirty: Vec<f64>,
    proportional: Vec<f64>,
    ended_s: f64,
    held: Held,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let measured = with_service(SHELLS, async |service| measure(service, &arguments).await).await?;
    if arguments.json {
        output::json(&json!({
            "bench": "density",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "memory_mode": arguments.memory_mode.name(),
            "memory_bytes": arguments.memory,
            "vcpus": arguments.vcpus,
            "shells": SHELLS,
            "started_s": units::round3(measured.started_s),
            "answer_ms": spread(&measured.answer),
            "private_dirty_kib": spread(&measured.private_dirty),
            "proportional_kib": spread(&measured.proportional),
            "ended_s": units::round3(measured.ended_s),
            "service": measured.held.json(),
        }))?;
    } else {
        output::print(&text(&arguments, &measured))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Measured> {
    let mut client = service.client.clone();
    let snapshot = guest::snapshot(&mut client, arguments.memory, arguments.vcpus).await?;
    service.settle().await?;
    let begin = Instant::now();
    let mut vms = Vec::new();
    while let left @ 1.. = arguments.count.saturating_sub(vms.len() as u32) {
        let mode = arguments.memory_mode.number();
        vms.extend(guest::clones(&mut client, &snapshot, left.min(AT_ONCE), mode).await?);
    }
    let started_s = begin.elapsed().as_secs_f64();
    let mut answer = Vec::new();
    for vm in &vms {
        let begin = Instant::now();
        guest::answer(&mut client, &vm.id).await?;
        answer.push(ms(begin));
    }
    let memory = vms.iter().map(|vm| resources::memory(vm.worker_pid)).collect::<anyhow::Result<Vec<_>>>()?;
    let held = Held::now()?;
    let begin = Instant::now();
    for vm in vms {
        client.vms.delete_vm(proto::DeleteVmRequest { vm: vm.id }).await?;
    }
    let ended_s = begin.elapsed().as_secs_f64();
    let kib = |of: fn(&Memory) -> u64| -> Vec<f64> {
        // Far below what a float holds exactly.
        sorted(memory.iter().map(|memory| (of(memory) >> 10) as f64).collect())
    };
    Ok(Measured {
        started_s,
        answer: sorted(answer),
        private_dirty: kib(|memory| memory.private_dirty),
        proportional: kib(|memory| memory.proportional),
        ended_s,
        held,
    })
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn text(arguments: &Arguments, measured: &Measured) -> String {
    let mut table = Table::new(&["", "MEDIAN", "P90", "P99", "P99.9", "MOST"]);
    let mut row = |name: &str, values: &[f64], say: &dyn Fn(f64) -> String| {
        let at = |share| say(units::percentile(values, share));
        table.row([name.to_owned(), at(0.5), at(0.9), at(0.99), at(0.999), at(1.0)]);
    };
    let kib = |kib: f64| format!("{kib:.0} KiB");
    row("answer, all alive", &measured.answer, &units::ms);
    row("private dirty memory of a worker", &measured.private_dirty, &kib);
    row("its share of all memory (PSS)", &measured.proportional, &kib);
    format!(
        "{} clones of the embedded guest alive at once, {} of memory ({}), {} vCPU(s)\nstarted in {:.2} s, ended in {:.2} s\n\n{}",
        arguments.count,
        units::bytes(arguments.memory),
        arguments.memory_mode.name(),
        arguments.vcpus,
        measured.started_s,
        measured.ended_s,
        table.text(),
    )
}
