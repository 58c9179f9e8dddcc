//! Whose voices a session has heard, and what its finals say of them.
//!
//! Invariants:
//! - Finals get their labels in the order of the chain, however late their voices are heard: what is shown depends on the log
//!   alone.
//! - A label is shown only where a checkpoint that knows it is stored: with its final, or as a revision behind a later one.
//! - A final whose speakers are owed keeps being owed wherever the session goes, and gets its answer in its place: what was
//!   heard, or why it was not.
//! - A label is never given to somebody else, not even where the voices of earlier finals are lost: it counts on.

use std::{collections::VecDeque, ops::Range};

use voxfleet_diarize::online::{Limits, Tuning, Voices};
use voxfleet_schema::{
    codec,
    session::{Channels, Diarize, SessionOptions},
    transcript::{Segment, Speakers, SpeakersBy, ToldLate, Turn},
};

use crate::{
    engine::diarize::{Heard, Listened, attribute, turns_of},
    ipc::{HeardOf, RevisionDraft, StartPoint, Told},
};

/// A checkpoint with more is not believed.
const MOST_LABELS: u32 = 1_000_000;

/// A final whose voices were not heard when its words were said.
struct Owed {
    index: u64,
    /// None where it was said elsewhere: they come with what is heard of it.
    segments: Option<Vec<Segment>>,
    heard: Option<Result<Heard, String>>,
}

pub(crate) struct Tellers {
    voices: Voices,
    limits: Limits,
    /// What the last final said.
    last: Option<Speakers>,
    /// The voices of earlier finals are not known; no final has said so yet.
    afresh: bool,
    owed: VecDeque<Owed>,
    revisions: Vec<RevisionDraft>,
}

impl Tellers {
    /// None where speakers are not asked for.
    pub(crate) fn new(options: &SessionOptions, start: &StartPoint) -> Option<Self> {
        if options.diarize == Diarize::Off || options.channels == Channels::Split {
            return None;
        }
        let last = start.after.as_ref().and_then(|after| after.speakers.clone());
        let shown = last.as_ref().map_or(0, |last| last.labels);
        let kept = start.checkpoint.voices.as_ref().and_then(|bytes| match codec::from_msgpack::<Voices>(bytes) {
            // More labels than anybody can have been given: nobody of ours wrote it.
            Ok(voices) if voices.labels() > MOST_LABELS => None,
            Ok(voices) => Some(voices),
            Err(error) => {
                tracing::warn!(%error, "the voices of a checkpoint are not readable");
                None
            }
        });
        let afresh = kept.is_none() && shown > 0;
        let voices = kept.unwrap_or_else(|| Voices::after(shown));
        let limits = limits_of(options);
        let owed = start.late.iter().map(|index| Owed { index: *index, segments: None, heard: None }).collect();
        Some(Self { voices, limits, last, afresh, owed, revisions: Vec::new() })
    }

    /// Whether there are finals that still wait for their speakers.
    pub(super) fn owes(&self) -> bool {
        self.owed.iter().any(|owed| owed.heard.is_none())
    }

    /// What was heard of an earlier final.
    pub(super) fn heard(&mut self, index: u64, heard: Result<Heard, String>) {
        if let Some(owed) = self.owed.iter_mut().find(|owed| owed.index == index) {
            owed.heard = Some(heard);
        }
    }

    /// What was heard of a final that was said elsewhere.
    pub(super) fn heard_again(&mut self, again: HeardOf) {
        if let Some(owed) = self.owed.iter_mut().find(|owed| owed.index == again.index) {
            (owed.segments, owed.heard) = (again.segments, Some(again.heard));
        }
    }

    /// The revisions of earlier finals that are possible now.
    fn settle(&mut self) {
        while let Some(Owed { heard: Some(_), .. }) = self.owed.front()
            && let Some(Owed { index, segments, heard: Some(heard) }) = self.owed.pop_front()
        {
            // One that stands nowhere any more has nothing that could be revised. Its voices count all the same.
            let gone = segments.is_none();
            let Told { segments, turns, speakers } = self.label(segments.unwrap_or_default(), heard);
            if !gone {
                self.revisions.push(RevisionDraft { index, segments, turns, speakers });
            }
        }
    }

    /// Finals that still wait for their speakers, in order.
    pub(crate) fn late(&self) -> Vec<u64> {
        self.owed.iter().map(|owed| owed.index).collect()
    }

