//! WebSocket `/asr`: audio in as binary messages, the transcript out as JSON, for browsers and programs without NATS. Pages
//! and clients of WhisperLiveKit 0.2 are served as they are; docs/asr-websocket.md is the protocol.
//!
//! A socket is a producer and a reader like any other: it opens its session over the service API, its audio goes into the log
//! entry by entry, and what it tells it reads from the transcript. So a session here survives whatever a session survives,
//! and the dispatcher's loop does not know it.
//!
//! Invariants: audio that was taken from the socket is logged in its order, or the client is told that it was not; every
//! session that was opened here, or may have been, gets its end, however its client leaves; a client is read no faster than the
//! log takes its audio and than it could be spoken; nothing is decoded for long for one who has left; a socket keeps its place
//! among the connections of this process until its end.
//!
//! | module | what for |
//! |---|---|
//! | [`query`] | the URL; pure |
//! | [`frames`] | messages as whole frames, what they hold, how fast they may come; pure |
//! | [`intake`] | messages to audio, through a decoder's process where a recorder sends |
//! | [`pieces`] | what waits between the two |
//! | [`uplink`] | audio to the log, then the end |
//! | [`view`] | the transcript in the shape that clients read; pure |
//! | [`speaker`] | who tells them |
//! | [`goodbye`] | close codes; pure |

pub(super) mod frames;
mod goodbye;
mod intake;
mod pieces;
pub(super) mod query;
mod speaker;
mod uplink;
mod view;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::SplitStream};
use serde_json::json;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, timeout, timeout_at},
};
use voxfleet_http::{
    Producer, Refusal, Seat,
    axum::{
        Extension, Router,
        extract::{
            Query, State,
            ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
        },
        http::{HeaderMap, StatusCode},
        response::Response,
        routing::get,
    },
    guard::Open,
};
use voxfleet_nats::api::{self, ApiError, Endpoint};
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    session::{OpenRequest, Opened},
    trace::{TRACEPARENT, TraceContext},
};

use super::{Site, limits::SocketLimits};
use goodbye::Goodbye;
use intake::{Intake, Trouble};
use query::Wish;
use speaker::{Speaker, Told};
use uplink::{Logged, Uplink};

/// Longest message, more than half a minute of samples.
const MOST_MESSAGE: usize = 1 << 20;
/// What the protocol reads of one before it is told to be too long.
const MOST_READ: usize = 2 * MOST_MESSAGE;
/// A dispatcher that takes over answers within seconds.
const OPEN: Duration = Duration::from_secs(10);
/// A client that sends nothing for so long, no answer to a ping either, is gone.
const QUIET: Duration = Duration::from_secs(60);
/// For the other end's close, behind what it still sends.
const LAST_FRAMES: Duration = Duration::from_secs(2);
/// When a socket may have ended.
const LATER_MS: u64 = 2_000;
const BUSY: &str = "this server has as many connections as it serves; try again, or ask another one";
const BUSY_RECORDERS: &str = "this server decodes for as many recorders as it can; send samples (pcm_s16le) instead";

/// How many may come in.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    sockets: Arc<Semaphore>,
    recorders: Arc<Semaphore>,
    limits: Arc<SocketLimits>,
}

impl Places {
    pub(crate) fn new(limits: SocketLimits) -> Self {
        Self {
            sockets: Arc::new(Semaphore::new(limits.max_at_once)),
            recorders: Arc::new(Semaphore::new(limits.max_recorders)),
            limits: Arc::new(limits),
        }
    }
}

pub(crate) fn routes() -> Router<Site> {
    Router::new().route("/asr", get(asr))
}

