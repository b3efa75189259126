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
    /// fails, or its future is dropped, everything is as it was.
    pub async fn deploy(
        self: &Arc<Self>,
        request: Deploy,
        progress: mpsc::Sender<Step>,
    ) -> Result<Look, FleetError> {
        id::check_name("a function", &request.name)?;
        request.settings.check()?;
        self.check_limits(request.settings.limits).await?;
        let _changing = self.functions.changing.lock().await;
        {
            let table = self.functions.lock();
            if !table.contains_key(&request.name) && table.len() >= FUNCTIONS_MAX {
                return Err(FleetError::Limit {
                    what: "functions",
                    limit: FUNCTIONS_MAX,
                    hint: "delete one",
                });
            }
        }
        let (snapshot, own, from) = self.make_snapshot(&request, &progress).await?;
        let before = self.functions.get(&request.name).ok().map(|function| function.made());
        let revision = before.map_or(1, |made| made.revision + 1);
        let made = Made { snapshot: snapshot.clone(), own, from, revision };
        if let Err(error) = self.write_function(&request.name, &made, &request.settings).await {
            if own {
                remove_snapshot(self, &snapshot).await;
            }
            return Err(error);
        }
        let change = if revision == 1 { Change::Made } else { Change::Changed };
        let old = self.functions.put(self, &request.name, made, request.settings);
        if let Some(old) = old.filter(|old| old.own && old.snapshot != snapshot) {
            // What stands ready of it has its files open.
            remove_snapshot(self, &old.snapshot).await;
        }
        self.events.tell(|| Event::new(Kind::Function, change, &request.name, Some(&request.name)));
        self.function(&request.name)
    }

    /// The snapshot's id, whether it was made for this, and from what.
    async fn make_snapshot(
        self: &Arc<Self>,
        request: &Deploy,
        progress: &mpsc::Sender<Step>,
    ) -> Result<(String, bool, String), FleetError> {
        let (vm, from) = match &request.from {
            From::Snapshot(name) => {
                let source = self.snapshots.source(name).await?;
                if source.hello.is_none() {
                    return Err(FleetError::NoAgentInSnapshot);
                }
                let id = source.id();
                self.check_slots(&request.settings.pool(id.clone()), &source.networks)?;
                if request.prepare.is_none() {
                    return Ok((id, false, format!("snapshot {name}")));
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
                tell(progress, format!("{} started from snapshot {name}", vm.id)).await;
                (vm, format!("snapshot {name}"))
            }
            From::Image(name) => {
                let vm = self.boot_to_agent(Some(name), &request.settings.slots, progress).await?;
                (vm, format!("image {name}"))
            }
            From::Embedded => {
                let vm = self.boot_to_agent(None, &request.settings.slots, progress).await?;
                (vm, "embedded test guest".to_owned())
            }
        };
        // Whatever happens now, this VM is to end.
        let _guard = Guard::new(self, Arc::clone(&vm));
        if let Some(prepare) = &request.prepare {
            let begun = Instant::now();
            run_prepare(&vm, prepare, progress).await?;
            tell(progress, format!("prepared in {:.1} s", begun.elapsed().as_secs_f64())).await;
        }
        let freeze = CreateSnapshot {
            vm: vm.id.clone(),
            name: None,
            stop_after: true,
            function: Some(request.name.clone()),
            claim: None,
        };
        let taken = self.create_snapshot(freeze).await?;
        tell(progress, format!("frozen as {}", taken.snapshot.id)).await;
        Ok((taken.snapshot.id, true, from))
    }

    /// Boots an image (`None`: the embedded guest) until its agent has said hello, with the interfaces that its clones will have.
    async fn boot_to_agent(
        self: &Arc<Self>,
        image: Option<&str>,
        slots: &[Option<Access>],
        progress: &mpsc::Sender<Step>,
    ) -> Result<Arc<Vm>, FleetError> {
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
        let (made, ()) = tokio::join!(self.create_for_now(request, events_in), passing);
        Ok(made?.vm)
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
