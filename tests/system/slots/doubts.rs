//! What the host does beside the service, and what may be missing on it: its memory of connections, a restart, IPv6, other programs' rules.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::*;

use super::world::{BEYOND, BEYOND_PRIVATE, ECHO, HOST, HOST6, World, ask, call, inside, slots_of};
use super::{addresses, allowed, base, clone, guest_asks, port, who, words};
use crate::daemon::{Daemon, eventually};
use crate::trial::Stage;

/// A client that asks from one port.
struct Asker(UdpSocket);

impl Asker {
    fn new(netns: &str, to: (&str, u16)) -> anyhow::Result<Self> {
        let socket = inside(netns, || {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            socket.connect(to)?;
            Ok(socket)
        })?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        Ok(Self(socket))
    }

    /// What it is answered; what came to an earlier question is no answer.
    fn ask(&self, words: &str) -> Option<String> {
        let mut bytes = [0; 1500];
        self.0.set_nonblocking(true).ok()?;
        while self.0.recv(&mut bytes).is_ok() {}
        self.0.set_nonblocking(false).ok()?;
        // A refusal is no answer, either.
        self.0.send(words.as_bytes()).ok()?;
        let count = self.0.recv(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes[..count]).into_owned())
    }
}

/// A client that never stops asking a published port by UDP, from one port of its own, is led to whoever has it now: not to a VM that is gone, nor to whoever
/// has that VM's address later.
pub async fn forgotten(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    // Four are all that there can be: addresses come again at once.
    let four = words(&["--networks", "1", "--slot-network", "10.77.5.0/28"]);
    let daemon = Daemon::start_inside(&stage, &world.host, &four).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let led = || SlotLink { publish: vec![port(5353, 53, Transport::Udp)], ..SlotLink::default() };
    let asker = Asker::new(&world.beyond, (HOST, 5353))?;
    ensure!(asker.ask("before").is_none(), "somebody answers");
    let one = clone(&mut client, &snapshot, "one", led()).await?;
    let said = asker.ask("a");
    ensure!(
        said.as_deref() == Some("one a"),
        "what was asked before it was published is led past it: {said:?}"
    );
    client.delete_vm(&one.id).await?;
    // It goes on asking while nobody has the port.
    ensure!(asker.ask("between").is_none());
    let two = clone(&mut client, &snapshot, "two", led()).await?;
    let begin = Instant::now();
    eventually("the next VM is asked", 10, async || Ok(asker.ask("b").as_deref() == Some("two b"))).await?;
    // The kernel by itself forgets after 30 s without a packet.
    ensure!(begin.elapsed() < Duration::from_secs(10), "after {:?}", begin.elapsed());

    let [address, _] = addresses(&two)?;
    client.delete_vm(&two.id).await?;
    for n in 0..8 {
        ensure!(asker.ask("c").is_none(), "a VM is asked that has published nothing");
        let heir = clone(&mut client, &snapshot, &format!("heir-{n}"), SlotLink::default()).await?;
        if addresses(&heir)?[0] == address {
            for _ in 0..3 {
                let said = asker.ask("d");
                ensure!(said.is_none(), "the next VM with the address of the last is asked: {said:?}");
            }
            ensure!(who(&world.host, &address)? == Some(heir.name.clone()), "it answers nobody");
            return Ok(());
        }
        client.delete_vm(&heir.id).await?;
    }
    bail!("{address} did not come again")
}

