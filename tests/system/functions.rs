//! Functions: each invocation runs the handler in a clone of its own (or one of several, if that was chosen), within its limits, and leaves nothing.

use std::collections::{BTreeSet, HashMap};
use std::process::Stdio;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::deploy_event::Event;
use coldspark::api::proto::deploy_request::From;
use coldspark::api::proto::invocation_end::How;
use coldspark::api::proto::invoke_stream_request::Message as In;
use coldspark::api::proto::invoke_stream_response::Message as Out;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::client::{Client, expect_status};
use crate::daemon::{Daemon, eventually, program};
use crate::host::Need;
use crate::trial::{Stage, limit, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("functions/invoke", &[Need::Kvm, Need::Userfault], 180, invoke),
        trial("functions/stream", &[Need::Kvm], 180, stream),
        trial("functions/reuse", &[Need::Kvm], 120, reuse),
        trial("functions/limits", &[Need::Kvm], 180, limits),
        trial("functions/redeploy", &[Need::Kvm], 180, redeploy),
        trial("functions/prepare", &[Need::Kvm], 120, prepare),
        trial("functions/side-by-side", &[Need::Kvm], 120, side_by_side),
        trial("functions/bad-input", &[Need::Kvm], 120, bad_input),
    ]
}

fn command(line: &str) -> GuestCommand {
    GuestCommand { args: line.split_whitespace().map(str::to_owned).collect(), ..Default::default() }
}

fn settings(handler: &str) -> FunctionSettings {
    FunctionSettings { handler: Some(command(handler)), ..Default::default() }
}

fn embedded(name: &str, settings: FunctionSettings) -> DeployRequest {
    DeployRequest {
        name: name.into(),
        from: Some(From::Embedded(true)),
        prepare: None,
        settings: Some(settings),
    }
}

/// Deploys; gives the function and what its prepare command wrote.
async fn deploy(client: &mut Client, request: DeployRequest) -> Result<(Function, Vec<u8>), Status> {
    let mut events = client.functions.deploy(request).await?.into_inner();
    let mut written = Vec::new();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Phase(_)) => {}
            Some(Event::Output(bytes)) => written.extend_from_slice(&bytes),
            Some(Event::Function(function)) => return Ok((function, written)),
            None => return Err(Status::internal("trial: an empty event")),
        }
    }
    Err(Status::internal("trial: no function at the end"))
}

async fn call(client: &mut Client, function: &str, payload: &[u8]) -> Result<InvokeResponse, Status> {
    let request =
        InvokeRequest { function: function.into(), payload: payload.to_vec().into(), ..Default::default() };
    Ok(client.functions.invoke(request).await?.into_inner())
}

fn end(response: &InvokeResponse) -> anyhow::Result<&InvocationEnd> {
    response.end.as_ref().context("no end")
}

fn status(end: &InvocationEnd) -> anyhow::Result<u32> {
    match end.how {
        Some(How::ExitStatus(status)) => Ok(status),
        ref other => bail!("ended by {other:?}"),
    }
}

async fn look(client: &mut Client, function: &str) -> anyhow::Result<Function> {
    Ok(client.functions.get_function(GetFunctionRequest { function: function.into() }).await?.into_inner())
}

/// No VM that anybody has, nor one that stands ready, is left.
async fn all_gone(client: &mut Client) -> anyhow::Result<()> {
    eventually("all VMs are gone", 60, async || {
        let all = ListVmsRequest { ready_in_pools: true, ..Default::default() };
        Ok(client.vms.list_vms(all).await?.into_inner().vms.is_empty())
    })
    .await
}

