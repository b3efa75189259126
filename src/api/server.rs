//! The service on its Unix socket: every service of ours, health, and reflection.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::MESSAGE_BYTES_MAX;
use super::agent::Agent;
use super::images::Images;
use super::proto::DESCRIPTORS;
use super::proto::agent_service_server::AgentServiceServer;
use super::proto::image_service_server::ImageServiceServer;
use super::proto::snapshot_service_server::SnapshotServiceServer;
use super::proto::vm_service_server::VmServiceServer;
use super::snapshots::Snapshots;
use super::vms::Vms;
use crate::fleet::Fleet;

/// Requests under way on one connection.
const REQUESTS_MAX: u32 = 256;

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("another coldspark service answers at {}; use it, stop it, or choose another --socket", .0.display())]
    Taken(PathBuf),
    #[error("{} exists and is no socket; choose another --socket", .0.display())]
    NoSocket(PathBuf),
    #[error("cannot listen at {}: {source}; is the folder there and yours?", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("the service failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("reflection cannot be offered: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A bound socket. Its file is removed with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    _file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may have been removed, or its folder with it.
        let _ = fs::remove_file(&self.0);
    }
}

impl Socket {
    /// Binds `path`, for its owner only (mode 0600). A socket that a dead service left is replaced.
    pub async fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind { path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => return Err(ServeError::NoSocket(path.to_owned())),
            Ok(_) if UnixStream::connect(path).await.is_ok() => {
                return Err(ServeError::Taken(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(failed)?,
            Err(_) => {}
        }
        // Bound under another name and renamed, so that nobody can connect before the mode is right.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(failed)?;
        let placed = fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&hidden, path));
        if let Err(source) = placed {
            let _ = fs::remove_file(&hidden);
            return Err(failed(source));
        }
        Ok(Self { listener, _file: SocketFile(path.to_owned()) })
    }
}

/// Serves until `shutdown`, then lets the calls under way end. The fleet is not closed by this.
pub async fn serve(
    fleet: Arc<Fleet>,
    socket: Socket,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ImageServiceServer<Images>>().await;
    health.set_serving::<VmServiceServer<Vms>>().await;
    health.set_serving::<SnapshotServiceServer<Snapshots>>().await;
    health.set_serving::<AgentServiceServer<Agent>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Server::builder()
        .http2_keepalive_interval(None)
        .max_concurrent_streams(REQUESTS_MAX)
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
        .add_service(AgentServiceServer::new(Agent::new(fleet)).max_decoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket.listener), shutdown)
        .await?;
    Ok(())
}
