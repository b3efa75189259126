//! Pools: what they promise is ready, is nobody's before it is taken and one caller's after, and is made again whatever happens to it.

use std::collections::BTreeSet;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};

use crate::client::{Client, ask, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("pools/modes", &[Need::Kvm, Need::Userfault], 180, modes),
        trial("pools/crowd", &[Need::Kvm], 180, crowd),
        trial("pools/rolling", &[Need::Kvm], 180, rolling),
        trial("pools/restart", &[Need::Kvm], 180, restart),
        trial("pools/given-up", &[Need::Kvm], 180, given_up),
        trial("pools/bad-input", &[Need::Kvm], 120, bad_input),
    ]
}

/// Checks that it failed with this code, in a sentence with these words.
fn refused<T>(result: Result<T, Status>, code: Code, words: &str) -> anyhow::Result<()> {
    let message = expect_status(words, result, &[code])?;
    ensure!(message.contains(words), "{message:?} does not say {words:?}");
    Ok(())
}

/// A snapshot of the embedded guest.
async fn snapshot(client: &mut Client, name: &str) -> anyhow::Result<Snapshot> {
    let vm = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&vm.id, name).await?;
    client.delete_vm(&vm.id).await?;
    Ok(snapshot)
}

fn pool(name: &str, snapshot: &str, mode: PoolMode, min_ready: u32, max: u32) -> CreatePoolRequest {
    CreatePoolRequest {
        name: name.into(),
        snapshot: snapshot.into(),
        mode: mode.into(),
        min_ready: Some(min_ready),
        max,
        ..Default::default()
    }
}

async fn look(client: &mut Client, pool: &str) -> anyhow::Result<Pool> {
    Ok(client.pools.get_pool(GetPoolRequest { pool: pool.into() }).await?.into_inner())
}

/// Waits until all that is wanted is ready, and nothing is stale.
async fn ready(client: &mut Client, pool: &str) -> anyhow::Result<Pool> {
    let mut seen = Pool::default();
    eventually("the pool is ready", 60, async || {
        seen = look(client, pool).await?;
        Ok(seen.ready >= seen.target && seen.making == 0 && seen.stale == 0)
    })
    .await?;
    ensure!(seen.ready >= seen.min_ready.min(seen.max - seen.in_use), "{seen:?}");
    Ok(seen)
}

/// Takes one, which is asked for its generation as soon as it can be.
async fn take(client: &mut Client, pool: &str) -> anyhow::Result<TakeVmResponse> {
    let first_call =
        Some(AgentCallRequest { op: Some(Op::Generation(GenerationOp {})), ..Default::default() });
    let request = TakeVmRequest { pool: pool.into(), first_call, ..Default::default() };
    let taken = client.pools.take_vm(request).await?.into_inner();
    let vm = taken.vm.as_ref().context("no VM")?;
    match taken.answer.as_ref().and_then(|answer| answer.result.as_ref()) {
        Some(Answer::Generation(answer)) if answer.generation == vm.generation => Ok(taken),
        other => bail!("{} has the generation {:?} and answered {other:?}", vm.id, vm.generation),
    }
}

