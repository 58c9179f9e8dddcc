//! `voxfleet demo`: a server, a dispatcher and two workers as real processes here, a test call streamed through them as a
//! producer would, its transcript growing on the screen, and beside it the same call as a file job; then the figures. In the
//! second act the worker that has the call is killed in the middle of it. Last, the same seen through `nats`.
//!
//! Everything started lives in [`Fleet`], which ends it when dropped: at the end, after an error, at Ctrl-C alike.

mod call;
mod failover;
mod inspect;
mod live;
pub(crate) mod report;
pub(crate) mod speakers;

use std::{
    cell::Cell,
    io::IsTerminal as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use voxfleet_eval::wder::Spoken;
use voxfleet_harness::{
    find,
    fleet::{Engine, Fleet, models_dir},
};
use voxfleet_nats::{Nats, NatsConfig, transcript::Chain};
use voxfleet_schema::{
    id::{Kind, StreamId},
    job::JobResult,
};
use voxfleet_worker::{WorkerConfig, engine::ct2, ipc::EngineKind};

use crate::{
    Context,
    args::{DemoArgs, DemoEngine, JobArgs, OptionArgs},
    exit::{Exit, OrExit as _},
    file_job::{Step, Wish, outcome, progress::Show, wait},
    transcript::{
        follow::Seen,
        line::Paint,
        screen::{Detail, Screen, Style, object, out},
    },
};
use call::Call;
use live::{LAST_WORDS, Live};
use speakers::Told;

const STOP: Duration = Duration::from_secs(5);

/// A channel each.
fn by_channel() -> OptionArgs {
    let (channels, names) = (Some("split".to_owned()), Some("agent,customer".to_owned()));
    OptionArgs { channels, channel_names: names, ..OptionArgs::default() }
}

/// Who was heard to say what.
struct Who {
    reference: Vec<Spoken>,
    live: Told,
    job: Told,
    /// With a channel for each side, where there is such a recording.
    stereo: Option<Told>,
}

impl Who {
    fn object(&self) -> Value {
        let of = |told: &Told| told.object(&self.reference);
        json!({ "live": of(&self.live), "job": of(&self.job), "stereo": self.stereo.as_ref().map(of) })
    }

    fn print(&self, paint: Paint, stereo: Option<&Recorded>) -> anyhow::Result<()> {
        out("")?;
        out(&format!("speakers, live: {}", self.live.line(&self.reference)))?;
        out(&format!("speakers, job:  {}", self.job.line(&self.reference)))?;
        if let (Some(told), Some(stereo)) = (&self.stereo, stereo) {
            out(&format!("by channel:     {}", told.line(&self.reference)))?;
            for line in speakers::lines(&stereo.result.segments) {
                out(&paint.dim(&format!("  {line}")))?;
            }
        }
        Ok(())
    }
}

/// What the file job gave.
pub(crate) struct Recorded {
    pub(crate) id: StreamId,
    pub(crate) result: JobResult,
    /// From the upload to the result.
    pub(crate) wall: Duration,
    pub(crate) gpu: Option<String>,
}

pub(crate) async fn run(args: &DemoArgs, context: &Context) -> anyhow::Result<Exit> {
    // Of the settings only what a worker needs counts here: the demo brings its own server.
    let mut worker = context.configure(&[], "error")?.settings.worker;
    worker.models_dir = Some(args.models_dir.clone().unwrap_or_else(models_dir));
    worker.engine = match args.engine {
        DemoEngine::WhisperCpp => EngineKind::WhisperCpp,
        DemoEngine::Ct2 if ct2::BUILT_IN => EngineKind::Ct2,
        DemoEngine::Ct2 => {
            return Err(anyhow::anyhow!("--engine ct2: this build has no CTranslate2 (cargo feature ct2)"))
                .or_exit(Exit::Usage);
        }
    };
    tokio::select! {
        biased;
        () = context.shutdown.cancelled() => {
            eprintln!("stopped; everything that was started here is gone");
            // Serving has no end of its own: Ctrl-C is how one leaves.
            Ok(if args.serve { Exit::Ok } else { Exit::Interrupted })
        }
        result = demo(args, worker, &context.shutdown) => result,
    }
}

/// The fleet and nothing else, to be used from other terminals.
async fn serve(fleet: &Fleet, processes: &str, paint: Paint, shutdown: &CancellationToken) -> anyhow::Result<()> {
    let voxfleet = std::env::current_exe().map_or_else(|_| "voxfleet".to_owned(), |exe| exe.display().to_string());
    let call = find::root().join("tests/audio/call-01.flac");
    if let Some(url) = dashboard(fleet).await {
        out(&format!("dashboard: {}", paint.cyan(&url)))?;
    }
    out(&format!("{processes} run until Ctrl-C. In another terminal:\n"))?;
    for line in [
        format!("export VOXFLEET__NATS__URLS={}", fleet.url()),
        format!("{voxfleet} transcribe {} -f srt", call.display()),
        format!("{voxfleet} stream {} --wait", call.display()),
        format!("{voxfleet} jobs list"),
        format!("{voxfleet} status"),
        format!("nats --server {} sub 'asr.v1.>' --translate '{voxfleet} decode'", fleet.url()),
    ] {
        out(&format!("  {}", paint.cyan(&line)))?;
    }
    shutdown.cancelled().await;
    Ok(())
}

async fn demo(args: &DemoArgs, worker: WorkerConfig, shutdown: &CancellationToken) -> anyhow::Result<Exit> {
    // Told before anything starts: what is missing, and what brings it.
    find::nats_server()?;
    let speed = if args.speed > 0.0 { args.speed } else { 1.0 };
    let dir = args.audio_dir.clone().unwrap_or_else(|| find::root().join("tests/audio"));
    let terminal = std::io::stdout().is_terminal();
    let say = |text: &str| if args.json { Ok(()) } else { out(text) };
    let paint = Paint { colour: terminal && !args.json };
    if args.serve {
        let fleet = start(args).await?;
        serve(&fleet, &report::processes(&fleet), paint, shutdown).await?;
        return Ok(Exit::Ok);
    }
    let call = Arc::new(Call::load(&dir, &args.call).or_exit(Exit::Input)?);

    say(&paint.bold(&format!("voxfleet demo: {} ({:.0} s) at {speed} x real time", call.name, call.seconds())))?;
    let started = Instant::now();
    let mut fleet = start(args).await?;
    let processes = report::processes(&fleet);
    say(&format!("{processes} ready in {:.1} s", started.elapsed().as_secs_f64()))?;
    if let Some(url) = dashboard(&fleet).await {
        say(&format!("dashboard: {}", paint.cyan(&url)))?;
    }
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
    let mut screen = Screen::new(style, Detail { names: false, words: true, partials: true });
    let options = [("diarize".to_owned(), "on".to_owned())];
    let mut nobody = |_: Seen<'_>| ();
    let recording = dir.join(format!("{}.flac", call.name));
    let patience = Duration::from_secs_f64(call.seconds() / speed) + LAST_WORDS;
    let (live, job) = tokio::try_join!(
        live::transcribe(&nats, &call, &id, speed, &options, &mut screen, &mut nobody),
        in_time(
            patience,
            "the file job",
            file_job(&nats, &recording, OptionArgs { diarize: Some("on".to_owned()), ..OptionArgs::default() })
        ),
    )?;
    let stereo = dir.join(format!("{}-stereo.flac", call.name));
    let stereo = match stereo.is_file() {
        true => Some(in_time(patience, "the stereo recording", file_job(&nats, &stereo, by_channel())).await?),
        false => None,
    };
    let who = Who {
        reference: speakers::reference(&dir.join(format!("{}.json", call.name))).or_exit(Exit::Input)?,
        live: Told::of_finals(&speakers::revised(&nats, &id, &live.finals).await?),
        job: Told::of_result(&job.result),
        stereo: stereo.as_ref().map(|stereo| Told::of_result(&stereo.result)),
    };
    fleet.check_alive()?;
    let offline = {
        let (call, spinner) = (call.clone(), spinner(args, "the same call, the same engine called directly"));
        let offline = tokio::task::spawn_blocking(move || call::offline(&call, &worker)).await;
        spinner.finish_and_clear();
        offline.or_exit(Exit::Internal)??
    };

    let found = report::Found { call: &call, speed, live: &live, job: &job, offline: &offline };
    if !args.json {
        found.print(paint)?;
        who.print(paint, stereo.as_ref())?;
    }
    let killed = match args.no_kill {
        true => None,
        false => {
            let before = failover::Before { text: &offline.text, told: &who.live };
            Some(failover::act(&nats, &mut fleet, &call, speed, &options, style, &before).await?)
        }
    };
    if args.json {
        let mut object_found = found.object();
        object_found["speakers"] = who.object();
        if let Some(killed) = &killed {
            object_found["failover"] = killed.object();
        }
        object(&object_found)?;
    } else {
        let moved = killed.as_ref().map(|killed| &killed.id);
        inspect::print(&fleet.url(), &id, &job.id, moved, paint).await?;
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
    // Who runs the demo in a script hears of a lost word too.
    Ok(if killed.is_none_or(|killed| killed.is_good()) { Exit::Ok } else { Exit::Failure })
}

/// Where a browser sees it. A demo is one without a page too, and its dispatcher's log says why there is none.
async fn dashboard(fleet: &Fleet) -> Option<String> {
    let dispatcher = fleet.dispatchers.first()?;
    let url = dispatcher.http_url().await;
    url.inspect_err(|error| tracing::warn!(%error, "no dashboard")).ok()
}

async fn start(args: &DemoArgs) -> anyhow::Result<Fleet> {
    let spinner = spinner(args, "starting nats-server, one dispatcher, two workers");
    let engine = if args.engine == DemoEngine::Ct2 { Engine::Ct2 } else { Engine::Micro };
    let mut fleet = Fleet::builder().workers(2).slots(4).engine(engine).set("worker.decode_threads", 1);
    // Any free port: several demos may run here, and a fleet.
    fleet = fleet.set("dispatcher.http.listen", "127.0.0.1:0");
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

/// The call as a recording: uploaded, submitted, waited for, as `voxfleet transcribe` does it.
async fn file_job(nats: &Nats, path: &Path, flags: OptionArgs) -> anyhow::Result<Recorded> {
    let begun = Instant::now();
    let wish = Wish::of(&JobArgs { input: path.display().to_string(), flags, ..JobArgs::default() })?;
    let id = wish.submit(nats, true, &Cell::new(Step::default())).await?.job;
    let ended = wait::until_end(nats, &id, &mut Show::new(true), false).await?;
    let result = outcome::aggregate(nats, &id, ended).await?.value;
    let wall = begun.elapsed();
    let gpu = Chain::new(nats).last(Kind::Job, &id).await?.map(|last| last.value.gpu_id.to_string());
    Ok(Recorded { id, result, wall, gpu })
}

/// Without a bound a broken fleet would hang the demo.
async fn in_time<T>(
    patience: Duration,
    what: &str,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(patience, work).await {
        Ok(result) => result.with_context(|| what.to_owned()),
        Err(_) => anyhow::bail!("{what} was not done within {} s", patience.as_secs()),
    }
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
