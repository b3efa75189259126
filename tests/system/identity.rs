//! Clones are made somebody of their own before they are handed over, however they are come by.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::{Client, ask};
use crate::daemon::Daemon;
use crate::host::Need;
use crate::trial::{Stage, trial};

const CLONES: usize = 200;
/// How far a clone's clock may be from the host's: by as much as a host with 20 clones starting at once, and others at work, may keep a
/// guest waiting (the figures are in the trial's `clocks.txt`; one that was not set would be off by the age of the snapshot).
const CLOCK_OFF_MAX: Duration = Duration::from_millis(250);

pub fn trials() -> Vec<Trial> {
    vec![trial("identity/200-clones", &[Need::Kvm, Need::Userfault], 240, of_200_clones)]
}

/// What no two clones may share.
#[derive(Default)]
struct Seen {
    generations: HashSet<Vec<u8>>,
    randoms: HashSet<Vec<u8>>,
    host_names: HashSet<String>,
    /// By how much each clone's clock was behind.
    behind: Vec<Duration>,
}

impl Seen {
    /// Looks at a clone that was just handed over.
    async fn look(&mut self, client: &mut Client, vm: &Vm, host_name: &str) -> anyhow::Result<()> {
        ensure!(vm.host_name == host_name, "{} is called {:?}, not {host_name:?}", vm.id, vm.host_name);
        ensure!(self.host_names.insert(vm.host_name.clone()), "two clones are called {host_name}");
        let told = ask!(client, &vm.id, Generation(GenerationOp {}));
        ensure!(
            told.generation == vm.generation,
            "the guest of {} has another generation than its VM",
            vm.id
        );
        ensure!(self.generations.insert(told.generation.to_vec()), "two clones have one generation");
        let random = ask!(client, &vm.id, Random(RandomOp { bytes: 32 })).data;
        ensure!(self.randoms.insert(random.to_vec()), "two clones have the same random bytes");
        let before = wall()?;
        let time = ask!(client, &vm.id, Time(TimeOp {}));
        let after = wall()?;
        let (clock, off) = (Duration::from_nanos(time.wall_unix_ns), CLOCK_OFF_MAX);
        ensure!(
            clock + off >= before && clock <= after + off,
            "the clock of {} says {clock:?} between {before:?} and {after:?}",
            vm.id
        );
        // At most: the guest looked at its clock before `after`.
        self.behind.push(after.saturating_sub(clock));
        Ok(())
    }
}

fn wall() -> anyhow::Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

async fn of_200_clones(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    // What all clones would say if they were told nothing.
    let mut seen = Seen::default();
    seen.randoms.insert(ask!(&mut client, &source.id, Random(RandomOp { bytes: 32 })).data.to_vec());
    ensure!(source.host_name.is_empty(), "a VM that is no clone was told a name: {}", source.host_name);
    let snapshot = client.snapshot(&source.id, "base").await?.id;
    client.delete_vm(&source.id).await?;

    // Twenty at a time, mapped and by userfault, half of them with a name.
    let per_request = 20_u32;
    while seen.generations.len() + 20 < CLONES {
        let round = seen.generations.len();
        let name = if round.is_multiple_of(40) { format!("round-{round}") } else { String::new() };
        let mode = if round.is_multiple_of(3) { MemoryMode::Userfault } else { MemoryMode::Mapped };
        let request = CloneVmRequest {
            snapshot: snapshot.clone(),
            count: per_request,
            name: name.clone(),
            memory_mode: mode.into(),
            ..Default::default()
        };
        let vms = client.vms.clone_vm(request).await?.into_inner().vms;
        ensure!(vms.len() == per_request as usize, "{} clones", vms.len());
        for (index, vm) in vms.iter().enumerate() {
            let host_name = if name.is_empty() { vm.id.clone() } else { format!("{name}-{index}") };
            seen.look(&mut client, vm, &host_name).await?;
        }
        for vm in vms {
            client.delete_vm(&vm.id).await?;
        }
    }
    // The rest out of pools, with the clock standing still and running meanwhile.
    for (pool, mode) in [("still", PoolMode::Paused), ("going", PoolMode::Running)] {
        let request = CreatePoolRequest {
            name: pool.into(),
            snapshot: snapshot.clone(),
            mode: mode.into(),
            min_ready: Some(2),
            max: 10,
            ..Default::default()
        };
        client.pools.create_pool(request).await?;
        for taken in 0..10 {
            let name = if taken == 0 { format!("first-{pool}") } else { String::new() };
            let request = TakeVmRequest { pool: pool.into(), name: name.clone(), ..Default::default() };
            let vm = client.pools.take_vm(request).await?.into_inner().vm.context("no VM")?;
            // One that ran before it had an owner was called by its id then.
            let named = mode == PoolMode::Paused && !name.is_empty();
            let host_name = if named || vm.host_name == name { name } else { vm.id.clone() };
            seen.look(&mut client, &vm, &host_name).await?;
        }
    }
    ensure!(seen.generations.len() >= CLONES, "{} clones were looked at", seen.generations.len());
    seen.behind.sort();
    let at = |share: usize| seen.behind.get(seen.behind.len() * share / 100).copied().unwrap_or_default();
    let figures = format!("clocks behind by at most: p50 {:?}, p90 {:?}, p99 {:?}\n", at(50), at(90), at(99));
    std::fs::write(stage.logs.join("clocks.txt"), figures)?;
    Ok(())
}