async fn modes(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    snapshot(&mut client, "base").await?;
    let kinds = [
        ("shell", PoolMode::Shell, MemoryMode::Mapped),
        ("paused", PoolMode::Paused, MemoryMode::Mapped),
        ("running", PoolMode::Running, MemoryMode::Userfault),
    ];
    let mut generations = BTreeSet::new();
    for (name, mode, memory_mode) in kinds {
        let request = CreatePoolRequest { memory_mode: memory_mode.into(), ..pool(name, "base", mode, 2, 4) };
        client.pools.create_pool(request).await?;
        ready(&mut client, name).await?;

        // What stands ready is nobody's.
        ensure!(client.list_vms().await?.is_empty(), "VMs that nobody has taken are listed");
        let all = client
            .vms
            .list_vms(ListVmsRequest { ready_in_pools: true, ..Default::default() })
            .await?
            .into_inner()
            .vms;
        match mode {
            PoolMode::Shell => ensure!(all.is_empty(), "{all:?}"),
            _ => ensure!(
                !all.is_empty() && all.iter().all(|vm| vm.ready_in_pool && vm.pool == name),
                "{all:?}"
            ),
        }
        for vm in &all {
            let want = if mode == PoolMode::Paused { VmState::Paused } else { VmState::Running };
            ensure!(vm.state() == want, "{vm:?}");
            refused(client.vm(&vm.id).await, Code::FailedPrecondition, "stands ready in the pool")?;
            refused(client.delete_vm(&vm.id).await, Code::FailedPrecondition, "pool take")?;
        }

        // The promised two were ready; of four, no fifth.
        let mut vms = Vec::new();
        for n in 0..4 {
            let taken = take(&mut client, name).await?;
            let vm = taken.vm.context("no VM")?;
            ensure!(n >= 2 || taken.was_ready, "number {n} was not ready");
            ensure!(vm.pool == name && !vm.ready_in_pool && vm.state() == VmState::Running, "{vm:?}");
            ensure!(generations.insert(vm.generation.clone()), "two have the same generation");
            vms.push(vm);
        }
        let request = TakeVmRequest { pool: name.into(), ..Default::default() };
        refused(client.pools.take_vm(request).await, Code::ResourceExhausted, "--max")?;
        ensure!(client.list_vms().await?.len() == 4);
        // Nor do they share a random generator.
        for vm in &vms {
            let random = ask!(&mut client, &vm.id, Random(RandomOp { bytes: 32 })).data;
            ensure!(generations.insert(random), "two have the same random bytes");
        }

        // What ends makes room.
        client.delete_vm(&vms[0].id).await?;
        eventually("what has ended is counted no more, and another is made", 60, async || {
            let seen = look(&mut client, name).await?;
            Ok(seen.in_use == 3 && seen.ready == 1)
        })
        .await?;
        client.pools.delete_pool(DeletePoolRequest { pool: name.into() }).await?;
        refused(
            client.pools.get_pool(GetPoolRequest { pool: name.into() }).await,
            Code::NotFound,
            "pool ls",
        )?;
        // Those that were taken go on.
        for vm in &vms[1..] {
            ask!(&mut client, &vm.id, Generation(GenerationOp {}));
            client.delete_vm(&vm.id).await?;
        }
        let all = client
            .vms
            .list_vms(ListVmsRequest { ready_in_pools: true, ..Default::default() })
            .await?
            .into_inner()
            .vms;
        ensure!(all.is_empty(), "left behind: {all:?}");
    }
    Ok(())
}

