//! What the next daemon must know of a VM to go on with it: a small file in the VM's folder.
//!
//! It is empty (blanks) until the VM is *settled*: until then the VM is half made, or stands ready in a pool, or runs an invocation whose caller is
//! known to this daemon only; a daemon that finds it so ends it. Settling is one write into a file that is there, just before the caller
//! hears of the VM: it has to outlive this process, not the host, so nothing is synced. Later changes replace the file. Its last byte is a
//! blank; a line feed once somebody has named the VM in a call.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::cgroup::Limits;
use super::claims::{Claim, ClaimRecord};
use super::disks::{FrozenFile, RECORD, RECORD_ROOM, VmDisk};
use super::network::VmNetwork;
use super::owner::Again;
use super::sources::{hello_from_text, hello_text};
use super::vm::{Entropy, Origin, State, Vm};
use crate::agent::Hello;
use crate::snapshot::folder;
use crate::snapshot::manifest::FileEntry;
use crate::worker::protocol::{BootProtocol, BootSpec, DiskSpec, MemoryMode};

/// Version of the file.
const FORMAT: u32 = 1;
/// Longest file.
const BYTES_MAX: u64 = 256 << 10;
/// Its last byte: nobody has named the VM in a call, or somebody has. For JSON both are nothing.
const UNNAMED: u8 = b' ';
const NAMED: u8 = b'\n';

/// A file of this host, whatever its name is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub fn of(file: &File) -> io::Result<Self> {
        let data = file.metadata()?;
        Ok(Self { device: data.dev(), inode: data.ino() })
    }
}

/// A file that a disk of the VM is made of, and what was known of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KnownFile {
    id: FileId,
    known: Option<FileEntry>,
    foreign: bool,
}

/// How to boot it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgainRecord {
    pub spec: BootSpec,
    pub kernel: FileId,
    pub module: Option<FileId>,
}

/// What the file says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    pub name: Option<String>,
    /// That it was taken from.
    pub pool: Option<String>,
    pub origin: Origin,
    pub kernel: String,
    pub ready: String,
    pub vcpus: u8,
    pub memory_bytes: u64,
    pub generation: Option<[u8; 16]>,
    pub host_name: String,
    #[serde(default)]
    pub entropy: Entropy,
    pub memory_mode: Option<MemoryMode>,
    pub networks: Vec<VmNetwork>,
    #[serde(default)]
    pub limits: Limits,
    pub created_unix_ms: u64,
    pub number: u64,
    pub protocol: Option<BootProtocol>,
    pub start_us: u64,
    pub restarts: u32,
    hello: Option<String>,
    /// The disks as they were at the VM's start.
    disks: Vec<DiskSpec>,
    /// All that they may be made of.
    files: Vec<KnownFile>,
    /// The memory file of a clone whose page faults the daemon answers.
    pub memory: Option<FileId>,
    pub again: Option<AgainRecord>,
    /// The request that it was made for, if that has an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimRecord>,
    /// All VMs of the request, itself among them, if there are several: they are their caller's all together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub siblings: Vec<String>,
    /// Somebody has named it in a call.
    #[serde(skip)]
    pub named: bool,
}

/// What is settled together with a VM.
#[derive(Debug, Default)]
pub struct Settled {
    /// With the answer besides the VMs.
    pub claim: Option<(Claim, Vec<u8>)>,
    /// As in [`Record`].
    pub siblings: Vec<String>,
}

/// What all versions of the file have.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

/// Why a record cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("its record is damaged: {0}")]
    Damaged(String),
    #[error("its record is of version {0}, and this program knows {FORMAT}")]
    OtherVersion(u32),
}

