//! What is written is read back the same, for any value; and what a stranger writes never panics.

use std::fmt::Debug;

use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use voxfleet_schema::{
    audio::{AudioFormat, ChunkHeaders, Encoding, RATES_HZ, RawEntry},
    codec,
    id::*,
    job::{JobRecord, JobState},
    session::*,
    source::{Source, SourceState, Verdict},
    transcript::*,
};

fn stream(text: &str) -> StreamId {
    StreamId::new(text).expect("id")
}

fn ids() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_-]{1,64}"
}

fn text() -> impl Strategy<Value = String> {
    any::<String>()
}

fn formats() -> impl Strategy<Value = AudioFormat> {
    let encodings = prop_oneof![Just(Encoding::PcmS16Le), Just(Encoding::PcmF32Le)];
    (encodings, RATES_HZ, 1u16..=64).prop_map(|(encoding, rate_hz, channels)| AudioFormat {
        encoding,
        rate_hz,
        channels,
    })
}

fn source_states() -> impl Strategy<Value = SourceState> {
    let sources = prop::collection::vec((ids(), any::<bool>()), 0..4);
    (sources, any::<Option<u64>>(), any::<u64>(), any::<bool>()).prop_map(|(sources, asr_seq, asr_seen, container)| {
        let sources =
            sources.into_iter().map(|(id, ended)| Source { id: SourceId::new(id).expect("id"), ended }).collect();
        SourceState { sources, asr_seq, asr_seen, container }
    })
}

fn confidences() -> impl Strategy<Value = f32> {
    0.0f32..=1.0
}

fn segments() -> impl Strategy<Value = Vec<Segment>> {
    let words = prop::collection::vec((text(), any::<u64>(), any::<u64>(), confidences()), 0..3);
    let one = (text(), any::<u64>(), confidences(), words, any::<Option<String>>(), any::<Option<u16>>());
    prop::collection::vec(
        one.prop_map(|(text, start_ms, confidence, words, speaker, channel)| Segment {
            id: 0,
            start_ms,
            end_ms: start_ms,
            text,
            language: speaker.clone(),
            speaker,
            channel,
            confidence,
            words: words
                .into_iter()
                .map(|(text, start_ms, end_ms, confidence)| Word {
                    text,
                    start_ms,
                    end_ms,
                    confidence,
                    speaker: None,
                    overlapped_by: None,
                })
                .collect(),
        }),
        0..3,
    )
}

fn finals() -> impl Strategy<Value = Final> {
    let names = (ids(), ids(), text(), any::<u64>(), any::<u64>());
    let places = (any::<u64>(), any::<u64>(), any::<u64>(), formats(), source_states());
    let flags = (any::<bool>(), any::<bool>(), any::<Option<u64>>(), prop::collection::vec(text(), 0..3));
    (names, places, flags, segments()).prop_map(|(names, places, flags, segments)| {
        let (id, gpu, final_id, index, epoch) = names;
        let (a, b, c, format, producers) = places;
        Final {
            id: stream(&id),
            gpu_id: GpuId::new(gpu).expect("id"),
            model: final_id.clone(),
            final_id,
            index,
            epoch,
            from_sample: a,
            to_sample: b,
            audio: AudioRange { from_seq: b, to_seq: c },
            resume: Resume { seq: a, at_sample: b, at_frame: c, format, format_sample: a, producers, language: None },
            end: flags.0,
            speech_final: flags.1,
            checkpoint_seq: flags.2,
            lost: flags.2.map(|n| Lost { from_seq: n, to_seq: n }),
            guards: flags.3,
            turns: vec![Turn { start_ms: a, end_ms: b, speaker: "S1".into(), voice: flags.2.map(|n| n as u32) }],
            speakers: flags.0.then_some(Speakers {
                by: SpeakersBy::None,
                labels: 3,
                late: flags.1,
                afresh: flags.0,
                why: None,
            }),
            segments,
            kind: Kind::Session,
            device: "cpu".into(),
            engine: "simulated".into(),
            vad: VadKind::Energy,
            checkpoint_missing: false,
            words_omitted: false,
            error: None,
            result: None,
            timings: Timings::default(),
        }
    })
}

fn session_options() -> impl Strategy<Value = SessionOptions> {
    let texts = (any::<Option<String>>(), any::<Option<String>>(), prop::collection::vec(text(), 0..4));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0usize..4, 0usize..3);
    (texts, flags, any::<u32>(), any::<Option<u16>>()).prop_map(|(texts, flags, number, speakers)| SessionOptions {
        model: texts.0.clone(),
        language: texts.1.clone(),
        prompt: texts.0,
        hotwords: texts.2.clone(),
        channel_names: texts.2,
        task: if flags.0 { Task::Translate } else { Task::Transcribe },
        carry_prompt: flags.1,
        interim: flags.2,
        diarize: if flags.3 { Diarize::Auto } else { Diarize::Off },
        channels: if flags.0 { Channels::Mix } else { Channels::Split },
        policy: [Policy::ExactModel, Policy::AllowSmaller, Policy::AllowCpu, Policy::ForceCpu][flags.4],
        priority: [Priority::High, Priority::Normal, Priority::Low][flags.5],
        endpoint_ms: number,
        idle_timeout_s: number,
        min_speakers: speakers,
        max_speakers: speakers,
    })
}

