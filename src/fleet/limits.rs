//! The most of everything that clients and guests can make the daemon hold.

use std::time::Duration;

pub use crate::worker::protocol::{DISKS_MAX, LAYERS_MAX, VCPUS_MAX};

/// Longest name of a VM, an image or a snapshot.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest command line, image's and request's together.
pub const COMMAND_LINE_BYTES_MAX: usize = 2048;
/// Longest console pattern.
pub const PATTERN_BYTES_MAX: usize = 256;
/// I/O ports of the machine's own devices: interrupt controllers, timer, keyboard controller, clock, reset, serial, ACPI's
/// fixed hardware, PCI and its functions' windows.
pub const DEVICE_PORTS: [std::ops::RangeInclusive<u16>; 13] = [
    0x20..=0x21,
    0x40..=0x43,
    0x60..=0x61,
    0x64..=0x64,
    0x70..=0x71,
    0x92..=0x92,
    0xa0..=0xa1,
    0x2f8..=0x2ff,
    0x3f8..=0x3ff,
    0x4d0..=0x4d1,
    0x600..=0x60d,
    0xcf8..=0xcff,
    0xc000..=0xcfff,
];
/// Longest name of a disk's file, and largest kernel that is taken from a disk, unpacked.
pub const DISK_NAME_BYTES_MAX: usize = 255;
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;
/// Most clones in one request.
pub const CLONES_MAX: u32 = 64;
/// Ended VMs that are still listed.
pub const EXITED_KEPT_MAX: usize = 64;
/// Most vCPUs, memory: what a request may ask for at all; the host may refuse earlier.
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Memory comes in steps of this.
pub const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// What an image without settings gets.
pub const MEMORY_BYTES_DEFAULT: u64 = 512 << 20;

/// Console output kept for those who come later, or lag behind.
pub const BACKLOG_BYTES_MAX: usize = 256 << 10;
/// Most output in one piece.
pub const CONSOLE_READ_BYTES: usize = 16 << 10;
/// A listener gets at most one piece in this time, if it is not a full one: guests print byte by byte, and a message for each
/// would cost more than the byte. What comes after silence comes at once.
pub const CONSOLE_PACE: Duration = Duration::from_millis(5);
/// Most input bytes in one message, and messages waiting for the guest to read them.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 4 << 10;
pub const CONSOLE_INPUTS_MAX: usize = 16;
/// Console streams over all VMs.
pub const CONSOLE_STREAMS_MAX: usize = 1024;
/// Watches of events.
pub const WATCHES_MAX: usize = 64;
/// A panic's trace has ended when the console is silent for this long, or after that long whatever comes.
pub const TRACE_PAUSE: Duration = Duration::from_millis(500);
pub const TRACE_WITHIN: Duration = Duration::from_secs(10);
/// Lines of a worker's stderr shown in an error.
pub const LAST_WORDS_MAX: usize = 12;
/// Console shown in an error: it travels in a header, of which there is room for about 4 KiB.
pub const LAST_LINES_MAX: usize = 32;
pub const LAST_LINES_BYTES_MAX: usize = 3 << 10;

/// How long a guest may take to power itself off when it is asked to.
pub const STOP_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
pub const STOP_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// A guest that resets itself more often than this within that time is not booted again.
pub const RESTARTS_MAX: usize = 5;
pub const RESTARTS_WITHIN: Duration = Duration::from_secs(60);
/// A VM's record is written for its guest's hellos so often at most; the last one counts.
pub const RECORD_EVERY: Duration = Duration::from_secs(1);

/// Agent requests of one VM that wait for their answer.
pub const AGENT_REQUESTS_MAX: usize = 64;
pub const AGENT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
pub const AGENT_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// Commands and files under way in one VM.
pub const STREAMS_MAX: usize = crate::agent::wire::STREAMS_MAX;
/// Output of one pipe of a stream that came and was not taken.
pub const WINDOW_BYTES: u32 = 128 << 10;
/// Input of a stream that the guest has not taken.
pub const STDIN_WAITING_BYTES_MAX: usize = 64 << 10;
/// Signals of a stream that the guest has not taken.
pub const SIGNALS_WAITING_MAX: usize = 16;
/// How long a command may be given at most, if it is given a time.
pub const EXEC_TIMEOUT_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a clone's agent may take to confirm its identity.
pub const IDENTITY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the agent may take to say that its system's random generator stands still, how often it is asked, and the least time between.
pub const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);
pub const SETTLE_TRIES: usize = 8;
pub const SETTLE_STEP: Duration = Duration::from_millis(1);
/// Most of these requests of one VM that wait for their answer: an agent that is dead never answers, and each snapshot asks.
pub const SETTLES_MAX: usize = 8;
/// How long a snapshot waits for the agent's answers under way while nothing comes from it; and while something does.
pub const QUIET_TIMEOUT: Duration = Duration::from_secs(5);
pub const QUIET_TIMEOUT_MAX: Duration = Duration::from_secs(60);

pub const READY_TIMEOUT_DEFAULT: Duration = Duration::from_secs(120);
pub const READY_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// How long a worker may take to answer a request that does not write memory.
pub const WORKER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the zygote may take to become a worker, and how long none is started after one that did not.
pub const ZYGOTE_TIMEOUT: Duration = Duration::from_secs(10);
pub const ZYGOTE_RETRY: Duration = Duration::from_secs(1);
/// How long a worker may take to tell where its vCPUs are: it waits 2 s for them itself.
pub const INSPECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a worker may take to write a snapshot.
pub const FREEZE_TIMEOUT: Duration = Duration::from_secs(900);

/// Events of one worker that the daemon has not looked at.
pub const WORKER_EVENTS_MAX: usize = 64;
/// Commands waiting for one VM's owner.
pub const COMMANDS_MAX: usize = 16;
/// Lines of one worker in the log: at once, and one more after each such time. What is left out is counted.
pub const LOG_LINES_AT_ONCE: u32 = 200;
pub const LOG_LINE_EVERY: Duration = Duration::from_secs(1);
/// Longest line of a worker's stderr that is kept whole.
pub const STDERR_LINE_BYTES_MAX: usize = 4 << 10;
/// Snapshots whose files are kept open.
pub const OPEN_SNAPSHOTS_MAX: usize = 64;
/// Most memory of one snapshot that is folded into large folios of the page cache.
pub const FOLD_BYTES_MAX: u64 = 2 << 30;
/// A clone without a first answer is learnt from so long after its start.
pub const LEARN_WITHIN: Duration = Duration::from_secs(1);
/// How often the working sets of snapshots in use are looked at, and how long after its last clone one is in use.
pub const KEEP_EVERY: Duration = Duration::from_secs(1);
pub const KEEP_FOR: Duration = Duration::from_secs(600);
/// Snapshots that are read through and compared at a time; who asks for another waits.
pub const VERIFIES_MAX: usize = 2;
/// Image imports under way.
pub const IMPORTS_MAX: usize = 4;
