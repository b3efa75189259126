//! `coldspark image import`: files of this machine, unpacked on the way and sent as an image.
//!
//! Disks and kernels may be compressed, disks may be qcow2 ([`crate::media::unpack`]): what is sent is the raw content, long runs of
//! zeros as their length alone. If no kernel is given the service looks for one on the disks and says what it found.

use std::io::{IsTerminal, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use prost::bytes::Bytes;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::FileArguments;
use crate::api::client::{Client, leave_unended};
use crate::api::proto;
use crate::cli::vm::create::{AgentPort, ReadyArguments};
use crate::cli::{SocketArgument, output, units};
use crate::media::unpack::{self, Unpacked};
use proto::file_chunk::File;
use proto::import_image_request::Message;

/// Most data in one message.
const CHUNK_BYTES: usize = 1 << 20;
/// Most zeros in one message, so that a sparse disk still shows progress.
const ZEROS_MAX: u64 = 1 << 30;

pub const EXAMPLES: &str = "Examples:
  coldspark image import --name freebsd FreeBSD-15.1-RELEASE-amd64-ufs.raw.xz
  coldspark image import freebsd --kernel kernel --disk root.ufs --ready 'login:'
  coldspark image import freebsd root.ufs --with-agent
  coldspark image import test --embedded

Disks: raw, xz, zstd, gzip, and qcow2 where qemu-img is installed. Without --kernel the kernel is taken from the
first disk that has a UFS with /boot/kernel/kernel.";

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// The image's name: a-z 0-9 - [default: the first word after `import`]
    #[arg(long)]
    name: Option<String>,
    /// The image's name, unless --name gives it, and disks; add `:ro` to make a disk read-only
    #[arg(value_name = "NAME|DISK")]
    words: Vec<String>,
    #[command(flatten)]
    files: FileArguments,
    #[command(flatten)]
    ready: ReadyArguments,
    /// vCPUs, 1 to 32, unless a VM asks for others
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = units::parse_vcpus)]
    vcpus: u32,
    /// Memory unless a VM asks for another
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    memory: u64,
    /// Add a disk with the agent for FreeBSD guests, and say how it is installed from there
    #[arg(long)]
    with_agent: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// The command.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { socket, name, words, mut files, ready, vcpus, memory, with_agent, quiet } = arguments;
    let mut words = words.into_iter();
    let name = match name.or_else(|| words.next()) {
        Some(name) => name,
        None => bail!("give the image a name: --name NAME, or the first word after `import`"),
    };
    files.disks.splice(..0, words);
    let mut client = socket.connect().await?;
    let boot = Boot { ready: ready.point(), vcpus, memory_bytes: memory };
    let agent = if with_agent { Some(AgentDisk::add_to(&mut files)?) } else { None };
    let image = send(&mut client, name, &files, boot, !quiet).await?;
    image.found.iter().for_each(|line| output::note(line));
    agent.iter().for_each(AgentDisk::tell);
    output::line(&image.name)?;
    Ok(())
}

/// A disk with the agent, as one more file to be sent. A root file system is not written to from outside: a guest unpacks it.
struct AgentDisk {
    /// Goes with this.
    _file: NamedTempFile,
    /// Which of the guest's disks it is.
    number: usize,
}

impl AgentDisk {
    fn add_to(files: &mut FileArguments) -> anyhow::Result<Self> {
        let file = tempfile::Builder::new().prefix("coldspark-agent-").suffix(".disk").tempfile();
        let mut file = file.context("cannot make a temporary file for the agent's disk")?;
        file.write_all(&crate::cli::agent::disk()).context("cannot write the agent's disk")?;
        let number = files.disks.len();
        files.disks.push(format!("{}:ro", file.path().display()));
        Ok(Self { _file: file, number })
    }

    fn tell(&self) {
        output::note(&format!(
            "the agent is on disk {0}; in the guest, once, as root:\n  tar -xpf /dev/vtbd{0} -C /\n  sysrc coldspark_agent_enable=YES && service coldspark_agent start",
            self.number
        ));
    }
}

/// Sends an image to the service, without a word.
pub async fn import(
    client: &mut Client,
    name: String,
    files: &FileArguments,
    ready: Option<proto::ReadyPoint>,
    vcpus: u32,
    memory_bytes: u64,
) -> anyhow::Result<proto::Image> {
    send(client, name, files, Boot { ready, vcpus, memory_bytes }, false).await
}

/// How VMs of the image boot.
pub struct Boot {
    pub ready: Option<proto::ReadyPoint>,
    pub vcpus: u32,
    pub memory_bytes: u64,
}

/// A file that is going to be sent.
struct Part {
    path: PathBuf,
    file: File,
    content: Unpacked,
}

