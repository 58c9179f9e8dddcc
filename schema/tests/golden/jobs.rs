//! File jobs, from the request to the result.

use bytes::Bytes;
use voxfleet_schema::{
    audio::AudioFormat,
    codec,
    device::Instead,
    failure::{Failure, FailureClass},
    fleet::{GivenUp, Heartbeat, Held, Slots},
    id::Kind,
    job::*,
    session::{Priority, Reply, SessionOptions},
    source::SourceState,
    transcript::{Resume, VadKind},
};

use crate::{json, msgpack, options, people::heartbeat, stream, strict_json, trace, worker};

fn job_request() -> JobRequest {
    JobRequest {
        job: Some(stream("job-1")),
        audio: Some("https://media.example/call.mp3".into()),
        data: None,
        name: Some("call.mp3".into()),
        options: options(),
        result_ttl_s: Some(3_600),
        part: None,
    }
}

fn inline_request() -> JobRequest {
    JobRequest {
        job: None,
        audio: None,
        data: Some(Inline(Bytes::from_static(&[0, 1, 254, 255]))),
        name: None,
        options: SessionOptions::default(),
        result_ttl_s: None,
        part: None,
    }
}

/// What a worker that has a long recording asks of others.
fn part_request() -> JobRequest {
    let resume = Resume {
        seq: 580,
        at_sample: 1_852_800,
        at_frame: 1_852_800,
        format: AudioFormat::default(),
        format_sample: 0,
        producers: SourceState::default(),
        language: Some("en".into()),
    };
    let from = PartStart { to_sample: 1_862_400, to_seq: 582, resume };
    let part = JobPart {
        parent: stream("job-1"),
        number: 1,
        from: Some(Box::new(from)),
        until_sample: Some(3_841_600),
        vad: VadKind::Energy,
        recording_bytes: 7_680_044,
    };
    JobRequest { job: Some(stream("job-1-0001-0f3c5d7e9a1b2c4d6e8f0a1b")), part: Some(part), ..job_request() }
}

fn progress() -> JobProgress {
    JobProgress { stage: JobStage::Transcribing, done_ms: 15_000, total_ms: Some(60_000) }
}

pub(crate) fn job_record() -> JobRecord {
    JobRecord {
        id: stream("job-1"),
        state: JobState::Assigned,
        audio: "object://asr_media/audio/job-1".into(),
        data_sha256: Some("9f86d081".into()),
        name: Some("call.mp3".into()),
        options: options(),
        result_ttl_s: 3_600,
        epoch: 2,
        attempts: 2,
        worker: Some(worker()),
        submitted_ms: 1_700_000_000_000,
        changed_ms: 1_700_000_000_500,
        started_ms: Some(1_700_000_000_400),
        ended_ms: Some(1_700_000_009_000),
        not_before_ms: Some(1_700_000_001_000),
        error: Some(Failure::new(FailureClass::Unavailable, "the host of the audio does not answer")),
        result: Some("object://asr_media/result/job-1/4d1f0c.json".into()),
        duration_ms: Some(60_000),
        expired: true,
        suspect: true,
        deaths: 2,
        instead: Some(Instead {
            asked: None,
            model: Some("micro.en".into()),
            cpu: false,
            class: FailureClass::ModelMissing,
        }),
        engine: Some("whisper_cpp".into()),
        part: None,
        traceparent: Some(trace()),
    }
}

fn smallest_job_record() -> JobRecord {
    JobRecord {
        state: JobState::Queued,
        data_sha256: None,
        name: None,
        epoch: 0,
        attempts: 0,
        worker: None,
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
        traceparent: None,
        ..job_record()
    }
}

fn work_item() -> WorkItem {
    WorkItem {
        job: stream("job-1"),
        epoch: 2,
        attempt: 2,
        audio: "object://asr_media/audio/job-1".into(),
        name: Some("call.mp3".into()),
        options: options(),
        model_asked: Some("small.en".into()),
        submitted_ms: 1_700_000_000_000,
        assigned_ms: 1_700_000_000_500,
        suspect: true,
        part: None,
        traceparent: Some(trace()),
    }
}

