//! Metrics over HTTP: GET /metrics, for Prometheus. Plain HTTP and nobody is asked who they are, so it is for this host, or for a network that is
//! trusted as a whole.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prost::bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;

use super::listen::{Room, Socket, taken};
use super::server::ServeError;
use crate::fleet::Fleet;
use crate::fleet::gauges::Gauges;
use crate::telemetry::exposition::{self, Exposition};
use crate::telemetry::metrics::Instruments;

/// Connections at once; Prometheus needs one.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may take altogether: it is for one request.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Most of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;

/// Where metrics are given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    /// A Unix socket, for the service's own user and root.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:").or(text.starts_with('/').then_some(text)) {
            Some("") => Err("unix: needs a path".to_owned()),
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                format!("{text:?} is neither ADDRESS:PORT (as 127.0.0.1:9464) nor the path of a socket")
            }),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Address {
    /// Whether only this host can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// Everything there is to tell of a fleet and this process.
pub fn exposition(fleet: &Arc<Fleet>) -> Arc<Exposition> {
    let gauges: Box<dyn Collector> = Box::new(Gauges(Arc::downgrade(fleet)));
    Arc::new(Exposition::new([Box::new(Instruments), gauges]))
}

/// A bound endpoint.
#[derive(Debug)]
pub struct Endpoint(Bound);

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(Socket),
}

impl Endpoint {
    pub async fn bind(address: &Address) -> Result<Self, ServeError> {
        Ok(Self(match address {
            Address::Tcp(address) => Bound::Tcp(
                TcpListener::bind(address)
                    .await
                    .map_err(|source| ServeError::Metrics { address: *address, source })?,
            ),
            Address::Unix(path) => Bound::Unix(Socket::bind(path).await?),
        }))
    }

    /// The port, if it is one.
    pub fn port(&self) -> Option<SocketAddr> {
        match &self.0 {
            Bound::Tcp(listener) => listener.local_addr().ok(),
            Bound::Unix(_) => None,
        }
    }

    /// Answers for as long as it is polled.
    pub async fn serve(self, exposition: Arc<Exposition>) {
        let room = Room::new("the metrics port", CONNECTIONS_MAX);
        loop {
            let stream = match &self.0 {
                Bound::Tcp(listener) => taken(listener.accept().await).await.map(Stream::Tcp),
                Bound::Unix(socket) => taken(socket.accept().await).await.map(Stream::Unix),
            };
            let Some(stream) = stream else { continue };
            let Some(permit) = room.enter() else { continue };
            let exposition = Arc::clone(&exposition);
            // At most as many of these as connections.
            tokio::spawn(async move {
                let answered = async {
                    match stream {
                        Stream::Tcp(stream) => answer(stream, exposition).await,
                        Stream::Unix(stream) => answer(stream, exposition).await,
                    }
                };
                match tokio::time::timeout(ANSWER_WITHIN, answered).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "a scrape of the metrics failed"),
                    Err(_) => tracing::debug!("a scrape of the metrics took too long"),
                }
                drop(permit);
            });
        }
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// One request.
async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    exposition: Arc<Exposition>,
) -> hyper::Result<()> {
    let service = service_fn(|request| {
        let exposition = Arc::clone(&exposition);
        async move { Ok::<_, Infallible>(respond(&request, &exposition)) }
    });
    http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .timer(TokioTimer::new())
        .header_read_timeout(ANSWER_WITHIN)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn respond(request: &Request<Incoming>, exposition: &Exposition) -> Response<Full<Bytes>> {
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, HeaderValue::from_static(exposition::CONTENT_TYPE), exposition.text())
        }
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, plain, "GET /metrics\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, plain, "the metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Weak;

    use super::*;

    /// Words of a text that are names of metrics.
    fn names(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words.filter(|word| word.starts_with("coldspark_")).map(str::to_owned).collect()
    }

    /// What an exposition's families may be called in a query.
    fn queried(text: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            let ends: &[&str] = match kind {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                "gauge" => &[""],
                other => panic!("{name} is a {other}"),
            };
            names.extend(ends.iter().map(|end| format!("{name}{end}")));
        }
        names
    }

    #[test]
    fn dashboard_alerts_and_docs_name_metrics_that_there_are() {
        let gauges: Box<dyn Collector> = Box::new(Gauges(Weak::new()));
        let text = Exposition::new([Box::new(Instruments), gauges]).text();
        let there = queried(&text);
        assert!(there.len() > 50, "{there:?}");
        for (file, used) in [
            ("deploy/grafana-dashboard.json", include_str!("../../deploy/grafana-dashboard.json")),
            ("deploy/alerts.yml", include_str!("../../deploy/alerts.yml")),
        ] {
            let used = names(used);
            assert!(used.len() > 10, "{file}: {used:?}");
            let unknown: Vec<_> = used.difference(&there).collect();
            assert!(unknown.is_empty(), "{file} uses what is not there: {unknown:?}");
        }
        // Every family is explained.
        let docs = names(include_str!("../../docs/operations.md"));
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            let name = match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            };
            assert!(docs.contains(&name), "docs/operations.md does not explain {name}");
        }
    }

    #[test]
    fn addresses_are_ports_or_paths() {
        let address = |text: &str| text.parse::<Address>();
        assert!(address("127.0.0.1:9464").unwrap().is_local() && address("[::1]:1").unwrap().is_local());
        assert!(!address("0.0.0.0:9464").unwrap().is_local() && !address("[::]:1").unwrap().is_local());
        assert_eq!(address("unix:/run/m.sock"), address("/run/m.sock"));
        assert!(address("/run/m.sock").unwrap().is_local());
        for wrong in ["", "unix:", "9464", "localhost:9464", "127.0.0.1"] {
            assert!(address(wrong).is_err(), "{wrong:?}");
        }
    }
}
