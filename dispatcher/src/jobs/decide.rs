//! What is to be done about a job: desired (its key) against actual (heartbeats and chain). Pure, and idempotent by
//! (id, epoch): acting twice on the same picture does no harm.

use std::time::Duration;

use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{Held, WorkerHealth},
    id::WorkerName,
    job::{AudioUrl, JobRecord, JobState, own_recording},
};

use super::JobMark;

/// A heartbeat shows what its worker held when it was made; one that was on its way when something was decided shows the
/// world before. Heartbeats come each second.
const PICTURE_AGE: Duration = Duration::from_millis(1_500);
/// What a worker gets to store the final that it has begun, when its job has moved on.
const FINISH_WITHIN: Duration = crate::reconcile::FINISH_WITHIN;
/// Pauses before the second, third, ... try: a server that holds the recording may be back by then.
const BACKOFF_MS: [u64; 3] = [1_000, 5_000, 25_000];
/// Whoever asks for a longer pause than this gets this one.
const LONGEST_PAUSE_MS: u64 = 3_600_000;
/// Keys outlive the chain by this long, so that a key never goes before the finals it explains.
const KEY_OUTLIVES_MS: u64 = 3_600_000;

/// What a job's key says, and what this process has seen of it.
#[derive(Debug, Clone, Copy)]
pub struct Desired<'a> {
    pub record: &'a JobRecord,
    /// Nothing is under way for it, since then.
    pub settled_since: Option<Duration>,
    /// Index of the last final the dispatcher has seen.
    pub final_index: Option<u64>,
}

/// Its worker, as the fleet sees it.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    pub health: WorkerHealth,
    pub heard: Duration,
    /// It says that it gave this epoch up.
    pub given_up: Option<&'a Failure>,
}

/// A worker that says it holds the job.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    pub worker: &'a WorkerName,
    pub held: &'a Held,
    pub heard: Duration,
    pub health: WorkerHealth,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Its worker works on it.
    Taken,
    /// Its worker let it go, and says why.
    GaveUp(Failure),
    /// Its worker is gone.
    Displace,
    /// Its worker should not keep it: place it elsewhere if there is room.
    MoveIfRoom,
    /// Its worker will not fetch it any more: back into the queue.
    TakeBack,
    /// Nobody says that he has it: look whether its work item is queued.
    Look,
    /// A final was stored that the dispatcher has not seen.
    CatchUp,
    /// The worker holds a later epoch than the key knows: assign above it.
    Raise { above: u64 },
    /// Tell a worker to let go; `finish`: it may store the final that it has begun.
    Release { worker: WorkerName, epoch: u64, finish: bool },
}

/// Compares one job. An owner that is none has not been heard: its silence is judged by the fleet, like that of any other.
pub fn compare(desired: Desired<'_>, owner: Option<Owner<'_>>, holders: &[Holder<'_>]) -> Vec<Action> {
    let Some(since) = desired.settled_since else {
        return Vec::new();
    };
    let record = desired.record;
    let fresh = |heard: Duration| heard >= since + PICTURE_AGE;
    let assigned = record.state == JobState::Assigned;
    let current = |h: &Holder<'_>| assigned && record.worker.as_ref() == Some(h.worker) && h.held.epoch >= record.epoch;
    // Its job has moved on because it should not keep it: it may yet be at work on the final that it has begun.
    let finishes = |h: &Holder<'_>| assigned && (leaves(h.health) || (h.held.elsewhere && !h.held.suspect));
    let patience = |h: &Holder<'_>| if finishes(h) { FINISH_WITHIN } else { Duration::ZERO };
    let release =
        |h: &Holder<'_>| Action::Release { worker: h.worker.clone(), epoch: h.held.epoch, finish: finishes(h) };
    let others = holders.iter().filter(|h| !current(h) && h.heard >= since + PICTURE_AGE + patience(h));
    let mut actions: Vec<Action> = others.map(release).collect();
    if !assigned {
        return actions;
    }
    let held = holders.iter().find(|h| current(h));
    if held.is_some_and(|h| h.held.final_index > desired.final_index) {
        actions.push(Action::CatchUp);
    }
    let Some(owner) = owner else {
        return actions;
    };
    let leaving = leaves(owner.health);
    let asks = |h: &Holder<'_>| owner.health == WorkerHealth::Alive && h.held.elsewhere;
    actions.extend(match (owner.given_up, held) {
        (Some(failure), _) => Some(Action::GaveUp(failure.clone())),
        _ if owner.health == WorkerHealth::Dead => Some(Action::Displace),
        (None, Some(h)) if h.held.epoch > record.epoch => Some(Action::Raise { above: h.held.epoch }),
        (None, Some(h)) if leaving || asks(h) => Some(Action::MoveIfRoom),
        (None, Some(_)) => Some(Action::Taken),
        (None, None) if !fresh(owner.heard) => None,
        (None, None) if leaving => Some(Action::TakeBack),
        (None, None) => Some(Action::Look),
    });
    actions
}

/// It beats and should not keep what it has.
fn leaves(health: WorkerHealth) -> bool {
    matches!(health, WorkerHealth::Draining | WorkerHealth::Unhealthy)
}

/// What follows from a try that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has failed for good.
    Close,
    /// Again, after a pause. `attempts` is what the record is to say.
    Again { attempts: u32, pause_ms: u64 },
    /// The worker had no room: it was no try, and another worker comes first; after a pause if it named one.
    Elsewhere { attempts: u32, pause_ms: Option<u64> },
}

