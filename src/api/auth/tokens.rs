//! The token file: who has which role by a bearer token. It holds digests, never the tokens.
//!
//! One token a line: `role name blake3-of-token [until=YYYY-MM-DD]`; empty lines and those that begin with `#` are skipped.
//! A token is 256 random bits, so a plain digest of it cannot be turned round, and needs no salt.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{AuthError, Role};

/// What each token begins with, so that scanners for leaked secrets can know one.
pub const PREFIX: &str = "coldspark_";
const TOKEN_BYTES: usize = 32;
/// Longest bearer token that is looked at.
const TOKEN_CHARS_MAX: usize = 256;
const FILE_BYTES_MAX: u64 = 1 << 20;
const TOKENS_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 63;
const SECONDS_PER_DAY: u64 = 86_400;

/// A line of the file.
#[derive(Debug, Clone)]
pub struct Entry {
    pub role: Role,
    pub name: String,
    digest: blake3::Hash,
    /// Days since 1970, UTC: not good from this day's beginning on.
    until: Option<u64>,
}

/// What a token turned out to be.
#[derive(Debug)]
pub enum Found<'a> {
    Good(&'a Entry),
    Expired(&'a Entry),
    Unknown,
}

/// All tokens.
#[derive(Debug, Default)]
pub struct Tokens(Vec<Entry>);

impl Tokens {
    /// Reads the file. It must not be writable by others: whoever writes it gives out roles.
    pub fn read(path: &Path) -> Result<Self, AuthError> {
        let failed = |source| AuthError::Read { path: path.to_owned(), source };
        let meta = fs::metadata(path).map_err(failed)?;
        if meta.mode() & 0o022 != 0 {
            return Err(AuthError::file(
                path,
                "group or others may write it, and so give themselves any role: chmod go-w",
            ));
        }
        if meta.len() > FILE_BYTES_MAX {
            return Err(AuthError::file(path, format!("is larger than {FILE_BYTES_MAX} bytes")));
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        Self::parse(&text).map_err(|(line, reason)| AuthError::Line { path: path.to_owned(), line, reason })
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut tokens: Vec<Entry> = Vec::new();
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let entry = Entry::parse(line).map_err(|reason| (n + 1, reason))?;
            if tokens.iter().any(|other| other.name == entry.name) {
                return Err((
                    n + 1,
                    format!("{} has a token already; each needs a name of its own", entry.name),
                ));
            }
            if tokens.len() == TOKENS_MAX {
                return Err((n + 1, format!("more than {TOKENS_MAX} tokens")));
            }
            tokens.push(entry);
        }
        Ok(Self(tokens))
    }

    /// Looks a token up. Takes as long for every token: all entries are compared, and digests in constant time (blake3's `==`).
    pub fn find(&self, token: &str, now: SystemTime) -> Found<'_> {
        if token.len() > TOKEN_CHARS_MAX {
            return Found::Unknown;
        }
        let digest = blake3::hash(token.as_bytes());
        let mut found = None;
        for entry in &self.0 {
            if entry.digest == digest {
                found = Some(entry);
            }
        }
        let today = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()) / SECONDS_PER_DAY;
        match found {
            Some(entry) if entry.until.is_some_and(|until| today >= until) => Found::Expired(entry),
            Some(entry) => Found::Good(entry),
            None => Found::Unknown,
        }
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Entry {
    fn parse(line: &str) -> Result<Self, String> {
        const FORM: &str =
            "a line is `role name blake3-of-token [until=YYYY-MM-DD]`, as `coldspark token new` prints it";
        let words: Vec<&str> = line.split_whitespace().collect();
        let (role, name, digest, rest) = match words[..] {
            [role, name, digest] => (role, name, digest, None),
            [role, name, digest, rest] => (role, name, digest, Some(rest)),
            _ => return Err(FORM.into()),
        };
        let role = role.parse()?;
        check_name(name)?;
        let digest = blake3::Hash::from_hex(digest)
            .map_err(|_| format!("{digest:?} is not 64 hexadecimal digits; {FORM}"))?;
        let until = match rest {
            Some(rest) => {
                let date = rest.strip_prefix("until=").ok_or(FORM)?;
                Some(day_of(date).ok_or_else(|| format!("{date:?} is no date YYYY-MM-DD"))?)
            }
            None => None,
        };
        Ok(Self { role, name: name.to_owned(), digest, until })
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(good) {
        return Err(format!(
            "{name:?} is no name for a token: use 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 - _ . @"
        ));
    }
    Ok(())
}

/// A new token and its line. The token is nowhere else.
pub struct Made {
    pub token: String,
    pub line: String,
}

/// Makes a token; `days`: how long it is good.
pub fn make(role: Role, name: &str, days: Option<u32>, now: SystemTime) -> Result<Made, String> {
    check_name(name)?;
    let bytes =
        crate::fleet::id::random::<TOKEN_BYTES>().map_err(|error| format!("no random bytes: {error}"))?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let token = format!("{PREFIX}{digits}");
    let mut line = format!("{role} {name} {}", blake3::hash(token.as_bytes()).to_hex());
    if let Some(days) = days {
        let today = now.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()) / SECONDS_PER_DAY;
        // Good for that many whole days.
        line += &format!(" until={}", date_of(today + u64::from(days) + 1));
    }
    Ok(Made { token, line })
}

/// Adds a line to a token file, which is made if need be. It is on the disk when this comes back.
///
/// # Errors
/// Then the file is as long as it was: half a line would make the service refuse the whole file.
pub fn append(path: &Path, line: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    // Two at once do not mix, and none takes back what the other has added.
    file.lock()?;
    let bytes = file.metadata()?.len();
    let mut last = [b'\n'];
    if let Some(at) = bytes.checked_sub(1) {
        file.read_exact_at(&mut last, at)?;
    }
    // An editor may have left the last line without its end. In one call: a kill leaves all of it, or nothing.
    let text = if last == *b"\n" { format!("{line}\n") } else { format!("\n{line}\n") };
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if written.is_err() {
        file.set_len(bytes)?;
    }
    written?;
    match path.parent().filter(|_| bytes == 0) {
        // It may be new.
        Some(folder) if folder.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Days since 1970-01-01 of `YYYY-MM-DD` (proleptic Gregorian, as Howard Hinnant's days_from_civil).
fn day_of(date: &str) -> Option<u64> {
    let mut parts = date.split('-');
    let mut part = |chars: usize| {
        parts
            .next()
            .filter(|part| part.len() == chars && part.bytes().all(|c| c.is_ascii_digit()))?
            .parse::<u64>()
            .ok()
    };
    let (year, month, day) = (part(4)?, part(2)?, part(2)?);
    if parts.next().is_some() || year < 1970 || !(1..=12).contains(&month) {
        return None;
    }
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (shifted_year / 400, shifted_year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day.checked_sub(1)?;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468;
    // No 31st of February.
    (date_of(days) == date).then_some(days)
}

fn date_of(days: u64) -> String {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;

    fn at(date: &str) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(day_of(date).expect("a date") * SECONDS_PER_DAY + 5)
    }

    #[test]
    fn a_made_token_is_found_by_its_line_and_no_other_is() {
        let now = at("2026-11-23");
        let made = make(Role::Run, "ci", None, now).expect("a token");
        let other = make(Role::Admin, "ops", None, now).expect("a token");
        assert!(made.token.starts_with(PREFIX) && made.token.len() == PREFIX.len() + 64);
        assert!(!made.line.contains(&made.token[PREFIX.len()..]), "the line does not hold the token");
        let tokens = Tokens::parse(&format!("# comment\n\n{}\n{}\n", made.line, other.line)).expect("a file");
        assert_eq!(tokens.len(), 2);
        assert!(
            matches!(tokens.find(&made.token, now), Found::Good(entry) if entry.name == "ci" && entry.role == Role::Run)
        );
        for wrong in ["", "coldspark_", &made.token[1..], &made.token.to_uppercase(), &"x".repeat(5000)] {
            assert!(matches!(tokens.find(wrong, now), Found::Unknown), "{wrong}");
        }
    }

    #[test]
    fn a_token_is_good_for_its_days_and_not_longer() {
        let made = make(Role::Read, "x", Some(30), at("2027-02-20")).expect("a token");
        assert!(made.line.ends_with(" until=2027-03-23"), "{}", made.line);
        let tokens = Tokens::parse(&made.line).expect("a file");
        assert!(matches!(tokens.find(&made.token, at("2027-03-22")), Found::Good(_)));
        assert!(matches!(tokens.find(&made.token, at("2027-03-23")), Found::Expired(_)));
    }

    #[test]
    fn dates_there_and_back() {
        for (date, day) in
            [("1970-01-01", 0), ("2000-02-29", 11_016), ("2026-11-23", 20_780), ("2400-12-31", 157_419)]
        {
            assert_eq!(day_of(date), Some(day), "{date}");
            assert_eq!(date_of(day), date);
        }
        for bad in [
            "",
            "2026",
            "2026-13-01",
            "2026-02-29",
            "2026-00-10",
            "2026-01-00",
            "26-1-1",
            "1969-12-31",
            "2026-11-23-1",
        ] {
            assert_eq!(day_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        let good = make(Role::Run, "ci", None, UNIX_EPOCH).expect("a token").line;
        for (text, line, part) in [
            (format!("{good}\nrun"), 2, "a line is"),
            (format!("\n\nboss x {}", "0".repeat(64)), 3, "no role"),
            ("run x 1234".to_owned(), 1, "64 hexadecimal"),
            (format!("run a/b {}", "0".repeat(64)), 1, "no name"),
            (format!("{good} until=tomorrow"), 1, "no date"),
            (format!("{good}\n{good}"), 2, "already"),
        ] {
            let (at, reason) = Tokens::parse(&text).expect_err(&text);
            assert!(at == line && reason.contains(part), "{text}: {at} {reason}");
        }
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokens");
        fs::write(&path, "").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o662)).expect("mode");
        let error = Tokens::read(&path).expect_err("writable by all").to_string();
        assert!(error.contains("chmod go-w"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("mode");
        assert!(Tokens::read(&path).expect("an empty file").is_empty());
    }
}
