//! Addresses of network interfaces, and default routes.
//!
//! What an interface has is read by `sysctl` (NET_RT_IFLIST: messages of a header and socket addresses), changed by ioctls; a default
//! route by messages to a routing socket. Numbers and layouts are those of FreeBSD 12 to 15 on amd64: sys/sys/sockio.h, sys/net/{if,if_var,
//! route,rtsock}, sys/netinet6/{in6_var,nd6}.h.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::neighbours;
use crate::port::Output;
use crate::six;
use crate::streams::Refusal;
use crate::sys::{self, PollFd, Time};
use crate::wire::*;

const NO_INTERFACE: Refusal = (STATUS_NO_DEVICE, "the guest has no such network interface (vtnet)");
const NO_ROOM: Refusal = (STATUS_LIMIT, "the guest's interface has more addresses than the agent has room for");

pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 28;
const AF_LOCAL: usize = 1;
const SOCK_DGRAM: usize = 2;
pub(crate) const SOCK_RAW: usize = 3;
pub(crate) const PF_ROUTE: usize = 17;

const SIOCSIFFLAGS: usize = 0x8020_6910;
const SIOCGIFFLAGS: usize = 0xc020_6911;
const SIOCGIFINDEX: usize = 0xc020_6920;
const SIOCDIFADDR: usize = 0x8020_6919;
const SIOCAIFADDR: usize = 0x8044_692b;
const SIOCAIFADDR_IN6: usize = 0x8088_691b;
const IFF_UP: u16 = 1;

const NET_RT_IFLIST: i32 = 3;
const RTM_VERSION: u8 = 5;
const RTM_ADD: u8 = 1;
const RTM_DELETE: u8 = 2;
const RTM_GET: u8 = 4;
const RTM_NEWADDR: u8 = 12;
const RTM_IFINFO: u8 = 14;
/// Bytes of struct rt_msghdr, struct if_msghdr and struct ifa_msghdr.
const RTM_BYTES: usize = 152;
const IFM_BYTES: usize = 168;
const IFAM_BYTES: usize = 20;
const RTA_DST: u32 = 1;
const RTA_GATEWAY: u32 = 2;
const RTA_NETMASK: u32 = 4;
const RTA_NETMASK_PLACE: usize = 2;
const RTA_IFP_PLACE: usize = 4;
const RTA_IFA_PLACE: usize = 5;
const RTA_GATEWAY_PLACE: usize = 1;
const RTA_PLACES: usize = 8;
/// RTF_UP, RTF_GATEWAY, RTF_STATIC.
const RTF_DEFAULT: u32 = 0x803;
/// Room for what an interface has, and for one routing message.
pub(crate) const LIST_BYTES: usize = 16 << 10;
const MESSAGE_BYTES: usize = 1024;
/// Messages on a routing socket that are not for us.
const STRANGE_MAX: usize = 256;

/// `struct sockaddr_in` or `sockaddr_in6`, as much of it as the kind has.
#[derive(Clone, Copy)]
pub(crate) struct SocketAddress {
    bytes: [u8; 32],
    length: usize,
}

impl SocketAddress {
    pub(crate) fn new(six: bool, address: &[u8; 16]) -> SocketAddress {
        let mut bytes = [0; 32];
        let length = if six { 28 } else { 16 };
        (bytes[0], bytes[1]) = (length as u8, if six { AF_INET6 } else { AF_INET });
        match six {
            true => bytes[8..24].copy_from_slice(address),
            false => bytes[4..8].copy_from_slice(&address[..4]),
        }
        SocketAddress { bytes, length }
    }

    fn mask(six: bool, bits: u8) -> SocketAddress {
        let mut mask = [0u8; 16];
        for bit in 0..usize::from(bits).min(128) {
            mask[bit / 8] |= 0x80 >> (bit % 8);
        }
        SocketAddress::new(six, &mask)
    }

    /// One of IPv6 on that link: sin6_scope_id.
    pub(crate) fn on_link(&mut self, index: u16) {
        self.bytes[24..26].copy_from_slice(&index.to_le_bytes());
    }