/// What is known of a try beside its failure.
#[derive(Debug, Clone, Copy)]
pub struct Tried {
    /// It stored a final, so the next one begins further on.
    pub progressed: bool,
    /// Another worker, where it has not failed, could take it.
    pub others: bool,
}

/// Judges a try. A job that gets on is not given up however often its workers are taken away: tries are counted anew from
/// each that stored a final. One that does not costs `max_attempts` tries.
pub fn judge(record: &JobRecord, failure: &Failure, tried: Tried, max_attempts: u32) -> Verdict {
    let attempts = if tried.progressed { 0 } else { record.attempts };
    let asked_ms = failure.retry_after_ms.map(|ms| ms.min(LONGEST_PAUSE_MS));
    let spent = attempts >= max_attempts;
    match failure.class {
        FailureClass::NoCapacity | FailureClass::NoWorkers => {
            Verdict::Elsewhere { attempts: attempts.saturating_sub(1), pause_ms: asked_ms }
        }
        class if of_one_worker(class, &record.audio) && tried.others && !spent => {
            Verdict::Again { attempts, pause_ms: 0 }
        }
        class if class.is_permanent() => Verdict::Close,
        _ if spent => Verdict::Close,
        _ => {
            let pause = BACKOFF_MS.get(attempts.saturating_sub(1) as usize).or(BACKOFF_MS.last());
            let pause_ms = pause.copied().unwrap_or_default().max(asked_ms.unwrap_or_default());
            Verdict::Again { attempts, pause_ms }
        }
    }
}

/// Another worker may see it otherwise: each has its own list of what it may fetch, and its own files.
fn of_one_worker(class: FailureClass, audio: &str) -> bool {
    match class {
        FailureClass::Forbidden => true,
        FailureClass::NotFound => matches!(AudioUrl::parse(audio), Ok(AudioUrl::File { .. })),
        _ => false,
    }
}

/// What an end that stands in the chain makes of the job.
pub fn ended(record: &JobRecord, mark: &JobMark, now_ms: u64) -> Option<JobRecord> {
    let end = mark.end.as_ref()?;
    let mut next = JobRecord { changed_ms: now_ms, not_before_ms: None, ..record.clone() };
    let Some(error) = &end.error else {
        next.state = JobState::Done;
        next.error = None;
        next.result = end.result.clone();
        next.duration_ms = Some(end.duration_ms);
        next.ended_ms = Some(now_ms);
        return Some(next);
    };
    next.error = Some(error.clone());
    if record.state != JobState::Closing {
        // Somebody else closed it: what comes after the end final is done here.
        next.state = JobState::Closing;
        return Some(next);
    }
    next.state = if error.class == FailureClass::Cancelled { JobState::Cancelled } else { JobState::Failed };
    next.ended_ms = Some(now_ms);
    Some(next)
}

/// What is due for an ended job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Nothing before this Unix time in ms.
    Later(u64),
    /// Its result and its inline recording go.
    Media,
    /// Its key goes.
    Key,
}

/// `transcript_s`: how long its chain is kept. None: it has not ended.
pub fn expiry(record: &JobRecord, now_ms: u64, transcript_s: u64) -> Option<Expiry> {
    let ended_ms = record.ended_ms.filter(|_| record.state.has_ended())?;
    let ttl_ms = u64::from(record.result_ttl_s) * 1_000;
    let (after_ms, then) = if record.expired {
        (ttl_ms.max(transcript_s * 1_000) + KEY_OUTLIVES_MS, Expiry::Key)
    } else {
        (ttl_ms, Expiry::Media)
    };
    let due_ms = ended_ms.saturating_add(after_ms);
    Some(if now_ms < due_ms { Expiry::Later(due_ms) } else { then })
}

