//! The VM of a worker: from a request's descriptors to a machine, and from a machine to a snapshot's files.

#![allow(unsafe_code)]

mod descriptors;
mod look;
mod sink;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use userfaultfd::Uffd;

use descriptors::{Descriptors, Plug, plug};
use sink::sink;

use super::ahead::{self, Ahead, Ground, Places, Seat, read_state};
use super::fault;
use super::jail::Outside;
use super::keep::{self, DiskFiles, Keep};
use super::own::{self, Own};
use super::protocol::{
    self, Adopted, AgentPort, BootProtocol, BootSpec, Booted, Event, FDS_MAX, Fault, FaultRegion, FromWorker,
    Frozen, Hardware, HostReport, MemoryMode, MemoryRegion, ModuleKind, NetworkStats, RestoreSpec, Restored,
    SnapshotSpec, Stats, Step, instant_ns,
};
use super::warm::OwnPages;
use super::{Daemon, duplicate, resident};
use crate::agent::wire::{self, Header};
use crate::snapshot::layers::Freeze;
use crate::snapshot::memory::image::{Rest, SourceRegion, write_image};
use crate::snapshot::memory::mapped::{MapError, Mapping, UserfaultDevice};
use crate::snapshot::memory::touched::{Place, touched};
use crate::snapshot::state::machine::RegionState;
use crate::snapshot::state::vcpu::VcpuState;
use crate::snapshot::working_set::Touched;
use crate::vmm::boot;
use crate::vmm::chipset;
use crate::vmm::host::Host;
use crate::vmm::machine::{self, BootOptions, DiskPart, Machine, NetworkPart, Parts, Prepared};
use crate::vmm::memory::{self, Backing, Ram};
use crate::vmm::shell::{self, EmptyVm};
use crate::vmm::virtio::net::counters::Counted;
use crate::vmm::virtio::rate::{Rate, Rates};
use crate::vmm::x86::{cpuid, features};

/// What a worker prepares before it is told which VM to be.
#[derive(Default)]
pub struct Shell {
    host: Option<Result<Arc<Host>, Fault>>,
    /// Made ahead; taken by the first request that gets as far.
    vm: Option<EmptyVm>,
    /// For clones of the snapshot that was named; has taken `vm`.
    ahead: Option<Ahead>,
    userfault: Option<UserfaultDevice>,
    /// Made of it before the jail was closed, for the one VM that may want it.
    uffd: Option<Result<Uffd, MapError>>,
    own: Option<Arc<Own>>,
    pages: OwnPages,
    rates: Option<Rates>,
}

/// The VM.
pub struct Vm {
    machine: Machine,
    host: Arc<Host>,
    own: Arc<Own>,
    /// The memory file a clone was started from.
    parent: Option<File>,
    /// Kept open: when the last descriptor goes, the kernel answers missing pages with zeros.
    uffd: Option<(Uffd, Vec<FaultRegion>)>,
    /// What the disks are made of, for the next daemon.
    files: Vec<DiskFiles>,
    protocol: BootProtocol,
    /// A second descriptor of the console, for the machine that follows after a reset. Clones have none: what they were
    /// booted from is not theirs.
    console: Option<UnixStream>,
    /// Network interfaces, likewise.
    networks: Vec<Plug>,
    running: bool,
    /// Page faults of this process before it was this VM.
    faults_before: (u64, u64),
    /// A snapshot failed when disks were frozen already, or some of them: their layers are no longer what the daemon believes.
    disks_uneven: bool,
}

/// A mapping as the machine's RAM.
struct Backed(Mapping);

// SAFETY: a `Mapping` owns its range until it is dropped, and gives its address to nobody but through here.
unsafe impl Backing for Backed {
    fn address(&self) -> *mut u8 {
        self.0.address()
    }

    fn bytes(&self) -> u64 {
        self.0.bytes() as u64
    }
}

/// How long a frame to the agent is. What begins none is passed on as it comes.
fn request_length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<{ wire::HEADER_BYTES }>()?;
    Some(Header::decode(header).map_or(bytes.len(), |header| wire::HEADER_BYTES + header.length as usize))
}

