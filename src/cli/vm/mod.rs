//! `coldspark vm`: starting, listing and using VMs.

#![forbid(unsafe_code)]

mod call;
mod console;
pub mod create;
mod exec;
mod inspect;
pub mod network;
mod profile;

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::limits::LimitArguments;
use super::output::{self, Shape, Table};
use super::snapshot::protocol_name;
use super::{SocketArgument, units};
use crate::api::client::{Transport, all_pages};
use crate::api::proto;
use crate::api::proto::vm_service_client::VmServiceClient;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Cold-boot a VM; shows boot phases and console until it is ready
    #[command(
        after_help = "Examples:\n  coldspark vm create --embedded\n  coldspark vm create freebsd --vcpus 4 --memory 1G --ready 'login:'"
    )]
    Create(create::Arguments),
    /// Start clones of a snapshot
    #[command(after_help = "Example:\n  coldspark vm clone base -n 8")]
    Clone {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name of the snapshot
        snapshot: String,
        /// How many
        #[arg(short = 'n', long, value_name = "N", default_value_t = 1)]
        count: u32,
        #[arg(long, value_enum, default_value_t = MemoryMode::Mapped)]
        memory_mode: MemoryMode,
        #[arg(long, value_enum, default_value_t = Identity::Managed)]
        identity: Identity,
        /// Name; several get -0, -1, ... added
        #[arg(long, default_value = "")]
        name: String,
        #[command(flatten)]
        net: Box<network::NetArguments>,
        #[command(flatten)]
        limits: LimitArguments,
        /// The same id gets the same VMs, for 10 minutes, also of a service that was started again
        #[arg(long, value_name = "ID", default_value = "")]
        request_id: String,
        #[command(flatten)]
        shape: Shape,
        /// Show where the time went
        #[arg(long, conflicts_with = "quiet")]
        steps: bool,
    },
    /// List VMs
    #[command(after_help = "Example:\n  coldspark vm ls")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        /// Those too that stand ready in pools
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        shape: Shape,
    },
    /// Show what a VM has done so far: exits, page faults, frames
    #[command(after_help = "Example:\n  coldspark vm stats web")]
    Stats {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where a VM's CPUs are and what its console said last: for a guest that seems to hang
    #[command(after_help = "Example:\n  coldspark vm inspect web")]
    Inspect {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// End VMs and forget them
    #[command(after_help = "Examples:\n  coldspark vm rm vm-0123456789ab\n  coldspark vm rm --all")]
    Rm {
        #[command(flatten)]
        socket: SocketArgument,
        /// Ids or names
        #[arg(value_name = "VM", required_unless_present = "all")]
        vms: Vec<String>,
        /// All of them
        #[arg(long, conflicts_with = "vms")]
        all: bool,
    },
    /// Use a VM's serial console; leave with Ctrl-]
    #[command(after_help = "Example:\n  coldspark vm console web\n\nLeave with Ctrl-]. The VM goes on.")]
    Console {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
        /// Leave out what it printed before
        #[arg(long)]
        no_backlog: bool,
    },
    /// Freeze a VM into a snapshot
    #[command(after_help = "Example:\n  coldspark vm snapshot vm-0123456789ab --name base")]
    Snapshot {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
        /// The snapshot's name: a-z 0-9 -
        #[arg(long, default_value = "")]
        name: String,
        /// End the VM when the snapshot is published
        #[arg(long)]
        stop: bool,
        /// The same id gets the same snapshot, for 10 minutes
        #[arg(long, value_name = "ID", default_value = "")]
        request_id: String,
        #[command(flatten)]
        shape: Shape,
    },
    /// Ask a guest to power itself off, and end its VM when it does not
    #[command(after_help = "Example:\n  coldspark vm stop web --timeout 10")]
    Stop {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
        /// Seconds that the guest may take
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u32,
    },
    /// Stop a VM's CPUs and devices
    #[command(after_help = "Example:\n  coldspark vm pause web")]
    Pause {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
    },
    /// Let a paused VM go on
    #[command(after_help = "Example:\n  coldspark vm resume web")]
    Resume {
        #[command(flatten)]
        socket: SocketArgument,
        /// Id or name
        vm: String,
    },
    /// Ask the agent in a VM something
    #[command(after_help = "Examples:\n  coldspark vm call web time\n  coldspark vm call web echo hello")]
    Call(call::Arguments),
    /// Run a command in a VM; ends with the command's status, 128 and the number of the signal that ended it, or 125 if it was not run to its end
    #[command(
        after_help = "Examples:\n  coldspark vm exec web -- uname -a\n  coldspark vm exec -i -w /tmp -e LANG=C web -- sort < words"
    )]
    Exec(exec::ExecArguments),
    /// Copy a file into a VM or out of it
    #[command(
        after_help = "Examples:\n  coldspark vm cp motd web:/etc/motd\n  coldspark vm cp web:/var/log/messages ."
    )]
    Cp(exec::CopyArguments),
}

