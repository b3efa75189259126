//! The control protocol between the daemon and a worker.
//!
//! Transport: one `SOCK_SEQPACKET` Unix socket pair, the worker's end being its standard input. One packet is one
//! message: bincode 2 ([`crate::snapshot::codec`]) of [`ToWorker`] or [`FromWorker`], at most
//! [`MESSAGE_BYTES_MAX`] bytes, with at most [`FDS_MAX`] descriptors by `SCM_RIGHTS`, in the order that the
//! message's doc gives. A request is answered by exactly one [`FromWorker::Reply`] with the same id; events
//! come at any time. The worker opens no file by path: all it works on is handed to it.
//!
//! A worker is a *shell* until its first [`Request::Boot`] or [`Request::Restore`]; after that it is that VM until
//! it exits. End of file on the socket ends a shell. A VM that was given a door ([`Request::Keep`]) outlives it: for some time it waits there
//! for the next daemon. Both say [`Greeting`], and if the versions are the same the worker says [`Event::Adopted`]; from then on that
//! connection is the control socket.

#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::snapshot::working_set::Touched;

/// Version of all that is said on the control socket. A daemon takes over workers of its own version only, so it changes with every change of a
/// message here, and of what a message means.
pub const CONTROL_VERSION: u32 = 5;
/// Descriptor number of the worker's end of the control socket: standard input's, because that can be given without a step of our own
/// between fork and exec, and so without a fork that copies the daemon's page tables (`fleet::process`).
pub const CONTROL_FD: i32 = 0;
/// Largest packet either side sends or accepts.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most descriptors in one packet (the kernel's own limit is 253).
pub const FDS_MAX: usize = 64;
/// Most vCPUs of a VM.
pub const VCPUS_MAX: u8 = 32;
/// Most disks of a VM.
pub const DISKS_MAX: usize = 8;
/// Most network interfaces of a VM.
pub const NETWORKS_MAX: usize = 4;
/// How long a worker waits for its vCPUs when it is asked where they are.
pub const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Most layers under a disk, the base not counted.
pub const LAYERS_MAX: usize = 16;

/// How a worker is to be jailed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum JailMode {
    /// No VM without all layers that are needed.
    Required,
    /// As many layers as this host and user allow.
    #[default]
    Best,
    /// None.
    Off,
}

impl JailMode {
    /// As it is written in arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::Required => "required",
            Self::Best => "best",
            Self::Off => "off",
        }
    }

    /// Of such a name.
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::Required, Self::Best, Self::Off].into_iter().find(|mode| mode.name() == name)
    }
}

/// A layer of a worker's jail. Each stands by itself: what gets through one meets the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layer {
    /// A uid and gid that no other process has, and no supplementary groups.
    User,
    /// A mount namespace whose root is empty and read-only.
    Mounts,
    /// A pid namespace of the workers of one zygote.
    Processes,
    /// A network namespace without a link.
    Network,
    /// An ipc namespace.
    Ipc,
    /// A uts namespace.
    HostName,
    /// No capabilities, none to be had (bounding set, `no_new_privs`).
    Capabilities,
    /// Not dumpable: no core file, and nobody of the same uid can trace it or read its memory.
    Undumpable,
    /// Resource limits: descriptors, threads, locked memory, message queues.
    Limits,
    /// seccomp: an allow-list of system calls, a narrower one for each kind of thread.
    SystemCalls,
    /// Landlock: no file, no TCP port, no signal, no abstract socket outside.
    Landlock,
}

impl Layer {
    /// All, in the order in which they are put on.
    pub const ALL: [Self; 11] = [
        Self::Mounts,
        Self::Network,
        Self::Ipc,
        Self::HostName,
        Self::Processes,
        Self::Limits,
        Self::User,
        Self::Capabilities,
        Self::Undumpable,
        Self::Landlock,
        Self::SystemCalls,
    ];

