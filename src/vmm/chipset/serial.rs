//! A 16550A serial port (National Semiconductor PC16550D data sheet), the guest's console.
//!
//! Our own and not vm-superio's, for three things a FreeBSD console leans on and that one lacks: reading IIR clears
//! the transmit interrupt only when IIR reported it; enabling the transmit interrupt while the transmitter is
//! empty raises it at once; and the transmitter can be *busy* (LSR.THRE clear) when nobody takes the output, so
//! that a flood is slowed down and not lost. `hw.broken_txfifo`, which FreeBSD sets for Firecracker, is not needed here.
//!
//! A second port carries the agent's bytes on machines whose kernel has no virtio-console ([`Serial::for_agent`]). It differs in two things:
//! what is written is handed on sooner, whatever it is; and when the guest has seen its FIFO empty, nothing new is received for as long as it
//! took to get there, nor while it has dropped RTS. FreeBSD's interrupt handler throws away what a FIFO still holds when its buffer of 384 bytes
//! is full, which a thread empties that runs when no interrupt is pending; it drops RTS when its terminal's queue is full
//! (sys/dev/uart/uart_dev_ns8250.c, uart_tty.c). A port that is filled as fast as it is read loses bytes.
//!
//! Output goes to the console by lines: a kernel prints a byte at a time, and each one that is handed on by itself wakes everybody between
//! it and the reader's screen, which made up most of a FreeBSD's boot. What has no line's end is handed on after [`LINGER`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::snapshot::state::chipset::SerialState;
use crate::vmm::irq::Interrupt;

/// Depth of the receive FIFO (data sheet, section 8.6).
const RECEIVE_FIFO_BYTES: usize = 16;
/// Output waiting for the console at which the transmitter reports busy.
const TRANSMIT_BUSY_BYTES: usize = 16 << 10;
/// Output at which bytes written in spite of a busy transmitter are dropped, as the real chip overwrites them.
const TRANSMIT_BYTES_MAX: usize = 64 << 10;

/// Output that is handed on though its line has no end yet.
const LINE_BYTES_MAX: usize = 256;
/// How long output waits for the end of its line: longer than a kernel takes for the rest of it, shorter than anybody notices.
const LINGER: Duration = Duration::from_millis(1);
/// The same for the agent's port, where somebody waits for the answer. A byte takes a guest some microseconds.
const AGENT_LINGER: Duration = Duration::from_micros(100);

/// Rest of the guest between two fillings of the agent's port: this, or as long as it took to empty it, but not longer than that.
const REST_MIN: Duration = Duration::from_micros(50);
const REST_MAX: Duration = Duration::from_millis(100);

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMIT_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_FIFO_ENABLED: u8 = 0xc0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
const LCR_DIVISOR_LATCH: u8 = 1 << 7;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_RTS: u8 = 1 << 1;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMIT_EMPTY: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;
/// DCD, DSR and CTS: a terminal is there.
const MSR_TERMINAL: u8 = 0xb0;

struct Registers {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    /// The transmitter became empty and IIR has not told so yet.
    transmit_interrupt: bool,
    /// Modem lines that changed since MSR was read (low four bits of MSR).
    modem_delta: u8,
    receive: VecDeque<u8>,
    transmit: VecDeque<u8>,
    /// Interrupt sources active at the last look, to see new ones come.
    active: u8,
    /// The other end of the console is gone; output is discarded.
    closed: bool,
    /// The console takes no more at the moment.
    blocked: bool,
    /// The agent's port: runs out at the end of a rest.
    rest: Option<TimerFd>,
    /// The agent's port: when it was filled last, until the guest has had its rest after that.
    filled: Option<Instant>,
    /// The rest has begun.
    rests: bool,
    /// The linger timer runs.
    lingers: bool,
    linger: TimerFd,
}

/// The serial port. Ports are touched by vCPU threads, the console socket by the device thread and, for output, by
/// the vCPU thread that wrote.
pub struct Serial {
    registers: Mutex<Registers>,
    console: UnixStream,
    interrupt: Arc<dyn Interrupt>,
    /// Tells the device thread that its interest in the console socket may have changed.
    interest_changed: EventFd,
    /// When the guest wrote its first byte.
    first_output: OnceLock<Instant>,
}

/// What the device thread should watch the console socket for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    pub readable: bool,
    pub writable: bool,
}

