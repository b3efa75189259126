//! A real FreeBSD kernel of the user's, with a userland that says `MICROVM-READY` on the console and then answers
//! commands at a `# ` prompt (docs/testing.md describes it).

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ImageFiles, console_pattern};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::Userfault, Need::FreeBsd];
pub const READY: &str = "MICROVM-READY";
pub const PROMPT: &str = "\n# ";
/// Clones of each memory source.
const CLONES: usize = 3;
/// QEMU's TCG loses a nested guest's XSETBV (the first XRSTOR then faults), and on a busy machine its processors' time
/// stamp counters fail FreeBSD's synchronization test.
const RIG_ENVIRONMENT: &str = "hw.use_xsave=0 kern.timecounter.smp_tsc=1";

const GENERIC_NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::Userfault, Need::FreeBsdGeneric];

const POWER_NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsdGeneric, Need::FreeBsdPower];

/// Which kernel, and so which machine: it is left to the service to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// virtio-mmio and MPTable.
    Microvm,
    /// As the release has it: ACPI and virtio-pci.
    Generic,
}

impl Kernel {
    fn files(self) -> Result<(PathBuf, PathBuf), String> {
        match self {
            Kernel::Microvm => host::freebsd(),
            Kernel::Generic => host::freebsd_generic(),
        }
    }
}

pub fn trials() -> Vec<Trial> {
    let one = |name: &str, needs, kernel, vcpus| {
        let name = format!("freebsd/{name}/{vcpus}-vcpu");
        trial(name, needs, 120, move |stage| road(stage, kernel, vcpus))
    };
    vec![
        one("native", NEEDS, Kernel::Microvm, 1),
        one("native", NEEDS, Kernel::Microvm, 4),
        one("generic", GENERIC_NEEDS, Kernel::Generic, 1),
        one("generic", GENERIC_NEEDS, Kernel::Generic, 4),
        trial("freebsd/power-button", POWER_NEEDS, 60, power_button),
    ]
}

/// Further kernel environment, `name=value` words.
pub fn environment() -> String {
    let rig = if host::in_rig() { RIG_ENVIRONMENT } else { "" };
    format!("{rig} {}", std::env::var("COLDSPARK_FREEBSD_ENVIRONMENT").unwrap_or_default()).trim().to_string()
}

/// Types a command; returns its one line of output.
pub async fn ask(console: &mut Console, command: &str) -> anyhow::Result<String> {
    let output = console.ask(command, PROMPT).await?;
    let output = output.replace('\r', "");
    // The terminal may echo the command.
    Ok(output.trim().trim_start_matches(command).trim().to_string())
}

/// Imports the guest as the image `freebsd`.
pub async fn import(client: &mut Client, kernel: Kernel, vcpus: u32) -> anyhow::Result<()> {
    let (kernel, disk) = kernel.files().map_err(anyhow::Error::msg)?;
    let spec = ImageSpec {
        name: "freebsd".into(),
        disks: vec![DiskSettings { read_only: false, ..Default::default() }],
        boot: Some(BootSettings {
            protocol: BootProtocol::Freebsd.into(),
            hardware: Hardware::Unspecified.into(),
            command_line: environment(),
            vcpus,
            memory_bytes: 256 << 20,
            ready: console_pattern(READY),
            ..Default::default()
        }),
        ..Default::default()
    };
    let files =
        ImageFiles { kernel: Some(fs::read(kernel)?), disks: vec![fs::read(disk)?], ..Default::default() };
    client.import(spec, files).await?;
    Ok(())
}

async fn boot(client: &mut Client, kernel: Kernel, vcpus: u32) -> anyhow::Result<Vm> {
    import(client, kernel, vcpus).await?;
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

async fn road(stage: Stage, kernel: Kernel, vcpus: u32) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, kernel, vcpus).await.context("cold boot")?;
    ensure!(vm.state() == VmState::Ready && vm.protocol() == BootProtocol::Freebsd, "{vm:?}");
    let mut source = client.console(&vm.id).await?;
    source.expect(READY).await?;
    source.expect(PROMPT).await?;
    ensure!(ask(&mut source, "ping").await? == "pong");
    ensure!(ask(&mut source, "cpus").await? == format!("cpus={vcpus}"));
    ensure!(ask(&mut source, "touch 16").await?.starts_with("touched 16 MiB"));
    ensure!(ask(&mut source, "write before").await? == "wrote 6 fsync=0");
    let before = (Instant::now(), clocks(&mut source).await?);

    let snapshot = client.snapshot(&vm.id, "ready").await.context("snapshot")?;
    for mode in [MemoryMode::Mapped, MemoryMode::Userfault] {
        clones_of(&mut client, &snapshot.id, mode, (kernel, vcpus), &before)
            .await
            .with_context(|| format!("{mode:?}"))?;
    }
    ensure!(ask(&mut source, "read").await? == "data=before");
    ensure!(ask(&mut source, "check").await?.starts_with("check MiB=16 bad=0"));

    // It reboots in place: the same disk, the console stays connected.
    source.type_line("reboot").await?;
    source.expect("rebooting").await?;
    source.expect(READY).await?;
    source.expect(PROMPT).await?;
    ensure!(ask(&mut source, "read").await? == "data=before");
    ensure!(ask(&mut source, "cpus").await? == format!("cpus={vcpus}"));
    let now = client.vm(&vm.id).await?;
    ensure!(now.restarts == 1 && now.state() == VmState::Ready, "{now:?}");
    Ok(())
}

