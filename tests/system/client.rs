//! A typed client for trials: each call is one gRPC request; failures keep their status so that codes can be checked.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::agent_service_client::AgentServiceClient;
use coldspark::api::proto::create_vm_event::Event;
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::event_service_client::EventServiceClient;
use coldspark::api::proto::file_chunk::File;
use coldspark::api::proto::function_service_client::FunctionServiceClient;
use coldspark::api::proto::image_service_client::ImageServiceClient;
use coldspark::api::proto::import_image_request::Message;
use coldspark::api::proto::metrics_service_client::MetricsServiceClient;
use coldspark::api::proto::pool_service_client::PoolServiceClient;
use coldspark::api::proto::ready_point::At;
use coldspark::api::proto::snapshot_service_client::SnapshotServiceClient;
use coldspark::api::proto::vm_service_client::VmServiceClient;
use coldspark::api::proto::*;
use tonic::Status;
use tonic::transport::Channel;

use crate::console::Console;

/// All services over one connection.
#[derive(Clone)]
pub struct Client {
    pub images: ImageServiceClient<Channel>,
    pub vms: VmServiceClient<Channel>,
    pub snapshots: SnapshotServiceClient<Channel>,
    pub agent: AgentServiceClient<Channel>,
    pub functions: FunctionServiceClient<Channel>,
    pub pools: PoolServiceClient<Channel>,
    pub events: EventServiceClient<Channel>,
    metrics: MetricsServiceClient<Channel>,
    logs: PathBuf,
}

/// What a cold boot streamed.
pub struct Boot {
    pub vm: Vm,
    pub phases: Vec<String>,
    pub console: Vec<u8>,
    pub profile: Option<BootProfile>,
}

/// Files of an image to import.
#[derive(Default)]
pub struct ImageFiles {
    pub kernel: Option<Vec<u8>>,
    pub module: Option<Vec<u8>>,
    pub disks: Vec<Vec<u8>>,
}

/// `agent!(client, vm, Touch(TouchOp { .. }) => TouchResult)`-like calls go through [`Client::ask`]; this takes the
/// expected member out of the answer.
macro_rules! ask {
    ($client:expr, $vm:expr, $member:ident($op:expr)) => {{
        use coldspark::api::proto::agent_call_request::Op;
        use coldspark::api::proto::agent_call_response::Result as Answer;
        match $client.ask($vm, Op::$member($op)).await? {
            Answer::$member(answer) => answer,
            other => anyhow::bail!("asked {}, answered {other:?}", stringify!($member)),
        }
    }};
}
pub(crate) use ask;

impl Client {
    pub fn new(channel: Channel, logs: PathBuf) -> Client {
        // A disk read of 1 MiB does not fit the default limits with its frame.
        const MESSAGE_BYTES_MAX: usize = 8 << 20;
        Client {
            images: ImageServiceClient::new(channel.clone()),
            vms: VmServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            snapshots: SnapshotServiceClient::new(channel.clone()),
            functions: FunctionServiceClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
            pools: PoolServiceClient::new(channel.clone()),
            events: EventServiceClient::new(channel.clone()),
            metrics: MetricsServiceClient::new(channel.clone()),
            agent: AgentServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            logs,
        }
    }

    // --- images ---

    /// Imports an image from files in memory.
    pub async fn import(&mut self, spec: ImageSpec, files: ImageFiles) -> Result<Image, Status> {
        const CHUNK_BYTES: usize = 1 << 20;
        let mut messages = vec![ImportImageRequest { message: Some(Message::Spec(spec)) }];
        let mut send = |file: File, bytes: Vec<u8>| {
            for chunk in bytes.chunks(CHUNK_BYTES) {
                let chunk = FileChunk { file: Some(file), data: chunk.to_vec().into(), zeros: 0 };
                messages.push(ImportImageRequest { message: Some(Message::Chunk(chunk)) });
            }
        };
        if let Some(kernel) = files.kernel {
            send(File::Kernel(true), kernel);
        }
        if let Some(module) = files.module {
            send(File::Module(true), module);
        }
        for (index, disk) in files.disks.into_iter().enumerate() {
            send(File::Disk(index as u32), disk);
        }
        Ok(self.images.import_image(tokio_stream::iter(messages)).await?.into_inner())
    }

    /// An image `name` of the embedded guest with these writable disks.
    pub async fn import_embedded(&mut self, name: &str, disks: Vec<Vec<u8>>) -> Result<Image, Status> {
        let spec = ImageSpec {
            name: name.into(),
            embedded: true,
            disks: vec![DiskSettings { read_only: false, ..Default::default() }; disks.len()],
            ..Default::default()
        };
        self.import(spec, ImageFiles { disks, ..Default::default() }).await
    }

    // --- VMs ---

    /// Cold-boots and follows the stream to its end.
    pub async fn boot(&mut self, request: CreateVmRequest) -> Result<Boot, Status> {
        let mut events = self.vms.create_vm(request).await?.into_inner();
        let mut accepted = None;
        let mut boot = Boot { vm: Vm::default(), phases: Vec::new(), console: Vec::new(), profile: None };
        let mut ready = false;
        let mut log = None;
        while let Some(event) = events.message().await? {
            let out_of_turn = |what: &str| Err(Status::internal(format!("trial: {what} out of turn")));
            if ready {
                return out_of_turn("event after ready");
            }
            match event.event {
                Some(Event::Accepted(vm)) if accepted.is_none() => {
                    log = fs::File::create(self.logs.join(format!("boot-{}.log", vm.id))).ok();
                    accepted = Some(vm);
                }
                Some(_) if accepted.is_none() => return out_of_turn("event before accepted"),
                Some(Event::Phase(phase)) => boot.phases.push(phase.name),
                Some(Event::Choice(_)) => {}
                Some(Event::Profile(_)) if boot.profile.is_some() => return out_of_turn("second profile"),
                Some(Event::Profile(profile)) => boot.profile = Some(profile),
                Some(Event::Console(bytes)) => {
                    if let Some(log) = &mut log {
                        log.write_all(&bytes)?;
                    }
                    boot.console.extend(bytes);
                }
                Some(Event::Ready(vm)) => {
                    boot.vm = vm;
                    ready = true;
                }
                Some(Event::Accepted(_)) | None => return out_of_turn("event"),
            }
        }
        if ready {
            Ok(boot)
        } else {
            Err(Status::internal("trial: the stream ended well, but without `ready`"))
        }
    }