    pub(crate) fn exact(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// As routing messages have it: up to a multiple of eight.
    fn padded(&self) -> &[u8] {
        &self.bytes[..self.length.next_multiple_of(8)]
    }
}

/// A socket that is closed when it is done with.
pub(crate) struct Socket(pub(crate) i32);

impl Socket {
    pub(crate) fn open(family: usize, kind: usize, protocol: usize) -> Result<Socket, Refusal> {
        sys::socket(family, kind, protocol).map(Socket).map_err(|error| match error {
            sys::EAFNOSUPPORT | sys::EPROTONOSUPPORT if family == usize::from(AF_INET6) => (
                STATUS_NO_DEVICE,
                "the guest's system has no IPv6: its kernel is built without it (options INET6); give it addresses of IPv4 only",
            ),
            sys::EAFNOSUPPORT | sys::EPROTONOSUPPORT => {
                (STATUS_NO_DEVICE, "the guest's system has no IPv4: its kernel is built without it (options INET)")
            }
            _ => refused(error),
        })
    }

    pub(crate) fn of(six: bool) -> Result<Socket, Refusal> {
        Socket::open(usize::from(if six { AF_INET6 } else { AF_INET }), SOCK_DGRAM, 0)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        sys::close(self.0);
    }
}

pub(crate) fn refused(_: i32) -> Refusal {
    (STATUS_NOT_ALLOWED, "the guest's system does not take the addresses or the gateway; is the agent root?")
}

/// `vtnetN`, as requests begin.
fn name(number: u32) -> Result<[u8; 16], Refusal> {
    let digit = u8::try_from(number).ok().filter(|number| *number < 10).ok_or(NO_INTERFACE)?;
    let mut name = [0; 16];
    name[..5].copy_from_slice(b"vtnet");
    name[5] = b'0' + digit;
    Ok(name)
}

/// A request of `N` bytes that begins with the interface's name.
pub(crate) fn request<const N: usize>(number: u32, parts: &[(usize, &[u8])]) -> Result<[u8; N], Refusal> {
    let mut request = [0; N];
    request[..16].copy_from_slice(&name(number)?);
    for (at, part) in parts {
        request[*at..*at + part.len()].copy_from_slice(part);
    }
    Ok(request)
}

/// The system's number of it.
pub(crate) fn index_of(number: u32) -> Result<u16, Refusal> {
    let mut wanted: [u8; 32] = request(number, &[])?;
    let socket = Socket::open(AF_LOCAL, SOCK_DGRAM, 0)?;
    match sys::ioctl(socket.0, SIOCGIFINDEX, &mut wanted) {
        Ok(()) => Ok(u16::from_le_bytes([wanted[16], wanted[17]])),
        Err(sys::ENXIO) => Err(NO_INTERFACE),
        Err(error) => Err(refused(error)),
    }
}

/// The interfaces that are named, each once.
fn interfaces(told: Addresses) -> impl Iterator<Item = u32> {
    (0..INTERFACES_MAX as u32).filter(move |number| told.into_iter().any(|address| address.interface == *number))
}

/// Takes the addresses of before away: what comes next may make the system tell its neighbours which addresses it has.
pub(crate) fn clear(told: Addresses) -> Result<(), Refusal> {
    // One that no interface could have.
    if told.into_iter().any(|address| address.interface as usize >= INTERFACES_MAX) {
        return Err(NO_INTERFACE);
    }
    for number in interfaces(told) {
        let index = index_of(number)?;
        for six in [false, true] {
            if let Some((through, _)) = default_route(six)?
                && through == index
            {
                remove_default(six)?;
            }
        }
        let mut room = [0; LIST_BYTES];
        let listed = list(index, &mut room)?;
        for address in own_addresses(listed, number) {
            if address.six {
                six::remove(&address)?;
                continue;
            }
            let place = SocketAddress::new(false, &address.bytes);
            let mut gone: [u8; 32] = request(number, &[(16, place.exact())])?;
            sys::ioctl(Socket::of(false)?.0, SIOCDIFADDR, &mut gone).map_err(refused)?;
        }
    }
    Ok(())
}

/// Gives the interfaces theirs. `macs`: their Ethernet addresses, which they have already.
pub(crate) fn set(told: Addresses, macs: Interfaces) -> Result<(), Refusal> {
    for number in interfaces(told) {
        let index = index_of(number)?;
        // First: while it is down the system announces no address to the neighbours, and takes those of IPv6 for doubtful.
        bring_up(number)?;
        let own = || told.into_iter().filter(|address| address.interface == number && !address.gateway);
        add_all(number, index, own(), macs)?;
        own().filter(|address| address.six).try_for_each(|address| six::expect_used(&address))?;
        for gateway in told.into_iter().filter(|address| address.interface == number && address.gateway) {
            if default_route(gateway.six)?.is_some() {
                remove_default(gateway.six)?;
            }
            let mut place = SocketAddress::new(gateway.six, &gateway.bytes);
            if is_of_link(gateway.six, &gateway.bytes) {
                place.on_link(index);
            }
            route(RTM_ADD, gateway.six, Some(&place), &mut [0; MESSAGE_BYTES])?;
        }
    }
    Ok(())
}

/// Puts what these interfaces have now, and the default routes through them.
pub(crate) fn put(told: Addresses, out: &mut Output) -> Result<(), Refusal> {
    let mut found = [None; ADDRESSES_MAX];
    let mut count = 0;
    let mut take = |address: Address| {
        *found.get_mut(count).ok_or(NO_ROOM)? = Some(address);
        count += 1;
        Ok(())
    };
    for number in interfaces(told) {
        let index = index_of(number)?;
        let mut room = [0; LIST_BYTES];
        let listed = list(index, &mut room)?;
        own_addresses(listed, number).try_for_each(&mut take)?;
        for (six, bits) in [(false, 32), (true, 128)] {
            if let Some((through, bytes)) = default_route(six)?
                && through == index
            {
                take(Address { interface: number, six, bits, gateway: true, bytes })?;
            }
        }
    }
    out.put32(count as u32);
    found.iter().flatten().for_each(|address| out.put(&address.encode()));
    Ok(())
}

fn add_all(number: u32, index: u16, own: impl Iterator<Item = Address> + Clone, mut macs: Interfaces) -> Result<(), Refusal> {
    let mut room = [0; LIST_BYTES];
    let listed = list(index, &mut room)?;
    let mac = macs.find(|(interface, _)| *interface == number).map(|(_, mac)| mac);
    let renewed = mac.filter(|mac| six::is_of_another(listed, number, mac));
    let wants_six = own.clone().any(|address| address.six);
    // Kernels without IPv6 come here with neither.
    let undoubted = if wants_six || renewed.is_some() { Some(six::Undoubted::begin(number)?) } else { None };
    if let Some(undoubted) = &undoubted {
        if let Some(mac) = renewed
            && (wants_six || undoubted.is_on()?)
        {
            six::renew(undoubted, listed, &mac)?;
        }
        if wants_six {
            undoubted.switch_on()?;
        }
    }
    for address in own {
        match address.six {
            true => add_six(&address)?,
            false => add_four(&address)?,
        }
    }
    Ok(())
}

fn add_four(address: &Address) -> Result<(), Refusal> {
    let (place, mask) = (SocketAddress::new(false, &address.bytes), SocketAddress::mask(false, address.bits));
    // struct ifaliasreq: name, address, broadcast address (none: the network's last), mask, vhid.
    let mut alias: [u8; 68] = request(address.interface, &[(16, place.exact()), (48, mask.exact())])?;
    sys::ioctl(Socket::of(false)?.0, SIOCAIFADDR, &mut alias).map_err(refused)
}

pub(crate) fn add_six(address: &Address) -> Result<(), Refusal> {
    let (place, mask) = (SocketAddress::new(true, &address.bytes), SocketAddress::mask(true, address.bits));
    // struct in6_aliasreq: name, address, the other end's, mask, flags, lifetimes (two times, two durations), vhid.
    let parts = [(16, place.exact()), (72, mask.exact()), (120, &[0xff; 8][..])];
    let mut alias: [u8; 136] = request(address.interface, &parts)?;
    sys::ioctl(Socket::of(true)?.0, SIOCAIFADDR_IN6, &mut alias).map_err(refused)
}

fn bring_up(number: u32) -> Result<(), Refusal> {
    let socket = Socket::of(false)?;
    let mut wanted: [u8; 32] = request(number, &[])?;
    sys::ioctl(socket.0, SIOCGIFFLAGS, &mut wanted).map_err(refused)?;
    let flags = u16::from_le_bytes([wanted[16], wanted[17]]);
    if flags & IFF_UP == 0 {
        wanted[16..18].copy_from_slice(&(flags | IFF_UP).to_le_bytes());
        sys::ioctl(socket.0, SIOCSIFFLAGS, &mut wanted).map_err(refused)?;
    }
    Ok(())
}

/// What the system says of an interface, as messages.
pub(crate) fn list(index: u16, room: &mut [u8; LIST_BYTES]) -> Result<&[u8], Refusal> {
    const CTL_NET: i32 = 4;
    let read = sys::sysctl_of(&[CTL_NET, PF_ROUTE as i32, 0, 0, NET_RT_IFLIST, index.into()], room);
    let count = read.map_err(|error| if error == sys::ENOMEM { NO_ROOM } else { refused(error) })?;
    Ok(&room[..count])
}

/// The addresses in such a list, but those that the system makes for the link itself.
fn own_addresses(list: &[u8], number: u32) -> impl Iterator<Item = Address> {
    all_addresses(list, number).filter(|address| !is_of_link(address.six, &address.bytes))
}

pub(crate) fn all_addresses(list: &[u8], number: u32) -> impl Iterator<Item = Address> {
    messages(list).filter_map(move |(kind, message)| {
        if kind != RTM_NEWADDR {
            return None;
        }
        let places = places(message, IFAM_BYTES, 4);
        let own = places[RTA_IFA_PLACE]?;
        let six = match own.get(1)? {
            &AF_INET => false,
            &AF_INET6 => true,
            _ => return None,
        };
        let bytes = address_of(own, six)?;
        // A mask may be cut where its zeros begin.
        let mask = places[RTA_NETMASK_PLACE].unwrap_or_default();
        let range = if six { 8..24 } else { 4..8 };
        let bits = range.filter_map(|at| mask.get(at)).map(|byte| byte.count_ones()).sum::<u32>() as u8;
        Some(Address { interface: number, six, bits, gateway: false, bytes })
    })
}

/// fe80::/10.
pub(crate) fn is_of_link(six: bool, bytes: &[u8; 16]) -> bool {
    six && bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80
}

fn address_of(place: &[u8], six: bool) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    match six {
        true => bytes.copy_from_slice(place.get(8..24)?),
        false => bytes[..4].copy_from_slice(place.get(4..8)?),
    }
    if is_of_link(six, &bytes) {
        // Older systems, and those that are told to (net.inet6.ip6.deembed_scopeid=0), keep the link's number in it.
        (bytes[2], bytes[3]) = (0, 0);
    }
    Some(bytes)
}

