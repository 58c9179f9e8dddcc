//! `POST /api/transcribe`: a recording in, its transcript out, for programs without NATS.
//!
//! The body goes into the object store as it comes, then the job is submitted like anybody's. Whoever waits gets the
//! aggregate, or what happens as it happens; whoever does not gets the job's id. A client that goes away cancels nothing
//! unless it asked for that.

mod following;
mod upload;
mod wish;

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use voxfleet_http::{
    Producer, Refusal,
    axum::{
        Json, RequestExt as _, Router,
        extract::{DefaultBodyLimit, Multipart, Query, Request, State},
        http::{HeaderMap, StatusCode, header},
        response::{
            IntoResponse, Response,
            sse::{Event, KeepAlive, Sse},
        },
        routing::post,
    },
};
use voxfleet_nats::{
    Nats,
    api::{self, ApiError, Endpoint},
};
use voxfleet_schema::{
    failure::FailureClass,
    id::StreamId,
    job::{JobQuery, JobStatus, Submitted},
    trace::TraceContext,
};

use super::{Site, api::refusal, reading::final_view};
use following::{Following, Step};
use wish::{Format, Wish, WishError};

/// Recordings on their way in at once.
const MOST_UPLOADS: usize = 64;
/// When one of them may be in.
const LATER_MS: u64 = 2_000;
/// A field of a form that is no recording.
const MOST_FIELD: usize = 16 * 1024;
/// A dispatcher that takes over does so within seconds, and asks for the same id mean the same.
const SUBMIT: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(10);

/// How many recordings may come in.
#[derive(Debug, Clone)]
pub(crate) struct Uploads(Arc<Semaphore>);

impl Default for Uploads {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST_UPLOADS)))
    }
}

/// A recording is as long as it is: the limit is the object store's.
pub(crate) fn routes() -> Router<Site> {
    Router::new().route("/api/transcribe", post(transcribe)).layer(DefaultBodyLimit::disable())
}

async fn transcribe(
    _: Producer,
    State(site): State<Site>,
    Query(pairs): Query<Vec<(String, String)>>,
    request: Request,
) -> Result<Response, Refusal> {
    let events = accepts_events(request.headers());
    let trace = super::asr::traced_by(request.headers());
    let (mut wish, place) = match begin(&site, &pairs) {
        Ok(begun) => begun,
        Err(refusal) => {
            upload::pour_away_body(request.into_body().into_data_stream()).await;
            return Err(refusal);
        }
    };
    let id = match site.shutdown.run_until_cancelled(receive(&site.nats, &mut wish, request)).await {
        Some(received) => received?,
        None => return Err(Refusal::unavailable("this server stops; send it again")),
    };
    drop(place);
    let submitted = submit(&site.nats, &wish, &id, trace.as_ref()).await?;
    if !wish.wait {
        let answer = json!({ "job": submitted.job, "state": submitted.state });
        return Ok((StatusCode::ACCEPTED, Json(answer)).into_response());
    }
    let leaving = Leaving {
        cancels: wish.cancel_on_disconnect,
        nats: site.nats.clone(),
        tasks: site.tasks.clone(),
        id: id.clone(),
    };
    let following = Following::new(&site.nats, id);
    match events {
        true => Ok(told(site, following, leaving)),
        false => answered(&site, following, leaving, wish.format).await,
    }
}

fn begin(site: &Site, pairs: &[(String, String)]) -> Result<(Wish, OwnedSemaphorePermit), Refusal> {
    let wish = Wish::of_query(pairs).map_err(bad)?;
    let busy = || Refusal {
        retry_after_ms: Some(LATER_MS),
        ..Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "no_capacity", "as many recordings come in as can")
    };
    let place = site.uploads.0.clone().try_acquire_owned().map_err(|_| busy())?;
    Ok((wish, place))
}

fn accepts_events(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.split(',').any(|kind| kind.trim().starts_with("text/event-stream")))
}

fn bad(error: WishError) -> Refusal {
    Refusal::bad_request(error.to_string())
}

