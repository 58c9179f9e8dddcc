use voxfleet_schema::trace::TraceContext;
use voxfleet_trace::{Span, Tracer, Value};

use super::*;

const GIVEN: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn given() -> TraceContext {
    TraceContext::parse(GIVEN).expect("a context")
}

fn traced(gpus: u32) -> World {
    let mut world = World::new(gpus);
    // Nobody takes from it: spans are looked at before they get there.
    world.core.set_tracer(Tracer::to(tokio::sync::mpsc::channel(1).0, 1.0));
    world
}

impl World {
    fn spans(&mut self, name: &str) -> Vec<Span> {
        let all = self.kept.iter().filter_map(|effect| match effect {
            Effect::Span(span) => Some(span.as_ref().clone()),
            _ => None,
        });
        all.filter(|span| span.name == name).collect()
    }

    /// What the worker asked last was given, and its answer.
    fn handed(&mut self) -> Option<TraceContext> {
        let at = self.kept.iter().rposition(|effect| matches!(effect, Effect::Ask { .. })).expect("asked");
        let Effect::Ask { worker, assignment } = self.kept.remove(at) else { unreachable!("just found") };
        self.core.asked(&assignment.id, assignment.epoch, &worker, AskReply::Taken, self.now);
        self.run();
        assignment.traceparent
    }

    fn speak(&mut self, headers: &[(&str, &str)]) -> Option<TraceContext> {
        self.keep = |effect| matches!(effect, Effect::Ask { .. } | Effect::Span(_));
        self.entry("s", 1, headers, b"ab");
        self.handed()
    }
}

fn text(span: &Span, name: &str) -> Option<String> {
    span.attributes.iter().find(|(key, _)| *key == name).map(|(_, value)| match value {
        Value::Text(text) => text.clone(),
        other => format!("{other:?}"),
    })
}

#[test]
fn a_session_is_part_of_its_producers_trace_and_so_is_who_takes_it_over() {
    let mut world = traced(2);
    let handed = world.speak(&[("traceparent", GIVEN)]).expect("a trace");
    let trace = world.record("s").traceparent.expect("in the key");
    assert_eq!((trace.trace_id(), handed), (given().trace_id(), trace.below("assign", 1)));
    let [open] = &world.spans("session.open")[..] else { panic!("{:?}", world.kept) };
    assert_eq!((open.context, open.parent), (trace, Some(given().span_id())));
    let [assign] = &world.spans("session.assign")[..] else { panic!("{:?}", world.kept) };
    assert_eq!((assign.context, assign.parent, assign.error), (handed, Some(trace.span_id()), None));
    let first = text(assign, "gpu").expect("a gpu");

    // Its worker falls silent.
    let other = u32::from(first == "g0");
    world.seconds(6, |w| w.beat(other, |_| ()));
    assert_eq!(world.handed(), Some(trace.below("assign", 2)));
    let moved = world.spans("session.move").pop().expect("told");
    assert_eq!((moved.context.trace_id(), moved.parent), (trace.trace_id(), Some(trace.span_id())));
    assert_eq!((text(&moved, "from_gpu"), text(&moved, "why")), (Some(first), Some("dead".to_owned())));
}

#[test]
fn a_successor_names_the_same_span_when_it_asks_again() {
    let mut world = traced(1);
    let record = SessionRecord {
        state: SessionState::Assigned,
        epoch: 4,
        worker: Some(worker("g0", "i")),
        traceparent: Some(given()),
        ..world_record("s")
    };
    world.keep = |effect| matches!(effect, Effect::Ask { .. } | Effect::Span(_));
    world.core.recover(Loaded { record: Some((record, 9)), last: Some((5, true)), ..Loaded::default() }, world.now);
    world.run();
    // Its worker does not hold it.
    world.seconds(3, |w| w.beat(0, |_| ()));
    assert_eq!(world.handed(), Some(given().below("assign", 4)));
    assert!(world.spans("session.open").is_empty(), "that was told when it was opened");
}

#[test]
fn what_is_not_told_is_handed_on_as_it_came() {
    type Made = fn(u32) -> World;
    let unsampled = GIVEN.replace("-01", "-00");
    let (off, on): (Made, Made) = (World::new, traced);
    for (name, world, header) in [
        ("off", off, Some(GIVEN)),
        ("off, and nothing given", off, None),
        ("not sampled", on, Some(unsampled.as_str())),
    ] {
        let mut world = world(1);
        let headers: Vec<_> = header.into_iter().map(|header| ("traceparent", header)).collect();
        let handed = world.speak(&headers);
        assert_eq!(handed, header.and_then(TraceContext::parse), "{name}");
        assert_eq!(world.record("s").traceparent, handed, "{name}");
        assert!(!world.kept.iter().any(|effect| matches!(effect, Effect::Span(_))), "{name}");
    }
    let own = traced(1).speak(&[("traceparent", "nonsense")]).expect("begun here");
    assert!(own.is_sampled() && own.trace_id() != given().trace_id());
}