impl Record {
    /// `None`: the VM was not settled.
    pub fn read(folder: &Path) -> Result<Option<Self>, Unreadable> {
        let damaged = |error: &dyn std::fmt::Display| Unreadable::Damaged(error.to_string());
        let path = folder.join(RECORD);
        let bytes = match folder::read_small(&path, BYTES_MAX) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(damaged(&format!("longer than {BYTES_MAX} bytes"))),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(damaged(&error)),
        };
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let head: Head = serde_json::from_slice(&bytes).map_err(|error| damaged(&error))?;
        match head.format {
            FORMAT => {
                let record = serde_json::from_slice(&bytes).map_err(|error| damaged(&error))?;
                Ok(Some(Self { named: bytes.last() == Some(&NAMED), ..record }))
            }
            other => Err(Unreadable::OtherVersion(other)),
        }
    }

    /// What the agent said.
    pub fn hello(&self) -> Option<Arc<Hello>> {
        self.hello.as_deref().and_then(hello_from_text).map(Arc::new)
    }

    /// The VM's disks, of the files that its worker gave. A worker may have been taken over by its guest: only files are taken that were this
    /// VM's, none that it could write to but its overlays, and of the disks only the number of layers is believed.
    pub fn disks(&self, told: &[DiskSpec], files: Vec<File>) -> Result<Vec<VmDisk>, String> {
        if told.len() != self.disks.len() {
            return Err(format!("{} disks, and the record says {}", told.len(), self.disks.len()));
        }
        let mut files = files.into_iter();
        let mut next = || {
            let file = files.next().ok_or("too few files")?;
            let id = FileId::of(&file).map_err(|error| error.to_string())?;
            let known = self.files.iter().find(|known| known.id == id);
            let known = known.ok_or("a file that was not this VM's")?;
            let (known, foreign) = (known.known.clone(), known.foreign);
            Ok::<_, String>(FrozenFile { file: Arc::new(file), known, foreign })
        };
        let mut disks = Vec::with_capacity(told.len());
        let for_reading = |file: FrozenFile| {
            let mode = rustix::fs::fcntl_getfl(&*file.file).map_err(|error| error.to_string())?;
            match mode & OFlags::ACCMODE == OFlags::RDONLY {
                true => Ok(file),
                false => Err("a base or layer of its disks is open for writing".to_owned()),
            }
        };
        for (spec, told) in self.disks.iter().zip(told) {
            let base = next().and_then(|base| if spec.direct { Ok(base) } else { for_reading(base) })?;
            let layers = (0..told.layers).map(|_| next().and_then(for_reading)).collect::<Result<_, _>>()?;
            let overlay = match spec.read_only || spec.direct {
                true => None,
                false => Some(next()?.file),
            };
            disks.push(VmDisk {
                read_only: spec.read_only,
                direct: spec.direct,
                bytes: spec.bytes,
                serial: spec.serial.clone(),
                base,
                layers,
                overlay,
            });
        }
        match files.next() {
            None => Ok(disks),
            Some(_) => Err("too many files".to_owned()),
        }
    }
}

/// A VM's record as its daemon keeps it.
#[derive(Debug)]
pub struct Papers {
    /// `None`: this daemon's VMs end with it.
    path: Option<PathBuf>,
    kept: Mutex<Kept>,
    /// An earlier daemon settled it.
    adopted: bool,
    /// Somebody has named it in a call.
    named: AtomicBool,
}

#[derive(Debug, Default)]
struct Kept {
    claim: Option<ClaimRecord>,
    siblings: Vec<String>,
    disks: Vec<DiskSpec>,
    files: Vec<KnownFile>,
    memory: Option<FileId>,
    again: Option<AgainRecord>,
    /// The empty record, until the VM is settled.
    empty: Option<File>,
    settled: bool,
}

impl Kept {
    /// What its disks might have been made of is forgotten, else the record would grow with every snapshot.
    fn forget_others(&mut self, disks: &[VmDisk]) {
        let of = |disk: &VmDisk| {
            let frozen =
                std::iter::once(&disk.base).chain(&disk.layers).map(|frozen| Arc::clone(&frozen.file));
            frozen.chain(disk.overlay.clone()).collect::<Vec<_>>()
        };
        let ids: io::Result<Vec<FileId>> = disks.iter().flat_map(of).map(|file| FileId::of(&file)).collect();
        // Where one has no number, all are kept.
        if let Ok(ids) = ids {
            self.files.retain(|known| ids.contains(&known.id));
        }
    }
}

