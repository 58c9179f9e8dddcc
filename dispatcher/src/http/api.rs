//! What pages and programs ask for. Handlers are thin: a board or a request over NATS, and its view.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use voxfleet_http::{
    Granted, Operator, Refusal, Role, Viewer,
    access::COOKIE,
    axum::{
        Json, Router,
        extract::{Path, Query, State},
        http::{HeaderValue, StatusCode, header},
        response::{IntoResponse, Response},
        routing::{get, post},
    },
    exposition::{CONTENT_TYPE, Exposition},
    process, recorder,
};
use voxfleet_nats::{
    ServerError,
    again::{self, RetryError},
    api::{self, ApiError, Endpoint},
    dead::{DeadLetters, StoredLetter},
    transcript::{Reader, Said},
};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{DrainRequest, Drained},
    id::{GpuId, Kind, StreamId},
    job::{JobList, JobListRequest, JobQuery, JobState, JobStatus},
    session::{SessionRequest, SessionStatus},
};

use super::{
    Site, health, metrics, reading,
    sessions::{self, ListQuery},
    texts::Texts,
    view,
};

/// For a request to the active dispatcher.
const ASK: Duration = Duration::from_secs(5);

pub(crate) fn routes() -> Router<Site> {
    Router::new()
        .route("/health", get(alive))
        .route("/ready", get(ready))
        .route("/gpu-status", get(gpu_status))
        .route("/metrics", get(metrics_page))
        .route("/api/me", get(me))
        .route("/api/login", post(login))
        .route("/api/logout", post(logout))
        .route("/api/fleet", get(fleet))
        .route("/api/sessions", get(list_sessions))
        .route("/api/sessions/{id}", get(session))
        .route("/api/jobs", get(list_jobs))
        .route("/api/jobs/{id}", get(job))
        .route("/api/dead", get(dead))
        .route("/api/dead/{seq}/retry", post(retry))
        .route("/api/events", get(events))
        .route("/api/gpus/{gpu_id}/drain", post(drain))
}

/// A failure of the service API as HTTP has it.
pub(crate) fn refusal(error: ApiError) -> Refusal {
    match error {
        ApiError::Refused(failure) => of_failure(&failure),
        other => Refusal::unavailable(other.to_string()),
    }
}

pub(crate) fn of_failure(failure: &Failure) -> Refusal {
    let status = match failure.class {
        FailureClass::BadRequest | FailureClass::BadAudio | FailureClass::UnsupportedFormat => StatusCode::BAD_REQUEST,
        FailureClass::NotFound => StatusCode::NOT_FOUND,
        FailureClass::Forbidden => StatusCode::FORBIDDEN,
        FailureClass::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        FailureClass::ModelDoesNotFit | FailureClass::ModelMissing => StatusCode::CONFLICT,
        FailureClass::NoCapacity
        | FailureClass::NoWorkers
        | FailureClass::Unavailable
        | FailureClass::Timeout
        | FailureClass::OutOfMemory => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    Refusal {
        retry_after_ms: failure.retry_after_ms,
        ..Refusal::new(status, failure.class.as_str(), failure.message.clone())
    }
}

async fn alive(State(site): State<Site>) -> Json<Value> {
    let uptime = SystemTime::now().duration_since(site.started).unwrap_or_default().as_secs();
    Json(json!({ "status": "ok", "version": env!("CARGO_PKG_VERSION"), "uptime_seconds": uptime }))
}

/// Open to everybody: whoever restarts processes has no token. Figures only, no names.
async fn ready(State(site): State<Site>) -> Response {
    let connected = site.nats.is_connected();
    let board = if connected { site.boards.now().await.ok() } else { None };
    let (ready, answer) = health::ready(connected, board.as_deref());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(answer)).into_response()
}

async fn gpu_status(_: Viewer, State(site): State<Site>) -> Result<Json<Value>, Refusal> {
    Ok(Json(view::gpu_status(&*site.boards.now().await?)))
}

async fn metrics_page(_: Viewer, State(site): State<Site>) -> Response {
    let connected = site.nats.is_connected();
    let board = if connected { site.boards.now().await.ok() } else { None };
    let board = board.as_deref();
    let mut out = Exposition::default();
    let reconnects = site.nats.connection_events().borrow().connects.saturating_sub(1);
    metrics::connection(&mut out, connected, board.and_then(|b| b.rtt), reconnects, board.is_some_and(|b| b.active));
    metrics::fleet(&mut out, board);
    site.certificates(&mut out);
    process::expose(&mut out, site.started);
    out.append(&recorder::render());
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], out.into_text()).into_response()
}

async fn me(Granted(roles): Granted, State(site): State<Site>) -> Json<Value> {
    Json(json!({
        "roles": roles.names(), "login": site.access.has_logins(), "dispatcher": &*site.name,
        "version": env!("CARGO_PKG_VERSION"), "prefix": site.nats.subjects().prefix(),
    }))
}

#[derive(Deserialize)]
struct Login {
    token: String,
}

