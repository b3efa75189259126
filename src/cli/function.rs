//! `coldspark function`: commands that are run in fresh clones.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::limits::LimitArguments;
use super::output::{self, Shape, Table};
use super::pool::Mode;
use super::vm::MemoryMode;
use super::vm::network::{self, PoolNetArguments};
use super::{SocketArgument, units};
use crate::api::client::all_pages;
use crate::api::proto;
use crate::api::proto::deploy_event::Event;
use crate::api::proto::deploy_request::From;
use crate::api::proto::invocation_end::How;
use crate::api::proto::invoke_stream_request::Message as In;
use crate::api::proto::invoke_stream_response::Message as Out;

/// What is read from stdin at a time.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces that are not sent yet.
const PIECES_MAX: usize = 4;
/// A status of our own: the function was not run to its end.
const FAILED: u8 = 125;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a function, or deploy one anew
    #[command(
        after_help = "Examples:\n  coldspark function deploy resize --image web --prepare 'pkg install -y ImageMagick7' -- convert - -resize 200x -\n  coldspark function deploy shout --embedded -- upper\n  coldspark function deploy report --snapshot ready --net auto --allow 10.1.2.3:5432/tcp -- /usr/local/bin/report\n\nThe payload is the handler's stdin, the answer its stdout."
    )]
    Deploy(Box<Deploy>),
    /// Run a function: stdin is its payload, stdout its answer; ends with the handler's status
    #[command(
        after_help = "Examples:\n  coldspark function invoke resize < photo.jpg > small.jpg\n  echo hello | coldspark function invoke shout --timings\n\nExit code: the handler's; 128 and the signal's number if a signal ended it; 125 if it was not run to its end."
    )]
    Invoke {
        #[command(flatten)]
        socket: SocketArgument,
        function: String,
        /// A variable for the handler
        #[arg(short, long = "env", value_name = "K=V", value_parser = parse_pair)]
        env: Vec<(String, String)>,
        /// How long it may take, as 500ms, 30s; at most the function's own time
        #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
        timeout: Option<Duration>,
        /// Nothing for stdin, whatever this command's is
        #[arg(short, long)]
        no_stdin: bool,
        /// Say on stderr where the time went
        #[arg(long)]
        timings: bool,
    },
    /// List functions
    #[command(after_help = "Example:\n  coldspark function ls")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        #[command(flatten)]
        shape: Shape,
    },
    /// Remove functions, with the snapshots that were made for them
    #[command(after_help = "Example:\n  coldspark function rm resize")]
    Rm {
        #[command(flatten)]
        socket: SocketArgument,
        #[arg(required = true, value_name = "FUNCTION")]
        functions: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct Deploy {
    #[command(flatten)]
    socket: SocketArgument,
    /// Its name: a-z 0-9 -
    function: String,
    #[command(flatten)]
    from: Source,
    /// Run once by /bin/sh before the function is frozen
    #[arg(long, value_name = "SCRIPT")]
    prepare: Option<String>,
    /// Run once before the function is frozen, without a shell: the words are separated by spaces
    #[arg(long, value_name = "COMMAND", conflicts_with = "prepare")]
    prepare_command: Option<String>,
    /// What is run for each invocation
    #[arg(last = true, required = true, value_name = "HANDLER")]
    handler: Vec<String>,
    /// A variable for the handler
    #[arg(short, long = "env", value_name = "K=V", value_parser = parse_pair)]
    env: Vec<(String, String)>,
    /// The handler's working folder
    #[arg(short = 'w', long, value_name = "DIR", default_value = "")]
    cwd: String,
    /// The user that the handler runs as
    #[arg(short, long, default_value = "")]
    user: String,
    /// How long the handler may take [usually: 30s]
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    timeout: Option<Duration>,
    /// Most invocations at a time [usually: 16]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    concurrency: u32,
    /// Most invocations that wait for their turn [usually: 64]
    #[arg(long, value_name = "N")]
    queue: Option<u32>,
    /// How long one waits for its turn [usually: 10s]
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    queue_timeout: Option<Duration>,
    /// Invocations in one VM, one after the other; what one leaves behind the next one finds
    #[arg(long, value_name = "N", default_value_t = 1)]
    reuse: u32,
    /// VMs kept ready, whatever is asked for
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_ready: u32,
    /// How long a VM that nothing asks for is kept [usually: 60s]
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    idle_ttl: Option<Duration>,
    /// How far the VMs that stand ready have come
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    #[arg(long, value_enum)]
    memory_mode: Option<MemoryMode>,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    net: PoolNetArguments,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// Made from this image: it is booted until its agent says hello
    #[arg(long)]
    image: Option<String>,
    /// Made from this snapshot, by id or name
    #[arg(long)]
    snapshot: Option<String>,
    /// Made from the embedded test guest
    #[arg(long)]
    embedded: bool,
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = pair.ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

fn ms(time: Duration) -> u32 {
    // What is too long is refused by the service.
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn command(args: Vec<String>) -> proto::GuestCommand {
    proto::GuestCommand { args, ..Default::default() }
}

pub async fn run(what: Command) -> anyhow::Result<ExitCode> {
    match what {
        Command::Deploy(arguments) => deploy(*arguments).await?,
        Command::Invoke { socket, function, env, timeout, no_stdin, timings } => {
            let start = proto::InvokeStart {
                function,
                env: env.into_iter().collect(),
                timeout_ms: timeout.map_or(0, ms),
            };
            return invoke(&socket, start, no_stdin, timings).await;
        }
        Command::Ls { socket, shape } => list(&socket, shape).await?,
        Command::Rm { socket, functions } => {
            let mut client = socket.connect().await?.functions;
            for function in functions {
                client.delete_function(proto::DeleteFunctionRequest { function: function.clone() }).await?;
                output::line(&function)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn deploy(arguments: Deploy) -> anyhow::Result<()> {
    let from = match arguments.from {
        Source { image: Some(image), .. } => From::Image(image),
        Source { snapshot: Some(snapshot), .. } => From::Snapshot(snapshot),
        _ => From::Embedded(true),
    };
    let script = arguments.prepare.map(|script| vec!["/bin/sh".to_owned(), "-c".to_owned(), script]);
    let words = arguments.prepare_command.map(|line| line.split_whitespace().map(str::to_owned).collect());
    let request = proto::DeployRequest {
        name: arguments.function,
        from: Some(from),
        prepare: script.or(words).map(command),
        settings: Some(proto::FunctionSettings {
            handler: Some(proto::GuestCommand {
                env: arguments.env.into_iter().collect(),
                cwd: arguments.cwd,
                user: arguments.user,
                ..command(arguments.handler)
            }),
            timeout_ms: arguments.timeout.map_or(0, ms),
            concurrency: arguments.concurrency,
            queue: arguments.queue,
            queue_timeout_ms: arguments.queue_timeout.map(ms),
            invocations_per_vm: arguments.reuse,
            min_ready: arguments.min_ready,
            idle_ttl_ms: arguments.idle_ttl.map(ms),
            mode: arguments.mode.map_or(0, Mode::number),
            memory_mode: arguments.memory_mode.map_or(0, MemoryMode::number),
            limits: arguments.limits.limits(),
            networks: arguments.net.interfaces()?,
        }),
    };
    let mut events = arguments.socket.connect().await?.functions.deploy(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Phase(line)) => output::note(&line),
            Some(Event::Output(bytes)) => output::note_bytes(&bytes),
            Some(Event::Function(function)) => {
                output::line(&format!(
                    "{}  revision {}  {}",
                    function.name, function.revision, function.snapshot
                ))?;
                return Ok(());
            }
            None => {}
        }
    }
    bail!("the service ended the deployment without a word")
}

async fn invoke(
    socket: &SocketArgument,
    start: proto::InvokeStart,
    no_stdin: bool,
    timings: bool,
) -> anyhow::Result<ExitCode> {
    let mut client = socket.connect().await?.functions;
    let message = |message| proto::InvokeStreamRequest { message: Some(message) };
    let (pieces_in, pieces) = tokio::sync::mpsc::channel(PIECES_MAX);
    pieces_in.send(message(In::Start(start))).await?;
    let (failed_in, mut failed) = tokio::sync::mpsc::channel(1);
    if !no_stdin && !std::io::stdin().is_terminal() {
        tokio::spawn(async move {
            let mut stdin = tokio::io::stdin();
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                let count = match stdin.read(&mut piece).await {
                    Ok(0) => return,
                    Ok(count) => count,
                    // The stream stays open: the handler is not to take a part of its payload for all of it.
                    Err(error) => {
                        let _ = failed_in.send((error, pieces_in)).await;
                        return;
                    }
                };
                let bytes = piece.get(..count).unwrap_or_default().to_vec();
                if pieces_in.send(message(In::Stdin(bytes.into()))).await.is_err() {
                    return;
                }
            }
        });
    } else {
        drop(pieces_in);
    }
    let result = async {
        let requests = tokio_stream::wrappers::ReceiverStream::new(pieces);
        let mut responses = client.invoke_stream(requests).await?.into_inner();
        loop {
            let response = tokio::select! {
                response = responses.message() => response?,
                Some((error, _open)) = failed.recv() => {
                    return Err(anyhow::Error::from(error).context("cannot read stdin"));
                }
            };
            let Some(response) = response else { break };
            match response.message {
                Some(Out::Stdout(bytes)) => {
                    let mut out = std::io::stdout().lock();
                    out.write_all(&bytes).and_then(|()| out.flush())?;
                }
                Some(Out::Stderr(bytes)) => output::note_bytes(&bytes),
                Some(Out::End(end)) => return Ok(end),
                None => {}
            }
        }
        bail!("the service ended the invocation without a word")
    };
    let end: proto::InvocationEnd = match result.await {
        Ok(end) => end,
        Err(error) => {
            output::failed(&error);
            return Ok(FAILED.into());
        }
    };
    if timings {
        let times = end.timings.unwrap_or_default();
        let how = match end.vm_origin() {
            proto::VmOrigin::Ready => "was ready",
            proto::VmOrigin::Reused => "used again",
            _ => "started",
        };
        let reached: String = [&end.slot_address, &end.slot_address6]
            .into_iter()
            .filter(|address| !address.is_empty())
            .map(|address| format!("  {address}"))
            .collect();
        output::note(&format!(
            "turn {}, VM {} ({how}), handler started {}, ran {}; {}{reached}",
            units::us(times.queue_us),
            units::us(times.vm_us),
            units::us(times.start_us),
            units::us(times.run_us),
            end.vm
        ));
    }
    Ok(match end.how.context("the service did not say how the handler ended")? {
        How::ExitStatus(status) => u8::try_from(status).unwrap_or(u8::MAX).into(),
        How::Signal(signal) => 128u8.saturating_add(u8::try_from(signal).unwrap_or(u8::MAX)).into(),
        How::Failure(why) => {
            output::note(&format!("error: the handler could not be run to its end: {why}"));
            FAILED.into()
        }
    })
}

async fn list(socket: &SocketArgument, shape: Shape) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.functions;
    let functions = all_pages(async |page_token| {
        let request = proto::ListFunctionsRequest { page_token, page_size: 0 };
        let list = client.list_functions(request).await?.into_inner();
        Ok((list.functions, list.next_page_token))
    })
    .await?;
    if shape.json {
        let functions: Vec<_> = functions.iter().map(value).collect();
        return Ok(output::json(&json!({ "functions": functions }))?);
    }
    if shape.quiet {
        return Ok(output::lines(functions.iter().map(|one| one.name.as_str()))?);
    }
    let mut table = Table::new(&[
        "NAME",
        "REVISION",
        "FROM",
        "HANDLER",
        "RUNNING",
        "QUEUED",
        "SUCCEEDED",
        "FAILED",
        "REFUSED",
    ]);
    for function in &functions {
        table.row([
            function.name.clone(),
            function.revision.to_string(),
            function.from.clone(),
            handler(function).join(" "),
            function.running.to_string(),
            function.queued.to_string(),
            function.succeeded.to_string(),
            (function.failed + function.timed_out).to_string(),
            function.refused.to_string(),
        ]);
    }
    Ok(output::print(&table.text())?)
}

fn handler(function: &proto::Function) -> Vec<String> {
    let settings = function.settings.as_ref();
    settings.and_then(|settings| settings.handler.as_ref()).map(|it| it.args.clone()).unwrap_or_default()
}

fn value(function: &proto::Function) -> Value {
    let settings = function.settings.clone().unwrap_or_default();
    let env: HashMap<_, _> = settings.handler.unwrap_or_default().env;
    json!({
        "name": function.name,
        "revision": function.revision,
        "from": function.from,
        "snapshot": function.snapshot,
        "own_snapshot": function.own_snapshot,
        "handler": handler(function),
        "env": env,
        "timeout_ms": settings.timeout_ms,
        "concurrency": settings.concurrency,
        "queue": settings.queue,
        "queue_timeout_ms": settings.queue_timeout_ms,
        "invocations_per_vm": settings.invocations_per_vm,
        "min_ready": settings.min_ready,
        "idle_ttl_ms": settings.idle_ttl_ms,
        "networks": network::made_ahead(&settings.networks),
        "running": function.running,
        "queued": function.queued,
        "warm": function.warm,
        "succeeded": function.succeeded,
        "failed": function.failed,
        "timed_out": function.timed_out,
        "refused": function.refused,
        "cancelled": function.cancelled,
        "reused": function.reused,
    })
}
