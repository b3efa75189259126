//! Talking with the agent in one VM.
//!
//! One task owns the agent port's socket: it writes requests, reads frames, and gives each answer to the one who waits for
//! it. The guest is hostile: frames are bounded by the decoder, requests by [`AGENT_REQUESTS_MAX`], and words out of
//! place end the conversation with a reason that every later request is told.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::error::FleetError;
use super::limits::*;
use crate::agent::{AgentReply, AgentRequest, Frame, FrameDecoder, Hello, wire};

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
        Self(RwLock::new(Arc::new(Conversation::start(socket, known))))
    }

    /// The guest was booted again: it will say hello on `socket`. Requests under way fail when the old socket closes.
    pub fn restart(&self, socket: UnixStream) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Conversation::start(socket, None));
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

    /// Waits until no request is under way and holds new ones back: a guest that is frozen in the middle of a frame *to*
    /// it would take its clones' first bytes for the rest of the old one (wire.rs).
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
    /// A permit for each request under way.
    under_way: Arc<Semaphore>,
    /// Held while a request is queued; and by [`Quiet`], so that none is.
    gate: Arc<Mutex<()>>,
}

#[derive(Debug)]
struct Order {
    request: AgentRequest,
    answer: oneshot::Sender<Result<AgentReply, FleetError>>,
    permit: OwnedSemaphorePermit,
}

/// While this lives no request is under way and none begins.
#[derive(Debug)]
pub struct Quiet {
    _gate: OwnedMutexGuard<()>,
}

