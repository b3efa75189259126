//! Networks: packets both ways between a guest and the host's TAP, through snapshots, clones and reboots; and TAPs that
//! cannot be had.

pub mod guests;

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};

use self::guests::Guest;
use crate::client::{Client, expect_status};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::freebsd::Kernel;
use crate::host::Need;
use crate::tap::{self, Echo, Tap};
use crate::trial::{Stage, limit, trial};

/// What goes each way over TCP, in one connection, while a snapshot is taken.
const TRANSFER_BYTES: u64 = 256 << 20;
/// The same in a clone.
const CLONE_TRANSFER_BYTES: u64 = 8 << 20;
const PINGS: u16 = 20;
const PING_EVERY: Duration = Duration::from_millis(50);

pub fn trials() -> Vec<Trial> {
    const ANY_GUEST: &[Need] = &[Need::Kvm, Need::Tap];
    const LINUX: &[Need] = &[Need::Kvm, Need::KernelMode, Need::LinuxGuest, Need::Tap];
    const FREEBSD: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsd, Need::FreeBsdNetwork, Need::Tap];
    const GENERIC: &[Need] =
        &[Need::Kvm, Need::KernelMode, Need::FreeBsdGeneric, Need::FreeBsdNetwork, Need::Tap];
    vec![
        trial("network/taps-that-cannot-be-had", ANY_GUEST, 60, refusals),
        trial("network/addresses-of-clones", ANY_GUEST, 60, addresses),
        trial("network/linux", LINUX, 150, |stage| road(stage, Guest::Linux)),
        trial("network/freebsd", FREEBSD, 150, |stage| road(stage, Guest::FreeBsd(Kernel::Microvm))),
        trial("network/freebsd-generic", GENERIC, 150, |stage| road(stage, Guest::FreeBsd(Kernel::Generic))),
    ]
}

pub fn plugged(tap: &Tap) -> NetworkInterface {
    NetworkInterface { link: Some(Link::Tap(tap.name.clone())), ..Default::default() }
}

fn named(tap: &str) -> NetworkInterface {
    NetworkInterface { link: Some(Link::Tap(tap.into())), ..Default::default() }
}

async fn clone(client: &mut Client, snapshot: &str, networks: Vec<NetworkInterface>) -> Result<Vm, Status> {
    let request = CloneVmRequest {
        snapshot: snapshot.into(),
        identity: Identity::Unmanaged.into(),
        networks,
        ..Default::default()
    };
    let mut vms = client.vms.clone_vm(request).await?.into_inner().vms;
    vms.pop().ok_or_else(|| Status::internal("trial: no clone in the answer"))
}

async fn stats(client: &mut Client, vm: &Vm) -> anyhow::Result<NetworkStats> {
    let stats = client.vms.get_vm_stats(GetVmStatsRequest { vm: vm.id.clone() }).await?.into_inner();
    stats.networks.first().copied().context("no interface in the counters")
}

/// What a trial found, for people: in its logs, and on the screen.
struct Report(Guest, String);

impl Report {
    fn line(&mut self, line: &str) {
        println!("  network/{:?}: {line}", self.0);
        let _ = writeln!(self.1, "{line}");
    }

    fn rate(&mut self, what: &str, bytes: u64, took: Duration) {
        let rate = bytes as f64 / took.as_secs_f64() / 1e6;
        self.line(&format!(
            "{what}: {} MiB each way at once in {took:.1?}, {rate:.0} MB/s each way",
            bytes >> 20
        ));
    }

    fn pings(&mut self, what: &str, sent: u16, answered: u16) {
        self.line(&format!("{what}: {answered} of {sent} pings answered, {} lost", sent - answered));
    }
}

pub async fn ping(to: Ipv4Addr, count: u16) -> anyhow::Result<u16> {
    tokio::task::spawn_blocking(move || tap::ping(to, count, PING_EVERY)).await?
}

/// It answers a ping, sooner or later: on a busy host some are answered too late to count.
async fn answers(who: Ipv4Addr, otherwise: &str) -> anyhow::Result<()> {
    eventually("an answer to a ping", 60, async || Ok(ping(who, 1).await? == 1))
        .await
        .with_context(|| otherwise.to_owned())
}

