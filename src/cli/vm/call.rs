//! `coldspark vm call`: one question to the agent in a VM.

use clap::{Args, Subcommand, ValueEnum};
use prost::bytes::Bytes;
use serde_json::{Value, json};

use super::hex;
use crate::api::proto;
use crate::cli::SocketArgument;
use crate::cli::output;
use proto::agent_call_request::Op;
use proto::agent_call_response::Result as Answer;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Id or name
    vm: String,
    /// Milliseconds to wait for the answer
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    timeout: u32,
    #[command(subcommand)]
    question: Question,
}

/// Pages of 4096 bytes, counted from the start of the agent's arena.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Read,
    Write,
    Fill,
}

impl Mode {
    fn number(self) -> i32 {
        match self {
            Self::Read => proto::TouchMode::Read,
            Self::Write => proto::TouchMode::Write,
            Self::Fill => proto::TouchMode::Fill,
        }
        .into()
    }
}

#[derive(Debug, Args)]
struct Pages {
    /// How many pages
    pages: u64,
    #[arg(long, default_value_t = 0)]
    first: u64,
    #[arg(long, default_value_t = 1)]
    stride: u64,
    /// Of the pattern
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// Say TEXT back
    #[command(after_help = "Example:\n  coldspark vm call web echo hello")]
    Echo { text: String },
    /// Digest of memory pages
    #[command(after_help = "Example:\n  coldspark vm call web hash 1024")]
    Hash {
        pages: u64,
        #[arg(long, default_value_t = 0)]
        first: u64,
    },
    /// Read, write or fill memory pages
    #[command(after_help = "Example:\n  coldspark vm call web touch 4096 --mode write --seed 7")]
    Touch {
        #[command(flatten)]
        pages: Pages,
        #[arg(long, value_enum, default_value_t = Mode::Read)]
        mode: Mode,
    },
    /// Compare memory pages with what touch wrote
    #[command(after_help = "Example:\n  coldspark vm call web check 4096 --mode write --seed 7")]
    Check {
        #[command(flatten)]
        pages: Pages,
        #[arg(long, value_enum, default_value_t = Mode::Write)]
        mode: Mode,
    },
    /// A disk as the guest sees it
    #[command(after_help = "Example:\n  coldspark vm call web disk-info 0")]
    DiskInfo { disk: u32 },
    /// Read sectors of 512 bytes
    #[command(after_help = "Example:\n  coldspark vm call web disk-read 0 8 --sectors 1")]
    DiskRead {
        disk: u32,
        sector: u64,
        #[arg(long, default_value_t = 1)]
        sectors: u32,
    },
    /// Write TEXT, filled up with zeros to whole sectors
    #[command(after_help = "Example:\n  coldspark vm call web disk-write 0 8 hello")]
    DiskWrite { disk: u32, sector: u64, text: String },
    /// The guest's clocks
    #[command(after_help = "Example:\n  coldspark vm call web time")]
    Time,
    /// The guest's CPUs
    #[command(after_help = "Example:\n  coldspark vm call web cpus")]
    Cpus,
    /// Compute something on every CPU
    #[command(after_help = "Example:\n  coldspark vm call web run-on-all --rounds 1000000")]
    RunOnAll {
        #[arg(long, default_value_t = 1)]
        seed: u64,
        #[arg(long, default_value_t = 1000)]
        rounds: u64,
    },
    /// Bytes of the guest's random generator
    #[command(after_help = "Example:\n  coldspark vm call web random 32")]
    Random { bytes: u32 },
    /// Who the guest thinks it is
    #[command(after_help = "Example:\n  coldspark vm call web generation")]
    Generation,
    /// Digest of generation, nonce and memory
    #[command(after_help = "Example:\n  coldspark vm call web compute 7 --bytes 65536")]
    Compute {
        nonce: u64,
        #[arg(long, default_value_t = 65536)]
        bytes: u64,
    },
    /// Print TEXT on the serial console
    #[command(after_help = "Example:\n  coldspark vm call web serial hello")]
    Serial { text: String },
    /// Read BYTES from the serial console and print them there
    #[command(after_help = "Example:\n  coldspark vm call web serial-echo 5")]
    SerialEcho { bytes: u32 },
    /// Load, memory and uptime of the guest's system
    #[command(after_help = "Example:\n  coldspark vm call web stats")]
    Stats,
    /// Reset the machine; the VM ends
    #[command(after_help = "Example:\n  coldspark vm call web reset")]
    Reset,
    /// What the agent said when it was ready
    #[command(after_help = "Example:\n  coldspark vm call web hello")]
    Hello,
}

