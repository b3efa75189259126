//! Errors of the fleet as gRPC statuses.

use tonic::{Code, Status};

use crate::fleet::error::{FleetError, Kind};
use crate::telemetry::metrics;

/// Longest message of a status: it travels in a header.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

impl From<FleetError> for Status {
    fn from(error: FleetError) -> Self {
        let code = match error.kind() {
            Kind::InvalidArgument => Code::InvalidArgument,
            Kind::NotFound => Code::NotFound,
            Kind::AlreadyExists => Code::AlreadyExists,
            Kind::FailedPrecondition => Code::FailedPrecondition,
            Kind::PermissionDenied => Code::PermissionDenied,
            Kind::ResourceExhausted => Code::ResourceExhausted,
            Kind::DataLoss => Code::DataLoss,
            Kind::DeadlineExceeded => Code::DeadlineExceeded,
            Kind::Aborted => Code::Aborted,
            Kind::Unimplemented => Code::Unimplemented,
            Kind::Internal => Code::Internal,
        };
        metrics().error(error.reason());
        let mut message = error.to_string();
        if code == Code::Internal {
            tracing::warn!(error = message, "a request failed");
        }
        if message.len() > MESSAGE_BYTES_MAX {
            let end = (0..=MESSAGE_BYTES_MAX).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
            message.truncate(end);
        }
        Status::new(code, message)
    }
}

/// For requests whose shape is wrong.
pub fn invalid(message: impl Into<String>) -> Status {
    Status::invalid_argument(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let status = Status::from(FleetError::Invalid("ä".repeat(5000)));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().len() <= MESSAGE_BYTES_MAX && status.message().chars().all(|c| c == 'ä'));
    }
}
