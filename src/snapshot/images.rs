//! The folder of images: what can be cold-booted. A kernel, an optional module, disks, and `settings.json` that says how.
//!
//! An image is imported as streams of bytes ([`ImageDraft::write`]), zeros becoming holes, and published whole or not at all, like
//! a snapshot. Its files never change afterwards: VMs write to overlays of their own, and snapshots take the disks
//! in as hard links with the sums that are known from here.

#![forbid(unsafe_code)]

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use super::{
    folder::{self, Temporary, failed},
    limits::{self, HUGE_BYTES, PAGE_BYTES, SECTOR_BYTES},
    manifest::{
        self, DISKS_FOLDER, FileEntry, ManifestError, Protocol, check_format, check_name, check_text,
        disk_path, to_json, wrong,
    },
    shelf::{self, Document, Item, Reserved, Shelf, Stored, entry_of},
    sums::SumKind,
};

pub use super::shelf::{StoreError, Verified};

/// Version of the image format.
pub const FORMAT: u32 = 1;
/// The kernel.
pub const KERNEL_FILE: &str = "kernel";
/// The memory disk or initial RAM disk.
pub const MODULE_FILE: &str = "module";

const DOCUMENT: Document = Document { file: "settings.json", sum_file: "settings.b3" };
const KIND: &str = "image";
const ID_PREFIX: &str = "img-";

/// What is in the store.
pub type Listed = shelf::Listed<Image>;

/// How an image boots, as given by its importer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    pub name: String,
    /// `None`: look into the kernel file and choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// `None`: look into the kernel file and choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<Hardware>,
    /// `None`: a virtio-console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_port: Option<AgentPort>,
    /// What the module file is; `None`: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<ModuleKind>,
    /// Kernel command line, or `name=value` words of FreeBSD's kernel environment.
    pub command_line: String,
    pub vcpus: u8,
    /// A multiple of 2 MiB.
    pub memory_bytes: u64,
    pub ready: Ready,
    pub disks: Vec<DiskSettings>,
    /// The kernel is the embedded test guest.
    #[serde(default)]
    pub embedded: bool,
}

/// The kind of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hardware {
    /// virtio-mmio.
    Microvm,
    /// ACPI and virtio-pci.
    Pc,
}

/// What the agent's channel is plugged into in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentPort {
    /// A virtio-console.
    Virtio,
    /// COM2.
    Serial,
}

/// What the module file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModuleKind {
    /// FreeBSD `md_image`.
    MemoryDisk,
    /// Linux initial RAM disk.
    Initrd,
}

/// When a VM of the image counts as ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// These bytes on the console, 1 to 256.
    Console(String),
    /// A write to this port.
    Port(u16),
    /// The agent's hello.
    Agent,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSettings {
    pub read_only: bool,
    pub serial: String,
}

/// All of `settings.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageManifest {
    /// [`FORMAT`].
    pub format: u32,
    pub id: String,
    /// When it was imported: RFC 3339, UTC.
    pub created: String,
    #[serde(flatten)]
    pub settings: Settings,
    /// `kernel`, `module` if there is one, and `disks/0.img` and so on.
    pub files: Vec<FileEntry>,
}

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Kernel,
    Module,
    /// Disk n of the settings.
    Disk(usize),
}

// === impl Settings ===

impl Settings {
    /// Checks all of it.
    pub fn check(&self) -> Result<(), ManifestError> {
        check_name(&self.name).or_else(|problem| wrong("name", problem))?;
        if self.command_line.len() > limits::COMMAND_LINE_BYTES_MAX || self.command_line.contains('\0') {
            return wrong("command_line", "is longer than 16 KiB, or has a NUL in it");
        }
        if !(1..=limits::VCPUS_MAX).contains(&self.vcpus) {
            return wrong("vcpus", format!("{} is not between 1 and {}", self.vcpus, limits::VCPUS_MAX));
        }
        let memory = self.memory_bytes;
        if memory == 0 || memory > limits::MEMORY_BYTES_MAX || !memory.is_multiple_of(HUGE_BYTES) {
            return wrong("memory_bytes", format!("{memory} is not a multiple of 2 MiB up to 1 TiB"));
        }
        if let Ready::Console(pattern) = &self.ready
            && !(1..=limits::PATTERN_BYTES_MAX).contains(&pattern.len())
        {
            return wrong("ready", "a console pattern has 1 to 256 bytes");
        }
        if self.ready == Ready::Port(0) {
            return wrong("ready", "there is no port 0 to be ready at");
        }
        if self.disks.len() > limits::DISKS_MAX {
            return wrong("disks", format!("more than {}", limits::DISKS_MAX));
        }
        self.disks.iter().try_for_each(|disk| manifest::check_serial(&disk.serial))
    }

