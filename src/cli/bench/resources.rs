//! What this process and its workers hold of the host, to see whether it grows (proc(5)).

use std::fs;

use anyhow::Context;
use serde_json::{Value, json};

/// What is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Of this process.
    pub descriptors: usize,
    /// Of this process.
    pub threads: u64,
    /// Children that have not been reaped: workers, and the zygote.
    pub workers: usize,
    /// Of this process.
    pub resident_bytes: u64,
}

impl Held {
    pub fn now() -> anyhow::Result<Held> {
        let status = fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        Ok(Held {
            // One of them is the folder being read.
            descriptors: fs::read_dir("/proc/self/fd").context("/proc/self/fd")?.count().saturating_sub(1),
            threads: field("Threads"),
            workers: children()?.len(),
            resident_bytes: field("VmRSS") << 10,
        })
    }

    pub fn json(&self) -> Value {
        json!({
            "descriptors": self.descriptors,
            "threads": self.threads,
            "workers": self.workers,
            "resident_bytes": self.resident_bytes,
        })
    }
}

/// Process ids of this process's children.
fn children() -> anyhow::Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir("/proc/self/task").context("/proc/self/task")? {
        // A thread may end while we look.
        let Ok(text) = fs::read_to_string(thread?.path().join("children")) else { continue };
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Memory of one process, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// Written by it, and nobody else's.
    pub private_dirty: u64,
    /// Its share of everything it has mapped.
    pub proportional: u64,
}

/// Memory of the process `pid`, as /proc/PID/smaps_rollup has it.
pub fn memory(pid: u32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("{path}; is the worker gone? (A jailed worker can be looked into by root only)")
    })?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    Ok(Memory { private_dirty: field("Private_Dirty:"), proportional: field("Pss:") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let held = Held::now().unwrap();
        assert!(held.descriptors >= 3 && held.threads >= 1 && held.resident_bytes > 1 << 20, "{held:?}");
        let file = fs::File::open("/proc/self/status").unwrap();
        assert!(Held::now().unwrap().descriptors > held.descriptors - 2);
        drop(file);
        let memory = memory(std::process::id()).unwrap();
        assert!(memory.private_dirty > 0 && memory.proportional > 0, "{memory:?}");
    }
}
