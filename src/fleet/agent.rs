//! Talking with the agent in one VM.
//!
//! One task owns the agent port's socket: it writes requests, reads frames, and gives each answer to the one who waits for
//! it, and what is said of streams ([`super::streams`]) to theirs. The guest is hostile: frames are bounded by the decoder,
//! requests by [`AGENT_REQUESTS_MAX`], streams by [`STREAMS_MAX`] and their windows, and words out of place end the
//! conversation with a reason that every later request is told.

#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::error::FleetError;
use super::limits::*;
use super::streams::{Shared, Stream, Streams};
use crate::agent::resync::{Doubt, Hellos};
use crate::agent::streams::What;
use crate::agent::{AgentReply, AgentRequest, Frame, FrameDecoder, Hello, Opening, Said, wire};

/// Why a conversation ends when nobody wants it any more: the VM is gone, or was left to another daemon, who goes on with the socket.
const GONE: &str = "the VM is gone";

/// What is known about the other side.
#[derive(Debug, Clone, Default)]
pub enum Presence {
    /// Nobody has said hello.
    #[default]
    Silent,
    Here(Arc<Hello>),
    /// The conversation ended, and why.
    Lost(String),
}

/// The daemon's side of one VM's agent port: one conversation after the other, a new one each time the guest is booted
/// again.
#[derive(Debug)]
pub struct AgentClient(RwLock<Arc<Conversation>>);

impl AgentClient {
    /// Starts the first conversation. `known` is what the agent said before it was frozen, for a clone.
    pub fn start(socket: UnixStream, known: Option<Arc<Hello>>) -> Self {
        Self(RwLock::new(Arc::new(Conversation::start(socket, known, false))))
    }

    /// Goes on where an earlier daemon was killed, in the middle of what it read, maybe. What it had asked is nobody's now.
    pub fn resume(socket: UnixStream, known: Option<Arc<Hello>>) -> Self {
        Self(RwLock::new(Arc::new(Conversation::start(socket, known, true))))
    }

    /// What is known about the other side, from now until this conversation's end.
    pub fn presence(&self) -> watch::Receiver<Presence> {
        let mut presence = self.now().presence.clone();
        presence.mark_unchanged();
        presence
    }

    /// The guest was booted again: it will say hello on `socket`. Requests under way fail when the old socket closes.
    pub fn restart(&self, socket: UnixStream) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) =
            Arc::new(Conversation::start(socket, None, false));
    }

    /// How many answers were given in this conversation to what somebody wanted of the guest: SETTLE is the service's own.
    pub fn answers(&self) -> watch::Receiver<u64> {
        self.now().answers.clone()
    }

    fn now(&self) -> Arc<Conversation> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the agent said when it was ready.
    pub fn hello(&self) -> Option<Arc<Hello>> {
        self.now().hello()
    }

    /// Waits for the hello. Never comes back while the guest is silent.
    ///
    /// # Errors
    /// The reason why there will be none.
    pub async fn wait_hello(&self) -> Result<Arc<Hello>, String> {
        self.now().wait_hello().await
    }

    /// Asks and waits.
    ///
    /// # Errors
    /// [`FleetError::NoAgent`], [`FleetError::Agent`] (a refusal, or words out of place), [`FleetError::AgentTimeout`],
    /// [`FleetError::Limit`].
    pub async fn ask(&self, request: AgentRequest, within: Duration) -> Result<AgentReply, FleetError> {
        self.now().ask(request, within).await
    }

    /// Asks; the answer is waited for with [`Asked::answer`]. What is asked first reaches the guest first.
    ///
    /// # Errors
    /// Those of [`ask`](Self::ask) that can be known already.
    pub async fn begin(&self, request: AgentRequest) -> Result<Asked, FleetError> {
        let conversation = self.now();
        let answer = conversation.begin(request).await?;
        Ok(Asked { conversation, answer })
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// As [`ask`](Self::ask); [`FleetError::Invalid`]: what no agent would take.
    pub async fn open(&self, what: What, within: Duration) -> Result<Stream, FleetError> {
        let conversation = self.now();
        let opening = Opening { session: conversation.session, window: WINDOW_BYTES, what };
        opening.check().map_err(|error| FleetError::Invalid(error.to_string()))?;
        tokio::time::timeout(within, conversation.open(opening))
            .await
            .map_err(|_| FleetError::AgentTimeout(within.as_millis()))?
    }

    /// Waits until no request is under way, holds new ones back and has streams stand still: a guest that is frozen in the
    /// middle of a frame *to* it would take its clones' first bytes for the rest of the old one, and a clone's host the rest
    /// of one *from* it for a new one (wire.rs).
    ///
    /// Waits as long as words come (a slow serial port may have 64 KiB to carry first), at most [`QUIET_TIMEOUT_MAX`], and
    /// `within` when none do.
    ///
    /// # Errors
    /// [`FleetError::AgentBusy`].
    pub async fn quiet(&self, within: Duration) -> Result<Quiet, FleetError> {
        self.now().quiet(within).await
    }
}

