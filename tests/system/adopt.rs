//! Life after a crash: VMs outlive a daemon that is killed, or that is replaced, and the next one goes on with them; what was half made is
//! gone, what was published is there, pools are full again.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::sync::Notify;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::commands::{Command, run, start};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::tap::Tap;
use crate::trial::{Stage, trial};

const CLONES: u32 = 5;
/// Shells that the daemon keeps.
const SHELLS: usize = 4;
/// Ready ones in the pool.
const READY: u32 = 2;
/// More than all windows between a command and its caller hold.
const FLOOD: &str = "100000000";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("adopt/killed", &[Need::Kvm], 180, async |stage| killed(stage, MemoryMode::Mapped).await),
        trial("adopt/killed-userfault", &[Need::Kvm, Need::Userfault], 180, async |stage| {
            killed(stage, MemoryMode::Userfault).await
        }),
        trial("adopt/reboots", &[Need::Kvm], 120, reboots),
        trial("adopt/disk-and-link", &[Need::Kvm, Need::Tap], 120, disk_and_link),
        trial("adopt/orphans-end", &[Need::Kvm], 120, orphans_end),
        trial("adopt/replaced", &[Need::Kvm], 120, replaced),
        trial("adopt/twenty-kills", &[Need::Kvm], 900, twenty_kills),
    ]
}

async fn pool(client: &mut Client, snapshot: &str) -> anyhow::Result<()> {
    let request = CreatePoolRequest {
        name: "web".into(),
        snapshot: snapshot.into(),
        mode: PoolMode::Running.into(),
        min_ready: Some(READY),
        max: 64,
        ..Default::default()
    };
    client.pools.create_pool(request).await?;
    pool_full(client).await.map(drop)
}

async fn pool_full(client: &mut Client) -> anyhow::Result<Pool> {
    let mut seen = Pool::default();
    eventually("the pool is full", 60, async || {
        seen = client.pools.get_pool(GetPoolRequest { pool: "web".into() }).await?.into_inner();
        Ok(seen.ready >= seen.target && seen.ready >= READY && seen.making == 0 && seen.stale == 0)
    })
    .await?;
    Ok(seen)
}

async fn take(client: &mut Client) -> Result<Vm, tonic::Status> {
    let request = TakeVmRequest { pool: "web".into(), ..Default::default() };
    let taken = client.pools.take_vm(request).await?.into_inner();
    taken.vm.ok_or_else(|| tonic::Status::internal("trial: no VM"))
}

/// What makes a VM one's own: a part of its memory, full of a pattern.
fn fill(seed: u64) -> TouchOp {
    TouchOp { first_page: 100, pages: 500, stride: 3, seed, mode: TouchMode::Fill.into() }
}

async fn expect_filled(client: &mut Client, vm: &str, seed: u64) -> anyhow::Result<()> {
    let TouchOp { first_page, pages, stride, mode, .. } = fill(seed);
    let check = ask!(client, vm, Check(CheckOp { first_page, pages, stride, seed, mode }));
    ensure!(check.bad_pages == 0, "{vm}: {} pages are not as they were", check.bad_pages);
    Ok(())
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Names in `vms/`.
fn folders(daemon: &Daemon) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(daemon.data.join("vms"))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<anyhow::Result<_>>()?;
    Ok(names.into_iter().filter(|name| name.starts_with("vm-")).collect())
}

/// As [`Vm`] tells it, without what a moment changes.
fn lasting(vm: &Vm) -> Vm {
    Vm { steps: Vec::new(), ..vm.clone() }
}

