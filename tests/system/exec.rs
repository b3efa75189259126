//! Commands and files in the embedded guest: streams both ways, windows, statuses, signals, callers that vanish, snapshots and
//! clones while commands run.

use anyhow::{Context as _, ensure};
use coldspark::api::proto::exec_exit::How;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ask, expect_status};
use crate::commands::{Command, Left, get, put, run, start};
use crate::daemon::{Daemon, eventually, program};
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm];
const MEMORY: u64 = 64 << 20;
/// Commands and files at a time.
const STREAMS_MAX: usize = 32;
/// More than all windows between a command and a caller hold.
const FLOOD: &str = "100000000";
const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("embedded/exec/commands", NEEDS, 60, |stage| commands(stage, AgentPort::Virtio)),
        trial("embedded/exec/both-ways", NEEDS, 120, both_ways),
        trial("embedded/exec/signals", NEEDS, 60, signals),
        trial("embedded/exec/flood-that-nobody-reads", NEEDS, 60, flood),
        trial("embedded/exec/caller-that-vanishes", NEEDS, 60, vanishing),
        trial("embedded/exec/snapshots-and-clones", NEEDS, 120, |stage| clones(stage, AgentPort::Virtio)),
        trial("embedded/exec/guest-that-ends", NEEDS, 60, ending),
        trial("embedded/exec/files", NEEDS, 60, |stage| files(stage, AgentPort::Virtio)),
        trial("embedded/exec/serial-port/commands", NEEDS, 120, |stage| commands(stage, AgentPort::Serial)),
        trial("embedded/exec/serial-port/clones", NEEDS, 240, |stage| clones(stage, AgentPort::Serial)),
        trial("embedded/exec/serial-port/files", NEEDS, 240, |stage| files(stage, AgentPort::Serial)),
        trial("embedded/exec/command-line", NEEDS, 60, command_line),
    ]
}

async fn boot(stage: &Stage) -> anyhow::Result<(Daemon, Client, String)> {
    boot_with(stage, AgentPort::Virtio).await
}

async fn boot_with(stage: &Stage, port: AgentPort) -> anyhow::Result<(Daemon, Client, String)> {
    let daemon = Daemon::start(stage).await?;
    let mut client = daemon.client().await?;
    let vm = client.boot_embedded_with(MEMORY, port).await?.id;
    Ok((daemon, client, vm))
}

/// Bytes none of which says the same as another at its place.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_be_bytes()).collect()
}

/// Waits until the guest knows of so many streams.
async fn expect_streams(client: &Client, vm: &str, count: u32) -> anyhow::Result<()> {
    eventually(&format!("{count} streams in {vm}"), 20, async || {
        let mut client = client.clone();
        Ok(ask!(&mut client, vm, Stats(StatsOp {})).streams == count)
    })
    .await
}

async fn commands(stage: Stage, port: AgentPort) -> anyhow::Result<()> {
    let (_daemon, client, vm) = boot_with(&stage, port).await?;
    run(&client, &vm, &["echo", "hello", "", "world"]).await?.expect(0, "hello  world\n")?;
    run(&client, &vm, &["exit", "77"]).await?.expect(77, "")?;
    let failed = run(&client, &vm, &["fail", "no", "luck"]).await?;
    let due = Left { stdout: vec![], stderr: b"no luck\n".to_vec(), how: How::Status(1) };
    ensure!(failed == due, "{failed:?}");
    let dead = run(&client, &vm, &["die", "11"]).await?;
    ensure!(dead.how == How::Signal(11), "{dead:?}");

    let mut with = start(&vm, &["env"]);
    with.env = [("B".into(), "2=3".into()), ("A".into(), String::new())].into();
    Command::open(&client, with).await?.finish().await?.expect(0, "A=\nB=2=3\n")?;
    for (word, cwd, user) in [("pwd", "/some/where", ""), ("whoami", "", "somebody")] {
        let given = ExecStart { cwd: cwd.into(), user: user.into(), ..start(&vm, &[word]) };
        Command::open(&client, given).await?.finish().await?.expect(0, &format!("{cwd}{user}\n"))?;
    }

    let open = async |start| Command::open(&client, start).await.map(|_| ());
    expect_status("no such command", open(start(&vm, &["ls"])).await, &[Code::NotFound])?;
    expect_status("no command", open(start(&vm, &[])).await, &[Code::InvalidArgument])?;
    expect_status("no such VM", open(start("nobody", &["echo"])).await, &[Code::NotFound])?;
    let nul = open(start(&vm, &["echo", "a\0b"])).await;
    expect_status("a NUL", nul, &[Code::InvalidArgument])?;
    let long = "x".repeat(70_000);
    expect_status("too long", open(start(&vm, &["echo", &long])).await, &[Code::InvalidArgument])?;
    let late = ExecStart { timeout_ms: 604_800_001, ..start(&vm, &["echo"]) };
    expect_status("a long timeout", open(late).await, &[Code::InvalidArgument])?;

    // Time is over: killed.
    let brief = ExecStart { timeout_ms: 50, ..start(&vm, &["wait"]) };
    let mut brief = Command::open(&client, brief).await?;
    expect_status("a command out of time", brief.rest().await, &[Code::DeadlineExceeded])?;
    expect_streams(&client, &vm, 0).await
}

