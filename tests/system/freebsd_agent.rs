//! The agent in a real FreeBSD: its hello is the ready point; commands, files, snapshots; clones that are other machines.

use std::collections::HashSet;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::create_vm_request::Source;
use coldspark::api::proto::exec_exit::How;
use coldspark::api::proto::ready_point::At;
use coldspark::api::proto::*;
use libtest_mimic::Trial;
use tonic::Code;

use crate::client::{Client, ImageFiles, ask, expect_status};
use crate::commands::{Command, get, put, run, start};
use crate::daemon::{Daemon, eventually};
use crate::freebsd::environment;
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsdAgent];
const CLONES: u32 = 3;
/// HELLO's number of the FreeBSD agent.
const AGENT_FREEBSD: u32 = 2;
/// How much faster than this machine's clock a clone's may have gone since it was set.
const AHEAD_NS: u64 = 5_000_000;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("freebsd/agent/commands", NEEDS, 120, |stage| commands(stage, AgentPort::Virtio)),
        trial("freebsd/agent/clones", NEEDS, 120, |stage| clones(stage, AgentPort::Virtio)),
        trial("freebsd/agent/serial-port/commands", NEEDS, 300, |stage| commands(stage, AgentPort::Serial)),
        trial("freebsd/agent/serial-port/clones", NEEDS, 300, |stage| clones(stage, AgentPort::Serial)),
    ]
}

/// Boots it up to the agent's hello.
async fn boot(client: &mut Client, port: AgentPort) -> anyhow::Result<String> {
    let (kernel, disk) = host::freebsd_agent().map_err(anyhow::Error::msg)?;
    let spec = ImageSpec {
        name: "freebsd".into(),
        disks: vec![DiskSettings { read_only: false, ..Default::default() }],
        boot: Some(BootSettings {
            protocol: BootProtocol::Freebsd.into(),
            hardware: Hardware::Unspecified.into(),
            command_line: environment(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            ready: Some(ReadyPoint { at: Some(At::AgentHello(true)) }),
            agent_port: port.into(),
        }),
        ..Default::default()
    };
    let files =
        ImageFiles { kernel: Some(fs::read(kernel)?), disks: vec![fs::read(disk)?], ..Default::default() };
    client.import(spec, files).await?;
    let request = CreateVmRequest { source: Some(Source::Image("freebsd".into())), ..Default::default() };
    Ok(client.boot(request).await?.vm.id)
}

/// What a command says on stdout, without the line's end.
async fn says(client: &Client, vm: &str, words: &[&str]) -> anyhow::Result<String> {
    let left = run(client, vm, words).await.with_context(|| format!("{words:?}"))?;
    ensure!(left.how == How::Status(0) && left.stderr.is_empty(), "{words:?}: {left:?}");
    Ok(String::from_utf8_lossy(&left.stdout).trim_end().to_owned())
}

async fn expect_streams(client: &Client, vm: &str, count: u32) -> anyhow::Result<()> {
    eventually(&format!("{count} streams in {vm}"), 30, async || {
        let mut client = client.clone();
        Ok(ask!(&mut client, vm, Stats(StatsOp {})).streams == count)
    })
    .await
}

/// Bytes none of which says the same as another at its place.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_be_bytes()).collect()
}

