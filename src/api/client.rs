//! Connecting to a service's Unix socket.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::MESSAGE_BYTES_MAX;
use super::proto::agent_service_client::AgentServiceClient;
use super::proto::image_service_client::ImageServiceClient;
use super::proto::snapshot_service_client::SnapshotServiceClient;
use super::proto::vm_service_client::VmServiceClient;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("no coldspark service at {}: {reason}; start one with `coldspark serve`, or name its socket with --socket", path.display())]
pub struct ConnectError {
    path: PathBuf,
    reason: String,
}

/// A client of every service, over one connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    pub images: ImageServiceClient<Channel>,
    pub vms: VmServiceClient<Channel>,
    pub snapshots: SnapshotServiceClient<Channel>,
    pub agent: AgentServiceClient<Channel>,
}

/// Connects a channel to the service at `socket`; for services of other packages (health, reflection) too.
pub async fn channel(socket: &Path) -> Result<Channel, ConnectError> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let failed = |error: tonic::transport::Error| {
        let mut reason: &dyn std::error::Error = &error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        ConnectError { path: socket.to_owned(), reason: reason.to_string() }
    };
    // The address is never looked at: the connector knows the way.
    Endpoint::from_static("http://coldspark.invalid")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_with_connector(connector)
        .await
        .map_err(failed)
}

/// Connects to the service at `socket`.
pub async fn connect(socket: &Path) -> Result<Client, ConnectError> {
    let channel = channel(socket).await?;
    Ok(Client {
        images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
        vms: VmServiceClient::new(channel.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
        snapshots: SnapshotServiceClient::new(channel.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
        agent: AgentServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
    })
}

/// What may be under way in a stream, and on a connection. A caller that does not read a console leaves a stream's window
/// full of small messages; h2 takes more of them than half a connection's window stands for (256 bytes each) for an attack
/// and ends the connection. So a few such streams have room in that half.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Lists have no limit of their own in the service's answers; a full store of snapshots is a few megabytes.
const LISTS_BYTES_MAX: usize = 16 << 20;
