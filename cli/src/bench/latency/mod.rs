//! From the end of a word to its first partial and to its final, at one live session and at the most this CPU carries.
//!
//! Calls are streamed as they are spoken: a chunk is published when its last sample has been said. The clock of a word
//! starts when the chunk with its last sample is handed to the client library and stops when a plain NATS subscriber has
//! the message that shows it. What a listener waits beside that is what is left of the chunk, half of one on average.

mod search;

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, future::try_join_all};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use voxfleet_eval::{
    Edits,
    latency::{Arrival, Said, What, seen},
    text::compare,
};
use voxfleet_harness::{
    audio::{self, Pcm},
    find,
    fleet::{Engine, Fleet},
    load,
    producer::Producer,
};
use voxfleet_schema::transcript::join_text;

use self::search::Tails;
use super::{progress, rounded};
use crate::demo::report::quantile;

const CALLS: [u32; 4] = [1, 2, 4, 5];
pub(super) const MICRO: &str = "micro.en-q8_0";
/// Sessions of one round begin within this time, so that their turns do not coincide.
const SPREAD: Duration = Duration::from_secs(4);
/// For the last final, on a machine that is behind.
const LAST_WORDS: Duration = Duration::from_secs(20);
/// Beside the audio a round takes: starting the fleet, warming it up, the last final.
const ROUND_EXTRA: Duration = Duration::from_secs(12);
const BUDGET: Duration = Duration::from_secs(345);
const QUICK_BUDGET: Duration = Duration::from_secs(85);
/// Of each call with `--quick`; cut where nobody speaks.
const QUICK_MS: u64 = 17_000;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench latency
  voxfleet bench latency --quick --json
  voxfleet bench latency --sessions-max 1

It takes under six minutes, with --quick under one and a half; a busy machine carries fewer sessions.")]
pub(crate) struct LatencyArgs {
    /// Search no further than this
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000))]
    sessions_max: u64,
    /// Audio in one chunk
    #[arg(long, default_value_t = 200, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=1_000))]
    chunk_ms: u64,
    /// The first half of each call, and a coarser search
    #[arg(long)]
    quick: bool,
}

/// A call and what is said in it.
pub(super) struct Call {
    pub(super) pcm: Pcm,
    truth: Vec<Said>,
}

impl Call {
    /// Those that are streamed, each cut after so many ms where nobody speaks.
    pub(super) fn all(most_ms: Option<u64>) -> Result<Vec<Self>> {
        CALLS.iter().map(|n| Self::load(*n, most_ms)).collect()
    }

    fn load(number: u32, most_ms: Option<u64>) -> Result<Self> {
        let path = find::root().join(format!("tests/audio/call-{number:02}.json"));
        let mut call = Self { pcm: audio::call(number)?, truth: truth(&path)? };
        if let Some(most_ms) = most_ms {
            let cut_ms = pause_after(&call.truth, most_ms);
            call.truth.retain(|said| said.end_ms <= cut_ms);
            call.pcm.samples.truncate(usize::try_from(cut_ms * 16)?);
        }
        Ok(call)
    }
}

/// Words of a call's description, in the order they are said.
fn truth(path: &Path) -> Result<Vec<Said>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let call: Value = serde_json::from_str(&text)?;
    let turns = call["turns"].as_array().into_iter().flatten();
    let words = turns.flat_map(|turn| turn["words"].as_array().into_iter().flatten());
    let ms = |value: &Value| value.as_f64().map(|s| (s * 1_000.0).round() as u64);
    let said = words.map(|word| {
        Some(Said { word: word["word"].as_str()?.to_owned(), start_ms: ms(&word["start"])?, end_ms: ms(&word["end"])? })
    });
    let mut said =
        said.collect::<Option<Vec<_>>>().with_context(|| format!("{}: a word lacks a field", path.display()))?;
    said.sort_by_key(|said| said.start_ms);
    Ok(said)
}

/// The middle of the first pause of 300 ms or more after `from_ms`.
fn pause_after(truth: &[Said], from_ms: u64) -> u64 {
    let pause = truth.windows(2).find(|pair| pair[0].end_ms >= from_ms && pair[1].start_ms >= pair[0].end_ms + 300);
    pause.map_or_else(
        || truth.last().map_or(from_ms, |last| last.end_ms + 150),
        |pair| pair[0].end_ms.midpoint(pair[1].start_ms),
    )
}