/// Stores the recording; answers with the id under which it lies.
async fn receive(nats: &Nats, wish: &mut Wish, request: Request) -> Result<StreamId, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if kind == "multipart/form-data" {
        let form = request.extract::<Multipart, _>().await;
        return form_fields(nats, wish, form.map_err(|error| Refusal::bad_request(error.body_text()))?).await;
    }
    let is_recording = kind.starts_with("audio/")
        || kind.starts_with("video/")
        || matches!(kind.as_str(), "application/octet-stream" | "application/ogg");
    if !is_recording {
        let message = "send the recording as a form (multipart/form-data, field file) or as a body of type audio/*";
        upload::pour_away_body(request.into_body().into_data_stream()).await;
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_format", message));
    }
    let id = wish.id().map_err(bad)?;
    wish.request(&id).map_err(bad)?;
    let is_known = wish.is_named() && is_known(nats, &id).await?;
    upload::store(nats, &id, request.into_body().into_data_stream(), is_known).await?;
    Ok(id)
}

async fn form_fields(nats: &Nats, wish: &mut Wish, mut form: Multipart) -> Result<StreamId, Refusal> {
    let mut stored: Option<(StreamId, bool)> = None;
    let read = fields(nats, wish, &mut form, &mut stored).await;
    match (read, stored) {
        (Ok(()), Some((id, _))) => Ok(id),
        (Ok(()), None) => Err(Refusal::bad_request("the form has no field called file")),
        (Err(refusal), stored) => {
            // Whoever still sends hears why he should not only when what he sent is read.
            let _ = tokio::time::timeout(ASK, async { while let Ok(Some(_)) = form.next_field().await {} }).await;
            if let Some((id, false)) = stored {
                upload::forget(nats, &id).await;
            }
            Err(refusal)
        }
    }
}

async fn fields(
    nats: &Nats,
    wish: &mut Wish,
    form: &mut Multipart,
    stored: &mut Option<(StreamId, bool)>,
) -> Result<(), Refusal> {
    let broken =
        |error: voxfleet_http::axum::extract::multipart::MultipartError| Refusal::bad_request(error.body_text());
    while let Some(mut field) = form.next_field().await.map_err(broken)? {
        let Some(name) = field.name().map(str::to_owned) else {
            return Err(Refusal::bad_request("a field of the form has no name"));
        };
        if name != "file" {
            let mut text = Vec::new();
            while let Some(part) = field.chunk().await.map_err(broken)? {
                if text.len() + part.len() > MOST_FIELD {
                    return Err(Refusal::bad_request(format!("a field is longer than {MOST_FIELD} bytes")));
                }
                text.extend_from_slice(&part);
            }
            let text = String::from_utf8(text).map_err(|_| Refusal::bad_request("a field is no text"))?;
            wish.set(&name, &text, stored.is_some()).map_err(bad)?;
            continue;
        }
        if stored.is_some() {
            return Err(Refusal::bad_request("the form has two recordings; send one at a time"));
        }
        if let Some(file) = field.file_name() {
            wish.called(file);
        }
        let id = wish.id().map_err(bad)?;
        // What can be known to be wrong by now is told before megabytes are sent.
        wish.request(&id).map_err(bad)?;
        let is_known = wish.is_named() && is_known(nats, &id).await?;
        upload::store(nats, &id, field, is_known).await?;
        *stored = Some((id, is_known));
    }
    Ok(())
}

async fn is_known(nats: &Nats, id: &StreamId) -> Result<bool, Refusal> {
    let query = JobQuery { job: id.clone() };
    let status: Result<JobStatus, _> = api::request(nats, Endpoint::JobStatus, &query, ASK).await;
    match status {
        Ok(_) => Ok(true),
        Err(ApiError::Refused(failure)) if failure.class == FailureClass::NotFound => Ok(false),
        Err(error) => Err(refusal(error)),
    }
}

async fn submit(nats: &Nats, wish: &Wish, id: &StreamId, trace: Option<&TraceContext>) -> Result<Submitted, Refusal> {
    let error = match wish.request(id) {
        Ok(request) => match api::request_traced(nats, Endpoint::JobSubmit, &request, trace, SUBMIT).await {
            Ok(submitted) => return Ok(submitted),
            // Where nobody answered it may have been taken, and then its recording is needed.
            Err(error @ ApiError::Refused(_)) => refusal(error),
            Err(error) => return Err(refusal(error)),
        },
        Err(error) => bad(error),
    };
    // A job of this id that somebody had before keeps its recording.
    if !wish.is_named() || matches!(is_known(nats, id).await, Ok(false)) {
        upload::forget(nats, id).await;
    }
    Err(error)
}

