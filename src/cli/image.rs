//! `coldspark image`: what can be cold-booted.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use prost::bytes::Bytes;
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::output::{self, Table};
use super::snapshot::protocol_name;
use super::vm::create::{Protocol, ReadyArguments};
use super::{SocketArgument, units};
use crate::api::client::Client;
use crate::api::proto;
use proto::file_chunk::File;
use proto::import_image_request::Message;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import a kernel, disks and boot settings under a name
    #[command(
        after_help = "Examples:\n  coldspark image import freebsd --kernel kernel --disk root.ufs --ready 'login:'\n  coldspark image import test --embedded"
    )]
    Import {
        #[command(flatten)]
        socket: SocketArgument,
        /// The image's name: a-z 0-9 -
        name: String,
        #[command(flatten)]
        files: FileArguments,
        #[command(flatten)]
        ready: ReadyArguments,
        /// vCPUs unless a VM asks for others
        #[arg(long, value_name = "N", default_value_t = 1)]
        vcpus: u32,
        /// Memory unless a VM asks for another
        #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
        memory: u64,
    },
    /// List images
    #[command(after_help = "Example:\n  coldspark image ls")]
    Ls {
        #[command(flatten)]
        socket: SocketArgument,
        /// Print JSON
        #[arg(long)]
        json: bool,
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
    /// The kernel file
    #[arg(long, value_name = "FILE", required_unless_present = "embedded")]
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
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Import { socket, name, files, ready, vcpus, memory } => {
            let mut client = socket.connect().await?;
            let image = import(&mut client, name, &files, ready.point(), vcpus, memory).await?;
            output::line(&image.name)?;
        }
        Command::Ls { socket, json } => list(&socket, json).await?,
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

/// Sends an image to the service.
pub async fn import(
    client: &mut Client,
    name: String,
    files: &FileArguments,
    ready: Option<proto::ReadyPoint>,
    vcpus: u32,
    memory_bytes: u64,
) -> anyhow::Result<proto::Image> {
    let disks: Vec<(PathBuf, bool)> = files
        .disks
        .iter()
        .map(|disk| match disk.strip_suffix(":ro") {
            Some(path) => (path.into(), true),
            None => (disk.into(), false),
        })
        .collect();
    let mut parts = Vec::new();
    parts.extend(files.kernel.iter().map(|path| (path.clone(), File::Kernel(true))));
    let module = files.memory_disk.as_ref().or(files.initrd.as_ref());
    parts.extend(module.map(|path| (path.clone(), File::Module(true))));
    for (n, (path, _)) in disks.iter().enumerate() {
        parts.push((path.clone(), File::Disk(u32::try_from(n)?)));
    }
    // A file that is not there is told before anything is sent.
    let (mut kernel_bytes, mut module_bytes, mut disk_bytes) = (0, 0, Vec::new());
    for (path, file) in &parts {
        let metadata = tokio::fs::metadata(path).await;
        let bytes = metadata.with_context(|| format!("cannot read {}", path.display()))?.len();
        match file {
            File::Kernel(_) => kernel_bytes = bytes,
            File::Module(_) => module_bytes = bytes,
            File::Disk(_) => disk_bytes.push(bytes),
        }
    }
    let spec = proto::ImageSpec {
        name,
        boot: Some(proto::BootSettings {
            protocol: files.protocol.number(),
            command_line: files.cmdline.clone(),
            vcpus,
            memory_bytes,
            ready,
        }),
        module: match (&files.memory_disk, &files.initrd) {
            (Some(_), _) => proto::ModuleKind::MemoryDisk,
            (None, Some(_)) => proto::ModuleKind::Initrd,
            (None, None) => proto::ModuleKind::Unspecified,
        }
        .into(),
        disks: disks
            .iter()
            .zip(disk_bytes)
            .map(|((_, read_only), bytes)| proto::DiskSettings { read_only: *read_only, bytes })
            .collect(),
        embedded: files.embedded,
        kernel_bytes,
        module_bytes,
    };
    let (messages, stream) = mpsc::channel(4);
    let sending = async move {
        // A service that gives up closes the stream; its status says why.
        let _ = messages.send(proto::ImportImageRequest { message: Some(Message::Spec(spec)) }).await;
        for (path, file) in parts {
            if let Err(error) = send_file(&path, file, &messages).await {
                return Err((error, messages));
            }
        }
        Ok(())
    };
    let importing = client.images.import_image(ReceiverStream::new(stream));
    tokio::pin!(sending, importing);
    tokio::select! {
        sent = &mut sending => match sent {
            Ok(()) => Ok(importing.await?.into_inner()),
            // The call is given up while its stream is still open, so that the service sees no good end.
            Err((error, _open)) => Err(error),
        },
        image = &mut importing => Ok(image?.into_inner()),
    }
}

async fn send_file(
    path: &Path,
    file: File,
    messages: &mpsc::Sender<proto::ImportImageRequest>,
) -> anyhow::Result<()> {
    const CHUNK_BYTES: usize = 1 << 20;
    let failed = || format!("cannot read {}", path.display());
    let mut from = tokio::fs::File::open(path).await.with_context(failed)?;
    loop {
        let mut data = Vec::with_capacity(CHUNK_BYTES);
        let count = (&mut from).take(CHUNK_BYTES as u64).read_to_end(&mut data).await.with_context(failed)?;
        if count == 0 {
            return Ok(());
        }
        let chunk = proto::FileChunk { file: Some(file), data: Bytes::from(data) };
        if messages.send(proto::ImportImageRequest { message: Some(Message::Chunk(chunk)) }).await.is_err() {
            return Ok(());
        }
    }
}

async fn list(socket: &SocketArgument, as_json: bool) -> anyhow::Result<()> {
    let mut client = socket.connect().await?.images;
    let images = client.list_images(proto::ListImagesRequest {}).await?.into_inner().images;
    if as_json {
        let value = |image: &proto::Image| {
            let boot = image.boot.clone().unwrap_or_default();
            json!({
                "name": image.name,
                "embedded": image.embedded,
                "protocol": protocol_name(boot.protocol),
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
