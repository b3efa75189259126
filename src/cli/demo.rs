//! `coldspark demo`: cold boot, snapshot, clones, each asked something that only it can answer.
//!
//! All of it by gRPC, as any client could: to a private service in this process, or with `--image` to the running one.
//! A clone with an agent is checked by computing again what it answers: a digest of its own generation, a
//! number that it could not know before, and its memory. A guest without an agent cannot be given an identity; it is checked
//! by what it says on its console, and the output says so.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use prost::bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use super::image::{self, FileArguments};
use super::output::{self, Table};
use super::private::{PrivateService, unless_interrupted};
use super::snapshot::protocol_name;
use super::vm::create::{Hardware, Protocol, ReadyArguments};
use super::vm::{MemoryMode, hex};
use super::{SocketArgument, units};
use crate::agent::expect;
use crate::api::client::Client;
use crate::api::proto;
use proto::agent_call_request::Op;
use proto::agent_call_response::Result as Answer;

pub const EXAMPLES: &str = "Examples:
  coldspark demo
  coldspark demo --json
  coldspark demo --kernel kernel --disk root.ufs --ready MICROVM-READY --probe ping --expect pong";

/// Memory that a clone's answer depends on.
const COMPUTE_BYTES: u64 = 64 << 10;
/// Clones that are made one after the other, when all others are there.
const ALONE: u32 = 5;
/// How long a guest may take to answer on its console.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Use an image of the running service
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kernel", "disks", "memory_disk", "initrd"])]
    image: Option<String>,
    /// Boot this kernel instead of the embedded test guest
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// A disk (may be given again); add `:ro` to make it read-only
    #[arg(long = "disk", value_name = "FILE[:ro]", requires = "kernel")]
    disks: Vec<String>,
    /// A memory disk for FreeBSD (md_image)
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with = "initrd")]
    memory_disk: Option<PathBuf>,
    /// An initial RAM disk for Linux
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line, or name=value words for FreeBSD's environment
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = Protocol::Auto)]
    protocol: Protocol,
    /// The kind of machine
    #[arg(long, value_enum, default_value_t = Hardware::Auto)]
    hardware: Hardware,
    #[command(flatten)]
    ready: ReadyArguments,
    /// What to type on the console of a clone without agent
    #[arg(long, value_name = "TEXT", default_value = "ping")]
    probe: String,
    /// What it must then print
    #[arg(long, value_name = "TEXT", default_value = "pong")]
    expect: String,
    /// How many clones
    #[arg(short = 'n', long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    clones: u32,
    #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
    memory_mode: MemoryMode,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// Seconds to wait for the ready point
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One clone, asked and checked.
struct Clone {
    vm: proto::Vm,
    restore_ms: f64,
    first_answer_ms: f64,
    /// What is wrong with its answer.
    problem: Option<String>,
}

