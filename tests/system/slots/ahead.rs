//! Slots of what is made ahead of requests: pools and functions.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::deploy_event::Event as Deployed;
use coldspark::api::proto::deploy_request::From;
use coldspark::api::proto::happening::Change;
use coldspark::api::proto::watch_event::Event as Told;
use coldspark::api::proto::*;
use tonic::{Code, Status, Streaming};

use super::world::{BEYOND, BEYOND_PRIVATE, ECHO, HOST, World, call, slots_of};
use super::{addresses, allowed, base, clone, guest_asks, port, slot, who, words};
use crate::access::new_token;
use crate::client::{Client, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::trial::Stage;

const EXHAUSTED: &str = "NETWORK_SLOTS_EXHAUSTED";
const MODES: [(&str, PoolMode); 3] =
    [("shell", PoolMode::Shell), ("paused", PoolMode::Paused), ("running", PoolMode::Running)];

fn pool(name: &str, snapshot: &str, mode: PoolMode, min_ready: u32, link: SlotLink) -> CreatePoolRequest {
    CreatePoolRequest {
        name: name.into(),
        snapshot: snapshot.into(),
        mode: mode.into(),
        min_ready: Some(min_ready),
        max: 8,
        networks: vec![slot(link)],
        ..Default::default()
    }
}

async fn look(client: &mut Client, pool: &str) -> anyhow::Result<Pool> {
    Ok(client.pools.get_pool(GetPoolRequest { pool: pool.into() }).await?.into_inner())
}

async fn ready(client: &mut Client, pool: &str, count: u32) -> anyhow::Result<()> {
    eventually("the pool has what it is to have", 60, async || {
        let seen = look(client, pool).await?;
        Ok(seen.ready == count && seen.making == 0 && seen.stale == 0)
    })
    .await
}

async fn take(
    client: &mut Client,
    pool: &str,
    name: &str,
    publish: &[PublishedPort],
) -> Result<TakeVmResponse, Status> {
    let request = TakeVmRequest {
        pool: pool.into(),
        name: name.into(),
        publish: publish.to_vec(),
        ..Default::default()
    };
    Ok(client.pools.take_vm(request).await?.into_inner())
}

/// Takes one that stood ready.
async fn take_ready(
    client: &mut Client,
    pool: &str,
    name: &str,
    publish: &[PublishedPort],
) -> anyhow::Result<Vm> {
    let taken = take(client, pool, name, publish).await?;
    ensure!(taken.was_ready, "it was started for the request");
    taken.vm.context("no VM")
}

/// What its guest says that it is called: one that runs ahead was told before it had its name.
fn called(vm: &Vm, mode: PoolMode) -> &str {
    if mode == PoolMode::Running { &vm.id } else { &vm.name }
}

async fn delete_pool(client: &mut Client, pool: &str) -> anyhow::Result<()> {
    client.pools.delete_pool(DeletePoolRequest { pool: pool.into() }).await?;
    Ok(())
}

/// Ready ones, and those that VMs have.
async fn counted(client: &mut Client) -> anyhow::Result<(u64, u64)> {
    let metrics = client.metrics().await?;
    let number = |name: &str| -> anyhow::Result<u64> {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no {name}"))?.trim().parse()?)
    };
    Ok((number("coldspark_network_slots")?, number("coldspark_network_slots_in_use")?))
}

async fn count(client: &mut Client, ready: u64, used: u64) -> anyhow::Result<()> {
    let mut seen = (0, 0);
    let waited = eventually("the slots are as many as they are to be", 30, async || {
        seen = counted(client).await?;
        Ok(seen == (ready, used))
    });
    waited.await.with_context(|| format!("{seen:?}, not {:?}", (ready, used)))
}

/// In each mode what stands ready has its slot already: it can be taken when there is none left to be had, and works.
pub async fn pools(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    // Four are all that there can be.
    let four = words(&["--networks", "1", "--slot-network", "10.77.5.0/28"]);
    let mut daemon = Daemon::start_inside(&stage, &world.host, &four).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    for (name, mode) in MODES {
        let link = SlotLink { allow: vec![allowed(BEYOND_PRIVATE, ECHO)], ..SlotLink::default() };
        let made = client.pools.create_pool(pool(name, &snapshot, mode, 2, link.clone())).await?.into_inner();
        let Some(network_interface::Link::Slot(told)) =
            made.networks.first().and_then(|net| net.link.clone())
        else {
            bail!("the pool does not say what its VMs have: {made:?}");
        };
        ensure!(told.allow.len() == 1 && told.outbound() == Outbound::None, "{told:?}");
        ready(&mut client, name, 2).await?;
        count(&mut client, 1, 2).await?;
        // A caller finds the one that is kept for callers.
        let caller = clone(&mut client, &snapshot, "caller", SlotLink::default()).await?;
        count(&mut client, 1, 3).await?;
        let last = clone(&mut client, &snapshot, "last", SlotLink::default()).await?;
        count(&mut client, 0, 4).await?;

        let mut seen = BTreeSet::new();
        for vm_name in ["one", "two"] {
            let vm = take_ready(&mut client, name, vm_name, &[]).await.context(name)?;
            let vm_name = called(&vm, mode);
            for address in addresses(&vm)? {
                ensure!(seen.insert(address.clone()), "{address} is two VMs'");
                let said = who(&world.host, &address)?;
                ensure!(said.as_deref() == Some(vm_name), "{name}: {address} is {said:?}, not {vm_name}");
            }
            ensure!(
                guest_asks(&client, &vm, BEYOND_PRIVATE).await?.is_some(),
                "{name}: what was allowed is not"
            );
            ensure!(guest_asks(&client, &vm, BEYOND).await?.is_none(), "{name}: what was not allowed is");
        }
        // There is none for a third.
        let third = take(&mut client, name, "three", &[]).await;
        let message = expect_status("a third", third, &[Code::ResourceExhausted])?;
        ensure!(message.contains("slot"), "{message}");
        // The slots end with their VMs.
        delete_pool(&mut client, name).await?;
        for vm in ["one", "two", &caller.id, &last.id] {
            client.delete_vm(vm).await?;
        }
        count(&mut client, 1, 0).await?;
        eventually("no network is left", 20, async || Ok(world.slots()?.len() == 1)).await?;
    }

    for (what, request, code, words) in [
        (
            "a port for many",
            pool(
                "x",
                &snapshot,
                PoolMode::Shell,
                1,
                SlotLink { publish: vec![port(8080, 80, Transport::Tcp)], ..SlotLink::default() },
            ),
            Code::InvalidArgument,
            "--publish",
        ),
        (
            "a TAP for many",
            CreatePoolRequest {
                networks: vec![NetworkInterface {
                    link: Some(network_interface::Link::Tap("tap0".into())),
                    ..Default::default()
                }],
                ..pool("x", &snapshot, PoolMode::Shell, 1, SlotLink::default())
            },
            Code::InvalidArgument,
            "TAP tap0",
        ),
        (
            "more interfaces than the guest has",
            CreatePoolRequest {
                networks: vec![NetworkInterface::default(), slot(SlotLink::default())],
                ..pool("x", &snapshot, PoolMode::Shell, 1, SlotLink::default())
            },
            Code::InvalidArgument,
            "network interfaces",
        ),
    ] {
        let message = expect_status(what, client.pools.create_pool(request).await, &[code])?;
        ensure!(message.contains(words), "{what}: {message}");
    }

    // One that is there when the service makes none any more says so; none is made there.
    client.pools.create_pool(pool("later", &snapshot, PoolMode::Shell, 1, SlotLink::default())).await?;
    daemon.set_arguments(Vec::new());
    ensure!(daemon.stop().await?.success());
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    eventually("the pool says why", 20, async || {
        Ok(look(&mut client, "later").await?.problem_reason == "NO_NETWORK_SLOTS")
    })
    .await?;
    let request = pool("x", &snapshot, PoolMode::Shell, 1, SlotLink::default());
    let refused = client.pools.create_pool(request).await;
    expect_status("a service without", refused, &[Code::FailedPrecondition])?;
    Ok(())
}

/// The next that is told of this pool.
async fn told(events: &mut Streaming<WatchEvent>, pool: &str) -> anyhow::Result<Happening> {
    loop {
        let event = tokio::time::timeout(crate::trial::limit(30), events.message()).await;
        match event.context("nothing is told")??.context("the watch has ended")?.event {
            Some(Told::Happening(happening)) if happening.id == pool => return Ok(happening),
            Some(_) => {}
            None => bail!("an empty event"),
        }
    }
}

/// A pool that wants more slots than there are leaves callers theirs, and says what it lacks: to those who look, who watch, and who count.
pub async fn starved(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let four = words(&["--networks", "1", "--slot-network", "10.77.5.0/28"]);
    let daemon = Daemon::start_inside(&stage, &world.host, &four).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let request = WatchRequest { kinds: vec![Kind::Pool.into()], ..Default::default() };
    let mut events = client.events.watch(request).await?.into_inner();
    client.pools.create_pool(pool("greedy", &snapshot, PoolMode::Paused, 6, SlotLink::default())).await?;
    ensure!(told(&mut events, "greedy").await?.change() == Change::Made);
    let problem = told(&mut events, "greedy").await?;
    ensure!(problem.change() == Change::Changed && problem.problem_reason == EXHAUSTED, "{problem:?}");
    ensure!(problem.problem.contains("--networks"), "{problem:?}");
    eventually("it has all but one, and says what it lacks", 30, async || {
        let seen = look(&mut client, "greedy").await?;
        let counts = seen.counts.unwrap_or_default();
        Ok(seen.problem_reason == EXHAUSTED && seen.ready == 3 && counts.without_slot > 0)
    })
    .await?;
    let metrics = client.metrics().await?;
    let starving = metrics.lines().any(|line| {
        line.starts_with("coldspark_pool_without_slot_total{pool=\"greedy\"}") && !line.ends_with(" 0")
    });
    ensure!(starving, "{metrics}");
    // Three are the pool's, however long it asks; the fourth is whoever's comes.
    count(&mut client, 1, 3).await?;
    let caller = clone(&mut client, &snapshot, "caller", SlotLink::default()).await?;
    ensure!(who(&world.host, &addresses(&caller)?[0])?.as_deref() == Some("caller"));
    client.delete_vm(&caller.id).await?;
    count(&mut client, 1, 3).await?;

    // When it wants no more than there are, it is well again.
    let fewer = UpdatePoolRequest { pool: "greedy".into(), min_ready: Some(2), ..Default::default() };
    client.pools.update_pool(fewer).await?;
    let well = look(&mut client, "greedy").await?;
    ensure!(well.problem.is_empty() && well.problem_reason.is_empty(), "{well:?}");
    // What it has by then is replaced by what has no slots.
    let none = UpdatePoolRequest {
        pool: "greedy".into(),
        networks: Some(NetworkInterfaces::default()),
        ..Default::default()
    };
    ensure!(client.pools.update_pool(none).await?.into_inner().networks.is_empty());
    count(&mut client, 1, 0).await?;
    Ok(())
}

/// A port is published when a VM is taken, or the VM is not taken.
pub async fn published(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "2"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    for (number, (name, mode)) in (0..).zip(MODES) {
        client.pools.create_pool(pool(name, &snapshot, mode, 1, SlotLink::default())).await?;
        ready(&mut client, name, 1).await?;
        let ports = [port(8080 + number, 80, Transport::Tcp)];
        let vm = take_ready(&mut client, name, &format!("web-{name}"), &ports).await?;
        let told = vm.networks[0].slot.as_ref().context("no slot")?;
        ensure!(told.publish.len() == 1, "{told:?}");
        let said = call(&world.beyond, HOST, 8080 + number, "hello")?;
        ensure!(said == format!("{} hello", called(&vm, mode)), "{said:?}");
        // What is somebody's costs nothing: the one that stands ready stands ready.
        ready(&mut client, name, 1).await?;
        let before = look(&mut client, name).await?.counts;
        let again = take(&mut client, name, "again", &ports).await;
        let message = expect_status("a port that is published", again, &[Code::AlreadyExists])?;
        ensure!(message.contains("slot"), "{message}");
        ensure!(look(&mut client, name).await?.counts == before);
        delete_pool(&mut client, name).await?;
    }
    client
        .pools
        .create_pool(CreatePoolRequest {
            networks: Vec::new(),
            ..pool("bare", &snapshot, PoolMode::Shell, 1, SlotLink::default())
        })
        .await?;
    let bare = take(&mut client, "bare", "", &[port(9000, 80, Transport::Tcp)]).await;
    let message = expect_status("a VM without a slot", bare, &[Code::FailedPrecondition])?;
    ensure!(message.contains("--net auto"), "{message}");
    // What was refused is kept for nobody.
    let other = SlotLink { publish: vec![port(9000, 80, Transport::Tcp)], ..SlotLink::default() };
    clone(&mut client, &snapshot, "other", other).await?;
    ensure!(call(&world.beyond, HOST, 9000, "hello")? == "other hello");
    Ok(())
}

/// Killed with a slot in everything that a pool can have: what was taken goes on with its ports, the rest is made anew.
pub async fn killed(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "2"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    for (name, mode) in MODES {
        client.pools.create_pool(pool(name, &snapshot, mode, 1, SlotLink::default())).await?;
        ready(&mut client, name, 1).await?;
    }
    let vm = take_ready(&mut client, "paused", "kept", &[port(8080, 80, Transport::Tcp)]).await?;
    for (name, _) in MODES {
        ready(&mut client, name, 1).await?;
    }
    count(&mut client, 2, 4).await?;
    let before = world.slots()?;
    ensure!(before.len() == 6, "{before:?}");
    daemon.kill_hard()?;
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "kept hello", "without a service");
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    for (name, _) in MODES {
        ready(&mut client, name, 1).await?;
    }
    eventually("of the slots before one is left", 30, async || {
        let now = world.slots()?;
        Ok(now.len() == 6 && now.intersection(&before).count() == 1 && world.links()?.len() == 6)
    })
    .await?;
    count(&mut client, 2, 4).await?;
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "kept hello", "taken over");
    ensure!(client.vm(&vm.id).await?.networks == vm.networks, "its ports are not told any more");
    for (name, mode) in MODES {
        let vm = take_ready(&mut client, name, &format!("new-{name}"), &[]).await?;
        let said = who(&world.host, &addresses(&vm)?[0])?;
        ensure!(said.as_deref() == Some(called(&vm, mode)), "{said:?}");
    }
    let tag = world.tables()?.split_once("coldspark_").context("no table")?.1.trim().to_owned();
    ensure!(daemon.stop().await?.success());
    ensure!(
        !world.tables()?.contains("coldspark_") && world.links()?.is_empty() && slots_of(&tag)?.is_empty()
    );
    Ok(())
}

