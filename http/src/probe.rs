//! One request, as health checks and tests ask: containers have no curl.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{self, Body},
    http::{HeaderMap, Method, Request, Uri, header, request::Builder},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// Answers longer than this are not read to their end.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// How to ask.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    /// Certificates to trust in place of the system's.
    pub ca: Option<PathBuf>,
    pub token: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("{0} is not an http or https address")]
    Address(String),
    #[error("{address} does not answer: {reason}")]
    Unreachable { address: String, reason: String },
    #[error("certificates in {file}: {reason}")]
    Certificates { file: PathBuf, reason: String },
    /// Somebody took the connection, and said nothing.
    #[error("it took the connection, and gave no answer within {0:?}")]
    Silent(Duration),
}

impl Probe {
    pub async fn get(&self, url: &str, within: Duration) -> Result<Answer, ProbeError> {
        self.send(Method::GET, url, &[], Vec::new(), within).await
    }

    pub async fn send(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
        within: Duration,
    ) -> Result<Answer, ProbeError> {
        let mut request = Request::builder().method(method);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        self.ask(url, request, body, within).await
    }

    async fn ask(&self, url: &str, request: Builder, body: Vec<u8>, within: Duration) -> Result<Answer, ProbeError> {
        let bad = || ProbeError::Address(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad()),
        };
        let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let address = format!("{host}:{port}");
        let failed = |reason: String| ProbeError::Unreachable { address: address.clone(), reason };
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = request.uri(path).header(header::CONNECTION, "close");
        // A test may ask under another name.
        if request.headers_ref().is_some_and(|headers| !headers.contains_key(header::HOST)) {
            request = request.header(header::HOST, uri.authority().map_or("", |authority| authority.as_str()));
        }
        let request = request.body(Body::from(body)).map_err(|e| failed(e.to_string()))?;
        let begun = Instant::now();
        let stream = timeout(within, TcpStream::connect((host.as_str(), port)))
            .await
            .map_err(|_| failed(format!("no connection within {within:?}")))?
            .map_err(|e| failed(e.to_string()))?;
        let asking = async {
            if !secure {
                return exchange(stream, request).await.map_err(failed);
            }
            let name = ServerName::try_from(host.clone()).map_err(|_| bad())?;
            let connector = TlsConnector::from(Arc::new(self.trust()?));
            let stream = connector.connect(name, stream).await.map_err(|e| failed(e.to_string()))?;
            exchange(stream, request).await.map_err(failed)
        };
        let left = within.saturating_sub(begun.elapsed());
        timeout(left, asking).await.map_err(|_| ProbeError::Silent(within))?
    }

    fn trust(&self) -> Result<ClientConfig, ProbeError> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(file) => {
                let bad = |reason: String| ProbeError::Certificates { file: file.clone(), reason };
                for certificate in CertificateDer::pem_file_iter(file).map_err(|e| bad(e.to_string()))? {
                    let certificate = certificate.map_err(|e| bad(e.to_string()))?;
                    roots.add(certificate).map_err(|e| bad(e.to_string()))?;
                }
            }
            None => {
                let _passed_over = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| ProbeError::Certificates { file: PathBuf::new(), reason: e.to_string() })?;
        Ok(config.with_root_certificates(roots).with_no_client_auth())
    }
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(stream: S, request: Request<Body>) -> Result<Answer, String> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body = body::to_bytes(Body::new(answer.into_body()), MAX_BODY).await.map_err(|e| e.to_string())?;
        Ok(Answer { status, headers, body: body.to_vec() })
    };
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // It may end with the answer's last byte, before that was looked at.
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What somebody who starts processes again has to tell apart.
    #[tokio::test]
    async fn one_that_says_nothing_is_told_from_one_that_is_not_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{address}/health");
            let asked = Probe::default().get(&url, Duration::from_millis(300)).await;
            assert!(matches!(asked, Err(ProbeError::Silent(_))), "{scheme}: {asked:?}");
        }
        drop(listener);
        let asked = Probe::default().get(&format!("http://{address}/health"), Duration::from_secs(5)).await;
        assert!(matches!(asked, Err(ProbeError::Unreachable { .. })), "{asked:?}");
    }
}
