//! What of KVM is there, and how it runs kernel mode.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use kvm_ioctls::{Cap, Kvm};

use super::Finding;
use crate::cli::tiny::{Tiny, count_down};

/// The version of KVM's API since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Rounds of two instructions: a sixth of a second where they are emulated.
const ROUNDS: u32 = 50_000;
/// Emulators are far below, processors far above.
const NATIVE_MIPS_MIN: f64 = 20.0;

/// Capabilities that a VM or its snapshot cannot do without.
const NEEDED: [(Cap, &str); 16] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::SplitIrqchip, "SPLIT_IRQCHIP (Linux 4.5)"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::IrqRouting, "IRQ_ROUTING"),
    (Cap::SignalMsi, "SIGNAL_MSI"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT (Linux 4.13)"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::GetTscKhz, "GET_TSC_KHZ"),
];

pub fn check() -> Vec<Finding> {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(finding) => return vec![finding],
    };
    let mut findings = vec![Finding::ok("kvm", "/dev/kvm is there and may be used")];
    findings.push(match kvm.get_api_version() {
        API_VERSION => Finding::ok("kvm api", format!("version {API_VERSION}")),
        other => Finding::fail(
            "kvm api",
            format!("version {other}, {API_VERSION} is needed"),
            "use the kernel's own /dev/kvm",
        ),
    });
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
    findings.push(match missing.is_empty() {
        true => Finding::ok("kvm capabilities", format!("all {} that are needed", NEEDED.len())),
        false => Finding::fail(
            "kvm capabilities",
            format!("without {}", missing.join(", ")),
            "use a newer host kernel (6.1 or later is tested)",
        ),
    });
    findings.push(kernel_mode());
    findings
}

fn open() -> Result<Kvm, Finding> {
    let failed = |found: String, advice: &str| Finding::fail("kvm", found, advice);
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Err(match error.kind() {
            ErrorKind::NotFound => failed(
                "/dev/kvm is not there".into(),
                "load the module (modprobe kvm_amd or kvm_intel); if that fails, switch virtualization on in the firmware, or nested virtualization in the host of this VM",
            ),
            ErrorKind::PermissionDenied => failed(
                "/dev/kvm may not be used by this user".into(),
                "add the user to the group that owns it (usermod -aG kvm NAME) and log in again",
            ),
            _ => failed(format!("/dev/kvm cannot be opened: {error}"), "see the kernel's log (dmesg)"),
        });
    }
    Kvm::new()
        .map_err(|error| failed(format!("/dev/kvm cannot be used: {error}"), "see the kernel's log (dmesg)"))
}

/// Times a tight ring-0 loop.
fn kernel_mode() -> Finding {
    const NAME: &str = "kernel mode";
    let measured = Tiny::new().and_then(|tiny| tiny.time_code(&count_down(ROUNDS)));
    let time = match measured {
        Ok(time) => time,
        Err(error) => {
            return Finding::fail(
                NAME,
                format!("a test VM does not run: {error:#}"),
                "see the kernel's log (dmesg)",
            );
        }
    };
    let mips = f64::from(ROUNDS) * 2.0 / time.as_secs_f64().max(1e-9) / 1e6;
    if mips >= NATIVE_MIPS_MIN {
        Finding::ok(NAME, format!("runs natively ({mips:.0} million instructions a second in ring 0)"))
    } else {
        Finding::warn(
            NAME,
            format!("is emulated by this KVM ({mips:.1} million instructions a second in ring 0)"),
            "the embedded test guest runs well here, but FreeBSD and Linux kernels will be very slow or stop at an instruction that is not emulated: for them use a host with AMD-V or VT-x of its own, or nested",
        )
    }
}
