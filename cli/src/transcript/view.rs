//! What a reader of transcripts may show: drops what is stale or was seen before, notices moves and ends. Pure.
//!
//! Finals can be read twice (after a reconnect), partials can come late from an owner that has lost the session; a
//! reader that shows either would contradict the chain.

use std::collections::{BTreeMap, VecDeque};

use voxfleet_schema::{
    event::{Event, Scope, What},
    id::{Kind, StreamId},
    transcript::{Final, Partial, Revision},
};

#[derive(Debug, Default)]
struct Session {
    epoch: u64,
    /// Index of the last final shown.
    index: Option<u64>,
    gpu: Option<String>,
    /// Epoch of the last move told.
    moved: u64,
    /// Range of the newest partial since that final.
    partial_to: u64,
    /// Number of the last revision shown: they count along the chain.
    revision: u64,
}

/// State of everything shown so far.
#[derive(Debug, Default)]
pub(crate) struct View {
    sessions: BTreeMap<(Kind, StreamId), Session>,
    /// As they came: who watches a whole fleet for months forgets those of long ago.
    order: VecDeque<(Kind, StreamId)>,
}

/// Sessions and jobs remembered at once: some MB.
const REMEMBERED: usize = 20_000;

/// What to show for one message.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum News<'a> {
    Final {
        new: &'a Final,
        moved_from: Option<String>,
    },
    Partial {
        new: &'a Partial,
        moved_from: Option<String>,
    },
    /// What stands in the place of an earlier final's segments.
    Revision(&'a Revision),
    /// Told by the dispatcher before anything of the new owner came: what the old one was at is void.
    Moved(Move),
    Event(&'a Event),
}

/// A session that has another owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) id: StreamId,
    pub(crate) from: Option<String>,
    pub(crate) to: String,
    pub(crate) epoch: u64,
}

impl View {
    fn session(&mut self, kind: Kind, id: &StreamId) -> &mut Session {
        let key = (kind, id.clone());
        if !self.sessions.contains_key(&key) {
            if self.order.len() >= REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.sessions.remove(&oldest);
            }
            self.order.push_back(key.clone());
        }
        self.sessions.entry(key).or_default()
    }

    pub(crate) fn on_final<'a>(&mut self, new: &'a Final) -> Option<News<'a>> {
        let session = self.session(new.kind, &new.id);
        if session.index.is_some_and(|last| new.index <= last) {
            return None;
        }
        let moved_from = session.owner(new.epoch, new.gpu_id.as_str());
        session.index = Some(new.index);
        session.partial_to = new.to_sample;
        Some(News::Final { new, moved_from })
    }

    pub(crate) fn on_partial<'a>(&mut self, new: &'a Partial) -> Option<News<'a>> {
        let session = self.session(new.kind, &new.id);
        // None sorts below every index: a partial before the first final.
        if new.epoch < session.epoch || new.after_index < session.index {
            return None;
        }
        // Of one epoch and index the one that heard most is the newest, whatever the order of arrival.
        if new.epoch == session.epoch && new.to_sample < session.partial_to {
            return None;
        }
        let moved_from = session.owner(new.epoch, new.gpu_id.as_str());
        session.partial_to = new.to_sample;
        Some(News::Partial { new, moved_from })
    }

    pub(crate) fn on_revision<'a>(&mut self, new: &'a Revision) -> Option<News<'a>> {
        let session = self.session(new.kind, &new.id);
        if new.revision <= session.revision {
            return None;
        }
        session.revision = new.revision;
        Some(News::Revision(new))
    }

    pub(crate) fn on_event<'a>(&mut self, new: &'a Event) -> Option<News<'a>> {
        match self.on_move(new) {
            Some(told) => told.map(News::Moved),
            None => Some(News::Event(new)).filter(|_| is_news(new.what)),
        }
    }

    /// None: it is no move. Some(None): one that was told already.
    fn on_move(&mut self, new: &Event) -> Option<Option<Move>> {
        let kind = match new.scope {
            Scope::Session => Kind::Session,
            Scope::Job => Kind::Job,
            Scope::Fleet | Scope::Unknown => return None,
        };
        let (What::Moved, Some(epoch), Some(to), Ok(id)) =
            (new.what, new.epoch, new.gpu_id.clone(), StreamId::new(new.id.as_str()))
        else {
            return None;
        };
        let session = self.session(kind, &id);
        if epoch <= session.moved {
            return Some(None);
        }
        session.moved = epoch;
        if epoch > session.epoch {
            (session.epoch, session.gpu, session.partial_to) = (epoch, Some(to.clone()), 0);
        }
        let from = new.detail["from"]["gpu_id"].as_str().map(str::to_owned);
        Some(Some(Move { id, from, to, epoch }))
    }
}

