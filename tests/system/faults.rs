//! Load and faults: clients that clone, ask, invoke and destroy, while workers and the daemon are killed and other clients vanish in the
//! middle of calls or read too slowly. Short by default; as long as `COLDSPARK_FAULTS_SECONDS` says (docs/testing.md). Counts and
//! latencies are in the trial's `faults.txt`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::agent_call_request::Op;
use coldspark::api::proto::agent_call_response::Result as Answer;
use coldspark::api::proto::deploy_event::Event;
use coldspark::api::proto::deploy_request::From;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::sync::Notify;
use tonic::{Code, Status};

use crate::client::Client;
use crate::daemon::{Daemon, connect, eventually};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const CLIENTS: u64 = 8;
/// The daemon is killed at most so many times in all, and no sooner than so many requests were answered since the last time:
/// on a slow host there is something to kill then, too.
const DAEMON_KILLS: u32 = 20;
const ANSWERED_A_KILL: u64 = 4;

/// A worker is killed after so many requests.
fn requests_a_kill() -> u64 {
    if host::in_rig() { 3 } else { 40 }
}

pub fn trials() -> Vec<Trial> {
    let seconds = host::faults_seconds();
    vec![trial("faults/load", &[Need::Kvm], 120 + 2 * seconds, move |stage| load(stage, seconds))]
}

/// What came of a request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    Ok,
    /// A limit: to be asked again.
    Refused,
    /// Its VM's worker was killed.
    Killed,
    /// The daemon was killed.
    Lost,
}

