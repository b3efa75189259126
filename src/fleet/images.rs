//! Images: importing them piece by piece, and opening their files for a cold boot.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use prost::bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Fleet;
use super::boot::{ReadyPoint, check_command_line, check_machine, check_ready};
use super::disks::{FrozenFile, VmDisk, VmFolder};
use super::error::FleetError;
use super::events::{Change, Event, Events, Kind};
use super::id;
use super::limits::*;
use super::snapshots::unix_ms;
use super::tasks::blocking;
use crate::agent::testguest::TEST_GUEST;
use crate::media::{inspect, kernel};
use crate::snapshot::images::{self as store, Image, ImageDraft, ImageStore, Listed, OpenImage, Part, Ready};
use crate::snapshot::layers::SECTOR_BYTES;
use crate::snapshot::manifest::Protocol;
use crate::worker::protocol::{AgentPort, BootProtocol, Hardware, ModuleKind};

/// What the embedded test guest is called where an image's name would be.
pub const EMBEDDED_TITLE: &str = "embedded test guest";

/// How an image boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub protocol: BootProtocol,
    pub hardware: Hardware,
    pub agent_port: AgentPort,
    pub command_line: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub ready: ReadyPoint,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            protocol: BootProtocol::Auto,
            hardware: Hardware::Auto,
            agent_port: AgentPort::Virtio,
            command_line: String::new(),
            vcpus: 1,
            memory_bytes: MEMORY_BYTES_DEFAULT,
            ready: ReadyPoint::Agent,
        }
    }
}

/// An import to be begun.
#[derive(Debug, Clone)]
pub struct ImportImage {
    pub name: String,
    pub settings: Settings,
    pub module: Option<ModuleKind>,
    pub disks: Vec<ImportDisk>,
    /// The kernel is the embedded test guest.
    pub embedded: bool,
    /// The kernel is on one of the disks.
    pub find_kernel: bool,
    /// Lengths that will follow; 0: not said.
    pub kernel_bytes: u64,
    pub module_bytes: u64,
}

/// A disk of an import.
#[derive(Debug, Clone)]
pub struct ImportDisk {
    pub read_only: bool,
    /// Length that will follow; 0: not said.
    pub bytes: u64,
    /// What people call the file; may be empty.
    pub name: String,
}

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFile {
    Kernel,
    Module,
    Disk(u32),
}

/// An image, for listing.
#[derive(Debug, Clone)]
pub struct Described {
    pub name: String,
    pub settings: Settings,
    pub module: Option<ModuleKind>,
    /// Read-only, and bytes.
    pub disks: Vec<(bool, u64)>,
    pub kernel_bytes: u64,
    pub module_bytes: u64,
    pub embedded: bool,
    pub created_unix_ms: u64,
    /// What an import found by looking into the files.
    pub found: Vec<String>,
}

/// Files and settings of something that can be cold-booted.
#[derive(Debug)]
pub struct Bootable {
    pub title: String,
    pub settings: Settings,
    /// With a file position of its own.
    pub kernel: Arc<File>,
    pub module_kind: Option<ModuleKind>,
    pub module: Option<Arc<File>>,
    /// Without overlays.
    disks: Vec<VmDisk>,
}

impl Bootable {
    /// The disks of one VM, with overlays in `folder`.
    pub fn disks(&self, folder: &mut VmFolder) -> Result<Vec<VmDisk>, FleetError> {
        let mut disks = self.disks.clone();
        for (n, disk) in disks.iter_mut().enumerate().filter(|(_, disk)| !disk.read_only) {
            disk.overlay = Some(folder.overlay(n)?);
        }
        Ok(disks)
    }
}

/// The image store.
#[derive(Debug)]
pub struct Images {
    store: Arc<ImageStore>,
    /// The embedded kernel as a file.
    embedded: File,
    imports: Arc<Semaphore>,
}

