//! virtio-net (virtio 1.2, 5.1), one pair of queues, no offloads: frames as they are.

use super::Failure;
use super::mmio::Device;
use super::queue::{Queue, Rings};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const FEATURE_MAC: u64 = 1 << 5;
/// `struct virtio_net_hdr` with the number of buffers; nothing in it is used without offloads.
const HEADER_BYTES: usize = 12;
/// Longest frame: 1500 bytes behind an Ethernet header.
pub(crate) const FRAME_BYTES: usize = 1514;
const BUFFERS: usize = Rings::SIZE as usize;
const BUFFER_BYTES: usize = 2048;

#[repr(align(4096))]
struct Buffers([[u8; BUFFER_BYTES]; BUFFERS + 1]);

/// The last one is for sending.
static mut BUFFERS_MEMORY: Buffers = Buffers([[0; BUFFER_BYTES]; BUFFERS + 1]);

pub(crate) struct Net {
    receive: Queue,
    transmit: Queue,
    mac: [u8; 6],
}

impl Net {
    pub(super) fn start(
        device: Device,
        receive: &'static mut Rings,
        transmit: &'static mut Rings,
    ) -> Result<Net, Failure> {
        let mut net = device.start(FEATURE_MAC, |device| {
            let [low, high] = [device.config32(0).to_le_bytes(), device.config32(4).to_le_bytes()];
            let mac = [low[0], low[1], low[2], low[3], high[0], high[1]];
            Ok(Net {
                receive: device.queue(RECEIVE, receive)?,
                transmit: device.queue(TRANSMIT, transmit)?,
                mac,
            })
        })?;
        for index in 0..BUFFERS {
            net.receive.describe(index as u16, buffer(index) as u64, BUFFER_BYTES as u32, true, None);
            net.receive.give(index as u16);
        }
        net.receive.notify();
        Ok(net)
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The device filters nothing for it, so an address is what it says.
    pub(crate) fn set_mac(&mut self, mac: [u8; 6]) {
        self.mac = mac;
    }

    /// Copies the next frame that came to `to`; gives its bytes. One that is too long is left out.
    pub(crate) fn receive(&mut self, to: &mut [u8; FRAME_BYTES]) -> Result<Option<usize>, Failure> {
        let Some(used) = self.receive.take()? else { return Ok(None) };
        let bytes = (used.bytes as usize).saturating_sub(HEADER_BYTES);
        if used.bytes as usize > BUFFER_BYTES {
            return Err(Failure::Broken("it wrote beyond a buffer"));
        }
        let bytes = if bytes <= to.len() { bytes } else { 0 };
        // SAFETY: within the buffer; it is ours until it is given again.
        let frame =
            unsafe { core::slice::from_raw_parts(buffer(used.head.into()).add(HEADER_BYTES), bytes) };
        to[..bytes].copy_from_slice(frame);
        self.receive.give(used.head);
        self.receive.notify();
        Ok(Some(bytes))
    }

    /// Sends a frame; returns when the device has taken it.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Result<(), Failure> {
        let to = buffer(BUFFERS).cast_mut();
        let bytes = frame.len().min(BUFFER_BYTES - HEADER_BYTES);
        // SAFETY: within the buffer that only this function uses, when the device has done with it.
        unsafe {
            to.write_bytes(0, HEADER_BYTES);
            core::ptr::copy_nonoverlapping(frame.as_ptr(), to.add(HEADER_BYTES), bytes);
        }
        self.transmit.give_one(to as u64, (HEADER_BYTES + bytes) as u32, false);
        self.transmit.notify();
        self.transmit.wait().map(drop)
    }

    /// Whether a frame has come; if not, one that comes interrupts.
    pub(crate) fn is_due(&mut self) -> bool {
        self.receive.is_due()
    }

    /// After a halt.
    pub(crate) fn woken(&mut self) {
        self.receive.woken();
    }
}

fn buffer(index: usize) -> *const u8 {
    // SAFETY: a place's address, in bounds.
    unsafe { (&raw const BUFFERS_MEMORY.0[index % (BUFFERS + 1)]).cast() }
}
