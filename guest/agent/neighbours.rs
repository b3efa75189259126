//! What this machine knows of its neighbours, and they of it: which Ethernet address is behind which IP address.
//!
//! The system keeps what it has learnt for minutes (IPv4: twenty), and a clone has what its source has learnt on another link, perhaps: that is forgotten when its
//! Ethernet address changes. Neighbours keep what they have learnt of whoever had the clone's addresses before: they are told. The system does so itself for IPv4 (gratuitous
//! ARP), and for IPv6 not at all. Facts: sys/net/{rtsock,if_llatbl}.c, sys/netinet/in.c, sys/netinet6/in6.c; RFC 4861, 7.2.6.

use crate::network::{
    AF_INET, AF_INET6, LIST_BYTES, PF_ROUTE, SOCK_RAW, Socket, SocketAddress, all_addresses, index_of, is_of_link, list, messages,
    refused,
};
use crate::six::is_used;
use crate::streams::Refusal;
use crate::sys;
use crate::wire::*;

/// How often the list is read, should it be longer than there is room for.
const ROUNDS_MAX: usize = 16;

/// Has the system ask anew for every neighbour on an interface, but for those that somebody has told it (`arp -s`, `ndp -s`).
///
/// What cannot be forgotten is left: what is wrong of it goes by itself, only later.
pub(crate) fn forget(index: u16) {
    const CTL_NET: i32 = 4;
    const NET_RT_FLAGS: i32 = 2;
    const RTF_LLINFO: i32 = 0x400;
    const RTM_DELETE: u8 = 2;
    /// RTF_STATIC, RTF_PINNED: its own addresses.
    const KEPT: u32 = 0x800 | 0x10_0000;
    let Ok(socket) = Socket::open(PF_ROUTE, SOCK_RAW, 0) else { return };
    for family in [AF_INET, AF_INET6] {
        for _ in 0..ROUNDS_MAX {
            let mut room = [0; LIST_BYTES];
            let read = sys::sysctl_of(&[CTL_NET, PF_ROUTE as i32, 0, family.into(), NET_RT_FLAGS, RTF_LLINFO], &mut room);
            let (count, more) = match read {
                Ok(count) => (count, false),
                // As much as there was room for.
                Err(sys::ENOMEM) => (room.len(), true),
                Err(_) => break,
            };
            let mut forgotten = false;
            for (_, message) in messages(&room[..count]) {
                // struct rt_msghdr: length, version, kind, interface, flags, ...
                let (Some(own), Some(flags)) = (message.get(4..6), message.get(8..12)) else { break };
                let kept = flags.first_chunk().is_none_or(|flags| u32::from_le_bytes(*flags) & KEPT != 0);
                if kept || own != index.to_le_bytes() {
                    continue;
                }
                // What it says of a neighbour is, but for the kind, what it takes about one.
                let mut told = [0; 512];
                let Some(place) = told.get_mut(..message.len()) else { continue };
                place.copy_from_slice(message);
                place[3] = RTM_DELETE;
                forgotten |= sys::write(socket.0, place).is_ok();
            }
            if !more || !forgotten {
                break;
            }
        }
    }
}

/// Tells the neighbours which Ethernet address these interfaces' IPv6 addresses have now, as the system does for those of IPv4 only: who has spoken with another
/// machine under such an address would send to that one for some seconds.
///
/// What cannot be said is left: neighbours find out by themselves, only later.
pub(crate) fn announce(interfaces: Interfaces) {
    for (interface, mac) in interfaces {
        let mut room = [0; LIST_BYTES];
        let Ok(index) = index_of(interface) else { continue };
        let Ok(listed) = list(index, &mut room) else { continue };
        for address in all_addresses(listed, interface).filter(|address| address.six) {
            if is_used(&address) == Ok(true) {
                let _ = announce_one(&address, index, &mac);
            }
        }
    }
}

fn announce_one(address: &Address, index: u16, mac: &[u8; MAC_BYTES]) -> Result<(), Refusal> {
    const IPPROTO_IPV6: usize = 41;
    const IPPROTO_ICMPV6: usize = 58;
    const IPV6_MULTICAST_IF: usize = 9;
    const IPV6_MULTICAST_HOPS: usize = 10;
    const IPV6_MULTICAST_LOOP: usize = 11;
    const ND_NEIGHBOR_ADVERT: u8 = 136;
    const ROUTER: u32 = 0x8000_0000;
    const OVERRIDE: u32 = 0x2000_0000;
    const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

    let mut said = [0u8; 32];
    said[0] = ND_NEIGHBOR_ADVERT;
    // Who has been a router and does not say so is none any more.
    let routes = sys::sysctl_number("net.inet6.ip6.forwarding").is_some_and(|on| on != 0);
    said[4..8].copy_from_slice(&(OVERRIDE | if routes { ROUTER } else { 0 }).to_be_bytes());
    said[8..24].copy_from_slice(&address.bytes);
    // Target link-layer address, in units of eight bytes.
    (said[24], said[25]) = (2, 1);
    said[26..].copy_from_slice(mac);

    let socket = Socket::open(usize::from(AF_INET6), SOCK_RAW, IPPROTO_ICMPV6)?;
    // The system's own copy of it would be "a duplicate address" to it.
    for (option, value) in [(IPV6_MULTICAST_IF, index.into()), (IPV6_MULTICAST_HOPS, 255), (IPV6_MULTICAST_LOOP, 0)] {
        sys::set_option(socket.0, IPPROTO_IPV6, option, value).map_err(refused)?;
    }
    let mut from = SocketAddress::new(true, &address.bytes);
    if is_of_link(true, &address.bytes) {
        from.on_link(index);
    }
    sys::bind(socket.0, from.exact()).map_err(refused)?;
    let mut to = SocketAddress::new(true, &ALL_NODES);
    to.on_link(index);
    sys::send_to(socket.0, &said, to.exact()).map_err(refused)
}
