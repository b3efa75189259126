//! A vCPU's registers out of KVM and into it again (`Documentation/virt/kvm/api.rst`).
//!
//! On the way in there are two halves. What stands still ([`restore`]): CPUID first (it says what the rest may hold), then registers and
//! MSRs; that can be done as long ahead as one likes. What time has a hold on: IA32_TSC, on all vCPUs together ([`restore_tsc`]), then
//! ([`restore_time`]) the local APIC, whose timer begins to count, IA32_TSC_DEADLINE (it arms the timer that the APIC's LVT describes),
//! pending events and the run state.

#![allow(unsafe_code)]

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::snapshot::state::vcpu::{CPUID_ENTRIES_MAX, MSRS_MAX, VcpuState};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type ranges (SDM volume 3, 12.11): default type, those of fixed size, and KVM's eight others. KVM keeps them, and does not list them.
const MTRRS: [u32; 28] = [
    0x2ff, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x200, 0x201, 0x202,
    0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
];
/// Minutes, at any frequency.
const FITS_NOTHING: u64 = 1 << 42;

/// Why a vCPU's state cannot be taken or set.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    #[error("{call}: {source}")]
    Kvm { call: &'static str, source: errno::Error },
    #[error("MSR {index:#x} = {value:#x} of the snapshot is refused by this host's KVM")]
    Msr { index: u32, value: u64 },
    #[error("{what}: {count} is more than {max}; the snapshot is damaged")]
    TooMany { what: &'static str, count: usize, max: usize },
    #[error("this host cannot run a guest at {needed} kHz (its own TSC has {host} kHz, and it cannot scale)")]
    TscFrequency { needed: u32, host: u32 },
    #[error(
        "the guest has reset itself: there is nothing left that could go on; freeze it when it has booted again"
    )]
    Over,
}

fn call(call: &'static str) -> impl FnOnce(errno::Error) -> VcpuStateError {
    move |source| VcpuStateError::Kvm { call, source }
}

/// Everything of a vCPU that stands still. `msr_indices`: KVM_GET_MSR_INDEX_LIST.
pub fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, VcpuStateError> {
    Ok(VcpuState {
        // The run state first: asking for it makes KVM settle events that arrived for the local APIC.
        mp_state: vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?,
        regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
        sregs: vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?,
        xsave: Box::new(vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?),
        xcrs: vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?,
        debug_regs: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
        lapic: Box::new(vcpu.get_lapic().map_err(call("KVM_GET_LAPIC"))?),
        msrs: save_msrs(vcpu, msr_indices)?,
        events: vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?,
        tsc_khz: vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?,
        cpuid: vcpu.get_cpuid2(CPUID_ENTRIES_MAX).map_err(call("KVM_GET_CPUID2"))?.as_slice().to_vec(),
    })
}

/// Reads every MSR of the list that this vCPU has, and those that belong to it besides.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut saved = read_msrs(vcpu, indices)?;
    let besides: Vec<u32> = MTRRS.into_iter().filter(|index| !indices.contains(index)).collect();
    // A new vCPU has zeros there: what is zero costs no clone anything.
    let besides = read_msrs(vcpu, &besides)?.into_iter().filter(|entry| entry.data != 0);
    // Before the last, which is IA32_TSC_DEADLINE.
    let last = saved.pop_if(|entry| entry.index == MSR_TSC_DEADLINE);
    saved.extend(besides.chain(last));
    Ok(saved)
}

/// Reads those of the list that this vCPU has: KVM lists some that a given CPUID hides, and stops at them.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut rest: Vec<kvm_msr_entry> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    // KVM sets them in this order later: the TSC before all that looks at it, the deadline last.
    rest.sort_by_key(|entry| match entry.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut saved = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let mut msrs = msrs_of(&rest)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
        saved.extend_from_slice(msrs.as_slice().get(..count).unwrap_or(&[]));
        rest.drain(..(count + 1).min(rest.len()));
    }
    Ok(saved)
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    Msrs::from_entries(entries).map_err(|_| VcpuStateError::TooMany {
        what: "MSRs",
        count: entries.len(),
        max: MSRS_MAX,
    })
}