async fn invoke(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let (function, _) = deploy(&mut client, embedded("shout", settings("upper"))).await?;
    ensure!(function.revision == 1 && function.own_snapshot && function.from == "embedded test guest");
    let mut vms = BTreeSet::new();
    for n in 0..8 {
        let answer = call(&mut client, "shout", format!("hello {n}").as_bytes()).await?;
        ensure!(answer.output == format!("HELLO {n}") && answer.stderr.is_empty(), "{answer:?}");
        let end = end(&answer)?;
        ensure!(status(end)? == 0 && end.vm_origin() != VmOrigin::Reused);
        let timings = end.timings.context("no timings")?;
        ensure!(timings.vm_us > 0 && timings.start_us > 0 && timings.run_us > 0, "{timings:?}");
        ensure!(vms.insert(end.vm.clone()), "two invocations in {}", end.vm);
    }
    ensure!(call(&mut client, "shout", b"").await?.output.is_empty());
    let counted = look(&mut client, "shout").await?;
    ensure!((counted.succeeded, counted.failed, counted.running) == (9, 0, 0), "{counted:?}");

    // The random numbers of two invocations, which are clones of one snapshot.
    deploy(&mut client, embedded("dice", settings("random 32"))).await?;
    let mut seen = BTreeSet::new();
    for _ in 0..8 {
        let numbers = call(&mut client, "dice", b"").await?.output;
        ensure!(numbers.len() == 32 && seen.insert(numbers), "the same random bytes twice");
    }

    // How it ends, and what it says.
    for (line, how, stderr) in [
        ("exit 7", How::ExitStatus(7), ""),
        ("fail oh no", How::ExitStatus(1), "oh no"),
        ("die 9", How::Signal(9), ""),
    ] {
        deploy(&mut client, embedded("ends", settings(line))).await?;
        let answer = call(&mut client, "ends", b"").await?;
        let said = String::from_utf8_lossy(&answer.stderr);
        ensure!(end(&answer)?.how == Some(how.clone()) && said.trim() == stderr, "{line}: {answer:?}");
    }
    ensure!(look(&mut client, "ends").await?.failed == 3);

    // Variables of the function, and of one invocation; with userfault memory and VMs that run ahead.
    let environment = HashMap::from([("ONE".to_owned(), "1".to_owned())]);
    let handler = GuestCommand { env: environment, ..command("env") };
    let settings = FunctionSettings {
        handler: Some(handler),
        mode: PoolMode::Running.into(),
        memory_mode: MemoryMode::Userfault.into(),
        min_ready: 1,
        ..Default::default()
    };
    deploy(&mut client, embedded("variables", settings)).await?;
    let environment = HashMap::from([("TWO".to_owned(), "2".to_owned())]);
    let request = InvokeRequest { function: "variables".into(), env: environment, ..Default::default() };
    let answer = client.functions.invoke(request).await?.into_inner();
    let output = String::from_utf8_lossy(&answer.output).into_owned();
    ensure!(output.contains("ONE=1") && output.contains("TWO=2"), "{output}");

    // Sent again, it is not run again.
    let request = InvokeRequest { function: "dice".into(), request_id: "again".into(), ..Default::default() };
    let one = client.functions.invoke(request.clone()).await?.into_inner();
    ensure!(client.functions.invoke(request).await?.into_inner() == one);

    // Nothing is left: not a VM, nor a snapshot.
    for function in ["shout", "dice", "ends", "variables"] {
        client.functions.delete_function(DeleteFunctionRequest { function: function.into() }).await?;
    }
    all_gone(&mut client).await?;
    let left = client.list_snapshots().await?.snapshots;
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(client.pools.list_pools(ListPoolsRequest::default()).await?.into_inner().pools.is_empty());
    refused(call(&mut client, "shout", b"").await, Code::NotFound, "function ls")
}

/// Checks that it failed with this code, in a sentence with these words.
fn refused<T>(result: Result<T, Status>, code: Code, words: &str) -> anyhow::Result<()> {
    let message = expect_status(words, result, &[code])?;
    ensure!(message.contains(words), "{message:?} does not say {words:?}");
    Ok(())
}

