//! `voxfleet jobs dead`: what could not be done, shown, tried again, put away.

use serde_json::{Value, json};
use voxfleet_nats::{
    Nats,
    again::{self, RetryError},
    dead::{DeadLetters, StoredLetter},
};
use voxfleet_schema::{
    dead::{DeadLetter, RefusedRequest},
    id::{Kind, StreamId},
    job::{AudioUrl, Inline},
};

use super::{
    jobs::{age, fields, now_ms},
    status::table,
};
use crate::{
    args::{DeadArg, DeadArgs, DeadCommand, DeadListArgs, DropArgs, KindArgs, RetryArgs},
    exit::{Exit, OrExit as _, coded},
    plain::plain,
    transcript::screen::{object, out},
};

/// Of what is no letter, in characters.
const SHOWN: usize = 2_000;

pub(super) async fn run(args: &DeadArgs, nats: &Nats) -> anyhow::Result<Exit> {
    match &args.what {
        DeadCommand::List(args) => list(args, nats).await,
        DeadCommand::Show(args) => show(args, nats).await,
        DeadCommand::Retry(args) => retry(args, nats).await,
        DeadCommand::Drop(args) => remove(args, nats).await,
    }
}

async fn list(args: &DeadListArgs, nats: &Nats) -> anyhow::Result<Exit> {
    let (letters, total) = DeadLetters::new(nats).list(args.limit as usize).await.or_exit(Exit::Unavailable)?;
    if args.output.json {
        object(&json!({"letters": letters.iter().map(value).collect::<Vec<_>>(), "total": total}))?;
    } else {
        out(&text(&letters, total, now_ms()))?;
    }
    Ok(Exit::Ok)
}

fn value(stored: &StoredLetter) -> Value {
    let mut value = json!({"seq": stored.seq, "stored_ms": stored.stored_ms, "kind": stored.kind, "id": stored.id});
    match &stored.letter {
        Ok(letter) => value["letter"] = json!(letter),
        Err(error) => value["unreadable"] = json!({"error": error.to_string(), "begins": begins(stored)}),
    }
    value
}

fn begins(stored: &StoredLetter) -> String {
    plain(&String::from_utf8_lossy(&stored.payload).chars().take(SHOWN).collect::<String>())
}

fn text(letters: &[StoredLetter], total: u64, now_ms: u64) -> String {
    let mut rows = vec![["SEQ", "KIND", "ID", "CLASS", "AGE", "GPU", "TRIES", "WHY"].map(str::to_owned).to_vec()];
    rows.extend(letters.iter().map(|stored| row(stored, now_ms)));
    let mut text = table(&rows);
    match total {
        0 => text.push_str("no dead letters"),
        total if total > letters.len() as u64 => text.push_str(&format!("{} of {total} letters", letters.len())),
        _ => {}
    }
    text.trim_end().to_owned()
}

fn row(stored: &StoredLetter, now_ms: u64) -> Vec<String> {
    let none = || "-".to_owned();
    let (class, gpu, tries, why) = match &stored.letter {
        Ok(letter) => (
            letter.error.class.to_string(),
            letter.origin.gpu_id.as_ref().map_or_else(none, ToString::to_string),
            if letter.attempts > 0 { letter.attempts.to_string() } else { none() },
            plain(&letter.error.message.chars().take(80).collect::<String>()),
        ),
        Err(_) => (none(), none(), none(), "not a letter this version can read".to_owned()),
    };
    let at = age(now_ms.saturating_sub(stored.stored_ms));
    vec![stored.seq.to_string(), stored.kind.to_string(), stored.id.to_string(), class, at, gpu, tries, why]
}

/// Every letter under this id: of the kind that was named, or of whichever there is.
async fn find(nats: &Nats, id: &StreamId, kind: KindArgs) -> anyhow::Result<Vec<StoredLetter>> {
    let mut found = Vec::new();
    for (wanted, of) in [(!kind.session, Kind::Job), (!kind.job, Kind::Session)] {
        if wanted {
            found.extend(DeadLetters::new(nats).of(of, id).await.or_exit(Exit::Unavailable)?);
        }
    }
    if found.is_empty() { nothing(id) } else { Ok(found) }
}

fn nothing<T>(id: &StreamId) -> anyhow::Result<T> {
    Err(anyhow::anyhow!("there is no dead letter of {id}")).or_exit(Exit::NotFound)
}

