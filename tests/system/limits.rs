//! Limits of VMs: memory that is up ends the VM with a reason and nobody else, processor time that is up makes it wait; in clones, pools, functions
//! and new VMs, over the daemon's death, and nothing is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::deploy_event::Event;
use coldspark::api::proto::deploy_request::From;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::commands::{Command, start};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::Limits];
const LIMIT: u64 = 64 << 20;
/// Pages that fit in, and that do not.
const FEW: u64 = 1 << 10;
const MANY: u64 = 24 << 10;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("limits/memory", NEEDS, 180, memory),
        trial("limits/cpu", NEEDS, 180, cpu),
        trial("limits/adopted", NEEDS, 180, adopted),
        trial("limits/pools-and-functions", NEEDS, 180, pools_and_functions),
        trial("limits/disk", &[Need::Kvm], 180, disk),
    ]
}

fn memory_limit(bytes: u64) -> Option<ResourceLimits> {
    Some(ResourceLimits { memory_bytes: bytes, ..ResourceLimits::default() })
}

fn fill(pages: u64) -> TouchOp {
    TouchOp { first_page: 0, pages, stride: 1, seed: 7, mode: TouchMode::Fill.into() }
}

async fn base(client: &mut Client) -> anyhow::Result<()> {
    let vm = client.boot_embedded(256 << 20).await?;
    client.snapshot(&vm.id, "base").await?;
    Ok(client.delete_vm(&vm.id).await?)
}

async fn clone(client: &mut Client, limits: Option<ResourceLimits>) -> anyhow::Result<Vm> {
    let request = CloneVmRequest { snapshot: "base".into(), limits, ..Default::default() };
    let vms = client.vms.clone_vm(request).await?.into_inner().vms;
    vms.into_iter().next().context("no clone")
}

/// Its control groups, of the host's `memory` and `cpu`, that have its id for a name.
fn groups(vm: &Vm) -> anyhow::Result<BTreeSet<PathBuf>> {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", vm.worker_pid))?;
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| line.ends_with(&vm.id)) {
        let (controllers, path) =
            line.split_once(':').and_then(|(_, rest)| rest.split_once(':')).context("a line")?;
        let top = if controllers.is_empty() {
            "/sys/fs/cgroup".into()
        } else {
            format!("/sys/fs/cgroup/{controllers}")
        };
        let folder = Path::new(&top).join(path.trim_start_matches('/'));
        ensure!(folder.is_dir(), "no {}", folder.display());
        found.insert(folder);
    }
    Ok(found)
}

/// No group of a VM is left beside these.
async fn all_gone(groups: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
    eventually("the groups are gone", 60, async || Ok(groups.iter().all(|group| !group.exists()))).await
}

/// A service that ends leaves no group, neither its VMs' nor its own.
async fn stop(mut daemon: Daemon, groups: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
    let tops: Vec<_> = groups.iter().filter_map(|group| group.parent()).collect();
    ensure!(!tops.is_empty() && tops.iter().all(|top| top.is_dir()), "{tops:?}");
    daemon.stop().await?;
    ensure!(tops.iter().all(|top| !top.exists()), "a group is left of {tops:?}");
    Ok(())
}

async fn memory(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let free = clone(&mut client, None).await?;
    let limited = clone(&mut client, memory_limit(LIMIT)).await?;
    ensure!(groups(&free)?.is_empty() && free.limits.is_none());
    ensure!(limited.limits == memory_limit(LIMIT) && limited.steps.iter().any(|step| step.name == "limits"));
    let group = groups(&limited)?;
    ensure!(!group.is_empty(), "{} is in no group", limited.id);

    ask!(client, &limited.id, Touch(fill(FEW)));
    let asked = AgentCallRequest {
        vm: limited.id.clone(),
        op: Some(agent_call_request::Op::Touch(fill(MANY))),
        ..Default::default()
    };
    let said = expect_status("too much", client.agent.call(asked).await, &[Code::Aborted])?;
    ensure!(said.contains("more memory than its limit of 64 MiB"), "{said}");
    eventually("it has ended", 60, async || Ok(client.vm(&limited.id).await?.state() == VmState::Exited))
        .await?;
    let ended = client.vm(&limited.id).await?;
    ensure!(ended.exit_reason.contains("its limit of 64 MiB"), "{}", ended.exit_reason);
    all_gone(&group).await?;
    // Nobody else minds.
    ask!(client, &free.id, Touch(fill(MANY)));

    // A new VM, too.
    let request = CreateVmRequest {
        source: Some(Source::Embedded(true)),
        memory_bytes: 64 << 20,
        limits: memory_limit(128 << 20),
        ..Default::default()
    };
    let booted = client.boot(request).await?.vm;
    ensure!(booted.limits == memory_limit(128 << 20) && !groups(&booted)?.is_empty());

    let wrong =
        CloneVmRequest { snapshot: "base".into(), limits: memory_limit(1 << 20), ..Default::default() };
    let said = expect_status("too little", client.vms.clone_vm(wrong).await, &[Code::InvalidArgument])?;
    ensure!(said.contains("16 MiB"), "{said}");
    stop(daemon, &group).await
}

