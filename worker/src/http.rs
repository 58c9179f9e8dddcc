//! HTTP of a worker: whether it is alive, whether its engine moves, its figures. Off unless an address is configured: a rented
//! machine lets nobody in, and the dispatcher tells the same of every worker.
//!
//! It reads the heartbeat that was sent last, so that it says what the fleet was told and nothing else.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use voxfleet_http::{
    Access, Exceptions, HttpConfig, Server, Viewer,
    axum::{
        Json, Router,
        extract::State,
        http::{StatusCode, header},
        response::{IntoResponse, Response},
        routing::get,
    },
    exposition::{CONTENT_TYPE, Exposition},
    guard::guard,
    process, recorder,
    tls::{self, Certificate},
};
use voxfleet_nats::Nats;
use voxfleet_schema::fleet::{EngineRunState, Heartbeat, Residency};

use crate::metrics;

/// An engine with work that has not moved for so long is stuck as far as a health check is concerned; its worker ends it later.
const STUCK: Duration = Duration::from_secs(15);

/// The last heartbeat; none before the first.
pub(crate) type LastBeat = watch::Receiver<Option<Arc<Heartbeat>>>;

#[derive(Clone)]
struct Site {
    nats: Nats,
    beat: LastBeat,
    started: SystemTime,
    certificate: Arc<OnceLock<Arc<Certificate>>>,
    /// What the NATS servers show.
    servers: tls::Shown,
}

/// Serves until `shutdown`; a worker works without it.
pub(crate) async fn run(nats: Nats, config: HttpConfig, beat: LastBeat, shutdown: CancellationToken) {
    if config.is_off() {
        return;
    }
    let access = match Access::read(&config) {
        Ok(access) => Arc::new(access),
        Err(error) => {
            tracing::error!(%error, "no http: its tokens cannot be read");
            return;
        }
    };
    metrics::begin();
    let site =
        Site { nats, beat, started: SystemTime::now(), certificate: Arc::default(), servers: tls::Shown::default() };
    let certificate = site.certificate.clone();
    let (servers, asking) = (site.servers.clone(), site.nats.clone());
    let routes = Router::new()
        .route("/health", get(alive))
        .route("/ready", get(ready))
        .route("/gpu-status", get(gpu_status))
        .route("/metrics", get(metrics_page))
        .with_state(site);
    let router = guard(routes, access, Exceptions::default());
    let Some(server) = Server::bind_in_time(&config, &shutdown).await else { return };
    if let Some(own) = server.certificate() {
        // Set once: there is one socket.
        let _ = certificate.set(own);
    }
    tracing::info!(url = server.url(), "http");
    let watching = servers.watch(|| asking.server_certificates(), shutdown.clone());
    let (served, ()) = tokio::join!(server.serve(router, shutdown.clone()), watching);
    if let Err(error) = served {
        tracing::error!(%error, "no http any more");
    }
}

async fn alive(State(site): State<Site>) -> Json<Value> {
    let uptime = SystemTime::now().duration_since(site.started).unwrap_or_default().as_secs();
    Json(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION"), "uptime_seconds": uptime }))
}

async fn ready(State(site): State<Site>) -> Response {
    let beat = site.beat.borrow().clone();
    let (ready, answer) = readiness(site.nats.is_connected(), beat.as_deref());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(answer)).into_response()
}

/// Pure: whether work progresses, and what keeps it from it.
fn readiness(connected: bool, beat: Option<&Heartbeat>) -> (bool, Value) {
    let mut reasons: Vec<(&str, String)> = Vec::new();
    if !connected {
        reasons.push(("nats_lost", "the NATS server does not answer this worker".to_owned()));
    }
    let Some(beat) = beat else {
        reasons.push(("starting", "no heartbeat has been sent yet".to_owned()));
        return (false, json!({ "ready": false, "reasons": told(&reasons) }));
    };
    let engine = &beat.engine;
    if engine.state == EngineRunState::Failed {
        let why = engine.last_end.as_ref().map_or_else(String::new, |end| format!(": {}", end.message));
        reasons.push(("engine_failed", format!("its engine cannot be started{why}")));
    }
    if Duration::from_millis(engine.ms_since_progress) >= STUCK {
        reasons.push((
            "engine_stuck",
            format!("its engine has work and has not moved for {} ms", engine.ms_since_progress),
        ));
    }
    if let Some(trouble) = &beat.device.trouble {
        reasons.push(("device_trouble", trouble.message.clone()));
    }
    if beat.draining {
        reasons.push(("draining", "it takes nothing new and ends".to_owned()));
    }
    let ready = reasons.is_empty();
    let gpu = beat.device.uuid.is_some();
    let answer = json!({
        "ready": ready, "reasons": told(&reasons),
        "model_loaded": beat.models.iter().any(|model| model.state == Residency::Loaded),
        "idle_timeout_seconds": engine.idle_timeout_s,
        "time_since_last_activity": engine.ms_since_activity.map(|ms| ms as f64 / 1e3),
        "gpu_available": gpu, "gpu_count": u32::from(gpu), "current_device": engine.effective_device,
        "memory_allocated_mb": beat.device.used_mb,
    });
    (ready, answer)
}

