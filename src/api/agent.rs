//! AgentService.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Request, Response, Status, Streaming};

use super::exec;
use super::proto;
use super::proto::agent_call_request::Op;
use super::proto::agent_call_response::Result as Answer;
use super::proto::agent_service_server::AgentService;
use super::status::invalid;
use crate::agent::ops::{GuestStats, Pages, TouchMode};
use crate::agent::{AgentReply, AgentRequest, Hello, wire};
use crate::fleet::Fleet;
use crate::fleet::clones::FirstCall;
use crate::fleet::error::FleetError;
use crate::fleet::limits::{AGENT_TIMEOUT_DEFAULT, AGENT_TIMEOUT_MAX};

/// The service.
pub struct Agent {
    fleet: Arc<Fleet>,
}

impl Agent {
    pub fn new(fleet: Arc<Fleet>) -> Self {
        Self { fleet }
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type ExecStream = exec::ExecStream;
    type GetFileStream = exec::GetFileStream;

    async fn exec(
        &self,
        request: Request<Streaming<proto::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        Ok(Response::new(exec::exec(&self.fleet, request.into_inner()).await?))
    }

    async fn put_file(
        &self,
        request: Request<Streaming<proto::PutFileRequest>>,
    ) -> Result<Response<proto::PutFileResponse>, Status> {
        Ok(Response::new(exec::put_file(&self.fleet, request.into_inner()).await?))
    }

    async fn get_file(
        &self,
        request: Request<proto::GetFileRequest>,
    ) -> Result<Response<Self::GetFileStream>, Status> {
        Ok(Response::new(exec::get_file(&self.fleet, request.into_inner()).await?))
    }

    async fn call(
        &self,
        request: Request<proto::AgentCallRequest>,
    ) -> Result<Response<proto::AgentCallResponse>, Status> {
        let proto::AgentCallRequest { vm, timeout_ms, op } = request.into_inner();
        let vm = self.fleet.vm(&vm)?;
        let (op, within) = (op_in(op)?, timeout_in(timeout_ms)?);
        if let Op::Hello(_) = op {
            let hello = vm.agent.hello().ok_or(FleetError::NoAgent)?;
            let result = Some(Answer::Hello(hello_result(&hello)));
            return Ok(Response::new(proto::AgentCallResponse { us: 0, result }));
        }
        vm.check_runs()?;
        let asked = Instant::now();
        let request = agent_request(&op)?;
        let reply = tokio::select! {
            reply = vm.agent.ask(request, within) => reply,
            reason = vm.ended() => return Err(FleetError::Ended(reason).into()),
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => return Err(vm.end_or(error).await.into()),
        };
        let us = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        let result = Some(answer(&op, reply)?);
        Ok(Response::new(proto::AgentCallResponse { us, result }))
    }
}

/// A call that is made together with a clone.
pub fn first_call_in(call: proto::AgentCallRequest) -> Result<(Op, FirstCall), Status> {
    if !call.vm.is_empty() {
        return Err(invalid("first_call goes to the clone: leave its `vm` empty"));
    }
    let op = op_in(call.op)?;
    let first = FirstCall { request: agent_request(&op)?, within: timeout_in(call.timeout_ms)? };
    Ok((op, first))
}

/// The answer to it.
pub fn first_answer_out(op: &Op, (reply, us): (AgentReply, u64)) -> Result<proto::AgentCallResponse, Status> {
    Ok(proto::AgentCallResponse { us, result: Some(answer(op, reply)?) })
}

fn op_in(op: Option<Op>) -> Result<Op, Status> {
    op.ok_or_else(|| invalid("say what to ask the agent: one of `op`"))
}

fn timeout_in(timeout_ms: u32) -> Result<Duration, Status> {
    let within = match timeout_ms {
        0 => AGENT_TIMEOUT_DEFAULT,
        ms => Duration::from_millis(ms.into()),
    };
    if within > AGENT_TIMEOUT_MAX {
        return Err(invalid(format!(
            "a timeout of {timeout_ms} ms; the most is {}",
            AGENT_TIMEOUT_MAX.as_millis()
        )));
    }
    Ok(within)
}

fn touch_mode(number: i32) -> Result<TouchMode, Status> {
    match proto::TouchMode::try_from(number) {
        Ok(proto::TouchMode::Read) => Ok(TouchMode::Read),
        Ok(proto::TouchMode::Write) => Ok(TouchMode::Write),
        Ok(proto::TouchMode::Fill) => Ok(TouchMode::Fill),
        Err(_) => Err(invalid(format!("touch mode {number} is not known; see TouchMode"))),
    }
}

fn agent_request(op: &Op) -> Result<AgentRequest, Status> {
    Ok(match op {
        Op::Echo(op) => AgentRequest::Echo(op.data.to_vec()),
        Op::Hash(op) => AgentRequest::Hash { first_page: op.first_page, pages: op.pages },
        Op::Touch(op) => {
            let (first_page, pages, stride, seed) = (op.first_page, op.pages, op.stride.max(1), op.seed);
            AgentRequest::Touch(Pages { first_page, pages, stride, seed }, touch_mode(op.mode)?)
        }
        Op::Check(op) => {
            let (first_page, pages, stride, seed) = (op.first_page, op.pages, op.stride.max(1), op.seed);
            let whole = match touch_mode(op.mode)? {
                TouchMode::Fill => true,
                TouchMode::Write => false,
                TouchMode::Read => return Err(invalid("check compares with what WRITE or FILL wrote")),
            };
            AgentRequest::Check { pages: Pages { first_page, pages, stride, seed }, whole }
        }
        Op::DiskInfo(op) => AgentRequest::DiskInfo { disk: op.disk },
        Op::DiskRead(op) => {
            AgentRequest::DiskRead { disk: op.disk, first_sector: op.first_sector, sectors: op.sectors }
        }
        Op::DiskWrite(op) => AgentRequest::DiskWrite {
            disk: op.disk,
            first_sector: op.first_sector,
            bytes: op.data.to_vec(),
            flush: op.flush,
        },
        Op::Time(_) => AgentRequest::Time,
        Op::Cpus(_) => AgentRequest::Cpus,
        Op::RunOnAll(op) => AgentRequest::RunOnAll { seed: op.seed, rounds: op.rounds },
        Op::Random(op) => AgentRequest::Random { bytes: op.bytes },
        Op::Generation(_) => AgentRequest::Generation,
        Op::Compute(op) => AgentRequest::Compute { nonce: op.nonce, bytes: op.bytes },
        Op::Serial(op) => AgentRequest::Serial(op.data.to_vec()),
        Op::SerialEcho(op) => AgentRequest::SerialEcho { bytes: op.bytes },
        Op::Reset(_) => AgentRequest::Reset,
        Op::Stats(_) => AgentRequest::Stats,
        Op::Hello(_) => return Err(invalid("hello is not a request to the guest")),
    })
}

fn answer(op: &Op, reply: AgentReply) -> Result<Answer, Status> {
    Ok(match (op, reply) {
        (Op::Echo(_), AgentReply::Bytes(data)) => Answer::Echo(proto::EchoResult { data: data.into() }),
        (Op::DiskRead(_), AgentReply::Bytes(data)) => {
            Answer::DiskRead(proto::DiskReadResult { data: data.into() })
        }
        (Op::Random(_), AgentReply::Bytes(data)) => Answer::Random(proto::RandomResult { data: data.into() }),
        (Op::Hash(_), AgentReply::Hash { digest, ticks }) => {
            Answer::Hash(proto::HashResult { digest, ticks })
        }
        (Op::Touch(_), AgentReply::Touch { pages, xor, ticks }) => {
            Answer::Touch(proto::TouchResult { pages, xor, ticks })
        }
        (Op::Check(_), AgentReply::Check { bad_pages, first_bad_page, ticks }) => {
            Answer::Check(proto::CheckResult { bad_pages, first_bad_page, ticks })
        }
        (Op::DiskInfo(_), AgentReply::DiskInfo(info)) => Answer::DiskInfo(proto::DiskInfoResult {
            sectors: info.sectors,
            features: info.features,
            read_only: info.read_only,
            disks: info.disks,
            serial: info.serial,
        }),
        (Op::DiskWrite(_), AgentReply::Done) => Answer::DiskWrite(proto::DiskWriteResult {}),
        (Op::Serial(_), AgentReply::Done) => Answer::Serial(proto::SerialResult {}),
        (Op::SerialEcho(_), AgentReply::Done) => Answer::SerialEcho(proto::SerialEchoResult {}),
        (Op::Reset(_), AgentReply::Done) => Answer::Reset(proto::ResetResult {}),
        (Op::Time(_), AgentReply::Time(time)) => Answer::Time(proto::TimeResult {
            tsc: time.tsc,
            tsc_khz: time.tsc_khz,
            cmos_unix_s: time.cmos_unix_s,
            wall_unix_ns: time.wall_ns,
        }),
        (Op::Cpus(_), AgentReply::Cpus(cpus)) => Answer::Cpus(proto::CpusResult {
            found: cpus.found,
            cpus: cpus.alive.iter().map(|cpu| proto::Cpu { apic_id: cpu.apic_id, runs: cpu.runs }).collect(),
        }),
        (Op::RunOnAll(_), AgentReply::RunOnAll(runs)) => Answer::RunOnAll(proto::RunOnAllResult {
            runs: runs
                .iter()
                .map(|run| proto::CpuRun { apic_id: run.apic_id, result: run.result, ticks: run.ticks })
                .collect(),
        }),
        (Op::Generation(_), AgentReply::Generation { generation, count }) => {
            Answer::Generation(proto::GenerationResult { generation: generation.to_vec().into(), count })
        }
        (Op::Compute(_), AgentReply::Compute { generation, digest, ticks }) => {
            Answer::Compute(proto::ComputeResult { generation: generation.to_vec().into(), digest, ticks })
        }
        (Op::Stats(_), AgentReply::Stats(stats)) => {
            let [load_1, load_5, load_15] = stats.load_milli.map(|milli| f64::from(milli) / 1000.0);
            let GuestStats { uptime_ns, memory_bytes, free_bytes, streams, .. } = stats;
            Answer::Stats(proto::StatsResult {
                uptime_ns,
                memory_bytes,
                free_bytes,
                load_1,
                load_5,
                load_15,
                streams,
            })
        }
        _ => return Err(Status::internal("the agent's answer is of another kind than what was asked")),
    })
}

fn hello_result(hello: &Hello) -> proto::HelloResult {
    let names = |bits: u64| {
        let named = wire::CHECK_NAMES.iter().enumerate();
        named.filter(|(bit, _)| bits >> bit & 1 != 0).map(|(_, name)| (*name).to_owned()).collect()
    };
    proto::HelloResult {
        name: hello.name.clone(),
        version: hello.version,
        agent: hello.agent,
        boot: hello.boot,
        cpus_found: hello.cpus_found,
        cpus_alive: hello.cpus_alive,
        tsc_khz: hello.tsc_khz,
        checks_run: names(hello.checks_run),
        checks_failed: names(hello.checks_failed),
        memory_bytes: hello.memory_bytes,
        arena_bytes: hello.arena_bytes,
        disks: hello.disks,
        kinds: hello.kinds,
    }
}
