//! The files that are written without a lock, or whose order matters, in every order in which their threads can come (loom).
//!
//! The files are those of `src/`, compiled here with loom's atomics and locks (`src/atomics.rs` has the standard library's for the
//! program). What surrounds them (KVM_RUN, an eventfd, a file) is imitated, each as far as its order goes. A lost wake-up shows as a
//! deadlock, data that is read too early as a race, and both fail the test. Each model was seen to fail with its order broken.

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicUsize;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

mod atomics {
    pub use loom::sync::Mutex;
    pub use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use std::sync::PoisonError;
}

#[allow(dead_code)]
#[path = "../src/snapshot/layers/bitmap.rs"]
mod bitmap;
#[allow(dead_code)]
#[path = "../src/vmm/virtio/mmio/causes.rs"]
mod causes;
#[allow(dead_code)]
#[path = "../src/vmm/virtio/transport/pending.rs"]
mod pending;
#[path = "../src/vmm/stop.rs"]
mod stop;
#[path = "../src/snapshot/layers/synced.rs"]
mod synced;

use atomics::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// An event descriptor, or a line's edges: counts, and can be waited for.
#[derive(Default)]
struct Event {
    count: Mutex<u64>,
    counted: Condvar,
}

impl Event {
    fn signal(&self) {
        *self.count.lock().unwrap() += 1;
        self.counted.notify_all();
    }

    /// What poll(2) does: waits until there is something, and takes nothing.
    fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.counted.wait(count).unwrap();
        }
    }

    /// What read(2) does without blocking.
    fn empty(&self) {
        *self.count.lock().unwrap() = 0;
    }
}

/// For models that would take minutes: all orders in which threads are interrupted at most three times where they need not wait.
fn interrupted_thrice(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn a_queue_that_is_rung_is_looked_at() {
    interrupted_thrice(|| {
        #[derive(Default)]
        struct World {
            kick: Event,
            /// What each queue's driver has made available.
            available: [AtomicU32; 2],
        }
        let world = Arc::new(World::default());
        let pending = Arc::new(pending::Pending::new());
        // Two vCPUs, each with a queue of its own; the first rings twice.
        let drivers = [(0, 2), (1, 1)].map(|(queue, rings)| {
            let (world, pending) = (world.clone(), pending.clone());
            thread::spawn(move || {
                for number in 1..=rings {
                    world.available[queue].store(number, Ordering::Release);
                    pending.note(1 << queue, || world.kick.signal());
                }
            })
        });
        let mut done = [0, 0];
        while done != [2, 1] {
            world.kick.wait();
            let queues = pending.take(|| world.kick.empty());
            for queue in [0, 1] {
                if queues >> queue & 1 == 1 {
                    done[queue] = world.available[queue].load(Ordering::Acquire);
                }
            }
        }
        for driver in drivers {
            driver.join().unwrap();
        }
    });
}

#[test]
fn an_interrupt_that_is_acknowledged_hides_nothing() {
    loom::model(|| {
        #[derive(Default)]
        struct World {
            line: Event,
            used: AtomicU32,
        }
        const USED: u32 = 1;
        let world = Arc::new(World::default());
        let causes = Arc::new(causes::Causes::new());
        let device = {
            let (world, causes) = (world.clone(), causes.clone());
            thread::spawn(move || {
                for number in 1..=3 {
                    world.used.store(number, Ordering::Release);
                    causes.raise(USED, || world.line.signal());
                }
            })
        };
        let mut seen = 0;
        while seen != 3 {
            // The handler runs for an edge; edges that come meanwhile are one more.
            world.line.wait();
            world.line.empty();
            let what = causes.get();
            causes.acknowledge(what);
            if what & USED != 0 {
                seen = world.used.load(Ordering::Acquire);
            }
        }
        device.join().unwrap();
    });
}

/// A vCPU's thread as KVM_RUN sees it: a signal that comes outside of it is handled and forgotten.
#[derive(Default)]
struct Kvm {
    state: Mutex<Signals>,
    came: Condvar,
    /// How often the guest ran.
    ran: Event,
}

#[derive(Default)]
struct Signals {
    inside: bool,
    pending: bool,
}

impl Kvm {
    fn kill(&self) {
        let mut state = self.state.lock().unwrap();
        // Outside the handler, which does nothing, has run before the thread goes on.
        if state.inside {
            state.pending = true;
            self.came.notify_all();
        }
    }

    /// Runs the guest, which never exits by itself, until it is interrupted.
    fn run(&self, immediate_exit: &AtomicU8) {
        // A signal that comes from now on stays pending; the kernel looks at the byte after that.
        let mut state = self.state.lock().unwrap();
        state.inside = true;
        if immediate_exit.load(Ordering::SeqCst) == 0 {
            self.ran.signal();
            while !state.pending {
                state = self.came.wait(state).unwrap();
            }
        }
        *state = Signals::default();
    }
}

#[test]
fn a_vcpu_that_is_told_to_stop_stops_and_one_that_is_told_to_run_runs() {
    interrupted_thrice(|| {
        struct World {
            kvm: Kvm,
            flag: AtomicBool,
            immediate_exit: AtomicU8,
            /// Orders to run that were not taken yet.
            orders: Event,
            stands: Event,
        }
        impl World {
            fn stop(&self) -> stop::Stop<'_> {
                stop::Stop { flag: &self.flag, immediate_exit: &self.immediate_exit }
            }
        }
        const RUNS: usize = 2;
        let world = Arc::new(World {
            kvm: Kvm::default(),
            flag: AtomicBool::new(true),
            immediate_exit: AtomicU8::new(0),
            orders: Event::default(),
            stands: Event::default(),
        });
        // As `Runner::run` does it.
        let runner = {
            let world = world.clone();
            thread::spawn(move || {
                for _ in 0..RUNS {
                    world.orders.wait();
                    world.orders.empty();
                    let stop = world.stop();
                    stop.begin();
                    while !stop.asked() {
                        world.kvm.run(&world.immediate_exit);
                    }
                    stop.finish();
                    world.kvm.run(&world.immediate_exit);
                    world.stands.signal();
                }
            })
        };
        // As `VcpuHandle` does it.
        for number in 0..RUNS {
            world.stop().take_back();
            world.orders.signal();
            if number == 0 {
                // Nobody stops it before it ran: it must run.
                world.kvm.ran.wait();
            }
            world.stop().ask();
            world.kvm.kill();
            world.stands.wait();
            world.stands.empty();
        }
        runner.join().unwrap();
    });
}

