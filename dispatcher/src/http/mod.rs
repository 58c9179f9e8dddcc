//! HTTP of a dispatcher, active or not: health, figures, the dashboard and what it asks for.
//!
//! It is a reader beside the loop, never a part of it: it looks through a [`window::Window`] or asks over NATS like any client,
//! so fifty open pages cost the loop one copy a second. An address that is taken is waited for, and nothing here ends the
//! dispatcher.
//!
//! | module | what for |
//! |---|---|
//! | [`window`] | what the loop shows |
//! | [`board`] | one look at everything, each second while somebody looks |
//! | [`view`], [`sessions`], [`reading`] | boards, lists and transcripts as pages read them; pure |
//! | [`texts`], [`events`] | what is said and what happens, read while somebody looks |
//! | [`limits`] | how much audio comes in at once, and how fast |
//! | [`health`], [`metrics`] | for those who watch processes |
//! | [`api`], [`stream`], [`page`] | routes |
//! | [`asr`], [`transcribe`] | audio and recordings of browsers and programs without NATS |

mod api;
mod asr;
mod board;
mod events;
mod health;
mod interest;
pub(crate) mod limits;
pub(crate) mod metrics;
mod page;
mod readers;
mod reading;
mod sessions;
pub mod strangers;
mod stream;
#[cfg(test)]
mod tests;
mod texts;
mod transcribe;
mod view;
pub(crate) mod window;

use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use voxfleet_http::{
    Access, Exceptions, HttpConfig, Server,
    axum::{Router, extract::DefaultBodyLimit},
    exposition::Exposition,
    guard::guard,
    tls::{self, Certificate},
};
use voxfleet_nats::Nats;

use crate::config::DispatcherConfig;
use board::Boards;
use limits::{SocketLimits, UploadLimits};
use window::Window;

/// Bodies of requests that carry no recording.
const MAX_BODY: usize = 64 * 1024;
/// A token may stand in the URL for clients that know nothing else; recordings are as long as they are.
const EXCEPTIONS: Exceptions = Exceptions { query_tokens: &["/asr"], long_bodies: &["/api/transcribe"] };

/// Its part of a dispatcher's settings.
pub(crate) struct Settings {
    http: HttpConfig,
    uploads: UploadLimits,
    sockets: SocketLimits,
}

impl From<&DispatcherConfig> for Settings {
    fn from(config: &DispatcherConfig) -> Self {
        Self { http: config.http.clone(), uploads: config.uploads.clone(), sockets: config.sockets.clone() }
    }
}

/// What every handler has.
#[derive(Clone)]
pub(crate) struct Site {
    nats: Nats,
    name: Arc<str>,
    access: Arc<Access>,
    boards: Boards,
    texts: texts::Reading,
    recent: events::Recent,
    readers: readers::Readers,
    /// One dead letter is sent again at a time: whoever asks for the same at once finds it gone.
    retrying: Arc<tokio::sync::Mutex<()>>,
    asr: asr::Places,
    uploads: transcribe::Uploads,
    started: SystemTime,
    /// Cookies may only travel encrypted.
    encrypted: bool,
    /// Ours, once the socket is bound.
    certificate: Arc<OnceLock<Arc<Certificate>>>,
    /// What the NATS servers show.
    servers: tls::Shown,
    /// Work that belongs to a request that is being answered.
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Site {
    fn certificates(&self, out: &mut Exposition) {
        let own = self.certificate.get().and_then(|certificate| certificate.expires());
        let client = self.nats.client_certificate().and_then(|file| tls::expiry_of(&file).ok().flatten());
        let mut family =
            out.gauge("voxfleet_certificate_expiry_timestamp_seconds", "unix time at which a certificate expires");
        for (name, expires) in [("http", own), ("nats", client), ("nats_server", self.servers.expires())] {
            if let Some(expires) = expires {
                family.sample(&[("use", name)], expires as f64);
            }
        }
    }
}

/// Serves until `shutdown`. Ends early only where nothing can be served: with configuration that cannot be used.
pub(crate) async fn run(nats: Nats, settings: Settings, name: Arc<str>, window: Window, shutdown: CancellationToken) {
    let Settings { http: config, uploads, sockets } = settings;
    if config.is_off() {
        return;
    }
    let access = match Access::read(&config) {
        Ok(access) => Arc::new(access),
        Err(error) => {
            tracing::error!(%error, "no http: its tokens cannot be read");
            return;
        }
    };
    metrics::begin();
    let tasks = TaskTracker::new();
    let (boards, making) = Boards::new(nats.clone(), window, shutdown.clone());
    let (texts, reading) = texts::Reading::new(nats.clone(), shutdown.clone());
    let (recent, listening) = events::Recent::new(nats.clone(), shutdown.clone());
    let site = Site {
        nats,
        name,
        access: access.clone(),
        boards,
        texts,
        recent,
        readers: readers::Readers::default(),
        retrying: Arc::default(),
        asr: asr::Places::new(sockets),
        uploads: transcribe::Uploads::new(uploads),
        started: SystemTime::now(),
        encrypted: config.tls_cert.is_some(),
        certificate: Arc::default(),
        servers: tls::Shown::default(),
        tasks: tasks.clone(),
        shutdown: shutdown.clone(),
    };
    let certificate = site.certificate.clone();
    let (servers, asking) = (site.servers.clone(), site.nats.clone());
    let watching = servers.watch(|| asking.server_certificates(), shutdown.clone());
    let router = routes(site, access);
    let serving = async {
        let Some(server) = Server::bind_in_time(&config, &shutdown).await else { return };
        if let Some(own) = server.certificate() {
            // Set once: there is one socket.
            let _ = certificate.set(own);
        }
        tracing::info!(url = server.url(), "http");
        if !server.address().ip().is_loopback() && config.tls_cert.is_none() {
            tracing::warn!("tokens and transcripts travel unencrypted: no dispatcher.http.tls_cert");
        }
        if let Err(error) = server.serve(router, shutdown.clone()).await {
            tracing::error!(%error, "no http any more");
        }
    };
    tokio::join!(serving, making, reading, listening, watching);
    tasks.close();
    tasks.wait().await;
}

fn routes(site: Site, access: Arc<Access>) -> Router {
    let routes = api::routes().merge(stream::routes()).merge(asr::routes()).layer(DefaultBodyLimit::max(MAX_BODY));
    let routes = routes.merge(transcribe::routes()).with_state(site);
    guard(routes.merge(page::routes()), access, EXCEPTIONS)
}
