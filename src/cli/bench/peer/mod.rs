//! Other VMMs beside ours in the same run: the same guest with the same memory, in turn.
//!
//! The user gives the program; it is started for each round, as it is meant to be used, and ended after it. The embedded guest
//! finds no device of ours there, so it says back what is typed on the serial console: a byte that lies ready when the
//! guest is let run, and comes back, is the first answer. That is less than what a clone of ours does until its own
//! (an identity is told and confirmed, the echo goes over virtio and gRPC).

#![forbid(unsafe_code)]

mod api;
mod firecracker;
mod process;
mod qemu;

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Map, Value, json};

use self::firecracker::Firecracker;
use self::qemu::Qemu;
use super::{sort, spread};
use crate::agent::testguest::TEST_GUEST;
use crate::cli::output::Table;
use crate::cli::units;

/// What is typed: a byte that no log and no guest prints.
const ENQUIRY: u8 = 0x05;
/// The guest's command line: its checks are about our machine, so that some fail elsewhere.
const SETTINGS: &str = "coldspark.lenient";

#[derive(Debug, Clone, Default, Args)]
pub struct PeerArguments {
    /// Also measure this Firecracker, in turn, with the same guest and memory
    #[arg(long, value_name = "PATH")]
    compare_firecracker: Option<PathBuf>,
    /// Also measure this qemu-system-x86_64 (machine microvm)
    #[arg(long, value_name = "PATH")]
    compare_qemu: Option<PathBuf>,
}

impl PeerArguments {
    pub fn is_empty(&self) -> bool {
        self.compare_firecracker.is_none() && self.compare_qemu.is_none()
    }
}

/// What they run.
#[derive(Debug, Clone)]
struct Guest {
    /// For their files.
    folder: PathBuf,
    kernel: PathBuf,
    memory_bytes: u64,
    vcpus: u32,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Road {
    /// To the guest's ready line.
    Boot,
    /// To the first answer.
    Restore,
}

/// Times of one.
struct Round {
    /// From the process's start.
    answer_ms: f64,
    /// From the first request to its API.
    asked_ms: Option<f64>,
    end_ms: f64,
}

enum Vmm {
    Firecracker(Firecracker),
    Qemu(Qemu),
}

impl Vmm {
    fn version(&self) -> &str {
        match self {
            Self::Firecracker(vmm) => &vmm.version,
            Self::Qemu(vmm) => &vmm.version,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Firecracker(_) => "firecracker",
            Self::Qemu(_) => "qemu",
        }
    }

    async fn freeze(&self) -> anyhow::Result<()> {
        match self {
            Self::Firecracker(vmm) => vmm.freeze().await,
            Self::Qemu(vmm) => vmm.freeze().await,
        }
    }

    async fn round(&self, road: Road) -> anyhow::Result<Round> {
        match (self, road) {
            (Self::Firecracker(vmm), Road::Boot) => vmm.boot().await,
            (Self::Firecracker(vmm), Road::Restore) => vmm.restore().await,
            (Self::Qemu(vmm), Road::Boot) => vmm.boot().await,
            (Self::Qemu(vmm), Road::Restore) => vmm.restore().await,
        }
    }
}

/// Milliseconds of all rounds that count.
#[derive(Default)]
struct Times {
    answer: Vec<f64>,
    asked: Vec<f64>,
    end: Vec<f64>,
}

struct Peer {
    vmm: Vmm,
    times: Times,
}

/// Those that the user named.
pub struct Peers {
    road: Road,
    list: Vec<Peer>,
}

impl Peers {
    /// Gets them ready: a first boot, and what is restored.
    pub async fn new(
        arguments: &PeerArguments,
        road: Road,
        folder: &Path,
        memory_bytes: u64,
        vcpus: u32,
    ) -> anyhow::Result<Self> {
        let mut peers = Self { road, list: Vec::new() };
        if arguments.is_empty() {
            return Ok(peers);
        }
        ensure!(memory_bytes.is_multiple_of(1 << 20), "to compare, --memory must be a number of whole MiB");
        let guest =
            Guest { folder: folder.to_owned(), kernel: folder.join("guest.elf"), memory_bytes, vcpus };
        std::fs::write(&guest.kernel, TEST_GUEST)
            .with_context(|| format!("cannot write {}", guest.kernel.display()))?;
        if let Some(program) = &arguments.compare_firecracker {
            peers.add(Vmm::Firecracker(Firecracker::new(program, guest.clone()).await?)).await?;
        }
        if let Some(program) = &arguments.compare_qemu {
            peers.add(Vmm::Qemu(Qemu::new(program, guest).await?)).await?;
        }
        Ok(peers)
    }

