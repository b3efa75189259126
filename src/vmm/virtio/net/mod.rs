//! virtio-net: one pair of queues and a control queue, on a TAP of the host or a wire to another guest.
//!
//! Everything is done on the device thread, a frame at a time, through one copy. Both directions push back: a frame that
//! the link has no room for stays in the guest's ring, frames that the guest has no buffers for stay in the TAP. What is
//! dropped is counted with its cause ([`counters`]). The device offers as much offload as its link can do; a device
//! without a link (`Link::Down`) offers everything, tells the driver that the link is down, and drops what it sends.
//!
//! | file | what it holds |
//! |---|---|
//! | [`link`] | TAP, wire, nothing |
//! | [`transmit`], [`receive`] | the two directions |
//! | [`control`], [`filter`] | the driver's commands, and the receive filter that they set |
//! | [`counters`] | numbers for people |
//!
//! Pause and snapshot lose no frame by themselves: between two events nothing is half done, the rings are guest memory, and
//! a frame held for want of buffers is part of the state. What is lost: frames that the TAP's own queue has no room for while the
//! VM stands still (the host counts them as the interface's dropped frames), and for a clone all that was under way to the VM
//! that was frozen. Frames in the transmit ring of a frozen guest are sent by it and by every clone.
//!
//! Facts: virtio 1.2 clause 5.1; FreeBSD's `sys/dev/virtio/network/if_vtnet.c` (spins on the control queue, reads its
//! address once).

mod control;
pub mod counters;
mod filter;
#[cfg(test)]
mod hostile;
pub mod link;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;
use virtio_queue::Queue;

use self::counters::Counters;
use self::filter::{Filter, Mac, TABLE_MAX, VLANS};
use self::link::Link;
use super::rate::{Limiter, Rates};
use super::{DeviceError, HostInterest, Progress, RING_FEATURES, VirtioDevice, Wishes, read_space};
use crate::snapshot::codec;
use crate::snapshot::state::virtio::NetState;
use crate::vmm::memory::GuestMemory;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// Ways of [`Net::limiters`].
const IN: usize = 0;
const OUT: usize = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// `struct virtio_net_hdr` with the number of buffers, as always with VERSION_1, and on every link.
pub const HEADER_BYTES: usize = 12;
/// Ethernet's header.
const FRAME_BYTES_MIN: usize = 14;
/// The largest TCP segment that is cut later, with an Ethernet header and a VLAN tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// Least and most MTU that a device may tell (clause 5.1.4.1: at least 68).
pub const MTU_MIN: u16 = 68;
pub const MTU_MAX: u16 = 65_521;
const CONFIG_BYTES: usize = 12;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What drivers may leave to the host in frames that they receive.
const RECEIVE_OFFLOADS: u64 = bit(VIRTIO_NET_F_GUEST_CSUM) | RECEIVE_SEGMENTS;
const RECEIVE_SEGMENTS: u64 =
    bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6) | bit(VIRTIO_NET_F_GUEST_ECN);
const TRANSMIT_SEGMENTS: u64 =
    bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_HOST_TSO6) | bit(VIRTIO_NET_F_HOST_ECN);
/// Offered with every link.
const ALWAYS: u64 = RING_FEATURES
    | bit(VIRTIO_NET_F_MAC)
    | bit(VIRTIO_NET_F_STATUS)
    | bit(VIRTIO_NET_F_MRG_RXBUF)
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
    | bit(VIRTIO_NET_F_CTRL_VLAN)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);

