use super::*;

fn session(id: &str) -> Name {
    (Kind::Session, StreamId::new(id).expect("id"))
}

fn job(id: &str) -> Name {
    (Kind::Job, StreamId::new(id).expect("id"))
}

fn at(name: &Name, from: u64) -> Doing {
    Doing { name: Some(name.clone()), at: from, stepping: false }
}

/// After any wait for another worker.
fn treated(suspects: &mut Suspects, name: &Name, from: u64) -> Treatment {
    suspects.treat(Instant::now() + LAST_TRY, name, from)
}

fn told(suspects: &Suspects, name: &Name) -> Option<u32> {
    let known = suspects.told(Instant::now(), name);
    known.suspect.then_some(known.crashes)
}

fn parked(treatment: &Treatment) -> Option<(u64, FailureClass)> {
    match treatment {
        Treatment::Park { at, failure, .. } => Some((*at, failure.class)),
        _ => None,
    }
}

#[test]
fn what_follows_from_deaths() {
    use Death::*;
    let (a, b, j) = (session("a"), session("b"), job("j"));
    let alone = |crashes| Treatment::Alone { beyond: 100, crashes };
    // Deaths with what was being decoded then, and how `a`, `b` and `j` are treated at sample 100 after them.
    type Case = (Vec<(Death, Vec<Doing>)>, [Treatment; 2]);
    let cases: Vec<Case> = vec![
        (vec![], [Treatment::Normal, Treatment::Normal]),
        (vec![(Crashed, vec![])], [Treatment::Normal, Treatment::Normal]),
        (vec![(Crashed, vec![at(&a, 100), at(&b, 100)])], [alone(0), alone(0)]),
        (vec![(Crashed, vec![at(&a, 100)])], [alone(1), Treatment::Normal]),
        (vec![(Killed, vec![at(&a, 100)]); 9], [Treatment::Normal, Treatment::Normal]),
        (vec![(Crashed, vec![at(&a, 100), at(&b, 100)]); 9], [alone(0), alone(0)]),
        (vec![(Crashed, vec![at(&a, 100)]); 2], [alone(2), Treatment::Normal]),
        // A stretch behind it is decoded alone until then; one before it is over.
        (vec![(Crashed, vec![at(&a, 300)])], [Treatment::Alone { beyond: 300, crashes: 1 }, Treatment::Normal]),
        (vec![(Crashed, vec![at(&a, 50)])], [Treatment::Normal, Treatment::Normal]),
        // Deaths on different stretches do not add up.
        (
            vec![(Crashed, vec![at(&a, 0)]), (Crashed, vec![at(&a, 100)]), (Crashed, vec![at(&a, 100)])],
            [alone(2), Treatment::Normal],
        ),
    ];
    for (deaths, [for_a, for_b]) in cases {
        let mut suspects = Suspects::default();
        for (death, decoding) in &deaths {
            suspects.died(Instant::now(), *death, decoding, false);
        }
        assert_eq!(treated(&mut suspects, &a, 100), for_a, "{deaths:?}");
        assert_eq!(treated(&mut suspects, &b, 100), for_b, "{deaths:?}");
        assert_eq!(treated(&mut suspects, &j, 100), Treatment::Normal, "{deaths:?}");
    }
}

#[test]
fn three_deaths_alone_park_a_stretch_and_one_gives_up_a_job() {
    let (a, j) = (session("a"), job("j"));
    let mut suspects = Suspects::default();
    let now = Instant::now();
    // A partial and a final of one input, or two stretches of it, are one input.
    suspects.died(now, Death::Crashed, &[at(&a, 100), at(&a, 100)], false);
    assert_eq!(told(&suspects, &a), Some(1));
    // Somebody closed meanwhile was decoded too: not alone.
    suspects.died(now, Death::Crashed, &[at(&a, 100), Doing { name: None, ..at(&a, 7) }], false);
    assert_eq!(told(&suspects, &a), Some(1));
    suspects.died(now, Death::Crashed, &[at(&a, 100)], false);
    suspects.died(now, Death::Stuck, &[at(&a, 100)], false);
    assert_eq!(parked(&treated(&mut suspects, &a, 40)), Some((100, FailureClass::Timeout)));
    suspects.passed(&a, 100);
    assert_eq!(told(&suspects, &a), Some(3), "the one before it");
    suspects.passed(&a, 101);
    assert_eq!((told(&suspects, &a), treated(&mut suspects, &a, 101)), (None, Treatment::Normal));

    suspects.died(now, Death::Crashed, &[at(&j, 0), at(&a, 200)], false);
    assert_eq!(treated(&mut suspects, &j, 0), Treatment::Alone { beyond: 0, crashes: 0 });
    suspects.died(now, Death::Crashed, &[at(&j, 0)], false);
    assert!(matches!(treated(&mut suspects, &j, 0), Treatment::GiveUp(f) if f.class == FailureClass::EngineCrash));
    suspects.begins(j.clone(), Known { suspect: true, ..Known::default() });
    assert_eq!(
        treated(&mut suspects, &j, 0),
        Treatment::Alone { beyond: 0, crashes: 0 },
        "given again it is a new try"
    );
    suspects.forget(&j);
    assert_eq!(treated(&mut suspects, &j, 0), Treatment::Normal);
}

