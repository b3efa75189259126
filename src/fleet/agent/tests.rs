use super::super::streams::Heard;
use super::*;
use crate::agent::resync::{DOUBT_BYTES_MAX, DOUBTS_MAX, HELLO_BEGINS};
use crate::agent::streams::Pipe;
use crate::agent::{End, frame};

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
        request_bytes: 0,
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
    let (one, two, ()) = tokio::join!(agent.ask(echo("one"), LONG), agent.ask(echo("two"), LONG), serving);
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

/// An agent that is dead or hangs says nothing more: its VM has its snapshots nevertheless, as many as are wanted.
#[tokio::test]
async fn a_guest_that_never_settles_keeps_no_snapshot_away() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, None);
    guest.socket.write_all(&hello().encode().unwrap()).await.unwrap();
    agent.wait_hello().await.unwrap();
    let settle = |on| AgentRequest::Settle { on };
    for _ in 0..SETTLES_MAX / 2 {
        let answer = agent.ask(settle(true), Duration::from_millis(20)).await;
        assert!(matches!(answer, Err(FleetError::AgentTimeout(20))), "{answer:?}");
        agent.begin(settle(false)).await.unwrap();
    }
    assert!(matches!(agent.begin(settle(true)).await, Err(FleetError::Limit { .. })));
    drop(agent.quiet(QUIET_TIMEOUT).await.unwrap());
    // It goes on, and what it answers late is for nobody.
    for n in 0..SETTLES_MAX {
        let late = guest.next().await;
        assert_eq!((late.kind, late.payload[0]), (wire::KIND_SETTLE, u8::from(n % 2 == 0)));
        guest.reply(&late, 0, &[0; 8]).await;
    }
    let serving = async {
        let one = guest.next().await;
        guest.reply(&one, 0, b"one").await;
        let again = guest.next().await;
        guest.reply(&again, 0, &[0; 8]).await;
    };
    let asking = async {
        assert_eq!(agent.ask(echo("one"), LONG).await.unwrap(), AgentReply::Bytes(b"one".to_vec()));
        agent.ask(settle(true), LONG).await.unwrap()
    };
    let (settled, ()) = tokio::join!(asking, serving);
    assert_eq!(settled, AgentReply::Settled { wait_ns: 0 });
    assert_eq!(*agent.answers().borrow(), 1, "the service's own questions are no use of the guest");
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

/// A stream of a command, opened by an agent that grants 10 bytes of stdin.
async fn opened(agent: &AgentClient, guest: &mut Guest) -> (Stream, u32) {
    let what =
        What::Exec { arguments: vec![b"cat".to_vec()], environment: vec![], folder: vec![], user: vec![] };
    let opening = async {
        let asked = guest.next().await;
        assert_eq!(asked.kind, wire::KIND_EXEC);
        guest.reply(&asked, 0, &[10, 0, 0, 0, 7, 0, 0, 0]).await;
        asked.id
    };
    let (stream, id) = tokio::join!(agent.open(what, LONG), opening);
    (stream.unwrap(), id)
}

async fn says(guest: &mut Guest, kind: u16, id: u32, payload: &[u8]) {
    let bytes = frame::encode(kind, 0, id, payload).unwrap();
    guest.socket.write_all(&bytes).await.unwrap();
}

