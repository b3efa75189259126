//! A worker that tries what is forbidden (`coldspark worker --try-forbidden`): jailed exactly as any other, and then told what to try, one after the other.
//! What comes of it is told back; or the process is gone, and its last words say why. For the trials in tests/system/jail.rs.

#![allow(unsafe_code)]

use std::io;
use std::ptr;

use libc::{c_int, c_long};
use serde::{Deserialize, Serialize};

use crate::worker::channel::{Channel, ChannelError};
use crate::worker::protocol::Jail;

/// What the worker says first: its jail, as it reports it to the daemon.
pub type Hello = Jail;

/// Something to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attempt {
    /// Nothing: this one succeeds.
    Nothing,
    OpenPath,
    OpenKvm,
    ListRoot,
    ReadMemory,
    ReadMemoryByFile,
    ConnectInet,
    ConnectUnix,
    Netlink,
    Ptrace,
    Kill,
    KillThread,
    SignalAll,
    Fork,
    CloneNamespace,
    OldFork,
    Exec,
    Mount,
    PivotRoot,
    Chroot,
    Unshare,
    Setns,
    SetUid,
    SetGroups,
    RaiseLimit,
    KeepCapabilities,
    Dumpable,
    Keyctl,
    Bpf,
    PerfEvent,
    IoUring,
    Userfaultfd,
    ExecutableMemory,
    MakeExecutable,
    KvmRequest,
    TerminalRequest,
    CatchSigsys,
    OldSystemCall,
}

impl Attempt {
    pub const ALL: [Self; 38] = [
        Self::Nothing,
        Self::OpenPath,
        Self::OpenKvm,
        Self::ListRoot,
        Self::ReadMemory,
        Self::ReadMemoryByFile,
        Self::ConnectInet,
        Self::ConnectUnix,
        Self::Netlink,
        Self::Ptrace,
        Self::Kill,
        Self::KillThread,
        Self::SignalAll,
        Self::Fork,
        Self::CloneNamespace,
        Self::OldFork,
        Self::Exec,
        Self::Mount,
        Self::PivotRoot,
        Self::Chroot,
        Self::Unshare,
        Self::Setns,
        Self::SetUid,
        Self::SetGroups,
        Self::RaiseLimit,
        Self::KeepCapabilities,
        Self::Dumpable,
        Self::Keyctl,
        Self::Bpf,
        Self::PerfEvent,
        Self::IoUring,
        Self::Userfaultfd,
        Self::ExecutableMemory,
        Self::MakeExecutable,
        Self::KvmRequest,
        Self::TerminalRequest,
        Self::CatchSigsys,
        Self::OldSystemCall,
    ];
}

/// One to be made now.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Order {
    pub attempt: Attempt,
    /// Another worker: its number in the pid namespace of workers, if they have one.
    pub victim: u32,
    /// A word of that one's memory.
    pub address: u64,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Done,
    /// With this error number.
    Refused(i32),
}

/// Where to find a worker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Whereabouts {
    /// In the pid namespace of workers.
    pub pid: u32,
    /// Of a word of its memory.
    pub address: u64,
}

/// Serves until the control socket closes.
pub fn serve(control: &Channel, jail: &Jail) -> Result<(), String> {
    let text = |error: ChannelError| error.to_string();
    let secret = Box::new(0x5ec2e7u64);
    let address = ptr::from_ref(&*secret).addr() as u64;
    control.send::<Hello>(jail, &[]).map_err(text)?;
    control.send(&Whereabouts { pid: std::process::id(), address }, &[]).map_err(text)?;
    loop {
        match control.recv::<Order>() {
            Ok((order, _)) => control.send(&attempt(order), &[]).map_err(text)?,
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(text(error)),
        }
    }
}

/// Makes the system call and nothing else, so that it is this one that is refused.
macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {{
        // SAFETY: what is tried here harms at most this process, which is made for it: pointers are valid, or null where the call
        // is refused before it looks.
        let result: c_long = unsafe { libc::syscall($number $(, $argument)*) };
        outcome(result)
    }};
}

