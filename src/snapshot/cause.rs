//! Which kind of failure an error is. Every error of this room has a `cause()`, so that the service can choose a
//! status code without knowing the room's error types.

use std::io;

/// The kind of a failure, named after what the caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// What was asked for makes no sense; ask differently.
    InvalidInput,
    /// There is no such thing.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Stored data is damaged: it cannot be used again.
    Damaged,
    /// This host, or this version of coldspark, cannot do it.
    Unsupported,
    /// Out of disk, memory or descriptors: make room and try again.
    Exhausted,
    /// Whole, but by nobody that is trusted.
    NotTrusted,
    /// Not now: somebody else has it.
    WrongState,
    /// A failure of the system underneath.
    Internal,
}

impl Cause {
    /// The cause of a failed system call. A file size limit counts as a full disk.
    pub fn of_io(error: &io::Error) -> Cause {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Cause::Exhausted,
            Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOBUFS) => Cause::Exhausted,
            Some(libc::EIO | libc::EUCLEAN | libc::EBADMSG) => Cause::Damaged,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Cause::Unsupported,
            _ if error.kind() == io::ErrorKind::UnexpectedEof => Cause::Damaged,
            _ => Cause::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_exhaustion_and_a_short_file_is_damage() {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EMFILE] {
            assert_eq!(Cause::of_io(&io::Error::from_raw_os_error(errno)), Cause::Exhausted);
        }
        assert_eq!(Cause::of_io(&io::ErrorKind::UnexpectedEof.into()), Cause::Damaged);
        assert_eq!(Cause::of_io(&io::Error::from_raw_os_error(libc::EPERM)), Cause::Internal);
    }
}