impl Papers {
    /// Of a VM that is being made; `folder`: its folder, if it can outlive the daemon, and the empty record in it.
    pub fn new(
        folder: Option<(&Path, Option<File>)>,
        disks: &[VmDisk],
        memory: Option<&File>,
        again: Option<&Again>,
    ) -> io::Result<Self> {
        let Some((folder, empty)) = folder else { return Ok(Self::with(None, Kept::default())) };
        let mut files = Vec::with_capacity(disks.len() * 3);
        for disk in disks {
            for frozen in std::iter::once(&disk.base).chain(&disk.layers) {
                let id = FileId::of(&frozen.file)?;
                files.push(KnownFile { id, known: frozen.known.clone(), foreign: frozen.foreign });
            }
            if let Some(overlay) = &disk.overlay {
                files.push(KnownFile { id: FileId::of(overlay)?, known: None, foreign: false });
            }
        }
        let again = again.map(|again| {
            let module = again.module.as_ref().map(|module| FileId::of(module)).transpose()?;
            Ok::<_, io::Error>(AgainRecord {
                spec: again.spec.clone(),
                kernel: FileId::of(&again.kernel)?,
                module,
            })
        });
        let kept = Kept {
            claim: None,
            siblings: Vec::new(),
            disks: disks.iter().map(VmDisk::spec).collect(),
            files,
            memory: memory.map(FileId::of).transpose()?,
            again: again.transpose()?,
            empty,
            settled: false,
        };
        Ok(Self::with(Some(folder.join(RECORD)), kept))
    }

    fn with(path: Option<PathBuf>, kept: Kept) -> Self {
        Self { path, kept: Mutex::new(kept), adopted: false, named: AtomicBool::new(false) }
    }

    /// Of a VM that was taken over.
    pub fn adopted(folder: &Path, record: &Record) -> Self {
        let kept = Kept {
            claim: record.claim.clone(),
            siblings: record.siblings.clone(),
            disks: record.disks.clone(),
            files: record.files.clone(),
            memory: record.memory,
            again: record.again.clone(),
            empty: None,
            settled: true,
        };
        let named = AtomicBool::new(record.named);
        Self { adopted: true, named, ..Self::with(Some(folder.join(RECORD)), kept) }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    /// The VM is its caller's from now on, and outlives this daemon.
    pub(super) fn settle(&self, settled: Settled) {
        let mut kept = self.papers.lock();
        if let Some(path) = &self.papers.path
            && !kept.settled
        {
            kept.settled = true;
            kept.siblings = settled.siblings;
            if let (Some((claim, answer)), Some(folder)) = (settled.claim, path.parent()) {
                match ClaimRecord::new(claim, &answer, folder) {
                    Ok(claim) => kept.claim = Some(claim),
                    // As if the record could not: a VM whose caller would be given another.
                    Err(error) => return self.written(Err(error)),
                }
            }
            let record = self.record(&kept);
            self.written(match kept.empty.take() {
                // What it is shorter by are blanks behind it.
                Some(empty) if record.len() <= RECORD_ROOM => {
                    let written = empty.write_all_at(&record, 0);
                    match self.papers.named.load(Ordering::Relaxed) {
                        // While it was made: the mark is the file's last byte.
                        true => written.and_then(|()| empty.write_all_at(&[NAMED], RECORD_ROOM as u64 - 1)),
                        false => written,
                    }
                }
                _ => fs::write(path, record),
            });
        }
    }

    /// Somebody has named it in a call, so it is not one of which its caller never heard.
    pub(super) fn has_been_named(&self) {
        if self.papers.named.swap(true, Ordering::Relaxed) {
            return;
        }
        let kept = self.papers.lock();
        if let Some(path) = self.papers.path.as_ref().filter(|_| kept.settled) {
            let mark = || {
                let file = OpenOptions::new().write(true).open(path)?;
                // An empty one is of a VM that could not be settled.
                match file.metadata()?.len().checked_sub(1) {
                    Some(last) => file.write_all_at(&[NAMED], last),
                    None => Ok(()),
                }
            };
            self.written(mark());
        }
    }

    /// It was taken over from an earlier daemon, and nobody has ever named it in a call: its caller may never have heard of it.
    pub fn is_unclaimed(&self) -> bool {
        self.papers.adopted && !self.papers.named.load(Ordering::Relaxed)
    }

    /// Whether it outlives this daemon.
    pub(super) fn is_settled(&self) -> bool {
        self.papers.lock().settled
    }

    /// Something of the record has changed.
    pub(super) fn record_changed(&self) {
        self.replace(&self.papers.lock());
    }

    /// These may become files of its disks.
    pub(super) fn may_have<'a>(&self, files: impl Iterator<Item = &'a File>) {
        let mut kept = self.papers.lock();
        for file in files {
            match FileId::of(file) {
                Ok(id) => kept.files.push(KnownFile { id, known: None, foreign: false }),
                Err(error) => tracing::warn!(vm = %self.id, %error, "a disk's file has no number"),
            }
        }
        self.replace(&kept);
    }