/// A handler reaches what its function may, and the answer tells where its VM was reached.
pub async fn functions(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "2"])).await?;
    let mut client = daemon.client().await?;
    let handler = |to: &str| GuestCommand {
        args: words(&["udp", to, &ECHO.to_string(), "me"]),
        ..GuestCommand::default()
    };
    let settings = |to: &str, link: SlotLink| FunctionSettings {
        handler: Some(handler(to)),
        networks: vec![slot(link)],
        ..Default::default()
    };
    let listed = || SlotLink { allow: vec![allowed(BEYOND_PRIVATE, ECHO)], ..SlotLink::default() };
    for (name, to, link, min_ready, answer) in [
        ("asks", BEYOND_PRIVATE, listed(), 0, "192.168.50.1 asked me"),
        ("asks-ready", BEYOND_PRIVATE, listed(), 1, "192.168.50.1 asked me"),
        ("may-not", BEYOND_PRIVATE, SlotLink::default(), 0, ""),
        ("public", BEYOND, SlotLink::default(), 0, "1.2.3.1 asked me"),
    ] {
        // A prepare command reaches what the handler will.
        let request = DeployRequest {
            name: name.into(),
            from: Some(From::Embedded(true)),
            // It fails where it is not answered.
            prepare: (!answer.is_empty()).then(|| handler(to)),
            settings: Some(FunctionSettings { min_ready, ..settings(to, link) }),
        };
        let mut events = client.functions.deploy(request).await?.into_inner();
        let (mut prepared, mut function) = (Vec::new(), None);
        while let Some(event) = events.message().await? {
            match event.event {
                Some(Deployed::Output(bytes)) => prepared.extend_from_slice(&bytes),
                Some(Deployed::Function(made)) => function = Some(made),
                _ => {}
            }
        }
        let function = function.with_context(|| format!("{name} is not there"))?;
        ensure!(function.settings.unwrap_or_default().networks.len() == 1);
        let prepared = String::from_utf8_lossy(&prepared).trim_end().to_owned();
        ensure!(prepared == answer, "{name} was prepared with {prepared:?}");
        if min_ready > 0 {
            count(&mut client, 2, 1).await?;
        }
        let request = InvokeRequest { function: name.into(), ..Default::default() };
        let response = client.functions.invoke(request).await?.into_inner();
        let said = String::from_utf8_lossy(&response.output).trim_end().to_owned();
        ensure!(said == answer, "{name} says {said:?}");
        let end = response.end.context("no end")?;
        ensure!(end.slot_address.starts_with("10.77.") && end.slot_address6.starts_with("fd63:"), "{end:?}");
        let how = end.vm_origin();
        ensure!(min_ready == 0 || how == VmOrigin::Ready, "{name}: {how:?}");
        client.functions.delete_function(DeleteFunctionRequest { function: name.into() }).await?;
        count(&mut client, 2, 0).await?;
    }

    // With reuse it is one VM and one slot.
    let settings = FunctionSettings { invocations_per_vm: 3, ..settings(BEYOND, SlotLink::default()) };
    let request = DeployRequest {
        name: "again".into(),
        from: Some(From::Embedded(true)),
        prepare: None,
        settings: Some(settings),
    };
    let mut events = client.functions.deploy(request).await?.into_inner();
    while events.message().await?.is_some() {}
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let request = InvokeRequest { function: "again".into(), ..Default::default() };
        let response = client.functions.invoke(request).await?.into_inner();
        seen.insert(response.end.context("no end")?.slot_address);
    }
    ensure!(seen.len() == 1, "{seen:?}");
    Ok(())
}

