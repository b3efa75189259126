//! The command line as words, and FreeBSD's kernel environment made of them.
//!
//! Pure functions over strings that a caller of the service may have written. Facts: FREEBSD.md sections 1.5 and 2.4;
//! FreeBSD's `sys/kern/subr_boot.c` (flags, `boot_*` variables), `sys/kern/kern_environment.c` (limits),
//! `stand/i386/libi386/bootinfo.c` (`console` adds to the howto word).

use super::error::BootError;

/// Longest command line accepted from the caller.
pub const COMMAND_LINE_BYTES_MAX: usize = 32 << 10;
/// Longest name in FreeBSD's environment (`KENV_MNAMELEN`).
const NAME_BYTES_MAX: usize = 128;
/// Longest value (`KENV_MVALLEN`; newer kernels: unless the variable `kenv_mvallen` says otherwise).
const VALUE_BYTES_MAX: usize = 128;
/// FreeBSD keeps 512 variables (`KENV_SIZE`); some are the kernel's own.
const VARIABLES_MAX: usize = 480;

/// `howto` bits by flag letter and by variable (`sys/sys/reboot.h`).
const FLAGS: &[(char, u32)] = &[
    ('a', 0x1),
    ('C', 0x2000),
    ('d', 0x40),
    ('r', 0x20),
    ('g', 0x8000),
    ('D', RB_MULTIPLE),
    ('m', RB_MUTE),
    ('p', 0x10_0000),
    ('P', 0x1000_0000),
    ('h', RB_SERIAL),
    ('s', 0x2),
    ('v', 0x800),
];
const VARIABLES: &[(&str, u32)] = &[
    ("boot_askname", 0x1),
    ("boot_cdrom", 0x2000),
    ("boot_ddb", 0x40),
    ("boot_dfltroot", 0x20),
    ("boot_gdb", 0x8000),
    ("boot_multicons", RB_MULTIPLE),
    ("boot_mute", RB_MUTE),
    ("boot_pause", 0x10_0000),
    ("boot_serial", RB_SERIAL),
    ("boot_single", 0x2),
    ("boot_verbose", 0x800),
];
const RB_SERIAL: u32 = 0x1000;
const RB_MUTE: u32 = 0x1_0000;
const RB_MULTIPLE: u32 = 0x2000_0000;

/// Splits at white space; a double quote begins and ends a stretch in which white space belongs to the word.
/// Refuses control characters, unclosed quotes, and lines over [`COMMAND_LINE_BYTES_MAX`].
pub fn split(line: &str) -> Result<Vec<String>, BootError> {
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(too_long(line.len()));
    }
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' | '\t' | '\n' | '\r' if !quoted => words.extend(word.take()),
            c if c.is_control() => {
                return Err(BootError::CommandLine(format!(
                    "contains the control character {c:?}; remove it"
                )));
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    if quoted {
        return Err(BootError::CommandLine("a double quote is not closed".into()));
    }
    words.extend(word);
    Ok(words)
}

fn too_long(bytes: usize) -> BootError {
    BootError::CommandLine(format!("{bytes} bytes long; at most {COMMAND_LINE_BYTES_MAX} are taken"))
}

/// Checks a command line that is passed on as it is (Linux).
pub fn check_plain(line: &str) -> Result<(), BootError> {
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(too_long(line.len()));
    }
    match line.chars().find(|c| c.is_control() && *c != '\t') {
        Some(c) => Err(BootError::CommandLine(format!("contains the control character {c:?}; remove it"))),
        None => Ok(()),
    }
}

/// FreeBSD's kernel environment: names with values, in order, each name once; and boot flags such as `-s`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    variables: Vec<(String, String)>,
    flags: u32,
}

