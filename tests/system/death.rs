//! Processes that are killed: a worker takes only its VM with it, a daemon loses nothing that was published.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("death/worker-killed", NEEDS, 60, worker_killed),
        trial("death/guest-resets-itself", NEEDS, 60, guest_resets_itself),
        trial("death/stopped", NEEDS, 60, stopped),
        trial("death/daemon-killed-while-snapshotting", NEEDS, 180, daemon_killed_while_snapshotting),
        trial("death/daemon-stopped", NEEDS, 60, daemon_stopped),
        trial("death/daemon-stopped-under-load", NEEDS, 180, daemon_stopped_under_load),
    ]
}

/// What clients leave in a store besides whole snapshots.
fn leftovers(data: &Path, whole: &[&str]) -> anyhow::Result<Vec<String>> {
    let mut left = Vec::new();
    for entry in fs::read_dir(data.join("snapshots"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() && !whole.contains(&name.as_str()) {
            left.push(name);
        }
    }
    Ok(left)
}

async fn worker_killed(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (victim, witness) = (client.boot_embedded(64 << 20).await?, client.boot_embedded(64 << 20).await?);
    let snapshot = client.snapshot(&victim.id, "").await?;
    let clone = client.clone_vms(&snapshot.id, 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
    for vm in [&victim, &clone] {
        let pid = i32::try_from(vm.worker_pid)?;
        ensure!(pid > 1 && Path::new(&format!("/proc/{pid}")).exists(), "{}: worker {pid}", vm.id);
        // SAFETY: plain kill of a worker that this trial's daemon started.
        ensure!(unsafe { libc::kill(pid, libc::SIGKILL) } == 0);
        eventually("the daemon notices that the worker died", 10, async || {
            Ok(client.vm(&vm.id).await?.state() == VmState::Exited)
        })
        .await?;
        let reason = client.vm(&vm.id).await?.exit_reason;
        ensure!(
            reason.contains("SIGKILL") || reason.contains("signal 9"),
            "the reason should say the signal: {reason}"
        );
        let request = PauseVmRequest { vm: vm.id.clone() };
        expect_status("pausing a dead VM", client.vms.pause_vm(request).await, &[Code::FailedPrecondition])?;
        expect_status(
            "freezing a dead VM",
            client.snapshot(&vm.id, "").await,
            &[Code::FailedPrecondition, Code::Aborted],
        )?;
        client.delete_vm(&vm.id).await?;
    }
    ensure!(daemon.is_alive()?);
    let echo = ask!(&mut client, &witness.id, Echo(EchoOp { data: b"still here".to_vec().into() }));
    ensure!(echo.data[..] == b"still here"[..]);
    client
        .clone_vms(&snapshot.id, 2, MemoryMode::Mapped, Identity::Managed)
        .await
        .context("cloning afterwards")?;
    Ok(())
}

/// A reset after the ready point boots the guest again in the same VM; one too many, or one that was asked to be the end, is.
async fn guest_resets_itself(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("resets", vec![vec![0; 4 << 20]]).await?;
    let vm = client.boot_image("resets", 2, BootProtocol::Unspecified).await?;
    let mut console = client.console(&vm.id).await?;
    let write = DiskWriteOp { disk: 0, first_sector: 9, data: vec![0x5a; 1024].into(), flush: true };
    ask!(&mut client, &vm.id, DiskWrite(write));
    for restarts in 1..=5 {
        ask!(&mut client, &vm.id, Reset(ResetOp {}));
        eventually("the VM is booted again", 30, async || {
            let now = client.vm(&vm.id).await?;
            ensure!(now.state() != VmState::Exited, "it ended: {}", now.exit_reason);
            Ok(now.restarts == restarts && now.agent)
        })
        .await?;
        let now = client.vm(&vm.id).await?;
        ensure!(
            now.id == vm.id && now.worker_pid == vm.worker_pid && now.state() == VmState::Ready,
            "{now:?}"
        );
        let hello = ask!(&mut client, &vm.id, Hello(HelloOp {}));
        ensure!(hello.cpus_alive == 2 && hello.checks_failed.is_empty(), "{hello:?}");
        let read = ask!(&mut client, &vm.id, DiskRead(DiskReadOp { disk: 0, first_sector: 9, sectors: 2 }));
        ensure!(read.data.iter().all(|byte| *byte == 0x5a), "what was written before the reset is gone");
    }
    // What was booted again is as good as what was booted once.
    let snapshot = client.snapshot(&vm.id, "").await?;
    let clone = client.clone_vms(&snapshot.id, 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);
    let read = ask!(&mut client, &clone.id, DiskRead(DiskReadOp { disk: 0, first_sector: 9, sectors: 1 }));
    ensure!(read.data.iter().all(|byte| *byte == 0x5a));

    ask!(&mut client, &vm.id, Reset(ResetOp {}));
    let reason = exit_reason(&mut client, &vm.id).await?;
    ensure!(reason.contains("reset itself") && reason.contains("5 times"), "{reason}");
    console.rest().await?;
    ask!(&mut client, &clone.id, Reset(ResetOp {}));
    let reason = exit_reason(&mut client, &clone.id).await?;
    ensure!(reason.contains("reset itself"), "{reason}");

    let request = CreateVmRequest {
        source: Some(create_vm_request::Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        on_reset: OnReset::End.into(),
        ..Default::default()
    };
    let vm = client.boot(request).await?.vm;
    ask!(&mut client, &vm.id, Reset(ResetOp {}));
    let reason = exit_reason(&mut client, &vm.id).await?;
    ensure!(reason.contains("reset itself"), "{reason}");
    Ok(())
}

/// A guest that cannot be asked is ended, and the answer says so; what cannot be stopped is refused.
async fn stopped(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    let stop = |timeout_ms| StopVmRequest { vm: vm.id.clone(), timeout_ms };
    let too_long = client.vms.stop_vm(stop(600_001)).await;
    expect_status("a timeout of more than 10 minutes", too_long, &[Code::InvalidArgument])?;
    let done = client.vms.stop_vm(stop(0)).await?.into_inner();
    ensure!(!done.by_itself && done.not_asked.contains("no ACPI"), "{done:?}");
    ensure!(done.vm.as_ref().is_some_and(|vm| vm.state() == VmState::Exited), "{done:?}");
    let reason = client.vm(&vm.id).await?.exit_reason;
    ensure!(reason.starts_with("stopped"), "{reason}");
    expect_status("stopping it again", client.vms.stop_vm(stop(0)).await, &[Code::FailedPrecondition])?;
    let nobody = StopVmRequest { vm: "nobody".into(), timeout_ms: 0 };
    expect_status("stopping nobody", client.vms.stop_vm(nobody).await, &[Code::NotFound])?;
    Ok(())
}

/// Waits for the VM's end.
async fn exit_reason(client: &mut Client, vm: &str) -> anyhow::Result<String> {
    eventually("the VM ends", 10, async || Ok(client.vm(vm).await?.state() == VmState::Exited)).await?;
    Ok(client.vm(vm).await?.exit_reason)
}

/// Kills the daemon at different moments of publishing a snapshot; each time the store holds what was published
/// before, whole, and nothing half-made.
async fn daemon_killed_while_snapshotting(stage: Stage) -> anyhow::Result<()> {
    const MEMORY_BYTES: u64 = 256 << 20;
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(MEMORY_BYTES).await?;
    let hello = ask!(&mut client, &vm.id, Hello(HelloOp {}));
    let touch = TouchOp {
        first_page: hello.arena_bytes / 4096 / 2,
        pages: hello.arena_bytes / 4096 / 4,
        stride: 1,
        seed: 9,
        mode: TouchMode::Fill.into(),
    };
    ask!(&mut client, &vm.id, Touch(touch));
    let kept = client.snapshot(&vm.id, "kept").await?;
    let clone = client.clone_vms("kept", 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0);

    let mut seen_half_made = false;
    for round in 0..4 {
        let victim = if round == 0 {
            clone.id.clone()
        } else {
            client.clone_vms("kept", 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0).id
        };
        let mut other = daemon.client().await?;
        let snapshot = tokio::spawn(async move { other.snapshot(&victim, "half").await });
        // The moment: the folder appears; then a little more of its memory is written each round.
        let data = daemon.data.clone();
        eventually("the snapshot begins", 30, async || {
            let Some(folder) = leftovers(&data, &[&kept.id])?.pop() else {
                return Ok(snapshot.is_finished());
            };
            let written = fs::metadata(data.join("snapshots").join(folder).join("memory.img"))
                .map_or(0, |file| file.len());
            Ok(snapshot.is_finished() || round == 0 || written > 0)
        })
        .await?;
        seen_half_made |= !snapshot.is_finished();
        daemon.kill_hard()?;
        let outcome = snapshot.await?;

        daemon.start_again().await?;
        client = daemon.client().await?;
        let list = client.list_snapshots().await?;
        ensure!(list.damaged.is_empty(), "round {round}: {:?}", list.damaged);
        let ids: Vec<&str> = list.snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
        ensure!(ids.contains(&kept.id.as_str()), "round {round}: the published snapshot is gone: {ids:?}");
        let left = leftovers(&daemon.data, &ids)?;
        ensure!(left.is_empty(), "round {round}: half-made snapshots stayed: {left:?}");
        for id in &ids {
            client.verify(id).await.with_context(|| format!("round {round}: {id}"))?;
        }
        if outcome.is_ok() {
            ensure!(ids.len() == 2, "round {round}: a snapshot that was confirmed is gone");
        }
        for id in ids.iter().filter(|id| **id != kept.id) {
            client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: id.to_string() }).await?;
        }
        let again = client.clone_vms("kept", 2, MemoryMode::Mapped, Identity::Managed).await?;
        let check = CheckOp {
            first_page: touch.first_page,
            pages: touch.pages,
            stride: 1,
            seed: 9,
            mode: TouchMode::Fill.into(),
        };
        ensure!(ask!(&mut client, &again[1].id, Check(check)).bad_pages == 0);
        for vm in again {
            client.delete_vm(&vm.id).await?;
        }
    }
    ensure!(seen_half_made, "every snapshot was finished before the kill: nothing was tried");
    Ok(())
}

/// SIGTERM: the daemon ends by itself, in good order, and what it published is there for the next one.
async fn daemon_stopped(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    client.import_embedded("kept", vec![]).await?;
    let snapshot = client.snapshot(&vm.id, "kept").await?;
    let status = daemon.stop().await?;
    ensure!(status.success(), "the daemon ended with {status}");
    let socket = daemon.socket();
    if tokio::net::UnixStream::connect(&socket).await.is_ok() {
        bail!("somebody still answers on {}", socket.display());
    }
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(client.list_snapshots().await?.snapshots.iter().any(|kept| kept.id == snapshot.id));
    client.boot_image("kept", 1, BootProtocol::Unspecified).await?;
    client.clone_vms("kept", 1, MemoryMode::Mapped, Identity::Managed).await?;
    Ok(())
}

/// SIGTERM while VMs are made as fast as can be: none of them is there afterwards, and callers are told why they get no more.
async fn daemon_stopped_under_load(stage: Stage) -> anyhow::Result<()> {
    const CALLERS: usize = 4;
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    client.snapshot(&vm.id, "base").await?;
    client.delete_vm(&vm.id).await?;
    for round in 0..4 {
        let mut callers = Vec::new();
        for _ in 0..CALLERS {
            let mut client = daemon.client().await?;
            callers.push(tokio::spawn(async move {
                let mut made = 0;
                loop {
                    match client.clone_vms("base", 2, MemoryMode::Mapped, Identity::Unmanaged).await {
                        Err(status) => return (made, status),
                        Ok(vms) => {
                            made += vms.len();
                            for vm in vms {
                                let _ = client.delete_vm(&vm.id).await;
                            }
                        }
                    }
                }
            }));
        }
        eventually("they are at it", 30, async || Ok(!client.list_vms().await?.is_empty())).await?;
        let status = daemon.stop().await?;
        ensure!(status.success(), "round {round}: the daemon ended with {status}");
        for caller in callers {
            let (made, status) = caller.await?;
            // Told, or cut off in the middle.
            let codes = [Code::Unavailable, Code::Cancelled, Code::Unknown, Code::Aborted];
            ensure!(codes.contains(&status.code()), "round {round}: after {made} clones: {status}");
        }
        daemon.start_again().await?;
        client = daemon.client().await?;
        let left = client.list_vms().await?;
        ensure!(left.is_empty(), "round {round}: VMs that outlived a service that was stopped: {left:?}");
        let log = daemon.log()?;
        let found = log.lines().find(|line| line.contains("VMs of an earlier service")).unwrap_or_default();
        ensure!(!found.contains("half_made") || found.contains("half_made=0"), "round {round}: {found}");
    }
    Ok(())
}
