use proptest::prelude::*;

use super::*;
use crate::models::plan::{Figure, GpuSpec, tests::needs};

const EIGHT: &str = include_str!("../../../../../examples/fleet-eight-cards.toml");

fn eight() -> Fleet {
    let of = |service: &ServiceEntry, _: &GpuSpec| service.models.iter().map(|name| needs(name)).collect();
    FleetFile::parse(EIGHT).expect("valid").fleet(of, 4, 2)
}

/// `whisper gpu-0>gpu-5`, and `ocr gpu-4!` for what is lost.
fn told(outcome: &Outcome) -> Vec<String> {
    let mut told: Vec<String> = outcome.moves.iter().map(|m| format!("{} {}>{}", m.service, m.from, m.to)).collect();
    told.extend(outcome.lost.iter().map(|l| format!("{} {}!", l.service, l.from)));
    told
}

#[test]
fn eight_cards_hold_five_things_within_their_limits() {
    let (cards, lost) = standing(&eight());
    assert!(lost.is_empty(), "{lost:?}");
    let rows: Vec<(String, u64, u64)> = cards
        .iter()
        .map(|c| {
            let names: Vec<String> =
                c.holds.iter().map(|p| format!("{} {}/{}", p.service, p.share, p.shares)).collect();
            (names.join(" "), c.used_mb, (c.utilization * 100.0).round() as u64)
        })
        .collect();
    let row = |names: &str, used_mb, percent| (names.to_owned(), used_mb, percent);
    // 530 + (2,952 + 2 x 948) + (1,463 + 2 x 637)
    let whisper = row("whisper 1/1", 8_115, 33);
    let wanted = [
        whisper,
        row("embedding 1/1", 9_216, 38),
        row("llm 1/2", 21_504, 88),
        row("llm 2/2", 21_504, 88),
        row("ocr 1/1", 14_336, 58),
        row("", 0, 0),
        row("", 0, 0),
        row("", 0, 0),
    ];
    assert_eq!(rows, wanted);
    assert!(cards.iter().all(|c| c.risk == Risk::Safe && c.limit_percent == 90), "{cards:?}");
    assert_eq!(cards[7].reserve_of, ["whisper", "llm", "embedding", "ocr"]);
    assert_eq!((cards[0].holds[0].sessions, cards[0].holds[0].states), (16, 2));
}

#[test]
fn eight_cards_lose_nothing_until_the_reserves_are_gone() {
    let fleet = eight();
    for (failed, wanted, left) in [
        (&[0][..], &["whisper gpu-0>gpu-5"][..], 2),
        (&[3], &["llm gpu-3>gpu-6"], 2),
        (&[5], &[], 2),
        (&[0, 4], &["whisper gpu-0>gpu-5", "ocr gpu-4>gpu-7"], 1),
        (&[3, 2], &["llm gpu-2>gpu-6", "llm gpu-3>gpu-7"], 1),
        (&[0, 5], &["whisper gpu-0>gpu-6"], 1),
        (&[1, 4], &["embedding gpu-1>gpu-7", "ocr gpu-4>gpu-6"], 1),
        (&[0, 1, 2, 3], &["whisper gpu-0>gpu-5", "llm gpu-2>gpu-6", "llm gpu-3>gpu-7", "embedding gpu-1!"], 0),
        (&[0, 5, 6, 7], &["whisper gpu-0!"], 0),
        (&[99, 0, 0], &["whisper gpu-0>gpu-5"], 2),
    ] {
        let outcome = outcome(&fleet, failed);
        assert_eq!(told(&outcome), wanted, "{failed:?}");
        assert_eq!(outcome.reserves_left.len(), left, "{failed:?}");
        let wanted = if outcome.lost.is_empty() { Risk::Safe } else { Risk::Refuse };
        assert_eq!(outcome.risk, wanted, "{failed:?}");
    }
    for (a, b) in (0..8).flat_map(|a| (a + 1..8).map(move |b| (a, b))) {
        assert_eq!(outcome(&fleet, &[a, b]).risk, Risk::Safe, "{a} and {b}");
    }
    let why = |failed: &[usize]| outcome(&fleet, failed).lost.remove(0).why;
    assert_eq!(why(&[0, 5, 6, 7]), "all of its reserves failed too");
    assert!(why(&[0, 1, 2, 3]).starts_with("no reserve is free"));
}

fn small(text: &str) -> Fleet {
    let of = |service: &ServiceEntry, _: &GpuSpec| service.models.iter().map(|name| needs(name)).collect();
    FleetFile::parse(text).expect("valid").fleet(of, 4, 2)
}

#[test]
fn a_small_reserve_takes_what_it_can() {
    let fleet = small(
        "[[card]]\nid = \"a\"\ngpu = \"L4:24GB\"\n[[card]]\nid = \"r\"\ngpu = \"T4:15GB\"\ntenants = { other = \"10GB\" }\n
         [[service]]\nname = \"asr\"\ngpus = [\"a\"]\nreserves = [\"r\"]\nmodels = [\"large-v3\", \"base\"]\n",
    );
    let outcome = outcome(&fleet, &[0]);
    // 13,824 - 10,240 is less than large-v3 with one state.
    assert_eq!((outcome.moves[0].missing.as_slice(), outcome.risk), (&["large-v3".to_owned()][..], Risk::Tight));
    assert_eq!((outcome.moves[0].mb, outcome.cards[0].used_mb), (1_164, 11_404));
}

