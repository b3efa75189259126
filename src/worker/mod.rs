//! The process around one VM: `coldspark worker`. No tokio here. See [`protocol`] for what it is told.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | the messages |
//! | [`channel`] | the socket they travel on |
//! | [`ahead`] | what a shell does for clones of a snapshot before it is asked for one |
//! | [`vm`] | the VM: from a request's descriptors to a machine, and from a machine to a snapshot's files |
//! | [`resident`] | the memory of a clone, with what it will probably touch in place |
//! | [`keep`] | what outlives the daemon, and the door at which the next one takes it over |
//! | [`fault`] | errors as the daemon is told them |
//! | [`warm`] | the program's own pages, mapped ahead |
//! | [`zygote`] | workers made by a fork of a process that is prepared already |
//!
//! Threads: this one takes requests, one for each vCPU, one for the devices. Opened by path at the start, before
//! anything of a guest is seen: `/dev/kvm` and the userfault device, in the zygote if there is one. Nothing later.

mod ahead;
pub mod channel;
mod fault;
mod keep;
pub mod protocol;
mod resident;
mod vm;
mod warm;
mod zygote;

use std::ffi::CStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use channel::{Channel, ChannelError};
use keep::Keep;
use protocol::{CONTROL_FD, Event, ExitReason, Fault, FaultKind, FromWorker, Reply, Request, ToWorker};
use vm::{Shell, Vm};

/// How the process is to begin.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// It is killed when the thread that started it ends.
    pub die_with_parent: bool,
    /// It is told to become workers, and is none itself.
    pub zygote: bool,
}

/// Runs the worker until its VM ends or, while it is a shell, until the control socket closes.
pub fn main(setting: Setting) -> ExitCode {
    match run(setting) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Standard error is the daemon's log of this worker.
            say(&message);
            ExitCode::FAILURE
        }
    }
}

/// The daemon's end of the conversation.
#[derive(Clone)]
struct Daemon(Arc<Connection>);

struct Connection {
    /// [`CONTROL_FD`]: another daemon's takes its place there.
    channel: Channel,
    /// This VM may be taken over by another daemon.
    adoptable: AtomicBool,
    /// The guest has reset itself, by this door, and no daemon has said yet what is to follow.
    reset: Mutex<Option<&'static str>>,
}

