//! Local APIC and IOAPIC: device lines to vectors, the timer as a watchdog while waiting, interrupts between CPUs.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::gate;
use crate::memory::{read_mmio, write_mmio};

pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;
pub(crate) const IO_APIC: u64 = 0xfec0_0000;

const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER_ENTRY: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;

const TIMER_VECTOR: u32 = 33;
const CALL_VECTOR: u32 = 34;
const DEVICE_VECTOR: u32 = 40;
const SPURIOUS_VECTOR: u32 = 63;
const LINES_MAX: u32 = 23;

const MASKED: u32 = 1 << 16;
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
const FIXED: u32 = 0x4000;
const ALL_OTHERS: u32 = 0xc0000;
const BUSY: u32 = 1 << 12;

/// Timer ticks of one second, at most what the counter holds.
static TICKS_PER_SECOND: AtomicU32 = AtomicU32::new(0);

pub(crate) fn init_this_cpu() {
    write_mmio(LOCAL_APIC + SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

pub(crate) fn init_timer(lapic_khz: u32) {
    TICKS_PER_SECOND.store(lapic_khz.saturating_mul(1000), Ordering::Relaxed);
    write_mmio(LOCAL_APIC + TIMER_DIVIDE, 0xb);
    write_mmio(LOCAL_APIC + TIMER_ENTRY, TIMER_VECTOR);
}

/// Interrupts this (the first) CPU in one second.
pub(crate) fn arm_timer() {
    gate::take_timer_note(0);
    write_mmio(LOCAL_APIC + TIMER_COUNT, TICKS_PER_SECOND.load(Ordering::Relaxed));
}

pub(crate) fn disarm_timer() {
    write_mmio(LOCAL_APIC + TIMER_COUNT, 0);
}

pub(crate) fn apic_id() -> u8 {
    (read_mmio(LOCAL_APIC + ID) >> 24) as u8
}

/// Routes an IOAPIC pin to this CPU: edge, high, fixed. False if there is no such pin.
pub(crate) fn route_line(line: u32) -> bool {
    if line > LINES_MAX {
        return false;
    }
    let register = |index: u32, value: u32| {
        write_mmio(IO_APIC, index);
        write_mmio(IO_APIC + 0x10, value);
    };
    let vector = DEVICE_VECTOR + line % (SPURIOUS_VECTOR - DEVICE_VECTOR);
    register(0x10 + line * 2, MASKED | vector);
    register(0x11 + line * 2, u32::from(apic_id()) << 24);
    register(0x10 + line * 2, vector);
    true
}

fn command(apic_id: u8, command: u32) {
    write_mmio(LOCAL_APIC + COMMAND_HIGH, u32::from(apic_id) << 24);
    write_mmio(LOCAL_APIC + COMMAND_LOW, command);
    for _ in 0..100_000 {
        if read_mmio(LOCAL_APIC + COMMAND_LOW) & BUSY == 0 {
            break;
        }
    }
}

/// Starts another CPU in real mode at this page below 1 MiB.
pub(crate) fn start_cpu(apic_id: u8, page: u64) {
    command(apic_id, INIT);
    command(apic_id, START_UP | (page >> 12) as u32);
    command(apic_id, START_UP | (page >> 12) as u32);
}

/// Wakes one CPU.
pub(crate) fn call_cpu(apic_id: u8) {
    write_mmio(LOCAL_APIC + COMMAND_HIGH, u32::from(apic_id) << 24);
    write_mmio(LOCAL_APIC + COMMAND_LOW, FIXED | CALL_VECTOR);
}

/// Wakes all other CPUs.
pub(crate) fn call_others() {
    write_mmio(LOCAL_APIC + COMMAND_LOW, ALL_OTHERS | FIXED | CALL_VECTOR);
}