/// How a clone's memory comes in.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum MemoryMode {
    /// The memory file is mapped privately
    Mapped,
    /// userfaultfd, answered by the service
    Userfault,
}

impl MemoryMode {
    pub fn number(self) -> i32 {
        match self {
            Self::Mapped => proto::MemoryMode::Mapped,
            Self::Userfault => proto::MemoryMode::Userfault,
        }
        .into()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Userfault => "userfault",
        }
    }
}

/// Whether a clone is made another machine than its siblings.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Identity {
    /// The agent gives it a new identity and confirms
    Managed,
    /// Left as it was when it was frozen
    Unmanaged,
}

impl Identity {
    pub fn number(self) -> i32 {
        match self {
            Self::Managed => proto::Identity::Managed,
            Self::Unmanaged => proto::Identity::Unmanaged,
        }
        .into()
    }
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create(arguments) => return create::run(arguments).await,
        Command::Call(arguments) => call::run(arguments).await?,
        Command::Exec(arguments) => return exec::exec(arguments).await,
        Command::Cp(arguments) => exec::copy(arguments).await?,
        Command::Console { socket, vm, no_backlog } => console::run(&socket, vm, no_backlog).await?,
        Command::Clone {
            socket,
            snapshot,
            count,
            memory_mode,
            identity,
            name,
            net,
            limits,
            request_id,
            shape,
            steps,
        } => {
            let request = proto::CloneVmRequest {
                snapshot,
                count,
                memory_mode: memory_mode.number(),
                identity: identity.number(),
                name,
                networks: net.interfaces()?,
                limits: limits.limits(),
                first_call: None,
                request_id,
            };
            let vms = socket.connect().await?.vms.clone_vm(request).await?.into_inner().vms;
            if shape.quiet {
                output::lines(vms.iter().map(|vm| vm.id.as_str()))?;
            } else if shape.json {
                output::json(&json!({ "vms": vms.iter().map(value).collect::<Vec<_>>() }))?;
            } else {
                for vm in &vms {
                    let reached = network::reached(vm);
                    output::line(&format!("{}  {}{reached}", vm.id, units::us(vm.start_us)))?;
                    if steps {
                        print_steps(vm)?;
                    }
                }
            }
        }
        Command::Stats { socket, vm, json } => network::stats(&socket, vm, json).await?,
        Command::Inspect { socket, vm, json } => inspect::run(&socket, vm, json).await?,
        Command::Ls { socket, shape, all } => list(&socket, shape, all).await?,
        Command::Rm { socket, mut vms, all } => {
            let mut client = socket.connect().await?.vms;
            if all {
                vms = every(&mut client, false).await?.into_iter().map(|vm| vm.id).collect();
            }
            for vm in vms {
                match client.delete_vm(proto::DeleteVmRequest { vm: vm.clone() }).await {
                    // Somebody else was faster, or it is forgotten.
                    Err(status) if all && status.code() == tonic::Code::NotFound => continue,
                    other => other?,
                };
                output::line(&vm)?;
            }
        }
        Command::Snapshot { socket, vm, name, stop, request_id, shape } => {
            let request = proto::CreateSnapshotRequest { vm, name, stop_after: stop, request_id };
            let taken = socket.connect().await?.snapshots.create_snapshot(request).await?.into_inner();
            let snapshot = taken.snapshot.clone().unwrap_or_default();
            if shape.quiet {
                output::line(&snapshot.id)?;
            } else if shape.json {
                output::json(&json!({
                    "snapshot": super::snapshot::value(&snapshot),
                    "pause_us": taken.pause_us,
                    "total_us": taken.total_us,
                    "steps": steps(&taken.steps),
                }))?;
            } else {
                output::line(&format!(
                    "{}  {} on disk, the VM stood still for {}, {} in all",
                    snapshot.id,
                    units::bytes(snapshot.stored_bytes),
                    units::us(taken.pause_us),
                    units::us(taken.total_us)
                ))?;
            }
        }
        Command::Stop { socket, vm, timeout } => {
            // Zero is the service's default there, and "at once" here.
            let request = proto::StopVmRequest { vm, timeout_ms: timeout.saturating_mul(1000).max(1) };
            let stopped = socket.connect().await?.vms.stop_vm(request).await?.into_inner();
            let id = stopped.vm.map(|vm| vm.id).unwrap_or_default();
            let how = match (stopped.by_itself, stopped.not_asked.as_str()) {
                (true, _) => "powered itself off".to_owned(),
                (false, "") => "did not power itself off and was ended".to_owned(),
                (false, reason) => format!("was ended without being asked: {reason}"),
            };
            output::line(&format!("{id}  {how}  {}", units::us(stopped.took_us)))?;
        }
        Command::Pause { socket, vm } => {
            let vm = socket.connect().await?.vms.pause_vm(proto::PauseVmRequest { vm }).await?.into_inner();
            output::line(&format!("{}  {}", vm.id, state_name(&vm)))?;
        }
        Command::Resume { socket, vm } => {
            let vm = socket.connect().await?.vms.resume_vm(proto::ResumeVmRequest { vm }).await?.into_inner();
            output::line(&format!("{}  {}", vm.id, state_name(&vm)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// All VMs.
async fn every(
    client: &mut VmServiceClient<Transport>,
    ready_in_pools: bool,
) -> Result<Vec<proto::Vm>, tonic::Status> {
    all_pages(async |page_token| {
        let request = proto::ListVmsRequest { ready_in_pools, page_token, page_size: 0 };
        let list = client.list_vms(request).await?.into_inner();
        Ok((list.vms, list.next_page_token))
    })
    .await
}

async fn list(socket: &SocketArgument, shape: Shape, all: bool) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.vms;
    let vms = every(&mut client, all).await?;
    if shape.quiet {
        return Ok(output::lines(vms.iter().map(|one| one.id.as_str()))?);
    }
    if shape.json {
        output::json(&json!({ "vms": vms.iter().map(value).collect::<Vec<_>>() }))?;
        return Ok(());
    }
    let mut table = Table::new(&["ID", "NAME", "STATE", "FROM", "VCPUS", "MEMORY", "STARTED IN", "AGE"]);
    for vm in &vms {
        table.row([
            vm.id.clone(),
            vm.name.clone(),
            if vm.ready_in_pool { "in pool".to_owned() } else { state_name(vm) },
            origin(vm),
            vm.vcpus.to_string(),
            units::bytes(vm.memory_bytes),
            if vm.start_us == 0 { String::new() } else { units::us(vm.start_us) },
            units::ago(vm.created_unix_ms),
        ]);
    }
    output::print(&table.text())?;
    for vm in vms.iter().filter(|vm| vm.unclaimed) {
        output::note(&format!(
            "{} is unclaimed: made by an earlier service, and no call has ever named it",
            vm.id
        ));
    }
    for vm in vms.iter().filter(|vm| !vm.panic.is_empty()) {
        output::note(&format!("{} panicked: {}", vm.id, vm.panic));
    }
    for vm in vms.iter().filter(|vm| !vm.exit_reason.is_empty()) {
        output::note(&format!("{} ended: {}", vm.id, vm.exit_reason));
    }
    Ok(())
}

/// Where the time of its start went.
pub fn print_steps(vm: &proto::Vm) -> std::io::Result<()> {
    vm.steps.iter().try_for_each(|step| output::line(&format!("  {:<28} {}", step.name, units::us(step.us))))
}

/// A VM's state, as the .proto spells it without the prefix.
pub fn state_name(vm: &proto::Vm) -> String {
    let name = vm.state().as_str_name();
    name.strip_prefix("VM_STATE_").unwrap_or(name).to_owned()
}

fn origin(vm: &proto::Vm) -> String {
    match &vm.origin {
        Some(proto::vm::Origin::Image(name)) => name.clone(),
        Some(proto::vm::Origin::Snapshot(id)) => id.clone(),
        Some(proto::vm::Origin::Embedded(_)) => "embedded test guest".to_owned(),
        None => String::new(),
    }
}

/// A VM as JSON.
pub fn value(vm: &proto::Vm) -> Value {
    json!({
        "id": vm.id,
        "name": vm.name,
        "state": state_name(vm),
        "pool": vm.pool,
        "ready_in_pool": vm.ready_in_pool,
        "unclaimed": vm.unclaimed,
        "exit_reason": vm.exit_reason,
        "origin": origin(vm),
        "vcpus": vm.vcpus,
        "memory_bytes": vm.memory_bytes,
        "protocol": protocol_name(vm.protocol),
        "generation": hex(&vm.generation),
        "host_name": vm.host_name,
        "guest_entropy": vm.guest_entropy().as_str_name().trim_start_matches("GUEST_ENTROPY_"),
        "agent": vm.agent,
        "agent_name": vm.agent_name,
        "created_unix_ms": vm.created_unix_ms,
        "start_us": vm.start_us,
        "steps": steps(&vm.steps),
        "worker_pid": vm.worker_pid,
        "restarts": vm.restarts,
        "panic": vm.panic,
        "networks": vm.networks.iter().map(network::value).collect::<Vec<_>>(),
    })
}

pub fn steps(steps: &[proto::Step]) -> Value {
    steps.iter().map(|step| json!({ "name": step.name, "us": step.us })).collect()
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
