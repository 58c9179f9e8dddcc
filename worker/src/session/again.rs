//! Finals whose speakers were late when their session came here.
//!
//! The audio of such a final is in the log from where its predecessor resumes, and the voices of all before it are in the last
//! checkpoint: a stream of its own in the engine finds it and listens to it, and what is heard goes to the session's stream,
//! which tells it behind its next final as it would have told what came late by itself. Where a final cannot be heard again, its
//! revision says why. What had been told when the session moved, and was not published yet, stands in the checkpoint.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use tokio::time::{Instant, timeout_at};
use voxfleet_nats::{
    ServerError,
    retry::Backoff,
    transcript::{Chain, ChainError, StoredFinal},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Checkpoint, Final, Revision, ToldLate},
};

use super::{Names, Session, life::ReadFailed, open, reconsider::revisions_from, store::answer};
use crate::{
    engine::diarize::attribute,
    ipc::{ENTRY_COST, Heard, HeardIn, HeardOf, StartPoint},
    lifecycle::EngineSession,
};

/// After the last entry of the log, for an engine that has more to do than this.
const PATIENCE: Duration = Duration::from_secs(60);
/// Without entries, the log is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Which finals are owed their speakers where a session goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owed {
    Known(Vec<u64>),
    /// The chain has to say.
    Ask,
}

/// What the last final and its checkpoint say of it. Pure.
pub(super) fn owed(last: &Final, start: &StartPoint) -> Owed {
    let late = last.speakers.as_ref().is_some_and(|speakers| speakers.late);
    match &start.checkpoint {
        // An end waits for all of them.
        _ if last.speakers.is_none() || last.end => Owed::Known(Vec::new()),
        _ if start.checkpoint_missing => Owed::Ask,
        // Whoever wrote it keeps no account of them.
        Checkpoint { late: owed, .. } if owed.is_empty() && late => Owed::Ask,
        Checkpoint { late, .. } => Owed::Known(late.clone()),
    }
}

/// The revision of a final that was told late. Pure.
fn revision_of(names: &Names, stands: &Final, told: ToldLate, epoch: u64) -> Revision {
    Revision {
        kind: names.kind,
        id: names.id.clone(),
        index: told.index,
        // Given when it is stored.
        revision: 0,
        epoch,
        segments: attribute(stands.segments.clone(), &told.turns),
        turns: told.turns,
        speakers: told.speakers,
        words_omitted: stands.words_omitted,
    }
}

/// Where to look next for a final below `index`, and how far the step back is then: `found` stands at `at`. None: it is found.
/// Pure.
fn back(at: u64, step: u64, found: Option<u64>, index: u64) -> Option<(u64, u64)> {
    match found {
        Some(found) if found <= index => None,
        _ if at <= 1 => None,
        _ => Some((at.saturating_sub(step).max(1), step.saturating_mul(2))),
    }
}

/// Asks until the server answers.
pub(super) async fn asked<T, E: Future<Output = Result<T, ChainError>>>(
    (kind, id): (Kind, &StreamId),
    ask: impl Fn() -> E,
) -> Result<T, ChainError> {
    let mut backoff = Backoff::default();
    loop {
        match ask().await {
            Err(ChainError::Server(error)) if !matches!(error, ServerError::Closed) => {
                tracing::warn!(session = kind.session(id), job = kind.job(id), %error, "chain not read, trying again");
                backoff.wait().await;
            }
            answer => return answer,
        }
    }
}

/// The finals from `index` to the last one, which stands at `last_seq`. Fewer where they have expired.
async fn finals_from(
    chain: &Chain,
    (kind, id): (Kind, &StreamId),
    index: u64,
    last_seq: u64,
) -> Result<BTreeMap<u64, Final>, ChainError> {
    let next = async |mut seq| loop {
        match asked((kind, id), move || chain.next_final(kind, id, seq)).await {
            // What nobody can read is not one of them.
            Err(ChainError::Foreign { seq: unreadable, .. }) => seq = unreadable + 1,
            answer => return answer,
        }
    };
    // Back from the end, further each time: a session's last finals are near each other.
    let (mut at, mut step) = (last_seq, 1);
    let mut found = next(at).await?;
    while let Some(further) = back(at, step, found.as_ref().map(|found| found.value.index), index) {
        (at, step) = further;
        found = next(at).await?;
    }
    let mut finals = BTreeMap::new();
    while let Some(StoredFinal { seq, value }) = found.filter(|found| found.seq <= last_seq) {
        finals.insert(value.index, value);
        found = next(seq + 1).await?;
    }
    finals.retain(|at, _| *at >= index);
    Ok(finals)
}

