//! The 8254 interval timer (Intel 8254 data sheet) and port 0x61.
//!
//! Counts are computed from the clock when they are read; only channel 0 ever needs a wake-up, for its interrupt.
//! The channel-0 deadline is a timerfd that the device thread watches.

use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::snapshot::state::chipset::{PitChannelState, PitState};

/// Input clock of all channels.
const FREQUENCY_HZ: u128 = 1_193_182;
const NS: u128 = 1_000_000_000;

/// Least time between two wake-ups for a periodic channel: a guest that asks for a million ticks a second gets those that
/// it misses as one, as from a masked line. (KVM's own 8254 does the same, `min_timer_period_us`.)
const PERIOD_MIN: Duration = Duration::from_micros(200);

const ACCESS_LOW: u8 = 1;
const ACCESS_HIGH: u8 = 2;
const ACCESS_BOTH: u8 = 3;

#[derive(Debug, Clone)]
struct Channel {
    state: PitChannelState,
    start: Instant,
}

/// The timer.
pub struct Pit {
    channels: [Channel; 3],
    speaker: bool,
    timer: TimerFd,
}

impl Pit {
    /// A timer with nothing programmed. Fails if the host has no descriptor left.
    pub fn new() -> Result<Self, vmm_sys_util::errno::Error> {
        let channel = |gate| Channel {
            state: PitChannelState { access: ACCESS_BOTH, gate, ..Default::default() },
            start: Instant::now(),
        };
        // Channels 0 and 1 have their gates wired high; channel 2's is bit 0 of port 0x61.
        Ok(Pit {
            channels: [channel(true), channel(true), channel(false)],
            speaker: false,
            timer: TimerFd::new()?,
        })
    }

    /// The channel-0 deadline, for the device thread's epoll.
    pub fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Reads port 0x40 to 0x43 or 0x61.
    pub fn read(&mut self, port: u16) -> u8 {
        let now = Instant::now();
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now),
            0x61 => {
                let channel = &self.channels[2];
                // Bit 4 is the refresh toggle, every 15 us on a PC: some delay loops count it.
                let refresh = (channel.start.elapsed().as_micros() / 15 % 2) as u8;
                u8::from(channel.state.gate)
                    | u8::from(self.speaker) << 1
                    | refresh << 4
                    | u8::from(channel.output(now)) << 5
            }
            _ => 0xff,
        }
    }

    /// Writes port 0x40 to 0x43 or 0x61.
    pub fn write(&mut self, port: u16, value: u8) {
        let now = Instant::now();
        match port {
            0x40..=0x42 => {
                let index = usize::from(port - 0x40);
                if self.channels[index].write(value, now) && index == 0 {
                    self.arm(now);
                }
            }
            0x43 => self.control(value, now),
            0x61 => {
                self.speaker = value & 2 != 0;
                let gate = value & 1 != 0;
                let channel = &mut self.channels[2];
                // A rising gate restarts the count in modes 1, 2, 3 and 5; in 0 and 4 it only lets it run.
                if gate && !channel.state.gate {
                    channel.start = now;
                }
                channel.state.gate = gate;
            }
            _ => {}
        }
    }

    fn control(&mut self, value: u8, now: Instant) {
        let select = value >> 6;
        if select == 3 {
            // Read-back command: latch count and/or status of the channels named in bits 1 to 3.
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if value & (2 << index) != 0 {
                    if value & 0x20 == 0 {
                        channel.latch(now);
                    }
                    if value & 0x10 == 0 && channel.state.latched_status.is_none() {
                        channel.state.latched_status = Some(channel.status(now));
                    }
                }
            }
            return;
        }
        let channel = &mut self.channels[usize::from(select)];
        match (value >> 4) & 3 {
            0 => channel.latch(now),
            access => {
                let mode = (value >> 1) & 7;
                channel.state = PitChannelState {
                    access,
                    // Modes 6 and 7 are 2 and 3.
                    mode: if mode > 5 { mode - 4 } else { mode },
                    gate: channel.state.gate,
                    ..Default::default()
                };
                channel.start = now;
                if select == 0 {
                    self.arm(now);
                }
            }
        }
    }

    /// Sets the timer to channel 0's next interrupt.
    fn arm(&mut self, now: Instant) {
        let result = match self.channels[0].next_interrupt(now) {
            Some(wait) => self.timer.reset(wait.max(Duration::from_nanos(1)), None),
            None => self.timer.clear(),
        };
        if let Err(error) = result {
            tracing::error!(%error, "the interval timer cannot be armed");
        }
    }

    /// The device thread: the deadline came. True if channel 0's output has risen and its interrupt is due.
    pub fn expired(&mut self) -> bool {
        // The expiration is not read: setting the timer again below clears it (timerfd_create(2)), and a guest
        // that reprogrammed the channel meanwhile may have cleared it, when a read would block.
        let now = Instant::now();
        let channel = &mut self.channels[0];
        let due = channel.periods(now);
        // Ticks missed while the VM was paused or the host busy are one interrupt, as they are with a masked line.
        let rise = due > channel.state.delivered;
        channel.state.delivered = due;
        self.arm(now);
        rise
    }

    /// The timer's state, in relative times.
    pub fn save(&self) -> PitState {
        let now = Instant::now();
        PitState {
            channels: std::array::from_fn(|n| PitChannelState {
                elapsed_ns: u64::try_from(self.channels[n].elapsed_ns(now)).unwrap_or(u64::MAX),
                ..self.channels[n].state
            }),
            speaker: self.speaker,
        }
    }

    /// Takes on a saved state, its elapsed times counted back from now.
    pub fn restore(&mut self, state: &PitState) {
        let now = Instant::now();
        for (channel, saved) in self.channels.iter_mut().zip(&state.channels) {
            channel.state = PitChannelState { mode: saved.mode.min(5), access: saved.access & 3, ..*saved };
            channel.start = now.checked_sub(Duration::from_nanos(saved.elapsed_ns)).unwrap_or(now);
        }
        self.speaker = state.speaker;
        self.arm(now);
    }
}

