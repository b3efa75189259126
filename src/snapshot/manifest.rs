//! `manifest.json`: what a snapshot is, for people, for tools, and for the decision whether it can run on this host.
//!
//! What is read is hostile until [`Manifest::parse`] has held all of it against [`limits`]. A manifest of another
//! format version is refused by its number, before anything else of it is looked at.

#![forbid(unsafe_code)]

mod network;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

pub use self::network::Network;
use super::{
    cause::Cause,
    limits::{self, PAGE_BYTES, SECTOR_BYTES},
    sums::{Sum, SumKind},
};

/// Version of the snapshot format: the manifest and the layout of the folder. The machine state has its own.
pub const FORMAT: u32 = 1;
/// The machine state.
pub const STATE_FILE: &str = "state.bin";
/// Guest memory.
pub const MEMORY_FILE: &str = "memory.img";
/// Folder of disk bases and layers.
pub const DISKS_FOLDER: &str = "disks";

/// How far a host's TSC may be from the snapshot's, parts per million, where it cannot be scaled: KVM's own tolerance.
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("it has {0} bytes; the most is 1 MiB")]
    TooLarge(u64),
    #[error("it is not valid JSON of a manifest: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "it has format {has} and this coldspark reads format {reads}: use the coldspark that wrote it, or make it again"
    )]
    Format { has: u64, reads: u32 },
    #[error("{field}: {problem}")]
    Field { field: &'static str, problem: String },
}

impl ManifestError {
    /// The kind of this failure, for a manifest that came from a store.
    pub fn cause(&self) -> Cause {
        match self {
            ManifestError::Format { .. } => Cause::Unsupported,
            _ => Cause::Damaged,
        }
    }
}

pub(super) fn wrong<T>(field: &'static str, problem: impl Into<String>) -> Result<T, ManifestError> {
    Err(ManifestError::Field { field, problem: problem.into() })
}

/// `snap-` and 12 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

impl SnapshotId {
    /// What every id begins with.
    pub const PREFIX: &str = "snap-";

    /// A new id from the kernel's random numbers.
    pub fn random() -> SnapshotId {
        SnapshotId(super::folder::random_id(SnapshotId::PREFIX))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SnapshotId {
    type Err = ManifestError;

    fn from_str(text: &str) -> Result<SnapshotId, ManifestError> {
        match super::folder::is_id(SnapshotId::PREFIX, text) {
            true => Ok(SnapshotId(text.to_string())),
            false => wrong("id", "a snapshot id is snap- and 12 hex digits"),
        }
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = ManifestError;

    fn try_from(text: String) -> Result<SnapshotId, ManifestError> {
        text.parse()
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How the guest was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// FreeBSD's own 64-bit loader protocol.
    FreeBsd,
    Pvh,
    Linux,
}

/// All of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    pub id: SnapshotId,
    /// When it was published: RFC 3339, UTC, whole seconds.
    pub created: String,
    #[serde(flatten)]
    pub facts: Facts,
    /// Every file of the snapshot but the manifest itself.
    pub files: Vec<FileEntry>,
}

/// What the creator of a snapshot knows about it; the store adds the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Given by the user: see [`check_name`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    pub guest: Guest,
    pub vcpus: u8,
    pub memory: Memory,
    pub cpu: Cpu,
    /// KVM capabilities that the state needs, by name.
    pub kvm_capabilities: Vec<String>,
    /// The snapshot that the frozen VM was a clone of. For people: a snapshot needs no other one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    pub identity: Identity,
    /// Devices with a section in the state file, in its order.
    pub devices: Vec<String>,
    pub disks: Vec<Disk>,
    /// Left out if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
}

/// What runs in the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Name of the kernel or image, for people.
    pub kernel: String,
    pub protocol: Protocol,
    /// How it was known to be ready, for example `console: login:`, `port 0x510`, `agent`; empty if it was not asked.
    pub ready: String,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Sum of the regions.
    pub bytes: u64,
    /// By guest address.
    pub regions: Vec<Region>,
}

/// Guest-physical memory and where it lies in `memory.img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    pub guest_address: u64,
    pub bytes: u64,
    pub file_offset: u64,
}

/// The CPU that the guest was shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Of CPUID leaf 0, for example `AuthenticAMD`.
    pub vendor: String,
    pub features: Vec<String>,
    /// 0: not known.
    pub tsc_khz: u32,
}

