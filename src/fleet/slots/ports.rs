//! Ports of the host that are published: taken for as long as they are, so that no program gets one that leads elsewhere, and a port that
//! a program has is not led elsewhere.
//!
//! One that is given back rests, still held, until the host's rules say nothing of it any more; the next VM can have it at once all the same.

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
    taken: HashMap<Key, Taken>,
    /// Given back, and held all the same.
    resting: HashMap<Key, Vec<Socket>>,
}

/// A port, for this.
pub type Key = (Transport, u16);

#[derive(Debug)]
struct Taken {
    /// Holds it.
    held: Vec<Socket>,
    /// Number of the slot that it leads to; `None`: it is kept for a VM that is about to be handed over.
    slot: Option<u32>,
}

impl Ports {
    /// Takes these ports for a slot, or one that is to be found yet, all or none.
    pub fn take(&mut self, ports: &[Publish], slot: Option<u32>) -> Result<(), SlotError> {
        if self.taken.len() + ports.len() > PUBLISHED_MAX {
            return Err(SlotError::PortsFull(PUBLISHED_MAX));
        }
        let mut new = HashMap::with_capacity(ports.len());
        for publish in ports {
            let key = key(publish);
            if let Some(taken) = self.taken.get(&key) {
                let (transport, port) = key;
                let of = match taken.slot {
                    Some(slot) => format!("the VM in slot {slot}"),
                    None => "a VM that is being taken out of a pool".to_owned(),
                };
                return Err(SlotError::PortPublished { port, transport, of });
            }
            if !self.resting.contains_key(&key) {
                new.insert(key, hold(publish)?);
            }
        }
        for key in ports.iter().map(key) {
            if let Some(held) = new.remove(&key).or_else(|| self.resting.remove(&key)) {
                self.taken.insert(key, Taken { held, slot });
            }
        }
        Ok(())
    }

    /// What was kept is this slot's.
    pub fn assign(&mut self, ports: &[Publish], slot: u32) {
        for key in ports.iter().map(key) {
            if let Some(taken) = self.taken.get_mut(&key) {
                taken.slot = Some(slot);
            }
        }
    }

    /// The same for a VM that was taken over: its ports lead to it already, whoever else has got one meanwhile.
    pub fn take_again(&mut self, ports: &[Publish], slot: u32) {
        for publish in ports {
            let held = hold(publish).unwrap_or_else(|error| {
                tracing::warn!(slot, %error, "a published port of a VM that was taken over is not held");
                Vec::new()
            });
            self.taken.insert(key(publish), Taken { held, slot: Some(slot) });
        }
    }

    pub fn give_back(&mut self, ports: &[Publish]) {
        for key in ports.iter().map(key) {
            if let Some(taken) = self.taken.remove(&key) {
                self.resting.insert(key, taken.held);
            }
        }
    }

    /// Whether some were given back and are held still.
    pub fn rest(&self) -> bool {
        !self.resting.is_empty()
    }

    /// Those: to be let go when the host's rules say nothing of them any more.
    pub fn resting(&self) -> Vec<Key> {
        self.resting.keys().copied().collect()
    }

    /// Frees those that rest still.
    pub fn let_go(&mut self, ports: &[Key]) {
        for key in ports {
            self.resting.remove(key);
        }
    }
}

fn key(publish: &Publish) -> Key {
    (publish.transport, publish.host)
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
        assert!(matches!(ports.take(&tcp, Some(1)), Err(SlotError::PortTaken { .. })));
        drop(program);
        ports.take(&tcp, Some(1)).unwrap();
        assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err(), "a program can have it");
        let refused = ports.take(&tcp, Some(2)).unwrap_err();
        assert!(refused.to_string().contains("slot 1"), "{refused}");
        let udp = [Publish { transport: Transport::Udp, ..tcp[0] }];
        let both = [udp[0], tcp[0]];
        assert!(ports.take(&both, Some(2)).is_err());
        drop(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("half of a refused request is taken"));
        ports.give_back(&tcp);
        assert!(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_err(), "rules may lead it away still");
        ports.take(&both, None).unwrap();
        assert!(!ports.rest() && ports.take(&tcp, Some(3)).is_err());
        ports.assign(&both, 2);
        let refused = ports.take(&tcp, Some(3)).unwrap_err();
        assert!(refused.to_string().contains("slot 2"), "{refused}");
        ports.give_back(&both);
        let resting = ports.resting();
        ports.let_go(&resting);
        drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("it is held for nobody"));
    }
}
