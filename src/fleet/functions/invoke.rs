//! Running a function: a turn, a VM, the handler in it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::function::Function;
use super::settings::Settings;
use crate::agent::End;
use crate::fleet::Fleet;
use crate::fleet::error::FleetError;
use crate::fleet::exec::{self, Outcome};
use crate::fleet::pools::TakeVm;
use crate::fleet::streams::Stream;
use crate::fleet::vm::Vm;
use crate::telemetry::trace;

/// Most of each of stdout and stderr in one answer.
pub const OUTPUT_BYTES_MAX: usize = 512 << 10;

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Invoke {
    pub function: String,
    /// Added to the handler's environment.
    pub environment: Vec<(String, String)>,
    /// Shorter than the function's own.
    pub timeout: Option<Duration>,
}

/// Where its VM came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// Stood ready.
    Ready,
    /// Was started for it.
    Started,
    /// Had run another invocation.
    Reused,
}

/// Where the time went, in the order in which it did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Until it had its turn.
    pub queue_us: u64,
    /// Until it had its VM.
    pub vm_us: u64,
    /// Until the handler had been started.
    pub start_us: u64,
    /// Until the handler had ended.
    pub run_us: u64,
}

/// A handler that runs. Dropped before its end, its VM is ended.
#[derive(Debug)]
pub struct Invocation {
    pub stream: Arc<Stream>,
    pub vm: Arc<Vm>,
    pub came: Came,
    timings: Timings,
    started: Instant,
    /// Until when it may run.
    pub deadline: tokio::time::Instant,
    pub within: Duration,
    lease: Lease,
    /// Ends after the VM was given back.
    _turn: OwnedSemaphorePermit,
}

/// A VM that runs an invocation.
#[derive(Debug)]
struct Lease {
    fleet: Arc<Fleet>,
    function: Arc<Function>,
    vm: Arc<Vm>,
    /// With this one.
    used: u32,
    revision: u64,
    /// It may run another; how this one ended is counted.
    settled: bool,
}

impl Lease {
    fn settle(&mut self, how: Settled) {
        let counts = &self.function.counts;
        let counter = match how {
            Settled::Ended(&End::Exited(0)) => &counts.succeeded,
            Settled::Ended(_) | Settled::Lost => &counts.failed,
            Settled::TimedOut => &counts.timed_out,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.settled = true;
        if let Settled::Ended(End::Exited(_)) = how {
            let vm = Arc::clone(&self.vm);
            if self.function.give_back(&self.fleet, vm, self.used, self.revision).is_none() {
                // Somebody else's now.
                return;
            }
        }
        self.end("its invocation has ended");
    }

    fn end(&self, reason: &str) {
        self.vm.kill(reason);
        self.fleet.registry.remove(&self.vm.id);
    }
}

/// How an invocation ended.
#[derive(Debug, Clone, Copy)]
enum Settled<'a> {
    Ended(&'a End),
    /// Its agent or VM is gone.
    Lost,
    TimedOut,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.function.counts.cancelled.fetch_add(1, Ordering::Relaxed);
            self.end("its invocation was given up");
        }
    }
}

/// An invocation that has ended.
#[derive(Debug)]
pub struct Invoked {
    pub outcome: Outcome,
    pub vm: Arc<Vm>,
    pub came: Came,
    pub timings: Timings,
}

impl Timings {
    fn parts(&self) -> Vec<trace::Part> {
        let parts =
            [("queue", self.queue_us), ("vm", self.vm_us), ("start", self.start_us), ("run", self.run_us)];
        let part =
            |(name, us): (&str, u64)| trace::Part { name: name.into(), took: Duration::from_micros(us) };
        parts.map(part).into()
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Fleet {
    /// Begins an invocation: waits for its turn, gets a VM, and starts the handler in it.
    pub async fn begin_invocation(self: &Arc<Self>, request: Invoke) -> Result<Invocation, FleetError> {
        let mut timings = Timings::default();
        let arrived = Instant::now();
        let function = self.functions.get(&request.function)?;
        let (settings, turns) = function.begin()?;
        let turn = turns.take(&request.function).await.inspect_err(|_| {
            function.counts.refused.fetch_add(1, Ordering::Relaxed);
        })?;
        timings.queue_us = micros(arrived);
        let within = request.timeout.unwrap_or(settings.timeout).min(settings.timeout);
        let begun = Instant::now();
        let (lease, came) = self.lease(&function, begun).await.inspect_err(|_| {
            function.counts.failed.fetch_add(1, Ordering::Relaxed);
        })?;
        timings.vm_us = micros(begun);
        let started = Instant::now();
        let deadline = tokio::time::Instant::from_std(started) + within;
        // Dropped meanwhile, the lease ends the VM.
        let (mut lease, environment) = (lease, &request.environment);
        let stream = start_handler(&lease.vm, &settings, environment, deadline, within).await;
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                lease.settle(match error {
                    FleetError::ExecTimeout(_) => Settled::TimedOut,
                    _ => Settled::Lost,
                });
                return Err(error);
            }
        };
        timings.start_us = micros(started);
        let vm = Arc::clone(&lease.vm);
        Ok(Invocation {
            stream: Arc::new(stream),
            vm,
            came,
            timings,
            started: Instant::now(),
            deadline,
            within,
            lease,
            _turn: turn,
        })
    }

