//! AgentService's streams: commands and files in a guest. A caller that goes away drops the stream, which kills what it
//! began.

use std::collections::HashMap;
use std::future::pending;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::proto;
use super::status::invalid;
use crate::agent::streams::{Pipe, What};
use crate::agent::{End, Opened};
use crate::fleet::Fleet;
use crate::fleet::error::FleetError;
use crate::fleet::limits::EXEC_TIMEOUT_MAX;
use crate::fleet::streams::{Heard, Stream};
use proto::exec_exit::How;
use proto::exec_request::Message as ExecIn;
use proto::exec_response::Message as ExecOut;
use proto::get_file_response::Message as GetOut;
use proto::put_file_request::Message as PutIn;

type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;
pub type ExecStream = Answers<proto::ExecResponse>;
pub type GetFileStream = Answers<proto::GetFileResponse>;

/// Answers that the caller has not taken.
const ANSWERS_WAITING_MAX: usize = 4;

pub async fn exec(fleet: &Fleet, mut requests: Streaming<proto::ExecRequest>) -> Result<ExecStream, Status> {
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(ExecIn::Start(start)) = first else {
        return Err(invalid("the first message of Exec must be `start`"));
    };
    let within = match start.timeout_ms {
        0 => None,
        ms => Some(Duration::from_millis(ms.into())),
    };
    if within.is_some_and(|within| within > EXEC_TIMEOUT_MAX) {
        return Err(invalid(format!(
            "a timeout of {} ms; the most is {}",
            start.timeout_ms,
            EXEC_TIMEOUT_MAX.as_millis()
        )));
    }
    let vm = fleet.vm(&start.vm)?;
    let stream = vm.open(command(start.args, start.env, start.cwd, start.user)).await?;
    let (answers, receiver) = mpsc::channel(ANSWERS_WAITING_MAX);
    tokio::spawn(run(stream, requests, within, answers));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

pub fn command(args: Vec<String>, env: HashMap<String, String>, folder: String, user: String) -> What {
    let mut environment: Vec<(Vec<u8>, Vec<u8>)> =
        env.into_iter().map(|(name, value)| (name.into_bytes(), value.into_bytes())).collect();
    environment.sort();
    What::Exec {
        arguments: args.into_iter().map(String::into_bytes).collect(),
        environment,
        folder: folder.into_bytes(),
        user: user.into_bytes(),
    }
}

/// Passes input and output on until the command or the caller ends.
async fn run(
    stream: Stream,
    mut requests: Streaming<proto::ExecRequest>,
    within: Option<Duration>,
    answers: mpsc::Sender<Result<proto::ExecResponse, Status>>,
) {
    let input = async {
        while let Some(request) = requests.next().await {
            match request?.message {
                Some(ExecIn::Stdin(bytes)) => stream.write(bytes).await,
                Some(ExecIn::StdinEnd(true)) => stream.end_stdin(),
                Some(ExecIn::Signal(signal)) => stream.signal(signal)?,
                _ => {
                    return Err(invalid(
                        "messages after the first of Exec are `stdin`, `stdin_end` or `signal`",
                    ));
                }
            }
        }
        stream.end_stdin();
        // The output's end is the command's.
        pending::<Result<(), Status>>().await
    };
    let say = async |message| answers.send(Ok(proto::ExecResponse { message: Some(message) })).await.is_ok();
    let output = async {
        let pid = match stream.opened() {
            Some(Opened::Exec { pid, .. }) => pid,
            _ => 0,
        };
        if !say(ExecOut::Started(proto::ExecStarted { pid })).await {
            return Ok(());
        }
        loop {
            let said = match stream.next().await? {
                Heard::Output(Pipe::Stdout, bytes) => say(ExecOut::Stdout(bytes)).await,
                Heard::Output(Pipe::Stderr, bytes) => say(ExecOut::Stderr(bytes)).await,
                Heard::End(end) => {
                    let how = match end {
                        End::Exited(status) => How::Status(status),
                        End::Signalled(signal) => How::Signal(signal),
                        End::Failed(reason) => {
                            return Err(Status::internal(format!("the command was lost: {reason}")));
                        }
                    };
                    say(ExecOut::Exit(proto::ExecExit { how: Some(how) })).await;
                    return Ok(());
                }
            };
            if !said {
                return Ok(());
            }
        }
    };
    let time = async {
        match within {
            Some(within) => {
                tokio::time::sleep(within).await;
                FleetError::ExecTimeout(within.as_millis())
            }
            None => pending().await,
        }
    };
    let result = tokio::select! {
        result = output => result,
        result = input => result,
        error = time => Err(error.into()),
        () = answers.closed() => return,
    };
    // Killed now if it is still there, whether or not the caller takes the error.
    drop(stream);
    if let Err(status) = result {
        let _ = answers.send(Err(status)).await;
    }
}

pub async fn put_file(
    fleet: &Fleet,
    mut requests: Streaming<proto::PutFileRequest>,
) -> Result<proto::PutFileResponse, Status> {
    let first = requests.message().await?.and_then(|request| request.message);
    let Some(PutIn::Start(start)) = first else {
        return Err(invalid("the first message of PutFile must be `start`"));
    };
    let vm = fleet.vm(&start.vm)?;
    let stream = vm.open(What::Put { path: start.path.into_bytes(), mode: start.mode }).await?;
    let mut bytes = 0;
    let input = async {
        while let Some(request) = requests.next().await {
            match request?.message {
                Some(PutIn::Data(data)) => {
                    bytes += data.len() as u64;
                    stream.write(data).await;
                }
                _ => return Err(invalid("messages after the first of PutFile must be `data`")),
            }
        }
        stream.end_stdin();
        pending::<Result<(), Status>>().await
    };
    let output = async {
        loop {
            if let Heard::End(end) = stream.next().await? {
                return complete(end);
            }
        }
    };
    tokio::select! {
        result = output => result?,
        result = input => result?,
    }
    Ok(proto::PutFileResponse { bytes })
}

pub async fn get_file(fleet: &Fleet, request: proto::GetFileRequest) -> Result<GetFileStream, Status> {
    let vm = fleet.vm(&request.vm)?;
    let stream = vm.open(What::Get { path: request.path.into_bytes() }).await?;
    let (answers, receiver) = mpsc::channel(ANSWERS_WAITING_MAX);
    tokio::spawn(send_file(stream, answers));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn send_file(stream: Stream, answers: mpsc::Sender<Result<proto::GetFileResponse, Status>>) {
    let say =
        async |message| answers.send(Ok(proto::GetFileResponse { message: Some(message) })).await.is_ok();
    let output = async {
        let (bytes, mode) = match stream.opened() {
            Some(Opened::Get { bytes, mode }) => (bytes, mode),
            _ => (0, 0),
        };
        let mut listens = say(GetOut::Info(proto::FileInfo { bytes, mode })).await;
        while listens {
            match stream.next().await? {
                Heard::Output(_, bytes) => listens = say(GetOut::Data(bytes)).await,
                Heard::End(end) => return complete(end),
            }
        }
        Ok(())
    };
    let result = tokio::select! {
        result = output => result,
        () = answers.closed() => return,
    };
    if let Err(status) = result {
        let _ = answers.send(Err(status)).await;
    }
}

/// How a file's stream must end.
fn complete(end: End) -> Result<(), Status> {
    match end {
        End::Exited(0) => Ok(()),
        End::Failed(reason) => Err(Status::internal(format!("the guest's agent gave up: {reason}"))),
        End::Exited(_) | End::Signalled(_) => {
            Err(Status::internal("the guest's agent did not finish the file"))
        }
    }
}