/// An invocation whose stdin is open.
struct Open {
    stdin: mpsc::Sender<InvokeStreamRequest>,
    output: Streaming<InvokeStreamResponse>,
}

impl Open {
    async fn start(client: &mut Client, function: &str, timeout_ms: u32) -> Result<Open, Status> {
        let (stdin, requests) = mpsc::channel(4);
        let start = InvokeStart { function: function.into(), timeout_ms, ..Default::default() };
        let first = InvokeStreamRequest { message: Some(In::Start(start)) };
        stdin.try_send(first).map_err(|error| Status::internal(error.to_string()))?;
        let output = client.functions.invoke_stream(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Open { stdin, output })
    }

    async fn write(&self, bytes: Vec<u8>) -> anyhow::Result<()> {
        Ok(self.stdin.send(InvokeStreamRequest { message: Some(In::Stdin(bytes.into())) }).await?)
    }

    /// Hears it to its end.
    async fn rest(self) -> Result<(Vec<u8>, InvocationEnd), Status> {
        let Open { stdin, mut output } = self;
        drop(stdin);
        let mut all = Vec::new();
        while let Some(response) = output.message().await? {
            match response.message {
                Some(Out::Stdout(bytes)) => all.extend_from_slice(&bytes),
                Some(Out::Stderr(bytes)) => {
                    return Err(Status::internal(format!("trial: on stderr: {bytes:?}")));
                }
                Some(Out::End(end)) => return Ok((all, end)),
                None => return Err(Status::internal("trial: an empty response")),
            }
        }
        Err(Status::internal("trial: no end"))
    }
}

async fn stream(stage: Stage) -> anyhow::Result<()> {
    const PIECES: usize = 64;
    const PIECE_BYTES: usize = 32 << 10;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    deploy(&mut client, embedded("cat", settings("cat"))).await?;
    // What is written comes back while more is written.
    let mut open = Open::start(&mut client, "cat", 0).await?;
    open.write(b"first".to_vec()).await?;
    match open.output.message().await?.and_then(|response| response.message) {
        Some(Out::Stdout(bytes)) => ensure!(bytes == "first"),
        other => bail!("{other:?}"),
    }
    // 2 MiB both ways, more than any window.
    let sent: Vec<u8> = (0..PIECES * PIECE_BYTES).map(|n| (n / 7 % 251) as u8).collect();
    let stdin = open.stdin.clone();
    let pieces: Vec<_> = sent.chunks(PIECE_BYTES).map(<[u8]>::to_vec).collect();
    let writing = tokio::spawn(async move {
        for piece in pieces {
            stdin.send(InvokeStreamRequest { message: Some(In::Stdin(piece.into())) }).await?;
        }
        anyhow::Ok(())
    });
    let (got, end) = open.rest().await?;
    writing.await??;
    ensure!(got == sent, "{} bytes came back of {}", got.len(), sent.len());
    ensure!(status(&end)? == 0);

    // A unary answer ends at its limit, and says so.
    deploy(&mut client, embedded("flood", settings("yes 1000000"))).await?;
    let answer = call(&mut client, "flood", b"").await?;
    ensure!(
        answer.output.len() == 512 << 10 && answer.lost_bytes == 1_000_000 - (512 << 10),
        "{}",
        answer.lost_bytes
    );
    let answer = call(&mut client, "cat", &vec![7; 1 << 20]).await?;
    ensure!(answer.output.len() as u64 + answer.lost_bytes == 1 << 20);
    all_gone_but_ready(&mut client).await
}

/// No VM that anybody has is left.
async fn all_gone_but_ready(client: &mut Client) -> anyhow::Result<()> {
    eventually("all VMs are gone", 60, async || Ok(client.list_vms().await?.is_empty())).await
}

