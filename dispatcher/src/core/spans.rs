//! What is told of sessions and jobs to those who follow traces. Nothing here decides anything.
//!
//! A session or job has one trace, which its key carries. Its first span is that of its opening; the spans of its assignments
//! are below that, and have ids that follow from the key and the epoch: a successor that asks a worker again names the same.

use voxfleet_schema::{
    failure::FailureClass,
    id::{StreamId, WorkerName},
    job::{JobRecord, JobState},
    session::{SessionRecord, SessionState},
    trace::TraceContext,
};
use voxfleet_trace::{Span, Tracer};

use super::{Core, Effect};
use crate::moment::Moment;

/// Name of an assignment below its session's or job's first span.
const ASSIGN: &str = "assign";

/// Something has come in, and is not in its key yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opening {
    /// The producer's span.
    pub below: Option<u64>,
    /// Unix time in ms.
    pub since_ms: u64,
}

fn ns(ms: u64) -> u64 {
    ms.saturating_mul(1_000_000)
}

impl Core {
    /// Tells spans to this one.
    pub fn set_tracer(&mut self, tracer: Tracer) {
        self.tracer = tracer;
    }

    /// The trace of something that comes in now.
    pub(super) fn opens(&self, given: Option<TraceContext>, now: Moment) -> (Option<TraceContext>, Option<Opening>) {
        let trace = self.tracer.open(given);
        let told = self.tracer.tells(trace.as_ref());
        let opening = Opening { below: given.map(|given| given.span_id()), since_ms: now.unix_ms };
        (trace, told.then_some(opening))
    }

    /// What its worker goes on with.
    pub(super) fn handed(&self, trace: Option<&TraceContext>, epoch: u64) -> Option<TraceContext> {
        trace.map(|trace| if self.tracer.tells(Some(trace)) { trace.below(ASSIGN, epoch) } else { *trace })
    }

    fn told(&mut self, trace: Option<TraceContext>, span: impl FnOnce(&TraceContext) -> Span) {
        if let Some(trace) = trace.filter(|trace| self.tracer.tells(Some(trace))) {
            self.effect(Effect::Span(Box::new(span(&trace))));
        }
    }

    /// A part of it that nobody else will name.
    fn part(&self, trace: &TraceContext, name: &'static str, from_ms: u64, to_ms: u64) -> Span {
        let own = self.tracer.part_of(Some(trace)).unwrap_or(*trace);
        Span::below(trace, own, name, ns(from_ms)).until(ns(to_ms))
    }

    /// Its key says that it is open.
    pub(super) fn session_opened(&mut self, record: &SessionRecord, opening: Opening, now: Moment) {
        self.told(record.traceparent, |trace| {
            let span = Span::below(trace, *trace, "session.open", ns(opening.since_ms)).until(ns(now.unix_ms));
            Span { parent: opening.below, ..span }
                .with("session", record.id.as_str())
                .with("implicit", record.implicit)
                .with("waits", record.state == SessionState::Waiting)
                .with_some("model_asked", record.options.model.as_deref())
        });
    }

    /// A worker was asked: it took the session, or did not.
    pub(super) fn session_assigned(
        &mut self,
        record: &SessionRecord,
        worker: &WorkerName,
        refused: Option<FailureClass>,
        now: Moment,
    ) {
        let epoch = record.epoch;
        self.told(record.traceparent, |trace| {
            Span::below(trace, trace.below(ASSIGN, epoch), "session.assign", ns(record.changed_ms))
                .until(ns(now.unix_ms))
                .with("session", record.id.as_str())
                .with("gpu", worker.gpu_id.as_str())
                .with("incarnation", worker.incarnation.as_str())
                .with("epoch", epoch)
                .with("suspect", record.suspect)
                .failed(refused)
        });
    }

    /// Another worker has it than before.
    pub(super) fn session_moved(
        &mut self,
        record: &SessionRecord,
        (from, to): (&WorkerName, &WorkerName),
        why: &str,
        now: Moment,
    ) {
        let trace = record.traceparent;
        let Some(span) = trace.map(|trace| self.part(&trace, "session.move", record.changed_ms, now.unix_ms)) else {
            return;
        };
        self.told(trace, |_| {
            span.with("session", record.id.as_str())
                .with("gpu", to.gpu_id.as_str())
                .with("from_gpu", from.gpu_id.as_str())
                .with("epoch", record.epoch)
                .with("why", why)
        });
    }

    /// Its key says that it has ended.
    pub(super) fn session_closed(&mut self, record: &SessionRecord, now: Moment) {
        let trace = record.traceparent;
        let Some(span) = trace.map(|trace| self.part(&trace, "session.close", record.changed_ms, now.unix_ms)) else {
            return;
        };
        self.told(trace, |_| {
            span.with("session", record.id.as_str())
                .with("epoch", record.epoch)
                .with_some("end_seq", record.ended_seq)
                .with("open_ms", now.unix_ms.saturating_sub(record.opened_ms))
        });
    }

    /// Its key stands.
    pub(super) fn job_opened(&mut self, record: &JobRecord, opening: Opening, now: Moment) {
        self.told(record.traceparent, |trace| {
            let span = Span::below(trace, *trace, "job.submit", ns(opening.since_ms)).until(ns(now.unix_ms));
            Span { parent: opening.below, ..span }
                .with("job", record.id.as_str())
                .with_some("part_of", record.part.as_ref().map(|part| part.parent.as_str()))
                .with_some("model_asked", record.options.model.as_deref())
        });
    }

    /// Its work item lies where its worker takes it from.
    pub(super) fn job_assigned(&mut self, id: &StreamId, worker: &WorkerName, now: Moment) {
        let Some(record) = self.jobs.record(id).cloned() else {
            return;
        };
        self.told(record.traceparent, |trace| {
            Span::below(trace, trace.below(ASSIGN, record.epoch), "job.assign", ns(record.changed_ms))
                .until(ns(now.unix_ms))
                .with("job", record.id.as_str())
                .with("gpu", worker.gpu_id.as_str())
                .with("incarnation", worker.incarnation.as_str())
                .with("epoch", record.epoch)
                .with("attempt", u64::from(record.attempts))
                .with("waited_ms", record.changed_ms.saturating_sub(record.submitted_ms))
        });
    }

    pub(super) fn job_moved(&mut self, id: &StreamId, from: &WorkerName, to: &WorkerName, why: &str, now: Moment) {
        let Some(record) = self.jobs.record(id).cloned() else {
            return;
        };
        let trace = record.traceparent;
        let Some(span) = trace.map(|trace| self.part(&trace, "job.move", record.changed_ms, now.unix_ms)) else {
            return;
        };
        self.told(trace, |_| {
            span.with("job", record.id.as_str())
                .with("gpu", to.gpu_id.as_str())
                .with("from_gpu", from.gpu_id.as_str())
                .with("epoch", record.epoch)
                .with("why", why)
        });
    }

    pub(super) fn job_closed_span(&mut self, record: &JobRecord, now: Moment) {
        let trace = record.traceparent;
        let Some(span) = trace.map(|trace| self.part(&trace, "job.end", record.changed_ms, now.unix_ms)) else {
            return;
        };
        let error = record.error.as_ref().map(|error| error.class).filter(|_| record.state != JobState::Done);
        self.told(trace, |_| {
            span.with("job", record.id.as_str())
                .with("epoch", record.epoch)
                .with("state", record.state.as_str())
                .with("attempts", u64::from(record.attempts))
                .with_some("audio_ms", record.duration_ms)
                .with("open_ms", now.unix_ms.saturating_sub(record.submitted_ms))
                .failed(error)
        });
    }
}
