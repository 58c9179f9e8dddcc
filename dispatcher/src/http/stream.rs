//! Server-sent events: the fleet as it changes, and one transcript as it grows.
//!
//! What many pages need alike is made once for all of them: a board's news, and a list of sessions that several look at. A
//! page that is too slow misses boards and gets a full one; nothing waits for it here.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, stream};
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, watch};
use voxfleet_http::{
    Refusal, Viewer,
    axum::{
        Router,
        extract::{Path, Query, State},
        response::sse::{Event, KeepAlive, Sse},
        routing::get,
    },
    guard::Open,
};
use voxfleet_nats::{
    ServerError,
    transcript::{self, Filter, ReadError, Said, Start},
};
use voxfleet_schema::id::{Kind, StreamId};

use super::{
    Site, api,
    board::Board,
    reading::{self, final_view, partial_view, revision_view},
    sessions::{self, ListQuery},
    view,
};

const PING: Duration = Duration::from_secs(10);
/// Messages that wait for a page before its source waits for it.
const WAITING: usize = 64;
/// How often a session's line is read again while somebody reads along.
const LINE_EVERY: Duration = Duration::from_secs(2);

pub(crate) fn routes() -> Router<Site> {
    Router::new()
        .route("/api/stream", get(fleet))
        .route("/api/sessions/{id}/stream", get(session))
        .route("/api/jobs/{id}/stream", get(job))
}

fn message(name: &str, data: &str) -> Event {
    // JSON has no line breaks of its own.
    Event::default().event(name).data(data)
}

fn answer(
    events: impl Stream<Item = Event> + Send + 'static,
) -> Sse<impl Stream<Item = Result<Event, Infallible>> + Send + 'static> {
    use futures_util::StreamExt as _;
    Sse::new(events.map(Ok)).keep_alive(KeepAlive::new().interval(PING).text("ping"))
}

/// One page's view of the fleet.
struct Following {
    site: Site,
    boards: watch::Receiver<Option<Arc<Board>>>,
    events: broadcast::Receiver<super::events::Row>,
    /// None: no list is wanted.
    query: Option<ListQuery>,
    seen: Option<u64>,
    list: Bytes,
    dead: Option<u64>,
    ready: std::collections::VecDeque<Event>,
    stop: tokio_util::sync::CancellationToken,
    _open: Open,
}

async fn fleet(
    _: Viewer,
    State(site): State<Site>,
    Query(list): Query<ListQuery>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let wants_list = list.limit != Some(0);
    // Refused rather than begun and empty: a page tells its reader why.
    site.boards.now().await?;
    let mut boards = site.boards.follow();
    boards.mark_changed();
    let following = Following {
        boards,
        events: site.recent.follow(),
        query: wants_list.then_some(list),
        seen: None,
        list: Bytes::new(),
        dead: None,
        ready: Default::default(),
        stop: site.shutdown.clone(),
        site,
        _open: Open::new("sse"),
    };
    Ok(answer(stream::unfold(following, |mut following| async {
        let event = following.next().await?;
        Some((event, following))
    })))
}

impl Following {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            tokio::select! {
                () = self.stop.cancelled() => return None,
                changed = self.boards.changed() => {
                    changed.ok()?;
                    let board = self.boards.borrow_and_update().clone();
                    if let Some(board) = board {
                        self.on_board(&board);
                    }
                }
                row = self.events.recv() => match row {
                    Ok(row) => return Some(message("event", &json!(row).to_string())),
                    // It was too slow for them: the list of events has what it missed.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        }
    }

