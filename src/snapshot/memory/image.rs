//! Writing `memory.img`: the memory of a paused guest into a sparse file.
//!
//! Which pages the guest has made its own is read from the kernel's page map of this process
//! (Documentation/admin-guide/mm/pagemap.rst): a page that is present or swapped out and is not a file page (bit 61) is
//! private to the guest, and its content is in memory. Any other page still is what lies behind the mapping:
//!
//! * nothing, after a cold boot: zeros, and reading it would only make the host allocate it;
//! * the parent's memory file, in a clone, whether mapped or answered by userfaultfd. Its data is copied from file to
//!   file; reading it through the mapping would fault in everything that the clone has spared itself. And since that file never
//!   changes, the guest need not stand still meanwhile ([`Rest`]).
//!
//! Zero pages become holes. Writes are gathered into runs of up to [`WRITE_BYTES_MAX`].

#![allow(unsafe_code)]

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::extents::{Extents, Run};
use crate::snapshot::{
    cause::Cause,
    limits::{MEMORY_BYTES_MAX, PAGE_BYTES, REGIONS_MAX},
    transfer::Copier,
};

/// Most bytes in one write.
pub const WRITE_BYTES_MAX: usize = 4 << 20;
const PAGE: usize = PAGE_BYTES as usize;
/// Room on disk that is left to others.
const MARGIN_BYTES: u64 = 64 << 20;
/// Page map entries read at once: 256 MiB of guest memory, 512 KiB of entries.
const ENTRIES_AT_ONCE: usize = 64 << 10;

/// Why memory could not be written out.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("the memory file cannot be written: {0}")]
    Write(io::Error),
    #[error("the parent's memory cannot be copied: {0}")]
    Copy(io::Error),
    #[error("the parent's memory file cannot be read: {0}")]
    Parent(io::Error),
    #[error("the parent's memory file is damaged: it has {has} bytes, the regions end at {needs}")]
    ParentShort { has: u64, needs: u64 },
    #[error("the page map of this process cannot be read: {0}; is /proc mounted?")]
    PageMap(io::Error),
    #[error("the guest's memory regions do not fit together: {0}")]
    Regions(&'static str),
    #[error(
        "guest memory at {0:#x} is shared or file-backed, but was said to be anonymous: its content would be lost"
    )]
    NotPrivate(usize),
}

impl ImageError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            ImageError::Write(error)
            | ImageError::Copy(error)
            | ImageError::Parent(error)
            | ImageError::PageMap(error) => Cause::of_io(error),
            ImageError::ParentShort { .. } => Cause::Damaged,
            ImageError::Regions(_) => Cause::InvalidInput,
            ImageError::NotPrivate(_) => Cause::Internal,
        }
    }
}

/// The page map of this process. Open it before `/proc` goes away in the jail, in the process that will use it
/// (a fork's copy would still show the parent's memory).
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens `/proc/self/pagemap`.
    pub fn open() -> Result<PageMap, ImageError> {
        File::open("/proc/self/pagemap").map(PageMap).map_err(ImageError::PageMap)
    }

    /// The same, opened elsewhere: by this process, for this process.
    pub fn from_file(file: File) -> PageMap {
        PageMap(file)
    }

    /// Reads the entries of the pages from `address` on, one for each place in `entries`.
    pub(super) fn read(&self, address: usize, entries: &mut [Entry]) -> Result<(), ImageError> {
        let offset = (address / PAGE) as u64 * 8;
        // SAFETY: any bytes are a valid u64, which is all that an entry is, and the byte view spans exactly the entries.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(entries.as_mut_ptr().cast::<u8>(), size_of_val(entries))
        };
        self.0.read_exact_at(bytes, offset).map_err(ImageError::PageMap)
    }
}

/// What the page map says of a page.
#[derive(Debug, Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Entry(u64);

