//! Commands and files under way. Nothing here waits: pipes do not block, and what cannot go on is looked at again when
//! [`crate::sys::poll`] says so.

use crate::port::Output;
use crate::spawn::Room;
use crate::sys::{self, Path, PollFd};
use crate::wire::*;

/// A refusal: status and sentence.
pub(crate) type Refusal = (u16, &'static str);

pub(crate) const BAD_PAYLOAD: Refusal = (STATUS_BAD_PAYLOAD, "the payload does not have this kind's layout");

/// Stdin of one command that its pipe has not taken.
const INPUT_BYTES: usize = 8 << 10;
/// Most that all of them may be sent at a time: it must fit the terminal's queue beside requests (port.rs).
const GRANTED_MAX: usize = 24 << 10;
/// The least that is granted, if there is as much.
const GRANT_MIN: usize = 512;
/// A draft's name: the file's, a dot and eight digits.
const DRAFT_BYTES: usize = PATH_BYTES_MAX + 10;
const FILE_TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
/// Entries that [`Streams::watch`] makes at most.
pub(crate) const WATCHED_MAX: usize = 3 * STREAMS_MAX;

pub(crate) struct Streams {
    session: u64,
    hushed: bool,
    /// Who is looked at first.
    turn: usize,
    slots: [Slot; STREAMS_MAX],
    room: Room,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Job {
    Free,
    Exec { pid: u32 },
    Put { mode: u32 },
    Get,
}

struct Slot {
    job: Job,
    id: u32,
    /// Stdin (or the file that is written), stdout (or the one that is read), stderr; -1: closed.
    fds: [i32; 3],
    /// END's fields, when nothing more will come but what is in the pipes.
    end: Option<(u32, u32, &'static str)>,
    credit: [u32; 2],
    /// Granted on stdin and not come.
    granted: usize,
    input_ended: bool,
    length: usize,
    input: [u8; INPUT_BYTES],
    /// Of a file that is written: where it is to be, with its NUL.
    path_bytes: usize,
    path: [u8; PATH_BYTES_MAX + 1],
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            job: Job::Free,
            id: 0,
            // Nothing but zeros, so that the program's file need not hold it.
            fds: [0; 3],
            end: None,
            credit: [0; 2],
            granted: 0,
            input_ended: false,
            length: 0,
            input: [0; INPUT_BYTES],
            path_bytes: 0,
            path: [0; PATH_BYTES_MAX + 1],
        }
    }

    fn close(&mut self, index: usize) {
        if self.fds[index] >= 0 {
            sys::close(self.fds[index]);
            self.fds[index] = -1;
        }
    }

    /// Ends it without a word.
    fn drop_all(&mut self) {
        match self.job {
            // After the command's end its number may be another's.
            Job::Exec { pid } if self.end.is_none() => _ = sys::kill_group(pid, sys::SIGKILL),
            Job::Put { .. } if self.end.is_none() => self.remove_draft(),
            _ => {}
        }
        (0..3).for_each(|index| self.close(index));
        self.job = Job::Free;
    }

    fn path(&self) -> &Path {
        Path::from_bytes_with_nul(&self.path[..self.path_bytes]).unwrap_or(c"")
    }

    /// Where the file is made before it takes its place.
    fn draft<'a>(&self, room: &'a mut [u8; DRAFT_BYTES]) -> &'a Path {
        let name = self.path_bytes.saturating_sub(1);
        room[..name].copy_from_slice(&self.path[..name]);
        room[name] = b'.';
        for (digit, place) in room[name + 1..name + 9].iter_mut().enumerate() {
            *place = b"0123456789abcdef"[(self.id >> (28 - 4 * digit) & 15) as usize];
        }
        room[name + 9] = 0;
        Path::from_bytes_with_nul(&room[..name + 10]).unwrap_or(c"")
    }

    fn remove_draft(&self) {
        sys::unlink(self.draft(&mut [0; DRAFT_BYTES]));
    }

    fn fail(&mut self, errno: i32) {
        if matches!(self.job, Job::Put { .. }) && self.end.is_none() {
            self.remove_draft();
        }
        self.end.get_or_insert((END_FAILED, 0, sentence(errno)));
        (0..2).for_each(|index| self.close(index));
    }

    /// A file's bytes, or its end.
    fn put(&mut self, mut bytes: &[u8]) {
        let Job::Put { mode } = self.job else { return };
        if self.end.is_some() {
            return;
        }
        let ended = bytes.is_empty();
        while !bytes.is_empty() {
            match sys::write(self.fds[0], bytes) {
                Ok(count) => bytes = &bytes[count.min(bytes.len())..],
                Err(sys::EINTR) => {}
                Err(error) => return self.fail(error),
            }
        }
        if ended {
            let mut room = [0; DRAFT_BYTES];
            let draft = self.draft(&mut room);
            match sys::chmod(self.fds[0], mode).and_then(|()| sys::rename(draft, self.path())) {
                Ok(()) => {
                    self.end = Some((END_EXITED, 0, ""));
                    self.close(0);
                }
                Err(error) => self.fail(error),
            }
        }
    }

    /// Gives the command what it has room for.
    fn feed(&mut self) {
        while self.fds[0] >= 0 && self.length > 0 {
            match sys::write(self.fds[0], &self.input[..self.length]) {
                Ok(count) => {
                    let count = count.min(self.length);
                    self.input.copy_within(count..self.length, 0);
                    self.length -= count;
                }
                Err(sys::EINTR) => {}
                Err(sys::EAGAIN) => return,
                // It reads no more.
                Err(_) => self.close(0),
            }
        }
        if self.fds[0] < 0 {
            self.length = 0;
        } else if self.input_ended {
            self.close(0);
        }
    }

    /// Sends what a pipe or file has, one frame of it.
    fn send(&mut self, pipe: u32, out: &mut Output) {
        let index = pipe as usize;
        let credit = self.credit[index - 1] as usize;
        if self.fds[index] < 0 || credit == 0 || !out.has_room() {
            return;
        }
        out.begin();
        out.put32(pipe);
        let most = credit.min(STREAM_BYTES_MAX);
        let room = out.room(most);
        match sys::read(self.fds[index], room) {
            Ok(count) if count > 0 => {
                out.shorten(most - count.min(most));
                out.finish(KIND_STREAM_DATA, STATUS_OK, self.id);
                self.credit[index - 1] -= count as u32;
                return;
            }
            Ok(_) => {
                if self.job == Job::Get {
                    self.end.get_or_insert((END_EXITED, 0, ""));
                }
                self.close(index);
            }
            Err(sys::EINTR) => {}
            // What others hold the pipe open for is not the command's.
            Err(sys::EAGAIN) if self.end.is_some() => self.close(index),
            Err(sys::EAGAIN) => {}
            Err(error) if self.job == Job::Get => self.fail(error),
            Err(_) => self.close(index),
        }
        out.abandon();
    }
}

