//! The agent in a real FreeBSD: its hello is the ready point; commands, files, snapshots; clones that are other machines, with random numbers
//! and addresses of their own.

mod addresses;

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
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
use crate::trial::{Stage, limit, trial};

const NEEDS: &[Need] = &[Need::Kvm, Need::KernelMode, Need::FreeBsdAgent];
const CLONES: u32 = 3;
/// Clones whose random numbers are compared.
const CLONES_COMPARED: u32 = 12;
/// The setting that the agent changes for a moment.
const POOL_BYTES: &str = "kern.random.fortuna.minpoolsize";
/// HELLO's number of the FreeBSD agent.
const AGENT_FREEBSD: u32 = 2;
/// How much faster than this machine's clock a clone's may have gone since it was set.
const AHEAD_NS: u64 = 5_000_000;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("freebsd/agent/commands", NEEDS, 120, |stage| commands(stage, AgentPort::Virtio)),
        trial("freebsd/agent/clones", NEEDS, 120, |stage| clones(stage, AgentPort::Virtio)),
        trial("freebsd/agent/entropy", NEEDS, 120, |stage| entropy(stage, 1)),
        trial("freebsd/agent/entropy/4-vcpu", NEEDS, 180, |stage| entropy(stage, 4)),
        trial("freebsd/agent/killed", NEEDS, 120, killed),
        trial("freebsd/agent/serial-port/commands", NEEDS, 300, |stage| commands(stage, AgentPort::Serial)),
        trial("freebsd/agent/serial-port/clones", NEEDS, 300, |stage| clones(stage, AgentPort::Serial)),
    ];
    trials.extend(addresses::trials());
    trials
}

/// A machine with the agent in it.
struct Machine {
    kernel: PathBuf,
    disk: PathBuf,
    port: AgentPort,
    vcpus: u32,
    networks: Vec<NetworkInterface>,
}

impl Machine {
    /// With the user's kernel, one processor and no network.
    fn usual(port: AgentPort) -> anyhow::Result<Machine> {
        let (kernel, disk) = host::freebsd_agent().map_err(anyhow::Error::msg)?;
        Ok(Machine { kernel, disk, port, vcpus: 1, networks: vec![] })
    }

    /// Boots it up to the agent's hello.
    async fn boot(self, client: &mut Client) -> anyhow::Result<String> {
        let spec = ImageSpec {
            name: "freebsd".into(),
            disks: vec![DiskSettings { read_only: false, ..Default::default() }],
            boot: Some(BootSettings {
                protocol: BootProtocol::Freebsd.into(),
                hardware: Hardware::Unspecified.into(),
                command_line: environment(),
                vcpus: self.vcpus,
                memory_bytes: 256 << 20,
                ready: Some(ReadyPoint { at: Some(At::AgentHello(true)) }),
                agent_port: self.port.into(),
            }),
            ..Default::default()
        };
        let files = ImageFiles {
            kernel: Some(fs::read(self.kernel)?),
            disks: vec![fs::read(self.disk)?],
            ..Default::default()
        };
        client.import(spec, files).await?;
        let source = Some(Source::Image("freebsd".into()));
        let mut request = CreateVmRequest { source, networks: self.networks, ..Default::default() };
        if self.vcpus > 1 {
            // One processor of the rig is all of them; while a guest starts they wait for each other, each for its turn.
            request.ready_timeout_ms = limit(60).as_millis().try_into()?;
        }
        Ok(client.boot(request).await?.vm.id)
    }
}

/// Boots the usual one.
async fn boot(client: &mut Client, port: AgentPort) -> anyhow::Result<String> {
    Machine::usual(port)?.boot(client).await
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

/// Bytes of the system's generator.
async fn random(client: &Client, vm: &str) -> anyhow::Result<Vec<u8>> {
    let left = run(client, vm, &["head", "-c", "32", "/dev/random"]).await?;
    ensure!(left.how == How::Status(0) && left.stdout.len() == 32, "{vm}: {left:?}");
    Ok(left.stdout)
}

/// What the kernel of a clone first gives is its own. Clones that are told nothing, and whose kernel may not draw by itself, say what it would give
/// otherwise: all the same.
async fn entropy(stage: Stage, vcpus: u32) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = Machine { vcpus, ..Machine::usual(AgentPort::Virtio)? }.boot(&mut client).await?;
    let hello = ask!(&mut client, &vm, Hello(HelloOp {}));
    ensure!(hello.cpus_found == vcpus, "{hello:?}");
    // So that nothing is drawn on.
    put(&client, &vm, "/tmp/never", 0o755, &setting(POOL_BYTES, 0x7fff_0000)).await?;
    // Has it draw, so that it must not again for the tenth of a second in which the snapshot is asked for.
    random(&client, &vm).await?;
    run(&client, &vm, &["/tmp/never"]).await?.expect(0, "")?;
    let pool_bytes = 0x7fff_0000u32.to_string();
    client.snapshot(&vm, "base").await?;
    ensure!(
        says(&client, &vm, &["sysctl", "-n", POOL_BYTES]).await? == pool_bytes,
        "the source's generator is not as it was"
    );
    let untold = client.clone_vms("base", 2, MemoryMode::Mapped, Identity::Unmanaged).await?;
    let mut same = Vec::new();
    for clone in &untold {
        ensure!(clone.guest_entropy() == GuestEntropy::Unspecified, "{clone:?}");
        same.push(random(&client, &clone.id).await?);
        let own = says(&client, &clone.id, &["sysctl", "-n", POOL_BYTES]).await?;
        ensure!(own == pool_bytes, "{}: a clone that may not draw on what it gathers: {own}", clone.id);
        client.delete_vm(&clone.id).await?;
    }
    ensure!(same[0] == same[1], "clones that were told nothing differ: this trial could not tell");

    let mut seen = HashSet::from([same.remove(0)]);
    let mut took = Vec::new();
    for _ in 0..CLONES_COMPARED {
        let clones = client.clone_vms("base", 1, MemoryMode::Mapped, Identity::Managed).await?;
        let clone = clones.first().context("a clone")?;
        ensure!(clone.guest_entropy() == GuestEntropy::Drawn, "{clone:?}");
        let identity = clone.steps.iter().find(|step| step.name == "identity").context("a step")?;
        took.push(identity.us);
        ensure!(seen.insert(random(&client, &clone.id).await?), "{}: bytes of another clone", clone.id);
        ensure!(says(&client, &clone.id, &["sysctl", "-n", POOL_BYTES]).await? == pool_bytes, "{}", clone.id);
        client.delete_vm(&clone.id).await?;
    }
    took.sort_unstable();
    let line = format!("identity of {CLONES_COMPARED} clones, us: {took:?}");
    println!("  freebsd/agent/entropy, {vcpus} vCPUs: {line}");
    fs::write(stage.logs.join("entropy.txt"), line)?;
    Ok(())
}

