//! Commands and files of the test guest: enough of each kind to try everything that the protocol can do with streams.
//!
//! | command | what it does |
//! |---|---|
//! | `echo WORDS` | its words on stdout |
//! | `fail WORDS` | its words on stderr, status 1 |
//! | `env`, `pwd`, `whoami` | the variables, folder and user that it was given |
//! | `cat`, `upper` | stdin on stdout, as it is or in capitals |
//! | `cat PATH` | a file on stdout |
//! | `wait` | reads stdin to its end |
//! | `trap` | `signal N` on stdout for each signal but 9, until stdin ends |
//! | `exit N`, `die N` | ends with that status, by that signal |
//! | `yes BYTES`, `random BYTES` | so many on stdout |
//! | `spin MS` | keeps its CPU busy |
//! | `flood WHAT MS` | keeps its host busy, by printing (`console`), asking for interrupts of its own and of a serial port (`interrupts`), writing memory (`memory`), or writing and flushing its first disk (`disk`) |
//! | `udp ADDRESS PORT WORDS` | sends its words there, and what comes back on stdout; status 1 after three seconds without an answer |
//!
//! A signal ends every command but `trap`. Commands take turns, one frame each, between requests. Files live in memory:
//! [`FILES`] of [`FILE_BYTES`] each.

use core::net::IpAddr;

use crate::arena::Arena;
use crate::gate::ticks;
use crate::interrupts;
use crate::network::Network;
use crate::port::Port;
use crate::random::Generator;
use crate::serial;
use crate::serve::{BAD_PAYLOAD, Refusal, Reply, send};
use crate::virtio::Devices;
use crate::wire::*;

/// Stdin of one stream that is not read yet.
const WINDOW: usize = 8 << 10;
/// Longest opening: its words are printed from the buffer for stdin.
const OPENING_BYTES: usize = 4 << 10;
const FILES: usize = 4;
const FILE_BYTES: usize = 256 << 10;
const NAME_BYTES: usize = 128;
const KILL: u32 = 9;

static mut SLOTS: [Slot; STREAMS_MAX] = [const { Slot::new() }; STREAMS_MAX];
static mut FILE_SLOTS: [File; FILES] = [const { File::new() }; FILES];

/// All streams. What requests without streams touch is here; the rest lies elsewhere.
pub(crate) struct Streams {
    open: u32,
    hushed: bool,
    session: u64,
    /// Whose turn it is.
    turn: usize,
    slots: &'static mut [Slot; STREAMS_MAX],
    files: &'static mut [File; FILES],
}

struct Slot {
    open: bool,
    id: u32,
    job: Job,
    /// What may be sent on stdout and stderr.
    credit: [u32; 2],
    signal: Option<u32>,
    input_ended: bool,
    /// Input that was taken and not granted again.
    ungranted: u32,
    length: usize,
    bytes: [u8; WINDOW],
}

#[derive(Clone, Copy)]
enum Job {
    /// The buffer's first `length` bytes from `at` on, then the end.
    Say { pipe: u32, at: usize, length: usize, status: u32 },
    Copy { upper: bool },
    Wait,
    Trap,
    Die { signal: u32 },
    Yes { left: u64 },
    Random { left: u64 },
    Spin { until: u64 },
    Flood { with: Flood, until: u64 },
    /// Address, port and words are in the buffer.
    Udp { until: u64, asked: bool },
    Put { file: usize, name: usize, mode: u32 },
    Get { file: usize, version: u64, at: usize },
}

#[derive(Clone, Copy)]
enum Flood {
    Console,
    Interrupts,
    /// The next page.
    Memory(u64),
    /// The next sector.
    Disk(u64),
}

/// What commands work with.
pub(crate) struct Means<'a> {
    pub(crate) random: &'a mut Generator,
    pub(crate) network: &'a mut Option<Network>,
    pub(crate) arena: &'a mut Arena,
    pub(crate) devices: &'a mut Devices,
}

struct File {
    /// 0: a free place.
    name_bytes: usize,
    name: [u8; NAME_BYTES],
    /// Being written.
    draft: bool,
    /// Counts what was in this place.
    version: u64,
    mode: u32,
    length: usize,
    bytes: [u8; FILE_BYTES],
}

