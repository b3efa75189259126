//! The checks made at boot: each is one line on the serial console and one bit of HELLO.

use crate::serial::say;
use crate::wire::CHECK_NAMES;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Checks {
    run: u64,
    failed: u64,
}

/// The bit of a check; the name is known when the guest is compiled, or it is not compiled.
pub(crate) const fn bit_of(name: &str) -> usize {
    let mut bit = 0;
    while bit < CHECK_NAMES.len() {
        if same(CHECK_NAMES[bit].as_bytes(), name.as_bytes()) {
            return bit;
        }
        bit += 1;
    }
    panic!("not a name of CHECK_NAMES")
}

const fn same(left: &[u8], right: &[u8]) -> bool {
    if left.len() != right.len() {
        return false;
    }
    let mut index = 0;
    while index < left.len() {
        if left[index] != right[index] {
            return false;
        }
        index += 1;
    }
    true
}

impl Checks {
    pub(crate) fn new() -> Checks {
        Checks { run: 0, failed: 0 }
    }

    /// Use [`check`].
    pub(crate) fn note(&mut self, bit: usize, good: bool, what: core::fmt::Arguments) {
        self.run |= 1 << bit;
        if !good {
            self.failed |= 1 << bit;
        }
        say!("{} {}: {what}", if good { "ok    " } else { "FAILED" }, CHECK_NAMES[bit]);
    }

    pub(crate) fn run(&self) -> u64 {
        self.run
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }
}

/// `check!(checks, "name", good, "what was seen {}", x)`
macro_rules! check {
    ($checks:expr, $name:literal, $good:expr, $($what:tt)*) => {{
        const BIT: usize = $crate::checks::bit_of($name);
        let good: bool = $good;
        $checks.note(BIT, good, format_args!($($what)*));
        good
    }};
}
pub(crate) use check;
