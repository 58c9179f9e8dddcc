//! What is told of a session to those who follow its trace: that it was taken over, and each final from the moment its last
//! sample was logged. Pure but for the clock and random ids.

use std::collections::VecDeque;

use voxfleet_schema::{
    id::Kind,
    trace::TraceContext,
    transcript::{Final, Revision},
};
use voxfleet_trace::{Span, Tracer, unix_ns};

use super::outputs::Names;

const MS: u64 = 1_000_000;
/// Entries whose time is remembered: a window of audio in chunks of a tenth of a second.
const MAX_DATED: usize = 512;

/// When entries were logged, for those that no final covers yet.
#[derive(Debug, Default)]
pub(super) struct Dated(VecDeque<(u64, u64)>);

impl Dated {
    pub(super) fn add(&mut self, seq: u64, logged_ms: u64) {
        if self.0.len() == MAX_DATED {
            self.0.pop_front();
        }
        self.0.push_back((seq, logged_ms));
    }

    /// When the entry was logged with which a final ends; forgets it and those before.
    pub(super) fn covered(&mut self, to_seq: u64) -> Option<u64> {
        let mut logged = None;
        while let Some((seq, at)) = self.0.front().copied().filter(|(seq, _)| *seq <= to_seq) {
            logged = (seq == to_seq).then_some(at);
            self.0.pop_front();
        }
        logged
    }
}

/// What is known of a final or revision on its way, for its span.
#[derive(Debug, Clone, Copy)]
pub(super) struct Course {
    /// Of its session, as its worker was told it.
    given: Option<TraceContext>,
    /// Its own span; none where nothing is told.
    own: Option<TraceContext>,
    /// Unix time in ms at which its last entry was logged.
    logged_ms: Option<u64>,
    /// When the engine had said it, in ns.
    drafted_ns: u64,
}

impl Course {
    pub(super) fn new(tracer: &Tracer, given: Option<TraceContext>, logged_ms: Option<u64>) -> Self {
        let own = tracer.part_of(given.as_ref());
        Self { given, own, logged_ms, drafted_ns: if own.is_some() { unix_ns() } else { 0 } }
    }

    /// What whoever reads it goes on with.
    pub(super) fn header(&self) -> Option<TraceContext> {
        self.own.or(self.given)
    }

    /// Now, where that will be told.
    pub(super) fn begins(&self) -> u64 {
        if self.own.is_some() { unix_ns() } else { 0 }
    }

    /// The final stands.
    pub(super) fn stored(&self, tracer: &Tracer, names: &Names, value: &Final, publish_ns: u64) {
        let Some((given, own)) = self.given.zip(self.own) else { return };
        let end_ns = unix_ns();
        let timings = &value.timings;
        let decode_ns = self.drafted_ns.saturating_sub(timings.decode_ms * MS);
        let queued_ns = decode_ns.saturating_sub(timings.queued_ms * MS);
        let start_ns = self.logged_ms.map_or(queued_ns, |ms| (ms * MS).min(queued_ns));
        let part = |name, from, to| Span::below(&own, tracer.part_of(Some(&own)).unwrap_or(own), name, from).until(to);
        tracer.record(part("queued", queued_ns, decode_ns));
        tracer.record(part("decode", decode_ns, self.drafted_ns));
        tracer.record(part("publish", publish_ns, end_ns));
        let span = Span::below(&given, own, "final", start_ns).until(end_ns);
        tracer.record(
            whose(span, names, value.epoch)
                .with("index", value.index)
                .with("model", value.model.as_str())
                .with("device", value.device.as_str())
                .with("queued_ms", timings.queued_ms)
                .with("decode_ms", timings.decode_ms)
                .with("publish_ms", end_ns.saturating_sub(publish_ns) / MS)
                .with("audio_ms", timings.audio_ms)
                .with("lag_ms", end_ns.saturating_sub(start_ns) / MS)
                .with("end", value.end)
                .failed(value.error.as_ref().map(|error| error.class)),
        );
    }

    /// The aggregate that it is to name has been written.
    pub(super) fn aggregated(&self, tracer: &Tracer, names: &Names, epoch: u64, begun_ns: u64) {
        let Some(given) = self.given else { return };
        part(tracer, &given, "job.publish", begun_ns, (names, epoch), |span| span);
    }

    /// The revision stands.
    pub(super) fn revised(&self, tracer: &Tracer, names: &Names, value: &Revision) {
        let Some((given, own)) = self.given.zip(self.own) else { return };
        let span = Span::below(&given, own, "revision", self.drafted_ns).until(unix_ns());
        tracer.record(whose(span, names, value.epoch).with("index", value.index));
    }
}

/// Tells of what was done until now for something that is part of `given`.
pub(crate) fn part(
    tracer: &Tracer,
    given: &TraceContext,
    name: &'static str,
    begun_ns: u64,
    (names, epoch): (&Names, u64),
    with: impl FnOnce(Span) -> Span,
) {
    if let Some(own) = tracer.part_of(Some(given)) {
        tracer.record(with(whose(Span::below(given, own, name, begun_ns).until(unix_ns()), names, epoch)));
    }
}

/// With the names that logs have too.
pub(crate) fn whose(span: Span, names: &Names, epoch: u64) -> Span {
    let kind = match names.kind {
        Kind::Job => "job",
        Kind::Session | Kind::Unknown => "session",
    };
    span.with(kind, names.id.as_str()).with("gpu", names.gpu_id.as_str()).with("epoch", epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_final_begins_when_its_last_entry_was_logged() {
        let mut dated = Dated::default();
        for (seq, at) in [(3, 100), (5, 200), (9, 300)] {
            dated.add(seq, at);
        }
        assert_eq!(dated.covered(2), None);
        assert_eq!(dated.covered(5), Some(200));
        assert_eq!(dated.covered(5), None, "asked once");
        assert_eq!(dated.covered(8), None, "an entry that was never here");
        assert_eq!(dated.covered(9), Some(300));
        for seq in 0..2_000 {
            dated.add(seq, seq);
        }
        assert_eq!((dated.0.len(), dated.covered(1_999)), (MAX_DATED, Some(1_999)));
    }

    #[test]
    fn what_is_not_told_is_passed_on_as_it_came() {
        let given = TraceContext::new(1, 2, true);
        let course = Course::new(&Tracer::off(), given, None);
        assert_eq!((course.header(), course.begins()), (given, 0));
        assert_eq!(Course::new(&Tracer::off(), None, None).header(), None);
    }
}
