//! Which addresses guests and slots have.
//!
//! Every guest has the same two addresses, those that its snapshot was taken with: the second of the guests' networks; the first is its
//! gateway. A slot has a number, and by it two addresses of its own: a pair out of the slots' networks, of which the first is
//! the host's end and the second the slot's, that leads to the guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Bits of a slot's own network.
pub const SLOT_BITS4: u8 = 2;
pub const SLOT_BITS6: u8 = 16;
/// Numbers of slots have at most five digits: they are part of the names of interfaces, which are short.
const NUMBERS_MAX: u32 = 65_536;

pub const GUESTS4: &str = "10.76.0.0/24";
pub const GUESTS6: &str = "fd63:6f6c:6473::/64";
pub const SLOTS4: &str = "10.77.0.0/16";
pub const SLOTS6: &str = "fd63:6f6c:6473:1::/64";

/// The networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub guests4: Ipv4Net,
    pub guests6: Ipv6Net,
    pub slots4: Ipv4Net,
    pub slots6: Ipv6Net,
}

/// The addresses of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub number: u32,
    /// By which the host reaches the guest; its own end is the one before.
    pub address4: Ipv4Addr,
    pub address6: Ipv6Addr,
}

impl Place {
    /// The host's ends.
    pub fn host4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address4.to_bits().wrapping_sub(1))
    }

    pub fn host6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.address6.to_bits().wrapping_sub(1))
    }
}

impl Default for Plan {
    fn default() -> Self {
        // Texts of ours, that a test reads.
        let four = |a, b, bits| Ipv4Net::new_assert(Ipv4Addr::new(10, a, b, 0), bits);
        let six = |last| Ipv6Net::new_assert(Ipv6Addr::new(0xfd63, 0x6f6c, 0x6473, last, 0, 0, 0, 0), 64);
        Self { guests4: four(76, 0, 24), guests6: six(0), slots4: four(77, 0, 16), slots6: six(1) }
    }
}

impl Plan {
    /// Checks what an administrator asks for.
    pub fn new(guests4: Ipv4Net, guests6: Ipv6Net, slots4: Ipv4Net, slots6: Ipv6Net) -> Result<Self, String> {
        for (what, network, least, most) in [
            ("--guest-network", IpNet::V4(guests4), 8, 29),
            ("--guest-network6", IpNet::V6(guests6), 8, 120),
            ("--slot-network", IpNet::V4(slots4), 8, 28),
            ("--slot-network6", IpNet::V6(slots6), 8, 96),
        ] {
            if network.addr() != network.network() {
                return Err(format!(
                    "{what} {network} has bits beyond its prefix; write {}",
                    network.trunc()
                ));
            }
            if !(least..=most).contains(&network.prefix_len()) {
                return Err(format!("{what} {network}: give a prefix of {least} to {most} bits"));
            }
            let address = network.addr();
            if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
                return Err(format!("{what} {network} is no network for machines"));
            }
        }
        let overlap4 = guests4.contains(&slots4) || slots4.contains(&guests4);
        let overlap6 = guests6.contains(&slots6) || slots6.contains(&guests6);
        if overlap4 || overlap6 {
            return Err("the networks of guests and slots overlap; give each its own".to_owned());
        }
        Ok(Self { guests4, guests6, slots4, slots6 })
    }

    /// How many slots there can be.
    pub fn capacity(&self) -> u32 {
        let bits = 32 - self.slots4.prefix_len() - SLOT_BITS4;
        1u32.checked_shl(bits.into()).unwrap_or(NUMBERS_MAX).min(NUMBERS_MAX)
    }

    /// The slot of this number, below [`Self::capacity`].
    pub fn place(&self, number: u32) -> Place {
        let (base4, base6) = (self.slots4.network().to_bits(), self.slots6.network().to_bits());
        Place {
            number,
            address4: Ipv4Addr::from_bits(base4 | number << SLOT_BITS4 | 2),
            address6: Ipv6Addr::from_bits(base6 | u128::from(number) << SLOT_BITS6 | 2),
        }
    }

    /// What guests know as their gateways.
    pub fn gateway4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.guests4.network().to_bits() | 1)
    }

    pub fn gateway6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.guests6.network().to_bits() | 1)
    }

    /// What guests have.
    pub fn guest4(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.guests4.network().to_bits() | 2)
    }

    pub fn guest6(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.guests6.network().to_bits() | 2)
    }

    /// Whether an address is one of a slot, or could be.
    pub fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.slots4.contains(&address),
            IpAddr::V6(address) => self.slots6.contains(&address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_have_addresses_of_their_own() {
        let plan = Plan::default();
        let read = Plan::new(
            GUESTS4.parse().unwrap(),
            GUESTS6.parse().unwrap(),
            SLOTS4.parse().unwrap(),
            SLOTS6.parse().unwrap(),
        );
        assert_eq!(read.unwrap(), plan);
        assert_eq!(plan.capacity(), 16_384);
        let first = plan.place(0);
        assert_eq!(
            (first.host4().to_string(), first.address4.to_string()),
            ("10.77.0.1".into(), "10.77.0.2".into())
        );
        let last = plan.place(plan.capacity() - 1);
        assert_eq!(last.address4.to_string(), "10.77.255.254");
        assert_eq!(last.address6.to_string(), "fd63:6f6c:6473:1::3fff:2");
        assert_eq!(last.host6().to_string(), "fd63:6f6c:6473:1::3fff:1");
        assert_eq!(
            (plan.guest4().to_string(), plan.gateway4().to_string()),
            ("10.76.0.2".into(), "10.76.0.1".into())
        );
        assert_eq!(plan.guest6().to_string(), "fd63:6f6c:6473::2");
        let wide = Plan { slots4: "11.0.0.0/8".parse().unwrap(), ..plan };
        assert_eq!(wide.capacity(), NUMBERS_MAX);
    }

    #[test]
    fn networks_that_cannot_be_are_refused() {
        let plan = |guests4: &str, slots4: &str, slots6: &str| {
            let (guests6, parsed) = (GUESTS6.parse().unwrap(), slots6.parse().unwrap());
            Plan::new(guests4.parse().unwrap(), guests6, slots4.parse().unwrap(), parsed)
        };
        assert!(plan(GUESTS4, "10.77.0.1/16", SLOTS6).unwrap_err().contains("10.77.0.0/16"));
        assert!(plan(GUESTS4, "10.77.0.0/29", SLOTS6).unwrap_err().contains("8 to 28"));
        assert!(plan("10.77.3.0/24", SLOTS4, SLOTS6).unwrap_err().contains("overlap"));
        assert!(plan(GUESTS4, SLOTS4, "fd63:6f6c:6473::/60").unwrap_err().contains("overlap"));
        assert!(plan("127.0.0.0/24", SLOTS4, SLOTS6).unwrap_err().contains("no network"));
    }
}
