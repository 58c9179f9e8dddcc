//! HTTP of dispatcher and worker: whether it tells the truth, to those who may know it, and to nobody else.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout},
};
use voxfleet_harness::{
    audio,
    fleet::{self, Fleet, FleetBuilder},
    producer::{Pace, Producer},
    wait::eventually,
};
use voxfleet_http::{
    axum::http::Method,
    probe::{Answer, Probe},
};

const SOON: Duration = Duration::from_secs(30);
const ASK: Duration = Duration::from_secs(10);
const VIEW: &str = "viewer-token-0123456789";
const OPERATE: &str = "operator-token-0123456789";

fn served() -> FleetBuilder {
    Fleet::builder().workers(2).slots(4).set("dispatcher.http.listen", "127.0.0.1:0")
}

async fn get(url: &str, path: &str) -> Result<(u16, Value)> {
    let answer = Probe::default().get(&format!("{url}{path}"), ASK).await?;
    Ok((answer.status, serde_json::from_slice(&answer.body).unwrap_or_default()))
}

async fn send(url: &str, method: Method, path: &str, headers: &[(&str, &str)], body: Value) -> Result<Answer> {
    let mut all = vec![("content-type", "application/json")];
    all.extend(headers);
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    Ok(Probe::default().send(method, &format!("{url}{path}"), &all, body, ASK).await?)
}

