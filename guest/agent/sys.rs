//! FreeBSD/amd64 system calls, by number: those that are the same from FreeBSD 12 to 15 (sys/kern/syscalls.master of each).
//!
//! A call's error is its errno. Paths are NUL-terminated ([`Path`]).

use core::arch::asm;

pub(crate) type Result<T> = core::result::Result<T, i32>;

pub(crate) const ENOENT: i32 = 2;
pub(crate) const EACCES: i32 = 13;
pub(crate) const EPERM: i32 = 1;
pub(crate) const EINTR: i32 = 4;
pub(crate) const ENXIO: i32 = 6;
pub(crate) const EINVAL: i32 = 22;
pub(crate) const ENOTDIR: i32 = 20;
pub(crate) const ESRCH: i32 = 3;
pub(crate) const ENOMEM: i32 = 12;
pub(crate) const EAGAIN: i32 = 35;
pub(crate) const EPROTONOSUPPORT: i32 = 43;
pub(crate) const EAFNOSUPPORT: i32 = 47;

pub(crate) const O_RDONLY: usize = 0;
pub(crate) const O_WRONLY: usize = 1;
pub(crate) const O_RDWR: usize = 2;
pub(crate) const O_NONBLOCK: usize = 4;
pub(crate) const O_CREAT: usize = 0x200;
pub(crate) const O_EXCL: usize = 0x800;
pub(crate) const O_NOCTTY: usize = 0x8000;
pub(crate) const O_CLOEXEC: usize = 0x10_0000;

pub(crate) const POLLIN: i16 = 1;
pub(crate) const POLLOUT: i16 = 4;
pub(crate) const SIGKILL: u32 = 9;
const SIGCHLD: u32 = 20;
const SIGPIPE: u32 = 13;
const SIG_IGN: usize = 1;

const CLOCK_REALTIME: usize = 0;
const CLOCK_UPTIME: usize = 5;
const CLOCK_UPTIME_FAST: usize = 8;

const EXIT: usize = 1;
const FORK: usize = 2;
const READ: usize = 3;
const WRITE: usize = 4;
const OPEN: usize = 5;
const CLOSE: usize = 6;
const WAIT4: usize = 7;
const UNLINK: usize = 10;
const CHDIR: usize = 12;
const GETPID: usize = 20;
const SETUID: usize = 23;
const KILL: usize = 37;
const IOCTL: usize = 54;
const EXECVE: usize = 59;
/// Until FreeBSD 14, the first group being the effective one; 15 has it for older programs.
const SETGROUPS_14: usize = 80;
const SETPGID: usize = 82;
const DUP2: usize = 90;
const SOCKET: usize = 97;
const BIND: usize = 104;
const SETSOCKOPT: usize = 105;
const SENDTO: usize = 133;
const FCNTL: usize = 92;
const FCHMOD: usize = 124;
const RENAME: usize = 128;
const SETSID: usize = 147;
const SETGID: usize = 181;
const SYSCTL: usize = 202;
const CLOCK_GETTIME: usize = 232;
const CLOCK_SETTIME: usize = 233;
const SCHED_YIELD: usize = 331;
const SIGPROCMASK: usize = 340;
const KENV: usize = 390;
const SIGACTION: usize = 416;
const THR_EXIT: usize = 431;
const THR_NEW: usize = 455;
const CPUSET_SETAFFINITY: usize = 488;
const PIPE2: usize = 542;
const PPOLL: usize = 545;
const FSTAT: usize = 551;
const GETRANDOM: usize = 563;

