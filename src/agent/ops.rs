//! The agent's operations as types: what can be asked, what is answered, and HELLO.
//!
//! Layouts are in [`wire`], one line for each kind. A request is encoded by the host and a reply decoded with the
//! request at hand, because a reply's shape follows from its kind and its size from what was asked.

use super::frame::{self, Frame, FrameError};
use super::streams::{Opened, Opening};
use super::wire::{self, Address, Reader};

/// Most CPUs that an agent may report.
pub const CPUS_MAX: u32 = 256;

/// What an agent can be asked. Pages are of 4096 bytes and count from the start of the agent's arena; sectors have
/// 512 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentRequest {
    /// Say the same bytes back.
    Echo(Vec<u8>),
    /// Digest of arena pages as they are.
    Hash {
        first_page: u64,
        pages: u64,
    },
    /// Go over arena pages.
    Touch(Pages, TouchMode),
    /// Compare arena pages with the pattern of `Pages::seed`: whole pages, or their first words.
    Check {
        pages: Pages,
        whole: bool,
    },
    DiskInfo {
        disk: u32,
    },
    DiskRead {
        disk: u32,
        first_sector: u64,
        sectors: u32,
    },
    /// `bytes` is whole sectors. With `flush` they are on the disk when the answer comes; then there may be none.
    DiskWrite {
        disk: u32,
        first_sector: u64,
        bytes: Vec<u8>,
        flush: bool,
    },
    Time,
    Cpus,
    /// A short computation on each CPU: [`super::expect::run_on_cpu`].
    RunOnAll {
        seed: u64,
        rounds: u64,
    },
    /// Bytes of the guest's generator, at most [`wire::RANDOM_BYTES_MAX`].
    Random {
        bytes: u32,
    },
    Generation,
    /// Become this clone. `wall_ns`: Unix time in nanoseconds, 0 leaves the clock. `host`: for agents that know
    /// [`wire::KIND_BECOME`].
    Identity {
        generation: [u8; 16],
        entropy: [u8; 32],
        wall_ns: u64,
        host: Option<Host>,
    },
    /// Before a snapshot: keep the system's random generator from drawing; or let it.
    Settle {
        on: bool,
    },
    /// Step the clock to this Unix time in nanoseconds.
    SetClock {
        wall_ns: u64,
    },
    /// Digest of generation, nonce and the first `bytes` (a multiple of 8) of the arena: [`super::expect::compute`].
    Compute {
        nonce: u64,
        bytes: u64,
    },
    /// Print on the serial console.
    Serial(Vec<u8>),
    /// Read so many bytes from the serial console, and print each there.
    SerialEcho {
        bytes: u32,
    },
    /// Reset the machine. There is no answer.
    Reset,
    /// Open a stream: what it says later is not an answer.
    Open(Opening),
    /// Send nothing unasked from the answer on, or go on doing so.
    Hush {
        on: bool,
    },
    Stats,
}

/// What a clone is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// At most [`wire::HOST_NAME_BYTES_MAX`] bytes; empty: as it is.
    pub name: String,
    /// Ethernet addresses by the number of the virtio-net device, at most [`wire::INTERFACES_MAX`].
    pub macs: Vec<(u32, [u8; wire::MAC_BYTES])>,
    /// For agents that know [`wire::KIND_CLONE`].
    pub more: Option<More>,
}

/// What else a clone is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct More {
    /// The guest is a copy of another, and its system's random numbers are to be its own when it answers.
    pub reseed: bool,
    /// At most [`wire::ADDRESSES_MAX`].
    pub addresses: Vec<Address>,
}

/// What an agent that knows [`wire::KIND_CLONE`] has confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confirmed {
    /// The guest's system has drawn on the entropy that it was given.
    pub drawn: bool,
    /// What the interfaces have that were given addresses.
    pub addresses: Vec<Address>,
}

/// A run of arena pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    pub first_page: u64,
    /// How many pages are touched (not how many lie between).
    pub pages: u64,
    /// Distance from one touched page to the next, at least 1.
    pub stride: u64,
    pub seed: u64,
}

