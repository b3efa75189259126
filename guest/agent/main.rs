//! The coldspark agent for FreeBSD/amd64 guests: speaks the agent protocol (`wire.rs`) over a virtio-console port, or a serial port.
//!
//! A static program without libc or allocation: system calls by number (`sys.rs`), fixed room for everything, one thread
//! that waits in one place. So it needs nothing of the guest but a kernel, and the host builds it with the toolchain that
//! builds itself (`build/agent.rs`). It is started as root; see docs/agent.md.

#![no_std]
#![no_main]
// `&mut *(&raw mut STATIC)` is how a static is borrowed once; what clippy proposes is denied by rustc.
#![allow(clippy::deref_addrof)]

mod accounts;
mod entropy;
#[path = "../freestanding.rs"]
mod freestanding;
mod identity;
mod neighbours;
mod network;
mod port;
#[path = "../testguest/random.rs"]
mod random;
mod serve;
mod six;
mod spawn;
mod streams;
mod sys;
#[path = "../protocol/wire.rs"]
mod wire;

use core::fmt::Write;

use serve::Agent;
use sys::{Path, PollFd};

// The system enters with rdi at the argument count, which the argument pointers follow; and knows by the note which system the
// program is for.
core::arch::global_asm!(
    ".globl _start",
    "_start: xor ebp, ebp",
    "and rsp, -16",
    "call agent_main",
    "ud2",
    ".section .note.tag, \"a\", @note",
    ".balign 4",
    ".long 8, 4, 1",
    ".asciz \"FreeBSD\"",
    ".long 1200086",
    ".text",
);

/// Ports that are tried when none is named.
const PORTS: [&Path; 4] =
    [c"/dev/vtcon/org.coldspark.agent", c"/dev/ttyV0.0", c"/dev/ttyV1.0", c"/dev/ttyV2.0"];

static mut AGENT: Agent = Agent::new();

#[unsafe(no_mangle)]
extern "C" fn agent_main(start: *const usize) -> ! {
    // SAFETY: the count, then so many pointers to strings.
    let named = unsafe { (*start > 1).then(|| Path::from_ptr((*start.add(2)) as *const core::ffi::c_char)) };
    // A command's pipes take these places.
    while let Ok(fd) = sys::open(c"/dev/null", sys::O_RDWR, 0) {
        if fd > 2 {
            sys::close(fd);
            break;
        }
    }
    sys::own_session();
    sys::prepare_signals();
    let Some(port) = open_port(named) else {
        fail(format_args!(
            "there is no such port; for virtio-console, is the driver loaded (kldload virtio_console)?"
        ));
    };
    // SAFETY: the only reference to it.
    let agent = unsafe { &mut *(&raw mut AGENT) };
    agent.pools.begin();
    agent.hello();
    let mut watched = [PollFd { fd: -1, events: 0, revents: 0 }; 1 + streams::WATCHED_MAX];
    loop {
        let mut count = 1;
        let ready = agent.streams.watch(&agent.output, |fd| {
            watched[count] = fd;
            count += 1;
        });
        let mut events = 0;
        if agent.takes_requests() {
            events |= sys::POLLIN;
        }
        if !agent.output.unsent().is_empty() {
            events |= sys::POLLOUT;
        }
        watched[0] = PollFd { fd: port, events, revents: 0 };
        let soon = sys::Time { seconds: 1, nanoseconds: 0 };
        let within = ready.then(sys::Time::default).or(agent.pools.are_closed().then_some(soon));
        sys::poll(&mut watched[..count], within);
        agent.pools.step();
        while let Some((pid, status)) = sys::wait() {
            agent.streams.ended(pid, status);
        }
        if agent.takes_requests() {
            match sys::read(port, agent.input.room()) {
                Ok(0) => fail(format_args!("the port was closed")),
                Ok(count) => agent.input.came(count),
                Err(sys::EAGAIN | sys::EINTR) => {}
                Err(error) => fail(format_args!("reading the port: error {error}")),
            }
        }
        agent.serve();
        agent.streams.step(&mut agent.output);
        while !agent.output.unsent().is_empty() {
            match sys::write(port, agent.output.unsent()) {
                Ok(count) => agent.output.sent(count),
                Err(sys::EINTR) => {}
                Err(sys::EAGAIN) => break,
                Err(error) => fail(format_args!("writing the port: error {error}")),
            }
        }
    }
}

/// The port that was named, or the one that the host names, or the first that there is, as a plain stream of bytes.
fn open_port(named: Option<&Path>) -> Option<i32> {
    let mut value = [0; 64];
    // What KENV_GET writes includes the NUL (sys/kern/kern_environment.c).
    let named = named.or_else(|| sys::kernel_variable(c"coldspark.agent_port", &mut value));
    let flags = sys::O_RDWR | sys::O_NONBLOCK | sys::O_NOCTTY;
    let port = match named {
        Some(path) => sys::open(path, flags, 0).ok()?,
        None => PORTS.iter().find_map(|path| sys::open(path, flags, 0).ok())?,
    };
    if let Err(error) = sys::make_raw(port) {
        fail(format_args!("the port is no terminal: error {error}"));
    }
    Some(port)
}

/// Says why on stderr and ends.
fn fail(why: core::fmt::Arguments) -> ! {
    let _ = writeln!(Stderr, "coldspark-agent: {why}");
    sys::exit(1)
}

struct Stderr;

impl Write for Stderr {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        sys::write(2, text.as_bytes()).map(|_| ()).map_err(|_| core::fmt::Error)
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    fail(format_args!("{info}"))
}