impl Images {
    pub fn open(path: &Path) -> Result<Self, FleetError> {
        let embedded = memory_file(TEST_GUEST).map_err(FleetError::io("cannot make a memory file"))?;
        Ok(Self {
            store: Arc::new(ImageStore::open(path)?),
            embedded,
            imports: Arc::new(Semaphore::new(IMPORTS_MAX)),
        })
    }

    /// Opens an image, or the embedded test guest, for one cold boot.
    pub async fn bootable(&self, image: Option<&str>) -> Result<Bootable, FleetError> {
        let Some(name) = image else {
            return Ok(Bootable {
                title: EMBEDDED_TITLE.to_owned(),
                settings: Settings::default(),
                kernel: own_position(&self.embedded)?,
                module_kind: None,
                module: None,
                disks: Vec::new(),
            });
        };
        let image = self.store.get(name)?;
        blocking(move || {
            let open = image.open()?;
            bootable(&open)
        })
        .await?
    }
}

fn bootable(open: &OpenImage) -> Result<Bootable, FleetError> {
    let manifest = &open.manifest;
    let mut disks = Vec::with_capacity(open.disks.len());
    for (n, (file, facts)) in open.disks.iter().zip(&manifest.settings.disks).enumerate() {
        let known = manifest.file(Part::Disk(n)).cloned();
        disks.push(VmDisk {
            read_only: facts.read_only,
            bytes: known.as_ref().map_or(0, |entry| entry.bytes),
            serial: facts.serial.clone(),
            direct: false,
            base: FrozenFile { file: Arc::clone(file), known, foreign: false },
            layers: Vec::new(),
            overlay: None,
        });
    }
    Ok(Bootable {
        title: manifest.settings.name.clone(),
        settings: settings_out(&manifest.settings),
        kernel: own_position(&open.kernel)?,
        module_kind: manifest.settings.module.map(module_out),
        module: open.module.as_deref().map(own_position).transpose()?,
        disks,
    })
}

/// Another descriptor of the same file that shares no position with it: two workers may read it at once.
fn own_position(file: &File) -> Result<Arc<File>, FleetError> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(Arc::new(File::open(path).map_err(FleetError::io("cannot open a kernel again"))?))
}

fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"coldspark-test-guest", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    Ok(file)
}

/// An import under way. Dropped unfinished, nothing of it stays.
#[derive(Debug)]
pub struct Import {
    /// Away while a piece is written.
    draft: Option<Box<ImageDraft>>,
    embedded: bool,
    find_kernel: bool,
    /// Part, bytes that will come (0: not said), bytes that came.
    lengths: Vec<(Part, u64, u64)>,
    /// What people call the disks.
    names: Vec<String>,
    events: Events,
    _permit: OwnedSemaphorePermit,
}

impl Import {
    /// Appends to a file. After an error the import is of no more use.
    pub async fn write(&mut self, file: ImageFile, data: Bytes) -> Result<(), FleetError> {
        let bytes = data.len() as u64;
        self.append(file, bytes, move |draft, part| draft.write(part, &data)).await
    }

    /// Appends zeros to a file.
    pub async fn write_zeros(&mut self, file: ImageFile, bytes: u64) -> Result<(), FleetError> {
        self.append(file, bytes, move |draft, part| draft.write_zeros(part, bytes)).await
    }

    async fn append(
        &mut self,
        file: ImageFile,
        bytes: u64,
        write: impl FnOnce(&mut ImageDraft, Part) -> Result<(), store::StoreError> + Send + 'static,
    ) -> Result<(), FleetError> {
        let part = match file {
            ImageFile::Kernel if self.embedded => {
                return Err(FleetError::Invalid(
                    "an image of the embedded test guest brings its own kernel; send none".into(),
                ));
            }
            ImageFile::Kernel if self.find_kernel => {
                return Err(FleetError::Invalid(
                    "a kernel came for an image whose kernel is to be found on its disks; send none".into(),
                ));
            }
            ImageFile::Kernel => Part::Kernel,
            ImageFile::Module => Part::Module,
            ImageFile::Disk(n) => Part::Disk(n as usize),
        };
        if let Some((_, _, came)) = self.lengths.iter_mut().find(|(other, _, _)| *other == part) {
            *came = came.saturating_add(bytes);
        }
        let mut draft = self.draft.take().ok_or_else(given_up)?;
        let (draft, written) = blocking(move || {
            let written = write(&mut draft, part);
            (draft, written)
        })
        .await?;
        written?;
        self.draft = Some(draft);
        Ok(())
    }