    /// What the revisions say that come behind the final that was just told.
    pub(crate) fn told(&self) -> Vec<ToldLate> {
        let told = |revision: &RevisionDraft| ToldLate {
            index: revision.index,
            turns: revision.turns.clone(),
            speakers: revision.speakers.clone(),
        };
        self.revisions.iter().map(told).collect()
    }

    /// What the next final says, and the revisions of those before it that are possible now.
    pub(crate) fn tell(&mut self, index: u64, segments: Vec<Segment>, listened: Listened) -> Told {
        self.settle();
        match listened {
            Listened::NotAsked => Told { segments, turns: Vec::new(), speakers: self.last.clone().map(repeated) },
            Listened::Heard(heard) if self.owed.is_empty() => self.label(segments, heard),
            Listened::Heard(heard) => self.postpone(index, segments, Some(heard)),
            Listened::Late(_) => self.postpone(index, segments, None),
        }
    }

    fn postpone(&mut self, index: u64, segments: Vec<Segment>, heard: Option<Result<Heard, String>>) -> Told {
        let by = self.last.as_ref().map_or(SpeakersBy::None, |last| last.by);
        let speakers = Speakers { by, labels: self.voices.labels(), late: true, afresh: false, why: None };
        self.last = Some(speakers.clone());
        self.owed.push_back(Owed { index, segments: Some(segments.clone()), heard });
        Told { segments, turns: Vec::new(), speakers: Some(speakers) }
    }

    fn label(&mut self, segments: Vec<Segment>, heard: Result<Heard, String>) -> Told {
        let (by, why, segments, turns) = match heard {
            Err(why) => (SpeakersBy::None, Some(why), segments, Vec::new()),
            Ok(heard) => {
                // What another encoder says of a voice means nothing to this one.
                self.afresh |= self.voices.encoder() != heard.encoder && self.voices.labels() > 0;
                let known = std::mem::replace(&mut self.voices, Voices::new(""));
                self.voices = known.under(&heard.encoder);
                let assigned = self.voices.hear(&heard.voiced, self.limits, &Tuning::default());
                let turns = turns_of(&heard.voiced, &assigned);
                (heard.by, heard.why, attribute(segments, &turns), turns)
            }
        };
        let afresh = std::mem::take(&mut self.afresh);
        let speakers = Speakers { by, labels: self.voices.labels(), late: false, afresh, why };
        self.last = Some(speakers.clone());
        Told { segments, turns, speakers: Some(speakers) }
    }

    /// What a final says while nobody listens: each channel is somebody, and of one channel nobody knows. Labels and voices
    /// stay as they are.
    pub(super) fn by_channels(
        &mut self,
        mut segments: Vec<Segment>,
        mut turns: Vec<Turn>,
        mono: bool,
        why: &str,
    ) -> Told {
        self.settle();
        if mono {
            turns.clear();
            for segment in &mut segments {
                (segment.speaker, segment.channel) = (None, None);
                segment.words.iter_mut().for_each(|word| word.speaker = None);
            }
        }
        let by = if mono { SpeakersBy::None } else { SpeakersBy::Channels };
        let why = Some(why.to_owned());
        let speakers = Speakers { by, labels: self.voices.labels(), late: false, afresh: false, why };
        self.last = Some(speakers.clone());
        Told { segments, turns, speakers: Some(speakers) }
    }

    /// For the checkpoint of the final that was just told.
    pub(crate) fn voices(&self) -> Option<bytes::Bytes> {
        if self.voices.labels() == 0 {
            return None;
        }
        match codec::to_msgpack(&self.voices) {
            Ok(bytes) => Some(bytes.into()),
            Err(error) => {
                tracing::error!(%error, "voices cannot be encoded");
                None
            }
        }
    }

    pub(super) fn take_revisions(&mut self) -> Vec<RevisionDraft> {
        std::mem::take(&mut self.revisions)
    }
}

/// What each final says where channels are split.
pub(super) fn by_channels(options: &SessionOptions) -> Option<Speakers> {
    let by = Speakers { by: SpeakersBy::Channels, labels: 0, late: false, afresh: false, why: None };
    (options.channels == Channels::Split).then_some(by)
}

/// How many people the session expects.
pub(crate) fn limits_of(options: &SessionOptions) -> Limits {
    Limits { min_speakers: options.min_speakers.map(usize::from), max_speakers: options.max_speakers.map(usize::from) }
}

