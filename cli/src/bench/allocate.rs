//! How long one routing decision takes, as the dispatcher makes it, while a fleet of a given size fills up.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_dispatcher::{
    DispatcherConfig,
    routing::{Duty, Request, Roster, Rows, Seen},
};
use voxfleet_schema::{
    fleet::{Device, EngineRunState, EngineState, Heartbeat, ModelState, Provider, Residency, Slots, WorkerHealth},
    id::{GpuId, Incarnation},
    session::SessionOptions,
    transcript::{SpeakersBy, VadKind},
};

use super::{progress, rounded, usage};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench allocate
  voxfleet bench allocate --gpus 1000 --sessions 16 --json")]
pub(crate) struct AllocateArgs {
    /// Sizes of fleets, one row each
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "4,40,400,1000")]
    gpus: Vec<usize>,
    /// Sessions each GPU holds; the fleet is filled with as many
    #[arg(long, default_value_t = 16, value_name = "N")]
    sessions: u32,
}

pub(super) fn run(args: &AllocateArgs) -> Result<Value> {
    usage(args.sessions >= 1 && args.gpus.iter().all(|gpus| (1..=10_000).contains(gpus)), "nothing to measure")?;
    let rows: Result<Vec<Value>> = args.gpus.iter().map(|gpus| measure(*gpus, args.sessions)).collect();
    Ok(json!({ "rows": rows? }))
}

/// Fills a fleet session by session. Each decision is timed alone, then with its reasons as an event carries them.
fn measure(gpus: usize, sessions: u32) -> Result<Value> {
    progress(&format!("{gpus} GPUs, {sessions} sessions on each"));
    let config = DispatcherConfig::default();
    let beats: Vec<Heartbeat> = (0..gpus).map(|n| heartbeat(n, sessions)).collect::<Result<_>>()?;
    let mut roster = Roster::of(&beats, &config);
    let mut used = vec![0_u32; gpus];
    let options = SessionOptions { model: Some("small".to_owned()), ..SessionOptions::default() };
    let request = Request::new(&options, true);
    let (mut decisions, mut explained) = (Vec::new(), Vec::new());
    for _ in 0..gpus * sessions as usize {
        let begun = Instant::now();
        let pick = roster.route(&request, Duration::ZERO, &config);
        decisions.push(begun.elapsed());
        let pick = pick?;
        let begun = Instant::now();
        std::hint::black_box(roster.explain(&request, Some(pick.slot), Duration::ZERO, Rows::Short));
        explained.push(begun.elapsed());
        let name = roster.name(pick.slot).clone();
        let at = beats.iter().position(|beat| beat.worker() == name).context("an unknown worker was picked")?;
        used[at] += 1;
        roster.put(seen(&beats[at], &name, used[at], &config), &config);
    }
    ensure!(used.iter().all(|n| *n == sessions), "the fleet was not filled evenly");
    let begun = Instant::now();
    let full = roster.route(&request, Duration::ZERO, &config);
    let refusal = begun.elapsed();
    ensure!(full.is_err(), "a full fleet took one more");
    Ok(json!({
        "gpus": gpus,
        "sessions": gpus * sessions as usize,
        "p50_us": at_share(&mut decisions, 0.50),
        "p99_us": at_share(&mut decisions, 0.99),
        "reasons_p99_us": at_share(&mut explained, 0.99),
        "refusal_us": rounded(refusal.as_secs_f64() * 1e6),
    }))
}

fn at_share(times: &mut [Duration], share: f64) -> f64 {
    times.sort_unstable();
    let at = ((times.len() as f64 * share).ceil() as usize).saturating_sub(1);
    rounded(times.get(at).map_or(0.0, Duration::as_secs_f64) * 1e6)
}

fn seen<'a>(
    heartbeat: &'a Heartbeat,
    name: &'a voxfleet_schema::id::WorkerName,
    sessions: u32,
    config: &DispatcherConfig,
) -> Seen<'a> {
    Seen {
        name,
        heartbeat,
        health: WorkerHealth::Alive,
        suspect_at: Duration::MAX,
        superseded: false,
        sessions,
        jobs: 0,
        promised: &[],
        duty: Duty::Anyone,
        reserve_percent: config.reserve_percent,
    }
}

/// Workers of a mixed fleet: several models, other tenants, memory in use, not all of them warm.
fn heartbeat(n: usize, slots: u32) -> Result<Heartbeat> {
    let model = |name: &str, expected_mb, loaded: bool| ModelState {
        name: name.to_owned(),
        state: if loaded { Residency::Loaded } else { Residency::Available },
        resident_mb: if loaded { expected_mb } else { 0 },
        expected_mb,
        ..ModelState::default()
    };
    let others = (n as u64 * 37) % 4_000;
    Ok(Heartbeat {
        gpu_id: GpuId::new(format!("gpu-{n}"))?,
        incarnation: Incarnation::new(format!("i{n}"))?,
        seq: 1,
        sent_ms: 0,
        started_ms: 0,
        beat_ms: 0,
        host: format!("host-{:03}", n / 4),
        pid: 1,
        provider: Provider::VastAi,
        device: Device {
            index: Some((n % 4) as u32),
            name: "made up".to_owned(),
            uuid: Some(format!("GPU-{n}")),
            total_mb: 24_000,
            free_mb: 20_000 - others,
            used_mb: 4_000,
            used_by_others_mb: others,
            temperature_c: Some(50),
            power_w: None,
            utilization: Some(0.5),
            ..Device::default()
        },
        slots: Slots { total: slots, used: 0 },
        job_slots: Slots { total: 1, used: 0 },
        held: Vec::new(),
        given_up: Vec::new(),
        models: vec![
            model("base", 388, false),
            model("small", 852, !n.is_multiple_of(3)),
            model("medium", 2_100, false),
            model("large-v3-turbo", 2_600, n.is_multiple_of(5)),
        ],
        default_model: None,
        engine: EngineState {
            state: EngineRunState::Ready,
            kind: "simulated".to_owned(),
            effective_device: "cuda:made up".to_owned(),
            vad: VadKind::Silero,
            speakers: SpeakersBy::Segmentation,
            ms_since_progress: 0,
            restarts: 0,
            crashes: 0,
            decode_rate: Some(20.0),
            decode_rate_age_ms: Some(500),
            delivery_rate: Some(20.0),
            neighbour_ms: 0,
            ..EngineState::default()
        },
        draining: false,
        drain: None,
        price_per_hour: None,
        version: "bench".to_owned(),
    })
}
