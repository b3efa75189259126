//! `coldspark bench restore`: from the request for a clone to its first answer.
//!
//! One clone at a time of the embedded guest, over the whole road: a gRPC request on a Unix socket, a shell, the restore,
//! the identity exchange with the agent, an echo from it, the reply. Beside it, in turn with it, the floor:
//! a raw KVM restore of a memory file of the same size up to the first output of a guest of three bytes (see
//! [`crate::cli::tiny`]). Service and client are one process here; when all shells but one are used, the clones wait until the reserve
//! is full again, as it would be in a service that is not overrun.

use std::fs::File;
use std::io::IsTerminal;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::peer::{PeerArguments, Peers, Road};
use super::steps::Steps;
use super::{Latencies, guest, host, ms, plot, sort, spread, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::output;
use crate::cli::private::PrivateService;
use crate::cli::tiny::{SAY_DONE, Tiny};
use crate::cli::units;
use crate::cli::vm::MemoryMode;

/// Runs before those that count.
const WARM_UP: u32 = 5;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many clones
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
    memory_mode: MemoryMode,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Shells kept by the service; 0: each clone waits for a process of its own
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=64))]
    shells: u16,
    /// Also draw the times
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    peers: PeerArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// With --json: also each time, in order
    #[arg(long, requires = "json")]
    samples: bool,
}

impl Arguments {
    fn title(&self) -> String {
        format!(
            "{} clones of the embedded guest, {} of memory ({}), {} vCPU(s), one at a time",
            self.count,
            units::bytes(self.memory),
            self.memory_mode.name(),
            self.vcpus,
        )
    }
}

