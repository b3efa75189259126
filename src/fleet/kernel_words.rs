//! What a guest's kernel says on its console that the service acts on: that it panicked, that it has halted, and how far its
//! boot has come.
//!
//! FreeBSD: `panic: ...` (sys/kern/kern_shutdown.c, vpanic), `KDB: enter: ...` (subr_kdb.c), and after `halt` or a
//! `shutdown -p` without ACPI "The operating system has halted." with "Please press any key to reboot." (shutdown_halt).
//! Before it mounts its root file system it says "Trying to mount root from ..." (vfs_mountroot.c); it does not say when it starts
//! init, so what is told is the first output after that line: init's, unless the kernel had more to say.
//! Linux: `Run /init as init process` (init/main.c, run_init_process), `Kernel panic - not syncing: ...` (kernel/panic.c). Only whole lines that begin so count. Anybody who may write to
//! the guest's console can say these words: what follows from them ends at most that guest.

use std::time::Instant;

/// Longest part of a line that is looked at and kept.
const LINE_BYTES_MAX: usize = 512;

/// What has been heard so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelWords {
    /// The line of the last panic.
    pub panic: Option<String>,
    /// How many panics there were: tells a new one from the last.
    pub panics: u32,
    /// The kernel has stopped for good and waits for a key.
    pub halted: bool,
    /// When the kernel said that it mounts its root file system, for the first time.
    pub root_mount: Option<Instant>,
    /// When the first output after that line came.
    pub after_root_mount: Option<Instant>,
    /// When the kernel said that it starts init.
    pub init: Option<Instant>,
}

/// Reads a console that comes in pieces.
#[derive(Debug, Default)]
pub struct Ear {
    line: Vec<u8>,
    /// The line before said that the system has halted.
    halting: bool,
    heard: KernelWords,
}

impl Ear {
    /// Takes in some output; what has been heard if that is news.
    pub fn hear(&mut self, bytes: &[u8]) -> Option<KernelWords> {
        let mut news = false;
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.heard.root_mount.is_some()
                && self.heard.after_root_mount.is_none()
                && part.iter().any(|byte| !byte.is_ascii_whitespace())
            {
                self.heard.after_root_mount = Some(Instant::now());
                news = true;
            }
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(part.get(..room.min(part.len())).unwrap_or_default());
            if part.ends_with(b"\n") {
                news |= self.line_ended();
                self.line.clear();
            }
        }
        news.then(|| self.heard.clone())
    }

    fn line_ended(&mut self) -> bool {
        let text = String::from_utf8_lossy(&self.line);
        let text = without_time(text.trim());
        let was_halting = std::mem::replace(&mut self.halting, text == "The operating system has halted.");
        if was_halting && text == "Please press any key to reboot." {
            self.heard.halted = true;
            return true;
        }
        let progress = match text {
            _ if text.starts_with("Trying to mount root from ") => Some(&mut self.heard.root_mount),
            _ if text.starts_with("Run /") && text.ends_with(" as init process") => {
                Some(&mut self.heard.init)
            }
            _ => None,
        };
        if let Some(mark) = progress {
            let first = mark.is_none();
            mark.get_or_insert_with(Instant::now);
            return first;
        }
        // Entering the debugger for another reason than a panic is as good as one: nothing runs any more.
        let panic = text.starts_with("panic: ")
            || text.starts_with("Kernel panic - not syncing")
            || (text.starts_with("KDB: enter: ") && text != "KDB: enter: panic");
        if panic {
            self.heard.panic = Some(text.replace(char::is_control, "?"));
            self.heard.panics = self.heard.panics.saturating_add(1);
        }
        panic
    }
}

/// Linux puts `[    1.234567] ` before its lines.
fn without_time(line: &str) -> &str {
    let Some((time, rest)) = line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) else {
        return line;
    };
    match time.trim().chars().all(|c| c.is_ascii_digit() || c == '.') {
        true => rest,
        false => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All of `text`, in pieces of `size` bytes.
    fn heard(text: &str, size: usize) -> KernelWords {
        let mut ear = Ear::default();
        let mut last = KernelWords::default();
        for piece in text.as_bytes().chunks(size) {
            last = ear.hear(piece).unwrap_or(last);
        }
        last
    }

    #[test]
    fn panics_are_heard_whatever_the_pieces() {
        let freebsd = "boot\r\npanic: vm_fault: fault on nofault entry\r\ncpuid = 0\r\nKDB: enter: panic\r\n[ thread pid 0 ]\r\n";
        for size in [1, 2, 7, 4096] {
            let words = heard(freebsd, size);
            assert_eq!(words.panic.as_deref(), Some("panic: vm_fault: fault on nofault entry"));
            assert_eq!(words.panics, 1);
        }
        let linux = heard("[    0.713219] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n", 5);
        assert_eq!(linux.panic.as_deref(), Some("Kernel panic - not syncing: VFS: Unable to mount root fs"));
        assert_eq!(heard("KDB: enter: Break to debugger\n", 9).panics, 1);
    }

    #[test]
    fn words_inside_a_line_are_nothing() {
        for text in [
            "don't panic: all is well\n",
            "# echo panic: no\n",
            "The operating system has halted.\n# \n",
            "Please press any key to reboot.\n",
            "panic: not the end of a line",
        ] {
            assert_eq!(heard(text, 4096), KernelWords::default(), "{text}");
        }
    }

    #[test]
    fn a_boots_progress_is_heard_once_and_in_order() {
        let freebsd =
            "Timecounters tick\r\nTrying to mount root from ufs:/dev/vtbd0 [rw]...\r\n\r\ninit: here\r\n";
        for size in [1, 9, 4096] {
            let words = heard(freebsd, size);
            assert!(words.root_mount.is_some() && words.root_mount <= words.after_root_mount, "{words:?}");
            assert_eq!((words.init, words.panics), (None, 0));
        }
        assert_eq!(heard("Trying to mount root from ufs:/dev/vtbd0 []...\n \n", 3).after_root_mount, None);
        let linux = heard("[    0.713219] Run /init as init process\r\n", 4);
        assert!(linux.init.is_some() && linux.root_mount.is_none());
        let mut ear = Ear::default();
        let first = ear.hear(b"Trying to mount root from a\n").unwrap();
        assert_eq!(ear.hear(b"\nTrying to mount root from b\n").unwrap().root_mount, first.root_mount);
    }

    #[test]
    fn a_halt_is_both_lines() {
        let text =
            "Uptime: 1s\r\n\r\nThe operating system has halted.\r\nPlease press any key to reboot.\r\n\r\n";
        assert!(heard(text, 3).halted);
    }

    #[test]
    fn an_endless_line_takes_no_room() {
        let mut ear = Ear::default();
        for _ in 0..1000 {
            assert_eq!(ear.hear(&[b'x'; 1000]), None);
        }
        assert!(ear.line.len() <= LINE_BYTES_MAX);
        assert_eq!(ear.hear(b"\npanic: later\n").unwrap().panics, 1);
    }
}
