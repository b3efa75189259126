//! `coldspark run`: boot a kernel, run one command on its console, and end with its status. For kernel developers' loops.
//!
//! Happy path: a private service, a cold boot with the console shown, a command typed at a shell's prompt, its output passed on,
//! its status taken from a line that the shell prints after it. FreeBSD is booted to single user for that, unless `--ready`
//! names another moment at which a shell waits. Without a command the console is shown until the guest ends.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::image::{self, FileArguments};
use super::output;
use super::private::{PrivateService, unless_interrupted};
use super::units;
use super::vm::create::{Hardware, Protocol, ReadyArguments};
use crate::api::client::Client;
use crate::api::proto;

pub const EXAMPLES: &str = "Examples:
  coldspark run --kernel obj/kernel --disk root.img --cpus 4 --mem 512M -- sysctl hw.ncpu
  coldspark run --kernel bzImage --initrd root.cpio --cmdline console=ttyS0 --ready '# ' -- uname -a
  coldspark run --kernel obj/kernel --disk root.img

Exit status: the command's; 125 when coldspark or the guest failed before it ended (a panic, a reset, no prompt in time).
Without a command the console is shown until the guest ends; Ctrl-C ends it at any time.";

/// The status for everything that is not the command's own.
const FAILED: u8 = 125;
/// What FreeBSD asks in single user mode (sbin/init).
const SINGLE_USER: &str = "Enter full pathname of shell or RETURN for /bin/sh:";
/// The shell puts these marks together, so that the echo of what is typed does not hold them.
const BEGIN: &str = "coldspark-begin:";
const STATUS: &str = "coldspark-status:";
/// Longest thing that is looked for at the end of what has been heard.
const HEARD_BYTES_MAX: usize = 4 << 10;
/// A line editor's longest line, near enough (FreeBSD's MAX_CANON is 255, its sh and busybox take far more raw).
const COMMAND_BYTES_MAX: usize = 1024;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Kernel file
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// A disk (may be given again); add `:ro` to make it read-only. What the guest writes is gone afterwards
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    disks: Vec<String>,
    /// A memory disk for FreeBSD (md_image)
    #[arg(long, value_name = "FILE", conflicts_with = "initrd")]
    memory_disk: Option<PathBuf>,
    /// An initial RAM disk for Linux
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line, or name=value words for FreeBSD's environment
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = Protocol::Auto)]
    protocol: Protocol,
    /// The kind of machine
    #[arg(long, value_enum, default_value_t = Hardware::Auto)]
    hardware: Hardware,
    /// vCPUs, 1 to 32
    #[arg(long, visible_alias = "vcpus", value_name = "N", default_value_t = 1, value_parser = units::parse_vcpus)]
    cpus: u32,
    /// Memory
    #[arg(long, visible_alias = "memory", value_name = "SIZE", default_value = "512M", value_parser = units::parse_bytes)]
    mem: u64,
    #[command(flatten)]
    ready: ReadyArguments,
    /// The end of the shell's prompt
    #[arg(long, value_name = "TEXT", default_value = "# ")]
    prompt: String,
    /// Seconds to wait for the shell
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u32,
    /// Do not show the console before the command's output
    #[arg(short, long)]
    quiet: bool,
    /// The command and its arguments, run by the guest's shell as they are
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    Ok(attempt(arguments).await.unwrap_or_else(|error| {
        output::failed(&error);
        ExitCode::from(FAILED)
    }))
}

async fn attempt(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let command = arguments.command.join(" ");
    if command.len() > COMMAND_BYTES_MAX || command.contains(char::is_control) {
        bail!(
            "a command of {} bytes or with control characters; the most is {COMMAND_BYTES_MAX} plain bytes in one line",
            command.len()
        );
    }
    let service = PrivateService::start(1).await?;
    let result = unless_interrupted(session(service.client.clone(), &arguments, &command)).await;
    service.close().await;
    Ok(ExitCode::from(result?))
}

async fn session(mut client: Client, arguments: &Arguments, command: &str) -> anyhow::Result<u8> {
    let single_user = !command.is_empty() && arguments.ready.point().is_none();
    let vm = boot(&mut client, arguments, single_user).await?;
    let mut console = Console::open(&mut client, &vm.id).await?;
    if command.is_empty() {
        console.show_rest().await?;
        let vm = client.vms.get_vm(proto::GetVmRequest { vm: vm.id }).await?.into_inner();
        output::note(&format!("\n[coldspark] {}", vm.exit_reason));
        return match vm.panic.is_empty() {
            true => Ok(0),
            false => bail!("the guest's kernel panicked ({})", vm.panic),
        };
    }
    let asked = async {
        if single_user {
            console.type_in("\n").await?;
        }
        console.until(&arguments.prompt).await?;
        // The typed line's end is not followed by anything that the shell could take for its own.
        console
            .type_in(&format!("echo cold''spark-begin:; ( {command} ); echo cold''spark-status:$?:\n"))
            .await?;
        console.until(BEGIN).await?;
        console.until("\n").await
    };
    let within = std::time::Duration::from_secs(arguments.timeout.into());
    match tokio::time::timeout(within, asked).await {
        Ok(result) => result?,
        Err(_) => bail!(
            "the guest's shell did not take the command within {} s; is {:?} its prompt? (--prompt, --ready)",
            within.as_secs(),
            arguments.prompt
        ),
    };
    let status = console.pass_on_until(STATUS).await?;
    status.parse().with_context(|| format!("the shell said {status:?} where the command's status belongs"))
}