async fn show(args: &DeadArg, nats: &Nats) -> anyhow::Result<Exit> {
    let letters = find(nats, &args.id, args.kind).await?;
    if args.output.json {
        object(&json!({"letters": letters.iter().map(value).collect::<Vec<_>>()}))?;
    } else {
        let now = now_ms();
        let shown: Vec<String> = letters.iter().map(|stored| details(stored, now)).collect();
        out(&shown.join("\n\n"))?;
    }
    Ok(Exit::Ok)
}

fn details(stored: &StoredLetter, now_ms: u64) -> String {
    let ago = |ms: u64| format!("{} ago", age(now_ms.saturating_sub(ms)));
    let mut lines = vec![
        (stored.kind.as_str(), stored.id.to_string()),
        ("letter", format!("number {} in ASR_DEAD, {}", stored.seq, ago(stored.stored_ms))),
    ];
    let letter = match &stored.letter {
        Ok(letter) => letter,
        Err(error) => {
            lines.push(("unreadable", error.to_string()));
            lines.push(("begins", begins(stored)));
            return fields(&lines);
        }
    };
    let DeadLetter { error, origin, attempts, audio, record, request, .. } = letter;
    let mut put = |name, value: Option<String>| lines.extend(value.map(|value| (name, plain(&value))));
    put("error", Some(error.to_string()));
    put("gpu", origin.gpu_id.as_ref().map(ToString::to_string));
    put("incarnation", origin.incarnation.as_ref().map(ToString::to_string));
    put("epoch", origin.epoch.map(|n| n.to_string()));
    put("written by", origin.dispatcher.as_ref().map(|name| format!("dispatcher {name}")));
    put("tries", (*attempts > 0).then(|| attempts.to_string()));
    put("audio", audio.as_ref().map(|range| format!("log entries {} to {}", range.from_seq, range.to_seq)));
    if let Some(record) = record {
        put("name", record.name.clone());
        put("recording", Some(AudioUrl::harmless(&record.audio)));
        put("deaths", (record.deaths > 0).then(|| format!("{} workers died while they had it", record.deaths)));
        put("submitted", Some(ago(record.submitted_ms)));
    }
    if let Some(request) = request {
        put("request", Some(format!("{} bytes, number {} in ASR_JOBS", request.body_bytes, request.seq)));
        put("type", request.content_type.clone());
        put("body", Some(body_text(request)));
    }
    fields(&lines)
}

fn body_text(request: &RefusedRequest) -> String {
    match (&request.body, &request.body_base64) {
        (Some(text), _) => plain(&text.chars().take(SHOWN).collect::<String>()),
        (None, Some(Inline(bytes))) => format!("{} bytes that are no text; --json shows them", bytes.len()),
        (None, None) => "not kept".to_owned(),
    }
}

async fn retry(args: &RetryArgs, nats: &Nats) -> anyhow::Result<Exit> {
    let retried = match again::retry(nats, &args.job, args.id.as_ref(), args.keep).await {
        Ok(retried) => retried,
        Err(error) => {
            let exit = exit_of(&error);
            return Err(coded(exit, error.into()));
        }
    };
    for note in &retried.notes {
        eprintln!("{note}");
    }
    let submitted = &retried.submitted;
    if args.output.json {
        object(&json!({
            "job": submitted.job, "state": submitted.state, "retry_of": args.job, "letters_dropped": retried.dropped,
        }))?;
    } else {
        out(submitted.job.as_str())?;
    }
    Ok(Exit::Ok)
}

fn exit_of(error: &RetryError) -> Exit {
    match error {
        RetryError::NoLetter(_) | RetryError::Expired(_) => Exit::NotFound,
        RetryError::Session(_) | RetryError::Part { .. } | RetryError::Taken(_) | RetryError::NoId(_) => Exit::Usage,
        RetryError::NoSource(_) | RetryError::Request(_) => Exit::Failure,
        RetryError::Api { source, .. } => Exit::of_api(source),
        RetryError::Records(_) | RetryError::Media(_) | RetryError::Server(_) => Exit::Unavailable,
    }
}

