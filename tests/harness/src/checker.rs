//! The independent checker: reads a session's audio and transcript with plain NATS calls and its own reading of the
//! contract, and says everything that does not fit.
//!
//! It shares no code with the product. Its reading of the audio log covers PCM in its two encodings at any rate, ends and
//! flushes; sessions whose producers misbehave (duplicates, bad chunks) are checked with the number of samples told.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

use async_nats::{
    HeaderMap,
    jetstream::{self, stream::LastRawMessageErrorKind},
};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;

use crate::{Error, Result};

const MAX_FINAL_BYTES: usize = 256 * 1024;
/// A stream that gives nothing for so long has lost its server, or what it promised to give was purged.
const READ_WAIT: Duration = Duration::from_secs(30);
/// Longer than the leader of a stream takes to be elected on a busy machine.
const ELECTIONS: Duration = Duration::from_secs(20);

/// One entry of `ASR_AUDIO`.
#[derive(Debug, Clone)]
pub struct LogEntry {
    pub seq: u64,
    pub headers: BTreeMap<String, String>,
    pub bytes: usize,
}

/// One stored final.
#[derive(Debug, Clone)]
pub struct StoredFinal {
    pub seq: u64,
    pub headers: BTreeMap<String, String>,
    pub bytes: usize,
    pub json: Value,
}

impl StoredFinal {
    fn number(&self, field: &str) -> Option<u64> {
        self.json[field].as_u64()
    }

    /// Its segments' text, joined by spaces.
    pub fn text(&self) -> String {
        let segments = self.json["segments"].as_array().map(Vec::as_slice).unwrap_or_default();
        let texts = segments.iter().filter_map(|s| s["text"].as_str()).map(str::trim).filter(|t| !t.is_empty());
        texts.collect::<Vec<_>>().join(" ")
    }

    pub fn is_end(&self) -> bool {
        self.json["end"] == true
    }
}

/// What was read and what is wrong with it.
#[derive(Debug, Clone)]
pub struct Report {
    pub session: String,
    pub log: Vec<LogEntry>,
    pub finals: Vec<StoredFinal>,
    /// Samples at 16 kHz the finals cover.
    pub covered: u64,
    pub problems: Vec<String>,
}

impl Report {
    pub fn text(&self) -> String {
        self.finals.iter().map(StoredFinal::text).filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ")
    }

    /// An error that names every problem.
    pub fn clean(self) -> Result<Self> {
        if self.problems.is_empty() {
            Ok(self)
        } else {
            Err(Error::Wrong(format!("session {}:\n  {}", self.session, self.problems.join("\n  "))))
        }
    }
}

/// What a check may take for granted.
#[derive(Debug, Clone, Default)]
pub struct Expect {
    /// Samples the log holds; none = counted from the log.
    pub samples: Option<u64>,
    /// The chain need not have ended yet.
    pub open: bool,
    /// Audio went on after an end: several ends are right.
    pub reopened: bool,
    /// A recording of a job: it has no log, and a failure may end it anywhere.
    pub job: bool,
}

/// Reads and checks one ended session.
pub async fn check(js: &jetstream::Context, session: &str) -> Result<Report> {
    check_with(js, session, &Expect::default()).await
}

pub async fn check_with(js: &jetstream::Context, session: &str, expect: &Expect) -> Result<Report> {
    let log = log(js, session).await?;
    let finals = finals(js, session).await?;
    let problems = problems(&log, &finals, expect);
    let covered = finals.last().and_then(|f| f.number("to_sample")).unwrap_or(0);
    Ok(Report { session: session.to_owned(), log, finals, covered, problems })
}

/// All finals of a session in stream order.
pub async fn finals(js: &jetstream::Context, session: &str) -> Result<Vec<StoredFinal>> {
    finals_of(js, "session", session).await
}

