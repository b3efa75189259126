//! The guest's random generator: ChaCha20 (RFC 8439's block) whose key is replaced after each use, so that it gives
//! nothing back of what it said; fed by virtio-rng at boot and by IDENTITY in each clone.

pub(crate) struct Generator {
    key: [u32; 8],
}

impl Generator {
    pub(crate) fn new(seed: u64) -> Generator {
        let mut generator = Generator { key: [0; 8] };
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        generator.feed(&bytes);
        generator
    }

    /// Mixes entropy in; the old state is not lost.
    pub(crate) fn feed(&mut self, entropy: &[u8; 32]) {
        for (word, bytes) in self.key.iter_mut().zip(entropy.as_chunks::<4>().0) {
            *word ^= u32::from_le_bytes(*bytes);
        }
        self.renew();
    }

    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        for (counter, chunk) in out.chunks_mut(64).enumerate() {
            let block = block(&self.key, counter as u32 + 1);
            let bytes = block.map(u32::to_le_bytes);
            chunk.copy_from_slice(&bytes.as_flattened()[..chunk.len()]);
        }
        self.renew();
    }

    /// Block 0 is never given out: half of it is the next key.
    fn renew(&mut self) {
        let block = block(&self.key, 0);
        self.key.copy_from_slice(&block[..8]);
    }
}

fn block(key: &[u32; 8], counter: u32) -> [u32; 16] {
    let mut start =
        [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574, 0, 0, 0, 0, 0, 0, 0, 0, counter, 0, 0, 0];
    start[4..12].copy_from_slice(key);
    let mut state = start;
    for _ in 0..10 {
        for [a, b, c, d] in [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]] {
            quarter(&mut state, a, b, c, d);
        }
        for [a, b, c, d] in [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]] {
            quarter(&mut state, a, b, c, d);
        }
    }
    for (word, start) in state.iter_mut().zip(start) {
        *word = word.wrapping_add(start);
    }
    state
}

fn quarter(state: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    for [x, y, z, turn] in [[a, b, d, 16], [c, d, b, 12], [a, b, d, 8], [c, d, b, 7]] {
        state[x] = state[x].wrapping_add(state[y]);
        state[z] = (state[z] ^ state[x]).rotate_left(turn as u32);
    }
}
