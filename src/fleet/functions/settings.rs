//! What a function is, its limits, and its file.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::agent::streams::{Opening, What};
use crate::fleet::cgroup::Limits;
use crate::fleet::error::FleetError;
use crate::fleet::pools::settings as pool;
use crate::fleet::pools::settings::Mode;
use crate::fleet::slots::access::Access;
use crate::worker::protocol::MemoryMode;

/// Most functions.
pub const FUNCTIONS_MAX: usize = 256;
/// Most invocations of one function at a time, and that wait for their turn.
pub const CONCURRENCY_MAX: u32 = 1024;
pub const QUEUE_MAX: u32 = 4096;
/// How long a handler may take.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// How long an invocation may wait for its turn, beyond which it is refused.
pub const QUEUE_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
pub const QUEUE_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// Most invocations in one VM.
pub const REUSE_MAX: u32 = 1_000_000;
/// How long a prepare command may take.
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Version of the file.
const FORMAT: u32 = 1;

/// A command line in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    pub arguments: Vec<String>,
    /// Added to the agent's own.
    pub environment: Vec<(String, String)>,
    /// Empty: the user's home, or `/`.
    pub folder: String,
    /// Empty: the agent's own.
    pub user: String,
}

impl Command {
    /// What the agent is told, with further variables.
    pub fn what(&self, environment: &[(String, String)]) -> What {
        let pairs = self.environment.iter().chain(environment);
        What::Exec {
            arguments: self.arguments.iter().map(|word| word.clone().into_bytes()).collect(),
            environment: pairs.map(|(name, value)| (name.clone().into(), value.clone().into())).collect(),
            folder: self.folder.clone().into_bytes(),
            user: self.user.clone().into_bytes(),
        }
    }

    fn check(&self) -> Result<(), FleetError> {
        let opening = Opening { session: 0, window: 0, what: self.what(&[]) };
        opening.check().map_err(|error| FleetError::Invalid(error.to_string()))
    }
}

/// What a function is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What is run for each invocation: the payload is its stdin, the answer what it writes to stdout.
    pub handler: Command,
    pub timeout: Duration,
    /// Most invocations at a time.
    pub concurrency: u32,
    /// Most that wait for their turn, and for how long.
    pub queue: u32,
    pub queue_timeout: Duration,
    /// Invocations in one VM, one after the other; 1: each has its own.
    pub invocations_per_vm: u32,
    /// VMs kept ready, whatever is asked for; 0: none while nothing is asked for.
    pub min_ready: u32,
    /// How long a VM that nothing asks for is kept.
    pub idle_ttl: Duration,
    pub mode: Mode,
    pub memory_mode: MemoryMode,
    /// Of each of its VMs.
    pub limits: Limits,
    /// What each guest's interfaces are plugged into, as in a pool.
    pub slots: Vec<Option<Access>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            handler: Command::default(),
            timeout: TIMEOUT_DEFAULT,
            concurrency: 16,
            queue: 64,
            queue_timeout: QUEUE_TIMEOUT_DEFAULT,
            invocations_per_vm: 1,
            min_ready: 0,
            idle_ttl: pool::IDLE_TTL_DEFAULT,
            mode: Mode::Shell,
            memory_mode: MemoryMode::Mapped,
            limits: Limits::default(),
            slots: Vec::new(),
        }
    }
}

impl Settings {
    /// Refuses what cannot be kept.
    pub fn check(&self) -> Result<(), FleetError> {
        let between =
            |what: &str, number: u128, least: u128, most: u128| match (least..=most).contains(&number) {
                true => Ok(()),
                false => Err(FleetError::Invalid(format!("{what} of {number}; ask for {least} to {most}"))),
            };
        self.handler.check()?;
        between("a timeout in ms", self.timeout.as_millis(), 1, TIMEOUT_MAX.as_millis())?;
        between("a concurrency", self.concurrency.into(), 1, CONCURRENCY_MAX.into())?;
        between("a queue", self.queue.into(), 0, QUEUE_MAX.into())?;
        between("a queue timeout in ms", self.queue_timeout.as_millis(), 0, QUEUE_TIMEOUT_MAX.as_millis())?;
        between("invocations per VM", self.invocations_per_vm.into(), 1, REUSE_MAX.into())?;
        between("min_ready", self.min_ready.into(), 0, self.concurrency.min(pool::READY_MAX).into())?;
        self.pool(String::new()).check(usize::MAX)
    }

    /// What its VMs are taken from. It may have more of them than run at a time: those that stand ready, and those that are
    /// about to end.
    pub fn pool(&self, snapshot: String) -> pool::Settings {
        pool::Settings {
            snapshot,
            mode: self.mode,
            min_ready: self.min_ready,
            max: self.concurrency.saturating_mul(2).saturating_add(self.min_ready),
            idle_ttl: self.idle_ttl,
            memory_mode: self.memory_mode,
            managed: true,
            limits: self.limits,
            slots: self.slots.clone(),
        }
    }
}

