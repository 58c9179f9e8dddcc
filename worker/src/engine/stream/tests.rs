//! The stream by itself, with a threshold for a VAD and a checksum for a recognizer: any sample lost, doubled or moved
//! changes a text.

mod split;

use proptest::prelude::*;
use voxfleet_diarize::hear::Voiced;
use voxfleet_schema::{
    session::Diarize,
    transcript::{SpeakersBy, VadKind},
};

use super::*;
use crate::{
    engine::{HeardSegment, HeardWord, VAD_FRAME},
    ipc::{AfterFinal, ENTRY_COST},
};

struct Loudness;

impl Vad for Loudness {
    fn kind(&self) -> VadKind {
        VadKind::Energy
    }

    fn reset(&mut self) {}

    fn another(&self) -> Box<dyn Vad> {
        Box::new(Loudness)
    }

    fn speech_probability(&mut self, frame: &[f32; VAD_FRAME]) -> Result<f32, EngineError> {
        Ok((frame.iter().map(|s| s.abs()).sum::<f32>() / VAD_FRAME as f32 * 20.0).min(1.0))
    }
}

fn checksum(window: &Window) -> Hypothesis {
    let sum = window.samples.iter().enumerate().fold(window.from_sample, |sum, (n, s)| {
        sum.wrapping_mul(31).wrapping_add((s * 32_768.0) as i64 as u64 ^ n as u64)
    });
    let text = format!("{sum:x}-{}", window.samples.len());
    Hypothesis {
        segments: vec![HeardSegment { end_ms: window.samples.len() as u64 / 16, text, ..HeardSegment::default() }],
        language: Some("en".into()),
        ..Hypothesis::default()
    }
}

/// Runs entries to starvation and returns the finals.
fn run(options: &SessionOptions, start: StartPoint, entries: &[RawEntry]) -> Vec<FinalDraft> {
    let first = start.first_seq();
    through(SessionStream::new(options, start, Box::new(Loudness)), first, entries)
}

fn through(mut stream: SessionStream, first: u64, entries: &[RawEntry]) -> Vec<FinalDraft> {
    let mut finals = Vec::new();
    for entry in entries.iter().filter(|e| e.seq >= first) {
        stream.push(entry.clone());
        loop {
            match stream.step().expect("this VAD cannot fail") {
                Step::Starved | Step::Ended => break,
                Step::Draft(draft) => finals.push(*draft),
                Step::Final(windows) => {
                    // The last one first: the order of answers is a matter of load.
                    for (part, window) in windows.iter().enumerate().rev() {
                        let (heard, nobody) = (Ok(checksum(window)), RecognizerInfo::none());
                        let draft =
                            stream.complete(part, heard, Vec::new(), Listened::NotAsked, &nobody, Timings::default());
                        assert_eq!(draft.is_some(), part == 0, "with the last answer");
                        finals.extend(draft.map(|draft| *draft));
                    }
                }
            }
        }
    }
    finals
}

fn after(index: usize, f: &FinalDraft) -> StartPoint {
    let after = AfterFinal {
        index: index as u64,
        to_sample: f.to_sample,
        to_seq: f.audio.to_seq,
        end: f.end,
        resume: f.resume.clone(),
        speakers: f.speakers.clone(),
    };
    let checkpoint = f.checkpoint.clone().unwrap_or_default();
    StartPoint { after: Some(Box::new(after)), checkpoint, ..StartPoint::beginning() }
}

/// Noise bursts and pauses, in ms, as 16-bit PCM at `rate_hz`.
fn call(pattern: &[(u32, u32)], rate_hz: u32) -> Vec<u8> {
    let mut state = 1u32;
    let mut pcm = Vec::new();
    let per_ms = rate_hz as usize / 1000;
    for (burst, pause) in pattern {
        for n in 0..(*burst as usize + *pause as usize) * per_ms {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let loud = n < *burst as usize * per_ms;
            let sample = if loud { (state >> 16) as i16 / 3 } else { 0 };
            pcm.extend(sample.to_le_bytes());
        }
    }
    pcm
}

fn entries(pcm: &[u8], chunk_bytes: usize, headers: &[(&str, &str)]) -> Vec<RawEntry> {
    let headers: Vec<_> = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let mut list: Vec<RawEntry> = pcm
        .chunks(chunk_bytes)
        .enumerate()
        .map(|(n, bytes)| RawEntry { seq: 10 + 3 * n as u64, headers: headers.clone(), payload: bytes.to_vec().into() })
        .collect();
    let seq = list.last().map_or(10, |e| e.seq + 1);
    list.push(RawEntry { seq, headers: vec![("Asr-End".into(), "1".into())], payload: Default::default() });
    list
}

