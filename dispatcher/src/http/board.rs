//! What pages, scrapes and health checks read: the fleet as the active dispatcher believes it to be, once a second while
//! somebody looks. The active one takes it from its own loop, a standby asks the active one over the service API.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use voxfleet_http::Refusal;
use voxfleet_nats::{
    Nats,
    api::{self, Endpoint},
    topology::{self, Usage},
};
use voxfleet_schema::{
    fleet::FleetStatus,
    id::WorkerName,
    session::{SessionList, SessionListRequest, SessionSummary},
};

use super::{
    sessions::ListQuery,
    view::{self, Tile},
    window::{Snapshot, Window},
};
use crate::active::fleet_record;

/// How long somebody who looked is expected to look again: a scrape's usual pause, doubled.
const INTEREST: Duration = Duration::from_secs(40);
/// Pace while somebody looks: that of heartbeats.
const EVERY: Duration = Duration::from_secs(1);
/// A board older than this is not shown as the present.
const FRESH: Duration = Duration::from_millis(3_500);
/// For somebody who comes when nobody has looked before: the loop's next tick, and a round trip.
const FIRST_LOOK: Duration = Duration::from_secs(3);
const ASK: Duration = Duration::from_secs(2);
/// Streams are asked for their size this often.
const USAGE_EVERY: Duration = Duration::from_secs(5);
/// Heartbeats of the dead read for one look.
const GRAVES_AT_ONCE: usize = 50;
/// Sessions asked for at once.
const LIST: u32 = 5_000;
/// Sessions that a standby asks for at most.
const MOST_LISTED: usize = 100_000;

/// One look at everything.
#[derive(Debug)]
pub(crate) struct Board {
    /// Counts looks of this process.
    pub(crate) number: u64,
    pub(crate) taken: Instant,
    pub(crate) at_ms: u64,
    /// This process holds the lease.
    pub(crate) active: bool,
    pub(crate) fleet: FleetStatus,
    pub(crate) tiles: Vec<Arc<Tile>>,
    pub(crate) sessions: Vec<SessionSummary>,
    pub(crate) streams: Vec<Usage>,
    pub(crate) rtt: Option<Duration>,
    /// For whoever has the board before this one: what changed.
    pub(crate) news: Bytes,
    /// Lists that somebody asked for, so that fifty pages on the same list cost one.
    pub(crate) lists: Mutex<HashMap<ListQuery, Bytes>>,
}

/// Boards as they are made. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Boards {
    current: watch::Receiver<Option<Arc<Board>>>,
    window: Window,
}

impl Boards {
    /// The boards, and the work of making them.
    pub(crate) fn new(nats: Nats, window: Window, stop: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let (sender, current) = watch::channel(None);
        let maker = Maker {
            nats,
            window: window.clone(),
            streams: Vec::new(),
            usage_at: None,
            number: 0,
            graves: HashMap::new(),
        };
        (Self { current, window }, maker.run(sender, stop))
    }

    /// The present one.
    pub(crate) async fn now(&self) -> Result<Arc<Board>, Refusal> {
        self.window.want(INTEREST);
        let mut current = self.current.clone();
        let fresh = |board: &Option<Arc<Board>>| board.as_ref().is_some_and(|b| b.taken.elapsed() < FRESH);
        match tokio::time::timeout(FIRST_LOOK, current.wait_for(fresh)).await {
            Ok(Ok(board)) => board.clone().ok_or_else(nobody),
            _ => Err(nobody()),
        }
    }

    /// For somebody who stays: each board as it comes. Whoever holds this says now and then that he still looks.
    pub(crate) fn follow(&self) -> watch::Receiver<Option<Arc<Board>>> {
        self.window.want(INTEREST);
        self.current.clone()
    }

    pub(crate) fn still_looking(&self) {
        self.window.want(INTEREST);
    }
}

fn nobody() -> Refusal {
    Refusal::unavailable("the fleet cannot be seen now: no dispatcher is active, or NATS does not answer")
}

struct Maker {
    nats: Nats,
    window: Window,
    streams: Vec<Usage>,
    usage_at: Option<Instant>,
    number: u64,
    /// The last tile of the dead whom this process never showed alive; none where nothing is kept of one.
    graves: HashMap<String, Option<Arc<Tile>>>,
}