/// Begins a call, and drops it when it has been looked at so many times more.
async fn give_up<T>(mut looks: u64, call: impl Future<Output = T>) {
    let mut call = std::pin::pin!(call);
    std::future::poll_fn(|context| {
        if call.as_mut().poll(context).is_ready() || looks == 0 {
            return Poll::Ready(());
        }
        looks -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Callers that go away in the middle of a change: it is made, or not, and what the next service finds is what this one had.
async fn given_up(stage: Stage) -> anyhow::Result<()> {
    const ROUNDS: u64 = 60;
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    snapshot(&mut client, "base").await?;
    let wanted = |name: &str| pool(name, "base", PoolMode::Shell, 0, 4);
    for round in 0..ROUNDS {
        // Each a little later than the one before.
        let moment = Duration::from_micros(50 * round);
        let mut other = client.clone();
        let request = wanted(&format!("given-up-{round}"));
        match round % 2 {
            // A timer's shortest time is a millisecond, in which all may be done.
            0 => give_up(round / 2, other.pools.create_pool(request)).await,
            _ => drop(tokio::time::timeout(moment, other.pools.create_pool(request)).await),
        }
        client.pools.create_pool(wanted("victim")).await?;
        let delete = || DeletePoolRequest { pool: "victim".into() };
        let _ = tokio::time::timeout(moment, other.pools.delete_pool(delete())).await;
        match client.pools.delete_pool(delete()).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => bail!("round {round}: a pool that cannot be deleted any more: {status}"),
        }
    }
    let names = async |client: &mut Client| {
        let pools = client.pools.list_pools(ListPoolsRequest::default()).await?.into_inner().pools;
        anyhow::Ok(pools.into_iter().map(|pool| pool.name).collect::<BTreeSet<_>>())
    };
    let before = names(&mut client).await?;
    ensure!(!before.is_empty() && before.len() < ROUNDS as usize, "none, or all: {}", before.len());
    drop(client);
    ensure!(daemon.stop().await?.success());
    daemon.start_again().await?;
    let after = names(&mut daemon.client().await?).await?;
    ensure!(before == after, "before: {before:?}, after: {after:?}");
    Ok(())
}

/// Many at once: nobody gets what another has got, and what was asked for again is given again.
async fn crowd(stage: Stage) -> anyhow::Result<()> {
    const CALLERS: usize = 6;
    const EACH: usize = 12;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    snapshot(&mut client, "base").await?;
    client.pools.create_pool(pool("crowd", "base", PoolMode::Shell, 3, 40)).await?;
    ready(&mut client, "crowd").await?;
    let callers = (0..CALLERS).map(|caller| {
        let mut client = client.clone();
        tokio::spawn(async move {
            let mut seen = Vec::new();
            for n in 0..EACH {
                let request = TakeVmRequest {
                    pool: "crowd".into(),
                    request_id: format!("{caller}/{n}"),
                    ..Default::default()
                };
                let mut again = client.pools.clone();
                let (one, two) = tokio::join!(client.pools.take_vm(request.clone()), again.take_vm(request));
                let (one, two) = (one?.into_inner(), two?.into_inner());
                ensure!(one == two, "the same request was answered with {one:?} and {two:?}");
                let vm = one.vm.context("no VM")?;
                ask!(&mut client, &vm.id, Generation(GenerationOp {}));
                if n % 2 == 0 {
                    client.delete_vm(&vm.id).await?;
                }
                seen.push((vm.id, vm.generation));
            }
            Ok(seen)
        })
    });
    let mut ids = BTreeSet::new();
    let mut generations = BTreeSet::new();
    for caller in callers.collect::<Vec<_>>() {
        for (id, generation) in caller.await?? {
            ensure!(ids.insert(id.clone()), "{id} was handed out twice");
            ensure!(generations.insert(generation), "two have the same generation");
        }
    }
    let seen = ready(&mut client, "crowd").await?;
    let counts = seen.counts.context("no counts")?;
    ensure!(counts.taken_ready + counts.taken_cold == (CALLERS * EACH) as u64, "{counts:?}");
    ensure!(seen.in_use as usize == CALLERS * EACH / 2, "{seen:?}");

    // A clone that is asked for again is the same one, too.
    let request =
        CloneVmRequest { snapshot: "base".into(), request_id: "again".into(), ..Default::default() };
    let one = client.vms.clone_vm(request.clone()).await?.into_inner();
    let two = client.vms.clone_vm(request.clone()).await?.into_inner();
    ensure!(one == two && one.vms.len() == 1, "{one:?} {two:?}");
    let other = CloneVmRequest { count: 2, ..request };
    refused(client.vms.clone_vm(other).await, Code::InvalidArgument, "another request")
}

/// A newer snapshot takes the place of an older one while callers take VMs, and no request fails.
async fn rolling(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let old = snapshot(&mut client, "old").await?;
    let new = snapshot(&mut client, "new").await?;
    client.pools.create_pool(pool("web", "old", PoolMode::Paused, 3, 8)).await?;
    ready(&mut client, "web").await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let callers: Vec<_> = (0..2)
        .map(|_| {
            let (mut client, stopped) = (client.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut snapshots = Vec::new();
                while !*stopped.borrow() {
                    let vm = take(&mut client, "web").await?.vm.context("no VM")?;
                    client.delete_vm(&vm.id).await?;
                    let Some(vm::Origin::Snapshot(snapshot)) = vm.origin else { bail!("not a clone") };
                    snapshots.push(snapshot);
                }
                Ok(snapshots)
            })
        })
        .collect();
    eventually("callers have been served", 60, async || {
        let counts = look(&mut client, "web").await?.counts.context("no counts")?;
        Ok(counts.taken_ready + counts.taken_cold >= 10)
    })
    .await?;
    let change = UpdatePoolRequest { pool: "web".into(), snapshot: Some("new".into()), ..Default::default() };
    let changed = client.pools.update_pool(change).await?.into_inner();
    ensure!(changed.snapshot == new.id, "{changed:?}");
    eventually("nothing of the old snapshot is left", 60, async || {
        let seen = look(&mut client, "web").await?;
        Ok(seen.stale == 0 && seen.ready > 0)
    })
    .await?;
    let before = look(&mut client, "web").await?.counts.context("no counts")?;
    eventually("callers have been served again", 60, async || {
        let counts = look(&mut client, "web").await?.counts.context("no counts")?;
        Ok(counts.taken_ready + counts.taken_cold >= before.taken_ready + before.taken_cold + 10)
    })
    .await?;
    stop.send(true)?;
    for caller in callers {
        let snapshots: Vec<String> = caller.await??;
        ensure!(snapshots.first() == Some(&old.id) && snapshots.last() == Some(&new.id), "{snapshots:?}");
    }
    // The new one is in use, the old one is not.
    let request = DeleteSnapshotRequest { snapshot: "new".into() };
    refused(client.snapshots.delete_snapshot(request).await, Code::FailedPrecondition, "the pool web")?;
    client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: "old".into() }).await?;
    Ok(())
}

