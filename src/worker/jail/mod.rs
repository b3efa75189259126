//! The jail: what a worker gives up before it sees a byte of a guest.
//!
//! In two steps, because a worker must be made in a millisecond. What is the same for all is done once, in the zygote ([`Jailer::new`]): namespaces, an empty
//! root, limits, the bounding set, the long seccomp filter; a fork has it all by its birth. What must be each worker's own is done by itself, in some
//! ten system calls ([`Jailer::close`]): a uid, the last capabilities, Landlock, what is left of the filters. A worker that is started by itself does
//! both steps, and shares the daemon's pid namespace.
//!
//! | module | what it holds |
//! |---|---|
//! | [`spaces`] | namespaces, and the process that holds a pid namespace |
//! | [`privileges`] | uid, capabilities, limits |
//! | [`filter`], [`ioctls`] | the seccomp filters |
//! | [`violation`], [`names`] | what is said when one of them catches a call |
//! | [`attempts`] | a worker that tries what is forbidden, for the trials |
//!
//! A layer that this host or user does not allow is left off, and reported with the reason ([`Jail`]); whether that will do is the daemon's to
//! say ([`JailMode`]).

pub mod attempts;
mod filter;
mod ioctls;
mod names;
mod privileges;
mod spaces;
mod violation;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreated, RulesetStatus, Scope,
};
use rustix::fs::{Mode, OFlags, openat};
use rustix::thread::CapabilitySet;
use seccompiler::BpfProgram;

use super::protocol::{Jail, JailMode, Layer};
use crate::vmm::threads::{self, Role};

/// How it is to be.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    pub mode: JailMode,
    /// Left off, to see what the others hold by themselves: for trials.
    pub without: Vec<Layer>,
}

/// What a worker reaches of the host until its jail is closed.
pub struct Outside {
    proc: Option<OwnedFd>,
    dev: Option<OwnedFd>,
}

impl Outside {
    pub fn open() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = |path: &str| rustix::fs::open(path, flags, Mode::empty()).ok();
        Self { proc: folder("/proc"), dev: folder("/dev") }
    }

    /// A device, for reading and writing.
    pub fn device(&self, name: &str) -> io::Result<File> {
        Self::file(self.dev.as_ref(), "/dev", name, OFlags::RDWR)
    }

    /// What the kernel says of this process.
    pub fn own(&self, name: &str) -> io::Result<File> {
        Self::file(self.proc.as_ref(), "/proc", &format!("self/{name}"), OFlags::RDONLY)
    }

    fn file(folder: Option<&OwnedFd>, path: &str, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC;
        let fd = match folder {
            Some(folder) => openat(folder, name, flags, Mode::empty()),
            None => rustix::fs::open(format!("{path}/{name}"), flags, Mode::empty()),
        };
        Ok(File::from(fd?))
    }

    /// The number of this process where the daemon is, which is not the one that it has in a namespace of its own.
    pub fn pid(&self) -> Option<u32> {
        let link = rustix::fs::readlinkat(self.proc.as_ref()?, "self", Vec::new()).ok()?;
        link.to_str().ok()?.parse().ok()
    }
}

/// What is there to close the jail of a worker, or of many, each a fork of this process.
pub struct Jailer {
    wish: Wish,
    jail: Jail,
    outside: Outside,
    ruleset: Option<RulesetCreated>,
    /// What is left to be put on of the filters.
    own: Option<BpfProgram>,
    /// The workers' pid namespace lasts as long as somebody has this open.
    alive: Option<OwnedFd>,
}

/// What threads give up, by their roles.
static THREADS: OnceLock<[(Role, BpfProgram); 3]> = OnceLock::new();

impl Jailer {
    /// Does what is the same for all workers. `many`: they will be forks of this process. It has one thread only.
    ///
    /// `userfault_call`: a worker will have to ask for a userfaultfd by the system call, which takes a capability.
    pub fn new(wish: Wish, outside: Outside, many: bool, userfault_call: bool) -> Self {
        let mut jailer = Self { wish, jail: Jail::default(), outside, ruleset: None, own: None, alive: None };
        if jailer.wish.mode == JailMode::Off {
            jailer.jail.missing.extend(Layer::ALL.map(|layer| (layer, "switched off".to_owned())));
            return jailer;
        }
        // Before /proc is out of reach.
        let users = privileges::may_choose_users();
        jailer.namespaces(many, &users);
        jailer.put_on(Layer::Limits, |_| privileges::limit());
        jailer.put_on(Layer::User, |_| users);
        let own_users = jailer.jail.active.contains(&Layer::User);
        jailer.put_on(Layer::Capabilities, |_| {
            let mut kept = CapabilitySet::empty();
            if own_users {
                privileges::leave_groups()?;
                kept |= CapabilitySet::SETUID | CapabilitySet::SETGID;
            }
            if userfault_call {
                kept |= CapabilitySet::SYS_PTRACE;
            }
            privileges::reduce(kept)
        });
        jailer.put_on(Layer::Landlock, |jailer| {
            jailer.ruleset = Some(ruleset()?);
            Ok(())
        });
        // Last: it forbids most of the above.
        jailer.put_on(Layer::SystemCalls, |jailer| {
            jailer.own = Some(filters()?);
            Ok(())
        });
        jailer
    }

