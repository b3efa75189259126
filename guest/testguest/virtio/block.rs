//! virtio-block (virtio 1.2, 5.2): one request at a time.

use super::Failure;
use super::mmio::Device;
use super::queue::{Queue, Rings};
use crate::wire::SECTOR_BYTES;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
/// A request's data is cut into pieces of this size.
const PIECE_BYTES: usize = 128 << 10;
const ID_BYTES: usize = 20;

pub(crate) struct Block {
    queue: Queue,
    sectors: u64,
    features: u64,
    header: Header,
    status: u8,
}

#[repr(C, align(16))]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

impl Block {
    pub(super) fn start(device: Device, rings: &'static mut Rings) -> Result<Block, Failure> {
        let queue = device.start(FEATURE_READ_ONLY | FEATURE_FLUSH, |device| device.queue(0, rings))?;
        let sectors = u64::from(device.config32(4)) << 32 | u64::from(device.config32(0));
        let header = Header { kind: 0, reserved: 0, sector: 0 };
        Ok(Block { queue, sectors, features: device.features(), header, status: 0 })
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.features & FEATURE_READ_ONLY != 0
    }

    /// Fills `data` (whole sectors) from `sector` on.
    pub(crate) fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<(), Failure> {
        let mut at = sector;
        for piece in data.chunks_mut(PIECE_BYTES) {
            self.request(READ, at, piece.as_mut_ptr() as u64, piece.len() as u32, true)?;
            at += (piece.len() / SECTOR_BYTES) as u64;
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), Failure> {
        let mut at = sector;
        for piece in data.chunks(PIECE_BYTES) {
            self.request(WRITE, at, piece.as_ptr() as u64, piece.len() as u32, false)?;
            at += (piece.len() / SECTOR_BYTES) as u64;
        }
        Ok(())
    }

    /// Nothing to do if the device has no cache to flush.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        if self.features & FEATURE_FLUSH == 0 {
            return Ok(());
        }
        self.request(FLUSH, 0, 0, 0, false)
    }

    pub(crate) fn serial(&mut self) -> Result<[u8; ID_BYTES], Failure> {
        let mut id = [0; ID_BYTES];
        self.request(GET_ID, 0, id.as_mut_ptr() as u64, ID_BYTES as u32, true)?;
        // SAFETY: the device wrote here behind the compiler's back.
        Ok(unsafe { (&raw const id).read_volatile() })
    }

    fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: u64,
        bytes: u32,
        device_writes: bool,
    ) -> Result<(), Failure> {
        let header = &raw mut self.header;
        let status = &raw mut self.status;
        // SAFETY: our own fields; volatile because the device reads one and writes the other.
        unsafe {
            header.write_volatile(Header { kind, reserved: 0, sector });
            status.write_volatile(u8::MAX);
        }
        let after = if bytes == 0 { 2 } else { 1 };
        self.queue.describe(0, header as u64, size_of::<Header>() as u32, false, Some(after));
        self.queue.describe(1, data, bytes, device_writes, Some(2));
        self.queue.describe(2, status as u64, 1, true, None);
        self.queue.give(0);
        self.queue.notify();
        self.queue.wait()?;
        // SAFETY: as above.
        match unsafe { status.read_volatile() } {
            0 => Ok(()),
            refused => Err(Failure::Refused(refused)),
        }
    }
}