/// Sets the rates and the values of new vCPUs' time stamp counters, when all of them exist.
///
/// KVM takes a value that fits what was written last, to within a second, for an attempt to bring a vCPU in step with the one before it,
/// and gives it that one's offset instead (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). That is right for all but the first. For the
/// first, what was written last is the zero with which KVM made it (before Linux 6.8, which knows the difference): a guest whose counter
/// is at half a second would find it near zero again. So a value that fits nothing comes before.
pub fn restore_tsc<'a>(
    vcpus: impl Iterator<Item = (&'a VcpuFd, &'a VcpuState)>,
) -> Result<(), (usize, VcpuStateError)> {
    let mut tsc = None;
    for (index, (vcpu, state)) in vcpus.enumerate() {
        let failed = |error| (index, error);
        set_tsc_khz(vcpu, state.tsc_khz).map_err(failed)?;
        let value = match tsc {
            Some(tsc) => tsc,
            None => {
                let value = saved_tsc(state);
                write_tsc(vcpu, value.wrapping_add(FITS_NOTHING)).map_err(failed)?;
                value
            }
        };
        write_tsc(vcpu, value).map_err(failed)?;
        tsc = Some(value);
    }
    Ok(())
}

fn write_tsc(vcpu: &VcpuFd, tsc: u64) -> Result<(), VcpuStateError> {
    let entry = kvm_msr_entry { index: MSR_TSC, data: tsc, ..Default::default() };
    match vcpu.set_msrs(&msrs_of(&[entry])?).map_err(call("KVM_SET_MSRS"))? {
        0 => Err(VcpuStateError::Msr { index: MSR_TSC, value: tsc }),
        _ => Ok(()),
    }
}

/// Shows a new vCPU the processor that the saved one had; before [`restore`], and as long ahead of it as one likes.
pub fn set_cpuid(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| VcpuStateError::TooMany {
        what: "CPUID entries",
        count: state.cpuid.len(),
        max: CPUID_ENTRIES_MAX,
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))
}

/// Sets a new vCPU to what stands still of a saved state, all but CPUID ([`set_cpuid`]), which comes before this.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    if state.msrs.len() > MSRS_MAX {
        return Err(VcpuStateError::TooMany { what: "MSRs", count: state.msrs.len(), max: MSRS_MAX });
    }
    vcpu.set_sregs(&state.sregs).map_err(call("KVM_SET_SREGS"))?;
    vcpu.set_regs(&state.regs).map_err(call("KVM_SET_REGS"))?;
    vcpu.set_xcrs(&state.xcrs).map_err(call("KVM_SET_XCRS"))?;
    // SAFETY: the kernel reads at most as many bytes as the enabled features need; features beyond the 4 KiB of
    // `kvm_xsave` (AMX) need a permission that this process never asks for.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(call("KVM_SET_XSAVE"))?;
    vcpu.set_debug_regs(&state.debug_regs).map_err(call("KVM_SET_DEBUGREGS"))?;
    let standing = |entry: &&kvm_msr_entry| !matches!(entry.index, MSR_TSC | MSR_TSC_DEADLINE);
    restore_msrs(vcpu, state.msrs.iter().filter(standing).copied().collect())
}

