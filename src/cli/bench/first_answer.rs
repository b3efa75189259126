//! `coldspark bench first-answer`: what a clone's first answer costs when it needs memory: nothing, some of the snapshot's pages
//! read, as many written. Beside it the floor: a process that maps a file of that size privately and touches each page.
//!
//! Each kind has a snapshot of its own, of which the working set is learnt before anything counts. With `--cold` the service begins
//! anew before each clone and finds the snapshot's memory on disk only, as after a reboot of the host.

#![allow(unsafe_code)]

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use memmap2::MmapOptions;
use serde_json::{Map, Value, json};

use super::guest::Pages;
use super::{folios, guest, host, ms, plot, sort, spread, tell, with};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::output::Table;
use crate::cli::private::{PrivateService, Setting, unless_interrupted};
use crate::cli::units;
use crate::cli::vm::MemoryMode;

const PAGE_BYTES: u64 = 4096;
/// Of the pattern that is written.
const SEED: u64 = 1;
/// Rounds before those that count.
const WARM_UP: u32 = 3;
/// Clones that a working set may take to be learnt: some may end before they are looked at.
const LEARN_FROM_MAX: u32 = 50;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones of each kind
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// What the first answer reads or writes of the snapshot's memory
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = units::parse_bytes)]
    touch: u64,
    /// Data in the snapshot's memory besides its program, of which the last is touched [default: as much as is touched]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    data: Option<u64>,
    #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
    memory_mode: MemoryMode,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// Shells kept by the service
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=64))]
    shells: u16,
    /// Let the service learn no working set
    #[arg(long)]
    no_working_sets: bool,
    /// Have the snapshot's memory in the page cache in single pages, not folded
    #[arg(long, conflicts_with = "cold")]
    small_folios: bool,
    /// Have none of it in the page cache, and a service that has just begun
    #[arg(long)]
    cold: bool,
    /// Also draw the times
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
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
    /// Touches nothing, where the working set was learnt from clones that wrote.
    Unexpected,
}

const KINDS: [Kind; 4] = [Kind::Nothing, Kind::Reads, Kind::Writes, Kind::Unexpected];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "touches_nothing",
            Self::Reads => "reads",
            Self::Writes => "writes",
            Self::Unexpected => "expected_to_write_touches_nothing",
        }
    }

    /// What the working set is learnt from.
    fn learnt_from(self) -> Self {
        match self {
            Self::Unexpected => Self::Writes,
            other => other,
        }
    }
}

impl Arguments {
    fn data(&self) -> u64 {
        self.data.unwrap_or(self.touch)
    }

    fn title(&self) -> String {
        let working_set = if self.no_working_sets { "no working set" } else { "working set learnt" };
        let cache = match (self.cold, self.small_folios) {
            (true, _) => "not in the page cache",
            (false, true) => "in the page cache in single pages",
            (false, false) => "in the page cache, folded",
        };
        format!(
            "{} clones of each kind of the embedded guest, {} of memory ({}, {cache}, {working_set}), 1 vCPU, one at a time",
            self.count,
            units::bytes(self.memory),
            self.memory_mode.name(),
        )
    }

    /// What a first answer of this kind touches.
    fn touched(&self, kind: Kind) -> Pages {
        let count = self.touch / PAGE_BYTES;
        match kind {
            Kind::Reads | Kind::Writes => Pages { first: self.data() / PAGE_BYTES - count, count },
            Kind::Nothing | Kind::Unexpected => Pages { first: 0, count: 0 },
        }
    }
}

