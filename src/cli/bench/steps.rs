//! The service's own times of what it did, gathered over many runs.

use serde_json::Value;

use super::{sort, spread};
use crate::api::proto;

/// Microseconds by step, in the order of their first appearance.
#[derive(Default)]
pub struct Steps(Vec<(String, Vec<f64>)>);

impl Steps {
    /// Those of one run.
    pub fn take(&mut self, steps: Vec<proto::Step>) {
        for step in steps {
            // Durations of a local service stay far below what a float holds exactly.
            let us = step.us as f64;
            match self.0.iter_mut().find(|(name, _)| *name == step.name) {
                Some((_, values)) => values.push(us),
                None => self.0.push((step.name, vec![us])),
            }
        }
    }

    pub fn sort(&mut self) {
        sort(self.0.iter_mut().map(|(_, values)| values));
    }

    /// Percentiles of each; sorted before.
    pub fn json(&self) -> Value {
        self.0.iter().map(|(name, values)| (name.clone(), spread(values))).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &[f64])> {
        self.0.iter().map(|(name, values)| (name.as_str(), values.as_slice()))
    }
}
