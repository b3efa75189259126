//! FunctionService.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::pages::Page;
use super::proto::deploy_event::Event;
use super::proto::function_service_server::FunctionService;
use super::proto::invocation_end::How;
use super::proto::invoke_stream_request::Message as In;
use super::proto::invoke_stream_response::Message as Out;
use super::proto::{self, deploy_request};
use super::replays::Replays;
use super::status::invalid;
use super::{convert, network, pools};
use crate::agent::End;
use crate::agent::streams::Pipe;
use crate::fleet::Fleet;
use crate::fleet::functions::deploy::{Deploy, From, Step};
use crate::fleet::functions::function::Look;
use crate::fleet::functions::invoke::{Came, Invocation, Invoke, Timings};
use crate::fleet::functions::settings::{Command, Settings};
use crate::fleet::streams::Heard;
use crate::fleet::vm::Vm;

/// Events of one stream that the client has not taken yet.
const EVENTS_MAX: usize = 16;
/// Largest payload, and largest piece of stdin.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// The service.
pub struct Functions {
    fleet: Arc<Fleet>,
    replays: Replays<proto::InvokeResponse>,
}

impl Functions {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet, replays: Replays::default() }
    }

    async fn run(&self, request: proto::InvokeRequest) -> Result<proto::InvokeResponse, Status> {
        let proto::InvokeRequest { function, payload, env, timeout_ms, .. } = request;
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(invalid(format!(
                "a payload of {} bytes; the most is {PAYLOAD_BYTES_MAX}: use InvokeStream for more",
                payload.len()
            )));
        }
        let invoked = self.fleet.invoke(invoke_in(function, env, timeout_ms), payload).await?;
        let outcome = invoked.outcome;
        Ok(proto::InvokeResponse {
            output: outcome.stdout.into(),
            stderr: outcome.stderr.into(),
            lost_bytes: outcome.lost_bytes,
            end: Some(end_out(&outcome.end, invoked.timings, &invoked.vm, invoked.came)),
        })
    }
}

/// The same bytes for the same request: a map's entries come in any order.
fn content(request: &proto::InvokeRequest) -> Vec<u8> {
    let env: std::collections::BTreeMap<_, _> = request.env.iter().collect();
    let rest = proto::InvokeRequest { env: HashMap::new(), ..request.clone() };
    format!("{env:?}").into_bytes().into_iter().chain(rest.encode_to_vec()).collect()
}

type Deploying = Pin<Box<dyn Stream<Item = Result<proto::DeployEvent, Status>> + Send>>;
type Invoking = Pin<Box<dyn Stream<Item = Result<proto::InvokeStreamResponse, Status>> + Send>>;

#[tonic::async_trait]
impl FunctionService for Functions {
    type DeployStream = Deploying;
    type InvokeStreamStream = Invoking;

