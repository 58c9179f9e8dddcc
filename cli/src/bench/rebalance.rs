//! What it costs when half of a fleet dies at once: which events come, how many sessions move, and how long until each of
//! them produces again.
//!
//! That many silent workers look like a broken network, so verdicts are held for `dispatcher.mass_silence_hold_ms`; the
//! times include that.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{
    audio,
    fleet::{Engine, Fleet},
    load::Crowd,
    wait::eventually,
};
use voxfleet_nats::{
    Nats, NatsConfig,
    retry::Backoff,
    transcript::{self, Filter, ReadError, Start},
};
use voxfleet_schema::{
    event::{Event, What},
    id::{GpuId, StreamId},
};

use super::{progress, usage};
use crate::{demo::report::quantile, transcript::follow::good};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench rebalance
  voxfleet bench rebalance --workers 8 --kill 4 --sessions 32 --json")]
pub(crate) struct RebalanceArgs {
    /// Workers at the start
    #[arg(long, default_value_t = 16, value_name = "N")]
    workers: usize,
    /// How many are killed at one instant
    #[arg(long, default_value_t = 8, value_name = "N")]
    kill: usize,
    /// Sessions in real time, spread evenly
    #[arg(long, default_value_t = 64, value_name = "N")]
    sessions: usize,
}

const CHUNK_MS: u64 = 200;
const OPENED_PER_S: f64 = 50.0;
const PATIENCE: Duration = Duration::from_secs(60);

/// What was heard so far.
#[derive(Default)]
struct Heard {
    /// Who speaks for each session, and in which epoch.
    owners: BTreeMap<StreamId, (GpuId, u64)>,
    after: Option<After>,
}

/// From the kill on.
struct After {
    at: Instant,
    before: BTreeMap<StreamId, (GpuId, u64)>,
    events: BTreeMap<&'static str, u64>,
    /// `dead` events of killed workers, in ms after the kill.
    dead: Vec<u64>,
    /// First partial or final of a higher epoch, in ms after the kill.
    again: BTreeMap<StreamId, u64>,
}

impl Heard {
    fn word(&mut self, id: &StreamId, gpu_id: &GpuId, epoch: u64) {
        self.owners.insert(id.clone(), (gpu_id.clone(), epoch));
        if let Some(after) = &mut self.after
            && after.before.get(id).is_some_and(|(_, old)| epoch > *old)
        {
            let ms = after.at.elapsed().as_millis() as u64;
            after.again.entry(id.clone()).or_insert(ms);
        }
    }

    fn event(&mut self, event: &Event) {
        if let Some(after) = &mut self.after {
            *after.events.entry(event.what.as_str()).or_default() += 1;
            if event.what == What::Dead {
                after.dead.push(after.at.elapsed().as_millis() as u64);
            }
        }
    }
}

pub(super) async fn run(args: RebalanceArgs) -> Result<Value> {
    let RebalanceArgs { workers, kill, sessions } = args;
    usage(kill >= 1 && kill < workers && sessions >= 1, "at least one worker is killed and one is left")?;
    // Those who are left have room for all.
    let slots = sessions.div_ceil(workers - kill) as u32;
    let mut fleet =
        Fleet::builder().workers(workers).slots(slots).engine(Engine::Simulated { speed: 0.0 }).start().await?;
    let config = NatsConfig { urls: fleet.urls(), ..NatsConfig::default() };
    let nats = Nats::connect(&config, "voxfleet-bench").await?;
    let pcm = audio::bursts(1, 120.0);
    let mut crowd = Crowd::new(fleet.client(), "rebalance", sessions, &pcm, CHUNK_MS);
    let ramp = sessions as f64 / OPENED_PER_S;
    let heard = Mutex::new(Heard::default());
    progress(&format!("{sessions} sessions on {workers} workers, {kill} of them killed at once"));
    let measured = {
        let long = ramp + 4.0 * PATIENCE.as_secs_f64();
        let speaking = crowd.pace(ramp, f64::INFINITY, long);
        let listening = listen(&nats, &heard);
        let killing = kill_and_wait(&mut fleet, kill, sessions, &heard);
        tokio::select! {
            killed = killing => killed?,
            sent = speaking => anyhow::bail!("not all sessions came back while {:?} was sent", sent?),
            failed = listening => anyhow::bail!("reading the fleet's streams: {failed}"),
        }
    };
    nats.close(Duration::from_secs(1)).await;
    Ok(measured)
}

