//! `coldspark vm create`: a cold boot, watched until the ready point.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::api::proto;
use crate::cli::limits::LimitArguments;
use crate::cli::output;
use crate::cli::{SocketArgument, units};

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// Look into the kernel file and choose
    Auto,
    /// FreeBSD's own 64-bit loader protocol
    Freebsd,
    /// PVH, the 32-bit entry from an ELF note
    Pvh,
    /// Linux's bzImage
    Linux,
}

impl Protocol {
    pub fn number(self) -> i32 {
        match self {
            Self::Auto => proto::BootProtocol::Unspecified,
            Self::Freebsd => proto::BootProtocol::Freebsd,
            Self::Pvh => proto::BootProtocol::Pvh,
            Self::Linux => proto::BootProtocol::Linux,
        }
        .into()
    }
}

/// The kind of machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Hardware {
    /// Look into the kernel file for the drivers it has
    #[default]
    Auto,
    /// virtio-mmio and MPTable: FreeBSD's FIRECRACKER kernels, Linux
    Microvm,
    /// ACPI and virtio-pci: unmodified kernels, such as FreeBSD's GENERIC
    Pc,
}

impl Hardware {
    pub fn number(self) -> i32 {
        match self {
            Self::Auto => proto::Hardware::Unspecified,
            Self::Microvm => proto::Hardware::Microvm,
            Self::Pc => proto::Hardware::Pc,
        }
        .into()
    }
}

/// What the agent talks through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AgentPort {
    /// A virtio-console
    Virtio,
    /// The second serial port, for kernels without a driver for virtio-console
    Serial,
}

impl AgentPort {
    pub fn number(self) -> i32 {
        match self {
            Self::Virtio => proto::AgentPort::Virtio,
            Self::Serial => proto::AgentPort::Serial,
        }
        .into()
    }
}

/// What a guest's reset leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnReset {
    /// Boot it again in place: same id, same disks, the console stays connected
    Restart,
    /// The VM ends
    End,
}

/// When a VM counts as ready.
#[derive(Debug, Clone, Default, Args)]
pub struct ReadyArguments {
    /// Ready when this text appears on the console
    #[arg(long, value_name = "TEXT", group = "ready_point")]
    pub ready: Option<String>,
    /// Ready when the guest writes to this I/O port
    #[arg(long, value_name = "PORT", group = "ready_point")]
    pub ready_port: Option<u16>,
    /// Ready when the agent in the guest says hello
    #[arg(long, group = "ready_point")]
    pub ready_agent: bool,
}