/// Until `/ready` says so, or says why not.
async fn until_ready(url: &str, expected: &str) -> Result<Value> {
    let what = format!("/ready says {expected:?}");
    let found = eventually(what, SOON, || async {
        let (status, answer) = get(url, "/ready").await.ok()?;
        let codes: Vec<&str> = answer["reasons"].as_array()?.iter().filter_map(|why| why["code"].as_str()).collect();
        let yes = if expected.is_empty() { status == 200 && codes.is_empty() } else { codes.contains(&expected) };
        yes.then_some(answer)
    });
    Ok(found.await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_tells_apart_what_keeps_work_from_progressing() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = served().start().await?;
    let outcome = readiness(&mut fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn readiness(fleet: &mut Fleet) -> Result<()> {
    let url = fleet.dispatchers[0].http_url().await?;
    let (status, alive) = get(&url, "/health").await?;
    ensure!(status == 200 && alive["status"] == "ok", "{status} {alive}");
    let ready = until_ready(&url, "").await?;
    for name in [
        "model_loaded",
        "idle_timeout_seconds",
        "time_since_last_activity",
        "gpu_available",
        "gpu_count",
        "current_device",
        "memory_allocated_mb",
    ] {
        ensure!(ready.get(name).is_some(), "{name} is not in {ready}");
    }
    ensure!(ready["gpu_available"] == false && ready["role"] == "active", "{ready}");

    // Nobody is there to work.
    for worker in &mut fleet.workers {
        worker.kill9()?;
    }
    until_ready(&url, "no_workers").await?;
    let (status, _) = get(&url, "/ready").await?;
    ensure!(status == 503, "{status}");
    let (status, _) = get(&url, "/health").await?;
    ensure!(status == 200, "the dispatcher itself is well: {status}");
    for i in 0..fleet.workers.len() {
        fleet.restart_worker(i)?;
    }
    until_ready(&url, "").await?;

    // The server does not answer: the same process says so, and that it is back.
    fleet.server()?.stop()?;
    until_ready(&url, "nats_lost").await?;
    let (status, _) = get(&url, "/health").await?;
    ensure!(status == 200, "{status}");
    fleet.server()?.cont()?;
    until_ready(&url, "").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_stand_still_are_told_from_workers_that_are_gone() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = served()
        .workers(1)
        .set("worker.simulated.speed", 1.0)
        .set("worker.http.listen", "127.0.0.1:0")
        .set("worker.engine_stuck_ms", 40_000)
        .start()
        .await?;
    let outcome = stuck(&mut fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn stuck(fleet: &mut Fleet) -> Result<()> {
    let url = fleet.dispatchers[0].http_url().await?;
    let worker = fleet.workers[0].http_url().await?;
    until_ready(&url, "").await?;
    until_ready(&worker, "").await?;
    let mut producer = Producer::named(fleet.js(), "call", "s");
    producer.stream(&audio::bursts(7, 60.0), 200, Pace::AsFastAsPossible).await?;
    let answer = Probe::default().get(&format!("{worker}/metrics"), ASK).await?;
    let text = String::from_utf8(answer.body)?;
    well_formed(&text)?;
    as_documented(&text, "## Worker")?;
    let engine = eventually("an engine", SOON, || std::future::ready(fleet.workers[0].engine_pid())).await?;
    let (_, status) = get(&worker, "/gpu-status").await?;
    ensure!(status["total_gpus"] == 1 && status["gpus"][0]["max_connections"] == 4, "{status}");
    let pid = rustix::process::Pid::from_raw(engine as i32).context("a pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::STOP)?;
    let told = until_ready(&worker, "engine_stuck").await;
    let of_fleet = until_ready(&url, "engines_stuck").await;
    rustix::process::kill_process(pid, rustix::process::Signal::CONT)?;
    told?;
    of_fleet?;
    until_ready(&url, "").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_see_sessions_grow_and_a_killed_worker_within_two_seconds() -> Result<()> {
    let _turn = fleet::turn().await;
    let mut fleet = served().start().await?;
    let outcome = pages(&mut fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn pages(fleet: &mut Fleet) -> Result<()> {
    let url = fleet.dispatchers[0].http_url().await?;
    until_ready(&url, "").await?;
    let mut producer = Producer::named(fleet.js(), "call", "s");
    producer.stream(&audio::bursts(5, 8.0), 200, Pace::AsFastAsPossible).await?;
    let row = eventually("the session says something", SOON, || async {
        let (_, list) = get(&url, "/api/sessions?q=call").await.ok()?;
        let row = list["rows"].get(0)?.clone();
        (row["text"].as_str()?.len() > 3 && row["lag_ms"].is_u64()).then_some(row)
    })
    .await?;
    ensure!(row["state"] == "assigned" && row["gpu_id"].is_string(), "{row}");
    // What its row says may be a partial yet.
    let one = eventually("its first final", SOON, || async {
        let (_, one) = get(&url, "/api/sessions/call").await.ok()?;
        one["finals"].as_array().is_some_and(|finals| !finals.is_empty()).then_some(one)
    })
    .await?;
    ensure!(one["finals"][0]["segments"][0]["text"].is_string(), "{one}");
    let (status, none) = get(&url, "/api/sessions/nobody").await?;
    ensure!(status == 404 && none["error"]["class"] == "not_found", "{status} {none}");
    let (status, bad) = get(&url, "/api/sessions/a%20b").await?;
    ensure!(status == 400 && bad["error"]["class"] == "bad_request", "{status} {bad}");
    let (_, gpus) = get(&url, "/gpu-status").await?;
    ensure!(
        gpus["total_gpus"] == 2 && gpus["total_connections"] == 1 && gpus["max_connections_per_gpu"] == 4,
        "{gpus}"
    );
    // The first who asks gets the past too.
    let (_, events) = get(&url, "/api/events").await?;
    let assigned = |row: &Value| row["what"] == "assigned" && row["id"] == "call";
    ensure!(events["rows"].as_array().is_some_and(|rows| rows.iter().any(assigned)), "{events}");

    // As a page follows it.
    let mut page = Page::open(&url, "/api/stream?limit=10").await?;
    let first = page.until("the whole fleet", |name, data| name == "fleet" && data["full"] == true).await?;
    ensure!(first["gpus"].as_array().is_some_and(|gpus| gpus.len() == 2), "{first}");
    page.until("the list", |name, data| name == "sessions" && data["rows"][0]["id"] == "call").await?;
    let mut along = Page::open(&url, "/api/sessions/call/stream").await?;
    let begin = along.until("what stands", |name, _| name == "begin").await?;
    let stands = begin["finals"].as_array().map_or(0, Vec::len);
    producer.stream(&audio::bursts(6, 4.0), 200, Pace::AsFastAsPossible).await?;
    along.until("a final", |name, data| name == "final" && data["index"].as_u64() >= Some(stands as u64)).await?;

    let holder = row["gpu_id"].as_str().unwrap_or_default().to_owned();
    let index = fleet.workers.iter().position(|worker| worker.gpu_id() == holder).context("its worker")?;
    fleet.workers[index].kill9()?;
    let killed = Instant::now();
    // News may be of others only.
    let state = |data: &Value| {
        let tile = data["gpus"].as_array()?.iter().find(|gpu| gpu["gpu_id"] == holder.as_str())?;
        Some(tile["state"].as_str()?.to_owned())
    };
    let seen = page
        .until("it is no longer alive", |name, data| name == "fleet" && state(data).is_some_and(|s| s != "alive"))
        .await?;
    // Up to a second since its last heartbeat, 1.5 s of silence, a quarter until somebody looks.
    let took = killed.elapsed();
    ensure!(took < Duration::from_secs(2), "seen after {took:?}");
    // Its silence shows; that it is dead is a verdict, and comes later.
    ensure!(state(&seen).as_deref() == Some("suspect"), "{seen}");
    page.until("it is dead and stays in sight", |name, data| name == "fleet" && state(data).as_deref() == Some("dead"))
        .await?;
    along
        .until("the other one goes on", |name, data| {
            name == "state" && data["gpu_id"].as_str().is_some_and(|gpu| gpu != holder)
        })
        .await?;
    producer.end().await?;
    along.until("the end", |name, _| name == "end").await?;

    // What was counted.
    let answer = Probe::default().get(&format!("{url}/metrics"), ASK).await?;
    let text = String::from_utf8(answer.body)?;
    let value = |series: &str| {
        let line = text.lines().find(|line| line.starts_with(series))?;
        line.rsplit_once(' ')?.1.parse::<f64>().ok()
    };
    ensure!(value("voxfleet_failovers_total") == Some(1.0), "{text}");
    ensure!(value("voxfleet_gpus{state=\"dead\"}") == Some(1.0), "{text}");
    ensure!(value("voxfleet_audio_bytes_total").is_some_and(|bytes| bytes >= 12.0 * 32_000.0), "{text}");
    ensure!(!text.contains("call"), "a session's name is a label:\n{text}");
    well_formed(&text)?;
    as_documented(&text, "## Dispatcher")
}

/// Figures that this machine does not have: no GPU, no certificate, nothing that has happened.
const MAY_MISS: [&str; 6] = [
    "voxfleet_gpu_temperature_celsius",
    "voxfleet_gpu_utilization_ratio",
    "voxfleet_gpu_power_watts",
    "voxfleet_certificate_expiry_timestamp_seconds",
    "voxfleet_failures_total",
    "voxfleet_stage_memory_bytes",
];

/// `docs/metrics.md` names everything that is exported, and nothing that is not.
fn as_documented(text: &str, section: &str) -> Result<()> {
    let page = std::fs::read_to_string(voxfleet_harness::find::root().join("docs/metrics.md"))?;
    let (_, part) = page.split_once(&format!("\n{section}\n")).context("the section")?;
    let part = part.split("\n## ").next().unwrap_or_default();
    let listed: Vec<&str> = part.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let exported: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    ensure!(listed.len() > 10, "{section} lists {listed:?}");
    crate::metrics_page::labels_as_documented(text, section)?;
    for name in &exported {
        ensure!(listed.contains(name), "{name} is not in {section} of docs/metrics.md");
    }
    for name in &listed {
        ensure!(exported.contains(name) || MAY_MISS.contains(name), "{name} is documented and not exported:\n{text}");
    }
    Ok(())
}

/// Every sample belongs to a family that has a type, and none stands twice.
fn well_formed(text: &str) -> Result<()> {
    let mut types = std::collections::HashSet::new();
    let mut samples = std::collections::HashSet::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let name = rest.split(' ').next().unwrap_or_default();
            ensure!(types.insert(name.to_owned()), "{name} has two types");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').context("a value")?;
            let name = series.split('{').next().unwrap_or_default();
            ensure!(types.contains(name), "{name} has no type");
            ensure!(value.parse::<f64>().is_ok(), "{line}");
            ensure!(samples.insert(series.to_owned()), "{series} stands twice");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_decide_who_reads_and_who_changes() -> Result<()> {
    let _place = fleet::place().await;
    let dir = tempfile::tempdir()?;
    let file = |name: &str, token: &str| -> Result<String> {
        std::fs::write(dir.path().join(name), token)?;
        Ok(dir.path().join(name).display().to_string())
    };
    let mut fleet = served()
        .set("dispatcher.http.viewer_token_file", file("v", VIEW)?)
        .set("dispatcher.http.operator_token_file", file("o", OPERATE)?)
        .start()
        .await?;
    let outcome = roles(&mut fleet).await;
    outcome.with_context(|| fleet.logs())?;
    for secret in [VIEW, OPERATE] {
        ensure!(!fleet.dispatchers[0].log().contains(secret), "a token is in the log");
    }
    Ok(())
}

async fn roles(fleet: &mut Fleet) -> Result<()> {
    let url = fleet.dispatchers[0].http_url().await?;
    until_ready(&url, "").await?;
    let bearer = |token: &str| format!("Bearer {token}");
    let (view, operate, wrong) = (bearer(VIEW), bearer(OPERATE), bearer("nobody-has-this-token"));
    for path in [
        "/api/fleet",
        "/api/sessions",
        "/api/jobs",
        "/api/dead",
        "/api/events",
        "/api/stream",
        "/metrics",
        "/gpu-status",
    ] {
        for headers in [vec![], vec![("authorization", wrong.as_str())]] {
            let answer = send(&url, Method::GET, path, &headers, Value::Null).await?;
            ensure!(answer.status == 401, "{path}: {}", answer.status);
            ensure!(answer.headers.contains_key("www-authenticate"), "{path}");
        }
    }
    let drain = format!("/api/gpus/{}/drain", fleet.workers[0].gpu_id());
    for (path, headers, expected) in [
        ("/api/fleet", vec![("authorization", view.as_str())], 200),
        ("/metrics", vec![("authorization", view.as_str())], 200),
        (drain.as_str(), vec![("authorization", view.as_str())], 403),
        (drain.as_str(), vec![], 401),
        // A page of another site, with whatever its visitor has.
        (drain.as_str(), vec![("authorization", operate.as_str()), ("origin", "https://evil.example")], 403),
    ] {
        let method = if path == drain { Method::POST } else { Method::GET };
        let answer = send(&url, method, path, &headers, Value::Null).await?;
        ensure!(answer.status == expected, "{path} {headers:?}: {}", answer.status);
        for name in ["content-security-policy", "x-content-type-options", "x-frame-options", "referrer-policy"] {
            ensure!(answer.headers.contains_key(name), "{path}: no {name}");
        }
        ensure!(!answer.headers.contains_key("access-control-allow-origin"), "{path} is open to other sites");
    }

    // A page logs in, and its cookie goes nowhere else.
    let refused = send(&url, Method::POST, "/api/login", &[], json!({ "token": "nobody-has-this-token" })).await?;
    ensure!(refused.status == 401, "{}", refused.status);
    let login = send(&url, Method::POST, "/api/login", &[], json!({ "token": OPERATE })).await?;
    let cookie = login.headers.get("set-cookie").context("a cookie")?.to_str()?.to_owned();
    ensure!(login.status == 204 && cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let cookie = cookie.split(';').next().unwrap_or_default().to_owned();
    let me = send(&url, Method::GET, "/api/me", &[("cookie", &cookie)], Value::Null).await?;
    let me: Value = serde_json::from_slice(&me.body)?;
    ensure!(me["roles"] == json!(["viewer", "operator"]) && me["login"] == true, "{me}");
    let drained = send(&url, Method::POST, &drain, &[("cookie", &cookie)], json!({ "deadline_ms": 5_000 })).await?;
    ensure!(drained.status == 200, "{}", String::from_utf8_lossy(&drained.body));
    fleet.workers[0].wait(SOON).await?;
    let unknown = send(&url, Method::POST, "/api/gpus/nobody/drain", &[("cookie", &cookie)], Value::Null).await?;
    ensure!(unknown.status == 404, "{}", String::from_utf8_lossy(&unknown.body));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tokens_only_our_own_names_are_answered() -> Result<()> {
    let _place = fleet::place().await;
    let fleet = served().start().await?;
    let url = fleet.dispatchers[0].http_url().await?;
    until_ready(&url, "").await?;
    // A page of a name that was made to point here.
    let rebound = send(&url, Method::GET, "/api/fleet", &[("host", "rebound.example")], Value::Null).await?;
    ensure!(rebound.status == 421, "{}", rebound.status);
    let drain = format!("/api/gpus/{}/drain", fleet.workers[0].gpu_id());
    let nobody = send(&url, Method::POST, &drain, &[], Value::Null).await?;
    ensure!(nobody.status == 403, "operators bring a token everywhere: {}", nobody.status);
    let page = send(&url, Method::GET, "/", &[], Value::Null).await?;
    ensure!(page.status == 200 && String::from_utf8_lossy(&page.body).contains("<html"), "{}", page.status);
    let nothing = send(&url, Method::GET, "/nothing", &[], Value::Null).await?;
    ensure!(nothing.status == 404, "{}", nothing.status);
    let large = send(&url, Method::POST, "/api/login", &[], json!({ "token": "x".repeat(100_000) })).await?;
    ensure!(large.status == 413, "{}", large.status);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_shows_what_the_active_one_knows() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = served().dispatchers(2).start().await?;
    let outcome = standby(&mut fleet).await;
    outcome.with_context(|| fleet.logs())
}

async fn standby(fleet: &mut Fleet) -> Result<()> {
    let leader = eventually("an active dispatcher", SOON, || fleet.leader()).await?;
    let other = fleet.dispatchers[1 - leader].http_url().await?;
    let ready = until_ready(&other, "").await?;
    ensure!(ready["role"] == "standby", "{ready}");
    Producer::named(fleet.js(), "call", "s").stream(&audio::bursts(5, 2.0), 200, Pace::AsFastAsPossible).await?;
    eventually("the standby lists the session", SOON, || async {
        let (_, list) = get(&other, "/api/sessions").await.ok()?;
        (list["rows"][0]["id"] == "call").then_some(())
    })
    .await?;
    fleet.dispatchers[leader].kill9()?;
    eventually("it takes over and says so", SOON, || async {
        let (_, ready) = get(&other, "/ready").await.ok()?;
        (ready["role"] == "active" && ready["ready"] == true).then_some(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tls_with_a_private_authority() -> Result<()> {
    let _place = fleet::place().await;
    let dir = tempfile::tempdir()?;
    let (ca, cert, key) = authority(dir.path(), 2034)?;
    let fleet = served()
        .set("dispatcher.http.tls_cert", cert.display())
        .set("dispatcher.http.tls_key", key.display())
        .start()
        .await?;
    let url = fleet.dispatchers[0].http_url().await?;
    ensure!(url.starts_with("https://"), "{url}");
    let trusting = Probe { ca: Some(ca), token: None };
    let answer = trusting.get(&format!("{url}/health"), ASK).await?;
    ensure!(answer.status == 200, "{}", answer.status);
    ensure!(Probe::default().get(&format!("{url}/health"), ASK).await.is_err(), "nobody vouches for it");
    let plain = url.replace("https://", "http://");
    ensure!(Probe::default().get(&format!("{plain}/health"), ASK).await.is_err(), "plain text is answered");
    let metrics = trusting.get(&format!("{url}/metrics"), ASK).await?;
    let text = String::from_utf8(metrics.body)?;
    ensure!(text.contains("voxfleet_certificate_expiry_timestamp_seconds{use=\"http\"} 2019686400"), "{text}");

    // Renewed in place: the next connection gets the new one, without a restart.
    let (other, ..) = authority(dir.path(), 2035)?;
    let renewed = Probe { ca: Some(other), token: None };
    eventually("the new certificate is in use", Duration::from_secs(60), || async {
        renewed.get(&format!("{url}/health"), ASK).await.ok().map(|_| ())
    })
    .await?;
    Ok(())
}

/// A certificate for 127.0.0.1 that vouches for itself, good until the first day of this year.
fn authority(dir: &Path, year: i32) -> Result<(std::path::PathBuf, std::path::PathBuf, std::path::PathBuf)> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let cert = params.self_signed(&key)?;
    let (ca, chain, private) = (dir.join(format!("ca-{year}.pem")), dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&private, key.serialize_pem())?;
    std::fs::write(&chain, cert.pem())?;
    std::fs::write(&ca, cert.pem())?;
    Ok((ca, chain, private))
}

/// A page's stream of events.
struct Page {
    stream: TcpStream,
    text: String,
}

impl Page {
    async fn open(url: &str, path: &str) -> Result<Self> {
        let address = url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
        Ok(Self { stream, text: String::new() })
    }

    /// The next event that fits.
    async fn until(&mut self, what: &str, fits: impl Fn(&str, &Value) -> bool) -> Result<Value> {
        let end = Instant::now() + SOON;
        loop {
            while let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (event.to_owned(), rest.to_owned());
                self.text = rest;
                let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
                let (Some(name), Some(data)) = (field("event:"), field("data:")) else { continue };
                let data: Value = serde_json::from_str(data).unwrap_or_default();
                if fits(name, &data) {
                    return Ok(data);
                }
            }
            let mut bytes = vec![0; 64 * 1024];
            let left = end.saturating_duration_since(Instant::now());
            let read = timeout(left, self.stream.read(&mut bytes)).await;
            let count = read.with_context(|| format!("{what} did not come; the rest: {}", self.text))??;
            ensure!(count > 0, "the stream ended before {what}");
            self.text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }
}