pub(super) async fn run(args: LatencyArgs) -> Result<Value> {
    let started = Instant::now();
    let most_ms = args.quick.then_some(QUICK_MS);
    let calls = Call::all(most_ms)?;
    let budget = if args.quick { QUICK_BUDGET } else { BUDGET };
    let longest = calls.iter().map(|c| c.pcm.seconds()).fold(0.0, f64::max);
    let round_takes = Duration::from_secs_f64(longest) + SPREAD + ROUND_EXTRA;
    let most = usize::try_from(args.sessions_max)?;
    let (mut tried, mut rows, mut complete) = (Vec::new(), Vec::new(), true);
    let mut single = Tails::default();
    while let Some(sessions) = next(&tried, most, args.quick) {
        if !tried.is_empty() && started.elapsed() + round_takes > budget {
            complete = false;
            break;
        }
        progress(&format!("{sessions} live sessions for {longest:.0} s"));
        let round = measure(&calls, sessions, args.chunk_ms, &[]).await?;
        if sessions == 1 {
            single = round.tails.clone();
        }
        let trouble = round.trouble.clone().or_else(|| round.tails.too_late(&single).map(str::to_owned));
        progress(&format!("{sessions}: {}", trouble.as_deref().unwrap_or("carried")));
        tried.push((sessions, trouble.is_none()));
        rows.push((sessions, round.row(sessions, trouble)));
    }
    let held = tried.iter().filter(|(_, held)| *held).map(|(n, _)| *n).max();
    rows.sort_by_key(|(sessions, _)| *sessions);
    Ok(json!({
        "rows": rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>(),
        "sessions_held": held,
        "search_complete": complete,
        "chunk_ms": args.chunk_ms,
        "model": MICRO,
        "decode_states": cores(),
        "seconds": rounded(started.elapsed().as_secs_f64()),
    }))
}

/// One, then doubled and narrowed; in a hurry 1, 4 and 8.
fn next(tried: &[(usize, bool)], most: usize, quick: bool) -> Option<usize> {
    if !quick {
        return search::next(tried, most);
    }
    let all_held = tried.iter().all(|(_, held)| *held);
    [1, 4, 8].get(tried.len()).copied().filter(|n| *n <= most && all_held)
}

/// One decode state a core, of one thread each: more threads than cores would only spin.
pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).min(8)
}

/// What all sessions of one round gave.
#[derive(Default)]
pub(super) struct Round {
    /// From when a word was published to the first message that shows it, a partial or a final.
    pub(super) partial_ms: Vec<u64>,
    pub(super) final_ms: Vec<u64>,
    tails: Tails,
    /// Of all finals, over all sessions.
    pub(super) edits: Edits,
    pub(super) words: usize,
    missed: usize,
    pub(super) without_partial: usize,
    pub(super) trouble: Option<String>,
}

impl Round {
    fn row(&self, sessions: usize, trouble: Option<String>) -> Value {
        json!({
            "sessions": sessions,
            "partial_p50_ms": quantile(&self.partial_ms, 0.5),
            "partial_p95_ms": quantile(&self.partial_ms, 0.95),
            "final_p50_ms": quantile(&self.final_ms, 0.5),
            "final_p95_ms": quantile(&self.final_ms, 0.95),
            "last_word_final_p50_ms": quantile(&self.tails.0, 0.5),
            "last_word_final_p95_ms": quantile(&self.tails.0, 0.95),
            "words": self.words,
            "words_without_partial": self.without_partial,
            "words_missed": self.missed,
            "held": trouble.is_none(),
            "trouble": trouble,
        })
    }
}

