use voxfleet_schema::{failure::FailureClass, transcript::AudioRange};

use super::*;
use crate::session::tests::draft;

/// Samples of a part here.
const PART: u64 = 1_000;

fn naming() -> Naming {
    Naming {
        parent: StreamId::new("whole").expect("id"),
        submitted_ms: 1,
        part_samples: PART,
        vad: VadKind::Energy,
        model: "small".to_owned(),
        recording_bytes: 9,
    }
}

/// Finals of 400 samples each; the last one has the end.
fn finals(from: u64, to: u64, end: bool) -> Vec<FinalDraft> {
    let cuts: Vec<u64> = (from..to).step_by(400).chain([to]).collect();
    let pairs = cuts.windows(2).enumerate();
    pairs
        .map(|(n, pair)| FinalDraft {
            from_sample: pair[0],
            to_sample: pair[1],
            audio: AudioRange { from_seq: pair[0], to_seq: pair[1] },
            end: end && n + 2 == cuts.len(),
            ..draft()
        })
        .collect()
}

fn cut(from: u64, to: u64, end: bool) -> Parts {
    let mut parts = Parts::new(naming(), 0, 0, false);
    for draft in finals(from, to, end) {
        parts.cut(&draft).expect("a name");
    }
    parts.locked("en").expect("a name");
    parts
}

/// Nobody has begun anything.
fn free(from: u64, to: u64, now: Instant) -> Parts {
    let mut parts = cut(from, to, true);
    loop {
        let unseen = parts.to_look_at();
        if unseen.is_empty() {
            return parts;
        }
        for (number, _) in unseen {
            assert!(parts.seen(number, None, now), "it was not known to be free");
        }
    }
}

fn begun(index: u64) -> Option<Seen> {
    Some(Seen { index, end: false, error: None })
}

fn done() -> Option<Seen> {
    Some(Seen { index: 9, end: true, error: None })
}

#[test]
fn parts_are_the_finals_that_begin_in_the_same_stretch() {
    let parts = cut(0, 3_000, true);
    let request = |parts: &Parts, number| {
        let part = parts.request(number).expect("a whole part");
        (part.from_sample(), part.until_sample)
    };
    // 0, 400, 800 | 1200, 1600 | 2000, 2400, 2800 to the end
    assert_eq!([0, 1, 2].map(|n| request(&parts, n)), [(0, Some(1_200)), (1_200, Some(2_000)), (2_000, None)]);
    assert_eq!(parts.request(1).and_then(|part| part.from?.resume.language).as_deref(), Some("en"), "the locked one");
    assert_eq!(parts.request(3), None);

    // Cut from inside a part on, those behind it are the same.
    let late = cut(400, 3_000, true);
    assert_eq!(late.request(0), None, "where it begins is not known");
    assert_eq!([1, 2].map(|n| late.request(n)), [1, 2].map(|n| parts.request(n)));
    let unfinished = cut(0, 1_600, false);
    assert!(unfinished.request(0).is_some());
    assert_eq!(unfinished.request(1), None, "more of it may come");
}

#[test]
fn a_part_is_named_after_all_that_shapes_its_text() {
    let name = |naming: &Naming, number, language| naming.id(number, language).expect("a name");
    let mine = name(&naming(), 3, "en");
    assert!(mine.as_str().starts_with("whole-0003-"), "{mine}");
    assert_eq!(name(&naming(), 3, "en"), mine);
    let others = [
        name(&naming(), 4, "en"),
        name(&naming(), 3, "de"),
        name(&Naming { parent: StreamId::new("whole2").expect("id"), ..naming() }, 3, "en"),
        name(&Naming { submitted_ms: 2, ..naming() }, 3, "en"),
        name(&Naming { part_samples: 2, ..naming() }, 3, "en"),
        name(&Naming { vad: VadKind::Silero, ..naming() }, 3, "en"),
        name(&Naming { model: "base".to_owned(), ..naming() }, 3, "en"),
        name(&Naming { recording_bytes: 8, ..naming() }, 3, "en"),
    ];
    assert!(!others.contains(&mine));
    let long = Naming { parent: StreamId::new("x".repeat(64)).expect("id"), ..naming() };
    assert!(name(&long, u64::MAX, "en").as_str().len() <= 64);
}

#[test]
fn nothing_is_given_out_before_the_language_is_locked_or_of_a_short_recording() {
    let now = Instant::now();
    let mut parts = Parts::new(naming(), 2_500, 0, false);
    for draft in finals(0, 2_400, false) {
        parts.cut(&draft).expect("a name");
    }
    parts.locked("en").expect("a name");
    assert_eq!((parts.open(), parts.to_look_at().len(), parts.turn(now)), (false, 0, Turn::Direct { until: None }));
    for draft in finals(2_400, 3_200, true) {
        parts.cut(&draft).expect("a name");
    }
    assert!(parts.open(), "it is longer than it was known to be");
    parts.close();
    assert_eq!((parts.turn(now), parts.to_give_out()), (Turn::Direct { until: None }, Vec::new()));

    let mut unlocked = Parts::new(naming(), 0, 0, false);
    for draft in finals(0, 3_000, true) {
        unlocked.cut(&draft).expect("a name");
    }
    assert_eq!((unlocked.open(), unlocked.turn(now)), (false, Turn::Direct { until: None }));
    let before = unlocked.id(1).cloned();
    unlocked.locked("de").expect("a name");
    assert!(unlocked.open() && unlocked.id(1) != before.as_ref(), "its name says the language");
}

