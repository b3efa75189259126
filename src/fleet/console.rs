//! A VM's serial console: the bytes so far, the bytes to come, and whether a pattern has been seen.
//!
//! One task reads the worker's socket into the backlog. It never waits for anybody who listens: who lags behind by more
//! than the backlog is told how many bytes are lost. Input waits for the guest in a short queue.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::error::FleetError;
use super::kernel_words::{Ear, KernelWords};
use super::limits::*;

/// One VM's console.
#[derive(Debug)]
pub struct Console {
    kept: Arc<Mutex<Kept>>,
    /// How far the output has come; its end is the console's end.
    grown: watch::Receiver<u64>,
    input: mpsc::Sender<Bytes>,
    seen: watch::Receiver<bool>,
    words: watch::Receiver<KernelWords>,
}

/// The last of the output. Those who listen read it from here, each at their own pace.
#[derive(Debug, Default)]
struct Kept {
    backlog: VecDeque<u8>,
    /// Bytes since the start, the backlog's included.
    total: u64,
}

impl Kept {
    fn take_in(&mut self, bytes: &[u8]) {
        self.total = self.total.saturating_add(bytes.len() as u64);
        self.backlog.extend(bytes);
        let over = self.backlog.len().saturating_sub(BACKLOG_BYTES_MAX);
        self.backlog.drain(..over);
    }

    /// How many bytes from `offset` on are gone; if none, what stands there, [`CONSOLE_READ_BYTES`] at most.
    fn from(&self, offset: u64) -> (u64, Bytes) {
        let begin = self.total.saturating_sub(self.backlog.len() as u64);
        match usize::try_from(offset.saturating_sub(begin)) {
            Ok(skip) if offset >= begin => {
                (0, self.backlog.iter().skip(skip).take(CONSOLE_READ_BYTES).copied().collect())
            }
            _ => (begin.saturating_sub(offset), Bytes::new()),
        }
    }
}

/// What a listener gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Bytes(Bytes),
    /// This many bytes are missing here.
    Lost(u64),
}

impl Console {
    /// Starts reading `socket`. `pattern`, if not empty, is looked for in the output.
    pub fn start(socket: UnixStream, pattern: &[u8]) -> Arc<Self> {
        // Not into halves that shut the socket down when they are dropped: it may be left to another daemon.
        let (reader, writer) = tokio::io::split(socket);
        let (grown_in, grown) = watch::channel(0);
        let (input, typed) = mpsc::channel(CONSOLE_INPUTS_MAX);
        let (seen_in, seen) = watch::channel(false);
        let (words_in, words) = watch::channel(KernelWords::default());
        let kept = Arc::new(Mutex::new(Kept::default()));
        tokio::spawn(write(writer, typed));
        let reading = Reading {
            kept: Arc::clone(&kept),
            grown: grown_in,
            finder: Finder::new(pattern),
            seen: seen_in,
            words: words_in,
        };
        tokio::spawn(reading.run(reader));
        Arc::new(Self { kept, grown, input, seen, words })
    }

    /// Everything from now on, after the backlog if `backlog`.
    pub fn listen(&self, backlog: bool) -> Listener {
        let next = if backlog { 0 } else { lock(&self.kept).total };
        Listener { kept: Arc::clone(&self.kept), grown: self.grown.clone(), next, rests_until: None }
    }

    /// Queues bytes for the guest to read; waits while it has much unread.
    pub async fn type_in(&self, bytes: Bytes) -> Result<(), FleetError> {
        if bytes.len() > CONSOLE_INPUT_BYTES_MAX {
            return Err(FleetError::Invalid(format!(
                "{} bytes of console input in one message; send at most {CONSOLE_INPUT_BYTES_MAX}",
                bytes.len()
            )));
        }
        let ended = |_| FleetError::WrongState("the console has ended: the VM is gone".into());
        self.input.send(bytes).await.map_err(ended)
    }

    /// Waits until the pattern has been seen; `false` when the console ended without it.
    pub async fn pattern_seen(&self) -> bool {
        self.seen.clone().wait_for(|seen| *seen).await.is_ok()
    }

    /// What the guest's kernel has said.
    pub fn words(&self) -> watch::Receiver<KernelWords> {
        self.words.clone()
    }

    /// Waits until the guest's kernel has panicked and has printed its trace; gives the panic's line. Comes back for nothing else.
    pub async fn panicked(&self) -> String {
        let mut words = self.words.clone();
        let heard = words.wait_for(|words| words.panic.is_some()).await;
        let line = heard.ok().and_then(|words| words.panic.clone());
        let Some(line) = line else { return std::future::pending().await };
        // Nothing says that a trace is at its end but that no more comes.
        let printed = async {
            let mut listener = self.listen(false);
            while let Ok(Some(_)) = tokio::time::timeout(TRACE_PAUSE, listener.next()).await {}
        };
        let _ = tokio::time::timeout(TRACE_WITHIN, printed).await;
        line
    }

