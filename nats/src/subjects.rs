//! Every subject, built and parsed in one place. Nothing above this crate holds a subject string, except to show it.

use std::fmt;

use voxfleet_schema::{
    event::{Event, Scope},
    id::{self, GpuId, IdError, Incarnation, Kind, StreamId, WorkerName},
    job::JobSubjects,
    session::{Priority, SessionSubjects},
};

/// What a subject of ours names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The log of a session.
    Audio(StreamId),
    /// Hints for a session on one worker.
    Live {
        worker: WorkerName,
        id: StreamId,
    },
    /// A job given to a slot of one worker.
    WorkItem {
        worker: WorkerName,
        job: StreamId,
    },
    /// A submitted job.
    Job {
        priority: Priority,
        id: StreamId,
    },
    Final {
        kind: Kind,
        id: StreamId,
    },
    Revision {
        kind: Kind,
        id: StreamId,
    },
    Partial {
        kind: Kind,
        id: StreamId,
    },
    Checkpoint {
        kind: Kind,
        id: StreamId,
    },
    /// `what` is free: a newer voxfleet may say what this one does not know.
    Event {
        scope: String,
        id: String,
        what: String,
    },
    Dead {
        kind: Kind,
        id: StreamId,
    },
    Heartbeat(GpuId),
    Control(WorkerName),
    Api(Endpoint),
}

/// Requests of the service API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    SessionOpen,
    SessionStatus,
    SessionClose,
    SessionList,
    JobSubmit,
    JobStatus,
    JobList,
    JobCancel,
    FleetStatus,
    FleetDrain,
    Plan,
}

impl Endpoint {
    pub const ALL: [Endpoint; 11] = [
        Endpoint::SessionOpen,
        Endpoint::SessionStatus,
        Endpoint::SessionClose,
        Endpoint::SessionList,
        Endpoint::JobSubmit,
        Endpoint::JobStatus,
        Endpoint::JobList,
        Endpoint::JobCancel,
        Endpoint::FleetStatus,
        Endpoint::FleetDrain,
        Endpoint::Plan,
    ];

    /// The last tokens of its subject.
    pub fn as_str(self) -> &'static str {
        match self {
            Endpoint::SessionOpen => "session.open",
            Endpoint::SessionStatus => "session.status",
            Endpoint::SessionClose => "session.close",
            Endpoint::SessionList => "session.list",
            Endpoint::JobSubmit => "job.submit",
            Endpoint::JobStatus => "job.status",
            Endpoint::JobList => "job.list",
            Endpoint::JobCancel => "job.cancel",
            Endpoint::FleetStatus => "fleet.status",
            Endpoint::FleetDrain => "fleet.drain",
            Endpoint::Plan => "plan",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.as_str() == text)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which chains or events a reader wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    All,
    Kind(Kind),
    One(Kind, StreamId),
}

impl Filter {
    fn tokens(&self) -> String {
        match self {
            Filter::All => "*.*".to_owned(),
            Filter::Kind(kind) => format!("{kind}.*"),
            Filter::One(kind, id) => format!("{kind}.{id}"),
        }
    }
}

/// Stands where an event's id is not one token: the event is about something with a hostile name.
const NO_TOKEN: &str = "_invalid";

/// Builds and parses subjects under one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subjects {
    prefix: String,
}