/// Milliseconds, and per step microseconds.
#[derive(Default)]
struct Samples {
    first_output: Vec<f64>,
    /// A call to the agent of a clone that has answered before.
    next_call: Vec<f64>,
    delete: Vec<f64>,
    /// A call that does next to nothing.
    empty_call: Vec<f64>,
    floor: Vec<f64>,
    /// Page faults from being let run to here, and memory that only the clone has, in KiB.
    faults: Vec<f64>,
    private_kib: Vec<f64>,
    steps: Steps,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let (mut samples, mut peers) =
        with_service(arguments.shells.into(), async |service| measure(service, &arguments).await).await?;
    let in_order = arguments.samples.then(|| samples.first_output.clone());
    samples.sort();
    peers.sort();
    if let Some(path) = &arguments.svg {
        let lines: [plot::Line; 4] = [
            ("request to first answer", &samples.first_output),
            ("raw KVM restore (floor)", &samples.floor),
            ("a call to its agent", &samples.next_call),
            ("ending a VM", &samples.delete),
        ];
        plot::latencies(path, &arguments.title(), &lines)?;
    }
    if arguments.json {
        let mut object = samples.json(&arguments);
        if let (Some(in_order), Some(object)) = (in_order, object.as_object_mut()) {
            object.insert("samples_ms".to_owned(), json!(in_order));
        }
        if let (false, Some(object)) = (peers.is_empty(), object.as_object_mut()) {
            object.insert("compared".to_owned(), peers.json(&samples.first_output));
        }
        output::json(&object)?;
    } else {
        output::line(&samples.text(&arguments))?;
        output::print(&peers.text(&samples.first_output))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<(Samples, Peers)> {
    let mut client = service.client.clone();
    let snapshot = guest::snapshot(&mut client, arguments.memory, arguments.vcpus).await?;
    let (memory, vcpus) = (arguments.memory, arguments.vcpus);
    let mut peers = Peers::new(&arguments.peers, Road::Restore, service.folder(), memory, vcpus).await?;
    let floor = Arc::new(Floor::new(service, arguments.memory)?);
    let bar = match arguments.json || !std::io::stderr().is_terminal() {
        true => ProgressBar::hidden(),
        false => ProgressBar::new(arguments.count.into()),
    };
    let mut samples = Samples::default();
    for n in 0..arguments.count + WARM_UP {
        // New shells are not to be made while others are measured.
        if service.shells_ready() <= 1 || !peers.is_empty() {
            service.settle().await?;
        }
        // In turn, so that all see the same host.
        peers.round(n >= WARM_UP).await?;
        let floor = Arc::clone(&floor);
        let floor_ms = tokio::task::spawn_blocking(move || floor.run()).await??;
        let calling = Instant::now();
        client.vms.list_vms(proto::ListVmsRequest::default()).await?;
        let empty_call_ms = ms(calling);
        let one = clone_once(&mut client, &snapshot, arguments.memory_mode.number()).await?;
        if n >= WARM_UP {
            samples.floor.push(floor_ms);
            samples.empty_call.push(empty_call_ms);
            samples.take(one);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok((samples, peers))
}

/// One clone.
struct One {
    first_output_ms: f64,
    next_call_ms: f64,
    delete_ms: f64,
    steps: Vec<proto::Step>,
    stats: proto::VmStats,
}

async fn clone_once(client: &mut Client, snapshot: &str, memory_mode: i32) -> anyhow::Result<One> {
    let begin = Instant::now();
    let vm = guest::answering_clone(client, snapshot, memory_mode).await?;
    let first_output_ms = ms(begin);
    let calling = Instant::now();
    guest::answer(client, &vm.id).await?;
    let next_call_ms = ms(calling);
    let stats = client.vms.get_vm_stats(proto::GetVmStatsRequest { vm: vm.id.clone() }).await?.into_inner();
    let deleting = Instant::now();
    client.vms.delete_vm(proto::DeleteVmRequest { vm: vm.id }).await?;
    Ok(One { first_output_ms, next_call_ms, delete_ms: ms(deleting), steps: vm.steps, stats })
}

/// The raw restore.
struct Floor {
    tiny: Tiny,
    file: File,
    bytes: u64,
}

impl Floor {
    fn new(service: &PrivateService, bytes: u64) -> anyhow::Result<Self> {
        let path = service.folder().join("floor.img");
        let options = File::options().read(true).write(true).create_new(true).open(&path);
        let mut file = options.with_context(|| format!("cannot make {}", path.display()))?;
        file.write_all(&SAY_DONE)?;
        file.set_len(bytes)?;
        Ok(Self { tiny: Tiny::new()?, file, bytes })
    }

    fn run(&self) -> anyhow::Result<f64> {
        Ok(self.tiny.restore(&self.file, self.bytes)?.as_secs_f64() * 1e3)
    }
}

impl Samples {
    fn take(&mut self, one: One) {
        self.first_output.push(one.first_output_ms);
        self.next_call.push(one.next_call_ms);
        // Numbers of one small process stay far below what a float holds exactly.
        self.faults.push((one.stats.minor_faults + one.stats.major_faults) as f64);
        self.private_kib.push((one.stats.private_dirty_bytes >> 10) as f64);
        self.delete.push(one.delete_ms);
        self.steps.take(one.steps);
    }

    fn sort(&mut self) {
        let lists = [
            &mut self.first_output,
            &mut self.next_call,
            &mut self.delete,
            &mut self.empty_call,
            &mut self.floor,
            &mut self.faults,
            &mut self.private_kib,
        ];
        sort(lists);
        self.steps.sort();
    }

    fn json(&self, arguments: &Arguments) -> Value {
        json!({
            "bench": "restore",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "memory_mode": arguments.memory_mode.name(),
            "memory_bytes": arguments.memory,
            "vcpus": arguments.vcpus,
            "shells": arguments.shells,
            "request_to_first_output_ms": spread(&self.first_output),
            "next_call_ms": spread(&self.next_call),
            "steps_us": self.steps.json(),
            "delete_ms": spread(&self.delete),
            "empty_call_ms": spread(&self.empty_call),
            "floor_ms": spread(&self.floor),
            "page_faults": spread(&self.faults),
            "private_dirty_kib": spread(&self.private_kib),
        })
    }

    fn text(&self, arguments: &Arguments) -> String {
        let mut table = Latencies::new();
        table.row("request to first answer", &self.first_output, 1.0);
        table.steps(&self.steps);
        table.row("a call to its agent", &self.next_call, 1.0);
        table.row("a call that does nothing", &self.empty_call, 1.0);
        table.row("raw KVM restore (floor)", &self.floor, 1.0);
        table.row("ending a VM", &self.delete, 1.0);
        let build =
            if cfg!(debug_assertions) { "\nThis is a debug build: measure with --release." } else { "" };
        format!(
            "{}\n\n{}\n\
             after its second answer a clone has {:.0} KiB for itself and has had {:.0} page faults (medians){build}",
            arguments.title(),
            table.text(),
            units::percentile(&self.private_kib, 0.5),
            units::percentile(&self.faults, 0.5),
        )
    }
}
