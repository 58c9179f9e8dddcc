//! What happened to a session, a job or the fleet; on `asr.v1.event.<scope>.<id>.<what>`.

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    Session,
    Job,
    Fleet,
    #[serde(other)]
    Unknown,
}

impl Scope {
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Session => "session",
            Scope::Job => "job",
            Scope::Fleet => "fleet",
            Scope::Unknown => "unknown",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Opened,
    /// Given to a worker; `detail` holds every GPU's score or refusal.
    Assigned,
    /// No room now; its audio waits in the log.
    Waiting,
    /// A chunk or request was bad.
    Rejected,
    Moved,
    Released,
    /// Decoding is behind the log.
    Lagging,
    /// Numbers or log entries are missing.
    Gap,
    Reordered,
    Duplicate,
    StaleSource,
    AudioAfterEnd,
    /// Smaller model or CPU.
    Degraded,
    Restored,
    /// The chain was purged under its owner.
    ChainLost,
    Ended,
    Failed,
    Done,
    /// A job was accepted.
    Submitted,
    Cancelled,
    /// A job's result was deleted at the end of its time.
    Expired,
    /// A worker joined, drained, died, was told to renew.
    Joined,
    Draining,
    Dead,
    Renewed,
    /// Silent for too long to be given work, not long enough to be dead.
    Suspect,
    /// It beats, but its engine stands still, dies again and again, or is too hot.
    Unhealthy,
    /// No longer suspect or unhealthy.
    Recovered,
    /// An input that crashed the engine while decoded alone was set aside; `ASR_DEAD` says which.
    Parked,
    /// A stream is over 80 % full.
    StreamFilling,
    #[serde(other)]
    Unknown,
}

impl What {
    pub fn as_str(self) -> &'static str {
        use What::*;
        match self {
            Opened => "opened",
            Assigned => "assigned",
            Waiting => "waiting",
            Rejected => "rejected",
            Moved => "moved",
            Released => "released",
            Lagging => "lagging",
            Gap => "gap",
            Reordered => "reordered",
            Duplicate => "duplicate",
            StaleSource => "stale_source",
            AudioAfterEnd => "audio_after_end",
            Degraded => "degraded",
            Restored => "restored",
            ChainLost => "chain_lost",
            Ended => "ended",
            Failed => "failed",
            Done => "done",
            Submitted => "submitted",
            Cancelled => "cancelled",
            Expired => "expired",
            Joined => "joined",
            Draining => "draining",
            Dead => "dead",
            Renewed => "renewed",
            Suspect => "suspect",
            Unhealthy => "unhealthy",
            Recovered => "recovered",
            Parked => "parked",
            StreamFilling => "stream_filling",
            Unknown => "unknown",
        }
    }
}

/// One event. `detail` is free for people; machines use the fields beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub scope: Scope,
    pub id: String,
    pub what: What,
    /// Unix time in ms.
    pub at_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_id: Option<String>,
    /// The log entry it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub detail: serde_json::Value,
}

impl Event {
    /// The live session that it is about, for logs.
    pub fn session(&self) -> Option<&str> {
        (self.scope == Scope::Session).then_some(self.id.as_str())
    }

    /// The job that it is about, for logs.
    pub fn job(&self) -> Option<&str> {
        (self.scope == Scope::Job).then_some(self.id.as_str())
    }

    pub fn new(scope: Scope, id: impl Into<String>, what: What, at_ms: u64) -> Self {
        Self {
            scope,
            id: id.into(),
            what,
            at_ms,
            epoch: None,
            gpu_id: None,
            seq: None,
            error: None,
            detail: serde_json::Value::Null,
        }
    }
}