#[test]
fn a_flush_covers_every_write_that_was_done_before_it() {
    loom::model(|| {
        #[derive(Default)]
        struct Disk {
            /// Writes in the file, and those of them that a power cut spares.
            written: AtomicUsize,
            durable: AtomicUsize,
        }
        impl Disk {
            fn sync(&self) -> Result<(), ()> {
                let written = self.written.load(Ordering::SeqCst);
                self.durable.fetch_max(written, Ordering::SeqCst);
                Ok(())
            }
        }
        let disk = Arc::new(Disk::default());
        let synced = Arc::new(synced::Synced::new());
        let threads = [(); 2].map(|()| {
            let (disk, synced) = (disk.clone(), synced.clone());
            thread::spawn(move || {
                let mine = disk.written.fetch_add(1, Ordering::SeqCst) + 1;
                synced.touched();
                synced.flush(|| disk.sync()).unwrap();
                assert!(disk.durable.load(Ordering::SeqCst) >= mine);
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn a_flush_that_fails_leaves_it_to_the_next() {
    loom::model(|| {
        let synced = Arc::new(synced::Synced::new());
        let durable = Arc::new(AtomicBool::new(false));
        synced.touched();
        let fails = {
            let synced = synced.clone();
            thread::spawn(move || synced.flush(|| Err(())).is_err())
        };
        let flushed = synced.flush(|| {
            durable.store(true, Ordering::SeqCst);
            Ok::<(), ()>(())
        });
        flushed.unwrap();
        assert!(durable.load(Ordering::SeqCst), "a flush said that all is durable");
        // Whether there was still something for it to fail with depends on who came first.
        let _ = fails.join().unwrap();
    });
}

#[test]
fn who_sees_a_block_sees_its_data_and_each_is_counted_once() {
    loom::model(|| {
        struct Disk {
            bitmap: bitmap::Bitmap,
            blocks: [UnsafeCell<u8>; 2],
        }
        let disk = Arc::new(Disk {
            bitmap: bitmap::Bitmap::new(vec![AtomicU64::new(0)]),
            blocks: [UnsafeCell::new(0), UnsafeCell::new(0)],
        });
        let writers = [0, 1].map(|block| {
            let disk = disk.clone();
            thread::spawn(move || {
                // SAFETY: loom's cell finds an access that is not ordered after this one; that is what is tested.
                disk.blocks[block].with_mut(|data| unsafe { *data = 7 });
                disk.bitmap.insert(block as u64, block as u64 + 1);
            })
        });
        for block in [0, 1] {
            if disk.bitmap.contains(block as u64) {
                // SAFETY: as above.
                assert_eq!(disk.blocks[block].with(|data| unsafe { *data }), 7);
            }
        }
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(disk.bitmap.present(), 2);
    });
}
