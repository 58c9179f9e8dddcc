//! The book of jobs: every job that has not ended, in memory, and when the ended ones expire. One task owns it.
//!
//! A [`Job`] mirrors its key in `asr_jobs`, which is the queue; nothing here is the only copy of anything. What is to be
//! done about a job is decided by the pure functions of [`decide`]; [`request`] turns what strangers send into records.

pub mod decide;
pub mod letters;
pub mod request;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use voxfleet_schema::{
    device::Instead,
    failure::Failure,
    fleet::EngineName,
    id::{StreamId, WorkerName},
    job::{JobRecord, JobState},
    session::{Diarize, SessionOptions},
    transcript::{Final, VadKind},
};

use crate::{admission::rank, core::spans::Opening, kept::KeptEngine, sessions::CallId};
pub use request::{Recording, Submission};

/// What of a job's last final decides about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobMark {
    pub index: u64,
    pub epoch: u64,
    pub vad: VadKind,
    pub engine: Option<EngineName>,
    pub end: Option<JobEnd>,
}

/// What its end final says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEnd {
    pub error: Option<Failure>,
    pub result: Option<String>,
    pub duration_ms: u64,
}

/// A part that its parent has begun is left to it while it stores a final at least so often: longer than one takes to decode.
const PARENT_AT_IT: Duration = Duration::from_secs(30);

/// Samples in a millisecond of the transcript's clock.
const SAMPLES_PER_MS: u64 = 16;

impl From<&Final> for JobMark {
    fn from(f: &Final) -> Self {
        let end = f.end.then(|| JobEnd {
            error: f.error.clone(),
            result: f.result.clone(),
            duration_ms: f.to_sample / SAMPLES_PER_MS,
        });
        Self { index: f.index, epoch: f.epoch, vad: f.vad, engine: EngineName::of(&f.engine), end }
    }
}

/// A question or order about one job.
#[derive(Debug)]
pub enum Ask {
    Submit(Box<Submission>),
    Status,
    Cancel,
}

/// What is under way for a job.
#[derive(Debug)]
pub enum Stage {
    Settled,
    /// Its inline recording is being stored; this record comes next.
    Putting(Box<JobRecord>),
    /// This record is being written.
    Saving(Box<JobRecord>),
    /// The key is being read again, because a write was lost or its outcome is unknown: what was to be written.
    Reading(Box<JobRecord>),
    /// Its work item is being published, unless it is queued or the chain has its end.
    Sending,
    /// The end of its chain is being written.
    Closing,
}

#[derive(Debug)]
pub struct Job {
    pub record: JobRecord,
    /// Of the key; none while there is no key.
    pub revision: Option<u64>,
    pub stage: Stage,
    /// Monotonic time at which the stage began.
    pub since: Duration,
    pub chain: Option<JobMark>,
    /// Of its finals, and of a whole also that of its parts.
    pub kept: KeptEngine,
    /// Monotonic time at which its chain was last seen to grow.
    pub grown: Duration,
    /// Whose slot it is counted against.
    pub charged: Option<WorkerName>,
    /// Workers that had no room for it, and the number of the heartbeat they had sent then.
    pub refused: Vec<(WorkerName, u64)>,
    /// Workers where a try failed, and when (monotonic).
    pub failed: Vec<(WorkerName, Duration)>,
    /// It failed, and `ASR_DEAD` has no copy.
    pub not_kept: bool,
    /// Who had it before.
    pub moved_from: Option<WorkerName>,
    /// Every worker's reason of the last decision, for the event.
    pub reasons: serde_json::Value,
    /// That it waits has been told.
    pub told_waiting: bool,
    /// Highest epoch whose assignment has been told.
    pub told_epoch: u64,
    /// Monotonic time at which it was assigned, or found assigned.
    pub assigned_since: Duration,
    /// Its worker was heard to hold this epoch.
    pub taken: bool,
    /// What its worker was given in place of what was asked for, from the moment it was chosen.
    pub instead: Option<Instead>,
    /// What of that was told last.
    pub told_instead: Option<Instead>,
    /// This process chose its worker or sent it there: which model it needs there is known.
    pub planned: bool,
    /// Its opening has not been told to those who follow its trace.
    pub opening: Option<Opening>,
    /// Who waits for its record to be written.
    pub submits: Vec<CallId>,
    /// Asks that came while something was under way.
    pub later: Vec<(CallId, Ask)>,
}