/// A TAP that is missing, taken, none at all, or asked for in a way that cannot be.
async fn refusals(stage: Stage) -> anyhow::Result<()> {
    let tap = Tap::new([10, 79, 0, 1])?;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let with = |networks: Vec<NetworkInterface>| CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        networks,
        ..Default::default()
    };
    let group = NetworkInterface { mac: vec![1, 0, 0x5e, 0, 0, 1].into(), ..plugged(&tap) };
    let taken = tap.take()?;
    for (what, networks, code) in [
        ("a TAP that is not there", vec![named("cs-none")], Code::NotFound),
        ("a TAP that another has", vec![plugged(&tap)], Code::FailedPrecondition),
        ("no TAP", vec![named("lo")], Code::FailedPrecondition),
        ("a pattern", vec![named("tap%d")], Code::InvalidArgument),
        ("a name with a slash", vec![named("../x")], Code::InvalidArgument),
        ("one TAP twice", vec![plugged(&tap), plugged(&tap)], Code::InvalidArgument),
        ("five interfaces", vec![NetworkInterface::default(); 5], Code::InvalidArgument),
        ("a group's address", vec![group], Code::InvalidArgument),
        ("a small MTU", vec![NetworkInterface { mtu: 67, ..plugged(&tap) }], Code::InvalidArgument),
        (
            "an address of 5 bytes",
            vec![NetworkInterface { mac: vec![2; 5].into(), ..plugged(&tap) }],
            Code::InvalidArgument,
        ),
    ] {
        let message = expect_status(what, client.boot(with(networks)).await, &[code])?;
        match code {
            Code::NotFound => ensure!(message.contains("ip tuntap add dev cs-none mode tap"), "{message}"),
            Code::FailedPrecondition => ensure!(message.contains("TAP"), "{message}"),
            _ => {}
        }
    }
    ensure!(client.list_vms().await?.is_empty(), "a VM was left");
    drop(taken);

    // Free again, and good; the second interface has no link.
    let settings = NetworkInterface { mac: vec![2, 0, 0, 0, 0, 7].into(), mtu: 1400, ..plugged(&tap) };
    let vm = client.boot(with(vec![settings, NetworkInterface::default()])).await?.vm;
    let networks: Vec<(&str, &[u8], u32)> =
        vm.networks.iter().map(|n| (n.link.as_str(), &n.mac[..], n.mtu)).collect();
    ensure!(networks[0] == (&format!("TAP {}", tap.name)[..], &[2, 0, 0, 0, 0, 7][..], 1400), "{networks:?}");
    ensure!(networks[1].0 == "no link" && networks[1].1[0] & 3 == 2 && networks[1].2 == 0, "{networks:?}");
    ensure!(stats(&mut client, &vm).await? == NetworkStats::default(), "the embedded guest has no driver");
    expect_status(
        "a TAP that a VM has",
        client.boot(with(vec![plugged(&tap)])).await,
        &[Code::FailedPrecondition],
    )?;
    let snapshot = client.snapshot(&vm.id, "").await?.id;
    let moved = NetworkInterface { mac: vec![2; 6].into(), ..NetworkInterface::default() };
    for (what, networks, code) in [
        ("a clone on its source's TAP", vec![plugged(&tap)], Code::FailedPrecondition),
        ("three links for two interfaces", vec![NetworkInterface::default(); 3], Code::InvalidArgument),
        ("another address for a clone", vec![moved], Code::InvalidArgument),
    ] {
        expect_status(what, clone(&mut client, &snapshot, networks).await, &[code])?;
    }
    let two = CloneVmRequest {
        snapshot: snapshot.clone(),
        count: 2,
        networks: vec![plugged(&tap)],
        ..Default::default()
    };
    expect_status("two clones on one TAP", client.vms.clone_vm(two).await, &[Code::InvalidArgument])?;
    // Without a link a clone is never refused, and with the source gone its TAP serves a clone.
    let quiet = clone(&mut client, &snapshot, vec![]).await?;
    ensure!(quiet.networks.iter().all(|network| network.link == "no link"), "{quiet:?}");
    client.delete_vm(&vm.id).await?;
    let heir = clone(&mut client, &snapshot, vec![plugged(&tap)]).await?;
    ensure!(heir.networks[0].mac == vm.networks[0].mac && heir.networks[0].mtu == 1400, "{heir:?}");
    client.delete_vm(&heir.id).await?;
    let _free = tap.take().context("the TAP of a deleted VM is not free")?;
    Ok(())
}

