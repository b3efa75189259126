//! The seccomp filters: what a worker may ask of the kernel at all, and less of it for each kind of thread.
//!
//! Filters add up: a call passes when all of them let it pass. So the long one, [`shared`], is put on once, in the zygote, and every
//! worker has it by its birth; what only a worker's first moments need is taken away by a short one when the jail closes
//! ([`own`]), and a thread gives up by another short one what is not its business ([`of_thread`]).
//!
//! What is not allowed raises SIGSYS, which nobody here can catch but the handler that names the call and ends the process
//! ([`super::violation`]). Opening files is refused with an error instead: the C library looks for some files by itself, and
//! goes on without them.
//!
//! Facts: seccomp(2), Documentation/userspace-api/seccomp_filter.rst; the lists: this program's code, and strace(1) of all its trials.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::ioctls;
use crate::vmm::threads::Role;

/// What any thread needs to live, to allocate, to wait and to end.
const LIFE: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    // `own` has a word on which.
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Sockets and timers that are there already.
const TALK: &[c_long] = &[
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
];

/// Files that are open already.
const FILES: &[c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    // For the empty path, which is a descriptor's file; the root is empty.
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
];

/// Starting a thread.
const THREADS: &[c_long] =
    &[libc::SYS_clone3, libc::SYS_rseq, libc::SYS_sched_getaffinity, libc::SYS_set_robust_list];

const EPOLL: &[c_long] =
    &[libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait];

/// The thread that takes requests makes what the others use, and waits at the door.
const CONTROL: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_dup3,
    libc::SYS_eventfd2,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrusage,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_setsockopt,
    libc::SYS_timerfd_create,
];

/// Refused with an error when the jail is closed.
const PATHS: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_stat,
];

/// Only until the jail is closed.
const BEFORE: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_prlimit64,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_userfaultfd,
];

/// Of prctl(2), until the jail is closed.
const PRCTL_BEFORE: &[i32] = &[libc::PR_SET_DUMPABLE, PR_GET_TID_ADDRESS];
const PR_GET_TID_ADDRESS: i32 = 40;
/// And for ever: the last is what whoever installs a filter says before.
const PRCTL: &[i32] = &[libc::PR_SET_NAME, libc::PR_SET_PDEATHSIG, libc::PR_SET_NO_NEW_PRIVS];

/// The C library's own, for which it makes handlers with the first thread.
const THREAD_SIGNALS: [i32; 2] = [32, 33];
const THREAD_FLAGS: i32 =
    libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_FS | libc::CLONE_FILES;
const STRANGE_FLAGS: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_PARENT
    | libc::CLONE_PTRACE
    | libc::CLONE_UNTRACED
    | libc::CLONE_VFORK;

/// A rule's condition: argument, its width, what is to be.
type Condition = (u8, SeccompCmpArgLen, SeccompCmpOp, u64);

/// A list of calls, each with the rules of which one must hold; none: in any case.
#[derive(Default)]
struct List(BTreeMap<i64, Vec<SeccompRule>>);

impl List {
    fn with(mut self, calls: &[c_long]) -> Self {
        for call in calls {
            self.0.insert(*call, Vec::new());
        }
        self
    }

    /// `call` when all of these hold, or those of another rule.
    fn when(mut self, call: c_long, conditions: &[Condition]) -> Result<Self, BackendError> {
        let conditions = conditions.iter().map(|(argument, width, operator, value)| {
            SeccompCondition::new(*argument, width.clone(), operator.clone(), *value)
        });
        let rule = SeccompRule::new(conditions.collect::<Result<_, _>>()?)?;
        self.0.entry(call).or_default().push(rule);
        Ok(self)
    }

    /// `call` when its argument is one of these.
    fn one_of(
        self,
        call: c_long,
        argument: u8,
        values: impl IntoIterator<Item = u32>,
    ) -> Result<Self, BackendError> {
        values
            .into_iter()
            .try_fold(self, |list, value| list.when(call, &[(argument, Dword, Eq, value.into())]))
    }

    /// Memory, but none that can be executed.
    fn memory(self) -> Result<Self, BackendError> {
        let not_executable = [(2, Dword, MaskedEq(libc::PROT_EXEC as u64), 0)];
        self.when(libc::SYS_mmap, &not_executable)?.when(libc::SYS_mprotect, &not_executable)
    }

    /// A panic that cannot be unwound: SIGABRT gets its default, and comes.
    fn abort(self) -> Result<Self, BackendError> {
        self.handlers(&[libc::SIGABRT])
    }

    fn handlers(self, signals: &[i32]) -> Result<Self, BackendError> {
        self.one_of(libc::SYS_rt_sigaction, 0, signals.iter().map(|signal| signal.cast_unsigned()))
    }

    fn descriptors(self) -> Result<Self, BackendError> {
        let commands = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
        self.one_of(libc::SYS_fcntl, 1, commands.map(i32::cast_unsigned))
    }

