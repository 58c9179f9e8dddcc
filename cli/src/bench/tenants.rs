//! Two accounts on one server: what one notices of the other's flood.
//!
//! In account `b` a small fleet transcribes what one producer says; measured is the time from the publish of the flush behind
//! a second of speech to its final. Meanwhile a client of account `a` publishes audio into the log of its own account. Calm
//! and flooded stretches alternate, so that whatever else the machine does falls on both. All of it shares this machine, the
//! flooding client included: on hosts of their own only the server would be shared.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use voxfleet_harness::{
    audio::{self, Pcm},
    fleet::{Engine, Fleet, Servers},
    flood::{Flooded, Talker, flood},
    login::Keys,
    server::{NatsServer, ServerOptions},
    wait::eventually,
};

use super::{progress, rounded, usage};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench tenants
  voxfleet bench tenants --per-s 500 --per-s 2000 --utterances 50 --json")]
pub(crate) struct TenantsArgs {
    /// Utterances in each stretch
    #[arg(long, default_value_t = 25, value_name = "N")]
    utterances: usize,
    /// Stretches of each kind
    #[arg(long, default_value_t = 4, value_name = "N")]
    stretches: usize,
    /// Chunks a second of a flood of its own; can be repeated. A live session is 5 [default: 1000, and all that it can]
    #[arg(long, value_name = "N")]
    per_s: Vec<f64>,
}

/// A chunk of 200 ms.
const CHUNK_BYTES: usize = 6_400;
const SESSIONS: usize = 200;
/// Utterances before the first that counts: the session is opened and its engine begun.
const WARM_UP: usize = 5;
const STREAMS: Duration = Duration::from_secs(30);

pub(super) async fn run(args: TenantsArgs) -> Result<Value> {
    let sound = args.per_s.iter().all(|n| n.is_finite() && *n > 0.0);
    usage(args.utterances >= 1 && args.stretches >= 1 && sound, "nothing to measure")?;
    let keys = Keys::make(&["a", "b"], &[])?;
    let server = NatsServer::start_with(ServerOptions { extra: keys.include(), ..ServerOptions::default() }).await?;
    let fleet = |account: &str| {
        let builder = Fleet::builder().engine(Engine::Simulated { speed: 0.0 }).slots(4).of_account(&keys, account);
        builder.on(Servers::Elsewhere(vec![server.url()]))
    };
    let quiet = fleet("b").workers(1).start().await?;
    // Only its streams are needed: where tenants share a server, their dispatchers share no machine.
    let flooded = fleet("a").workers(0).start().await?;
    let log = || async { flooded.js().get_stream("ASR_AUDIO").await.ok().map(drop) };
    eventually("streams of the flooded account", STREAMS, log).await?;
    drop(flooded);

    let (talking, _) = keys.login("b", "producer").connect(vec![server.url()]).await?;
    let (flooding, _) = keys.login("a", "producer").connect(vec![server.url()]).await?;
    let second = Pcm::mono_16k(audio::blasts(3, 1.0).samples);
    let mut talker = Talker::begin(talking, "bench", second).await?;
    for _ in 0..WARM_UP {
        talker.say().await?;
    }
    let floods: Vec<Option<f64>> = match args.per_s.is_empty() {
        true => vec![Some(1_000.0), None],
        false => args.per_s.iter().copied().map(Some).collect(),
    };
    let mut rows = Vec::new();
    for per_s in floods {
        let named = per_s.map_or("unbounded".to_owned(), |n| format!("{n} chunks/s"));
        progress(&format!(
            "{} stretches of {} utterances, calm and beside a flood ({named})",
            args.stretches, args.utterances
        ));
        let (mut calm, mut beside, mut sent) = (Vec::new(), Vec::new(), Flooded::default());
        for _ in 0..args.stretches {
            calm.extend(stretch(&mut talker, args.utterances).await?);
            let stop = CancellationToken::new();
            let measuring = async {
                // It has begun to press by then.
                let begun = talker.say().await;
                let measured = stretch(&mut talker, args.utterances).await;
                stop.cancel();
                begun.and(measured)
            };
            let (measured, went) =
                tokio::join!(measuring, flood(flooding.clone(), SESSIONS, CHUNK_BYTES, per_s, &stop));
            let went = went?;
            beside.extend(measured?);
            sent.messages += went.messages;
            sent.refused += went.refused;
            sent.seconds += went.seconds;
        }
        let (calm, beside) = (Figures::of(calm), Figures::of(beside));
        rows.push(json!({
            "set": named,
            "flood_msgs_per_s": rounded(sent.messages as f64 / sent.seconds),
            "flood_refused": sent.refused,
            "calm_p50_ms": rounded(calm.p50),
            "calm_p95_ms": rounded(calm.p95),
            "flooded_p50_ms": rounded(beside.p50),
            "flooded_p95_ms": rounded(beside.p95),
            "ratio_p50": rounded(beside.p50 / calm.p50),
            "ratio_p95": rounded(beside.p95 / calm.p95),
            "utterances": args.stretches * args.utterances,
        }));
    }
    talker.end().await?;
    quiet.wait_end("bench", Duration::from_secs(30)).await?;
    Ok(json!({ "rows": rows }))
}

async fn stretch(talker: &mut Talker, utterances: usize) -> voxfleet_harness::Result<Vec<f64>> {
    let mut taken = Vec::with_capacity(utterances);
    for _ in 0..utterances {
        taken.push(talker.say().await?);
    }
    Ok(taken)
}

struct Figures {
    p50: f64,
    p95: f64,
}

impl Figures {
    /// Of at least one.
    fn of(mut taken: Vec<f64>) -> Self {
        taken.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = taken.len().saturating_sub(1);
            taken.get((last as f64 * share).round() as usize).copied().unwrap_or(f64::NAN)
        };
        Self { p50: at(0.5), p95: at(0.95) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_what_was_measured() {
        let figures = Figures::of((0..=100).rev().map(f64::from).collect());
        assert_eq!((figures.p50, figures.p95), (50.0, 95.0));
        assert_eq!(Figures::of(vec![7.0]).p95, 7.0);
    }
}
