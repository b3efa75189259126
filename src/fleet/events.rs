//! What happens in the fleet, for those who watch: made, changed, gone. Nothing is kept for later, and with nobody
//! watching telling costs next to nothing.

use std::sync::Arc;

use tokio::sync::broadcast;
pub use tokio::sync::broadcast::error::RecvError;

use super::pools::stock::Problem;
use super::vm::State;
use super::{Fleet, id};

/// Events that a watcher may be behind; one that is further behind loses the oldest, and is told how many.
const BEHIND_MAX: usize = 4096;

/// What something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Vm,
    Snapshot,
    Image,
    Pool,
    Function,
}

/// What happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It was there before anybody watched.
    Exists,
    Made,
    Changed,
    Gone,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub struct Event {
    pub unix_ms: u64,
    pub kind: Kind,
    pub change: Change,
    /// Its id; where there are only names, its name.
    pub id: String,
    pub name: Option<String>,
    /// Of a VM.
    pub state: Option<State>,
    /// Why a VM has ended.
    pub reason: Option<String>,
    /// The VM stands ready in a pool, nobody's yet.
    pub held: bool,
    /// Why a pool cannot be kept ready.
    pub problem: Option<Problem>,
}

impl Event {
    pub fn new(kind: Kind, change: Change, id: &str, name: Option<&str>) -> Self {
        Self {
            unix_ms: id::unix_ms(),
            kind,
            change,
            id: id.to_owned(),
            name: name.map(str::to_owned),
            state: None,
            reason: None,
            held: false,
            problem: None,
        }
    }
}

/// Where events are told.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Arc<Event>>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(BEHIND_MAX))
    }
}

impl Events {
    /// Tells what `event` makes, if anybody listens.
    pub fn tell(&self, event: impl FnOnce() -> Event) {
        if self.0.receiver_count() > 0 {
            // The last listener may go at this very moment.
            let _ = self.0.send(Arc::new(event()));
        }
    }

    pub fn listen(&self) -> broadcast::Receiver<Arc<Event>> {
        self.0.subscribe()
    }
}

impl Fleet {
    /// What happens from now on.
    pub fn watch(&self) -> broadcast::Receiver<Arc<Event>> {
        self.events.listen()
    }

    /// All that there is, as events.
    pub async fn everything(&self) -> Result<Vec<Event>, super::error::FleetError> {
        let there = |kind, id: &str, name: Option<&str>| Event::new(kind, Change::Exists, id, name);
        let mut all: Vec<Event> = self
            .list_images()
            .iter()
            .map(|image| there(Kind::Image, &image.name, Some(&image.name)))
            .collect();
        let snapshots = self.list_snapshots().await?.whole;
        all.extend(snapshots.iter().map(|one| there(Kind::Snapshot, &one.id, one.name.as_deref())));
        all.extend(self.pools().iter().map(|pool| there(Kind::Pool, &pool.name, Some(&pool.name))));
        all.extend(self.functions().iter().map(|one| there(Kind::Function, &one.name, Some(&one.name))));
        all.extend(self.vms().iter().map(|vm| vm.event(Change::Exists)));
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_listener_is_told_how_much_it_has_lost_and_goes_on() {
        let events = Events::default();
        let tell = |n: usize| events.tell(|| Event::new(Kind::Pool, Change::Made, &n.to_string(), None));
        tell(0);
        let mut listener = events.listen();
        (1..=BEHIND_MAX + 10).for_each(tell);
        assert!(matches!(listener.recv().await, Err(RecvError::Lagged(10))));
        assert_eq!(listener.recv().await.expect("the oldest that is left").id, "11");
    }
}
