//! Events of jobs that are not yet at their end.

use voxfleet_schema::{
    event::What,
    id::StreamId,
    job::{AudioUrl, JobState},
};

use super::Core;
use crate::{core::instead, moment::Moment, routing::Rows};

impl Core {
    pub(super) fn tell_submitted(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        let detail = serde_json::json!({
            "priority": job.record.options.priority, "audio": AudioUrl::redacted(&job.record.audio),
            "name": job.record.name,
        });
        self.job_event(id, What::Submitted, now, |e| e.detail = detail);
    }

    pub(super) fn tell_assigned(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job_mut(id) else {
            return;
        };
        let epoch = job.record.epoch;
        let Some(worker) = job.record.worker.clone().filter(|_| job.told_epoch < epoch) else {
            return;
        };
        job.told_epoch = epoch;
        let reasons = std::mem::take(&mut job.reasons);
        let moved_from = job.moved_from.take().filter(|from| *from != worker);
        let mut detail = serde_json::json!({
            "incarnation": worker.incarnation, "attempt": job.record.attempts, "candidates": reasons,
        });
        let instead = job.record.instead.clone();
        let told = std::mem::replace(&mut job.told_instead, instead.clone());
        let asked = job.record.options.model.clone();
        instead::name_models(&mut detail, instead.as_ref());
        let trace = job.record.traceparent;
        self.log_job_slot("job assigned", id, epoch, &worker, trace.as_ref());
        self.job_assigned(id, &worker, now);
        let gpu_id = worker.gpu_id.to_string();
        if let Some(from) = moved_from {
            let why = self.why_moved(&from);
            self.job_moved(id, &from, &worker, why, now);
            self.job_event(id, What::Moved, now, |e| {
                (e.epoch, e.gpu_id) = (Some(epoch), Some(gpu_id.clone()));
                e.detail = serde_json::json!({ "from": from, "to": worker, "why": why });
            });
        }
        self.job_event(id, What::Assigned, now, |e| {
            (e.epoch, e.gpu_id, e.detail) = (Some(epoch), Some(gpu_id.clone()), detail);
        });
        if let Some((what, detail)) = self.news_of_instead(told.as_ref(), instead.as_ref(), asked, &worker) {
            tracing::warn!(job = %id, epoch, gpu = gpu_id, %detail, "{}", instead::in_words(what));
            self.job_event(id, what, now, |e| {
                (e.epoch, e.gpu_id, e.detail) = (Some(epoch), Some(gpu_id), detail);
            });
        }
    }

    pub(super) fn tell_job_waits(&mut self, id: &StreamId, now: Moment) {
        let Some(job) = self.jobs.book.job(id) else {
            return;
        };
        if job.told_waiting || !job.settled() || job.state() != JobState::Queued {
            return;
        }
        let (pick, reasons) = self.decide_job(job, |_| Some(Rows::Short), now);
        let ahead = self.jobs.book.ahead(&job.record);
        let paused = job.record.not_before_ms.is_some_and(|at| at > now.unix_ms);
        let error = if paused { job.record.error.clone() } else { pick.err() };
        if let Some(job) = self.jobs.book.job_mut(id) {
            job.told_waiting = true;
        }
        tracing::info!(job = %id, ahead, why = error.as_ref().map(tracing::field::display), "job waits");
        self.job_event(id, What::Waiting, now, |e| {
            e.error = error;
            e.detail = serde_json::json!({ "ahead": ahead, "candidates": reasons });
        });
    }
}
