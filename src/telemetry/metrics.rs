//! The instruments. Observing is a look-up under a lock that is shared and a few additions: below a microsecond, also on a clone's road.
//!
//! What can be read when it is asked for (VMs by state, pools, functions) is not here but in `fleet::gauges`.

use std::fmt::Error;
use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use super::labels::Labels;

/// Clones: a quarter of a millisecond to a second.
const RESTORE_SECONDS: [f64; 19] = [
    0.00025, 0.0005, 0.00075, 0.001, 0.00125, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.0075, 0.01,
    0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
];
/// Their parts.
const STEP_SECONDS: [f64; 14] = [
    0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0,
];
const BOOT_SECONDS: [f64; 14] =
    [0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];
const DESTROY_SECONDS: [f64; 11] = [0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0];
const PAUSE_SECONDS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
const REQUEST_SECONDS: [f64; 14] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];
const FAULTS: [f64; 11] =
    [10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 100_000.0];

/// How a clone's memory is faulted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Mapped,
    Userfault,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Userfault => "userfault",
        }
    }
}

/// Why a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The service ended it, mostly because it was asked to.
    Asked,
    /// The guest switched itself off, or KVM could not go on with it.
    Guest,
    /// Its worker process died by itself, or was killed by somebody else.
    Worker,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RestoreLabels {
    snapshot: String,
    mode: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HowLabels {
    how: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    mode: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PieceLabels {
    mode: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabels {
    method: &'static str,
    code: &'static str,
}

type Histograms<S> = Family<S, Histogram, fn() -> Histogram>;

/// All instruments.
#[derive(Debug)]
pub struct Metrics {
    snapshots: Labels,
    restores: Histograms<RestoreLabels>,
    restore_steps: Histograms<StepLabels>,
    boots: Histogram,
    destroys: Histogram,
    snapshot_pauses: Histogram,
    vm_ends: Family<HowLabels, Counter>,
    identity_failures: Family<ReasonLabels, Counter>,
    errors: Family<ReasonLabels, Counter>,
    clone_faults: Histograms<ModeLabels>,
    pieces: Family<PieceLabels, Counter>,
    requests: Family<CodeLabels, Counter>,
    request_seconds: Histograms<MethodLabels>,
}

/// Those of this process.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::default);
    &METRICS
}

impl Default for Metrics {
    fn default() -> Self {
        let made = Self {
            snapshots: Labels::default(),
            restores: Family::new_with_constructor(|| Histogram::new(RESTORE_SECONDS)),
            restore_steps: Family::new_with_constructor(|| Histogram::new(STEP_SECONDS)),
            boots: Histogram::new(BOOT_SECONDS),
            destroys: Histogram::new(DESTROY_SECONDS),
            snapshot_pauses: Histogram::new(PAUSE_SECONDS),
            vm_ends: Family::default(),
            identity_failures: Family::default(),
            errors: Family::default(),
            clone_faults: Family::new_with_constructor(|| Histogram::new(FAULTS)),
            pieces: Family::default(),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(|| Histogram::new(REQUEST_SECONDS)),
        };
        // What is counted from zero on has a rate from the first one on.
        for how in ["asked", "guest", "worker"] {
            drop(made.vm_ends.get_or_create(&HowLabels { how }));
        }
        for reason in IDENTITY_REASONS {
            drop(made.identity_failures.get_or_create(&ReasonLabels { reason }));
        }
        made
    }
}

/// Why a clone did not confirm its identity.
pub const IDENTITY_REASONS: [&str; 4] = ["timeout", "wrong_generation", "ended", "refused"];

impl Metrics {
    /// A clone of this snapshot runs, this long after it was asked for.
    pub fn restored(&self, snapshot: &str, mode: Mode, took: Duration) {
        let labels = RestoreLabels { snapshot: self.snapshots.of(snapshot).to_owned(), mode: mode.name() };
        self.restores.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A step of a clone's road. The names are the road's own, so they are few.
    pub fn restore_step(&self, step: &'static str, took: Duration) {
        self.restore_steps.get_or_create(&StepLabels { step }).observe(took.as_secs_f64());
    }

    /// The snapshot is deleted: its series end.
    pub fn forget_snapshot(&self, snapshot: &str) {
        if self.snapshots.forget(snapshot) {
            for mode in [Mode::Mapped, Mode::Userfault] {
                self.restores.remove(&RestoreLabels { snapshot: snapshot.to_owned(), mode: mode.name() });
            }
        }
    }

    /// A VM was cold-booted to its ready point.
    pub fn booted(&self, took: Duration) {
        self.boots.observe(took.as_secs_f64());
    }

    /// A VM that was to be deleted is gone.
    pub fn destroyed(&self, took: Duration) {
        self.destroys.observe(took.as_secs_f64());
    }

    /// A guest stood still this long for its snapshot.
    pub fn snapshot_paused(&self, pause: Duration) {
        self.snapshot_pauses.observe(pause.as_secs_f64());
    }

    pub fn vm_ended(&self, how: Ended) {
        let how = match how {
            Ended::Asked => "asked",
            Ended::Guest => "guest",
            Ended::Worker => "worker",
        };
        self.vm_ends.get_or_create(&HowLabels { how }).inc();
    }

    /// A clone did not confirm its identity, and nobody gets it. `reason`: one of [`IDENTITY_REASONS`].
    pub fn identity_failed(&self, reason: &'static str) {
        self.identity_failures.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// A caller was told of a failure.
    pub fn error(&self, reason: &'static str) {
        self.errors.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Page faults of one clone until its first useful answer.
    pub fn clone_faults(&self, mode: Mode, faults: u64) {
        self.clone_faults.get_or_create(&ModeLabels { mode: mode.name() }).observe(faults as f64);
    }

    /// What the working set was to one clone, in pieces of 2 MiB: had ready for it; of those touched, where that can be told; touched
    /// besides.
    pub fn working_set(&self, mode: Mode, prefetched: u64, hit: Option<u64>, missed: u64) {
        let outcomes = [("prefetched", Some(prefetched)), ("hit", hit), ("missed", Some(missed))];
        for (outcome, pieces) in outcomes {
            if let Some(pieces) = pieces {
                self.pieces.get_or_create(&PieceLabels { mode: mode.name(), outcome }).inc_by(pieces);
            }
        }
    }

    /// A gRPC request has ended.
    pub fn request(&self, method: &'static str, code: &'static str, took: Duration) {
        self.requests.get_or_create(&CodeLabels { method, code }).inc();
        self.request_seconds.get_or_create(&MethodLabels { method }).observe(took.as_secs_f64());
    }

    fn encode(&self, encoder: &mut DescriptorEncoder) -> Result<(), Error> {
        let mut put = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        put(
            "coldspark_restore_seconds",
            "Clones that were started, from the request to the hand-over, identity and first call included",
            &self.restores,
        )?;
        put("coldspark_restore_step_seconds", "Parts of that", &self.restore_steps)?;
        put("coldspark_boot_seconds", "Cold boots, from the request to the ready point", &self.boots)?;
        put(
            "coldspark_destroy_seconds",
            "VMs that were deleted, until their process is gone",
            &self.destroys,
        )?;
        put(
            "coldspark_snapshot_pause_seconds",
            "How long guests stood still for snapshots",
            &self.snapshot_pauses,
        )?;
        put(
            "coldspark_vm_ends",
            "VMs that ended: asked (by the service), guest (by itself), worker (its process died)",
            &self.vm_ends,
        )?;
        put(
            "coldspark_identity_failures",
            "Clones that did not confirm their identity and were ended",
            &self.identity_failures,
        )?;
        put("coldspark_errors", "Failures that callers were told of", &self.errors)?;
        put(
            "coldspark_clone_page_faults",
            "Page faults of clones until their first useful answer, of one clone a second",
            &self.clone_faults,
        )?;
        put(
            "coldspark_working_set_pieces",
            "Pieces of 2 MiB that clones had ready, used of these (userfault only), and touched besides; of one clone a second",
            &self.pieces,
        )?;
        put("coldspark_grpc_requests", "gRPC requests that have ended", &self.requests)?;
        put(
            "coldspark_grpc_request_seconds",
            "How long they took, streams to their end",
            &self.request_seconds,
        )
    }
}

/// Puts the instruments of this process into an exposition.
#[derive(Debug)]
pub struct Instruments;

impl Collector for Instruments {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), Error> {
        metrics().encode(&mut encoder)
    }
}
