//! File jobs: what a producer asks for, what the dispatcher keeps of it, what a worker is given, and what comes out.
//!
//! A job is a recording with an id. Its transcript is a chain of finals like a session's, on
//! `asr.v1.transcript.job.<job>.final`; the end final of a job that succeeded names its aggregate ([`JobResult`]), that of
//! one that did not carries the error. Positions count in the decoded audio, whose entries number from 1.

mod url;

use std::collections::BTreeMap;

use base64::Engine as _;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    codec::{self, CodecError},
    device::Instead,
    failure::Failure,
    id::{IdError, StreamId, WorkerName},
    session::{SessionOptions, strict_options},
    trace::TraceContext,
    transcript::{Resume, VadKind},
};

pub use url::{AudioUrl, MAX_URL_BYTES, MEDIA_BUCKET, UrlError};

/// Largest recording a request may carry itself, in bytes; as base64 it stays under the server's `max_payload` of our files.
pub const MAX_INLINE_BYTES: usize = 2 * 1024 * 1024;
/// Largest job request: an inline recording as base64 and the rest.
pub const MAX_JOB_REQUEST_BYTES: usize = MAX_INLINE_BYTES / 3 * 4 + 64 * 1024;
/// Longest file name kept for people, in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// How long a result is kept when its request does not say, in s: as long as the transcript itself.
pub const DEFAULT_RESULT_TTL_S: u32 = 86_400;
pub const MAX_RESULT_TTL_S: u32 = 30 * 86_400;

/// A recording inside a request: base64 in JSON, bytes in MessagePack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inline(pub Bytes);

impl Serialize for Inline {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            base64::engine::general_purpose::STANDARD.encode(&self.0).serialize(serializer)
        } else {
            serializer.serialize_bytes(&self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Inline {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(text.trim())
                .map_err(|error| serde::de::Error::custom(format!("data is not base64: {error}")))?;
            Ok(Self(bytes.into()))
        } else {
            Ok(Self(Bytes::deserialize(deserializer)?))
        }
    }
}

/// A request: body of `job.submit`, and of a bare publish to `asr.v1.jobs.<priority>.<job>`, where the subject's id and
/// priority stand for those of the body. Idempotent by id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// Needed by the API; a publish may leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<StreamId>,
    /// Where the recording lies. Either this or `data`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio: Option<String>,
    /// The recording itself, at most 2 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Inline>,
    /// File name for people, and a hint at the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, deserialize_with = "strict_options")]
    pub options: SessionOptions,
    /// How long the result is kept once the job has ended, in s. At most 30 days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result_ttl_s: Option<u32>,
    /// Only this stretch of it: said by the worker that has the whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<JobPart>,
}

/// A stretch of a long recording, given out as a job of its own by the worker that has the whole of it.
///
/// Its chain is that of an ordinary job with three differences. It begins with a mark: a final that covers no sample, which
/// says that somebody has begun. Its positions are those of the whole recording. Its last final has `end`, wherever in the
/// recording that is, and names no aggregate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobPart {
    /// The job it is a part of.
    pub parent: StreamId,
    /// Its place among the parts, from 0.
    pub number: u64,
    /// Behind which final of the whole it begins; none: at the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Box<PartStart>>,
    /// The final that reaches this sample is its last; none: the one that ends the recording.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_sample: Option<u64>,
    /// Which detector found these boundaries: with another one they are none.
    pub vad: VadKind,
    /// Length of the recording's file: one of another length is another recording.
    pub recording_bytes: u64,
}

/// What of a final decides how to go on behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartStart {
    pub to_sample: u64,
    pub to_seq: u64,
    pub resume: Resume,
}

/// Of its whole's name a part's has so many characters.
const WHOSE: usize = 18;

impl JobPart {
    /// Name of a part: people see whose it is; `hash` (24 hex digits) stands for all that shapes its text.
    pub fn id(parent: &StreamId, number: u64, hash: &str) -> Result<StreamId, IdError> {
        StreamId::new(format!("{}{hash}", Self::prefix(parent, number)))
    }

