//! One long recording on more and more simulated workers, each with one job slot and one decode state.
//!
//! The clock runs from the request to the arrival of the end final that names the result. Speed-up is against the fleet of one,
//! whose worker does everything itself; beside it stands the same recording on one worker that does it in one piece. Text is
//! compared to that of the engine called directly, without any fleet.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use voxfleet_harness::{audio, fleet::Fleet};

use super::{
    jobs::{Store, direct, job, median},
    pipeline::Kind,
    progress, recording, rounded, usage,
};

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LongfileArgs {
    /// Length of the recording
    #[arg(long, default_value_t = 7_200.0, value_name = "SECONDS")]
    seconds: f64,
    /// Audio seconds that one simulated worker decodes in a second
    #[arg(long, default_value_t = 40.0, value_name = "N")]
    speed: f64,
    /// Workers, one row for each
    #[arg(long, default_values_t = [1, 2, 4, 8], value_delimiter = ',', value_name = "N")]
    workers: Vec<usize>,
    /// Length of a part
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    part_s: u64,
    /// How often each fleet does it; the median counts
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
}

/// What one fleet came to.
struct Measured {
    seconds: f64,
    equal: bool,
}

pub(super) async fn run(args: LongfileArgs) -> Result<Value> {
    usage(args.seconds >= 60.0, "--seconds: at least 60")?;
    usage(args.speed > 0.0, "--speed: a simulated worker that takes no time cannot be made faster")?;
    usage(!args.workers.is_empty() && args.workers.iter().all(|n| (1..=64).contains(n)), "--workers: 1 to 64")?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("long.wav");
    recording::write_wav(&path, &audio::bursts(1, args.seconds), args.seconds)?;
    progress("the same engine called directly, for its text");
    let expected = {
        let path = path.clone();
        // No delay: only its text is asked for.
        tokio::task::spawn_blocking(move || direct(&Kind::Simulated { speed: 0.0 }, &path)).await??.1
    };
    let one_piece = measure(&args, 1, 0, &path, &expected).await?;
    let mut rows = Vec::new();
    let mut alone = None;
    for workers in &args.workers {
        let Measured { seconds, equal } = measure(&args, *workers, 1, &path, &expected).await?;
        let alone = *alone.get_or_insert(seconds * args.workers.first().copied().unwrap_or(1) as f64);
        rows.push(json!({
            "workers": workers,
            "seconds": rounded(seconds),
            "speedup": rounded(alone / seconds),
            "of_linear": rounded(alone / seconds / *workers as f64),
            "text_equal": equal,
        }));
    }
    Ok(json!({
        "rows": rows,
        "one_piece": { "seconds": rounded(one_piece.seconds), "text_equal": one_piece.equal },
        "audio_s": args.seconds,
        "speed": args.speed,
        "part_s": args.part_s,
        "rounds": args.rounds,
    }))
}

/// `over_s`: longer recordings are done in parts; 0 = none are.
async fn measure(
    args: &LongfileArgs,
    workers: usize,
    over_s: u64,
    path: &std::path::Path,
    expected: &str,
) -> Result<Measured> {
    let fleet = Fleet::builder().workers(workers).slots(1).engine(Kind::Simulated { speed: args.speed }.engine());
    let fleet = fleet.set("worker.job_slots", 1).set("worker.decode_states", 1).set("worker.decode_threads", 1);
    let fleet = fleet.set("worker.split_jobs_over_s", over_s).set("worker.job_part_s", args.part_s).start().await?;
    let store = Store::connect(&fleet).await?;
    store.put("long", path).await?;
    let (mut seconds, mut equal) = (Vec::new(), true);
    for round in 1..=args.rounds {
        let how = if over_s == 0 { "in one piece" } else { "in parts" };
        progress(&format!("{workers} workers, {how}, round {round} of {}", args.rounds));
        let (took, result) = job(&fleet, &store, &format!("long-{round}"), "long").await?;
        ensure!((result.duration - args.seconds).abs() < 1.0, "{} s came out of {} s", result.duration, args.seconds);
        equal &= result.full_text == expected;
        seconds.push(took);
    }
    Ok(Measured { seconds: median(&seconds), equal })
}
