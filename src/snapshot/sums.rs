//! BLAKE3 sums of stored files.
//!
//! Two kinds ([`SumKind`]). *Whole* is BLAKE3 of the bytes, what `b3sum` prints. *Chunks* is for sparse files, whose
//! holes should not have to be read: the file is cut into [`CHUNK_BYTES`] chunks (the last may be shorter), each
//! chunk gets its BLAKE3, and the sum is BLAKE3 in `derive_key` mode (context [`CHUNKS_CONTEXT`]) over the file's
//! length (u64, little endian) and the chunks' sums in order. A chunk of zeros has a known sum, so a chunk that
//! lies in a hole costs nothing. Where the holes are does not enter into the sum: a copy that filled them, or
//! a file system that cuts extents differently, gives the same one.

use std::{fmt, fs::File, io, os::unix::fs::FileExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::memory::extents::Extents;

/// Bytes of a chunk. Enough for BLAKE3 to use its widest instructions (16 lanes of 1 KiB), small enough that a page in
/// the middle of a hole costs little.
pub const CHUNK_BYTES: u64 = 16 << 10;
/// Bytes read at once.
const READ_BYTES: usize = 1 << 20;
/// The context string of the outer hash of [`SumKind::Chunks`].
pub const CHUNKS_CONTEXT: &str = "coldspark 2026-11 sparse file, 16 KiB chunks";

/// How a sum is formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SumKind {
    /// BLAKE3 of all bytes.
    Whole,
    /// BLAKE3 over the sums of 16 KiB chunks.
    #[serde(rename = "chunks-16k")]
    Chunks,
}

/// A BLAKE3 sum; 64 lower-case hex digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sum(pub [u8; 32]);

impl Sum {
    /// The sum of `bytes`, kind [`SumKind::Whole`].
    pub fn of_bytes(bytes: &[u8]) -> Sum {
        Sum(*blake3::hash(bytes).as_bytes())
    }

    /// The sum of the first `bytes` bytes of `file`, read by position: the file's offset does not matter.
    ///
    /// # Errors
    /// What reading gives; `UnexpectedEof` if the file is shorter.
    pub fn of_file(file: &File, kind: SumKind, bytes: u64) -> io::Result<Sum> {
        match kind {
            SumKind::Whole => of_whole(file, bytes),
            SumKind::Chunks => of_chunks(file, bytes),
        }
    }
}

fn of_whole(file: &File, bytes: u64) -> io::Result<Sum> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut at = 0;
    while at < bytes {
        let piece = piece(&mut buffer, bytes - at);
        file.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += piece.len() as u64;
    }
    Ok(Sum(*hasher.finalize().as_bytes()))
}

fn of_chunks(file: &File, bytes: u64) -> io::Result<Sum> {
    if file.metadata()?.len() < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let extents = Extents::of_file(file)?;
    let mut outer = blake3::Hasher::new_derive_key(CHUNKS_CONTEXT);
    outer.update(&bytes.to_le_bytes());
    let zero_chunk = blake3::hash(&[0; CHUNK_BYTES as usize]);
    let mut buffer = vec![0; READ_BYTES];
    let is_hole = |at: u64| at + CHUNK_BYTES <= bytes && !extents.any_data(at..at + CHUNK_BYTES);
    let mut at = 0;
    while at < bytes {
        if is_hole(at) {
            outer.update(zero_chunk.as_bytes());
            at += CHUNK_BYTES;
            continue;
        }
        // All chunks up to the next that is a hole, as many as the buffer holds.
        let most = (at + READ_BYTES as u64).min(bytes);
        let mut end = (at + CHUNK_BYTES).min(most);
        while end < most && !is_hole(end) {
            end = (end + CHUNK_BYTES).min(most);
        }
        let run = piece(&mut buffer, end - at);
        file.read_exact_at(run, at)?;
        for chunk in run.chunks(CHUNK_BYTES as usize) {
            outer.update(blake3::hash(chunk).as_bytes());
        }
        at = end;
    }
    Ok(Sum(*outer.finalize().as_bytes()))
}

fn piece(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    &mut buffer[..bytes]
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Sum, D::Error> {
        let text = String::deserialize(deserializer)?;
        let hash =
            blake3::Hash::from_hex(&text).map_err(|_| D::Error::custom("a sum must be 64 hex digits"))?;
        Ok(Sum(*hash.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        for (at, piece) in data {
            file.write_all_at(piece, *at).unwrap();
        }
        file
    }

    #[test]
    fn whole_is_plain_blake3() {
        let content = vec![7u8; 200_001];
        let file = file(0, &[(0, &content)]);
        let sum = Sum::of_file(&file, SumKind::Whole, 200_001).unwrap();
        assert_eq!(sum, Sum::of_bytes(&content));
    }

    #[test]
    fn chunks_see_content_and_length_but_not_holes() {
        let bytes = 10 * CHUNK_BYTES + 4096;
        let holes = file(bytes, &[(3 * CHUNK_BYTES + 8192, b"hello")]);
        let mut content = vec![0; bytes as usize];
        content[(3 * CHUNK_BYTES + 8192) as usize..][..5].copy_from_slice(b"hello");
        let filled = file(0, &[(0, &content)]);
        let of = |file: &File, bytes| Sum::of_file(file, SumKind::Chunks, bytes).unwrap();
        assert_eq!(of(&holes, bytes), of(&filled, bytes));

        let longer = file(bytes + CHUNK_BYTES, &[(3 * CHUNK_BYTES + 8192, b"hello")]);
        assert_ne!(of(&longer, bytes + CHUNK_BYTES), of(&holes, bytes));
        let moved = file(bytes, &[(3 * CHUNK_BYTES + 8193, b"hello")]);
        assert_ne!(of(&moved, bytes), of(&holes, bytes));
        let tail = file(bytes, &[(3 * CHUNK_BYTES + 8192, b"hello"), (bytes - 1, b"!")]);
        assert_ne!(of(&tail, bytes), of(&holes, bytes));
    }

    #[test]
    fn chunks_follow_their_definition() {
        let bytes = 300 * CHUNK_BYTES + 100;
        let data: Vec<u64> = (0..300).filter(|at| at % 7 < 3 || (80..170).contains(at)).collect();
        let pieces: Vec<(u64, &[u8])> = data.iter().map(|at| (at * CHUNK_BYTES + at, &b"data"[..])).collect();
        let file = file(bytes, &pieces);
        file.write_all_at(b"x", bytes - 1).unwrap();
        let mut content = vec![0; bytes as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        let mut outer = blake3::Hasher::new_derive_key(CHUNKS_CONTEXT);
        outer.update(&bytes.to_le_bytes());
        for chunk in content.chunks(16384) {
            outer.update(blake3::hash(chunk).as_bytes());
        }
        let sum = Sum::of_file(&file, SumKind::Chunks, bytes).unwrap();
        assert_eq!(sum, Sum(*outer.finalize().as_bytes()));
    }

    #[test]
    fn a_short_file_has_no_sum() {
        for kind in [SumKind::Whole, SumKind::Chunks] {
            let error = Sum::of_file(&file(5000, &[]), kind, 5001).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn text_form_survives_and_other_text_is_refused() {
        let sum = Sum::of_bytes(b"x");
        let json = serde_json::to_string(&sum).unwrap();
        assert_eq!(serde_json::from_str::<Sum>(&json).unwrap(), sum);
        for bad in ["\"\"", "\"abc\"", "7", "\"zz\""] {
            assert!(serde_json::from_str::<Sum>(bad).is_err());
        }
    }
}
