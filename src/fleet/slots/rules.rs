//! What `ip` and `nft` are told: texts made of our own names and of typed addresses and ports, nothing else.
//!
//! ```text
//! guest 10.76.0.2 -- tap0 10.76.0.1 [namespace cs-TAG-N] up0 10.77.x.y -- veth csTAGnN of the host -- the host's routes
//!                                   slot's rules                              the host's table coldspark_TAG
//! ```
//!
//! In a slot, the guest's addresses are exchanged for the slot's, one for one, and what the guest may reach is held. On the host, published
//! ports lead to slots, what leaves the host gets the host's address, and neither the host nor other slots are reached by guests.
//!
//! Facts: nft(8) (nftables 1.0), ip(8), the kernel's `Documentation/networking/ip-sysctl.rst`.

use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;

use super::access::{Access, Allow, NOT_PUBLIC4, NOT_PUBLIC6, Outbound, PUBLIC6, Transport};
use super::addresses::{Place, Plan};

/// The TAP in each slot.
pub const TAP: &str = "tap0";
/// The same in all slots, because guests remember their gateway's address.
const TAP_MAC: &str = "02:63:6f:6c:64:01";
/// A slot's end of its veth pair.
const UP: &str = "up0";
/// Of the first slot's route to ::1: behind the loopback's own, and no two alike, which the kernel would refuse.
const LOCAL_METRIC: u32 = 65_536;
/// The table in each slot.
const TABLE: &str = "coldspark";

/// Settings of a new slot, before it has interfaces: addresses are used at once.
pub const SETTINGS4: [(&str, &str); 2] =
    [("/proc/sys/net/ipv4/ip_forward", "1"), ("/proc/sys/net/ipv4/conf/default/rp_filter", "1")];
pub const SETTINGS6: [(&str, &str); 4] = [
    ("/proc/sys/net/ipv6/conf/all/forwarding", "1"),
    ("/proc/sys/net/ipv6/conf/default/forwarding", "1"),
    ("/proc/sys/net/ipv6/conf/default/accept_dad", "0"),
    ("/proc/sys/net/ipv6/conf/default/dad_transmits", "0"),
];

/// How what is ours on this host is called, and which addresses it has.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Tells this service's things from another one's.
    pub tag: String,
    pub plan: Plan,
    /// The host has IPv6.
    pub six: bool,
}

impl Rules {
    /// The slot's namespace.
    pub fn netns(&self, number: u32) -> String {
        format!("{}{number}", self.netns_prefix())
    }

    pub fn netns_prefix(&self) -> String {
        format!("cs-{}-", self.tag)
    }

    /// The host's end of its veth pair: at most 14 bytes.
    pub fn veth(&self, number: u32) -> String {
        format!("{}{number}", self.veth_prefix())
    }

    pub fn veth_prefix(&self) -> String {
        format!("cs{}n", self.tag)
    }

    /// The host's table.
    pub fn table(&self) -> String {
        format!("coldspark_{}", self.tag)
    }

    /// For `ip -batch` on the host.
    pub fn add_namespace(&self, number: u32) -> String {
        format!("netns add {}\n", self.netns(number))
    }

    /// For `ip -batch` in the slot; its veth's other end goes to the namespace of the process `host`.
    pub fn interfaces(&self, place: &Place, host: u32) -> String {
        let Plan { guests4, guests6, .. } = &self.plan;
        let (gateway4, gateway6) = (self.plan.gateway4(), self.plan.gateway6());
        let mut text = format!(
            "link set lo up\n\
             tuntap add dev {TAP} mode tap\n\
             link set {TAP} address {TAP_MAC}\n\
             addr add {gateway4}/{} dev {TAP}\n\
             link add {UP} type veth peer name {} netns {host}\n\
             addr add {}/30 dev {UP}\n",
            guests4.prefix_len(),
            self.veth(place.number),
            place.address4
        );
        if self.six {
            let _ = write!(
                text,
                "addr add {gateway6}/{} dev {TAP} nodad\naddr add {}/112 dev {UP} nodad\n",
                guests6.prefix_len(),
                place.address6
            );
        }
        let _ = write!(text, "link set {TAP} up\nlink set {UP} up\n");
        text
    }

    /// For `ip -batch` on the host: its end of the pair.
    pub fn host_end(&self, place: &Place) -> String {
        let veth = self.veth(place.number);
        let mut text = format!("addr add {}/30 dev {veth}\n", place.host4());
        if self.six {
            let _ = writeln!(text, "addr add {}/112 dev {veth} nodad", place.host6());
        }
        let _ = writeln!(text, "link set {veth} up");
        if self.six {
            // Answers to those who have called a published port by ::1 come in here, and the kernel routes ::1 by the interface (`rt6_need_strict`). What is sent
            // to ::1 from outside it drops before that (`ip6_rcv_core`).
            let metric = LOCAL_METRIC + place.number;
            let _ = writeln!(text, "route add local ::1 dev {veth} table local metric {metric}");
        }
        text
    }

