//! `coldspark bench`: what it takes here.
//!
//! Service and client are one process; what travels between them goes over a Unix socket all the same.

mod boot;
mod density;
mod first_answer;
mod folios;
mod guest;
mod host;
mod neighbours;
mod networks;
mod peer;
mod plot;
mod resources;
mod restore;
mod snapshot;
mod steps;
mod throughput;

use std::process::ExitCode;
use std::time::Instant;

use clap::Subcommand;
use serde_json::{Map, Value, json};

use self::steps::Steps;
use crate::cli::output::{self, Table};
use crate::cli::private::{PrivateService, unless_interrupted};
use crate::cli::units;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Time from a clone's request to its first answer, beside the least that KVM takes
    #[command(
        after_help = "Example:\n  coldspark bench restore --n 200 --json\n  coldspark bench restore --n 100 --compare-firecracker ./firecracker\n\nUse a release build on a host with nothing else to do."
    )]
    Restore(restore::Arguments),
    /// Time from the request for a cold boot to its ready point, by phases
    #[command(
        after_help = "Example:\n  coldspark bench boot --n 5 --kernel kernel --disk root.img --ready login:"
    )]
    Boot(boot::Arguments),
    /// Time to a clone's first answer when that reads or writes memory
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
    /// A clone's first answer beside guests that spin, flood, write or never answer, as against alone
    #[command(after_help = "Example:\n  coldspark bench neighbours --n 200 --neighbours 2 --cpu-limit 0.25")]
    Neighbours(neighbours::Arguments),
    /// What a network of the service's adds to a clone; makes networks on this host for a while
    #[command(after_help = "Example, as root:\n  coldspark bench networks --n 200")]
    Networks(networks::Arguments),
}

pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Restore(arguments) => restore::run(arguments).await,
        Command::Boot(arguments) => boot::run(arguments).await,
        Command::FirstAnswer(arguments) => first_answer::run(arguments).await,
        Command::Snapshot(arguments) => snapshot::run(arguments).await,
        Command::Throughput(arguments) => throughput::run(arguments).await,
        Command::Density(arguments) => density::run(arguments).await,
        Command::Neighbours(arguments) => neighbours::run(arguments).await,
        Command::Networks(arguments) => networks::run(arguments).await,
    }
}

/// Runs `measure` with a service of its own, which is ended also when the user interrupts it.
async fn with_service<T>(
    shells: usize,
    measure: impl AsyncFnOnce(&PrivateService) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    with(PrivateService::start(shells).await?, measure).await
}

async fn with<T>(
    service: PrivateService,
    measure: impl AsyncFnOnce(&PrivateService) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let measured = unless_interrupted(measure(&service)).await;
    service.close().await;
    measured
}

/// Prints what was measured.
fn tell(as_json: bool, json: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> std::io::Result<()> {
    match as_json {
        true => output::json(&json()),
        false => output::print(&text()),
    }
}

/// For [`spread`] and [`Latencies`].
fn sort<'a>(lists: impl IntoIterator<Item = &'a mut Vec<f64>>) {
    lists.into_iter().for_each(|list| list.sort_by(f64::total_cmp));
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Percentiles of times as a table.
struct Latencies(Table);

impl Latencies {
    fn new() -> Self {
        Self(Table::new(&["", "MEDIAN", "P90", "P99", "P99.9", "SLOWEST"]))
    }

    /// Sorted times; `scale` makes them milliseconds.
    fn row(&mut self, name: &str, times: &[f64], scale: f64) {
        let at = |share| units::ms(units::percentile(times, share) * scale);
        self.0.row([name.to_owned(), at(0.5), at(0.9), at(0.99), at(0.999), at(1.0)]);
    }

    /// A row for each step, those inside of others further to the right.
    fn steps(&mut self, steps: &Steps) {
        for (name, us) in steps.iter() {
            let indent = if name.contains('/') { "    " } else { "  " };
            self.row(&format!("{indent}{}", name.rsplit('/').next().unwrap_or(name)), us, 1e-3);
        }
    }

    fn text(&self) -> String {
        self.0.text()
    }
}

/// Percentiles of sorted values.
fn spread(values: &[f64]) -> Value {
    const SHARES: [(&str, f64); 5] =
        [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)];
    let shares =
        SHARES.map(|(name, share)| (name.to_owned(), json!(units::round3(units::percentile(values, share)))));
    Value::Object(Map::from_iter(shares))
}
