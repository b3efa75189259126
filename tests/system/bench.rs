//! `coldspark bench`: each kind runs, and tells what it says it tells. How fast things are is nothing for a test.

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::daemon::program;
use crate::host::Need;
use crate::trial::{Stage, trial};

/// Kind, arguments, and where numbers above zero are in its answer.
type Kind = (&'static str, &'static [&'static str], &'static [&'static str]);

const KINDS: [Kind; 5] = [
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
        "snapshot",
        &["--n", "2", "--touch", "1M", "--memory", "64M"],
        &["/pause_ms/p50", "/total_ms/max", "/stored_mib/p50", "/steps_us/publish/p50"],
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
        .collect()
}

async fn bench(_: Stage, (name, arguments, numbers): Kind) -> anyhow::Result<()> {
    let mut command = tokio::process::Command::new(program());
    let output = command.args(["bench", name, "--json"]).args(arguments).output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let told: Value = serde_json::from_slice(&output.stdout).context("its answer is no JSON")?;
    ensure!(told["bench"] == name, "{told}");
    for place in numbers {
        let number = told.pointer(place).and_then(Value::as_f64);
        ensure!(number.is_some_and(|number| number > 0.0), "{place} is {number:?} in {told:#}");
    }
    Ok(())
}