/// Milliseconds.
#[derive(Default)]
struct Samples {
    /// As [`KINDS`].
    answer: [Vec<f64>; KINDS.len()],
    page_faults: [Vec<f64>; KINDS.len()],
    floor_reads: Vec<f64>,
    floor_writes: Vec<f64>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    ensure!(
        arguments.touch >= PAGE_BYTES
            && arguments.touch <= arguments.data()
            && arguments.data() <= arguments.memory / 2,
        "--touch is to be a page or more, and at most --data, which is to be at most half of --memory"
    );
    let working_sets = !arguments.no_working_sets;
    let setting = Setting { shells: arguments.shells.into(), working_sets, networks: 0 };
    let service = PrivateService::start_as(setting).await?;
    let mut samples = match arguments.cold {
        false => with(service, async |service| measure(service, &arguments).await).await?,
        // Dropped, the service ends too.
        true => unless_interrupted(cold(service, &arguments)).await?,
    };
    let lists = samples.answer.iter_mut().chain(&mut samples.page_faults);
    sort(lists.chain([&mut samples.floor_reads, &mut samples.floor_writes]));
    if let Some(path) = &arguments.svg {
        let size = units::bytes(arguments.touch);
        let [reads, writes] = ["reads", "writes"].map(|does| format!("first answer that {does} {size}"));
        let [maps_reads, maps_writes] =
            ["reads", "writes"].map(|does| format!("a process that maps and {does} {size}"));
        let names = ["first answer", &reads, &writes, "first answer, expected to write"];
        let mut lines: Vec<plot::Line> =
            names.into_iter().zip(samples.answer.iter().map(Vec::as_slice)).collect();
        lines.extend([(&*maps_reads, &*samples.floor_reads), (&*maps_writes, &*samples.floor_writes)]);
        plot::latencies(path, &arguments.title(), &lines)?;
    }
    tell(arguments.json, || json(&arguments, &samples), || text(&arguments, &samples))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<Samples> {
    let floor = Floor::new(service, arguments.touch)?;
    let mut samples = Samples::default();
    for kind in KINDS {
        let snapshot = snapshot(service, arguments, kind).await?;
        service.settle().await?;
        for n in 0..arguments.count + WARM_UP {
            // In turn, so that both see the same host.
            let floors = tokio::task::block_in_place(|| floor.run())?;
            if service.shells_ready() <= 1 {
                service.settle().await?;
            }
            let clone = clone(&mut service.client.clone(), &snapshot, arguments, kind).await?;
            if n >= WARM_UP {
                samples.add(kind, clone, floors);
            }
        }
    }
    Ok(samples)
}

/// The same, but each clone is the first of a service that has just begun, and its memory is on disk only.
async fn cold(mut service: PrivateService, arguments: &Arguments) -> anyhow::Result<Samples> {
    let floor = Floor::new(&service, arguments.touch)?;
    let mut samples = Samples::default();
    for kind in KINDS {
        let snapshot = snapshot(&service, arguments, kind).await?;
        for _ in 0..arguments.count {
            service = service.restart().await?;
            service.settle().await?;
            let file = service.memory_file(&snapshot);
            let floors = tokio::task::block_in_place(|| {
                folios::drop_from_cache(&file)?;
                floor.run()
            })?;
            samples.add(kind, clone(&mut service.client.clone(), &snapshot, arguments, kind).await?, floors);
        }
    }
    service.close().await;
    Ok(samples)
}

impl Samples {
    fn add(&mut self, kind: Kind, (took, faults): (f64, f64), (reads, writes): (f64, f64)) {
        self.floor_reads.push(reads);
        self.floor_writes.push(writes);
        if let (Some(answer), Some(page_faults)) =
            (self.answer.get_mut(kind as usize), self.page_faults.get_mut(kind as usize))
        {
            answer.push(took);
            page_faults.push(faults);
        }
    }
}

/// A snapshot whose working set has been learnt from clones of this kind.
async fn snapshot(service: &PrivateService, arguments: &Arguments, kind: Kind) -> anyhow::Result<String> {
    let mut client = service.client.clone();
    let vm = guest::boot(&mut client, arguments.memory, 1).await?;
    // Pages that are in the snapshot's file: not zero.
    guest::fill(&mut client, &vm, arguments.data() / PAGE_BYTES, SEED).await?;
    let snapshot = guest::freeze(&mut client, vm).await?;
    if arguments.small_folios {
        let file = service.memory_file(&snapshot);
        tokio::task::block_in_place(|| folios::read_in_single_pages(&file))?;
    }
    if arguments.no_working_sets {
        return Ok(snapshot);
    }
    for _ in 0..LEARN_FROM_MAX {
        clone(&mut client, &snapshot, arguments, kind.learnt_from()).await?;
        let request = proto::GetSnapshotRequest { snapshot: snapshot.clone() };
        let described = client.snapshots.get_snapshot(request).await?.into_inner();
        if described.working_set.is_some_and(|set| set.learnt) {
            return Ok(snapshot);
        }
    }
    anyhow::bail!(
        "the working set was not learnt from {LEARN_FROM_MAX} clones; COLDSPARK_LOG=debug tells why"
    )
}

/// Makes a clone and ends it: milliseconds to its first answer, and its page faults until then.
async fn clone(
    client: &mut Client,
    snapshot: &str,
    arguments: &Arguments,
    kind: Kind,
) -> anyhow::Result<(f64, f64)> {
    let pages = arguments.touched(kind);
    let mode = if kind == Kind::Writes { proto::TouchMode::Write } else { proto::TouchMode::Read };
    let first_call = pages.touch(String::new(), SEED, mode);
    let begin = Instant::now();
    let (vm, answer) =
        guest::asked_clone(client, snapshot, arguments.memory_mode.number(), first_call).await?;
    let took = ms(begin);
    let vm = vm.id;
    pages.check(answer)?;
    let stats = client.vms.get_vm_stats(proto::GetVmStatsRequest { vm: vm.clone() }).await?.into_inner();
    client.vms.delete_vm(proto::DeleteVmRequest { vm }).await?;
    // Far below what a float holds exactly.
    Ok((took, (stats.minor_faults + stats.major_faults + stats.userfaults) as f64))
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

fn json(arguments: &Arguments, samples: &Samples) -> Value {
    let kinds = KINDS.iter().zip(samples.answer.iter().zip(&samples.page_faults));
    let kinds: Map<String, Value> = kinds
        .map(|(kind, (answer, faults))| {
            let value = json!({ "first_answer_ms": spread(answer), "page_faults": spread(faults) });
            (kind.name().to_owned(), value)
        })
        .collect();
    json!({
        "bench": "first-answer",
        "host": host::description(),
        "date_unix_s": host::unix_s(),
        "n": arguments.count,
        "memory_mode": arguments.memory_mode.name(),
        "memory_bytes": arguments.memory,
        "touched_bytes": arguments.touch,
        "data_bytes": arguments.data(),
        "shells": arguments.shells,
        "working_sets": !arguments.no_working_sets,
        "small_folios": arguments.small_folios,
        "cold": arguments.cold,
        "answers": kinds,
        "floor_reads_ms": spread(&samples.floor_reads),
        "floor_writes_ms": spread(&samples.floor_writes),
    })
}

fn text(arguments: &Arguments, samples: &Samples) -> String {
    let size = units::bytes(arguments.touch);
    let mut table = Table::new(&["", "MEDIAN", "P90", "P99", "P99.9", "SLOWEST", "FAULTS"]);
    let mut row = |name: String, values: &[f64], faults: Option<&Vec<f64>>| {
        let at = |share| units::ms(units::percentile(values, share));
        let faults = faults.map_or(String::new(), |faults| format!("{:.0}", units::percentile(faults, 0.5)));
        table.row([name, at(0.5), at(0.9), at(0.99), at(0.999), at(1.0), faults]);
    };
    let [nothing, reads, writes, unexpected] = &samples.answer;
    let [nothing_faults, reads_faults, writes_faults, unexpected_faults] = &samples.page_faults;
    row("first answer".to_owned(), nothing, Some(nothing_faults));
    row(format!("  that reads {size}"), reads, Some(reads_faults));
    row(format!("  that writes {size}"), writes, Some(writes_faults));
    row("  that was expected to, and touches nothing".to_owned(), unexpected, Some(unexpected_faults));
    row(format!("a process that maps and reads {size}"), &samples.floor_reads, None);
    row(format!("a process that maps and writes {size}"), &samples.floor_writes, None);
    format!("{}\n\n{}", arguments.title(), table.text())
}
