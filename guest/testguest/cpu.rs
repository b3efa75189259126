//! What CPUID tells a FreeBSD kernel, and must tell it for a quick boot (FREEBSD.md section 4).

use crate::checks::{Checks, check};
use crate::gate;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub(crate) tsc_khz: u32,
    pub(crate) lapic_khz: u32,
}

/// KVM's local APIC timer runs at 1 GHz.
const LAPIC_KHZ: u32 = 1_000_000;
const TIMING_LEAF: u32 = 0x4000_0010;

pub(crate) fn check(checks: &mut Checks) -> Timing {
    let [_, _, features, _] = gate::cpuid(1, 0);
    let [highest, b, c, d] = gate::cpuid(0x4000_0000, 0);
    let hypervisor = features >> 31 & 1 == 1;
    check!(
        checks,
        "cpuid.hypervisor",
        hypervisor,
        "leaf 1 bit 31, signature {}",
        [b, c, d].map(u32::to_le_bytes).as_flattened().escape_ascii()
    );
    let has_timing = hypervisor && (TIMING_LEAF..0x4001_0000).contains(&highest);
    check!(checks, "cpuid.timing_leaf", has_timing, "highest hypervisor leaf {highest:#x}");
    let [tsc_khz, lapic_khz, _, _] = if has_timing { gate::cpuid(TIMING_LEAF, 0) } else { [0; 4] };
    // 100 MHz to 20 GHz.
    check!(checks, "cpuid.tsc_khz", (100_000..20_000_000).contains(&tsc_khz), "{tsc_khz} kHz");
    check!(checks, "cpuid.lapic_khz", lapic_khz == LAPIC_KHZ, "{lapic_khz} kHz");
    let [highest_extended, ..] = gate::cpuid(0x8000_0000, 0);
    let invariant = highest_extended >= 0x8000_0007 && gate::cpuid(0x8000_0007, 0)[3] >> 8 & 1 == 1;
    check!(checks, "cpuid.invariant_tsc", invariant, "leaf 0x80000007 bit 8");
    let [deadline, x2apic] = [24, 21].map(|bit| features >> bit & 1 == 1);
    check!(checks, "cpuid.features", deadline && x2apic, "TSC deadline {deadline}, x2APIC {x2apic}");
    Timing { tsc_khz, lapic_khz: if lapic_khz == 0 { LAPIC_KHZ } else { lapic_khz } }
}
