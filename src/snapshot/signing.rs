//! Who made a snapshot: an Ed25519 signature over the sum of its manifest, which has the sums of all its files.
//!
//! `manifest.sig` is one line, `ed25519:KEY SIGNATURE` in hexadecimal. What is signed is [`CONTEXT`] and the BLAKE3 of `manifest.json`; the
//! manifest has the snapshot's id, so a signature fits no other snapshot.
//!
//! Three kinds of files, of lines `NAME ...`, and comments behind `#`: the secret key (`NAME ed25519-secret:SEED`), which only its owner may
//! read; trusted keys (`NAME ed25519:KEY`), which only their owner may write.
//!
//! Facts: RFC 8032; ring's `Ed25519KeyPair` and `ED25519` (strict about S, constant time).

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use ring::{
    rand::{SecureRandom, SystemRandom},
    signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey},
};

use super::{folder, sums::Sum};

/// Beside `manifest.json`.
pub const SIGNATURE_FILE: &str = "manifest.sig";
/// What is signed begins with this, so that a signature made for something else is none.
const CONTEXT: &[u8] = b"coldspark snapshot manifest, BLAKE3\n";
const KEY_BYTES: usize = 32;
const SIGNATURE_BYTES: usize = 64;
/// Longest signature file.
pub const SIGNATURE_FILE_BYTES_MAX: u64 = 512;
/// Longest file of keys.
const KEY_FILE_BYTES_MAX: u64 = 64 << 10;
/// Most trusted keys.
const KEYS_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 63;
const PUBLIC: &str = "ed25519:";
const SECRET: &str = "ed25519-secret:";

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path:?}: {problem}")]
pub struct KeyError {
    pub path: PathBuf,
    pub problem: String,
}

/// A public key; as text `ed25519:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; KEY_BYTES]);

/// What a snapshot is signed with when it is published.
pub struct SigningKey {
    name: String,
    pair: Ed25519KeyPair,
}

/// Keys whose snapshots may be used, and what they are called here.
#[derive(Debug)]
pub struct TrustedKeys(Vec<(String, PublicKey)>);

/// How a store signs, and what it takes. By default it does not, and takes all.
#[derive(Debug, Clone, Default)]
pub struct Signing {
    pub key: Option<Arc<SigningKey>>,
    /// `None`: whatever is whole may be used, signed or not.
    pub trusted: Option<Arc<TrustedKeys>>,
}

/// What a snapshot's signature turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    None,
    /// There is one, and it is not this manifest's; why.
    Wrong(String),
    /// It is the signature of this manifest by the owner of this key.
    By(PublicKey),
}

// === impl PublicKey ===

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC}{}", hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = String;

    fn from_str(text: &str) -> Result<PublicKey, String> {
        let key = text.strip_prefix(PUBLIC).and_then(unhex::<KEY_BYTES>);
        key.map(PublicKey).ok_or_else(|| format!("a public key is {PUBLIC} and 64 hexadecimal digits"))
    }
}

// === impl SigningKey ===

impl SigningKey {
    /// The line of a new key's file. It is a secret, and nowhere else.
    pub fn generate(name: &str) -> Result<String, String> {
        check_name(name)?;
        let mut seed = [0; KEY_BYTES];
        SystemRandom::new().fill(&mut seed).map_err(|_| "the kernel gives no random bytes".to_owned())?;
        Ok(format!("{name} {SECRET}{}", hex(&seed)))
    }

    /// Reads a key's file.
    pub fn read(path: &Path) -> Result<SigningKey, KeyError> {
        let failed = |problem: String| KeyError { path: path.to_owned(), problem };
        let text = read(path, 0o077, "group or others may read it, and so sign as its owner: chmod 600")?;
        let mut keys = lines(&text).map(SigningKey::parse);
        match (keys.next(), keys.next()) {
            (Some((line, Err(problem))), _) => Err(failed(format!("line {line}: {problem}"))),
            (Some((_, Ok(key))), None) => Ok(key),
            _ => Err(failed("a key's file has one key, as `coldspark snapshot key new` writes it".into())),
        }
    }

