//! A worker's key in `asr_fleet`: its heartbeat for people and late joiners, and the verdict once it is dead.
//!
//! A verdict is fenced by the revision that its dispatcher wrote last: one that was stopped after it had decided cannot
//! condemn a worker that its successor has admitted since. A key with another revision that holds no later heartbeat than
//! the one the verdict rests on was not written by anybody who knows better: a write of its own whose answer was lost.

use serde::{Deserialize, Serialize};
use voxfleet_nats::{
    Nats,
    kv::{Bucket, KvError, Records},
};
use voxfleet_schema::{fleet::Heartbeat, id::WorkerName};

use super::effects::unix_ms;
use crate::core::{Admission, Burial, NoteError, Recall};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FleetRecord {
    /// None of one that no dispatcher has heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) heartbeat: Option<Heartbeat>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) verdict: Option<Verdict>,
    /// Unix time in ms of this writing, by the dispatcher's clock.
    #[serde(default)]
    pub(super) at_ms: u64,
    /// It was asked to hand over and be gone by this Unix time in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) drain_until_ms: Option<u64>,
}

/// This incarnation is dead, whatever it says later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Verdict {
    /// Unix time in ms.
    pub(super) at_ms: u64,
    /// The dispatcher that decided.
    pub(super) by: String,
}

/// What one who is dead said last, and when that was decided, in Unix ms. None: nothing is kept of him.
pub(crate) async fn last_heard(nats: &Nats, worker: &WorkerName) -> Result<Option<(Heartbeat, u64)>, KvError> {
    let record = Records::<FleetRecord>::new(nats, Bucket::Fleet).get(&worker.to_string()).await?;
    Ok(record.and_then(|found| Some((found.value.heartbeat?, found.value.at_ms))))
}

/// Writes the heartbeat unless a verdict stands there.
pub(super) async fn admit(records: &Records<FleetRecord>, heartbeat: &Heartbeat) -> Result<Admission, KvError> {
    let key = heartbeat.worker().to_string();
    let found = records.get(&key).await?;
    if found.as_ref().is_some_and(|v| v.value.verdict.is_some()) {
        return Ok(Admission::Dead);
    }
    let drain_until_ms = found.as_ref().and_then(|v| v.value.drain_until_ms);
    let record = FleetRecord { heartbeat: Some(heartbeat.clone()), verdict: None, at_ms: unix_ms(), drain_until_ms };
    let revision = match found {
        Some(found) => records.update(&key, &record, found.revision).await?,
        None => records.create(&key, &record).await?,
    };
    Ok(Admission::Ready { revision, drain_until_ms })
}

/// Writes the last heartbeat over what this dispatcher wrote before.
pub(super) async fn note(
    records: &Records<FleetRecord>,
    heartbeat: Heartbeat,
    revision: u64,
    drain_until_ms: Option<u64>,
) -> Result<u64, NoteError> {
    let key = heartbeat.worker().to_string();
    let record = FleetRecord { heartbeat: Some(heartbeat), verdict: None, at_ms: unix_ms(), drain_until_ms };
    records.update(&key, &record, revision).await.map_err(|error| match error {
        KvError::Conflict { .. } => NoteError::Conflict,
        other => NoteError::Failed(super::effects::describe(&other)),
    })
}

/// Writes the verdict, once: over `revision`, or, if none is known, over what is found; and over whatever holds no later
/// heartbeat than `heartbeat`.
pub(super) async fn condemn(
    records: &Records<FleetRecord>,
    worker: &WorkerName,
    heartbeat: Option<Heartbeat>,
    revision: Option<u64>,
    recall: &Recall,
    by: &str,
) -> Result<Burial, KvError> {
    let key = worker.to_string();
    let found = records.get(&key).await?;
    if found.as_ref().is_some_and(|v| v.value.verdict.is_some()) {
        return Ok(Burial::Stood);
    }
    let over = fence(found.as_ref().map(|v| (v.revision, v.value.heartbeat.as_ref())), heartbeat.as_ref(), revision);
    let (at_ms, by) = (unix_ms(), by.to_owned());
    let heartbeat = heartbeat.or_else(|| found.as_ref().and_then(|v| v.value.heartbeat.clone()));
    let record = FleetRecord { heartbeat, verdict: Some(Verdict { at_ms, by }), at_ms, drain_until_ms: None };
    if recall.is_set() {
        return Ok(Burial::Recalled);
    }
    let written = match over {
        Some(revision) => records.update(&key, &record, revision).await,
        None => records.create(&key, &record).await,
    };
    match written {
        Ok(_) => Ok(Burial::Written),
        Err(KvError::Conflict { .. }) => Ok(Burial::Fenced),
        Err(error) => Err(error),
    }
}

/// The revision that a verdict is written over; none: there is no key yet. `known` is what its dispatcher wrote last.
fn fence(found: Option<(u64, Option<&Heartbeat>)>, judged: Option<&Heartbeat>, known: Option<u64>) -> Option<u64> {
    let same = |stored: &Heartbeat| judged.is_some_and(|judged| stored.seq <= judged.seq);
    match found {
        Some((revision, stored)) if stored.is_some_and(same) => Some(revision),
        _ => known.or(found.map(|(revision, _)| revision)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::beat;

    #[test]
    fn a_verdict_is_fenced_by_whoever_has_heard_more() {
        let heard = |seq| Heartbeat { seq, ..beat("g", "i") };
        let (older, same, later) = (heard(6), heard(7), heard(8));
        let judged = Some(&same);
        assert_eq!(fence(Some((5, judged)), judged, Some(5)), Some(5), "as it was written");
        for own in [&same, &older] {
            assert_eq!(fence(Some((6, Some(own))), judged, Some(5)), Some(6), "its answer was lost, or is on its way");
        }
        assert_eq!(fence(Some((6, Some(&later))), judged, Some(5)), Some(5), "a successor heard it: that conflicts");
        assert_eq!(fence(Some((6, None)), judged, Some(5)), Some(5));
        assert_eq!(fence(Some((6, Some(&later))), None, None), Some(6), "of a predecessor, and silent ever since");
        assert_eq!(fence(None, judged, None), None);
        assert_eq!(fence(None, judged, Some(5)), Some(5), "somebody removed it: that conflicts");
    }
}
