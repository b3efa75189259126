//! `coldspark vm console`: a terminal on a VM's serial console.

use std::io::{self, IsTerminal};

use prost::bytes::Bytes;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::proto;
use crate::cli::SocketArgument;
use crate::cli::output;
use proto::console_request::Message as In;
use proto::console_response::Message as Out;

/// Ctrl-].
const LEAVE: u8 = 0x1d;

pub async fn run(socket: &SocketArgument, vm: String, no_backlog: bool) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.vms;
    let (requests, stream) = mpsc::channel(16);
    let open = In::Open(proto::ConsoleOpen { vm: vm.clone(), no_backlog });
    requests.send(proto::ConsoleRequest { message: Some(open) }).await?;
    let mut answers = client.console(ReceiverStream::new(stream)).await?.into_inner();
    let interactive = io::stdin().is_terminal();
    if interactive {
        output::note(&format!("[coldspark] console of {vm}; leave with Ctrl-]"));
    }
    let raw = RawTerminal::enter()?;
    let result = talk(&mut answers, requests, interactive).await;
    drop(raw);
    match result? {
        End::Left => output::note("\n[coldspark] left; the VM goes on"),
        End::Ended => output::note("\n[coldspark] the console has ended: the VM is gone"),
    }
    Ok(())
}

enum End {
    Left,
    Ended,
}

async fn talk(
    answers: &mut tonic::Streaming<proto::ConsoleResponse>,
    requests: mpsc::Sender<proto::ConsoleRequest>,
    interactive: bool,
) -> anyhow::Result<End> {
    let mut stdin = tokio::io::stdin();
    let mut stdout = tokio::io::stdout();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut typed = vec![0u8; 4096];
    let mut requests = Some(requests);
    loop {
        tokio::select! {
            answer = answers.message() => match answer?.map(|answer| answer.message) {
                None => return Ok(End::Ended),
                Some(Some(Out::Output(bytes))) => {
                    stdout.write_all(&bytes).await?;
                    stdout.flush().await?;
                }
                Some(Some(Out::LostBytes(count))) => {
                    output::note(&format!("\r\n[coldspark] {count} bytes lost\r"));
                }
                Some(None) => {}
            },
            count = stdin.read(&mut typed), if requests.is_some() => {
                let bytes = typed.get(..count?).unwrap_or_default();
                let (bytes, leave) = match bytes.iter().position(|byte| *byte == LEAVE) {
                    Some(end) if interactive => (bytes.get(..end).unwrap_or_default(), true),
                    _ => (bytes, false),
                };
                if bytes.is_empty() && !leave {
                    // The end of piped input: listen on.
                    requests = None;
                    continue;
                }
                if let Some(requests) = &requests {
                    let message = In::Input(Bytes::copy_from_slice(bytes));
                    if !bytes.is_empty()
                        && requests.send(proto::ConsoleRequest { message: Some(message) }).await.is_err()
                    {
                        return Ok(End::Ended);
                    }
                }
                if leave {
                    return Ok(End::Left);
                }
            }
            _ = terminate.recv() => return Ok(End::Left),
        }
    }
}

/// The terminal passes every key on while this lives.
struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    /// Does nothing when stdin is no terminal.
    fn enter() -> io::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(io::stdin())?;
        let mut settings = before.clone();
        settings.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &settings)?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // A terminal that is gone needs nothing.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