// === impl Channel ===

impl Channel {
    fn elapsed_ns(&self, now: Instant) -> u128 {
        now.saturating_duration_since(self.start).as_nanos()
    }

    fn ticks(&self, now: Instant) -> u64 {
        u64::try_from(self.elapsed_ns(now) * FREQUENCY_HZ / NS).unwrap_or(u64::MAX)
    }

    /// The count that was loaded; 0 means 65536.
    fn reload(&self) -> u64 {
        if self.state.reload == 0 { 0x1_0000 } else { u64::from(self.state.reload) }
    }

    fn running(&self) -> bool {
        self.state.counting && self.state.gate
    }

    fn count(&self, now: Instant) -> u16 {
        if !self.running() {
            return self.state.reload;
        }
        let (ticks, reload) = (self.ticks(now), self.reload());
        match self.state.mode {
            2 => (reload - ticks % reload) as u16,
            // Counts down by two, twice a period.
            3 => (reload - (ticks * 2) % reload) as u16,
            _ => reload.wrapping_sub(ticks) as u16,
        }
    }

    fn output(&self, now: Instant) -> bool {
        if !self.state.counting {
            return self.state.mode != 0;
        }
        let (ticks, reload) = (self.ticks(now), self.reload());
        match self.state.mode {
            0 | 1 => self.running() && ticks >= reload,
            2 => ticks % reload != reload - 1,
            3 => ticks % reload < reload.div_ceil(2),
            _ => ticks != reload,
        }
    }

    /// Rising output edges since the count was loaded.
    fn periods(&self, now: Instant) -> u64 {
        if !self.running() {
            return 0;
        }
        let periods = self.ticks(now) / self.reload();
        if matches!(self.state.mode, 2 | 3) { periods } else { periods.min(1) }
    }

    /// Time until the next rising edge that was not delivered yet.
    fn next_interrupt(&self, now: Instant) -> Option<Duration> {
        if !self.running() {
            return None;
        }
        let next = self.state.delivered.checked_add(1)?;
        if next > 1 && !matches!(self.state.mode, 2 | 3) {
            return None;
        }
        let at_ns = (u128::from(next) * u128::from(self.reload()) * NS).div_ceil(FREQUENCY_HZ);
        let wait = at_ns.saturating_sub(self.elapsed_ns(now));
        let wait = Duration::from_nanos(u64::try_from(wait).unwrap_or(u64::MAX));
        let fast = u128::from(self.reload()) * NS / FREQUENCY_HZ < PERIOD_MIN.as_nanos();
        Some(if fast && matches!(self.state.mode, 2 | 3) { wait.max(PERIOD_MIN) } else { wait })
    }

    fn status(&self, now: Instant) -> u8 {
        u8::from(self.output(now)) << 7
            | u8::from(!self.state.counting) << 6
            | self.state.access << 4
            | self.state.mode << 1
    }

    fn latch(&mut self, now: Instant) {
        if self.state.latched_count.is_none() {
            self.state.latched_count = Some(self.count(now));
        }
    }