/// Kinds and messages.
pub(crate) fn messages(list: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = list;
    core::iter::from_fn(move || {
        let length = usize::from(u16::from_le_bytes([*rest.first()?, *rest.get(1)?]));
        let message = rest.get(..length).filter(|_| length >= 4)?;
        rest = &rest[length..];
        Some((message[3], message))
    })
}

/// The socket addresses behind a header; which are there is said by a word of it.
fn places(message: &[u8], header: usize, word: usize) -> [Option<&[u8]>; RTA_PLACES] {
    let mut places = [None; RTA_PLACES];
    let Some(which) = message.get(word..word + 4).and_then(|word| word.first_chunk::<4>()) else { return places };
    let which = u32::from_le_bytes(*which);
    let mut rest = message.get(header..).unwrap_or_default();
    for (bit, place) in places.iter_mut().enumerate() {
        if which >> bit & 1 == 0 {
            continue;
        }
        let length = usize::from(*rest.first().unwrap_or(&0));
        *place = rest.get(..length);
        rest = rest.get(length.max(1).next_multiple_of(8)..).unwrap_or_default();
    }
    places
}

/// Through which interface, and by which gateway.
fn default_route(six: bool) -> Result<Option<(u16, [u8; 16])>, Refusal> {
    let mut room = [0; MESSAGE_BYTES];
    let Some(answer) = route(RTM_GET, six, None, &mut room)? else { return Ok(None) };
    let index = u16::from_le_bytes([answer[4], answer[5]]);
    let gateway = places(answer, RTM_BYTES, 12)[RTA_GATEWAY_PLACE];
    let family = if six { AF_INET6 } else { AF_INET };
    // One that leads to an interface and to no gateway has a link's address here.
    let bytes = match gateway {
        Some(place) if place.get(1) == Some(&family) => address_of(place, six).unwrap_or_default(),
        _ => [0; 16],
    };
    Ok(Some((index, bytes)))
}

