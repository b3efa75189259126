//! Serving the agent protocol: one request after the other, for ever. Layouts are in `wire.rs`, a line for each kind.

use core::mem::MaybeUninit;

use crate::arena::Arena;
use crate::checks::Checks;
use crate::clock::{Clock, cmos_unix_s};
use crate::fail;
use crate::gate::{self, ticks};
use crate::network::Network;
use crate::pattern::{Digest, Page};
use crate::random::Generator;
use crate::serial::{self, say};
use crate::smp::Cpus;
use crate::streams::{Means, Streams};
use crate::port::Port;
use crate::virtio::{Devices, Failure};
use crate::wire::*;

const FRAME_BYTES: usize = HEADER_BYTES + PAYLOAD_BYTES_MAX;
const NAME: &[u8] = b"coldspark test guest";
const KINDS: u64 = {
    let mut kinds = 0;
    let mut kind = KIND_HELLO;
    while kind <= KIND_LAST {
        kinds |= 1 << kind;
        kind += 1;
    }
    // Its generator draws on what it is given at once.
    kinds & !(1 << KIND_SETTLE)
};

#[repr(align(4096))]
struct Buffer([u8; FRAME_BYTES]);

static mut REQUEST: Buffer = Buffer([0; FRAME_BYTES]);
static mut REPLY_FRAME: Buffer = Buffer([0; FRAME_BYTES]);
static mut BOOTED: MaybeUninit<Booted> = MaybeUninit::uninit();

/// Frames of this size or less use the page that every request touches; few pages written make a quick clone.
const SHORT_FRAME_BYTES: usize = 512;

unsafe extern "C" {
    static mut short_request: [u8; SHORT_FRAME_BYTES];
    static mut short_reply: [u8; SHORT_FRAME_BYTES];
    fn enter_service() -> !;
}

/// What the boot leaves.
pub(crate) struct Booted {
    pub(crate) devices: Devices,
    /// Moves to the new stack.
    pub(crate) state: Option<State>,
}

/// What changes with requests.
pub(crate) struct State {
    pub(crate) facts: Facts,
    pub(crate) arena: Arena,
    pub(crate) cpus: Cpus,
    pub(crate) random: Generator,
    pub(crate) clock: Clock,
    pub(crate) network: Option<Network>,
}

/// What was found out at boot, for HELLO.
pub(crate) struct Facts {
    pub(crate) boot: u32,
    pub(crate) tsc_khz: u32,
    pub(crate) checks: Checks,
    pub(crate) memory_bytes: u64,
}

struct Server {
    devices: &'static mut Devices,
    arena: Arena,
    cpus: Cpus,
    random: Generator,
    clock: Clock,
    tsc_khz: u32,
    memory_bytes: u64,
    streams: Streams,
    network: Option<Network>,
    generation: [u8; GENERATION_BYTES],
    generations: u64,
    host_name: [u8; HOST_NAME_BYTES_MAX],
    host_name_bytes: usize,
}

/// A refusal: status and sentence.
pub(crate) type Refusal = (u16, &'static str);

pub(crate) const BAD_PAYLOAD: Refusal = (STATUS_BAD_PAYLOAD, "the payload does not have this kind's layout");
const OUT_OF_ARENA: Refusal = (STATUS_OUT_OF_RANGE, "pages beyond the arena, or a stride of 0");
const NO_DISK: Refusal = (STATUS_NO_DEVICE, "the guest has no such disk");

/// A payload being written.
pub(crate) struct Reply<'a> {
    bytes: &'a mut [u8],
    pub(crate) length: usize,
}

