//! What there is, told at a scrape: VMs by state, pools, functions, memory, working sets. Nothing of it is kept up to date for that: it is looked at.

use std::collections::BTreeMap;
use std::fmt::Error;
use std::sync::Weak;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::Fleet;
use super::functions::function;
use super::pools::Named;
use super::vm::State;
use crate::snapshot::memory::pager::Counts as PagerCounts;
use crate::telemetry::labels::{LABELS_MAX, OTHER};

const STATES: [(State, &str); 6] = [
    (State::Booting, "booting"),
    (State::Ready, "ready"),
    (State::Running, "running"),
    (State::Paused, "paused"),
    (State::Snapshotting, "snapshotting"),
    (State::Exited, "exited"),
];

/// Looks at a fleet.
#[derive(Debug)]
pub struct Gauges(pub Weak<Fleet>);

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    vms: BTreeMap<&'static str, u64>,
    held: u64,
    vms_max: u64,
    shells: u64,
    shells_size: u64,
    /// Ready, and in use.
    slots: (u64, u64),
    slots_size: u64,
    pools: Vec<Named>,
    functions: Vec<function::Look>,
    pager: PagerCounts,
    /// Bytes available and to stay free; unknown where /proc/meminfo cannot be read.
    memory: Option<(u64, u64)>,
    sets: Vec<Set>,
}

/// The working set of an open snapshot.
#[derive(Debug)]
struct Set {
    snapshot: String,
    bytes: u64,
    folded_bytes: u64,
    again: u64,
}

impl Seen {
    fn of(fleet: &Fleet) -> Self {
        let mut vms: BTreeMap<_, _> = STATES.iter().map(|(_, name)| (*name, 0)).collect();
        let mut held = 0;
        for vm in fleet.registry.list() {
            let state = vm.state();
            if let Some((_, name)) = STATES.iter().find(|(one, _)| *one == state) {
                *vms.entry(*name).or_default() += 1;
            }
            held += u64::from(vm.is_held() && state != State::Exited);
        }
        let sets = fleet.snapshots.sources().into_iter().map(|source| {
            let kept = source.keeping.so_far();
            Set {
                snapshot: source.label().to_owned(),
                bytes: source.learning.learnt().piece_bytes(),
                folded_bytes: kept.folded_bytes,
                again: kept.again,
            }
        });
        Self {
            vms,
            held,
            vms_max: fleet.registry.vms_max() as u64,
            shells: fleet.shells.count() as u64,
            shells_size: fleet.shells.size() as u64,
            slots: {
                let (ready, used) = fleet.slots.counts();
                (ready as u64, used as u64)
            },
            slots_size: fleet.slots.size() as u64,
            pools: fleet.pools(),
            functions: fleet.functions(),
            pager: fleet.pager.totals(),
            memory: fleet.headroom.seen(),
            sets: sets.collect(),
        }
    }
}

impl Collector for Gauges {
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), Error> {
        // Without a fleet: the names alone.
        let seen = self.0.upgrade().map(|fleet| Seen::of(&fleet)).unwrap_or_default();
        Told(encoder).all(&seen)
    }
}

/// Writes families of numbers.
struct Told<'a>(DescriptorEncoder<'a>);

