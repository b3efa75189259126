//! What came from the console's peer, cut into messages: only whole ones are given to the guest.

/// How many bytes the message at the front of these has; `None`: they are too few to tell. Never zero.
pub type MessageLength = fn(&[u8]) -> Option<usize>;

/// Room that is kept when nothing is in it.
const KEPT_BYTES: usize = 64 << 10;

/// Bytes are messages of whatever length they come in.
pub fn any_bytes(bytes: &[u8]) -> Option<usize> {
    Some(bytes.len())
}

/// Grows to the length of one message, and a piece.
#[derive(Debug)]
pub struct Intake {
    length: MessageLength,
    bytes: Vec<u8>,
    /// So many were given to the guest, and so many, from the front, may be.
    given: usize,
    whole: usize,
}

impl Intake {
    pub fn new(length: MessageLength) -> Self {
        Self { length, bytes: Vec::new(), given: 0, whole: 0 }
    }

    /// What the guest may be given now.
    pub fn ready(&self) -> &[u8] {
        self.bytes.get(self.given..self.whole).unwrap_or_default()
    }

    /// So many of [`ready`](Self::ready) were given to it.
    pub fn gave(&mut self, count: usize) {
        self.given = self.given.saturating_add(count).min(self.whole);
        if self.given == self.bytes.len() {
            (self.given, self.whole) = (0, 0);
            self.bytes.clear();
            self.bytes.shrink_to(KEPT_BYTES);
        }
    }

    /// More came.
    pub fn came(&mut self, bytes: &[u8]) {
        if self.given > 0 {
            self.bytes.drain(..self.given);
            self.whole -= self.given;
            self.given = 0;
        }
        self.bytes.extend_from_slice(bytes);
        while let Some(rest) = self.bytes.get(self.whole..).filter(|rest| !rest.is_empty())
            && let Some(length) = (self.length)(rest)
            && length <= rest.len()
        {
            self.whole += length.max(1);
        }
    }

    /// The message that has begun to come will not come to its end.
    pub fn forget_begun(&mut self) {
        self.bytes.truncate(self.whole);
        self.gave(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte that says how many follow.
    pub fn counted(bytes: &[u8]) -> Option<usize> {
        bytes.first().map(|count| 1 + usize::from(*count))
    }

    #[test]
    fn only_whole_messages_are_given_however_they_are_cut() {
        let stream: Vec<u8> = (0..60u8).flat_map(|count| vec![count; 1 + usize::from(count)]).collect();
        for piece in [1, 2, 7, 64, 1000, stream.len()] {
            let mut intake = Intake::new(counted);
            let mut given = Vec::new();
            for piece in stream.chunks(piece) {
                intake.came(piece);
                let ready = intake.ready().len();
                let mut rest = [&given[..], intake.ready()].concat();
                while !rest.is_empty() {
                    let length = counted(&rest).unwrap();
                    assert!(length <= rest.len(), "a part of a message, pieces of {}", piece.len());
                    rest.drain(..length);
                }
                // The guest takes a part of it, and later the rest.
                for count in [ready / 3, ready - ready / 3] {
                    given.extend_from_slice(&intake.ready()[..count]);
                    intake.gave(count);
                }
            }
            assert_eq!(given, stream);
        }
    }

    #[test]
    fn what_has_begun_is_forgotten_and_what_is_whole_is_not() {
        let mut intake = Intake::new(counted);
        intake.came(&[2, 7, 7, 3, 8, 8]);
        intake.gave(1);
        intake.forget_begun();
        assert_eq!(intake.ready(), [7, 7]);
        intake.came(&[1, 9]);
        assert_eq!(intake.ready(), [7, 7, 1, 9]);
        intake.gave(4);
        intake.came(&[200, 1]);
        assert!(intake.ready().is_empty());
        intake.forget_begun();
        intake.came(&[0]);
        assert_eq!(intake.ready(), [0]);
    }
}