/// Sends an image to the service, with a progress bar if `show` and stderr is a terminal.
pub async fn send(
    client: &mut Client,
    name: String,
    files: &FileArguments,
    boot: Boot,
    show: bool,
) -> anyhow::Result<proto::Image> {
    let disks: Vec<(PathBuf, bool)> = files
        .disks
        .iter()
        .map(|disk| match disk.strip_suffix(":ro") {
            Some(path) => (path.into(), true),
            None => (disk.into(), false),
        })
        .collect();
    let find_kernel = files.kernel.is_none() && !files.embedded;
    if find_kernel && disks.is_empty() {
        bail!("give --kernel FILE, a disk with a kernel on it, or --embedded");
    }
    let mut wanted = Vec::new();
    wanted.extend(files.kernel.iter().map(|path| (path.clone(), File::Kernel(true))));
    let module = files.memory_disk.as_ref().or(files.initrd.as_ref());
    wanted.extend(module.map(|path| (path.clone(), File::Module(true))));
    for (n, (path, _)) in disks.iter().enumerate() {
        wanted.push((path.clone(), File::Disk(u32::try_from(n)?)));
    }
    let bar = progress(show);
    // A file that is not there, or is none that can be read, is told before anything is sent.
    let mut parts = Vec::new();
    for (path, file) in wanted {
        bar.set_message(format!("opening {}", name_of(&path)));
        parts.push(open(path, file).await?);
    }
    let length = |wanted: fn(&File) -> bool| {
        parts.iter().find(|part| wanted(&part.file)).and_then(|part| part.content.bytes).unwrap_or(0)
    };
    let spec = proto::ImageSpec {
        name,
        boot: Some(proto::BootSettings {
            protocol: files.protocol.number(),
            hardware: files.hardware.number(),
            agent_port: files.agent_port.map_or(0, AgentPort::number),
            command_line: files.cmdline.clone(),
            vcpus: boot.vcpus,
            memory_bytes: boot.memory_bytes,
            ready: boot.ready,
        }),
        module: match (&files.memory_disk, &files.initrd) {
            (Some(_), _) => proto::ModuleKind::MemoryDisk,
            (None, Some(_)) => proto::ModuleKind::Initrd,
            (None, None) => proto::ModuleKind::Unspecified,
        }
        .into(),
        embedded: files.embedded,
        kernel_bytes: length(|file| matches!(file, File::Kernel(_))),
        module_bytes: length(|file| matches!(file, File::Module(_))),
        find_kernel,
        disks: disks
            .iter()
            .zip(parts.iter().filter(|part| matches!(part.file, File::Disk(_))))
            .map(|((path, read_only), part)| proto::DiskSettings {
                read_only: *read_only,
                bytes: part.content.bytes.unwrap_or(0),
                name: name_of(path),
            })
            .collect(),
    };
    let (messages, stream) = mpsc::channel(4);
    let shown = bar.clone();
    let sending = async move {
        // A service that gives up closes the stream; its status says why.
        let _ = messages.send(proto::ImportImageRequest { message: Some(Message::Spec(spec)) }).await;
        for part in parts {
            if let Err(error) = watch(part, &messages, &shown).await {
                leave_unended(messages);
                return Err(error);
            }
        }
        shown.set_message("the service looks through, sums and stores it");
        Ok(())
    };
    let importing = client.images.import_image(ReceiverStream::new(stream));
    tokio::pin!(sending, importing);
    let result = tokio::select! {
        sent = &mut sending => match sent {
            Ok(()) => Ok(importing.await),
            Err(error) => Err(error),
        },
        image = &mut importing => Ok(image),
    };
    bar.finish_and_clear();
    Ok(result??.into_inner())
}

/// Sends a file and shows how far it is.
async fn watch(
    part: Part,
    messages: &mpsc::Sender<proto::ImportImageRequest>,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    bar.set_length(part.content.stored_bytes);
    bar.set_message(describe(&part));
    let (done, messages) = (Arc::clone(&part.content.done), messages.clone());
    let mut reading = tokio::task::spawn_blocking(move || send_part(part, &messages));
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            read = &mut reading => return read.context("reading was broken off")?,
            _ = tick.tick() => bar.set_position(done.load(Ordering::Relaxed)),
        }
    }
}

/// A bar for bytes, if `show` and stderr is a terminal.
pub fn progress(show: bool) -> ProgressBar {
    if !show || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    // The template is a constant; a bar without it is as good.
    let template = "{spinner} {msg}  {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    name.chars().filter(|c| !c.is_control()).take(60).collect()
}

fn describe(part: &Part) -> String {
    let name = name_of(&part.path);
    match part.content.formats.as_slice() {
        [] => name,
        formats => {
            let formats: Vec<&str> = formats.iter().map(|format| format.name()).collect();
            format!("{name} ({})", formats.join(", "))
        }
    }
}

async fn open(path: PathBuf, file: File) -> anyhow::Result<Part> {
    // A module is handed over as it is: a guest may want it compressed.
    let module = matches!(file, File::Module(_));
    let opened = tokio::task::spawn_blocking(move || {
        let content = if module { unpack::open_as_it_is(&path) } else { unpack::open(&path) };
        content.map(|content| Part { path, file, content })
    });
    Ok(opened.await.context("opening was broken off")??)
}

/// Reads a file and sends it, until the end or until nobody listens. Blocks.
fn send_part(mut part: Part, messages: &mpsc::Sender<proto::ImportImageRequest>) -> anyhow::Result<()> {
    let mut zeros = 0;
    let send = |data: Bytes, zeros: u64| {
        let chunk = proto::FileChunk { file: Some(part.file), data, zeros };
        messages.blocking_send(proto::ImportImageRequest { message: Some(Message::Chunk(chunk)) }).is_ok()
    };
    loop {
        let mut data = Vec::with_capacity(CHUNK_BYTES);
        (&mut part.content).take(CHUNK_BYTES as u64).read_to_end(&mut data)?;
        if !data.is_empty() && data.iter().all(|byte| *byte == 0) && zeros < ZEROS_MAX {
            zeros += data.len() as u64;
            continue;
        }
        if zeros > 0 && !send(Bytes::new(), std::mem::take(&mut zeros)) {
            return Ok(());
        }
        if data.is_empty() || !send(Bytes::from(data), 0) {
            return Ok(());
        }
    }
}
