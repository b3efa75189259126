//! How many a pool should have ready: the number that was promised, or more when more are asked for.

use std::time::{Duration, Instant};

/// Time constant of the rate: what was asked this long ago counts a third of what is asked now.
const MEMORY: Duration = Duration::from_secs(10);
/// Weight of the newest one in the mean time that making one takes.
const NEWEST: f64 = 0.2;
/// Standard deviations of a Poisson process that are kept ready beyond its mean.
const DEVIATIONS: f64 = 3.0;
/// A rate below one in this many seconds is none.
const RATE_LEAST: f64 = 1.0 / 60.0;

/// What is asked of a pool, and how long it takes to make what is asked for.
#[derive(Debug, Clone)]
pub struct Demand {
    rate: f64,
    at: Instant,
    make_seconds: Option<f64>,
}

impl Demand {
    pub fn new(now: Instant) -> Self {
        Self { rate: 0.0, at: now, make_seconds: None }
    }

    /// One was asked for.
    pub fn asked(&mut self, now: Instant) {
        self.rate = self.rate(now) + 1.0 / MEMORY.as_secs_f64();
        self.at = self.at.max(now);
    }

    /// One was made, and took this long.
    pub fn made(&mut self, took: Duration) {
        let took = took.as_secs_f64();
        self.make_seconds = Some(self.make_seconds.map_or(took, |mean| mean + NEWEST * (took - mean)));
    }

    /// How many are asked for in a second, by an exponential mean.
    pub fn rate(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        let rate = self.rate * (-age / MEMORY.as_secs_f64()).exp();
        if rate < RATE_LEAST { 0.0 } else { rate }
    }

    /// How many to have ready so that hardly anybody has to wait while the next ones are made, one after the other, `pace` times as slowly as it can be done.
    pub fn target(&self, now: Instant, pace: f64) -> u32 {
        let waiting = self.rate(now) * self.make_seconds.unwrap_or(0.0) * pace;
        // Saturates.
        (waiting + DEVIATIONS * waiting.sqrt()).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(per_second: u32, seconds: u32, took: Duration) -> (Demand, Instant) {
        let start = Instant::now();
        let mut demand = Demand::new(start);
        demand.made(took);
        let mut now = start;
        for _ in 0..per_second * seconds {
            now += Duration::from_secs(1) / per_second;
            demand.asked(now);
        }
        (demand, now)
    }

    #[test]
    fn a_steady_rate_is_found() {
        let (demand, now) = steady(20, 60, Duration::from_millis(10));
        let rate = demand.rate(now);
        assert!((19.0..22.0).contains(&rate), "{rate}");
    }

    #[test]
    fn more_is_kept_ready_where_more_is_asked_for_or_making_takes_longer() {
        let target = |per_second, millis| {
            let (demand, now) = steady(per_second, 60, Duration::from_millis(millis));
            demand.target(now, 1.0)
        };
        assert!(target(1, 2) < target(100, 2) && target(100, 2) < target(100, 100));
        // A mean of 0.2 waiting, and three deviations.
        assert_eq!(target(100, 2), 2);
    }

    #[test]
    fn what_is_asked_no_more_is_forgotten() {
        let (demand, now) = steady(100, 10, Duration::from_secs(1));
        assert!(demand.target(now, 1.0) > 50);
        assert_eq!(demand.target(now + 20 * MEMORY, 1.0), 0);
        assert_eq!(Demand::new(now).target(now, 1.0), 0);
    }

    #[test]
    fn times_that_go_backwards_do_no_harm() {
        let now = Instant::now();
        let mut demand = Demand::new(now + MEMORY);
        demand.asked(now);
        assert!(demand.rate(now) <= 0.2);
    }
}
