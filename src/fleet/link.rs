//! Requests to one worker and its answers, over the control channel.
//!
//! One task reads the channel: answers go to whoever waits for their id, events to the VM's owner. A worker may have been
//! taken over by its guest: an answer that nobody waits for is dropped, and events are taken in at the owner's pace.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::error::FleetError;
use super::limits::{WORKER_EVENTS_MAX, WORKER_TIMEOUT};
use crate::worker::channel::{AsyncChannel, ChannelError};
use crate::worker::protocol::{Event, Fault, FromWorker, Reply, Request, ToWorker};

/// A worker's events, each with the descriptors that its doc names.
pub type Events = mpsc::Receiver<(Event, Vec<OwnedFd>)>;

type Answer = Result<(Reply, Vec<OwnedFd>), Fault>;

/// The daemon's side of a worker's control channel.
#[derive(Debug)]
pub struct Link {
    channel: AsyncChannel,
    next_id: AtomicU64,
    /// `None` once the channel is closed.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

impl Link {
    /// Starts reading. The events end when the worker is gone.
    pub fn start(channel: AsyncChannel) -> (Arc<Self>, Events) {
        let (events_in, events) = mpsc::channel(WORKER_EVENTS_MAX);
        let link =
            Arc::new(Self { channel, next_id: AtomicU64::new(1), pending: Mutex::new(Some(HashMap::new())) });
        tokio::spawn(read(Arc::clone(&link), events_in));
        (link, events)
    }

    /// True when the worker's end is closed: nothing can be asked any more.
    pub fn is_closed(&self) -> bool {
        self.lock().is_none()
    }

    /// Asks and waits at most [`WORKER_TIMEOUT`].
    pub async fn request(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), FleetError> {
        self.request_within(request, fds, WORKER_TIMEOUT).await
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The worker's [`Fault`]; [`ChannelError::Closed`] when it is gone, before or while it worked on this.
    pub async fn request_within(
        &self,
        request: Request,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), FleetError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.lock().as_mut().ok_or(ChannelError::Closed)?.insert(id, sender);
        let _forget = Forget { link: self, id };
        let exchange = async {
            self.channel.send(&ToWorker { id, request }, fds).await?;
            answer.await.map_err(|_| FleetError::Channel(ChannelError::Closed))
        };
        let answer = tokio::time::timeout(within, exchange)
            .await
            .map_err(|_| FleetError::WorkerTimeout(within.as_secs()))??;
        Ok(answer?)
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Most of a worker's words that is told to anybody.
const WORDS_CHARS_MAX: usize = 2000;

/// A worker's words as they may be shown: its guest may have put them there, for somebody's terminal.
pub fn plain(words: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' { '?' } else { c };
    words.chars().take(WORDS_CHARS_MAX).map(shown).collect()
}

/// Leaves nothing waiting when a request is given up.
struct Forget<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.link.lock().as_mut() {
            pending.remove(&self.id);
        }
    }
}

async fn read(link: Arc<Link>, events: mpsc::Sender<(Event, Vec<OwnedFd>)>) {
    loop {
        match link.channel.recv::<FromWorker>().await {
            Ok((FromWorker::Reply { id, result }, fds)) => {
                let result = result.map_err(|fault| Fault { message: plain(&fault.message), ..fault });
                let waiting = link.lock().as_mut().and_then(|pending| pending.remove(&id));
                if let Some(waiting) = waiting {
                    // The one who asked may have gone in this moment; the descriptors are then closed here.
                    let _ = waiting.send(result.map(|reply| (reply, fds)));
                } else {
                    tracing::debug!(id, "a worker answered a request that nobody waits for");
                }
            }
            Ok((FromWorker::Event(event), fds)) => {
                // Nobody listens to the events of a shell that is being thrown away.
                let _ = events.send((event, fds)).await;
            }
            Err(error) => {
                if !matches!(error, ChannelError::Closed) {
                    tracing::warn!(%error, "a worker's control channel is given up");
                }
                *link.lock() = None;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::channel::Channel;
    use crate::worker::protocol::{FaultKind, Stats};

    fn link() -> (Arc<Link>, Events, Channel) {
        let (daemon, worker) = Channel::pair().unwrap();
        let (link, events) = Link::start(AsyncChannel::new(daemon).unwrap());
        (link, events, worker)
    }

    #[tokio::test]
    async fn answers_find_their_questions_in_any_order() {
        let (link, mut events, worker) = link();
        let thread = std::thread::spawn(move || {
            let ids: Vec<u64> = (0..2).map(|_| worker.recv::<ToWorker>().unwrap().0.id).collect();
            worker.send(&FromWorker::Event(Event::ReadyPort { value: 3 }), &[]).unwrap();
            let fault = Fault { kind: FaultKind::WrongState, message: "not\x1b now".into() };
            worker.send(&FromWorker::Reply { id: 999, result: Ok(Reply::Done) }, &[]).unwrap();
            worker.send(&FromWorker::Reply { id: ids[1], result: Err(fault) }, &[]).unwrap();
            worker
                .send(&FromWorker::Reply { id: ids[0], result: Ok(Reply::Stats(Stats::default())) }, &[])
                .unwrap();
            worker
        });
        let (first, second) = {
            let first = link.request(Request::Stats, &[]);
            let second = link.request(Request::Pause, &[]);
            tokio::join!(biased; first, second)
        };
        assert!(matches!(first.unwrap().0, Reply::Stats(_)));
        assert_eq!(second.unwrap_err().to_string(), "not? now");
        assert!(matches!(events.recv().await, Some((Event::ReadyPort { value: 3 }, _))));
        drop(thread.join().unwrap());
        assert!(events.recv().await.is_none());
        assert!(link.is_closed());
    }

    #[tokio::test]
    async fn a_worker_that_dies_answers_everybody() {
        let (link, _events, worker) = link();
        let thread = std::thread::spawn(move || drop(worker.recv::<ToWorker>().unwrap()));
        let error = link.request(Request::Kill, &[]).await.unwrap_err();
        assert!(matches!(error, FleetError::Channel(ChannelError::Closed)));
        thread.join().unwrap();
        let error = link.request(Request::Kill, &[]).await.unwrap_err();
        assert!(matches!(error, FleetError::Channel(ChannelError::Closed)));
    }
}
