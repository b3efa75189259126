//! Domain values as messages and back.

use tonic::Status;

use super::proto;
use super::status::invalid;
use crate::fleet::boot::ReadyPoint;
use crate::fleet::cgroup::Limits;
use crate::fleet::profile::{Profile, ProfilePhase};
use crate::fleet::vm::{Entropy, Origin, State, Vm};
use crate::fleet::watchdog;
use crate::fleet::{
    Activity, AgentPort, BootProtocol, Hardware, MemoryMode, ModuleKind, Rate, Step, VcpuLook,
};

pub fn vm(vm: &Vm) -> proto::Vm {
    let status = vm.status();
    let hello = vm.agent.hello();
    let ended = status.state == State::Exited;
    proto::Vm {
        id: vm.id.clone(),
        name: vm.name().unwrap_or_default().to_owned(),
        state: state_out(status.state).into(),
        exit_reason: status.exit_reason.unwrap_or_default(),
        origin: Some(match &vm.origin {
            Origin::Image(name) => proto::vm::Origin::Image(name.clone()),
            Origin::Embedded => proto::vm::Origin::Embedded(true),
            Origin::Snapshot(id) => proto::vm::Origin::Snapshot(id.clone()),
        }),
        vcpus: vm.vcpus.into(),
        memory_bytes: vm.memory_bytes,
        protocol: protocol_out(status.protocol.unwrap_or(BootProtocol::Auto)).into(),
        generation: vm.generation.map(|id| id.to_vec()).unwrap_or_default().into(),
        agent: hello.is_some(),
        agent_name: hello.map(|hello| hello.name.clone()).unwrap_or_default(),
        memory_mode: match vm.memory_mode {
            None => proto::MemoryMode::Unspecified,
            Some(mode) => memory_mode_out(mode),
        }
        .into(),
        created_unix_ms: vm.created_unix_ms,
        start_us: status.start_us,
        steps: steps(status.steps),
        worker_pid: if ended { 0 } else { vm.process.pid() },
        restarts: status.restarts,
        panic: vm.console.words().borrow().panic.clone().unwrap_or_default(),
        pool: vm.pool.as_deref().unwrap_or_default().to_owned(),
        ready_in_pool: vm.is_held(),
        unclaimed: vm.is_unclaimed(),
        host_name: vm.host_name(),
        guest_entropy: match vm.entropy() {
            Entropy::Unknown => proto::GuestEntropy::Unspecified,
            Entropy::Pending => proto::GuestEntropy::Pending,
            Entropy::Drawn => proto::GuestEntropy::Drawn,
        }
        .into(),
        limits: limits_out(vm.limits),
        networks: vm.networks().iter().map(super::network::network_out).collect(),
    }
}

pub fn limits_in(limits: Option<proto::ResourceLimits>) -> Limits {
    let limits = limits.unwrap_or_default();
    Limits {
        memory_bytes: nonzero(limits.memory_bytes),
        cpu_millis: (limits.cpu_millis > 0).then_some(limits.cpu_millis),
        disk: rate(limits.disk_bytes_per_second, limits.disk_operations_per_second),
        network: rate(limits.network_bytes_per_second, limits.network_frames_per_second),
    }
}

fn rate(bytes: u64, operations: u32) -> Rate {
    Rate { bytes: nonzero(bytes), operations: (operations > 0).then_some(operations) }
}

pub fn limits_out(limits: Limits) -> Option<proto::ResourceLimits> {
    (!limits.is_none()).then(|| proto::ResourceLimits {
        memory_bytes: limits.memory_bytes.unwrap_or(0),
        cpu_millis: limits.cpu_millis.unwrap_or(0),
        disk_bytes_per_second: limits.disk.bytes.unwrap_or(0),
        disk_operations_per_second: limits.disk.operations.unwrap_or(0),
        network_bytes_per_second: limits.network.bytes.unwrap_or(0),
        network_frames_per_second: limits.network.operations.unwrap_or(0),
    })
}

pub fn state_out(state: State) -> proto::VmState {
    match state {
        State::Booting => proto::VmState::Booting,
        State::Ready => proto::VmState::Ready,
        State::Running => proto::VmState::Running,
        State::Paused => proto::VmState::Paused,
        State::Snapshotting => proto::VmState::Snapshotting,
        State::Exited => proto::VmState::Exited,
    }
}