fn remove_default(six: bool) -> Result<(), Refusal> {
    route(RTM_DELETE, six, None, &mut [0; MESSAGE_BYTES]).map(|_| ())
}

/// Says something about the default route. The answer to a question; `None`: there is no such route, or it was no question.
fn route<'a>(
    kind: u8,
    six: bool,
    gateway: Option<&SocketAddress>,
    room: &'a mut [u8; MESSAGE_BYTES],
) -> Result<Option<&'a [u8]>, Refusal> {
    /// Each message has a number of its own: with several CPUs the system gives what it says about one to all routing sockets a moment later, and
    /// so to that of the next, too.
    static MESSAGES: AtomicU32 = AtomicU32::new(1);
    let sequence = MESSAGES.fetch_add(1, Ordering::Relaxed).to_le_bytes();
    let nowhere = SocketAddress::new(six, &[0; 16]);
    let mask = SocketAddress::mask(six, 0);
    let mut length = RTM_BYTES;
    let mut message = [0u8; RTM_BYTES + 3 * 32];
    for place in [Some(&nowhere), gateway, Some(&mask)].into_iter().flatten() {
        let bytes = place.padded();
        message[length..length + bytes.len()].copy_from_slice(bytes);
        length += bytes.len();
    }
    let which = RTA_DST | RTA_NETMASK | if gateway.is_some() { RTA_GATEWAY } else { 0 };
    let flags = if kind == RTM_ADD { RTF_DEFAULT } else { 0 };
    message[..2].copy_from_slice(&(length as u16).to_le_bytes());
    (message[2], message[3]) = (RTM_VERSION, kind);
    message[8..12].copy_from_slice(&flags.to_le_bytes());
    message[12..16].copy_from_slice(&which.to_le_bytes());
    message[20..24].copy_from_slice(&sequence);
    let socket = Socket::open(PF_ROUTE, SOCK_RAW, 0)?;
    match sys::write(socket.0, &message[..length]) {
        Ok(_) => {}
        // There is none; or this kernel knows no such addresses (no INET, or no INET6), so that it has none.
        Err(sys::ESRCH | sys::EAFNOSUPPORT) if kind != RTM_ADD => return Ok(None),
        Err(error) => return Err(refused(error)),
    }
    if kind != RTM_GET {
        return Ok(None);
    }
    let own = sys::own_pid().to_le_bytes();
    for _ in 0..STRANGE_MAX {
        let mut watched = [PollFd { fd: socket.0, events: sys::POLLIN, revents: 0 }];
        // A signal may end it early; what is read then is nothing, or something.
        sys::poll(&mut watched, Some(Time { seconds: 1, nanoseconds: 0 }));
        if watched[0].revents == 0 {
            continue;
        }
        let count = sys::read(socket.0, room).map_err(refused)?;
        let answer = &room[..count];
        if count >= RTM_BYTES && answer[3] == RTM_GET && answer[16..20] == own && answer[20..24] == sequence {
            return Ok(Some(&room[..count]));
        }
    }
    Err((STATUS_FAILED, "the guest's system does not say what its default route is"))
}

