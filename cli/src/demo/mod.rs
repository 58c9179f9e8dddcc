//! `voxfleet demo`: a server, a dispatcher and two workers as real processes here, a test call streamed through them as a
//! producer would, its transcript growing on the screen; then the figures, and the same seen through `nats`.
//!
//! Everything started lives in [`Fleet`], which ends it when dropped: at the end, after an error, at Ctrl-C alike.

mod call;
mod inspect;
pub(crate) mod report;

use std::{
    io::IsTerminal as _,
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use voxfleet_harness::{
    find,
    fleet::{Engine, Fleet, models_dir},
};
use voxfleet_nats::{Nats, NatsConfig, transcript::Filter};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Final, join_text},
};
use voxfleet_worker::WorkerConfig;

use crate::{
    Context,
    args::DemoArgs,
    exit::{Exit, OrExit as _},
    producer::{Producer, ago, due},
    transcript::{
        follow::{Follow, Followed, follow},
        line::Paint,
        screen::{Detail, Screen, Style, object, out},
    },
    wer,
};
use call::Call;

/// After the last chunk: the largest window on a busy machine, and then some.
const LAST_WORDS: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(5);

/// What the live run gave.
pub(crate) struct Live {
    pub(crate) finals: Vec<Final>,
    /// From the end of a final's speech until it was here, in ms.
    pub(crate) lags_ms: Vec<u64>,
    pub(crate) wall: Duration,
}

impl Live {
    pub(crate) fn text(&self) -> String {
        let texts: Vec<String> = self.finals.iter().map(Final::text).collect();
        join_text(texts.iter().map(String::as_str))
    }
}

pub(crate) async fn run(args: &DemoArgs, context: &Context) -> anyhow::Result<Exit> {
    // Of the settings only what a worker needs counts here: the demo brings its own server.
    let mut worker = context.configure(&[], "error")?.settings.worker;
    worker.models_dir = Some(args.models_dir.clone().unwrap_or_else(models_dir));
    tokio::select! {
        biased;
        () = context.shutdown.cancelled() => {
            eprintln!("stopped; everything that was started here is gone");
            Ok(Exit::Interrupted)
        }
        result = demo(args, worker, &context.shutdown) => result,
    }
}

async fn demo(args: &DemoArgs, worker: WorkerConfig, shutdown: &CancellationToken) -> anyhow::Result<Exit> {
    // Told before anything starts: what is missing, and what brings it.
    find::nats_server()?;
    let speed = if args.speed > 0.0 { args.speed } else { 1.0 };
    let dir = args.audio_dir.clone().unwrap_or_else(|| find::root().join("tests/audio"));
    let call = Arc::new(Call::load(&dir, &args.call).or_exit(Exit::Input)?);
    let terminal = std::io::stdout().is_terminal();
    let say = |text: &str| if args.json { Ok(()) } else { out(text) };
    let paint = Paint { colour: terminal && !args.json };

    say(&paint.bold(&format!("voxfleet demo: {} ({:.0} s) at {speed} x real time", call.name, call.seconds())))?;
    let started = Instant::now();
    let mut fleet = start(args).await?;
    let processes = report::processes(&fleet);
    say(&format!("{processes} ready in {:.1} s", started.elapsed().as_secs_f64()))?;
    say("")?;

    let config = NatsConfig { urls: fleet.urls(), ..NatsConfig::default() };
    let nats = Nats::connect(&config, "voxfleet-demo").await.or_exit(Exit::Unavailable)?;
    let id = StreamId::new(format!("call-{}-{}", args.call, &Uuid::new_v4().simple().to_string()[..6]))
        .or_exit(Exit::Usage)?;
    let style = match (args.json, terminal) {
        (true, _) => Style::Silent,
        (false, true) => Style::Terminal,
        (false, false) => Style::Plain,
    };
    let live = transcribe(&nats, &call, &id, speed, style).await?;
    fleet.check_alive()?;
    let offline = {
        let (call, spinner) = (call.clone(), spinner(args, "the same call, the same engine called directly"));
        let offline = tokio::task::spawn_blocking(move || call::offline(&call, &worker)).await;
        spinner.finish_and_clear();
        offline.or_exit(Exit::Internal)??
    };

    let errors = wer::compare(&call.reference(), &live.text());
    if args.json {
        object(&report::object(&call, speed, &live, errors, &offline))?;
    } else {
        report::print(&call, speed, &live, errors, &offline, paint)?;
        inspect::print(&fleet.url(), &id, paint).await?;
    }
    if args.keep {
        let hint = format!("still running: nats --server {} sub 'asr.v1.>'; Ctrl-C stops it", fleet.url());
        if args.json {
            eprintln!("{hint}")
        } else {
            out(&format!("\n{hint}"))?
        }
        shutdown.cancelled().await;
    }
    nats.close(Duration::from_secs(1)).await;
    stop(&mut fleet).await;
    say(&paint.dim(&format!("stopped: {processes}")))?;
    Ok(Exit::Ok)
}

