//! The folder of published snapshots.
//!
//! The life of a snapshot: [`SnapshotStore::begin`] gives a [`Draft`] with empty state and memory files for the worker to
//! fill, and takes the disks in; [`Draft::publish`] sums, syncs and renames, so that the snapshot exists whole or not at
//! all; [`SnapshotStore::get`] finds it by id or name; [`Snapshot::open_for_restore`] opens and checks its files once,
//! and every clone after that is given the same open files; [`SnapshotStore::delete`] takes it away, running clones
//! keeping what they have open.
//!
//! No async here: calls that touch the disk block, `publish` and `verify` for as long as reading the data takes.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Instant, SystemTime},
};

use super::{
    folder::{self, Temporary, failed},
    limits,
    manifest::{
        self, DISKS_FOLDER, FORMAT, Facts, FileEntry, MEMORY_FILE, Manifest, ManifestError, STATE_FILE,
        SnapshotId,
    },
    memory::{
        extents::Extents,
        fold::fold,
        pager::{PagerError, PagerSource},
    },
    shelf::{Document, Item, Shelf, Stored, entry_of},
    signing::{SIGNATURE_FILE, SIGNATURE_FILE_BYTES_MAX, Signature, Signing},
    sums::SumKind,
    transfer,
    working_set::{self, Run, WorkingSet},
    writers,
};

pub use super::{
    folder::{FileError, OpenError},
    shelf::{StoreError, Verified},
};

/// What is in the store.
pub type Listed = super::shelf::Listed<Snapshot>;

const DOCUMENT: Document = Document { file: "manifest.json", sum_file: "manifest.b3" };
const KIND: &str = "snapshot";
/// Beside what the manifest names.
const WORKING_SET_FILE: &str = "working-set.bin";

/// The store. Shared by `Arc`; every method may be called from any thread.
#[derive(Debug)]
pub struct SnapshotStore {
    shelf: Arc<Shelf<Snapshot>>,
    signing: Signing,
}

// === impl SnapshotStore ===

impl SnapshotStore {
    /// Opens, and if need be creates, the store in `path`, removes what a crash left half-made, and reads the
    /// manifests. One that is damaged does not keep the others from being used: see [`SnapshotStore::list`].
    ///
    /// `signing`: what it signs with, and whose snapshots may be used; others are listed, and can be verified and deleted.
    pub fn open(path: &Path, signing: Signing) -> Result<SnapshotStore, StoreError> {
        Ok(SnapshotStore { shelf: Arc::new(Shelf::open(path, &signing)?), signing })
    }

    /// How it signs, and whom it trusts.
    pub fn signing(&self) -> &Signing {
        &self.signing
    }

    /// Everything in the store, by id; damaged ones last.
    pub fn list(&self) -> Vec<Listed> {
        self.shelf.list()
    }

    /// Finds a snapshot by its id or its name.
    pub fn get(&self, id_or_name: &str) -> Result<Arc<Snapshot>, StoreError> {
        self.shelf.get(id_or_name)
    }

    /// Whether a snapshot could be given this name, so that a request can be refused before the work is done.
    pub fn check_name(&self, name: &str) -> Result<(), StoreError> {
        self.shelf.check_name(name)
    }

    /// Begins a snapshot. `id` is usually [`SnapshotId::random`].
    ///
    /// # Errors
    /// Also where it could not be used afterwards, as nobody who is trusted would have signed it.
    pub fn begin(self: &Arc<Self>, id: SnapshotId) -> Result<Draft, StoreError> {
        let own = self.signing.check_own();
        own.map_err(|problem| StoreError::NoTrustedKey { kind: KIND, problem })?;
        let temporary = self.shelf.begin(id.as_str())?;
        temporary.create_folder(DISKS_FOLDER)?;
        let state = temporary.create_file(STATE_FILE)?;
        let memory = temporary.create_file(MEMORY_FILE)?;
        let (shelf, signing) = (Arc::clone(&self.shelf), self.signing.clone());
        Ok(Draft { shelf, signing, id, temporary, state, memory, disks: BTreeMap::new() })
    }

    /// Reads every file of a snapshot and holds it against its sum, and the manifest against its signature. The error names the first that is
    /// damaged. Who has signed it is told, and whoever it is, is not an error.
    pub fn verify(&self, id_or_name: &str) -> Result<(Verified, Signature), StoreError> {
        let snapshot = self.get(id_or_name)?;
        // The manifest too: from disk, not from memory.
        let on_disk = Snapshot::read(snapshot.stored.clone(), &self.signing)?;
        if let Signature::Wrong(problem) = &on_disk.signature {
            return Err(on_disk.stored.damaged(SIGNATURE_FILE, problem.as_str()));
        }
        Ok((snapshot.stored.verify(&snapshot.manifest.files)?, on_disk.signature))
    }

