//! Finding the place in an agent's words again, when the agent was killed in the middle of a frame and another one was started.
//!
//! The new one's hello then comes where the rest of that frame is due. It may as well be the contents of a file that somebody reads, so a
//! hello out of place is a doubt and no more: the guest is asked to say bytes back that nobody could know before. If they come as a
//! reply should, the old agent is alive and all was its frame; if they come where no frame begins, the new one has said them, and the
//! conversation begins again there.
//!
//! What a guest can gain by lying about this is to be believed to have started its agent again, which it may do anyway.

use super::frame::{self, Frame};
use super::ops::{AgentRequest, Hello};
use super::wire::{self, HEADER_BYTES};

/// Most that is kept of what comes while the answer is awaited: more than agent, ports and sockets hold between them.
pub const DOUBT_BYTES_MAX: usize = 2 << 20;
/// How often one conversation may be in doubt.
pub const DOUBTS_MAX: usize = 64;

/// How a hello begins: magic, kind, status, id.
const HELLO: [u8; HELLO_BEGINS] = {
    let header = wire::MAGIC.to_le_bytes();
    let kind = wire::KIND_HELLO.to_le_bytes();
    [header[0], header[1], header[2], header[3], kind[0], kind[1], 0, 0, 0, 0, 0, 0]
};
/// Bytes of that.
pub const HELLO_BEGINS: usize = 12;
const NONCE_BYTES: usize = 16;

/// Looks for what begins like a hello.
#[derive(Debug, Default)]
pub struct Hellos {
    /// So many bytes of it have come.
    matched: usize,
}

/// A hello has come where no frame begins.
#[derive(Debug)]
pub struct Doubt {
    /// From the hello's first byte on.
    kept: Vec<u8>,
    /// Where the next hello is looked for, and the reply.
    looked: usize,
    searched: usize,
    hello: Option<Hello>,
    hellos: Hellos,
    nonce: [u8; NONCE_BYTES],
    id: u32,
}

/// What is known after more bytes have come.
#[derive(Debug)]
pub enum Verdict {
    /// Not enough came. The frame, if there is one, is to be sent: the question.
    Wait(Option<Vec<u8>>),
    /// It is no hello: these bytes follow those that the decoder has.
    Continue(Vec<u8>),
    /// The question cannot be settled. The same, and no hello in them is to be a doubt again: a guest could have as many of them weighed, each
    /// time with all of these bytes.
    TooLong(Vec<u8>),
    /// The reply has come. `follows`: what follows the bytes that the decoder has. If the decoder does not find the reply in it, an agent that
    /// says `hello` has started, and the rest of its words begins at `place` of it.
    Answered { follows: Vec<u8>, hello: Box<Hello>, place: usize },
}

impl Hellos {
    /// Where, in `bytes`, the beginning of a hello ends.
    pub fn look(&mut self, bytes: &[u8]) -> Option<usize> {
        for (at, byte) in bytes.iter().enumerate() {
            // The first byte comes once in it, so after a mismatch nothing but that can match.
            let due = HELLO.get(self.matched);
            self.matched = match due == Some(byte) {
                true => self.matched + 1,
                false => usize::from(HELLO.first() == Some(byte)),
            };
            if self.matched == HELLO_BEGINS {
                self.matched = 0;
                return Some(at + 1);
            }
        }
        None
    }
}

impl Doubt {
    /// Begins when the beginning of a hello has come. `nonce` is of nobody's knowledge; `id` names the question.
    pub fn new(nonce: [u8; NONCE_BYTES], id: u32) -> Doubt {
        Doubt {
            kept: HELLO.to_vec(),
            looked: HELLO_BEGINS,
            searched: HELLO_BEGINS,
            hello: None,
            hellos: Hellos::default(),
            nonce,
            id,
        }
    }

    /// Whether a frame is the reply to the question.
    pub fn is_reply(&self, frame: &Frame) -> bool {
        frame.kind == wire::KIND_ECHO | wire::REPLY && frame.id == self.id && frame.payload == self.nonce
    }

