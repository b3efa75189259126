//! The system's random generator (FreeBSD's Fortuna): having it draw on the entropy of this clone, and knowing that it has.
//!
//! It draws on its pools when somebody reads, pool 0 holds `kern.random.fortuna.minpoolsize` bytes, and more than a tenth of a second of the
//! system's uptime went by since the last time. A write to `/dev/random` puts 32 bytes into four of the 32 pools, the next four each time,
//! and then (until FreeBSD 14) sleeps for a tenth of a second. So
//!
//! * before a snapshot the least pool size is set so high that nothing is drawn ([`Pools::close`]): in the clone the tenth of a second is over;
//! * in a clone a child writes with a thread for each write: all of them have put in what they have when all of them sleep, which the
//!   system tells of each thread. They share a place in the system without a lock, so they keep to one CPU, where one goes on until it sleeps; or,
//!   where they may not, one begins when the one before it sleeps;
//! * then the least pool size is small for as long as the agent reads once: that read draws.
//!
//! The uptime that counts is the one of the last tick, `CLOCK_UPTIME_FAST`. A clone of a snapshot before which nobody closed the pools waits
//! for it. Facts: sys/dev/random/{fortuna,randomdev}.c, sys/sys/{user,thr}.h of FreeBSD 12 to 15.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::random::Generator;
use crate::sys::{self, PollFd, Time};
use crate::wire::*;

const POOL_BYTES: &str = "kern.random.fortuna.minpoolsize";
/// The system's own default, and the least that it takes.
const POOL_BYTES_USUAL: u32 = 64;
const POOL_BYTES_LEAST: u32 = 16;
/// More than any pool gets while it counts, and a number that nobody else would choose.
const POOL_BYTES_CLOSED: u32 = 0x7fff_5350;
/// Drawn on at most so often, and a little more.
const DRAWN_EVERY_NS: u64 = 100_000_000 + 10_000;
/// Pools are not left closed longer: until then no UNMANAGED clone of an older service draws, whatever its system has gathered. The guest's
/// uptime counts, which stands still from the freeze to the clone's first instruction, so what this is to outlive is the tenth of a second, the reply and
/// the way to the freeze: 0.15 s, and a second or two on a slow host. Too short costs a clone a tenth of a second and nothing else: it
/// closes them itself ([`Pools::draw`]).
const CLOSED_NS_MAX: u64 = 3_000_000_000;
/// How long the writes may take, and the wait for the clock.
const WITHIN_NS: u64 = 5_000_000_000;
/// Each pool gets eight bytes of two of them: as many as the system takes for enough (and 2^128 possibilities for who knows its state of
/// before). Each costs the clone some pages, for its thread.
const WRITES: usize = 16;
/// A function that makes two system calls.
const STACK_BYTES: usize = 512;

/// Whether the pools are drawn on.
pub(crate) struct Pools {
    /// Since this uptime they are not.
    closed: Option<u64>,
    /// The least pool size before; 0: not known.
    usual: u32,
}

/// A child that gives the system its entropy, and says so by a byte.
pub(crate) struct Feeding {
    pipe: i32,
}

#[repr(align(16))]
#[derive(Clone, Copy)]
#[allow(dead_code)] // Its address is what it is for.
struct Stack([u8; STACK_BYTES]);

struct Writer {
    bytes: [u8; ENTROPY_BYTES],
    fd: i32,
    /// Its write has come back.
    done: AtomicU32,
}

// Of children only.
static mut STACKS: [Stack; WRITES] = [Stack([0; STACK_BYTES]); WRITES];
static mut WRITERS: [Writer; WRITES] =
    [const { Writer { bytes: [0; ENTROPY_BYTES], fd: 0, done: AtomicU32::new(0) } }; WRITES];
static mut THREADS: [u8; (WRITES + 2) * sys::THREAD_BYTES] = [0; (WRITES + 2) * sys::THREAD_BYTES];

impl Pools {
    pub(crate) const fn new() -> Pools {
        // Nothing but zeros, so that the program's file need not hold what it is in.
        Pools { closed: None, usual: 0 }
    }

    /// At the start: an agent before this one may have been ended while they were closed.
    pub(crate) fn begin(&mut self) {
        match sys::sysctl_number(POOL_BYTES) {
            Some(bytes) if bytes == u64::from(POOL_BYTES_CLOSED) => self.open(),
            _ => {}
        }
    }

    pub(crate) fn are_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// From now on nothing is drawn. False: this system has no such setting.
    pub(crate) fn close(&mut self) -> bool {
        if self.closed.is_some() {
            return true;
        }
        let usual = sys::sysctl_number(POOL_BYTES).and_then(|bytes| u32::try_from(bytes).ok());
        let Some(usual) = usual else { return false };
        if sys::sysctl(POOL_BYTES, &mut [], &POOL_BYTES_CLOSED.to_le_bytes()).is_err() {
            return false;
        }
        self.usual = usual;
        self.closed = Some(sys::uptime_ns());
        true
    }

    /// All is as it was.
    pub(crate) fn open(&mut self) {
        let usual = if self.usual == 0 { POOL_BYTES_USUAL } else { self.usual };
        if sys::sysctl(POOL_BYTES, &mut [], &usual.to_le_bytes()).is_ok() {
            self.closed = None;
        }
    }

