//! Networks that the service makes: clones with one address side by side, published ports, what a guest reaches and what it does not, and that
//! nothing is left, however a VM or the service ends.
//!
//! The embedded guest is the host at the other end (its `network.rs`): it sends back what it is sent with its own name before it, and asks by UDP
//! when it is told to. Each silence is held against the same question that is answered.

mod ahead;
pub mod docker;
mod doubts;
mod world;

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};

use self::world::{BEYOND, BEYOND_PRIVATE, BEYOND6, ECHO, HOST, HOST6, World, ask, call, inside, slots_of};
use crate::client::{Client, expect_status};
use crate::commands::run;
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

/// The guest's addresses, which are those of `coldspark serve` if it is told nothing else.
const ADDRESSES: &str = "coldspark.ip=10.76.0.2 coldspark.ip6=fd63:6f6c:6473::2";
const NEEDS: &[Need] = &[Need::Kvm, Need::Slots];
const DOCKER: &[Need] = &[Need::Kvm, Need::Dockerd];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("slots/side-by-side", NEEDS, 120, side_by_side),
        trial("slots/outbound", NEEDS, 180, outbound),
        trial("slots/published", NEEDS, 120, published),
        trial("slots/given-again", NEEDS, 120, given_again),
        trial("slots/killed", NEEDS, 180, killed),
        trial("slots/costs", NEEDS, 180, costs),
        trial("slots/pools", NEEDS, 240, ahead::pools),
        trial("slots/pools-starved", NEEDS, 120, ahead::starved),
        trial("slots/pools-published", NEEDS, 120, ahead::published),
        trial("slots/pools-killed", NEEDS, 180, ahead::killed),
        trial("slots/functions", NEEDS, 180, ahead::functions),
        trial("slots/roles", NEEDS, 120, ahead::roles),
        trial("slots/forgotten", NEEDS, 120, doubts::forgotten),
        trial("slots/kept", NEEDS, 120, doubts::kept),
        trial("slots/without-ipv6", NEEDS, 120, doubts::without_ipv6),
        trial("slots/docker", NEEDS, 120, docker::rules),
        trial("slots/dockerd", DOCKER, 180, docker::nft),
        trial("slots/dockerd-legacy", DOCKER, 180, docker::legacy),
    ]
}

/// Whether the service could make its networks here; the error is the reason.
pub fn available() -> Result<(), String> {
    let there = |program: &str, arguments: &[&str]| {
        std::process::Command::new(program)
            .args(arguments)
            .output()
            .is_ok_and(|output| output.status.success())
    };
    match there("nft", &["list", "tables"]) && there("nsenter", &["--version"]) {
        true => Ok(()),
        false => Err("no nftables that works, or no nsenter (tests/run installs nftables as root)".into()),
    }
}

fn words(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|word| (*word).to_owned()).collect()
}

fn slot(link: SlotLink) -> NetworkInterface {
    NetworkInterface { link: Some(Link::Slot(link)), ..NetworkInterface::default() }
}

fn allowed(network: &str, port: u16) -> AllowedDestination {
    AllowedDestination { network: network.into(), port: port.into(), transport: 0 }
}

fn port(host: u16, guest: u16, transport: Transport) -> PublishedPort {
    PublishedPort { host_port: host.into(), guest_port: guest.into(), transport: transport.into() }
}

/// A snapshot of an embedded guest in a slot.
async fn base(client: &mut Client) -> anyhow::Result<String> {
    let request = CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        command_line: ADDRESSES.into(),
        networks: vec![slot(SlotLink::default())],
        ..Default::default()
    };
    let vm = client.boot(request).await?.vm;
    let snapshot = client.snapshot(&vm.id, "base").await?.id;
    client.delete_vm(&vm.id).await?;
    Ok(snapshot)
}

fn request(snapshot: &str, name: &str, network: NetworkInterface) -> CloneVmRequest {
    CloneVmRequest {
        snapshot: snapshot.into(),
        name: name.into(),
        identity: Identity::Managed.into(),
        networks: vec![network],
        ..Default::default()
    }
}

async fn clone(client: &mut Client, snapshot: &str, name: &str, link: SlotLink) -> Result<Vm, Status> {
    let request = request(snapshot, name, slot(link));
    let mut vms = client.vms.clone_vm(request).await?.into_inner().vms;
    vms.pop().ok_or_else(|| Status::internal("trial: no clone in the answer"))
}

