//! Sockets: bind, TLS, a bound on connections, an end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router, extract::connect_info::ConnectInfo};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::TokenError,
    config::HttpConfig,
    guard::Open,
    tls::{Certificate, TlsError},
};

/// For the TLS handshake, and for the headers of a request: whoever is slower is not waited for.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often the certificate's file is looked at.
const LOOK_AT_CERTIFICATE: Duration = Duration::from_secs(30);
/// Open answers (streams of events among them) have this long when the process stops.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// While somebody else has the address.
const BIND_AGAIN: Duration = Duration::from_secs(2);
/// After an accept that failed for want of descriptors.
const BREATHE: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("cannot listen on {address}")]
    Listen { address: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Tokens(#[from] TokenError),
}

impl HttpError {
    /// Somebody else has the address: a predecessor that has not quite gone.
    pub fn is_address_in_use(&self) -> bool {
        matches!(self, HttpError::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

/// A bound socket. Nothing is answered before [`Server::serve`].
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    certificate: Option<Arc<Certificate>>,
    max_connections: usize,
}

impl Server {
    pub async fn bind(config: &HttpConfig) -> Result<Server, HttpError> {
        let certificate = match (&config.tls_cert, &config.tls_key) {
            (Some(cert), Some(key)) => Some(Certificate::read(cert, key)?),
            _ => None,
        };
        let failed = |source| HttpError::Listen { address: config.listen.clone(), source };
        let listener = TcpListener::bind(&config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Server { listener, address, certificate, max_connections: config.max_connections })
    }

    /// The same, for as long as it takes: an address that is taken, by a predecessor or by another process of this machine, is
    /// tried again. None: shut down, or it can never be, which has been logged.
    pub async fn bind_in_time(config: &HttpConfig, shutdown: &CancellationToken) -> Option<Server> {
        let mut told = false;
        loop {
            match shutdown.run_until_cancelled(Server::bind(config)).await? {
                Ok(server) => return Some(server),
                Err(error @ HttpError::Listen { .. }) => {
                    if !std::mem::replace(&mut told, true) {
                        let taken = error.is_address_in_use();
                        tracing::warn!(%error, listen = config.listen, taken, "no http yet, trying again");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "no http");
                    return None;
                }
            }
            shutdown.run_until_cancelled(tokio::time::sleep(BIND_AGAIN)).await?;
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// As others type it.
    pub fn url(&self) -> String {
        format!("http{}://{}", if self.certificate.is_some() { "s" } else { "" }, self.address)
    }

    pub fn certificate(&self) -> Option<Arc<Certificate>> {
        self.certificate.clone()
    }

    /// Answers until `shutdown`; then what is open has a moment to end.
    pub async fn serve(self, router: Router, shutdown: CancellationToken) -> Result<(), HttpError> {
        let acceptor = match &self.certificate {
            Some(certificate) => Some(TlsAcceptor::from(certificate.server_config()?)),
            None => None,
        };
        let tasks = TaskTracker::new();
        if let Some(certificate) = self.certificate.clone() {
            tasks.spawn(watch(certificate, shutdown.clone()));
        }
        let permits = Arc::new(Semaphore::new(self.max_connections));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { break };
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "connection not accepted");
                    tokio::time::sleep(BREATHE).await;
                    continue;
                }
            };
            let (router, acceptor, shutdown) = (router.clone(), acceptor.clone(), shutdown.clone());
            tasks.spawn(async move {
                let _open = Open::new("all");
                connection(stream, peer, acceptor, router, shutdown).await;
                drop(permit);
            });
        }
        tasks.close();
        if timeout(LAST_ANSWERS, tasks.wait()).await.is_err() {
            tracing::debug!("http connections were still open at the end");
        }
        Ok(())
    }
}

async fn watch(certificate: Arc<Certificate>, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(LOOK_AT_CERTIFICATE);
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        match certificate.refresh() {
            Ok(true) => tracing::info!(expires = certificate.expires(), "certificate renewed"),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "certificate not renewed, the old one stays in use"),
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    router: Router,
    shutdown: CancellationToken,
) {
    // Small frames are to go out at once; without it they only go later.
    let _ = stream.set_nodelay(true);
    match acceptor {
        None => answer(stream, peer, router, shutdown).await,
        Some(acceptor) => match timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => answer(stream, peer, router, shutdown).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "tls handshake failed"),
            Err(_) => tracing::debug!(%peer, "tls handshake took too long"),
        },
    }
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    peer: SocketAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    let service = TowerToHyperService::new(router.layer(Extension(ConnectInfo(peer))));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::trace!(%peer, %error, "connection ended");
            }
        }
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // Bounded by whoever waits for all of them.
            if let Err(error) = connection.await {
                tracing::trace!(%peer, %error, "connection ended");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_address_is_waited_for_and_given_up_at_the_end() {
        let taken = TcpListener::bind("127.0.0.1:0").await.expect("an address");
        let config = HttpConfig::on(&taken.local_addr().expect("bound").to_string());
        let shutdown = CancellationToken::new();
        let waiting = Server::bind_in_time(&config, &shutdown);
        tokio::pin!(waiting);
        assert!(timeout(BIND_AGAIN / 20, &mut waiting).await.is_err(), "somebody else has it");
        drop(taken);
        assert!(waiting.await.is_some(), "it is free");

        let taken = TcpListener::bind("127.0.0.1:0").await.expect("an address");
        let config = HttpConfig::on(&taken.local_addr().expect("bound").to_string());
        shutdown.cancel();
        assert!(Server::bind_in_time(&config, &shutdown).await.is_none());
    }
}
