//! Saved state of one vCPU: KVM's own structures, byte for byte (`Documentation/virt/kvm/api.rst`). They are a stable
//! kernel ABI, so a state file of one kernel is read by another.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

/// Most CPUID entries and MSRs that a state may carry: KVM's own limit for the first, four times a host's for the other.
pub const CPUID_ENTRIES_MAX: usize = 256;
pub const MSRS_MAX: usize = 1024;

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub cpuid: Vec<kvm_cpuid_entry2>,
    pub tsc_khz: u32,
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub xsave: Box<kvm_xsave>,
    pub xcrs: kvm_xcrs,
    pub debug_regs: kvm_debugregs,
    pub lapic: Box<kvm_lapic_state>,
    /// In the order in which they are set; IA32_TSC is among them, IA32_TSC_DEADLINE comes last.
    pub msrs: Vec<kvm_msr_entry>,
    pub events: kvm_vcpu_events,
}