/// What [`AgentRequest::Touch`] does with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TouchMode {
    /// Read its first word.
    Read,
    /// Write the pattern's first word.
    Write,
    /// Write the pattern to all of it.
    Fill,
}

/// An answer, in the shape of its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentReply {
    /// Echo, DiskRead, Random.
    Bytes(Vec<u8>),
    /// `ticks`: TSC ticks that it took in the guest, here and below.
    Hash {
        digest: u64,
        ticks: u64,
    },
    /// `xor`: of the words read, or written.
    Touch {
        pages: u64,
        xor: u64,
        ticks: u64,
    },
    Check {
        bad_pages: u64,
        first_bad_page: Option<u64>,
        ticks: u64,
    },
    DiskInfo(DiskInfo),
    Time(GuestTime),
    Cpus(Cpus),
    RunOnAll(Vec<CpuRun>),
    /// Generation, Identity: the last generation told (zeros: none), and how many were.
    Generation {
        generation: [u8; 16],
        count: u64,
    },
    /// Identity with a host: the same, and the host's name as the guest's system has it now.
    Become {
        generation: [u8; 16],
        count: u64,
        host_name: String,
        more: Option<Confirmed>,
    },
    /// Settle: so much of the guest's time is to go by before the snapshot.
    Settled {
        wait_ns: u64,
    },
    /// SetClock: what it says then.
    Clock {
        wall_ns: u64,
    },
    Compute {
        generation: [u8; 16],
        digest: u64,
        ticks: u64,
    },
    /// DiskWrite, Serial, SerialEcho, Hush.
    Done,
    Opened(Opened),
    Stats(GuestStats),
}

/// How the guest's system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestStats {
    pub uptime_ns: u64,
    pub memory_bytes: u64,
    pub free_bytes: u64,
    /// Of 1, 5 and 15 minutes, in thousandths.
    pub load_milli: [u32; 3],
    /// Streams that are open.
    pub streams: u32,
}

/// A disk as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    pub sectors: u64,
    /// The virtio feature bits offered.
    pub features: u64,
    pub read_only: bool,
    /// How many disks the guest has.
    pub disks: u32,
    /// GET_ID, up to its first NUL.
    pub serial: String,
}

/// The guest's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestTime {
    pub tsc: u64,
    pub tsc_khz: u64,
    /// The CMOS clock, in Unix seconds.
    pub cmos_unix_s: u64,
    /// The guest's wall clock, in Unix nanoseconds.
    pub wall_ns: u64,
}

/// The guest's CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus {
    /// As the firmware tables told.
    pub found: u32,
    /// Those that run.
    pub alive: Vec<CpuRuns>,
}

/// One CPU's count of work done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuRuns {
    pub apic_id: u32,
    pub runs: u64,
}

/// One CPU's answer to RunOnAll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuRun {
    pub apic_id: u32,
    pub result: u64,
    pub ticks: u64,
}

/// What an agent says about itself when it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub version: u32,
    /// [`wire::AGENT_TEST_GUEST`] or [`wire::AGENT_FREEBSD`].
    pub agent: u32,
    /// [`wire::BOOT_NATIVE`], [`wire::BOOT_PVH`] or [`wire::BOOT_UNKNOWN`].
    pub boot: u32,
    pub cpus_found: u32,
    pub cpus_alive: u32,
    pub tsc_khz: u32,
    /// Bit n: check [`wire::CHECK_NAMES`]`[n]` was made.
    pub checks_run: u64,
    /// Bit n: and failed.
    pub checks_failed: u64,
    /// Bit n: request kind n is served.
    pub kinds: u64,
    pub memory_bytes: u64,
    /// Memory that page requests may use.
    pub arena_bytes: u64,
    /// Bytes at the arena's start that already hold the pattern of [`super::pattern::ARENA_SEED`]; the rest is zero.
    pub filled_bytes: u64,
    pub disks: u32,
    /// Most bytes of requests that may wait for their answers, 0: any.
    pub request_bytes: u32,
    pub name: String,
}