    /// For logs and arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Mounts => "mount",
            Self::Processes => "pid",
            Self::Network => "net",
            Self::Ipc => "ipc",
            Self::HostName => "uts",
            Self::Capabilities => "capabilities",
            Self::Undumpable => "undumpable",
            Self::Limits => "rlimits",
            Self::SystemCalls => "seccomp",
            Self::Landlock => "landlock",
        }
    }

    /// What it forbids, others do too: [`JailMode::Required`] goes without it on a kernel that has not got it.
    pub fn is_extra(self) -> bool {
        self == Self::Landlock
    }
}

/// The layers of a worker's jail.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    pub active: Vec<Layer>,
    /// Those that are not, and why.
    pub missing: Vec<(Layer, String)>,
}

impl Jail {
    /// What [`JailMode::Required`] misses, as a sentence part; `None`: nothing.
    pub fn lacks(&self) -> Option<String> {
        let needed = self.missing.iter().filter(|(layer, _)| !layer.is_extra());
        let lacks: Vec<String> = needed.map(|(layer, why)| format!("{} ({why})", layer.name())).collect();
        (!lacks.is_empty()).then(|| lacks.join(", "))
    }

    /// Names of the layers that are there.
    pub fn names(&self) -> String {
        self.active.iter().map(|layer| layer.name()).collect::<Vec<_>>().join(", ")
    }
}

/// What a zygote can be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToZygote {
    /// Become one more worker. Descriptors: the worker's end of its control socket, and its stderr.
    Fork,
}

/// The answer: the new process's number, told by itself, so that a zygote that dies in this moment loses none; or why there is none.
pub type Forked = Result<u32, String>;

/// The first packet either way on a connection at a worker's door. It is the same in all versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    magic: [u8; 8],
    /// Little endian.
    version: [u8; 4],
}

impl Greeting {
    const MAGIC: [u8; 8] = *b"CSADOPT\0";

    /// What this program says.
    pub fn ours() -> Self {
        Self { magic: Self::MAGIC, version: CONTROL_VERSION.to_le_bytes() }
    }

    /// The other side's version; `None`: it is none of ours.
    pub fn version(&self) -> Option<u32> {
        (self.magic == Self::MAGIC).then_some(u32::from_le_bytes(self.version))
    }
}

/// A message from the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ToWorker {
    pub id: u64,
    pub request: Request,
}

/// What a worker can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // Sent a handful of times in a VM's life.
pub enum Request {
    /// Cold boot. Descriptors: console socket, agent socket, kernel, then the module if `module`, then for each
    /// disk its base, its frozen layers from the lowest, and (unless read-only or direct) its empty writable overlay, then for each
    /// network interface that is not down its link. Answered when the vCPUs have been told to run.
    Boot(BootSpec),
    /// To a shell, before anything else, at most once: outlive the daemon when it is a VM. Descriptors: its door (a `SOCK_SEQPACKET` socket that is
    /// bound and does not listen yet), and the daemon's ends of the console socket, the agent socket and the pipe from its stderr: held so that
    /// nothing breaks or is lost while there is no daemon, and given to the next one.
    Keep {
        /// How long it waits for the next daemon before it ends.
        orphan_ms: u64,
    },
    /// To a shell: what each device of its VM may do in a second; holds after a restart, too. Without it there is no limit.
    Rates(Rates),
    /// To a shell: what its host can show a guest. (It takes a VM to know, and is the same for all workers of a host.)
    Report,
    /// To a shell: do ahead what is the same for all clones of a snapshot. Descriptor: its state file. Answered when done; a shell that
    /// could not do it, or that becomes another VM after all, is none the worse for it.
    Expect,
    /// To a shell: do everything for a clone but let it run. Descriptors as in `Restore`, which must be `Mapped` and not `paused`. Answered
    /// when done; a shell that could not do it, or that becomes another VM after all, is none the worse for it.
    Seat(RestoreSpec),
    /// To a shell with a seat: let that clone run. Answered like `Restore`.
    Start,
    /// Start a clone. Descriptors: console socket, agent socket, state file, memory file, then disks and links
    /// as in `Boot`. With [`MemoryMode::Userfault`] an [`Event::Userfault`] comes before the reply.
    Restore(RestoreSpec),
    /// Boot again after [`Event::GuestReset`], with the console, the disks and everything on them, and the network links as they
    /// are. The spec's `disks` and `networks` are not looked at. Descriptors: a new agent socket, the daemon's end of it (held as
    /// `Keep` says), kernel, then the module if `module`. Answered like
    /// `Boot`; after an error the worker ends.
    Restart(BootSpec),
    /// Freeze the VM into files and go on (or stay paused). Descriptors: state file, memory file (both empty,
    /// read-write), then for each writable disk the overlay that it has, for reading only, and a new empty one. Answered when all is written
    /// (not synced), and when the worker has nothing of it open for writing any more.
    Snapshot(SnapshotSpec),
    /// Stop the vCPUs; answered when they and the devices are quiet. Idempotent.
    Pause,
    /// Undo [`Request::Pause`]. Idempotent.
    Resume,
    /// End the VM now; answered, then the process exits with status 0.
    Kill,
    /// Counters for `vm ls` and the bench.
    Stats,
    /// Press the power button; answered at once. The guest then powers itself off, or not. Refused by a machine that has
    /// none, and while the guest does not listen to it.
    PowerButton,
    /// When this VM's boot reached what. Does not disturb the guest.
    Milestones,
    /// What the VM has touched of the memory file that it was started from, so far.
    Touched,
    /// Where each vCPU is. The vCPUs stand still for a moment; devices do not. Answered within [`LOOK_TIMEOUT`] also when one of
    /// them does not come out of its exit.
    Inspect,
}

