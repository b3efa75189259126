//! What the service tells of itself: metrics over HTTP and gRPC, and in `coldspark top`; traces to a collector.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, ensure};
use coldspark::api::proto::*;
use coldspark::telemetry::exposition::{Sample, Samples};
use libtest_mimic::Trial;
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;

use crate::client::Client;
use crate::daemon::{Daemon, eventually, program};
use crate::host::Need;
use crate::trial::{Stage, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("seeing/metrics", &[Need::Kvm, Need::Userfault], 120, metrics),
        trial("seeing/metrics-endpoint", &[], 60, endpoint),
        trial("seeing/traces", &[Need::Kvm], 120, traces),
        trial("seeing/top", &[Need::Kvm], 120, top),
    ]
}

/// The address that a service gives metrics at, as it logs it.
async fn address(daemon: &Daemon) -> anyhow::Result<SocketAddr> {
    let mut found = None;
    eventually("the service gives metrics", 30, async || {
        let log = daemon.log()?;
        let line = log.lines().find(|line| line.contains("giving metrics"));
        found = line.and_then(|line| line.split("address=").nth(1)?.trim().parse().ok());
        Ok(found.is_some())
    })
    .await?;
    found.context("an address")
}

/// Sends this, and gives all that is answered.
async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, said: &str) -> anyhow::Result<String> {
    stream.write_all(said.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    exchange(TcpStream::connect(address).await?, &format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")).await
}

/// Scrapes as Prometheus would.
async fn scrape(address: SocketAddr) -> anyhow::Result<Samples> {
    let answer = get(address, "/metrics").await?;
    let (head, text) = answer.split_once("\r\n\r\n").context("no head")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    ensure!(head.to_ascii_lowercase().contains("content-type: application/openmetrics-text"), "{head}");
    ensure!(text.ends_with("# EOF\n"), "not whole: {text}");
    Ok(Samples::read(text)?)
}

fn has<'a>(label: &'a str, value: &'a str) -> impl Fn(&Sample) -> bool + 'a {
    move |sample| sample.label(label) == value
}

async fn metrics(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start_with(&stage, &["--metrics".into(), "127.0.0.1:0".into()]).await?;
    let address = address(&daemon).await?;
    let mut client = daemon.client().await?;
    let before = scrape(address).await?;
    ensure!(before.value("coldspark_restore_seconds_count") == 0.0);
    ensure!(before.value("coldspark_vms_limit") == 1024.0);
    ensure!(before.value("coldspark_build_info") == 1.0);
    ensure!(before.value("coldspark_host_memory_available_bytes") > 0.0);

    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "seen").await?;
    client.delete_vm(&source.id).await?;
    let mut clones = Vec::new();
    for mode in [MemoryMode::Mapped, MemoryMode::Mapped, MemoryMode::Userfault] {
        clones.extend(client.clone_vms("seen", 1, mode, Identity::Managed).await?);
    }
    client.vm("vm-there-is-none").await.err().context("found what is not there")?;
    let pool = CreatePoolRequest {
        name: "seen".into(),
        snapshot: "seen".into(),
        mode: PoolMode::Shell.into(),
        min_ready: Some(1),
        max: 4,
        ..Default::default()
    };
    client.pools.create_pool(pool).await?;
    eventually("the pool is ready", 30, async || {
        Ok(scrape(address).await?.sum("coldspark_pool_ready", has("pool", "seen")) >= 1.0)
    })
    .await?;
    let taken = client.pools.take_vm(TakeVmRequest { pool: "seen".into(), ..Default::default() }).await?;
    let taken = taken.into_inner();
    ensure!(taken.was_ready);

    let after = scrape(address).await?;
    let restores = |samples: &Samples, mode: &str| {
        samples.sum("coldspark_restore_seconds_count", |sample| {
            sample.label("snapshot") == "seen" && sample.label("mode") == mode
        })
    };
    // The two and the pool's.
    ensure!(restores(&after, "mapped") == 3.0, "{after:?}");
    ensure!(restores(&after, "userfault") == 1.0);
    let buckets = after.histogram("coldspark_restore_seconds", has("snapshot", "seen"));
    ensure!(buckets.count() == 4.0, "the last bucket has all");
    ensure!(buckets.quantile(0.5).is_some_and(|seconds| seconds > 0.0));
    for step in ["shell", "prepare", "restore", "identity"] {
        let count = after.sum("coldspark_restore_step_seconds_count", has("step", step));
        ensure!(count >= 3.0, "{step}: {count}");
    }
    ensure!(after.value("coldspark_boot_seconds_count") == 1.0);
    ensure!(after.value("coldspark_destroy_seconds_count") == 1.0);
    ensure!(after.value("coldspark_snapshot_pause_seconds_count") == 1.0);
    ensure!(after.sum("coldspark_vms", has("state", "running")) == 4.0);
    ensure!(after.sum("coldspark_errors_total", has("reason", "VM_NOT_FOUND")) == 1.0);
    ensure!(after.value("coldspark_identity_failures_total") == 0.0);
    ensure!(after.sum("coldspark_page_faults_total", has("mode", "userfault")) > 0.0);
    ensure!(after.sum("coldspark_pool_taken_total", has("pool", "seen")) == 1.0);
    ensure!(after.sum("coldspark_pool_missed_total", has("pool", "seen")) == 0.0);
    let requests = |method: &str, code: &str| {
        after.sum("coldspark_grpc_requests_total", |sample| {
            sample.label("method") == format!("coldspark.v1.VmService/{method}")
                && sample.label("code") == code
        })
    };
    ensure!(requests("CloneVm", "OK") == 3.0, "{}", requests("CloneVm", "OK"));
    ensure!(requests("GetVm", "NOT_FOUND") == 1.0);
    // A stream ends with its trailers.
    ensure!(requests("CreateVm", "OK") == 1.0);

    // One whose worker dies, one that is deleted.
    let killed = clones.pop().context("a clone")?;
    kill_worker(&daemon, &mut client, &killed).await?;
    eventually("the worker's death is counted", 30, async || {
        Ok(scrape(address).await?.sum("coldspark_vm_ends_total", has("how", "worker")) == 1.0)
    })
    .await?;

    // The same by gRPC; and the series of what is deleted end.
    client.pools.delete_pool(DeletePoolRequest { pool: "seen".into() }).await?;
    client.snapshots.delete_snapshot(DeleteSnapshotRequest { snapshot: "seen".into() }).await?;
    let text = client.metrics().await?;
    let last = Samples::read(&text)?;
    ensure!(last.of("coldspark_pool_ready").next().is_none());
    ensure!(!last.of("coldspark_restore_seconds_count").any(|sample| sample.label("snapshot") == "seen"));
    ensure!(last.value("coldspark_boot_seconds_count") == 1.0);
    Ok(())
}

/// Kills the process of a VM, as the kernel would for want of memory.
async fn kill_worker(daemon: &Daemon, client: &mut Client, vm: &Vm) -> anyhow::Result<()> {
    let pid = i32::try_from(client.vm(&vm.id).await?.worker_pid)?;
    let process = daemon.processes().into_iter().find(|process| process.pid == pid).context("its process")?;
    process.kill();
    Ok(())
}

async fn endpoint(stage: Stage) -> anyhow::Result<()> {
    // Refused at the start.
    let folder = tempfile::tempdir()?;
    let refused = |arguments: &[&str], words: &str| -> anyhow::Result<()> {
        let mut command = Command::new(program());
        command.args(["serve", "--data-dir"]).arg(folder.path()).arg("--socket").arg(folder.path().join("s"));
        let output = command.args(arguments).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains(words), "{arguments:?}: {said}");
        Ok(())
    };
    refused(&["--metrics", "0.0.0.0:0"], "--metrics-insecure")?;
    refused(&["--metrics", "[::]:0"], "--metrics-insecure")?;
    refused(&["--metrics-insecure"], "add --metrics")?;
    refused(&["--metrics", "localhost"], "ADDRESS:PORT")?;

    // Let in: whoever says so, and on a socket.
    let socket = folder.path().join("metrics.sock");
    let daemon = Daemon::start_with(&stage, &["--metrics".into(), socket.display().to_string()]).await?;
    eventually("the socket is there", 30, async || Ok(Path::new(&socket).exists())).await?;
    let request = "GET /metrics HTTP/1.0\r\n\r\n";
    ensure!(
        exchange(UnixStream::connect(&socket).await?, request).await?.contains("coldspark_vms_limit 1024")
    );
    let log = daemon.log()?;
    ensure!(!log.contains('\x1b'), "colours in a log that is a file: {log:?}");
    drop(daemon);

    let arguments = ["--metrics", "0.0.0.0:0", "--metrics-insecure"].map(str::to_owned);
    let daemon = Daemon::start_with(&stage, &arguments).await?;
    let mut address = address(&daemon).await?;
    address.set_ip([127, 0, 0, 1].into());
    scrape(address).await?;

    // What is no scrape.
    ensure!(get(address, "/").await?.starts_with("HTTP/1.1 404"));
    let post = "POST /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n";
    ensure!(exchange(TcpStream::connect(address).await?, post).await?.starts_with("HTTP/1.1 405"));
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    let answer = exchange(TcpStream::connect(address).await?, &long).await.unwrap_or_default();
    ensure!(!answer.contains("200 OK"), "a head of 64 KiB was taken");

    // Those who say nothing take all places, and are shown out: then the next one gets in.
    let mut silent = Vec::new();
    for _ in 0..16 {
        silent.push(TcpStream::connect(address).await?);
    }
    eventually("there is room again", 30, async || Ok(scrape(address).await.is_ok())).await?;
    for mut stream in silent {
        let mut left = Vec::new();
        // Closed, by a reset or not.
        let _ = stream.read_to_end(&mut left).await;
        ensure!(!String::from_utf8_lossy(&left).contains("200 OK"));
    }
    Ok(())
}

