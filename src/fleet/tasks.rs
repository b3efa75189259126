//! Work that must not hold others up, and work that must not be given up.

#![forbid(unsafe_code)]

use std::future::Future;

use super::error::FleetError;

/// Runs what waits for the disk where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FleetError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| FleetError::Internal(format!("a task of the service failed: {error}")))
}

/// Does what must not be given up in its middle, also when its caller goes away.
pub(super) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, FleetError>> + Send + 'static,
) -> Result<T, FleetError> {
    tokio::spawn(work)
        .await
        .map_err(|error| FleetError::Internal(format!("a task of the service failed: {error}")))?
}
