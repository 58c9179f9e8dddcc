//! Streams, buckets and worker consumers: made where they are missing, verified where they are not.
//!
//! What is found is not changed: a stream of the same name that differs is somebody else's, or from another
//! configuration, and its owner decides. The error says which field, and how to mend it. One that only has more room or more
//! replicas than configured is taken as it is. The one exception takes nothing from anybody: a stream that is ours in every
//! other field gets the replicas that are configured, so that a fleet grows from one server to three by one setting.

mod streams;
mod workers;

pub use streams::{Raised, TopologyConfig};
pub(crate) use workers::consumer_name;
pub use workers::{WorkerConsumers, ensure_worker, list_worker_consumers, remove_worker};

use std::time::Duration;

use async_nats::jetstream::{
    ErrorCode,
    stream::{Config, Info},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{Nats, ServerError, raw, retry::Backoff};

/// Names of the streams.
pub mod names {
    pub const AUDIO: &str = "ASR_AUDIO";
    pub const LIVE: &str = "ASR_LIVE";
    pub const JOBS: &str = "ASR_JOBS";
    pub const WORK: &str = "ASR_WORK";
    pub const TRANSCRIPT: &str = "ASR_TRANSCRIPT";
    pub const CHECKPOINT: &str = "ASR_CHECKPOINT";
    pub const PARTIAL: &str = "ASR_PARTIAL";
    pub const EVENT: &str = "ASR_EVENT";
    pub const DEAD: &str = "ASR_DEAD";
    pub const MEDIA: &str = "OBJ_asr_media";
}

#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    #[error("{}", .0.join("; "))]
    Config(Vec<String>),
    #[error("nats-server {found} is too old, {needed} or newer is needed: upgrade the server")]
    ServerTooOld { found: String, needed: &'static str },
    #[error(
        "JetStream is off: start nats-server with -js, or with `jetstream {{}}` in its configuration, and enable it for the account"
    )]
    NoJetStream,
    #[error(
        "the server's max_payload is {found} bytes, at least {needed} is needed: set `max_payload` in its configuration (ours say 4MB)"
    )]
    MaxPayload { found: usize, needed: usize },
    #[error("stream {stream}: {field} is {found}, wanted {wanted}; {mend}")]
    Differs { stream: String, field: &'static str, wanted: String, found: String, mend: String },
    #[error("subjects of {stream} are taken by stream {other}: delete or rename that one, or set another nats.prefix")]
    SubjectsTaken { stream: String, other: String },
    #[error(
        "no room for stream {stream} ({max_bytes} bytes): raise the account's max_file or max_memory, or the server's max_file_store or max_memory_store, or lower topology.*_max_bytes"
    )]
    NoRoom { stream: String, max_bytes: i64, source: ServerError },
    #[error(
        "{replicas} replicas of {stream} need a cluster of as many servers: start it, or set topology.replicas = 1"
    )]
    Replicas { stream: String, replicas: usize, source: ServerError },
    #[error("stream {stream} is missing: start a dispatcher, it makes what is missing")]
    Missing { stream: String },
    #[error("stream {stream}")]
    Stream { stream: String, source: ServerError },
    #[error("consumer {consumer} of {stream}")]
    Consumer { stream: String, consumer: String, source: ServerError },
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// What [`ensure`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub created: Vec<String>,
    pub verified: Vec<String>,
    /// What somebody has given more room than the configuration says.
    pub raised: Vec<Raised>,
    /// What had fewer replicas than the configuration says, and has them now.
    pub grown: Vec<String>,
}

/// What became of one stream.
enum Made {
    Created(Vec<Raised>),
    Verified(Vec<Raised>),
    Grown(Vec<Raised>),
}

/// How full a stream is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub stream: String,
    pub messages: u64,
    pub bytes: u64,
    pub max_bytes: u64,
    pub consumers: usize,
}

impl Usage {
    /// Share of `max_bytes` in use, 0 to 1; the alarm is at 0.8.
    pub fn share(&self) -> f64 {
        if self.max_bytes == 0 { 0.0 } else { self.bytes as f64 / self.max_bytes as f64 }
    }
}

/// A stream whose copies are not all as they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behind {
    pub stream: String,
    /// None while none is elected.
    pub leader: Option<String>,
    /// Servers whose copy is away or behind, each with how many operations it lacks.
    pub lagging: Vec<(String, u64)>,
}

