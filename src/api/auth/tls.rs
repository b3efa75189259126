//! TLS: the service's certificate and key, the CA of its clients, and the names in a client's certificate.
//!
//! TLS 1.3 only, `h2` only. All files are PEM.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::AuthError;

/// The one application protocol spoken here.
pub const ALPN: &[u8] = b"h2";

/// Where the service's TLS files are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub client_ca: Option<PathBuf>,
}

/// Reads all files. With a client CA a certificate is asked for, and `certificate_needed` refuses callers without one.
pub fn server_config(files: &TlsFiles, certificate_needed: bool) -> Result<Arc<ServerConfig>, AuthError> {
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| AuthError::Settings(format!("TLS 1.3 cannot be used: {error}")))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(roots(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = if certificate_needed { verifier } else { verifier.allow_unauthenticated() };
            let verifier = verifier.build().map_err(|error| AuthError::file(path, error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        AuthError::file(
            &files.certificate,
            format!("does not go with the key {}: {error}", files.key.display()),
        )
    })?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// All certificates of a PEM file, at least one.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, AuthError> {
    let pem = fs::read(path).map_err(|source| AuthError::Read { path: path.to_owned(), source })?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let all = all.map_err(|error| AuthError::file(path, format!("is not good PEM: {error}")))?;
    if all.is_empty() {
        return Err(AuthError::file(
            path,
            "holds no certificate: a PEM file with BEGIN CERTIFICATE is needed",
        ));
    }
    Ok(all)
}

/// The first private key of a PEM file, which others must not be able to read.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, AuthError> {
    let failed = |source| AuthError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.mode() & 0o007 != 0 {
        return Err(AuthError::file(path, "everybody can read or write this private key: chmod o-rwx"));
    }
    let pem = fs::read(path).map_err(failed)?;
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| AuthError::file(path, format!("holds no private key in PEM: {error}")))
}

/// A store of the CA certificates in a PEM file.
pub fn roots(path: &Path) -> Result<RootCertStore, AuthError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| AuthError::file(path, format!("is no CA to trust: {error}")))?;
    }
    Ok(roots)
}

/// The names that rules may speak of.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct CertificateNames {
    pub common_names: Vec<String>,
    /// In lower case.
    pub dns: Vec<String>,
    pub uris: Vec<String>,
}

impl CertificateNames {
    /// Of a certificate that has been verified. One that cannot be read has no names.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Self::default() };
        Self {
            common_names: common_names(certificate.subject()),
            dns: certificate.valid_dns_names().map(str::to_ascii_lowercase).collect(),
            uris: certificate.valid_uri_names().map(str::to_owned).collect(),
        }
    }

    /// One name for people.
    pub fn one(&self) -> &str {
        let all = self.common_names.iter().chain(&self.dns).chain(&self.uris);
        all.map(String::as_str).find(|name| !name.is_empty()).unwrap_or("without a name")
    }
}

/// The common names of a subject: the content of an X.501 Name in DER, which is a list of SETs of SEQUENCEs of type and value
/// (RFC 5280, 4.1.2.4). What does not fit that is passed over.
fn common_names(subject: &[u8]) -> Vec<String> {
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    const UTF8_STRING: u8 = 0x0c;
    const PRINTABLE_STRING: u8 = 0x13;
    /// id-at-commonName, 2.5.4.3.
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    let mut names = Vec::new();
    let mut sets = subject;
    while let Some((tag, set, rest)) = element(sets) {
        sets = rest;
        let mut pairs = if tag == SET { set } else { &[] };
        while let Some((tag, pair, rest)) = element(pairs) {
            pairs = rest;
            if tag != SEQUENCE {
                continue;
            }
            if let Some((OBJECT_IDENTIFIER, COMMON_NAME, value)) = element(pair)
                && let Some((UTF8_STRING | PRINTABLE_STRING, text, _)) = element(value)
                && let Ok(text) = std::str::from_utf8(text)
            {
                names.push(text.to_owned());
            }
        }
    }
    names
}

/// The first element of some DER: its tag, its content, and what comes after it. Lengths below 64 KiB.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
        0x82 => {
            let (length, rest) = rest.split_first_chunk::<2>()?;
            (usize::from(u16::from_be_bytes(*length)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    fn names_of(common_name: &str, sans: Vec<SanType>) -> CertificateNames {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "not this one");
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.subject_alt_names = sans;
        let key = KeyPair::generate().expect("a key");
        CertificateNames::of(params.self_signed(&key).expect("a certificate").der())
    }

    #[test]
    fn names_of_a_certificate_are_read_by_their_kind() {
        let uri = SanType::URI("spiffe://example.org/ci".try_into().expect("a URI"));
        let dns = SanType::DnsName("CI.example.org".try_into().expect("a name"));
        let names = names_of("ci-robot", vec![uri, dns]);
        assert_eq!(names.common_names, ["ci-robot"]);
        assert_eq!(names.dns, ["ci.example.org"]);
        assert_eq!(names.uris, ["spiffe://example.org/ci"]);
        assert_eq!(names.one(), "ci-robot");
        let long = "ä".repeat(3000);
        assert_eq!(names_of(&long, vec![]).common_names, [long]);
    }

    #[test]
    fn a_subject_that_is_none_has_no_names() {
        let good = [0x31, 0x0c, 0x30, 0x0a, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x03, b'a', b'b', b'c'];
        assert_eq!(common_names(&good), ["abc"]);
        for end in 0..good.len() {
            assert!(common_names(&good[..end]).is_empty(), "cut at {end}");
        }
        for at in 0..good.len() {
            for value in 0..=255 {
                let mut bad = good;
                bad[at] = value;
                // No byte makes it panic, and it never finds more than one.
                assert!(common_names(&bad).len() <= 1);
            }
        }
        assert!(common_names(&[0x31, 0x84, 0xff, 0xff, 0xff, 0xff]).is_empty());
    }

    #[test]
    fn files_that_do_not_fit_are_named_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str, mode: u32| {
            let path = folder.path().join(name);
            fs::write(&path, text).expect("a file");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
            path
        };
        let key = KeyPair::generate().expect("a key");
        let other = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".into()]).expect("names");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let files = |certificate, key, client_ca| TlsFiles { certificate, key, client_ca };
        let certificate = write("cert", &pem, 0o644);
        let good_key = write("key", &key.serialize_pem(), 0o600);
        let reason =
            |files: TlsFiles| server_config(&files, true).map(|_| ()).expect_err("a reason").to_string();

        server_config(&files(certificate.clone(), good_key.clone(), None), true).expect("good files");
        let open_key = write("open", &key.serialize_pem(), 0o644);
        assert!(reason(files(certificate.clone(), open_key, None)).contains("chmod o-rwx"));
        let other_key = write("other", &other.serialize_pem(), 0o600);
        assert!(reason(files(certificate.clone(), other_key, None)).contains("does not go with"));
        let text = reason(files(good_key.clone(), good_key.clone(), None));
        assert!(text.contains("holds no certificate"), "{text}");
        let text = reason(files(certificate.clone(), write("no-key", &pem, 0o600), None));
        assert!(text.contains("holds no private key"), "{text}");
        assert!(reason(files("/nowhere/cert".into(), good_key.clone(), None)).contains("/nowhere/cert"));
        let text = reason(files(certificate, good_key, Some(write("ca", "garbage", 0o644))));
        assert!(text.contains("/ca: holds no certificate"), "{text}");
    }
}
