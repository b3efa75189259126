//! Cold boots: from an image, through the worker, to the ready point.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::agent::AgentClient;
use super::cgroup::{Group, Limits};
use super::claims::Claim;
use super::clones::parts;
use super::console::{Console, Output};
use super::disk_files::{self, DiskFile};
use super::disks::{VmDisk, VmFolder};
use super::error::FleetError;
use super::images::Bootable;
use super::limits::*;
use super::link::Link;
use super::network::{self, NetworkRequest, OpenLink, VmNetwork};
use super::owner::{Again, Ears, Faults, Owner, Phase};
use super::profile::{Profile, Profiler, phase_name};
use super::record::{Papers, Settled};
use super::registry::Guard;
use super::shells::Shell;
use super::slots::Lease;
use super::tasks::blocking;
use super::vm::{Origin, State, Status, Vm};
use super::{Fleet, id, watchdog};
use crate::agent::Hello;
use crate::telemetry::{metrics, trace};
use crate::worker::channel::ChannelError;
use crate::worker::protocol::{
    AgentPort, BootProtocol, BootSpec, Hardware, MemoryMode, Milestones, Rates, Reply, Request, Step,
};
use std::os::fd::OwnedFd;

/// When a VM counts as ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyPoint {
    Console(String),
    Port(u16),
    Agent,
}

impl ReadyPoint {
    /// For people: in the manifest, and in errors.
    pub fn text(&self) -> String {
        match self {
            Self::Console(pattern) => format!("console: {}", pattern.replace(char::is_control, "?")),
            Self::Port(port) => format!("port {port:#x}"),
            Self::Agent => "agent".to_owned(),
        }
    }
}

/// A cold boot that was asked for. What is `None` is as the image says.
#[derive(Debug, Clone)]
pub struct CreateVm {
    /// An image's name; `None`: the embedded test guest.
    pub image: Option<String>,
    pub name: Option<String>,
    pub vcpus: Option<u8>,
    pub memory_bytes: Option<u64>,
    pub protocol: Option<BootProtocol>,
    pub hardware: Option<Hardware>,
    pub agent_port: Option<AgentPort>,
    pub command_line: String,
    pub ready: Option<ReadyPoint>,
    pub ready_timeout: Duration,
    /// Disks by path, after the image's.
    pub disks: Vec<DiskFile>,
    pub networks: Vec<NetworkRequest>,
    pub limits: Limits,
    /// Boot it again when the guest resets itself; otherwise that is its end.
    pub restart_on_reset: bool,
    /// Tell where the time went.
    pub profile: bool,
}

/// What happens on the way to the ready point.
#[derive(Debug, Clone)]
pub enum Progress {
    Accepted(Arc<Vm>),
    Phase(Phase),
    Choice(String),
    Console(Bytes),
}

/// A cold boot at its ready point.
#[derive(Debug)]
pub struct Created {
    pub vm: Arc<Vm>,
    /// If it was asked for.
    pub profile: Option<Profile>,
}

/// Facts about a VM that is to be started in a shell.
pub(super) struct Start {
    pub name: Option<String>,
    /// The pool that it is made for, and whether it is to stand ready there.
    pub pool: Option<(Arc<str>, bool)>,
    pub origin: Origin,
    pub kernel: String,
    pub ready: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub generation: Option<[u8; 16]>,
    pub memory_mode: Option<MemoryMode>,
    pub protocol: Option<BootProtocol>,
    pub hello: Option<Arc<Hello>>,
    pub pattern: Vec<u8>,
    pub phases: Option<mpsc::Sender<Phase>>,
    pub disks: Vec<VmDisk>,
    /// The memory file of a clone whose page faults are answered here.
    pub memory: Option<Arc<File>>,
    pub faults: Option<Faults>,
    pub networks: Vec<VmNetwork>,
    /// What it may take.
    pub limits: Limits,
    /// Keeps some of them, if need be; its worker is in it.
    pub group: Option<Group>,
    /// If one of them is a slot.
    pub slot: Option<Lease>,
    pub again: Option<Again>,
}

/// A VM in the registry with its owner running; its worker has been told nothing yet.
pub(super) struct Started {
    pub vm: Arc<Vm>,
    /// Ends the VM unless handed over.
    pub guard: Guard,
    pub link: Arc<Link>,
    pub console: OwnedFd,
    pub agent: OwnedFd,
}

