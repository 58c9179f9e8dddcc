//! What people may look at: JSON, with fields that a newer writer adds passed over.

use voxfleet_schema::{
    audio::{AudioFormat, Encoding},
    device::{DeviceTrouble, EngineEnd, Instead, Pressure, Standby},
    event::{Event, Scope, What},
    failure::{Failure, FailureClass},
    fleet::*,
    id::{GpuId, Kind, SourceId},
    session::{SessionRecord, SessionState, SessionStatus},
    source::{Source, SourceState},
    transcript::*,
};

use crate::{json, options, stream, trace, worker};

pub(crate) fn resume() -> Resume {
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
            overlapped_by: Some("S2".into()),
        }],
    }
}

fn turns() -> Vec<Turn> {
    vec![Turn { start_ms: 1_500, end_ms: 2_100, speaker: "S1".into(), voice: Some(4) }]
}

fn speakers() -> Option<Speakers> {
    Some(Speakers {
        by: SpeakersBy::Changes,
        labels: 2,
        late: true,
        afresh: true,
        why: Some("no segmentation model".into()),
    })
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
        turns: turns(),
        speakers: speakers(),
        words_omitted: true,
        speech_final: true,
        end: true,
        lost: Some(Lost { from_seq: 30, to_seq: 36 }),
        error: Some(Failure::new(FailureClass::EngineCrash, "the engine ended")),
        result: Some("object://asr_media/call-7".into()),
        guards: vec!["repetition".into()],
        timings: Timings {
            queued_ms: 2,
            decode_ms: 80,
            audio_ms: 1_000,
            diarize_ms: 30,
            word_timing: Some(WordTiming::TokenEstimate),
        },
    }
}

fn smallest_final() -> Final {
    Final {
        checkpoint_seq: None,
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
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

#[test]
fn figures_that_nothing_can_have_are_named() {
    assert_eq!(heartbeat().impossible(), None);
    let with = |path: &str, figure: u64| -> Heartbeat {
        let mut value = serde_json::to_value(heartbeat()).expect("json");
        *value.pointer_mut(path).unwrap_or_else(|| panic!("{path}")) = figure.into();
        serde_json::from_value(value).expect("a heartbeat")
    };
    for (path, name) in [
        ("/device/total_mb", "device.total_mb"),
        ("/device/free_mb", "device.free_mb"),
        ("/device/used_mb", "device.used_mb"),
        ("/device/used_by_others_mb", "device.used_by_others_mb"),
        ("/models/0/resident_mb", "models.resident_mb"),
        ("/engine/ms_since_progress", "engine.ms_since_progress"),
    ] {
        assert_eq!(with(path, u64::MAX).impossible(), Some(name));
    }
    assert_eq!(with("/slots/total", u32::MAX.into()).impossible(), Some("slots.total"));
}

pub(crate) fn heartbeat() -> Heartbeat {
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
            throttled: vec!["thermal".into()],
            ecc_errors: Some(0),
            xids: None,
            gpus: Some(8),
            shared_with: vec!["gpu-b".into()],
            trouble: Some(DeviceTrouble { class: FailureClass::DeviceLost, message: "it does not answer".into() }),
            pressure: Some(Pressure::ReleaseIdle),
        },
        slots: Slots { total: 16, used: 1 },
        job_slots: Slots { total: 0, used: 0 },
        held: vec![Held {
            kind: Kind::Session,
            id: stream("call-7"),
            epoch: 2,
            last_audio_seq: Some(44),
            final_index: Some(3),
            lag_ms: Some(640),
            progress: None,
            suspect: true,
            crashes: 1,
            suspect_from: Some(96_000),
            elsewhere: true,
        }],
        given_up: Vec::new(),
        models: vec![ModelState {
            engine: Some("ct2".to_owned()),
            name: "micro.en".into(),
            state: Residency::Loaded,
            resident_mb: 12,
            expected_mb: 10,
            measured: true,
            load_ms: None,
            load_percent: None,
            failure: Some(Failure::new(FailureClass::OutOfMemory, "no room")),
        }],
        default_model: Some("micro.en".into()),
        engine: EngineState {
            state: EngineRunState::Ready,
            kind: "whisper_cpp".into(),
            effective_device: "cuda:NVIDIA H100".into(),
            vad: VadKind::Silero,
            speakers: SpeakersBy::Segmentation,
            ms_since_progress: 0,
            restarts: 1,
            crashes: 1,
            decode_rate: Some(20.5),
            decode_rate_age_ms: Some(900),
            delivery_rate: Some(8.5),
            neighbour_ms: 12_000,
            idle_timeout_s: 600,
            ms_since_activity: Some(1_200),
            last_end: Some(EngineEnd {
                class: FailureClass::OutOfMemory,
                message: "the device has no memory left".into(),
                at_ms: 1_700_000_000_000,
            }),
            ends: [(FailureClass::OutOfMemory, 1)].into(),
            standbys: vec![Standby {
                asked: "medium".into(),
                model: "small".into(),
                device: "gpu".into(),
                class: FailureClass::OutOfMemory,
                since_ms: 1_700_000_000_000,
                retry_at_ms: Some(1_700_000_060_000),
            }],
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
        instead: Some(Instead {
            asked: Some("small.en".into()),
            model: Some("micro.en".into()),
            cpu: true,
            class: FailureClass::OutOfMemory,
        }),
        engine: Some("whisper_cpp".into()),
        traceparent: Some(trace()),
    }
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
            turns: turns(),
            speakers: speakers(),
            words_omitted: false,
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
