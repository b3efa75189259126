//! Hostile guests against the whole bus: every device behind every front, by ports and memory as a guest reaches them.
//!
//! | file | what it holds |
//! |---|---|
//! | here | a machine without KVM: the real bus with all devices, what is at their other ends, and the device thread's work |
//! | [`driver`] | a driver that knows all three fronts (virtio-mmio, PCI, legacy PCI) and keeps to the rules |
//! | [`steps`] | what a hostile driver does, as proptest strategies |
//! | [`virtio`] | each virtio device: any registers, any rings, any saved state |
//! | [`chipset`] | everything else on the bus |
//!
//! What holds for each of them: no panic; no access outside guest memory (pages that nobody may touch lie around it, so
//! one ends the test with SIGSEGV); the device thread comes to rest; a device that stops says so under its name; what was
//! done to it can be saved and restored; and after a reset it works for an honest driver.

#![allow(unsafe_code)]

pub mod chipset;
mod driver;
mod steps;
pub mod virtio;

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::bus::{Bus, Pc, lock};
use super::chipset::Chipset;
use super::chipset::ioapic::{IoApic, PINS, Routing};
use super::chipset::pci::{Function, PciBus, intx_pin};
use super::chipset::power::{self, Power};
use super::irq::Messages;
use super::memory::GuestMemory;
use super::virtio::VirtioDevice;
use super::virtio::block::Block;
use super::virtio::block::pool::Pool;
use super::virtio::console::Console;
use super::virtio::mmio::MmioTransport;
use super::virtio::net::link::Link;
use super::virtio::net::{Net, NetConfig};
use super::virtio::pci::{VirtioFunction, Wires};
use super::virtio::rng::Rng;
use crate::snapshot::layers::LayeredDisk;

/// The guest's memory: two regions with a hole between them.
pub const LOW_BYTES: u64 = 0x40_0000;
pub const HIGH_START: u64 = 0x60_0000;
pub const HIGH_BYTES: u64 = 0x20_0000;
pub const DISK_BYTES: u64 = 1 << 20;
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The devices, in the order of the bus.
pub const NAMES: [&str; 4] = ["block", "console", "rng", "net"];
pub const READY_PORT: u16 = 0xf4;
/// Rounds after which the device thread is taken for one in an endless loop.
const ROUNDS_MAX: usize = 20_000;

/// The kind of machine, and by that how drivers reach its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    Mmio,
    /// A function without the legacy interface.
    Modern,
    /// One that has both, driven by the legacy one.
    Legacy,
}

pub const FRONTS: [Front; 3] = [Front::Mmio, Front::Modern, Front::Legacy];

/// Takes interrupts, and holds what goes to KVM to what KVM takes.
struct Wiring;

impl Routing for Wiring {
    fn connect(&self, _: &EventFd, gsi: u32) -> Result<(), errno::Error> {
        assert!((gsi as usize) < PINS);
        Ok(())
    }

    fn set(&self, routes: &KvmIrqRouting) -> Result<(), errno::Error> {
        let routes = routes.as_slice();
        assert!(routes.len() <= PINS);
        for route in routes {
            assert_eq!(
                (route.type_, route.flags, (route.gsi as usize) < PINS),
                (KVM_IRQ_ROUTING_MSI, 0, true)
            );
            // SAFETY: the type says that this is the union's member.
            let msi = unsafe { route.u.msi };
            // A VM that knows 32-bit destinations would refuse more.
            assert_eq!(msi.address_hi & 0xff, 0);
        }
        Ok(())
    }
}

impl Messages for Wiring {
    fn send(&self, _: u64, _: u32) {}
}

/// Memory of a region with a page before and one behind it that kill who touches them.
struct Guarded {
    start: *mut libc::c_void,
    bytes: usize,
}

const GUARD_BYTES: usize = 0x1000;