/// Why an agent's words do not make an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The agent answered with a status: it works, but will not do this.
    #[error("the guest's agent refused the request ({}): {message}", status_text(*status))]
    Refused { status: u16, message: String },
    #[error("the guest's agent answered with a frame of kind {got:#06x} where {expected:#06x} was due")]
    Kind { expected: u16, got: u16 },
    #[error("the guest's agent sent a payload of kind {kind:#06x} that does not have that kind's layout")]
    Layout { kind: u16 },
    #[error("the guest's agent speaks protocol version {0}, this program speaks {version}; use an agent of this release", version = wire::PROTOCOL_VERSION)]
    Version(u32),
}

impl AgentError {
    /// The agent's refusal, if that is what this is; anything else means that the stream is of no more use.
    pub fn refusal(&self) -> Option<u16> {
        match self {
            AgentError::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }
}

/// A status in words.
pub fn status_text(status: u16) -> &'static str {
    match status {
        wire::STATUS_OK => "ok",
        wire::STATUS_UNKNOWN_KIND => "unknown kind of request",
        wire::STATUS_BAD_PAYLOAD => "malformed request",
        wire::STATUS_OUT_OF_RANGE => "out of range",
        wire::STATUS_NO_DEVICE => "no such device",
        wire::STATUS_DEVICE_FAILED => "the device failed",
        wire::STATUS_FAILED => "failed",
        wire::STATUS_NOT_FOUND => "not found",
        wire::STATUS_NOT_ALLOWED => "not allowed",
        wire::STATUS_LIMIT => "at its limit",
        _ => "unknown status",
    }
}

// === impl AgentRequest ===

impl AgentRequest {
    /// The kind it has on the wire.
    pub fn kind(&self) -> u16 {
        match self {
            AgentRequest::Echo(_) => wire::KIND_ECHO,
            AgentRequest::Hash { .. } => wire::KIND_HASH,
            AgentRequest::Touch(..) => wire::KIND_TOUCH,
            AgentRequest::Check { .. } => wire::KIND_CHECK,
            AgentRequest::DiskInfo { .. } => wire::KIND_DISK_INFO,
            AgentRequest::DiskRead { .. } => wire::KIND_DISK_READ,
            AgentRequest::DiskWrite { .. } => wire::KIND_DISK_WRITE,
            AgentRequest::Time => wire::KIND_TIME,
            AgentRequest::Cpus => wire::KIND_CPUS,
            AgentRequest::RunOnAll { .. } => wire::KIND_RUN_ON_ALL,
            AgentRequest::Random { .. } => wire::KIND_RANDOM,
            AgentRequest::Generation => wire::KIND_GENERATION,
            AgentRequest::Identity { host: None, .. } => wire::KIND_IDENTITY,
            AgentRequest::Identity { host: Some(Host { more: None, .. }), .. } => wire::KIND_BECOME,
            AgentRequest::Identity { host: Some(Host { more: Some(_), .. }), .. } => wire::KIND_CLONE,
            AgentRequest::Settle { .. } => wire::KIND_SETTLE,
            AgentRequest::SetClock { .. } => wire::KIND_SET_CLOCK,
            AgentRequest::Compute { .. } => wire::KIND_COMPUTE,
            AgentRequest::Serial(_) => wire::KIND_SERIAL,
            AgentRequest::SerialEcho { .. } => wire::KIND_SERIAL_ECHO,
            AgentRequest::Reset => wire::KIND_RESET,
            AgentRequest::Open(opening) => opening.kind(),
            AgentRequest::Hush { .. } => wire::KIND_HUSH,
            AgentRequest::Stats => wire::KIND_STATS,
        }
    }

    /// True for all but [`AgentRequest::Reset`].
    pub fn has_reply(&self) -> bool {
        !matches!(self, AgentRequest::Reset)
    }

