//! Cutting the agent port's byte stream into frames, and making frames.
//!
//! The stream comes from a guest, so every length is checked before a byte is kept: a decoder never holds more than one
//! header and one payload of [`wire::PAYLOAD_BYTES_MAX`].

use super::wire::{self, BadHeader, HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};

/// One whole frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u16,
    pub status: u16,
    pub id: u32,
    pub payload: Vec<u8>,
}

/// Why a stream cannot go on, or a frame cannot be made. After a decoder's error the stream has lost its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error(
        "the agent port does not carry agent frames: a header begins with {found:#010x} instead of {:#010x}; is another program writing to it?",
        wire::MAGIC
    )]
    Magic { found: u32 },
    #[error("an agent frame of {length} bytes was announced, the most allowed is {PAYLOAD_BYTES_MAX}")]
    TooLong { length: u64 },
}

/// Makes the bytes of a frame.
pub fn encode(kind: u16, status: u16, id: u32, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let too_long = || FrameError::TooLong { length: payload.len() as u64 };
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(too_long());
    }
    let length = u32::try_from(payload.len()).map_err(|_| too_long())?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&Header { kind, status, id, length }.encode());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Takes bytes as they come and gives frames as they get whole.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    header_bytes: Vec<u8>,
    /// The header of the frame whose payload is being collected.
    header: Option<Header>,
    payload: Vec<u8>,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    pub fn new() -> FrameDecoder {
        FrameDecoder::default()
    }

    /// Takes bytes from the front of `input` up to the end of one frame. `Ok(None)`: all taken, no whole frame
    /// yet. Call it again with what is left of `input` until then. An error is final.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let header = match self.header {
            Some(header) => header,
            None => {
                take(&mut self.header_bytes, HEADER_BYTES, input);
                let Ok(bytes) = <[u8; HEADER_BYTES]>::try_from(self.header_bytes.as_slice()) else {
                    return Ok(None);
                };
                self.header_bytes.clear();
                match Header::decode(&bytes) {
                    Ok(header) => *self.header.insert(header),
                    Err(bad) => {
                        let error = match bad {
                            BadHeader::Magic(found) => FrameError::Magic { found },
                            BadHeader::Length(length) => FrameError::TooLong { length: length.into() },
                        };
                        return Err(self.failed.insert(error).clone());
                    }
                }
            }
        };
        take(&mut self.payload, header.length as usize, input);
        if self.payload.len() < header.length as usize {
            return Ok(None);
        }
        self.header = None;
        let payload = std::mem::take(&mut self.payload);
        Ok(Some(Frame { kind: header.kind, status: header.status, id: header.id, payload }))
    }

    /// All frames that `input` completes.
    pub fn push(&mut self, mut input: &[u8]) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next(&mut input)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    /// True when exactly the first `count` bytes of a header are held.
    pub fn has_begun_with(&self, count: usize) -> bool {
        self.header.is_none() && self.header_bytes.len() == count
    }

    /// True when no part of a frame is held.
    pub fn is_between_frames(&self) -> bool {
        self.header.is_none() && self.header_bytes.is_empty()
    }
}

/// Moves bytes from `input` to `into` until `into` has `until`.
fn take(into: &mut Vec<u8>, until: usize, input: &mut &[u8]) {
    let count = until.saturating_sub(into.len()).min(input.len());
    let (front, rest) = input.split_at(count);
    into.extend_from_slice(front);
    *input = rest;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame() -> impl Strategy<Value = Frame> {
        (any::<u16>(), any::<u16>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(kind, status, id, payload)| Frame { kind, status, id, payload })
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(frames in prop::collection::vec(frame(), 0..8), cuts in prop::collection::vec(1usize..70, 1..40)) {
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend(encode(frame.kind, frame.status, frame.id, &frame.payload).unwrap());
            }
            let mut decoder = FrameDecoder::new();
            let mut got = Vec::new();
            let mut rest = stream.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                got.extend(decoder.push(piece).unwrap());
                rest = after;
            }
            prop_assert_eq!(got, frames);
            prop_assert!(decoder.is_between_frames());
        }

        #[test]
        fn noise_never_panics_and_an_error_stays(noise in prop::collection::vec(any::<u8>(), 0..200), magic: bool) {
            let mut decoder = FrameDecoder::new();
            let mut stream = if magic { wire::MAGIC.to_le_bytes().to_vec() } else { Vec::new() };
            stream.extend(noise);
            if let Err(error) = decoder.push(&stream) {
                prop_assert_eq!(decoder.push(&[]), Err(error));
            }
        }
    }

    #[test]
    fn a_long_frame_is_refused_before_its_payload() {
        let length = PAYLOAD_BYTES_MAX as u32 + 1;
        let header = Header { kind: 2, status: 0, id: 1, length }.encode();
        let error = FrameDecoder::new().push(&header).unwrap_err();
        assert_eq!(error, FrameError::TooLong { length: length.into() });
        let error = encode(2, 0, 1, &vec![0; PAYLOAD_BYTES_MAX + 1]).unwrap_err();
        assert_eq!(error, FrameError::TooLong { length: length.into() });
        assert!(encode(2, 0, 1, &vec![0; PAYLOAD_BYTES_MAX]).is_ok());
    }

    #[test]
    fn another_stream_is_refused() {
        let error = FrameDecoder::new().push(b"login: root, and more").unwrap_err();
        assert!(matches!(error, FrameError::Magic { found: 0x6967_6f6c }));
    }

    #[test]
    fn half_a_header_is_waited_for() {
        let bytes = encode(2, 0, 7, b"abc").unwrap();
        let mut decoder = FrameDecoder::new();
        assert_eq!(decoder.push(&bytes[..9]).unwrap(), []);
        assert!(!decoder.is_between_frames());
        assert_eq!(decoder.push(&bytes[9..]).unwrap()[0].payload, b"abc");
    }
}
