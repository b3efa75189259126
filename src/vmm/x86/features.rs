//! Names of CPUID feature bits, for manifests and for telling a person what a host lacks.
//!
//! The names are those of Linux's `/proc/cpuinfo` where it has one. A bit with no name here is not compared between
//! hosts, so every bit that lets software use instructions or registers has to be in the table. Facts: Intel SDM
//! volume 2 (CPUID), AMD APM volume 3 appendix E, Linux `arch/x86/include/asm/cpufeatures.h` and `kvm_para.h`.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// The names of all features that `cpuid` shows, in the order of leaves and bits.
pub fn feature_names(cpuid: &CpuId) -> Vec<String> {
    let mut names = Vec::new();
    for (function, index, register, bits) in TABLE {
        let Some(entry) = cpuid.as_slice().iter().find(|e| e.function == *function && e.index == *index)
        else {
            continue;
        };
        let value = register.of(entry);
        names
            .extend(bits.iter().filter(|(bit, _)| value >> bit & 1 == 1).map(|(_, name)| (*name).to_owned()));
    }
    names
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Leaf, subleaf, register, and its bits with their names.
type Row = (u32, u32, Register, &'static [(u32, &'static str)]);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    (1, 0, Edx, &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"),
    ]),
    (1, 0, Ecx, &[
        (0, "sse3"), (1, "pclmulqdq"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (17, "pcid"), (19, "sse4_1"),
        (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc_deadline"), (25, "aes"),
        (26, "xsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"), (31, "hypervisor"),
    ]),
    (6, 0, Eax, &[(2, "arat")]),
    (7, 0, Ebx, &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (6, "fdp_excptn_only"), (7, "smep"),
        (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"), (13, "zero_fcs_fds"), (14, "mpx"), (16, "avx512f"),
        (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"), (21, "avx512ifma"), (23, "clflushopt"),
        (24, "clwb"), (25, "intel_pt"), (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha_ni"),
        (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (7, 0, Ecx, &[
        (0, "prefetchwt1"), (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512_vbmi2"),
        (7, "shstk"), (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"),
        (14, "avx512_vpopcntdq"), (16, "la57"), (22, "rdpid"), (24, "bus_lock_detect"), (25, "cldemote"),
        (27, "movdiri"), (28, "movdir64b"),
    ]),
    (7, 0, Edx, &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (8, "avx512_vp2intersect"), (10, "md_clear"),
        (14, "serialize"), (16, "tsxldtrk"), (20, "ibt"), (22, "amx_bf16"), (23, "avx512_fp16"), (24, "amx_tile"),
        (25, "amx_int8"), (26, "spec_ctrl"), (27, "intel_stibp"), (28, "flush_l1d"), (29, "arch_capabilities"),
        (30, "core_capabilities"), (31, "ssbd"),
    ]),
    (7, 1, Eax, &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (4, "avx_vnni"), (5, "avx512_bf16"), (7, "cmpccxadd"), (10, "fzrm"),
        (11, "fsrs"), (12, "fsrc"), (17, "fred"), (18, "lkgs"), (19, "wrmsrns"), (21, "amx_fp16"), (23, "avx_ifma"),
        (26, "lam"),
    ]),
    (7, 1, Edx, &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (8, "amx_complex"), (10, "avx_vnni_int16"), (14, "prefetchi"),
        (19, "avx10"),
    ]),
    (7, 2, Edx, &[
        (0, "psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (3, "ddpd_u"), (4, "bhi_ctrl"), (5, "mcdt_no"),
    ]),
    (0xd, 0, Eax, &[
        (0, "xcr0_x87"), (1, "xcr0_sse"), (2, "xcr0_avx"), (3, "xcr0_bndregs"), (4, "xcr0_bndcsr"),
        (5, "xcr0_opmask"), (6, "xcr0_zmm_hi256"), (7, "xcr0_hi16_zmm"), (9, "xcr0_pkru"), (17, "xcr0_xtilecfg"),
        (18, "xcr0_xtiledata"), (19, "xcr0_apx"),
    ]),
    (0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (0xd, 1, Ecx, &[(8, "xss_pt"), (11, "xss_cet_u"), (12, "xss_cet_s"), (15, "xss_lbr")]),
    (0x4000_0001, 0, Eax, &[
        (0, "kvm_clocksource"), (1, "kvm_nop_io_delay"), (3, "kvm_clocksource2"), (5, "kvm_steal_time"),
        (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (11, "kvm_pv_send_ipi"),
        (12, "kvm_poll_control"), (13, "kvm_pv_sched_yield"), (16, "kvm_hc_map_gpa_range"),
        (17, "kvm_migration_control"), (24, "kvm_clocksource_stable"),
    ]),
    (0x8000_0001, 0, Edx, &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"),
        (30, "3dnowext"), (31, "3dnow"),
    ]),
    (0x8000_0001, 0, Ecx, &[
        (0, "lahf_lm"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"),
        (9, "osvw"), (11, "xop"), (12, "skinit"), (15, "lwp"), (16, "fma4"), (21, "tbm"), (22, "topoext"),
        (29, "mwaitx"),
    ]),
    (0x8000_0007, 0, Edx, &[(8, "invtsc")]),
    (0x8000_0008, 0, Ebx, &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"),
        (15, "amd_stibp"), (17, "stibp_always_on"), (24, "amd_ssbd"), (25, "virt_ssbd"), (26, "amd_ssb_no"),
        (28, "amd_psfd"),
    ]),
    (0x8000_0021, 0, Eax, &[
        (0, "no_nested_data_bp"), (2, "lfence_rdtsc"), (6, "null_sel_clr_base"), (8, "autoibrs"),
        (9, "no_smm_ctl_msr"), (11, "fsrs_amd"), (12, "fsrc_amd"), (20, "prefetchi_amd"), (27, "sbpb"),
        (28, "ibpb_brtype"), (29, "srso_no"),
    ]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_bits_are_bits() {
        let mut seen = HashSet::new();
        for (function, _, _, bits) in TABLE {
            for (bit, name) in *bits {
                assert!(*bit < 32, "{name} of leaf {function:#x}");
                assert!(seen.insert(*name), "{name} twice");
            }
        }
    }

    #[test]
    fn subleaves_are_told_apart() {
        let bit =
            |index| kvm_cpuid_entry2 { function: 7, index, eax: 1 << 4, ebx: 1 << 5, ..Default::default() };
        let cpuid = CpuId::from_entries(&[bit(1), bit(0)]).expect("two entries");
        assert_eq!(feature_names(&cpuid), ["avx2", "avx_vnni"]);
    }
}
