//! Starting clones: the road that has to be short.
//!
//! On it: a shell from the reserve, an overlay per writable disk, one message with descriptors to the worker, and for a
//! MANAGED clone one exchange with its agent. The snapshot's files were opened before.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::agent::Asked;
use super::boot::{Start, Started, micros, step};
use super::cgroup::{Group, Limits};
use super::claims::Claim;
use super::error::FleetError;
use super::limits::*;
use super::network::{self, CanBeTold, NetworkRequest, OpenLink, VmNetwork};
use super::owner::Faults;
use super::record::Settled;
use super::registry::Guard;
use super::shells::{Plugged, Shell};
use super::slots::Held;
use super::sources::Source;
use super::tasks::blocking;
use super::vm::{Origin, Vm};
use super::{Fleet, id, identity};
use crate::agent::{AgentReply, AgentRequest, Hello};
use crate::snapshot::working_set::Touched;
use crate::telemetry::metrics::Mode;
use crate::telemetry::{metrics, trace};
use crate::worker::channel::ChannelError;
use crate::worker::protocol::{LinkKind, MemoryMode, Reply, Request, RestoreSpec, Restored, Step};

/// Clones that were asked for.
#[derive(Debug, Clone)]
pub struct CloneVm {
    /// Id or name.
    pub snapshot: String,
    pub count: u32,
    pub memory_mode: MemoryMode,
    /// Give each its own identity through the agent.
    pub managed: bool,
    pub name: Option<String>,
    /// Links for the guest's interfaces, from the first.
    pub networks: Vec<NetworkRequest>,
    /// For each of them.
    pub limits: Limits,
    /// Asked of the only clone, just after its identity.
    pub first_call: Option<FirstCall>,
}

/// What a clone is asked before its caller hears of it.
#[derive(Debug, Clone)]
pub struct FirstCall {
    pub request: AgentRequest,
    pub within: Duration,
}

/// Where a clone is to stand.
#[derive(Debug, Default)]
pub(super) struct Place {
    pub name: Option<String>,
    /// The pool that it is made for, and whether it is to stand ready there.
    pub pool: Option<(Arc<str>, bool)>,
    /// A worker that was prepared for it; none: one of the reserve.
    pub shell: Option<Box<Shell>>,
    /// The network slot that it is to have; none: it takes one, if it wants one.
    pub slot: Option<Held>,
}

/// Clones that run.
#[derive(Debug)]
pub struct Clones {
    pub vms: Vec<Arc<Vm>>,
    /// To the first call, and the microseconds from the request's arrival to it.
    pub answer: Option<(AgentReply, u64)>,
}

impl Clones {
    /// They are their caller's from now on, and outlive this daemon. `claim`: the request, if it has an id, and what it is answered besides.
    pub fn settle(&self, claim: Option<(Claim, Vec<u8>)>) {
        let siblings: Vec<String> = match self.vms.len() {
            1 => Vec::new(),
            _ => self.vms.iter().map(|vm| vm.id.clone()).collect(),
        };
        for vm in &self.vms {
            vm.settle(Settled { claim: claim.clone(), siblings: siblings.clone() });
        }
    }
}

