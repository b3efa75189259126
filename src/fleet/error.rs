//! What can go wrong in the fleet, told so that a person can act on it, and sorted for the API.

use std::io;

use super::limits::*;
use super::network::NetworkError;
use crate::agent::AgentError;
use crate::snapshot::cause::Cause;
use crate::worker::channel::ChannelError;
use crate::worker::protocol::{Fault, FaultKind};

/// The kinds of failure that a client tells apart; each is one gRPC code of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    DataLoss,
    DeadlineExceeded,
    Aborted,
    Unimplemented,
    Unavailable,
    Internal,
}

/// Why the fleet could not do something.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error("there is no VM {0:?}; `coldspark vm ls` lists them")]
    NoVm(String),
    #[error("there is no {what} {name:?}; `coldspark {what} ls` lists them")]
    NotFound { what: &'static str, name: String },
    #[error(
        "all {max} VMs that the pool {pool:?} may have are in use; end some, or let it have more (`coldspark pool set {pool} --max N`)"
    )]
    PoolFull { pool: String, max: u32 },
    #[error(
        "the function {function:?} can take no more: {why}; ask again later, or deploy it with a higher --concurrency or --queue"
    )]
    FunctionBusy { function: String, why: String },
    #[error("the prepare command {how}; it wrote last: {last:?}")]
    Prepare { how: String, last: String },
    #[error("{what} {name:?} exists already; choose another name or delete it first")]
    Exists { what: &'static str, name: String },
    #[error("{name:?} is no name for {what}: use 1 to {NAME_BYTES_MAX} of a-z 0-9 -, not beginning with -{}", if *what == "a VM" { " or vm-" } else { "" })]
    BadName { what: &'static str, name: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    WrongState(String),
    #[error(
        "the VM {0}, which this request has made, is being taken over from an earlier service still; ask again"
    )]
    TakenOverLater(String),
    #[error("the service ends and starts no VM any more; ask the next one")]
    Ending,
    #[error("{what} are at their limit of {limit}; {hint}")]
    Limit { what: &'static str, limit: usize, hint: &'static str },
    #[error(
        "{available_mib} MiB of memory are left on this host, and {reserve_mib} are to stay free; end some VMs, or serve with a smaller --memory-reserve"
    )]
    LittleMemory { available_mib: u64, reserve_mib: u64 },
    #[error(
        "this host has no control groups in which a VM could be limited: {0}; leave the limits out, or see `coldspark doctor`"
    )]
    NoLimits(String),
    #[error("the VM was not ready after {seconds} s: {waited_for} did not come; {found}")]
    NotReady { seconds: u64, waited_for: String, found: String },
    #[error("the VM ended before it was ready: {reason}; {last_lines}")]
    EndedEarly { reason: String, last_lines: String },
    #[error("the VM ended: {0}")]
    Ended(String),
    #[error(
        "the snapshot's guest has no agent that could give each clone its own identity; ask for identity UNMANAGED, or take the snapshot when an agent has said hello"
    )]
    NoAgentInSnapshot,
    #[error("the guest has no agent: none has said hello on the agent port")]
    NoAgent,
    #[error(
        "the guest's agent did not answer within {0} ms; is the guest busy or stuck? `coldspark vm console` shows"
    )]
    AgentTimeout(u128),
    #[error("the clone's agent confirmed another generation than it was given; the clone was ended")]
    WrongGeneration,
    #[error("the clone's guest was given {told}, and read back {found}; the clone was ended")]
    WrongAddresses { told: String, found: String },
    #[error("the guest's agent is in the middle of a request; ask again when it has answered")]
    AgentBusy,
    #[error("the command did not end within {0} ms and was killed")]
    ExecTimeout(u128),
    #[error("what was under way in the guest is lost: {0}")]
    StreamLost(String),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("the worker did not answer within {0} s; delete the VM")]
    WorkerTimeout(u64),
    #[error("the worker answered with something else than was asked; delete the VM and report this")]
    WorkerConfused,
    #[error("a worker did not start: {0}; ask again")]
    WorkerKilled(String),
    #[error("{0}")]
    Channel(#[from] ChannelError),
    /// A failure of the snapshot or image store.
    #[error("{message}")]
    Store { cause: Cause, message: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{0}")]
    Internal(String),
}

impl FleetError {
    /// Sorts the failure for the API.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NoVm(_) | Self::NotFound { .. } => Kind::NotFound,
            Self::Exists { .. } => Kind::AlreadyExists,
            Self::BadName { .. } | Self::Invalid(_) => Kind::InvalidArgument,
            Self::WrongState(_)
            | Self::NoAgentInSnapshot
            | Self::NoAgent
            | Self::AgentBusy
            | Self::NoLimits(_) => Kind::FailedPrecondition,
            Self::Limit { .. }
            | Self::PoolFull { .. }
            | Self::FunctionBusy { .. }
            | Self::TakenOverLater(_)
            | Self::LittleMemory { .. } => Kind::ResourceExhausted,
            Self::NotReady { .. } | Self::AgentTimeout(_) | Self::ExecTimeout(_) | Self::WorkerTimeout(_) => {
                Kind::DeadlineExceeded
            }
            Self::EndedEarly { .. }
            | Self::Prepare { .. }
            | Self::Ended(_)
            | Self::StreamLost(_)
            // Its worker was killed: the same request may go well with another.
            | Self::WorkerKilled(_)
            | Self::Channel(ChannelError::Closed) => Kind::Aborted,
            Self::Ending => Kind::Unavailable,
            Self::Agent(error) => match error.refusal() {
                Some(crate::agent::wire::STATUS_UNKNOWN_KIND) => Kind::Unimplemented,
                Some(crate::agent::wire::STATUS_NOT_FOUND) => Kind::NotFound,
                Some(crate::agent::wire::STATUS_NOT_ALLOWED) => Kind::PermissionDenied,
                Some(crate::agent::wire::STATUS_LIMIT) => Kind::ResourceExhausted,
                Some(
                    crate::agent::wire::STATUS_BAD_PAYLOAD
                    | crate::agent::wire::STATUS_OUT_OF_RANGE
                    | crate::agent::wire::STATUS_NO_DEVICE,
                ) => Kind::InvalidArgument,
                _ => Kind::Internal,
            },
            Self::Network(error) => error.kind(),
            Self::Fault(fault) => match fault.kind {
                FaultKind::InvalidInput => Kind::InvalidArgument,
                FaultKind::Damaged => Kind::DataLoss,
                FaultKind::Unsupported | FaultKind::WrongState => Kind::FailedPrecondition,
                FaultKind::Exhausted => Kind::ResourceExhausted,
                FaultKind::Internal => Kind::Internal,
            },
            Self::Store { cause, .. } => match cause {
                Cause::InvalidInput => Kind::InvalidArgument,
                Cause::NotFound => Kind::NotFound,
                Cause::AlreadyExists => Kind::AlreadyExists,
                Cause::Damaged => Kind::DataLoss,
                Cause::Unsupported | Cause::WrongState | Cause::NotTrusted => Kind::FailedPrecondition,
                Cause::Exhausted => Kind::ResourceExhausted,
                Cause::Internal => Kind::Internal,
            },
            Self::Io { source, .. } => match Cause::of_io(source) {
                Cause::Exhausted => Kind::ResourceExhausted,
                _ => Kind::Internal,
            },
            Self::Channel(_)
            | Self::WorkerConfused
            | Self::WrongGeneration
            | Self::WrongAddresses { .. }
            | Self::Internal(_) => Kind::Internal,
        }
    }

    /// For `map_err` after a system call: `what` begins like "cannot open …".
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