/// How clones come to differ from each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// An agent in the guest takes on a clone's identity and confirms it.
    pub agent: bool,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// As the guest sees it; a multiple of 512.
    pub bytes: u64,
    pub read_only: bool,
    pub serial: String,
    /// File name of the base in `disks/`.
    pub base: String,
    /// File names of the frozen layers in `disks/`, the lowest first.
    pub layers: Vec<String>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// `state.bin`, `memory.img`, or `disks/` and a plain name.
    pub path: String,
    pub bytes: u64,
    /// How `blake3` is formed.
    pub sum: SumKind,
    pub blake3: Sum,
}

/// What this host offers, to hold a manifest against.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    pub cpu_vendor: String,
    pub cpu_features: BTreeSet<String>,
    /// 0: not known.
    pub tsc_khz: u32,
    /// KVM can run a guest at another TSC frequency than the host's.
    pub tsc_scaling: bool,
    pub kvm_capabilities: BTreeSet<String>,
}

/// Why a sound snapshot cannot run on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("needs a {needs} CPU, host has {has}")]
    Vendor { needs: String, has: String },
    #[error("needs {}, host has not", missing.join(", "))]
    Features { missing: Vec<String> },
    #[error("needs KVM capability {}, host has not", missing.join(", "))]
    KvmCapabilities { missing: Vec<String> },
    #[error("needs a TSC of {needs_khz} kHz, host has {has_khz} kHz and cannot scale it")]
    Tsc { needs_khz: u32, has_khz: u32 },
}

// === impl Manifest ===

impl Manifest {
    /// Reads and checks a manifest.
    pub fn parse(json: &[u8]) -> Result<Manifest, ManifestError> {
        check_format(json, FORMAT)?;
        let manifest: Manifest = serde_json::from_slice(json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The JSON text, ending in a newline.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestError> {
        to_json(self)
    }

    /// The entry of a file by its path in the snapshot.
    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.path == path)
    }

    /// The entry of a file in `disks/`.
    pub fn disk_file(&self, name: &str) -> Option<&FileEntry> {
        self.file(&disk_path(name))
    }

    /// Checks everything that [`parse`](Self::parse) promises of a manifest, its files against each other included.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.format != FORMAT {
            return Err(ManifestError::Format { has: u64::from(self.format), reads: FORMAT });
        }
        if !is_rfc3339_utc(&self.created) {
            return wrong("created", "is not a UTC time like 2026-11-22T12:00:00Z");
        }
        self.facts.check()?;
        self.check_files()
    }

    fn check_files(&self) -> Result<(), ManifestError> {
        let facts = &self.facts;
        let mut needed = BTreeSet::from([STATE_FILE.to_string(), MEMORY_FILE.to_string()]);
        for disk in &facts.disks {
            needed.insert(disk_path(&disk.base));
            needed.extend(disk.layers.iter().map(|layer| disk_path(layer)));
        }
        // Paths were checked where the disks name them; an entry that is none of them is refused here, so no other
        // path can pass.
        for file in self.files.iter() {
            if !needed.remove(&file.path) {
                return wrong(
                    "files",
                    format!("{:?} is named twice, or not needed by the snapshot", file.path),
                );
            }
        }
        if let Some(path) = needed.first() {
            return wrong("files", format!("{path:?} is missing"));
        }
        let bytes_of = |path: &str| self.file(path).map_or(0, |file| file.bytes);
        if !(1..=limits::STATE_BYTES_MAX).contains(&bytes_of(STATE_FILE)) {
            return wrong("files", format!("{STATE_FILE} has {} bytes", bytes_of(STATE_FILE)));
        }
        if bytes_of(MEMORY_FILE) != facts.memory.file_bytes() {
            return wrong("files", format!("{MEMORY_FILE} is not as long as the memory regions"));
        }
        for disk in &facts.disks {
            if bytes_of(&disk_path(&disk.base)) > disk.bytes {
                return wrong("disks", format!("the base {:?} is longer than its disk", disk.base));
            }
        }
        if self.files.iter().any(|file| file.bytes > limits::DISK_FILE_BYTES_MAX) {
            return wrong("files", "a file is larger than any can be");
        }
        Ok(())
    }
}

/// Refuses a document that is too long, is not JSON, or has another format number.
pub(super) fn check_format(json: &[u8], reads: u32) -> Result<(), ManifestError> {
    #[derive(Deserialize)]
    struct Probe {
        format: u64,
    }
    if json.len() as u64 > limits::MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLarge(json.len() as u64));
    }
    let probe: Probe = serde_json::from_slice(json)?;
    match probe.format == u64::from(reads) {
        true => Ok(()),
        false => Err(ManifestError::Format { has: probe.format, reads }),
    }
}

