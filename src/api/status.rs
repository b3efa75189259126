//! Errors of the fleet as gRPC statuses, with `google.rpc` details for programs: an ErrorInfo always (its reasons are
//! listed in common.proto), a RetryInfo where the same request may succeed later.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::fleet::error::{FleetError, Kind};
use crate::telemetry::metrics;

/// Longest message of a status: it travels in a header.
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// Longest value in the details, which travel in a header too.
const VALUE_BYTES_MAX: usize = 256;
/// Who names the reasons.
const DOMAIN: &str = "coldspark";
/// What a caller is told to wait before it asks again for what is in use just now.
const RETRY_AFTER: Duration = Duration::from_millis(100);

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
            Kind::Unavailable => Code::Unavailable,
            Kind::Internal => Code::Internal,
        };
        metrics().error(error.reason());
        let mut message = error.to_string();
        if code == Code::Internal {
            tracing::warn!(error = message, "a request failed");
        }
        cut(&mut message, MESSAGE_BYTES_MAX);
        let about = error.about().into_iter().map(|(key, mut value)| {
            cut(&mut value, VALUE_BYTES_MAX);
            (key.to_owned(), value)
        });
        let mut details = info(error.reason(), about.collect());
        if error.passes() {
            details.set_retry_info(Some(RETRY_AFTER));
        }
        Status::with_error_details(code, message, details)
    }
}

/// A status with a reason for programs.
pub fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    Status::with_error_details(code, message, info(reason, HashMap::new()))
}

/// For requests whose shape is wrong.
pub fn invalid(message: impl Into<String>) -> Status {
    status(Code::InvalidArgument, "INVALID_REQUEST", message)
}

/// For callers that have not shown who they are.
pub fn unauthenticated(message: impl Into<String>) -> Status {
    status(Code::Unauthenticated, "NOT_AUTHENTICATED", message)
}

/// For callers whose role does not suffice.
pub fn denied(message: impl Into<String>) -> Status {
    status(Code::PermissionDenied, "ROLE_TOO_LOW", message)
}

/// For a request that is for no method of this service.
pub fn no_method(path: &str) -> Status {
    let path: String = path.chars().filter(|c| !c.is_control()).take(120).collect();
    let message = format!("this service has no method {path}; is the client of a newer release?");
    status(Code::Unimplemented, "UNSUPPORTED", message)
}

/// For a limit of the service on its callers.
pub fn limit_reached(message: impl Into<String>) -> Status {
    status(Code::ResourceExhausted, "LIMIT_REACHED", message)
}

fn info(reason: &str, about: HashMap<String, String>) -> ErrorDetails {
    ErrorDetails::with_error_info(reason, DOMAIN, about)
}

/// Cuts a text to so many bytes, at a character.
fn cut(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
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

    #[test]
    fn the_details_name_the_reason_and_what_it_is_about() {
        let status = Status::from(FleetError::PoolFull { pool: "web".into(), max: 3 });
        let details = status.get_error_details();
        let info = details.error_info().expect("an ErrorInfo");
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("POOL_FULL", "coldspark"));
        assert_eq!((info.metadata["pool"].as_str(), info.metadata["limit"].as_str()), ("web", "3"));
        assert!(details.retry_info().is_some());

        let status = Status::from(FleetError::NoVm("x".repeat(5000)));
        let details = status.get_error_details();
        assert_eq!(details.error_info().map(|info| info.metadata["vm"].len()), Some(VALUE_BYTES_MAX));
        assert!(details.retry_info().is_none(), "waiting does not bring a VM");

        let shape = invalid("no");
        assert_eq!(
            shape.get_error_details().error_info().map(|info| info.reason.clone()).as_deref(),
            Some("INVALID_REQUEST")
        );
    }

    #[test]
    fn every_reason_is_in_the_proto_file() {
        let told = include_str!("../../proto/coldspark/v1/common.proto");
        let source = concat!(
            include_str!("../fleet/reason.rs"),
            include_str!("../fleet/slots/error.rs"),
            include_str!("status.rs")
        );
        let mut found = 0;
        for word in source
            .split('"')
            .filter(|word| word.len() > 5 && word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
        {
            assert!(told.contains(&format!("//   {word} ")), "{word} is not told in common.proto");
            found += 1;
        }
        assert!(found > 25, "{found}");
    }
}
