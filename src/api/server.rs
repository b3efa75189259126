//! The service: every service of ours, health, and reflection, behind the guard.

use std::future::{self, Future};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::MESSAGE_BYTES_MAX;
use super::agent::Agent;
use super::auth::layer::GuardLayer;
use super::cut_off::CutOffLayer;
use super::events::Events;
use super::functions::Functions;
use super::images::Images;
use super::listen::Listeners;
use super::measure::MeasureLayer;
use super::metrics::Metrics;
use super::pools::Pools;
use super::proto::DESCRIPTORS;
use super::proto::agent_service_server::AgentServiceServer;
use super::proto::event_service_server::EventServiceServer;
use super::proto::function_service_server::FunctionServiceServer;
use super::proto::image_service_server::ImageServiceServer;
use super::proto::metrics_service_server::MetricsServiceServer;
use super::proto::pool_service_server::PoolServiceServer;
use super::proto::snapshot_service_server::SnapshotServiceServer;
use super::proto::vm_service_server::VmServiceServer;
use super::scrape;
use super::snapshots::Snapshots;
use super::vms::Vms;
use crate::fleet::Fleet;

/// Requests under way on one connection.
const REQUESTS_MAX: u32 = 256;

/// Connections that were accepted and not yet served.
const ACCEPTED_MAX: usize = 16;

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("another coldspark service answers at {}; use it, stop it, or choose another --socket", .0.display())]
    Taken(PathBuf),
    #[error("{} exists and is no socket; choose another --socket", .0.display())]
    NoSocket(PathBuf),
    #[error("cannot listen at {}: {source}; is the folder there and yours?", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("others may change what is in {}, and could put a socket of theirs in the service's place; choose another --socket, or `chmod go-w` it", .0.display())]
    Folder(PathBuf),
    #[error("cannot listen at {address}: {source}; choose another --listen")]
    Port { address: SocketAddr, source: io::Error },
    #[error("metrics cannot be given at {address}: {source}; choose another --metrics")]
    Metrics { address: SocketAddr, source: io::Error },
    #[error("the service failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("reflection cannot be offered: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `shutdown`, then lets the calls under way end. The fleet is not closed by this.
pub async fn serve(
    fleet: Arc<Fleet>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ImageServiceServer<Images>>().await;
    health.set_serving::<VmServiceServer<Vms>>().await;
    health.set_serving::<SnapshotServiceServer<Snapshots>>().await;
    health.set_serving::<AgentServiceServer<Agent>>().await;
    health.set_serving::<PoolServiceServer<Pools>>().await;
    health.set_serving::<FunctionServiceServer<Functions>>().await;
    health.set_serving::<EventServiceServer<Events>>().await;
    health.set_serving::<MetricsServiceServer<Metrics>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (incoming, connections) = mpsc::channel(ACCEPTED_MAX);
    let serving = Server::builder()
        .http2_keepalive_interval(None)
        .max_concurrent_streams(REQUESTS_MAX)
        .layer(MeasureLayer)
        .layer(GuardLayer(Arc::clone(&listeners.guard)))
        .layer(CutOffLayer)
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(
            ImageServiceServer::new(Images::new(Arc::clone(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            VmServiceServer::new(Vms::new(Arc::clone(&fleet))).max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            SnapshotServiceServer::new(Snapshots::new(Arc::clone(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            PoolServiceServer::new(Pools::new(Arc::clone(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            FunctionServiceServer::new(Functions::new(Arc::clone(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            EventServiceServer::new(Events::new(Arc::clone(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            MetricsServiceServer::new(Metrics::new(scrape::exposition(&fleet)))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(AgentServiceServer::new(Agent::new(fleet)).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), shutdown);
    let accepting = async {
        listeners.accept(incoming).await;
        future::pending::<()>().await;
    };
    // The socket's file goes with `accepting`, when the last call has ended.
    tokio::select! {
        result = serving => Ok(result?),
        () = accepting => Ok(()),
    }
}