impl Job {
    pub fn new(record: JobRecord, revision: Option<u64>, chain: Option<JobMark>, now: Duration) -> Self {
        let told_instead = record.instead.clone();
        let mut kept = KeptEngine::of_key(record.engine.as_deref());
        kept.named(chain.as_ref().and_then(|c| c.engine));
        Self {
            record,
            revision,
            stage: Stage::Settled,
            since: now,
            chain,
            kept,
            grown: now,
            charged: None,
            refused: Vec::new(),
            failed: Vec::new(),
            not_kept: false,
            moved_from: None,
            reasons: serde_json::Value::Null,
            told_waiting: false,
            told_epoch: 0,
            assigned_since: now,
            taken: false,
            instead: None,
            told_instead,
            planned: false,
            opening: None,
            submits: Vec::new(),
            later: Vec::new(),
        }
    }

    pub fn settled(&self) -> bool {
        matches!(self.stage, Stage::Settled)
    }

    pub fn enter(&mut self, stage: Stage, now: Duration) {
        self.stage = stage;
        self.since = now;
    }

    pub fn state(&self) -> JobState {
        self.record.state
    }

    /// The record as it will be once what is under way has gone well.
    pub fn wanted(&self) -> &JobRecord {
        match &self.stage {
            Stage::Putting(next) | Stage::Saving(next) | Stage::Reading(next) => next,
            Stage::Settled | Stage::Sending | Stage::Closing => &self.record,
        }
    }

    /// The model its worker needs for it; none: the worker's default.
    pub fn needs_model(&self) -> Option<&String> {
        let stand_in = self.instead.as_ref().and_then(|instead| instead.model.as_ref());
        stand_in.or(self.record.options.model.as_ref())
    }

    /// Epoch of its next owner: above its last and above the last final's.
    pub fn next_epoch(&self) -> u64 {
        self.record.epoch.max(self.chain.as_ref().map_or(0, |c| c.epoch)) + 1
    }

    /// This try has stored a final.
    pub fn progressed(&self) -> bool {
        self.chain.as_ref().is_some_and(|c| c.epoch == self.record.epoch)
    }

    /// A part that was given to nobody, and has a chain that grows: who has the whole is at it.
    pub fn is_done_by_its_parent(&self, now: Duration) -> bool {
        let given = self.record.part.is_none() || self.record.epoch > 0;
        !given && self.chain.is_some() && now.saturating_sub(self.grown) < PARENT_AT_IT
    }

    /// Takes a final that is newer than what is known; false if it is not.
    pub fn saw(&mut self, mark: JobMark) -> bool {
        let newer = self.chain.as_ref().is_none_or(|c| mark.index > c.index || mark.epoch > c.epoch);
        if newer {
            self.kept.named(mark.engine);
            self.chain = Some(mark);
        }
        newer
    }

    /// The engine it keeps: that of its finals, where it said that nothing may differ.
    pub fn engine(&self) -> Option<EngineName> {
        self.kept.under(self.record.options.policy)
    }

    /// Its key is to say which engine it keeps. One that waits has that written with its next assignment.
    pub fn engine_is_due(&self, now: Duration) -> bool {
        let settled = self.settled() && self.record.state == JobState::Assigned;
        settled && self.kept.is_due(self.record.options.policy, self.record.engine.as_deref(), now)
    }
}

/// Whether `part` may be a stretch of this whole: the same recording, asked for in the same way, by whoever has the whole.
/// Parts name the model that the whole runs by default, and leave its speakers to the whole.
pub fn is_part_of(part: &JobRecord, whole: &JobRecord) -> bool {
    let model = |record: &JobRecord| record.options.model.clone();
    let others = |record: &JobRecord| SessionOptions { model: None, diarize: Diarize::Off, ..record.options.clone() };
    let same_model = model(whole).is_none_or(|model_of_whole| model(part) == Some(model_of_whole));
    let same = (&part.audio, &part.name) == (&whole.audio, &whole.name) && others(part) == others(whole);
    same && same_model && whole.part.is_none()
}

/// A job whose key is being read.
#[derive(Debug, Default)]
pub struct Loading {
    pub asks: Vec<(CallId, Ask)>,
}

#[derive(Debug)]
pub enum Known {
    Loading(Loading),
    Job(Box<Job>),
}

