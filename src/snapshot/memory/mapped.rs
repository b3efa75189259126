//! Host address ranges for guest memory: reserved first, then backed by a file, by nothing, or by a userfaultfd.
//!
//! A [`Mapping`] owns one range for one guest region. Its address is a multiple of 2 MiB and there is unmapped space
//! on both sides, so that an access that strays ends in a signal and not in a neighbour. Reserving is done when a
//! shell is made; what is left for the moment of restore is one `mmap(MAP_FIXED)`.
//!
//! A file shorter than its mapping kills the reader by SIGBUS; so lengths are checked before mapping. Snapshot files are
//! never shortened once published (`store` unlinks, it does not truncate).
//!
//! Facts: mmap(2), madvise(2), userfaultfd(2), ioctl_userfaultfd(2).

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    ops::Range,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::FileExt,
    },
    ptr::{self, NonNull},
};

use userfaultfd::{RegisterMode, Uffd};

use crate::snapshot::{
    cause::Cause,
    limits::{HUGE_BYTES, MEMORY_BYTES_MAX, PAGE_BYTES},
};

/// Why memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("a memory region must be a multiple of 4 KiB between 4 KiB and 1 TiB, not {0} bytes")]
    Size(u64),
    #[error("the offset {0} into the memory file is not a multiple of 4 KiB")]
    Offset(u64),
    #[error("{0:#x} to {1:#x} is no part of the memory region in pages of 4 KiB")]
    Part(usize, usize),
    #[error("the memory file is damaged: it has {has} bytes, the region ends at {needs}")]
    ShortFile { has: u64, needs: u64 },
    #[error(
        "{bytes} bytes of address space cannot be mapped: {source}; is the memory or address-space limit too low?"
    )]
    Map { bytes: u64, source: io::Error },
    #[error("the memory file cannot be read: {0}")]
    File(io::Error),
    #[error(
        "userfaultfd is not permitted here ({0}): run as root, allow access to /dev/userfaultfd, \
         or set vm.unprivileged_userfaultfd=1; or use mapped memory"
    )]
    UserfaultDenied(io::Error),
    #[error("this kernel has no userfaultfd ({0}): use mapped memory")]
    UserfaultMissing(io::Error),
    #[error("userfaultfd failed: {0}")]
    Userfault(String),
}

impl MapError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            MapError::Size(_) | MapError::Offset(_) | MapError::Part(..) => Cause::InvalidInput,
            MapError::ShortFile { .. } => Cause::Damaged,
            MapError::Map { source, .. } | MapError::File(source) => Cause::of_io(source),
            MapError::UserfaultDenied(_) | MapError::UserfaultMissing(_) => Cause::Unsupported,
            MapError::Userfault(_) => Cause::Internal,
        }
    }
}

/// A range of this process's address space for one region of guest memory. Unmapped on drop.
///
/// It must outlive everything that was told its address: a KVM memory slot, a `GuestMemoryMmap` built over it.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    bytes: usize,
    reserved: NonNull<u8>,
    reserved_bytes: usize,
}

