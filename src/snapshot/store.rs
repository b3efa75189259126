//! The folder of published snapshots.
//!
//! The life of a snapshot: [`SnapshotStore::begin`] gives a [`Draft`] with empty state and memory files for the worker to fill and
//! takes the disks in; [`Draft::publish`] sums, syncs and renames, so that the snapshot exists whole or not at all;
//! [`SnapshotStore::get`] finds it by id or name; [`Snapshot::open_for_restore`] opens and checks its files once, and
//! every clone after that is given the same open files; [`SnapshotStore::delete`] takes it away, running clones
//! keeping what they have open.
//!
//! No async here: calls that touch the disk block, `publish` and `verify` for as long as reading the data takes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::SystemTime,
};

use super::{
    cause::Cause,
    folder::{self, Folder, Temporary, failed},
    limits,
    manifest::{
        self, DISKS_FOLDER, FORMAT, Facts, FileEntry, MEMORY_FILE, Manifest, ManifestError, Refusal,
        STATE_FILE, SnapshotId,
    },
    memory::pager::{PagerError, PagerSource},
    sums::{Sum, SumKind},
    transfer,
};

pub use super::folder::{FileError, OpenError};

/// The manifest's file name.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Sums of the manifest, as `b3sum -c` reads them: a damaged manifest must not pass for another one.
pub const MANIFEST_SUM_FILE: &str = "manifest.b3";

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("there is no snapshot {0:?}: `snapshot ls` shows those that are there")]
    NotFound(String),
    #[error("there already is a snapshot named {0:?}: delete it first, or choose another name")]
    NameTaken(String),
    #[error("there already is a snapshot {0}")]
    IdTaken(SnapshotId),
    #[error("the store is full: it has {0} snapshots; delete some")]
    Full(usize),
    #[error("snapshot {id} is damaged: {path}: {problem}; restore it from a backup or delete it")]
    Damaged { id: String, path: String, problem: String },
    #[error("snapshot {id} cannot be read: {source}")]
    Format { id: String, source: ManifestError },
    #[error("the snapshot cannot be published: {0}")]
    Facts(ManifestError),
    #[error("the snapshot cannot be published: {0}")]
    Draft(String),
    #[error("the snapshot {0}")]
    Refused(#[from] Refusal),
}

impl StoreError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            StoreError::Open(OpenError::Locked(_)) => Cause::WrongState,
            StoreError::Open(OpenError::File(error)) | StoreError::File(error) => Cause::of_io(&error.source),
            StoreError::NotFound(_) => Cause::NotFound,
            StoreError::NameTaken(_) | StoreError::IdTaken(_) => Cause::AlreadyExists,
            StoreError::Full(_) => Cause::Exhausted,
            StoreError::Damaged { .. } => Cause::Damaged,
            StoreError::Format { source, .. } => source.cause(),
            StoreError::Facts(_) | StoreError::Draft(_) => Cause::InvalidInput,
            StoreError::Refused(_) => Cause::Unsupported,
        }
    }
}

/// The store. Shared by `Arc`; every method may be called from any thread.
#[derive(Debug)]
pub struct SnapshotStore {
    folder: Folder,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    whole: BTreeMap<SnapshotId, Arc<Snapshot>>,
    /// Folders whose manifest cannot be used, and why.
    damaged: BTreeMap<SnapshotId, String>,
    /// Names of drafts that are being published.
    reserved: BTreeSet<String>,
}

/// What is in the store.
#[derive(Debug, Clone)]
pub enum Listed {
    /// Can be restored, as far as its manifest tells.
    Whole(Arc<Snapshot>),
    /// Cannot, for the reason given.
    Damaged { id: SnapshotId, problem: String },
}

/// What [`SnapshotStore::verify`] has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    pub files: usize,
    /// Lengths of the files, holes included.
    pub bytes: u64,
}

// === impl SnapshotStore ===

