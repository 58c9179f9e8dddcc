//! What a predecessor left: open sessions and jobs, workers, and how far it had read the log.

use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use voxfleet_nats::{
    Nats, ServerError,
    kv::{Bucket, KvError, Records},
    log::{AudioLog, LogError},
    retry::Backoff,
    transcript::{Chain, ChainError},
};
use voxfleet_schema::{
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
    job::JobRecord,
    session::{SessionRecord, SessionState},
};

use super::{effects::describe, fleet_record::FleetRecord, jobs::last_mark};
use crate::{
    core::{FleetKey, Loaded, jobs::JobLoaded},
    run::DispatcherError,
    sessions::ChainMark,
};

const CURSOR_KEY: &str = "log-cursor";

/// Value of the log cursor in `asr_control`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// Last sequence of `ASR_AUDIO` that a successor need not read again.
    pub(super) seq: u64,
}

/// All that a predecessor left.
pub(super) struct Left {
    pub(super) sessions: Vec<Loaded>,
    /// How far the log was read.
    pub(super) cursor: u64,
    pub(super) jobs: Vec<JobLoaded>,
    /// Ended jobs, and when each is to be looked at.
    pub(super) ended_jobs: Vec<(StreamId, u64)>,
    pub(super) fleet: Vec<FleetKey>,
}

