//! What a pool is to be, and the file in which that outlives the service.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fleet::cgroup::Limits;
use crate::fleet::clones::{CloneVm, FirstCall};
use crate::fleet::error::FleetError;
use crate::fleet::network::{self, CanBeTold, NetworkError, VmNetwork};
use crate::fleet::slots::access::Access;
use crate::fleet::slots::error::SlotError;
use crate::worker::protocol::MemoryMode;

/// Most pools.
pub const POOLS_MAX: usize = 64;
/// Most that one pool keeps ready.
pub const READY_MAX: u32 = 256;
/// Longest time for which one that is ready beyond the promised number is kept.
pub const IDLE_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// What a pool without a wish gets.
pub const IDLE_TTL_DEFAULT: Duration = Duration::from_secs(60);
/// Version of the file.
const FORMAT: u32 = 1;

/// How far what stands ready has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A worker that is the clone already, but its guest has not run. Takes no CPU and the least memory; what the guest does after
    /// its start (take its identity) is still to come.
    Shell,
    /// A clone that has run, confirmed its identity, and was paused. It is told the time again when it is taken.
    Paused,
    /// A clone that runs.
    Running,
}

/// What a pool is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The snapshot's id.
    pub snapshot: String,
    pub mode: Mode,
    /// Kept ready, whatever is asked for.
    pub min_ready: u32,
    /// Most at once, those that were taken and live still among them.
    pub max: u32,
    /// One that is ready beyond what is needed now is ended after this time.
    pub idle_ttl: Duration,
    pub memory_mode: MemoryMode,
    /// Give each its own identity through the agent.
    pub managed: bool,
    /// Of each VM.
    pub limits: Limits,
    /// What each guest's interfaces are plugged into, from the first: slots with this access, or nothing.
    pub slots: Vec<Option<Access>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            snapshot: String::new(),
            mode: Mode::Shell,
            min_ready: 1,
            max: 64,
            idle_ttl: IDLE_TTL_DEFAULT,
            memory_mode: MemoryMode::Mapped,
            managed: true,
            limits: Limits::default(),
            slots: Vec::new(),
        }
    }
}

impl Settings {
    /// One clone, as these want it.
    pub fn clone_request(&self, first_call: Option<FirstCall>) -> CloneVm {
        CloneVm {
            snapshot: self.snapshot.clone(),
            count: 1,
            memory_mode: self.memory_mode,
            managed: self.managed,
            name: None,
            networks: network::requests(&self.slots),
            limits: self.limits,
            first_call,
        }
    }

    /// The interfaces of each VM, whose snapshot's guest has these.
    pub fn plan_networks(&self, has: &[VmNetwork]) -> Result<Vec<VmNetwork>, FleetError> {
        // They keep what their snapshot has, so nobody has to be told.
        let nothing = CanBeTold { macs: false, addresses: false };
        Ok(network::plan_clones(&network::requests(&self.slots), has, 1, nothing)?)
    }

    /// What each VM's network slot opens, if it has one.
    pub fn access(&self) -> Option<&Access> {
        self.slots.iter().flatten().next()
    }

    /// Refuses what cannot be kept.
    pub fn check(&self, vms_max: usize) -> Result<(), FleetError> {
        let refuse = |text: String| Err(FleetError::Invalid(text));
        self.limits.check()?;
        network::check_links(&network::requests(&self.slots))?;
        if self.access().is_some_and(|access| !access.publish.is_empty()) {
            return Err(NetworkError::from(SlotError::PublishedByPool).into());
        }
        let vms_max = u32::try_from(vms_max).unwrap_or(u32::MAX);
        if self.max == 0 || self.max > vms_max {
            return refuse(format!("a pool of at most {} VMs; this service allows 1 to {vms_max}", self.max));
        }
        if self.min_ready > self.max.min(READY_MAX) {
            return refuse(format!(
                "{} ready of at most {}; let min_ready be at most max, and at most {READY_MAX}",
                self.min_ready, self.max
            ));
        }
        if self.idle_ttl > IDLE_TTL_MAX {
            return refuse(format!(
                "an idle_ttl of {} s; the most is {}",
                self.idle_ttl.as_secs(),
                IDLE_TTL_MAX.as_secs()
            ));
        }
        if self.mode == Mode::Shell && self.memory_mode == MemoryMode::Userfault {
            return refuse("a pool of mode SHELL has its memory mapped; take PAUSED or RUNNING for memory mode USERFAULT".into());
        }
        Ok(())
    }
}