    async fn deploy(
        &self,
        request: Request<proto::DeployRequest>,
    ) -> Result<Response<Self::DeployStream>, Status> {
        let request = deploy_in(request.into_inner())?;
        let (events, stream) = mpsc::channel(EVENTS_MAX);
        let fleet = Arc::clone(&self.fleet);
        tokio::spawn(async move {
            let (steps_in, mut steps) = mpsc::channel(EVENTS_MAX);
            let passing = async {
                while let Some(step) = steps.recv().await {
                    let event = match step {
                        Step::Phase(line) => Event::Phase(line),
                        Step::Output(bytes) => Event::Output(bytes),
                    };
                    if events.send(Ok(proto::DeployEvent { event: Some(event) })).await.is_err() {
                        return;
                    }
                }
            };
            // A caller that goes away drops it, and that ends what was made.
            let result = tokio::select! {
                (result, ()) = async { tokio::join!(fleet.deploy(request, steps_in), passing) } => result,
                () = events.closed() => return,
            };
            let last =
                result.map(|look| proto::DeployEvent { event: Some(Event::Function(function_out(look))) });
            let _ = events.send(last.map_err(Status::from)).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn get_function(
        &self,
        request: Request<proto::GetFunctionRequest>,
    ) -> Result<Response<proto::Function>, Status> {
        Ok(Response::new(function_out(self.fleet.function(&request.into_inner().function)?)))
    }

    async fn list_functions(
        &self,
        request: Request<proto::ListFunctionsRequest>,
    ) -> Result<Response<proto::ListFunctionsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::asked(request.page_size, &request.page_token)?;
        let (functions, next_page_token) =
            page.of(self.fleet.functions(), |one| one.name.clone(), function_out);
        Ok(Response::new(proto::ListFunctionsResponse { functions, next_page_token }))
    }

    async fn delete_function(
        &self,
        request: Request<proto::DeleteFunctionRequest>,
    ) -> Result<Response<proto::DeleteFunctionResponse>, Status> {
        self.fleet.delete_function(&request.into_inner().function).await?;
        Ok(Response::new(proto::DeleteFunctionResponse {}))
    }

    async fn invoke(
        &self,
        request: Request<proto::InvokeRequest>,
    ) -> Result<Response<proto::InvokeResponse>, Status> {
        let request = request.into_inner();
        if request.request_id.is_empty() {
            return Ok(Response::new(self.run(request).await?));
        }
        let (id, asked) = (request.request_id.clone(), content(&request));
        Ok(Response::new(self.replays.once(&id, &asked, self.run(request)).await?))
    }

    async fn invoke_stream(
        &self,
        request: Request<Streaming<proto::InvokeStreamRequest>>,
    ) -> Result<Response<Self::InvokeStreamStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(In::Start(start)) = first else {
            return Err(invalid("the first message of InvokeStream must be `start`"));
        };
        let request = invoke_in(start.function, start.env, start.timeout_ms);
        let invocation = self.fleet.begin_invocation(request).await?;
        let (responses, stream) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(follow(invocation, requests, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Passes stdin, stdout and stderr on until the handler ends, its time is over, or the caller goes away.
async fn follow(
    invocation: Invocation,
    mut requests: Streaming<proto::InvokeStreamRequest>,
    responses: mpsc::Sender<Result<proto::InvokeStreamResponse, Status>>,
) {
    let send =
        async |message| responses.send(Ok(proto::InvokeStreamResponse { message: Some(message) })).await;
    let stream = Arc::clone(&invocation.stream);
    let writing = async {
        while let Some(request) = requests.next().await {
            match request?.message {
                Some(In::Stdin(bytes)) if bytes.len() <= PAYLOAD_BYTES_MAX => stream.write(bytes).await,
                Some(In::Stdin(_)) => return Err(invalid("stdin comes in messages of at most 1 MiB")),
                _ => return Err(invalid("messages after the first of InvokeStream must be `stdin`")),
            }
        }
        stream.end_stdin();
        Ok(())
    };
    let reading = async {
        loop {
            let message = match stream.next().await {
                Ok(Heard::Output(Pipe::Stdout, bytes)) => Out::Stdout(bytes),
                Ok(Heard::Output(Pipe::Stderr, bytes)) => Out::Stderr(bytes),
                Ok(Heard::End(end)) => return Some(Ok(end)),
                Err(error) => return Some(Err(error)),
            };
            if send(message).await.is_err() {
                return None;
            }
        }
    };
    tokio::pin!(writing, reading);
    let mut written = false;
    let deadline = tokio::time::sleep_until(invocation.deadline);
    tokio::pin!(deadline);
    let result = loop {
        tokio::select! {
            read = &mut reading => break read,
            wrote = &mut writing, if !written => match wrote {
                Ok(()) => written = true,
                Err(status) => {
                    // Ended now, whether or not the caller takes the error.
                    drop(invocation);
                    let _ = responses.send(Err(status)).await;
                    return;
                }
            },
            () = &mut deadline => {
                let error = invocation.timed_out();
                let _ = responses.send(Err(error.into())).await;
                return;
            }
            () = responses.closed() => break None,
        }
    };
    let last = match result {
        // Dropped, the invocation ends its VM.
        None => return,
        Some(Ok(end)) => {
            let (vm, came) = (Arc::clone(&invocation.vm), invocation.came);
            let timings = invocation.ended(&end);
            Ok(proto::InvokeStreamResponse { message: Some(Out::End(end_out(&end, timings, &vm, came))) })
        }
        Some(Err(error)) => Err(invocation.lost(error).into()),
    };
    let _ = responses.send(last).await;
}

fn invoke_in(function: String, environment: HashMap<String, String>, timeout_ms: u32) -> Invoke {
    let timeout = (timeout_ms > 0).then(|| millis(timeout_ms));
    Invoke { function, environment: pairs(environment), timeout }
}

/// In the order of their names.
fn pairs(map: HashMap<String, String>) -> Vec<(String, String)> {
    let mut pairs: Vec<_> = map.into_iter().collect();
    pairs.sort();
    pairs
}

fn end_out(end: &End, timings: Timings, vm: &Vm, came: Came) -> proto::InvocationEnd {
    let [slot_address, slot_address6] = vm.slot().map(|link| network::addresses(&link)).unwrap_or_default();
    proto::InvocationEnd {
        how: Some(match end {
            End::Exited(status) => How::ExitStatus(*status),
            End::Signalled(signal) => How::Signal(*signal),
            End::Failed(why) => How::Failure(why.clone()),
        }),
        timings: Some(proto::InvocationTimings {
            queue_us: timings.queue_us,
            vm_us: timings.vm_us,
            start_us: timings.start_us,
            run_us: timings.run_us,
        }),
        vm: vm.id.clone(),
        slot_address,
        slot_address6,
        vm_origin: match came {
            Came::Ready => proto::VmOrigin::Ready,
            Came::Started => proto::VmOrigin::Started,
            Came::Reused => proto::VmOrigin::Reused,
        }
        .into(),
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

fn command_in(command: proto::GuestCommand) -> Command {
    Command {
        arguments: command.args,
        environment: pairs(command.env),
        folder: command.cwd,
        user: command.user,
    }
}

fn or<T: Default + PartialEq>(number: T, usual: T) -> T {
    if number == T::default() { usual } else { number }
}

pub fn deploy_in(request: proto::DeployRequest) -> Result<Deploy, Status> {
    let from = match request.from {
        Some(deploy_request::From::Snapshot(snapshot)) => From::Snapshot(snapshot),
        Some(deploy_request::From::Image(image)) => From::Image(image),
        Some(deploy_request::From::Embedded(true)) => From::Embedded,
        Some(deploy_request::From::Embedded(false)) => {
            return Err(invalid("embedded must be true when it is set"));
        }
        None => return Err(invalid("say what the function is made from: one of `from`")),
    };
    let settings = request.settings.unwrap_or_default();
    let usual = Settings::default();
    let handler = settings.handler.ok_or_else(|| invalid("say what is run: settings.handler"))?;
    Ok(Deploy {
        name: request.name,
        from,
        prepare: request.prepare.map(command_in),
        settings: Settings {
            handler: command_in(handler),
            timeout: or(millis(settings.timeout_ms), usual.timeout),
            concurrency: or(settings.concurrency, usual.concurrency),
            queue: settings.queue.unwrap_or(usual.queue),
            queue_timeout: settings.queue_timeout_ms.map_or(usual.queue_timeout, millis),
            invocations_per_vm: or(settings.invocations_per_vm, usual.invocations_per_vm),
            min_ready: settings.min_ready,
            idle_ttl: settings.idle_ttl_ms.map_or(usual.idle_ttl, millis),
            mode: pools::mode_in(settings.mode)?,
            memory_mode: convert::memory_mode_in(settings.memory_mode)?,
            limits: convert::limits_in(settings.limits),
            slots: network::slots_in(settings.networks)?,
        },
    })
}

fn ms(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn function_out(look: Look) -> proto::Function {
    let settings = &*look.settings;
    let handler = &settings.handler;
    proto::Function {
        name: look.name,
        settings: Some(proto::FunctionSettings {
            handler: Some(proto::GuestCommand {
                args: handler.arguments.clone(),
                env: handler.environment.iter().cloned().collect(),
                cwd: handler.folder.clone(),
                user: handler.user.clone(),
            }),
            timeout_ms: ms(settings.timeout),
            concurrency: settings.concurrency,
            queue: Some(settings.queue),
            queue_timeout_ms: Some(ms(settings.queue_timeout)),
            invocations_per_vm: settings.invocations_per_vm,
            min_ready: settings.min_ready,
            idle_ttl_ms: Some(ms(settings.idle_ttl)),
            mode: pools::mode_out(settings.mode).into(),
            memory_mode: convert::memory_mode_out(settings.memory_mode).into(),
            limits: convert::limits_out(settings.limits),
            networks: network::slots_out(&settings.slots),
        }),
        snapshot: look.made.snapshot,
        own_snapshot: look.made.own,
        from: look.made.from,
        revision: look.made.revision,
        running: look.running,
        queued: look.queued,
        warm: look.warm,
        succeeded: look.succeeded,
        failed: look.failed,
        timed_out: look.timed_out,
        refused: look.refused,
        cancelled: look.cancelled,
        reused: look.reused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_request_has_the_same_content_whatever_order_a_map_has() {
        let env =
            |names: &mut dyn Iterator<Item = u32>| names.map(|n| (n.to_string(), "x".to_owned())).collect();
        let request =
            proto::InvokeRequest { function: "f".into(), env: env(&mut (0..50)), ..Default::default() };
        let same = proto::InvokeRequest { env: env(&mut (0..50).rev()), ..request.clone() };
        assert_eq!(content(&request), content(&same));
        let other = proto::InvokeRequest { env: env(&mut (1..51)), ..request.clone() };
        assert_ne!(content(&request), content(&other));
        assert_ne!(
            content(&request),
            content(&proto::InvokeRequest { function: "g".into(), ..request.clone() })
        );
    }
}