pub fn look(look: &VcpuLook) -> proto::VcpuLook {
    let known =
        proto::VcpuLook { index: look.index.into(), line: watchdog::line(look), ..Default::default() };
    match &look.registers {
        Err(problem) => proto::VcpuLook { problem: problem.clone(), ..known },
        Ok(r) => proto::VcpuLook {
            state: match r.activity {
                Activity::Running => proto::VcpuState::Running,
                Activity::Halted => proto::VcpuState::Halted,
                Activity::NotStarted => proto::VcpuState::NotStarted,
                Activity::Other(_) => proto::VcpuState::Other,
            }
            .into(),
            rip: r.rip,
            rsp: r.rsp,
            rflags: r.rflags,
            cr0: r.cr0,
            cr2: r.cr2,
            cr3: r.cr3,
            cr4: r.cr4,
            efer: r.efer,
            cpl: r.cpl.into(),
            pending: r.pending.map(Into::into),
            serving: r.serving.map(Into::into),
            ..known
        },
    }
}

pub fn profile(profile: &Profile) -> proto::BootProfile {
    let phase = |phase: &ProfilePhase| proto::ProfilePhase {
        name: phase.name.clone(),
        us: phase.us,
        guest_tsc: phase.guest_tsc,
    };
    proto::BootProfile {
        phases: profile.phases.iter().map(phase).collect(),
        own_us: profile.own_us,
        tsc_khz: profile.tsc_khz,
    }
}

pub fn steps(steps: Vec<Step>) -> Vec<proto::Step> {
    steps.into_iter().map(|step| proto::Step { name: step.name, us: step.us.into() }).collect()
}

pub fn protocol_out(protocol: BootProtocol) -> proto::BootProtocol {
    match protocol {
        BootProtocol::Auto => proto::BootProtocol::Unspecified,
        BootProtocol::FreeBsd => proto::BootProtocol::Freebsd,
        BootProtocol::Pvh => proto::BootProtocol::Pvh,
        BootProtocol::Linux => proto::BootProtocol::Linux,
    }
}

/// `Auto` when unspecified.
pub fn protocol_in(number: i32) -> Result<BootProtocol, Status> {
    match proto::BootProtocol::try_from(number) {
        Ok(proto::BootProtocol::Unspecified) => Ok(BootProtocol::Auto),
        Ok(proto::BootProtocol::Freebsd) => Ok(BootProtocol::FreeBsd),
        Ok(proto::BootProtocol::Pvh) => Ok(BootProtocol::Pvh),
        Ok(proto::BootProtocol::Linux) => Ok(BootProtocol::Linux),
        Err(_) => Err(invalid(format!("protocol {number} is not known; see BootProtocol"))),
    }
}

pub fn hardware_out(hardware: Hardware) -> proto::Hardware {
    match hardware {
        Hardware::Auto => proto::Hardware::Unspecified,
        Hardware::Microvm => proto::Hardware::Microvm,
        Hardware::Pc => proto::Hardware::Pc,
    }
}

/// `Auto` when unspecified.
pub fn hardware_in(number: i32) -> Result<Hardware, Status> {
    match proto::Hardware::try_from(number) {
        Ok(proto::Hardware::Unspecified) => Ok(Hardware::Auto),
        Ok(proto::Hardware::Microvm) => Ok(Hardware::Microvm),
        Ok(proto::Hardware::Pc) => Ok(Hardware::Pc),
        Err(_) => Err(invalid(format!("hardware {number} is not known; see Hardware"))),
    }
}

pub fn agent_port_out(port: AgentPort) -> proto::AgentPort {
    match port {
        AgentPort::Virtio => proto::AgentPort::Virtio,
        AgentPort::Serial => proto::AgentPort::Serial,
    }
}