    /// Whether an image with these settings has this file.
    fn has(&self, part: Part) -> bool {
        match part {
            Part::Kernel => true,
            Part::Module => self.module.is_some(),
            Part::Disk(disk) => disk < self.disks.len(),
        }
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        let module = self.module.iter().map(|_| Part::Module);
        std::iter::once(Part::Kernel).chain(module).chain((0..self.disks.len()).map(Part::Disk))
    }
}

// === impl Part ===

impl Part {
    fn path(self) -> String {
        match self {
            Part::Kernel => KERNEL_FILE.to_string(),
            Part::Module => MODULE_FILE.to_string(),
            Part::Disk(disk) => disk_path(&format!("{disk}.img")),
        }
    }

    fn bytes_max(self) -> u64 {
        match self {
            Part::Kernel => limits::KERNEL_BYTES_MAX,
            Part::Module => limits::MODULE_BYTES_MAX,
            Part::Disk(_) => limits::DISK_BYTES_MAX,
        }
    }

    fn sum_kind(self) -> SumKind {
        match self {
            Part::Kernel | Part::Module => SumKind::Whole,
            Part::Disk(_) => SumKind::Chunks,
        }
    }

    /// What a file of this length may not be.
    fn check_bytes(self, bytes: u64) -> Result<(), String> {
        match self {
            Part::Kernel | Part::Module if bytes == 0 => {
                Err(format!("{} is empty: send its content", self.name()))
            }
            Part::Disk(_) if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) => Err(format!(
                "{} has {bytes} bytes, and a disk's size must be a multiple of 512 and not 0: was it truncated?",
                self.name()
            )),
            _ if bytes > self.bytes_max() => Err(format!(
                "{} has more than {} bytes, the most that it can have",
                self.name(),
                self.bytes_max()
            )),
            _ => Ok(()),
        }
    }

    fn name(self) -> String {
        match self {
            Part::Kernel => "the kernel".to_string(),
            Part::Module => "the module".to_string(),
            Part::Disk(disk) => format!("disk {disk}"),
        }
    }
}

// === impl ImageManifest ===

impl ImageManifest {
    fn parse(json: &[u8]) -> Result<ImageManifest, ManifestError> {
        check_format(json, FORMAT)?;
        let image: ImageManifest = serde_json::from_slice(json)?;
        image.check()?;
        Ok(image)
    }

    fn check(&self) -> Result<(), ManifestError> {
        self.settings.check()?;
        check_text("created", &self.created)?;
        if self.files.len() != self.settings.parts().count() {
            return wrong("files", "they are not those that the settings speak of");
        }
        self.settings.parts().try_for_each(|part| {
            let Some(entry) = self.file(part) else {
                return wrong("files", format!("{} is missing", part.name()));
            };
            part.check_bytes(entry.bytes).or_else(|problem| wrong("files", problem))
        })
    }

    /// The entry of a file; for a disk, what a snapshot can take over as its known sum.
    pub fn file(&self, part: Part) -> Option<&FileEntry> {
        let path = part.path();
        self.files.iter().find(|file| file.path == path)
    }
}

// === the store ===

/// The store. Every method may be called from any thread, and may block on the disk.
#[derive(Debug)]
pub struct ImageStore {
    shelf: Arc<Shelf<Image>>,
}

impl ImageStore {
    /// Opens, and if need be creates, the store in `path`, and removes what a crash left half-made. One damaged image does
    /// not keep the others from being used.
    pub fn open(path: &Path) -> Result<ImageStore, StoreError> {
        Ok(ImageStore { shelf: Arc::new(Shelf::open(path, &())?) })
    }

    /// Everything in the store, by id; damaged ones last.
    pub fn list(&self) -> Vec<Listed> {
        self.shelf.list()
    }

    /// Finds an image by its name or id.
    pub fn get(&self, name_or_id: &str) -> Result<Arc<Image>, StoreError> {
        self.shelf.get(name_or_id)
    }

