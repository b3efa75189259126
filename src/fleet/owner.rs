//! The task that owns one VM: it alone tells the worker what to do, hears its events, and publishes the state.
//!
//! Happy path: commands one after the other, each a request to the worker. The worker's end (its socket closes) ends the
//! task: the process is reaped, the reason is published, the VM's private files are removed. A VM is always
//! ended by ending its process, so nothing here can be stuck for ever: every request has a time limit.

use std::collections::VecDeque;
use std::fs::File;
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::agent::Presence;

use super::cgroup::Group;
use super::disks::{VmDisk, VmFolder, check_room_for_a_layer};
use super::error::FleetError;
use super::kernel_words::KernelWords;
use super::limits::{
    FREEZE_TIMEOUT, QUIET_TIMEOUT, RECORD_EVERY, RESTARTS_MAX, RESTARTS_WITHIN, SETTLE_STEP, SETTLE_TIMEOUT,
    SETTLE_TRIES,
};
use super::link::{Events, Link, plain};
use super::pace::Pace;
use super::panics;
use super::shells::Socket;
use super::slots::Lease;
use super::vm::{Command, FrozenVm, State, Vm};
use super::watchdog;
use crate::agent::{AgentReply, AgentRequest};
use crate::snapshot::memory::pager::{self, Attachment, EndReason, Pager, PagerSource};
use crate::snapshot::store::Draft;
use crate::telemetry::metrics;
use crate::telemetry::metrics::Ended;
use crate::worker::protocol::{BootSpec, Event, ExitReason, FaultRegion, Reply, Request, SnapshotSpec};

/// How long a worker that closed its socket may take to end by itself.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// What the one who waits for a cold boot hears.
#[derive(Debug, Clone)]
pub struct Phase {
    pub name: String,
    pub us: u64,
}

/// Everything the owner needs.
pub struct Owner {
    pub vm: Arc<Vm>,
    pub link: Arc<Link>,
    pub commands: mpsc::Receiver<Command>,
    pub ears: Ears,
    /// What is known of the agent, in the conversation of now.
    pub presence: watch::Receiver<Presence>,
    /// That conversation has ended.
    pub agent_gone: bool,
    pub disks: Vec<VmDisk>,
    pub folder: VmFolder,
    /// If it has limits.
    pub group: Option<Group>,
    /// Its network slot, if it has one.
    pub slot: Option<Lease>,
    /// How to boot it again; `None`: a reset is its end.
    pub again: Option<Again>,
    /// When it was booted again, the last few.
    pub restarts: VecDeque<Instant>,
    /// Panics before the last reset.
    pub panics: u32,
}

/// What a VM was cold-booted from, to do it again.
#[derive(Debug)]
pub struct Again {
    pub spec: BootSpec,
    pub kernel: Arc<File>,
    pub module: Option<Arc<File>>,
}

/// The worker's events.
pub struct Ears {
    pub vm: Arc<Vm>,
    pub events: Events,
    /// Boot phases go here while somebody listens.
    pub phases: Option<mpsc::Sender<Phase>>,
    pub exit: Option<String>,
    /// The guest reset itself, by this door; what follows is still to be said.
    pub reset: Option<String>,
    pub deaf: bool,
    /// Who answers page faults, of a clone that wants that.
    pub faults: Option<Faults>,
    /// Kept until the VM ends.
    pub attachment: Option<Attachment>,
}

/// The pager, and the memory that it answers from.
#[derive(Debug, Clone)]
pub struct Faults {
    pub pager: Arc<Pager>,
    pub source: Arc<PagerSource>,
}

