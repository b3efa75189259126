//! Commands and files in a guest, as the daemon holds them: what came and was not taken, what is to be said.
//!
//! The task that talks with the agent and the one who uses the stream share its state; neither waits for the other. What a
//! guest may send is granted beforehand ([`WINDOW_BYTES`]) and granted again when it was taken, so a stream that nobody reads
//! holds so much and no more, and none waits for another.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use super::error::FleetError;
use super::limits::{SIGNALS_WAITING_MAX, STDIN_WAITING_BYTES_MAX, WINDOW_BYTES};
use crate::agent::streams::Pipe;
use crate::agent::{End, Frame, Opened, Said, Word, wire};

/// SIGKILL on every system that has signals.
const KILL: u32 = 9;

/// What is heard on a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    Output(Pipe, Bytes),
    /// The last.
    End(End),
}

/// A command or file under way in a guest. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    /// What the agent said when it opened it.
    pub(super) opened: Option<Opened>,
}

/// What the user of a stream and the talking task share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Something came: for the one who reads.
    came: Notify,
    /// Stdin has room, or is of no more use: for the one who writes.
    room: Notify,
    /// There is something to say: for the talking task.
    wake: Arc<Notify>,
    /// One of the VM's streams until both sides have let go.
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct State {
    output: [BytesMut; 2],
    /// What the guest may send, and what may be granted to it again.
    granted: [u32; 2],
    taken: [u32; 2],
    stdin: BytesMut,
    stdin_window: u32,
    stdin_ends: bool,
    stdin_ended: bool,
    signals: VecDeque<u32>,
    end: Option<Result<End, String>>,
}

fn index(pipe: Pipe) -> usize {
    match pipe {
        Pipe::Stdout => 0,
        Pipe::Stderr => 1,
    }
}

impl Shared {
    pub(super) fn new(wake: Arc<Notify>, permit: OwnedSemaphorePermit) -> Arc<Self> {
        let state = State {
            output: [BytesMut::new(), BytesMut::new()],
            granted: [WINDOW_BYTES; 2],
            taken: [0; 2],
            stdin: BytesMut::new(),
            stdin_window: 0,
            stdin_ends: false,
            stdin_ended: false,
            signals: VecDeque::new(),
            end: None,
        };
        let (came, room) = (Notify::new(), Notify::new());
        Arc::new(Self { state: Mutex::new(state), came, room, wake, _permit: permit })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: Result<End, String>) {
        self.state().end.get_or_insert(end);
        self.came.notify_one();
        self.room.notify_one();
    }

    /// What is to be said next.
    fn word(&self) -> Option<Word> {
        let mut state = self.state();
        if let Some(signal) = state.signals.pop_front() {
            return Some(Word::Signal(signal));
        }
        for pipe in [Pipe::Stdout, Pipe::Stderr] {
            let bytes = state.taken[index(pipe)];
            // Not for every few bytes.
            if bytes >= WINDOW_BYTES / 4 {
                state.taken[index(pipe)] = 0;
                state.granted[index(pipe)] += bytes;
                return Some(Word::Grant { pipe, bytes });
            }
        }
        let count = state.stdin.len().min(state.stdin_window as usize).min(wire::STREAM_BYTES_MAX);
        if count > 0 {
            state.stdin_window -= count as u32;
            let bytes = state.stdin.split_to(count).to_vec();
            self.room.notify_one();
            return Some(Word::Stdin(bytes));
        }
        if state.stdin.is_empty() && state.stdin_ends && !state.stdin_ended {
            state.stdin_ended = true;
            return Some(Word::Stdin(Vec::new()));
        }
        None
    }

    /// What the guest said; an error is a breach of the rules.
    fn hear(&self, said: Said) -> Result<(), String> {
        let mut state = self.state();
        match said {
            Said::Output { pipe, bytes } => {
                let left =
                    u32::try_from(bytes.len()).ok().and_then(|n| state.granted[index(pipe)].checked_sub(n));
                state.granted[index(pipe)] =
                    left.ok_or("the guest's agent sent more of a stream than it was granted")?;
                state.output[index(pipe)].extend_from_slice(&bytes);
            }
            Said::Grant(bytes) => {
                let window = state.stdin_window.saturating_add(bytes);
                if window > wire::WINDOW_BYTES_MAX {
                    return Err(
                        "the guest's agent granted more of a stream than the protocol allows".to_owned()
                    );
                }
                state.stdin_window = window;
                drop(state);
                self.wake.notify_one();
                return Ok(());
            }
            Said::End(end) => {
                drop(state);
                self.end(Ok(end));
                return Ok(());
            }
        }
        drop(state);
        self.came.notify_one();
        Ok(())
    }
}

