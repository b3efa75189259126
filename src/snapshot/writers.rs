//! Whether anybody can still write to a file. What a worker has written is published in place, so nobody may have it open for writing from then
//! on: a guest that takes its worker over later could change what every clone reads, or cut it off under their mappings.
//!
//! The kernel is asked for a read lease (fcntl(2), F_SETLEASE), which it gives only while the file is open for writing nowhere: by no descriptor,
//! none under way in a socket, no shared writable mapping. The lease itself is given back at once. Facts: `generic_setlease` in fs/locks.c.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::Path,
    sync::Once,
    thread,
    time::{Duration, Instant},
};

/// How long somebody may have a file open for writing who is about to close it: a child of this process that has not begun its program yet has
/// all descriptors for a moment, which a host that is out of breath draws out.
pub const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });
/// fcntl(2); not in every libc crate.
const F_SETSIG: i32 = 10;
/// statfs(2): NFS, CIFS, SMB2.
const REMOTE: [i128; 3] = [0x6969, 0xff53_4d42, 0xfe53_4d42];
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Who can write to a file.
#[derive(Debug)]
pub enum Writers {
    Nobody,
    Somebody,
    /// This file system, or this host, does not tell.
    Unknown(io::Error),
}

/// Looks at a file that is itself open for reading only.
pub fn writers(file: &File) -> io::Result<Writers> {
    // The kernel signals a lease's holder when another opens the file for writing, by default with SIGIO, which ends a process. SIGURG does not.
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    match fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {
            // What cannot be given back goes with the descriptor, and keeps nobody from reading.
            let _ = fcntl(file, libc::F_SETLEASE, libc::F_UNLCK);
            Ok(Writers::Nobody)
        }
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) if is_remote(file) => Ok(Writers::Unknown(error)),
            Some(libc::EAGAIN) => Ok(Writers::Somebody),
            // FUSE and others have no leases, they can be switched off (fs.leases-enable), and those of others' files need CAP_LEASE.
            Some(
                libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EACCES | libc::EPERM,
            ) => Ok(Writers::Unknown(error)),
            _ => Err(error),
        },
    }
}

/// Whether the file lies where EAGAIN may also mean that a server has given no delegation or oplock (`nfs4_add_lease`, `cifs_setlease`).
fn is_remote(file: &File) -> bool {
    let kind = rustix::fs::fstatfs(file).map(|about| i128::from(about.f_type));
    kind.is_ok_and(|kind| REMOTE.contains(&kind))
}

/// Waits until nobody can write to the file at `path` any more; `false`: somebody still can. Where that is not to be known it is said once, and
/// believed.
pub fn wait_for_none(file: &File, path: &Path, until: Instant) -> io::Result<bool> {
    static SAID: Once = Once::new();
    let mut pause = FIRST_PAUSE;
    loop {
        match writers(file)? {
            Writers::Nobody => return Ok(true),
            Writers::Unknown(error) => {
                SAID.call_once(|| {
                    tracing::warn!(
                        %error,
                        path = %path.display(),
                        "no leases on this file system: that workers have closed what they wrote is not checked before it is published"
                    );
                });
                return Ok(true);
            }
            Writers::Somebody => {}
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        // Nobody tells when a file is closed.
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn fcntl(file: &File, command: i32, argument: i32) -> io::Result<()> {
    // SAFETY: commands on our own descriptor that take a plain integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A file, open for writing, and open for reading; both by their own.
    fn pair(folder: &Path) -> (File, File) {
        let path = folder.join("file");
        let writer =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        writer.set_len(8192).unwrap();
        (writer, File::open(path).unwrap())
    }

    fn quiet(file: &File) -> bool {
        // Trials beside this one start programs, which have its descriptors for a moment.
        wait_for_none(file, Path::new("file"), Instant::now() + PATIENCE).unwrap()
    }

    fn busy(file: &File) -> bool {
        matches!(writers(file).unwrap(), Writers::Somebody)
    }

    /// Trials lie on a file system that tells; otherwise they would say nothing.
    #[test]
    fn who_can_write_is_found_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, reader) = pair(folder.path());
        assert!(busy(&reader));
        assert!(!wait_for_none(&reader, Path::new("file"), Instant::now()).unwrap());
        // Another descriptor of the same open file.
        let second = writer.try_clone().unwrap();
        drop(writer);
        assert!(busy(&reader));
        drop(second);
        assert!(quiet(&reader));
        // Readers do not count, and a lease is not kept: the next writer is let in at once.
        let _other = File::open(folder.path().join("file")).unwrap();
        assert!(quiet(&reader));
        let again = OpenOptions::new().write(true).open(folder.path().join("file")).unwrap();
        assert!(busy(&reader));
        drop(again);
        assert!(quiet(&reader));
    }

    #[test]
    fn a_mapping_counts_when_its_descriptor_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, reader) = pair(folder.path());
        // SAFETY: nobody else has the file, and nobody looks at the mapping.
        let mapping = unsafe { memmap2::MmapMut::map_mut(&writer) }.unwrap();
        drop(writer);
        assert!(busy(&reader));
        drop(mapping);
        assert!(quiet(&reader));
    }

    #[test]
    fn a_descriptor_under_way_in_a_socket_counts() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let folder = tempfile::tempdir().unwrap();
        let (writer, reader) = pair(folder.path());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let writer = OwnedFd::from(writer);
        let fds = [writer.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&ours, &[io::IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        drop((writer, ours));
        assert!(busy(&reader));
        drop(theirs);
        assert!(quiet(&reader));
    }

    #[test]
    fn one_who_is_about_to_close_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, reader) = pair(folder.path());
        let (go, gone) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                go.send(()).unwrap();
                wait_for_none(&reader, Path::new("file"), Instant::now() + 10 * PATIENCE).unwrap()
            });
            gone.recv().unwrap();
            drop(writer);
            assert!(waiting.join().unwrap());
        });
    }
}
