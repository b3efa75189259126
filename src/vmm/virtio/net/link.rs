//! What is at the other end of the cable: a TAP of the host, a wire to another guest, or nothing.
//!
//! A TAP and a wire carry the same bytes: a `virtio_net_hdr` of [`HEADER_BYTES`] and an Ethernet frame, one frame for each
//! read and write, never a part of one. Nothing here blocks.
//!
//! Facts: Linux's `Documentation/networking/tuntap.rst`, `drivers/net/tun.c` (a write to an interface that is down is EIO, to
//! one that was deleted EBADFD; TUNSETOFFLOAD needs no privilege on an attached descriptor), `include/uapi/linux/if_tun.h`,
//! unix(7) for the wire.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::HEADER_BYTES;

/// Offloads of a TAP as TUNSETOFFLOAD names them.
const TUN_OFFLOADS: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// Why a descriptor is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("{call} on the descriptor of a TAP: {source}")]
    Tap { call: &'static str, source: io::Error },
    #[error("the TAP was opened without {0}")]
    TapMode(&'static str),
    #[error("the descriptor of a wire is no packet socket")]
    Wire,
}

/// The far end of a network device.
#[derive(Debug)]
pub enum Link {
    Tap(Tap),
    Wire(Wire),
    /// No cable: the driver is told so, and whatever it sends is dropped and counted.
    Down,
}

/// A TAP of the host.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// It knows checksum and segmentation offload.
    offloads: bool,
    /// For tests, which may make no TAP: `fd` is a packet socket, and this is what TUNSETOFFLOAD was told.
    #[cfg(any(test, fuzzing))]
    imitation: Option<std::sync::Arc<std::sync::atomic::AtomicU32>>,
}

/// One end of a packet socket pair, whose other end is another guest's, and therefore as hostile as this one.
#[derive(Debug)]
pub struct Wire {
    fd: OwnedFd,
}

/// What became of a frame that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    Done,
    /// No room now; the descriptor becomes writable.
    Full,
    /// The frame or its header is one that the host does not take.
    Refused,
    /// Nobody takes frames now: the interface is down, the other end is closed, or there is no memory.
    Nobody,
    /// There will never be anybody again.
    Gone,
}

/// What came of asking for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes, header included.
    Frame(usize),
    /// None now; the descriptor becomes readable.
    Empty,
    /// None now or ever.
    Gone,
}