/// A request that the guest has not answered yet. Dropped, its answer is for nobody.
#[derive(Debug)]
pub struct Asked {
    conversation: Arc<Conversation>,
    answer: oneshot::Receiver<Result<AgentReply, FleetError>>,
}

impl Asked {
    /// Waits for the answer.
    ///
    /// # Errors
    /// As [`AgentClient::ask`].
    pub async fn answer(self, within: Duration) -> Result<AgentReply, FleetError> {
        match tokio::time::timeout(within, self.answer).await {
            Ok(answer) => answer.map_err(|_| self.conversation.gone())?,
            Err(_) => Err(FleetError::AgentTimeout(within.as_millis())),
        }
    }
}

/// What is said between one start of the guest and the next.
#[derive(Debug)]
struct Conversation {
    orders: mpsc::Sender<Order>,
    presence: watch::Receiver<Presence>,
    answers: watch::Receiver<u64>,
    /// A permit for each request under way.
    under_way: Arc<Semaphore>,
    /// The same for SETTLE, which a snapshot waits for a while and does without.
    settling: Arc<Semaphore>,
    /// Held while a request is queued; and by [`Quiet`], so that none is.
    gate: Arc<Mutex<()>>,
    /// Names this conversation to the guest.
    session: u64,
    /// A permit for each stream.
    streams: Arc<Semaphore>,
    /// Tells the task that a stream has something to say.
    wake: Arc<Notify>,
    /// Odd while streams are to stand still. Each time has its own number.
    hold: Arc<watch::Sender<u64>>,
    /// The number of the hold in which they do.
    still: watch::Receiver<u64>,
    /// Bytes that came from the guest.
    heard: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Order {
    request: AgentRequest,
    answer: oneshot::Sender<Result<AgentReply, FleetError>>,
    permit: OwnedSemaphorePermit,
    /// What it opens.
    stream: Option<Arc<Shared>>,
    /// Of its frame.
    bytes: usize,
}

/// While this lives nothing is under way in either direction and nothing begins.
#[derive(Debug)]
pub struct Quiet {
    _hold: Hold,
    _gate: OwnedMutexGuard<()>,
}

/// While this lives streams stand still, or are about to.
#[derive(Debug)]
struct Hold(Arc<watch::Sender<u64>>);

impl Hold {
    /// The gate's holder has the only one.
    fn begin(hold: &Arc<watch::Sender<u64>>) -> Self {
        hold.send_modify(|number| *number += 1);
        Self(Arc::clone(hold))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.send_modify(|number| *number += 1);
    }
}

impl Conversation {
    fn start(socket: UnixStream, known: Option<Arc<Hello>>, resumed: bool) -> Self {
        // Of one that was never heard of, nothing was read.
        let resumed = resumed && known.is_some();
        let (orders, inbox) = mpsc::channel(AGENT_REQUESTS_MAX + SETTLES_MAX);
        let (presence_in, presence) = watch::channel(known.map_or(Presence::Silent, Presence::Here));
        let (answers_in, answers) = watch::channel(0);
        let (hold, holds) = watch::channel(0);
        let (still_in, still) = watch::channel(0);
        let wake = Arc::new(Notify::new());
        let mut talk = Talk::new(inbox, presence_in, answers_in, Arc::clone(&wake), holds, still_in);
        let heard = Arc::clone(&talk.heard);
        if resumed {
            talk.seek();
        }
        tokio::spawn(talk.run(socket));
        Self {
            orders,
            presence,
            answers,
            under_way: Arc::new(Semaphore::new(AGENT_REQUESTS_MAX)),
            settling: Arc::new(Semaphore::new(SETTLES_MAX)),
            gate: Arc::new(Mutex::new(())),
            session: u64::from_le_bytes(super::id::random().unwrap_or_default()),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            wake,
            hold: Arc::new(hold),
            still,
            heard,
        }
    }