/// What a device may do in a second; `None`: as much as it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    pub bytes: Option<u64>,
    /// Requests of a disk, frames of a network interface.
    pub operations: Option<u32>,
}

/// What each device of a kind may do in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Each disk.
    pub disk: Rate,
    /// Each network interface, in each direction.
    pub network: Rate,
}

/// How the guest is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootProtocol {
    /// Look into the kernel file and choose.
    Auto,
    /// FreeBSD's own 64-bit loader protocol.
    FreeBsd,
    /// PVH: 32-bit entry from the ELF note.
    Pvh,
    /// Linux's bzImage, 64-bit entry.
    Linux,
}

/// The kind of machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hardware {
    /// Look into the kernel file for the drivers it has.
    #[default]
    Auto,
    /// virtio-mmio and MPTable.
    Microvm,
    /// ACPI and virtio-pci: for unmodified kernels.
    Pc,
}

/// What the agent's channel is plugged into in the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentPort {
    /// A virtio-console.
    #[default]
    Virtio,
    /// COM2, for kernels without a driver for that one.
    Serial,
}

/// What the optional module file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModuleKind {
    /// A memory disk (FreeBSD `md_image`).
    MemoryDisk,
    /// A Linux initial RAM disk.
    Initrd,
}

/// A machine to be cold-booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BootSpec {
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub protocol: BootProtocol,
    pub hardware: Hardware,
    pub agent_port: AgentPort,
    pub module: Option<ModuleKind>,
    /// Kernel command line (PVH, Linux), or `name=value` words for FreeBSD's kernel environment. Added after what
    /// the builder chooses, so it wins.
    pub command_line: String,
    pub disks: Vec<DiskSpec>,
    pub networks: Vec<NetworkSpec>,
    /// An output to this port is the ready point (reported as [`Event::ReadyPort`]).
    pub ready_port: Option<u16>,
}

/// One disk: a base file under frozen layers under a private overlay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskSpec {
    pub read_only: bool,
    /// Writes go into the base itself, which is open for writing; no layers, no overlay, no snapshots.
    pub direct: bool,
    /// Bytes of the disk as the guest sees it (a multiple of 512).
    pub bytes: u64,
    /// Frozen layers between base and overlay.
    pub layers: u8,
    /// Shown to the guest as the disk's serial (virtio-blk GET_ID), at most 20 bytes.
    pub serial: String,
}

/// One network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    pub link: LinkKind,
    /// A unicast address.
    pub mac: [u8; 6],
    /// Told to the guest, if there is one.
    pub mtu: Option<u16>,
}

