//! What `ASR_DEAD` keeps, on `asr.v1.dead.<kind>.<id>`, of what could not be done: why, whose hands it was in, and enough to
//! try again.

use serde::{Deserialize, Serialize};

use crate::{
    failure::Failure,
    id::{GpuId, Incarnation, Kind, StreamId},
    job::{Inline, JobRecord},
    nought,
    transcript::AudioRange,
};

/// One dead letter. JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    pub kind: Kind,
    pub id: StreamId,
    pub error: Failure,
    /// Unix time in ms.
    pub at_ms: u64,
    #[serde(default)]
    pub origin: Origin,
    /// Tries it had.
    #[serde(default, skip_serializing_if = "nought")]
    pub attempts: u32,
    /// Of a session: the log entries of the window that was set aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio: Option<AudioRange>,
    /// Of a job: its record. Passwords and queries of its URL are left out, as everywhere but in its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<JobRecord>,
    /// Of a published job that was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RefusedRequest>,
}

/// Who had it last, and who wrote the letter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_id: Option<GpuId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// None when a worker wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatcher: Option<String>,
}

/// A message on `asr.v1.jobs.>` that is no job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedRequest {
    /// Sequence in `ASR_JOBS`.
    pub seq: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    pub body_bytes: u64,
    /// Its first 64 KiB without passwords and queries of URLs, as text or else as base64: its sender's own words, to see what
    /// was wrong with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<Inline>,
}
