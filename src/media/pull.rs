//! FreeBSD's published disk images: which file a release is, what its checksum is, and a download that goes on where it broke.
//!
//! Layout of a mirror, below its base address:
//!
//! ```text
//! releases/VM-IMAGES/15.1-RELEASE/amd64/Latest/CHECKSUM.SHA256                    SHA256 (NAME) = 64 hex digits
//!                                              FreeBSD-15.1-RELEASE-amd64-ufs.raw.xz     (before 14.2: without -ufs)
//! releases/CI-IMAGES/15.1-RELEASE/amd64/Latest/FreeBSD-15.1-RELEASE-amd64-BASIC-CI-ufs.raw.xz
//! ```
//!
//! The list of checksums is believed because of the connection (HTTPS) it came by; over plain HTTP it protects against damage
//! only, and that is said. A download grows in `NAME.part` and gets its name when its checksum is right. Blocks; meant for
//! a thread of its own.
//!
//! May touch: the network, the folder it is given. Facts: FreeBSD's `release/Makefile.vm`, `release/scripts`; RFC 9110 clause 14
//! (ranges).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ring::digest::{Context, SHA256};
use ureq::http::StatusCode;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};

/// Where the project itself publishes.
pub const MIRROR: &str = "https://download.freebsd.org";
const CHECKSUMS: &str = "CHECKSUM.SHA256";
const CHECKSUMS_BYTES_MAX: u64 = 1 << 20;
/// Larger than any image that is published.
const IMAGE_BYTES_MAX: u64 = 64 << 30;
/// Connections that brought nothing, one after the other, before it is given up.
const ATTEMPTS_MAX: u32 = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection on which nothing comes for so long is broken.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const BUFFER_BYTES: usize = 256 << 10;

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("{0:?} names no release: give freebsd-15.1, or freebsd-15.1-RC1 and the like")]
    Release(String),
    #[error("{0:?} is no mirror's address: give one that begins with https:// or http://")]
    Mirror(String),
    #[error("{url}: {problem}")]
    Http { url: String, problem: String },
    #[error(
        "{url}: the mirror has nothing there (status 404); is {release} released, and still on this mirror? See {base}/releases/"
    )]
    NotThere { url: String, release: String, base: String },
    #[error("{url} lists no UFS disk image of {release} for amd64")]
    NotListed { url: String, release: String },
    #[error(
        "{name} does not have the checksum that is published for it (it has {found}, published is {published}), not even after a second download; the mirror's copy is damaged: try another with --mirror"
    )]
    Checksum { name: String, found: String, published: String },
    #[error("another process downloads into {}; wait until it is done, or choose another folder with --downloads", .0.display())]
    Busy(PathBuf),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Which of the published disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The image for virtual machines.
    Vm,
    /// The smaller one for continuous integration.
    Ci,
}

/// A release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// `15.1-RELEASE`.
    full: String,
}

impl Release {
    /// Reads `freebsd-15.1`, `15.1`, `freebsd-15.1-RC2`.
    pub fn parse(text: &str) -> Result<Self, PullError> {
        let wrong = || PullError::Release(text.to_owned());
        let lower = text.to_ascii_lowercase();
        let rest = lower.strip_prefix("freebsd-").unwrap_or(&lower);
        let (version, phase) = rest.split_once('-').unwrap_or((rest, "release"));
        let (major, minor) = version.split_once('.').ok_or_else(wrong)?;
        let number = |text: &str| (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        let phase_is_good = phase == "release"
            || ["alpha", "beta", "rc"].iter().any(|word| phase.strip_prefix(word).is_some_and(number));
        match number(major) && number(minor) && phase_is_good {
            true => Ok(Release { full: format!("{version}-{}", phase.to_ascii_uppercase()) }),
            false => Err(wrong()),
        }
    }

    /// `15.1-RELEASE`.
    pub fn name(&self) -> &str {
        &self.full
    }

    /// A name for the image: `freebsd-15-1`.
    pub fn image_name(&self) -> String {
        let short = self.full.strip_suffix("-RELEASE").unwrap_or(&self.full);
        format!("freebsd-{}", short.replace('.', "-").to_ascii_lowercase())
    }

    /// Names of the disk image, the best first.
    fn candidates(&self, kind: Kind) -> Vec<String> {
        let start = format!("FreeBSD-{}-amd64", self.full);
        let middles: &[&str] = match kind {
            Kind::Vm => &["-ufs", ""],
            Kind::Ci => &["-BASIC-CI-ufs", "-BASIC-CI"],
        };
        // Older releases have one image without the file system's name, and that is UFS.
        ["raw.xz", "raw.zst", "qcow2.xz"]
            .iter()
            .flat_map(|end| middles.iter().map(move |middle| format!("{middle}.{end}")))
            .map(|end| format!("{start}{end}"))
            .collect()
    }
}

/// A published file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub url: String,
    pub name: String,
    /// SHA-256, lower-case hexadecimal.
    pub sum: String,
    /// What to tell people about it.
    pub note: Option<&'static str>,
}