/// How a stream ends: END's fields.
type End = (u32, u32, &'static str);

const DONE: End = (END_EXITED, 0, "");

impl Slot {
    const fn new() -> Slot {
        Slot {
            open: false,
            id: 0,
            job: Job::Wait,
            credit: [0; 2],
            signal: None,
            input_ended: false,
            ungranted: 0,
            length: 0,
            bytes: [0; WINDOW],
        }
    }

    /// Appends to the buffer, as far as there is room.
    fn put(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(WINDOW - self.length);
        self.bytes[self.length..self.length + count].copy_from_slice(&bytes[..count]);
        self.length += count;
    }

    /// Takes input from the front.
    fn take(&mut self, count: usize) {
        self.bytes.copy_within(count..self.length, 0);
        self.length -= count;
        self.ungranted += count as u32;
    }

    fn may_send(&self, pipe: u32) -> usize {
        (self.credit[pipe as usize - 1] as usize).min(STREAM_BYTES_MAX)
    }
}

impl File {
    const fn new() -> File {
        File {
            name_bytes: 0,
            name: [0; NAME_BYTES],
            draft: false,
            version: 0,
            mode: 0,
            length: 0,
            bytes: [0; FILE_BYTES],
        }
    }

    fn is(&self, name: &[u8]) -> bool {
        self.name_bytes > 0 && !self.draft && self.name[..self.name_bytes] == *name
    }
}

impl Streams {
    /// Called once.
    pub(crate) fn new() -> Streams {
        // SAFETY: called once, so these are the only references.
        let (slots, files) = unsafe { (&mut *(&raw mut SLOTS), &mut *(&raw mut FILE_SLOTS)) };
        Streams { open: 0, hushed: false, session: 0, turn: 0, slots, files }
    }

    pub(crate) fn count(&self) -> u32 {
        self.open
    }

    /// Whether there may be something to do for [`Streams::step`].
    pub(crate) fn is_busy(&self) -> bool {
        self.open != 0 && !self.hushed
    }

    pub(crate) fn hush(&mut self, on: bool) {
        self.hushed = on;
    }

    /// What belongs to another host ends without a word.
    pub(crate) fn forget(&mut self) {
        self.hushed = false;
        if self.open != 0 {
            for index in 0..STREAMS_MAX {
                self.close(index);
            }
        }
    }

    fn close(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if core::mem::take(&mut slot.open) {
            self.open -= 1;
            if let Job::Put { file, .. } = slot.job
                && self.files[file].draft
            {
                self.files[file].draft = false;
                self.files[file].name_bytes = 0;
            }
        }
    }

    /// EXEC, FILE_PUT, FILE_GET: the request's id is the stream's.
    pub(crate) fn start(
        &mut self,
        kind: u16,
        id: u32,
        payload: &[u8],
        tsc_khz: u32,
        out: &mut Reply,
    ) -> Result<(), Refusal> {
        if payload.len() > OPENING_BYTES {
            return Err((STATUS_OUT_OF_RANGE, "more words than the test guest has room for"));
        }
        let session = Reader::new(payload).u64().ok_or(BAD_PAYLOAD)?;
        if session != self.session {
            self.forget();
            self.session = session;
        }
        let free = self.slots.iter().position(|slot| !slot.open);
        let index = free.ok_or((STATUS_LIMIT, "as many streams are open as there can be"))?;
        let slot = &mut self.slots[index];
        (slot.length, slot.ungranted, slot.signal, slot.input_ended) = (0, 0, None, false);
        let window = match kind {
            KIND_EXEC => {
                let start = ExecStart::decode(payload).ok_or(BAD_PAYLOAD)?;
                slot.job = command(slot, self.files, &start, tsc_khz)?;
                out.put32(if matches!(slot.job, Job::Say { .. }) { 0 } else { WINDOW as u32 });
                out.put32(index as u32 + 1);
                start.window
            }
            _ => {
                let start = FileStart::decode(payload).ok_or(BAD_PAYLOAD)?;
                if kind == KIND_FILE_PUT {
                    slot.job = put(slot, self.files, &start)?;
                    out.put32((WINDOW - slot.length) as u32);
                    out.put32(0);
                } else {
                    slot.job = get(self.files, start.path)?;
                    if let Job::Get { file, .. } = slot.job {
                        out.put64(self.files[file].length as u64);
                        out.put32(self.files[file].mode);
                        out.put32(0);
                    }
                }
                start.window
            }
        };
        slot.id = id;
        slot.credit = [window; 2];
        slot.open = true;
        self.open += 1;
        Ok(())
    }

    /// A word of the host on a stream. What does not fit is none.
    pub(crate) fn hear(&mut self, kind: u16, id: u32, payload: &[u8]) {
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.open && slot.id == id) else { return };
        let mut reader = Reader::new(payload);
        let Some(first) = reader.u32() else { return };
        match kind {
            KIND_SIGNAL => slot.signal = Some(first),
            KIND_STREAM_WINDOW => {
                let credit = slot.credit.get_mut((first as usize).wrapping_sub(1));
                if let (Some(credit), Some(bytes)) = (credit, reader.u32()) {
                    *credit = credit.saturating_add(bytes);
                }
            }
            _ => match reader.rest() {
                [] => slot.input_ended = true,
                bytes if !matches!(slot.job, Job::Say { .. }) => slot.put(bytes),
                _ => {}
            },
        }
    }

    /// Lets one stream do one thing. False: none can.
    pub(crate) fn step(
        &mut self,
        console: &mut Port,
        frame: &mut [u8],
        means: &mut Means,
    ) -> bool {
        for _ in 0..STREAMS_MAX {
            self.turn = (self.turn + 1) % STREAMS_MAX;
            let index = self.turn;
            if !self.slots[index].open {
                continue;
            }
            let mut worker = Worker { console, frame, slot: &mut self.slots[index], files: self.files };
            match worker.step(means) {
                Step::Waits => {}
                Step::Did => return true,
                Step::Ended((how, value, why)) => {
                    worker.send(KIND_END, &[&how.to_le_bytes(), &value.to_le_bytes(), why.as_bytes()]);
                    self.close(index);
                    return true;
                }
            }
        }
        false
    }
}