    fn hello(&self) -> Option<Arc<Hello>> {
        match &*self.presence.borrow() {
            Presence::Here(hello) => Some(Arc::clone(hello)),
            _ => None,
        }
    }

    async fn wait_hello(&self) -> Result<Arc<Hello>, String> {
        let mut presence = self.presence.clone();
        match presence.wait_for(|presence| !matches!(presence, Presence::Silent)).await.as_deref() {
            Ok(Presence::Here(hello)) => Ok(Arc::clone(hello)),
            Ok(Presence::Lost(reason)) => Err(reason.clone()),
            Ok(Presence::Silent) | Err(_) => Err("the agent port was closed".to_owned()),
        }
    }

    async fn ask(&self, request: AgentRequest, within: Duration) -> Result<AgentReply, FleetError> {
        let exchange = async {
            let answer = self.begin(request).await?;
            answer.await.map_err(|_| self.gone())?
        };
        tokio::time::timeout(within, exchange)
            .await
            .map_err(|_| FleetError::AgentTimeout(within.as_millis()))?
    }

    async fn open(&self, opening: Opening) -> Result<Stream, FleetError> {
        let permit = Arc::clone(&self.streams).try_acquire_owned().map_err(|_| FleetError::Limit {
            what: "commands and files under way in one VM",
            limit: STREAMS_MAX,
            hint: "wait until one has ended",
        })?;
        let shared = Shared::new(Arc::clone(&self.wake), permit);
        // Before the answer is there: who goes away meanwhile wants it killed.
        let mut stream = Stream::new(Arc::clone(&shared));
        let answer = self.queue(AgentRequest::Open(opening), Some(shared)).await?;
        match answer.await.map_err(|_| self.gone())?? {
            AgentReply::Opened(opened) => stream.opened = Some(opened),
            _ => return Err(FleetError::Internal("the agent opened something else".to_owned())),
        }
        Ok(stream)
    }

    /// Queues a request; waits only while none may begin ([`Quiet`]).
    async fn begin(
        &self,
        request: AgentRequest,
    ) -> Result<oneshot::Receiver<Result<AgentReply, FleetError>>, FleetError> {
        self.queue(request, None).await
    }

    async fn queue(
        &self,
        request: AgentRequest,
        stream: Option<Arc<Shared>>,
    ) -> Result<oneshot::Receiver<Result<AgentReply, FleetError>>, FleetError> {
        match &*self.presence.borrow() {
            Presence::Here(_) => {}
            Presence::Silent => return Err(FleetError::NoAgent),
            Presence::Lost(reason) => return Err(FleetError::WrongState(reason.clone())),
        }
        let _gate = self.gate.lock().await;
        let (permits, limit) = match request {
            AgentRequest::Settle { .. } => (&self.settling, SETTLES_MAX),
            _ => (&self.under_way, AGENT_REQUESTS_MAX),
        };
        let permit = Arc::clone(permits).try_acquire_owned().map_err(|_| FleetError::Limit {
            what: "requests to one agent",
            limit,
            hint: "wait for some answers first",
        })?;
        let (sender, answer) = oneshot::channel();
        // The queue has room for as many as there are permits.
        self.orders
            .try_send(Order { request, answer: sender, permit, stream, bytes: 0 })
            .map_err(|_| self.gone())?;
        Ok(answer)
    }