async fn asr(
    _: Producer,
    State(site): State<Site>,
    Query(pairs): Query<Vec<(String, String)>>,
    headers: HeaderMap,
    seat: Option<Extension<Seat>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Refusal> {
    let wish = query::read(&pairs).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let upgrade = upgrade.map_err(|error| {
        let message = format!("this path speaks WebSocket: {}", error.body_text());
        Refusal::new(StatusCode::UPGRADE_REQUIRED, "bad_request", message)
    })?;
    let busy = || Refusal { retry_after_ms: Some(LATER_MS), ..Refusal::unavailable(BUSY) };
    let place = site.asr.sockets.clone().try_acquire_owned().map_err(|_| busy())?;
    let seat = seat.map(|Extension(seat)| seat);
    if let Some(seat) = &seat {
        seat.stays();
    }
    let trace = traced_by(&headers);
    let tasks = site.tasks.clone();
    let upgrade = upgrade.max_message_size(MOST_READ).max_frame_size(MOST_READ);
    let held = Held { _place: place, _seat: seat, _open: Open::new("websocket") };
    Ok(upgrade.on_upgrade(move |socket| {
        tasks.track_future(async move {
            serve(site, socket, wish, trace).await;
            drop(held);
        })
    }))
}

/// The trace that a request is part of.
pub(in crate::http) fn traced_by(headers: &HeaderMap) -> Option<TraceContext> {
    TraceContext::parse(headers.get(TRACEPARENT)?.to_str().ok()?)
}

/// What a socket has until its end: a place among sockets, its connection's among all, and its part of the figures.
struct Held {
    _place: OwnedSemaphorePermit,
    _seat: Option<Seat>,
    _open: Open,
}

/// One client, from its coming to its end.
async fn serve(site: Site, socket: WebSocket, wish: Wish, trace: Option<TraceContext>) {
    let (sink, mut stream) = socket.split();
    let logged = Arc::new(watch::Sender::new(Logged::default()));
    let mut speaker = Speaker::new(&site.nats, &wish.session, sink, logged.subscribe());
    let goodbye = match open(&site, &wish, trace.as_ref()).await {
        Err(goodbye) => Some(goodbye),
        Ok(opened) => session(&site, &mut speaker, &mut stream, &wish, &opened, trace, logged).await,
    };
    let Some(goodbye) = goodbye else { return speaker.leave().await };
    tracing::debug!(session = %wish.session, code = goodbye.code, reason = goodbye.reason(), "socket closed");
    speaker.close(&goodbye).await;
    // What the client still sends must be read: a socket closed over unread bytes takes the goodbye with it.
    let rest = async { while let Some(Ok(_)) = stream.next().await {} };
    let patience = if site.shutdown.is_cancelled() { LAST_FRAMES / 4 } else { LAST_FRAMES };
    let _ = timeout(patience, rest).await;
}

async fn open(site: &Site, wish: &Wish, trace: Option<&TraceContext>) -> Result<Opened, Goodbye> {
    let request = OpenRequest { session: wish.session.clone(), options: wish.options.clone() };
    let opening = api::request_traced(&site.nats, Endpoint::SessionOpen, &request, trace, OPEN);
    let goodbye = match site.shutdown.run_until_cancelled(opening).await {
        Some(Ok(opened)) => return Ok(opened),
        Some(Err(refused @ ApiError::Refused(_))) => return Err(Goodbye::not_opened(refused)),
        Some(Err(error)) => Goodbye::not_opened(error),
        None => Goodbye::restart(),
    };
    // It may have been opened with nobody here to hear it, and a session that nobody speaks in holds a slot: it gets its end.
    let uplink = Uplink::new(&site.nats, wish.session.clone(), trace.cloned(), site.shutdown.clone());
    if let Ok(uplink) = uplink {
        let (_, nothing) = pieces::channel();
        site.tasks.spawn(uplink.run(nothing, Arc::new(watch::Sender::new(Logged::default()))));
    }
    Err(goodbye)
}

/// Why nothing more is read from a client.
#[derive(Debug)]
enum Over {
    Gone,
    Wrong(Goodbye),
    /// The log takes nothing more, and has said why.
    Log,
}

/// None: nobody is there to be told.
async fn session(
    site: &Site,
    speaker: &mut Speaker,
    stream: &mut SplitStream<WebSocket>,
    wish: &Wish,
    opened: &Opened,
    trace: Option<TraceContext>,
    logged: Arc<watch::Sender<Logged>>,
) -> Option<Goodbye> {
    let (audio, pieces) = pieces::channel();
    match Uplink::new(&site.nats, wish.session.clone(), trace, site.shutdown.clone()) {
        Ok(uplink) => {
            let logged = logged.clone();
            site.tasks.spawn(uplink.run(pieces, logged));
        }
        Err(error) => return Some(Goodbye::failed(Failure::new(FailureClass::Internal, error.to_string()))),
    }
    let config = json!({
        "type": "config", "gpu_id": opened.worker.gpu_id, "connection_id": wish.session, "useAudioWorklet": !wish.recorder,
        "mode": "full", "epoch": opened.epoch, "sample_rate": wish.format.rate_hz,
    });
    let intake = Intake::new(wish.format, audio, site.asr.clone(), site.tasks.clone());
    if speaker.tell(&config).await.is_err() {
        return None;
    }
    let idle = Duration::from_secs(wish.options.idle_timeout_s.into());
    let told = {
        let (reading, telling) = (read(stream, intake, idle, &logged), speaker.run());
        tokio::pin!(reading, telling);
        let mut reads = true;
        loop {
            tokio::select! {
                over = &mut reading, if reads => match over {
                    Over::Log => reads = false,
                    Over::Gone => return None,
                    Over::Wrong(goodbye) => return Some(goodbye),
                },
                told = &mut telling => break told,
                () = site.shutdown.cancelled() => return Some(Goodbye::restart()),
            }
        }
    };
    match told {
        Told::Gone => None,
        Told::Failed(failure) => Some(Goodbye::failed(failure)),
        Told::Everything => match speaker.ready_to_stop().await {
            Ok(()) => Some(Goodbye::normal(logged.borrow().input_over.unwrap_or_default())),
            Err(()) => None,
        },
    }
}

/// Reads until the client has nothing more to say. Whichever way it ends, and where it is dropped too, the session's end is
/// logged behind what was taken.
async fn read(
    stream: &mut SplitStream<WebSocket>,
    mut intake: Intake,
    idle: Duration,
    logged: &watch::Sender<Logged>,
) -> Over {
    let now = Instant::now();
    let (mut heard, mut spoke) = (now, now);
    let reason = loop {
        let patience = (heard + QUIET).min(spoke + idle);
        let message = tokio::select! {
            message = timeout_at(patience, stream.next()) => message,
            failure = intake.failure() => return Over::Wrong(not_decoded(failure)),
        };
        let message = match message {
            Ok(Some(Ok(message))) => message,
            // A client that leaves without a word.
            Ok(None) => return Over::Gone,
            Ok(Some(Err(error))) => {
                tracing::debug!(%error, "socket not readable");
                let message = "not WebSocket frames, or one that is too long";
                return Over::Wrong(Goodbye::broken(1002, FailureClass::BadRequest, message));
            }
            Err(_) if Instant::now() >= spoke + idle => break "no audio came for as long as the session waits",
            Err(_) => return Over::Gone,
        };
        heard = Instant::now();
        match message {
            Message::Binary(bytes) if bytes.is_empty() => break "",
            Message::Binary(bytes) if bytes.len() > MOST_MESSAGE => {
                let message = format!("a message of {} bytes, the limit is {MOST_MESSAGE}", bytes.len());
                return Over::Wrong(Goodbye::broken(1009, FailureClass::TooLarge, &message));
            }
            Message::Binary(bytes) => {
                match intake.take(bytes).await {
                    Ok(()) => {}
                    Err(Trouble::Log) => return Over::Log,
                    Err(Trouble::Ended) => break "the recording had ended",
                    Err(Trouble::Input(failure)) => return Over::Wrong(not_decoded(failure)),
                    Err(Trouble::Busy) => {
                        return Over::Wrong(Goodbye::failed(Failure::new(FailureClass::Unavailable, BUSY_RECORDERS)));
                    }
                }
                // Waiting for the log is not silence.
                (heard, spoke) = (Instant::now(), Instant::now());
            }
            Message::Text(_) => {
                let message =
                    "audio comes as binary messages (s16le samples, or what a recorder makes), an empty one ends it";
                return Over::Wrong(Goodbye::broken(1003, FailureClass::UnsupportedFormat, message));
            }
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Close(_) => return Over::Gone,
        }
    };
    let mut last = intake.finish().await;
    logged.send_modify(|logged| logged.input_over = Some(reason));
    // While the rest is told: pongs are read on, audio behind an end is nobody's.
    loop {
        tokio::select! {
            failure = last.failure() => return Over::Wrong(not_decoded(failure)),
            message = stream.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Over::Gone,
                Some(Ok(_)) => {}
            },
        }
    }
}

/// Whoever decodes says why; the client also needs to know what to send instead.
fn not_decoded(failure: Failure) -> Goodbye {
    let message = format!("{} (send pcm_s16le samples, or WebM or Ogg with Opus from its beginning)", failure.message);
    Goodbye::failed(Failure { message, ..failure })
}
