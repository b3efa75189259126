//! `coldspark bench boot`: from the request for a VM to its ready point, and where the time goes.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::peer::{PeerArguments, Peers, Road};
use super::steps::Steps;
use super::{Latencies, host, ms, sort, spread, tell, with_service};
use crate::api::client::Client;
use crate::api::proto;
use crate::cli::image::{self, FileArguments};
use crate::cli::private::PrivateService;
use crate::cli::units;
use crate::cli::vm::create::ReadyArguments;

/// Boots before those that count.
const WARM_UP: u32 = 1;

#[derive(Debug, Args)]
pub struct Arguments {
    /// How many boots
    #[arg(short = 'n', long = "n", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    #[command(flatten)]
    files: FileArguments,
    #[command(flatten)]
    ready: ReadyArguments,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = units::parse_vcpus)]
    vcpus: u32,
    #[command(flatten)]
    peers: PeerArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// Without files it is about the embedded test guest.
    fn guest(&self) -> FileArguments {
        let mut files = self.files.clone();
        files.embedded |= files.kernel.is_none() && files.disks.is_empty();
        files
    }
}

/// Milliseconds, and per phase microseconds.
#[derive(Default)]
struct Samples {
    ready: Vec<f64>,
    /// To the guest's first instruction.
    own: Vec<f64>,
    delete: Vec<f64>,
    /// Each from the one before.
    phases: Steps,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        arguments.peers.is_empty() || arguments.guest().embedded,
        "other VMMs are compared with the embedded guest: leave out --kernel and --disk"
    );
    let (mut samples, mut peers) =
        with_service(1, async |service| measure(service, &arguments).await).await?;
    sort([&mut samples.ready, &mut samples.own, &mut samples.delete]);
    samples.phases.sort();
    peers.sort();
    tell(arguments.json, || samples.json(&arguments, &peers), || samples.text(&arguments, &peers))?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(service: &PrivateService, arguments: &Arguments) -> anyhow::Result<(Samples, Peers)> {
    let mut client = service.client.clone();
    let (ready, files) = (arguments.ready.point(), arguments.guest());
    let name = "boot".to_owned();
    let image = image::import(&mut client, name, &files, ready, arguments.vcpus, arguments.memory).await?;
    let (memory, vcpus) = (arguments.memory, arguments.vcpus);
    let mut peers = Peers::new(&arguments.peers, Road::Boot, service.folder(), memory, vcpus).await?;
    let bar = ProgressBar::new(arguments.count.into());
    let mut samples = Samples::default();
    for n in 0..arguments.count + WARM_UP {
        service.settle().await?;
        peers.round(n >= WARM_UP).await?;
        let begin = Instant::now();
        let (vm, profile) = boot(&mut client, &image.name).await?;
        let ready = ms(begin);
        let begin = Instant::now();
        client.vms.delete_vm(proto::DeleteVmRequest { vm }).await?;
        if n < WARM_UP {
            continue;
        }
        samples.ready.push(ready);
        samples.delete.push(ms(begin));
        // Times of one machine stay far below what a float holds exactly.
        samples.own.extend(profile.own_us.map(|us| us as f64 * 1e-3));
        let mut last = 0;
        let phases = profile.phases.into_iter().map(|phase| {
            let us = phase.us.saturating_sub(last);
            last = phase.us;
            proto::Step { name: phase.name, us }
        });
        samples.phases.take(phases.collect());
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok((samples, peers))
}

async fn boot(client: &mut Client, image: &str) -> anyhow::Result<(String, proto::BootProfile)> {
    use proto::create_vm_event::Event;
    let request = proto::CreateVmRequest {
        source: Some(proto::create_vm_request::Source::Image(image.to_owned())),
        profile: true,
        ..proto::CreateVmRequest::default()
    };
    let mut events = client.vms.create_vm(request).await?.into_inner();
    let (mut ready, mut profile) = (None, None);
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Ready(vm)) => ready = Some(vm.id),
            Some(Event::Profile(times)) => profile = Some(times),
            _ => {}
        }
    }
    let ready = ready.context("the service ended the stream before the VM was ready")?;
    Ok((ready, profile.context("the service did not tell where the time went")?))
}

impl Samples {
    fn json(&self, arguments: &Arguments, peers: &Peers) -> Value {
        json!({
            "bench": "boot",
            "host": host::description(),
            "date_unix_s": host::unix_s(),
            "n": arguments.count,
            "embedded": arguments.guest().embedded,
            "memory_bytes": arguments.memory,
            "vcpus": arguments.vcpus,
            "request_to_ready_ms": spread(&self.ready),
            "own_ms": spread(&self.own),
            "delete_ms": spread(&self.delete),
            "phases_us": self.phases.json(),
            "compared": peers.json(&self.ready),
        })
    }

    fn text(&self, arguments: &Arguments, peers: &Peers) -> String {
        let mut table = Latencies::new();
        table.row("request to ready", &self.ready, 1.0);
        table.row("of it until the guest's first instruction", &self.own, 1.0);
        table.steps(&self.phases);
        table.row("ending the VM", &self.delete, 1.0);
        let guest = match (arguments.guest().embedded, &arguments.files.kernel) {
            (true, _) => "the embedded guest".to_owned(),
            (false, Some(kernel)) => kernel.display().to_string(),
            (false, None) => arguments.files.disks.join(", "),
        };
        format!(
            "{} boots of {guest}, {} of memory, {} vCPU(s), one at a time\n\n{}{}",
            arguments.count,
            units::bytes(arguments.memory),
            arguments.vcpus,
            table.text(),
            peers.text(&self.ready),
        )
    }
}
