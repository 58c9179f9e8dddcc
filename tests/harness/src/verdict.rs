//! What became of sessions and jobs of the simulated engine: every sample transcribed exactly once, or what is wrong.
//!
//! Reads streams by plain NATS calls only; the text decides ([`crate::words`]), not what the program says of itself.

use async_nats::jetstream;
use tokio::io::AsyncReadExt;

use crate::{
    Error, Result,
    checker::{self, Expect, LogEntry, StoredFinal},
    words::{self, Account, Recording},
};

/// Largest aggregate that is read back.
const MAX_RESULT: u64 = 64 << 20;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    pub samples_lost: u64,
    pub samples_repeated: u64,
    pub finals_repeated: u64,
    /// Samples of speech so short that a detector takes them for a click, where a flush or end cut them off.
    pub clicks: u64,
    pub finals: u64,
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
    session_of(js, id, sent, true).await
}

/// The same for an engine that hears words: which samples are lost or repeated is decided from the ranges alone.
pub async fn session_by_ranges(js: &jetstream::Context, id: &str, sent: &[i16]) -> Result<Verdict> {
    session_of(js, id, sent, false).await
}

async fn session_of(js: &jetstream::Context, id: &str, sent: &[i16], simulated: bool) -> Result<Verdict> {
    let log = checker::read(js, "ASR_AUDIO", &format!("asr.v1.audio.{id}")).await?;
    let finals = checker::finals(js, id).await?;
    let logged = words::samples_of(&log);
    let mut missing = 0;
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
    problems.extend(oddities(&finals));
    let account = if simulated {
        words::account(&Recording::new(logged), &finals)
    } else {
        let mut mute = finals.clone();
        mute.iter_mut().for_each(|f| f.json["segments"] = serde_json::Value::Null);
        words::account(&Recording::new(vec![0; logged.len()]), &mute)
    };
    let mut verdict = Verdict::of(account, &finals, problems);
    verdict.samples_lost += missing;
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
            problems.extend(oddities(&finals));
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

/// What no undisturbed run has.
fn oddities(finals: &[StoredFinal]) -> Vec<String> {
    let odd = |field: &'static str| {
        finals
            .iter()
            .filter(move |f| !f.json[field].is_null())
            .map(move |f| format!("final {} says {field}: {}", f.json["index"], f.json[field]))
    };
    odd("lost").chain(odd("error")).collect()
}

/// The aggregate that the end final names holds the chain's text.
async fn aggregate(js: &jetstream::Context, finals: &[StoredFinal]) -> Result<()> {
    let url = finals.last().and_then(|f| f.json["result"].as_str()).unwrap_or_default();
    let key = url.strip_prefix("object://asr_media/").ok_or_else(|| Error::Wrong(format!("its result is {url:?}")))?;
    let store = js.get_object_store("asr_media").await.map_err(Error::nats("asr_media"))?;
    let object = store.get(key).await.map_err(Error::nats(key))?;
    let mut bytes = Vec::new();
    object.take(MAX_RESULT).read_to_end(&mut bytes).await.map_err(Error::io(key))?;
    let result: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| Error::Wrong(format!("{key}: {e}")))?;
    let text = finals.iter().map(StoredFinal::text).filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ");
    if result["full_text"].as_str() == Some(&text) {
        Ok(())
    } else {
        Err(Error::Wrong(format!("{key} holds another text than its chain")))
    }
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
