//! Network interfaces and a VM's counters as messages and back.

use tonic::Status;

use super::proto;
use super::status::invalid;
use crate::fleet::network::{LinkRequest, MTU_MAX, MTU_MIN, NetworkRequest, VmNetwork};
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
    Ok(NetworkRequest { link, mac, mtu })
}

pub fn network_out(network: &VmNetwork) -> proto::Network {
    proto::Network {
        link: network.link.text(),
        mac: network.mac.to_vec().into(),
        mtu: network.mtu.unwrap_or(0).into(),
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
    fn interfaces_are_read_and_wrong_ones_refused() {
        let interface = proto::NetworkInterface {
            link: Some(Link::Tap("tap0".into())),
            mac: vec![2, 0, 0, 0, 0, 1].into(),
            mtu: 9000,
            netns: "blue".into(),
        };
        let expected = NetworkRequest {
            link: LinkRequest::Tap { name: "tap0".into(), netns: Some("blue".into()) },
            mac: Some([2, 0, 0, 0, 0, 1]),
            mtu: Some(9000),
        };
        assert_eq!(requests_in(vec![interface.clone()]).unwrap(), [expected]);
        let none = NetworkRequest { link: LinkRequest::Down, mac: None, mtu: None };
        assert_eq!(requests_in(vec![Default::default()]).unwrap(), [none]);
        for wrong in [
            proto::NetworkInterface { link: Some(Link::Down(false)), ..interface.clone() },
            proto::NetworkInterface { link: Some(Link::Down(true)), ..interface.clone() },
            proto::NetworkInterface { link: None, ..interface.clone() },
            proto::NetworkInterface { mac: vec![2; 5].into(), ..interface.clone() },
            proto::NetworkInterface { mtu: 65_536, ..interface },
        ] {
            assert_eq!(requests_in(vec![wrong]).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }
}
