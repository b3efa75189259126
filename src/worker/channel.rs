//! The control socket: one `SOCK_SEQPACKET` packet is one message, descriptors ride along.
//!
//! [`Channel`] is what the worker uses (blocking) and [`AsyncChannel`] what the daemon uses (tokio); both carry any
//! serde value by [`crate::snapshot::codec`]. What travels is in [`super::protocol`]. Facts: unix(7), cmsg(3),
//! recvmsg(2). The peer may be a worker that a guest has taken over, so everything received is bounded: packet bytes,
//! descriptors, and what decoding may allocate; descriptors of a refused packet are closed.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::protocol::{FDS_MAX, MESSAGE_BYTES_MAX};
use crate::snapshot::codec::{self, CodecError};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other end is gone: no message will ever come or arrive.
    #[error("the other end of the control socket is closed")]
    Closed,
    #[error("control socket: {0}")]
    Io(#[source] io::Error),
    #[error("control message {0}")]
    Codec(#[from] CodecError),
    #[error("a control message of {0} bytes is over the limit of {MESSAGE_BYTES_MAX}")]
    TooLarge(usize),
    #[error("{0} descriptors in one control message are over the limit of {FDS_MAX}")]
    TooManyDescriptors(usize),
    #[error("a control message was cut off: it was over {MESSAGE_BYTES_MAX} bytes or {FDS_MAX} descriptors")]
    Truncated,
}

impl ChannelError {
    /// A non-blocking channel had nothing to receive or no room to send.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                Self::Closed
            }
            _ => Self::Io(error),
        }
    }
}

/// One end of a control socket. Blocking, unless [`Channel::set_nonblocking`] was called.
///
/// All methods take `&self`: packets are atomic, so one thread may send while another receives.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Two connected ends, both close-on-exec and blocking.
    pub fn pair() -> io::Result<(Self, Self)> {
        let mut fds: [RawFd; 2] = [-1; 2];
        // SAFETY: `fds` is a valid array of two ints, which socketpair fills on success.
        let result = unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: socketpair succeeded, so both descriptors are open and owned by nobody else.
        Ok(unsafe {
            (Self::from_fd(OwnedFd::from_raw_fd(fds[0])), Self::from_fd(OwnedFd::from_raw_fd(fds[1])))
        })
    }

    /// The socket itself, to be given to a process.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Wraps an end that was inherited or received: it must be a connected `SOCK_SEQPACKET` socket.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Makes `send` and `recv` fail with an error for which [`ChannelError::would_block`] holds instead of waiting.
    ///
    /// The flag belongs to this end only; a copy of the descriptor in another process shares it.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        let value: libc::c_int = nonblocking.into();
        // SAFETY: FIONBIO reads one int through the pointer, which is valid for the call.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONBIO, &value) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes `recv` fail likewise when nothing has come for so long. Belongs to the socket, as the flag above.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let value = libc::timeval {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_usec: timeout.subsec_micros().into(),
        };
        // SAFETY: the option's value is read through the pointer, which is valid for the call.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The user at the other end, as the kernel has it. (Who that is as a process cannot be told from another pid namespace.)
    pub fn peer_user(&self) -> io::Result<u32> {
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut length = size_of_val(&peer) as libc::socklen_t;
        // SAFETY: `peer` and `length` are valid for the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut length,
            )
        };
        match result {
            0 => Ok(peer.uid),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sends one message with copies of `fds`, whole or not at all. Never raises SIGPIPE.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = codec::encode(message)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(ChannelError::TooLarge(bytes.len()));
        }
        if fds.len() > FDS_MAX {
            return Err(ChannelError::TooManyDescriptors(fds.len()));
        }
        self.send_bytes(&bytes, fds).map_err(ChannelError::from_io)
    }

    /// Receives one message and its descriptors (close-on-exec), in the order they were sent.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] when the other end is gone and everything it sent has been received.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let (bytes, fds) = self.recv_bytes()?;
        Ok((codec::decode(&bytes)?, fds))
    }

    fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: msghdr is plain data for which all zeroes is a valid value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &mut iov;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            let payload = mem::size_of_val(fds) as u32; // at most FDS_MAX * 4
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: pure arithmetic.
            header.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as usize;
            // SAFETY: the control buffer is aligned and has room for one header and FDS_MAX descriptors, and
            // `fds` has at most FDS_MAX (checked by `send`); BorrowedFd is a transparent RawFd.
            unsafe {
                let first = libc::CMSG_FIRSTHDR(&header);
                (*first).cmsg_level = libc::SOL_SOCKET;
                (*first).cmsg_type = libc::SCM_RIGHTS;
                (*first).cmsg_len = libc::CMSG_LEN(payload) as usize;
                ptr::copy_nonoverlapping(fds.as_ptr().cast::<u8>(), libc::CMSG_DATA(first), payload as usize);
            }
        }
        // A seqpacket send is all or nothing, so a positive result needs no further look.
        // SAFETY: header, iov, bytes and control outlive the call; MSG_NOSIGNAL keeps SIGPIPE away.
        retry(|| unsafe { libc::sendmsg(self.socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) }).map(|_| ())
    }

    fn recv_bytes(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), ChannelError> {
        // Not cleared: of the pages of a largest message only those are touched that this one has. One byte more than a message may have
        // would not tell more than MSG_TRUNC does.
        let mut bytes = Vec::<u8>::with_capacity(MESSAGE_BYTES_MAX);
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: MESSAGE_BYTES_MAX };
        // SAFETY: msghdr is plain data for which all zeroes is a valid value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = mem::size_of_val(&control.0);
        // SAFETY: header points at live buffers of the stated sizes.
        let length =
            retry(|| unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) })
                .map_err(ChannelError::from_io)?;
        // Taken before anything is refused, so that no descriptor leaks.
        let fds = received_fds(&header);
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(ChannelError::Truncated);
        }
        match length {
            0 => Err(ChannelError::Closed), // No message encodes to nothing: this is end of file.
            length => {
                // SAFETY: the kernel wrote so many bytes, and no more than there is room for: the packet was not cut off.
                unsafe { bytes.set_len(length.min(MESSAGE_BYTES_MAX)) };
                Ok((bytes, fds))
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

/// The daemon's end: the same messages, waiting without a thread. Cancelling a call loses no message.
#[derive(Debug)]
pub struct AsyncChannel {
    inner: AsyncFd<Channel>,
}

impl AsyncChannel {
    /// Makes `channel` non-blocking and registers it with the current tokio runtime.
    pub fn new(channel: Channel) -> io::Result<Self> {
        channel.set_nonblocking(true)?;
        // SAFETY: `Channel` owns its descriptor, which is open, and neither replaces nor closes it while it lives.
        Ok(Self { inner: unsafe { AsyncFd::register(channel) }? })
    }

    /// As [`Channel::send`]; waits while the socket's buffer is full.
    pub async fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = codec::encode(message)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(ChannelError::TooLarge(bytes.len()));
        }
        if fds.len() > FDS_MAX {
            return Err(ChannelError::TooManyDescriptors(fds.len()));
        }
        self.inner
            .async_io(Interest::WRITABLE, |channel| channel.send_bytes(&bytes, fds))
            .await
            .map_err(ChannelError::from_io)
    }

    /// As [`Channel::recv`].
    pub async fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        loop {
            let mut guard = self.inner.readable().await.map_err(ChannelError::from_io)?;
            match guard.get_inner().recv() {
                Err(error) if error.would_block() => guard.clear_ready(),
                result => return result,
            }
        }
    }
}