impl Subjects {
    /// `prefix` is validated with the configuration.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn build(&self, subject: &Subject) -> String {
        match subject {
            Subject::Audio(id) => self.audio(id),
            Subject::Live { worker, id } => self.live(worker, id),
            Subject::WorkItem { worker, job } => self.work_item(worker, job),
            Subject::Job { priority, id } => self.job(*priority, id),
            Subject::Final { kind, id } => self.finals(*kind, id),
            Subject::Revision { kind, id } => self.revision(*kind, id),
            Subject::Partial { kind, id } => self.partial(*kind, id),
            Subject::Checkpoint { kind, id } => self.checkpoint(*kind, id),
            Subject::Event { scope, id, what } => format!("{}.event.{scope}.{id}.{what}", self.prefix),
            Subject::Dead { kind, id } => self.dead(*kind, id),
            Subject::Heartbeat(gpu) => self.heartbeat(gpu),
            Subject::Control(worker) => self.control(worker),
            Subject::Api(endpoint) => self.api(*endpoint),
        }
    }

    pub fn audio(&self, id: &StreamId) -> String {
        format!("{}.audio.{id}", self.prefix)
    }

    pub fn live(&self, worker: &WorkerName, id: &StreamId) -> String {
        format!("{}.gpu.{worker}.live.{id}", self.prefix)
    }

    pub fn work_item(&self, worker: &WorkerName, job: &StreamId) -> String {
        format!("{}.gpu.{worker}.job.{job}", self.prefix)
    }

    pub fn job(&self, priority: Priority, id: &StreamId) -> String {
        format!("{}.jobs.{}.{id}", self.prefix, priority_token(priority))
    }

    pub fn finals(&self, kind: Kind, id: &StreamId) -> String {
        format!("{}.transcript.{kind}.{id}.final", self.prefix)
    }

    pub fn revision(&self, kind: Kind, id: &StreamId) -> String {
        format!("{}.transcript.{kind}.{id}.revision", self.prefix)
    }

    pub fn partial(&self, kind: Kind, id: &StreamId) -> String {
        format!("{}.transcript.{kind}.{id}.partial", self.prefix)
    }

    pub fn checkpoint(&self, kind: Kind, id: &StreamId) -> String {
        format!("{}.checkpoint.{kind}.{id}", self.prefix)
    }

    pub fn event(&self, event: &Event) -> String {
        let token = if id::check(&event.id).is_ok() { &event.id } else { NO_TOKEN };
        format!("{}.event.{}.{token}.{}", self.prefix, event.scope.as_str(), event.what.as_str())
    }

    pub fn dead(&self, kind: Kind, id: &StreamId) -> String {
        format!("{}.dead.{kind}.{id}", self.prefix)
    }

    pub fn heartbeat(&self, gpu: &GpuId) -> String {
        format!("{}.heartbeat.{gpu}", self.prefix)
    }

    pub fn control(&self, worker: &WorkerName) -> String {
        format!("{}.control.{worker}", self.prefix)
    }

    pub fn api(&self, endpoint: Endpoint) -> String {
        format!("{}.api.{endpoint}", self.prefix)
    }

    /// What a client of this session publishes to and reads from.
    pub fn session(&self, id: &StreamId) -> SessionSubjects {
        SessionSubjects {
            audio: self.audio(id),
            finals: self.finals(Kind::Session, id),
            partials: self.partial(Kind::Session, id),
            events: format!("{}.event.session.{id}.*", self.prefix),
        }
    }

    /// Everything in the audio log, for reading it: also the subject whose last token is a literal `>`, which the stream
    /// takes from a stranger and which `audio_all` does not match.
    pub fn audio_log(&self) -> String {
        format!("{}.audio.>", self.prefix)
    }

    /// What somebody who waits for a job reads.
    pub fn job_subjects(&self, id: &StreamId) -> JobSubjects {
        JobSubjects {
            finals: self.finals(Kind::Job, id),
            partials: self.partial(Kind::Job, id),
            events: format!("{}.event.job.{id}.*", self.prefix),
        }
    }

    pub fn audio_all(&self) -> String {
        format!("{}.audio.*", self.prefix)
    }

    pub fn live_all(&self) -> String {
        format!("{}.gpu.*.*.live.*", self.prefix)
    }

    pub fn live_of(&self, worker: &WorkerName) -> String {
        format!("{}.gpu.{worker}.live.*", self.prefix)
    }

    /// Hints for one session, whoever they are for.
    pub fn live_about(&self, id: &StreamId) -> String {
        format!("{}.gpu.*.*.live.{id}", self.prefix)
    }

    /// Work items of one job, whoever they are for.
    pub fn work_about(&self, job: &StreamId) -> String {
        format!("{}.gpu.*.*.job.{job}", self.prefix)
    }

    /// Requests for one job, of whatever priority.
    pub fn jobs_about(&self, id: &StreamId) -> String {
        format!("{}.jobs.*.{id}", self.prefix)
    }

    pub fn work_all(&self) -> String {
        format!("{}.gpu.*.*.job.*", self.prefix)
    }

    pub fn work_of(&self, worker: &WorkerName) -> String {
        format!("{}.gpu.{worker}.job.*", self.prefix)
    }

    pub fn jobs_all(&self) -> String {
        format!("{}.jobs.*.*", self.prefix)
    }

    pub fn finals_of(&self, filter: &Filter) -> String {
        format!("{}.transcript.{}.final", self.prefix, filter.tokens())
    }

    pub fn revisions_of(&self, filter: &Filter) -> String {
        format!("{}.transcript.{}.revision", self.prefix, filter.tokens())
    }

    /// Finals and their revisions: what their stream has.
    pub fn said_of(&self, filter: &Filter) -> String {
        format!("{}.transcript.{}.*", self.prefix, filter.tokens())
    }

    pub fn partials_of(&self, filter: &Filter) -> String {
        format!("{}.transcript.{}.partial", self.prefix, filter.tokens())
    }

    pub fn checkpoints_of(&self, filter: &Filter) -> String {
        format!("{}.checkpoint.{}", self.prefix, filter.tokens())
    }

    pub fn checkpoints_all(&self) -> String {
        format!("{}.checkpoint.*.*", self.prefix)
    }

    pub fn events_all(&self) -> String {
        format!("{}.event.*.*.*", self.prefix)
    }

    /// `Filter::All` includes the fleet's events.
    pub fn events_of(&self, filter: &Filter) -> String {
        format!("{}.event.{}.*", self.prefix, filter.tokens())
    }

    pub fn events_of_fleet(&self) -> String {
        format!("{}.event.{}.*.*", self.prefix, Scope::Fleet.as_str())
    }

    pub fn dead_of(&self, filter: &Filter) -> String {
        format!("{}.dead.{}", self.prefix, filter.tokens())
    }

    pub fn dead_all(&self) -> String {
        format!("{}.dead.*.*", self.prefix)
    }

    pub fn heartbeats_all(&self) -> String {
        format!("{}.heartbeat.*", self.prefix)
    }

    /// None for whatever is not ours or names something no id can be.
    pub fn parse(&self, text: &str) -> Option<Subject> {
        let rest = text.strip_prefix(self.prefix.as_str())?.strip_prefix('.')?;
        if let Some(endpoint) = rest.strip_prefix("api.") {
            return Endpoint::parse(endpoint).map(Subject::Api);
        }
        // No subject of ours is longer; one place more finds those that are.
        let mut tokens = [""; 7];
        let mut count = 0;
        for token in rest.split('.') {
            *tokens.get_mut(count)? = token;
            count += 1;
        }
        Some(match tokens[..count] {
            ["audio", id] => Subject::Audio(StreamId::new(id).ok()?),
            ["gpu", gpu, incarnation, "live", id] => {
                Subject::Live { worker: worker(gpu, incarnation)?, id: StreamId::new(id).ok()? }
            }
            ["gpu", gpu, incarnation, "job", job] => {
                Subject::WorkItem { worker: worker(gpu, incarnation)?, job: StreamId::new(job).ok()? }
            }
            ["jobs", priority, id] => Subject::Job { priority: parse_priority(priority)?, id: StreamId::new(id).ok()? },
            ["transcript", kind, id, what] => {
                let (kind, id) = (kind.parse().ok()?, StreamId::new(id).ok()?);
                match what {
                    "final" => Subject::Final { kind, id },
                    "revision" => Subject::Revision { kind, id },
                    "partial" => Subject::Partial { kind, id },
                    _ => return None,
                }
            }
            ["checkpoint", kind, id] => Subject::Checkpoint { kind: kind.parse().ok()?, id: StreamId::new(id).ok()? },
            ["event", scope, id, what] => {
                if [scope, id, what].iter().any(|token| id::check(token).is_err()) {
                    return None;
                }
                Subject::Event { scope: scope.to_owned(), id: id.to_owned(), what: what.to_owned() }
            }
            ["dead", kind, id] => Subject::Dead { kind: kind.parse().ok()?, id: StreamId::new(id).ok()? },
            ["heartbeat", gpu] => Subject::Heartbeat(GpuId::new(gpu).ok()?),
            ["control", gpu, incarnation] => Subject::Control(worker(gpu, incarnation)?),
            _ => return None,
        })
    }

    /// Priority and id of a job's subject, each as far as it can be read: strangers publish there. The priority that is none
    /// is cut to 16 characters.
    pub(crate) fn parse_job(&self, text: &str) -> (Result<Priority, String>, Result<StreamId, IdError>) {
        let rest = text.strip_prefix(self.prefix.as_str()).and_then(|rest| rest.strip_prefix(".jobs.")).unwrap_or(text);
        let (priority, id) = rest.split_once('.').unwrap_or((rest, ""));
        let priority = parse_priority(priority).ok_or_else(|| priority.chars().take(16).collect());
        (priority, StreamId::new(id))
    }

    /// The last token of an audio subject, whatever it is: the log may hold entries no session can have.
    pub(crate) fn audio_token<'a>(&self, text: &'a str) -> Option<&'a str> {
        text.strip_prefix(self.prefix.as_str())?.strip_prefix(".audio.")
    }
}