/// What a network interface is plugged into, and what its descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkKind {
    /// A TAP, attached with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and headers of 12 bytes.
    Tap,
    /// One end of a packet socket pair, on which the same bytes travel.
    Wire,
    /// Nothing; no descriptor.
    Down,
}

/// How a clone's memory is faulted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryMode {
    /// `MAP_PRIVATE` of the memory file.
    Mapped,
    /// userfaultfd, answered by the daemon's pager.
    Userfault,
}

/// A clone to be started. Everything else is in the state file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestoreSpec {
    pub memory_mode: MemoryMode,
    pub disks: Vec<DiskSpec>,
    /// Links for the guest's network interfaces, from the first; those left over have none.
    pub networks: Vec<LinkKind>,
    /// Stay paused after the state is set.
    pub paused: bool,
    pub ready_port: Option<u16>,
    /// What it will probably touch first. Bringing it in takes time; of a mapped clone that somebody waits for it is empty.
    pub working_set: Touched,
}

/// How to freeze.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotSpec {
    /// Run on after the freeze; otherwise stay paused.
    pub resume: bool,
}

/// A message from the worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)]
pub enum FromWorker {
    Reply { id: u64, result: Result<Reply, Fault> },
    Event(Event),
}

/// A successful answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Booted(Booted),
    Restored(Restored),
    Frozen(Frozen),
    Stats(Stats),
    Milestones(Milestones),
    Report(HostReport),
    /// One for each vCPU, in order.
    Looks(Vec<VcpuLook>),
    Touched(Touched),
}

/// One vCPU, for [`Request::Inspect`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuLook {
    pub index: u8,
    /// Or why there are none.
    pub registers: Result<Registers, String>,
}

/// Registers that tell where a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub activity: Activity,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Highest interrupt vector that waits to be delivered.
    pub pending: Option<u8>,
    /// Highest interrupt vector that the guest is serving.
    pub serving: Option<u8>,
}

/// What a vCPU is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    Running,
    /// In HLT.
    Halted,
    /// An application processor that the guest has not started.
    NotStarted,
    /// KVM's number of another state.
    Other(u32),
}

/// When a boot reached what; times as in [`monotonic_ns`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestones {
    /// The boot CPU was about to enter the guest for the first time.
    pub entered_ns: Option<u64>,
    /// The guest wrote its first byte to the serial port.
    pub first_output_ns: Option<u64>,
    /// Of cold-booted VMs, where KVM tells.
    pub clock: Option<GuestClock>,
}

/// What the boot CPU's time stamp counter said at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClock {
    pub at_ns: u64,
    pub tsc: u64,
    pub khz: u32,
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host read alike (as long as nobody puts a worker into another time
/// namespace), and which `Instant` is.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that every Linux has, and a timespec that lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// An instant of this process on the clock of [`monotonic_ns`].
pub fn instant_ns(instant: Instant) -> u64 {
    let ago = u64::try_from(instant.elapsed().as_nanos()).unwrap_or(u64::MAX);
    monotonic_ns().saturating_sub(ago)
}

/// What a cold boot chose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Booted {
    /// The protocol used (never `Auto`).
    pub protocol: BootProtocol,
    /// One line for each choice made by looking into kernel and disks.
    pub choices: Vec<String>,
    /// When the worker had the request: its first step began. As in [`monotonic_ns`].
    pub arrived_ns: u64,
    pub steps: Vec<Step>,
}

/// What a restore did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Restored {
    pub steps: Vec<Step>,
}

/// One registered userfault range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultRegion {
    /// Address in the worker's address space.
    pub host_address: u64,
    pub bytes: u64,
    /// Offset in the memory file.
    pub file_offset: u64,
}

/// A timed step, in order: name, microseconds it took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub us: u32,
}

/// What a snapshot froze: the facts for the manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Frozen {
    pub vcpus: u8,
    pub regions: Vec<MemoryRegion>,
    /// Vendor string of CPUID leaf 0.
    pub cpu_vendor: String,
    /// Names of the CPUID features that the guest was shown.
    pub cpu_features: Vec<String>,
    pub tsc_khz: u32,
    /// `Auto` for a clone: as its snapshot has it.
    pub protocol: BootProtocol,
    /// Device names with their sections' versions.
    pub devices: Vec<String>,
    /// How long the guest stood still.
    pub pause_us: u64,
    /// Bytes of memory written (not holes).
    pub data_bytes: u64,
    /// For each disk: the old overlay became a frozen layer. False: nothing was in it, or the disk is read-only.
    pub disks_frozen: Vec<bool>,
    pub steps: Vec<Step>,
}

