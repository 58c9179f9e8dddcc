use proptest::prelude::*;

use super::*;

const FREE: Limits = Limits { min_speakers: None, max_speakers: None };
const TUNING: Tuning = Tuning {
    open: 0.5,
    open_ms: 1_000,
    apart: 0.6,
    voice: 0.1,
    margin: 0.15,
    offline: 0.4,
    doubt_ms: 0.0,
    least_ms: 0,
};

/// A piece that lasts two seconds from a second on; embeddings lie in a plane, by degrees.
fn piece(second: u64, track: u32, degrees: Option<f32>, reliable_ms: u32) -> Voiced {
    Voiced {
        from_sample: second * 16_000,
        to_sample: (second + 2) * 16_000,
        track,
        overlapped: false,
        embedding: degrees.map(|d| vec![d.to_radians().cos(), d.to_radians().sin(), 0.0]),
        reliable_ms,
    }
}

/// One piece after another, each a track of its own.
fn pieces(degrees: &[f32]) -> Vec<Voiced> {
    degrees.iter().enumerate().map(|(i, d)| piece(2 * i as u64, i as u32, Some(*d), 2_000)).collect()
}

fn labels(assigned: &[Assigned]) -> Vec<u32> {
    assigned.iter().map(|a| a.label).collect()
}

/// Each piece in a stretch of its own.
fn one_by_one(voices: &mut Voices, pieces: &[Voiced], limits: Limits) -> Vec<u32> {
    pieces.iter().flat_map(|p| labels(&voices.hear(std::slice::from_ref(p), limits, &TUNING))).collect()
}

#[test]
fn people_are_numbered_as_they_show() {
    let turns = pieces(&[0.0, 90.0, 5.0, 180.0, 95.0, 270.0]);
    let mut voices = Voices::new("e");
    assert_eq!(labels(&voices.hear(&turns, FREE, &TUNING)), [1, 2, 1, 3, 2, 4]);
    assert_eq!(voices.labels(), 4);
    assert_eq!(one_by_one(&mut Voices::new("e"), &turns, FREE), [1, 2, 1, 3, 2, 4]);
    assert_eq!(labels(&voices.hear(&pieces(&[265.0, 2.0]), FREE, &TUNING)), [4, 1]);
}

#[test]
fn numbers_follow_the_first_turn_even_if_it_was_the_least_sure() {
    // The second track says more and is decided first; the first one shows first.
    let turns = [piece(0, 0, Some(0.0), 1_200), piece(3, 1, Some(120.0), 2_000), piece(6, 2, Some(118.0), 1_900)];
    assert_eq!(labels(&Voices::new("e").hear(&turns, FREE, &TUNING)), [1, 2, 2]);
}

#[test]
fn a_short_turn_opens_nothing_unless_nobody_is_known() {
    let mut voices = Voices::new("e");
    assert_eq!(one_by_one(&mut voices, &[piece(0, 0, Some(0.0), 300)], FREE), [1]);
    let rest = [piece(2, 0, Some(5.0), 2_000), piece(4, 0, Some(170.0), 900), piece(6, 0, Some(170.0), 1_000)];
    assert_eq!(one_by_one(&mut voices, &rest, FREE), [1, 1, 2]);
    assert_eq!(one_by_one(&mut voices, &[piece(8, 0, Some(120.0), 400)], FREE), [2]);
}

#[test]
fn what_cannot_be_heard_goes_to_its_track_or_to_whoever_spoke_before() {
    let mut voices = Voices::new("e");
    let unheard = |second, track| piece(second, track, None, 0);
    assert_eq!(one_by_one(&mut voices, &[unheard(0, 0), unheard(2, 0)], FREE), [1, 1]);
    // The first person is whoever is heard first.
    assert_eq!(one_by_one(&mut voices, &pieces(&[10.0, 100.0]), FREE), [1, 2]);
    assert_eq!(one_by_one(&mut voices, &[unheard(6, 0)], FREE), [2]);
    let turns = [piece(8, 0, Some(10.0), 2_000), piece(11, 1, Some(100.0), 2_000), unheard(14, 0), unheard(17, 5)];
    assert_eq!(labels(&voices.hear(&turns, FREE, &TUNING)), [1, 2, 1, 1]);
}