async fn killed(stage: Stage, mode: MemoryMode) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("disky", vec![vec![0; 4 << 20]]).await?;
    let source = client.boot_image("disky", 2, BootProtocol::Unspecified).await?;
    let base = client.snapshot(&source.id, "base").await?;
    pool(&mut client, "base").await?;
    let mut vms = client.clone_vms("base", CLONES, mode, Identity::Managed).await?;
    let named = CloneVmRequest {
        snapshot: "base".into(),
        count: 1,
        name: "dora".into(),
        memory_mode: mode.into(),
        identity: Identity::Managed.into(),
        ..Default::default()
    };
    vms.extend(client.vms.clone_vm(named).await?.into_inner().vms);
    vms.push(take(&mut client).await?);
    vms.push(source);
    let write = |seed: u64| DiskWriteOp {
        disk: 0,
        first_sector: 7,
        data: vec![seed as u8; 1024].into(),
        flush: false,
    };
    for (seed, vm) in (1..).zip(&vms) {
        ask!(&mut client, &vm.id, Touch(fill(seed)));
        ask!(&mut client, &vm.id, DiskWrite(write(seed)));
    }
    // Frozen before, so that its disk has a layer of its own; its snapshot stays.
    client.snapshot(&vms[1].id, "before").await?;
    let pause = PauseVmRequest { vm: vms[0].id.clone() };
    client.vms.pause_vm(pause).await?;
    // In the middle of a flood from the guest: the daemon has read a part of a frame, in all likelihood.
    let mut flood = Command::open(&client, start(&vms[2].id, &["yes", FLOOD])).await?;
    flood.stdout().await.context("the flood begins")?;
    for vm in &mut vms {
        *vm = client.vm(&vm.id).await?;
    }
    // What its clones have is not lost with it.
    if mode == MemoryMode::Userfault {
        client.pools.delete_pool(DeletePoolRequest { pool: "web".into() }).await?;
        client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: base.id.clone() }).await?;
    }
    drop((flood, client));
    daemon.kill_hard()?;
    ensure!(vms.iter().all(|vm| is_alive(vm.worker_pid)), "a worker has ended with its daemon");
    daemon.start_again().await?;
    let mut client = daemon.client().await?;

    let listed: Vec<Vm> = client.list_vms().await?.iter().map(lasting).collect();
    let order = |vms: &[Vm]| vms.iter().map(|vm| vm.id.clone()).collect::<BTreeSet<String>>();
    ensure!(order(&listed) == order(&vms), "before {:?}\nafter {:?}", order(&vms), order(&listed));
    for vm in &vms {
        let now = client.vm(&vm.id).await?;
        ensure!(lasting(&now) == lasting(vm), "before {vm:?}\nafter {now:?}");
    }
    ensure!(client.vm("dora").await?.id == vms[CLONES as usize].id);
    client.vms.resume_vm(ResumeVmRequest { vm: vms[0].id.clone() }).await?;
    for (seed, vm) in (1..).zip(&vms) {
        expect_filled(&mut client, &vm.id, seed).await?;
        if !vm.generation.is_empty() {
            let generation = ask!(&mut client, &vm.id, Generation(GenerationOp {}));
            ensure!(generation.generation == vm.generation, "{}: another generation", vm.id);
        }
        let read = ask!(&mut client, &vm.id, DiskRead(DiskReadOp { disk: 0, first_sector: 7, sectors: 2 }));
        ensure!(read.data.iter().all(|byte| u64::from(*byte) == seed), "{}: another disk", vm.id);
        run(&client, &vm.id, &["echo", "hello"]).await?.expect(0, "hello\n")?;
        let mut console = client.console(&vm.id).await?;
        let words = format!("words for {seed}\n");
        ask!(&mut client, &vm.id, Serial(SerialOp { data: words.clone().into_bytes().into() }));
        console.expect(words.trim()).await?;
    }
    // As good as any: frozen, cloned, with the memory and the disks that they had.
    for (seed, vm) in (1..).zip(&vms).take(2) {
        let snapshot = client.snapshot(&vm.id, "").await?.id;
        client.verify(&snapshot).await?;
        for vm in client.clone_vms(&snapshot, 2, mode, Identity::Managed).await? {
            expect_filled(&mut client, &vm.id, seed).await?;
            let read =
                ask!(&mut client, &vm.id, DiskRead(DiskReadOp { disk: 0, first_sector: 7, sectors: 2 }));
            ensure!(read.data.iter().all(|byte| u64::from(*byte) == seed), "{}: another disk", vm.id);
            client.delete_vm(&vm.id).await?;
        }
    }
    if mode == MemoryMode::Mapped {
        let pool = pool_full(&mut client).await?;
        ensure!(pool.in_use == 1, "one was taken before: {pool:?}");
        ensure!(client.list_snapshots().await?.snapshots.iter().any(|found| found.id == base.id));
    }
    for vm in &vms {
        client.delete_vm(&vm.id).await?;
        ensure!(!is_alive(vm.worker_pid), "{}: its worker lives on", vm.id);
        let folder = daemon.data.join("vms").join(&vm.id);
        eventually("its folder goes", 10, async || Ok(!folder.exists())).await?;
    }
    eventually("nothing is left of the daemon before", 20, async || Ok(daemon.orphans().is_empty())).await
}

/// A VM that was booted is booted again when its guest resets itself, as ever; and the next daemon knows that again.
async fn reboots(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("resets", vec![vec![0; 4 << 20]]).await?;
    let vm = client.boot_image("resets", 1, BootProtocol::Unspecified).await?;
    for restarts in 1..=2 {
        drop(client);
        daemon.kill_hard()?;
        daemon.start_again().await?;
        client = daemon.client().await?;
        ask!(&mut client, &vm.id, Reset(ResetOp {}));
        eventually("the VM is booted again", 30, async || {
            let now = client.vm(&vm.id).await?;
            ensure!(now.state() != VmState::Exited, "it ended: {}", now.exit_reason);
            Ok(now.restarts == restarts && now.agent)
        })
        .await?;
        run(&client, &vm.id, &["echo", "again"]).await?.expect(0, "again\n")?;
    }
    // Also one that does so when there is no daemon.
    drop(client);
    daemon.kill_hard()?;
    daemon.start_again().await?;
    client = daemon.client().await?;
    run(&client, &vm.id, &["echo", "again"]).await?.expect(0, "again\n")
}