async fn kill_and_wait(fleet: &mut Fleet, kill: usize, sessions: usize, heard: &Mutex<Heard>) -> Result<Value> {
    eventually("a word of each session", PATIENCE, || async { (locked(heard).owners.len() == sessions).then_some(()) })
        .await?;
    let killed: BTreeSet<String> = fleet.workers.iter().take(kill).map(|w| w.gpu_id().to_owned()).collect();
    {
        let mut heard = locked(heard);
        let before = heard.owners.clone();
        let after =
            After { at: Instant::now(), before, events: BTreeMap::new(), dead: Vec::new(), again: BTreeMap::new() };
        heard.after = Some(after);
    }
    for worker in fleet.workers.iter_mut().take(kill) {
        worker.kill9()?;
    }
    let displaced: BTreeSet<StreamId> = {
        let heard = locked(heard);
        let owners = heard.owners.iter().filter(|(_, (gpu, _))| killed.contains(gpu.as_str()));
        owners.map(|(id, _)| id.clone()).collect()
    };
    ensure!(!displaced.is_empty(), "the killed workers had no session");
    eventually("all sessions again", PATIENCE, || async {
        let heard = locked(heard);
        let again = heard.after.as_ref().map(|after| &after.again)?;
        displaced.iter().all(|id| again.contains_key(id)).then_some(())
    })
    .await
    .with_context(|| fleet.logs())?;
    let heard = locked(heard);
    let after = heard.after.as_ref().context("no kill")?;
    let times: Vec<u64> = displaced.iter().filter_map(|id| after.again.get(id)).copied().collect();
    Ok(json!({
        "workers": fleet.workers.len(),
        "killed": kill,
        "sessions": sessions,
        "displaced": displaced.len(),
        "moved_without_need": after.again.keys().filter(|id| !displaced.contains(*id)).count(),
        "detection_ms": quantile(&after.dead, 0.95),
        "p50_ms": quantile(&times, 0.5),
        "p95_ms": quantile(&times, 0.95),
        "all_again_ms": times.iter().max(),
        "moves": after.events.get(What::Moved.as_str()).copied().unwrap_or(0),
        "events": after.events,
    }))
}

fn locked(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends only with an error.
async fn listen(nats: &Nats, heard: &Mutex<Heard>) -> anyhow::Error {
    let mut events = transcript::events(nats, &Filter::All, Start::New);
    let mut partials = transcript::partials(nats, &Filter::All, Start::New);
    let mut finals = transcript::finals(nats, &Filter::All, Start::New);
    let mut backoff = Backoff::default();
    let failed = |error: ReadError| Err::<(), _>(error);
    loop {
        let read = tokio::select! {
            read = events.next() => read.map_or_else(failed, |read| { locked(heard).event(&read.value); Ok(()) }),
            read = partials.next() => read.map_or_else(failed, |read| {
                locked(heard).word(&read.value.id, &read.value.gpu_id, read.value.epoch);
                Ok(())
            }),
            read = finals.next() => read.map_or_else(failed, |read| {
                locked(heard).word(&read.value.id, &read.value.gpu_id, read.value.epoch);
                Ok(())
            }),
        };
        if let Err(error) = read
            && let Err(error) = good::<()>(Err(error), nats, &mut backoff).await
        {
            return error.into();
        }
    }
}