    /// A small VM of an image.
    pub async fn boot_image(
        &mut self,
        image: &str,
        vcpus: u32,
        protocol: BootProtocol,
    ) -> Result<Vm, Status> {
        let request = CreateVmRequest {
            source: Some(Source::Image(image.into())),
            vcpus,
            memory_bytes: 64 << 20,
            protocol: protocol.into(),
            ..Default::default()
        };
        Ok(self.boot(request).await?.vm)
    }

    /// The embedded guest, no disk, in a small VM.
    pub async fn boot_embedded(&mut self, memory_bytes: u64) -> Result<Vm, Status> {
        self.boot_embedded_with(memory_bytes, AgentPort::Virtio).await
    }

    /// The same, with its agent behind that port.
    pub async fn boot_embedded_with(&mut self, memory_bytes: u64, port: AgentPort) -> Result<Vm, Status> {
        let request = CreateVmRequest {
            source: Some(Source::Embedded(true)),
            vcpus: 1,
            memory_bytes,
            agent_port: port.into(),
            ..Default::default()
        };
        Ok(self.boot(request).await?.vm)
    }

    pub async fn clone_vms(
        &mut self,
        snapshot: &str,
        count: u32,
        mode: MemoryMode,
        identity: Identity,
    ) -> Result<Vec<Vm>, Status> {
        let request = CloneVmRequest {
            snapshot: snapshot.into(),
            count,
            memory_mode: mode.into(),
            identity: identity.into(),
            ..Default::default()
        };
        Ok(self.vms.clone_vm(request).await?.into_inner().vms)
    }

    pub async fn vm(&mut self, vm: &str) -> Result<Vm, Status> {
        Ok(self.vms.get_vm(GetVmRequest { vm: vm.into() }).await?.into_inner())
    }

    pub async fn list_vms(&mut self) -> Result<Vec<Vm>, Status> {
        Ok(self.vms.list_vms(ListVmsRequest::default()).await?.into_inner().vms)
    }

    pub async fn delete_vm(&mut self, vm: &str) -> Result<(), Status> {
        self.vms.delete_vm(DeleteVmRequest { vm: vm.into() }).await?;
        Ok(())
    }

    /// The VM's console; everything seen goes to a log named after the VM.
    pub async fn console(&mut self, vm: &str) -> anyhow::Result<Console> {
        Console::open(self.vms.clone(), vm, &self.logs.join(format!("console-{vm}.log"))).await
    }

    // --- snapshots ---

    pub async fn snapshot(&mut self, vm: &str, name: &str) -> Result<Snapshot, Status> {
        let request = CreateSnapshotRequest {
            vm: vm.into(),
            name: name.into(),
            stop_after: false,
            ..Default::default()
        };
        let response = self.snapshots.create_snapshot(request).await?.into_inner();
        response.snapshot.ok_or_else(|| Status::internal("trial: no snapshot in the answer"))
    }

    pub async fn list_snapshots(&mut self) -> Result<ListSnapshotsResponse, Status> {
        Ok(self.snapshots.list_snapshots(ListSnapshotsRequest::default()).await?.into_inner())
    }

    pub async fn verify(&mut self, snapshot: &str) -> Result<u64, Status> {
        let request = VerifySnapshotRequest { snapshot: snapshot.into() };
        Ok(self.snapshots.verify_snapshot(request).await?.into_inner().verified_bytes)
    }

    // --- metrics ---

    /// All of them, as text.
    pub async fn metrics(&mut self) -> Result<String, Status> {
        Ok(self.metrics.get_metrics(GetMetricsRequest {}).await?.into_inner().text)
    }

    // --- the agent ---

    /// One operation of the VM's agent; see [`ask!`].
    pub async fn ask(&mut self, vm: &str, op: Op) -> anyhow::Result<Answer> {
        let shown = format!("{op:.60?}");
        let request = AgentCallRequest { vm: vm.into(), timeout_ms: 0, op: Some(op) };
        let response =
            self.agent.call(request).await.with_context(|| format!("asking {vm}: {shown}"))?.into_inner();
        response.result.with_context(|| format!("no result: {shown}"))
    }
}

/// A ready point at a console pattern.
pub fn console_pattern(pattern: &str) -> Option<ReadyPoint> {
    Some(ReadyPoint { at: Some(At::ConsolePattern(pattern.into())) })
}

/// Checks that `result` failed with `code` and a sentence: a beginning, words, none of them this machine's insides.
pub fn expect_status<T>(
    what: &str,
    result: Result<T, Status>,
    codes: &[tonic::Code],
) -> anyhow::Result<String> {
    let Err(status) = result else { bail!("{what}: succeeded, but should fail with {codes:?}") };
    let message = status.message();
    if !codes.contains(&status.code()) {
        bail!("{what}: code {:?} instead of {codes:?}: {message}", status.code());
    }
    if message.split_whitespace().count() < 4 {
        bail!("{what}: no sentence: {message:?}");
    }
    Ok(message.to_string())
}