/// What a worker tells about a session that has killed `crashes` engines alone, at this stretch.
fn others_say(crashes: u32, from: impl Into<Option<u64>>) -> Known {
    Known { suspect: true, crashes, from: from.into(), elsewhere: false }
}

#[test]
fn what_another_worker_knows_counts_for_that_stretch_and_no_other() {
    let a = session("a");
    let begun = |told: Known| {
        let mut suspects = Suspects::default();
        suspects.begins(a.clone(), told);
        suspects
    };
    let alone = |crashes| Treatment::Alone { beyond: 500, crashes };
    assert_eq!(treated(&mut begun(others_say(2, 500)), &a, 500), alone(2));
    assert_eq!(parked(&treated(&mut begun(others_say(3, 500)), &a, 500)), Some((500, FailureClass::EngineCrash)));
    assert_eq!(parked(&treated(&mut begun(others_say(3, 500)), &a, 100)), Some((500, FailureClass::EngineCrash)));
    for crashes in 0..5 {
        // Stored meanwhile: what comes behind it is innocent.
        let mut suspects = begun(others_say(crashes, 500));
        assert_eq!(treated(&mut suspects, &a, 501), Treatment::Normal, "{crashes}");
        assert_eq!(suspects.told(Instant::now(), &a), Known::default(), "{crashes}");
        assert_eq!(treated(&mut begun(others_say(crashes, None)), &a, 500), alone(0), "{crashes} on no stretch");
    }
    let mut suspects = begun(others_say(2, 500));
    suspects.died(Instant::now(), Death::Crashed, &[at(&a, 500)], false);
    assert_eq!(parked(&treated(&mut suspects, &a, 500)), Some((500, FailureClass::EngineCrash)));
    suspects.begins(a.clone(), Known::default());
    assert_eq!(treated(&mut suspects, &a, 500), Treatment::Normal);
}

#[test]
fn the_last_try_of_a_stretch_is_anothers_and_poison_stays_with_the_second() {
    let (a, now) = (session("a"), Instant::now());
    let mut first = Suspects::default();
    first.died(now, Death::Crashed, &[at(&a, 100)], false);
    assert!(!first.told(now, &a).elsewhere);
    first.died(now, Death::Crashed, &[at(&a, 100)], false);
    let told = first.told(now, &a);
    assert_eq!(told, Known { elsewhere: true, ..others_say(2, 100) });
    assert_eq!(first.treat(now, &a, 40), Treatment::Wait { until: now + LAST_TRY });
    // Nobody had room.
    let later = now + LAST_TRY;
    assert!(!first.told(later, &a).elsewhere);
    assert_eq!(first.treat(later, &a, 40), Treatment::Alone { beyond: 100, crashes: 2 });
    first.died(later, Death::Crashed, &[at(&a, 100)], false);
    assert_eq!(parked(&first.treat(later, &a, 40)), Some((100, FailureClass::EngineCrash)));
    assert!(first.passed(&a, 200));
    for _ in 0..2 {
        first.died(later, Death::Crashed, &[at(&a, 200)], false);
    }
    assert!(first.told(later, &a).elsewhere, "the next stretch may do better elsewhere");

    // The other one: it dies there too.
    let mut second = Suspects::default();
    second.begins(a.clone(), told);
    assert_eq!(second.treat(now, &a, 40), Treatment::Alone { beyond: 100, crashes: 2 }, "at once");
    second.died(now, Death::Crashed, &[at(&a, 100)], false);
    assert!(matches!(second.treat(now, &a, 40), Treatment::Park { at: 100, crashes: 3, .. }));
    assert!(second.passed(&a, 200));
    for stretch in [200, 300, 400] {
        for crashes in 1..=3 {
            second.died(now, Death::Crashed, &[at(&a, stretch)], false);
            assert_eq!(second.told(now, &a), others_say(crashes, stretch), "it goes no further");
        }
        assert!(matches!(second.treat(now, &a, stretch), Treatment::Park { .. }));
        second.passed(&a, stretch + 1);
    }
    assert_eq!(second.crashes(now), 1, "poison, not the device");
    second.forget(&a);
    assert_eq!(second.crashes(now), 1, "and no more so when it is gone");
    second.begins(a.clone(), others_say(2, 500));
    assert_eq!(second.crashes(now), 1, "or comes again");
}