/// Streams without a leader, and those with a copy that is offline or not current. None on a single server.
pub async fn behind(nats: &Nats) -> Result<Vec<Behind>, TopologyError> {
    let mut found = Vec::new();
    for stream in streams::wanted(nats.subjects(), &TopologyConfig::default(), nats.max_payload()) {
        let cluster = find(nats, &stream.name).await?.and_then(|info| info.cluster);
        let Some(cluster) = cluster else { continue };
        let late = cluster.replicas.iter().filter(|peer| peer.offline || !peer.current);
        let lagging: Vec<(String, u64)> = late.map(|peer| (peer.name.clone(), peer.lag.unwrap_or(0))).collect();
        if cluster.leader.is_none() || !lagging.is_empty() {
            found.push(Behind { stream: stream.name, leader: cluster.leader, lagging });
        }
    }
    Ok(found)
}

/// Oldest server whose streams do all that is asked of them.
const OLDEST: (i64, i64, i64) = (2, 12, 0);
/// Twice the longest final: room for its headers and for whatever else travels with it.
const LEAST_PAYLOAD: usize = 2 * voxfleet_schema::transcript::MAX_FINAL_BYTES;
/// How long a cluster may take to elect its leaders.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes what is missing and verifies the rest, field by field. Waits for a cluster that is still electing leaders.
/// Cheap enough to repeat: memory streams vanish with their server.
pub async fn ensure(nats: &Nats, config: &TopologyConfig) -> Result<Report, TopologyError> {
    let streams = wanted(nats, config).await?;
    let finals_for = Duration::from_secs(config.transcript_max_age_s);
    let made = streams.iter().map(|stream| ensure_stream(nats, stream, finals_for));
    let made = futures_util::future::join_all(made).await;
    let mut report = Report::default();
    for (stream, made) in streams.iter().zip(made) {
        let (list, raised) = match made? {
            Made::Created(raised) => (&mut report.created, raised),
            Made::Verified(raised) => (&mut report.verified, raised),
            Made::Grown(raised) => (&mut report.grown, raised),
        };
        list.push(stream.name.clone());
        report.raised.extend(raised);
    }
    Ok(report)
}

/// Only checks; makes nothing. Every problem at once, for `doctor`.
pub async fn verify(nats: &Nats, config: &TopologyConfig) -> Vec<TopologyError> {
    let streams = match wanted(nats, config).await {
        Ok(streams) => streams,
        Err(error) => return vec![error],
    };
    let mut problems = Vec::new();
    let finals_for = Duration::from_secs(config.transcript_max_age_s);
    for stream in &streams {
        match find(nats, &stream.name).await {
            Ok(Some(info)) => problems.extend(check(stream, &info.config, finals_for).err()),
            Ok(None) => problems.push(TopologyError::Missing { stream: stream.name.clone() }),
            Err(error) => problems.push(error),
        }
    }
    problems
}

/// Whether JetStream answers at all, asked on a stream that whoever reads transcripts may look at. Any other error than that
/// of a stream that is missing says something of the connection, or of this login.
pub async fn probe(nats: &Nats) -> Result<(), ServerError> {
    match raw::stream_info(nats, names::TRANSCRIPT).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_code(ErrorCode::STREAM_NOT_FOUND) => Ok(()),
        Err(error) => Err(error),
    }
}

/// How full every stream is. Missing ones are left out.
pub async fn usage(nats: &Nats) -> Result<Vec<Usage>, TopologyError> {
    let mut found = Vec::new();
    for stream in streams::wanted(nats.subjects(), &TopologyConfig::default(), nats.max_payload()) {
        if let Some(info) = find(nats, &stream.name).await? {
            found.push(Usage {
                stream: stream.name,
                messages: info.state.messages,
                bytes: info.state.bytes,
                max_bytes: u64::try_from(info.config.max_bytes).unwrap_or(0),
                consumers: info.state.consumer_count,
            });
        }
    }
    Ok(found)
}

/// Checks configuration and server, and says what should be there.
async fn wanted(nats: &Nats, config: &TopologyConfig) -> Result<Vec<Config>, TopologyError> {
    let problems = config.problems();
    if !problems.is_empty() {
        return Err(TopologyError::Config(problems));
    }
    if !nats.client().is_server_compatible(OLDEST.0, OLDEST.1, OLDEST.2) {
        return Err(TopologyError::ServerTooOld { found: nats.server_version(), needed: "2.12" });
    }
    let account: Result<serde_json::Value, _> = patiently(
        || raw::api(nats, "INFO".to_owned(), &raw::Empty {}),
        |error| {
            // Nobody answering is an answer: a server with JetStream always does.
            error.is_transient() && !matches!(error, ServerError::NoResponders(_))
        },
    )
    .await;
    match account {
        Ok(_) => {}
        Err(ServerError::NoResponders(_)) => return Err(TopologyError::NoJetStream),
        Err(error)
            if error.is_code(ErrorCode::JETSTREAM_NOT_ENABLED)
                || error.is_code(ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT) =>
        {
            return Err(TopologyError::NoJetStream);
        }
        Err(error) => return Err(error.into()),
    }
    if nats.max_payload() < LEAST_PAYLOAD {
        return Err(TopologyError::MaxPayload { found: nats.max_payload(), needed: LEAST_PAYLOAD });
    }
    Ok(streams::wanted(nats.subjects(), config, nats.max_payload()))
}

