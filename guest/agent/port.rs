//! The agent port's bytes: what came, cut into frames, and what is to be sent. Fixed room for both; no system calls, so it is tested
//! on the host, too.

use super::wire::{HEADER_BYTES, Header, MAGIC};

/// Longest request, with its header. The terminal's queue holds 64 KiB and drops what comes beyond it
/// (sys/dev/virtio/console, vtcon_port_in): requests that wait, all that was granted on stdin, and small words must fit.
pub(crate) const REQUEST_BYTES_MAX: usize = 24 << 10;
/// Most that is sent in one frame.
pub(crate) const REPLY_BYTES_MAX: usize = HEADER_BYTES + (64 << 10);
/// Beyond this much unsent, streams say nothing, so that the longest reply always fits.
pub(crate) const UNSENT_BYTES_MAX: usize = 64 << 10;
const OUT_BYTES: usize = UNSENT_BYTES_MAX + 2 * REPLY_BYTES_MAX;

/// What came and was not looked at.
pub(crate) struct Input {
    length: usize,
    /// Of a frame that was too long: so much is still to come, and to be dropped.
    skip: usize,
    bytes: [u8; REQUEST_BYTES_MAX],
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Not all of a frame is here.
    Nothing,
    /// A frame of this many bytes lies at the front.
    Frame(Header),
    /// One that is too long; its payload is dropped as it comes.
    TooLong(Header),
}

impl Input {
    pub(crate) const fn new() -> Input {
        Input { length: 0, skip: 0, bytes: [0; REQUEST_BYTES_MAX] }
    }

    /// Where what comes is put. Never empty after [`Input::next`] has said that nothing is there.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.length..]
    }

    /// So many bytes were put there.
    pub(crate) fn came(&mut self, count: usize) {
        self.length = (self.length + count).min(self.bytes.len());
    }

    pub(crate) fn next(&mut self) -> Next {
        loop {
            let skipped = self.skip.min(self.length);
            self.skip -= skipped;
            self.drop_front(skipped);
            let Some(first) = self.bytes[..self.length].first_chunk::<HEADER_BYTES>() else {
                return Next::Nothing;
            };
            let Ok(header) = Header::decode(first) else {
                // Bytes that begin no frame: up to what could begin one.
                let start = (1..self.length)
                    .find(|at| MAGIC.to_le_bytes().starts_with(&self.bytes[*at..self.length.min(at + 4)]));
                self.drop_front(start.unwrap_or(self.length));
                continue;
            };
            let length = HEADER_BYTES + header.length as usize;
            if length > self.bytes.len() {
                self.skip = length;
                return Next::TooLong(header);
            }
            return if self.length < length { Next::Nothing } else { Next::Frame(header) };
        }
    }

    /// The payload of the frame at the front.
    pub(crate) fn payload(&self, header: &Header) -> &[u8] {
        &self.bytes[HEADER_BYTES..HEADER_BYTES + header.length as usize]
    }

    /// Done with the frame at the front.
    pub(crate) fn done(&mut self, header: &Header) {
        self.drop_front(HEADER_BYTES + header.length as usize);
    }

    fn drop_front(&mut self, count: usize) {
        self.bytes.copy_within(count..self.length, 0);
        self.length -= count;
    }
}

/// What is to be sent.
pub(crate) struct Output {
    start: usize,
    end: usize,
    /// Where the frame that is being made begins.
    frame: usize,
    bytes: [u8; OUT_BYTES],
}

impl Output {
    pub(crate) const fn new() -> Output {
        Output { start: 0, end: 0, frame: 0, bytes: [0; OUT_BYTES] }
    }

