//! VmService.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::auth::layer::admins_only;
use super::convert::{self, optional};
use super::pages::Page;
use super::proto;
use super::proto::vm_service_server::VmService;
use super::replays::{Replays, kept_answer};
use super::status::{invalid, limit_reached};
use super::{agent, network};
use crate::fleet::Fleet;
use crate::fleet::boot::{CreateVm, Progress};
use crate::fleet::claims::{Claim, Method};
use crate::fleet::clones::CloneVm;
use crate::fleet::console::{Listener, Output};
use crate::fleet::disk_files::{DiskFile, DiskMode};
use crate::fleet::limits::{
    CONSOLE_STREAMS_MAX, READY_TIMEOUT_DEFAULT, STOP_TIMEOUT_DEFAULT, STOP_TIMEOUT_MAX,
};
use crate::fleet::vm::{State, Vm};
use crate::telemetry::trace::Place;

/// Events of one cold boot that the client has not taken yet.
const PROGRESS_MAX: usize = 256;

/// The service.
pub struct Vms {
    fleet: Arc<Fleet>,
    console_streams: Arc<Semaphore>,
    replays: Replays<proto::CloneVmResponse>,
    created: Arc<Replays<proto::Vm>>,
}

impl Vms {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self {
            fleet,
            console_streams: Arc::new(Semaphore::new(CONSOLE_STREAMS_MAX)),
            replays: Replays::default(),
            created: Arc::default(),
        }
    }

    async fn make_clones(
        &self,
        request: proto::CloneVmRequest,
        claim: Option<Claim>,
    ) -> Result<proto::CloneVmResponse, Status> {
        let (op, first_call) = request.first_call.map(agent::first_call_in).transpose()?.unzip();
        let request = CloneVm {
            snapshot: request.snapshot,
            count: request.count.max(1),
            memory_mode: convert::memory_mode_in(request.memory_mode)?,
            managed: convert::identity_in(request.identity)?,
            name: optional(request.name),
            networks: network::requests_in(request.networks)?,
            limits: convert::limits_in(request.limits),
            first_call,
        };
        let mut clones = self.fleet.clone_vm(request).await?;
        let answer = match (op, clones.answer.take()) {
            (Some(op), Some(answer)) => match agent::first_answer_out(&op, answer) {
                Ok(answer) => Some(answer),
                Err(status) => {
                    // Of another kind than what was asked: a clone to whom nobody will talk.
                    for vm in &clones.vms {
                        self.fleet.delete_vm(&vm.id).await?;
                    }
                    return Err(status);
                }
            },
            _ => None,
        };
        let mut response = proto::CloneVmResponse { vms: Vec::new(), answer };
        clones.settle(claim.map(|claim| (claim, response.encode_to_vec())));
        response.vms = clones.vms.iter().map(|vm| convert::vm(vm)).collect();
        Ok(response)
    }

    /// What an earlier daemon made for this request.
    fn earlier(&self, claim: Option<&Claim>) -> Result<Option<proto::CloneVmResponse>, Status> {
        let Some(earlier) = self.fleet.earlier(claim)? else { return Ok(None) };
        let mut response: proto::CloneVmResponse = kept_answer(&earlier)?;
        response.vms = earlier.vms.iter().map(|vm| convert::vm(vm)).collect();
        Ok(Some(response))
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<proto::CreateVmEvent, Status>> + Send>>;
type ConsoleOutput = Pin<Box<dyn Stream<Item = Result<proto::ConsoleResponse, Status>> + Send>>;

#[tonic::async_trait]
impl VmService for Vms {
    type CreateVmStream = Events;
    type ConsoleStream = ConsoleOutput;

    async fn create_vm(
        &self,
        request: Request<proto::CreateVmRequest>,
    ) -> Result<Response<Self::CreateVmStream>, Status> {
        if !request.get_ref().disks.is_empty() {
            admins_only(&request, "a VM with a file of the host as a disk")?;
        }
        check_slots(&request, &request.get_ref().networks)?;
        let (id, asked) = (request.get_ref().request_id.clone(), request.get_ref().encode_to_vec());
        let claim = Claim::new(Method::CreateVm, &id, &asked);
        let request = create(request.into_inner())?;
        let (events, stream) = mpsc::channel(PROGRESS_MAX);
        if let Some(earlier) = self.fleet.earlier(claim.as_ref())?
            && let Some(vm) = earlier.vms.first()
        {
            return Ok(Response::new(Box::pin(tokio_stream::iter(told_again(convert::vm(vm)).map(Ok)))));
        }
        let (fleet, created) = (Arc::clone(&self.fleet), Arc::clone(&self.created));
        let booting = async move {
            let mut booted = false;
            let work = async {
                booted = true;
                boot(&fleet, request, claim, &events).await
            };
            let lives = |vm: &proto::Vm| fleet.vm(&vm.id).is_ok_and(|vm| vm.state() != State::Exited);
            let mut is_nobodys = None;
            let last = match created.once_while(&id, &asked, work, lives).await {
                Ok(vm) => {
                    // A caller that can ask again will.
                    is_nobodys = Some(vm.id.clone()).filter(|_| id.is_empty());
                    // Who has not booted it hears of it now.
                    let [accepted, ready] = told_again(vm);
                    if !booted {
                        let _ = events.send(Ok(accepted)).await;
                    }
                    Ok(ready)
                }
                Err(status) => Err(status),
            };
            if !was_taken(&events, last).await
                && let Some(vm) = is_nobodys
            {
                let _ = fleet.delete_vm(&vm).await;
            }
        };
        tokio::spawn(Place::carry(Place::here(), booting));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn clone_vm(
        &self,
        request: Request<proto::CloneVmRequest>,
    ) -> Result<Response<proto::CloneVmResponse>, Status> {
        check_slots(&request, &request.get_ref().networks)?;
        let request = request.into_inner();
        let (id, asked) = (request.request_id.clone(), request.encode_to_vec());
        let claim = Claim::new(Method::CloneVm, &id, &asked);
        if let Some(response) = self.earlier(claim.as_ref())? {
            return Ok(Response::new(response));
        }
        let response = self.replays.once(&id, &asked, self.make_clones(request, claim)).await?;
        Ok(Response::new(response))
    }

    async fn get_vm(&self, request: Request<proto::GetVmRequest>) -> Result<Response<proto::Vm>, Status> {
        let vm = self.fleet.vm(&request.into_inner().vm)?;
        Ok(Response::new(convert::vm(&vm)))
    }

    async fn list_vms(
        &self,
        request: Request<proto::ListVmsRequest>,
    ) -> Result<Response<proto::ListVmsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::asked(request.page_size, &request.page_token)?;
        let vms = self.fleet.vms();
        let vms = vms.iter().filter(|vm| request.ready_in_pools || !vm.is_held());
        let (vms, next_page_token) = page.of(vms, |vm| format!("{:020}", vm.number), |vm| convert::vm(vm));
        Ok(Response::new(proto::ListVmsResponse { vms, next_page_token }))
    }

    async fn get_vm_stats(
        &self,
        request: Request<proto::GetVmStatsRequest>,
    ) -> Result<Response<proto::VmStats>, Status> {
        let vm = self.fleet.vm(&request.into_inner().vm)?;
        Ok(Response::new(vm.stats().await.map(|(stats, given)| network::stats_out(&stats, given))?))
    }

    async fn inspect_vm(
        &self,
        request: Request<proto::InspectVmRequest>,
    ) -> Result<Response<proto::InspectVmResponse>, Status> {
        let vm = self.fleet.vm(&request.into_inner().vm)?;
        let looks = vm.inspect().await?;
        Ok(Response::new(proto::InspectVmResponse {
            vcpus: looks.iter().map(convert::look).collect(),
            console: vm.console.last_lines(),
        }))
    }

    async fn delete_vm(
        &self,
        request: Request<proto::DeleteVmRequest>,
    ) -> Result<Response<proto::DeleteVmResponse>, Status> {
        self.fleet.delete_vm(&request.into_inner().vm).await?;
        Ok(Response::new(proto::DeleteVmResponse {}))
    }

    async fn stop_vm(
        &self,
        request: Request<proto::StopVmRequest>,
    ) -> Result<Response<proto::StopVmResponse>, Status> {
        let request = request.into_inner();
        let within = match request.timeout_ms {
            0 => STOP_TIMEOUT_DEFAULT,
            ms => Duration::from_millis(ms.into()),
        };
        if within > STOP_TIMEOUT_MAX {
            return Err(invalid(format!(
                "a timeout of {} s; the most is {}",
                within.as_secs(),
                STOP_TIMEOUT_MAX.as_secs()
            )));
        }
        let stopped = self.fleet.stop_vm(&request.vm, within).await?;
        Ok(Response::new(proto::StopVmResponse {
            vm: Some(convert::vm(&stopped.vm)),
            by_itself: stopped.by_itself,
            not_asked: stopped.not_asked.unwrap_or_default(),
            took_us: u64::try_from(stopped.took.as_micros()).unwrap_or(u64::MAX),
        }))
    }

    async fn pause_vm(&self, request: Request<proto::PauseVmRequest>) -> Result<Response<proto::Vm>, Status> {
        let vm = self.fleet.vm(&request.into_inner().vm)?;
        vm.pause().await?;
        Ok(Response::new(convert::vm(&vm)))
    }

    async fn resume_vm(
        &self,
        request: Request<proto::ResumeVmRequest>,
    ) -> Result<Response<proto::Vm>, Status> {
        let vm = self.fleet.vm(&request.into_inner().vm)?;
        vm.resume().await?;
        Ok(Response::new(convert::vm(&vm)))
    }

    async fn console(
        &self,
        request: Request<Streaming<proto::ConsoleRequest>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        use proto::console_request::Message;
        let permit = Arc::clone(&self.console_streams).try_acquire_owned().map_err(|_| {
            limit_reached(format!(
                "{CONSOLE_STREAMS_MAX} console streams are open, the most there can be; close some"
            ))
        })?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(Message::Open(open)) = first else {
            return Err(invalid("the first message of Console must be `open`"));
        };
        let vm = self.fleet.vm(&open.vm)?;
        let listener = vm.console.listen(!open.no_backlog);
        let (output, stream) = mpsc::channel(16);
        tokio::spawn(follow(vm, listener, requests, output, permit));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Passes output and input on until either side ends.
async fn follow(
    vm: Arc<Vm>,
    mut listener: Listener,
    mut requests: Streaming<proto::ConsoleRequest>,
    output: mpsc::Sender<Result<proto::ConsoleResponse, Status>>,
    _permit: OwnedSemaphorePermit,
) {
    use proto::console_request::Message as In;
    use proto::console_response::Message as Out;
    let typing = async {
        while let Some(request) = requests.next().await {
            match request?.message {
                Some(In::Input(bytes)) => vm.console.type_in(bytes).await?,
                _ => return Err(invalid("messages after the first of Console must be `input`")),
            }
        }
        // The caller types no more but may still listen.
        Ok(())
    };
    tokio::pin!(typing);
    let mut typed = false;
    loop {
        tokio::select! {
            heard = listener.next() => {
                let message = match heard {
                    None => return,
                    Some(Output::Bytes(bytes)) => Out::Output(bytes),
                    Some(Output::Lost(count)) => Out::LostBytes(count),
                };
                if output.send(Ok(proto::ConsoleResponse { message: Some(message) })).await.is_err() {
                    return;
                }
            }
            result = &mut typing, if !typed => {
                typed = true;
                if let Err(status) = result {
                    let _ = output.send(Err(status)).await;
                    return;
                }
            }
            () = output.closed() => return,
        }
    }
}

/// Tells the last of a stream; whether it, and all before it, was taken to be sent: else the caller went away.
async fn was_taken<T>(events: &mpsc::Sender<T>, last: T) -> bool {
    events.send(last).await.is_ok() && events.reserve_many(events.max_capacity()).await.is_ok()
}

/// What there is to tell of a VM that was booted for this request before.
fn told_again(vm: proto::Vm) -> [proto::CreateVmEvent; 2] {
    use proto::create_vm_event::Event;
    [Event::Accepted(vm.clone()), Event::Ready(vm)].map(event)
}

/// Boots a VM and tells the caller of its way; if nobody listens any more the VM is ended.
async fn boot(
    fleet: &Arc<Fleet>,
    request: CreateVm,
    claim: Option<Claim>,
    events: &mpsc::Sender<Result<proto::CreateVmEvent, Status>>,
) -> Result<proto::Vm, Status> {
    let (progress_in, mut progress) = mpsc::channel(PROGRESS_MAX);
    let has_id = claim.is_some();
    let boot = fleet.create_vm(request, claim, progress_in);
    tokio::pin!(boot);
    let end = loop {
        tokio::select! {
            biased;
            Some(event) = progress.recv() => if events.send(Ok(created(event))).await.is_err() {
                break None;
            },
            () = events.closed() => break None,
            result = &mut boot => break Some(result),
        }
    };
    let Some(end) = end else {
        // The boot sees that nobody listens and ends the VM, if it is not ready already.
        progress.close();
        if let Ok(new) = boot.await {
            if has_id {
                return Ok(convert::vm(&new.vm));
            }
            let _ = fleet.delete_vm(&new.vm.id).await;
        }
        return Err(Status::cancelled("the caller went away"));
    };
    while let Ok(event) = progress.try_recv() {
        if events.send(Ok(created(event))).await.is_err() {
            break;
        }
    }
    let new = end?;
    if let Some(profile) = new.profile {
        let _ =
            events.send(Ok(event(proto::create_vm_event::Event::Profile(convert::profile(&profile))))).await;
    }
    Ok(convert::vm(&new.vm))
}

/// Refuses to callers who are no admins what only these may open.
fn check_slots<T>(request: &Request<T>, interfaces: &[proto::NetworkInterface]) -> Result<(), Status> {
    if network::opens_more(interfaces)? {
        admins_only(
            request,
            "a network slot that opens ports of the host, or more than the public Internet,",
        )?;
    }
    Ok(())
}

pub fn create(request: proto::CreateVmRequest) -> Result<CreateVm, Status> {
    use proto::create_vm_request::Source;
    let image = match request.source {
        Some(Source::Image(name)) => Some(name),
        Some(Source::Embedded(true)) => None,
        _ => return Err(invalid("say what to boot: `image` or `embedded: true`")),
    };
    Ok(CreateVm {
        image,
        name: optional(request.name),
        vcpus: convert::vcpus_in(request.vcpus)?,
        memory_bytes: convert::nonzero(request.memory_bytes),
        protocol: match request.protocol {
            0 => None,
            number => Some(convert::protocol_in(number)?),
        },
        hardware: match request.hardware {
            0 => None,
            number => Some(convert::hardware_in(number)?),
        },
        agent_port: match request.agent_port {
            0 => None,
            number => Some(convert::agent_port_in(number)?),
        },
        command_line: request.command_line,
        profile: request.profile,
        ready: convert::ready_in(request.ready)?,
        ready_timeout: match request.ready_timeout_ms {
            0 => READY_TIMEOUT_DEFAULT,
            ms => Duration::from_millis(ms.into()),
        },
        disks: request.disks.into_iter().map(disk_file).collect::<Result<_, _>>()?,
        networks: network::requests_in(request.networks)?,
        limits: convert::limits_in(request.limits),
        restart_on_reset: match proto::OnReset::try_from(request.on_reset) {
            Ok(proto::OnReset::Unspecified | proto::OnReset::Restart) => true,
            Ok(proto::OnReset::End) => false,
            Err(_) => return Err(invalid("an unknown `on_reset`; it is RESTART or END")),
        },
    })
}

fn disk_file(disk: proto::DiskFile) -> Result<DiskFile, Status> {
    let mode = match proto::DiskMode::try_from(disk.mode) {
        Ok(proto::DiskMode::Unspecified | proto::DiskMode::Overlay) => DiskMode::Overlay,
        Ok(proto::DiskMode::ReadOnly) => DiskMode::ReadOnly,
        Ok(proto::DiskMode::Persist) => DiskMode::Persist,
        Err(_) => {
            return Err(invalid("an unknown `mode` of a disk; it is OVERLAY, READ_ONLY or PERSIST"));
        }
    };
    Ok(DiskFile { path: disk.path.into(), mode })
}

fn event(event: proto::create_vm_event::Event) -> proto::CreateVmEvent {
    proto::CreateVmEvent { event: Some(event) }
}

fn created(progress: Progress) -> proto::CreateVmEvent {
    use proto::create_vm_event::Event;
    event(match progress {
        Progress::Accepted(vm) => Event::Accepted(convert::vm(&vm)),
        Progress::Phase(phase) => Event::Phase(proto::BootPhase { name: phase.name, us: phase.us }),
        Progress::Choice(choice) => Event::Choice(choice),
        Progress::Console(bytes) => Event::Console(bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_of_a_stream_was_taken_or_its_caller_went_away() {
        let (events, mut stream) = mpsc::channel(4);
        events.send(1).await.unwrap();
        let (taken, ()) = tokio::join!(was_taken(&events, 2), async {
            assert_eq!((stream.recv().await, stream.recv().await), (Some(1), Some(2)));
        });
        assert!(taken);
        // Gone with the last in its hands, but not looked at.
        let (taken, ()) = tokio::join!(was_taken(&events, 3), async {
            tokio::task::yield_now().await;
            drop(stream);
        });
        assert!(!taken);
        assert!(!was_taken(&events, 4).await);
    }
}