    async fn quiet(&self, within: Duration) -> Result<Quiet, FleetError> {
        let all = u32::try_from(AGENT_REQUESTS_MAX).unwrap_or(u32::MAX);
        let quiet = async {
            let gate = Arc::clone(&self.gate).lock_owned().await;
            // A permit comes back with the answer, or with the end of the conversation.
            let _all = self.under_way.acquire_many(all).await;
            // An agent that is dead or hangs has never answered this one, and its VM is to have its snapshots. One that is slow has begun to
            // speak, maybe.
            let settles = u32::try_from(SETTLES_MAX).unwrap_or(u32::MAX);
            let _ = tokio::time::timeout(SETTLE_TIMEOUT, self.settling.acquire_many(settles)).await;
            let hold = Hold::begin(&self.hold);
            let number = *self.hold.borrow();
            // The end of the conversation is quiet too.
            let _ = self.still.clone().wait_for(|still| *still == number).await;
            Quiet { _hold: hold, _gate: gate }
        };
        let mut quiet = std::pin::pin!(quiet);
        let begun = Instant::now();
        loop {
            let heard = self.heard.load(Ordering::Relaxed);
            match tokio::time::timeout(within, &mut quiet).await {
                Ok(quiet) => return Ok(quiet),
                Err(_)
                    if self.heard.load(Ordering::Relaxed) != heard && begun.elapsed() < QUIET_TIMEOUT_MAX => {
                }
                Err(_) => return Err(FleetError::AgentBusy),
            }
        }
    }

    fn gone(&self) -> FleetError {
        match &*self.presence.borrow() {
            Presence::Lost(reason) => FleetError::WrongState(reason.clone()),
            _ => FleetError::WrongState("the agent port was closed".to_owned()),
        }
    }
}

/// The task behind a [`Conversation`].
struct Talk {
    inbox: mpsc::Receiver<Order>,
    presence: watch::Sender<Presence>,
    answers: watch::Sender<u64>,
    decoder: FrameDecoder,
    next_id: u32,
    /// By frame id. Those who gave up stay in here until the guest answers: it is still at it.
    waiting: HashMap<u32, Order>,
    /// Bytes of requests that the guest has not answered, and those for which its port has no room yet.
    unanswered: usize,
    later: VecDeque<Vec<u8>>,
    /// Encoded frames, the first partly written.
    unsent: VecDeque<Vec<u8>>,
    written: usize,
    streams: Streams,
    /// True when there have been streams: the guest may be speaking, or words to it may be on their way.
    streamed: bool,
    wake: Arc<Notify>,
    hold: watch::Receiver<u64>,
    still: watch::Sender<u64>,
    hush: Hush,
    seeking: Option<Seeking>,
    hellos: Hellos,
    doubt: Option<Doubt>,
    /// How many there have been.
    doubts: usize,
    heard: Arc<AtomicU64>,
}

/// The place in the guest's words is not known: what comes is thrown away up to the reply to this conversation's first request, which a number
/// that nobody could know makes known.
struct Seeking {
    /// How the reply begins: magic, kind; and its id.
    begins: [u8; 6],
    id: [u8; 4],
    carried: Vec<u8>,
}

impl Seeking {
    /// Bytes of a header up to the id's end: magic u32, kind u16, status u16, id u32.
    const BYTES: usize = 12;

    /// Takes bytes in; gives what begins with the reply.
    fn look(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        self.carried.extend_from_slice(bytes);
        let found = self
            .carried
            .windows(Self::BYTES)
            .position(|window| window.starts_with(&self.begins) && window.ends_with(&self.id));
        match found {
            Some(at) => Some(self.carried.split_off(at)),
            None => {
                let over = self.carried.len().saturating_sub(Self::BYTES - 1);
                self.carried.drain(..over);
                None
            }
        }
    }
}

/// Whether the guest was told to send nothing unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hush {
    No,
    /// By the request with this id.
    Asked(u32),
    Yes,
}