/// What belongs to the host: a disk whose writes stay, and a TAP.
async fn disk_and_link(stage: Stage) -> anyhow::Result<()> {
    const SECTOR: usize = 512;
    let tap = Tap::new([10, 82, 0, 1])?;
    let path = stage.logs.join("persist.raw");
    fs::write(&path, vec![0; 1 << 20])?;
    let request = || CreateVmRequest {
        source: Some(Source::Embedded(true)),
        memory_bytes: 64 << 20,
        disks: vec![DiskFile { path: path.display().to_string(), mode: DiskMode::Persist.into() }],
        networks: vec![NetworkInterface { link: Some(Link::Tap(tap.name.clone())), ..Default::default() }],
        ..Default::default()
    };
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot(request()).await?.vm;
    let write = |mark: u8| DiskWriteOp {
        disk: 0,
        first_sector: mark.into(),
        data: vec![mark; SECTOR].into(),
        flush: true,
    };
    ask!(&mut client, &vm.id, DiskWrite(write(1)));
    drop(client);
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    let now = client.vm(&vm.id).await?;
    ensure!(now.networks == vm.networks && now.networks[0].link.contains(&tap.name), "{now:?}");
    ask!(&mut client, &vm.id, DiskWrite(write(2)));
    // They are its own still.
    ensure!(tap.take().is_err(), "another can have its TAP");
    let other = CreateVmRequest { networks: Vec::new(), ..request() };
    let said = expect_status("its disk", client.boot(other.clone()).await, &[Code::FailedPrecondition])?;
    ensure!(said.contains("persist.raw"), "{said}");
    client.delete_vm(&vm.id).await?;
    drop(tap.take().context("its TAP is not free after its end")?);
    let heir = client.boot(other).await?.vm;
    let read = ask!(&mut client, &heir.id, DiskRead(DiskReadOp { disk: 0, first_sector: 1, sectors: 2 }));
    ensure!(read.data[..] == [vec![1; SECTOR], vec![2; SECTOR]].concat(), "what was written is not there");
    Ok(())
}

async fn orphans_end(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start_with(&stage, &["--orphan-time".into(), "1".into()]).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?;
    let snapshot = client.snapshot(&vm.id, "base").await?;
    let clones = client.clone_vms("base", 3, MemoryMode::Mapped, Identity::Managed).await?;
    drop(client);
    daemon.kill_hard()?;
    eventually("nobody came, and they end", 30, async || Ok(daemon.orphans().is_empty())).await?;
    ensure!(folders(&daemon)?.len() >= clones.len() + 1);
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(client.list_vms().await?.is_empty());
    for vm in clones.iter().chain([&vm]) {
        ensure!(!daemon.data.join("vms").join(&vm.id).exists(), "{}: its folder is left", vm.id);
        ensure!(daemon.log()?.contains(&vm.id), "{}: not a word about its end", vm.id);
    }
    ensure!(client.list_snapshots().await?.snapshots.iter().any(|found| found.id == snapshot.id));
    client.clone_vms("base", 1, MemoryMode::Mapped, Identity::Managed).await?;
    Ok(())
}

/// The program is replaced: stopped with `--keep-vms`, and started again.
async fn replaced(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start_with(&stage, &["--keep-vms".into()]).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "base").await?;
    pool(&mut client, "base").await?;
    let mut vms = client.clone_vms("base", CLONES, MemoryMode::Mapped, Identity::Managed).await?;
    for (seed, vm) in (1..).zip(&vms) {
        ask!(&mut client, &vm.id, Touch(fill(seed)));
    }
    for round in 0..3 {
        drop(client);
        let status = daemon.stop().await?;
        ensure!(status.success(), "round {round}: the daemon ended with {status}");
        // Shells, the zygote, and what stood ready for nobody have ended; the VMs have not.
        let kept: BTreeSet<u32> = vms.iter().chain([&source]).map(|vm| vm.worker_pid).collect();
        eventually("all end that are nobody's", 10, async || Ok(daemon.orphans().len() == kept.len()))
            .await?;
        ensure!(kept.iter().all(|pid| is_alive(*pid)), "round {round}: a VM has ended");
        daemon.start_again().await?;
        client = daemon.client().await?;
        for (seed, vm) in (1..).zip(&vms) {
            expect_filled(&mut client, &vm.id, seed).await.with_context(|| format!("round {round}"))?;
        }
        pool_full(&mut client).await?;
        if let Some(vm) = vms.pop() {
            client.delete_vm(&vm.id).await?;
        }
    }
    Ok(())
}

