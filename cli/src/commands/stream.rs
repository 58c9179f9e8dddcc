//! `voxfleet stream`: a file at its own pace, or standard input as it comes.

use std::{io::IsTerminal as _, time::Duration};

use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use voxfleet_nats::{
    Nats,
    api::{self, Endpoint},
    transcript::Filter,
};
use voxfleet_schema::{
    event::{Event, What},
    id::{Kind, StreamId},
    session::{OpenRequest, Opened, SessionOptions},
};

use super::{close, need_jetstream};
use crate::{
    Context,
    args::StreamArgs,
    env::{ProcessEnv, trace},
    exit::{Exit, OrExit as _, coded},
    producer::{Producer, ProducerError, ago, due},
    sound::{Input, Sound, SoundError},
    transcript::{
        follow::{Follow, Followed, Seen, follow_all},
        line::clock,
        screen::{Detail, Screen, Style, object, out},
    },
};

/// Chunks read ahead of the wire: a slow disk shows no gap, a long file takes no memory.
const READ_AHEAD: usize = 8;
const OPEN_DEADLINE: Duration = Duration::from_secs(5);

/// What was typed, as it is meant.
struct Plan {
    input: Input,
    id: StreamId,
    options: SessionOptions,
    /// None = as fast as it comes and is acknowledged.
    speed: Option<f64>,
}

impl Plan {
    fn of(args: &StreamArgs) -> anyhow::Result<Self> {
        let input = Input::from(args.input.as_str());
        let id = match &args.session {
            Some(id) => id.clone(),
            None => {
                StreamId::new(format!("s-{}", &Uuid::new_v4().simple().to_string()[..12])).or_exit(Exit::Internal)?
            }
        };
        let options = args.options().parsed().or_exit(Exit::Usage)?;
        // A pipe has its own pace; a file would be over at once.
        let speed = args.speed.unwrap_or(if input == Input::Stdin { 0.0 } else { 1.0 });
        Ok(Self { input, id, options, speed: (speed > 0.0).then_some(speed) })
    }
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    chunks: u64,
    audio_ms: u64,
    first_seq: u64,
    last_seq: u64,
    ended: bool,
    cut_short: bool,
}

/// What came back, as far as it says whether anything was opened.
#[derive(Debug, Clone, Default)]
struct Answers {
    final_seen: bool,
    /// The first entry that opened nothing, and why.
    reason: Option<String>,
    rejected: u64,
    last_rejected: u64,
}

impl Answers {
    fn note(&mut self, seen: Seen<'_>) {
        match seen {
            Seen::Final(_) => self.final_seen = true,
            // A worker's own rejections, which carry its name, are about chunks of a session that is open.
            Seen::Event(Event { what: What::Rejected, gpu_id: None, seq: Some(seq), error, .. })
                if *seq > self.last_rejected =>
            {
                (self.rejected, self.last_rejected) = (self.rejected + 1, *seq);
                self.reason.get_or_insert_with(|| {
                    let why = error.as_ref().map_or_else(|| "no reason given".to_owned(), ToString::to_string);
                    format!("{why} (log entry {seq})")
                });
            }
            Seen::Event(_) | Seen::Partial(_) | Seen::Revision(_) => {}
        }
    }

    /// Why nothing that was sent opened the session: then no end final will ever come. An end that ends nothing is
    /// rejected itself, unless the session exists from before.
    fn nothing_opened(&self, sent: &Sent) -> Option<&str> {
        let all = self.last_rejected == sent.last_seq || self.rejected >= sent.chunks;
        self.reason.as_deref().filter(|_| all && !self.final_seen)
    }
}

pub(crate) async fn run(args: &StreamArgs, context: &Context) -> anyhow::Result<Exit> {
    let mut screen = Screen::new(Style::of_stdout(args.json), Detail { names: false, words: false, partials: true });
    stream(args, context, &mut screen, &mut |_| ()).await
}

