//! The gate into ring 0: single privileged steps by `ud2`, see `stub.s`.

use core::arch::asm;
use core::cell::UnsafeCell;

unsafe extern "C" {
    fn gate_call(operation: u64, registers: *mut [u32; 4]);
    static fault_notes: UnsafeNotes;
    static ring0_stacks: u8;
}

#[repr(transparent)]
struct UnsafeNotes(UnsafeCell<[u64; 7]>);
// SAFETY: written by the stub once, read after that.
unsafe impl Sync for UnsafeNotes {}

const HALT: u64 = 0;
const CPUID: u64 = 1;
const RDTSC: u64 = 2;
const FLUSH: u64 = 5;
const STOP: u64 = 6;
const RING0_STACK_BYTES: usize = 512;

fn call(operation: u64, mut registers: [u32; 4]) -> [u32; 4] {
    // SAFETY: the stub does the step on its own stack and writes the four registers back.
    unsafe { gate_call(operation, &mut registers) };
    registers
}

/// Halts this CPU until an interrupt; returns at once if one came since the last halt.
pub(crate) fn halt() {
    call(HALT, [0; 4]);
}

/// eax, ebx, ecx, edx of a leaf as ring 0 sees it (ring 3 may see the host's).
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    call(CPUID, [leaf, 0, subleaf, 0])
}

/// The guest's TSC as ring 0 sees it: the one that survives snapshots.
pub(crate) fn tsc() -> u64 {
    let [low, _, _, high] = call(RDTSC, [0; 4]);
    u64::from(high) << 32 | u64::from(low)
}

/// The TSC as ring 3 reads it: good for short differences.
pub(crate) fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.TSD is clear.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Drops stale translations of this CPU.
pub(crate) fn flush_translations() {
    call(FLUSH, [0; 4]);
}

/// Stops this CPU for good.
pub(crate) fn stop() -> ! {
    loop {
        call(STOP, [0; 4]);
    }
}

/// True once after the timer's interrupt came to the CPU with this index.
pub(crate) fn take_timer_note(cpu: usize) -> bool {
    // SAFETY: one of the stub's ring-0 stacks; the stub writes the word only while its CPU halts in the gate.
    unsafe {
        let word = (&raw const ring0_stacks).add(cpu * RING0_STACK_BYTES + 4) as *mut u32;
        let came = word.read_volatile() != 0;
        if came {
            word.write_volatile(0);
        }
        came
    }
}

/// How many device interrupts came to the first CPU.
pub(crate) fn device_interrupts() -> u32 {
    // SAFETY: as in `take_timer_note`.
    unsafe { (&raw const ring0_stacks).add(8).cast::<u32>().read_volatile() }
}

/// vector, error code, rip, cs, rsp, cr2, flags of the fault.
pub(crate) fn fault_notes_of_stub() -> [u64; 7] {
    // SAFETY: the stub has written them before it entered the only caller.
    unsafe { fault_notes.0.get().read_volatile() }
}