impl Daemon {
    /// True when it was sent. The VM outlives the daemon; who listens next asks for what it needs.
    fn send(&self, message: &FromWorker, fds: &[BorrowedFd<'_>]) -> bool {
        let sent = self.0.channel.send(message, fds);
        if let Err(error) = &sent {
            say(&format!("the daemon could not be told: {error}"));
        }
        sent.is_ok()
    }

    fn event(&self, event: Event) -> bool {
        self.send(&FromWorker::Event(event), &[])
    }

    fn may_be_adopted(&self) -> bool {
        self.0.adoptable.load(Ordering::Acquire)
    }

    fn note_reset(&self, reset: Option<&'static str>) {
        *self.0.reset.lock().unwrap_or_else(PoisonError::into_inner) = reset;
    }

    fn reset(&self) -> Option<String> {
        self.0.reset.lock().unwrap_or_else(PoisonError::into_inner).map(str::to_owned)
    }
}

/// Writes a line to standard error. Nobody may read it any more, and there may be no room.
fn say(line: &str) {
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// The same for what is logged.
struct Log;

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn run(setting: Setting) -> Result<(), String> {
    // Standard error is the daemon's log of this worker: a device that stops must not do so in silence.
    let _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(|| Log)
        .with_ansi(false)
        .without_time()
        .try_init();
    let parent = parent();
    if setting.die_with_parent {
        die_with(parent)?;
    }
    one_arena();
    name(if setting.zygote { c"zygote" } else { c"worker" });
    let control = control_socket().map_err(|e| {
        format!(
            "descriptor {CONTROL_FD} is not a control socket ({e}); workers are started by `coldspark serve`"
        )
    })?;
    crate::vmm::vcpu::install_stop_signal().map_err(|e| format!("the stop signal: {e}"))?;
    let mut shell = Shell::default();
    shell.open();
    if setting.zygote {
        // A VM belongs to the process that made it; this one is for the road there.
        shell.rehearse();
        if zygote::serve(&control)? == zygote::Side::Zygote {
            return Ok(());
        }
        if setting.die_with_parent {
            die_with(parent)?;
        }
        name(c"worker");
        shell.open();
    }
    let daemon = Daemon(Arc::new(Connection {
        channel: control,
        adoptable: AtomicBool::new(false),
        reset: Mutex::new(None),
    }));
    shell.prepare();
    daemon.event(Event::Hello(shell.ready()));
    let mut vm: Option<Vm> = None;
    let mut keep: Option<Keep> = None;
    loop {
        let (message, mut fds): (ToWorker, Vec<OwnedFd>) = match daemon.0.channel.recv() {
            Ok(received) => received,
            Err(ChannelError::Closed) => match (&vm, &keep) {
                (None, _) => return Ok(()),
                // The kernel ends it with its daemon; its own end ends the process, too.
                (Some(_), None) => loop {
                    std::thread::park();
                },
                (Some(vm), Some(keep)) => {
                    let next =
                        keep.wait().map_err(|error| format!("no service can take this VM over: {error}"))?;
                    let Some(next) = next else {
                        say("no service has taken this VM over in time: it ends");
                        std::process::exit(0);
                    };
                    // In the place of the old one: whoever sends from now on sends to the new daemon.
                    zygote::put(&next.into_fd(), CONTROL_FD, libc::O_CLOEXEC)
                        .map_err(|error| format!("control socket: {error}"))?;
                    // One that is gone already is seen at the next turn.
                    vm.introduce(&daemon, keep);
                    continue;
                }
            },
            Err(error) => return Err(format!("control socket: {error}")),
        };
        let arrived = Instant::now();
        let id = message.id;
        let reply = |result| {
            daemon.send(&FromWorker::Reply { id, result }, &[]);
        };
        match message.request {
            Request::Boot(_) | Request::Restore(_) | Request::Expect | Request::Seat(_) | Request::Start
                if vm.is_some() =>
            {
                reply(Err(fault::wrong_state("this worker has its VM already")));
            }
            Request::Keep { orphan_ms } => {
                let kept = match (&vm, &keep) {
                    (None, None) => Keep::new(fds, Duration::from_millis(orphan_ms)),
                    _ => Err(fault::wrong_state("too late, or told before")),
                };
                reply(kept.map(|kept| {
                    keep = Some(kept);
                    daemon.0.adoptable.store(true, Ordering::Release);
                    Reply::Done
                }));
            }
            Request::Report => reply(shell.report().map(Reply::Report)),
            Request::Expect => reply(shell.expect(fds).map(|()| Reply::Done)),
            Request::Seat(spec) => reply(shell.seat(&daemon, &spec, fds).map(|()| Reply::Done)),
            Request::Start => match shell.start(arrived) {
                Ok((new, restored)) => {
                    vm = Some(new);
                    outlive(&keep);
                    reply(Ok(Reply::Restored(restored)));
                }
                Err(fault) => reply(Err(fault)),
            },
            Request::Boot(spec) => match shell.boot(&daemon, &spec, fds, arrived) {
                Ok((new, booted)) => {
                    vm = Some(new);
                    outlive(&keep);
                    reply(Ok(Reply::Booted(booted)));
                }
                Err(fault) => reply(Err(fault)),
            },
            Request::Restore(spec) => match shell.restore(&daemon, &spec, fds, arrived) {
                Ok((new, restored)) => {
                    vm = Some(new);
                    outlive(&keep);
                    reply(Ok(Reply::Restored(restored)));
                }
                Err(fault) => reply(Err(fault)),
            },
            Request::Restart(_) if fds.len() < 2 => reply(Err(fault::descriptors("too few"))),
            Request::Restart(spec) => {
                let theirs = fds.remove(1);
                if let Some(keep) = &mut keep {
                    keep.agent = theirs;
                }
                daemon.note_reset(None);
                let Some(old) = vm.take() else {
                    reply(Err(fault::wrong_state("this worker has no VM yet")));
                    continue;
                };
                match shell.restart(&daemon, old, &spec, fds, arrived) {
                    Ok((new, booted)) => {
                        vm = Some(new);
                        reply(Ok(Reply::Booted(booted)));
                    }
                    Err(fault) => {
                        let reason = format!("it could not be booted again after its reset: {fault}");
                        reply(Err(fault));
                        daemon.event(Event::Exited(ExitReason::Failed(reason)));
                        return Ok(());
                    }
                }
            }
            Request::Kill => {
                drop(vm.take());
                reply(Ok(Reply::Done));
                daemon.event(Event::Exited(ExitReason::Killed));
                return Ok(());
            }
            other => {
                let result = match vm.as_mut() {
                    Some(vm) => ask(vm, other, fds),
                    None => Err(fault::wrong_state("this worker has no VM yet")),
                };
                reply(result);
            }
        }
    }
}

/// Requests to a VM that is there.
fn ask(vm: &mut Vm, request: Request, fds: Vec<OwnedFd>) -> Result<Reply, Fault> {
    match request {
        Request::Pause => vm.pause().map(|()| Reply::Done),
        Request::Resume => vm.resume().map(|()| Reply::Done),
        Request::Snapshot(spec) => vm.snapshot(&spec, fds).map(Reply::Frozen),
        Request::Stats => Ok(Reply::Stats(vm.stats())),
        Request::Milestones => Ok(Reply::Milestones(vm.milestones())),
        Request::Touched => vm.touched().map(Reply::Touched),
        Request::Inspect => vm.inspect().map(Reply::Looks),
        Request::PowerButton => vm.press_power_button().map(|()| Reply::Done),
        Request::Boot(_)
        | Request::Restart(_)
        | Request::Keep { .. }
        | Request::Report
        | Request::Expect
        | Request::Seat(_)
        | Request::Start
        | Request::Restore(_)
        | Request::Kill => Err(Fault { kind: FaultKind::Internal, message: "not a request to a VM".into() }),
    }
}

/// Takes over the inherited control socket, after a look at what it is.
fn control_socket() -> io::Result<Channel> {
    let mut kind: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `kind` and `length` are valid for the call; an unusable descriptor is an error, not undefined.
    let result = unsafe {
        libc::getsockopt(CONTROL_FD, libc::SOL_SOCKET, libc::SO_TYPE, (&raw mut kind).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if kind != libc::SOCK_SEQPACKET {
        return Err(io::Error::other("another kind of socket"));
    }
    // SAFETY: it is open, as getsockopt showed, and by the protocol nobody else in this process owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    // SAFETY: an fcntl on our own descriptor, with a plain integer argument.
    if unsafe { libc::fcntl(CONTROL_FD, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Channel::from_fd(socket))
}

fn parent() -> libc::pid_t {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::getppid() }
}

/// A VM that can be taken over by another daemon does not end with this one any more.
fn outlive(keep: &Option<Keep>) {
    if keep.is_some() {
        // SAFETY: prctl with plain integer arguments.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
    }
}

/// Lets the kernel kill this process when `expected`, its parent, goes: a shell may wait for something that only that daemon would have done.
fn die_with(expected: libc::pid_t) -> Result<(), String> {
    // SAFETY: prctl with plain integer arguments.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(format!("PR_SET_PDEATHSIG: {}", io::Error::last_os_error()));
    }
    // It may have gone before. (If it had when this process asked who it is, the control socket is closed, which ends a shell.)
    if parent() != expected {
        return Err("the service is gone already".to_owned());
    }
    Ok(())
}

/// What this process is called in lists of processes.
fn name(name: &CStr) {
    // SAFETY: a string that ends; at most 16 bytes of it are read.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// One heap for all threads: each further one costs system calls and pages, and these threads rarely allocate.
fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a limit; no allocation is touched.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Duplicates a descriptor for sending.
fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
