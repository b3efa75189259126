//! Numbers of the ioctl requests that a worker makes, and which thread makes which.
//!
//! Facts: linux/kvm.h, linux/userfaultfd.h, linux/if_tun.h, asm-generic/ioctl.h. The request is 32 bits wide in the kernel.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_enable_cap, kvm_irq_routing, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msi, kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

const KVM: u32 = 0xae;
const UFFD: u32 = 0xaa;

/// `_IOC`.
const fn request(direction: u32, kind: u32, number: u32, bytes: usize) -> u32 {
    direction << 30 | (bytes as u32) << 16 | kind << 8 | number
}

const fn kvm(number: u32) -> u32 {
    request(0, KVM, number, 0)
}

const fn kvm_write<T>(number: u32) -> u32 {
    request(1, KVM, number, size_of::<T>())
}

const fn kvm_read<T>(number: u32) -> u32 {
    request(2, KVM, number, size_of::<T>())
}

const fn kvm_both<T>(number: u32) -> u32 {
    request(3, KVM, number, size_of::<T>())
}

pub const KVM_RUN: u32 = kvm(0x80);
pub const KVM_SIGNAL_MSI: u32 = kvm_write::<kvm_msi>(0xa5);
pub const KVM_SET_GSI_ROUTING: u32 = kvm_write::<kvm_irq_routing>(0x6a);
pub const KVM_IRQFD: u32 = kvm_write::<kvm_irqfd>(0x76);
pub const KVM_GET_REGS: u32 = kvm_read::<kvm_regs>(0x81);
pub const KVM_SET_REGS: u32 = kvm_write::<kvm_regs>(0x82);
pub const KVM_GET_SREGS: u32 = kvm_read::<kvm_sregs>(0x83);
pub const KVM_SET_SREGS: u32 = kvm_write::<kvm_sregs>(0x84);
pub const KVM_GET_MSRS: u32 = kvm_both::<kvm_msrs>(0x88);
pub const KVM_SET_MSRS: u32 = kvm_write::<kvm_msrs>(0x89);
pub const KVM_GET_LAPIC: u32 = kvm_read::<kvm_lapic_state>(0x8e);
pub const KVM_SET_LAPIC: u32 = kvm_write::<kvm_lapic_state>(0x8f);
pub const KVM_SET_CPUID2: u32 = kvm_write::<kvm_cpuid2>(0x90);
pub const KVM_GET_CPUID2: u32 = kvm_both::<kvm_cpuid2>(0x91);
pub const KVM_GET_MP_STATE: u32 = kvm_read::<kvm_mp_state>(0x98);
pub const KVM_SET_MP_STATE: u32 = kvm_write::<kvm_mp_state>(0x99);
pub const KVM_GET_VCPU_EVENTS: u32 = kvm_read::<kvm_vcpu_events>(0x9f);
pub const KVM_SET_VCPU_EVENTS: u32 = kvm_write::<kvm_vcpu_events>(0xa0);
pub const KVM_GET_DEBUGREGS: u32 = kvm_read::<kvm_debugregs>(0xa1);
pub const KVM_SET_DEBUGREGS: u32 = kvm_write::<kvm_debugregs>(0xa2);
pub const KVM_SET_TSC_KHZ: u32 = kvm(0xa2);
pub const KVM_GET_TSC_KHZ: u32 = kvm(0xa3);
pub const KVM_GET_XSAVE: u32 = kvm_read::<kvm_xsave>(0xa4);
pub const KVM_SET_XSAVE: u32 = kvm_write::<kvm_xsave>(0xa5);
pub const KVM_GET_XCRS: u32 = kvm_read::<kvm_xcrs>(0xa6);
pub const KVM_SET_XCRS: u32 = kvm_write::<kvm_xcrs>(0xa7);
pub const KVM_GET_API_VERSION: u32 = kvm(0x00);
pub const KVM_CREATE_VM: u32 = kvm(0x01);
pub const KVM_GET_MSR_INDEX_LIST: u32 = kvm_both::<kvm_msr_list>(0x02);
pub const KVM_CHECK_EXTENSION: u32 = kvm(0x03);
pub const KVM_GET_VCPU_MMAP_SIZE: u32 = kvm(0x04);
pub const KVM_GET_SUPPORTED_CPUID: u32 = kvm_both::<kvm_cpuid2>(0x05);
pub const KVM_CREATE_VCPU: u32 = kvm(0x41);
pub const KVM_SET_USER_MEMORY_REGION: u32 = kvm_write::<kvm_userspace_memory_region>(0x46);
pub const KVM_SET_TSS_ADDR: u32 = kvm(0x47);
pub const KVM_SET_IDENTITY_MAP_ADDR: u32 = kvm_write::<u64>(0x48);
pub const KVM_SET_CLOCK: u32 = kvm_write::<kvm_clock_data>(0x7b);
pub const KVM_GET_CLOCK: u32 = kvm_read::<kvm_clock_data>(0x7c);
pub const KVM_ENABLE_CAP: u32 = kvm_write::<kvm_enable_cap>(0xa3);