/// `Virtio` when unspecified.
pub fn agent_port_in(number: i32) -> Result<AgentPort, Status> {
    match proto::AgentPort::try_from(number) {
        Ok(proto::AgentPort::Unspecified | proto::AgentPort::Virtio) => Ok(AgentPort::Virtio),
        Ok(proto::AgentPort::Serial) => Ok(AgentPort::Serial),
        Err(_) => Err(invalid(format!("agent port {number} is not known; see AgentPort"))),
    }
}

pub fn memory_mode_out(mode: MemoryMode) -> proto::MemoryMode {
    match mode {
        MemoryMode::Mapped => proto::MemoryMode::Mapped,
        MemoryMode::Userfault => proto::MemoryMode::Userfault,
    }
}

pub fn memory_mode_in(number: i32) -> Result<MemoryMode, Status> {
    match proto::MemoryMode::try_from(number) {
        Ok(proto::MemoryMode::Unspecified | proto::MemoryMode::Mapped) => Ok(MemoryMode::Mapped),
        Ok(proto::MemoryMode::Userfault) => Ok(MemoryMode::Userfault),
        Err(_) => Err(invalid(format!("memory mode {number} is not known; see MemoryMode"))),
    }
}

/// True for MANAGED.
pub fn identity_in(number: i32) -> Result<bool, Status> {
    match proto::Identity::try_from(number) {
        Ok(proto::Identity::Unspecified | proto::Identity::Managed) => Ok(true),
        Ok(proto::Identity::Unmanaged) => Ok(false),
        Err(_) => Err(invalid(format!("identity {number} is not known; see Identity"))),
    }
}

pub fn module_in(number: i32) -> Result<Option<ModuleKind>, Status> {
    match proto::ModuleKind::try_from(number) {
        Ok(proto::ModuleKind::Unspecified) => Ok(None),
        Ok(proto::ModuleKind::MemoryDisk) => Ok(Some(ModuleKind::MemoryDisk)),
        Ok(proto::ModuleKind::Initrd) => Ok(Some(ModuleKind::Initrd)),
        Err(_) => Err(invalid(format!("module kind {number} is not known; see ModuleKind"))),
    }
}

pub fn module_out(module: Option<ModuleKind>) -> proto::ModuleKind {
    match module {
        None => proto::ModuleKind::Unspecified,
        Some(ModuleKind::MemoryDisk) => proto::ModuleKind::MemoryDisk,
        Some(ModuleKind::Initrd) => proto::ModuleKind::Initrd,
    }
}

/// `None` when nothing was said.
pub fn ready_in(ready: Option<proto::ReadyPoint>) -> Result<Option<ReadyPoint>, Status> {
    use proto::ready_point::At;
    match ready.and_then(|ready| ready.at) {
        None => Ok(None),
        Some(At::ConsolePattern(pattern)) => Ok(Some(ReadyPoint::Console(pattern))),
        Some(At::Port(port)) => u16::try_from(port)
            .map(|port| Some(ReadyPoint::Port(port)))
            .map_err(|_| invalid(format!("ready port {port}; give 1 to 65535"))),
        Some(At::AgentHello(true)) => Ok(Some(ReadyPoint::Agent)),
        Some(At::AgentHello(false)) => Err(invalid("agent_hello must be true when it is set")),
    }
}

pub fn ready_out(ready: &ReadyPoint) -> proto::ReadyPoint {
    use proto::ready_point::At;
    proto::ReadyPoint {
        at: Some(match ready {
            ReadyPoint::Console(pattern) => At::ConsolePattern(pattern.clone()),
            ReadyPoint::Port(port) => At::Port((*port).into()),
            ReadyPoint::Agent => At::AgentHello(true),
        }),
    }
}

/// 0 as `None`.
pub fn vcpus_in(vcpus: u32) -> Result<Option<u8>, Status> {
    match u8::try_from(vcpus) {
        Ok(0) => Ok(None),
        Ok(vcpus) => Ok(Some(vcpus)),
        Err(_) => Err(invalid(format!("{vcpus} vCPUs; ask for 1 to 32"))),
    }
}

/// An empty text as `None`.
pub fn optional(text: String) -> Option<String> {
    if text.is_empty() { None } else { Some(text) }
}

/// 0 as `None`.
pub fn nonzero(number: u64) -> Option<u64> {
    if number == 0 { None } else { Some(number) }
}
