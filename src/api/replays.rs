//! Requests that are sent again: a client that lost the answer gets it again, and nothing is done twice.
//!
//! These answers end with this process. What an earlier one has answered is in the records of its VMs ([`crate::fleet::claims`]), and is
//! asked for before.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prost::Message;
use tokio::sync::OnceCell;
use tonic::Status;

use super::status::invalid;
use crate::fleet::claims::{Earlier, KEPT_FOR, another};
use crate::fleet::error::FleetError;

/// Longest request id.
const ID_BYTES_MAX: usize = 64;
/// Most answers kept, and their bytes; beyond that the oldest go.
const ENTRIES_MAX: usize = 4096;
const BYTES_MAX: usize = 64 << 20;

/// Answers of one method by the ids of the requests.
#[derive(Debug)]
pub struct Replays<T>(Mutex<Table<T>>);

#[derive(Debug)]
struct Table<T> {
    entries: HashMap<String, Arc<Entry<T>>>,
    /// Ids in the order of their first requests.
    order: VecDeque<(Instant, String)>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry<T> {
    asked: Box<[u8]>,
    begun: Instant,
    /// Empty while the first request is under way, and after it failed.
    answer: OnceCell<T>,
}

/// What an earlier daemon answered besides the VMs.
pub fn kept_answer<T: Message + Default>(earlier: &Earlier) -> Result<T, Status> {
    let damaged = |_| FleetError::Internal("a kept answer is damaged".to_owned());
    Ok(T::decode(&earlier.answer[..]).map_err(damaged)?)
}

impl<T> Default for Replays<T> {
    fn default() -> Self {
        let table = Table { entries: HashMap::new(), order: VecDeque::new(), bytes: 0 };
        Self(Mutex::new(table))
    }
}

impl<T: Message + Clone + Send + Sync> Replays<T> {
    /// Does `work`, unless a request with this id and the same content has been answered: then gives that answer. While the first is under way the
    /// second waits for it; if the first fails, or its caller goes away, the second does the work. An empty `id` is none.
    pub async fn once(
        &self,
        id: &str,
        asked: &[u8],
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.once_while(id, asked, work, |_| true).await
    }

    /// As [`once`](Self::once), as long as an answer that is there `holds`; otherwise the work is done again.
    pub async fn once_while(
        &self,
        id: &str,
        asked: &[u8],
        work: impl Future<Output = Result<T, Status>>,
        holds: impl Fn(&T) -> bool,
    ) -> Result<T, Status> {
        if id.is_empty() {
            return work.await;
        }
        if id.len() > ID_BYTES_MAX {
            return Err(invalid(format!("a request id of {} bytes; the most is {ID_BYTES_MAX}", id.len())));
        }
        let entry = self.entry(id, asked, holds);
        if *entry.asked != *asked {
            return Err(invalid(another(id)));
        }
        let mut is_ours = false;
        let answer = entry.answer.get_or_try_init(|| async {
            is_ours = true;
            work.await
        });
        let answer = answer.await?.clone();
        if is_ours {
            self.lock().answered(id, &entry, answer.encoded_len());
        }
        Ok(answer)
    }

    fn entry(&self, id: &str, asked: &[u8], holds: impl Fn(&T) -> bool) -> Arc<Entry<T>> {
        let now = Instant::now();
        let mut table = self.lock();
        table.forget(|when, entries, _| now.duration_since(when) > KEPT_FOR || entries >= ENTRIES_MAX);
        if let Some(entry) = table.entries.get(id) {
            if entry.answer.get().is_none_or(holds) {
                return Arc::clone(entry);
            }
            table.drop_entry(id);
        }
        let entry = Arc::new(Entry { asked: asked.into(), begun: now, answer: OnceCell::new() });
        table.entries.insert(id.to_owned(), Arc::clone(&entry));
        table.order.push_back((now, id.to_owned()));
        table.weigh(asked.len());
        entry
    }

    fn lock(&self) -> MutexGuard<'_, Table<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Message> Table<T> {
    fn weigh(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.forget(|_, _, bytes| bytes > BYTES_MAX);
    }

    /// This entry has an answer now, which is kept only if the entry is still.
    fn answered(&mut self, id: &str, entry: &Arc<Entry<T>>, bytes: usize) {
        if self.entries.get(id).is_some_and(|kept| Arc::ptr_eq(kept, entry)) {
            self.weigh(bytes);
        }
    }

    fn drop_entry(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            let bytes = entry.asked.len() + entry.answer.get().map_or(0, Message::encoded_len);
            self.bytes = self.bytes.saturating_sub(bytes);
        }
    }

