//! SnapshotService.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};

use super::convert::{self, optional};
use super::pages::Page;
use super::proto;
use super::proto::snapshot_service_server::SnapshotService;
use super::replays::Replays;
use crate::fleet::Fleet;
use crate::fleet::claims::{Claim, Method};
use crate::fleet::error::FleetError;
use crate::fleet::keeping::KeptSoFar;
use crate::fleet::snapshots::{CreateSnapshot, Described, Listing, Signed, WorkingSet};

/// Most damaged snapshots that a list tells.
const DAMAGED_MAX: usize = 100;

/// The service.
pub struct Snapshots {
    fleet: Arc<Fleet>,
    replays: Arc<Replays<proto::CreateSnapshotResponse>>,
}

impl Snapshots {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet, replays: Arc::default() }
    }
}

#[tonic::async_trait]
impl SnapshotService for Snapshots {
    async fn create_snapshot(
        &self,
        request: Request<proto::CreateSnapshotRequest>,
    ) -> Result<Response<proto::CreateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let (id, asked) = (request.request_id.clone(), request.encode_to_vec());
        let claim = Claim::new(Method::CreateSnapshot, &id, &asked);
        let fleet = Arc::clone(&self.fleet);
        let take = async move {
            if let Some(earlier) = fleet.earlier_snapshot(claim.as_ref()).await? {
                let response =
                    proto::CreateSnapshotResponse { snapshot: Some(snapshot(earlier)), ..Default::default() };
                return Ok(response);
            }
            let request = CreateSnapshot {
                vm: request.vm,
                name: optional(request.name),
                stop_after: request.stop_after,
                function: None,
                claim,
            };
            let taken = fleet.create_snapshot(request).await?;
            Ok(proto::CreateSnapshotResponse {
                snapshot: Some(snapshot(taken.snapshot)),
                pause_us: taken.pause_us,
                total_us: taken.total_us,
                steps: convert::steps(taken.steps),
            })
        };
        // A snapshot that has begun is made, whether its caller waits or not; who asks again waits for it.
        let replays = Arc::clone(&self.replays);
        let taken = tokio::spawn(async move { replays.once(&id, &asked, take).await });
        let failed = |error| FleetError::Internal(format!("a task of the service failed: {error}"));
        Ok(Response::new(taken.await.map_err(failed)??))
    }

    async fn list_snapshots(
        &self,
        request: Request<proto::ListSnapshotsRequest>,
    ) -> Result<Response<proto::ListSnapshotsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::asked(request.page_size, &request.page_token)?;
        let Listing { whole, damaged } = self.fleet.list_snapshots().await?;
        let key = |one: &Described| format!("{:020} {}", one.created_unix_ms, one.id);
        let (snapshots, next_page_token) = page.of(whole, key, snapshot);
        let damaged = damaged.into_iter().take(if page.is_first() { DAMAGED_MAX } else { 0 });
        let damaged = damaged.map(|(id, reason)| proto::DamagedSnapshot { id, reason }).collect();
        Ok(Response::new(proto::ListSnapshotsResponse { snapshots, damaged, next_page_token }))
    }

    async fn get_snapshot(
        &self,
        request: Request<proto::GetSnapshotRequest>,
    ) -> Result<Response<proto::Snapshot>, Status> {
        Ok(Response::new(snapshot(self.fleet.snapshot(&request.into_inner().snapshot).await?)))
    }

    async fn delete_snapshot(
        &self,
        request: Request<proto::DeleteSnapshotRequest>,
    ) -> Result<Response<proto::DeleteSnapshotResponse>, Status> {
        self.fleet.delete_snapshot(&request.into_inner().snapshot).await?;
        Ok(Response::new(proto::DeleteSnapshotResponse {}))
    }

    async fn verify_snapshot(
        &self,
        request: Request<proto::VerifySnapshotRequest>,
    ) -> Result<Response<proto::VerifySnapshotResponse>, Status> {
        let (verified_bytes, signed) = self.fleet.verify_snapshot(&request.into_inner().snapshot).await?;
        Ok(Response::new(proto::VerifySnapshotResponse { verified_bytes, signature: signed.map(signature) }))
    }
}

fn snapshot(snapshot: Described) -> proto::Snapshot {
    proto::Snapshot {
        id: snapshot.id,
        name: snapshot.name.unwrap_or_default(),
        created_unix_ms: snapshot.created_unix_ms,
        parent: snapshot.parent.unwrap_or_default(),
        origin: snapshot.kernel,
        vcpus: snapshot.vcpus.into(),
        memory_bytes: snapshot.memory_bytes,
        stored_bytes: snapshot.stored_bytes,
        protocol: convert::protocol_out(snapshot.protocol).into(),
        agent: snapshot.agent,
        disks: snapshot.disks,
        cpu_vendor: snapshot.cpu_vendor,
        tsc_khz: snapshot.tsc_khz,
        working_set: Some(working_set(&snapshot.working_set, snapshot.kept)),
        signature: snapshot.signed.map(signature),
    }
}

fn signature(signed: Signed) -> proto::Signature {
    let (key, problem) = match signed.key {
        Ok(key) => (key, String::new()),
        Err(problem) => (String::new(), problem),
    };
    proto::Signature { key, name: signed.name.unwrap_or_default(), trusted: signed.trusted, problem }
}

fn working_set(set: &WorkingSet, kept: KeptSoFar) -> proto::WorkingSet {
    let (touched_bytes, written_bytes) = set.bytes();
    let learnt = set.learnt().is_some();
    proto::WorkingSet {
        recordings: set.recordings(),
        learnt,
        touched_bytes,
        written_bytes,
        folded_bytes: kept.folded_bytes,
        read_again: kept.again,
    }
}