async fn reuse(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let three = FunctionSettings { invocations_per_vm: 3, ..settings("cat") };
    deploy(&mut client, embedded("again", three.clone())).await?;
    let mut vms = Vec::new();
    for n in 0..7u8 {
        let answer = call(&mut client, "again", &[n]).await?;
        ensure!(*answer.output == [n]);
        let end = end(&answer)?;
        ensure!((end.vm_origin() == VmOrigin::Reused) == (n % 3 != 0), "number {n}: {end:?}");
        vms.push(end.vm.clone());
    }
    ensure!(vms[0] == vms[1] && vms[1] == vms[2] && vms[3] == vms[5], "{vms:?}");
    ensure!(vms[2] != vms[3] && vms[5] != vms[6], "{vms:?}");
    let seen = look(&mut client, "again").await?;
    ensure!((seen.warm, seen.reused) == (1, 4), "{seen:?}");
    // One that waits is ended when its time is over, and one of an older deployment at once.
    deploy(&mut client, embedded("again", FunctionSettings { idle_ttl_ms: Some(50), ..three })).await?;
    all_gone_but_ready(&mut client).await?;
    call(&mut client, "again", b"x").await?;
    all_gone_but_ready(&mut client).await?;
    ensure!(look(&mut client, "again").await?.warm == 0);
    // A handler that was killed leaves a VM that nobody should have.
    let kill = FunctionSettings { invocations_per_vm: 3, ..settings("die 9") };
    deploy(&mut client, embedded("again", kill)).await?;
    let (one, two) = (call(&mut client, "again", b"").await?, call(&mut client, "again", b"").await?);
    ensure!(end(&one)?.vm != end(&two)?.vm);
    Ok(())
}

async fn limits(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let two = FunctionSettings {
        concurrency: 2,
        queue: Some(1),
        queue_timeout_ms: Some(60_000),
        ..settings("cat")
    };
    deploy(&mut client, embedded("slow", two.clone())).await?;
    // A payload that cannot be read is not an empty one.
    let unreadable = tokio::process::Command::new(program())
        .args(["function", "invoke", "slow", "--socket"])
        .arg(daemon.socket())
        .stdin(std::fs::File::open("/")?)
        .kill_on_drop(true)
        .output()
        .await?;
    let told = String::from_utf8_lossy(&unreadable.stderr);
    ensure!(unreadable.status.code() == Some(125) && told.contains("cannot read stdin"), "{told}");
    eventually("it was given up", 30, async || Ok(look(&mut client, "slow").await?.running == 0)).await?;
    let given_up = look(&mut client, "slow").await?.cancelled;
    let first = Open::start(&mut client, "slow", 0).await?;
    let mut second = tokio::process::Command::new(program())
        .args(["function", "invoke", "slow", "--socket"])
        .arg(daemon.socket())
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    eventually("both run", 30, async || Ok(look(&mut client, "slow").await?.running == 2)).await?;
    let third = {
        let mut client = client.clone();
        tokio::spawn(async move { call(&mut client, "slow", b"third").await })
    };
    eventually("the third waits", 30, async || Ok(look(&mut client, "slow").await?.queued == 1)).await?;
    refused(call(&mut client, "slow", b"fourth").await, Code::ResourceExhausted, "2 run and 1 wait")?;
    ensure!(look(&mut client, "slow").await?.running == 2);
    // A turn that comes free is the third's.
    first.rest().await?;
    let third = third.await??;
    ensure!(third.output == "third");
    let timings = end(&third)?.timings.context("no timings")?;
    ensure!(timings.queue_us > 0, "{timings:?}");

    // A caller that is killed ends what it began: its stdin, which is still open, was cut off and has not ended.
    second.kill().await?;
    eventually(
        "it was given up",
        30,
        async || Ok(look(&mut client, "slow").await?.cancelled == given_up + 1),
    )
    .await?;
    ensure!(look(&mut client, "slow").await?.succeeded == 2);
    all_gone_but_ready(&mut client).await?;

    // One that takes too long is ended, whatever it does.
    let late = Open::start(&mut client, "slow", 100).await?;
    let keep = late.stdin.clone();
    refused(late.rest().await, Code::DeadlineExceeded, "100 ms")?;
    drop(keep);
    deploy(&mut client, embedded("spin", settings("spin 60000"))).await?;
    let request = InvokeRequest { function: "spin".into(), timeout_ms: 100, ..Default::default() };
    refused(client.functions.invoke(request).await, Code::DeadlineExceeded, "100 ms")?;
    ensure!(look(&mut client, "spin").await?.timed_out == 1);
    // And one for whom there is no turn in time.
    deploy(
        &mut client,
        embedded("slow", FunctionSettings { concurrency: 1, queue_timeout_ms: Some(50), ..two }),
    )
    .await?;
    let open = Open::start(&mut client, "slow", 0).await?;
    refused(call(&mut client, "slow", b"").await, Code::ResourceExhausted, "no turn within 50 ms")?;
    open.rest().await?;
    all_gone_but_ready(&mut client).await
}

