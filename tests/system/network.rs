//! Networks: packets both ways between a guest and the host's TAP, through snapshots, clones and reboots; and TAPs that
//! cannot be had.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};

use crate::client::{Client, expect_status};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::host::{self, Need};
use crate::linux::{self, PROMPT, shell};
use crate::tap::{self, Echo, Tap};
use crate::trial::{Stage, trial};

/// What goes each way over TCP, in one connection, while a snapshot is taken: on a host, and in the rig, which moves about
/// 1 MB a second when it shares its processors.
const TRANSFER_BYTES: u64 = 256 << 20;
const RIG_TRANSFER_BYTES: u64 = 48 << 20;
/// The same in a clone.
const CLONE_TRANSFER_BYTES: u64 = 8 << 20;
/// Linux's setting for the least number of MTUs in a segment that the interface cuts, and its largest sensible value.
const MIN_SEGMENTS: (&str, &str) = ("/proc/sys/net/ipv4/tcp_min_tso_segs", "44");
const PINGS: u16 = 20;
const PING_EVERY: Duration = Duration::from_millis(50);

pub fn trials() -> Vec<Trial> {
    const ANY_GUEST: &[Need] = &[Need::Kvm, Need::Tap];
    const LINUX: &[Need] = &[Need::Kvm, Need::KernelMode, Need::LinuxGuest, Need::Tap];
    vec![
        trial("network/taps-that-cannot-be-had", ANY_GUEST, 60, refusals),
        trial("network/linux", LINUX, 150, linux_road),
    ]
}

