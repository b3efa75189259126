//! What a vCPU says of itself: CPUID made from what KVM supports, the same at cold boot and after every restore.
//!
//! Pure functions over [`CpuId`]. Facts: FREEBSD.md section 4 (which leaf FreeBSD reads for what), Intel SDM volume 2
//! (CPUID), AMD APM volume 3 appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`.
//!
//! The policy, beside the topology:
//! * The TSC's and LAPIC timer's frequencies are given in leaf 0x40000010, so that no guest has to measure them.
//! * Features whose state a snapshot does not carry are hidden: nested virtualisation, performance counters, processor trace, SGX, KVM's
//!   asynchronous page faults. So are MONITOR (idle must be HLT) and leaves 0x15/0x16, which name the host's own clock.
//! * Everything else is the host's; whether another host can do the same is asked with [`missing_on`].

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

pub use super::features::feature_names;

/// Frequency of KVM's local APIC timer in kHz, unless changed by `KVM_CAP_X86_APIC_BUS_CYCLES_NS`.
pub const LAPIC_TIMER_KHZ: u32 = 1_000_000;
/// Highest hypervisor leaf, the one with the frequencies.
pub const TIMING_LEAF: u32 = 0x4000_0010;

const SIGNATURE_LEAF: u32 = 0x4000_0000;
const FEATURES_LEAF: u32 = 0x4000_0001;
const EXTENDED_LEAF_MAX: u32 = 0x8000_0000;
/// "KVMKVMKVM\0\0\0" in EBX, ECX, EDX.
const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
/// Asynchronous page faults (bits 4, 10, 14): a fault told to the guest but not yet finished at the freeze would be
/// waited for forever by the clone. Bit 15, extended MSI destinations: our I/O APIC has 8-bit ones.
const KVM_FEATURES_HIDDEN: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 15;

/// CPUID of vCPU `index` of `vcpus` (one thread per core, one package, APIC id = index), made from KVM's supported
/// set. `tsc_khz` must be what `KVM_GET_TSC_KHZ` says of the vCPU.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8, tsc_khz: u32) -> CpuId {
    let mut leaves = Leaves::from(supported);
    let vcpus = vcpus.max(1);
    basic(&mut leaves, index, vcpus);
    topology(&mut leaves, index, vcpus);
    extended(&mut leaves, index, vcpus);
    hypervisor(&mut leaves, tsc_khz);
    leaves.into_cpuid()
}

/// Those of `needed` (from [`feature_names`] of a guest's CPUID) that a guest on this host would not have. A name that
/// this version does not know counts as missing: better refused than run wrongly.
pub fn missing_on(host: &CpuId, needed: &[String]) -> Vec<String> {
    // What for_vcpu adds by itself is there on every host, whether or not KVM lists it.
    let offered = feature_names(&for_vcpu(host, 0, 1, 1));
    needed.iter().filter(|name| !offered.contains(name)).cloned().collect()
}

