//! The control queue. FreeBSD's driver spins until a command is used, with a lock held, so **every** command is answered at
//! once, and one that is unknown, not negotiated or wrong with `VIRTIO_NET_ERR`.
//!
//! Facts: virtio 1.2 clause 5.1.6.5; FreeBSD's `sys/dev/virtio/network/if_vtnet.c`.

use virtio_bindings::virtio_net::*;
use virtio_queue::Queue;

use super::filter::{Mac, TABLE_MAX};
use super::{CONTROL, Net, bit};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::queue::{Outcome, work};
use crate::vmm::virtio::{DeviceError, Progress};

/// Class and command.
const HEADER_BYTES: u64 = 2;
/// Most entries of an address table that are looked at, however many a driver has: enough for any real one.
const TABLE_ENTRIES_MAX: u32 = 4096;

/// A command that fails. What exactly was wrong cannot be told to a driver.
struct Wrong;

impl<E: std::error::Error> From<E> for Wrong {
    fn from(_: E) -> Self {
        Self
    }
}

impl Net {
    pub(super) fn control(
        &mut self,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(CONTROL).ok_or(DeviceError::NoQueue(CONTROL))?;
        let worked = work(queue, memory, |chain| {
            let answer = match self.command(chain) {
                Ok(()) => VIRTIO_NET_OK,
                Err(Wrong) => VIRTIO_NET_ERR,
            };
            // Without room for an answer the command is given back without one: a driver that polls goes on.
            let room = chain.writable_bytes() > 0 && chain.write(0, &[answer as u8]).is_ok();
            Ok(Outcome::Used(room.into()))
        })?;
        Ok(Progress { more: !worked.empty, ..worked.progress })
    }

    fn command(&mut self, chain: &Chain<'_>) -> Result<(), Wrong> {
        let [class, command] = read(chain, 0)?;
        let data_bytes = chain.readable_bytes() - HEADER_BYTES;
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC) => {
                self.filter.promiscuous = self.switch(chain, data_bytes)?
            }
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI) => {
                self.filter.all_multicast = self.switch(chain, data_bytes)?
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                self.need(VIRTIO_NET_F_CTRL_RX)?;
                let (unicast, next) = table(chain, HEADER_BYTES)?;
                let (multicast, end) = table(chain, next)?;
                if end != chain.readable_bytes() {
                    return Err(Wrong);
                }
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                self.need(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                exactly(data_bytes, 6)?;
                let mac: Mac = read(chain, HEADER_BYTES)?;
                if mac[0] & 1 != 0 {
                    return Err(Wrong);
                }
                self.mac = mac;
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD) => self.vlan(chain, data_bytes, true)?,
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL) => self.vlan(chain, data_bytes, false)?,
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.need(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                self.announce = false;
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                self.need(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                exactly(data_bytes, 8)?;
                let offloads = u64::from_le_bytes(read(chain, HEADER_BYTES)?);
                if offloads & !self.negotiated_receive_offloads() != 0 {
                    return Err(Wrong);
                }
                self.set_receive_offloads(offloads)?;
            }
            _ => return Err(Wrong),
        }
        Ok(())
    }

    fn need(&self, feature: u32) -> Result<(), Wrong> {
        if self.acked & bit(feature) != 0 { Ok(()) } else { Err(Wrong) }
    }

    /// A mode's new value: one byte, 0 or 1.
    fn switch(&self, chain: &Chain<'_>, data_bytes: u64) -> Result<bool, Wrong> {
        self.need(VIRTIO_NET_F_CTRL_RX)?;
        exactly(data_bytes, 1)?;
        let [value] = read(chain, HEADER_BYTES)?;
        Ok(value != 0)
    }

    fn vlan(&mut self, chain: &Chain<'_>, data_bytes: u64, receive: bool) -> Result<(), Wrong> {
        self.need(VIRTIO_NET_F_CTRL_VLAN)?;
        exactly(data_bytes, 2)?;
        let number = u16::from_le_bytes(read(chain, HEADER_BYTES)?);
        if self.filter.set_vlan(number, receive) { Ok(()) } else { Err(Wrong) }
    }
}

fn read<const BYTES: usize>(chain: &Chain<'_>, offset: u64) -> Result<[u8; BYTES], Wrong> {
    let mut data = [0; BYTES];
    chain.read(offset, &mut data)?;
    Ok(data)
}

fn exactly(bytes: u64, expected: u64) -> Result<(), Wrong> {
    if bytes == expected { Ok(()) } else { Err(Wrong) }
}

/// Reads `struct virtio_net_ctrl_mac` at `offset`: the addresses, `None` if there are more than are kept, and where it
/// ends.
fn table(chain: &Chain<'_>, offset: u64) -> Result<(Option<Vec<Mac>>, u64), Wrong> {
    let entries = u32::from_le_bytes(read(chain, offset)?);
    let start = offset + 4;
    let end = start + 6 * u64::from(entries);
    if entries > TABLE_ENTRIES_MAX || end > chain.readable_bytes() {
        return Err(Wrong);
    }
    if entries as usize > TABLE_MAX {
        return Ok((None, end));
    }
    let macs = (0..u64::from(entries)).map(|n| read(chain, start + 6 * n)).collect::<Result<_, _>>()?;
    Ok((Some(macs), end))
}
