//! Label values that come from users are many over time, and each is a series that Prometheus keeps. So there are at most
//! [`LABELS_MAX`] of a kind at once, and what is beyond is counted together.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

/// Most values of one label.
pub const LABELS_MAX: usize = 100;
/// Stands for those beyond.
pub const OTHER: &str = "other";

/// Values of a label that are told apart.
#[derive(Debug, Default)]
pub struct Labels(RwLock<HashSet<String>>);

impl Labels {
    /// The label for `name`: itself if it is known or there is room, else [`OTHER`]. What is known takes no lock alone.
    pub fn of<'a>(&self, name: &'a str) -> &'a str {
        if self.0.read().unwrap_or_else(PoisonError::into_inner).contains(name) {
            return name;
        }
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= LABELS_MAX && !known.contains(name) {
            return OTHER;
        }
        known.insert(name.to_owned());
        name
    }

    /// There is no such thing any more, which makes room. Whether it was known.
    pub fn forget(&self, name: &str) -> bool {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_told_apart_and_one_that_is_gone_makes_room() {
        let labels = Labels::default();
        for n in 0..LABELS_MAX {
            let name = format!("snapshot-{n}");
            assert_eq!(labels.of(&name), name);
        }
        assert_eq!(labels.of("one-more"), OTHER);
        assert_eq!(labels.of("snapshot-7"), "snapshot-7", "those that are known stay");
        assert!(labels.forget("snapshot-7"));
        assert!(!labels.forget("snapshot-7"));
        assert_eq!(labels.of("one-more"), "one-more");
        assert_eq!(labels.of("snapshot-7"), OTHER);
    }
}
