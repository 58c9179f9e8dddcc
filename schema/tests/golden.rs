//! Pins the bytes on the wire: every type has a fixture in `tests/golden/`, written as it is and read back the same.
//!
//! A fixture that changes is a change of the contract. After a deliberate one, write them anew:
//! `VOXFLEET_WRITE_GOLDEN=1 cargo test -p voxfleet-schema --test golden`, and read the difference before it lands.

use std::{fmt::Debug, path::PathBuf};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    audio::{AudioFormat, Encoding, RawEntry},
    codec,
    dead::{DeadLetter, Origin, RefusedRequest},
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    fleet::*,
    id::*,
    job::*,
    session::*,
    source::{Source, SourceState},
    transcript::*,
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn pinned<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T, encoded: Vec<u8>) -> Vec<u8> {
    let path = fixture(name);
    if std::env::var_os("VOXFLEET_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, &encoded).expect("writing a fixture");
    }
    let stored = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(
        String::from_utf8_lossy(&encoded),
        String::from_utf8_lossy(&stored),
        "{name}: what is written differs from the fixture, for {value:?}"
    );
    assert_eq!(encoded, stored, "{name}");
    stored
}

fn json<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.json"), value, codec::to_json(value).expect("encodes"));
    assert_eq!(&codec::from_json::<T>(&stored).expect("decodes"), value, "{name}");
    // A newer writer's fields, at every level, are passed over.
    let mut newer: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    add_fields(&mut newer, true);
    let newer = serde_json::to_vec(&newer).expect("JSON");
    assert_eq!(&codec::from_json::<T>(&newer).unwrap_or_else(|e| panic!("{name} with new fields: {e}")), value);
}

/// For requests that take no field they do not know.
fn strict_json<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.json"), value, codec::to_json(value).expect("encodes"));
    assert_eq!(&codec::from_json::<T>(&stored).expect("decodes"), value, "{name}");
    let mut newer: serde_json::Value = serde_json::from_slice(&stored).expect("JSON");
    add_fields(&mut newer, true);
    assert!(serde_json::from_value::<T>(newer).is_err(), "{name} took an unknown field");
}

fn msgpack<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, value: &T) {
    let stored = pinned(&format!("{name}.msgpack"), value, codec::to_msgpack(value).expect("encodes"));
    assert_eq!(&codec::from_msgpack::<T>(&stored).expect("decodes"), value, "{name}");
}

