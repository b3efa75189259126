//! The ground that both stores stand on: a folder in which things exist whole or not at all.
//!
//! A thing is made in `.tmp-<id>/`, synced, and renamed to `<id>/`; it is deleted by renaming it to `.trash-<id>/` first.
//! So whatever the moment of a crash, [`Folder::open`] finds only whole things and leftovers that it can tell by
//! their names and removes. One daemon at a time: `.lock` is held with flock(2), which a crash releases.
//!
//! Facts: rename(2) is atomic; a rename is durable after fsync of the folder (ext4, xfs, btrfs).

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::rand::GetRandomFlags;

/// Digits of an id behind its prefix.
const ID_DIGITS: usize = 12;
const TEMPORARY: &str = ".tmp-";
const TRASH: &str = ".trash-";
/// Extension of a small file that is to replace another.
pub const REPLACEMENT: &str = "new";

/// A failed step on a file: which, what, why.
#[derive(Debug, thiserror::Error)]
#[error("{path:?} cannot be {verb}: {source}")]
pub struct FileError {
    pub path: PathBuf,
    /// "opened", "written", ...
    pub verb: &'static str,
    pub source: io::Error,
}

/// For `map_err`.
pub fn failed(path: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError { path: path.to_path_buf(), verb, source }
}

/// `prefix` and 12 random hex digits.
pub fn random_id(prefix: &str) -> String {
    let mut random = [0u8; ID_DIGITS / 2];
    // getrandom(2) gives up to 256 bytes whole, and fails only before the kernel's pool is ready, when it waits.
    let got = rustix::rand::getrandom(&mut random, GetRandomFlags::empty());
    if got != Ok(ID_DIGITS / 2) {
        // A seccomp filter without getrandom. Uniqueness is all that is needed, and `begin` refuses a taken id.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        random.copy_from_slice(&now.as_nanos().to_le_bytes()[..ID_DIGITS / 2]);
    }
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}{digits}")
}

/// Whether `text` is `prefix` and 12 lower-case hex digits.
pub fn is_id(prefix: &str, text: &str) -> bool {
    text.strip_prefix(prefix).is_some_and(|digits| {
        digits.len() == ID_DIGITS && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Whether `text` could be the id of anything.
pub fn looks_like_id(text: &str) -> bool {
    text.split_once('-')
        .is_some_and(|(kind, digits)| matches!(kind, "snap" | "img" | "vm") && is_id("", digits))
}

/// A locked store folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    handle: File,
    /// Locked as long as it is open.
    _lock: Lock,
}

/// Why a folder cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{0:?} is in use by another coldspark: stop it, or choose another folder")]
    Locked(PathBuf),
    #[error(transparent)]
    File(#[from] FileError),
}

/// A file that is locked for one process, with flock(2), for as long as this is held.
///
/// It is unlocked, not only closed: a child that is between its fork and its exec has the same open file, and would keep the lock for
/// that long. (After SIGKILL that moment is left: the lock goes when the last such child has begun its program.)
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Nothing if somebody else has it.
    pub fn of(file: File) -> io::Result<Option<Lock>> {
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What cannot be unlocked goes with its last descriptor.
        let _ = self.0.unlock();
    }
}

impl Folder {
    /// Creates the folder if need be, locks it and removes what a crash left behind.
    pub fn open(path: &Path) -> Result<Folder, OpenError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path, "created"))?;
        let lock_path = path.join(".lock");
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path);
        let lock = lock.map_err(failed(&lock_path, "opened"))?;
        let lock = match Lock::of(lock) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(OpenError::Locked(path.to_path_buf())),
            Err(error) => return Err(failed(&lock_path, "locked")(error).into()),
        };
        let handle = File::open(path).map_err(failed(path, "opened"))?;
        let folder = Folder { path: path.to_path_buf(), handle, _lock: lock };
        let mut leftovers = folder.names()?;
        leftovers.retain(|name| name.starts_with(TEMPORARY) || name.starts_with(TRASH));
        if !leftovers.is_empty() {
            // Their renaming may be in memory only: a loss of power must not bring a name back whose files have gone.
            folder.sync()?;
        }
        for name in leftovers {
            let leftover = folder.path.join(name);
            remove_all(&leftover).map_err(failed(&leftover, "removed"))?;
        }
        Ok(folder)
    }

    /// Names in the folder. Names that are not UTF-8 are none of ours.
    pub fn names(&self) -> Result<Vec<String>, FileError> {
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                names.extend(entry?.file_name().into_string());
            }
            Ok(names)
        };
        read().map_err(failed(&self.path, "listed"))
    }

    /// Where a published thing lies.
    pub fn path_of(&self, id: &str) -> PathBuf {
        self.path.join(id)
    }

    /// An empty folder to make a thing in.
    pub fn begin(&self, id: &str) -> Result<Temporary, FileError> {
        let path = self.path.join(format!("{TEMPORARY}{id}"));
        DirBuilder::new().mode(0o700).create(&path).map_err(failed(&path, "created"))?;
        Ok(Temporary { path, published: false })
    }

    /// Makes `temporary` the published thing `id`, durably. Its files must have been synced.
    ///
    /// # Errors
    /// Then it is not there, also if it was the last sync that failed. Only a disk that does not let it be renamed back either leaves it, and
    /// whole: the next `open` finds it.
    pub fn publish(&self, mut temporary: Temporary, id: &str) -> Result<(), FileError> {
        let to = self.path_of(id);
        sync_folder(&temporary.path)?;
        rename_new(&temporary.path, &to).map_err(failed(&to, "published"))?;
        let synced = self.sync();
        if synced.is_err() && fs::rename(&to, &temporary.path).is_ok() {
            return synced;
        }
        // Never removed file by file under its published name: a crash in the middle would leave a damaged one.
        temporary.published = true;
        synced
    }

    /// Takes a published thing away, and then removes its files. Whoever has them open keeps them.
    ///
    /// # Errors
    /// Then it is still there; unless the disk does not let it be renamed back either.
    pub fn delete(&self, id: &str) -> Result<(), FileError> {
        let (from, trash) = (self.path_of(id), self.path.join(format!("{TRASH}{id}")));
        fs::rename(&from, &trash).map_err(failed(&from, "deleted"))?;
        if let Err(error) = self.sync() {
            // Nothing more can be done where this fails too: the next `open` removes it.
            let _ = fs::rename(&trash, &from);
            return Err(error);
        }
        // From here on it is gone, whatever becomes of its files.
        if let Err(error) = remove_all(&trash) {
            tracing::warn!(%error, path = %trash.display(), "what was deleted still takes room: the next start removes it");
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), FileError> {
        self.handle.sync_all().map_err(failed(&self.path, "synced"))
    }
}

