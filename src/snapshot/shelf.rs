//! What the two stores have in common: a [`Folder`] of things, each with an id, maybe a name, one JSON document that tells what
//! it is, and files of which the document gives length and sum.
//!
//! The index is in memory; the disk is read when the store is opened. A thing whose document cannot be used does not
//! keep the others from being used: it is listed with its problem, and can be deleted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    cause::Cause,
    folder::{self, FileError, Folder, OpenError, Temporary, failed},
    limits,
    manifest::{FileEntry, ManifestError, check_name},
    sums::{Sum, SumKind},
};

/// Why a store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("there is no {kind} {key:?}: `{kind} ls` shows those that are there")]
    NotFound { kind: &'static str, key: String },
    #[error("there already is a {kind} {key:?}: delete it first, or choose another name")]
    Taken { kind: &'static str, key: String },
    #[error("the store is full: it has {count} {kind}s; delete some")]
    Full { kind: &'static str, count: usize },
    #[error(
        "{kind} {id} is damaged: {path}: {problem}; bring the file back from a backup, or delete the {kind}"
    )]
    Damaged { kind: &'static str, id: String, path: String, problem: String },
    #[error("{kind} {id} cannot be read: {source}")]
    Format { kind: &'static str, id: String, source: ManifestError },
    #[error(
        "the {kind} {id} is not trusted: {problem}; have it signed by somebody who is, or trust its key (--trusted-keys)"
    )]
    NotTrusted { kind: &'static str, id: String, problem: String },
    #[error(
        "the {kind} would not be trusted: {problem}; serve with --sign-key and a key that is one of --trusted-keys"
    )]
    NoTrustedKey { kind: &'static str, problem: String },
    #[error("the {kind} is refused: {source}")]
    Refused { kind: &'static str, source: ManifestError },
    #[error("the {kind} is refused: {problem}")]
    Content { kind: &'static str, problem: String },
    #[error(
        "the {kind} is refused: its file {path} could still be written to {waited_s} s after it was finished, so it could be changed when others use it; end the VM, whose worker may have been taken over by its guest (or stop the program that has files of the service's data folder open for writing)"
    )]
    StillWritten { kind: &'static str, path: String, waited_s: u64 },
    /// What reading its document gave when the store was opened.
    #[error("{0}")]
    Unusable(Arc<StoreError>),
}

impl StoreError {
    /// The kind of this failure.
    pub fn cause(&self) -> Cause {
        match self {
            StoreError::Open(OpenError::Locked(_)) | StoreError::StillWritten { .. } => Cause::WrongState,
            StoreError::Open(OpenError::File(error)) | StoreError::File(error) => Cause::of_io(&error.source),
            StoreError::NotFound { .. } => Cause::NotFound,
            StoreError::Taken { .. } => Cause::AlreadyExists,
            StoreError::Full { .. } => Cause::Exhausted,
            StoreError::Damaged { .. } => Cause::Damaged,
            StoreError::Format { source, .. } => source.cause(),
            StoreError::Refused { .. } | StoreError::Content { .. } => Cause::InvalidInput,
            StoreError::NotTrusted { .. } | StoreError::NoTrustedKey { .. } => Cause::NotTrusted,
            StoreError::Unusable(error) => error.cause(),
        }
    }
}

/// What is in a store.
#[derive(Debug)]
pub enum Listed<T> {
    /// Can be used, as far as its document tells.
    Whole(Arc<T>),
    /// Cannot, for the reason given.
    Damaged { id: String, problem: String },
}

/// What verifying has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    pub files: usize,
    /// Lengths of the files, holes included.
    pub bytes: u64,
}

/// A thing that a store holds.
pub trait Item: Sized {
    /// "snapshot"
    const KIND: &'static str;
    /// What its store knows and reading needs.
    type With;
    /// What its ids begin with.
    const ID_PREFIX: &'static str;

    /// Files beside those that were published, which [`Stored::write_advice`] replaces.
    const ADVICE: &'static [&'static str];

    /// Reads the document in the folder of `stored`, and checks it.
    fn read(stored: Stored, with: &Self::With) -> Result<Self, StoreError>;

    /// Its name, if it has one.
    fn name(&self) -> Option<&str>;
}

