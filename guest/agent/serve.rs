//! Requests and their replies. Layouts are in `wire.rs`, a line for each kind.

use crate::entropy::Pools;
use crate::identity::{self, Identity};
use crate::network;
use crate::port::{Input, Next, Output, REPLY_BYTES_MAX, REQUEST_BYTES_MAX};
use crate::random::Generator;
use crate::streams::{BAD_PAYLOAD, Refusal, Streams};
use crate::sys;
use crate::wire::*;

const NAME: &[u8] = b"coldspark agent for FreeBSD";
const KINDS: u64 = {
    let kinds = [
        KIND_HELLO,
        KIND_ECHO,
        KIND_TIME,
        KIND_RANDOM,
        KIND_GENERATION,
        KIND_IDENTITY,
        KIND_BECOME,
        KIND_SET_CLOCK,
        KIND_SETTLE,
        KIND_CLONE,
        KIND_EXEC,
        KIND_FILE_PUT,
        KIND_FILE_GET,
        KIND_STREAM_DATA,
        KIND_STREAM_WINDOW,
        KIND_SIGNAL,
        KIND_END,
        KIND_HUSH,
        KIND_STATS,
    ];
    let (mut bits, mut at) = (0u64, 0);
    while at < kinds.len() {
        bits |= 1 << kinds[at];
        at += 1;
    }
    bits
};
const PAGE_BYTES: u64 = 4096;

pub(crate) struct Agent {
    pub(crate) input: Input,
    pub(crate) output: Output,
    pub(crate) streams: Streams,
    pub(crate) pools: Pools,
    identity: Identity,
    random: Option<Generator>,
}

impl Agent {
    pub(crate) const fn new() -> Agent {
        Agent {
            input: Input::new(),
            output: Output::new(),
            streams: Streams::new(),
            pools: Pools::new(),
            identity: Identity::new(),
            random: None,
        }
    }

    /// Whether the longest reply has room.
    pub(crate) fn takes_requests(&self) -> bool {
        self.output.has_room()
    }

    pub(crate) fn hello(&mut self) {
        let cpus = sys::sysctl_number("hw.ncpu").unwrap_or(1) as u32;
        let out = &mut self.output;
        out.begin();
        for word in [PROTOCOL_VERSION, AGENT_FREEBSD, BOOT_UNKNOWN, cpus, cpus, tsc_khz() as u32] {
            out.put32(word);
        }
        // No checks; no arena.
        let memory = sys::sysctl_number("hw.physmem").unwrap_or(0);
        for word in [0, 0, KINDS, memory, 0, 0] {
            out.put64(word);
        }
        out.put32(0);
        out.put32(REQUEST_BYTES_MAX as u32);
        out.put(NAME);
        out.finish(KIND_HELLO, STATUS_OK, 0);
    }

    /// Serves what has come whole.
    pub(crate) fn serve(&mut self) {
        while self.takes_requests() {
            let (header, outcome) = match self.input.next() {
                Next::Nothing => return,
                Next::TooLong(header) => {
                    self.output.begin();
                    (header, Err((STATUS_OUT_OF_RANGE, "a longer request than the agent has room for")))
                }
                Next::Frame(header) => {
                    if matches!(header.kind, KIND_STREAM_DATA | KIND_STREAM_WINDOW | KIND_SIGNAL) {
                        self.streams.hear(header.kind, header.id, self.input.payload(&header));
                        self.input.done(&header);
                        continue;
                    }
                    self.output.begin();
                    let outcome = self.answer(&header);
                    self.input.done(&header);
                    (header, outcome)
                }
            };
            let status = match outcome {
                Ok(()) => STATUS_OK,
                Err((status, why)) => {
                    self.output.begin_again();
                    self.output.put(why.as_bytes());
                    status
                }
            };
            self.output.finish(header.kind | REPLY, status, header.id);
        }
    }