/// Gives the network interface `vtnetN` this Ethernet address (sys/net/if.c, SIOCSIFLLADDR). With another one than before it forgets its neighbours: it is another
/// machine now, perhaps on another link.
pub(crate) fn set_mac(number: u32, mac: &[u8; MAC_BYTES]) -> Result<(), Refusal> {
    const SIOCSIFLLADDR: usize = 0x8020_693c;
    const AF_LINK: u8 = 18;
    let mut wanted: [u8; 32] = request(number, &[(16, &[MAC_BYTES as u8, AF_LINK]), (18, mac)])?;
    let index = index_of(number)?;
    let mut room = [0; LIST_BYTES];
    // One with more addresses than there is room for gets its Ethernet address all the same.
    let listed = list(index, &mut room).unwrap_or_default();
    // The interface is down for a moment. Should the system look at its addresses of IPv6 just then (it does every second), they would be doubtful again.
    let has_six = all_addresses(listed, number).any(|address| address.six);
    let _undoubted = has_six.then(|| six::Undoubted::begin(number).ok()).flatten();
    let socket = Socket::open(AF_LOCAL, SOCK_DGRAM, 0)?;
    match sys::ioctl(socket.0, SIOCSIFLLADDR, &mut wanted) {
        Ok(()) => {}
        Err(sys::ENXIO) => return Err(NO_INTERFACE),
        Err(_) => return Err((STATUS_NOT_ALLOWED, "the guest's system does not take the Ethernet address")),
    }
    if mac_in(listed) != Some(*mac) {
        neighbours::forget(index);
    }
    Ok(())
}

/// The Ethernet address that such a list tells.
fn mac_in(list: &[u8]) -> Option<[u8; MAC_BYTES]> {
    let (_, message) = messages(list).find(|(kind, _)| *kind == RTM_IFINFO)?;
    // struct sockaddr_dl: length, family, index, kind, length of name and of address, selector's; then the name and the address.
    let place = places(message, IFM_BYTES, 4)[RTA_IFP_PLACE]?;
    let (name, address) = (usize::from(*place.get(5)?), usize::from(*place.get(6)?));
    place.get(8 + name..8 + name + address)?.try_into().ok()
}
