//! Crash consistency: every operation that changes what the service keeps is killed at each of its system calls, and each of these calls
//! is made to fail. What is opened afterwards is the old state or the new one, whole, with nothing half made beside it.
//!
//! | trials | what is done, for every call n | what holds |
//! |---|---|---|
//! | `killed/...` | SIGKILL at the entry of call n | old or new |
//! | `fails/...` | call n fails: EIO, ENOSPC, EINTR in turn | it went well and all is new; or it says what failed, all is old, and the same process can do it again |
//! | `broken/...` | calls from n on all fail; and n fails, and the clean-up is killed at each call | old or new |
//! | `synced/...` | nothing: the order of writes, syncs and renames is looked at | a loss of power finds it whole too |
//!
//! The operation runs in a child process, this program again (`operations::child`), of one thread and under ptrace (`tracer`). Only calls that
//! change something in the operation's folder count: between two of them nothing in it differs. Where ptrace is not allowed the trials are
//! ignored, and say so.

mod operations;
mod order;
mod tracer;
mod tree;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::errno::Errno;

use operations::{FAILED_ONCE, OPERATIONS, Operation};
use tracer::{AtFailure, Call, Failure, Plan, Run};
use tree::Tree;

/// Gives how many points were tried.
type Body = fn(&Stage) -> Result<usize, Failure>;