#[derive(Default)]
struct Counts {
    outcomes: BTreeMap<(&'static str, Outcome), u64>,
    /// Of clones that were made and answered.
    clone_us: Vec<u64>,
    invoke_us: Vec<u64>,
    /// What should not have come.
    wrong: Vec<String>,
}

/// What all tasks share.
struct Common {
    socket: PathBuf,
    logs: PathBuf,
    over: AtomicBool,
    /// Requests that have ended, and of these the ones that a daemon answered.
    done: AtomicU64,
    answered: AtomicU64,
    more: Notify,
    counts: Mutex<Counts>,
}

impl Common {
    fn count(&self, what: &'static str, began: Instant, result: &Result<(), Status>) {
        let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = match result {
            Ok(()) => Outcome::Ok,
            Err(status) => match status.code() {
                Code::ResourceExhausted => Outcome::Refused,
                // Its worker was killed, before, in or after the call.
                Code::Aborted | Code::FailedPrecondition => Outcome::Killed,
                // What is left of a connection whose other end is gone.
                Code::Unavailable | Code::Unknown | Code::Cancelled => Outcome::Lost,
                Code::Internal
                    if status.message().contains("h2") || status.message().contains("connection") =>
                {
                    Outcome::Lost
                }
                // A clone of a daemon that is gone, whose end was asked for from the next.
                Code::NotFound => Outcome::Lost,
                _ => {
                    counts.wrong.push(format!("{what}: {status:?}"));
                    Outcome::Lost
                }
            },
        };
        match (what, outcome) {
            ("clone", Outcome::Ok) => counts.clone_us.push(us),
            ("invoke", Outcome::Ok) => counts.invoke_us.push(us),
            _ => {}
        }
        *counts.outcomes.entry((what, outcome)).or_default() += 1;
        drop(counts);
        if outcome != Outcome::Lost {
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        self.done.fetch_add(1, Ordering::Relaxed);
        self.more.notify_waiters();
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    async fn connect(&self) -> Option<Client> {
        while !self.is_over() {
            if let Ok(channel) = connect(&self.socket).await {
                return Some(Client::new(channel, self.logs.clone()));
            }
            // Nobody announces that a daemon is there again.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        None
    }
}

fn echo(text: &str) -> AgentCallRequest {
    AgentCallRequest { op: Some(Op::Echo(EchoOp { data: text.to_owned().into() })), ..Default::default() }
}

/// A clone that answers, and its end.
async fn clone(client: &mut Client, word: &str) -> Result<(), Status> {
    let request =
        CloneVmRequest { snapshot: "base".into(), first_call: Some(echo(word)), ..Default::default() };
    let made = client.vms.clone_vm(request).await?.into_inner();
    match made.answer.and_then(|answer| answer.result) {
        Some(Answer::Echo(echo)) if echo.data == word.as_bytes() => {}
        other => return Err(Status::data_loss(format!("the clone answered {other:?}"))),
    }
    for vm in made.vms {
        client.delete_vm(&vm.id).await?;
    }
    Ok(())
}

async fn invoke(client: &mut Client, word: &str) -> Result<(), Status> {
    let request =
        InvokeRequest { function: "shout".into(), payload: word.to_owned().into(), ..Default::default() };
    let answer = client.functions.invoke(request).await?.into_inner();
    match answer.output[..] == *word.to_uppercase().as_bytes() {
        true => Ok(()),
        // Its guest went away under it.
        false if answer.output.is_empty() => Err(Status::aborted("no output")),
        false => Err(Status::data_loss(format!("it shouted {:?}", answer.output))),
    }
}

/// Until it is over; a client's every third request is an invocation, every 16th is given up in its middle.
async fn client(common: Arc<Common>, number: u64) {
    let Some(mut client) = common.connect().await else { return };
    let mut request = number;
    while !common.is_over() {
        request += CLIENTS;
        let word = format!("request {request}");
        let began = Instant::now();
        if request.is_multiple_of(16) {
            // Somewhere in the call: the service ends what it was making.
            let within = Duration::from_micros(100 * (request % 40));
            let _ = tokio::time::timeout(within, clone(&mut client, &word)).await;
            continue;
        }
        let (what, result) = match request.is_multiple_of(3) {
            true => ("invoke", invoke(&mut client, &word).await),
            false => ("clone", clone(&mut client, &word).await),
        };
        common.count(what, began, &result);
        if result.is_err_and(|status| status.code() != Code::ResourceExhausted) {
            match common.connect().await {
                Some(again) => client = again,
                None => return,
            }
        }
    }
}

/// Opens consoles and reads nothing of them.
async fn slow_client(common: Arc<Common>) {
    let mut kept = Vec::new();
    while let Some(mut client) = common.connect().await {
        let before = common.done.load(Ordering::Relaxed);
        for vm in client.list_vms().await.unwrap_or_default().into_iter().take(2) {
            if let Ok(console) = client.console(&vm.id).await {
                kept.push(console);
            }
        }
        kept.truncate(16);
        while common.done.load(Ordering::Relaxed) < before + 50 && !common.is_over() {
            common.more.notified().await;
        }
    }
}

async fn load(stage: Stage, seconds: u64) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut first = daemon.client().await?;
    let vm = first.boot_embedded(64 << 20).await?;
    let snapshot = first.snapshot(&vm.id, "base").await?.id;
    first.delete_vm(&vm.id).await?;
    let handler = GuestCommand { args: vec!["upper".into()], ..Default::default() };
    let settings = FunctionSettings { handler: Some(handler), ..Default::default() };
    let request = DeployRequest {
        name: "shout".into(),
        from: Some(From::Snapshot("base".into())),
        settings: Some(settings),
        ..Default::default()
    };
    let mut events = first.functions.deploy(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        if let Some(Event::Function(_)) = event.event {
            break;
        }
    }

    let common = Arc::new(Common {
        socket: daemon.socket(),
        logs: stage.logs.clone(),
        over: AtomicBool::new(false),
        done: AtomicU64::new(0),
        answered: AtomicU64::new(0),
        more: Notify::new(),
        counts: Mutex::default(),
    });
    let mut tasks: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(client(Arc::clone(&common), number))).collect();
    tasks.push(tokio::spawn(slow_client(Arc::clone(&common))));

    let began = Instant::now();
    let length = Duration::from_secs(seconds);
    let (mut worker_kills, mut daemon_kills, mut restarts_ms) = (0_u64, 0_u32, Vec::new());
    let mut descriptors = Vec::new();
    let (mut kill_at, mut daemon_kill_at) = (requests_a_kill(), ANSWERED_A_KILL);
    while began.elapsed() < length {
        // Woken by requests, and at the end.
        let left = length.saturating_sub(began.elapsed());
        let _ = tokio::time::timeout(left, common.more.notified()).await;
        let due = length * (daemon_kills + 1) / (DAEMON_KILLS + 1);
        if daemon_kills < DAEMON_KILLS
            && began.elapsed() >= due
            && common.answered.load(Ordering::Relaxed) >= daemon_kill_at
        {
            descriptors.push(daemon.descriptors()?);
            daemon.kill_hard()?;
            let down = Instant::now();
            daemon.start_again().await.with_context(|| format!("after kill {daemon_kills}"))?;
            restarts_ms.push(down.elapsed().as_millis());
            daemon_kills += 1;
            daemon_kill_at = common.answered.load(Ordering::Relaxed) + ANSWERED_A_KILL;
        }
        let done = common.done.load(Ordering::Relaxed);
        if done >= kill_at {
            kill_at = done + requests_a_kill();
            let workers: Vec<_> = daemon
                .processes()
                .into_iter()
                .filter(|process| process.name != "zygote" && !process.zombie)
                .collect();
            if let Some(worker) = workers.get(usize::try_from(done)? % workers.len().max(1)) {
                worker.kill();
                worker_kills += 1;
            }
        }
    }
    common.over.store(true, Ordering::Relaxed);
    common.more.notify_waiters();
    for task in tasks {
        tokio::time::timeout(crate::trial::limit(60), task).await.context("a client hangs")??;
    }

    // What nobody was told of, or could not end because its daemon was gone, is ended now; then nothing is left.
    let mut last = daemon.client().await?;
    let mut ended = 0;
    for vm in last.list_vms().await? {
        last.delete_vm(&vm.id).await?;
        ended += 1;
    }
    eventually("no VM is left", 60, async || Ok(last.list_vms().await?.is_empty())).await?;
    eventually("no process of an earlier daemon is left", 60, async || Ok(daemon.orphans().is_empty()))
        .await?;
    ensure!(last.verify(&snapshot).await? > 0);
    ensure!(invoke(&mut last, "after it all").await.is_ok(), "the function is gone");

    let mut counts = std::mem::take(&mut *common.counts.lock().unwrap_or_else(PoisonError::into_inner));
    let of = |what: &str, outcome| counts.outcomes.get(&(what, outcome)).copied().unwrap_or(0);
    let mut text = format!(
        "{seconds} s, {CLIENTS} clients; {worker_kills} workers killed, the daemon {daemon_kills} times (down for at most {} ms); \
         {ended} VMs left by callers that were cut off\n",
        restarts_ms.iter().max().copied().unwrap_or(0)
    );
    for what in ["clone", "invoke"] {
        text += &format!(
            "{what}: {} ok, {} refused, {} with a killed worker, {} with a killed daemon\n",
            of(what, Outcome::Ok),
            of(what, Outcome::Refused),
            of(what, Outcome::Killed),
            of(what, Outcome::Lost)
        );
    }
    for (what, us) in [("clone", &mut counts.clone_us), ("invoke", &mut counts.invoke_us)] {
        us.sort_unstable();
        let at = |share: usize| us.get(us.len() * share / 1000).copied().unwrap_or(0) as f64 / 1000.0;
        text += &format!(
            "{what}, to its end: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms\n",
            at(500),
            at(990),
            at(999)
        );
    }
    text += &format!("descriptors of the daemon at each kill: {descriptors:?}\n");
    std::fs::write(stage.logs.join("faults.txt"), &text)?;
    if !counts.wrong.is_empty() {
        bail!("{} answers that should not be:\n{}\n{text}", counts.wrong.len(), counts.wrong.join("\n"));
    }
    ensure!(of("clone", Outcome::Ok) > 0 && of("invoke", Outcome::Ok) > 0, "nothing went well:\n{text}");
    ensure!(daemon_kills > 0 && worker_kills > 0, "nothing was killed:\n{text}");
    Ok(())
}
