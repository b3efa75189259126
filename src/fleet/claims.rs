//! Requests that made VMs, by the ids that their callers gave them: what a VM's record keeps of one, and how the next daemon finds the VMs when
//! the request is sent again.
//!
//! As long as a daemon lives it keeps its own answers (`api::replays`). A request is written into the records of its VMs as they are settled,
//! before the caller can hear of them; so whatever the caller has heard, the next daemon knows what it asked for and what it got.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::FleetError;
use super::record::Record;
use super::snapshots::{Described, describe};
use super::tasks::blocking;
use super::vm::{State, Vm};
use super::{Fleet, id};
use crate::snapshot::folder;
use crate::snapshot::store::Listed;

/// How long a request that is sent again gets the first one's answer.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

/// Longest answer that is in the record itself, which is a page (`disks::RECORD_ROOM`); a longer one is a file beside it.
const INLINE_BYTES_MAX: usize = 512;
/// That file, and its longest: an answer travels in one message.
const ANSWER: &str = "answer";
const ANSWER_BYTES_MAX: u64 = 2 << 20;

/// A clock that was set back by no more than this is no matter.
const CLOCKS_DIFFER_MS: u64 = 60_000;
/// Label of a snapshot that was made for a request with an id.
const REQUEST_LABEL: &str = "coldspark.request";

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Method {
    CloneVm,
    TakeVm,
    CreateVm,
    CreateSnapshot,
}

/// A request that has an id.
#[derive(Debug, Clone)]
pub struct Claim {
    pub method: Method,
    pub id: String,
    /// Of its content: the same id with another one is another request.
    digest: String,
}

impl Claim {
    /// `None`: it has no id.
    pub fn new(method: Method, id: &str, asked: &[u8]) -> Option<Self> {
        let digest = || blake3::hash(asked).to_hex().to_string();
        (!id.is_empty()).then(|| Self { method, id: id.to_owned(), digest: digest() })
    }

    /// What the manifest of a snapshot says of the request that it was made for, by the service with this mark. Of the id, which may be any text, the digest.
    pub fn label(&self, mark: &str) -> (String, String) {
        let id = blake3::hash(self.id.as_bytes()).to_hex();
        (REQUEST_LABEL.to_owned(), format!("{mark} {id} {}", self.digest))
    }
}

/// What a record says of the request that its VM was made for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimRecord {
    method: Method,
    id: String,
    digest: String,
    asked_unix_ms: u64,
    answer: Answer,
}

/// What was answered besides the VMs, which is told again as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Hex(String),
    File,
}

impl ClaimRecord {
    /// Of a request that is answered now; `folder`: its VM's.
    pub fn new(claim: Claim, answer: &[u8], folder: &Path) -> io::Result<Self> {
        let answer = match answer.len() <= INLINE_BYTES_MAX {
            true => Answer::Hex(answer.iter().map(|byte| format!("{byte:02x}")).collect()),
            false => {
                fs::write(folder.join(ANSWER), answer)?;
                Answer::File
            }
        };
        let Claim { method, id, digest } = claim;
        Ok(Self { method, id, digest, asked_unix_ms: id::unix_ms(), answer })
    }
}

/// What was made for a request that an earlier daemon answered, or was about to.
#[derive(Debug)]
pub struct Earlier {
    /// Those of its VMs that live, in their order.
    pub vms: Vec<Arc<Vm>>,
    pub answer: Vec<u8>,
}

/// The requests of the VMs that were taken over.
#[derive(Debug, Default)]
pub struct Claims(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<(Method, String), Known>,
    /// VMs that are being taken over still.
    under_way: HashSet<String>,
}

#[derive(Debug)]
struct Known {
    claim: ClaimRecord,
    vms: Vec<String>,
    /// Where the answer's file is.
    folder: PathBuf,
}

impl Claims {
    /// A VM is being taken over, from this folder.
    pub fn found(&self, vm: &str, record: &Record, folder: &Path) {
        let mut table = self.lock();
        table.under_way.insert(vm.to_owned());
        let Some(claim) = &record.claim else { return };
        let vms = match record.siblings.is_empty() {
            true => vec![vm.to_owned()],
            false => record.siblings.clone(),
        };
        table.know(claim, vms, folder);
    }

