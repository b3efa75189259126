//! As many vCPUs as a VM can have: all found by the guest's own reading of the tables, all used, all running in clones.

use std::collections::HashMap;

use anyhow::{Context as _, ensure};
use coldspark::agent::expect;
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ask, console_pattern};
use crate::daemon::Daemon;
use crate::host::Need;
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
const VCPUS: u32 = 32;
const ROUNDS: u64 = 10_000;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, protocol) in [("freebsd", BootProtocol::Freebsd), ("pvh", BootProtocol::Pvh)] {
        trials
            .push(trial(format!("many-cpus/mptable/{name}"), NEEDS, 240, move |stage| road(stage, protocol)));
        trials.push(trial(format!("many-cpus/madt/{name}"), NEEDS, 240, move |stage| madt(stage, protocol)));
    }
    trials
}

fn request(protocol: BootProtocol) -> CreateVmRequest {
    CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: VCPUS,
        memory_bytes: 64 << 20,
        protocol: protocol.into(),
        ready_timeout_ms: 200_000,
        ..Default::default()
    }
}

/// How many runs each CPU has counted.
async fn counts(client: &mut Client, vm: &str) -> anyhow::Result<HashMap<u32, u64>> {
    let answer = ask!(client, vm, Cpus(CpusOp {}));
    ensure!(answer.found == VCPUS, "{vm}: {} CPUs found", answer.found);
    Ok(answer.cpus.iter().map(|cpu| (cpu.apic_id, cpu.runs)).collect())
}

/// All CPUs compute at once; each has the right result of its own and counts one run more.
async fn load(client: &mut Client, vm: &str, seed: u64) -> anyhow::Result<()> {
    let before = counts(client, vm).await?;
    let runs = ask!(client, vm, RunOnAll(RunOnAllOp { seed, rounds: ROUNDS })).runs;
    let results: HashMap<u32, u64> = runs.iter().map(|run| (run.apic_id, run.result)).collect();
    let after = counts(client, vm).await?;
    for id in 0..VCPUS {
        let right = expect::run_on_cpu(seed, id, ROUNDS);
        ensure!(results.get(&id) == Some(&right), "{vm}: CPU {id}: {:?}, not {right}", results.get(&id));
        let counted = (before.get(&id).copied(), after.get(&id).copied());
        ensure!(
            counted.0.map(|runs| runs + 1) == counted.1 && counted.1.is_some(),
            "{vm}: CPU {id}: {counted:?}"
        );
    }
    ensure!((results.len(), after.len()) == (VCPUS as usize, VCPUS as usize), "{vm}: more CPUs than {VCPUS}");
    Ok(())
}

/// The machine with MPTable: boot, load, snapshot, two clones, load in each.
async fn road(stage: Stage, protocol: BootProtocol) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot(request(protocol)).await.context("cold boot")?.vm;
    ensure!(vm.vcpus == VCPUS && vm.protocol() == protocol, "{vm:?}");
    let hello = ask!(&mut client, &vm.id, Hello(HelloOp {}));
    ensure!((hello.cpus_found, hello.cpus_alive) == (VCPUS, VCPUS), "{hello:?}");
    ensure!(hello.checks_failed.is_empty(), "{hello:?}");
    load(&mut client, &vm.id, 1).await?;
    let before = counts(&mut client, &vm.id).await?;
    let snapshot = client.snapshot(&vm.id, "many").await.context("snapshot")?;
    ensure!(snapshot.vcpus == VCPUS, "{snapshot:?}");
    let clones =
        client.clone_vms("many", 2, MemoryMode::Mapped, Identity::Managed).await.context("clones")?;
    for (vm, seed) in clones.iter().chain([&vm]).zip(2..) {
        ensure!(counts(&mut client, &vm.id).await? == before, "{}: not the snapshot's counts", vm.id);
        load(&mut client, &vm.id, seed).await?;
    }
    for vm in &clones {
        load(&mut client, &vm.id, 9).await?;
    }
    Ok(())
}

/// The machine with ACPI, on which the embedded guest has no agent: what it found and ran it says on its console.
async fn madt(stage: Stage, protocol: BootProtocol) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = CreateVmRequest {
        hardware: Hardware::Pc.into(),
        command_line: format!("coldspark.rounds={ROUNDS}"),
        ready: console_pattern("COLDSPARK-READY"),
        ..request(protocol)
    };
    let vm = client.boot(vm).await.context("cold boot")?.vm;
    let mut console = client.console(&vm.id).await?;
    let said = console.expect("COLDSPARK-READY").await?;
    for line in [
        "ok     madt.tables",
        "ok     madt.entries: 32 CPUs",
        "ok     smp.started: 32 of 32",
        "ok     smp.run",
    ] {
        ensure!(said.contains(line), "the guest did not say {line:?}");
    }
    ensure!(!said.contains("mptable"), "a machine with ACPI has no MPTable");
    let facts = console.expect("checks_failed=0").await?;
    ensure!(facts.contains("cpus=32 "), "{facts}");
    // It is frozen with all its vCPUs, and a clone is let go.
    client.snapshot(&vm.id, "halted").await.context("snapshot")?;
    let clone = client.clone_vms("halted", 1, MemoryMode::Mapped, Identity::Unmanaged).await?.remove(0);
    ensure!(clone.vcpus == VCPUS, "{clone:?}");
    Ok(())
}
