//! Making a clone somebody of its own, through the agent in it: generation, entropy, wall clock, the host's name, Ethernet
//! addresses. What the agent does not confirm in time fails the clone.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::agent::Asked;
use super::clones::answer;
use super::error::FleetError;
use super::id;
use super::limits::IDENTITY_TIMEOUT;
use super::network::LinkRequest;
use super::vm::Vm;
use crate::agent::{AgentReply, AgentRequest, Hello, Host, wire};
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

/// Whether this agent can be told name, addresses and time.
pub fn is_told_all(hello: &Hello) -> bool {
    [wire::KIND_BECOME, wire::KIND_SET_CLOCK].iter().all(|kind| hello.kinds >> kind & 1 != 0)
}

/// Tells the guest that it is another one now: called `name`, or what its VM is called.
pub async fn ask(vm: &Vm, generation: [u8; 16], name: Option<&str>) -> Result<Asking, FleetError> {
    let host = vm.agent.hello().is_some_and(|hello| is_told_all(&hello)).then(|| Host {
        name: name.or(vm.name()).unwrap_or(&vm.id).to_owned(),
        macs: (0..)
            .zip(&vm.networks())
            .filter(|(_, network)| matches!(network.link, LinkRequest::Tap { .. }))
            .map(|(interface, network)| (interface, network.mac))
            .collect(),
    });
    let at = Instant::now();
    let request =
        AgentRequest::Identity { generation, entropy: id::random()?, wall_ns: wall_ns(), host: host.clone() };
    Ok(Asking { asked: vm.agent.begin(request).await?, at, generation, host })
}

/// Waits until it has confirmed that.
pub async fn confirm(vm: &Vm, asking: Asking) -> Result<(), FleetError> {
    confirmed(vm, asking).await.inspect_err(|error| {
        metrics().identity_failed(match error {
            FleetError::AgentTimeout(_) => "timeout",
            FleetError::WrongGeneration => "wrong_generation",
            FleetError::Ended(_) => "ended",
            _ => "refused",
        });
    })
}

async fn confirmed(vm: &Vm, asking: Asking) -> Result<(), FleetError> {
    let Asking { asked, at, generation, host } = asking;
    match (answer(vm, asked, IDENTITY_TIMEOUT).await?, host) {
        (AgentReply::Generation { generation: confirmed, .. }, None) if confirmed == generation => Ok(()),
        (AgentReply::Become { generation: confirmed, host_name, .. }, Some(host))
            if confirmed == generation && host_name == host.name =>
        {
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