/// The same with the transcript going elsewhere: to `screen` whatever is news, to `keep` whatever came.
pub(super) async fn stream(
    args: &StreamArgs,
    context: &Context,
    screen: &mut Screen,
    keep: &mut (dyn FnMut(Seen<'_>) + Send),
) -> anyhow::Result<Exit> {
    let plan = Plan::of(args)?;
    let (input, format) = (plan.input.clone(), args.format);
    let opened = tokio::task::spawn_blocking(move || Sound::open(&input, format)).await.or_exit(Exit::Internal)?;
    let sound = opened.map_err(|e| anyhow::Error::new(e).context(plan.input.to_string())).or_exit(Exit::Input)?;
    let (nats, _) = context.client("voxfleet-stream").await?;
    let result = match need_jetstream(&nats).await {
        Ok(()) => with_nats(args, &plan, sound, &nats, context, screen, keep).await,
        Err(error) => Err(error),
    };
    close(nats).await;
    result
}

async fn with_nats(
    args: &StreamArgs,
    plan: &Plan,
    sound: Sound,
    nats: &Nats,
    context: &Context,
    screen: &mut Screen,
    keep: &mut (dyn FnMut(Seen<'_>) + Send),
) -> anyhow::Result<Exit> {
    let give_up = Duration::from_secs(args.give_up_s);
    let mut producer = Producer::new(nats, plan.id.clone(), sound.format(), give_up)
        .or_exit(Exit::Internal)?
        .traced(trace(&ProcessEnv));
    producer = producer.telling(|text| eprintln!("{text}"));
    if args.open {
        let opened = open(nats, plan).await?;
        eprintln!("{} is on {} (epoch {})", opened.session, opened.worker.gpu_id, opened.epoch);
    } else {
        producer = producer.with_options(&args.options().pairs());
    }
    let started = Instant::now();
    if !args.wait {
        let sent = send(args, plan, sound, producer, started, context, true).await?;
        report(args, plan, &sent)?;
        return Ok(if sent.cut_short { Exit::Interrupted } else { Exit::Ok });
    }
    // The reader is there before the first chunk; it outlives the sending, and Ctrl-C ends the sending only.
    let stop = CancellationToken::new();
    let what = Follow { filter: Filter::One(Kind::Session, plan.id.clone()), from_start: false, until_end: true };
    let speed = plan.speed;
    let lag = move |ms: u64| speed.map(|speed| ago(started, ms, speed));
    let (note, mut answers) = watch::channel(Answers::default());
    let mut seen = |seen: Seen<'_>| {
        keep(seen);
        note.send_modify(|answers| answers.note(seen));
    };
    let following = follow_all(nats, &what, screen, &lag, &mut seen, &stop);
    let sending = send(args, plan, sound, producer, started, context, false);
    tokio::pin!(following, sending);
    let (sent, followed) = tokio::select! {
        sent = &mut sending => {
            let sent = sent?;
            if sent.last_seq == 0 {
                // Stopped before the first chunk: there is nothing to wait for.
                return Ok(Exit::Interrupted);
            }
            // Ctrl-C during the sending has been answered by ending the session; its last words are waited for.
            let leave = async {
                if context.shutdown.is_cancelled() { std::future::pending().await } else { context.shutdown.cancelled().await }
            };
            tokio::select! {
                followed = &mut following => (sent, followed?),
                () = leave => (sent, Followed::Stopped),
                why = refusal(&mut answers, &sent) => {
                    report(args, plan, &sent)?;
                    return Err(anyhow::anyhow!("{}: nothing was opened: {why}", plan.id)).or_exit(Exit::Input);
                }
            }
        }
        followed = &mut following => (sending.await?, followed?),
    };
    report(args, plan, &sent)?;
    Ok(match followed {
        Followed::Ended(end) if end.error.is_some() => Exit::Failure,
        _ if sent.cut_short => Exit::Interrupted,
        Followed::Ended(_) => Exit::Ok,
        Followed::Stopped => Exit::Interrupted,
    })
}

/// Comes back only if nothing of what was sent opened the session.
async fn refusal(answers: &mut watch::Receiver<Answers>, sent: &Sent) -> String {
    match answers.wait_for(|answers| answers.nothing_opened(sent).is_some()).await {
        Ok(answers) => answers.nothing_opened(sent).unwrap_or_default().to_owned(),
        // Nobody reads any more, so nobody will know.
        Err(_) => std::future::pending().await,
    }
}

async fn open(nats: &Nats, plan: &Plan) -> anyhow::Result<Opened> {
    let request = OpenRequest { session: plan.id.clone(), options: plan.options.clone() };
    (api::request_traced(nats, Endpoint::SessionOpen, &request, trace(&ProcessEnv).as_ref(), OPEN_DEADLINE).await)
        .map_err(|error| coded(Exit::of_api(&error), anyhow::Error::new(error).context(format!("open {}", plan.id))))
}

/// Sends everything and the end. Ctrl-C stops the reading; the session still gets its end, so its last words come.
async fn send(
    args: &StreamArgs,
    plan: &Plan,
    sound: Sound,
    mut producer: Producer,
    started: Instant,
    context: &Context,
    draw: bool,
) -> anyhow::Result<Sent> {
    let format = sound.format();
    let frames = (u64::from(format.rate_hz) * u64::from(args.chunk_ms) / 1000).max(1) as usize;
    let bar = bar(sound.total_ms().filter(|_| draw && !args.json));
    let mut chunks = read_ahead(sound, frames);
    // A second Ctrl-C ends the process; nothing else stops the resending of a chunk before its time is up.
    let never = CancellationToken::new();
    let (mut sent, mut sent_frames, mut broken) = (Sent::default(), 0u64, None);
    loop {
        let chunk = tokio::select! {
            () = context.shutdown.cancelled() => {
                sent.cut_short = plan.input != Input::Stdin;
                break;
            }
            chunk = chunks.recv() => chunk,
        };
        let chunk = match chunk {
            Some(Ok(chunk)) => chunk,
            Some(Err(error)) => {
                broken = Some(error);
                break;
            }
            None => break,
        };
        sent_frames += (chunk.len() / format.frame_bytes()) as u64;
        sent.audio_ms = sent_frames * 1000 / u64::from(format.rate_hz);
        if let Some(speed) = plan.speed {
            // A chunk exists once its last sample has been spoken.
            tokio::select! {
                () = context.shutdown.cancelled() => {}
                () = tokio::time::sleep_until(due(started, sent.audio_ms, speed)) => {}
            }
        }
        let seq = producer.send(chunk, false, &never).await.map_err(unsent)?;
        sent.first_seq = if sent.chunks == 0 { seq } else { sent.first_seq };
        (sent.chunks, sent.last_seq) = (sent.chunks + 1, seq);
        bar.set_position(sent.audio_ms);
    }
    let interrupted = context.shutdown.is_cancelled();
    if sent.chunks == 0 {
        sent.cut_short = interrupted;
    }
    // An end without audio would open nothing, and nothing would answer it; what a request opened it does end.
    if !args.no_end && (sent.chunks > 0 || args.open) {
        sent.ended = true;
        sent.last_seq = producer.send(Bytes::new(), true, &never).await.map_err(unsent)?;
    }
    bar.finish_and_clear();
    // What was readable has been sent and ended like a whole file; that it was not whole is told all the same.
    match broken {
        Some(error) => Err(anyhow::Error::new(error).context(plan.input.to_string())).or_exit(Exit::Input),
        None if sent.chunks == 0 && !interrupted => {
            Err(anyhow::anyhow!("{}: no audio in it, nothing was sent", plan.input)).or_exit(Exit::Input)
        }
        None => Ok(sent),
    }
}

fn unsent(error: ProducerError) -> anyhow::Error {
    let exit = if error.is_full() { Exit::Refused } else { Exit::Unavailable };
    coded(exit, error.into())
}

/// Reads on a thread that may block. It ends with its input, or when nobody takes its chunks any more; standard input
/// that never ends keeps the thread until the process ends, so nobody waits for it.
fn read_ahead(mut sound: Sound, frames: usize) -> mpsc::Receiver<Result<Bytes, SoundError>> {
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    let _observed_through_the_channel = tokio::task::spawn_blocking(move || {
        while let Some(chunk) = sound.next(frames).transpose() {
            let failed = chunk.is_err();
            if sender.blocking_send(chunk).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

fn bar(total_ms: Option<u64>) -> ProgressBar {
    let bar = match total_ms.filter(|_| std::io::stderr().is_terminal()) {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::hidden(),
    };
    let style = ProgressStyle::with_template("sending {wide_bar:.cyan/dim} {percent}%");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn report(args: &StreamArgs, plan: &Plan, sent: &Sent) -> anyhow::Result<()> {
    if args.json {
        object(&json!({
            "type": "sent", "session": plan.id, "chunks": sent.chunks, "audio_ms": sent.audio_ms,
            "first_seq": sent.first_seq, "last_seq": sent.last_seq, "ended": sent.ended,
        }))?;
    } else if args.wait {
        eprintln!("{}: {} of audio in {} chunks", plan.id, clock(sent.audio_ms), sent.chunks);
    } else {
        out(&format!(
            "{}: {} of audio in {} chunks, log entries {} to {}",
            plan.id,
            clock(sent.audio_ms),
            sent.chunks,
            sent.first_seq,
            sent.last_seq
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::{
        event::Scope,
        failure::{Failure, FailureClass},
    };

    fn rejected(seq: u64, gpu: Option<&str>) -> Event {
        let mut event = Event::new(Scope::Session, "s", What::Rejected, 0);
        event.seq = Some(seq);
        event.gpu_id = gpu.map(str::to_owned);
        event.error = Some(Failure::new(FailureClass::BadAudio, format!("entry {seq} is noise")));
        event
    }

    fn answers(events: &[Event]) -> Answers {
        let mut answers = Answers::default();
        events.iter().for_each(|e| answers.note(Seen::Event(e)));
        answers
    }

    /// Two chunks at 5 and 6, the end at 7.
    const SENT: Sent = Sent { chunks: 2, audio_ms: 200, first_seq: 5, last_seq: 7, ended: true, cut_short: false };

    #[test]
    fn a_rejected_end_means_that_nothing_was_opened() {
        let all = answers(&[rejected(5, None), rejected(6, None), rejected(7, None)]);
        assert!(all.nothing_opened(&SENT).is_some_and(|why| why.contains("entry 5 is noise")), "{all:?}");
    }

    #[test]
    fn an_end_of_a_session_from_before_is_not_rejected_and_all_else_was() {
        let chunks = answers(&[rejected(5, None), rejected(6, None)]);
        assert!(chunks.nothing_opened(&SENT).is_some());
        let read_twice = answers(&[rejected(5, None), rejected(5, None)]);
        assert!(read_twice.nothing_opened(&SENT).is_none(), "{read_twice:?}");
    }

    #[test]
    fn what_is_open_is_waited_for() {
        assert!(answers(&[]).nothing_opened(&SENT).is_none());
        assert!(answers(&[rejected(5, None)]).nothing_opened(&SENT).is_none(), "6 may have opened it");
        let by_worker = answers(&[rejected(5, Some("a")), rejected(6, Some("a")), rejected(7, Some("a"))]);
        assert!(by_worker.nothing_opened(&SENT).is_none());
        let with_final = Answers { final_seen: true, ..answers(&[rejected(7, None)]) };
        assert!(with_final.nothing_opened(&SENT).is_none());
    }
}