/// Adds an unknown field to every object, except where an object is an enum (`{"error": ..}`) or holds only options,
/// which requests check strictly, or is an event's free `detail`, or maps names to numbers.
fn add_fields(value: &mut serde_json::Value, top: bool) {
    match value {
        serde_json::Value::Object(map) => {
            let is_enum = map.len() == 1 && ["ok", "error", "refused"].iter().any(|k| map.contains_key(*k)) && top;
            for (_, inner) in
                map.iter_mut().filter(|(k, _)| !["options", "detail", "stages", "candidates"].contains(&k.as_str()))
            {
                add_fields(inner, false);
            }
            if !is_enum {
                map.insert("from_tomorrow".to_owned(), serde_json::json!({"x": [1]}));
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|i| add_fields(i, false)),
        _ => {}
    }
}

fn stream(text: &str) -> StreamId {
    StreamId::new(text).expect("id")
}

fn worker() -> WorkerName {
    WorkerName { gpu_id: GpuId::new("gpu-7f3a").expect("id"), incarnation: Incarnation::new("w0aB9").expect("id") }
}

fn options() -> SessionOptions {
    SessionOptions {
        model: Some("micro.en".into()),
        language: Some("en".into()),
        task: Task::Translate,
        prompt: Some("a call".into()),
        carry_prompt: true,
        hotwords: vec!["oslo".into(), "paris".into()],
        diarize: true,
        min_speakers: Some(1),
        max_speakers: Some(2),
        channels: Channels::Split,
        interim: false,
        endpoint_ms: 300,
        policy: Policy::ExactModel,
        priority: Priority::High,
        idle_timeout_s: 30,
    }
}

fn resume() -> Resume {
    Resume {
        seq: 40,
        at_sample: 24_000,
        at_frame: 72_000,
        format: AudioFormat { encoding: Encoding::PcmF32Le, rate_hz: 48_000, channels: 2 },
        format_sample: 0,
        producers: SourceState {
            sources: vec![Source { id: SourceId::new("s1").expect("id"), ended: true }],
            asr_seq: Some(11),
            asr_seen: 0b1011,
            container: false,
        },
        language: Some("en".into()),
    }
}

fn segment() -> Segment {
    Segment {
        id: 0,
        start_ms: 1_534,
        end_ms: 2_079,
        text: "good morning".into(),
        speaker: Some("S1".into()),
        channel: Some(0),
        language: Some("en".into()),
        confidence: 0.75,
        words: vec![Word {
            text: "good".into(),
            start_ms: 1_534,
            end_ms: 1_679,
            confidence: 0.5,
            speaker: Some("S1".into()),
        }],
    }
}

fn full_final() -> Final {
    Final {
        kind: Kind::Session,
        id: stream("call-7"),
        index: 3,
        final_id: "4d1f0c".into(),
        epoch: 2,
        gpu_id: worker().gpu_id,
        model: "micro.en-q8_0".into(),
        device: "cpu".into(),
        engine: "whisper_cpp".into(),
        vad: VadKind::Silero,
        from_sample: 16_000,
        to_sample: 32_000,
        audio: AudioRange { from_seq: 37, to_seq: 44 },
        resume: resume(),
        checkpoint_seq: Some(9),
        checkpoint_missing: true,
        segments: vec![segment()],
        words_omitted: true,
        speech_final: true,
        end: true,
        lost: Some(Lost { from_seq: 30, to_seq: 36 }),
        error: Some(Failure::new(FailureClass::EngineCrash, "the engine ended")),
        result: Some("object://asr_media/call-7".into()),
        guards: vec!["repetition".into()],
        timings: Timings { queued_ms: 2, decode_ms: 80, audio_ms: 1_000, word_timing: Some(WordTiming::TokenEstimate) },
    }
}

fn smallest_final() -> Final {
    Final {
        checkpoint_seq: None,
        checkpoint_missing: false,
        segments: Vec::new(),
        words_omitted: false,
        speech_final: false,
        end: false,
        lost: None,
        error: None,
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
        resume: Resume {
            seq: 1,
            at_sample: 0,
            at_frame: 0,
            format: AudioFormat::default(),
            format_sample: 0,
            producers: SourceState::default(),
            language: None,
        },
        ..full_final()
    }
}

fn heartbeat() -> Heartbeat {
    Heartbeat {
        gpu_id: worker().gpu_id,
        incarnation: worker().incarnation,
        seq: 17,
        sent_ms: 1_700_000_000_000,
        started_ms: 1_699_999_999_000,
        beat_ms: 500,
        host: "host-1".into(),
        pid: 4_242,
        provider: Provider::RunPod,
        device: Device {
            index: Some(0),
            name: "NVIDIA H100".into(),
            uuid: Some("GPU-1".into()),
            total_mb: 81_559,
            free_mb: 60_000,
            used_mb: 3_000,
            used_by_others_mb: 18_559,
            temperature_c: Some(41),
            power_w: Some(80.5),
            utilization: Some(0.25),
        },
        slots: Slots { total: 16, used: 1 },
        job_slots: Slots { total: 0, used: 0 },
        held: vec![Held {
            kind: Kind::Session,
            id: stream("call-7"),
            epoch: 2,
            last_audio_seq: Some(44),
            final_index: Some(3),
            progress: None,
            suspect: true,
            crashes: 1,
            suspect_from: Some(96_000),
            elsewhere: true,
        }],
        given_up: Vec::new(),
        models: vec![ModelState {
            name: "micro.en".into(),
            state: Residency::Loaded,
            resident_mb: 12,
            expected_mb: 10,
        }],
        engine: EngineState {
            state: EngineRunState::Ready,
            kind: "whisper_cpp".into(),
            effective_device: "cuda:NVIDIA H100".into(),
            vad: VadKind::Silero,
            ms_since_progress: 0,
            restarts: 1,
            crashes: 1,
            decode_rate: Some(20.5),
            decode_rate_age_ms: Some(900),
        },
        draining: true,
        drain: Some(DrainNotice { why: "sigterm".into(), until_ms: Some(1_700_000_010_000) }),
        price_per_hour: Some(1.99),
        version: "0.1.0".into(),
    }
}

fn event() -> Event {
    Event {
        epoch: Some(2),
        gpu_id: Some("gpu-7f3a".into()),
        seq: Some(44),
        error: Some(Failure {
            retry_after_ms: Some(500),
            ..Failure::new(FailureClass::BadAudio, "5 bytes are not a whole number of frames")
        }),
        detail: serde_json::json!({"bytes": 5}),
        ..Event::new(Scope::Session, "call-7", What::Rejected, 1_700_000_000_000)
    }
}

fn record() -> SessionRecord {
    SessionRecord {
        kind: Kind::Session,
        id: stream("call-7"),
        state: SessionState::Assigned,
        options: options(),
        epoch: 2,
        worker: Some(worker()),
        implicit: true,
        opened_ms: 1_700_000_000_000,
        changed_ms: 1_700_000_000_500,
        ended_seq: Some(44),
        suspect: true,
        crashes: 2,
        suspect_from: Some(96_000),
        displaced_from: Some(worker()),
    }
}

fn job_request() -> JobRequest {
    JobRequest {
        job: Some(stream("job-1")),
        audio: Some("https://media.example/call.mp3".into()),
        data: None,
        name: Some("call.mp3".into()),
        options: options(),
        result_ttl_s: Some(3_600),
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
    }
}

fn progress() -> JobProgress {
    JobProgress { stage: JobStage::Transcribing, done_ms: 15_000, total_ms: Some(60_000) }
}

fn job_record() -> JobRecord {
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
        submitted_ms: 1_700_000_000_000,
        assigned_ms: 1_700_000_000_500,
        suspect: true,
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
            confidence: 0.75,
        }],
        aligned_segments: vec![AlignedSegment {
            start: 1.5,
            end: 2.25,
            text: "good".into(),
            speaker: Some("S1".into()),
            words: vec![AlignedWord {
                word: "good".into(),
                start: 1.5,
                end: 2.0,
                score: 0.5,
                speaker: Some("S1".into()),
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

#[test]
fn what_people_may_look_at_is_pinned_json() {
    json("final", &full_final());
    json("final_smallest", &smallest_final());
    json(
        "partial",
        &Partial {
            kind: Kind::Session,
            id: stream("call-7"),
            epoch: 2,
            gpu_id: worker().gpu_id,
            after_index: Some(3),
            from_sample: 32_000,
            to_sample: 48_000,
            committed: "good".into(),
            tentative: "morning".into(),
            lag_ms: 120,
            progress: None,
        },
    );
    json(
        "revision",
        &Revision {
            kind: Kind::Session,
            id: stream("call-7"),
            index: 3,
            revision: 1,
            epoch: 2,
            segments: vec![segment()],
        },
    );
    json("event", &event());
    json("event_smallest", &Event::new(Scope::Fleet, "gpu-7f3a", What::Joined, 0));
    json("heartbeat", &heartbeat());
    json("session_record", &record());
    let status = SessionStatus {
        record: record(),
        last_final: Some(3),
        last_audio_seq: Some(44),
        why: vec!["gpu-7f3a: no slot".into()],
        candidates: serde_json::json!([{"gpu_id": "gpu-7f3a", "refused": "no_slot"}]),
    };
    json("session_status", &status);
    json(
        "fleet_status",
        &FleetStatus {
            dispatcher: "d1".into(),
            workers: vec![WorkerStatus {
                health: WorkerHealth::Suspect,
                ms_since_heartbeat: 1_600,
                heartbeat: heartbeat(),
            }],
            sessions_waiting: 1,
            sessions_assigned: 2,
            jobs_queued: 3,
            jobs_assigned: 1,
            dead: vec![worker()],
            services: vec![ServiceStatus {
                service: "asr".into(),
                gpus: vec![GpuRole {
                    gpu_id: worker().gpu_id,
                    role: Role::StandingIn,
                    health: Some(WorkerHealth::Alive),
                    standing_in_for: Some(GpuId::new("gpu-0").expect("id")),
                }],
                memory_limit_percent: 90,
                preload: vec!["micro.en".into()],
            }],
            verdicts_wait: None,
        },
    );
}

#[test]
fn requests_and_answers_are_pinned_json() {
    json("open_request", &OpenRequest { session: stream("call-7"), options: options() });
    json("session_request", &SessionRequest { session: stream("call-7") });
    let opened = Opened {
        session: stream("call-7"),
        worker: worker(),
        epoch: 2,
        subjects: SessionSubjects {
            audio: "asr.v1.audio.call-7".into(),
            finals: "asr.v1.transcript.session.call-7.final".into(),
            partials: "asr.v1.transcript.session.call-7.partial".into(),
            events: "asr.v1.event.session.call-7.*".into(),
        },
    };
    json("reply_opened", &Reply::Ok(opened));
    json("reply_closed", &Reply::Ok(Closed { session: stream("call-7"), end_seq: 45 }));
    let refusal =
        Failure { retry_after_ms: Some(2_000), ..Failure::new(FailureClass::NoCapacity, "No GPU resources available") };
    json("reply_refused", &Reply::<Opened>::Error(refusal.clone()));
    let assignment = Assignment {
        kind: Kind::Session,
        id: stream("call-7"),
        epoch: 2,
        options: options(),
        suspect: true,
        crashes: 1,
        suspect_from: Some(96_000),
    };
    json("control_assign", &ControlRequest::Assign(assignment));
    json(
        "control_release",
        &ControlRequest::Release { kind: Kind::Session, id: stream("call-7"), epoch: 2, finish_ms: 2_000 },
    );
    json("control_cancel", &ControlRequest::Cancel { kind: Kind::Job, id: stream("job-1") });
    json("control_prewarm", &ControlRequest::Prewarm { model: "micro.en".into() });
    json("control_drain", &ControlRequest::Drain { deadline_ms: 10_000 });
    json("control_renew", &ControlRequest::Renew);
    json("control_reply_refused", &ControlReply::Refused(refusal));
    let done = codec::to_json(&ControlReply::Done).expect("encodes");
    assert_eq!(done, b"\"done\"");
}

#[test]
fn drains_and_dead_letters_are_pinned_json() {
    let gpu_id = worker().gpu_id;
    json("drained", &Reply::Ok(Drained { workers: vec![worker()], sessions: 3, jobs: 1 }));
    let request = DrainRequest { gpu_id: gpu_id.clone(), deadline_ms: Some(60_000) };
    let text = codec::to_json(&request).expect("encodes");
    assert_eq!(String::from_utf8_lossy(&text), r#"{"gpu_id":"gpu-7f3a","deadline_ms":60000}"#);
    assert!(serde_json::from_str::<DrainRequest>(r#"{"gpu_id":"g","until":1}"#).is_err());
    let parked = DeadLetter {
        kind: Kind::Session,
        id: stream("call-7"),
        error: Failure::new(FailureClass::EngineCrash, "the engine crashed 3 times on this window"),
        at_ms: 1_700_000_009_000,
        origin: Origin {
            gpu_id: Some(gpu_id),
            incarnation: Some(worker().incarnation),
            epoch: Some(2),
            dispatcher: Some("d1".into()),
        },
        attempts: 3,
        audio: Some(AudioRange { from_seq: 40, to_seq: 44 }),
        record: None,
        request: None,
    };
    json("dead_session", &parked);
    let failed = DeadLetter { kind: Kind::Job, audio: None, record: Some(job_record()), ..parked.clone() };
    json("dead_job", &failed);
    let request = RefusedRequest {
        seq: 17,
        content_type: Some("application/json".into()),
        body_bytes: 4,
        body: Some("{hi}".into()),
        body_base64: Some(Inline(Bytes::from_static(&[0, 1, 254, 255]))),
    };
    json("dead_request", &DeadLetter { request: Some(request), record: None, ..failed });
}

#[test]
fn what_only_machines_exchange_is_pinned_messagepack() {
    msgpack("checkpoint", &Checkpoint { index: 3, prompt_tail: "good morning".into(), guard_hit: true });
    msgpack(
        "raw_entry",
        &RawEntry {
            seq: 44,
            headers: vec![("Asr-Seq".into(), "11".into())],
            payload: Bytes::from_static(&[0, 1, 254, 255]),
        },
    );
    msgpack("resume", &resume());
    #[derive(Serialize)]
    struct Newer {
        index: u64,
        colour: &'static str,
    }
    let newer = codec::to_msgpack(&Newer { index: 5, colour: "red" }).expect("encodes");
    let read: Checkpoint = codec::from_msgpack(&newer).expect("a newer checkpoint reads");
    assert_eq!(read, Checkpoint { index: 5, ..Checkpoint::default() });
}

#[test]
fn values_of_tomorrow_decode_to_unknown() {
    fn unknown<T: DeserializeOwned + PartialEq + Debug>(expected: T) {
        let read: T = serde_json::from_str("\"from_tomorrow\"").expect("an unknown value reads");
        assert_eq!(read, expected);
    }
    unknown(Kind::Unknown);
    unknown(Task::Unknown);
    unknown(Channels::Unknown);
    unknown(Policy::Unknown);
    unknown(Priority::Unknown);
    unknown(VadKind::Unknown);
    unknown(WordTiming::Unknown);
    unknown(Scope::Unknown);
    unknown(What::Unknown);
    unknown(FailureClass::Unknown);
    unknown(Provider::Unknown);
    unknown(Residency::Unknown);
    unknown(EngineRunState::Unknown);
    unknown(WorkerHealth::Unknown);
    unknown(SessionState::Unknown);
    unknown(ControlReply::Unknown);
    unknown(JobState::Unknown);
    unknown(JobStage::Unknown);
    let request: ControlRequest = serde_json::from_str(r#"{"do":"dance","with":"gpu-1"}"#).expect("reads");
    assert_eq!(request, ControlRequest::Unknown);
}

#[test]
fn a_strangers_request_is_refused_without_a_panic() {
    let cases: [(&[u8], Option<&str>); 10] = [
        (b"", None),
        (b"{", None),
        (b"null", None),
        (b"[]", None),
        (br#"{"session":7}"#, None),
        (br#"{"session":"a","options":{"endpoint_ms":"soon"}}"#, None),
        (br#"{"session":"a","options":{"task":"sing"}}"#, None),
        (br#"{"session":"a"}"#, Some(codec::MSGPACK)),
        (b"\xc1\xc1\xc1", Some(codec::MSGPACK)),
        (br#"{"session":"a"}"#, Some("application/xml")),
    ];
    for (body, content_type) in cases {
        let read = codec::from_request::<OpenRequest>(body, content_type);
        assert!(read.is_err(), "{:?} was taken as {read:?}", String::from_utf8_lossy(body));
    }
}
