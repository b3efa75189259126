//! Making slots and taking them down, off the road of any request. Blocks: call it where that may be.

use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;

use super::addresses::Place;
use super::error::SlotError;
use super::rules::{Rules, SETTINGS4, SETTINGS6, TAP};
use super::tools;
use crate::fleet::network::{NETNS_FOLDER, NetworkError, open_tap, within};

/// As nice(1) counts. A tenth of a busy CPU: with the least of all, what takes 20 ms takes a second and a half beside a compiler.
const NICE: i32 = 10;

/// A slot that nobody has.
#[derive(Debug)]
pub struct Made {
    pub place: Place,
    /// Opened ahead: a VM's road has nothing to open.
    pub tap: OwnedFd,
}

/// Runs `work` where it takes little of the CPU from others: on a thread that is less urgent, as are the programs that it runs.
pub fn behind<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
    let failed =
        |reason: String| SlotError::Setting { path: "a thread for network slots".to_owned(), reason };
    std::thread::scope(|scope| {
        let less = || {
            // It works without, too.
            let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
            work()
        };
        let thread = std::thread::Builder::new().name("slots".into()).spawn_scoped(scope, less);
        let thread = thread.map_err(|error| failed(error.to_string()))?;
        thread.join().map_err(|_| failed("it ended in a panic".to_owned()).into())
    })
}

/// Makes a slot; on failure nothing of it is left.
pub fn make(rules: &Rules, place: Place) -> Result<Made, NetworkError> {
    let tap = lay(rules, &place).inspect_err(|_| {
        // What there is of it; the rest is not there to be removed.
        let _ = take_down(rules, &[place.number]);
    })?;
    Ok(Made { place, tap })
}

fn lay(rules: &Rules, place: &Place) -> Result<OwnedFd, NetworkError> {
    let netns = rules.netns(place.number);
    tools::ip(&rules.add_namespace(place.number))?;
    within(&netns, || {
        let six = if rules.six { &SETTINGS6[..] } else { &[] };
        SETTINGS4.iter().chain(six).try_for_each(|(path, value)| tools::set(path, value))?;
        Ok(tools::ip(&rules.interfaces(place, std::process::id()))?)
    })?;
    tools::ip(&rules.host_end(place))?;
    // For published ports that are called by 127.0.0.1.
    let veth = rules.veth(place.number);
    tools::set(&format!("/proc/sys/net/ipv4/conf/{veth}/route_localnet"), "1")?;
    within(&netns, || {
        tools::ip(&rules.routes(place))?;
        tools::nft(&rules.slot(place))?;
        open_tap(TAP)
    })
}

/// Gives the guest in a slot another reach than the usual.
pub fn open_up(rules: &Rules, number: u32, text: &str) -> Result<(), NetworkError> {
    within(&rules.netns(number), || Ok(tools::nft(text)?))
}

/// Removes slots with all that the kernel remembers of their guests: connections, neighbours, counters.
pub fn take_down(rules: &Rules, numbers: &[u32]) -> Result<(), SlotError> {
    let mut text = String::new();
    for &number in numbers {
        // A namespace's end is the kernel's to choose; the pair's name and addresses are free at once.
        let (veth, netns) = (rules.veth(number), rules.netns(number));
        if fs::exists(format!("/proc/sys/net/ipv4/conf/{veth}")).unwrap_or(true) {
            text += &format!("link del {veth}\n");
        }
        if exists(&netns) {
            text += &format!("netns del {netns}\n");
        }
    }
    match text.is_empty() {
        true => Ok(()),
        false => tools::ip_all(&text),
    }
}

/// Those of which something is there still.
pub fn left_of(rules: &Rules, numbers: &[u32]) -> Vec<u32> {
    let all = found(rules);
    numbers.iter().copied().filter(|number| all.contains(number)).collect()
}

fn exists(netns: &str) -> bool {
    fs::symlink_metadata(format!("{NETNS_FOLDER}/{netns}")).is_ok()
}

/// Whether something has this slot's names.
pub fn is_there(rules: &Rules, number: u32) -> bool {
    exists(&rules.netns(number))
}

/// Numbers of slots of this service that are there, by their names.
pub fn found(rules: &Rules) -> HashSet<u32> {
    let names = |folder: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    let number = |name: &str, prefix: &str| name.strip_prefix(prefix)?.parse().ok();
    let (netns, veth) = (rules.netns_prefix(), rules.veth_prefix());
    let namespaces = names(NETNS_FOLDER);
    // Of this thread's own network namespace, which /sys may not show.
    let interfaces = names("/proc/sys/net/ipv4/conf");
    let namespaces = namespaces.iter().filter_map(|name| number(name, &netns));
    namespaces.chain(interfaces.iter().filter_map(|name| number(name, &veth))).collect()
}

/// Gives the host's table its lines.
pub fn set_host(text: &str) -> Result<(), SlotError> {
    tools::nft(text)
}
