//! What the kernel tells a worker of itself, by files that must be opened before its jail is closed, and by nobody but itself: a fork's copies would show
//! the zygote.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::fault;
use super::jail::Outside;
use super::protocol::Fault;
use crate::snapshot::memory::image::{ImageError, PageMap};

/// Longest text of smaps_rollup.
const ROLLUP_BYTES_MAX: usize = 2 << 10;

/// See the module.
pub struct Own {
    page_map: Result<PageMap, Fault>,
    rollup: Option<File>,
}

impl Own {
    pub fn open(outside: &Outside) -> Self {
        let page_map = outside.own("pagemap").map(PageMap::from_file);
        Self {
            page_map: page_map.map_err(|error| ImageError::PageMap(error).into()),
            rollup: outside.own("smaps_rollup").ok(),
        }
    }

    pub fn page_map(&self) -> Result<&PageMap, Fault> {
        self.page_map.as_ref().map_err(Fault::clone)
    }

    /// Memory of this process that nobody shares.
    pub fn private_dirty(&self) -> Option<u64> {
        let mut bytes = [0; ROLLUP_BYTES_MAX];
        let length = self.rollup.as_ref()?.read_at(&mut bytes, 0).ok()?;
        let text = String::from_utf8_lossy(&bytes[..length]);
        let line = text.lines().find(|line| line.starts_with("Private_Dirty:"))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib << 10)
    }
}

/// What the daemon is told when a descriptor that only one VM can have is asked for again.
pub fn used_up() -> Fault {
    fault::wrong_state("this worker's userfaultfd was used before")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_told_again_and_again() {
        let own = Own::open(&Outside::open());
        assert!(own.private_dirty().is_some());
        let mut block = vec![0u8; 8 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        // Other tests take and give memory back meanwhile; this much is there.
        let after = own.private_dirty().unwrap();
        assert!(after >= block.len() as u64, "{after} {}", block[4096]);
        assert!(own.page_map().is_ok());
    }
}