impl Session {
    /// Takes note of who speaks; returns the former owner when it changed.
    fn owner(&mut self, epoch: u64, gpu: &str) -> Option<String> {
        // A former owner's last final may come after the news of the move.
        if epoch < self.epoch {
            return None;
        }
        self.epoch = epoch;
        if self.gpu.as_deref() == Some(gpu) {
            return None;
        }
        let from = self.gpu.replace(gpu.to_owned());
        if from.is_some() {
            self.moved = epoch;
        }
        from
    }
}

/// Events that a person following a transcript wants to see; the others are bookkeeping.
fn is_news(what: What) -> bool {
    use What::*;
    match what {
        Waiting | Rejected | Moved | Lagging | Gap | Reordered | Duplicate | StaleSource | AudioAfterEnd | Degraded
        | Restored | ChainLost | Parked | Ended | Failed | Cancelled => true,
        Opened | Assigned | Released | Done | Submitted | Expired | Joined | Draining | Dead | Renewed | Suspect
        | Unhealthy | Recovered | StreamFilling | Unknown => false,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn a_final(index: u64, epoch: u64, gpu: &str, text: &str) -> Final {
        serde_json::from_value(json!({
            "kind": "session", "id": "s", "index": index, "final_id": format!("f{index}"), "epoch": epoch,
            "gpu_id": gpu, "model": "micro.en", "device": "cpu", "engine": "whisper_cpp", "vad": "silero",
            "from_sample": index * 16_000, "to_sample": (index + 1) * 16_000,
            "audio": {"from_seq": 1, "to_seq": 2},
            "resume": {"seq": 1, "at_sample": 0, "at_frame": 0, "format": "pcm_s16le", "format_sample": 0},
            "segments": [{"id": 0, "start_ms": index * 1000, "end_ms": index * 1000 + 900, "text": text, "confidence": 0.9,
                "words": [{"text": text, "start_ms": index * 1000, "end_ms": index * 1000 + 900, "confidence": 0.9}]}],
            "speech_final": true, "timings": {},
        }))
        .expect("a final")
    }

    pub(crate) fn a_partial(after: Option<u64>, epoch: u64, gpu: &str, to_sample: u64) -> Partial {
        serde_json::from_value(json!({
            "kind": "session", "id": "s", "epoch": epoch, "gpu_id": gpu, "after_index": after,
            "from_sample": 0, "to_sample": to_sample, "committed": "good", "tentative": "morning", "lag_ms": 420,
        }))
        .expect("a partial")
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let mut view = View::default();
        for n in 0..REMEMBERED + 5 {
            view.session(Kind::Session, &StreamId::new(format!("s{n}")).expect("an id"));
        }
        assert_eq!((view.sessions.len(), view.order.len()), (REMEMBERED, REMEMBERED));
        assert!(!view.sessions.contains_key(&(Kind::Session, StreamId::new("s4").expect("an id"))));
    }

    #[test]
    fn finals_are_shown_once_and_in_order() {
        let mut view = View::default();
        let (zero, one) = (a_final(0, 1, "a", "x"), a_final(1, 1, "a", "y"));
        assert!(view.on_final(&zero).is_some());
        assert!(view.on_final(&one).is_some());
        assert!(view.on_final(&zero).is_none() && view.on_final(&one).is_none());
    }

    #[test]
    fn stale_partials_are_dropped() {
        let mut view = View::default();
        assert!(view.on_partial(&a_partial(None, 2, "a", 1_000)).is_some());
        assert!(view.on_partial(&a_partial(None, 1, "b", 9_000)).is_none(), "lower epoch");
        assert!(view.on_partial(&a_partial(None, 2, "a", 500)).is_none(), "heard less");
        assert!(view.on_final(&a_final(0, 2, "a", "x")).is_some());
        assert!(view.on_partial(&a_partial(None, 2, "a", 17_000)).is_none(), "lower index");
        assert!(view.on_partial(&a_partial(Some(0), 2, "a", 17_000)).is_some());
        assert!(view.on_partial(&a_partial(Some(0), 3, "b", 16_500)).is_some(), "a new owner starts over");
    }

    #[test]
    fn a_move_is_told_once() {
        let mut view = View::default();
        view.on_final(&a_final(0, 1, "a", "x"));
        let (partial, next) = (a_partial(Some(0), 2, "b", 20_000), a_final(1, 2, "b", "y"));
        assert!(matches!(view.on_partial(&partial), Some(News::Partial { moved_from: Some(from), .. }) if from == "a"));
        assert!(matches!(view.on_final(&next), Some(News::Final { moved_from: None, .. })));
    }

    fn a_move(epoch: u64, from: &str, to: &str) -> Event {
        let mut event = Event::new(Scope::Session, "s", What::Moved, 0);
        (event.epoch, event.gpu_id) = (Some(epoch), Some(to.to_owned()));
        event.detail = json!({"from": {"gpu_id": from, "incarnation": "i"}, "to": {"gpu_id": to, "incarnation": "j"}});
        event
    }

    #[test]
    fn the_news_of_a_move_makes_what_the_old_owner_was_at_void() {
        let mut view = View::default();
        view.on_final(&a_final(0, 1, "a", "x"));
        assert!(view.on_partial(&a_partial(Some(0), 1, "a", 30_000)).is_some());
        let told = a_move(2, "a", "b");
        let want = Move { id: StreamId::new("s").expect("id"), from: Some("a".into()), to: "b".into(), epoch: 2 };
        assert_eq!(view.on_event(&told), Some(News::Moved(want)));
        assert_eq!(view.on_event(&told), None, "read twice");
        assert!(view.on_partial(&a_partial(Some(0), 1, "a", 32_000)).is_none(), "of the old epoch");
        // Its last final was on its way; the new owner starts over, and nobody hears of the move again.
        let last = a_final(1, 1, "a", "y");
        assert!(matches!(view.on_final(&last), Some(News::Final { moved_from: None, .. })));
        let partial = a_partial(Some(1), 2, "b", 33_000);
        assert!(matches!(view.on_partial(&partial), Some(News::Partial { moved_from: None, .. })));
    }

    #[test]
    fn a_move_that_the_new_owner_has_shown_is_not_told_again() {
        let mut view = View::default();
        view.on_final(&a_final(0, 1, "a", "x"));
        let partial = a_partial(Some(0), 2, "b", 20_000);
        assert!(matches!(view.on_partial(&partial), Some(News::Partial { moved_from: Some(from), .. }) if from == "a"));
        assert_eq!(view.on_event(&a_move(2, "a", "b")), None);
        assert!(view.on_event(&a_move(3, "b", "a")).is_some(), "the next one");
        // Whoever began to read after it had spoken has seen no move yet.
        let mut late = View::default();
        assert!(matches!(late.on_partial(&partial), Some(News::Partial { moved_from: None, .. })));
        assert!(matches!(late.on_event(&a_move(2, "a", "b")), Some(News::Moved(_))));
    }

    pub(crate) fn a_revision(index: u64, revision: u64, text: &str, speaker: &str) -> Revision {
        let mut segments = a_final(index, 1, "g", text).segments;
        segments[0].speaker = Some(speaker.to_owned());
        let id = StreamId::new("s").expect("id");
        Revision { kind: Kind::Session, id, index, revision, epoch: 1, segments, turns: Vec::new(), speakers: None }
    }

    #[test]
    fn revisions_are_shown_once_and_in_order() {
        let mut view = View::default();
        let (first, second) = (a_revision(0, 1, "x", "S1"), a_revision(3, 2, "y", "S2"));
        // Of a final from before as well: whoever began to read behind it has not seen its words.
        assert_eq!(view.on_revision(&second), Some(News::Revision(&second)));
        assert!(view.on_revision(&second).is_none() && view.on_revision(&first).is_none());
        let again = a_revision(3, 3, "y", "S1");
        assert!(view.on_revision(&again).is_some(), "the highest counts");
    }

    #[test]
    fn a_session_and_a_job_of_one_name_are_two() {
        let mut view = View::default();
        let (session, mut job) = (a_final(0, 1, "a", "x"), a_final(0, 1, "b", "y"));
        job.kind = Kind::Job;
        assert!(view.on_final(&session).is_some());
        assert!(matches!(view.on_final(&job), Some(News::Final { moved_from: None, .. })));
    }

    #[test]
    fn bookkeeping_events_are_not_news() {
        let mut view = View::default();
        let event = |what| Event::new(Scope::Session, "s", what, 0);
        assert!(view.on_event(&event(What::Moved)).is_some(), "from a newer version, perhaps");
        assert!(view.on_event(&event(What::Assigned)).is_none());
    }
}
