//! virtio-console (virtio 1.2, 5.3), port 0 without MULTIPORT: the byte stream of the agent protocol.

use super::Failure;
use super::mmio::Device;
use super::queue::{Queue, Rings, Used};

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BUFFERS: usize = Rings::SIZE as usize;
const BUFFER_BYTES: usize = 4096;
/// The first buffers are short and lie in the page that every request touches anyway.
const SHORT_BUFFERS: usize = 4;
const SHORT_BUFFER_BYTES: usize = 128;
/// A transmission is cut into pieces of this size.
const PIECE_BYTES: usize = 64 << 10;
/// The device is told of returned buffers once so many have come back: before it can run dry, and rarely.
const NOTIFY_AFTER: usize = BUFFERS / 2;

#[repr(align(4096))]
struct Buffers([[u8; BUFFER_BYTES]; BUFFERS]);

static mut BUFFERS_MEMORY: Buffers = Buffers([[0; BUFFER_BYTES]; BUFFERS]);

unsafe extern "C" {
    static short_buffers: [[u8; SHORT_BUFFER_BYTES]; SHORT_BUFFERS];
}

pub(crate) struct Console {
    receive: Queue,
    transmit: Queue,
    /// The buffer being read, and how much of it is read.
    current: Option<(Used, usize)>,
    returned: usize,
}

impl Console {
    pub(super) fn start(
        device: Device,
        receive: &'static mut Rings,
        transmit: &'static mut Rings,
    ) -> Result<Console, Failure> {
        let mut console = device.start(0, |device| {
            let (receive, transmit) = (device.queue(RECEIVE, receive)?, device.queue(TRANSMIT, transmit)?);
            Ok(Console { receive, transmit, current: None, returned: 0 })
        })?;
        for index in 0..BUFFERS {
            let (address, bytes) = buffer(index);
            console.receive.describe(index as u16, address as u64, bytes as u32, true, None);
            console.receive.give(index as u16);
        }
        console.receive.notify();
        Ok(console)
    }

    /// Fills `out` from the stream, halting while there is nothing.
    pub(crate) fn read(&mut self, out: &mut [u8]) -> Result<(), Failure> {
        let mut have = 0;
        while have < out.len() {
            let Some((used, from)) = self.current else {
                match self.receive.take()? {
                    Some(used) if used.bytes as usize > buffer(used.head.into()).1 => {
                        return Err(Failure::Broken("it wrote beyond a buffer"));
                    }
                    Some(used) => self.current = Some((used, 0)),
                    None => self.receive.idle(),
                }
                continue;
            };
            let count = (used.bytes as usize - from).min(out.len() - have);
            // SAFETY: within the buffer; it is ours until it is given again.
            let bytes = unsafe { core::slice::from_raw_parts(buffer(used.head.into()).0.add(from), count) };
            out[have..have + count].copy_from_slice(bytes);
            have += count;
            if from + count < used.bytes as usize {
                self.current = Some((used, from + count));
                continue;
            }
            self.current = None;
            self.receive.give(used.head);
            self.returned += 1;
            if self.returned >= NOTIFY_AFTER {
                self.returned = 0;
                self.receive.notify();
            }
        }
        Ok(())
    }

    /// Whether [`Console::read`] has something to give at once.
    pub(crate) fn has_bytes(&self) -> bool {
        self.current.is_some() || self.receive.has_used()
    }

    /// Whether bytes have come; if not, those that come interrupt.
    pub(crate) fn is_due(&mut self) -> bool {
        self.current.is_some() || self.receive.is_due()
    }

    /// After a halt.
    pub(crate) fn woken(&mut self) {
        self.receive.woken();
    }

    /// Sends bytes; returns when the device has taken them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        for piece in bytes.chunks(PIECE_BYTES) {
            self.transmit.give_one(piece.as_ptr() as u64, piece.len() as u32, false);
            self.transmit.notify();
            self.transmit.wait()?;
        }
        Ok(())
    }
}

/// Address and bytes of a receive buffer.
fn buffer(index: usize) -> (*const u8, usize) {
    // SAFETY: places' addresses, in bounds.
    unsafe {
        if index < SHORT_BUFFERS {
            return ((&raw const short_buffers[index]).cast(), SHORT_BUFFER_BYTES);
        }
        ((&raw const BUFFERS_MEMORY.0[index % BUFFERS]).cast(), BUFFER_BYTES)
    }
}