/// What a stream did when it had its turn.
enum Step {
    /// Nothing: it needs input, or credit.
    Waits,
    Did,
    Ended(End),
}

/// One stream in its turn.
struct Worker<'a> {
    console: &'a mut Port,
    frame: &'a mut [u8],
    slot: &'a mut Slot,
    files: &'a mut [File; FILES],
}

impl Worker<'_> {
    fn send(&mut self, kind: u16, parts: &[&[u8]]) {
        let mut out = Reply::new(&mut self.frame[HEADER_BYTES..]);
        parts.iter().for_each(|part| out.put(part));
        let length = out.length;
        send(self.console, self.frame, kind, STATUS_OK, self.slot.id, length);
    }

    /// Sends so many bytes that `fill` writes.
    fn data(&mut self, pipe: u32, count: usize, fill: impl FnOnce(&mut [u8], &Slot, &[File; FILES])) -> Step {
        let mut out = Reply::new(&mut self.frame[HEADER_BYTES..]);
        out.put32(pipe);
        fill(out.room(count), self.slot, self.files);
        let length = out.length;
        send(self.console, self.frame, KIND_STREAM_DATA, STATUS_OK, self.slot.id, length);
        self.slot.credit[pipe as usize - 1] -= count as u32;
        Step::Did
    }

    fn step(&mut self, means: &mut Means) -> Step {
        if self.slot.ungranted as usize >= WINDOW / 2 {
            let bytes = core::mem::take(&mut self.slot.ungranted);
            self.send(KIND_STREAM_WINDOW, &[&PIPE_STDIN.to_le_bytes(), &bytes.to_le_bytes()]);
            return Step::Did;
        }
        if let Some(signal) = self.slot.signal {
            match self.slot.job {
                Job::Trap if signal != KILL => {}
                Job::Put { .. } | Job::Get { .. } => return Step::Ended((END_FAILED, 0, "it was ended")),
                _ => return Step::Ended((END_SIGNALLED, signal, "")),
            }
        }
        let (out, length) = (self.slot.may_send(PIPE_STDOUT), self.slot.length);
        match self.slot.job {
            Job::Say { pipe, at, length, status } => {
                let count = (length - at).min(self.slot.may_send(pipe));
                if at == length {
                    return Step::Ended((END_EXITED, status, ""));
                }
                if count == 0 {
                    return Step::Waits;
                }
                self.slot.job = Job::Say { pipe, at: at + count, length, status };
                self.data(pipe, count, |room, slot, _| room.copy_from_slice(&slot.bytes[at..at + count]))
            }
            Job::Copy { upper } => {
                let count = length.min(out);
                if count == 0 {
                    return if length == 0 { self.at_end_of_input(DONE) } else { Step::Waits };
                }
                let step = self.data(PIPE_STDOUT, count, |room, slot, _| {
                    room.copy_from_slice(&slot.bytes[..count]);
                    if upper {
                        room.make_ascii_uppercase();
                    }
                });
                self.slot.take(count);
                step
            }
            Job::Wait | Job::Trap if length > 0 => {
                self.slot.take(length);
                Step::Did
            }
            Job::Trap if self.slot.signal.is_some() => {
                if out < SIGNAL_LINE_BYTES {
                    return Step::Waits;
                }
                let (line, count) = signal_line(self.slot.signal.take().unwrap_or(0));
                self.data(PIPE_STDOUT, count, |room, _, _| room.copy_from_slice(&line[..count]))
            }
            Job::Wait | Job::Trap => self.at_end_of_input(DONE),
            Job::Die { signal } => Step::Ended((END_SIGNALLED, signal, "")),
            Job::Yes { left } | Job::Random { left } if left == 0 || out == 0 => {
                if left == 0 { Step::Ended(DONE) } else { Step::Waits }
            }
            Job::Yes { left } => {
                let count = left.min(out as u64);
                self.slot.job = Job::Yes { left: left - count };
                self.data(PIPE_STDOUT, count as usize, |room, _, _| {
                    // Whatever the pieces: `y` and a line's end in turn, counted from the end.
                    for (index, byte) in room.iter_mut().enumerate() {
                        *byte = if (left - index as u64).is_multiple_of(2) { b'y' } else { b'\n' };
                    }
                })
            }
            Job::Random { left } => {
                let count = left.min(out as u64);
                self.slot.job = Job::Random { left: left - count };
                self.data(PIPE_STDOUT, count as usize, |room, _, _| means.random.fill(room))
            }
            Job::Spin { until } => {
                if ticks() >= until { Step::Ended(DONE) } else { Step::Did }
            }
            Job::Flood { with, until } => {
                if ticks() >= until {
                    return Step::Ended(DONE);
                }
                match flood(with, means, self.frame) {
                    Ok(with) => {
                        self.slot.job = Job::Flood { with, until };
                        Step::Did
                    }
                    Err(why) => Step::Ended((END_FAILED, 0, why)),
                }
            }
            Job::Udp { until, asked } => {
                let Some(network) = means.network else {
                    return Step::Ended((END_FAILED, 0, "the test guest has no network"));
                };
                if !asked {
                    let Some((to, port, words)) = destination(&self.slot.bytes[..length]) else {
                        return Step::Ended((END_FAILED, 0, "udp needs an address, a port and words"));
                    };
                    if network.ask(to, port, words) {
                        self.slot.job = Job::Udp { until, asked: true };
                        return Step::Did;
                    }
                } else if let Some(answer) = network.answer() {
                    self.slot.length = 0;
                    self.slot.put(answer);
                    self.slot.put(b"\n");
                    let length = self.slot.length;
                    self.slot.job = Job::Say { pipe: PIPE_STDOUT, at: 0, length, status: 0 };
                    network.forget();
                    return Step::Did;
                }
                if ticks() < until {
                    return Step::Waits;
                }
                if asked {
                    network.forget();
                }
                Step::Ended((END_EXITED, 1, ""))
            }
            Job::Put { file, name, mode } => {
                // The name lies at the buffer's front.
                let to = &mut self.files[file];
                if length == name {
                    if !self.slot.input_ended {
                        return Step::Waits;
                    }
                    to.name[..name].copy_from_slice(&self.slot.bytes[..name]);
                    (to.draft, to.mode, to.name_bytes) = (false, mode, 0);
                    if let Some(old) = self.files.iter_mut().find(|old| old.is(&self.slot.bytes[..name])) {
                        old.name_bytes = 0;
                    }
                    self.files[file].name_bytes = name;
                    return Step::Ended(DONE);
                }
                let bytes = &self.slot.bytes[name..length];
                let Some(room) = to.bytes.get_mut(to.length..to.length + bytes.len()) else {
                    return Step::Ended((END_FAILED, 0, "the file is longer than the test guest has room for"));
                };
                room.copy_from_slice(bytes);
                to.length += bytes.len();
                self.slot.length = name;
                self.slot.ungranted += (length - name) as u32;
                Step::Did
            }
            Job::Get { file, version, at } => {
                let from = &self.files[file];
                if from.version != version {
                    return Step::Ended((END_FAILED, 0, "the file was written meanwhile"));
                }
                if at == from.length {
                    return Step::Ended(DONE);
                }
                let count = out.min(from.length - at);
                if count == 0 {
                    return Step::Waits;
                }
                self.slot.job = Job::Get { file, version, at: at + count };
                self.data(PIPE_STDOUT, count, |room, _, files| {
                    room.copy_from_slice(&files[file].bytes[at..at + count]);
                })
            }
        }
    }

    fn at_end_of_input(&self, end: End) -> Step {
        if self.slot.input_ended { Step::Ended(end) } else { Step::Waits }
    }
}

