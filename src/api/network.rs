//! Network interfaces and a VM's counters as messages and back.

use std::net::IpAddr;

use ipnet::IpNet;
use tonic::Status;

use super::proto;
use super::status::invalid;
use crate::fleet::addresses::{ADDRESSES_MAX, AddressError, GATEWAYS_MAX, Given};
use crate::fleet::network::{LinkRequest, MTU_MAX, MTU_MIN, NETWORKS_MAX, NetworkRequest, VmNetwork};
use crate::fleet::slots::SlotLink;
use crate::fleet::slots::access::{ALLOW_MAX, Access, Allow, Outbound, PUBLISH_MAX, Publish, Transport};
use crate::fleet::vm::PagerCounts;
use crate::fleet::{NetworkStats, Stats};

pub fn requests_in(interfaces: Vec<proto::NetworkInterface>) -> Result<Vec<NetworkRequest>, Status> {
    interfaces.into_iter().map(request_in).collect()
}

fn request_in(interface: proto::NetworkInterface) -> Result<NetworkRequest, Status> {
    use proto::network_interface::Link;
    let link = match interface.link {
        Some(Link::Tap(name)) => {
            let netns = Some(interface.netns).filter(|netns| !netns.is_empty());
            LinkRequest::Tap { name, netns }
        }
        _ if !interface.netns.is_empty() => {
            return Err(invalid("`netns` says where a TAP is; set `tap`, or leave it out"));
        }
        Some(Link::Slot(slot)) => {
            let link = SlotLink { access: access_in(slot)?, place: None, six: false };
            LinkRequest::Slot(Box::new(link))
        }
        Some(Link::Down(false)) => return Err(invalid("`down` must be true when it is set")),
        Some(Link::Down(true)) | None => LinkRequest::Down,
    };
    let mac = match interface.mac.len() {
        0 => None,
        bytes => Some(
            interface.mac[..]
                .try_into()
                .map_err(|_| invalid(format!("an address of {bytes} bytes; give 6, or none")))?,
        ),
    };
    let mtu = match interface.mtu {
        0 => None,
        mtu => Some(
            u16::try_from(mtu)
                .map_err(|_| invalid(format!("MTU {mtu}; give {MTU_MIN} to {MTU_MAX}, or none")))?,
        ),
    };
    let given = given_in(&interface.addresses, &interface.gateways)?;
    Ok(NetworkRequest { link, mac, mtu, given })
}

fn given_in(addresses: &[String], gateways: &[String]) -> Result<Given, Status> {
    if addresses.len() > ADDRESSES_MAX || gateways.len() > GATEWAYS_MAX {
        return Err(invalid(AddressError::TooMany.to_string()));
    }
    let address = |text: &String| {
        text.parse().map_err(|_| invalid(AddressError::NotAnAddress(text.clone()).to_string()))
    };
    let gateway = |text: &String| {
        text.parse().map_err(|_| invalid(AddressError::NotAGateway(text.clone()).to_string()))
    };
    Ok(Given {
        addresses: addresses.iter().map(address).collect::<Result<_, _>>()?,
        gateways: gateways.iter().map(gateway).collect::<Result<_, _>>()?,
    })
}

/// The links of what is made ahead, which are slots or none.
pub fn slots_in(interfaces: Vec<proto::NetworkInterface>) -> Result<Vec<Option<Access>>, Status> {
    let slot = |request: NetworkRequest| match request {
        NetworkRequest { given, .. } if !given.is_empty() => Err(invalid(
            "clones of a pool or a function keep the IP addresses that their snapshot has, each behind its own slot; leave them out",
        )),
        NetworkRequest { mac: None, mtu: None, link: LinkRequest::Slot(link), .. } => Ok(Some(link.access)),
        NetworkRequest { mac: None, mtu: None, link: LinkRequest::Down, .. } => Ok(None),
        NetworkRequest { link: LinkRequest::Tap { name, .. }, .. } => Err(invalid(format!(
            "TAP {name} is one VM's, and a pool or a function has several; ask for a slot (`--net auto`), or take none"
        ))),
        _ => Err(invalid("clones keep the address and the MTU that their snapshot has; leave them out")),
    };
    requests_in(interfaces)?.into_iter().map(slot).collect()
}