    fn namespaces(&mut self, many: bool, users: &Result<(), String>) {
        let wanted = |layer: &Layer| !self.wish.without.contains(layer);
        let any = [Layer::Mounts, Layer::Network, Layer::Ipc, Layer::HostName, Layer::Processes];
        let begun = match any.iter().any(wanted) {
            true => spaces::begin(),
            false => Ok(()),
        };
        let begun = &begun;
        self.put_on(Layer::Network, |_| begun.clone().and_then(|()| spaces::network()));
        self.put_on(Layer::Ipc, |_| begun.clone().and_then(|()| spaces::ipc()));
        self.put_on(Layer::HostName, |_| begun.clone().and_then(|()| spaces::host_name()));
        self.put_on(Layer::Mounts, |_| begun.clone().and_then(|()| spaces::empty_root()));
        let own_user = users.is_ok() && !self.wish.without.contains(&Layer::User);
        self.put_on(Layer::Processes, |jailer| {
            if !many {
                return Err("this worker was started by itself".to_owned());
            }
            begun.clone()?;
            jailer.alive = Some(spaces::processes(&jailer.outside, own_user)?);
            Ok(())
        });
    }

    /// Does what is each worker's own. Nothing is to be opened any more.
    pub fn close(mut self) -> Jail {
        if self.wish.mode == JailMode::Off {
            return self.jail;
        }
        let pid = self.outside.pid();
        self.outside = Outside { proc: None, dev: None };
        self.again(Layer::Limits, |jailer| match jailer.jail.active.contains(&Layer::User) {
            true => privileges::limit_threads(),
            // It would count what else this user runs.
            false => Ok(()),
        });
        self.again(Layer::Landlock, |jailer| match jailer.ruleset.take() {
            Some(ruleset) => restrict(ruleset),
            None => Ok(()),
        });
        self.again(Layer::User, |_| privileges::become_nobody_else(pid));
        self.again(Layer::Capabilities, |_| privileges::reduce(CapabilitySet::empty()));
        self.put_on(Layer::Undumpable, |_| privileges::undumpable());
        self.again(Layer::SystemCalls, |jailer| {
            let mut own = jailer.own.take().ok_or("there is no filter")?;
            if !filter::of_process(&mut own, std::process::id()) {
                return Err("the filter has no place for the process's number".to_owned());
            }
            seccompiler::apply_filter(&own).map_err(|error| error.to_string())
        });
        // To be closed by the kernel when this process ends.
        std::mem::forget(self.alive.take());
        self.jail
    }

    fn put_on(&mut self, layer: Layer, put: impl FnOnce(&mut Self) -> Result<(), String>) {
        if self.wish.without.contains(&layer) {
            return self.jail.missing.push((layer, "left off".to_owned()));
        }
        match put(self) {
            Ok(()) => self.jail.active.push(layer),
            Err(why) => self.jail.missing.push((layer, why)),
        }
    }

    /// The second half of a layer of which the first half is on.
    fn again(&mut self, layer: Layer, put: impl FnOnce(&mut Self) -> Result<(), String>) {
        if !self.jail.active.contains(&layer) {
            return;
        }
        if let Err(why) = put(self) {
            self.jail.active.retain(|active| *active != layer);
            self.jail.missing.push((layer, why));
        }
    }
}

impl std::ops::Deref for Jailer {
    type Target = Outside;

    fn deref(&self) -> &Outside {
        &self.outside
    }
}

/// Puts the long filter on, has those of threads ready, and gives what each worker puts on.
fn filters() -> Result<BpfProgram, String> {
    let text = |error: seccompiler::BackendError| error.to_string();
    let of = |role| filter::of_thread(role).map(|program| (role, program)).map_err(text);
    let of_threads = [of(Role::Vcpu)?, of(Role::Devices)?, of(Role::Disk)?];
    let shared = filter::shared().map_err(text)?;
    let own = filter::own().map_err(text)?;
    violation::install().map_err(|error| format!("SIGSYS: {error}"))?;
    seccompiler::apply_filter(&shared).map_err(|error| error.to_string())?;
    let _ = THREADS.set(of_threads);
    threads::at_start(confine);
    Ok(own)
}

/// The first thing that a thread does.
fn confine(role: Role) {
    violation::is(role);
    let programs = THREADS.get().into_iter().flatten();
    for (_, program) in programs.filter(|(of, _)| *of == role) {
        if let Err(error) = seccompiler::apply_filter(program) {
            // A guest is not to be run by a thread that may do more than it should.
            let _ = writeln!(io::stderr(), "a thread cannot be confined: {error}");
            std::process::exit(1);
        }
    }
}

/// Nothing of what Landlock knows is allowed. Rights of descriptors that are open stay as they are.
fn ruleset() -> Result<RulesetCreated, String> {
    let made = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V5)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create);
    made.map_err(|error| error.to_string())
}

fn restrict(ruleset: RulesetCreated) -> Result<(), String> {
    match ruleset.restrict_self() {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            Err("this kernel has no Landlock, or it is not switched on (lsm=)".to_owned())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}
