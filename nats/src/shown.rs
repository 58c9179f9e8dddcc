//! The certificates that the servers of `nats.urls` show, looked at on connections of their own, each for the length of a handshake.
//!
//! They are looked at and not trusted: one that is over already is what somebody wants to hear of. Nothing is sent beyond the
//! handshake, no login least of all. A server that takes a renewed certificate while connections stand shows it here, and not on those.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{config::NatsConfig, connect::Nats};

/// A server's greeting is a line of a few hundred bytes; longer ones are somebody else's.
const MAX_GREETING: u64 = 64 * 1024;

impl Nats {
    /// In DER, the first of the chain of each server that could be asked; none of servers without TLS.
    pub async fn server_certificates(&self) -> Vec<Vec<u8>> {
        certificates(self.config()).await
    }
}

async fn certificates(config: &NatsConfig) -> Vec<Vec<u8>> {
    let within = Duration::from_millis(config.connect_timeout_ms);
    let mut found = Vec::new();
    for url in &config.urls {
        let Ok(address) = url.parse::<async_nats::ServerAddr>() else { continue };
        let seen = Arc::new(Seen::default());
        // Whatever the server makes of us, its certificate came before that.
        if timeout(within, look(config, &address, &seen)).await.is_err() {
            tracing::debug!(host = address.host(), "no handshake in time");
        }
        found.extend(seen.take());
    }
    found
}

async fn look(config: &NatsConfig, address: &async_nats::ServerAddr, seen: &Arc<Seen>) -> Option<()> {
    let host = address.host().trim_matches(['[', ']']);
    let mut stream = TcpStream::connect((host, address.port())).await.ok()?;
    if address.is_websocket() {
        (address.scheme() == "wss").then_some(())?;
    } else if !config.tls_first {
        let greeting = greeting(&mut stream).await?;
        (config.tls_required || address.tls_required() || wants_tls(&greeting)).then_some(())?;
    }
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let connector = TlsConnector::from(Arc::new(client(config, seen)?));
    // Closed in order, so that the server has no error to write down.
    let mut stream = connector.connect(name, stream).await.ok()?;
    tokio::io::AsyncWriteExt::shutdown(&mut stream).await.ok()
}

/// One line; the server says nothing more before it has heard from us.
async fn greeting(stream: &mut TcpStream) -> Option<String> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream).take(MAX_GREETING);
    reader.read_line(&mut line).await.ok()?;
    line.ends_with('\n').then_some(line)
}

fn wants_tls(greeting: &str) -> bool {
    let info = greeting.trim().strip_prefix("INFO ").and_then(|info| serde_json::from_str(info).ok());
    info.is_some_and(|info: serde_json::Value| info["tls_required"] == true)
}

fn client(config: &NatsConfig, seen: &Arc<Seen>) -> Option<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(seen.clone());
    // A server that wants one would write down that it got none.
    let own = config.tls_cert.as_deref().zip(config.tls_key.as_deref()).and_then(|(cert, key)| pair(cert, key));
    match own {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).ok(),
        None => Some(builder.with_no_client_auth()),
    }
}

fn pair(cert: &Path, key: &Path) -> Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_file_iter(cert).ok()?.collect::<Result<_, _>>().ok()?;
    Some((chain, PrivateKeyDer::from_pem_file(key).ok()?))
}

/// Takes every certificate, and keeps the last.
#[derive(Debug, Default)]
struct Seen(Mutex<Option<Vec<u8>>>);

impl Seen {
    fn take(&self) -> Option<Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::ring::default_provider()
}

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown.to_vec());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signed, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signed, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::wants_tls;

    #[test]
    fn a_greeting_says_whether_tls_follows() {
        assert!(wants_tls("INFO {\"tls_required\":true,\"port\":4222}\r\n"));
        for not in ["INFO {\"port\":4222}\r\n", "INFO {\"tls_available\":true}\r\n", "HTTP/1.1 400 Bad Request\r\n", ""]
        {
            assert!(!wants_tls(not), "{not}");
        }
    }
}
