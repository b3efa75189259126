//! A trial: a name, what it needs, a time limit, and an async body with its own daemon.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::Context as _;
use libtest_mimic::{Completion, Trial};

use crate::host::{self, Need};

/// Reasons for which trials were ignored, with their names.
static IGNORED: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());
/// Failed trials, and why in a line.
static FAILED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// How much of an error the list of failed trials shows.
const WHY_CHARS: usize = 300;

/// How much longer everything may take inside the rig than on hardware.
const RIG_FACTOR: u32 = 6;

/// A time limit as it is on this host. Limits only keep a broken test from hanging; nothing is measured.
pub fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds) * if host::in_rig() { RIG_FACTOR } else { 1 }
}

/// What a trial's body is given.
pub struct Stage {
    /// An empty folder for daemon and console logs; it stays after the trial.
    pub logs: PathBuf,
}

impl Stage {
    fn new(name: &str) -> anyhow::Result<Stage> {
        let top = match std::env::var_os("COLDSPARK_TEST_LOGS") {
            Some(folder) => PathBuf::from(folder),
            None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("system"),
        };
        let logs = top.join(name.replace('/', "-"));
        match fs::remove_dir_all(&logs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => fs::create_dir_all(&logs).with_context(|| format!("folder for logs {}", logs.display()))?,
        }
        Ok(Stage { logs })
    }
}

/// Makes a trial. `body` is called only if the host has all of `needs`; it fails after `seconds` (see [`limit`]).
pub fn trial<F, R>(name: impl Into<String>, needs: &'static [Need], seconds: u64, body: F) -> Trial
where
    F: FnOnce(Stage) -> R + Send + 'static,
    R: Future<Output = anyhow::Result<()>>,
{
    let name = name.into();
    let for_runner = name.clone();
    Trial::ignorable_test(name, move || {
        if let Some(reason) = needs.iter().find_map(|need| need.check().err()) {
            let mut ignored = IGNORED.lock().unwrap_or_else(|poison| poison.into_inner());
            ignored.entry(reason.clone()).or_default().push(for_runner);
            return Ok(Completion::ignored_with(reason));
        }
        let stage = Stage::new(&for_runner).map_err(|error| format!("{error:?}"))?;
        let logs = stage.logs.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let watched = Watched::begin(&for_runner, limit(seconds) + limit(20));
        let result = runtime.block_on(async {
            tokio::time::timeout(limit(seconds), body(stage))
                .await
                .with_context(|| format!("not finished after {} s", limit(seconds).as_secs()))?
        });
        // Not waiting for tasks that a failed trial left behind.
        runtime.shutdown_background();
        drop(watched);
        result.map(|()| Completion::Completed).map_err(|error| {
            let why: String = format!("{error:#}").replace('\n', " | ").chars().take(WHY_CHARS).collect();
            FAILED.lock().unwrap_or_else(|poison| poison.into_inner()).push((for_runner, why));
            format!("{error:#}\n{}{}", places(&error), last_lines_of_all(&logs)).into()
        })
    })
}

/// Ends the whole program if a trial has not ended a while after its limit, which its body may ignore by blocking; says then where
/// all threads of the program and of those that it started are.
struct Watched(Option<Sender<()>>);

impl Watched {
    fn begin(name: &str, patience: Duration) -> Watched {
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        let name = name.to_owned();
        std::thread::spawn(move || {
            if ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                println!("stuck: {name} has not ended after {} s; all threads are here:", patience.as_secs());
                print!("{}", threads());
                std::process::exit(101);
            }
        });
        Watched(Some(alive))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.take();
    }
}

/// Each thread of this program (in the rig, where nobody else is: of all programs): its name, state, and where in the kernel it waits.
fn threads() -> String {
    let mut text = String::new();
    let processes: Vec<PathBuf> = if host::in_rig() {
        fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    } else {
        vec!["/proc/self".into()]
    };
    let tasks = processes.iter().filter_map(|process| fs::read_dir(process.join("task")).ok());
    for task in tasks.flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or("?");
        let (name, wait, stack) = (read("comm"), read("wchan"), read("stack"));
        // Threads of the kernel have no memory of their own.
        if read("statm").starts_with("0 ") {
            continue;
        }
        let stack: Vec<&str> =
            stack.lines().filter_map(|line| line.split_whitespace().nth(1)).take(6).collect();
        let _ = writeln!(
            text,
            "    {} {} {state} {wait} {}",
            task.path().display(),
            name.trim(),
            stack.join(" < ")
        );
    }
    text
}

/// Where in these files the error came from (`main` turns capturing on).
fn places(error: &anyhow::Error) -> String {
    let trace = error.backtrace().to_string();
    trace
        .lines()
        .filter(|line| line.contains("tests/system/"))
        .map(|line| format!("    {}\n", line.trim()))
        .collect()
}

/// The ends of all logs in a folder: of the one written last more than of the others.
fn last_lines_of_all(logs: &Path) -> String {
    const LINES: usize = 40;
    const LINES_OF_OTHERS: usize = 6;
    const OTHERS: usize = 8;
    let mut files: Vec<_> = fs::read_dir(logs).into_iter().flatten().flatten().collect();
    files
        .sort_by_key(|file| std::cmp::Reverse(file.metadata().and_then(|metadata| metadata.modified()).ok()));
    let mut text = String::new();
    for (index, file) in files.iter().take(OTHERS + 1).enumerate() {
        let bytes = fs::read(file.path()).unwrap_or_default();
        let content = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = content.lines().collect();
        let skipped = lines.len().saturating_sub(if index == 0 { LINES } else { LINES_OF_OTHERS });
        let shown = lines.len() - skipped;
        let _ = writeln!(text, "--- {} (last {shown} of {} lines)", file.path().display(), lines.len());
        for line in &lines[skipped..] {
            let _ = writeln!(text, "    {}", line.trim_end());
        }
    }
    if files.len() > OTHERS + 1 {
        let _ = writeln!(text, "--- and {} older files in {}", files.len() - OTHERS - 1, logs.display());
    }
    text
}

/// Prints what failed and why, each in a line.
pub fn print_failures() {
    let failed = FAILED.lock().unwrap_or_else(|poison| poison.into_inner());
    for (name, why) in failed.iter() {
        println!("failed: {name}: {why}");
    }
}

/// Prints what was ignored and why.
pub fn print_reasons() {
    let ignored = IGNORED.lock().unwrap_or_else(|poison| poison.into_inner());
    if ignored.is_empty() {
        return;
    }
    println!("ignored:");
    for (reason, names) in ignored.iter() {
        println!("  {}: {reason}", names.len());
        for name in names {
            println!("      {name}");
        }
    }
}