/// A store of things.
#[derive(Debug)]
pub struct Shelf<T> {
    folder: Folder,
    index: Mutex<Index<T>>,
}

#[derive(Debug)]
struct Index<T> {
    whole: BTreeMap<String, Arc<T>>,
    /// Things whose document cannot be used, and why.
    damaged: BTreeMap<String, Arc<StoreError>>,
    /// Names of things that are being made.
    reserved: BTreeSet<String>,
}

/// An entry taken out of the index.
enum Entry<T> {
    Whole(Arc<T>),
    Damaged(Arc<StoreError>),
}

// === impl Shelf ===

impl<T: Item> Shelf<T> {
    /// Opens the folder (see [`Folder::open`]) and reads what is in it.
    pub fn open(path: &Path, with: &T::With) -> Result<Shelf<T>, StoreError> {
        let folder = Folder::open(path)?;
        let mut index = Index { whole: BTreeMap::new(), damaged: BTreeMap::new(), reserved: BTreeSet::new() };
        let ids = folder.names()?.into_iter().filter(|name| folder::is_id(T::ID_PREFIX, name));
        for id in ids.take(limits::ENTRIES_MAX) {
            let stored = Stored { kind: T::KIND, path: folder.path_of(&id), id: id.clone() };
            for name in T::ADVICE {
                // It harms nobody; should it not go now, the next opening tries again.
                let _ = folder::remove_half_replaced(&stored.path.join(name));
            }
            match T::read(stored, with) {
                Ok(item) => drop(index.whole.insert(id, Arc::new(item))),
                Err(error) => drop(index.damaged.insert(id, Arc::new(error))),
            }
        }
        Ok(Shelf { folder, index: Mutex::new(index) })
    }

    fn index(&self) -> MutexGuard<'_, Index<T>> {
        // Every change under the lock is one map operation, so a panic elsewhere leaves nothing half-done.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything, by id; damaged things last.
    pub fn list(&self) -> Vec<Listed<T>> {
        let index = self.index();
        let whole = index.whole.values().map(|item| Listed::Whole(Arc::clone(item)));
        let damaged = index.damaged.iter();
        let damaged =
            damaged.map(|(id, problem)| Listed::Damaged { id: id.clone(), problem: problem.to_string() });
        whole.chain(damaged).collect()
    }

    /// Finds a thing by its id or its name.
    pub fn get(&self, key: &str) -> Result<Arc<T>, StoreError> {
        let index = self.index();
        if let Some(item) = index.whole.get(key).or_else(|| index.named(key).map(|(_, item)| item)) {
            return Ok(Arc::clone(item));
        }
        Err(match index.damaged.get(key) {
            Some(problem) => StoreError::Unusable(Arc::clone(problem)),
            None => StoreError::NotFound { kind: T::KIND, key: key.to_string() },
        })
    }

    /// Whether the name is one, and free.
    pub fn check_name(&self, name: &str) -> Result<(), StoreError> {
        let checked = check_name(name).map_err(|problem| ManifestError::Field { field: "name", problem });
        checked.map_err(|source| StoreError::Refused { kind: T::KIND, source })?;
        self.index().check_free(name)
    }

    /// Keeps a name for the caller until the result is dropped.
    pub fn reserve(self: &Arc<Self>, name: &str) -> Result<Reserved<T>, StoreError> {
        self.check_name(name)?;
        let mut index = self.index();
        // Again, under the lock that also takes it.
        index.check_free(name)?;
        index.reserved.insert(name.to_string());
        Ok(Reserved { shelf: Arc::clone(self), name: name.to_string() })
    }

    /// An empty folder to make the thing `id` in.
    pub fn begin(&self, id: &str) -> Result<Temporary, StoreError> {
        {
            let index = self.index();
            if index.whole.contains_key(id) || index.damaged.contains_key(id) {
                return Err(StoreError::Taken { kind: T::KIND, key: id.to_string() });
            }
            let count = index.whole.len() + index.damaged.len();
            if count >= limits::ENTRIES_MAX {
                return Err(StoreError::Full { kind: T::KIND, count });
            }
        }
        Ok(self.folder.begin(id)?)
    }

