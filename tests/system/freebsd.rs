//! A real FreeBSD kernel of the user's, with a userland that says `MICROVM-READY` on the console and then answers
//! commands at a `# ` prompt (docs/testing.md describes it).

use std::collections::HashSet;
use std::fs;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ImageFiles, console_pattern};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsd];
const NEEDS_USERFAULT: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsd, Need::Userfault];
const READY: &str = "MICROVM-READY";
const PROMPT: &str = "\n# ";
const CLONES: u32 = 3;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for vcpus in [1, 4] {
        for (mode_name, mode) in [("mapped", MemoryMode::Mapped), ("userfault", MemoryMode::Userfault)] {
            let needs = if mode == MemoryMode::Userfault { NEEDS_USERFAULT } else { NEEDS };
            let name = format!("freebsd/native/{vcpus}-vcpu/{mode_name}");
            trials.push(trial(name, needs, 60, move |stage| road(stage, vcpus, mode)));
        }
    }
    trials
}

/// Types a command; returns its one line of output.
async fn ask(console: &mut Console, command: &str) -> anyhow::Result<String> {
    let output = console.ask(command, PROMPT).await?;
    let output = output.replace('\r', "");
    // The terminal may echo the command.
    Ok(output.trim().trim_start_matches(command).trim().to_string())
}

async fn boot(client: &mut Client, vcpus: u32) -> anyhow::Result<Vm> {
    let (kernel, disk) = host::freebsd().map_err(anyhow::Error::msg)?;
    let spec = ImageSpec {
        name: "freebsd".into(),
        disks: vec![DiskSettings { read_only: false, ..Default::default() }],
        boot: Some(BootSettings {
            protocol: BootProtocol::Freebsd.into(),
            command_line: std::env::var("COLDSPARK_FREEBSD_ENVIRONMENT").unwrap_or_default(),
            vcpus,
            memory_bytes: 256 << 20,
            ready: console_pattern(READY),
        }),
        ..Default::default()
    };
    let files =
        ImageFiles { kernel: Some(fs::read(kernel)?), disks: vec![fs::read(disk)?], ..Default::default() };
    client.import(spec, files).await?;
    let request = CreateVmRequest { source: Some(Source::Image("freebsd".into())), ..Default::default() };
    Ok(client.boot(request).await?.vm)
}

/// `mono=S.N uptime=S.N real=S.N`, in seconds.
async fn clocks(console: &mut Console) -> anyhow::Result<[f64; 3]> {
    let line = ask(console, "time").await?;
    let value = |name: &str| -> anyhow::Result<f64> {
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(name));
        word.and_then(|number| number.parse().ok()).with_context(|| format!("no {name} in {line:?}"))
    };
    Ok([value("mono=")?, value("uptime=")?, value("real=")?])
}

async fn road(stage: Stage, vcpus: u32, mode: MemoryMode) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, vcpus).await.context("cold boot")?;
    ensure!(vm.state() == VmState::Ready && vm.protocol() == BootProtocol::Freebsd, "{vm:?}");
    let mut source = client.console(&vm.id).await?;
    source.expect(READY).await?;
    source.expect(PROMPT).await?;
    ensure!(ask(&mut source, "ping").await? == "pong");
    ensure!(ask(&mut source, "cpus").await? == format!("cpus={vcpus}"));
    ensure!(ask(&mut source, "touch 16").await?.starts_with("touched 16 MiB"));
    ensure!(ask(&mut source, "write before").await? == "wrote 6 fsync=0");
    let before = clocks(&mut source).await?;

    let snapshot = client.snapshot(&vm.id, "ready").await.context("snapshot")?;
    let mut randoms = HashSet::new();
    let mut running = Vec::new();
    // One after the other, as they would be asked for; all stay.
    for index in 0..CLONES {
        let clone =
            client.clone_vms(&snapshot.id, 1, mode, Identity::Unmanaged).await.context("clone")?.remove(0);
        let mut console = client.console(&clone.id).await?;
        let clone_says = |what: &str| format!("clone {index}: {what}");
        ensure!(ask(&mut console, "ping").await.with_context(|| clone_says("ping"))? == "pong");
        ensure!(ask(&mut console, "cpus").await? == format!("cpus={vcpus}"));
        let check = ask(&mut console, "check").await?;
        ensure!(check.starts_with("check MiB=16 bad=0"), "{}", clone_says(&check));
        ensure!(ask(&mut console, "read").await? == "data=before");
        ensure!(ask(&mut console, &format!("write clone-{index}")).await? == "wrote 7 fsync=0");
        // The clocks run: forwards, and through a sleep that a timer interrupt ends.
        let first = clocks(&mut console).await?;
        ensure!(ask(&mut console, "sleep 200").await?.starts_with("slept"));
        let second = clocks(&mut console).await?;
        for (clock, name) in ["monotonic", "uptime", "real"].iter().enumerate() {
            ensure!(
                before[clock] <= first[clock] && first[clock] + 0.1 < second[clock],
                "{}",
                clone_says(&format!("{name}: {before:?}, {first:?}, {second:?}"))
            );
        }
        randoms.insert(ask(&mut console, "rand").await?);
        running.push((clone, console));
    }
    ensure!(randoms.iter().all(|line| line.starts_with("rand=")), "{randoms:?}");
    // Disks and memory are private.
    for (index, (_, console)) in running.iter_mut().enumerate() {
        ensure!(ask(console, "read").await? == format!("data=clone-{index}"));
        ensure!(ask(console, "touch 8").await?.starts_with("touched 8 MiB"));
    }
    ensure!(ask(&mut source, "read").await? == "data=before");
    ensure!(ask(&mut source, "check").await?.starts_with("check MiB=16 bad=0"));

    // All reboot cleanly: the VM ends, and says how.
    running.push((vm, source));
    for (vm, mut console) in running {
        console.type_line("reboot").await?;
        console.expect("rebooting").await?;
        eventually("the VM ends", 20, async || Ok(client.vm(&vm.id).await?.state() == VmState::Exited))
            .await?;
        let reason = client.vm(&vm.id).await?.exit_reason;
        ensure!(reason.contains("reset"), "{}: {reason}", vm.id);
        let rest = console.rest().await?;
        ensure!(!rest.contains("panic"), "{}: {rest}", vm.id);
    }
    Ok(())
}
