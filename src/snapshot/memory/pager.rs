//! The pager: threads of the daemon that answer the page faults of many clones from their snapshots' memory files.
//!
//! A clone's worker maps anonymous memory, registers it at a userfaultfd and hands a duplicate of that to the daemon
//! ([`Pager::attach`]). A fault arrives as a message; the answer is `UFFDIO_COPY` of what the file holds, or
//! `UFFDIO_ZEROPAGE` where it has a hole. Around the fault the rest of its aligned 64 KiB is given too, as far as it is of the
//! same kind: one call serves sixteen pages, which the guest will mostly want next.
//!
//! The file is read with `pread` into a buffer, not through a mapping: should it be truncated or its disk fail, the
//! pager gets an error for one clone and not a SIGBUS for the daemon, and the extra copy of 64 KiB costs less than
//! the page faults that a mapping would take.
//!
//! A worker may be hostile: it owns the memory and shares the descriptor. It can make its own clone fail, and no more: the
//! descriptor is checked to be a userfaultfd, reads never block (not even if the worker switches blocking on),
//! every clone gets a bounded number of answers in a turn, and an address outside its regions ends its attachment.
//!
//! When an attachment ends otherwise than by being dropped, its [`EndReason`] is told to the owner, who must then end the worker:
//! its guest hangs at the next fault. (It hangs, and is not fed zeros, because the worker keeps the userfaultfd open:
//! see [`super::mapped::UserfaultDevice::create`].)
//!
//! Facts: userfaultfd(2), ioctl_userfaultfd(2), linux/userfaultfd.h, fs/userfaultfd.c. The order of faults, which a later
//! working-set record needs, is seen in one place: `served::Served::fault`.

#![allow(unsafe_code)]

mod served;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use userfaultfd::Uffd;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use self::served::{OnEnd, Served};
use super::extents::Extents;
use crate::snapshot::{
    cause::Cause,
    limits::{PAGE_BYTES, REGIONS_MAX},
};
use rustix::fs::OFlags;

/// Bytes given around a fault, at most.
pub const AROUND_BYTES: u64 = 64 << 10;
/// Most pager threads.
pub const THREADS_MAX: usize = 16;
/// Most clones of one thread.
pub const CLONES_MAX: usize = 4096;
const EVENTS_AT_ONCE: usize = 64;
/// The epoll token of a thread's own eventfd; attachments count up from 1.
const WAKE_TOKEN: u64 = 0;

/// Why a clone cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    #[error("the pager cannot be started: {0}; are threads or descriptors exhausted?")]
    Start(io::Error),
    #[error("the memory file cannot be read: {0}")]
    Source(io::Error),
    #[error("the worker sent {0} instead of a userfaultfd")]
    NotUserfaultfd(String),
    #[error("the worker's memory regions are refused: {0}")]
    Regions(&'static str),
    #[error("the userfaultfd cannot be watched: {0}")]
    Watch(io::Error),
    #[error("the pager serves {0} clones already: start it with more threads, or end some")]
    Full(usize),
    #[error("the pager has stopped")]
    Stopped,
}

impl PagerError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            PagerError::Start(_) | PagerError::Full(_) => Cause::Exhausted,
            PagerError::Source(error) | PagerError::Watch(error) => Cause::of_io(error),
            PagerError::NotUserfaultfd(_) | PagerError::Regions(_) => Cause::InvalidInput,
            PagerError::Stopped => Cause::WrongState,
        }
    }
}

/// Why an attachment ended by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    #[error("the memory file cannot be read at {offset:#x}: {error}; the snapshot is damaged")]
    Source { offset: u64, error: String },
    #[error("the worker's process is gone")]
    ProcessGone,
    #[error("the worker asked for address {0:#x}, which is not in its memory")]
    OutsideRegions(u64),
    #[error("the worker's userfaultfd fails: {0}")]
    Userfaultfd(String),
}

/// One registered range of a worker, and where its content lies in the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultRegion {
    /// Address in the worker's address space.
    pub host_address: u64,
    pub bytes: u64,
    pub file_offset: u64,
}

/// A snapshot's memory as the pager reads it: made once, shared by all clones of the snapshot.
#[derive(Debug)]
pub struct PagerSource {
    file: Arc<File>,
    extents: Extents,
}

impl PagerSource {
    /// Looks at the file's extents.
    pub fn new(file: Arc<File>) -> Result<PagerSource, PagerError> {
        let extents = Extents::of_file(&file).map_err(PagerError::Source)?;
        Ok(PagerSource { file, extents })
    }
}

/// What has been done for clones.
#[derive(Debug, Default)]
pub struct Counters {
    faults: AtomicU64,
    data_pages: AtomicU64,
    zero_pages: AtomicU64,
}