#[test]
fn limits_are_kept() {
    let turns = pieces(&[0.0, 90.0, 180.0, 20.0, 50.0]);
    let most = Limits { max_speakers: Some(2), ..FREE };
    assert_eq!(one_by_one(&mut Voices::new("e"), &turns, most), [1, 2, 2, 1, 1]);
    assert_eq!(one_by_one(&mut Voices::new("e"), &turns, Limits { max_speakers: Some(1), ..FREE }), [1; 5]);
    // 50 degrees are 0.36: one person, unless two are expected.
    let near = pieces(&[0.0, 50.0]);
    assert_eq!(one_by_one(&mut Voices::new("e"), &near, FREE), [1, 1]);
    assert_eq!(one_by_one(&mut Voices::new("e"), &near, Limits { min_speakers: Some(2), ..FREE }), [1, 2]);
}

#[test]
fn who_speaks_at_the_same_time_is_somebody_else() {
    let at_once = [piece(0, 0, Some(0.0), 2_000), piece(1, 1, Some(10.0), 1_500)];
    assert_eq!(labels(&Voices::new("e").hear(&at_once, FREE, &TUNING)), [1, 2]);
    let one_after_the_other = [piece(0, 0, Some(0.0), 2_000), piece(2, 1, Some(10.0), 1_500)];
    assert_eq!(labels(&Voices::new("e").hear(&one_after_the_other, FREE, &TUNING)), [1, 1]);
    // Where only one person is allowed, it is that one.
    let one = Limits { max_speakers: Some(1), ..FREE };
    assert_eq!(labels(&Voices::new("e").hear(&at_once, one, &TUNING)), [1, 1]);
}

#[test]
fn a_track_of_two_people_is_taken_apart() {
    let turns = [piece(0, 0, Some(0.0), 2_000), piece(2, 0, Some(4.0), 2_000), piece(4, 0, Some(130.0), 2_000)];
    assert_eq!(labels(&Voices::new("e").hear(&turns, FREE, &TUNING)), [1, 1, 2]);
    // Between two known people, a piece of a track that is nearer to the other one.
    let mut voices = Voices::new("e");
    voices.hear(&pieces(&[0.0, 80.0]), FREE, &TUNING);
    let turns = [piece(10, 0, Some(0.0), 4_000), piece(12, 0, Some(55.0), 1_500)];
    assert_eq!(labels(&voices.hear(&turns, FREE, &TUNING)), [1, 2]);
}

#[test]
fn later_knowledge_keeps_old_labels_where_it_can() {
    // Opened as two people by two far pieces; what lies between shows that they are one.
    let mut voices = Voices::new("e");
    let said = voices.hear(&pieces(&[0.0, 62.0, 200.0]), FREE, &TUNING);
    assert_eq!(labels(&said), [1, 2, 3]);
    for degrees in [30.0, 33.0, 28.0, 35.0] {
        voices.hear(&pieces(&[degrees]), FREE, &TUNING);
    }
    let labels_now = voices.reconsider(FREE, &TUNING);
    let of = |index: usize| labels_now[&said[index].voice];
    assert_eq!((of(0), of(1), of(2)), (1, 1, 3));
    // With three expected, they stay three, and whoever never was the first gets a number that nobody has had.
    let three = voices.reconsider(Limits { min_speakers: Some(3), ..FREE }, &TUNING);
    let people = [0, 1, 2].map(|index: usize| three[&said[index].voice]);
    assert_eq!(people, [4, 1, 3], "most of what the first label said is nearer to the second piece");
    voices.adopt(&labels_now);
    assert_eq!(one_by_one(&mut voices, &pieces(&[60.0]), FREE), [1]);
    assert_eq!(one_by_one(&mut voices, &pieces(&[290.0]), FREE), [4], "a number that was shown is not used again");
}

#[test]
fn a_label_of_two_people_goes_to_who_said_more() {
    let mut voices = Voices::new("e");
    let limits = Limits { max_speakers: Some(1), ..FREE };
    let said = voices.hear(&pieces(&[0.0, 100.0, 3.0]), limits, &TUNING);
    assert_eq!(labels(&said), [1, 1, 1]);
    let labels_now = voices.reconsider(FREE, &TUNING);
    assert_eq!(labels_now[&said[0].voice], 1);
    assert_eq!(labels_now[&said[1].voice], 2);
    voices.adopt(&labels_now);
    assert_eq!((voices.labels(), one_by_one(&mut voices, &pieces(&[100.0]), FREE)), (2, vec![2]));
}

#[test]
fn another_encoder_forgets_voices_and_uses_no_label_again() {
    let mut voices = Voices::new("e");
    voices.hear(&pieces(&[0.0, 90.0]), FREE, &TUNING);
    assert_eq!(voices.clone().under("e"), voices);
    let mut other = voices.under("f");
    assert_eq!(other.encoder(), "f");
    assert_eq!(one_by_one(&mut other, &pieces(&[0.0]), FREE), [3]);
}