impl Talk {
    fn new(
        inbox: mpsc::Receiver<Order>,
        presence: watch::Sender<Presence>,
        answers: watch::Sender<u64>,
        wake: Arc<Notify>,
        hold: watch::Receiver<u64>,
        still: watch::Sender<u64>,
    ) -> Self {
        // Ids of another conversation may still be answered by a clone (wire.rs): begin at a different place each time.
        let next_id = u32::from_le_bytes(super::id::random().unwrap_or_default()) | 1;
        Self {
            inbox,
            presence,
            answers,
            decoder: FrameDecoder::new(),
            next_id,
            waiting: HashMap::new(),
            unanswered: 0,
            later: VecDeque::new(),
            unsent: VecDeque::new(),
            written: 0,
            streams: Streams::default(),
            streamed: false,
            wake,
            hold,
            still,
            hush: Hush::No,
            seeking: None,
            hellos: Hellos::default(),
            doubt: None,
            doubts: 0,
            heard: Arc::default(),
        }
    }

    /// The conversation goes on from an unknown place.
    fn seek(&mut self) {
        // Commands of before may be speaking still.
        self.streamed = true;
        // Its reply is empty, and it ends what the guest sends unasked meanwhile.
        self.ask_hush(true);
        if let Hush::Asked(id) = self.hush {
            let mut begins = [0; 6];
            begins[..4].copy_from_slice(&wire::MAGIC.to_le_bytes());
            begins[4..].copy_from_slice(&(wire::KIND_HUSH | wire::REPLY).to_le_bytes());
            self.seeking = Some(Seeking { begins, id: id.to_le_bytes(), carried: Vec::new() });
        }
    }

    async fn run(mut self, mut socket: UnixStream) {
        let reason = self.talk(&mut socket).await;
        if reason != GONE {
            // The worker holds this end too: what the guest says from now on is to vanish, and not to hold it up.
            let _ = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
        }
        self.presence.send_replace(Presence::Lost(reason.clone()));
        self.streams.lose(&reason);
        self.inbox.close();
        while let Ok(order) = self.inbox.try_recv() {
            let _ = order.answer.send(Err(FleetError::WrongState(reason.clone())));
        }
        self.fail_waiting(&reason);
    }

    fn fail_waiting(&mut self, reason: &str) {
        self.unanswered = 0;
        self.later.clear();
        for (_, order) in self.waiting.drain() {
            let _ = order.answer.send(Err(FleetError::WrongState(reason.to_owned())));
        }
    }

    /// Until the end of the conversation; says why it ended.
    async fn talk(&mut self, socket: &mut UnixStream) -> String {
        let mut buffer = vec![0u8; 64 << 10];
        let (mut reader, mut writer) = socket.split();
        loop {
            // One at a time: requests come between.
            if self.unsent.is_empty()
                && !is_held(*self.hold.borrow())
                && let Some(frame) = self.streams.next_frame()
            {
                self.unsent.push_back(frame);
            }
            let sending = self.unsent.front().and_then(|frame| frame.get(self.written..)).unwrap_or_default();
            tokio::select! {
                order = self.inbox.recv() => match order {
                    Some(order) => self.take(order),
                    None => return GONE.to_owned(),
                },
                () = self.wake.notified() => {}
                held = self.hold.changed() => match held {
                    Ok(()) => self.hold_changed(),
                    Err(_) => return GONE.to_owned(),
                },
                sent = writer.write(sending), if !sending.is_empty() => match sent {
                    Ok(count) => self.sent(count),
                    Err(error) => return format!("the agent port is closed: {error}"),
                },
                got = reader.read(&mut buffer) => match got {
                    Ok(0) => return "the agent port was closed: the VM has ended, or boots again".to_owned(),
                    Ok(count) => {
                        self.heard.fetch_add(count as u64, Ordering::Relaxed);
                        let bytes = buffer.get(..count).unwrap_or_default();
                        if let Err(reason) = self.hear(bytes) {
                            return reason;
                        }
                    }
                    Err(error) => return format!("the agent port is closed: {error}"),
                },
            }
        }
    }

    fn new_id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Streams are to stand still, or may go on.
    fn hold_changed(&mut self) {
        let number = *self.hold.borrow_and_update();
        match (is_held(number), self.hush) {
            (true, Hush::No) if self.streamed => self.ask_hush(true),
            (true, Hush::Asked(_)) | (false, Hush::No) => {}
            (true, _) => _ = self.still.send_replace(number),
            (false, _) => self.ask_hush(false),
        }
    }