/// Room for one `SCM_RIGHTS` header and [`FDS_MAX`] descriptors, aligned as a `cmsghdr` must be.
#[repr(align(8))]
struct ControlBuffer([u8; CONTROL_BYTES]);

/// `CMSG_SPACE(FDS_MAX * 4)`, checked by a test because libc's is not usable here on every version.
const CONTROL_BYTES: usize = 16 + FDS_MAX * mem::size_of::<RawFd>();

impl ControlBuffer {
    fn new() -> Self {
        Self([0; CONTROL_BYTES])
    }
}

/// Takes ownership of every descriptor that recvmsg installed.
fn received_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: recvmsg filled the control buffer and set its length; the CMSG macros stay inside it.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: not null, so it points at a whole header inside the control buffer.
        let (level, kind, length) =
            unsafe { ((*message).cmsg_level, (*message).cmsg_type, (*message).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: pure arithmetic.
            let payload = length.saturating_sub(unsafe { libc::CMSG_LEN(0) } as usize);
            for n in 0..payload / mem::size_of::<RawFd>() {
                // SAFETY: the kernel wrote `payload` bytes of descriptors here, each new and ours alone.
                fds.push(unsafe {
                    let fd = libc::CMSG_DATA(message).cast::<RawFd>().add(n).read_unaligned();
                    OwnedFd::from_raw_fd(fd)
                });
            }
        }
        // SAFETY: `message` is a valid header of `header`'s control buffer.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    fds
}

