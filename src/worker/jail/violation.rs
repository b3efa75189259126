//! What happens when a filter catches a system call: the worker says which, and ends by SIGSYS.
//!
//! The handler runs in a process that may be an intruder's: that does not matter, the call was not made, no handler can be put in its place
//! (rt_sigaction(2) is not allowed), and a SIGSYS that finds itself blocked kills.
//! Facts: sigaction(2), SYS_SECCOMP; arch/x86 `struct sigcontext`.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::mem;
use std::ptr;

use libc::{c_int, c_long, c_void};

use super::names;
use crate::vmm::threads::Role;

/// Index of `si_syscall` in a siginfo_t seen as 32-bit integers: signal, error, code, padding, the address (two), the call.
const SI_SYSCALL: usize = 6;
/// Longest line.
const LINE_BYTES_MAX: usize = 256;
/// The number of no system call: the filters catch it like any other that they do not know.
const NO_CALL: c_long = 0x7fff_ffff;

thread_local! {
    /// `None`: the one that takes requests.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// What this thread is, for the log.
pub fn is(role: Role) {
    ROLE.set(Some(role));
}

/// Puts the handler into its place, for this process and its forks.
pub fn install() -> io::Result<()> {
    // SAFETY: a sigaction of zeros is a valid value.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = handler as *const () as usize;
    // SAFETY: `action` outlives the call, and the handler does only what a signal handler may.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn handler(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole siginfo_t, which is larger, and so aligned.
    let call = unsafe { info.cast::<c_int>().add(SI_SYSCALL).read() };
    // SAFETY: and a ucontext_t, with the registers as they were.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: c_int| registers[register as usize].cast_unsigned();
    let arguments = [argument(libc::REG_RDI), argument(libc::REG_RSI), argument(libc::REG_RDX)];
    let line = Line::of(ROLE.get(), call.into(), arguments);
    // SAFETY: the bytes are there. Where they go, or whether, makes no difference.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
    // SAFETY: no such call. SIGSYS is blocked here, so its next one has its default: the process ends.
    unsafe { libc::syscall(NO_CALL) };
    // SAFETY: there is no filter after all; this ends it, too.
    unsafe { libc::_exit(128 + libc::SIGSYS) }
}

/// A line of text, made without an allocation.
struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    length: usize,
}

impl Line {
    fn of(role: Option<Role>, call: c_long, arguments: [u64; 3]) -> Self {
        let mut line = Line { bytes: [0; LINE_BYTES_MAX], length: 0 };
        line.text("seccomp: system call ");
        line.number(call.unsigned_abs(), 10);
        line.text(" (");
        line.text(names::of(call));
        for argument in arguments {
            line.text(" 0x");
            line.number(argument, 16);
        }
        line.text(") is not for ");
        line.text(match role {
            None => "a worker",
            Some(Role::Vcpu) => "a vCPU's thread",
            Some(Role::Devices) => "the device thread",
            Some(Role::Disk) => "a disk thread",
        });
        line.text("\n");
        line
    }

    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, number: u64, base: u64) {
        if number >= base {
            self.number(number / base, base);
        }
        if let Some(digit) = char::from_digit((number % base) as u32, 16) {
            self.text(digit.encode_utf8(&mut [0; 4]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_named() {
        let line = Line::of(Some(Role::Vcpu), libc::SYS_socket, [2, 0x80001, 0]);
        assert_eq!(
            std::str::from_utf8(&line.bytes[..line.length]).unwrap(),
            "seccomp: system call 41 (socket 0x2 0x80001 0x0) is not for a vCPU's thread\n"
        );
        let line = Line::of(None, 4096, [u64::MAX; 3]);
        let text = std::str::from_utf8(&line.bytes[..line.length]).unwrap();
        assert!(text.contains(" 4096 (? 0xffffffffffffffff") && text.ends_with("a worker\n"), "{text}");
    }
}
