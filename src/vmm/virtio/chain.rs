//! A descriptor chain, walked once and checked.
//!
//! `virtio-queue` follows the descriptors and bounds the walk; it ends silently where a chain is broken, allows
//! indirect tables of 65535 entries, and a second walk may see other descriptors than the first, since the guest can
//! write them at any time. So the chain is copied out here in one walk, at most [`SEGMENTS_MAX`] long, and every later
//! access works on that copy, through checked guest memory accesses.
//!
//! Facts: virtio 1.2 clauses 2.7.4 (readable before writable), 2.7.5 (descriptors, indirect tables).

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use crate::vmm::memory::GuestMemory;

/// Most descriptors in a chain. Clause 2.7.5.3.1: not more than the queue has entries; our largest queue has 256.
pub const SEGMENTS_MAX: usize = 256;

/// How a driver can get a chain wrong.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("a chain has more than {SEGMENTS_MAX} descriptors")]
    TooLong,
    #[error(
        "a chain breaks off: a loop, an index or an address that does not exist, or a wrong indirect table"
    )]
    Broken,
    #[error("a chain has a readable descriptor after a writable one")]
    Order,
    #[error("a chain has {0} bytes where {1} are needed")]
    TooShort(u64, u64),
    #[error("a buffer does not lie in guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    address: GuestAddress,
    bytes: u32,
}

/// Where the buffers of one chain lie. Without the memory, so that it can be handed to another thread.
#[derive(Debug, Clone)]
pub struct Buffers {
    head: u16,
    /// Readable segments, then writable ones.
    segments: Vec<Segment>,
    readable_count: usize,
    readable_bytes: u64,
    writable_bytes: u64,
}

/// The buffers of one chain: what the device may read, and what it may write, each as one run of bytes.
#[derive(Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemory,
    buffers: Buffers,
}

impl<'m> Chain<'m> {
    /// Walks the chain.
    pub fn new(memory: &'m GuestMemory, chain: DescriptorChain<&GuestMemory>) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let mut new =
            Buffers { head, segments: vec![], readable_count: 0, readable_bytes: 0, writable_bytes: 0 };
        let mut complete = false;
        for descriptor in chain {
            if new.segments.len() == SEGMENTS_MAX {
                return Err(ChainError::TooLong);
            }
            let bytes = descriptor.len();
            // The sums cannot overflow: 256 lengths of 32 bits.
            if descriptor.is_write_only() {
                new.writable_bytes += u64::from(bytes);
            } else if new.readable_count == new.segments.len() {
                new.readable_count += 1;
                new.readable_bytes += u64::from(bytes);
            } else {
                return Err(ChainError::Order);
            }
            new.segments.push(Segment { address: descriptor.addr(), bytes });
            complete = !descriptor.has_next();
        }
        if complete { Ok(Self { memory, buffers: new }) } else { Err(ChainError::Broken) }
    }

    /// A chain that was walked before, on another thread perhaps.
    pub fn again(memory: &'m GuestMemory, buffers: Buffers) -> Self {
        Self { memory, buffers }
    }

    /// What [`Self::again`] needs.
    pub fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Index of the chain's first descriptor: what goes into the used ring.
    pub fn head(&self) -> u16 {
        self.buffers.head
    }

    /// Number of its descriptors.
    pub fn descriptors(&self) -> usize {
        self.buffers.segments.len()
    }

    pub fn readable_bytes(&self) -> u64 {
        self.buffers.readable_bytes
    }

    pub fn writable_bytes(&self) -> u64 {
        self.buffers.writable_bytes
    }

    /// Copies from the readable bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), ChainError> {
        let segments = self.buffers.segments.get(..self.buffers.readable_count).unwrap_or(&[]);
        let mut rest = data;
        for_each_part(segments, offset, rest.len() as u64, |address, bytes| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(bytes);
            rest = after;
            Ok(self.memory.read_slice(part, address)?)
        })
    }

    /// Copies into the writable bytes at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        let segments = self.buffers.segments.get(self.buffers.readable_count..).unwrap_or(&[]);
        let mut rest = data;
        for_each_part(segments, offset, rest.len() as u64, |address, bytes| {
            let (part, after) = rest.split_at(bytes);
            rest = after;
            Ok(self.memory.write_slice(part, address)?)
        })
    }

    /// Checks that all writable bytes lie in guest memory, for a caller that cannot take back what it is to write.
    pub fn check_writable(&self) -> Result<(), ChainError> {
        let segments = self.buffers.segments.get(self.buffers.readable_count..).unwrap_or(&[]);
        let good = segments.iter().all(|segment| {
            self.memory.check_range(segment.address, segment.bytes as usize, Permissions::Write)
        });
        if good { Ok(()) } else { Err(ChainError::Broken) }
    }
}

/// Calls `each` with the address and length of every piece of the bytes `offset..offset + bytes` of `segments`. The
/// lengths add up to `bytes` if all goes well.
fn for_each_part(
    segments: &[Segment],
    offset: u64,
    bytes: u64,
    mut each: impl FnMut(GuestAddress, usize) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let mut skip = offset;
    let mut left = bytes;
    for segment in segments {
        if left == 0 {
            break;
        }
        let length = u64::from(segment.bytes);
        if skip >= length {
            skip -= length;
            continue;
        }
        let part = left.min(length - skip);
        let address = segment.address.checked_add(skip).ok_or(ChainError::Broken)?;
        each(address, part as usize)?;
        left -= part;
        skip = 0;
    }
    if left == 0 { Ok(()) } else { Err(ChainError::TooShort(bytes - left, bytes)) }
}
