//! One block request: from its chain to the status byte. On a thread of the pool, several at once.
//!
//! Header and status may be split over descriptors in any way (clause 2.7.4): only byte positions count. The header is
//! the first 16 readable bytes, the status the last writable byte.
//!
//! Facts: virtio 1.2 clause 5.2.6.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{RANGE_SECTORS_MAX, RANGES_MAX, SERIAL_BYTES, SharedDisk};
use crate::snapshot::layers::LayerError;
use crate::vmm::virtio::DeviceError;
use crate::vmm::virtio::chain::{Chain, ChainError};

/// The unit of addresses and lengths, whatever the block size.
pub const SECTOR_BYTES: u64 = crate::snapshot::layers::SECTOR_BYTES;
/// Most data in one request. A driver that keeps to `seg_max` sends less than this: FreeBSD at most 1 MiB, Linux 4.
const DATA_BYTES_MAX: u64 = 16 << 20;
const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// Why a request fails; each becomes a status byte.
enum Failure {
    /// Wrong, or the disk failed.
    Io,
    /// Nothing this device does.
    Unsupported,
}

impl From<ChainError> for Failure {
    fn from(_: ChainError) -> Self {
        // Too short, or outside guest memory: the driver's own doing, and the status tells it.
        Self::Io
    }
}

impl From<LayerError> for Failure {
    fn from(error: LayerError) -> Self {
        // A guest can ask for a wrong range as often as it likes; only what the host should know is told.
        if let LayerError::Io { .. } = error {
            tracing::warn!(%error, "a disk request failed");
        }
        Self::Io
    }
}

/// What requests are carried out on, and what was agreed upon with the driver.
#[derive(Debug)]
pub struct Target {
    pub disk: SharedDisk,
    pub serial: [u8; SERIAL_BYTES],
    pub acked_features: u64,
}

impl Target {
    fn acked(&self, feature: u32) -> bool {
        self.acked_features & 1 << feature != 0
    }

    /// Carries a request out and writes its status. Returns the bytes written at the start of the writable part. `piece`
    /// holds data on its way.
    pub fn handle(&self, chain: &Chain<'_>, piece: &mut [u8]) -> Result<u32, DeviceError> {
        // Without a byte for the status there is no way to tell the driver but to stop.
        let data_bytes = chain.writable_bytes().checked_sub(1).ok_or(ChainError::TooShort(0, 1))?;
        let mut written = 0;
        let status = match self.carry_out(chain, piece, data_bytes, &mut written) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
        };
        chain.write(data_bytes, &[status as u8])?;
        // The status lies behind the data: it counts only if all before it was written.
        if written == data_bytes {
            written += 1;
        }
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn carry_out(
        &self,
        chain: &Chain<'_>,
        piece: &mut [u8],
        writable: u64,
        written: &mut u64,
    ) -> Result<(), Failure> {
        let mut header = [0; HEADER_BYTES as usize];
        chain.read(0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let readable = chain.readable_bytes() - HEADER_BYTES;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => self.read(chain, piece, sector, writable, written),
            VIRTIO_BLK_T_OUT => self.write(chain, piece, sector, readable),
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush()?),
            VIRTIO_BLK_T_GET_ID if writable >= SERIAL_BYTES as u64 => {
                chain.write(0, &self.serial)?;
                *written = SERIAL_BYTES as u64;
                Ok(())
            }
            VIRTIO_BLK_T_GET_ID => Err(Failure::Io),
            VIRTIO_BLK_T_DISCARD if self.acked(VIRTIO_BLK_F_DISCARD) => self.zero(chain, readable, true),
            VIRTIO_BLK_T_WRITE_ZEROES if self.acked(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.zero(chain, readable, false)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Checks a transfer of `bytes` from `sector` and returns its offset on the disk.
    fn transfer(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let end = offset.checked_add(bytes).ok_or(Failure::Io)?;
        if bytes > DATA_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES) || end > self.disk.disk_bytes() {
            return Err(Failure::Io);
        }
        Ok(offset)
    }

    fn read(
        &self,
        chain: &Chain<'_>,
        piece: &mut [u8],
        sector: u64,
        bytes: u64,
        written: &mut u64,
    ) -> Result<(), Failure> {
        let offset = self.transfer(sector, bytes)?;
        while *written < bytes {
            let part = (bytes - *written).min(piece.len() as u64);
            let piece = piece.get_mut(..part as usize).ok_or(Failure::Io)?;
            self.disk.read_at(piece, offset + *written)?;
            chain.write(*written, piece)?;
            *written += part;
        }
        Ok(())
    }

    fn write(&self, chain: &Chain<'_>, piece: &mut [u8], sector: u64, bytes: u64) -> Result<(), Failure> {
        let offset = self.transfer(sector, bytes)?;
        if self.disk.read_only() {
            return Err(Failure::Io);
        }
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(piece.len() as u64);
            let piece = piece.get_mut(..part as usize).ok_or(Failure::Io)?;
            chain.read(HEADER_BYTES + done, piece)?;
            self.disk.write_at(piece, offset + done)?;
            done += part;
        }
        self.write_through()
    }

    /// A driver that did not take FLUSH has every write stable when it is given back (clause 5.2.6.2). An overlay is as
    /// stable as it gets: it ends with its VM, and a freeze copies what is there.
    fn write_through(&self) -> Result<(), Failure> {
        match self.disk.direct() && !self.acked(VIRTIO_BLK_F_FLUSH) {
            true => Ok(self.disk.flush()?),
            false => Ok(()),
        }
    }

    /// Discard and write-zeroes: the data is a list of ranges.
    fn zero(&self, chain: &Chain<'_>, bytes: u64, discard: bool) -> Result<(), Failure> {
        if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > u64::from(RANGES_MAX) {
            return Err(Failure::Io);
        }
        for index in 0..bytes / RANGE_BYTES {
            let mut range = [0; RANGE_BYTES as usize];
            chain.read(HEADER_BYTES + index * RANGE_BYTES, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = range;
            let flags = u32::from_le_bytes(flags);
            // Clause 5.2.6.2: unknown flags, and unmap in a discard, are unsupported.
            let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if sectors > RANGE_SECTORS_MAX {
                return Err(Failure::Io);
            }
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            match discard {
                true => self.disk.discard(offset, bytes)?,
                false => self.disk.write_zeroes(offset, bytes)?,
            }
        }
        self.write_through()
    }
}