// SAFETY: the range belongs to the process, not to a thread, and `Mapping` itself never reads or writes it.
unsafe impl Send for Mapping {}
// SAFETY: as above; all that `&Mapping` offers are the address and the length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves address space without memory behind it: any access is a SIGSEGV until it is backed.
    ///
    /// `bytes`: a multiple of 4 KiB.
    pub fn reserve(bytes: u64) -> Result<Mapping, MapError> {
        if bytes == 0 || bytes > MEMORY_BYTES_MAX || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MapError::Size(bytes));
        }
        // Room for alignment, a guard in front and a guard behind.
        let reserved_bytes =
            bytes.checked_next_multiple_of(HUGE_BYTES).ok_or(MapError::Size(bytes))? + 2 * HUGE_BYTES;
        let (bytes, reserved_bytes) = match (usize::try_from(bytes), usize::try_from(reserved_bytes)) {
            (Ok(bytes), Ok(reserved_bytes)) => (bytes, reserved_bytes),
            _ => return Err(MapError::Size(bytes)),
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let reserved = unsafe { map(ptr::null_mut(), reserved_bytes, libc::PROT_NONE, flags, -1, 0)? };
        let huge = HUGE_BYTES as usize;
        // The first multiple of 2 MiB that leaves at least one byte, hence one page, in front.
        let front = huge - reserved.as_ptr().addr() % huge;
        // SAFETY: front is at most 2 MiB, and the range is 4 MiB longer than `bytes`.
        let address = unsafe { reserved.add(front) };
        Ok(Mapping { address, bytes, reserved, reserved_bytes })
    }

    /// Anonymous memory, zero, huge pages welcome: for a cold boot.
    pub fn anonymous(bytes: u64) -> Result<Mapping, MapError> {
        let mut mapping = Mapping::reserve(bytes)?;
        mapping.back_with_nothing()?;
        Ok(mapping)
    }

    /// Private, lazily read memory from `file` at `file_offset`. The file may be closed afterwards.
    pub fn of_file(file: &File, file_offset: u64, bytes: u64) -> Result<Mapping, MapError> {
        let mut mapping = Mapping::reserve(bytes)?;
        mapping.back_with_file(file, file_offset)?;
        Ok(mapping)
    }

    /// Anonymous memory whose missing pages are asked for at `uffd`.
    pub fn userfault(uffd: &Uffd, bytes: u64) -> Result<Mapping, MapError> {
        let mut mapping = Mapping::reserve(bytes)?;
        mapping.back_with_userfault(uffd)?;
        Ok(mapping)
    }

    /// Backs the range with anonymous memory. What was in it is gone.
    pub fn back_with_nothing(&mut self) -> Result<(), MapError> {
        self.map_over(0..self.bytes, libc::MAP_ANONYMOUS, -1, 0)?;
        // Advice: a kernel without huge pages refuses it, and all still works.
        self.advise(0..self.bytes, libc::MADV_HUGEPAGE);
        Ok(())
    }

    /// Backs the range with `file` from `file_offset` (a multiple of 4 KiB), private and writable; the file itself may be
    /// open for reading only. What was in the range is gone.
    pub fn back_with_file(&mut self, file: &File, file_offset: u64) -> Result<(), MapError> {
        if !file_offset.is_multiple_of(PAGE_BYTES) {
            return Err(MapError::Offset(file_offset));
        }
        let end = file_offset.checked_add(self.bytes as u64).ok_or(MapError::Offset(file_offset))?;
        let has = file.metadata().map_err(MapError::File)?.len();
        if has < end {
            return Err(MapError::ShortFile { has, needs: end });
        }
        self.map_over(0..self.bytes, 0, file.as_raw_fd(), file_offset)
    }

    /// Backs the range with anonymous memory registered at `uffd` for missing pages.
    pub fn back_with_userfault(&mut self, uffd: &Uffd) -> Result<(), MapError> {
        self.back_part_with_userfault(uffd, 0..self.bytes)
    }

    /// The same for a part, in bytes from the first; the bounds are multiples of 4 KiB.
    pub fn back_part_with_userfault(&mut self, uffd: &Uffd, part: Range<usize>) -> Result<(), MapError> {
        let part = self.checked(part)?;
        self.map_over(part.clone(), libc::MAP_ANONYMOUS, -1, 0)?;
        uffd.register_with_mode(self.at(&part).cast(), part.len(), RegisterMode::MISSING)
            .map_err(|error| MapError::Userfault(format!("the memory cannot be registered: {error:?}")))?;
        Ok(())
    }

    /// Backs a part with anonymous memory, in huge pages if it can be, that holds a copy of `file` from `file_offset`.
    pub fn back_part_with_copy(
        &mut self,
        part: Range<usize>,
        file: &File,
        file_offset: u64,
    ) -> Result<(), MapError> {
        let part = self.checked(part)?;
        self.map_over(part.clone(), libc::MAP_ANONYMOUS, -1, 0)?;
        self.advise(part.clone(), libc::MADV_HUGEPAGE);
        // SAFETY: anonymous, zero and writable since a moment ago, and lent to nobody, as `&mut self` shows.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.at(&part), part.len()) };
        file.read_exact_at(memory, file_offset).map_err(MapError::File)
    }

    /// Maps the pages of a part that are not mapped yet, in one call; `own`: as pages that were written. It saves faults and changes nothing, so
    /// it may fail in silence (a kernel before 5.14, memory that is short).
    pub fn populate(&self, part: Range<usize>, own: bool) {
        if let Ok(part) = self.checked(part) {
            self.advise(part, if own { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ });
        }
    }

    fn checked(&self, part: Range<usize>) -> Result<Range<usize>, MapError> {
        let page = PAGE_BYTES as usize;
        match part.start < part.end
            && part.end <= self.bytes
            && part.start.is_multiple_of(page)
            && part.end.is_multiple_of(page)
        {
            true => Ok(part),
            false => Err(MapError::Part(part.start, part.end)),
        }
    }

    /// The address of a checked part.
    fn at(&self, part: &Range<usize>) -> *mut u8 {
        self.address.as_ptr().wrapping_add(part.start)
    }

    fn advise(&self, part: Range<usize>, advice: libc::c_int) {
        // SAFETY: within the range, which is ours, and none of the advices given here changes its content.
        unsafe { libc::madvise(self.at(&part).cast(), part.len(), advice) };
    }

    fn map_over(
        &mut self,
        part: Range<usize>,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: u64,
    ) -> Result<(), MapError> {
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let offset = libc::off64_t::try_from(offset).map_err(|_| MapError::Offset(offset))?;
        // SAFETY: MAP_FIXED replaces exactly (a checked part of) the range that this value owns; `&mut self` shows that nobody who
        // was lent it through this value is using it.
        unsafe { map(self.at(&part), part.len(), protection, flags, fd, offset)? };
        Ok(())
    }

    /// First byte: a multiple of 2 MiB.
    pub fn address(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the whole reservation belongs to this value and to nobody else.
        unsafe { libc::munmap(self.reserved.as_ptr().cast(), self.reserved_bytes) };
    }
}