impl Stream {
    /// One that is about to be opened.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, opened: None }
    }

    /// What the agent said when it opened it.
    pub fn opened(&self) -> Option<Opened> {
        self.opened
    }

    /// The next output, in as large a piece as there is, or the end. Nothing is lost when the future is dropped. One may
    /// listen at a time.
    ///
    /// # Errors
    /// [`FleetError::StreamLost`]: the agent or its VM is gone.
    pub async fn next(&self) -> Result<Heard, FleetError> {
        loop {
            {
                let mut state = self.shared.state();
                for pipe in [Pipe::Stdout, Pipe::Stderr] {
                    if !state.output[index(pipe)].is_empty() {
                        let bytes = state.output[index(pipe)].split().freeze();
                        // At most a window: no more than that was granted.
                        state.taken[index(pipe)] += bytes.len() as u32;
                        self.shared.wake.notify_one();
                        return Ok(Heard::Output(pipe, bytes));
                    }
                }
                match &state.end {
                    Some(Ok(end)) => return Ok(Heard::End(end.clone())),
                    Some(Err(reason)) => return Err(FleetError::StreamLost(reason.clone())),
                    None => {}
                }
            }
            self.shared.came.notified().await;
        }
    }

    /// Writes to stdin; comes back when all is on its way but [`STDIN_WAITING_BYTES_MAX`]. What a stream that has ended was still to
    /// read is dropped. One may write at a time.
    pub async fn write(&self, mut bytes: Bytes) {
        loop {
            {
                let mut state = self.shared.state();
                if state.end.is_some() || state.stdin_ends {
                    return;
                }
                let count = bytes.len().min(STDIN_WAITING_BYTES_MAX.saturating_sub(state.stdin.len()));
                state.stdin.extend_from_slice(&bytes.split_to(count));
            }
            self.shared.wake.notify_one();
            if bytes.is_empty() {
                return;
            }
            self.shared.room.notified().await;
        }
    }

    /// Nothing more will be written.
    pub fn end_stdin(&self) {
        self.shared.state().stdin_ends = true;
        self.shared.wake.notify_one();
    }

    /// Sends the command's processes a signal by its number. Nothing when it has ended.
    ///
    /// # Errors
    /// [`FleetError::Invalid`], [`FleetError::Limit`]: the guest does not take them.
    pub fn signal(&self, signal: u32) -> Result<(), FleetError> {
        if !(1..=128).contains(&signal) {
            return Err(FleetError::Invalid(format!("{signal} is no signal; they are 1 to 128")));
        }
        let mut state = self.shared.state();
        if state.signals.len() >= SIGNALS_WAITING_MAX {
            return Err(FleetError::Limit {
                what: "signals that a guest has not taken",
                limit: SIGNALS_WAITING_MAX,
                hint: "is its VM paused?",
            });
        }
        state.signals.push_back(signal);
        drop(state);
        self.shared.wake.notify_one();
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if state.end.is_none() {
            state.signals.clear();
            state.signals.push_back(KILL);
            drop(state);
            self.shared.wake.notify_one();
        }
    }
}

/// The streams of one conversation, by the ids of what opened them.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: BTreeMap<u32, Arc<Shared>>,
    /// Who spoke last.
    last: u32,
}

impl Streams {
    pub(super) fn open(&mut self, id: u32, shared: Arc<Shared>, opened: &Opened) {
        shared.state().stdin_window = opened.window();
        self.open.insert(id, shared);
    }

    /// A frame that one of them has to send; they take turns.
    pub(super) fn next_frame(&mut self) -> Option<Vec<u8>> {
        let after = self.open.range((Bound::Excluded(self.last), Bound::Unbounded));
        let turn = after.chain(self.open.range(..=self.last));
        let (id, word) = turn.into_iter().find_map(|(id, shared)| Some((*id, shared.word()?)))?;
        self.last = id;
        // A word is far shorter than the longest frame.
        word.encode(id).ok()
    }

    /// What the guest said. An error ends the conversation.
    pub(super) fn hear(&mut self, frame: &Frame) -> Result<(), String> {
        let Some(shared) = self.open.get(&frame.id) else {
            tracing::debug!(id = frame.id, "an agent spoke of a stream that is not open here");
            return Ok(());
        };
        let said = Said::decode(frame)
            .ok_or_else(|| format!("the guest's agent sent a malformed frame of kind {:#06x}", frame.kind))?;
        let is_end = matches!(said, Said::End(_));
        shared.hear(said)?;
        if is_end {
            self.open.remove(&frame.id);
        }
        Ok(())
    }

    /// They have no agent any more.
    pub(super) fn lose(&mut self, reason: &str) {
        for shared in std::mem::take(&mut self.open).into_values() {
            shared.end(Err(reason.to_owned()));
        }
    }
}
