//! A look at a vCPU that stands still: the registers that tell where a guest hangs. Changes nothing (api.rst: KVM_GET_REGS,
//! KVM_GET_SREGS, KVM_GET_MP_STATE, KVM_GET_VCPU_EVENTS, KVM_GET_LAPIC).

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

/// Interrupt request and in-service registers of a local APIC: eight of 32 bits each, 16 bytes apart.
const LAPIC_IRR: usize = 0x200;
const LAPIC_ISR: usize = 0x100;

/// What a vCPU is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    Running,
    /// In HLT, waiting for an interrupt.
    Halted,
    /// An application processor that nobody has started yet.
    NotStarted,
    /// Another state of KVM's, by its number.
    Other(u32),
}

/// Registers of one vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub activity: Activity,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// Highest vector that waits: injected by KVM and not delivered yet, or requested at the local APIC.
    pub pending: Option<u8>,
    /// Highest vector that the guest is serving.
    pub serving: Option<u8>,
}

/// Takes a look. The vCPU must stand still.
pub fn take(vcpu: &VcpuFd) -> Result<Look, errno::Error> {
    let (regs, sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    let events = vcpu.get_vcpu_events()?;
    let lapic = vcpu.get_lapic()?;
    let injected = (events.interrupt.injected != 0).then_some(events.interrupt.nr);
    Ok(Look {
        activity: match vcpu.get_mp_state()?.mp_state {
            KVM_MP_STATE_RUNNABLE => Activity::Running,
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
                Activity::NotStarted
            }
            other => Activity::Other(other),
        },
        rip: regs.rip,
        rsp: regs.rsp,
        rflags: regs.rflags,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        cpl: sregs.ss.dpl,
        pending: injected.or_else(|| highest(&lapic, LAPIC_IRR)),
        serving: highest(&lapic, LAPIC_ISR),
    })
}

/// The highest vector set in a register of 256 bits.
fn highest(lapic: &kvm_lapic_state, register: usize) -> Option<u8> {
    (0..=u8::MAX).rev().find(|vector| {
        let (word, bit) = (usize::from(vector / 32), vector % 32);
        let byte = lapic.regs.get(register + word * 16 + usize::from(bit / 8));
        byte.is_some_and(|byte| *byte as u8 >> (bit % 8) & 1 != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found_in_its_word() {
        let mut lapic = kvm_lapic_state::default();
        assert_eq!(highest(&lapic, LAPIC_IRR), None);
        // Vector 0x31: word 1, bit 17.
        lapic.regs[LAPIC_IRR + 16 + 2] = 1 << 1;
        assert_eq!(highest(&lapic, LAPIC_IRR), Some(0x31));
        assert_eq!(highest(&lapic, LAPIC_ISR), None);
        // Vector 0xff: word 7, bit 31.
        lapic.regs[LAPIC_IRR + 7 * 16 + 3] = -128i8 as _;
        assert_eq!(highest(&lapic, LAPIC_IRR), Some(0xff));
        lapic.regs[LAPIC_ISR + 3 * 16] = 1;
        assert_eq!(highest(&lapic, LAPIC_ISR), Some(0x60));
    }
}
