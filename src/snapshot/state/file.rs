//! The container `state.bin`: a fixed header, then tagged and versioned sections, each decoded by whoever owns it.
//!
//! ```text
//! 0   8  magic "CSPARKST"
//! 8   4  container format, little endian
//! 12  .. bincode of the list of sections: tag, instance, version, bytes
//! ```

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::snapshot::codec::{self, CodecError};

const MAGIC: [u8; 8] = *b"CSPARKST";
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 12;
/// Most sections in a file, and the longest one.
const SECTIONS_MAX: usize = 256;
const SECTION_BYTES_MAX: usize = 1 << 20;

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the state file is not one of coldspark's (its first bytes are wrong): the snapshot is damaged")]
    Magic,
    #[error("the state file has format {found}, this coldspark reads {FORMAT}: use the version that made it")]
    Format { found: u32 },
    #[error("the state file {0}: the snapshot is damaged")]
    Container(CodecError),
    #[error("the state file has {0}: the snapshot is damaged")]
    Limit(String),
    #[error("the state file has no section {tag} {instance}: the snapshot is damaged")]
    Missing { tag: &'static str, instance: u32 },
    #[error("section {tag} has version {found}, this coldspark reads {known}: use the version that made it")]
    Version { tag: &'static str, found: u16, known: u16 },
    #[error("section {tag} {instance} {source}: the snapshot is damaged")]
    Section { tag: &'static str, instance: u32, source: CodecError },
}

/// Something that has a section of its own.
pub trait Section: Serialize + DeserializeOwned {
    const TAG: &'static str;
    /// Goes up with every change of the layout.
    const VERSION: u16;
}

impl Section for super::machine::MachineState {
    const TAG: &'static str = "machine";
    const VERSION: u16 = 1;
}

impl Section for super::vcpu::VcpuState {
    const TAG: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

impl Section for super::chipset::ChipsetState {
    const TAG: &'static str = "chipset";
    const VERSION: u16 = 1;
}

impl Section for super::chipset::AgentPortState {
    const TAG: &'static str = "agent-port";
    const VERSION: u16 = 1;
}

impl Section for super::virtio::TransportState {
    const TAG: &'static str = "virtio";
    const VERSION: u16 = super::virtio::TRANSPORT_STATE_VERSION;
}

impl Section for super::pc::PcState {
    const TAG: &'static str = "pc";
    const VERSION: u16 = 1;
}

impl Section for super::pc::EventState {
    const TAG: &'static str = "events";
    const VERSION: u16 = 1;
}

impl Section for super::pc::VirtioPciState {
    const TAG: &'static str = "virtio-pci";
    const VERSION: u16 = 1;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RawSection {
    tag: String,
    instance: u32,
    version: u16,
    bytes: Vec<u8>,
}

/// A state file in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateFile {
    sections: Vec<RawSection>,
}

impl StateFile {
    /// Adds a section.
    pub fn push<T: Section>(&mut self, instance: u32, value: &T) -> Result<(), CodecError> {
        let bytes = codec::encode(value)?;
        self.sections.push(RawSection { tag: T::TAG.into(), instance, version: T::VERSION, bytes });
        Ok(())
    }

    /// Decodes a section.
    pub fn get<T: Section>(&self, instance: u32) -> Result<T, StateError> {
        let section = self
            .sections
            .iter()
            .find(|s| s.tag == T::TAG && s.instance == instance)
            .ok_or(StateError::Missing { tag: T::TAG, instance })?;
        if section.version != T::VERSION {
            return Err(StateError::Version { tag: T::TAG, found: section.version, known: T::VERSION });
        }
        codec::decode(&section.bytes).map_err(|source| StateError::Section { tag: T::TAG, instance, source })
    }

    /// Decodes a section that not every machine has.
    pub fn get_if_there<T: Section>(&self, instance: u32) -> Result<Option<T>, StateError> {
        match self.get(instance) {
            Err(StateError::Missing { .. }) => Ok(None),
            result => result.map(Some),
        }
    }

    /// The sections' tags and versions, for the manifest: `virtio.1 v1`.
    pub fn names(&self) -> Vec<String> {
        self.sections.iter().map(|s| format!("{}.{} v{}", s.tag, s.instance, s.version)).collect()
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, CodecError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&codec::encode(&self.sections)?);
        Ok(bytes)
    }

    /// Reads a file's bytes, which may be anything.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(StateError::Magic)?;
        if header[..8] != MAGIC {
            return Err(StateError::Magic);
        }
        let found = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if found != FORMAT {
            return Err(StateError::Format { found });
        }
        let sections: Vec<RawSection> = codec::decode(body).map_err(StateError::Container)?;
        if sections.len() > SECTIONS_MAX {
            return Err(StateError::Limit(format!("{} sections", sections.len())));
        }
        if let Some(long) = sections.iter().find(|s| s.bytes.len() > SECTION_BYTES_MAX) {
            return Err(StateError::Limit(format!("a section of {} bytes", long.bytes.len())));
        }
        Ok(StateFile { sections })
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine::MachineState;
    use super::*;
    use proptest::prelude::*;

    fn machine() -> MachineState {
        MachineState { vcpus: 4, memory: Vec::new(), clock_ns: 7, devices: vec!["block".into()] }
    }

    #[test]
    fn sections_come_back_and_others_are_named() {
        let mut file = StateFile::default();
        file.push(0, &machine()).unwrap();
        let again = StateFile::from_bytes(&file.to_bytes().unwrap()).unwrap();
        assert_eq!(again.get::<MachineState>(0).unwrap(), machine());
        assert!(matches!(again.get::<MachineState>(1), Err(StateError::Missing { instance: 1, .. })));
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let mut file = StateFile::default();
        file.push(0, &machine()).unwrap();
        file.sections[0].version = 9;
        let error = file.get::<MachineState>(0).unwrap_err();
        assert!(error.to_string().contains("section machine has version 9"), "{error}");
        let mut bytes = file.to_bytes().unwrap();
        bytes[8] = 2;
        assert!(matches!(StateFile::from_bytes(&bytes), Err(StateError::Format { found: 2 })));
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(at in 0usize..200, with in any::<u8>(), cut in 0usize..200) {
            let mut file = StateFile::default();
            file.push(0, &machine()).unwrap();
            let mut bytes = file.to_bytes().unwrap();
            let len = bytes.len();
            bytes[at % len] = with;
            bytes.truncate(cut.max(1));
            if let Ok(file) = StateFile::from_bytes(&bytes) {
                let _ = file.get::<MachineState>(0);
            }
        }
    }
}
