//! Requests and the daemon's death: what was made for a caller that never heard of it is found again by the request's id, VMs of one request are
//! its caller's all together, those of which nobody ever heard are told from the others; and a large request to an agent that was cut off.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

/// Bytes of a record as it is handed over: a page.
const RECORD_BYTES: u64 = 4096;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("adopt/request-ids", &[Need::Kvm], 180, request_ids),
        trial("adopt/request-ids-of-what-is-made", &[Need::Kvm], 180, made),
        trial("adopt/all-or-none", &[Need::Kvm], 120, all_or_none),
        trial("adopt/unclaimed", &[Need::Kvm], 120, unclaimed),
        trial("adopt/large-request", &[Need::Kvm], 300, large_request),
    ]
}

async fn base(client: &mut Client) -> anyhow::Result<()> {
    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "base").await?;
    Ok(client.delete_vm(&source.id).await?)
}

fn echo(bytes: usize) -> EchoOp {
    EchoOp { data: vec![0x5a; bytes].into() }
}

/// A clone that is asked to say so many bytes back.
fn request(id: &str, bytes: usize) -> CloneVmRequest {
    let first_call = AgentCallRequest { op: Some(Op::Echo(echo(bytes))), ..Default::default() };
    CloneVmRequest {
        snapshot: "base".into(),
        first_call: Some(first_call),
        request_id: id.into(),
        ..Default::default()
    }
}

fn ids(vms: &[Vm]) -> Vec<String> {
    vms.iter().map(|vm| vm.id.clone()).collect()
}

fn record(daemon: &Daemon, vm: &str) -> PathBuf {
    daemon.data.join("vms").join(vm).join("vm.json")
}