/// A FreeBSD program that ends the one that started it, by SIGKILL: getppid, kill, exit.
fn killer() -> Vec<u8> {
    program(&[
        0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x89, 0xc7, 0xbe, 9, 0, 0, 0, 0xb8, 37, 0, 0, 0, 0x0f, 0x05, 0x31,
        0xff, 0xb8, 1, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b,
    ])
}

/// One that gives a setting of the kernel's this value: sysctl for the name's numbers, sysctl with them, and exit with the error.
fn setting(name: &str, value: u32) -> Vec<u8> {
    const LOOK_UP: &[u8] = &[
        0x48, 0x81, 0xec, 0x00, 0x01, 0x00, 0x00, 0xc7, 0x84, 0x24, 0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0xc7, 0x84, 0x24, 0x84, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x48, 0xc7, 0x84, 0x24, 0x88,
        0x00, 0x00, 0x00, 0x60, 0x00, 0x00, 0x00, 0x48, 0x8d, 0xbc, 0x24, 0x80, 0x00, 0x00, 0x00, 0xbe, 0x02,
        0x00, 0x00, 0x00, 0x48, 0x89, 0xe2, 0x4c, 0x8d, 0x94, 0x24, 0x88, 0x00, 0x00, 0x00, 0x4c, 0x8d, 0x05,
        0x50, 0x00, 0x00, 0x00, 0x41, 0xb9,
    ];
    // With the name's length before it, and the value behind.
    const CALL: &[u8] =
        &[0xb8, 0xca, 0x00, 0x00, 0x00, 0x0f, 0x05, 0x72, 0x38, 0xc7, 0x84, 0x24, 0x90, 0x00, 0x00, 0x00];
    const SET: &[u8] = &[
        0x48, 0x89, 0xe7, 0x48, 0x8b, 0xb4, 0x24, 0x88, 0x00, 0x00, 0x00, 0x48, 0xc1, 0xee, 0x02, 0x31, 0xd2,
        0x45, 0x31, 0xd2, 0x4c, 0x8d, 0x84, 0x24, 0x90, 0x00, 0x00, 0x00, 0x41, 0xb9, 0x04, 0x00, 0x00, 0x00,
        0xb8, 0xca, 0x00, 0x00, 0x00, 0x0f, 0x05, 0x72, 0x02, 0x31, 0xc0, 0x89, 0xc7, 0xb8, 0x01, 0x00, 0x00,
        0x00, 0x0f, 0x05,
    ];
    let length = (name.len() as u32).to_le_bytes();
    program(&[LOOK_UP, &length, CALL, &value.to_le_bytes(), SET, name.as_bytes()].concat())
}

/// ELF header, one segment, and its code.
fn program(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    let mut elf = b"\x7fELF\x02\x01\x01\x09\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [AT + 120, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, AT, AT, 120 + code.len() as u64, 120 + code.len() as u64, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// An agent that is killed while it says much is started again, and spoken with as if nothing had been.
async fn killed(stage: Stage) -> anyhow::Result<()> {
    const ROUNDS: usize = 6;
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let vm = boot(&mut client, AgentPort::Virtio).await?;
    put(&client, &vm, "/tmp/end", 0o755, &killer()).await?;
    for round in 0..ROUNDS {
        let mut floods = Vec::new();
        for _ in 0..3 {
            let mut flood = Command::open(&client, start(&vm, &["yes"])).await?;
            flood.stdout().await?;
            floods.push(tokio::spawn(async move { while flood.stdout().await.is_ok() {} }));
        }
        // Its own end is told, or not any more.
        let _ = run(&client, &vm, &["/tmp/end"]).await;
        for flood in floods {
            flood.await?;
        }
        eventually(&format!("another agent, after {} killed", round + 1), 60, async || {
            Ok(matches!(run(&client, &vm, &["echo", "back"]).await, Ok(left) if left.stdout == b"back\n"))
        })
        .await?;
    }
    // Clones and all else go on as well.
    client.snapshot(&vm, "base").await?;
    let clones = client.clone_vms("base", 1, MemoryMode::Mapped, Identity::Managed).await?;
    ensure!(clones[0].guest_entropy() == GuestEntropy::Drawn, "{clones:?}");
    run(&client, &clones[0].id, &["echo", "here"]).await?.expect(0, "here\n")
}