    /// For `ip -batch` in the slot, when both ends are up.
    pub fn routes(&self, place: &Place) -> String {
        let mut text = format!("route add default via {}\n", place.host4());
        if self.six {
            let _ = writeln!(text, "route add default via {}", place.host6());
        }
        text
    }

    /// For `nft -f` in a new slot.
    pub fn slot(&self, place: &Place) -> String {
        let (guest4, guest6) = (self.plan.guest4(), self.plan.guest6());
        let [mut to_guest, mut from_guest, mut out] = [
            format!("iifname \"{UP}\" ip daddr {} dnat ip to {guest4}\n", place.address4),
            format!("oifname \"{UP}\" ip saddr {guest4} snat ip to {}\n", place.address4),
            format!("iifname \"{TAP}\" oifname \"{UP}\" ip saddr {guest4} jump outbound\n"),
        ];
        if self.six {
            let _ = writeln!(to_guest, "iifname \"{UP}\" ip6 daddr {} dnat ip6 to {guest6}", place.address6);
            let _ =
                writeln!(from_guest, "oifname \"{UP}\" ip6 saddr {guest6} snat ip6 to {}", place.address6);
            let _ = writeln!(out, "iifname \"{TAP}\" oifname \"{UP}\" ip6 saddr {guest6} jump outbound");
        }
        // What begins in the middle of a connection was one of whoever had these addresses before.
        format!(
            "table inet {TABLE} {{\n\
             chain outbound {{\n{}}}\n\
             chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;\n{to_guest}}}\n\
             chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;\n{from_guest}}}\n\
             chain forward {{ type filter hook forward priority filter; policy drop;\n\
             ct state established,related accept\n\
             ct state invalid drop\n\
             iifname \"{UP}\" tcp flags & (fin|syn|rst|ack) != syn drop\n\
             iifname \"{UP}\" oifname \"{TAP}\" ct status dnat accept\n\
             {out}}}\n\
             chain input {{ type filter hook input priority filter; policy drop;\n\
             ct state established,related accept\n\
             icmp type echo-request accept\n\
             icmpv6 type {{ echo-request, nd-neighbor-solicit, nd-neighbor-advert }} accept\n\
             }}\n}}\n",
            self.outbound(&Access::default())
        )
    }

    /// For `nft -f` in a slot that is there: what its guest may reach now.
    pub fn reach(&self, access: &Access) -> String {
        format!(
            "flush chain inet {TABLE} outbound\ntable inet {TABLE} {{\nchain outbound {{\n{}}}\n}}\n",
            self.outbound(access)
        )
    }

    fn outbound(&self, access: &Access) -> String {
        let Plan { slots4, slots6, .. } = &self.plan;
        let mut text = String::new();
        let allow = |one: bool, text: &mut String| {
            for entry in access.allow.iter().filter(|entry| entry.is_one() == one) {
                let _ = writeln!(text, "{} accept", destination(entry));
            }
        };
        allow(true, &mut text);
        let _ = write!(text, "ip daddr {slots4} drop\nip6 daddr {slots6} drop\n");
        allow(false, &mut text);
        text += &match access.outbound {
            Outbound::Public => format!(
                "ip daddr {{ {} }} drop\nip6 daddr {{ {} }} drop\nip6 daddr != {PUBLIC6} drop\naccept\n",
                NOT_PUBLIC4.join(", "),
                NOT_PUBLIC6.join(", ")
            ),
            Outbound::All => "accept\n".to_owned(),
            Outbound::Nothing => "drop\n".to_owned(),
        };
        text
    }