impl Question {
    fn op(self) -> Op {
        match self {
            Self::Echo { text } => Op::Echo(proto::EchoOp { data: text.into() }),
            Self::Hash { pages, first } => Op::Hash(proto::HashOp { first_page: first, pages }),
            Self::Touch { pages, mode } => Op::Touch(proto::TouchOp {
                first_page: pages.first,
                pages: pages.pages,
                stride: pages.stride,
                seed: pages.seed,
                mode: mode.number(),
            }),
            Self::Check { pages, mode } => Op::Check(proto::CheckOp {
                first_page: pages.first,
                pages: pages.pages,
                stride: pages.stride,
                seed: pages.seed,
                mode: mode.number(),
            }),
            Self::DiskInfo { disk } => Op::DiskInfo(proto::DiskInfoOp { disk }),
            Self::DiskRead { disk, sector, sectors } => {
                Op::DiskRead(proto::DiskReadOp { disk, first_sector: sector, sectors })
            }
            Self::DiskWrite { disk, sector, text } => {
                let mut data = text.into_bytes();
                data.resize(data.len().div_ceil(512).max(1) * 512, 0);
                let data = Bytes::from(data);
                Op::DiskWrite(proto::DiskWriteOp { disk, first_sector: sector, data, flush: true })
            }
            Self::Time => Op::Time(proto::TimeOp {}),
            Self::Cpus => Op::Cpus(proto::CpusOp {}),
            Self::RunOnAll { seed, rounds } => Op::RunOnAll(proto::RunOnAllOp { seed, rounds }),
            Self::Random { bytes } => Op::Random(proto::RandomOp { bytes }),
            Self::Generation => Op::Generation(proto::GenerationOp {}),
            Self::Compute { nonce, bytes } => Op::Compute(proto::ComputeOp { nonce, bytes }),
            Self::Serial { text } => Op::Serial(proto::SerialOp { data: text.into() }),
            Self::SerialEcho { bytes } => Op::SerialEcho(proto::SerialEchoOp { bytes }),
            Self::Stats => Op::Stats(proto::StatsOp {}),
            Self::Reset => Op::Reset(proto::ResetOp {}),
            Self::Hello => Op::Hello(proto::HelloOp {}),
        }
    }
}

pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut client = arguments.socket.connect().await?.agent;
    let request = proto::AgentCallRequest {
        vm: arguments.vm,
        timeout_ms: arguments.timeout,
        op: Some(arguments.question.op()),
    };
    let response = client.call(request).await?.into_inner();
    let mut value = response.result.as_ref().map_or(Value::Null, answer);
    if let Some(object) = value.as_object_mut() {
        object.insert("us".to_owned(), response.us.into());
    }
    output::json(&value)?;
    Ok(())
}

/// Bytes as text where they are, otherwise as hexadecimal digits. Zeros at the end are left out of text.
fn bytes(data: &[u8]) -> Value {
    let end = data.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    match std::str::from_utf8(data.get(..end).unwrap_or_default()) {
        Ok(text) if !text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') => {
            json!({ "text": text })
        }
        _ => json!({ "hex": hex(data) }),
    }
}

fn answer(answer: &Answer) -> Value {
    match answer {
        Answer::Echo(echo) => bytes(&echo.data),
        Answer::DiskRead(read) => bytes(&read.data),
        Answer::Random(random) => json!({ "hex": hex(&random.data) }),
        Answer::Hash(hash) => json!({ "digest": format!("{:016x}", hash.digest), "ticks": hash.ticks }),
        Answer::Touch(touch) => {
            json!({ "pages": touch.pages, "xor": format!("{:016x}", touch.xor), "ticks": touch.ticks })
        }
        Answer::Check(check) => json!({
            "bad_pages": check.bad_pages,
            "first_bad_page": check.first_bad_page,
            "ticks": check.ticks,
        }),
        Answer::DiskInfo(info) => json!({
            "sectors": info.sectors,
            "features": format!("{:#x}", info.features),
            "read_only": info.read_only,
            "disks": info.disks,
            "serial": info.serial,
        }),
        Answer::DiskWrite(_) | Answer::Serial(_) | Answer::SerialEcho(_) | Answer::Reset(_) => json!({}),
        Answer::Time(time) => json!({
            "tsc": time.tsc,
            "tsc_khz": time.tsc_khz,
            "cmos_unix_s": time.cmos_unix_s,
            "wall_unix_ns": time.wall_unix_ns,
        }),
        Answer::Cpus(cpus) => json!({
            "found": cpus.found,
            "cpus": cpus.cpus.iter().map(|cpu| json!({ "apic_id": cpu.apic_id, "runs": cpu.runs })).collect::<Vec<_>>(),
        }),
        Answer::RunOnAll(all) => {
            let run = |run: &proto::CpuRun| json!({ "apic_id": run.apic_id, "result": format!("{:016x}", run.result), "ticks": run.ticks });
            json!({ "runs": all.runs.iter().map(run).collect::<Vec<_>>() })
        }
        Answer::Generation(generation) => {
            json!({ "generation": hex(&generation.generation), "count": generation.count })
        }
        Answer::Compute(compute) => json!({
            "generation": hex(&compute.generation),
            "digest": format!("{:016x}", compute.digest),
            "ticks": compute.ticks,
        }),
        Answer::Stats(stats) => json!({
            "uptime_ns": stats.uptime_ns,
            "memory_bytes": stats.memory_bytes,
            "free_bytes": stats.free_bytes,
            "load": [stats.load_1, stats.load_5, stats.load_15],
            "streams": stats.streams,
        }),
        Answer::Hello(hello) => json!({
            "name": hello.name,
            "version": hello.version,
            "agent": hello.agent,
            "boot": hello.boot,
            "cpus_found": hello.cpus_found,
            "cpus_alive": hello.cpus_alive,
            "tsc_khz": hello.tsc_khz,
            "checks_run": hello.checks_run,
            "checks_failed": hello.checks_failed,
            "memory_bytes": hello.memory_bytes,
            "arena_bytes": hello.arena_bytes,
            "disks": hello.disks,
            "kinds": format!("{:#x}", hello.kinds),
        }),
    }
}