/// The carry flag says that it failed, and rax then is the errno.
///
/// # Safety
/// As the call with that number requires of its arguments.
unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize> {
    let [a, b, c, d, e, f] = arguments;
    let (value, failed): (usize, u8);
    // SAFETY: the caller vouches for the arguments; what a call may change is told.
    unsafe {
        asm!(
            "syscall",
            "setc {failed}",
            failed = out(reg_byte) failed,
            inlateout("rax") number => value,
            inlateout("rdi") a => _,
            inlateout("rsi") b => _,
            inlateout("rdx") c => _,
            inlateout("r10") d => _,
            inlateout("r8") e => _,
            inlateout("r9") f => _,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if failed != 0 { Err(value as i32) } else { Ok(value) }
}

macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {{
        let mut arguments = [0usize; 6];
        let mut _given = arguments.iter_mut();
        $(if let Some(place) = _given.next() { *place = $argument as usize; })*
        call($number, arguments)
    }};
}

/// A path or other string with a NUL at its end.
pub(crate) type Path = core::ffi::CStr;

/// A time of a clock, as the system writes it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct PollFd {
    pub(crate) fd: i32,
    pub(crate) events: i16,
    pub(crate) revents: i16,
}

/// What [`stat`] is for.
pub(crate) struct Stat {
    pub(crate) mode: u32,
    pub(crate) bytes: u64,
}

pub(crate) fn exit(status: i32) -> ! {
    loop {
        // SAFETY: takes a number.
        let _ = unsafe { call!(EXIT, status) };
    }
}

pub(crate) fn read(fd: i32, bytes: &mut [u8]) -> Result<usize> {
    // SAFETY: the bytes may be written.
    unsafe { call!(READ, fd, bytes.as_mut_ptr(), bytes.len()) }
}

pub(crate) fn write(fd: i32, bytes: &[u8]) -> Result<usize> {
    // SAFETY: the bytes may be read.
    unsafe { call!(WRITE, fd, bytes.as_ptr(), bytes.len()) }
}

pub(crate) fn open(path: &Path, flags: usize, mode: u32) -> Result<i32> {
    // SAFETY: a string with its NUL.
    unsafe { call!(OPEN, path.as_ptr(), flags | O_CLOEXEC, mode) }.map(|fd| fd as i32)
}

pub(crate) fn close(fd: i32) {
    // SAFETY: takes a number; closing what is not open is an error that nobody needs.
    let _ = unsafe { call!(CLOSE, fd) };
}

/// Reading end and writing end; neither is inherited over an execve.
pub(crate) fn pipe() -> Result<[i32; 2]> {
    let mut fds = [0i32; 2];
    // SAFETY: room for two.
    unsafe { call!(PIPE2, fds.as_mut_ptr(), O_CLOEXEC) }?;
    Ok(fds)
}

pub(crate) fn set_nonblocking(fd: i32) -> Result<()> {
    const F_SETFL: usize = 4;
    // SAFETY: takes numbers.
    unsafe { call!(FCNTL, fd, F_SETFL, O_NONBLOCK) }.map(|_| ())
}

pub(crate) fn dup2(from: i32, to: i32) -> Result<()> {
    // SAFETY: takes numbers.
    unsafe { call!(DUP2, from, to) }.map(|_| ())
}

pub(crate) fn stat(fd: i32) -> Result<Stat> {
    const BYTES: usize = 224;
    let mut raw = [0u64; BYTES / 8];
    // SAFETY: struct stat has 224 bytes since FreeBSD 12.
    unsafe { call!(FSTAT, fd, raw.as_mut_ptr()) }?;
    // st_mode, 16 bits, at 24; st_size at 112.
    Ok(Stat { mode: (raw[3] & 0xffff) as u32, bytes: raw[14] })
}

pub(crate) fn chmod(fd: i32, mode: u32) -> Result<()> {
    // SAFETY: takes numbers.
    unsafe { call!(FCHMOD, fd, mode) }.map(|_| ())
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    // SAFETY: strings with their NULs.
    unsafe { call!(RENAME, from.as_ptr(), to.as_ptr()) }.map(|_| ())
}

pub(crate) fn unlink(path: &Path) {
    // SAFETY: a string with its NUL. What cannot be removed stays.
    let _ = unsafe { call!(UNLINK, path.as_ptr()) };
}