    /// For `nft -f` on the host: its table as it is to be, in one step, for these slots that are in use.
    pub fn host<'a>(&self, used: impl Iterator<Item = (&'a Place, &'a Access)>) -> String {
        let table = self.table();
        let slots = format!("\"{}*\"", self.veth_prefix());
        let Plan { guests4, guests6, slots4, slots6 } = &self.plan;
        let (mut publish, mut guests, mut moved) = (String::new(), String::new(), String::new());
        // Of a slot that is gone: it is not to be looked for elsewhere.
        let mut gone = String::new();
        for (place, access) in used {
            for port in &access.publish {
                let (transport, host, guest) = (port.transport, port.host, port.guest);
                let _ = writeln!(
                    publish,
                    "fib daddr type local {transport} dport {host} dnat ip to {}:{guest}",
                    place.address4
                );
                if self.six {
                    let _ = writeln!(
                        publish,
                        "fib daddr type local {transport} dport {host} dnat ip6 to [{}]:{guest}",
                        place.address6
                    );
                }
            }
            for entry in access.allow.iter().filter(|entry| entry.is_one()) {
                let _ =
                    writeln!(guests, "iifname \"{}\" {} accept", self.veth(place.number), destination(entry));
            }
            // Of an earlier service, that had other networks.
            if !self.plan.has(IpAddr::V4(place.address4)) {
                let _ = writeln!(moved, "oifname != {slots} ip saddr {} masquerade", place.address4);
            }
            if self.six && !self.plan.has(IpAddr::V6(place.address6)) {
                let _ = writeln!(moved, "oifname != {slots} ip6 saddr {} masquerade", place.address6);
            }
        }
        if self.six {
            let _ = writeln!(gone, "oifname != {slots} ip6 daddr {slots6} drop");
            let _ = write!(
                moved,
                "oifname != {slots} ip6 saddr {slots6} masquerade\noifname {slots} ip6 saddr {{ ::1, {guests6} }} masquerade\n"
            );
        }
        // Who calls a published port from an address that guests take for their own network, or by the host's loopback, gets the host's.
        format!(
            "table inet {table}\n\
             delete table inet {table}\n\
             table inet {table} {{\n\
             chain publish {{\n{publish}}}\n\
             chain prerouting {{ type nat hook prerouting priority dstnat; policy accept;\n\
             iifname != {slots} jump publish\n}}\n\
             chain output {{ type nat hook output priority -100; policy accept;\njump publish\n}}\n\
             chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;\n\
             oifname {slots} ip saddr {{ 127.0.0.0/8, {guests4} }} masquerade\n\
             oifname != {slots} ip saddr {slots4} masquerade\n{moved}}}\n\
             chain guests {{\n{guests}}}\n\
             chain input {{ type filter hook input priority filter; policy accept;\n\
             iifname != {slots} accept\n\
             ct state established,related accept\n\
             icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept\n\
             jump guests\ndrop\n}}\n\
             chain forward {{ type filter hook forward priority filter; policy accept;\n\
             oifname != {slots} ip daddr {slots4} drop\n{gone}\
             ct state established,related accept\n\
             iifname {slots} oifname {slots} jump guests\n\
             iifname != {slots} oifname {slots} ct status dnat accept\n\
             oifname {slots} drop\n}}\n}}\n"
        )
    }

    /// For `nft -f` on the host: no table.
    pub fn no_host(&self) -> String {
        let table = self.table();
        format!("table inet {table}\ndelete table inet {table}\n")
    }
}

/// What an entry matches.
fn destination(entry: &Allow) -> String {
    let family = match entry.network {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    };
    let mut text = format!("{family} daddr {}", entry.network);
    if let Some(port) = entry.port {
        let transports = match entry.transport {
            Some(transport) => transport.to_string(),
            None => format!("{}, {}", Transport::Tcp, Transport::Udp),
        };
        let _ = write!(text, " meta l4proto {{ {transports} }} th dport {port}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::access::Publish;
    use super::*;

    fn rules() -> Rules {
        Rules { tag: "0a1b2c".to_owned(), plan: Plan::default(), six: true }
    }

    fn access() -> Access {
        let allow = |network: &str, port| Allow { network: network.parse().unwrap(), port, transport: None };
        Access {
            outbound: Outbound::Nothing,
            allow: vec![allow("192.0.2.0/24", None), allow("10.1.2.3/32", Some(53))],
            publish: vec![Publish { host: 8080, guest: 80, transport: Transport::Tcp }],
        }
    }

    #[test]
    fn names_are_short_and_of_this_service() {
        let rules = rules();
        assert!(rules.veth(65_535).len() < libc::IFNAMSIZ, "{}", rules.veth(65_535));
        assert_eq!(rules.netns(7), "cs-0a1b2c-7");
    }

    #[test]
    fn an_exact_address_comes_before_the_other_slots_and_a_network_after_them() {
        let text = rules().reach(&access());
        let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{words} in {text}"));
        let one = at("ip daddr 10.1.2.3/32 meta l4proto { tcp, udp } th dport 53 accept");
        let slots = at("ip daddr 10.77.0.0/16 drop");
        assert!(one < slots && slots < at("ip daddr 192.0.2.0/24 accept"));
        assert!(
            text.trim_end().trim_end_matches(['}', '\n']).ends_with("drop\n")
                || text.contains("accept\ndrop\n")
        );
    }

    #[test]
    fn the_host_has_lines_for_what_it_sees_only() {
        let (rules, place) = (rules(), Plan::default().place(3));
        let access = access();
        let text = rules.host([(&place, &access)].into_iter());
        assert!(text.contains("tcp dport 8080 dnat ip to 10.77.0.14:80"), "{text}");
        assert!(text.contains("tcp dport 8080 dnat ip6 to [fd63:6f6c:6473:1::3:2]:80"), "{text}");
        assert!(text.contains("iifname \"cs0a1b2cn3\" ip daddr 10.1.2.3/32"), "{text}");
        assert!(!text.contains("192.0.2.0/24"), "{text}");
        assert!(!text.contains("10.77.0.14 masquerade"), "in the plan's network: {text}");
        let old = Place { address4: "10.99.0.2".parse().unwrap(), ..place };
        assert!(rules.host([(&old, &access)].into_iter()).contains("ip saddr 10.99.0.2 masquerade"));
        let without = Rules { six: false, ..rules };
        assert!(!without.host([(&place, &access)].into_iter()).contains("ip6"));
    }
}
