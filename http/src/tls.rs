//! The certificate of our own server. Its file is looked at again now and then, so that a renewed one needs no restart.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_util::sync::CancellationToken;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("certificate {file}: {reason}")]
    Certificate { file: PathBuf, reason: String },
    #[error("key {file}: {reason}")]
    Key { file: PathBuf, reason: String },
    #[error("certificate {cert} and key {key} do not go together: {reason}")]
    Pair { cert: PathBuf, key: PathBuf, reason: String },
    #[error("certificate {cert} has expired, the one before it has not and stays in use")]
    Expired { cert: PathBuf },
    #[error("tls")]
    Config(#[from] rustls::Error),
}

/// A certificate that may be replaced while it is in use.
#[derive(Debug)]
pub struct Certificate {
    cert: PathBuf,
    key: PathBuf,
    current: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    pair: Arc<CertifiedKey>,
    read: [Option<SystemTime>; 2],
}

impl Certificate {
    pub fn read(cert: &Path, key: &Path) -> Result<Arc<Certificate>, TlsError> {
        let read = [modified(cert), modified(key)];
        let pair = Arc::new(pair(cert, key)?);
        Ok(Arc::new(Self { cert: cert.into(), key: key.into(), current: RwLock::new(Current { pair, read }) }))
    }

    /// Takes what the files hold now, if they have changed; a bad pair changes nothing.
    pub fn refresh(&self) -> Result<bool, TlsError> {
        let read = [modified(&self.cert), modified(&self.key)];
        if self.current.read().is_ok_and(|current| current.read == read) {
            return Ok(false);
        }
        let pair = Arc::new(pair(&self.cert, &self.key)?);
        let over = |pair: &CertifiedKey| pair.cert.first().and_then(expiry).is_some_and(|at| at <= now_s());
        if over(&pair) && self.current.read().is_ok_and(|current| !over(&current.pair)) {
            return Err(TlsError::Expired { cert: self.cert.clone() });
        }
        if let Ok(mut current) = self.current.write() {
            *current = Current { pair, read };
        }
        Ok(true)
    }

    /// Unix time in s after which clients refuse it; none where it cannot be told.
    pub fn expires(&self) -> Option<i64> {
        let current = self.current.read().ok()?;
        expiry(current.pair.cert.first()?)
    }

    pub fn server_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.read().ok().map(|current| Arc::clone(&current.pair))
    }
}

/// When a certificate in a PEM file expires, as unix time in s: the first of its chain.
pub fn expiry_of(file: &Path) -> Result<Option<i64>, TlsError> {
    Ok(chain(file)?.first().and_then(expiry))
}

/// When the first of the certificates ends that others show us. They are looked at again now and then.
#[derive(Debug, Clone, Default)]
pub struct Shown(Arc<RwLock<Option<i64>>>);

/// Servers rarely get another certificate, and each look is a connection that they see.
const LOOK_EVERY: Duration = Duration::from_secs(60 * 60);
/// Nobody was there to be asked.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

impl Shown {
    /// Unix time in s; none before the first look, and where nobody shows one.
    pub fn expires(&self) -> Option<i64> {
        self.0.read().ok().and_then(|first| *first)
    }

    /// Looks until `shutdown`. `look` gives certificates in DER; what was seen stays where it gives none.
    pub async fn watch<L: Future<Output = Vec<Vec<u8>>>>(&self, look: impl Fn() -> L, shutdown: CancellationToken) {
        loop {
            let seen = tokio::select! {
                seen = look() => seen,
                () = shutdown.cancelled() => return,
            };
            let first = seen.into_iter().filter_map(|der| expiry(&CertificateDer::from(der))).min();
            if let (Some(_), Ok(mut known)) = (first, self.0.write()) {
                *known = first;
            }
            let pause = if first.is_some() { LOOK_EVERY } else { LOOK_AGAIN };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }
}

fn expiry(certificate: &CertificateDer<'_>) -> Option<i64> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(parsed.validity().not_after.timestamp())
}

fn now_s() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

fn chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |reason: String| TlsError::Certificate { file: file.into(), reason };
    let chain: Vec<_> = CertificateDer::pem_file_iter(file)
        .map_err(|e| bad(e.to_string()))?
        .collect::<Result<_, _>>()
        .map_err(|e| bad(e.to_string()))?;
    if chain.is_empty() { Err(bad("no certificate in it".to_owned())) } else { Ok(chain) }
}

