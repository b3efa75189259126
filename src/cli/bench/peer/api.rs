//! Requests to a VMM's HTTP API on a Unix socket, answers limited in size and time.

use std::path::Path;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use prost::bytes::Bytes;
use serde_json::Value;
use tokio::net::UnixStream;

use super::process::STEP;

/// What an answer may hold.
const BODY_BYTES_MAX: usize = 64 << 10;

/// A connection.
pub struct Api {
    sender: SendRequest<Full<Bytes>>,
}

impl Api {
    pub async fn over(stream: UnixStream) -> anyhow::Result<Self> {
        let (sender, connection) = handshake(TokioIo::new(stream)).await.context("HTTP")?;
        // Ends with the sender or the socket; what it fails of, the request tells.
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    pub async fn put(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        self.send(Method::PUT, path, body).await
    }

    pub async fn patch(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        self.send(Method::PATCH, path, body).await
    }

    async fn send(&mut self, method: Method, path: &str, body: &Value) -> anyhow::Result<()> {
        let what = format!("{method} {path}");
        let asked = tokio::time::timeout(STEP, self.ask(method, path, body)).await;
        asked.with_context(|| format!("{what}: no answer in {} s", STEP.as_secs()))?.context(what)
    }

    async fn ask(&mut self, method: Method, path: &str, body: &Value) -> anyhow::Result<()> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))?;
        self.sender.ready().await.context("the API has hung up")?;
        let answer = self.sender.send_request(request).await.context("the API gave no proper HTTP answer")?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| {
            anyhow::anyhow!("the API answered {status} and a body not to be read: {error}")
        })?;
        if !status.is_success() {
            bail!("the API answered {status}: {}", String::from_utf8_lossy(&body.to_bytes()).trim());
        }
        Ok(())
    }
}

/// Connects if somebody listens there.
pub async fn connect(path: &Path) -> Option<UnixStream> {
    UnixStream::connect(path).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What becomes of a request to somebody who answers this and hangs up.
    async fn answered(answer: &[u8]) -> Result<(), String> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let answer = answer.to_vec();
        let peer = tokio::spawn(async move {
            let mut request = [0; 4096];
            let count = theirs.read(&mut request).await.unwrap();
            let _ = theirs.write_all(&answer).await;
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let mut api = Api::over(ours).await.unwrap();
        let outcome = api.put("/snapshot/load", &json!({ "resume_vm": true })).await;
        let request = peer.await.unwrap();
        assert!(request.starts_with("PUT /snapshot/load HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"resume_vm\":true}"), "{request}");
        outcome.map_err(|error| format!("{error:#}"))
    }

    #[tokio::test]
    async fn success_needs_no_body() {
        answered(b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n").await.unwrap();
        answered(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_is_told_with_its_body() {
        let body = r#"{"fault_message":"no such file"}"#;
        let answer = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let error = answered(answer.as_bytes()).await.unwrap_err();
        assert!(
            error.contains("PUT /snapshot/load") && error.contains("400") && error.contains(body),
            "{error}"
        );
    }

    #[tokio::test]
    async fn hostile_answers_are_errors() {
        let long = [b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n".as_slice(), &[b'x'; 70_000]].concat();
        let endless = [b"HTTP/1.1 200 OK\r\n".as_slice(), &[b'x'; 1 << 20]].concat();
        let hostile: [&[u8]; 9] = [
            b"",
            b"hello\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nx",
            &long,
            &endless,
        ];
        for answer in hostile {
            let outcome = answered(answer).await;
            assert!(outcome.is_err(), "{}", answer[..answer.len().min(80)].escape_ascii());
        }
    }
}
