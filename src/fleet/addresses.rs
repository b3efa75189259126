//! IP addresses and gateways that a clone's guest is given by its agent: which there can be, and whether the guest has them.
//!
//! They are checked here, before there is a clone: an agent does what it is told. A guest that reads other ones back than it was told is
//! not handed over.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::network::VmNetwork;
use crate::agent::wire;

/// Most of each of an interface.
pub const ADDRESSES_MAX: usize = 8;
pub const GATEWAYS_MAX: usize = 2;

/// What the guest is to have on one interface; nothing: what it has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// With the bits of the network behind it that are the interface's.
    pub addresses: Vec<IpNet>,
    /// Default routes, of each kind of address at most one in the whole guest.
    pub gateways: Vec<IpAddr>,
}

/// Why a guest cannot be given these.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("{0:?} is no address with its prefix; write 10.0.0.5/24 or fd00::5/64")]
    NotAnAddress(String),
    #[error("{0:?} is no address of a gateway; write 10.0.0.1 or fd00::1")]
    NotAGateway(String),
    #[error("more than {ADDRESSES_MAX} addresses, or {GATEWAYS_MAX} gateways, for one interface; give fewer")]
    TooMany,
    #[error("{address} is no address for a guest: {why}")]
    Unfit { address: String, why: &'static str },
    #[error("{0} is given twice; each address is for one interface")]
    Twice(IpAddr),
    #[error(
        "the gateway {0} is in none of the networks of its interface's addresses; give an address of its network, too"
    )]
    Unreachable(IpAddr),
    #[error(
        "a guest has one default route of each kind of address: give one gateway of IPv4 and one of IPv6 at most"
    )]
    Gateways,
    #[error("gateway {0} without an address; give ip=ADDRESS/PREFIX as well")]
    Alone(IpAddr),
    #[error(
        "a VM that is booted gives itself its addresses; addresses can be asked for when a snapshot is cloned"
    )]
    Boot,
    #[error("addresses go with a TAP: a guest in a slot keeps its own, and one without a link needs none")]
    Link,
    #[error(
        "this clone's guest cannot be given addresses: that takes identity MANAGED, and in the snapshot an agent that knows how; with an older one \
         boot the image again with the agent of this release (`coldspark agent`), take a new snapshot, or leave the addresses out and change them in the guest"
    )]
    CannotBeTold,
}

impl Given {
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.gateways.is_empty()
    }

    fn check(&self) -> Result<(), AddressError> {
        if self.addresses.len() > ADDRESSES_MAX || self.gateways.len() > GATEWAYS_MAX {
            return Err(AddressError::TooMany);
        }
        for address in &self.addresses {
            fits(address).map_err(|why| AddressError::Unfit { address: address.to_string(), why })?;
        }
        for gateway in &self.gateways {
            unicast(gateway).map_err(|why| AddressError::Unfit { address: gateway.to_string(), why })?;
            let mut of_kind = self
                .addresses
                .iter()
                .filter(|address| address.addr().is_ipv4() == gateway.is_ipv4())
                .peekable();
            if of_kind.peek().is_none() {
                return Err(AddressError::Alone(*gateway));
            }
            if self.addresses.iter().any(|address| address.addr() == *gateway) {
                return Err(AddressError::Twice(*gateway));
            }
            if !of_kind.any(|address| address.contains(gateway)) && !is_of_link(gateway) {
                return Err(AddressError::Unreachable(*gateway));
            }
        }
        Ok(())
    }
}

/// Checks what all interfaces of a guest are to be given.
pub fn check<'a>(all: impl Iterator<Item = &'a Given> + Clone) -> Result<(), AddressError> {
    all.clone().try_for_each(Given::check)?;
    let mut seen = HashSet::new();
    for address in all.clone().flat_map(|given| &given.addresses) {
        if !seen.insert(address.addr()) {
            return Err(AddressError::Twice(address.addr()));
        }
    }
    let of = |four: bool| {
        all.clone().flat_map(|given| &given.gateways).filter(move |gateway| gateway.is_ipv4() == four)
    };
    if of(true).count() > 1 || of(false).count() > 1 {
        return Err(AddressError::Gateways);
    }
    Ok(())
}

/// One that a host may have.
fn unicast(address: &IpAddr) -> Result<(), &'static str> {
    match address {
        _ if address.is_unspecified() => Err("it is the unspecified one"),
        _ if address.is_multicast() => Err("it is a group's"),
        _ if address.is_loopback() => Err("it is a loopback address"),
        IpAddr::V4(four) if four.is_broadcast() || four.octets()[0] == 0 || four.octets()[0] >= 240 => {
            Err("it is reserved")
        }
        IpAddr::V6(six) if six.to_ipv4_mapped().is_some() => Err("it is one of IPv4; write it so"),
        _ => Ok(()),
    }
}

fn fits(address: &IpNet) -> Result<(), &'static str> {
    unicast(&address.addr())?;
    match address {
        _ if address.prefix_len() == 0 => Err("a network of all addresses (/0) is none"),
        IpNet::V4(four)
            if four.prefix_len() < 31
                && (four.addr() == four.network() || four.addr() == four.broadcast()) =>
        {
            Err("it is its network's own first or last")
        }
        IpNet::V6(six) if six.prefix_len() < 127 && six.addr() == six.network() => {
            Err("it is that of its network's routers (the first)")
        }
        IpNet::V6(six) if is_of_link(&six.addr().into()) => Err("guests make their own link-local addresses"),
        _ => Ok(()),
    }
}