fn addresses(vm: &Vm) -> anyhow::Result<[String; 2]> {
    let network = vm.networks.first().context("no interface")?;
    ensure!(
        !network.slot_address.is_empty() && !network.slot_address6.is_empty(),
        "no addresses: {network:?}"
    );
    Ok([network.slot_address.clone(), network.slot_address6.clone()])
}

/// Who answers there, on the way from `netns`.
fn who(netns: &str, address: &str) -> anyhow::Result<Option<String>> {
    Ok(ask(netns, address, 99, "you")?.map(|said| said.trim_end_matches(" you").to_owned()))
}

/// What the guest is answered from there.
async fn guest_asks(client: &Client, vm: &Vm, to: &str) -> anyhow::Result<Option<String>> {
    let left = run(client, &vm.id, &["udp", to, &ECHO.to_string(), "me"]).await?;
    let said = String::from_utf8_lossy(&left.stdout).trim_end().to_owned();
    Ok(Some(said).filter(|said| !said.is_empty()))
}

async fn side_by_side(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "3"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let one = clone(&mut client, &snapshot, "one", SlotLink::default()).await?;
    let many = CloneVmRequest { count: 2, ..request(&snapshot, "twin", slot(SlotLink::default())) };
    let twins = client.vms.clone_vm(many).await?.into_inner().vms;
    let mut seen = std::collections::BTreeSet::new();
    for vm in [&one, &twins[0], &twins[1]] {
        ensure!(
            vm.networks[0].mac == one.networks[0].mac,
            "in its own network a clone keeps its snapshot's address"
        );
        for address in addresses(vm)? {
            ensure!(seen.insert(address.clone()), "{address} is two VMs'");
            ensure!(who(&world.host, &address)?.as_ref() == Some(&vm.name), "{address} is not {}", vm.name);
            let said = call(&world.host, &address, 80, "hello")?;
            ensure!(said == format!("{} hello", vm.name), "{address} says {said:?} by TCP");
        }
    }
    // The address is the host's way to it, and nobody else's.
    let [address, _] = addresses(&one)?;
    ensure!(who(&world.beyond, &address)?.is_none(), "another machine reaches {address}");
    ensure!(who(&world.host, &address)?.is_some());

    for (what, interfaces, code, reason) in [
        ("two slots", vec![slot(SlotLink::default()); 2], Code::InvalidArgument, "one at most"),
        (
            "an address of Ethernet",
            vec![NetworkInterface { mac: vec![2, 0, 0, 0, 0, 9].into(), ..slot(SlotLink::default()) }],
            Code::InvalidArgument,
            "leave it out",
        ),
        (
            "no network",
            vec![slot(SlotLink { allow: vec![allowed("10.0.0.1/8", 0)], ..SlotLink::default() })],
            Code::InvalidArgument,
            "10.0.0.0/8",
        ),
        (
            "this machine",
            vec![slot(SlotLink { allow: vec![allowed("127.0.0.1", 0)], ..SlotLink::default() })],
            Code::InvalidArgument,
            "loopback",
        ),
        (
            "words for nft",
            vec![slot(SlotLink { allow: vec![allowed("1.1.1.1 accept; drop", 0)], ..SlotLink::default() })],
            Code::InvalidArgument,
            "no network",
        ),
    ] {
        let mut request = request(&snapshot, "", NetworkInterface::default());
        request.networks = interfaces;
        let message = expect_status(what, client.vms.clone_vm(request).await, &[code])?;
        ensure!(message.contains(reason), "{what}: {message}");
    }

    let tag = world.tables()?;
    ensure!(daemon.stop().await?.success(), "the service did not end well");
    ensure!(!world.tables()?.contains("coldspark_"), "a table is left: {tag}");
    ensure!(world.links()?.is_empty(), "links are left: {:?}", world.links()?);
    let tag = tag.split_once("coldspark_").context("no table of the service's")?.1.trim().to_owned();
    ensure!(slots_of(&tag)?.is_empty(), "slots are left: {:?}", slots_of(&tag)?);

    let daemon = Daemon::start_inside(&stage, &world.host, &[]).await?;
    let mut client = daemon.client().await?;
    let boot = CreateVmRequest {
        source: Some(Source::Embedded(true)),
        networks: vec![slot(SlotLink::default())],
        ..Default::default()
    };
    let message =
        expect_status("a service that makes none", client.boot(boot).await, &[Code::FailedPrecondition])?;
    ensure!(message.contains("--networks"), "{message}");
    Ok(())
}

