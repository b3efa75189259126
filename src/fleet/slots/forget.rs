//! What the host's kernel remembers of connections, made forgotten: those of slots that are gone, and those of ports that lead elsewhere now.
//!
//! The kernel decides for a connection once where it leads, and goes by that for as long as packets come: a client that asks the same published port by UDP
//! from the same port of its own would be led to the VM that is gone, whoever has the port now; and to whoever has that VM's address later.
//!
//! Facts: `linux/netfilter/nfnetlink.h`, `nfnetlink_conntrack.h`, `net/netfilter/nf_conntrack_netlink.c`; the same as `conntrack -D`, without that program.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// How long the kernel may take to tell all that it knows.
const WITHIN: Duration = Duration::from_secs(5);
/// Forgotten at a time.
const FOUND_MAX: usize = 4096;
/// Times.
const ROUNDS_MAX: usize = 64;
/// Addresses of which it is remembered whether they are this host's.
const ASKED_MAX: usize = 4096;
/// The kernel's messages are no longer.
const BUFFER_BYTES: usize = 64 << 10;

/// `NFNL_SUBSYS_CTNETLINK`, in the place that it has in a message's type.
const CONNTRACK: u16 = 1 << 8;
const GET: u16 = CONNTRACK | 1;
const DELETE: u16 = CONNTRACK | 2;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `nlmsghdr`, and `nfgenmsg` behind it.
const HEADER: usize = 16;
const FAMILY: usize = 4;
const ATTRIBUTE: usize = 4;
/// Flags in an attribute's type.
const TYPE_MASK: u16 = 0x3fff;

/// Attributes of an entry, of a tuple in it, of addresses and of ports.
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const V4_SRC: u16 = 1;
const V4_DST: u16 = 2;
const V6_SRC: u16 = 3;
const V6_DST: u16 = 4;
const PROTO_NUM: u16 = 1;
const SRC_PORT: u16 = 2;
const DST_PORT: u16 = 3;
const UDP: u8 = 17;

/// Which connections are to be forgotten.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Forget {
    /// All to and from these.
    pub addresses: HashSet<IpAddr>,
    /// Those by UDP to these ports of this host that lead to nobody else than they were sent to: of a time when the port was not published. What
    /// this host itself, or whom it forwards for, has asked of others by the same port goes on.
    pub udp_ports: HashSet<u16>,
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tuple {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ports: (u16, u16),
}

impl Forget {
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.udp_ports.is_empty()
    }

    fn is(&self, there: &Tuple, back: &Tuple, is_own: impl FnOnce(IpAddr) -> bool) -> bool {
        let ends = [there.source, there.destination, back.source, back.destination];
        let as_sent = (there.source, there.destination) == (back.destination, back.source)
            && there.ports == (back.ports.1, back.ports.0);
        ends.iter().any(|address| self.addresses.contains(address))
            || (there.protocol == UDP
                && as_sent
                && self.udp_ports.contains(&there.ports.1)
                && is_own(there.destination))
    }
}

/// Which addresses are this host's, in this thread's network namespace, as the rules' `fib daddr type local` has it.
#[derive(Default)]
struct Own(HashMap<IpAddr, bool>);

impl Own {
    fn has(&mut self, address: IpAddr) -> bool {
        if let Some(known) = self.0.get(&address) {
            return *known;
        }
        let is_own = match address {
            address if address.is_multicast() => false,
            // Which interface's is not known here, so it cannot be asked.
            IpAddr::V6(six) if six.is_unicast_link_local() => true,
            // The kernel lets nobody be bound to others' addresses; what cannot be asked may be.
            address => match UdpSocket::bind((address, 0)) {
                Ok(_) => true,
                Err(error) => error.kind() != io::ErrorKind::AddrNotAvailable,
            },
        };
        if self.0.len() < ASKED_MAX {
            self.0.insert(address, is_own);
        }
        is_own
    }
}

/// Makes this thread's network namespace forget; says how many connections were. Blocks.
pub fn forget(what: &Forget) -> io::Result<usize> {
    let mut count = 0;
    if what.is_empty() {
        return Ok(count);
    }
    let until = Instant::now() + WITHIN;
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(WITHIN))?;
    for _ in 0..ROUNDS_MAX {
        let found = find(&socket, what, until)?;
        for entry in &found {
            let mut message = vec![entry.family, 0, 0, 0];
            message.extend_from_slice(&entry.names);
            tell(&socket, DELETE, REQUEST | ACK, &message)?;
            let mut gone = false;
            read(&socket, until, |kind, body| {
                if kind == ERROR {
                    gone = outcome(body)?;
                }
                Ok(kind == ERROR)
            })?;
            count += usize::from(gone);
        }
        if found.len() < FOUND_MAX {
            return Ok(count);
        }
    }
    Ok(count)
}