    /// Publishes the image.
    pub async fn finish(mut self) -> Result<Described, FleetError> {
        for (part, announced, came) in &self.lengths {
            if *announced != 0 && announced != came {
                return Err(FleetError::Invalid(format!(
                    "{came} bytes came of {} where {announced} were announced; send the image again",
                    match part {
                        Part::Kernel => "the kernel".to_owned(),
                        Part::Module => "the module".to_owned(),
                        Part::Disk(n) => format!("disk {n}"),
                    }
                )));
            }
        }
        let mut draft = self.draft.take().ok_or_else(given_up)?;
        let (names, find_kernel, embedded) = (self.names, self.find_kernel, self.embedded);
        let published = blocking(move || {
            let found = look(&mut draft, &names, find_kernel, embedded)?;
            let image = draft.publish()?;
            Ok::<_, FleetError>(Described { found, ..describe(&image) })
        });
        let image = published.await??;
        self.events.tell(|| Event::new(Kind::Image, Change::Made, &image.name, Some(&image.name)));
        Ok(image)
    }
}

/// Looks through what has come: refuses disks and kernels that can never work, takes the kernel from a disk if that is
/// wanted, and tells what it has seen. Blocks.
fn look(
    draft: &mut ImageDraft,
    names: &[String],
    find_kernel: bool,
    embedded: bool,
) -> Result<Vec<String>, FleetError> {
    let mut found = Vec::new();
    let mut kernel_found = false;
    let mut missing = None;
    for (n, name) in names.iter().enumerate() {
        let Some((file, bytes)) = draft.file(Part::Disk(n)) else { continue };
        let disk = match name.as_str() {
            "" => format!("disk {n}"),
            name => format!("disk {n} ({name})"),
        };
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(FleetError::Invalid(format!(
                "{disk} has {bytes} bytes, and a disk's size is a multiple of {SECTOR_BYTES} and not 0; was it truncated? Copy or download it again"
            )));
        }
        let unreadable = || FleetError::io(format!("cannot read {disk}"));
        let file = file.try_clone().map_err(unreadable())?;
        // Zeros at the end may not be in the file yet.
        file.set_len(bytes).map_err(unreadable())?;
        let inspection = inspect::disk(&file, bytes).map_err(unreadable())?;
        if let Some(problem) = &inspection.problem {
            return Err(FleetError::Invalid(format!(
                "{disk}: {problem}; copy or download it again, or repair it with `gpart recover`"
            )));
        }
        found.push(format!("{disk}: {}", inspection.describe()));
        found.extend(inspection.notes.iter().map(|note| format!("{disk}: {note}")));
        if !find_kernel || kernel_found {
            continue;
        }
        match inspect::kernel(&inspection) {
            Err(error) => {
                missing.get_or_insert(format!("{disk}: {error}"));
            }
            Ok(on_disk) => {
                found.push(format!("kernel: {} on {} of {disk}", on_disk.path, on_disk.volume));
                let mut refused = None;
                let read = on_disk.read(KERNEL_BYTES_MAX, |piece| {
                    draft.write(Part::Kernel, piece).map_err(|error| {
                        let text = error.to_string();
                        refused = Some(error);
                        io::Error::other(text)
                    })
                });
                if let Some(error) = refused {
                    return Err(error.into());
                }
                read.map_err(|error| {
                    FleetError::Invalid(format!(
                        "{disk}: {} cannot be read: {error}; give the kernel as a file of its own",
                        on_disk.path
                    ))
                })?;
                kernel_found = true;
            }
        }
    }
    if find_kernel && !kernel_found {
        let why = missing.unwrap_or_else(|| "the image has no disk on which a kernel could be".into());
        return Err(FleetError::Invalid(why));
    }
    if !embedded && let Some((file, bytes)) = draft.file(Part::Kernel) {
        let mut head = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX).min(kernel::HEAD_BYTES)];
        // Zeros at the file's end are not written yet: what cannot be read is zeros.
        let mut read = 0;
        while let Some(rest) = head.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, read as u64).map_err(FleetError::io("cannot read the kernel"))? {
                0 => break,
                count => read += count,
            }
        }
        kernel::look(&head).map_err(|what| FleetError::Invalid(format!("the kernel is {what}")))?;
    }
    Ok(found)
}