#[tokio::test]
async fn stdin_keeps_to_what_was_granted_and_output_is_granted_again_when_it_was_taken() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, id) = opened(&agent, &mut guest).await;
    stream.write(b"0123456789abc"[..].into()).await;
    stream.end_stdin();
    let first = guest.next().await;
    assert_eq!((first.kind, first.id, &first.payload[4..]), (wire::KIND_STREAM_DATA, id, &b"0123456789"[..]));
    says(&mut guest, wire::KIND_STREAM_WINDOW, id, &[0, 0, 0, 0, 5, 0, 0, 0]).await;
    assert_eq!(guest.next().await.payload[4..], *b"abc");
    assert_eq!(guest.next().await.payload[4..], *b"");

    let mut data = vec![1, 0, 0, 0];
    data.resize(4 + wire::STREAM_BYTES_MAX, b'x');
    for _ in 0..WINDOW_BYTES / wire::STREAM_BYTES_MAX as u32 {
        says(&mut guest, wire::KIND_STREAM_DATA, id, &data).await;
    }
    let mut taken = 0;
    while taken < WINDOW_BYTES {
        match stream.next().await.unwrap() {
            Heard::Output(Pipe::Stdout, bytes) => taken += bytes.len() as u32,
            other => panic!("{other:?}"),
        }
    }
    let mut granted = 0;
    while granted < WINDOW_BYTES / 4 * 3 {
        let grant = guest.next().await;
        assert_eq!((grant.kind, grant.id, grant.payload[0]), (wire::KIND_STREAM_WINDOW, id, 1));
        granted += u32::from_le_bytes(grant.payload[4..8].try_into().unwrap());
    }
    says(&mut guest, wire::KIND_END, id, &[0, 0, 0, 0, 3, 0, 0, 0]).await;
    assert_eq!(stream.next().await.unwrap(), Heard::End(End::Exited(3)));
}

#[tokio::test]
async fn more_than_was_granted_ends_the_conversation() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, id) = opened(&agent, &mut guest).await;
    let mut data = vec![2, 0, 0, 0];
    data.resize(4 + wire::STREAM_BYTES_MAX, b'x');
    for _ in 0..=WINDOW_BYTES / wire::STREAM_BYTES_MAX as u32 {
        says(&mut guest, wire::KIND_STREAM_DATA, id, &data).await;
    }
    let lost = loop {
        match stream.next().await {
            Ok(Heard::Output(Pipe::Stderr, _)) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(lost.contains("granted"), "{lost}");
    assert!(agent.hello().is_none());
}

#[tokio::test]
async fn who_goes_away_has_it_killed_even_before_it_was_opened() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, id) = opened(&agent, &mut guest).await;
    drop(stream);
    let kill = guest.next().await;
    assert_eq!((kill.kind, kill.id, &kill.payload[..]), (wire::KIND_SIGNAL, id, &[9, 0, 0, 0][..]));

    let what = What::Get { path: b"/x".to_vec() };
    assert!(matches!(agent.open(what, Duration::from_millis(20)).await, Err(FleetError::AgentTimeout(20))));
    let late = guest.next().await;
    guest.reply(&late, 0, &[0; 16]).await;
    let kill = guest.next().await;
    assert_eq!((kill.kind, kill.id), (wire::KIND_SIGNAL, late.id));
}

#[tokio::test]
async fn a_snapshot_hushes_streams_and_they_go_on_after_it() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, id) = opened(&agent, &mut guest).await;
    let hushing = async {
        let hush = guest.next().await;
        assert_eq!((hush.kind, &hush.payload[..]), (wire::KIND_HUSH, &[1, 0, 0, 0][..]));
        // What it had begun to say comes before the answer.
        says(&mut guest, wire::KIND_STREAM_DATA, id, b"\x01\0\0\0last").await;
        guest.reply(&hush, 0, b"").await;
    };
    let (quiet, ()) = tokio::join!(agent.quiet(LONG), hushing);
    let quiet = quiet.unwrap();
    assert_eq!(stream.next().await.unwrap(), Heard::Output(Pipe::Stdout, b"last"[..].into()));
    stream.write(b"held"[..].into()).await;
    let mut byte = [0];
    let silence = tokio::time::timeout(Duration::from_millis(20), guest.socket.read_exact(&mut byte)).await;
    assert!(silence.is_err(), "words to a guest that is being frozen");
    drop(quiet);
    let on = guest.next().await;
    assert_eq!((on.kind, &on.payload[..]), (wire::KIND_HUSH, &[0; 4][..]));
    guest.reply(&on, 0, b"").await;
    assert_eq!(guest.next().await.payload[4..], *b"held");

    // One that is not answered does not leave the guest hushed, and the next is asked anew.
    let soon = Duration::from_millis(20);
    assert!(matches!(agent.quiet(soon).await, Err(FleetError::AgentBusy)));
    let (asked, off) = (guest.next().await, guest.next().await);
    assert_eq!((asked.payload[0], off.payload[0]), (1, 0));
    guest.reply(&asked, 0, b"").await;
    guest.reply(&off, 0, b"").await;
    let again = async {
        let hush = guest.next().await;
        assert_eq!(hush.payload[0], 1);
        guest.reply(&hush, 0, b"").await;
    };
    let (quiet, ()) = tokio::join!(agent.quiet(LONG), again);
    quiet.unwrap();
}

