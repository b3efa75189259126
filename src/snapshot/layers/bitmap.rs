//! The blocks of a disk's overlay, without a lock: several threads write at once. Checked by `tests/models.rs`.

use crate::atomics::{AtomicU64, Ordering};

/// Which blocks are there.
#[derive(Debug)]
pub struct Bitmap {
    words: Vec<AtomicU64>,
    present: AtomicU64,
}

impl Bitmap {
    /// `words` are zero.
    pub fn new(words: Vec<AtomicU64>) -> Self {
        Self { words, present: AtomicU64::new(0) }
    }

    pub fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    /// Number of blocks present.
    pub fn present(&self) -> u64 {
        self.present.load(Ordering::Acquire)
    }

    pub fn contains(&self, block: u64) -> bool {
        // Acquire, with the release below: who sees the bit sees the block's data.
        let word = self.words.get((block / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block % 64) & 1 == 1)
    }

    /// Adds the blocks `first..end`, whose data is there.
    pub fn insert(&self, first: u64, end: u64) {
        let mut block = first;
        while block < end {
            let Some(word) = self.words.get((block / 64) as usize) else { return };
            let low = block % 64;
            let count = (end - block).min(64 - low);
            let mask = (u64::MAX >> (64 - count)) << low;
            let before = word.fetch_or(mask, Ordering::AcqRel);
            self.present.fetch_add(u64::from((mask & !before).count_ones()), Ordering::AcqRel);
            block += count;
        }
    }
}
