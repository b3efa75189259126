//! A guest's serial console as a conversation: wait for words, type, wait for the answer.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use coldspark::api::proto::console_request::Message as Input;
pub use coldspark::api::proto::console_response::Message as Output;
use coldspark::api::proto::vm_service_client::VmServiceClient;
use coldspark::api::proto::{ConsoleOpen, ConsoleRequest, ConsoleResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::trial::limit;

/// How long a guest may be silent about something that was asked.
const ANSWER_SECONDS: u64 = 30;

/// An open console.
pub struct Console {
    input: mpsc::Sender<ConsoleRequest>,
    output: tonic::Streaming<ConsoleResponse>,
    /// Seen and not yet taken by [`Console::expect`].
    seen: Vec<u8>,
    log: File,
}

impl Console {
    /// Opens the console of `vm`, backlog included.
    pub async fn open(mut vms: VmServiceClient<Channel>, vm: &str, log: &Path) -> anyhow::Result<Console> {
        let (input, requests) = mpsc::channel(16);
        let open = ConsoleOpen { vm: vm.into(), no_backlog: false };
        input.send(ConsoleRequest { message: Some(Input::Open(open)) }).await?;
        let output = vms.console(ReceiverStream::new(requests)).await?.into_inner();
        Ok(Console { input, output, seen: Vec::new(), log: File::create(log)? })
    }

    /// Types a line.
    pub async fn type_line(&mut self, line: &str) -> anyhow::Result<()> {
        let bytes = format!("{line}\n").into_bytes();
        self.input
            .send(ConsoleRequest { message: Some(Input::Input(bytes.into())) })
            .await
            .context("the console's stream is closed")
    }

    /// Waits until `words` appear; returns what came before them.
    pub async fn expect(&mut self, words: &str) -> anyhow::Result<String> {
        tokio::time::timeout(limit(ANSWER_SECONDS), self.find(words)).await.unwrap_or_else(|_| {
            bail!("console did not say {words:?}; it said {:?}", String::from_utf8_lossy(&self.seen))
        })
    }

    /// Types a line and returns what came between its echo and `end`.
    pub async fn ask(&mut self, line: &str, end: &str) -> anyhow::Result<String> {
        self.type_line(line).await?;
        self.expect(end).await.with_context(|| format!("typed {line:?}"))
    }

    /// Types bytes as they are. At most 4 KiB at once.
    pub async fn type_bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let message = ConsoleRequest { message: Some(Input::Input(bytes.to_vec().into())) };
        self.input.send(message).await.context("the console's stream is closed")
    }

    /// Takes in at least `count` bytes, and returns all that was not taken yet.
    pub async fn bytes(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        while self.seen.len() < count {
            let before = self.seen.len();
            let more = tokio::time::timeout(limit(ANSWER_SECONDS), self.receive()).await;
            let more = more.with_context(|| format!("{before} bytes came of {count}, and then no more"))?;
            ensure!(more?, "the console ended after {before} bytes of {count}");
        }
        Ok(std::mem::take(&mut self.seen))
    }

    /// The next message as it is.
    pub async fn message(&mut self) -> anyhow::Result<Option<Output>> {
        let message = tokio::time::timeout(limit(ANSWER_SECONDS), self.output.message()).await;
        let message = message.context("nothing comes from the console")??;
        message.map(|message| message.message.context("an empty console message")).transpose()
    }

    /// Waits until the stream ends, as it does when the VM is over; returns all that was still said.
    pub async fn rest(&mut self) -> anyhow::Result<String> {
        let all = async {
            while self.receive().await? {}
            anyhow::Ok(())
        };
        tokio::time::timeout(limit(ANSWER_SECONDS), all)
            .await
            .context("the console's stream did not end")??;
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.seen)).into_owned())
    }

    async fn find(&mut self, words: &str) -> anyhow::Result<String> {
        // Much may come before the words: what was looked at is not looked at again.
        let mut looked = 0;
        loop {
            let mut windows = self.seen.get(looked..).unwrap_or_default().windows(words.len());
            if let Some(at) = windows.position(|window| window == words.as_bytes()) {
                let at = looked + at;
                let before = String::from_utf8_lossy(&self.seen[..at]).into_owned();
                self.seen.drain(..at + words.len());
                return Ok(before);
            }
            looked = (self.seen.len() + 1).saturating_sub(words.len());
            if !self.receive().await? {
                bail!(
                    "the VM ended before its console said {words:?}: {:?}",
                    String::from_utf8_lossy(&self.seen)
                );
            }
        }
    }

    /// Takes in one message; false at the end of the stream.
    async fn receive(&mut self) -> anyhow::Result<bool> {
        let Some(message) = self.output.message().await? else { return Ok(false) };
        match message.message {
            Some(Output::Output(bytes)) => {
                self.log.write_all(&bytes)?;
                self.seen.extend(bytes);
            }
            Some(Output::LostBytes(bytes)) => bail!("the console lost {bytes} bytes"),
            None => bail!("an empty console message"),
        }
        Ok(true)
    }
}
