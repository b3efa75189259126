//! Tests of [`super`].

use std::os::unix::fs::FileExt;

use super::*;
use crate::agent::Hello;
use crate::fleet::limits::OPEN_SNAPSHOTS_MAX;
use crate::fleet::sources::stored_hello;
use crate::snapshot::manifest::MEMORY_FILE;

/// Publishes a snapshot of a VM without disks; gives its id.
fn publish(store: &Arc<SnapshotStore>) -> String {
    const BYTES: u64 = 2 << 20;
    let draft = store.begin(SnapshotId::random()).unwrap();
    draft.state().write_all_at(b"state", 0).unwrap();
    draft.memory().set_len(BYTES).unwrap();
    let facts = Facts {
        name: None,
        labels: BTreeMap::new(),
        guest: Guest { kernel: "k".into(), protocol: Protocol::Pvh, ready: String::new() },
        vcpus: 1,
        memory: Memory {
            bytes: BYTES,
            regions: vec![Region { guest_address: 0, bytes: BYTES, file_offset: 0 }],
        },
        cpu: Cpu { vendor: "v".into(), features: Vec::new(), tsc_khz: 0 },
        kvm_capabilities: Vec::new(),
        parent: None,
        identity: Identity { agent: false },
        devices: Vec::new(),
        disks: Vec::new(),
        networks: Vec::new(),
    };
    draft.publish(facts).unwrap().id().to_string()
}

/// How many snapshots of this folder this process has open.
fn open_in(folder: &Path) -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let paths = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    paths.filter(|path| path.starts_with(folder) && path.ends_with(MEMORY_FILE)).count()
}

#[test]
fn files_of_many_snapshots_are_not_all_held_open() {
    let folder = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(folder.path(), false, Signing::default(), "mark".to_owned()).unwrap();
    for _ in 0..OPEN_SNAPSHOTS_MAX + 5 {
        let id = publish(&snapshots.store);
        // As nobody holds them, and folding is not waited for: opened and kept, as `source` does.
        let source = Source::open(&snapshots.store.get(&id).unwrap(), false).unwrap();
        snapshots.keep(id, &Arc::new(source));
    }
    assert_eq!(open_in(folder.path()), OPEN_SNAPSHOTS_MAX);
}

#[test]
fn one_that_was_deleted_while_it_was_opened_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(folder.path(), false, Signing::default(), "mark".to_owned()).unwrap();
    let id = publish(&snapshots.store);
    let source = Source::open(&snapshots.store.get(&id).unwrap(), false).unwrap();
    // By this its series are ended, open or not.
    assert_eq!(label_of(&snapshots.store.get(&id).unwrap()), source.label());
    snapshots.store.delete(&id).unwrap();
    snapshots.keep(id, &Arc::new(source));
    assert!(snapshots.lock().is_empty());
}

#[test]
fn times_of_manifests_are_read() {
    assert_eq!(unix_ms("1970-01-01T00:00:00Z"), Some(0));
    assert_eq!(unix_ms("2026-11-22T12:00:01Z"), Some(1_795_348_801_000));
    assert_eq!(unix_ms("2024-02-29T23:59:59Z"), Some(1_709_251_199_000));
    assert_eq!(unix_ms(""), None);
}

#[test]
fn what_was_deleted_while_it_was_opened_is_not_kept_open() {
    let (opened, source) = (Opened::new(), Arc::new(()));
    opened.keep("snap-a".to_owned(), &source, |_| true);
    opened.keep("snap-b".to_owned(), &source, |id| {
        // A deletion that comes from here on finds it.
        assert!(opened.lock().contains_key(id));
        false
    });
    let has = |id: &str| opened.lock().contains_key(id);
    assert!(has("snap-a") && !has("snap-b"));
    for n in 0..2 * OPEN_SNAPSHOTS_MAX {
        opened.keep(format!("snap-{n}"), &source, |_| true);
        opened.keep(format!("snap-{n}"), &source, |_| true);
    }
    assert_eq!(opened.lock().len(), OPEN_SNAPSHOTS_MAX);
}

#[tokio::test]
async fn what_must_be_done_is_done_when_its_caller_goes_away() {
    let (go, gone) = tokio::sync::oneshot::channel::<()>();
    let (begun_in, begun) = tokio::sync::oneshot::channel();
    let (done_in, done) = tokio::sync::oneshot::channel();
    let caller = tokio::spawn(to_its_end(async move {
        begun_in.send(()).unwrap();
        gone.await.unwrap();
        done_in.send(()).unwrap();
        Ok(())
    }));
    begun.await.unwrap();
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    go.send(()).unwrap();
    done.await.unwrap();
}

#[test]
fn a_hello_survives_the_label() {
    let hello = Hello {
        version: crate::agent::wire::PROTOCOL_VERSION,
        agent: 1,
        boot: 2,
        cpus_found: 4,
        cpus_alive: 4,
        tsc_khz: 3_000_000,
        checks_run: 7,
        checks_failed: 0,
        kinds: u64::MAX,
        memory_bytes: 1 << 29,
        arena_bytes: 1 << 28,
        filled_bytes: 0,
        disks: 1,
        request_bytes: 0,
        name: "test guest".into(),
    };
    let mut labels = BTreeMap::from([(HELLO_LABEL.to_owned(), hello_text(&hello).unwrap())]);
    assert_eq!(stored_hello(&labels).unwrap(), hello);
    labels.insert(HELLO_LABEL.to_owned(), "zz".into());
    assert!(stored_hello(&labels).is_err());
    assert!(stored_hello(&BTreeMap::new()).is_err());
}
