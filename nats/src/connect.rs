//! One connection to NATS: how it is made, what happens to it, how it ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::{Client, ConnectOptions, Event, jetstream};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{NatsConfig, without_user},
    denial::{Denial, Denials},
    error::{ServerError, Source},
    subjects::Subjects,
};

/// What a connection is doing now. `connects` grows with every connect: readers that see it grow ask again for what
/// the server may have forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConnectionState {
    pub connected: bool,
    /// Connects so far, the first included.
    pub connects: u64,
    /// Closed for good.
    pub closed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{}", .0.join("; "))]
    Config(Vec<String>),
    #[error("cannot read {path}")]
    File { path: String, source: std::io::Error },
    #[error("the server at {urls} refused these credentials")]
    Credentials { urls: String, source: Source },
    #[error("no TLS connection to {urls}: {hint}")]
    Tls { urls: String, hint: &'static str, source: Source },
    /// It knows us and does not want us now: the account's connections are used up, or something else is at its limit.
    #[error("the server at {urls} does not take this connection")]
    Refused { urls: String, source: Source },
    #[error("no NATS server answers at {urls}: is it running, and is the address right?")]
    Unreachable { urls: String, source: Source },
}

/// A connection. Clones share it.
#[derive(Clone)]
pub struct Nats {
    inner: Arc<Inner>,
}

struct Inner {
    config: NatsConfig,
    client: Client,
    /// For everything that awaits its answer.
    js: jetstream::Context,
    subjects: Subjects,
    state: watch::Receiver<ConnectionState>,
    slow: Arc<AtomicU64>,
    denials: Denials,
    request_timeout: Duration,
    /// Background tasks of this crate; they end with the token.
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// For the own tasks when there is no server to say goodbye to.
const OFFLINE_CLOSE: Duration = Duration::from_millis(500);

impl std::fmt::Debug for Nats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats").field("state", &*self.inner.state.borrow()).finish_non_exhaustive()
    }
}

impl Nats {
    /// Connects, or says what is wrong. `name` is what operators see in the server's connection list.
    /// A connection that is lost later is made again for ever.
    pub async fn connect(config: &NatsConfig, name: &str) -> Result<Nats, ConnectError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(ConnectError::Config(problems));
        }
        let (tx, state) = watch::channel(ConnectionState::default());
        let slow = Arc::new(AtomicU64::new(0));
        let denials = Denials::new(&config.inbox_prefix);
        let options = options(config, name, Watched { tx, slow: slow.clone(), denials: denials.clone() }).await?;
        let addresses: Result<Vec<async_nats::ServerAddr>, _> = config.urls.iter().map(|url| url.parse()).collect();
        let addresses = addresses.map_err(|error| ConnectError::Config(vec![error.to_string()]))?;
        let client = options.connect(addresses).await.map_err(|error| typed(config, error))?;
        // Its event comes on another task; readers must not take this first connect for a second one.
        let mut first = state.clone();
        let known = first.wait_for(|state| state.connects > 0);
        if tokio::time::timeout(Duration::from_millis(config.connect_timeout_ms), known).await.is_err() {
            tracing::debug!("connected without an event");
        }
        let js = jetstream::context::ContextBuilder::new()
            .timeout(Duration::from_millis(config.request_timeout_ms))
            .max_ack_inflight(4_096)
            .backpressure_on_inflight(true)
            .build(client.clone());
        Ok(Nats {
            inner: Arc::new(Inner {
                config: config.clone(),
                client,
                js,
                subjects: Subjects::new(&config.prefix),
                state,
                slow,
                denials,
                request_timeout: Duration::from_millis(config.request_timeout_ms),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            }),
        })
    }

    /// Another connection of the same kind: what waits in one does not hold up the other. It is closed by itself.
    pub async fn sibling(&self, name: &str) -> Result<Nats, ConnectError> {
        Nats::connect(&self.inner.config, name).await
    }

    /// Time to the server and back. Needs permission to publish to inboxes of one's own prefix.
    pub async fn rtt(&self, timeout: Duration) -> Result<Duration, ServerError> {
        // Nobody listens on a fresh inbox, and the server itself says so: a round trip that needs no helper.
        let begun = Instant::now();
        let request = async_nats::Request::new().timeout(Some(timeout));
        let to = self.client().new_inbox();
        let refused = self.denials().publishing(&to);
        let answer = tokio::select! {
            answer = self.client().send_request(to.clone(), request) => answer,
            error = refused => return Err(error),
        };
        match answer {
            Ok(_) => Ok(begun.elapsed()),
            Err(error) if error.kind() == async_nats::RequestErrorKind::NoResponders => Ok(begun.elapsed()),
            Err(error) => Err(error.into()),
        }
    }

    pub fn is_connected(&self) -> bool {
        self.client().connection_state() == async_nats::connection::State::Connected
    }

    /// Largest message the server takes, headers included, in bytes.
    pub fn max_payload(&self) -> usize {
        self.client().max_payload()
    }

    pub fn server_version(&self) -> String {
        self.client().server_info().version
    }

    /// The server and, in a cluster, its cluster: for people.
    pub fn server_name(&self) -> String {
        self.client().server_info().server_name
    }

    /// The certificate that this connection shows, where one is configured.
    pub fn client_certificate(&self) -> Option<std::path::PathBuf> {
        self.inner.config.tls_cert.clone()
    }

    pub fn subjects(&self) -> &Subjects {
        &self.inner.subjects
    }

    pub fn request_timeout(&self) -> Duration {
        self.inner.request_timeout
    }

    /// Follows the connection. The receiver's last value says `closed` once it is closed for good.
    pub fn connection_events(&self) -> watch::Receiver<ConnectionState> {
        self.inner.state.clone()
    }

    /// Messages of core subscriptions that were dropped because their reader was slow.
    pub fn dropped_messages(&self) -> u64 {
        self.inner.slow.load(Ordering::Relaxed)
    }

    /// Ends every background task and subscription, sends what is queued, and waits for the connection to close.
    /// Returns whether it did within `deadline`.
    pub async fn close(&self, deadline: Duration) -> bool {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        let mut state = self.connection_events();
        if !self.is_connected() {
            // Nobody is there to drain to; what stops must not wait for a server that may never come back.
            return tokio::time::timeout(deadline.min(OFFLINE_CLOSE), self.inner.tasks.wait()).await.is_ok();
        }
        let closing = async {
            self.inner.tasks.wait().await;
            if self.client().drain().await.is_err() {
                // The connection's own task is gone: it is closed already.
                return true;
            }
            // An error means that the callback is gone, and with it the connection.
            let _ = state.wait_for(|state| state.closed).await;
            true
        };
        tokio::time::timeout(deadline, closing).await.unwrap_or(false)
    }

    pub(crate) fn config(&self) -> &NatsConfig {
        &self.inner.config
    }

    pub(crate) fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(crate) fn js(&self) -> &jetstream::Context {
        &self.inner.js
    }

    pub(crate) fn denials(&self) -> &Denials {
        &self.inner.denials
    }

    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.inner.tasks
    }

    pub(crate) fn stop_token(&self) -> CancellationToken {
        self.inner.stop.child_token()
    }
}

