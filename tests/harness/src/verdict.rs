//! What became of sessions and jobs of the simulated engine: every sample transcribed exactly once, or what is wrong.
//!
//! Reads streams by plain NATS calls only; the text decides ([`crate::words`]), not what the program says of itself.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use async_nats::jetstream;
use tokio::io::AsyncReadExt;

use crate::{
    Error, Result,
    checker::{self, Expect, LogEntry, StoredFinal},
    words::{self, Account, Recording},
};

/// Largest aggregate that is read back.
const MAX_RESULT: u64 = 64 << 20;
/// Longer than the leader of the object store takes to be elected on a busy machine.
const ELECTIONS: Duration = Duration::from_secs(20);

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    pub samples_lost: u64,
    pub samples_repeated: u64,
    pub finals_repeated: u64,
    /// Samples of speech so short that a detector takes them for a click, where a flush or end cut them off.
    pub clicks: u64,
    pub finals: u64,
    /// Stretches set aside because of the poison in them.
    pub parked: u64,
    /// Of its last final; 1 when nobody but its first owner wrote any.
    pub epoch: u64,
    /// Its last final is an end.
    pub ended: bool,
    pub problems: Vec<String>,
}

impl Verdict {
    fn of(account: Account, finals: &[StoredFinal], mut problems: Vec<String>) -> Self {
        problems.extend(account.problems);
        Self {
            samples_lost: account.lost,
            samples_repeated: account.repeated,
            finals_repeated: account.finals_repeated,
            clicks: account.clicks,
            finals: finals.len() as u64,
            parked: 0,
            epoch: finals.last().and_then(|f| f.json["epoch"].as_u64()).unwrap_or(0),
            ended: finals.last().is_some_and(StoredFinal::is_end),
            problems,
        }
    }

    pub fn is_clean(&self) -> bool {
        self.samples_lost == 0 && self.samples_repeated == 0 && self.finals_repeated == 0 && self.problems.is_empty()
    }

