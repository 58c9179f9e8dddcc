//! Where anything of a session or job can stand, besides its key and its objects.

use voxfleet_schema::{
    event::Scope,
    id::{Kind, StreamId},
};

use crate::{
    subjects::{Filter, Subject, Subjects},
    topology::names::{AUDIO, CHECKPOINT, DEAD, EVENT, JOBS, LIVE, PARTIAL, TRANSCRIPT, WORK},
};

/// Subjects of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) stream: &'static str,
    pub(super) filter: String,
    /// A work queue: no second consumer may read it.
    pub(super) is_queue: bool,
}

/// In the order in which they are to be emptied: audio first, because audio without its end final opens a session again.
/// Hints are listed of one id only: they are copies that live for a minute.
pub(super) fn places(subjects: &Subjects, filter: &Filter) -> Vec<Place> {
    let mut places = Vec::new();
    let mut put = |stream, filter, is_queue| places.push(Place { stream, filter, is_queue });
    match filter {
        Filter::One(Kind::Session, id) => {
            put(AUDIO, subjects.audio(id), false);
            put(LIVE, subjects.live_about(id), true);
        }
        Filter::One(Kind::Job, id) => {
            put(JOBS, subjects.jobs_about(id), true);
            put(WORK, subjects.work_about(id), true);
        }
        Filter::Kind(Kind::Session) => put(AUDIO, subjects.audio_all(), false),
        Filter::Kind(Kind::Job) => {
            put(JOBS, subjects.jobs_all(), true);
            put(WORK, subjects.work_all(), true);
        }
        Filter::All => {
            put(AUDIO, subjects.audio_all(), false);
            put(JOBS, subjects.jobs_all(), true);
            put(WORK, subjects.work_all(), true);
        }
        Filter::Kind(Kind::Unknown) | Filter::One(Kind::Unknown, _) => {}
    }
    put(PARTIAL, subjects.partials_of(filter), false);
    put(CHECKPOINT, subjects.checkpoints_of(filter), false);
    put(TRANSCRIPT, subjects.said_of(filter), false);
    put(EVENT, subjects.events_of(filter), false);
    put(DEAD, subjects.dead_of(filter), false);
    places
}

/// Whose message it is. None: nobody's, such as an event of the fleet.
pub(super) fn id_of(subjects: &Subjects, subject: &str) -> Option<(Kind, StreamId)> {
    Some(match subjects.parse(subject)? {
        Subject::Audio(id) | Subject::Live { id, .. } => (Kind::Session, id),
        Subject::WorkItem { job: id, .. } | Subject::Job { id, .. } => (Kind::Job, id),
        Subject::Final { kind, id }
        | Subject::Revision { kind, id }
        | Subject::Partial { kind, id }
        | Subject::Checkpoint { kind, id }
        | Subject::Dead { kind, id } => (kind, id),
        Subject::Event { scope, id, .. } => {
            let kinds = [(Scope::Session, Kind::Session), (Scope::Job, Kind::Job)];
            let kind = kinds.into_iter().find(|(of, _)| of.as_str() == scope).map(|(_, kind)| kind)?;
            (kind, StreamId::new(id).ok()?)
        }
        Subject::Heartbeat(_) | Subject::Control(_) | Subject::Api(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::TopologyConfig;

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    /// Whether a subject is among those of a filter, token by token.
    fn covers(filter: &str, subject: &str) -> bool {
        let (filter, subject): (Vec<_>, Vec<_>) = (filter.split('.').collect(), subject.split('.').collect());
        filter.len() == subject.len() && filter.iter().zip(&subject).all(|(f, s)| *f == "*" || f == s)
    }

    #[test]
    fn every_stream_is_looked_into() {
        let subjects = Subjects::new("asr.v1");
        let session = places(&subjects, &Filter::One(Kind::Session, id("s")));
        let job = places(&subjects, &Filter::One(Kind::Job, id("s")));
        let named: Vec<&str> = session.iter().chain(&job).map(|place| place.stream).collect();
        for stream in TopologyConfig::stream_names() {
            assert!(named.contains(&stream.as_str()), "nobody purges {stream}");
        }
    }

    #[test]
    fn a_place_holds_its_id_and_no_neighbour() {
        let subjects = Subjects::new("asr.v1");
        for kind in [Kind::Session, Kind::Job] {
            let neighbours = ["call-2", "cal", "call_", "CALL", "xcall"].map(id);
            for place in places(&subjects, &Filter::One(kind, id("call"))) {
                for neighbour in &neighbours {
                    let theirs = places(&subjects, &Filter::One(kind, neighbour.clone()));
                    let their = theirs.iter().find(|p| p.stream == place.stream).expect("the same place");
                    assert!(!covers(&place.filter, &their.filter.replace('*', "x")), "{place:?} holds {their:?}");
                }
                assert!(covers(&place.filter, &place.filter.replace('*', "x")));
            }
        }
    }

    #[test]
    fn what_all_places_hold_has_an_owner() {
        let subjects = Subjects::new("asr.v1");
        for (subject, kind) in [
            ("asr.v1.audio.a", Some(Kind::Session)),
            ("asr.v1.gpu.g.i.live.a", Some(Kind::Session)),
            ("asr.v1.gpu.g.i.job.a", Some(Kind::Job)),
            ("asr.v1.jobs.low.a", Some(Kind::Job)),
            ("asr.v1.transcript.session.a.final", Some(Kind::Session)),
            ("asr.v1.transcript.job.a.revision", Some(Kind::Job)),
            ("asr.v1.transcript.job.a.partial", Some(Kind::Job)),
            ("asr.v1.checkpoint.session.a", Some(Kind::Session)),
            ("asr.v1.event.session.a.ended", Some(Kind::Session)),
            ("asr.v1.event.job.a.done", Some(Kind::Job)),
            ("asr.v1.event.fleet.a.joined", None),
            ("asr.v1.dead.job.a", Some(Kind::Job)),
            ("asr.v1.heartbeat.a", None),
        ] {
            assert_eq!(id_of(&subjects, subject), kind.map(|kind| (kind, id("a"))), "{subject}");
        }
    }
}
