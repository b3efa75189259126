//! The clients of the trials of faults.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::*;
use tokio::sync::Notify;
use tonic::Status;

use super::counts::{Counts, Failure, Outcome};
use crate::client::Client;
use crate::commands::{Command, start};
use crate::console::Console;
use crate::daemon::connect;

/// The VM of which hogs are clones, what one may have of it, and the pages that it wants to have.
pub const HOG_VM_BYTES: u64 = 256 << 20;
const HOG_LIMIT_BYTES: u64 = 64 << 20;
const HOG_PAGES: u64 = 24 << 10;

/// What all tasks share.
pub struct Common {
    socket: PathBuf,
    logs: PathBuf,
    over: AtomicBool,
    /// Requests that have ended, and calls that a daemon answered.
    done: AtomicU64,
    answered: AtomicU64,
    pub more: Notify,
    counts: Mutex<Counts>,
}

impl Common {
    pub fn new(socket: PathBuf, logs: PathBuf) -> Common {
        Common {
            socket,
            logs,
            over: AtomicBool::new(false),
            done: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            more: Notify::new(),
            counts: Mutex::default(),
        }
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Nothing new is to be begun.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.more.notify_waiters();
    }

    pub fn take_counts(&self) -> Counts {
        std::mem::take(&mut *self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, what: &'static str, outcome: Outcome, took: Duration, lost_calls: u64) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).add(what, outcome, took, lost_calls);
        self.done.fetch_add(1, Ordering::Relaxed);
        self.more.notify_waiters();
    }
}

/// One who sends its requests until they are answered, over the deaths of daemons.
pub struct Caller {
    common: Arc<Common>,
    name: String,
    requests: u64,
    client: Option<Client>,
    /// Calls of this request that were lost with a daemon.
    lost: u64,
}

/// Calls again while the other end goes away; gives what came, or what else went wrong.
macro_rules! persist {
    ($caller:expr, $client:ident => $call:expr) => {
        loop {
            let Some($client) = $caller.client().await else { break Err(Failure::Lost) };
            match $call.await {
                Ok(response) => {
                    $caller.common.answered.fetch_add(1, Ordering::Relaxed);
                    break Ok(response);
                }
                Err(status) => match Failure::of(&status) {
                    Failure::Lost => $caller.lose(),
                    other => {
                        $caller.common.answered.fetch_add(1, Ordering::Relaxed);
                        break Err(other);
                    }
                },
            }
        }
    };
}

impl Caller {
    pub fn new(common: &Arc<Common>, name: &str) -> Caller {
        Caller { common: Arc::clone(common), name: name.to_owned(), requests: 0, client: None, lost: 0 }
    }