    /// The whole frame. Fails only on a payload that is too long.
    pub fn encode(&self, id: u32) -> Result<Vec<u8>, FrameError> {
        let mut out = Vec::new();
        match self {
            AgentRequest::Echo(bytes) | AgentRequest::Serial(bytes) => out.extend_from_slice(bytes),
            AgentRequest::Hash { first_page, pages } => {
                put64(&mut out, *first_page);
                put64(&mut out, *pages);
            }
            AgentRequest::Touch(pages, mode) => put_pages(
                &mut out,
                pages,
                match mode {
                    TouchMode::Read => wire::TOUCH_READ,
                    TouchMode::Write => wire::TOUCH_WRITE,
                    TouchMode::Fill => wire::TOUCH_FILL,
                },
            ),
            AgentRequest::Check { pages, whole } => {
                put_pages(&mut out, pages, if *whole { wire::TOUCH_FILL } else { wire::TOUCH_WRITE });
            }
            AgentRequest::DiskInfo { disk } => put32(&mut out, *disk),
            AgentRequest::SerialEcho { bytes } => put32(&mut out, *bytes),
            AgentRequest::DiskRead { disk, first_sector, sectors } => {
                put32(&mut out, *disk);
                put32(&mut out, *sectors);
                put64(&mut out, *first_sector);
            }
            AgentRequest::DiskWrite { disk, first_sector, bytes, flush } => {
                put32(&mut out, *disk);
                put32(&mut out, if *flush { wire::DISK_FLUSH } else { 0 });
                put64(&mut out, *first_sector);
                out.extend_from_slice(bytes);
            }
            AgentRequest::RunOnAll { seed, rounds } => {
                put64(&mut out, *seed);
                put64(&mut out, *rounds);
            }
            AgentRequest::Random { bytes } => put32(&mut out, *bytes),
            AgentRequest::Identity { generation, entropy, wall_ns, host } => {
                out.extend_from_slice(generation);
                out.extend_from_slice(entropy);
                put64(&mut out, *wall_ns);
                if let Some(host) = host {
                    put_string(&mut out, host.name.as_bytes());
                    put32(&mut out, u32::try_from(host.macs.len()).unwrap_or(u32::MAX));
                    for (interface, mac) in &host.macs {
                        put32(&mut out, *interface);
                        out.extend_from_slice(mac);
                        out.extend_from_slice(&[0; 2]);
                    }
                    if let Some(more) = &host.more {
                        put32(&mut out, if more.reseed { wire::CLONE_RESEED } else { 0 });
                        put32(&mut out, u32::try_from(more.addresses.len()).unwrap_or(u32::MAX));
                        more.addresses.iter().for_each(|address| out.extend_from_slice(&address.encode()));
                    }
                }
            }
            AgentRequest::Settle { on } => put32(&mut out, u32::from(*on)),
            AgentRequest::SetClock { wall_ns } => put64(&mut out, *wall_ns),
            AgentRequest::Compute { nonce, bytes } => {
                put64(&mut out, *nonce);
                put64(&mut out, *bytes);
            }
            AgentRequest::Open(opening) => opening.encode(&mut out),
            AgentRequest::Hush { on } => put32(&mut out, u32::from(*on)),
            AgentRequest::Time
            | AgentRequest::Cpus
            | AgentRequest::Generation
            | AgentRequest::Stats
            | AgentRequest::Reset => {}
        }
        frame::encode(self.kind(), wire::STATUS_OK, id, &out)
    }
}

// === impl AgentReply ===

impl AgentReply {
    /// Reads the reply to `request`; the caller has matched the ids.
    pub fn decode(request: &AgentRequest, frame: Frame) -> Result<AgentReply, AgentError> {
        let expected = request.kind() | wire::REPLY;
        if frame.kind != expected {
            return Err(AgentError::Kind { expected, got: frame.kind });
        }
        if frame.status != wire::STATUS_OK {
            return Err(AgentError::Refused { status: frame.status, message: sentence(&frame.payload) });
        }
        AgentReply::parse(request, frame.payload).ok_or(AgentError::Layout { kind: expected })
    }