/// One worker under so many sessions, told this beside what every such worker is told.
pub(super) async fn measure(
    calls: &[Call],
    sessions: usize,
    chunk_ms: u64,
    settings: &[(&str, String)],
) -> Result<Round> {
    let fleet = Fleet::builder()
        .workers(1)
        .slots(u32::try_from(sessions)? + 1)
        .engine(Engine::Micro)
        .set("worker.decode_states", cores())
        .set("worker.decode_threads", 1)
        // How many are too many is what is being measured: the dispatcher must not decide it from a slow warm-up.
        .set("dispatcher.min_decode_rate", 0);
    let fleet = settings.iter().fold(fleet, |fleet, (key, value)| fleet.set(key, value));
    let mut fleet = fleet.start().await?;
    warm_up(&fleet, &calls[0].pcm, chunk_ms).await?;
    let listened = (0..sessions).map(|n| {
        let begin = Instant::now() + SPREAD.mul_f64(n as f64 / sessions as f64);
        one(&fleet, n, &calls[n % calls.len()], chunk_ms, begin)
    });
    let listened = try_join_all(listened).await?;
    fleet.check_alive()?;
    let mut round = Round::default();
    let mut tails: Vec<(u64, u64)> = Vec::new();
    for (n, session) in listened.iter().enumerate() {
        let call = &calls[n % calls.len()];
        if !session.ended && round.trouble.is_none() {
            // Not a matter of speed alone, perhaps: what the processes say is gone with the fleet.
            progress(&format!("session {n} has not ended\n{}", fleet.logs()));
            round.trouble = Some(format!("no end final within {} s", LAST_WORDS.as_secs()));
        }
        let finals = session.arrivals.iter().filter(|arrival| arrival.what == What::Final);
        let text = join_text(finals.map(|arrival| arrival.text.as_str()));
        round.edits += compare(&join_text(call.truth.iter().map(|said| said.word.as_str())), &text);
        let offset = SPREAD.mul_f64(n as f64 / sessions as f64).as_millis() as u64;
        let mut last_words: Vec<(u64, u64)> = Vec::new();
        for (said, seen) in call.truth.iter().zip(seen(&call.truth, &session.arrivals)) {
            let published = session.published_ms(said.end_ms, chunk_ms);
            round.words += 1;
            round.partial_ms.extend(seen.first_ms.map(|at| at.saturating_sub(published)));
            round.final_ms.extend(seen.final_ms.map(|at| at.saturating_sub(published)));
            round.missed += usize::from(seen.final_ms.is_none());
            round.without_partial += usize::from(seen.first_ms.is_some() && !seen.in_partial);
            if let Some(at) = seen.final_ms {
                last_words.retain(|(final_at, _)| *final_at != at);
                last_words.push((at, published));
            }
        }
        tails.extend(last_words.iter().map(|(at, published)| (offset + at, at.saturating_sub(*published))));
    }
    tails.sort_unstable();
    round.tails = Tails(tails.into_iter().map(|(_, tail)| tail).collect());
    Ok(round)
}

/// Starts the engine child and loads its model, detector and every decode state.
async fn warm_up(fleet: &Fleet, pcm: &Pcm, chunk_ms: u64) -> Result<()> {
    let mut ends = load::Ends::listen(&fleet.client()).await?;
    let mut short = pcm.clone();
    short.samples.truncate(7 * 16_000);
    let name = |n: usize| format!("warm-{n}");
    // Several at once: one alone would keep only one decode state busy.
    let all = (0..cores()).map(|n| {
        let (client, short) = (fleet.client(), &short);
        async move { load::upload(client, &name(n), short, chunk_ms, &[]).await }
    });
    try_join_all(all).await?;
    ends.wait((0..cores()).map(name), Duration::from_secs(60)).await?;
    Ok(())
}

/// One session as it was published and heard.
struct Listened {
    /// When each chunk was published, in ms since the call began.
    chunks_ms: Vec<u64>,
    arrivals: Vec<Arrival>,
    ended: bool,
}

impl Listened {
    /// When the sound at `ms` was published.
    fn published_ms(&self, ms: u64, chunk_ms: u64) -> u64 {
        let chunk = (ms.div_ceil(chunk_ms).max(1) - 1) as usize;
        self.chunks_ms.get(chunk).or(self.chunks_ms.last()).copied().unwrap_or_default()
    }
}

async fn one(fleet: &Fleet, n: usize, call: &Call, chunk_ms: u64, begin: Instant) -> Result<Listened> {
    let session = format!("latency-{n}");
    let client = fleet.client();
    let mut heard = client.subscribe(format!("asr.v1.transcript.session.{session}.>")).await?;
    client.flush().await?;
    let since = move || u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    let sending = async {
        let mut producer = Producer::named(fleet.js(), &session, "s1");
        let (bytes, size) = (bytes::Bytes::from(call.pcm.bytes()), call.pcm.chunk_bytes(chunk_ms));
        let mut chunks_ms = Vec::new();
        for (from, spoken) in (0..bytes.len()).step_by(size).zip(1u32..) {
            sleep_until(begin + Duration::from_millis(chunk_ms) * spoken).await;
            chunks_ms.push(since());
            producer.send(bytes.slice(from..(from + size).min(bytes.len())), &[]).await?;
        }
        producer.end().await?;
        Ok::<_, anyhow::Error>(chunks_ms)
    };
    let mut arrivals = Vec::new();
    let listening = async {
        while let Some(message) = heard.next().await {
            let at_ms = since();
            let value: Value = serde_json::from_slice(&message.payload)?;
            arrivals.extend(arrival(message.subject.as_str(), &value, at_ms));
            if value["end"] == true {
                return Ok(());
            }
        }
        Err(anyhow::anyhow!("{session}: the connection closed before its end final"))
    };
    let until = begin + Duration::from_secs_f64(call.pcm.seconds()) + LAST_WORDS;
    let listening = async {
        match tokio::time::timeout_at(until, listening).await {
            Ok(ended) => ended.map(|()| true),
            Err(_) => Ok(false),
        }
    };
    let (chunks_ms, ended) = tokio::try_join!(sending, listening)?;
    ensure!(!chunks_ms.is_empty(), "{session}: nothing was sent");
    Ok(Listened { chunks_ms, arrivals, ended })
}