    /// It was taken over, or not.
    pub fn done(&self, vm: &str) {
        self.lock().under_way.remove(vm);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The request that these VMs were made for. Of two with the same id (the first was too old to count) the later one is meant.
    fn know(&mut self, claim: &ClaimRecord, vms: Vec<String>, folder: &Path) {
        let key = (claim.method, claim.id.clone());
        if self.claims.get(&key).is_none_or(|other| other.claim.asked_unix_ms <= claim.asked_unix_ms) {
            self.claims.insert(key, Known { claim: claim.clone(), vms, folder: folder.to_owned() });
        }
    }

    /// The VMs that this request has made, and where the answer is; forgets what is too old.
    fn find(
        &mut self,
        claim: &Claim,
        now_ms: u64,
    ) -> Result<Option<(Vec<String>, Answer, PathBuf)>, FleetError> {
        let kept_ms = u64::try_from(KEPT_FOR.as_millis()).unwrap_or(u64::MAX);
        // One of the future (the clock was set back) is as good as one of now.
        self.claims.retain(|_, known| now_ms.saturating_sub(known.claim.asked_unix_ms) <= kept_ms);
        let Some(known) = self.claims.get(&(claim.method, claim.id.clone())) else { return Ok(None) };
        if known.claim.digest != claim.digest {
            return Err(another_request(&claim.id));
        }
        if let Some(vm) = known.vms.iter().find(|vm| self.under_way.contains(*vm)) {
            return Err(FleetError::TakenOverLater(vm.clone()));
        }
        Ok(Some((known.vms.clone(), known.claim.answer.clone(), known.folder.clone())))
    }
}

/// The same id was given to requests that differ.
fn another_request(id: &str) -> FleetError {
    FleetError::Invalid(another(id))
}

/// The sentence for it.
pub fn another(id: &str) -> String {
    format!("the request id {id:?} was used for another request; take a new one")
}

impl Fleet {
    /// What an earlier daemon made for this request. `None`: nothing that lives.
    pub fn earlier(&self, claim: Option<&Claim>) -> Result<Option<Earlier>, FleetError> {
        let Some(claim) = claim else { return Ok(None) };
        let Some((ids, answer, path)) = self.claims.lock().find(claim, id::unix_ms())? else {
            return Ok(None);
        };
        let all = self.registry.list();
        let living = |id: &String| all.iter().find(|vm| vm.id == *id && vm.state() != State::Exited).cloned();
        let vms: Vec<_> = ids.iter().filter_map(living).collect();
        if vms.is_empty() {
            return Ok(None);
        }
        let answer = match answer {
            Answer::Hex(digits) => unhex(&digits),
            Answer::File => folder::read_small(&path.join(ANSWER), ANSWER_BYTES_MAX).ok().flatten(),
        };
        let answer = answer.ok_or_else(|| {
            FleetError::Internal(format!(
                "the answer that this request got from an earlier service cannot be read; it made {}",
                ids.join(", ")
            ))
        })?;
        Ok(Some(Earlier { vms, answer }))
    }
}

impl Fleet {
    /// The snapshot that was made for this request, by this daemon or an earlier one.
    pub async fn earlier_snapshot(&self, claim: Option<&Claim>) -> Result<Option<Described>, FleetError> {
        let Some(claim) = claim.cloned() else { return Ok(None) };
        let (store, mark) = (Arc::clone(&self.snapshots.store), self.snapshots.mark.clone());
        blocking(move || {
            let (_, wanted) = claim.label(&mark);
            // Mark and id: what comes from another store was made for another's request.
            let wanted_id = wanted.rsplit_once(' ').map(|(front, _)| front);
            let kept_ms = u64::try_from(KEPT_FOR.as_millis()).unwrap_or(u64::MAX);
            for listed in store.list() {
                let Listed::Whole(snapshot) = listed else { continue };
                let Some(label) = snapshot.manifest().facts.labels.get(REQUEST_LABEL) else { continue };
                if label.rsplit_once(' ').map(|(front, _)| front) != wanted_id {
                    continue;
                }
                let made = describe(&snapshot, store.signing())?;
                // Nor one of a time to come, which would count for ever.
                let now_ms = id::unix_ms();
                if now_ms.saturating_sub(made.created_unix_ms) > kept_ms
                    || made.created_unix_ms > now_ms.saturating_add(CLOCKS_DIFFER_MS)
                {
                    continue;
                }
                return match *label == wanted {
                    true => Ok(Some(made)),
                    false => Err(another_request(&claim.id)),
                };
            }
            Ok(None)
        })
        .await?
    }
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(table: &mut Table, claim: &Claim, asked_unix_ms: u64, vms: &[&str]) {
        let (method, id, digest) = (claim.method, claim.id.clone(), claim.digest.clone());
        let claim = ClaimRecord { method, id, digest, asked_unix_ms, answer: Answer::File };
        table.know(&claim, vms.iter().map(|vm| (*vm).to_owned()).collect(), Path::new(""));
    }