/// Boots and shows the console meanwhile.
async fn boot(client: &mut Client, arguments: &Arguments, single_user: bool) -> anyhow::Result<proto::Vm> {
    use proto::create_vm_event::Event;
    let files = FileArguments {
        kernel: Some(arguments.kernel.clone()),
        embedded: false,
        disks: arguments.disks.clone(),
        memory_disk: arguments.memory_disk.clone(),
        initrd: arguments.initrd.clone(),
        cmdline: match single_user {
            true => format!("boot_single=YES {}", arguments.cmdline),
            false => arguments.cmdline.clone(),
        },
        protocol: arguments.protocol,
        hardware: arguments.hardware,
        agent_port: None,
    };
    let ready = match (arguments.ready.point(), single_user) {
        (None, true) => {
            let at = proto::ready_point::At::ConsolePattern(SINGLE_USER.to_owned());
            Some(proto::ReadyPoint { at: Some(at) })
        }
        // Nothing to wait for: ready when the vCPUs run would be best; the first line will do.
        (None, false) => {
            let at = proto::ready_point::At::ConsolePattern("\n".to_owned());
            Some(proto::ReadyPoint { at: Some(at) })
        }
        (point, _) => point,
    };
    let image = image::import(client, "run".to_owned(), &files, ready, arguments.cpus, arguments.mem).await?;
    let request = proto::CreateVmRequest {
        source: Some(proto::create_vm_request::Source::Image(image.name)),
        ready_timeout_ms: arguments.timeout.saturating_mul(1000),
        on_reset: proto::OnReset::End.into(),
        ..proto::CreateVmRequest::default()
    };
    let mut events = client.vms.create_vm(request).await?.into_inner();
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Console(bytes)) if !arguments.quiet && !arguments.command.is_empty() => {
                output::note_bytes(&bytes);
            }
            Some(Event::Ready(vm)) => return Ok(vm),
            _ => {}
        }
    }
    bail!("the service ended the stream before the VM was ready")
}

/// The VM's console, from its beginning.
struct Console {
    input: mpsc::Sender<proto::ConsoleRequest>,
    output: Streaming<proto::ConsoleResponse>,
    /// Heard and not used yet.
    heard: Vec<u8>,
}

impl Console {
    async fn open(client: &mut Client, vm: &str) -> anyhow::Result<Self> {
        use proto::console_request::Message as In;
        let (input, stream) = mpsc::channel(4);
        let open = In::Open(proto::ConsoleOpen { vm: vm.to_owned(), no_backlog: false });
        input.send(proto::ConsoleRequest { message: Some(open) }).await?;
        let output = client.vms.console(ReceiverStream::new(stream)).await?.into_inner();
        Ok(Self { input, output, heard: Vec::new() })
    }

    async fn type_in(&self, text: &str) -> anyhow::Result<()> {
        let input = proto::console_request::Message::Input(Bytes::from(text.to_owned()));
        self.input
            .send(proto::ConsoleRequest { message: Some(input) })
            .await
            .context("the console has ended: the guest is gone")
    }

    /// More output; false at the console's end.
    async fn more(&mut self) -> anyhow::Result<bool> {
        use proto::console_response::Message as Out;
        let Some(answer) = self.output.message().await? else { return Ok(false) };
        match answer.message {
            Some(Out::Output(bytes)) => self.heard.extend_from_slice(&bytes),
            Some(Out::LostBytes(count)) => {
                output::note(&format!("[coldspark] {count} bytes of output are lost here"))
            }
            None => {}
        }
        Ok(true)
    }

    fn find(&self, words: &str) -> Option<usize> {
        self.heard.windows(words.len().max(1)).position(|window| window == words.as_bytes())
    }

    /// Waits for `words` and forgets all up to their end.
    async fn until(&mut self, words: &str) -> anyhow::Result<()> {
        loop {
            if let Some(at) = self.find(words) {
                self.heard.drain(..at + words.len());
                return Ok(());
            }
            let surplus = self.heard.len().saturating_sub(HEARD_BYTES_MAX);
            self.heard.drain(..surplus);
            if !self.more().await? {
                bail!("the guest ended before its console said {words:?}");
            }
        }
    }

    /// Passes output on to stdout until `mark`; gives what stands between it and the next colon.
    async fn pass_on_until(&mut self, mark: &str) -> anyhow::Result<String> {
        loop {
            let found = self.find(mark);
            // What may be the mark's beginning waits.
            let safe = found.unwrap_or(self.heard.len().saturating_sub(mark.len()));
            let mut out = std::io::stdout().lock();
            out.write_all(self.heard.get(..safe).unwrap_or_default())?;
            out.flush()?;
            drop(out);
            self.heard.drain(..safe);
            if found.is_some()
                && let Some(rest) = self.heard.get(mark.len()..)
                && let Some(end) = rest.iter().position(|byte| *byte == b':')
            {
                return Ok(String::from_utf8_lossy(rest.get(..end).unwrap_or_default()).into_owned());
            }
            if found.is_some() && self.heard.len() > HEARD_BYTES_MAX {
                bail!("the guest's console goes on where the command's status belongs");
            }
            if !self.more().await? {
                bail!("the guest ended before the command did");
            }
        }
    }

    async fn show_rest(&mut self) -> anyhow::Result<()> {
        loop {
            let mut out = std::io::stdout().lock();
            out.write_all(&self.heard)?;
            out.flush()?;
            drop(out);
            self.heard.clear();
            if !self.more().await? {
                return Ok(());
            }
        }
    }
}