impl SnapshotStore {
    /// Opens, and if need be creates, the store in `path`, removes what a crash left half-made, and reads the
    /// manifests. One that is damaged does not keep the others from being used: see [`SnapshotStore::list`].
    pub fn open(path: &Path) -> Result<SnapshotStore, StoreError> {
        let folder = Folder::open(path)?;
        let mut index = Index::default();
        let ids = folder.names()?.into_iter().filter_map(|name| name.parse::<SnapshotId>().ok());
        for id in ids.take(limits::ENTRIES_MAX) {
            match Snapshot::read(folder.path_of(id.as_str()), &id) {
                Ok(snapshot) => {
                    index.whole.insert(id, Arc::new(snapshot));
                }
                Err(error) => {
                    index.damaged.insert(id, error.to_string());
                }
            }
        }
        Ok(SnapshotStore { folder, index: Mutex::new(index) })
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Every change under the lock is one map operation, so a panic elsewhere leaves nothing half-done.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything in the store, by id; damaged ones last.
    pub fn list(&self) -> Vec<Listed> {
        let index = self.index();
        let whole = index.whole.values().map(|snapshot| Listed::Whole(Arc::clone(snapshot)));
        let damaged = index.damaged.iter();
        let damaged =
            damaged.map(|(id, problem)| Listed::Damaged { id: id.clone(), problem: problem.clone() });
        whole.chain(damaged).collect()
    }

    /// Finds a snapshot by its id or its name.
    pub fn get(&self, id_or_name: &str) -> Result<Arc<Snapshot>, StoreError> {
        let index = self.index();
        if let Ok(id) = id_or_name.parse::<SnapshotId>() {
            if let Some(snapshot) = index.whole.get(&id) {
                return Ok(Arc::clone(snapshot));
            }
            if let Some(problem) = index.damaged.get(&id) {
                return Err(StoreError::Damaged {
                    id: id.to_string(),
                    path: MANIFEST_FILE.into(),
                    problem: problem.clone(),
                });
            }
        }
        let named = index.whole.values().find(|snapshot| snapshot.name() == Some(id_or_name));
        named.cloned().ok_or_else(|| StoreError::NotFound(id_or_name.to_string()))
    }

    /// Whether a snapshot could be given this name, so that a request can be refused before the work is done.
    pub fn check_name(&self, name: &str) -> Result<(), StoreError> {
        manifest::check_name(name)
            .map_err(|problem| StoreError::Facts(ManifestError::Field { field: "name", problem }))?;
        self.index().check_free(name)
    }

    /// Begins a snapshot. `id` is usually [`SnapshotId::random`].
    pub fn begin(self: &Arc<Self>, id: SnapshotId) -> Result<Draft, StoreError> {
        {
            let index = self.index();
            if index.whole.contains_key(&id) || index.damaged.contains_key(&id) {
                return Err(StoreError::IdTaken(id));
            }
            if index.whole.len() + index.damaged.len() >= limits::ENTRIES_MAX {
                return Err(StoreError::Full(limits::ENTRIES_MAX));
            }
        }
        let temporary = self.folder.begin(id.as_str())?;
        temporary.create_folder(DISKS_FOLDER)?;
        let state = temporary.create_file(STATE_FILE)?;
        let memory = temporary.create_file(MEMORY_FILE)?;
        Ok(Draft { store: Arc::clone(self), id, temporary, state, memory, disks: BTreeMap::new() })
    }

    /// Reads every file of a snapshot and holds it against its sum. The error names the first that is damaged.
    pub fn verify(&self, id_or_name: &str) -> Result<Verified, StoreError> {
        let snapshot = self.get(id_or_name)?;
        // The manifest too: from disk, not from memory.
        Snapshot::read(snapshot.path.clone(), snapshot.id())?;
        let mut bytes = 0;
        for entry in &snapshot.manifest.files {
            let file = snapshot.open_entry(entry)?;
            let sum = Sum::of_file(&file, entry.sum, entry.bytes);
            let sum = sum.map_err(failed(&snapshot.path.join(&entry.path), "read"))?;
            if sum != entry.blake3 {
                return Err(
                    snapshot.damaged(&entry.path, "its content is not what was published (BLAKE3 differs)")
                );
            }
            bytes += entry.bytes;
        }
        Ok(Verified { files: snapshot.manifest.files.len(), bytes })
    }

    /// Deletes a snapshot, whole or damaged. Clones that run from it are not disturbed: their files stay until they close them.
    pub fn delete(&self, id_or_name: &str) -> Result<SnapshotId, StoreError> {
        let taken = self.index().take(id_or_name);
        let (id, entry) = taken.ok_or_else(|| StoreError::NotFound(id_or_name.to_string()))?;
        let deleted = self.folder.delete(id.as_str());
        // Renamed away but not removed is deleted all the same; what is still in its place is still there.
        if deleted.is_err() && self.folder.path_of(id.as_str()).exists() {
            let mut index = self.index();
            match entry {
                Listed::Whole(snapshot) => drop(index.whole.insert(id.clone(), snapshot)),
                Listed::Damaged { problem, .. } => drop(index.damaged.insert(id.clone(), problem)),
            }
        }
        deleted?;
        Ok(id)
    }
}

// === impl Index ===

impl Index {
    /// Finds an entry by id or name and takes it out.
    fn take(&mut self, id_or_name: &str) -> Option<(SnapshotId, Listed)> {
        if let Ok(id) = id_or_name.parse::<SnapshotId>() {
            if let Some(problem) = self.damaged.remove(&id) {
                return Some((id.clone(), Listed::Damaged { id, problem }));
            }
            return self.whole.remove(&id).map(|snapshot| (id, Listed::Whole(snapshot)));
        }
        let named = self.whole.iter().find(|(_, snapshot)| snapshot.name() == Some(id_or_name));
        let id = named.map(|(id, _)| id.clone())?;
        self.whole.remove(&id).map(|snapshot| (id, Listed::Whole(snapshot)))
    }