    #[test]
    fn a_request_is_found_for_ten_minutes_by_its_method_its_id_and_its_content() {
        let clone = |asked: &[u8]| Claim::new(Method::CloneVm, "a", asked).unwrap();
        let mut table = Table::default();
        known(&mut table, &clone(b"x"), 1_000_000, &["vm-1", "vm-2"]);
        let found =
            |table: &mut Table, claim: Claim, now| table.find(&claim, now).map(|found| found.map(|f| f.0));
        assert_eq!(found(&mut table, clone(b"x"), 1_000_000).unwrap().unwrap(), ["vm-1", "vm-2"]);
        let other = found(&mut table, clone(b"y"), 1_000_000).unwrap_err();
        assert!(matches!(other, FleetError::Invalid(_)), "{other}");
        assert!(
            found(&mut table, Claim::new(Method::TakeVm, "a", b"x").unwrap(), 1_000_000).unwrap().is_none()
        );
        // The clock was set back.
        assert!(found(&mut table, clone(b"x"), 0).unwrap().is_some());
        table.under_way.insert("vm-2".into());
        let later = found(&mut table, clone(b"x"), 1_600_000).unwrap_err();
        assert!(matches!(later, FleetError::TakenOverLater(_)) && later.passes(), "{later}");
        table.under_way.clear();
        assert!(found(&mut table, clone(b"x"), 1_600_000).unwrap().is_some());
        assert!(found(&mut table, clone(b"x"), 1_600_001).unwrap().is_none());
        assert!(found(&mut table, clone(b"y"), 1_600_001).unwrap().is_none() && table.claims.is_empty());
        assert!(Claim::new(Method::CloneVm, "", b"x").is_none());
    }

    #[test]
    fn a_snapshots_label_is_of_one_service() {
        let claim = |asked: &[u8]| Claim::new(Method::CreateSnapshot, "a b", asked).unwrap();
        let (name, label) = claim(b"x").label("here");
        assert_eq!(name, REQUEST_LABEL);
        let front = |label: &str| label.rsplit_once(' ').map(|(front, _)| front.to_owned());
        assert_eq!(front(&label), front(&claim(b"y").label("here").1));
        assert_ne!(label, claim(b"y").label("here").1);
        assert_ne!(front(&label), front(&claim(b"x").label("there").1));
    }

    #[test]
    fn of_two_requests_with_one_id_the_later_counts_in_whatever_order_they_are_found() {
        let clone = |asked: &[u8]| Claim::new(Method::CloneVm, "a", asked).unwrap();
        for order in [[0, 1], [1, 0]] {
            let mut table = Table::default();
            for which in order {
                let (asked, when, vm) =
                    [(&b"old"[..], 1_000_000, "vm-1"), (&b"new"[..], 1_700_000, "vm-2")][which];
                known(&mut table, &clone(asked), when, &[vm]);
            }
            assert_eq!(table.find(&clone(b"new"), 1_700_001).unwrap().unwrap().0, ["vm-2"]);
        }
    }

    #[test]
    fn a_short_answer_is_in_the_record_and_a_long_one_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let claim = || Claim::new(Method::TakeVm, "a", b"x").unwrap();
        let short = ClaimRecord::new(claim(), &[0, 0x7f, 0xff], folder.path()).unwrap();
        assert_eq!(short.answer, Answer::Hex("007fff".into()));
        assert_eq!(unhex("007fff").unwrap(), [0, 0x7f, 0xff]);
        assert!(unhex("0g").is_none() && unhex("\u{e4}").is_none());
        assert!(!folder.path().join(ANSWER).exists());
        let long = vec![7; INLINE_BYTES_MAX + 1];
        assert_eq!(ClaimRecord::new(claim(), &long, folder.path()).unwrap().answer, Answer::File);
        assert_eq!(fs::read(folder.path().join(ANSWER)).unwrap(), long);
    }
}
