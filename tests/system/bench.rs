//! `coldspark bench`: each kind runs, and tells what it says it tells. How fast things are is nothing for a test.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::daemon::program;
use crate::host::{self, Need};
use crate::trial::{Stage, trial};

/// Kind, arguments, and where numbers above zero are in its answer.
type Kind = (&'static str, &'static [&'static str], &'static [&'static str]);

const KINDS: [Kind; 6] = [
    (
        "restore",
        &["--n", "2", "--shells", "2", "--memory", "64M"],
        &["/request_to_first_output_ms/p50", "/floor_ms/p99", "/steps_us/restore/p50", "/page_faults/max"],
    ),
    (
        "first-answer",
        &["--n", "1", "--touch", "1M", "--memory", "64M", "--shells", "2"],
        &[
            "/answers/touches_nothing/first_answer_ms/p50",
            "/answers/reads/first_answer_ms/p50",
            "/answers/writes/page_faults/p50",
            "/floor_writes_ms/p50",
        ],
    ),
    (
        "boot",
        &["--n", "2", "--memory", "64M", "--vcpus", "2"],
        &["/request_to_ready_ms/p50", "/own_ms/max", "/phases_us/kernel loaded/p50", "/phases_us/ready/p99"],
    ),
    (
        "snapshot",
        &["--n", "2", "--touch", "1M", "--memory", "64M", "--parent", "2M"],
        &[
            "/pause_ms/p50",
            "/total_ms/max",
            "/stored_mib/p50",
            "/steps_us/publish/p50",
            "/steps_us/freeze~1parent/p50",
        ],
    ),
    (
        "throughput",
        &["--n", "4", "--clients", "2", "--memory", "64M", "--shells", "2"],
        &["/clones_per_second"],
    ),
    (
        "density",
        &["--n", "3", "--memory", "64M"],
        &["/started_s", "/answer_ms/p50", "/private_dirty_kib/p50"],
    ),
];

pub fn trials() -> Vec<Trial> {
    KINDS
        .into_iter()
        .map(|kind| trial(format!("bench/{}", kind.0), &[Need::Kvm], 120, move |stage| bench(stage, kind)))
        .chain([
            trial("bench/demo", &[Need::Kvm], 120, demo),
            trial("bench/compare-firecracker", &[Need::Kvm, Need::Firecracker], 120, compare_firecracker),
            trial("bench/compare-qemu", &[Need::Kvm, Need::Qemu], 120, compare_qemu),
            trial("bench/compare-wrong", &[Need::Kvm], 60, compare_wrong),
        ])
        .collect()
}

/// What the first page of the README says to run: every clone is checked, and the numbers are there.
async fn demo(_: Stage) -> anyhow::Result<()> {
    let numbers = [
        "/cold_boot_ms",
        "/snapshot_ms",
        "/restore_ms/p50",
        "/first_answer_ms/max",
        "/first_answer_alone_ms/p50",
    ];
    let told = told(&["demo", "--json", "--clones", "3", "--memory", "64M"], &numbers).await?;
    ensure!(told["verified"] == true && told["clones"] == 3, "{told}");
    Ok(())
}

async fn compare_firecracker(_: Stage) -> anyhow::Result<()> {
    compare("firecracker", host::firecracker()).await
}

async fn compare_qemu(_: Stage) -> anyhow::Result<()> {
    compare("qemu", host::qemu()).await
}

/// Restores and boots of the embedded guest in both, in turn.
async fn compare(name: &str, program: Result<PathBuf, String>) -> anyhow::Result<()> {
    let program = program.map_err(anyhow::Error::msg)?;
    let program = program.to_str().context("a path in UTF-8")?;
    let option = format!("--compare-{name}");
    let numbers =
        ["spawn_to_answer_ms/p50", "spawn_to_answer_ms/max", "end_ms/p50", "ratio/p50", "ratio/p99"]
            .map(|number| format!("/compared/{name}/{number}"));
    let numbers = numbers.each_ref().map(String::as_str);
    for bench in ["restore", "boot"] {
        let arguments = ["bench", bench, "--json", "--n", "2", "--memory", "64M", &option, program];
        let told = told(&arguments, &numbers).await?;
        let version = told["compared"][name]["version"].as_str().unwrap_or_default();
        ensure!(version.to_ascii_lowercase().contains(name), "{told:#}");
    }
    Ok(())
}

/// Programs that are not what they are said to be, are not there, or have nothing to say.
async fn compare_wrong(_: Stage) -> anyhow::Result<()> {
    let ours = program();
    let ours = ours.to_str().context("a path in UTF-8")?;
    for (option, wrong, why) in [
        ("--compare-firecracker", "/nowhere/firecracker", "cannot start /nowhere/firecracker"),
        ("--compare-firecracker", ours, "not Firecracker"),
        ("--compare-qemu", ours, "not QEMU"),
    ] {
        let arguments = ["bench", "restore", "--n", "1", "--memory", "64M", option, wrong];
        let output = tokio::process::Command::new(ours).args(arguments).output().await?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains(why), "{option} {wrong}: {said}");
    }
    Ok(())
}

async fn bench(_: Stage, (name, arguments, numbers): Kind) -> anyhow::Result<()> {
    let told = told(&[&["bench", name, "--json"], arguments].concat(), numbers).await?;
    ensure!(told["bench"] == name, "{told}");
    Ok(())
}

/// What the program says, with numbers above zero in all of these places.
async fn told(arguments: &[&str], numbers: &[&str]) -> anyhow::Result<Value> {
    let output = tokio::process::Command::new(program()).args(arguments).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let told: Value = serde_json::from_slice(&output.stdout).context("its answer is no JSON")?;
    for place in numbers {
        let number = told.pointer(place).and_then(Value::as_f64);
        ensure!(number.is_some_and(|number| number > 0.0), "{place} is {number:?} in {told:#}");
    }
    Ok(told)
}