pub fn slots_out(slots: &[Option<Access>]) -> Vec<proto::NetworkInterface> {
    use proto::network_interface::Link;
    let link = |access: &Option<Access>| match access {
        Some(access) => Link::Slot(access_out(access)),
        None => Link::Down(true),
    };
    slots
        .iter()
        .map(|access| proto::NetworkInterface { link: Some(link(access)), ..Default::default() })
        .collect()
}

pub fn publish_in(ports: Vec<proto::PublishedPort>) -> Result<Vec<Publish>, Status> {
    Ok(access_in(proto::SlotLink { publish: ports, ..Default::default() })?.publish)
}

fn access_in(slot: proto::SlotLink) -> Result<Access, Status> {
    if slot.allow.len() > ALLOW_MAX || slot.publish.len() > PUBLISH_MAX {
        return Err(invalid(format!(
            "give at most {ALLOW_MAX} entries in `allow`, and {PUBLISH_MAX} in `publish`"
        )));
    }
    let outbound = match proto::Outbound::try_from(slot.outbound) {
        Ok(proto::Outbound::Unspecified) if slot.allow.is_empty() => Outbound::Public,
        Ok(proto::Outbound::Unspecified | proto::Outbound::None) => Outbound::Nothing,
        Ok(proto::Outbound::Public) => Outbound::Public,
        Ok(proto::Outbound::All) => Outbound::All,
        Err(_) => return Err(invalid("an unknown `outbound`; it is PUBLIC, ALL or NONE")),
    };
    let port = |port: u32| u16::try_from(port).map_err(|_| invalid(format!("port {port}; give 1 to 65535")));
    let allow = |entry: proto::AllowedDestination| {
        let port = Some(port(entry.port)?).filter(|port| *port != 0);
        let network = network_in(&entry.network)?;
        Ok::<_, Status>(Allow { network, port, transport: transport_in(entry.transport)? })
    };
    let publish = |entry: proto::PublishedPort| {
        Ok::<_, Status>(Publish {
            host: port(entry.host_port)?,
            guest: port(entry.guest_port)?,
            transport: transport_in(entry.transport)?.unwrap_or(Transport::Tcp),
        })
    };
    Ok(Access {
        outbound,
        allow: slot.allow.into_iter().map(allow).collect::<Result<_, _>>()?,
        publish: slot.publish.into_iter().map(publish).collect::<Result<_, _>>()?,
    })
}

/// An address alone is a network of one.
fn network_in(text: &str) -> Result<IpNet, Status> {
    let one = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse().ok().or_else(one).ok_or_else(|| {
        invalid(format!(
            "{text:?} is no network; write an address, perhaps with a prefix, such as 10.1.0.0/16"
        ))
    })
}

fn transport_in(number: i32) -> Result<Option<Transport>, Status> {
    match proto::Transport::try_from(number) {
        Ok(proto::Transport::Unspecified) => Ok(None),
        Ok(proto::Transport::Tcp) => Ok(Some(Transport::Tcp)),
        Ok(proto::Transport::Udp) => Ok(Some(Transport::Udp)),
        Err(_) => Err(invalid("an unknown `transport`; it is TCP or UDP")),
    }
}

fn access_out(access: &Access) -> proto::SlotLink {
    let transport = |transport: Option<Transport>| match transport {
        None => proto::Transport::Unspecified.into(),
        Some(Transport::Tcp) => proto::Transport::Tcp.into(),
        Some(Transport::Udp) => proto::Transport::Udp.into(),
    };
    let allow = |entry: &Allow| proto::AllowedDestination {
        network: entry.network.to_string(),
        port: entry.port.unwrap_or(0).into(),
        transport: transport(entry.transport),
    };
    let publish = |entry: &Publish| proto::PublishedPort {
        host_port: entry.host.into(),
        guest_port: entry.guest.into(),
        transport: transport(Some(entry.transport)),
    };
    proto::SlotLink {
        outbound: match access.outbound {
            Outbound::Public => proto::Outbound::Public,
            Outbound::All => proto::Outbound::All,
            Outbound::Nothing => proto::Outbound::None,
        }
        .into(),
        allow: access.allow.iter().map(allow).collect(),
        publish: access.publish.iter().map(publish).collect(),
    }
}

