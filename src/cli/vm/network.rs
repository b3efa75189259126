//! `--net` and what belongs to it of `vm create` and `vm clone`, and `coldspark vm stats`.

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::api::proto;
use crate::api::proto::network_interface::Link;
use crate::cli::{SocketArgument, output, units};

/// The interfaces of a VM.
#[derive(Debug, Clone, Default, Args)]
pub struct NetArguments {
    /// The VM's next network interface, for a clone a link for its guest's next one: `auto`, a network that the service has made (serve
    /// --networks), or tap=NAME[,netns=NAME][,mac=02:00:00:00:00:01][,mtu=1400], or down; may be given 4 times. A clone's
    /// guest is given IP addresses with ,ip=10.0.0.5/24 (again for more) and ,gateway=10.0.0.1
    #[arg(long = "net", value_name = "LINK", value_parser = parse_interface)]
    nets: Vec<proto::NetworkInterface>,
    /// With --net auto: a port of this host that leads to one of the guest, until the VM ends (may be given again)
    #[arg(long, value_name = "HOSTPORT:GUESTPORT[/tcp|/udp]", value_parser = parse_publish)]
    publish: Vec<proto::PublishedPort>,
    #[command(flatten)]
    reach: ReachArguments,
}

/// What a guest in a network of the service's reaches.
#[derive(Debug, Clone, Default, Args)]
pub struct ReachArguments {
    /// With --net auto: what the guest may reach besides --outbound (may be given again). The host's own services and other VMs only by
    /// exactly their address
    #[arg(long, value_name = "NETWORK[:PORT][/tcp|/udp]", value_parser = parse_allow)]
    allow: Vec<proto::AllowedDestination>,
    /// With --net auto: what the guest reaches by itself [default: public; with --allow: none]
    #[arg(long, value_enum)]
    outbound: Option<Outbound>,
}

/// What a guest reaches by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Outbound {
    /// The public Internet, no private network
    Public,
    /// Everything but this host and other VMs
    All,
    /// Nothing
    None,
}

/// The interfaces of VMs that are made ahead.
#[derive(Debug, Clone, Default, Args)]
pub struct PoolNetArguments {
    /// The link of each guest's next network interface: `auto`, a network that the service has made (serve --networks), or down; may be given 4 times
    #[arg(long = "net", value_name = "LINK", value_parser = parse_interface)]
    nets: Vec<proto::NetworkInterface>,
    #[command(flatten)]
    reach: ReachArguments,
}

impl NetArguments {
    /// As the service is asked.
    pub fn interfaces(&self) -> anyhow::Result<Vec<proto::NetworkInterface>> {
        interfaces(&self.nets, &self.reach, &self.publish)
    }
}

impl PoolNetArguments {
    /// As the service is asked.
    pub fn interfaces(&self) -> anyhow::Result<Vec<proto::NetworkInterface>> {
        interfaces(&self.nets, &self.reach, &[])
    }
}

fn interfaces(
    nets: &[proto::NetworkInterface],
    reach: &ReachArguments,
    publish: &[proto::PublishedPort],
) -> anyhow::Result<Vec<proto::NetworkInterface>> {
    let mut nets = nets.to_vec();
    let slot = nets.iter_mut().find_map(|net| match &mut net.link {
        Some(Link::Slot(slot)) => Some(slot),
        _ => None,
    });
    match slot {
        Some(slot) => {
            slot.publish = publish.to_vec();
            slot.allow = reach.allow.clone();
            slot.outbound = match reach.outbound {
                None => proto::Outbound::Unspecified,
                Some(Outbound::Public) => proto::Outbound::Public,
                Some(Outbound::All) => proto::Outbound::All,
                Some(Outbound::None) => proto::Outbound::None,
            }
            .into();
        }
        None if publish.is_empty() && reach.allow.is_empty() && reach.outbound.is_none() => {}
        None => anyhow::bail!(
            "--publish, --allow and --outbound are about a network of the service's: add --net auto"
        ),
    }
    Ok(nets)
}

/// What follows the last `/`, if it is a transport.
fn split_transport(text: &str) -> (&str, proto::Transport) {
    match text.rsplit_once('/') {
        Some((rest, "tcp")) => (rest, proto::Transport::Tcp),
        Some((rest, "udp")) => (rest, proto::Transport::Udp),
        _ => (text, proto::Transport::Unspecified),
    }
}

fn parse_port(text: &str) -> Result<u32, String> {
    let port =
        text.parse::<u16>().ok().filter(|port| *port != 0 && text.bytes().all(|byte| byte.is_ascii_digit()));
    port.map(u32::from).ok_or_else(|| format!("{text:?} is no port; give 1 to 65535"))
}

