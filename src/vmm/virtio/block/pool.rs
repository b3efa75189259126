//! The threads that carry disk requests out, so that neither vCPUs nor the device thread wait for a disk.
//!
//! One [`Pool`] for a VM, shared by its disks; [`THREADS_MAX`] threads at most, the first started by the first request
//! and another only while requests wait and none is idle. So a VM that asks nothing of its disks, such as a clone on
//! its way to its first answer, has none.
//!
//! Each disk has a [`Lane`]: what was begun for it comes back there, with an event descriptor for the device thread. A
//! lane can be waited for until it is empty ([`Lane::wait`]), and be emptied ([`Lane::abandon`]): jobs that have not begun
//! are left out then.
//!
//! May touch: threads; what the jobs touch is theirs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use crate::vmm::threads::{Role, begin};

/// Most threads of one VM.
pub const THREADS_MAX: usize = 4;
/// Bytes carried at once between disk and guest.
pub const PIECE_BYTES: usize = 128 << 10;

/// Work for a thread, which lends it a buffer of [`PIECE_BYTES`].
type Job = Box<dyn FnOnce(&mut [u8]) + Send>;

/// The threads.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    quit: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} jobs, {} idle threads", self.jobs.len(), self.idle)
    }
}

impl Pool {
    /// A pool without threads.
    pub fn new() -> Arc<Self> {
        Arc::new(Pool { shared: Arc::default(), threads: Mutex::default() })
    }

    /// Has `job` carried out. The caller limits how many it has under way.
    fn submit(&self, job: Job) {
        let mut state = lock(&self.shared.state);
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            drop(state);
            self.shared.work.notify_one();
            return;
        }
        drop(state);
        let mut threads = lock(&self.threads);
        if threads.len() < THREADS_MAX {
            let shared = Arc::clone(&self.shared);
            let name = format!("disk{}", threads.len());
            let begun = thread::Builder::new().name(name).spawn(move || {
                let _alive = begin(Role::Disk);
                serve(&shared);
            });
            match begun {
                Ok(thread) => threads.push(thread),
                // Others will get to it; if there is no other, the caller itself does.
                Err(error) if threads.is_empty() => {
                    tracing::warn!(%error, "no thread for disk requests; the device thread does them itself");
                    drop(threads);
                    while let Some(job) = take(&self.shared) {
                        run(job, &mut vec![0; PIECE_BYTES]);
                    }
                }
                Err(_) => {}
            }
        }
    }

    /// Threads that were started so far.
    #[cfg(test)]
    pub fn threads(&self) -> usize {
        lock(&self.threads).len()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.quit = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_all();
        for thread in lock(&self.threads).drain(..) {
            // It does not panic: jobs' panics are caught.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these hold is whole at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(shared: &Shared) -> Option<Job> {
    lock(&shared.state).jobs.pop_front()
}

fn run(job: Job, piece: &mut [u8]) {
    // A job that panics tells so through its ticket; the thread and the other disks go on.
    if catch_unwind(AssertUnwindSafe(|| job(piece))).is_err() {
        tracing::error!("a disk request ended in a panic");
    }
}

/// A thread's life.
fn serve(shared: &Shared) {
    let mut piece = vec![0; PIECE_BYTES];
    let mut state = lock(&shared.state);
    loop {
        if state.quit {
            return;
        }
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            run(job, &mut piece);
            state = lock(&shared.state);
            continue;
        }
        state.idle += 1;
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
    }
}

/// What came of a job; `None`: it was abandoned, or it died.
pub type Outcome<T> = Option<T>;

/// The way back of one disk's requests. `T` is what a job ends with.
#[derive(Debug)]
pub struct Lane<T> {
    state: Mutex<LaneState<T>>,
    changed: Condvar,
    event: EventFd,
}

#[derive(Debug)]
struct LaneState<T> {
    /// Begun and not in `done` yet.
    under_way: usize,
    /// Goes up when what was begun before is not wanted any more.
    epoch: u64,
    done: Vec<(u16, Outcome<T>)>,
}

/// A job's promise to come back; also when it dies.
struct Ticket<T> {
    lane: Arc<Lane<T>>,
    head: u16,
    epoch: u64,
    outcome: Outcome<T>,
}

impl<T> Ticket<T> {
    fn finish(mut self, outcome: T) {
        self.outcome = Some(outcome);
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.lane.state);
        state.under_way -= 1;
        if state.epoch == self.epoch {
            state.done.push((self.head, self.outcome.take()));
        }
        drop(state);
        self.lane.changed.notify_all();
        // It fails only if the counter is full: signalled already.
        let _ = self.lane.event.write(1);
    }
}