fn outcome(result: c_long) -> Outcome {
    match result {
        -1 => Outcome::Refused(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        _ => Outcome::Done,
    }
}

fn attempt(Order { attempt, victim, address }: Order) -> Outcome {
    let pid = c_long::from(victim);
    let root = c"/".as_ptr();
    let memory = format!("/proc/{victim}/mem\0");
    let mut word = 0u64;
    let own = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let theirs = libc::iovec { iov_base: ptr::without_provenance_mut(address as usize), iov_len: 8 };
    let null = ptr::null::<u8>();
    match attempt {
        Attempt::Nothing => call!(libc::SYS_getpid),
        Attempt::OpenPath => {
            call!(libc::SYS_openat, libc::AT_FDCWD, root, libc::O_RDONLY | libc::O_DIRECTORY)
        }
        Attempt::OpenKvm => call!(libc::SYS_openat, libc::AT_FDCWD, c"/dev/kvm".as_ptr(), libc::O_RDWR),
        Attempt::ListRoot => {
            let mut bytes = [0u8; 1024];
            // SAFETY: a path that ends.
            let fd = unsafe { libc::open(root, libc::O_RDONLY | libc::O_DIRECTORY) };
            match call!(libc::SYS_getdents64, fd, bytes.as_mut_ptr(), bytes.len()) {
                // "." and ".." are not worth mentioning.
                Outcome::Done if !bytes.windows(4).any(|four| four == b"proc") => {
                    Outcome::Refused(libc::ENOENT)
                }
                other => other,
            }
        }
        Attempt::ReadMemory => {
            call!(libc::SYS_process_vm_readv, pid, &raw const own, 1, &raw const theirs, 1, 0)
        }
        Attempt::ReadMemoryByFile => {
            call!(libc::SYS_openat, libc::AT_FDCWD, memory.as_ptr(), libc::O_RDONLY)
        }
        Attempt::ConnectInet => connect(libc::AF_INET, &[0, 22, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        // An abstract name, for which it takes no file; the trial listens there.
        Attempt::ConnectUnix => connect(libc::AF_UNIX, b"\0coldspark-jail-trial"),
        Attempt::Netlink => call!(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0),
        Attempt::Ptrace => call!(libc::SYS_ptrace, libc::PTRACE_SEIZE, pid, 0, 0),
        Attempt::Kill => call!(libc::SYS_kill, pid, libc::SIGKILL),
        Attempt::KillThread => call!(libc::SYS_tgkill, pid, pid, libc::SIGKILL),
        Attempt::SignalAll => call!(libc::SYS_kill, -1, libc::SIGCONT),
        Attempt::Fork => child(libc::SYS_clone, libc::SIGCHLD),
        Attempt::CloneNamespace => child(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD),
        Attempt::OldFork => child(libc::SYS_fork, 0),
        Attempt::Exec => call!(libc::SYS_execve, c"/bin/true".as_ptr(), null, null),
        Attempt::Mount => call!(libc::SYS_mount, null, root, c"tmpfs".as_ptr(), 0, null),
        Attempt::PivotRoot => call!(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()),
        Attempt::Chroot => call!(libc::SYS_chroot, root),
        Attempt::Unshare => call!(libc::SYS_unshare, libc::CLONE_NEWUSER),
        Attempt::Setns => call!(libc::SYS_setns, 0, 0),
        Attempt::SetUid => call!(libc::SYS_setresuid, 0, 0, 0),
        Attempt::SetGroups => call!(libc::SYS_setgroups, 0, null),
        Attempt::RaiseLimit => {
            let more = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
            call!(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, &raw const more, null)
        }
        Attempt::KeepCapabilities => call!(libc::SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0),
        Attempt::Dumpable => call!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0),
        Attempt::Keyctl => call!(libc::SYS_keyctl, 0, -3, 1),
        Attempt::Bpf => call!(libc::SYS_bpf, 0, null, 0),
        Attempt::PerfEvent => call!(libc::SYS_perf_event_open, null, 0, -1, -1, 0),
        Attempt::IoUring => call!(libc::SYS_io_uring_setup, 1, [0u64; 32].as_ptr()),
        Attempt::Userfaultfd => call!(libc::SYS_userfaultfd, 1),
        Attempt::ExecutableMemory => map(libc::PROT_READ | libc::PROT_EXEC),
        Attempt::MakeExecutable => {
            let mut page = vec![0u8; 8192];
            let start = page.as_mut_ptr().map_addr(|address| address.next_multiple_of(4096));
            call!(libc::SYS_mprotect, start, 4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
        }
        // KVM_CREATE_DEVICE, which no machine here has.
        Attempt::KvmRequest => call!(libc::SYS_ioctl, 0, 0xc00c_aee0u64, null),
        Attempt::TerminalRequest => call!(libc::SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr()),
        Attempt::CatchSigsys => {
            call!(libc::SYS_rt_sigaction, libc::SIGSYS, [0u64; 4].as_ptr(), null, 8)
        }
        // Numbers of 32-bit programs are others: the filters must look at the architecture.
        Attempt::OldSystemCall => old_getpid(),
    }
}

fn connect(family: c_int, address: &[u8]) -> Outcome {
    // SAFETY: no pointers.
    let socket = unsafe { libc::socket(family, libc::SOCK_STREAM, 0) };
    if socket < 0 {
        return outcome(-1);
    }
    let mut whole = (family as u16).to_ne_bytes().to_vec();
    whole.extend_from_slice(address);
    call!(libc::SYS_connect, socket, whole.as_ptr(), whole.len())
}

fn map(protection: c_int) -> Outcome {
    call!(libc::SYS_mmap, 0, 4096, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
}

/// A process more, by clone(2) or another.
fn child(number: c_long, flags: c_int) -> Outcome {
    // SAFETY: this process has one thread; the child has a copy of all, and goes no further than the next line.
    match unsafe { libc::syscall(number, flags, 0, 0, 0, 0) } {
        // SAFETY: it ends.
        0 => unsafe { libc::_exit(0) },
        result => outcome(result),
    }
}

/// getpid of 32-bit programs, by their gate.
fn old_getpid() -> Outcome {
    let result: i32;
    // SAFETY: the gate changes but the result's register, and r8 to r11.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") 20i32 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    if result < 0 { Outcome::Refused(-result) } else { Outcome::Done }
}
