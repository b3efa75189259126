//! Port input and output, the serial console on it (16550 at 0x3F8, polled), and the agent's serial port (at 0x2F8), if it has one.

use core::arch::asm;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const DATA: u16 = 0x3f8;
const AGENT_DATA: u16 = 0x2f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO_BYTES: u8 = 16;
/// A transmitter that is not empty after so many looks is ignored; a receiver is given up. Each look is an exit, so this
/// takes seconds, more than a busy host lets a console wait.
const LOOKS_MAX: u32 = 5_000_000;

pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: the TSS opens the ports; port output changes no memory of ours.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as in `out8`.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) }
    value
}

/// 8 data bits, FIFO on.
pub(crate) fn init() {
    out8(LINE_CONTROL, 3);
    out8(FIFO_CONTROL, 1);
}

/// Prints bytes as they are. Status is read once for each FIFO's worth: every access costs an exit.
pub(crate) fn write(bytes: &[u8]) {
    static ROOM: AtomicU8 = AtomicU8::new(0);
    for byte in bytes {
        let mut room = ROOM.load(Ordering::Relaxed);
        if room == 0 {
            for _ in 0..LOOKS_MAX {
                if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                    break;
                }
            }
            room = FIFO_BYTES;
        }
        out8(DATA, *byte);
        ROOM.store(room - 1, Ordering::Relaxed);
    }
}

/// Has the console's port ask for an interrupt, as its transmitter is empty.
pub(crate) fn ask_for_interrupt() {
    const INTERRUPT_ENABLE: u16 = DATA + 1;
    out8(INTERRUPT_ENABLE, 0x02);
    out8(INTERRUPT_ENABLE, 0);
}

/// The next byte that was typed; `None` if none comes for a long time.
pub(crate) fn read() -> Option<u8> {
    (0..LOOKS_MAX).any(|_| in8(LINE_STATUS) & DATA_READY != 0).then(|| in8(DATA))
}

/// COM2, which carries the agent protocol on a machine without virtio-console.
pub(crate) struct AgentPort;

impl AgentPort {
    const MODEM_CONTROL: u16 = AGENT_DATA + 4;
    const SCRATCH: u16 = AGENT_DATA + 7;
    /// DTR and RTS: bytes may come.
    const OPEN: u8 = 0x03;

    /// If there is such a port: its scratch register keeps what is written.
    pub(crate) fn find() -> Option<AgentPort> {
        for byte in [0x5a, 0xa5] {
            out8(Self::SCRATCH, byte);
            if in8(Self::SCRATCH) != byte {
                return None;
            }
        }
        out8(AGENT_DATA + 3, 3);
        out8(AGENT_DATA + 2, 1);
        out8(Self::MODEM_CONTROL, Self::OPEN);
        Some(AgentPort)
    }

    pub(crate) fn has_bytes(&self) -> bool {
        in8(AGENT_DATA + 5) & DATA_READY != 0
    }

    /// Fills `out`, looking until there is enough.
    pub(crate) fn read(&mut self, out: &mut [u8]) {
        for byte in out {
            while !self.has_bytes() {
                core::hint::spin_loop();
            }
            *byte = in8(AGENT_DATA);
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(FIFO_BYTES.into()) {
            while in8(AGENT_DATA + 5) & TRANSMITTER_EMPTY == 0 {
                core::hint::spin_loop();
            }
            piece.iter().for_each(|byte| out8(AGENT_DATA, *byte));
        }
    }
}

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// Prints one line.
pub(crate) fn line(arguments: fmt::Arguments) {
    static BUSY: AtomicBool = AtomicBool::new(false);
    // Another CPU's line ends soon; if this CPU failed inside its own line, go on after a while.
    for _ in 0..1_000_000 {
        if !BUSY.swap(true, Ordering::Acquire) {
            break;
        }
        core::hint::spin_loop();
    }
    let _ = Console.write_fmt(arguments);
    write(b"\r\n");
    BUSY.store(false, Ordering::Release);
}

macro_rules! say {
    ($($argument:tt)*) => { $crate::serial::line(format_args!($($argument)*)) };
}
pub(crate) use say;
