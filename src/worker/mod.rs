//! The process around one VM: `coldspark worker`. No tokio here. See [`protocol`] for what it is told.
//!
//! | module | what it holds |
//! |---|---|
//! | [`protocol`] | the messages |
//! | [`channel`] | the socket they travel on |
//! | [`ahead`] | what a shell does for clones of a snapshot before it is asked for one |
//! | [`vm`] | the VM: from a request's descriptors to a machine, and from a machine to a snapshot's files |
//! | [`resident`] | the memory of a clone, with what it will probably touch in place |
//! | [`process`] | the socket it was born with, its end with its parent, its name |
//! | [`keep`] | what outlives the daemon, and the door at which the next one takes it over |
//! | [`fault`] | errors as the daemon is told them |
//! | [`jail`] | what it gives up before it sees a guest |
//! | [`own`] | what the kernel tells it of itself |
//! | [`warm`] | the program's own pages, mapped ahead |
//! | [`zygote`] | workers made by a fork of a process that is prepared already |
//!
//! Threads: this one takes requests, one for each vCPU, one for the devices, up to four for disks. Opened by path at the start, before the jail is
//! closed and anything of a guest is seen: `/dev/kvm` and the userfault device, in the zygote if there is one, and two files of /proc about the process
//! itself. Nothing later.

mod ahead;
pub mod channel;
mod fault;
pub mod jail;
mod keep;
mod own;
mod process;
pub mod protocol;
mod resident;
mod vm;
mod warm;
mod zygote;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use channel::{Channel, ChannelError};
use jail::{Jailer, Outside};
use keep::Keep;
use process::{control_socket, die_with, name, one_arena, outlive};
use protocol::{
    CONTROL_FD, Event, ExitReason, Fault, FaultKind, FromWorker, Jail, JailMode, Layer, Reply, Request,
    ToWorker,
};
use vm::{Shell, Vm};

/// Status of a worker that a thread of its machine was lost to, as Rust's own of one whose only thread panics.
const THREAD_LOST: i32 = 101;

/// How the process is to begin.
#[derive(Debug, Clone)]
pub struct Setting {
    /// It is killed when the thread that started it ends.
    pub die_with_parent: bool,
    /// It is told to become workers, and is none itself.
    pub zygote: bool,
    pub jail: jail::Wish,
    /// It tries what its jail forbids instead of being a worker: for trials.
    pub attempts: bool,
}

impl Setting {
    /// From the arguments that the daemon gives (`fleet::process`). What is not known is passed over.
    pub fn of(arguments: impl Iterator<Item = OsString>) -> Self {
        let mut setting =
            Self { die_with_parent: false, zygote: false, jail: jail::Wish::default(), attempts: false };
        for word in arguments.filter_map(|word| word.into_string().ok()) {
            match word.as_str() {
                "--die-with-parent" => setting.die_with_parent = true,
                "--zygote" => setting.zygote = true,
                "--try-forbidden" => setting.attempts = true,
                _ => {}
            }
            if let Some(mode) = word.strip_prefix("--jail=").and_then(JailMode::of_name) {
                setting.jail.mode = mode;
            }
            if let Some(name) = word.strip_prefix("--without=") {
                setting.jail.without.extend(Layer::ALL.into_iter().filter(|layer| layer.name() == name));
            }
        }
        // It is no way to have VMs without a layer.
        if !setting.attempts {
            setting.jail.without.clear();
        }
        setting
    }
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
    one_arena();
    name(if setting.zygote { c"zygote" } else { c"worker" });
    let control = control_socket().map_err(|e| {
        format!(
            "descriptor {CONTROL_FD} is not a control socket ({e}); workers are started by `coldspark serve`"
        )
    })?;
    if setting.die_with_parent {
        die_with(&control)?;
    }
    // What it said of the panic is among the worker's last words.
    crate::vmm::threads::at_loss(|_| std::process::exit(THREAD_LOST));
    crate::vmm::vcpu::install_stop_signal().map_err(|e| format!("the stop signal: {e}"))?;
    // A worker will be somebody else.
    let owner = rustix::process::geteuid().as_raw();
    let outside = Outside::open();
    let mut shell = Shell::default();
    shell.open(&outside);
    shell.find_pages();
    let mode = setting.jail.mode;
    let jailer = Jailer::new(setting.jail, outside, setting.zygote, shell.needs_userfault_call());
    if setting.zygote {
        // A VM belongs to the process that made it; this one is for the road there.
        shell.rehearse();
        let pid = || jailer.pid().unwrap_or_else(std::process::id);
        if zygote::serve(&control, pid)? == zygote::Side::Zygote {
            return Ok(());
        }
        name(c"worker");
        shell.open(&jailer);
    }
    shell.open_own(&jailer);
    let jail = jailer.close();
    if setting.die_with_parent {
        // A fork's parent is another one; and who becomes another user is a child that nobody is tied to.
        die_with(&control)?;
    }
    if setting.attempts {
        return jail::attempts::serve(&control, &jail);
    }
    let daemon = Daemon(Arc::new(Connection {
        channel: control,
        adoptable: AtomicBool::new(false),
        reset: Mutex::new(None),
    }));
    let ready = jailed(mode, &jail).and_then(|()| {
        shell.prepare();
        shell.ready()
    });
    daemon.event(Event::Hello { ready, jail });
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
            Request::Boot(_)
            | Request::Restore(_)
            | Request::Expect
            | Request::Seat(_)
            | Request::Start
            | Request::Rates(_)
                if vm.is_some() =>
            {
                reply(Err(fault::wrong_state("this worker has its VM already")));
            }
            Request::Keep { orphan_ms } => {
                let kept = match (&vm, &keep) {
                    (None, None) => Keep::new(fds, Duration::from_millis(orphan_ms), owner),
                    _ => Err(fault::wrong_state("too late, or told before")),
                };
                reply(kept.map(|kept| {
                    keep = Some(kept);
                    daemon.0.adoptable.store(true, Ordering::Release);
                    Reply::Done
                }));
            }
            Request::Rates(rates) => {
                shell.limit(rates);
                reply(Ok(Reply::Done));
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
        | Request::Rates(_)
        | Request::Report
        | Request::Expect
        | Request::Seat(_)
        | Request::Start
        | Request::Restore(_)
        | Request::Kill => Err(Fault { kind: FaultKind::Internal, message: "not a request to a VM".into() }),
    }
}

/// Whether this worker may have a VM.
fn jailed(mode: JailMode, jail: &Jail) -> Result<(), Fault> {
    match jail.lacks() {
        Some(lacks) if mode == JailMode::Required => Err(Fault {
            kind: FaultKind::Unsupported,
            message: format!("the jail of workers lacks {lacks}, and --jail required wants all of it"),
        }),
        _ => Ok(()),
    }
}

/// Duplicates a descriptor for sending.
fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