/// Times in which it had no processor time left.
fn throttled(groups: &BTreeSet<PathBuf>) -> anyhow::Result<u64> {
    let texts = groups.iter().filter_map(|group| fs::read_to_string(group.join("cpu.stat")).ok());
    let counts = texts.filter_map(|text| {
        text.lines().find_map(|line| line.strip_prefix("nr_throttled ")?.trim().parse().ok())
    });
    counts.max().context("no cpu.stat says nr_throttled")
}

async fn cpu(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let limits = Some(ResourceLimits { cpu_millis: 200, ..ResourceLimits::default() });
    let vm = clone(&mut client, limits).await?;
    let groups = groups(&vm)?;
    let mut spinning = Command::open(&client, start(&vm.id, &["spin", "3000"])).await?;
    eventually("it waits for processor time", 60, async || Ok(throttled(&groups)? > 2)).await?;
    // It does, and goes on.
    spinning.finish().await?.expect(0, "")?;
    client.delete_vm(&vm.id).await?;
    all_gone(&groups).await?;
    stop(daemon, &groups).await
}

/// A disk keeps to its rate in a VM, after its reset, and in its clone; it does everything, only later.
async fn disk(stage: Stage) -> anyhow::Result<()> {
    const RATE: u64 = 256 << 10;
    let image = stage.logs.join("disk.img");
    fs::File::create(&image)?.set_len(4 << 20)?;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let limits = Some(ResourceLimits { disk_bytes_per_second: RATE, ..ResourceLimits::default() });
    let disk = DiskFile { path: image.to_string_lossy().into_owned(), mode: DiskMode::Overlay.into() };
    let request = CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        disks: vec![disk],
        limits,
        ..Default::default()
    };
    let vm = client.boot(request).await?.vm;
    ensure!(client.vm(&vm.id).await?.limits == limits);
    limited_writes(&mut client, &vm.id, RATE).await?;
    let answers = client.vm(&vm.id).await?.restarts;
    ask!(&mut client, &vm.id, Reset(ResetOp {}));
    eventually("it is there again", 60, async || {
        let now = client.vm(&vm.id).await?;
        Ok(now.restarts > answers && now.agent)
    })
    .await?;
    limited_writes(&mut client, &vm.id, RATE).await?;

    client.snapshot(&vm.id, "base").await?;
    let vm = clone(&mut client, limits).await?;
    ensure!(client.vm(&vm.id).await?.limits == limits);
    limited_writes(&mut client, &vm.id, RATE).await?;
    ensure!(clone(&mut client, None).await?.limits.is_none());

    let wrong = Some(ResourceLimits { disk_bytes_per_second: 1, ..ResourceLimits::default() });
    let request = CloneVmRequest { snapshot: "base".into(), limits: wrong, ..Default::default() };
    let told =
        expect_status("too slow a disk", client.vms.clone_vm(request).await, &[Code::InvalidArgument])?;
    ensure!(told.contains("4096"), "{told}");
    Ok(())
}

/// Writes, and looks that it took the time that it has to, at least.
async fn limited_writes(client: &mut Client, vm: &str, rate: u64) -> anyhow::Result<()> {
    const BYTES: u64 = 128 << 10;
    const WRITES: u64 = 5;
    let begun = Instant::now();
    for n in 0..WRITES {
        let (first_sector, data) = (n * BYTES / 512, vec![n as u8 + 1; BYTES as usize].into());
        ask!(client, vm, DiskWrite(DiskWriteOp { disk: 0, first_sector, data, flush: true }));
    }
    let read = ask!(client, vm, DiskRead(DiskReadOp { disk: 0, first_sector: BYTES / 512, sectors: 1 }));
    ensure!(read.data[..] == [2; 512]);
    // A second's worth may have been saved up, and the last one be owed.
    let least = (WRITES * BYTES - rate - BYTES) as f64 / rate as f64;
    ensure!(begun.elapsed().as_secs_f64() >= least, "{:?} and not {least} s", begun.elapsed());
    Ok(())
}

