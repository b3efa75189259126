//! Runs an operation in a child process under ptrace(2), counts its system calls that can change a file in one folder, and at one of
//! them kills the child, or lets the call fail.
//!
//! The child asks to be traced and stops itself by SIGSTOP when all is prepared ([`stop`]); it stops a second time when the
//! operation has failed, so that the folder can be looked at while the child lives. A child that begins a thread or a process is
//! an error: their calls would not be seen.
//!
//! Facts: ptrace(2), syscall(2); an `orig_rax` of -1 at a call's entry skips it, and the exit stop still comes.

use std::{
    fs,
    io::Read,
    os::unix::{ffi::OsStringExt, fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, raise},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// What the child is to do, and where.
pub const OPERATION: &str = "COLDSPARK_CRASH_OPERATION";
pub const FOLDER: &str = "COLDSPARK_CRASH_FOLDER";
/// The child's exit status where ptrace is refused.
pub const NOT_TRACED: i32 = 77;
/// Most calls of an operation: more are an endless loop.
const CALLS_MAX: usize = 5000;
/// Longest path that is read out of the child.
const PATH_BYTES_MAX: usize = 4096;

/// A lock of a store is a descriptor, and one that is open while another thread starts a process lives in that process until its exec:
/// the store would be found locked. So processes are started, and stores opened here, one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is done to the child. Calls are numbered from 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plan {
    /// Calls from the first to the last of these do nothing, and fail with this.
    pub fail: Option<(usize, usize, Errno)>,
    /// Killed at the entry of this call.
    pub kill: Option<usize>,
}

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Makes a name: a file, a folder, a link.
    Make,
    /// Changes a file's content, length or mode.
    Change,
    /// Moves a name, or exchanges two.
    Rename,
    /// Takes a name away.
    Remove,
    Sync,
}

/// A call that was made.
#[derive(Debug, Clone)]
pub struct Call {
    pub name: &'static str,
    pub effect: Effect,
    /// Of the folder; the last is the one that is changed.
    pub paths: Vec<PathBuf>,
}

/// Called while a child whose operation has failed waits. `false`: it is to be killed, and not to try again.
pub type AtFailure<'a> = &'a mut dyn FnMut() -> anyhow::Result<bool>;

/// How it went on to the child's end.
#[derive(Debug)]
pub struct Run {
    pub calls: Vec<Call>,
    /// `None`: it was killed, as planned or at its failure.
    pub status: Option<i32>,
    /// What it said.
    pub text: String,
}

/// Why a run has no result.
#[derive(Debug)]
pub enum Failure {
    /// This host does not let us trace; the reason.
    NotAllowed(String),
    Broken(anyhow::Error),
}

impl Failure {
    /// With what was done.
    pub fn at(self, plan: Plan, call: &Call) -> Failure {
        match self {
            Failure::Broken(error) => {
                Failure::Broken(error.context(format!("{plan:?} at {} {:?}", call.name, call.paths)))
            }
            other => other,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Broken(error)
    }
}

/// In the child: waits until the parent goes on, for the first time as one that is traced.
pub fn stop(first: bool) -> Result<(), Errno> {
    if first {
        ptrace::traceme()?;
    }
    raise(Signal::SIGSTOP)
}

/// Runs `operation` on `folder`.
pub fn run(
    operation: &str,
    arguments: &[&str],
    folder: &Path,
    plan: Plan,
    at_failure: AtFailure,
) -> Result<Run, Failure> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut command = Command::new(program);
    command.args(arguments).env(OPERATION, operation).env(FOLDER, folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = {
        let _one = one_at_a_time();
        command.spawn().context("the child cannot be started")?
    };
    // The tracer is the thread that started it: this one.
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a process number")?);
    let mut tracee = Tracee { pid, folder, plan, calls: Vec::new(), at_failure };
    let status = tracee.follow();
    if status.is_err() {
        // It may live still, and stand. If it is gone already there is nothing to be done.
        let _ = child.kill();
        let _ = waitpid(pid, None);
    }
    let status = status?;
    let mut text = String::new();
    child.stdout.take().map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut text)).context("its output")?;
    child.stderr.take().map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut text)).context("its output")?;
    match status {
        Some(NOT_TRACED) => Err(Failure::NotAllowed(text.trim().to_owned())),
        _ => Ok(Run { calls: tracee.calls, status, text }),
    }
}

