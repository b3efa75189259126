//! What all benches do with the embedded guest.

use anyhow::Context;
use prost::bytes::Bytes;

use crate::api::client::Client;
use crate::api::proto;
use crate::fleet::slots::addresses::Plan;
use proto::agent_call_request::Op;
use proto::agent_call_response::Result as Answer;

/// Cold-boots and freezes the embedded guest; gives the snapshot's id.
pub async fn snapshot(client: &mut Client, memory_bytes: u64, vcpus: u32) -> anyhow::Result<String> {
    let vm = boot(client, memory_bytes, vcpus).await?;
    freeze(client, vm).await
}

/// Cold-boots the embedded guest; gives its id.
pub async fn boot(client: &mut Client, memory_bytes: u64, vcpus: u32) -> anyhow::Result<String> {
    boot_with(client, memory_bytes, vcpus, Vec::new()).await
}

/// With disks.
pub async fn boot_with(
    client: &mut Client,
    memory_bytes: u64,
    vcpus: u32,
    disks: Vec<proto::DiskFile>,
) -> anyhow::Result<String> {
    cold_boot(client, proto::CreateVmRequest { vcpus, memory_bytes, disks, ..Default::default() }).await
}

/// With network interfaces, and the addresses that guests in slots have.
pub async fn boot_networked(
    client: &mut Client,
    memory_bytes: u64,
    networks: Vec<proto::NetworkInterface>,
) -> anyhow::Result<String> {
    let plan = Plan::default();
    let command_line = format!("coldspark.ip={} coldspark.ip6={}", plan.guest4(), plan.guest6());
    let request =
        proto::CreateVmRequest { vcpus: 1, memory_bytes, networks, command_line, ..Default::default() };
    cold_boot(client, request).await
}

async fn cold_boot(client: &mut Client, request: proto::CreateVmRequest) -> anyhow::Result<String> {
    use proto::create_vm_event::Event;
    let source = Some(proto::create_vm_request::Source::Embedded(true));
    let request = proto::CreateVmRequest { source, ..request };
    let mut events = client.vms.create_vm(request).await?.into_inner();
    let mut ready = None;
    while let Some(event) = events.message().await? {
        if let Some(Event::Ready(vm)) = event.event {
            ready = Some(vm);
        }
    }
    Ok(ready.context("the service ended the stream before the VM was ready")?.id)
}

/// Takes a snapshot and ends the VM; gives the snapshot's id.
pub async fn freeze(client: &mut Client, vm: String) -> anyhow::Result<String> {
    let request =
        proto::CreateSnapshotRequest { vm, name: String::new(), stop_after: true, ..Default::default() };
    let taken = client.snapshots.create_snapshot(request).await?.into_inner();
    Ok(taken.snapshot.context("the service's answer has no snapshot")?.id)
}

/// Clones with identities of their own; as many as were asked for.
pub async fn clones(
    client: &mut Client,
    snapshot: &str,
    count: u32,
    memory_mode: i32,
) -> anyhow::Result<Vec<proto::Vm>> {
    let request = proto::CloneVmRequest {
        snapshot: snapshot.to_owned(),
        count,
        memory_mode,
        identity: proto::Identity::Managed.into(),
        ..proto::CloneVmRequest::default()
    };
    let vms = client.vms.clone_vm(request).await?.into_inner().vms;
    anyhow::ensure!(vms.len() == count as usize, "asked for {count} clones, the service made {}", vms.len());
    Ok(vms)
}

/// What guests are asked to say.
const WORD: &[u8] = b"first answer";

fn echo(vm: String) -> proto::AgentCallRequest {
    let op = Op::Echo(proto::EchoOp { data: Bytes::from_static(WORD) });
    proto::AgentCallRequest { vm, timeout_ms: 0, op: Some(op) }
}

fn check(vm: &str, answer: Option<proto::AgentCallResponse>) -> anyhow::Result<()> {
    match answer.and_then(|answer| answer.result) {
        Some(Answer::Echo(echo)) if echo.data == WORD => Ok(()),
        other => anyhow::bail!("{vm}: answered {other:?} to an echo"),
    }
}

/// Pages of the guest's arena.
#[derive(Debug, Clone, Copy)]
pub struct Pages {
    pub first: u64,
    pub count: u64,
}

impl Pages {
    /// The request to touch them all.
    pub fn touch(self, vm: String, seed: u64, mode: proto::TouchMode) -> proto::AgentCallRequest {
        let Self { first: first_page, count: pages } = self;
        let op = Op::Touch(proto::TouchOp { first_page, pages, stride: 1, seed, mode: mode.into() });
        proto::AgentCallRequest { vm, timeout_ms: 0, op: Some(op) }
    }

    /// Looks whether that was done.
    pub fn check(self, answer: Option<proto::AgentCallResponse>) -> anyhow::Result<()> {
        match answer.and_then(|answer| answer.result) {
            Some(Answer::Touch(touch)) if touch.pages == self.count => Ok(()),
            other => anyhow::bail!("asked for {} pages, the guest answered {other:?}", self.count),
        }
    }
}

/// Has the guest write a pattern to the first `pages` pages.
pub async fn fill(client: &mut Client, vm: &str, pages: u64, seed: u64) -> anyhow::Result<()> {
    let pages = Pages { first: 0, count: pages };
    let request = pages.touch(vm.to_owned(), seed, proto::TouchMode::Fill);
    pages.check(Some(client.agent.call(request).await?.into_inner()))
}

/// One clone with an identity of its own, and its answer to `first_call`, in one request.
pub async fn asked_clone(
    client: &mut Client,
    snapshot: &str,
    memory_mode: i32,
    first_call: proto::AgentCallRequest,
) -> anyhow::Result<(proto::Vm, Option<proto::AgentCallResponse>)> {
    let request = proto::CloneVmRequest {
        snapshot: snapshot.to_owned(),
        memory_mode,
        identity: proto::Identity::Managed.into(),
        first_call: Some(first_call),
        ..proto::CloneVmRequest::default()
    };
    let made = client.vms.clone_vm(request).await?.into_inner();
    let vm = made.vms.into_iter().next().context("the service's answer has no VM")?;
    Ok((vm, made.answer))
}

/// One that says something.
pub async fn answering_clone(
    client: &mut Client,
    snapshot: &str,
    memory_mode: i32,
) -> anyhow::Result<proto::Vm> {
    let (vm, answer) = asked_clone(client, snapshot, memory_mode, echo(String::new())).await?;
    check(&vm.id, answer)?;
    Ok(vm)
}

/// Has the guest say something, and looks whether it does.
pub async fn answer(client: &mut Client, vm: &str) -> anyhow::Result<()> {
    let answer = client.agent.call(echo(vm.to_owned())).await?.into_inner();
    check(vm, Some(answer))
}
