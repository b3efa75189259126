//! What a guest in a slot may reach, and which ports of the host lead to it. Only what was parsed into these types gets into
//! a rule's text.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::SlotError;

/// Entries of one VM.
pub const ALLOW_MAX: usize = 64;
/// Published ports of one VM.
pub const PUBLISH_MAX: usize = 16;

/// Networks that are not the public Internet: private, shared, link-local, documentation, multicast, reserved
/// (IANA's special-purpose registries, RFC 6890).
pub const NOT_PUBLIC4: [&str; 13] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
];
/// All of IPv6 that is handed out to anybody.
pub const PUBLIC6: &str = "2000::/3";
/// Of which these are none: documentation, and IPv4 addresses in 6to4's and Teredo's clothes.
pub const NOT_PUBLIC6: [&str; 3] = ["2001:db8::/32", "2002::/16", "2001::/32"];

/// What a guest may reach by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outbound {
    /// The public Internet, and no private network.
    #[default]
    Public,
    /// Everything but this host and other guests.
    All,
    /// Nothing.
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Transport {
    Tcp,
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// What a guest may reach besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allow {
    pub network: IpNet,
    /// `None`: all, of every protocol.
    pub port: Option<u16>,
    /// `None`: both. Of no meaning without a port.
    pub transport: Option<Transport>,
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    pub host: u16,
    pub guest: u16,
    pub transport: Transport,
}

/// All of it, for one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    pub outbound: Outbound,
    pub allow: Vec<Allow>,
    pub publish: Vec<Publish>,
}

impl Allow {
    /// It is one machine: then it may also be this host, or the guest in another slot. A wider one never opens these.
    pub fn is_one(&self) -> bool {
        self.network.prefix_len() == self.network.max_prefix_len()
    }

    fn check(&self) -> Result<(), SlotError> {
        let network = self.network;
        if network.addr() != network.network() {
            return Err(SlotError::HostBits(network.to_string(), network.trunc().to_string()));
        }
        if self.port == Some(0) {
            return Err(SlotError::PortZero);
        }
        let address = network.addr();
        let wrong =
            address.is_loopback() || address.is_multicast() || (address.is_unspecified() && self.is_one());
        // Addresses of IPv4 in those of IPv6 would be filtered by other rules than they are written for.
        let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
        if wrong || mapped { Err(SlotError::NoDestination(network.to_string())) } else { Ok(()) }
    }
}

impl Access {
    /// Checks what a client asks for.
    pub fn check(&self) -> Result<(), SlotError> {
        if self.allow.len() > ALLOW_MAX {
            return Err(SlotError::ManyAllowed(self.allow.len()));
        }
        if self.publish.len() > PUBLISH_MAX {
            return Err(SlotError::ManyPublished(self.publish.len()));
        }
        self.allow.iter().try_for_each(Allow::check)?;
        for (index, publish) in self.publish.iter().enumerate() {
            let (port, transport) = (publish.host, publish.transport);
            if port == 0 || publish.guest == 0 {
                return Err(SlotError::PortZero);
            }
            let mut before = self.publish.iter().take(index);
            if before.any(|other| (other.host, other.transport) == (port, transport)) {
                return Err(SlotError::PublishedTwice { port, transport });
            }
        }
        Ok(())
    }

    /// What the rules of a slot that nobody has are made for.
    pub fn is_usual_inside(&self) -> bool {
        self.outbound == Outbound::default() && self.allow.is_empty()
    }

    /// Whether the host's own rules have lines for it.
    pub fn is_seen_by_host(&self) -> bool {
        !self.publish.is_empty() || self.allow.iter().any(Allow::is_one)
    }

    /// Whether it opens more than the public Internet: ports of this host, or networks that are somebody's own.
    pub fn goes_beyond_public(&self) -> bool {
        self.outbound == Outbound::All
            || !self.publish.is_empty()
            || self.allow.iter().any(|allow| !is_public(&allow.network))
    }
}

/// Whether all of it is the public Internet.
fn is_public(network: &IpNet) -> bool {
    let parsed = |text: &&str| text.parse::<IpNet>().ok();
    let overlap = |other: IpNet| other.contains(network) || network.contains(&other);
    match network {
        IpNet::V4(_) => !NOT_PUBLIC4.iter().filter_map(parsed).any(overlap),
        IpNet::V6(_) => {
            PUBLIC6.parse::<IpNet>().is_ok_and(|public| public.contains(network))
                && !NOT_PUBLIC6.iter().filter_map(parsed).any(overlap)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(network: &str, port: Option<u16>) -> Allow {
        Allow { network: network.parse().unwrap(), port, transport: None }
    }

    fn publish(host: u16, guest: u16, transport: Transport) -> Publish {
        Publish { host, guest, transport }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let allowed = |entry| Access { allow: vec![entry], ..Access::default() }.check();
        for good in ["10.0.0.0/8", "1.2.3.4/32", "0.0.0.0/0", "::/0", "2001:db8::1/128"] {
            assert!(allowed(allow(good, Some(443))).is_ok(), "{good}");
        }
        assert!(
            matches!(allowed(allow("10.0.0.1/8", None)), Err(SlotError::HostBits(_, to)) if to == "10.0.0.0/8")
        );
        for wrong in ["127.0.0.1/32", "::1/128", "224.0.0.0/4", "0.0.0.0/32", "::ffff:10.0.0.1/128"] {
            assert!(matches!(allowed(allow(wrong, None)), Err(SlotError::NoDestination(_))), "{wrong}");
        }
        assert!(matches!(allowed(allow("10.0.0.0/8", Some(0))), Err(SlotError::PortZero)));
        let many = Access { allow: vec![allow("10.0.0.0/8", None); ALLOW_MAX + 1], ..Access::default() };
        assert!(matches!(many.check(), Err(SlotError::ManyAllowed(_))));

        let published = |publish| Access { publish, ..Access::default() }.check();
        let (tcp, udp) = (Transport::Tcp, Transport::Udp);
        assert!(published(vec![publish(80, 80, tcp), publish(80, 80, udp)]).is_ok());
        assert!(matches!(
            published(vec![publish(80, 80, tcp), publish(80, 81, tcp)]),
            Err(SlotError::PublishedTwice { port: 80, .. })
        ));
        assert!(matches!(published(vec![publish(0, 80, tcp)]), Err(SlotError::PortZero)));
        let many = (1..=PUBLISH_MAX as u16 + 1).map(|port| publish(port, port, tcp)).collect();
        assert!(matches!(published(many), Err(SlotError::ManyPublished(_))));
    }

    #[test]
    fn what_is_not_public_needs_more_rights() {
        let beyond = |network: &str| {
            Access { outbound: Outbound::Nothing, allow: vec![allow(network, None)], publish: Vec::new() }
                .goes_beyond_public()
        };
        for public in ["8.8.8.8/32", "9.0.0.0/8", "2606:4700::/32"] {
            assert!(!beyond(public), "{public}");
        }
        for own in [
            "10.1.0.0/16",
            "8.0.0.0/5",
            "0.0.0.0/0",
            "169.254.169.254/32",
            "fd00::/8",
            "::/0",
            "2001:db8::/48",
        ] {
            assert!(beyond(own), "{own}");
        }
        assert!(!Access::default().goes_beyond_public());
        assert!(Access { outbound: Outbound::All, ..Access::default() }.goes_beyond_public());
    }
}
