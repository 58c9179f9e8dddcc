//! Sockets: bind, TLS, bounds on connections and on how long they are waited for, an end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router, extract::connect_info::ConnectInfo};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::TokenError,
    config::HttpConfig,
    patience::{Patience, Patient},
    room::{Room, Seat},
    tls::{Certificate, TlsError},
};

/// How often the certificate's file is looked at.
const LOOK_AT_CERTIFICATE: Duration = Duration::from_secs(30);
/// Open answers (streams of events among them) have this long when the process stops.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// While somebody else has the address.
const BIND_AGAIN: Duration = Duration::from_secs(2);
/// After an accept that failed for want of descriptors.
const BREATHE: Duration = Duration::from_millis(200);
/// Bytes of an answer that the kernel keeps for somebody who does not read: what he has not taken holds no more memory, and how
/// long he takes nothing is seen.
const SEND_BUFFER: usize = 256 * 1024;
/// Between two words about connections that are turned away.
const TOLD_AGAIN: Duration = Duration::from_secs(60);

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
    room: Arc<Room>,
    patience: Patience,
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
        // Connections inherit it. Without it the kernel's own bound holds, which is a few MB.
        if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(&listener, SEND_BUFFER) {
            tracing::debug!(%error, "send buffer not bounded");
        }
        let room = Room::new(config.max_connections, config.max_connections_per_peer);
        Ok(Server { listener, address, certificate, room, patience: Patience::default() })
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
        let mut told: Option<Instant> = None;
        loop {
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
            let Some(seat) = self.room.enter(peer.ip()) else {
                if told.is_none_or(|at| at.elapsed() >= TOLD_AGAIN) {
                    told = Some(Instant::now());
                    tracing::warn!(%peer, "connections are turned away: all that may be open are in use");
                }
                continue;
            };
            let link = Link { peer, seat: seat.clone(), patience: self.patience };
            let (router, acceptor, shutdown) = (router.clone(), acceptor.clone(), shutdown.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = connection(stream, link, acceptor, router, shutdown) => {}
                    () = seat.left() => tracing::debug!(%peer, "a silent connection made room"),
                }
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

/// What is known of a connection beside its bytes.
struct Link {
    peer: SocketAddr,
    seat: Seat,
    patience: Patience,
}

async fn connection(
    stream: TcpStream,
    link: Link,
    acceptor: Option<TlsAcceptor>,
    router: Router,
    shutdown: CancellationToken,
) {
    // Small frames are to go out at once; without it they only go later.
    let _ = stream.set_nodelay(true);
    let peer = link.peer;
    let stream = Patient::new(stream, link.patience.write);
    match acceptor {
        None => answer(stream, link, router, shutdown).await,
        Some(acceptor) => match timeout(link.patience.head, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => answer(stream, link, router, shutdown).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "tls handshake failed"),
            Err(_) => tracing::debug!(%peer, "tls handshake took too long"),
        },
    }
}

async fn answer<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    link: Link,
    router: Router,
    shutdown: CancellationToken,
) {
    let Link { peer, seat, patience } = link;
    let router = router.layer(Extension(ConnectInfo(peer))).layer(Extension(seat)).layer(Extension(patience));
    let service = TowerToHyperService::new(router);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.head)
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
    use crate::{
        access::Access,
        guard::{Exceptions, guard},
    };
    use axum::{
        body::{Body, Bytes},
        routing::{get, post},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const SOON: Duration = Duration::from_secs(20);

    /// A server of a few places that waits for nobody, until it is dropped.
    struct Served {
        address: SocketAddr,
        room: Arc<Room>,
        _stop: tokio_util::sync::DropGuard,
    }

    async fn serve(most: usize, patience: Patience) -> Served {
        let config = HttpConfig { max_connections: most, ..HttpConfig::on("127.0.0.1:0") };
        let mut server = Server::bind(&config).await.expect("bound");
        server.patience = patience;
        let endless = || async { Body::new(Endless(Bytes::from(vec![b'x'; 64 * 1024]))) };
        let routes = Router::new()
            .route("/health", get(|| async { "well" }))
            .route("/endless", get(endless))
            .route("/slow", post(|body: Bytes| async move { body.len().to_string() }));
        let access = Arc::new(Access::read(&config).expect("no tokens"));
        let router = guard(routes, access, Exceptions::default());
        let (address, room, shutdown) = (server.address(), server.room.clone(), CancellationToken::new());
        let stop = shutdown.clone().drop_guard();
        TaskTracker::new().spawn(server.serve(router, shutdown));
        Served { address, room, _stop: stop }
    }

    struct Endless(Bytes);

    impl axum::body::HttpBody for Endless {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
            std::task::Poll::Ready(Some(Ok(hyper::body::Frame::data(self.0.clone()))))
        }
    }

    async fn ask(address: SocketAddr, request: &str) -> TcpStream {
        let mut socket = TcpStream::connect(address).await.expect("connected");
        socket.write_all(request.as_bytes()).await.expect("sent");
        socket
    }

    async fn to_end(mut socket: TcpStream) -> String {
        let mut all = Vec::new();
        // A reset after the answer is as good an end.
        let _ = timeout(SOON, socket.read_to_end(&mut all)).await.expect("an end");
        String::from_utf8_lossy(&all).into_owned()
    }

    const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    const SLOW: &str = "POST /slow HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf";

    #[tokio::test]
    async fn silent_clients_leave_room_for_a_health_check() {
        let served = serve(8, Patience::default()).await;
        let mut flood = Vec::new();
        for n in 0..40 {
            // Nothing at all, half a head, half a body.
            let said = ["", "GET /health HT", SLOW][n % 3];
            flood.push(ask(served.address, said).await);
        }
        assert!(to_end(ask(served.address, HEALTH).await).await.ends_with("well"));
        assert!(served.room.open() <= 8);
        // Who is being answered keeps his place.
        let streams: Vec<_> = futures_of(8, served.address, "GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        assert!(to_end(ask(served.address, HEALTH).await).await.ends_with("well"), "in one of loopback's own places");
        for mut stream in streams {
            let mut some = [0; 4096];
            assert!(stream.read(&mut some).await.expect("read") > 0);
        }
    }

    async fn futures_of(count: usize, address: SocketAddr, request: &str) -> Vec<TcpStream> {
        let mut sockets = Vec::new();
        for _ in 0..count {
            let mut socket = ask(address, request).await;
            let mut first = [0; 1];
            timeout(SOON, socket.read_exact(&mut first)).await.expect("an answer").expect("read");
            sockets.push(socket);
        }
        sockets
    }

    #[tokio::test]
    async fn a_slow_body_and_an_answer_that_nobody_takes_are_ended_in_time() {
        let short = Duration::from_millis(300);
        let served = serve(8, Patience { body: short, write: short, ..Patience::default() }).await;
        let answer = to_end(ask(served.address, SLOW).await).await;
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("\"timeout\""), "{answer}");
        let whole = SLOW.replace("content-length: 9", "content-length: 4\r\nconnection: close");
        assert!(to_end(ask(served.address, &whole).await).await.ends_with("4"));

        let stream = ask(served.address, "GET /endless HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        let until = Instant::now() + SOON;
        while served.room.open() > 0 {
            assert!(Instant::now() < until, "a client that reads nothing keeps its connection");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(stream);
    }

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
