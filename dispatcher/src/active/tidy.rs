//! What is left lying about: objects and keys that nobody will ask for. It only takes room, so it is looked for seldom.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats,
    dead::DeadLetters,
    kv::{Bucket, KvError, Records},
    media::Media,
};
use voxfleet_schema::{
    id::Kind,
    job::{JobRecord, job_of_media},
    session::{SessionRecord, SessionState},
};

use super::{
    Input,
    effects::{describe, unix_ms},
    fleet_record::FleetRecord,
};
use crate::jobs::decide;

/// How often.
const TIDY_EVERY: Duration = Duration::from_secs(3_600);
/// And first this long after a start, when there is less to do: dispatchers that are restarted every hour tidy too.
const TIDY_FIRST: Duration = Duration::from_secs(300);
/// Pieces of objects that were never finished.
const UNFINISHED: Duration = Duration::from_secs(3_600);
/// Keys outlive the chain by this long, so that a key never goes before the finals it explains.
const KEY_OUTLIVES_MS: u64 = 3_600_000;
/// A worker's key stays for this long after its verdict, or after its last heartbeat was written there.
const FLEET_KEY_MS: u64 = 86_400_000;
/// Keys removed before others get a turn at the server.
const AT_ONCE: usize = 100;
const BREATH: Duration = Duration::from_millis(100);

/// Removes keys of sessions whose transcripts are gone, and of workers that have been gone for a day; and tells which
/// sessions are open.
pub(super) async fn keys(
    nats: Nats,
    transcript_s: u64,
    inputs: mpsc::Sender<Input>,
    stop: CancellationToken,
) -> &'static str {
    let tidying = async {
        let mut pause = TIDY_FIRST;
        loop {
            tokio::time::sleep(pause).await;
            pause = TIDY_EVERY;
            let mut open = Vec::new();
            let sessions = purge(&nats, Bucket::Sessions, |record: &SessionRecord, now_ms| {
                if record.state != SessionState::Ended {
                    open.push(record.id.clone());
                }
                session_is_over(record, now_ms, transcript_s)
            });
            match sessions.await {
                Ok(removed) => tracing::info!(removed, "keys of sessions tidied"),
                Err(error) => tracing::warn!(error, "keys of sessions not tidied"),
            }
            if inputs.send(Input::OpenKeys(open)).await.is_err() {
                return;
            }
            match purge(&nats, Bucket::Fleet, worker_is_over).await {
                Ok(removed) => tracing::info!(removed, "keys of workers tidied"),
                Err(error) => tracing::warn!(error, "keys of workers not tidied"),
            }
        }
    };
    stop.run_until_cancelled(tidying).await;
    "tidy keys"
}

/// Removes each key that is over, unless it is written meanwhile.
async fn purge<T: serde::Serialize + serde::de::DeserializeOwned>(
    nats: &Nats,
    bucket: Bucket,
    mut over: impl FnMut(&T, u64) -> bool,
) -> Result<usize, String> {
    let records: Records<T> = Records::new(nats, bucket);
    let now_ms = unix_ms();
    let all = records.all().await.map_err(|e| describe(&e))?;
    let due: Vec<(String, u64)> =
        all.into_iter().filter(|(_, v)| over(&v.value, now_ms)).map(|(key, v)| (key, v.revision)).collect();
    for (n, (key, revision)) in due.iter().enumerate() {
        records.purge(key, *revision).await.map_err(|e| describe(&e))?;
        if n % AT_ONCE == AT_ONCE - 1 {
            tokio::time::sleep(BREATH).await;
        }
    }
    Ok(due.len())
}

fn session_is_over(record: &SessionRecord, now_ms: u64, transcript_s: u64) -> bool {
    let keep_ms = transcript_s.saturating_mul(1_000).saturating_add(KEY_OUTLIVES_MS);
    record.state == SessionState::Ended && record.changed_ms.saturating_add(keep_ms) < now_ms
}