impl Fleet {
    /// Starts clones, all at once, all or none. The next daemon would end them until they are [settled](Clones::settle).
    pub async fn clone_vm(self: &Arc<Self>, request: CloneVm) -> Result<Clones, FleetError> {
        let arrived = Instant::now();
        if !(1..=CLONES_MAX).contains(&request.count) {
            return Err(FleetError::Invalid(format!(
                "{} clones at once; ask for 1 to {CLONES_MAX}",
                request.count
            )));
        }
        request.limits.check()?;
        let names = names(&request)?;
        self.registry.check_room(request.count as usize, &names)?;
        self.headroom.check()?;
        let source = self.snapshots.source(&request.snapshot).await?;
        if (request.managed || request.first_call.is_some()) && source.hello.is_none() {
            return Err(FleetError::NoAgentInSnapshot);
        }
        if request.first_call.is_some() && request.count != 1 {
            return Err(FleetError::Invalid("first_call goes to one clone: let count be 1".to_owned()));
        }
        let knows = |how: fn(&Hello) -> bool| request.managed && source.hello.as_deref().is_some_and(how);
        let can_be_told =
            CanBeTold { macs: knows(identity::is_told_all), addresses: knows(identity::is_told_addresses) };
        let networks = network::plan_clones(&request.networks, &source.networks, request.count, can_be_told)?;
        let mut names = names.into_iter();
        if request.count == 1 {
            let place = Place { name: names.next(), ..Place::default() };
            let (guard, answer) = self.clone_one(source, request, networks, place, arrived).await?;
            return Ok(Clones { vms: vec![guard.hand_over()], answer });
        }
        // Dropping the set, or a guard in it, ends what was started.
        let mut clones = JoinSet::new();
        for index in 0..request.count {
            let (fleet, source, request) = (Arc::clone(self), Arc::clone(&source), request.clone());
            let (networks, place) = (networks.clone(), Place { name: names.next(), ..Place::default() });
            let clone = async move {
                let clone = fleet.clone_one(source, request, networks, place, arrived).await?.0;
                Ok::<_, FleetError>((index, clone))
            };
            clones.spawn(trace::Place::carry(trace::Place::here(), clone));
        }
        let mut guards = Vec::with_capacity(request.count as usize);
        while let Some(clone) = clones.join_next().await {
            let clone =
                clone.map_err(|error| FleetError::Internal(format!("a clone's task failed: {error}")))??;
            guards.push(clone);
        }
        // In the order of their names.
        guards.sort_by_key(|(index, _)| *index);
        let vms = guards.into_iter().map(|(_, guard)| guard.hand_over()).collect();
        Ok(Clones { vms, answer: None })
    }

    /// Moves a shell into a group with these limits, if there are any that need one.
    pub(super) async fn limit(&self, shell: &Shell, limits: Limits) -> Result<Option<Group>, FleetError> {
        if !limits.need_group() {
            return Ok(None);
        }
        let (cgroups, vm, pid) = (Arc::clone(&self.cgroups), shell.folder.id(), shell.process.pid());
        blocking(move || cgroups.make(&vm, limits, pid)).await?.map(Some)
    }

