//! One clone as its pager thread sees it: reading its faults and giving its pages.

#![allow(unsafe_code)]

use std::{
    io,
    ops::Range,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use userfaultfd::Uffd;

use super::{AROUND_BYTES, Counters, EndReason, FaultRegion, PagerSource};
use crate::snapshot::{limits::PAGE_BYTES, memory::extents::Run};

/// Most faults of one clone that are answered before the others get their turn.
const MESSAGES_AT_ONCE: usize = 32;

/// What the owner wants to be told.
pub(super) struct OnEnd(pub(super) Option<Box<dyn FnOnce(EndReason) + Send>>);

impl std::fmt::Debug for OnEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnEnd")
    }
}

/// One clone as its thread sees it.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) uffd: Uffd,
    pub(super) regions: Vec<FaultRegion>,
    pub(super) source: Arc<PagerSource>,
    pub(super) counters: Arc<Counters>,
    pub(super) totals: Arc<Counters>,
    pub(super) on_end: OnEnd,
}

impl Served {
    /// Answers what is waiting, up to [`MESSAGES_AT_ONCE`]; epoll (level-triggered) comes back for the rest.
    pub(super) fn serve(&mut self, buffer: &mut [u8]) -> Result<(), EndReason> {
        let mut messages = [Message::default(); MESSAGES_AT_ONCE];
        let count = read_messages(&self.uffd, &mut messages)
            .map_err(|error| EndReason::Userfaultfd(format!("it cannot be read: {error}")))?;
        self.answer(messages.get(..count).unwrap_or_default(), buffer)
    }

    fn answer(&self, messages: &[Message], buffer: &mut [u8]) -> Result<(), EndReason> {
        for message in messages {
            match message.event {
                EVENT_PAGEFAULT => self.fault(message.argument[1], buffer)?,
                EVENT_FORK => {
                    // Only asked for by a worker that is not ours; the kernel has put a descriptor into our table.
                    // SAFETY: the message hands over ownership of the new descriptor.
                    drop(unsafe { OwnedFd::from_raw_fd(message.argument[0] as u32 as i32) });
                    return Err(EndReason::Userfaultfd("the worker forked".into()));
                }
                // Remapped, removed or unmapped: what it says is seen at the next fault.
                _ => {}
            }
        }
        Ok(())
    }

    fn fault(&self, address: u64, buffer: &mut [u8]) -> Result<(), EndReason> {
        let page = address - address % PAGE_BYTES;
        let inside = |region: &&FaultRegion| page.wrapping_sub(region.host_address) < region.bytes;
        let Some(region) = self.regions.iter().find(inside) else {
            return Err(EndReason::OutsideRegions(address));
        };
        self.count(|counters| &counters.faults, 1);
        let offset = page - region.host_address + region.file_offset;
        let (is_data, run) = self.around(region, offset);
        let whole = self.give(region, run.clone(), is_data, buffer)?;
        if whole.contains(&offset) {
            return Ok(());
        }
        // Something in the run was there already, in front of the page that is wanted: that page alone.
        let given = self.give(region, offset..offset + PAGE_BYTES, is_data, buffer)?;
        if given.is_empty() {
            // There already, or the worker's mappings are just changing: it looks again, and asks again if need be.
            self.wake(page)?;
        }
        Ok(())
    }

    /// The pages to give for a fault at a file offset: whether they are data, and which.
    fn around(&self, region: &FaultRegion, offset: u64) -> (bool, Range<u64>) {
        let window = offset - offset % AROUND_BYTES;
        let start = window.max(region.file_offset);
        let end = (window + AROUND_BYTES).min(region.file_offset + region.bytes);
        let extents = &self.source.extents;
        let (is_data, run_end) = match extents.run_at(offset) {
            Run::Data { end } => (true, end),
            Run::Hole { end } => (false, end),
        };
        // Back from the fault as far as it is the same run.
        let mut first = offset;
        while first > start && matches!(extents.run_at(first - PAGE_BYTES), Run::Data { .. }) == is_data {
            first -= PAGE_BYTES;
        }
        (is_data, first..end.min(run_end))
    }