async fn outbound(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "3"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let usual = clone(&mut client, &snapshot, "usual", SlotLink::default()).await?;
    let [usual4, usual6] = addresses(&usual)?;

    // Each by itself: allowed what the one before is not.
    let everything = SlotLink { outbound: Outbound::All.into(), ..SlotLink::default() };
    let everything = clone(&mut client, &snapshot, "everything", everything).await?;
    let allow = vec![
        allowed("192.168.50.0/24", ECHO),
        allowed(HOST, ECHO),
        allowed(HOST6, ECHO),
        allowed(&usual4, ECHO),
        allowed(&usual6, 0),
    ];
    let listed = clone(&mut client, &snapshot, "listed", SlotLink { allow, ..SlotLink::default() }).await?;
    let other_port = SlotLink { allow: vec![allowed("192.168.50.0/24", ECHO + 1)], ..SlotLink::default() };
    let other_port = clone(&mut client, &snapshot, "other-port", other_port).await?;
    // As wide as can be, it opens neither the host nor other guests.
    let wide = SlotLink { allow: vec![allowed("0.0.0.0/0", 0), allowed("::/0", 0)], ..SlotLink::default() };
    let wide = clone(&mut client, &snapshot, "wide", wide).await?;

    let by_host = |host: &str| Some(format!("{host} asked me"));
    for (vm, to, answer) in [
        (&usual, BEYOND, by_host(HOST)),
        (&usual, BEYOND6, by_host(HOST6)),
        (&usual, BEYOND_PRIVATE, None),
        (&usual, HOST, None),
        (&usual, HOST6, None),
        (&everything, BEYOND_PRIVATE, by_host("192.168.50.1")),
        (&everything, BEYOND6, by_host(HOST6)),
        (&everything, HOST, None),
        (&everything, &usual4, None),
        (&everything, &usual6, None),
        (&listed, BEYOND_PRIVATE, by_host("192.168.50.1")),
        (&listed, BEYOND, None),
        (&listed, BEYOND6, None),
        (&listed, HOST, by_host(&addresses(&listed)?[0])),
        (&listed, HOST6, by_host(&addresses(&listed)?[1])),
        (&listed, &usual4, Some("usual me".into())),
        (&listed, &usual6, Some("usual me".into())),
        (&other_port, BEYOND_PRIVATE, None),
        (&wide, BEYOND_PRIVATE, by_host("192.168.50.1")),
        (&wide, HOST, None),
        (&wide, HOST6, None),
        (&wide, &usual4, None),
    ] {
        let said = guest_asks(&client, vm, to).await?;
        ensure!(said == answer, "{} asks {to} and is told {said:?}, not {answer:?}", vm.name);
    }
    // Whoever reaches nothing is reached, and answers.
    ensure!(who(&world.host, &addresses(&other_port)?[0])?.as_deref() == Some("other-port"));
    Ok(())
}

async fn published(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "3"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let ports = |ports: &[PublishedPort]| SlotLink { publish: ports.to_vec(), ..SlotLink::default() };
    let web = [port(8080, 80, Transport::Tcp), port(5353, 53, Transport::Udp)];
    let one = clone(&mut client, &snapshot, "one", ports(&web)).await?;
    let two = clone(&mut client, &snapshot, "two", ports(&[port(8081, 80, Transport::Tcp)])).await?;
    for (netns, host) in [
        (&world.beyond, HOST),
        (&world.beyond, HOST6),
        (&world.host, "127.0.0.1"),
        (&world.host, HOST6),
        (&world.host, "::1"),
    ] {
        for (host_port, vm) in [(8080, &one), (8081, &two)] {
            let said = call(netns, host, host_port, "hello")?;
            ensure!(said == format!("{} hello", vm.name), "{host}:{host_port} says {said:?}");
        }
        let said = ask(netns, host, 5353, "hello")?;
        ensure!(said.as_deref() == Some("one hello"), "{host} says {said:?} by UDP");
    }
    // A guest does not get to others by them.
    ensure!(run(&client, &two.id, &["udp", HOST, "5353", "x"]).await?.stdout.is_empty());

    let again = clone(&mut client, &snapshot, "again", ports(&web[..1])).await;
    let message = expect_status("a port that is published", again, &[Code::AlreadyExists])?;
    ensure!(message.contains("8080/tcp"), "{message}");
    let program = inside(&world.host, || Ok(std::net::TcpListener::bind(("0.0.0.0", 9090))?))?;
    let taken = [port(9091, 1, Transport::Udp), port(9090, 1, Transport::Tcp)];
    let again = clone(&mut client, &snapshot, "again", ports(&taken)).await;
    let message = expect_status("a program's port", again, &[Code::AlreadyExists])?;
    ensure!(message.contains("9090/tcp") && message.contains("program"), "{message}");
    drop(program);
    for (what, wrong) in
        [("no port", port(0, 80, Transport::Tcp)), ("no port of the guest", port(80, 0, Transport::Tcp))]
    {
        expect_status(
            what,
            clone(&mut client, &snapshot, "", ports(&[wrong])).await,
            &[Code::InvalidArgument],
        )?;
    }
    let many = CloneVmRequest { count: 2, ..request(&snapshot, "", slot(ports(&web))) };
    expect_status("one port for two", client.vms.clone_vm(many).await, &[Code::InvalidArgument])?;
    let three = clone(&mut client, &snapshot, "three", ports(&taken)).await?;
    ensure!(
        call(&world.beyond, HOST, 9090, "hello")? == "three hello",
        "what a refused request asked for is kept"
    );

    // With the VM its ports end; the next one can have them at once.
    client.delete_vm(&one.id).await?;
    let next = clone(&mut client, &snapshot, "next", ports(&web)).await?;
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "next hello");
    for vm in [next, three] {
        client.delete_vm(&vm.id).await?;
    }
    eventually("the ports lead nowhere", 20, async || {
        Ok(call(&world.beyond, HOST, 8080, "hello").is_err()
            && ask(&world.beyond, HOST, 5353, "x")?.is_none())
    })
    .await?;
    ensure!(call(&world.beyond, HOST, 8081, "hello")? == "two hello", "another VM's port went with them");
    Ok(())
}

