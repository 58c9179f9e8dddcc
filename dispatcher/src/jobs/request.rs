//! From what a stranger sends to a record, and back: is it the same request again?

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;
use voxfleet_schema::{
    audio::AudioFormat,
    codec::CodecError,
    failure::{Failure, FailureClass},
    id::{GpuId, IdError, Kind, StreamId},
    job::{
        AudioUrl, DEFAULT_RESULT_TTL_S, Inline, JobPart, JobProgress, JobRecord, JobRequest, JobState, JobSummary,
        RequestError, WorkItem, audio_key,
    },
    session::{Priority, SessionOptions},
    source::SourceState,
    trace::TraceContext,
    transcript::{AudioRange, Final, Resume, Timings, VadKind},
};

use crate::moment::Moment;

/// Longest part of a parser's message that goes back to its sender.
const MAX_WHY: usize = 200;

/// A recording on its way into the object store. What it pays for its memory is given back when it is dropped.
#[derive(Debug)]
pub struct Recording {
    pub bytes: Bytes,
    pub paid: Option<OwnedSemaphorePermit>,
}

/// A request that has been decoded and checked.
#[derive(Debug)]
pub struct Submission {
    pub id: StreamId,
    pub audio: String,
    pub data_sha256: Option<String>,
    pub recording: Option<Recording>,
    pub name: Option<String>,
    pub options: SessionOptions,
    pub result_ttl_s: u32,
    pub part: Option<JobPart>,
    /// The trace that its sender wants it to be part of. Asked again it may be another one, and is the same request.
    pub trace: Option<TraceContext>,
}

/// Where a request stands in for what its body leaves out: a publish, whose subject names id and priority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub id: StreamId,
    pub priority: Priority,
}

impl Submission {
    /// Decodes and checks a request. Takes time in proportion to its recording: not for the loop that decides.
    pub fn read(
        body: &[u8],
        content_type: Option<&str>,
        subject: Option<&Subject>,
        paid: Option<OwnedSemaphorePermit>,
    ) -> Result<Self, Failure> {
        let bad = |why: String| Failure::new(FailureClass::BadRequest, masked_text(&why));
        let mut request = JobRequest::decode(body, content_type).map_err(|error| match error {
            CodecError::TooLarge { .. } => Failure::new(FailureClass::TooLarge, error.to_string()),
            error => bad(explain(&error)),
        })?;
        if let Some(subject) = subject {
            if request.job.as_ref().is_some_and(|job| *job != subject.id) {
                return Err(bad("the body names another job than the subject".to_owned()));
            }
            request.job = Some(subject.id.clone());
            request.options.priority = subject.priority;
        }
        request.validate().map_err(|error| match error {
            RequestError::TooLarge { .. } => Failure::new(FailureClass::TooLarge, error.to_string()),
            error => bad(error.to_string()),
        })?;
        let id = request.job.ok_or_else(|| bad(RequestError::NoId.to_string()))?;
        let data_sha256 = request.data.as_ref().map(|Inline(data)| hex(&Sha256::digest(data)));
        let audio = match (request.audio, &request.data) {
            (Some(url), _) => url,
            (None, _) => AudioUrl::object(&audio_key(&id)),
        };
        Ok(Self {
            recording: request.data.map(|Inline(bytes)| Recording { bytes, paid }),
            id,
            audio,
            data_sha256,
            name: request.name,
            options: request.options,
            result_ttl_s: request.result_ttl_s.unwrap_or(DEFAULT_RESULT_TTL_S),
            part: request.part,
            trace: None,
        })
    }

    /// The same request again.
    pub fn same_as(&self, record: &JobRecord) -> bool {
        self.audio == record.audio
            && self.data_sha256 == record.data_sha256
            && self.name == record.name
            && self.options == record.options
            && self.result_ttl_s == record.result_ttl_s
            && self.part == record.part
    }

