//! Worker processes and the zygote that they are forked from: nobody depends on it for life, nobody outlives the daemon, nothing is left of a worker.

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ask};
use crate::daemon::{Daemon, Process, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
/// More than the daemon keeps shells.
const CLONES: u32 = 8;
/// Shells that it keeps.
const SHELLS: usize = 4;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("workers/zygote-killed", NEEDS, 90, zygote_killed),
        trial("workers/daemon-killed", NEEDS, 60, daemon_killed),
        trial("workers/nothing-left-of-300-clones", NEEDS, 180, nothing_left),
    ]
}

async fn clones(client: &mut Client, snapshot: &str) -> anyhow::Result<Vec<Vm>> {
    Ok(client.clone_vms(snapshot, CLONES, MemoryMode::Mapped, Identity::Managed).await?)
}

async fn expect_echo(client: &mut Client, vm: &Vm) -> anyhow::Result<()> {
    let echo = ask!(client, &vm.id, Echo(EchoOp { data: b"still here".to_vec().into() }));
    ensure!(echo.data[..] == b"still here"[..]);
    Ok(())
}

/// Workers live on without it, clones start without it, and another one takes its place.
async fn zygote_killed(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&source.id, "").await?.id;
    let mut alive = clones(&mut client, &snapshot).await?;
    let mut killed: Vec<i32> = Vec::new();
    for round in 0..4 {
        let mut found = None;
        eventually("there is a zygote", 20, async || {
            found = daemon.zygote().filter(|zygote| !killed.contains(&zygote.pid));
            if found.is_none() {
                // It is not started again for nothing.
                for vm in clones(&mut client, &snapshot).await? {
                    client.delete_vm(&vm.id).await?;
                }
            }
            Ok(found.is_some())
        })
        .await?;
        let zygote = found.context("a zygote")?;
        let mut other = daemon.client().await?;
        let of = snapshot.clone();
        // Every second time it dies while workers are asked of it.
        let under_way = (round % 2 == 1).then(|| tokio::spawn(async move { clones(&mut other, &of).await }));
        zygote.kill();
        killed.push(zygote.pid);
        if let Some(under_way) = under_way {
            alive.extend(under_way.await?.with_context(|| format!("round {round}, under way"))?);
        }
        alive.extend(clones(&mut client, &snapshot).await.with_context(|| format!("round {round}"))?);
    }
    for vm in alive.iter().chain([&source]) {
        expect_echo(&mut client, vm).await.with_context(|| format!("{} does not answer", vm.id))?;
        client.delete_vm(&vm.id).await?;
    }
    no_zombies(&daemon).await
}

async fn no_zombies(daemon: &Daemon) -> anyhow::Result<()> {
    eventually("every process that ended is reaped", 10, async || {
        Ok(daemon.processes().iter().all(|process| !process.zombie))
    })
    .await
}

/// SIGKILL: the zygote, shells and what was being made end; with `--orphan-time 0` also all that ran.
async fn daemon_killed(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start_with(&stage, &["--orphan-time".into(), "0".into()]).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&source.id, "").await?.id;
    let vms = clones(&mut client, &snapshot).await?;
    let before = daemon.processes();
    let is_there = |pid: u32| before.iter().any(|process| i64::from(process.pid) == i64::from(pid));
    ensure!(vms.iter().chain([&source]).all(|vm| is_there(vm.worker_pid)), "{before:?}");
    ensure!(before.iter().any(|process| process.name == "zygote"), "{before:?}");
    // Some are being made.
    let mut other = daemon.client().await?;
    let under_way = tokio::spawn(async move { clones(&mut other, &snapshot).await.map(drop) });
    daemon.kill_hard()?;
    ensure!(under_way.await?.is_err(), "a killed daemon has answered");
    eventually("the zygote and all workers end", 10, async || Ok(daemon.all_orphans().is_empty())).await
}

/// Processes and descriptors are as many as before.
async fn nothing_left(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&source.id, "").await?.id;
    let mut before = None;
    for round in 0..(300 / CLONES + 1) {
        for vm in clones(&mut client, &snapshot).await? {
            client.delete_vm(&vm.id).await?;
        }
        // Files of the snapshot are opened, and its working set is learnt, with the first.
        if round == 1 {
            before = Some((held(&daemon).await?, daemon.descriptors_lead_to()?));
        }
    }
    let (before, were) = before.context("too few rounds")?;
    let mut after = before;
    let back = eventually("as few descriptors as before", 30, async || {
        after = held(&daemon).await?;
        Ok(after.0 <= before.0 && after.1 <= before.1)
    });
    if let Err(error) = back.await {
        bail!(
            "{error}: before {before:?}, after {after:?}: {were:?} then {:?}",
            daemon.descriptors_lead_to()?
        );
    }
    no_zombies(&daemon).await
}

/// Descriptors of the daemon and of its zygote, when the reserve is full and quiet: the same twice in a row.
async fn held(daemon: &Daemon) -> anyhow::Result<(usize, usize)> {
    let mut held = None;
    eventually("the shells are there and nothing else", 30, async || {
        let processes: Vec<Process> = daemon.processes();
        let zygote = daemon.zygote().context("no zygote")?;
        let now = (daemon.descriptors()?, zygote.descriptors()?);
        let before = held.replace(now);
        // The zygote, the shells and the source.
        Ok(processes.len() == SHELLS + 2 && before == held)
    })
    .await?;
    held.context("nothing was looked at")
}
