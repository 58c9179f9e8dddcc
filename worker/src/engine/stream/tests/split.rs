//! Channels heard one by one.

use voxfleet_schema::{session::Channels, transcript::SpeakersBy};

use super::*;

fn split() -> SessionOptions {
    SessionOptions { channels: Channels::Split, ..SessionOptions::default() }
}

/// Interleaves calls, each a channel; shorter ones are silent at their end.
fn together(channels: &[Vec<u8>]) -> Vec<u8> {
    let frames = channels.iter().map(|pcm| pcm.len() / 2).max().unwrap_or(0);
    let sample = |pcm: &[u8], n: usize| pcm.get(2 * n..2 * n + 2).map_or([0, 0], |s| [s[0], s[1]]);
    (0..frames).flat_map(|n| channels.iter().flat_map(move |pcm| sample(pcm, n))).collect()
}

/// Silence first, then noise bursts and pauses.
fn after_silence(ms: u32, pattern: &[(u32, u32)], rate_hz: u32) -> Vec<u8> {
    call(&[&[(0, ms)], pattern].concat(), rate_hz)
}

const SECOND: [(u32, u32); 4] = [(1_400, 2_100), (800, 400), (3_200, 1_900), (500, 0)];

fn whole(log: &[RawEntry]) -> Vec<FinalDraft> {
    run(&split(), StartPoint::beginning(), log)
}

/// What was said by whom: checksums of each window, wherever finals were cut.
fn said(finals: &[FinalDraft]) -> Vec<(Option<u16>, u64, String)> {
    finals.iter().flat_map(|f| &f.segments).map(|s| (s.channel, s.start_ms, s.text.clone())).collect()
}

fn check_resumes(log: &[RawEntry], whole: &[FinalDraft]) {
    for n in 0..whole.len() {
        assert_eq!(run(&split(), after(n, &whole[n]), log), whole[n + 1..], "behind final {n}");
    }
}

#[test]
fn where_nobody_listens_channels_are_told_apart() {
    let auto = SessionOptions { diarize: voxfleet_schema::session::Diarize::Auto, ..SessionOptions::default() };
    let unheard = |start: StartPoint, log: &[RawEntry]| {
        let first = start.first_seq();
        through(SessionStream::by_channels(&auto, start, Box::new(Loudness), "no room".to_owned()), first, log)
    };
    let (one, other) = (call(&PATTERN, 16_000), after_silence(1_000, &SECOND, 16_000));
    let stereo = entries(&together(&[one.clone(), other]), 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]);
    let split = whole(&stereo);
    let finals = unheard(StartPoint::beginning(), &stereo);
    assert_eq!((essence(&finals), said(&finals)), (essence(&split), said(&split)));
    let told: Vec<_> = finals.iter().filter_map(|f| f.speakers.clone()).map(|s| (s.by, s.why)).collect();
    assert_eq!(told, vec![(SpeakersBy::Channels, Some("no room".to_owned())); finals.len()]);
    // Labels that were shown before stay taken.
    let mut start = after(1, &finals[1]);
    if let Some(speakers) = start.after.as_mut().and_then(|after| after.speakers.as_mut()) {
        speakers.labels = 3;
    }
    let rest = unheard(start, &stereo);
    assert!(rest.iter().all(|f| f.speakers.as_ref().is_some_and(|s| s.labels == 3)));
    // Of one channel nobody knows who speaks, and it is what it is without them.
    let mono = entries(&one, 6_400, &[]);
    let finals = unheard(StartPoint::beginning(), &mono);
    assert_eq!(essence(&finals), essence(&run(&SessionOptions::default(), StartPoint::beginning(), &mono)));
    assert!(finals.iter().all(|f| f.turns.is_empty() && f.segments.iter().all(|s| s.speaker.is_none())));
    assert!(finals.iter().all(|f| f.speakers.as_ref().is_some_and(|s| s.by == SpeakersBy::None)));
}

