//! Something that is wished for at any rate and done at a bounded one: the first time at once, and what was wished for meanwhile once, when the
//! time is up.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

#[derive(Debug)]
pub struct Pace {
    every: Duration,
    /// Not before then.
    next: Option<Instant>,
    due: Option<Instant>,
}

impl Pace {
    pub fn new(every: Duration) -> Self {
        Self { every, next: None, due: None }
    }

    /// It is to be done.
    pub fn wish(&mut self, now: Instant) {
        self.due.get_or_insert(self.next.map_or(now, |next| next.max(now)));
    }

    /// When it is to be done, if it is.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is done.
    pub fn done(&mut self, now: Instant) {
        self.next = Some(now + self.every);
        self.due = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wished_for_again_and_again_is_done_once_in_its_time() {
        let (begin, every) = (Instant::now(), Duration::from_secs(1));
        let mut pace = Pace::new(every);
        assert_eq!(pace.due(), None);
        let mut done = Vec::new();
        for ms in 0..2500 {
            let now = begin + Duration::from_millis(ms);
            pace.wish(now);
            if pace.due().is_some_and(|due| due <= now) {
                pace.done(now);
                done.push(ms);
            }
        }
        assert_eq!(done, [0, 1000, 2000]);
        // The last wish is not lost.
        assert_eq!(pace.due(), Some(begin + 3 * every));
        let mut rare = Pace::new(every);
        rare.done(begin);
        rare.wish(begin + 5 * every);
        assert_eq!(rare.due(), Some(begin + 5 * every), "at once, when nothing was done for long");
    }
}