/// An entry, as it is named to the kernel.
struct Entry {
    family: u8,
    names: Vec<u8>,
}

/// The first ones that are meant.
fn find(socket: &OwnedFd, what: &Forget, until: Instant) -> io::Result<Vec<Entry>> {
    // Of both families.
    tell(socket, GET, REQUEST | DUMP, &[0; FAMILY])?;
    let (mut found, mut own) = (Vec::new(), Own::default());
    read(socket, until, |kind, body| {
        match kind {
            DONE => return Ok(true),
            ERROR => return outcome(body).map(|_| true),
            _ => {}
        }
        if found.len() < FOUND_MAX
            && let Some(entry) = meant(body, what, |address| own.has(address))
        {
            found.push(entry);
        }
        Ok(false)
    })?;
    Ok(found)
}

/// An entry that is meant; `None` also for what is no entry.
fn meant(body: &[u8], what: &Forget, is_own: impl FnOnce(IpAddr) -> bool) -> Option<Entry> {
    let (&family, rest) = (body.first()?, body.get(FAMILY..)?);
    let (mut there, mut back, mut names) = (None, None, Vec::new());
    for (kind, value, whole) in attributes(rest) {
        match kind {
            TUPLE_ORIG => there = tuple(value),
            TUPLE_REPLY => back = tuple(value),
            _ => {}
        }
        // With the id it is this connection, and not one that came after it.
        if matches!(kind, TUPLE_ORIG | ID | ZONE) {
            names.extend_from_slice(whole);
            names.resize(names.len().next_multiple_of(ATTRIBUTE), 0);
        }
    }
    what.is(&there?, &back?, is_own).then_some(Entry { family, names })
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (mut source, mut destination, mut protocol, mut ports) = (None, None, None, (0, 0));
    let four = |value: &[u8]| Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?)));
    let six = |value: &[u8]| Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?)));
    let port = |value: &[u8]| <[u8; 2]>::try_from(value).map_or(0, u16::from_be_bytes);
    for (kind, value, _) in attributes(bytes) {
        for (inner, value, _) in attributes(value) {
            match (kind, inner) {
                (TUPLE_IP, V4_SRC) => source = four(value),
                (TUPLE_IP, V4_DST) => destination = four(value),
                (TUPLE_IP, V6_SRC) => source = six(value),
                (TUPLE_IP, V6_DST) => destination = six(value),
                (TUPLE_PROTO, PROTO_NUM) => protocol = value.first().copied(),
                (TUPLE_PROTO, SRC_PORT) => ports.0 = port(value),
                (TUPLE_PROTO, DST_PORT) => ports.1 = port(value),
                _ => {}
            }
        }
    }
    Some(Tuple { source: source?, destination: destination?, protocol: protocol?, ports })
}

