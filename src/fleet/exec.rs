//! Commands and files in a guest: opening their streams, and running a command to its end.

use std::time::Duration;

use prost::bytes::Bytes;

use super::error::FleetError;
use super::limits::AGENT_TIMEOUT_DEFAULT;
use super::streams::{Heard, Stream};
use super::vm::Vm;
use crate::agent::End;
use crate::agent::streams::{Pipe, What};

/// How long after its agent's port the end of a VM is known.
const END_KNOWN_WITHIN: Duration = Duration::from_secs(2);

/// What a command left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// Bytes of either that were beyond the limit and dropped.
    pub lost_bytes: u64,
    pub end: End,
}

impl Vm {
    /// Starts a command, or opens a file. It is killed when the stream is dropped before its end.
    ///
    /// # Errors
    /// [`FleetError::Invalid`]; those of [`AgentClient::ask`](super::agent::AgentClient::ask), among them the agent's refusal;
    /// [`FleetError::Limit`]: too many streams.
    pub async fn open(&self, what: What) -> Result<Stream, FleetError> {
        self.check_runs()?;
        let opened = tokio::select! {
            stream = self.agent.open(what, AGENT_TIMEOUT_DEFAULT) => stream,
            reason = self.ended() => Err(FleetError::Ended(reason)),
        };
        match opened {
            Ok(stream) => Ok(stream),
            Err(error) => Err(self.end_or(error).await),
        }
    }

    /// Why its agent could not be talked with: the port closes a moment before the VM's end is known, and why. (One that was booted may come
    /// again: that is no end.)
    pub async fn end_or(&self, error: FleetError) -> FleetError {
        match error {
            FleetError::WrongState(_) if self.generation.is_some() => {
                let end = tokio::time::timeout(END_KNOWN_WITHIN, self.ended()).await;
                end.map_or(error, FleetError::Ended)
            }
            error => error,
        }
    }

    /// Runs a command to its end: `stdin` is all it reads; of stdout and of stderr `bytes_max` each are kept. It is killed when
    /// `within` is over, or the future is dropped.
    ///
    /// # Errors
    /// Those of [`open`](Self::open); [`FleetError::ExecTimeout`]; [`FleetError::StreamLost`].
    pub async fn run(
        &self,
        what: What,
        stdin: Bytes,
        bytes_max: usize,
        within: Duration,
    ) -> Result<Outcome, FleetError> {
        let running = async {
            let stream = self.open(what).await?;
            converse(&stream, stdin, bytes_max).await
        };
        tokio::time::timeout(within, running)
            .await
            .map_err(|_| FleetError::ExecTimeout(within.as_millis()))?
    }
}

/// Gives a command all of its stdin and hears it to its end; of stdout and of stderr `bytes_max` each are kept.
///
/// # Errors
/// [`FleetError::StreamLost`].
pub async fn converse(stream: &Stream, stdin: Bytes, bytes_max: usize) -> Result<Outcome, FleetError> {
    let write = async {
        stream.write(stdin).await;
        stream.end_stdin();
    };
    let (outcome, ()) = tokio::join!(collect(stream, bytes_max), write);
    outcome
}

async fn collect(stream: &Stream, bytes_max: usize) -> Result<Outcome, FleetError> {
    let (mut stdout, mut stderr, mut lost_bytes) = (Vec::new(), Vec::new(), 0);
    loop {
        match stream.next().await? {
            Heard::Output(pipe, bytes) => {
                let kept = match pipe {
                    Pipe::Stdout => &mut stdout,
                    Pipe::Stderr => &mut stderr,
                };
                let count = bytes.len().min(bytes_max.saturating_sub(kept.len()));
                kept.extend_from_slice(bytes.get(..count).unwrap_or_default());
                lost_bytes += (bytes.len() - count) as u64;
            }
            Heard::End(end) => return Ok(Outcome { stdout, stderr, lost_bytes, end }),
        }
    }
}
