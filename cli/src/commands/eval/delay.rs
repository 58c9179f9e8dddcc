//! From the end of a word to the moment it was shown.

use serde_json::{Value, json};
use voxfleet_eval::{
    latency::{Arrival, Published, Said, Spread, What, delays, seen},
    text::Normalise,
};
use voxfleet_schema::{SAMPLE_RATE_HZ, transcript::join_text};

use super::{
    content::{Content, ContentError},
    files::pairs,
};
use crate::{
    args::LatencyArgs,
    exit::Exit,
    transcript::screen::{object, out},
};

const ENDINGS: [&[&str]; 2] = [&["json", "jsonl"], &["jsonl"]];

/// Delays of one recording, in ms.
#[derive(Debug, Default, PartialEq)]
struct Delays {
    words: usize,
    /// To the first message that had the word: a partial, or the final.
    shown: Vec<i64>,
    /// To its final, after which it does not change.
    settled: Vec<i64>,
}

pub(super) fn run(args: &LatencyArgs) -> anyhow::Result<Exit> {
    let mut all = Delays::default();
    for pair in pairs(&args.sides, ENDINGS)? {
        let truth = truth(&pair.reference.content).map_err(|error| pair.reference.refused(error))?;
        let found = measure(&truth, &pair.heard.content).map_err(|error| pair.heard.refused(error))?;
        all.words += found.words;
        all.shown.extend(found.shown);
        all.settled.extend(found.settled);
    }
    let (shown, settled) = (Spread::of(&all.shown), Spread::of(&all.settled));
    if args.output.json {
        object(&json!({
            "words": all.words, "heard": all.shown.len().max(all.settled.len()),
            "first": shown.map(figures), "final": settled.map(figures),
        }))?;
        return Ok(Exit::Ok);
    }
    for (what, spread) in [("first shown", shown), ("final", settled)] {
        if let Some(s) = spread {
            out(&format!(
                "{what}: {} of {} words, ms after their end: p50 {}, p90 {}, p95 {}, p99 {}, most {}",
                s.count, all.words, s.p50, s.p90, s.p95, s.p99, s.max
            ))?;
        }
    }
    if shown.is_none() && settled.is_none() {
        out(&format!("none of {} words was shown", all.words))?;
    }
    Ok(Exit::Ok)
}

fn figures(s: Spread) -> Value {
    json!({
        "count": s.count, "mean_ms": s.mean, "p50_ms": s.p50, "p90_ms": s.p90, "p95_ms": s.p95, "p99_ms": s.p99,
        "max_ms": s.max,
    })
}

fn truth(content: &Content) -> Result<Vec<Said>, ContentError> {
    let words = content.timed()?.into_iter();
    let said = words.flat_map(|(word, start_ms, end_ms)| {
        Normalise::Basic.words(&word).into_iter().map(move |word| Said { word, start_ms, end_ms })
    });
    Ok(said.collect())
}

fn measure(truth: &[Said], heard: &Content) -> Result<Delays, ContentError> {
    let Content::Lines(lines) = heard else { return Err(ContentError::Lacks("lines of JSON objects")) };
    let words = truth.len();
    if lines.iter().all(|line| line.get("at_ms").is_some()) {
        let shown = delays(truth, &published(lines)?);
        return Ok(Delays { words, shown, settled: Vec::new() });
    }
    let arrivals = arrivals(lines)?;
    let after = |at: Option<u64>, said: &Said| Some(at? as i64 - said.end_ms as i64);
    let seen = seen(truth, &arrivals);
    let both = || truth.iter().zip(&seen);
    Ok(Delays {
        words,
        shown: both().filter_map(|(said, seen)| after(seen.first_ms, said)).collect(),
        settled: both().filter_map(|(said, seen)| after(seen.final_ms, said)).collect(),
    })
}

fn published(lines: &[Value]) -> Result<Vec<Published>, ContentError> {
    let word = |line: &Value| {
        let at_ms = line["at_ms"].as_u64()?;
        let words = Normalise::Basic.words(line["word"].as_str()?);
        Some(words.into_iter().map(move |word| Published { word, at_ms }))
    };
    let words = lines.iter().map(word).collect::<Option<Vec<_>>>();
    Ok(words.ok_or(ContentError::Lacks("word and at_ms on every line"))?.into_iter().flatten().collect())
}