/// All finals of a `session` or `job` in stream order.
pub async fn finals_of(js: &jetstream::Context, kind: &str, session: &str) -> Result<Vec<StoredFinal>> {
    let subject = format!("asr.v1.transcript.{kind}.{session}.final");
    let mut finals = Vec::new();
    for message in read(js, "ASR_TRANSCRIPT", &subject).await? {
        let json = serde_json::from_slice(&message.payload)
            .map_err(|e| Error::Wrong(format!("final at {} of {session} is not JSON: {e}", message.seq)))?;
        let bytes = message.payload.len();
        finals.push(StoredFinal { seq: message.seq, headers: message.headers, bytes, json });
    }
    Ok(finals)
}

/// All log entries of a session in stream order.
pub async fn log(js: &jetstream::Context, session: &str) -> Result<Vec<LogEntry>> {
    let subject = format!("asr.v1.audio.{session}");
    let messages = read(js, "ASR_AUDIO", &subject).await?;
    Ok(messages.into_iter().map(LogEntry::from).collect())
}

impl From<Message> for LogEntry {
    fn from(m: Message) -> Self {
        Self { seq: m.seq, bytes: m.payload.len(), headers: m.headers }
    }
}

/// All events of a session: what happened, and the event itself.
pub async fn events(js: &jetstream::Context, session: &str) -> Result<Vec<(String, Value)>> {
    let messages = read(js, "ASR_EVENT", &format!("asr.v1.event.session.{session}.>")).await?;
    let event = |m: Message| {
        let json: Value = serde_json::from_slice(&m.payload).unwrap_or_default();
        (json["what"].as_str().unwrap_or("unreadable").to_owned(), json)
    };
    Ok(messages.into_iter().map(event).collect())
}

/// One stored message.
#[derive(Debug, Clone)]
pub struct Message {
    pub seq: u64,
    pub subject: String,
    pub headers: BTreeMap<String, String>,
    pub payload: bytes::Bytes,
}

/// Everything `stream` holds now on subjects that match `filter`. Who checks what faults have left has time: a stream that is
/// choosing its leader is asked again.
pub async fn read(js: &jetstream::Context, stream: &str, filter: &str) -> Result<Vec<Message>> {
    let until = Instant::now() + ELECTIONS;
    loop {
        match read_once(js, stream, filter).await {
            Err(_) if Instant::now() < until => tokio::time::sleep(Duration::from_millis(200)).await,
            read => return read,
        }
    }
}

async fn read_once(js: &jetstream::Context, stream: &str, filter: &str) -> Result<Vec<Message>> {
    let failed = |what: &str| format!("{what} {stream} {filter}");
    let stream = js.get_stream(stream).await.map_err(Error::nats(failed("opening")))?;
    let last = stream.cached_info().state.last_sequence;
    // From the leader: a consumer may stand on a server that lags, and ends where that one ends.
    let newest = match stream.get_last_raw_message_by_subject(filter).await {
        Ok(message) => message.sequence,
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => 0,
        Err(error) => return Err(Error::nats(failed("asking the leader of"))(error)),
    };
    let config = jetstream::consumer::pull::OrderedConfig {
        filter_subject: filter.to_owned(),
        ..jetstream::consumer::pull::OrderedConfig::default()
    };
    let consumer = stream.create_consumer(config).await.map_err(Error::nats(failed("reading")))?;
    let mut pending = consumer.cached_info().num_pending;
    let mut messages = consumer.messages().await.map_err(Error::nats(failed("reading")))?;
    let mut found = Vec::new();
    while pending > 0 {
        let message = tokio::time::timeout(READ_WAIT, messages.next())
            .await
            .map_err(|_| Error::Wrong(format!("{}: nothing for {READ_WAIT:?}", failed("reading"))))?
            .ok_or_else(|| Error::Wrong(failed("early end of")))?
            .map_err(Error::nats(failed("reading")))?;
        let info = message.info().map_err(|e| Error::Wrong(format!("{}: {e}", failed("reading"))))?;
        pending = if info.stream_sequence >= last { 0 } else { info.pending };
        found.push(Message {
            seq: info.stream_sequence,
            subject: message.subject.to_string(),
            headers: message.headers.as_ref().map(plain).unwrap_or_default(),
            payload: message.payload.clone(),
        });
    }
    if found.last().map_or(0, |message| message.seq) < newest {
        return Err(Error::Wrong(format!("{}: a server that lags", failed("reading"))));
    }
    Ok(found)
}

