//! A guest's agent that was started again, and its hello that came in the middle of a frame ([`crate::agent::resync`]).

use std::sync::Arc;

use super::{Hush, Presence, Talk, is_held};
use crate::agent::resync::{DOUBTS_MAX, Doubt, HELLO_BEGINS, Verdict};
use crate::agent::{FrameDecoder, Hello};

const AGAIN: &str = "the guest's agent started again";

impl Talk {
    /// Words of the guest, which may be those of another agent than before.
    pub(super) fn listen(&mut self, bytes: &[u8]) -> Result<(), String> {
        let mut again = self.listen_once(bytes)?;
        // At most as many times as there may be doubts, with what one of them kept.
        while let Some(bytes) = again {
            again = self.listen_once(&bytes)?;
        }
        Ok(())
    }

    /// Gives what a doubt kept that is over, to be listened to.
    fn listen_once(&mut self, bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let mut rest = bytes;
        while self.doubt.is_none() && self.doubts < DOUBTS_MAX {
            let Some(end) = self.hellos.look(rest) else { break };
            let (front, behind) = rest.split_at(end.min(rest.len()));
            self.understand(front)?;
            rest = behind;
            if !self.decoder.has_begun_with(HELLO_BEGINS) {
                self.doubts += 1;
                let nonce = super::super::id::random().map_err(|error| error.to_string())?;
                self.doubt = Some(Doubt::new(nonce, self.new_id()));
            }
        }
        match &self.doubt {
            Some(_) => self.weigh(rest),
            None => self.understand(rest).map(|()| None),
        }
    }

    fn weigh(&mut self, bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
        let Some(mut doubt) = self.doubt.take() else { return self.understand(bytes).map(|()| None) };
        match doubt.hear(bytes) {
            Verdict::Wait(question) => {
                self.unsent.extend(question);
                self.doubt = Some(doubt);
                Ok(None)
            }
            Verdict::Continue(bytes) => Ok(Some(bytes)),
            Verdict::TooLong(bytes) => self.understand(&bytes).map(|()| None),
            Verdict::Answered { mut follows, hello, place } => {
                let mut left = follows.as_slice();
                let mut frames = Vec::new();
                while let Ok(Some(frame)) = self.decoder.next(&mut left) {
                    let is_reply = doubt.is_reply(&frame);
                    frames.push(frame);
                    if is_reply {
                        frames.into_iter().try_for_each(|frame| self.answer(frame))?;
                        let behind = follows.len() - left.len();
                        follows.drain(..behind);
                        return Ok(Some(follows));
                    }
                }
                tracing::info!(
                    "a guest's agent was ended in the middle of a frame, and another one has started"
                );
                self.decoder = FrameDecoder::new();
                self.greeted(*hello);
                follows.drain(..place.min(follows.len()));
                Ok(Some(follows))
            }
        }
    }

    /// An agent has said hello: the first one, or another than the one that was asked.
    pub(super) fn greeted(&mut self, hello: Hello) {
        if matches!(&*self.presence.borrow(), Presence::Here(_)) {
            self.streams.lose(AGAIN);
            self.fail_waiting(AGAIN);
            // What was for the one before is not for this one, but a frame that was begun.
            self.unsent.truncate(usize::from(self.written > 0));
            self.streamed = false;
            self.hush = Hush::No;
            let number = *self.hold.borrow();
            if is_held(number) {
                // Nothing is open that could speak.
                self.still.send_replace(number);
            }
        }
        self.presence.send_replace(Presence::Here(Arc::new(hello)));
    }
}
