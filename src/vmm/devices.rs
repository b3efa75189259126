//! The device thread: it works on virtqueues, moves console bytes and lets the interval timer tick, so that no vCPU
//! thread ever does I/O.
//!
//! One epoll set. What each device wants to watch may change with every event, so its interest is read again after
//! each event of it. A pause stops the thread between two events, after every device has waited for what it began (disk
//! requests are carried out by threads of their own): nothing is in flight then.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{SharedBus, lock};
use super::threads::{self, Role};
use super::virtio::HostInterest;

/// Events taken in one wait.
const EVENTS_AT_ONCE: usize = 32;

enum Command {
    /// Answered when the thread stands still; it then waits for `Resume`.
    Pause(SyncSender<()>),
    Resume,
    Quit,
}

/// Why the device thread cannot be started or told something.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error("the device thread cannot be started: {0}; raise the process and descriptor limits")]
    Start(io::Error),
    #[error("the device thread is gone")]
    Gone,
}

/// The running thread.
pub struct DeviceThread {
    commands: Sender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts the thread, standing still. `serial_changed` is readable when the serial port's interest may have changed.
    pub fn start(bus: SharedBus, serial_changed: EventFd) -> Result<Self, DevicesError> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(DevicesError::Start)?;
        let (commands, receiver) = mpsc::channel();
        let mut worker = Worker {
            epoll: Epoll::new().map_err(DevicesError::Start)?,
            watched: HashMap::new(),
            serial_changed,
            wake: wake.try_clone().map_err(DevicesError::Start)?,
            bus,
        };
        worker.watch_fixed().map_err(DevicesError::Start)?;
        let thread = thread::Builder::new()
            .name("devices".into())
            .spawn(move || {
                let _alive = threads::begin(Role::Devices);
                worker.serve(&receiver);
            })
            .map_err(DevicesError::Start)?;
        Ok(DeviceThread { commands, wake, thread: Some(thread) })
    }

    fn send(&self, command: Command) -> Result<(), DevicesError> {
        self.commands.send(command).map_err(|_| DevicesError::Gone)?;
        // Fails only if the counter is full: woken already.
        let _ = self.wake.write(1);
        Ok(())
    }

    /// Lets devices work.
    pub fn resume(&self) -> Result<(), DevicesError> {
        self.send(Command::Resume)
    }

    /// Returns when no device works any more.
    pub fn pause(&self) -> Result<(), DevicesError> {
        let (done, wait) = mpsc::sync_channel(1);
        self.send(Command::Pause(done))?;
        wait.recv().map_err(|_| DevicesError::Gone)
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let _ = self.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whose descriptor an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Wake,
    SerialChanged,
    Timer,
    /// COM1 is 0, COM2 1.
    Serial(usize),
    SerialLinger(usize),
    SerialRest(usize),
    Virtio(usize),
}

struct Watched {
    source: Source,
    readable: bool,
    writable: bool,
}

struct Worker {
    epoll: Epoll,
    watched: HashMap<RawFd, Watched>,
    serial_changed: EventFd,
    wake: EventFd,
    bus: SharedBus,
}

impl Worker {
    fn watch_fixed(&mut self) -> io::Result<()> {
        let timer = self.bus.chipset.timer_fd();
        for (fd, source) in [
            (self.wake.as_raw_fd(), Source::Wake),
            (self.serial_changed.as_raw_fd(), Source::SerialChanged),
            (timer, Source::Timer),
        ] {
            self.watch(source, &[HostInterest { fd, readable: true, writable: false }])?;
        }
        let bus = self.bus.clone();
        for (port, serial) in bus.chipset.serial_ports().enumerate() {
            let fd = serial.linger_fd();
            self.watch(Source::SerialLinger(port), &[HostInterest { fd, readable: true, writable: false }])?;
            if let Some(fd) = serial.rest_fd() {
                self.watch(
                    Source::SerialRest(port),
                    &[HostInterest { fd, readable: true, writable: false }],
                )?;
            }
        }
        Ok(())
    }