/// 1 MiB through a command both ways at once, and as much that only the guest sends.
async fn both_ways(stage: Stage) -> anyhow::Result<()> {
    let (_daemon, client, vm) = boot(&stage).await?;
    let due = pattern(1 << 20);
    let mut cat = Command::open(&client, start(&vm, &["cat"])).await?;
    let requests = cat.requests.take().context("its requests")?;
    let bytes = due.clone();
    let writing = async {
        for piece in bytes.chunks(70_000) {
            let message = Some(exec_request::Message::Stdin(piece.to_vec().into()));
            requests.send(ExecRequest { message }).await?;
        }
        drop(requests);
        anyhow::Ok(())
    };
    let (left, written) = tokio::join!(cat.rest(), writing);
    written?;
    let left = left?;
    ensure!(left.how == How::Status(0) && left.stderr.is_empty(), "{:?}", left.how);
    ensure!(left.stdout == due, "{} bytes came back, or others", left.stdout.len());

    let random = run(&client, &vm, &["random", "1048576"]).await?;
    ensure!(random.stdout.len() == 1 << 20 && random.how == How::Status(0), "{}", random.stdout.len());
    let mut upper = Command::open(&client, start(&vm, &["upper"])).await?;
    upper.stdin(b"piece by piece").await?;
    ensure!(upper.stdout().await? == b"PIECE BY PIECE");
    upper.stdin_end().await?;
    upper.rest().await?.expect(0, "")
}

async fn signals(stage: Stage) -> anyhow::Result<()> {
    let (_daemon, client, vm) = boot(&stage).await?;
    let mut trap = Command::open(&client, start(&vm, &["trap"])).await?;
    for signal in [SIGINT, 1, 128] {
        trap.signal(signal).await?;
        let line = trap.stdout().await?;
        ensure!(line == format!("signal {signal}\n").as_bytes(), "{:?}", String::from_utf8_lossy(&line));
    }
    trap.signal(SIGKILL).await?;
    let left = trap.rest().await?;
    ensure!(left.how == How::Signal(SIGKILL), "{left:?}");
    // One that computes is ended too.
    let mut spin = Command::open(&client, start(&vm, &["spin", "3600000"])).await?;
    spin.signal(SIGINT).await?;
    let left = spin.rest().await?;
    ensure!(left.how == How::Signal(SIGINT), "{left:?}");
    let mut wrong = Command::open(&client, start(&vm, &["wait"])).await?;
    wrong.signal(129).await?;
    expect_status("no signal", wrong.rest().await, &[Code::InvalidArgument])?;
    expect_streams(&client, &vm, 0).await
}

/// Output that is not read holds up its own command and nothing else.
async fn flood(stage: Stage) -> anyhow::Result<()> {
    let (_daemon, mut client, vm) = boot(&stage).await?;
    // A connection of its own: what is not read there fills it.
    let mut floods = Vec::new();
    for _ in 0..4 {
        floods.push(Command::open(&client, start(&vm, &["yes", FLOOD])).await?);
    }
    for round in 0..20 {
        let word = format!("round {round}");
        run(&client, &vm, &["echo", &word]).await?.expect(0, &format!("{word}\n"))?;
    }
    ask!(&mut client, &vm, Time(TimeOp {}));
    // A snapshot can be taken, and they go on after it.
    client.snapshot(&vm, "flooded").await.context("a snapshot of a guest that floods")?;
    ensure!(floods[0].stdout().await?.len() > 1);
    run(&client, &vm, &["echo", "after"]).await?.expect(0, "after\n")?;

    // As many as there can be, and one more.
    let mut waits = Vec::new();
    while floods.len() + waits.len() < STREAMS_MAX {
        waits.push(Command::open(&client, start(&vm, &["wait"])).await?);
    }
    let more = Command::open(&client, start(&vm, &["echo"])).await.map(|_| ());
    expect_status("one too many", more, &[Code::ResourceExhausted])?;
    for wait in &mut waits {
        wait.finish().await?.expect(0, "")?;
    }
    run(&client, &vm, &["echo", "room"]).await?.expect(0, "room\n")?;
    drop(floods);
    expect_streams(&client, &vm, 0).await
}