impl Guarded {
    fn new(bytes: usize) -> Self {
        let all = bytes + 2 * GUARD_BYTES;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let guarded = Self { start, bytes };
        // SAFETY: inside the mapping made above.
        let result =
            unsafe { libc::mprotect(guarded.memory().cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(result, 0);
        guarded
    }

    fn memory(&self) -> *mut u8 {
        self.start.cast::<u8>().wrapping_add(GUARD_BYTES)
    }

    fn region(&self, address: u64) -> GuestRegionMmap<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: mapped as long as this value, which the machine drops after everything that uses the memory.
        let mapping =
            unsafe { MmapRegion::build_raw(self.memory(), self.bytes, protection, libc::MAP_PRIVATE) };
        GuestRegionMmap::new(mapping.unwrap(), GuestAddress(address)).unwrap()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody uses any more.
        unsafe { libc::munmap(self.start, self.bytes + 2 * GUARD_BYTES) };
    }
}

/// A machine and what is at the other ends of its devices.
pub struct Machine {
    pub front: Front,
    // Before the memory: with the last device go the threads that use it.
    pub bus: Bus,
    pub agent: UnixStream,
    pub serial: UnixStream,
    /// At COM2.
    pub second: UnixStream,
    pub wire: UnixDatagram,
    _memory: [Guarded; 2],
}

impl Machine {
    pub fn new(front: Front) -> Self {
        let guarded = [Guarded::new(LOW_BYTES as usize), Guarded::new(HIGH_BYTES as usize)];
        let regions = vec![guarded[0].region(0), guarded[1].region(HIGH_START)];
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        let (console, serial) = UnixStream::pair().unwrap();
        console.set_nonblocking(true).unwrap();
        serial.set_nonblocking(true).unwrap();
        let (second_port, second) = UnixStream::pair().unwrap();
        second_port.set_nonblocking(true).unwrap();
        second.set_nonblocking(true).unwrap();
        let (agent_device, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        let (net_device, wire) = UnixDatagram::pair().unwrap();
        wire.set_nonblocking(true).unwrap();
        let wake = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let ioapic = Arc::new(IoApic::new(Arc::new(Wiring)));
        let chipset = Chipset::new(ioapic, console, Some(second_port), wake, Some(READY_PORT)).unwrap();
        let overlay = Some(tempfile::tempfile().unwrap());
        let disk = Arc::new(LayeredDisk::open(None, vec![], overlay, DISK_BYTES).unwrap());
        // All offloads, as with a TAP.
        let link = Link::imitation(net_device.into(), Arc::default());
        let devices: Vec<Box<dyn VirtioDevice>> = vec![
            Box::new(Block::new(disk, "hostile", Pool::new()).unwrap()),
            Box::new(Console::new(agent_device)),
            Box::new(Rng::new()),
            Box::new(Net::new(link, NetConfig { mac: MAC, mtu: Some(1500) })),
        ];
        assert!(devices.iter().map(|device| device.name()).eq(NAMES));
        let bus = match front {
            Front::Mmio => {
                let windows = (5..).zip(devices).map(|(pin, device)| {
                    MmioTransport::new(device, chipset.ioapic.line(pin).unwrap()).unwrap()
                });
                let windows = windows.collect();
                Bus::new(chipset, windows, memory)
            }
            Front::Modern | Front::Legacy => {
                let pc = pc(&chipset, devices, front == Front::Legacy, &memory);
                Bus::with_pc(chipset, pc, memory)
            }
        };
        Self { front, bus, agent, serial, second, wire, _memory: guarded }
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.bus.memory
    }

    /// Writes guest memory; what is outside is not written.
    pub fn scribble(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory().write_slice(bytes, GuestAddress(address));
    }

    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory().read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// The device thread: answers every watched descriptor that is ready, until none is and nothing is under way.
    pub fn run(&self) {
        let mut settled = false;
        for _ in 0..ROUNDS_MAX {
            match self.round() {
                true => settled = false,
                false if settled => return,
                false => {
                    self.quiesce();
                    settled = true;
                }
            }
        }
        panic!("the device thread never comes to rest");
    }

    /// One wait of the device thread. False: nothing was ready.
    pub fn round(&self) -> bool {
        let events = |readable, writable| {
            (if readable { libc::POLLIN } else { 0 }) | (if writable { libc::POLLOUT } else { 0 })
        };
        let ports: Vec<_> = self.bus.chipset.serial_ports().collect();
        let (mut polled, mut owners) = (Vec::new(), Vec::new());
        for (port, serial) in ports.iter().enumerate() {
            let interest = serial.interest();
            // As in epoll: a descriptor with no wish is not watched. (poll ignores negative ones.)
            let watched = interest.readable || interest.writable;
            let fd = if watched { serial.console().as_raw_fd() } else { -1 };
            let wanted = events(interest.readable, interest.writable);
            polled.push(libc::pollfd { fd, events: wanted, revents: 0 });
            owners.push(Err(port));
        }
        for (index, device) in self.bus.virtio.iter().enumerate() {
            for interest in lock(device).host_interest() {
                let wanted = events(interest.readable, interest.writable);
                polled.push(libc::pollfd { fd: interest.fd, events: wanted, revents: 0 });
                owners.push(Ok(index));
            }
        }
        let ready = loop {
            // SAFETY: pointer and length are those of the vector.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) };
            // A fuzzer has its own alarm clock, whose signal can come in between.
            match ready {
                -1 if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
                _ => break ready,
            }
        };
        assert!(ready >= 0, "{}", std::io::Error::last_os_error());
        for (entry, owner) in polled.iter().zip(owners).filter(|(entry, _)| entry.revents != 0) {
            match owner {
                Ok(index) => lock(&self.bus.virtio[index]).host_event(entry.fd, self.memory()),
                Err(port) => {
                    ports[port].console_writable();
                    ports[port].console_readable();
                }
            }
        }
        // Their timers are as good as run out: nobody waits for a clock here.
        for serial in &ports {
            serial.lingered();
            serial.rested();
        }
        ready > 0
    }

    pub fn quiesce(&self) {
        for device in &self.bus.virtio {
            lock(device).quiesce(self.memory());
        }
    }

    /// Everything that was printed or sent and not taken, thrown away.
    pub fn drain(&self) {
        let mut data = vec![0; 70_000];
        for mut stream in [&self.agent, &self.serial, &self.second] {
            while stream.read(&mut data).is_ok_and(|count| count > 0) {}
        }
        while self.wire.recv(&mut data).is_ok() {}
    }
}

/// Host bridge, power block and functions, wired as in a real machine.
fn pc(
    chipset: &Chipset,
    devices: Vec<Box<dyn VirtioDevice>>,
    transitional: bool,
    memory: &GuestMemory,
) -> Pc {
    let level = |pin: u8| Box::new(chipset.ioapic.level_line(pin.into()).unwrap());
    let functions: Vec<Arc<VirtioFunction>> = (1..)
        .zip(devices)
        .map(|(slot, device)| {
            let wires = Wires { messages: Arc::new(Wiring), intx: level(intx_pin(slot)) };
            let memory = memory.clone();
            Arc::new(VirtioFunction::new(device, slot, transitional, wires, memory).unwrap())
        })
        .collect();
    let pci = PciBus::new(functions.iter().map(|function| function.clone() as Arc<dyn Function>).collect());
    Pc { pci, power: Power::new(level(power::SCI)), functions, transitional }
}

/// What was logged by this thread while `body` ran.
pub fn logged<T>(log: &Log, body: impl FnOnce() -> T) -> T {
    let sink = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || sink.clone()).finish();
    tracing::subscriber::with_default(subscriber, body)
}

#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Most steps that a fuzzer's bytes are made to.
const STEPS_MAX: usize = 120;

/// What a strategy makes of each four bytes: a fuzzer that changes, moves or copies some does so to one value of many.
///
/// (proptest's own generator for fuzzers cuts its bytes in half at every choice between strategies, of which there are
/// many here, and past their end gives zeros, of which some samplers ask for another without end.)
fn from_bytes<S: Strategy>(data: &[u8], strategy: &S) -> Vec<S::Value> {
    let value = |bytes: &[u8; 4]| {
        let mut seed = [0; 32];
        seed[..4].copy_from_slice(bytes);
        let config = Config { failure_persistence: None, ..Config::default() };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        strategy.new_tree(&mut TestRunner::new_with_rng(config, rng)).ok().map(|tree| tree.current())
    };
    data.as_chunks().0.iter().take(STEPS_MAX).filter_map(value).collect()
}