impl Streams {
    pub(crate) const fn new() -> Streams {
        Streams {
            session: 0,
            hushed: false,
            turn: 0,
            slots: [const { Slot::new() }; STREAMS_MAX],
            room: Room::new(),
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.slots.iter().filter(|slot| slot.job != Job::Free).count() as u32
    }

    pub(crate) fn hush(&mut self, on: bool) {
        self.hushed = on;
    }

    /// What belongs to another host ends without a word.
    pub(crate) fn forget(&mut self) {
        self.hushed = false;
        for slot in self.slots.iter_mut().filter(|slot| slot.job != Job::Free) {
            slot.drop_all();
        }
    }

    /// EXEC, FILE_PUT, FILE_GET: the request's id is the stream's. The reply's payload is put in `out`.
    pub(crate) fn start(
        &mut self,
        kind: u16,
        id: u32,
        payload: &[u8],
        out: &mut Output,
    ) -> Result<(), Refusal> {
        let session = Reader::new(payload).u64().ok_or(BAD_PAYLOAD)?;
        if session != self.session {
            self.forget();
            self.session = session;
        }
        let slot = self.slots.iter_mut().find(|slot| slot.job == Job::Free);
        let slot = slot.ok_or((STATUS_LIMIT, "as many streams are open as there can be"))?;
        (slot.id, slot.end, slot.granted, slot.length, slot.input_ended) = (id, None, 0, 0, false);
        // What stdin may carry is granted by and by.
        if kind == KIND_EXEC {
            let start = ExecStart::decode(payload).ok_or(BAD_PAYLOAD)?;
            let started = self.room.start(&start)?;
            slot.fds = started.fds;
            slot.job = Job::Exec { pid: started.pid };
            slot.credit = [start.window; 2];
            out.put32(0);
            out.put32(started.pid);
            return Ok(());
        }
        let start = FileStart::decode(payload).ok_or(BAD_PAYLOAD)?;
        slot.path[..start.path.len()].copy_from_slice(start.path);
        slot.path[start.path.len()] = 0;
        slot.path_bytes = start.path.len() + 1;
        slot.credit = [start.window; 2];
        if kind == KIND_FILE_PUT {
            let flags = sys::O_WRONLY | sys::O_CREAT | sys::O_EXCL;
            let fd = sys::open(slot.draft(&mut [0; DRAFT_BYTES]), flags, 0o600).map_err(refusal)?;
            slot.fds = [fd, -1, -1];
            slot.job = Job::Put { mode: start.mode };
            out.put64(0);
        } else {
            let fd = sys::open(slot.path(), sys::O_RDONLY | sys::O_NONBLOCK, 0).map_err(refusal)?;
            let stat = match sys::stat(fd) {
                Ok(stat) if stat.mode & FILE_TYPE == REGULAR => stat,
                other => {
                    sys::close(fd);
                    return Err(other.err().map_or((STATUS_FAILED, "it is no regular file"), refusal));
                }
            };
            slot.fds = [-1, fd, -1];
            slot.job = Job::Get;
            out.put64(stat.bytes);
            out.put32(stat.mode & 0o7777);
            out.put32(0);
        }
        Ok(())
    }

    /// A word of the host on a stream. What does not fit is none.
    pub(crate) fn hear(&mut self, kind: u16, id: u32, payload: &[u8]) {
        let open = |slot: &&mut Slot| slot.job != Job::Free && slot.id == id;
        let Some(slot) = self.slots.iter_mut().find(open) else { return };
        let mut reader = Reader::new(payload);
        let Some(first) = reader.u32() else { return };
        match (kind, slot.job) {
            (KIND_STREAM_WINDOW, _) => {
                let credit = slot.credit.get_mut((first as usize).wrapping_sub(1));
                if let (Some(credit), Some(bytes)) = (credit, reader.u32()) {
                    *credit = credit.saturating_add(bytes);
                }
            }
            (KIND_SIGNAL, Job::Exec { pid }) => {
                if slot.end.is_none() {
                    let _ = sys::kill_group(pid, first);
                } else if first == sys::SIGKILL {
                    // Who asked for what is still in its pipes is gone.
                    (0..3).for_each(|index| slot.close(index));
                }
            }
            (KIND_SIGNAL, _) => slot.fail(sys::EINTR),
            (_, Job::Put { .. }) => {
                let bytes = reader.rest();
                slot.granted = slot.granted.saturating_sub(bytes.len());
                slot.put(bytes);
            }
            _ => {
                let bytes = reader.rest();
                slot.granted = slot.granted.saturating_sub(bytes.len());
                let count = bytes.len().min(INPUT_BYTES - slot.length);
                slot.input[slot.length..slot.length + count].copy_from_slice(&bytes[..count]);
                slot.length += count;
                slot.input_ended |= bytes.is_empty();
                slot.feed();
            }
        }
    }

    /// A child has ended.
    pub(crate) fn ended(&mut self, pid: u32, status: i32) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.job == Job::Exec { pid } && slot.end.is_none()) {
            slot.end = Some(match sys::ending(status) {
                Ok(status) => (END_EXITED, status, ""),
                Err(signal) => (END_SIGNALLED, signal, ""),
            });
            slot.close(0);
        }
    }

    /// Says what is to be watched. True: something can go on already.
    pub(crate) fn watch(&self, out: &Output, mut watch: impl FnMut(PollFd)) -> bool {
        let speaks = !self.hushed && out.has_room();
        let mut ready = false;
        for slot in self.slots.iter().filter(|slot| slot.job != Job::Free) {
            if matches!(slot.job, Job::Exec { .. }) && slot.fds[0] >= 0 && slot.length > 0 {
                watch(PollFd { fd: slot.fds[0], events: sys::POLLOUT, revents: 0 });
            }
            for pipe in [1, 2] {
                if speaks && slot.fds[pipe] >= 0 && slot.credit[pipe - 1] > 0 {
                    ready |= slot.job == Job::Get || slot.end.is_some();
                    watch(PollFd { fd: slot.fds[pipe], events: sys::POLLIN, revents: 0 });
                }
            }
            ready |= speaks && slot.end.is_some() && slot.fds[1] < 0 && slot.fds[2] < 0;
        }
        ready
    }

    /// Lets each stream do what it can.
    pub(crate) fn step(&mut self, out: &mut Output) {
        self.turn = (self.turn + 1) % STREAMS_MAX;
        let mut granted: usize = self.slots.iter().filter(|slot| slot.job != Job::Free).map(|slot| slot.granted).sum();
        for index in 0..STREAMS_MAX {
            let slot = &mut self.slots[(self.turn + index) % STREAMS_MAX];
            if slot.job == Job::Free {
                continue;
            }
            if matches!(slot.job, Job::Exec { .. }) {
                slot.feed();
            }
            if self.hushed {
                continue;
            }
            slot.send(PIPE_STDOUT, out);
            slot.send(PIPE_STDERR, out);
            if let Some((how, value, why)) = slot.end
                && slot.fds[1] < 0
                && slot.fds[2] < 0
                && out.has_room()
            {
                out.begin();
                out.put32(how);
                out.put32(value);
                out.put(why.as_bytes());
                out.finish(KIND_END, STATUS_OK, slot.id);
                slot.drop_all();
                continue;
            }
            let bytes = slot.grant(GRANTED_MAX.saturating_sub(granted));
            if bytes > 0 && out.has_room() {
                slot.granted += bytes;
                granted += bytes;
                out.begin();
                out.put32(PIPE_STDIN);
                out.put32(bytes as u32);
                out.finish(KIND_STREAM_WINDOW, STATUS_OK, slot.id);
            }
        }
    }
}