/// A caller that goes away takes its command with it.
async fn vanishing(stage: Stage) -> anyhow::Result<()> {
    let (daemon, client, vm) = boot(&stage).await?;
    {
        let gone = daemon.client().await?;
        let _wait = Command::open(&gone, start(&vm, &["wait"])).await?;
        let _yes = Command::open(&gone, start(&vm, &["yes", FLOOD])).await?;
        let _trap = Command::open(&gone, start(&vm, &["trap"])).await?;
        expect_streams(&client, &vm, 3).await?;
    }
    expect_streams(&client, &vm, 0).await?;
    run(&client, &vm, &["echo", "alone"]).await?.expect(0, "alone\n")
}

/// Commands go on in a VM of which a snapshot is taken; its clones have none of them, and can have their own.
async fn clones(stage: Stage, port: AgentPort) -> anyhow::Result<()> {
    let (_daemon, mut client, vm) = boot_with(&stage, port).await?;
    put(&client, &vm, "/kept", 0o600, b"kept").await?;
    let mut cat = Command::open(&client, start(&vm, &["cat"])).await?;
    cat.stdin(b"before").await?;
    ensure!(cat.stdout().await? == b"before");
    let _yes = Command::open(&client, start(&vm, &["yes", FLOOD])).await?;
    let _spin = Command::open(&client, start(&vm, &["spin", "3600000"])).await?;
    client.snapshot(&vm, "working").await.context("a snapshot of a guest at work")?;
    cat.stdin(b"after").await?;
    ensure!(cat.stdout().await? == b"after", "the command did not outlive the snapshot");

    for clone in client.clone_vms("working", 3, MemoryMode::Mapped, Identity::Managed).await? {
        let id = &clone.id;
        ensure!(ask!(&mut client, id, Stats(StatsOp {})).streams == 0, "{id}: commands of another VM");
        run(&client, id, &["echo", id]).await?.expect(0, &format!("{id}\n"))?;
        ensure!(get(&client, id, "/kept").await? == (0o600, b"kept".to_vec()));
        put(&client, id, "/kept", 0o644, id.as_bytes()).await?;
    }
    // Nobody tells an unmanaged one: it keeps still, and its first command of its own ends the others.
    let copy = client.clone_vms("working", 1, MemoryMode::Mapped, Identity::Unmanaged).await?.remove(0).id;
    ensure!(ask!(&mut client, &copy, Stats(StatsOp {})).streams == 3);
    run(&client, &copy, &["echo", "mine"]).await?.expect(0, "mine\n")?;
    expect_streams(&client, &copy, 0).await?;
    // A snapshot of a clone that has commands, too.
    let mut wait = Command::open(&client, start(&copy, &["wait"])).await?;
    client.snapshot(&copy, "again").await?;
    wait.finish().await?.expect(0, "")?;
    let last = client.clone_vms("again", 1, MemoryMode::Mapped, Identity::Managed).await?.remove(0).id;
    run(&client, &last, &["cat", "/kept"]).await?.expect(0, "kept")?;
    ensure!(get(&client, &vm, "/kept").await?.1 == b"kept", "a clone wrote another VM's file");
    cat.finish().await?.expect(0, "")
}

/// Who has a command in a VM that ends is told.
async fn ending(stage: Stage) -> anyhow::Result<()> {
    let (_daemon, mut client, vm) = boot(&stage).await?;
    let mut wait = Command::open(&client, start(&vm, &["wait"])).await?;
    client.delete_vm(&vm).await?;
    expect_status("the VM's end", wait.rest().await, &[Code::Aborted])?;
    Ok(())
}