/// What stands ready is made again when it dies, and when the service does.
async fn restart(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    snapshot(&mut client, "base").await?;
    client.pools.create_pool(pool("web", "base", PoolMode::Running, 2, 8)).await?;
    let made = ready(&mut client, "web").await?.counts.context("no counts")?.made;
    let all = client
        .vms
        .list_vms(ListVmsRequest { ready_in_pools: true, ..Default::default() })
        .await?
        .into_inner()
        .vms;
    let victim = all.first().context("none is listed")?;
    let pid = i32::try_from(victim.worker_pid)?;
    // SAFETY: plain numbers; the process is a worker of our own daemon.
    ensure!(unsafe { libc::kill(pid, libc::SIGKILL) } == 0, "no worker {pid}");
    eventually("the dead one is replaced", 60, async || {
        let counts = look(&mut client, "web").await?.counts.context("no counts")?;
        Ok(counts.died == 1 && counts.made > made)
    })
    .await?;
    ready(&mut client, "web").await?;
    for _ in 0..2 {
        let vm = take(&mut client, "web").await?.vm.context("no VM")?;
        ensure!(vm.id != victim.id);
    }

    let change = UpdatePoolRequest { pool: "web".into(), min_ready: Some(3), ..Default::default() };
    client.pools.update_pool(change).await?;
    drop(client);
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    let seen = ready(&mut client, "web").await?;
    ensure!(seen.min_ready == 3 && seen.mode() == PoolMode::Running && seen.max == 8, "{seen:?}");
    let taken = take(&mut client, "web").await?;
    ensure!(taken.was_ready, "{taken:?}");

    // A deleted pool stays deleted.
    client.pools.delete_pool(DeletePoolRequest { pool: "web".into() }).await?;
    drop(client);
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(client.pools.list_pools(ListPoolsRequest::default()).await?.into_inner().pools.is_empty());
    Ok(())
}

async fn bad_input(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    snapshot(&mut client, "base").await?;
    let good = pool("web", "base", PoolMode::Shell, 1, 4);
    let cases = [
        (CreatePoolRequest { name: "Web".into(), ..good.clone() }, Code::InvalidArgument, "a-z 0-9 -"),
        (CreatePoolRequest { name: "../web".into(), ..good.clone() }, Code::InvalidArgument, "a-z 0-9 -"),
        (CreatePoolRequest { snapshot: "none".into(), ..good.clone() }, Code::NotFound, "none"),
        (CreatePoolRequest { min_ready: Some(5), ..good.clone() }, Code::InvalidArgument, "min_ready"),
        (CreatePoolRequest { max: u32::MAX, ..good.clone() }, Code::InvalidArgument, "allows 1 to"),
        (
            CreatePoolRequest { idle_ttl_ms: Some(u32::MAX), ..good.clone() },
            Code::InvalidArgument,
            "idle_ttl",
        ),
        (CreatePoolRequest { mode: 9, ..good.clone() }, Code::InvalidArgument, "PoolMode"),
        (
            CreatePoolRequest { memory_mode: MemoryMode::Userfault.into(), ..good.clone() },
            Code::InvalidArgument,
            "USERFAULT",
        ),
    ];
    for (request, code, text) in cases {
        refused(client.pools.create_pool(request).await, code, text)?;
    }
    client.pools.create_pool(good.clone()).await?;
    refused(client.pools.create_pool(good).await, Code::AlreadyExists, "exists already")?;
    let change = UpdatePoolRequest { pool: "web".into(), min_ready: Some(9), ..Default::default() };
    refused(client.pools.update_pool(change).await, Code::InvalidArgument, "min_ready")?;
    ensure!(look(&mut client, "web").await?.min_ready == 1);
    let nobody = TakeVmRequest { pool: "nobody".into(), ..Default::default() };
    refused(client.pools.take_vm(nobody).await, Code::NotFound, "pool ls")?;

    // A name that is taken: nothing is taken out of the pool for it, or it is not lost.
    let named = TakeVmRequest { pool: "web".into(), name: "one".into(), ..Default::default() };
    let vm = client.pools.take_vm(named.clone()).await?.into_inner().vm.context("no VM")?;
    ensure!(vm.name == "one" && client.vm("one").await?.id == vm.id);
    refused(client.pools.take_vm(named).await, Code::AlreadyExists, "one")?;
    ensure!(look(&mut client, "web").await?.in_use == 1);

    // An agent that refuses the first call: the VM is ended, and the pool has room again.
    let op = Op::DiskInfo(DiskInfoOp { disk: 7 });
    let first_call = Some(AgentCallRequest { op: Some(op), ..Default::default() });
    let request = TakeVmRequest { pool: "web".into(), first_call, ..Default::default() };
    refused(client.pools.take_vm(request).await, Code::InvalidArgument, "")?;
    eventually("the refused one is gone", 30, async || Ok(look(&mut client, "web").await?.in_use == 1)).await
}