impl Link {
    /// A TAP that was attached with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with headers of [`HEADER_BYTES`]. It is made
    /// non-blocking.
    pub fn tap(fd: OwnedFd) -> Result<Self, LinkError> {
        let tap = |call| move |source| LinkError::Tap { call, source };
        // SAFETY: an ifreq of zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an ifreq, which outlives the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &mut request) })
            .map_err(tap("TUNGETIFF"))?;
        // SAFETY: TUNGETIFF filled the flags in.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        for (flag, name) in
            [(libc::IFF_TAP, "IFF_TAP"), (libc::IFF_NO_PI, "IFF_NO_PI"), (libc::IFF_VNET_HDR, "IFF_VNET_HDR")]
        {
            if flags & flag == 0 {
                return Err(LinkError::TapMode(name));
            }
        }
        let mut header_bytes: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes an int, which outlives the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ as _, &mut header_bytes) })
            .map_err(tap("TUNGETVNETHDRSZ"))?;
        if usize::try_from(header_bytes) != Ok(HEADER_BYTES) {
            return Err(LinkError::TapMode("headers of 12 bytes"));
        }
        nonblocking(&fd).map_err(tap("fcntl"))?;
        let offloads = set_offloads(&fd, TUN_OFFLOADS).is_ok();
        set_offloads(&fd, 0).map_err(tap("TUNSETOFFLOAD"))?;
        Ok(Self::Tap(Tap {
            fd,
            offloads,
            #[cfg(any(test, fuzzing))]
            imitation: None,
        }))
    }

    /// Something that behaves like a TAP, on a packet socket.
    #[cfg(any(test, fuzzing))]
    pub fn imitation(fd: OwnedFd, told: std::sync::Arc<std::sync::atomic::AtomicU32>) -> Self {
        nonblocking(&fd).unwrap();
        Self::Tap(Tap { fd, offloads: true, imitation: Some(told) })
    }

    /// One end of a `SOCK_SEQPACKET` or `SOCK_DGRAM` pair. It is made non-blocking.
    pub fn wire(fd: OwnedFd) -> Result<Self, LinkError> {
        let mut kind: libc::c_int = 0;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: `kind` and `length` are valid for the call.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_TYPE,
                (&raw mut kind).cast(),
                &raw mut length,
            )
        };
        if result != 0 || ![libc::SOCK_SEQPACKET, libc::SOCK_DGRAM].contains(&kind) {
            return Err(LinkError::Wire);
        }
        nonblocking(&fd).map_err(|_| LinkError::Wire)?;
        Ok(Self::Wire(Wire { fd }))
    }

    /// There is somebody to exchange frames with.
    pub fn is_up(&self) -> bool {
        !matches!(self, Self::Down)
    }

    /// The descriptor to watch.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Tap(tap) => Some(tap.fd.as_raw_fd()),
            Self::Wire(wire) => Some(wire.fd.as_raw_fd()),
            Self::Down => None,
        }
    }

    /// It takes frames whose checksum is still to be computed, and gives such frames.
    pub fn checksums(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.offloads,
            // The receiving device computes what its own driver wants computed.
            Self::Wire(_) => true,
            // What a clone's other link will be able to do is not known yet.
            Self::Down => true,
        }
    }

    /// It takes and gives TCP segments larger than the MTU. A wire does not: the driver at its other end may not
    /// understand them, and nobody in between cuts them.
    pub fn segments(&self) -> bool {
        match self {
            Self::Tap(tap) => tap.offloads,
            Self::Wire(_) => false,
            Self::Down => true,
        }
    }

    /// What comes through it was written by another guest.
    pub fn is_wire(&self) -> bool {
        matches!(self, Self::Wire(_))
    }

    /// Tells the host what it may leave undone in frames to the guest: `TUN_F_*`.
    pub fn set_receive_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        match self {
            #[cfg(any(test, fuzzing))]
            Self::Tap(Tap { imitation: Some(told), .. }) => {
                told.store(offloads, std::sync::atomic::Ordering::SeqCst);
                Ok(())
            }
            Self::Tap(tap) if tap.offloads => set_offloads(&tap.fd, offloads),
            _ => Ok(()),
        }
    }

    /// Sends header and frame.
    pub fn send(&self, frame: &[u8]) -> Sent {
        loop {
            let (fd, sent) = match self {
                Self::Down => return Sent::Nobody,
                Self::Tap(Tap { fd, .. }) => {
                    // SAFETY: pointer and length are those of `frame`, which is readable and lives through the call.
                    (fd, unsafe { libc::write(fd.as_raw_fd(), frame.as_ptr().cast(), frame.len()) })
                }
                Self::Wire(Wire { fd }) => {
                    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                    // SAFETY: as above.
                    let sent =
                        unsafe { libc::send(fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), flags) };
                    (fd, sent)
                }
            };
            if sent >= 0 {
                return Sent::Done;
            }
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN) => Sent::Full,
                Some(libc::EINVAL | libc::EMSGSIZE | libc::EFAULT) => Sent::Refused,
                Some(libc::EBADFD | libc::EPIPE | libc::ECONNRESET | libc::ECONNREFUSED) => {
                    tracing::info!(fd = fd.as_raw_fd(), %error, "a network link has no other end any more");
                    Sent::Gone
                }
                _ => Sent::Nobody,
            };
        }
    }

    /// Takes one frame with its header. What does not fit into `buffer` is cut off.
    pub fn receive(&self, buffer: &mut [u8]) -> Received {
        loop {
            let got = match self {
                Self::Down => return Received::Empty,
                // SAFETY: pointer and length are those of `buffer`, which is writable and lives through the call.
                Self::Tap(Tap { fd, .. }) => unsafe {
                    libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len())
                },
                Self::Wire(Wire { fd }) => {
                    let flags = libc::MSG_DONTWAIT;
                    // SAFETY: as above.
                    unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) }
                }
            };
            match usize::try_from(got) {
                // A packet socket's other end is closed. (An empty packet looks the same, and nobody here sends one.)
                Ok(0) => return Received::Gone,
                Ok(bytes) => return Received::Frame(bytes),
                Err(_) => {}
            }
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN) => Received::Empty,
                _ => {
                    tracing::info!(%error, "a network link has no other end any more");
                    Received::Gone
                }
            };
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_offloads(fd: &OwnedFd, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument as a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) })
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: fcntl on our own descriptor, with plain integers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}