/// JSON for people, ending in a newline; not longer than it may be read.
pub(super) fn to_json(document: &impl Serialize) -> Result<Vec<u8>, ManifestError> {
    let mut json = serde_json::to_vec_pretty(document)?;
    json.push(b'\n');
    match json.len() as u64 {
        bytes if bytes > limits::MANIFEST_BYTES_MAX => Err(ManifestError::TooLarge(bytes)),
        _ => Ok(json),
    }
}

/// Path of a disk file inside a snapshot.
pub fn disk_path(name: &str) -> String {
    format!("{DISKS_FOLDER}/{name}")
}

// === impl Facts ===

impl Facts {
    /// Checks all that does not depend on the files.
    pub fn check(&self) -> Result<(), ManifestError> {
        if let Some(name) = &self.name {
            check_name(name).or_else(|problem| wrong("name", problem))?;
        }
        check_labels(&self.labels).or_else(|problem| wrong("labels", problem))?;
        check_text("guest.kernel", &self.guest.kernel)?;
        check_text("guest.ready", &self.guest.ready)?;
        if !(1..=limits::VCPUS_MAX).contains(&self.vcpus) {
            return wrong("vcpus", format!("{} is not between 1 and {}", self.vcpus, limits::VCPUS_MAX));
        }
        self.memory.check()?;
        check_text("cpu.vendor", &self.cpu.vendor)?;
        check_list("cpu.features", &self.cpu.features)?;
        check_list("kvm_capabilities", &self.kvm_capabilities)?;
        check_list("devices", &self.devices)?;
        network::check(&self.networks)?;
        self.check_disks()
    }

    fn check_disks(&self) -> Result<(), ManifestError> {
        if self.disks.len() > limits::DISKS_MAX {
            return wrong("disks", format!("more than {}", limits::DISKS_MAX));
        }
        for disk in &self.disks {
            if disk.bytes == 0
                || disk.bytes > limits::DISK_BYTES_MAX
                || !disk.bytes.is_multiple_of(SECTOR_BYTES)
            {
                return wrong("disks", format!("{} bytes is no size of a disk", disk.bytes));
            }
            check_serial(&disk.serial)?;
            if disk.layers.len() > limits::LAYERS_MAX {
                return wrong("disks", format!("more than {} layers", limits::LAYERS_MAX));
            }
            for name in disk.layers.iter().chain([&disk.base]) {
                check_file_name(name)
                    .or_else(|problem| wrong("disks", format!("file name {name:?}: {problem}")))?;
            }
        }
        Ok(())
    }

    /// Whether this host can run the snapshot; the refusal names what is missing.
    pub fn fits(&self, host: &HostFacts) -> Result<(), Refusal> {
        if self.cpu.vendor != host.cpu_vendor {
            return Err(Refusal::Vendor { needs: self.cpu.vendor.clone(), has: host.cpu_vendor.clone() });
        }
        let missing = |needs: &[String], has: &BTreeSet<String>| -> Vec<String> {
            needs.iter().filter(|need| !has.contains(*need)).cloned().collect()
        };
        let features = missing(&self.cpu.features, &host.cpu_features);
        if !features.is_empty() {
            return Err(Refusal::Features { missing: features });
        }
        let capabilities = missing(&self.kvm_capabilities, &host.kvm_capabilities);
        if !capabilities.is_empty() {
            return Err(Refusal::KvmCapabilities { missing: capabilities });
        }
        let (needs_khz, has_khz) = (self.cpu.tsc_khz, host.tsc_khz);
        let far =
            u64::from(needs_khz.abs_diff(has_khz)) * 1_000_000 > u64::from(needs_khz) * TSC_TOLERANCE_PPM;
        if needs_khz != 0 && has_khz != 0 && far && !host.tsc_scaling {
            return Err(Refusal::Tsc { needs_khz, has_khz });
        }
        Ok(())
    }
}

// === impl Memory ===