async fn find(nats: &Nats, stream: &str) -> Result<Option<Info>, TopologyError> {
    match patiently(|| raw::stream_info(nats, stream), ServerError::is_transient).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.is_code(ErrorCode::STREAM_NOT_FOUND) => Ok(None),
        Err(source) => Err(TopologyError::Stream { stream: stream.to_owned(), source }),
    }
}

fn check(wanted: &Config, found: &Config, finals_for: Duration) -> Result<Vec<Raised>, TopologyError> {
    match streams::difference(wanted, found, finals_for) {
        None => Ok(streams::raised(wanted, found, finals_for)),
        Some(streams::Difference { field, wanted: want, found, mend }) => {
            Err(TopologyError::Differs { stream: wanted.name.clone(), field, wanted: want, found, mend })
        }
    }
}

async fn ensure_stream(nats: &Nats, wanted: &Config, finals_for: Duration) -> Result<Made, TopologyError> {
    let check = |info: &Info| check(wanted, &info.config, finals_for);
    if let Some(info) = find(nats, &wanted.name).await? {
        return match streams::grown(wanted, &info.config, finals_for) {
            Some(grown) => grow(nats, &grown).await.and_then(|info| Ok(Made::Grown(check(&info)?))),
            None => Ok(Made::Verified(check(&info)?)),
        };
    }
    let create = || raw::api::<Info>(nats, format!("STREAM.CREATE.{}", wanted.name), wanted);
    match patiently(create, ServerError::is_transient).await {
        Ok(info) => Ok(Made::Created(check(&info)?)),
        // Another dispatcher was faster.
        Err(error) if error.is_code(ErrorCode::STREAM_NAME_EXIST) => match find(nats, &wanted.name).await? {
            Some(info) => Ok(Made::Verified(check(&info)?)),
            None => Err(TopologyError::Stream { stream: wanted.name.clone(), source: error }),
        },
        Err(error) => Err(refusal(nats, wanted, error).await),
    }
}

/// Repeating it is harmless: a second dispatcher asks for the same.
async fn grow(nats: &Nats, grown: &Config) -> Result<Info, TopologyError> {
    let update = || raw::api::<Info>(nats, format!("STREAM.UPDATE.{}", grown.name), grown);
    match patiently(update, ServerError::is_transient).await {
        Ok(info) => Ok(info),
        Err(error) => Err(refusal(nats, grown, error).await),
    }
}

async fn refusal(nats: &Nats, wanted: &Config, source: ServerError) -> TopologyError {
    let stream = wanted.name.clone();
    match source.code() {
        // Subjects overlap with an existing stream.
        Some(10_065) => TopologyError::SubjectsTaken { stream, other: owner_of(nats, wanted).await },
        // Insufficient resources, storage, memory; account limits on them.
        Some(10_002 | 10_023 | 10_028 | 10_047 | 10_120 | 10_122) => {
            TopologyError::NoRoom { stream, max_bytes: wanted.max_bytes, source }
        }
        // No suitable peers; replicas without a cluster.
        Some(10_005 | 10_074) => TopologyError::Replicas { stream, replicas: wanted.num_replicas, source },
        _ => TopologyError::Stream { stream, source },
    }
}

/// Which stream holds one of the wanted subjects, for the error's text.
async fn owner_of(nats: &Nats, wanted: &Config) -> String {
    #[derive(Serialize)]
    struct Which<'a> {
        subject: &'a str,
    }
    #[derive(Deserialize)]
    struct Names {
        streams: Option<Vec<String>>,
    }
    let mut found = Vec::new();
    for subject in &wanted.subjects {
        let names: Result<Names, _> = raw::api(nats, "STREAM.NAMES".to_owned(), &Which { subject }).await;
        found.extend(names.ok().and_then(|names| names.streams).unwrap_or_default());
    }
    found.sort();
    found.dedup();
    if found.is_empty() { "another stream".to_owned() } else { found.join(", ") }
}

/// Repeats a request while it may yet succeed.
async fn patiently<T, F: Future<Output = Result<T, ServerError>>>(
    mut request: impl FnMut() -> F,
    again: impl Fn(&ServerError) -> bool,
) -> Result<T, ServerError> {
    let deadline = Instant::now() + PATIENCE;
    let mut backoff = Backoff::default();
    loop {
        match request().await {
            Err(error) if again(&error) && Instant::now() < deadline => {
                tracing::debug!(%error, "jetstream is not ready, asking again");
                backoff.wait().await;
            }
            result => return result,
        }
    }
}
