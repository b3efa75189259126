//! `coldspark vm exec` and `coldspark vm cp`: commands and files in a VM.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use prost::bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::api::client::leave_unended;
use crate::api::proto;
use crate::cli::SocketArgument;
use crate::cli::output;
use crate::cli::stdin::Stdin;
use proto::exec_exit::How;
use proto::exec_request::Message as In;
use proto::exec_response::Message as Out;
use proto::get_file_response::Message as GetOut;
use proto::put_file_request::Message as PutIn;

/// Bytes in one message.
const PIECE_BYTES: usize = 64 << 10;
/// Messages on their way to the service.
const MESSAGES_MAX: usize = 4;

#[derive(Debug, Args)]
pub struct ExecArguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Id or name
    vm: String,
    /// Pass stdin on; without it the command reads nothing
    #[arg(short, long)]
    interactive: bool,
    /// Set a variable
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Working folder [default: the user's home]
    #[arg(short = 'w', long, value_name = "DIR", default_value = "")]
    workdir: String,
    /// User [default: the agent's, root as a rule]
    #[arg(short, long, default_value = "")]
    user: String,
    /// Seconds after which it is killed [default: none]
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct CopyArguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// A file here, or VM:PATH
    from: String,
    /// VM:PATH, or a file here
    to: String,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a variable is NAME=VALUE".to_owned()),
    }
}

/// Exit code when the command was not run to its end.
const FAILED: u8 = 125;

/// Runs a command; gives its status, or 128 and its signal's number.
pub async fn exec(arguments: ExecArguments) -> anyhow::Result<ExitCode> {
    Ok(session(arguments).await.unwrap_or_else(|error| {
        output::failed(&error);
        ExitCode::from(FAILED)
    }))
}

async fn session(arguments: ExecArguments) -> anyhow::Result<ExitCode> {
    let ExecArguments { socket, vm, interactive, env, workdir, user, timeout, command } = arguments;
    let mut client = socket.connect().await?.agent;
    let start = proto::ExecStart {
        vm,
        args: command,
        env: env.into_iter().collect::<HashMap<_, _>>(),
        cwd: workdir,
        user,
        timeout_ms: timeout.checked_mul(1000).context("--timeout is too long")?,
    };
    let (requests, stream) = mpsc::channel(MESSAGES_MAX);
    requests.send(request(In::Start(start))).await?;
    let mut stdin = if interactive {
        let piece = |bytes| request(In::Stdin(bytes));
        Stdin::pass_on(requests.clone(), piece, Some(request(In::StdinEnd(true))))
    } else {
        requests.send(request(In::StdinEnd(true))).await?;
        Stdin::none()
    };
    // From here on they are the command's.
    tokio::spawn(pass_signals(requests)?);
    let mut answers = client.exec(ReceiverStream::new(stream)).await?.into_inner();
    while let Some(answer) = tokio::select! {
        answer = answers.message() => answer?,
        error = stdin.broken() => return Err(error),
    } {
        match answer.message {
            Some(Out::Stdout(bytes)) => write(&mut io::stdout(), &bytes)?,
            Some(Out::Stderr(bytes)) => write(&mut io::stderr(), &bytes)?,
            Some(Out::Exit(exit)) => {
                let code = match exit.how {
                    Some(How::Status(status)) => status,
                    Some(How::Signal(signal)) => signal.saturating_add(128),
                    None => bail!("the service did not say how the command ended"),
                };
                // As a parent process would see it.
                return Ok(ExitCode::from((code & 0xff) as u8));
            }
            Some(Out::Started(_)) | None => {}
        }
    }
    bail!("the service ended the stream before the command's end")
}

fn request(message: In) -> proto::ExecRequest {
    proto::ExecRequest { message: Some(message) }
}

fn write(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Gives the command what would end this program. The numbers are the same on every system.
fn pass_signals(requests: mpsc::Sender<proto::ExecRequest>) -> io::Result<impl Future<Output = ()>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        loop {
            let number = tokio::select! {
                _ = hangup.recv() => 1,
                _ = interrupt.recv() => 2,
                _ = quit.recv() => 3,
                _ = terminate.recv() => 15,
            };
            if requests.send(request(In::Signal(number))).await.is_err() {
                return;
            }
        }
    })
}

/// A path here, or in a VM.
enum Place {
    Here(PathBuf),
    There { vm: String, path: String },
}