    fn check_free(&self, name: &str) -> Result<(), StoreError> {
        let taken = self.whole.values().any(|snapshot| snapshot.name() == Some(name));
        match taken || self.reserved.contains(name) {
            true => Err(StoreError::NameTaken(name.to_string())),
            false => Ok(()),
        }
    }
}

// === impl Draft ===

/// A snapshot in the making. Dropped unpublished, nothing of it stays.
#[derive(Debug)]
pub struct Draft {
    store: Arc<SnapshotStore>,
    id: SnapshotId,
    temporary: Temporary,
    state: File,
    memory: File,
    /// Disk files taken in: name, open file, and its sum where it was known before.
    disks: BTreeMap<String, DraftDisk>,
}

#[derive(Debug)]
struct DraftDisk {
    file: File,
    known: Option<FileEntry>,
}

impl Draft {
    /// The id that it will have.
    pub fn id(&self) -> &SnapshotId {
        &self.id
    }

    /// The state file: empty, for the worker to fill.
    pub fn state(&self) -> &File {
        &self.state
    }

    /// The memory file: empty, for the worker to fill.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Takes a disk file (a base, or a frozen layer) in under `name`: as a hard link where that is possible, otherwise as a
    /// copy that keeps the holes. Nobody may write to it any more.
    ///
    /// `known`: the entry of the same, unchanged file in an image or another snapshot, so that it is not read again.
    pub fn link_disk(
        &mut self,
        source: &File,
        name: &str,
        known: Option<&FileEntry>,
    ) -> Result<(), StoreError> {
        manifest::check_file_name(name)
            .map_err(|problem| StoreError::Draft(format!("disk file name {name:?}: {problem}")))?;
        if self.disks.len() >= limits::DISKS_MAX * (limits::LAYERS_MAX + 1) {
            return Err(StoreError::Draft("it has too many disk files".into()));
        }
        let path = self.temporary.path().join(DISKS_FOLDER).join(name);
        transfer::link_or_copy(source, &path).map_err(failed(&path, "created"))?;
        let file = folder::open_file(&path)?;
        let bytes = file.metadata().map_err(failed(&path, "read"))?.len();
        let known = known.filter(|known| known.bytes == bytes).cloned();
        self.disks.insert(name.to_string(), DraftDisk { file, known });
        Ok(())
    }

    /// [`link_disk`](Self::link_disk) for a file that is known by its path.
    pub fn link_disk_at(
        &mut self,
        source: &Path,
        name: &str,
        known: Option<&FileEntry>,
    ) -> Result<(), StoreError> {
        let file = folder::open_file(source)?;
        self.link_disk(&file, name, known)
    }

    /// Publishes: checks the facts, sums the files, syncs everything, renames.
    ///
    /// # Errors
    /// Nothing of the draft stays, and what was published before is untouched.
    pub fn publish(self, facts: Facts) -> Result<Arc<Snapshot>, StoreError> {
        facts.check().map_err(StoreError::Facts)?;
        let store = Arc::clone(&self.store);
        let _reserved = facts.name.clone().map(|name| Reserved::take(&store, name)).transpose()?;
        for file in [&self.state, &self.memory].into_iter().chain(self.disks.values().map(|disk| &disk.file))
        {
            folder::start_writing_out(file);
        }
        let files = self.entries()?;
        let created = manifest::rfc3339_utc(SystemTime::now());
        let manifest = Manifest { format: FORMAT, id: self.id.clone(), created, facts, files };
        manifest.check().map_err(StoreError::Facts)?;
        let json = manifest.to_json().map_err(StoreError::Facts)?;
        for (name, file) in [(STATE_FILE, &self.state), (MEMORY_FILE, &self.memory)] {
            file.sync_all().map_err(failed(&self.temporary.path().join(name), "synced"))?;
        }
        let disks = self.temporary.path().join(DISKS_FOLDER);
        for (name, disk) in &self.disks {
            disk.file.sync_all().map_err(failed(&disks.join(name), "synced"))?;
        }
        folder::sync_folder(&disks)?;
        self.temporary.write_file(MANIFEST_FILE, &json)?;
        self.temporary.write_file(MANIFEST_SUM_FILE, sum_line(&json).as_bytes())?;
        let Draft { id, temporary, .. } = self;
        let path = store.folder.path_of(id.as_str());
        let snapshot = Arc::new(Snapshot { path, manifest: Arc::new(manifest), opened: Mutex::new(None) });
        // Not under the lock: a clone that looks up its snapshot must not wait for a disk.
        store.folder.publish(temporary, id.as_str())?;
        store.index().whole.insert(id, Arc::clone(&snapshot));
        Ok(snapshot)
    }