#[test]
fn a_final_covers_all_channels_and_names_them() {
    let pcm = together(&[call(&PATTERN, 16_000), after_silence(1_000, &SECOND, 16_000)]);
    let finals = whole(&entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]));
    check_chain(&finals, pcm.len() as u64 / 4);
    assert!(finals.iter().all(|f| f.speakers.as_ref().is_some_and(|s| s.by == SpeakersBy::Channels)));
    // One turn for each window.
    let turns: Vec<(String, u64)> =
        finals.iter().flat_map(|f| &f.turns).map(|t| (t.speaker.clone(), t.start_ms)).collect();
    assert_eq!(turns.len(), said(&finals).len());
    assert!(turns.iter().zip(said(&finals)).all(|((speaker, at), (channel, from, _))| {
        *speaker == format!("ch{}", channel.expect("a channel")) && (from..from + 151).contains(at)
    }));
    let speakers = |f: &FinalDraft| -> Vec<String> { f.segments.iter().flat_map(|s| s.speaker.clone()).collect() };
    assert!(finals.iter().any(|f| speakers(f).contains(&"ch0".into()) && speakers(f).contains(&"ch1".into())));
    for f in &finals {
        assert!(
            f.segments.iter().zip(0..).all(|(s, id)| s.id == id && s.start_ms * 16 >= f.from_sample.saturating_sub(15))
        );
        assert!(f.segments.windows(2).all(|two| two[0].start_ms <= two[1].start_ms));
        assert!(f.segments.iter().all(|s| s.speaker == s.channel.map(|c| format!("ch{c}"))));
    }
    // A final ends where both are silent, so it has fewer of them than either channel has pauses.
    assert_eq!(said(&finals).iter().filter(|(channel, ..)| *channel == Some(0)).count(), 4);
    assert_eq!(said(&finals).iter().filter(|(channel, ..)| *channel == Some(1)).count(), 3, "400 ms is no pause");
}

#[test]
fn one_channel_is_what_it_is_without_splitting() {
    for (rate, format) in [(16_000, "pcm_s16le"), (48_000, "pcm_s16le;rate=48000")] {
        let log = entries(&call(&PATTERN, rate), 6_400, &[("Asr-Format", format)]);
        let mixed = run(&SessionOptions::default(), StartPoint::beginning(), &log);
        let mut apart = whole(&log);
        for draft in &mut apart {
            assert_eq!(std::mem::take(&mut draft.turns).len(), draft.segments.len());
            assert_eq!(draft.speakers.take().map(|s| s.by), Some(SpeakersBy::Channels));
        }
        for segment in apart.iter_mut().flat_map(|f| &mut f.segments) {
            assert_eq!((segment.channel.take(), segment.speaker.take().as_deref()), (Some(0), Some("ch0")));
        }
        assert_eq!(apart, mixed, "{rate} Hz");
    }
}

#[test]
fn each_channel_says_what_it_says_alone() {
    // Never silent together for long, so one final holds all utterances of both.
    let (first, second) = (
        call(&[(2_000, 1_500), (1_800, 1_700), (900, 0)], 16_000),
        after_silence(1_900, &[(1_700, 1_600), (1_900, 600)], 16_000),
    );
    let pcm = together(&[first.clone(), second.clone()]);
    let finals = whole(&entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]));
    assert_eq!(finals.iter().filter(|f| !f.segments.is_empty()).count(), 1, "{:?}", essence(&finals));
    for (channel, pcm) in [(0, first), (1, second)] {
        let alone = run(&SessionOptions::default(), StartPoint::beginning(), &entries(&pcm, 6_400, &[]));
        let alone: Vec<u64> = said(&alone).into_iter().map(|(_, at, _)| at).collect();
        let together = said(&finals).into_iter().filter(|(c, ..)| *c == Some(channel));
        let together: Vec<u64> = together.map(|(_, at, _)| at).collect();
        assert_eq!((together.len(), alone.len()), (2 + usize::from(channel == 0), together.len()));
        // Alone, its frames begin anew behind each of its pauses.
        assert!(together.iter().zip(&alone).all(|(a, b)| a.abs_diff(*b) <= 32), "{together:?} {alone:?}");
        assert_eq!(together[0], alone[0]);
    }
}

#[test]
fn neither_chunks_nor_moves_change_what_is_heard() {
    for (rate, format) in [(16_000, "pcm_s16le;channels=3"), (44_100, "pcm_s16le;rate=44100;channels=3")] {
        let channels = [
            call(&PATTERN, rate),
            after_silence(700, &[(1_400, 4_000), (500, 4_000), (1_000, 0)], rate),
            after_silence(5_000, &[(200, 3_000), (40, 4_000), (900, 400)], rate),
        ];
        let pcm = together(&channels);
        let headers = [("Asr-Format", format)];
        let reference = whole(&entries(&pcm, pcm.len(), &headers));
        check_chain(&reference, pcm.len() as u64 / 6 * 16_000 / u64::from(rate));
        assert!(reference.len() > 2, "{:?}", essence(&reference));
        for frames in [97, 3_200, 48_001] {
            let log = entries(&pcm, frames * 6, &headers);
            let finals = whole(&log);
            assert_eq!(essence(&finals), essence(&reference), "{rate} Hz in chunks of {frames} frames");
            check_resumes(&log, &finals);
        }
    }
}