fn plugged(tap: &Tap) -> NetworkInterface {
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
#[derive(Default)]
struct Report(String);

impl Report {
    fn line(&mut self, line: &str) {
        println!("  network: {line}");
        let _ = writeln!(self.0, "{line}");
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

async fn ping(to: Ipv4Addr, count: u16) -> anyhow::Result<u16> {
    tokio::task::spawn_blocking(move || tap::ping(to, count, PING_EVERY)).await?
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

/// Gives the guest's interface an address.
async fn address(console: &mut Console, address: &str) -> anyhow::Result<()> {
    let command = format!(
        "ip addr flush dev eth0; ip link set eth0 up; ip addr add {address}/24 dev eth0 && echo good"
    );
    let said = shell(console, &command).await?;
    ensure!(said == "good", "no address: {said}");
    if host::in_rig() {
        // The rig's processors are so slow that Linux takes the link for one of 100 kB/s and makes small segments, which
        // keep it as slow. So both sides are told to make large ones.
        std::fs::write(MIN_SEGMENTS.0, MIN_SEGMENTS.1)?;
        shell(console, &format!("echo {} >{}", MIN_SEGMENTS.1, MIN_SEGMENTS.0)).await?;
    }
    Ok(())
}

/// Pings of the guest to the host; gives how many were answered.
async fn guest_pings(console: &mut Console, to: Ipv4Addr) -> anyhow::Result<u16> {
    let said = shell(console, &format!("ping -q -c {PINGS} -i 0.05 -W 10 {to} | grep received")).await?;
    let received = said.split(", ").find_map(|part| part.strip_suffix(" packets received"));
    received
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no count of answers in {said:?}"))
}

/// Has the guest send back what it gets, in the background.
async fn start_echo(console: &mut Console, echo: &Echo, to: Ipv4Addr) -> anyhow::Result<()> {
    let said = shell(console, &format!("nc {to} {} -e cat & echo started", echo.port()?)).await?;
    ensure!(said.ends_with("started"), "{said}");
    Ok(())
}

/// Both directions of ping, then a transfer.
async fn expect_network(
    console: &mut Console,
    tap: &Tap,
    guest: [u8; 4],
    what: &str,
    report: &mut Report,
) -> anyhow::Result<()> {
    let answered = ping(guest.into(), PINGS).await?;
    report.pings(&format!("{what}, host to guest"), PINGS, answered);
    ensure!(answered == PINGS, "{what}: {answered} of {PINGS} pings were answered");
    let answered = guest_pings(console, tap.address).await?;
    report.pings(&format!("{what}, guest to host"), PINGS, answered);
    ensure!(answered == PINGS, "{what}: the guest had {answered} of {PINGS} answers");
    let echo = Echo::listen(tap.address)?;
    start_echo(console, &echo, tap.address).await?;
    let took = echo.run(CLONE_TRANSFER_BYTES).await.with_context(|| format!("{what}: TCP"))?;
    report.rate(&format!("{what}, TCP"), CLONE_TRANSFER_BYTES, took);
    Ok(())
}

/// Bytes of the large transfer; `COLDSPARK_NETWORK_MIB` says otherwise.
fn transfer_bytes() -> u64 {
    let asked = std::env::var("COLDSPARK_NETWORK_MIB").ok().and_then(|mib| mib.parse::<u64>().ok());
    let usual = if host::in_rig() { RIG_TRANSFER_BYTES } else { TRANSFER_BYTES };
    asked.map_or(usual, |mib| mib << 20)
}

async fn linux_road(stage: Stage) -> anyhow::Result<()> {
    let mut report = Report::default();
    let result = linux_stations(&stage, &mut report).await;
    std::fs::write(stage.logs.join("network.txt"), &report.0)?;
    result
}

async fn linux_stations(stage: &Stage, report: &mut Report) -> anyhow::Result<()> {
    const GUEST: [u8; 4] = [10, 77, 0, 2];
    const CLONE: [u8; 4] = [10, 78, 0, 2];
    let (tap, other) = (Tap::new([10, 77, 0, 1])?, Tap::new([10, 78, 0, 1])?);
    let daemon = Daemon::start(stage).await?;
    let mut client = daemon.client().await?;
    linux::import(&mut client, BootProtocol::Linux).await?;
    let request = CreateVmRequest {
        source: Some(Source::Image("linux".into())),
        networks: vec![plugged(&tap)],
        ..Default::default()
    };
    let vm = client.boot(request).await.context("cold boot")?.vm;
    let mut source = client.console(&vm.id).await?;
    source.expect("LINUX-READY ").await?;
    source.expect(PROMPT).await?;
    let seen = shell(&mut source, "cat /sys/class/net/eth0/address").await?;
    let mac: Vec<String> = vm.networks[0].mac.iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(seen == mac.join(":"), "the guest's address is {seen}, the service says {mac:?}");
    address(&mut source, "10.77.0.2").await?;
    ensure!(shell(&mut source, "cat /sys/class/net/eth0/carrier").await? == "1", "no carrier");

    let answered = ping(GUEST.into(), PINGS).await?;
    report.pings("source, host to guest", PINGS, answered);
    ensure!(answered == PINGS, "{answered} of {PINGS} pings were answered");
    let answered = guest_pings(&mut source, tap.address).await?;
    report.pings("source, guest to host", PINGS, answered);
    ensure!(answered == PINGS, "the guest had {answered} of {PINGS} answers");

    // A transfer with a snapshot in its middle.
    let bytes = transfer_bytes();
    let echo = Echo::listen(tap.address)?;
    start_echo(&mut source, &echo, tap.address).await?;
    let returned = Arc::clone(&echo.returned);
    let transfer = tokio::spawn(echo.run(bytes));
    eventually("half of the transfer", 120, async || {
        ensure!(!transfer.is_finished(), "the transfer ended early");
        Ok(returned.load(Ordering::Relaxed) >= bytes / 2)
    })
    .await?;
    let pinging = tokio::spawn(ping(GUEST.into(), 5 * PINGS));
    let snapshot = client.snapshot(&vm.id, "under-way").await.context("snapshot")?.id;
    let took = transfer.await?.context("the source's transfer, through the snapshot")?;
    report.rate("source, TCP through a snapshot", bytes, took);
    report.pings("source, host to guest through a snapshot", 5 * PINGS, pinging.await??);
    let counted = stats(&mut client, &vm).await?;
    report.line(&format!("source: {counted:?}"));
    ensure!(counted.bytes_in > bytes && counted.bytes_out > bytes, "{counted:?}");
    ensure!(
        [
            counted.dropped_in_bad,
            counted.dropped_in_too_long,
            counted.dropped_out_bad,
            counted.dropped_out_no_link
        ] == [0; 4],
        "frames were dropped: {counted:?}"
    );
    // Without the host's and the guest's offloads every frame would be one of 1514 bytes.
    ensure!(counted.bytes_in / counted.frames_in > 2000, "no large segments to the guest: {counted:?}");
    ensure!(counted.bytes_out / counted.frames_out > 2000, "no large segments from the guest: {counted:?}");

    // In another network: the old connection finds nobody, and everything new works.
    let moved =
        clone(&mut client, &snapshot, vec![plugged(&other)]).await.context("a clone on another TAP")?;
    ensure!(moved.networks[0].mac == vm.networks[0].mac, "{moved:?}");
    let mut console = client.console(&moved.id).await?;
    // The snapshot was taken while the transfer went on.
    ensure!(shell(&mut console, "pidof cat >/dev/null && echo under way").await? == "under way");
    address(&mut console, "10.78.0.2").await?;
    expect_network(&mut console, &other, CLONE, "clone", report).await?;
    // Without a link: the guest sees that, and lives.
    let mut quiet = clone(&mut client, &snapshot, vec![]).await.context("a clone without a link")?;
    let mut console = client.console(&quiet.id).await?;
    ensure!(shell(&mut console, "cat /sys/class/net/eth0/carrier").await? == "0", "a carrier without a link");
    // Snapshots of clones, and links that come back.
    let again = client.snapshot(&quiet.id, "quiet").await?.id;
    client.delete_vm(&quiet.id).await?;
    client.delete_vm(&moved.id).await?;
    quiet = clone(&mut client, &again, vec![plugged(&other)]).await.context("a clone with a link again")?;
    let mut console = client.console(&quiet.id).await?;
    ensure!(shell(&mut console, "cat /sys/class/net/eth0/carrier").await? == "1", "no carrier with a link");
    address(&mut console, "10.78.0.2").await?;
    expect_network(&mut console, &other, CLONE, "clone of a clone", report).await?;

    // The source boots again in place, with its link.
    source.type_line("reboot -f").await?;
    source.expect("LINUX-READY ").await.context("after the reboot")?;
    source.expect(PROMPT).await?;
    address(&mut source, "10.77.0.2").await?;
    expect_network(&mut source, &tap, GUEST, "after a reboot", report).await?;

    // Its heir in the same network: the peer has closed the connection that it knows, and says so.
    client.delete_vm(&vm.id).await?;
    let heir =
        clone(&mut client, &snapshot, vec![plugged(&tap)]).await.context("a clone on the source's TAP")?;
    let mut console = client.console(&heir.id).await?;
    let ended = shell(&mut console, "while pidof cat >/dev/null; do sleep 0.1; done; echo ended").await?;
    ensure!(ended.ends_with("ended"), "{ended}");
    expect_network(&mut console, &tap, GUEST, "clone in the source's place", report).await
}