impl Entry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE: u64 = 1 << 61;

    pub(super) fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// The guest's own: its content is in memory, or was swapped out of it.
    pub(super) fn is_private(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0 && self.0 & Self::FILE == 0
    }
}

/// One region of a paused guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct SourceRegion {
    address: *const u8,
    bytes: usize,
    file_offset: u64,
}

impl SourceRegion {
    /// `address`, `bytes` and `file_offset` are multiples of 4 KiB.
    ///
    /// # Safety
    /// The range must be mapped readable, and neither a vCPU nor a device may write to it, as long as the value is
    /// in use.
    pub unsafe fn new(address: *const u8, bytes: usize, file_offset: u64) -> SourceRegion {
        SourceRegion { address, bytes, file_offset }
    }

    /// The bytes of `pages` pages from page `first` on.
    fn slice(&self, first: usize, pages: usize) -> &[u8] {
        debug_assert!((first + pages) * PAGE <= self.bytes);
        // SAFETY: within the range (callers walk 0..bytes); readable and quiet by the contract of `new`.
        unsafe { std::slice::from_raw_parts(self.address.add(first * PAGE), pages * PAGE) }
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Length of the file, holes included.
    pub file_bytes: u64,
    /// Bytes written from memory.
    pub memory_bytes: u64,
    /// Bytes copied from the parent's file.
    pub parent_bytes: u64,
}

impl Written {
    /// Bytes of data in the file.
    pub fn data_bytes(&self) -> u64 {
        self.memory_bytes + self.parent_bytes
    }
}

/// What is still to be copied from the parent's file: the guest's pages that were not its own when it stood still.
#[derive(Debug, Default)]
#[must_use]
pub struct Rest(Vec<Range<u64>>);

impl Rest {
    /// Copies it. The guest may run meanwhile.
    ///
    /// # Errors
    /// [`ImageError::Copy`]; `out` then holds rubbish and is to be thrown away.
    pub fn copy(self, parent: &File, out: &File) -> Result<(), ImageError> {
        let mut copier = Copier::new(parent, out);
        self.0.iter().try_for_each(|run| copier.copy(run.start, run.end)).map_err(ImageError::Copy)
    }

    /// Whether there is certainly room for it.
    pub fn has_room(&self, out: &File) -> bool {
        let bytes = self.0.iter().map(|run| run.end - run.start).sum::<u64>();
        rustix::fs::fstatvfs(out).is_ok_and(|room| {
            room.f_bavail.saturating_mul(room.f_frsize) >= bytes.saturating_add(MARGIN_BYTES)
        })
    }

    fn add(&mut self, start: u64, end: u64) {
        match self.0.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.0.push(start..end),
        }
    }
}

/// Writes what the guest has made its own of the regions to `out`, which must be empty and open for writing; what comes from the parent is
/// left to [`Rest::copy`]. `parent` is the memory file that the clone was
/// started from, with the same offsets; `None` after a cold boot. Nothing is synced.
///
/// # Errors
/// [`ImageError`]; `out` then holds rubbish and is to be thrown away.
pub fn write_image(
    regions: &[SourceRegion],
    parent: Option<&File>,
    page_map: &PageMap,
    out: &File,
) -> Result<(Written, Rest), ImageError> {
    let file_bytes = check(regions)?;
    let parent = parent.map(|file| parent_extents(file, file_bytes)).transpose()?;
    if out.metadata().map_err(ImageError::Write)?.len() != 0 {
        return Err(ImageError::Write(io::Error::other("it is not empty")));
    }
    // The length first: an early word if it does not fit a limit, and what is not written is a hole.
    out.set_len(file_bytes).map_err(ImageError::Write)?;
    let written = Written { file_bytes, ..Written::default() };
    let mut writer = Writer { out, parent, written, rest: Rest::default() };
    let mut entries = vec![Entry::default(); ENTRIES_AT_ONCE];
    for region in regions {
        let pages = region.bytes / PAGE;
        let mut first = 0;
        while first < pages {
            let count = (pages - first).min(entries.len());
            let entries = &mut entries[..count];
            page_map.read(region.address.addr() + first * PAGE, entries)?;
            writer.window(region, first, entries)?;
            first += count;
        }
    }
    Ok((writer.written, writer.rest))
}