/// Deployed anew while it is used, and kept over the service's end.
async fn redeploy(stage: Stage) -> anyhow::Result<()> {
    let mut daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let ready = |handler| FunctionSettings { min_ready: 1, ..settings(handler) };
    let (old, _) = deploy(&mut client, embedded("web", ready("echo old"))).await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let caller = {
        let mut client = client.clone();
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while !*stopped.borrow() {
                let answer = call(&mut client, "web", b"").await?;
                answers.push(String::from_utf8_lossy(&answer.output).trim().to_owned());
            }
            anyhow::Ok(answers)
        })
    };
    eventually("it is used", 60, async || Ok(look(&mut client, "web").await?.succeeded >= 5)).await?;
    let (new, _) = deploy(&mut client, embedded("web", ready("echo new"))).await?;
    ensure!(new.revision == 2 && new.snapshot != old.snapshot, "{new:?}");
    let before = look(&mut client, "web").await?.succeeded;
    eventually("it is used again", 60, async || Ok(look(&mut client, "web").await?.succeeded >= before + 5))
        .await?;
    stop.send(true)?;
    let answers = caller.await??;
    ensure!(answers.first().is_some_and(|answer| answer == "old"), "{answers:?}");
    ensure!(answers.last().is_some_and(|answer| answer == "new"), "{answers:?}");
    let snapshots = client.list_snapshots().await?.snapshots;
    ensure!(snapshots.len() == 1 && snapshots[0].id == new.snapshot, "{snapshots:?}");
    let delete = DeleteSnapshotRequest { snapshot: new.snapshot.clone() };
    refused(client.snapshots.delete_snapshot(delete).await, Code::FailedPrecondition, "fn/web")?;

    drop(client);
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    let seen = look(&mut client, "web").await?;
    ensure!(seen.revision == 2 && seen.snapshot == new.snapshot && seen.settings == new.settings, "{seen:?}");
    ensure!(call(&mut client, "web", b"").await?.output.starts_with(b"new"));

    // The service dies while a deployment is under way: the older one is as it was, and nothing is left of the newer.
    let mut prepared = embedded("web", ready("echo newest"));
    prepared.prepare = Some(command("spin 60000"));
    let mut events = client.functions.deploy(prepared).await?.into_inner();
    ensure!(matches!(events.message().await?.and_then(|event| event.event), Some(Event::Phase(_))));
    drop((events, client));
    daemon.kill_hard()?;
    daemon.start_again().await?;
    let mut client = daemon.client().await?;
    ensure!(call(&mut client, "web", b"").await?.output.starts_with(b"new"));
    let snapshots = client.list_snapshots().await?.snapshots;
    ensure!(snapshots.len() == 1 && snapshots[0].id == new.snapshot, "{snapshots:?}");
    Ok(())
}