/// The vendor string of leaf 0, such as "AuthenticAMD"; empty if there is no such leaf.
pub fn vendor(cpuid: &CpuId) -> String {
    let Some(leaf) = cpuid.as_slice().iter().find(|e| e.function == 0) else { return String::new() };
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
        .iter()
        .flat_map(|r| r.to_le_bytes())
        .filter(|b| b.is_ascii_graphic())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The TSC frequency that the guest was told, in kHz: EAX of leaf 0x40000010.
pub fn told_tsc_khz(cpuid: &CpuId) -> Option<u32> {
    cpuid.as_slice().iter().find(|e| e.function == TIMING_LEAF).map(|e| e.eax).filter(|khz| *khz != 0)
}

fn basic(leaves: &mut Leaves, index: u8, vcpus: u8) {
    let one = leaves.entry(1, None);
    one.ebx = one.ebx & 0x0000_ffff | u32::from(vcpus) << 16 | u32::from(index) << 24;
    one.ecx |= 1 << 31 | 1 << 24 | 1 << 21; // Hypervisor, TSC-deadline timer, x2APIC.
    one.ecx &= !(1 << 3 | 1 << 5); // MONITOR, VMX.
    set(&mut one.edx, 28, vcpus > 1);

    leaves.raise_max(0, 6);
    let six = leaves.entry(6, None);
    *six = kvm_cpuid_entry2 { function: 6, eax: 1 << 2, ..Default::default() }; // ARAT.

    leaves.each(7, |seven| {
        if seven.index == 0 {
            seven.ebx &= !(1 << 2 | 1 << 25); // SGX, processor trace.
            seven.ecx &= !(1 << 30); // SGX launch control.
        }
    });
    // Performance counters, SGX, processor trace, and the two frequency leaves.
    for function in [0xa, 0x12, 0x14, 0x15, 0x16] {
        leaves.clear(function);
    }
}

fn topology(leaves: &mut Leaves, index: u8, vcpus: u8) {
    let shift = core_shift(vcpus);
    // Cores as a field of APIC ids, minus one.
    let ids_max = (1u32 << shift) - 1;
    let caches = |cache: &mut kvm_cpuid_entry2| {
        let level = cache.eax >> 5 & 7;
        let sharing = if level >= 3 { ids_max } else { 0 };
        cache.eax = cache.eax & !(0xfff << 14) | sharing << 14;
    };
    leaves.each(4, |cache| {
        if cache.eax & 0x1f != 0 {
            caches(cache);
            cache.eax = cache.eax & !(0x3f << 26) | ids_max << 26;
        }
    });
    leaves.each(0x8000_001d, |cache| {
        if cache.eax & 0x1f != 0 {
            caches(cache);
        }
    });

    for function in [0xb, 0x1f] {
        if leaves.max(0) < function {
            continue;
        }
        leaves.remove(function);
        // Level type in ECX[15:8]: 1 threads, 2 cores, 0 the end.
        let levels = [(0, 1, 1), (shift, u32::from(vcpus), 2), (0, 0, 0)];
        for (level, (eax, ebx, kind)) in (0u32..).zip(levels) {
            *leaves.entry(function, Some(level)) = kvm_cpuid_entry2 {
                function,
                index: level,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: level | kind << 8,
                edx: u32::from(index),
                ..Default::default()
            };
        }
    }
}

fn extended(leaves: &mut Leaves, index: u8, vcpus: u8) {
    let amd = leaves.is_amd();
    leaves.raise_max(EXTENDED_LEAF_MAX, 0x8000_0008);
    let features = leaves.entry(0x8000_0001, None);
    // SVM, instruction based sampling, performance counter extensions.
    features.ecx &= !(1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28);
    if amd {
        set(&mut features.ecx, 1, vcpus > 1); // Cores are told the legacy way too.
    }
    let topology_extensions = features.ecx & 1 << 22 != 0;
    leaves.entry(0x8000_0007, None).edx |= 1 << 8; // Invariant TSC.
    if amd {
        let sizes = leaves.entry(0x8000_0008, None);
        sizes.ecx = sizes.ecx & !(0xf << 12 | 0xff) | core_shift(vcpus) << 12 | u32::from(vcpus - 1);
    }
    if amd && topology_extensions && leaves.max(EXTENDED_LEAF_MAX) >= 0x8000_001e {
        let id = leaves.entry(0x8000_001e, None);
        // Extended APIC id; core id with one thread per core; node 0 of 1.
        (id.eax, id.ebx, id.ecx, id.edx) = (u32::from(index), u32::from(index), 0, 0);
    }
    // SVM, instruction based sampling, SEV, performance monitoring version 2.
    for function in [0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022] {
        leaves.clear(function);
    }
}

fn hypervisor(leaves: &mut Leaves, tsc_khz: u32) {
    let features = leaves.get(FEATURES_LEAF).map_or(0, |e| e.eax) & !KVM_FEATURES_HIDDEN;
    // Only the leaves below: never Xen's or Hyper-V's, for which guests look at other bases.
    leaves.entries.retain(|e| !(0x4000_0000..=0x4fff_ffff).contains(&e.function));
    let [ebx, ecx, edx] = SIGNATURE;
    *leaves.entry(SIGNATURE_LEAF, None) =
        kvm_cpuid_entry2 { function: SIGNATURE_LEAF, eax: TIMING_LEAF, ebx, ecx, edx, ..Default::default() };
    *leaves.entry(FEATURES_LEAF, None) =
        kvm_cpuid_entry2 { function: FEATURES_LEAF, eax: features, ..Default::default() };
    *leaves.entry(TIMING_LEAF, None) =
        kvm_cpuid_entry2 { function: TIMING_LEAF, eax: tsc_khz, ebx: LAPIC_TIMER_KHZ, ..Default::default() };
}

/// Bits of an APIC id that tell the cores apart.
fn core_shift(vcpus: u8) -> u32 {
    u32::from(vcpus.max(1)).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

/// The entries while they are worked on.
struct Leaves {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Leaves {
    fn from(cpuid: &CpuId) -> Self {
        Leaves { entries: cpuid.as_slice().to_vec() }
    }

    fn get(&self, function: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| e.function == function)
    }

    /// The entry of a leaf (and subleaf), made if it is not there.
    fn entry(&mut self, function: u32, index: Option<u32>) -> &mut kvm_cpuid_entry2 {
        let wanted = |e: &kvm_cpuid_entry2| e.function == function && index.is_none_or(|i| e.index == i);
        let at = self.entries.iter().position(wanted).unwrap_or_else(|| {
            let flags = if index.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            let index = index.unwrap_or(0);
            self.entries.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
            self.entries.len() - 1
        });
        &mut self.entries[at] // `at` was found or pushed just above.
    }

    fn each(&mut self, function: u32, change: impl Fn(&mut kvm_cpuid_entry2)) {
        self.entries.iter_mut().filter(|e| e.function == function).for_each(change);
    }

    fn remove(&mut self, function: u32) {
        self.entries.retain(|e| e.function != function);
    }

    /// A leaf that is there and says nothing.
    fn clear(&mut self, function: u32) {
        let had = self.get(function).is_some();
        self.remove(function);
        if had {
            self.entry(function, None);
        }
    }

    /// The highest leaf of a range, which its first leaf's EAX tells.
    fn max(&self, range: u32) -> u32 {
        self.get(range).map_or(range, |e| e.eax)
    }

    fn raise_max(&mut self, range: u32, leaf: u32) {
        let first = self.entry(range, None);
        first.eax = first.eax.max(leaf);
    }

    fn is_amd(&self) -> bool {
        // "Auth" or "Hygo", the first word of the vendor string.
        self.get(0).is_some_and(|e| e.ebx == 0x6874_7541 || e.ebx == 0x6f67_7948)
    }

    fn into_cpuid(mut self) -> CpuId {
        if self.entries.len() > KVM_MAX_CPUID_ENTRIES {
            // KVM answers an absent leaf with zeros, so these say nothing.
            let keep_empty = |e: &kvm_cpuid_entry2| e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            self.entries.retain(|e| e.eax | e.ebx | e.ecx | e.edx != 0 || keep_empty(e));
        }
        // KVM itself gives at most as many as it takes; ours replace some and add fewer than ten.
        self.entries.truncate(KVM_MAX_CPUID_ENTRIES);
        CpuId::from_entries(&self.entries).unwrap_or_else(|_| unreachable!("truncated to the limit above"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn text(word: &[u8; 4]) -> u32 {
        u32::from_le_bytes(*word)
    }

    fn intel() -> CpuId {
        CpuId::from_entries(&[
            entry(0, 0, [0x1f, text(b"Genu"), text(b"ntel"), text(b"ineI")]),
            entry(1, 0, [0x806f8, 0x1122_0800, 1 << 30 | 1 << 3 | 1 << 5, 0x1f]),
            entry(4, 0, [0x0400_0121, 0, 0, 0]),
            entry(4, 1, [0x0400_0163, 0, 0, 0]),
            entry(4, 2, [0, 0, 0, 0]),
            entry(7, 0, [2, 1 << 2 | 1 << 16, 1 << 30, 0]),
            entry(0xa, 0, [0x0730_0405, 0, 0, 0x603]),
            entry(0xb, 0, [1, 2, 0x100, 0x55]),
            entry(0x15, 0, [2, 200, 25_000_000, 0]),
            entry(0x4000_0000, 0, [0x4000_0001, SIGNATURE[0], SIGNATURE[1], SIGNATURE[2]]),
            entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 1, 1 << 29]),
        ])
        .expect("few entries")
    }

    fn amd() -> CpuId {
        CpuId::from_entries(&[
            entry(0, 0, [0x10, text(b"Auth"), text(b"cAMD"), text(b"enti")]),
            entry(1, 0, [0xa20f10, 0, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_001f, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, 1 << 22 | 1 << 2 | 1 << 23, 0]),
            entry(0x8000_0008, 0, [0x3030, 0, 0x7007, 0]),
            entry(0x8000_000a, 0, [1, 8, 0, 0xf]),
            entry(0x8000_001d, 3, [0x0000_0163, 0, 0, 0]),
            entry(0x8000_001e, 0, [9, 9, 9, 9]),
        ])
        .expect("few entries")
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = cpuid.as_slice().iter().filter(|e| e.function == function && e.index == index);
        let first = *found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        first
    }

    #[test]
    fn freebsd_finds_its_frequencies() {
        let cpuid = for_vcpu(&intel(), 0, 1, 2_400_000);
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(leaf(&cpuid, 0x4000_0000, 0).ebx.to_le_bytes(), *b"KVMK");
        let timing = leaf(&cpuid, 0x4000_0010, 0);
        assert_eq!((timing.eax, timing.ebx), (2_400_000, 1_000_000));
        assert_eq!(told_tsc_khz(&cpuid), Some(2_400_000));
        let one = leaf(&cpuid, 1, 0);
        assert_eq!(one.ecx >> 31 & one.ecx >> 24 & one.ecx >> 21 & one.ecx >> 30 & 1, 1);
        assert_eq!(one.ecx & (1 << 3 | 1 << 5), 0);
        assert_eq!(leaf(&cpuid, 6, 0).eax, 4);
        assert_eq!(leaf(&cpuid, 0x8000_0007, 0).edx, 1 << 8);
        assert_eq!(leaf(&cpuid, 0x15, 0).ecx, 0);
    }

    #[test]
    fn what_a_snapshot_cannot_carry_is_hidden() {
        let cpuid = for_vcpu(&intel(), 0, 2, 1);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 7, 0).ebx, 1 << 16);
        assert_eq!(leaf(&cpuid, 7, 0).ecx, 0);
        let features = leaf(&cpuid, 0x4000_0001, 0).eax;
        assert_eq!(features & KVM_FEATURES_HIDDEN, 0);
        assert_eq!(features & (1 | 1 << 3 | 1 << 24), 1 | 1 << 3 | 1 << 24);
        let cpuid = for_vcpu(&amd(), 0, 2, 1);
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx, 1 << 22 | 1 << 1);
        assert_eq!(leaf(&cpuid, 0x8000_000a, 0).edx, 0);
    }

    #[test]
    fn rdrand_only_if_the_host_has_it() {
        assert_ne!(leaf(&for_vcpu(&intel(), 0, 1, 1), 1, 0).ecx & 1 << 30, 0);
        assert_eq!(leaf(&for_vcpu(&amd(), 0, 1, 1), 1, 0).ecx & 1 << 30, 0);
    }

    #[test]
    fn intel_topology_is_one_thread_per_core() {
        let cpuid = for_vcpu(&intel(), 3, 6, 1);
        let one = leaf(&cpuid, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.ebx & 0xffff), (3, 6, 0x0800));
        assert_eq!(one.edx >> 28 & 1, 1);
        for function in [0xb, 0x1f] {
            let threads = leaf(&cpuid, function, 0);
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 3));
            let cores = leaf(&cpuid, function, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 3));
            assert_eq!(leaf(&cpuid, function, 2).ebx, 0);
        }
        let l1 = leaf(&cpuid, 4, 0).eax;
        assert_eq!((l1 >> 26, l1 >> 14 & 0xfff), (7, 0));
        let l3 = leaf(&cpuid, 4, 1).eax;
        assert_eq!((l3 >> 26, l3 >> 14 & 0xfff), (7, 7));
        assert_eq!(leaf(&cpuid, 4, 2).eax, 0);
        assert_eq!(leaf(&for_vcpu(&intel(), 0, 1, 1), 1, 0).edx >> 28 & 1, 0);
    }

    #[test]
    fn amd_topology_is_one_thread_per_core() {
        let cpuid = for_vcpu(&amd(), 2, 4, 1);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 3);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).eax, 0x3030);
        let id = leaf(&cpuid, 0x8000_001e, 0);
        assert_eq!((id.eax, id.ebx, id.ecx, id.edx), (2, 2, 0, 0));
        assert_eq!(leaf(&cpuid, 0x8000_001d, 3).eax >> 14 & 0xfff, 3);
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x1f), "leaf above the host's highest");
    }

    #[test]
    fn all_vcpus_differ_in_nothing_but_their_id() {
        let names: Vec<_> = (0..4).map(|i| feature_names(&for_vcpu(&intel(), i, 4, 1))).collect();
        assert!(names.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn missing_features_are_named() {
        let guest = feature_names(&for_vcpu(&intel(), 0, 1, 1));
        assert!(guest.contains(&"avx512f".to_owned()) && guest.contains(&"invtsc".to_owned()));
        assert!(missing_on(&intel(), &guest).is_empty());
        let missing = missing_on(&amd(), &guest);
        assert!(missing.contains(&"avx512f".to_owned()) && missing.contains(&"rdrand".to_owned()));
        assert!(!missing.contains(&"tsc_deadline".to_owned()), "given by KVM on every host");
        assert_eq!(missing_on(&intel(), &["warp-drive".to_owned()]), ["warp-drive"]);
    }

    #[test]
    fn vendor_is_readable() {
        assert_eq!(vendor(&intel()), "GenuineIntel");
        assert_eq!(vendor(&amd()), "AuthenticAMD");
        assert_eq!(vendor(&CpuId::new(0).expect("empty")), "");
    }

    proptest! {
        #[test]
        fn any_supported_set_gives_a_valid_one(
            words in prop::collection::vec((any::<u8>(), 0u32..4, any::<[u32; 4]>()), 0..256),
            index in any::<u8>(), vcpus in any::<u8>(), khz in any::<u32>(),
        ) {
            let entries: Vec<_> = words
                .iter()
                .map(|(f, i, regs)| {
                    let base = [0, 0x4000_0000, 0x8000_0000][usize::from(*f) % 3];
                    entry(base + u32::from(f / 3), *i, *regs)
                })
                .collect();
            let supported = CpuId::from_entries(&entries).expect("at most 256");
            let cpuid = for_vcpu(&supported, index, vcpus, khz);
            prop_assert!(cpuid.as_slice().len() <= KVM_MAX_CPUID_ENTRIES);
            let _ = (feature_names(&cpuid), vendor(&cpuid), missing_on(&supported, &[]));
        }
    }
}
