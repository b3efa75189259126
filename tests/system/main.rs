//! Whole-system tests: a real daemon, real VMs, spoken to over gRPC only.
//!
//! Each trial starts its own `coldspark serve` on a private socket and an empty data folder. What a trial needs of
//! the host is decided when it runs; what cannot run here is reported as ignored with the reason, and the reasons
//! are listed again at the end. The same program runs on the host and inside the nested rig (docs/testing.md).
//!
//! | file | what it proves |
//! |---|---|
//! | `stock_client` | health and reflection, as any gRPC client asks |
//! | `many_cpus` | 32 vCPUs: found, used, in clones too; described by MPTable and by MADT |
//! | `embedded` | the whole road with the embedded guest: boot, snapshot, clones, identity, isolation |
//! | `identity` | 200 clones, each somebody of its own |
//! | `exec` | commands and files in the embedded guest: streams, windows, signals, clones |
//! | `events` | Watch, by a client and by `coldspark watch` |
//! | `adopt` | VMs that outlive a daemon, and the next one that goes on with them |
//! | `death` | workers and daemons that are killed |
//! | `claims` | requests that are sent again after a daemon's death, VMs of which nobody has heard |
//! | `faults` | load, while workers and the daemon are killed and clients vanish |
//! | `workers` | worker processes and their zygote: who may die, and that nothing is left |
//! | `jail` | what a worker cannot do, tried in its place; what real workers have on |
//! | `bad_input` | every kind of wrong input: the right code, a sentence, nothing lost |
//! | `serial` | the console under load: 1 MiB printed, 64 KiB typed, a listener that lags behind |
//! | `signed` | signed snapshots: made, taken, refused |
//! | `disks` | disks by path: what survives a killed VM, locks, several at once |
//! | `images` | images from disks as people have them: partitioned, compressed, the kernel inside; broken ones |
//! | `watch` | the profile of a boot, and what is told of one that hangs |
//! | `bench` | each kind of bench runs and tells its figures |
//! | `limits` | memory and processor time that a VM may take of its host |
//! | `linux` | a real Linux kernel, by PVH and bzImage |
//! | `network` | packets both ways over TAPs, through snapshots, clones and reboots |
//! | `slots` | networks that the service makes: who reaches whom, and that nothing is left |
//! | `systemd` | `deploy/coldspark.service` under a real systemd, as its head says |
//! | `seeing` | metrics: what is counted, who may read it |
//! | `load` | a snapshot with disks, network, timers and CPUs at work |
//! | `freebsd` | a real FreeBSD kernel, when the paths to one are given |
//! | `freebsd_agent` | the agent in such a FreeBSD, and the addresses of its clones |
//! | `soak` | the same, booted and restored hundreds of times, when that is asked for |

mod access;
mod adopt;
mod bad_input;
mod bench;
mod claims;
mod client;
mod commands;
mod console;
mod daemon;
mod death;
#[path = "../../src/media/testing.rs"]
mod disk_images;
mod disks;
mod embedded;
mod events;
mod exec;
mod faults;
mod freebsd;
mod freebsd_agent;
mod functions;
mod host;
mod identity;
mod images;
mod jail;
mod limits;
mod linux;
mod load;
mod many_cpus;
mod netns;
mod network;
mod pools;
mod seeing;
mod serial;
mod signed;
mod slots;
mod soak;
mod stock_client;
mod systemd;
mod tap;
mod trial;
mod watch;
mod workers;
mod working_set;

use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: no other thread runs yet. Errors then know where they were made (`trial::places`).
    unsafe { std::env::set_var("RUST_LIB_BACKTRACE", "1") };
    let mut arguments = libtest_mimic::Arguments::from_args();
    // Each trial runs many VMs of its own; more than two at once only makes them wait for each other.
    arguments.test_threads.get_or_insert(2);
    let trials = [
        stock_client::trials(),
        access::trials(),
        embedded::trials(),
        events::trials(),
        identity::trials(),
        exec::trials(),
        working_set::trials(),
        death::trials(),
        workers::trials(),
        jail::trials(),
        faults::trials(),
        adopt::trials(),
        claims::trials(),
        bad_input::trials(),
        many_cpus::trials(),
        serial::trials(),
        signed::trials(),
        disks::trials(),
        watch::trials(),
        images::trials(),
        linux::trials(),
        network::trials(),
        netns::trials(),
        slots::trials(),
        systemd::trials(),
        pools::trials(),
        functions::trials(),
        seeing::trials(),
        limits::trials(),
        load::trials(),
        bench::trials(),
        freebsd::trials(),
        freebsd_agent::trials(),
        soak::trials(),
    ];
    let mut trials: Vec<_> = trials.into_iter().flatten().collect();
    // The rig's way to ask for a group: as a filter, `freebsd/` would also find `embedded/freebsd/...`.
    if let Ok(group) = std::env::var("COLDSPARK_TRIALS_OF") {
        trials.retain(|trial| trial.name().split('/').next() == Some(group.as_str()));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    trial::print_reasons();
    trial::print_failures();
    conclusion.exit_code()
}