    fn entries(&self) -> Result<Vec<FileEntry>, StoreError> {
        let mut entries = vec![
            self.entry(STATE_FILE.into(), &self.state, SumKind::Whole)?,
            self.entry(MEMORY_FILE.into(), &self.memory, SumKind::Chunks)?,
        ];
        for (name, disk) in &self.disks {
            let path = manifest::disk_path(name);
            entries.push(match &disk.known {
                Some(known) => FileEntry { path, ..known.clone() },
                None => self.entry(path, &disk.file, SumKind::Chunks)?,
            });
        }
        Ok(entries)
    }

    fn entry(&self, path: String, file: &File, sum: SumKind) -> Result<FileEntry, StoreError> {
        let read = || -> io::Result<(u64, Sum)> {
            let bytes = file.metadata()?.len();
            Ok((bytes, Sum::of_file(file, sum, bytes)?))
        };
        let (bytes, blake3) = read().map_err(failed(&self.temporary.path().join(&path), "read"))?;
        Ok(FileEntry { path, bytes, sum, blake3 })
    }
}

/// A name that no other draft can take while this one is being published.
struct Reserved<'a> {
    store: &'a SnapshotStore,
    name: String,
}

impl<'a> Reserved<'a> {
    fn take(store: &'a SnapshotStore, name: String) -> Result<Reserved<'a>, StoreError> {
        let mut index = store.index();
        index.check_free(&name)?;
        index.reserved.insert(name.clone());
        drop(index);
        Ok(Reserved { store, name })
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.store.index().reserved.remove(&self.name);
    }
}

// === impl Snapshot ===

/// A published snapshot.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    manifest: Arc<Manifest>,
    opened: Mutex<Option<Arc<OpenSnapshot>>>,
}

/// A snapshot's files, open for reading and of the lengths that the manifest says.
#[derive(Debug)]
pub struct OpenSnapshot {
    pub manifest: Arc<Manifest>,
    pub state: File,
    pub memory: Arc<File>,
    /// As in the manifest.
    pub disks: Vec<OpenDisk>,
    pager_source: OnceLock<Arc<PagerSource>>,
}

impl OpenSnapshot {
    /// The memory as the pager reads it; made at the first call.
    pub fn pager_source(&self) -> Result<Arc<PagerSource>, PagerError> {
        if let Some(source) = self.pager_source.get() {
            return Ok(Arc::clone(source));
        }
        // Two first calls at once look at the file twice, and one result is kept.
        let source = Arc::new(PagerSource::new(Arc::clone(&self.memory))?);
        Ok(Arc::clone(self.pager_source.get_or_init(|| source)))
    }
}

/// A disk's files.
#[derive(Debug)]
pub struct OpenDisk {
    pub base: File,
    /// The lowest first.
    pub layers: Vec<File>,
}

impl Snapshot {
    fn read(path: PathBuf, id: &SnapshotId) -> Result<Snapshot, StoreError> {
        let damaged = |path: &str, problem: String| StoreError::Damaged {
            id: id.to_string(),
            path: path.into(),
            problem,
        };
        let read = |name: &str| -> Result<Vec<u8>, StoreError> {
            let content = folder::read_small(&path.join(name), limits::MANIFEST_BYTES_MAX);
            let content = content.map_err(|error| match error.source.kind() {
                io::ErrorKind::NotFound => damaged(name, "it is missing".into()),
                _ => StoreError::File(error),
            })?;
            content.ok_or_else(|| damaged(name, "it has more than 1 MiB".into()))
        };
        let json = read(MANIFEST_FILE)?;
        // Another format may sum differently, so its number is looked at first.
        let manifest = match Manifest::parse(&json) {
            Err(source @ ManifestError::Format(_)) => {
                return Err(StoreError::Format { id: id.to_string(), source });
            }
            other => other,
        };
        if read(MANIFEST_SUM_FILE)? != sum_line(&json).as_bytes() {
            let problem = format!("its content is not what was published ({MANIFEST_SUM_FILE} differs)");
            return Err(damaged(MANIFEST_FILE, problem));
        }
        let manifest = manifest.map_err(|error| damaged(MANIFEST_FILE, error.to_string()))?;
        if manifest.id != *id {
            return Err(damaged(MANIFEST_FILE, format!("it is the manifest of {}", manifest.id)));
        }
        Ok(Snapshot { path, manifest: Arc::new(manifest), opened: Mutex::new(None) })
    }

