//! Failures for programs, and for metrics: names and what they are about. The names stay as they are when sentences change.

use super::error::FleetError;
use super::network::NetworkError;
use crate::snapshot::cause::Cause;
use crate::worker::protocol::FaultKind;

impl FleetError {
    /// The failure's name: one of these words for good, in capitals with underscores (`google.rpc.ErrorInfo.reason`).
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoVm(_) => "VM_NOT_FOUND",
            Self::NotFound { .. } => "NOT_FOUND",
            Self::PoolFull { .. } => "POOL_FULL",
            Self::FunctionBusy { .. } => "FUNCTION_BUSY",
            Self::Prepare { .. } => "PREPARE_FAILED",
            Self::Exists { .. } => "NAME_TAKEN",
            Self::BadName { .. } => "BAD_NAME",
            Self::Invalid(_) => "INVALID_REQUEST",
            Self::WrongState(_) => "WRONG_STATE",
            Self::TakenOverLater(_) => "TAKEN_OVER_LATER",
            Self::Ending => "SERVICE_ENDING",
            Self::Limit { .. } => "LIMIT_REACHED",
            Self::LittleMemory { .. } => "LITTLE_MEMORY",
            Self::NoLimits(_) => "LIMITS_UNAVAILABLE",
            Self::NotReady { .. } => "NOT_READY_IN_TIME",
            Self::EndedEarly { .. } => "VM_ENDED_EARLY",
            Self::Ended(_) => "VM_ENDED",
            Self::NoAgentInSnapshot => "NO_AGENT_IN_SNAPSHOT",
            Self::NoAgent => "NO_AGENT",
            Self::AgentTimeout(_) => "AGENT_TIMEOUT",
            Self::WrongGeneration | Self::WrongAddresses { .. } => "IDENTITY_NOT_CONFIRMED",
            Self::AgentBusy => "AGENT_BUSY",
            Self::ExecTimeout(_) => "COMMAND_TIMEOUT",
            Self::StreamLost(_) => "STREAM_LOST",
            Self::Agent(_) => "AGENT_REFUSED",
            Self::Network(NetworkError::Slot(error)) => error.reason(),
            Self::Network(_) => "NETWORK",
            Self::Fault(fault) => match fault.kind {
                FaultKind::InvalidInput => "INVALID_REQUEST",
                FaultKind::Damaged => "DATA_DAMAGED",
                FaultKind::Unsupported => "UNSUPPORTED",
                FaultKind::WrongState => "WRONG_STATE",
                FaultKind::Exhausted => "HOST_EXHAUSTED",
                FaultKind::Internal => "INTERNAL",
            },
            Self::Store { cause, .. } => cause_reason(*cause),
            Self::Io { source, .. } => match Cause::of_io(source) {
                Cause::Exhausted => "HOST_EXHAUSTED",
                _ => "INTERNAL",
            },
            Self::WorkerTimeout(_) => "WORKER_TIMEOUT",
            Self::WorkerConfused | Self::WorkerKilled(_) | Self::Channel(_) => "WORKER_FAILED",
            Self::Internal(_) => "INTERNAL",
        }
    }

    /// What the failure is about, for programs: names and numbers of its message.
    pub fn about(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::NoVm(vm) => vec![("vm", vm.clone())],
            Self::NotFound { what, name } | Self::BadName { what, name } | Self::Exists { what, name } => {
                vec![("what", (*what).to_owned()), ("name", name.clone())]
            }
            Self::PoolFull { pool, max } => vec![("pool", pool.clone()), ("limit", max.to_string())],
            Self::FunctionBusy { function, .. } => vec![("function", function.clone())],
            Self::Limit { what, limit, .. } => {
                vec![("what", (*what).to_owned()), ("limit", limit.to_string())]
            }
            Self::LittleMemory { available_mib, reserve_mib } => {
                vec![("available_mib", available_mib.to_string()), ("reserve_mib", reserve_mib.to_string())]
            }
            _ => Vec::new(),
        }
    }

    /// Whether the same request may succeed a moment later, with nothing changed by the caller.
    pub fn passes(&self) -> bool {
        match self {
            Self::FunctionBusy { .. }
            | Self::PoolFull { .. }
            | Self::AgentBusy
            | Self::TakenOverLater(_)
            | Self::Ending
            | Self::LittleMemory { .. } => true,
            Self::Network(NetworkError::Slot(error)) => error.passes(),
            _ => false,
        }
    }
}

fn cause_reason(cause: Cause) -> &'static str {
    match cause {
        Cause::InvalidInput => "INVALID_REQUEST",
        Cause::NotFound => "NOT_FOUND",
        Cause::AlreadyExists => "NAME_TAKEN",
        Cause::Damaged => "DATA_DAMAGED",
        Cause::NotTrusted => "SNAPSHOT_NOT_TRUSTED",
        Cause::Unsupported => "UNSUPPORTED",
        Cause::WrongState => "WRONG_STATE",
        Cause::Exhausted => "HOST_EXHAUSTED",
        Cause::Internal => "INTERNAL",
    }
}
