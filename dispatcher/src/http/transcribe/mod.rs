//! `POST /api/transcribe`: a recording in, its transcript out, for programs without NATS.
//!
//! The body goes into the object store as it comes, then the job is submitted like anybody's. Whoever waits gets the
//! aggregate, or what happens as it happens; whoever does not gets the job's id. A client that goes away cancels nothing
//! unless it asked for that.
//!
//! Invariants: an upload writes and deletes only its own object, whatever id it comes under, and the job that is there first
//! keeps the recording that it came with; no upload takes room that another was promised; nobody holds a place without sending.
//!
//! | module | what for |
//! |---|---|
//! | [`wish`] | what is wanted, from the URL and a form's fields; pure |
//! | [`body`] | the request as it is waited for: in time, at a pace, up to a length |
//! | [`promise`] | room in the object store, shared by all that come in |
//! | [`upload`] | from the request into the object store |
//! | [`following`] | the job until its end |

mod body;
mod following;
mod promise;
mod upload;
pub(super) mod wish;

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use voxfleet_http::{
    Producer, Refusal, Seat,
    axum::{
        Extension, Json, RequestExt as _, Router,
        body::{Body, HttpBody as _},
        extract::{
            DefaultBodyLimit, Multipart, Query, Request, State,
            multipart::{Field, MultipartError},
        },
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
    media::Media,
};
use voxfleet_schema::{
    failure::FailureClass,
    id::StreamId,
    job::{AudioUrl, JobQuery, JobStatus, Submitted, own_recording, upload_key},
    trace::TraceContext,
};

use super::{Site, api::refusal, limits::UploadLimits, reading::final_view};
use body::{Cut, FORM_BYTES, Why, watched};
use following::{Following, Step};
use promise::Book;
use upload::{Allowed, NoRoom};
use wish::{Format, Wish, WishError};

/// When one of them may be in.
const LATER_MS: u64 = 2_000;
/// A field of a form that is no recording.
const MOST_FIELD: usize = 16 * 1024;
/// A dispatcher that takes over does so within seconds, and asks for the same id mean the same.
const SUBMIT: Duration = Duration::from_secs(20);
const ASK: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(10);

/// How many recordings may come in, and what they have been promised.
#[derive(Debug, Clone)]
pub(crate) struct Uploads {
    places: Arc<Semaphore>,
    book: Book,
    limits: Arc<UploadLimits>,
}

impl Uploads {
    pub(crate) fn new(limits: UploadLimits) -> Self {
        Self { places: Arc::new(Semaphore::new(limits.max_at_once)), book: Book::default(), limits: Arc::new(limits) }
    }
}

/// A recording is as long as it is: the limits are ours and the object store's.
pub(crate) fn routes() -> Router<Site> {
    Router::new().route("/api/transcribe", post(transcribe)).layer(DefaultBodyLimit::disable())
}

async fn transcribe(
    _: Producer,
    State(site): State<Site>,
    Query(pairs): Query<Vec<(String, String)>>,
    seat: Option<Extension<Seat>>,
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
    if let Some(Extension(seat)) = seat {
        // From here on the body's own pace decides.
        seat.asks();
    }
    let received = match site.shutdown.run_until_cancelled(receive(&site, &mut wish, request)).await {
        Some(received) => received?,
        None => return Err(Refusal::unavailable("this server stops; send it again")),
    };
    drop(place);
    let id = received.id.clone();
    let submitted = submit(&site.nats, &wish, received, trace.as_ref()).await?;
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
    let place = site.uploads.places.clone().try_acquire_owned().map_err(|_| busy())?;
    Ok((wish, place))
}

fn accepts_events(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.split(',').any(|kind| kind.trim().starts_with("text/event-stream")))
}

fn bad(error: WishError) -> Refusal {
    Refusal::bad_request(error.to_string())
}

/// A recording that has come.
#[derive(Debug)]
struct Received {
    id: StreamId,
    lies: Lies,
}

#[derive(Debug)]
enum Lies {
    /// Under a name of this upload's own: it goes where no job takes it.
    Own { key: String, digest: Option<String> },
    /// There is a job of this id, with the same recording at this address.
    Known { audio: String },
}

/// One request on its way in.
struct Incoming<'a> {
    nats: &'a Nats,
    allowed: Allowed,
    stored: Option<Received>,
}

