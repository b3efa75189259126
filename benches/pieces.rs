//! Pieces of the roads, each alone: `cargo bench`. Whole roads are measured by `coldspark bench` (docs/performance.md).
//!
//! The snapshot that they work on is a real one, of the embedded test guest, made by the program at the start: this needs KVM.

use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use coldspark::snapshot::memory::extents::Extents;
use coldspark::snapshot::memory::fold::fold;
use coldspark::snapshot::memory::image::PageMap;
use coldspark::snapshot::memory::keep::Keeper;
use coldspark::snapshot::memory::mapped::Mapping;
use coldspark::snapshot::memory::touched::{Place, touched};
use coldspark::snapshot::state::file::StateFile;
use coldspark::snapshot::state::machine::MachineState;
use coldspark::snapshot::state::vcpu::VcpuState;
use coldspark::snapshot::store::{Listed, OpenSnapshot, Snapshot, SnapshotStore};
use coldspark::snapshot::working_set::Run;
use coldspark::vmm::irq::Interrupt;
use coldspark::vmm::memory::GuestMemory;
use coldspark::vmm::virtio::mmio::MmioTransport;
use coldspark::vmm::virtio::rng::Rng;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

const PIECE: u64 = 2 << 20;
/// Pages that the sample's guest has filled: 16 MiB.
const FILLED_PAGES: u64 = 4096;

/// A store with one snapshot, of 64 MiB with 16 MiB of data.
struct Sample {
    store: Arc<SnapshotStore>,
    snapshot: Arc<Snapshot>,
    open: Arc<OpenSnapshot>,
    _folder: tempfile::TempDir,
}

impl Sample {
    fn new() -> Sample {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(folder.path());
        daemon.call(&["vm", "create", "--embedded", "--memory", "64M", "--name", "sample"]);
        daemon.call(&["vm", "call", "sample", "touch", &FILLED_PAGES.to_string(), "--mode", "fill"]);
        daemon.call(&["vm", "snapshot", "sample", "--name", "sample"]);
        daemon.stop();
        let store =
            Arc::new(SnapshotStore::open(&folder.path().join("snapshots"), Default::default()).unwrap());
        let [Listed::Whole(snapshot)] = &store.list()[..] else { panic!("no snapshot was made") };
        let (snapshot, open) = (Arc::clone(snapshot), snapshot.open_for_restore().unwrap());
        Sample { store, snapshot, open, _folder: folder }
    }

    fn state(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.open.state.metadata().unwrap().len() as usize];
        self.open.state.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn memory_bytes(&self) -> u64 {
        self.open.memory.metadata().unwrap().len()
    }
}

struct Daemon(Child);

impl Daemon {
    fn program(folder: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coldspark"));
        command
            .env("COLDSPARK_SOCKET", folder.join("socket"))
            .env("COLDSPARK_DATA_DIR", folder)
            .current_dir(folder);
        command
    }

    /// Comes back when it serves.
    fn start(folder: &Path) -> Daemon {
        let mut child = Self::program(folder).arg("serve").stderr(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stderr.take().unwrap());
        let mut lines = said.lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("serving")), "the service did not start: is there KVM?");
        // Its later words must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        std::env::set_current_dir(folder).unwrap();
        Daemon(child)
    }

    fn call(&self, arguments: &[&str]) {
        let folder = std::env::current_dir().unwrap();
        let output = Self::program(&folder).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn stop(mut self) {
        // SAFETY: a signal to a child that was not waited for yet.
        unsafe { libc::kill(self.0.id() as libc::pid_t, libc::SIGTERM) };
        assert!(self.0.wait().unwrap().success());
    }
}

fn state(criterion: &mut Criterion, sample: &Sample) {
    let bytes = sample.state();
    criterion.bench_function("state/decode", |bencher| {
        bencher.iter(|| {
            let state = StateFile::from_bytes(black_box(&bytes)).unwrap();
            let machine: MachineState = state.get(0).unwrap();
            let vcpu: VcpuState = state.get(0).unwrap();
            (machine, vcpu)
        });
    });
}

fn publish(criterion: &mut Criterion, sample: &Sample) {
    let extents = Extents::of_file(&sample.open.memory).unwrap();
    let mut facts = sample.snapshot.manifest().facts.clone();
    facts.name = None;
    let state = sample.state();
    let mut group = criterion.benchmark_group("snapshot");
    group.throughput(Throughput::Bytes(extents.data_bytes())).sample_size(20);
    group.bench_function("publish", |bencher| {
        let draft = || {
            let draft = sample.store.begin(coldspark::snapshot::manifest::SnapshotId::random()).unwrap();
            draft.state().write_all_at(&state, 0).unwrap();
            draft.memory().set_len(sample.memory_bytes()).unwrap();
            for run in extents.data() {
                let mut content = vec![0; (run.end - run.start) as usize];
                sample.open.memory.read_exact_at(&mut content, run.start).unwrap();
                draft.memory().write_all_at(&content, run.start).unwrap();
            }
            draft
        };
        let publish = |draft: coldspark::snapshot::store::Draft| {
            let snapshot = draft.publish(facts.clone()).unwrap();
            sample.store.delete(snapshot.id().as_str()).unwrap();
        };
        bencher.iter_batched(draft, publish, BatchSize::PerIteration);
    });
    group.finish();
}