    /// An error that names everything, unless it is clean.
    pub fn clean(self, id: &str) -> Result<Self> {
        if self.is_clean() { Ok(self) } else { Err(Error::Wrong(format!("{id}: {self:#?}"))) }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEnd {
    Done,
    /// With this class.
    Failed(String),
    /// Its chain has no end.
    Open,
}

/// Checks an ended session whose producer had `sent` acknowledged, in order: 16-bit mono at 16 kHz.
pub async fn session(js: &jetstream::Context, id: &str, sent: &[i16]) -> Result<Verdict> {
    session_of(js, id, sent, &Engine::Simulated { poison: &[] }).await
}

/// The same where these samples kill the engine: a final over them may say so and nothing else, and must have left a letter.
pub async fn poisoned_session(
    js: &jetstream::Context,
    id: &str,
    sent: &[i16],
    poison: &[Range<u64>],
) -> Result<Verdict> {
    session_of(js, id, sent, &Engine::Simulated { poison }).await
}

/// What made the text.
enum Engine<'a> {
    Simulated {
        poison: &'a [Range<u64>],
    },
    /// It hears words: nothing can be laid back onto samples.
    Real,
}

/// The same for an engine that hears words: which samples are lost or repeated is decided from the ranges alone.
pub async fn session_by_ranges(js: &jetstream::Context, id: &str, sent: &[i16]) -> Result<Verdict> {
    session_of(js, id, sent, &Engine::Real).await
}

async fn session_of(js: &jetstream::Context, id: &str, sent: &[i16], engine: &Engine<'_>) -> Result<Verdict> {
    let log = checker::read(js, "ASR_AUDIO", &format!("asr.v1.audio.{id}")).await?;
    let finals = checker::finals(js, id).await?;
    let logged = words::samples_of(&log);
    let (mut missing, mut set_aside) = (0, 0);
    let mut problems = Vec::new();
    if logged != sent {
        let same = logged.iter().zip(sent).take_while(|(a, b)| a == b).count();
        missing = (sent.len() - same) as u64;
        problems.push(format!(
            "the log holds {} samples, {} were acknowledged; they differ from sample {same} on",
            logged.len(),
            sent.len()
        ));
    }
    let entries: Vec<LogEntry> = log.into_iter().map(LogEntry::from).collect();
    let expect = Expect { samples: Some(logged.len() as u64), ..Expect::default() };
    problems.extend(checker::problems(&entries, &finals, &expect));
    let account = match engine {
        Engine::Simulated { poison } => {
            let (parked, blamed): (Vec<StoredFinal>, Vec<StoredFinal>) =
                finals.iter().filter(|f| f.json["error"].is_object()).cloned().partition(|f| is_meant(f, poison));
            problems.extend(oddities(&finals).into_iter().filter(|o| parked.is_empty() || o.0 != "error").map(|o| o.1));
            if !parked.is_empty() {
                problems.extend(blamed.iter().map(|f| format!("final {} is parked, and harmless", f.json["index"])));
                let letters = checker::read(js, "ASR_DEAD", &format!("asr.v1.dead.session.{id}")).await?.len();
                if letters < parked.len() {
                    problems.push(format!("{} stretches parked, {letters} dead letters", parked.len()));
                }
            }
            set_aside = parked.len() as u64;
            words::account(&Recording::new(silenced(logged, &parked)), &finals)
        }
        Engine::Real => {
            problems.extend(oddities(&finals).into_iter().map(|o| o.1));
            let mut mute = finals.clone();
            mute.iter_mut().for_each(|f| f.json["segments"] = serde_json::Value::Null);
            words::account(&Recording::new(vec![0; logged.len()]), &mute)
        }
    };
    let mut verdict = Verdict::of(account, &finals, problems);
    verdict.samples_lost += missing;
    verdict.parked = set_aside;
    Ok(verdict)
}

/// Checks a job of this recording. A failed one may leave samples untouched, but must have left a letter.
pub async fn job(js: &jetstream::Context, id: &str, recording: &[i16]) -> Result<(Verdict, JobEnd)> {
    let finals = checker::finals_of(js, "job", id).await?;
    let expect = Expect { samples: Some(recording.len() as u64), job: true, ..Expect::default() };
    let mut problems = checker::problems(&[], &finals, &expect);
    let last = finals.last().filter(|f| f.is_end()).map(|f| &f.json);
    let end = match last {
        None => JobEnd::Open,
        Some(last) => match last["error"]["class"].as_str() {
            None => JobEnd::Done,
            Some(class) => JobEnd::Failed(class.to_owned()),
        },
    };
    let mut account = words::account(&Recording::new(recording.to_vec()), &finals);
    let letters = checker::read(js, "ASR_DEAD", &format!("asr.v1.dead.job.{id}")).await?.len();
    match &end {
        JobEnd::Done => {
            problems.extend(oddities(&finals).into_iter().map(|o| o.1));
            problems.extend(aggregate(js, &finals).await.err().map(|e| e.to_string()));
            if letters > 0 {
                problems.push(format!("done, and {letters} dead letters"));
            }
        }
        JobEnd::Failed(class) => {
            // What it did not come to is not lost: whoever asked was told.
            account.lost = 0;
            account.problems.clear();
            if letters == 0 && class != "cancelled" {
                problems.push(format!("failed ({class}) without a dead letter"));
            }
        }
        JobEnd::Open => {}
    }
    Ok((Verdict::of(account, &finals, problems), end))
}

/// A final whose stretch holds poison, parked as such.
fn is_meant(parked: &StoredFinal, poison: &[Range<u64>]) -> bool {
    let f = &parked.json;
    let (Some(from), Some(to)) = (f["from_sample"].as_u64(), f["to_sample"].as_u64()) else { return false };
    f["error"]["class"] == "engine_crash" && poison.iter().any(|p| p.start < to && from < p.end)
}

/// What was parked as it had to be is not missed in the text: it is as good as silent.
fn silenced(mut samples: Vec<i16>, parked: &[StoredFinal]) -> Vec<i16> {
    for f in parked {
        let at =
            |field: &str| f.json[field].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0).min(samples.len());
        let (from, to) = (at("from_sample"), at("to_sample"));
        if from < to {
            samples[from..to].fill(0);
        }
    }
    samples
}

