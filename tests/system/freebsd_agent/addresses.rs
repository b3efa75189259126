//! Addresses of clones: they have those that they were given, with which packets really travel, and those of their snapshot no more.

use std::net::Ipv6Addr;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use super::{Machine, setting};
use crate::client::{Client, expect_status};
use crate::commands::{put, run};
use crate::console::Console;
use crate::daemon::{Daemon, eventually};
use crate::freebsd::{PROMPT, ask};
use crate::host::{self, Need};
use crate::network;
use crate::tap::six::link_local;
use crate::tap::{Echo, Tap};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsdAgent, Need::FreeBsdNetwork, Need::Tap];
const NEEDS_SIX: &[Need] = &[
    Need::Kvm,
    Need::KernelMode,
    Need::FreeBsdAgent,
    Need::FreeBsdNetwork,
    Need::FreeBsdNetwork6,
    Need::Tap,
];
const NEEDS_FOUR_ONLY: &[Need] =
    &[Need::Kvm, Need::KernelMode, Need::FreeBsdWithout6, Need::FreeBsdNetwork, Need::Tap];
/// How often a guest asks whether somebody has a new address, once a second.
const SEARCHES: (&str, u32) = ("net.inet6.ip6.dad_count", 100_000);
const TRANSFER_BYTES: u64 = 1 << 20;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("freebsd/agent/addresses", NEEDS, 120, |stage| addresses(stage, 1)),
        trial("freebsd/agent/addresses/4-vcpu", NEEDS, 180, |stage| addresses(stage, 4)),
        trial("freebsd/agent/ipv6", NEEDS_SIX, 120, |stage| six(stage, 1)),
        trial("freebsd/agent/ipv6/4-vcpu", NEEDS_SIX, 180, |stage| six(stage, 4)),
        trial("freebsd/agent/kernel-without-ipv6", NEEDS_FOUR_ONLY, 120, four_only),
    ]
}

/// Boots a machine on this TAP, and gives it the TAP's address for guests; its id and console.
async fn boot(client: &mut Client, machine: Machine, tap: &Tap) -> anyhow::Result<(String, Console)> {
    let vm = Machine { networks: vec![network::plugged(tap)], ..machine }.boot(client).await?;
    let mut console = client.console(&vm).await?;
    console.expect(PROMPT).await?;
    let said = ask(&mut console, &format!("ifup vtnet0 {}/24", tap.guest())).await?;
    ensure!(said.contains("ifup=0"), "no address: {said}");
    Ok((vm, console))
}

/// Pings from the guest; it sends one when the one before has been answered, or after ten seconds.
async fn reaches(console: &mut Console, to: impl std::fmt::Display, count: u16) -> anyhow::Result<()> {
    let said = ask(console, &format!("icmp {to} {count}")).await?;
    ensure!(said.contains(&format!("got={count}")), "{to} does not answer the guest: {said}");
    Ok(())
}

/// Has the guest answer, sooner or later, to one ping at a time: FreeBSD 12 keeps one packet while it asks who is to get it.
async fn answers_at(tap: &Tap, address: Ipv6Addr, otherwise: &str) -> anyhow::Result<()> {
    eventually("an answer to a ping", 60, async || Ok(tap.ping_six(address, 1).await? == 1))
        .await
        .with_context(|| format!("{address}: {otherwise}"))
}