    pub(crate) fn unsent(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn sent(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Whether streams may speak.
    pub(crate) fn has_room(&self) -> bool {
        self.end - self.start <= UNSENT_BYTES_MAX
    }

    /// Begins a frame whose header is written by [`Output::finish`].
    pub(crate) fn begin(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.frame = self.end;
        self.end = (self.end + HEADER_BYTES).min(OUT_BYTES);
    }

    /// Drops what was put since [`Output::begin`].
    pub(crate) fn begin_again(&mut self) {
        self.end = self.frame + HEADER_BYTES;
    }

    /// Drops the whole frame.
    pub(crate) fn abandon(&mut self) {
        self.end = self.frame;
    }

    /// The next `count` bytes of the payload, or as many as there is room for.
    pub(crate) fn room(&mut self, count: usize) -> &mut [u8] {
        let start = self.end;
        self.end = (start + count).min(OUT_BYTES);
        &mut self.bytes[start..self.end]
    }

    /// Gives back the last `count` bytes of the payload.
    pub(crate) fn shorten(&mut self, count: usize) {
        self.end = self.end.saturating_sub(count).max(self.frame + HEADER_BYTES);
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        let room = self.room(bytes.len());
        let count = room.len();
        room.copy_from_slice(&bytes[..count]);
    }

    pub(crate) fn put32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    pub(crate) fn put64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    pub(crate) fn finish(&mut self, kind: u16, status: u16, id: u32) {
        let length = (self.end - self.frame - HEADER_BYTES) as u32;
        let header = Header { kind, status, id, length }.encode();
        self.bytes[self.frame..self.frame + HEADER_BYTES].copy_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(id: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header { kind: 2, status: 0, id, length: payload.len() as u32 };
        [&header.encode()[..], payload].concat()
    }

    /// What is found when the bytes come in pieces.
    fn found(bytes: &[u8], piece: usize) -> Vec<(u32, usize, bool)> {
        let mut input = Box::new(Input::new());
        let mut found = Vec::new();
        for mut piece in bytes.chunks(piece) {
            while !piece.is_empty() {
                let count = input.room().len().min(piece.len());
                assert!(count > 0, "no room though nothing is there");
                input.room()[..count].copy_from_slice(&piece[..count]);
                input.came(count);
                piece = &piece[count..];
                loop {
                    match input.next() {
                        Next::Nothing => break,
                        Next::Frame(header) => {
                            found.push((header.id, input.payload(&header).len(), true));
                            input.done(&header);
                        }
                        Next::TooLong(header) => found.push((header.id, header.length as usize, false)),
                    }
                }
            }
        }
        found
    }

    #[test]
    fn frames_are_found_however_they_are_cut_and_long_ones_dropped() {
        let long = REQUEST_BYTES_MAX - HEADER_BYTES;
        let stream = [
            frame(1, b"abc"),
            b"login: CSA".to_vec(),
            frame(2, b""),
            frame(3, &vec![7; long]),
            frame(4, &vec![7; long + 1]),
            frame(5, &vec![7; 1 << 20]),
            frame(6, b"x"),
        ]
        .concat();
        let due = [
            (1, 3, true),
            (2, 0, true),
            (3, long, true),
            (4, long + 1, false),
            (5, 1 << 20, false),
            (6, 1, true),
        ];
        for piece in [1, 5, 16, 1000, 100_000, stream.len()] {
            assert_eq!(found(&stream, piece), due, "pieces of {piece}");
        }
    }

    #[test]
    fn what_is_sent_in_part_goes_on_where_it_was() {
        let mut output = Box::new(Output::new());
        let mut sent = Vec::new();
        let mut due = Vec::new();
        for id in 0..500 {
            output.begin();
            output.put32(id);
            output.room(id as usize).fill(id as u8);
            output.finish(2, 0, id);
            due.extend(frame(id, &[&id.to_le_bytes()[..], &vec![id as u8; id as usize]].concat()));
            let count = output.unsent().len().min(300);
            sent.extend_from_slice(&output.unsent()[..count]);
            output.sent(count);
        }
        sent.extend_from_slice(output.unsent());
        assert_eq!(sent, due);
    }

    #[test]
    fn a_frame_can_be_made_anew_shortened_and_given_up() {
        let mut output = Box::new(Output::new());
        output.begin();
        output.put(b"wrong");
        output.begin_again();
        output.put(b"right!!");
        output.shorten(2);
        output.finish(2, 0, 9);
        output.begin();
        output.put(b"never");
        output.abandon();
        assert_eq!(output.unsent(), frame(9, b"right"));
        assert!(output.has_room());
        output.begin();
        output.room(UNSENT_BYTES_MAX).fill(0);
        output.finish(2, 0, 10);
        assert!(!output.has_room());
        output.begin();
        assert_eq!(
            output.room(REPLY_BYTES_MAX - HEADER_BYTES).len(),
            REPLY_BYTES_MAX - HEADER_BYTES,
            "always fits"
        );
    }
}