const SIGNAL_LINE_BYTES: usize = 20;

/// `signal N` and how long that is.
fn signal_line(signal: u32) -> ([u8; SIGNAL_LINE_BYTES], usize) {
    let mut line = *b"signal 0000000000\n  ";
    let digits = 7..17;
    let mut rest = signal;
    for byte in line[digits].iter_mut().rev() {
        *byte = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let zeros = line[7..16].iter().take_while(|byte| **byte == b'0').count();
    line.copy_within(7 + zeros.., 7);
    (line, 18 - zeros)
}

/// One piece of a flood; gives what comes next, or why there is none.
fn flood(with: Flood, means: &mut Means, room: &mut [u8]) -> Result<Flood, &'static str> {
    const PIECE: u64 = 64;
    Ok(match with {
        Flood::Console => {
            serial::write(&[b'x'; PIECE as usize]);
            with
        }
        Flood::Interrupts => {
            interrupts::call_cpu(interrupts::apic_id());
            serial::ask_for_interrupt();
            with
        }
        Flood::Memory(page) => {
            let pages = means.arena.pages().max(1);
            for page in page..page + PIECE {
                means.arena.fill_page(page % pages, ticks());
            }
            Flood::Memory((page + PIECE) % pages)
        }
        Flood::Disk(sector) => {
            let disk = means.devices.disk(0).ok_or("this flood needs a disk")?;
            let sectors = disk.sectors();
            let at = if sector + PIECE <= sectors { sector } else { 0 };
            let data = &mut room[..PIECE as usize * SECTOR_BYTES];
            data.fill(sector as u8);
            disk.write(at, data).and_then(|()| disk.flush()).map_err(|_| "the disk refuses")?;
            Flood::Disk(at + PIECE)
        }
    })
}