impl Ears {
    /// Runs `work` to its end, hearing events meanwhile: a worker whose events nobody takes cannot answer either.
    async fn during<F: Future>(&mut self, work: F) -> F::Output {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                output = &mut work => return output,
                event = self.events.recv(), if !self.deaf => self.hear(event),
            }
        }
    }

    pub(super) fn attach(&mut self, regions: &[FaultRegion], fds: Vec<OwnedFd>) -> Result<(), String> {
        let faults = self.faults.as_ref().ok_or("it was not asked to let its faults be answered")?;
        if self.attachment.is_some() {
            return Err("it asked twice".to_owned());
        }
        let uffd = fds.into_iter().next().ok_or("its worker sent no userfaultfd")?;
        let regions: Vec<pager::FaultRegion> = regions
            .iter()
            .map(|region| pager::FaultRegion {
                host_address: region.host_address,
                bytes: region.bytes,
                file_offset: region.file_offset,
            })
            .collect();
        let attached = faults.pager.attach(uffd, &regions, Arc::clone(&faults.source), on_end(&self.vm));
        self.attachment = Some(attached.map_err(|error| error.to_string())?);
        Ok(())
    }

    fn hear(&mut self, event: Option<(Event, Vec<OwnedFd>)>) {
        let (event, fds) = match event {
            None => (None, Vec::new()),
            Some((event, fds)) => (Some(event), fds),
        };
        match event {
            None => self.deaf = true,
            Some(Event::Userfault { regions }) => {
                if let Err(problem) = self.attach(&regions, fds) {
                    // Its restore would wait for ever.
                    self.vm.kill(&format!("its page faults cannot be answered: {problem}"));
                }
            }
            Some(Event::Phase { name, us }) => {
                if let Some(phases) = &self.phases {
                    // A listener that is slow or gone misses a phase; nothing waits for it.
                    let _ = phases.try_send(Phase { name: plain(&name), us });
                }
            }
            Some(Event::ReadyPort { value }) => {
                self.vm.ready_port.send_replace(Some(value));
            }
            Some(Event::GuestReset { how }) => {
                let how = plain(&how);
                tracing::info!(vm = %self.vm.id, how, "the guest reset itself");
                self.reset = Some(how);
            }
            // A shell says it once, and then it was taken in already.
            Some(Event::Hello { .. }) => {}
            // Said once, to the daemon that takes it over.
            Some(Event::Adopted(_) | Event::AdoptedFiles) => {}
            Some(Event::Exited(reason)) => self.exit = Some(exit_text(&reason)),
        }
    }
}

/// What the pager says when it can serve a clone no more.
fn on_end(vm: &Arc<Vm>) -> impl FnOnce(EndReason) + Send + 'static {
    let vm = Arc::clone(vm);
    move |reason| {
        if reason != EndReason::ProcessGone {
            tracing::warn!(vm = %vm.id, %reason, "a clone's page faults cannot be answered any more");
            vm.kill(&format!("its page faults could not be answered any more: {reason}"));
        }
    }
}

fn exit_text(reason: &ExitReason) -> String {
    match reason {
        ExitReason::Killed => "ended on request".to_owned(),
        ExitReason::GuestPowerOff => "the guest switched itself off".to_owned(),
        ExitReason::Failed(what) => format!("KVM could not go on: {}", plain(what)),
    }
}

/// Runs a VM's task. If that panics the VM is ended, with the panic as its reason: nobody would tell its worker anything any more, or hear its end.
async fn watched(vm: Arc<Vm>, task: impl Future<Output = ()> + Send + 'static) {
    let mut task = Box::pin(task);
    let Err(said) = panics::caught(&mut task).await else { return };
    tracing::error!(vm = %vm.id, said, "a VM's task failed, which is a fault of this program: the VM is ended");
    vm.kill(&format!("its task in the service failed: {said}"));
    // What it had goes when its process has gone, as always.
    vm.process.ended().await;
    let _ = tokio::task::spawn_blocking(move || drop(task)).await;
    if vm.state() == State::Exited {
        return;
    }
    metrics().vm_ended(Ended::Asked);
    let reason = vm.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
    vm.change(|status| {
        status.state = State::Exited;
        status.exit_reason = reason;
    });
}

impl Owner {
    /// Begins the task, which goes on until the VM's end.
    pub fn spawn(self) {
        tokio::spawn(watched(Arc::clone(&self.vm), self.run()));
    }

    async fn run(mut self) {
        let mut records = Pace::new(RECORD_EVERY);
        let mut words = self.vm.console.words();
        loop {
            // Also of one that was taken over, and stands since then.
            if let Some(how) = self.ears.reset.take() {
                self.restart(&how).await;
            }
            let (now, record_at) = (Instant::now(), records.due());
            tokio::select! {
                Ok(()) = words.changed() => {
                    let words = words.borrow_and_update().clone();
                    self.heed(&words);
                }
                event = self.ears.events.recv(), if !self.ears.deaf => {
                    self.ears.hear(event);
                }
                changed = self.presence.changed(), if !self.agent_gone => match changed {
                    // A guest can say hello as often as it likes.
                    Ok(()) => records.wish(Instant::now()),
                    Err(_) => self.agent_gone = true,
                },
                () = tokio::time::sleep_until(record_at.unwrap_or(now).into()), if record_at.is_some() => {
                    records.done(Instant::now());
                    self.vm.record_changed();
                }
                command = self.commands.recv() => match command {
                    Some(Command::Release(answer)) => {
                        if record_at.is_some() {
                            self.vm.record_changed();
                        }
                        return self.release(answer).await;
                    }
                    Some(command) => self.obey(command).await,
                    None => self.vm.process.kill(), // Unreachable while this task holds the VM.
                },
            }
            if self.ears.deaf {
                break;
            }
        }
        self.end().await;
    }