/// Reads `8080:80` or `5353:53/udp`.
pub fn parse_publish(text: &str) -> Result<proto::PublishedPort, String> {
    let (ports, transport) = split_transport(text);
    let (host, guest) = ports
        .split_once(':')
        .ok_or("write the host's port, `:` and the guest's, such as 8080:80 or 5353:53/udp")?;
    Ok(proto::PublishedPort {
        host_port: parse_port(host)?,
        guest_port: parse_port(guest)?,
        transport: transport.into(),
    })
}

/// Reads `10.1.0.0/16`, `192.0.2.7:53/udp`, `2001:db8::/32` or `[2001:db8::/32]:443`.
pub fn parse_allow(text: &str) -> Result<proto::AllowedDestination, String> {
    let (rest, transport) = split_transport(text);
    let (network, port) = match rest.strip_prefix('[') {
        Some(rest) => match rest.split_once(']').ok_or("a `]` is missing")? {
            (network, "") => (network, None),
            (network, port) => {
                (network, Some(port.strip_prefix(':').ok_or("after `]` comes `:` and a port")?))
            }
        },
        // More than one colon is an address of IPv6.
        None if rest.matches(':').count() > 1 => (rest, None),
        None => rest.split_once(':').map_or((rest, None), |(network, port)| (network, Some(port))),
    };
    if network.parse::<ipnet::IpNet>().is_err() && network.parse::<std::net::IpAddr>().is_err() {
        return Err(format!(
            "{network:?} is no network; write 192.0.2.7, 10.1.0.0/16:443, [2001:db8::/32]:53/udp"
        ));
    }
    let port = port.map_or(Ok(0), parse_port)?;
    if port == 0 && transport != proto::Transport::Unspecified {
        return Err("/tcp and /udp go with a port".to_owned());
    }
    Ok(proto::AllowedDestination { network: network.to_owned(), port, transport: transport.into() })
}