/// Sets the rest, just before the vCPU runs; after [`restore`] and, on every vCPU of the VM, [`restore_tsc`].
pub fn restore_time(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuStateError> {
    vcpu.set_lapic(&state.lapic).map_err(call("KVM_SET_LAPIC"))?;
    restore_msrs(vcpu, state.msrs.iter().filter(|entry| entry.index == MSR_TSC_DEADLINE).copied().collect())?;
    vcpu.set_vcpu_events(&state.events).map_err(call("KVM_SET_VCPU_EVENTS"))?;
    vcpu.set_mp_state(state.mp_state).map_err(call("KVM_SET_MP_STATE"))
}

fn set_tsc_khz(vcpu: &VcpuFd, needed: u32) -> Result<(), VcpuStateError> {
    let host = vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
    if host == needed {
        return Ok(());
    }
    vcpu.set_tsc_khz(needed).map_err(|_| VcpuStateError::TscFrequency { needed, host })
}

/// All in one call; KVM stops at the first that it refuses. A refused zero is what a new vCPU holds anyway.
fn restore_msrs(vcpu: &VcpuFd, mut rest: Vec<kvm_msr_entry>) -> Result<(), VcpuStateError> {
    while !rest.is_empty() {
        let count = vcpu.set_msrs(&msrs_of(&rest)?).map_err(call("KVM_SET_MSRS"))?;
        if let Some(refused) = rest.get(count)
            && refused.data != 0
            && !same_already(vcpu, refused)
        {
            return Err(VcpuStateError::Msr { index: refused.index, value: refused.data });
        }
        rest.drain(..(count + 1).min(rest.len()));
    }
    Ok(())
}

/// Some MSRs can be read and not set (a host's constant facts); that is fine if they agree.
fn same_already(vcpu: &VcpuFd, entry: &kvm_msr_entry) -> bool {
    let mut ask = match msrs_of(&[kvm_msr_entry { index: entry.index, ..Default::default() }]) {
        Ok(ask) => ask,
        Err(_) => return false,
    };
    matches!(vcpu.get_msrs(&mut ask), Ok(1))
        && ask.as_slice().first().is_some_and(|got| got.data == entry.data)
}

/// What the time stamp counter of a vCPU that stands still says; `None` if this KVM does not tell.
pub fn read_tsc(vcpu: &VcpuFd) -> Option<u64> {
    let mut ask = msrs_of(&[kvm_msr_entry { index: MSR_TSC, ..Default::default() }]).ok()?;
    match vcpu.get_msrs(&mut ask) {
        Ok(1) => ask.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// The time stamp in a saved state.
fn saved_tsc(state: &VcpuState) -> u64 {
    state.msrs.iter().find(|entry| entry.index == MSR_TSC).map_or(0, |entry| entry.data)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
    use kvm_ioctls::VmFd;

    use super::*;
    use crate::vmm::host::Host;
    use crate::vmm::x86::cpuid;

    /// A VM and its vCPU, which knows what processor it is.
    fn vcpu(host: &Host) -> (VmFd, VcpuFd) {
        let vm = host.kvm.create_vm().unwrap();
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = 24;
        vm.enable_cap(&split).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let khz = vcpu.get_tsc_khz().unwrap();
        vcpu.set_cpuid2(&cpuid::for_vcpu(&host.supported_cpuid, 0, 1, khz)).unwrap();
        (vm, vcpu)
    }

    #[test]
    fn memory_types_are_part_of_the_state() {
        let Some(host) = Host::for_tests() else { return };
        let (_vm, source) = vcpu(&host);
        let wanted = [(0x2ff, 0xc06), (0x250, 0x0606_0606_0606_0606), (0x200, 0xc000_0000)];
        for (index, data) in wanted {
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            assert_eq!(source.set_msrs(&msrs_of(&[entry]).unwrap()).unwrap(), 1, "{index:#x}");
        }
        let state = save(&source, &host.msr_indices).unwrap();
        let last = state.msrs.last().map(|entry| entry.index);
        assert!(
            last == Some(MSR_TSC_DEADLINE) || state.msrs.iter().all(|entry| entry.index != MSR_TSC_DEADLINE)
        );
        let (_vm, clone) = vcpu(&host);
        set_cpuid(&clone, &state).unwrap();
        restore(&clone, &state).unwrap();
        for (index, data) in wanted {
            let mut ask = msrs_of(&[kvm_msr_entry { index, ..Default::default() }]).unwrap();
            assert_eq!(clone.get_msrs(&mut ask).unwrap(), 1);
            assert_eq!(ask.as_slice()[0].data, data, "{index:#x}");
        }
    }
}