    fn parse((line, words): (usize, Vec<&str>)) -> (usize, Result<SigningKey, String>) {
        (line, SigningKey::of_words(&words))
    }

    fn of_words(words: &[&str]) -> Result<SigningKey, String> {
        // The words are not told: one of them is a secret.
        let [name, secret] = words else { return Err(format!("is not `NAME {SECRET}SEED`")) };
        check_name(name)?;
        let seed = secret.strip_prefix(SECRET).and_then(unhex::<KEY_BYTES>);
        let seed = seed.ok_or_else(|| format!("is not `NAME {SECRET}` and 64 hexadecimal digits"))?;
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|error| error.to_string())?;
        Ok(SigningKey { name: (*name).to_owned(), pair })
    }

    /// What others know it by.
    pub fn public(&self) -> PublicKey {
        let mut key = [0; KEY_BYTES];
        key.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(key)
    }

    /// Its owner's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its line in a file of trusted keys.
    pub fn trusted_line(&self) -> String {
        format!("{} {}", self.name, self.public())
    }

    /// The content of the signature file of this `manifest.json`.
    pub fn sign(&self, manifest: &[u8]) -> String {
        format!("{} {}\n", self.public(), hex(self.pair.sign(&message(manifest)).as_ref()))
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({} {})", self.name, self.public())
    }
}

// === impl TrustedKeys ===

impl TrustedKeys {
    /// Reads a file of trusted keys: at least one.
    pub fn read(path: &Path) -> Result<TrustedKeys, KeyError> {
        let text = read(path, 0o022, "group or others may write it, and so let any snapshot in: chmod go-w")?;
        TrustedKeys::parse(&text).map_err(|problem| KeyError { path: path.to_owned(), problem })
    }

    fn parse(text: &str) -> Result<TrustedKeys, String> {
        let mut keys: Vec<(String, PublicKey)> = Vec::new();
        for (line, words) in lines(text) {
            let [name, key] = words[..] else {
                return Err(format!("line {line}: is not `NAME {PUBLIC}KEY`"));
            };
            let key = check_name(name).and_then(|()| key.parse::<PublicKey>());
            let key = key.map_err(|problem| format!("line {line}: {problem}"))?;
            if keys.iter().any(|(other, known)| other == name || *known == key) {
                return Err(format!("line {line}: this name or this key is there already"));
            }
            if keys.len() >= KEYS_MAX {
                return Err(format!("line {line}: more than {KEYS_MAX} keys"));
            }
            keys.push((name.to_owned(), key));
        }
        if keys.is_empty() {
            return Err("there is no key in it: no snapshot could be used".into());
        }
        Ok(TrustedKeys(keys))
    }

    /// What a key is called here, if it is trusted.
    pub fn name_of(&self, key: PublicKey) -> Option<&str> {
        self.0.iter().find(|(_, trusted)| *trusted == key).map(|(name, _)| name.as_str())
    }
}

// === impl Signing ===

impl Signing {
    /// Whether a snapshot with this signature may be used; why not.
    pub fn check(&self, signature: &Signature) -> Result<(), String> {
        let Some(trusted) = &self.trusted else { return Ok(()) };
        match signature {
            Signature::By(key) if trusted.name_of(*key).is_some() => Ok(()),
            Signature::By(key) => Err(format!("it is signed by {key}, which is none of the trusted keys")),
            Signature::Wrong(problem) => Err(format!("its signature is wrong: {problem}")),
            Signature::None => Err("it is not signed".into()),
        }
    }

    /// Whether a snapshot that is made here could be used here; why not.
    pub fn check_own(&self) -> Result<(), String> {
        match &self.key {
            _ if self.trusted.is_none() => Ok(()),
            None => Err("this service signs nothing (--sign-key) and uses only what is signed".into()),
            Some(key) => self.check(&Signature::By(key.public())),
        }
    }