impl Slot {
    /// How much more stdin may be sent, when `left` is what may be granted in all.
    fn grant(&self, left: usize) -> usize {
        let room = (INPUT_BYTES - self.length).saturating_sub(self.granted);
        let wants = self.fds[0] >= 0 && !self.input_ended && self.end.is_none();
        if !wants || room < INPUT_BYTES / 4 && self.granted > 0 {
            return 0;
        }
        // Half of what is left, so that the next one has something too.
        room.min((left / 2).max(GRANT_MIN)).min(left)
    }
}

/// What an errno is to the host.
pub(crate) fn refusal(errno: i32) -> Refusal {
    let status = match errno {
        sys::ENOENT | sys::ENOTDIR => STATUS_NOT_FOUND,
        sys::EACCES | sys::EPERM => STATUS_NOT_ALLOWED,
        sys::EAGAIN => STATUS_LIMIT,
        _ => STATUS_FAILED,
    };
    (status, sentence(errno))
}

fn sentence(errno: i32) -> &'static str {
    match errno {
        sys::EPERM => "the guest's system does not allow it",
        sys::ENOENT => "there is no such file or folder",
        sys::EINTR => "it was ended",
        5 => "an input or output error in the guest",
        7 => "arguments and variables are too long for the guest's system",
        8 => "it is nothing that the guest's system can execute",
        12 => "the guest has no memory for it",
        sys::EACCES => "the guest's permissions do not allow it",
        17 => "a draft of that name is there already",
        sys::ENOTDIR => "a part of the path is no folder",
        21 => "it is a folder",
        23 | 24 => "the guest has too many files open",
        26 => "a running program is not written",
        27 => "the file is too large for the guest",
        28 => "the guest's disk is full",
        30 => "the guest's disk is read-only",
        sys::EAGAIN => "the guest has too many processes",
        62 => "too many symbolic links in the path",
        63 => "a name is too long for the guest's system",
        _ => "the guest's system refused it",
    }
}