async fn login(State(site): State<Site>, Json(login): Json<Login>) -> Result<Response, Refusal> {
    if site.access.of_token(&login.token).is_none() {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "unauthorized", "nobody has this token"));
    }
    Ok(with_cookie(&site, &login.token, ""))
}

async fn logout(State(site): State<Site>) -> Response {
    with_cookie(&site, "", "; Max-Age=0")
}

fn with_cookie(site: &Site, token: &str, more: &str) -> Response {
    let secure = if site.encrypted { "; Secure" } else { "" };
    let cookie = format!("{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict{secure}{more}");
    let mut response = StatusCode::NO_CONTENT.into_response();
    // Tokens are visible ASCII without separators: nobody has another one.
    if let Ok(mut value) = HeaderValue::from_str(&cookie) {
        value.set_sensitive(true);
        response.headers_mut().insert(header::SET_COOKIE, value);
    }
    response
}

async fn fleet(_: Viewer, State(site): State<Site>) -> Result<Json<Value>, Refusal> {
    Ok(Json(view::full(&*site.boards.now().await?)))
}

async fn list_sessions(
    _: Viewer,
    State(site): State<Site>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Value>, Refusal> {
    site.texts.want();
    let board = site.boards.now().await?;
    Ok(Json(site.texts.with(|texts| json!(sessions::list(&board.sessions, texts, &query)))))
}

pub(crate) fn id(text: &str) -> Result<StreamId, Refusal> {
    StreamId::new(text).map_err(|error| Refusal::bad_request(error.to_string()))
}

/// A session as the active dispatcher knows it; none where it knows none and nothing was said.
pub(crate) async fn session_row(site: &Site, id: &StreamId) -> Result<(Value, bool), Refusal> {
    let request = SessionRequest { session: id.clone() };
    let status: Result<SessionStatus, _> = api::request(&site.nats, Endpoint::SessionStatus, &request, ASK).await;
    match status {
        Ok(status) => {
            let said = status.last_final.is_some();
            let summary = crate::core::summary_of(&status);
            let row = sessions::Row::of(&summary, &Texts::default());
            Ok((json!(row), said))
        }
        Err(error) => Err(refusal(error)),
    }
}

async fn session(_: Viewer, State(site): State<Site>, Path(text): Path<String>) -> Result<Json<Value>, Refusal> {
    let id = id(&text)?;
    let (row, said) = session_row(&site, &id).await?;
    let standing = read(&site, Kind::Session, &id, said).await?;
    Ok(Json(json!({ "session": row, "finals": standing })))
}

async fn read(site: &Site, kind: Kind, id: &StreamId, said: bool) -> Result<Vec<Value>, Refusal> {
    let _place = site.readers.take()?;
    Ok(stands(site, kind, id, said).await?.0.view())
}

/// What stands, and the reader behind it. What was there a moment ago may have expired: the wait for it is bounded.
pub(crate) async fn stands(
    site: &Site,
    kind: Kind,
    id: &StreamId,
    said: bool,
) -> Result<(reading::Standing, Reader<Said>), Refusal> {
    let reading = tokio::time::timeout(ASK, reading::read(&site.nats, kind, id, said)).await;
    match reading {
        Ok(Ok(stands)) => Ok(stands),
        Ok(Err(error)) => Err(Refusal::unavailable(error.to_string())),
        Err(_) => Err(Refusal::unavailable("the transcript was not read in time")),
    }
}

#[derive(Deserialize)]
pub(super) struct JobsQuery {
    state: Option<JobState>,
    limit: Option<u32>,
}

async fn list_jobs(
    _: Viewer,
    State(site): State<Site>,
    Query(query): Query<JobsQuery>,
) -> Result<Json<Value>, Refusal> {
    let request = JobListRequest { state: query.state, limit: query.limit, ..JobListRequest::default() };
    let list: JobList = api::request(&site.nats, Endpoint::JobList, &request, ASK).await.map_err(refusal)?;
    let row = |job: voxfleet_schema::job::JobSummary| {
        let percent = job.progress.as_ref().and_then(|progress| {
            let total = progress.total_ms.filter(|total| *total > 0)?;
            Some((progress.done_ms.min(total) * 100 / total) as u32)
        });
        json!({
            "id": job.job, "state": job.state, "priority": job.priority, "gpu_id": job.gpu_id, "percent": percent,
            "submitted_ms": job.submitted_ms, "ended_ms": job.ended_ms, "duration_s": job.duration_ms.map(|ms| ms as f64 / 1e3),
            "failure": job.error.map(|error| error.to_string()), "label": job.name, "ahead": job.ahead,
        })
    };
    Ok(Json(json!({ "total": list.total, "rows": list.jobs.into_iter().map(row).collect::<Vec<_>>() })))
}

async fn job(_: Viewer, State(site): State<Site>, Path(text): Path<String>) -> Result<Json<Value>, Refusal> {
    let id = id(&text)?;
    let row = job_row(&site, &id).await?;
    let said = job_said(&site, &id).await?;
    let finals = read(&site, Kind::Job, &id, said).await?;
    Ok(Json(json!({ "job": row, "finals": finals })))
}

pub(crate) async fn job_row(site: &Site, id: &StreamId) -> Result<Value, Refusal> {
    let query = JobQuery { job: id.clone() };
    let status: JobStatus = api::request(&site.nats, Endpoint::JobStatus, &query, ASK).await.map_err(refusal)?;
    Ok(without_secrets(json!(status)))
}

/// Where a recording lies may be all that is needed to read it, and a prompt is somebody's words: nothing for whoever may look.
fn without_secrets(mut status: Value) -> Value {
    if let Some(record) = status.get_mut("record").and_then(Value::as_object_mut) {
        record.remove("audio");
        if let Some(options) = record.get_mut("options").and_then(Value::as_object_mut) {
            options.retain(|name, _| name != "prompt" && name != "hotwords");
        }
    }
    status
}

/// Whether a job has any final yet.
pub(crate) async fn job_said(site: &Site, id: &StreamId) -> Result<bool, Refusal> {
    let last = voxfleet_nats::transcript::Chain::new(&site.nats).last(Kind::Job, id).await;
    last.map(|last| last.is_some()).map_err(|error| Refusal::unavailable(error.to_string()))
}

#[derive(Deserialize)]
struct Limit {
    limit: Option<usize>,
}

async fn dead(_: Viewer, State(site): State<Site>, Query(query): Query<Limit>) -> Result<Json<Value>, Refusal> {
    let limit = query.limit.unwrap_or(100).clamp(1, 500);
    let listed = DeadLetters::new(&site.nats).list(limit).await;
    let (letters, total) = listed.map_err(|error| Refusal::unavailable(error.to_string()))?;
    Ok(Json(json!({ "total": total, "rows": letters.iter().map(letter).collect::<Vec<_>>() })))
}

fn letter(stored: &StoredLetter) -> Value {
    let (class, message) = match &stored.letter {
        Ok(letter) => (letter.error.class.as_str(), letter.error.message.clone()),
        Err(error) => ("unknown", error.to_string()),
    };
    json!({
        "seq": stored.seq, "kind": stored.kind, "id": stored.id, "class": class, "message": message,
        "at_ms": stored.stored_ms, "bytes": stored.payload.len(), "retriable": stored.kind == Kind::Job,
    })
}

/// By its number: an id has many letters where it is a session's.
async fn retry(_: Operator, State(site): State<Site>, Path(seq): Path<u64>) -> Result<Json<Value>, Refusal> {
    let unavailable = |error: ServerError| Refusal::unavailable(error.to_string());
    let _turn = site.retrying.lock().await;
    let letter = DeadLetters::new(&site.nats).at(seq).await.map_err(unavailable)?;
    let letter = letter.ok_or_else(|| Refusal::not_found(format!("there is no dead letter {seq}")))?;
    if letter.kind != Kind::Job {
        // A job of that name would be another one.
        return Err(Refusal::bad_request(format!(
            "dead letter {seq} is a {}'s: only jobs are sent again",
            letter.kind
        )));
    }
    tracing::info!(kind = %letter.kind, id = %letter.id, "retry asked for over http");
    let retried = again::retry(&site.nats, &letter.id, None, false).await.map_err(of_retry)?;
    Ok(Json(json!({ "retried": retried.submitted.job, "notes": retried.notes })))
}

fn of_retry(error: RetryError) -> Refusal {
    let conflict = |message: String| Refusal::new(StatusCode::CONFLICT, "bad_request", message);
    match error {
        RetryError::NoLetter(_) => Refusal::not_found(error.to_string()),
        RetryError::Api { source, .. } => refusal(source),
        RetryError::Records(_) | RetryError::Media(_) | RetryError::Server(_) => {
            Refusal::unavailable(error.to_string())
        }
        _ => conflict(error.to_string()),
    }
}

#[derive(Deserialize)]
pub(super) struct EventsQuery {
    kind: Option<String>,
    limit: Option<usize>,
}

async fn events(_: Viewer, State(site): State<Site>, Query(query): Query<EventsQuery>) -> Json<Value> {
    let rows = site.recent.rows(query.kind.as_deref(), query.limit.unwrap_or(200).clamp(1, 500)).await;
    Json(json!({ "rows": rows }))
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Deadline {
    deadline_ms: Option<u64>,
}

async fn drain(
    _: Operator,
    Granted(roles): Granted,
    State(site): State<Site>,
    Path(gpu): Path<String>,
    body: Bytes,
) -> Result<Json<Value>, Refusal> {
    // Whoever has nothing to say sends nothing, whatever his client says of its type.
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    let deadline: Deadline = serde_json::from_slice(body).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let gpu_id = GpuId::new(gpu).map_err(|error| Refusal::bad_request(error.to_string()))?;
    tracing::info!(gpu = %gpu_id, operator = roles.has(Role::Operator), "drain asked for over http");
    let request = DrainRequest { gpu_id, deadline_ms: deadline.deadline_ms };
    let drained: Drained = api::request(&site.nats, Endpoint::FleetDrain, &request, ASK).await.map_err(refusal)?;
    Ok(Json(json!(drained)))
}
