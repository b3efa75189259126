//! Pools: clones of a snapshot that stand ready, so that whoever asks for one does not wait for it to be made.
//!
//! | module | what it holds |
//! |---|---|
//! | [`settings`] | what a pool is to be, its limits, its file |
//! | [`demand`] | how many are needed: the rate of requests, and the time that making one takes |
//! | [`stock`] | what one pool has, and what is to be done about it |
//! | [`pool`] | one pool, and the task that does it |
//!
//! What was handed over never comes back: when its VM ends, there is room for another.

#![forbid(unsafe_code)]

pub mod demand;
pub mod pool;
pub mod settings;
pub mod stock;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Semaphore;

use pool::{Offer, Out, Pool, What};
use settings::{Mode, POOLS_MAX, Settings, Stored};
use stock::{Look, Ready};

use super::Fleet;
use super::boot::{micros, step};
use super::cgroup::Limits;
use super::claims::Claim;
use super::clones::{FirstCall, Place, answer};
use super::error::FleetError;
use super::events::{Change, Event, Kind};
use super::limits::WORKER_TIMEOUT;
use super::network::{NetworkError, VmNetwork};
use super::record::Settled;
use super::registry::Guard;
use super::slots::Reserved;
use super::slots::access::{Access, Publish};
use super::slots::error::SlotError;
use super::sources::Source;
use super::stored::Files;
use super::tasks::{blocking, to_its_end};
use super::vm::Vm;
use super::{id, identity};
use crate::agent::AgentReply;
use crate::worker::protocol::{MemoryMode, Step};

/// Ready ones that may turn out to be dead before one is made instead.
const BAD_ONES_MAX: u32 = 4;

/// Names of pools that are kept for functions begin so; nobody else can give one such a name.
pub const FUNCTION_PREFIX: &str = "fn/";

/// All pools.
#[derive(Debug)]
pub struct Pools {
    table: Mutex<BTreeMap<String, Arc<Pool>>>,
    files: Arc<Files>,
    /// Changes of the table and its files, one at a time.
    changing: tokio::sync::Mutex<()>,
    /// A permit for each that may be made at a time, over all pools.
    pub(super) turns: Arc<Semaphore>,
    /// One is made in so many times the time that it takes, so that the rest of a CPU's time is left to those who are served.
    pub(super) pace: f64,
}

/// A pool to be made.
#[derive(Debug, Clone)]
pub struct CreatePool {
    pub name: String,
    pub settings: Settings,
}

/// What is to change in a pool; `None`: it stays.
#[derive(Debug, Clone, Default)]
pub struct ChangePool {
    pub snapshot: Option<String>,
    pub mode: Option<Mode>,
    pub min_ready: Option<u32>,
    pub max: Option<u32>,
    pub idle_ttl: Option<std::time::Duration>,
    pub memory_mode: Option<MemoryMode>,
    pub managed: Option<bool>,
    pub limits: Option<Limits>,
    pub slots: Option<Vec<Option<Access>>>,
}

/// One that somebody asks a pool for.
#[derive(Debug, Clone)]
pub struct TakeVm {
    pub pool: String,
    pub name: Option<String>,
    pub first_call: Option<FirstCall>,
    /// Ports of the host that are to lead to it.
    pub publish: Vec<Publish>,
}

/// One that was taken.
#[derive(Debug)]
pub struct Taken {
    pub vm: Arc<Vm>,
    /// To the first call, and the microseconds from the request's arrival to it.
    pub answer: Option<(AgentReply, u64)>,
    /// It stood ready; otherwise it was started for the request.
    pub was_ready: bool,
}

impl Taken {
    /// It outlives this daemon from now on. `claim`: the request, if it has an id, and what it is answered besides.
    pub fn settle(&self, claim: Option<(Claim, Vec<u8>)>) {
        self.vm.settle(Settled { claim, siblings: Vec::new() });
    }
}

/// A pool as it is.
#[derive(Debug, Clone)]
pub struct Named {
    pub name: Arc<str>,
    pub look: Look,
}

impl Pools {
    fn look(&self, pool: &Pool) -> Named {
        Named { name: Arc::clone(&pool.name), look: pool.look(self.pace) }
    }