    /// Opens what was left closed.
    pub(crate) fn step(&mut self) {
        if self.closed.is_some_and(|since| sys::uptime_ns().saturating_sub(since) > CLOSED_NS_MAX) {
            self.open();
        }
    }

    /// How long it takes until the next read may draw. 0: it draws if the pool is full enough.
    pub(crate) fn wait_ns(&self) -> u64 {
        let Some(since) = self.closed else { return 0 };
        (since + DRAWN_EVERY_NS).saturating_sub(sys::tick_uptime_ns())
    }

    /// Begins to give the system entropy. `None`: it cannot be done.
    pub(crate) fn feed(random: &mut Generator) -> Option<Feeding> {
        let mut entropy = [[0u8; ENTROPY_BYTES]; WRITES];
        random.fill(entropy.as_flattened_mut());
        let [read, write] = sys::pipe().ok()?;
        // SAFETY: one thread; the child does not come back.
        let forked = unsafe { sys::fork() };
        if let Ok(None) = forked {
            if put_in(&entropy) {
                let _ = sys::write(write, &[1]);
            }
            // Waits in the system for what still sleeps there.
            sys::exit(0);
        }
        sys::close(write);
        match forked {
            Ok(_) => Some(Feeding { pipe: read }),
            Err(_) => {
                sys::close(read);
                None
            }
        }
    }

    /// Waits until the entropy is in, and has the system draw on it. What is said to the host: whether that is certain.
    pub(crate) fn draw(&mut self, feeding: Option<Feeding>, random: &mut Generator) -> u32 {
        let fed = feeding.is_some_and(|feeding| feeding.is_done());
        let closed = self.close();
        let end = sys::uptime_ns() + WITHIN_NS;
        loop {
            match self.wait_ns() {
                0 => break,
                _ if sys::uptime_ns() > end => break,
                wait => sys::poll(&mut [], Some(Time { seconds: 0, nanoseconds: wait.min(20_000_000) as i64 })),
            }
        }
        let ready = fed && closed && self.wait_ns() == 0;
        let small = sys::sysctl(POOL_BYTES, &mut [], &POOL_BYTES_LEAST.to_le_bytes()).is_ok();
        let mut bytes = [0; ENTROPY_BYTES];
        let read = sys::random(&mut bytes);
        self.open();
        random.feed(&bytes);
        if ready && small && read { ENTROPY_DRAWN } else { ENTROPY_PENDING }
    }
}

impl Feeding {
    fn is_done(&self) -> bool {
        let end = sys::uptime_ns() + WITHIN_NS;
        let mut byte = [0];
        loop {
            let mut watched = [PollFd { fd: self.pipe, events: sys::POLLIN, revents: 0 }];
            sys::poll(&mut watched, Some(Time { seconds: 1, nanoseconds: 0 }));
            if watched[0].revents != 0 {
                break sys::read(self.pipe, &mut byte) == Ok(1);
            }
            if sys::uptime_ns() > end {
                break false;
            }
        }
    }
}

impl Drop for Feeding {
    /// It goes on, if it is not done.
    fn drop(&mut self) {
        sys::close(self.pipe);
    }
}

/// In the child: puts it all in. True: it is.
fn put_in(entropy: &[[u8; ENTROPY_BYTES]; WRITES]) -> bool {
    let Ok(fd) = sys::open(c"/dev/random", sys::O_WRONLY, 0) else { return false };
    let end = sys::uptime_ns() + WITHIN_NS;
    let alone = sys::keep_to_one_cpu();
    // SAFETY: this process has one thread yet, and this function is called once in it.
    let (writers, stacks, room) =
        unsafe { (&raw mut WRITERS, &raw mut STACKS, &mut *(&raw mut THREADS)) };
    for (index, bytes) in entropy.iter().enumerate() {
        // SAFETY: of the arrays' length; no thread has been told of this place before.
        let (writer, stack) = unsafe { (&raw mut (*writers)[index], &raw mut (*stacks)[index]) };
        // SAFETY: as above.
        unsafe {
            (*writer).bytes = *bytes;
            (*writer).fd = fd;
        }
        // SAFETY: the function does not come back; the place and the stack are this thread's for as long as the process lives.
        let started = unsafe { sys::new_thread(write_one, writer.cast(), stack.cast(), STACK_BYTES) };
        if started.is_err() {
            return false;
        }
        if alone && index + 1 < WRITES {
            sys::give_way();
            continue;
        }
        // Until each of them sleeps, or has slept: then its bytes are in.
        loop {
            let asleep = sys::threads_asleep_in(room, b"randwr");
            // SAFETY: only what is atomic of it is looked at while threads run.
            let done = (0..=index).filter(|index| unsafe { &*(&raw const (*writers)[*index].done) }.load(Ordering::Acquire) != 0);
            match asleep {
                None => return false,
                Some(asleep) if asleep + done.count() > index => break,
                Some(_) if sys::uptime_ns() > end => return false,
                Some(_) => sys::give_way(),
            }
        }
    }
    true
}

extern "C" fn write_one(writer: *mut u8) {
    // SAFETY: a place of WRITERS, which nobody changes any more.
    let writer = unsafe { &*writer.cast::<Writer>() };
    let _ = sys::write(writer.fd, &writer.bytes);
    writer.done.store(1, Ordering::Release);
    sys::end_thread()
}