    /// Its disks are made of these files now, and of no others.
    pub(super) fn has(&self, disks: &[VmDisk]) {
        let mut kept = self.papers.lock();
        kept.forget_others(disks);
        self.replace(&kept);
    }

    /// A reset is its end from now on.
    pub(super) fn never_again(&self) {
        let mut kept = self.papers.lock();
        kept.again = None;
        self.replace(&kept);
    }

    fn replace(&self, kept: &Kept) {
        let Some(path) = self.papers.path.as_ref().filter(|_| kept.settled) else { return };
        let new = path.with_extension("new");
        self.written(fs::write(&new, self.record(kept)).and_then(|()| fs::rename(&new, path)));
    }

    fn written(&self, result: io::Result<()>) {
        match result {
            // Its folder went with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(vm = %self.id, %error, "the VM's record cannot be written: it would not outlive the service");
            }
            Ok(()) => {}
        }
    }

    fn record(&self, kept: &Kept) -> Vec<u8> {
        let status = self.status.borrow();
        let record = Record {
            format: FORMAT,
            name: self.name().map(str::to_owned),
            pool: self.pool.as_deref().map(str::to_owned),
            origin: self.origin.clone(),
            kernel: self.kernel.clone(),
            ready: self.ready.clone(),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            generation: self.generation,
            host_name: self.host_name(),
            entropy: self.entropy(),
            memory_mode: self.memory_mode,
            networks: self.networks(),
            limits: self.limits,
            created_unix_ms: self.created_unix_ms,
            number: self.number,
            protocol: status.protocol,
            start_us: status.start_us,
            restarts: status.restarts,
            hello: self.agent.hello().and_then(|hello| hello_text(&hello).ok()),
            disks: kept.disks.clone(),
            files: kept.files.clone(),
            memory: kept.memory,
            again: kept.again.clone(),
            claim: kept.claim.clone(),
            siblings: kept.siblings.clone(),
            named: false,
        };
        // Nothing in it can fail; an empty record says that the VM is half made.
        let mut bytes = serde_json::to_vec(&record).unwrap_or_default();
        bytes.push(if self.papers.named.load(Ordering::Relaxed) { NAMED } else { UNNAMED });
        bytes
    }

    /// The state that it has when it runs.
    pub(super) fn running_state(generation: Option<[u8; 16]>) -> State {
        match generation {
            Some(_) => State::Running,
            None => State::Ready,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::claims::Method;
    use crate::fleet::disks::Next;

    fn file(folder: &Path, name: &str) -> Arc<File> {
        Arc::new(File::create(folder.join(name)).unwrap())
    }

    fn disk(folder: &Path) -> VmDisk {
        let base = FrozenFile { file: file(folder, "base"), known: None, foreign: true };
        VmDisk {
            read_only: false,
            direct: false,
            bytes: 4096,
            serial: "s".into(),
            base,
            layers: Vec::new(),
            overlay: Some(file(folder, "overlay")),
        }
    }

    fn record(papers: &Papers) -> Record {
        let kept = papers.lock();
        Record {
            format: FORMAT,
            name: None,
            pool: None,
            origin: Origin::Embedded,
            kernel: String::new(),
            ready: String::new(),
            vcpus: 1,
            memory_bytes: 1,
            generation: None,
            host_name: String::new(),
            entropy: Entropy::default(),
            memory_mode: None,
            networks: Vec::new(),
            limits: Limits::default(),
            created_unix_ms: 1,
            number: 1,
            protocol: None,
            start_us: 1,
            restarts: 0,
            hello: None,
            disks: kept.disks.clone(),
            files: kept.files.clone(),
            memory: None,
            again: None,
            claim: kept.claim.clone(),
            siblings: kept.siblings.clone(),
            named: false,
        }
    }

    #[test]
    fn what_a_vm_might_have_had_is_forgotten_when_it_is_known_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = disk(folder.path());
        let papers =
            Papers::new(Some((folder.path(), None)), std::slice::from_ref(&disk), None, None).unwrap();
        for n in 0..1000 {
            let overlay = file(folder.path(), &format!("overlay-{n}"));
            let id = FileId::of(&overlay).unwrap();
            papers.lock().files.push(KnownFile { id, known: None, foreign: false });
            let sealed = Arc::clone(disk.overlay.as_ref().unwrap());
            // Only the first and the last had anything in them.
            disk.frozen(n == 0 || n == 999, Next { sealed, overlay });
            papers.lock().forget_others(std::slice::from_ref(&disk));
        }
        let record = record(&papers);
        assert_eq!((disk.layers.len(), record.files.len()), (2, 4));
        let open = |name: &str| File::open(folder.path().join(name)).unwrap();
        let files = ["base", "overlay", "overlay-998", "overlay-999"].map(open);
        let disks = record.disks(&[disk.spec()], files.into()).unwrap();
        assert!(disks[0].base.foreign && disks[0].layers.len() == 2);
    }

    #[test]
    fn a_worker_gets_back_only_files_that_it_had() {
        let folder = tempfile::tempdir().unwrap();
        let disk = disk(folder.path());
        let papers =
            Papers::new(Some((folder.path(), None)), std::slice::from_ref(&disk), None, None).unwrap();
        let record = record(&papers);
        let open = |name: &str| File::open(folder.path().join(name)).unwrap();
        let mut told = vec![disk.spec()];
        let disks = record.disks(&told, vec![open("base"), open("overlay")]).unwrap();
        assert!(disks[0].base.foreign && disks[0].layers.is_empty() && disks[0].overlay.is_some());
        // Its base, but it could be written to.
        let writable = File::options().read(true).write(true).open(folder.path().join("base")).unwrap();
        assert!(record.disks(&told, vec![writable, open("overlay")]).unwrap_err().contains("for writing"));
        // A name for another file, one too few, one too many, another disk.
        file(folder.path(), "secret");
        assert!(record.disks(&told, vec![open("base"), open("secret")]).is_err());
        assert!(record.disks(&told, vec![open("base")]).is_err());
        assert!(record.disks(&told, vec![open("base"), open("overlay"), open("base")]).is_err());
        told.push(disk.spec());
        assert!(record.disks(&told, vec![open("base"), open("overlay")]).is_err());
        // Of what it says of a disk only the layers are believed.
        told.pop();
        told[0].bytes = 1 << 40;
        told[0].layers = 1;
        let disks = record.disks(&told, vec![open("base"), open("overlay"), open("overlay")]).unwrap();
        assert_eq!((disks[0].bytes, disks[0].layers.len()), (4096, 1));
    }

    #[test]
    fn a_record_of_before_claims_is_read_and_the_last_byte_tells_whether_it_was_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(RECORD);
        let mut kept = record(&Papers::new(None, &[], None, None).unwrap());
        let old = serde_json::to_string(&kept).unwrap();
        assert!(!old.contains("claim") && !old.contains("siblings") && !old.contains("named"));
        fs::write(&path, &old).unwrap();
        let read = Record::read(folder.path()).unwrap().unwrap();
        assert!(read.claim.is_none() && read.siblings.is_empty() && !read.named);

        let claim = Claim::new(Method::CloneVm, "again", b"asked").unwrap();
        kept.claim = Some(ClaimRecord::new(claim, b"answered", folder.path()).unwrap());
        kept.siblings = vec!["vm-1".into(), "vm-2".into()];
        for (last, named) in [(UNNAMED, false), (NAMED, true)] {
            let bytes = [serde_json::to_vec(&kept).unwrap(), vec![b' '; 100], vec![last]].concat();
            fs::write(&path, bytes).unwrap();
            let read = Record::read(folder.path()).unwrap().unwrap();
            assert_eq!((read.claim, read.siblings), (kept.claim.clone(), kept.siblings.clone()));
            assert_eq!(read.named, named);
        }
    }

    #[test]
    fn half_a_record_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let read = || Record::read(folder.path());
        assert!(matches!(read(), Ok(None)));
        let path = folder.path().join(RECORD);
        for blanks in [0, RECORD_ROOM] {
            fs::write(&path, vec![b' '; blanks]).unwrap();
            assert!(matches!(read(), Ok(None)));
        }
        let whole = serde_json::to_vec(&record(&Papers::new(None, &[], None, None).unwrap())).unwrap();
        // Written over blanks, as it is when a clone is handed over.
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&whole, 0).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), RECORD_ROOM as u64);
        assert!(matches!(read(), Ok(Some(_))));
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(matches!(read(), Err(Unreadable::Damaged(_))));
        let newer = String::from_utf8(whole).unwrap().replace("\"format\":1", "\"format\":2");
        fs::write(&path, newer).unwrap();
        assert!(matches!(read(), Err(Unreadable::OtherVersion(2))));
    }
}