/// Finals whose speakers nobody has told, behind `last`.
pub(super) async fn late(session: &Session, last: &StoredFinal, start: &StartPoint) -> Result<Vec<u64>, ChainError> {
    match owed(&last.value, start) {
        Owed::Known(late) => Ok(late),
        Owed::Ask => {
            let (chain, Names { kind, id, .. }) = (&session.shared.chain, &session.names);
            let late = asked((*kind, id), || chain.unanswered(*kind, id, last.seq)).await?;
            Ok(late.into_iter().map(|late| late.index).collect())
        }
    }
}

/// Publishes what had been told with the last final and did not get into the chain.
pub(super) async fn publish_told(
    session: &Session,
    last: &StoredFinal,
    told: Vec<ToldLate>,
    epoch: u64,
) -> Result<(), ChainError> {
    // Before an end they were published first.
    let first = told.iter().map(|told| told.index).min().filter(|_| !last.value.end);
    let Some(first) = first else { return Ok(()) };
    let (chain, names) = (&session.chain(), &session.names);
    // They come behind the final they were told with.
    let published = revisions_from(chain, names.kind, &names.id, last.seq).await?;
    if told.iter().all(|told| published.contains_key(&told.index)) {
        return Ok(());
    }
    let finals = finals_from(chain, (names.kind, &names.id), first, last.seq).await?;
    for told in told.into_iter().filter(|told| !published.contains_key(&told.index)) {
        let Some(stands) = finals.get(&told.index) else { continue };
        let revision = revision_of(names, stands, told, epoch);
        say!(info, names, index = revision.index, epoch, "speakers told by whoever had it before");
        if !answer(chain, revision).await? {
            // A higher epoch has it: the next final will find that out.
            return Ok(());
        }
    }
    Ok(())
}

/// Hears them, one after the other.
pub(super) struct Again<'a> {
    session: &'a Session,
    late: VecDeque<u64>,
    last_seq: u64,
    /// Those of the chain that it takes.
    finals: Option<BTreeMap<u64, Final>>,
}

/// Why a final is not heard again.
#[derive(Debug, thiserror::Error)]
enum NotHeard {
    #[error("its audio has expired")]
    Expired,
    #[error("the chain before it has expired")]
    NoPredecessor,
    #[error("the engine died while it listened to this")]
    Harmful,
    #[error("it is not found again in the log")]
    NotFound,
    #[error("the engine does not answer")]
    NoAnswer,
    #[error("{0}")]
    Engine(String),
}

/// What became of one look.
enum Looked {
    Heard(Result<Heard, NotHeard>),
    /// The engine is gone, and with it the stream that would be told.
    Gone,
}

impl<'a> Again<'a> {
    /// None where nothing is owed.
    pub(super) fn new(session: &'a Session, late: &[u64], last_seq: Option<u64>) -> Option<Self> {
        let late: VecDeque<u64> = late.iter().copied().collect();
        let last_seq = last_seq.filter(|_| !late.is_empty())?;
        Some(Self { session, late, last_seq, finals: None })
    }

    /// The next answer. None: there is nothing more to hear.
    pub(super) async fn next(&mut self) -> Option<HeardOf> {
        let index = self.late.pop_front()?;
        let session = self.session;
        let names = &session.names;
        let finals = match &self.finals {
            Some(finals) => finals,
            None => {
                let chain = &session.shared.chain;
                let found = finals_from(chain, (names.kind, &names.id), index.saturating_sub(1), self.last_seq).await;
                let found = found.unwrap_or_else(|error| {
                    say!(error, names, error = &error as &dyn std::error::Error, "chain unreadable");
                    BTreeMap::new()
                });
                self.finals.insert(found)
            }
        };
        let Some(stands) = finals.get(&index) else {
            let heard = Err("it does not stand in the chain any more".to_owned());
            return Some(HeardOf { index, segments: None, heard });
        };
        let predecessor = index.checked_sub(1).map(|before| finals.get(&before));
        let looked = match predecessor {
            Some(None) => Looked::Heard(Err(NotHeard::NoPredecessor)),
            Some(Some(before)) => hear(session, Some(before), stands).await,
            None => hear(session, None, stands).await,
        };
        let Looked::Heard(heard) = looked else { return None };
        match &heard {
            Ok(_) => say!(info, names, index, "speakers heard again"),
            Err(why) => say!(warn, names, index, %why, "speakers not heard again"),
        }
        let heard = heard.map_err(|why| format!("not heard in time, and not again: {why}"));
        Some(HeardOf { index, segments: Some(stands.segments.clone()), heard })
    }
}