    /// Starts one clone. Dropped before it is done, it ends what it has made.
    pub(super) async fn clone_one(
        self: &Arc<Self>,
        source: Arc<Source>,
        request: CloneVm,
        mut networks: Vec<VmNetwork>,
        place: Place,
        arrived: Instant,
    ) -> Result<(Guard, Option<(AgentReply, u64)>), FleetError> {
        let mut clock = Clock::new(arrived);
        let mut shell = place.shell;
        // One that was made ahead with its links has them.
        let plugged = shell.as_mut().and_then(|shell| shell.take_plugged());
        let is_plugged = plugged.is_some();
        let (links, slot) = match plugged {
            Some(Plugged { networks: has, slot }) => {
                networks = has;
                (Vec::new(), slot)
            }
            None => network::open(&self.slots, &mut networks, place.slot).await?,
        };
        let has_slot = slot.is_some();
        // One that needs neither the pager nor a link may have been made ahead.
        let plain =
            request.memory_mode == MemoryMode::Mapped && links.iter().all(|link| link.kind == LinkKind::Down);
        let mut shell = match shell {
            Some(shell) => *shell,
            None => self.shells.take_for(&source, plain).await?,
        };
        clock.lap("shell");
        let group = self.limit(&shell, request.limits).await?;
        if group.is_some() {
            clock.lap("limits");
        }
        source.check_fits(&shell.host)?;
        let generation = id::random::<16>()?;
        let seat = if plain { shell.take_seat(&source.id()) } else { None };
        let is_made = seat.is_some();
        if is_plugged && !is_made {
            return Err(FleetError::Internal(
                "a clone that was made ahead with its links is of another kind".into(),
            ));
        }
        let disks = match seat {
            Some(seat) => seat.disks,
            None => source.disks(&mut shell.folder)?,
        };
        if request.managed && source.hello.as_deref().is_some_and(identity::is_told_all) {
            network::own_addresses(&mut networks, &source.networks, &shell.folder.id());
        }
        let facts = &source.open.manifest.facts;
        let faults = match request.memory_mode {
            MemoryMode::Mapped => None,
            MemoryMode::Userfault => {
                Some(Faults { pager: Arc::clone(&self.pager), source: Arc::clone(&source.pages) })
            }
        };
        let started = self.start(
            shell,
            Start {
                name: place.name,
                pool: place.pool,
                origin: Origin::Snapshot(source.open.manifest.id.to_string()),
                kernel: facts.guest.kernel.clone(),
                ready: facts.guest.ready.clone(),
                vcpus: facts.vcpus,
                memory_bytes: facts.memory.bytes,
                generation: Some(generation),
                memory_mode: Some(request.memory_mode),
                protocol: Some(source.protocol),
                hello: source.hello.clone(),
                pattern: Vec::new(),
                phases: None,
                disks: disks.clone(),
                memory: faults.as_ref().map(|_| Arc::clone(&source.open.memory)),
                faults,
                networks,
                limits: request.limits,
                group,
                slot,
                again: None,
            },
        )?;
        if let Some(rates) = request.limits.rates() {
            started.limit(rates).await?;
        }
        clock.lap("prepare");
        // Asked before there is a guest: the questions wait for it in the agent's socket, which saves a way there and back.
        let talk = async {
            let identity = match request.managed {
                true => Some(identity::ask(&started.vm, generation, None, identity::Occasion::Cloned).await?),
                false => {
                    identity::unsettle(&started.vm).await;
                    None
                }
            };
            let first = match request.first_call {
                Some(call) => Some((started.vm.agent.begin(call.request).await?, call.within)),
                None => None,
            };
            let mut confirmed = None;
            if let Some(asking) = identity {
                identity::confirm(&started.vm, asking).await?;
                confirmed = Some(Instant::now());
            }
            let answer = match first {
                Some((first, within)) => Some(answer(&started.vm, first, within).await?),
                None => None,
            };
            Ok::<_, FleetError>((confirmed, answer))
        };
        tokio::pin!(talk);
        let mut told = None;
        let restored = {
            let mut fds = Vec::new();
            let order = match is_made {
                true => Request::Start,
                false => {
                    fds.extend([
                        started.console.as_fd(),
                        started.agent.as_fd(),
                        source.open.state.as_fd(),
                        source.open.memory.as_fd(),
                    ]);
                    fds.extend(disks.iter().flat_map(|disk| disk.fds()));
                    fds.extend(links.iter().flat_map(OpenLink::fd));
                    Request::Restore(RestoreSpec {
                        memory_mode: request.memory_mode,
                        disks: disks.iter().map(|disk| disk.spec()).collect(),
                        networks: links.iter().map(|link| link.kind).collect(),
                        paused: false,
                        ready_port: None,
                        working_set: match request.memory_mode {
                            MemoryMode::Mapped => Touched::default(),
                            MemoryMode::Userfault => source.learning.learnt(),
                        },
                    })
                }
            };
            let restoring = restore(&started, order, &fds);
            tokio::pin!(restoring);
            loop {
                tokio::select! {
                    biased;
                    restored = &mut restoring => break restored?,
                    answered = &mut talk, if told.is_none() => told = Some(answered),
                }
            }
        };
        // The worker has its own: from now on a link ends with it.
        drop(links);
        clock.lap("restore");
        clock.inside("restore", &restored.steps);
        let (confirmed, answer) = match told {
            Some(answered) => answered?,
            None => talk.await?,
        };
        if let Some(confirmed) = confirmed {
            clock.lap_at("identity", confirmed);
        }
        if answer.is_some() {
            clock.lap("first call");
        }
        let start_us = micros(arrived);
        if let Some(here) = trace::Place::here() {
            let about = vec![
                ("coldspark.vm", started.vm.id.clone()),
                ("coldspark.snapshot", source.label().to_owned()),
                ("coldspark.memory_mode", mode(request.memory_mode).name().to_owned()),
            ];
            trace::Road { name: "clone", began: arrived, parts: parts(&clock.steps), about }.tell(here);
        }
        started.vm.change(|status| {
            status.start_us = start_us;
            status.steps = clock.steps;
        });
        if has_slot {
            self.slots.refill();
        }
        source.keeping.used();
        let mode = mode(request.memory_mode);
        metrics().restored(source.label(), mode, arrived.elapsed());
        let given = is_made || request.memory_mode == MemoryMode::Userfault;
        self.learn_from(&started.vm, &source, answer.is_some(), given);
        Ok((started.guard, answer.map(|reply| (reply, start_us))))
    }
}