    /// Deletes a snapshot, whole or damaged; returns its id. Clones that run from it are not disturbed: their files
    /// stay until they close them.
    pub fn delete(&self, id_or_name: &str) -> Result<String, StoreError> {
        self.shelf.delete(id_or_name)
    }
}

// === impl Draft ===

/// A snapshot in the making. Dropped unpublished, nothing of it stays.
#[derive(Debug)]
pub struct Draft {
    shelf: Arc<Shelf<Snapshot>>,
    signing: Signing,
    id: SnapshotId,
    temporary: Temporary,
    state: File,
    memory: File,
    /// Disk files taken in, by name.
    disks: BTreeMap<String, DraftDisk>,
}

#[derive(Debug)]
struct DraftDisk {
    file: File,
    /// The entry of the same file elsewhere, where its sum is known already.
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

    /// Takes a disk file (a base, or a frozen layer) in under `name`: as a hard link where that is possible, otherwise as
    /// a copy that keeps the holes. Nobody may write to it any more.
    ///
    /// `known`: the entry of the same, unchanged file in an image or another snapshot, so that it is not read again.
    pub fn link_disk(
        &mut self,
        source: &File,
        name: &str,
        known: Option<&FileEntry>,
    ) -> Result<(), StoreError> {
        self.take_disk(source, name, known, transfer::link_or_copy)
    }

    fn take_disk(
        &mut self,
        source: &File,
        name: &str,
        known: Option<&FileEntry>,
        take: impl FnOnce(&File, &Path) -> std::io::Result<()>,
    ) -> Result<(), StoreError> {
        let refused = |problem: String| StoreError::Content { kind: KIND, problem };
        manifest::check_file_name(name)
            .map_err(|problem| refused(format!("disk file name {name:?} {problem}")))?;
        if self.disks.len() >= limits::DISKS_MAX * (limits::LAYERS_MAX + 1) {
            return Err(refused("it has too many disk files".to_string()));
        }
        let path = self.temporary.path().join(DISKS_FOLDER).join(name);
        take(source, &path).map_err(failed(&path, "created"))?;
        let file = folder::open_file(&path)?;
        let bytes = file.metadata().map_err(failed(&path, "read"))?.len();
        let known = known.filter(|known| known.bytes == bytes).cloned();
        self.disks.insert(name.to_string(), DraftDisk { file, known });
        Ok(())
    }