async fn commands(stage: Stage, port: AgentPort) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, port).await?;
    let hello = ask!(&mut client, &vm, Hello(HelloOp {}));
    ensure!(hello.agent == AGENT_FREEBSD && hello.cpus_found == 1, "{hello:?}");
    let stats = ask!(&mut client, &vm, Stats(StatsOp {}));
    ensure!(
        stats.uptime_ns > 0 && stats.free_bytes > 0 && stats.free_bytes < stats.memory_bytes,
        "{stats:?}"
    );
    // Where FreeBSD runs here each byte of a serial port takes milliseconds.
    let serial = port == AgentPort::Serial;
    let echo = EchoOp { data: pattern(if serial { 800 } else { 20_000 }).into() };
    ensure!(ask!(&mut client, &vm, Echo(echo.clone())).data == echo.data);
    let many = AgentCallRequest {
        vm: vm.clone(),
        timeout_ms: 0,
        op: Some(agent_call_request::Op::Echo(EchoOp { data: pattern(30_000).into() })),
    };
    expect_status("more than the port holds", client.agent.call(many).await, &[Code::InvalidArgument])?;

    // Where it is found, what it is given, who it is.
    ensure!(says(&client, &vm, &["echo", "hello", "", "world"]).await? == "hello  world");
    ensure!(says(&client, &vm, &["/bin/pwd"]).await? == "/root");
    let with = ExecStart {
        env: [("A".into(), "b=c".into()), ("HOME".into(), "/nowhere".into())].into(),
        ..start(&vm, &["env"])
    };
    let left = Command::open(&client, with).await?.finish().await?;
    let mut variables: Vec<_> = std::str::from_utf8(&left.stdout)?.lines().collect();
    variables.sort_unstable();
    ensure!(variables.contains(&"A=b=c") && variables.contains(&"USER=root"), "{variables:?}");
    ensure!(
        variables.iter().filter(|variable| variable.starts_with("HOME=")).eq(&["HOME=/nowhere"]),
        "{variables:?}"
    );
    let as_user = ExecStart { user: "tester".into(), cwd: "/tmp".into(), ..start(&vm, &["id", "-G"]) };
    let left = Command::open(&client, as_user.clone()).await?.finish().await?;
    ensure!(left.stdout == b"1001 20 44\n", "{left:?}");
    let pwd = ExecStart { args: vec!["pwd".into()], ..as_user };
    Command::open(&client, pwd).await?.finish().await?.expect(0, "/tmp\n")?;
    run(&client, &vm, &["false"]).await?.expect(1, "")?;
    // What it left behind does not hold up its end.
    run(&client, &vm, &["fork"]).await?.expect(0, "left\n")?;

    let open = async |start| Command::open(&client, start).await.map(|_| ());
    expect_status("no such command", open(start(&vm, &["nothing"])).await, &[Code::NotFound])?;
    expect_status("no such file", open(start(&vm, &["/bin/nothing"])).await, &[Code::NotFound])?;
    expect_status("no program", open(start(&vm, &["/etc/passwd"])).await, &[Code::PermissionDenied])?;
    let nobody = ExecStart { user: "nobody-here".into(), ..start(&vm, &["echo"]) };
    expect_status("no such user", open(nobody).await, &[Code::NotFound])?;
    let nowhere = ExecStart { cwd: "/nowhere".into(), ..start(&vm, &["echo"]) };
    expect_status("no such folder", open(nowhere).await, &[Code::NotFound])?;

    // Both ways at once.
    let due = pattern(if serial { 6 << 10 } else { 256 << 10 });
    let mut cat = Command::open(&client, start(&vm, &["cat"])).await?;
    let requests = cat.requests.take().context("its requests")?;
    let bytes = due.clone();
    let writing = async {
        for piece in bytes.chunks(50_000) {
            let message = Some(exec_request::Message::Stdin(piece.to_vec().into()));
            requests.send(ExecRequest { message }).await?;
        }
        drop(requests);
        anyhow::Ok(())
    };
    let (left, written) = tokio::join!(cat.rest(), writing);
    written?;
    let left = left?;
    ensure!(left.how == How::Status(0) && left.stdout == due, "{} bytes: {:?}", left.stdout.len(), left.how);

    // A flood that nobody reads, one that is interrupted, one whose caller goes away.
    let flood = match serial {
        true => None,
        false => Some(Command::open(&client, start(&vm, &["yes"])).await?),
    };
    ensure!(says(&client, &vm, &["echo", "beside"]).await? == "beside");
    let mut sleep = Command::open(&client, start(&vm, &["sleep", "3600"])).await?;
    sleep.signal(2).await?;
    let left = sleep.rest().await?;
    ensure!(left.how == How::Signal(2), "{left:?}");
    drop(flood);
    expect_streams(&client, &vm, 0).await?;

    put(&client, &vm, "/tmp/data", 0o640, &due).await?;
    ensure!(get(&client, &vm, "/tmp/data").await? == (0o640, due), "other bytes than were written");
    put(&client, &vm, "/tmp/data", 0o644, b"short").await?;
    ensure!(says(&client, &vm, &["cat", "/tmp/data"]).await? == "short");
    expect_status("no such file", get(&client, &vm, "/tmp/nothing").await, &[Code::NotFound])?;
    expect_status("no folder", put(&client, &vm, "/no/where", 0o600, b"").await, &[Code::NotFound])?;
    expect_status("a folder", get(&client, &vm, "/tmp").await, &[Code::Internal])?;
    Ok(())
}