/// How far a download is.
#[derive(Debug, Default)]
pub struct Progress {
    pub bytes: AtomicU64,
    /// 0: not known yet.
    pub of: AtomicU64,
}

/// A mirror.
pub struct Mirror {
    base: String,
    /// Its list of checksums is to come by HTTPS, from wherever the mirror sends us.
    secure: bool,
    agent: ureq::Agent,
}

impl Mirror {
    /// A mirror by its base address.
    pub fn new(base: &str) -> Result<Self, PullError> {
        Self::with_timeout(base, READ_TIMEOUT)
    }

    fn with_timeout(base: &str, read: Duration) -> Result<Self, PullError> {
        let plain = base.bytes().all(|byte| byte.is_ascii_graphic());
        if !plain || !(base.starts_with("https://") || base.starts_with("http://")) {
            return Err(PullError::Mirror(base.to_owned()));
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(read))
            .max_redirects(5)
            .user_agent(concat!("coldspark/", env!("CARGO_PKG_VERSION")))
            .build();
        let secure = base.starts_with("https://");
        Ok(Mirror { base: base.trim_end_matches('/').to_owned(), secure, agent: agent.into() })
    }

    /// Finds the disk image of a release, with its checksum.
    pub fn find(&self, release: &Release, kind: Kind) -> Result<Published, PullError> {
        let folder = match kind {
            Kind::Vm => "VM-IMAGES",
            Kind::Ci => "CI-IMAGES",
        };
        let folder = format!("{}/releases/{folder}/{}/amd64/Latest", self.base, release.full);
        let url = format!("{folder}/{CHECKSUMS}");
        let request = self.agent.get(&url).config().https_only(self.secure).build();
        let response = request.call().map_err(http(&url))?;
        if response.status() == StatusCode::NOT_FOUND {
            let (release, base) = (release.full.clone(), self.base.clone());
            return Err(PullError::NotThere { url, release, base });
        }
        check_status(&url, response.status())?;
        let mut list = String::new();
        response
            .into_body()
            .into_reader()
            .take(CHECKSUMS_BYTES_MAX)
            .read_to_string(&mut list)
            .map_err(|error| PullError::Http { url: url.clone(), problem: error.to_string() })?;
        let wanted = release.candidates(kind);
        let found = wanted.into_iter().find_map(|name| sum_of(&list, &name).map(|sum| (name, sum)));
        let Some((name, sum)) = found else {
            return Err(PullError::NotListed { url, release: release.full.clone() });
        };
        let note = (!self.secure).then_some(
            "the list of checksums came over plain HTTP: it protects against damage, not against a forger",
        );
        Ok(Published { url: format!("{folder}/{name}"), name, sum, note })
    }

    /// Downloads into `folder`, going on with what is there of an earlier attempt. Returns the file, whose checksum is right.
    pub fn download(
        &self,
        published: &Published,
        folder: &Path,
        progress: &Arc<Progress>,
    ) -> Result<PathBuf, PullError> {
        fs::create_dir_all(folder).map_err(at(folder))?;
        let whole = folder.join(&published.name);
        if whole.exists() && sha256(&whole)? == published.sum {
            return Ok(whole);
        }
        let part = folder.join(format!("{}.part", published.name));
        let mut file = claim(&part)?;
        let mut last = String::new();
        // A second time from the beginning: what was there may have been of another file, or damaged.
        for _ in 0..2 {
            self.complete(published, &mut file, &part, progress)?;
            last = sha256(&part)?;
            if last == published.sum {
                fs::rename(&part, &whole).map_err(at(&whole))?;
                return Ok(whole);
            }
            file.set_len(0).map_err(at(&part))?;
        }
        fs::remove_file(&part).map_err(at(&part))?;
        let (name, published) = (published.name.clone(), published.sum.clone());
        Err(PullError::Checksum { name, found: last, published })
    }

    /// Brings `part` to its full length, over as many connections as it takes while each brings something.
    fn complete(
        &self,
        published: &Published,
        file: &mut File,
        part: &Path,
        progress: &Arc<Progress>,
    ) -> Result<(), PullError> {
        let mut attempts = 0;
        // The furthest that any connection came: a server without ranges begins at the start each time.
        let mut furthest = file.metadata().map_err(at(part))?.len();
        loop {
            let problem = match self.connection(&published.url, file, part, progress) {
                Ok(()) => return Ok(()),
                Err(Broken::Final(error)) => return Err(error),
                Err(Broken::Retry(problem)) => problem,
            };
            let now = file.metadata().map_err(at(part))?.len();
            attempts = if now > furthest { 0 } else { attempts + 1 };
            furthest = furthest.max(now);
            if attempts >= ATTEMPTS_MAX {
                return Err(PullError::Http {
                    url: published.url.clone(),
                    problem: format!("{problem}; {now} bytes are kept, the next attempt goes on from there"),
                });
            }
            tracing::debug!(problem, bytes = now, "a download broke off and is resumed");
        }
    }