fn told(reasons: &[(&str, String)]) -> Vec<Value> {
    reasons.iter().map(|(code, message)| json!({ "code": code, "message": message })).collect()
}

async fn gpu_status(_: Viewer, State(site): State<Site>) -> Json<Value> {
    let beat = site.beat.borrow().clone();
    let gb = |mb: u64| (mb as f64 / 1024.0 * 100.0).round() / 100.0;
    let gpu = beat.iter().map(|beat| {
        let device = &beat.device;
        json!({
            "gpu_id": beat.gpu_id, "active_connections": beat.slots.used, "max_connections": beat.slots.total,
            "allocated_memory_gb": gb(device.used_mb), "free_memory_gb": gb(device.free_mb),
            "total_memory_gb": gb(device.total_mb), "other_tenants_memory_gb": gb(device.used_by_others_mb),
            "utilization_percent": device.utilization.map(|share| (share * 100.0).round()),
            "temperature_c": device.temperature_c, "jobs": beat.job_slots.used, "device": device.name,
        })
    });
    Json(json!({
        "total_gpus": u32::from(beat.is_some()),
        "total_connections": beat.as_ref().map_or(0, |beat| beat.slots.used),
        "max_connections_per_gpu": beat.as_ref().map_or(0, |beat| beat.slots.total),
        "gpus": gpu.collect::<Vec<_>>(),
    }))
}

async fn metrics_page(_: Viewer, State(site): State<Site>) -> Response {
    let beat = site.beat.borrow().clone();
    let mut out = Exposition::default();
    let flag = |yes: bool| f64::from(u8::from(yes));
    out.gauge("voxfleet_build_info", "1, with the version that runs")
        .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    out.gauge("voxfleet_nats_connected", "1 while NATS answers").value(flag(site.nats.is_connected()));
    if let Some(beat) = beat {
        figures(&mut out, &beat);
    }
    let mut family = out.counter("voxfleet_audio_seconds_total", "audio that stored finals cover");
    for (kind, seconds) in metrics::audio_seconds() {
        family.sample(&[("kind", kind)], seconds);
    }
    let own = site.certificate.get().and_then(|certificate| certificate.expires());
    let client = site.nats.client_certificate().and_then(|file| tls::expiry_of(&file).ok().flatten());
    let mut family =
        out.gauge("voxfleet_certificate_expiry_timestamp_seconds", "unix time at which a certificate expires");
    for (name, expires) in [("http", own), ("nats", client), ("nats_server", site.servers.expires())] {
        if let Some(expires) = expires {
            family.sample(&[("use", name)], expires as f64);
        }
    }
    process::expose(&mut out, site.started);
    out.append(&recorder::render());
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], out.into_text()).into_response()
}

fn figures(out: &mut Exposition, beat: &Heartbeat) {
    for (name, help, slots) in [
        ("voxfleet_slots", "live sessions that it can hold, and holds", beat.slots),
        ("voxfleet_job_slots", "recordings that it can hold, and holds", beat.job_slots),
    ] {
        out.gauge(name, help)
            .sample(&[("state", "total")], f64::from(slots.total))
            .sample(&[("state", "used")], f64::from(slots.used));
    }
    let mut family = out.gauge("voxfleet_model_resident_bytes", "device memory that a loaded model takes");
    for model in &beat.models {
        family.sample(&[("model", &model.name)], model.resident_mb as f64 * 1_048_576.0);
    }
    let state = match beat.engine.state {
        EngineRunState::Down => "down",
        EngineRunState::Starting => "starting",
        EngineRunState::Ready => "ready",
        EngineRunState::Restarting => "restarting",
        EngineRunState::Failed => "failed",
        EngineRunState::Unknown => "unknown",
    };
    out.gauge("voxfleet_engine_state", "1 for the present state of its engine").sample(&[("state", state)], 1.0);
    out.counter("voxfleet_engine_restarts_total", "starts of its engine after the first")
        .value(f64::from(beat.engine.restarts));
    let mut family = out.counter("voxfleet_engine_ends_total", "ends of its engine that nobody wanted");
    for (class, count) in metrics::engine_ends(beat) {
        family.sample(&[("class", class)], count);
    }
    out.gauge("voxfleet_engine_silence_seconds", "since its engine moved while it has work, else 0")
        .value(beat.engine.ms_since_progress as f64 / 1e3);
}