    fn parse(request: &AgentRequest, payload: Vec<u8>) -> Option<AgentReply> {
        let length = payload.len();
        let mut reader = Reader::new(&payload);
        let reply = match request {
            AgentRequest::Echo(bytes) => {
                return (length == bytes.len()).then_some(AgentReply::Bytes(payload));
            }
            AgentRequest::DiskRead { sectors, .. } => {
                let due = (*sectors as usize).checked_mul(wire::SECTOR_BYTES)?;
                return (length == due).then_some(AgentReply::Bytes(payload));
            }
            AgentRequest::Random { bytes } => {
                return (length == *bytes as usize).then_some(AgentReply::Bytes(payload));
            }
            AgentRequest::Hash { .. } => AgentReply::Hash { digest: reader.u64()?, ticks: reader.u64()? },
            AgentRequest::Touch(..) => {
                AgentReply::Touch { pages: reader.u64()?, xor: reader.u64()?, ticks: reader.u64()? }
            }
            AgentRequest::Check { .. } => AgentReply::Check {
                bad_pages: reader.u64()?,
                first_bad_page: Some(reader.u64()?).filter(|page| *page != u64::MAX),
                ticks: reader.u64()?,
            },
            AgentRequest::DiskInfo { .. } => AgentReply::DiskInfo(DiskInfo {
                sectors: reader.u64()?,
                features: reader.u64()?,
                read_only: reader.u32()? != 0,
                disks: reader.u32()?,
                serial: text(reader.bytes(wire::DISK_SERIAL_BYTES)?),
            }),
            AgentRequest::Time => AgentReply::Time(GuestTime {
                tsc: reader.u64()?,
                tsc_khz: reader.u64()?,
                cmos_unix_s: reader.u64()?,
                wall_ns: reader.u64()?,
            }),
            AgentRequest::Cpus => {
                let found = reader.u32()?;
                let alive = (0..cpu_count(reader.u32()?)?)
                    .map(|_| {
                        let apic_id = reader.u32()?;
                        reader.u32()?;
                        Some(CpuRuns { apic_id, runs: reader.u64()? })
                    })
                    .collect::<Option<Vec<_>>>()?;
                AgentReply::Cpus(Cpus { found, alive })
            }
            AgentRequest::RunOnAll { .. } => {
                cpu_count(u32::try_from(length / CPU_RUN_BYTES).ok()?)?;
                let mut runs = Vec::new();
                while reader.end().is_none() {
                    let apic_id = reader.u32()?;
                    reader.u32()?;
                    runs.push(CpuRun { apic_id, result: reader.u64()?, ticks: reader.u64()? });
                }
                AgentReply::RunOnAll(runs)
            }
            AgentRequest::Identity { host: Some(host), .. } => AgentReply::Become {
                generation: reader.array()?,
                count: reader.u64()?,
                host_name: text(reader.string().filter(|name| name.len() <= HOST_NAME_REPLY_BYTES_MAX)?),
                more: match host.more {
                    Some(_) => Some(Confirmed {
                        drawn: reader.u32()? == wire::ENTROPY_DRAWN,
                        addresses: Address::decode_all(&mut reader)?.collect(),
                    }),
                    None => None,
                },
            },
            AgentRequest::Settle { .. } => AgentReply::Settled { wait_ns: reader.u64()? },
            AgentRequest::SetClock { .. } => AgentReply::Clock { wall_ns: reader.u64()? },
            AgentRequest::Generation | AgentRequest::Identity { host: None, .. } => {
                AgentReply::Generation { generation: reader.array()?, count: reader.u64()? }
            }
            AgentRequest::Compute { .. } => AgentReply::Compute {
                generation: reader.array()?,
                digest: reader.u64()?,
                ticks: reader.u64()?,
            },
            AgentRequest::Open(opening) => AgentReply::Opened(Opened::decode(opening, &mut reader)?),
            AgentRequest::Stats => AgentReply::Stats(GuestStats {
                uptime_ns: reader.u64()?,
                memory_bytes: reader.u64()?,
                free_bytes: reader.u64()?,
                load_milli: [reader.u32()?, reader.u32()?, reader.u32()?],
                streams: reader.u32()?,
            }),
            AgentRequest::DiskWrite { .. }
            | AgentRequest::Hush { .. }
            | AgentRequest::Serial(_)
            | AgentRequest::SerialEcho { .. }
            | AgentRequest::Reset => AgentReply::Done,
        };
        reader.end()?;
        Some(reply)
    }
}

// === impl Hello ===

