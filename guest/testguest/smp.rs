//! The other CPUs: started by INIT and SIPI, they halt until called, compute, and halt again.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::checks::{Checks, check};
use crate::gate;
use crate::given::{AP_PAGE, Given};
use crate::interrupts;
use crate::mptable::{CPUS_MAX, Topology};
use crate::pattern;

/// The place where one CPU gets its work and leaves its result. A cache line each.
#[repr(C, align(64))]
struct Desk {
    alive: AtomicBool,
    apic_id: AtomicU8,
    /// Runs asked for, and done.
    asked: AtomicU32,
    done: AtomicU32,
    seed: AtomicU64,
    rounds: AtomicU64,
    result: AtomicU64,
    ticks: AtomicU64,
    runs: AtomicU64,
}

static DESKS: [Desk; CPUS_MAX] = [const {
    Desk {
        alive: AtomicBool::new(false),
        apic_id: AtomicU8::new(0),
        asked: AtomicU32::new(0),
        done: AtomicU32::new(0),
        seed: AtomicU64::new(0),
        rounds: AtomicU64::new(0),
        result: AtomicU64::new(0),
        ticks: AtomicU64::new(0),
        runs: AtomicU64::new(0),
    }
}; CPUS_MAX];

/// The first CPU halts until the others are done and wants to be woken.
static FIRST_WAITS: AtomicBool = AtomicBool::new(false);

const SPINS_BEFORE_HALT: u32 = 20_000;
/// How long the others may take to start: emulated kernel mode on a busy host is slow.
const START_SECONDS_MAX: u32 = 60;
/// How long a run of the most rounds may take on a busy host.
const RUN_SECONDS_MAX: u32 = 300;
const TSS_BYTES: usize = 104;

unsafe extern "C" {
    static ap_start: u8;
    static ap_start_end: u8;
    static tss_list: u8;
    static io_map_end: u8;
    static mut tss_descriptors: [[u16; 8]; CPUS_MAX];
    static mut apic_to_cpu: [u8; 256];
}

pub(crate) struct Cpus {
    found: usize,
    alive: usize,
}

/// Starts all CPUs of the table.
pub(crate) fn start(checks: &mut Checks, topology: &Topology, given: &Given) -> Cpus {
    let own_id = interrupts::apic_id();
    DESKS[0].apic_id.store(own_id, Ordering::Relaxed);
    DESKS[0].alive.store(true, Ordering::Release);
    let others = || topology.apic_ids().iter().filter(|id| **id != own_id);
    let found = others().count().min(CPUS_MAX - 1) + 1;
    if found > 1 {
        if !given.is_ram(AP_PAGE, AP_PAGE + 4096) {
            crate::fail(format_args!("no RAM at {AP_PAGE:#x} to start other CPUs in"));
        }
        // SAFETY: the page is RAM that nobody uses; the others do not run yet.
        unsafe {
            let code = &raw const ap_start;
            let bytes = &raw const ap_start_end as usize - code as usize;
            core::ptr::copy_nonoverlapping(code, AP_PAGE as *mut u8, bytes);
        }
    }
    for (id, cpu) in others().zip(1..CPUS_MAX) {
        DESKS[cpu].apic_id.store(*id, Ordering::Relaxed);
        let tss = &raw const tss_list as usize + cpu * TSS_BYTES;
        // SAFETY: this CPU does not run yet.
        unsafe {
            (&raw mut apic_to_cpu[usize::from(*id)]).write_volatile(cpu as u8);
            (&raw mut tss_descriptors[cpu]).write_volatile([
                (&raw const io_map_end as usize - tss - 1) as u16,
                tss as u16,
                (tss >> 16 & 0xff) as u16 | 0x8900,
                (tss >> 24 << 8) as u16,
                0,
                0,
                0,
                0,
            ]);
        }
        interrupts::start_cpu(*id, AP_PAGE);
    }
    let count = || DESKS[..found].iter().filter(|desk| desk.alive.load(Ordering::Acquire)).count();
    wait_for_others(|| count() == found, START_SECONDS_MAX);
    let alive = count();
    check!(checks, "smp.started", alive == found, "{alive} of {found} CPUs");
    Cpus { found, alive }
}

