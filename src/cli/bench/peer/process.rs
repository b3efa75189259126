//! Another VMM's process: its guest's serial console on stdin and stdout, ended when dropped.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, ChildStdin, Command};

/// How long each step of another VMM may take.
pub const STEP: Duration = Duration::from_secs(60);
/// What one process may print.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// How much of it an error shows.
const SHOWN_BYTES: usize = 600;

/// A program that answers to `--version`, and what it says of itself.
pub async fn version(program: &Path) -> anyhow::Result<String> {
    let mut process = Process::start(program, ["--version"])?;
    process.read_to_end().await.with_context(|| format!("{} --version", program.display()))?;
    let text = String::from_utf8_lossy(&process.output);
    let line = text.lines().find(|line| !line.trim().is_empty()).map(|line| {
        // A distribution's own number behind it is of no use in a table.
        line.split(" (").next().unwrap_or_default().trim().to_owned()
    });
    line.with_context(|| format!("{} --version says nothing: is it the program meant?", program.display()))
}

/// A running one.
pub struct Process {
    child: Child,
    stdin: ChildStdin,
    /// Stdout and stderr.
    pipe: Receiver,
    output: Vec<u8>,
    /// What [`Process::wait_for`] has already given.
    seen: usize,
}

impl Process {
    pub fn start<A: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Self> {
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        let stderr = writer.try_clone().context("cannot make a pipe")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(writer).stderr(stderr).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| {
            format!("cannot start {}: give the path of the VMM's program, executable here", program.display())
        })?;
        let stdin = child.stdin.take().context("the process was started without stdin")?;
        let pipe = Receiver::from_owned_fd(OwnedFd::from(reader)).context("cannot read a pipe")?;
        Ok(Self { child, stdin, pipe, output: Vec::new(), seen: 0 })
    }

    /// Types on the guest's console.
    pub async fn type_in(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stdin.write_all(bytes).await.with_context(|| self.said("does not take what is typed"))
    }

    /// Waits until this is printed, behind what was waited for before.
    pub async fn wait_for(&mut self, what: &[u8]) -> anyhow::Result<()> {
        let waiting = async {
            loop {
                let unseen = self.output.get(self.seen..).unwrap_or_default();
                if let Some(at) = memchr::memmem::find(unseen, what) {
                    self.seen += at + what.len();
                    return Ok(());
                }
                if !self.read().await? {
                    bail!("ended");
                }
            }
        };
        let waited = tokio::time::timeout(STEP, waiting).await;
        let waited =
            waited.unwrap_or_else(|_| Err(anyhow::anyhow!("said nothing more for {} s", STEP.as_secs())));
        waited.with_context(|| self.said(&format!("waiting for {:?}", what.escape_ascii().to_string())))
    }

    /// False when it is still there.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// What it last printed, for an error.
    pub fn said(&self, why: &str) -> String {
        let from = self.output.len().saturating_sub(SHOWN_BYTES);
        let last = String::from_utf8_lossy(self.output.get(from..).unwrap_or_default());
        let last: Vec<&str> = last.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        format!(
            "{why}; it last said: {}",
            if last.is_empty() { "nothing".to_owned() } else { last.join(" | ") }
        )
    }

    /// Reads all that it has printed until it ended, for [`Process::said`].
    pub async fn read_to_end(&mut self) -> anyhow::Result<()> {
        let reading = async {
            while self.read().await? {}
            anyhow::Ok(())
        };
        tokio::time::timeout(STEP, reading).await.context("does not end")?
    }

    /// Kills it and waits until it is gone.
    pub async fn end(mut self) -> anyhow::Result<()> {
        let ended = tokio::time::timeout(STEP, self.child.kill()).await;
        ended.context("the process does not end when killed")?.context("cannot kill the process")
    }

    /// False at the end.
    async fn read(&mut self) -> anyhow::Result<bool> {
        ensure!(self.output.len() < OUTPUT_BYTES_MAX, "printed more than {OUTPUT_BYTES_MAX} bytes");
        let mut buffer = [0; 4096];
        let count = self.pipe.read(&mut buffer).await.context("cannot read what it prints")?;
        self.output.extend_from_slice(buffer.get(..count).unwrap_or_default());
        Ok(count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Path::new("/bin/sh"), ["-c", script]).unwrap()
    }

    #[tokio::test]
    async fn what_is_typed_comes_back_in_order() {
        let mut process = shell("exec cat");
        process.type_in(b"one two one").await.unwrap();
        process.wait_for(b"one").await.unwrap();
        process.wait_for(b"one").await.unwrap();
        assert!(!process.has_ended());
        process.end().await.unwrap();
    }

    #[tokio::test]
    async fn a_program_without_a_version_is_named() {
        // The one tool of a shell that takes `--version` for an operand.
        let error = format!("{:#}", version(Path::new("/usr/bin/test")).await.unwrap_err());
        assert!(error.contains("/usr/bin/test --version says nothing"), "{error}");
    }

    #[tokio::test]
    async fn a_process_that_ends_is_told_with_its_last_words() {
        let mut process = shell("echo no such machine >&2; exit 1");
        let error = format!("{:#}", process.wait_for(b"ready").await.unwrap_err());
        assert!(error.contains("no such machine") && error.contains("ended"), "{error}");
    }

    #[tokio::test]
    async fn output_has_a_limit() {
        let mut process = shell("exec cat /dev/zero");
        let error = format!("{:#}", process.wait_for(b"ready").await.unwrap_err());
        assert!(error.contains("more than 1048576 bytes"), "{error}");
        assert!(process.output.len() <= OUTPUT_BYTES_MAX + 4096);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = format!("{:#}", version(Path::new("/nowhere/firecracker")).await.unwrap_err());
        assert!(error.contains("cannot start /nowhere/firecracker"), "{error}");
    }
}
