//! What the test guest must have answered: the host computes it again from what it knows, without the guest's memory.
//!
//! The functions cost about what they cost the guest: one pass over the bytes asked for.

use super::pattern::{ARENA_SEED, Digest, PAGE_WORDS, Page, run};

/// RUN_ON_ALL's result of one CPU.
pub fn run_on_cpu(seed: u64, apic_id: u32, rounds: u64) -> u64 {
    run(seed, apic_id, rounds)
}

/// COMPUTE's digest for a clone of this generation whose arena pattern is whole. `bytes` is a multiple of 8.
pub fn compute(generation: &[u8; 16], nonce: u64, bytes: u64) -> u64 {
    let mut digest = Digest::new();
    digest.generation(generation);
    digest.word(nonce);
    pattern(&mut digest, ARENA_SEED, 0, bytes / 8);
    digest.finish()
}

/// HASH's digest of pages that hold the pattern of `seed` ([`ARENA_SEED`] for HELLO's first `filled_bytes`).
pub fn hash_of_pattern(seed: u64, first_page: u64, pages: u64) -> u64 {
    let mut digest = Digest::new();
    pattern(&mut digest, seed, first_page, pages.saturating_mul(PAGE_WORDS as u64));
    digest.finish()
}

/// HASH's digest of pages that nobody has written.
pub fn hash_of_zeros(pages: u64) -> u64 {
    let mut digest = Digest::new();
    for _ in 0..pages.saturating_mul(PAGE_WORDS as u64) {
        digest.word(0);
    }
    digest.finish()
}

/// The first word of a page of the pattern of `seed` (what TOUCH writes).
pub fn first_word(seed: u64, page: u64) -> u64 {
    Page::new(seed, page).word()
}

fn pattern(digest: &mut Digest, seed: u64, first_page: u64, words: u64) {
    let mut page = first_page;
    let mut left = words;
    while left > 0 {
        let mut source = Page::new(seed, page);
        for _ in 0..left.min(PAGE_WORDS as u64) {
            digest.word(source.word());
        }
        left = left.saturating_sub(PAGE_WORDS as u64);
        page = page.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_counts() {
        let base = compute(&[1; 16], 5, 8192);
        let mut other = [1; 16];
        other[15] = 2;
        assert_ne!(base, compute(&other, 5, 8192));
        assert_ne!(base, compute(&[1; 16], 6, 8192));
        assert_ne!(base, compute(&[1; 16], 5, 8184));
        assert_ne!(hash_of_pattern(1, 0, 2), hash_of_pattern(1, 1, 2));
        assert_ne!(hash_of_pattern(1, 0, 2), hash_of_pattern(2, 0, 2));
        assert_ne!(hash_of_zeros(1), hash_of_zeros(2));
        assert_ne!(run_on_cpu(9, 0, 10), run_on_cpu(9, 1, 10));
        assert_ne!(run_on_cpu(9, 0, 10), run_on_cpu(9, 0, 11));
    }

    /// The definition is part of the protocol with guests frozen in snapshots: it must not drift.
    #[test]
    fn the_definition_stands() {
        assert_eq!(super::super::pattern::mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf); // splitmix64, seed 0
        let pinned = (compute(&[7; 16], 1, 4096), run_on_cpu(1, 2, 3), first_word(3, 4));
        assert_eq!(pinned, PINNED, "{pinned:#018x?}");
    }

    const PINNED: (u64, u64, u64) = (0xb61e3a3f0b3769e, 0x59abe18591c02248, 0x4000795f8e33b2a8);
}