/// A guest behind a slow serial port is waited for while it speaks, however long its words are.
#[tokio::test]
async fn quiet_comes_after_slow_words() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (_stream, id) = opened(&agent, &mut guest).await;
    let patience = Duration::from_millis(400);
    let slow = async {
        let hush = guest.next().await;
        let header = wire::Header { kind: wire::KIND_STREAM_DATA, status: 0, id, length: 15 };
        let words = [&header.encode()[..], b"\x01\0\0\0slowly said"].concat();
        for byte in words {
            guest.socket.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(patience / 20).await;
        }
        guest.reply(&hush, 0, b"").await;
    };
    let (quiet, ()) = tokio::join!(agent.quiet(patience), slow);
    quiet.unwrap();
}

#[tokio::test]
async fn an_agent_that_starts_again_has_lost_its_streams() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, _) = opened(&agent, &mut guest).await;
    guest.socket.write_all(&hello().encode().unwrap()).await.unwrap();
    assert!(matches!(stream.next().await, Err(FleetError::StreamLost(_))));
    let (again, _) = opened(&agent, &mut guest).await;
    drop(again);
}

#[tokio::test]
async fn requests_keep_to_what_the_port_holds() {
    let (ours, mut guest) = Guest::new();
    let hello = Hello { request_bytes: 100, ..hello() };
    let agent = AgentClient::start(ours, Some(Arc::new(hello)));
    let long = echo(&"x".repeat(85));
    assert!(matches!(agent.ask(long, LONG).await, Err(FleetError::Invalid(told)) if told.contains("100")));
    let word = |n: usize| n.to_string().repeat(34);
    let asking = async {
        let (one, two, three) = tokio::join!(
            agent.ask(echo(&word(1)), LONG),
            agent.ask(echo(&word(2)), LONG),
            agent.ask(echo(&word(3)), LONG)
        );
        [one, two, three].map(Result::unwrap)
    };
    let serving = async {
        // Two of 50 bytes fit.
        let (one, two) = (guest.next().await, guest.next().await);
        let mut byte = [0];
        let silence =
            tokio::time::timeout(Duration::from_millis(20), guest.socket.read_exact(&mut byte)).await;
        assert!(silence.is_err(), "more than the port holds");
        guest.reply(&one, 0, &one.payload).await;
        let three = guest.next().await;
        guest.reply(&two, 0, &two.payload).await;
        guest.reply(&three, 0, &three.payload).await;
    };
    let (answers, ()) = tokio::join!(asking, serving);
    for (n, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer, AgentReply::Bytes(word(n + 1).into_bytes()));
    }
}

