//! Errors as the daemon is told them: the kind that becomes a status code, and the sentence.

use std::io;

use super::protocol::{Fault, FaultKind};
use crate::snapshot::cause::Cause;
use crate::snapshot::layers::LayerError;
use crate::snapshot::memory::image::ImageError;
use crate::snapshot::memory::mapped::MapError;
use crate::snapshot::state::file::StateError;
use crate::vmm::boot::BootError;
use crate::vmm::host::HostError;
use crate::vmm::machine::MachineError;
use crate::vmm::memory::MemoryError;
use crate::vmm::vcpu::VcpuError;
use crate::vmm::vcpu_state::VcpuStateError;
use crate::vmm::virtio::net::link::LinkError;

fn fault(kind: FaultKind, message: impl ToString) -> Fault {
    Fault { kind, message: message.to_string() }
}

/// Asked at the wrong time.
pub fn wrong_state(message: &str) -> Fault {
    fault(FaultKind::WrongState, message)
}

/// The request's descriptors are not what its message promises.
pub fn descriptors(message: &str) -> Fault {
    fault(FaultKind::Internal, format!("the request's descriptors: {message}"))
}

fn of_cause(cause: Cause) -> FaultKind {
    match cause {
        Cause::InvalidInput | Cause::NotFound | Cause::AlreadyExists | Cause::NotTrusted => {
            FaultKind::InvalidInput
        }
        Cause::Damaged => FaultKind::Damaged,
        Cause::Unsupported => FaultKind::Unsupported,
        Cause::Exhausted => FaultKind::Exhausted,
        Cause::WrongState => FaultKind::WrongState,
        Cause::Internal => FaultKind::Internal,
    }
}

/// A failed system call, with what was being done.
pub fn io(what: &str) -> impl FnOnce(io::Error) -> Fault {
    move |error| fault(of_cause(Cause::of_io(&error)), format!("{what}: {error}"))
}

impl From<MapError> for Fault {
    fn from(error: MapError) -> Self {
        fault(of_cause(error.cause()), error)
    }
}

impl From<ImageError> for Fault {
    fn from(error: ImageError) -> Self {
        fault(of_cause(error.cause()), error)
    }
}

impl From<MemoryError> for Fault {
    fn from(error: MemoryError) -> Self {
        fault(FaultKind::InvalidInput, error)
    }
}

impl From<HostError> for Fault {
    fn from(error: HostError) -> Self {
        fault(FaultKind::Unsupported, error)
    }
}

impl From<StateError> for Fault {
    fn from(error: StateError) -> Self {
        let kind = match error {
            StateError::Format { .. } | StateError::Version { .. } => FaultKind::Unsupported,
            _ => FaultKind::Damaged,
        };
        fault(kind, error)
    }
}

impl From<LayerError> for Fault {
    fn from(error: LayerError) -> Self {
        let kind = layers(&error);
        fault(kind, error)
    }
}

fn layers(error: &LayerError) -> FaultKind {
    match error {
        LayerError::DiskSize(_) | LayerError::BaseTooShort { .. } => FaultKind::InvalidInput,
        LayerError::Io { source, .. } => of_cause(Cause::of_io(source)),
        LayerError::TooManyLayers(_) => FaultKind::Exhausted,
        _ => FaultKind::Damaged,
    }
}

impl From<BootError> for Fault {
    fn from(error: BootError) -> Self {
        fault(FaultKind::InvalidInput, error)
    }
}

impl From<LinkError> for Fault {
    fn from(error: LinkError) -> Self {
        fault(FaultKind::Unsupported, error)
    }
}

impl From<MachineError> for Fault {
    fn from(error: MachineError) -> Self {
        let kind = match &error {
            MachineError::Vcpus(_)
            | MachineError::Disks(_)
            | MachineError::Networks(_)
            | MachineError::Links { .. }
            | MachineError::Memory(_)
            | MachineError::Boot(_) => FaultKind::InvalidInput,
            MachineError::NoPowerButton(_)
            | MachineError::Vcpu(VcpuError::State { source: VcpuStateError::Over, .. }) => {
                FaultKind::WrongState
            }
            MachineError::Mismatch(_) => FaultKind::Damaged,
            MachineError::State(StateError::Format { .. } | StateError::Version { .. }) => {
                FaultKind::Unsupported
            }
            MachineError::State(_) => FaultKind::Damaged,
            MachineError::Layers(source) => layers(source),
            MachineError::DeviceRestore(_) => FaultKind::Damaged,
            MachineError::VcpuState { source, .. } => match source {
                VcpuStateError::Msr { .. } | VcpuStateError::TscFrequency { .. } => FaultKind::Unsupported,
                // The saved registers are the only input of these calls.
                VcpuStateError::Kvm { .. } | VcpuStateError::TooMany { .. } => FaultKind::Damaged,
                // Nothing is saved here.
                VcpuStateError::Over => FaultKind::Internal,
            },
            MachineError::Descriptors(_) => FaultKind::Exhausted,
            MachineError::Kvm { source, .. } if source.errno() == libc::ENOMEM => FaultKind::Exhausted,
            _ => FaultKind::Internal,
        };
        fault(kind, error)
    }
}