async fn remove(args: &DropArgs, nats: &Nats) -> anyhow::Result<Exit> {
    let letters = DeadLetters::new(nats);
    let dropped = match (&args.id, args.seq) {
        (Some(id), _) => {
            let mut dropped = 0;
            for stored in find(nats, id, args.kind).await? {
                dropped += u64::from(letters.remove(stored.seq).await.or_exit(Exit::Unavailable)?);
            }
            dropped
        }
        (None, Some(seq)) => match letters.remove(seq).await.or_exit(Exit::Unavailable)? {
            true => 1,
            false => return Err(anyhow::anyhow!("there is no dead letter {seq}")).or_exit(Exit::NotFound),
        },
        (None, None) => 0,
    };
    if args.output.json {
        object(&json!({"dropped": dropped}))?;
    } else {
        out(&format!("{dropped} dropped"))?;
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::job::JobRecord;

    use super::*;

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    fn record(state: &str, audio: &str) -> JobRecord {
        serde_json::from_value(json!({
            "id": "call-17", "state": state, "audio": audio, "options": {"language": "de"}, "result_ttl_s": 600,
            "epoch": 2, "attempts": 3, "submitted_ms": 1_000, "changed_ms": 0, "name": "a.wav",
        }))
        .expect("a record")
    }

    fn stored(letter: Value) -> StoredLetter {
        let payload = bytes::Bytes::from(letter.to_string());
        let letter = voxfleet_schema::codec::from_json(&payload);
        StoredLetter { seq: 12, stored_ms: 1_000, kind: Kind::Job, id: id("call-17"), letter, payload }
    }

    fn failed(audio: &str) -> StoredLetter {
        stored(json!({
            "kind": "job", "id": "call-17", "at_ms": 1_000, "attempts": 3,
            "error": {"class": "engine_crash", "message": "the engine died"},
            "origin": {"gpu_id": "gpu-1", "incarnation": "i", "epoch": 2, "dispatcher": "d"},
            "record": record("failed", audio),
        }))
    }

    fn refused(body: &str, body_bytes: usize) -> StoredLetter {
        stored(json!({
            "kind": "job", "id": "call-17", "at_ms": 1_000, "error": {"class": "bad_request", "message": "x"},
            "request": {"seq": 4, "body_bytes": body_bytes, "body": body},
        }))
    }

    #[test]
    fn what_strangers_wrote_does_not_steer_the_terminal() {
        const EVIL: &str = "a\u{1b}[31mb\u{1b}]0;c\u{7}\r\nd\u{9b}2J";
        let letter = |message: &str| {
            let mut record = record("failed", "x");
            record.name = Some(EVIL.to_owned());
            stored(json!({
                "kind": "job", "id": "call-17", "at_ms": 1_000, "attempts": 3, "record": record,
                "error": {"class": "engine_crash", "message": message},
            }))
        };
        let mut nothing = refused("x", 1);
        nothing.payload = bytes::Bytes::from(EVIL);
        nothing.letter = voxfleet_schema::codec::from_json(&nothing.payload);
        let body = refused(EVIL, EVIL.len());
        for shown in [&letter(EVIL), &nothing, &body].map(|stored| details(stored, 2_000)) {
            assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
        }
        // Whatever its message says, a letter is one line.
        let tame = text(&[letter("tame"), refused("x", 1)], 2, 2_000);
        let wild = text(&[letter(EVIL), nothing], 2, 2_000);
        assert!(!wild.contains(|c: char| c.is_control() && c != '\n'), "{wild:?}");
        assert_eq!(wild.lines().count(), tame.lines().count(), "{wild}");
    }

    #[test]
    fn letters_are_shown() {
        let foreign = stored(json!({"from": "somebody else"}));
        let shown = text(&[failed("s3://b/k"), foreign], 7, 61_000);
        let rows: Vec<Vec<&str>> = shown.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[1][..7], ["12", "job", "call-17", "engine_crash", "1m", "gpu-1", "3"]);
        assert!(shown.contains("not a letter this version can read") && shown.ends_with("2 of 7 letters"), "{shown}");
        let shown = details(&failed("https://h/a.wav?sig=secret"), 61_000);
        for part in ["engine_crash: the engine died", "dispatcher d", "https://h/a.wav", "1m ago"] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
        assert!(!shown.contains("secret"), "{shown}");
        let shown = details(&refused("{\"audoi\":1}", 11), 61_000);
        assert!(shown.contains("{\"audoi\":1}") && shown.contains("number 4 in ASR_JOBS"), "{shown}");
        assert!(text(&[], 0, 0).ends_with("no dead letters"));
    }
}