/// Types, values, and the attributes themselves; ends where the bytes do not make sense.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let whole = bytes.get(..length)?;
        let value = whole.get(ATTRIBUTE..)?;
        bytes = bytes.get(length.next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        Some((kind, value, whole))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// An answer's errno: whether it was done; what is not there need not be.
fn outcome(body: &[u8]) -> io::Result<bool> {
    match u32_at(body, 0).map(|number| (number as i32).wrapping_neg()) {
        Some(0) => Ok(true),
        Some(libc::ENOENT) => Ok(false),
        Some(number) => Err(io::Error::from_raw_os_error(number)),
        None => Err(io::Error::other("the kernel's answer is cut short")),
    }
}

fn tell(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    // Sequence and sender: answers come in order, and to this socket.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(body);
    send(socket, &message, SendFlags::empty())?;
    Ok(())
}

/// Gives `take` the messages' types and bodies until it has what it waits for.
fn read(
    socket: &OwnedFd,
    until: Instant,
    mut take: impl FnMut(u16, &[u8]) -> io::Result<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while Instant::now() < until {
        let (count, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        let mut left = buffer.get(..count).unwrap_or_default();
        while let (Some(length), Some(kind)) = (u32_at(left, 0), u16_at(left, 4)) {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let Some(body) = left.get(HEADER..length) else { break };
            if take(kind, body)? {
                return Ok(());
            }
            left = left.get(length.next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(ATTRIBUTE), 0);
        bytes
    }

    fn way(kind: u16, source: &str, destination: &str, protocol: u8, ports: (u16, u16)) -> Vec<u8> {
        let bytes = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
        let addresses = [attribute(V4_SRC, &bytes(source)), attribute(V4_DST, &bytes(destination))].concat();
        let protocol = [
            attribute(PROTO_NUM, &[protocol]),
            attribute(SRC_PORT, &ports.0.to_be_bytes()),
            attribute(DST_PORT, &ports.1.to_be_bytes()),
        ]
        .concat();
        // Nested ones say so in their types.
        let nested = 0x8000;
        let inside =
            [attribute(TUPLE_IP | nested, &addresses), attribute(TUPLE_PROTO | nested, &protocol)].concat();
        attribute(kind | nested, &inside)
    }

    fn entry(there: Vec<u8>, back: Vec<u8>) -> Vec<u8> {
        [vec![2, 0, 0, 0], there, back, attribute(3, &[0; 4]), attribute(ID, &[7; 4])].concat()
    }

    #[test]
    fn what_leads_to_a_slot_or_past_a_port_is_meant_and_nothing_else() {
        let published = entry(
            way(TUPLE_ORIG, "192.0.2.1", "192.0.2.9", UDP, (999, 5353)),
            way(TUPLE_REPLY, "10.77.0.2", "192.0.2.1", UDP, (53, 999)),
        );
        let plain = entry(
            way(TUPLE_ORIG, "192.0.2.1", "192.0.2.9", UDP, (999, 5353)),
            way(TUPLE_REPLY, "192.0.2.9", "192.0.2.1", UDP, (5353, 999)),
        );
        let tcp = entry(
            way(TUPLE_ORIG, "192.0.2.1", "192.0.2.9", 6, (999, 5353)),
            way(TUPLE_REPLY, "192.0.2.9", "192.0.2.1", 6, (5353, 999)),
        );
        let slot = Forget { addresses: ["10.77.0.2".parse().unwrap()].into(), ..Forget::default() };
        let port = Forget { udp_ports: [5353].into(), ..Forget::default() };
        let is = |body: &[u8], what: &Forget| meant(body, what, |_| true).is_some();
        assert_eq!((is(&published, &slot), is(&plain, &slot), is(&tcp, &slot)), (true, false, false));
        assert_eq!((is(&published, &port), is(&plain, &port), is(&tcp, &port)), (false, true, false));
        // This host's own question to a port of another's.
        let others = |address: IpAddr| {
            assert_eq!(address, "192.0.2.9".parse::<IpAddr>().unwrap());
            false
        };
        assert!(meant(&plain, &port, others).is_none());
        let named = meant(&published, &slot, |_| false).unwrap();
        assert_eq!(named.family, 2);
        let kinds: Vec<u16> = attributes(&named.names).map(|(kind, ..)| kind).collect();
        assert_eq!(kinds, [TUPLE_ORIG, ID]);
    }

    #[test]
    fn an_address_is_this_hosts_or_it_is_not() {
        let mut own = Own::default();
        let mut has = |address: &str| own.has(address.parse().unwrap());
        assert!(has("127.0.0.1") && has("127.0.0.1") && has("fe80::1"));
        // Of documentation (RFC 5737), and a group.
        assert!(!has("192.0.2.9") && !has("192.0.2.9") && !has("224.0.0.251") && !has("ff02::fb"));
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let whole = entry(
            way(TUPLE_ORIG, "192.0.2.1", "192.0.2.9", UDP, (999, 5353)),
            way(TUPLE_REPLY, "192.0.2.9", "192.0.2.1", UDP, (5353, 999)),
        );
        let what = Forget { udp_ports: [5353].into(), ..Forget::default() };
        for length in 0..whole.len() {
            // The id comes last: without it the rest is whole.
            let _ = meant(&whole[..length], &what, |_| true);
        }
        for cut in [&whole[..40], &[0xff; 64], &[0; 64]] {
            assert!(meant(cut, &what, |_| true).is_none());
        }
        assert!(outcome(&[0, 0]).is_err());
        assert!(!outcome(&(-libc::ENOENT).to_ne_bytes()).unwrap());
        assert!(outcome(&(-libc::EPERM).to_ne_bytes()).is_err());
    }
}