/// A pool's file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    format: u32,
    snapshot: String,
    mode: Mode,
    min_ready: u32,
    max: u32,
    idle_ttl_ms: u64,
    userfault: bool,
    managed: bool,
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    limits: Limits,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    slots: Vec<Option<Access>>,
}

impl Stored {
    pub fn new(settings: &Settings) -> Self {
        Self {
            format: FORMAT,
            snapshot: settings.snapshot.clone(),
            mode: settings.mode,
            min_ready: settings.min_ready,
            max: settings.max,
            idle_ttl_ms: u64::try_from(settings.idle_ttl.as_millis()).unwrap_or(u64::MAX),
            userfault: settings.memory_mode == MemoryMode::Userfault,
            managed: settings.managed,
            limits: settings.limits,
            slots: settings.slots.clone(),
        }
    }

    /// Refuses what this program would not have written.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {}; this program knows {FORMAT}", self.format));
        }
        self.settings().check(usize::MAX).map_err(|error| error.to_string())
    }

    pub fn settings(&self) -> Settings {
        Settings {
            snapshot: self.snapshot.clone(),
            mode: self.mode,
            min_ready: self.min_ready,
            max: self.max,
            idle_ttl: Duration::from_millis(self.idle_ttl_ms),
            memory_mode: if self.userfault { MemoryMode::Userfault } else { MemoryMode::Mapped },
            managed: self.managed,
            limits: self.limits,
            slots: self.slots.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::network::NETWORKS_MAX;
    use crate::fleet::slots::access::{Allow, Outbound, Publish, Transport};

    fn settings() -> Settings {
        Settings {
            snapshot: "snap-0123456789ab".into(),
            mode: Mode::Paused,
            min_ready: 2,
            max: 8,
            idle_ttl: Duration::from_millis(1500),
            memory_mode: MemoryMode::Userfault,
            managed: true,
            limits: Limits { memory_bytes: Some(64 << 20), ..Limits::default() },
            slots: vec![None, Some(access())],
        }
    }

    fn access() -> Access {
        let allow =
            |network: &str| Allow { network: network.parse().unwrap(), port: Some(53), transport: None };
        Access { outbound: Outbound::Nothing, allow: vec![allow("192.0.2.0/24")], publish: Vec::new() }
    }

    #[test]
    fn a_file_says_what_the_pool_is_to_be_and_what_it_cannot_be_is_refused() {
        let text = serde_json::to_string(&Stored::new(&settings())).unwrap();
        let read = |text: &str| serde_json::from_str::<Stored>(text).map_err(|error| error.to_string());
        let stored = read(&text).unwrap();
        stored.check().unwrap();
        assert_eq!(stored.settings(), settings());
        for (good, wrong) in [
            ("\"format\":1", "\"format\":2"),
            ("\"min_ready\":2", "\"min_ready\":9"),
            ("\"idle_ttl_ms\":1500", "\"idle_ttl_ms\":18446744073709551615"),
            ("\"paused\"", "\"sleeping\""),
            ("\"managed\"", "\"managd\""),
        ] {
            assert!(text.contains(good), "{text}");
            assert!(read(&text.replace(good, wrong)).and_then(|stored| stored.check()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_of_before_there_were_slots_is_read() {
        let old = r#"{"format":1,"snapshot":"snap-0123456789ab","mode":"shell","min_ready":1,"max":8,
                      "idle_ttl_ms":60000,"userfault":false,"managed":true}"#;
        let stored: Stored = serde_json::from_str(old).unwrap();
        stored.check().unwrap();
        assert_eq!(stored.settings().slots, []);
        // What an older program could not have read is only there where it is needed.
        assert!(!serde_json::to_string(&stored).unwrap().contains("slots"));
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        settings().check(8).unwrap();
        let port = Publish { host: 80, guest: 80, transport: Transport::Tcp };
        let published = Access { publish: vec![port], ..access() };
        for wrong in [
            Settings { max: 0, min_ready: 0, ..settings() },
            Settings { max: 9, ..settings() },
            Settings { min_ready: 9, ..settings() },
            Settings { idle_ttl: IDLE_TTL_MAX + Duration::from_secs(1), ..settings() },
            Settings { mode: Mode::Shell, ..settings() },
            Settings { slots: vec![Some(access()); 2], ..settings() },
            Settings { slots: vec![None; NETWORKS_MAX + 1], ..settings() },
            Settings { slots: vec![Some(published)], ..settings() },
        ] {
            assert!(wrong.check(8).is_err(), "{wrong:?}");
        }
        let many = Settings { max: 1000, min_ready: READY_MAX + 1, ..settings() };
        assert!(many.check(1000).is_err());
    }
}