    /// Threads of this process, and a filter for each.
    fn threads(self) -> Result<Self, BackendError> {
        let mask = u64::from((THREAD_FLAGS | STRANGE_FLAGS).cast_unsigned());
        self.with(THREADS)
            .when(libc::SYS_clone, &[(0, Qword, MaskedEq(mask), THREAD_FLAGS as u64)])?
            .when(
                libc::SYS_seccomp,
                &[(0, Dword, Eq, libc::SECCOMP_SET_MODE_FILTER.into()), (1, Dword, Eq, 0)],
            )?
            .one_of(libc::SYS_prctl, 0, PRCTL.iter().map(|option| option.cast_unsigned()))
    }

    /// All that is in the list may be done.
    fn allowed(self) -> Result<BpfProgram, BackendError> {
        compile(self.0, SeccompAction::Trap, SeccompAction::Allow)
    }

    /// All that is in the list may not be done.
    fn forbidden(self) -> Result<BpfProgram, BackendError> {
        compile(self.0, SeccompAction::Allow, SeccompAction::Trap)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, these, TargetArch::x86_64)?.try_into()
}

/// For the zygote, or a worker that was started by itself: what a worker needs, and what it takes to become one.
pub fn shared() -> Result<BpfProgram, BackendError> {
    let fork = libc::CLONE_PARENT | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID;
    List::default()
        .with(LIFE)
        .with(TALK)
        .with(FILES)
        .with(EPOLL)
        .with(CONTROL)
        .with(PATHS)
        .with(BEFORE)
        .memory()?
        .abort()?
        .handlers(&THREAD_SIGNALS)?
        .descriptors()?
        .threads()?
        .one_of(libc::SYS_ioctl, 1, ioctls::CONTROL.iter().chain(ioctls::BEFORE).copied())?
        .one_of(libc::SYS_prctl, 0, PRCTL_BEFORE.iter().map(|option| option.cast_unsigned()))?
        .when(libc::SYS_setpgid, &[(0, Dword, Eq, 0), (1, Dword, Eq, 0)])?
        // The zygote's own way to fork.
        .one_of(libc::SYS_clone, 0, [fork, libc::CLONE_PARENT].map(i32::cast_unsigned))?
        .allowed()
}

/// On top of [`shared`], when a worker's jail closes. `pid`: as this process knows itself.
pub fn own(pid: u32) -> Result<BpfProgram, BackendError> {
    let rest = PRCTL.iter().map(|option| (0, Dword, Ne, u64::from(option.cast_unsigned())));
    let program = List::default()
        .with(BEFORE)
        .when(libc::SYS_clone, &[(0, Qword, MaskedEq(libc::CLONE_THREAD as u64), 0)])?
        .when(libc::SYS_prctl, &rest.collect::<Vec<_>>())?
        .when(libc::SYS_tgkill, &[(0, Dword, Ne, pid.into())])?
        .forbidden()?;
    let refused = PATHS.iter().map(|call| (*call, libc::EACCES));
    // It has its flags in memory, where no filter can look; the C library takes clone(2) then.
    Ok(refusing(refused.chain([(libc::SYS_clone3, libc::ENOSYS)]), program))
}

/// On top of both, for a thread.
pub fn of_thread(role: Role) -> Result<BpfProgram, BackendError> {
    let list = List::default().with(LIFE).memory()?.abort()?.descriptors()?;
    match role {
        Role::Vcpu => list.with(TALK).one_of(libc::SYS_ioctl, 1, ioctls::VCPU.iter().copied()),
        Role::Devices => list
            .with(TALK)
            .with(FILES)
            .with(EPOLL)
            // It starts the first of those that carry disk requests out.
            .threads()?
            .one_of(libc::SYS_ioctl, 1, ioctls::DEVICES.iter().copied()),
        Role::Disk => Ok(list.with(FILES)),
    }?
    .allowed()
}

/// For the first process of the workers' pid namespace, which waits for their end and does nothing else.
pub fn init() -> Result<BpfProgram, BackendError> {
    List::default()
        .with(&[libc::SYS_read, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_restart_syscall])
        .allowed()
}

/// Puts in front of `program` that some calls fail, each with its error. Jumps are relative, so the program is as good there.
fn refusing(calls: impl IntoIterator<Item = (c_long, i32)>, mut program: BpfProgram) -> BpfProgram {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    // linux/audit.h; `struct seccomp_data`: number, architecture, ...
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let mut front = vec![step(LOAD, 0, 0, 0)];
    for (call, error) in calls {
        // Call numbers and errors are small.
        let (call, error) = (u32::try_from(call).unwrap_or(u32::MAX), error.unsigned_abs());
        front.push(step(IF_EQUAL, 0, 1, call));
        front.push(step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | error));
    }
    // Another architecture's numbers are not these: the program itself refuses it.
    let length = u8::try_from(front.len()).unwrap_or(u8::MAX);
    let mut whole = vec![step(LOAD, 0, 0, 4), step(IF_EQUAL, 0, length, AUDIT_ARCH_X86_64)];
    whole.append(&mut front);
    whole.append(&mut program);
    whole
}
