//! What the service is told to keep (pools, functions) and must know again when it begins anew: one small JSON file each.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::FleetError;
use super::id;
use crate::snapshot::folder::{self, FileError};

/// Longest file.
const FILE_BYTES_MAX: u64 = 256 << 10;

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
    pub fn open(path: PathBuf, what: &'static str) -> Result<Self, FleetError> {
        fs::create_dir_all(&path)
            .map_err(FleetError::io(format!("cannot make the folder {}", path.display())))?;
        Ok(Self { path, what })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.json"))
    }

    /// Writes a thing's file, in the place of an older one. It is on the disk when this comes back.
    pub fn write(&self, name: &str, thing: &impl Serialize) -> Result<(), FleetError> {
        let text =
            serde_json::to_vec_pretty(thing).map_err(|error| FleetError::Internal(error.to_string()))?;
        folder::replace_small(&self.file(name), &text)
            .and_then(|()| folder::sync_folder(&self.path))
            .map_err(failed)
    }

    pub fn remove(&self, name: &str) -> Result<(), FleetError> {
        let path = self.file(name);
        fs::remove_file(&path).map_err(FleetError::io(format!("cannot remove {}", path.display())))?;
        folder::sync_folder(&self.path).map_err(failed)
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
        // One that a crash left on its way, and another's.
        fs::write(folder.path().join("good.new"), "").unwrap();
        fs::write(folder.path().join("notes.txt"), "").unwrap();
        let found = files.read_all(even);
        assert_eq!(found.things, [("good".to_owned(), 2)]);
        assert_eq!(found.problems.len(), 5, "{:?}", found.problems);
        assert!(folder.path().join("empty.json").exists());
    }
}
