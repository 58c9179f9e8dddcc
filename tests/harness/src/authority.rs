//! A private authority and the certificates that servers show: right ones, and those that a client must refuse.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, date_time_ymd,
};

use crate::{Error, Result};

/// Signs certificates. Its own is in `ca.pem` of its folder.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, as files.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

fn wrong(error: impl std::fmt::Display) -> Error {
    Error::Wrong(format!("certificate: {error}"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(Error::io(path.display().to_string()))
}

impl Authority {
    /// A new one; `dir` is there.
    pub fn new(dir: &Path) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().map_err(wrong)?;
        write(&dir.join("ca.pem"), &params.self_signed(&key).map_err(wrong)?.pem())?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    pub fn ca_file(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Good for servers and clients under these host names or addresses, in `NAME.pem` and `NAME-key.pem`.
    pub fn certify(&self, name: &str, hosts: &[&str]) -> Result<Certificate> {
        self.signed(name, hosts, None)
    }

    /// The same, until the first day of this year.
    pub fn certify_until(&self, name: &str, hosts: &[&str], year: i32) -> Result<Certificate> {
        self.signed(name, hosts, Some((2020, year)))
    }

    /// The same, over since years.
    pub fn certify_expired(&self, name: &str, hosts: &[&str]) -> Result<Certificate> {
        self.signed(name, hosts, Some((2020, 2021)))
    }

    fn signed(&self, name: &str, hosts: &[&str], years: Option<(i32, i32)>) -> Result<Certificate> {
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).map_err(wrong)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        if let Some((from, until)) = years {
            (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
        }
        let key = KeyPair::generate().map_err(wrong)?;
        let signed = params.signed_by(&key, &self.issuer).map_err(wrong)?;
        let files = Certificate {
            certificate: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}-key.pem")),
        };
        write(&files.certificate, &signed.pem())?;
        write(&files.key, &key.serialize_pem())?;
        Ok(files)
    }
}