async fn adopted(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let (kept, ends) =
        (clone(&mut client, memory_limit(LIMIT)).await?, clone(&mut client, memory_limit(LIMIT)).await?);
    let (group, group_of_the_end) = (groups(&kept)?, groups(&ends)?);
    daemon.kill_hard()?;
    // One ends while nobody looks: its group is left.
    // SAFETY: a plain kill; the worker is this trial's, and nobody reaps it but init.
    unsafe { libc::kill(ends.worker_pid as i32, libc::SIGKILL) };
    daemon.start_again().await?;
    all_gone(&group_of_the_end).await?;
    let mut client = daemon.client().await?;
    let found = client.vm(&kept.id).await?;
    ensure!(found.limits == memory_limit(LIMIT) && groups(&found)? == group);
    let _ = client.ask(&kept.id, agent_call_request::Op::Touch(fill(MANY))).await;
    eventually("it has ended", 60, async || Ok(client.vm(&kept.id).await?.state() == VmState::Exited))
        .await?;
    let ended = client.vm(&kept.id).await?;
    ensure!(ended.exit_reason.contains("its limit of 64 MiB"), "{}", ended.exit_reason);
    all_gone(&group).await?;
    stop(daemon, &group).await
}

async fn pools_and_functions(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let limits = Some(ResourceLimits { memory_bytes: LIMIT, cpu_millis: 1500, ..ResourceLimits::default() });
    for mode in [PoolMode::Shell, PoolMode::Running] {
        let name = format!("pool-{}", mode as i32);
        let request = CreatePoolRequest {
            name: name.clone(),
            snapshot: "base".into(),
            mode: mode.into(),
            min_ready: Some(1),
            limits,
            ..Default::default()
        };
        ensure!(client.pools.create_pool(request).await?.into_inner().limits == limits);
        eventually("one is ready", 60, async || {
            Ok(client.pools.get_pool(GetPoolRequest { pool: name.clone() }).await?.into_inner().ready > 0)
        })
        .await?;
        let request = TakeVmRequest { pool: name, ..Default::default() };
        let vm = client.pools.take_vm(request).await?.into_inner().vm.context("no VM")?;
        ensure!(vm.limits == limits && !groups(&vm)?.is_empty(), "{vm:?}");
    }

    let handler = GuestCommand { args: vec!["spin".into(), "20000".into()], ..Default::default() };
    let settings = FunctionSettings { handler: Some(handler), limits, ..Default::default() };
    let request = DeployRequest {
        name: "spins".into(),
        from: Some(From::Snapshot("base".into())),
        settings: Some(settings),
        ..Default::default()
    };
    let mut events = client.functions.deploy(request.clone()).await?.into_inner();
    let mut made = None;
    while let Some(event) = events.message().await? {
        if let Some(Event::Function(function)) = event.event {
            made = Some(function);
        }
    }
    ensure!(made.and_then(|function| function.settings).and_then(|settings| settings.limits) == limits);
    let mut other = client.clone();
    let invoking = tokio::spawn(async move {
        let request = InvokeRequest { function: "spins".into(), timeout_ms: 60_000, ..Default::default() };
        other.functions.invoke(request).await
    });
    let mut seen = None;
    eventually("its VM is there", 60, async || {
        seen = client.list_vms().await?.into_iter().find(|vm| !vm.pool.starts_with("pool-"));
        Ok(seen.as_ref().is_some_and(|vm| vm.state() == VmState::Running))
    })
    .await?;
    let vm = seen.context("no VM")?;
    let group = groups(&vm)?;
    ensure!(vm.limits == limits && !group.is_empty(), "{vm:?}");
    invoking.abort();
    all_gone(&group).await?;

    let mut wrong = request;
    if let Some(settings) = &mut wrong.settings {
        settings.limits = Some(ResourceLimits { cpu_millis: 1, ..ResourceLimits::default() });
    }
    let mut events = client.functions.deploy(wrong).await?.into_inner();
    let said = expect_status("no time at all", events.message().await, &[Code::InvalidArgument])?;
    ensure!(said.contains("thousandths"), "{said}");
    stop(daemon, &group).await
}
