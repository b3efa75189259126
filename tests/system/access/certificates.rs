//! Certificates of a trial's own, written to files as the program reads them.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, date_time_ymd,
};

/// A CA.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
    name: String,
}

/// A certificate and its key.
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(folder: &Path, name: &str) -> anyhow::Result<Authority> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Authority { issuer, folder: folder.to_owned(), name: name.to_owned() };
        fs::write(authority.file(), authority.issuer.pem())?;
        Ok(authority)
    }

    /// Its certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.join(format!("{}.pem", self.name))
    }

    /// For a service at `host` (a name or an address).
    pub fn service(&self, host: &str) -> anyhow::Result<Pair> {
        self.sign("service", CertificateParams::new(vec![host.to_owned()])?)
    }

    /// For a client called `name`.
    pub fn client(&self, name: &str) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign(name, params)
    }

    /// The same with a URI among its alternative names, and no other name.
    pub fn client_by_uri(&self, uri: &str) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        self.sign("by-uri", params)
    }

    /// For a client, until the end of 2020.
    pub fn expired_client(&self, name: &str) -> anyhow::Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2020, 12, 31));
        self.sign("expired", params)
    }

    fn sign(&self, file: &str, params: CertificateParams) -> anyhow::Result<Pair> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let path = |kind: &str| self.folder.join(format!("{}-{file}.{kind}", self.name));
        let pair = Pair { certificate: path("crt"), key: path("key") };
        fs::write(&pair.certificate, certificate.pem())?;
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&pair.key)?;
        file.write_all(key.serialize_pem().as_bytes())?;
        Ok(pair)
    }
}