/// Cancels the job when its client leaves before its end, if that was wished for.
struct Leaving {
    cancels: bool,
    nats: Nats,
    tasks: TaskTracker,
    id: StreamId,
}

impl Leaving {
    fn stays(&mut self) {
        self.cancels = false;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if !self.cancels {
            return;
        }
        let (nats, query) = (self.nats.clone(), JobQuery { job: self.id.clone() });
        self.tasks.spawn(async move {
            let cancelled: Result<JobStatus, _> = api::request(&nats, Endpoint::JobCancel, &query, ASK).await;
            if let Err(error) = cancelled {
                tracing::warn!(job = %query.job, %error, "a job whose client left was not cancelled");
            }
        });
    }
}

/// One answer, at its end.
async fn answered(
    site: &Site,
    mut following: Following,
    mut leaving: Leaving,
    format: Format,
) -> Result<Response, Refusal> {
    let ended = loop {
        let step = match site.shutdown.run_until_cancelled(following.next()).await {
            Some(step) => step?,
            None => {
                leaving.stays();
                return Err(stopping(&leaving.id));
            }
        };
        if let Step::Ended(ended) = step {
            break ended;
        }
    };
    leaving.stays();
    let json = following::aggregate(&site.nats, &leaving.id, ended).await?;
    let job = [(header::HeaderName::from_static("voxfleet-job"), leaving.id.to_string())];
    Ok(match format {
        Format::Json => (job, [(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Format::Text => {
            let value: Value = serde_json::from_slice(&json).unwrap_or_default();
            let text = value["full_text"].as_str().unwrap_or_default().to_owned();
            (job, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
        }
    })
}

fn stopping(id: &StreamId) -> Refusal {
    Refusal {
        retry_after_ms: Some(LATER_MS),
        ..Refusal::unavailable(format!("this server stops; job {id} goes on, ask again with ?job={id}"))
    }
}

/// What happens, as it happens: `progress`, `final`, and at its end `result` or `error`.
fn told(site: Site, following: Following, leaving: Leaving) -> Response {
    let begun = Event::default().event("job").data(json!({ "job": leaving.id }).to_string());
    let state = (site, following, Some(leaving));
    let events = stream::unfold(state, |(site, mut following, leaving)| async move {
        let mut leaving = leaving?;
        let step = site.shutdown.run_until_cancelled(following.next()).await;
        let (event, goes_on) = match step {
            Some(Ok(Step::Progress(progress))) => (message("progress", &progress), true),
            Some(Ok(Step::Final(value))) => (message("final", &final_view(&value)), true),
            Some(Ok(Step::Ended(ended))) => {
                let result = following::aggregate(&site.nats, &leaving.id, ended).await;
                let event = match result {
                    Ok(json) => message("result", &serde_json::from_slice(&json).unwrap_or_default()),
                    Err(refusal) => error_event(&refusal),
                };
                (event, false)
            }
            Some(Err(refusal)) => (error_event(&refusal), false),
            None => (error_event(&stopping(&leaving.id)), false),
        };
        if !goes_on {
            leaving.stays();
        }
        Some((event, (site, following, goes_on.then_some(leaving))))
    });
    let events = stream::iter([begun]).chain(events).map(Ok::<_, Infallible>);
    Sse::new(events).keep_alive(KeepAlive::new().interval(PING).text("ping")).into_response()
}

fn message(name: &str, value: &Value) -> Event {
    // JSON has no line breaks of its own.
    Event::default().event(name).data(value.to_string())
}

fn error_event(refusal: &Refusal) -> Event {
    let error = json!({ "class": refusal.class, "message": refusal.message, "status": refusal.status.as_u16() });
    message("error", &json!({ "error": error }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_sent_to_those_who_ask_for_them() {
        for (accept, events) in [
            (None, false),
            (Some("*/*"), false),
            (Some("application/json"), false),
            (Some("text/event-stream"), true),
            (Some("application/json, text/event-stream;q=0.9"), true),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, accept.parse().expect("a value"));
            }
            assert_eq!(accepts_events(&headers), events, "{accept:?}");
        }
    }
}