fn essence(finals: &[FinalDraft]) -> Vec<(u64, u64, String, bool, bool)> {
    finals
        .iter()
        .map(|f| {
            let text = f.segments.iter().map(|s| s.text.clone()).collect();
            (f.from_sample, f.to_sample, text, f.speech_final, f.end)
        })
        .collect()
}

/// Finals are contiguous, cover everything, and only the last one is an end.
fn check_chain(finals: &[FinalDraft], total: u64) {
    let mut at = 0;
    for (n, f) in finals.iter().enumerate() {
        assert_eq!(f.from_sample, at, "final {n}");
        assert!(f.to_sample >= at && f.audio.from_seq <= f.audio.to_seq);
        assert_eq!(f.end, n + 1 == finals.len());
        at = f.to_sample;
    }
    assert_eq!(at, total, "every sample is covered");
}

const PATTERN: [(u32, u32); 6] = [(900, 700), (2_500, 300), (1_200, 1_500), (60, 900), (400, 2_000), (3_000, 100)];

#[test]
fn a_session_is_cut_at_its_pauses_and_covered_whole() {
    let pcm = call(&PATTERN, 16_000);
    let finals = run(&SessionOptions::default(), StartPoint::beginning(), &entries(&pcm, 6_400, &[]));
    check_chain(&finals, pcm.len() as u64 / 2);
    let spoken = finals.iter().filter(|f| !f.segments.is_empty()).count();
    assert_eq!(spoken, 4, "{:?}", essence(&finals));
}

#[test]
fn chunk_sizes_do_not_matter() {
    for (rate, format) in [(16_000, "pcm_s16le"), (48_000, "pcm_s16le;rate=48000"), (8_000, "pcm_s16le;rate=8000")] {
        let pcm = call(&PATTERN, rate);
        let headers = [("Asr-Format", format)];
        let reference = run(&SessionOptions::default(), StartPoint::beginning(), &entries(&pcm, pcm.len(), &headers));
        check_chain(&reference, pcm.len() as u64 / 2 * 16_000 / u64::from(rate));
        for frames in [16, 37, 3_200, 48_001] {
            let finals = run(&SessionOptions::default(), StartPoint::beginning(), &entries(&pcm, frames * 2, &headers));
            assert_eq!(essence(&finals), essence(&reference), "{rate} Hz in chunks of {frames} frames");
        }
    }
}

#[test]
fn a_resumed_session_goes_on_as_the_undisturbed_one() {
    for (rate, format) in [(16_000, "pcm_s16le"), (44_100, "pcm_s16le;rate=44100"), (8_000, "pcm_s16le;rate=8000")] {
        let pcm = call(&PATTERN, rate);
        let options = SessionOptions { carry_prompt: true, ..SessionOptions::default() };
        for chunk in [200usize, 7_350, 44_100] {
            let log = entries(&pcm, chunk * 2, &[("Asr-Format", format)]);
            let whole = run(&options, StartPoint::beginning(), &log);
            for n in 0..whole.len() {
                let rest = run(&options, after(n, &whole[n]), &log);
                assert_eq!(rest, whole[n + 1..], "{rate} Hz, chunks of {chunk}, behind final {n}");
            }
        }
    }
}

#[test]
fn a_long_utterance_is_cut_and_long_silence_committed() {
    let pcm = call(&[(70_000, 80_000)], 16_000);
    let log = entries(&pcm, 32_000, &[]);
    let finals = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    check_chain(&finals, pcm.len() as u64 / 2);
    assert!(finals.iter().all(|f| f.to_sample - f.from_sample <= 31 * 16_000));
    assert!(!finals[0].speech_final && finals.iter().filter(|f| f.segments.is_empty()).count() >= 2);
    for n in 0..finals.len() {
        assert_eq!(run(&SessionOptions::default(), after(n, &finals[n]), &log), finals[n + 1..]);
    }
}

#[test]
fn flushes_force_a_final_once() {
    let flush = |seq| RawEntry { seq, headers: vec![("Asr-Flush".into(), "1".into())], payload: Default::default() };
    let pcm = call(&[(2_000, 0)], 16_000);
    let mut log = entries(&pcm, 6_400, &[]);
    let end = log.pop().expect("end");
    log.insert(5, flush(log[4].seq + 1));
    log.insert(6, flush(log[5].seq + 1));
    log.push(RawEntry { headers: [end.headers.clone(), vec![("Asr-Flush".into(), "1".into())]].concat(), ..end });
    let finals = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    check_chain(&finals, 32_000);
    assert_eq!(finals.len(), 2, "the second flush had nothing to do");
    assert_eq!((finals[0].to_sample, finals[0].audio.to_seq), (16_000, log[5].seq));
    for n in 0..finals.len() {
        assert_eq!(run(&SessionOptions::default(), after(n, &finals[n]), &log), finals[n + 1..]);
    }
}