fn main() -> ExitCode {
    if let (Some(operation), Some(folder)) =
        (std::env::var(tracer::OPERATION).ok(), std::env::var_os(tracer::FOLDER))
    {
        return operations::child(&operation, Path::new(&folder));
    }
    let arguments = Arguments::from_args();
    let kinds: [(&str, Body); 4] =
        [("killed", killed), ("fails", fails), ("broken", broken), ("synced", synced)];
    let trials = OPERATIONS.iter().flat_map(|operation| {
        kinds.map(|(kind, body)| {
            let name = format!("{kind}/{}", operation.name);
            let shown = name.clone();
            Trial::ignorable_test(name, move || trial(&shown, operation, body))
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn trial(name: &str, operation: &'static Operation, body: Body) -> Result<Completion, Failed> {
    let result = Stage::new(operation).and_then(|stage| body(&stage));
    match result {
        Ok(points) => {
            println!("{name}: {points} points");
            Ok(Completion::Completed)
        }
        Err(Failure::NotAllowed(reason)) => Ok(Completion::ignored_with(reason)),
        Err(Failure::Broken(error)) => Err(format!("{error:#}").into()),
    }
}

/// An operation, the state before it and the state after it.
struct Stage {
    operation: &'static Operation,
    folder: tempfile::TempDir,
    /// Names at the top of the folder before.
    names: BTreeSet<String>,
    old: Tree,
    new: Tree,
    /// The calls that it makes when nothing happens to it.
    calls: Vec<Call>,
}

impl Stage {
    fn new(operation: &'static Operation) -> Result<Stage, Failure> {
        let folder = tempfile::tempdir().context("a folder")?;
        let (old, new) = (Tree::new(), Tree::new());
        let mut stage = Stage { operation, folder, names: BTreeSet::new(), old, new, calls: Vec::new() };
        let template = stage.template();
        fs::create_dir(&template).context("a folder")?;
        {
            let _one = tracer::one_at_a_time();
            (operation.prepare)(&template).context("the state before")?;
        }
        stage.names = tree::top(&template)?;
        stage.old = stage.open(&stage.copy()?)?;
        let folder = stage.copy()?;
        let run = stage.run(&folder, Plan::default(), &mut || Ok(true))?;
        story(
            ensured(run.status == Some(0), || format!("undisturbed, it ends with {:?}", run.status)),
            Plan::default(),
            &run,
        )?;
        stage.new = stage.open(&folder)?;
        stage.calls = run.calls;
        Ok(stage)
    }

    fn template(&self) -> PathBuf {
        self.folder.path().join("before")
    }

    /// A fresh copy of the state before.
    fn copy(&self) -> anyhow::Result<PathBuf> {
        self.copy_of(&self.template(), "now")
    }

    fn copy_of(&self, from: &Path, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.path().join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        tree::copy(from, &folder)?;
        Ok(folder)
    }

    /// Opens a folder as the service does, and tells what is in it then.
    fn open(&self, folder: &Path) -> anyhow::Result<Tree> {
        let _one = tracer::one_at_a_time();
        (self.operation.open)(folder).context("opened anew")?;
        tree::read(folder, &self.names)
    }

    fn run(&self, folder: &Path, plan: Plan, at_failure: AtFailure) -> Result<Run, Failure> {
        tracer::run(self.operation.name, self.operation.arguments, folder, plan, at_failure)
    }

    /// What is in the folder must be this.
    fn is(&self, folder: &Path, expected: &Tree) -> anyhow::Result<()> {
        let found = self.open(folder)?;
        ensure!(found == *expected, "it is not what it should be:{}", tree::difference(&found, expected));
        Ok(())
    }

    /// Whether it is the new state; it must be that or the old one.
    fn is_new(&self, folder: &Path) -> anyhow::Result<bool> {
        let found = self.open(folder)?;
        ensure!(
            found == self.old || found == self.new,
            "neither the old state:{}\nnor the new one:{}",
            tree::difference(&found, &self.old),
            tree::difference(&found, &self.new)
        );
        Ok(found == self.new)
    }
}

fn ensured(holds: bool, problem: impl FnOnce() -> String) -> anyhow::Result<()> {
    if holds { Ok(()) } else { Err(anyhow::Error::msg(problem())) }
}

/// With what was done and what it did then, for errors.
fn story<T>(result: anyhow::Result<T>, plan: Plan, run: &Run) -> anyhow::Result<T> {
    result.with_context(|| {
        let last = run.calls.iter().rev().take(4).map(|call| format!("{} {:?}", call.name, call.paths));
        let last: Vec<String> = last.collect();
        format!(
            "{plan:?}, {} calls, the last ones backwards: {}; it said {:?}",
            run.calls.len(),
            last.join(", "),
            run.text
        )
    })
}

fn killed(stage: &Stage) -> Result<usize, Failure> {
    let mut was_new = false;
    for at in 1..=stage.calls.len() {
        let folder = stage.copy()?;
        let plan = Plan { kill: Some(at), ..Plan::default() };
        let run = stage.run(&folder, plan, &mut || Ok(true))?;
        let result =
            ensured(run.status.is_none(), || "it was not killed".into()).and_then(|()| stage.is_new(&folder));
        let is_new = story(result, plan, &run)?;
        story(ensured(is_new || !was_new, || "it was new earlier, and is old again".into()), plan, &run)?;
        was_new = is_new;
    }
    Ok(stage.calls.len())
}

fn fails(stage: &Stage) -> Result<usize, Failure> {
    let mut points = 0;
    for (at, call) in (1..).zip(&stage.calls) {
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::EINTR] {
            points += 1;
            let folder = stage.copy()?;
            let plan = Plan { fail: Some((at, at, errno)), kill: None };
            let run = stage.run(&folder, plan, &mut || {
                let now = stage.copy_of(&folder, "failed")?;
                stage.is(&now, &stage.old).context("after the failure")?;
                Ok(true)
            });
            let run = run.map_err(|failure| failure.at(plan, call))?;
            let result = match run.status {
                Some(0) => Ok(()),
                Some(status) if status == i32::from(FAILED_ONCE) => says_what(&run, at, errno),
                other => Err(anyhow::anyhow!("it ended with {other:?}")),
            };
            story(result.and_then(|()| stage.is(&folder, &stage.new)), plan, &run)?;
        }
    }
    Ok(points)
}

/// An error names the file, what it replaces, or a folder that it is in; and the reason.
fn says_what(run: &Run, at: usize, errno: Errno) -> anyhow::Result<()> {
    let call = run.calls.get(at - 1).context("the call that failed")?;
    let stems = |path: &PathBuf| -> Vec<String> {
        let stems = path.iter().map(|name| Path::new(name).file_stem().unwrap_or(name));
        stems.map(|stem| stem.to_string_lossy().into_owned()).collect()
    };
    let names: Vec<String> = call.paths.iter().flat_map(stems).collect();
    let named = names.is_empty() || names.iter().any(|name| run.text.contains(name));
    ensure!(named, "the error names none of {names:?}");
    ensure!(run.text.contains(&format!("(os error {})", errno as i32)), "the error does not say {errno}");
    Ok(())
}

fn broken(stage: &Stage) -> Result<usize, Failure> {
    let mut points = 0;
    for (at, call) in (1..).zip(&stage.calls) {
        for last in [at + 1, usize::MAX] {
            points += 1;
            let folder = stage.copy()?;
            let plan = Plan { fail: Some((at, last, Errno::EIO)), kill: None };
            let run =
                stage.run(&folder, plan, &mut || Ok(false)).map_err(|failure| failure.at(plan, call))?;
            story(stage.is_new(&folder), plan, &run)?;
        }
        // What it does to clear up, and to do it again.
        for kill in at + 1.. {
            let mut has_failed = false;
            let folder = stage.copy()?;
            let plan = Plan { fail: Some((at, at, Errno::EIO)), kill: Some(kill) };
            let run = stage.run(&folder, plan, &mut || {
                has_failed = true;
                Ok(false)
            });
            let run = run.map_err(|failure| failure.at(plan, call))?;
            story(stage.is_new(&folder), plan, &run)?;
            if has_failed || run.status.is_some() {
                break;
            }
            points += 1;
        }
    }
    Ok(points)
}

fn synced(stage: &Stage) -> Result<usize, Failure> {
    order::check(&stage.calls, stage.operation.durable).map_err(anyhow::Error::msg)?;
    Ok(stage.calls.len())
}