/// Values of [`Counters`] at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Faults answered.
    pub faults: u64,
    /// Pages copied from the file.
    pub data_pages: u64,
    /// Pages given as zeros.
    pub zero_pages: u64,
}

impl Counters {
    /// The values now.
    pub fn counts(&self) -> Counts {
        Counts {
            faults: self.faults.load(Ordering::Relaxed),
            data_pages: self.data_pages.load(Ordering::Relaxed),
            zero_pages: self.zero_pages.load(Ordering::Relaxed),
        }
    }
}

/// The pager. Dropping it stops its threads and ends all attachments without a word to their owners.
#[derive(Debug)]
pub struct Pager {
    threads: Vec<(Arc<Shared>, Option<JoinHandle<()>>)>,
    next: AtomicUsize,
    totals: Arc<Counters>,
}

/// What a thread and those who talk to it share.
#[derive(Debug)]
struct Shared {
    commands: Mutex<Commands>,
    wake: EventFd,
    /// Clones attached, those on their way included.
    clones: AtomicUsize,
    epoll: Epoll,
}

#[derive(Debug, Default)]
struct Commands {
    attach: Vec<(u64, Served)>,
    detach: Vec<u64>,
    next_token: u64,
    stop: bool,
}

/// A clone being served. Dropping it ends that.
#[derive(Debug)]
pub struct Attachment {
    shared: Arc<Shared>,
    token: u64,
    counters: Arc<Counters>,
}

// === impl Pager ===

impl Pager {
    /// Starts `threads` threads (1 is enough for most hosts: a fault costs the pager a few microseconds).
    pub fn start(threads: usize) -> Result<Pager, PagerError> {
        let totals = Arc::new(Counters::default());
        let mut pager = Pager { threads: Vec::new(), next: AtomicUsize::new(0), totals };
        for number in 0..threads.clamp(1, THREADS_MAX) {
            let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(PagerError::Start)?;
            let epoll = Epoll::new().map_err(PagerError::Start)?;
            let event = EpollEvent::new(EventSet::IN, WAKE_TOKEN);
            epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event).map_err(PagerError::Start)?;
            let commands = Mutex::new(Commands { next_token: WAKE_TOKEN + 1, ..Commands::default() });
            let shared = Arc::new(Shared { commands, wake, clones: AtomicUsize::new(0), epoll });
            let server = Server::new(Arc::clone(&shared));
            let thread = std::thread::Builder::new().name(format!("pager-{number}"));
            let handle = thread.spawn(move || server.run()).map_err(PagerError::Start)?;
            pager.threads.push((shared, Some(handle)));
        }
        Ok(pager)
    }

    /// Serves a clone: `uffd` answers for `regions` of a worker from `source`. `on_end` is called, on a pager thread and at
    /// most once, if the attachment ends otherwise than by being dropped; it must not block.
    pub fn attach(
        &self,
        uffd: OwnedFd,
        regions: &[FaultRegion],
        source: Arc<PagerSource>,
        on_end: impl FnOnce(EndReason) + Send + 'static,
    ) -> Result<Attachment, PagerError> {
        check_userfaultfd(&uffd)?;
        check_regions(regions, source.extents.file_bytes())?;
        set_nonblocking(&uffd).map_err(PagerError::Watch)?;
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len().max(1);
        let (shared, _) = self.threads.get(number).ok_or(PagerError::Stopped)?;
        if shared.clones.fetch_add(1, Ordering::Relaxed) >= CLONES_MAX {
            shared.clones.fetch_sub(1, Ordering::Relaxed);
            return Err(PagerError::Full(CLONES_MAX * self.threads.len()));
        }
        let counters = Arc::new(Counters::default());
        // SAFETY: the descriptor is a userfaultfd (checked above) and given away by its owner.
        let uffd = unsafe { Uffd::from_raw_fd(uffd.into_raw_fd()) };
        let clone = Served {
            uffd,
            regions: regions.to_vec(),
            source,
            counters: Arc::clone(&counters),
            totals: Arc::clone(&self.totals),
            on_end: OnEnd(Some(Box::new(on_end))),
        };
        let token = {
            let mut commands = shared.lock();
            let token = commands.next_token;
            commands.next_token += 1;
            commands.attach.push((token, clone));
            token
        };
        shared.wake();
        Ok(Attachment { shared: Arc::clone(shared), token, counters })
    }

    /// What has been done for all clones ever attached.
    pub fn totals(&self) -> Counts {
        self.totals.counts()
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        for (shared, _) in &self.threads {
            shared.lock().stop = true;
            shared.wake();
        }
        for (_, handle) in &mut self.threads {
            if let Some(handle) = handle.take() {
                // A panic of the thread has been reported by its hook already.
                let _ = handle.join();
            }
        }
    }
}