/// The names of the clones; empty when none was given.
fn names(request: &CloneVm) -> Result<Vec<String>, FleetError> {
    let Some(name) = &request.name else { return Ok(Vec::new()) };
    let names: Vec<String> = match request.count {
        1 => vec![name.clone()],
        count => (0..count).map(|n| format!("{name}-{n}")).collect(),
    };
    names.iter().try_for_each(|name| id::check_name("a VM", name))?;
    Ok(names)
}

async fn restore(
    started: &Started,
    request: Request,
    fds: &[BorrowedFd<'_>],
) -> Result<Restored, FleetError> {
    match started.link.request(request, fds).await {
        Ok((Reply::Restored(restored), _)) => Ok(restored),
        Ok(_) => Err(FleetError::WorkerConfused),
        Err(FleetError::Channel(ChannelError::Closed)) => Err(FleetError::Ended(started.vm.ended().await)),
        Err(error) => Err(error),
    }
}

/// Steps as parts of a trace.
pub(super) fn parts(steps: &[Step]) -> Vec<trace::Part> {
    let part =
        |step: &Step| trace::Part { name: step.name.clone(), took: Duration::from_micros(step.us.into()) };
    steps.iter().map(part).collect()
}

/// As metrics call it.
pub(super) fn mode(mode: MemoryMode) -> Mode {
    match mode {
        MemoryMode::Mapped => Mode::Mapped,
        MemoryMode::Userfault => Mode::Userfault,
    }
}

/// Waits for an answer, or the VM's end.
pub(super) async fn answer(vm: &Vm, asked: Asked, within: Duration) -> Result<AgentReply, FleetError> {
    let answered = tokio::select! {
        answer = asked.answer(within) => answer,
        reason = vm.ended() => Err(FleetError::Ended(reason)),
    };
    match answered {
        // The port closes a moment before the end is known.
        Err(FleetError::WrongState(_)) => Err(FleetError::Ended(vm.ended().await)),
        other => other,
    }
}

/// Times the steps of one clone.
struct Clock {
    last: Instant,
    steps: Vec<Step>,
}

impl Clock {
    fn new(start: Instant) -> Self {
        Self { last: start, steps: Vec::with_capacity(16) }
    }

    /// The time since the last lap was spent on `name`.
    fn lap(&mut self, name: &'static str) {
        self.lap_at(name, Instant::now());
    }

    /// Until `end`.
    fn lap_at(&mut self, name: &'static str, end: Instant) {
        let took = end.saturating_duration_since(self.last);
        metrics().restore_step(name, took);
        self.steps.push(step(name, u64::try_from(took.as_micros()).unwrap_or(u64::MAX)));
        self.last = self.last.max(end);
    }

    /// What the worker did inside of `name`: not to be added to the sum.
    fn inside(&mut self, name: &str, steps: &[Step]) {
        // A worker is not trusted with our memory either.
        for inner in steps.iter().take(64) {
            let inner_name: String = inner.name.chars().filter(|c| !c.is_control()).take(40).collect();
            self.steps.push(Step { name: format!("{name}/{inner_name}"), us: inner.us });
        }
    }
}
