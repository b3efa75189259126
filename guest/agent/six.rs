//! What IPv6 needs besides: addresses that are used at once, and link-local ones of the clone's own.
//!
//! A new address is *tentative* for a second and more, while the system asks the link whether somebody has it already (RFC 4862): nothing is sent
//! from it, and what comes for it is dropped. The host has said whose it is, so nobody needs to be asked. IN6_IFF_NODAD of an address's own is ignored by
//! FreeBSD ("obsolete"); ND6_IFF_NO_DAD of the interface is what counts, from 12 to 15. Facts: sys/netinet6/{in6,in6_ifattach,nd6,nd6_nbr}.c,
//! {in6_var,nd6}.h.

use crate::network::{Socket, SocketAddress, add_six, all_addresses, is_of_link, refused, request};
use crate::streams::Refusal;
use crate::sys;
use crate::wire::*;

const SIOCDIFADDR_IN6: usize = 0x8120_6919;
const SIOCGIFAFLAG_IN6: usize = 0xc120_6949;
const SIOCGIFINFO_IN6: usize = 0xc048_696c;
const SIOCSIFINFO_FLAGS: usize = 0xc048_6957;
/// Bytes of struct in6_ifreq.
const REQUEST_BYTES: usize = 288;
/// IN6_IFF_TENTATIVE, IN6_IFF_DUPLICATED.
const IN6_IFF_NOTREADY: u32 = 2 | 4;
const ND6_IFF_IFDISABLED: u32 = 8;
const ND6_IFF_NO_DAD: u32 = 0x100;
const LINK_BITS: u8 = 64;

/// While it lives the interface asks nobody about its new addresses.
pub(crate) struct Undoubted {
    interface: u32,
    socket: Socket,
    /// The interface's own setting, or an administrator's, is the same.
    for_good: bool,
}

impl Undoubted {
    pub(crate) fn begin(interface: u32) -> Result<Undoubted, Refusal> {
        let socket = Socket::of(true)?;
        let flags = flags_of(&socket, interface)?;
        let for_good = flags & ND6_IFF_NO_DAD != 0;
        if !for_good {
            set_flags(&socket, interface, flags | ND6_IFF_NO_DAD)?;
        }
        Ok(Undoubted { interface, socket, for_good })
    }

    pub(crate) fn is_on(&self) -> Result<bool, Refusal> {
        Ok(flags_of(&self.socket, self.interface)? & ND6_IFF_IFDISABLED == 0)
    }

    /// An interface that has had no IPv6 may have been switched off for it (rc.conf without ipv6).
    pub(crate) fn switch_on(&self) -> Result<(), Refusal> {
        let flags = flags_of(&self.socket, self.interface)?;
        if flags & ND6_IFF_IFDISABLED == 0 {
            return Ok(());
        }
        set_flags(&self.socket, self.interface, flags & !ND6_IFF_IFDISABLED)?;
        // The system says nothing when it leaves it off.
        match self.is_on()? {
            true => Ok(()),
            false => Err((
                STATUS_FAILED,
                "IPv6 stays switched off on the guest's interface: somebody else on its link has its link-local address",
            )),
        }
    }
}

impl Drop for Undoubted {
    /// Later addresses are doubted as ever. (Those that are used already are not doubted again.)
    fn drop(&mut self) {
        if !self.for_good
            && let Ok(flags) = flags_of(&self.socket, self.interface)
        {
            let _ = set_flags(&self.socket, self.interface, flags & !ND6_IFF_NO_DAD);
        }
    }
}

/// `struct in6_ndireq`: name, then `struct nd_ifinfo`, whose sixth word are the flags.
fn info_of(socket: &Socket, interface: u32) -> Result<[u8; 72], Refusal> {
    let mut info = request(interface, &[])?;
    sys::ioctl(socket.0, SIOCGIFINFO_IN6, &mut info).map_err(refused)?;
    Ok(info)
}

fn flags_of(socket: &Socket, interface: u32) -> Result<u32, Refusal> {
    let info = info_of(socket, interface)?;
    Ok(u32::from_le_bytes([info[36], info[37], info[38], info[39]]))
}

fn set_flags(socket: &Socket, interface: u32, flags: u32) -> Result<(), Refusal> {
    let mut info = info_of(socket, interface)?;
    info[36..40].copy_from_slice(&flags.to_le_bytes());
    sys::ioctl(socket.0, SIOCSIFINFO_FLAGS, &mut info).map_err(refused)
}

/// The link-local address that the system makes of an Ethernet address (RFC 4291, appendix A).
fn of_mac(mac: &[u8; MAC_BYTES]) -> [u8; 16] {
    let [a, b, c, d, e, f] = *mac;
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

/// Whether it has a link-local address that was made of another Ethernet address than its own.
pub(crate) fn is_of_another(listed: &[u8], interface: u32, mac: &[u8; MAC_BYTES]) -> bool {
    of_others(listed, interface, mac).next().is_some()
}

fn of_others(listed: &[u8], interface: u32, mac: &[u8; MAC_BYTES]) -> impl Iterator<Item = Address> {
    let own = of_mac(mac);
    all_addresses(listed, interface).filter(move |address| {
        let made = address.bytes[11..13] == [0xff, 0xfe];
        is_of_link(address.six, &address.bytes) && made && address.bytes != own
    })
}

/// Has the interface's link-local address be one of its own Ethernet address. The system keeps the old one when the Ethernet address changes, so all clones on
/// one link would have that of their source: what a router answers to one (neighbours are asked from it) would reach another.
pub(crate) fn renew(undoubted: &Undoubted, listed: &[u8], mac: &[u8; MAC_BYTES]) -> Result<(), Refusal> {
    let interface = undoubted.interface;
    for old in of_others(listed, interface, mac) {
        remove(&old)?;
    }
    add_six(&Address { interface, six: true, bits: LINK_BITS, gateway: false, bytes: of_mac(mac) })
}

pub(crate) fn remove(address: &Address) -> Result<(), Refusal> {
    let place = SocketAddress::new(true, &address.bytes);
    let mut gone: [u8; REQUEST_BYTES] = request(address.interface, &[(16, place.exact())])?;
    sys::ioctl(Socket::of(true)?.0, SIOCDIFADDR_IN6, &mut gone).map_err(refused)
}

/// Whether something is sent from it and taken for it.
pub(crate) fn is_used(address: &Address) -> Result<bool, Refusal> {
    let place = SocketAddress::new(true, &address.bytes);
    let mut asked: [u8; REQUEST_BYTES] = request(address.interface, &[(16, place.exact())])?;
    sys::ioctl(Socket::of(true)?.0, SIOCGIFAFLAG_IN6, &mut asked).map_err(refused)?;
    Ok(u32::from_le_bytes([asked[16], asked[17], asked[18], asked[19]]) & IN6_IFF_NOTREADY == 0)
}

/// A clone is not handed over with an address that does not work.
pub(crate) fn expect_used(address: &Address) -> Result<(), Refusal> {
    match is_used(address)? {
        true => Ok(()),
        false => Err((
            STATUS_FAILED,
            "the guest's system has the IPv6 address that it was given, but does not use it: it is tentative, or a duplicate (ifconfig in the guest tells)",
        )),
    }
}
