//! The embedded test guest: a program that is entered like a FreeBSD kernel, looks hard at what its machine and its
//! loader gave it, says ready, and serves the agent protocol.
//!
//! Everything here runs in ring 3, ports open to it, interrupts off; `stub.s` holds the few ring-0 steps. That split is
//! what lets it run at full speed on a KVM that emulates kernel mode, and unchanged on real hardware. All memory is
//! identity-mapped and open to ring 3, so drivers and page tables are plain Rust. Interrupts are taken only while a CPU
//! halts in the gate ([`gate::halt`]): code never races with a handler.
//!
//! What goes wrong is said on the serial console and ends in [`fail`]: 0xEE on port 0xF4 and a reset, never a silent
//! hang. Facts: FREEBSD.md (entries, records, MPTable, CPUID), the virtio 1.2 specification, the Intel SDM.

#![no_std]
#![no_main]
// `&mut *(&raw mut STATIC)` is how a static is borrowed once; what clippy proposes is denied by rustc.
#![allow(clippy::deref_addrof)]

mod arena;
mod checks;
mod clock;
mod cpu;
mod gate;
mod given;
mod interrupts;
mod madt;
mod memory;
mod mptable;
mod native;
mod network;
mod port;
mod pvh;
mod random;
mod serial;
mod serve;
mod smp;
mod streams;
mod virtio;

#[path = "../freestanding.rs"]
mod freestanding;
#[path = "../protocol/pattern.rs"]
mod pattern;
#[path = "../protocol/wire.rs"]
mod wire;

use checks::Checks;
use serial::say;

core::arch::global_asm!(include_str!("stub.s"), options(raw));

/// What the guest tells the VMM on [`STATUS_PORT`].
const STATUS_PORT: u16 = 0xf4;
const STATUS_READY: u8 = 0x52;
const STATUS_FAILED: u8 = 0xee;
/// Keyboard controller: pulse the reset line.
const RESET_PORT: u16 = 0x64;
const RESET: u8 = 0xfe;

/// Entered by the stub, on the first CPU, with the protocol (`wire::BOOT_*`) and its two arguments.
#[unsafe(no_mangle)]
extern "C" fn guest_main(boot: u32, first: u32, second: u32) -> ! {
    serial::init();
    say!("coldspark test guest, entered by {}", protocol_name(boot));
    let mut checks = Checks::new();
    let given = match boot {
        wire::BOOT_NATIVE => native::read(&mut checks, first.into(), second.into()),
        _ => pvh::read(&mut checks, first.into()),
    };
    given.check_memory(&mut checks);
    let timing = cpu::check(&mut checks);
    // A machine describes its CPUs in one of two ways.
    let topology = madt::check(&mut checks).unwrap_or_else(|| mptable::check(&mut checks));
    interrupts::init_this_cpu();
    interrupts::init_timer(timing.lapic_khz);
    let cpus = smp::start(&mut checks, &topology, &given);
    if let Some(rounds) = given.number("coldspark.rounds") {
        cpus.check_run(&mut checks, rounds.min(wire::RUN_ROUNDS_MAX));
    }
    let mut arena = arena::map(&given);
    let mut devices = virtio::find(&given, &mut checks);
    let mut random = random::Generator::new(gate::tsc());
    devices.seed(&mut random, &mut checks);
    let clock = clock::Clock::new(timing.tsc_khz);
    arena.fill_to(given.number("coldspark.fill_mib").unwrap_or(4) << 20);

    if checks.failed() != 0 && !given.is_set("coldspark.lenient") {
        fail(format_args!("{} checks failed", checks.failed().count_ones()));
    }
    say!(
        "COLDSPARK-READY protocol={} cpus={} memory_mib={} arena_mib={} disks={} tsc_khz={} checks_failed={}",
        protocol_name(boot),
        cpus.alive(),
        given.ram_bytes() >> 20,
        arena.bytes() >> 20,
        devices.disks(),
        timing.tsc_khz,
        checks.failed().count_ones()
    );
    serial::out8(STATUS_PORT, STATUS_READY);
    let facts = serve::Facts { boot, tsc_khz: timing.tsc_khz, checks, memory_bytes: given.ram_bytes() };
    let network = network::Network::start(&given, devices.net.take());
    let state = serve::State { facts, arena, cpus, random, clock, network };
    serve::enter(serve::Booted { devices, state: Some(state) })
}

fn protocol_name(boot: u32) -> &'static str {
    match boot {
        wire::BOOT_NATIVE => "native",
        wire::BOOT_PVH => "pvh",
        _ => "unknown",
    }
}

/// Says why, tells the VMM, and resets the machine, so that whoever waits for it to get ready hears at once.
fn fail(why: core::fmt::Arguments) -> ! {
    say!("COLDSPARK-FAILED {why}");
    serial::out8(STATUS_PORT, STATUS_FAILED);
    serial::out8(RESET_PORT, RESET);
    gate::stop()
}

/// Entered by the stub after a fault in either ring.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    let [vector, error, rip, cs, rsp, cr2, flags] = gate::fault_notes_of_stub();
    fail(format_args!(
        "fault vector={vector} error={error:#x} rip={rip:#x} cs={cs:#x} rsp={rsp:#x} cr2={cr2:#x} flags={flags:#x}"
    ))
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    fail(format_args!("{info}"))
}