impl Started {
    /// Has its devices keep to these rates. Before it is booted or restored.
    pub(super) async fn limit(&self, rates: Rates) -> Result<(), FleetError> {
        match self.link.request(Request::Rates(rates), &[]).await? {
            (Reply::Done, _) => Ok(()),
            _ => Err(FleetError::WorkerConfused),
        }
    }
}

impl Fleet {
    /// Makes a VM of a shell.
    pub(super) fn start(self: &Arc<Self>, shell: Shell, start: Start) -> Result<Started, FleetError> {
        let Shell { process, link, events, console, agent, mut folder, kept, lifeline, .. } = shell;
        let record = folder.take_record();
        let papers = Papers::new(
            kept.then(|| (folder.path(), record)),
            &start.disks,
            start.memory.as_deref(),
            start.again.as_ref(),
        );
        let papers = papers.map_err(FleetError::io("cannot look at the VM's files"))?;
        let state = if start.generation.is_some() { State::Running } else { State::Booting };
        let status = Status {
            state,
            exit_reason: None,
            protocol: start.protocol,
            start_us: 0,
            steps: Vec::new(),
            restarts: 0,
        };
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let vm = Arc::new(Vm {
            id: folder.id(),
            name: start.name.map(OnceLock::from).unwrap_or_default(),
            held: AtomicBool::new(start.pool.as_ref().is_some_and(|(_, held)| *held)),
            pool: start.pool.map(|(name, _)| name),
            origin: start.origin,
            kernel: start.kernel,
            ready: start.ready,
            vcpus: start.vcpus,
            memory_bytes: start.memory_bytes,
            generation: start.generation,
            host_name: Mutex::default(),
            entropy: Mutex::default(),
            memory_mode: start.memory_mode,
            networks: Mutex::new(start.networks),
            limits: start.limits,
            created_unix_ms: id::unix_ms(),
            number: self.registry.next_number(),
            console: Console::start(console.ours, &start.pattern),
            agent: AgentClient::start(agent.ours, start.hello),
            process,
            papers,
            trouble: Arc::new(Mutex::new(None)),
            status: watch::Sender::new(status),
            events: self.events.clone(),
            commands,
            ready_port: watch::Sender::new(None),
        });
        let owner = Owner {
            vm: Arc::clone(&vm),
            link: Arc::clone(&link),
            commands: inbox,
            ears: Ears {
                vm: Arc::clone(&vm),
                events,
                phases: start.phases,
                exit: None,
                reset: None,
                deaf: false,
                faults: start.faults,
                attachment: None,
            },
            presence: vm.agent.presence(),
            agent_gone: false,
            disks: start.disks,
            folder,
            group: start.group,
            slot: start.slot,
            again: start.again,
            restarts: VecDeque::new(),
            panics: 0,
        };
        owner.spawn();
        // From here the guard ends the VM: also when the registry refuses it.
        let guard = Guard::new(self, Arc::clone(&vm));
        lifeline.let_go();
        self.registry.insert(&vm)?;
        Ok(Started { vm, guard, link, console: console.theirs, agent: agent.theirs })
    }