fn job_result() -> JobResult {
    JobResult {
        full_text: "good".into(),
        segments: vec![ResultSegment {
            id: 0,
            start: 1.5,
            end: 2.25,
            text: "good".into(),
            speaker: Some("S1".into()),
            channel: Some(1),
            confidence: 0.75,
        }],
        aligned_segments: vec![AlignedSegment {
            start: 1.5,
            end: 2.25,
            text: "good".into(),
            speaker: Some("S1".into()),
            channel: Some(1),
            words: vec![AlignedWord {
                word: "good".into(),
                start: 1.5,
                end: 2.0,
                score: 0.5,
                speaker: Some("S1".into()),
                overlapped_by: Some("S2".into()),
            }],
        }],
        language: Some("en".into()),
        duration: 60.0,
        speaker_turns: vec![SpeakerTurn { speaker: "S1".into(), start: 1.5, end: 2.25 }],
        provider: "runpod".into(),
        performance_metrics: PerformanceMetrics {
            total_duration: 3.5,
            stages: [("fetch".to_owned(), 0.5), ("transcribe".to_owned(), 3.0)].into(),
            realtime_factor: 0.0625,
            times_real_time: Some(16.0),
            cost_per_audio_hour: Some(0.125),
        },
    }
}

#[test]
fn jobs_are_pinned() {
    strict_json("job_request", &job_request());
    msgpack("job_request", &job_request());
    strict_json("job_request_inline", &inline_request());
    msgpack("job_request_inline", &inline_request());
    msgpack("work_item", &work_item());
    strict_json("job_request_part", &part_request());
    msgpack("work_item_part", &WorkItem { part: part_request().part, ..work_item() });
    json("job_record", &job_record());
    json("job_record_smallest", &smallest_job_record());
    json("job_query", &JobQuery { job: stream("job-1") });
    let subjects = JobSubjects {
        finals: "asr.v1.transcript.job.job-1.final".into(),
        partials: "asr.v1.transcript.job.job-1.partial".into(),
        events: "asr.v1.event.job.job-1.*".into(),
    };
    let submitted = Submitted { job: stream("job-1"), state: JobState::Queued, subjects };
    json("reply_submitted", &Reply::Ok(submitted));
    let status = JobStatus {
        record: job_record(),
        progress: Some(progress()),
        ahead: Some(3),
        why: Some("every job slot is taken".into()),
        candidates: serde_json::json!([{"gpu_id": "gpu-7f3a", "refused": "no_slot"}]),
    };
    json("job_status", &status);
    let summary = JobSummary {
        job: stream("job-1"),
        state: JobState::Failed,
        name: Some("call.mp3".into()),
        priority: Priority::High,
        submitted_ms: 1_700_000_000_000,
        ended_ms: Some(1_700_000_009_000),
        duration_ms: Some(60_000),
        gpu_id: Some(worker().gpu_id),
        progress: Some(progress()),
        error: Some(Failure::new(FailureClass::BadAudio, "the container has no audio track")),
        ahead: Some(2),
    };
    json("job_list", &JobList { jobs: vec![summary], total: 7 });
    json("job_result", &job_result());
    let newer = codec::to_msgpack(&serde_json::json!({
        "job": "job-1", "epoch": 1, "attempt": 1, "audio": "file:///a", "options": {}, "submitted_ms": 1,
        "assigned_ms": 2, "colour": "red"
    }));
    let read: WorkItem = codec::from_msgpack(&newer.expect("encodes")).expect("a newer work item reads");
    assert_eq!((read.epoch, read.options), (1, SessionOptions::default()));
}

#[test]
fn a_heartbeat_that_speaks_of_jobs_is_pinned_json() {
    let held = Held {
        kind: Kind::Job,
        id: stream("job-1"),
        epoch: 2,
        last_audio_seq: Some(75),
        final_index: Some(3),
        lag_ms: None,
        progress: Some(progress()),
        suspect: false,
        crashes: 0,
        suspect_from: None,
        elsewhere: false,
    };
    let given_up = GivenUp {
        kind: Kind::Job,
        id: stream("job-2"),
        epoch: 1,
        failure: Failure::new(FailureClass::Timeout, "no byte of the audio came for 30 s"),
    };
    let job_slots = Slots { total: 2, used: 1 };
    json("heartbeat_jobs", &Heartbeat { held: vec![held], given_up: vec![given_up], job_slots, ..heartbeat() });
}
