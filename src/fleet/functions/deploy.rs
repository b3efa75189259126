//! Making a function: from a snapshot as it is, or from an image or snapshot that is prepared first and frozen then.

use std::sync::Arc;
use std::time::Instant;

use prost::bytes::Bytes;
use tokio::sync::mpsc;

use super::settings::{Command, FUNCTIONS_MAX, Made, PREPARE_TIMEOUT, Settings};
use super::{function::Look, remove_snapshot};
use crate::agent::End;
use crate::agent::streams::Pipe;
use crate::fleet::boot::{CreateVm, Progress, ReadyPoint};
use crate::fleet::cgroup::Limits;
use crate::fleet::clones::CloneVm;
use crate::fleet::error::FleetError;
use crate::fleet::events::{Change, Event, Kind};
use crate::fleet::limits::READY_TIMEOUT_DEFAULT;
use crate::fleet::network;
use crate::fleet::registry::Guard;
use crate::fleet::slots::access::Access;
use crate::fleet::snapshots::CreateSnapshot;
use crate::fleet::streams::Heard;
use crate::fleet::tasks::to_its_end;
use crate::fleet::vm::Vm;
use crate::fleet::{Fleet, id};
use crate::worker::protocol::MemoryMode;

/// Progress that nobody has taken yet.
const PROGRESS_MAX: usize = 64;
/// Of what a prepare command that failed wrote last, so much is in the error.
const LAST_BYTES: usize = 1 << 10;

/// What a function is made of.
#[derive(Debug, Clone)]
pub enum From {
    /// Id or name.
    Snapshot(String),
    /// Name.
    Image(String),
    /// The embedded test guest.
    Embedded,
}

/// A function to be made, or changed.
#[derive(Debug, Clone)]
pub struct Deploy {
    pub name: String,
    pub from: From,
    /// Run once, before it is frozen; must end with status 0.
    pub prepare: Option<Command>,
    pub settings: Settings,
}

/// What a function will be made of.
enum Prepared {
    /// As it is.
    Snapshot { id: String, from: String },
    /// To be frozen. Dropped before, it ends.
    Vm { guard: Guard, from: String },
}

/// What happens meanwhile.
#[derive(Debug, Clone)]
pub enum Step {
    /// One line for people.
    Phase(String),
    /// What the prepare command writes.
    Output(Bytes),
}

impl Fleet {
    /// Makes a function, or changes one: invocations go to the older deployment until the new one can take them, and none fails. If this
    /// fails, or its caller goes away (`progress` is closed) before it is frozen, everything is as it was.
    pub async fn deploy(
        self: &Arc<Self>,
        request: Deploy,
        progress: mpsc::Sender<Step>,
    ) -> Result<Look, FleetError> {
        id::check_name("a function", &request.name)?;
        request.settings.check()?;
        self.check_limits(request.settings.limits).await?;
        // Before the work; and again after it, when it counts.
        self.check_room_for_function(&request.name)?;
        let prepared = self.prepare(&request, &progress).await?;
        let fleet = Arc::clone(self);
        to_its_end(async move {
            let (snapshot, own, from) = fleet.freeze(prepared, &request.name, &progress).await?;
            let put = fleet.put_function(request, snapshot.clone(), own, from).await;
            if put.is_err() && own {
                remove_snapshot(&fleet, &snapshot).await;
            }
            put
        })
        .await
    }

    fn check_room_for_function(&self, name: &str) -> Result<(), FleetError> {
        let table = self.functions.lock();
        match table.contains_key(name) || table.len() < FUNCTIONS_MAX {
            true => Ok(()),
            false => Err(FleetError::Limit { what: "functions", limit: FUNCTIONS_MAX, hint: "delete one" }),
        }
    }

    /// The function is made of this snapshot from now on.
    async fn put_function(
        self: &Arc<Self>,
        request: Deploy,
        snapshot: String,
        own: bool,
        from: String,
    ) -> Result<Look, FleetError> {
        let _changing = self.functions.changing.lock().await;
        self.check_room_for_function(&request.name)?;
        let before = self.functions.get(&request.name).ok().map(|function| function.made());
        let revision = before.map_or(1, |made| made.revision + 1);
        let made = Made { snapshot: snapshot.clone(), own, from, revision };
        self.write_function(&request.name, &made, &request.settings).await?;
        let change = if revision == 1 { Change::Made } else { Change::Changed };
        let old = self.functions.put(self, &request.name, made, request.settings);
        if let Some(old) = old.filter(|old| old.own && old.snapshot != snapshot) {
            // What stands ready of it has its files open.
            remove_snapshot(self, &old.snapshot).await;
        }
        self.events.tell(|| Event::new(Kind::Function, change, &request.name, Some(&request.name)));
        self.function(&request.name)
    }