#[test]
fn people_who_never_pause_together_are_cut_and_lose_nothing() {
    let turn = |n: u32| (1_700, if n == 0 { 2_000 } else { 1_900 });
    let first: Vec<(u32, u32)> = (0..18).map(turn).collect();
    let pcm = together(&[call(&first, 16_000), after_silence(1_850, &first, 16_000)]);
    let log = entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]);
    let finals = whole(&log);
    check_chain(&finals, pcm.len() as u64 / 4);
    let full: Vec<&FinalDraft> = finals.iter().filter(|f| !f.speech_final).collect();
    assert!(
        full.len() >= 2 && full.iter().all(|f| f.to_sample - f.from_sample <= 29 * 16_000),
        "{:?}",
        essence(&finals)
    );
    assert_eq!(said(&finals).len(), 36, "each turn is heard once: cuts fall between them");
    check_resumes(&log, &finals);
}

#[test]
fn channels_come_and_go_with_their_format() {
    let mono = call(&[(900, 900), (800, 200)], 16_000);
    let stereo = together(&[call(&[(700, 100), (900, 1_100)], 8_000), after_silence(300, &[(1_500, 800)], 8_000)]);
    let mut log = entries(&mono, 3_200, &[("Asr-Format", "pcm_s16le")]);
    log.pop();
    let seq = log.last().expect("audio").seq;
    log.extend(entries(&stereo, 3_200, &[("Asr-Format", "pcm_s16le;rate=8000;channels=2")]));
    log.pop();
    log.extend(entries(&mono, 1_600, &[("Asr-Format", "pcm_s16le")]));
    log.iter_mut().zip(1u64..).for_each(|(entry, n)| entry.seq = seq + 3 * n);
    let finals = whole(&log);
    check_chain(&finals, (2 * mono.len() / 2 + stereo.len() / 4 * 2) as u64);
    let channels: Vec<_> = said(&finals).into_iter().map(|(channel, ..)| channel).collect();
    assert!(channels.contains(&Some(1)) && channels.ends_with(&[Some(0), Some(0)]), "{channels:?}");
    check_resumes(&log, &finals);
}

#[test]
fn flushes_and_ends_end_all_channels() {
    let pcm = together(&[call(&[(2_000, 0)], 16_000), after_silence(500, &[(1_500, 0)], 16_000)]);
    let mut log = entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]);
    log[9].headers.push(("Asr-Flush".into(), "1".into()));
    let finals = whole(&log);
    check_chain(&finals, 32_000);
    assert_eq!(finals.iter().map(|f| (f.to_sample, f.segments.len())).collect::<Vec<_>>(), [(16_000, 2), (32_000, 2)]);
    check_resumes(&log, &finals);
}

#[test]
fn a_channel_that_could_not_be_decoded_leaves_the_others_their_text() {
    let mut stream = SessionStream::new(&split(), StartPoint::beginning(), Box::new(Loudness));
    let pcm = together(&[call(&[(2_000, 0)], 16_000), after_silence(500, &[(1_500, 0)], 16_000)]);
    let log = entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]);
    log.into_iter().for_each(|e| stream.push(e));
    let Ok(Step::Final(windows)) = stream.step() else { panic!("both speak") };
    assert_eq!(windows.len(), 2);
    let nobody = RecognizerInfo::none();
    let failed = Err(EngineError::Decode("no".into()));
    assert!(stream.complete(1, failed, Vec::new(), Listened::NotAsked, &nobody, Timings::default()).is_none());
    assert!(matches!(stream.step(), Ok(Step::Starved)), "it waits for the other answer");
    let draft = stream
        .complete(0, Ok(checksum(&windows[0])), Vec::new(), Listened::NotAsked, &nobody, Timings::default())
        .expect("draft");
    assert_eq!(draft.segments.iter().map(|s| s.channel).collect::<Vec<_>>(), [Some(0)]);
    assert!(draft.end && draft.error.as_ref().is_some_and(|e| e.message.contains("channel 1")), "{:?}", draft.error);
    assert!(matches!(stream.step(), Ok(Step::Ended)));
}

