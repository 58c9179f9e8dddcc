//! The list of live sessions as a page wants it: one of their orders, a search, a part. Pure.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use voxfleet_schema::session::{SessionState, SessionSummary};

use super::texts::Texts;

const USUAL: usize = 100;
const MOST: usize = 500;
const LAG_STEP_MS: u64 = 250;
/// Longer searches find nothing that shorter ones do not.
const MOST_SEARCHED: usize = 128;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Sort {
    #[default]
    Lag,
    Id,
    Gpu,
    Age,
    Words,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    Asc,
    Desc,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Which {
    #[default]
    All,
    Waiting,
    Assigned,
}

/// What somebody wants to see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
pub(crate) struct ListQuery {
    #[serde(default)]
    pub(crate) state: Which,
    #[serde(default)]
    pub(crate) q: String,
    /// Of `/api/stream` it is called `sessions`.
    #[serde(default, alias = "sessions")]
    pub(crate) sort: Sort,
    /// The one that shows what matters first, where it is not said.
    pub(crate) order: Option<Order>,
    pub(crate) limit: Option<usize>,
    #[serde(default)]
    pub(crate) offset: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct Row<'a> {
    id: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu_id: Option<&'a str>,
    epoch: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    language: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_ms: Option<u64>,
    started_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    final_index: Option<u64>,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_why: Option<String>,
}

impl<'a> Row<'a> {
    pub(crate) fn of(session: &'a SessionSummary, texts: &Texts) -> Self {
        Row {
            id: session.session.as_str(),
            state: state(session.state),
            gpu_id: session.worker.as_ref().map(|worker| worker.gpu_id.as_str()),
            epoch: session.epoch,
            model: session.model.as_deref(),
            language: session.language.as_deref(),
            lag_ms: session.lag_ms,
            started_ms: session.opened_ms,
            final_index: session.last_final,
            text: texts.end_of(&session.session),
            waiting_why: session.why.as_ref().map(|why| why.to_string()),
        }
    }
}

pub(crate) fn state(state: SessionState) -> &'static str {
    match state {
        SessionState::Waiting => "waiting",
        SessionState::Assigned => "assigned",
        SessionState::Ended => "ended",
        _ => "unknown",
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct List<'a> {
    total: usize,
    matched: usize,
    rows: Vec<Row<'a>>,
}

/// The part of `all` that is asked for. Those that are equal come in order of their ids, so that pages do not overlap.
pub(crate) fn list<'a>(all: &'a [SessionSummary], texts: &Texts, query: &ListQuery) -> List<'a> {
    let needle: String = query.q.trim().chars().take(MOST_SEARCHED).collect::<String>().to_lowercase();
    let wanted = |session: &&SessionSummary| {
        let state = match query.state {
            Which::All => true,
            Which::Waiting => session.state == SessionState::Waiting,
            Which::Assigned => session.state == SessionState::Assigned,
        };
        state && (needle.is_empty() || matches(session, texts, &needle))
    };
    let mut found: Vec<&SessionSummary> = all.iter().filter(wanted).collect();
    let order = query.order.unwrap_or(match query.sort {
        Sort::Lag | Sort::Words => Order::Desc,
        Sort::Id | Sort::Gpu | Sort::Age => Order::Asc,
    });
    found.sort_by(|a, b| {
        let by = compare(a, b, query.sort, texts);
        let by = if order == Order::Desc { by.reverse() } else { by };
        by.then_with(|| a.session.cmp(&b.session))
    });
    let matched = found.len();
    let limit = query.limit.unwrap_or(USUAL).clamp(1, MOST);
    let rows = found.into_iter().skip(query.offset).take(limit).map(|session| Row::of(session, texts)).collect();
    List { total: all.len(), matched, rows }
}

fn matches(session: &SessionSummary, texts: &Texts, needle: &str) -> bool {
    let has = |text: &str| text.to_lowercase().contains(needle);
    has(session.session.as_str())
        || session.worker.as_ref().is_some_and(|worker| has(worker.gpu_id.as_str()))
        || session.model.as_deref().is_some_and(has)
        || has(&texts.end_of(&session.session))
}

fn compare(a: &SessionSummary, b: &SessionSummary, sort: Sort, texts: &Texts) -> Ordering {
    let gpu = |s: &SessionSummary| s.worker.as_ref().map(|worker| worker.gpu_id.to_string());
    match sort {
        // Whoever waits has no worker that tells: that is behind all others. In steps, so that lines do not change places with
        // every heartbeat.
        Sort::Lag => {
            let lag = |s: &SessionSummary| (s.state == SessionState::Waiting, s.lag_ms.map(|ms| ms / LAG_STEP_MS));
            lag(a).cmp(&lag(b))
        }
        Sort::Id => a.session.cmp(&b.session),
        Sort::Gpu => gpu(a).cmp(&gpu(b)),
        Sort::Age => a.opened_ms.cmp(&b.opened_ms),
        Sort::Words => texts.words_of(&a.session).cmp(&texts.words_of(&b.session)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::id::{GpuId, Incarnation, StreamId, WorkerName};

    fn session(id: &str, gpu: Option<&str>, lag_ms: Option<u64>, opened_ms: u64) -> SessionSummary {
        let worker = gpu.map(|gpu| WorkerName {
            gpu_id: GpuId::new(gpu).expect("an id"),
            incarnation: Incarnation::new("i").expect("an id"),
        });
        SessionSummary {
            session: StreamId::new(id).expect("an id"),
            state: if worker.is_some() { SessionState::Assigned } else { SessionState::Waiting },
            epoch: 1,
            worker,
            model: None,
            language: None,
            opened_ms,
            last_final: None,
            lag_ms,
            why: None,
        }
    }

    fn ids(all: &[SessionSummary], query: &str) -> (usize, Vec<String>) {
        let query: ListQuery = serde_json::from_str(query).expect("a query");
        let texts = Texts::default();
        let found = list(all, &texts, &query);
        (found.matched, found.rows.iter().map(|row| row.id.to_owned()).collect())
    }

    #[test]
    fn orders_searches_and_parts() {
        let all = [
            session("b", Some("gpu-1"), Some(900), 3),
            session("a", Some("gpu-2"), Some(100), 2),
            session("w", None, None, 1),
            session("c", Some("gpu-1"), Some(100), 4),
        ];
        for (query, matched, expected) in [
            (r#"{}"#, 4, vec!["w", "b", "a", "c"]),
            (r#"{"sort":"lag","order":"asc"}"#, 4, vec!["a", "c", "b", "w"]),
            (r#"{"sessions":"id","limit":2,"offset":1}"#, 4, vec!["b", "c"]),
            (r#"{"sort":"gpu","state":"assigned"}"#, 3, vec!["b", "c", "a"]),
            (r#"{"sort":"age"}"#, 4, vec!["w", "a", "b", "c"]),
            (r#"{"q":"GPU-1","sort":"id"}"#, 2, vec!["b", "c"]),
            (r#"{"state":"waiting"}"#, 1, vec!["w"]),
            (r#"{"offset":9}"#, 4, vec![]),
        ] {
            let (count, found) = ids(&all, query);
            assert_eq!((count, found), (matched, expected.into_iter().map(str::to_owned).collect()), "{query}");
        }
    }
}