/// What the connection's events change.
struct Watched {
    tx: watch::Sender<ConnectionState>,
    slow: Arc<AtomicU64>,
    denials: Denials,
}

async fn options(config: &NatsConfig, name: &str, watched: Watched) -> Result<ConnectOptions, ConnectError> {
    let mut options = ConnectOptions::new()
        .name(name)
        .ping_interval(Duration::from_millis(config.ping_interval_ms))
        .request_timeout(Some(Duration::from_millis(config.request_timeout_ms)))
        .connection_timeout(Duration::from_millis(config.connect_timeout_ms))
        .custom_inbox_prefix(&config.inbox_prefix)
        .require_tls(config.tls_required)
        .max_reconnects(None)
        .reconnect_delay_callback(crate::retry::reconnect_delay)
        .event_callback(move |event| {
            watched.note(&event);
            async {}
        });
    if config.tls_first {
        options = options.tls_first();
    }
    if let Some(ca) = &config.tls_ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let (Some(cert), Some(key)) = (&config.tls_cert, &config.tls_key) {
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    let unreadable = |path: &std::path::Path, source| ConnectError::File { path: path.display().to_string(), source };
    if let Some(path) = &config.credentials_file {
        options = options.credentials_file(path).await.map_err(|source| unreadable(path, source))?;
    }
    if let Some(path) = &config.nkey_seed_file {
        let seed = tokio::fs::read_to_string(path).await.map_err(|source| unreadable(path, source))?;
        options = options.nkey(seed.trim().to_owned());
    }
    if !config.user.is_empty() {
        options = options.user_and_password(config.user.clone(), config.password.reveal().to_owned());
    }
    if !config.token.is_empty() {
        options = options.token(config.token.reveal().to_owned());
    }
    Ok(options)
}

impl Watched {
    fn note(&self, event: &Event) {
        let Self { tx, slow, denials } = self;
        match event {
            Event::Connected => {
                denials.reset();
                tx.send_modify(|state| {
                    state.connected = true;
                    state.connects += 1;
                    tracing::info!(connects = state.connects, "connected to nats");
                });
            }
            Event::Disconnected => {
                tracing::warn!("disconnected from nats");
                tx.send_modify(|state| state.connected = false);
            }
            Event::Closed => tx.send_modify(|state| (state.connected, state.closed) = (false, true)),
            Event::LameDuckMode => tracing::warn!("nats server is shutting down, the connection will move"),
            Event::SlowConsumer(sid) => {
                let dropped = slow.fetch_add(1, Ordering::Relaxed) + 1;
                // One line for each doubling: a slow reader would otherwise flood the log too.
                if dropped.is_power_of_two() {
                    tracing::warn!(sid, dropped, "a subscription is slow, core messages are dropped");
                }
            }
            Event::ServerError(error) => match Denial::parse(&text_of(error)) {
                // A permission denial shows only here; its request looks like a timeout.
                Some(denial) => {
                    if denials.hear(denial.clone()) {
                        tracing::warn!(?denial, "this login may not do that");
                    }
                }
                None => tracing::error!(%error, "nats server reports an error"),
            },
            Event::ClientError(error) => tracing::warn!(%error, "nats client reports an error"),
            Event::Draining => tracing::debug!("nats connection is draining"),
        }
    }
}

/// What the server said, without the library's words around it.
fn text_of(error: &async_nats::ServerError) -> String {
    match error {
        async_nats::ServerError::Other(text) => text.clone(),
        other => other.to_string(),
    }
}

fn typed(config: &NatsConfig, error: async_nats::ConnectError) -> ConnectError {
    use async_nats::ConnectErrorKind as Kind;
    let urls = config.urls.iter().map(|url| without_user(url)).collect::<Vec<_>>().join(", ");
    let kind = error.kind();
    if matches!(kind, Kind::Authentication | Kind::AuthorizationViolation) {
        return ConnectError::Credentials { urls, source: Box::new(error) };
    }
    // A certificate that is not taken shows as a broken connection, with the reason inside.
    match cause::<rustls::Error>(&error).map(tls_hint) {
        Some(hint) => ConnectError::Tls { urls, hint, source: Box::new(error) },
        None if kind == Kind::Tls => {
            let hint = "check the files of nats.tls_ca, tls_cert and tls_key, and nats.tls_first";
            ConnectError::Tls { urls, hint, source: Box::new(error) }
        }
        None if cause::<async_nats::ServerError>(&error).is_some() => {
            ConnectError::Refused { urls, source: Box::new(error) }
        }
        None => ConnectError::Unreachable { urls, source: Box::new(error) },
    }
}

/// The first `E` among the causes.
fn cause<'a, E: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a E> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        // What stands inside an IO error is not among its causes.
        let inside = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if let Some(found) = inside.and_then(|inside| inside.downcast_ref::<E>()) {
            return Some(found);
        }
        at = error.source();
    }
    None
}