    /// Puts the reply's payload.
    fn answer(&mut self, header: &Header) -> Result<(), Refusal> {
        let payload = self.input.payload(header);
        let mut reader = Reader::new(payload);
        let out = &mut self.output;
        match header.kind {
            KIND_ECHO => out.put(payload),
            KIND_TIME => {
                reader.end().ok_or(BAD_PAYLOAD)?;
                out.put64(tsc());
                out.put64(tsc_khz());
                // The system's business.
                out.put64(0);
                out.put64(sys::wall_ns());
            }
            KIND_RANDOM => {
                let bytes = reader.u32().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                if bytes > RANDOM_BYTES_MAX || bytes as usize > REPLY_BYTES_MAX - HEADER_BYTES {
                    return Err((STATUS_OUT_OF_RANGE, "more bytes than one request may ask for"));
                }
                let random = generator(&mut self.random)?;
                random.fill(out.room(bytes as usize));
            }
            KIND_GENERATION => {
                reader.end().ok_or(BAD_PAYLOAD)?;
                self.identity.put(out);
            }
            kind @ (KIND_IDENTITY | KIND_BECOME | KIND_CLONE) => {
                let told = Become::decode(kind, payload).ok_or(BAD_PAYLOAD)?;
                self.streams.forget();
                let random = generator(&mut self.random)?;
                let entropy = self.identity.become_clone(&told, random, &mut self.pools)?;
                self.identity.put(out);
                if kind != KIND_IDENTITY {
                    identity::put_host_name(out);
                }
                if kind == KIND_CLONE {
                    out.put32(entropy);
                    network::put(told.addresses, out)?;
                }
            }
            KIND_SETTLE => {
                let on = reader.u32().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                match on {
                    0 if self.pools.are_closed() => self.pools.open(),
                    0 => {}
                    _ => _ = self.pools.close(),
                }
                out.put64(self.pools.wait_ns());
            }
            KIND_SET_CLOCK => {
                let wall_ns = reader.u64().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                sys::set_wall_ns(wall_ns).map_err(|_| {
                    (STATUS_NOT_ALLOWED, "the agent may not set the guest's clock; is it root, and the securelevel below 2?")
                })?;
                out.put64(sys::wall_ns());
            }
            kind @ (KIND_EXEC | KIND_FILE_PUT | KIND_FILE_GET) => {
                self.streams.start(kind, header.id, payload, out)?;
            }
            KIND_HUSH => {
                let on = reader.u32().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                self.streams.hush(on != 0);
            }
            KIND_STATS => {
                reader.end().ok_or(BAD_PAYLOAD)?;
                out.put64(sys::uptime_ns());
                out.put64(sys::sysctl_number("hw.physmem").unwrap_or(0));
                let free = sys::sysctl_number("vm.stats.vm.v_free_count").unwrap_or(0);
                out.put64(free.saturating_mul(PAGE_BYTES));
                load().into_iter().for_each(|milli| out.put32(milli));
                out.put32(self.streams.count());
            }
            _ => return Err((STATUS_UNKNOWN_KIND, "the FreeBSD agent does not know this kind")),
        }
        Ok(())
    }
}

/// The agent's own generator: made of the system's bytes, and fed by each IDENTITY, so that no clone repeats another.
fn generator(random: &mut Option<Generator>) -> Result<&mut Generator, Refusal> {
    if random.is_none() {
        let mut seed = [0; ENTROPY_BYTES];
        if !sys::random(&mut seed) {
            return Err((STATUS_FAILED, "the guest's system has no random bytes yet"));
        }
        let mut new = Generator::new(tsc());
        new.feed(&seed);
        *random = Some(new);
    }
    random.as_mut().ok_or((STATUS_FAILED, "no random generator"))
}

fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn tsc_khz() -> u64 {
    sys::sysctl_number("machdep.tsc_freq").unwrap_or(0) / 1000
}

/// Of 1, 5 and 15 minutes, in thousandths: `vm.loadavg` is three u32 and their scale.
fn load() -> [u32; 3] {
    let mut raw = [0u8; 24];
    if sys::sysctl("vm.loadavg", &mut raw, &[]) != Ok(24) {
        return [0; 3];
    }
    let mut reader = Reader::new(&raw);
    let loads = [(); 3].map(|()| reader.u32().unwrap_or(0));
    // Padding.
    reader.u32();
    let scale = reader.u64().unwrap_or(0).max(1);
    loads.map(|load| (u64::from(load) * 1000 / scale) as u32)
}