/// Partials and finals; other messages of a transcript show no words.
fn arrival(subject: &str, value: &Value, at_ms: u64) -> Option<Arrival> {
    let to_ms = value["to_sample"].as_u64()? / 16;
    let part = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
    match subject.rsplit('.').next()? {
        "partial" => Some(Arrival {
            at_ms,
            to_ms,
            text: format!("{} {}", part("committed"), part("tentative")),
            what: What::Partial { finals_before: value["after_index"].as_u64().map_or(0, |n| n as usize + 1) },
        }),
        "final" => {
            let segments = value["segments"].as_array().into_iter().flatten();
            let text = segments.filter_map(|s| s["text"].as_str()).collect::<Vec<_>>().join(" ");
            Some(Arrival { at_ms, to_ms, text, what: What::Final })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(start_ms: u64, end_ms: u64) -> Said {
        Said { word: "a".to_owned(), start_ms, end_ms }
    }

    #[test]
    fn a_word_is_published_with_the_chunk_of_its_last_sample() {
        let session = Listened { chunks_ms: vec![201, 402, 600], arrivals: Vec::new(), ended: true };
        let table = [(0, 201), (1, 201), (200, 201), (201, 402), (600, 600), (5_000, 600)];
        for (ms, published) in table {
            assert_eq!(session.published_ms(ms, 200), published, "{ms}");
        }
    }

    #[test]
    fn a_call_is_cut_where_nobody_speaks() {
        let truth = [said(0, 500), said(550, 1_000), said(1_400, 2_000), said(2_100, 2_500)];
        assert_eq!(pause_after(&truth, 600), 1_200);
        assert_eq!(pause_after(&truth, 100), 1_200, "50 ms are no pause");
        assert_eq!(pause_after(&truth, 1_500), 2_650);
        assert_eq!(pause_after(&[], 700), 700);
    }

    #[test]
    fn the_calls_are_described_word_by_word() {
        for number in CALLS {
            let call = Call::load(number, None).expect("a call");
            let text = audio::call_text(number).expect("its text");
            let words: Vec<&str> = call.truth.iter().map(|s| s.word.as_str()).collect();
            assert_eq!(words, text.split_whitespace().collect::<Vec<_>>());
            let half = Call::load(number, Some(QUICK_MS)).expect("half a call");
            assert!(half.truth.len() < call.truth.len() && half.pcm.seconds() < 22.0);
        }
    }

    #[test]
    fn messages_show_what_they_cover() {
        let partial = json!({"after_index": 2, "to_sample": 32_000, "committed": "good", "tentative": "morning"});
        let found = arrival("asr.v1.transcript.session.a.partial", &partial, 7).expect("a partial");
        assert_eq!((found.to_ms, found.text.as_str()), (2_000, "good morning"));
        assert_eq!(found.what, What::Partial { finals_before: 3 });
        let last = json!({"to_sample": 16_000, "segments": [{"text": "a b"}, {"text": "c"}]});
        let found = arrival("asr.v1.transcript.session.a.final", &last, 9).expect("a final");
        assert_eq!((found.at_ms, found.text.as_str(), found.what), (9, "a b c", What::Final));
        assert_eq!(arrival("asr.v1.transcript.session.a.event", &last, 9), None);
    }

    #[test]
    fn in_a_hurry_three_numbers_must_do() {
        let quick = |tried: &[(usize, bool)], most| next(tried, most, true);
        assert_eq!(quick(&[], 64), Some(1));
        assert_eq!(quick(&[(1, true)], 64), Some(4));
        assert_eq!(quick(&[(1, true), (4, false)], 64), None);
        assert_eq!(quick(&[(1, true)], 2), None);
    }
}
