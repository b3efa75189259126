//! MetricsService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::proto;
use super::proto::metrics_service_server::MetricsService;
use crate::telemetry::exposition::Exposition;

/// The service.
pub struct Metrics(Arc<Exposition>);

impl Metrics {
    pub fn new(exposition: Arc<Exposition>) -> Self {
        Self(exposition)
    }
}

#[tonic::async_trait]
impl MetricsService for Metrics {
    async fn get_metrics(
        &self,
        _request: Request<proto::GetMetricsRequest>,
    ) -> Result<Response<proto::GetMetricsResponse>, Status> {
        Ok(Response::new(proto::GetMetricsResponse { text: self.0.text() }))
    }
}