    /// Gives a run of pages, by file offsets; returns what was given, which ends early at a page that is there already.
    fn give(
        &self,
        region: &FaultRegion,
        run: Range<u64>,
        is_data: bool,
        buffer: &mut [u8],
    ) -> Result<Range<u64>, EndReason> {
        let bytes = (run.end - run.start) as usize;
        let address = (run.start - region.file_offset + region.host_address) as *mut libc::c_void;
        let given = if is_data {
            let piece =
                buffer.get_mut(..bytes).ok_or_else(|| EndReason::Userfaultfd("run too long".into()))?;
            let read = self.source.file.read_exact_at(piece, run.start);
            read.map_err(|error| EndReason::Source { offset: run.start, error: error.to_string() })?;
            // SAFETY: reads `bytes` bytes of our buffer; what it writes is the worker's memory, not ours.
            done(unsafe { self.uffd.copy(piece.as_ptr().cast(), address, bytes, true) })?
        } else {
            // SAFETY: changes the worker's memory only.
            done(unsafe { self.uffd.zeropage(address, bytes, true) })?
        };
        let pages = given as u64 / PAGE_BYTES;
        self.count(|counters| if is_data { &counters.data_pages } else { &counters.zero_pages }, pages);
        Ok(run.start..run.start + given as u64)
    }

    fn wake(&self, page: u64) -> Result<(), EndReason> {
        let woken = self.uffd.wake(page as *mut libc::c_void, PAGE_BYTES as usize);
        woken.map_err(|error| EndReason::Userfaultfd(format!("{error:?}")))
    }

    fn count(&self, which: impl Fn(&Counters) -> &AtomicU64, add: u64) {
        which(&self.counters).fetch_add(add, Ordering::Relaxed);
        which(&self.totals).fetch_add(add, Ordering::Relaxed);
    }
}

/// Bytes given by a copy or a zeroing; 0 if the first page was there already or the mappings are changing.
fn done(result: userfaultfd::Result<usize>) -> Result<usize, EndReason> {
    use userfaultfd::Error;
    let errno = match result {
        Ok(bytes) => return Ok(bytes),
        // The kernel's answer is signed: a negative count is an error number (EAGAIN before the first page).
        Err(Error::PartiallyCopied(bytes)) => return Ok(isize::try_from(bytes).map_or(0, |_| bytes)),
        Err(Error::CopyFailed(errno) | Error::ZeropageFailed(errno)) => errno as i32,
        Err(other) => return Err(EndReason::Userfaultfd(format!("{other:?}"))),
    };
    match errno {
        libc::EEXIST | libc::EAGAIN => Ok(0),
        libc::ESRCH => Err(EndReason::ProcessGone),
        // ENOENT: unmapped or not registered (any more). Whoever waits there gets its answer from the kernel.
        _ => Err(EndReason::Userfaultfd(io::Error::from_raw_os_error(errno).to_string())),
    }
}

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;

/// `struct uffd_msg`: a page fault's argument is flags, address and thread id; a fork's begins with the descriptor.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    argument: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == 32);

