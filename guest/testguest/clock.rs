//! Wall clock: CMOS at boot or what IDENTITY told, carried on by the guest's TSC.

use crate::gate;
use crate::serial::{in8, out8};

pub(crate) struct Clock {
    tsc_khz: u32,
    /// Wall clock, Unix nanoseconds, when the TSC was `base_tsc`.
    base_ns: u64,
    base_tsc: u64,
}

impl Clock {
    pub(crate) fn new(tsc_khz: u32) -> Clock {
        Clock { tsc_khz, base_ns: cmos_unix_s().wrapping_mul(1_000_000_000), base_tsc: gate::tsc() }
    }

    pub(crate) fn set(&mut self, wall_ns: u64) {
        self.base_ns = wall_ns;
        self.base_tsc = gate::tsc();
    }

    pub(crate) fn wall_ns(&self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.base_tsc);
        let khz = u64::from(self.tsc_khz).max(1);
        // In two steps, so that nothing overflows: whole milliseconds, then the rest.
        let ns = (ticks / khz).wrapping_mul(1_000_000).wrapping_add(ticks % khz * 1_000_000 / khz);
        self.base_ns.wrapping_add(ns)
    }
}

/// Reads of one consistent time are tried so often.
const TRIES_MAX: u32 = 1000;

/// The CMOS clock in Unix seconds.
pub(crate) fn cmos_unix_s() -> u64 {
    let mut last = [0; 7];
    for _ in 0..TRIES_MAX {
        // Register A bit 7: an update is under way.
        if register(0xa) & 0x80 != 0 {
            continue;
        }
        let now = [0, 2, 4, 7, 8, 9, 0x32].map(register);
        if now == last {
            break;
        }
        last = now;
    }
    let status = register(0xb);
    let decimal = |value: u8| if status & 4 != 0 { value } else { (value >> 4) * 10 + (value & 15) };
    let [second, minute, raw_hour, day, month, year, century] = last;
    let mut hour = decimal(raw_hour & 0x7f);
    if status & 2 == 0 {
        hour = hour % 12 + if raw_hour & 0x80 != 0 { 12 } else { 0 };
    }
    let century = match decimal(century) {
        known @ 19..=22 => i64::from(known),
        _ => 20,
    };
    let days =
        days_since_1970(century * 100 + i64::from(decimal(year)), decimal(month).into(), decimal(day).into());
    let seconds =
        days * 86400 + i64::from(hour) * 3600 + i64::from(decimal(minute)) * 60 + i64::from(decimal(second));
    seconds.max(0) as u64
}

fn register(index: u8) -> u8 {
    out8(0x70, index);
    in8(0x71)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    // The year begins in March, so that the leap day is its last.
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468
}