impl Environment {
    /// Sets a variable, replacing what it was.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        match self.variables.iter_mut().find(|(n, _)| *n == name) {
            Some(variable) => variable.1 = value,
            None => self.variables.push((name, value)),
        }
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Names and values, in the order in which they were first set.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Adds the words of the caller's command line: `name=value`, `name` (meaning 1), or flags such as `-sv`.
    pub fn add_line(&mut self, line: &str) -> Result<(), BootError> {
        for word in split(line)? {
            if let Some(letters) = word.strip_prefix('-') {
                for letter in letters.chars() {
                    let bit =
                        FLAGS.iter().find(|(l, _)| *l == letter).map(|(_, bit)| *bit).ok_or_else(|| {
                            BootError::CommandLine(format!(
                                "-{letter} is not a FreeBSD boot flag (known: aCdDghmpPrsv)"
                            ))
                        })?;
                    self.flags |= bit;
                }
                continue;
            }
            let (name, value) = word.split_once('=').unwrap_or((&word, "1"));
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(BootError::CommandLine(format!("{word:?} has no usable variable name")));
            }
            self.set(name, value);
        }
        Ok(())
    }

    /// Checks the kernel's limits, which it would otherwise apply by dropping variables.
    pub fn check(&self) -> Result<(), BootError> {
        let value_bytes_max =
            self.get("kenv_mvallen").and_then(|v| v.parse().ok()).unwrap_or(VALUE_BYTES_MAX);
        for (name, value) in self.iter() {
            if name.len() > NAME_BYTES_MAX {
                return Err(BootError::CommandLine(format!(
                    "the variable name {name:?} has {} bytes; FreeBSD takes {NAME_BYTES_MAX}",
                    name.len()
                )));
            }
            if value.len() > value_bytes_max {
                return Err(BootError::CommandLine(format!(
                    "the value of {name} has {} bytes; FreeBSD takes {value_bytes_max} (13 and later: more with \
                     kenv_mvallen=N)",
                    value.len()
                )));
            }
        }
        if self.variables.len() > VARIABLES_MAX {
            return Err(BootError::CommandLine(format!(
                "{} variables; FreeBSD takes about {VARIABLES_MAX}",
                self.variables.len()
            )));
        }
        Ok(())
    }

    /// The environment as the loader hands it over: `k=v\0k=v\0\0`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, value) in self.iter() {
            bytes.extend_from_slice(name.as_bytes());
            bytes.push(b'=');
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        }
        bytes.push(0);
        if self.variables.is_empty() {
            bytes.push(0);
        }
        bytes
    }

    /// The `howto` word: flags, `boot_*` variables that are not "no", and the consoles.
    pub fn howto(&self) -> u32 {
        let mut howto = self.flags;
        for (name, bit) in VARIABLES {
            if self.get(name).is_some_and(|value| !value.eq_ignore_ascii_case("no")) {
                howto |= bit;
            }
        }
        let consoles = self.get("console").unwrap_or("");
        let mut video = false;
        for console in consoles.split([',', ' ']) {
            match console {
                "comconsole" => howto |= RB_SERIAL,
                "nullconsole" => howto |= RB_MUTE,
                "vidconsole" => video = true,
                _ => {}
            }
        }
        if video && howto & RB_SERIAL != 0 {
            howto |= RB_MULTIPLE;
        }
        howto
    }

    /// The flag letters, for a protocol that passes them as a word.
    pub fn flag_letters(&self) -> String {
        FLAGS.iter().filter(|(_, bit)| self.flags & bit != 0).map(|(letter, _)| *letter).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment(line: &str) -> Environment {
        let mut environment = Environment::default();
        environment.add_line(line).expect("good line");
        environment
    }

    #[test]
    fn words_and_quotes() {
        assert_eq!(split(" a=1  b=\"x y\"\tc ").expect("good"), ["a=1", "b=x y", "c"]);
        assert_eq!(split("").expect("good"), Vec::<String>::new());
        assert_eq!(split("a=\"\"").expect("good"), ["a="]);
        assert!(split("a=\"x").is_err() && split("a\0b").is_err());
        assert!(split(&"x".repeat(COMMAND_LINE_BYTES_MAX + 1)).is_err());
    }

    #[test]
    fn later_words_win_and_keep_their_place() {
        let mut environment = environment("console=vidconsole a.b=1");
        environment.add_line("console=comconsole bare").expect("good");
        assert_eq!(environment.to_bytes(), b"console=comconsole\0a.b=1\0bare=1\0\0");
        assert_eq!(Environment::default().to_bytes(), b"\0\0");
    }

    #[test]
    fn howto_is_the_loaders() {
        assert_eq!(environment("").howto(), 0);
        assert_eq!(environment("boot_serial=YES").howto(), 0x1000);
        assert_eq!(environment("boot_serial=no").howto(), 0);
        assert_eq!(environment("console=comconsole -sv").howto(), 0x1000 | 0x2 | 0x800);
        assert_eq!(environment("console=\"comconsole vidconsole\"").howto(), 0x1000 | 0x2000_0000);
        assert_eq!(environment("boot_mute=YES").howto(), 0x1_0000);
        assert_eq!(environment("-vs").flag_letters(), "sv");
        assert!(Environment::default().add_line("-x").is_err());
        assert!(Environment::default().add_line("=x").is_err());
    }

    #[test]
    fn limits_are_told() {
        let long = "v".repeat(129);
        assert!(environment(&format!("a={long}")).check().is_err());
        assert!(environment(&format!("a={long} kenv_mvallen=256")).check().is_ok());
        assert!(environment(&format!("{long}=1")).check().is_err());
        let many: String = (0..500).map(|i| format!("v{i}=1 ")).collect();
        assert!(environment(&many).check().is_err());
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,200}") {
            let mut environment = Environment::default();
            if environment.add_line(&line).is_ok() {
                let _ = (environment.check(), environment.howto());
                let bytes = environment.to_bytes();
                prop_assert!(bytes.ends_with(b"\0\0"));
            }
        }
    }
}