impl Memory {
    /// Length of `memory.img`. Saturates on regions that [`Facts::check`] refuses.
    pub fn file_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.file_offset.saturating_add(region.bytes)).max().unwrap_or(0)
    }

    fn check(&self) -> Result<(), ManifestError> {
        const FIELD: &str = "memory.regions";
        if self.regions.is_empty() || self.regions.len() > limits::REGIONS_MAX {
            return wrong(FIELD, format!("there must be 1 to {}", limits::REGIONS_MAX));
        }
        let mut sum: u64 = 0;
        for region in &self.regions {
            let aligned = |value: u64| value.is_multiple_of(PAGE_BYTES);
            if region.bytes == 0 || !aligned(region.bytes | region.guest_address | region.file_offset) {
                return wrong(FIELD, "addresses and sizes must be multiples of 4 KiB, and sizes not 0");
            }
            let fits = |start: u64| {
                start.checked_add(region.bytes).is_some_and(|end| end <= 2 * limits::MEMORY_BYTES_MAX)
            };
            if region.bytes > limits::MEMORY_BYTES_MAX
                || !fits(region.guest_address)
                || !fits(region.file_offset)
            {
                return wrong(FIELD, "they reach further than any VM's memory");
            }
            sum += region.bytes;
        }
        if self.regions.windows(2).any(|pair| match pair {
            [low, high] => low.guest_address + low.bytes > high.guest_address,
            _ => false,
        }) {
            return wrong(FIELD, "they overlap for the guest, or are not in the order of its addresses");
        }
        let mut spans: Vec<_> =
            self.regions.iter().map(|region| (region.file_offset, region.bytes)).collect();
        spans.sort_unstable();
        if spans.windows(2).any(|pair| matches!(pair, [(low, bytes), (high, _)] if low + bytes > *high)) {
            return wrong(FIELD, "they overlap in the file");
        }
        if sum != self.bytes || sum > limits::MEMORY_BYTES_MAX || self.file_bytes() > limits::MEMORY_BYTES_MAX
        {
            return wrong(
                "memory.bytes",
                format!("{} is not the sum of the regions, or more than 1 TiB", self.bytes),
            );
        }
        Ok(())
    }
}

// === small checks ===

/// A name given by a user: 1 to 64 of `a-z A-Z 0-9 . _ -`, not beginning with a dot or dash, and not like an id.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let starts_well = !name.starts_with(['.', '-']);
    if name.is_empty() || name.len() > limits::NAME_BYTES_MAX || !name.bytes().all(plain) || !starts_well {
        return Err("must be 1 to 64 of a-z A-Z 0-9 . _ -, and not begin with a dot or dash".into());
    }
    if super::folder::looks_like_id(name) {
        return Err("looks like an id; choose another one".into());
    }
    Ok(())
}

/// A file name that can be joined to a folder without leaving it.
pub fn check_file_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty()
        || name.len() > limits::FILE_NAME_BYTES_MAX
        || !name.bytes().all(plain)
        || name.starts_with('.')
    {
        return Err("must be 1 to 100 of letters, digits, -, _ and ., and not start with a dot".into());
    }
    Ok(())
}

/// A serial as virtio-blk can show it.
pub(super) fn check_serial(serial: &str) -> Result<(), ManifestError> {
    match serial.len() <= limits::SERIAL_BYTES_MAX && serial.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(()),
        false => wrong("disks", "a serial has at most 20 printable characters and no space"),
    }
}

pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    let plain = |text: &String| text.len() <= limits::TEXT_BYTES_MAX && !text.chars().any(char::is_control);
    if labels.len() > limits::LABELS_MAX {
        return Err(format!("more than {}", limits::LABELS_MAX));
    }
    match labels.iter().all(|(key, value)| !key.is_empty() && plain(key) && plain(value)) {
        true => Ok(()),
        false => Err("a key or value is empty, longer than 1024 bytes, or has control characters".into()),
    }
}

pub(super) fn check_text(field: &'static str, text: &str) -> Result<(), ManifestError> {
    match text.len() <= limits::TEXT_BYTES_MAX && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => wrong(field, "is longer than 1024 bytes or has control characters"),
    }
}

fn check_list(field: &'static str, list: &[String]) -> Result<(), ManifestError> {
    if list.len() > limits::LIST_MAX {
        return wrong(field, format!("more than {}", limits::LIST_MAX));
    }
    list.iter().try_for_each(|text| check_text(field, text))
}

// === time ===

/// RFC 3339 in UTC with whole seconds, like `2026-11-22T12:00:00Z`. Times before 1970 are given as 1970.
pub fn rfc3339_utc(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a date of the Gregorian calendar, in eras of 400 years that begin on 1 March (the leap day is then
    // the last day of a year): Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Whether the text has the form that [`rfc3339_utc`] writes.
fn is_rfc3339_utc(text: &str) -> bool {
    let form = "0000-00-00T00:00:00Z";
    text.len() == form.len()
        && text.bytes().zip(form.bytes()).all(|(byte, want)| match want {
            b'0' => byte.is_ascii_digit(),
            _ => byte == want,
        })
}

#[cfg(test)]
pub(in crate::snapshot) mod tests;