pub(crate) fn chdir(path: &Path) -> Result<()> {
    // SAFETY: a string with its NUL.
    unsafe { call!(CHDIR, path.as_ptr()) }.map(|_| ())
}

/// `None` in the child.
///
/// # Safety
/// One thread, and the child must not return from the caller's frame in a way that harms the parent's shared files.
pub(crate) unsafe fn fork() -> Result<Option<u32>> {
    // SAFETY: the caller's.
    let pid = unsafe { call!(FORK) }?;
    Ok((pid != 0).then_some(pid as u32))
}

/// # Safety
/// Both lists end with a null pointer, and what they point to ends with NUL.
pub(crate) unsafe fn execve(path: &Path, arguments: *const *const u8, environment: *const *const u8) -> i32 {
    // SAFETY: the caller's.
    match unsafe { call!(EXECVE, path.as_ptr(), arguments, environment) } {
        Ok(_) => 0,
        Err(error) => error,
    }
}

/// A child that has ended, and how (see [`ending`]).
pub(crate) fn wait() -> Option<(u32, i32)> {
    const WNOHANG: usize = 1;
    let mut status = 0i32;
    // SAFETY: a place for the status; no usage wanted.
    let pid = unsafe { call!(WAIT4, -1isize, &raw mut status, WNOHANG, 0) }.ok()?;
    (pid > 0).then_some((pid as u32, status))
}

/// Exit status, or the signal that ended it.
pub(crate) fn ending(status: i32) -> core::result::Result<u32, u32> {
    match status & 0x7f {
        0 => Ok((status >> 8 & 0xff) as u32),
        signal => Err(signal as u32),
    }
}

/// To all processes of a group.
pub(crate) fn kill_group(group: u32, signal: u32) -> Result<()> {
    // SAFETY: takes numbers.
    unsafe { call!(KILL, -(group as isize), signal) }.map(|_| ())
}

/// Makes a process (0: this one) the head of a group of its own.
pub(crate) fn own_group(pid: u32) {
    // SAFETY: takes numbers. The second of parent and child to say so may be refused.
    let _ = unsafe { call!(SETPGID, pid, pid) };
}

pub(crate) fn own_session() {
    // SAFETY: takes nothing. Refused if it has one.
    let _ = unsafe { call!(SETSID) };
}

/// Becomes a user. `groups`: its own first.
pub(crate) fn become_user(uid: u32, groups: &[u32]) -> Result<()> {
    let own = groups.first().copied().unwrap_or(uid);
    // SAFETY: a list and its length; numbers.
    unsafe {
        call!(SETGROUPS_14, groups.len(), groups.as_ptr())?;
        call!(SETGID, own)?;
        call!(SETUID, uid)?;
    }
    Ok(())
}

/// Waits until something is ready, a child ends, or `within` is over. [`prepare_signals`] was called.
pub(crate) fn poll(fds: &mut [PollFd], within: Option<Time>) {
    let none = [0u32; 4];
    let time = within.as_ref().map_or(core::ptr::null(), |time| time as *const Time);
    for fd in fds.iter_mut() {
        fd.revents = 0;
    }
    // SAFETY: a list and its length, a time or none, a set of signals. An interruption leaves every `revents` 0 or wrong by
    // none: descriptors do not block, so a wrong one costs a call.
    let _ = unsafe { call!(PPOLL, fds.as_mut_ptr(), fds.len(), time, none.as_ptr()) };
}

#[repr(C)]
struct Action {
    handler: usize,
    flags: i32,
    mask: [u32; 4],
}

extern "C" fn child_ended() {}