/// What a command is to do. Its words, where it prints any, are put in the slot's buffer.
fn command(slot: &mut Slot, files: &[File; FILES], start: &ExecStart, tsc_khz: u32) -> Result<Job, Refusal> {
    let mut words = start.arguments;
    let name = words.next().unwrap_or_default();
    let first = words.clone().next();
    match name {
        b"cat" if first.is_some() => return get(files, first.unwrap_or_default()),
        b"cat" => return Ok(Job::Copy { upper: false }),
        b"upper" => return Ok(Job::Copy { upper: true }),
        b"wait" => return Ok(Job::Wait),
        b"trap" => return Ok(Job::Trap),
        b"yes" => return Ok(Job::Yes { left: number(first)? }),
        b"random" => return Ok(Job::Random { left: number(first)? }),
        b"die" => return Ok(Job::Die { signal: number(first)? as u32 }),
        b"udp" => {
            for (index, word) in words.enumerate() {
                slot.put(if index > 0 { b" " } else { b"" });
                slot.put(word);
            }
            let until = u64::from(tsc_khz).saturating_mul(3000).saturating_add(ticks());
            return Ok(Job::Udp { until, asked: false });
        }
        b"flood" => {
            let with = match first.unwrap_or_default() {
                b"console" => Flood::Console,
                b"interrupts" => Flood::Interrupts,
                b"memory" => Flood::Memory(0),
                b"disk" => Flood::Disk(0),
                _ => return Err((STATUS_BAD_PAYLOAD, "flood with console, interrupts, memory or disk")),
            };
            let ms = number(words.nth(1))?;
            let until = ms.saturating_mul(tsc_khz.into()).saturating_add(ticks());
            return Ok(Job::Flood { with, until });
        }
        b"spin" => {
            let until = number(first)?.saturating_mul(tsc_khz.into()).saturating_add(ticks());
            return Ok(Job::Spin { until });
        }
        _ => {}
    }
    let mut say = Job::Say { pipe: PIPE_STDOUT, at: 0, length: 0, status: 0 };
    let Job::Say { pipe, length, status, .. } = &mut say else { return Err(BAD_PAYLOAD) };
    let line = |slot: &mut Slot, words: &mut Strings| {
        for (index, word) in words.enumerate() {
            if index > 0 {
                slot.put(b" ");
            }
            slot.put(word);
        }
        slot.put(b"\n");
    };
    match name {
        b"echo" => line(slot, &mut words),
        b"fail" => {
            line(slot, &mut words);
            (*pipe, *status) = (PIPE_STDERR, 1);
        }
        b"exit" => *status = number(first)? as u32,
        b"env" => {
            for variable in start.environment {
                slot.put(variable);
                slot.put(b"\n");
            }
        }
        b"pwd" | b"whoami" => {
            slot.put(if name == b"pwd" { start.folder } else { start.user });
            slot.put(b"\n");
        }
        _ => return Err((STATUS_NOT_FOUND, "the test guest has no such command")),
    }
    *length = slot.length;
    Ok(say)
}