/// An interface on a TAP whose guest is given addresses.
pub fn given(tap: &Tap, addresses: &[&str], gateways: &[&str]) -> NetworkInterface {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    NetworkInterface { addresses: owned(addresses), gateways: owned(gateways), ..plugged(tap) }
}

/// A clone that is told who it is.
pub async fn managed(
    client: &mut Client,
    snapshot: &str,
    networks: Vec<NetworkInterface>,
) -> Result<Vm, Status> {
    let request = CloneVmRequest {
        snapshot: snapshot.into(),
        identity: Identity::Managed.into(),
        networks,
        ..Default::default()
    };
    let mut vms = client.vms.clone_vm(request).await?.into_inner().vms;
    vms.pop().ok_or_else(|| Status::internal("trial: no clone in the answer"))
}

/// Clones are given other addresses than their snapshot has, and answer to these only; or they keep what they had.
async fn addresses(stage: Stage) -> anyhow::Result<()> {
    let (tap, other) = (Tap::new([10, 81, 0, 1])?, Tap::new([10, 82, 0, 1])?);
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let boot = |networks: Vec<NetworkInterface>| CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        command_line: format!("coldspark.ip={} coldspark.ip6=fd81::2", tap.guest()),
        networks,
        ..Default::default()
    };
    let early = boot(vec![given(&tap, &["10.81.0.9/24"], &[])]);
    expect_status("addresses for a boot", client.boot(early).await, &[Code::InvalidArgument])?;
    let vm = client.boot(boot(vec![plugged(&tap)])).await?.vm;
    answers(tap.guest(), "the source does not answer").await?;
    let snapshot = client.snapshot(&vm.id, "base").await?.id;

    let down = NetworkInterface { link: Some(Link::Down(true)), ..given(&other, &["10.82.0.9/24"], &[]) };
    let slot = NetworkInterface {
        link: Some(Link::Slot(SlotLink::default())),
        ..given(&other, &["10.82.0.9/24"], &[])
    };
    for (what, network, says) in [
        ("no prefix", given(&other, &["10.82.0.9"], &[]), "prefix"),
        ("no address", given(&other, &["here/24"], &[]), "prefix"),
        ("a network's first", given(&other, &["10.82.0.0/24"], &[]), "first or last"),
        ("a gateway elsewhere", given(&other, &["10.82.0.9/24"], &["10.83.0.1"]), "gateway"),
        ("a gateway alone", given(&other, &[], &["10.82.0.1"]), "gateway"),
        ("one twice", given(&other, &["10.82.0.9/24", "10.82.0.9/16"], &[]), "twice"),
        ("nine", given(&other, &["10.82.0.9/24"; 9], &[]), "more than 8"),
        ("a link-local one", given(&other, &["fe80::9/64"], &[]), "link-local"),
        ("no link", down, "TAP"),
        ("a slot", slot, "TAP"),
    ] {
        let clone = managed(&mut client, &snapshot, vec![network]).await;
        let message = expect_status(what, clone, &[Code::InvalidArgument])?;
        ensure!(message.contains(says), "{what}: {message}");
    }
    let untold = clone(&mut client, &snapshot, vec![given(&other, &["10.82.0.9/24"], &[])]).await;
    let message = expect_status("UNMANAGED", untold, &[Code::FailedPrecondition])?;
    ensure!(message.contains("MANAGED") && message.contains("agent"), "{message}");
    // What its guest cannot take costs the clone.
    let many = given(&other, &["10.82.0.8/24", "10.82.0.9/24"], &[]);
    let refused = managed(&mut client, &snapshot, vec![many]).await;
    expect_status(
        "two for a guest of one",
        refused,
        &[Code::ResourceExhausted, Code::FailedPrecondition, Code::Internal],
    )?;
    ensure!(client.list_vms().await?.len() == 1, "a clone is left that was not given its addresses");
    eventually("the end of its process", 20, async || Ok(other.take().is_ok())).await?;

    let network = given(&other, &["10.82.0.9/24", "fd82::9/64"], &["10.82.0.1", "fd82::1"]);
    let moved =
        managed(&mut client, &snapshot, vec![network]).await.context("a clone with other addresses")?;
    ensure!(moved.guest_entropy() == GuestEntropy::Drawn, "{moved:?}");
    let told = &moved.networks[0];
    ensure!(told.addresses == ["10.82.0.9/24", "fd82::9/64"], "{told:?}");
    ensure!(told.gateways == ["10.82.0.1", "fd82::1"] && told.mac != vm.networks[0].mac, "{told:?}");
    answers([10, 82, 0, 9].into(), "the clone does not answer to its address").await?;
    answers(tap.guest(), "the source does not answer any more").await?;
    let seen = client.vm(&moved.id).await?;
    ensure!(seen.networks == moved.networks, "{seen:?}");
    client.delete_vm(&vm.id).await?;
    let beside = managed(&mut client, &snapshot, vec![given(&tap, &["10.81.0.9/24"], &[])]).await?;
    answers([10, 81, 0, 9].into(), "a clone in its source's network does not answer").await?;
    ensure!(ping(tap.guest(), 1).await? == 0, "it answers to its source's address, too");
    client.delete_vm(&beside.id).await?;
    let kept = managed(&mut client, &snapshot, vec![plugged(&tap)]).await?;
    ensure!(kept.networks[0].addresses.is_empty(), "{kept:?}");
    answers(tap.guest(), "a clone that was given none has not what it had").await?;
    // A snapshot of a clone has what the clone had.
    let again = client.snapshot(&moved.id, "moved").await?.id;
    client.delete_vm(&moved.id).await?;
    managed(&mut client, &again, vec![plugged(&other)]).await?;
    answers([10, 82, 0, 9].into(), "a clone of a clone has other addresses").await?;
    Ok(())
}

