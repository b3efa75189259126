//! PoolService.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tonic::{Request, Response, Status};

use super::auth::layer::admins_only;
use super::convert::{self, optional};
use super::pages::Page;
use super::proto;
use super::proto::pool_service_server::PoolService;
use super::replays::{Replays, kept_answer};
use super::status::invalid;
use super::{agent, network};
use crate::fleet::Fleet;
use crate::fleet::claims::{Claim, Method};
use crate::fleet::pools::settings::{Mode, Settings};
use crate::fleet::pools::stock::Look;
use crate::fleet::pools::{ChangePool, CreatePool, Named, TakeVm};

/// The service.
pub struct Pools {
    fleet: Arc<Fleet>,
    replays: Replays<proto::TakeVmResponse>,
}

impl Pools {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet, replays: Replays::default() }
    }

    async fn take(
        &self,
        request: proto::TakeVmRequest,
        claim: Option<Claim>,
    ) -> Result<proto::TakeVmResponse, Status> {
        let (op, first_call) = request.first_call.map(agent::first_call_in).transpose()?.unzip();
        let publish = network::publish_in(request.publish)?;
        let request = TakeVm { pool: request.pool, name: optional(request.name), first_call, publish };
        let mut taken = self.fleet.take_vm(request).await?;
        let answer = match (op, taken.answer.take()) {
            (Some(op), Some(answer)) => match agent::first_answer_out(&op, answer) {
                Ok(answer) => Some(answer),
                Err(status) => {
                    // Of another kind than what was asked: a VM to whom nobody will talk.
                    self.fleet.delete_vm(&taken.vm.id).await?;
                    return Err(status);
                }
            },
            _ => None,
        };
        let mut response = proto::TakeVmResponse { vm: None, answer, was_ready: taken.was_ready };
        taken.settle(claim.map(|claim| (claim, response.encode_to_vec())));
        response.vm = Some(convert::vm(&taken.vm));
        Ok(response)
    }

    /// What an earlier daemon took for this request.
    fn earlier(&self, claim: Option<&Claim>) -> Result<Option<proto::TakeVmResponse>, Status> {
        let Some(earlier) = self.fleet.earlier(claim)? else { return Ok(None) };
        let mut response: proto::TakeVmResponse = kept_answer(&earlier)?;
        response.vm = earlier.vms.first().map(|vm| convert::vm(vm));
        Ok(Some(response))
    }
}

#[tonic::async_trait]
impl PoolService for Pools {
    async fn create_pool(
        &self,
        request: Request<proto::CreatePoolRequest>,
    ) -> Result<Response<proto::Pool>, Status> {
        let request = request.into_inner();
        let usual = self.fleet.usual_pool();
        let settings = Settings {
            snapshot: request.snapshot,
            mode: mode_in(request.mode)?,
            min_ready: request.min_ready.unwrap_or(usual.min_ready),
            max: if request.max == 0 { usual.max } else { request.max },
            idle_ttl: request.idle_ttl_ms.map_or(usual.idle_ttl, millis),
            memory_mode: convert::memory_mode_in(request.memory_mode)?,
            managed: convert::identity_in(request.identity)?,
            limits: convert::limits_in(request.limits),
            slots: network::slots_in(request.networks)?,
        };
        let made = self.fleet.create_pool(CreatePool { name: request.name, settings }).await?;
        Ok(Response::new(pool_out(made)))
    }

    async fn get_pool(
        &self,
        request: Request<proto::GetPoolRequest>,
    ) -> Result<Response<proto::Pool>, Status> {
        Ok(Response::new(pool_out(self.fleet.pool(&request.into_inner().pool)?)))
    }

