//! Whom to trust. The crypto provider is named outright, so that nothing depends on which one the process has installed.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::FetchError;

pub(super) const NO_ROOTS: &str =
    "this machine trusts no certificate: install ca-certificates, or set worker.fetch.ca_file";

pub(super) struct Trust {
    pub(super) config: ClientConfig,
    /// None at all: an image without ca-certificates. Only https is impossible then, and says so when it is asked for.
    pub(super) has_roots: bool,
}

impl Trust {
    /// The system's certificates and those of `ca_file`.
    pub(super) fn load(ca_file: Option<&Path>) -> Result<Self, FetchError> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        if !system.errors.is_empty() {
            tracing::debug!(errors = ?system.errors, "not all of the system's certificates can be read");
        }
        // Some of a system's certificates may be older than what rustls takes; the others serve.
        roots.add_parsable_certificates(system.certs);
        if let Some(path) = ca_file {
            let wrong = |why: String| FetchError::Config(format!("worker.fetch.ca_file: {}: {why}", path.display()));
            let pem = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
            let certificates: Vec<_> =
                CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| wrong(e.to_string()))?;
            if certificates.is_empty() {
                return Err(wrong("it holds no certificate in PEM form".to_owned()));
            }
            for certificate in certificates {
                roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
            }
        }
        Ok(Self { has_roots: !roots.is_empty(), config: client_config(roots)? })
    }
}

fn client_config(roots: RootCertStore) -> Result<ClientConfig, FetchError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| FetchError::Config(format!("TLS: {error}")))?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
