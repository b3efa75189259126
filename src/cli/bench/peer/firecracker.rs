//! Firecracker, as its API has it: booted once, frozen, loaded anew for each round.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::api::{self, Api};
use super::process::{Process, STEP, version};
use super::{ENQUIRY, Guest, Round, SETTINGS};
use crate::agent::testguest::READY_LINE;
use crate::cli::bench::ms;

/// Between looks whether it listens: a program that is not ours says nothing when it does.
const LOOK: Duration = Duration::from_micros(50);

pub struct Firecracker {
    program: PathBuf,
    pub version: String,
    guest: Guest,
    socket: PathBuf,
    log: PathBuf,
    state: PathBuf,
    memory: PathBuf,
}

impl Firecracker {
    pub async fn new(program: &Path, guest: Guest) -> anyhow::Result<Self> {
        let version = version(program).await?;
        ensure!(
            version.contains("Firecracker"),
            "{} says it is {version:?}, not Firecracker",
            program.display()
        );
        let [socket, log, state, memory] =
            ["firecracker.socket", "firecracker.log", "firecracker.state", "firecracker.memory"]
                .map(|name| guest.folder.join(name));
        Ok(Self { program: program.to_owned(), version, guest, socket, log, state, memory })
    }

    /// From the start of the process to the line with which the guest says that it is ready.
    pub async fn boot(&self) -> anyhow::Result<Round> {
        let begin = Instant::now();
        let (mut process, mut api) = self.start().await?;
        let asking = Instant::now();
        let booted = self.boot_with(&mut process, &mut api).await;
        self.explain(booted, &mut process)?;
        Round::end(begin, Some(asking), process).await
    }

    async fn boot_with(&self, process: &mut Process, api: &mut Api) -> anyhow::Result<()> {
        let machine =
            json!({ "vcpu_count": self.guest.vcpus, "mem_size_mib": self.guest.memory_bytes >> 20 });
        api.put("/machine-config", &machine).await?;
        let source = json!({ "kernel_image_path": self.guest.kernel, "boot_args": SETTINGS });
        api.put("/boot-source", &source).await?;
        api.put("/actions", &json!({ "action_type": "InstanceStart" })).await?;
        process.wait_for(READY_LINE.as_bytes()).await
    }

    /// Boots and makes the snapshot that [`Firecracker::restore`] loads.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        let (mut process, mut api) = self.start().await?;
        let frozen = async {
            self.boot_with(&mut process, &mut api).await?;
            process.type_in(&[ENQUIRY]).await?;
            process.wait_for(&[ENQUIRY]).await?;
            api.patch("/vm", &json!({ "state": "Paused" })).await?;
            let files = json!({
                "snapshot_type": "Full",
                "snapshot_path": self.state,
                "mem_file_path": self.memory,
            });
            api.put("/snapshot/create", &files).await
        };
        let frozen = frozen.await;
        self.explain(frozen, &mut process)?;
        process.end().await
    }

    /// From the start of the process to the guest's answer, and from the request to load.
    pub async fn restore(&self) -> anyhow::Result<Round> {
        let begin = Instant::now();
        let (mut process, mut api) = self.start().await?;
        let asking = Instant::now();
        let answered = async {
            // Lies ready for the guest's first look.
            process.type_in(&[ENQUIRY]).await?;
            let snapshot = json!({
                "snapshot_path": self.state,
                "mem_backend": { "backend_type": "File", "backend_path": self.memory },
                "resume_vm": true,
            });
            api.put("/snapshot/load", &snapshot).await?;
            process.wait_for(&[ENQUIRY]).await
        };
        let answered = answered.await;
        self.explain(answered, &mut process)?;
        Round::end(begin, Some(asking), process).await
    }

    /// A process whose API can be asked.
    async fn start(&self) -> anyhow::Result<(Process, Api)> {
        for old in [&self.socket, &self.log] {
            if let Err(error) = std::fs::remove_file(old) {
                ensure!(
                    error.kind() == std::io::ErrorKind::NotFound,
                    "cannot remove {}: {error}",
                    old.display()
                );
            }
        }
        std::fs::File::create(&self.log).with_context(|| format!("cannot make {}", self.log.display()))?;
        let arguments = [
            "--api-sock".as_ref(),
            self.socket.as_os_str(),
            "--log-path".as_ref(),
            self.log.as_os_str(),
            "--level".as_ref(),
            "Error".as_ref(),
        ];
        let mut process = Process::start(&self.program, arguments)?;
        let begin = Instant::now();
        loop {
            if let Some(stream) = api::connect(&self.socket).await {
                return Ok((process, Api::over(stream).await?));
            }
            if process.has_ended() {
                process.read_to_end().await?;
                bail!("{}", process.said("Firecracker ended before its API was there"));
            }
            ensure!(begin.elapsed() < STEP, "Firecracker's API is not there after {} s", STEP.as_secs());
            // Shorter than the runtime's timer can wait.
            std::thread::sleep(LOOK);
            tokio::task::yield_now().await;
        }
    }

    /// Adds what it told its log.
    fn explain<T>(&self, outcome: anyhow::Result<T>, process: &mut Process) -> anyhow::Result<T> {
        outcome.with_context(|| {
            let log = super::beginning(&self.log);
            let kvm = if log.contains("/dev/kvm") { "; `coldspark doctor` tells about /dev/kvm" } else { "" };
            format!("{} ({}); its log: {}{kvm}", self.version, process.said("failed"), log.trim())
        })
    }
}

impl Round {
    /// Answered now: ends the process, and gives the times.
    pub async fn end(begin: Instant, asking: Option<Instant>, process: Process) -> anyhow::Result<Self> {
        let (answer_ms, asked_ms) = (ms(begin), asking.map(ms));
        let ending = Instant::now();
        process.end().await?;
        Ok(Self { answer_ms, asked_ms, end_ms: ms(ending) })
    }
}