/// What the driver is told about the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// A unicast address.
    pub mac: Mac,
    /// Tells the driver this MTU, [`MTU_MIN`] to [`MTU_MAX`]; `None`: it chooses.
    pub mtu: Option<u16>,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    link: Link,
    config: NetConfig,
    /// Features shown to the driver.
    offered: u64,
    acked: u64,
    counters: Arc<Counters>,
    /// The address now.
    mac: Mac,
    filter: Filter,
    /// Receive offloads in force, as feature bits.
    receive_offloads: u64,
    /// The driver is asked to tell the network where it is.
    announce: bool,
    /// The link takes nothing now; wait for it to become writable.
    transmit_blocked: bool,
    /// The guest has given receive buffers (as far as seen).
    receive_buffers: bool,
    /// A frame on its way in; `held` bytes of it are waiting for buffers.
    incoming: Box<[u8]>,
    held: usize,
    /// A frame on its way out.
    outgoing: Box<[u8]>,
    /// Of frames in and out.
    limiters: [Option<Limiter>; 2],
    wishes: Wishes,
    /// The link that was lost. It stays open: others in this process and the daemon may hold the same open file, and then the device
    /// thread's epoll set goes on watching it, for ever ready, when this descriptor is closed before it is taken out of the set.
    lost: Option<Link>,
}

impl Net {
    /// A device at `link`. A config that [`Self::restore`] will replace may be anything.
    pub fn new(link: Link, config: NetConfig) -> Self {
        let mut offered = ALWAYS | features_of(&link);
        if config.mtu.is_some() {
            offered |= bit(VIRTIO_NET_F_MTU);
        }
        let frame = || vec![0; HEADER_BYTES + FRAME_BYTES_MAX].into_boxed_slice();
        Self {
            link,
            config,
            offered,
            acked: 0,
            counters: Arc::default(),
            mac: config.mac,
            filter: Filter::new(false),
            receive_offloads: 0,
            announce: false,
            transmit_blocked: false,
            receive_buffers: false,
            incoming: frame(),
            held: 0,
            outgoing: frame(),
            limiters: [None, None],
            wishes: Wishes::default(),
            lost: None,
        }
    }

    /// A device that is to take a saved state over: it offers whatever the saved one may have offered, as far as `link`
    /// can.
    pub fn for_restore(link: Link) -> Self {
        Self::new(link, NetConfig { mac: [2, 0, 0, 0, 0, 0], mtu: Some(MTU_MAX) })
    }

    /// Its counters.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// The receive offloads that the driver took.
    fn negotiated_receive_offloads(&self) -> u64 {
        self.acked & RECEIVE_OFFLOADS
    }

    fn set_receive_offloads(&mut self, offloads: u64) -> std::io::Result<()> {
        let flag = |feature, flag| if offloads & bit(feature) != 0 { flag } else { 0 };
        let checksum = flag(VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM);
        // A TAP takes segmentation only together with checksums.
        let segments = flag(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4)
            | flag(VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)
            | flag(VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN);
        self.link.set_receive_offloads(if checksum == 0 { 0 } else { checksum | segments })?;
        self.receive_offloads = offloads;
        Ok(())
    }

    /// That way something waits until its bucket is not empty any more.
    fn is_limited(&self, way: usize) -> bool {
        self.limiters.get(way).and_then(Option::as_ref).is_some_and(Limiter::is_waiting)
    }

    /// The other end is gone for good.
    fn lose_link(&mut self) {
        self.lost = Some(std::mem::replace(&mut self.link, Link::Down));
        self.transmit_blocked = false;
        self.wishes.config_changed = true;
        self.wishes.queues |= 1 << TRANSMIT;
    }

    /// The driver's header: legacy drivers leave the number of buffers out, if they do not merge them.
    fn driver_header_bytes(&self) -> usize {
        match self.acked & (1 << VIRTIO_F_VERSION_1 | bit(VIRTIO_NET_F_MRG_RXBUF)) {
            0 => HEADER_BYTES - 2,
            _ => HEADER_BYTES,
        }
    }

    fn status(&self) -> u16 {
        let up = if self.link.is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        (up | announce) as u16
    }

    fn mismatch(&self, what: impl Into<String>) -> DeviceError {
        DeviceError::Mismatch { device: self.name(), what: what.into() }
    }
}