async fn given_again(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    // Four slots are all that there can be.
    let four = words(&["--networks", "2", "--slot-network", "10.77.5.0/28"]);
    let daemon = Daemon::start_inside(&stage, &world.host, &four).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let mut vms = Vec::new();
    for name in ["a", "b", "c", "d"] {
        vms.push(clone(&mut client, &snapshot, name, SlotLink::default()).await?);
    }
    let Err(status) = clone(&mut client, &snapshot, "e", SlotLink::default()).await else {
        anyhow::bail!("a fifth of four slots")
    };
    ensure!(status.code() == Code::ResourceExhausted, "{status}");
    let details = tonic_types::StatusExt::get_error_details(&status);
    let reason = details.error_info().context("no reason")?.reason.clone();
    ensure!(reason == "NETWORK_SLOTS_EXHAUSTED", "{reason}");

    let old = vms.remove(1);
    let [address, address6] = addresses(&old)?;
    let netns = world.slots()?;
    ensure!(netns.len() == 4, "{netns:?}");
    // A conversation that the kernel remembers: the next guest is not to be in it.
    let socket = inside(&world.host, || Ok(std::net::UdpSocket::bind(("0.0.0.0", 0))?))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut said = [0; 100];
    socket.send_to(b"x", (address.as_str(), 99))?;
    let count = socket.recv(&mut said)?;
    ensure!(&said[..count] == b"b x");
    // A namespace is known by a mark in it: the kernel gives the number of one that is gone to the next.
    const MARK: &str = "/proc/sys/net/ipv4/ip_default_ttl";
    let netns_of = |address: &str| -> anyhow::Result<String> {
        let last: u8 = address.rsplit('.').next().context("no address")?.parse()?;
        let number = last / 4;
        let name = world.slots()?.into_iter().find(|name| name.ends_with(&format!("-{number}")));
        name.context("no namespace")
    };
    inside(&netns_of(&address)?, || Ok(std::fs::write(MARK, "77")?))?;
    client.delete_vm(&old.id).await?;
    let new = clone(&mut client, &snapshot, "new", SlotLink::default()).await?;
    ensure!(addresses(&new)? == [address.clone(), address6], "there are only four: {new:?}");
    let mark = inside(&netns_of(&address)?, || Ok(std::fs::read_to_string(MARK)?))?;
    ensure!(mark.trim() != "77", "the slot is the one that the old VM had");
    ensure!(who(&world.host, &address)?.as_deref() == Some("new"));
    for vm in &vms {
        ensure!(who(&world.host, &addresses(vm)?[0])?.as_ref() == Some(&vm.name), "{} is disturbed", vm.name);
    }
    Ok(())
}

