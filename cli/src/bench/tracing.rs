//! What traces cost: the same recordings through two fleets of the same kind, one that tells its spans to a collector and one
//! that does not, in turns, so that whatever else the machine does falls on both.
//!
//! The simulated engine decodes without delay, so nothing hides what is done beside it, and each final has its four spans. The
//! collector takes everything at once; it runs in this process, whose CPU time is not counted.

use std::{
    iter::zip,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use voxfleet_harness::{
    audio::{self, Pcm},
    checker,
    collector::Collector,
    fleet::{Engine, Fleet},
    load,
    wait::eventually,
};

use super::{
    pipeline::CHUNK_MS,
    processes::{Cpu, Spent},
    progress, rounded, usage,
};

const DEADLINE: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench tracing
  voxfleet bench tracing --rounds 10 --sessions 64 --json")]
pub(crate) struct TracingArgs {
    /// Turns of each fleet
    #[arg(long, default_value_t = 6, value_name = "N")]
    rounds: usize,
    /// Sessions at once
    #[arg(long, default_value_t = 32, value_name = "N")]
    sessions: usize,
    /// Audio of each session
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    seconds: f64,
}

/// One of the two.
struct Side {
    fleet: Fleet,
    ends: load::Ends,
    /// Sums over its turns.
    wall_s: f64,
    cpu: Spent,
    finals: usize,
}

pub(super) async fn run(args: TracingArgs) -> Result<Value> {
    usage(args.rounds >= 1 && args.sessions >= 1 && args.seconds >= 1.0, "nothing to measure")?;
    let collector = Collector::counting().await?;
    let recordings: Vec<Pcm> = (0..args.sessions as u64).map(|n| audio::bursts(n, args.seconds)).collect();
    let mut off = Side::start(args.sessions, "").await?;
    let mut on = Side::start(args.sessions, &collector.url()).await?;
    let warm = collector.spans();
    for round in 0..args.rounds {
        progress(&format!(
            "round {} of {}: {} sessions without traces, and with them",
            round + 1,
            args.rounds,
            args.sessions
        ));
        // Who comes second may find the machine warmer.
        if round % 2 == 0 {
            off.turn(round, &recordings).await?;
            on.turn(round, &recordings).await?;
        } else {
            on.turn(round, &recordings).await?;
            off.turn(round, &recordings).await?;
        }
    }
    // Three parts and itself; openings, assignments and ends come on top.
    let least = 4 * on.finals;
    let all = || async { Some(collector.spans() - warm).filter(|spans| *spans >= least) };
    let spans = eventually("all spans at the collector", DEADLINE, all).await?;
    let audio_s: f64 = recordings.iter().map(Pcm::seconds).sum::<f64>() * args.rounds as f64;
    Ok(json!({
        // Of the rates: 1 = tracing costs no time.
        "ratio": rounded(off.wall_s / on.wall_s),
        // Of the CPU time of dispatcher and supervisor, where it is spent.
        "cpu_ratio": rounded(on.cpu.ours() / off.cpu.ours()),
        "cpu_us_per_span": rounded((on.cpu.ours() - off.cpu.ours()) * 1e6 / spans as f64),
        "off": off.json(audio_s),
        "on": on.json(audio_s),
        "spans": spans,
        "finals": on.finals,
        "rounds": args.rounds,
        "sessions": args.sessions,
    }))
}

impl Side {
    async fn start(sessions: usize, endpoint: &str) -> Result<Self> {
        let fleet = Fleet::builder()
            .workers(1)
            .slots(sessions as u32 + 1)
            .engine(Engine::Simulated { speed: 0.0 })
            .set("tracing.endpoint", endpoint)
            .set("tracing.queue", 1_000_000)
            .start()
            .await?;
        let mut ends = load::Ends::listen(&fleet.client()).await?;
        load::upload(fleet.client(), "warm", &audio::bursts(99, 2.0), CHUNK_MS, &[]).await?;
        ends.wait(["warm".to_owned()], DEADLINE).await?;
        Ok(Self { fleet, ends, wall_s: 0.0, cpu: Spent::default(), finals: 0 })
    }

    async fn turn(&mut self, round: usize, recordings: &[Pcm]) -> Result<()> {
        let names: Vec<String> = (0..recordings.len()).map(|n| format!("traced-{round}-{n}")).collect();
        let (began, before) = (Instant::now(), Cpu::now(&self.fleet));
        let uploads = zip(&names, recordings).map(|(name, pcm)| {
            let client = self.fleet.client();
            async move { load::upload(client, name, pcm, CHUNK_MS, &[("Asr-Opt-Interim", "false")]).await }
        });
        let (uploaded, ended) = tokio::join!(try_join_all(uploads), self.ends.wait(names.iter().cloned(), DEADLINE));
        uploaded?;
        ended?;
        self.wall_s += began.elapsed().as_secs_f64();
        self.cpu += before.spent_since(&self.fleet);
        for name in &names {
            self.finals += checker::check(&self.fleet.js(), name).await?.clean()?.finals.len();
        }
        Ok(())
    }

    fn json(&self, audio_s: f64) -> Value {
        json!({ "audio_s_per_s": rounded(audio_s / self.wall_s), "wall_s": rounded(self.wall_s), "cpu_s": self.cpu.json() })
    }
}