fn now_ns() -> anyhow::Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos().try_into()?)
}

/// Each clone is a machine of its own, for its kernel and for the commands in it.
async fn clones(stage: Stage, port: AgentPort) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, port).await?;
    let mut cat = Command::open(&client, start(&vm, &["cat"])).await?;
    cat.stdin(b"before").await?;
    ensure!(cat.stdout().await? == b"before");
    let _flood = match port {
        AgentPort::Serial => None,
        _ => Some(Command::open(&client, start(&vm, &["yes"])).await?),
    };
    put(&client, &vm, "/tmp/kept", 0o600, b"kept").await?;
    client.snapshot(&vm, "base").await.context("a snapshot of a guest at work")?;
    cat.stdin(b"after").await?;
    ensure!(cat.stdout().await? == b"after", "the command did not outlive the snapshot");

    let (mut randoms, mut uuids, mut ids, mut agents) =
        (HashSet::new(), HashSet::new(), HashSet::new(), HashSet::new());
    uuids.insert(says(&client, &vm, &["sysctl", "-n", "kern.hostuuid"]).await?);
    let asked = now_ns()?;
    let clones = client.clone_vms("base", CLONES, MemoryMode::Mapped, Identity::Managed).await?;
    for clone in &clones {
        let id = &clone.id;
        // Set to the time at which it was asked, some time after the request for it.
        let (time, after) = (ask!(&mut client, id, Time(TimeOp {})), now_ns()?);
        ensure!(
            (asked..=after + AHEAD_NS).contains(&time.wall_unix_ns),
            "{id}: its clock says {}, it was asked for at {asked}, now it is {after}",
            time.wall_unix_ns
        );
        let generation = ask!(&mut client, id, Generation(GenerationOp {}));
        ensure!(generation.generation == clone.generation && generation.count == 1, "{id}: {generation:?}");
        ensure!(ask!(&mut client, id, Stats(StatsOp {})).streams == 0, "{id}: commands of another VM");
        ensure!(
            agents.insert(ask!(&mut client, id, Random(RandomOp { bytes: 32 })).data),
            "{id}: random again"
        );
        ensure!(
            uuids.insert(says(&client, id, &["sysctl", "-n", "kern.hostuuid"]).await?),
            "{id}: its host's id"
        );
        ensure!(
            ids.insert(says(&client, id, &["sysctl", "-n", "kern.hostid"]).await?),
            "{id}: its host's number"
        );
        run(&client, id, &["cat", "/tmp/kept"]).await?.expect(0, "kept")?;
        put(&client, id, "/tmp/kept", 0o600, id.as_bytes()).await?;
    }
    for clone in &clones {
        let left = run(&client, &clone.id, &["head", "-c", "32", "/dev/random"]).await?;
        ensure!(left.stdout.len() == 32 && randoms.insert(left.stdout), "{}: /dev/random again", clone.id);
        run(&client, &clone.id, &["cat", "/tmp/kept"]).await?.expect(0, &clone.id)?;
    }
    drop(cat.finish().await?);
    Ok(())
}