    /// Whether this can be its name: with any other it could go on in the chain of a job that is none of its.
    pub fn is_named(&self, id: &StreamId) -> bool {
        let hash = id.as_str().strip_prefix(&Self::prefix(&self.parent, self.number));
        hash.is_some_and(|hash| hash.len() == 24 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')))
    }

    /// Whether this can be the name of a part of `parent`, whose name it carries whole: with a longer one nobody can tell.
    pub fn names_part_of(parent: &StreamId, id: &StreamId) -> bool {
        let tail = id.as_str().strip_prefix(parent.as_str()).and_then(|tail| tail.strip_prefix('-'));
        let Some((number, hash)) = tail.and_then(|tail| tail.split_once('-')) else { return false };
        let number = number.len() >= 4 && number.bytes().all(|b| b.is_ascii_digit());
        let hash = hash.len() == 24 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        parent.as_str().len() <= WHOSE && number && hash
    }

    fn prefix(parent: &StreamId, number: u64) -> String {
        let whose: String = parent.as_str().chars().take(WHOSE).collect();
        format!("{whose}-{number:04}-")
    }

    /// Sample at which it begins.
    pub fn from_sample(&self) -> u64 {
        self.from.as_ref().map_or(0, |start| start.to_sample)
    }

    /// A final that ends here, or with which the recording ends, is its last.
    pub fn ends_at(&self, to_sample: u64, end: bool) -> bool {
        end || self.until_sample.is_some_and(|until| to_sample >= until)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("a job needs its id")]
    NoId,
    #[error("a job needs its recording: either audio (a URL) or data (base64), not both and not neither")]
    Audio,
    #[error(transparent)]
    Url(#[from] UrlError),
    #[error("data is {len} bytes, the limit is {MAX_INLINE_BYTES}; put it into the object store and name it in audio")]
    TooLarge { len: usize },
    #[error("data is empty")]
    Empty,
    #[error("name is longer than {MAX_NAME_BYTES} bytes or has control characters")]
    Name,
    #[error("result_ttl_s is outside 60 to {MAX_RESULT_TTL_S}")]
    Ttl,
    #[error("part ends before it begins, or does not have the name of a part of its job")]
    Part,
    #[error(transparent)]
    Option(#[from] crate::session::OptionError),
}

impl JobRequest {
    /// Decodes a stranger's request. Without a content type a body that begins like a MessagePack map is one.
    pub fn decode(bytes: &[u8], content_type: Option<&str>) -> Result<Self, CodecError> {
        let looks_msgpack = bytes.first().is_some_and(|b| matches!(b, 0x80..=0x8f | 0xde | 0xdf));
        let content_type = content_type.or(looks_msgpack.then_some(codec::MSGPACK));
        codec::from_request_of(bytes, content_type, MAX_JOB_REQUEST_BYTES)
    }

    pub fn validate(&self) -> Result<(), RequestError> {
        match (&self.audio, &self.data) {
            (Some(url), None) => {
                AudioUrl::parse(url)?;
            }
            (None, Some(Inline(data))) if data.is_empty() => return Err(RequestError::Empty),
            (None, Some(Inline(data))) if data.len() > MAX_INLINE_BYTES => {
                return Err(RequestError::TooLarge { len: data.len() });
            }
            (None, Some(_)) => {}
            _ => return Err(RequestError::Audio),
        }
        if self.name.as_ref().is_some_and(|n| n.len() > MAX_NAME_BYTES || n.chars().any(char::is_control)) {
            return Err(RequestError::Name);
        }
        if self.result_ttl_s.is_some_and(|ttl| !(60..=MAX_RESULT_TTL_S).contains(&ttl)) {
            return Err(RequestError::Ttl);
        }
        if let Some(part) = &self.part
            && (part.until_sample.is_some_and(|until| until <= part.from_sample())
                || self.job.as_ref().is_some_and(|job| !part.is_named(job)))
        {
            return Err(RequestError::Part);
        }
        Ok(self.options.validate()?)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for a free slot.
    Queued,
    /// Given to a worker.
    Assigned,
    /// It failed or was cancelled; the end of its chain is being written.
    Closing,
    Done,
    Failed,
    Cancelled,
    #[serde(other)]
    Unknown,
}

impl JobState {
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Assigned => "assigned",
            JobState::Closing => "closing",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
            JobState::Unknown => "unknown",
        }
    }

    /// Nothing more happens to it but its expiry.
    pub fn has_ended(self) -> bool {
        matches!(self, JobState::Done | JobState::Failed | JobState::Cancelled)
    }
}

/// Value of key `<job>` in `asr_jobs`; written by compare-and-set only. A work item can be made again from it alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: StreamId,
    pub state: JobState,
    /// URL of the recording; an inline one lies at `object://asr_media/audio/<job>`.
    pub audio: String,
    /// SHA-256 of an inline recording, in hex: tells a repeated request from another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub options: SessionOptions,
    pub result_ttl_s: u32,
    /// Grows with each assignment, never below the epoch of the last final.
    pub epoch: u64,
    /// Tries begun, counted before each.
    pub attempts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Unix times in ms.
    pub submitted_ms: u64,
    pub changed_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// Not tried again before this Unix time in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before_ms: Option<u64>,
    /// Why it failed, or why its last try did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// URL of the aggregate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Length of the recording, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Its result and inline recording have been deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
    /// It crashed an engine while decoded alone: it is decoded alone wherever it goes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspect: bool,
    /// Workers that died while they had it. Their deaths are no tries of its own, but there is a limit to coincidence.
    #[serde(default, skip_serializing_if = "crate::nought")]
    pub deaths: u32,
    /// What its worker was given to run in place of what was asked for; told once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<Instead>,
    /// The engine that its finals have named last, or its parts were given to, under a policy by which it keeps that: its last
    /// final may name none. To write that down is no change that `changed_ms` tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// It is a stretch of another job's recording.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<JobPart>,
    /// The trace it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::trace::lenient")]
    pub traceparent: Option<TraceContext>,
}

impl JobRecord {
    /// The job that it is a part of.
    pub fn parent(&self) -> Option<&StreamId> {
        self.part.as_ref().map(|part| &part.parent)
    }
}

/// Key of an inline recording in the object store; it belongs to the job and goes with its result.
pub fn audio_key(job: &StreamId) -> String {
    format!("audio/{job}")
}

/// Of an upload's own part of its key: a UUID.
pub const UPLOAD_CHARS: usize = 32;

/// The same for one of several uploads that may come under one job's name at once: none touches another's. `upload` has
/// [`UPLOAD_CHARS`] hexadecimal digits.
pub fn upload_key(job: &StreamId, upload: &str) -> String {
    format!("audio/{job}/{upload}")
}

/// Key of the recording that came with this job, where it did: whoever named an object of somebody else keeps it.
pub fn own_recording(job: &StreamId, audio: &str) -> Option<String> {
    match AudioUrl::parse(audio) {
        Ok(AudioUrl::Object { key }) if key.starts_with("audio/") && job_of_media(&key).as_ref() == Some(job) => {
            Some(key)
        }
        Ok(_) | Err(_) => None,
    }
}

/// Key of an aggregate. Random in its last part: of two workers that race only one is named by the end final.
pub fn result_key(job: &StreamId, final_id: &str) -> String {
    format!("result/{job}/{final_id}.json")
}

/// The job that an object of the store was written for.
pub fn job_of_media(key: &str) -> Option<StreamId> {
    let mut parts = key.split('/');
    let id = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("audio"), Some(id), None, None) => id,
        (Some("audio"), Some(id), Some(upload), None) if is_upload(upload) => id,
        (Some("result"), Some(id), Some(_), None) => id,
        _ => return None,
    };
    StreamId::new(id).ok()
}