/// All that was seen.
struct Outcome {
    guest: String,
    vm: proto::Vm,
    cold_boot_ms: f64,
    snapshot: proto::Snapshot,
    snapshot_ms: f64,
    pause_us: u64,
    /// All at once.
    clones: Vec<Clone>,
    /// One after the other, by a service at rest.
    alone: Vec<Clone>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let (service, client) = match arguments.image {
        Some(_) => (None, arguments.socket.connect().await?),
        None => {
            let service = PrivateService::start(arguments.clones as usize).await?;
            let client = service.client.clone();
            (Some(service), client)
        }
    };
    let outcome = unless_interrupted(show(client, service.as_ref(), &arguments)).await;
    if let Some(service) = service {
        service.close().await;
    }
    let outcome = outcome?;
    if arguments.json {
        output::json(&outcome.json())?
    } else {
        output::print(&outcome.text())?
    }
    Ok(if outcome.verified() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn show(
    mut client: Client,
    service: Option<&PrivateService>,
    arguments: &Arguments,
) -> anyhow::Result<Outcome> {
    let bar = progress(arguments);
    bar.set_message("importing");
    let source = source(&mut client, arguments).await?;
    bar.set_message("cold boot");
    let begin = Instant::now();
    let booted = boot(&mut client, arguments, source).await?;
    let cold_boot_ms = ms(begin);
    bar.inc(1);

    bar.set_message("snapshot");
    let begin = Instant::now();
    let request = proto::CreateSnapshotRequest {
        vm: booted.id.clone(),
        name: String::new(),
        stop_after: false,
        ..Default::default()
    };
    let taken = client.snapshots.create_snapshot(request).await?.into_inner();
    let snapshot_ms = ms(begin);
    let snapshot = taken.snapshot.context("the service's answer has no snapshot")?;
    bar.inc(1);

    bar.set_message("clones");
    if let Some(service) = service {
        service.settle().await?;
    }
    let result = start_clones(&client, arguments, &snapshot, &bar).await;
    let alone = match &result {
        Ok(_) => one_after_the_other(&client, service, arguments, &snapshot, &bar).await,
        Err(_) => Ok(Vec::new()),
    };
    bar.finish_and_clear();
    // In a service that goes on, nothing of this may stay.
    if arguments.image.is_some() {
        let mut ended: Vec<String> = vec![booted.id.clone()];
        ended.extend(result.iter().flatten().map(|clone| clone.vm.id.clone()));
        for vm in ended {
            let _ = client.vms.delete_vm(proto::DeleteVmRequest { vm }).await;
        }
        let request = proto::DeleteSnapshotRequest { snapshot: snapshot.id.clone() };
        let _ = client.snapshots.delete_snapshot(request).await;
    }
    let (mut clones, mut alone) = (result?, alone?);
    distinct(clones.iter_mut().chain(&mut alone));
    let guest = match (booted.agent_name.as_str(), &arguments.kernel, &arguments.image) {
        ("", Some(kernel), _) => kernel.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        ("", None, Some(image)) => image.clone(),
        (name, ..) => name.to_owned(),
    };
    let pause_us = taken.pause_us;
    Ok(Outcome { guest, vm: booted, cold_boot_ms, snapshot, snapshot_ms, pause_us, clones, alone })
}

fn progress(arguments: &Arguments) -> ProgressBar {
    if arguments.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(2 + u64::from(arguments.clones + ALONE));
    // The template is a constant; a bar without it is as good.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {bar:30} {msg}  {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// What is booted: an image that is there, one made of the files given, or the embedded guest.
async fn source(
    client: &mut Client,
    arguments: &Arguments,
) -> anyhow::Result<proto::create_vm_request::Source> {
    use proto::create_vm_request::Source;
    if let Some(image) = &arguments.image {
        return Ok(Source::Image(image.clone()));
    }
    let Some(kernel) = &arguments.kernel else { return Ok(Source::Embedded(true)) };
    let files = FileArguments {
        kernel: Some(kernel.clone()),
        embedded: false,
        disks: arguments.disks.clone(),
        memory_disk: arguments.memory_disk.clone(),
        initrd: arguments.initrd.clone(),
        cmdline: arguments.cmdline.clone(),
        protocol: arguments.protocol,
        hardware: arguments.hardware,
        agent_port: None,
    };
    let ready = arguments.ready.point();
    let image =
        image::import(client, "demo".to_owned(), &files, ready, arguments.vcpus, arguments.memory).await?;
    Ok(Source::Image(image.name))
}

async fn boot(
    client: &mut Client,
    arguments: &Arguments,
    source: proto::create_vm_request::Source,
) -> anyhow::Result<proto::Vm> {
    use proto::create_vm_event::Event;
    let imported = arguments.kernel.is_some();
    let request = proto::CreateVmRequest {
        source: Some(source),
        vcpus: arguments.vcpus,
        memory_bytes: arguments.memory,
        protocol: arguments.protocol.number(),
        hardware: arguments.hardware.number(),
        // An image made here has it already.
        command_line: if imported { String::new() } else { arguments.cmdline.clone() },
        ready: arguments.ready.point(),
        ready_timeout_ms: arguments.timeout.saturating_mul(1000),
        ..proto::CreateVmRequest::default()
    };
    let mut events = client.vms.create_vm(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(Event::Ready(vm)) = event.event {
            return Ok(vm);
        }
    }
    anyhow::bail!("the service ended the stream before the VM was ready")
}

async fn start_clones(
    client: &Client,
    arguments: &Arguments,
    snapshot: &proto::Snapshot,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Clone>> {
    let mut set = JoinSet::new();
    for number in 0..arguments.clones {
        let (client, snapshot) = (client.clone(), snapshot.clone());
        let memory_mode = arguments.memory_mode.number();
        let (probe, expect) = (arguments.probe.clone(), arguments.expect.clone());
        set.spawn(async move {
            let clone = start_clone(client, &snapshot, memory_mode, u64::from(number), &probe, &expect).await;
            (number, clone)
        });
    }
    let mut clones = Vec::new();
    while let Some(done) = set.join_next().await {
        let (number, clone) = done?;
        clones.push((number, clone?));
        bar.inc(1);
    }
    clones.sort_by_key(|(number, _)| *number);
    Ok(clones.into_iter().map(|(_, clone)| clone).collect())
}

/// Each when the one before has been ended, and the service has done its work ahead.
async fn one_after_the_other(
    client: &Client,
    service: Option<&PrivateService>,
    arguments: &Arguments,
    snapshot: &proto::Snapshot,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Clone>> {
    let mut clones = Vec::new();
    for number in 0..ALONE {
        if let Some(service) = service {
            service.settle().await?;
        }
        let (number, mode) = (u64::from(number), arguments.memory_mode.number());
        let clone =
            start_clone(client.clone(), snapshot, mode, number, &arguments.probe, &arguments.expect).await?;
        client.clone().vms.delete_vm(proto::DeleteVmRequest { vm: clone.vm.id.clone() }).await?;
        clones.push(clone);
        bar.inc(1);
    }
    Ok(clones)
}

async fn start_clone(
    mut client: Client,
    snapshot: &proto::Snapshot,
    memory_mode: i32,
    number: u64,
    probe: &str,
    expect: &str,
) -> anyhow::Result<Clone> {
    let identity = match snapshot.agent {
        true => proto::Identity::Managed,
        false => proto::Identity::Unmanaged,
    };
    let request = proto::CloneVmRequest {
        snapshot: snapshot.id.clone(),
        count: 1,
        memory_mode,
        identity: identity.into(),
        ..proto::CloneVmRequest::default()
    };
    let begin = Instant::now();
    let vms = client.vms.clone_vm(request).await?.into_inner().vms;
    let restore_ms = ms(begin);
    let vm = vms.into_iter().next().context("the service's answer has no VM")?;
    let problem = match snapshot.agent {
        true => ask_agent(&mut client, &vm, number).await?,
        false => ask_console(&mut client, &vm, probe, expect).await?,
    };
    Ok(Clone { vm, restore_ms, first_answer_ms: ms(begin), problem })
}

/// Lets the clone compute, and computes it again here.
async fn ask_agent(client: &mut Client, vm: &proto::Vm, number: u64) -> anyhow::Result<Option<String>> {
    // Each clone another number, none of which was known when the snapshot was taken.
    let nonce = u64::from_le_bytes(crate::fleet::id::random()?).wrapping_add(number);
    let op = Op::Compute(proto::ComputeOp { nonce, bytes: COMPUTE_BYTES });
    let request = proto::AgentCallRequest { vm: vm.id.clone(), timeout_ms: 0, op: Some(op) };
    let Some(Answer::Compute(answer)) = client.agent.call(request).await?.into_inner().result else {
        anyhow::bail!("{}: the answer is of another kind than what was asked", vm.id);
    };
    let Ok(generation) = <[u8; 16]>::try_from(vm.generation.as_ref()) else {
        return Ok(Some("it has no generation".to_owned()));
    };
    Ok(if answer.generation != vm.generation {
        Some("it thinks it is another one".to_owned())
    } else if answer.digest != expect::compute(&generation, nonce, COMPUTE_BYTES) {
        Some("it computed something else".to_owned())
    } else {
        None
    })
}

/// Types the probe and waits for what must come.
async fn ask_console(
    client: &mut Client,
    vm: &proto::Vm,
    probe: &str,
    expect: &str,
) -> anyhow::Result<Option<String>> {
    use proto::console_request::Message as In;
    use proto::console_response::Message as Out;
    let (requests, stream) = mpsc::channel(2);
    let open = In::Open(proto::ConsoleOpen { vm: vm.id.clone(), no_backlog: true });
    let input = In::Input(Bytes::from(format!("{probe}\n")));
    for message in [open, input] {
        requests.send(proto::ConsoleRequest { message: Some(message) }).await?;
    }
    let mut output = client.vms.console(ReceiverStream::new(stream)).await?.into_inner();
    let mut heard = Vec::new();
    let listening = async {
        while let Some(answer) = output.message().await? {
            if let Some(Out::Output(bytes)) = answer.message {
                heard.extend_from_slice(&bytes);
                if String::from_utf8_lossy(&heard).contains(expect) {
                    return anyhow::Ok(None);
                }
            }
        }
        Ok(Some("its console ended".to_owned()))
    };
    match tokio::time::timeout(CONSOLE_TIMEOUT, listening).await {
        Ok(result) => result,
        Err(_) => Ok(Some(format!("{expect:?} did not come on its console"))),
    }
}

/// No two clones may be the same.
fn distinct<'a>(clones: impl Iterator<Item = &'a mut Clone>) {
    let mut seen = std::collections::HashSet::new();
    for clone in clones {
        if !seen.insert(clone.vm.generation.clone()) {
            clone.problem = Some("it has the generation of another clone".to_owned());
        }
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

impl Outcome {
    fn verified(&self) -> bool {
        !self.clones.is_empty() && self.clones.iter().chain(&self.alone).all(|clone| clone.problem.is_none())
    }

    fn restores(&self) -> Vec<f64> {
        sorted(self.clones.iter().map(|clone| clone.restore_ms))
    }

    fn first_answers(&self) -> Vec<f64> {
        sorted(self.clones.iter().map(|clone| clone.first_answer_ms))
    }

    fn answers_alone(&self) -> Vec<f64> {
        sorted(self.alone.iter().map(|clone| clone.first_answer_ms))
    }

    fn json(&self) -> Value {
        let spread = |values: &[f64]| {
            let at = |share| units::round3(units::percentile(values, share));
            json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
        };
        json!({
            "guest": self.guest,
            "protocol": protocol_name(self.vm.protocol),
            "cold_boot_ms": units::round3(self.cold_boot_ms),
            "snapshot_ms": units::round3(self.snapshot_ms),
            "snapshot_bytes": self.snapshot.stored_bytes,
            "memory_bytes": self.snapshot.memory_bytes,
            "clones": self.clones.len(),
            "restore_ms": spread(&self.restores()),
            "first_answer_ms": spread(&self.first_answers()),
            "first_answer_alone_ms": spread(&self.answers_alone()),
            "verified": self.verified(),
        })
    }

    fn text(&self) -> String {
        let (restores, answers) = (self.restores(), self.first_answers());
        let alone = self.answers_alone();
        let median_answer = units::percentile(&alone, 0.5);
        let speed_up = if median_answer > 0.0 { self.cold_boot_ms / median_answer } else { 0.0 };
        let spread = |values: &[f64]| {
            format!(
                "median {}, slowest {}",
                units::ms(units::percentile(values, 0.5)),
                units::ms(units::percentile(values, 1.0))
            )
        };
        let mut facts = Table::default();
        facts.row(["  cold boot".into(), units::ms(self.cold_boot_ms), "to the ready point".into()]);
        facts.row([
            "  snapshot".into(),
            units::ms(self.snapshot_ms),
            format!(
                "{} on disk of {} memory; the VM stood still for {}, and went on",
                units::bytes(self.snapshot.stored_bytes),
                units::bytes(self.snapshot.memory_bytes),
                units::us(self.pause_us)
            ),
        ]);
        let median = |values: &[f64]| units::ms(units::percentile(values, 0.5));
        facts.row([
            "  restore".into(),
            median(&restores),
            format!("{} clones at once: {}", self.clones.len(), spread(&restores)),
        ]);
        facts.row(["  first answer".into(), median(&answers), spread(&answers)]);
        facts.row([
            "  one alone".into(),
            median(&alone),
            format!(
                "request to first answer, {} clones one after the other: {}",
                alone.len(),
                spread(&alone)
            ),
        ]);
        facts.row(["  speed-up".into(), format!("{speed_up:.0} x"), "that against the cold boot".into()]);
        let mut table = Table::new(&["  CLONE", "VM", "GENERATION", "RESTORE", "FIRST ANSWER", "CHECKED"]);
        let at_once = self.clones.iter().enumerate().map(|(n, clone)| (format!("  {n}"), clone));
        let failed_alone = self.alone.iter().filter(|clone| clone.problem.is_some());
        for (name, clone) in at_once.chain(failed_alone.map(|clone| ("  alone".to_owned(), clone))) {
            let generation: String = hex(&clone.vm.generation).chars().take(12).collect();
            table.row([
                name,
                clone.vm.id.clone(),
                generation,
                units::ms(clone.restore_ms),
                units::ms(clone.first_answer_ms),
                clone.problem.clone().unwrap_or_else(|| "ok".to_owned()),
            ]);
        }
        let how = match (self.snapshot.agent, self.verified()) {
            (true, true) => "Every clone knew its own generation and computed what only it could.",
            (false, true) => {
                "Every clone answered on its console. This guest has no agent, so the clones share one identity."
            }
            (_, false) => "NOT VERIFIED: see the last column.",
        };
        format!(
            "\ncoldspark demo: {}, entered by {}, {} vCPU{}, {}\n\n{}\n{}\n{how}\n",
            self.guest,
            protocol_name(self.vm.protocol),
            self.vm.vcpus,
            if self.vm.vcpus == 1 { "" } else { "s" },
            units::bytes(self.vm.memory_bytes),
            facts.text(),
            table.text(),
        )
    }
}
