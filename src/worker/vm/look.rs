//! What a VM tells of itself to who measures its boot or wonders whether it hangs, as the protocol has it.

use std::time::Instant;

use super::Vm;
use crate::vmm::look::{self, Look};
use crate::worker::protocol::{
    Activity, Fault, GuestClock, LOOK_TIMEOUT, Milestones, Registers, VcpuLook, instant_ns,
};

impl Vm {
    /// Where each vCPU is.
    pub fn inspect(&self) -> Result<Vec<VcpuLook>, Fault> {
        let looks = self.machine.look(self.running, Instant::now() + LOOK_TIMEOUT)?;
        let look =
            |(index, look): (u8, Result<Look, String>)| VcpuLook { index, registers: look.map(registers) };
        Ok((0..).zip(looks).map(look).collect())
    }

    pub fn milestones(&self) -> Milestones {
        let (entered, first_output, clock) = self.machine.milestones();
        Milestones {
            entered_ns: entered.map(instant_ns),
            first_output_ns: first_output.map(instant_ns),
            clock: clock.map(|clock| GuestClock {
                at_ns: instant_ns(clock.at),
                tsc: clock.tsc,
                khz: clock.khz,
            }),
        }
    }
}

fn registers(look: Look) -> Registers {
    Registers {
        activity: match look.activity {
            look::Activity::Running => Activity::Running,
            look::Activity::Halted => Activity::Halted,
            look::Activity::NotStarted => Activity::NotStarted,
            look::Activity::Other(state) => Activity::Other(state),
        },
        rip: look.rip,
        rsp: look.rsp,
        rflags: look.rflags,
        cr0: look.cr0,
        cr2: look.cr2,
        cr3: look.cr3,
        cr4: look.cr4,
        efer: look.efer,
        cpl: look.cpl,
        pending: look.pending,
        serving: look.serving,
    }
}
