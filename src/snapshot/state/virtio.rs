//! Saved state of the virtio devices and of the transport in front of them.
//!
//! [`TransportState`] is what every device has in common (virtio 1.2 clauses 2.1, 2.2, 2.7 and 4.2.2);
//! [`TransportState::device`] holds the encoded [`BlockState`], [`ConsoleState`], [`NetState`] or [`RngState`]. The enums are
//! versions: an old variant stays readable, a changed layout gets a new variant at the end.

use serde::{Deserialize, Serialize};

/// Version of the layout of [`TransportState`]; goes up when a field is added or changes its meaning.
pub const TRANSPORT_STATE_VERSION: u16 = 1;

/// A virtio-mmio transport with its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// virtio device id (1 net, 2 block, 3 console, 4 rng).
    pub device_id: u32,
    /// Device status register, without interpretation.
    pub status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    /// Feature bits that the driver has written.
    pub driver_features: u64,
    pub queue_select: u32,
    /// Interrupt status: bit 0 used buffers, bit 1 configuration change.
    pub interrupt_status: u32,
    pub config_generation: u32,
    /// Queues that the device was still to look at; bit = number.
    pub pending: u32,
    /// In the order of the device's queue numbers.
    pub queues: Vec<QueueState>,
    /// Encoded state of the device itself.
    pub device: Vec<u8>,
}

/// One split virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries, a power of two.
    pub size: u16,
    pub ready: bool,
    /// Guest-physical addresses of the three parts.
    pub descriptor_table: u64,
    pub available_ring: u64,
    pub used_ring: u64,
    /// Free-running index of the next chain to take.
    pub next_available: u16,
    /// Free-running index of the next used entry to write.
    pub next_used: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
}

/// virtio-blk. The disk's data is not here: it is in the disk layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockState {
    V1 {
        /// Bytes of the disk as the guest saw it: the disk given at restore must have the same size.
        disk_bytes: u64,
        read_only: bool,
    },
}

/// virtio-console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleState {
    V1 {
        /// Bytes of the chain at the head of the transmit queue that had been sent already. The rest of that
        /// chain is in guest memory, so the pending bytes themselves need no room here.
        transmit_offset: u64,
        /// That chain waits for the peer to read.
        transmit_blocked: bool,
        /// The guest had given receive buffers.
        receive_buffers: bool,
    },
}

/// virtio-rng has nothing to remember.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RngState {
    V1,
}

/// virtio-net. The frames that wait in the host's TAP or in the rings are not here: the former stay with the VM that was
/// frozen, the latter are in guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetState {
    V1 {
        /// The address that the device was made with, and shows again after a reset.
        permanent_mac: [u8; 6],
        /// The address now: as made, or as the driver set it.
        mac: [u8; 6],
        /// The MTU that the device tells, if it tells one.
        mtu: Option<u16>,
        /// Device features that were offered to the driver.
        offered: u64,
        /// Receive offloads in force, as feature bits (`VIRTIO_NET_F_GUEST_*`).
        receive_offloads: u64,
        /// The driver was told that the link is up.
        link_up: bool,
        promiscuous: bool,
        all_multicast: bool,
        /// Addresses received besides `mac`. `None`: the driver gave more than the device keeps, all are received.
        unicast: Option<Vec<[u8; 6]>>,
        multicast: Option<Vec<[u8; 6]>>,
        /// VLANs received, ascending. `None`: not filtered.
        vlans: Option<Vec<u16>>,
        /// A transmitted chain waits for the host to take more.
        transmit_blocked: bool,
        /// The guest had given receive buffers.
        receive_buffers: bool,
        /// A frame taken from the host, header included, for which the guest had no room yet; empty: none.
        frame: Vec<u8>,
    },
}
