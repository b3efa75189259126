//! Options that limit what a VM may take of its host.

use clap::Args;

use super::units;
use crate::api::proto;

#[derive(Debug, Clone, Copy, Args)]
pub struct LimitArguments {
    /// Most memory that only the VM has, as 64M: one that needs more is ended
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    memory_limit: Option<u64>,
    /// Most processor time, in CPUs, as 0.5 or 2
    #[arg(long, value_name = "CPUS", value_parser = parse_cpus)]
    cpu_limit: Option<u32>,
    /// Most that each disk may read and write in a second, as 50M
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    disk_rate: Option<u64>,
    /// Most requests of each disk in a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    disk_iops: Option<u32>,
    /// Most that each network interface may send in a second, and receive, as 10M
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    net_rate: Option<u64>,
    /// Most frames of each network interface in a second, each way
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    net_pps: Option<u32>,
}

impl LimitArguments {
    /// `None`: none was given.
    pub fn limits(self) -> Option<proto::ResourceLimits> {
        let limits = proto::ResourceLimits {
            memory_bytes: self.memory_limit.unwrap_or(0),
            cpu_millis: self.cpu_limit.unwrap_or(0),
            disk_bytes_per_second: self.disk_rate.unwrap_or(0),
            disk_operations_per_second: self.disk_iops.unwrap_or(0),
            network_bytes_per_second: self.net_rate.unwrap_or(0),
            network_frames_per_second: self.net_pps.unwrap_or(0),
        };
        (limits != proto::ResourceLimits::default()).then_some(limits)
    }
}

/// CPUs to thousandths.
fn parse_cpus(text: &str) -> Result<u32, String> {
    let cpus: Option<f64> = text.parse().ok().filter(|cpus| (0.01..=1024.0).contains(cpus));
    // At most 1024000.
    cpus.map(|cpus| (cpus * 1000.0).round() as u32)
        .ok_or_else(|| format!("{text:?} is no number of CPUs: give 0.01 to 1024"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read() {
        assert_eq!((parse_cpus("0.5"), parse_cpus("2"), parse_cpus("0.01")), (Ok(500), Ok(2000), Ok(10)));
        for wrong in ["", "0", "-1", "x", "NaN", "inf", "1025", "0.001"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
    }
}