async fn killed(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let mut daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "2"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let link = SlotLink {
        allow: vec![allowed(BEYOND_PRIVATE, ECHO), allowed(HOST, ECHO)],
        publish: vec![port(8080, 80, Transport::Tcp)],
        ..SlotLink::default()
    };
    let kept = clone(&mut client, &snapshot, "kept", link).await?;
    let other = clone(&mut client, &snapshot, "other", SlotLink::default()).await?;
    let works = async |client: Option<&Client>| -> anyhow::Result<()> {
        for vm in [&kept, &other] {
            for address in addresses(vm)? {
                ensure!(who(&world.host, &address)?.as_ref() == Some(&vm.name), "{} is not reached", vm.name);
            }
        }
        ensure!(call(&world.beyond, HOST, 8080, "hello")? == "kept hello");
        if let Some(client) = client {
            ensure!(guest_asks(client, &kept, BEYOND_PRIVATE).await?.is_some(), "what was allowed is not");
            ensure!(guest_asks(client, &kept, HOST).await?.is_some(), "the host was allowed");
            ensure!(guest_asks(client, &kept, BEYOND).await?.is_none(), "what was not allowed is");
            ensure!(guest_asks(client, &other, BEYOND).await?.is_some());
        }
        Ok(())
    };
    works(Some(&client)).await?;
    eventually("two are ready", 20, async || Ok(world.slots()?.len() == 4)).await?;
    let before = world.slots()?;
    daemon.kill_hard()?;
    works(None).await.context("without a service")?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    works(Some(&client)).await.context("taken over")?;
    let told = client.vm(&kept.id).await?;
    ensure!(told.networks == kept.networks, "{told:?}");
    let again = SlotLink { publish: vec![port(8080, 80, Transport::Tcp)], ..SlotLink::default() };
    expect_status("its port", clone(&mut client, &snapshot, "", again).await, &[Code::AlreadyExists])?;
    // Of those that stood ready none is left, and others do.
    eventually("other slots are ready", 20, async || {
        let now = world.slots()?;
        Ok(now.len() == 4 && now.intersection(&before).count() == 2)
    })
    .await?;
    clone(&mut client, &snapshot, "third", SlotLink::default()).await?;

    // A VM that ends while there is no service.
    let pid = client.vm(&other.id).await?.worker_pid;
    daemon.kill_hard()?;
    // SAFETY: plain kill of a worker of this trial's daemon.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    eventually("its slot is gone", 20, async || {
        let now = world.slots()?;
        let links = world.links()?;
        Ok(now.len() == 4 && now.intersection(&before).count() == 1 && links.len() == 4)
    })
    .await?;
    client.delete_vm(&kept.id).await?;
    eventually("its port leads nowhere", 20, async || Ok(call(&world.beyond, HOST, 8080, "hello").is_err()))
        .await?;
    let tag = world.tables()?.split_once("coldspark_").context("no table")?.1.trim().to_owned();
    ensure!(daemon.stop().await?.success());
    ensure!(
        !world.tables()?.contains("coldspark_") && world.links()?.is_empty() && slots_of(&tag)?.is_empty()
    );
    Ok(())
}

/// What a slot costs to make, and what it adds to a clone.
async fn costs(stage: Stage) -> anyhow::Result<()> {
    const SLOTS: usize = 8;
    const CLONES: usize = 15;
    let world = World::new()?;
    let begin = Instant::now();
    let arguments = words(&["--networks", &SLOTS.to_string()]);
    let daemon = Daemon::start_inside(&stage, &world.host, &arguments).await?;
    eventually("all slots", 60, async || Ok(world.slots()?.len() == SLOTS)).await?;
    let each = begin.elapsed() / SLOTS as u32;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let mut report = format!("{SLOTS} slots, with the service's start, {each:.1?} each\n");
    let plain = SlotLink::default();
    let listed = SlotLink { allow: vec![allowed("192.0.2.0/24", 53)], ..SlotLink::default() };
    for (what, network) in [
        ("no link", NetworkInterface::default()),
        ("a slot", slot(plain)),
        ("a slot with a list of what is allowed", slot(listed)),
    ] {
        let mut took = Vec::new();
        for _ in 0..CLONES {
            let vms = client.vms.clone_vm(request(&snapshot, "", network.clone())).await?.into_inner().vms;
            took.extend(vms.iter().map(|vm| vm.start_us));
            for vm in &vms {
                client.delete_vm(&vm.id).await?;
            }
            eventually("as many slots as there are to be", 20, async || Ok(world.slots()?.len() == SLOTS))
                .await?;
        }
        took.sort_unstable();
        let [low, median, high] = [took[0], took[CLONES / 2], took[CLONES - 1]].map(Duration::from_micros);
        report += &format!("a clone with {what}: median {median:.2?}, {low:.2?} to {high:.2?}\n");
    }
    print!("  slots/costs: {}", report.replace('\n', "\n  ").trim_end_matches(' '));
    std::fs::write(stage.logs.join("costs.txt"), report)?;
    Ok(())
}