    /// The VM goes on without this daemon, and its folder stays.
    async fn release(mut self, answer: oneshot::Sender<Result<(), FleetError>>) {
        if let Some(group) = self.group.take() {
            group.leave();
        }
        self.folder.leave();
        if let Some(slot) = self.slot.take() {
            slot.leave();
        }
        self.vm.process.release().await;
        let _ = answer.send(Ok(()));
    }

    async fn end(mut self) {
        self.commands.close();
        let process = self.vm.process.clone();
        let status = match tokio::time::timeout(LAST_BREATH, process.ended()).await {
            Ok(status) => status,
            Err(_) => {
                process.kill();
                process.ended().await
            }
        };
        let trouble = self.vm.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ran_out = self.group.as_ref().and_then(Group::ran_out);
        // Before its end is known: a service that ends waits for that.
        if let Some(group) = self.group.take() {
            let _ = tokio::task::spawn_blocking(move || drop(group)).await;
        }
        let (how, reason) = match (self.ears.exit.take().filter(|_| ran_out.is_none()), trouble) {
            (exit, Some(trouble)) => (Ended::Asked, exit.unwrap_or(trouble)),
            (Some(exit), None) => (Ended::Guest, exit),
            (None, None) => (Ended::Worker, ran_out.unwrap_or_else(|| process.obituary(status))),
        };
        // Files of the host are free, and their locks are gone, when the end is known.
        self.disks.retain(|disk| !disk.direct);
        metrics().vm_ended(how);
        // Whoever hears of the end can have its ports.
        drop(self.slot.take());
        tracing::info!(vm = %self.vm.id, reason, "VM ended");
        self.vm.change(|status| {
            status.state = State::Exited;
            status.exit_reason = Some(reason);
        });
        // Removing files may wait for the disk.
        let _ =
            tokio::task::spawn_blocking(move || drop((self.folder, self.ears.attachment, self.disks))).await;
    }

    async fn obey(&mut self, command: Command) {
        // Whoever asked may be gone: then the answer goes nowhere.
        match command {
            Command::Pause(answer) => {
                let _ = answer.send(self.pause().await);
            }
            Command::Resume(answer) => {
                let _ = answer.send(self.resume().await);
            }
            Command::Freeze { draft, stop_after, answer } => {
                let was_paused = self.vm.state() == State::Paused;
                let result = self.freeze(draft, stop_after).await;
                if let Err(Ok(_)) = answer.send(result)
                    && !was_paused
                {
                    // Frozen for nobody: go on.
                    self.resume_quietly().await;
                }
            }
            Command::PowerButton(answer) => {
                let _ = answer.send(self.press_power_button().await);
            }
            Command::Stop(reason) => {
                self.vm.kill(&reason);
            }
            // It ends this task, and is not for this place.
            Command::Release(answer) => {
                let _ = answer.send(Err(FleetError::WrongState("it cannot be left now".into())));
            }
            Command::Inspect(answer) => {
                let _ = answer.send(self.ears.during(watchdog::ask(&self.link)).await);
            }
            Command::Touched(answer) => {
                let result = self.ask(Request::Touched, &[]).await;
                let _ = answer.send(result.and_then(|reply| match reply {
                    Reply::Touched(touched) => Ok(touched),
                    _ => Err(FleetError::WorkerConfused),
                }));
            }
            Command::Stats(answer) => {
                let result = self.ask(Request::Stats, &[]).await;
                let given = self.ears.attachment.as_ref().map(Attachment::counts).unwrap_or_default();
                let _ = answer.send(result.and_then(|reply| match reply {
                    Reply::Stats(stats) => Ok((stats, given)),
                    _ => Err(FleetError::WorkerConfused),
                }));
            }
        }
    }

