//! `coldspark top`: what the service does, again and again. Everything comes from one call, MetricsService.GetMetrics, so it works over the
//! network too; rates and quantiles are those since the last look.

#![forbid(unsafe_code)]

mod screen;

use std::collections::BTreeSet;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::SocketArgument;
use super::output;
use super::units;
use crate::api::client::Client;
use crate::api::proto::GetMetricsRequest;
use crate::telemetry::exposition::{Buckets, Sample, Samples};

pub const EXAMPLES: &str = "Examples:
  coldspark top
  coldspark top --interval 5s
  coldspark top --once --json | jq .clones.p99_ms

Keys: q, Esc or Ctrl-C ends it; space looks again at once.";

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,
    /// How often it looks, as 500ms, 2s
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = units::parse_duration)]
    interval: Duration,
    /// Look twice, --interval apart, print what is seen and end
    #[arg(long)]
    once: bool,
    /// With --once: one JSON object
    #[arg(long, requires = "once")]
    json: bool,
}

/// The least and the most of --interval.
const INTERVALS: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

pub async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(INTERVALS.contains(&arguments.interval), "--interval may be 100ms to 1h");
    let is_terminal = std::io::stdout().is_terminal() && std::io::stdin().is_terminal();
    if !(arguments.once || is_terminal) {
        anyhow::bail!(
            "this is no terminal; `coldspark top --once` (or --once --json) prints what is seen and ends"
        );
    }
    let mut watch = Watch::begin(arguments.socket.connect().await?).await?;
    if !arguments.once {
        screen::run(watch, arguments.interval).await?;
        return Ok(ExitCode::SUCCESS);
    }
    tokio::time::sleep(arguments.interval).await;
    let view = watch.look().await?;
    match arguments.json {
        true => output::json(&serde_json::to_value(&view)?)?,
        false => output::print(&view.text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Looks, and remembers what it saw.
pub struct Watch {
    client: Client,
    before: Samples,
    at: Instant,
}

impl Watch {
    async fn begin(client: Client) -> anyhow::Result<Self> {
        let mut watch = Self { client, before: Samples::default(), at: Instant::now() };
        watch.look().await?;
        Ok(watch)
    }

    /// What there is, and what was done since the last time.
    pub async fn look(&mut self) -> anyhow::Result<View> {
        let text = self.client.metrics.get_metrics(GetMetricsRequest {}).await?.into_inner().text;
        let (now, at) = (Samples::read(&text)?, Instant::now());
        let view = View::new(&now, &self.before, at.duration_since(self.at));
        (self.before, self.at) = (now, at);
        Ok(view)
    }
}

/// What is seen. Numbers of the last interval, unless they are levels.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct View {
    pub version: String,
    pub interval_s: f64,
    pub vms: Vms,
    pub clones: Times,
    pub snapshots: Vec<Snapshot>,
    pub boots: Times,
    pub deletions: Times,
    pub requests: Times,
    pub pools: Vec<Pool>,
    pub functions: Vec<Function>,
    pub errors: Vec<Counted>,
    pub identity_failures: u64,
    pub memory: Memory,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Vms {
    pub by_state: Vec<Counted>,
    /// Of them those that stand ready in pools.
    pub held: u64,
    pub limit: u64,
    pub shells: u64,
    pub shells_target: u64,
}

/// Something that is done again and again.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Times {
    pub per_s: f64,
    /// `None`: there was none.
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Snapshot {
    pub name: String,
    pub mode: String,
    pub clones: Times,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pool {
    pub name: String,
    pub ready: u64,
    pub target: u64,
    pub in_use: u64,
    pub limit: u64,
    pub taken_per_s: f64,
    pub missed_per_s: f64,
    pub refused_per_s: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Function {
    pub name: String,
    pub running: u64,
    pub queued: u64,
    pub warm: u64,
    pub succeeded_per_s: f64,
    /// Failed or timed out.
    pub failed_per_s: f64,
    pub refused_per_s: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Counted {
    pub name: String,
    pub count: u64,
}

/// Bytes; `None`: the service cannot read them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Memory {
    pub available_bytes: Option<u64>,
    pub reserve_bytes: Option<u64>,
}

/// A number that is whole and not negative, as counts are.
fn whole(value: f64) -> u64 {
    value as u64
}

/// Two looks at the same metrics.
struct Compared<'a> {
    now: &'a Samples,
    before: &'a Samples,
    seconds: f64,
}

impl Compared<'_> {
    fn since(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> f64 {
        let (now, before) = (self.now.sum(name, &fits), self.before.sum(name, &fits));
        // A service that began anew counts from zero.
        if now < before { now } else { now - before }
    }

    fn rate(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> f64 {
        self.since(name, fits) / self.seconds
    }

    fn times(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> Times {
        let new: Buckets = self.now.histogram(name, &fits).since(&self.before.histogram(name, &fits));
        let ms = |part| new.quantile(part).map(|seconds| seconds * 1e3);
        Times { per_s: new.count() / self.seconds, p50_ms: ms(0.5), p99_ms: ms(0.99) }
    }

    /// What a label's values are.
    fn values(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.now.of(name).map(|sample| sample.label(label).to_owned()).collect()
    }
}

impl View {
    fn new(now: &Samples, before: &Samples, interval: Duration) -> Self {
        let seen = Compared { now, before, seconds: interval.as_secs_f64().max(1e-3) };
        let all = |_: &Sample| true;
        let level = |name: &str| whole(now.value(name));
        let known = |name: &str| now.of(name).next().map(|sample| whole(sample.value));
        let counted = |sample: &Sample, label: &str| Counted {
            name: sample.label(label).to_owned(),
            count: whole(sample.value),
        };
        let restores = "coldspark_restore_seconds";
        let mut kinds: Vec<(String, String)> = now
            .of("coldspark_restore_seconds_count")
            .map(|sample| (sample.label("snapshot").to_owned(), sample.label("mode").to_owned()))
            .collect();
        kinds.sort();
        let snapshots = kinds.into_iter().map(|(name, mode)| {
            let fits = |sample: &Sample| sample.label("snapshot") == name && sample.label("mode") == mode;
            let clones = seen.times(restores, fits);
            Snapshot { name, mode, clones }
        });
        let errors = seen.values("coldspark_errors_total", "reason").into_iter().map(|name| {
            let count = seen.since("coldspark_errors_total", |sample| sample.label("reason") == name);
            Counted { count: whole(count), name }
        });
        Self {
            version: now
                .of("coldspark_build_info")
                .map(|sample| sample.label("version").to_owned())
                .collect(),
            interval_s: seen.seconds,
            vms: Vms {
                by_state: now.of("coldspark_vms").map(|sample| counted(sample, "state")).collect(),
                held: level("coldspark_vms_held"),
                limit: level("coldspark_vms_limit"),
                shells: level("coldspark_shells"),
                shells_target: level("coldspark_shells_target"),
            },
            clones: seen.times(restores, all),
            snapshots: snapshots.collect(),
            boots: seen.times("coldspark_boot_seconds", all),
            deletions: seen.times("coldspark_destroy_seconds", all),
            requests: seen.times("coldspark_grpc_request_seconds", all),
            pools: seen.pools(),
            functions: seen.functions(),
            errors: errors.filter(|error| error.count > 0).collect(),
            identity_failures: whole(seen.since("coldspark_identity_failures_total", all)),
            memory: Memory {
                available_bytes: known("coldspark_host_memory_available_bytes"),
                reserve_bytes: known("coldspark_host_memory_reserve_bytes"),
            },
        }
    }

    fn text(&self) -> String {
        let mut text = self.head().join("\n");
        for (title, table) in self.tables() {
            text.push_str(&format!("\n\n{title}\n{}", table.text().trim_end()));
        }
        text.push('\n');
        text
    }
}

impl Compared<'_> {
    fn pools(&self) -> Vec<Pool> {
        let pools = self.values("coldspark_pool_ready", "pool").into_iter();
        let pools = pools.map(|name| {
            let fits = |sample: &Sample| sample.label("pool") == name;
            let level = |metric: &str| whole(self.now.sum(metric, fits));
            Pool {
                ready: level("coldspark_pool_ready"),
                target: level("coldspark_pool_target"),
                in_use: level("coldspark_pool_in_use"),
                limit: level("coldspark_pool_limit"),
                taken_per_s: self.rate("coldspark_pool_taken_total", fits),
                missed_per_s: self.rate("coldspark_pool_missed_total", fits),
                refused_per_s: self.rate("coldspark_pool_refused_total", fits),
                name: name.clone(),
            }
        });
        pools.collect()
    }

    fn functions(&self) -> Vec<Function> {
        let functions = self.values("coldspark_function_running", "function").into_iter();
        let functions = functions.map(|name| {
            let fits = |sample: &Sample| sample.label("function") == name;
            let level = |metric: &str| whole(self.now.sum(metric, fits));
            let ended = |outcomes: &[&str]| {
                self.rate("coldspark_function_invocations_total", |sample| {
                    fits(sample) && outcomes.contains(&sample.label("outcome"))
                })
            };
            Function {
                running: level("coldspark_function_running"),
                queued: level("coldspark_function_queue_depth"),
                warm: level("coldspark_function_warm"),
                succeeded_per_s: ended(&["succeeded"]),
                failed_per_s: ended(&["failed", "timed_out"]),
                refused_per_s: ended(&["refused"]),
                name: name.clone(),
            }
        });
        functions.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
coldspark_restore_seconds_bucket{le=\"0.001\",snapshot=\"s\",mode=\"mapped\"} 4
coldspark_restore_seconds_bucket{le=\"0.002\",snapshot=\"s\",mode=\"mapped\"} 4
coldspark_restore_seconds_bucket{le=\"+Inf\",snapshot=\"s\",mode=\"mapped\"} 4
coldspark_restore_seconds_count{snapshot=\"s\",mode=\"mapped\"} 4
coldspark_pool_ready{pool=\"p\"} 1
coldspark_pool_taken_total{pool=\"p\"} 10
coldspark_errors_total{reason=\"NETWORK\"} 1
";
    const NOW: &str = "\
coldspark_vms{state=\"running\"} 3
coldspark_restore_seconds_bucket{le=\"0.001\",snapshot=\"s\",mode=\"mapped\"} 4
coldspark_restore_seconds_bucket{le=\"0.002\",snapshot=\"s\",mode=\"mapped\"} 14
coldspark_restore_seconds_bucket{le=\"+Inf\",snapshot=\"s\",mode=\"mapped\"} 14
coldspark_restore_seconds_count{snapshot=\"s\",mode=\"mapped\"} 14
coldspark_pool_ready{pool=\"p\"} 2
coldspark_pool_taken_total{pool=\"p\"} 14
coldspark_function_running{function=\"f\"} 1
coldspark_function_invocations_total{function=\"f\",outcome=\"failed\"} 6
coldspark_errors_total{reason=\"NETWORK\"} 1
coldspark_errors_total{reason=\"POOL_FULL\"} 2
";

    fn view(now: &str, before: &str) -> View {
        let read = |text: &str| Samples::read(text).unwrap();
        View::new(&read(now), &read(before), Duration::from_secs(2))
    }

    #[test]
    fn levels_are_those_of_now_and_rates_those_since_before() {
        let view = view(NOW, BEFORE);
        assert_eq!(view.clones.per_s, 5.0);
        assert_eq!(
            view.clones.p50_ms.map(|ms| (ms * 10.0).round()),
            Some(15.0),
            "the four from before are not counted"
        );
        assert_eq!(view.snapshots.len(), 1);
        assert_eq!((view.pools[0].ready, view.pools[0].taken_per_s), (2, 2.0));
        assert_eq!((view.functions[0].running, view.functions[0].failed_per_s), (1, 3.0));
        assert_eq!(view.errors, [Counted { name: "POOL_FULL".into(), count: 2 }]);
        assert_eq!(view.vms.by_state, [Counted { name: "running".into(), count: 3 }]);
        let text = view.text();
        for word in ["3 running", "5.0/s", "POOL_FULL", "p ", "f "] {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
    }

    #[test]
    fn a_service_that_began_anew_has_no_negative_rates() {
        let view = view(BEFORE, NOW);
        assert_eq!(view.clones.per_s, 2.0);
        assert_eq!(view.pools[0].taken_per_s, 5.0);
    }

    #[test]
    fn where_nothing_is_told_nothing_is_shown() {
        assert!(view("", "").text().contains("no clones"));
    }
}