/// A thing in the making; removed on drop unless it was published.
#[derive(Debug)]
pub struct Temporary {
    path: PathBuf,
    published: bool,
}

impl Temporary {
    /// The temporary folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates a folder inside.
    pub fn create_folder(&self, name: &str) -> Result<(), FileError> {
        let path = self.path.join(name);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed(&path, "created"))
    }

    /// Creates an empty file inside, open for reading and writing.
    pub fn create_file(&self, name: &str) -> Result<File, FileError> {
        let path = self.path.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(failed(&path, "created"))
    }

    /// Writes a small file whole, and syncs it.
    pub fn write_file(&self, name: &str, content: &[u8]) -> Result<(), FileError> {
        let mut file = self.create_file(name)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(failed(&self.path.join(name), "written"))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            // What cannot be removed now is removed by the next `Folder::open`.
            let _ = remove_all(&self.path);
        }
    }
}

/// Syncs a folder: the names in it.
pub fn sync_folder(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(failed(path, "synced"))
}

/// Opens a regular file for reading, not following a link.
pub fn open_file(path: &Path) -> Result<File, FileError> {
    // Not blocking: a pipe in the place of a file must not stop the daemon.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let open = || -> io::Result<File> {
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::other("not a regular file")),
        }
    };
    open().map_err(failed(path, "opened"))
}

/// Reads a file of at most `bytes_max` bytes; `None` if it is longer.
pub fn read_small(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, FileError> {
    let file = open_file(path)?;
    let mut content = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut content).map_err(failed(path, "read"))?;
    Ok((content.len() as u64 <= bytes_max).then_some(content))
}

/// Puts a small file in the place of another, or of none: whoever reads it sees the old one or the new one. After a crash it is one of them too,
/// but which is not known: the folder is not synced.
///
/// It is made beside it, with the extension `new`; one that a crash has left goes with [`remove_half_replaced`].
pub fn replace_small(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let new = path.with_extension(REPLACEMENT);
    let write = || -> io::Result<()> {
        // One that a crash left is written over.
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|error| {
        // What cannot be removed now is written over by the next, or removed at the next start.
        let _ = fs::remove_file(&new);
        failed(path, "written")(error)
    })
}

/// Removes what a crash in [`replace_small`] has left beside `path`, if there is anything.
pub fn remove_half_replaced(path: &Path) -> Result<(), FileError> {
    let new = path.with_extension(REPLACEMENT);
    remove_all(&new).map_err(failed(&new, "removed"))
}

/// Starts writing a file's pages to the disk without waiting, so that a later fsync finds little to do.
#[allow(unsafe_code)]
pub fn start_writing_out(file: &File) {
    // Advice: where it is not supported the fsync does all the work.
    // SAFETY: plain integers.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    // rename(2) replaces an empty folder; ids are unique, so an existing target is a mistake worth an error.
    if to.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

fn remove_all(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