    async fn add(&mut self, vmm: Vmm) -> anyhow::Result<()> {
        if self.road == Road::Restore {
            vmm.freeze().await.context("no snapshot to compare with")?;
        }
        self.list.push(Peer { vmm, times: Times::default() });
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// One round of each.
    pub async fn round(&mut self, counts: bool) -> anyhow::Result<()> {
        for peer in &mut self.list {
            let round = peer.vmm.round(self.road).await?;
            if counts {
                peer.times.answer.push(round.answer_ms);
                peer.times.asked.extend(round.asked_ms);
                peer.times.end.push(round.end_ms);
            }
        }
        Ok(())
    }

    pub fn sort(&mut self) {
        sort(self.list.iter_mut().flat_map(|peer| {
            let Times { answer, asked, end } = &mut peer.times;
            [answer, asked, end]
        }));
    }

    /// One object for each; `ours` is what they stand beside, sorted.
    pub fn json(&self, ours: &[f64]) -> Value {
        Value::Object(Map::from_iter(self.list.iter().map(|peer| {
            let Times { answer, asked, end } = &peer.times;
            let mut told = json!({
                "version": peer.vmm.version(),
                "spawn_to_answer_ms": spread(answer),
                "end_ms": spread(end),
                "ratio": ratios(answer, ours),
            });
            if let (false, Some(told)) = (asked.is_empty(), told.as_object_mut()) {
                told.insert("api_request_to_answer_ms".to_owned(), spread(asked));
                told.insert("ratio_from_api_request".to_owned(), ratios(asked, ours));
            }
            (peer.vmm.name().to_owned(), told)
        })))
    }

    /// A table with ours as its first line; empty without peers.
    pub fn text(&self, ours: &[f64]) -> String {
        if self.list.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["IN TURN WITH OURS", "MEDIAN", "P90", "P99", "SLOWEST"]);
        let until = match self.road {
            Road::Boot => "ready",
            Road::Restore => "first answer",
        };
        table.row(row(&format!("coldspark: request to {until}"), ours));
        for peer in &self.list {
            let Times { answer, asked, end } = &peer.times;
            table.row(row(&format!("{}: start of its process to {until}", peer.vmm.version()), answer));
            table.row(ratio_row(answer, ours));
            if !asked.is_empty() {
                table.row(row(&format!("  of it from the first API request to {until}"), asked));
                table.row(ratio_row(asked, ours));
            }
            table.row(row("  ending it", end));
        }
        format!("\n{}", table.text())
    }
}

const SHARES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)];

fn row(name: &str, times: &[f64]) -> Vec<String> {
    let cells = SHARES.map(|(_, share)| units::ms(units::percentile(times, share)));
    std::iter::once(name.to_owned()).chain(cells).collect()
}

/// How many times ours: the same percentile of both, sorted. `None` without times.
fn ratio(theirs: &[f64], ours: &[f64], share: f64) -> Option<f64> {
    let ours = units::percentile(ours, share);
    (ours > 0.0 && !theirs.is_empty()).then(|| units::percentile(theirs, share) / ours)
}

fn ratio_row(theirs: &[f64], ours: &[f64]) -> Vec<String> {
    let cells = SHARES.map(|(_, share)| match ratio(theirs, ours, share) {
        Some(ratio) => format!("{ratio:.2} x"),
        None => "-".to_owned(),
    });
    std::iter::once("    ratio to ours".to_owned()).chain(cells).collect()
}

fn ratios(theirs: &[f64], ours: &[f64]) -> Value {
    let of =
        |(name, share): (&str, f64)| (name.to_owned(), json!(ratio(theirs, ours, share).map(units::round3)));
    Value::Object(Map::from_iter(SHARES.map(of)))
}

/// The first lines of a log.
fn beginning(path: &Path) -> String {
    const BYTES: u64 = 2048;
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(BYTES).read_to_end(&mut bytes));
    match read {
        Ok(0) => "empty".to_owned(),
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_compare_the_same_percentiles() {
        let ours: Vec<f64> = (1..=100).map(f64::from).collect();
        let theirs: Vec<f64> = (1..=50).map(|n| f64::from(n) * 6.0).collect();
        let told = ratios(&theirs, &ours);
        assert_eq!(told, json!({ "p50": 3.0, "p90": 3.0, "p99": 3.03, "max": 3.0 }));
        assert_eq!(ratio_row(&theirs, &ours)[1..], ["3.00 x", "3.00 x", "3.03 x", "3.00 x"]);
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        assert_eq!(ratio_row(&[1.0], &[])[1..], ["-"; 4]);
        assert_eq!(ratio_row(&[], &[1.0])[1..], ["-"; 4]);
        assert_eq!(ratios(&[1.0], &[0.0])["p50"], Value::Null);
    }

    #[test]
    fn no_peer_no_table() {
        let none = Peers { road: Road::Restore, list: Vec::new() };
        assert_eq!((none.text(&[1.0]).as_str(), none.json(&[1.0])), ("", json!({})));
    }
}