    /// One request for what is missing, written to the file as it comes. Ok: the file is complete.
    fn connection(
        &self,
        url: &str,
        file: &mut File,
        part: &Path,
        progress: &Arc<Progress>,
    ) -> Result<(), Broken> {
        let have = file.metadata().map_err(at(part))?.len();
        let mut request = self.agent.get(url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = request.call().map_err(|error| Broken::Retry(error.to_string()))?;
        let status = response.status();
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        let (from, of) = match status {
            StatusCode::PARTIAL_CONTENT => match header(CONTENT_RANGE).and_then(content_range) {
                Some((from, of)) if from == have => (from, Some(of)),
                _ => return Err(broken(url, "the server sent another range than was asked for")),
            },
            // It knows no ranges, or the file has changed: from the start.
            StatusCode::OK => (0, header(CONTENT_LENGTH).and_then(|length| length.parse().ok())),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                // All is there already, or more than all; the checksum tells.
                let of = header(CONTENT_RANGE).and_then(|range| range.strip_prefix("bytes */"));
                if of.and_then(|of| of.parse().ok()) == Some(have) {
                    return Ok(());
                }
                file.set_len(0).map_err(at(part))?;
                return Err(Broken::Retry("what was there is of another file".into()));
            }
            status if status.is_server_error() => {
                return Err(Broken::Retry(format!("the server answered with status {status}")));
            }
            status => {
                check_status(url, status)?;
                return Err(broken(url, &format!("the server answered with status {status}")));
            }
        };
        if of.unwrap_or(0) > IMAGE_BYTES_MAX {
            return Err(broken(url, "it is larger than any disk image"));
        }
        file.set_len(from).map_err(at(part))?;
        file.seek(SeekFrom::Start(from)).map_err(at(part))?;
        progress.bytes.store(from, Ordering::Relaxed);
        progress.of.store(of.unwrap_or(0), Ordering::Relaxed);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut got = from;
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) => return Err(Broken::Retry(error.to_string())),
            };
            got += count as u64;
            if got > IMAGE_BYTES_MAX || of.is_some_and(|of| got > of) {
                return Err(broken(url, "the server sends more than it announced"));
            }
            file.write_all(buffer.get(..count).unwrap_or_default()).map_err(at(part))?;
            progress.bytes.store(got, Ordering::Relaxed);
        }
        match of {
            Some(of) if got < of => {
                Err(Broken::Retry(format!("the connection ended after {got} of {of} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// Opens the file that a download grows in, for this process alone: another would write into it what this one has found to be right.
fn claim(part: &Path) -> Result<File, PullError> {
    loop {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).open(part);
        let file = opened.map_err(at(part))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(PullError::Busy(part.to_owned())),
            Err(TryLockError::Error(error)) => return Err(at(part)(error)),
        }
        // Another may have been done with it in this moment, and given it its name.
        let ours = file.metadata().map_err(at(part))?.ino();
        if fs::metadata(part).is_ok_and(|there| there.ino() == ours) {
            return Ok(file);
        }
    }
}

/// How a connection ended too early.
enum Broken {
    Retry(String),
    Final(PullError),
}

impl From<PullError> for Broken {
    fn from(error: PullError) -> Self {
        Broken::Final(error)
    }
}

fn broken(url: &str, problem: &str) -> Broken {
    Broken::Final(PullError::Http { url: url.to_owned(), problem: problem.to_owned() })
}

fn http(url: &str) -> impl FnOnce(ureq::Error) -> PullError {
    move |error| PullError::Http { url: url.to_owned(), problem: error.to_string() }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PullError {
    move |source| PullError::Io { path: path.to_owned(), source }
}

fn check_status(url: &str, status: StatusCode) -> Result<(), PullError> {
    match status.is_success() {
        true => Ok(()),
        false => Err(PullError::Http {
            url: url.to_owned(),
            problem: format!("the server answered with status {status}; try another mirror"),
        }),
    }
}

/// `bytes 100-199/1000`: where it begins, and the length of the whole.
fn content_range(text: &str) -> Option<(u64, u64)> {
    let (range, of) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = range.split_once('-')?;
    Some((from.trim().parse().ok()?, of.trim().parse().ok()?))
}

/// The checksum of `name` in a list: `SHA256 (NAME) = HEX`, or `HEX  NAME`.
fn sum_of(list: &str, name: &str) -> Option<String> {
    let hex = |text: &str| {
        let text = text.trim();
        (text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
    };
    list.lines().find_map(|line| {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("SHA256 (") {
            let (listed, sum) = rest.split_once(") = ")?;
            return (listed == name).then(|| hex(sum)).flatten();
        }
        let (sum, listed) = line.split_once(char::is_whitespace)?;
        (listed.trim_start_matches([' ', '*']) == name).then(|| hex(sum)).flatten()
    })
}

/// SHA-256 of a file, lower-case hexadecimal.
fn sha256(path: &Path) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(at(path))?;
    let mut sum = Context::new(&SHA256);
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer).map_err(at(path))? {
            0 => break,
            count => sum.update(buffer.get(..count).unwrap_or_default()),
        }
    }
    Ok(sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
#[path = "pull_tests.rs"]
mod tests;