/// What `stream --json` printed, on the clock of the audio: a partial came when so much audio had been logged, a final so
/// long after its last word as it says.
fn arrivals(lines: &[Value]) -> Result<Vec<Arrival>, ContentError> {
    let ms = |samples: &Value| Some(samples.as_u64()? * 1000 / u64::from(SAMPLE_RATE_HZ));
    let mut finals = 0;
    let mut found = Vec::new();
    for line in lines {
        let arrival = match line["type"].as_str() {
            Some("final") => {
                let value = &line["final"];
                let segments = value["segments"].as_array().map_or(&[][..], Vec::as_slice);
                finals += 1;
                let Some(last) = segments.last() else {
                    found.push(Arrival { at_ms: 0, to_ms: 0, text: String::new(), what: What::Final });
                    continue;
                };
                let at_ms = last["end_ms"].as_u64().zip(line["lag_ms"].as_u64()).map(|(end, lag)| end + lag);
                let text = join_text(segments.iter().filter_map(|s| s["text"].as_str()));
                at_ms.zip(ms(&value["to_sample"])).map(|(at_ms, to_ms)| Arrival {
                    at_ms,
                    to_ms,
                    text,
                    what: What::Final,
                })
            }
            Some("partial") => {
                let value = &line["partial"];
                let text = join_text(["committed", "tentative"].iter().filter_map(|part| value[*part].as_str()));
                let what = What::Partial { finals_before: finals };
                let to_ms = ms(&value["to_sample"]);
                to_ms.zip(value["lag_ms"].as_u64()).map(|(to_ms, lag)| Arrival {
                    at_ms: to_ms + lag,
                    to_ms,
                    text,
                    what,
                })
            }
            // Moves and events.
            Some(_) => continue,
            None => None,
        };
        found.push(arrival.ok_or(ContentError::Lacks("lag_ms: `voxfleet stream --wait --json` says it; it is not"))?);
    }
    if found.is_empty() { Err(ContentError::Lacks("finals or partials")) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Content {
        Content::of(text).expect("a file")
    }

    const SAID: &str = "{\"word\": \"Good\", \"start_ms\": 100, \"end_ms\": 400}\n{\"word\": \"day\", \"start_ms\": 400, \"end_ms\": 900}\n";

    #[test]
    fn words_that_carry_their_time() {
        let truth = truth(&of(SAID)).expect("times");
        let found =
            measure(&truth, &of("{\"word\": \"good\", \"at_ms\": 650}\n{\"word\": \"night\", \"at_ms\": 990}\n"));
        assert_eq!(found.expect("delays"), Delays { words: 2, shown: vec![250], settled: vec![] });
    }

    #[test]
    fn what_a_stream_printed() {
        let truth = truth(&of(SAID)).expect("times");
        let partial = |to: u64, text: &str, lag: u64| json!({"type": "partial", "partial": {"to_sample": to * 16, "committed": "", "tentative": text, "lag_ms": lag}});
        let last = json!({"type": "final", "lag_ms": 600, "final":
            {"to_sample": 24_000, "segments": [{"end_ms": 900, "text": "good day"}]}});
        let moved = json!({"type": "moved", "id": "s"});
        let lines = [partial(500, "good", 100), moved, partial(1_000, "good day", 150), last];
        let text = lines.iter().map(|l| l.to_string() + "\n").collect::<String>();
        let found = measure(&truth, &of(&text)).expect("delays");
        assert_eq!(found, Delays { words: 2, shown: vec![200, 250], settled: vec![1_100, 600] });
    }

    #[test]
    fn what_says_nothing_of_time_is_refused() {
        let truth = truth(&of(SAID)).expect("times");
        let watched = r#"{"type": "final", "final": {"to_sample": 1, "segments": [{"end_ms": 9, "text": "x"}]}}"#;
        assert!(measure(&truth, &of(watched)).expect_err("no lag").to_string().contains("lag_ms"));
        assert!(measure(&truth, &of("good day")).is_err());
        assert!(measure(&truth, &of(r#"{"type": "moved"}"#)).is_err());
    }
}