/// Reads `auto`, `tap=NAME[,netns=NAME][,mac=02:00:00:00:00:01][,mtu=1400][,ip=10.0.0.5/24][,gateway=10.0.0.1]` or `down[,...]`.
pub fn parse_interface(text: &str) -> Result<proto::NetworkInterface, String> {
    let usage = "write auto, tap=NAME (perhaps with ,netns=NAME) or down, then perhaps ,mac=02:00:00:00:00:01 and ,mtu=1400, for a clone ,ip=10.0.0.5/24 and ,gateway=10.0.0.1";
    let mut interface = proto::NetworkInterface::default();
    for part in text.split(',') {
        let taken = match part.split_once('=').unwrap_or((part, "")) {
            ("tap", name) if !name.is_empty() => interface.link.replace(Link::Tap(name.to_owned())).is_some(),
            ("netns", name) if !name.is_empty() => {
                !std::mem::replace(&mut interface.netns, name.to_owned()).is_empty()
            }
            ("auto", "") => interface.link.replace(Link::Slot(proto::SlotLink::default())).is_some(),
            ("down", "") => interface.link.replace(Link::Down(true)).is_some(),
            ("mac", mac) => {
                let bytes = parse_mac(mac).ok_or_else(|| format!("{mac:?} is no address; {usage}"))?;
                !std::mem::replace(&mut interface.mac, bytes.into()).is_empty()
            }
            ("ip", address) => {
                let good = address.parse::<ipnet::IpNet>();
                good.map_err(|_| format!("{address:?} is no address with its prefix; {usage}"))?;
                interface.addresses.push(address.to_owned());
                false
            }
            ("gateway", gateway) => {
                let good = gateway.parse::<std::net::IpAddr>();
                good.map_err(|_| format!("{gateway:?} is no address of a gateway; {usage}"))?;
                interface.gateways.push(gateway.to_owned());
                false
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

/// Interfaces of VMs that are made ahead, as JSON.
pub fn made_ahead(networks: &[proto::NetworkInterface]) -> Value {
    let link = |interface: &proto::NetworkInterface| match &interface.link {
        Some(Link::Slot(slot)) => json!({ "slot": reach_value(slot) }),
        _ => json!({}),
    };
    networks.iter().map(link).collect()
}

/// An interface as JSON.
pub fn value(network: &proto::Network) -> Value {
    let mut value = json!({ "link": network.link, "mac": mac_text(&network.mac), "mtu": network.mtu });
    if let Some(object) = value.as_object_mut().filter(|_| !network.addresses.is_empty()) {
        object.insert("addresses".to_owned(), json!(network.addresses));
        object.insert("gateways".to_owned(), json!(network.gateways));
    }
    if let (Some(slot), Some(object)) = (&network.slot, value.as_object_mut()) {
        object.insert("slot".to_owned(), slot_value(network, slot));
    }
    value
}

fn slot_value(network: &proto::Network, slot: &proto::SlotLink) -> Value {
    let mut value = reach_value(slot);
    if let Some(object) = value.as_object_mut() {
        object.insert("address".to_owned(), json!(network.slot_address));
        object.insert("address6".to_owned(), json!(network.slot_address6));
    }
    value
}

fn reach_value(slot: &proto::SlotLink) -> Value {
    let name = |text: &str, prefix: &str| text.strip_prefix(prefix).unwrap_or(text).to_owned();
    let transport = |transport: proto::Transport| name(transport.as_str_name(), "TRANSPORT_");
    let allow = |entry: &proto::AllowedDestination| json!({ "network": entry.network, "port": entry.port, "transport": transport(entry.transport()) });
    let publish = |entry: &proto::PublishedPort| {
        json!({
            "host_port": entry.host_port,
            "guest_port": entry.guest_port,
            "transport": transport(entry.transport()),
        })
    };
    json!({
        "outbound": name(slot.outbound().as_str_name(), "OUTBOUND_"),
        "allow": slot.allow.iter().map(allow).collect::<Vec<_>>(),
        "publish": slot.publish.iter().map(publish).collect::<Vec<_>>(),
    })
}

/// The addresses by which the host reaches a VM in a network of the service's.
pub fn slot_addresses(vm: &proto::Vm) -> Vec<&str> {
    let both = |network| {
        let proto::Network { slot_address, slot_address6, .. }: &proto::Network = network;
        [slot_address.as_str(), slot_address6.as_str()]
    };
    vm.networks.iter().flat_map(both).filter(|address| !address.is_empty()).collect()
}

/// The same, to go behind other words.
pub fn reached(vm: &proto::Vm) -> String {
    slot_addresses(vm).iter().map(|address| format!("  {address}")).collect()
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
    fn ports_and_destinations_are_read() {
        let read = parse_publish("5353:53/udp").unwrap();
        assert_eq!((read.host_port, read.guest_port, read.transport()), (5353, 53, proto::Transport::Udp));
        assert_eq!(parse_publish("8080:80").unwrap().transport(), proto::Transport::Unspecified);
        for wrong in ["", "80", "80:", ":80", "0:80", "80:65536", "80:80/sctp", "80:+80", "a:80", "1:2:3"] {
            assert!(parse_publish(wrong).is_err(), "{wrong:?}");
        }
        let read = |text| {
            let read = parse_allow(text).unwrap();
            (read.network.clone(), read.port, read.transport())
        };
        use proto::Transport::{Tcp, Udp, Unspecified};
        assert_eq!(read("10.1.0.0/16"), ("10.1.0.0/16".into(), 0, Unspecified));
        assert_eq!(read("10.1.0.0/16:443/tcp"), ("10.1.0.0/16".into(), 443, Tcp));
        assert_eq!(read("192.0.2.7:53/udp"), ("192.0.2.7".into(), 53, Udp));
        assert_eq!(read("2001:db8::/32"), ("2001:db8::/32".into(), 0, Unspecified));
        assert_eq!(read("[2001:db8::1]:53"), ("2001:db8::1".into(), 53, Unspecified));
        assert_eq!(read("[::/0]"), ("::/0".into(), 0, Unspecified));
        for wrong in
            ["", "x", "10.0.0.0/33", "10.0.0.0/8:0", "10.0.0.0/8/udp", "[::1", "[::1]53", "10.0.0.1:53/sctp"]
        {
            assert!(parse_allow(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn interfaces_are_read() {
        let auto = parse_interface("auto").unwrap();
        assert_eq!(auto.link, Some(Link::Slot(proto::SlotLink::default())));
        let read = parse_interface("tap=tap0,mac=02:00:00:00:00:fF,mtu=1400").unwrap();
        assert_eq!(read.link, Some(Link::Tap("tap0".into())));
        assert_eq!((&read.mac[..], read.mtu), (&[2, 0, 0, 0, 0, 0xff][..], 1400));
        let read = parse_interface("tap=tap0,netns=blue").unwrap();
        assert_eq!((read.link, &read.netns[..]), (Some(Link::Tap("tap0".into())), "blue"));
        let read = parse_interface("tap=tap0,ip=10.0.0.5/24,ip=fd00::5/64,gateway=10.0.0.1").unwrap();
        assert_eq!(
            (&read.addresses[..], &read.gateways[..]),
            (&["10.0.0.5/24".to_owned(), "fd00::5/64".to_owned()][..], &["10.0.0.1".to_owned()][..])
        );
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
            "tap=a,ip=10.0.0.5",
            "tap=a,ip=",
            "tap=a,ip=10.0.0.5/33",
            "tap=a,gateway=10.0.0.1/24",
            "ip=10.0.0.5/24",
            "tap=a,netns=",
            "tap=a,netns=b,netns=c",
            "down,netns=b",
            "netns=b",
            "auto=1",
            "auto,down",
            "auto,netns=b",
        ] {
            assert!(parse_interface(wrong).is_err(), "{wrong:?}");
        }
    }
}