/// Nobody's patience depends on how far beyond this he is, and counting takes time.
const MAX_AHEAD: usize = 1_000;

/// Place in the queue: when it is due, as Unix time in ms.
type Place = (u64, StreamId);

/// All of them.
#[derive(Debug, Default)]
pub struct Book {
    known: HashMap<StreamId, Known>,
    /// Queued and settled: what may be placed.
    queue: BTreeSet<Place>,
    /// Everything else that is not a queued job at rest: what upkeep looks at.
    busy: BTreeSet<StreamId>,
    /// When ended jobs are to be looked at again, as Unix times in ms.
    expiries: BTreeSet<(u64, StreamId)>,
    /// Time that one step of priority is worth, in ms.
    age_ms: u64,
    /// Parts that have not ended, by the job they are a part of.
    parts: BTreeMap<StreamId, BTreeSet<StreamId>>,
}

impl Book {
    pub fn new(age: Duration) -> Self {
        Self { age_ms: age.as_millis() as u64, ..Self::default() }
    }

    /// One of a lower priority is due that much later than it was submitted, and then before whoever comes after that: nobody
    /// is overtaken for ever. Parts come behind whole recordings of their priority as if theirs were one step lower: a short
    /// recording waits for one part at most, and who has the whole works on it meanwhile.
    fn place_of(&self, record: &JobRecord) -> Place {
        let steps = rank(record.options.priority) + u64::from(record.part.is_some());
        (record.submitted_ms.saturating_add(steps * self.age_ms), record.id.clone())
    }

    pub fn get(&self, id: &StreamId) -> Option<&Known> {
        self.known.get(id)
    }

    pub fn job(&self, id: &StreamId) -> Option<&Job> {
        match self.known.get(id) {
            Some(Known::Job(job)) => Some(job),
            _ => None,
        }
    }

    /// Call [`Self::file`] after a change of state or stage.
    pub fn job_mut(&mut self, id: &StreamId) -> Option<&mut Job> {
        match self.known.get_mut(id) {
            Some(Known::Job(job)) => Some(job),
            _ => None,
        }
    }

    pub fn loading_mut(&mut self, id: &StreamId) -> Option<&mut Loading> {
        match self.known.get_mut(id) {
            Some(Known::Loading(loading)) => Some(loading),
            _ => None,
        }
    }

    pub fn insert(&mut self, id: StreamId, known: Known) {
        if let Known::Job(job) = &known
            && let Some(parent) = job.record.parent()
        {
            self.parts.entry(parent.clone()).or_default().insert(id.clone());
        }
        self.known.insert(id.clone(), known);
        self.file(&id);
        self.whole_keeps(&id);
    }

    /// What is known of the engine of a part is known of its whole, whose finals will be those of its parts. Call it after that
    /// has changed; `id` is either of the two.
    pub fn whole_keeps(&mut self, id: &StreamId) {
        let Some(job) = self.job(id) else {
            return;
        };
        let whole = job.record.parent().unwrap_or(id).clone();
        if self.job(&whole).is_none_or(|whole| whole.kept.known().is_some()) {
            return;
        }
        let parts = self.parts.get(&whole).into_iter().flatten().filter_map(|part| self.job(part));
        let mut known = parts.filter_map(|part| part.kept.known().map(|engine| (part, engine)));
        let engine = known.find(|(part, _)| self.is_wanted(&part.record)).map(|(_, engine)| engine);
        if let Some(whole) = self.job_mut(&whole) {
            whole.kept.learn(engine);
        }
    }

    pub fn remove(&mut self, id: &StreamId) -> Option<Known> {
        let known = self.known.remove(id);
        if let Some(Known::Job(job)) = &known {
            self.queue.remove(&self.place_of(&job.record));
            if let Some(parent) = job.record.parent()
                && let Some(parts) = self.parts.get_mut(parent)
            {
                parts.remove(id);
                if parts.is_empty() {
                    self.parts.remove(&parent.clone());
                }
            }
        }
        self.busy.remove(id);
        known
    }

    /// Puts a job where it belongs now: into the queue, or among those that upkeep looks at.
    pub fn file(&mut self, id: &StreamId) {
        match self.known.get(id) {
            Some(Known::Job(job)) => {
                let place = self.place_of(&job.record);
                if job.settled() && job.state() == JobState::Queued {
                    self.queue.insert(place);
                    self.busy.remove(id);
                } else {
                    self.queue.remove(&place);
                    self.busy.insert(id.clone());
                }
            }
            Some(Known::Loading(_)) => {
                self.busy.insert(id.clone());
            }
            None => {
                self.busy.remove(id);
            }
        }
    }