/// As [`upload_key`] is given it; what people put under names of their own has others.
fn is_upload(part: &str) -> bool {
    part.len() == UPLOAD_CHARS && part.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What a worker is given, on `asr.v1.gpu.<gpu_id>.<incarnation>.job.<job>`. MessagePack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkItem {
    pub job: StreamId,
    pub epoch: u64,
    /// From 1.
    pub attempt: u32,
    pub audio: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub options: SessionOptions,
    /// The model that was asked for, where `options` names a smaller one that is to run in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_asked: Option<String>,
    /// Unix times in ms.
    pub submitted_ms: u64,
    pub assigned_ms: u64,
    /// Decode it alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspect: bool,
    /// Only this stretch of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<JobPart>,
    /// The trace it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::trace::lenient")]
    pub traceparent: Option<TraceContext>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStage {
    /// The recording is being brought to the worker.
    Fetching,
    Transcribing,
    /// The aggregate is being written.
    Finishing,
    #[serde(other)]
    Unknown,
}

/// How far a job is: in its partials, in heartbeats and in `job.status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobProgress {
    pub stage: JobStage,
    /// Audio covered by finals, in ms.
    pub done_ms: u64,
    /// Length of the recording where it is known, in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<u64>,
}

impl JobProgress {
    /// 0 to 1; none while the length is not known.
    pub fn fraction(self) -> Option<f64> {
        self.total_ms.filter(|t| *t > 0).map(|total| (self.done_ms as f64 / total as f64).min(1.0))
    }
}

/// Subjects somebody who waits for a job reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSubjects {
    pub finals: String,
    pub partials: String,
    pub events: String,
}

/// Answer to `job.submit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submitted {
    pub job: StreamId,
    pub state: JobState,
    pub subjects: JobSubjects,
}

/// `job.status` and `job.cancel` name a job only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobQuery {
    pub job: StreamId,
}