/// Stores the recording.
async fn receive(site: &Site, wish: &mut Wish, request: Request) -> Result<Received, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_form = kind == "multipart/form-data";
    let is_recording = kind.starts_with("audio/")
        || kind.starts_with("video/")
        || matches!(kind.as_str(), "application/octet-stream" | "application/ogg");
    if !is_form && !is_recording {
        let message = "send the recording as a form (multipart/form-data, field file) or as a body of type audio/*";
        upload::pour_away_body(request.into_body().into_data_stream()).await;
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_format", message));
    }
    let (limits, why) = (&*site.uploads.limits, Why::default());
    let promise = site.uploads.book.promise();
    let allowed = Allowed { promise, max_bytes: limits.max_bytes, why: why.clone() };
    let mut incoming = Incoming { nats: &site.nats, allowed, stored: None };
    let length = request.body().size_hint().exact();
    let request = request.map(|body| Body::from_stream(watched(body.into_data_stream(), limits, why.clone())));
    if let Err(refusal) = incoming.announced(length, is_form).await {
        upload::pour_away_body(request.into_body().into_data_stream()).await;
        return Err(refusal);
    }
    let read = match is_form {
        true => incoming.form(wish, request).await,
        false => incoming.recording(wish, request.into_body().into_data_stream()).await,
    };
    match (read, incoming.stored) {
        (Ok(()), Some(received)) => Ok(received),
        (Ok(()), None) => Err(Refusal::bad_request("the form has no field called file")),
        (Err(refusal), stored) => {
            if let Some(Received { lies: Lies::Own { key, .. }, .. }) = stored {
                upload::forget(&site.nats, &key).await;
            }
            Err(refusal)
        }
    }
}

impl Incoming<'_> {
    /// What can be known to be too much is told before megabytes are sent, and the room for the rest is this upload's.
    async fn announced(&mut self, length: Option<u64>, is_form: bool) -> Result<(), Refusal> {
        let Some(length) = length else { return Ok(()) };
        let around = if is_form { FORM_BYTES } else { 0 };
        if length > self.allowed.max_bytes.saturating_add(around) {
            return Err(Cut::TooLarge(self.allowed.max_bytes).refusal());
        }
        let reached = upload::reach(&Media::new(self.nats), &mut self.allowed.promise, length, length).await;
        reached.map_err(|error| match error {
            NoRoom::Cut(cut) => cut.refusal(),
            NoRoom::Media(error) => upload::refused(error, &Why::default()),
        })
    }

    async fn form(&mut self, wish: &mut Wish, request: Request) -> Result<(), Refusal> {
        let form = request.extract::<Multipart, _>().await;
        let mut form = form.map_err(|error| Refusal::bad_request(error.body_text()))?;
        let read = self.fields(wish, &mut form).await;
        // Parsers say that a body ended; why, is known here.
        let read = read.map_err(|refusal| self.allowed.why.cut().map_or(refusal, Cut::refusal));
        if read.is_err() {
            // Whoever still sends hears why he should not only when what he sent is read.
            let _ = tokio::time::timeout(ASK, async { while let Ok(Some(_)) = form.next_field().await {} }).await;
        }
        read
    }

    async fn fields(&mut self, wish: &mut Wish, form: &mut Multipart) -> Result<(), Refusal> {
        while let Some(mut field) = form.next_field().await.map_err(broken)? {
            let Some(name) = field.name().map(str::to_owned) else {
                return Err(Refusal::bad_request("a field of the form has no name"));
            };
            if name != "file" {
                let text = text_of(&mut field).await?;
                wish.set(&name, &text, self.stored.is_some()).map_err(bad)?;
                continue;
            }
            if self.stored.is_some() {
                return Err(Refusal::bad_request("the form has two recordings; send one at a time"));
            }
            if let Some(file) = field.file_name() {
                wish.called(file);
            }
            self.recording(wish, field).await?;
        }
        Ok(())
    }

    /// The recording itself. That of a job that is there already is compared, not stored again.
    async fn recording<E>(
        &mut self,
        wish: &Wish,
        body: impl stream::Stream<Item = Result<bytes::Bytes, E>> + Send,
    ) -> Result<(), Refusal> {
        let id = wish.id().map_err(bad)?;
        let key = upload_key(&id, &Uuid::new_v4().simple().to_string());
        // What can be known to be wrong by now is told before megabytes are sent.
        wish.request(&id, &AudioUrl::object(&key)).map_err(bad)?;
        let known = if wish.is_named() { recording_of(self.nats, &id).await? } else { None };
        let lies = match known {
            Some(audio) => {
                let digest = upload::digest(body, &self.allowed.why).await?;
                is_the_same(self.nats, &id, &audio, Some(&digest)).await?;
                Lies::Known { audio }
            }
            None => {
                let digest = upload::store(self.nats, &key, body, &mut self.allowed).await?;
                Lies::Own { key, digest }
            }
        };
        self.stored = Some(Received { id, lies });
        Ok(())
    }
}

fn broken(error: MultipartError) -> Refusal {
    Refusal::bad_request(error.body_text())
}

async fn text_of(field: &mut Field<'_>) -> Result<String, Refusal> {
    let mut text = Vec::new();
    while let Some(part) = field.chunk().await.map_err(broken)? {
        if text.len() + part.len() > MOST_FIELD {
            return Err(Refusal::bad_request(format!("a field is longer than {MOST_FIELD} bytes")));
        }
        text.extend_from_slice(&part);
    }
    String::from_utf8(text).map_err(|_| Refusal::bad_request("a field is no text"))
}

