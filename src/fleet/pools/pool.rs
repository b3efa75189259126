//! One pool: what stands ready in it, and the task that keeps it so.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::settings::{Mode, Settings};
use super::stock::{Found, Look, Plan, Problem, Ready, Stock, Thing};
use crate::fleet::Fleet;
use crate::fleet::clones::Place;
use crate::fleet::error::FleetError;
use crate::fleet::events::{Change, Event, Kind};
use crate::fleet::network;
use crate::fleet::panics;
use crate::fleet::shells::{Plugged, Shell};
use crate::fleet::slots::Held;
use crate::fleet::sources::Source;
use crate::fleet::vm::{State, Vm};

/// Longest rest after one was made.
const REST_MAX: Duration = Duration::from_secs(30);

/// A pool. Its keeper is a task of its own.
#[derive(Debug)]
pub struct Pool {
    pub name: Arc<str>,
    stock: Mutex<Stock<What>>,
    /// There may be something for the keeper to do.
    wake: Notify,
    /// Something became ready, or free, or failed.
    changed: watch::Sender<()>,
}

/// What stands ready.
#[derive(Debug)]
pub enum What {
    /// A clone that has not run. Its snapshot may be deleted before it is taken.
    Shell(Box<Shell>, Arc<Source>),
    /// One that has run.
    Vm(Arc<Vm>),
}

impl Thing for What {
    fn is_dead(&self) -> bool {
        match self {
            Self::Shell(shell, _) => shell.link.is_closed(),
            Self::Vm(vm) => vm.state() == State::Exited,
        }
    }
}

impl What {
    /// Ends it, for it is nobody's.
    pub fn end(self, fleet: &Fleet, reason: &str) {
        match self {
            Self::Shell(shell, _) => shell.process.kill(),
            Self::Vm(vm) => {
                vm.kill(reason);
                fleet.registry.remove(&vm.id);
            }
        }
    }
}

/// Stands for one that was taken and lives.
#[derive(Debug)]
pub struct Out(Arc<Pool>);

impl Drop for Out {
    fn drop(&mut self) {
        self.0.lock().came_to_its_end();
        self.0.tell();
    }
}

/// What there is for somebody who asks.
#[derive(Debug)]
pub enum Offer {
    Ready(Box<Ready<What>>, Out),
    /// Nothing is ready, but one may be started.
    Room(Arc<Settings>, Out),
    /// Something will be, soon.
    Soon,
}

impl Pool {
    pub fn new(name: &str, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            stock: Mutex::new(Stock::new(settings, Instant::now())),
            wake: Notify::new(),
            changed: watch::Sender::new(()),
        })
    }

    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(self.lock().settings())
    }

    /// What it is to be from now on. What was made for something else is replaced one by one; until then it is handed out.
    pub fn change(&self, settings: Settings) {
        self.lock().change(settings);
        self.tell();
    }

    /// More is known now of what clones of the snapshot touch first: those that were made ahead without it are replaced.
    pub fn renew(&self, snapshot: &str) {
        self.lock().renew(snapshot);
        self.tell();
    }

    /// Nothing is made or handed out any more; what stood ready is ended.
    pub fn close(&self, fleet: &Fleet, reason: &str) {
        let ready = self.lock().close();
        self.tell();
        for ready in ready {
            ready.what.end(fleet, reason);
        }
    }

    pub fn look(&self, pace: f64) -> Look {
        self.lock().look(Instant::now(), pace)
    }

    /// Looks for one to hand over. `again`: it was asked for before.
    pub fn find(self: &Arc<Self>, again: bool) -> Result<Offer, FleetError> {
        let found = self.lock().find(Instant::now(), again);
        self.wake.notify_one();
        let out = || Out(Arc::clone(self));
        Ok(match found {
            Found::Ready(ready) => Offer::Ready(Box::new(ready), out()),
            Found::Room(settings) => Offer::Room(settings, out()),
            Found::Soon => Offer::Soon,
            Found::Full(max) => return Err(FleetError::PoolFull { pool: self.name.to_string(), max }),
            Found::Closed => return Err(FleetError::NotFound { what: "pool", name: self.name.to_string() }),
        })
    }

    /// One that was handed out before this pool was begun anew.
    pub fn adopt(self: &Arc<Self>) -> Out {
        self.lock().adopt();
        Out(Arc::clone(self))
    }

    /// One that was found ready was not well: it was not handed over.
    pub fn was_bad(&self) {
        self.lock().was_bad();
    }

    /// Tells when something has changed from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn tell(&self) {
        self.wake.notify_one();
        self.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, Stock<What>> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn make(
        self: &Arc<Self>,
        fleet: &Arc<Fleet>,
        settings: Arc<Settings>,
        revision: u64,
        slot: Option<Held>,
    ) -> Duration {
        let begun = Instant::now();
        let made = make(fleet, self, &settings, slot).await;
        let took = begun.elapsed();
        match made {
            Ok(what) => {
                self.watch_over(&what);
                let (back, had_failed) = {
                    let mut stock = self.lock();
                    let had_failed = stock.has_failed();
                    (stock.put(Instant::now(), settings, revision, took, what), had_failed)
                };
                match back {
                    Some(what) => what.end(fleet, "its pool was deleted"),
                    None if had_failed => {
                        tracing::info!(pool = %self.name, "a pool can be kept ready again");
                        fleet
                            .events
                            .tell(|| Event::new(Kind::Pool, Change::Changed, &self.name, Some(&self.name)));
                    }
                    None => {}
                }
            }
            Err(error) => self.could_not_make(fleet, revision, &error),
        }
        self.changed.send_replace(());
        took
    }

    fn could_not_make(&self, fleet: &Fleet, revision: u64, error: &FleetError) {
        let problem = Problem { text: error.to_string(), reason: error.reason() };
        if self.lock().could_not_make(Instant::now(), revision, problem.clone()) {
            let Problem { text, reason } = &problem;
            tracing::warn!(pool = %self.name, problem = text, reason, "a pool cannot be kept ready; trying again");
            fleet.events.tell(|| Event {
                problem: Some(problem),
                ..Event::new(Kind::Pool, Change::Changed, &self.name, Some(&self.name))
            });
        }
        self.changed.send_replace(());
    }

    /// The keeper is begun again. What it was making came to nothing.
    fn keeper_failed(&self, said: &str) {
        let problem = Problem { text: format!("its keeper failed: {said}"), reason: "INTERNAL" };
        self.lock().keeper_failed(Instant::now(), problem);
        self.changed.send_replace(());
    }

    /// Tells the keeper when what stands ready ends by itself.
    fn watch_over(self: &Arc<Self>, what: &What) {
        let pool = Arc::downgrade(self);
        let end = match what {
            What::Shell(shell, _) => Err(shell.process.clone()),
            What::Vm(vm) => Ok(Arc::clone(vm)),
        };
        tokio::spawn(async move {
            // When it was handed over its end wakes the keeper for nothing, once.
            match end {
                Ok(vm) => drop(vm.ended().await),
                Err(process) => drop(process.ended().await),
            }
            if let Some(pool) = pool.upgrade() {
                pool.wake.notify_one();
            }
        });
    }
}

