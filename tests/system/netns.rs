//! TAPs in network namespaces: of one name and address, one for each VM. (What goes over a TAP is tried in `network/*`.)

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::network_interface::Link;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::{Code, Status};

use crate::client::{Client, expect_status};
use crate::daemon::{Daemon, eventually};
use crate::host::Need;
use crate::trial::{Stage, trial};

/// The same in every namespace.
const ADDRESS: &str = "10.76.0.1/24";

pub fn trials() -> Vec<Trial> {
    const ANY_GUEST: &[Need] = &[Need::Kvm, Need::Tap, Need::Netns];
    vec![trial("netns/taps", ANY_GUEST, 60, taps)]
}

/// Whether network namespaces can be made here; the error is the reason.
pub fn available() -> Result<(), String> {
    Netns::new().map(drop).map_err(|error| format!("no network namespace can be made here: {error:#}"))
}

/// A network namespace with a TAP `tap0` that has the address [`ADDRESS`], made as an administrator does; removed at the end.
struct Netns(String);

impl Netns {
    fn new() -> anyhow::Result<Netns> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("cs{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let netns = Netns(name);
        ip(&["-n", &netns.0, "tuntap", "add", "dev", "tap0", "mode", "tap"])?;
        ip(&["-n", &netns.0, "addr", "add", ADDRESS, "dev", "tap0"])?;
        ip(&["-n", &netns.0, "link", "set", "tap0", "up"])?;
        Ok(netns)
    }

    fn plugged(&self) -> NetworkInterface {
        NetworkInterface {
            link: Some(Link::Tap("tap0".into())),
            netns: self.0.clone(),
            ..NetworkInterface::default()
        }
    }

    /// Whether a VM has the TAP: it has a carrier then.
    fn taken(&self) -> anyhow::Result<bool> {
        Ok(ip(&["-n", &self.0, "link", "show", "dev", "tap0"])?.contains("LOWER_UP"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.0]) {
            eprintln!("the network namespace {} is left behind: {error:#}", self.0);
        }
    }
}

/// Runs iproute2; gives what it says.
fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments).output().context("running `ip` (iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {}`: {}", arguments.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn clone(client: &mut Client, snapshot: &str, network: NetworkInterface) -> Result<Vm, Status> {
    let request = CloneVmRequest {
        snapshot: snapshot.into(),
        identity: Identity::Unmanaged.into(),
        networks: vec![network],
        ..Default::default()
    };
    let mut vms = client.vms.clone_vm(request).await?.into_inner().vms;
    vms.pop().ok_or_else(|| Status::internal("trial: no clone in the answer"))
}

/// TAPs of one name in several namespaces, and those that cannot be had.
async fn taps(stage: Stage) -> anyhow::Result<()> {
    let (one, two) = (Netns::new()?, Netns::new()?);
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let with = |network: NetworkInterface| CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus: 1,
        memory_bytes: 64 << 20,
        networks: vec![network],
        ..Default::default()
    };
    let tap = |name: &str| Some(Link::Tap(name.into()));
    for (what, network, code, words) in [
        (
            "a namespace that is not there",
            NetworkInterface { netns: "cs-none".into(), ..one.plugged() },
            Code::NotFound,
            "ip netns add cs-none",
        ),
        (
            "a TAP that is not in the namespace",
            NetworkInterface { link: tap("tap9"), ..one.plugged() },
            Code::NotFound,
            &one.0,
        ),
        ("no TAP", NetworkInterface { link: tap("lo"), ..one.plugged() }, Code::FailedPrecondition, &one.0),
        (
            "a path",
            NetworkInterface { netns: "../netns/x".into(), ..one.plugged() },
            Code::InvalidArgument,
            "network namespace",
        ),
        ("no link", NetworkInterface { link: None, ..one.plugged() }, Code::InvalidArgument, "netns"),
    ] {
        let message = expect_status(what, client.boot(with(network)).await, &[code])?;
        ensure!(message.contains(words), "{what}: {message}");
    }
    ensure!(client.list_vms().await?.is_empty(), "a VM was left");

    ensure!(!one.taken()? && !two.taken()?, "a refused request has a TAP");
    let vm = client.boot(with(one.plugged())).await?.vm;
    let link = format!("TAP tap0 in network namespace {}", one.0);
    ensure!(vm.networks[0].link == link, "{vm:?}");
    ensure!(one.taken()? && !two.taken()?, "not the TAP of the namespace that was asked for");
    // The daemon itself is where it was: TAPs without a namespace are the host's.
    let host = NetworkInterface { link: tap("tap-of-no-host"), ..Default::default() };
    expect_status("a TAP that the host has not", client.boot(with(host)).await, &[Code::NotFound])?;
    let snapshot = client.snapshot(&vm.id, "").await?.id;
    expect_status(
        "a clone on its source's TAP",
        clone(&mut client, &snapshot, one.plugged()).await,
        &[Code::FailedPrecondition],
    )?;
    let began = Instant::now();
    let other = clone(&mut client, &snapshot, two.plugged()).await?;
    let linked = began.elapsed();
    let began = Instant::now();
    let quiet = clone(&mut client, &snapshot, NetworkInterface::default()).await?;
    let figures = format!("clone with a TAP in a namespace {linked:.1?}, without {:.1?}", began.elapsed());
    println!("  netns/taps: {figures}");
    std::fs::write(stage.logs.join("netns.txt"), figures)?;
    ensure!(one.taken()? && two.taken()?, "one of the two has no TAP");
    ensure!(quiet.networks[0].link == "no link", "{quiet:?}");
    client.delete_vm(&vm.id).await?;
    client.delete_vm(&other.id).await?;
    eventually("both TAPs free again", 10, async || Ok(!one.taken()? && !two.taken()?)).await
}