// === top ===

/// Runs `coldspark top` as a user would.
fn run_top(socket: &Path, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(program());
    command.arg("top").args(arguments).arg("--socket").arg(socket).stdin(Stdio::null());
    Ok(command.output()?)
}

async fn top(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "watched").await?;
    client.delete_vm(&source.id).await?;

    // It looks while clones are made.
    let socket = daemon.socket();
    let looking = {
        let socket = socket.clone();
        tokio::task::spawn_blocking(move || run_top(&socket, &["--once", "--json", "--interval", "3s"]))
    };
    let mut clones = 0;
    while !looking.is_finished() {
        let made = client.clone_vms("watched", 1, MemoryMode::Mapped, Identity::Managed).await?;
        for vm in made {
            client.delete_vm(&vm.id).await?;
        }
        clones += 1;
    }
    ensure!(clones > 0);
    let output = looking.await??;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seen: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let number = |pointer: &str| seen.pointer(pointer).and_then(serde_json::Value::as_f64);
    ensure!(number("/clones/per_s").is_some_and(|rate| rate > 0.0), "{seen}");
    let (p50, p99) = (number("/clones/p50_ms"), number("/clones/p99_ms"));
    ensure!(p50.is_some() && p50 <= p99, "{seen}");
    ensure!(number("/deletions/per_s").is_some_and(|rate| rate > 0.0), "{seen}");
    ensure!(
        seen.pointer("/snapshots/0/name").and_then(serde_json::Value::as_str) == Some("watched"),
        "{seen}"
    );
    ensure!(number("/vms/limit") == Some(1024.0), "{seen}");

    // For people; nothing is done meanwhile.
    let output = run_top(&socket, &["--once", "--interval", "200ms"])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && text.contains("no clones") && text.contains("watched"), "{text}");
    // Not into a file.
    let output = run_top(&socket, &[])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("--once"), "{said}");
    ensure!(output.stdout.is_empty(), "escape sequences went into a file");
    Ok(())
}