    /// Makes it visible, on disk and then in the index.
    pub fn publish(
        &self,
        temporary: Temporary,
        id: &str,
        item: impl FnOnce(Stored) -> T,
    ) -> Result<Arc<T>, StoreError> {
        let stored = Stored { kind: T::KIND, path: self.folder.path_of(id), id: id.to_string() };
        let item = Arc::new(item(stored));
        // Not under the lock: who looks a thing up must not wait for a disk.
        self.folder.publish(temporary, id)?;
        self.index().whole.insert(id.to_string(), Arc::clone(&item));
        Ok(item)
    }

    /// Deletes a thing, whole or damaged; returns its id. Files that somebody has open stay until they are closed.
    pub fn delete(&self, key: &str) -> Result<String, StoreError> {
        let taken = self.index().take(key);
        let (id, entry) =
            taken.ok_or_else(|| StoreError::NotFound { kind: T::KIND, key: key.to_string() })?;
        let deleted = self.folder.delete(&id);
        // What is still in its place is still there.
        if deleted.is_err() && self.folder.path_of(&id).exists() {
            let mut index = self.index();
            match entry {
                Entry::Whole(item) => drop(index.whole.insert(id.clone(), item)),
                Entry::Damaged(problem) => drop(index.damaged.insert(id.clone(), problem)),
            }
        }
        deleted?;
        Ok(id)
    }
}

// === impl Index ===

impl<T: Item> Index<T> {
    fn named(&self, name: &str) -> Option<(&String, &Arc<T>)> {
        self.whole.iter().find(|(_, item)| item.name() == Some(name))
    }

    fn take(&mut self, key: &str) -> Option<(String, Entry<T>)> {
        if let Some((id, problem)) = self.damaged.remove_entry(key) {
            return Some((id, Entry::Damaged(problem)));
        }
        let id = match self.whole.contains_key(key) {
            true => key.to_string(),
            false => self.named(key)?.0.clone(),
        };
        self.whole.remove_entry(&id).map(|(id, item)| (id, Entry::Whole(item)))
    }

    fn check_free(&self, name: &str) -> Result<(), StoreError> {
        match self.named(name).is_some() || self.reserved.contains(name) {
            true => Err(StoreError::Taken { kind: T::KIND, key: name.to_string() }),
            false => Ok(()),
        }
    }
}

/// A name that nobody else can take.
#[derive(Debug)]
pub struct Reserved<T: Item> {
    shelf: Arc<Shelf<T>>,
    name: String,
}

impl<T: Item> Drop for Reserved<T> {
    fn drop(&mut self) {
        self.shelf.index().reserved.remove(&self.name);
    }
}

/// Where a published thing lies.
#[derive(Debug, Clone)]
pub struct Stored {
    kind: &'static str,
    path: PathBuf,
    id: String,
}

impl Stored {
    /// The thing's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// An error that names the thing and the file.
    pub fn damaged(&self, path: &str, problem: impl Into<String>) -> StoreError {
        let (kind, id) = (self.kind, self.id.clone());
        StoreError::Damaged { kind, id, path: path.to_string(), problem: problem.into() }
    }

    /// Opens a file and checks its length.
    pub fn open(&self, entry: &FileEntry) -> Result<File, StoreError> {
        let path = self.path.join(&entry.path);
        let file = folder::open_file(&path).map_err(|error| match error.source.kind() {
            io::ErrorKind::NotFound => self.damaged(&entry.path, "it is missing"),
            _ => StoreError::File(error),
        })?;
        let bytes = file.metadata().map_err(failed(&path, "read"))?.len();
        match bytes == entry.bytes {
            true => Ok(file),
            false => {
                Err(self.damaged(&entry.path, format!("it has {bytes} bytes instead of {}", entry.bytes)))
            }
        }
    }

    /// Reads a file that [`open`](Self::open) gave and holds it against its sum.
    pub fn check_sum(&self, file: &File, entry: &FileEntry) -> Result<(), StoreError> {
        let sum = Sum::of_file(file, entry.sum, entry.bytes);
        match sum.map_err(failed(&self.path.join(&entry.path), "read"))? == entry.blake3 {
            true => Ok(()),
            false => Err(self.damaged(&entry.path, "its content is not what was published (BLAKE3 differs)")),
        }
    }