#[test]
fn what_dies_while_it_is_looked_at_is_parked_unseen() {
    let (a, b, now) = (session("a"), session("b"), Instant::now());
    let looked_at = |name: &Name| Doing { stepping: true, ..at(name, 100) };
    let mut suspects = Suspects::default();
    // Several streams in one turn of the loop, one of them being decoded too.
    suspects.died(now, Death::Crashed, &[looked_at(&a), looked_at(&b), at(&a, 100)], false);
    assert_eq!((told(&suspects, &a), told(&suspects, &b)), (Some(0), Some(0)));
    // With a model being loaded nobody is alone.
    suspects.died(now, Death::Crashed, &[looked_at(&a)], true);
    assert_eq!(told(&suspects, &a), Some(0));
    for _ in 0..3 {
        suspects.died(now, Death::Crashed, &[looked_at(&a)], false);
    }
    assert!(matches!(treated(&mut suspects, &a, 100), Treatment::Park { blind: true, .. }));
    assert_eq!(told(&suspects, &b), Some(0));
}

#[test]
fn a_poison_input_is_not_a_broken_device() {
    let now = Instant::now();
    let (a, b, c) = (session("a"), session("b"), job("c"));
    let mut one = Suspects::default();
    one.died(now, Death::Crashed, &[at(&a, 0), at(&b, 0)], false);
    assert_eq!(one.crashes(now), 1);
    for _ in 0..3 {
        one.died(now, Death::Crashed, &[at(&a, 0)], false);
    }
    assert_eq!(one.crashes(now), 1, "the first is explained too");
    one.died(now, Death::Crashed, &[at(&c, 0)], false);
    assert_eq!(one.crashes(now), 2);
    one.died(now, Death::Killed, &[at(&b, 0)], false);
    assert_eq!(one.crashes(now), 3, "a kill is explained by nobody");
    assert_eq!(one.crashes(now + REMEMBERED + Duration::from_secs(1)), 0);

    let mut broken = Suspects::default();
    for name in ["a", "b", "c", "d"] {
        broken.died(now, Death::Crashed, &[at(&session(name), 0)], false);
    }
    assert_eq!(broken.crashes(now), 4);
}

#[test]
fn a_broken_device_shows_with_one_session_too() {
    let (a, now) = (session("a"), Instant::now());
    let mut broken = Suspects::default();
    for stretch in [0, 100, 200] {
        for _ in 0..3 {
            broken.died(now, Death::Crashed, &[at(&a, stretch)], false);
        }
        broken.passed(&a, stretch + 1);
    }
    assert_eq!(broken.crashes(now), 3, "each stretch that dies is one more");
}

#[test]
fn what_fails_although_nobody_looks_at_it_is_given_up() {
    let (a, now) = (session("a"), Instant::now());
    let erred = |suspects: &mut Suspects| {
        suspects.died(now, Death::Crashed, &[Doing { stepping: true, ..at(&a, 100) }], false);
        treated(suspects, &a, 100)
    };
    let mut suspects = Suspects::default();
    for _ in 1..MAX_CRASHES {
        assert!(matches!(erred(&mut suspects), Treatment::Alone { .. }));
    }
    assert!(matches!(erred(&mut suspects), Treatment::Park { blind: true, .. }));
    for _ in 0..9 {
        assert!(matches!(erred(&mut suspects), Treatment::GiveUp(_)), "no worker's code can read it");
    }
    // Set aside for what a decode of it did, its audio may still be looked at, until that kills too.
    let mut suspects = Suspects::default();
    suspects.begins(a.clone(), others_say(3, 100));
    assert!(matches!(treated(&mut suspects, &a, 100), Treatment::Park { blind: false, .. }));
    assert!(matches!(erred(&mut suspects), Treatment::Park { blind: true, .. }));
    assert!(matches!(erred(&mut suspects), Treatment::GiveUp(_)));
    assert!(suspects.passed(&a, 101));
    assert_eq!(treated(&mut suspects, &a, 101), Treatment::Normal, "what comes behind it is innocent");
}