    /// A connection to the daemon that there is. `None`: there has been none for long.
    async fn client(&mut self) -> Option<&mut Client> {
        let until = Instant::now() + crate::trial::limit(30);
        while self.client.is_none() && Instant::now() < until {
            match connect(&self.common.socket).await {
                Ok(channel) => self.client = Some(Client::new(channel, self.common.logs.clone())),
                // Nobody announces that a daemon is there again.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        self.client.as_mut()
    }

    fn lose(&mut self) {
        self.client = None;
        self.lost += 1;
    }

    fn new_id(&mut self) -> String {
        self.requests += 1;
        self.lost = 0;
        format!("{}/{}", self.name, self.requests)
    }

    fn outcome(&self, failure: Failure) -> Outcome {
        match failure {
            Failure::Refused(reason) => Outcome::Refused(reason),
            Failure::Ended(_) => Outcome::Killed,
            // VMs that had ended are not in the list of the next daemon.
            Failure::NoVm if self.lost > 0 => Outcome::Unseen,
            Failure::NoVm => Outcome::Wrong("a VM is not there, and nobody has deleted it".to_owned()),
            Failure::Lost => Outcome::Wrong("no daemon is there".to_owned()),
            Failure::Wrong(said) => Outcome::Wrong(said),
        }
    }

    /// Ends a VM that is known.
    async fn delete(&mut self, vm: &str) -> Result<(), Failure> {
        match persist!(self, client => client.delete_vm(vm)) {
            // The call before did it, or the VM had ended with its worker.
            Err(Failure::NoVm) if self.lost > 0 => Ok(()),
            other => other,
        }
    }

    /// A clone that answers, and its end. `given_up_after`: microseconds after which the first call is given up, if not 0.
    pub async fn clone(&mut self, word: &str, given_up_after: u64) -> Outcome {
        let request = CloneVmRequest {
            snapshot: "base".into(),
            first_call: Some(AgentCallRequest {
                op: Some(Op::Echo(EchoOp { data: word.to_owned().into() })),
                ..Default::default()
            }),
            request_id: self.new_id(),
            ..Default::default()
        };
        if given_up_after > 0
            && let Some(client) = self.client().await
        {
            // Somewhere in the call: the service ends what it was making, or has made it and nobody heard.
            let within = Duration::from_micros(given_up_after);
            let _ = tokio::time::timeout(within, client.vms.clone_vm(request.clone())).await;
        }
        let made = match persist!(self, client => client.vms.clone_vm(request.clone())) {
            Ok(made) => made.into_inner(),
            Err(failure) => return self.outcome(failure),
        };
        let answered = match made.answer.and_then(|answer| answer.result) {
            Some(Answer::Echo(echo)) if echo.data == word.as_bytes() => Outcome::Ok,
            other => Outcome::Wrong(format!("the clone answered {other:?}")),
        };
        if made.vms.len() != 1 {
            return Outcome::Wrong(format!("{} clones", made.vms.len()));
        }
        for vm in made.vms {
            if let Err(failure) = self.delete(&vm.id).await {
                return self.outcome(failure);
            }
        }
        self.good(answered)
    }

    fn good(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Ok if self.lost > 0 => Outcome::OkAgain,
            other => other,
        }
    }

    pub async fn invoke(&mut self, word: &str) -> Outcome {
        let request = InvokeRequest {
            function: "shout".into(),
            payload: word.to_owned().into(),
            request_id: self.new_id(),
            ..Default::default()
        };
        match persist!(self, client => client.functions.invoke(request.clone())) {
            Ok(answer) => match &answer.into_inner().output[..] {
                output if *output == *word.to_uppercase().as_bytes() => self.good(Outcome::Ok),
                // Its guest went away under it.
                [] => Outcome::Killed,
                output => Outcome::Wrong(format!("it shouted {output:?}")),
            },
            Err(failure) => self.outcome(failure),
        }
    }

    /// A clone with a memory limit that wants more: it is ended, and says why.
    async fn hog(&mut self) -> Outcome {
        let limits = Some(ResourceLimits { memory_bytes: HOG_LIMIT_BYTES, ..Default::default() });
        let request = CloneVmRequest {
            snapshot: "base".into(),
            request_id: self.new_id(),
            limits,
            ..Default::default()
        };
        let made = match persist!(self, client => client.vms.clone_vm(request.clone())) {
            Ok(made) => made.into_inner().vms,
            Err(failure) => return self.outcome(failure),
        };
        let [vm] = &made[..] else { return Outcome::Wrong(format!("{} clones", made.len())) };
        let touch =
            TouchOp { first_page: 0, pages: HOG_PAGES, stride: 1, seed: 7, mode: TouchMode::Fill.into() };
        let call = AgentCallRequest { vm: vm.id.clone(), op: Some(Op::Touch(touch)), timeout_ms: 0 };
        let said = match persist!(self, client => client.agent.call(call.clone())) {
            Ok(_) => Outcome::Wrong("it has more memory than its limit".to_owned()),
            Err(Failure::Ended(said)) if said.contains("more memory than its limit") => {
                self.good(Outcome::Ok)
            }
            Err(failure) => self.outcome(failure),
        };
        match self.delete(&vm.id).await {
            Ok(()) => said,
            Err(failure) => self.outcome(failure),
        }
    }

    /// A clone that lives until it is deleted.
    async fn keep(&mut self) -> Result<String, Failure> {
        let request =
            CloneVmRequest { snapshot: "base".into(), request_id: self.new_id(), ..Default::default() };
        let made = persist!(self, client => client.vms.clone_vm(request.clone()))?;
        match &made.into_inner().vms[..] {
            [vm] => Ok(vm.id.clone()),
            vms => Err(Failure::Wrong(format!("{} clones", vms.len()))),
        }
    }
}

/// Until it is over; a client's every third request is an invocation, every 16th is given up in its middle and then sent again.
pub async fn client(common: Arc<Common>, number: u64) {
    let mut caller = Caller::new(&common, &format!("client-{number}"));
    let mut request = number;
    while !common.is_over() {
        request += super::CLIENTS;
        let word = format!("request {request}");
        let began = Instant::now();
        let (what, outcome) = match (request % 16, request % 3) {
            (0, _) => ("clone, given up and sent again", caller.clone(&word, 1 + 100 * (request % 40)).await),
            (_, 0) => ("invoke", caller.invoke(&word).await),
            _ => ("clone", caller.clone(&word, 0).await),
        };
        common.count(what, outcome, began.elapsed(), caller.lost);
    }
}

/// Makes clones that need more memory than they may have.
pub async fn hog(common: Arc<Common>) {
    let mut caller = Caller::new(&common, "hog");
    while !common.is_over() {
        let (began, before) = (Instant::now(), common.done());
        let outcome = caller.hog().await;
        common.count("hog", outcome, began.elapsed(), caller.lost);
        // One in a while: it is not the load.
        while common.done() < before + 20 && !common.is_over() {
            common.more.notified().await;
        }
    }
}

/// What somebody has open and hardly reads.
struct Unread {
    _console: Console,
    floods: Vec<Command>,
}

async fn open(client: &mut Client, vm: &str) -> anyhow::Result<Unread> {
    let console = client.console(vm).await?;
    let mut floods = Vec::new();
    for _ in 0..2 {
        floods.push(Command::open(client, start(vm, &["yes", "100000000"])).await?);
    }
    Ok(Unread { _console: console, floods })
}

/// Has a VM of its own over all deaths of daemons, with commands in it that say more than it reads, and a console that it does not read at all.
pub async fn slow_reader(common: Arc<Common>) {
    let mut caller = Caller::new(&common, "slow");
    let mut mine: Option<String> = None;
    let mut unread: Option<Unread> = None;
    while !common.is_over() {
        let (began, before) = (Instant::now(), common.done());
        let outcome = match slow_round(&mut caller, &mut mine, &mut unread).await {
            Ok(()) => caller.good(Outcome::Ok),
            Err(failure) => caller.outcome(failure),
        };
        common.count("slow reader", outcome, began.elapsed(), caller.lost);
        while common.done() < before + 50 && !common.is_over() {
            common.more.notified().await;
        }
    }
    drop(unread);
    if let Some(vm) = mine {
        caller.lost = 1;
        let outcome =
            caller.delete(&vm).await.map_or_else(|failure| caller.outcome(failure), |()| Outcome::Ok);
        common.count("slow reader", outcome, Duration::ZERO, 0);
    }
}

/// Reads a piece, or begins again with what is gone.
async fn slow_round(
    caller: &mut Caller,
    mine: &mut Option<String>,
    unread: &mut Option<Unread>,
) -> Result<(), Failure> {
    if let Some(open) = unread {
        for flood in &mut open.floods {
            if flood.stdout().await.is_err() {
                *unread = None;
                caller.client = None;
                break;
            }
        }
    }
    if unread.is_some() {
        return Ok(());
    }
    if let Some(vm) = mine.clone() {
        let request = GetVmRequest { vm: vm.clone() };
        let found = persist!(caller, client => client.vms.get_vm(request.clone()));
        let lives = match found {
            Ok(found) => found.into_inner().state() != VmState::Exited,
            Err(Failure::NoVm) => false,
            Err(failure) => return Err(failure),
        };
        if !lives {
            // Its worker was one of those that were killed.
            caller.lost = caller.lost.max(1);
            caller.delete(&vm).await?;
            *mine = None;
        }
    }
    let vm = match mine {
        Some(vm) => vm.clone(),
        None => mine.insert(caller.keep().await?).clone(),
    };
    let Some(client) = caller.client().await else { return Err(Failure::Lost) };
    match open(client, &vm).await {
        Ok(open) => *unread = Some(open),
        // The next round sees what it was.
        Err(error) => match error.downcast_ref::<Status>().map(Failure::of) {
            None | Some(Failure::Lost | Failure::Ended(_) | Failure::NoVm) => caller.lose(),
            Some(failure) => return Err(failure),
        },
    }
    Ok(())
}