fn working_set(criterion: &mut Criterion, sample: &Sample) {
    let extents = Extents::of_file(&sample.open.memory).unwrap();
    let data = extents.data_bytes();
    let pieces = [Run { first: 0, count: (sample.memory_bytes() / PIECE) as u32 }];
    let mut group = criterion.benchmark_group("working set");
    group.throughput(Throughput::Bytes(data));
    group.bench_function("prefetch what is on disk only", |bencher| {
        let drop_from_cache = || {
            // SAFETY: plain integers, and advice.
            unsafe {
                libc::posix_fadvise(
                    std::os::fd::AsRawFd::as_raw_fd(&*sample.open.memory),
                    0,
                    0,
                    libc::POSIX_FADV_DONTNEED,
                )
            };
        };
        let prefetch = |()| fold(&sample.open.memory, &extents, &pieces, u64::MAX).unwrap();
        bencher.iter_batched(drop_from_cache, prefetch, BatchSize::PerIteration);
    });
    let mut keeper = Keeper::new(Arc::clone(&sample.open.memory), sample.memory_bytes()).unwrap();
    group.bench_function("look whether it is kept", |bencher| {
        bencher.iter(|| keeper.keep(&pieces).unwrap());
    });
    let mapping = Mapping::of_file(&sample.open.memory, 0, sample.memory_bytes()).unwrap();
    mapping.populate(0..mapping.bytes(), false);
    let place = Place { address: mapping.address().addr(), bytes: mapping.bytes(), file_offset: 0 };
    let page_map = PageMap::open().unwrap();
    group.bench_function("see what was touched", |bencher| {
        bencher.iter(|| touched(black_box(&[place]), &page_map).unwrap());
    });
    group.finish();
}

/// Nobody is interrupted.
#[derive(Debug)]
struct Deaf;

impl Interrupt for Deaf {
    fn raise(&self) {}
}

fn virtio_queue(criterion: &mut Criterion) {
    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFER: u64 = 0x4000;
    const SIZE: u16 = 64;
    const BYTES: u32 = 64;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let transport = MmioTransport::new(Box::new(Rng::new()), Arc::new(Deaf)).unwrap();
    let set = |register: u32, value: u32| transport.write(register.into(), &value.to_le_bytes(), &memory);
    let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    set(VIRTIO_MMIO_STATUS, status);
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    set(VIRTIO_MMIO_DRIVER_FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32));
    status |= VIRTIO_CONFIG_S_FEATURES_OK;
    set(VIRTIO_MMIO_STATUS, status);
    for (register, value) in [
        (VIRTIO_MMIO_QUEUE_SEL, 0),
        (VIRTIO_MMIO_QUEUE_NUM, SIZE.into()),
        (VIRTIO_MMIO_QUEUE_DESC_LOW, TABLE as u32),
        (VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAILABLE as u32),
        (VIRTIO_MMIO_QUEUE_USED_LOW, USED as u32),
        (VIRTIO_MMIO_QUEUE_READY, 1),
        (VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK),
    ] {
        set(register, value);
    }
    // One descriptor, written by the device, made available again and again.
    memory.write_obj(BUFFER, GuestAddress(TABLE)).unwrap();
    memory.write_obj(BYTES, GuestAddress(TABLE + 8)).unwrap();
    memory.write_obj(2u16, GuestAddress(TABLE + 12)).unwrap();
    let mut index = 0u16;
    let used = || memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
    criterion.bench_function("virtio queue/one request", |bencher| {
        bencher.iter(|| {
            let slot = AVAILABLE + 4 + 2 * u64::from(index % SIZE);
            memory.write_obj(0u16, GuestAddress(slot)).unwrap();
            index = index.wrapping_add(1);
            memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
            transport.lock().notify(0, &memory);
            assert_eq!(used(), index);
        });
    });
}

fn pieces(criterion: &mut Criterion) {
    virtio_queue(criterion);
    let sample = Sample::new();
    state(criterion, &sample);
    working_set(criterion, &sample);
    publish(criterion, &sample);
    drop(sample);
}

criterion_group! {
    name = all;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    targets = pieces
}
criterion_main!(all);