#[test]
fn both_channels_have_partials_and_what_is_committed_stays() {
    let mut stream = SessionStream::new(&split(), StartPoint::beginning(), Box::new(Loudness));
    let pcm = together(&[call(&[(6_000, 0)], 16_000), after_silence(1_500, &[(1_300, 0)], 16_000)]);
    let log = entries(&pcm, 6_400, &[("Asr-Format", "pcm_s16le;channels=2")]);
    let (mut windows, mut committed) = (Vec::new(), String::new());
    let words = |window: &Window| {
        let words = (window.from_sample..window.from_sample + window.samples.len() as u64).step_by(8_000);
        let text = words.map(|at| format!("{}-{}", window.from_sample, at / 8_000)).collect::<Vec<_>>().join(" ");
        Hypothesis { segments: vec![HeardSegment { text, ..HeardSegment::default() }], ..Hypothesis::default() }
    };
    for entry in &log[..log.len() - 1] {
        stream.push(entry.clone());
        assert!(matches!(stream.step(), Ok(Step::Starved)));
        while let Some(window) = stream.partial_window() {
            let to = window.from_sample + window.samples.len() as u64;
            let partial = stream.partial_heard(&words(&window), to).expect("fresh");
            assert!(partial.committed.starts_with(&committed), "{committed:?}, then {:?}", partial.committed);
            committed = partial.committed;
            windows.push((window.from_sample, to));
        }
    }
    let of_second: Vec<u64> = windows.iter().filter(|(from, _)| *from > 0).map(|(_, to)| *to).collect();
    // A second after it began, once more when it was over, and never again while the other goes on.
    assert_eq!(of_second.len(), 2, "{windows:?}");
    assert_eq!(windows.len() - of_second.len(), 6, "{windows:?}");
    assert!(committed.contains("0-5") && committed.split(' ').any(|word| !word.starts_with("0-")), "{committed}");
}

#[test]
fn many_channels_are_held_in_bounded_memory() {
    let channels: Vec<Vec<u8>> = (0..32).map(|n| after_silence(n * 200, &[(70_000, 0)], 16_000)).collect();
    let pcm = together(&channels);
    let log = entries(&pcm, 32 * 6_400, &[("Asr-Format", "pcm_s16le;channels=32")]);
    let mut stream = SessionStream::new(&split(), StartPoint::beginning(), Box::new(Loudness));
    let (mut given, mut back, mut most, mut finals, mut decoded) = (0, 0, 0, 0, 0);
    for entry in log {
        given += entry.payload.len() as u64 + ENTRY_COST;
        stream.push(entry);
        while let Ok(Step::Final(windows)) = stream.step() {
            decoded = decoded.max(windows.iter().map(|w| size_of_val(w.samples.as_slice())).sum());
            for (part, window) in windows.iter().enumerate() {
                stream.complete(
                    part,
                    Ok(checksum(window)),
                    Vec::new(),
                    Listened::NotAsked,
                    &RecognizerInfo::none(),
                    Timings::default(),
                );
            }
            finals += 1;
        }
        back += stream.take_consumed();
        most = most.max(given - back);
    }
    assert!(finals > 8, "{finals}");
    assert!(most < 16 << 20 && decoded <= 13 << 20, "{most} bytes held, {decoded} decoded at once");
}

#[test]
fn more_than_can_be_split_is_refused_with_its_reason() {
    let mut stream = SessionStream::new(&split(), StartPoint::beginning(), Box::new(Loudness));
    let log = entries(&vec![0; 64 * 4 * 1_920], 64 * 4 * 1_920, &[("Asr-Format", "pcm_f32le;rate=192000;channels=64")]);
    log.into_iter().for_each(|e| stream.push(e));
    let refused = stream.step();
    assert!(matches!(&refused, Err(EngineError::Unsupported(why)) if why.contains("channels=mix")), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Random people on random channels, random cuts into chunks, random flushes: the same finals, resumed or not.
    #[test]
    fn any_log_of_channels_resumes(
        patterns in prop::collection::vec(prop::collection::vec((50u32..4_000, 0u32..2_500), 1..5), 1..4),
        rate in prop::sample::select(vec![8_000u32, 16_000, 48_000]),
        chunk_ms in 1usize..900,
        flush_at in 0usize..40,
    ) {
        let channels: Vec<Vec<u8>> = patterns.iter().map(|pattern| call(pattern, rate)).collect();
        let pcm = together(&channels);
        let frame = 2 * channels.len();
        let format = format!("pcm_s16le;rate={rate};channels={}", channels.len());
        let log = |chunk_ms: usize| {
            entries(&pcm, (chunk_ms * rate as usize / 1_000) * frame, &[("Asr-Format", format.as_str())])
        };
        let finals = whole(&log(chunk_ms));
        let frames = (pcm.len() / frame) as u64;
        check_chain(&finals, frames * 16_000 / u64::from(rate));
        prop_assert_eq!(essence(&finals), essence(&whole(&log(100))));
        let mut log = log(chunk_ms);
        if flush_at + 1 < log.len() {
            log[flush_at].headers.push(("Asr-Flush".into(), "1".into()));
        }
        check_resumes(&log, &whole(&log));
    }
}