    /// The id.
    pub fn id(&self) -> &SnapshotId {
        &self.manifest.id
    }

    /// The name given by the user.
    pub fn name(&self) -> Option<&str> {
        self.manifest.facts.name.as_deref()
    }

    /// The manifest, read and checked.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Bytes that the snapshot takes on disk, hard links counted as if they were its own.
    pub fn disk_usage_bytes(&self) -> Result<u64, StoreError> {
        use std::os::unix::fs::MetadataExt;
        self.manifest.files.iter().try_fold(0u64, |sum, entry| {
            let path = self.path.join(&entry.path);
            let blocks = path.symlink_metadata().map_err(failed(&path, "read"))?.blocks();
            Ok(sum.saturating_add(blocks.saturating_mul(512)))
        })
    }

    /// The snapshot's files. The first call opens them and checks their lengths, and the sum of the state; every further one
    /// hands out the same, so that a clone opens nothing by path and checks nothing twice.
    pub fn open_for_restore(&self) -> Result<Arc<OpenSnapshot>, StoreError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*opened {
            return Ok(Arc::clone(open));
        }
        let open = Arc::new(self.open()?);
        *opened = Some(Arc::clone(&open));
        Ok(open)
    }

    /// Closes the files, once the last clone is done with them; the next restore opens and checks anew.
    pub fn close(&self) {
        *self.opened.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn open(&self) -> Result<OpenSnapshot, StoreError> {
        let by_path = |path: &str| -> Result<File, StoreError> {
            let entry = self
                .manifest
                .file(path)
                .ok_or_else(|| self.damaged(path, "the manifest does not list it"))?;
            self.open_entry(entry)
        };
        let state = by_path(STATE_FILE)?;
        if let Some(entry) = self.manifest.file(STATE_FILE) {
            let sum = Sum::of_file(&state, entry.sum, entry.bytes);
            if sum.map_err(failed(&self.path.join(STATE_FILE), "read"))? != entry.blake3 {
                return Err(
                    self.damaged(STATE_FILE, "its content is not what was published (BLAKE3 differs)")
                );
            }
        }
        let memory = Arc::new(by_path(MEMORY_FILE)?);
        let disk_file = |name: &String| by_path(&manifest::disk_path(name));
        let mut disks = Vec::with_capacity(self.manifest.facts.disks.len());
        for disk in &self.manifest.facts.disks {
            let layers = disk.layers.iter().map(disk_file).collect::<Result<_, _>>()?;
            disks.push(OpenDisk { base: disk_file(&disk.base)?, layers });
        }
        Ok(OpenSnapshot {
            manifest: Arc::clone(&self.manifest),
            state,
            memory,
            disks,
            pager_source: OnceLock::new(),
        })
    }

    /// Opens a file and checks its length.
    fn open_entry(&self, entry: &FileEntry) -> Result<File, StoreError> {
        let path = self.path.join(&entry.path);
        let file = folder::open_file(&path).map_err(|error| match error.source.kind() {
            io::ErrorKind::NotFound => self.damaged(&entry.path, "it is missing"),
            _ => StoreError::File(error),
        })?;
        let bytes = file.metadata().map_err(failed(&path, "read"))?.len();
        match bytes == entry.bytes {
            true => Ok(file),
            false => {
                Err(self.damaged(&entry.path, &format!("it has {bytes} bytes instead of {}", entry.bytes)))
            }
        }
    }

    fn damaged(&self, path: &str, problem: &str) -> StoreError {
        StoreError::Damaged {
            id: self.id().to_string(),
            path: path.to_string(),
            problem: problem.to_string(),
        }
    }
}

fn sum_line(manifest_json: &[u8]) -> String {
    format!("{}  {MANIFEST_FILE}\n", Sum::of_bytes(manifest_json))
}

#[cfg(test)]
mod tests;