    fn serve(&mut self, commands: &Receiver<Command>) {
        // Started standing still.
        if !self.stand(commands) {
            return;
        }
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the device thread cannot wait any more; the VM's devices are dead");
                    return;
                }
            };
            for event in &events[..count] {
                let fd = event.fd();
                let Some(source) = self.watched.get(&fd).map(|watched| watched.source) else {
                    continue;
                };
                if source == Source::Wake {
                    let _ = self.wake.read();
                    while let Ok(command) = commands.try_recv() {
                        match command {
                            Command::Pause(done) => {
                                for device in &self.bus.virtio {
                                    lock(device).quiesce(&self.bus.memory);
                                }
                                // A line that the guest has begun is the source's to print, not every clone's.
                                self.bus.chipset.serial_ports().for_each(|port| port.console_writable());
                                let _ = done.send(());
                                if !self.stand(commands) {
                                    return;
                                }
                            }
                            Command::Resume => {}
                            Command::Quit => return,
                        }
                    }
                } else {
                    self.handle(source, fd, event.event_set());
                }
            }
        }
    }

    /// Waits for the command to go on; false: to end.
    fn stand(&mut self, commands: &Receiver<Command>) -> bool {
        loop {
            match commands.recv() {
                Ok(Command::Resume) => break,
                Ok(Command::Pause(done)) => drop(done.send(())),
                Ok(Command::Quit) | Err(_) => return false,
            }
        }
        // A state may have been set while standing.
        self.refresh_serial();
        for slot in 0..self.bus.virtio.len() {
            self.refresh(Source::Virtio(slot));
        }
        true
    }

    fn handle(&mut self, source: Source, fd: RawFd, set: EventSet) {
        match source {
            Source::Wake => {}
            Source::Timer => return self.bus.chipset.timer_expired(),
            Source::SerialChanged => {
                let _ = self.serial_changed.read();
                return self.refresh_serial();
            }
            Source::Serial(port) => {
                let Some(serial) = self.bus.chipset.serial_ports().nth(port) else { return };
                if set.contains(EventSet::OUT) {
                    serial.console_writable();
                }
                if set.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
                    serial.console_readable();
                }
            }
            Source::SerialLinger(port) => {
                if let Some(serial) = self.bus.chipset.serial_ports().nth(port) {
                    serial.lingered();
                }
                return self.refresh(Source::Serial(port));
            }
            Source::SerialRest(port) => {
                if let Some(serial) = self.bus.chipset.serial_ports().nth(port) {
                    serial.rested();
                }
                return self.refresh(Source::Serial(port));
            }
            Source::Virtio(slot) => {
                if let Some(device) = self.bus.virtio.get(slot) {
                    lock(device).host_event(fd, &self.bus.memory);
                }
            }
        }
        self.refresh(source);
    }

    fn refresh_serial(&mut self) {
        for port in 0..self.bus.chipset.serial_ports().count() {
            self.refresh(Source::Serial(port));
        }
    }

    /// Reads a device's interest again.
    fn refresh(&mut self, source: Source) {
        let interests = match source {
            Source::Serial(port) => {
                let Some(serial) = self.bus.chipset.serial_ports().nth(port) else { return };
                let interest = serial.interest();
                let fd = serial.console().as_raw_fd();
                vec![HostInterest { fd, readable: interest.readable, writable: interest.writable }]
            }
            Source::Virtio(slot) => match self.bus.virtio.get(slot) {
                Some(device) => lock(device).host_interest(),
                None => return,
            },
            _ => return,
        };
        if let Err(error) = self.watch(source, &interests) {
            tracing::error!(%error, ?source, "a device's descriptors cannot be watched");
        }
    }

    /// Makes the epoll set watch exactly `interests` for `source`.
    fn watch(&mut self, source: Source, interests: &[HostInterest]) -> io::Result<()> {
        let gone: Vec<RawFd> = self
            .watched
            .iter()
            .filter(|(fd, watched)| {
                watched.source == source
                    && !interests.iter().any(|i| i.fd == **fd && (i.readable || i.writable))
            })
            .map(|(fd, _)| *fd)
            .collect();
        for fd in gone {
            self.watched.remove(&fd);
            self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
        }
        for interest in interests.iter().filter(|i| i.readable || i.writable) {
            let mut set = EventSet::empty();
            if interest.readable {
                set |= EventSet::IN;
            }
            if interest.writable {
                set |= EventSet::OUT;
            }
            let operation = match self.watched.get(&interest.fd) {
                Some(w) if w.readable == interest.readable && w.writable == interest.writable => continue,
                Some(_) => ControlOperation::Modify,
                None => ControlOperation::Add,
            };
            self.epoll.ctl(operation, interest.fd, EpollEvent::new(set, interest.fd as u64))?;
            self.watched.insert(
                interest.fd,
                Watched { source, readable: interest.readable, writable: interest.writable },
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use kvm_bindings::KvmIrqRouting;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use vmm_sys_util::errno;

    use super::*;
    use crate::vmm::bus::Bus;
    use crate::vmm::chipset::Chipset;
    use crate::vmm::chipset::ioapic::{IoApic, Routing};
    use crate::vmm::virtio::VirtioDevice;
    use crate::vmm::virtio::net::link::Link;
    use crate::vmm::virtio::net::{Net, NetConfig};
    use crate::vmm::virtio::testing::{BUFFERS, Machine};

    struct Nowhere;

    impl Routing for Nowhere {
        fn connect(&self, _: &EventFd, _: u32) -> Result<(), errno::Error> {
            Ok(())
        }

        fn set(&self, _: &KvmIrqRouting) -> Result<(), errno::Error> {
            Ok(())
        }
    }

    /// What the thread owns, with one device that a driver has brought up and given a buffer of its first queue.
    fn worker(device: Box<dyn VirtioDevice>) -> Worker {
        let mut driver = Machine::started(device, 16, 0);
        driver.add(0, 0, &[(BUFFERS, 0x800, true)]);
        driver.notify(0);
        let Machine { memory, transport, .. } = driver;
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (console, _) = UnixStream::pair().unwrap();
        console.set_nonblocking(true).unwrap();
        let ioapic = Arc::new(IoApic::new(Arc::new(Nowhere)));
        let chipset = Chipset::new(ioapic, console, None, event(), None).unwrap();
        let bus = Arc::new(Bus::new(chipset, vec![transport], memory));
        let (epoll, watched) = (Epoll::new().unwrap(), HashMap::new());
        let mut worker = Worker { epoll, watched, serial_changed: event(), wake: event(), bus };
        worker.refresh(Source::Virtio(0));
        worker
    }

    /// Answers what is ready until nothing is; false: something always is.
    fn rests(worker: &mut Worker) -> bool {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        for _ in 0..100 {
            let count = worker.epoll.wait(0, &mut events).unwrap();
            if count == 0 {
                return true;
            }
            for event in &events[..count] {
                let Some(watched) = worker.watched.get(&event.fd()) else { continue };
                let source = watched.source;
                worker.handle(source, event.fd(), event.event_set());
            }
        }
        false
    }

    #[test]
    fn a_link_that_is_lost_wakes_nobody_any_more() {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.unwrap();
        // As the worker does for the machine that follows after a reset.
        let _held = ours.try_clone().unwrap();
        let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None };
        let mut worker = worker(Box::new(Net::new(Link::wire(ours).unwrap(), config)));
        assert!(rests(&mut worker));
        drop(theirs);
        assert!(rests(&mut worker), "the thread spins");
    }
}