// === traces ===

/// A collector: takes what is posted, one request a connection, and gives the spans.
async fn collect(listener: TcpListener, spans: mpsc::Sender<Vec<trace_v1::Span>>) -> anyhow::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        let mut said = Vec::new();
        let (head, body) = loop {
            ensure!(stream.read_buf(&mut said).await? > 0, "the exporter hung up");
            let Some(end) = said.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = String::from_utf8(said[..end].to_vec())?.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.context("no length")?.trim().parse()?;
            if said.len() >= end + 4 + length {
                break (head, said[end + 4..].to_vec());
            }
        };
        ensure!(head.starts_with("post /v1/traces http/1.1"), "{head}");
        ensure!(head.contains("content-type: application/x-protobuf"), "{head}");
        let request = trace_v1::ExportTraceServiceRequest::decode(&body[..])?;
        for resource in request.resource_spans {
            for scope in resource.scope_spans {
                spans.send(scope.spans).await?;
            }
        }
        // When it has this it may end.
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
    }
}

/// As much of opentelemetry.proto.trace.v1 as is looked at.
mod trace_v1 {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ExportTraceServiceRequest {
        #[prost(message, repeated, tag = "1")]
        pub resource_spans: Vec<ResourceSpans>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ResourceSpans {
        #[prost(message, repeated, tag = "2")]
        pub scope_spans: Vec<ScopeSpans>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ScopeSpans {
        #[prost(message, repeated, tag = "2")]
        pub spans: Vec<Span>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Span {
        #[prost(bytes = "vec", tag = "1")]
        pub trace_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub span_id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        pub parent_span_id: Vec<u8>,
        #[prost(string, tag = "5")]
        pub name: String,
        #[prost(fixed64, tag = "7")]
        pub start_time_unix_nano: u64,
        #[prost(fixed64, tag = "8")]
        pub end_time_unix_nano: u64,
    }
}

async fn traces(stage: Stage) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let collector = format!("http://{}", listener.local_addr()?);
    let (sent, mut received) = mpsc::channel(256);
    let collecting = tokio::spawn(collect(listener, sent));
    let mut daemon = Daemon::start_with(&stage, &["--otlp".into(), collector]).await?;
    let mut client = daemon.client().await?;
    let source = client.boot_embedded(64 << 20).await?;
    client.snapshot(&source.id, "traced").await?;

    // A caller that is traced itself.
    let (trace_id, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let mut request = tonic::Request::new(CloneVmRequest {
        snapshot: "traced".into(),
        count: 2,
        identity: Identity::Managed.into(),
        ..Default::default()
    });
    request.metadata_mut().insert("traceparent", format!("00-{trace_id}-{parent}-01").parse()?);
    client.vms.clone_vm(request).await?;
    // One that wants no trace.
    let unwanted = "0af7651916cd43dd8448eb211c80319c";
    let mut request = tonic::Request::new(ListVmsRequest::default());
    request.metadata_mut().insert("traceparent", format!("00-{unwanted}-{parent}-00").parse()?);
    client.vms.list_vms(request).await?;
    // What is left is sent at the end.
    ensure!(daemon.stop().await?.success());
    collecting.abort();
    if let Ok(Err(error)) = collecting.await {
        return Err(error);
    }
    let mut spans = Vec::new();
    while let Ok(more) = received.try_recv() {
        spans.extend(more);
    }

    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    ensure!(!spans.iter().any(|span| hex(&span.trace_id) == unwanted), "a span that nobody wanted");
    let boot = spans.iter().find(|span| span.name == "boot").context("no boot")?;
    let created = spans.iter().find(|span| span.span_id == boot.parent_span_id).context("its request")?;
    ensure!(created.name == "coldspark.v1.VmService/CreateVm", "{created:?}");
    let mine: Vec<_> = spans.iter().filter(|span| hex(&span.trace_id) == trace_id).collect();
    let inside = |span: &trace_v1::Span| -> Vec<&trace_v1::Span> {
        mine.iter().filter(|inner| inner.parent_span_id == span.span_id).copied().collect()
    };
    let request =
        mine.iter().find(|span| span.name == "coldspark.v1.VmService/CloneVm").context("no request")?;
    ensure!(hex(&request.parent_span_id) == parent, "it is the caller's");
    let clones = inside(request);
    ensure!(clones.len() == 2 && clones.iter().all(|span| span.name == "clone"), "{clones:?}");
    for clone in clones {
        let steps = inside(clone);
        for name in ["shell", "prepare", "restore", "identity"] {
            let step =
                steps.iter().find(|span| span.name == name).with_context(|| format!("no step {name}"))?;
            ensure!(
                clone.start_time_unix_nano <= step.start_time_unix_nano,
                "{step:?} begins before {clone:?}"
            );
            // Steps are whole microseconds.
            ensure!(
                step.end_time_unix_nano <= clone.end_time_unix_nano + 10_000,
                "{step:?} ends after {clone:?}"
            );
        }
        let restore = steps.iter().find(|span| span.name == "restore").context("restore")?;
        ensure!(!inside(restore).is_empty(), "no steps of the worker");
    }
    Ok(())
}