    /// Takes more bytes in.
    pub fn hear(&mut self, bytes: &[u8]) -> Verdict {
        self.kept.extend_from_slice(bytes);
        let mut question = None;
        if self.hello.is_none() {
            match hello_at(&self.kept) {
                Some(Ok(hello)) => {
                    self.hello = Some(hello);
                    question = self.question();
                }
                Some(Err(())) => return Verdict::Continue(self.follows()),
                None => return Verdict::Wait(None),
            }
        }
        if let Some(place) = self.reply_at()
            && let Some(hello) = self.hello.take()
        {
            let follows = self.follows();
            return Verdict::Answered { follows, hello: Box::new(hello), place: place - HELLO_BEGINS };
        }
        if self.kept.len() > DOUBT_BYTES_MAX {
            return Verdict::TooLong(self.follows());
        }
        // One that was started may have been killed, too, and the question with it.
        while let Some(end) = self.kept.get(self.looked..).and_then(|rest| self.hellos.look(rest)) {
            self.looked += end;
            let begins = self.looked - HELLO_BEGINS;
            match self.kept.get(begins..).and_then(hello_at) {
                Some(Ok(hello)) => {
                    self.hello = Some(hello);
                    question = self.question();
                }
                Some(Err(())) => {}
                None => {
                    // It is looked for again when more is there.
                    self.looked = begins;
                    return Verdict::Wait(question);
                }
            }
        }
        self.looked = self.kept.len();
        Verdict::Wait(question)
    }

    fn question(&self) -> Option<Vec<u8>> {
        AgentRequest::Echo(self.nonce.to_vec()).encode(self.id).ok()
    }

    fn reply_at(&mut self) -> Option<usize> {
        let reply =
            frame::encode(wire::KIND_ECHO | wire::REPLY, wire::STATUS_OK, self.id, &self.nonce).ok()?;
        let found = self.kept.get(self.searched..)?.windows(reply.len()).position(|window| window == reply);
        let place = found.map(|at| self.searched + at);
        self.searched = self.kept.len().saturating_sub(reply.len() - 1).max(HELLO_BEGINS);
        place
    }

    /// Ends the doubt: nothing is kept any more.
    fn follows(&mut self) -> Vec<u8> {
        let mut kept = std::mem::take(&mut self.kept);
        kept.drain(..HELLO_BEGINS.min(kept.len()));
        kept
    }
}

/// The hello that these bytes begin with; an error if they do not; `None` when it is not all there.
fn hello_at(bytes: &[u8]) -> Option<Result<Hello, ()>> {
    let header = wire::Header::decode(bytes.first_chunk::<HEADER_BYTES>()?);
    let length = header.ok().map(|header| header.length as usize);
    let lengths = wire::HELLO_BYTES..=wire::HELLO_BYTES + wire::NAME_BYTES_MAX;
    let Some(length) = length.filter(|length| lengths.contains(length)) else { return Some(Err(())) };
    let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + length)?.to_vec();
    let frame = Frame { kind: wire::KIND_HELLO, status: wire::STATUS_OK, id: 0, payload };
    Some(Hello::decode(&frame).map_err(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_hello_is_found_however_it_is_cut() {
        let mut bytes = b"CSA1CCSA1\x01\0\0".to_vec();
        bytes.extend_from_slice(&HELLO);
        let end = bytes.len();
        bytes.extend_from_slice(b"CSA1");
        for piece in 1..bytes.len() {
            let (mut hellos, mut found, mut before) = (Hellos::default(), Vec::new(), 0);
            for piece in bytes.chunks(piece) {
                let mut rest = piece;
                while let Some(at) = hellos.look(rest) {
                    found.push(before + piece.len() - rest.len() + at);
                    rest = &rest[at..];
                }
                before += piece.len();
            }
            assert_eq!(found, [end], "pieces of {piece}");
        }
    }

    #[test]
    fn what_only_begins_like_a_hello_is_given_back_whole() {
        let mut doubt = Doubt::new([7; NONCE_BYTES], 3);
        let Verdict::Wait(None) = doubt.hear(&[81, 0]) else { panic!("too early") };
        // A length that no hello has.
        let Verdict::Continue(bytes) = doubt.hear(&[0, 9, 1, 2]) else { panic!("a hello of 150 MB") };
        assert_eq!(bytes, [81, 0, 0, 9, 1, 2]);
    }

    #[test]
    fn a_doubt_is_bounded() {
        let hello = super::super::ops::tests::hello().encode().unwrap();
        let mut doubt = Doubt::new([7; NONCE_BYTES], 3);
        let Verdict::Wait(Some(question)) = doubt.hear(&hello[HELLO_BEGINS..]) else { panic!("no question") };
        assert_eq!(question, AgentRequest::Echo(vec![7; NONCE_BYTES]).encode(3).unwrap());
        let noise = vec![0x43; 64 << 10];
        let mut sent = hello.len() - HELLO_BEGINS;
        loop {
            sent += noise.len();
            match doubt.hear(&noise) {
                Verdict::Wait(None) => assert!(sent <= DOUBT_BYTES_MAX),
                Verdict::TooLong(bytes) => break assert_eq!(bytes.len(), sent),
                other => panic!("{other:?}"),
            }
        }
    }
}