struct Tracee<'a> {
    pid: Pid,
    folder: &'a Path,
    plan: Plan,
    calls: Vec<Call>,
    at_failure: AtFailure<'a>,
}

impl Tracee<'_> {
    /// To its end: its exit status, or `None` if it was killed.
    fn follow(&mut self) -> anyhow::Result<Option<i32>> {
        match waitpid(self.pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGSTOP) => {}
            WaitStatus::Exited(_, NOT_TRACED) => return Ok(Some(NOT_TRACED)),
            other => bail!("before its operation: {other:?}"),
        }
        ptrace::setoptions(
            self.pid,
            Options::PTRACE_O_TRACESYSGOOD
                | Options::PTRACE_O_EXITKILL
                | Options::PTRACE_O_TRACECLONE
                | Options::PTRACE_O_TRACEFORK
                | Options::PTRACE_O_TRACEVFORK,
        )?;
        // In a call, and if it is to fail, with what.
        let (mut inside, mut failing) = (false, None);
        let mut signal = None;
        loop {
            ptrace::syscall(self.pid, signal.take())?;
            match waitpid(self.pid, None)? {
                WaitStatus::PtraceSyscall(_) if inside => {
                    if let Some(errno) = failing.take() {
                        self.set(|registers| registers.rax = (-(errno as i64)) as u64)?;
                    }
                    inside = false;
                }
                WaitStatus::PtraceSyscall(_) => {
                    inside = true;
                    let Some(call) = self.call()? else { continue };
                    self.calls.push(call);
                    let number = self.calls.len();
                    ensure!(number <= CALLS_MAX, "it makes calls without end: {:?}", self.calls.last());
                    if self.plan.kill == Some(number) {
                        return self.kill();
                    }
                    failing =
                        self.plan.fail.filter(|fail| (fail.0..=fail.1).contains(&number)).map(|fail| fail.2);
                    if failing.is_some() {
                        self.set(|registers| registers.orig_rax = u64::MAX)?;
                    }
                }
                WaitStatus::Stopped(_, Signal::SIGSTOP) => {
                    if !(self.at_failure)()? {
                        return self.kill();
                    }
                    // What it does from now on is to go well.
                    self.plan = Plan::default();
                }
                WaitStatus::Stopped(_, other) => signal = Some(other),
                WaitStatus::Exited(_, status) => return Ok(Some(status)),
                other => bail!("it begins another thread or process, or ends in another way: {other:?}"),
            }
        }
    }

    fn kill(&self) -> anyhow::Result<Option<i32>> {
        nix::sys::signal::kill(self.pid, Signal::SIGKILL)?;
        match waitpid(self.pid, None)? {
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(None),
            other => bail!("after SIGKILL: {other:?}"),
        }
    }

    fn set(&self, change: impl FnOnce(&mut libc::user_regs_struct)) -> anyhow::Result<()> {
        let mut registers = ptrace::getregs(self.pid)?;
        change(&mut registers);
        Ok(ptrace::setregs(self.pid, registers)?)
    }

    /// The call at whose entry it stands, if it can change something in the folder.
    fn call(&self) -> anyhow::Result<Option<Call>> {
        let r = ptrace::getregs(self.pid)?;
        let here = libc::AT_FDCWD as u64;
        let creates = |flags: u64| {
            let flags = flags as i32;
            // O_TMPFILE has O_DIRECTORY in it.
            flags & (libc::O_CREAT | libc::O_TRUNC) != 0 || flags & libc::O_TMPFILE == libc::O_TMPFILE
        };
        let file = |fd: u64| anyhow::Ok(vec![self.descriptor(fd)?]);
        let at = |folder: u64, path: u64| anyhow::Ok(vec![self.path(folder, path)?]);
        let two = |a: (u64, u64), b: (u64, u64)| anyhow::Ok(vec![self.path(a.0, a.1)?, self.path(b.0, b.1)?]);
        let (name, effect, paths): (&'static str, Effect, Vec<PathBuf>) =
            match i64::try_from(r.orig_rax).unwrap_or(-1) {
                libc::SYS_open if creates(r.rsi) => ("open", Effect::Make, at(here, r.rdi)?),
                libc::SYS_openat if creates(r.rdx) => ("openat", Effect::Make, at(r.rdi, r.rsi)?),
                libc::SYS_creat => ("creat", Effect::Make, at(here, r.rdi)?),
                libc::SYS_mkdir => ("mkdir", Effect::Make, at(here, r.rdi)?),
                libc::SYS_mkdirat => ("mkdirat", Effect::Make, at(r.rdi, r.rsi)?),
                libc::SYS_link => ("link", Effect::Make, at(here, r.rsi)?),
                libc::SYS_linkat => ("linkat", Effect::Make, at(r.rdx, r.r10)?),
                libc::SYS_symlink => ("symlink", Effect::Make, at(here, r.rsi)?),
                libc::SYS_symlinkat => ("symlinkat", Effect::Make, at(r.rsi, r.rdx)?),
                libc::SYS_write => ("write", Effect::Change, file(r.rdi)?),
                libc::SYS_pwrite64 => ("pwrite64", Effect::Change, file(r.rdi)?),
                libc::SYS_writev => ("writev", Effect::Change, file(r.rdi)?),
                libc::SYS_pwritev | libc::SYS_pwritev2 => ("pwritev", Effect::Change, file(r.rdi)?),
                libc::SYS_truncate => ("truncate", Effect::Change, at(here, r.rdi)?),
                libc::SYS_ftruncate => ("ftruncate", Effect::Change, file(r.rdi)?),
                libc::SYS_fallocate => ("fallocate", Effect::Change, file(r.rdi)?),
                libc::SYS_copy_file_range => ("copy_file_range", Effect::Change, file(r.rdx)?),
                libc::SYS_sendfile => ("sendfile", Effect::Change, file(r.rdi)?),
                libc::SYS_chmod => ("chmod", Effect::Change, at(here, r.rdi)?),
                libc::SYS_fchmod => ("fchmod", Effect::Change, file(r.rdi)?),
                libc::SYS_fchmodat => ("fchmodat", Effect::Change, at(r.rdi, r.rsi)?),
                libc::SYS_fchown => ("fchown", Effect::Change, file(r.rdi)?),
                libc::SYS_rename => ("rename", Effect::Rename, two((here, r.rdi), (here, r.rsi))?),
                libc::SYS_renameat => ("renameat", Effect::Rename, two((r.rdi, r.rsi), (r.rdx, r.r10))?),
                libc::SYS_renameat2 => ("renameat2", Effect::Rename, two((r.rdi, r.rsi), (r.rdx, r.r10))?),
                libc::SYS_unlink => ("unlink", Effect::Remove, at(here, r.rdi)?),
                libc::SYS_unlinkat => ("unlinkat", Effect::Remove, at(r.rdi, r.rsi)?),
                libc::SYS_rmdir => ("rmdir", Effect::Remove, at(here, r.rdi)?),
                libc::SYS_fsync => ("fsync", Effect::Sync, file(r.rdi)?),
                libc::SYS_fdatasync => ("fdatasync", Effect::Sync, file(r.rdi)?),
                _ => return Ok(None),
            };
        let inside = |path: &PathBuf| path.strip_prefix(self.folder).map(Path::to_path_buf).ok();
        let paths: Vec<PathBuf> = paths.iter().filter_map(inside).collect();
        Ok((!paths.is_empty()).then_some(Call { name, effect, paths }))
    }

    fn descriptor(&self, fd: u64) -> anyhow::Result<PathBuf> {
        // A call on a descriptor that is not open fails by itself.
        Ok(fs::read_link(format!("/proc/{}/fd/{}", self.pid, fd as i32)).unwrap_or_default())
    }

    fn path(&self, folder: u64, address: u64) -> anyhow::Result<PathBuf> {
        let memory = fs::File::open(format!("/proc/{}/mem", self.pid)).context("the child's memory")?;
        let mut bytes = Vec::new();
        let mut piece = [0; 64];
        while bytes.len() < PATH_BYTES_MAX {
            // Less where the next page is not mapped.
            let got = memory.read_at(&mut piece, address + bytes.len() as u64).context("a path")?;
            let end = piece[..got].iter().position(|&byte| byte == 0);
            bytes.extend_from_slice(&piece[..end.unwrap_or(got)]);
            if end.is_some() || got == 0 {
                break;
            }
        }
        let path = PathBuf::from(std::ffi::OsString::from_vec(bytes));
        let base = match folder as i32 {
            libc::AT_FDCWD => {
                std::env::current_dir().context("the working folder, which the child has too")?
            }
            fd if path.is_relative() => self.descriptor(fd as u64)?,
            _ => PathBuf::new(),
        };
        Ok(base.join(path))
    }
}
