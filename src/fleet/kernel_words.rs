//! What a guest's kernel says on its console that the service acts on: that it panicked, and that it has halted.
//!
//! FreeBSD: `panic: ...` (sys/kern/kern_shutdown.c, vpanic), `KDB: enter: ...` (subr_kdb.c), and after `halt` or a
//! `shutdown -p` without ACPI "The operating system has halted." with "Please press any key to reboot." (shutdown_halt).
//! Linux: `Kernel panic - not syncing: ...` (kernel/panic.c). Only whole lines that begin so count. Anybody who may write to
//! the guest's console can say these words: what follows from them ends at most that guest.

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
