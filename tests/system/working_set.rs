//! The working set: learnt from the first clones, given to all that follow, kept over the daemon's end; and only ever advice.

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ask};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

/// Pages that the snapshot has, and that each clone's first call writes: 8 MiB, so that whole pieces of 2 MiB are among them.
const PAGES: u64 = 2048;
const PAGE_BYTES: u64 = 4096;
/// What the snapshot's pages were filled with.
const SEED: u64 = 11;
/// Clones that it is learnt from.
const RECORDINGS: u32 = 3;

pub fn trials() -> Vec<Trial> {
    vec![trial("embedded/working-set", &[Need::Kvm, Need::Userfault], 120, working_set)]
}

fn touch(seed: u64, mode: TouchMode) -> TouchOp {
    TouchOp { first_page: 0, pages: PAGES, stride: 1, seed, mode: mode.into() }
}

/// A clone whose first call writes a word to each page.
async fn writing_clone(client: &mut Client, memory_mode: MemoryMode, seed: u64) -> anyhow::Result<Vm> {
    let request = CloneVmRequest {
        snapshot: "set".into(),
        memory_mode: memory_mode.into(),
        first_call: Some(AgentCallRequest {
            op: Some(Op::Touch(touch(seed, TouchMode::Write))),
            ..Default::default()
        }),
        ..Default::default()
    };
    let made = client.vms.clone_vm(request).await?.into_inner();
    match made.answer.and_then(|answer| answer.result) {
        Some(Answer::Touch(touch)) if touch.pages == PAGES => {}
        other => bail!("asked to write {PAGES} pages, the guest answered {other:?}"),
    }
    made.vms.into_iter().next().context("no clone")
}

/// What is known of it; how it is kept in the page cache is the host's affair.
async fn set(client: &mut Client) -> anyhow::Result<WorkingSet> {
    let request = GetSnapshotRequest { snapshot: "set".into() };
    let set = client.snapshots.get_snapshot(request).await?.into_inner().working_set;
    let set = set.context("no working set")?;
    ensure!(set.folded_bytes <= set.touched_bytes, "{set:?}");
    Ok(WorkingSet { folded_bytes: 0, read_again: 0, ..set })
}

/// Faults of the clone so far: of its process if it is mapped, else the pages that the pager gave.
async fn faults(client: &mut Client, vm: &Vm, memory_mode: MemoryMode) -> anyhow::Result<u64> {
    let stats = client.vms.get_vm_stats(GetVmStatsRequest { vm: vm.id.clone() }).await?.into_inner();
    Ok(match memory_mode {
        MemoryMode::Userfault => stats.userfault_pages,
        _ => stats.minor_faults + stats.major_faults,
    })
}

/// The first word of each page is the clone's, and the rest of the first page (all of it looked at by reading what was filled) the snapshot's.
async fn expect_memory(client: &mut Client, vm: &Vm, seed: u64) -> anyhow::Result<()> {
    let check = CheckOp { first_page: 0, pages: PAGES, stride: 1, seed, mode: TouchMode::Write.into() };
    let bad = ask!(client, &vm.id, Check(check)).bad_pages;
    ensure!(bad == 0, "{}: {bad} pages have lost what the clone wrote", vm.id);
    // With the snapshot's words written back, every page must be the snapshot's again.
    ask!(client, &vm.id, Touch(touch(SEED, TouchMode::Write)));
    let check = CheckOp { first_page: 0, pages: PAGES, stride: 1, seed: SEED, mode: TouchMode::Fill.into() };
    let bad = ask!(client, &vm.id, Check(check)).bad_pages;
    ensure!(bad == 0, "{}: {bad} pages are not those of the snapshot", vm.id);
    Ok(())
}

async fn working_set(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    ask!(&mut client, &vm.id, Touch(touch(SEED, TouchMode::Fill)));
    let snapshot = client.snapshot(&vm.id, "set").await?;
    client.delete_vm(&vm.id).await?;
    ensure!(set(&mut client).await? == WorkingSet::default(), "known before there was a clone");

    // It is learnt from the first clones, the last of which needs the pager.
    for n in 1..=RECORDINGS {
        let mode = if n < RECORDINGS { MemoryMode::Mapped } else { MemoryMode::Userfault };
        let clone = writing_clone(&mut client, mode, n.into()).await?;
        let unprepared = faults(&mut client, &clone, mode).await?;
        ensure!(
            unprepared >= PAGES,
            "{unprepared} faults for {PAGES} pages: what is saved could not be seen"
        );
        eventually("the clone is learnt from", 30, async || Ok(set(&mut client).await?.recordings == n))
            .await?;
        expect_memory(&mut client, &clone, n.into()).await?;
        client.delete_vm(&clone.id).await?;
    }
    let learnt = set(&mut client).await?;
    ensure!(learnt.learnt, "{learnt:?}");
    ensure!(learnt.written_bytes >= PAGES * PAGE_BYTES, "less than was written: {learnt:?}");
    ensure!(learnt.written_bytes < 2 * PAGES * PAGE_BYTES, "much more than was written: {learnt:?}");
    ensure!(learnt.touched_bytes >= PAGES * PAGE_BYTES && learnt.touched_bytes <= 64 << 20, "{learnt:?}");

    // With it, clones of both kinds have their memory at hand, and it is theirs.
    for (mode, seed) in [(MemoryMode::Mapped, 21), (MemoryMode::Userfault, 22), (MemoryMode::Mapped, 23)] {
        let mut clone = Vm::default();
        eventually("a clone has a quarter of the faults", 60, async || {
            // The first may come from a shell that knew nothing yet.
            clone = writing_clone(&mut client, mode, seed).await?;
            Ok(faults(&mut client, &clone, mode).await? < PAGES / 4)
        })
        .await?;
        expect_memory(&mut client, &clone, seed).await?;
    }
    ensure!(set(&mut client).await? == learnt, "learnt is learnt");

    // A snapshot of such a clone has the pages that were copied ahead, those that were written, and those that never were.
    let clone = writing_clone(&mut client, MemoryMode::Mapped, 31).await?;
    client.snapshot(&clone.id, "second").await?;
    let second = client.clone_vms("second", 1, MemoryMode::Userfault, Identity::Managed).await?.remove(0);
    expect_memory(&mut client, &second, 31).await?;

    // It outlives the daemon.
    drop(client);
    daemon.stop().await?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(set(&mut client).await? == learnt, "forgotten by the next daemon");
    let clone = writing_clone(&mut client, MemoryMode::Userfault, 41).await?;
    ensure!(
        faults(&mut client, &clone, MemoryMode::Userfault).await? < PAGES / 4,
        "not used by the next daemon"
    );
    expect_memory(&mut client, &clone, 41).await?;

    // Damaged, it is as if it had never been.
    drop(client);
    daemon.stop().await?;
    let file = daemon.data.join("snapshots").join(&snapshot.id).join("working-set.bin");
    let mut bytes = std::fs::read(&file)?;
    bytes[0] ^= 1;
    std::fs::write(&file, bytes)?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(set(&mut client).await? == WorkingSet::default(), "a damaged file was believed");
    ensure!(client.verify("set").await? > 0);
    let clone = writing_clone(&mut client, MemoryMode::Mapped, 51).await?;
    expect_memory(&mut client, &clone, 51).await?;
    eventually("it is learnt anew", 30, async || Ok(set(&mut client).await?.recordings == 1)).await?;
    Ok(())
}