/// The features that depend on what the link can do.
fn features_of(link: &Link) -> u64 {
    let mut features = 0;
    if link.checksums() {
        features |=
            bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
    }
    if link.segments() {
        features |= TRANSMIT_SEGMENTS | RECEIVE_SEGMENTS;
    }
    features
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // mac, status, max_virtqueue_pairs, mtu.
        let mut config = [0; CONFIG_BYTES];
        let fields = self
            .mac
            .into_iter()
            .chain(self.status().to_le_bytes())
            .chain(1u16.to_le_bytes())
            .chain(self.config.mtu.unwrap_or(0).to_le_bytes());
        for (to, from) in config.iter_mut().zip(fields) {
            *to = from;
        }
        read_space(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only drivers from before VERSION_1 set their address here (clause 5.1.4.3); others use the control queue.
        if self.acked & 1 << VIRTIO_F_VERSION_1 != 0 {
            return;
        }
        let tail = usize::try_from(offset).ok().and_then(|offset| self.mac.get_mut(offset..));
        for (to, from) in tail.into_iter().flatten().zip(data) {
            *to = *from;
        }
        // A group's address is nobody's own.
        self.mac[0] &= !1;
    }

    fn activate(&mut self, acked_features: u64) {
        self.acked = acked_features;
        self.filter = Filter::new(acked_features & bit(VIRTIO_NET_F_CTRL_VLAN) != 0);
        if let Err(error) = self.set_receive_offloads(self.negotiated_receive_offloads()) {
            // The frames then come as they are without offloads, which every driver takes.
            tracing::warn!(%error, "a TAP refused offloads that it had offered");
        }
    }

    fn stop_queue(&mut self, index: usize) {
        match index {
            RECEIVE => {
                self.receive_buffers = false;
                self.limiters[IN].as_mut().map(Limiter::expired);
            }
            TRANSMIT => {
                self.transmit_blocked = false;
                self.limiters[OUT].as_mut().map(Limiter::expired);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.acked = 0;
        self.mac = self.config.mac;
        self.filter = Filter::new(false);
        if let Err(error) = self.set_receive_offloads(0) {
            tracing::warn!(%error, "a TAP's offloads cannot be switched off");
        }
        self.announce = false;
        self.transmit_blocked = false;
        self.receive_buffers = false;
        self.held = 0;
        self.limiters.iter_mut().flatten().for_each(Limiter::expired);
        self.wishes = Wishes::default();
    }

    fn queue_event(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        match index {
            RECEIVE => self.receive(queues, memory),
            TRANSMIT => self.transmit(queues, memory),
            CONTROL => self.control(queues, memory),
            _ => Err(DeviceError::NoQueue(index)),
        }
    }

    fn host_interest(&self) -> Vec<HostInterest> {
        let (readable, writable) = (self.receive_buffers && !self.is_limited(IN), self.transmit_blocked);
        // With neither, the descriptor must not be watched at all: a hang-up is reported whatever was asked for.
        let link = self.link.fd().filter(|_| readable || writable);
        let waiting = self.limiters.iter().flatten().filter(|limiter| limiter.is_waiting());
        let timers =
            waiting.map(|limiter| HostInterest { fd: limiter.fd(), readable: true, writable: false });
        link.map(|fd| HostInterest { fd, readable, writable }).into_iter().chain(timers).collect()
    }

    fn host_event(
        &mut self,
        fd: RawFd,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let mut progress = Progress::default();
        for (way, limiter) in [IN, OUT].into_iter().zip(&mut self.limiters) {
            if let Some(limiter) = limiter.as_mut().filter(|limiter| limiter.fd() == fd) {
                limiter.expired();
                return if way == IN { self.receive(queues, memory) } else { self.transmit(queues, memory) };
            }
        }
        if self.link.fd() != Some(fd) {
            return Ok(progress);
        }
        if self.transmit_blocked {
            progress = self.transmit(queues, memory)?;
        }
        if self.receive_buffers {
            progress.interrupt |= self.receive(queues, memory)?.interrupt;
        }
        Ok(progress)
    }

    fn limit(&mut self, rates: &Rates) -> std::io::Result<()> {
        self.limiters = [Limiter::new(rates.network)?, Limiter::new(rates.network)?];
        Ok(())
    }

    fn take_wishes(&mut self) -> Wishes {
        std::mem::take(&mut self.wishes)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = NetState::V1 {
            permanent_mac: self.config.mac,
            mac: self.mac,
            mtu: self.config.mtu,
            offered: self.offered,
            receive_offloads: self.receive_offloads,
            link_up: self.link.is_up(),
            promiscuous: self.filter.promiscuous,
            all_multicast: self.filter.all_multicast,
            unicast: self.filter.unicast.clone(),
            multicast: self.filter.multicast.clone(),
            vlans: self.filter.vlans(),
            // The next one's link may have room, and its bucket is full.
            transmit_blocked: self.transmit_blocked || self.is_limited(OUT),
            receive_buffers: self.receive_buffers,
            frame: self.incoming.get(..self.held).unwrap_or(&[]).to_vec(),
        };
        codec::encode(&state).map_err(|source| DeviceError::Codec { device: self.name(), source })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let NetState::V1 {
            permanent_mac,
            mac,
            mtu,
            offered,
            receive_offloads,
            link_up,
            promiscuous,
            all_multicast,
            unicast,
            multicast,
            vlans,
            transmit_blocked,
            receive_buffers,
            frame,
        } = codec::decode(bytes).map_err(|source| DeviceError::Codec { device: self.name(), source })?;
        let known = ALWAYS | features_of(&Link::Down) | bit(VIRTIO_NET_F_MTU);
        if offered & !known != 0 || self.acked & !offered & known != 0 {
            return Err(self.mismatch(format!("it offered features {offered:#x}")));
        }
        if receive_offloads & !self.negotiated_receive_offloads() != 0 {
            return Err(self.mismatch(format!("it has offloads {receive_offloads:#x} that were not agreed")));
        }
        if (permanent_mac[0] | mac[0]) & 1 != 0 {
            return Err(self.mismatch("its address is a group's"));
        }
        if mtu.is_some_and(|mtu| !(MTU_MIN..=MTU_MAX).contains(&mtu)) {
            return Err(self.mismatch("its MTU cannot be"));
        }
        let long = |table: &Option<Vec<Mac>>| table.as_ref().is_some_and(|table| table.len() > TABLE_MAX);
        if long(&unicast) || long(&multicast) {
            return Err(self.mismatch(format!("it has more than {TABLE_MAX} addresses")));
        }
        let mut filter = Filter::new(vlans.is_some());
        for vlan in vlans.into_iter().flatten().take(usize::from(VLANS)) {
            if !filter.set_vlan(vlan, true) {
                return Err(self.mismatch(format!("it has a VLAN {vlan}")));
            }
        }
        (filter.promiscuous, filter.all_multicast) = (promiscuous, all_multicast);
        (filter.unicast, filter.multicast) = (unicast, multicast);
        if !frame.is_empty() && !(HEADER_BYTES..=HEADER_BYTES + FRAME_BYTES_MAX).contains(&frame.len()) {
            return Err(self.mismatch(format!("it holds a frame of {} bytes", frame.len())));
        }
        self.set_receive_offloads(receive_offloads)
            .map_err(|error| self.mismatch(format!("the TAP refuses the offloads in use: {error}")))?;
        self.config = NetConfig { mac: permanent_mac, mtu };
        self.mac = mac;
        // What the driver may take after a reset must still be what this link can do.
        self.offered = offered & (ALWAYS | features_of(&self.link) | bit(VIRTIO_NET_F_MTU));
        self.filter = filter;
        self.transmit_blocked = false;
        self.receive_buffers = receive_buffers;
        for (to, from) in self.incoming.iter_mut().zip(&frame) {
            *to = *from;
        }
        self.held = frame.len();
        if transmit_blocked {
            // This link may have room where the other had none.
            self.wishes.queues |= 1 << TRANSMIT;
        }
        let driver_knows = |feature| self.acked & bit(feature) != 0;
        // Nobody at this link's other end has heard of the guest.
        self.announce = self.link.is_up() && driver_knows(VIRTIO_NET_F_GUEST_ANNOUNCE);
        self.wishes.config_changed =
            self.announce || link_up != self.link.is_up() && driver_knows(VIRTIO_NET_F_STATUS);
        Ok(())
    }
}
