//! Where a cold boot's time went: the phases on one clock, each with what the guest's time stamp counter said.
//!
//! Times come from three places: this process (image, worker, console, ready), the worker's steps, and its marks at the
//! first guest entry and the first console byte. All of them are CLOCK_MONOTONIC. What is heard on the console is timed when
//! this process reads it, which is later than the guest wrote it by the time it takes to wake a task. The counter is
//! computed from one reading before the first guest instruction and its frequency; the worker is not trusted, so nothing
//! here can overflow.

use super::kernel_words::KernelWords;
use crate::worker::protocol::{Booted, GuestClock, Milestones, instant_ns, monotonic_ns};

/// What a boot reached, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfilePhase {
    pub name: String,
    /// Since the request arrived.
    pub us: u64,
    /// `None`: the VM, and with it its counter, was not there yet; or KVM does not tell.
    pub guest_tsc: Option<u64>,
}

/// A boot's phases, in the order of their times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    pub phases: Vec<ProfilePhase>,
    /// From the request to the guest's first instruction: the service's and the VMM's part of the boot.
    pub own_us: Option<u64>,
    /// Of the guest's counter; 0: not known.
    pub tsc_khz: u32,
}

/// Collects phases while a VM boots.
#[derive(Debug)]
pub struct Profiler {
    arrived_ns: u64,
    reached: Vec<(String, u64)>,
}

impl Profiler {
    /// The request has just arrived.
    pub fn begin() -> Self {
        Self { arrived_ns: monotonic_ns(), reached: Vec::new() }
    }

    /// Something was reached now.
    pub fn reached(&mut self, name: &str) {
        self.at(name, monotonic_ns());
    }

    fn at(&mut self, name: &str, ns: u64) {
        self.reached.push((name.to_owned(), ns));
    }

    /// The worker's steps up to the first guest instruction, which its own mark tells better.
    pub fn booted(&mut self, booted: &Booted) {
        let mut ns = booted.arrived_ns;
        self.at("worker told", ns);
        for step in booted.steps.iter().filter(|step| step.name != "start") {
            ns = ns.saturating_add(u64::from(step.us).saturating_mul(1000));
            self.at(phase_name(&step.name), ns);
        }
    }

    /// The whole, at the ready point.
    pub fn finish(mut self, marks: &Milestones, words: &KernelWords) -> Profile {
        let heard = [
            ("root mount announced", words.root_mount),
            ("first output after that", words.after_root_mount),
            ("init announced", words.init),
        ];
        for (name, at) in heard {
            if let Some(at) = at {
                self.at(name, instant_ns(at));
            }
        }
        for (name, at) in [("kernel entry", marks.entered_ns), ("first console byte", marks.first_output_ns)]
        {
            if let Some(at) = at {
                self.at(name, at);
            }
        }
        // Stable: what came at the same time stays in the order in which it was told.
        self.reached.sort_by_key(|(_, ns)| *ns);
        let since = |ns: u64| ns.saturating_sub(self.arrived_ns) / 1000;
        let phases = self.reached.iter().map(|(name, ns)| ProfilePhase {
            name: name.clone(),
            us: since(*ns),
            guest_tsc: marks.clock.and_then(|clock| tsc_at(&clock, *ns)),
        });
        Profile {
            phases: phases.collect(),
            own_us: marks.entered_ns.map(since),
            tsc_khz: marks.clock.map_or(0, |clock| clock.khz),
        }
    }
}

/// A worker's step as a phase that was reached.
pub fn phase_name(step: &str) -> &str {
    match step {
        "memory" => "memory mapped",
        "vm" => "VM made",
        "devices" => "devices made",
        "load" => "kernel loaded",
        "vcpus" => "vCPUs made",
        "start" => "vCPUs running",
        other => other,
    }
}

/// The counter at `ns`; `None` if that would be before its zero: before the VM was made.
fn tsc_at(clock: &GuestClock, ns: u64) -> Option<u64> {
    let ticks = |ns: u64| u64::try_from(u128::from(ns) * u128::from(clock.khz) / 1_000_000).ok();
    match ns.checked_sub(clock.at_ns) {
        Some(later) => clock.tsc.checked_add(ticks(later)?),
        None => clock.tsc.checked_sub(ticks(clock.at_ns.saturating_sub(ns))?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::protocol::{BootProtocol, Step};
    use proptest::prelude::*;

    fn booted(arrived_ns: u64, steps: &[(&str, u32)]) -> Booted {
        let steps = steps.iter().map(|(name, us)| Step { name: (*name).to_owned(), us: *us }).collect();
        Booted { protocol: BootProtocol::FreeBsd, choices: Vec::new(), arrived_ns, steps }
    }

    #[test]
    fn phases_are_in_order_and_the_counter_runs_with_them() {
        let mut profiler = Profiler { arrived_ns: 1_000_000, reached: Vec::new() };
        profiler.at("worker taken", 1_100_000);
        profiler.booted(&booted(1_200_000, &[("memory", 50), ("load", 150), ("start", 900)]));
        profiler.at("ready", 9_000_000);
        let clock = GuestClock { at_ns: 1_390_000, tsc: 500_000, khz: 2_000_000 };
        let marks =
            Milestones { entered_ns: Some(1_500_000), first_output_ns: Some(2_000_000), clock: Some(clock) };
        let profile = profiler.finish(&marks, &KernelWords::default());
        let seen: Vec<(&str, u64, Option<u64>)> =
            profile.phases.iter().map(|p| (p.name.as_str(), p.us, p.guest_tsc)).collect();
        assert_eq!(
            seen,
            [
                // 290 us before the reading are 580,000 ticks: more than there had been.
                ("worker taken", 100, None),
                ("worker told", 200, Some(120_000)),
                ("memory mapped", 250, Some(220_000)),
                ("kernel loaded", 400, Some(520_000)),
                ("kernel entry", 500, Some(720_000)),
                ("first console byte", 1000, Some(1_720_000)),
                ("ready", 8000, Some(15_720_000)),
            ]
        );
        assert_eq!((profile.own_us, profile.tsc_khz), (Some(500), 2_000_000));
    }

    proptest! {
        #[test]
        fn no_worker_breaks_the_order(
            arrived in any::<u64>(), step in any::<u32>(), entered in any::<Option<u64>>(),
            output in any::<Option<u64>>(), at_ns in any::<u64>(), tsc in any::<u64>(), khz in any::<u32>()
        ) {
            let mut profiler = Profiler::begin();
            profiler.booted(&booted(arrived, &[("memory", step), ("vm", u32::MAX)]));
            profiler.reached("ready");
            let clock = Some(GuestClock { at_ns, tsc, khz });
            let marks = Milestones { entered_ns: entered, first_output_ns: output, clock };
            let profile = profiler.finish(&marks, &KernelWords::default());
            prop_assert!(profile.phases.windows(2).all(|two| two[0].us <= two[1].us));
        }
    }
}