    /// Begins an import. The name is kept for it from now on.
    pub fn begin(&self, settings: Settings) -> Result<ImageDraft, StoreError> {
        settings.check().map_err(|source| StoreError::Refused { kind: KIND, source })?;
        let reserved = self.shelf.reserve(&settings.name)?;
        let id = folder::random_id(ID_PREFIX);
        let temporary = self.shelf.begin(&id)?;
        temporary.create_folder(DISKS_FOLDER)?;
        let mut files = Vec::new();
        for part in settings.parts() {
            files.push(Incoming { part, file: temporary.create_file(&part.path())?, bytes: 0 });
        }
        Ok(ImageDraft { shelf: Arc::clone(&self.shelf), id, settings, files, temporary, _reserved: reserved })
    }

    /// Reads every file of an image and holds it against its sum. The error names the first that is damaged.
    pub fn verify(&self, name_or_id: &str) -> Result<Verified, StoreError> {
        let image = self.get(name_or_id)?;
        Image::read(image.stored.clone(), &())?;
        image.stored.verify(&image.manifest.files)
    }

    /// Deletes an image, whole or damaged; returns its id. VMs and snapshots made from it have its files.
    pub fn delete(&self, name_or_id: &str) -> Result<String, StoreError> {
        self.shelf.delete(name_or_id)
    }
}

/// An import under way. Dropped unpublished, nothing of it stays.
#[derive(Debug)]
pub struct ImageDraft {
    shelf: Arc<Shelf<Image>>,
    id: String,
    settings: Settings,
    files: Vec<Incoming>,
    temporary: Temporary,
    _reserved: Reserved<Image>,
}

#[derive(Debug)]
struct Incoming {
    part: Part,
    file: File,
    /// Received so far.
    bytes: u64,
}

impl ImageDraft {
    /// Appends bytes to one of the image's files.
    ///
    /// # Errors
    /// For a file that the settings do not speak of, one that gets too long, or a disk that is full: then drop the draft.
    pub fn write(&mut self, part: Part, data: &[u8]) -> Result<(), StoreError> {
        let path = self.temporary.path().join(part.path());
        let incoming = self.incoming(part, data.len() as u64)?;
        write_sparse(&incoming.file, incoming.bytes, data).map_err(failed(&path, "written"))?;
        incoming.bytes = incoming.bytes.saturating_add(data.len() as u64);
        Ok(())
    }

    /// Appends zeros to one of the image's files, as a hole.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeros(&mut self, part: Part, bytes: u64) -> Result<(), StoreError> {
        let incoming = self.incoming(part, bytes)?;
        incoming.bytes = incoming.bytes.saturating_add(bytes);
        Ok(())
    }

    /// One of the image's files as far as it has come, and its length. (Zeros at its end may not be in the file yet.)
    pub fn file(&self, part: Part) -> Option<(&File, u64)> {
        self.files
            .iter()
            .find(|incoming| incoming.part == part)
            .map(|incoming| (&incoming.file, incoming.bytes))
    }

    /// The file that `bytes` more are to be appended to.
    fn incoming(&mut self, part: Part, bytes: u64) -> Result<&mut Incoming, StoreError> {
        let refused = |problem: String| StoreError::Content { kind: KIND, problem };
        if !self.settings.has(part) {
            return Err(refused(format!("its settings do not speak of {}", part.name())));
        }
        let incoming = self.files.iter_mut().find(|incoming| incoming.part == part);
        let incoming = incoming.ok_or_else(|| refused(format!("{} is not expected", part.name())))?;
        if incoming.bytes.saturating_add(bytes) > part.bytes_max() {
            return Err(refused(format!("{} has more than {} bytes", part.name(), part.bytes_max())));
        }
        Ok(incoming)
    }

    /// Checks the files, sums and syncs them, and makes the image visible.
    ///
    /// # Errors
    /// Nothing of the draft stays.
    pub fn publish(self) -> Result<Arc<Image>, StoreError> {
        let ImageDraft { shelf, id, settings, files, temporary, _reserved } = self;
        for Incoming { part, file, bytes } in &files {
            part.check_bytes(*bytes).map_err(|problem| StoreError::Content { kind: KIND, problem })?;
            // The end may be a hole.
            file.set_len(*bytes).map_err(failed(&temporary.path().join(part.path()), "written"))?;
            folder::start_writing_out(file);
        }
        let mut entries = Vec::with_capacity(files.len());
        for Incoming { part, file, .. } in &files {
            entries.push(entry_of(&temporary, &part.path(), file, part.sum_kind())?);
            file.sync_all().map_err(failed(&temporary.path().join(part.path()), "synced"))?;
        }
        let created = manifest::rfc3339_utc(SystemTime::now());
        let image = ImageManifest { format: FORMAT, id: id.clone(), created, settings, files: entries };
        let refused = |source| StoreError::Refused { kind: KIND, source };
        image.check().map_err(refused)?;
        let json = to_json(&image).map_err(refused)?;
        folder::sync_folder(&temporary.path().join(DISKS_FOLDER))?;
        DOCUMENT.write(&temporary, &json)?;
        shelf.publish(temporary, &id, |stored| Image::new(stored, image))
    }
}