impl<T: Send + 'static> Lane<T> {
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Lane {
            state: Mutex::new(LaneState { under_way: 0, epoch: 0, done: Vec::new() }),
            changed: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        }))
    }

    /// Readable when something is done.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Has `job` carried out by `pool` for the request `head`.
    pub fn begin(
        self: &Arc<Self>,
        pool: &Pool,
        head: u16,
        job: impl FnOnce(&mut [u8]) -> T + Send + 'static,
    ) {
        let mut state = lock(&self.state);
        state.under_way += 1;
        let epoch = state.epoch;
        drop(state);
        let ticket = Ticket { lane: Arc::clone(self), head, epoch, outcome: None };
        pool.submit(Box::new(move |piece| {
            let wanted = lock(&ticket.lane.state).epoch == ticket.epoch;
            if wanted {
                ticket.finish(job(piece));
            }
        }));
    }

    /// Takes what is done: the requests' heads, and what came of them.
    pub fn take(&self) -> Vec<(u16, Outcome<T>)> {
        // Emptied first: what is done after this signals again. It fails only if it is empty.
        let _ = self.event.read();
        std::mem::take(&mut lock(&self.state).done)
    }

    /// Requests that were begun and not taken back.
    pub fn open(&self) -> usize {
        let state = lock(&self.state);
        state.under_way + state.done.len()
    }

    /// Returns when all that was begun is done.
    pub fn wait(&self) {
        let mut state = lock(&self.state);
        while state.under_way > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Forgets all that was begun, and returns when none of it runs any more.
    pub fn abandon(&self) {
        let mut state = lock(&self.state);
        state.epoch += 1;
        state.done.clear();
        drop(state);
        self.wait();
        let _ = self.event.read();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn no_thread_before_the_first_job_and_no_more_than_the_limit() {
        let (pool, lane) = (Pool::new(), Lane::new().unwrap());
        assert_eq!(pool.threads(), 0);
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for head in 0..20 {
            let gate = Arc::clone(&gate);
            lane.begin(&pool, head, move |piece| {
                assert_eq!(piece.len(), PIECE_BYTES);
                gate.lock().unwrap().recv().unwrap();
                u32::from(head) * 2
            });
        }
        assert!((1..=THREADS_MAX).contains(&pool.threads()));
        assert_eq!(lane.open(), 20);
        for _ in 0..20 {
            open.send(()).unwrap();
        }
        lane.wait();
        let mut done = lane.take();
        done.sort_unstable();
        assert_eq!(done, (0..20).map(|head| (head, Some(u32::from(head) * 2))).collect::<Vec<_>>());
        assert_eq!(lane.open(), 0);
    }

    #[test]
    fn what_is_abandoned_is_over_and_says_nothing() {
        let (pool, lane) = (Pool::new(), Lane::new().unwrap());
        let (running, wait) = mpsc::channel();
        let (open, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        for head in 0..10 {
            let (gate, running) = (Arc::clone(&gate), running.clone());
            lane.begin(&pool, head, move |_| {
                running.send(head).unwrap();
                let _ = gate.lock().unwrap().recv();
            });
        }
        wait.recv().unwrap();
        drop(running);
        drop(open);
        lane.abandon();
        assert!(lane.take().is_empty());
        // Nobody runs any more: every sender is gone, what ran has been counted.
        assert!(wait.iter().count() < 10);
        lane.begin(&pool, 3, |_| ());
        lane.wait();
        assert_eq!(lane.take(), vec![(3, Some(()))]);
    }

    #[test]
    fn a_job_that_dies_is_told_and_the_next_one_runs() {
        let (pool, lane) = (Pool::new(), Lane::<u32>::new().unwrap());
        lane.begin(&pool, 1, |_| panic!("on purpose"));
        lane.wait();
        lane.begin(&pool, 2, |_| 5);
        lane.wait();
        let mut done = lane.take();
        done.sort_unstable();
        assert_eq!(done, vec![(1, None), (2, Some(5))]);
    }

    #[test]
    fn a_pool_ends_with_jobs_waiting() {
        let (pool, lane) = (Pool::new(), Lane::new().unwrap());
        for head in 0..100 {
            lane.begin(&pool, head, |_| ());
        }
        drop(pool);
        lane.wait();
        assert_eq!(lane.take().len(), 100);
    }
}
