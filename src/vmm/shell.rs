//! The parts of a machine that can be made before it is known which one it will be, and before its memory is there.
//!
//! ```text
//!   EmptyVm --with_slots--> Slotted --(expect)--> Slotted --with_memory--> Shell --> Machine::boot, Prepared::new
//! ```
//!
//! A VM with its split irqchip and boot CPU comes first, so memory slots are made last: with a split irqchip that is as cheap as the
//! other order (with KVM's own it costs milliseconds). Slots are made on reserved address space; what is mapped there later is what
//! the guest sees.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_cpuid_entry2, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};

use super::chipset::ioapic::{self, IoApic};
use super::chipset::pci::intx_pin;
use super::chipset::power::SCI;
use super::chipset::{AGENT_PIN, PIT_PIN, SERIAL_PIN};
use super::host::Host;
use super::machine::{MachineError, SLOT_PINS, VCPUS_MAX, call};
use super::memory::Ram;
use super::vcpu_state;
use super::x86::cpuid;
use crate::snapshot::state::chipset::{AgentPortState, ChipsetState};
use crate::snapshot::state::file::StateFile;
use crate::snapshot::state::machine::{MachineState, RegionState};
use crate::snapshot::state::pc::PcState;
use crate::snapshot::state::vcpu::VcpuState;

/// Intel's KVM keeps a task state and a page table in guest space for real mode; below the I/O APIC nothing else lives.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A KVM VM with a split interrupt chip, the boot CPU and no memory.
pub struct EmptyVm {
    vm: VmFd,
    boot_cpu: VcpuFd,
}

impl EmptyVm {
    pub fn new(host: &Host) -> Result<Self, MachineError> {
        let vm = host.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        if cpuid::vendor(&host.supported_cpuid) == "GenuineIntel" {
            vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
            vm.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        }
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = ioapic::PINS as u64;
        vm.enable_cap(&split).map_err(call("KVM_CAP_SPLIT_IRQCHIP"))?;
        let boot_cpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        Ok(EmptyVm { vm, boot_cpu })
    }

    /// Makes a memory slot for each region, on the address space at the pointer beside it, which is only reserved so far.
    pub fn with_slots(self, places: Vec<(RegionState, *mut u8)>) -> Result<Slotted, MachineError> {
        let EmptyVm { vm, boot_cpu } = self;
        for (slot, (region, address)) in places.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.guest_address,
                memory_size: region.bytes,
                userspace_addr: address.addr() as u64,
            };
            // SAFETY: KVM uses a slot's memory only on behalf of vCPUs, and none of this VM is run, or told an address of its
            // memory, before `with_memory` has got, and keeps, a `Ram` at exactly these places.
            unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vm = Arc::new(vm);
        let ioapic = Arc::new(IoApic::new(vm.clone()));
        let places = places.into_iter().map(|(region, address)| (region, address.addr())).collect();
        Ok(Slotted { vm, ioapic, vcpus: vec![boot_cpu], cpuid: Vec::new(), places })
    }
}

/// A VM with memory slots, for which there need be no memory yet.
pub struct Slotted {
    vm: Arc<VmFd>,
    ioapic: Arc<IoApic>,
    /// The first ones, in order.
    vcpus: Vec<VcpuFd>,
    /// What those were told they are.
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Regions, and host addresses.
    places: Vec<(RegionState, usize)>,
}