/// A child's end interrupts [`poll`] and nothing else; a closed pipe is an error and no signal.
pub(crate) fn prepare_signals() {
    let blocked = [1u32 << (SIGCHLD - 1), 0, 0, 0];
    let child = Action { handler: child_ended as *const () as usize, flags: 0, mask: [0; 4] };
    let pipe = Action { handler: SIG_IGN, flags: 0, mask: [0; 4] };
    const SIG_BLOCK: usize = 1;
    // SAFETY: structures as the calls want them; the handler does nothing.
    unsafe {
        let _ = call!(SIGPROCMASK, SIG_BLOCK, blocked.as_ptr(), 0);
        let _ = call!(SIGACTION, SIGCHLD, &raw const child, 0);
        let _ = call!(SIGACTION, SIGPIPE, &raw const pipe, 0);
    }
}

/// Signals as a program expects them at its start.
pub(crate) fn forget_signals() {
    const SIG_SETMASK: usize = 3;
    let (none, default) = ([0u32; 4], Action { handler: 0, flags: 0, mask: [0; 4] });
    // SAFETY: as in `prepare_signals`.
    unsafe {
        let _ = call!(SIGACTION, SIGCHLD, &raw const default, 0);
        let _ = call!(SIGACTION, SIGPIPE, &raw const default, 0);
        let _ = call!(SIGPROCMASK, SIG_SETMASK, none.as_ptr(), 0);
    }
}

fn clock(id: usize) -> u64 {
    let mut time = Time::default();
    // SAFETY: a place for the time.
    let _ = unsafe { call!(CLOCK_GETTIME, id, &raw mut time) };
    (time.seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(time.nanoseconds as u64)
}

/// Unix nanoseconds.
pub(crate) fn wall_ns() -> u64 {
    clock(CLOCK_REALTIME)
}

pub(crate) fn uptime_ns() -> u64 {
    clock(CLOCK_UPTIME)
}

/// The same at the last tick of the system's clock.
pub(crate) fn tick_uptime_ns() -> u64 {
    clock(CLOCK_UPTIME_FAST)
}

pub(crate) fn set_wall_ns(ns: u64) -> Result<()> {
    let time = Time { seconds: (ns / 1_000_000_000) as i64, nanoseconds: (ns % 1_000_000_000) as i64 };
    // SAFETY: a time.
    unsafe { call!(CLOCK_SETTIME, CLOCK_REALTIME, &raw const time) }.map(|_| ())
}

/// Bytes of the system's generator; false: there are none.
pub(crate) fn random(bytes: &mut [u8]) -> bool {
    // SAFETY: the bytes may be written.
    let count = unsafe { call!(GETRANDOM, bytes.as_mut_ptr(), bytes.len(), 0) };
    count == Ok(bytes.len())
}

/// A variable of the kernel's environment, with its NUL, in `value`; `None` if there is none, or it does not fit.
pub(crate) fn kernel_variable<'a>(name: &Path, value: &'a mut [u8]) -> Option<&'a Path> {
    const KENV_GET: usize = 0;
    // SAFETY: a string, and a place of that size.
    let count = unsafe { call!(KENV, KENV_GET, name.as_ptr(), value.as_mut_ptr(), value.len()) }.ok()?;
    Path::from_bytes_until_nul(value.get(..count)?).ok()
}

/// A terminal that passes every byte on as it is, with the longest queues there are.
pub(crate) fn make_raw(fd: i32) -> Result<()> {
    /// CS8, CREAD, CLOCAL.
    const CONTROL: u32 = 0x300 | 0x800 | 0x8000;
    /// CCTS_OFLOW, CRTS_IFLOW.
    const FLOW: u32 = 0x3_0000;
    // So many bits a second give queues of 64 KiB (sys/kern/tty.c, tty_watermarks).
    match set_terminal(fd, 1 << 20, CONTROL) {
        // A serial port has no such speed. Its queue is shorter, so it says when it is full.
        Err(EINVAL) => set_terminal(fd, 115_200, CONTROL | FLOW),
        outcome => outcome,
    }
}