    /// Runs an invocation to its end: `payload` is all of the handler's stdin.
    pub async fn invoke(self: &Arc<Self>, request: Invoke, payload: Bytes) -> Result<Invoked, FleetError> {
        let (arrived, name) = (Instant::now(), request.function.clone());
        let invocation = self.begin_invocation(request).await?;
        let outcome = exec::converse(&invocation.stream, payload, OUTPUT_BYTES_MAX);
        match tokio::time::timeout_at(invocation.deadline, outcome).await {
            Ok(Ok(outcome)) => {
                let (vm, came) = (Arc::clone(&invocation.vm), invocation.came);
                let timings = invocation.ended(&outcome.end);
                if let Some(here) = trace::Place::here() {
                    let about = vec![("coldspark.function", name), ("coldspark.vm", vm.id.clone())];
                    trace::Road { name: "invoke", began: arrived, parts: timings.parts(), about }.tell(here);
                }
                Ok(Invoked { outcome, vm, came, timings })
            }
            Ok(Err(error)) => Err(invocation.lost(error)),
            Err(_) => Err(invocation.timed_out()),
        }
    }

    async fn lease(
        self: &Arc<Self>,
        function: &Arc<Function>,
        begun: Instant,
    ) -> Result<(Lease, Came), FleetError> {
        let lease = |vm, used, revision| Lease {
            fleet: Arc::clone(self),
            function: Arc::clone(function),
            vm,
            used,
            revision,
            settled: false,
        };
        if let Some((vm, used, revision)) = function.take_warm() {
            function.counts.reused.fetch_add(1, Ordering::Relaxed);
            return Ok((lease(vm, used.saturating_add(1), revision), Came::Reused));
        }
        let mut changes = function.pool.changes();
        loop {
            // Before it is taken: one of an older deployment is not kept for the newer.
            let revision = function.made().revision;
            let request = TakeVm { pool: String::new(), name: None, first_call: None, publish: Vec::new() };
            match self.take_from(&function.pool, request).await {
                Ok(taken) => {
                    let came = if taken.was_ready { Came::Ready } else { Came::Started };
                    return Ok((lease(taken.vm, 1, revision), came));
                }
                // Those that have just ended are on their way out.
                Err(error @ FleetError::PoolFull { .. }) => {
                    let left = ROOM_WITHIN.saturating_sub(begun.elapsed());
                    if tokio::time::timeout(left, changes.changed()).await.is_err() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// How long the end of earlier VMs is waited for.
const ROOM_WITHIN: Duration = Duration::from_secs(10);

async fn start_handler(
    vm: &Vm,
    settings: &Settings,
    environment: &[(String, String)],
    deadline: tokio::time::Instant,
    within: Duration,
) -> Result<Stream, FleetError> {
    let opening = vm.open(settings.handler.what(environment));
    let late = |_| FleetError::ExecTimeout(within.as_millis());
    tokio::time::timeout_at(deadline, opening).await.map_err(late)?
}

impl Invocation {
    /// The handler has ended; its VM is kept for another invocation, or ended.
    pub fn ended(mut self, end: &End) -> Timings {
        self.timings.run_us = micros(self.started);
        self.lease.settle(Settled::Ended(end));
        self.timings
    }

    /// Its VM or agent was lost.
    pub fn lost(mut self, error: FleetError) -> FleetError {
        self.lease.settle(Settled::Lost);
        error
    }

    /// It took too long: its VM is ended with it.
    pub fn timed_out(mut self) -> FleetError {
        self.lease.settle(Settled::TimedOut);
        FleetError::ExecTimeout(self.within.as_millis())
    }
}
