//! A machine on its way from a saved state: what stands still is set first, what time has a hold on last. In between it may wait, so
//! that clones can be made ahead.

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VcpuFd;

use super::{Frame, Machine, MachineError, NETWORKS_MAX, NetworkPart, Parts, VCPUS_MAX, call};
use crate::snapshot::state::chipset::{AgentPortState, ChipsetState};
use crate::snapshot::state::file::StateFile;
use crate::snapshot::state::machine::MachineState;
use crate::snapshot::state::pc::{EventState, PcState, VirtioPciState};
use crate::snapshot::state::vcpu::VcpuState;
use crate::snapshot::state::virtio::TransportState;
use crate::vmm::boot::{BootError, Hardware};
use crate::vmm::bus::{Pc, lock};
use crate::vmm::chipset::AgentPort;
use crate::vmm::host::Host;
use crate::vmm::shell::Shell;
use crate::vmm::vcpu_state;
use crate::vmm::virtio::net::link::Link;
use crate::vmm::x86::acpi;

/// A machine that is set to a saved state, but for what time has a hold on. It may wait for as long as one likes.
pub struct Prepared {
    machine: Machine,
    /// Second descriptors: the vCPUs' threads stand already.
    vcpus: Vec<VcpuFd>,
    saved: Vec<VcpuState>,
    clock_ns: u64,
    chipset: ChipsetState,
    agent: Option<AgentPortState>,
    pc: Option<SavedPc>,
}

impl Prepared {
    /// A new machine with what stands still of a saved state; its memory is the snapshot's. `done` hears the name of each step when it
    /// is done.
    pub fn new(
        host: &Host,
        mut shell: Shell,
        mut parts: Parts,
        state: &StateFile,
        done: &mut dyn FnMut(&'static str),
    ) -> Result<Self, MachineError> {
        let machine: MachineState = state.get(0)?;
        if !(1..=VCPUS_MAX).contains(&machine.vcpus) {
            return Err(MachineError::Vcpus(machine.vcpus));
        }
        if !shell.ram().regions().map(|(region, _)| region).eq(machine.memory.iter().copied()) {
            return Err(MachineError::Mismatch("other memory regions".into()));
        }
        let has = machine.devices.iter().filter(|name| *name == "net").count();
        if parts.networks.len() > has {
            return Err(MachineError::Links { given: parts.networks.len(), has });
        }
        // Interfaces for which nothing was given have no link. (More than there can be are refused below.)
        parts.networks.resize_with(has.min(NETWORKS_MAX), || NetworkPart { link: Link::Down, config: None });
        let pc: Option<PcState> = state.get_if_there(0)?;
        let agent: Option<AgentPortState> = state.get_if_there(0)?;
        parts.agent_port = if agent.is_some() { AgentPort::Serial } else { AgentPort::Virtio };
        let hardware = match &pc {
            Some(pc) => Hardware::Pc { transitional: pc.transitional },
            None => Hardware::Microvm,
        };
        let frame = Frame::new(&shell, parts, hardware)?;
        let names: Vec<&str> = frame.bus.virtio.iter().map(|device| lock(device).device_name()).collect();
        if names != machine.devices {
            return Err(MachineError::Mismatch(format!(
                "it has the devices {:?}, this machine {names:?}",
                machine.devices
            )));
        }
        done("devices");
        let saved = (0..u32::from(machine.vcpus))
            .map(|index| state.get::<VcpuState>(index))
            .collect::<Result<Vec<_>, _>>()?;
        let vcpus = (0..machine.vcpus).map(|index| shell.vcpu(index)).collect::<Result<Vec<_>, _>>()?;
        for (index, (vcpu, saved)) in vcpus.iter().zip(&saved).enumerate() {
            let failed = |source| MachineError::VcpuState { index, source };
            if !shell.has_cpuid(index, &saved.cpuid) {
                vcpu_state::set_cpuid(vcpu, saved).map_err(failed)?;
            }
            vcpu_state::restore(vcpu, saved).map_err(failed)?;
        }
        done("vcpus");
        let transports = (0..).take(machine.devices.len()).map(|slot| state.get::<TransportState>(slot));
        let pc = match pc {
            Some(bus) => {
                let transports = transports.collect::<Result<_, _>>()?;
                let functions = (0..).take(machine.devices.len()).map(|slot| state.get(slot));
                let events = state.get_if_there(0)?;
                if events.is_some() {
                    acpi::renew_generation(&frame.bus.memory).map_err(BootError::from)?;
                }
                Some(SavedPc { bus, functions: functions.collect::<Result<_, _>>()?, transports, events })
            }
            None => {
                // Behind a window nothing is raised by this.
                for (device, transport) in frame.bus.virtio.iter().zip(transports) {
                    lock(device).restore(&transport?, false, &frame.bus.memory)?;
                }
                None
            }
        };
        done("device states");
        let second = vcpus.iter().map(|vcpu| shell.second(vcpu)).collect::<Result<_, _>>()?;
        let (clock_ns, chipset) = (machine.clock_ns, state.get(0)?);
        let machine = frame.into_machine(host, shell, vcpus)?;
        done("threads");
        Ok(Prepared { machine, vcpus: second, saved, clock_ns, chipset, agent, pc })
    }

    /// Sets clocks and timers, which go on from here, and what can be waiting for them. The machine stands where the snapshot stood.
    pub fn into_machine(self) -> Result<Machine, MachineError> {
        let Prepared { machine, vcpus, saved, clock_ns, chipset, agent, pc } = self;
        let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
        machine.vm.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))?;
        vcpu_state::restore_tsc(vcpus.iter().zip(&saved))
            .map_err(|(index, source)| MachineError::VcpuState { index, source })?;
        for (index, (vcpu, saved)) in vcpus.iter().zip(&saved).enumerate() {
            vcpu_state::restore_time(vcpu, saved)
                .map_err(|source| MachineError::VcpuState { index, source })?;
        }
        // Now there are local APICs, which get what these raise.
        machine.bus.chipset.restore(&chipset).map_err(call("KVM_SET_GSI_ROUTING"))?;
        if let Some(agent) = &agent {
            machine.bus.chipset.restore_agent(agent);
        }
        if let (Some(here), Some(saved)) = (&machine.bus.pc, &pc) {
            saved.restore(here)?;
        }
        Ok(machine)
    }
}

/// What a PC has besides.
struct SavedPc {
    bus: PcState,
    functions: Vec<VirtioPciState>,
    transports: Vec<TransportState>,
    /// `None`: its tables do not tell of any.
    events: Option<EventState>,
}

impl SavedPc {
    /// Sets functions, host bridge and power block to their saved states.
    fn restore(&self, here: &Pc) -> Result<(), MachineError> {
        for (function, (state, transport)) in
            here.functions.iter().zip(self.functions.iter().zip(&self.transports))
        {
            function.restore(state, transport)?;
        }
        here.pci.restore(self.bus.config_address, &self.bus.bridge).map_err(|differs| {
            MachineError::Mismatch(format!("its host bridge is another, at byte {:#x}", differs.0))
        })?;
        here.power.restore(&self.bus.power, self.events.unwrap_or_default());
        if self.events.is_some() {
            here.power.tell_generation();
        }
        Ok(())
    }
}