/// fe80::/10.
fn is_of_link(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(six) if six.segments()[0] & 0xffc0 == 0xfe80)
}

/// What the agent of a guest with these interfaces is told.
pub fn told(networks: &[VmNetwork]) -> Vec<wire::Address> {
    let mut told = Vec::new();
    for (interface, network) in (0..).zip(networks) {
        let own = network.given.addresses.iter().map(|net| (net.addr(), net.prefix_len(), false));
        let gateways = network
            .given
            .gateways
            .iter()
            .map(|gateway| (*gateway, if gateway.is_ipv4() { 32 } else { 128 }, true));
        told.extend(own.chain(gateways).map(|(address, bits, gateway)| {
            let (six, bytes) = match address {
                IpAddr::V4(four) => {
                    let mut bytes = [0; 16];
                    let (front, _) = bytes.split_at_mut(4);
                    front.copy_from_slice(&four.octets());
                    (false, bytes)
                }
                IpAddr::V6(six) => (true, six.octets()),
            };
            wire::Address { interface, six, bits, gateway, bytes }
        }));
    }
    told
}

/// Whether a guest has all that it was told, and nothing else of IPv4. (Of IPv6 a router may have given it more meanwhile.)
pub fn agree(told: &[wire::Address], found: &[wire::Address]) -> bool {
    let there = told.iter().all(|address| found.contains(address));
    there && found.iter().filter(|address| !address.six).all(|address| told.contains(address))
}

/// For people.
pub fn text(address: &wire::Address) -> String {
    let ip: IpAddr = match (address.six, address.bytes) {
        (true, bytes) => Ipv6Addr::from(bytes).into(),
        (false, [a, b, c, d, ..]) => [a, b, c, d].into(),
    };
    match address.gateway {
        true => format!("gateway {ip} by interface {}", address.interface),
        false => format!("{ip}/{} on interface {}", address.bits, address.interface),
    }
}

#[cfg(test)]
mod tests {
    use super::super::network::LinkRequest;
    use super::*;

    fn given(addresses: &[&str], gateways: &[&str]) -> Given {
        Given {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            gateways: gateways.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn what_no_guest_can_have_is_refused_with_the_reason() {
        let good = [
            given(&[], &[]),
            given(&["10.0.0.5/24"], &["10.0.0.1"]),
            given(&["10.0.0.4/31", "192.0.2.1/32"], &["10.0.0.5"]),
            given(&["fd00::5/64"], &["fe80::1"]),
            given(&["10.0.0.5/24", "fd00::5/64"], &["10.0.0.1", "fd00::1"]),
        ];
        for given in &good {
            given.check().unwrap_or_else(|error| panic!("{given:?}: {error}"));
        }
        for (addresses, gateways) in [
            (&["0.0.0.0/8"][..], &[][..]),
            (&["10.0.0.0/24"], &[]),
            (&["10.0.0.255/24"], &[]),
            (&["10.0.0.5/0"], &[]),
            (&["127.0.0.1/8"], &[]),
            (&["224.0.0.5/24"], &[]),
            (&["255.255.255.255/32"], &[]),
            (&["::/64"], &[]),
            (&["::1/128"], &[]),
            (&["fe80::5/64"], &[]),
            (&["fd00::/64"], &[]),
            (&["ff02::5/64"], &[]),
            (&["::ffff:10.0.0.5/112"], &[]),
            (&["10.0.0.5/24"], &["10.0.1.1"]),
            (&["10.0.0.5/24"], &["10.0.0.5"]),
            (&["10.0.0.5/24"], &["fd00::1"]),
            (&["10.0.0.5/24"], &["0.0.0.0"]),
            (&[], &["10.0.0.1"]),
        ] {
            let wrong = given(addresses, gateways);
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        let many = given(&["10.0.0.5/24"; ADDRESSES_MAX + 1], &[]);
        assert_eq!(many.check(), Err(AddressError::TooMany));
        let both = |one: &Given, two: &Given| check([one, two].into_iter());
        let [other, same] = [given(&["10.1.0.5/24"], &["10.1.0.1"]), given(&["10.0.0.5/16"], &[])];
        assert_eq!(both(&good[1], &other), Err(AddressError::Gateways));
        assert_eq!(both(&good[1], &same), Err(AddressError::Twice([10, 0, 0, 5].into())));
        both(&good[1], &good[3]).unwrap();
    }

    #[test]
    fn a_guest_is_believed_when_it_has_all_that_it_was_told_and_nothing_of_before() {
        let network = |given| VmNetwork { link: LinkRequest::Down, mac: [2; 6], mtu: None, given };
        let networks =
            [network(given(&[], &[])), network(given(&["10.0.0.5/24", "fd00::5/64"], &["10.0.0.1"]))];
        let told = told(&networks);
        let texts: Vec<String> = told.iter().map(text).collect();
        assert_eq!(
            texts,
            ["10.0.0.5/24 on interface 1", "fd00::5/64 on interface 1", "gateway 10.0.0.1 by interface 1"]
        );
        let mut found = told.clone();
        found.reverse();
        assert!(agree(&told, &found));
        assert!(!agree(&told, &found[1..]) && !agree(&told, &found[..2]));
        let other = |six| wire::Address { six, bytes: [9; 16], ..told[0] };
        assert!(agree(&told, &[&found[..], &[other(true)]].concat()));
        assert!(!agree(&told, &[&found[..], &[other(false)]].concat()));
        assert!(agree(&[], &[]));
    }
}
