//! The text that Prometheus reads (OpenMetrics 1.0), made and read. Reading is for `coldspark top` and for trials.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

/// What HTTP calls the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything that is told at a scrape.
#[derive(Debug, Default)]
pub struct Exposition(Registry);

impl Exposition {
    pub fn new(collectors: impl IntoIterator<Item = Box<dyn Collector>>) -> Self {
        let mut registry = Registry::default();
        collectors.into_iter().for_each(|collector| registry.register_collector(collector));
        Self(registry)
    }

    /// As it is now.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(32 << 10);
        if let Err(error) = text::encode(&mut text, &self.0) {
            // A String takes everything: some collector has given up.
            tracing::error!(%error, "metrics could not be told");
            text.clear();
            let _ = writeln!(text, "# EOF");
        }
        text
    }
}

/// One line of the text.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Sample {
    /// A label's value; empty if it has none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples(Vec<Sample>);

/// What is no exposition.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the metrics cannot be read: {text:?}")]
pub struct ReadError {
    line: usize,
    text: String,
}

impl Samples {
    /// Reads a text as [`Exposition::text`] makes it. Timestamps and exemplars are not looked at.
    pub fn read(text: &str) -> Result<Self, ReadError> {
        let mut samples = Vec::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        for (number, line) in lines {
            let failed = || ReadError { line: number + 1, text: line.chars().take(120).collect() };
            samples.push(sample(line).ok_or_else(failed)?);
        }
        Ok(Self(samples))
    }

    /// All with this name.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// Sum of all with this name that fit.
    pub fn sum(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> f64 {
        self.of(name).filter(|sample| fits(sample)).map(|sample| sample.value).sum()
    }

    /// The only one with this name, or the sum.
    pub fn value(&self, name: &str) -> f64 {
        self.sum(name, |_| true)
    }

    /// A histogram, over all label sets that fit.
    pub fn histogram(&self, name: &str, fits: impl Fn(&Sample) -> bool) -> Buckets {
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        let bucket = format!("{name}_bucket");
        for sample in self.of(&bucket).filter(|sample| fits(sample)) {
            let Ok(bound) = sample.label("le").parse::<f64>() else { continue };
            match buckets.iter_mut().find(|(other, _)| *other == bound) {
                Some((_, count)) => *count += sample.value,
                None => buckets.push((bound, sample.value)),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        Buckets(buckets)
    }
}

/// Upper bounds, and how many were observed up to each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Buckets(Vec<(f64, f64)>);

impl Buckets {
    /// How many were observed.
    pub fn count(&self) -> f64 {
        self.0.last().map_or(0.0, |(_, count)| *count)
    }

    /// What was observed since `before`; all, if the service began anew meanwhile.
    pub fn since(&self, before: &Self) -> Self {
        if before.count() > self.count() {
            return self.clone();
        }
        let earlier =
            |bound: f64| before.0.iter().find(|(other, _)| *other == bound).map_or(0.0, |(_, count)| *count);
        Self(self.0.iter().map(|(bound, count)| (*bound, count - earlier(*bound))).collect())
    }

    /// The value below which this part of the observations is, as `histogram_quantile` of Prometheus estimates it: evenly spread within
    /// a bucket. `None`: nothing was observed.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let wanted = part * self.count();
        if self.count() <= 0.0 {
            return None;
        }
        let (mut below, mut counted) = (0.0, 0.0);
        for (bound, count) in &self.0 {
            if *count >= wanted && *count > counted {
                // Beyond the last bound nothing is known but that.
                return Some(match bound.is_finite() {
                    true => below + (bound - below) * (wanted - counted) / (count - counted),
                    false => below,
                });
            }
            (below, counted) = (*bound, *count);
        }
        None
    }
}

/// `name{label="value",...} value`
fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    if name.is_empty() || !name.chars().all(is_name) {
        return None;
    }
    let mut labels = BTreeMap::new();
    let rest = match rest.strip_prefix('{') {
        None => rest,
        Some(mut rest) => loop {
            if let Some(after) = rest.strip_prefix('}') {
                break after;
            }
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            labels.insert(label.to_owned(), value);
            rest = after.strip_prefix(',').unwrap_or(after);
        },
    };
    let value = rest.strip_prefix(' ')?.split(' ').next()?;
    let value = value.parse::<f64>().ok()?;
    Some(Sample { name: name.to_owned(), labels, value })
}

/// Up to the closing quote; gives what is behind it too.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::metrics::{Instruments, Mode, metrics};
    use super::*;

    #[test]
    fn what_is_observed_is_told_and_can_be_read() {
        let exposition = Exposition::new([Box::new(Instruments) as Box<dyn Collector>]);
        let of_mine = |sample: &Sample| sample.label("snapshot") == "read-back";
        metrics().restored("read-back", Mode::Mapped, Duration::from_micros(1100));
        metrics().restored("read-back", Mode::Userfault, Duration::from_micros(600));
        let text = exposition.text();
        assert!(text.ends_with("# EOF\n"), "{text}");
        let samples = Samples::read(&text).unwrap();
        let restores = samples.histogram("coldspark_restore_seconds", of_mine);
        assert_eq!(restores.count(), 2.0);
        assert_eq!(samples.sum("coldspark_restore_seconds_count", of_mine), 2.0);
        let later = {
            metrics().restored("read-back", Mode::Mapped, Duration::from_micros(1100));
            Samples::read(&exposition.text()).unwrap().histogram("coldspark_restore_seconds", of_mine)
        };
        let median = later.since(&restores).quantile(0.5).unwrap();
        assert!((0.001..=0.00125).contains(&median), "{median}");
        metrics().forget_snapshot("read-back");
        let gone = Samples::read(&exposition.text()).unwrap();
        assert_eq!(gone.histogram("coldspark_restore_seconds", of_mine).count(), 0.0);
    }

    #[test]
    fn lines_are_read_with_all_that_may_be_in_a_label() {
        let text =
            "# HELP a b.\na_total{x=\"1,\\\"}2\\\\\",y=\"z\"} 3\nb 1.5e3\nc_bucket{le=\"+Inf\"} 4\n# EOF\n";
        let samples = Samples::read(text).unwrap();
        let first = samples.of("a_total").next().unwrap();
        assert_eq!((first.label("x"), first.label("y"), first.value), ("1,\"}2\\", "z", 3.0));
        assert_eq!(samples.value("b"), 1500.0);
        assert_eq!(samples.histogram("c", |_| true).count(), 4.0);
        for wrong in ["a", "a{", "a{x=\"1} 2", "a b", "{} 1", "a-b 1", "a{x=\"1\"}2"] {
            assert!(Samples::read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let buckets = Buckets(vec![(1.0, 0.0), (2.0, 50.0), (4.0, 100.0), (f64::INFINITY, 100.0)]);
        assert_eq!(buckets.quantile(0.25), Some(1.5));
        assert_eq!(buckets.quantile(0.5), Some(2.0));
        assert_eq!(buckets.quantile(0.75), Some(3.0));
        assert_eq!(Buckets::default().quantile(0.5), None);
        let beyond = Buckets(vec![(1.0, 0.0), (f64::INFINITY, 2.0)]);
        assert_eq!(beyond.quantile(0.99), Some(1.0));
        assert_eq!(beyond.since(&buckets), beyond, "a service that began anew");
    }
}