    /// Takes a copy of a disk file in under `name`, sharing its blocks where the file system can: for one that somebody
    /// may write to later.
    pub fn copy_disk(&mut self, source: &File, name: &str) -> Result<(), StoreError> {
        self.take_disk(source, name, None, transfer::copy_to_new)
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

    /// Publishes: checks the facts, and that nobody can write to the files any more; sums them, syncs everything, renames.
    ///
    /// # Errors
    /// Nothing of the draft stays, and what was published before is untouched.
    pub fn publish(mut self, facts: Facts) -> Result<Arc<Snapshot>, StoreError> {
        let refused = |source: ManifestError| StoreError::Refused { kind: KIND, source };
        facts.check().map_err(refused)?;
        // First of all: what is looked at from here on stays as it is.
        self.end_writing()?;
        self.check_lengths(&facts)?;
        let _reserved = facts.name.as_deref().map(|name| self.shelf.reserve(name)).transpose()?;
        for file in [&self.state, &self.memory].into_iter().chain(self.disks.values().map(|disk| &disk.file))
        {
            folder::start_writing_out(file);
        }
        let files = self.entries()?;
        let created = manifest::rfc3339_utc(SystemTime::now());
        let manifest = Manifest { format: FORMAT, id: self.id.clone(), created, facts, files };
        manifest.check().map_err(refused)?;
        let json = manifest.to_json().map_err(refused)?;
        for (name, file) in [(STATE_FILE, &self.state), (MEMORY_FILE, &self.memory)] {
            file.sync_all().map_err(failed(&self.temporary.path().join(name), "synced"))?;
        }
        let disks = self.temporary.path().join(DISKS_FOLDER);
        for (name, disk) in &self.disks {
            disk.file.sync_all().map_err(failed(&disks.join(name), "synced"))?;
        }
        folder::sync_folder(&disks)?;
        DOCUMENT.write(&self.temporary, &json)?;
        let Draft { shelf, signing, id, temporary, .. } = self;
        let signature = match &signing.key {
            Some(key) => {
                temporary.write_file(SIGNATURE_FILE, key.sign(&json).as_bytes())?;
                Signature::By(key.public())
            }
            None => Signature::None,
        };
        shelf.publish(temporary, id.as_str(), |stored| {
            // Its sums were formed a moment ago.
            Snapshot { summed: true, ..Snapshot::new(stored, manifest, signature, signing) }
        })
    }

    /// Sees to it that nobody has a file of the draft open for writing. The worker that wrote them is not trusted: what it could change after
    /// they are summed it could change under clones.
    fn end_writing(&mut self) -> Result<(), StoreError> {
        let folder = self.temporary.path();
        for (name, file) in [(STATE_FILE, &mut self.state), (MEMORY_FILE, &mut self.memory)] {
            *file = folder::open_file(&folder.join(name))?;
        }
        let until = Instant::now() + writers::PATIENCE;
        let own = [(STATE_FILE.to_owned(), &self.state), (MEMORY_FILE.to_owned(), &self.memory)];
        let disks = self.disks.iter().map(|(name, disk)| (manifest::disk_path(name), &disk.file));
        for (name, file) in own.into_iter().chain(disks) {
            let path = folder.join(&name);
            if !writers::wait_for_none(file, &path, until).map_err(failed(&path, "leased"))? {
                let waited_s = writers::PATIENCE.as_secs();
                return Err(StoreError::StillWritten { kind: KIND, path: name, waited_s });
            }
        }
        Ok(())
    }

    /// Lengths before sums: the worker that wrote the files is not trusted, and summing an endless hole would take
    /// forever.
    fn check_lengths(&self, facts: &Facts) -> Result<(), StoreError> {
        let disks = self.temporary.path().join(DISKS_FOLDER);
        let length =
            |file: &File, path: &Path| file.metadata().map(|data| data.len()).map_err(failed(path, "read"));
        let refused = |problem: String| Err(StoreError::Content { kind: KIND, problem });
        let state_bytes = length(&self.state, Path::new(STATE_FILE))?;
        if !(1..=limits::STATE_BYTES_MAX).contains(&state_bytes) {
            return refused(format!(
                "{STATE_FILE} has {state_bytes} bytes; it must have 1 to {}",
                limits::STATE_BYTES_MAX
            ));
        }
        let (memory_bytes, needed) =
            (length(&self.memory, Path::new(MEMORY_FILE))?, facts.memory.file_bytes());
        if memory_bytes != needed {
            return refused(format!("{MEMORY_FILE} has {memory_bytes} bytes, its regions need {needed}"));
        }
        for (name, disk) in &self.disks {
            let bytes = length(&disk.file, &disks.join(name))?;
            if bytes > limits::DISK_FILE_BYTES_MAX {
                return refused(format!("{name} has {bytes} bytes, more than any disk file can have"));
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<FileEntry>, StoreError> {
        let mut entries = vec![
            entry_of(&self.temporary, STATE_FILE, &self.state, SumKind::Whole)?,
            entry_of(&self.temporary, MEMORY_FILE, &self.memory, SumKind::Chunks)?,
        ];
        for (name, disk) in &self.disks {
            let path = manifest::disk_path(name);
            entries.push(match &disk.known {
                Some(known) => FileEntry { path, ..known.clone() },
                None => entry_of(&self.temporary, &path, &disk.file, SumKind::Chunks)?,
            });
        }
        Ok(entries)
    }
}

// === impl Snapshot ===

/// A published snapshot.
#[derive(Debug)]
pub struct Snapshot {
    stored: Stored,
    manifest: Arc<Manifest>,
    signature: Signature,
    signing: Signing,
    /// By this process, when it was published.
    summed: bool,
    opened: Mutex<Option<Arc<OpenSnapshot>>>,
}

impl Item for Snapshot {
    const KIND: &'static str = KIND;
    type With = Signing;
    const ID_PREFIX: &'static str = SnapshotId::PREFIX;
    const ADVICE: &'static [&'static str] = &[WORKING_SET_FILE];

    fn read(stored: Stored, signing: &Signing) -> Result<Snapshot, StoreError> {
        let line = stored.read_advice(SIGNATURE_FILE, SIGNATURE_FILE_BYTES_MAX);
        // One that cannot be read is a wrong one: without a policy it keeps nobody from using the snapshot.
        let line = line.unwrap_or_else(|error| Some(error.to_string().into_bytes()));
        let mut signature = Signature::None;
        let manifest = DOCUMENT.read(&stored, |json| {
            signature = Signature::judge(line.as_deref(), json);
            Manifest::parse(json)
        })?;
        match manifest.id.as_str() == stored.id() {
            true => Ok(Snapshot::new(stored, manifest, signature, signing.clone())),
            false => Err(stored.damaged(DOCUMENT.file, format!("it is the manifest of {}", manifest.id))),
        }
    }

    fn name(&self) -> Option<&str> {
        Snapshot::name(self)
    }
}

impl Snapshot {
    fn new(stored: Stored, manifest: Manifest, signature: Signature, signing: Signing) -> Snapshot {
        let manifest = Arc::new(manifest);
        Snapshot { stored, manifest, signature, signing, summed: false, opened: Mutex::new(None) }
    }

    /// Who has signed it.
    pub fn signature(&self) -> &Signature {
        &self.signature
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
        self.stored.disk_usage_bytes(&self.manifest.files)
    }

    /// The snapshot's files. The first call opens them and checks their lengths, and the sum of the state; every further
    /// one hands out the same, so that a clone opens nothing by path and checks nothing twice.
    ///
    /// Where only signed snapshots are taken, the first call also checks the signature, before it opens anything, and then all sums: what is
    /// signed are the sums, and a signature that vouches for memory that nobody compared would vouch for nothing. That reads all of it.
    pub fn open_for_restore(&self) -> Result<Arc<OpenSnapshot>, StoreError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*opened {
            return Ok(Arc::clone(open));
        }
        let open = Arc::new(self.open()?);
        *opened = Some(Arc::clone(&open));
        Ok(open)
    }

    /// What was learnt of what its clones touch; nothing if there is no file with it.
    ///
    /// # Errors
    /// The file cannot be used: it is to be learnt anew.
    pub fn working_set(&self) -> Result<WorkingSet, StoreError> {
        let Some(bytes) = self.stored.read_advice(WORKING_SET_FILE, working_set::FILE_BYTES_MAX)? else {
            return Ok(WorkingSet::default());
        };
        WorkingSet::from_bytes(&bytes, self.manifest.facts.memory.file_bytes())
            .map_err(|problem| self.stored.damaged(WORKING_SET_FILE, problem))
    }

    /// Keeps what was learnt, beside the published files.
    pub fn keep_working_set(&self, set: &WorkingSet) -> Result<(), StoreError> {
        let bytes = set
            .to_bytes()
            .map_err(|error| failed(Path::new(WORKING_SET_FILE), "written")(io::Error::other(error)))?;
        self.stored.write_advice(WORKING_SET_FILE, &bytes)
    }

    /// Closes the files, once the last clone is done with them; the next restore opens and checks anew. Does not wait for one that opens them
    /// just now, who wants them open.
    pub fn close(&self) {
        if let Ok(mut opened) = self.opened.try_lock() {
            *opened = None;
        }
    }

    fn open(&self) -> Result<OpenSnapshot, StoreError> {
        let entry = |path: &str| {
            self.manifest.file(path).ok_or_else(|| self.stored.damaged(path, "the manifest does not list it"))
        };
        let trusted = self.signing.check(&self.signature);
        let id = || self.manifest.id.to_string();
        trusted.map_err(|problem| StoreError::NotTrusted { kind: KIND, id: id(), problem })?;
        // The same open files are compared and used.
        let check_all = self.signing.trusted.is_some() && !self.summed;
        let open = |entry: &FileEntry| -> Result<File, StoreError> {
            let file = self.stored.open(entry)?;
            if check_all || entry.path == STATE_FILE {
                self.stored.check_sum(&file, entry)?;
            }
            Ok(file)
        };
        let state = open(entry(STATE_FILE)?)?;
        let memory = Arc::new(open(entry(MEMORY_FILE)?)?);
        let disk_file = |name: &String| open(entry(&manifest::disk_path(name))?);
        let mut disks = Vec::with_capacity(self.manifest.facts.disks.len());
        for disk in &self.manifest.facts.disks {
            let layers = disk.layers.iter().map(disk_file).collect::<Result<_, _>>()?;
            disks.push(OpenDisk { base: disk_file(&disk.base)?, layers });
        }
        let manifest = Arc::clone(&self.manifest);
        Ok(OpenSnapshot { manifest, state, memory, disks, pager_source: OnceLock::new() })
    }
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

/// A disk's files.
#[derive(Debug)]
pub struct OpenDisk {
    pub base: File,
    /// The lowest first.
    pub layers: Vec<File>,
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

    /// Makes the page cache hold the memory in 2 MiB folios, the pieces of `first` before the others, up to `bytes_max` bytes: mapped clones then
    /// fault a hundred times less. Worth doing in the background after publishing, and when a daemon has just started; never
    /// on the road of a clone, for it reads the disk. Returns the bytes folded.
    pub fn fold(&self, first: &[Run], bytes_max: u64) -> Result<u64, StoreError> {
        let folded =
            Extents::of_file(&self.memory).and_then(|extents| fold(&self.memory, &extents, first, bytes_max));
        Ok(folded.map_err(failed(Path::new(MEMORY_FILE), "folded"))?)
    }
}

#[cfg(test)]
mod tests;