async fn prepare(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let prepared = |line| DeployRequest { prepare: Some(command(line)), ..embedded("made", settings("cat")) };
    let (_, written) = deploy(&mut client, prepared("echo all is ready")).await?;
    ensure!(String::from_utf8_lossy(&written).trim() == "all is ready", "{written:?}");
    ensure!(call(&mut client, "made", b"x").await?.output == "x");
    // A deployment that fails leaves the older one, and nothing else.
    let before = look(&mut client, "made").await?;
    refused(deploy(&mut client, prepared("fail there is no compiler")).await, Code::Aborted, "no compiler")?;
    refused(deploy(&mut client, prepared("exit 3")).await, Code::Aborted, "status 3")?;
    refused(deploy(&mut client, prepared("no-such-command")).await, Code::NotFound, "no such command")?;
    let after = look(&mut client, "made").await?;
    ensure!((after.revision, &after.snapshot) == (before.revision, &before.snapshot), "{after:?}");
    ensure!(client.list_snapshots().await?.snapshots.len() == 1);
    all_gone_but_ready(&mut client).await?;

    // From a snapshot: as it is, then it stays when the function goes; and prepared.
    let vm = client.boot_embedded(64 << 20).await?;
    client.snapshot(&vm.id, "base").await?;
    client.delete_vm(&vm.id).await?;
    let from = |name: &str, prepare| DeployRequest {
        from: Some(From::Snapshot("base".into())),
        prepare,
        ..embedded(name, settings("upper"))
    };
    let (plain, _) = deploy(&mut client, from("plain", None)).await?;
    let (own, _) = deploy(&mut client, from("own", Some(command("echo hi")))).await?;
    ensure!(!plain.own_snapshot && own.own_snapshot && plain.snapshot != own.snapshot);
    for function in ["plain", "own"] {
        ensure!(call(&mut client, function, b"a").await?.output == "A");
        client.functions.delete_function(DeleteFunctionRequest { function: function.into() }).await?;
    }
    let left: Vec<_> = client.list_snapshots().await?.snapshots.into_iter().map(|one| one.id).collect();
    ensure!(left.contains(&plain.snapshot) && !left.contains(&own.snapshot), "{left:?}");
    Ok(())
}

/// A deployment that takes long holds nobody up, and leaves nothing when its caller goes away.
async fn side_by_side(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    deploy(&mut client, embedded("quick", settings("upper"))).await?;
    let mut other = daemon.client().await?;
    // It has a minute and more to go.
    let long = DeployRequest { prepare: Some(command("spin 90000")), ..embedded("long", settings("cat")) };
    let mut events = other.functions.deploy(long).await?.into_inner();
    eventually("its command runs", 60, async || {
        Ok(client.list_vms().await?.iter().any(|vm| vm.state() == VmState::Ready))
    })
    .await?;
    ensure!(matches!(events.message().await?.and_then(|event| event.event), Some(Event::Phase(_))));
    let meanwhile = async {
        deploy(&mut client, embedded("quick", settings("cat"))).await?;
        ensure!(call(&mut client, "quick", b"a").await?.output == "a");
        client.functions.delete_function(DeleteFunctionRequest { function: "quick".into() }).await?;
        anyhow::Ok(())
    };
    tokio::time::timeout(limit(30), meanwhile)
        .await
        .context("held up by a deployment of another function")??;
    refused(call(&mut client, "long", b"").await, Code::NotFound, "long")?;
    drop((events, other));
    all_gone_but_ready(&mut client).await?;
    let snapshots = client.list_snapshots().await?.snapshots;
    ensure!(snapshots.is_empty(), "{snapshots:?}");
    refused(call(&mut client, "long", b"").await, Code::NotFound, "long")
}