#[test]
fn who_chose_a_distance_has_all_of_them_in_proportion() {
    // 40 degrees are a distance of 0.23, 60 one of 0.5; the test's own measure is 0.5.
    let turns = pieces(&[0.0, 40.0, 62.0]);
    for (percent, said, people) in [(None, [1, 1, 1], 1), (Some(20), [1, 2, 2], 2), (Some(100), [1, 1, 1], 1)] {
        let mut voices = Voices::new(&encoder_name("e", percent));
        assert_eq!(one_by_one(&mut voices, &turns, FREE), said, "{percent:?}");
        let again: std::collections::BTreeSet<u32> = voices.reconsider(FREE, &TUNING).into_values().collect();
        assert_eq!(again.len(), people, "{percent:?}");
    }
    for odd in ["e/0", "e/x", "e/"] {
        assert_eq!(TUNING.of(odd), TUNING);
    }
    let half = TUNING.of("a/b/25");
    assert_eq!((half.open, half.apart, half.voice, half.margin, half.offline), (0.25, 0.3, 0.05, 0.075, 0.2));
}

/// Unlike each other in many dimensions, but all of one person.
fn many(count: usize) -> Vec<Voiced> {
    (0..count)
        .map(|i| {
            let mut embedding = vec![0.0; 64];
            embedding[0] = 0.8;
            embedding[1 + i % 63] = if (i / 63) % 2 == 0 { 0.6 } else { -0.6 };
            embedding[1 + (i / 7) % 63] += 0.2;
            Voiced { embedding: Some(embedding), ..piece(2 * i as u64, 0, None, 2_000) }
        })
        .collect()
}

#[test]
fn what_is_remembered_is_bounded() {
    let tuning = Tuning { voice: 0.01, ..TUNING };
    let limits = Limits { max_speakers: Some(2), ..FREE };
    let mut voices = Voices::new("e");
    let mut first = None;
    for turn in many(700) {
        let assigned = voices.hear(&[turn], limits, &tuning);
        first.get_or_insert(assigned[0].voice);
    }
    assert_eq!(voices.voices.len(), most_voices(64));
    assert!(!voices.absorbed.is_empty());
    let total: u64 = voices.voices.iter().map(|v| v.weight_ms).sum();
    assert_eq!(total, 700 * 2_000);
    // Voices that are part of others still have a label, and the state is small.
    let labels = voices.reconsider(limits, &tuning);
    assert!(voices.absorbed.iter().all(|(gone, _)| labels.contains_key(gone)) && labels.contains_key(&first.unwrap()));
    assert!(rmp_serde::to_vec_named(&voices).unwrap().len() < 64 << 10);
}

/// One person in so many dimensions, like nobody else.
fn person(who: usize, dims: usize) -> Voiced {
    let mut dice = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(who as u64 + 1) | 1;
    let mut embedding: Vec<f32> = Vec::with_capacity(dims);
    for _ in 0..dims {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        embedding.push(dice as f32 / u64::MAX as f32 - 0.5);
    }
    let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
    embedding.iter_mut().for_each(|x| *x /= length);
    // Who comes later says less: that is no reason to forget them first.
    Voiced { embedding: Some(embedding), ..piece(2 * who as u64, 0, None, 4_000 - 5 * who as u32) }
}

#[test]
fn hundreds_of_people_stay_apart_in_a_bounded_state() {
    for (dims, kept, most_bytes) in
        [(160, 128, 64 << 10), (192, 106, 64 << 10), (256, 80, 64 << 10), (512, 64, 80 << 10)]
    {
        assert_eq!(most_voices(dims), kept);
        let mut voices = Voices::new("e");
        let label = |voices: &mut Voices, who: usize| voices.hear(&[person(who, dims)], FREE, &TUNING)[0].label;
        for who in 0..500 {
            assert_eq!(label(&mut voices, who), who as u32 + 1, "{dims} dimensions");
            // One of them speaks all the time.
            assert_eq!(label(&mut voices, 7.min(who)), 8.min(who as u32 + 1));
        }
        assert_eq!(voices.voices.len(), kept);
        let bytes = rmp_serde::to_vec_named(&voices).unwrap().len();
        assert!(bytes < most_bytes, "{bytes} of {dims} dimensions");
        // Whoever spoke of late is known; who was silent for longer than so many others gets a label of their own again,
        // nobody else's.
        assert_eq!(label(&mut voices, 450), 451);
        assert_eq!(label(&mut voices, 3), 501);
        assert_eq!(voices.labels(), 501);
    }
}