/// VMs that are settled.
fn settled(daemon: &Daemon) -> anyhow::Result<BTreeSet<String>> {
    let mut settled = BTreeSet::new();
    for entry in fs::read_dir(daemon.data.join("vms"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let record = fs::read(record(daemon, &name)).unwrap_or_default();
        if record.iter().any(|byte| !byte.is_ascii_whitespace()) {
            settled.insert(name);
        }
    }
    Ok(settled)
}

async fn again(daemon: &mut Daemon) -> anyhow::Result<Client> {
    daemon.kill_hard()?;
    daemon.start_again().await?;
    daemon.client().await
}

async fn request_ids(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let pool = CreatePoolRequest {
        name: "web".into(),
        snapshot: "base".into(),
        mode: PoolMode::Running.into(),
        min_ready: Some(1),
        max: 8,
        ..Default::default()
    };
    client.pools.create_pool(pool).await?;
    let short = request(&"i".repeat(64), 100);
    let long = request("long", 100_000);
    let several =
        CloneVmRequest { count: 3, first_call: None, name: "several".into(), ..request("several", 0) };
    let nameless = request("", 3);
    let take = TakeVmRequest { pool: "web".into(), request_id: "take".into(), ..Default::default() };
    let mut answers = Vec::new();
    for asked in [&short, &long, &several, &nameless] {
        answers.push(client.vms.clone_vm(asked.clone()).await?.into_inner());
    }
    let taken = client.pools.take_vm(take.clone()).await?.into_inner();
    let taken_id = taken.vm.as_ref().context("no VM was taken")?.id.clone();
    for vm in [&answers[0].vms[0].id, &answers[3].vms[0].id, &taken_id] {
        let bytes = fs::metadata(record(&daemon, vm))?.len();
        ensure!(bytes == RECORD_BYTES, "{vm}: a record of {bytes} bytes was not written over its blanks");
    }
    let mut known: BTreeSet<String> = answers.iter().flat_map(|answer| ids(&answer.vms)).collect();
    known.insert(taken_id.clone());

    // One more, and the daemon is killed as soon as the VM is its caller's, who may have heard or not.
    let cut_off = request("cut off", 7);
    let (mut other, asked) = (daemon.client().await?, cut_off.clone());
    let calling = tokio::spawn(async move { other.vms.clone_vm(asked).await });
    let mut made = BTreeSet::new();
    eventually("the VM is settled", 30, async || {
        made = settled(&daemon)?.difference(&known).cloned().collect();
        Ok(!made.is_empty())
    })
    .await?;
    let mut client = again(&mut daemon).await?;
    drop(calling.await?);
    let made: Vec<String> = made.into_iter().collect();
    for round in 0..2 {
        let answer = client.vms.clone_vm(cut_off.clone()).await?.into_inner();
        ensure!(ids(&answer.vms) == made, "round {round}: {:?}, not {made:?}", ids(&answer.vms));
        let first = answer.answer.and_then(|answer| answer.result);
        ensure!(first == Some(Answer::Echo(EchoResult { data: vec![0x5a; 7].into() })), "{first:?}");
        for (asked, before) in [&short, &long, &several].into_iter().zip(&answers) {
            let answer = client.vms.clone_vm(asked.clone()).await?.into_inner();
            ensure!(ids(&answer.vms) == ids(&before.vms), "round {round}: {answer:?}, not {before:?}");
            ensure!(
                answer.answer == before.answer,
                "round {round}: another answer to {:?}",
                asked.request_id
            );
        }
        let taken_again = client.pools.take_vm(take.clone()).await?.into_inner();
        ensure!(
            taken_again.vm.as_ref().is_some_and(|vm| vm.id == taken_id)
                && taken_again.was_ready == taken.was_ready,
            "round {round}: {taken_again:?}, not {taken:?}"
        );
        let differs = CloneVmRequest { name: "other".into(), ..cut_off.clone() };
        let said =
            expect_status("another request", client.vms.clone_vm(differs).await, &[Code::InvalidArgument])?;
        ensure!(said.contains("another request"), "{said}");
        let listed: BTreeSet<String> = ids(&client.list_vms().await?).into_iter().collect();
        let due: BTreeSet<String> = known.iter().chain(&made).cloned().collect();
        ensure!(listed == due, "round {round}: {listed:?}, not {due:?}");
        // The daemon after the next one knows it, too.
        if round == 0 {
            client = again(&mut daemon).await?;
        }
    }
    // One of several is gone: the others are what there is. When none is left it is a request like any.
    client.delete_vm("several-1").await?;
    let rest = client.vms.clone_vm(several.clone()).await?.into_inner().vms;
    let due = [answers[2].vms[0].id.clone(), answers[2].vms[2].id.clone()];
    ensure!(ids(&rest) == due, "{:?}, not {due:?}", ids(&rest));
    client.delete_vm(&made[0]).await?;
    let new = client.vms.clone_vm(cut_off.clone()).await?.into_inner().vms;
    ensure!(new.len() == 1 && new[0].id != made[0], "a VM that was deleted came again: {new:?}");
    let same = client.vms.clone_vm(cut_off).await?.into_inner().vms;
    ensure!(ids(&same) == ids(&new), "{:?}, not {:?}", ids(&same), ids(&new));
    for vm in client.list_vms().await? {
        client.delete_vm(&vm.id).await?;
    }
    eventually("nothing is left of the daemons before", 20, async || Ok(daemon.orphans().is_empty())).await
}

/// The daemon was killed when it had settled some VMs of a request and not the others.
/// A boot and a snapshot that are asked for again, from the same daemon and from the next.
async fn made(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let boot = CreateVmRequest {
        source: Some(create_vm_request::Source::Embedded(true)),
        memory_bytes: 64 << 20,
        request_id: "boot".into(),
        ..Default::default()
    };
    // Two at a time: one boots, the other waits for it.
    let mut other = daemon.client().await?;
    let (first, second) = tokio::join!(client.boot(boot.clone()), other.boot(boot.clone()));
    let vm = first?.vm.id;
    ensure!(second?.vm.id == vm, "the second of two boots at once was another VM");
    let freeze = CreateSnapshotRequest { vm: vm.clone(), request_id: "freeze".into(), ..Default::default() };
    let snapshot = client.snapshots.create_snapshot(freeze.clone()).await?.into_inner().snapshot;
    let snapshot = snapshot.context("no snapshot")?.id;
    for round in 0..2 {
        let again_vm = client.boot(boot.clone()).await?.vm.id;
        ensure!(again_vm == vm, "round {round}: {again_vm} was booted, not {vm} told");
        let taken = client.snapshots.create_snapshot(freeze.clone()).await?.into_inner();
        let again_snapshot = taken.snapshot.context("no snapshot")?.id;
        ensure!(again_snapshot == snapshot, "round {round}: {again_snapshot}, not {snapshot}");
        let another = CreateVmRequest { vcpus: 2, ..boot.clone() };
        expect_status("another boot of that id", client.boot(another).await, &[Code::InvalidArgument])?;
        let another = CreateSnapshotRequest { name: "another".into(), ..freeze.clone() };
        let refused = client.snapshots.create_snapshot(another).await;
        expect_status("another snapshot of that id", refused, &[Code::InvalidArgument])?;
        if round == 0 {
            client = again(&mut daemon).await?;
        }
    }
    let snapshots = client.snapshots.list_snapshots(ListSnapshotsRequest::default()).await?.into_inner();
    ensure!(snapshots.snapshots.len() == 1, "{} snapshots", snapshots.snapshots.len());
    // A VM that has ended is no answer of a daemon that took it over.
    client.delete_vm(&vm).await?;
    let new = client.boot(boot).await?.vm.id;
    ensure!(new != vm, "a VM that had ended was told");
    Ok(())
}

async fn all_or_none(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let three = CloneVmRequest { count: 3, first_call: None, ..request("three", 0) };
    let two = CloneVmRequest { count: 2, first_call: None, ..request("", 0) };
    let half = [
        client.vms.clone_vm(three.clone()).await?.into_inner().vms,
        client.vms.clone_vm(two.clone()).await?.into_inner().vms,
    ];
    let whole = client.vms.clone_vm(two).await?.into_inner().vms;
    daemon.kill_hard()?;
    for vms in &half {
        // As it is until then.
        fs::write(record(&daemon, &vms[1].id), [b' '; RECORD_BYTES as usize])?;
    }
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    let set = |vms: &[Vm]| ids(vms).into_iter().collect::<BTreeSet<_>>();
    let listed = set(&client.list_vms().await?);
    ensure!(listed == set(&whole), "{listed:?}, not {:?}", ids(&whole));
    let new = client.vms.clone_vm(three).await?.into_inner().vms;
    ensure!(new.len() == 3 && new.iter().all(|vm| half[0].iter().all(|old| old.id != vm.id)), "{new:?}");
    for vm in new.iter().chain(&whole) {
        client.delete_vm(&vm.id).await?;
    }
    eventually("the others are gone", 20, async || Ok(daemon.orphans().is_empty())).await
}

async fn unclaimed(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    base(&mut client).await?;
    let vms = client.clone_vms("base", 3, MemoryMode::Mapped, Identity::Managed).await?;
    let ours = ids(&vms);
    // As listed, in the order in which they were made.
    let listed = async |client: &mut Client| {
        let listed = client.list_vms().await?;
        let found =
            ours.iter().map(|id| listed.iter().find(|vm| vm.id == *id).cloned().context("it is gone"));
        found.collect::<anyhow::Result<Vec<Vm>>>()
    };
    let claims = |vms: &[Vm]| -> Vec<bool> { vms.iter().map(|vm| vm.unclaimed).collect() };
    // The first is named before, the second after; nobody ever names the third.
    ask!(&mut client, &ours[0], Echo(echo(1)));
    ensure!(claims(&listed(&mut client).await?) == [false; 3], "they are this daemon's own");
    let mut client = again(&mut daemon).await?;
    ensure!(claims(&listed(&mut client).await?) == [false, true, true], "{:?}", client.list_vms().await?);
    ask!(&mut client, &ours[1], Echo(echo(1)));
    ensure!(claims(&listed(&mut client).await?) == [false, false, true], "{:?}", client.list_vms().await?);

    daemon.set_arguments(vec!["--unclaimed-time".into(), "1".into()]);
    let mut client = again(&mut daemon).await?;
    eventually("the one that nobody names ends", 30, async || {
        let states: Vec<VmState> = listed(&mut client).await?.iter().map(Vm::state).collect();
        Ok(states == [VmState::Running, VmState::Running, VmState::Exited])
    })
    .await?;
    let ended = client.vm(&ours[2]).await?;
    ensure!(ended.exit_reason.contains("--unclaimed-time"), "{}", ended.exit_reason);
    for vm in &vms[..2] {
        ask!(&mut client, &vm.id, Echo(echo(1)));
    }
    Ok(())
}

/// The daemon is killed when it has sent a part of a request, the guest being busy.
async fn large_request(stage: Stage) -> anyhow::Result<()> {
    const VMS: usize = 3;
    let rounds = if host::in_rig() { 1 << 22 } else { 1 << 28 };
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "base").await?;
    let mut vms = client.clone_vms("base", 2, MemoryMode::Mapped, Identity::Managed).await?;
    vms.push(source);
    ensure!(vms.len() == VMS);
    let mut calls = Vec::new();
    let call = |vm: &Vm, op: Op| {
        let (mut client, vm) = (client.clone(), vm.id.clone());
        tokio::spawn(
            async move { client.agent.call(AgentCallRequest { vm, op: Some(op), timeout_ms: 0 }).await },
        )
    };
    for vm in &vms {
        calls.push(call(vm, Op::RunOnAll(RunOnAllOp { seed: 1, rounds })));
        calls.push(call(vm, Op::Echo(echo(1 << 20))));
    }
    // They are on their way when others that were sent later have come back.
    for _ in 0..10 {
        client.list_vms().await?;
    }
    drop(client);
    daemon.kill_hard()?;
    let answered = {
        let mut answered = 0;
        for call in calls {
            answered += usize::from(call.await?.is_ok());
        }
        answered
    };
    ensure!(answered == 0, "{answered} were answered: nothing was cut off");
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    for vm in &vms {
        for bytes in [10, 1 << 20, 40_000, 1 << 20, 1 << 20] {
            let said = ask!(&mut client, &vm.id, Echo(echo(bytes)));
            ensure!(said.data.len() == bytes && said.data.iter().all(|byte| *byte == 0x5a), "{}", vm.id);
        }
    }
    Ok(())
}