/// Repeats a system call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        let result = call();
        if let Ok(count) = usize::try_from(result) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::protocol::{Event, FromWorker, Request, ToWorker};
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    fn raw_send(channel: &Channel, bytes: &[u8]) {
        channel.send_bytes(bytes, &[]).unwrap();
    }

    #[test]
    fn the_control_buffer_is_as_large_as_the_kernel_needs() {
        // SAFETY: pure arithmetic.
        assert_eq!(CONTROL_BYTES, unsafe { libc::CMSG_SPACE((FDS_MAX * 4) as u32) } as usize);
    }

    #[test]
    fn messages_and_descriptors_arrive_in_order_with_their_borders() {
        let (left, right) = Channel::pair().unwrap();
        let mut files: Vec<File> = (0..FDS_MAX).map(|_| tempfile::tempfile().unwrap()).collect();
        for (n, file) in files.iter_mut().enumerate() {
            write!(file, "{n}").unwrap();
        }
        let fds: Vec<_> = files.iter().map(File::as_fd).collect();
        left.send(&ToWorker { id: 1, request: Request::Stats }, &fds).unwrap();
        left.send(&ToWorker { id: 2, request: Request::Kill }, &[]).unwrap();

        let (first, fds) = right.recv::<ToWorker>().unwrap();
        assert_eq!((first.id, fds.len()), (1, FDS_MAX));
        for (n, fd) in fds.into_iter().enumerate() {
            let mut file = File::from(fd);
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, n.to_string());
        }
        let (second, fds) = right.recv::<ToWorker>().unwrap();
        assert_eq!((second.id, fds.len()), (2, 0));
        drop(left);
        assert!(matches!(right.recv::<ToWorker>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn sending_to_a_closed_end_is_an_error_and_no_signal() {
        let (left, right) = Channel::pair().unwrap();
        drop(right);
        assert!(matches!(left.send(&1u8, &[]), Err(ChannelError::Closed)));
    }

    #[test]
    fn too_much_is_refused_on_both_sides() {
        let (left, right) = Channel::pair().unwrap();
        assert!(matches!(left.send(&vec![0u8; MESSAGE_BYTES_MAX], &[]), Err(ChannelError::TooLarge(_))));
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); FDS_MAX + 1];
        assert!(matches!(left.send(&0u8, &fds), Err(ChannelError::TooManyDescriptors(_))));
        // A peer that keeps no limit.
        raw_send(&left, &vec![0u8; MESSAGE_BYTES_MAX + 1]);
        assert!(matches!(right.recv::<u8>(), Err(ChannelError::Truncated)));
        raw_send(&left, &[0xff, 0xff, 0xff]);
        assert!(matches!(right.recv::<FromWorker>(), Err(ChannelError::Codec(_))));
        // The channel is still good.
        left.send(&7u8, &[]).unwrap();
        assert_eq!(right.recv::<u8>().unwrap().0, 7);
    }

    #[test]
    fn descriptors_of_a_refused_packet_are_closed() {
        let (left, right) = Channel::pair().unwrap();
        let (watch, given) = Channel::pair().unwrap();
        left.send_bytes(&vec![0u8; MESSAGE_BYTES_MAX + 1], &[given.as_fd()]).unwrap();
        drop(given);
        assert!(matches!(right.recv::<u8>(), Err(ChannelError::Truncated)));
        // Nobody holds the other end of `watch` any more, so it reads end of file instead of waiting.
        watch.set_nonblocking(true).unwrap();
        assert!(matches!(watch.recv::<u8>(), Err(ChannelError::Closed)));
    }

    #[tokio::test]
    async fn the_daemons_end_waits_without_blocking_and_sees_the_end() {
        let (left, right) = Channel::pair().unwrap();
        let daemon = AsyncChannel::new(left).unwrap();
        let worker = std::thread::spawn(move || {
            let (message, _) = right.recv::<ToWorker>().unwrap();
            let file = tempfile::tempfile().unwrap();
            right.send(&FromWorker::Event(Event::ReadyPort { value: 7 }), &[file.as_fd()]).unwrap();
            message.id
        });
        daemon.send(&ToWorker { id: 9, request: Request::Pause }, &[]).await.unwrap();
        let (message, fds) = daemon.recv::<FromWorker>().await.unwrap();
        assert!(matches!(message, FromWorker::Event(Event::ReadyPort { value: 7 })));
        assert_eq!(fds.len(), 1);
        assert_eq!(worker.join().unwrap(), 9);
        assert!(matches!(daemon.recv::<FromWorker>().await, Err(ChannelError::Closed)));
    }

    #[tokio::test]
    async fn a_full_socket_is_waited_for() {
        let (left, right) = Channel::pair().unwrap();
        let daemon = AsyncChannel::new(left).unwrap();
        let reader = std::thread::spawn(move || {
            let mut total = 0;
            while let Ok((bytes, _)) = right.recv::<Vec<u8>>() {
                total += bytes.len();
            }
            total
        });
        for _ in 0..64 {
            daemon.send(&vec![1u8; 60_000], &[]).await.unwrap();
        }
        drop(daemon);
        assert_eq!(reader.join().unwrap(), 64 * 60_000);
    }
}
