//! What is told of a guest that hangs: each vCPU's registers in a line, and the last console lines.
//!
//! A worker that does not answer in time is told as such, and nothing waits for it any longer. What a worker says is
//! bounded here: vCPUs in number, text in bytes, because an error travels in a header of about 4 KiB.

use super::error::FleetError;
use super::limits::{INSPECT_TIMEOUT, LAST_LINES_BYTES_MAX, VCPUS_MAX};
use super::link::Link;
use super::vm::Vm;
use crate::worker::protocol::{Activity, Reply, Request, VcpuLook};

/// Most of an error that registers take; the console has the rest.
const REGISTERS_BYTES_MAX: usize = 1200;

/// A vCPU in one line.
pub fn line(look: &VcpuLook) -> String {
    let number = look.index;
    let registers = match &look.registers {
        Ok(registers) => registers,
        Err(problem) => {
            let short: String = problem.chars().filter(|c| !c.is_control()).take(120).collect();
            return format!("vCPU {number}: {short}");
        }
    };
    let activity = match registers.activity {
        Activity::Running => "runs".to_owned(),
        Activity::Halted => "halted".to_owned(),
        Activity::NotStarted => return format!("vCPU {number}: never started by the guest"),
        Activity::Other(state) => format!("in KVM's state {state}"),
    };
    let vector =
        |name: &str, vector: Option<u8>| vector.map(|v| format!(" {name}={v:#x}")).unwrap_or_default();
    let r = registers;
    format!(
        "vCPU {number}: {activity} rip={:#x} cpl={} rsp={:#x} rflags={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} \
         efer={:#x}{}{}",
        r.rip,
        r.cpl,
        r.rsp,
        r.rflags,
        r.cr0,
        r.cr2,
        r.cr3,
        r.cr4,
        r.efer,
        vector("pending", r.pending),
        vector("serving", r.serving),
    )
}

/// All of them in a text of at most `bytes_max`; what has no room is counted.
fn lines(looks: &[VcpuLook], bytes_max: usize) -> String {
    let mut text = String::new();
    for (n, look) in looks.iter().enumerate() {
        let line = line(look);
        if text.len() + line.len() > bytes_max {
            text.push_str(&format!("\n  and {} more in the service's log", looks.len() - n));
            break;
        }
        text.push_str("\n  ");
        text.push_str(&line);
    }
    text
}

/// Asks a worker for its vCPUs' registers. The guest stands still for a moment.
pub async fn ask(link: &Link) -> Result<Vec<VcpuLook>, FleetError> {
    match link.request_within(Request::Inspect, &[], INSPECT_TIMEOUT).await?.0 {
        Reply::Looks(looks) if looks.len() <= usize::from(VCPUS_MAX) => Ok(looks),
        _ => Err(FleetError::WorkerConfused),
    }
}

/// For the error of a VM that did not become ready: registers, then the console's end. All of it goes into the log, too.
pub async fn report(vm: &Vm, link: &Link) -> String {
    let registers = match ask(link).await {
        Ok(looks) => {
            for look in &looks {
                tracing::warn!(vm = %vm.id, "not ready in time: {}", line(look));
            }
            format!("its vCPUs:{}", lines(&looks, REGISTERS_BYTES_MAX))
        }
        Err(error) => {
            tracing::warn!(vm = %vm.id, %error, "not ready in time, and its registers cannot be had");
            format!("its vCPUs' registers cannot be had ({error})")
        }
    };
    let console = vm.console.last_lines_within(LAST_LINES_BYTES_MAX.saturating_sub(registers.len()));
    tracing::warn!(vm = %vm.id, "not ready in time; {console}");
    format!("{registers}\n{console}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::protocol::Registers;

    fn look(index: u8, registers: Result<Registers, String>) -> VcpuLook {
        VcpuLook { index, registers }
    }

    fn full(activity: Activity) -> Registers {
        Registers {
            activity,
            rip: u64::MAX,
            rsp: u64::MAX,
            rflags: u64::MAX,
            cr0: u64::MAX,
            cr2: u64::MAX,
            cr3: u64::MAX,
            cr4: u64::MAX,
            efer: u64::MAX,
            cpl: 3,
            pending: Some(0xec),
            serving: None,
        }
    }

    #[test]
    fn a_line_tells_where_it_is() {
        let halted = line(&look(1, Ok(Registers { rip: 0xffff_ffff_8020_1234, ..full(Activity::Halted) })));
        assert!(halted.starts_with("vCPU 1: halted rip=0xffffffff80201234 cpl=3 "), "{halted}");
        assert!(halted.ends_with(" pending=0xec"), "{halted}");
        assert_eq!(line(&look(2, Ok(full(Activity::NotStarted)))), "vCPU 2: never started by the guest");
        let lie = line(&look(3, Err("x\n".repeat(10_000))));
        assert!(lie.len() < 200 && !lie.contains('\n'), "{lie}");
    }

    #[test]
    fn a_text_is_bounded_and_says_what_it_leaves_out() {
        let looks: Vec<VcpuLook> = (0..32).map(|index| look(index, Ok(full(Activity::Running)))).collect();
        let text = lines(&looks, REGISTERS_BYTES_MAX);
        assert!(text.len() < REGISTERS_BYTES_MAX + 100, "{}", text.len());
        let told = text.matches("vCPU ").count();
        assert!(
            told >= 4 && text.ends_with(&format!("and {} more in the service's log", 32 - told)),
            "{text}"
        );
        assert_eq!(lines(&looks[..1], REGISTERS_BYTES_MAX).matches("more").count(), 0);
    }
}
