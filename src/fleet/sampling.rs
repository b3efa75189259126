//! What clones touch, looked at again when it has been learnt: how many page faults they take until their first useful answer, and how much of
//! that the working set had. One clone a second at most is asked, off everybody's road.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use super::Fleet;
use super::clones::mode;
use super::error::FleetError;
use super::learning::touched;
use super::sources::Source;
use super::vm::Vm;
use crate::snapshot::working_set::{common, units, without};
use crate::telemetry::metrics;
use crate::telemetry::metrics::Mode;

/// How often one is asked.
const EVERY: Duration = Duration::from_secs(1);

/// When it is time for another.
#[derive(Debug, Default)]
pub struct Sampling {
    /// Milliseconds of this process; 0: none was asked yet.
    next_ms: AtomicU64,
}

impl Sampling {
    /// Whether this one is to be asked.
    fn is_due(&self) -> bool {
        static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let now = millis(BEGAN.elapsed());
        let next = self.next_ms.load(Ordering::Relaxed);
        let then = now.saturating_add(millis(EVERY));
        now >= next && self.next_ms.compare_exchange(next, then, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Fleet {
    /// Looks at a clone, if it is time. `given`: it was given what was learnt.
    pub(super) fn sample(&self, vm: &Arc<Vm>, source: &Arc<Source>, answered: bool, given: bool) {
        if !self.sampling.is_due() {
            return;
        }
        let (vm, source) = (Arc::clone(vm), Arc::clone(source));
        tokio::spawn(async move {
            if let Err(error) = look(&vm, &source, answered, given).await {
                // Most clones have ended when they have answered.
                tracing::debug!(%error, vm = %vm.id, "a clone was not looked at");
            }
        });
    }
}

async fn look(vm: &Vm, source: &Source, answered: bool, given: bool) -> Result<(), FleetError> {
    let Some(mode) = vm.memory_mode.map(mode) else { return Ok(()) };
    let (touched, _) = touched(vm, answered).await?;
    source.learning.check(&touched).map_err(|problem| FleetError::Internal(problem.to_owned()))?;
    let (stats, pager) = vm.stats().await?;
    let faults = stats.minor_faults.saturating_add(stats.major_faults).saturating_add(pager.faults);
    metrics().clone_faults(mode, faults);
    let learnt = source.learning.learnt().pieces;
    if given && !learnt.is_empty() {
        // In a mapped clone that was made ahead, what was made ahead cannot be told from what the guest has touched.
        let hit = (mode == Mode::Userfault).then(|| units(&common(&touched.pieces, &learnt)));
        metrics().working_set(mode, units(&learnt), hit, units(&without(&touched.pieces, &learnt)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_and_not_the_next_that_comes_at_once() {
        let sampling = Sampling::default();
        assert!(sampling.is_due());
        assert!(!sampling.is_due());
        sampling.next_ms.store(0, Ordering::Relaxed);
        assert!(sampling.is_due(), "when its time has come");
    }
}
