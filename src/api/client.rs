//! Connecting to a service: by its Unix socket, or over the network.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::AsyncBufReadExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tonic::codegen::http::Uri;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::MESSAGE_BYTES_MAX;
use super::auth::{AuthError, tls};
use super::proto::agent_service_client::AgentServiceClient;
use super::proto::event_service_client::EventServiceClient;
use super::proto::function_service_client::FunctionServiceClient;
use super::proto::image_service_client::ImageServiceClient;
use super::proto::metrics_service_client::MetricsServiceClient;
use super::proto::pool_service_client::PoolServiceClient;
use super::proto::snapshot_service_client::SnapshotServiceClient;
use super::proto::vm_service_client::VmServiceClient;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no coldspark service at {}: {reason}; start one with `coldspark serve`, or name its socket with --socket", path.display())]
    Socket { path: PathBuf, reason: String },
    #[error("no connection to {host}: {reason}{}", hint(.reason))]
    Host { host: String, reason: String },
    #[error("{0:?} is no address of a service; say --host https://HOST:PORT")]
    Address(String),
    #[error("a token would go over the network in the clear; use https://, or no token")]
    TokenInTheClear,
    #[error(
        "the token has characters that no token has; is it the file that `coldspark token new` printed it to?"
    )]
    Token,
    #[error(transparent)]
    Files(#[from] AuthError),
}

/// What lies under a call that failed because its connection did, and what to do about it.
pub fn connection_lost(status: &Status) -> Option<String> {
    let reason = innermost(std::error::Error::source(status)?);
    Some(format!("the connection to the service failed: {reason}{}", hint(&reason)))
}

/// What to do about the usual failures of TLS, by how rustls tells them.
fn hint(reason: &str) -> &'static str {
    match reason {
        r if r.contains("UnknownIssuer") => {
            "; the service's certificate is of another CA: name its CA with --ca FILE"
        }
        r if r.contains("not valid for name") => {
            "; the certificate is for another name: use the name that is in it in --host"
        }
        r if r.contains("CertificateRequired") => {
            "; the service wants a client certificate: --cert FILE --key FILE"
        }
        r if r.contains("UnknownCA") || r.contains("DecryptError") => {
            "; the service does not know the CA of --cert"
        }
        r if r.contains("Expired") => "; renew it",
        r if r.contains("InvalidContentType") || r.contains("corrupt message") => {
            "; that port does not speak TLS: was its service started with --insecure? Then say http://"
        }
        r if r.contains("refused") => {
            "; does the service listen there (`coldspark serve --listen ADDRESS:PORT`)?"
        }
        _ => "",
    }
}

/// A service on another host.
#[derive(Debug, Clone, Default)]
pub struct Remote {
    /// `https://HOST:PORT`; `http://` for services that were started with `--insecure`.
    pub host: String,
    pub token: Option<String>,
    /// Whom to trust; `None`: the public CAs.
    pub ca: Option<PathBuf>,
    /// This client's certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What calls go through: the connection, and a token for each call.
pub type Transport = InterceptedService<Channel, Bearer>;

/// Adds the token to each call, if there is one.
#[derive(Clone, Default)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn new(token: &str) -> Result<Self, ConnectError> {
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {token}").parse().map_err(|_| ConnectError::Token)?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Bearer(a token)" } else { "Bearer(none)" })
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// A client of every service, over one connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    pub images: ImageServiceClient<Transport>,
    pub vms: VmServiceClient<Transport>,
    pub snapshots: SnapshotServiceClient<Transport>,
    pub agent: AgentServiceClient<Transport>,
    pub functions: FunctionServiceClient<Transport>,
    pub pools: PoolServiceClient<Transport>,
    pub events: EventServiceClient<Transport>,
    pub metrics: MetricsServiceClient<Transport>,
}