    /// Reads all files. The error names the first that is damaged.
    pub fn verify(&self, entries: &[FileEntry]) -> Result<Verified, StoreError> {
        let mut bytes: u64 = 0;
        for entry in entries {
            self.check_sum(&self.open(entry)?, entry)?;
            bytes = bytes.saturating_add(entry.bytes);
        }
        Ok(Verified { files: entries.len(), bytes })
    }

    /// Reads a small file that no document lists. `None`: there is none.
    pub fn read_advice(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, StoreError> {
        match folder::read_small(&self.path.join(name), bytes_max) {
            Ok(Some(bytes)) => Ok(Some(bytes)),
            Ok(None) => Err(self.damaged(name, format!("it has more than {bytes_max} bytes"))),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes one: whole or not at all.
    pub fn write_advice(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        Ok(folder::replace_small(&self.path.join(name), bytes)?)
    }

    /// Bytes that the files take on disk, hard links counted as if they were its own.
    pub fn disk_usage_bytes(&self, entries: &[FileEntry]) -> Result<u64, StoreError> {
        use std::os::unix::fs::MetadataExt;
        entries.iter().try_fold(0u64, |sum, entry| {
            let path = self.path.join(&entry.path);
            let blocks = path.symlink_metadata().map_err(failed(&path, "read"))?.blocks();
            Ok(sum.saturating_add(blocks.saturating_mul(512)))
        })
    }
}

/// The entry of a file in the making.
pub fn entry_of(
    temporary: &Temporary,
    path: &str,
    file: &File,
    sum: SumKind,
) -> Result<FileEntry, FileError> {
    let read = || -> io::Result<(u64, Sum)> {
        let bytes = file.metadata()?.len();
        Ok((bytes, Sum::of_file(file, sum, bytes)?))
    };
    let (bytes, blake3) = read().map_err(failed(&temporary.path().join(path), "read"))?;
    Ok(FileEntry { path: path.to_string(), bytes, sum, blake3 })
}

/// A JSON document and the file beside it that holds its sum, in the form that `b3sum -c` reads: a changed document must
/// not pass for another one.
#[derive(Debug)]
pub struct Document {
    pub file: &'static str,
    pub sum_file: &'static str,
}

impl Document {
    /// Writes both files, and syncs them.
    pub fn write(&self, temporary: &Temporary, json: &[u8]) -> Result<(), FileError> {
        temporary.write_file(self.file, json)?;
        temporary.write_file(self.sum_file, self.sum_line(json).as_bytes())
    }

    /// Reads the document of `stored` and what `parse` makes of it.
    pub fn read<D>(
        &self,
        stored: &Stored,
        parse: impl FnOnce(&[u8]) -> Result<D, ManifestError>,
    ) -> Result<D, StoreError> {
        let read = |name: &str| -> Result<Vec<u8>, StoreError> {
            let content = folder::read_small(&stored.path.join(name), limits::MANIFEST_BYTES_MAX);
            let content = content.map_err(|error| match error.source.kind() {
                io::ErrorKind::NotFound => stored.damaged(name, "it is missing"),
                _ => StoreError::File(error),
            })?;
            content.ok_or_else(|| stored.damaged(name, "it has more than 1 MiB"))
        };
        let json = read(self.file)?;
        let parsed = match parse(&json) {
            // Another format may sum differently, so its number is looked at first.
            Err(source @ ManifestError::Format { .. }) => {
                return Err(StoreError::Format { kind: stored.kind, id: stored.id.clone(), source });
            }
            other => other,
        };
        if read(self.sum_file)? != self.sum_line(&json).as_bytes() {
            let problem = format!("its content is not what was published ({} differs)", self.sum_file);
            return Err(stored.damaged(self.file, problem));
        }
        parsed.map_err(|error| stored.damaged(self.file, error.to_string()))
    }

    fn sum_line(&self, json: &[u8]) -> String {
        format!("{}  {}\n", Sum::of_bytes(json), self.file)
    }
}