/// The same of a final in which nobody spoke.
fn repeated(last: Speakers) -> Speakers {
    Speakers { late: false, afresh: false, ..last }
}

/// Speech inside `window`, as the detector heard it.
pub(super) fn inside(speech: &[Range<u64>], window: &Range<u64>) -> Vec<Range<u64>> {
    let clipped = speech.iter().map(|one| one.start.max(window.start)..one.end.min(window.end));
    clipped.filter(|one| !one.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use proptest::prelude::*;
    use voxfleet_diarize::hear::Voiced;
    use voxfleet_schema::{
        audio::AudioFormat,
        source::SourceState,
        transcript::{Checkpoint, Resume, Turn},
    };

    use super::*;
    use crate::{engine::Cancel, ipc::AfterFinal};

    fn options() -> SessionOptions {
        SessionOptions { diarize: Diarize::On, ..SessionOptions::default() }
    }

    /// Two seconds of the person `who` in the final `index`, never quite the same.
    fn heard(index: u64, who: usize) -> Result<Heard, String> {
        let mut embedding = vec![0.02 * (index % 5) as f32; 8];
        embedding[who] = 1.0;
        let from_sample = index * 48_000;
        let voiced = vec![Voiced {
            from_sample,
            to_sample: from_sample + 32_000,
            track: 0,
            overlapped: false,
            embedding: Some(embedding),
            reliable_ms: 2_000,
        }];
        let (by, why, encoder, took) = (SpeakersBy::Segmentation, None, "one".to_owned(), Duration::ZERO);
        Ok(Heard { voiced, by, why, encoder, took })
    }

    fn segments(index: u64) -> Vec<Segment> {
        let start_ms = index * 3_000;
        vec![Segment {
            id: 0,
            start_ms,
            end_ms: start_ms + 1_900,
            text: "yes".to_owned(),
            speaker: None,
            channel: None,
            language: None,
            confidence: 1.0,
            words: Vec::new(),
        }]
    }

    /// Tells a call in which each final has one speaker; `late`: behind how many others each is heard. What stands at its
    /// end, and what a checkpoint and the final's own word were behind each.
    fn tell(start: &StartPoint, from: u64, people: &[usize], late: &[u64]) -> Vec<(Told, Option<bytes::Bytes>)> {
        let mut tellers = Tellers::new(&options(), start).expect("asked for");
        let mut stands: Vec<(Told, Option<bytes::Bytes>)> = Vec::new();
        for (n, who) in people.iter().enumerate() {
            let index = from + n as u64;
            for (earlier, who) in people[..n].iter().enumerate() {
                let behind = (n - earlier) as u64;
                // The end waits for all of them.
                if late[earlier] == behind || (n + 1 == people.len() && late[earlier] > behind) {
                    tellers.heard(from + earlier as u64, heard(from + earlier as u64, *who));
                }
            }
            assert!(n + 1 < people.len() || !tellers.owes());
            let end = n + 1 == people.len();
            let listened = match late[n] {
                _ if end => Listened::Heard(heard(index, *who)),
                0 => Listened::Heard(heard(index, *who)),
                _ => Listened::Late(Cancel::default().into()),
            };
            let told = tellers.tell(index, segments(index), listened);
            for revision in tellers.take_revisions() {
                let at = (revision.index - from) as usize;
                let RevisionDraft { segments, turns, speakers, .. } = revision;
                assert!(stands[at].0.speakers.as_ref().is_some_and(|s| s.late), "only what was late is revised");
                stands[at].0 = Told { segments, turns, speakers };
            }
            stands.push((told, tellers.voices()));
        }
        stands
    }

    fn labels(told: &[(Told, Option<bytes::Bytes>)]) -> Vec<Option<String>> {
        told.iter().map(|(told, _)| told.segments[0].speaker.clone()).collect()
    }

    fn behind(index: u64, told: &Told, voices: Option<bytes::Bytes>) -> StartPoint {
        let resume = Resume {
            seq: 1,
            at_sample: 0,
            at_frame: 0,
            format: AudioFormat::default(),
            format_sample: 0,
            producers: SourceState::default(),
            language: None,
        };
        let after = AfterFinal { index, to_sample: 0, to_seq: 1, end: false, resume, speakers: told.speakers.clone() };
        let checkpoint = Checkpoint { index, voices, ..Checkpoint::default() };
        StartPoint { after: Some(Box::new(after)), checkpoint, ..StartPoint::beginning() }
    }

    /// The same call with a move to somebody else behind each final where `moves` says so: what was on its way is lost, what the
    /// last checkpoint says is not.
    fn tell_moved(people: &[usize], late: &[u64], moves: &[bool]) -> Vec<Told> {
        let mut tellers = Tellers::new(&options(), &StartPoint::beginning()).expect("asked for");
        let mut stands: Vec<Told> = Vec::new();
        // When each is heard that was not heard in time.
        let mut due: BTreeMap<u64, u64> = BTreeMap::new();
        let last = people.len() as u64 - 1;
        for (index, who) in (0..).zip(people) {
            let now: Vec<u64> = due.iter().filter(|(_, at)| **at <= index || index == last).map(|(i, _)| *i).collect();
            for earlier in now {
                due.remove(&earlier);
                let (segments, heard) = (segments(earlier), heard(earlier, people[earlier as usize]));
                // As it comes from whoever said it, or from who heard it again.
                match moves[..index as usize].iter().any(|moved| *moved) {
                    true => tellers.heard_again(HeardOf { index: earlier, segments: Some(segments), heard }),
                    false => tellers.heard(earlier, heard),
                }
            }
            assert!(index < last || !tellers.owes());
            let behind = late[index as usize];
            let listened = match behind {
                1.. if index < last => Listened::Late(Cancel::default().into()),
                _ => Listened::Heard(heard(index, *who)),
            };
            if matches!(listened, Listened::Late(_)) {
                due.insert(index, index + behind);
            }
            let told = tellers.tell(index, segments(index), listened);
            let checkpoint = (tellers.voices(), tellers.late(), tellers.told());
            stands.push(told.clone());
            let mut revise = |index: u64, told: Told| {
                let stands: &mut Told = &mut stands[index as usize];
                assert!(stands.speakers.as_ref().is_some_and(|s| s.late), "only what was late is revised, and once");
                *stands = told;
            };
            if !moves[index as usize] || index == last {
                for RevisionDraft { index, segments, turns, speakers } in tellers.take_revisions() {
                    revise(index, Told { segments, turns, speakers });
                }
                continue;
            }
            let (voices, owed, told_late) = checkpoint;
            for ToldLate { index, turns, speakers } in told_late {
                let segments = attribute(segments(index), &turns);
                revise(index, Told { segments, turns, speakers });
            }
            // Heard again from the beginning, as long as that takes.
            due = owed.iter().map(|i| (*i, index + late[*i as usize].max(1))).collect();
            let start = StartPoint { late: owed, ..self::behind(index, &told, voices) };
            tellers = Tellers::new(&options(), &start).expect("asked for");
        }
        stands
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whoever_takes_over_answers_for_what_was_late(
            call in prop::collection::vec((0usize..4, 0u64..4, any::<bool>()), 2..12)
        ) {
            let people: Vec<usize> = call.iter().map(|(who, ..)| *who).collect();
            let late: Vec<u64> = call.iter().map(|(_, late, _)| *late).collect();
            let moves: Vec<bool> = call.iter().map(|(.., moved)| *moved).collect();
            let punctual = tell(&StartPoint::beginning(), 0, &people, &vec![0; people.len()]);
            let moved = tell_moved(&people, &late, &moves);
            for (told, (expected, _)) in moved.iter().zip(&punctual) {
                prop_assert_eq!((&told.segments, &told.turns), (&expected.segments, &expected.turns));
                prop_assert!(told.speakers.as_ref().is_some_and(|s| !s.late));
            }
        }

        #[test]
        fn labels_do_not_depend_on_when_voices_are_heard(
            call in prop::collection::vec((0usize..4, 0u64..4), 2..12)
        ) {
            let (people, late): (Vec<usize>, Vec<u64>) = call.into_iter().unzip();
            let start = StartPoint::beginning();
            let punctual = tell(&start, 0, &people, &vec![0; people.len()]);
            let delayed = tell(&start, 0, &people, &late);
            prop_assert_eq!(labels(&punctual), labels(&delayed));
            for (who, label) in people.iter().zip(labels(&punctual)) {
                let first = people.iter().position(|p| p == who).expect("there");
                prop_assert_eq!(&label, &labels(&punctual)[first], "one person, one label");
            }
        }

        #[test]
        fn whoever_takes_over_goes_on_with_the_same_labels(
            people in prop::collection::vec(0usize..4, 3..10),
            cut in 0usize..8,
        ) {
            let punctual = vec![0; people.len()];
            let whole = tell(&StartPoint::beginning(), 0, &people, &punctual);
            let cut = cut.min(people.len() - 2);
            let (told, voices) = whole[cut].clone();
            let next = cut + 1;
            let rest = tell(&behind(cut as u64, &told, voices), next as u64, &people[next..], &punctual[next..]);
            prop_assert_eq!(&rest, &whole[next..]);
            // Without the voices nobody's label is given to somebody else.
            let lost = tell(&behind(cut as u64, &told, None), next as u64, &people[next..], &punctual[next..]);
            let shown: Vec<_> = labels(&whole[..next]);
            prop_assert!(labels(&lost).iter().all(|label| !shown.contains(label)));
            prop_assert!(lost[0].0.speakers.as_ref().is_some_and(|s| s.afresh));
        }
    }

    #[test]
    fn what_cannot_be_heard_says_why_and_goes_out_all_the_same() {
        let mut tellers = Tellers::new(&options(), &StartPoint::beginning()).expect("asked for");
        let told = tellers.tell(0, segments(0), Listened::Heard(Err("deaf".to_owned())));
        let speakers = told.speakers.expect("said");
        assert_eq!((speakers.by, speakers.why.as_deref()), (SpeakersBy::None, Some("deaf")));
        assert_eq!((told.segments, told.turns), (segments(0), Vec::<Turn>::new()));
        // A final in which nobody spoke says what the last one said.
        let told = tellers.tell(1, Vec::new(), Listened::Heard(heard(1, 0)));
        assert_eq!(told.turns.len(), 1);
        let silent = tellers.tell(2, Vec::new(), Listened::NotAsked).speakers.expect("said");
        assert_eq!((silent.by, silent.labels, silent.late), (SpeakersBy::Segmentation, 1, false));
        for options in [
            SessionOptions::default(),
            SessionOptions { diarize: Diarize::Auto, channels: Channels::Split, ..SessionOptions::default() },
        ] {
            assert!(Tellers::new(&options, &StartPoint::beginning()).is_none());
        }
    }

    #[test]
    fn what_cannot_be_heard_again_is_answered_all_the_same() {
        let start = StartPoint { late: vec![3, 4], ..StartPoint::beginning() };
        let mut tellers = Tellers::new(&options(), &start).expect("asked for");
        assert!(tellers.owes());
        let told = tellers.tell(5, segments(5), Listened::Heard(heard(5, 0)));
        assert!(told.speakers.is_some_and(|s| s.late) && tellers.told().is_empty(), "those before it come first");
        assert_eq!(tellers.late(), [3, 4, 5]);
        let why = || Err("its audio has expired".to_owned());
        tellers.heard_again(HeardOf { index: 3, segments: Some(segments(3)), heard: why() });
        // One that has expired itself has no revision.
        tellers.heard_again(HeardOf { index: 4, segments: None, heard: why() });
        assert!(!tellers.owes());
        // Also where nobody listens any more.
        tellers.by_channels(Vec::new(), Vec::new(), true, "no memory");
        let revisions = tellers.take_revisions();
        assert_eq!(revisions.iter().map(|r| r.index).collect::<Vec<_>>(), [3, 5]);
        assert_eq!(revisions[0].segments, segments(3));
        let said = revisions[0].speakers.as_ref().expect("said");
        assert_eq!((said.by, said.late, said.why.as_deref()), (SpeakersBy::None, false, Some("its audio has expired")));
        assert_eq!(revisions[1].segments[0].speaker.as_deref(), Some("S1"));
        assert!(tellers.late().is_empty());
    }

    #[test]
    fn another_encoder_begins_anew_behind_the_labels_that_were_shown() {
        let mut tellers = Tellers::new(&options(), &StartPoint::beginning()).expect("asked for");
        tellers.tell(0, segments(0), Listened::Heard(heard(0, 0)));
        let other = heard(1, 0).map(|heard| Heard { encoder: "another".to_owned(), ..heard });
        let told = tellers.tell(1, segments(1), Listened::Heard(other));
        assert_eq!(told.segments[0].speaker.as_deref(), Some("S2"));
        assert!(told.speakers.is_some_and(|s| s.afresh && s.labels == 2));
    }
}
