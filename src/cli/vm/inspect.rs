//! `coldspark vm inspect`: where a guest is, for somebody who wonders whether it hangs.

use serde_json::json;

use crate::api::proto;
use crate::cli::SocketArgument;
use crate::cli::output;

pub async fn run(socket: &SocketArgument, vm: String, as_json: bool) -> anyhow::Result<()> {
    let request = proto::InspectVmRequest { vm };
    let seen = socket.connect().await?.vms.inspect_vm(request).await?.into_inner();
    if as_json {
        // 64-bit registers as text: a JSON number would lose digits in some readers.
        let vcpu = |vcpu: &proto::VcpuLook| {
            json!({
                "index": vcpu.index,
                "problem": vcpu.problem,
                "state": vcpu.state().as_str_name().trim_start_matches("VCPU_STATE_"),
                "rip": format!("{:#x}", vcpu.rip),
                "rsp": format!("{:#x}", vcpu.rsp),
                "rflags": format!("{:#x}", vcpu.rflags),
                "cr0": format!("{:#x}", vcpu.cr0),
                "cr2": format!("{:#x}", vcpu.cr2),
                "cr3": format!("{:#x}", vcpu.cr3),
                "cr4": format!("{:#x}", vcpu.cr4),
                "efer": format!("{:#x}", vcpu.efer),
                "cpl": vcpu.cpl,
                "pending": vcpu.pending,
                "serving": vcpu.serving,
            })
        };
        output::json(&json!({
            "vcpus": seen.vcpus.iter().map(vcpu).collect::<Vec<_>>(),
            "console": seen.console,
        }))?;
        return Ok(());
    }
    for vcpu in &seen.vcpus {
        output::line(&vcpu.line)?;
    }
    output::line(&seen.console)?;
    Ok(())
}