    /// What a key is called here: as a trusted one, or as our own.
    pub fn name_of(&self, key: PublicKey) -> Option<&str> {
        let trusted = self.trusted.as_ref().and_then(|trusted| trusted.name_of(key));
        let own = || self.key.as_ref().filter(|own| own.public() == key).map(|own| own.name());
        trusted.or_else(own)
    }
}

// === impl Signature ===

impl Signature {
    /// Judges the content of a signature file, if there is one, with the manifest that it is beside.
    pub fn judge(content: Option<&[u8]>, manifest: &[u8]) -> Signature {
        match content.map(|content| verified(content, manifest)) {
            None => Signature::None,
            Some(Ok(key)) => Signature::By(key),
            Some(Err(problem)) => Signature::Wrong(problem),
        }
    }
}

fn verified(content: &[u8], manifest: &[u8]) -> Result<PublicKey, String> {
    let form = || format!("{SIGNATURE_FILE} is not `{PUBLIC}KEY SIGNATURE`");
    let text = std::str::from_utf8(content).map_err(|_| form())?;
    let (key, signature) = text.strip_suffix('\n').unwrap_or(text).split_once(' ').ok_or_else(form)?;
    let key: PublicKey = key.parse()?;
    let signature = unhex::<SIGNATURE_BYTES>(signature).ok_or_else(form)?;
    UnparsedPublicKey::new(&ED25519, key.0)
        .verify(&message(manifest), &signature)
        .map_err(|_| format!("{key} has not signed this manifest"))?;
    Ok(key)
}

fn message(manifest: &[u8]) -> Vec<u8> {
    [CONTEXT, &Sum::of_bytes(manifest).0].concat()
}

fn read(path: &Path, forbidden: u32, why: &str) -> Result<String, KeyError> {
    let failed = |problem: String| KeyError { path: path.to_owned(), problem };
    let mode = fs::metadata(path).map_err(|error| failed(error.to_string()))?.mode();
    if mode & forbidden != 0 {
        return Err(failed(why.to_owned()));
    }
    let content = folder::read_small(path, KEY_FILE_BYTES_MAX);
    let content = content.map_err(|error: folder::FileError| failed(error.source.to_string()))?;
    let content = content.ok_or_else(|| failed(format!("it has more than {KEY_FILE_BYTES_MAX} bytes")))?;
    String::from_utf8(content).map_err(|_| failed(io::ErrorKind::InvalidData.to_string()))
}

/// Lines with their numbers, cut into words; empty ones and comments left out.
fn lines(text: &str) -> impl Iterator<Item = (usize, Vec<&str>)> {
    let lines = text.lines().map(str::trim).zip(1..).map(|(line, number)| (number, line));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines.map(|(number, line)| (number, line.split_whitespace().collect()))
}

fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    match !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(good) {
        true => Ok(()),
        false => {
            Err(format!("{name:?} is no name for a key: use 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 - _ . @"))
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = digit(0)? << 4 | digit(1)?;
    }
    Some(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    pub(in crate::snapshot) fn key(name: &str) -> SigningKey {
        let line = SigningKey::generate(name).unwrap();
        SigningKey::of_words(&line.split(' ').collect::<Vec<_>>()).unwrap()
    }

    pub(in crate::snapshot) fn trusting(keys: &[&SigningKey]) -> Arc<TrustedKeys> {
        let text: String = keys.iter().map(|key| key.trusted_line() + "\n").collect();
        Arc::new(TrustedKeys::parse(&text).unwrap())
    }

    /// RFC 8032, 7.1, test 1: the seed, and its public key.
    #[test]
    fn keys_are_those_of_the_standard() {
        let secret = "ci ed25519-secret:9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
        let public = "ci ed25519:d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
        let key = SigningKey::of_words(&secret.split(' ').collect::<Vec<_>>()).unwrap();
        assert_eq!(key.trusted_line(), public);
        assert!(!format!("{key:?}").contains("9d61"), "{key:?}");
    }

    #[test]
    fn a_signature_is_good_for_one_manifest_and_one_key() {
        let (ours, theirs) = (key("ours"), key("theirs"));
        let line = ours.sign(b"{manifest}");
        let judge = |line: &[u8], manifest: &[u8]| Signature::judge(Some(line), manifest);
        assert_eq!(judge(line.as_bytes(), b"{manifest}"), Signature::By(ours.public()));
        assert!(matches!(judge(line.as_bytes(), b"{manifesT}"), Signature::Wrong(_)));
        // Another's key in the place of ours.
        let claimed = line.replace(&ours.public().to_string(), &theirs.public().to_string());
        assert!(matches!(judge(claimed.as_bytes(), b"{manifest}"), Signature::Wrong(_)));
        // No bit of it can change.
        for at in 0..line.len() - 1 {
            let mut forged = line.clone().into_bytes();
            forged[at] ^= 1;
            assert!(matches!(judge(&forged, b"{manifest}"), Signature::Wrong(_)), "byte {at}");
        }
        for bad in ["", "x", "\n", "ed25519: ", &line[..line.len() - 2], &format!("{line}{line}")] {
            assert!(matches!(judge(bad.as_bytes(), b"{manifest}"), Signature::Wrong(_)), "{bad:?}");
        }
        // A signature of the same key over something that is no manifest.
        let other = hex(ours.pair.sign(&Sum::of_bytes(b"{manifest}").0).as_ref());
        let other = format!("{} {other}\n", ours.public());
        assert!(matches!(judge(other.as_bytes(), b"{manifest}"), Signature::Wrong(_)));
        assert_eq!(Signature::judge(None, b"{manifest}"), Signature::None);
    }

    #[test]
    fn only_what_trusted_keys_have_signed_is_taken() {
        let (ours, theirs) = (key("ours"), key("theirs"));
        let all = Signing::default();
        let only = Signing { key: None, trusted: Some(trusting(&[&ours])) };
        for signature in [Signature::None, Signature::Wrong("x".into()), Signature::By(theirs.public())] {
            all.check(&signature).unwrap();
            only.check(&signature).unwrap_err();
        }
        only.check(&Signature::By(ours.public())).unwrap();
        assert_eq!(only.name_of(ours.public()), Some("ours"));
        assert_eq!(only.name_of(theirs.public()), None);

        all.check_own().unwrap();
        only.check_own().unwrap_err();
        let with = |key: SigningKey| Signing { key: Some(Arc::new(key)), ..only.clone() };
        with(theirs).check_own().unwrap_err();
        with(ours).check_own().unwrap();
    }

    #[test]
    fn files_of_keys_are_read_strictly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let line = SigningKey::generate("ci").unwrap();
        let write = |text: &str, mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write(&format!("# ours\n\n{line}\n"), 0o600);
        let public = SigningKey::read(&path).unwrap().trusted_line();
        for (text, mode, problem) in [
            (line.as_str(), 0o640, "chmod 600"),
            ("", 0o600, "one key"),
            (&format!("{line}\n{line}"), 0o600, "one key"),
            ("ci", 0o600, "line 1"),
            (&line[..line.len() - 1], 0o600, "64 hexadecimal"),
        ] {
            write(text, mode);
            let error = SigningKey::read(&path).unwrap_err().to_string();
            assert!(error.contains(problem) && !error.contains(&line[30..]), "{text}: {error}");
        }
        write(&format!("# trusted\n{public}\n"), 0o644);
        TrustedKeys::read(&path).unwrap();
        for (text, mode, problem) in [
            (public.as_str(), 0o664, "chmod go-w"),
            ("# none", 0o644, "no key"),
            (&format!("{public}\n{public}"), 0o644, "line 2"),
            (&line, 0o644, "line 1"),
            ("two words more", 0o644, "line 1"),
        ] {
            write(text, mode);
            let error = TrustedKeys::read(&path).unwrap_err().to_string();
            assert!(error.contains(problem) && !error.contains(&line[30..]), "{text}: {error}");
        }
        assert!(SigningKey::generate("no name").is_err());
    }
}
