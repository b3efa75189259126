//! Functions: a command that is run in a fresh clone of a snapshot, for each invocation.
//!
//! | module | what it holds |
//! |---|---|
//! | [`settings`] | what a function is, its limits, its file |
//! | [`function`] | one function: turns, and the VMs that wait for another invocation |
//! | [`deploy`] | making one: an image is booted and prepared, and frozen |
//! | [`invoke`] | running one |
//!
//! A function's VMs come from a pool of its own ([`super::pools`]), which keeps as many ready as are asked for, none if nothing is.

#![forbid(unsafe_code)]

pub mod deploy;
pub mod function;
pub mod invoke;
pub mod settings;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use function::{Function, Look};
use settings::{Made, Settings, Stored};

use super::Fleet;
use super::error::FleetError;
use super::events::{Change, Event, Kind};
use super::pools::FUNCTION_PREFIX;
use super::stored::Files;
use super::tasks::{blocking, to_its_end};

/// All functions.
#[derive(Debug)]
pub struct Functions {
    table: Mutex<BTreeMap<String, Arc<Function>>>,
    files: Arc<Files>,
    /// What the files said, until [`begin`](Self::begin).
    stored: Mutex<Vec<(String, Stored)>>,
    /// Changes of the table and its files, one at a time. Not held while a deployment is prepared, which may take an hour.
    changing: tokio::sync::Mutex<()>,
}

impl Functions {
    /// Reads what functions there are.
    pub fn open(path: PathBuf) -> Result<Self, FleetError> {
        let files = Files::open(path, "a function")?;
        let found = files.read_all(Stored::check);
        for problem in found.problems {
            tracing::error!(
                problem,
                "a function's file cannot be used and is left as it is: there is no such function"
            );
        }
        Ok(Self {
            table: Mutex::default(),
            files: Arc::new(files),
            stored: Mutex::new(found.things),
            changing: tokio::sync::Mutex::new(()),
        })
    }

    /// Makes the functions that were stored, and begins to keep their pools. Snapshots of deployments that came to no end are removed.
    pub fn begin(&self, fleet: &Arc<Fleet>) {
        let stored = std::mem::take(&mut *self.stored.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, stored) in stored {
            self.put(fleet, &name, stored.made.clone(), stored.settings());
        }
        for (snapshot, function) in fleet.snapshots.of_functions() {
            // One whose function's file is damaged is somebody's still.
            let known = self.lock().get(&function).map(|function| function.made());
            if known.is_some_and(|made| made.snapshot != snapshot) {
                let fleet = Arc::clone(fleet);
                tokio::spawn(async move { remove_snapshot(&fleet, &snapshot).await });
            }
        }
    }

    /// A function by this name, new or changed; gives what it was made of before.
    fn put(&self, fleet: &Arc<Fleet>, name: &str, made: Made, settings: Settings) -> Option<Made> {
        let mut table = self.lock();
        match table.get(name) {
            Some(function) => Some(function.change(fleet, made, settings)),
            None => {
                let pool_name = format!("{FUNCTION_PREFIX}{name}");
                let pool = fleet.pools.add(fleet, &pool_name, settings.pool(made.snapshot.clone()));
                table.insert(name.to_owned(), Function::new(name, made, settings, pool));
                None
            }
        }
    }

    fn get(&self, name: &str) -> Result<Arc<Function>, FleetError> {
        let found = self.lock().get(name).cloned();
        found.ok_or_else(|| FleetError::NotFound { what: "function", name: name.chars().take(80).collect() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Function>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fleet {
    pub fn function(&self, name: &str) -> Result<Look, FleetError> {
        Ok(self.functions.get(name)?.look())
    }

    /// All functions, by name.
    pub fn functions(&self) -> Vec<Look> {
        self.functions.lock().values().map(|function| function.look()).collect()
    }

    /// Forgets a function, with the snapshot that was made for it. Invocations that run go on to their ends.
    pub async fn delete_function(self: &Arc<Self>, name: &str) -> Result<(), FleetError> {
        let (fleet, name) = (Arc::clone(self), name.to_owned());
        to_its_end(async move { fleet.forget_function(&name).await }).await
    }

    async fn forget_function(self: &Arc<Self>, name: &str) -> Result<(), FleetError> {
        let _changing = self.functions.changing.lock().await;
        let function = self.functions.get(name)?;
        let (files, file) = (Arc::clone(&self.functions.files), name.to_owned());
        blocking(move || files.remove(&file)).await??;
        self.functions.lock().remove(name);
        function.close(self);
        self.pools.drop_added(self, &function.pool.name);
        let made = function.made();
        if made.own {
            remove_snapshot(self, &made.snapshot).await;
        }
        self.events.tell(|| Event::new(Kind::Function, Change::Gone, name, Some(name)));
        Ok(())
    }

    async fn write_function(&self, name: &str, made: &Made, settings: &Settings) -> Result<(), FleetError> {
        let (files, name) = (Arc::clone(&self.functions.files), name.to_owned());
        let stored = Stored::new(made, settings);
        blocking(move || files.write(&name, &stored)).await?
    }
}

/// Removes a snapshot that was made for a function. If it cannot be, the next service tries again.
async fn remove_snapshot(fleet: &Arc<Fleet>, snapshot: &str) {
    if let Err(error) = fleet.delete_snapshot(snapshot).await {
        tracing::warn!(%error, snapshot, "a function's snapshot could not be removed");
    }
}
