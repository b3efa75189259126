//! QEMU's machine `microvm`: its smallest, which takes the guest's PVH entry as Firecracker does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::process::{Process, STEP, version};
use super::{ENQUIRY, Guest, Round, SETTINGS};
use crate::agent::testguest::READY_LINE;

/// First with `mapped-ram`, which leaves pages of zeros out of the file: what QEMU has for quick restores.
const MAPPED_RAM_SINCE: u32 = 9;
/// Nothing that the guest does not need. No ACPI: building its tables takes the firmware long.
const MACHINE: &str = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off";
/// Without an MSR that QEMU ends of on hosts that tell of it and do not let it be set (nested ones).
const CPU: &str = "host,-arch-capabilities";
/// What is typed before the machine is loaded is lost in the loading, and QEMU does not say when that is over: the guest
/// is asked again so often. That is how far a time may be too long.
const AGAIN: Duration = Duration::from_millis(1);
/// What the control socket may say until the migration is done.
const QMP_BYTES_MAX: u64 = 1 << 20;

pub struct Qemu {
    program: PathBuf,
    pub version: String,
    guest: Guest,
    control: PathBuf,
    state: PathBuf,
}

impl Qemu {
    pub async fn new(program: &Path, guest: Guest) -> anyhow::Result<Self> {
        let version = version(program).await?;
        ensure!(version.contains("QEMU"), "{} says it is {version:?}, not QEMU", program.display());
        let [control, state] = ["qemu.socket", "qemu.state"].map(|name| guest.folder.join(name));
        // One ends a path in QEMU's options.
        ensure!(
            !control.to_string_lossy().contains(','),
            "QEMU takes no comma in {}: set TMPDIR to another folder",
            guest.folder.display()
        );
        Ok(Self { program: program.to_owned(), version, guest, control, state })
    }

    /// From the start of the process to the line with which the guest says that it is ready.
    pub async fn boot(&self) -> anyhow::Result<Round> {
        let begin = Instant::now();
        let mut process = self.start(&[])?;
        process.wait_for(READY_LINE.as_bytes()).await.with_context(|| self.version.clone())?;
        Round::end(begin, None, process).await
    }

    /// Boots and makes the file that [`Qemu::restore`] reads.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        let major = major(&self.version);
        ensure!(
            major.is_some_and(|major| major >= MAPPED_RAM_SINCE),
            "{} cannot be compared: restores need QEMU {MAPPED_RAM_SINCE}.0 or newer (`bench boot --compare-qemu` does not)",
            self.version
        );
        let control = format!("unix:{},server=on,wait=off", self.control.display());
        let mut process = self.start(&["-global", "migration.mapped-ram=on", "-qmp", &control])?;
        let freezing = async {
            process.wait_for(READY_LINE.as_bytes()).await?;
            process.type_in(&[ENQUIRY]).await?;
            process.wait_for(&[ENQUIRY]).await?;
            let saving = tokio::time::timeout(STEP, self.save());
            saving.await.with_context(|| format!("not saved after {} s", STEP.as_secs()))?
        };
        let frozen: anyhow::Result<()> = freezing.await;
        frozen.with_context(|| format!("{} ({})", self.version, process.said("failed")))?;
        process.end().await
    }

    /// From the start of the process to the guest's answer.
    pub async fn restore(&self) -> anyhow::Result<Round> {
        let begin = Instant::now();
        let from = format!("file:{}", self.state.display());
        let mut process = self.start(&["-global", "migration.mapped-ram=on", "-incoming", &from])?;
        let asking = async {
            loop {
                process.type_in(&[ENQUIRY]).await?;
                if let Ok(answered) = tokio::time::timeout(AGAIN, process.wait_for(&[ENQUIRY])).await {
                    return answered;
                }
            }
        };
        let answered = tokio::time::timeout(STEP, asking).await;
        let answered = answered.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in {} s", STEP.as_secs())));
        answered.with_context(|| format!("{} ({})", self.version, process.said("restored")))?;
        Round::end(begin, None, process).await
    }

    fn start(&self, more: &[&str]) -> anyhow::Result<Process> {
        let memory = format!("{}M", self.guest.memory_bytes >> 20);
        let vcpus = self.guest.vcpus.to_string();
        let kernel = self.guest.kernel.to_string_lossy();
        let plain = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"];
        let machine = ["-M", MACHINE, "-cpu", CPU, "-m", &memory, "-smp", &vcpus];
        let guest = ["-kernel", &kernel, "-append", SETTINGS];
        Process::start(&self.program, [&plain[..], &machine, &guest, more].concat())
    }

    /// Has it write the running machine to the file (QEMU's QMP: a JSON object a line).
    async fn save(&self) -> anyhow::Result<()> {
        let stream = UnixStream::connect(&self.control).await.context("QEMU's control socket")?;
        let (read, mut write) = stream.into_split();
        let uri = format!("file:{}", self.state.display());
        let events = json!([{ "capability": "events", "state": true }]);
        for command in [
            json!({ "execute": "qmp_capabilities" }),
            json!({ "execute": "migrate-set-capabilities", "arguments": { "capabilities": events } }),
            json!({ "execute": "migrate", "arguments": { "uri": uri } }),
        ] {
            write.write_all(format!("{command}\n").as_bytes()).await.context("QEMU's control socket")?;
        }
        let mut lines = BufReader::new(read.take(QMP_BYTES_MAX)).lines();
        while let Some(line) = lines.next_line().await.context("QEMU's control socket")? {
            if told(&line)? {
                return Ok(());
            }
        }
        bail!("QEMU's control socket ended before the machine was saved")
    }
}

/// True when this line says that all is saved.
fn told(line: &str) -> anyhow::Result<bool> {
    let line: Value = serde_json::from_str(line).context("QEMU's control socket says no JSON")?;
    if let Some(error) = line.get("error") {
        bail!("QEMU refuses: {error}");
    }
    let status = (line.get("event").and_then(Value::as_str) == Some("MIGRATION"))
        .then(|| line.pointer("/data/status").and_then(Value::as_str).unwrap_or_default());
    ensure!(!matches!(status, Some("failed" | "cancelled")), "QEMU could not save the machine: {line}");
    Ok(status == Some("completed"))
}

/// 10 of "QEMU emulator version 10.0.2 (...)".
fn major(version: &str) -> Option<u32> {
    version.split_once("version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"), Some(10));
        assert_eq!(major("QEMU emulator version 7.2.22"), Some(7));
        for wrong in ["", "QEMU", "version ", "version x.1", "version 99999999999.0"] {
            assert_eq!(major(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_the_control_socket_tells() {
        let status =
            |status| told(&json!({ "event": "MIGRATION", "data": { "status": status } }).to_string());
        assert!(status("completed").unwrap());
        assert!(!status("active").unwrap());
        assert!(status("failed").is_err());
        assert!(!told(r#"{"return": {}}"#).unwrap());
        assert!(!told(r#"{"event": "STOP", "data": {"status": "completed"}}"#).unwrap());
        let refused = told(r#"{"error": {"class": "GenericError", "desc": "no such file"}}"#).unwrap_err();
        assert!(refused.to_string().contains("no such file"), "{refused}");
        assert!(told("QEMU says hello").is_err());
    }
}