/// What the callers of a storm know.
#[derive(Default)]
struct Storm {
    /// Calls that were answered.
    answers: AtomicU64,
    answered: Notify,
    /// VMs that were handed over, and that nobody has asked to delete.
    alive: std::sync::Mutex<BTreeSet<String>>,
}

impl Storm {
    fn answer(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
        self.answered.notify_one();
    }

    fn alive(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.alive.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes VMs in each way there is and deletes some, until the daemon is gone.
    async fn rage(self: Arc<Self>, mut client: Client, mut turn: u64) -> Result<(), tonic::Status> {
        loop {
            let made = match turn % 5 {
                0 => vec![client.boot_embedded(64 << 20).await?],
                1 => vec![take(&mut client).await?],
                2 => client.clone_vms("base", 3, MemoryMode::Mapped, Identity::Managed).await?,
                _ => client.clone_vms("base", 1, MemoryMode::Mapped, Identity::Managed).await?,
            };
            self.alive().extend(made.iter().map(|vm| vm.id.clone()));
            self.answer();
            for vm in made.iter().skip((turn % 2) as usize) {
                // Whether it is there when the daemon dies meanwhile nobody knows.
                self.alive().remove(&vm.id);
                client.delete_vm(&vm.id).await?;
                self.answer();
            }
            turn += 1;
        }
    }
}

async fn twenty_kills(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    let base = client.snapshot(&source.id, "base").await?.id;
    client.delete_vm(&source.id).await?;
    pool(&mut client, "base").await?;
    let mut published = vec![base];
    let mut chance: u64 = 0x2545_f491_4f6c_dd1d;
    let mut quiet: Option<usize> = None;
    for round in 0..20 {
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        let storm = Arc::new(Storm::default());
        let mut raging = Vec::new();
        for turn in 0..4 {
            raging.push(tokio::spawn(Arc::clone(&storm).rage(daemon.client().await?, turn)));
        }
        let until = 3 + chance % 40;
        while storm.answers.load(Ordering::Relaxed) < until {
            storm.answered.notified().await;
        }
        daemon.kill_hard()?;
        for one in raging {
            ensure!(one.await?.is_err(), "round {round}: a storm has ended by itself");
        }
        if round % 4 == 3 {
            // Killed again as soon as it has taken over the first, or found nothing to.
            daemon.start_unready()?;
            eventually("the next one takes over", 30, async || {
                let log = daemon.log()?;
                Ok(log.contains("taken over from") || log.contains("VMs of an earlier service"))
            })
            .await?;
            daemon.kill_hard()?;
        }
        daemon.start_again().await.with_context(|| format!("round {round}"))?;
        let mut client = daemon.client().await?;

        let alive = storm.alive().clone();
        let listed: BTreeSet<String> = client.list_vms().await?.into_iter().map(|vm| vm.id).collect();
        ensure!(alive.is_subset(&listed), "round {round}: of {alive:?} are left {listed:?}");
        let half = listed.len() - alive.len();
        ensure!(half <= 4 * 3, "round {round}: {half} VMs of which nobody was told");
        let list = client.list_snapshots().await?;
        let ids: BTreeSet<String> = list.snapshots.into_iter().map(|snapshot| snapshot.id).collect();
        ensure!(
            list.damaged.is_empty() && ids.iter().eq(published.iter().collect::<BTreeSet<_>>()),
            "round {round}: {ids:?}, not {published:?}"
        );
        for vm in &listed {
            run(&client, vm, &["echo", "here"])
                .await
                .with_context(|| format!("round {round}"))?
                .expect(0, "here\n")?;
        }
        if let Some(vm) = listed.first() {
            published.push(client.snapshot(vm, "").await?.id);
        }
        for vm in &listed {
            client.delete_vm(vm).await?;
        }
        pool_full(&mut client).await?;
        eventually("nothing is left but what a service keeps", 60, async || {
            // The zygote, shells, and what the pool keeps.
            Ok(daemon.orphans().is_empty()
                && daemon.processes().len() == 1 + SHELLS + READY as usize
                && folders(&daemon)?.len() == SHELLS + READY as usize)
        })
        .await
        .with_context(|| {
            format!("round {round}: {:?} {:?} {:?}", daemon.orphans(), daemon.processes(), folders(&daemon))
        })?;
        // Of the service itself: as many descriptors as after the first round, and those of snapshots that were opened since.
        let open = daemon.descriptors()?;
        let least = *quiet.get_or_insert(open);
        ensure!(open <= least + 40, "round {round}: {open} descriptors, {least} in the first");
    }
    Ok(())
}
