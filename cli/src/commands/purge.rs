//! `voxfleet purge`: what is kept of a session or job, removed for good and told place by place.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use voxfleet_nats::{
    Nats,
    api::{self, Endpoint},
    media::ObjectInfo,
    purge::{Amount, Amounts, Kept, Purge, PurgeError},
    retry::Backoff,
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    session::{Closed, SessionRequest},
};

use super::{close, jobs::now_ms, status::table};
use crate::{
    Context,
    args::PurgeArgs,
    exit::{Exit, OrExit as _},
    file_job::ask,
    transcript::screen::{object, out},
};

/// For a dispatcher to write an end into the log.
const ASK: Duration = Duration::from_secs(10);
/// For the last final of what is closed by force.
const END_WITHIN: Duration = Duration::from_secs(30);
/// For what is still on its way when its end stands: an event, a hint.
const LATE_WITHIN: Duration = Duration::from_secs(5);

pub(crate) async fn run(args: &PurgeArgs, context: &Context) -> anyhow::Result<Exit> {
    let (nats, _) = context.client("voxfleet-purge").await?;
    let done = match (args.what, &args.id, args.older_than) {
        (Some(what), Some(id), _) => one(args, what.into(), id, &nats).await,
        (_, _, Some(seconds)) => older(args, seconds, &nats).await,
        // The arguments allow nothing else.
        _ => Ok(Exit::Usage),
    };
    close(nats).await;
    done
}

/// What happened, as it is told.
#[derive(Debug, Default)]
struct Report {
    dry_run: bool,
    purged: Vec<Purged>,
    open: Vec<(Kind, StreamId, &'static str)>,
    /// Uploads that belonged to nobody.
    objects: Vec<ObjectInfo>,
    /// Something failed: what is told here is gone, and there is more.
    incomplete: bool,
    /// Somebody sends to what was removed.
    goes_on: bool,
}

#[derive(Debug)]
struct Purged {
    kind: Kind,
    id: StreamId,
    parts: Vec<StreamId>,
    /// It had not ended when it was removed.
    cut_off: bool,
    amounts: Amounts,
}

async fn one(args: &PurgeArgs, kind: Kind, id: &StreamId, nats: &Nats) -> anyhow::Result<Exit> {
    let purge = Purge::new(nats);
    let shelf = purge.shelf().await.or_exit(Exit::Unavailable)?;
    let mut kept = purge.find(kind, id, &shelf).await.or_exit(Exit::Unavailable)?;
    let mut report = Report { dry_run: args.dry_run, ..Report::default() };
    if args.dry_run {
        report.open.extend(kept.open.map(|why| (kind, id.clone(), why)));
        report.note(&kept, kept.amounts.clone(), false);
        return report.tell(args);
    }
    if let Some(why) = kept.open {
        if !args.force {
            let refused = anyhow::anyhow!(
                "{kind} {id} is open: {why}; end it and purge it then, or let --force end it (see voxfleet purge --help)"
            );
            return Err(refused).or_exit(Exit::Refused);
        }
        kept = ended(&purge, kind, id, nats).await?;
    }
    let cut_off = kept.open.is_some();
    let mut removed = Amounts::new();
    let mut done = purge.remove(&kept, cut_off, &mut removed).await;
    if args.force && done.is_ok() {
        let quiet = late(&purge, kind, id, cut_off, &mut removed).await;
        if let Ok(false) = quiet {
            report.open.push((kind, id.clone(), "somebody goes on sending to it; stop him and purge it again"));
            report.goes_on = true;
        }
        done = quiet.map(drop);
    }
    report.note(&kept, removed, cut_off);
    report.end(args, done)
}

/// Asks for the end of what is open and waits for it; how it stands then.
async fn ended(purge: &Purge, kind: Kind, id: &StreamId, nats: &Nats) -> anyhow::Result<Kept> {
    let asked = match kind {
        Kind::Session => {
            let request = SessionRequest { session: id.clone() };
            api::request::<_, Closed>(nats, Endpoint::SessionClose, &request, ASK).await.map(drop)
        }
        Kind::Job | Kind::Unknown => ask::cancel(nats, id).await.map(drop),
    };
    let patience = match &asked {
        Ok(()) => END_WITHIN,
        // It is removed as it is.
        Err(error) => {
            eprintln!("{kind} {id} cannot be ended: {error}");
            Duration::ZERO
        }
    };
    let (begun, mut backoff) = (Instant::now(), Backoff::default());
    loop {
        let shelf = purge.shelf().await.or_exit(Exit::Unavailable)?;
        let kept = purge.find(kind, id, &shelf).await.or_exit(Exit::Unavailable)?;
        if kept.open.is_none() || begun.elapsed() >= patience {
            if let (Some(why), Ok(())) = (kept.open, &asked) {
                eprintln!("{kind} {id} is removed though it is open: {why}");
            }
            return Ok(kept);
        }
        backoff.wait().await;
    }
}

/// What an end leaves behind comes a moment after it: removed too, until nothing comes any more. False: it goes on coming.
async fn late(
    purge: &Purge,
    kind: Kind,
    id: &StreamId,
    cut_off: bool,
    removed: &mut Amounts,
) -> Result<bool, PurgeError> {
    let (begun, mut backoff, mut quiet) = (Instant::now(), Backoff::default(), 0);
    // The marker of a key stays where it tells a dispatcher.
    let only_marker = |kept: &Kept| cut_off && kept.amounts.values().all(|amount| amount.bytes == 0);
    // Where nothing was found it is looked at to the end, however slow the store is.
    while quiet < 3 && (quiet > 0 || begun.elapsed() < LATE_WITHIN) {
        backoff.wait().await;
        let kept = purge.find(kind, id, &purge.shelf().await?).await?;
        if kept.is_empty() || only_marker(&kept) {
            quiet += 1;
            continue;
        }
        quiet = 0;
        purge.remove(&kept, cut_off, removed).await?;
    }
    Ok(quiet >= 3)
}

async fn older(args: &PurgeArgs, seconds: u32, nats: &Nats) -> anyhow::Result<Exit> {
    let before_ms = now_ms().saturating_sub(u64::from(seconds) * 1_000);
    let mut report = Report { dry_run: args.dry_run, ..Report::default() };
    let done = remove_older(&Purge::new(nats), args.kind.map(Kind::from), before_ms, &mut report).await;
    report.end(args, done)
}

async fn remove_older(
    purge: &Purge,
    kind: Option<Kind>,
    before_ms: u64,
    report: &mut Report,
) -> Result<(), PurgeError> {
    let shelf = purge.shelf().await?;
    let mut due = purge.all(kind, &shelf).await?;
    due.retain(|(_, _, newest_ms)| *newest_ms < before_ms);
    due.sort_by(|a, b| (a.2, &a.1).cmp(&(b.2, &b.1)));
    for (kind, id, _) in due {
        let kept = purge.find(kind, &id, &shelf).await?;
        if let Some(why) = kept.open {
            report.open.push((kind, id, why));
        } else if kept.is_empty() || kept.newest_ms >= before_ms {
            // Gone, or spoken to, since they were listed.
        } else if report.dry_run {
            report.note(&kept, kept.amounts.clone(), false);
        } else {
            let mut removed = Amounts::new();
            let done = purge.remove(&kept, false, &mut removed).await;
            report.note(&kept, removed, false);
            done?;
        }
    }
    if kind != Some(Kind::Session) {
        uploads(purge, before_ms, report).await?;
    }
    Ok(())
}

/// Old objects that nothing names: nobody else would ever remove them. Looked for anew: a purge may take minutes, and jobs
/// come meanwhile.
async fn uploads(purge: &Purge, before_ms: u64, report: &mut Report) -> Result<(), PurgeError> {
    let shelf = purge.shelf().await?;
    for object in shelf.nobodys().into_iter().filter(|object| object.modified_ms < before_ms) {
        if report.dry_run || purge.remove_object(&object.key).await? {
            report.objects.push(object);
        }
    }
    Ok(())
}

impl Report {
    fn note(&mut self, kept: &Kept, amounts: Amounts, cut_off: bool) {
        let Kept { kind, id, parts, .. } = kept.clone();
        self.purged.push(Purged { kind, id, parts, cut_off, amounts });
    }