/// Address, port and words of `udp`.
fn destination(text: &[u8]) -> Option<(IpAddr, u16, &[u8])> {
    let mut parts = text.splitn(3, |byte| *byte == b' ');
    let mut part = || parts.next();
    let to = core::str::from_utf8(part()?).ok()?.parse().ok()?;
    let port = core::str::from_utf8(part()?).ok()?.parse().ok()?;
    Some((to, port, part()?))
}

fn put(slot: &mut Slot, files: &mut [File; FILES], start: &FileStart) -> Result<Job, Refusal> {
    if start.path.len() > NAME_BYTES {
        return Err((STATUS_OUT_OF_RANGE, "a longer name than the test guest has room for"));
    }
    let free = files.iter().position(|file| file.name_bytes == 0 && !file.draft);
    let file = free.ok_or((STATUS_LIMIT, "the test guest has no room for another file"))?;
    let draft = &mut files[file];
    (draft.draft, draft.length, draft.version) = (true, 0, draft.version + 1);
    slot.put(start.path);
    Ok(Job::Put { file, name: start.path.len(), mode: start.mode })
}

fn get(files: &[File; FILES], path: &[u8]) -> Result<Job, Refusal> {
    let file = files.iter().position(|file| file.is(path));
    let file = file.ok_or((STATUS_NOT_FOUND, "the test guest has no such file"))?;
    Ok(Job::Get { file, version: files[file].version, at: 0 })
}

fn number(word: Option<&[u8]>) -> Result<u64, Refusal> {
    word.and_then(|word| core::str::from_utf8(word).ok()?.parse().ok())
        .ok_or((STATUS_BAD_PAYLOAD, "this command needs a number"))
}
