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
    #[error("no TLS connection to {urls}: check nats.tls_ca, the host name in the certificate, and nats.tls_first")]
    Tls { urls: String, source: Source },
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
        let options = options(config, name, tx, slow.clone()).await?;
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
        match self.client().send_request(self.client().new_inbox(), request).await {
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

    pub(crate) fn client(&self) -> &Client {
        &self.inner.client
    }

    pub(crate) fn js(&self) -> &jetstream::Context {
        &self.inner.js
    }

    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.inner.tasks
    }

    pub(crate) fn stop_token(&self) -> CancellationToken {
        self.inner.stop.child_token()
    }
}

async fn options(
    config: &NatsConfig,
    name: &str,
    tx: watch::Sender<ConnectionState>,
    slow: Arc<AtomicU64>,
) -> Result<ConnectOptions, ConnectError> {
    let tx = Arc::new(tx);
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
            note(&tx, &slow, &event);
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

fn note(tx: &watch::Sender<ConnectionState>, slow: &AtomicU64, event: &Event) {
    match event {
        Event::Connected => tx.send_modify(|state| {
            state.connected = true;
            state.connects += 1;
            tracing::info!(connects = state.connects, "connected to nats");
        }),
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
        // A permission denial shows only here; its request looks like a timeout.
        Event::ServerError(error) => tracing::error!(%error, "nats server reports an error"),
        Event::ClientError(error) => tracing::warn!(%error, "nats client reports an error"),
        Event::Draining => tracing::debug!("nats connection is draining"),
    }
}

fn typed(config: &NatsConfig, error: async_nats::ConnectError) -> ConnectError {
    use async_nats::ConnectErrorKind as Kind;
    let urls = config.urls.iter().map(|url| without_user(url)).collect::<Vec<_>>().join(", ");
    match error.kind() {
        Kind::Authentication | Kind::AuthorizationViolation => {
            ConnectError::Credentials { urls, source: Box::new(error) }
        }
        Kind::Tls => ConnectError::Tls { urls, source: Box::new(error) },
        _ => ConnectError::Unreachable { urls, source: Box::new(error) },
    }
}
