//! What this host's KVM offers, asked once in a process.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

use super::x86::cpuid;

/// The version of the API that has not changed since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// What has to be there: capability, and the kernel that brought it.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP (Linux 4.5)"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT (Linux 4.13)"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Why this host cannot run VMs.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("KVM's API has version {0}, {API_VERSION} is needed: is this file /dev/kvm?")]
    Version(i32),
    #[error("this host's KVM lacks {0}: use a newer kernel")]
    Lacks(&'static str),
    #[error("KVM: {0}")]
    Kvm(#[from] errno::Error),
}

/// KVM and its constants.
pub struct Host {
    pub kvm: Kvm,
    pub supported_cpuid: CpuId,
    pub msr_indices: Arc<[u32]>,
}

impl Host {
    /// Takes an open `/dev/kvm` and checks that it has all that is needed.
    pub fn new(dev_kvm: File) -> Result<Self, HostError> {
        // SAFETY: the descriptor is owned by `dev_kvm` and passes to the Kvm.
        let kvm = unsafe { Kvm::from_raw_fd(dev_kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(HostError::Version(version));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(HostError::Lacks(name));
        }
        let supported_cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let msr_indices = kvm.get_msr_index_list()?.as_slice().into();
        Ok(Host { kvm, supported_cpuid, msr_indices })
    }

    /// For tests that take a KVM; `None`: this machine has none, which is told.
    #[cfg(test)]
    pub fn for_tests() -> Option<Self> {
        let file = File::options().read(true).write(true).open("/dev/kvm");
        let host = file.map_err(|error| error.to_string());
        match host.and_then(|file| Host::new(file).map_err(|error| error.to_string())) {
            Ok(host) => Some(host),
            Err(why) => {
                eprintln!("ignored: no usable /dev/kvm: {why}");
                None
            }
        }
    }

    /// What a guest on this host is really shown: set on a vCPU made for the question and read back. A KVM that cannot
    /// trap the instruction (kvm-pvm) shows the processor's own features besides those that were set.
    pub fn shown_cpuid(&self) -> Result<CpuId, HostError> {
        let vm = self.kvm.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&self.supported_cpuid, 0, 1, vcpu.get_tsc_khz()?))?;
        Ok(vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?)
    }
}
