//! `coldspark bench first-answer`: what a clone's first answer costs when it needs memory: nothing, some of the snapshot's pages
//! read, as many written. Beside it the floor: a process that maps a file of that size privately and touches each page.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use memmap2::MmapOptions;
use serde_json::json;

use super::{guest, host, ms, spread, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::output::{self, Table};
use crate::cli::private::PrivateService;
use crate::cli::units;
use crate::cli::vm::MemoryMode;
use proto::agent_call_request::Op;
use proto::agent_call_response::Result as Answer;

const PAGE_BYTES: u64 = 4096;
/// Rounds before those that count.
const WARM_UP: u32 = 3;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones of each kind
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// What the first answer reads or writes of the snapshot's memory
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = units::parse_bytes)]
    touch: u64,
    #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
    memory_mode: MemoryMode,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// Shells kept by the service
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=64))]
    shells: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the first answer is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing,
    Reads,
    Writes,
}

const KINDS: [Kind; 3] = [Kind::Nothing, Kind::Reads, Kind::Writes];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "touches_nothing",
            Self::Reads => "reads",
            Self::Writes => "writes",
        }
    }

    fn op(self, pages: u64) -> proto::AgentCallRequest {
        let (pages, mode) = match self {
            Self::Nothing => (0, proto::TouchMode::Read),
            Self::Reads => (pages, proto::TouchMode::Read),
            Self::Writes => (pages, proto::TouchMode::Write),
        };
        touch(String::new(), pages, mode)
    }
}

fn touch(vm: String, pages: u64, mode: proto::TouchMode) -> proto::AgentCallRequest {
    let op = Op::Touch(proto::TouchOp { first_page: 0, pages, stride: 1, seed: 1, mode: mode.into() });
    proto::AgentCallRequest { vm, timeout_ms: 0, op: Some(op) }
}

