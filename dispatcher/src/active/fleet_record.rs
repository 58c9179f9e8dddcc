//! A worker's key in `asr_fleet`: its heartbeat for people and late joiners, and the verdict once it is dead.

use serde::{Deserialize, Serialize};
use voxfleet_nats::kv::{KvError, Records};
use voxfleet_schema::fleet::Heartbeat;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct FleetRecord {
    pub(super) heartbeat: Heartbeat,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) verdict: Option<Verdict>,
}

/// This incarnation is dead, whatever it says later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Verdict {
    /// Unix time in ms.
    pub(super) at_ms: u64,
    /// The dispatcher that decided.
    pub(super) by: String,
}

/// Writes the heartbeat unless a verdict stands there; true = it stands.
pub(super) async fn admit(records: &Records<FleetRecord>, heartbeat: &Heartbeat) -> Result<bool, KvError> {
    write(records, heartbeat, None).await
}

/// Writes the verdict, once.
pub(super) async fn condemn(
    records: &Records<FleetRecord>,
    heartbeat: &Heartbeat,
    verdict: Verdict,
) -> Result<(), KvError> {
    write(records, heartbeat, Some(verdict)).await.map(|_| ())
}

async fn write(
    records: &Records<FleetRecord>,
    heartbeat: &Heartbeat,
    verdict: Option<Verdict>,
) -> Result<bool, KvError> {
    let key = heartbeat.worker().to_string();
    let record = FleetRecord { heartbeat: heartbeat.clone(), verdict };
    let found = records.get(&key).await?;
    if found.as_ref().is_some_and(|v| v.value.verdict.is_some()) {
        return Ok(true);
    }
    match found {
        Some(found) => records.update(&key, &record, found.revision).await?,
        None => records.create(&key, &record).await?,
    };
    Ok(false)
}