impl Maker {
    async fn run(mut self, sender: watch::Sender<Option<Arc<Board>>>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY / 4);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shown = self.window.look();
        let mut asked: Option<Instant> = None;
        loop {
            let local = tokio::select! {
                () = stop.cancelled() => return,
                changed = shown.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    shown.borrow_and_update().clone()
                }
                _ = ticks.tick() => None,
            };
            let before = sender.borrow().clone();
            let made = match local {
                Some(local) => stop.run_until_cancelled(self.of_own(&local, before.as_deref())).await,
                None => {
                    let due = asked.is_none_or(|at| at.elapsed() >= EVERY);
                    if self.window.is_open() || !due || !self.window.is_wanted() || !self.nats.is_connected() {
                        continue;
                    }
                    asked = Some(Instant::now());
                    stop.run_until_cancelled(self.of_the_active(before.as_deref())).await
                }
            };
            match made {
                None => return,
                Some(Some(board)) => {
                    sender.send_replace(Some(Arc::new(board)));
                }
                Some(None) => {}
            }
        }
    }

    async fn of_own(&mut self, local: &Snapshot, before: Option<&Board>) -> Option<Board> {
        Some(self.board(local.fleet.clone(), local.sessions.clone(), true, before).await)
    }

    /// None: nobody answers.
    async fn of_the_active(&mut self, before: Option<&Board>) -> Option<Board> {
        let fleet = api::request::<_, FleetStatus>(&self.nats, Endpoint::FleetStatus, &json!({}), ASK).await;
        let fleet = match fleet {
            Ok(fleet) => fleet,
            Err(error) => {
                tracing::debug!(%error, "the active dispatcher does not say how the fleet is");
                return None;
            }
        };
        // Without the list there is no board: one with no sessions would be taken for the truth.
        let sessions = self.listed().await?;
        Some(self.board(fleet, sessions, false, before).await)
    }

    async fn listed(&self) -> Option<Vec<SessionSummary>> {
        let mut all: Vec<SessionSummary> = Vec::new();
        loop {
            let after = all.last().map(|last| last.session.clone());
            let request = SessionListRequest { after, limit: Some(LIST), ..SessionListRequest::default() };
            let list: SessionList = match api::request(&self.nats, Endpoint::SessionList, &request, ASK).await {
                Ok(list) => list,
                Err(error) => {
                    tracing::debug!(%error, "the active dispatcher does not list its sessions");
                    return None;
                }
            };
            let full = list.sessions.len() == LIST as usize;
            all.extend(list.sessions);
            if !full || all.len() >= MOST_LISTED {
                return Some(all);
            }
        }
    }

    /// Tiles of the dead whom nobody has shown before, by their last heartbeat in `asr_fleet`: a dispatcher that starts anew
    /// shows who was lost before it.
    async fn buried(&mut self, fleet: &FleetStatus, known: &[Arc<Tile>]) -> Vec<Arc<Tile>> {
        let names: HashSet<String> = fleet.dead.iter().map(WorkerName::to_string).collect();
        self.graves.retain(|name, _| names.contains(name));
        let unknown = view::unknown_dead(fleet, known);
        for name in unknown
            .iter()
            .filter(|name| !self.graves.contains_key(&name.to_string()))
            .take(GRAVES_AT_ONCE)
            .collect::<Vec<_>>()
        {
            match fleet_record::last_heard(&self.nats, name).await {
                Ok(heard) => {
                    let tile = heard
                        .map(|(heartbeat, at_ms)| Arc::new(Tile::last_of(heartbeat, now_ms().saturating_sub(at_ms))));
                    self.graves.insert(name.to_string(), tile);
                }
                Err(error) => {
                    tracing::debug!(%error, worker = %name, "its last heartbeat cannot be read");
                    break;
                }
            }
        }
        unknown.iter().filter_map(|name| self.graves.get(&name.to_string()).cloned().flatten()).collect()
    }

    async fn board(
        &mut self,
        fleet: FleetStatus,
        sessions: Vec<SessionSummary>,
        active: bool,
        before: Option<&Board>,
    ) -> Board {
        if self.usage_at.is_none_or(|at| at.elapsed() >= USAGE_EVERY) {
            self.usage_at = Some(Instant::now());
            match topology::usage(&self.nats).await {
                Ok(streams) => self.streams = streams,
                Err(error) => tracing::debug!(%error, "streams do not say how full they are"),
            }
        }
        let rtt = self.nats.rtt(ASK).await.ok();
        let known: &[Arc<Tile>] = before.map_or(&[], |board| &board.tiles);
        let buried = self.buried(&fleet, known).await;
        let tiles = view::tiles(&fleet, &[known, &buried].concat());
        self.number += 1;
        let mut board = Board {
            number: self.number,
            taken: Instant::now(),
            at_ms: now_ms(),
            active,
            fleet,
            tiles,
            sessions,
            streams: self.streams.clone(),
            rtt,
            news: Bytes::new(),
            lists: Mutex::default(),
        };
        board.news = view::news(&board, known);
        board
    }
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