    /// Drops the oldest while `wanted` by its time, the number of entries, and their bytes.
    fn forget(&mut self, wanted: impl Fn(Instant, usize, usize) -> bool) {
        while let Some((when, _)) = self.order.front()
            && wanted(*when, self.entries.len(), self.bytes)
            && let Some((when, id)) = self.order.pop_front()
        {
            // A later request may have taken the id.
            if self.entries.get(&id).is_some_and(|entry| entry.begun == when) {
                self.drop_entry(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::proto::EchoResult;

    fn answer(text: &str) -> EchoResult {
        EchoResult { data: text.as_bytes().to_vec().into() }
    }

    #[tokio::test]
    async fn the_second_request_gets_the_first_answer() {
        let replays = Replays::default();
        assert_eq!(replays.once("a", b"x", async { Ok(answer("1")) }).await.unwrap(), answer("1"));
        let never = async { panic!("done twice") };
        assert_eq!(replays.once("a", b"x", never).await.unwrap(), answer("1"));
        assert_eq!(replays.once("b", b"x", async { Ok(answer("2")) }).await.unwrap(), answer("2"));
        assert_eq!(replays.once("", b"x", async { Ok(answer("3")) }).await.unwrap(), answer("3"));
        assert_eq!(replays.once("", b"x", async { Ok(answer("4")) }).await.unwrap(), answer("4"));
    }

    #[tokio::test]
    async fn another_request_with_the_same_id_and_ids_that_are_too_long_are_refused() {
        let replays = Replays::default();
        replays.once("a", b"x", async { Ok(answer("1")) }).await.unwrap();
        let refused = replays.once("a", b"y", async { Ok(answer("2")) }).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(replays.once(&"a".repeat(65), b"x", async { Ok(answer("2")) }).await.is_err());
    }

    #[tokio::test]
    async fn what_failed_is_done_again_and_what_was_given_up_too() {
        let replays = Arc::new(Replays::default());
        replays.once("a", b"x", async { Err(Status::aborted("no")) }).await.unwrap_err();
        assert_eq!(replays.once("a", b"x", async { Ok(answer("1")) }).await.unwrap(), answer("1"));
        let first = {
            let replays = Arc::clone(&replays);
            tokio::spawn(async move { replays.once("b", b"x", std::future::pending()).await })
        };
        let second = {
            let replays = Arc::clone(&replays);
            tokio::spawn(async move { replays.once("b", b"x", async { Ok(answer("2")) }).await })
        };
        tokio::task::yield_now().await;
        first.abort();
        assert_eq!(second.await.unwrap().unwrap(), answer("2"));
    }

    #[tokio::test]
    async fn an_answer_that_does_not_hold_any_more_is_no_answer() {
        let replays = Replays::default();
        let again = |text| {
            replays.once_while("a", b"x", async move { Ok(answer(text)) }, |kept| *kept != answer("1"))
        };
        assert_eq!(again("1").await.unwrap(), answer("1"));
        assert_eq!(again("2").await.unwrap(), answer("2"));
        assert_eq!(again("3").await.unwrap(), answer("2"));
        let table = replays.lock();
        assert_eq!((table.entries.len(), table.bytes), (1, 1 + answer("2").encoded_len()));
    }

    #[tokio::test]
    async fn what_is_answered_after_it_was_forgotten_is_not_counted() {
        let replays = Arc::new(Replays::default());
        let (tell, told) = tokio::sync::oneshot::channel();
        let slow = {
            let replays = Arc::clone(&replays);
            tokio::spawn(async move { replays.once("slow", b"x", async { Ok(told.await.unwrap()) }).await })
        };
        tokio::task::yield_now().await;
        for n in 0..ENTRIES_MAX {
            replays.once(&n.to_string(), b"x", async { Ok(answer("1")) }).await.unwrap();
        }
        assert!(!replays.lock().entries.contains_key("slow"));
        let before = replays.lock().bytes;
        tell.send(answer("2")).unwrap();
        assert_eq!(slow.await.unwrap().unwrap(), answer("2"));
        assert_eq!(replays.lock().bytes, before);
    }

    #[tokio::test]
    async fn old_answers_go_when_there_are_too_many_or_they_are_too_large() {
        let replays = Replays::default();
        for n in 0..ENTRIES_MAX + 10 {
            replays.once(&n.to_string(), b"x", async { Ok(answer("1")) }).await.unwrap();
        }
        assert_eq!(replays.lock().entries.len(), ENTRIES_MAX);
        let large = answer(&"x".repeat(1 << 20));
        for n in 0..100 {
            replays.once(&format!("large {n}"), b"x", async { Ok(large.clone()) }).await.unwrap();
        }
        let table = replays.lock();
        assert!(table.bytes <= BYTES_MAX && table.entries.len() == table.order.len());
        let counted: usize = table
            .entries
            .values()
            .map(|entry| entry.asked.len() + entry.answer.get().unwrap().encoded_len())
            .sum();
        assert_eq!(table.bytes, counted);
    }
}
