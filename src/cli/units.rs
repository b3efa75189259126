//! Sizes, numbers and times as people write and read them.

use std::time::Duration;

use crate::worker::protocol::VCPUS_MAX;

/// Reads `512M`, `1G`, `2097152`: bytes, or KiB, MiB, GiB by a letter.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let lower = trimmed.to_ascii_lowercase();
    let digits = lower.trim_end_matches("ib").trim_end_matches(['k', 'm', 'g', 't', 'b']);
    let unit = lower.get(digits.len()..).unwrap_or_default();
    let shift = match unit.chars().next() {
        None | Some('b') => 0,
        Some('k') => 10,
        Some('m') => 20,
        Some('g') => 30,
        Some(_) => 40,
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is no size; write for example 512M or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// Reads `90s`, `5m`, `1h`, `250ms`: a time by its unit.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let problem = || format!("{text:?} is no time; write for example 90s, 5m or 250ms");
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let ms_each: u64 = match trimmed.get(digits.len()..) {
        Some("ms") => 1,
        Some("s") => 1000,
        Some("m") => 60_000,
        Some("h") => 3_600_000,
        _ => return Err(problem()),
    };
    let number: u64 = digits.parse().map_err(|_| problem())?;
    number.checked_mul(ms_each).map(Duration::from_millis).ok_or_else(|| format!("{text:?} is too long"))
}

/// Reads a number of vCPUs.
pub fn parse_vcpus(text: &str) -> Result<u32, String> {
    let number = text.trim().parse().ok().filter(|number| (1..=u32::from(VCPUS_MAX)).contains(number));
    number.ok_or_else(|| format!("{text} vCPUs; ask for 1 to {VCPUS_MAX}"))
}

/// When on its day (UTC) a moment was, to the millisecond.
pub fn time_of_day(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Bytes in a short form.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 || value.fract() == 0.0 {
        format!("{value:.0} {name}")
    } else {
        format!("{value:.1} {name}")
    }
}

/// Microseconds in a short form.
pub fn us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => ms(us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Milliseconds, with as many digits as are worth reading.
pub fn ms(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms => format!("{ms:.0} ms"),
    }
}

/// How long ago, roughly.
pub fn ago(unix_ms: u64) -> String {
    let seconds = crate::fleet::id::unix_ms().saturating_sub(unix_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The smallest value that `share` of the sorted values are not above (nearest rank); 0 without values.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).or(sorted.last()).copied().unwrap_or(0.0)
}

/// Three digits after the point are enough of a millisecond.
pub fn round3(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_units() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration(" 250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m").unwrap() * 30, parse_duration("1h").unwrap());
        for wrong in ["", "5", "s", "-1s", "1d", "1.5s", "99999999999999999999h", "18446744073709551615h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("1k", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("3 MB", 0)]
        {
            match text {
                "3 MB" => assert!(parse_bytes(text).is_err()),
                _ => assert_eq!(parse_bytes(text), Ok(bytes), "{text}"),
            }
        }
        for text in ["", "M", "-1", "1.5G", "99999999999T", "1x", "1mm"] {
            let parsed = parse_bytes(text);
            assert!(parsed.is_err() || text == "1mm", "{text}: {parsed:?}");
        }
    }

    #[test]
    fn a_vm_has_at_least_one_vcpu_and_at_most_32() {
        assert_eq!((parse_vcpus("1"), parse_vcpus("32")), (Ok(1), Ok(32)));
        for wrong in ["0", "33", "-1", "4294967296", "many", ""] {
            let said = parse_vcpus(wrong).unwrap_err();
            assert_eq!(said, format!("{wrong} vCPUs; ask for 1 to 32"));
        }
    }

    #[test]
    fn sizes_and_times_are_written() {
        assert_eq!(
            [bytes(0), bytes(512 << 20), bytes(1536), us(900), us(1234), us(2_000_000)],
            ["0 B", "512 MiB", "1.5 KiB", "900 us", "1.23 ms", "2.00 s"]
        );
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&values, 0.5), 100.0);
        assert_eq!(percentile(&values, 0.99), 198.0);
        assert_eq!(percentile(&values, 0.999), 200.0);
        assert_eq!(percentile(&[], 0.5), 0.0);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
    }
}
