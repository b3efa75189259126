//! What the service is told to keep (pools, functions) and must know again when it begins anew: one small JSON file each.
//!
//! A change is on the disk when it comes back, or has failed and is undone: what a caller was told had failed must not come to life at the
//! next start. Killed in the middle, it is the one or the other; `tests/crash` tries every moment.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::FleetError;
use super::id;
use crate::snapshot::folder::{self, FileError};

/// Longest file.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Extension of a file that is being removed.
const GONE: &str = "gone";

/// A folder of such files. Each is named after the thing that it holds.
#[derive(Debug)]
pub struct Files {
    path: PathBuf,
    /// "a pool", for errors.
    what: &'static str,
}

/// What was read: by name; and what is wrong with the files that could not be.
#[derive(Debug)]
pub struct Found<T> {
    pub things: Vec<(String, T)>,
    pub problems: Vec<String>,
}

fn failed(error: FileError) -> FleetError {
    FleetError::Io { what: error.to_string(), source: error.source }
}

impl Files {
    /// Makes the folder if need be, and removes what a crash has left half made.
    pub fn open(path: PathBuf, what: &'static str) -> Result<Self, FleetError> {
        fs::create_dir_all(&path)
            .map_err(FleetError::io(format!("cannot make the folder {}", path.display())))?;
        let files = Self { path, what };
        for entry in fs::read_dir(&files.path).into_iter().flatten().flatten() {
            let path = entry.path();
            if files.is_leftover(&path)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(%error, path = %path.display(), "left by a crash, and cannot be removed");
            }
        }
        Ok(files)
    }

    fn is_leftover(&self, path: &Path) -> bool {
        let extension = path.extension().and_then(|extension| extension.to_str());
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        matches!(extension, Some(folder::REPLACEMENT | GONE))
            && stem.is_some_and(|stem| id::check_name(self.what, stem).is_ok())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }

    /// Writes a thing's file, in the place of an older one. It is on the disk when this comes back.
    ///
    /// # Errors
    /// Then all is as it was before.
    pub fn write(&self, name: &str, thing: &impl Serialize) -> Result<(), FleetError> {
        let text =
            serde_json::to_vec_pretty(thing).map_err(|error| FleetError::Internal(error.to_string()))?;
        let path = self.file(name);
        let before = folder::read_small(&path, FILE_BYTES_MAX);
        folder::replace_small(&path, &text).map_err(failed)?;
        folder::sync_folder(&self.path).map_err(|error| {
            let undone = match before {
                Ok(Some(bytes)) => folder::replace_small(&path, &bytes),
                Err(before) if before.source.kind() == io::ErrorKind::NotFound => {
                    fs::remove_file(&path).map_err(folder::failed(&path, "removed"))
                }
                // What was there could not be used.
                Ok(None) | Err(_) => Ok(()),
            };
            if let Err(error) = undone {
                tracing::error!(%error, "a change that has failed could not be undone: the next start will find it");
            }
            failed(error)
        })
    }

    /// Removes a thing's file.
    ///
    /// # Errors
    /// Then it is still there.
    pub fn remove(&self, name: &str) -> Result<(), FleetError> {
        let path = self.file(name);
        let gone = path.with_extension(GONE);
        fs::rename(&path, &gone).map_err(FleetError::io(format!("cannot remove {}", path.display())))?;
        if let Err(error) = folder::sync_folder(&self.path) {
            if let Err(error) = fs::rename(&gone, &path) {
                tracing::error!(%error, path = %path.display(), "a removal that has failed could not be undone");
            }
            return Err(failed(error));
        }
        // Should it not go now, the next start removes it.
        let _ = fs::remove_file(&gone);
        Ok(())
    }

    /// All of them, by name. A file that is damaged, or that `check` refuses, is left as it is, and told.
    pub fn read_all<T: DeserializeOwned>(&self, check: impl Fn(&T) -> Result<(), String>) -> Found<T> {
        let mut found = Found { things: Vec::new(), problems: Vec::new() };
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match self.read(&path).and_then(|(name, thing)| check(&thing).map(|()| (name, thing))) {
                Ok(thing) => found.things.push(thing),
                Err(problem) => found.problems.push(format!("{}: {problem}", path.display())),
            }
        }
        found.things.sort_by(|a, b| a.0.cmp(&b.0));
        found
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<(String, T), String> {
        let name = path.file_stem().and_then(|stem| stem.to_str()).ok_or("its name is none")?.to_owned();
        id::check_name(self.what, &name).map_err(|error| error.to_string())?;
        let content = folder::read_small(path, FILE_BYTES_MAX).map_err(|error| error.to_string())?;
        let content = content.ok_or_else(|| format!("longer than {FILE_BYTES_MAX} bytes"))?;
        Ok((name, serde_json::from_slice(&content).map_err(|error| error.to_string())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn even(number: &u32) -> Result<(), String> {
        if number.is_multiple_of(2) { Ok(()) } else { Err("odd".to_owned()) }
    }

    #[test]
    fn things_outlive_the_service_and_can_be_replaced_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path().join("pools"), "a pool").unwrap();
        files.write("web", &2).unwrap();
        files.write("web", &4).unwrap();
        files.write("a", &6).unwrap();
        let again = Files::open(folder.path().join("pools"), "a pool").unwrap();
        let found = again.read_all(even);
        assert_eq!((found.things, found.problems), (vec![("a".into(), 6), ("web".into(), 4)], vec![]));
        again.remove("web").unwrap();
        assert_eq!(again.read_all(even).things.len(), 1);
        assert!(again.remove("web").is_err());
    }

    #[test]
    fn a_damaged_file_is_told_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path().to_owned(), "a pool").unwrap();
        files.write("good", &2).unwrap();
        for (name, content) in [
            ("empty", String::new()),
            ("odd", "3".to_owned()),
            ("Name", "2".to_owned()),
            ("text", "\"2\"".to_owned()),
            ("long", " ".repeat(FILE_BYTES_MAX as usize + 1)),
        ] {
            fs::write(folder.path().join(format!("{name}.json")), content).unwrap();
        }
        // Another's.
        fs::write(folder.path().join("notes.txt"), "").unwrap();
        let found = files.read_all(even);
        assert_eq!(found.things, [("good".to_owned(), 2)]);
        assert_eq!(found.problems.len(), 5, "{:?}", found.problems);
        assert!(folder.path().join("empty.json").exists());

        // What a crash left goes, and what is not ours stays.
        for name in ["good.new", "even.gone", "Notes.new"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        Files::open(folder.path().to_owned(), "a pool").unwrap();
        let left = |name: &str| folder.path().join(name).exists();
        assert_eq!(["good.new", "even.gone", "Notes.new", "notes.txt"].map(left), [false, false, true, true]);
    }
}