/// `USERFAULTFD_IOC_NEW`, on `/dev/userfaultfd`.
pub const USERFAULTFD_NEW: u32 = request(0, UFFD, 0, 0);
pub const UFFDIO_API: u32 = request(3, UFFD, 0x3f, 24);
pub const UFFDIO_REGISTER: u32 = request(3, UFFD, 0x00, 32);
pub const UFFDIO_WAKE: u32 = request(2, UFFD, 0x02, 16);

pub const TUNGETIFF: u32 = libc::TUNGETIFF as u32;
pub const TUNGETVNETHDRSZ: u32 = libc::TUNGETVNETHDRSZ as u32;
pub const TUNSETOFFLOAD: u32 = libc::TUNSETOFFLOAD as u32;
pub const FIONBIO: u32 = libc::FIONBIO as u32;

/// A vCPU's thread; those that it makes all the time come first, because a filter looks at them in this order.
pub const VCPU: &[u32] = &[
    KVM_RUN,
    KVM_SIGNAL_MSI,
    KVM_SET_GSI_ROUTING,
    KVM_IRQFD,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_VCPU_EVENTS,
    KVM_GET_LAPIC,
    KVM_GET_MP_STATE,
    KVM_GET_MSRS,
    KVM_GET_XSAVE,
    KVM_GET_XCRS,
    KVM_GET_DEBUGREGS,
    KVM_GET_TSC_KHZ,
    KVM_GET_CPUID2,
    TUNSETOFFLOAD,
];

/// The device thread.
pub const DEVICES: &[u32] = &[KVM_SIGNAL_MSI, KVM_SET_GSI_ROUTING, KVM_IRQFD, TUNSETOFFLOAD];

/// The thread that takes requests; and all others, which are started by it.
pub const CONTROL: &[u32] = &[
    KVM_RUN,
    KVM_SIGNAL_MSI,
    // On the road of a clone.
    KVM_SET_MSRS,
    KVM_SET_LAPIC,
    KVM_SET_CLOCK,
    KVM_SET_VCPU_EVENTS,
    KVM_SET_MP_STATE,
    KVM_GET_TSC_KHZ,
    KVM_SET_GSI_ROUTING,
    KVM_IRQFD,
    // Before it.
    KVM_SET_SREGS,
    KVM_SET_REGS,
    KVM_SET_XCRS,
    KVM_SET_XSAVE,
    KVM_SET_DEBUGREGS,
    KVM_SET_CPUID2,
    KVM_SET_TSC_KHZ,
    KVM_GET_MSRS,
    KVM_CREATE_VM,
    KVM_CHECK_EXTENSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_ENABLE_CAP,
    KVM_CREATE_VCPU,
    KVM_SET_TSS_ADDR,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_USER_MEMORY_REGION,
    FIONBIO,
    UFFDIO_REGISTER,
    UFFDIO_WAKE,
    TUNGETIFF,
    TUNGETVNETHDRSZ,
    TUNSETOFFLOAD,
    // What a snapshot or a look asks.
    KVM_GET_CLOCK,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_VCPU_EVENTS,
    KVM_GET_LAPIC,
    KVM_GET_MP_STATE,
    KVM_GET_XSAVE,
    KVM_GET_XCRS,
    KVM_GET_DEBUGREGS,
    KVM_GET_CPUID2,
    // What a worker asks of a host.
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_MSR_INDEX_LIST,
    KVM_GET_API_VERSION,
];