/// Entered by the stub on each other CPU.
#[unsafe(no_mangle)]
extern "C" fn guest_ap_main(cpu: u32) -> ! {
    let desk = &DESKS[cpu as usize];
    interrupts::init_this_cpu();
    desk.alive.store(true, Ordering::SeqCst);
    wake_first();
    loop {
        let asked = desk.asked.load(Ordering::Acquire);
        if asked == desk.done.load(Ordering::Relaxed) {
            gate::halt();
            continue;
        }
        work(desk);
        desk.done.store(asked, Ordering::SeqCst);
        wake_first();
    }
}

/// Halts the first CPU until the others are `ready`; each that gets so wakes it.
fn wait_for_others(ready: impl Fn() -> bool, seconds_max: u32) {
    let mut seconds = 0;
    FIRST_WAITS.store(true, Ordering::SeqCst);
    interrupts::arm_timer();
    while !ready() && seconds < seconds_max {
        gate::halt();
        if gate::take_timer_note(0) {
            seconds += 1;
            interrupts::arm_timer();
        }
    }
    interrupts::disarm_timer();
    FIRST_WAITS.store(false, Ordering::SeqCst);
}

fn wake_first() {
    if FIRST_WAITS.load(Ordering::SeqCst) {
        interrupts::call_cpu(DESKS[0].apic_id.load(Ordering::Relaxed));
    }
}

fn work(desk: &Desk) {
    let start = gate::ticks();
    let result = pattern::run(
        desk.seed.load(Ordering::Relaxed),
        desk.apic_id.load(Ordering::Relaxed).into(),
        desk.rounds.load(Ordering::Relaxed),
    );
    desk.result.store(result, Ordering::Relaxed);
    desk.ticks.store(gate::ticks().wrapping_sub(start), Ordering::Relaxed);
    desk.runs.fetch_add(1, Ordering::Relaxed);
}

impl Cpus {
    pub(crate) fn found(&self) -> usize {
        self.found
    }

    pub(crate) fn alive(&self) -> usize {
        self.alive
    }

    /// APIC id and number of runs of each CPU that runs.
    pub(crate) fn counters(&self) -> impl Iterator<Item = (u32, u64)> {
        self.desks()
            .map(|desk| (desk.apic_id.load(Ordering::Relaxed).into(), desk.runs.load(Ordering::Relaxed)))
    }

    /// Has every CPU compute; gives APIC id, result and ticks of each.
    pub(crate) fn run(&self, seed: u64, rounds: u64) -> impl Iterator<Item = (u32, u64, u64)> {
        let others = || self.desks().skip(1);
        for desk in self.desks() {
            desk.seed.store(seed, Ordering::Relaxed);
            desk.rounds.store(rounds, Ordering::Relaxed);
        }
        for desk in others() {
            desk.asked.fetch_add(1, Ordering::SeqCst);
        }
        if self.alive > 1 {
            interrupts::call_others();
        }
        work(&DESKS[0]);
        let ready =
            || others().all(|desk| desk.done.load(Ordering::SeqCst) == desk.asked.load(Ordering::Relaxed));
        let mut spins = 0;
        while !ready() && spins < SPINS_BEFORE_HALT {
            spins += 1;
            spin_loop();
        }
        if !ready() {
            wait_for_others(ready, RUN_SECONDS_MAX);
            if !ready() {
                crate::fail(format_args!("another CPU did not finish its run"));
            }
        }
        self.desks().map(|desk| {
            let [result, ticks] = [&desk.result, &desk.ticks].map(|word| word.load(Ordering::Relaxed));
            (desk.apic_id.load(Ordering::Relaxed).into(), result, ticks)
        })
    }

    /// Has every CPU compute, twice, and looks at what each counted and found.
    pub(crate) fn check_run(&self, checks: &mut Checks, rounds: u64) {
        let right = |seed: u64| {
            let runs = self.run(seed, rounds);
            runs.filter(|(id, result, _)| *result == pattern::run(seed, *id, rounds)).count()
        };
        let results = [right(1), right(2)];
        let counted = self.counters().filter(|(_, runs)| *runs == 2).count();
        check!(
            checks,
            "smp.run",
            results == [self.found; 2] && counted == self.found,
            "right results {results:?}, two runs counted by {counted}, of {} CPUs",
            self.found
        );
    }

    fn desks(&self) -> impl Iterator<Item = &'static Desk> {
        DESKS[..self.found].iter().filter(|desk| desk.alive.load(Ordering::Acquire))
    }
}