/// Answer to `job.status`, and to `job.cancel`: how it stands now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobStatus {
    pub record: JobRecord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<JobProgress>,
    /// Jobs before it in the queue; none unless it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead: Option<u32>,
    /// Why it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Each GPU with its score or why it was refused, were it placed now.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub candidates: serde_json::Value,
}

/// `job.list`. Newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobListRequest {
    /// Only those in this state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
    /// 100 unless told, at most 1,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The parts of this job, which no other list has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parts_of: Option<StreamId>,
}

impl JobListRequest {
    /// Whether this job is one of those asked for.
    pub fn wants(&self, record: &JobRecord) -> bool {
        self.state.is_none_or(|state| record.state == state) && record.parent() == self.parts_of.as_ref()
    }
}

/// One line of `job.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSummary {
    pub job: StreamId,
    pub state: JobState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub priority: crate::session::Priority,
    pub submitted_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_id: Option<crate::id::GpuId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<JobProgress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// Jobs before it in the queue; none unless it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead: Option<u32>,
}

/// Answer to `job.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobList {
    pub jobs: Vec<JobSummary>,
    /// How many there are in all, beyond `limit` too.
    pub total: u64,
}

/// A job's aggregate: one JSON object in `asr_media`. Times are seconds since the recording's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    pub full_text: String,
    pub segments: Vec<ResultSegment>,
    /// The same segments with the times of their words.
    pub aligned_segments: Vec<AlignedSegment>,
    /// That of most of the text; none when nothing was said.
    pub language: Option<String>,
    /// Length of the recording, in s.
    pub duration: f64,
    /// Who spoke when, in order of their starts. Empty where speakers were not asked for.
    pub speaker_turns: Vec<SpeakerTurn>,
    /// Where the worker is rented: `vast_ai`, `runpod`, `lambda`, `local`.
    pub provider: String,
    pub performance_metrics: PerformanceMetrics,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultSegment {
    /// Counts over the whole recording, from 0.
    pub id: u64,
    pub start: f64,
    pub end: f64,
    pub text: String,
    pub speaker: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<u16>,
    /// 0 to 1.
    pub confidence: f32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlignedSegment {
    pub start: f64,
    pub end: f64,
    pub text: String,
    pub speaker: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<u16>,
    pub words: Vec<AlignedWord>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AlignedWord {
    pub word: String,
    pub start: f64,
    pub end: f64,
    /// Confidence, 0 to 1.
    pub score: f32,
    pub speaker: Option<String>,
    /// Who spoke over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlapped_by: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeakerTurn {
    pub speaker: String,
    pub start: f64,
    pub end: f64,
}

/// Where a job's time went, in s.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PerformanceMetrics {
    /// From the start on the worker that finished it to the aggregate.
    pub total_duration: f64,
    /// `fetch`, `transcribe` (wall clock), `decode` (inside the model, summed over its states), `diarize` (listening to who
    /// speaks, beside it), `queue` (submitted to
    /// started), in s. Memory in use by the worker on its device, in MB: `transcribe_before_mb`, `transcribe_after_mb`, and
    /// `load_before_mb`, `load_after_mb` of the last model that it loaded.
    pub stages: BTreeMap<String, f64>,
    /// `total_duration` over the recording's length: below 1 is faster than real time.
    pub realtime_factor: f64,
    /// The same the other way round: seconds of audio in each second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times_real_time: Option<f64>,
    /// The worker's price over `times_real_time`, as if it did nothing else meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_per_audio_hour: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_strict_and_either_codec_will_do() {
        let text = br#"{"data":"aGk=","options":{"language":"en"}}"#;
        let request = JobRequest::decode(text, None).expect("JSON");
        assert_eq!(request.data, Some(Inline(Bytes::from_static(b"hi"))));
        assert_eq!(request.validate(), Ok(()));
        let packed = codec::to_msgpack(&request).expect("packs");
        assert_eq!(JobRequest::decode(&packed, None).expect("recognised"), request);
        assert_eq!(JobRequest::decode(&packed, Some(codec::MSGPACK)).expect("told"), request);
        for bad in [
            &b"{"[..],
            br#"{"audoi":"x"}"#,
            br#"{"data":"***"}"#,
            br#"{"audio":"x","options":{"lang":"en"}}"#,
            b"[]",
            b"",
        ] {
            assert!(JobRequest::decode(bad, None).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn a_part_ends_behind_its_beginning_and_has_the_name_of_one() {
        let part = |from: u64, until| {
            let resume = serde_json::json!({
                "seq": 1, "at_sample": 0, "at_frame": 0, "format": "pcm_s16le;rate=16000;channels=1", "format_sample": 0,
            });
            let from = (from > 0).then(|| serde_json::json!({ "to_sample": from, "to_seq": 3, "resume": resume }));
            let part = serde_json::json!({
                "parent": "whole", "number": 2, "from": from, "until_sample": until, "vad": "energy", "recording_bytes": 9,
            });
            serde_json::json!({ "audio": "https://h/a", "part": part })
        };
        let read = |value: serde_json::Value| JobRequest::decode(value.to_string().as_bytes(), None).expect("JSON");
        let good = read(part(100, Some(200)));
        assert_eq!(good.validate(), Ok(()));
        let stretch = good.part.clone().expect("a part");
        assert_eq!(stretch.from_sample(), 100);
        let ends = [(199, false), (200, false), (150, true)].map(|(to, end)| stretch.ends_at(to, end));
        assert_eq!(ends, [false, true, true]);
        assert!(!read(part(0, None)).part.is_some_and(|rest| rest.ends_at(u64::MAX, false)), "to the recording's end");
        assert_eq!(read(part(100, Some(100))).validate(), Err(RequestError::Part));
        let named = |name: &str| JobRequest { job: StreamId::new(name).ok(), ..good.clone() }.validate();
        let hash = "0123456789abcdef01234567";
        let name = JobPart::id(&stretch.parent, stretch.number, hash).expect("a name");
        assert_eq!(named(name.as_str()), Ok(()));
        for other in ["whole", "another", &format!("whole-0003-{hash}"), "whole-0002-0123", &format!("{name}0")] {
            assert_eq!(named(other), Err(RequestError::Part), "{other}");
        }
        let of = |parent: &str, id: &str| {
            JobPart::names_part_of(&StreamId::new(parent).expect("id"), &StreamId::new(id).expect("id"))
        };
        assert!(of("whole", name.as_str()));
        for (parent, other) in [
            ("whole", "whole".to_owned()),
            ("whole", "whole-0002".to_owned()),
            ("who", name.to_string()),
            ("whole-0002", name.to_string()),
            ("whole", format!("whole-2-{hash}")),
            ("whole", format!("whole-0002-{}", hash.to_uppercase())),
            ("whole", format!("{name}0")),
            // Nobody can tell whose: two jobs may begin alike.
            ("a-name-of-nineteen-", format!("a-name-of-nineteen-0001-{hash}")),
        ] {
            assert!(!of(parent, &other), "{parent} {other}");
        }
    }

    #[test]
    fn objects_say_whose_they_are() {
        let job = |text: &str| StreamId::new(text).expect("id");
        assert_eq!(job_of_media(&result_key(&job("j"), "f1")), Some(job("j")));
        assert_eq!(job_of_media(&audio_key(&job("j"))), Some(job("j")));
        let upload = upload_key(&job("j"), &"0f".repeat(16));
        assert_eq!(job_of_media(&upload), Some(job("j")));
        for (audio, own) in [
            (AudioUrl::object(&upload), Some(upload.clone())),
            (AudioUrl::object("audio/j"), Some("audio/j".to_owned())),
            (AudioUrl::object("audio/other"), None),
            (AudioUrl::object("audio/j/talk.wav"), None),
            (AudioUrl::object("result/j/f1.json"), None),
            ("https://h/audio/j".to_owned(), None),
        ] {
            assert_eq!(own_recording(&job("j"), &audio), own, "{audio}");
        }
        for theirs in ["calls/j.wav", "audio/a/b", "audio/a b", "result/j", "audio"] {
            assert_eq!(job_of_media(theirs), None, "{theirs}");
        }
    }

    #[test]
    fn what_a_request_lacks_is_named() {
        let request = |json: &str| JobRequest::decode(json.as_bytes(), None).expect("JSON").validate();
        assert_eq!(request("{}"), Err(RequestError::Audio));
        assert_eq!(request(r#"{"audio":"https://h/a","data":"aGk="}"#), Err(RequestError::Audio));
        assert_eq!(request(r#"{"audio":"a.wav"}"#), Err(RequestError::Url(UrlError::NoScheme)));
        assert_eq!(request(r#"{"data":""}"#), Err(RequestError::Empty));
        assert_eq!(request(r#"{"data":"aGk=","result_ttl_s":1}"#), Err(RequestError::Ttl));
        assert_eq!(request(r#"{"data":"aGk=","name":"a\u0007"}"#), Err(RequestError::Name));
        assert!(matches!(request(r#"{"data":"aGk=","options":{"endpoint_ms":1}}"#), Err(RequestError::Option(_))));
    }
}