/// Asks until there is an answer: who holds the lease goes on trying, a server that is being restarted answers later. Only
/// a closed connection is the end.
async fn patiently<T, E, Fut>(what: &'static str, mut ask: impl FnMut() -> Fut) -> Result<T, DispatcherError>
where
    E: Into<KvError>,
    Fut: Future<Output = Result<T, E>>,
{
    let mut backoff = Backoff::default();
    loop {
        match ask().await.map_err(Into::into) {
            Ok(found) => return Ok(found),
            Err(KvError::Server(ServerError::Closed)) => return Err(DispatcherError::Closed),
            Err(error) => {
                tracing::warn!(what, error = %describe(&error), "what a predecessor left cannot be read now, trying again");
                backoff.wait().await;
            }
        }
    }
}

/// Reads it, however long that takes.
pub(super) async fn everything(nats: &Nats, in_flight: usize) -> Result<Left, DispatcherError> {
    let (sessions, cursor) = open_sessions(nats, in_flight).await?;
    let (jobs, ended_jobs) = jobs(nats, in_flight).await?;
    let records: Records<FleetRecord> = Records::new(nats, Bucket::Fleet);
    let keys = patiently("keys of workers", || records.all()).await?;
    let fleet = keys.into_iter().filter_map(|(key, v)| {
        let worker = worker_of(&key)?;
        let dead_ms = v.value.verdict.map(|verdict| verdict.at_ms);
        let device = v.value.heartbeat.map(|heartbeat| heartbeat.device.index.is_some());
        Some(FleetKey { worker, revision: v.revision, dead_ms, device })
    });
    Ok(Left { sessions, cursor, jobs, ended_jobs, fleet: fleet.collect() })
}

fn worker_of(key: &str) -> Option<WorkerName> {
    let (gpu_id, incarnation) = key.split_once('.')?;
    Some(WorkerName { gpu_id: GpuId::new(gpu_id).ok()?, incarnation: Incarnation::new(incarnation).ok()? })
}

/// Every session that has not ended, with its last final and last log entry; and the cursor.
async fn open_sessions(nats: &Nats, in_flight: usize) -> Result<(Vec<Loaded>, u64), DispatcherError> {
    let cursors: Records<Cursor> = Records::new(nats, Bucket::Control);
    let from = patiently("cursor", || async {
        match cursors.get(CURSOR_KEY).await {
            Ok(cursor) => Ok(cursor.map_or(0, |cursor| cursor.value.seq)),
            Err(KvError::Malformed { .. }) => {
                // The whole log is read again: that costs time, and nothing else.
                tracing::error!("log cursor cannot be read");
                Ok(0)
            }
            Err(error) => Err(error),
        }
    })
    .await?;
    let records: Records<SessionRecord> = Records::new(nats, Bucket::Sessions);
    let all = patiently("keys of sessions", || records.all()).await?;
    let open = all.into_iter().map(|(_, v)| v).filter(|v| v.value.state != SessionState::Ended);
    let reads = open.map(|v| {
        let (chain, log) = (Chain::new(nats), AudioLog::new(nats));
        async move {
            let (mark, last) = patiently("session", || surroundings(&chain, &log, &v.value.id)).await?;
            Ok::<_, DispatcherError>(Loaded { record: Some((v.value, v.revision)), chain: mark, last })
        }
    });
    let loaded = stream::iter(reads).buffer_unordered(in_flight).try_collect().await?;
    Ok((loaded, from))
}

/// Every job that has not ended, with its last final; and when each of the others is to be looked at.
async fn jobs(nats: &Nats, in_flight: usize) -> Result<(Vec<JobLoaded>, Vec<(StreamId, u64)>), DispatcherError> {
    let records: Records<JobRecord> = Records::new(nats, Bucket::Jobs);
    let all = patiently("keys of jobs", || records.all()).await?;
    let (ended, open): (Vec<_>, Vec<_>) = all.into_iter().map(|(_, v)| v).partition(|v| v.value.state.has_ended());
    // When exactly is decided from the key, when the time of its result is over.
    let ends = |record: &JobRecord| record.ended_ms.unwrap_or(0).saturating_add(u64::from(record.result_ttl_s) * 1_000);
    let ended = ended.into_iter().map(|v| (v.value.id.clone(), ends(&v.value))).collect();
    let reads = open.into_iter().map(|v| {
        let chain = Chain::new(nats);
        async move {
            // Nobody has worked on it yet.
            let new = v.value.epoch == 0;
            let mark = if new { None } else { patiently("job", || last_mark(&chain, &v.value.id)).await? };
            Ok::<_, DispatcherError>(JobLoaded { record: Some((v.value, v.revision)), chain: mark })
        }
    });
    let open = stream::iter(reads).buffer_unordered(in_flight).try_collect().await?;
    Ok((open, ended))
}

/// Last final and last log entry of a session, from the leaders.
async fn surroundings(
    chain: &Chain,
    log: &AudioLog,
    id: &StreamId,
) -> Result<(Option<ChainMark>, Option<(u64, bool)>), ServerError> {
    let mark = match chain.last(Kind::Session, id).await {
        Ok(stored) => stored.map(|s| ChainMark::from(&s.value)),
        Err(ChainError::Server(error)) => return Err(error),
        Err(error) => {
            // Somebody else writes there; the session goes on without that knowledge, its worker meets the same wall.
            tracing::error!(session = %id, error = %error, "last final cannot be read");
            None
        }
    };
    let last = match log.last(id).await {
        Ok(entry) => entry.map(|e| (e.seq, !e.payload.is_empty())),
        Err(LogError::Server(error)) => return Err(error),
        Err(error) => {
            tracing::error!(session = %id, error = %error, "last log entry cannot be read");
            None
        }
    };
    Ok((mark, last))
}

/// Key, last final and last entry of one session.
pub(super) async fn load(
    records: &Records<SessionRecord>,
    chain: &Chain,
    log: &AudioLog,
    id: &StreamId,
) -> Result<Loaded, KvError> {
    let (record, around) = tokio::join!(records.get(id.as_str()), surroundings(chain, log, id));
    let (mark, last) = around.map_err(KvError::Server)?;
    let record = match record {
        Ok(found) => found.map(|v| (v.value, v.revision)),
        Err(error @ KvError::Malformed { revision, .. }) => {
            // Nobody can go on from it. Without it the session goes on from log and chain, as if the key were gone; and
            // once it is gone, it can be written again.
            tracing::error!(session = %id, error = %describe(&error), "unreadable key of a session removed");
            records.delete(id.as_str(), Some(revision)).await?;
            None
        }
        Err(error) => return Err(error),
    };
    Ok(Loaded { record, chain: mark, last })
}

pub(super) async fn save_cursor(cursors: &Records<Cursor>, seq: u64) {
    if let Err(error) = cursors.put(CURSOR_KEY, &Cursor { seq }).await {
        // The next save carries more; a successor only reads more again.
        tracing::warn!(error = %error, seq, "log cursor not saved");
    }
}
