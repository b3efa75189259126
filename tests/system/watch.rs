//! Looking at a boot: its profile when it goes well, the watchdog's words when it does not.

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::*;
use libtest_mimic::Trial;

use crate::client::console_pattern;
use crate::daemon::Daemon;
use crate::host::Need;
use crate::trial::{Stage, trial};

const KVM: &[Need] = &[Need::Kvm];

pub fn trials() -> Vec<Trial> {
    vec![trial("watch/profile", KVM, 60, profile)]
}

fn embedded(vcpus: u32) -> CreateVmRequest {
    CreateVmRequest {
        source: Some(Source::Embedded(true)),
        vcpus,
        memory_bytes: 64 << 20,
        ..Default::default()
    }
}

/// Every phase is there, in order, and the guest's counter runs with the host's clock.
async fn profile(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let agent = CreateVmRequest { profile: true, ..embedded(2) };
    let pattern = CreateVmRequest { ready: console_pattern("COLDSPARK-READY"), ..agent.clone() };
    for request in [agent, pattern] {
        let boot = client.boot(request).await?;
        let profile = boot.profile.context("no profile, though asked for")?;
        let names: Vec<&str> = profile.phases.iter().map(|phase| phase.name.as_str()).collect();
        let wanted = [
            "image and disks open",
            "worker taken",
            "worker told",
            "memory mapped",
            "VM made",
            "devices made",
            "kernel loaded",
            "vCPUs made",
            "kernel entry",
            "first console byte",
            "ready",
        ];
        ensure!(names == wanted, "phases {names:?}");
        ensure!(profile.phases.windows(2).all(|two| two[0].us <= two[1].us), "times: {profile:?}");
        let us = |name: &str| profile.phases.iter().find(|phase| phase.name == name).map(|phase| phase.us);
        ensure!(profile.own_us.is_some() && profile.own_us == us("kernel entry"), "{profile:?}");
        ensure!(us("kernel entry") < us("ready") && us("ready") <= Some(boot.vm.start_us), "{profile:?}");

        // The counter was there before its reading, just before the guest began.
        let ticks: Vec<u64> = profile.phases.iter().filter_map(|phase| phase.guest_tsc).collect();
        ensure!(profile.tsc_khz > 0 && ticks.len() >= 3, "{profile:?}");
        ensure!(ticks.windows(2).all(|two| two[0] <= two[1]), "counter: {profile:?}");
        let entry = profile.phases.iter().find(|phase| phase.name == "kernel entry");
        ensure!(entry.is_some_and(|entry| entry.guest_tsc.is_some()), "{profile:?}");
        // What the guest reads later is later, by its own counter.
        let now = crate::client::ask!(&mut client, &boot.vm.id, Time(TimeOp {})).tsc;
        ensure!(Some(&now) > ticks.last(), "the guest reads {now}, after {profile:?}");
    }
    ensure!(client.boot(embedded(1)).await?.profile.is_none(), "a profile that nobody asked for");
    Ok(())
}