/// Both directions of ping, all answered.
async fn expect_pings(
    guest: Guest,
    console: &mut Console,
    tap: &Tap,
    what: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    // One that does not count: FreeBSD 12 keeps one packet while it asks for an address (`net.link.ether.inet.maxhold`; today it
    // is 16) and drops those before it.
    ping(tap.guest(), 1).await?;
    let answered = ping(tap.guest(), PINGS).await?;
    report.pings(&format!("{what}, host to guest"), PINGS, answered);
    ensure!(answered == PINGS, "{what}: {answered} of {PINGS} pings were answered");
    let answered = guest.pings(console, tap.address).await?;
    report.pings(&format!("{what}, guest to host"), PINGS, answered);
    ensure!(answered == PINGS, "{what}: the guest had {answered} of {PINGS} answers");
    Ok(())
}

/// Both directions of ping, then a transfer.
async fn expect_network(
    guest: Guest,
    console: &mut Console,
    tap: &Tap,
    what: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    expect_pings(guest, console, tap, what, report).await?;
    let echo = Echo::listen(tap.address)?;
    guest.start_echo(console, &echo, tap.address).await?;
    let took = echo.run(CLONE_TRANSFER_BYTES).await.with_context(|| format!("{what}: TCP"))?;
    report.rate(&format!("{what}, TCP"), CLONE_TRANSFER_BYTES, took);
    Ok(())
}

async fn road(stage: Stage, guest: Guest) -> anyhow::Result<()> {
    let mut report = Report(guest, String::new());
    let result = stations(&stage, guest, &mut report).await;
    std::fs::write(stage.logs.join("network.txt"), &report.1)?;
    result
}

