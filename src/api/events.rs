//! EventService.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::convert;
use super::proto;
use super::proto::event_service_server::EventService;
use super::proto::happening::Change as ProtoChange;
use super::proto::watch_event::Event as Told;
use super::status::{invalid, limit_reached};
use crate::fleet::Fleet;
use crate::fleet::events::{Change, Event, Kind, RecvError};
use crate::fleet::limits::WATCHES_MAX;

/// Events on their way to one caller.
const ON_THEIR_WAY_MAX: usize = 64;

/// The service.
pub struct Events {
    fleet: Arc<Fleet>,
    watches: Arc<Semaphore>,
}

impl Events {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet, watches: Arc::new(Semaphore::new(WATCHES_MAX)) }
    }
}

type Watching = Pin<Box<dyn Stream<Item = Result<proto::WatchEvent, Status>> + Send>>;

#[tonic::async_trait]
impl EventService for Events {
    type WatchStream = Watching;

    async fn watch(
        &self,
        request: Request<proto::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let wanted = Wanted::asked(&request)?;
        let permit = Arc::clone(&self.watches).try_acquire_owned().map_err(|_| {
            limit_reached(format!("{WATCHES_MAX} watches are open, the most there can be; end some"))
        })?;
        let (events, stream) = mpsc::channel(ON_THEIR_WAY_MAX);
        let watch = Watch {
            fleet: Arc::clone(&self.fleet),
            wanted,
            existing: request.existing,
            events,
            _permit: permit,
        };
        tokio::spawn(watch.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Which events a caller wants.
struct Wanted {
    /// Empty: all.
    kinds: Vec<Kind>,
    ready_in_pools: bool,
}

impl Wanted {
    fn asked(request: &proto::WatchRequest) -> Result<Self, Status> {
        let kind = |number: &i32| match proto::Kind::try_from(*number) {
            Ok(proto::Kind::Vm) => Ok(Kind::Vm),
            Ok(proto::Kind::Snapshot) => Ok(Kind::Snapshot),
            Ok(proto::Kind::Image) => Ok(Kind::Image),
            Ok(proto::Kind::Pool) => Ok(Kind::Pool),
            Ok(proto::Kind::Function) => Ok(Kind::Function),
            Ok(proto::Kind::Unspecified) | Err(_) => {
                Err(invalid(format!("kind {number} is not known; see Kind")))
            }
        };
        let kinds = request.kinds.iter().take(16).map(kind).collect::<Result<_, _>>()?;
        Ok(Self { kinds, ready_in_pools: request.ready_in_pools })
    }

    fn is(&self, event: &Event) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind)) && (self.ready_in_pools || !event.held)
    }
}

struct Watch {
    fleet: Arc<Fleet>,
    wanted: Wanted,
    existing: bool,
    events: mpsc::Sender<Result<proto::WatchEvent, Status>>,
    _permit: OwnedSemaphorePermit,
}

impl Watch {
    /// Until the caller goes away.
    async fn run(self) {
        // Before the list: what is made meanwhile is told rather twice than not at all.
        let mut happening = self.fleet.watch();
        if self.existing {
            let all = match self.fleet.everything().await {
                Ok(all) => all,
                Err(error) => {
                    let _ = self.events.send(Err(error.into())).await;
                    return;
                }
            };
            for event in all.iter().filter(|event| self.wanted.is(event)) {
                if !self.tell(out(event)).await {
                    return;
                }
            }
            if !self.tell(Told::Synced(true)).await {
                return;
            }
        }
        loop {
            let heard = tokio::select! {
                heard = happening.recv() => heard,
                () = self.events.closed() => return,
            };
            let told = match heard {
                Ok(event) if self.wanted.is(&event) => out(&event),
                Ok(_) => continue,
                Err(RecvError::Lagged(lost)) => Told::Lost(lost),
                Err(RecvError::Closed) => return,
            };
            if !self.tell(told).await {
                return;
            }
        }
    }

    /// Whether the caller is still there.
    async fn tell(&self, event: Told) -> bool {
        self.events.send(Ok(proto::WatchEvent { event: Some(event) })).await.is_ok()
    }
}

fn out(event: &Event) -> Told {
    let kind = match event.kind {
        Kind::Vm => proto::Kind::Vm,
        Kind::Snapshot => proto::Kind::Snapshot,
        Kind::Image => proto::Kind::Image,
        Kind::Pool => proto::Kind::Pool,
        Kind::Function => proto::Kind::Function,
    };
    let change = match event.change {
        Change::Exists => ProtoChange::Exists,
        Change::Made => ProtoChange::Made,
        Change::Changed => ProtoChange::Changed,
        Change::Gone => ProtoChange::Gone,
    };
    Told::Happening(proto::Happening {
        unix_ms: event.unix_ms,
        kind: kind.into(),
        change: change.into(),
        id: event.id.clone(),
        name: event.name.clone().unwrap_or_default(),
        state: event.state.map_or(proto::VmState::Unspecified, convert::state_out).into(),
        exit_reason: event.reason.clone().unwrap_or_default(),
        ready_in_pool: event.held,
        problem: event.problem.as_ref().map(|problem| problem.text.clone()).unwrap_or_default(),
        problem_reason: event.problem.as_ref().map(|problem| problem.reason.to_owned()).unwrap_or_default(),
    })
}