fn worker(gpu: &str, incarnation: &str) -> Option<WorkerName> {
    Some(WorkerName { gpu_id: GpuId::new(gpu).ok()?, incarnation: Incarnation::new(incarnation).ok()? })
}

fn priority_token(priority: Priority) -> &'static str {
    match priority {
        Priority::High => "high",
        Priority::Normal => "normal",
        Priority::Low => "low",
        Priority::Unknown => "unknown",
    }
}

fn parse_priority(text: &str) -> Option<Priority> {
    [Priority::High, Priority::Normal, Priority::Low].into_iter().find(|p| priority_token(*p) == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::event::What;

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    fn samples() -> Vec<Subject> {
        let w = worker("cpu-host-0", "a_B-9").expect("worker");
        let long = id(&"x".repeat(64));
        let mut all = vec![
            Subject::Audio(id("call-7")),
            Subject::Audio(long.clone()),
            Subject::Live { worker: w.clone(), id: id("live") },
            Subject::WorkItem { worker: w.clone(), job: id("job") },
            Subject::Event { scope: "fleet".into(), id: "g1".into(), what: "joined".into() },
            Subject::Heartbeat(w.gpu_id.clone()),
            Subject::Control(w),
        ];
        for priority in [Priority::High, Priority::Normal, Priority::Low] {
            all.push(Subject::Job { priority, id: id("j") });
        }
        for kind in [Kind::Session, Kind::Job] {
            all.push(Subject::Final { kind, id: id("final") });
            all.push(Subject::Revision { kind, id: id("r") });
            all.push(Subject::Partial { kind, id: long.clone() });
            all.push(Subject::Checkpoint { kind, id: id("session") });
            all.push(Subject::Dead { kind, id: id("-") });
        }
        all.extend(Endpoint::ALL.map(Subject::Api));
        all
    }

    #[test]
    fn what_is_built_is_parsed() {
        for prefix in ["asr.v1", "tenant-7.asr.v1", "x"] {
            let subjects = Subjects::new(prefix);
            for subject in samples() {
                let text = subjects.build(&subject);
                assert_eq!(subjects.parse(&text), Some(subject), "{text}");
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_nothing() {
        let subjects = Subjects::new("asr.v1");
        let long = format!("asr.v1.audio.{}", "x".repeat(10_000));
        for hostile in [
            "",
            ".",
            "asr.v1",
            "asr.v1.",
            "asr.v1.audio",
            "asr.v1.audio.",
            "asr.v1.audio..",
            "asr.v1.audio.a.b",
            "asr.v1.audio.*",
            "asr.v1.audio.>",
            "asr.v1.audio.a b",
            "asr.v1.audio.é",
            "asr.v1.audio.a\0",
            "asr.v1x.audio.a",
            "asr.v2.audio.a",
            "ASR.V1.audio.a",
            "asr.v1.gpu.g.i.live",
            "asr.v1.gpu.g.i.other.s",
            "asr.v1.gpu.g.live.s",
            "asr.v1.gpu.g.i.live.s.more.and.more.tokens",
            "asr.v1.jobs.urgent.j",
            "asr.v1.transcript.session.s.other",
            "asr.v1.transcript.Session.s.final",
            "asr.v1.event.session.s",
            "asr.v1.event.session..what",
            "asr.v1.api.session",
            "asr.v1.api.session.open.now",
            long.as_str(),
        ] {
            assert_eq!(subjects.parse(hostile), None, "{:.60}", hostile);
        }
    }

    #[test]
    fn a_strangers_job_subject_is_read_as_far_as_it_goes() {
        let subjects = Subjects::new("asr.v1");
        let (priority, job) = subjects.parse_job("asr.v1.jobs.low.j-1");
        assert_eq!((priority, job), (Ok(Priority::Low), Ok(id("j-1"))));
        let (priority, job) = subjects.parse_job("asr.v1.jobs.urgent.j-1");
        assert_eq!((priority, job), (Err("urgent".into()), Ok(id("j-1"))));
        let (priority, job) = subjects.parse_job("asr.v1.jobs.high.>");
        assert!(priority == Ok(Priority::High) && job.is_err());
        let (priority, job) = subjects.parse_job("asr.v1.jobs.unknown.é");
        assert!(priority.is_err() && job.is_err());
        let (priority, job) = subjects.parse_job("elsewhere");
        assert!(priority.is_err() && job.is_err());
    }

    #[test]
    fn an_event_about_a_hostile_name_still_has_a_subject() {
        let subjects = Subjects::new("asr.v1");
        for hostile in ["..", "*", ">", "a b", "é", ""] {
            let event = Event::new(Scope::Session, hostile, What::Rejected, 0);
            let text = subjects.event(&event);
            assert_eq!(text, "asr.v1.event.session._invalid.rejected");
            assert!(subjects.parse(&text).is_some());
        }
    }

    #[test]
    fn filters_cover_what_they_say() {
        let subjects = Subjects::new("asr.v1");
        assert_eq!(subjects.finals_of(&Filter::All), "asr.v1.transcript.*.*.final");
        assert_eq!(subjects.partials_of(&Filter::Kind(Kind::Job)), "asr.v1.transcript.job.*.partial");
        assert_eq!(subjects.events_of(&Filter::One(Kind::Session, id("s"))), "asr.v1.event.session.s.*");
    }
}
