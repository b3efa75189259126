//! What a client that knows nothing of coldspark finds: the standard health service, and reflection.

use anyhow::{Context as _, bail, ensure};
use libtest_mimic::Trial;
use prost::Message as _;
use prost_types::FileDescriptorProto;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::daemon::{Daemon, connect};
use crate::trial::{Stage, trial};

const SERVICES: [&str; 4] = ["ImageService", "VmService", "SnapshotService", "AgentService"];

pub fn trials() -> Vec<Trial> {
    vec![trial("stock-client/health-and-reflection", &[], 30, health_and_reflection)]
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