impl Told<'_> {
    fn all(mut self, seen: &Seen) -> Result<(), Error> {
        let build = [("version", env!("CARGO_PKG_VERSION"))];
        let mut info =
            self.0.encode_descriptor("coldspark_build", "Which coldspark this is", None, MetricType::Info)?;
        info.encode_info(&build)?;
        let vms = seen.vms.iter().map(|(state, count)| (vec![("state", (*state).to_owned())], *count));
        self.gauges("coldspark_vms", "VMs that are listed, by state", vms)?;
        self.gauge("coldspark_vms_held", "Of them those that stand ready in pools", seen.held)?;
        self.gauge("coldspark_vms_limit", "Most living VMs", seen.vms_max)?;
        self.gauge("coldspark_shells", "Workers that stand ready for the next clones", seen.shells)?;
        self.gauge("coldspark_shells_target", "How many are to stand ready", seen.shells_size)?;
        self.gauge(
            "coldspark_network_slots",
            "Network slots that stand ready for the next VMs",
            seen.slots.0,
        )?;
        self.gauge("coldspark_network_slots_target", "How many are to stand ready", seen.slots_size)?;
        self.gauge(
            "coldspark_network_slots_in_use",
            "Those of VMs, and of what stands ready in pools",
            seen.slots.1,
        )?;
        self.gauge(
            "coldspark_host_memory_available_bytes",
            "Memory that the host can still give",
            seen.memory.map(|(available, _)| available),
        )?;
        self.gauge(
            "coldspark_host_memory_reserve_bytes",
            "Memory that is to stay free: no VM is started while less is available",
            seen.memory.map(|(_, reserve)| reserve),
        )?;
        self.pager(seen.pager)?;
        self.pools(&seen.pools)?;
        self.functions(&seen.functions)?;
        self.sets(&seen.sets)
    }

    fn pager(&mut self, counts: PagerCounts) -> Result<(), Error> {
        let mode = |count| [(vec![("mode", "userfault".to_owned())], count)];
        self.counters(
            "coldspark_page_faults",
            "Page faults that the service answered; those of mapped clones are the kernel's",
            mode(counts.faults),
        )?;
        let pages = [("data", counts.data_pages), ("zero", counts.zero_pages)];
        self.counters(
            "coldspark_page_fault_pages",
            "Pages of 4 KiB given in answer",
            pages.map(|(kind, count)| (vec![("kind", kind.to_owned())], count)),
        )
    }

    fn pools(&mut self, pools: &[Named]) -> Result<(), Error> {
        let of =
            |number: fn(&Named) -> u64| by_name("pool", pools.iter().map(|pool| (&*pool.name, number(pool))));
        let total = |number: fn(&Named) -> u64| of(number);
        self.gauges("coldspark_pool_ready", "What stands ready", of(|pool| pool.look.ready.into()))?;
        self.gauges(
            "coldspark_pool_stale",
            "Of it, what will be replaced",
            of(|pool| pool.look.stale.into()),
        )?;
        self.gauges("coldspark_pool_target", "How many are to be ready", of(|pool| pool.look.target.into()))?;
        self.gauges("coldspark_pool_making", "Being made", of(|pool| pool.look.making.into()))?;
        self.gauges("coldspark_pool_in_use", "Taken, and alive", of(|pool| pool.look.out.into()))?;
        self.gauges(
            "coldspark_pool_limit",
            "Most, those in use among them",
            of(|pool| pool.look.settings.max.into()),
        )?;
        let taken = total(|pool| pool.look.counts.taken_ready + pool.look.counts.taken_cold);
        self.counters("coldspark_pool_taken", "Handed over", taken)?;
        let missed = total(|pool| pool.look.counts.taken_cold);
        self.counters("coldspark_pool_missed", "Of them those for which nothing stood ready", missed)?;
        self.counters(
            "coldspark_pool_refused",
            "Asked for, with no room",
            total(|pool| pool.look.counts.refused),
        )?;
        self.counters("coldspark_pool_made", "Made ready", total(|pool| pool.look.counts.made))?;
        self.counters(
            "coldspark_pool_failed",
            "Could not be made ready",
            total(|pool| pool.look.counts.failed),
        )?;
        self.counters(
            "coldspark_pool_without_slot",
            "Of those that could not be made ready, those for which there was no network slot",
            total(|pool| pool.look.counts.without_slot),
        )?;
        self.counters(
            "coldspark_pool_died",
            "Ended by itself while ready",
            total(|pool| pool.look.counts.died),
        )
    }

    fn functions(&mut self, functions: &[function::Look]) -> Result<(), Error> {
        let of = |number: fn(&function::Look) -> u64| {
            by_name("function", functions.iter().map(|function| (function.name.as_str(), number(function))))
        };
        self.gauges(
            "coldspark_function_running",
            "Invocations that run",
            of(|function| function.running.into()),
        )?;
        self.gauges(
            "coldspark_function_queue_depth",
            "Invocations that wait for their turn",
            of(|function| function.queued.into()),
        )?;
        self.gauges(
            "coldspark_function_queue_limit",
            "How many may wait",
            of(|function| function.settings.queue.into()),
        )?;
        self.gauges(
            "coldspark_function_warm",
            "VMs that wait for another invocation",
            of(|function| function.warm.into()),
        )?;
        type Number = fn(&function::Look) -> u64;
        let outcomes: [(&str, Number); 5] = [
            ("succeeded", |function| function.succeeded),
            ("failed", |function| function.failed),
            ("timed_out", |function| function.timed_out),
            ("refused", |function| function.refused),
            ("cancelled", |function| function.cancelled),
        ];
        let invocations = outcomes.into_iter().flat_map(|(outcome, number)| {
            of(number).into_iter().map(move |(mut labels, count)| {
                labels.push(("outcome", outcome.to_owned()));
                (labels, count)
            })
        });
        self.counters("coldspark_function_invocations", "Invocations, by how they ended", invocations)?;
        let reused = of(|function| function.reused);
        self.counters("coldspark_function_reused", "Invocations in VMs that had run others", reused)
    }

    fn sets(&mut self, sets: &[Set]) -> Result<(), Error> {
        let of = |number: fn(&Set) -> u64| {
            by_name("snapshot", sets.iter().map(|set| (set.snapshot.as_str(), number(set))))
        };
        self.gauges(
            "coldspark_working_set_bytes",
            "What clones are known to touch first",
            of(|set| set.bytes),
        )?;
        self.gauges(
            "coldspark_working_set_folded_bytes",
            "Of it, what the page cache has in folios of 2 MiB, when last looked at",
            of(|set| set.folded_bytes),
        )?;
        self.counters(
            "coldspark_working_set_again",
            "Pieces of it that were read, or folded, again",
            of(|set| set.again),
        )
    }

    /// One number without labels, if it is known.
    fn gauge(&mut self, name: &str, help: &str, value: impl Into<Option<u64>>) -> Result<(), Error> {
        let encoder = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        match value.into() {
            Some(value) => ConstGauge::new(whole(value)).encode(encoder),
            None => Ok(()),
        }
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = Value>,
    ) -> Result<(), Error> {
        self.family(name, help, MetricType::Gauge, values)
    }

    fn counters(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = Value>,
    ) -> Result<(), Error> {
        self.family(name, help, MetricType::Counter, values)
    }

    fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        values: impl IntoIterator<Item = Value>,
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in values {
            put(&mut encoder, kind, &labels, value)?;
        }
        Ok(())
    }
}