fn pair(cert: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = chain(cert)?;
    let private =
        PrivateKeyDer::from_pem_file(key).map_err(|e| TlsError::Key { file: key.into(), reason: e.to_string() })?;
    let signing = rustls::crypto::ring::sign::any_supported_type(&private)
        .map_err(|e| TlsError::Key { file: key.into(), reason: e.to_string() })?;
    let pair = CertifiedKey::new(chain, signing);
    pair.keys_match().map_err(|e| TlsError::Pair { cert: cert.into(), key: key.into(), reason: e.to_string() })?;
    Ok(pair)
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|meta| meta.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, years: i32) -> (PathBuf, PathBuf) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("params");
        params.not_after = rcgen::date_time_ymd(years, 1, 1);
        let cert = params.self_signed(&key).expect("signed");
        let (c, k) = (dir.join("c.pem"), dir.join("k.pem"));
        std::fs::write(&c, cert.pem()).expect("written");
        std::fs::write(&k, key.serialize_pem()).expect("written");
        (c, k)
    }

    #[test]
    fn a_renewed_certificate_is_taken_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let (c, k) = write(dir.path(), 2031);
        let certificate = Certificate::read(&c, &k).expect("read");
        assert_eq!(certificate.expires(), Some(1_924_992_000));
        assert!(!certificate.refresh().expect("nothing new"));
        let touch = |file: &Path| {
            let later = SystemTime::now() + std::time::Duration::from_secs(60);
            std::fs::File::options().write(true).open(file).and_then(|f| f.set_modified(later)).expect("touched");
        };
        std::fs::write(&c, "not a certificate").expect("written");
        touch(&c);
        assert!(matches!(certificate.refresh(), Err(TlsError::Certificate { .. })));
        assert_eq!(certificate.expires(), Some(1_924_992_000), "the old one stays in use");
        write(dir.path(), 2020);
        touch(&c);
        assert!(matches!(certificate.refresh(), Err(TlsError::Expired { .. })));
        assert_eq!(certificate.expires(), Some(1_924_992_000), "one that clients refuse is no better");
        write(dir.path(), 2032);
        touch(&c);
        assert!(certificate.refresh().expect("renewed"));
        assert_eq!(expiry_of(&c).expect("read"), certificate.expires());
        assert_eq!(certificate.expires(), Some(1_956_528_000));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_to_end_counts_and_one_that_is_away_is_asked_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let der = |year: i32| {
            let (cert, _) = write(dir.path(), year);
            chain(&cert).expect("a certificate").remove(0).to_vec()
        };
        let answers = [vec![], vec![der(2032), der(2031)], vec![b"none".to_vec()], vec![der(2033)]];
        let (shown, asked, stop) = (Shown::default(), std::cell::Cell::new(0), CancellationToken::new());
        let look = || {
            let n = asked.replace(asked.get() + 1);
            if n == answers.len() - 1 {
                stop.cancel();
            }
            let known = shown.expires();
            // What the looks before this one have left.
            assert_eq!(known, [None, None, Some(1_924_992_000), Some(1_924_992_000)][n]);
            std::future::ready(answers[n].clone())
        };
        let begun = tokio::time::Instant::now();
        shown.watch(look, stop.clone()).await;
        assert_eq!(begun.elapsed(), LOOK_AGAIN + LOOK_EVERY + LOOK_AGAIN);
        assert_eq!(asked.get(), 4);
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let (one, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (cert, _) = write(one.path(), 2031);
        let (_, key) = write(other.path(), 2031);
        assert!(matches!(Certificate::read(&cert, &key), Err(TlsError::Pair { .. })));
    }
}