    /// Place by place, all together.
    fn sums(&self) -> Amounts {
        let mut sums = Amounts::new();
        let places = self.purged.iter().flat_map(|purged| purged.amounts.iter().map(|(place, a)| (*place, *a)));
        let uploads = self.objects.iter().map(|o| (MEDIA, Amount { messages: 1, bytes: o.bytes }));
        for (place, amount) in places.chain(uploads) {
            let sum = sums.entry(place).or_default();
            sum.messages += amount.messages;
            sum.bytes += amount.bytes;
        }
        sums
    }

    /// What went is told even where something then failed.
    fn end(mut self, args: &PurgeArgs, done: Result<(), PurgeError>) -> anyhow::Result<Exit> {
        self.incomplete = done.is_err();
        let told = self.tell(args)?;
        done.or_exit(Exit::Unavailable)?;
        Ok(if self.goes_on { Exit::Failure } else { told })
    }

    fn tell(&self, args: &PurgeArgs) -> anyhow::Result<Exit> {
        if args.output.json {
            object(&self.value())?
        } else {
            out(&self.text())?
        }
        Ok(Exit::Ok)
    }

    fn value(&self) -> Value {
        let amounts = |amounts: &Amounts| -> Value {
            amounts.iter().map(|(place, a)| (*place, json!({"messages": a.messages, "bytes": a.bytes}))).collect()
        };
        let sums = self.sums();
        let purged = |p: &Purged| {
            json!({
                "kind": p.kind, "id": p.id, "parts": p.parts, "cut_off": p.cut_off, "places": amounts(&p.amounts),
            })
        };
        json!({
            "dry_run": self.dry_run,
            "incomplete": self.incomplete,
            "purged": self.purged.iter().map(purged).collect::<Vec<_>>(),
            "open": self.open.iter().map(|(kind, id, why)| json!({"kind": kind, "id": id, "why": why})).collect::<Vec<_>>(),
            "uploads": self.objects.iter().map(|o| json!({"key": o.key, "bytes": o.bytes})).collect::<Vec<_>>(),
            "places": amounts(&sums),
            "total": {
                "messages": sums.values().map(|a| a.messages).sum::<u64>(),
                "bytes": sums.values().map(|a| a.bytes).sum::<u64>(),
            },
        })
    }