/// Keeps a pool until it is closed or the fleet is gone, also when its keeper fails.
pub async fn keep_always(fleet: Weak<Fleet>, pool: Arc<Pool>) {
    let (name, failed) = (format!("keeping the pool {}", pool.name), Arc::clone(&pool));
    let keep = || keep(fleet.clone(), Arc::clone(&pool));
    panics::again(&name, keep, |said| failed.keeper_failed(said)).await;
}

async fn keep(fleet: Weak<Fleet>, pool: Arc<Pool>) {
    while let Some(alive) = fleet.upgrade() {
        let pace = alive.pools.pace;
        let plan = pool.lock().plan(Instant::now(), pace);
        match plan {
            Plan::Nothing => return,
            Plan::Wait(until) => {
                drop(alive);
                match until {
                    None => pool.wake.notified().await,
                    Some(until) => {
                        // What it comes back with says the same: look again.
                        let _ = tokio::time::timeout_at(until.into(), pool.wake.notified()).await;
                    }
                }
            }
            Plan::End(what, reason) => what.end(&alive, reason),
            Plan::Make(settings, revision) => {
                // Before its turn: other pools are not to wait while there is no slot for this one.
                let slot = match settings.access() {
                    None => None,
                    Some(access) => match alive.slots.take_ahead(access).await {
                        Ok(held) => Some(held),
                        Err(error) => {
                            pool.could_not_make(&alive, revision, &error);
                            continue;
                        }
                    },
                };
                // Held while it is made, and after that for as long as the budget wants, but not while somebody would find nothing ready.
                let turns = Arc::clone(&alive.pools.turns);
                let turn = turns.acquire_owned().await;
                if !pool.lock().begin() {
                    // Somebody who asked has taken its place.
                    continue;
                }
                let took = pool.make(&alive, settings, revision, slot).await;
                drop(alive);
                let rested = tokio::time::sleep(took.mul_f64((pace - 1.0).max(0.0)).min(REST_MAX));
                tokio::pin!(rested);
                while !pool.lock().is_empty() {
                    tokio::select! {
                        () = &mut rested => break,
                        () = pool.wake.notified() => {}
                    }
                }
                drop(turn);
            }
        }
    }
}

async fn make(
    fleet: &Arc<Fleet>,
    pool: &Arc<Pool>,
    settings: &Settings,
    slot: Option<Held>,
) -> Result<What, FleetError> {
    let begun = Instant::now();
    fleet.headroom.check()?;
    let source = fleet.snapshots.source(&settings.snapshot).await?;
    if settings.managed && source.hello.is_none() {
        return Err(FleetError::NoAgentInSnapshot);
    }
    let mut networks = settings.plan_networks(&source.networks)?;
    if settings.mode == Mode::Shell {
        let (links, slot) = network::open(&fleet.slots, &mut networks, slot).await?;
        let shell = fleet.shells.seat_for(&source, links, Plugged { networks, slot }).await?;
        return Ok(What::Shell(Box::new(shell), source));
    }
    let place = Place { pool: Some((Arc::clone(&pool.name), true)), slot, ..Place::default() };
    let request = settings.clone_request(None);
    let (guard, _) = fleet.clone_one(source, request, networks, place, begun).await?;
    if settings.mode == Mode::Paused {
        guard.vm().pause().await?;
    }
    Ok(What::Vm(guard.hand_over()))
}