/// Milliseconds.
#[derive(Default)]
struct Samples {
    /// As [`KINDS`].
    answer: [Vec<f64>; 3],
    page_faults: [Vec<f64>; 3],
    floor_reads: Vec<f64>,
    floor_writes: Vec<f64>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    ensure!(
        arguments.touch >= PAGE_BYTES && arguments.touch <= arguments.memory / 2,
        "--touch is to be between a page and half of --memory"
    );
    let mut samples =
        with_service(arguments.shells.into(), async |service| measure(service, &arguments).await).await?;
    let lists = samples.answer.iter_mut().chain(&mut samples.page_faults);
    for list in lists.chain([&mut samples.floor_reads, &mut samples.floor_writes]) {
        list.sort_by(f64::total_cmp);
    }
    if arguments.json {
        let kinds = KINDS.iter().zip(samples.answer.iter().zip(&samples.page_faults));
        let kinds: serde_json::Map<String, serde_json::Value> = kinds
            .map(|(kind, (answer, faults))| {
                let value = json!({ "first_answer_ms": spread(answer), "page_faults": spread(faults) });
                (kind.name().to_owned(), value)
            })
            .collect();
        output::json(&json!({
            "bench": "first-answer",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "memory_mode": arguments.memory_mode.name(),
            "memory_bytes": arguments.memory,
            "touched_bytes": arguments.touch,
            "shells": arguments.shells,
            "answers": kinds,
            "floor_reads_ms": spread(&samples.floor_reads),
            "floor_writes_ms": spread(&samples.floor_writes),
        }))?;
    } else {
        output::print(&text(&arguments, &samples))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Samples> {
    let mut client = service.client.clone();
    let pages = arguments.touch / PAGE_BYTES;
    let vm = guest::boot(&mut client, arguments.memory, 1).await?;
    // Pages that are in the snapshot's file: not zero.
    touched(&mut client, touch(vm.clone(), pages, proto::TouchMode::Fill), pages).await?;
    let snapshot = guest::freeze(&mut client, vm).await?;
    let floor = Floor::new(service, arguments.touch)?;
    let mut samples = Samples::default();
    for n in 0..arguments.count + WARM_UP {
        // In turn, so that all see the same host.
        let (reads, writes) = tokio::task::block_in_place(|| floor.run())?;
        let mut round = Vec::with_capacity(KINDS.len());
        for kind in KINDS {
            if service.shells_ready() <= 1 {
                service.settle().await?;
            }
            let request = proto::CloneVmRequest {
                snapshot: snapshot.clone(),
                memory_mode: arguments.memory_mode.number(),
                identity: proto::Identity::Managed.into(),
                first_call: Some(kind.op(pages)),
                ..proto::CloneVmRequest::default()
            };
            let begin = Instant::now();
            let made = client.vms.clone_vm(request).await?.into_inner();
            let took = ms(begin);
            let vm = made.vms.into_iter().next().context("the service's answer has no VM")?.id;
            let expected = if kind == Kind::Nothing { 0 } else { pages };
            check(made.answer, expected)?;
            let stats =
                client.vms.get_vm_stats(proto::GetVmStatsRequest { vm: vm.clone() }).await?.into_inner();
            client.vms.delete_vm(proto::DeleteVmRequest { vm }).await?;
            // Far below what a float holds exactly.
            round.push((took, (stats.minor_faults + stats.major_faults) as f64));
        }
        if n < WARM_UP {
            continue;
        }
        samples.floor_reads.push(reads);
        samples.floor_writes.push(writes);
        for ((answer, faults), (took, count)) in
            samples.answer.iter_mut().zip(&mut samples.page_faults).zip(round)
        {
            answer.push(took);
            faults.push(count);
        }
    }
    Ok(samples)
}

async fn touched(client: &mut Client, request: proto::AgentCallRequest, pages: u64) -> anyhow::Result<()> {
    check(Some(client.agent.call(request).await?.into_inner()), pages)
}

fn check(answer: Option<proto::AgentCallResponse>, pages: u64) -> anyhow::Result<()> {
    match answer.and_then(|answer| answer.result) {
        Some(Answer::Touch(touch)) if touch.pages == pages => Ok(()),
        other => anyhow::bail!("asked for {pages} pages, the guest answered {other:?}"),
    }
}

/// A file in the page cache.
struct Floor(File);

impl Floor {
    fn new(service: &PrivateService, bytes: u64) -> anyhow::Result<Self> {
        let path = service.folder().join("touch.img");
        let options = File::options().read(true).write(true).create_new(true).open(&path);
        let mut file = options.with_context(|| format!("cannot make {}", path.display()))?;
        let page = [1; PAGE_BYTES as usize];
        for _ in 0..bytes / PAGE_BYTES {
            file.write_all(&page)?;
        }
        Ok(Self(file))
    }

    /// Milliseconds for reading and for writing one byte of each page.
    fn run(&self) -> anyhow::Result<(f64, f64)> {
        let begin = Instant::now();
        // SAFETY: a private mapping of a file that nobody changes or truncates while it lives: only this bench has it.
        let mapped = unsafe { MmapOptions::new().map_copy_read_only(&self.0) }?;
        let sum: u64 = mapped.iter().step_by(PAGE_BYTES as usize).map(|byte| u64::from(*byte)).sum();
        black_box(sum);
        let reads = ms(begin);
        drop(mapped);
        let begin = Instant::now();
        // SAFETY: as above; what is written stays in this mapping.
        let mut mapped = unsafe { MmapOptions::new().map_copy(&self.0) }?;
        mapped.iter_mut().step_by(PAGE_BYTES as usize).for_each(|byte| *byte = 2);
        black_box(&mapped);
        Ok((reads, ms(begin)))
    }
}

fn text(arguments: &Arguments, samples: &Samples) -> String {
    let size = units::bytes(arguments.touch);
    let mut table = Table::new(&["", "MEDIAN", "P90", "P99", "P99.9", "SLOWEST", "FAULTS"]);
    let mut row = |name: String, values: &[f64], faults: Option<&Vec<f64>>| {
        let at = |share| units::ms(units::percentile(values, share));
        let faults = faults.map_or(String::new(), |faults| format!("{:.0}", units::percentile(faults, 0.5)));
        table.row([name, at(0.5), at(0.9), at(0.99), at(0.999), at(1.0), faults]);
    };
    let [nothing, reads, writes] = &samples.answer;
    let [nothing_faults, reads_faults, writes_faults] = &samples.page_faults;
    row("first answer".to_owned(), nothing, Some(nothing_faults));
    row(format!("  that reads {size}"), reads, Some(reads_faults));
    row(format!("  that writes {size}"), writes, Some(writes_faults));
    row(format!("a process that maps and reads {size}"), &samples.floor_reads, None);
    row(format!("a process that maps and writes {size}"), &samples.floor_writes, None);
    format!(
        "{} clones of each kind of the embedded guest, {} of memory ({}), 1 vCPU, one at a time\n\n{}",
        arguments.count,
        units::bytes(arguments.memory),
        arguments.memory_mode.name(),
        table.text(),
    )
}
