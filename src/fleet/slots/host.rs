//! What of this host stands in the way of slots, found before any is made.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::error::SlotError;
use super::rules::Rules;
use super::tools;

/// Bits of capabilities(7).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Whether this process can make slots: rights, programs, addresses. Blocks.
pub fn check(rules: &Rules) -> Result<(), SlotError> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let has = |bit: u32| capabilities(&status) >> bit & 1 != 0;
    if !has(CAP_NET_ADMIN) || !has(CAP_SYS_ADMIN) {
        return Err(SlotError::NoRights);
    }
    tools::check()?;
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let routes =
        routes4(&read("/proc/net/route")).chain(routes6(&read("/proc/net/ipv6_route"))).collect::<Vec<_>>();
    let (slots4, slots6) = (IpNet::V4(rules.plan.slots4), IpNet::V6(rules.plan.slots6));
    let ours = rules.veth_prefix();
    for (network, interface) in routes {
        for (slots, flag) in [(slots4, "--slot-network"), (slots6, "--slot-network6")] {
            if !interface.starts_with(&ours) && (slots.contains(&network) || network.contains(&slots)) {
                return Err(SlotError::Route {
                    network: network.to_string(),
                    interface,
                    slots: slots.to_string(),
                    flag,
                });
            }
        }
    }
    Ok(())
}

/// What of the host's settings keeps guests from the networks beyond it: names of them.
pub fn not_forwarding(rules: &Rules) -> Vec<&'static str> {
    let settings = [("net.ipv4.ip_forward", true), ("net.ipv6.conf.all.forwarding", rules.six)];
    let is_off = |name: &str| {
        fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/")))
            .is_ok_and(|text| text.trim() == "0")
    };
    settings.into_iter().filter(|(name, asked)| *asked && is_off(name)).map(|(name, _)| name).collect()
}

/// Effective ones, from `/proc/self/status`.
fn capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0)
}

/// Destinations of `/proc/net/route` (words in the host's order of bytes) but the default, with their interfaces.
fn routes4(text: &str) -> impl Iterator<Item = (IpNet, String)> {
    text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let word = |at: usize| {
            let word = u32::from_str_radix(fields.get(at)?, 16).ok()?;
            Some(Ipv4Addr::from(word.to_ne_bytes()))
        };
        let network = Ipv4Net::with_netmask(word(1)?, word(7)?).ok()?;
        (network.prefix_len() > 0).then(|| Some((IpNet::V4(network), (*fields.first()?).to_owned())))?
    })
}

/// The same of `/proc/net/ipv6_route`, but for link-local and multicast ones, which every interface has.
fn routes6(text: &str) -> impl Iterator<Item = (IpNet, String)> {
    text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address = Ipv6Addr::from_bits(u128::from_str_radix(fields.first()?, 16).ok()?);
        let prefix = u8::from_str_radix(fields.get(1)?, 16).ok()?;
        let network = Ipv6Net::new(address, prefix).ok()?;
        let every = prefix == 0 || address.is_multicast() || address.is_unicast_link_local();
        (!every).then(|| Some((IpNet::V6(network), (*fields.last()?).to_owned())))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let four = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                    eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                    eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                    nonsense\n";
        let found: Vec<_> = routes4(four).map(|(network, by)| format!("{network} {by}")).collect();
        assert_eq!(found, ["192.168.0.0/24 eth0"]);
        let six = "fd636f6c647300010000000000000000 70 00000000000000000000000000000000 00 \
                   00000000000000000000000000000000 00000100 00000001 00000000 00000001     br0\n\
                   fe800000000000000000000000000000 40 00000000000000000000000000000000 00 \
                   00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n";
        let found: Vec<_> = routes6(six).map(|(network, by)| format!("{network} {by}")).collect();
        assert_eq!(found, ["fd63:6f6c:6473:1::/112 br0"]);
        assert_eq!(
            capabilities("Name:\tx\nCapEff:\t0000000000201000\n"),
            1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN
        );
        assert_eq!(capabilities("CapEff: z"), 0);
    }
}