fn set_terminal(fd: i32, speed: u32, control: u32) -> Result<()> {
    const TIOCSETA: usize = 0x802c_7414;
    #[repr(C)]
    struct Settings {
        input: u32,
        output: u32,
        control: u32,
        local: u32,
        characters: [u8; 20],
        speeds: [u32; 2],
    }
    let mut characters = [0u8; 20];
    // VMIN.
    characters[16] = 1;
    let settings =
        Settings { input: 0, output: 0, control, local: 0, characters, speeds: [speed; 2] };
    // SAFETY: struct termios, 44 bytes, as the request's number says.
    unsafe { call!(IOCTL, fd, TIOCSETA, &raw const settings) }.map(|_| ())
}

pub(crate) fn socket(family: usize, kind: usize, protocol: usize) -> Result<i32> {
    // SAFETY: numbers.
    unsafe { call!(SOCKET, family, kind, protocol) }.map(|fd| fd as i32)
}

pub(crate) fn set_option(socket: i32, level: usize, option: usize, value: u32) -> Result<()> {
    // SAFETY: a value with its length.
    unsafe { call!(SETSOCKOPT, socket, level, option, &raw const value, size_of::<u32>()) }.map(|_| ())
}

/// `address`: a socket address of its whole length.
pub(crate) fn bind(socket: i32, address: &[u8]) -> Result<()> {
    // SAFETY: an address with its length.
    unsafe { call!(BIND, socket, address.as_ptr(), address.len()) }.map(|_| ())
}

pub(crate) fn send_to(socket: i32, bytes: &[u8], address: &[u8]) -> Result<()> {
    // SAFETY: bytes and an address, each with its length.
    unsafe { call!(SENDTO, socket, bytes.as_ptr(), bytes.len(), 0, address.as_ptr(), address.len()) }.map(|_| ())
}

/// A request whose number says how long the structure is that goes with it.
pub(crate) fn ioctl(fd: i32, request: usize, structure: &mut [u8]) -> Result<()> {
    const EFAULT: i32 = 14;
    if request >> 16 & 0x1fff != structure.len() {
        return Err(EFAULT);
    }
    // SAFETY: reads and writes as many bytes as the structure has; they are no pointers in what is used here.
    unsafe { call!(IOCTL, fd, request, structure.as_mut_ptr()) }.map(|_| ())
}

pub(crate) fn own_pid() -> u32 {
    // SAFETY: takes nothing, and does not fail.
    unsafe { call!(GETPID) }.unwrap_or(0) as u32
}

/// Starts a thread of this process.
///
/// # Safety
/// The function does not come back, and what it is given and the stack are its own from now on. No other part of the program may expect
/// that there is one thread only.
pub(crate) unsafe fn new_thread(run: extern "C" fn(*mut u8), with: *mut u8, stack: *mut u8, bytes: usize) -> Result<()> {
    /// struct thr_param: function, argument, stack, its bytes; no thread-local storage, numbers or priority.
    #[repr(C)]
    struct Parameters {
        run: extern "C" fn(*mut u8),
        with: *mut u8,
        stack: *mut u8,
        stack_bytes: usize,
        rest: [usize; 9],
    }
    let parameters = Parameters { run, with, stack, stack_bytes: bytes, rest: [0; 9] };
    // SAFETY: the caller's; the structure with its length.
    unsafe { call!(THR_NEW, &raw const parameters, size_of::<Parameters>()) }.map(|_| ())
}

pub(crate) fn end_thread() -> ! {
    loop {
        // SAFETY: nobody waits for a word.
        let _ = unsafe { call!(THR_EXIT, 0) };
    }
}