    async fn ask(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, FleetError> {
        Ok(self.ears.during(self.link.request(request, fds)).await?.0)
    }

    fn set_state(&self, state: State) {
        self.vm.change(|status| status.state = state);
    }

    /// The state of this VM when it runs.
    fn running_state(&self) -> State {
        Vm::running_state(self.vm.generation)
    }

    fn check_started(&self) -> Result<State, FleetError> {
        match self.vm.state() {
            State::Booting => Err(FleetError::WrongState(format!(
                "VM {} is still booting; wait for its ready point",
                self.vm.id
            ))),
            State::Exited => Err(FleetError::WrongState(format!("VM {} has ended", self.vm.id))),
            state => Ok(state),
        }
    }

    /// The guest's kernel said something on the console.
    fn heed(&self, words: &KernelWords) {
        if let Some(panic) = &words.panic {
            tracing::warn!(vm = %self.vm.id, panic, "the guest's kernel panicked");
        }
        if words.halted {
            // Without ACPI a kernel can say "power off" in no other way.
            self.vm.kill("the guest has halted");
        }
    }

    /// After a guest's reset: boots the VM again, or ends it.
    async fn restart(&mut self, how: &str) {
        let words = self.vm.console.words().borrow().clone();
        let reason = match words.panic.filter(|_| words.panics > self.panics) {
            Some(panic) => format!("the guest's kernel panicked ({panic}) and it reset itself ({how})"),
            None => format!("the guest reset itself ({how})"),
        };
        self.panics = words.panics;
        // Before its ready point whoever waits for that is told at once.
        let Some(again) = self.again.as_ref().filter(|_| self.vm.state() != State::Booting) else {
            return self.vm.kill(&reason);
        };
        let now = Instant::now();
        self.restarts.retain(|when| now.duration_since(*when) < RESTARTS_WITHIN);
        if self.restarts.len() >= RESTARTS_MAX {
            return self.vm.kill(&format!(
                "{reason}, and {RESTARTS_MAX} times before within {} s: it is not booted again",
                RESTARTS_WITHIN.as_secs()
            ));
        }
        self.restarts.push_back(now);
        let result = async {
            let agent = Socket::new()?;
            let mut fds = vec![agent.theirs.as_fd(), agent.ours.as_fd(), again.kernel.as_fd()];
            fds.extend(again.module.iter().map(|module| module.as_fd()));
            let request = Request::Restart(again.spec.clone());
            match self.ears.during(self.link.request(request, &fds)).await?.0 {
                Reply::Booted(_) => Ok(agent.ours),
                _ => Err(FleetError::WorkerConfused),
            }
        };
        match result.await {
            Ok(agent) => {
                self.vm.agent.restart(agent);
                self.presence = self.vm.agent.presence();
                self.agent_gone = false;
                self.vm.change(|status| {
                    status.restarts = status.restarts.saturating_add(1);
                    status.state = State::Ready;
                });
                self.vm.record_changed();
                tracing::info!(vm = %self.vm.id, "booted again");
            }
            Err(error) => self.vm.kill(&format!("{reason} and could not be booted again: {error}")),
        }
    }

    async fn pause(&mut self) -> Result<(), FleetError> {
        self.check_started()?;
        match self.ask(Request::Pause, &[]).await? {
            Reply::Done => self.set_state(State::Paused),
            _ => return Err(FleetError::WorkerConfused),
        }
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), FleetError> {
        self.check_started()?;
        match self.ask(Request::Resume, &[]).await? {
            Reply::Done => self.set_state(self.running_state()),
            _ => return Err(FleetError::WorkerConfused),
        }
        Ok(())
    }

    async fn press_power_button(&mut self) -> Result<(), FleetError> {
        match self.check_started()? {
            State::Ready | State::Running => {}
            _ => return Err(FleetError::WrongState("it is paused".into())),
        }
        // Whatever the guest makes of it, it is not to come back.
        if self.again.take().is_some() {
            self.vm.never_again();
        }
        match self.ask(Request::PowerButton, &[]).await? {
            Reply::Done => Ok(()),
            _ => Err(FleetError::WorkerConfused),
        }
    }

    /// After something went wrong. A VM that cannot be resumed is ended.
    async fn resume_quietly(&mut self) {
        if let Err(error) = self.resume().await {
            tracing::warn!(vm = %self.vm.id, %error, "a VM could not be resumed after a failed snapshot and is ended");
            self.vm.kill(&format!("it could not go on after a failed snapshot: {error}"));
        }
    }

    async fn freeze(&mut self, draft: Box<Draft>, stop_after: bool) -> Result<FrozenVm, FleetError> {
        let before = self.check_started()?;
        check_room_for_a_layer(&self.disks)?;
        let settled = before != State::Paused && self.settle().await;
        let frozen = self.freeze_quiet(draft, stop_after, before).await;
        if settled {
            // Nobody waits for the answer; and the guest does it by itself after a while.
            let _ = self.vm.agent.begin(AgentRequest::Settle { on: false }).await;
        }
        frozen
    }

    /// Has the guest's system keep its random generator still, so that its clones' can draw on their own entropy at once. Without
    /// that they take a tenth of a second for it, so a guest that does not do it is no failure.
    async fn settle(&mut self) -> bool {
        let request = AgentRequest::Settle { on: true };
        if !self.vm.agent.hello().is_some_and(|hello| hello.serves(&request)) {
            return false;
        }
        let vm = Arc::clone(&self.vm);
        let settle = async {
            for _ in 0..SETTLE_TRIES {
                match vm.agent.ask(request.clone(), SETTLE_TIMEOUT).await? {
                    AgentReply::Settled { wait_ns: 0 } => return Ok(()),
                    // The guest's time need not go by as fast as ours.
                    AgentReply::Settled { wait_ns } => {
                        tokio::time::sleep(Duration::from_nanos(wait_ns).clamp(SETTLE_STEP, SETTLE_TIMEOUT))
                            .await;
                    }
                    _ => return Err(FleetError::Internal("the agent settled something else".to_owned())),
                }
            }
            Err(FleetError::AgentBusy)
        };
        if let Err(error) = self.ears.during(settle).await {
            tracing::info!(vm = %self.vm.id, %error, "a guest's random generator was not settled before a snapshot: its clones wait for theirs");
        }
        true
    }

    async fn freeze_quiet(
        &mut self,
        draft: Box<Draft>,
        stop_after: bool,
        before: State,
    ) -> Result<FrozenVm, FleetError> {
        let _quiet = match self.vm.agent.hello() {
            Some(_) => Some(self.ears.during(self.vm.agent.quiet(QUIET_TIMEOUT)).await?),
            None => None,
        };
        let mut overlays = Vec::with_capacity(self.disks.len());
        for (n, disk) in self.disks.iter().enumerate() {
            overlays.push(disk.next(n, &mut self.folder)?);
        }
        // Before the worker may have them: whichever of these come to be its disks' files, the next daemon knows them.
        self.vm.may_have(overlays.iter().flatten().map(|next| &*next.overlay));
        let resume = !stop_after && before != State::Paused;
        self.set_state(State::Snapshotting);
        let result = {
            let mut fds = vec![draft.state().as_fd(), draft.memory().as_fd()];
            fds.extend(
                overlays.iter().flatten().flat_map(|next| [next.sealed.as_fd(), next.overlay.as_fd()]),
            );
            let spec = SnapshotSpec { resume };
            self.ears.during(self.link.request_within(Request::Snapshot(spec), &fds, FREEZE_TIMEOUT)).await
        };
        let frozen = match result {
            Ok((Reply::Frozen(frozen), _)) => Ok(frozen),
            Ok(_) => Err(FleetError::WorkerConfused),
            Err(error) => Err(error),
        };
        match frozen {
            Ok(frozen) => {
                for (n, (disk, next)) in self.disks.iter_mut().zip(overlays).enumerate() {
                    if let Some(next) = next {
                        disk.frozen(frozen.disks_frozen.get(n).copied().unwrap_or(true), next);
                    }
                }
                self.vm.has(&self.disks);
                self.set_state(if resume { before } else { State::Paused });
                // While this one is published the next may be taken, of which the overlays of now are layers that nobody may write to.
                let disks = self.disks.iter().map(VmDisk::without_overlay).collect();
                Ok(FrozenVm { draft, frozen, disks })
            }
            Err(error) => {
                if before == State::Paused {
                    self.set_state(State::Paused);
                } else {
                    self.resume_quietly().await;
                }
                Err(error)
            }
        }
    }
}

#[cfg(test)]
#[path = "owner_tests.rs"]
mod tests;
