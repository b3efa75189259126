//! `coldspark vm inspect`: where a guest is, for somebody who wonders whether it hangs.

use serde_json::json;

use crate::api::proto;
use crate::cli::SocketArgument;
use crate::cli::output;

pub async fn run(socket: &SocketArgument, vm: String, as_json: bool) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.vms;
    let seen = client.inspect_vm(proto::InspectVmRequest { vm: vm.clone() }).await?.into_inner();
    let networks = client.get_vm(proto::GetVmRequest { vm }).await?.into_inner().networks;
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
            "networks": networks.iter().map(super::network::value).collect::<Vec<_>>(),
        }))?;
        return Ok(());
    }
    for vcpu in &seen.vcpus {
        output::line(&vcpu.line)?;
    }
    for (index, network) in networks.iter().enumerate() {
        let six = network.slot_address6.as_str();
        let six = if six.is_empty() { String::new() } else { format!(" and {six}") };
        output::line(&format!("interface {index}: {}{six}", network.link))?;
    }
    output::line(&seen.console)?;
    Ok(())
}