#[test]
fn who_has_the_whole_does_what_nobody_else_does_and_in_order() {
    let now = Instant::now();
    let mut parts = free(0, 5_000, now);
    assert_eq!(parts.turn(now), Turn::Part(0), "the first, which nobody has");
    assert_eq!(parts.to_give_out(), [1, 2, 3, 4], "the others are for others");
    for number in [1, 2, 3] {
        parts.given_out(number);
    }
    parts.ours(0, now);
    for number in [1, 2] {
        parts.seen(number, begun(0), now);
    }
    parts.over(Some(0), true, now);
    assert_eq!(parts.turn(now), Turn::Part(4), "that nobody was asked for");
    parts.ours(4, now);
    parts.over(Some(4), true, now);
    assert_eq!(parts.turn(now), Turn::Part(3), "that nobody has begun");
    let mut two = free(0, 5_000, now);
    (1..5).for_each(|number| two.given_out(number));
    two.seen(0, begun(0), now);
    assert_eq!(two.turn(now), Turn::Part(4), "the last of them: others begin with the first");
    parts.seen(3, begun(0), now);
    parts.stored(1_200);
    assert_eq!(parts.head().map(|(number, _)| number), Some(1));
    assert_eq!(parts.turn(now), Turn::Wait, "others are at all of them");
    parts.seen(1, begun(1), now + STALLED / 2);
    let later = now + STALLED;
    assert_eq!(parts.turn(later), Turn::Wait, "it has grown meanwhile");
    assert_eq!(parts.turn(later + STALLED / 2), Turn::Part(1), "nobody seems to be at it any more");
    parts.seen(1, done(), later);
    parts.stored(2_000);
    assert_eq!(parts.turn(later), Turn::Part(2));
}

#[test]
fn with_one_slot_in_all_the_fleet_everything_is_done_in_order() {
    let now = Instant::now();
    let mut parts = free(0, 20_000, now);
    let mut order = Vec::new();
    while let Turn::Part(number) = parts.turn(now) {
        for other in parts.to_give_out() {
            parts.given_out(other);
        }
        assert!(parts.parts.values().filter(|part| part.state == State::Asked).count() <= MOST_WAITING);
        parts.ours(number, now);
        parts.over(Some(number), true, now);
        let to = parts.parts[&number].bounds.back().expect("a final").to_sample;
        order.push(number);
        parts.stored(to);
    }
    assert_eq!(order, (0..20).collect::<Vec<_>>());
    assert_eq!(parts.turn(now), Turn::Wait, "all of it stands");

    // The chain of the whole need not have caught up.
    let mut parts = free(0, 5_000, now);
    for number in 0..5 {
        assert_eq!(parts.turn(now), Turn::Part(number));
        parts.ours(number, now);
        parts.over(Some(number), true, now);
    }
    assert_eq!((parts.turn(now), parts.head().map(|(number, _)| number)), (Turn::Wait, Some(0)));
}

#[test]
fn what_has_begun_in_the_chain_of_the_whole_is_gone_on_with_there() {
    let now = Instant::now();
    let mut parts = free(0, 3_000, now);
    parts.direct = true;
    assert_eq!(parts.turn(now), Turn::Direct { until: Some(1_200) }, "to the end of its part");
    parts.stored(400);
    parts.over(None, false, now);
    assert_eq!(parts.turn(now), Turn::Direct { until: Some(1_200) }, "another worker would begin it anew");
    parts.stored(1_200);
    assert_eq!(parts.turn(now), Turn::Part(1));

    // What others cannot do either.
    parts.failed(1, Failure::new(FailureClass::Forbidden, "x"));
    assert_eq!(parts.turn(now), Turn::Direct { until: Some(2_000) });
    parts.seen(1, begun(3), now);
    assert_eq!(parts.turn(now), Turn::Direct { until: Some(2_000) }, "for good");
}

#[test]
fn who_takes_the_whole_over_goes_on_with_what_stands_in_the_chains_of_parts() {
    let now = Instant::now();
    // The chain of the whole ends inside the first part.
    let mut parts = cut(400, 5_000, true);
    parts.stored(400);
    assert_eq!(parts.turn(now), Turn::Direct { until: Some(1_200) }, "for all that is known");
    assert_eq!(parts.to_give_out(), Vec::<u64>::new(), "nothing that nobody has looked at");
    let found = [(0, begun(2)), (1, done()), (2, begun(1)), (3, None), (4, None)];
    for (number, seen) in found {
        parts.seen(number, seen, now);
    }
    assert_eq!(parts.turn(now), Turn::Part(3), "the first is copied");
    assert_eq!(parts.to_give_out(), [2, 3, 4], "who has the third keeps it, if anybody has");
    parts.given_out(2);
    assert_eq!(parts.to_give_out(), [3, 4]);
    assert_eq!(parts.rest(0).until_sample, Some(1_200), "to be gone on with behind what stands in its chain");
}

#[test]
fn not_everything_waits_in_the_queue_at_once() {
    let now = Instant::now();
    let mut parts = free(0, 200_000, now);
    let first = parts.to_give_out();
    assert_eq!(first, (1..=MOST_WAITING as u64).collect::<Vec<_>>());
    first.iter().for_each(|number| parts.given_out(*number));
    assert_eq!(parts.to_give_out(), Vec::<u64>::new());
    for number in first {
        parts.seen(number, begun(0), now);
    }
    assert_eq!(parts.to_give_out().len(), MOST_WAITING, "as soon as they are begun");
    for number in 1..=MOST_ABROAD as u64 {
        parts.given_out(number);
        parts.seen(number, begun(0), now);
    }
    assert_eq!(parts.to_give_out(), Vec::<u64>::new(), "others have enough");
}