fn session_record(id: &str, options: SessionOptions, engine: Option<String>) -> SessionRecord {
    SessionRecord {
        kind: Kind::Session,
        id: stream(id),
        state: SessionState::Waiting,
        options,
        epoch: 0,
        worker: None,
        implicit: false,
        opened_ms: 0,
        changed_ms: 0,
        ended_seq: None,
        suspect: false,
        crashes: 0,
        suspect_from: None,
        displaced_from: None,
        instead: None,
        engine,
        traceparent: None,
    }
}

fn job_record(id: &str, options: SessionOptions, engine: Option<String>) -> JobRecord {
    JobRecord {
        id: stream(id),
        state: JobState::Queued,
        audio: String::new(),
        data_sha256: None,
        name: None,
        options,
        result_ttl_s: 0,
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
        engine,
        part: None,
        traceparent: None,
    }
}

fn both_codecs<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) -> Result<(), TestCaseError> {
    let json = codec::to_json(value).expect("JSON");
    prop_assert_eq!(&codec::from_json::<T>(&json).expect("JSON reads"), value);
    let msgpack = codec::to_msgpack(value).expect("MessagePack");
    prop_assert_eq!(&codec::from_msgpack::<T>(&msgpack).expect("MessagePack reads"), value);
    Ok(())
}

/// One log entry's headers, few enough names and numbers that they collide.
fn chunk_headers() -> impl Strategy<Value = ChunkHeaders> {
    (any::<Option<u8>>(), 0usize..3, any::<bool>()).prop_map(|(seq, source, end)| ChunkHeaders {
        seq: seq.map(|n| u64::from(n) % 80),
        source: ["a", "b"].get(source).map(|id| SourceId::new(id).expect("id")),
        end,
        ..ChunkHeaders::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn finals_round_trip(value in finals()) {
        both_codecs(&value)?;
    }

    #[test]
    fn options_round_trip(value in session_options(), id in ids()) {
        both_codecs(&value)?;
        both_codecs(&OpenRequest { session: stream(&id), options: value })?;
    }

    /// Keys without an engine look as those of versions that did not know of one.
    #[test]
    fn records_round_trip_with_an_engine_and_without(
        options in session_options(), id in ids(), engine in any::<Option<String>>(),
    ) {
        let session = session_record(&id, options.clone(), engine.clone());
        let job = job_record(&id, options, engine.clone());
        both_codecs(&session)?;
        both_codecs(&job)?;
        for written in [serde_json::to_value(&session), serde_json::to_value(&job)] {
            let written = written.expect("JSON");
            prop_assert_eq!(written.get("engine").and_then(|name| name.as_str()), engine.as_deref());
            prop_assert_eq!(written.get("engine").is_some(), engine.is_some());
        }
    }

    #[test]
    fn checkpoints_and_entries_round_trip(
        index in any::<u64>(), tail in text(), hit in any::<bool>(),
        headers in prop::collection::vec((text(), text()), 0..4), payload in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        both_codecs(&Checkpoint { index, prompt_tail: tail, guard_hit: hit, voices: Some(bytes::Bytes::from_static(b"\x00\xff")), late: vec![index], ..Checkpoint::default() })?;
        let entry = RawEntry { seq: index, headers, payload: payload.into() };
        let bytes = codec::to_msgpack(&entry).expect("MessagePack");
        prop_assert_eq!(codec::from_msgpack::<RawEntry>(&bytes).expect("reads"), entry);
    }

    #[test]
    fn formats_round_trip(format in formats()) {
        prop_assert_eq!(format.to_string().parse::<AudioFormat>(), Ok(format));
        both_codecs(&format)?;
    }

    #[test]
    fn the_clock_is_monotonic_and_inverts(format in formats(), frame in 0u64..1 << 40) {
        let sample = format.sample_of_frame(frame);
        prop_assert!(format.sample_of_frame(frame + 1) >= sample);
        let first = format.first_frame_at(sample);
        prop_assert!(first <= frame && format.sample_of_frame(first) >= sample);
    }

    #[test]
    fn any_text_is_an_id_or_a_typed_error(text in any::<String>()) {
        let valid = !text.is_empty() && text.len() <= 64
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        prop_assert_eq!(StreamId::new(&text).is_ok(), valid);
    }

    #[test]
    fn no_header_value_panics(name in "Asr-(Seq|Source|Format|End|Flush|Opt-[A-Za-z-]{1,20})", value in any::<String>()) {
        // Either is right; what counts is that nothing else happens.
        let _ = ChunkHeaders::parse([(name.as_str(), value.as_str())]);
    }

    /// The producers' state travels in `resume`: whoever goes on after it judges as the old owner would have.
    #[test]
    fn producers_are_judged_alike_after_a_move(
        log in prop::collection::vec((chunk_headers(), any::<bool>()), 1..60), at in any::<prop::sample::Index>(),
    ) {
        let moved_at = at.index(log.len());
        let (mut stays, mut moves) = (SourceState::default(), SourceState::default());
        for (n, (headers, has_audio)) in log.iter().enumerate() {
            if n == moved_at {
                let bytes = codec::to_json(&moves).expect("JSON");
                moves = codec::from_json(&bytes).expect("reads");
            }
            let verdict: Verdict = stays.judge(headers, *has_audio);
            prop_assert_eq!(moves.judge(headers, *has_audio), verdict);
        }
    }
}