impl Conversation {
    fn start(socket: UnixStream, known: Option<Arc<Hello>>) -> Self {
        let (orders, inbox) = mpsc::channel(AGENT_REQUESTS_MAX);
        let (presence_in, presence) = watch::channel(known.map_or(Presence::Silent, Presence::Here));
        tokio::spawn(Talk::new(inbox, presence_in).run(socket));
        Self {
            orders,
            presence,
            under_way: Arc::new(Semaphore::new(AGENT_REQUESTS_MAX)),
            gate: Arc::new(Mutex::new(())),
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

    /// Queues a request; waits only while none may begin ([`Quiet`]).
    async fn begin(
        &self,
        request: AgentRequest,
    ) -> Result<oneshot::Receiver<Result<AgentReply, FleetError>>, FleetError> {
        match &*self.presence.borrow() {
            Presence::Here(_) => {}
            Presence::Silent => return Err(FleetError::NoAgent),
            Presence::Lost(reason) => return Err(FleetError::WrongState(reason.clone())),
        }
        let _gate = self.gate.lock().await;
        let permit = Arc::clone(&self.under_way).try_acquire_owned().map_err(|_| FleetError::Limit {
            what: "requests to one agent",
            limit: AGENT_REQUESTS_MAX,
            hint: "wait for some answers first",
        })?;
        let (sender, answer) = oneshot::channel();
        // The queue has room for as many as there are permits.
        self.orders.try_send(Order { request, answer: sender, permit }).map_err(|_| self.gone())?;
        Ok(answer)
    }

    async fn quiet(&self, within: Duration) -> Result<Quiet, FleetError> {
        let all = u32::try_from(AGENT_REQUESTS_MAX).unwrap_or(u32::MAX);
        let quiet = async {
            let gate = Arc::clone(&self.gate).lock_owned().await;
            // A permit comes back with the answer, or with the end of the conversation.
            let _all = self.under_way.acquire_many(all).await;
            Quiet { _gate: gate }
        };
        tokio::time::timeout(within, quiet).await.map_err(|_| FleetError::AgentBusy)
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
    decoder: FrameDecoder,
    next_id: u32,
    /// By frame id. Those who gave up stay in here until the guest answers: it is still at it.
    waiting: HashMap<u32, Order>,
    /// Encoded requests, the first partly written.
    unsent: VecDeque<Vec<u8>>,
    written: usize,
}

impl Talk {
    fn new(inbox: mpsc::Receiver<Order>, presence: watch::Sender<Presence>) -> Self {
        // Ids of another conversation may still be answered by a clone (wire.rs): begin at a different place each time.
        let next_id = u32::from_le_bytes(super::id::random().unwrap_or_default()) | 1;
        Self {
            inbox,
            presence,
            decoder: FrameDecoder::new(),
            next_id,
            waiting: HashMap::new(),
            unsent: VecDeque::new(),
            written: 0,
        }
    }

    async fn run(mut self, socket: UnixStream) {
        let reason = self.talk(socket).await;
        self.presence.send_replace(Presence::Lost(reason.clone()));
        self.inbox.close();
        while let Ok(order) = self.inbox.try_recv() {
            let _ = order.answer.send(Err(FleetError::WrongState(reason.clone())));
        }
        for (_, order) in self.waiting.drain() {
            let _ = order.answer.send(Err(FleetError::WrongState(reason.clone())));
        }
    }

    /// Until the end of the conversation; says why it ended.
    async fn talk(&mut self, socket: UnixStream) -> String {
        let mut buffer = vec![0u8; 64 << 10];
        let (mut reader, mut writer) = socket.into_split();
        loop {
            let sending = self.unsent.front().and_then(|frame| frame.get(self.written..)).unwrap_or_default();
            tokio::select! {
                order = self.inbox.recv() => match order {
                    Some(order) => self.take(order),
                    None => return "the VM is gone".to_owned(),
                },
                sent = writer.write(sending), if !sending.is_empty() => match sent {
                    Ok(count) => self.sent(count),
                    Err(error) => return format!("the agent port is closed: {error}"),
                },
                got = reader.read(&mut buffer) => match got {
                    Ok(0) => return "the agent port was closed: the VM has ended, or boots again".to_owned(),
                    Ok(count) => {
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

    fn take(&mut self, order: Order) {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        match order.request.encode(id) {
            Ok(frame) => {
                self.unsent.push_back(frame);
                if matches!(order.request, AgentRequest::Reset) {
                    // No answer will come.
                    let _ = order.answer.send(Ok(AgentReply::Done));
                } else {
                    self.waiting.insert(id, order);
                }
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

    fn hear(&mut self, mut bytes: &[u8]) -> Result<(), String> {
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
            self.presence.send_replace(Presence::Here(Arc::new(hello)));
            return Ok(());
        }
        let Some(order) = self.waiting.remove(&frame.id) else {
            tracing::debug!(id = frame.id, "an agent answered a request that was never asked here");
            return Ok(());
        };
        let reply = AgentReply::decode(&order.request, frame);
        let lost = match &reply {
            Err(error) if error.refusal().is_none() => Some(error.to_string()),
            _ => None,
        };
        drop(order.permit);
        let _ = order.answer.send(reply.map_err(FleetError::Agent));
        lost.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::frame;

    const LONG: Duration = Duration::from_secs(30);

    fn hello() -> Hello {
        Hello {
            version: wire::PROTOCOL_VERSION,
            agent: wire::AGENT_TEST_GUEST,
            boot: wire::BOOT_NATIVE,
            cpus_found: 1,
            cpus_alive: 1,
            tsc_khz: 1,
            checks_run: 0,
            checks_failed: 0,
            kinds: u64::MAX,
            memory_bytes: 1 << 29,
            arena_bytes: 1 << 28,
            filled_bytes: 0,
            disks: 0,
            name: "test".into(),
        }
    }

    /// The guest's side: frames as they come.
    struct Guest {
        socket: UnixStream,
        decoder: FrameDecoder,
    }

    impl Guest {
        fn new() -> (UnixStream, Self) {
            let (ours, socket) = UnixStream::pair().unwrap();
            (ours, Self { socket, decoder: FrameDecoder::new() })
        }

        async fn next(&mut self) -> Frame {
            let mut byte = [0u8; 1];
            loop {
                self.socket.read_exact(&mut byte).await.unwrap();
                if let Some(frame) = self.decoder.next(&mut byte.as_slice()).unwrap() {
                    return frame;
                }
            }
        }

        async fn reply(&mut self, to: &Frame, status: u16, payload: &[u8]) {
            let bytes = frame::encode(to.kind | wire::REPLY, status, to.id, payload).unwrap();
            self.socket.write_all(&bytes).await.unwrap();
        }
    }

    fn echo(word: &str) -> AgentRequest {
        AgentRequest::Echo(word.as_bytes().to_vec())
    }

    #[tokio::test]
    async fn nothing_is_asked_before_the_hello() {
        let (ours, mut guest) = Guest::new();
        let agent = AgentClient::start(ours, None);
        assert!(matches!(agent.ask(echo("a"), LONG).await, Err(FleetError::NoAgent)));
        guest.socket.write_all(&hello().encode().unwrap()).await.unwrap();
        assert_eq!(*agent.wait_hello().await.unwrap(), hello());
        assert_eq!(agent.hello().unwrap().name, "test");
    }

    #[tokio::test]
    async fn answers_go_to_those_who_asked_and_strange_ones_to_nobody() {
        let (ours, mut guest) = Guest::new();
        let agent = AgentClient::start(ours, Some(Arc::new(hello())));
        let serving = async {
            let (one, two) = (guest.next().await, guest.next().await);
            let stranger = Frame { id: one.id.wrapping_sub(77), ..one.clone() };
            guest.reply(&stranger, 0, b"from before the snapshot").await;
            guest.reply(&two, wire::STATUS_OUT_OF_RANGE, b"too far").await;
            guest.reply(&one, 0, b"one").await;
        };
        let (one, two, ()) =
            tokio::join!(agent.ask(echo("one"), LONG), agent.ask(echo("two"), LONG), serving);
        assert_eq!(one.unwrap(), AgentReply::Bytes(b"one".to_vec()));
        let refusal = two.unwrap_err();
        assert!(refusal.to_string().contains("too far"), "{refusal}");
        assert_eq!(refusal.kind(), super::super::error::Kind::InvalidArgument);
    }

    #[tokio::test]
    async fn words_out_of_place_end_the_conversation_for_everybody() {
        let (ours, mut guest) = Guest::new();
        let agent = AgentClient::start(ours, Some(Arc::new(hello())));
        let breaking = async {
            guest.next().await;
            guest.socket.write_all(b"login: this is no frame").await.unwrap();
        };
        let (answer, ()) = tokio::join!(agent.ask(echo("one"), LONG), breaking);
        assert!(matches!(answer, Err(FleetError::WrongState(reason)) if reason.contains("agent frames")));
        assert!(agent.hello().is_none());
        assert!(matches!(agent.ask(echo("two"), LONG).await, Err(FleetError::WrongState(_))));
    }

    #[tokio::test]
    async fn a_silent_guest_costs_its_timeout_and_keeps_snapshots_away() {
        let (ours, mut guest) = Guest::new();
        let agent = AgentClient::start(ours, Some(Arc::new(hello())));
        let answer = agent.ask(echo("one"), Duration::from_millis(50)).await;
        assert!(matches!(answer, Err(FleetError::AgentTimeout(50))));
        // The guest may still be reading it.
        let soon = Duration::from_millis(20);
        assert!(matches!(agent.quiet(soon).await, Err(FleetError::AgentBusy)));
        let late = guest.next().await;
        guest.reply(&late, 0, b"one").await;
        let quiet = agent.quiet(LONG).await.unwrap();
        let mut held = Box::pin(agent.ask(echo("two"), LONG));
        assert!(tokio::time::timeout(soon, &mut held).await.is_err());
        drop(quiet);
        let serving = async {
            let two = guest.next().await;
            guest.reply(&two, 0, b"two").await;
        };
        let (answer, ()) = tokio::join!(held, serving);
        assert_eq!(answer.unwrap(), AgentReply::Bytes(b"two".to_vec()));
    }

    #[tokio::test]
    async fn requests_are_limited_and_the_end_answers_them_all() {
        let (ours, guest) = Guest::new();
        let agent = Arc::new(AgentClient::start(ours, Some(Arc::new(hello()))));
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..=AGENT_REQUESTS_MAX {
            let agent = Arc::clone(&agent);
            asking.spawn(async move { agent.ask(echo("x"), LONG).await });
        }
        let refused = asking.join_next().await.unwrap().unwrap();
        assert!(matches!(refused, Err(FleetError::Limit { .. })));
        drop(guest);
        while let Some(answer) = asking.join_next().await {
            assert!(matches!(answer.unwrap(), Err(FleetError::WrongState(_))));
        }
    }
}