impl Client {
    fn new(channel: Channel, bearer: Bearer) -> Self {
        let transport = InterceptedService::new(channel, bearer);
        Self {
            images: ImageServiceClient::new(transport.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
            vms: VmServiceClient::new(transport.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
            snapshots: SnapshotServiceClient::new(transport.clone())
                .max_decoding_message_size(LISTS_BYTES_MAX),
            functions: FunctionServiceClient::new(transport.clone())
                .max_decoding_message_size(LISTS_BYTES_MAX),
            pools: PoolServiceClient::new(transport.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
            events: EventServiceClient::new(transport.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            metrics: MetricsServiceClient::new(transport.clone()).max_decoding_message_size(LISTS_BYTES_MAX),
            agent: AgentServiceClient::new(transport).max_decoding_message_size(MESSAGE_BYTES_MAX),
        }
    }
}

/// Connects a channel to the service at `socket`; for services of other packages (health, reflection) too.
pub async fn channel(socket: &Path) -> Result<Channel, ConnectError> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let failed = |error: tonic::transport::Error| ConnectError::Socket {
        path: socket.to_owned(),
        reason: innermost(&error),
    };
    // The address is never looked at: the connector knows the way.
    endpoint(Uri::from_static("http://coldspark.invalid"))
        .connect_with_connector(connector)
        .await
        .map_err(failed)
}

/// Connects to the service at `socket`.
pub async fn connect(socket: &Path) -> Result<Client, ConnectError> {
    Ok(Client::new(channel(socket).await?, Bearer::default()))
}

/// Connects a channel to a service on another host; calls do not carry the token.
pub async fn remote_channel(remote: &Remote) -> Result<Channel, ConnectError> {
    let bad = || ConnectError::Address(remote.host.clone());
    let uri: Uri = remote.host.parse().map_err(|_| bad())?;
    let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().ok_or_else(bad)?;
    let failed = |error: tonic::transport::Error| ConnectError::Host {
        host: remote.host.clone(),
        reason: innermost(&error),
    };
    match uri.scheme_str() {
        Some("http") if remote.token.is_some() => Err(ConnectError::TokenInTheClear),
        Some("http") => {
            let connector = tower::service_fn(move |_| {
                let host = host.clone();
                async move { tcp(&host, port).await.map(TokioIo::new) }
            });
            endpoint(uri).connect_with_connector(connector).await.map_err(failed)
        }
        Some("https") => {
            let connector = TlsConnector::from(Arc::new(client_config(remote)?));
            let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
            let connector = tower::service_fn(move |_| {
                let (host, name, connector) = (host.clone(), name.clone(), connector.clone());
                async move {
                    let mut stream = connector.connect(name, tcp(&host, port).await?).await?;
                    heard(&mut stream).await?;
                    Ok::<_, io::Error>(TokioIo::new(stream))
                }
            });
            endpoint(uri).connect_with_connector(connector).await.map_err(failed)
        }
        _ => Err(bad()),
    }
}

/// Connects to a service on another host.
pub async fn connect_remote(remote: &Remote) -> Result<Client, ConnectError> {
    let bearer = remote.token.as_deref().map(Bearer::new).transpose()?.unwrap_or_default();
    Ok(Client::new(remote_channel(remote).await?, bearer))
}

/// Waits for the service's first words. With TLS 1.3 a client is connected before the service has looked at its certificate; if
/// the service then refuses it, this is where the reason comes.
async fn heard(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    match timeout(HEARD_WITHIN, stream.fill_buf()).await {
        Ok(Ok([])) => Err(io::ErrorKind::ConnectionReset.into()),
        Ok(Err(error)) => Err(error),
        // It may be one that waits for the client's words first.
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn client_config(remote: &Remote) -> Result<ClientConfig, ConnectError> {
    let roots = match &remote.ca {
        Some(path) => tls::roots(path)?,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| AuthError::Settings(error.to_string()))?
        .with_root_certificates(roots);
    let mut config = match &remote.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(tls::certificates(certificate)?, tls::private_key(key)?)
            .map_err(|error| AuthError::Settings(format!("--cert and --key do not go together: {error}")))?,
    };
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    Ok(config)
}

fn endpoint(uri: Uri) -> Endpoint {
    Endpoint::from(uri)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
}

/// For a stream of requests that broke off on this side: it must not end before the connection does, and the end of its
/// sender would be a good end to the service, which would take the part that it has for all.
pub fn leave_unended<T>(requests: mpsc::Sender<T>) {
    std::mem::forget(requests);
}

/// All items of a list that comes in pages: `page` fetches the one of a token (the first: empty), with the token of the next.
pub async fn all_pages<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Status>,
) -> Result<Vec<T>, Status> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let (items, next) = page(token).await?;
        all.extend(items);
        if next.is_empty() {
            return Ok(all);
        }
        token = next;
    }
}

/// The innermost cause.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut reason = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    reason.to_string()
}

/// How long the service may take to greet.
const HEARD_WITHIN: Duration = Duration::from_secs(5);

/// What may be under way in a stream, and on a connection. A caller that does not read a console leaves a stream's window
/// full of small messages; h2 takes more of them than half a connection's window stands for (256 bytes each) for an attack
/// and ends the connection. So a few such streams have room in that half.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Lists have no limit of their own in the service's answers; a full store of snapshots is a few megabytes.
const LISTS_BYTES_MAX: usize = 16 << 20;
