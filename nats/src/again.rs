//! A job that failed, submitted again from its dead letter: for the command line, and for the dispatcher's own pages.

use std::time::Duration;

use voxfleet_schema::{
    dead::RefusedRequest,
    id::{Kind, StreamId},
    job::{AudioUrl, Inline, JobRecord, JobRequest, JobState, RequestError, Submitted, audio_key},
};

use crate::{
    Nats, ServerError,
    api::{self, ApiError, Endpoint},
    dead::{DeadLetters, StoredLetter},
    kv::{Bucket, KvError, Records},
    media::{Media, MediaError},
};

/// A dispatcher that takes over does so within seconds, and asks for the same id mean the same.
const SUBMIT: Duration = Duration::from_secs(20);
/// Ids tried for a job that is submitted again.
const IDS: u32 = 100;
const MAX_ID: usize = 64;

/// Why it was not submitted again. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    #[error("there is no dead letter of {0}")]
    NoLetter(StreamId),
    #[error("{0} is a session: its window has its place in the transcript, and cannot be decoded again")]
    Session(StreamId),
    #[error("{job} is a stretch of job {whole}, which does it itself; retry {whole}")]
    Part { job: StreamId, whole: StreamId },
    #[error("there is a job {0} already; choose another id")]
    Taken(StreamId),
    #[error("{IDS} retries of {0} exist already; choose an id")]
    NoId(StreamId),
    /// Nothing that could be asked for again.
    #[error("{0}")]
    NoSource(String),
    #[error("the recording of {0} has expired with it; submit it again from its source")]
    Expired(StreamId),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("job {id}")]
    Api { id: StreamId, source: ApiError },
    #[error(transparent)]
    Records(#[from] KvError),
    #[error(transparent)]
    Media(#[from] MediaError),
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// What was submitted.
#[derive(Debug)]
pub struct Retried {
    pub submitted: Submitted,
    /// Letters that were put away.
    pub dropped: u64,
    /// What whoever asked had better know.
    pub notes: Vec<String>,
}

/// What is asked for again.
#[derive(Debug)]
struct Source {
    request: JobRequest,
    note: Option<&'static str>,
}

/// Submits it under `id`, or under the first free one of its kind; its letters go unless they are to be kept.
pub async fn retry(
    nats: &Nats,
    job: &StreamId,
    id: Option<&StreamId>,
    keep_letters: bool,
) -> Result<Retried, RetryError> {
    let letters = DeadLetters::new(nats);
    let of_job = letters.of(Kind::Job, job).await?;
    if of_job.is_empty() {
        return Err(match letters.of(Kind::Session, job).await?.is_empty() {
            true => RetryError::NoLetter(job.clone()),
            false => RetryError::Session(job.clone()),
        });
    }
    let source = source(record(nats, job).await?, &of_job)?;
    if let Some(part) = &source.request.part {
        return Err(RetryError::Part { job: job.clone(), whole: part.parent.clone() });
    }
    let id = match id {
        // Nothing of a job that is there may be written over, and being given its answer would not be a new try.
        Some(id) if record(nats, id).await?.is_some() => return Err(RetryError::Taken(id.clone())),
        Some(id) => id.clone(),
        None => free_id(nats, job).await?,
    };
    let request = JobRequest { job: Some(id.clone()), ..source.request };
    request.validate()?;
    let submitted = submit(nats, job, &id, request).await?;
    let mut notes: Vec<String> = source.note.map(str::to_owned).into_iter().collect();
    let mut dropped = 0;
    if !keep_letters {
        // By their numbers: one that came meanwhile stays.
        for stored in &of_job {
            match letters.remove(stored.seq).await {
                Ok(there) => dropped += u64::from(there),
                Err(error) => notes.push(format!("letter {} stays: {error}", stored.seq)),
            }
        }
    }
    Ok(Retried { submitted, dropped, notes })
}

async fn record(nats: &Nats, id: &StreamId) -> Result<Option<JobRecord>, KvError> {
    Ok(Records::<JobRecord>::new(nats, Bucket::Jobs).get(id.as_str()).await?.map(|versioned| versioned.value))
}

/// The key has the whole URL; a letter has it without what may be a signature; a request that was refused has what its sender
/// wrote.
fn source(record: Option<JobRecord>, letters: &[StoredLetter]) -> Result<Source, RetryError> {
    if let Some(record) = record.filter(|record| record.state == JobState::Failed) {
        return Ok(Source { request: again(record), note: None });
    }
    let mut why = None;
    for letter in letters.iter().filter_map(|stored| stored.letter.as_ref().ok()) {
        if let Some(record) = &letter.record {
            let signed = record.audio.starts_with("http");
            let note = "its key has expired: the URL is the letter's, where a signature would be missing";
            return Ok(Source { request: again(record.clone()), note: signed.then_some(note) });
        }
        match letter.request.as_ref().map(refused_request) {
            Some(Ok(request)) => return Ok(Source { request, note: None }),
            Some(Err(error)) => why = why.or(Some(error)),
            None => {}
        }
    }
    Err(RetryError::NoSource(why.unwrap_or_else(|| "its letter does not say what was asked for".to_owned())))
}

fn again(record: JobRecord) -> JobRequest {
    JobRequest {
        job: None,
        audio: Some(record.audio),
        data: None,
        name: record.name,
        options: record.options,
        result_ttl_s: Some(record.result_ttl_s),
        part: record.part,
    }
}

pub(crate) fn refused_request(request: &RefusedRequest) -> Result<JobRequest, String> {
    let body: &[u8] = match (&request.body, &request.body_base64) {
        (Some(text), _) => text.as_bytes(),
        (None, Some(Inline(bytes))) => bytes,
        (None, None) => return Err("nothing of the request was kept".to_owned()),
    };
    if body.len() as u64 != request.body_bytes {
        let kept = body.len();
        let all = request.body_bytes;
        return Err(format!("only the first {kept} of its {all} bytes were kept; submit it again from its source"));
    }
    JobRequest::decode(body, request.content_type.as_deref())
        .map_err(|error| format!("it is no job; submit a corrected one: {error}"))
}

/// The first id of its kind that no job has.
async fn free_id(nats: &Nats, job: &StreamId) -> Result<StreamId, RetryError> {
    for n in 1..=IDS {
        if let Some(id) = numbered(job, n).filter(|id| id != job)
            && record(nats, &id).await?.is_none()
        {
            return Ok(id);
        }
    }
    Err(RetryError::NoId(job.clone()))
}

/// `call-17` and `call-17-r1` -> `call-17-r<n>`.
fn numbered(job: &StreamId, n: u32) -> Option<StreamId> {
    let text = job.as_str();
    let digits = |tail: &str| !tail.is_empty() && tail.bytes().all(|b| b.is_ascii_digit());
    let base = text.rsplit_once("-r").filter(|(_, tail)| digits(tail)).map_or(text, |(base, _)| base);
    let tail = format!("-r{n}");
    // Ids are ASCII.
    let base = &base[..base.len().min(MAX_ID - tail.len())];
    StreamId::new(format!("{base}{tail}")).ok()
}

/// A recording that came with the old job goes when that expires: the new one has its own.
async fn submit(nats: &Nats, old: &StreamId, id: &StreamId, mut request: JobRequest) -> Result<Submitted, RetryError> {
    let media = Media::new(nats);
    let copied = request.audio.as_deref() == Some(AudioUrl::object(&audio_key(old)).as_str());
    if copied {
        let Some(recording) = media.get(&audio_key(old)).await? else {
            return Err(RetryError::Expired(old.clone()));
        };
        media.put(&audio_key(id), recording).await?;
        request.audio = Some(AudioUrl::object(&audio_key(id)));
    }
    let error = match api::request(nats, Endpoint::JobSubmit, &request, SUBMIT).await {
        Ok(submitted) => return Ok(submitted),
        Err(error) => error,
    };
    // Where nobody answered it may have been taken, and then its recording is needed.
    if copied
        && matches!(error, ApiError::Refused(_))
        && let Err(error) = media.delete(&audio_key(id)).await
    {
        tracing::warn!(%error, key = audio_key(id), "the copied recording stays behind");
    }
    Err(RetryError::Api { id: id.clone(), source: error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    fn record(state: &str, audio: &str) -> JobRecord {
        serde_json::from_value(json!({
            "id": "call-17", "state": state, "audio": audio, "options": {"language": "de"}, "result_ttl_s": 600,
            "epoch": 2, "attempts": 3, "submitted_ms": 1_000, "changed_ms": 0, "name": "a.wav",
        }))
        .expect("a record")
    }

    fn stored(letter: Value) -> StoredLetter {
        let payload = bytes::Bytes::from(letter.to_string());
        let letter = voxfleet_schema::codec::from_json(&payload);
        StoredLetter { seq: 12, stored_ms: 1_000, kind: Kind::Job, id: id("call-17"), letter, payload }
    }

    fn failed(audio: &str) -> StoredLetter {
        stored(json!({
            "kind": "job", "id": "call-17", "at_ms": 1_000, "attempts": 3,
            "error": {"class": "engine_crash", "message": "the engine died"},
            "origin": {"gpu_id": "gpu-1", "incarnation": "i", "epoch": 2, "dispatcher": "d"},
            "record": record("failed", audio),
        }))
    }

    fn refused(body: &str, body_bytes: usize) -> StoredLetter {
        stored(json!({
            "kind": "job", "id": "call-17", "at_ms": 1_000, "error": {"class": "bad_request", "message": "x"},
            "request": {"seq": 4, "body_bytes": body_bytes, "body": body},
        }))
    }

    #[test]
    fn retries_are_numbered() {
        for (old, n, new) in [("call-17", 1, "call-17-r1"), ("call-17-r1", 2, "call-17-r2"), ("a-r", 1, "a-r-r1")] {
            assert_eq!(numbered(&id(old), n).expect("id").as_str(), new);
        }
        let longest = "x".repeat(64);
        assert_eq!(numbered(&id(&longest), 100).expect("id").as_str().len(), 64);
    }

    #[test]
    fn the_key_has_the_whole_url_and_a_letter_may_lack_its_signature() {
        let letters = [failed("https://h/a.wav")];
        let whole = source(Some(record("failed", "https://h/a.wav?sig=1")), &letters).expect("a source");
        assert_eq!((whole.request.audio.as_deref(), whole.note), (Some("https://h/a.wav?sig=1"), None));
        assert_eq!(whole.request.options.language.as_deref(), Some("de"));
        // A key of a job of that name that did not fail is another job's.
        for record in [None, Some(record("done", "s3://b/other"))] {
            let bare = source(record, &letters).expect("a source");
            assert_eq!(bare.request.audio.as_deref(), Some("https://h/a.wav"));
            assert!(bare.note.is_some_and(|note| note.contains("signature")));
        }
        assert!(source(None, &[failed("s3://b/k")]).is_ok_and(|source| source.note.is_none()));
    }

    #[test]
    fn a_refused_request_is_tried_again_only_where_it_is_one() {
        let body = r#"{"audio":"s3://b/k"}"#;
        assert!(
            source(None, &[refused(body, body.len())]).is_ok_and(|s| s.request.audio.as_deref() == Some("s3://b/k"))
        );
        let cut = source(None, &[refused(body, 100_000)]).expect_err("cut");
        assert!(cut.to_string().contains("only the first"), "{cut:#}");
        let noise = source(None, &[refused("{\"audoi\":1}", 11)]).expect_err("no job");
        assert!(noise.to_string().contains("corrected"), "{noise:#}");
    }
}