/// # Safety
/// With `MAP_FIXED` the range must belong to the caller.
unsafe fn map(
    address: *mut u8,
    bytes: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: libc::off64_t,
) -> Result<NonNull<u8>, MapError> {
    // SAFETY: the caller's contract.
    let mapped = unsafe { libc::mmap64(address.cast(), bytes, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(MapError::Map { bytes: bytes as u64, source: io::Error::last_os_error() });
    }
    NonNull::new(mapped.cast())
        .ok_or_else(|| MapError::Map { bytes: bytes as u64, source: io::Error::other("address 0") })
}

/// The right to make userfaultfds. Take it before the process gives up its privileges; each [`create`](Self::create)
/// afterwards opens nothing by path.
#[derive(Debug)]
pub struct UserfaultDevice(Option<File>);

/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h: `_IO(0xaa, 0)`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `UFFDIO_API`: `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

impl UserfaultDevice {
    #[cfg(test)]
    pub fn open() -> UserfaultDevice {
        UserfaultDevice(File::options().read(true).write(true).open("/dev/userfaultfd").ok())
    }

    /// `/dev/userfaultfd` is missing or closed to us: [`create`](Self::create) tries the system call (CAP_SYS_PTRACE or
    /// vm.unprivileged_userfaultfd).
    pub fn closed() -> UserfaultDevice {
        UserfaultDevice(None)
    }

    /// False where only the system call is left.
    pub fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// `/dev/userfaultfd`, open for reading and writing.
    pub fn from_file(device: File) -> UserfaultDevice {
        UserfaultDevice(Some(device))
    }

    /// A new userfaultfd for this process's memory, closed on exec, not blocking. KVM faults guest memory in kernel
    /// mode, so it is one that may answer kernel faults; that is what needs the privilege.
    ///
    /// Whoever runs the guest must keep a duplicate open as long as the memory is registered: when the last one is
    /// closed the kernel answers missing pages with zeros, which would silently corrupt the guest.
    pub fn create(&self) -> Result<Uffd, MapError> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match &self.0 {
            // SAFETY: the request takes an integer argument.
            Some(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            // SAFETY: the system call takes an integer argument; the result is a descriptor, which fits.
            None => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int },
        };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::ENOSYS | libc::ENOTTY) => MapError::UserfaultMissing(error),
                Some(libc::EPERM | libc::EACCES) => MapError::UserfaultDenied(error),
                _ => MapError::Userfault(error.to_string()),
            });
        }
        // SAFETY: the descriptor is new and nobody else's.
        let uffd = unsafe { Uffd::from_raw_fd(fd) };
        let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: the argument is a valid `struct uffdio_api` that lives through the call.
        if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &mut api) } < 0 {
            return Err(MapError::Userfault(io::Error::last_os_error().to_string()));
        }
        Ok(uffd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(mapping: &mut Mapping) -> &mut [u8] {
        // SAFETY: the tests back their mappings before they look, and hold the only reference.
        unsafe { std::slice::from_raw_parts_mut(mapping.address(), mapping.bytes()) }
    }

    #[test]
    fn anonymous_memory_is_aligned_zero_and_writable() {
        let mut mapping = Mapping::anonymous(3 * PAGE_BYTES).unwrap();
        assert_eq!(mapping.address().addr() % HUGE_BYTES as usize, 0);
        assert!(bytes_of(&mut mapping).iter().all(|&byte| byte == 0));
        bytes_of(&mut mapping)[3 * 4096 - 1] = 1;
    }

    #[test]
    fn a_file_is_seen_through_the_mapping_but_not_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_BYTES).unwrap();
        file.write_all_at(b"page two", 2 * PAGE_BYTES).unwrap();
        let mut a = Mapping::of_file(&file, PAGE_BYTES, 3 * PAGE_BYTES).unwrap();
        let mut b = Mapping::of_file(&file, PAGE_BYTES, 3 * PAGE_BYTES).unwrap();
        assert_eq!(&bytes_of(&mut a)[4096..4104], b"page two");
        bytes_of(&mut a)[4096] = b'P';
        assert_eq!(&bytes_of(&mut b)[4096..4104], b"page two");
        let mut content = [0; 8];
        file.read_exact_at(&mut content, 2 * PAGE_BYTES).unwrap();
        assert_eq!(&content, b"page two");
    }

    #[test]
    fn a_short_file_is_refused_before_it_can_hurt() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_BYTES - 1).unwrap();
        assert!(matches!(
            Mapping::of_file(&file, 0, 4 * PAGE_BYTES),
            Err(MapError::ShortFile { has: 16383, needs: 16384 })
        ));
        assert!(Mapping::of_file(&file, 0, 3 * PAGE_BYTES).is_ok());
    }

    #[test]
    fn sizes_and_offsets_that_make_no_sense_are_refused() {
        for bytes in [0, 1, 4095, u64::MAX, u64::MAX - 4095, MEMORY_BYTES_MAX + PAGE_BYTES] {
            assert!(matches!(Mapping::reserve(bytes), Err(MapError::Size(_))), "{bytes}");
        }
        let file = tempfile::tempfile().unwrap();
        for offset in [1, u64::MAX, u64::MAX - 4095] {
            assert!(matches!(Mapping::of_file(&file, offset, 4096), Err(MapError::Offset(_))), "{offset}");
        }
    }

    #[test]
    fn a_part_can_be_a_copy_ahead_of_the_first_write() {
        let file = tempfile::tempfile().unwrap();
        let huge = HUGE_BYTES as usize;
        file.set_len(4 * HUGE_BYTES).unwrap();
        file.write_all_at(b"copied", HUGE_BYTES + 100).unwrap();
        file.write_all_at(b"mapped", 2 * HUGE_BYTES + 100).unwrap();
        let mut mapping = Mapping::of_file(&file, 0, 4 * HUGE_BYTES).unwrap();
        mapping.back_part_with_copy(huge..2 * huge, &file, HUGE_BYTES).unwrap();
        mapping.populate(2 * huge..3 * huge, false);
        mapping.populate(3 * huge..3 * huge + 4096, true);
        // What the file becomes later only what is mapped can show.
        file.write_all_at(b"CHANGED", HUGE_BYTES + 100).unwrap();
        let bytes = bytes_of(&mut mapping);
        assert_eq!(&bytes[huge + 100..huge + 107], b"copied\0");
        assert_eq!(&bytes[2 * huge + 100..2 * huge + 106], b"mapped");
        assert_eq!(bytes[3 * huge], 0);
        for (start, end) in [(0, 0), (4096, 4096), (0, 1), (1, 4096), (0, 4 * huge + 4096), (8192, 4096)] {
            let part = start..end;
            let result = mapping.back_part_with_copy(part.clone(), &file, 0);
            assert!(matches!(result, Err(MapError::Part(..))), "{part:?}");
        }
        let beyond = mapping.back_part_with_copy(0..8192, &file, 4 * HUGE_BYTES - 4096);
        assert!(matches!(beyond, Err(MapError::File(_))));
    }

    #[test]
    fn a_reserved_range_keeps_its_address_when_it_is_backed() {
        let mut mapping = Mapping::reserve(HUGE_BYTES).unwrap();
        let address = mapping.address();
        mapping.back_with_nothing().unwrap();
        assert_eq!(mapping.address(), address);
        bytes_of(&mut mapping)[0] = 1;
    }
}