    fn read(&mut self, now: Instant) -> u8 {
        if let Some(status) = self.state.latched_status.take() {
            return status;
        }
        let count = self.state.latched_count.unwrap_or_else(|| self.count(now));
        let high = match self.state.access {
            ACCESS_LOW => false,
            ACCESS_HIGH => true,
            _ => {
                self.state.read_high_next = !self.state.read_high_next;
                !self.state.read_high_next
            }
        };
        if high || self.state.access != ACCESS_BOTH {
            self.state.latched_count = None;
        }
        if high { (count >> 8) as u8 } else { count as u8 }
    }

    /// True when a whole count was loaded.
    fn write(&mut self, value: u8, now: Instant) -> bool {
        self.state.reload = match (self.state.access, self.state.write_low) {
            (ACCESS_LOW, _) => u16::from(value),
            (ACCESS_HIGH, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (_, None) => {
                self.state.write_low = Some(value);
                return false;
            }
        };
        self.state.write_low = None;
        self.state.counting = true;
        self.state.delivered = 0;
        self.start = now;
        true
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_count_goes_down_and_channel_two_reaches_its_output() {
        let mut pit = Pit::new().unwrap();
        pit.write(0x61, 1);
        pit.write(0x43, 0xb0); // channel 2, both bytes, mode 0
        pit.write(0x42, 0x00);
        pit.write(0x42, 0x10); // 4096 ticks: 3.4 ms
        assert_eq!(pit.read(0x61) & 0x20, 0);
        pit.write(0x43, 0x80); // latch
        let first = u16::from(pit.read(0x42)) | u16::from(pit.read(0x42)) << 8;
        assert!(first <= 0x1000);
        let begin = Instant::now();
        while pit.read(0x61) & 0x20 == 0 {
            assert!(begin.elapsed() < Duration::from_secs(10));
        }
        assert!(begin.elapsed() >= Duration::from_millis(2));
    }

    /// Its timer will run out or, on a busy host, has done so.
    fn is_set(pit: &Pit) -> bool {
        let mut poll = libc::pollfd { fd: pit.timer().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // Looked at in this order: it may run out in between.
        // SAFETY: one valid pollfd, which lives through the call.
        pit.timer().is_armed().unwrap() || unsafe { libc::poll(&mut poll, 1, 0) } == 1
    }

    #[test]
    fn the_periodic_channel_arms_its_timer_and_counts_missed_ticks_once() {
        let mut pit = Pit::new().unwrap();
        pit.write(0x43, 0x34); // channel 0, both bytes, mode 2
        pit.write(0x40, 0x00);
        pit.write(0x40, 0x01); // 256 ticks: 0.2 ms
        assert!(is_set(&pit));
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(3) {}
        assert!(pit.expired());
        assert!(is_set(&pit), "armed again for the next one");
        pit.write(0x43, 0x30); // mode 0, no count: silent
        assert!(!is_set(&pit));
    }

    #[test]
    fn a_periodic_channel_wakes_nobody_all_the_time() {
        let mut pit = Pit::new().unwrap();
        for (control, fast) in [(0x34, true), (0x36, true), (0x30, false)] {
            pit.write(0x43, control); // modes 2, 3 and 0
            pit.write(0x40, 1); // 1 tick: 0.8 us
            pit.write(0x40, 0);
            for late in [Duration::ZERO, Duration::from_millis(7)] {
                let now = pit.channels[0].start + late;
                let wait = pit.channels[0].next_interrupt(now).unwrap();
                assert_eq!(wait >= PERIOD_MIN, fast, "{control:#x} {late:?}: {wait:?}");
            }
        }
        // One that is slow enough is as punctual as it can be.
        pit.write(0x43, 0x34);
        pit.write(0x40, 0x00);
        pit.write(0x40, 0x10); // 4096 ticks: 3.4 ms
        let channel = &pit.channels[0];
        assert!(channel.next_interrupt(channel.start + Duration::from_micros(3400)).unwrap() < PERIOD_MIN);
    }

    #[test]
    fn state_is_relative() {
        let mut pit = Pit::new().unwrap();
        pit.write(0x43, 0x34);
        pit.write(0x40, 0xff);
        pit.write(0x40, 0xff);
        let state = pit.save();
        let mut other = Pit::new().unwrap();
        other.restore(&state);
        let again = other.save();
        assert!(again.channels[0].elapsed_ns >= state.channels[0].elapsed_ns);
        assert!(is_set(&other));
    }

    #[test]
    fn a_forged_state_does_no_harm() {
        let mut pit = Pit::new().unwrap();
        let mut state = pit.save();
        state.channels[0] = PitChannelState {
            mode: 255,
            access: 255,
            counting: true,
            gate: true,
            elapsed_ns: u64::MAX,
            delivered: u64::MAX,
            ..Default::default()
        };
        pit.restore(&state);
        pit.expired();
        for port in [0x40, 0x41, 0x42, 0x61] {
            pit.read(port);
        }
    }
}