#[test]
fn each_card_has_figures_of_its_own() {
    let text = "[[card]]\nid = \"a\"\ngpu = \"L4:24GB\"\n[[card]]\nid = \"b\"\ngpu = \"T4:15GB\"\n
         [[card]]\nid = \"r\"\ngpu = \"A10:24GB\"\n[[service]]\nname = \"asr\"\ngpus = [\"a\", \"b\"]\nreserves = [\"r\"]\nmodels = [\"base\"]\n";
    // As if each had been measured.
    let of = |_: &ServiceEntry, gpu: &GpuSpec| {
        let weights = match gpu.name.as_str() {
            "L4" => 100,
            "T4" => 200,
            _ => 300,
        };
        vec![Needs { weights: Figure::choose(Some(weights), 0), ..needs("base") }]
    };
    let fleet = FleetFile::parse(text).expect("valid").fleet(of, 4, 2);
    let weights = |placed: &Placed| placed.parts.iter().find(|p| p.fill == Fill::Weights).map(|p| p.mb);
    let (cards, _) = standing(&fleet);
    assert_eq!([&cards[0], &cards[1]].map(|card| weights(&card.holds[0])), [Some(100), Some(200)]);
    let after = outcome(&fleet, &[0]);
    assert_eq!((after.cards[1].id.as_str(), weights(&after.cards[1].holds[0])), ("r", Some(300)));
}

#[test]
fn without_a_reserve_the_service_shares_its_sessions() {
    let cards = "[[card]]\nid = \"a\"\ngpu = \"T4:15GB\"\n[[card]]\nid = \"b\"\ngpu = \"T4:15GB\"\n";
    let fleet = small(&format!(
        "{cards}[[service]]\nname = \"asr\"\ngpus = [\"a\", \"b\"]\nmodels = [\"small\"]\nsessions = 7\n"
    ));
    let found = outcome(&fleet, &[0]);
    assert_eq!((found.moves[0].how, found.moves[0].sessions, found.risk), (How::Shared, 4, Risk::Tight));
    assert_eq!(found.cards[0].holds.iter().map(|p| p.sessions).sum::<u64>(), 7);
    assert_eq!(found.cards[0].used_mb, 1_768);
    assert_eq!(outcome(&fleet, &[0, 1]).lost.len(), 2);
    // Half of a language model is no language model.
    let fleet = small(&format!("{cards}[[service]]\nname = \"llm\"\ngpus = [\"a\", \"b\"]\nmemory = \"20GB\"\n"));
    assert_eq!(
        (told(&outcome(&fleet, &[0])), outcome(&fleet, &[0]).lost[0].why.as_str()),
        (vec!["llm a!".to_owned()], "it has no reserve")
    );
}

#[test]
fn what_has_no_room_at_all_is_told_before_anything_fails() {
    let fleet = small(
        "[[card]]\nid = \"a\"\ngpu = \"T4:15GB\"\n[[service]]\nname = \"x\"\ngpus = [\"a\"]\nmemory = \"13GB\"\n
         [[service]]\nname = \"y\"\ngpus = [\"a\"]\nmemory = \"1GB\"\n",
    );
    let (cards, lost) = standing(&fleet);
    // 13,824 - 13,312 = 512
    assert_eq!((lost.len(), lost[0].service.as_str(), cards[0].used_mb), (1, "y", 13_312));
    assert_eq!(cards[0].headroom_mb, 512);
}

proptest! {
    #[test]
    fn no_card_is_filled_beyond_its_limits(
        totals in proptest::collection::vec(1u64..100_000, 1..8),
        wishes in proptest::collection::vec((0usize..8, 0usize..8, proptest::option::of(1u64..100_000), 1u8..=100, 1u64..40), 0..6),
        failed in proptest::collection::vec(0usize..10, 0..5), tenants_mb in 0u64..20_000, session_mb in 0u64..50,
    ) {
        let count = totals.len();
        let tenants = vec![Tenant { name: "t".to_owned(), mb: tenants_mb }];
        let card = |(at, total_mb): (usize, &u64)| {
            FleetCard { id: format!("c{at}"), gpu: "g".to_owned(), total_mb: *total_mb, tenants: tenants.clone() }
        };
        let ours = Needs { session: Figure::choose(None, session_mb), ..needs("small") };
        let service = |(at, (gpu, reserve, foreign, limit_percent, sessions)): (usize, &(usize, usize, Option<u64>, u8, u64))| Service {
            name: format!("s{at}"),
            gpus: if gpu == reserve { vec![gpu % count] } else { vec![gpu % count, (gpu + 1) % count] },
            reserves: vec![reserve % count, (reserve + 3) % count],
            limit_percent: *limit_percent,
            kind: match foreign {
                Some(mb) => Kind::Foreign { mb: *mb },
                None => Kind::Ours { needs: vec![vec![needs("medium"), ours.clone()]; count], sessions: *sessions, states: 2 },
            },
        };
        let fleet = Fleet {
            cards: totals.iter().enumerate().map(card).collect(),
            services: wishes.iter().enumerate().map(service).collect(),
        };
        let (before, _) = standing(&fleet);
        let after = outcome(&fleet, &failed);
        for card in before.iter().chain(&after.cards) {
            let parts: u64 = card.holds.iter().flat_map(|p| &p.parts).map(|p| p.mb).sum();
            prop_assert_eq!(parts + tenants_mb, card.used_mb);
            for held in &card.holds {
                prop_assert!(card.used_mb * 100 <= card.total_mb * u64::from(held.limit_percent), "{card:?}");
            }
        }
        prop_assert!(after.cards.iter().all(|c| !after.failed.contains(&c.id)));
        // Whatever lay on a failed card went somewhere or is named as lost.
        let homeless = before.iter().filter(|c| after.failed.contains(&c.id)).map(|c| c.holds.len()).sum::<usize>();
        prop_assert_eq!(homeless, after.moves.len() + after.lost.len());
    }
}