/// Writes `data` at `at`, leaving out zeros that fill a page or what there is of one.
fn write_sparse(file: &File, mut at: u64, data: &[u8]) -> io::Result<()> {
    let mut rest = data;
    // A run of pages that are not zero, still to be written.
    let (mut run_at, mut run): (u64, &[u8]) = (at, &[]);
    while !rest.is_empty() {
        let to_boundary = PAGE_BYTES - at % PAGE_BYTES;
        let bytes = usize::try_from(to_boundary).unwrap_or(usize::MAX).min(rest.len());
        let (piece, after) = rest.split_at(bytes);
        if is_zero(piece) {
            file.write_all_at(run, run_at)?;
            (run_at, run) = (at + bytes as u64, &[]);
        } else {
            let start = data.len() - rest.len() - run.len();
            run = &data[start..start + run.len() + bytes];
        }
        at += bytes as u64;
        rest = after;
    }
    file.write_all_at(run, run_at)
}

fn is_zero(piece: &[u8]) -> bool {
    static ZEROS: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
    ZEROS.get(..piece.len()) == Some(piece)
}

// === impl Image ===

/// A published image.
#[derive(Debug)]
pub struct Image {
    stored: Stored,
    manifest: Arc<ImageManifest>,
    opened: Mutex<Option<Arc<OpenImage>>>,
}

/// An image's files, open for reading and of the lengths that its settings say.
#[derive(Debug)]
pub struct OpenImage {
    pub manifest: Arc<ImageManifest>,
    pub kernel: Arc<File>,
    pub module: Option<Arc<File>>,
    pub disks: Vec<Arc<File>>,
}

impl Item for Image {
    const KIND: &'static str = KIND;
    type With = ();
    const ID_PREFIX: &'static str = ID_PREFIX;
    const ADVICE: &'static [&'static str] = &[];

    fn read(stored: Stored, (): &()) -> Result<Image, StoreError> {
        let manifest = DOCUMENT.read(&stored, ImageManifest::parse)?;
        match manifest.id == stored.id() {
            true => Ok(Image::new(stored, manifest)),
            false => Err(stored.damaged(DOCUMENT.file, format!("it describes {}", manifest.id))),
        }
    }

    fn name(&self) -> Option<&str> {
        Some(Image::name(self))
    }
}

impl Image {
    fn new(stored: Stored, manifest: ImageManifest) -> Image {
        Image { stored, manifest: Arc::new(manifest), opened: Mutex::new(None) }
    }

    /// `img-` and 12 hex digits.
    pub fn id(&self) -> &str {
        self.stored.id()
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.manifest.settings.name
    }

    /// How it boots, and its files.
    pub fn manifest(&self) -> &Arc<ImageManifest> {
        &self.manifest
    }

    /// Bytes that the image takes on disk.
    pub fn disk_usage_bytes(&self) -> Result<u64, StoreError> {
        self.stored.disk_usage_bytes(&self.manifest.files)
    }

    /// The image's files, opened and their lengths checked at the first call.
    pub fn open(&self) -> Result<Arc<OpenImage>, StoreError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*opened {
            return Ok(Arc::clone(open));
        }
        let file = |part: Part| -> Result<Arc<File>, StoreError> {
            let entry = self.manifest.file(part);
            let entry =
                entry.ok_or_else(|| self.stored.damaged(&part.path(), "the settings do not list it"))?;
            Ok(Arc::new(self.stored.open(entry)?))
        };
        let open = Arc::new(OpenImage {
            manifest: Arc::clone(&self.manifest),
            kernel: file(Part::Kernel)?,
            module: self.manifest.settings.module.map(|_| file(Part::Module)).transpose()?,
            disks: (0..self.manifest.settings.disks.len())
                .map(|disk| file(Part::Disk(disk)))
                .collect::<Result<_, _>>()?,
        });
        *opened = Some(Arc::clone(&open));
        Ok(open)
    }

    /// Closes the files; the next [`open`](Self::open) opens and checks anew.
    pub fn close(&self) {
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests;