fn given_up() -> FleetError {
    FleetError::Internal("an import went on after it had failed".into())
}

impl Fleet {
    /// Begins an import.
    pub async fn import_image(&self, request: ImportImage) -> Result<Import, FleetError> {
        id::check_name("an image", &request.name)?;
        check_machine(request.settings.vcpus, request.settings.memory_bytes)?;
        check_command_line(&request.settings.command_line)?;
        check_ready(&request.settings.ready)?;
        if request.disks.len() > DISKS_MAX {
            return Err(FleetError::Invalid(format!(
                "{} disks; the most is {DISKS_MAX}",
                request.disks.len()
            )));
        }
        if request.embedded && request.find_kernel {
            return Err(FleetError::Invalid(
                "an image has either the embedded test guest's kernel or the one on its disks".into(),
            ));
        }
        if let Some(disk) = request.disks.iter().find(|disk| disk.name.len() > DISK_NAME_BYTES_MAX) {
            return Err(FleetError::Invalid(format!(
                "a disk's name of {} bytes; the most is {DISK_NAME_BYTES_MAX}",
                disk.name.len()
            )));
        }
        let permit = Arc::clone(&self.images.imports).try_acquire_owned().map_err(|_| FleetError::Limit {
            what: "image imports under way",
            limit: IMPORTS_MAX,
            hint: "wait for one to end",
        })?;
        let brought = request.embedded || request.find_kernel;
        let mut lengths = vec![(Part::Kernel, if brought { 0 } else { request.kernel_bytes }, 0)];
        lengths.extend(request.module.map(|_| (Part::Module, request.module_bytes, 0)));
        lengths.extend(request.disks.iter().enumerate().map(|(n, disk)| (Part::Disk(n), disk.bytes, 0)));
        let (embedded, find_kernel) = (request.embedded, request.find_kernel);
        let names = request.disks.iter().map(|disk| disk.name.clone()).collect();
        let store = Arc::clone(&self.images.store);
        let draft = blocking(move || {
            let mut draft = store.begin(settings_in(request))?;
            if embedded {
                draft.write(Part::Kernel, TEST_GUEST)?;
            }
            Ok::<_, store::StoreError>(Box::new(draft))
        })
        .await??;
        Ok(Import {
            draft: Some(draft),
            embedded,
            find_kernel,
            lengths,
            names,
            events: self.events.clone(),
            _permit: permit,
        })
    }