/// What a function is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Made {
    /// Id of the snapshot that its VMs are clones of.
    pub snapshot: String,
    /// That was made for it, and goes with it.
    pub own: bool,
    /// Where it came from, for people.
    pub from: String,
    /// Counts its deployments.
    pub revision: u64,
}

/// A function's file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    format: u32,
    pub made: Made,
    handler: Command,
    timeout_ms: u64,
    concurrency: u32,
    queue: u32,
    queue_timeout_ms: u64,
    invocations_per_vm: u32,
    min_ready: u32,
    idle_ttl_ms: u64,
    mode: Mode,
    userfault: bool,
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    limits: Limits,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    slots: Vec<Option<Access>>,
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Stored {
    pub fn new(made: &Made, settings: &Settings) -> Self {
        Self {
            format: FORMAT,
            made: made.clone(),
            handler: settings.handler.clone(),
            timeout_ms: ms(settings.timeout),
            concurrency: settings.concurrency,
            queue: settings.queue,
            queue_timeout_ms: ms(settings.queue_timeout),
            invocations_per_vm: settings.invocations_per_vm,
            min_ready: settings.min_ready,
            idle_ttl_ms: ms(settings.idle_ttl),
            mode: settings.mode,
            userfault: settings.memory_mode == MemoryMode::Userfault,
            limits: settings.limits,
            slots: settings.slots.clone(),
        }
    }

    /// Refuses what this program would not have written.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {}; this program knows {FORMAT}", self.format));
        }
        self.settings().check().map_err(|error| error.to_string())
    }

    pub fn settings(&self) -> Settings {
        Settings {
            handler: self.handler.clone(),
            timeout: Duration::from_millis(self.timeout_ms),
            concurrency: self.concurrency,
            queue: self.queue,
            queue_timeout: Duration::from_millis(self.queue_timeout_ms),
            invocations_per_vm: self.invocations_per_vm,
            min_ready: self.min_ready,
            idle_ttl: Duration::from_millis(self.idle_ttl_ms),
            mode: self.mode,
            memory_mode: if self.userfault { MemoryMode::Userfault } else { MemoryMode::Mapped },
            limits: self.limits,
            slots: self.slots.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let handler = Command {
            arguments: vec!["/bin/cat".into(), "-".into()],
            environment: vec![("A".into(), "b".into())],
            folder: "/tmp".into(),
            user: "www".into(),
        };
        Settings { handler, min_ready: 2, slots: vec![Some(Access::default())], ..Settings::default() }
    }

    #[test]
    fn a_file_says_what_the_function_is() {
        let made = Made { snapshot: "snap-1".into(), own: true, from: "image web".into(), revision: 3 };
        let text = serde_json::to_string(&Stored::new(&made, &settings())).unwrap();
        let stored: Stored = serde_json::from_str(&text).unwrap();
        stored.check().unwrap();
        assert_eq!((stored.settings(), &stored.made), (settings(), &made));
        let wrong: Stored = serde_json::from_str(&text.replace("\"format\":1", "\"format\":2")).unwrap();
        assert!(wrong.check().is_err());
        assert!(serde_json::from_str::<Stored>(&text.replace("\"queue\"", "\"line\"")).is_err());
        // Of before there were slots.
        let plain = Settings { slots: Vec::new(), ..settings() };
        let old = serde_json::to_string(&Stored::new(&made, &plain)).unwrap();
        assert!(!old.contains("slots"), "{old}");
        assert_eq!(serde_json::from_str::<Stored>(&old).unwrap().settings(), plain);
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        settings().check().unwrap();
        let second = Duration::from_secs(1);
        for wrong in [
            Settings { handler: Command::default(), ..settings() },
            Settings { timeout: TIMEOUT_MAX + second, ..settings() },
            Settings { timeout: Duration::ZERO, ..settings() },
            Settings { concurrency: 0, ..settings() },
            Settings { concurrency: 1, ..settings() },
            Settings { concurrency: CONCURRENCY_MAX + 1, ..settings() },
            Settings { queue: QUEUE_MAX + 1, ..settings() },
            Settings { queue_timeout: QUEUE_TIMEOUT_MAX + second, ..settings() },
            Settings { invocations_per_vm: 0, ..settings() },
            Settings { idle_ttl: pool::IDLE_TTL_MAX + second, ..settings() },
            Settings { memory_mode: MemoryMode::Userfault, ..settings() },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
        let nul = Command { arguments: vec!["a\0b".into()], ..settings().handler };
        assert!(Settings { handler: nul, ..settings() }.check().is_err());
    }
}