impl Slotted {
    /// Does what [`Prepared::new`](super::machine::Prepared::new) with this state, or one like it, would have to do first and what is the same for
    /// every clone: vCPUs and their CPUID, interrupt lines and routes. Nothing that knows the time, and nothing that touches memory.
    pub fn expect(&mut self, state: &StateFile) -> Result<(), MachineError> {
        let machine: MachineState = state.get(0)?;
        if !(1..=VCPUS_MAX).contains(&machine.vcpus) {
            return Err(MachineError::Vcpus(machine.vcpus));
        }
        for index in 0..machine.vcpus {
            let at = usize::from(index);
            let saved: VcpuState = state.get(index.into())?;
            if self.vcpus.len() <= at {
                self.vcpus.push(create_vcpu(&self.vm, index)?);
            }
            if let Some(vcpu) = self.vcpus.get(at) {
                vcpu_state::set_cpuid(vcpu, &saved)
                    .map_err(|source| MachineError::VcpuState { index: at, source })?;
            }
            self.cpuid.push(saved.cpuid);
        }
        let chipset: ChipsetState = state.get(0)?;
        let devices = machine.devices.len();
        let pins: Vec<u8> = match state.get_if_there::<PcState>(0)? {
            Some(_) => (1..).take(devices.min(SLOT_PINS.len())).map(intx_pin).chain([SCI]).collect(),
            None => SLOT_PINS.iter().copied().take(devices).collect(),
        };
        let agent = state.get_if_there::<AgentPortState>(0)?.map(|_| AGENT_PIN);
        let pins = pins.into_iter().map(usize::from).chain([PIT_PIN, SERIAL_PIN]).chain(agent);
        self.ioapic.expect(&chipset.ioapic, pins).map_err(call("KVM_SET_GSI_ROUTING or KVM_IRQFD"))
    }

    /// The memory is there.
    ///
    /// # Errors
    /// [`MachineError::Mismatch`] if it lies elsewhere.
    pub fn with_memory(self, ram: Ram) -> Result<Shell, MachineError> {
        let there = ram.regions().map(|(region, address)| (region, address.addr()));
        if !there.eq(self.places.iter().copied()) {
            return Err(MachineError::Mismatch("memory at other places than the slots".into()));
        }
        let Slotted { vm, ioapic, mut vcpus, cpuid, places: _ } = self;
        vcpus.reverse();
        Ok(Shell { vm, ioapic, vcpus, cpuid, ram })
    }
}

fn create_vcpu(vm: &VmFd, index: u8) -> Result<VcpuFd, MachineError> {
    vm.create_vcpu(u64::from(index)).map_err(call("KVM_CREATE_VCPU"))
}

/// A VM with its memory.
pub struct Shell {
    vm: Arc<VmFd>,
    ioapic: Arc<IoApic>,
    /// Made ahead, the next one last.
    vcpus: Vec<VcpuFd>,
    cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    ram: Ram,
}

impl Shell {
    /// Puts `ram` into the VM.
    pub fn new(empty: EmptyVm, ram: Ram) -> Result<Self, MachineError> {
        empty.with_slots(ram.regions().collect())?.with_memory(ram)
    }

    /// vCPU `index`; to be asked for in ascending order, each once.
    pub(super) fn vcpu(&mut self, index: u8) -> Result<VcpuFd, MachineError> {
        match self.vcpus.pop() {
            Some(vcpu) => Ok(vcpu),
            None => create_vcpu(&self.vm, index),
        }
    }

    /// Another descriptor of a vCPU, for whoever sets it up while its thread has the first.
    pub(super) fn second(&self, vcpu: &VcpuFd) -> Result<VcpuFd, MachineError> {
        // SAFETY: a descriptor that lives through the call.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let second = vcpu.try_clone_to_owned().map_err(MachineError::Descriptors)?;
        // SAFETY: a vCPU's descriptor, and nobody else has this one.
        unsafe { self.vm.create_vcpu_from_rawfd(second.into_raw_fd()) }.map_err(call("a vCPU's shared page"))
    }

    /// Whether vCPU `index` was told ahead to be this processor.
    pub(super) fn has_cpuid(&self, index: usize, cpuid: &[kvm_cpuid_entry2]) -> bool {
        self.cpuid.get(index).is_some_and(|told| told == cpuid)
    }

    pub(super) fn vm(&self) -> Arc<VmFd> {
        self.vm.clone()
    }

    pub(super) fn ioapic(&self) -> Arc<IoApic> {
        self.ioapic.clone()
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// When all vCPUs that were made ahead have been asked for.
    pub(super) fn into_parts(self) -> Result<(Arc<VmFd>, Ram), MachineError> {
        match self.vcpus.len() {
            0 => Ok((self.vm, self.ram)),
            more => Err(MachineError::Mismatch(format!("{more} vCPUs more than it has were made ahead"))),
        }
    }
}