    /// Cold-boots a VM and comes back at its ready point. On failure, or when `progress` is closed, the VM is ended. It outlives this daemon.
    pub async fn create_vm(
        self: &Arc<Self>,
        request: CreateVm,
        claim: Option<Claim>,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Created, FleetError> {
        let created = self.create_for_now(request, progress).await?;
        created.vm.settle(Settled { claim: claim.map(|claim| (claim, Vec::new())), ..Settled::default() });
        Ok(created)
    }

    /// The same, but the next daemon would end it.
    pub(super) async fn create_for_now(
        self: &Arc<Self>,
        request: CreateVm,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Created, FleetError> {
        let arrived = Instant::now();
        let mut profiler = Profiler::begin();
        let names: Vec<String> = request.name.iter().cloned().collect();
        names.iter().try_for_each(|name| id::check_name("a VM", name))?;
        self.registry.check_room(1, &names)?;
        self.headroom.check()?;
        request.limits.check()?;
        let bootable = self.images.bootable(request.image.as_deref()).await?;
        let mut plan = Plan::new(&request, &bootable)?;
        // The VM's folder, and with it its id, come with the worker.
        let mut shell = self.shells.take().await?;
        profiler.reached("worker taken");
        let mut folder = std::mem::replace(&mut shell.folder, VmFolder::new(&self.vms_dir, ""));
        let mut disks = bootable.disks(&mut folder)?;
        if !request.disks.is_empty() {
            let (files, before) = (request.disks.clone(), disks.len());
            let (opened, back) = blocking(move || {
                let opened = disk_files::open(&files, before, &mut folder);
                (opened, folder)
            })
            .await?;
            folder = back;
            disks.extend(opened?);
        }
        plan.spec.disks = disks.iter().map(VmDisk::spec).collect();
        let mut networks = network::plan(&request.networks, &folder.id())?;
        let (links, slot) = network::open(&self.slots, &mut networks, None).await?;
        self.slots.refill();
        plan.spec.networks = networks.iter().zip(&links).map(|(network, link)| network.spec(link)).collect();
        profiler.reached("image and disks open");
        shell.folder = folder;
        let group = self.limit(&shell, request.limits).await?;
        let (phases_in, mut phases) = mpsc::channel(WORKER_EVENTS_MAX);
        let pattern = match &plan.ready {
            ReadyPoint::Console(pattern) => pattern.clone().into_bytes(),
            _ => Vec::new(),
        };
        let started = self.start(
            shell,
            Start {
                name: request.name.clone(),
                pool: None,
                origin: request.image.clone().map_or(Origin::Embedded, Origin::Image),
                kernel: bootable.title.clone(),
                ready: plan.ready.text(),
                vcpus: plan.spec.vcpus,
                memory_bytes: plan.spec.memory_bytes,
                generation: None,
                memory_mode: None,
                protocol: None,
                hello: None,
                pattern,
                phases: Some(phases_in),
                disks: disks.clone(),
                memory: None,
                faults: None,
                networks,
                limits: request.limits,
                group,
                slot,
                again: request.restart_on_reset.then(|| Again {
                    spec: plan.spec.clone(),
                    kernel: Arc::clone(&bootable.kernel),
                    module: bootable.module.clone(),
                }),
            },
        )?;
        let vm = Arc::clone(&started.vm);
        let mut listener = vm.console.listen(true);
        // The channel has room; a caller that is gone already is noticed below.
        let _ = progress.try_send(Progress::Accepted(Arc::clone(&vm)));

        let ready_text = plan.ready.text();
        let mut steps = {
            let boot = self.boot(
                &started,
                plan.spec,
                bootable.kernel,
                bootable.module,
                &disks,
                links,
                plan.ready,
                &progress,
                arrived,
                &mut profiler,
            );
            let mut boot = pin!(boot);
            let mut deadline = pin!(tokio::time::sleep(request.ready_timeout));
            let mut console_ended = false;
            loop {
                tokio::select! {
                    biased;
                    Some(phase) = phases.recv() => drop(progress.try_send(Progress::Phase(phase))),
                    output = listener.next(), if !console_ended => match output {
                        // A caller that is slow misses some.
                        Some(Output::Bytes(bytes)) => drop(progress.try_send(Progress::Console(bytes))),
                        Some(Output::Lost(_)) => {}
                        None => console_ended = true,
                    },
                    result = &mut boot => break result?,
                    reason = vm.ended() => {
                        return Err(FleetError::EndedEarly { reason, last_lines: vm.console.last_lines() });
                    }
                    panic = vm.console.panicked() => {
                        return Err(FleetError::EndedEarly {
                            reason: format!("the guest's kernel panicked ({panic})"),
                            last_lines: vm.console.last_lines(),
                        });
                    }
                    () = progress.closed() => {
                        return Err(FleetError::WrongState("the caller went away before the VM was ready".into()));
                    }
                    () = &mut deadline => {
                        return Err(FleetError::NotReady {
                            seconds: request.ready_timeout.as_secs(),
                            waited_for: ready_text,
                            found: watchdog::report(&vm, &started.link).await,
                        });
                    }
                }
            }
        };
        // What it said last.
        while let Some(output) = listener.take() {
            if let Output::Bytes(bytes) = output {
                let _ = progress.try_send(Progress::Console(bytes));
            }
        }
        profiler.reached("ready");
        let start_us = micros(arrived);
        metrics().booted(arrived.elapsed());
        let _ = progress.try_send(Progress::Phase(Phase { name: "ready".to_owned(), us: start_us }));
        let known: u64 = steps.iter().map(|step| u64::from(step.us)).sum();
        steps.push(step("guest", start_us.saturating_sub(known)));
        if let Some(here) = trace::Place::here() {
            let about = vec![("coldspark.vm", vm.id.clone()), ("coldspark.kernel", vm.kernel.clone())];
            trace::Road { name: "boot", began: arrived, parts: parts(&steps), about }.tell(here);
        }
        vm.change(|status| {
            status.start_us = start_us;
            status.steps = steps;
            if status.state == State::Booting {
                status.state = State::Ready;
            }
        });
        let profile = match request.profile {
            true => Some(profiler.finish(&milestones(&started).await?, &vm.console.words().borrow())),
            false => None,
        };
        started.guard.hand_over();
        Ok(Created { vm, profile })
    }

    /// Tells the worker and waits for the ready point.
    #[allow(clippy::too_many_arguments)]
    async fn boot(
        &self,
        started: &Started,
        spec: BootSpec,
        kernel: Arc<File>,
        module: Option<Arc<File>>,
        disks: &[VmDisk],
        links: Vec<OpenLink>,
        ready: ReadyPoint,
        progress: &mpsc::Sender<Progress>,
        arrived: Instant,
        profiler: &mut Profiler,
    ) -> Result<Vec<Step>, FleetError> {
        let vm = &started.vm;
        let mut fds = vec![started.console.as_fd(), started.agent.as_fd(), kernel.as_fd()];
        fds.extend(module.iter().map(|module| module.as_fd()));
        fds.extend(disks.iter().flat_map(VmDisk::fds));
        fds.extend(links.iter().flat_map(OpenLink::fd));
        let before_us = micros(arrived);
        if let Some(rates) = vm.limits.rates() {
            started.limit(rates).await?;
        }
        let booted = match started.link.request(Request::Boot(spec), &fds).await {
            Ok((Reply::Booted(booted), _)) => booted,
            Ok(_) => return Err(FleetError::WorkerConfused),
            Err(FleetError::Channel(ChannelError::Closed)) => return Err(ended_early(vm).await),
            Err(error) => return Err(error),
        };
        profiler.booted(&booted);
        // The worker has its own: from now on a link ends with it.
        drop(links);
        vm.change(|status| status.protocol = Some(booted.protocol));
        // The worker's own events may have come in between; these are its steps seen from the request's arrival.
        let mut reached = before_us;
        for step in &booted.steps {
            reached = reached.saturating_add(step.us.into());
            let phase = Phase { name: phase_name(&step.name).to_owned(), us: reached };
            let _ = progress.try_send(Progress::Phase(phase));
        }
        for choice in booted.choices {
            let _ = progress.try_send(Progress::Choice(choice));
        }
        match ready {
            ReadyPoint::Agent => {
                if let Err(reason) = vm.agent.wait_hello().await {
                    tracing::debug!(reason, "the agent port closed");
                    return Err(ended_early(vm).await);
                }
            }
            ReadyPoint::Console(_) => {
                if !vm.console.pattern_seen().await {
                    return Err(ended_early(vm).await);
                }
            }
            ReadyPoint::Port(_) => {
                let mut port = vm.ready_port.subscribe();
                if port.wait_for(Option::is_some).await.is_err() {
                    return Err(ended_early(vm).await);
                }
            }
        }
        Ok(booted.steps)
    }
}

/// The worker's marks.
async fn milestones(started: &Started) -> Result<Milestones, FleetError> {
    match started.link.request(Request::Milestones, &[]).await {
        Ok((Reply::Milestones(marks), _)) => Ok(marks),
        Ok(_) => Err(FleetError::WorkerConfused),
        Err(FleetError::Channel(ChannelError::Closed)) => Err(ended_early(&started.vm).await),
        Err(error) => Err(error),
    }
}

/// The worker closed its sockets: waits for the reason.
async fn ended_early(vm: &Vm) -> FleetError {
    // A worker that says nothing sensible any more need not be waited for.
    let reason = match tokio::time::timeout(WORKER_TIMEOUT, vm.ended()).await {
        Ok(reason) => reason,
        Err(_) => match vm.agent.wait_hello().await {
            Err(reason) => reason,
            Ok(_) => "its worker closed its sockets".to_owned(),
        },
    };
    FleetError::EndedEarly { reason, last_lines: vm.console.last_lines() }
}

/// A checked request.
struct Plan {
    spec: BootSpec,
    ready: ReadyPoint,
}

impl Plan {
    fn new(request: &CreateVm, bootable: &Bootable) -> Result<Self, FleetError> {
        let settings = &bootable.settings;
        let vcpus = request.vcpus.unwrap_or(settings.vcpus);
        let memory_bytes = request.memory_bytes.unwrap_or(settings.memory_bytes);
        check_machine(vcpus, memory_bytes)?;
        let command_line = match (settings.command_line.as_str(), request.command_line.as_str()) {
            ("", line) | (line, "") => line.to_owned(),
            (first, then) => format!("{first} {then}"),
        };
        check_command_line(&command_line)?;
        let ready = request.ready.clone().unwrap_or_else(|| settings.ready.clone());
        check_ready(&ready)?;
        if request.ready_timeout > READY_TIMEOUT_MAX {
            return Err(FleetError::Invalid(format!(
                "a ready timeout of {} s; the most is {}",
                request.ready_timeout.as_secs(),
                READY_TIMEOUT_MAX.as_secs()
            )));
        }
        let spec = BootSpec {
            vcpus,
            memory_bytes,
            protocol: request.protocol.unwrap_or(settings.protocol),
            hardware: request.hardware.unwrap_or(settings.hardware),
            agent_port: request.agent_port.unwrap_or(settings.agent_port),
            module: bootable.module_kind,
            command_line,
            // Known when their files are open.
            disks: Vec::new(),
            // Known when there is an id to derive addresses from.
            networks: Vec::new(),
            ready_port: match ready {
                ReadyPoint::Port(port) => Some(port),
                _ => None,
            },
        };
        Ok(Self { spec, ready })
    }
}

/// Checks vCPUs and memory.
pub fn check_machine(vcpus: u8, memory_bytes: u64) -> Result<(), FleetError> {
    if !(1..=VCPUS_MAX).contains(&vcpus) {
        return Err(FleetError::Invalid(format!("{vcpus} vCPUs; ask for 1 to {VCPUS_MAX}")));
    }
    if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&memory_bytes)
        || !memory_bytes.is_multiple_of(MEMORY_STEP_BYTES)
    {
        return Err(FleetError::Invalid(format!(
            "{memory_bytes} bytes of memory; ask for a multiple of 2 MiB from {} MiB to {} GiB",
            MEMORY_BYTES_MIN >> 20,
            MEMORY_BYTES_MAX >> 30
        )));
    }
    Ok(())
}

/// Checks a command line.
pub fn check_command_line(line: &str) -> Result<(), FleetError> {
    match line.len() <= COMMAND_LINE_BYTES_MAX && !line.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(FleetError::Invalid(format!(
            "a command line of {} bytes or with control characters; the most is {COMMAND_LINE_BYTES_MAX} plain bytes",
            line.len()
        ))),
    }
}

/// Checks a ready point.
pub fn check_ready(ready: &ReadyPoint) -> Result<(), FleetError> {
    match ready {
        ReadyPoint::Console(pattern) if !(1..=PATTERN_BYTES_MAX).contains(&pattern.len()) => {
            Err(FleetError::Invalid(format!(
                "a console pattern of {} bytes; give 1 to {PATTERN_BYTES_MAX}",
                pattern.len()
            )))
        }
        ReadyPoint::Port(0) => Err(FleetError::Invalid("ready port 0; give 1 to 65535".into())),
        ReadyPoint::Port(port) if DEVICE_PORTS.iter().any(|ports| ports.contains(port)) => {
            Err(FleetError::Invalid(format!(
                "ready port {port:#x} belongs to a device; choose one that the guest has no other use for, such as 0xf4"
            )))
        }
        _ => Ok(()),
    }
}

pub(super) fn step(name: &str, us: u64) -> Step {
    Step { name: name.to_owned(), us: u32::try_from(us).unwrap_or(u32::MAX) }
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
