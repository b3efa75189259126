//! What the test guest computes and the host computes again: the arena's pattern, the digest, the per-CPU run.
//!
//! `no_std`, compiled into both sides, so that an answer is checked against the same definition but against other
//! memory. None of this is cryptography: it has to notice a wrong page, not an enemy.

#![allow(dead_code)] // Each side uses its half.

/// Seed of the pattern that the arena is filled with by itself.
pub const ARENA_SEED: u64 = 0x636f_6c64_7370_6172;
/// Words of a page.
pub const PAGE_WORDS: usize = 512;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of splitmix64: a bijection of 64-bit words that looks random.
#[inline(always)]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A page of the pattern: gives its 512 words one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    state: u64,
}

impl Page {
    /// The page with index `page` of the pattern with this seed.
    #[inline(always)]
    pub const fn new(seed: u64, page: u64) -> Page {
        Page { state: mix(seed ^ page.wrapping_add(1).wrapping_mul(GOLDEN)) }
    }

    /// The next word.
    #[inline(always)]
    pub fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }
}

/// A 64-bit digest of a sequence of words.
#[derive(Debug, Clone, Copy)]
pub struct Digest {
    state: u64,
    words: u64,
}

impl Digest {
    pub const fn new() -> Digest {
        Digest { state: 0x6469_6765_7374_2031, words: 0 }
    }

    /// Takes in one word.
    #[inline(always)]
    pub fn word(&mut self, word: u64) {
        self.state = (self.state.rotate_left(23) ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25);
        self.words = self.words.wrapping_add(1);
    }

    /// Takes in a generation id.
    pub fn generation(&mut self, generation: &[u8; 16]) {
        let value = u128::from_le_bytes(*generation);
        self.word(value as u64);
        self.word((value >> 64) as u64);
    }

    /// The digest of all that was taken in.
    pub const fn finish(&self) -> u64 {
        mix(self.state ^ self.words.wrapping_mul(GOLDEN))
    }
}

impl Default for Digest {
    fn default() -> Self {
        Digest::new()
    }
}

/// RUN_ON_ALL's computation on the CPU with this APIC id.
pub fn run(seed: u64, apic_id: u32, rounds: u64) -> u64 {
    let mut value = mix(seed ^ u64::from(apic_id).wrapping_add(1).wrapping_mul(GOLDEN));
    for _ in 0..rounds {
        value = mix(value.wrapping_add(GOLDEN));
    }
    value
}
