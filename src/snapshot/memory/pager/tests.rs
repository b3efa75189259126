//! The pager against this very process: a thread touches memory that a userfaultfd watches, and the pager answers.

#![allow(unsafe_code)]

use std::{
    os::{fd::AsFd, unix::fs::FileExt},
    sync::mpsc,
};

use super::*;
use crate::snapshot::memory::{
    image::{PageMap, SourceRegion, write_image},
    mapped::{MapError, Mapping, UserfaultDevice},
};

const PAGE: usize = PAGE_BYTES as usize;
/// Whether a page of the test file is data: a pattern in which windows are whole, mixed and empty.
fn is_data(page: usize) -> bool {
    matches!(page % 64, 0..20 | 33 | 35 | 47..50)
}

fn content(page: usize) -> u8 {
    if is_data(page) { (page % 250) as u8 + 1 } else { 0 }
}

fn memory_file(pages: usize) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len((pages * PAGE) as u64).unwrap();
    for page in (0..pages).filter(|&page| is_data(page)) {
        file.write_all_at(&[content(page); PAGE], (page * PAGE) as u64).unwrap();
    }
    Arc::new(file)
}

/// A worker's side: memory, and the userfaultfd that it keeps.
struct Worker {
    uffd: Uffd,
    memory: Arc<Mapping>,
}

impl Worker {
    /// `None`, with the reason printed, where userfaultfd is not permitted.
    fn new(pages: usize) -> Option<Worker> {
        let uffd = match UserfaultDevice::open().create() {
            Err(error @ (MapError::UserfaultDenied(_) | MapError::UserfaultMissing(_))) => {
                eprintln!("ignored: {error}");
                return None;
            }
            other => other.unwrap(),
        };
        let memory = Arc::new(Mapping::userfault(&uffd, (pages * PAGE) as u64).unwrap());
        Some(Worker { uffd, memory })
    }

    fn duplicate(&self) -> OwnedFd {
        self.uffd.as_fd().try_clone_to_owned().unwrap()
    }

    fn region(&self) -> FaultRegion {
        let host_address = self.memory.address().addr() as u64;
        FaultRegion { host_address, bytes: self.memory.bytes() as u64, file_offset: 0 }
    }

    fn attach(&self, pager: &Pager, source: &Arc<PagerSource>) -> (Attachment, mpsc::Receiver<EndReason>) {
        self.attach_as(pager, source, &[self.region()])
    }

    fn attach_as(
        &self,
        pager: &Pager,
        source: &Arc<PagerSource>,
        regions: &[FaultRegion],
    ) -> (Attachment, mpsc::Receiver<EndReason>) {
        let (sender, ended) = mpsc::channel();
        let on_end = move |reason| sender.send(reason).unwrap();
        (pager.attach(self.duplicate(), regions, Arc::clone(source), on_end).unwrap(), ended)
    }

    /// Lets everybody who waits in the memory go on, with zeros.
    fn release(&self) {
        self.uffd.unregister(self.memory.address().cast(), self.memory.bytes()).unwrap();
    }
}

/// Reads one byte of a page; blocks until the page is there.
fn touch(memory: &Mapping, page: usize) -> u8 {
    assert!(page * PAGE < memory.bytes());
    // SAFETY: within the mapping, which is registered and not unmapped meanwhile.
    unsafe { memory.address().add(page * PAGE + 123).read_volatile() }
}

fn source(file: &Arc<File>) -> Arc<PagerSource> {
    Arc::new(PagerSource::new(Arc::clone(file)).unwrap())
}

#[test]
fn every_page_is_what_the_file_says_for_many_clones_at_once() {
    const PAGES: usize = 1000; // not a multiple of the window
    let source = source(&memory_file(PAGES));
    let pager = Pager::start(2).unwrap();
    let mut clones = Vec::new();
    for _ in 0..6 {
        let Some(worker) = Worker::new(PAGES) else { return };
        let attachment = worker.attach(&pager, &source);
        clones.push((worker, attachment));
    }
    std::thread::scope(|scope| {
        for (number, (worker, _)) in clones.iter().enumerate() {
            for step in [7, 331] {
                scope.spawn(move || {
                    for n in 0..PAGES {
                        let page = (n * step + number) % PAGES;
                        assert_eq!(touch(&worker.memory, page), content(page), "page {page}");
                    }
                });
            }
        }
    });
    let data = (0..PAGES).filter(|&page| is_data(page)).count() as u64;
    let mut faults = 0;
    for (_, (attachment, ended)) in clones {
        faults += attachment.counts().faults;
        drop(attachment);
        assert_eq!(ended.recv(), Err(mpsc::RecvError));
    }
    // A guest goes on before its last fault is counted; with the attachments gone all is.
    let totals = pager.totals();
    assert_eq!(totals.data_pages, 6 * data, "each page is copied once");
    assert_eq!(totals.zero_pages, 6 * (PAGES as u64 - data));
    assert!(totals.faults < 6 * PAGES as u64 / 2, "pages around a fault are given with it: {totals:?}");
    assert!(faults > 0 && faults <= totals.faults);
}