/// Words that do not belong into an invocation end it at once, also for a caller that takes nothing any more.
async fn bad_words(client: &mut Client) -> anyhow::Result<()> {
    let endless = FunctionSettings { concurrency: 1, queue: Some(0), ..settings("yes 1000000000000") };
    deploy(client, embedded("endless", endless)).await?;
    let open = Open::start(client, "endless", 0).await?;
    // All windows on the way are full when its guest stands still.
    let mut exits = 0;
    eventually("nothing more is taken", 60, async || {
        let vms = client.list_vms().await?;
        let vm = vms.first().context("no VM")?.id.clone();
        let now = client.vms.get_vm_stats(GetVmStatsRequest { vm }).await?.into_inner().vcpu_exits;
        Ok(now == std::mem::replace(&mut exits, now))
    })
    .await?;
    ensure!(look(client, "endless").await?.running == 1);
    let again = InvokeStart { function: "endless".into(), ..Default::default() };
    open.stdin.send(InvokeStreamRequest { message: Some(In::Start(again)) }).await?;
    eventually("it has ended, though nobody takes its error", 20, async || {
        Ok(look(client, "endless").await?.running == 0)
    })
    .await?;
    drop(open);
    client.functions.delete_function(DeleteFunctionRequest { function: "endless".into() }).await?;
    all_gone_but_ready(client).await
}

async fn bad_input(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    bad_words(&mut client).await?;
    let good = embedded("good", settings("cat"));
    let with = |settings| embedded("good", settings);
    let cases = [
        (embedded("Good", settings("cat")), Code::InvalidArgument, "a-z 0-9 -"),
        (embedded("../good", settings("cat")), Code::InvalidArgument, "a-z 0-9 -"),
        (DeployRequest { from: None, ..good.clone() }, Code::InvalidArgument, "from"),
        (DeployRequest { from: Some(From::Image("none".into())), ..good.clone() }, Code::NotFound, "none"),
        (DeployRequest { from: Some(From::Snapshot("none".into())), ..good.clone() }, Code::NotFound, "none"),
        (DeployRequest { settings: None, ..good.clone() }, Code::InvalidArgument, "handler"),
        (with(settings("")), Code::InvalidArgument, "command"),
        (
            with(FunctionSettings { timeout_ms: u32::MAX, ..settings("cat") }),
            Code::InvalidArgument,
            "timeout",
        ),
        (
            with(FunctionSettings { concurrency: 5000, ..settings("cat") }),
            Code::InvalidArgument,
            "concurrency",
        ),
        (with(FunctionSettings { min_ready: 17, ..settings("cat") }), Code::InvalidArgument, "min_ready"),
        (with(FunctionSettings { mode: 9, ..settings("cat") }), Code::InvalidArgument, "PoolMode"),
    ];
    for (request, code, words) in cases {
        refused(deploy(&mut client, request).await, code, words)?;
    }
    ensure!(
        client
            .functions
            .list_functions(ListFunctionsRequest::default())
            .await?
            .into_inner()
            .functions
            .is_empty()
    );
    deploy(&mut client, good).await?;
    refused(call(&mut client, "good", &vec![0; (1 << 20) + 1]).await, Code::InvalidArgument, "InvokeStream")?;
    let environment = HashMap::from([("A=B".to_owned(), "1".to_owned())]);
    let request = InvokeRequest { function: "good".into(), env: environment, ..Default::default() };
    refused(client.functions.invoke(request).await, Code::InvalidArgument, "variable")?;
    // Its pool is its own.
    let take = TakeVmRequest { pool: "fn/good".into(), ..Default::default() };
    refused(client.pools.take_vm(take).await, Code::FailedPrecondition, "function good")?;
    let delete = DeletePoolRequest { pool: "fn/good".into() };
    refused(client.pools.delete_pool(delete).await, Code::FailedPrecondition, "function good")?;
    // A handler that is not there.
    deploy(&mut client, embedded("good", settings("no-such-command"))).await?;
    refused(call(&mut client, "good", b"").await, Code::NotFound, "no such command")?;
    all_gone_but_ready(&mut client).await
}
