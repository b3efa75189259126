//! The smallest VM: raw KVM with a few bytes of guest code. What nothing built on KVM can be faster than (the
//! bench's floor), and how fast this KVM runs kernel mode (the doctor).
//!
//! The guest runs in flat 32-bit protected mode at ring 0 without paging (Intel SDM volume 3, 9.9), because that is the least
//! that every KVM runs the way it runs kernels.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit};

/// Where the guest says that it is done.
const DONE_PORT: u8 = 0xf4;
/// Pins of the IOAPIC that would be outside of KVM.
const IOAPIC_PINS: u64 = 24;

/// A guest that says that it is done at once: `out 0xf4, al; hlt`.
pub const SAY_DONE: [u8; 3] = [0xe6, DONE_PORT, 0xf4];

/// A guest that counts `rounds` down before: two instructions a round.
/// `mov ecx, rounds; 1: dec ecx; jnz 1b; out 0xf4, al; hlt`.
pub fn count_down(rounds: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend_from_slice(&rounds.to_le_bytes());
    code.extend_from_slice(&[0x49, 0x75, 0xfd]);
    code.extend_from_slice(&SAY_DONE);
    code
}

/// KVM and what is asked of it once.
pub struct Tiny {
    kvm: Kvm,
    cpuid: CpuId,
}

/// A private mapping of a file, or anonymous memory.
struct Memory {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Memory {
    fn map(file: Option<RawFd>, bytes: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let flags = match file {
            Some(_) => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing of ours.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file.unwrap_or(-1), 0) };
        if address == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { address, bytes })
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; the VM that used it is gone (see `run`).
        unsafe {
            libc::munmap(self.address, self.bytes);
        }
    }
}

impl Tiny {
    pub fn new() -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm cannot be opened; `coldspark doctor` tells more")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        Ok(Self { kvm, cpuid })
    }

    /// Runs `code` in fresh memory until it says that it is done; the time is that of running it alone.
    pub fn time_code(&self, code: &[u8]) -> anyhow::Result<Duration> {
        let memory = Memory::map(None, 2 << 20)?;
        if code.len() > memory.bytes {
            bail!("{} bytes of code do not fit", code.len());
        }
        // SAFETY: the mapping is writable, larger than the code, and not used by anybody yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.address.cast(), code.len()) };
        Ok(self.run(&memory)?.1)
    }

    /// The floor of a restore: map `file`, make a VM of it, run it to its first output. The file holds the code at its start. The
    /// time begins before the mapping and ends with the output; taking the VM apart is not in it.
    pub fn restore(&self, file: &File, bytes: u64) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let memory = Memory::map(Some(file.as_raw_fd()), bytes)?;
        let (end, _) = self.run(&memory)?;
        Ok(end - begin)
    }

    /// Gives the moment of the output, and how long the guest ran.
    fn run(&self, memory: &Memory) -> anyhow::Result<(Instant, Duration)> {
        let vm = self.kvm.create_vm().context("KVM_CREATE_VM")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.bytes as u64,
            userspace_addr: memory.address as u64,
        };
        // SAFETY: the mapping outlives the VM: `vm` is dropped before this returns, and `memory` is borrowed.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        let irqchip =
            kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [IOAPIC_PINS, 0, 0, 0], ..Default::default() };
        vm.enable_cap(&irqchip).context("KVM_CAP_SPLIT_IRQCHIP")?;
        let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&self.cpuid).context("KVM_SET_CPUID2")?;
        let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x08, type_: 11, ..flat };
        let data = kvm_segment { selector: 0x10, type_: 3, ..flat };
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
        (regs.rip, regs.rflags, regs.rsp) = (0, 2, 0x1000);
        vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
        let begin = Instant::now();
        match vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(port, _) if port == u16::from(DONE_PORT) => {
                let end = Instant::now();
                Ok((end, end - begin))
            }
            other => bail!("the tiny guest ended otherwise than it should: {other:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loop_jumps_to_its_decrement() {
        let code = count_down(0x0102_0304);
        assert_eq!(code, [0xb9, 4, 3, 2, 1, 0x49, 0x75, 0xfd, 0xe6, 0xf4, 0xf4]);
    }
}