#[test]
fn a_page_that_is_there_already_is_kept_and_the_wanted_one_is_given() {
    let source = source(&memory_file(64));
    let pager = Pager::start(1).unwrap();
    let Some(worker) = Worker::new(64) else { return };
    // Page 0 is the guest's own before the pager's first copy of the window 0..16.
    // SAFETY: a registered page of this process.
    unsafe { worker.uffd.zeropage(worker.memory.address().cast(), PAGE, true).unwrap() };
    let (attachment, ended) = worker.attach(&pager, &source);
    assert_eq!(touch(&worker.memory, 5), content(5));
    assert_eq!(touch(&worker.memory, 0), 0);
    drop(attachment);
    assert_eq!(ended.recv(), Err(mpsc::RecvError));
    assert_eq!(pager.totals(), Counts { faults: 1, data_pages: 1, zero_pages: 0 });
    let (_attachment, _ended) = worker.attach(&pager, &source);
    // In the middle of the run: what lies before it is given, what is wanted behind it too.
    assert_eq!(touch(&worker.memory, 2), content(2));
    assert_eq!(touch(&worker.memory, 15), content(15));
}

#[test]
fn two_regions_are_told_apart() {
    let source = source(&memory_file(96));
    let pager = Pager::start(1).unwrap();
    let Some(worker) = Worker::new(96) else { return };
    let whole = worker.region();
    // The first half of the addresses shows the second half of the file.
    let half = 48 * PAGE_BYTES;
    let regions = [
        FaultRegion { bytes: half, file_offset: half, ..whole },
        FaultRegion { host_address: whole.host_address + half, bytes: half, file_offset: 0 },
    ];
    let (_attachment, _ended) = worker.attach_as(&pager, &source, &regions);
    for page in 0..48 {
        assert_eq!(touch(&worker.memory, page), content(page + 48), "page {page}");
        assert_eq!(touch(&worker.memory, page + 48), content(page), "page {page}");
    }
}

#[test]
fn an_address_outside_the_regions_ends_only_that_clone() {
    let source = source(&memory_file(32));
    let pager = Pager::start(1).unwrap();
    let (Some(liar), Some(honest)) = (Worker::new(32), Worker::new(32)) else { return };
    let half = FaultRegion { bytes: 16 * PAGE_BYTES, ..liar.region() };
    let (_lying, ended) = liar.attach_as(&pager, &source, &[half]);
    let (_attachment, _) = honest.attach(&pager, &source);
    assert_eq!(touch(&liar.memory, 1), content(1));
    let memory = Arc::clone(&liar.memory);
    let thread = std::thread::spawn(move || touch(&memory, 20));
    let address = liar.region().host_address + 20 * PAGE_BYTES;
    assert_eq!(ended.recv().unwrap(), EndReason::OutsideRegions(address));
    assert_eq!(touch(&honest.memory, 20), content(20));
    liar.release();
    thread.join().unwrap();
}

#[test]
fn a_file_truncated_under_the_pager_ends_the_clone_with_a_word() {
    let file = memory_file(32);
    let source = source(&file);
    let pager = Pager::start(1).unwrap();
    let Some(worker) = Worker::new(32) else { return };
    let (_attachment, ended) = worker.attach(&pager, &source);
    file.set_len(4096).unwrap();
    let memory = Arc::clone(&worker.memory);
    let thread = std::thread::spawn(move || touch(&memory, 3));
    let reason = ended.recv().unwrap();
    assert!(matches!(reason, EndReason::Source { offset: 0, .. }), "{reason}");
    worker.release();
    thread.join().unwrap();
}

#[test]
fn a_dropped_attachment_is_silent_and_its_descriptor_closed() {
    let source = source(&memory_file(32));
    let pager = Pager::start(1).unwrap();
    let Some(worker) = Worker::new(32) else { return };
    let (attachment, ended) = worker.attach(&pager, &source);
    assert_eq!(touch(&worker.memory, 3), content(3));
    drop(attachment);
    // The channel's sender goes with the attachment: no reason, and all that belonged to it is gone.
    assert_eq!(ended.recv(), Err(mpsc::RecvError));
    assert_eq!(Arc::strong_count(&source), 1);
    // Attached anew, it goes on.
    let (_attachment, _ended) = worker.attach(&pager, &source);
    assert_eq!(touch(&worker.memory, 18), content(18));
}

