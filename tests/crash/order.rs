//! Whether a sequence of system calls is safe against a loss of power: a kill loses nothing that was written, a power failure all that was not synced.
//!
//! Three rules. Before a name is moved to where it counts, everything under it is synced: contents by an fsync of the file after its last
//! change, names by an fsync of their folder after the last change of names in it. Before files of a folder that was moved away are removed,
//! the move is synced. And at the end nothing is left to be synced, but what the next opening removes in any case.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use crate::tracer::{Call, Effect};

/// Checks the calls of an operation that went well. `durable`: whether it promises to be on the disk when it has come back.
pub fn check(calls: &[Call], durable: bool) -> Result<(), String> {
    // Files and folders that have changed since their last sync.
    let mut dirty: BTreeSet<PathBuf> = BTreeSet::new();
    for (at, call) in calls.iter().enumerate() {
        let Some(path) = call.paths.last() else { continue };
        match call.effect {
            Effect::Change => drop(dirty.insert(path.clone())),
            Effect::Sync => drop(dirty.remove(path)),
            Effect::Make => {
                dirty.insert(folder_of(path));
                // A new file is synced for itself; a link's content is what it was linked from, synced or not.
                if !call.name.starts_with("mkdir") {
                    dirty.insert(path.clone());
                }
            }
            Effect::Remove => {
                if is_trash(path)
                    && path.iter().count() > 1
                    && let Some(folder) =
                        dirty.iter().find(|dirty| path.starts_with(dirty) && !is_trash(dirty))
                {
                    return Err(format!(
                        "call {}: {} is removed before its renaming in {folder:?} is synced",
                        at + 1,
                        path.display()
                    ));
                }
                dirty.remove(path);
                if !is_trash(path) {
                    dirty.insert(folder_of(path));
                }
            }
            Effect::Rename => {
                let from = &call.paths[0];
                if let Some(unsynced) = dirty.iter().find(|dirty| dirty.starts_with(from)) {
                    return Err(format!(
                        "call {}: {} becomes {} while {unsynced:?} is not synced",
                        at + 1,
                        from.display(),
                        path.display()
                    ));
                }
                dirty.insert(folder_of(from));
                dirty.insert(folder_of(path));
            }
        }
    }
    dirty.retain(|path| !is_trash(path));
    match durable && !dirty.is_empty() {
        true => Err(format!("at its end these are not synced: {dirty:?}")),
        false => Ok(()),
    }
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

/// What the next opening removes.
fn is_trash(path: &Path) -> bool {
    let first = path.iter().next().and_then(|name| name.to_str()).unwrap_or_default();
    first.starts_with(".tmp-")
        || first.starts_with(".trash-")
        || first.ends_with(".new")
        || first.ends_with(".gone")
}