/// `VM:PATH`; a path with a slash before its colon, or none, is here.
fn place(text: &str) -> Place {
    match text.split_once(':') {
        Some((vm, path)) if !vm.is_empty() && !vm.contains('/') => {
            Place::There { vm: vm.to_owned(), path: path.to_owned() }
        }
        _ => Place::Here(text.into()),
    }
}

pub async fn copy(arguments: CopyArguments) -> anyhow::Result<()> {
    match (place(&arguments.from), place(&arguments.to)) {
        (Place::Here(from), Place::There { vm, path }) => put(&arguments.socket, from, vm, path).await,
        (Place::There { vm, path }, Place::Here(to)) => get(&arguments.socket, vm, path, to).await,
        _ => bail!("one of the two must be VM:PATH, the other a file here"),
    }
}

async fn put(socket: &SocketArgument, from: PathBuf, vm: String, path: String) -> anyhow::Result<()> {
    let shown = from.display().to_string();
    let mut file = tokio::fs::File::open(&from).await.with_context(|| format!("cannot open {shown}"))?;
    let metadata = file.metadata().await.with_context(|| format!("cannot look at {shown}"))?;
    if !metadata.is_file() {
        bail!(
            "{shown} is not a file; pack folders with tar: tar c DIR | coldspark vm exec -i VM -- tar xf -"
        );
    }
    // A folder takes the file by its name.
    let name = from.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let path = if path.is_empty() || path.ends_with('/') { format!("{path}{name}") } else { path };
    let start = proto::PutFileStart { vm, path, mode: metadata.permissions().mode() & 0o7777 };
    let mut client = socket.connect().await?.agent;
    let (requests, stream) = mpsc::channel(MESSAGES_MAX);
    requests.send(proto::PutFileRequest { message: Some(PutIn::Start(start)) }).await?;
    let read = async {
        let mut piece = vec![0u8; PIECE_BYTES];
        loop {
            let count = match file.read(&mut piece).await {
                Ok(count) => count,
                Err(error) => {
                    leave_unended(requests);
                    return Err(error).with_context(|| format!("cannot read {shown}"));
                }
            };
            let bytes = piece.get(..count).unwrap_or_default();
            let message = Some(PutIn::Data(Bytes::copy_from_slice(bytes)));
            if count == 0 || requests.send(proto::PutFileRequest { message }).await.is_err() {
                drop(requests);
                // The answer tells.
                return std::future::pending::<anyhow::Result<()>>().await;
            }
        }
    };
    tokio::select! {
        answer = client.put_file(ReceiverStream::new(stream)) => answer.map(|_| ()).map_err(Into::into),
        result = read => result,
    }
}

async fn get(socket: &SocketArgument, vm: String, path: String, to: PathBuf) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.agent;
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    let to = if to.is_dir() { to.join(name) } else { to };
    let shown = to.display().to_string();
    let mut answers = client.get_file(proto::GetFileRequest { vm, path }).await?.into_inner();
    let Some(GetOut::Info(info)) = answers.message().await?.and_then(|answer| answer.message) else {
        bail!("the service did not say what file it is");
    };
    // It takes its place when it is whole.
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(".".as_ref());
    let mut draft =
        tempfile::NamedTempFile::new_in(folder).with_context(|| format!("cannot make a file for {shown}"))?;
    while let Some(answer) = answers.message().await? {
        if let Some(GetOut::Data(bytes)) = answer.message {
            draft.write_all(&bytes).with_context(|| format!("cannot write {shown}"))?;
        }
    }
    let mode = std::fs::Permissions::from_mode(info.mode & 0o777);
    draft.as_file().set_permissions(mode).with_context(|| format!("cannot set permissions of {shown}"))?;
    draft.persist(&to).with_context(|| format!("cannot write {shown}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_names_a_vm_unless_it_is_in_a_path() {
        assert!(
            matches!(place("web:/etc/motd"), Place::There { vm, path } if vm == "web" && path == "/etc/motd")
        );
        assert!(matches!(place("web:"), Place::There { vm, path } if vm == "web" && path.is_empty()));
        for here in ["motd", "./a:b", "/tmp/a:b", ":b"] {
            assert!(matches!(place(here), Place::Here(path) if path.as_os_str() == here), "{here}");
        }
    }

    #[test]
    fn a_variable_has_a_name() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert!(variable("=b").is_err() && variable("A").is_err());
    }
}