/// Has this process's threads run on one CPU. False: that is not allowed.
pub(crate) fn keep_to_one_cpu() -> bool {
    const CPU_LEVEL_WHICH: usize = 3;
    const CPU_WHICH_PID: usize = 2;
    /// The first of them set.
    const FIRST: [u64; 16] = {
        let mut cpus = [0; 16];
        cpus[0] = 1;
        cpus
    };
    // A set is not to be shorter than the system's own, nor longer than the longest that it takes (CPU_MAXSIZE bits): 128 or 256 CPUs until FreeBSD 13,
    // 1024 since.
    [128usize, 32, 16].into_iter().any(|bytes| {
        // SAFETY: a set of CPUs with a length that is not more than its own.
        unsafe { call!(CPUSET_SETAFFINITY, CPU_LEVEL_WHICH, CPU_WHICH_PID, -1isize, bytes, FIRST.as_ptr()) }.is_ok()
    })
}

/// Lets others run.
pub(crate) fn give_way() {
    // SAFETY: takes nothing.
    let _ = unsafe { call!(SCHED_YIELD) };
}

/// Bytes that the system says of a thread (struct kinfo_proc).
pub(crate) const THREAD_BYTES: usize = 1088;

/// How many threads of this process sleep in the system with this word (ki_wmesg). `room` is for what it says of all of them; `None`: it
/// says something else.
pub(crate) fn threads_asleep_in(room: &mut [u8], word: &[u8]) -> Option<usize> {
    /// CTL_KERN, KERN_PROC, KERN_PROC_PID | KERN_PROC_INC_THREAD.
    const OF_PROCESS: [i32; 3] = [1, 14, 0x11];
    const WORD: usize = 411;
    let [a, b, c] = OF_PROCESS;
    let count = sysctl_of(&[a, b, c, own_pid() as i32], room).ok()?;
    let threads = room.get(..count)?.chunks_exact(THREAD_BYTES);
    // Each begins with its own length.
    let known = threads.clone().all(|thread| thread[..4] == (THREAD_BYTES as u32).to_le_bytes());
    let sleeps = |thread: &&[u8]| thread[WORD..].starts_with(word) && thread[WORD + word.len()] == 0;
    (known && threads.remainder().is_empty()).then(|| threads.filter(sleeps).count())
}

const NAME_BYTES: usize = 32;

/// Reads a number (4 or 8 bytes) by its sysctl name.
pub(crate) fn sysctl_number(name: &str) -> Option<u64> {
    let mut value = [0u8; 8];
    match sysctl(name, &mut value, &[]).ok()? {
        4 => Some(u32::from_le_bytes(*value.first_chunk()?).into()),
        8 => Some(u64::from_le_bytes(value)),
        _ => None,
    }
}

/// Reads and writes by name. Gives how many bytes were read.
pub(crate) fn sysctl(name: &str, old: &mut [u8], new: &[u8]) -> Result<usize> {
    /// CTL_SYSCTL, CTL_SYSCTL_NAME2OID.
    const NAME_TO_NUMBERS: [i32; 2] = [0, 3];
    let mut numbers = [0i32; NAME_BYTES];
    let mut bytes = size_of_val(&numbers);
    let mut old_bytes = old.len();
    let old_place = if old.is_empty() { core::ptr::null_mut() } else { old.as_mut_ptr() };
    let new_place = if new.is_empty() { core::ptr::null() } else { new.as_ptr() };
    // SAFETY: lists with their lengths; the second call's name is what the first has written.
    unsafe {
        call!(
            SYSCTL,
            NAME_TO_NUMBERS.as_ptr(),
            2,
            numbers.as_mut_ptr(),
            &raw mut bytes,
            name.as_ptr(),
            name.len()
        )?;
        let length = &raw mut old_bytes;
        call!(SYSCTL, numbers.as_ptr(), bytes / 4, old_place, length, new_place, new.len())?;
    }
    Ok(old_bytes)
}

/// Reads by number. Gives how many bytes were read.
pub(crate) fn sysctl_of(numbers: &[i32], old: &mut [u8]) -> Result<usize> {
    let mut bytes = old.len();
    // SAFETY: lists with their lengths.
    unsafe { call!(SYSCTL, numbers.as_ptr(), numbers.len(), old.as_mut_ptr(), &raw mut bytes, 0, 0) }?;
    Ok(bytes)
}