impl Serial {
    /// A port in its state after reset. `console` must be non-blocking; `interest_changed` is written when
    /// [`Serial::interest`] may answer differently. Fails if the host has no descriptor left.
    pub fn new(
        console: UnixStream,
        interrupt: Arc<dyn Interrupt>,
        interest_changed: EventFd,
    ) -> Result<Self, errno::Error> {
        Self::with_rest(console, interrupt, interest_changed, None)
    }

    /// A port that the agent talks through.
    pub fn for_agent(
        agent: UnixStream,
        interrupt: Arc<dyn Interrupt>,
        interest_changed: EventFd,
    ) -> Result<Self, errno::Error> {
        Self::with_rest(agent, interrupt, interest_changed, Some(TimerFd::new()?))
    }

    fn with_rest(
        console: UnixStream,
        interrupt: Arc<dyn Interrupt>,
        interest_changed: EventFd,
        rest: Option<TimerFd>,
    ) -> Result<Self, errno::Error> {
        let registers = Registers {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0x03,
            modem_control: 0,
            scratch: 0,
            // 115200 baud, as the loader would have left it.
            divisor: 1,
            overrun: false,
            transmit_interrupt: false,
            modem_delta: 0,
            receive: VecDeque::new(),
            transmit: VecDeque::new(),
            active: 0,
            closed: false,
            blocked: false,
            rest,
            filled: None,
            rests: false,
            lingers: false,
            linger: TimerFd::new()?,
        };
        Ok(Serial {
            registers: Mutex::new(registers),
            console,
            interrupt,
            interest_changed,
            first_output: OnceLock::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the guest wrote its first byte, if it has.
    pub fn first_output(&self) -> Option<Instant> {
        self.first_output.get().copied()
    }

    /// The console socket, for the device thread's epoll.
    pub fn console(&self) -> &UnixStream {
        &self.console
    }

    /// Readable when [`Serial::lingered`] is to be called. For the device thread's epoll.
    pub fn linger_fd(&self) -> RawFd {
        self.lock().linger.as_raw_fd()
    }

    /// Readable when [`Serial::rested`] is to be called; an agent's port has one. For the device thread's epoll.
    pub fn rest_fd(&self) -> Option<RawFd> {
        self.lock().rest.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// What to watch the console socket for now.
    pub fn interest(&self) -> Interest {
        let r = self.lock();
        Interest { readable: !r.closed && r.may_receive() > 0, writable: !r.closed && r.blocked }
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&self, offset: u16) -> u8 {
        let mut r = self.lock();
        let latch = r.line_control & LCR_DIVISOR_LATCH != 0;
        let value = match offset {
            0 if latch => r.divisor as u8,
            0 => {
                let could = r.may_receive() > 0;
                let byte = r.receive.pop_front().unwrap_or(0);
                if !could && r.may_receive() > 0 {
                    self.wake();
                }
                byte
            }
            1 if latch => (r.divisor >> 8) as u8,
            1 => r.interrupt_enable,
            2 => {
                r.seen_empty();
                let identity = r.identification();
                if identity == IIR_TRANSMIT_EMPTY {
                    r.transmit_interrupt = false;
                }
                identity | if r.fifo_control & FCR_ENABLE != 0 { IIR_FIFO_ENABLED } else { 0 }
            }
            3 => r.line_control,
            4 => r.modem_control,
            5 => {
                let status = r.line_status();
                r.overrun = false;
                r.seen_empty();
                status
            }
            6 => {
                let status = r.modem_status() | r.modem_delta;
                r.modem_delta = 0;
                status
            }
            7 => r.scratch,
            _ => 0xff,
        };
        self.update(&mut r);
        value
    }

    /// Writes register `offset` (0 to 7).
    pub fn write(&self, offset: u16, value: u8) {
        let mut r = self.lock();
        let latch = r.line_control & LCR_DIVISOR_LATCH != 0;
        match offset {
            0 if latch => r.divisor = (r.divisor & 0xff00) | u16::from(value),
            0 => self.transmit(&mut r, value),
            1 if latch => r.divisor = (r.divisor & 0x00ff) | (u16::from(value) << 8),
            1 => {
                let enabled = value & !r.interrupt_enable;
                r.interrupt_enable = value & 0x0f;
                if enabled & IER_TRANSMIT_EMPTY != 0 && !r.busy() {
                    r.transmit_interrupt = true;
                }
            }
            2 => {
                // Switching the FIFO on or off clears it, as the data sheet has it.
                if value & FCR_CLEAR_RECEIVE != 0 || (value ^ r.fifo_control) & FCR_ENABLE != 0 {
                    r.receive.clear();
                    r.rested();
                    self.wake();
                }
                r.fifo_control = value & 0xc9;
            }
            3 => r.line_control = value,
            4 => {
                let before = r.modem_status();
                r.modem_control = value & 0x1f;
                let changed = before ^ r.modem_status();
                r.modem_delta |= changed >> 4;
                // RTS may be there again, or the line.
                self.wake();
            }
            7 => r.scratch = value,
            // LSR and MSR are read-only.
            _ => {}
        }
        self.update(&mut r);
    }

    fn transmit(&self, r: &mut Registers, value: u8) {
        r.transmit_interrupt = false;
        if r.modem_control & MCR_LOOPBACK != 0 {
            if r.receive.len() >= r.receive_depth() {
                r.overrun = true;
            } else {
                r.receive.push_back(value);
            }
        } else if !r.closed && r.transmit.len() < TRANSMIT_BYTES_MAX {
            self.first_output.get_or_init(Instant::now);
            r.transmit.push_back(value);
            // With a backlog the device thread is already waiting for the socket.
            if !r.blocked {
                let whole = value == b'\n' && r.rest.is_none();
                if whole || r.transmit.len() >= LINE_BYTES_MAX {
                    self.drain(r);
                } else if !r.lingers {
                    // A timer that cannot be set: as if it had run out.
                    r.lingers =
                        r.linger.reset(if r.rest.is_some() { AGENT_LINGER } else { LINGER }, None).is_ok();
                    if !r.lingers {
                        self.drain(r);
                    }
                }
                if r.blocked {
                    self.wake();
                }
            }
        }
        if !r.busy() {
            r.transmit_interrupt = true;
        }
    }

    /// Hands as much output to the console as it takes.
    fn drain(&self, r: &mut Registers) {
        r.blocked = false;
        while !r.transmit.is_empty() {
            let (front, _) = r.transmit.as_slices();
            match (&self.console).write(front) {
                Ok(written) if written > 0 => drop(r.transmit.drain(..written)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) => return r.blocked = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return r.blocked = true,
                Err(_) => {
                    r.closed = true;
                    r.transmit.clear();
                }
            }
        }
    }

    /// The device thread: the console socket is readable.
    pub fn console_readable(&self) {
        let mut r = self.lock();
        let mut bytes = [0u8; RECEIVE_FIFO_BYTES];
        let room = r.may_receive().min(bytes.len());
        if room == 0 {
            return;
        }
        match (&self.console).read(&mut bytes[..room]) {
            Ok(0) => r.closed = true,
            Ok(count) => {
                r.receive.extend(&bytes[..count]);
                r.filled = r.rest.is_some().then(Instant::now);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => r.closed = true,
        }
        if r.closed {
            r.transmit.clear();
            r.blocked = false;
        }
        self.update(&mut r);
    }

    /// The device thread: output has waited long enough for the end of its line.
    pub fn lingered(&self) {
        let mut r = self.lock();
        r.lingers = false;
        // Makes it unreadable. That fails only for times that make no sense.
        let _ = r.linger.clear();
        drop(r);
        self.console_writable();
    }

    /// The device thread: the guest has had its rest.
    pub fn rested(&self) {
        self.lock().rested();
    }

    /// The device thread: the console socket takes output again, or output is to go now.
    pub fn console_writable(&self) {
        let mut r = self.lock();
        let was_busy = r.busy();
        self.drain(&mut r);
        if was_busy && !r.busy() {
            r.transmit_interrupt = true;
        }
        self.update(&mut r);
    }

    /// Hands the rest of the output to the console, waiting for it up to `limit`: for a guest that ends.
    #[allow(unsafe_code)]
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            {
                let mut r = self.lock();
                self.drain(&mut r);
                if r.transmit.is_empty() {
                    return;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut poll = libc::pollfd { fd: self.console.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
            let left_ms = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX);
            // SAFETY: one valid pollfd, which lives through the call.
            if left.is_zero() || unsafe { libc::poll(&mut poll, 1, left_ms) } == 0 {
                return;
            }
        }
    }

    /// Raises the line if an interrupt source has become active. Also when another one already held it: an extra
    /// edge costs the guest one look at IIR, a missing one hangs it.
    fn update(&self, r: &mut Registers) {
        let active = r.sources();
        if active & !r.active != 0 {
            self.interrupt.raise();
        }
        r.active = active;
    }

    fn wake(&self) {
        // The counter of an eventfd saturates; a full one has woken the thread already.
        let _ = self.interest_changed.write(1);
    }

    /// What the guest's port holds.
    pub fn save(&self) -> SerialState {
        let r = self.lock();
        SerialState {
            interrupt_enable: r.interrupt_enable,
            fifo_control: r.fifo_control,
            line_control: r.line_control,
            modem_control: r.modem_control,
            scratch: r.scratch,
            divisor: r.divisor,
            overrun: r.overrun,
            // A clone's transmitter is empty (below): a guest that waits for room is told so there.
            transmit_interrupt: r.transmit_interrupt || r.busy(),
            modem_delta: r.modem_delta,
            receive: r.receive.iter().copied().collect(),
            // What the source's console has not taken yet is the source's to print, not every clone's.
            transmit: Vec::new(),
        }
    }

    /// Takes on a saved state. Lengths beyond what the port can hold are cut: they can only come from a forged file.
    pub fn restore(&self, state: &SerialState) {
        let mut r = self.lock();
        r.interrupt_enable = state.interrupt_enable & 0x0f;
        r.fifo_control = state.fifo_control & 0xc9;
        r.line_control = state.line_control;
        r.modem_control = state.modem_control & 0x1f;
        r.scratch = state.scratch;
        r.divisor = state.divisor;
        r.overrun = state.overrun;
        r.transmit_interrupt = state.transmit_interrupt;
        r.modem_delta = state.modem_delta & 0x0f;
        r.receive = state.receive.iter().copied().take(RECEIVE_FIFO_BYTES).collect();
        r.transmit = state.transmit.iter().copied().take(TRANSMIT_BYTES_MAX).collect();
        r.rested();
        r.filled = (r.rest.is_some() && !r.receive.is_empty()).then(Instant::now);
        // The edge for most of these was raised before the snapshot, and is in the IOAPIC's or a LAPIC's state; the one for
        // a transmitter that was busy was not.
        r.active = 0;
        self.update(&mut r);
    }
}

// === impl Registers ===

impl Registers {
    fn receive_depth(&self) -> usize {
        if self.fifo_control & FCR_ENABLE != 0 { RECEIVE_FIFO_BYTES } else { 1 }
    }

    /// Bytes the device thread may put in now.
    fn may_receive(&self) -> usize {
        match self.rest.is_some() && (self.filled.is_some() || self.modem_control & MCR_RTS == 0) {
            true => 0,
            false => self.receive_room(),
        }
    }

    /// The guest reads LSR or IIR: if it sees there that it has taken all, its rest begins.
    fn seen_empty(&mut self) {
        let (Some(rest), Some(filled), false) = (&mut self.rest, self.filled, self.rests) else { return };
        if self.receive.is_empty() {
            let time = filled.elapsed().clamp(REST_MIN, REST_MAX);
            // A timer that cannot be set has run out.
            self.rests = rest.reset(time, None).is_ok();
            if !self.rests {
                self.filled = None;
            }
        }
    }

    /// The rest is over.
    fn rested(&mut self) {
        if let Some(rest) = &mut self.rest {
            // Makes it unreadable. That fails only for times that make no sense.
            let _ = rest.clear();
        }
        self.rests = false;
        self.filled = None;
    }

    /// Bytes the console may put in now. None in loopback: the line is disconnected.
    fn receive_room(&self) -> usize {
        if self.modem_control & MCR_LOOPBACK != 0 {
            return 0;
        }
        self.receive_depth().saturating_sub(self.receive.len())
    }

    fn busy(&self) -> bool {
        self.transmit.len() >= TRANSMIT_BUSY_BYTES
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.receive.is_empty() {
            status |= LSR_DATA_READY;
        }
        if self.overrun {
            status |= LSR_OVERRUN;
        }
        if !self.busy() {
            status |= LSR_TRANSMIT_EMPTY | LSR_IDLE;
        }
        status
    }

    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOPBACK == 0 {
            return MSR_TERMINAL;
        }
        // In loopback RTS, DTR, OUT1, OUT2 come back as CTS, DSR, RI, DCD.
        let mcr = self.modem_control;
        (mcr & 0x02) << 3 | (mcr & 0x01) << 5 | (mcr & 0x04) << 4 | (mcr & 0x08) << 4
    }

    /// Active interrupt sources, as IER bits.
    fn sources(&self) -> u8 {
        let mut sources = 0;
        if !self.receive.is_empty() {
            sources |= IER_RECEIVED;
        }
        if self.transmit_interrupt {
            sources |= IER_TRANSMIT_EMPTY;
        }
        if self.overrun {
            sources |= IER_LINE_STATUS;
        }
        if self.modem_delta != 0 {
            sources |= IER_MODEM_STATUS;
        }
        sources & self.interrupt_enable
    }

    fn identification(&self) -> u8 {
        let sources = self.sources();
        if sources & IER_LINE_STATUS != 0 {
            IIR_LINE_STATUS
        } else if sources & IER_RECEIVED != 0 {
            IIR_RECEIVED
        } else if sources & IER_TRANSMIT_EMPTY != 0 {
            IIR_TRANSMIT_EMPTY
        } else if sources & IER_MODEM_STATUS != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);
    impl Interrupt for Count {
        fn raise(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn port() -> (Serial, UnixStream, Arc<Count>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let count = Arc::new(Count::default());
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Serial::new(ours, count.clone(), wake).unwrap(), theirs, count)
    }

    #[test]
    fn enabling_the_transmit_interrupt_on_an_empty_port_raises_it_and_only_iir_that_tells_it_clears_it() {
        let (port, mut console, raised) = port();
        port.write(2, FCR_ENABLE);
        port.write(1, IER_TRANSMIT_EMPTY | IER_RECEIVED);
        assert_eq!(raised.0.load(Ordering::SeqCst), 1);
        console.write_all(b"x").unwrap();
        port.console_readable();
        assert_eq!(port.read(2) & 0x0f, IIR_RECEIVED, "the received byte is told first");
        assert_eq!(port.read(0), b'x');
        assert_eq!(port.read(2) & 0x0f, IIR_TRANSMIT_EMPTY, "and the transmit interrupt was not lost");
        assert_eq!(port.read(2) & 0x0f, IIR_NONE);
        port.write(0, b'y');
        assert_eq!(port.read(2) & 0x0f, IIR_TRANSMIT_EMPTY);
    }

    #[test]
    fn an_agents_port_gives_the_guest_a_rest_and_heeds_rts() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let told = wake.try_clone().unwrap();
        let port = Serial::for_agent(ours, Arc::new(Count::default()), wake).unwrap();
        port.write(2, FCR_ENABLE);
        let sent: Vec<u8> = (0..100).collect();
        agent.write_all(&sent).unwrap();
        assert!(!port.interest().readable, "the guest has not raised RTS");
        let _ = told.read();
        port.write(4, MCR_RTS);
        assert!(told.read().is_ok() && port.interest().readable);
        let mut got = Vec::new();
        let mut fills = 0;
        while got.len() < sent.len() {
            port.console_readable();
            fills += 1;
            let mut in_fifo = 0;
            while port.read(5) & LSR_DATA_READY != 0 {
                // As fast as the guest reads, nothing comes behind it.
                got.push(port.read(0));
                port.console_readable();
                in_fifo += 1;
            }
            assert!(in_fifo <= RECEIVE_FIFO_BYTES);
            assert!(!port.interest().readable, "the guest has no rest");
            // The timer runs out.
            let mut rest = libc::pollfd { fd: port.rest_fd().unwrap(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd, which lives through the call.
            assert_eq!(unsafe { libc::poll(&mut rest, 1, 10_000) }, 1);
            port.rested();
        }
        assert_eq!((got, fills), (sent, 7));
        agent.write_all(b"more").unwrap();
        port.write(4, 0);
        port.console_readable();
        assert_eq!(port.read(5) & LSR_DATA_READY, 0, "RTS is down");
        port.write(4, MCR_RTS);
        port.console_readable();
        assert_eq!(port.read(0), b'm');
        // A clone's FIFO holds what was in the source's, and is filled when that has been read.
        let saved = port.save();
        port.restore(&saved);
        assert!(!port.interest().readable);
    }

    #[test]
    fn a_flood_makes_the_transmitter_busy_and_loses_nothing() {
        let (port, mut console, _) = port();
        let mut sent = Vec::new();
        let mut n = 0u32;
        while port.read(5) & LSR_TRANSMIT_EMPTY != 0 {
            let byte = (n % 251) as u8;
            port.write(0, byte);
            sent.push(byte);
            n += 1;
            assert!(n < 64 << 20, "the transmitter never got busy");
        }
        let mut got = Vec::new();
        while got.len() < sent.len() {
            let mut chunk = [0u8; 65536];
            match console.read(&mut chunk) {
                Ok(count) => got.extend_from_slice(&chunk[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => port.console_writable(),
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!(got, sent);
        assert_ne!(port.read(5) & LSR_TRANSMIT_EMPTY, 0);
    }

    #[test]
    fn output_goes_by_lines_and_what_is_no_line_after_a_moment() {
        let (port, mut console, _) = port();
        let print = |bytes: &[u8]| bytes.iter().for_each(|byte| port.write(0, *byte));
        let mut taken = [0u8; 1024];
        print(b"a li");
        assert_eq!(console.read(&mut taken).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        print(b"ne\nlogin: ");
        assert_eq!(console.read(&mut taken).unwrap(), 7);
        let mut poll = libc::pollfd { fd: port.linger_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, which lives through the call.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 60_000) }, 1);
        port.lingered();
        let count = console.read(&mut taken).unwrap();
        assert_eq!(&taken[..count], b"login: ");
        // And again, and what is too long for a line.
        print(&[b'x'; LINE_BYTES_MAX + 3]);
        assert_eq!(console.read(&mut taken).unwrap(), LINE_BYTES_MAX);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 60_000) }, 1);
        port.lingered();
        assert_eq!(console.read(&mut taken).unwrap(), 3);
        // Nothing waits: the timer stands.
        // SAFETY: as above.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 0) }, 0);
    }

    #[test]
    fn input_waits_in_the_socket_while_the_fifo_is_full() {
        let (port, mut console, _) = port();
        port.write(2, FCR_ENABLE);
        let line: Vec<u8> = (0..100).collect();
        console.write_all(&line).unwrap();
        let mut got = Vec::new();
        while got.len() < line.len() {
            if port.interest().readable {
                port.console_readable();
            }
            assert_eq!(port.read(5) & LSR_OVERRUN, 0);
            while port.read(5) & LSR_DATA_READY != 0 {
                got.push(port.read(0));
            }
        }
        assert_eq!(got, line);
    }

    #[test]
    fn loopback_holds_sixteen_bytes_then_overruns() {
        let (port, mut console, _) = port();
        port.write(2, FCR_ENABLE);
        port.write(4, MCR_LOOPBACK);
        let mut count = 0;
        while port.read(5) & LSR_OVERRUN == 0 {
            port.write(0, count);
            count += 1;
            assert!(count < 64);
        }
        assert_eq!(count, 17);
        for n in 0..16 {
            assert_eq!(port.read(0), n);
        }
        assert!(console.read(&mut [0; 8]).is_err(), "nothing left the port");
    }

    #[test]
    fn a_console_that_is_gone_does_not_stop_the_guest() {
        let (port, console, _) = port();
        drop(console);
        for _ in 0..200_000 {
            port.write(0, b'.');
        }
        assert_ne!(port.read(5) & LSR_TRANSMIT_EMPTY, 0);
        assert_eq!(port.interest(), Interest { readable: false, writable: false });
    }

    #[test]
    fn a_guest_that_waited_for_a_busy_transmitter_goes_on_in_a_clone() {
        let (port, _console, raised) = port();
        port.write(2, FCR_ENABLE);
        port.write(1, IER_TRANSMIT_EMPTY);
        while port.read(5) & LSR_TRANSMIT_EMPTY != 0 {
            port.write(0, b'.');
        }
        assert_eq!(port.read(2) & 0x0f, IIR_NONE, "the guest waits for the interrupt");
        let before = raised.0.load(Ordering::SeqCst);
        let (clone, _clone_console, raised_in_clone) = self::port();
        clone.restore(&port.save());
        assert_eq!(raised_in_clone.0.load(Ordering::SeqCst), 1);
        assert_ne!(clone.read(5) & LSR_TRANSMIT_EMPTY, 0);
        assert_eq!(clone.read(2) & 0x0f, IIR_TRANSMIT_EMPTY);
        assert_eq!(raised.0.load(Ordering::SeqCst), before, "the source still waits");
        assert_eq!(port.read(2) & 0x0f, IIR_NONE);
    }

    #[test]
    fn state_survives_the_round_trip() {
        let (port, mut console, _) = port();
        port.write(2, FCR_ENABLE);
        port.write(1, 0x03);
        console.write_all(b"abc").unwrap();
        port.console_readable();
        let state = port.save();
        let (other, _console, _) = self::port();
        other.restore(&state);
        assert_eq!(other.save(), state);
        assert_eq!(other.read(0), b'a');
    }
}
