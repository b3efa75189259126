//! `--net` of `vm create` and `vm clone`, and `coldspark vm stats`.

use serde_json::{Value, json};

use crate::api::proto;
use crate::api::proto::network_interface::Link;
use crate::cli::{SocketArgument, output, units};

/// Reads `tap=NAME[,netns=NAME][,mac=02:00:00:00:00:01][,mtu=1400]` or `down[,...]`.
pub fn parse_interface(text: &str) -> Result<proto::NetworkInterface, String> {
    let usage = "write tap=NAME (perhaps with ,netns=NAME) or down, then perhaps ,mac=02:00:00:00:00:01 and ,mtu=1400";
    let mut interface = proto::NetworkInterface::default();
    for part in text.split(',') {
        let taken = match part.split_once('=').unwrap_or((part, "")) {
            ("tap", name) if !name.is_empty() => interface.link.replace(Link::Tap(name.to_owned())).is_some(),
            ("netns", name) if !name.is_empty() => {
                !std::mem::replace(&mut interface.netns, name.to_owned()).is_empty()
            }
            ("down", "") => interface.link.replace(Link::Down(true)).is_some(),
            ("mac", mac) => {
                let bytes = parse_mac(mac).ok_or_else(|| format!("{mac:?} is no address; {usage}"))?;
                !std::mem::replace(&mut interface.mac, bytes.into()).is_empty()
            }
            ("mtu", mtu) => {
                let number = mtu.parse().ok().filter(|mtu| *mtu != 0);
                let number = number.ok_or_else(|| format!("{mtu:?} is no MTU; {usage}"))?;
                std::mem::replace(&mut interface.mtu, number) != 0
            }
            _ => return Err(format!("{part:?} is not known; {usage}")),
        };
        if taken {
            return Err(format!("{text:?} says one thing twice; {usage}"));
        }
    }
    if !interface.netns.is_empty() && !matches!(interface.link, Some(Link::Tap(_))) {
        return Err(format!("{text:?} has a namespace and no TAP in it; {usage}"));
    }
    if interface.link.is_none() {
        return Err(format!("{text:?} has no link; {usage}"));
    }
    Ok(interface)
}

fn parse_mac(text: &str) -> Option<Vec<u8>> {
    let byte = |part: &str| match part.len() {
        2 if part.bytes().all(|byte| byte.is_ascii_hexdigit()) => u8::from_str_radix(part, 16).ok(),
        _ => None,
    };
    let bytes: Vec<u8> = text.split(':').map(byte).collect::<Option<_>>()?;
    (bytes.len() == 6).then_some(bytes)
}

/// An interface as JSON.
pub fn value(network: &proto::Network) -> Value {
    json!({ "link": network.link, "mac": mac_text(&network.mac), "mtu": network.mtu })
}

fn mac_text(mac: &[u8]) -> String {
    mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Prints what a VM has done so far.
pub async fn stats(socket: &SocketArgument, vm: String, as_json: bool) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.vms;
    let networks = client.get_vm(proto::GetVmRequest { vm: vm.clone() }).await?.into_inner().networks;
    let stats = client.get_vm_stats(proto::GetVmStatsRequest { vm }).await?.into_inner();
    if as_json {
        output::json(&json!({
            "vcpu_exits": stats.vcpu_exits,
            "minor_faults": stats.minor_faults,
            "major_faults": stats.major_faults,
            "private_dirty_bytes": stats.private_dirty_bytes,
            "userfaults": stats.userfaults,
            "userfault_pages": stats.userfault_pages,
            "networks": networks.iter().zip(&stats.networks).map(interface_value).collect::<Vec<_>>(),
        }))?;
        return Ok(());
    }
    output::line(&format!("vCPU exits     {}", stats.vcpu_exits))?;
    output::line(&format!("page faults    {} minor, {} major", stats.minor_faults, stats.major_faults))?;
    if stats.userfaults > 0 {
        output::line(&format!("  of the guest {}, {} pages given", stats.userfaults, stats.userfault_pages))?;
    }
    output::line(&format!("private memory {}", units::bytes(stats.private_dirty_bytes)))?;
    for (index, (network, counted)) in networks.iter().zip(&stats.networks).enumerate() {
        output::line(&format!("interface {index}: {}, address {}", network.link, mac_text(&network.mac)))?;
        output::line(&format!("  in   {} frames, {}", counted.frames_in, units::bytes(counted.bytes_in)))?;
        output::line(&format!("  out  {} frames, {}", counted.frames_out, units::bytes(counted.bytes_out)))?;
        for (count, what) in [
            (counted.filtered_in, "in, filtered by the guest"),
            (counted.dropped_in_too_long, "in, dropped: larger than the guest's buffers"),
            (counted.dropped_in_bad, "in, dropped: not what the guest's driver agreed to"),
            (counted.dropped_out_bad, "out, dropped: no frame, or refused by the host"),
            (counted.dropped_out_no_link, "out, dropped: no link, or nobody at its other end"),
        ] {
            if count > 0 {
                output::line(&format!("  {count} {what}"))?;
            }
        }
    }
    Ok(())
}

fn interface_value((network, counted): (&proto::Network, &proto::NetworkStats)) -> Value {
    json!({
        "link": network.link,
        "mac": mac_text(&network.mac),
        "frames_in": counted.frames_in,
        "bytes_in": counted.bytes_in,
        "frames_out": counted.frames_out,
        "bytes_out": counted.bytes_out,
        "filtered_in": counted.filtered_in,
        "dropped_in_too_long": counted.dropped_in_too_long,
        "dropped_in_bad": counted.dropped_in_bad,
        "dropped_out_bad": counted.dropped_out_bad,
        "dropped_out_no_link": counted.dropped_out_no_link,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read() {
        let read = parse_interface("tap=tap0,mac=02:00:00:00:00:fF,mtu=1400").unwrap();
        assert_eq!(read.link, Some(Link::Tap("tap0".into())));
        assert_eq!((&read.mac[..], read.mtu), (&[2, 0, 0, 0, 0, 0xff][..], 1400));
        let read = parse_interface("tap=tap0,netns=blue").unwrap();
        assert_eq!((read.link, &read.netns[..]), (Some(Link::Tap("tap0".into())), "blue"));
        assert_eq!(parse_interface("down").unwrap().link, Some(Link::Down(true)));
        for wrong in [
            "",
            "tap",
            "tap=",
            "mac=02:00:00:00:00:01",
            "tap=a,tap=b",
            "tap=a,down",
            "down=1",
            "tap=a,mac=2:0:0:0:0:1",
            "tap=a,mac=02:00:00:00:00",
            "tap=a,mtu=0",
            "tap=a,mtu=x",
            "tap=a,mtu=1400,mtu=1400",
            "tap=a,speed=1",
            "tap=a,netns=",
            "tap=a,netns=b,netns=c",
            "down,netns=b",
            "netns=b",
        ] {
            assert!(parse_interface(wrong).is_err(), "{wrong:?}");
        }
    }
}