impl ReadyArguments {
    pub fn point(&self) -> Option<proto::ReadyPoint> {
        use proto::ready_point::At;
        let at = match (&self.ready, self.ready_port, self.ready_agent) {
            (Some(text), _, _) => At::ConsolePattern(text.clone()),
            (None, Some(port), _) => At::Port(port.into()),
            (None, None, true) => At::AgentHello(true),
            (None, None, false) => return None,
        };
        Some(proto::ReadyPoint { at: Some(at) })
    }
}

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// Name of an image
    #[arg(required_unless_present = "embedded")]
    image: Option<String>,
    /// The embedded test guest instead of an image
    #[arg(long, conflicts_with = "image")]
    embedded: bool,
    /// The VM's name: a-z 0-9 -
    #[arg(long, default_value = "")]
    name: String,
    /// vCPUs, 1 to 32 [default: as the image says]
    #[arg(long, value_name = "N", value_parser = units::parse_vcpus)]
    vcpus: Option<u32>,
    /// Memory, a multiple of 2 MiB [default: as the image says]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    memory: Option<u64>,
    /// How the kernel is entered [default: as the image says]
    #[arg(long, value_enum, default_value_t = Protocol::Auto, hide_default_value = true)]
    protocol: Protocol,
    /// The kind of machine [default: as the image says]
    #[arg(long, value_enum, default_value_t = Hardware::Auto, hide_default_value = true)]
    hardware: Hardware,
    /// What the agent talks through [default: as the image says]
    #[arg(long, value_enum)]
    agent_port: Option<AgentPort>,
    /// Added to the image's command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// A raw disk file or block device beside the image's disks (may be given again); `ro`: read-only, `persist`: the
    /// guest's writes go into the file, otherwise they end with the VM
    #[arg(long = "disk", value_name = "path=FILE[,ro|,persist]", value_parser = disk_file)]
    disks: Vec<proto::DiskFile>,
    #[command(flatten)]
    net: super::network::NetArguments,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    ready: ReadyArguments,
    /// Seconds to wait for the ready point
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
    /// What follows when the guest resets itself after its ready point
    #[arg(long, value_enum, default_value_t = OnReset::Restart)]
    on_reset: OnReset,
    /// Print the id only, when it is ready: neither phases nor console
    #[arg(short, long)]
    quiet: bool,
    /// The same id gets the same VM, for 10 minutes
    #[arg(long, value_name = "ID", default_value = "")]
    request_id: String,
    /// Show where the time went, at the end: each phase since the request, and the guest's time stamp counter
    #[arg(long)]
    profile: bool,
    /// Print the VM as JSON when it is ready (implies --quiet)
    #[arg(long)]
    json: bool,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    use proto::create_vm_event::Event;
    let mut client = arguments.socket.connect().await?.vms;
    let quiet = arguments.quiet || arguments.json;
    let mut events = client.create_vm(request(&arguments)?).await?.into_inner();
    let (mut ready, mut profile) = (None, None);
    // Console bytes are shown as they are, so notes begin on a line of their own.
    let mut line_open = false;
    let note = |line_open: &mut bool, text: String| {
        if !quiet {
            let prefix = if std::mem::take(line_open) { "\n" } else { "" };
            output::note(&format!("{prefix}[coldspark] {text}"));
        }
    };
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Accepted(vm)) => note(&mut line_open, format!("{} is booting", vm.id)),
            Some(Event::Phase(phase)) => {
                note(&mut line_open, format!("{:>9}  {}", units::us(phase.us), phase.name));
            }
            Some(Event::Choice(choice)) => note(&mut line_open, choice),
            Some(Event::Console(bytes)) if !quiet => {
                line_open = bytes.last().is_some_and(|byte| *byte != b'\n');
                output::note_bytes(&bytes);
            }
            Some(Event::Profile(told)) => profile = Some(told),
            Some(Event::Ready(vm)) => ready = Some(vm),
            Some(Event::Console(_)) | None => {}
        }
    }
    let vm = ready.ok_or_else(|| anyhow::anyhow!("the service ended the stream before the VM was ready"))?;
    note(&mut line_open, format!("ready after {}", units::us(vm.start_us)));
    match arguments.json {
        true => {
            let mut value = json!({ "vm": super::value(&vm) });
            if let (Some(object), Some(profile)) = (value.as_object_mut(), &profile) {
                object.insert("profile".to_owned(), super::profile::value(profile));
            }
            output::json(&value)?;
        }
        false => {
            let addresses = super::network::slot_addresses(&vm);
            if !addresses.is_empty() {
                output::note(&format!("[coldspark] reached by {}", addresses.join(" and ")));
            }
            // Beside the id, which scripts take from stdout.
            if let Some(profile) = &profile {
                output::note(super::profile::table(profile).trim_end());
            }
            output::line(&vm.id)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `path=FILE[,ro|,persist]`, or without `path=`.
pub fn disk_file(text: &str) -> Result<proto::DiskFile, String> {
    let (path, mode) = match text.rsplit_once(',') {
        Some((path, "ro")) => (path, proto::DiskMode::ReadOnly),
        Some((path, "persist")) => (path, proto::DiskMode::Persist),
        _ => (text, proto::DiskMode::Overlay),
    };
    let path = path.strip_prefix("path=").unwrap_or(path);
    let path = std::path::absolute(path).map_err(|error| format!("give a file's path: {error}"))?;
    let path = path.to_str().ok_or("its path is not UTF-8; rename it")?.to_owned();
    Ok(proto::DiskFile { path, mode: mode.into() })
}

fn request(arguments: &Arguments) -> anyhow::Result<proto::CreateVmRequest> {
    use proto::create_vm_request::Source;
    Ok(proto::CreateVmRequest {
        source: Some(match &arguments.image {
            Some(image) => Source::Image(image.clone()),
            None => Source::Embedded(true),
        }),
        name: arguments.name.clone(),
        request_id: arguments.request_id.clone(),
        vcpus: arguments.vcpus.unwrap_or(0),
        memory_bytes: arguments.memory.unwrap_or(0),
        protocol: arguments.protocol.number(),
        hardware: arguments.hardware.number(),
        agent_port: arguments.agent_port.map_or(0, AgentPort::number),
        command_line: arguments.cmdline.clone(),
        ready: arguments.ready.point(),
        networks: arguments.net.interfaces()?,
        limits: arguments.limits.limits(),
        ready_timeout_ms: arguments.timeout.saturating_mul(1000),
        on_reset: match arguments.on_reset {
            OnReset::Restart => proto::OnReset::Restart,
            OnReset::End => proto::OnReset::End,
        }
        .into(),
        disks: arguments.disks.clone(),
        profile: arguments.profile,
    })
}
