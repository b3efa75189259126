//! Random bytes of the host, from getrandom(2): never from a buffer that a snapshot could freeze, and no file is opened by path in a jailed worker.

use std::io;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `buffer`, at most 256 bytes at a time: so many come whole, whatever signals arrive.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    for part in buffer.chunks_mut(256) {
        let wanted = part.len();
        loop {
            match getrandom(&mut *part, GetRandomFlags::empty()) {
                Ok(got) if got == wanted => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn long_buffers_are_filled_to_their_ends() {
        let mut buffer = vec![0u8; 1000];
        super::fill(&mut buffer).unwrap();
        // Of 16 random bytes all are zero once in 2^128 times.
        assert!(buffer.chunks(16).all(|part| part.len() < 16 || part.iter().any(|byte| *byte != 0)));
    }
}