    /// Jobs at rest that wait for a slot, in order.
    pub fn queue(&self) -> impl Iterator<Item = &StreamId> {
        self.queue.iter().map(|(_, id)| id)
    }

    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Parts whose whole has ended, is ending, is not there, or is another recording.
    pub fn orphans(&self) -> Vec<StreamId> {
        let stray = |parent: &StreamId, part: &StreamId| match (self.job(parent), self.job(part)) {
            (Some(whole), Some(part)) => !is_part_of(&part.record, whole.wanted()),
            _ => false,
        };
        let all = self.parts.iter().flat_map(|(parent, parts)| parts.iter().map(move |part| (parent, part)));
        all.filter(|(parent, part)| self.is_gone(parent) || stray(parent, part)).map(|(_, part)| part.clone()).collect()
    }

    /// Somebody waits for this: for a part only who has the whole of it, the same recording asked for in the same way.
    pub fn is_wanted(&self, record: &JobRecord) -> bool {
        let Some(parent) = record.parent() else { return true };
        let whole = self.job(parent).map(Job::wanted);
        whole.is_some_and(|whole| whole.state != JobState::Closing && is_part_of(record, whole))
    }

    /// Nobody waits for parts of this job.
    pub fn is_gone(&self, parent: &StreamId) -> bool {
        match self.known.get(parent) {
            Some(Known::Job(job)) => job.state() == JobState::Closing,
            Some(Known::Loading(_)) => false,
            None => true,
        }
    }

    /// Jobs before this one, counted up to [`MAX_AHEAD`]; none unless it waits.
    pub fn ahead(&self, record: &JobRecord) -> Option<u32> {
        let place = self.place_of(record);
        self.queue.contains(&place).then(|| self.queue.range(..place).take(MAX_AHEAD).count() as u32)
    }

    /// The same for everybody who waits, [`MAX_AHEAD`] for those behind that.
    pub fn places(&self) -> HashMap<&StreamId, u32> {
        self.queue().zip(0..).map(|(id, ahead)| (id, ahead.min(MAX_AHEAD as u32))).collect()
    }