/// Checks the regions and gives the length of the file.
fn check(regions: &[SourceRegion]) -> Result<u64, ImageError> {
    if regions.is_empty() || regions.len() > REGIONS_MAX {
        return Err(ImageError::Regions("there must be 1 to 8"));
    }
    let mut spans = Vec::with_capacity(regions.len());
    for region in regions {
        let bytes = region.bytes as u64;
        let aligned = |value: u64| value.is_multiple_of(PAGE_BYTES);
        if bytes == 0
            || !aligned(bytes)
            || !aligned(region.file_offset)
            || !aligned(region.address.addr() as u64)
        {
            return Err(ImageError::Regions("address, length and file offset must be multiples of 4 KiB"));
        }
        let end = region.file_offset.checked_add(bytes).filter(|&end| end <= MEMORY_BYTES_MAX);
        spans.push((region.file_offset, end.ok_or(ImageError::Regions("they end beyond 1 TiB"))?));
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| matches!(pair, [(_, end), (start, _)] if end > start)) {
        return Err(ImageError::Regions("they overlap in the file"));
    }
    Ok(spans.last().map_or(0, |&(_, end)| end))
}

/// Where there is data in the file that the pages which nobody changed come from.
fn parent_extents(file: &File, needs: u64) -> Result<Extents, ImageError> {
    let has = file.metadata().map_err(ImageError::Parent)?.len();
    if has < needs {
        return Err(ImageError::ParentShort { has, needs });
    }
    Extents::of_file(file).map_err(ImageError::Parent)
}

struct Writer<'a> {
    out: &'a File,
    parent: Option<Extents>,
    written: Written,
    rest: Rest,
}

impl Writer<'_> {
    /// The pages of `region` from `first` on, one for each of `entries`.
    fn window(&mut self, region: &SourceRegion, first: usize, entries: &[Entry]) -> Result<(), ImageError> {
        let mut at = 0;
        while let Some(&entry) = entries.get(at) {
            let private = entry.is_private();
            let run = entries.iter().skip(at).take_while(|entry| entry.is_private() == private).count();
            if private {
                self.take_from_memory(region, first + at, run)?;
            } else {
                if self.parent.is_none()
                    && let Some(odd) = entries.iter().skip(at).take(run).position(|entry| entry.is_present())
                {
                    return Err(ImageError::NotPrivate(region.address.addr() + (first + at + odd) * PAGE));
                }
                let offset = region.file_offset + ((first + at) * PAGE) as u64;
                self.take_from_parent(offset, offset + (run * PAGE) as u64);
            }
            at += run;
        }
        Ok(())
    }

    /// Writes what is not zero of `pages` pages.
    fn take_from_memory(
        &mut self,
        region: &SourceRegion,
        first: usize,
        pages: usize,
    ) -> Result<(), ImageError> {
        let (mut at, end) = (first, first + pages);
        while at < end {
            if is_zero(region.slice(at, 1)) {
                at += 1;
                continue;
            }
            let most = (end - at).min(WRITE_BYTES_MAX / PAGE);
            let run = 1 + (1..most).take_while(|&ahead| !is_zero(region.slice(at + ahead, 1))).count();
            let offset = region.file_offset + (at * PAGE) as u64;
            self.out.write_all_at(region.slice(at, run), offset).map_err(ImageError::Write)?;
            self.written.memory_bytes += (run * PAGE) as u64;
            at += run;
        }
        Ok(())
    }

    /// What is data in the parent between two offsets is to be copied.
    fn take_from_parent(&mut self, mut at: u64, end: u64) {
        let Some(parent) = &self.parent else { return };
        while at < end {
            match parent.run_at(at) {
                Run::Hole { end } => at = end,
                Run::Data { end: data_end } => {
                    let stop = data_end.min(end);
                    self.rest.add(at, stop);
                    self.written.parent_bytes += stop - at;
                    at = stop;
                }
            }
        }
    }
}

static ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Compared as slices, which is libc's memcmp: the widest instructions of the host, and out at the first difference.
fn is_zero(page: &[u8]) -> bool {
    page == ZERO_PAGE.as_slice()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::memory::mapped::Mapping;

    fn write(mapping: &Mapping, page: usize, value: u8) {
        assert!((page + 1) * PAGE <= mapping.bytes());
        // SAFETY: within the mapping, which is backed and not shared with another thread.
        unsafe { mapping.address().add(page * PAGE + 100).write(value) };
    }

    fn source(mapping: &Mapping, file_offset: u64) -> SourceRegion {
        // SAFETY: the mapping outlives the use in every test and nobody writes meanwhile.
        unsafe { SourceRegion::new(mapping.address(), mapping.bytes(), file_offset) }
    }

    fn freeze(regions: &[SourceRegion], parent: Option<&File>) -> (File, Written) {
        let out = tempfile::tempfile().unwrap();
        let (written, rest) = write_image(regions, parent, &PageMap::open().unwrap(), &out).unwrap();
        assert!(rest.has_room(&out));
        if let Some(parent) = parent {
            rest.copy(parent, &out).unwrap();
        }
        (out, written)
    }

    /// The byte that `write` wrote, for each page; everything else must be zero.
    fn read(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        let pages = content.chunks(PAGE);
        pages
            .map(|page| {
                assert!(page[..100] == ZERO_PAGE[..100] && page[101..] == ZERO_PAGE[101..]);
                page[100]
            })
            .collect()
    }

    #[test]
    fn only_what_was_written_reaches_the_file_and_nothing_is_faulted_in() {
        let bytes = 64 << 20;
        let mapping = Mapping::anonymous(bytes).unwrap();
        // SAFETY: advice on our own range: single pages, so that the count below is exact.
        unsafe { libc::madvise(mapping.address().cast(), mapping.bytes(), libc::MADV_NOHUGEPAGE) };
        for page in [0, 1, 77, 16383] {
            write(&mapping, page, 5);
        }
        write(&mapping, 78, 0); // touched, but zero
        let (file, written) = freeze(&[source(&mapping, 0)], None);
        assert_eq!(written, Written { file_bytes: bytes, memory_bytes: 4 * 4096, parent_bytes: 0 });
        assert_eq!(Extents::of_file(&file).unwrap().data_bytes(), 4 * 4096);
        let content = read(&file);
        assert_eq!(content.iter().filter(|&&byte| byte == 5).count(), 4);
        assert_eq!((content[0], content[1], content[77], content[16383]), (5, 5, 5, 5));
        let mut entries = vec![Entry::default(); 16384];
        PageMap::open().unwrap().read(mapping.address().addr(), &mut entries).unwrap();
        assert_eq!(entries.iter().filter(|entry| entry.is_present()).count(), 5);
    }

    #[test]
    fn a_clone_is_its_parent_and_its_own_changes() {
        let first = Mapping::anonymous(32 * PAGE_BYTES).unwrap();
        (0..20).for_each(|page| write(&first, page, 1));
        let (parent, _) = freeze(&[source(&first, 0)], None);

        let clone = Mapping::of_file(&parent, 0, 32 * PAGE_BYTES).unwrap();
        write(&clone, 3, 2);
        write(&clone, 4, 0); // zeroed by the clone: must become a hole, not the parent's page
        write(&clone, 30, 3);
        // SAFETY: within the mapping; a read makes the page present but not private.
        assert_eq!(unsafe { clone.address().add(5 * PAGE + 100).read_volatile() }, 1);
        let (file, written) = freeze(&[source(&clone, 0)], Some(&parent));
        let mut expected = vec![1; 20];
        expected.resize(32, 0);
        (expected[3], expected[4], expected[30]) = (2, 0, 3);
        assert_eq!(read(&file), expected);
        assert_eq!(written.memory_bytes, 2 * 4096);
        assert_eq!(written.parent_bytes, 18 * 4096);
        assert_eq!(Extents::of_file(&file).unwrap().data_bytes(), 20 * 4096);
    }

    #[test]
    fn two_regions_lie_one_after_the_other_whatever_their_order() {
        let low = Mapping::anonymous(4 * PAGE_BYTES).unwrap();
        let high = Mapping::anonymous(2 * PAGE_BYTES).unwrap();
        write(&low, 3, 1);
        write(&high, 0, 2);
        let (file, _) = freeze(&[source(&high, 4 * PAGE_BYTES), source(&low, 0)], None);
        assert_eq!(read(&file), [0, 0, 0, 1, 2, 0]);
    }

    #[test]
    fn shared_memory_said_to_be_anonymous_is_an_error_not_a_loss() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mapping = Mapping::of_file(&file, 0, 4096).unwrap();
        // SAFETY: within the mapping.
        unsafe { mapping.address().read_volatile() };
        let out = tempfile::tempfile().unwrap();
        let result = write_image(&[source(&mapping, 0)], None, &PageMap::open().unwrap(), &out);
        assert!(matches!(result, Err(ImageError::NotPrivate(_))));
    }

    #[test]
    fn bad_regions_and_a_short_parent_are_refused() {
        let mapping = Mapping::anonymous(4 * PAGE_BYTES).unwrap();
        let page_map = PageMap::open().unwrap();
        let out = tempfile::tempfile().unwrap();
        let at = |offset| source(&mapping, offset);
        let odd = SourceRegion { bytes: 4095, ..at(0) };
        for regions in [
            vec![],
            vec![at(0); 2],
            vec![at(1)],
            vec![odd],
            vec![at(u64::MAX - 4095)],
            vec![at(MEMORY_BYTES_MAX)],
        ] {
            let result = write_image(&regions, None, &page_map, &out);
            assert!(matches!(result, Err(ImageError::Regions(_))), "{regions:?}");
        }
        let parent = tempfile::tempfile().unwrap();
        parent.set_len(4 * PAGE_BYTES - 1).unwrap();
        assert!(matches!(
            write_image(&[at(0)], Some(&parent), &page_map, &out),
            Err(ImageError::ParentShort { has: 16383, needs: 16384 })
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A boot and two generations of clones against a plain model of the memory.
        #[test]
        fn generations_agree_with_a_model(
            generations in prop::collection::vec(
                prop::collection::vec((0usize..96, 0u8..4, any::<bool>()), 0..60), 1..4),
        ) {
            let mut model = vec![0u8; 96];
            let mut parent: Option<File> = None;
            for writes in generations {
                let mapping = match &parent {
                    None => Mapping::anonymous(96 * PAGE_BYTES).unwrap(),
                    Some(file) => Mapping::of_file(file, 0, 96 * PAGE_BYTES).unwrap(),
                };
                for (page, value, only_read) in writes {
                    if only_read {
                        // SAFETY: within the mapping.
                        let seen = unsafe { mapping.address().add(page * PAGE + 100).read_volatile() };
                        prop_assert_eq!(seen, model[page]);
                    } else {
                        write(&mapping, page, value);
                        model[page] = value;
                    }
                }
                let (file, _) = freeze(&[source(&mapping, 0)], parent.as_ref());
                prop_assert_eq!(read(&file), model.clone());
                let data = model.iter().filter(|&&byte| byte != 0).count() as u64;
                prop_assert_eq!(Extents::of_file(&file).unwrap().data_bytes(), data * PAGE_BYTES);
                parent = Some(file);
            }
        }
    }
}