/// What no undisturbed run has: the field, and what it says.
fn oddities(finals: &[StoredFinal]) -> Vec<(&'static str, String)> {
    let odd = |field: &'static str| {
        finals
            .iter()
            .filter(move |f| !f.json[field].is_null())
            .map(move |f| (field, format!("final {} says {field}: {}", f.json["index"], f.json[field])))
    };
    odd("lost").chain(odd("error")).collect()
}

/// The aggregate that the end final names holds the chain's text. A store that is choosing its leader is asked again.
async fn aggregate(js: &jetstream::Context, finals: &[StoredFinal]) -> Result<()> {
    let url = finals.last().and_then(|f| f.json["result"].as_str()).unwrap_or_default();
    let key = url.strip_prefix("object://asr_media/").ok_or_else(|| Error::Wrong(format!("its result is {url:?}")))?;
    let until = Instant::now() + ELECTIONS;
    let bytes = loop {
        match object(js, key).await {
            Err(_) if Instant::now() < until => tokio::time::sleep(Duration::from_millis(200)).await,
            read => break read?,
        }
    };
    let result: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| Error::Wrong(format!("{key}: {e}")))?;
    let text = finals.iter().map(StoredFinal::text).filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ");
    if result["full_text"].as_str() == Some(&text) {
        Ok(())
    } else {
        Err(Error::Wrong(format!("{key} holds another text than its chain")))
    }
}

async fn object(js: &jetstream::Context, key: &str) -> Result<Vec<u8>> {
    let store = js.get_object_store("asr_media").await.map_err(Error::nats("asr_media"))?;
    let object = store.get(key).await.map_err(Error::nats(key))?;
    let mut bytes = Vec::new();
    object.take(MAX_RESULT).read_to_end(&mut bytes).await.map_err(Error::io(key))?;
    Ok(bytes)
}

/// Everything there is to know of a session or job, to be read by people: log, finals, events, letters.
pub async fn dossier(js: &jetstream::Context, kind: &str, id: &str) -> Result<String> {
    let mut text = format!("{kind} {id}\n");
    for m in checker::read(js, "ASR_AUDIO", &format!("asr.v1.audio.{id}")).await? {
        text.push_str(&format!("audio {} bytes {} {:?}\n", m.seq, m.payload.len(), m.headers));
    }
    for f in checker::finals_of(js, kind, id).await? {
        text.push_str(&format!("final {} {:?}\n  {}\n", f.seq, f.headers, f.json));
    }
    for (stream, filter) in [
        ("ASR_EVENT", format!("asr.v1.event.{kind}.{id}.>")),
        ("ASR_DEAD", format!("asr.v1.dead.{kind}.{id}")),
        (if kind == "job" { "KV_asr_jobs" } else { "KV_asr_sessions" }, format!("$KV.asr_{kind}s.{id}")),
    ] {
        for m in checker::read(js, stream, &filter).await? {
            text.push_str(&format!("{stream} {} {}\n", m.seq, String::from_utf8_lossy(&m.payload)));
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parked(from: u64, to: u64, class: &str) -> StoredFinal {
        let json = json!({"from_sample": from, "to_sample": to, "error": {"class": class}});
        StoredFinal { seq: 1, headers: Default::default(), bytes: 0, json }
    }

    #[test]
    fn only_what_holds_poison_may_be_parked() {
        let place = 20_000..20_400;
        let poison = std::slice::from_ref(&place);
        assert!(is_meant(&parked(16_000, 40_000, "engine_crash"), poison));
        assert!(!is_meant(&parked(40_000, 60_000, "engine_crash"), poison), "the next stretch is innocent");
        assert!(!is_meant(&parked(16_000, 40_000, "internal"), poison));
        assert!(!is_meant(&parked(16_000, 40_000, "engine_crash"), &[]));
        let silent = silenced(vec![1; 10], &[parked(2, 5, "engine_crash"), parked(8, 99, "engine_crash")]);
        assert_eq!(silent, [1, 1, 0, 0, 0, 1, 1, 1, 0, 0]);
    }
}