    /// Its record, queued.
    pub fn record(&self, now: Moment) -> JobRecord {
        JobRecord {
            id: self.id.clone(),
            state: JobState::Queued,
            audio: self.audio.clone(),
            data_sha256: self.data_sha256.clone(),
            name: self.name.clone(),
            options: self.options.clone(),
            result_ttl_s: self.result_ttl_s,
            epoch: 0,
            attempts: 0,
            worker: None,
            submitted_ms: now.unix_ms,
            changed_ms: now.unix_ms,
            started_ms: None,
            ended_ms: None,
            not_before_ms: None,
            error: None,
            result: None,
            duration_ms: None,
            expired: false,
            suspect: false,
            deaths: 0,
            instead: None,
            engine: None,
            part: self.part.clone(),
            traceparent: None,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A parser's error with its cause, cut to a length that may go back.
pub fn explain(error: &CodecError) -> String {
    let mut why = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        why = format!("{why}: {source}");
    }
    // Parsers quote what they have read.
    masked_text(&why).chars().take(MAX_WHY).collect()
}

/// A message without what may be a signature.
fn masked_text(text: &str) -> String {
    String::from_utf8_lossy(&masked(text.as_bytes())).into_owned()
}

/// What is wrong with a name in a subject.
pub fn explain_id(error: &IdError) -> String {
    format!("job name: {error}")
}

/// What its worker is given; made again from the record whenever it was lost.
pub fn work_item(record: &JobRecord) -> WorkItem {
    let mut options = record.options.clone();
    let mut model_asked = None;
    if let Some(instead) = record.instead.as_ref().filter(|instead| instead.model.is_some()) {
        (options.model, model_asked) = (instead.model.clone(), instead.asked.clone());
    }
    WorkItem {
        job: record.id.clone(),
        epoch: record.epoch,
        attempt: record.attempts.max(1),
        audio: record.audio.clone(),
        name: record.name.clone(),
        options,
        model_asked,
        submitted_ms: record.submitted_ms,
        assigned_ms: record.changed_ms,
        suspect: record.suspect,
        part: record.part.clone(),
        traceparent: record.traceparent,
    }
}

/// A record as it is told to others: its URL may carry a signature, which is for the worker alone.
pub fn told(record: &JobRecord) -> JobRecord {
    JobRecord { audio: AudioUrl::redacted(&record.audio).to_owned(), ..record.clone() }
}

/// What may be kept of a request that could not be read: passwords and queries of URLs, which may be signatures, are written
/// over with stars. Lengths stay, so that MessagePack stays readable too.
pub fn masked(body: &[u8]) -> Vec<u8> {
    let mut masked = body.to_vec();
    let ends = |b: &u8| b.is_ascii_whitespace() || b.is_ascii_control() || !b.is_ascii() || b"\"'<>`".contains(b);
    for colon in (0..body.len()).filter(|at| body[*at] == b':') {
        // JSON may write a slash in several ways.
        let slash = |from: usize| {
            let ways = [&b"/"[..], b"\\/", b"\\u002f", b"\\u002F"];
            ways.into_iter().find(|way| body[from..].starts_with(way)).map(|way| from + way.len())
        };
        let Some(from) = slash(colon + 1).and_then(slash) else {
            continue;
        };
        let to = body[from..].iter().position(ends).map_or(body.len(), |n| from + n);
        let url = &mut masked[from..to];
        let authority = url.iter().position(|b| b"/\\?#".contains(b)).unwrap_or(url.len());
        if let Some(at) = url[..authority].iter().rposition(|b| *b == b'@') {
            url[..at].fill(b'*');
        }
        if let Some(query) = url.iter().position(|b| b"?#".contains(b)) {
            url[query + 1..].fill(b'*');
        }
    }
    masked
}

/// One line of `job.list`.
pub fn summary(record: JobRecord, progress: Option<JobProgress>) -> JobSummary {
    JobSummary {
        job: record.id,
        state: record.state,
        name: record.name,
        priority: record.options.priority,
        submitted_ms: record.submitted_ms,
        ended_ms: record.ended_ms,
        duration_ms: record.duration_ms,
        gpu_id: record.worker.map(|worker| worker.gpu_id),
        progress,
        error: record.error,
        ahead: None,
    }
}

/// The end final of a job that failed or was cancelled: it covers no sample and carries the error.
pub fn closing_final(record: &JobRecord, last: Option<&Final>, final_id: String) -> Result<Final, IdError> {
    let nobody = || "none".to_owned();
    let to_sample = last.map_or(0, |f| f.to_sample);
    let to_seq = last.map_or(0, |f| f.audio.to_seq);
    let resume = Resume {
        seq: 1,
        at_sample: 0,
        at_frame: 0,
        format: AudioFormat::default(),
        format_sample: 0,
        producers: SourceState::default(),
        language: None,
    };
    Ok(Final {
        kind: Kind::Job,
        id: record.id.clone(),
        index: last.map_or(0, |f| f.index + 1),
        final_id,
        epoch: record.epoch.max(last.map_or(0, |f| f.epoch)),
        gpu_id: last.map_or_else(|| GpuId::new("none"), |f| Ok(f.gpu_id.clone()))?,
        model: last.map_or_else(nobody, |f| f.model.clone()),
        device: nobody(),
        engine: nobody(),
        vad: last.map_or(VadKind::Unknown, |f| f.vad),
        from_sample: to_sample,
        to_sample,
        audio: AudioRange { from_seq: to_seq, to_seq },
        resume: last.map_or(resume, |f| f.resume.clone()),
        checkpoint_seq: last.and_then(|f| f.checkpoint_seq),
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
        words_omitted: false,
        speech_final: true,
        end: true,
        lost: None,
        error: record.error.clone(),
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
    })
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::device::Instead;

    use super::*;
    use crate::testing::{end_final, id, job};

    fn read(body: &str, subject: Option<&Subject>) -> Result<Submission, Failure> {
        Submission::read(body.as_bytes(), None, subject, None)
    }

    #[test]
    fn a_subject_stands_for_id_and_priority() {
        let subject = Subject { id: id("call"), priority: Priority::High };
        let submission = read(r#"{"data":"aGk=","options":{"priority":"low"}}"#, Some(&subject)).expect("good");
        assert_eq!((&submission.id, submission.options.priority), (&id("call"), Priority::High));
        assert_eq!(submission.audio, "object://asr_media/audio/call");
        let sha = "8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4";
        assert_eq!(submission.data_sha256.as_deref(), Some(sha));
        assert!(read(r#"{"job":"call","data":"aGk="}"#, Some(&subject)).is_ok());
        let class = |body: &str, subject| read(body, subject).expect_err("bad").class;
        assert_eq!(class(r#"{"job":"other","data":"aGk="}"#, Some(&subject)), FailureClass::BadRequest);
        assert_eq!(class(r#"{"data":"aGk="}"#, None), FailureClass::BadRequest);
        assert_eq!(class("{", Some(&subject)), FailureClass::BadRequest);
        assert_eq!(class(&format!(r#"{{"audio":"{}"}}"#, "x".repeat(3 << 20)), None), FailureClass::TooLarge);
    }

    #[test]
    fn a_repeated_request_is_told_from_another() {
        let first = read(r#"{"job":"a","data":"aGk="}"#, None).expect("good");
        let now = Moment { mono: std::time::Duration::ZERO, unix_ms: 7 };
        let record = first.record(now);
        assert!(first.same_as(&record));
        for other in [
            r#"{"job":"a","data":"aG8="}"#,
            r#"{"job":"a","audio":"object://asr_media/audio/a"}"#,
            r#"{"job":"a","data":"aGk=","name":"x"}"#,
            r#"{"job":"a","data":"aGk=","options":{"language":"en"}}"#,
            r#"{"job":"a","data":"aGk=","result_ttl_s":60}"#,
        ] {
            assert!(!read(other, None).expect("good").same_as(&record), "{other}");
        }
    }

    #[test]
    fn a_chain_is_closed_where_it_stands() {
        let mut record = job("a");
        record.epoch = 4;
        record.error = Some(Failure::new(FailureClass::Cancelled, "cancelled"));
        let first = closing_final(&record, None, "f".to_owned()).expect("a final");
        assert_eq!((first.kind, first.index, first.epoch, first.to_sample, first.end), (Kind::Job, 0, 4, 0, true));
        assert_eq!(first.error, record.error);
        let next = closing_final(&record, Some(&end_final("a", 2, 6, 9)), "f".to_owned()).expect("a final");
        assert_eq!((next.index, next.epoch, next.from_sample, next.to_sample), (3, 6, 16_000, 16_000));
        assert_eq!(next.audio, AudioRange { from_seq: 9, to_seq: 9 });
    }

    #[test]
    fn what_is_kept_of_a_refused_request_has_no_secret() {
        for (body, kept) in [
            (r#"{"audio":"https://u:p@h/a?s=1#t","foo":1}"#, r#"{"audio":"https://***@h/a?*****","foo":1}"#),
            (r#"{"audio":"https:\/\/h\/a?s=1","foo":1}"#, r#"{"audio":"https:\/\/h\/a?***","foo":1}"#),
            (r#"{"audio":"https://h/p@1.wav"} why? #1 s3://b/k"#, r#"{"audio":"https://h/p@1.wav"} why? #1 s3://b/k"#),
            (r#"{"audio":"https:\u002f\u002Fh/a?s=1"}"#, r#"{"audio":"https:\u002f\u002Fh/a?***"}"#),
            ("://?", "://?"),
            ("a:", "a:"),
        ] {
            assert_eq!(String::from_utf8_lossy(&masked(body.as_bytes())), kept);
        }
        let packed = b"\x81\xa5audio\xb1https://h/a?s=123\xa3foo";
        assert_eq!(masked(packed), b"\x81\xa5audio\xb1https://h/a?*****\xa3foo");
    }

    #[test]
    fn nor_has_what_is_said_of_it() {
        for body in [
            r#""https://h/a?token=SECRET""#,
            r#"{"options":"https://u:SECRET@h/a"}"#,
            r#"{"https://h/a?token=SECRET":1}"#,
            r#"{"job":"a","audio":"ftp://u:SECRET@h/a?token=SECRET"}"#,
            r#"{"job":"https://h/a?token=SECRET","audio":"https://h/a"}"#,
        ] {
            let failure = read(body, None).expect_err(body);
            assert_eq!(failure.class, FailureClass::BadRequest);
            assert!(!failure.message.contains("SECRET"), "{}", failure.message);
        }
    }

    #[test]
    fn what_is_told_of_a_record_has_no_signature() {
        let mut record = job("a");
        record.audio = "https://h.example/a.wav?X-Amz-Signature=s#t".to_owned();
        assert_eq!(told(&record), JobRecord { audio: "https://h.example/a.wav".to_owned(), ..record.clone() });
        assert_eq!(work_item(&record).audio, record.audio, "its worker needs all of it");
    }

    #[test]
    fn a_work_item_is_made_from_the_record_alone() {
        let mut record = job("a");
        (record.epoch, record.attempts) = (3, 2);
        let instead = Instead {
            asked: Some("small".to_owned()),
            model: Some("tiny".to_owned()),
            cpu: false,
            class: FailureClass::ModelMissing,
        };
        let item = work_item(&JobRecord { instead: Some(instead.clone()), ..record.clone() });
        assert_eq!((item.epoch, item.attempt), (3, 2));
        assert_eq!((item.options.model.as_deref(), item.model_asked.as_deref()), (Some("tiny"), Some("small")));
        let on_cpu = Instead { model: None, cpu: true, ..instead };
        let item = work_item(&JobRecord { instead: Some(on_cpu), ..record.clone() });
        assert_eq!((&item.options, item.model_asked), (&record.options, None));
        assert_eq!(work_item(&record).options, record.options);
    }
}
