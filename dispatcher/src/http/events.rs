//! The newest events, for pages: read while somebody looks, and only then.

use std::{
    collections::VecDeque,
    sync::{Arc, RwLock},
    time::Duration,
};

use serde::Serialize;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    retry::Backoff,
    transcript::{self, Filter},
};
use voxfleet_schema::event::{Event, Scope};

use super::interest::{self, Interest};

/// Events kept of each kind, and read of the past in all.
const KEPT: usize = 500;
/// How long somebody waits for the past.
const CATCH_UP: Duration = Duration::from_secs(2);
/// Details longer than this are for the stream's own readers.
const SHOWN: usize = 300;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) at_ms: u64,
    pub(crate) kind: &'static str,
    pub(crate) id: String,
    pub(crate) what: &'static str,
    pub(crate) text: String,
}

impl Row {
    pub(crate) fn of(event: &Event) -> Row {
        let kind = match event.scope {
            Scope::Session => "session",
            Scope::Job => "job",
            Scope::Fleet | Scope::Unknown => "fleet",
        };
        Row { at_ms: event.at_ms, kind, id: event.id.clone(), what: event.what.as_str(), text: words(event) }
    }
}

/// What an event says beside its name.
fn words(event: &Event) -> String {
    let mut parts: Vec<String> = Vec::new();
    if let Some(gpu) = &event.gpu_id {
        parts.push(format!("on {gpu}"));
    }
    parts.extend(event.epoch.map(|epoch| format!("epoch {epoch}")));
    parts.extend(event.error.as_ref().map(ToString::to_string));
    if let Some(detail) = event.detail.as_object() {
        // Every GPU's score is for those who ask why.
        let shown = detail.iter().filter(|(name, _)| !matches!(name.as_str(), "candidates" | "incarnation"));
        parts.extend(shown.map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name} {text}"),
            None => format!("{name} {value}"),
        }));
    }
    let text = parts.join(", ");
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// The newest events. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Recent {
    rows: Arc<RwLock<VecDeque<Row>>>,
    news: broadcast::Sender<Row>,
    interest: Interest,
    /// What there was has been read.
    caught_up: Arc<watch::Sender<bool>>,
}

impl Recent {
    pub(crate) fn new(nats: Nats, stop: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let (news, _) = broadcast::channel(KEPT);
        let recent = Self { rows: Arc::default(), news, interest: Interest::default(), caught_up: Arc::default() };
        let mine = recent.clone();
        (recent, async move {
            stop.run_until_cancelled(mine.read(nats)).await;
        })
    }

    pub(crate) fn want(&self) {
        self.interest.want();
    }

    /// Newest first, of one kind or of all. Whoever asks first waits until the past has been read.
    pub(crate) async fn rows(&self, kind: Option<&str>, limit: usize) -> Vec<Row> {
        self.want();
        // In vain where the stream cannot be read: then what is there is shown.
        let _ = tokio::time::timeout(CATCH_UP, self.caught_up.subscribe().wait_for(|read| *read)).await;
        self.rows
            .read()
            .map(|rows| {
                rows.iter().rev().filter(|row| kind.is_none_or(|kind| row.kind == kind)).take(limit).cloned().collect()
            })
            .unwrap_or_default()
    }

    /// Those that come from now on; one that is too slow for them misses some.
    pub(crate) fn follow(&self) -> broadcast::Receiver<Row> {
        self.want();
        self.news.subscribe()
    }

    async fn read(self, nats: Nats) {
        loop {
            self.interest.begins().await;
            let read = tokio::select! {
                read = self.read_on(&nats) => read,
                () = self.interest.ends() => Ok(()),
            };
            if read.is_err() {
                return;
            }
            self.caught_up.send_replace(false);
            if let Ok(mut rows) = self.rows.write() {
                rows.clear();
            }
        }
    }

    /// An error: the connection is closed.
    async fn read_on(&self, nats: &Nats) -> Result<(), ServerError> {
        let mut backoff = Backoff::default();
        let (start, any) = loop {
            match transcript::recent_events(nats, KEPT as u64).await {
                Ok(start) => break start,
                Err(ServerError::Closed) => return Err(ServerError::Closed),
                Err(error) => {
                    tracing::debug!(%error, "events not readable now");
                    backoff.wait().await;
                }
            }
        };
        self.caught_up.send_replace(!any);
        let mut events = transcript::events(nats, &Filter::All, start);
        loop {
            if let Some(read) = interest::after("events", events.next().await, &mut backoff).await? {
                self.push(Row::of(&read.value));
                if read.pending == 0 {
                    self.caught_up.send_replace(true);
                }
            }
        }
    }

    fn push(&self, row: Row) {
        if let Ok(mut rows) = self.rows.write() {
            rows.push_back(row.clone());
            // Each kind has its share: a busy hour of sessions does not push out that a GPU died.
            if rows.iter().filter(|other| other.kind == row.kind).count() > KEPT
                && let Some(oldest) = rows.iter().position(|other| other.kind == row.kind)
            {
                rows.remove(oldest);
            }
        }
        // Mostly nobody follows.
        let _ = self.news.send(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use voxfleet_schema::event::What;

    #[test]
    fn an_event_is_told_in_words() {
        let mut event = Event::new(Scope::Session, "call-1", What::Moved, 7);
        event.gpu_id = Some("gpu-b".to_owned());
        event.epoch = Some(3);
        event.detail = json!({ "why": "dead", "candidates": [1, 2, 3], "lag_ms": 4 });
        let row = Row::of(&event);
        assert_eq!(
            (row.kind, row.what, row.text.as_str()),
            ("session", "moved", "on gpu-b, epoch 3, lag_ms 4, why dead")
        );
        event.detail = json!({ "long": "ä".repeat(1_000) });
        assert_eq!(Row::of(&event).text.chars().count(), SHOWN + 1);
    }
}
