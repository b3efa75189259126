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

/// A process number that there is not.
const NO_PID: u32 = 0x7fff_fffe;

/// On top of [`shared`], when a worker's jail closes: of whichever process, see [`of_process`]. (It is made in the zygote: to make it takes memory, which would be
/// each worker's own.)
pub fn own() -> Result<BpfProgram, BackendError> {
    let rest = PRCTL.iter().map(|option| (0, Dword, Ne, u64::from(option.cast_unsigned())));
    let program = List::default()
        .with(BEFORE)
        .when(libc::SYS_clone, &[(0, Qword, MaskedEq(libc::CLONE_THREAD as u64), 0)])?
        .when(libc::SYS_prctl, &rest.collect::<Vec<_>>())?
        .when(libc::SYS_tgkill, &[(0, Dword, Ne, NO_PID.into())])?
        .forbidden()?;
    let refused = PATHS.iter().map(|call| (*call, libc::EACCES));
    // It has its flags in memory, where no filter can look; the C library takes clone(2) then.
    Ok(refusing(refused.chain([(libc::SYS_clone3, libc::ENOSYS)]), program))
}

/// Makes it the filter of the process that knows itself by this number. `false`: it is none of [`own`].
pub fn of_process(own: &mut BpfProgram, pid: u32) -> bool {
    let place = own.iter_mut().find(|step| step.k == NO_PID);
    place.map(|step| step.k = pid).is_some()
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

#[cfg(test)]
mod tests {
    use super::*;

    const TRAP: u32 = libc::SECCOMP_RET_TRAP;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const X86_64: u32 = 0xc000_003e;

    /// What the kernel would make of a call: runs a program as Documentation/networking/filter.rst says, over `struct seccomp_data`.
    fn verdict(program: &BpfProgram, architecture: u32, call: c_long, arguments: &[u64]) -> u32 {
        let word = |offset: u32| match offset {
            0 => call as u32,
            4 => architecture,
            _ => {
                let (index, high) = ((offset - 16) / 8, !offset.is_multiple_of(8));
                let value = arguments.get(index as usize).copied().unwrap_or(0);
                if high { (value >> 32) as u32 } else { value as u32 }
            }
        };
        let (mut at, mut accumulator) = (0, 0u32);
        loop {
            let step = &program[at];
            at += 1;
            let jump = |yes: bool| usize::from(if yes { step.jt } else { step.jf });
            match step.code {
                0x20 => accumulator = word(step.k),
                0x54 => accumulator &= step.k,
                0x05 => at += step.k as usize,
                0x15 => at += jump(accumulator == step.k),
                0x25 => at += jump(accumulator > step.k),
                0x35 => at += jump(accumulator >= step.k),
                0x06 => return step.k,
                code => panic!("an instruction that is not known here: {code:#x}"),
            }
        }
    }

    fn own_of(pid: u32) -> BpfProgram {
        let mut program = own().unwrap();
        assert!(of_process(&mut program, pid) && !of_process(&mut program, pid));
        program
    }

    fn all(of: &BpfProgram, call: c_long, arguments: &[u64]) -> u32 {
        verdict(of, X86_64, call, arguments)
    }

    #[test]
    fn a_worker_may_do_its_work_and_nothing_else() {
        let (shared, own) = (shared().unwrap(), own_of(7));
        let both = |call, arguments: &[u64]| (all(&shared, call, arguments), all(&own, call, arguments));
        for call in [LIFE, TALK, FILES, EPOLL, CONTROL].concat() {
            assert_eq!(both(call, &[7]), (ALLOW, ALLOW), "{call}");
        }
        for request in ioctls::CONTROL {
            assert_eq!(both(libc::SYS_ioctl, &[3, (*request).into()]), (ALLOW, ALLOW), "{request:#x}");
        }
        assert_eq!(all(&shared, libc::SYS_ioctl, &[3, libc::TIOCSTI]), TRAP);
        for call in BEFORE {
            assert_eq!(both(*call, &[]), (ALLOW, TRAP), "{call}");
        }
        for call in PATHS {
            let refused = libc::SECCOMP_RET_ERRNO | libc::EACCES as u32;
            assert_eq!(both(*call, &[]), (ALLOW, refused), "{call}");
        }
        for call in [libc::SYS_socket, libc::SYS_execve, libc::SYS_ptrace, libc::SYS_kill, libc::SYS_fork] {
            assert_eq!(all(&shared, call, &[]), TRAP, "{call}");
        }
        // What is not in the list at all, old and new.
        for call in [1000, 500, libc::SYS_vfork, libc::SYS_seccomp, libc::SYS_prctl] {
            assert_eq!(all(&shared, call, &[99, 99]), TRAP, "{call}");
        }
    }

    #[test]
    fn arguments_count() {
        let (shared, own) = (shared().unwrap(), own_of(7));
        let (read, exec) = (libc::PROT_READ as u64, (libc::PROT_READ | libc::PROT_EXEC) as u64);
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            assert_eq!(all(&shared, call, &[0, 4096, read]), ALLOW);
            assert_eq!(all(&shared, call, &[0, 4096, exec]), TRAP);
        }
        // As the C library starts a thread.
        let thread = 0x3d_0f00;
        assert_eq!(all(&shared, libc::SYS_clone, &[thread]), ALLOW);
        assert_eq!(all(&own, libc::SYS_clone, &[thread]), ALLOW);
        for more in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_PTRACE, libc::CLONE_PARENT] {
            assert_eq!(all(&shared, libc::SYS_clone, &[thread | more as u64]), TRAP, "{more:#x}");
        }
        assert_eq!(all(&shared, libc::SYS_clone, &[libc::SIGCHLD as u64]), TRAP);
        let fork = (libc::CLONE_PARENT | libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
        assert_eq!(
            (all(&shared, libc::SYS_clone, &[fork]), all(&own, libc::SYS_clone, &[fork])),
            (ALLOW, TRAP)
        );
        assert_eq!(all(&own, libc::SYS_clone3, &[]), libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
        // Signals to threads of this process only.
        assert_eq!(all(&own, libc::SYS_tgkill, &[7, 9, 34]), ALLOW);
        assert_eq!(all(&own, libc::SYS_tgkill, &[8, 8, 9]), TRAP);
        for option in PRCTL {
            assert_eq!(all(&own, libc::SYS_prctl, &[*option as u64]), ALLOW);
        }
        assert_eq!(all(&own, libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1]), TRAP);
        assert_eq!(all(&shared, libc::SYS_rt_sigaction, &[libc::SIGSYS as u64]), TRAP);
        assert_eq!(all(&shared, libc::SYS_rt_sigaction, &[libc::SIGABRT as u64]), ALLOW);
    }

    #[test]
    fn threads_may_less_than_the_worker() {
        let shared = shared().unwrap();
        let programs = [Role::Vcpu, Role::Devices, Role::Disk].map(|role| of_thread(role).unwrap());
        let [vcpu, devices, disk] = &programs;
        for call in [LIFE, TALK, FILES, EPOLL, THREADS, CONTROL].concat() {
            for program in &programs {
                assert!(all(program, call, &[]) == TRAP || all(&shared, call, &[]) == ALLOW, "{call}");
            }
        }
        let run = [3, ioctls::KVM_RUN.into()];
        assert_eq!(all(vcpu, libc::SYS_ioctl, &run), ALLOW);
        assert_eq!(all(devices, libc::SYS_ioctl, &run), TRAP);
        assert_eq!(all(disk, libc::SYS_ioctl, &run), TRAP);
        for request in ioctls::VCPU {
            assert_eq!(all(vcpu, libc::SYS_ioctl, &[3, (*request).into()]), ALLOW);
        }
        assert_eq!(all(vcpu, libc::SYS_ioctl, &[3, ioctls::KVM_CREATE_VM.into()]), TRAP);
        assert_eq!(all(vcpu, libc::SYS_clone, &[0x3d_0f00]), TRAP);
        assert_eq!(all(devices, libc::SYS_clone, &[0x3d_0f00]), ALLOW);
        assert_eq!(all(disk, libc::SYS_pwrite64, &[]), ALLOW);
        assert_eq!(all(disk, libc::SYS_recvmsg, &[]), TRAP);
        assert_eq!(all(vcpu, libc::SYS_pwrite64, &[]), TRAP);
    }

    #[test]
    fn another_architectures_calls_are_none() {
        const I386: u32 = 0x4000_0003;
        for program in [shared().unwrap(), own_of(7), of_thread(Role::Vcpu).unwrap(), init().unwrap()] {
            for call in 0..500 {
                assert_eq!(verdict(&program, I386, call, &[]), libc::SECCOMP_RET_KILL_PROCESS, "{call}");
            }
        }
    }

    #[test]
    fn filters_are_as_short_as_they_may_be() {
        // The kernel takes 4096 instructions; those that are put on for each worker and thread are to be few.
        assert!(shared().unwrap().len() < 1000, "{}", shared().unwrap().len());
        for program in [own_of(7), of_thread(Role::Vcpu).unwrap(), of_thread(Role::Disk).unwrap()] {
            assert!(program.len() < 400, "{}", program.len());
        }
    }
}