fn plain(headers: &HeaderMap) -> BTreeMap<String, String> {
    let last = |(name, values): (&async_nats::HeaderName, &Vec<async_nats::HeaderValue>)| {
        Some((name.to_string(), values.last()?.as_str().to_owned()))
    };
    headers.iter().filter_map(last).collect()
}

/// Where an end stands in the log, and how many samples came before it.
struct End {
    seq: u64,
    samples: u64,
}

/// Counts the log's samples as the contract says: frame n of a format is sample floor(n * 16000 / rate) after its start.
fn measure(log: &[LogEntry]) -> (u64, Vec<End>) {
    let (mut bytes_per_frame, mut rate) = (2u64, 16_000u64);
    let (mut start, mut frames) = (0u64, 0u64);
    let mut ends = Vec::new();
    for entry in log {
        if let Some(format) = header(entry, "Asr-Format") {
            let field = |name: &str| format.split(';').find_map(|p| p.trim().strip_prefix(name)?.parse::<u64>().ok());
            let (new_rate, channels) = (field("rate=").unwrap_or(16_000), field("channels=").unwrap_or(1));
            let width = if format.starts_with("pcm_f32le") { 4 } else { 2 };
            if !format.starts_with("pcm_") || !(8_000..=192_000).contains(&new_rate) || !(1..=64).contains(&channels) {
                continue;
            }
            let new = (width * channels, new_rate);
            if new != (bytes_per_frame, rate) {
                start += frames * 16_000 / rate;
                (frames, (bytes_per_frame, rate)) = (0, new);
            }
        }
        frames += entry.bytes as u64 / bytes_per_frame;
        if matches!(header(entry, "Asr-End"), Some("1" | "true")) {
            ends.push(End { seq: entry.seq, samples: start + frames * 16_000 / rate });
        }
    }
    (start + frames * 16_000 / rate, ends)
}

fn header<'a>(entry: &'a LogEntry, name: &str) -> Option<&'a str> {
    entry.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim())
}

