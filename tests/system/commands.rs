//! Commands in a guest, as a client of AgentService.Exec runs them.

use std::collections::HashMap;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::exec_exit::How;
use coldspark::api::proto::exec_request::Message as In;
use coldspark::api::proto::exec_response::Message as Out;
use coldspark::api::proto::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::Client;

/// A command under way.
pub struct Command {
    pub requests: Option<mpsc::Sender<ExecRequest>>,
    pub answers: Streaming<ExecResponse>,
}

/// What it left.
#[derive(Debug, PartialEq)]
pub struct Left {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub how: How,
}

impl Left {
    /// Expects that it exited with this status, having said this on stdout and nothing on stderr.
    pub fn expect(self, status: u32, stdout: &str) -> anyhow::Result<()> {
        let due = Left { stdout: stdout.into(), stderr: Vec::new(), how: How::Status(status) };
        ensure!(self == due, "should have left {due:?}, left {self:?}");
        Ok(())
    }
}

/// The start of a command in `vm`.
pub fn start(vm: &str, words: &[&str]) -> ExecStart {
    let args = words.iter().map(|word| (*word).to_owned()).collect();
    ExecStart { vm: vm.into(), args, env: HashMap::new(), ..Default::default() }
}

fn request(message: In) -> ExecRequest {
    ExecRequest { message: Some(message) }
}

impl Command {
    pub async fn open(client: &Client, start: ExecStart) -> Result<Command, Status> {
        let (requests, stream) = mpsc::channel(4);
        let sent = requests.send(request(In::Start(start))).await;
        sent.map_err(|_| Status::internal("trial: the stream takes no request"))?;
        let mut answers = client.agent.clone().exec(ReceiverStream::new(stream)).await?.into_inner();
        match answers.message().await?.and_then(|answer| answer.message) {
            Some(Out::Started(_)) => Ok(Command { requests: Some(requests), answers }),
            other => Err(Status::internal(format!("trial: {other:?} instead of `started`"))),
        }
    }

    async fn send(&self, message: In) -> anyhow::Result<()> {
        let requests = self.requests.as_ref().context("its requests have ended")?;
        requests.send(request(message)).await.context("the stream takes no request")
    }

    pub async fn stdin(&self, bytes: &[u8]) -> anyhow::Result<()> {
        self.send(In::Stdin(bytes.to_vec().into())).await
    }

    pub async fn signal(&self, signal: u32) -> anyhow::Result<()> {
        self.send(In::Signal(signal)).await
    }

    pub async fn stdin_end(&self) -> anyhow::Result<()> {
        self.send(In::StdinEnd(true)).await
    }

    /// The next piece of stdout.
    pub async fn stdout(&mut self) -> anyhow::Result<Vec<u8>> {
        match self.answers.message().await?.and_then(|answer| answer.message) {
            Some(Out::Stdout(bytes)) => Ok(bytes.to_vec()),
            other => bail!("{other:?} instead of output"),
        }
    }

    /// What it says to its end.
    pub async fn rest(&mut self) -> Result<Left, Status> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(answer) = self.answers.message().await? {
            match answer.message {
                Some(Out::Stdout(bytes)) => stdout.extend(bytes),
                Some(Out::Stderr(bytes)) => stderr.extend(bytes),
                Some(Out::Exit(ExecExit { how: Some(how) })) => {
                    return match self.answers.message().await? {
                        None => Ok(Left { stdout, stderr, how }),
                        Some(more) => Err(Status::internal(format!("trial: {more:?} after the exit"))),
                    };
                }
                other => return Err(Status::internal(format!("trial: {other:?} out of turn"))),
            }
        }
        Err(Status::internal("trial: the stream ended well, but without `exit`"))
    }

    /// Ends its stdin and takes what it says to its end.
    pub async fn finish(&mut self) -> Result<Left, Status> {
        self.requests = None;
        self.rest().await
    }
}

/// Runs a command without input to its end.
pub async fn run(client: &Client, vm: &str, words: &[&str]) -> Result<Left, Status> {
    Command::open(client, start(vm, words)).await?.finish().await
}

/// Writes a file.
pub async fn put(client: &Client, vm: &str, path: &str, mode: u32, bytes: &[u8]) -> Result<u64, Status> {
    use put_file_request::Message;
    let start = PutFileStart { vm: vm.into(), path: path.into(), mode };
    let mut messages = vec![Message::Start(start)];
    messages.extend(bytes.chunks(100_000).map(|piece| Message::Data(piece.to_vec().into())));
    let requests: Vec<_> =
        messages.into_iter().map(|message| PutFileRequest { message: Some(message) }).collect();
    Ok(client.agent.clone().put_file(tokio_stream::iter(requests)).await?.into_inner().bytes)
}

/// Reads a file: its permission bits and bytes.
pub async fn get(client: &Client, vm: &str, path: &str) -> Result<(u32, Vec<u8>), Status> {
    use get_file_response::Message;
    let request = GetFileRequest { vm: vm.into(), path: path.into() };
    let mut answers = client.agent.clone().get_file(request).await?.into_inner();
    let Some(Message::Info(info)) = answers.message().await?.and_then(|answer| answer.message) else {
        return Err(Status::internal("trial: no `info` first"));
    };
    let mut bytes = Vec::new();
    while let Some(answer) = answers.message().await? {
        match answer.message {
            Some(Message::Data(data)) => bytes.extend(data),
            other => return Err(Status::internal(format!("trial: {other:?} out of turn"))),
        }
    }
    if info.bytes != bytes.len() as u64 {
        return Err(Status::internal(format!("trial: {} bytes of {}", bytes.len(), info.bytes)));
    }
    Ok((info.mode, bytes))
}