    /// The last lines for an error message, as one sentence part.
    pub fn last_lines(&self) -> String {
        self.last_lines_within(LAST_LINES_BYTES_MAX)
    }

    /// The same from at most so many bytes.
    pub fn last_lines_within(&self, bytes_max: usize) -> String {
        let kept = lock(&self.kept);
        let from = kept.backlog.len().saturating_sub(bytes_max);
        let bytes: Vec<u8> = kept.backlog.iter().skip(from).copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let printable = text.replace(|c: char| c.is_control() && c != '\n', "");
        let lines: Vec<&str> = printable.lines().filter(|line| !line.trim().is_empty()).collect();
        match lines.len() {
            0 => "the console is empty".to_owned(),
            count => {
                let last: Vec<&str> = lines.into_iter().skip(count.saturating_sub(LAST_LINES_MAX)).collect();
                format!("the console's last lines:\n  {}", last.join("\n  "))
            }
        }
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One who follows a console.
#[derive(Debug)]
pub struct Listener {
    kept: Arc<Mutex<Kept>>,
    grown: watch::Receiver<u64>,
    /// Offset of the byte that comes next.
    next: u64,
    /// Until then more is gathered, as after every piece that was not a full one.
    rests_until: Option<Instant>,
}

impl Listener {
    /// The next output, gathered for [`CONSOLE_PACE`] if much comes in little pieces; `None` when the console has ended.
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<Output> {
        loop {
            // Looked at before the bytes are: what comes after that wakes us.
            let ended = self.grown.has_changed().is_err();
            self.grown.mark_unchanged();
            let waiting = lock(&self.kept).total.saturating_sub(self.next);
            let little = (1..CONSOLE_READ_BYTES as u64).contains(&waiting);
            if let Some(until) = self.rests_until.filter(|_| little && !ended) {
                tokio::time::sleep_until(until).await;
            }
            if let Some(output) = self.take() {
                self.rests_until = Some(Instant::now() + CONSOLE_PACE);
                return Some(output);
            }
            if ended {
                return None;
            }
            // An error is the end; the last bytes may have come just before it.
            let _ = self.grown.changed().await;
        }
    }

    /// What is there now, if anything is.
    pub fn take(&mut self) -> Option<Output> {
        let (lost, bytes) = lock(&self.kept).from(self.next);
        self.next = self.next.saturating_add(lost).saturating_add(bytes.len() as u64);
        match lost {
            0 => Some(bytes).filter(|bytes| !bytes.is_empty()).map(Output::Bytes),
            lost => Some(Output::Lost(lost)),
        }
    }
}

/// What the task that reads the worker's socket tells the others.
struct Reading {
    kept: Arc<Mutex<Kept>>,
    grown: watch::Sender<u64>,
    finder: Finder,
    seen: watch::Sender<bool>,
    words: watch::Sender<KernelWords>,
}

impl Reading {
    async fn run(mut self, mut socket: ReadHalf<UnixStream>) {
        let mut ear = Ear::default();
        let mut buffer = vec![0u8; CONSOLE_READ_BYTES];
        loop {
            let bytes = match socket.read(&mut buffer).await {
                Ok(count) if count > 0 => buffer.get(..count).unwrap_or_default(),
                _ => return,
            };
            let mut kept = lock(&self.kept);
            kept.take_in(bytes);
            let total = kept.total;
            drop(kept);
            self.grown.send_replace(total);
            if self.finder.look(bytes) {
                self.seen.send_replace(true);
            }
            if let Some(heard) = ear.hear(bytes) {
                self.words.send_replace(heard);
            }
        }
    }
}

async fn write(mut socket: WriteHalf<UnixStream>, mut typed: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = typed.recv().await {
        if socket.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Looks for a pattern in a stream that comes in pieces.
struct Finder {
    pattern: Vec<u8>,
    /// The end of what was looked at: less than a pattern.
    carried: Vec<u8>,
}

impl Finder {
    fn new(pattern: &[u8]) -> Self {
        Self { pattern: pattern.to_vec(), carried: Vec::new() }
    }

    /// True if the pattern ends in `bytes`; at most once.
    fn look(&mut self, bytes: &[u8]) -> bool {
        if self.pattern.is_empty() {
            return false;
        }
        self.carried.extend_from_slice(bytes);
        let found = self.carried.windows(self.pattern.len()).any(|window| window == self.pattern);
        let surplus = self.carried.len().saturating_sub(self.pattern.len().saturating_sub(1));
        self.carried.drain(..surplus);
        if found {
            self.pattern.clear();
            self.carried.clear();
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn all(listener: &mut Listener) -> (Vec<u8>, u64) {
        let (mut bytes, mut lost) = (Vec::new(), 0);
        while let Some(output) = listener.next().await {
            match output {
                Output::Bytes(more) => bytes.extend_from_slice(&more),
                Output::Lost(count) => lost += count,
            }
        }
        (bytes, lost)
    }

    #[tokio::test]
    async fn backlog_then_live_bytes_then_the_end() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"");
        let mut early = console.listen(true);
        guest.write_all(b"hello ").await.unwrap();
        assert_eq!(early.next().await, Some(Output::Bytes("hello ".into())));
        let mut late = console.listen(true);
        let mut later = console.listen(false);
        guest.write_all(b"world").await.unwrap();
        drop(guest);
        assert_eq!(all(&mut early).await, (b"world".to_vec(), 0));
        assert_eq!(all(&mut late).await, (b"hello world".to_vec(), 0));
        assert_eq!(all(&mut later).await, (b"world".to_vec(), 0));
        assert_eq!(all(&mut console.listen(true)).await, (b"hello world".to_vec(), 0));
        assert!(console.last_lines().contains("hello world"));
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_lost_and_the_backlog_is_bounded() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"");
        let mut slow = console.listen(true);
        let total = 4 * BACKLOG_BYTES_MAX;
        guest.write_all(&vec![b'x'; total]).await.unwrap();
        drop(guest);
        let mut witness = console.listen(false);
        while witness.next().await.is_some() {}
        assert_eq!(all(&mut slow).await, (vec![b'x'; BACKLOG_BYTES_MAX], (total - BACKLOG_BYTES_MAX) as u64));
        assert_eq!(all(&mut console.listen(true)).await.0.len(), BACKLOG_BYTES_MAX);
    }

    /// As a guest does that writes a byte at a time: what counts is bytes, not pieces.
    #[tokio::test]
    async fn many_small_pieces_lose_nothing() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"");
        let mut slow = console.listen(true);
        let mut quick = console.listen(true);
        let begin = Instant::now();
        let printing = async {
            for byte in 0..5000u32 {
                guest.write_all(&[byte as u8]).await.unwrap();
            }
        };
        let (mut pieces, mut heard) = (0, 0);
        let hearing = async {
            while heard < 5000 {
                let Some(Output::Bytes(bytes)) = quick.next().await else { panic!("the end, or a loss") };
                assert!(bytes.iter().zip(heard..).all(|(got, due)| *got == due as u8));
                heard += bytes.len() as u32;
                pieces += 1;
            }
        };
        tokio::join!(printing, hearing);
        let paces = begin.elapsed().as_millis() / CONSOLE_PACE.as_millis();
        assert!(pieces <= paces + 2, "{pieces} pieces in {paces} times the pace");
        drop(guest);
        let (bytes, lost) = all(&mut slow).await;
        assert_eq!((bytes, lost), ((0..5000u32).map(|byte| byte as u8).collect(), 0));
    }

    #[tokio::test]
    async fn input_reaches_the_guest_and_is_limited() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"");
        console.type_in("ping\n".into()).await.unwrap();
        let mut buffer = [0; 5];
        guest.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"ping\n");
        assert!(console.type_in(vec![0; CONSOLE_INPUT_BYTES_MAX + 1].into()).await.is_err());
    }

    #[tokio::test]
    async fn a_pattern_is_seen_and_its_absence_too() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"READY");
        guest.write_all(b"... REA").await.unwrap();
        guest.write_all(b"DY\n").await.unwrap();
        assert!(console.pattern_seen().await);
        let (ours, guest) = UnixStream::pair().unwrap();
        let console = Console::start(ours, b"READY");
        drop(guest);
        assert!(!console.pattern_seen().await);
    }

    proptest! {
        #[test]
        fn a_pattern_is_found_however_the_stream_is_cut(
            before in "[ab]{0,20}", after in "[ab]{0,20}", pattern in "[ab]{1,5}", cut in 1usize..7
        ) {
            let text = format!("{before}{pattern}{after}");
            let mut finder = Finder::new(pattern.as_bytes());
            let count = text.as_bytes().chunks(cut).filter(|piece| finder.look(piece)).count();
            prop_assert_eq!(count, 1);
            let mut finder = Finder::new(b"c");
            prop_assert!(!finder.look(text.as_bytes()));
        }
    }
}