/// Everything that does not fit. Pure.
pub fn problems(log: &[LogEntry], finals: &[StoredFinal], expect: &Expect) -> Vec<String> {
    let mut found = Vec::new();
    let (counted, ends) = measure(log);
    let samples = expect.samples.unwrap_or(counted);
    let mut ids = HashSet::new();
    let mut before: Option<&StoredFinal> = None;
    for (n, f) in finals.iter().enumerate() {
        let mut say = |what: String| found.push(format!("final {n} (sequence {}): {what}", f.seq));
        let at = |field: &str| f.number(field);
        let (Some(from), Some(to)) = (at("from_sample"), at("to_sample")) else {
            say("has no range".to_owned());
            continue;
        };
        if at("index") != Some(n as u64) {
            say(format!("has index {}", f.json["index"]));
        }
        if to < from {
            say(format!("ends at {to} before it begins at {from}"));
        }
        let expected_from = before.map_or(0, |b| b.number("to_sample").unwrap_or(0));
        if from != expected_from {
            say(format!("begins at {from}, the one before ends at {expected_from}"));
        }
        let id = f.json["final_id"].as_str().unwrap_or_default();
        if id.is_empty() || !ids.insert(id.to_owned()) {
            say(format!("final_id {id:?} is empty or was seen before"));
        }
        if let Some(told) = f.headers.get("Nats-Msg-Id")
            && told != id
        {
            say(format!("Nats-Msg-Id {told} is not its final_id {id}"));
        }
        if let Some(fence) = f.headers.get("Nats-Expected-Last-Subject-Sequence") {
            let predecessor = before.map_or(0, |b| b.seq);
            if fence.parse() != Ok(predecessor) {
                say(format!("expected {fence} as its predecessor, which is {predecessor}"));
            }
        }
        if let Some(b) = before
            && at("epoch") < b.number("epoch")
        {
            say(format!("epoch {} is below the one before, {}", f.json["epoch"], b.json["epoch"]));
        }
        if f.bytes > MAX_FINAL_BYTES {
            say(format!("is {} bytes long", f.bytes));
        }
        let (from_seq, to_seq) = (f.json["audio"]["from_seq"].as_u64(), f.json["audio"]["to_seq"].as_u64());
        if from_seq > to_seq || to_seq.is_none() {
            say(format!("audio range {} is not one", f.json["audio"]));
        }
        if let (Some(seq), false) = (to_seq, log.is_empty())
            && seq >= log[0].seq
            && !log.iter().any(|e| e.seq == seq)
        {
            say(format!("audio.to_seq {seq} is no entry of this session's log"));
        }
        if let Some(b) = before
            && to_seq < b.json["audio"]["to_seq"].as_u64()
        {
            say("audio.to_seq goes back".to_owned());
        }
        segments(f, from, to, &mut say);
        if f.is_end() && !expect.job {
            match ends.iter().find(|e| Some(e.seq) == to_seq) {
                None => say(format!("is an end, but log entry {} is not", to_seq.unwrap_or(0))),
                Some(end) if expect.samples.is_none() && to != end.samples => {
                    say(format!("ends at sample {to}, its end entry stands at {}", end.samples));
                }
                Some(_) => {}
            }
        }
        if f.is_end() && n + 1 < finals.len() && !expect.reopened {
            say("is an end, but more finals follow".to_owned());
        }
        before = Some(f);
    }
    match before {
        None if !expect.open => found.push("there is no final".to_owned()),
        Some(last) if !expect.open => {
            if !last.is_end() {
                found.push("the last final is not an end".to_owned());
            }
            let to = last.number("to_sample").unwrap_or(0);
            if to != samples && !(expect.job && last.json["error"].is_object()) {
                found.push(format!("{to} samples are covered, the log holds {samples}"));
            }
        }
        _ => {}
    }
    found
}

fn segments(f: &StoredFinal, from: u64, to: u64, say: &mut impl FnMut(String)) {
    // A segment may be rounded to the millisecond on either side.
    let (from_ms, to_ms) = (from / 16, to.div_ceil(16));
    let mut last_start = 0;
    for (i, s) in f.json["segments"].as_array().map(Vec::as_slice).unwrap_or_default().iter().enumerate() {
        let (start, end) = (s["start_ms"].as_u64().unwrap_or(u64::MAX), s["end_ms"].as_u64().unwrap_or(0));
        if s["id"] != i {
            say(format!("segment {i} has id {}", s["id"]));
        }
        if start > end || start < from_ms || end > to_ms || start < last_start {
            say(format!("segment {i} lies at {start}..{end} ms, its final at {from_ms}..{to_ms} ms"));
        }
        last_start = start;
        if s["text"].as_str().is_none_or(|t| t.trim().is_empty()) {
            say(format!("segment {i} has no text"));
        }
        let mut word_start = start;
        for w in s["words"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let (a, b) = (w["start_ms"].as_u64().unwrap_or(u64::MAX), w["end_ms"].as_u64().unwrap_or(0));
            if a < word_start || b < a || b > to_ms {
                say(format!("word {} of segment {i} lies at {a}..{b} ms", w["text"]));
            }
            word_start = a.min(u64::MAX - 1);
        }
    }
}

/// When the newest message on `subject` was stored, in Unix ms by the server's clock.
pub async fn stored_ms(js: &jetstream::Context, stream: &str, subject: &str) -> Option<u64> {
    let stream = js.get_stream_no_info(stream).await.ok()?;
    let last = stream.get_last_raw_message_by_subject(subject).await.ok()?;
    u64::try_from(last.time.unix_timestamp_nanos() / 1_000_000).ok()
}