async fn files(stage: Stage, port: AgentPort) -> anyhow::Result<()> {
    let (_daemon, client, vm) = boot_with(&stage, port).await?;
    // A byte of a serial port is some exits, which take a millisecond each in the rig.
    let bytes = pattern(match port {
        AgentPort::Serial if host::in_rig() => 8 << 10,
        AgentPort::Serial => 12 << 10,
        _ => 256 << 10,
    });
    ensure!(put(&client, &vm, "/data", 0o640, &bytes).await? == bytes.len() as u64);
    ensure!(get(&client, &vm, "/data").await? == (0o640, bytes), "other bytes than were written");
    ensure!(put(&client, &vm, "/data", 0o600, b"").await? == 0);
    ensure!(get(&client, &vm, "/data").await? == (0o600, vec![]), "not written anew");
    put(&client, &vm, "/words", 0o644, b"words").await?;
    run(&client, &vm, &["cat", "/words"]).await?.expect(0, "words")?;

    expect_status("no such file", get(&client, &vm, "/nothing").await, &[Code::NotFound])?;
    let full = put(&client, &vm, "/words", 0o644, &pattern(257 << 10)).await;
    let told = expect_status("too long a file", full, &[Code::Internal])?;
    ensure!(told.contains("room"), "{told}");
    expect_status("a bad mode", put(&client, &vm, "/x", 0o10000, b"").await, &[Code::InvalidArgument])?;
    expect_status("no path", put(&client, &vm, "", 0o600, b"").await, &[Code::InvalidArgument])?;
    // One that breaks off leaves what was there, with or without some of its bytes.
    for n in 0..20 {
        let (requests, stream) = tokio::sync::mpsc::channel(4);
        let broken = PutFileStart { vm: vm.clone(), path: "/words".into(), mode: 0o600 };
        let message = |message| PutFileRequest { message: Some(message) };
        requests.send(message(put_file_request::Message::Start(broken))).await?;
        if n % 2 == 1 {
            requests.send(message(put_file_request::Message::Data(pattern(4096).into()))).await?;
        }
        let mut agent = client.agent.clone();
        let putting =
            tokio::spawn(
                async move { agent.put_file(tokio_stream::wrappers::ReceiverStream::new(stream)).await },
            );
        expect_streams(&client, &vm, 1).await?;
        putting.abort();
        expect_streams(&client, &vm, 0).await?;
    }
    run(&client, &vm, &["cat", "/words"]).await?.expect(0, "words")
}

/// `coldspark vm exec` and `cp`.
async fn command_line(stage: Stage) -> anyhow::Result<()> {
    let (daemon, _client, vm) = boot(&stage).await?;
    let coldspark = |words: &[&str]| {
        let mut command = tokio::process::Command::new(program());
        command.args(["vm", words[0], "--socket"]).arg(daemon.socket()).args(&words[1..]);
        command.stdin(std::process::Stdio::null()).kill_on_drop(true);
        command
    };
    let said = coldspark(&["exec", "-e", "A=1", &vm, "--", "env"]).output().await?;
    ensure!(said.status.success() && said.stdout == b"A=1\n", "{said:?}");
    let said = coldspark(&["exec", &vm, "--", "exit", "9"]).output().await?;
    ensure!(said.status.code() == Some(9) && said.stderr.is_empty(), "{said:?}");
    let said = coldspark(&["exec", &vm, "--", "die", "15"]).output().await?;
    ensure!(said.status.code() == Some(128 + 15), "{said:?}");
    let said = coldspark(&["exec", &vm, "--", "nothing"]).output().await?;
    ensure!(said.status.code() == Some(125) && !said.stderr.is_empty(), "{said:?}");

    // What cannot be read is not the end of stdin.
    let mut unreadable = coldspark(&["exec", "-i", &vm, "--", "cat"]);
    let said = unreadable.stdin(std::fs::File::open("/")?).output().await?;
    let told = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.code() == Some(125) && told.contains("cannot read stdin"), "{said:?}");

    // Files, and stdin from one.
    let folder = tempfile::tempdir()?;
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let bytes = pattern(200_000);
    std::fs::write(&from, &bytes)?;
    let there = format!("{vm}:/from");
    let said = coldspark(&["cp", from.to_str().context("a path")?, &there]).output().await?;
    ensure!(said.status.success(), "{said:?}");
    let said = coldspark(&["cp", &there, to.to_str().context("a path")?]).output().await?;
    ensure!(said.status.success() && std::fs::read(&to)? == bytes, "{said:?}");
    let said =
        coldspark(&["exec", "-i", &vm, "--", "cat"]).stdin(std::fs::File::open(&from)?).output().await?;
    ensure!(said.status.success() && said.stdout == bytes, "{:?}", said.status);
    // A stdin that cannot be read has no end: the command does not end well with what there was.
    let unreadable = std::fs::File::open(folder.path())?;
    let said = coldspark(&["exec", "-i", &vm, "--", "cat"]).stdin(unreadable).output().await?;
    let why = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.code() == Some(125) && why.contains("cannot read stdin"), "{said:?}");
    expect_streams(&_client, &vm, 0).await?;

    // An interrupt is the command's: one that goes on tells of it, one that does not is ended by it.
    let mut trap = coldspark(&["exec", "-i", &vm, "--", "trap"]);
    let mut trap = trap.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn()?;
    let stdin = trap.stdin.take();
    expect_streams(&_client, &vm, 1).await?;
    let pid = trap.id().context("its process")? as i32;
    // SAFETY: a signal to a child that is not reaped.
    ensure!(unsafe { libc::kill(pid, libc::SIGINT) } == 0);
    let mut line = [0; 9];
    let stdout = trap.stdout.as_mut().context("its stdout")?;
    tokio::io::AsyncReadExt::read_exact(stdout, &mut line).await?;
    ensure!(line == *b"signal 2\n");
    drop(stdin);
    ensure!(trap.wait().await?.code() == Some(0));
    Ok(())
}