/// Who may make VMs gets what the admin of a pool has opened for it; to open more, and ports of the host, is for admins.
pub async fn roles(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("tokens");
    let token = new_token(&file, "run", "runner")?;
    let arguments = words(&["--networks", "2", "--tokens", file.to_str().context("no UTF-8")?]);
    let daemon = Daemon::start_inside(&stage, &world.host, &arguments).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let everything = SlotLink { outbound: Outbound::All.into(), ..SlotLink::default() };
    let open = pool("open", &snapshot, PoolMode::Shell, 1, everything.clone());
    client.pools.create_pool(open.clone()).await?;
    ready(&mut client, "open", 1).await?;

    let bearer = format!("Bearer {token}");
    let denied = [Code::PermissionDenied];
    let publish = vec![port(8080, 80, Transport::Tcp)];
    let clone_of = |link: SlotLink| CloneVmRequest {
        snapshot: snapshot.clone(),
        identity: Identity::Managed.into(),
        networks: vec![slot(link)],
        ..Default::default()
    };
    macro_rules! as_runner {
        ($message:expr) => {{
            let mut request = tonic::Request::new($message);
            request.metadata_mut().insert("authorization", bearer.parse()?);
            request
        }};
    }
    expect_status("a pool", client.pools.create_pool(as_runner!(open)).await, &denied)?;
    expect_status("ALL", client.vms.clone_vm(as_runner!(clone_of(everything))).await, &denied)?;
    let led = SlotLink { publish: publish.clone(), ..SlotLink::default() };
    expect_status("a port", client.vms.clone_vm(as_runner!(clone_of(led))).await, &denied)?;
    client.vms.clone_vm(as_runner!(clone_of(SlotLink::default()))).await?;

    let take = TakeVmRequest { pool: "open".into(), name: "taken".into(), ..Default::default() };
    let with_port = TakeVmRequest { publish, ..take.clone() };
    let message =
        expect_status("a pool's port", client.pools.take_vm(as_runner!(with_port.clone())).await, &denied)?;
    ensure!(message.contains("admin"), "{message}");
    let vm = client.pools.take_vm(as_runner!(take)).await?.into_inner().vm.context("no VM")?;
    ensure!(guest_asks(&client, &vm, BEYOND_PRIVATE).await?.is_some(), "what the admin has opened is not");
    // The same of an admin is no matter of roles.
    client.pools.take_vm(TakeVmRequest { name: "led".into(), ..with_port }).await?;
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "led hello");
    Ok(())
}
