//! IPv6 of a trial's TAPs: addresses, pings, and what a guest says of itself to its neighbours.

use std::fs;
use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{Tap, check, pings};
use crate::trial::limit;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const ICMPV6: u8 = 58;
/// Looked at before the one that is waited for.
const FRAMES_MAX: usize = 10_000;

/// Whether this host has IPv6; the error is the reason.
pub fn available() -> Result<(), String> {
    match fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6") {
        Ok(text) if text.trim() == "0" => Ok(()),
        Ok(_) => Err("IPv6 is switched off here (net.ipv6.conf.all.disable_ipv6)".into()),
        Err(error) => Err(format!("no IPv6 here: {error}")),
    }
}

/// The link-local address that a guest makes of its Ethernet address.
pub fn link_local(mac: &[u8]) -> anyhow::Result<Ipv6Addr> {
    let [a, b, c, d, e, f]: [u8; 6] = mac.try_into().context("an Ethernet address")?;
    Ok([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f].into())
}

impl Tap {
    /// Gives it `addresses`, each in a network of 64 bits, at once and without a search for duplicates; of link-local ones it has those and no other.
    pub fn add_six(&self, addresses: &[Ipv6Addr]) -> anyhow::Result<()> {
        for (setting, value) in [("accept_dad", "0"), ("addr_gen_mode", "1")] {
            let path = format!("/proc/sys/net/ipv6/conf/{}/{setting}", self.name);
            fs::write(&path, value).with_context(|| path.clone())?;
        }
        #[repr(C)]
        struct Request {
            address: [u8; 16],
            bits: u32,
            index: libc::c_int,
        }
        // SAFETY: a new socket, which nobody else owns.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_INET6, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
            check(fd)?;
            OwnedFd::from_raw_fd(fd)
        };
        let index = self.index()? as libc::c_int;
        for address in addresses {
            let request = Request { address: address.octets(), bits: 64, index };
            // SAFETY: reads a struct in6_ifreq, which lives through the call.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR as _, &request) })
                .with_context(|| format!("{address} for {}", self.name))?;
        }
        Ok(())
    }

    /// The kernel's number of it.
    pub fn index(&self) -> io::Result<u32> {
        let name = std::ffi::CString::new(self.name.as_str())?;
        // SAFETY: a string with its NUL.
        match unsafe { libc::if_nametoindex(name.as_ptr()) } {
            0 => Err(io::Error::last_os_error()),
            index => Ok(index),
        }
    }

    /// Pings a guest at the other end, which may be by a link-local address; counts the answers.
    pub async fn ping_six(&self, to: Ipv6Addr, count: u16) -> anyhow::Result<u16> {
        let scope = if to.segments()[0] & 0xffc0 == 0xfe80 { self.index()? } else { 0 };
        tokio::task::spawn_blocking(move || ping(SocketAddrV6::new(to, 0, 0, scope), count)).await?
    }

    /// Hears what is said on it from now on.
    pub fn listen(&self) -> anyhow::Result<Ear> {
        let protocol = (libc::ETH_P_IPV6 as u16).to_be();
        // SAFETY: a new socket, which nobody else owns.
        let socket = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, libc::c_int::from(protocol));
            check(fd).context("a packet socket")?;
            UdpSocket::from_raw_fd(fd)
        };
        // SAFETY: a sockaddr_ll of zeros is a valid value.
        let mut place: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        place.sll_family = libc::AF_PACKET as u16;
        place.sll_protocol = protocol;
        place.sll_ifindex = self.index()? as i32;
        let length = size_of_val(&place) as libc::socklen_t;
        // SAFETY: an address with its length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const place).cast(), length) })?;
        Ok(Ear { socket })
    }
}

fn ping(to: SocketAddrV6, count: u16) -> anyhow::Result<u16> {
    // SAFETY: a new socket, which nobody else owns.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_INET6, kind, libc::IPPROTO_ICMPV6);
        check(fd).context("a raw socket for ping")?;
        UdpSocket::from_raw_fd(fd)
    };
    let id = std::process::id() as u16;
    let request = |number: u16| {
        // The kernel puts in the checksum.
        let mut packet = vec![ECHO_REQUEST, 0, 0, 0];
        packet.extend(id.to_be_bytes());
        packet.extend(number.to_be_bytes());
        packet.extend([0x5a; 56]);
        packet
    };
    let answered = |packet: &[u8]| {
        let ours = packet.len() >= 8 && packet[0] == ECHO_REPLY && packet[4..6] == id.to_be_bytes();
        ours.then(|| u16::from_be_bytes([packet[6], packet[7]]))
    };
    pings(&socket, to.into(), count, Duration::from_millis(50), request, answered)
}

/// Frames of IPv6 on a TAP.
pub struct Ear {
    socket: UdpSocket,
}

impl Ear {
    /// Waits until somebody says to all neighbours that this address is at this Ethernet address, whatever they have believed.
    pub async fn hear(self, address: Ipv6Addr, mac: &[u8]) -> anyhow::Result<()> {
        let mac: [u8; 6] = mac.try_into().context("an Ethernet address")?;
        tokio::task::spawn_blocking(move || self.wait(address, mac)).await?
    }

    fn wait(self, address: Ipv6Addr, mac: [u8; 6]) -> anyhow::Result<()> {
        let end = Instant::now() + limit(10);
        self.socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        for _ in 0..FRAMES_MAX {
            ensure!(Instant::now() < end, "nobody says that {address} is at {mac:02x?}");
            let mut frame = [0; 1600];
            match self.socket.recv(&mut frame) {
                Ok(bytes) if announces(&frame[..bytes], address, mac) => return Ok(()),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(error.into()),
            }
        }
        anyhow::bail!("{FRAMES_MAX} frames, and none says that {address} is at {mac:02x?}")
    }
}

/// An unsolicited neighbour advertisement that overrides (RFC 4861, 4.4).
fn announces(frame: &[u8], address: Ipv6Addr, mac: [u8; 6]) -> bool {
    /// Ethernet header and IPv6 header.
    const MESSAGE: usize = 14 + 40;
    const HOPS: usize = 14 + 7;
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let Some(message) = frame.get(MESSAGE..MESSAGE + 32) else { return false };
    frame[6..12] == mac
        && frame[20] == ICMPV6
        && frame[HOPS] == 255
        && frame[22..38] == address.octets()
        && frame[38..54] == ALL_NODES.octets()
        && message[..2] == [NEIGHBOR_ADVERTISEMENT, 0]
        // Override, and neither solicited nor a router's.
        && message[4] == 0x20
        && message[8..24] == address.octets()
        && message[24..26] == [2, 1]
        && message[26..] == mac
}
