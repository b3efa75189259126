//! Rate limiters: token buckets in front of disks and network interfaces.
//!
//! A bucket fills at its rate and holds one second's worth; a device begins nothing while a bucket of its is empty, and what it
//! begins is charged afterwards, into debt if need be. So in any time `t` no more than `rate * (1 s + t)` and one request
//! pass, and a request larger than the bucket passes too. A device that has to wait leaves requests in the ring and
//! frames in the link, and looks again when its timer tells: nothing is dropped, nothing polls.
//!
//! What is left in a bucket is no part of a snapshot: every clone begins with full ones.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

const NS_PER_S: i128 = 1_000_000_000;

/// What a device may do in a second; `None`: as much as it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rate {
    pub bytes: Option<u64>,
    /// Requests of a disk, frames of a network interface.
    pub operations: Option<u32>,
}

impl Rate {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// What each device of a kind may do in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Each disk.
    pub disk: Rate,
    /// Each network interface, in each direction.
    pub network: Rate,
}

/// A token bucket. Times are those since any fixed moment, and do not go back.
#[derive(Debug)]
struct Bucket {
    /// Tokens in a second, and at most in the bucket; at least 1.
    rate: i128,
    /// Billionths of tokens; below zero: debt.
    level: i128,
    then: Duration,
}

impl Bucket {
    fn full(rate: u64, now: Duration) -> Self {
        let rate = i128::from(rate.max(1));
        Self { rate, level: rate * NS_PER_S, then: now }
    }

    /// How long until something may begin; `None`: now.
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        let ns = now.saturating_sub(self.then).as_nanos().min(u64::MAX.into());
        self.then = self.then.max(now);
        let came = i128::try_from(ns).unwrap_or(i128::MAX).saturating_mul(self.rate);
        self.level = self.level.saturating_add(came).min(self.rate * NS_PER_S);
        if self.level > 0 {
            return None;
        }
        let ns = -self.level / self.rate + 1;
        Some(Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)))
    }

    fn charge(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * NS_PER_S);
    }
}

/// The buckets of one device, or of one direction of it, and the timer that it waits for.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    timer: TimerFd,
    since: Instant,
    waiting: bool,
}

impl Limiter {
    /// With full buckets; `None`: nothing is limited.
    ///
    /// # Errors
    /// No timer descriptor.
    pub fn new(rate: Rate) -> io::Result<Option<Self>> {
        if rate.is_none() {
            return Ok(None);
        }
        let full = |rate: u64| Bucket::full(rate, Duration::ZERO);
        Ok(Some(Self {
            bytes: rate.bytes.map(full),
            operations: rate.operations.map(u64::from).map(full),
            timer: TimerFd::new().map_err(io::Error::from)?,
            since: Instant::now(),
            waiting: false,
        }))
    }

    /// Whether something may begin. If not, the timer tells when to ask again.
    pub fn ready(&mut self) -> bool {
        let now = self.since.elapsed();
        let waits = self.bytes.iter_mut().chain(&mut self.operations).filter_map(|bucket| bucket.wait(now));
        let Some(wait) = waits.max() else {
            self.waiting = false;
            return true;
        };
        self.waiting = true;
        if let Err(error) = self.timer.reset(wait, None) {
            // A limit that cannot be kept is better than a device that stands still for ever.
            tracing::error!(%error, "a rate limiter's timer cannot be set; the limit is not kept");
            self.waiting = false;
        }
        !self.waiting
    }

    /// One operation of so many bytes began.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1);
        }
    }

    /// Something was left for later.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Readable when it is later.
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// It is later, or nobody waits any more.
    pub fn expired(&mut self) {
        self.waiting = false;
        // Set to nothing, it is not readable any more; fails only if it could not be set at all.
        let _ = self.timer.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_bucket_lets_a_second_through_and_then_one_token_at_a_time() {
        let at = Duration::from_millis;
        let mut bucket = Bucket::full(1000, at(50));
        for _ in 0..1000 {
            assert_eq!(bucket.wait(at(50)), None);
            bucket.charge(1);
        }
        let wait = bucket.wait(at(50)).unwrap();
        assert_eq!(wait, Duration::from_nanos(1));
        assert_eq!(bucket.wait(at(51)), None);
        // As much as it may owe, it works off.
        bucket.charge(5001);
        assert_eq!(bucket.wait(at(51)).unwrap(), at(5000) + Duration::from_nanos(1));
        assert_eq!(bucket.wait(at(5051)).unwrap(), Duration::from_nanos(1));
        assert_eq!(bucket.wait(at(5052)), None);
        // However long nobody comes, it holds no more than a second's worth.
        assert_eq!(bucket.wait(at(500_000)), None);
        bucket.charge(1001);
        assert!(bucket.wait(at(500_000)).is_some());
    }

    #[test]
    fn a_limiter_waits_for_its_slower_bucket_and_its_timer_wakes() {
        assert!(Limiter::new(Rate::default()).unwrap().is_none());
        let rate = Rate { bytes: Some(1 << 40), operations: Some(100) };
        let mut limiter = Limiter::new(rate).unwrap().unwrap();
        let mut passed = 0;
        while limiter.ready() {
            limiter.charge(1);
            passed += 1;
        }
        assert!(passed >= 100 && limiter.is_waiting());
        // Readable only when it is time, and then something passes.
        limiter.timer.wait().unwrap();
        limiter.expired();
        assert!(!limiter.is_waiting() && limiter.ready());
    }

    proptest! {
        /// Whoever comes whenever: no more than the rate, a second's worth, and one request.
        #[test]
        fn no_more_passes_than_was_said(
            rate in 1u64..=1 << 50,
            turns in prop::collection::vec((0u64..3_000_000_000, 0u64..1 << 45), 1..60),
        ) {
            let mut bucket = Bucket::full(rate, Duration::ZERO);
            let (mut now, mut passed, mut largest) = (Duration::ZERO, 0u128, 0u64);
            for (ns, tokens) in turns {
                now += Duration::from_nanos(ns);
                match bucket.wait(now) {
                    None => {
                        bucket.charge(tokens);
                        passed += u128::from(tokens);
                        largest = largest.max(tokens);
                    }
                    // It is not told too early, nor much too late.
                    Some(wait) => prop_assert_eq!(bucket.wait(now + wait), None),
                }
                now = now.max(bucket.then);
                let most = u128::from(rate) * (NS_PER_S as u128 + now.as_nanos()) / NS_PER_S as u128;
                prop_assert!(passed <= most + u128::from(largest), "{passed} of {most} and {largest}");
            }
        }
    }
}
