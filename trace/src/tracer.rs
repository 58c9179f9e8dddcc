//! What whoever does something is given to tell of it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::mpsc;
use voxfleet_schema::trace::TraceContext;

use crate::{
    export::{self, Lost},
    span::Span,
};

/// Whose spans these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    Dispatcher,
    Worker,
}

impl Service {
    pub fn as_str(self) -> &'static str {
        match self {
            Service::Dispatcher => "voxfleet-dispatcher",
            Service::Worker => "voxfleet-worker",
        }
    }
}

/// Takes spans. Clones tell the same collector. One that is off costs a look at a pointer.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    queue: mpsc::Sender<Span>,
    /// Share of the traces begun here that are told.
    ratio: f64,
    dropped: Arc<AtomicU64>,
}

impl Tracer {
    /// Nothing is told, and no trace begun.
    pub fn off() -> Self {
        Self(None)
    }

    /// For whoever looks at spans himself. `ratio`: of the traces that begin here.
    pub fn to(queue: mpsc::Sender<Span>, ratio: f64) -> Self {
        Self::new(queue, ratio, Arc::default())
    }

    pub(crate) fn new(queue: mpsc::Sender<Span>, ratio: f64, dropped: Arc<AtomicU64>) -> Self {
        Self(Some(Arc::new(Inner { queue, ratio, dropped })))
    }

    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Spans of this trace are told.
    pub fn tells(&self, trace: Option<&TraceContext>) -> bool {
        self.is_on() && trace.is_some_and(TraceContext::is_sampled)
    }

    /// The trace of something that comes in, and its own first span in it. One that its producer began is gone on with: if it
    /// is told here, below a span of our own. Without one a trace is begun, where this is on.
    pub fn open(&self, given: Option<TraceContext>) -> Option<TraceContext> {
        match (&self.0, given) {
            (None, given) => given,
            (Some(_), Some(given)) if given.is_sampled() => Some(given.with_span(random().1)),
            (Some(_), Some(given)) => Some(given),
            (Some(inner), None) => {
                let (trace_id, span_id) = random();
                TraceContext::new(trace_id, span_id, samples(trace_id, inner.ratio))
            }
        }
    }

    /// The span that something which begins now may be, below `parent`. None: it is not told.
    pub fn part_of(&self, parent: Option<&TraceContext>) -> Option<TraceContext> {
        parent.filter(|parent| self.tells(Some(parent))).map(|parent| parent.with_span(random().1))
    }

    /// Tells of a span that is over. Never waits: what there is no room for is dropped and counted.
    pub fn record(&self, span: Span) {
        let Some(inner) = self.0.as_ref().filter(|_| span.context.is_sampled()) else { return };
        if inner.queue.try_send(span).is_err() {
            inner.dropped.fetch_add(1, Ordering::Relaxed);
            export::dropped(Lost::Full, 1);
        }
    }
}

/// Random ids of a trace and a span, neither of them nought.
fn random() -> (u128, u64) {
    let id = uuid::Uuid::new_v4().as_u128();
    // Version and variant of a UUID lie in fixed places; folded they are random again.
    (id, ((id >> 64) as u64 ^ (id as u64).rotate_left(32)).max(1))
}

/// Everybody who asks about a trace comes to the same answer: its id decides.
fn samples(trace_id: u128, ratio: f64) -> bool {
    // The last 56 bits are random wherever ids are made as the W3C asks for; as many of them as a float holds.
    let part = (trace_id as u64 & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64;
    part < ratio
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(ratio: f64, places: usize) -> (Tracer, mpsc::Receiver<Span>, Arc<AtomicU64>) {
        let (queue, spans) = mpsc::channel(places);
        let dropped = Arc::new(AtomicU64::new(0));
        (Tracer::new(queue, ratio, Arc::clone(&dropped)), spans, dropped)
    }

    fn given(sampled: bool) -> TraceContext {
        TraceContext::new(7, 9, sampled).expect("a context")
    }

    #[test]
    fn what_a_producer_began_is_gone_on_with_and_obeyed() {
        let (on, ..) = on(1.0, 1);
        let off = Tracer::off();
        assert_eq!(off.open(None), None);
        assert_eq!(off.open(Some(given(true))), Some(given(true)), "passed on");
        let opened = on.open(Some(given(true))).expect("a trace");
        assert!(opened.trace_id() == 7 && opened.span_id() != 9 && opened.is_sampled());
        assert_eq!(on.open(Some(given(false))), Some(given(false)), "nothing of ours stands in between");
        assert!(
            on.tells(Some(&opened)) && !on.tells(Some(&given(false))) && !on.tells(None) && !off.tells(Some(&opened))
        );
        assert_eq!((on.part_of(Some(&given(false))), on.part_of(None), off.part_of(Some(&opened))), (None, None, None));
        let part = on.part_of(Some(&opened)).expect("told");
        assert!(part.trace_id() == 7 && part.span_id() != opened.span_id());
    }

    #[test]
    fn the_ratio_decides_about_traces_begun_here() {
        for (ratio, least, most) in [(0.0, 0, 0), (0.25, 300, 700), (1.0, 2_000, 2_000)] {
            let (tracer, ..) = on(ratio, 1);
            let begun = (0..2_000).filter_map(|_| tracer.open(None));
            let sampled = begun.filter(TraceContext::is_sampled).count();
            assert!((least..=most).contains(&sampled), "{sampled} of 2000 at {ratio}");
        }
        assert!(
            !samples(u128::MAX, 0.999_999)
                && samples(u128::MAX, 1.0)
                && samples(1 << 64, 0.1)
                && !samples(1 << 64, 0.0)
        );
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let (tracer, mut spans, dropped) = on(1.0, 2);
        for n in 0..5 {
            tracer.record(Span::below(&given(true), given(true).with_span(n + 20), "x", n));
        }
        tracer.record(Span::below(&given(false), given(false).with_span(1), "unsampled", 0));
        assert_eq!(dropped.load(Ordering::Relaxed), 3);
        assert_eq!([spans.try_recv(), spans.try_recv()].map(|span| span.map(|s| s.start_ns)), [Ok(0), Ok(1)]);
        assert!(spans.try_recv().is_err());
    }
}
