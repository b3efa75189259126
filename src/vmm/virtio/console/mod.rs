//! virtio-console, one port: the byte channel between a program in the guest and the daemon.
//!
//! The host's side is a Unix stream socket. Both directions push back: bytes leave the socket only when the guest has
//! given buffers for them, and a transmitted chain stays in the guest's queue until the socket has taken all of it;
//! how much it took is the only state ([`ConsoleState`]). A peer that is gone makes output vanish, as on a line that
//! nobody listens to; it costs no wake-ups.
//!
//! To the guest go whole messages only, however large ([`intake`]): a peer that dies in the middle of one leaves nothing
//! of it in the guest, so that the next one can go on ([`VirtioDevice::new_peer`]).
//!
//! Facts: virtio 1.2 clause 5.3 (without the multiport feature: queue 0 receives, queue 1 transmits); FreeBSD's
//! `sys/dev/virtio/console/virtio_console.c`: attaches as ttyV0.0, gives 128-byte receive buffers, fills the receive
//! queue before `DRIVER_OK`, and **polls** each transmitted chain until it is used, so a socket that nobody reads
//! stops that vCPU.

#![forbid(unsafe_code)]

mod intake;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::net::{RecvFlags, SendFlags};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::Queue;

pub use intake::MessageLength;
use intake::{Intake, any_bytes};

use super::chain::{Chain, ChainError};
use super::queue::{Outcome, work};
use super::{DeviceError, HostInterest, Progress, RING_FEATURES, VirtioDevice, Wishes, read_space};
use crate::snapshot::codec;
use crate::snapshot::state::virtio::ConsoleState;
use crate::vmm::memory::GuestMemory;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 2] = [128, 128];
/// Most bytes moved by one system call.
const PIECE_BYTES: usize = 16 << 10;
/// Most pieces that are taken when the peer changes; more than any socket holds.
const PEER_PIECES_MAX: u32 = 1024;
/// Most bytes moved one way in one call.
const CALL_BYTES_MAX: usize = 1 << 20;

/// The console device.
#[derive(Debug)]
pub struct Console {
    socket: OwnedFd,
    /// Bytes of the transmit queue's head chain that the socket has taken.
    transmit_offset: u64,
    /// The socket takes nothing now; wait for it to become writable.
    transmit_blocked: bool,
    /// The peer reads no more: output is dropped.
    transmit_closed: bool,
    /// The guest has given receive buffers (as far as seen).
    receive_buffers: bool,
    /// The peer writes no more.
    receive_closed: bool,
    /// What came from the peer and was not given to the guest.
    intake: Intake,
    wishes: Wishes,
    piece: Box<[u8]>,
}