/// Only until the jail is closed.
pub const BEFORE: &[u32] = &[USERFAULTFD_NEW, UFFDIO_API];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    /// The methods of kvm-ioctls by which the machine talks to KVM, and what they request.
    const METHODS: &[(&str, u32)] = &[
        ("get_api_version", KVM_GET_API_VERSION),
        ("create_vm", KVM_CREATE_VM),
        ("get_msr_index_list", KVM_GET_MSR_INDEX_LIST),
        ("check_extension", KVM_CHECK_EXTENSION),
        ("get_supported_cpuid", KVM_GET_SUPPORTED_CPUID),
        ("create_vcpu", KVM_CREATE_VCPU),
        ("set_user_memory_region", KVM_SET_USER_MEMORY_REGION),
        ("set_tss_address", KVM_SET_TSS_ADDR),
        ("set_identity_map_address", KVM_SET_IDENTITY_MAP_ADDR),
        ("set_clock", KVM_SET_CLOCK),
        ("get_clock", KVM_GET_CLOCK),
        ("enable_cap", KVM_ENABLE_CAP),
        ("signal_msi", KVM_SIGNAL_MSI),
        ("set_gsi_routing", KVM_SET_GSI_ROUTING),
        ("register_irqfd", KVM_IRQFD),
        ("get_regs", KVM_GET_REGS),
        ("set_regs", KVM_SET_REGS),
        ("get_sregs", KVM_GET_SREGS),
        ("set_sregs", KVM_SET_SREGS),
        ("get_msrs", KVM_GET_MSRS),
        ("set_msrs", KVM_SET_MSRS),
        ("get_lapic", KVM_GET_LAPIC),
        ("set_lapic", KVM_SET_LAPIC),
        ("get_cpuid2", KVM_GET_CPUID2),
        ("set_cpuid2", KVM_SET_CPUID2),
        ("get_mp_state", KVM_GET_MP_STATE),
        ("set_mp_state", KVM_SET_MP_STATE),
        ("get_vcpu_events", KVM_GET_VCPU_EVENTS),
        ("set_vcpu_events", KVM_SET_VCPU_EVENTS),
        ("get_debug_regs", KVM_GET_DEBUGREGS),
        ("set_debug_regs", KVM_SET_DEBUGREGS),
        ("get_tsc_khz", KVM_GET_TSC_KHZ),
        ("set_tsc_khz", KVM_SET_TSC_KHZ),
        ("get_xsave", KVM_GET_XSAVE),
        ("set_xsave", KVM_SET_XSAVE),
        ("get_xcrs", KVM_GET_XCRS),
        ("set_xcrs", KVM_SET_XCRS),
    ];

    /// Those that request something else, or nothing.
    const OTHERS: &[&str] = &[
        "create_irq_chip",
        "get_irqchip",
        "set_irqchip",
        "create_pit2",
        "get_pit2",
        "set_pit2",
        "register_ioevent",
        "unregister_ioevent",
        "unregister_irqfd",
        "get_dirty_log",
        "get_fpu",
        "set_fpu",
        "get_xsave2",
        "set_xsave2",
        "translate_gva",
        "kvmclock_ctrl",
        "nmi",
        "smi",
        "set_guest_debug",
        "get_nested_state",
        "set_nested_state",
        "create_device",
        "set_device_attr",
        "get_device_attr",
        "has_device_attr",
        "set_user_memory_region2",
        "create_guest_memfd",
        "set_memory_attributes",
        "reset_dirty_rings",
        "set_signal_mask",
        "tpr_access_reporting",
        "get_emulated_cpuid",
        "get_msr_feature_index_list",
        "get_nr_vcpus",
        "get_max_vcpus",
        "set_irq_line",
        "set_msr_filter",
        "check_extension_int",
        "set_boot_cpu_id",
        "get_msr_filter",
    ];

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn every_request_of_the_machine_is_allowed() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/vmm"), &mut files);
        let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
        for name in OTHERS {
            assert!(
                !text.contains(&format!(".{name}(")),
                "{name} is used now: put its request into the lists and into METHODS"
            );
        }
        let used: BTreeSet<&str> = METHODS
            .iter()
            .filter(|(name, _)| text.contains(&format!(".{name}(")))
            .map(|(name, request)| {
                assert!(CONTROL.contains(request), "{name} ({request:#x}) is not allowed");
                *name
            })
            .collect();
        assert_eq!(used.len(), METHODS.len(), "not used any more: take it off the lists");
        // What is made by other names: the run itself, its page's size, userfaultfd, TAPs, sockets.
        for request in [
            KVM_RUN,
            KVM_GET_VCPU_MMAP_SIZE,
            UFFDIO_REGISTER,
            UFFDIO_WAKE,
            TUNGETIFF,
            TUNGETVNETHDRSZ,
            TUNSETOFFLOAD,
            FIONBIO,
        ] {
            assert!(CONTROL.contains(&request));
        }
    }

    #[test]
    fn threads_may_do_only_what_the_one_that_starts_them_may() {
        // A thread's filter comes on top of that of its starter.
        for request in VCPU.iter().chain(DEVICES) {
            assert!(CONTROL.contains(request), "{request:#x}");
        }
        assert!(BEFORE.iter().all(|request| !CONTROL.contains(request)));
        let unique: BTreeSet<&u32> = CONTROL.iter().collect();
        assert_eq!(unique.len(), CONTROL.len());
    }

    #[test]
    fn numbers_are_those_of_the_kernels_headers() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_SET_LAPIC, 0x4400_ae8f);
        assert_eq!(KVM_GET_SUPPORTED_CPUID, 0xc008_ae05);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_aea3);
        assert_eq!(KVM_GET_XSAVE, 0x9000_aea4);
        assert_eq!(KVM_SET_GSI_ROUTING, 0x4008_ae6a);
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_WAKE, 0x8010_aa02);
        assert_eq!(USERFAULTFD_NEW, 0xaa00);
    }
}