async fn stations(stage: &Stage, guest: Guest, report: &mut Report) -> anyhow::Result<()> {
    let (tap, other) = (Tap::new([10, 77, 0, 1])?, Tap::new([10, 78, 0, 1])?);
    let daemon = Daemon::start(stage).await?;
    let mut client = daemon.client().await?;
    let image = guest.import(&mut client).await?;
    let request = CreateVmRequest {
        source: Some(Source::Image(image)),
        networks: vec![plugged(&tap)],
        ..Default::default()
    };
    let vm = client.boot(request).await.context("cold boot")?.vm;
    let mut source = client.console(&vm.id).await?;
    guest.wait_ready(&mut source).await?;
    guest.address(&mut source, tap.guest(), None).await?;
    ensure!(guest.link_up(&mut source).await?, "the link is not up");
    expect_pings(guest, &mut source, &tap, "source", report).await?;

    // A transfer with a snapshot in its middle.
    let bytes = TRANSFER_BYTES;
    let echo = Echo::listen(tap.address)?;
    guest.start_echo(&mut source, &echo, tap.address).await?;
    let returned = Arc::clone(&echo.returned);
    let transfer = tokio::spawn(echo.run(bytes));
    eventually("half of the transfer", 120, async || {
        ensure!(!transfer.is_finished(), "the transfer ended early");
        Ok(returned.load(Ordering::Relaxed) >= bytes / 2)
    })
    .await?;
    let pinging = tokio::spawn(ping(tap.guest(), 5 * PINGS));
    let snapshot = client.snapshot(&vm.id, "under-way").await.context("snapshot")?.id;
    let took = transfer.await?.context("the source's transfer, through the snapshot")?;
    report.rate("source, TCP through a snapshot", bytes, took);
    report.pings("source, host to guest through a snapshot", 5 * PINGS, pinging.await??);
    let counted = stats(&mut client, &vm).await?;
    report.line(&format!("source: {counted:?}"));
    ensure!(counted.bytes_in > bytes && counted.bytes_out > bytes, "{counted:?}");
    let dropped = [
        counted.dropped_in_bad,
        counted.dropped_in_too_long,
        counted.dropped_out_bad,
        counted.dropped_out_no_link,
    ];
    ensure!(dropped == [0; 4], "frames were dropped: {counted:?}");
    // Without the host's and the guest's offloads every frame would be one of 1514 bytes.
    ensure!(counted.bytes_in / counted.frames_in > 2000, "no large segments to the guest: {counted:?}");
    ensure!(counted.bytes_out / counted.frames_out > 2000, "no large segments from the guest: {counted:?}");

    // In another network: the old connection finds nobody, and everything new works.
    let moved =
        clone(&mut client, &snapshot, vec![plugged(&other)]).await.context("a clone on another TAP")?;
    ensure!(moved.networks[0].mac == vm.networks[0].mac, "{moved:?}");
    let mut console = client.console(&moved.id).await?;
    // The snapshot was taken while the transfer went on.
    ensure!(guest.echoes(&mut console).await?, "the clone's transfer is not under way");
    guest.address(&mut console, other.guest(), Some(tap.guest())).await?;
    expect_network(guest, &mut console, &other, "clone", report).await?;
    // Without a link: the guest sees that, and lives.
    let mut quiet = clone(&mut client, &snapshot, vec![]).await.context("a clone without a link")?;
    let mut console = client.console(&quiet.id).await?;
    ensure!(!guest.link_up(&mut console).await?, "a link that is up without a link");
    // Snapshots of clones, and links that come back.
    let again = client.snapshot(&quiet.id, "quiet").await?.id;
    client.delete_vm(&quiet.id).await?;
    client.delete_vm(&moved.id).await?;
    quiet = clone(&mut client, &again, vec![plugged(&other)]).await.context("a clone with a link again")?;
    let mut console = client.console(&quiet.id).await?;
    ensure!(guest.link_up(&mut console).await?, "a link that is down with a link");
    guest.address(&mut console, other.guest(), Some(tap.guest())).await?;
    expect_network(guest, &mut console, &other, "clone of a clone", report).await?;
    client.delete_vm(&quiet.id).await?;

    // The source boots again in place, with its link.
    guest.reboot(&mut source).await?;
    guest.wait_ready(&mut source).await.context("after the reboot")?;
    guest.address(&mut source, tap.guest(), None).await?;
    expect_network(guest, &mut source, &tap, "after a reboot", report).await?;

    // Its heir in the same network: the peer has closed the connection that it knows, and says so.
    client.delete_vm(&vm.id).await?;
    let heir =
        clone(&mut client, &snapshot, vec![plugged(&tap)]).await.context("a clone on the source's TAP")?;
    let mut console = client.console(&heir.id).await?;
    let deadline = Instant::now() + limit(60);
    while guest.echoes(&mut console).await? {
        ensure!(Instant::now() < deadline, "the heir's old connection does not end");
    }
    expect_network(guest, &mut console, &tap, "clone in the source's place", report).await
}