    /// Everything that is not at rest in the queue.
    pub fn busy(&self) -> impl Iterator<Item = &StreamId> {
        self.busy.iter()
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Looks at an ended job again at `at_ms`.
    pub fn expire_at(&mut self, id: StreamId, at_ms: u64) {
        self.expiries.insert((at_ms, id));
    }

    /// Ended jobs to look at now, the first `max` of them.
    pub fn due(&mut self, now_ms: u64, max: usize) -> Vec<StreamId> {
        let mut due = Vec::new();
        while due.len() < max
            && self.expiries.first().is_some_and(|(at, _)| *at <= now_ms)
            && let Some((_, id)) = self.expiries.pop_first()
        {
            due.push(id);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{id, job, part_of};
    use proptest::prelude::*;
    use voxfleet_schema::session::{Policy, Priority};

    const AGE: Duration = Duration::from_secs(600);

    fn queued(name: &str, priority: Priority, submitted_ms: u64) -> Known {
        let mut record = job(name);
        record.options.priority = priority;
        record.submitted_ms = submitted_ms;
        Known::Job(Box::new(Job::new(record, Some(1), None, Duration::ZERO)))
    }

    #[test]
    fn the_queue_is_in_order_of_priority_then_time() {
        let mut book = Book::new(AGE);
        for (name, priority, at) in [
            ("late", Priority::Normal, 9),
            ("low", Priority::Low, 1),
            ("early", Priority::Normal, 2),
            ("high", Priority::High, 30),
        ] {
            book.insert(id(name), queued(name, priority, at));
        }
        let order = |book: &Book| book.queue().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(order(&book), ["high", "early", "late", "low"]);
        let ahead = |book: &Book, name: &str| book.job(&id(name)).and_then(|job| book.ahead(&job.record));
        assert_eq!((ahead(&book, "high"), ahead(&book, "low")), (Some(0), Some(3)));
        let job = book.job_mut(&id("early")).expect("known");
        job.enter(Stage::Sending, Duration::ZERO);
        book.file(&id("early"));
        assert_eq!((order(&book), ahead(&book, "early")), (vec!["high".into(), "late".into(), "low".into()], None));
        assert_eq!(book.busy().count(), 1);
        let job = book.job_mut(&id("early")).expect("known");
        job.enter(Stage::Settled, Duration::ZERO);
        book.file(&id("early"));
        book.remove(&id("high"));
        assert_eq!((order(&book), book.busy().count()), (vec!["early".into(), "late".into(), "low".into()], 0));
    }

    fn mark(index: u64, engine: Option<EngineName>) -> JobMark {
        JobMark { index, epoch: 1, vad: VadKind::Silero, engine, end: None }
    }

    #[test]
    fn a_final_that_names_no_engine_leaves_the_one_that_a_job_keeps() {
        let mut record = job("a");
        record.options.policy = Policy::ExactModel;
        let mut job = Job::new(record.clone(), Some(1), Some(mark(0, None)), Duration::ZERO);
        assert_eq!(job.engine(), None);
        let (first, other) = (Some(EngineName::WhisperCpp), Some(EngineName::Ct2));
        for (index, named, kept) in [(1, first, first), (2, None, first), (3, other, other), (4, None, other)] {
            assert!(job.saw(mark(index, named)));
            assert_eq!((job.engine(), job.chain.clone()), (kept, Some(mark(index, named))), "{index}");
        }
        assert!(!job.saw(mark(1, first)), "it is known");
        assert_eq!(job.engine(), other);
        record.engine = Some("whisper_cpp".to_owned());
        for (last, kept) in [(None, first), (Some(mark(9, None)), first), (Some(mark(9, other)), other)] {
            assert_eq!(Job::new(record.clone(), Some(1), last.clone(), Duration::ZERO).engine(), kept, "{last:?}");
        }
        record.options.policy = Policy::AllowCpu;
        assert_eq!(Job::new(record, Some(1), None, Duration::ZERO).engine(), None);
    }

    #[test]
    fn a_whole_keeps_the_engine_of_its_parts() {
        let ct2 = Some(EngineName::Ct2);
        let part = |name: &str, change: &dyn Fn(&mut JobRecord)| {
            let mut record = job(name);
            (record.part, record.options.model) = (Some(part_of("whole")), Some("small".to_owned()));
            change(&mut record);
            Known::Job(Box::new(Job::new(record, Some(1), Some(mark(0, ct2)), Duration::ZERO)))
        };
        let known = |book: &Book| book.job(&id("whole")).expect("known").kept.known();
        for part_first in [false, true] {
            let mut book = Book::new(AGE);
            if part_first {
                book.insert(id("part"), part("part", &|_| ()));
            }
            book.insert(id("whole"), queued("whole", Priority::Normal, 0));
            book.insert(id("stray"), part("stray", &|record| record.name = Some("another".to_owned())));
            assert_eq!(known(&book), ct2.filter(|_| part_first), "a stranger's part says nothing");
            book.insert(id("part"), part("part", &|_| ()));
            assert_eq!(known(&book), ct2);
            book.remove(&id("part"));
            assert_eq!(known(&book), ct2, "it has ended");
        }
        let mut book = Book::new(AGE);
        book.insert(id("whole"), queued("whole", Priority::Normal, 0));
        let whole = book.job_mut(&id("whole")).expect("known");
        whole.saw(mark(0, Some(EngineName::WhisperCpp)));
        book.insert(id("part"), part("part", &|_| ()));
        assert_eq!(known(&book), Some(EngineName::WhisperCpp), "its own finals come first");
    }

    proptest! {
        /// Whoever was submitted earlier by more than his priority costs him comes first; of those alike always.
        #[test]
        fn nobody_is_overtaken_for_longer_than_priority_is_worth(
            all in prop::collection::vec((0u64..4_000_000, 0u8..3), 2..40),
        ) {
            let of = [Priority::High, Priority::Normal, Priority::Low];
            let mut book = Book::new(AGE);
            let name = |n: usize| format!("j{n:02}");
            for (n, (at, priority)) in all.iter().enumerate() {
                book.insert(id(&name(n)), queued(&name(n), of[usize::from(*priority)], *at));
            }
            let order: Vec<_> = book.queue().map(ToString::to_string).collect();
            let places = book.places();
            for (n, (at, priority)) in all.iter().enumerate() {
                let place = order.iter().position(|id| *id == name(n));
                prop_assert_eq!(places.get(&id(&name(n))).map(|p| *p as usize), place);
                for (m, (later, other)) in all.iter().enumerate() {
                    let worth = u64::from(priority.saturating_sub(*other)) * 600_000;
                    if at + worth < *later {
                        prop_assert!(place < order.iter().position(|id| *id == name(m)));
                    }
                }
            }
        }
    }

    #[test]
    fn a_part_is_of_the_same_recording_asked_for_in_the_same_way() {
        let of = |name: &str, change: &dyn Fn(&mut JobRecord)| {
            let Known::Job(mut job) = queued(name, Priority::Normal, 0) else { unreachable!("a job") };
            change(&mut job.record);
            job.record
        };
        let part = |change: &dyn Fn(&mut JobRecord)| {
            of("part", &|record| {
                record.part = Some(part_of("whole"));
                record.options.model = Some("small".to_owned());
                change(record);
            })
        };
        let whole = of("whole", &|_| ());
        assert!(is_part_of(&part(&|_| ()), &whole), "the model that the whole runs by default");
        let told_apart = of("whole", &|record| record.options.diarize = Diarize::On);
        assert!(is_part_of(&part(&|_| ()), &told_apart), "speakers are told apart in the whole");
        let named = of("whole", &|record| record.options.model = Some("large-v3".to_owned()));
        assert!(!is_part_of(&part(&|_| ()), &named));
        assert!(!is_part_of(&part(&|_| ()), &part(&|_| ())), "of a part");
        let changes: [&dyn Fn(&mut JobRecord); 4] = [
            &|record| record.audio = "https://audio.example/another.wav".to_owned(),
            &|record| record.name = Some("another".to_owned()),
            &|record| record.options.hotwords = vec!["word".to_owned()],
            &|record| record.options.priority = Priority::High,
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(!is_part_of(&part(change), &whole), "{n}");
        }
    }

    #[test]
    fn parts_wait_behind_whole_recordings_of_their_priority_and_go_with_their_own() {
        let mut book = Book::new(AGE);
        let part = |name: &str, priority, at| {
            let Known::Job(mut part) = queued(name, priority, at) else { unreachable!("a job") };
            part.record.part = Some(part_of("whole"));
            Known::Job(part)
        };
        book.insert(id("part"), part("part", Priority::Normal, 0));
        book.insert(id("high-part"), part("high-part", Priority::High, 0));
        for (name, priority, at) in [("small", Priority::Normal, 599_000), ("later", Priority::Normal, 600_002)] {
            book.insert(id(name), queued(name, priority, at));
        }
        book.insert(id("low"), queued("low", Priority::Low, 1));
        let order: Vec<_> = book.queue().map(ToString::to_string).collect();
        assert_eq!(order, ["high-part", "small", "part", "low", "later"]);

        let wanted = |book: &Book| book.is_wanted(&book.job(&id("part")).expect("known").record);
        assert_eq!(book.orphans(), [id("high-part"), id("part")], "nobody has the whole");
        assert!(!wanted(&book));
        book.insert(id("whole"), Known::Loading(Loading::default()));
        assert_eq!(book.orphans(), []);
        assert!(!wanted(&book), "what it is a part of is not known yet");
        book.insert(id("whole"), queued("whole", Priority::Normal, 0));
        assert_eq!(book.orphans(), [id("high-part")], "asked for in another way");
        assert!(wanted(&book));
        book.job_mut(&id("whole")).expect("known").record.state = JobState::Closing;
        assert!(!wanted(&book));
        book.remove(&id("part"));
        assert_eq!(book.orphans(), [id("high-part")], "what has ended is nobody's");
        book.remove(&id("high-part"));
        assert!(book.orphans().is_empty() && book.parts.is_empty());
    }

    #[test]
    fn ended_jobs_come_due_in_order_and_not_all_at_once() {
        let mut book = Book::default();
        for (name, at) in [("c", 30), ("a", 10), ("b", 20)] {
            book.expire_at(id(name), at);
        }
        assert_eq!(book.due(9, 5), Vec::<StreamId>::new());
        assert_eq!(book.due(30, 2), [id("a"), id("b")]);
        assert_eq!(book.due(30, 2), [id("c")]);
    }
}