async fn start(args: &DemoArgs) -> anyhow::Result<Fleet> {
    let spinner = spinner(args, "starting nats-server, one dispatcher, two workers");
    let mut fleet = Fleet::builder().workers(2).slots(4).engine(Engine::Micro).set("worker.decode_threads", 1);
    if let Some(dir) = &args.models_dir {
        fleet = fleet.set("worker.models_dir", dir.display());
    }
    let fleet = fleet.start().await;
    spinner.finish_and_clear();
    Ok(fleet?)
}

/// On a terminal, while something takes its time.
fn spinner(args: &DemoArgs, message: &'static str) -> ProgressBar {
    if args.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{spinner} {msg} {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    let spinner = ProgressBar::new_spinner().with_style(style).with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// Streams the call and follows its transcript to the end final.
async fn transcribe(nats: &Nats, call: &Call, id: &StreamId, speed: f64, style: Style) -> anyhow::Result<Live> {
    let mut screen = Screen::new(style, Detail { names: false, words: true, partials: true });
    let what = Follow { filter: Filter::One(Kind::Session, id.clone()), from_start: false, until_end: true };
    let (mut finals, mut lags_ms) = (Vec::new(), Vec::new());
    let begun = tokio::time::Instant::now();
    let lag = move |ms: u64| Some(ago(begun, ms, speed));
    let mut seen = |f: &Final| {
        if let Some(last) = f.segments.last() {
            lags_ms.push(ago(begun, last.end_ms, speed));
        }
        finals.push(f.clone());
    };
    let stop = CancellationToken::new();
    let following = follow(nats, &what, &mut screen, &lag, &mut seen, &stop);
    let sending = async {
        send(nats, call, id, speed, begun).await?;
        // From here on only the last words are awaited; without a bound a broken fleet would hang the demo.
        tokio::time::sleep(LAST_WORDS).await;
        Err::<(), _>(anyhow::anyhow!("no end final within {} s of the end of the call", LAST_WORDS.as_secs()))
    };
    let followed = tokio::select! {
        followed = following => followed?,
        failed = sending => return Err(failed.err().unwrap_or_else(|| anyhow::anyhow!("sending ended"))),
    };
    if let Followed::Ended(end) = &followed
        && let Some(error) = &end.error
    {
        anyhow::bail!("the session ended with {error}");
    }
    Ok(Live { finals, lags_ms, wall: begun.elapsed() })
}

async fn send(nats: &Nats, call: &Call, id: &StreamId, speed: f64, begun: tokio::time::Instant) -> anyhow::Result<()> {
    let mut producer = Producer::new(nats, id.clone(), call.format, Duration::from_secs(30))?;
    let never = CancellationToken::new();
    let mut sent = 0;
    while sent < call.pcm.len() {
        let end = (sent + call.chunk_bytes()).min(call.pcm.len());
        tokio::time::sleep_until(due(begun, call.ms_of(end), speed)).await;
        producer.send(call.pcm.slice(sent..end), false, &never).await?;
        sent = end;
    }
    producer.send(bytes::Bytes::new(), true, &never).await?;
    Ok(())
}

/// Politely first: a worker that drains leaves nothing behind. What does not end in time is killed when dropped.
async fn stop(fleet: &mut Fleet) {
    for worker in &mut fleet.workers {
        if let Err(error) = worker.terminate(STOP).await {
            tracing::warn!(%error, "worker did not stop in time");
        }
    }
    for dispatcher in &mut fleet.dispatchers {
        if let Err(error) = dispatcher.terminate(STOP).await {
            tracing::warn!(%error, "dispatcher did not stop in time");
        }
    }
}
