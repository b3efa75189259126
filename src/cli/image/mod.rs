//! `coldspark image`: what can be cold-booted.

#![forbid(unsafe_code)]

mod import;
mod pull;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

pub use self::import::import;
use super::output::{self, Shape, Table};
use super::snapshot::protocol_name;
use super::vm::create::{AgentPort, Hardware, Protocol};
use super::{SocketArgument, units};
use crate::api::client::all_pages;
use crate::api::proto;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import disks, a kernel and boot settings under a name
    #[command(after_help = import::EXAMPLES)]
    Import(import::Arguments),
    /// Download a FreeBSD release and import it
    #[command(after_help = pull::EXAMPLES)]
    Pull(pull::Arguments),
    /// List images
    #[command(after_help = "Example:\n  coldspark image ls")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        #[command(flatten)]
        shape: Shape,
    },
    /// Remove images
    #[command(after_help = "Example:\n  coldspark image rm freebsd")]
    Rm {
        #[command(flatten)]
        socket: SocketArgument,
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

/// The files of an image.
#[derive(Debug, Clone, Args)]
pub struct FileArguments {
    /// The kernel file [default: the one on the disks]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Take the embedded test guest's kernel
    #[arg(long, conflicts_with = "kernel")]
    pub embedded: bool,
    /// A disk (may be given again); add `:ro` to make it read-only
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    pub disks: Vec<String>,
    /// A memory disk for FreeBSD (md_image)
    #[arg(long, value_name = "FILE", conflicts_with = "initrd")]
    pub memory_disk: Option<PathBuf>,
    /// An initial RAM disk for Linux
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, or name=value words for FreeBSD's environment
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub cmdline: String,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = Protocol::Auto)]
    pub protocol: Protocol,
    /// The kind of machine
    #[arg(long, value_enum, default_value_t = Hardware::Auto)]
    pub hardware: Hardware,
    /// What the agent talks through [default: virtio]
    #[arg(long, value_enum)]
    pub agent_port: Option<AgentPort>,
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Import(arguments) => import::run(arguments).await?,
        Command::Pull(arguments) => pull::run(arguments).await?,
        Command::Ls { socket, shape } => list(&socket, shape).await?,
        Command::Rm { socket, images } => {
            let mut client = socket.connect().await?.images;
            for name in images {
                client.delete_image(proto::DeleteImageRequest { name: name.clone() }).await?;
                output::line(&name)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(socket: &SocketArgument, shape: Shape) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.images;
    let images = all_pages(async |page_token| {
        let request = proto::ListImagesRequest { page_token, page_size: 0 };
        let list = client.list_images(request).await?.into_inner();
        Ok((list.images, list.next_page_token))
    })
    .await?;
    if shape.quiet {
        return Ok(output::lines(images.iter().map(|one| one.name.as_str()))?);
    }
    if shape.json {
        let value = |image: &proto::Image| {
            let boot = image.boot.clone().unwrap_or_default();
            json!({
                "name": image.name,
                "embedded": image.embedded,
                "protocol": protocol_name(boot.protocol),
                "hardware": hardware_name(boot.hardware),
                "agent_port": if boot.agent_port == i32::from(proto::AgentPort::Serial) { "serial" } else { "virtio" },
                "command_line": boot.command_line,
                "vcpus": boot.vcpus,
                "memory_bytes": boot.memory_bytes,
                "kernel_bytes": image.kernel_bytes,
                "module_bytes": image.module_bytes,
                "disks": image.disks.iter().map(|disk| json!({ "bytes": disk.bytes, "read_only": disk.read_only })).collect::<Vec<_>>(),
                "created_unix_ms": image.created_unix_ms,
            })
        };
        output::json(&json!({ "images": images.iter().map(value).collect::<Vec<_>>() }))?;
        return Ok(());
    }
    let mut table = Table::new(&["NAME", "KERNEL", "DISKS", "VCPUS", "MEMORY", "AGE"]);
    for image in &images {
        let boot = image.boot.clone().unwrap_or_default();
        let disks: Vec<String> = image.disks.iter().map(|disk| units::bytes(disk.bytes)).collect();
        table.row([
            image.name.clone(),
            units::bytes(image.kernel_bytes),
            disks.join(", "),
            boot.vcpus.to_string(),
            units::bytes(boot.memory_bytes),
            units::ago(image.created_unix_ms),
        ]);
    }
    output::print(&table.text())?;
    Ok(())
}

/// A kind of machine as the options have it.
fn hardware_name(number: i32) -> &'static str {
    match proto::Hardware::try_from(number) {
        Ok(proto::Hardware::Microvm) => "microvm",
        Ok(proto::Hardware::Pc) => "pc",
        Ok(proto::Hardware::Unspecified) | Err(_) => "auto",
    }
}
