//! The one place where bincode is used: bounded encoding and decoding of plain structs.
//!
//! Little endian, variable-length integers (bincode 2 `standard`). Decoding must consume the whole input, and
//! never allocates more than [`DECODE_BYTES_MAX`] on behalf of a length found in it.

use serde::{Serialize, de::DeserializeOwned};

/// Most memory that decoding one value may claim.
pub const DECODE_BYTES_MAX: usize = 64 << 20;

/// Why bytes could not be turned into a value, or a value into bytes.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("cannot be encoded: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    #[error("cannot be decoded: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    #[error("{0} bytes are left over after the value")]
    Trailing(usize),
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODE_BYTES_MAX>()
}

/// Encodes `value`.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(bincode::serde::encode_to_vec(value, config())?)
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config())?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(CodecError::Trailing(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_survives_the_round_trip_and_leftovers_are_refused() {
        let value = (7u64, vec![1u8, 2, 3], Some("ready".to_string()));
        let mut bytes = encode(&value).unwrap();
        assert_eq!(decode::<(u64, Vec<u8>, Option<String>)>(&bytes).unwrap(), value);
        bytes.push(0);
        assert!(matches!(decode::<(u64, Vec<u8>, Option<String>)>(&bytes), Err(CodecError::Trailing(1))));
    }

    #[test]
    fn a_length_that_lies_claims_no_memory() {
        // 0xfd: a u64 follows. A vector of 2^60 bytes must be refused, not allocated.
        let mut bytes = vec![0xfd];
        bytes.extend_from_slice(&(1u64 << 60).to_le_bytes());
        assert!(decode::<Vec<u8>>(&bytes).is_err());
    }
}