impl Hello {
    /// Reads the first frame of an agent.
    pub fn decode(frame: &Frame) -> Result<Hello, AgentError> {
        if frame.kind != wire::KIND_HELLO {
            return Err(AgentError::Kind { expected: wire::KIND_HELLO, got: frame.kind });
        }
        let hello = Hello::parse(&frame.payload).ok_or(AgentError::Layout { kind: wire::KIND_HELLO })?;
        if hello.version != wire::PROTOCOL_VERSION {
            return Err(AgentError::Version(hello.version));
        }
        Ok(hello)
    }

    fn parse(payload: &[u8]) -> Option<Hello> {
        let mut reader = Reader::new(payload);
        let mut hello = Hello {
            version: reader.u32()?,
            agent: reader.u32()?,
            boot: reader.u32()?,
            cpus_found: reader.u32()?,
            cpus_alive: reader.u32()?,
            tsc_khz: reader.u32()?,
            checks_run: reader.u64()?,
            checks_failed: reader.u64()?,
            kinds: reader.u64()?,
            memory_bytes: reader.u64()?,
            arena_bytes: reader.u64()?,
            filled_bytes: reader.u64()?,
            disks: reader.u32()?,
            request_bytes: reader.u32()?,
            name: String::new(),
        };
        let name = reader.rest();
        hello.name = (name.len() <= wire::NAME_BYTES_MAX).then(|| text(name))?;
        // What is no UTF-8 has become longer, and must be a name again when it is read from a snapshot.
        while hello.name.len() > wire::NAME_BYTES_MAX {
            hello.name.pop();
        }
        Some(hello)
    }

    /// The frame that an agent sends.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let mut out = Vec::with_capacity(wire::HELLO_BYTES + self.name.len());
        for word in [self.version, self.agent, self.boot, self.cpus_found, self.cpus_alive, self.tsc_khz] {
            put32(&mut out, word);
        }
        for word in [
            self.checks_run,
            self.checks_failed,
            self.kinds,
            self.memory_bytes,
            self.arena_bytes,
            self.filled_bytes,
        ] {
            put64(&mut out, word);
        }
        put32(&mut out, self.disks);
        put32(&mut out, self.request_bytes);
        out.extend_from_slice(self.name.as_bytes());
        frame::encode(wire::KIND_HELLO, wire::STATUS_OK, 0, &out)
    }

    /// True if the agent serves this kind of request.
    pub fn serves(&self, request: &AgentRequest) -> bool {
        1u64.checked_shl(request.kind().into()).is_some_and(|bit| self.kinds & bit != 0)
    }

    /// Names of the failed checks.
    pub fn failed_checks(&self) -> Vec<&'static str> {
        let named = wire::CHECK_NAMES.iter().enumerate();
        named.filter(|(bit, _)| self.checks_failed >> bit & 1 != 0).map(|(_, name)| *name).collect()
    }
}

/// Longest host name that a system may have (FreeBSD's MAXHOSTNAMELEN).
const HOST_NAME_REPLY_BYTES_MAX: usize = 256;
/// Longest message kept of a refusal.
const MESSAGE_CHARS_MAX: usize = 300;
/// Bytes of one CPU in RUN_ON_ALL's reply.
const CPU_RUN_BYTES: usize = 24;

pub(super) fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(super) fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put32(out, u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(bytes);
}

fn put_pages(out: &mut Vec<u8>, pages: &Pages, mode: u32) {
    for word in [pages.first_page, pages.pages, pages.stride, pages.seed] {
        put64(out, word);
    }
    put32(out, mode);
    put32(out, 0);
}

fn cpu_count(count: u32) -> Option<u32> {
    (count <= CPUS_MAX).then_some(count)
}

/// What a guest says in words. It goes to terminals and logs: a guest must not write control characters there.
pub(super) fn sentence(bytes: &[u8]) -> String {
    let mut message = String::from_utf8_lossy(bytes).into_owned();
    if let Some((end, _)) = message.char_indices().nth(MESSAGE_CHARS_MAX) {
        message.truncate(end);
    }
    message.replace(char::is_control, " ")
}

/// Bytes up to the first NUL as printable text.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (front, _) = bytes.split_at(end);
    String::from_utf8_lossy(front).replace(char::is_control, "?")
}

#[cfg(test)]
pub(super) mod tests;