type Value = (Vec<(&'static str, String)>, u64);

fn put(
    encoder: &mut MetricEncoder<'_>,
    kind: MetricType,
    labels: &Vec<(&'static str, String)>,
    value: u64,
) -> Result<(), Error> {
    let family = encoder.encode_family(labels)?;
    match kind {
        MetricType::Counter => ConstCounter::new(value).encode(family),
        _ => ConstGauge::new(whole(value)).encode(family),
    }
}

/// As gauges have it.
fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// One line for each, but all beyond [`LABELS_MAX`] together.
fn by_name<'a>(label: &'static str, numbers: impl Iterator<Item = (&'a str, u64)>) -> Vec<Value> {
    let mut values: Vec<Value> = Vec::new();
    for (n, (name, number)) in numbers.enumerate() {
        match n < LABELS_MAX {
            true => values.push((vec![(label, name.to_owned())], number)),
            false if n == LABELS_MAX => values.push((vec![(label, OTHER.to_owned())], number)),
            false => {
                if let Some((_, rest)) = values.last_mut() {
                    *rest = rest.saturating_add(number);
                }
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_beyond_the_limit_are_told_together() {
        let names: Vec<String> = (0..LABELS_MAX + 3).map(|n| format!("pool-{n}")).collect();
        let values = by_name("pool", names.iter().map(|name| (name.as_str(), 2)));
        assert_eq!(values.len(), LABELS_MAX + 1);
        assert_eq!(values[LABELS_MAX], (vec![("pool", OTHER.to_owned())], 6));
    }
}