    /// Reads what pools there are; [`begin`](Self::begin) begins to keep them. `share`: of the CPUs' time that may go into making, in hundredths.
    pub fn open(path: PathBuf, share: u32) -> Result<Self, FleetError> {
        let files = Files::open(path, "a pool")?;
        let found = files.read_all(Stored::check);
        for problem in found.problems {
            tracing::error!(
                problem,
                "a pool's file cannot be used and is left as it is: the pool is not kept"
            );
        }
        let pools = found.things.into_iter();
        let table = pools.map(|(name, stored)| (name.clone(), Pool::new(&name, stored.settings())));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            table: Mutex::new(table.collect()),
            files: Arc::new(files),
            changing: tokio::sync::Mutex::new(()),
            turns: Arc::new(Semaphore::new(cpus.div_ceil(2))),
            pace: 100.0 / f64::from(share.clamp(1, 100)),
        })
    }

    /// Keeps the pools that there are.
    pub fn begin(&self, fleet: &Arc<Fleet>) {
        for pool in self.lock().values() {
            tokio::spawn(pool::keep_always(Arc::downgrade(fleet), Arc::clone(pool)));
        }
    }

    /// Lets all that stands ready go.
    pub fn close(&self, fleet: &Fleet) {
        let pools = std::mem::take(&mut *self.lock());
        for pool in pools.into_values() {
            pool.close(fleet, "the service ended");
        }
    }

    /// More is known of what clones of this snapshot touch first.
    pub fn renew(&self, snapshot: &str) {
        self.lock().values().for_each(|pool| pool.renew(snapshot));
    }

    /// The pool that is made of this snapshot, if there is one.
    pub fn of(&self, snapshot: &str) -> Option<Arc<Pool>> {
        self.lock().values().find(|pool| pool.settings().snapshot == snapshot).cloned()
    }

    /// Keeps a pool that belongs to something else, which sees to its file. Its name is one that nobody can give.
    pub(super) fn add(&self, fleet: &Arc<Fleet>, name: &str, settings: Settings) -> Arc<Pool> {
        let pool = Pool::new(name, settings);
        self.lock().insert(name.to_owned(), Arc::clone(&pool));
        tokio::spawn(pool::keep_always(Arc::downgrade(fleet), Arc::clone(&pool)));
        pool
    }

    /// Ends a pool that was added.
    pub(super) fn drop_added(&self, fleet: &Fleet, name: &str) {
        if let Some(pool) = self.lock().remove(name) {
            pool.close(fleet, "its function was deleted");
        }
    }

    /// Counts a VM that an earlier daemon has handed out, if its pool is still there.
    pub(super) fn adopt(&self, name: &str, vm: &Arc<Vm>) {
        if let Some(pool) = self.lock().get(name) {
            until_its_end(Arc::clone(vm), pool.adopt());
        }
    }

    fn get(&self, name: &str) -> Result<Arc<Pool>, FleetError> {
        if let Some(function) = name.strip_prefix(FUNCTION_PREFIX) {
            return Err(FleetError::WrongState(format!(
                "this pool is kept for the function {function}, by whose settings it is kept"
            )));
        }
        let found = self.lock().get(name).cloned();
        found.ok_or_else(|| FleetError::NotFound { what: "pool", name: name.chars().take(80).collect() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pool>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fleet {
    /// What a pool is where nothing else is wished.
    pub fn usual_pool(&self) -> Settings {
        let usual = Settings::default();
        Settings { max: usual.max.min(u32::try_from(self.registry.vms_max()).unwrap_or(u32::MAX)), ..usual }
    }

    /// Makes a pool and begins to keep it. Its snapshot is looked at: what no clone could be made of is refused. Of a pool its file and what is kept are
    /// changed both, or neither, also when the caller goes away meanwhile.
    pub async fn create_pool(self: &Arc<Self>, request: CreatePool) -> Result<Named, FleetError> {
        let fleet = Arc::clone(self);
        to_its_end(async move { fleet.make_pool(request).await }).await
    }

    async fn make_pool(self: &Arc<Self>, request: CreatePool) -> Result<Named, FleetError> {
        let CreatePool { name, settings } = request;
        id::check_name("a pool", &name)?;
        settings.check(self.registry.vms_max())?;
        self.check_limits(settings.limits).await?;
        let settings = self.resolve(settings).await?;
        let _changing = self.pools.changing.lock().await;
        {
            let table = self.pools.lock();
            if table.contains_key(&name) {
                return Err(FleetError::Exists { what: "a pool", name });
            }
            if table.keys().filter(|name| !name.starts_with(FUNCTION_PREFIX)).count() >= POOLS_MAX {
                return Err(FleetError::Limit { what: "pools", limit: POOLS_MAX, hint: "delete one" });
            }
        }
        self.write_pool(&name, &settings).await?;
        let pool = Pool::new(&name, settings);
        self.pools.lock().insert(name, Arc::clone(&pool));
        tokio::spawn(pool::keep_always(Arc::downgrade(self), Arc::clone(&pool)));
        self.events.tell(|| Event::new(Kind::Pool, Change::Made, &pool.name, Some(&pool.name)));
        Ok(self.pools.look(&pool))
    }

    /// Changes a pool. What stands ready and is of something else is replaced one by one, and handed out until it is.
    pub async fn change_pool(self: &Arc<Self>, name: &str, change: ChangePool) -> Result<Named, FleetError> {
        let (fleet, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move { fleet.set_pool(&name, change).await }).await
    }

    async fn set_pool(&self, name: &str, change: ChangePool) -> Result<Named, FleetError> {
        let _changing = self.pools.changing.lock().await;
        let pool = self.pools.get(name)?;
        let old = pool.settings();
        let settings = Settings {
            snapshot: change.snapshot.unwrap_or_else(|| old.snapshot.clone()),
            mode: change.mode.unwrap_or(old.mode),
            min_ready: change.min_ready.unwrap_or(old.min_ready),
            max: change.max.unwrap_or(old.max),
            idle_ttl: change.idle_ttl.unwrap_or(old.idle_ttl),
            memory_mode: change.memory_mode.unwrap_or(old.memory_mode),
            managed: change.managed.unwrap_or(old.managed),
            limits: change.limits.unwrap_or(old.limits),
            slots: change.slots.unwrap_or_else(|| old.slots.clone()),
        };
        settings.check(self.registry.vms_max())?;
        self.check_limits(settings.limits).await?;
        let settings = self.resolve(settings).await?;
        self.write_pool(name, &settings).await?;
        pool.change(settings);
        self.events.tell(|| Event::new(Kind::Pool, Change::Changed, name, Some(name)));
        Ok(self.pools.look(&pool))
    }

    /// Ends what stands ready and forgets the pool. VMs that were taken from it go on.
    pub async fn delete_pool(self: &Arc<Self>, name: &str) -> Result<(), FleetError> {
        let (fleet, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move { fleet.remove_pool(&name).await }).await
    }

    async fn remove_pool(&self, name: &str) -> Result<(), FleetError> {
        let _changing = self.pools.changing.lock().await;
        let pool = self.pools.get(name)?;
        let (files, file) = (Arc::clone(&self.pools.files), name.to_owned());
        blocking(move || files.remove(&file)).await??;
        self.pools.lock().remove(name);
        pool.close(self, "its pool was deleted");
        self.events.tell(|| Event::new(Kind::Pool, Change::Gone, name, Some(name)));
        Ok(())
    }

    pub fn pool(&self, name: &str) -> Result<Named, FleetError> {
        let pool = self.pools.get(name)?;
        Ok(self.pools.look(&pool))
    }

    /// All pools, by name.
    pub fn pools(&self) -> Vec<Named> {
        self.pools.lock().values().map(|pool| self.pools.look(pool)).collect()
    }

    /// With the snapshot's id in the place of its name; refuses a snapshot that the pool could not be made of.
    async fn resolve(&self, settings: Settings) -> Result<Settings, FleetError> {
        let source = self.snapshots.source(&settings.snapshot).await?;
        if settings.managed && source.hello.is_none() {
            return Err(FleetError::NoAgentInSnapshot);
        }
        self.check_slots(&settings, &source.networks)?;
        Ok(Settings { snapshot: source.id(), ..settings })
    }

    /// Refuses slots that VMs of a snapshot whose guest has these interfaces could not be given.
    pub(super) fn check_slots(&self, settings: &Settings, has: &[VmNetwork]) -> Result<(), FleetError> {
        settings.plan_networks(has)?;
        settings.access().map_or(Ok(()), |_| self.slots.check_on())
    }

    async fn write_pool(&self, name: &str, settings: &Settings) -> Result<(), FleetError> {
        let (files, name) = (Arc::clone(&self.pools.files), name.to_owned());
        let stored = Stored::new(settings);
        blocking(move || files.write(&name, &stored)).await?
    }

    /// Takes one out of a pool: one that stands ready, or if there is none one that is started for it. It is the caller's alone; the next daemon
    /// would end it until it is [settled](Taken::settle).
    pub async fn take_vm(self: &Arc<Self>, request: TakeVm) -> Result<Taken, FleetError> {
        let pool = self.pools.get(&request.pool)?;
        // Before anything is taken: a port that is somebody else's is to cost nothing.
        let reserved = match &request.publish[..] {
            [] => None,
            publish => {
                Access { publish: publish.to_vec(), ..Access::default() }
                    .check()
                    .map_err(NetworkError::from)?;
                if pool.settings().access().is_none() {
                    let name = pool.name.to_string();
                    return Err(NetworkError::from(SlotError::PoolWithoutSlot(name)).into());
                }
                Some(self.slots.reserve(publish)?)
            }
        };
        let mut taken = self.take_from(&pool, request).await?;
        if let Some(reserved) = reserved {
            taken.vm = self.lead_ports(taken.vm, reserved).await?;
        }
        Ok(taken)
    }

    /// Leads ports to a VM that was just taken; if that fails, it is ended.
    async fn lead_ports(self: &Arc<Self>, vm: Arc<Vm>, reserved: Reserved) -> Result<Arc<Vm>, FleetError> {
        let guard = Guard::new(self, Arc::clone(&vm));
        // One that was made ready before its pool was to have slots has none.
        let slot = vm
            .slot()
            .ok_or_else(|| SlotError::PoolWithoutSlot(vm.pool.as_deref().unwrap_or_default().to_owned()));
        vm.slot_changed(self.slots.publish(&slot.map_err(NetworkError::from)?, reserved).await?);
        Ok(guard.hand_over())
    }

    /// As [`take_vm`](Self::take_vm), of a pool that is known.
    pub(super) async fn take_from(
        self: &Arc<Self>,
        pool: &Arc<Pool>,
        request: TakeVm,
    ) -> Result<Taken, FleetError> {
        let arrived = Instant::now();
        let names: Vec<String> = request.name.iter().cloned().collect();
        names.iter().try_for_each(|name| id::check_name("a VM", name))?;
        self.registry.check_room(0, &names)?;
        self.headroom.check()?;
        let mut changes = pool.changes();
        let mut bad = 0;
        let mut again = false;
        loop {
            let found = pool.find(again)?;
            again = true;
            match found {
                Offer::Ready(ready, out) => {
                    let pool_name = Arc::clone(&pool.name);
                    match self.hand_over(*ready, pool_name, &request, arrived).await {
                        Ok(handed) => return Ok(keep_out(handed, out, true)),
                        // Nobody has seen it: the next one will do.
                        Err(HandOver::Bad(error)) if bad < BAD_ONES_MAX => {
                            tracing::debug!(pool = %pool.name, %error, "one that stood ready was not well");
                            pool.was_bad();
                            bad += 1;
                        }
                        Err(HandOver::Bad(error) | HandOver::Failed(error)) => return Err(error),
                    }
                }
                Offer::Room(settings, out) => {
                    let place = Place { pool: Some((Arc::clone(&pool.name), false)), ..Place::default() };
                    let source = match self.snapshots.source(&settings.snapshot).await {
                        Ok(source) => source,
                        // Deleted in this moment, because the pool is of another one now.
                        Err(_) if pool.settings().snapshot != settings.snapshot => continue,
                        Err(error) => return Err(error),
                    };
                    let handed = self.take_cold(source, &settings, place, &request, arrived).await?;
                    return Ok(keep_out(handed, out, false));
                }
                Offer::Soon => {
                    let left = WORKER_TIMEOUT.saturating_sub(arrived.elapsed());
                    if tokio::time::timeout(left, changes.changed()).await.is_err() {
                        return Err(FleetError::WorkerTimeout(WORKER_TIMEOUT.as_secs()));
                    }
                }
            }
        }
    }

    async fn hand_over(
        self: &Arc<Self>,
        ready: Ready<What>,
        pool: Arc<str>,
        request: &TakeVm,
        arrived: Instant,
    ) -> Result<Handed, HandOver> {
        let settings = Arc::clone(&ready.settings);
        match ready.what {
            What::Shell(shell, source) => {
                if shell.link.is_closed() {
                    shell.process.kill();
                    return Err(HandOver::Bad(FleetError::Ended(
                        "its worker ended while it stood ready".into(),
                    )));
                }
                let place = Place { pool: Some((pool, false)), shell: Some(shell), ..Place::default() };
                let taken = self.take_cold(source, &settings, place, request, arrived).await;
                taken.map_err(HandOver::Failed)
            }
            What::Vm(vm) => {
                // Ends it if anything fails, or the caller goes away.
                let guard = Guard::new(self, Arc::clone(&vm));
                let mut steps = vec![step("ready", micros(arrived))];
                wake_up(&vm, &settings, request.name.as_deref(), &mut steps).await.map_err(HandOver::Bad)?;
                let answer = first_call(&vm, request, &mut steps).await.map_err(HandOver::Failed)?;
                self.registry.release(&vm, request.name.clone()).map_err(HandOver::Failed)?;
                let start_us = micros(arrived);
                vm.change(|status| {
                    status.start_us = start_us;
                    status.steps = steps;
                });
                Ok((guard.hand_over(), answer.map(|reply| (reply, start_us))))
            }
        }
    }

    /// A clone whose guest runs for this request for the first time.
    async fn take_cold(
        self: &Arc<Self>,
        source: Arc<Source>,
        settings: &Settings,
        mut place: Place,
        request: &TakeVm,
        arrived: Instant,
    ) -> Result<Handed, FleetError> {
        if request.first_call.is_some() && source.hello.is_none() {
            return Err(FleetError::NoAgentInSnapshot);
        }
        place.name = request.name.clone();
        let networks = settings.plan_networks(&source.networks)?;
        let clone = settings.clone_request(request.first_call.clone());
        let (guard, answer) = self.clone_one(source, clone, networks, place, arrived).await?;
        Ok((guard.hand_over(), answer))
    }
}

/// A VM that is the caller's, and its answer to the first call.
type Handed = (Arc<Vm>, Option<(AgentReply, u64)>);

/// Why one that stood ready was not handed over.
enum HandOver {
    /// It was not well, and nobody has seen it: another will do.
    Bad(FleetError),
    Failed(FleetError),
}

/// Counts the VM as one of its pool's until it ends.
fn keep_out((vm, answer): Handed, out: Out, was_ready: bool) -> Taken {
    until_its_end(Arc::clone(&vm), out);
    Taken { vm, answer, was_ready }
}

fn until_its_end(vm: Arc<Vm>, out: Out) {
    tokio::spawn(async move {
        vm.ended().await;
        drop(out);
    });
}

/// Makes a VM that stood ready one that its caller can use.
async fn wake_up(
    vm: &Arc<Vm>,
    settings: &Settings,
    name: Option<&str>,
    steps: &mut Vec<Step>,
) -> Result<(), FleetError> {
    vm.check_lives()?;
    if settings.mode != Mode::Paused {
        return Ok(());
    }
    let begun = Instant::now();
    vm.resume().await?;
    steps.push(step("resume", micros(begun)));
    if let (true, Some(generation)) = (settings.managed, vm.generation) {
        // Its clock stood still.
        let begun = Instant::now();
        let asking = identity::ask(vm, generation, name, identity::Occasion::Taken).await?;
        identity::confirm(vm, asking).await?;
        steps.push(step("identity", micros(begun)));
    }
    Ok(())
}

async fn first_call(
    vm: &Arc<Vm>,
    request: &TakeVm,
    steps: &mut Vec<Step>,
) -> Result<Option<AgentReply>, FleetError> {
    let Some(call) = &request.first_call else { return Ok(None) };
    let begun = Instant::now();
    let asked = vm.agent.begin(call.request.clone()).await?;
    let reply = answer(vm, asked, call.within).await?;
    steps.push(step("first call", micros(begun)));
    Ok(Some(reply))
}