fn tls_hint(error: &rustls::Error) -> &'static str {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    match error {
        // A bad signature: one of the same name was renewed.
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "no authority that is trusted here has signed the server's certificate: set nats.tls_ca"
        }
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "the server's certificate is for other host names than the one in nats.urls"
        }
        Error::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        ) => "the time of the server's certificate is over, or has not come: renew it, or set this machine's clock",
        Error::InvalidCertificate(_) => "the server's certificate is not good",
        Error::AlertReceived(Alert::CertificateRequired) => {
            "the server wants a certificate of its clients: set nats.tls_cert and nats.tls_key"
        }
        Error::AlertReceived(_) => "the server refuses what it was shown: check nats.tls_cert and nats.tls_key",
        Error::InvalidMessage(_) => {
            "the server does not speak TLS there, or wants it at another moment (nats.tls_first)"
        }
        _ => "TLS failed",
    }
}

#[cfg(test)]
mod tests {
    use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

    use super::*;

    #[test]
    fn what_is_wrong_with_a_certificate_is_told_apart() {
        for (error, part) in [
            (Error::InvalidCertificate(CertificateError::UnknownIssuer), "nats.tls_ca"),
            (Error::InvalidCertificate(CertificateError::NotValidForName), "other host names"),
            (Error::InvalidCertificate(CertificateError::Expired), "is over"),
            (Error::InvalidCertificate(CertificateError::BadSignature), "nats.tls_ca"),
            (Error::InvalidCertificate(CertificateError::Revoked), "not good"),
            (Error::AlertReceived(AlertDescription::CertificateRequired), "set nats.tls_cert"),
            (Error::AlertReceived(AlertDescription::UnknownCA), "refuses"),
            (Error::InvalidMessage(InvalidMessage::InvalidContentType), "does not speak TLS"),
        ] {
            assert!(tls_hint(&error).contains(part), "{error}: {}", tls_hint(&error));
            let wrapped = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            assert!(cause::<Error>(&wrapped).is_some_and(|found| tls_hint(found).contains(part)), "{part}");
        }
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        assert!(cause::<Error>(&refused).is_none());
    }
}