/// Where the recording of a job is; none where there is no such job.
async fn recording_of(nats: &Nats, id: &StreamId) -> Result<Option<String>, Refusal> {
    let query = JobQuery { job: id.clone() };
    let status: Result<JobStatus, _> = api::request(nats, Endpoint::JobStatus, &query, ASK).await;
    match status {
        Ok(status) => Ok(Some(status.record.audio)),
        Err(ApiError::Refused(failure)) if failure.class == FailureClass::NotFound => Ok(None),
        Err(error) => Err(refusal(error)),
    }
}

/// Whether what came is what the job of this id has at `audio`. What has expired cannot be compared; then what there is of the
/// job is what is asked for.
async fn is_the_same(nats: &Nats, id: &StreamId, audio: &str, digest: Option<&str>) -> Result<(), Refusal> {
    let theirs = match own_recording(id, audio) {
        Some(key) => upload::stored_digest(nats, &key, &Why::default()).await?,
        None => Some(String::new()),
    };
    match theirs.is_none_or(|theirs| Some(theirs.as_str()) == digest) {
        true => Ok(()),
        false => {
            let message = format!("there is a job {id} with another recording");
            Err(Refusal::new(StatusCode::CONFLICT, "bad_request", message))
        }
    }
}

async fn submit(
    nats: &Nats,
    wish: &Wish,
    received: Received,
    trace: Option<&TraceContext>,
) -> Result<Submitted, Refusal> {
    let Received { id, lies } = received;
    let (key, digest) = match lies {
        Lies::Known { audio } => return ask(nats, wish, &id, &audio, trace).await.map_err(NotTaken::refusal),
        Lies::Own { key, digest } => (key, digest),
    };
    let refused = match ask(nats, wish, &id, &AudioUrl::object(&key), trace).await {
        Ok(submitted) => return Ok(submitted),
        // It may have been taken, and then its recording is needed.
        Err(NotTaken::Unanswered(refusal)) => return Err(refusal),
        Err(NotTaken::Refused(refusal)) => refusal,
    };
    // Where another one of this id was faster, it is the job; what came here is nobody's either way.
    let first = if wish.is_named() { recording_of(nats, &id).await } else { Ok(None) };
    if matches!(&first, Ok(Some(audio)) if *audio == AudioUrl::object(&key)) {
        return Err(refused);
    }
    upload::forget(nats, &key).await;
    match first {
        Ok(Some(audio)) => {
            is_the_same(nats, &id, &audio, digest.as_deref()).await?;
            ask(nats, wish, &id, &audio, trace).await.map_err(NotTaken::refusal)
        }
        Ok(None) | Err(_) => Err(refused),
    }
}

/// Why a job was not submitted.
enum NotTaken {
    Refused(Refusal),
    /// Nobody said so: it may have been.
    Unanswered(Refusal),
}

impl NotTaken {
    fn refusal(self) -> Refusal {
        match self {
            NotTaken::Refused(refusal) | NotTaken::Unanswered(refusal) => refusal,
        }
    }
}

async fn ask(
    nats: &Nats,
    wish: &Wish,
    id: &StreamId,
    audio: &str,
    trace: Option<&TraceContext>,
) -> Result<Submitted, NotTaken> {
    let request = wish.request(id, audio).map_err(|error| NotTaken::Refused(bad(error)))?;
    match api::request_traced(nats, Endpoint::JobSubmit, &request, trace, SUBMIT).await {
        Ok(submitted) => Ok(submitted),
        Err(error @ ApiError::Refused(_)) => Err(NotTaken::Refused(refusal(error))),
        Err(error) => Err(NotTaken::Unanswered(refusal(error))),
    }
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
    let (_, text) = read_aggregate(&leaving.id, &json)?;
    let job = [(header::HeaderName::from_static("voxfleet-job"), leaving.id.to_string())];
    Ok(match format {
        Format::Json => (job, [(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Format::Text => (job, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response(),
    })
}

/// An aggregate and its text. What is stored is read by machines of others: what is none is said to be none.
fn read_aggregate(id: &StreamId, json: &[u8]) -> Result<(Value, String), Refusal> {
    let value: Option<Value> = serde_json::from_slice(json).ok();
    let text = value.as_ref().and_then(|value| value["full_text"].as_str()).map(str::to_owned);
    value.zip(text).ok_or_else(|| {
        let message = format!("the result of job {id} is damaged: it is no aggregate");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
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
                let event = match result.and_then(|json| read_aggregate(&leaving.id, &json)) {
                    Ok((value, _)) => message("result", &value),
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
    fn a_result_that_is_none_is_an_error() {
        let id = StreamId::new("j").expect("an id");
        let read = |json: &[u8]| read_aggregate(&id, json).map(|(_, text)| text).map_err(|r| r.status.as_u16());
        assert_eq!(read(br#"{"full_text":"good morning","segments":[]}"#), Ok("good morning".to_owned()));
        assert_eq!(read(br#"{"full_text":""}"#), Ok(String::new()), "silence is a transcript");
        for bad in [&b""[..], b"null", b"{\"full_text\":\"good mor", b"{}", b"\xff\xfe", b"[1]"] {
            assert_eq!(read(bad), Err(500), "{bad:?}");
        }
    }

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