    /// What the function will be made of.
    async fn prepare(
        self: &Arc<Self>,
        request: &Deploy,
        progress: &mpsc::Sender<Step>,
    ) -> Result<Prepared, FleetError> {
        let (guard, from) = match &request.from {
            From::Snapshot(name) => {
                let source = self.snapshots.source(name).await?;
                if source.hello.is_none() {
                    return Err(FleetError::NoAgentInSnapshot);
                }
                let id = source.id();
                self.check_slots(&request.settings.pool(id.clone()), &source.networks)?;
                if request.prepare.is_none() {
                    return Ok(Prepared::Snapshot { id, from: format!("snapshot {name}") });
                }
                let clone = CloneVm {
                    snapshot: id,
                    count: 1,
                    memory_mode: MemoryMode::Mapped,
                    managed: true,
                    name: None,
                    networks: network::requests(&request.settings.slots),
                    limits: Limits::default(),
                    first_call: None,
                };
                let vms = self.clone_vm(clone).await?.vms;
                let vm = vms.into_iter().next().ok_or(FleetError::WorkerConfused)?;
                let guard = Guard::new(self, vm);
                tell(progress, format!("{} started from snapshot {name}", guard.vm().id)).await;
                (guard, format!("snapshot {name}"))
            }
            From::Image(name) => {
                let guard = self.boot_to_agent(Some(name), &request.settings.slots, progress).await?;
                (guard, format!("image {name}"))
            }
            From::Embedded => {
                let guard = self.boot_to_agent(None, &request.settings.slots, progress).await?;
                (guard, "embedded test guest".to_owned())
            }
        };
        if let Some(prepare) = &request.prepare {
            let begun = Instant::now();
            run_prepare(guard.vm(), prepare, progress).await?;
            tell(progress, format!("prepared in {:.1} s", begun.elapsed().as_secs_f64())).await;
        }
        Ok(Prepared::Vm { guard, from })
    }

    /// The snapshot's id, whether it was made for this, and from what. For nobody none is made.
    async fn freeze(
        self: &Arc<Self>,
        prepared: Prepared,
        function: &str,
        progress: &mpsc::Sender<Step>,
    ) -> Result<(String, bool, String), FleetError> {
        let (guard, from) = match prepared {
            Prepared::Snapshot { id, from } => return Ok((id, false, from)),
            Prepared::Vm { guard, from } => (guard, from),
        };
        let freeze = CreateSnapshot {
            vm: guard.vm().id.clone(),
            name: None,
            stop_after: true,
            function: Some(function.to_owned()),
            claim: None,
        };
        let id = self.create_snapshot(freeze).await?.snapshot.id;
        drop(guard);
        tell(progress, format!("frozen as {id}")).await;
        if progress.is_closed() {
            remove_snapshot(self, &id).await;
            return Err(FleetError::WrongState("the caller went away before the function was made".into()));
        }
        Ok((id, true, from))
    }

    /// Boots an image (`None`: the embedded guest) until its agent has said hello, with the interfaces that its clones will have.
    async fn boot_to_agent(
        self: &Arc<Self>,
        image: Option<&str>,
        slots: &[Option<Access>],
        progress: &mpsc::Sender<Step>,
    ) -> Result<Guard, FleetError> {
        let plan = self.slots.plan();
        let command_line = match (image, slots.iter().any(Option::is_some)) {
            // It takes addresses from nowhere else.
            (None, true) => format!("coldspark.ip={} coldspark.ip6={}", plan.guest4(), plan.guest6()),
            _ => String::new(),
        };
        let request = CreateVm {
            image: image.map(str::to_owned),
            name: None,
            vcpus: None,
            memory_bytes: None,
            protocol: None,
            hardware: None,
            agent_port: None,
            command_line,
            ready: Some(ReadyPoint::Agent),
            ready_timeout: READY_TIMEOUT_DEFAULT,
            disks: Vec::new(),
            networks: network::requests(slots),
            limits: Limits::default(),
            restart_on_reset: false,
            profile: false,
        };
        let (events_in, mut events) = mpsc::channel(PROGRESS_MAX);
        let passing = async {
            while let Some(event) = events.recv().await {
                match event {
                    Progress::Phase(phase) => {
                        tell(progress, format!("{} after {} ms", phase.name, phase.us / 1000)).await;
                    }
                    Progress::Choice(choice) => tell(progress, choice).await,
                    Progress::Accepted(vm) => tell(progress, format!("{} boots", vm.id)).await,
                    Progress::Console(_) => {}
                }
            }
        };
        // Guarded at once: the caller may go away while what there is to tell waits for it.
        let making = async { Ok(Guard::new(self, self.create_for_now(request, events_in).await?.vm)) };
        tokio::join!(making, passing).0
    }
}

/// One who does not listen misses it.
async fn tell(progress: &mpsc::Sender<Step>, line: String) {
    let _ = progress.send(Step::Phase(line)).await;
}

async fn run_prepare(vm: &Vm, prepare: &Command, progress: &mpsc::Sender<Step>) -> Result<(), FleetError> {
    let running = async {
        let stream = vm.open(prepare.what(&[])).await?;
        stream.end_stdin();
        let mut last = Vec::new();
        loop {
            match stream.next().await? {
                Heard::Output(Pipe::Stdout | Pipe::Stderr, bytes) => {
                    last.extend_from_slice(&bytes);
                    let over = last.len().saturating_sub(LAST_BYTES);
                    last.drain(..over);
                    let _ = progress.send(Step::Output(bytes)).await;
                }
                Heard::End(End::Exited(0)) => return Ok(()),
                Heard::End(end) => {
                    return Err(FleetError::Prepare {
                        how: how(&end),
                        last: String::from_utf8_lossy(&last).trim().replace(char::is_control, " "),
                    });
                }
            }
        }
    };
    let late = |_| FleetError::ExecTimeout(PREPARE_TIMEOUT.as_millis());
    tokio::time::timeout(PREPARE_TIMEOUT, running).await.map_err(late)?
}

/// How a command ended, for people.
pub fn how(end: &End) -> String {
    match end {
        End::Exited(status) => format!("ended with status {status}"),
        End::Signalled(signal) => format!("was ended by signal {signal}"),
        End::Failed(why) => format!("failed: {why}"),
    }
}
