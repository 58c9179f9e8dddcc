//! The task that sends spans. A collector that is slow, or not there, costs spans and nothing else.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use metrics::counter;
use opentelemetry_proto::tonic::resource::v1::Resource;
use reqwest::{Client, StatusCode, Url, header::CONTENT_TYPE};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::TracingConfig,
    span::Span,
    tracer::{Service, Tracer},
    wire,
};

/// What became of spans.
const SPANS: &str = "voxfleet_trace_spans_total";
/// Sent together at most.
const BATCH: usize = 512;
/// How long a span waits for others to go with it.
const GATHER: Duration = Duration::from_millis(500);
/// Pauses before a batch is sent again.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// What was lost is said at most so often.
const SAY_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("configuration: {0}")]
    Config(String),
    #[error("spans cannot be sent")]
    Client(#[source] reqwest::Error),
}

/// Why a span never reached the collector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// No room: they come faster than they can be sent.
    Full,
    /// The collector did not take them.
    Unsent,
}

impl Lost {
    fn as_str(self) -> &'static str {
        match self {
            Lost::Full => "queue_full",
            Lost::Unsent => "not_taken",
        }
    }
}

pub(crate) fn dropped(lost: Lost, count: usize) {
    counter!(SPANS, "outcome" => lost.as_str()).increment(count as u64);
}

/// So that the first scrape finds them at 0, tracing or not.
pub fn begin_counting() {
    for outcome in ["sent", Lost::Full.as_str(), Lost::Unsent.as_str()] {
        counter!(SPANS, "outcome" => outcome).increment(0);
    }
}

/// Sends what a [`Tracer`] takes, until it is finished.
#[derive(Debug)]
pub struct Exporter {
    tracker: TaskTracker,
    stop: CancellationToken,
    within: Duration,
}

impl Exporter {
    /// Starts to export, unless it is off.
    pub fn start(config: &TracingConfig, service: Service) -> Result<(Tracer, Self), TraceError> {
        let exporter = Self { tracker: TaskTracker::new(), stop: CancellationToken::new(), within: config.timeout() };
        if config.is_off() {
            return Ok((Tracer::off(), exporter));
        }
        let name = if config.service_name.is_empty() { service.as_str() } else { &config.service_name };
        let resource = wire::resource(&[
            ("service.name", name.to_owned()),
            ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("service.instance.id", uuid::Uuid::new_v4().to_string()),
        ]);
        let (queue, spans) = mpsc::channel(config.queue);
        let dropped = Arc::new(AtomicU64::new(0));
        let tracer = Tracer::new(queue, config.sample_ratio, Arc::clone(&dropped));
        let sender = Sender {
            client: client(config)?,
            url: config.url().map_err(TraceError::Config)?,
            resource,
            dropped,
            told: 0,
            said: None,
        };
        tracing::info!(collector = sender.url.host_str(), sample_ratio = config.sample_ratio, "traces are told");
        exporter.tracker.spawn(sender.run(spans, exporter.stop.clone(), exporter.within));
        Ok((tracer, exporter))
    }

    /// Sends what waits, within the configured time, and ends.
    pub async fn finish(self) {
        self.stop.cancel();
        self.tracker.close();
        if timeout(self.within + GATHER, self.tracker.wait()).await.is_err() {
            tracing::warn!("traces not told in time");
        }
    }
}

struct Sender {
    client: Client,
    url: Url,
    resource: Resource,
    /// Spans lost so far, and how many of them were told.
    dropped: Arc<AtomicU64>,
    told: u64,
    said: Option<Instant>,
}

/// What a collector, or its absence, answered.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Taken,
    /// It may take them later.
    NotNow(String),
    /// It will never take them.
    Never(String),
}

impl Sender {
    async fn run(mut self, mut spans: mpsc::Receiver<Span>, stop: CancellationToken, within: Duration) {
        let mut batch = Vec::with_capacity(BATCH);
        while stop.run_until_cancelled(gather(&mut spans, &mut batch)).await.is_some_and(|more| more) {
            if stop.run_until_cancelled(self.deliver(&batch)).await.is_none() {
                break;
            }
            batch.clear();
            self.say();
        }
        // What was on its way may come twice; the collector knows spans by their ids.
        let rest = async {
            loop {
                while batch.len() < BATCH
                    && let Ok(span) = spans.try_recv()
                {
                    batch.push(span);
                }
                if batch.is_empty() {
                    return;
                }
                if !matches!(self.send(&batch).await, Answer::Taken) {
                    return;
                }
                sent(batch.len());
                batch.clear();
            }
        };
        let _in_time = timeout(within, rest).await;
        self.lost(batch.len() + spans.len());
        self.said = None;
        self.say();
    }