/// Collects timed steps.
struct Steps {
    last: Instant,
    steps: Vec<Step>,
}

impl Steps {
    fn since(start: Instant) -> Self {
        Steps { last: start, steps: Vec::with_capacity(8) }
    }

    fn done(&mut self, name: &str) {
        let now = Instant::now();
        self.steps.push(Step { name: name.into(), us: micros(now - self.last) });
        self.last = now;
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

impl Shell {
    /// Opens the devices and asks what they can do, as far as that is not done. The same for every worker, and a fork takes it along: VMs made of these
    /// descriptors belong to the process that makes them. A failure is told with the first request, and tried again by the next worker.
    pub fn open(&mut self, outside: &Outside) {
        if !self.userfault.as_ref().is_some_and(UserfaultDevice::is_open) {
            self.userfault = Some(match outside.device("userfaultfd") {
                Ok(device) => UserfaultDevice::from_file(device),
                Err(_) => UserfaultDevice::closed(),
            });
        }
        if !matches!(self.host, Some(Ok(_))) {
            self.host = Some(match outside.device("kvm") {
                Ok(file) => Host::new(file).map(Arc::new).map_err(Fault::from),
                Err(error) => Err(fault::io(
                    "/dev/kvm cannot be opened (is KVM enabled, and is this user in the group kvm?)",
                )(error)),
            });
        }
    }

    /// Where this program's pages are; the same in every fork.
    pub fn find_pages(&mut self) {
        self.pages = OwnPages::find();
    }

    /// A userfaultfd can be had by the system call only.
    pub fn needs_userfault_call(&self) -> bool {
        !self.userfault.as_ref().is_some_and(UserfaultDevice::is_open)
    }

    /// Opens what only this very process can open, and only before its jail is closed.
    pub fn open_own(&mut self, outside: &Outside) {
        self.uffd = self.userfault.take().map(|device| device.create());
        self.own = Some(Arc::new(Own::open(outside)));
    }

    /// [`Request::Rates`](super::protocol::Request::Rates).
    pub fn limit(&mut self, rates: protocol::Rates) {
        let rate = |rate: protocol::Rate| Rate { bytes: rate.bytes, operations: rate.operations };
        self.rates = Some(Rates { disk: rate(rates.disk), network: rate(rates.network) });
    }

    /// Before it is let go.
    fn keep_limits(&self, machine: &Machine) -> Result<(), Fault> {
        match &self.rates {
            Some(rates) => Ok(machine.limit(rates)?),
            None => Ok(()),
        }
    }

    fn own(&self) -> Result<Arc<Own>, Fault> {
        self.own.clone().ok_or_else(|| fault::wrong_state("the worker is not prepared"))
    }

    /// Does ahead what needs no knowledge of the VM.
    pub fn prepare(&mut self) {
        // A failure here comes again, with its reason, when a request needs a VM.
        self.vm = self.host().ok().and_then(|host| EmptyVm::new(&host).ok());
    }

    /// Runs what workers run first, so that its code is mapped and its memory there.
    pub fn rehearse(&mut self) {
        self.prepare();
        self.vm = None;
    }

    /// [`Request::Expect`](super::protocol::Request::Expect).
    pub fn expect(&mut self, fds: Vec<OwnedFd>) -> Result<(), Fault> {
        let mut fds = Descriptors::new(fds);
        let file = fds.file()?;
        fds.end()?;
        // One that was expected before is expected no more; this is nobody's waiting time.
        self.ahead = None;
        let vm = self.take_vm(&*self.host()?)?;
        self.ahead = Some(Ahead::Places(Places::of(vm, file)?));
        // A seat has run most of the road already; here it is all new.
        self.pages.map();
        Ok(())
    }

    /// [`Request::Seat`](super::protocol::Request::Seat).
    pub(super) fn seat(
        &mut self,
        daemon: &Daemon,
        spec: &RestoreSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Fault> {
        if spec.memory_mode != MemoryMode::Mapped || spec.paused {
            return Err(fault::wrong_state("a seat is for a mapped clone that runs"));
        }
        self.ahead = None;
        let seat = self.prepare_clone(daemon, spec, fds, &mut Steps::since(Instant::now()))?;
        self.ahead = Some(Ahead::Seat(Box::new(seat)));
        Ok(())
    }

    /// [`Request::Start`](super::protocol::Request::Start).
    pub(super) fn start(&mut self, arrived: Instant) -> Result<(Vm, Restored), Fault> {
        match self.ahead.take() {
            Some(Ahead::Seat(seat)) => self.run(*seat, false, Steps::since(arrived)),
            other => {
                self.ahead = other;
                Err(fault::wrong_state("no clone was made ahead"))
            }
        }
    }

    /// The VM that was made ahead, or another.
    fn take_vm(&mut self, host: &Host) -> Result<EmptyVm, Fault> {
        match self.vm.take() {
            Some(vm) => Ok(vm),
            None => Ok(EmptyVm::new(host)?),
        }
    }

    /// What the daemon is told first: whether there can be a VM.
    pub fn ready(&self) -> Result<(), Fault> {
        self.host().map(drop)
    }

    /// [`Request::Report`](super::protocol::Request::Report).
    pub fn report(&self) -> Result<HostReport, Fault> {
        let host = self.host()?;
        let shown = host.shown_cpuid()?;
        Ok(HostReport { cpu_vendor: cpuid::vendor(&shown), cpu_features: features::feature_names(&shown) })
    }

    fn host(&self) -> Result<Arc<Host>, Fault> {
        match &self.host {
            Some(result) => result.clone(),
            None => Err(fault::wrong_state("the worker is not prepared")),
        }
    }

    /// Cold boot.
    pub(super) fn boot(
        &mut self,
        daemon: &Daemon,
        spec: &BootSpec,
        fds: Vec<OwnedFd>,
        arrived: Instant,
    ) -> Result<(Vm, Booted), Fault> {
        let mut fds = Descriptors::new(fds);
        let (console, agent, kernel) = (fds.socket()?, fds.socket()?, fds.file()?);
        let module = spec.module.map(|kind| Ok::<_, Fault>((kind, fds.file()?))).transpose()?;
        let disks = fds.disks(&spec.disks)?;
        let networks = fds.plugs(&spec.networks)?;
        let files = fds.end()?;
        self.load(daemon, spec, Handed { console, agent, kernel, module, disks, files, networks }, arrived)
    }

    /// Cold boot after a guest's reset: another machine takes the place of `old`, with its console and disks.
    pub(super) fn restart(
        &mut self,
        daemon: &Daemon,
        mut old: Vm,
        spec: &BootSpec,
        fds: Vec<OwnedFd>,
        arrived: Instant,
    ) -> Result<(Vm, Booted), Fault> {
        let mut fds = Descriptors::new(fds);
        let (agent, kernel) = (fds.socket()?, fds.file()?);
        let module = spec.module.map(|kind| Ok::<_, Fault>((kind, fds.file()?))).transpose()?;
        fds.end()?;
        let console = old.console.ok_or_else(|| fault::wrong_state("a clone cannot be booted again"))?;
        let files = std::mem::take(&mut old.files);
        let disks = old.machine.into_disks()?;
        let networks = old.networks.into_iter().map(Plug::checked).collect();
        self.load(daemon, spec, Handed { console, agent, kernel, module, disks, files, networks }, arrived)
    }

    fn load(
        &mut self,
        daemon: &Daemon,
        spec: &BootSpec,
        handed: Handed,
        arrived: Instant,
    ) -> Result<(Vm, Booted), Fault> {
        let host = self.host()?;
        let faults_before = faults();
        let mut steps = Steps::since(arrived);
        let Handed { console, agent, kernel, module, disks, files, networks: plugs } = handed;
        let networks = plugs.iter().map(Plug::part).collect::<Result<_, _>>()?;
        let again = console.try_clone().map_err(fault::io("the console socket"))?;
        let anonymous = |region: RegionState| Ok((region, Mapping::anonymous(region.bytes)?));
        let memory = memory::layout(spec.memory_bytes)?.into_iter().map(anonymous);
        let ram = backed(memory.collect::<Result<_, MapError>>()?)?;
        steps.done("memory");
        ahead::forget(self.ahead.take());
        let shell = shell::Shell::new(self.take_vm(&host)?, ram)?;
        steps.done("vm");
        let parts = Parts {
            console,
            agent,
            agent_port: to_port(spec.agent_port),
            agent_messages: request_length,
            disks,
            networks,
            ready_port: spec.ready_port,
            events: sink(daemon.clone()),
        };
        let options = BootOptions {
            vcpus: spec.vcpus,
            kernel: &kernel,
            module: module.as_ref().map(|(kind, file)| (module_kind(*kind), file)),
            protocol: to_boot(spec.protocol),
            hardware: to_wish(spec.hardware),
            command_line: &spec.command_line,
        };
        let (machine, loaded) = Machine::boot(&host, shell, parts, &options, &mut |step| steps.done(step))?;
        let protocol = from_boot(loaded.protocol);
        self.keep_limits(&machine)?;
        machine.resume()?;
        steps.done("start");
        let vm = Vm {
            machine,
            host,
            own: self.own()?,
            parent: None,
            uffd: None,
            files,
            protocol,
            console: Some(again),
            networks: plugs,
            running: true,
            faults_before,
            disks_uneven: false,
        };
        let arrived_ns = instant_ns(arrived);
        Ok((vm, Booted { protocol, choices: loaded.choices, arrived_ns, steps: steps.steps }))
    }

    /// Start a clone.
    pub(super) fn restore(
        &mut self,
        daemon: &Daemon,
        spec: &RestoreSpec,
        fds: Vec<OwnedFd>,
        arrived: Instant,
    ) -> Result<(Vm, Restored), Fault> {
        let mut steps = Steps::since(arrived);
        let seat = self.prepare_clone(daemon, spec, fds, &mut steps)?;
        self.run(seat, spec.paused, steps)
    }

    /// Everything for a clone, but that it does not run.
    fn prepare_clone(
        &mut self,
        daemon: &Daemon,
        spec: &RestoreSpec,
        fds: Vec<OwnedFd>,
        steps: &mut Steps,
    ) -> Result<Seat, Fault> {
        let host = self.host()?;
        let mut fds = Descriptors::new(fds);
        let (console, agent) = (fds.socket()?, fds.socket()?);
        let (state, memory_file) = (fds.file()?, fds.file()?);
        let disks = fds.disks(&spec.disks)?;
        let links = fds.links(&spec.networks)?;
        let files = fds.end()?;
        let networks = spec
            .networks
            .iter()
            .zip(links)
            .map(|(kind, fd)| Ok(NetworkPart { link: plug(*kind, fd)?, config: None }))
            .collect::<Result<_, Fault>>()?;
        let Ground { state, vm, mut memory } = match self.ahead.take() {
            Some(Ahead::Places(places)) if places.is_of(&state) => places.ground,
            other => {
                ahead::forget(other);
                Ground::new(self.take_vm(&host)?, read_state(&state)?)?
            }
        };
        steps.done("vm");
        let mut uffd = None;
        match spec.memory_mode {
            MemoryMode::Mapped => {
                resident::map(&mut memory, &memory_file, &spec.working_set)?;
            }
            MemoryMode::Userfault => {
                let created = self.uffd.take().ok_or_else(own::used_up)??;
                resident::register(&mut memory, &memory_file, &spec.working_set, &created)?;
                // Before anything touches memory: KVM itself does, when it sets the guest's clock page.
                let regions = hand_over(daemon, &created, &memory)?;
                uffd = Some((created, regions));
            }
        }
        let shell = vm.with_memory(backed(memory)?)?;
        steps.done("memory");
        let parts = Parts {
            console,
            agent,
            // The state knows.
            agent_port: chipset::AgentPort::default(),
            agent_messages: request_length,
            disks,
            networks,
            ready_port: spec.ready_port,
            events: sink(daemon.clone()),
        };
        let machine = Prepared::new(&host, shell, parts, &state, &mut |step| steps.done(step))?;
        Ok(Seat { machine, parent: memory_file, uffd, files })
    }

    /// Lets a clone run.
    fn run(&mut self, seat: Seat, paused: bool, mut steps: Steps) -> Result<(Vm, Restored), Fault> {
        let host = self.host()?;
        let faults_before = faults();
        let machine = seat.machine.into_machine()?;
        self.keep_limits(&machine)?;
        steps.done("time");
        if !paused {
            machine.resume()?;
        }
        steps.done("start");
        let vm = Vm {
            machine,
            host,
            own: self.own()?,
            parent: Some(seat.parent),
            uffd: seat.uffd,
            files: seat.files,
            // What a clone is entered by was decided when its ancestor was booted.
            protocol: BootProtocol::Auto,
            console: None,
            networks: Vec::new(),
            running: !paused,
            faults_before,
            disks_uneven: false,
        };
        Ok((vm, Restored { steps: steps.steps }))
    }
}

/// What a cold boot works on.
struct Handed {
    console: UnixStream,
    agent: UnixStream,
    kernel: File,
    module: Option<(ModuleKind, File)>,
    disks: Vec<DiskPart>,
    files: Vec<DiskFiles>,
    networks: Vec<Plug>,
}

/// RAM with a mapping behind each region.
fn backed(memory: Vec<(RegionState, Mapping)>) -> Result<Ram, Fault> {
    let back = |(region, mapping)| (region, Box::new(Backed(mapping)) as Box<dyn Backing>);
    Ok(Ram::new(memory.into_iter().map(back).collect())?)
}

/// Gives the daemon's pager the userfaultfd.
fn hand_over(
    daemon: &Daemon,
    uffd: &Uffd,
    memory: &[(RegionState, Mapping)],
) -> Result<Vec<FaultRegion>, Fault> {
    let fd = duplicate(borrow(uffd)).map_err(fault::io("the userfaultfd"))?;
    let regions: Vec<FaultRegion> = memory
        .iter()
        .map(|(region, mapping)| FaultRegion {
            host_address: mapping.address().addr() as u64,
            bytes: region.bytes,
            file_offset: region.file_offset,
        })
        .collect();
    daemon.send(&FromWorker::Event(Event::Userfault { regions: regions.clone() }), &[fd.as_fd()]);
    Ok(regions)
}

fn borrow(uffd: &Uffd) -> BorrowedFd<'_> {
    // SAFETY: the Uffd owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(uffd)) }
}

impl Vm {
    pub fn pause(&mut self) -> Result<(), Fault> {
        if self.running {
            self.machine.pause()?;
            self.running = false;
        }
        Ok(())
    }

    pub fn resume(&mut self) -> Result<(), Fault> {
        if !self.running {
            self.machine.resume()?;
            self.running = true;
        }
        Ok(())
    }

    /// Tells a daemon that takes this VM over what it is; `false`: it is gone already.
    pub(super) fn introduce(&self, daemon: &Daemon, keep: &Keep) -> bool {
        let files: Vec<BorrowedFd<'_>> =
            self.files.iter().flat_map(|disk| disk.files.iter().map(AsFd::as_fd)).collect();
        let adopted = Adopted {
            running: self.running,
            reset: daemon.reset(),
            regions: self.uffd.iter().flat_map(|(_, regions)| regions.iter().copied()).collect(),
            disks: self.files.iter().map(|disk| disk.spec.clone()).collect(),
            files: u32::try_from(files.len()).unwrap_or(u32::MAX),
        };
        // Nobody writes to the agent until the next daemon has its socket.
        self.machine.new_peer();
        let mut first = keep.fds();
        if let (Some((uffd, regions)), Some(memory)) = (&self.uffd, &self.parent) {
            // The last daemon may have read of faults and not answered them: those who wait look again, and ask again.
            for region in regions {
                let address = std::ptr::without_provenance_mut(region.host_address as usize);
                if let Err(error) = uffd.wake(address, region.bytes as usize) {
                    tracing::warn!(%error, "page faults of before cannot be asked again");
                }
            }
            first.extend([borrow(uffd), memory.as_fd()]);
        }
        daemon.send(&FromWorker::Event(Event::Adopted(adopted)), &first)
            && files.chunks(FDS_MAX).all(|some| daemon.send(&FromWorker::Event(Event::AdoptedFiles), some))
    }

    /// Freezes the VM into files. On failure it goes on as before.
    pub fn snapshot(&mut self, spec: &SnapshotSpec, fds: Vec<OwnedFd>) -> Result<Frozen, Fault> {
        if self.disks_uneven {
            return Err(fault::wrong_state(
                "an earlier snapshot of this VM failed when its disks were being frozen; start a new VM to snapshot it",
            ));
        }
        let was_running = self.running;
        let begin = Instant::now();
        self.pause()?;
        let result = self.freeze(fds, begin);
        if was_running && (spec.resume || result.is_err()) {
            self.resume()?;
        }
        let (mut frozen, memory_file, rest) = result?;
        frozen.pause_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(parent) = &self.parent {
            let mut steps = Steps::since(Instant::now());
            if let Err(error) = rest.copy(parent, &memory_file) {
                self.disks_uneven = frozen.disks_frozen.contains(&true);
                return Err(error.into());
            }
            steps.done("parent");
            frozen.steps.append(&mut steps.steps);
        }
        Ok(frozen)
    }

    /// Everything that the guest must stand still for; what is left has a memory file to go to.
    fn freeze(&mut self, fds: Vec<OwnedFd>, begin: Instant) -> Result<(Frozen, File, Rest), Fault> {
        let mut steps = Steps::since(begin);
        steps.done("pause");
        let mut fds = Descriptors::new(fds);
        let (mut state_file, memory_file) = (fds.file()?, fds.file()?);
        let (overlays, kept) = fds.next_overlays()?;
        let state = self.machine.save()?;
        let bytes = state.to_bytes().map_err(machine::MachineError::from)?;
        state_file.write_all(&bytes).map_err(fault::io("the state file cannot be written"))?;
        steps.done("state");
        let sources: Vec<SourceRegion> = self
            .machine
            .ram()
            .regions()
            .map(|(region, address)| {
                // SAFETY: RAM stays mapped as long as the machine, and the machine is paused: no vCPU and no
                // device writes to it until `resume`, after the last use of these.
                unsafe { SourceRegion::new(address, region.bytes as usize, region.file_offset) }
            })
            .collect();
        let (written, mut rest) =
            write_image(&sources, self.parent.as_ref(), self.own.page_map()?, &memory_file)?;
        if let Some(parent) = &self.parent
            && !rest.has_room(&memory_file)
        {
            // It may fail, and must then fail before the disks are frozen.
            std::mem::take(&mut rest).copy(parent, &memory_file)?;
        }
        steps.done("memory");
        let many = overlays.len() > 1;
        let disks = self.machine.freeze_disks(overlays).inspect_err(|_| self.disks_uneven = many)?;
        let frozen: Vec<bool> = disks.iter().map(|disk| matches!(disk, Some(Freeze::Layer(_)))).collect();
        keep::frozen(&mut self.files, &frozen, kept);
        steps.done("disks");
        let vcpu: VcpuState = state.get(0)?;
        let shown = kvm_bindings::CpuId::from_entries(&vcpu.cpuid)
            .unwrap_or_else(|_| self.host.supported_cpuid.clone());
        let facts = Frozen {
            vcpus: self.machine.vcpu_count(),
            regions: self
                .machine
                .ram()
                .regions()
                .map(|(r, _)| MemoryRegion {
                    guest_address: r.guest_address,
                    bytes: r.bytes,
                    file_offset: r.file_offset,
                })
                .collect(),
            cpu_vendor: cpuid::vendor(&shown),
            cpu_features: features::feature_names(&shown),
            tsc_khz: vcpu.tsc_khz,
            protocol: self.protocol,
            devices: state.names(),
            pause_us: 0,
            data_bytes: written.data_bytes(),
            disks_frozen: frozen,
            steps: steps.steps,
        };
        Ok((facts, memory_file, rest))
    }

    /// [`Request::Touched`](super::protocol::Request::Touched).
    pub fn touched(&self) -> Result<Touched, Fault> {
        let regions = self.machine.ram().regions();
        let place = |(region, address): (RegionState, *mut u8)| Place {
            address: address.addr(),
            bytes: region.bytes as usize,
            file_offset: region.file_offset,
        };
        Ok(touched(&regions.map(place).collect::<Vec<_>>(), self.own.page_map()?)?)
    }

    pub fn press_power_button(&self) -> Result<(), Fault> {
        Ok(self.machine.press_power_button()?)
    }

    pub fn stats(&self) -> Stats {
        let (now, before) = (faults(), self.faults_before);
        Stats {
            vcpu_exits: self.machine.exits(),
            minor_faults: now.0.saturating_sub(before.0),
            major_faults: now.1.saturating_sub(before.1),
            private_dirty_bytes: self.own.private_dirty().unwrap_or(0),
            networks: self.machine.networks().into_iter().map(network_stats).collect(),
        }
    }
}

fn network_stats(counted: Counted) -> NetworkStats {
    NetworkStats {
        frames_in: counted.frames_in,
        bytes_in: counted.bytes_in,
        frames_out: counted.frames_out,
        bytes_out: counted.bytes_out,
        filtered_in: counted.filtered_in,
        dropped_in_too_long: counted.dropped_in_too_long,
        dropped_in_bad: counted.dropped_in_bad,
        dropped_out_bad: counted.dropped_out_bad,
        dropped_out_no_link: counted.dropped_out_no_link,
    }
}

/// Page faults of this process so far.
fn faults() -> (u64, u64) {
    // SAFETY: an all-zero rusage is valid, and getrusage fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    (u64::try_from(usage.ru_minflt).unwrap_or(0), u64::try_from(usage.ru_majflt).unwrap_or(0))
}

fn module_kind(kind: ModuleKind) -> boot::ModuleKind {
    match kind {
        ModuleKind::MemoryDisk => boot::ModuleKind::MemoryDisk,
        ModuleKind::Initrd => boot::ModuleKind::Initrd,
    }
}

fn to_wish(hardware: Hardware) -> boot::HardwareWish {
    match hardware {
        Hardware::Auto => boot::HardwareWish::Auto,
        Hardware::Microvm => boot::HardwareWish::Microvm,
        Hardware::Pc => boot::HardwareWish::Pc,
    }
}

fn to_port(port: AgentPort) -> chipset::AgentPort {
    match port {
        AgentPort::Virtio => chipset::AgentPort::Virtio,
        AgentPort::Serial => chipset::AgentPort::Serial,
    }
}

fn to_boot(protocol: BootProtocol) -> boot::BootProtocol {
    match protocol {
        BootProtocol::Auto => boot::BootProtocol::Auto,
        BootProtocol::FreeBsd => boot::BootProtocol::FreeBsd,
        BootProtocol::Pvh => boot::BootProtocol::Pvh,
        BootProtocol::Linux => boot::BootProtocol::Linux,
    }
}

fn from_boot(protocol: boot::BootProtocol) -> BootProtocol {
    match protocol {
        boot::BootProtocol::Auto => BootProtocol::Auto,
        boot::BootProtocol::FreeBsd => BootProtocol::FreeBsd,
        boot::BootProtocol::Pvh => BootProtocol::Pvh,
        boot::BootProtocol::Linux => BootProtocol::Linux,
    }
}