impl<'a> Reply<'a> {
    pub(crate) fn new(bytes: &'a mut [u8]) -> Reply<'a> {
        Reply { bytes, length: 0 }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    pub(crate) fn put32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub(crate) fn put64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    /// The next `count` bytes, to be written in place.
    pub(crate) fn room(&mut self, count: usize) -> &mut [u8] {
        let start = self.length;
        self.length += count;
        &mut self.bytes[start..start + count]
    }
}

/// Leaves the boot's stack behind and serves for ever.
pub(crate) fn enter(booted: Booted) -> ! {
    // SAFETY: called once; guest_serve is the next to look at it. Nothing on the stack is needed any more.
    unsafe {
        (*(&raw mut BOOTED)).write(booted);
        enter_service()
    }
}

/// Entered by the stub on a new stack.
#[unsafe(no_mangle)]
extern "C" fn guest_serve() -> ! {
    // SAFETY: written by `enter`; these are the only references to each. What changes with a request moves to this stack.
    let (booted, long, short) = unsafe {
        let booted = (*(&raw mut BOOTED)).assume_init_mut();
        let long = (&mut (*(&raw mut REQUEST)).0, &mut (*(&raw mut REPLY_FRAME)).0);
        (booted, long, (&mut *(&raw mut short_request), &mut *(&raw mut short_reply)))
    };
    let (Some(mut console), Some(state)) = (Port::find(&mut booted.devices), booted.state.take()) else {
        say!("no port for the agent: saying back what is typed here");
        say_back()
    };
    let mut server = Server {
        devices: &mut booted.devices,
        arena: state.arena,
        cpus: state.cpus,
        random: state.random,
        clock: state.clock,
        tsc_khz: state.facts.tsc_khz,
        memory_bytes: state.facts.memory_bytes,
        streams: Streams::new(),
        network: state.network,
        generation: [0; GENERATION_BYTES],
        generations: 0,
        host_name: [0; HOST_NAME_BYTES_MAX],
        host_name_bytes: 0,
    };
    let length = server.hello(&state.facts, &mut Reply::new(&mut long.1[HEADER_BYTES..]));
    send(&mut console, long.1, KIND_HELLO, STATUS_OK, 0, length);
    loop {
        server.attend(&mut console, long.1);
        let header = receive(&mut console, short.0);
        let length = header.length as usize;
        let request: &mut [u8] = if length <= SHORT_FRAME_BYTES - HEADER_BYTES { short.0 } else { long.0 };
        port(console.read(&mut request[HEADER_BYTES..HEADER_BYTES + length]));
        let kind = header.kind | REPLY;
        match header.kind {
            KIND_RESET => reset(),
            KIND_STREAM_DATA | KIND_STREAM_WINDOW | KIND_SIGNAL => {
                server.streams.hear(
                    header.kind,
                    header.id,
                    &request[HEADER_BYTES..HEADER_BYTES + length],
                );
            }
            // Answered from where it lies.
            KIND_ECHO => send(&mut console, request, kind, STATUS_OK, header.id, length),
            _ => {
                let reply: &mut [u8] = if has_long_reply(header.kind) { long.1 } else { short.1 };
                let mut out = Reply::new(&mut reply[HEADER_BYTES..]);
                let payload = &request[HEADER_BYTES..HEADER_BYTES + length];
                let status = match server.serve(&header, payload, &mut out) {
                    Ok(()) => STATUS_OK,
                    Err((status, why)) => {
                        out.length = 0;
                        out.put(why.as_bytes());
                        status
                    }
                };
                let length = out.length;
                send(&mut console, reply, kind, status, header.id, length);
            }
        }
    }
}

/// On a machine without a port for the agent, which is another VMM's (`coldspark bench --compare-...`): says each typed byte back.
fn say_back() -> ! {
    loop {
        if let Some(byte) = serial::read() {
            serial::write(&[byte]);
        }
    }
}

/// Kinds whose reply may not fit a short frame.
fn has_long_reply(kind: u16) -> bool {
    matches!(kind, KIND_DISK_READ | KIND_RANDOM | KIND_CPUS | KIND_RUN_ON_ALL)
}

/// A port that does not receive leaves nobody to tell.
fn port(outcome: Result<(), Failure>) {
    if let Err(why) = outcome {
        fail(format_args!("the agent's port, receiving: {why:?}"));
    }
}

/// The header of the next request. Bytes that begin no frame are skipped.
fn receive(console: &mut Port, frame: &mut [u8; SHORT_FRAME_BYTES]) -> Header {
    let mut have = 0;
    loop {
        port(console.read(&mut frame[have..HEADER_BYTES]));
        let Some(bytes) = frame.first_chunk::<HEADER_BYTES>() else { continue };
        if let Ok(header) = Header::decode(bytes) {
            return header;
        }
        let start = (1..HEADER_BYTES)
            .find(|at| MAGIC.to_le_bytes().starts_with(&frame[*at..HEADER_BYTES.min(at + 4)]))
            .unwrap_or(HEADER_BYTES);
        frame.copy_within(start..HEADER_BYTES, 0);
        have = HEADER_BYTES - start;
    }
}

/// Sends `length` bytes of payload that lie behind the header's place.
pub(crate) fn send(console: &mut Port, frame: &mut [u8], kind: u16, status: u16, id: u32, length: usize) {
    let header = Header { kind, status, id, length: length as u32 };
    frame[..HEADER_BYTES].copy_from_slice(&header.encode());
    if let Err(why) = console.write(&frame[..HEADER_BYTES + length]) {
        fail(format_args!("the agent's port, sending: {why:?}"));
    }
}

fn reset() -> ! {
    serial::out8(crate::RESET_PORT, crate::RESET);
    fail(format_args!("the keyboard controller did not reset the machine"))
}

impl Server {
    /// Does what streams and the network want, until a request comes; requests come first. Comes back without one when there is nothing
    /// else that could wake it.
    fn attend(&mut self, console: &mut Port, frame: &mut [u8]) {
        while !console.has_bytes() {
            let mut did = false;
            if let Some(network) = &mut self.network {
                let second = u64::from(self.tsc_khz).saturating_mul(1000);
                did |= network.step(&self.host_name[..self.host_name_bytes], second);
            }
            if self.streams.is_busy() {
                let mut means = Means {
                    random: &mut self.random,
                    network: &mut self.network,
                    arena: &mut self.arena,
                    devices: self.devices,
                };
                did |= self.streams.step(console, frame, &mut means);
            }
            match &mut self.network {
                _ if did => {}
                Some(network) => network.halt(console),
                None => return,
            }
        }
    }

    fn hello(&mut self, facts: &Facts, out: &mut Reply) -> usize {
        let (found, alive) = (self.cpus.found() as u32, self.cpus.alive() as u32);
        for word in [PROTOCOL_VERSION, AGENT_TEST_GUEST, facts.boot, found, alive, facts.tsc_khz] {
            out.put32(word);
        }
        out.put64(facts.checks.run());
        out.put64(facts.checks.failed());
        out.put64(KINDS);
        out.put64(facts.memory_bytes);
        out.put64(self.arena.bytes());
        out.put64(self.arena.filled_bytes());
        out.put32(self.devices.disks() as u32);
        out.put32(0);
        out.put(NAME);
        out.length
    }

    fn serve(&mut self, header: &Header, payload: &[u8], out: &mut Reply) -> Result<(), Refusal> {
        let mut reader = Reader::new(payload);
        match header.kind {
            KIND_HASH => self.hash(&mut reader, out),
            KIND_TOUCH => self.touch(&mut reader, out),
            KIND_CHECK => self.check(&mut reader, out),
            KIND_DISK_INFO => self.disk_info(&mut reader, out),
            KIND_DISK_READ => self.disk_read(&mut reader, out),
            KIND_DISK_WRITE => self.disk_write(&mut reader),
            KIND_TIME => self.time(&reader, out),
            KIND_CPUS => self.count_cpus(&reader, out),
            KIND_RUN_ON_ALL => self.run_on_all(&mut reader, out),
            KIND_RANDOM => self.give_random(&mut reader, out),
            KIND_GENERATION => {
                reader.end().ok_or(BAD_PAYLOAD)?;
                self.put_generation(out);
                out.put64(self.generations);
                Ok(())
            }
            kind @ (KIND_IDENTITY | KIND_BECOME | KIND_CLONE) => self.identity(kind, payload, out),
            KIND_SET_CLOCK => {
                let [wall_ns] = longs(&mut reader)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                self.clock.set(wall_ns);
                out.put64(self.clock.wall_ns(gate::tsc()));
                Ok(())
            }
            KIND_COMPUTE => self.compute(&mut reader, out),
            KIND_SERIAL => {
                serial::write(payload);
                Ok(())
            }
            KIND_SERIAL_ECHO => {
                let bytes = reader.u32().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                for _ in 0..bytes {
                    let byte = serial::read().ok_or((STATUS_FAILED, "nobody types on the serial console"))?;
                    serial::write(&[byte]);
                }
                Ok(())
            }
            kind @ (KIND_EXEC | KIND_FILE_PUT | KIND_FILE_GET) => {
                self.streams.start(kind, header.id, payload, self.tsc_khz, out)
            }
            KIND_HUSH => {
                let on = reader.u32().ok_or(BAD_PAYLOAD)?;
                reader.end().ok_or(BAD_PAYLOAD)?;
                self.streams.hush(on != 0);
                Ok(())
            }
            KIND_STATS => self.stats(&reader, out),
            _ => Err((STATUS_UNKNOWN_KIND, "the test guest does not know this kind")),
        }
    }

    fn hash(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let [first, pages] = longs(reader)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        self.in_arena(first, pages, 1)?;
        let start = ticks();
        let mut digest = Digest::new();
        for page in first..first + pages {
            for word in self.arena.page(page) {
                digest.word(*word);
            }
        }
        out.put64(digest.finish());
        out.put64(ticks().wrapping_sub(start));
        Ok(())
    }

    fn touch(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let ([first, pages, stride, seed], mode) = pages_layout(reader)?;
        self.in_arena(first, pages, stride)?;
        let start = ticks();
        let mut xor = 0;
        for page in (first..).step_by(stride as usize).take(pages as usize) {
            let place = self.arena.first_word(page);
            // SAFETY: the first word of a page of the arena; volatile: the touch is the purpose.
            xor ^= unsafe {
                match mode {
                    TOUCH_READ => place.read_volatile(),
                    TOUCH_WRITE => {
                        let word = Page::new(seed, page).word();
                        place.write_volatile(word);
                        word
                    }
                    TOUCH_FILL => {
                        self.arena.fill_page(page, seed);
                        place.read_volatile()
                    }
                    _ => return Err((STATUS_OUT_OF_RANGE, "a mode that is not read, write or fill")),
                }
            };
        }
        out.put64(pages);
        out.put64(xor);
        out.put64(ticks().wrapping_sub(start));
        Ok(())
    }

    fn check(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let ([first, pages, stride, seed], mode) = pages_layout(reader)?;
        self.in_arena(first, pages, stride)?;
        let words = match mode {
            TOUCH_WRITE => 1,
            TOUCH_FILL => usize::MAX,
            _ => return Err((STATUS_OUT_OF_RANGE, "a mode that is not write or fill")),
        };
        let start = ticks();
        let (mut bad, mut first_bad) = (0u64, u64::MAX);
        for page in (first..).step_by(stride as usize).take(pages as usize) {
            let mut due = Page::new(seed, page);
            if self.arena.page(page).iter().take(words).any(|word| *word != due.word()) {
                bad += 1;
                first_bad = first_bad.min(page);
            }
        }
        out.put64(bad);
        out.put64(first_bad);
        out.put64(ticks().wrapping_sub(start));
        Ok(())
    }

    fn disk_info(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let index = reader.u32().ok_or(BAD_PAYLOAD)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        let disks = self.devices.disks() as u32;
        let disk = self.devices.disk(index).ok_or(NO_DISK)?;
        let serial = disk.serial().map_err(disk_refusal)?;
        out.put64(disk.sectors());
        out.put64(disk.features());
        out.put32(disk.is_read_only().into());
        out.put32(disks);
        out.put(&serial);
        Ok(())
    }

    fn disk_read(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let (index, sectors) = (reader.u32().ok_or(BAD_PAYLOAD)?, reader.u32().ok_or(BAD_PAYLOAD)?);
        let [first] = longs(reader)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        let disk = self.devices.disk(index).ok_or(NO_DISK)?;
        let bytes = sectors as usize * SECTOR_BYTES;
        if bytes > PAYLOAD_BYTES_MAX
            || first.checked_add(sectors.into()).is_none_or(|end| end > disk.sectors())
        {
            return Err((STATUS_OUT_OF_RANGE, "sectors beyond the disk, or more than one reply holds"));
        }
        disk.read(first, out.room(bytes)).map_err(disk_refusal)
    }

    fn disk_write(&mut self, reader: &mut Reader) -> Result<(), Refusal> {
        let (index, flags) = (reader.u32().ok_or(BAD_PAYLOAD)?, reader.u32().ok_or(BAD_PAYLOAD)?);
        let [first] = longs(reader)?;
        let data = reader.rest();
        let disk = self.devices.disk(index).ok_or(NO_DISK)?;
        let sectors = (data.len() / SECTOR_BYTES) as u64;
        if !data.len().is_multiple_of(SECTOR_BYTES)
            || flags & !DISK_FLUSH != 0
            || data.is_empty() && flags == 0
        {
            return Err(BAD_PAYLOAD);
        }
        if first.checked_add(sectors).is_none_or(|end| end > disk.sectors()) {
            return Err((STATUS_OUT_OF_RANGE, "sectors beyond the disk"));
        }
        disk.write(first, data).map_err(disk_refusal)?;
        if flags & DISK_FLUSH != 0 {
            disk.flush().map_err(disk_refusal)?;
        }
        Ok(())
    }

    fn time(&mut self, reader: &Reader, out: &mut Reply) -> Result<(), Refusal> {
        reader.end().ok_or(BAD_PAYLOAD)?;
        let cmos = cmos_unix_s();
        let tsc = gate::tsc();
        out.put64(tsc);
        out.put64(self.tsc_khz.into());
        out.put64(cmos);
        out.put64(self.clock.wall_ns(tsc));
        Ok(())
    }

    fn count_cpus(&mut self, reader: &Reader, out: &mut Reply) -> Result<(), Refusal> {
        reader.end().ok_or(BAD_PAYLOAD)?;
        out.put32(self.cpus.found() as u32);
        out.put32(self.cpus.alive() as u32);
        for (apic_id, runs) in self.cpus.counters() {
            out.put32(apic_id);
            out.put32(0);
            out.put64(runs);
        }
        Ok(())
    }

    fn run_on_all(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let [seed, rounds] = longs(reader)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        if rounds > RUN_ROUNDS_MAX {
            return Err((STATUS_OUT_OF_RANGE, "too many rounds"));
        }
        for (apic_id, result, ticks) in self.cpus.run(seed, rounds) {
            out.put32(apic_id);
            out.put32(0);
            out.put64(result);
            out.put64(ticks);
        }
        Ok(())
    }

    fn give_random(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let bytes = reader.u32().ok_or(BAD_PAYLOAD)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        if bytes > RANDOM_BYTES_MAX {
            return Err((STATUS_OUT_OF_RANGE, "more bytes than one request may ask for"));
        }
        self.random.fill(out.room(bytes as usize));
        Ok(())
    }

    fn identity(&mut self, kind: u16, payload: &[u8], out: &mut Reply) -> Result<(), Refusal> {
        const NO_NETWORK: Refusal = (STATUS_NO_DEVICE, "the test guest drives no network interface");
        let told = Become::decode(kind, payload).ok_or(BAD_PAYLOAD)?;
        let addresses = told.addresses.into_iter().next().is_some();
        match &mut self.network {
            Some(network) => {
                for (interface, mac) in told.interfaces {
                    if interface != 0 {
                        return Err(NO_NETWORK);
                    }
                    network.set_mac(mac);
                }
                if addresses && !network.set_addresses(told.addresses) {
                    return Err((STATUS_LIMIT, "the test guest has one address of each kind, on its first interface"));
                }
            }
            None if addresses || told.interfaces.into_iter().next().is_some() => return Err(NO_NETWORK),
            None => {}
        }
        self.streams.forget();
        self.generation = told.generation;
        self.generations += 1;
        self.random.feed(&told.entropy);
        if told.wall_ns != 0 {
            self.clock.set(told.wall_ns);
        }
        self.put_generation(out);
        out.put64(self.generations);
        if kind != KIND_IDENTITY {
            if !told.host_name.is_empty() {
                self.host_name[..told.host_name.len()].copy_from_slice(told.host_name);
                self.host_name_bytes = told.host_name.len();
            }
            out.put32(self.host_name_bytes as u32);
            out.put(&self.host_name[..self.host_name_bytes]);
        }
        if kind == KIND_CLONE {
            out.put32(ENTROPY_DRAWN);
            let now = || self.network.iter().filter(|_| addresses).flat_map(Network::addresses);
            out.put32(now().count() as u32);
            for address in now() {
                out.put(&address.encode());
            }
        }
        Ok(())
    }

    fn compute(&mut self, reader: &mut Reader, out: &mut Reply) -> Result<(), Refusal> {
        let [nonce, bytes] = longs(reader)?;
        reader.end().ok_or(BAD_PAYLOAD)?;
        if bytes % 8 != 0 || bytes > self.arena.bytes() {
            return Err((STATUS_OUT_OF_RANGE, "more bytes than the arena has, or not a multiple of 8"));
        }
        let start = ticks();
        self.arena.fill_to(bytes);
        let mut digest = Digest::new();
        digest.generation(&self.generation);
        digest.word(nonce);
        let mut left = bytes as usize / 8;
        let mut page = 0;
        while left > 0 {
            for word in self.arena.page(page).iter().take(left) {
                digest.word(*word);
            }
            left = left.saturating_sub(PAGE_BYTES / 8);
            page += 1;
        }
        self.put_generation(out);
        out.put64(digest.finish());
        out.put64(ticks().wrapping_sub(start));
        Ok(())
    }

    /// It has no load to speak of.
    fn stats(&mut self, reader: &Reader, out: &mut Reply) -> Result<(), Refusal> {
        reader.end().ok_or(BAD_PAYLOAD)?;
        let milliseconds = gate::tsc() / u64::from(self.tsc_khz).max(1);
        out.put64(milliseconds.saturating_mul(1_000_000));
        out.put64(self.memory_bytes);
        out.put64(self.arena.bytes());
        for _ in 0..3 {
            out.put32(0);
        }
        out.put32(self.streams.count());
        Ok(())
    }

    fn put_generation(&self, out: &mut Reply) {
        out.put(&self.generation);
    }

    /// The last touched page lies in the arena.
    fn in_arena(&self, first: u64, pages: u64, stride: u64) -> Result<(), Refusal> {
        let last = match pages {
            0 => Some(first),
            _ => (pages - 1).checked_mul(stride).and_then(|way| way.checked_add(first)),
        };
        let good = stride > 0 && (pages == 0 || last.is_some_and(|last| last < self.arena.pages()));
        if good { Ok(()) } else { Err(OUT_OF_ARENA) }
    }
}

fn longs<const N: usize>(reader: &mut Reader) -> Result<[u64; N], Refusal> {
    let mut values = [0; N];
    for value in &mut values {
        *value = reader.u64().ok_or(BAD_PAYLOAD)?;
    }
    Ok(values)
}

fn pages_layout(reader: &mut Reader) -> Result<([u64; 4], u32), Refusal> {
    let values = longs(reader)?;
    let mode = reader.u32().ok_or(BAD_PAYLOAD)?;
    reader.u32().ok_or(BAD_PAYLOAD)?;
    reader.end().ok_or(BAD_PAYLOAD)?;
    Ok((values, mode))
}

fn disk_refusal(why: Failure) -> Refusal {
    match why {
        Failure::Refused(1) => (STATUS_DEVICE_FAILED, "the disk reported an I/O error"),
        Failure::Refused(2) => (STATUS_DEVICE_FAILED, "the disk does not support the request"),
        Failure::Refused(_) => (STATUS_DEVICE_FAILED, "the disk answered with an unknown status"),
        // A device that has stopped answering leaves its buffers in doubt.
        why => fail(format_args!("virtio-block: {why:?}")),
    }
}
