//! The virtio devices: found through the settings (`virtio_mmio.device=4K@0xd0000000:5`, as FreeBSD and Linux read it), driven
//! with polled queues that halt when there is nothing to poll for.

mod block;
mod console;
mod mmio;
mod net;
mod queue;

pub(crate) use block::Block;
pub(crate) use console::Console;
pub(crate) use net::{FRAME_BYTES, Net};

use crate::checks::{Checks, check};
use crate::fail;
use crate::given::Given;
use crate::memory;
use crate::random::Generator;
use crate::serial::say;
use mmio::Device;
use queue::{Queue, Rings};

pub(crate) const DISKS_MAX: usize = 8;
const NAME: &[u8] = b"virtio_mmio.device";
const ID_NET: u32 = 1;
const ID_BLOCK: u32 = 2;
const ID_CONSOLE: u32 = 3;
const ID_RNG: u32 = 4;

/// Of disks, the generator, and the network interface, which has two.
static mut RINGS: [Rings; DISKS_MAX + 3] = [const { Rings::new() }; DISKS_MAX + 3];

unsafe extern "C" {
    /// The console's, in the page that every request touches.
    static mut console_rings: [Rings; 2];
}

pub(crate) struct Devices {
    blocks: [Option<Block>; DISKS_MAX],
    disks: usize,
    pub(crate) console: Option<Console>,
    rng: Option<Queue>,
    /// The first one, if the settings give it an address.
    pub(crate) net: Option<Net>,
}

/// Why a device does not do what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It did not take the features, or has no such queue.
    Setup(&'static str),
    /// It set DEVICE_NEEDS_RESET, or used a descriptor that it was not given.
    Broken(&'static str),
    /// No completion for many seconds.
    Timeout,
    /// It answered with an error status.
    Refused(u8),
}

/// Finds and starts every device that the settings name. One that does not start ends the guest.
pub(crate) fn find(given: &Given, checks: &mut Checks) -> Devices {
    let mut devices = Devices { blocks: [const { None }; DISKS_MAX], disks: 0, console: None, rng: None, net: None };
    // SAFETY: called once; each ring goes to one queue.
    let (mut rings, mut of_console) =
        unsafe { ((&mut *(&raw mut RINGS)).iter_mut(), (&mut *(&raw mut console_rings)).iter_mut()) };
    for (name, value) in given.settings().filter(|(name, _)| is_device(name)) {
        let Some((base, line)) = parse(value) else {
            fail(format_args!("setting {}: cannot read {}", memory::text(name), memory::text(value)));
        };
        let device = match Device::open(base, line) {
            Ok(Some(device)) => device,
            Ok(None) => continue,
            Err(why) => fail(format_args!("device at {base:#x}, line {line}: {why:?}")),
        };
        let id = device.id();
        let mut ring = || rings.next().unwrap_or_else(no_ring);
        let mut console_ring = || of_console.next().unwrap_or_else(no_ring);
        let outcome = match id {
            ID_BLOCK if devices.disks < DISKS_MAX => Block::start(device, ring()).map(|block| {
                say!("ok     virtio.block at {base:#x}, line {line}: {} sectors", block.sectors());
                devices.blocks[devices.disks] = Some(block);
                devices.disks += 1;
            }),
            ID_CONSOLE if devices.console.is_none() => Console::start(device, console_ring(), console_ring())
                .map(|console| {
                    check!(checks, "virtio.console", true, "at {base:#x}, line {line}");
                    devices.console = Some(console);
                }),
            ID_NET if devices.net.is_none() && given.value("coldspark.ip").is_some() => {
                let (receive, transmit) = (ring(), ring());
                Net::start(device, receive, transmit).map(|net| {
                    say!("ok     virtio.net at {base:#x}, line {line}");
                    devices.net = Some(net);
                })
            }
            ID_RNG if devices.rng.is_none() => {
                device.start(0, |device| device.queue(0, ring())).map(|queue| {
                    devices.rng = Some(queue);
                })
            }
            _ => {
                say!("ok     device at {base:#x}, line {line}: id {id} not used");
                Ok(())
            }
        };
        if let Err(why) = outcome {
            fail(format_args!("virtio device {id} at {base:#x}, line {line}: {why:?}"));
        }
    }
    devices.check_first_disk(checks);
    devices
}

impl Devices {
    pub(crate) fn disks(&self) -> usize {
        self.disks
    }

    pub(crate) fn disk(&mut self, index: u32) -> Option<&mut Block> {
        self.blocks.get_mut(index as usize)?.as_mut()
    }

    /// A read is a better proof of a disk than its registers.
    fn check_first_disk(&mut self, checks: &mut Checks) {
        let Some(disk) = self.disk(0) else {
            say!("ok     virtio.block: none");
            return;
        };
        let mut sector = [0; 512];
        let outcome = disk.read(0, &mut sector);
        check!(checks, "virtio.block", outcome.is_ok(), "first sector: {outcome:?}");
    }

    /// Seeds the generator from virtio-rng, waiting by interrupt alone: that checks the whole interrupt path.
    pub(crate) fn seed(&mut self, random: &mut Generator, checks: &mut Checks) {
        let Some(queue) = self.rng.as_mut() else {
            say!("ok     virtio.rng: none, seeded by the TSC alone");
            return;
        };
        let mut entropy = [0u8; 32];
        queue.give_one(entropy.as_mut_ptr() as u64, entropy.len() as u32, true);
        let woken = queue.notify_and_halt();
        check!(checks, "irq.delivery", woken == Ok(true), "interrupt of virtio-rng: {woken:?}");
        let outcome = woken.and_then(|_| queue.take().map(|used| used.map_or(0, |used| used.bytes)));
        // SAFETY: the device wrote here behind the compiler's back.
        let entropy = unsafe { (&raw const entropy).read_volatile() };
        let good = matches!(outcome, Ok(1..=32)) && entropy != [0; 32];
        check!(checks, "virtio.rng", good, "bytes {outcome:?}");
        random.feed(&entropy);
    }
}

fn no_ring() -> &'static mut Rings {
    fail(format_args!("more devices than rings"))
}

/// `virtio_mmio.device`, or that with `_` and a number.
fn is_device(name: &[u8]) -> bool {
    name.strip_prefix(NAME).is_some_and(|rest| match rest {
        [] => true,
        [b'_', digits @ ..] => !digits.is_empty() && digits.iter().all(u8::is_ascii_digit),
        _ => false,
    })
}

/// `<size>[K|M]@<base>:<line>[:<id>]` to base and line.
fn parse(value: &[u8]) -> Option<(u64, u32)> {
    let (_size, rest) = memory::text(value).split_once('@')?;
    let mut parts = rest.split(':');
    let base = u64::from_str_radix(parts.next()?.strip_prefix("0x")?, 16).ok()?;
    let line = parts.next()?.parse().ok()?;
    let mapped = base.checked_add(0x1000)? <= memory::IDENTITY_BYTES;
    (base % 4 == 0 && mapped).then_some((base, line))
}