fn worker_is_over(record: &FleetRecord, now_ms: u64) -> bool {
    // Records of older dispatchers do not say when they were written; their workers do, by their own clocks.
    let heard_ms = record.heartbeat.as_ref().map_or(0, |h| h.sent_ms);
    let at_ms = record.verdict.as_ref().map_or(record.at_ms.max(heard_ms), |v| v.at_ms);
    at_ms.saturating_add(FLEET_KEY_MS) < now_ms
}

/// Removes objects of jobs that nobody will ask for: of requests that never became jobs, and of workers that lost a race.
pub(super) async fn media(nats: Nats, keep_s: u64, stop: CancellationToken) -> &'static str {
    let listen = async {
        let mut pause = TIDY_FIRST;
        loop {
            tokio::time::sleep(pause).await;
            pause = TIDY_EVERY;
            if let Err(error) = tidy_media(&nats, keep_s).await {
                tracing::warn!(error, "object store not tidied");
            }
        }
    };
    stop.run_until_cancelled(listen).await;
    "tidy media"
}

async fn tidy_media(nats: &Nats, keep_s: u64) -> Result<(), String> {
    let (media, letters) = (Media::new(nats), DeadLetters::new(nats));
    let records = Records::<JobRecord>::new(nats, Bucket::Jobs);
    let before_ms = unix_ms().saturating_sub(keep_s * 1_000);
    let mut removed = 0u64;
    for object in media.list().await.map_err(|e| describe(&e))? {
        // A recording may be put long before its job is submitted.
        let Some(id) = job_of_media(&object.key).filter(|_| object.modified_ms < before_ms) else {
            continue;
        };
        let record = match records.get(id.as_str()).await {
            Ok(found) => found.map(|v| v.value),
            // Somebody knows what it is.
            Err(KvError::Malformed { .. }) => continue,
            Err(error) => return Err(describe(&error)),
        };
        if !decide::orphan(&object.key, record.as_ref()) {
            continue;
        }
        if decide::may_be_needed(&object.key, record.as_ref())
            && letters.any_of(Kind::Job, &id).await.map_err(|e| describe(&e))?
        {
            continue;
        }
        if media.delete(&object.key).await.map_err(|e| describe(&e))? {
            removed += 1;
        }
    }
    let swept = media.sweep(UNFINISHED).await.map_err(|e| describe(&e))?;
    tracing::info!(removed, chunks = swept.chunks, "object store tidied");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        active::fleet_record::Verdict,
        testing::{beat, session},
    };

    const HOUR_MS: u64 = 3_600_000;

    #[test]
    fn keys_of_ended_sessions_outlive_their_finals_and_open_ones_everything() {
        let record = SessionRecord {
            state: SessionState::Ended,
            epoch: 1,
            changed_ms: 1_000,
            ended_seq: Some(1),
            ..session("s")
        };
        assert!(!session_is_over(&record, 2 * HOUR_MS + 1_000, 3_600));
        assert!(session_is_over(&record, 2 * HOUR_MS + 1_001, 3_600));
        let open = SessionRecord { state: SessionState::Waiting, ..record };
        assert!(!session_is_over(&open, u64::MAX, 3_600));
    }

    #[test]
    fn keys_of_workers_go_a_day_after_the_verdict_or_the_last_heartbeat() {
        let day = 24 * HOUR_MS;
        let mut record =
            FleetRecord { heartbeat: Some(beat("g", "i")), verdict: None, at_ms: 5_000, drain_until_ms: None };
        assert!(!worker_is_over(&record, day + 5_000) && worker_is_over(&record, day + 5_001));
        record.verdict = Some(Verdict { at_ms: 9_000, by: "d".to_owned() });
        assert!(!worker_is_over(&record, day + 9_000) && worker_is_over(&record, day + 9_001));
        let stranger = FleetRecord { heartbeat: None, ..record };
        assert!(worker_is_over(&stranger, day + 9_001), "one that nobody has heard");
    }
}
