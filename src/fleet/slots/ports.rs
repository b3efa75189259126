//! Ports of the host that are published: taken for as long as they are, so that no program gets one that leads elsewhere, and a port that
//! a program has is not led elsewhere.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::access::{Publish, Transport};
use super::error::SlotError;

/// Of all VMs.
pub const PUBLISHED_MAX: usize = 1024;

/// Who has which.
#[derive(Debug, Default)]
pub struct Ports {
    /// With what holds it, and the number of the slot that it leads to.
    taken: HashMap<(Transport, u16), (Vec<Socket>, u32)>,
}

impl Ports {
    /// Takes these ports for a slot, all or none.
    pub fn take(&mut self, ports: &[Publish], slot: u32) -> Result<(), SlotError> {
        if self.taken.len() + ports.len() > PUBLISHED_MAX {
            return Err(SlotError::PortsFull(PUBLISHED_MAX));
        }
        let mut held = Vec::with_capacity(ports.len());
        for publish in ports {
            let key = (publish.transport, publish.host);
            if let Some((_, slot)) = self.taken.get(&key) {
                let (transport, port) = key;
                return Err(SlotError::PortPublished { port, transport, slot: *slot });
            }
            held.push((key, (hold(publish)?, slot)));
        }
        self.taken.extend(held);
        Ok(())
    }

    /// The same for a VM that was taken over: its ports lead to it already, whoever else has got one meanwhile.
    pub fn take_again(&mut self, ports: &[Publish], slot: u32) {
        for publish in ports {
            let held = hold(publish).unwrap_or_else(|error| {
                tracing::warn!(slot, %error, "a published port of a VM that was taken over is not held");
                Vec::new()
            });
            self.taken.insert((publish.transport, publish.host), (held, slot));
        }
    }

    pub fn give_back(&mut self, ports: &[Publish]) {
        for publish in ports {
            self.taken.remove(&(publish.transport, publish.host));
        }
    }
}

/// Sockets that are bound to the port, of IPv4 and, if there is one, of IPv6, and do nothing.
fn hold(publish: &Publish) -> Result<Vec<Socket>, SlotError> {
    let (port, transport) = (publish.host, publish.transport);
    let four = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let six = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let mut held = Vec::with_capacity(2);
    for address in [four, six] {
        match bound(address, transport) {
            Ok(socket) => held.push(socket),
            Err(error) => match error.raw_os_error() {
                Some(libc::EADDRINUSE) => return Err(SlotError::PortTaken { port, transport }),
                // No IPv6 on this host.
                Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) if address.is_ipv6() => {}
                _ => return Err(SlotError::Port { port, transport, reason: error.to_string() }),
            },
        }
    }
    Ok(held)
}

fn bound(address: SocketAddr, transport: Transport) -> io::Result<Socket> {
    let kind = match transport {
        Transport::Tcp => Type::STREAM,
        Transport::Udp => Type::DGRAM,
    };
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transport == Transport::Udp {
        // Nobody reads it.
        socket.set_recv_buffer_size(0)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_port_is_one_vms_and_no_programs() {
        let mut ports = Ports::default();
        let program = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = program.local_addr().unwrap().port();
        let tcp = [Publish { host: port, guest: 80, transport: Transport::Tcp }];
        assert!(matches!(ports.take(&tcp, 1), Err(SlotError::PortTaken { .. })));
        drop(program);
        ports.take(&tcp, 1).unwrap();
        assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err(), "a program can have it");
        assert!(matches!(ports.take(&tcp, 2), Err(SlotError::PortPublished { slot: 1, .. })));
        let udp = [Publish { transport: Transport::Udp, ..tcp[0] }];
        let both = [udp[0], tcp[0]];
        assert!(ports.take(&both, 2).is_err());
        drop(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("half of a refused request is taken"));
        ports.give_back(&tcp);
        ports.take(&both, 2).unwrap();
    }
}
