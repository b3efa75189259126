//! What came of requests.

use std::collections::BTreeMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// What came of a request, however often it was sent.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    Ok,
    /// It went well, but had to be sent again: the daemon was killed meanwhile.
    OkAgain,
    /// A limit, and which: to be asked again.
    Refused(String),
    /// Its VM's worker was killed.
    Killed,
    /// What should not have come.
    Wrong(String),
    /// Its VM ended when there was no daemon that could have said why.
    Unseen,
}

/// What a failed call is about.
#[derive(Debug)]
pub enum Failure {
    Refused(String),
    /// The VM has ended.
    Ended(String),
    /// There is none.
    NoVm,
    /// The connection's other end is gone.
    Lost,
    Wrong(String),
}

impl Failure {
    pub fn of(status: &Status) -> Failure {
        let details = status.get_error_details();
        let Some(info) = details.error_info() else {
            // What the service says has a reason; this was made here, of a connection that has ended.
            return match status.code() {
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => Failure::Lost,
                _ => Failure::Wrong(format!("{status:?}")),
            };
        };
        match status.code() {
            Code::ResourceExhausted => Failure::Refused(info.reason.clone()),
            Code::Aborted => Failure::Ended(status.message().to_owned()),
            Code::FailedPrecondition if status.message().contains("has ended") => {
                Failure::Ended(status.message().to_owned())
            }
            Code::NotFound if info.reason == "VM_NOT_FOUND" => Failure::NoVm,
            _ => Failure::Wrong(format!("{:?} {}: {}", status.code(), info.reason, status.message())),
        }
    }
}

#[derive(Default)]
pub struct Counts {
    outcomes: BTreeMap<(&'static str, Outcome), u64>,
    /// Calls that a daemon's death cut off.
    lost_calls: BTreeMap<&'static str, u64>,
    /// How long those took that went well at once.
    us: BTreeMap<&'static str, Vec<u64>>,
}

impl Counts {
    pub fn add(&mut self, what: &'static str, outcome: Outcome, took: Duration, lost_calls: u64) {
        if outcome == Outcome::Ok {
            self.us.entry(what).or_default().push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
        *self.outcomes.entry((what, outcome)).or_default() += 1;
        *self.lost_calls.entry(what).or_default() += lost_calls;
    }

    pub fn of(&self, what: &'static str, outcome: &Outcome) -> u64 {
        self.outcomes.get(&(what, outcome.clone())).copied().unwrap_or(0)
    }

    pub fn wrong(&self) -> Vec<String> {
        let wrong = self.outcomes.iter().filter_map(|((what, outcome), count)| match outcome {
            Outcome::Wrong(said) => Some(format!("{count} x {what}: {said}")),
            _ => None,
        });
        wrong.collect()
    }

    /// Lines for each kind of request.
    pub fn text(&mut self) -> String {
        let mut text = String::new();
        for (what, lost) in &self.lost_calls {
            let of = |outcome: &Outcome| self.of(what, outcome);
            let kinds = self.outcomes.iter().filter(|((kind, _), _)| kind == what);
            let mut refused = String::new();
            let mut wrong = 0;
            for ((_, outcome), count) in kinds {
                match outcome {
                    Outcome::Refused(reason) => refused += &format!(", {count} refused ({reason})"),
                    Outcome::Wrong(_) => wrong += count,
                    _ => {}
                }
            }
            text += &format!(
                "{what}: {} ok, {} ok when sent again after the daemon's death ({lost} calls lost with it){refused}, {} lost with a killed \
                 worker, {} with a VM that ended while no daemon was there, {wrong} wrong\n",
                of(&Outcome::Ok),
                of(&Outcome::OkAgain),
                of(&Outcome::Killed),
                of(&Outcome::Unseen)
            );
        }
        for (what, us) in &mut self.us {
            us.sort_unstable();
            let at = |share: usize| us.get(us.len() * share / 1000).copied().unwrap_or(0) as f64 / 1000.0;
            text += &format!(
                "{what}, to its end: p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms\n",
                at(500),
                at(990),
                at(999)
            );
        }
        text
    }
}
