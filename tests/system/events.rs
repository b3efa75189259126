//! EventService.Watch: what is told, in which order, and to whom.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::happening::Change;
use coldspark::api::proto::watch_event::Event;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;
use tonic::Streaming;

use crate::client::Client;
use crate::daemon::{Daemon, program};
use crate::host::Need;
use crate::trial::{Stage, limit, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("events/told", &[Need::Kvm], 120, told),
        trial("events/pools", &[Need::Kvm], 120, pools),
        trial("events/command-line", &[Need::Kvm], 120, command_line),
        trial("events/limit", &[], 60, watches_have_a_limit),
    ]
}

/// A watch, told apart from a service that says nothing by a time limit.
struct Watch(Streaming<WatchEvent>);

impl Watch {
    async fn open(client: &Client, request: WatchRequest) -> anyhow::Result<Watch> {
        Ok(Watch(client.events.clone().watch(request).await?.into_inner()))
    }

    async fn next(&mut self) -> anyhow::Result<Event> {
        let next = timeout(limit(30), self.0.message()).await.context("nothing is told")??;
        next.and_then(|event| event.event).context("the watch has ended")
    }

    /// The next must be this.
    async fn expect(
        &mut self,
        kind: Kind,
        change: Change,
        id: &str,
        state: VmState,
    ) -> anyhow::Result<Happening> {
        match self.next().await? {
            Event::Happening(event)
                if (event.kind(), event.change(), event.id.as_str(), event.state())
                    == (kind, change, id, state) =>
            {
                Ok(event)
            }
            other => bail!("{other:?} instead of {kind:?} {change:?} {id} {state:?}"),
        }
    }
}

const NONE: VmState = VmState::Unspecified;

async fn told(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?.id;
    let kinds = vec![Kind::Vm.into(), Kind::Snapshot.into()];
    let mut watch =
        Watch::open(&client, WatchRequest { kinds, existing: true, ready_in_pools: false }).await?;
    watch.expect(Kind::Vm, Change::Exists, &vm, VmState::Ready).await?;
    ensure!(matches!(watch.next().await?, Event::Synced(true)));

    client.vms.pause_vm(PauseVmRequest { vm: vm.clone() }).await?;
    watch.expect(Kind::Vm, Change::Changed, &vm, VmState::Paused).await?;
    client.vms.resume_vm(ResumeVmRequest { vm: vm.clone() }).await?;
    watch.expect(Kind::Vm, Change::Changed, &vm, VmState::Ready).await?;
    // Of a kind that was not asked for.
    client.import_embedded("unheard", Vec::new()).await?;
    let snapshot = client.snapshot(&vm, "taken").await?.id;
    watch.expect(Kind::Vm, Change::Changed, &vm, VmState::Snapshotting).await?;
    watch.expect(Kind::Vm, Change::Changed, &vm, VmState::Ready).await?;
    let event = watch.expect(Kind::Snapshot, Change::Made, &snapshot, NONE).await?;
    ensure!(event.name == "taken", "{event:?}");

    let clones = client.clone_vms(&snapshot, 1, MemoryMode::Mapped, Identity::Managed).await?;
    let clone = &clones.first().context("no clone")?.id;
    watch.expect(Kind::Vm, Change::Made, clone, VmState::Running).await?;
    client.delete_vm(clone).await?;
    let event = watch.expect(Kind::Vm, Change::Changed, clone, VmState::Exited).await?;
    ensure!(event.exit_reason == "deleted", "{event:?}");
    watch.expect(Kind::Vm, Change::Gone, clone, VmState::Exited).await?;
    client.delete_vm(&vm).await?;
    watch.expect(Kind::Vm, Change::Changed, &vm, VmState::Exited).await?;
    watch.expect(Kind::Vm, Change::Gone, &vm, VmState::Exited).await?;
    client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: "taken".into() }).await?;
    watch.expect(Kind::Snapshot, Change::Gone, &snapshot, NONE).await?;
    Ok(())
}

/// What stands ready in a pool is told to those who ask for it; to others a VM is made when it is taken.
async fn pools(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded(64 << 20).await?.id;
    let snapshot = client.snapshot(&vm, "base").await?.id;
    client.delete_vm(&vm).await?;
    let mut outside = Watch::open(&client, WatchRequest::default()).await?;
    let mut inside = Watch::open(
        &client,
        WatchRequest { kinds: vec![Kind::Vm.into()], ready_in_pools: true, ..Default::default() },
    )
    .await?;
    let pool = CreatePoolRequest {
        name: "web".into(),
        snapshot,
        mode: PoolMode::Paused.into(),
        min_ready: Some(1),
        max: 1,
        ..Default::default()
    };
    client.pools.create_pool(pool).await?;
    let Event::Happening(made) = inside.next().await? else { bail!("no VM is made") };
    ensure!(made.change() == Change::Made && made.ready_in_pool, "{made:?}");
    // It may be asked for before it stands.
    let taken = client.pools.take_vm(TakeVmRequest { pool: "web".into(), ..Default::default() }).await?;
    let taken = taken.into_inner().vm.context("no VM")?.id;
    outside.expect(Kind::Pool, Change::Made, "web", NONE).await?;
    let Event::Happening(first) = outside.next().await? else { bail!("no VM was told") };
    ensure!(
        first.change() == Change::Made && first.id == taken && !first.ready_in_pool,
        "{first:?} is not the VM {taken} that was taken"
    );
    Ok(())
}

/// `coldspark watch` tells the same, a line each, and ends with the service.
async fn command_line(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    client.import_embedded("there", Vec::new()).await?;
    let mut watch = tokio::process::Command::new(program());
    watch.args(["watch", "--json", "--existing", "image", "vm", "--socket"]).arg(daemon.socket());
    let mut watch = watch.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("no stdout")?).lines();
    let mut next = async || -> anyhow::Result<serde_json::Value> {
        let line = timeout(limit(30), lines.next_line()).await.context("nothing is told")??;
        Ok(serde_json::from_str(&line.context("it has ended")?)?)
    };
    let image = next().await?;
    ensure!(image["kind"] == "image" && image["change"] == "exists" && image["id"] == "there", "{image}");
    ensure!(next().await?["synced"] == true);
    let vm = client.boot_embedded(64 << 20).await?;
    let made = next().await?;
    ensure!(made["change"] == "made" && made["id"] == vm.id && made["state"] == "booting", "{made}");
    let ready = next().await?;
    ensure!(ready["change"] == "changed" && ready["state"] == "ready", "{ready}");
    daemon.stop().await?;
    let status =
        timeout(limit(Duration::from_secs(30).as_secs()), watch.wait()).await.context("it goes on")??;
    ensure!(!status.success(), "the service is gone, and that is no success");
    Ok(())
}

async fn watches_have_a_limit(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let client = daemon.client().await?;
    let request = || WatchRequest { existing: true, ..Default::default() };
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(Watch::open(&client, request()).await?);
    }
    let refused = client.events.clone().watch(request()).await;
    ensure!(refused.err().map(|status| status.code()) == Some(tonic::Code::ResourceExhausted));
    open.clear();
    // The service hears of it when it next looks.
    crate::daemon::eventually("a watch can be opened again", 30, async || {
        Ok(client.events.clone().watch(request()).await.is_ok())
    })
    .await?;
    let unknown = client.events.clone().watch(WatchRequest { kinds: vec![77], ..Default::default() }).await;
    ensure!(unknown.err().map(|status| status.code()) == Some(tonic::Code::InvalidArgument));
    Ok(())
}