#[test]
fn audio_goes_on_behind_an_end() {
    let pcm = call(&[(1_000, 800), (900, 0)], 16_000);
    let mut log = entries(&pcm[..40_000], 6_400, &[]);
    let first = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    let seq = log.last().expect("end").seq;
    log.extend(entries(&pcm[40_000..], 6_400, &[]).into_iter().map(|e| RawEntry { seq: e.seq + seq, ..e }));
    let whole = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    assert_eq!(whole, first, "nothing is used behind an end until the session is opened again");
    let rest = run(&SessionOptions::default(), after(first.len() - 1, first.last().expect("end")), &log);
    assert_eq!(rest.last().map(|f| (f.to_sample, f.end)), Some((pcm.len() as u64 / 2, true)));
    assert_eq!(rest[0].from_sample, 20_000);
}

#[test]
fn an_end_alone_is_a_final_of_no_length() {
    let log = entries(&[], 1, &[]);
    let finals = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    assert_eq!(essence(&finals), [(0, 0, String::new(), true, true)]);
    assert_eq!(run(&SessionOptions::default(), after(0, &finals[0]), &log), []);
}

#[test]
fn a_failed_decode_is_said_in_the_final() {
    let mut stream = SessionStream::new(&SessionOptions::default(), StartPoint::beginning(), Box::new(Loudness));
    entries(&call(&[(1_000, 0)], 16_000), 6_400, &[]).into_iter().for_each(|e| stream.push(e));
    assert!(matches!(stream.step(), Ok(Step::Final(_))));
    assert!(matches!(stream.step(), Ok(Step::Starved)), "it waits for the answer");
    let failed = Err(EngineError::Decode("no".into()));
    let draft = stream
        .complete(0, failed, Vec::new(), Listened::NotAsked, &RecognizerInfo::none(), Timings::default())
        .expect("draft");
    assert!(draft.end && draft.segments.is_empty() && draft.error.is_some());
    assert!(matches!(stream.step(), Ok(Step::Ended)));
}

#[test]
fn partials_follow_speech_and_stale_ones_are_dropped() {
    let mut stream = SessionStream::new(&SessionOptions::default(), StartPoint::beginning(), Box::new(Loudness));
    let log = entries(&call(&[(3_000, 0)], 16_000), 3_200, &[]);
    let mut windows = Vec::new();
    for entry in &log[..log.len() - 1] {
        stream.push(entry.clone());
        assert!(matches!(stream.step(), Ok(Step::Starved)));
        if let Some(window) = stream.partial_window() {
            let to = window.from_sample + window.samples.len() as u64;
            let partial = stream.partial_heard(&checksum(&window), to).expect("fresh");
            assert!(partial.committed.is_empty() && !partial.tentative.is_empty());
            windows.push(to);
        }
    }
    assert_eq!(windows, [16_000, 32_000, 48_000]);
    stream.push(log[log.len() - 1].clone());
    assert!(matches!(stream.step(), Ok(Step::Final(_))));
    assert!(!stream.partial_due() && stream.partial_heard(&Hypothesis::default(), 48_000).is_none());
}

#[test]
fn permits_come_back() {
    let pcm = call(&PATTERN, 16_000);
    let log = entries(&pcm, 6_400, &[]);
    let mut stream = SessionStream::new(&SessionOptions::default(), StartPoint::beginning(), Box::new(Loudness));
    let (mut given, mut back, mut most) = (0, 0, 0);
    for entry in log {
        given += entry.payload.len() as u64 + ENTRY_COST;
        stream.push(entry);
        while let Ok(Step::Final(_) | Step::Draft(_)) = stream.step() {
            stream.complete(
                0,
                Ok(Hypothesis::default()),
                Vec::new(),
                Listened::NotAsked,
                &RecognizerInfo::none(),
                Timings::default(),
            );
        }
        back += stream.take_consumed();
        most = most.max(given - back);
    }
    assert!(most < 200_000 && given - back <= 32_000, "{most} at most, {} at the end", given - back);
}

