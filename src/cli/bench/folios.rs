//! Bringing a file's pages into the page cache as they are wanted there, or out of it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use rustix::fs::Advice;

const PAGE_BYTES: usize = 4096;

/// Drops what nobody has mapped. The file must have been synced.
pub fn drop_from_cache(path: &Path) -> anyhow::Result<()> {
    let file = open(path)?;
    advise(&file, Advice::DontNeed);
    Ok(())
}

/// Drops the file's pages and reads each by itself, so that the kernel makes no large folios of them.
pub fn read_in_single_pages(path: &Path) -> anyhow::Result<()> {
    let file = open(path)?;
    advise(&file, Advice::DontNeed);
    // No reading ahead.
    advise(&file, Advice::Random);
    let mut page = [0; PAGE_BYTES];
    let bytes = file.metadata()?.len();
    for at in (0..bytes).step_by(PAGE_BYTES) {
        file.read_exact_at(&mut page, at).with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// What cannot be advised is read as it is.
fn advise(file: &File, advice: Advice) {
    let _ = rustix::fs::fadvise(file, 0, None, advice);
}