/// Stopped with `--keep-vms` and started again: networks, lists and ports go on, meanwhile and after.
pub async fn kept(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    let arguments = words(&["--networks", "2", "--keep-vms"]);
    let mut daemon = Daemon::start_inside(&stage, &world.host, &arguments).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let link = SlotLink {
        allow: vec![allowed(BEYOND_PRIVATE, ECHO)],
        publish: vec![port(8080, 80, Transport::Tcp), port(5353, 53, Transport::Udp)],
        ..SlotLink::default()
    };
    let kept = clone(&mut client, &snapshot, "kept", link).await?;
    let works = || -> anyhow::Result<()> {
        for address in addresses(&kept)? {
            ensure!(who(&world.host, &address)?.as_deref() == Some("kept"), "{address} is not reached");
        }
        ensure!(call(&world.beyond, HOST, 8080, "hello")? == "kept hello");
        ensure!(ask(&world.beyond, HOST, 5353, "hello")?.as_deref() == Some("kept hello"));
        Ok(())
    };
    works()?;
    // One that has not ended yet when the service goes on.
    let asker = Asker::new(&world.beyond, (HOST, 5353))?;
    ensure!(asker.ask("a").as_deref() == Some("kept a"));
    for round in 0..2 {
        ensure!(daemon.stop().await?.success());
        works().with_context(|| format!("without a service, {round}"))?;
        // Those that stood ready are gone.
        ensure!(world.links()?.len() == 1, "{:?}", world.links()?);
        daemon.start_again().await?;
        let mut client = daemon.client().await?;
        works().with_context(|| format!("after a restart, {round}"))?;
        ensure!(client.vm(&kept.id).await?.networks == kept.networks);
        ensure!(guest_asks(&client, &kept, BEYOND_PRIVATE).await?.is_some(), "what was allowed is not");
        ensure!(guest_asks(&client, &kept, BEYOND).await?.is_none(), "what was not allowed is");
        ensure!(asker.ask("b").as_deref() == Some("kept b"), "a conversation was broken");
    }
    let mut client = daemon.client().await?;
    // Its ports are held again.
    let taken = SlotLink { publish: vec![port(8080, 80, Transport::Tcp)], ..SlotLink::default() };
    ensure!(clone(&mut client, &snapshot, "", taken.clone()).await.is_err());
    ensure!(
        inside(&world.host, || Ok(std::net::TcpListener::bind(("0.0.0.0", 8080)).is_err()))?,
        "a program can have the port"
    );
    client.delete_vm(&kept.id).await?;
    clone(&mut client, &snapshot, "next", taken).await?;
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "next hello");
    Ok(())
}

/// On a host whose IPv6 is switched off everything works by IPv4, and nobody is told of addresses that lead nowhere.
pub async fn without_ipv6(stage: Stage) -> anyhow::Result<()> {
    let world = World::new()?;
    inside(&world.host, || {
        for which in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1")?;
        }
        Ok(())
    })?;
    let mut daemon = Daemon::start_inside(&stage, &world.host, &words(&["--networks", "2"])).await?;
    let mut client = daemon.client().await?;
    let snapshot = base(&mut client).await?;
    let link = SlotLink {
        allow: vec![allowed(BEYOND_PRIVATE, ECHO), allowed("::/0", 0)],
        publish: vec![port(8080, 80, Transport::Tcp), port(5353, 53, Transport::Udp)],
        ..SlotLink::default()
    };
    let vm = clone(&mut client, &snapshot, "one", link).await?;
    let network = vm.networks.first().context("no interface")?;
    ensure!(network.slot_address6.is_empty(), "{network:?}");
    ensure!(who(&world.host, &network.slot_address)?.as_deref() == Some("one"));
    ensure!(call(&world.beyond, HOST, 8080, "hello")? == "one hello");
    ensure!(call(&world.host, "127.0.0.1", 8080, "hello")? == "one hello");
    ensure!(ask(&world.beyond, HOST, 5353, "hello")?.as_deref() == Some("one hello"));
    ensure!(guest_asks(&client, &vm, BEYOND_PRIVATE).await?.is_some());
    ensure!(guest_asks(&client, &vm, BEYOND).await?.is_none());
    ensure!(call(&world.beyond, HOST6, 8080, "hello").is_err(), "the host has IPv6 after all");
    let usual = clone(&mut client, &snapshot, "usual", SlotLink::default()).await?;
    ensure!(guest_asks(&client, &usual, BEYOND).await?.is_some());
    let tag = world.tables()?.split_once("coldspark_").context("no table")?.1.trim().to_owned();
    let log = daemon.log()?;
    ensure!(!log.contains("ERROR"), "{log}");
    ensure!(daemon.stop().await?.success());
    ensure!(world.links()?.is_empty() && slots_of(&tag)?.is_empty());
    Ok(())
}
