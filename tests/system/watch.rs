//! Looking at a boot: its profile when it goes well, the watchdog's words when it does not.

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, console_pattern, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

const KVM: &[Need] = &[Need::Kvm];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("watch/profile", KVM, 60, profile),
        trial("watch/never-ready", KVM, 60, never_ready),
        trial("watch/inspect", KVM, 60, inspect),
        trial("watch/worker-that-stands", KVM, 60, worker_that_stands),
    ]
}

fn embedded(vcpus: u32) -> CreateVmRequest {
    CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus,
        memory_bytes: 64 << 20,
        ..Default::default()
    }
}

/// Every phase is there, in order, and the guest's counter runs with the host's clock.
async fn profile(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let agent = CreateVmRequest { profile: true, ..embedded(2) };
    let pattern = CreateVmRequest { ready: console_pattern("COLDSPARK-READY"), ..agent.clone() };
    for request in [agent, pattern] {
        let boot = client.boot(request).await?;
        let profile = boot.profile.context("no profile, though asked for")?;
        let names: Vec<&str> = profile.phases.iter().map(|phase| phase.name.as_str()).collect();
        let wanted = [
            "worker taken",
            "image and disks open",
            "worker told",
            "memory mapped",
            "VM made",
            "devices made",
            "kernel loaded",
            "vCPUs made",
            "kernel entry",
            "first console byte",
            "ready",
        ];
        ensure!(names == wanted, "phases {names:?}");
        ensure!(profile.phases.windows(2).all(|two| two[0].us <= two[1].us), "times: {profile:?}");
        let us = |name: &str| profile.phases.iter().find(|phase| phase.name == name).map(|phase| phase.us);
        ensure!(profile.own_us.is_some() && profile.own_us == us("kernel entry"), "{profile:?}");
        ensure!(us("kernel entry") < us("ready") && us("ready") <= Some(boot.vm.start_us), "{profile:?}");

        // The counter was there before its reading, just before the guest began.
        let ticks: Vec<u64> = profile.phases.iter().filter_map(|phase| phase.guest_tsc).collect();
        ensure!(profile.tsc_khz > 0 && ticks.len() >= 3, "{profile:?}");
        ensure!(ticks.windows(2).all(|two| two[0] <= two[1]), "counter: {profile:?}");
        let entry = profile.phases.iter().find(|phase| phase.name == "kernel entry");
        ensure!(entry.is_some_and(|entry| entry.guest_tsc.is_some()), "{profile:?}");
        // The console's words may come before the agent's hello.
        let mut asker = client.clone();
        eventually("the agent's hello", 20, async || Ok(asker.vm(&boot.vm.id).await?.agent)).await?;
        // What the guest reads later is later, by its own counter.
        let now = ask!(&mut client, &boot.vm.id, Time(TimeOp {})).tsc;
        let last = ticks.last().copied().unwrap_or(0);
        // A minute's ticks: a profile with another machine's counter is off by hours.
        let minute = u64::from(profile.tsc_khz) * 1000 * 60;
        ensure!(now > last && now - last < minute, "the guest reads {now}, after {profile:?}");
    }
    ensure!(client.boot(embedded(1)).await?.profile.is_none(), "a profile that nobody asked for");
    Ok(())
}

async fn look(client: &mut Client, vm: &str) -> Result<InspectVmResponse, tonic::Status> {
    Ok(client.vms.inspect_vm(InspectVmRequest { vm: vm.into() }).await?.into_inner())
}

/// A ready point that never comes: the error has the registers of each vCPU and the console's end, the log too, and the VM is gone.
async fn never_ready(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let request = CreateVmRequest {
        ready: console_pattern("words that no guest says"),
        // Long enough for the guest's own words, on a busy host too.
        ready_timeout_ms: 20_000,
        ..embedded(2)
    };
    let message = expect_status("never ready", client.boot(request).await, &[Code::DeadlineExceeded])?;
    let log = std::fs::read_to_string(stage.logs.join("daemon-1.log")).context("the daemon's log")?;
    for vcpu in ["vCPU 0: ", "vCPU 1: "] {
        let line = message.lines().map(str::trim).find(|line| line.starts_with(vcpu));
        let line = line.with_context(|| format!("no {vcpu:?} in: {message}"))?;
        for register in ["rip=0x", "rsp=0x", "cr0=0x", "cr2=0x", "cr3=0x", "cr4=0x", "rflags=0x", "efer=0x"] {
            ensure!(line.contains(register), "no {register} in {line}");
        }
        ensure!(log.contains(line), "not in the daemon's log: {line}");
    }
    ensure!(message.contains("COLDSPARK-READY"), "the console's last lines should be there: {message}");
    ensure!(client.list_vms().await?.iter().all(|vm| vm.state() == VmState::Exited));
    Ok(())
}

/// Running, paused, and after both the guest goes on; wrong names and ended VMs are refused.
async fn inspect(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot(embedded(4)).await?.vm;
    for round in 0..20 {
        let seen = look(&mut client, &vm.id).await?;
        ensure!(seen.vcpus.len() == 4 && seen.console.contains("COLDSPARK-READY"), "{seen:?}");
        for (index, vcpu) in seen.vcpus.iter().enumerate() {
            ensure!(vcpu.index as usize == index && vcpu.problem.is_empty(), "{vcpu:?}");
            // Protected mode with paging, in long mode: the guest is up.
            ensure!(
                vcpu.rip != 0 && vcpu.cr0 & 0x8000_0001 == 0x8000_0001 && vcpu.efer & 0x400 != 0,
                "{vcpu:?}"
            );
            ensure!(vcpu.line.contains(&format!("rip={:#x} ", vcpu.rip)), "{vcpu:?}");
        }
        let runs = ask!(&mut client, &vm.id, RunOnAll(RunOnAllOp { seed: round, rounds: 1000 })).runs;
        ensure!(runs.len() == 4, "round {round}: {} of 4 CPUs answered", runs.len());
    }
    client.vms.pause_vm(PauseVmRequest { vm: vm.id.clone() }).await?;
    let (first, second) = (look(&mut client, &vm.id).await?, look(&mut client, &vm.id).await?);
    ensure!(first.vcpus == second.vcpus, "a paused guest moved: {first:?} {second:?}");
    ensure!(client.vm(&vm.id).await?.state() == VmState::Paused);
    client.vms.resume_vm(ResumeVmRequest { vm: vm.id.clone() }).await?;
    ensure!(ask!(&mut client, &vm.id, RunOnAll(RunOnAllOp { seed: 1, rounds: 10 })).runs.len() == 4);
    expect_status("a VM that is not there", look(&mut client, "vm-000000000000").await, &[Code::NotFound])?;
    Ok(())
}

/// A worker that does not answer: who asks is told so, and the daemon goes on.
async fn worker_that_stands(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot(embedded(1)).await?.vm;
    let pid = i32::try_from(vm.worker_pid)?;
    // SAFETY: a plain kill of a worker that the daemon has just named.
    ensure!(unsafe { libc::kill(pid, libc::SIGSTOP) } == 0, "{}", std::io::Error::last_os_error());
    expect_status("a worker that stands", look(&mut client, &vm.id).await, &[Code::DeadlineExceeded])?;
    ensure!(client.boot(embedded(1)).await?.vm.state() == VmState::Ready, "the daemon does not go on");
    client.delete_vm(&vm.id).await?;
    Ok(())
}
