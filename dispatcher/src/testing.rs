//! Values for unit tests.

use voxfleet_schema::{
    audio::AudioFormat,
    fleet::{Device, EngineRunState, EngineState, Heartbeat, Held, ModelState, Provider, Residency, Slots},
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
    job::{JobPart, JobRecord, JobState},
    session::{SessionOptions, SessionRecord, SessionState},
    source::SourceState,
    transcript::{AudioRange, Final, Resume, Timings, VadKind},
};

pub(crate) fn id(text: &str) -> StreamId {
    StreamId::new(text).expect("test id")
}

pub(crate) fn worker(gpu: &str, incarnation: &str) -> WorkerName {
    WorkerName {
        gpu_id: GpuId::new(gpu).expect("test id"),
        incarnation: Incarnation::new(incarnation).expect("test id"),
    }
}

pub(crate) fn held(id_text: &str, epoch: u64) -> Held {
    Held {
        lag_ms: None,
        kind: Kind::Session,
        id: id(id_text),
        epoch,
        last_audio_seq: None,
        final_index: None,
        progress: None,
        suspect: false,
        crashes: 0,
        suspect_from: None,
        elsewhere: false,
    }
}

pub(crate) fn model(name: &str, state: Residency, expected_mb: u64) -> ModelState {
    let resident_mb = if state == Residency::Loaded { expected_mb } else { 0 };
    ModelState { name: name.to_owned(), state, resident_mb, expected_mb, ..ModelState::default() }
}

/// A worker on a GPU of 24 GB with four slots and one model.
pub(crate) fn beat(gpu: &str, incarnation: &str) -> Heartbeat {
    let name = worker(gpu, incarnation);
    Heartbeat {
        gpu_id: name.gpu_id,
        incarnation: name.incarnation,
        seq: 0,
        sent_ms: 0,
        started_ms: 0,
        beat_ms: 0,
        host: "host".to_owned(),
        pid: 1,
        provider: Provider::Local,
        device: Device {
            index: Some(0),
            name: "test".to_owned(),
            uuid: None,
            total_mb: 24_000,
            free_mb: 20_000,
            used_mb: 4_000,
            used_by_others_mb: 0,
            temperature_c: Some(50),
            power_w: None,
            utilization: None,
            ..Device::default()
        },
        slots: Slots { total: 4, used: 0 },
        job_slots: Slots { total: 1, used: 0 },
        held: Vec::new(),
        given_up: Vec::new(),
        models: vec![model("small", Residency::Available, 852)],
        default_model: None,
        engine: EngineState {
            state: EngineRunState::Ready,
            kind: "simulated".to_owned(),
            effective_device: "cuda:test".to_owned(),
            speakers: voxfleet_schema::transcript::SpeakersBy::Segmentation,
            vad: VadKind::Silero,
            ms_since_progress: 0,
            restarts: 0,
            crashes: 0,
            decode_rate: None,
            decode_rate_age_ms: None,
            delivery_rate: None,
            neighbour_ms: 0,
            ..EngineState::default()
        },
        draining: false,
        drain: None,
        price_per_hour: None,
        version: "test".to_owned(),
    }
}

/// An end final of a session, at `to_seq`.
pub(crate) fn end_final(id_text: &str, index: u64, epoch: u64, to_seq: u64) -> Final {
    Final {
        kind: Kind::Session,
        id: id(id_text),
        index,
        final_id: format!("f{index}"),
        epoch,
        gpu_id: GpuId::new("g0").expect("test id"),
        model: "small".to_owned(),
        device: "cpu".to_owned(),
        engine: "simulated".to_owned(),
        vad: VadKind::Silero,
        from_sample: 0,
        to_sample: 16_000,
        audio: AudioRange { from_seq: 1, to_seq },
        resume: Resume {
            seq: 1,
            at_sample: 0,
            at_frame: 0,
            format: AudioFormat::default(),
            format_sample: 0,
            producers: SourceState::default(),
            language: None,
        },
        checkpoint_seq: None,
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
        words_omitted: false,
        speech_final: true,
        end: true,
        lost: None,
        error: None,
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
    }
}

/// A session that audio has opened and nobody has.
pub(crate) fn session(id_text: &str) -> SessionRecord {
    SessionRecord {
        kind: Kind::Session,
        id: id(id_text),
        state: SessionState::Waiting,
        options: SessionOptions::default(),
        epoch: 0,
        worker: None,
        implicit: true,
        opened_ms: 0,
        changed_ms: 0,
        ended_seq: None,
        suspect: false,
        crashes: 0,
        suspect_from: None,
        displaced_from: None,
        instead: None,
        engine: None,
        traceparent: None,
    }
}

/// A job that waits, with its recording elsewhere.
pub(crate) fn job(id_text: &str) -> JobRecord {
    JobRecord {
        id: id(id_text),
        state: JobState::Queued,
        audio: "https://audio.example/a.wav".to_owned(),
        data_sha256: None,
        name: None,
        options: SessionOptions::default(),
        result_ttl_s: 86_400,
        epoch: 0,
        attempts: 0,
        worker: None,
        submitted_ms: 0,
        changed_ms: 0,
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
        part: None,
        traceparent: None,
    }
}

/// The first stretch of a job's recording.
pub(crate) fn part_of(parent: &str) -> JobPart {
    JobPart {
        parent: id(parent),
        number: 0,
        from: None,
        until_sample: Some(160_000),
        vad: VadKind::Energy,
        recording_bytes: 9,
    }
}

/// A worker says that it holds a job.
pub(crate) fn holds_job(id_text: &str, epoch: u64) -> Held {
    Held { kind: Kind::Job, ..held(id_text, epoch) }
}

/// The audio stream and the server are asked whether they answer.
pub(crate) fn probe(core: &mut crate::core::Core, stream: bool, server: bool, now: crate::moment::Moment) {
    core.probed(stream, now);
    core.round_trip(crate::fleet::RoundTrip { began: now.mono, answered: server, connects: 1 }, now);
}