    /// All sound images, by name.
    pub fn list_images(&self) -> Vec<Described> {
        let mut images: Vec<Described> = Vec::new();
        for listed in self.images.store.list() {
            match listed {
                Listed::Whole(image) => images.push(describe(&image)),
                Listed::Damaged { id, problem } => tracing::warn!(id, problem, "an image is damaged"),
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        images
    }

    /// One image.
    pub fn image(&self, name: &str) -> Result<Described, FleetError> {
        Ok(describe(&*self.images.store.get(name)?))
    }

    /// Removes an image; VMs and snapshots keep what they have.
    pub async fn delete_image(&self, name: &str) -> Result<(), FleetError> {
        let (store, key) = (Arc::clone(&self.images.store), name.to_owned());
        blocking(move || store.delete(&key)).await??;
        self.events.tell(|| Event::new(Kind::Image, Change::Gone, name, Some(name)));
        Ok(())
    }
}

fn describe(image: &Image) -> Described {
    let manifest = image.manifest();
    let bytes = |part| manifest.file(part).map_or(0, |entry| entry.bytes);
    let disks = manifest.settings.disks.iter().enumerate();
    Described {
        name: manifest.settings.name.clone(),
        settings: settings_out(&manifest.settings),
        module: manifest.settings.module.map(module_out),
        disks: disks.map(|(n, disk)| (disk.read_only, bytes(Part::Disk(n)))).collect(),
        kernel_bytes: bytes(Part::Kernel),
        module_bytes: if manifest.settings.module.is_some() { bytes(Part::Module) } else { 0 },
        embedded: manifest.settings.embedded,
        created_unix_ms: unix_ms(&manifest.created).unwrap_or_default(),
        found: Vec::new(),
    }
}

// === the store's words ===

fn settings_in(request: ImportImage) -> store::Settings {
    let disks = request.disks.iter().enumerate();
    store::Settings {
        name: request.name,
        protocol: match request.settings.protocol {
            BootProtocol::Auto => None,
            BootProtocol::FreeBsd => Some(Protocol::FreeBsd),
            BootProtocol::Pvh => Some(Protocol::Pvh),
            BootProtocol::Linux => Some(Protocol::Linux),
        },
        hardware: match request.settings.hardware {
            Hardware::Auto => None,
            Hardware::Microvm => Some(store::Hardware::Microvm),
            Hardware::Pc => Some(store::Hardware::Pc),
        },
        agent_port: match request.settings.agent_port {
            AgentPort::Virtio => None,
            AgentPort::Serial => Some(store::AgentPort::Serial),
        },
        module: request.module.map(|module| match module {
            ModuleKind::MemoryDisk => store::ModuleKind::MemoryDisk,
            ModuleKind::Initrd => store::ModuleKind::Initrd,
        }),
        command_line: request.settings.command_line,
        vcpus: request.settings.vcpus,
        memory_bytes: request.settings.memory_bytes,
        ready: match request.settings.ready {
            ReadyPoint::Console(pattern) => Ready::Console(pattern),
            ReadyPoint::Port(port) => Ready::Port(port),
            ReadyPoint::Agent => Ready::Agent,
        },
        disks: disks
            .map(|(n, disk)| store::DiskSettings {
                read_only: disk.read_only,
                serial: format!("coldspark-{n}"),
            })
            .collect(),
        embedded: request.embedded,
    }
}

fn settings_out(settings: &store::Settings) -> Settings {
    Settings {
        protocol: match settings.protocol {
            None => BootProtocol::Auto,
            Some(Protocol::FreeBsd) => BootProtocol::FreeBsd,
            Some(Protocol::Pvh) => BootProtocol::Pvh,
            Some(Protocol::Linux) => BootProtocol::Linux,
        },
        hardware: match settings.hardware {
            None => Hardware::Auto,
            Some(store::Hardware::Microvm) => Hardware::Microvm,
            Some(store::Hardware::Pc) => Hardware::Pc,
        },
        agent_port: match settings.agent_port {
            None | Some(store::AgentPort::Virtio) => AgentPort::Virtio,
            Some(store::AgentPort::Serial) => AgentPort::Serial,
        },
        command_line: settings.command_line.clone(),
        vcpus: settings.vcpus,
        memory_bytes: settings.memory_bytes,
        ready: match &settings.ready {
            Ready::Console(pattern) => ReadyPoint::Console(pattern.clone()),
            Ready::Port(port) => ReadyPoint::Port(*port),
            Ready::Agent => ReadyPoint::Agent,
        },
    }
}

fn module_out(module: store::ModuleKind) -> ModuleKind {
    match module {
        store::ModuleKind::MemoryDisk => ModuleKind::MemoryDisk,
        store::ModuleKind::Initrd => ModuleKind::Initrd,
    }
}