/// Listens to the final behind `before`.
async fn hear(session: &Session, before: Option<&Final>, stands: &Final) -> Looked {
    if session.is_harmful(stands.from_sample) {
        return Looked::Heard(Err(NotHeard::Harmful));
    }
    let Names { kind, id, .. } = &session.names;
    let log = session.work.is_none().then_some(&session.shared.log);
    let start = match open::locate(&session.shared.chain, log, *kind, id, before).await {
        Ok(start) if start.expired => return Looked::Heard(Err(NotHeard::Expired)),
        // Whose voices they are is decided elsewhere.
        Ok(start) => StartPoint { checkpoint: Checkpoint::default(), late: Vec::new(), ..start },
        Err(error) => return Looked::Heard(Err(NotHeard::Engine(error.to_string()))),
    };
    let engine = &session.shared.engine;
    let Ok(link) = engine.ready().await else { return Looked::Gone };
    let options = (*session.desired.borrow().options).clone();
    let from = start.first_seq();
    let Some(stream) = engine.hear_again(&link, &session.names, options, start).await else { return Looked::Gone };
    listen(session, &stream, from, stands).await
}

/// Feeds the log from `from` on until the engine has heard the final.
async fn listen(session: &Session, stream: &EngineSession, mut from: u64, stands: &Final) -> Looked {
    let max_entry = session.max_entry();
    let mut first = true;
    let mut give_up: Option<Instant> = None;
    loop {
        let room_again = session.shared.budget.room();
        tokio::pin!(room_again);
        room_again.as_mut().enable();
        let taken = stream.outbox().take();
        if let Some(heard) = taken.heard {
            return Looked::Heard(is_it(*heard, stands));
        }
        if let Some(failure) = taken.failed {
            return Looked::Heard(Err(NotHeard::Engine(failure.message)));
        }
        if taken.gone {
            return Looked::Gone;
        }
        let account = &stream.outbox().account;
        let room = account.has_room(max_entry + ENTRY_COST);
        let found = if room { session.entry(from).await } else { Ok(None) };
        match found {
            Ok(Some(entry)) if first && entry.seq > stands.audio.from_seq => {
                return Looked::Heard(Err(NotHeard::Expired));
            }
            Ok(Some(entry)) => {
                (from, first, give_up) = (entry.seq + 1, false, None);
                account.take(entry.payload.len() as u64 + ENTRY_COST);
                let Some(permit) = stream.room().await else { return Looked::Gone };
                permit.feed(entry);
            }
            // The engine has all of it, or as much as this stream may have: no other stream takes that away.
            Ok(None) => {
                let now = Instant::now();
                if now >= *give_up.get_or_insert(now + PATIENCE) {
                    return Looked::Heard(Err(NotHeard::NoAnswer));
                }
                let answer = async {
                    tokio::select! {
                        () = stream.outbox().changed() => {}
                        () = &mut room_again, if !room => {}
                    }
                };
                let _ = timeout_at(now + LOOK_EVERY, answer).await;
            }
            Err(ReadFailed::Recording(failure)) => {
                return Looked::Heard(Err(NotHeard::Engine(failure.message)));
            }
            Err(ReadFailed::Log(error)) => {
                say!(warn, session.names, error = &error as &dyn std::error::Error, "log not read, trying again");
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// Whether what was heard is the final that was looked for. Pure.
fn is_it(heard: HeardIn, stands: &Final) -> Result<Heard, NotHeard> {
    let HeardIn { from_sample, to_sample, heard } = heard;
    let heard = heard.map_err(NotHeard::Engine)?;
    if (from_sample, to_sample) != (stands.from_sample, stands.to_sample) {
        return Err(NotHeard::NotFound);
    }
    Ok(heard)
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::transcript::{Speakers, SpeakersBy, Turn};

    use super::*;
    use crate::session::tests::final_of;

    fn speakers(late: bool) -> Option<Speakers> {
        Some(Speakers { by: SpeakersBy::Segmentation, labels: 1, late, afresh: false, why: None })
    }

    #[test]
    fn what_is_owed_stands_in_the_checkpoint_or_in_the_chain() {
        use Owed::*;
        let none = || Known(Vec::new());
        // (said of speakers, end, checkpoint missing, late in it, owed)
        let cases = [
            (None, false, false, &[][..], none()),
            (None, false, true, &[], none()),
            (speakers(false), false, false, &[], none()),
            (speakers(true), false, false, &[2, 3], Known(vec![2, 3])),
            // Nobody spoke in the last one.
            (speakers(false), false, false, &[2], Known(vec![2])),
            (speakers(false), false, true, &[], Ask),
            (speakers(true), false, true, &[], Ask),
            (speakers(true), false, false, &[], Ask),
            (speakers(false), true, true, &[], none()),
            (speakers(false), true, false, &[], none()),
        ];
        for (said, end, checkpoint_missing, late, expected) in cases {
            let mut last = final_of(3);
            (last.speakers, last.end) = (said, end);
            let checkpoint = Checkpoint { late: late.to_vec(), ..Checkpoint::default() };
            let start = StartPoint { checkpoint, checkpoint_missing, ..StartPoint::beginning() };
            assert_eq!(owed(&last, &start), expected, "{:?} {end} {checkpoint_missing} {late:?}", last.speakers);
        }
    }

    #[test]
    fn a_chain_is_read_from_its_end() {
        // Finals of this session stand at these sequences, others' between them.
        let chain = [(5, 0), (9, 1), (10, 2), (40, 3), (41, 4), (90, 5)];
        let next = |seq: u64| chain.iter().find(|(at, _)| *at >= seq).map(|(_, index)| *index);
        for (index, most) in [(5, 1), (4, 8), (3, 8), (1, 10), (0, 10)] {
            let (mut at, mut step, mut reads) = (90, 1, 1);
            while let Some(further) = back(at, step, next(at), index) {
                (at, step) = further;
                reads += 1;
            }
            assert!(next(at).is_some_and(|found| found <= index) && reads <= most, "{index}: {reads} reads to {at}");
        }
        // What has expired is not looked for below the first message.
        assert_eq!(back(1, 64, Some(7), 3), None);
        assert_eq!(back(30, 64, Some(7), 3), Some((1, 128)));
    }

    #[test]
    fn what_was_told_is_the_final_under_its_turns() {
        let mut stands = final_of(4);
        stands.segments = crate::session::tests::said("yes");
        let names = Names { kind: stands.kind, id: stands.id.clone(), gpu_id: stands.gpu_id.clone() };
        let turn = Turn { start_ms: 0, end_ms: 5_000, speaker: "S2".to_owned(), voice: Some(3) };
        let told = ToldLate { index: 4, turns: vec![turn.clone()], speakers: speakers(false) };
        let revision = revision_of(&names, &stands, told, 7);
        assert_eq!((revision.index, revision.epoch, revision.turns), (4, 7, vec![turn]));
        let said: Vec<_> = revision.segments.iter().map(|s| (s.text.as_str(), s.speaker.as_deref())).collect();
        assert_eq!(said, [("yes", Some("S2"))]);
        // Why nobody was heard.
        let why = Speakers { by: SpeakersBy::None, why: Some("deaf".to_owned()), ..speakers(false).expect("some") };
        let told = ToldLate { index: 4, turns: Vec::new(), speakers: Some(why.clone()) };
        let revision = revision_of(&names, &stands, told, 7);
        assert_eq!((revision.segments, revision.speakers), (stands.segments, Some(why)));
    }

    #[test]
    fn only_the_final_that_was_looked_for_counts() {
        let stands = final_of(0);
        let heard = || Heard {
            voiced: Vec::new(),
            by: SpeakersBy::Changes,
            why: None,
            encoder: "one".to_owned(),
            took: Duration::ZERO,
        };
        let (from_sample, to_sample) = (stands.from_sample, stands.to_sample);
        let found = HeardIn { from_sample, to_sample, heard: Ok(heard()) };
        assert_eq!(is_it(found.clone(), &stands).ok(), Some(heard()));
        let other = HeardIn { to_sample: to_sample + 1, ..found.clone() };
        assert!(matches!(is_it(other, &stands), Err(NotHeard::NotFound)));
        let deaf = HeardIn { heard: Err("deaf".to_owned()), ..found };
        assert!(matches!(is_it(deaf, &stands), Err(NotHeard::Engine(why)) if why == "deaf"));
    }
}
