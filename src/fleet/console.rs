//! A VM's serial console: the bytes so far, the bytes to come, and whether a pattern has been seen.
//!
//! One task reads the worker's socket. It never waits for anybody who listens: a slow listener is told how many bytes
//! it lost. Input waits for the guest in a short queue.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};

use super::error::FleetError;
use super::kernel_words::{Ear, KernelWords};
use super::limits::*;

/// One VM's console.
#[derive(Debug)]
pub struct Console {
    kept: Mutex<Kept>,
    input: mpsc::Sender<Bytes>,
    seen: watch::Receiver<bool>,
    words: watch::Receiver<KernelWords>,
}

/// The backlog, and the way to those who listen.
#[derive(Debug)]
struct Kept {
    backlog: VecDeque<u8>,
    /// Bytes since the start, the backlog's included.
    total: u64,
    /// `None` when the console has ended.
    listeners: Option<broadcast::Sender<Piece>>,
}

/// Some output, and where in the whole stream it begins.
#[derive(Debug, Clone)]
struct Piece {
    offset: u64,
    bytes: Bytes,
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
        let (reader, writer) = socket.into_split();
        let (listeners, _) = broadcast::channel(CONSOLE_PIECES_MAX);
        let (input, typed) = mpsc::channel(CONSOLE_INPUTS_MAX);
        let (seen_in, seen) = watch::channel(false);
        let (words_in, words) = watch::channel(KernelWords::default());
        let kept = Kept { backlog: VecDeque::new(), total: 0, listeners: Some(listeners) };
        let console = Arc::new(Self { kept: Mutex::new(kept), input, seen, words });
        tokio::spawn(write(writer, typed));
        tokio::spawn(read(Arc::clone(&console), reader, Finder::new(pattern), seen_in, words_in));
        console
    }

    /// Everything from now on, after the backlog if `backlog`.
    pub fn listen(&self, backlog: bool) -> Listener {
        let kept = self.lock();
        let live = kept.listeners.as_ref().map(broadcast::Sender::subscribe);
        let have = kept.backlog.len() as u64;
        let (next, first) = match backlog {
            true => (0, Some(Piece { offset: kept.total.saturating_sub(have), bytes: copy(&kept.backlog) })),
            false => (kept.total, None),
        };
        Listener { next, first, waiting: None, live }
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
        let kept = self.lock();
        let from = kept.backlog.len().saturating_sub(LAST_LINES_BYTES_MAX);
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

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_in(&self, bytes: &[u8]) {
        let mut kept = self.lock();
        let piece = Piece { offset: kept.total, bytes: Bytes::copy_from_slice(bytes) };
        kept.total = kept.total.saturating_add(bytes.len() as u64);
        kept.backlog.extend(bytes);
        let over = kept.backlog.len().saturating_sub(BACKLOG_BYTES_MAX);
        kept.backlog.drain(..over);
        if let Some(listeners) = &kept.listeners {
            // An error only says that nobody listens.
            let _ = listeners.send(piece);
        }
    }
}

fn copy(bytes: &VecDeque<u8>) -> Bytes {
    let (front, back) = bytes.as_slices();
    [front, back].concat().into()
}

/// One who follows a console.
#[derive(Debug)]
pub struct Listener {
    /// Offset of the byte that comes next.
    next: u64,
    first: Option<Piece>,
    waiting: Option<Bytes>,
    live: Option<broadcast::Receiver<Piece>>,
}

impl Listener {
    /// The next output; `None` when the console has ended. Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<Output> {
        loop {
            if let Some(bytes) = self.waiting.take() {
                return Some(Output::Bytes(bytes));
            }
            let piece = match self.first.take() {
                Some(piece) => piece,
                None => match self.live.as_mut()?.recv().await {
                    Ok(piece) => piece,
                    Err(RecvError::Lagged(_)) => continue, // The next piece's offset tells how much.
                    Err(RecvError::Closed) => return None,
                },
            };
            let lost = piece.offset.saturating_sub(self.next);
            self.next = piece.offset.saturating_add(piece.bytes.len() as u64);
            if !piece.bytes.is_empty() {
                self.waiting = Some(piece.bytes);
            }
            if lost > 0 {
                return Some(Output::Lost(lost));
            }
        }
    }
}

async fn read(
    console: Arc<Console>,
    mut socket: OwnedReadHalf,
    mut finder: Finder,
    seen: watch::Sender<bool>,
    words: watch::Sender<KernelWords>,
) {
    let mut ear = Ear::default();
    let mut buffer = vec![0u8; CONSOLE_READ_BYTES];
    loop {
        let bytes = match socket.read(&mut buffer).await {
            Ok(count) if count > 0 => buffer.get(..count).unwrap_or_default(),
            _ => break,
        };
        console.take_in(bytes);
        if finder.look(bytes) {
            let _ = seen.send(true);
        }
        if let Some(heard) = ear.hear(bytes) {
            words.send_replace(heard);
        }
    }
    console.lock().listeners = None;
}

async fn write(mut socket: OwnedWriteHalf, mut typed: mpsc::Receiver<Bytes>) {
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
        let total = 4 * CONSOLE_PIECES_MAX * CONSOLE_READ_BYTES;
        guest.write_all(&vec![b'x'; total]).await.unwrap();
        drop(guest);
        let mut witness = console.listen(false);
        while witness.next().await.is_some() {}
        let (bytes, lost) = all(&mut slow).await;
        assert!(lost > 0 && bytes.len() as u64 + lost == total as u64);
        let (bytes, lost) = all(&mut console.listen(true)).await;
        assert_eq!((bytes.len(), lost), (BACKLOG_BYTES_MAX, (total - BACKLOG_BYTES_MAX) as u64));
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
