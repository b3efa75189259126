//! The CMOS clock (Motorola MC146818): the host's time of day in UTC, and 128 bytes of memory.
//!
//! The time is the host's whenever it is read, so a clone that looks at the clock sees the present, not the
//! snapshot's past. A guest that sets the clock is not obeyed: its clock is the host's. Periodic interrupts are not
//! offered; FreeBSD prefers the LAPIC timer (`sys/x86/isa/atrtc.c` gives its own the lowest quality).

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::snapshot::state::chipset::CmosState;

const MEMORY_BYTES: usize = 128;
/// A driver looks at status A, sees that no update is near, and reads the time register by register: for so long they belong together. (The
/// chip promises 244 us, which is long for exits to a VMM that may have to wait for a CPU.)
const TOGETHER: Duration = Duration::from_millis(20);
const REGISTER_STATUS_A: u8 = 0x0a;
const REGISTER_CENTURY: u8 = 0x32;
/// 32 kHz divider on, 1024 Hz.
const STATUS_A: u8 = 0x26;
/// 24-hour, BCD.
const STATUS_B: u8 = 0x02;
/// The battery is good.
const STATUS_D: u8 = 0x80;

/// The clock.
pub struct Cmos {
    index: u8,
    memory: [u8; MEMORY_BYTES],
    /// When status A was read, and the Unix time then.
    looked: Option<(Instant, u64)>,
}

impl Default for Cmos {
    fn default() -> Self {
        Cmos { index: 0, memory: [0; MEMORY_BYTES], looked: None }
    }
}

impl Cmos {
    /// Reads port 0x70 (index) or 0x71 (data).
    pub fn read(&mut self, port: u16) -> u8 {
        if port == 0x70 {
            return self.index;
        }
        let now = Instant::now();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.read_at(now, seconds)
    }

    /// The register that is selected, at this moment, which is this Unix time.
    fn read_at(&mut self, now: Instant, seconds: u64) -> u8 {
        if self.index == REGISTER_STATUS_A {
            self.looked = Some((now, seconds));
        }
        let seconds = match self.looked {
            Some((since, then)) if now.saturating_duration_since(since) < TOGETHER => then,
            _ => seconds,
        };
        let time = CivilTime::from_unix(seconds);
        match self.index {
            0x00 => bcd(time.second),
            0x02 => bcd(time.minute),
            0x04 => bcd(time.hour),
            0x06 => time.weekday,
            0x07 => bcd(time.day),
            0x08 => bcd(time.month),
            0x09 => bcd((time.year % 100) as u8),
            REGISTER_CENTURY => bcd((time.year / 100) as u8),
            REGISTER_STATUS_A => STATUS_A,
            0x0b => STATUS_B,
            0x0c => 0,
            0x0d => STATUS_D,
            index => self.memory[usize::from(index) % MEMORY_BYTES],
        }
    }

    /// Writes port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == 0x70 {
            // Bit 7 masks NMIs on a PC; there are none.
            self.index = value & 0x7f;
        } else if self.index > 0x0d {
            self.memory[usize::from(self.index) % MEMORY_BYTES] = value;
        }
    }

    pub fn save(&self) -> CmosState {
        CmosState { index: self.index, memory: self.memory.to_vec() }
    }

    /// Takes on a saved state; memory beyond the chip's is cut.
    pub fn restore(&mut self, state: &CmosState) {
        self.index = state.index & 0x7f;
        for (to, from) in self.memory.iter_mut().zip(&state.memory) {
            *to = *from;
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// Proleptic Gregorian date and time, UTC.
struct CivilTime {
    year: u64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

impl CivilTime {
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        // Count years from March, so that the leap day is a year's last: day of era, year of era, day of year.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        CivilTime {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            hour: (rest / 3_600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            // 1970-01-01 was a Thursday.
            weekday: ((days + 4) % 7) as u8 + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else a clock that is read while a minute ends is a minute wrong.
    #[test]
    fn registers_that_are_read_together_are_of_one_moment() {
        let mut cmos = Cmos::default();
        let begin = Instant::now();
        let mut read = |register: u8, ms: u64, seconds: u64| {
            cmos.write(0x70, register);
            cmos.read_at(begin + Duration::from_millis(ms), seconds)
        };
        assert_eq!(read(0x00, 0, 3599), 0x59);
        assert_eq!(read(REGISTER_STATUS_A, 1, 3599), STATUS_A);
        assert_eq!(read(0x00, 2, 3600), 0x59);
        assert_eq!((read(0x02, 3, 3600), read(0x04, 4, 3600)), (0x59, 0x00));
        assert_eq!((read(0x02, 30, 3600), read(0x04, 31, 3600)), (0x00, 0x01));
    }

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, (1970, 1, 1, 0, 0, 0, 5)),
            (951_827_696, (2000, 2, 29, 12, 34, 56, 3)),
            (1_795_305_600, (2026, 11, 22, 0, 0, 0, 1)),
            (4_107_542_399, (2100, 2, 28, 23, 59, 59, 1)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0, 2)),
        ] {
            let t = CivilTime::from_unix(seconds);
            assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday), expected);
        }
    }

    #[test]
    fn the_clock_reads_as_bcd_and_keeps_its_memory() {
        let mut cmos = Cmos::default();
        cmos.write(0x70, 0x09);
        let year = cmos.read(0x71);
        assert!(year & 0x0f < 10 && year >> 4 < 10);
        cmos.write(0x70, 0x40);
        cmos.write(0x71, 0x5a);
        let mut other = Cmos::default();
        other.restore(&cmos.save());
        assert_eq!(other.read(0x71), 0x5a);
    }
}