    async fn list_pools(
        &self,
        request: Request<proto::ListPoolsRequest>,
    ) -> Result<Response<proto::ListPoolsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::asked(request.page_size, &request.page_token)?;
        let (pools, next_page_token) = page.of(self.fleet.pools(), |one| one.name.to_string(), pool_out);
        Ok(Response::new(proto::ListPoolsResponse { pools, next_page_token }))
    }

    async fn update_pool(
        &self,
        request: Request<proto::UpdatePoolRequest>,
    ) -> Result<Response<proto::Pool>, Status> {
        let request = request.into_inner();
        let change = ChangePool {
            snapshot: request.snapshot,
            mode: request.mode.map(mode_in).transpose()?,
            min_ready: request.min_ready,
            max: request.max,
            idle_ttl: request.idle_ttl_ms.map(millis),
            memory_mode: request.memory_mode.map(convert::memory_mode_in).transpose()?,
            managed: request.identity.map(convert::identity_in).transpose()?,
            limits: request.limits.map(|limits| convert::limits_in(Some(limits))),
            slots: request.networks.map(|networks| network::slots_in(networks.interfaces)).transpose()?,
        };
        Ok(Response::new(pool_out(self.fleet.change_pool(&request.pool, change).await?)))
    }

    async fn delete_pool(
        &self,
        request: Request<proto::DeletePoolRequest>,
    ) -> Result<Response<proto::DeletePoolResponse>, Status> {
        self.fleet.delete_pool(&request.into_inner().pool).await?;
        Ok(Response::new(proto::DeletePoolResponse {}))
    }

    async fn take_vm(
        &self,
        request: Request<proto::TakeVmRequest>,
    ) -> Result<Response<proto::TakeVmResponse>, Status> {
        if !request.get_ref().publish.is_empty() {
            admins_only(&request, "to publish ports of the host")?;
        }
        let request = request.into_inner();
        let (id, asked) = (request.request_id.clone(), request.encode_to_vec());
        let claim = Claim::new(Method::TakeVm, &id, &asked);
        if let Some(response) = self.earlier(claim.as_ref())? {
            return Ok(Response::new(response));
        }
        Ok(Response::new(self.replays.once(&id, &asked, self.take(request, claim)).await?))
    }
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

pub fn mode_in(number: i32) -> Result<Mode, Status> {
    match proto::PoolMode::try_from(number) {
        Ok(proto::PoolMode::Unspecified | proto::PoolMode::Shell) => Ok(Mode::Shell),
        Ok(proto::PoolMode::Paused) => Ok(Mode::Paused),
        Ok(proto::PoolMode::Running) => Ok(Mode::Running),
        Err(_) => Err(invalid(format!("pool mode {number} is not known; see PoolMode"))),
    }
}

pub fn mode_out(mode: Mode) -> proto::PoolMode {
    match mode {
        Mode::Shell => proto::PoolMode::Shell,
        Mode::Paused => proto::PoolMode::Paused,
        Mode::Running => proto::PoolMode::Running,
    }
}

fn pool_out(Named { name, look }: Named) -> proto::Pool {
    let (problem, problem_reason) =
        look.problem.clone().map(|problem| (problem.text, problem.reason.to_owned())).unwrap_or_default();
    let Look { settings, ready, stale, making, out, target, rate, counts, problem: _ } = look;
    proto::Pool {
        name: name.to_string(),
        snapshot: settings.snapshot.clone(),
        mode: mode_out(settings.mode).into(),
        min_ready: settings.min_ready,
        max: settings.max,
        idle_ttl_ms: u32::try_from(settings.idle_ttl.as_millis()).unwrap_or(u32::MAX),
        memory_mode: convert::memory_mode_out(settings.memory_mode).into(),
        limits: convert::limits_out(settings.limits),
        networks: network::slots_out(&settings.slots),
        identity: match settings.managed {
            true => proto::Identity::Managed,
            false => proto::Identity::Unmanaged,
        }
        .into(),
        ready,
        stale,
        making,
        in_use: out,
        target,
        rate,
        problem,
        problem_reason,
        counts: Some(proto::PoolCounts {
            taken_ready: counts.taken_ready,
            taken_cold: counts.taken_cold,
            refused: counts.refused,
            made: counts.made,
            failed: counts.failed,
            died: counts.died,
            ended: counts.ended,
            without_slot: counts.without_slot,
        }),
    }
}