/// Some clones at once, each good, with memory and disk of its own; and each ends as it should.
async fn clones_of(
    client: &mut Client,
    snapshot: &str,
    mode: MemoryMode,
    (kernel, vcpus): (Kernel, u32),
    before: &(Instant, [f64; 3]),
) -> anyhow::Result<()> {
    let mut running = Vec::new();
    // One after the other, as they would be asked for; all stay.
    for index in 0..CLONES {
        let which = || format!("clone {index}");
        let clone =
            client.clone_vms(snapshot, 1, mode, Identity::Unmanaged).await.with_context(which)?.remove(0);
        let mut console = client.console(&clone.id).await?;
        expect_good_clone(&mut console, vcpus, before).await.with_context(which)?;
        ensure!(ask(&mut console, &format!("write clone-{index}")).await? == "wrote 7 fsync=0");
        running.push((clone, console));
    }
    // Disks and memory are private.
    for (index, (_, console)) in running.iter_mut().enumerate() {
        ensure!(
            ask(console, "read").await? == format!("data=clone-{index}"),
            "clone {index} reads another's write"
        );
        ensure!(ask(console, "touch 8").await?.starts_with("touched 8 MiB"));
    }

    // With ACPI a clone can power itself off.
    if kernel == Kernel::Generic
        && let Some((vm, mut console)) = running.pop()
    {
        console.type_line("poweroff").await?;
        eventually("the VM ends", 20, async || Ok(client.vm(&vm.id).await?.state() == VmState::Exited))
            .await?;
        let reason = client.vm(&vm.id).await?.exit_reason;
        ensure!(reason.contains("switched itself off"), "{}: {reason}", vm.id);
    }

    // Clones reboot cleanly too: that is their end, and they say how.
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

/// A clone that answers: all CPUs, memory and disk as they were, and clocks that run forwards from where they stood.
async fn expect_good_clone(
    console: &mut Console,
    vcpus: u32,
    (began, before): &(Instant, [f64; 3]),
) -> anyhow::Result<()> {
    ensure!(ask(console, "ping").await? == "pong");
    ensure!(ask(console, "cpus").await? == format!("cpus={vcpus}"));
    let check = ask(console, "check").await?;
    ensure!(check.starts_with("check MiB=16 bad=0"), "{check}");
    ensure!(ask(console, "read").await? == "data=before");
    let first = clocks(console).await?;
    // Ended by a timer interrupt.
    ensure!(ask(console, "sleep 200").await?.starts_with("slept"));
    let second = clocks(console).await?;
    let elapsed = began.elapsed().as_secs_f64();
    for (clock, name) in ["monotonic", "uptime", "real"].iter().enumerate() {
        let runs = before[clock] <= first[clock] && first[clock] + 0.1 < second[clock];
        ensure!(runs, "the {name} clock: {before:?}, {first:?}, {second:?}");
        // Time stamp counters that differ between CPUs make it jump by seconds.
        let jumped = second[clock] - before[clock] > elapsed + 1.0;
        ensure!(!jumped, "the {name} clock jumped: {before:?}, {first:?}, {second:?} in {elapsed} s");
    }
    ensure!(ask(console, "rand").await?.starts_with("rand="));
    Ok(())
}

/// Asked to stop, FreeBSD gets the power button's event, tells its init, and powers itself off by ACPI; so does a clone.
async fn power_button(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, Kernel::Generic, 2).await.context("cold boot")?;
    let mut console = client.console(&vm.id).await?;
    console.expect(READY).await?;
    console.expect(PROMPT).await?;
    let snapshot = client.snapshot(&vm.id, "ready").await?.id;
    let clone = client.clone_vms(&snapshot, 1, MemoryMode::Mapped, Identity::Unmanaged).await?.remove(0);
    for vm in [vm, clone] {
        let request = StopVmRequest { vm: vm.id.clone(), timeout_ms: 120_000 };
        let stopped = client.vms.stop_vm(request).await?.into_inner();
        ensure!(stopped.not_asked.is_empty(), "{}: it was not asked: {}", vm.id, stopped.not_asked);
        ensure!(stopped.by_itself, "{}: it did not power off within {} us", vm.id, stopped.took_us);
        let reason = client.vm(&vm.id).await?.exit_reason;
        ensure!(reason.contains("switched itself off"), "{}: {reason}", vm.id);
        std::fs::write(stage.logs.join(format!("stop-{}.txt", vm.id)), format!("{} us\n", stopped.took_us))?;
    }
    Ok(())
}