/// Names of the consumers of a stream, for tests that count them.
pub async fn consumer_names(js: &jetstream::Context, stream: &str) -> Result<Vec<String>> {
    let handle = js.get_stream_no_info(stream).await.map_err(Error::nats(stream))?;
    handle.consumer_names().try_collect().await.map_err(Error::nats(format!("consumers of {stream}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chunk(seq: u64, bytes: usize, headers: &[(&str, &str)]) -> LogEntry {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        LogEntry { seq, headers, bytes }
    }

    fn log() -> Vec<LogEntry> {
        vec![chunk(3, 6_400, &[]), chunk(5, 6_400, &[]), chunk(9, 0, &[("Asr-End", "1")])]
    }

    fn chain() -> Vec<StoredFinal> {
        let one = |seq: u64, predecessor: u64, json: Value| StoredFinal {
            seq,
            headers: [
                ("Nats-Msg-Id".to_owned(), json["final_id"].as_str().unwrap_or_default().to_owned()),
                ("Nats-Expected-Last-Subject-Sequence".to_owned(), predecessor.to_string()),
            ]
            .into(),
            bytes: 100,
            json,
        };
        let word = json!([{"text": "hi", "start_ms": 10, "end_ms": 90}]);
        let segment = json!([{"id": 0, "text": "hi", "start_ms": 5, "end_ms": 100, "words": word}]);
        vec![
            one(
                2,
                0,
                json!({"index": 0, "final_id": "a", "epoch": 1, "from_sample": 0, "to_sample": 4000,
                "audio": {"from_seq": 3, "to_seq": 5}, "segments": segment}),
            ),
            one(
                7,
                2,
                json!({"index": 1, "final_id": "b", "epoch": 1, "from_sample": 4000, "to_sample": 6400,
                "audio": {"from_seq": 5, "to_seq": 9}, "segments": [], "end": true}),
            ),
        ]
    }

    #[test]
    fn a_good_chain_is_clean() {
        assert_eq!(problems(&log(), &chain(), &Expect::default()), Vec::<String>::new());
    }

    type Damage = fn(&mut Vec<StoredFinal>);

    #[test]
    fn every_damage_is_seen() {
        let damages: [(&str, Damage); 12] = [
            ("a final is missing", |c| drop(c.remove(0))),
            ("a final is there twice", |c| c.insert(1, c[0].clone())),
            ("a gap", |c| c[1].json["from_sample"] = 4001.into()),
            ("an overlap", |c| c[1].json["from_sample"] = 3999.into()),
            ("audio at the end is not covered", |c| c[1].json["to_sample"] = 6399.into()),
            ("no end", |c| c[1].json["end"] = false.into()),
            ("an end too early", |c| c[0].json["end"] = true.into()),
            ("epoch falls", |c| c[0].json["epoch"] = 2.into()),
            ("a foreign predecessor", |c| {
                c[1].headers.insert("Nats-Expected-Last-Subject-Sequence".into(), "1".into());
            }),
            ("an end that is no entry", |c| c[1].json["audio"]["to_seq"] = 8.into()),
            ("a segment outside", |c| c[0].json["segments"][0]["end_ms"] = 300.into()),
            ("an id used twice", |c| c[1].json["final_id"] = "a".into()),
        ];
        for (name, damage) in damages {
            let mut finals = chain();
            damage(&mut finals);
            assert_ne!(problems(&log(), &finals, &Expect::default()), Vec::<String>::new(), "{name}");
        }
        assert_ne!(problems(&log(), &[], &Expect::default()), Vec::<String>::new());
    }

    #[test]
    fn the_log_is_measured_in_every_format() {
        let f32_48k = [("Asr-Format", "pcm_f32le;rate=48000;channels=2")];
        let log = [
            chunk(1, 32_000, &[]),
            chunk(2, 384_000, &f32_48k),
            chunk(3, 3_840, &[]),
            chunk(4, 0, &[("asr-end", "1")]),
        ];
        let (samples, ends) = measure(&log);
        assert_eq!(samples, 16_000 + 16_000 + 160);
        assert_eq!((ends.len(), ends[0].samples), (1, samples));
    }
}