    /// Sends a batch, again where that may help, or gives it up.
    async fn deliver(&mut self, batch: &[Span]) {
        for pause in AGAIN.into_iter().map(Some).chain([None]) {
            let why = match self.send(batch).await {
                Answer::Taken => return sent(batch.len()),
                Answer::NotNow(why) => why,
                Answer::Never(why) => {
                    tracing::debug!(why, "the collector refuses spans");
                    break;
                }
            };
            tracing::debug!(why, "spans not taken");
            match pause {
                Some(pause) => sleep(pause).await,
                None => break,
            }
        }
        self.lost(batch.len());
    }

    async fn send(&self, batch: &[Span]) -> Answer {
        let body = wire::encode(&self.resource, batch);
        let request = self.client.post(self.url.clone()).header(CONTENT_TYPE, "application/x-protobuf").body(body);
        match request.send().await {
            // Its body says at most that it left some out; nobody could do anything about that.
            Ok(response) => judge(response.status()),
            Err(error) => Answer::NotNow(causes(&error.without_url())),
        }
    }

    fn lost(&self, count: usize) {
        if count > 0 {
            self.dropped.fetch_add(count as u64, Ordering::Relaxed);
            dropped(Lost::Unsent, count);
        }
    }

    /// Says what was lost, now and then.
    fn say(&mut self) {
        let lost = self.dropped.load(Ordering::Relaxed);
        if lost > self.told && self.said.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
            tracing::warn!(
                spans = lost - self.told,
                in_all = lost,
                "spans were lost, the collector does not take them"
            );
            (self.told, self.said) = (lost, Some(Instant::now()));
        }
    }
}

fn sent(count: usize) {
    counter!(SPANS, "outcome" => "sent").increment(count as u64);
}

/// Waits for spans and takes what comes with the first. False: nobody tells anything any more.
async fn gather(spans: &mut mpsc::Receiver<Span>, batch: &mut Vec<Span>) -> bool {
    if spans.recv_many(batch, BATCH).await == 0 {
        return false;
    }
    let until = Instant::now() + GATHER;
    while batch.len() < BATCH {
        let room = BATCH - batch.len();
        match tokio::time::timeout_at(until, spans.recv_many(batch, room)).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    true
}

/// An error with what led to it.
fn causes(error: &dyn std::error::Error) -> String {
    let all = std::iter::successors(Some(error), |error| error.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn judge(status: StatusCode) -> Answer {
    match status.as_u16() {
        200..=299 => Answer::Taken,
        // Of the OTLP specification.
        429 | 502 | 503 | 504 => Answer::NotNow(status.to_string()),
        _ => Answer::Never(status.to_string()),
    }
}

fn client(config: &TracingConfig) -> Result<Client, TraceError> {
    let headers = config.header_map().map_err(TraceError::Config)?;
    Client::builder()
        .tls_backend_preconfigured(trust(config.ca_file.as_deref())?)
        .default_headers(headers)
        .user_agent(concat!("voxfleet/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        // The headers are for this collector.
        .redirect(reqwest::redirect::Policy::none())
        .timeout(config.timeout())
        .build()
        .map_err(TraceError::Client)
}

/// The system's certificates and those of `ca_file`. The crypto provider is named outright, so that nothing depends on which
/// one the process has installed.
fn trust(ca_file: Option<&Path>) -> Result<ClientConfig, TraceError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca_file {
        let wrong = |why: String| TraceError::Config(format!("tracing.ca_file: {}: {why}", path.display()));
        let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let certificates: Vec<_> =
            CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| wrong(error.to_string()))?;
        if certificates.is_empty() {
            return Err(wrong("it holds no certificate in PEM form".to_owned()));
        }
        for certificate in certificates {
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TraceError::Config(format!("TLS: {error}")))?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_sent_again() {
        for (status, answer) in [
            (200, Answer::Taken),
            (202, Answer::Taken),
            (429, Answer::NotNow("429 Too Many Requests".to_owned())),
            (503, Answer::NotNow("503 Service Unavailable".to_owned())),
            (400, Answer::Never("400 Bad Request".to_owned())),
            (401, Answer::Never("401 Unauthorized".to_owned())),
            (307, Answer::Never("307 Temporary Redirect".to_owned())),
            (500, Answer::Never("500 Internal Server Error".to_owned())),
        ] {
            assert_eq!(judge(StatusCode::from_u16(status).expect("a status")), answer);
        }
    }
}