    fn on_board(&mut self, board: &Board) {
        self.site.boards.still_looking();
        self.site.recent.want();
        let next_to_it = self.seen.is_some_and(|seen| seen + 1 == board.number);
        self.seen = Some(board.number);
        if next_to_it {
            self.ready.push_back(message("fleet", std::str::from_utf8(&board.news).unwrap_or("{}")));
        } else {
            let mut all = view::full(board);
            all["full"] = json!(true);
            self.ready.push_back(message("fleet", &all.to_string()));
        }
        let dead = view::dead_letters(board);
        if self.dead.replace(dead) != Some(dead) {
            self.ready.push_back(message("dead", &json!({ "total": dead }).to_string()));
        }
        if let Some(query) = &self.query {
            self.site.texts.want();
            let list = listed(&self.site, board, query);
            if list != self.list {
                self.ready.push_back(message("sessions", std::str::from_utf8(&list).unwrap_or("{}")));
                self.list = list;
            }
        }
    }
}

/// The list, made once for all who want the same.
fn listed(site: &Site, board: &Board, query: &ListQuery) -> Bytes {
    let Ok(mut lists) = board.lists.lock() else { return Bytes::new() };
    if let Some(made) = lists.get(query) {
        return made.clone();
    }
    let made = site.texts.with(|texts| json!(sessions::list(&board.sessions, texts, query)).to_string());
    let made = Bytes::from(made);
    lists.insert(query.clone(), made.clone());
    made
}

async fn session(
    _: Viewer,
    State(site): State<Site>,
    Path(text): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let id = api::id(&text)?;
    let (row, said) = api::session_row(&site, &id).await?;
    follow(site, Kind::Session, id, json!({ "session": row }), said).await
}

async fn job(
    _: Viewer,
    State(site): State<Site>,
    Path(text): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    let id = api::id(&text)?;
    let row = api::job_row(&site, &id).await?;
    let said = api::job_said(&site, &id).await?;
    follow(site, Kind::Job, id, json!({ "job": row }), said).await
}

async fn follow(
    site: Site,
    kind: Kind,
    id: StreamId,
    mut begin: Value,
    said: bool,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refusal> {
    // One for what is said, one for what may still change.
    let places = [site.readers.take()?, site.readers.take()?];
    let (standing, reader) = api::stands(&site, kind, &id, said).await?;
    begin["finals"] = json!(standing.view());
    let (events, received) = mpsc::channel(WAITING);
    site.tasks.spawn({
        let site = site.clone();
        async move {
            let (_open, _places) = (Open::new("sse"), places);
            let read = read_along(&site, kind, &id, (standing, reader), begin, events);
            site.shutdown.run_until_cancelled(read).await;
        }
    });
    let events = stream::unfold(received, |mut received| async { Some((received.recv().await?, received)) });
    Ok(answer(events))
}

/// Until the page is gone, or the transcript has ended.
async fn read_along(
    site: &Site,
    kind: Kind,
    id: &StreamId,
    (mut standing, mut reader): (reading::Standing, transcript::Reader<Said>),
    begin: Value,
    events: mpsc::Sender<Event>,
) {
    if events.send(message("begin", &begin.to_string())).await.is_err() {
        return;
    }
    let mut partials = transcript::partials(&site.nats, &Filter::One(kind, id.clone()), Start::LastPerSubject).brief();
    // It has been sent; what follows needs to know only whether it ends.
    standing.finals.drain(..standing.finals.len().saturating_sub(1));
    let mut lines = tokio::time::interval(LINE_EVERY);
    let mut line = String::new();
    loop {
        if standing.has_ended() {
            // Nobody is there any more when this fails.
            let _ = events.send(message("end", "{}")).await;
            return;
        }
        let event = tokio::select! {
            () = events.closed() => return,
            read = reader.next() => match read {
                Ok(read) => match read.value {
                    Said::Final(value) if standing.follower.on_final(&value) => {
                        let event = message("final", &final_view(&value).to_string());
                        standing.finals = vec![*value];
                        event
                    }
                    Said::Revision(value) if standing.follower.on_revision(&value) => {
                        message("revision", &revision_view(&value).to_string())
                    }
                    _ => continue,
                },
                Err(error) if is_over(&error) => return,
                Err(error) => {
                    tracing::debug!(%error, "transcript not readable now");
                    continue;
                }
            },
            read = partials.next() => match read {
                Ok(read) if standing.follower.on_partial(&read.value) => {
                    message("partial", &partial_view(&read.value).to_string())
                }
                Ok(_) => continue,
                Err(error) if is_over(&error) => return,
                Err(_) => continue,
            },
            _ = lines.tick() => {
                let row = match kind {
                    Kind::Session => api::session_row(site, id).await.map(|(row, _)| row),
                    Kind::Job => api::job_row(site, id).await,
                    _ => return,
                };
                // Nobody answers now: the line stays as it was.
                let Ok(row) = row else { continue };
                let text = row.to_string();
                if text == line {
                    continue;
                }
                line = text;
                message("state", &line)
            }
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

fn is_over(error: &ReadError) -> bool {
    matches!(error, ReadError::Server(ServerError::Closed))
}
