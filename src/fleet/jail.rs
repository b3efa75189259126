//! Which layers the workers' jail has on this host: told in the log, and asked before a service begins.

use std::sync::{Mutex, PoisonError};

use super::error::FleetError;
use super::limits::WORKER_TIMEOUT;
use super::process::{Spawner, WorkerProgram};
use crate::worker::channel::AsyncChannel;
use crate::worker::protocol::{Event, Fault, FromWorker, Jail};

/// What was said last, so that only what is new is told.
#[derive(Debug, Default)]
pub struct JailNotes(Mutex<Option<Jail>>);

impl JailNotes {
    /// A worker has told which layers it has.
    pub fn note(&self, jail: Jail) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(&jail) {
            return;
        }
        if jail.active.is_empty() {
            tracing::warn!(
                "workers are NOT jailed: a guest that breaks out of its VM is this user on this host"
            );
        } else {
            tracing::info!(layers = jail.names(), "workers are jailed");
            for (layer, why) in &jail.missing {
                tracing::warn!(layer = layer.name(), why, "the jail of workers lacks a layer");
            }
        }
        *last = Some(jail);
    }
}

/// Starts a worker, hears what it says first, and ends it: whether it may have a VM, and its jail. Must be called in a tokio runtime.
pub async fn probe(program: WorkerProgram) -> Result<(Result<(), Fault>, Jail), FleetError> {
    let spawner = Spawner::start(program)?;
    let (process, channel, _stderr) = spawner.spawn().await?;
    let channel = AsyncChannel::new(channel).map_err(FleetError::io("cannot watch a control socket"))?;
    let first = tokio::time::timeout(WORKER_TIMEOUT, channel.recv::<FromWorker>()).await;
    let answer = match first {
        Ok(Ok((FromWorker::Event(Event::Hello { ready, jail }), _))) => Ok((ready, jail)),
        Ok(Ok(_)) => Err(FleetError::WorkerConfused),
        Ok(Err(_)) => {
            let status = process.ended().await;
            return Err(FleetError::Internal(format!(
                "a worker did not start: {}",
                process.obituary(status)
            )));
        }
        Err(_) => Err(FleetError::WorkerTimeout(WORKER_TIMEOUT.as_secs())),
    };
    process.kill();
    process.ended().await;
    answer
}