/// Guest-physical memory and where it lies in `memory.img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRegion {
    pub guest_address: u64,
    pub bytes: u64,
    pub file_offset: u64,
}

/// Counters.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Stats {
    pub vcpu_exits: u64,
    /// Page faults of the process since it has been this VM.
    pub minor_faults: u64,
    pub major_faults: u64,
    pub private_dirty_bytes: u64,
    /// One for each network interface.
    pub networks: Vec<NetworkStats>,
}

/// What went through a network interface since this VM was started. *In* is what the guest receives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStats {
    pub frames_in: u64,
    pub bytes_in: u64,
    pub frames_out: u64,
    pub bytes_out: u64,
    /// Not for this guest, by its own filter.
    pub filtered_in: u64,
    /// Larger than the guest's receive buffers.
    pub dropped_in_too_long: u64,
    /// No sensible frame, or one that the guest's driver did not agree to.
    pub dropped_in_bad: u64,
    /// No sensible frame, or one that the host does not take.
    pub dropped_out_bad: u64,
    /// There is no link, or nobody at its other end.
    pub dropped_out_no_link: u64,
}

/// A failure, told so that a person can act on it.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    pub message: String,
}

/// Which gRPC code a [`Fault`] becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// The caller's input is at fault: INVALID_ARGUMENT.
    InvalidInput,
    /// Stored data is damaged: DATA_LOSS.
    Damaged,
    /// This host cannot do it: FAILED_PRECONDITION.
    Unsupported,
    /// Out of memory, disk, descriptors: RESOURCE_EXHAUSTED.
    Exhausted,
    /// Asked at the wrong time: FAILED_PRECONDITION.
    WrongState,
    /// Anything else: INTERNAL.
    Internal,
}

/// What a guest on this host can be shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Vendor string of CPUID leaf 0.
    pub cpu_vendor: String,
    /// Names of CPUID features, as in [`Frozen::cpu_features`].
    pub cpu_features: Vec<String>,
}

/// Things that happen by themselves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Event {
    /// The worker is jailed, and ready to be told what to be; or why no VM can run here. Always the first message, sent once.
    Hello { ready: Result<(), Fault>, jail: Jail },
    /// A boot phase reached: name, microseconds since the request arrived.
    Phase { name: String, us: u64 },
    /// One descriptor, the userfaultfd: the pager must answer it from now on, or the restore, whose reply is still
    /// to come, waits for ever (KVM reads guest memory when it sets the guest's clock page).
    Userfault { regions: Vec<FaultRegion> },
    /// The guest wrote to the ready port.
    ReadyPort { value: u32 },
    /// The guest reset itself. Its vCPU stands; the daemon says what is to follow: `Restart` or `Kill`.
    GuestReset { how: String },
    /// The first on a connection at the door. Descriptors: those that [`Request::Keep`] gave but for the door, and if there are `regions` the
    /// userfaultfd, to be answered as in `Userfault`, and the memory file.
    Adopted(Adopted),
    /// After `Adopted`, until there are as many as it says: files of the disks, each disk's as in `Boot`.
    AdoptedFiles,
    /// The VM is over; the process exits after this.
    Exited(ExitReason),
}

/// What a VM is that has outlived its daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Adopted {
    /// Not paused.
    pub running: bool,
    /// The guest has reset itself and stands, as in [`Event::GuestReset`].
    pub reset: Option<String>,
    /// Of a userfault clone.
    pub regions: Vec<FaultRegion>,
    pub disks: Vec<DiskSpec>,
    /// How many files of disks follow.
    pub files: u32,
}

/// Why a VM ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ExitReason {
    Killed,
    GuestPowerOff,
    /// KVM could not go on: what, with registers.
    Failed(String),
}
