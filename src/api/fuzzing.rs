//! What hostile bytes are given to in this room: requests, as a client may send them.

use prost::Message;

use super::{agent, convert, exec, functions, images, network, pools, proto, vms};
use crate::agent::Opening;
use crate::fleet::boot::{check_command_line, check_machine, check_ready};

/// Any message, by the first byte: refused with words, or translated.
pub fn requests(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let refused = match kind % 7 {
        0 => proto::CreateVmRequest::decode(data).ok().map(|request| {
            vms::create(request).map(|wanted| {
                let _ = check_command_line(&wanted.command_line);
                let _ = check_machine(wanted.vcpus.unwrap_or(1), wanted.memory_bytes.unwrap_or(0));
                if let Some(ready) = &wanted.ready {
                    let _ = check_ready(ready);
                }
            })
        }),
        1 => proto::ImageSpec::decode(data).ok().map(|spec| images::spec_in(spec).map(drop)),
        2 => proto::DeployRequest::decode(data).ok().map(|request| functions::deploy_in(request).map(drop)),
        3 => proto::CloneVmRequest::decode(data).ok().map(|request| {
            convert::memory_mode_in(request.memory_mode)?;
            convert::identity_in(request.identity)?;
            convert::limits_in(request.limits);
            network::opens_more(&request.networks)?;
            network::requests_in(request.networks).map(drop)
        }),
        4 => proto::AgentCallRequest::decode(data).ok().map(|call| agent::first_call_in(call).map(drop)),
        5 => proto::CreatePoolRequest::decode(data).ok().map(|request| {
            convert::memory_mode_in(request.memory_mode)?;
            pools::mode_in(request.mode).map(drop)
        }),
        _ => proto::ExecStart::decode(data).ok().map(|start| {
            let what = exec::command(start.args, start.env, start.cwd, start.user);
            let opening = Opening { session: 1, window: 1 << 16, what };
            // What passes fits a frame.
            if opening.check().is_ok() {
                let mut bytes = Vec::new();
                opening.encode(&mut bytes);
                assert!(bytes.len() <= crate::agent::wire::PAYLOAD_BYTES_MAX);
            }
            Ok(())
        }),
    };
    if let Some(Err(status)) = refused {
        assert!(!status.message().is_empty());
    }
}

/// One of each.
pub fn seeds() -> Vec<Vec<u8>> {
    let source = Some(proto::create_vm_request::Source::Embedded(true));
    let create = proto::CreateVmRequest { source, name: "web".into(), vcpus: 2, ..Default::default() };
    let spec = proto::ImageSpec { name: "freebsd".into(), ..Default::default() };
    let deploy = proto::DeployRequest { name: "f".into(), prepare: None, ..Default::default() };
    let link = proto::NetworkInterface { mac: "02:00:00:00:00:01".into(), ..Default::default() };
    let clone = proto::CloneVmRequest { networks: vec![link], count: 3, ..Default::default() };
    let op = Some(proto::agent_call_request::Op::Echo(proto::EchoOp { data: vec![1; 9].into() }));
    let call = proto::AgentCallRequest { vm: "vm-1".into(), timeout_ms: 1, op };
    let pool = proto::CreatePoolRequest { name: "p".into(), mode: 1, ..Default::default() };
    let exec = proto::ExecStart { args: vec!["echo".into(), "x".into()], ..Default::default() };
    [
        create.encode_to_vec(),
        spec.encode_to_vec(),
        deploy.encode_to_vec(),
        clone.encode_to_vec(),
        call.encode_to_vec(),
        pool.encode_to_vec(),
        exec.encode_to_vec(),
    ]
    .into_iter()
    .zip(0u8..)
    .map(|(message, kind)| [vec![kind], message].concat())
    .collect()
}
