//! The arena: all RAM above the image and the loader's data, as one run of pages that requests work on.
//!
//! It is mapped at [`BASE`] in 2 MiB pages, one after the other whatever holes lie between them, up to [`BYTES_MAX`].
//! It is zero at boot; its front is filled with the pattern up to a mark that moves up on demand.

use crate::gate;
use crate::given::Given;
use crate::pattern::{ARENA_SEED, PAGE_WORDS, Page};

/// Slot 1 of the root page table.
const BASE: u64 = 1 << 39;
const LARGE: u64 = 2 << 20;
const DIRECTORIES: usize = 16;
const BYTES_MAX: u64 = (DIRECTORIES as u64) << 30;
const PAGE_BYTES: u64 = 4096;
/// Present, write, user, accessed (and dirty, 2 MiB).
const TABLE_ENTRY: u64 = 0x67;
const PAGE_ENTRY: u64 = 0xe7;

#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut DIRECTORY_POINTERS: Table = Table([0; 512]);
static mut DIRECTORY: [Table; DIRECTORIES] = [const { Table([0; 512]) }; DIRECTORIES];

unsafe extern "C" {
    static mut pml4: [u64; 512];
}

pub(crate) struct Arena {
    pages: u64,
    /// Pages at the front that hold the pattern.
    filled: u64,
}

/// Maps the arena. Called once.
pub(crate) fn map(given: &Given) -> Arena {
    let mut mapped = 0;
    // SAFETY: called once, by the only CPU that uses the arena; the tables get linked when they are whole.
    let (pointers, directories, root) =
        unsafe { (&mut *(&raw mut DIRECTORY_POINTERS), &mut *(&raw mut DIRECTORY), &raw mut pml4) };
    let first = given.free_from.next_multiple_of(LARGE);
    for range in given.ram() {
        let mut at = range.start.max(first).next_multiple_of(LARGE);
        while at + LARGE <= range.end() && mapped < BYTES_MAX {
            let index = (mapped / LARGE) as usize;
            directories[index / 512].0[index % 512] = at | PAGE_ENTRY;
            at += LARGE;
            mapped += LARGE;
        }
    }
    for (pointer, directory) in pointers.0.iter_mut().zip(directories.iter()) {
        *pointer = directory as *const Table as u64 | TABLE_ENTRY;
    }
    // SAFETY: the root's slot 1 was empty.
    unsafe { (&raw mut (*root)[1]).write_volatile(pointers as *const Table as u64 | TABLE_ENTRY) };
    gate::flush_translations();
    Arena { pages: mapped / PAGE_BYTES, filled: 0 }
}

impl Arena {
    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn filled_bytes(&self) -> u64 {
        self.filled * PAGE_BYTES
    }

    /// The words of a page.
    pub(crate) fn page(&mut self, page: u64) -> &mut [u64; PAGE_WORDS] {
        assert!(page < self.pages, "page {page} of the arena's {}", self.pages);
        // SAFETY: mapped, and only reached through the one Arena.
        unsafe { &mut *((BASE + page * PAGE_BYTES) as *mut [u64; PAGE_WORDS]) }
    }

    /// The first word of a page, with nothing else of it touched.
    pub(crate) fn first_word(&mut self, page: u64) -> *mut u64 {
        self.page(page).as_mut_ptr()
    }

    /// Writes the pattern over a page.
    pub(crate) fn fill_page(&mut self, page: u64, seed: u64) {
        let mut source = Page::new(seed, page);
        for word in self.page(page) {
            *word = source.word();
        }
        if page == self.filled && seed == ARENA_SEED {
            self.filled += 1;
        }
    }

    /// Moves the mark up to `bytes` (or the arena's end), filling what lies below it.
    pub(crate) fn fill_to(&mut self, bytes: u64) {
        let until = bytes.div_ceil(PAGE_BYTES).min(self.pages);
        while self.filled < until {
            self.fill_page(self.filled, ARENA_SEED);
        }
    }
}
