//! Making a clone somebody of its own, through the agent in it: generation, entropy, wall clock, the host's name, Ethernet
//! and IP addresses. What the agent does not confirm in time fails the clone.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::addresses;
use super::agent::Asked;
use super::clones::answer;
use super::error::FleetError;
use super::id;
use super::limits::IDENTITY_TIMEOUT;
use super::network::LinkRequest;
use super::vm::{Entropy, Vm};
use crate::agent::{AgentReply, AgentRequest, Confirmed, Hello, Host, More, wire};
use crate::telemetry::metrics;

/// A guest that became a clone this long after it was told the time is told it again: its clock is late by that.
const CLOCK_LATE: Duration = Duration::from_millis(3);

/// How often that is tried.
const CLOCK_SETS_MAX: usize = 4;

/// What was asked and is to be confirmed.
#[derive(Debug)]
pub struct Asking {
    asked: Asked,
    at: Instant,
    generation: [u8; 16],
    host: Option<Host>,
}

/// Why a guest is told who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// It is a copy.
    Cloned,
    /// It is taken out of a pool, and was told before.
    Taken,
}

/// Whether this agent can be told name, addresses and time.
pub fn is_told_all(hello: &Hello) -> bool {
    [wire::KIND_BECOME, wire::KIND_SET_CLOCK].iter().all(|kind| serves(hello, *kind))
}

/// Whether it can be given IP addresses, too, and tells what became of its system's entropy.
pub fn is_told_addresses(hello: &Hello) -> bool {
    is_told_all(hello) && serves(hello, wire::KIND_CLONE)
}

fn serves(hello: &Hello, kind: u16) -> bool {
    hello.kinds >> kind & 1 != 0
}

/// Tells the guest that it is another one now: called `name`, or what its VM is called.
pub async fn ask(
    vm: &Vm,
    generation: [u8; 16],
    name: Option<&str>,
    occasion: Occasion,
) -> Result<Asking, FleetError> {
    let hello = vm.agent.hello();
    let host = hello.as_deref().filter(|hello| is_told_all(hello)).map(|hello| Host {
        name: name.or(vm.name()).unwrap_or(&vm.id).to_owned(),
        macs: (0..)
            .zip(&vm.networks())
            .filter(|(_, network)| matches!(network.link, LinkRequest::Tap { .. }))
            .map(|(interface, network)| (interface, network.mac))
            .collect(),
        more: is_told_addresses(hello).then(|| More {
            reseed: occasion == Occasion::Cloned,
            addresses: addresses::told(&vm.networks()),
        }),
    });
    let at = Instant::now();
    let request =
        AgentRequest::Identity { generation, entropy: id::random()?, wall_ns: wall_ns(), host: host.clone() };
    Ok(Asking { asked: vm.agent.begin(request).await?, at, generation, host })
}

/// Tells a guest that is told nothing else that its system may draw on what it gathers: its snapshot may have been taken while it was not to.
/// Nobody waits for the answer, and the agent does it by itself after some seconds.
pub async fn unsettle(vm: &Vm) {
    let request = AgentRequest::Settle { on: false };
    if vm.agent.hello().is_some_and(|hello| hello.serves(&request)) {
        let _ = vm.agent.begin(request).await;
    }
}

/// Waits until it has confirmed that.
pub async fn confirm(vm: &Vm, asking: Asking) -> Result<(), FleetError> {
    confirmed(vm, asking).await.inspect_err(|error| {
        metrics().identity_failed(match error {
            FleetError::AgentTimeout(_) => "timeout",
            FleetError::WrongGeneration => "wrong_generation",
            FleetError::WrongAddresses { .. } => "wrong_addresses",
            FleetError::Ended(_) => "ended",
            _ => "refused",
        });
    })
}

async fn confirmed(vm: &Vm, asking: Asking) -> Result<(), FleetError> {
    let Asking { asked, at, generation, host } = asking;
    match (answer(vm, asked, IDENTITY_TIMEOUT).await?, host) {
        (AgentReply::Generation { generation: confirmed, .. }, None) if confirmed == generation => {
            vm.learn_entropy(Entropy::Pending);
            Ok(())
        }
        (AgentReply::Become { generation: confirmed, host_name, more, .. }, Some(host))
            if confirmed == generation && host_name == host.name && more.is_some() == host.more.is_some() =>
        {
            match (host.more, more) {
                (Some(told), Some(found)) => confirm_more(vm, &told, &found)?,
                _ => vm.learn_entropy(Entropy::Pending),
            }
            if at.elapsed() > CLOCK_LATE {
                set_clock(vm).await?;
            }
            // A VM out of a pool is told a second time.
            *vm.host_name.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = host_name;
            Ok(())
        }
        _ => Err(FleetError::WrongGeneration),
    }
}

/// What was given beyond a name.
fn confirm_more(vm: &Vm, told: &More, found: &Confirmed) -> Result<(), FleetError> {
    if !addresses::agree(&told.addresses, &found.addresses) {
        let texts = |all: &[wire::Address]| match all {
            [] => "none".to_owned(),
            all => all.iter().map(addresses::text).collect::<Vec<_>>().join(", "),
        };
        return Err(FleetError::WrongAddresses {
            told: texts(&told.addresses),
            found: texts(&found.addresses),
        });
    }
    // Who was told before knows better.
    if told.reseed {
        vm.learn_entropy(if found.drawn { Entropy::Drawn } else { Entropy::Pending });
    }
    Ok(())
}

/// Until it was done in no more time than it may be late, or often enough: then the host is too busy for more.
async fn set_clock(vm: &Vm) -> Result<(), FleetError> {
    for _ in 0..CLOCK_SETS_MAX {
        let at = Instant::now();
        let asked = vm.agent.begin(AgentRequest::SetClock { wall_ns: wall_ns() }).await?;
        match answer(vm, asked, IDENTITY_TIMEOUT).await? {
            AgentReply::Clock { .. } if at.elapsed() <= CLOCK_LATE => break,
            AgentReply::Clock { .. } => {}
            _ => return Err(FleetError::WrongGeneration),
        }
    }
    Ok(())
}

/// Unix nanoseconds.
fn wall_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
