//! Taking a file over without reading it where the file system can help: a hard link, a shared or in-kernel copy, and at last
//! by hand. Holes stay holes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{fs::FileExt, fs::OpenOptionsExt},
    },
    path::Path,
};

use rustix::fs::{AtFlags, CWD, copy_file_range};
use rustix::io::Errno;

use super::memory::extents::Extents;

/// Most bytes asked of the kernel at once, so that a copy can be interrupted.
const COPY_BYTES_MAX: u64 = 64 << 20;
const BUFFER_BYTES: usize = 1 << 20;

/// Puts `source` at `path`, which must not exist: a hard link if the file system allows it, otherwise a copy.
pub fn link_or_copy(source: &File, path: &Path) -> io::Result<()> {
    match link(source, path) {
        Ok(()) => Ok(()),
        // Another file system, too many links, or a file that has no name any more.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(
                    libc::EXDEV | libc::EMLINK | libc::EPERM | libc::ENOENT | libc::EOPNOTSUPP | libc::EACCES
                )
            ) =>
        {
            copy_to_new(source, path)
        }
        Err(error) => Err(error),
    }
}

fn link(source: &File, path: &Path) -> io::Result<()> {
    // linkat(2): the way to link an open file that needs no privilege.
    let from = format!("/proc/self/fd/{}", source.as_raw_fd());
    Ok(rustix::fs::linkat(CWD, from, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// Copies `source` to `path`, which must not exist; holes stay holes.
pub fn copy_to_new(source: &File, path: &Path) -> io::Result<()> {
    let to = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    let extents = Extents::of_file(source)?;
    to.set_len(extents.file_bytes())?;
    let mut copier = Copier::new(source, &to);
    extents.data().iter().try_for_each(|run| copier.copy(run.start, run.end.min(extents.file_bytes())))
}

/// Copies ranges of one file to the same offsets of another, inside the kernel as long as it can.
pub struct Copier<'a> {
    from: &'a File,
    to: &'a File,
    by_hand: bool,
}

impl<'a> Copier<'a> {
    /// `to` must be open for writing.
    pub fn new(from: &'a File, to: &'a File) -> Copier<'a> {
        Copier { from, to, by_hand: false }
    }

    /// Copies the bytes from `at` to before `end`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the source ends before `end`.
    pub fn copy(&mut self, mut at: u64, end: u64) -> io::Result<()> {
        while at < end && !self.by_hand {
            at += self.copy_in_kernel(at, (end - at).min(COPY_BYTES_MAX))?;
        }
        let mut buffer = vec![0; if at < end { BUFFER_BYTES } else { 0 }];
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = &mut buffer[..bytes];
            self.from.read_exact_at(piece, at)?;
            self.to.write_all_at(piece, at)?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// copy_file_range(2), which shares blocks on file systems that can. 0: nothing copied, go on by hand.
    fn copy_in_kernel(&mut self, at: u64, bytes: u64) -> io::Result<u64> {
        let (mut from, mut to) = (at, at);
        match copy_file_range(self.from, Some(&mut from), self.to, Some(&mut to), bytes as usize) {
            Ok(copied) => {
                // Nothing: the source has ended, or this file system says so for no reason. Reading tells which.
                self.by_hand = copied == 0;
                Ok(copied as u64)
            }
            Err(Errno::INTR) => Ok(0),
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::BADF) => {
                self.by_hand = true;
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1_000_000).unwrap();
        file.write_all_at(b"middle", 500_000).unwrap();
        file.write_all_at(b"end", 999_997).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    #[test]
    fn a_named_file_is_linked() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let source = File::create_new(folder.path().join("a")).unwrap();
        link_or_copy(&source, &folder.path().join("b")).unwrap();
        assert_eq!(folder.path().join("b").metadata().unwrap().ino(), source.metadata().unwrap().ino());
        let again = link_or_copy(&source, &folder.path().join("b")).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_nameless_file_is_copied_with_its_holes() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (sparse(), folder.path().join("copy"));
        link_or_copy(&source, &path).unwrap();
        let copy = File::open(&path).unwrap();
        assert_eq!(content(&copy), content(&source));
        assert_eq!(Extents::of_file(&copy).unwrap(), Extents::of_file(&source).unwrap());
    }

    #[test]
    fn by_hand_and_in_the_kernel_do_the_same_and_a_short_source_is_an_error() {
        let source = sparse();
        for by_hand in [false, true] {
            let to = tempfile::tempfile().unwrap();
            let mut copier = Copier { from: &source, to: &to, by_hand };
            copier.copy(499_999, 1_000_000).unwrap();
            assert_eq!(content(&to)[499_999..], content(&source)[499_999..]);
            let error = copier.copy(999_000, 1_000_001).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
