//! `coldspark image pull`: a FreeBSD release from the project's mirror, ready to boot.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use super::import::{self, Boot};
use super::{FileArguments, Protocol};
use crate::api::proto;
use crate::cli::vm::create::{Hardware, ReadyArguments};
use crate::cli::{SocketArgument, output, units};
use crate::media::pull::{self, Mirror, Progress, Release};

pub const EXAMPLES: &str = "Examples:
  coldspark image pull freebsd-15.1
  coldspark image pull freebsd-15.1 --kind ci --name ci
  COLDSPARK_FREEBSD_MIRROR=https://ftp.de.freebsd.org/pub/FreeBSD coldspark image pull freebsd-14.3

A download that broke off goes on where it was. The published SHA-256 is checked before anything is imported.";

/// Which of the published disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The image for virtual machines
    Vm,
    /// The smaller one for continuous integration
    Ci,
}

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// The release: freebsd-15.1, freebsd-15.1-RC1
    release: String,
    /// The image's name: a-z 0-9 - [default: freebsd-15-1]
    #[arg(long)]
    name: Option<String>,
    /// Base address of a mirror
    #[arg(long, env = "COLDSPARK_FREEBSD_MIRROR", value_name = "URL", default_value = pull::MIRROR)]
    mirror: String,
    /// Which of the published disk images
    #[arg(long, value_enum, default_value_t = Kind::Vm)]
    kind: Kind,
    /// Where the download grows [default: coldspark/ in $XDG_CACHE_HOME, or in ~/.cache]
    #[arg(long, env = "COLDSPARK_DOWNLOADS", value_name = "FOLDER")]
    downloads: Option<PathBuf>,
    /// Keep the downloaded file after the import
    #[arg(long)]
    keep: bool,
    /// vCPUs unless a VM asks for others
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,
    /// Memory unless a VM asks for another
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::parse_bytes)]
    memory: u64,
    /// Kernel environment, name=value words
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// When VMs of it count as ready [default: --ready login:]
    #[command(flatten)]
    ready: ReadyArguments,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// The command.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let release = Release::parse(&arguments.release)?;
    let name = arguments.name.clone().unwrap_or_else(|| release.image_name());
    let folder = downloads(&arguments)?;
    let mut client = arguments.socket.connect().await?;
    // Before a long download, not after it.
    match client.images.get_image(proto::GetImageRequest { name: name.clone() }).await {
        Ok(_) => bail!("there already is an image {name:?}: delete it first, or choose another --name"),
        Err(status) if status.code() == tonic::Code::NotFound => {}
        Err(status) => return Err(status.into()),
    }
    let file = download(&arguments, release, folder).await?;
    let files = FileArguments {
        kernel: None,
        embedded: false,
        disks: vec![file.to_string_lossy().into_owned()],
        memory_disk: None,
        initrd: None,
        cmdline: arguments.cmdline.clone(),
        protocol: Protocol::Auto,
        hardware: Hardware::Auto,
        agent_port: None,
    };
    let login = || proto::ready_point::At::ConsolePattern("login:".into());
    let ready = arguments.ready.point().unwrap_or_else(|| proto::ReadyPoint { at: Some(login()) });
    let boot = Boot { ready: Some(ready), vcpus: arguments.vcpus, memory_bytes: arguments.memory };
    let image = import::send(&mut client, name, &files, boot, !arguments.quiet).await?;
    image.found.iter().for_each(|line| output::note(line));
    if !arguments.keep {
        tokio::fs::remove_file(&file)
            .await
            .with_context(|| format!("the image is imported, but {} cannot be removed", file.display()))?;
    }
    output::line(&image.name)?;
    Ok(())
}

fn downloads(arguments: &Arguments) -> anyhow::Result<PathBuf> {
    if let Some(folder) = &arguments.downloads {
        return Ok(folder.clone());
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache"))) {
        Some(cache) => Ok(cache.join("coldspark")),
        None => bail!("neither XDG_CACHE_HOME nor HOME is set: say with --downloads where the download goes"),
    }
}

/// Downloads on a thread of its own, and shows how far it is.
async fn download(arguments: &Arguments, release: Release, folder: PathBuf) -> anyhow::Result<PathBuf> {
    let kind = match arguments.kind {
        Kind::Vm => pull::Kind::Vm,
        Kind::Ci => pull::Kind::Ci,
    };
    let progress = Arc::new(Progress::default());
    let bar = import::progress(!arguments.quiet);
    bar.set_message(format!("asking {}", arguments.mirror));
    let (mirror, told, shown) = (arguments.mirror.clone(), Arc::clone(&progress), bar.clone());
    let mut downloading = tokio::task::spawn_blocking(move || -> anyhow::Result<PathBuf> {
        let mirror = Mirror::new(&mirror)?;
        let published = mirror.find(&release, kind)?;
        shown.set_message(published.name.clone());
        shown.suspend(|| {
            output::note(&published.url);
            published.note.iter().for_each(|note| output::note(note));
        });
        Ok(mirror.download(&published, &folder, &told)?)
    });
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let file = loop {
        tokio::select! {
            file = &mut downloading => break file,
            _ = tick.tick() => {
                bar.set_length(progress.of.load(Ordering::Relaxed));
                bar.set_position(progress.bytes.load(Ordering::Relaxed));
            }
        }
    };
    bar.finish_and_clear();
    file.context("the download was broken off")?
}