impl Console {
    /// A console on a connected Unix stream socket, for any bytes. The socket's blocking mode does not matter.
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self::of_messages(socket, any_bytes)
    }

    /// The same; the peer sends messages, whose lengths this tells.
    pub fn of_messages(socket: impl Into<OwnedFd>, length: MessageLength) -> Self {
        Self {
            socket: socket.into(),
            transmit_offset: 0,
            transmit_blocked: false,
            transmit_closed: false,
            receive_buffers: false,
            receive_closed: false,
            intake: Intake::new(length),
            wishes: Wishes::default(),
            piece: vec![0; PIECE_BYTES].into_boxed_slice(),
        }
    }

    /// Moves bytes from the transmit queue to the socket.
    fn transmit(&mut self, queues: &mut [Queue], memory: &GuestMemory) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(TRANSMIT).ok_or(DeviceError::NoQueue(TRANSMIT))?;
        let mut left = CALL_BYTES_MAX;
        self.transmit_blocked = false;
        let worked = work(queue, memory, |chain| self.transmit_chain(chain, &mut left))?;
        Ok(Progress { more: !worked.empty && !self.transmit_blocked, ..worked.progress })
    }

    fn transmit_chain(&mut self, chain: &Chain<'_>, left: &mut usize) -> Result<Outcome, DeviceError> {
        while !self.transmit_closed {
            let rest = chain.readable_bytes().saturating_sub(self.transmit_offset);
            if rest == 0 {
                break;
            }
            let bytes = rest.min(PIECE_BYTES as u64).min(*left as u64) as usize;
            let Some(piece) = self.piece.get_mut(..bytes).filter(|piece| !piece.is_empty()) else {
                return Ok(Outcome::Keep);
            };
            chain.read(self.transmit_offset, piece)?;
            match send(&self.socket, piece) {
                Ok(sent) => {
                    self.transmit_offset += sent as u64;
                    *left = left.saturating_sub(sent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.transmit_blocked = true;
                    return Ok(Outcome::Keep);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "nobody reads the console any more: its output is dropped");
                    self.transmit_closed = true;
                }
            }
        }
        self.transmit_offset = 0;
        Ok(Outcome::Used(0))
    }

    /// Moves bytes from the socket to the receive queue.
    fn receive(&mut self, queues: &mut [Queue], memory: &GuestMemory) -> Result<Progress, DeviceError> {
        let queue = queues.get_mut(RECEIVE).ok_or(DeviceError::NoQueue(RECEIVE))?;
        let worked = work(queue, memory, |chain| self.receive_chain(chain))?;
        self.receive_buffers = !worked.empty;
        // Chains that are left wait for the socket, which its readiness tells, unless there is something for them here.
        let more = self.receive_buffers && !self.intake.ready().is_empty();
        Ok(Progress { more, ..worked.progress })
    }

    fn receive_chain(&mut self, chain: &Chain<'_>) -> Result<Outcome, DeviceError> {
        // Bytes taken from the socket cannot be put back: be sure of the buffers first.
        chain.check_writable()?;
        let bytes = chain.writable_bytes().min(PIECE_BYTES as u64) as usize;
        if bytes == 0 {
            return Err(ChainError::TooShort(0, 1).into());
        }
        loop {
            let ready = self.intake.ready();
            if !ready.is_empty() {
                let ready = ready.get(..bytes).unwrap_or(ready);
                chain.write(0, ready)?;
                let given = ready.len();
                self.intake.gave(given);
                return Ok(Outcome::Used(given as u32));
            }
            if !self.take_in() {
                return Ok(Outcome::Keep);
            }
        }
    }

    /// Takes one piece from the socket, if there is one.
    fn take_in(&mut self) -> bool {
        while !self.receive_closed {
            match receive(&self.socket, &mut self.piece) {
                Ok(0) => self.receive_closed = true,
                Ok(got) => {
                    self.intake.came(self.piece.get(..got).unwrap_or(&self.piece));
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "nobody writes to the console any more");
                    self.receive_closed = true;
                }
            }
        }
        false
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // cols, rows u16; max_nr_ports u32; emerg_wr u32: none of them valid without its feature bit, except that a
        // reader may want to see one port.
        read_space(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _acked_features: u64) {}

    fn stop_queue(&mut self, index: usize) {
        match index {
            RECEIVE => self.receive_buffers = false,
            // The chain that was sent in part is gone with it.
            _ => (self.transmit_offset, self.transmit_blocked) = (0, false),
        }
    }

    fn reset(&mut self) {
        self.transmit_offset = 0;
        self.transmit_blocked = false;
        self.receive_buffers = false;
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
            _ => Err(DeviceError::NoQueue(index)),
        }
    }

    fn host_interest(&self) -> Vec<HostInterest> {
        let readable = self.receive_buffers && !self.receive_closed;
        let writable = self.transmit_blocked;
        // With neither, the descriptor must not be watched at all: a hang-up is reported whatever was asked for.
        if readable || writable {
            vec![HostInterest { fd: self.socket.as_raw_fd(), readable, writable }]
        } else {
            vec![]
        }
    }

    fn host_event(
        &mut self,
        fd: RawFd,
        queues: &mut [Queue],
        memory: &GuestMemory,
    ) -> Result<Progress, DeviceError> {
        let mut progress = Progress::default();
        if fd != self.socket.as_raw_fd() {
            return Ok(progress);
        }
        if self.transmit_blocked {
            progress = self.transmit(queues, memory)?;
        }
        if self.receive_buffers && !self.receive_closed {
            let received = self.receive(queues, memory)?;
            progress.interrupt |= received.interrupt;
            progress.more |= received.more;
        }
        Ok(progress)
    }

    fn new_peer(&mut self) {
        // The one before writes no more and the next one has not begun: this is all there is of it, a socket full.
        for _ in 0..PEER_PIECES_MAX {
            if !self.take_in() {
                break;
            }
        }
        self.intake.forget_begun();
        self.wishes.queues |= 1 << RECEIVE;
    }

    fn take_wishes(&mut self) -> Wishes {
        std::mem::take(&mut self.wishes)
    }

    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        let state = ConsoleState::V1 {
            transmit_offset: self.transmit_offset,
            transmit_blocked: self.transmit_blocked,
            receive_buffers: self.receive_buffers,
        };
        codec::encode(&state).map_err(|source| DeviceError::Codec { device: self.name(), source })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let ConsoleState::V1 { transmit_offset, transmit_blocked, receive_buffers } =
            codec::decode(bytes).map_err(|source| DeviceError::Codec { device: self.name(), source })?;
        // Any value is harmless. What lies past the chain's end counts as sent; the flags say what to try, and the
        // first try sets them right.
        self.transmit_offset = transmit_offset;
        self.transmit_blocked = transmit_blocked;
        self.receive_buffers = receive_buffers;
        Ok(())
    }
}

/// Sends without blocking, and without SIGPIPE.
fn send(socket: &OwnedFd, data: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(socket, data, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
}

/// Receives without blocking; 0 at the end of the stream.
fn receive(socket: &OwnedFd, data: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(socket, data, RecvFlags::DONTWAIT)?.0)
}