/// What goes when its result expires: not its recording while a dead letter of it stands, which may still be retried.
pub fn media_due(record: &JobRecord, letter: bool) -> Vec<String> {
    let own = own_recording(&record.id, &record.audio);
    media_of(record).into_iter().filter(|key| !(letter && own.as_ref() == Some(key))).collect()
}

/// Whether a dead letter may refer to this object: then it has to be looked for before that is deleted.
pub fn may_be_needed(key: &str, record: Option<&JobRecord>) -> bool {
    let failed = record.is_none_or(|record| record.state == JobState::Failed);
    failed && key.starts_with("audio/")
}

/// Keys of the object store that go with a job.
pub fn media_of(record: &JobRecord) -> Vec<String> {
    let result = record.result.as_deref().and_then(|url| match AudioUrl::parse(url) {
        Ok(AudioUrl::Object { key }) => Some(key),
        Ok(_) | Err(_) => None,
    });
    result.into_iter().chain(own_recording(&record.id, &record.audio)).collect()
}

/// Nobody will ask for this object any more: its job is not there or has expired, or another worker's result counts.
pub fn orphan(key: &str, record: Option<&JobRecord>) -> bool {
    match record {
        None => true,
        Some(record) if !record.state.has_ended() => false,
        Some(record) => record.expired || !media_of(record).iter().any(|own| own == key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        jobs::JobEnd,
        testing::{self, job, worker},
    };
    use voxfleet_schema::{
        job::{audio_key, result_key, upload_key},
        transcript::VadKind,
    };

    const LONG: Duration = Duration::from_secs(60);

    fn assigned(epoch: u64) -> JobRecord {
        JobRecord { state: JobState::Assigned, epoch, attempts: 1, worker: Some(worker("g0", "i")), ..job("j") }
    }

    fn run(record: &JobRecord, owner: Option<WorkerHealth>, held: &[(&str, u64)], age_ms: u64) -> Vec<Action> {
        let names: Vec<_> = held.iter().map(|(gpu, e)| (worker(gpu, "i"), testing::holds_job("j", *e))).collect();
        let heard = LONG + Duration::from_millis(age_ms);
        let health = |name: &WorkerName| match owner {
            Some(health) if *name == worker("g0", "i") => health,
            _ if name.gpu_id.as_str() == "leaves" => WorkerHealth::Draining,
            _ => WorkerHealth::Alive,
        };
        let holder = |(worker, held)| Holder { worker, held, heard, health: health(worker) };
        let holders: Vec<_> = names.iter().map(|(worker, held)| holder((worker, held))).collect();
        let desired = Desired { record, settled_since: Some(LONG), final_index: None };
        compare(desired, owner.map(|health| Owner { health, heard, given_up: None }), &holders)
    }

    fn release(gpu: &str, epoch: u64) -> Action {
        Action::Release { worker: worker(gpu, "i"), epoch, finish: false }
    }

    #[test]
    fn differences_become_actions() {
        let mine = assigned(2);
        let alive = Some(WorkerHealth::Alive);
        assert_eq!(run(&mine, alive, &[("g0", 2)], 2_000), [Action::Taken]);
        assert_eq!(run(&mine, alive, &[], 2_000), [Action::Look]);
        assert_eq!(run(&mine, alive, &[], 1_000), [], "that heartbeat may be older than the assignment");
        assert_eq!(run(&mine, alive, &[("g0", 1)], 2_000), [release("g0", 1), Action::Look]);
        assert_eq!(run(&mine, alive, &[("g0", 5)], 2_000), [Action::Raise { above: 5 }]);
        assert_eq!(run(&mine, alive, &[("g0", 2), ("g1", 1)], 2_000), [release("g1", 1), Action::Taken]);
        assert_eq!(run(&mine, Some(WorkerHealth::Dead), &[], 0), [Action::Displace]);
        assert_eq!(run(&mine, None, &[], 60_000), [], "its silence has not been judged");
        assert_eq!(run(&mine, Some(WorkerHealth::Suspect), &[("g0", 2)], 0), [Action::Taken]);
        assert_eq!(run(&mine, Some(WorkerHealth::Draining), &[("g0", 2)], 0), [Action::MoveIfRoom]);
        assert_eq!(run(&mine, Some(WorkerHealth::Draining), &[], 2_000), [Action::TakeBack]);
        let finishes = Action::Release { worker: worker("leaves", "i"), epoch: 1, finish: true };
        assert_eq!(run(&mine, alive, &[("g0", 2), ("leaves", 1)], 3_000), [Action::Taken], "it finishes a final");
        assert_eq!(run(&mine, alive, &[("g0", 2), ("leaves", 1)], 3_500), [finishes, Action::Taken]);
        for state in [JobState::Queued, JobState::Closing] {
            let other = JobRecord { state, ..assigned(2) };
            assert_eq!(run(&other, alive, &[("g0", 2)], 2_000), [release("g0", 2)]);
            assert_eq!(run(&other, alive, &[("g0", 2)], 500), []);
        }
    }

    #[test]
    fn what_is_under_way_is_left_alone() {
        let record = assigned(1);
        let mut desired = Desired { record: &record, settled_since: None, final_index: None };
        let dead = Owner { health: WorkerHealth::Dead, heard: Duration::ZERO, given_up: None };
        assert_eq!(compare(desired, Some(dead), &[]), []);
        desired.settled_since = Some(Duration::ZERO);
        assert_eq!(compare(desired, Some(dead), &[]), [Action::Displace]);
        let failure = Failure::new(FailureClass::BadAudio, "no");
        let owner = Owner { health: WorkerHealth::Alive, heard: Duration::ZERO, given_up: Some(&failure) };
        assert_eq!(compare(desired, Some(owner), &[]), [Action::GaveUp(failure.clone())]);
    }

    #[test]
    fn a_final_that_was_missed_is_read() {
        let (me, record) = (worker("g0", "i"), assigned(1));
        let held = Held { final_index: Some(0), ..testing::holds_job("j", 1) };
        let holder = Holder { worker: &me, held: &held, heard: LONG, health: WorkerHealth::Alive };
        let desired = Desired { record: &record, settled_since: Some(Duration::ZERO), final_index: None };
        let owner = Some(Owner { health: WorkerHealth::Alive, heard: LONG, given_up: None });
        assert_eq!(compare(desired, owner, &[holder]), [Action::CatchUp, Action::Taken]);
        let seen = Desired { final_index: Some(0), ..desired };
        assert_eq!(compare(seen, owner, &[holder]), [Action::Taken]);
    }

    #[test]
    fn tries_are_counted_and_those_that_got_on_are_not_held_against_it() {
        use FailureClass::{BadAudio, EngineCrash, NoCapacity, Timeout};
        let verdict = |attempts, class, progressed| {
            let record = JobRecord { attempts, ..assigned(1) };
            judge(&record, &Failure::new(class, "x"), Tried { progressed, others: true }, 3)
        };
        assert_eq!(verdict(1, BadAudio, true), Verdict::Close);
        assert_eq!(verdict(1, Timeout, false), Verdict::Again { attempts: 1, pause_ms: 1_000 });
        assert_eq!(verdict(2, EngineCrash, false), Verdict::Again { attempts: 2, pause_ms: 5_000 });
        assert_eq!(verdict(3, Timeout, false), Verdict::Close);
        assert_eq!(verdict(3, Timeout, true), Verdict::Again { attempts: 0, pause_ms: 1_000 });
        assert_eq!(verdict(3, NoCapacity, false), Verdict::Elsewhere { attempts: 2, pause_ms: None });
    }

    #[test]
    fn who_names_a_pause_gets_it_within_reason() {
        let verdict = |class, retry_after_ms| {
            let failure = Failure { retry_after_ms: Some(retry_after_ms), ..Failure::new(class, "x") };
            judge(&assigned(1), &failure, Tried { progressed: false, others: false }, 3)
        };
        let again = |pause_ms| Verdict::Again { attempts: 1, pause_ms };
        assert_eq!(verdict(FailureClass::Unavailable, 600_000), again(600_000));
        assert_eq!(verdict(FailureClass::Unavailable, 10), again(1_000));
        assert_eq!(verdict(FailureClass::Unavailable, u64::MAX), again(3_600_000));
        let full = Verdict::Elsewhere { attempts: 0, pause_ms: Some(60_000) };
        assert_eq!(verdict(FailureClass::NoCapacity, 60_000), full);
    }

    #[test]
    fn what_one_worker_may_not_or_does_not_have_is_tried_on_others() {
        use FailureClass::{BadAudio, Forbidden, NotFound};
        let verdict = |audio: &str, class, others, attempts| {
            let record = JobRecord { audio: audio.to_owned(), attempts, ..assigned(1) };
            judge(&record, &Failure::new(class, "x"), Tried { progressed: false, others }, 3)
        };
        let (file, web) = ("file:///a.wav", "https://audio.example/a.wav");
        assert_eq!(verdict(file, NotFound, true, 1), Verdict::Again { attempts: 1, pause_ms: 0 });
        assert_eq!(verdict(web, Forbidden, true, 1), Verdict::Again { attempts: 1, pause_ms: 0 });
        for closes in [
            verdict(file, NotFound, false, 1),
            verdict(file, NotFound, true, 3),
            verdict(web, NotFound, true, 1),
            verdict(web, Forbidden, false, 1),
            verdict(file, BadAudio, true, 1),
        ] {
            assert_eq!(closes, Verdict::Close);
        }
    }

    #[test]
    fn the_end_that_stands_decides() {
        let mark = |error: Option<FailureClass>| JobMark {
            index: 0,
            epoch: 1,
            vad: VadKind::Silero,
            engine: None,
            end: Some(JobEnd {
                error: error.map(|class| Failure::new(class, "x")),
                result: Some("object://asr_media/result/j/1.json".to_owned()),
                duration_ms: 900,
            }),
        };
        let closing = JobRecord {
            state: JobState::Closing,
            error: Some(Failure::new(FailureClass::Cancelled, "x")),
            ..assigned(2)
        };
        let done = ended(&closing, &mark(None), 7).expect("an end");
        assert_eq!(
            (done.state, done.error, done.duration_ms, done.ended_ms),
            (JobState::Done, None, Some(900), Some(7))
        );
        let state = |record: &JobRecord, class| ended(record, &mark(Some(class)), 7).expect("an end").state;
        assert_eq!(state(&closing, FailureClass::Cancelled), JobState::Cancelled);
        assert_eq!(state(&closing, FailureClass::BadAudio), JobState::Failed);
        assert_eq!(state(&assigned(2), FailureClass::BadAudio), JobState::Closing);
        assert_eq!(ended(&closing, &JobMark { end: None, ..mark(None) }, 7), None);
    }

    #[test]
    fn results_expire_and_keys_outlive_the_chain() {
        let mut record = JobRecord { state: JobState::Done, ended_ms: Some(1_000), result_ttl_s: 60, ..job("j") };
        assert_eq!(expiry(&record, 60_999, 120), Some(Expiry::Later(61_000)));
        assert_eq!(expiry(&record, 61_000, 120), Some(Expiry::Media));
        record.expired = true;
        assert_eq!(expiry(&record, 61_000, 120), Some(Expiry::Later(3_721_000)));
        assert_eq!(expiry(&record, 3_721_000, 120), Some(Expiry::Key));
        assert_eq!(expiry(&assigned(1), u64::MAX, 120), None);
    }

    #[test]
    fn objects_go_with_their_job_and_no_others() {
        let key = result_key(&testing::id("j"), "f1");
        let other = result_key(&testing::id("j"), "f2");
        let mut record = JobRecord { result: Some(AudioUrl::object(&key)), ..job("j") };
        record.state = JobState::Done;
        assert_eq!(media_of(&record), std::slice::from_ref(&key));
        record.audio = AudioUrl::object(&audio_key(&record.id));
        assert_eq!(media_of(&record), [key.clone(), "audio/j".to_owned()]);
        assert_eq!(media_due(&record, false), media_of(&record));
        assert_eq!(media_due(&record, true), std::slice::from_ref(&key));
        let failed = JobRecord { state: JobState::Failed, ..record.clone() };
        assert!(may_be_needed("audio/j", Some(&failed)) && may_be_needed("audio/j", None));
        assert!(!may_be_needed("audio/j", Some(&record)) && !may_be_needed(&key, Some(&failed)));
        assert!(!orphan(&key, Some(&record)) && !orphan("audio/j", Some(&record)));
        assert!(orphan(&other, Some(&record)) && orphan(&key, None));
        let running = JobRecord { state: JobState::Assigned, ..record.clone() };
        assert!(!orphan(&other, Some(&running)));
        // Of several uploads under its name the job has one; the others are nobody's once it has ended.
        let [own, lost] = ["0", "f"].map(|digit| upload_key(&record.id, &digit.repeat(32)));
        record.audio = AudioUrl::object(&own);
        assert_eq!(media_of(&record), [key.clone(), own.clone()]);
        assert_eq!(media_due(&record, true), [key]);
        assert!(!orphan(&own, Some(&record)) && orphan(&lost, Some(&record)) && !orphan(&lost, Some(&running)));
        // What somebody else's job brought, or people put there themselves, stays.
        for theirs in ["audio/k", "audio/j/talk.wav", "calls/j.wav"] {
            record.audio = AudioUrl::object(theirs);
            assert_eq!(media_of(&record).len(), 1, "{theirs}");
        }
    }
}