/// Whether an interface asks for more of a slot than the public Internet, which is an admin's to give.
pub fn opens_more(interfaces: &[proto::NetworkInterface]) -> Result<bool, Status> {
    use proto::network_interface::Link;
    for interface in interfaces.iter().take(NETWORKS_MAX) {
        if let Some(Link::Slot(slot)) = &interface.link
            && access_in(slot.clone())?.goes_beyond_public()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// By which the host reaches the guest in a slot; empty where there is none.
pub fn addresses(link: &SlotLink) -> [String; 2] {
    let four = link.place.map(|place| place.address4.to_string());
    let six = link.place.filter(|_| link.six).map(|place| place.address6.to_string());
    [four.unwrap_or_default(), six.unwrap_or_default()]
}

pub fn network_out(network: &VmNetwork) -> proto::Network {
    let slot = match &network.link {
        LinkRequest::Slot(link) => Some(link),
        _ => None,
    };
    let [slot_address, slot_address6] = slot.map(|link| addresses(link)).unwrap_or_default();
    proto::Network {
        slot_address,
        slot_address6,
        slot: slot.map(|slot| access_out(&slot.access)),
        link: network.link.text(),
        mac: network.mac.to_vec().into(),
        mtu: network.mtu.unwrap_or(0).into(),
        addresses: network.given.addresses.iter().map(ToString::to_string).collect(),
        gateways: network.given.gateways.iter().map(ToString::to_string).collect(),
    }
}

pub fn stats_out(stats: &Stats, given: PagerCounts) -> proto::VmStats {
    proto::VmStats {
        vcpu_exits: stats.vcpu_exits,
        minor_faults: stats.minor_faults,
        major_faults: stats.major_faults,
        private_dirty_bytes: stats.private_dirty_bytes,
        networks: stats.networks.iter().map(network_stats).collect(),
        userfaults: given.faults,
        userfault_pages: given.data_pages.saturating_add(given.zero_pages),
    }
}

fn network_stats(stats: &NetworkStats) -> proto::NetworkStats {
    proto::NetworkStats {
        frames_in: stats.frames_in,
        bytes_in: stats.bytes_in,
        frames_out: stats.frames_out,
        bytes_out: stats.bytes_out,
        filtered_in: stats.filtered_in,
        dropped_in_too_long: stats.dropped_in_too_long,
        dropped_in_bad: stats.dropped_in_bad,
        dropped_out_bad: stats.dropped_out_bad,
        dropped_out_no_link: stats.dropped_out_no_link,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::network_interface::Link;

    #[test]
    fn slots_are_read_and_told() {
        let read = |slot: proto::SlotLink| {
            let interface = proto::NetworkInterface { link: Some(Link::Slot(slot)), ..Default::default() };
            requests_in(vec![interface]).map(|mut requests| match requests.pop().unwrap().link {
                LinkRequest::Slot(link) => link.access,
                other => panic!("{other:?}"),
            })
        };
        assert_eq!(read(Default::default()).unwrap(), Access::default());
        let allow = |network: &str, port, transport: i32| proto::AllowedDestination {
            network: network.into(),
            port,
            transport,
        };
        let told = proto::SlotLink {
            outbound: proto::Outbound::Unspecified.into(),
            allow: vec![allow("192.0.2.7", 53, 2), allow("2001:db8::/32", 0, 0)],
            publish: vec![proto::PublishedPort { host_port: 8080, guest_port: 80, transport: 0 }],
        };
        let access = read(told.clone()).unwrap();
        assert_eq!((access.outbound, access.publish[0].transport), (Outbound::Nothing, Transport::Tcp));
        let out = access_out(&access);
        assert_eq!((&out.allow[0].network[..], out.outbound), ("192.0.2.7/32", proto::Outbound::None.into()));
        assert_eq!(read(out).unwrap(), access);
        let interface = |slot| proto::NetworkInterface { link: Some(Link::Slot(slot)), ..Default::default() };
        assert!(opens_more(&[interface(told.clone())]).unwrap());
        assert!(!opens_more(&[interface(proto::SlotLink::default()), Default::default()]).unwrap());
        for wrong in [
            proto::SlotLink { outbound: 9, ..told.clone() },
            proto::SlotLink { allow: vec![allow("192.0.2.7; drop", 0, 0)], ..told.clone() },
            proto::SlotLink { allow: vec![allow("192.0.2.7", 65_536, 0)], ..told.clone() },
            proto::SlotLink { allow: vec![allow("192.0.2.7", 1, 3)], ..told.clone() },
            proto::SlotLink { allow: vec![allow("192.0.2.7", 1, 1); 65], ..told.clone() },
            proto::SlotLink {
                publish: vec![proto::PublishedPort { host_port: 70_000, guest_port: 1, transport: 1 }],
                ..told
            },
        ] {
            assert_eq!(read(wrong).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn what_is_made_ahead_has_slots_or_none() {
        let interface = |link| proto::NetworkInterface { link: Some(link), ..Default::default() };
        let told = vec![
            interface(Link::Down(true)),
            interface(Link::Slot(proto::SlotLink { outbound: 2, ..Default::default() })),
        ];
        let slots = slots_in(told.clone()).unwrap();
        assert_eq!(slots, [None, Some(Access { outbound: Outbound::All, ..Access::default() })]);
        assert_eq!(slots_out(&slots), told);
        for wrong in [
            interface(Link::Tap("tap0".into())),
            proto::NetworkInterface { mtu: 1400, ..interface(Link::Down(true)) },
            proto::NetworkInterface { mac: vec![2; 6].into(), ..told[1].clone() },
        ] {
            assert_eq!(slots_in(vec![wrong]).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn interfaces_are_read_and_wrong_ones_refused() {
        let interface = proto::NetworkInterface {
            link: Some(Link::Tap("tap0".into())),
            mac: vec![2, 0, 0, 0, 0, 1].into(),
            mtu: 9000,
            netns: "blue".into(),
            addresses: vec!["10.0.0.5/24".into(), "fd00::5/64".into()],
            gateways: vec!["10.0.0.1".into()],
        };
        let expected = NetworkRequest {
            link: LinkRequest::Tap { name: "tap0".into(), netns: Some("blue".into()) },
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: Some(9000),
            given: Given {
                addresses: vec!["10.0.0.5/24".parse().unwrap(), "fd00::5/64".parse().unwrap()],
                gateways: vec![[10, 0, 0, 1].into()],
            },
        };
        assert_eq!(requests_in(vec![interface.clone()]).unwrap(), [expected]);
        let none = NetworkRequest { link: LinkRequest::Down, mac: None, mtu: None, given: Given::default() };
        assert_eq!(requests_in(vec![Default::default()]).unwrap(), [none]);
        for wrong in [
            proto::NetworkInterface { link: Some(Link::Down(false)), ..interface.clone() },
            proto::NetworkInterface { link: Some(Link::Down(true)), ..interface.clone() },
            proto::NetworkInterface { link: None, ..interface.clone() },
            proto::NetworkInterface { mac: vec![2; 5].into(), ..interface.clone() },
            proto::NetworkInterface { addresses: vec!["10.0.0.5".into()], ..interface.clone() },
            proto::NetworkInterface { addresses: vec!["10.0.0.5/33".into()], ..interface.clone() },
            proto::NetworkInterface { addresses: vec!["10.0.0.5/24; x".into()], ..interface.clone() },
            proto::NetworkInterface { addresses: vec!["10.0.0.5/24".into(); 9], ..interface.clone() },
            proto::NetworkInterface { gateways: vec!["10.0.0.1/24".into()], ..interface.clone() },
            proto::NetworkInterface { gateways: vec!["10.0.0.1".into(); 3], ..interface.clone() },
            proto::NetworkInterface { mtu: 65_536, ..interface },
        ] {
            assert_eq!(requests_in(vec![wrong]).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }
}