#[test]
fn absorbed_voices_are_pairs_of_numbers_in_few_bytes() {
    let of = |absorbed: &[(u32, u32)]| Voices { absorbed: absorbed.to_vec(), ..Voices::new("e") };
    let plain = rmp_serde::to_vec_named(&of(&[])).unwrap().len();
    for (pairs, bytes) in [
        (vec![(1, 2)], 2),
        (vec![(127, 128), (16_383, 16_384)], 1 + 2 + 2 + 3),
        (vec![(u32::MAX, 0), (0, u32::MAX)], 2 * 6),
    ] {
        let packed = rmp_serde::to_vec_named(&of(&pairs)).unwrap();
        assert_eq!(packed.len() - plain, bytes);
        assert_eq!(rmp_serde::from_slice::<Voices>(&packed).unwrap().absorbed, pairs);
    }
    let mut json = serde_json::to_value(of(&[])).unwrap();
    for broken in [&[1u8][..], &[0x80], &[1, 0x80], &[0xff, 0xff, 0xff, 0xff, 0x10, 1]] {
        json["absorbed"] = serde_json::json!(broken);
        assert!(serde_json::from_value::<Voices>(json.clone()).is_err(), "{broken:?}");
    }
}

proptest! {
    #[test]
    fn a_state_that_travelled_goes_on_the_same(
        heard in prop::collection::vec((0f32..360.0, 0u32..3, 0u32..3_000, prop::bool::ANY), 1..25),
        seed in 0u64..1_000,
    ) {
        let stretches: Vec<Vec<Voiced>> = heard
            .chunks(3)
            .enumerate()
            .map(|(s, stretch)| {
                let at = |i: usize| (seed + 10 * s as u64) + 2 * i as u64;
                let piece = |(i, (d, t, ms, heard)): (usize, &(f32, u32, u32, bool))| {
                    piece(at(i), *t, heard.then_some(*d), *ms)
                };
                stretch.iter().enumerate().map(piece).collect()
            })
            .collect();
        let mut whole = Voices::new("e");
        let expected: Vec<Vec<Assigned>> = stretches.iter().map(|s| whole.hear(s, FREE, &TUNING)).collect();
        for cut in 0..=stretches.len() {
            let mut before = Voices::new("e");
            stretches[..cut].iter().for_each(|s| drop(before.hear(s, FREE, &TUNING)));
            let bytes = rmp_serde::to_vec_named(&before).unwrap();
            let mut after: Voices = rmp_serde::from_slice(&bytes).unwrap();
            prop_assert_eq!(&after, &before);
            let found: Vec<Vec<Assigned>> = stretches[cut..].iter().map(|s| after.hear(s, FREE, &TUNING)).collect();
            prop_assert_eq!(&found[..], &expected[cut..]);
            prop_assert_eq!(&after, &whole);
        }
        // Through JSON as well.
        let text = serde_json::to_string(&whole).unwrap();
        prop_assert_eq!(serde_json::from_str::<Voices>(&text).unwrap(), whole);
    }

    #[test]
    fn labels_show_in_order_and_are_reconsidered_one_to_one(
        degrees in prop::collection::vec(0f32..360.0, 1..30),
        most in prop::option::of(1usize..5),
    ) {
        let limits = Limits { max_speakers: most, ..FREE };
        let mut voices = Voices::new("e");
        let mut said = Vec::new();
        for turns in pieces(&degrees).chunks(4) {
            said.extend(voices.hear(turns, limits, &TUNING));
        }
        let mut highest = 0;
        for assigned in &said {
            prop_assert!(assigned.label <= highest + 1 && assigned.label > 0);
            highest = highest.max(assigned.label);
        }
        prop_assert!(most.is_none_or(|most| highest as usize <= most));
        prop_assert_eq!(voices.labels(), highest);
        let again = voices.reconsider(limits, &TUNING);
        prop_assert!(said.iter().all(|a| again.contains_key(&a.voice)));
        let people: std::collections::BTreeSet<u32> = again.values().copied().collect();
        prop_assert!(most.is_none_or(|most| people.len() <= most));
        // What was reconsidered once stays when nothing new was heard.
        voices.adopt(&again);
        prop_assert_eq!(voices.reconsider(limits, &TUNING), again);
    }
}