    fn ask_hush(&mut self, on: bool) {
        let id = self.new_id();
        // A frame of four bytes is not too long.
        if let Ok(frame) = (AgentRequest::Hush { on }).encode(id) {
            self.unsent.push_back(frame);
            self.hush = if on { Hush::Asked(id) } else { Hush::No };
        }
    }

    /// What the port holds of requests.
    fn room(&self) -> usize {
        match &*self.presence.borrow() {
            Presence::Here(hello) if hello.request_bytes > 0 => hello.request_bytes as usize,
            _ => usize::MAX,
        }
    }

    /// Sends requests for which there is room.
    fn send_later(&mut self) {
        let room = self.room();
        while let Some(frame) = self.later.front()
            && self.unanswered.saturating_add(frame.len()) <= room
        {
            self.unanswered += frame.len();
            self.unsent.extend(self.later.pop_front());
        }
    }

    fn take(&mut self, mut order: Order) {
        let id = self.new_id();
        match order.request.encode(id) {
            Ok(frame) if matches!(order.request, AgentRequest::Reset) => {
                self.unsent.push_back(frame);
                // No answer will come.
                let _ = order.answer.send(Ok(AgentReply::Done));
            }
            Ok(frame) if frame.len() > self.room() => {
                let (bytes, room) = (frame.len(), self.room());
                let told = format!("a request of {bytes} bytes; this guest's agent takes at most {room}");
                let _ = order.answer.send(Err(FleetError::Invalid(told)));
            }
            Ok(frame) => {
                order.bytes = frame.len();
                self.waiting.insert(id, order);
                self.later.push_back(frame);
                self.send_later();
            }
            Err(error) => {
                let _ = order.answer.send(Err(FleetError::Invalid(format!("{error}; ask for less at once"))));
            }
        }
    }

    fn sent(&mut self, count: usize) {
        self.written += count;
        if self.unsent.front().is_some_and(|frame| frame.len() <= self.written) {
            self.unsent.pop_front();
            self.written = 0;
        }
    }

    fn hear(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Some(seeking) = &mut self.seeking else { return self.listen(bytes) };
        let Some(rest) = seeking.look(bytes) else { return Ok(()) };
        self.seeking = None;
        if !is_held(*self.hold.borrow()) {
            // The reply is then one to a request that nobody waits for.
            self.ask_hush(false);
        }
        self.listen(&rest)
    }

    fn understand(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        loop {
            match self.decoder.next(&mut bytes) {
                Ok(Some(frame)) => self.answer(frame)?,
                Ok(None) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn answer(&mut self, frame: Frame) -> Result<(), String> {
        if frame.kind == wire::KIND_HELLO {
            let hello = Hello::decode(&frame).map_err(|error| error.to_string())?;
            self.greeted(hello);
            return Ok(());
        }
        if Said::is_said(frame.kind) {
            return self.streams.hear(&frame);
        }
        if self.hush == Hush::Asked(frame.id) && frame.status == wire::STATUS_OK {
            self.hush = Hush::Yes;
            let number = *self.hold.borrow();
            if is_held(number) {
                self.still.send_replace(number);
            }
            return Ok(());
        }
        let Some(order) = self.waiting.remove(&frame.id) else {
            tracing::debug!(id = frame.id, "an agent answered a request that was never asked here");
            return Ok(());
        };
        self.unanswered = self.unanswered.saturating_sub(order.bytes);
        self.send_later();
        let id = frame.id;
        let reply = AgentReply::decode(&order.request, frame);
        let lost = match &reply {
            Err(error) if error.refusal().is_none() => Some(error.to_string()),
            _ => None,
        };
        if let (Some(shared), Ok(AgentReply::Opened(opened))) = (order.stream, &reply) {
            self.streams.open(id, shared, opened);
            self.streamed = true;
        }
        drop(order.permit);
        let _ = order.answer.send(reply.map_err(FleetError::Agent));
        if !matches!(order.request, AgentRequest::Settle { .. }) {
            self.answers.send_modify(|answers| *answers += 1);
        }
        lost.map_or(Ok(()), Err)
    }
}

fn is_held(number: u64) -> bool {
    number % 2 == 1
}

mod again;
#[cfg(test)]
mod tests;