// === impl Attachment ===

impl Attachment {
    /// What has been done for this clone.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.shared.lock().detach.push(self.token);
        self.shared.wake();
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Commands> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

// === the thread ===

struct Server {
    shared: Arc<Shared>,
    clones: HashMap<u64, Served>,
    buffer: Vec<u8>,
}

impl Server {
    fn new(shared: Arc<Shared>) -> Server {
        Server { shared, clones: HashMap::new(), buffer: vec![0; AROUND_BYTES as usize] }
    }

    fn run(mut self) {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        loop {
            let ready = match self.shared.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Cannot happen with a valid descriptor; without epoll nothing can be served.
                Err(error) => return self.end_all(&error),
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    WAKE_TOKEN => {
                        if self.commands() {
                            return;
                        }
                    }
                    token => self.serve(token, event.event_set()),
                }
            }
        }
    }

    fn end_all(&mut self, error: &io::Error) {
        let tokens: Vec<u64> = self.clones.keys().copied().collect();
        for token in tokens {
            self.end(token, Some(EndReason::Userfaultfd(format!("epoll: {error}"))));
        }
    }

    /// Does what was asked; true: stop.
    fn commands(&mut self) -> bool {
        let _ = self.shared.wake.read();
        let (attach, detach, stop) = {
            let mut commands = self.shared.lock();
            (std::mem::take(&mut commands.attach), std::mem::take(&mut commands.detach), commands.stop)
        };
        // Attach first: what is detached may have been attached in the same breath.
        for (token, clone) in attach {
            let event = EpollEvent::new(EventSet::IN, token);
            let watched = self.shared.epoll.ctl(ControlOperation::Add, clone.uffd.as_raw_fd(), event);
            self.clones.insert(token, clone);
            if let Err(error) = watched {
                self.end(token, Some(EndReason::Userfaultfd(format!("it cannot be watched: {error}"))));
            }
        }
        for token in detach {
            self.end(token, None);
        }
        stop
    }

    fn serve(&mut self, token: u64, events: EventSet) {
        // A clone that was detached earlier in this round is no longer here.
        let Some(clone) = self.clones.get_mut(&token) else { return };
        let ended = if events.contains(EventSet::IN) {
            clone.serve(&mut self.buffer).err()
        } else {
            // EPOLLERR alone: not initialised, or the worker switched blocking on.
            Some(EndReason::Userfaultfd("it is in an error state".into()))
        };
        if ended.is_some() {
            self.end(token, ended);
        }
    }

    fn end(&mut self, token: u64, reason: Option<EndReason>) {
        let Some(mut clone) = self.clones.remove(&token) else { return };
        // Explicitly: the worker's duplicate would keep the descriptor in the set.
        let _ =
            self.shared.epoll.ctl(ControlOperation::Delete, clone.uffd.as_raw_fd(), EpollEvent::default());
        self.shared.clones.fetch_sub(1, Ordering::Relaxed);
        let on_end = clone.on_end.0.take();
        // The owner hears of it, or sees its closure dropped, when descriptor and memory file are let go.
        drop(clone);
        if let (Some(reason), Some(on_end)) = (reason, on_end) {
            on_end(reason);
        }
    }
}

fn check_userfaultfd(fd: &OwnedFd) -> Result<(), PagerError> {
    let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(PagerError::Watch)?;
    match target.as_os_str() == "anon_inode:[userfaultfd]" {
        true => Ok(()),
        false => Err(PagerError::NotUserfaultfd(target.to_string_lossy().into_owned())),
    }
}

fn check_regions(regions: &[FaultRegion], file_bytes: u64) -> Result<(), PagerError> {
    if regions.is_empty() || regions.len() > REGIONS_MAX {
        return Err(PagerError::Regions("there must be 1 to 8"));
    }
    let mut spans = Vec::with_capacity(regions.len());
    for region in regions {
        let FaultRegion { host_address, bytes, file_offset } = *region;
        if bytes == 0 || !(host_address | bytes | file_offset).is_multiple_of(PAGE_BYTES) {
            return Err(PagerError::Regions(
                "addresses and sizes must be multiples of 4 KiB, and sizes not 0",
            ));
        }
        let end = host_address.checked_add(bytes).filter(|&end| end <= 1 << 63);
        spans.push((
            host_address,
            end.ok_or(PagerError::Regions("an address is beyond any process's memory"))?,
        ));
        if file_offset.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(PagerError::Regions("they reach beyond the end of the memory file"));
        }
    }
    spans.sort_unstable();
    match spans.windows(2).any(|pair| matches!(pair, [(_, end), (start, _)] if end > start)) {
        true => Err(PagerError::Regions("they overlap")),
        false => Ok(()),
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests;
