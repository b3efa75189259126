//! What a client that knows nothing of coldspark finds: the standard health service, and reflection.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, bail, ensure};
use libtest_mimic::Trial;
use prost::Message as _;
use prost_types::FileDescriptorProto;
use tokio::process::Command;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::daemon::{Daemon, connect, eventually};
use crate::host::{Need, PYTHON};
use crate::trial::{Stage, trial};

const SERVICES: [&str; 8] = [
    "ImageService",
    "VmService",
    "SnapshotService",
    "AgentService",
    "PoolService",
    "FunctionService",
    "EventService",
    "MetricsService",
];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("stock-client/health-and-reflection", &[], 30, health_and_reflection),
        trial("stock-client/python", &[Need::Kvm, Need::PythonGrpc], 180, python),
    ]
}

async fn health_and_reflection(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let channel = connect(&daemon.socket()).await?;

    let mut health = HealthClient::new(channel.clone());
    for service in SERVICES.iter().map(|name| format!("coldspark.v1.{name}")).chain([String::new()]) {
        let answer = health
            .check(HealthCheckRequest { service: service.clone() })
            .await
            .with_context(|| format!("health of {service:?}"))?;
        ensure!(answer.into_inner().status() == ServingStatus::Serving, "{service:?} does not serve");
    }
    let unknown = health.check(HealthCheckRequest { service: "coldspark.v1.Nobody".into() }).await;
    ensure!(unknown.err().map(|status| status.code()) == Some(tonic::Code::NotFound));

    let mut reflection = ServerReflectionClient::new(channel);
    let ask = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let requests = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("coldspark.v1.VmService".into())),
    ];
    let mut answers = reflection.server_reflection_info(tokio_stream::iter(requests)).await?.into_inner();
    let mut next = async || -> anyhow::Result<MessageResponse> {
        let answer = answers.message().await?.context("reflection ended early")?;
        answer.message_response.context("an empty answer")
    };
    let MessageResponse::ListServicesResponse(list) = next().await? else { bail!("no list of services") };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for service in SERVICES {
        ensure!(names.contains(&format!("coldspark.v1.{service}").as_str()), "{service} is not in {names:?}");
    }
    let MessageResponse::FileDescriptorResponse(files) = next().await? else {
        bail!("no file for VmService")
    };
    let file = files.file_descriptor_proto.first().context("no file")?;
    let file = FileDescriptorProto::decode(&file[..])?;
    let methods: Vec<&str> = file
        .service
        .iter()
        .filter(|service| service.name() == "VmService")
        .flat_map(|service| service.method.iter().map(|method| method.name()))
        .collect();
    for method in ["CreateVm", "CloneVm", "ListVms", "DeleteVm"] {
        ensure!(methods.contains(&method), "{method} is not in {methods:?}");
    }
    Ok(())
}

/// tests/python/stock_client.py, with what protoc makes of our .proto files.
async fn python(stage: Stage) -> anyhow::Result<()> {
    let daemon = Daemon::start(&stage).await?;
    let made = tempfile::tempdir()?;
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = top.join("proto");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(proto.join("coldspark/v1"))? {
        files.push(entry?.path());
    }
    let mut protoc = Command::new("protoc");
    protoc
        .arg("-I")
        .arg(&proto)
        .arg("--python_out")
        .arg(made.path())
        .arg("--grpc_python_out")
        .arg(made.path());
    run(protoc.arg("--plugin=protoc-gen-grpc_python=/usr/bin/grpc_python_plugin").args(&files)).await?;
    let mut script = Command::new(PYTHON);
    script.env("PYTHONPATH", made.path()).arg(top.join("tests/python/stock_client.py")).arg(daemon.socket());
    let said = run(&mut script).await?;
    ensure!(said.trim() == "all good", "{said}");
    // The last call was given up by its deadline.
    let mut client = daemon.client().await?;
    eventually("no VM is left", 30, async || Ok(client.list_vms().await?.is_empty())).await
}

/// Runs a program to its end; what it said, or an error with that.
async fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.kill_on_drop(true).stdin(Stdio::null()).output().await?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    Ok(out.into_owned())
}
