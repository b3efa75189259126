//! What a shell does for clones of one snapshot before it is asked for one.
//!
//! [`Places`]: the snapshot's state is read, address space for its memory reserved, and the VM made with its memory slots, vCPUs and
//! interrupt routes; nothing of it differs between two clones. [`Ahead::Seat`]: the clone itself, with disks of its own, all but the
//! moment in which its clocks go on.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;

use userfaultfd::Uffd;

use super::fault;
use super::keep::DiskFiles;
use super::protocol::{Fault, FaultRegion};
use crate::snapshot::memory::mapped::{MapError, Mapping};
use crate::snapshot::state::file::StateFile;
use crate::snapshot::state::machine::{MachineState, RegionState};
use crate::vmm::machine::Prepared;
use crate::vmm::memory;
use crate::vmm::shell::{EmptyVm, Slotted};

/// Largest state file that is read.
const STATE_BYTES_MAX: u64 = 16 << 20;

/// What a shell has done ahead.
pub enum Ahead {
    Places(Places),
    Seat(Box<Seat>),
}

/// A clone that stands, and has not run yet.
pub struct Seat {
    pub machine: Prepared,
    /// The memory file.
    pub parent: File,
    /// If it is not mapped; and the ranges that it is for.
    pub uffd: Option<(Uffd, Vec<FaultRegion>)>,
    /// What the disks are made of.
    pub files: Vec<DiskFiles>,
}

/// A VM with its memory slots, on address space that is only reserved.
pub struct Ground {
    // In the order in which they must go.
    pub vm: Slotted,
    pub memory: Vec<(RegionState, Mapping)>,
    pub state: StateFile,
}

impl Ground {
    pub fn new(vm: EmptyVm, state: StateFile) -> Result<Self, Fault> {
        let machine: MachineState = state.get(0)?;
        // The sum of what a file says is checked before any of it is reserved.
        memory::check(&machine.memory)?;
        let reserve = |region: &RegionState| Ok((*region, Mapping::reserve(region.bytes)?));
        let memory = machine.memory.iter().map(reserve).collect::<Result<Vec<_>, MapError>>()?;
        let places = memory.iter().map(|(region, mapping)| (*region, mapping.address())).collect();
        let vm = vm.with_slots(places)?;
        Ok(Ground { vm, memory, state })
    }
}

/// The ground for clones of one snapshot.
pub struct Places {
    pub ground: Ground,
    /// Kept open, so that no other file can come to have its numbers.
    file: File,
}

impl Places {
    /// What can be done for any clone of the snapshot with this state file.
    pub fn of(vm: EmptyVm, file: File) -> Result<Self, Fault> {
        let mut ground = Ground::new(vm, read_state(&file)?)?;
        ground.vm.expect(&ground.state)?;
        Ok(Places { ground, file })
    }

    /// Whether this is the state file that was expected. (Those are never changed once they are published.)
    pub fn is_of(&self, state: &File) -> bool {
        let numbers = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
        numbers(state).is_some_and(|given| numbers(&self.file) == Some(given))
    }
}

/// Ends a VM that was made for nothing, not in the way of the one that is wanted.
pub fn forget(ahead: Option<Ahead>) {
    if let Some(ahead) = ahead {
        // Where no thread can be had, it ends when the closure is dropped: here.
        let _ = thread::Builder::new().name("forget".into()).spawn(move || drop(ahead));
    }
}

/// A snapshot's state.
pub fn read_state(file: &File) -> Result<StateFile, Fault> {
    let mut bytes = Vec::new();
    // The descriptor is shared with other clones' workers, and with it its position: read by offset.
    let length = file.metadata().map_err(fault::io("the state file"))?.len().min(STATE_BYTES_MAX);
    bytes.resize(usize::try_from(length).unwrap_or(0), 0);
    file.read_exact_at(&mut bytes, 0).map_err(fault::io("the state file"))?;
    Ok(StateFile::from_bytes(&bytes)?)
}