/// As when the daemon before was killed: it had read a part of what the guest says.
#[tokio::test]
async fn a_conversation_goes_on_in_the_middle_of_a_frame() {
    let (ours, mut guest) = Guest::new();
    let mut left = frame::encode(wire::KIND_STREAM_DATA, 0, 7, &[0x55; 3000]).unwrap().split_off(1000);
    // An answer to the daemon before, which looks like the one that is waited for, and a frame that is whole.
    left.extend(frame::encode(wire::KIND_HUSH | wire::REPLY, wire::STATUS_OK, 0, b"").unwrap());
    left.extend(frame::encode(wire::KIND_END, 0, 7, &[0; 8]).unwrap());
    guest.socket.write_all(&left).await.unwrap();
    let agent = AgentClient::resume(ours, Some(Arc::new(hello())));
    let asked = agent.begin(echo("a")).await.unwrap();
    let hush = guest.next().await;
    assert_eq!((hush.kind, hush.payload.first()), (wire::KIND_HUSH, Some(&1)));
    let request = guest.next().await;
    assert_eq!(request.kind, wire::KIND_ECHO);
    // Cut in the middle of what is looked for.
    let reply = frame::encode(hush.kind | wire::REPLY, wire::STATUS_OK, hush.id, b"").unwrap();
    for piece in reply.chunks(5) {
        guest.socket.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    let free = guest.next().await;
    assert_eq!((free.kind, free.payload.first()), (wire::KIND_HUSH, Some(&0)));
    guest.reply(&request, wire::STATUS_OK, b"a").await;
    asked.answer(LONG).await.unwrap();
}

/// What an agent that is killed leaves of a frame of `long` bytes, when so many of them were sent.
fn cut(long: usize, sent: usize) -> Vec<u8> {
    let mut bytes = frame::encode(wire::KIND_STREAM_DATA, 0, 7, &vec![0x55; long]).unwrap();
    bytes.truncate(sent);
    bytes
}

/// The question by which a doubt is settled comes, and is answered as `guest` is.
async fn settle(guest: &mut Guest) {
    let question = guest.next().await;
    assert_eq!((question.kind, question.payload.len()), (wire::KIND_ECHO, 16));
    guest.reply(&question, 0, &question.payload).await;
}

#[tokio::test]
async fn an_agent_killed_in_the_middle_of_a_frame_is_followed_by_the_next() {
    // Its last frame lacks much, or less than a hello, or less than the hello's first bytes; or all but a part of its header.
    for (long, sent) in [(60_000, 100), (60_000, 59_990), (3000, 3012), (300, 313), (300, 9)] {
        let (ours, mut guest) = Guest::new();
        let agent = AgentClient::start(ours, Some(Arc::new(hello())));
        let (stream, _) = opened(&agent, &mut guest).await;
        let asked = agent.begin(echo("lost")).await.unwrap();
        let lost = guest.next().await;
        guest.socket.write_all(&cut(long, sent)).await.unwrap();
        let next = Hello { name: "the next".into(), ..hello() };
        for piece in next.encode().unwrap().chunks(7) {
            guest.socket.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        settle(&mut guest).await;
        assert!(
            matches!(asked.answer(LONG).await, Err(FleetError::WrongState(told)) if told.contains("again"))
        );
        assert!(matches!(stream.next().await, Err(FleetError::StreamLost(_))), "{long} {sent}");
        assert_eq!(agent.hello().unwrap().name, "the next", "{long} {sent}");
        let serving = async {
            let asked = guest.next().await;
            guest.reply(&lost, 0, b"from the one that is gone").await;
            guest.reply(&asked, 0, &asked.payload).await;
        };
        let (answer, ()) = tokio::join!(agent.ask(echo("new"), LONG), serving);
        assert_eq!(answer.unwrap(), AgentReply::Bytes(b"new".to_vec()), "{long} {sent}");
    }
}

#[tokio::test]
async fn a_file_with_a_hello_in_it_is_a_file() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    let (stream, id) = opened(&agent, &mut guest).await;
    let other = Hello { name: "of a file".into(), ..hello() };
    let file = [&[0x43; 2000][..], &other.encode().unwrap(), &[0x55; 3000]].concat();
    let data = [&[1, 0, 0, 0][..], &file].concat();
    let whole = frame::encode(wire::KIND_STREAM_DATA, 0, id, &data).unwrap();
    let (front, rest) = whole.split_at(2600);
    guest.socket.write_all(front).await.unwrap();
    // The agent is slow, and answers what it was asked when its frame is out.
    let question = guest.next().await;
    guest.socket.write_all(rest).await.unwrap();
    guest.reply(&question, 0, &question.payload).await;
    assert_eq!(stream.next().await.unwrap(), Heard::Output(Pipe::Stdout, file.into()));
    assert_eq!(agent.hello().unwrap().name, "test");
    says(&mut guest, wire::KIND_END, id, &[0, 0, 0, 0, 3, 0, 0, 0]).await;
    assert_eq!(stream.next().await.unwrap(), Heard::End(End::Exited(3)));
}

/// The one that follows may be killed, too, and a snapshot waits for nobody that is gone.
#[tokio::test]
async fn agents_may_be_killed_one_after_the_other() {
    let (ours, mut guest) = Guest::new();
    let agent = AgentClient::start(ours, Some(Arc::new(hello())));
    guest.socket.write_all(&cut(60_000, 100)).await.unwrap();
    guest.socket.write_all(&hello().encode().unwrap()).await.unwrap();
    guest.next().await;
    guest.socket.write_all(&cut(50_000, 100)).await.unwrap();
    let third = Hello { name: "third".into(), ..hello() };
    let bytes = third.encode().unwrap();
    let (front, rest) = bytes.split_at(40);
    guest.socket.write_all(front).await.unwrap();
    tokio::task::yield_now().await;
    guest.socket.write_all(rest).await.unwrap();
    settle(&mut guest).await;
    let mut presence = agent.presence();
    let third = |presence: &Presence| matches!(presence, Presence::Here(hello) if hello.name == "third");
    presence.wait_for(third).await.unwrap();
    agent.quiet(LONG).await.unwrap();
}

/// A frame of the longest kind that is the answer to nothing, and begins with `words`.
fn longest(words: &[u8]) -> Vec<u8> {
    let mut payload = words.to_vec();
    payload.resize(wire::PAYLOAD_BYTES_MAX, 0x43);
    frame::encode(wire::KIND_ECHO | wire::REPLY, 0, 0, &payload).unwrap()
}

/// A guest that would have the same two megabytes weighed for each of the doubts that it may raise.
#[test]
fn what_a_doubt_kept_too_long_raises_no_other() {
    let (_orders, inbox) = mpsc::channel(1);
    let (presence, here) = watch::channel(Presence::Here(Arc::new(hello())));
    let (_hold, holds) = watch::channel(0);
    let mut talk =
        Talk::new(inbox, presence, watch::channel(0).0, Arc::default(), holds, watch::channel(0).0);
    let other = Hello { name: "of a file".into(), ..hello() }.encode().unwrap();
    // Of a length that no hello has.
    let like_it = [&other[..HELLO_BEGINS], &[0xff; 4]].concat();
    let words = longest(&[&other, &like_it.repeat(DOUBTS_MAX)[..]].concat());
    let all = [words, longest(b""), longest(b"")].concat();
    assert!(all.len() > DOUBT_BYTES_MAX + wire::PAYLOAD_BYTES_MAX / 2);
    for piece in all.chunks(64 << 10) {
        talk.listen(piece).unwrap();
    }
    assert_eq!((talk.doubts, talk.doubt.is_some()), (1, false));
    assert!(matches!(&*here.borrow(), Presence::Here(hello) if hello.name == "test"));

    // What is no hello is known at once, and costs a doubt each until there may be none.
    talk.listen(&longest(&like_it.repeat(DOUBTS_MAX))).unwrap();
    assert_eq!((talk.doubts, talk.doubt.is_some()), (DOUBTS_MAX, false));
    assert!(matches!(&*here.borrow(), Presence::Here(hello) if hello.name == "test"));
}