#[test]
fn a_stopped_pager_lets_go_of_everything() {
    let source = source(&memory_file(32));
    let pager = Pager::start(3).unwrap();
    let mut clones = Vec::new();
    for _ in 0..5 {
        let Some(worker) = Worker::new(32) else { return };
        let attachment = worker.attach(&pager, &source);
        clones.push((worker, attachment));
    }
    drop(pager);
    assert_eq!(Arc::strong_count(&source), 1);
    for (_, (attachment, ended)) in clones {
        assert_eq!(ended.recv(), Err(mpsc::RecvError));
        drop(attachment);
    }
}

#[test]
fn switching_blocking_on_does_not_stop_the_pager() {
    let source = source(&memory_file(32));
    let pager = Pager::start(1).unwrap();
    let (Some(hostile), Some(honest)) = (Worker::new(32), Worker::new(32)) else { return };
    let (_a, ended) = hostile.attach(&pager, &source);
    let (_b, _) = honest.attach(&pager, &source);
    assert_eq!(touch(&hostile.memory, 1), content(1));
    // SAFETY: plain integers.
    assert_eq!(unsafe { libc::fcntl(hostile.uffd.as_raw_fd(), libc::F_SETFL, 0) }, 0);
    // A blocking userfaultfd cannot be polled: the kernel reports an error, and the clone is ended.
    let memory = Arc::clone(&hostile.memory);
    let thread = std::thread::spawn(move || touch(&memory, 20));
    assert!(matches!(ended.recv().unwrap(), EndReason::Userfaultfd(_)));
    assert_eq!(touch(&honest.memory, 20), content(20));
    hostile.release();
    thread.join().unwrap();
}

#[test]
fn what_is_no_userfaultfd_and_regions_that_lie_are_refused() {
    let source = source(&memory_file(32));
    let pager = Pager::start(1).unwrap();
    let end = |_| {};
    let region = FaultRegion { host_address: 1 << 40, bytes: 32 * PAGE_BYTES, file_offset: 0 };
    let file = tempfile::tempfile().unwrap();
    let error = pager.attach(file.into(), &[region], Arc::clone(&source), end).unwrap_err();
    assert!(matches!(error, PagerError::NotUserfaultfd(_)));
    let Some(worker) = Worker::new(32) else { return };
    let bad = [
        vec![],
        vec![region; 2],
        vec![FaultRegion { bytes: 0, ..region }],
        vec![FaultRegion { bytes: 33 * PAGE_BYTES, ..region }],
        vec![FaultRegion { bytes: 5000, ..region }],
        vec![FaultRegion { file_offset: PAGE_BYTES, ..region }],
        vec![FaultRegion { file_offset: u64::MAX - 4095, ..region }],
        vec![FaultRegion { host_address: u64::MAX - 4095, ..region }],
        vec![FaultRegion { host_address: 1 << 63, ..region }],
        vec![FaultRegion { host_address: 77, ..region }],
    ];
    for regions in bad {
        let result = pager.attach(worker.duplicate(), &regions, Arc::clone(&source), end);
        assert!(matches!(result, Err(PagerError::Regions(_))), "{regions:?}");
    }
}

#[test]
fn a_clone_frozen_is_the_same_from_both_memory_sources() {
    const PAGES: usize = 300;
    let file = memory_file(PAGES);
    let source = source(&file);
    let pager = Pager::start(1).unwrap();
    let Some(worker) = Worker::new(PAGES) else { return };
    let (_attachment, _ended) = worker.attach(&pager, &source);
    let mapped = Mapping::of_file(&file, 0, (PAGES * PAGE) as u64).unwrap();
    let page_map = PageMap::open().unwrap();
    let mut images = Vec::new();
    for memory in [&*worker.memory, &mapped] {
        for page in (0..PAGES).step_by(9) {
            touch(memory, page);
            // SAFETY: within the mapping; zeros over data on some pages, data over holes on others.
            unsafe { memory.address().add(page * PAGE).write_bytes((page % 2) as u8, PAGE) };
        }
        // SAFETY: the mappings live on, and nobody writes meanwhile.
        let region = unsafe { SourceRegion::new(memory.address(), memory.bytes(), 0) };
        let out = tempfile::tempfile().unwrap();
        let (written, rest) = write_image(&[region], Some(&file), &page_map, &out).unwrap();
        rest.copy(&file, &out).unwrap();
        let mut bytes = vec![0; PAGES * PAGE];
        out.read_exact_at(&mut bytes, 0).unwrap();
        images.push((bytes, written.data_bytes(), Extents::of_file(&out).unwrap()));
    }
    assert!(images[0] == images[1]);
    for page in 0..PAGES {
        let expected = if page % 9 == 0 { (page % 2) as u8 } else { content(page) };
        assert_eq!(images[0].0[page * PAGE + 5], expected, "page {page}");
    }
}