    fn text(&self) -> String {
        let sums = self.sums();
        let mut text = String::new();
        if !sums.is_empty() {
            let mut rows = vec![["PLACE", "MESSAGES", "BYTES"].map(str::to_owned).to_vec()];
            let row =
                |(place, a): (&&str, &Amount)| vec![(*place).to_owned(), a.messages.to_string(), a.bytes.to_string()];
            rows.extend(sums.iter().map(row));
            text.push_str(&table(&rows));
        }
        let verb = if self.dry_run { "would be removed" } else { "removed" };
        for purged in &self.purged {
            let Purged { kind, id, parts, cut_off, amounts } = purged;
            let messages: u64 = amounts.values().map(|a| a.messages).sum();
            let bytes: u64 = amounts.values().map(|a| a.bytes).sum();
            let with = if parts.is_empty() { String::new() } else { format!(" with its {} parts", parts.len()) };
            let how = if *cut_off { ", though it had not ended" } else { "" };
            text.push_str(&match messages {
                0 => format!("nothing is kept of {kind} {id}\n"),
                _ => format!("{kind} {id}{with}: {messages} messages, {bytes} bytes {verb}{how}\n"),
            });
        }
        for upload in &self.objects {
            text.push_str(&format!("object {}: {} bytes {verb}, no job names it\n", upload.key, upload.bytes));
        }
        for (kind, id, why) in &self.open {
            text.push_str(&format!("{kind} {id} is open and stays: {why}\n"));
        }
        if self.incomplete {
            text.push_str("not all of it: the purge broke off, run it again\n");
        }
        if text.is_empty() {
            text.push_str("nothing is as old as that");
        }
        text.trim_end().to_owned()
    }
}

/// Where uploads lie.
const MEDIA: &str = voxfleet_nats::topology::names::MEDIA;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    fn purged(name: &str, amounts: &[(&'static str, u64, u64)]) -> Purged {
        let amounts =
            amounts.iter().map(|(place, messages, bytes)| (*place, Amount { messages: *messages, bytes: *bytes }));
        Purged { kind: Kind::Session, id: id(name), parts: Vec::new(), cut_off: false, amounts: amounts.collect() }
    }

    #[test]
    fn what_went_is_told_by_place_and_by_name() {
        let upload = ObjectInfo { key: "lost.wav".into(), bytes: 40, modified_ms: 0, digest: None };
        let report = Report {
            dry_run: false,
            purged: vec![
                purged("a", &[("ASR_AUDIO", 2, 10), ("ASR_EVENT", 1, 5)]),
                purged("b", &[("ASR_AUDIO", 1, 1)]),
                purged("c", &[]),
            ],
            open: vec![(Kind::Job, id("d"), "it has not ended")],
            objects: vec![upload],
            ..Report::default()
        };
        let value = report.value();
        assert_eq!(value["total"], json!({"messages": 5, "bytes": 56}));
        assert_eq!(value["places"]["ASR_AUDIO"], json!({"messages": 3, "bytes": 11}));
        assert_eq!(value["places"]["OBJ_asr_media"], json!({"messages": 1, "bytes": 40}));
        assert_eq!(value["open"][0], json!({"kind": "job", "id": "d", "why": "it has not ended"}));
        let text = report.text();
        for line in [
            "ASR_AUDIO      3         11",
            "session a: 3 messages, 15 bytes removed",
            "nothing is kept of session c",
            "object lost.wav: 40 bytes removed, no job names it",
            "job d is open and stays: it has not ended",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        let dry = Report { dry_run: true, purged: vec![purged("a", &[("ASR_AUDIO", 2, 10)])], ..Report::default() };
        assert!(dry.text().contains("2 messages, 10 bytes would be removed"), "{}", dry.text());
        let broken =
            Report { incomplete: true, purged: vec![purged("a", &[("ASR_AUDIO", 2, 10)])], ..Report::default() };
        assert_eq!(broken.value()["incomplete"], json!(true));
        assert!(broken.text().contains("2 messages, 10 bytes removed") && broken.text().contains("broke off"));
        assert_eq!(Report::default().text(), "nothing is as old as that");
    }
}