async fn addresses(stage: Stage, vcpus: u32) -> anyhow::Result<()> {
    let (tap, other) = (Tap::new([10, 83, 0, 1])?, Tap::new([10, 84, 0, 1])?);
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let machine = Machine { vcpus, ..Machine::usual(AgentPort::Virtio)? };
    let (vm, _) = boot(&mut client, machine, &tap).await?;
    ensure!(network::ping(tap.guest(), 3).await? > 0, "the source does not answer");
    let snapshot = client.snapshot(&vm, "base").await?.id;
    client.delete_vm(&vm).await?;

    let given =
        network::given(&other, &["10.84.0.9/24", "10.84.0.10/32", "fd84::9/64"], &["10.84.0.1", "fe80::1"]);
    let moved = network::managed(&mut client, &snapshot, vec![given]).await.context("other addresses")?;
    ensure!(moved.networks[0].addresses.len() == 3 && moved.networks[0].gateways.len() == 2, "{moved:?}");
    for address in [[10, 84, 0, 9], [10, 84, 0, 10]] {
        ensure!(network::ping(address.into(), 3).await? > 0, "no answer from {address:?}");
    }
    // Through its gateway, to an address of this host that is none of its own network's.
    let mut console = client.console(&moved.id).await?;
    reaches(&mut console, tap.address, 3).await.context("its default route leads nowhere")?;

    let beside = network::managed(
        &mut client,
        &snapshot,
        vec![network::given(&tap, &["10.83.0.9/24"], &["10.83.0.1"])],
    )
    .await
    .context("another address in the source's network")?;
    ensure!(network::ping([10, 83, 0, 9].into(), 3).await? > 0, "no answer from the second clone");
    ensure!(network::ping(tap.guest(), 1).await? == 0, "it answers to its source's address, too");
    // Its clone is given others again, and loses the default routes with them.
    let again = client.snapshot(&beside.id, "again").await?.id;
    client.delete_vm(&beside.id).await?;
    let last =
        network::managed(&mut client, &again, vec![network::given(&tap, &["10.83.0.7/24"], &[])]).await?;
    ensure!(network::ping([10, 83, 0, 7].into(), 3).await? > 0, "no answer from a clone's clone");
    let mut console = client.console(&last.id).await?;
    let said = ask(&mut console, &format!("icmp {} 1", other.address)).await?;
    ensure!(!said.contains("got=1"), "a default route is left: {said}");

    let kept = network::given(&other, &["10.84.0.11/24"], &[]);
    client.delete_vm(&moved.id).await?;
    let second = NetworkInterface { link: Some(Link::Down(true)), ..Default::default() };
    let refused = network::managed(&mut client, &snapshot, vec![kept, second]).await;
    expect_status("two links for one interface", refused, &[Code::InvalidArgument])?;
    Ok(())
}

/// Packets of IPv6 travel as soon as a clone is there, both ways and through its gateway, from addresses that are its own.
async fn six(stage: Stage, vcpus: u32) -> anyhow::Result<()> {
    let (tap, other) = (Tap::new([10, 85, 0, 1])?, Tap::new([10, 86, 0, 1])?);
    let gateway = "fe80::1".parse()?;
    tap.add_six(&["fd85::1".parse()?, gateway])?;
    other.add_six(&["fd86::1".parse()?, gateway])?;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let machine = Machine { vcpus, ..Machine::usual(AgentPort::Virtio)? };
    let (vm, mut console) = boot(&mut client, machine, &tap).await?;
    let source = client.vm(&vm).await?;
    // It has a link-local address of its Ethernet address, and knows its gateway's on this link.
    let made = link_local(&source.networks[0].mac)?;
    answers_at(&tap, made, "the source's link-local address").await?;
    reaches(&mut console, tap.address, 1).await.context("the source")?;
    // From now on a new address that is doubted is not used before this trial is over.
    put(&client, &vm, "/tmp/set", 0o755, &setting(SEARCHES.0, SEARCHES.1)).await?;
    run(&client, &vm, &["/tmp/set"]).await?.expect(0, "")?;
    let snapshot = client.snapshot(&vm, "base").await?.id;
    client.delete_vm(&vm).await?;

    let ear = other.listen()?;
    let given = network::given(&other, &["10.86.0.9/24", "fd86::9/64", "fd86:0:0:1::9/128"], &["fd86::1"]);
    let first = network::managed(&mut client, &snapshot, vec![given]).await.context("the first clone")?;
    ensure!(first.guest_entropy() == GuestEntropy::Drawn, "{first:?}");
    let mac = first.networks[0].mac.clone();
    ensure!(mac != source.networks[0].mac, "the clone has its source's Ethernet address");
    let mut console = client.console(&first.id).await?;
    reaches(&mut console, "fd86::1", 3).await.context("at once")?;
    reaches(&mut console, "fd85::1", 3).await.context("through its gateway")?;
    for address in ["fd86::9".parse()?, link_local(&mac)?] {
        answers_at(&other, address, "the first clone does not answer").await?;
    }
    ensure!(other.ping_six(made, 1).await? == 0, "it answers to its source's link-local address, too");
    ear.hear("fd86::9".parse()?, &mac).await?;
    ensure!(network::ping([10, 86, 0, 9].into(), 3).await? > 0, "IPv4 beside it");
    let echo = Echo::listen("fd86::1".parse::<Ipv6Addr>()?)?;
    let said = ask(&mut console, &format!("echo fd86::1 {}", echo.port()?)).await?;
    ensure!(said.contains("echo pid="), "{said}");
    echo.run(TRANSFER_BYTES).await.context("TCP")?;
    client.delete_vm(&first.id).await?;

    // Another machine under the same address, whose gateway is another one than the same address was on its source's link.
    let ear = other.listen()?;
    let given = network::given(&other, &["fd86::9/64"], &["fe80::1"]);
    let second = network::managed(&mut client, &snapshot, vec![given]).await.context("the second clone")?;
    ensure!(second.networks[0].mac != mac, "two clones have one Ethernet address");
    let mut console = client.console(&second.id).await?;
    reaches(&mut console, "fd85::1", 3).await.context("through a link-local gateway")?;
    ear.hear("fd86::9".parse()?, &second.networks[0].mac).await?;
    answers_at(&other, "fd86::9".parse()?, "the second clone does not answer").await?;

    // Its clone has the new ones only.
    let again = client.snapshot(&second.id, "again").await?.id;
    client.delete_vm(&second.id).await?;
    let given = network::given(&other, &["fd86::7/64"], &[]);
    let last = network::managed(&mut client, &again, vec![given]).await.context("a clone's clone")?;
    answers_at(&other, "fd86::7".parse()?, "a clone's clone does not answer").await?;
    ensure!(other.ping_six("fd86::9".parse()?, 1).await? == 0, "it answers to its source's address, too");
    let mut console = client.console(&last.id).await?;
    let said = ask(&mut console, "icmp fd85::1 1").await?;
    ensure!(!said.contains("got=1"), "a default route is left: {said}");
    client.delete_vm(&last.id).await?;

    // One that keeps its addresses on another link does not believe that its neighbours are who they were on its source's.
    let address = tap.address.octets();
    drop(tap);
    let tap = Tap::new(address)?;
    let kept = network::managed(&mut client, &snapshot, vec![network::plugged(&tap)]).await?;
    let mut console = client.console(&kept.id).await?;
    reaches(&mut console, tap.address, 3).await.context("on another link")?;
    client.delete_vm(&kept.id).await?;
    // And it says where they are now.
    let ear = other.listen()?;
    let kept = network::managed(&mut client, &again, vec![network::plugged(&other)]).await?;
    ear.hear("fd86::9".parse()?, &kept.networks[0].mac).await?;
    answers_at(&other, "fd86::9".parse()?, "a clone has not the addresses that it keeps").await?;
    client.delete_vm(&kept.id).await?;
    Ok(())
}

