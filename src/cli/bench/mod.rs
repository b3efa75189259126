//! `coldspark bench`: what it takes here.
//!
//! Service and client are one process; what travels between them goes over a Unix socket all the same.

mod density;
mod first_answer;
mod guest;
mod host;
mod resources;
mod restore;
mod snapshot;
mod steps;
mod throughput;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use clap::Subcommand;
use serde_json::{Map, Value, json};

use crate::cli::private::PrivateService;
use crate::cli::units;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Time from a clone's request to its first answer, beside the least that KVM takes
    #[command(
        after_help = "Example:\n  coldspark bench restore --n 200 --json\n\nUse a release build on a host with nothing else to do."
    )]
    Restore(restore::Arguments),
    /// The same when the first answer reads or writes memory
    #[command(after_help = "Example:\n  coldspark bench first-answer --touch 16M --memory-mode userfault")]
    FirstAnswer(first_answer::Arguments),
    /// How long a running guest stands still for its snapshot
    #[command(after_help = "Example:\n  coldspark bench snapshot --n 20 --touch 64M")]
    Snapshot(snapshot::Arguments),
    /// Clones made, asked and ended, as many a second as go; and what is left of them
    #[command(after_help = "Example:\n  coldspark bench throughput --n 10000 --clients 4")]
    Throughput(throughput::Arguments),
    /// Many clones alive at once: how long they take to start, and the memory of each
    #[command(after_help = "Example:\n  coldspark bench density --n 1000 --memory 512M")]
    Density(density::Arguments),
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Restore(arguments) => restore::run(arguments).await,
        Command::FirstAnswer(arguments) => first_answer::run(arguments).await,
        Command::Snapshot(arguments) => snapshot::run(arguments).await,
        Command::Throughput(arguments) => throughput::run(arguments).await,
        Command::Density(arguments) => density::run(arguments).await,
    }
}

/// Runs `measure` with a service of its own, which is ended also when the user interrupts it.
async fn with_service<T>(
    shells: usize,
    measure: impl AsyncFnOnce(&PrivateService) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let service = PrivateService::start(shells).await?;
    let measured = tokio::select! {
        measured = measure(&service) => measured,
        interrupt = tokio::signal::ctrl_c() => interrupt.context("signals").and(Err(anyhow::anyhow!("interrupted"))),
    };
    service.close().await;
    measured
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Percentiles of sorted values.
fn spread(values: &[f64]) -> Value {
    const SHARES: [(&str, f64); 5] =
        [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)];
    let shares =
        SHARES.map(|(name, share)| (name.to_owned(), json!(units::round3(units::percentile(values, share)))));
    Value::Object(Map::from_iter(shares))
}
