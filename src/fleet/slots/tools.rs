//! Running `ip` and `nft`: what they are told comes from a file in memory, so nobody waits for a pipe, and they may take a limited time.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::error::SlotError;
use crate::fleet::child;

/// How long one of them may take.
const WITHIN: Duration = Duration::from_secs(10);
/// Of what it says when it fails.
const SAID_MAX: u64 = 2 << 10;
/// Of what it is asked for.
const ANSWER_MAX: u64 = 8 << 20;
/// Where a user's PATH may not lead.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Runs `ip -batch -` in this thread's network namespace.
pub fn ip(text: &str) -> Result<(), SlotError> {
    run("ip", &["-batch", "-"], text)
}

/// The same, going on after what fails.
pub fn ip_all(text: &str) -> Result<(), SlotError> {
    run("ip", &["-force", "-batch", "-"], text)
}

/// Runs `nft -f -`, all or nothing, in this thread's network namespace.
pub fn nft(text: &str) -> Result<(), SlotError> {
    run("nft", &["-f", "-"], text)
}

/// What a program says that is asked for something, in this thread's network namespace. What is beyond a limit is cut off.
pub fn said(program: &'static str, arguments: &[&str]) -> Result<String, SlotError> {
    let failed = |error: std::io::Error| SlotError::NoTool { program, reason: error.to_string() };
    let mut answer = memory_file("coldspark-answer").map_err(failed)?;
    let out = answer.try_clone().map_err(failed)?;
    run_to(program, arguments, "", Stdio::from(out))?;
    let mut bytes = Vec::new();
    answer.rewind().map_err(failed)?;
    answer.take(ANSWER_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether both are there and this process may configure networks: asks for what a change would ask for.
pub fn check() -> Result<(), SlotError> {
    run("ip", &["-V"], "")?;
    // It fails without CAP_NET_ADMIN.
    run("nft", &["list", "tables"], "")
}

/// Where a program is.
pub fn find(program: &str) -> Option<std::path::PathBuf> {
    FOLDERS.iter().map(|folder| Path::new(folder).join(program)).find(|path| path.exists())
}

/// Writes a kernel setting, of this thread's network namespace where it is one of those.
pub fn set(path: &str, value: &str) -> Result<(), SlotError> {
    let failed =
        |error: std::io::Error| SlotError::Setting { path: path.to_owned(), reason: error.to_string() };
    fs::write(path, value).map_err(failed)
}

fn run(program: &'static str, arguments: &[&str], text: &str) -> Result<(), SlotError> {
    run_to(program, arguments, text, Stdio::null())
}

fn run_to(program: &'static str, arguments: &[&str], text: &str, out: Stdio) -> Result<(), SlotError> {
    let failed = |error: std::io::Error| SlotError::NoTool { program, reason: error.to_string() };
    let path = find(program).ok_or_else(|| SlotError::NoTool {
        program,
        reason: format!("it is not in {}", FOLDERS.join(", ")),
    })?;
    let input = memory_file("coldspark-input").and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.rewind()?;
        Ok(file)
    });
    let said = memory_file("coldspark-said").map_err(failed)?;
    let mut command = Command::new(path);
    command
        .args(arguments)
        .stdin(Stdio::from(input.map_err(failed)?))
        .stdout(out)
        .stderr(Stdio::from(said.try_clone().map_err(failed)?));
    let mut child = child::spawn(&mut command).map_err(failed)?;
    let in_time = ends(child.id());
    if !in_time {
        // Fails only when it has ended just now.
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    let mut said = said;
    let _ = said.rewind();
    let _ = said.take(SAID_MAX).read_to_string(&mut text);
    let text = text.trim();
    Err(SlotError::Tool {
        program,
        said: match (in_time, text.is_empty()) {
            (false, _) => format!("it did not end within {} s; {text}", WITHIN.as_secs()),
            (true, true) => status.to_string(),
            (true, false) => text.replace('\n', "; "),
        },
    })
}

fn memory_file(name: &str) -> std::io::Result<File> {
    Ok(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

/// Waits for a child's end; false: it took too long, or cannot be watched.
fn ends(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    let within = Timespec { tv_sec: WITHIN.as_secs() as i64, tv_nsec: 0 };
    // A signal to this thread would be one to the whole process.
    matches!(poll(&mut polled, Some(&within)), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tool_says_comes_with_its_failure() {
        if find("ip").is_none() {
            return;
        }
        let error = ip("link set none-such-0 up\n").unwrap_err().to_string();
        assert!(error.contains("none-such-0"), "{error}");
        assert!(matches!(run("coldspark-no-such", &[], ""), Err(SlotError::NoTool { .. })));
    }
}