/// A kernel that knows no IPv6: its clones are given addresses of IPv4, and one that is to have others is refused with the reason.
async fn four_only(stage: Stage) -> anyhow::Result<()> {
    let (tap, other) = (Tap::new([10, 87, 0, 1])?, Tap::new([10, 88, 0, 1])?);
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (kernel, disk) = host::freebsd_without6().map_err(anyhow::Error::msg)?;
    let machine = Machine { kernel, disk, port: AgentPort::Virtio, vcpus: 1, networks: vec![] };
    let (vm, _) = boot(&mut client, machine, &tap).await?;
    let snapshot = client.snapshot(&vm, "base").await?.id;
    client.delete_vm(&vm).await?;

    let four = || vec![network::given(&other, &["10.88.0.9/24"], &["10.88.0.1"])];
    let clone = network::managed(&mut client, &snapshot, four()).await.context("addresses of IPv4")?;
    ensure!(clone.guest_entropy() == GuestEntropy::Drawn, "{clone:?}");
    ensure!(network::ping([10, 88, 0, 9].into(), 3).await? > 0, "it does not answer");
    let mut console = client.console(&clone.id).await?;
    reaches(&mut console, tap.address, 3).await.context("its default route leads nowhere")?;
    client.delete_vm(&clone.id).await?;

    let both = vec![network::given(&other, &["10.88.0.9/24", "fd88::9/64"], &["10.88.0.1"])];
    let refused = network::managed(&mut client, &snapshot, both).await;
    let message = expect_status("an address of IPv6", refused, &[Code::InvalidArgument])?;
    println!("  freebsd/agent/kernel-without-ipv6: {message}");
    ensure!(message.contains("INET6") && message.contains("IPv4 only"), "{message}");
    ensure!(client.list_vms().await?.is_empty(), "a clone is left that was not given its addresses");
    eventually("the end of its process", 20, async || Ok(other.take().is_ok())).await?;
    let last =
        network::managed(&mut client, &snapshot, four()).await.context("after one that was refused")?;
    client.delete_vm(&last.id).await?;
    Ok(())
}