/// Reads without blocking, whatever the descriptor's flags say at this moment; 0 if there is nothing.
fn read_messages(uffd: &Uffd, messages: &mut [Message]) -> io::Result<usize> {
    let target = libc::iovec { iov_base: messages.as_mut_ptr().cast(), iov_len: size_of_val(messages) };
    // RWF_NOWAIT works on userfaultfds from Linux 6.10 on. Before, O_NONBLOCK is all there is.
    // SAFETY: the vector describes `messages`, for which any bytes are valid.
    let mut got = unsafe { libc::preadv2(uffd.as_raw_fd(), &target, 1, -1, libc::RWF_NOWAIT) };
    if got < 0 && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
        // SAFETY: as above.
        got = unsafe { libc::readv(uffd.as_raw_fd(), &target, 1) };
    }
    if let Ok(got) = usize::try_from(got) {
        return Ok(got / size_of::<Message>());
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    fn served(pages: u64) -> Served {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE_BYTES).unwrap();
        for page in [3, 4, 5, 20] {
            file.write_all_at(b"data", page * PAGE_BYTES).unwrap();
        }
        // No userfaultfd: what is tested here must not come so far as to use it.
        let not_used = std::fs::File::open("/dev/null").unwrap();
        Served {
            // SAFETY: the descriptor is given away by its owner.
            uffd: unsafe { Uffd::from_raw_fd(OwnedFd::from(not_used).into_raw_fd()) },
            regions: vec![FaultRegion { host_address: 1 << 30, bytes: pages * PAGE_BYTES, file_offset: 0 }],
            source: Arc::new(PagerSource::new(Arc::new(file)).unwrap()),
            counters: Arc::default(),
            totals: Arc::default(),
            on_end: OnEnd(None),
        }
    }

    fn message(event: u8, argument: [u64; 3]) -> Message {
        Message { event, argument, ..Message::default() }
    }

    #[test]
    fn what_is_given_with_a_page_is_of_its_kind_and_within_window_and_region() {
        let served = served(40);
        let region = FaultRegion { host_address: 0, bytes: 36 * PAGE_BYTES, file_offset: 2 * PAGE_BYTES };
        let around = |page: u64| {
            let (is_data, run) = served.around(&region, page * PAGE_BYTES);
            (is_data, run.start / PAGE_BYTES..run.end / PAGE_BYTES)
        };
        assert_eq!(around(2), (false, 2..3));
        assert_eq!(around(4), (true, 3..6));
        assert_eq!(around(9), (false, 6..16));
        assert_eq!(around(16), (false, 16..20));
        assert_eq!(around(20), (true, 20..21));
        assert_eq!(around(31), (false, 21..32));
        assert_eq!(around(37), (false, 32..38));
    }

    #[test]
    fn a_fork_ends_the_clone_and_its_descriptor_is_closed() {
        let (served, mut buffer) = (served(1), vec![0; AROUND_BYTES as usize]);
        let (mut reader, writer) = io::pipe().unwrap();
        let fd = OwnedFd::from(writer).into_raw_fd();
        let forked = served.answer(&[message(EVENT_FORK, [fd as u64, 0, 0])], &mut buffer);
        assert!(matches!(forked, Err(EndReason::Userfaultfd(_))));
        // The end of the pipe: nobody has the writing side any more.
        assert_eq!(io::Read::read(&mut reader, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn addresses_outside_and_unknown_events_do_no_harm() {
        let (served, mut buffer) = (served(1), vec![0; AROUND_BYTES as usize]);
        let mut answer = |event, address| served.answer(&[message(event, [0, address, 0])], &mut buffer);
        for address in [0, (1 << 30) - 1, (1 << 30) + PAGE_BYTES, u64::MAX] {
            assert_eq!(answer(EVENT_PAGEFAULT, address), Err(EndReason::OutsideRegions(address)));
        }
        for event in [0, 0x11, 0x14, 0x15, 0x16, 0xff] {
            assert_eq!(answer(event, u64::MAX), Ok(()));
        }
        assert_eq!(served.counters.counts().faults, 0);
    }

    #[test]
    fn the_kernels_answers_are_understood() {
        use userfaultfd::Error;
        assert_eq!(done(Ok(4096)), Ok(4096));
        assert_eq!(done(Err(Error::PartiallyCopied(8192))), Ok(8192));
        assert_eq!(done(Err(Error::PartiallyCopied(-libc::EAGAIN as usize))), Ok(0));
        assert!(matches!(done(Err(Error::ReadEof)), Err(EndReason::Userfaultfd(_))));
    }
}