#[test]
fn flushes_that_are_done_are_not_kept() {
    let mut stream = SessionStream::new(&SessionOptions::default(), StartPoint::beginning(), Box::new(Loudness));
    let pcm = call(&[(900, 0)], 16_000);
    let mut log = entries(&pcm, 3_200, &[]);
    log.truncate(9);
    let flush = vec![("Asr-Flush".to_owned(), "1".to_owned())];
    log.extend((0..5_000).map(|n| RawEntry { seq: 1_000 + n, headers: flush.clone(), payload: Default::default() }));
    let (mut given, mut back) = (0, 0);
    let mut finals = Vec::new();
    for entry in &log {
        given += entry.payload.len() as u64 + ENTRY_COST;
        stream.push(entry.clone());
        while let Ok(Step::Final(windows)) = stream.step() {
            let heard = Ok(checksum(&windows[0]));
            finals.extend(stream.complete(
                0,
                heard,
                Vec::new(),
                Listened::NotAsked,
                &RecognizerInfo::none(),
                Timings::default(),
            ));
        }
        back += stream.take_consumed();
        assert!(given - back < 9 * (3_200 + ENTRY_COST) + 3 * ENTRY_COST, "{} bytes kept", given - back);
    }
    assert_eq!(finals.len(), 1, "the first flush ends the audio, the others have nothing to end");
    // What follows them is heard from the same resume point as by somebody who was never here before.
    log.extend(entries(&pcm, 3_200, &[]).into_iter().map(|e| RawEntry { seq: e.seq + 10_000, ..e }));
    let whole = run(&SessionOptions::default(), StartPoint::beginning(), &log);
    check_chain(&whole, 9 * 1_600 + pcm.len() as u64 / 2);
    for n in 0..whole.len() {
        assert_eq!(run(&SessionOptions::default(), after(n, &whole[n]), &log), whole[n + 1..]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Random calls, random cuts into chunks, random flushes: the same finals, resumed or not.
    #[test]
    fn any_log_resumes(
        pattern in prop::collection::vec((50u32..4_000, 0u32..2_500), 1..6),
        rate in prop::sample::select(vec![8_000u32, 16_000, 22_050, 48_000]),
        chunk_ms in 1usize..900,
        flush_at in 0usize..40,
    ) {
        let pcm = call(&pattern, rate);
        let format = format!("pcm_s16le;rate={rate}");
        let mut log = entries(&pcm, (chunk_ms * rate as usize / 1000) * 2, &[("Asr-Format", &format)]);
        if flush_at + 1 < log.len() {
            log[flush_at].headers.push(("Asr-Flush".into(), "1".into()));
        }
        let whole = run(&SessionOptions::default(), StartPoint::beginning(), &log);
        let frames = pcm.len() as u64 / 2;
        check_chain(&whole, frames * 16_000 / u64::from(rate));
        for n in 0..whole.len() {
            let rest = run(&SessionOptions::default(), after(n, &whole[n]), &log);
            prop_assert_eq!(&rest[..], &whole[n + 1..]);
        }
    }
}

/// Each final says "well-known", half of it by one and half by somebody else: the prompts of its windows.
fn prompts_of(diarize: Diarize) -> Vec<String> {
    let options = SessionOptions { carry_prompt: true, diarize, ..SessionOptions::default() };
    let mut stream = SessionStream::new(&options, StartPoint::beginning(), Box::new(Loudness));
    let mut prompts = Vec::new();
    for entry in entries(&call(&PATTERN, 16_000), 6_400, &[]) {
        stream.push(entry);
        while let Step::Final(windows) = stream.step().expect("this VAD cannot fail") {
            let [window] = &windows[..] else { panic!("one channel") };
            prompts.push(window.prompt.clone());
            let length = window.samples.len() as u64;
            let half = length / 32;
            let word =
                |text: &str, start_ms, end_ms| HeardWord { text: text.to_owned(), start_ms, end_ms, confidence: 1.0 };
            let words = vec![word("well", 0, half), word("-known", half, 2 * half)];
            let text = "well-known".to_owned();
            let segment = HeardSegment { end_ms: 2 * half, text, words, ..HeardSegment::default() };
            let heard = Hypothesis { segments: vec![segment], language: Some("en".into()), ..Hypothesis::default() };
            let piece = |track: u32, embedding: [f32; 2]| Voiced {
                from_sample: window.from_sample + u64::from(track) * length / 2,
                to_sample: window.from_sample + u64::from(track + 1) * length / 2,
                track,
                overlapped: false,
                embedding: Some(embedding.to_vec()),
                reliable_ms: 2_000,
            };
            let voiced = vec![piece(0, [1.0, 0.0]), piece(1, [0.0, 1.0])];
            let (by, encoder, took) = (SpeakersBy::Segmentation, "one".to_owned(), std::time::Duration::ZERO);
            let listened = match diarize {
                Diarize::Off => Listened::NotAsked,
                _ => Listened::Heard(Ok(Heard { voiced, by, why: None, encoder, took })),
            };
            let nobody = RecognizerInfo::none();
            let draft = stream.complete(0, Ok(heard), Vec::new(), listened, &nobody, Timings::default());
            let parts = draft.expect("one window").segments.len();
            assert_eq!(parts, if diarize == Diarize::Off { 1 } else { 2 });
        }
    }
    prompts
}

#[test]
fn prompts_do_not_depend_on_how_text_is_cut_for_its_speakers() {
    let prompts = prompts_of(Diarize::On);
    assert_eq!(prompts, prompts_of(Diarize::Off));
    assert_eq!(prompts.last().map(String::as_str), Some("well-known well-known well-known"));
}
