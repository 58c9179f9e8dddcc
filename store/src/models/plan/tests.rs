use proptest::prelude::*;

use super::*;
use crate::models::Catalog;

/// Published figures, on a GPU.
pub(super) fn needs(name: &str) -> Needs {
    let catalog = Catalog::built_in().expect("valid");
    let model = catalog.get(name).expect(name);
    Needs {
        model: name.to_owned(),
        context: Figure::choose(None, 530),
        weights: Figure::choose(None, model.weights_mb()),
        state: Figure::choose(None, model.state_mb),
        session: Figure::choose(None, 0),
        realtime_factor: None,
    }
}

fn card(total_mb: u64, tenants_mb: u64) -> Card {
    let tenants = vec![Tenant { name: "others".to_owned(), mb: tenants_mb }];
    let (safe_percent, most_percent) = (SAFE_PERCENT, MOST_PERCENT);
    Card { name: "a GPU".to_owned(), total_mb, tenants, safe_percent, most_percent, host_mb: Some(1_000) }
}

const WISH: Wish = Wish { sessions: 4, states: 2, host_session_mb: 6 };

#[test]
fn options_say_what_fits() {
    use Bound::*;
    let small = needs("small");
    let on_cpu = Needs { context: Figure::choose(None, 0), session: Figure::choose(None, 6), ..small.clone() };
    let slow = |factor| Needs { realtime_factor: Some(factor), ..small.clone() };
    let host = |host_mb| Card { host_mb: Some(host_mb), ..card(8_000, 0) };
    let many = Wish { sessions: 500, ..WISH };
    for (card, model, wish, states, sessions, used_mb, risk, bound) in [
        // 530 + 466 + 2 x 386 = 1,768
        (card(8_000, 0), &small, WISH, 2, 4, 1_768, Risk::Safe, Asked),
        (card(8_000, 0), &small, many, 2, 166, 1_768, Risk::Safe, HostMemory),
        (Card { host_mb: None, ..card(8_000, 0) }, &small, many, 2, 500, 1_768, Risk::Safe, Asked),
        (host(12), &small, WISH, 2, 2, 1_768, Risk::Safe, HostMemory),
        (host(0), &small, WISH, 1, 0, 1_382, Risk::Refuse, HostMemory),
        // Safe to 7,200: with both states, then with one, then tight with both, to 7,600, then with one, then not at all.
        (card(8_000, 5_432), &small, WISH, 2, 4, 1_768, Risk::Safe, Asked),
        (card(8_000, 5_433), &small, WISH, 1, 4, 1_382, Risk::Safe, Asked),
        (card(8_000, 5_818), &small, WISH, 1, 4, 1_382, Risk::Safe, Asked),
        (card(8_000, 5_819), &small, WISH, 2, 4, 1_768, Risk::Tight, Asked),
        (card(8_000, 5_832), &small, WISH, 2, 4, 1_768, Risk::Tight, Asked),
        (card(8_000, 5_833), &small, WISH, 1, 4, 1_382, Risk::Tight, Asked),
        (card(8_000, 6_218), &small, WISH, 1, 4, 1_382, Risk::Tight, Asked),
        (card(8_000, 6_219), &small, WISH, 1, 0, 1_382, Risk::Refuse, DeviceMemory),
        (card(0, 0), &small, WISH, 1, 0, 1_382, Risk::Refuse, DeviceMemory),
        (card(8_000, u64::MAX), &small, WISH, 1, 0, 1_382, Risk::Refuse, DeviceMemory),
        // What was measured of its speed
        (card(8_000, 0), &slow(3.9), WISH, 2, 3, 1_768, Risk::Safe, DecodeSpeed),
        (card(8_000, 0), &slow(0.9), WISH, 1, 0, 1_382, Risk::Refuse, DecodeSpeed),
        (card(8_000, 0), &slow(f64::NAN), WISH, 1, 0, 1_382, Risk::Refuse, DecodeSpeed),
        // A CPU has no context, and its sessions are in the same memory: 1,900 - 500 - 852 = 548.
        (Card { host_mb: None, ..card(2_000, 500) }, &on_cpu, many, 1, 91, 1_398, Risk::Tight, DeviceMemory),
        (Card { host_mb: None, ..card(2_000, 500) }, &on_cpu, WISH, 2, 4, 1_262, Risk::Safe, Asked),
    ] {
        let row = option(&card, model, wish);
        let found = (row.states, row.option.sessions, row.option.used_mb, row.option.risk, row.bound);
        assert_eq!(found, (states, sessions, used_mb, risk, bound), "{card:?} {wish:?} {row:?}");
        assert_eq!(row.stance.is_none(), risk == Risk::Refuse, "{row:?}");
    }
}

fn told(options: &[Planned]) -> Vec<(&str, u64, u64, &str, &str)> {
    let percent = |o: &Planned| (o.option.utilization * 100.0).round() as u64;
    let stance = |o: &Planned| o.stance.map_or("", Stance::as_str);
    options.iter().map(|o| (o.option.model.as_str(), o.states, percent(o), o.option.risk.as_str(), stance(o))).collect()
}

/// The published T4 table (base 75 %, medium 84 %, large 94 % beside 9.6 GB) was made for another engine; ours shares
/// its states, so that small sizes need less.
#[test]
fn a_t4_beside_a_tenant_of_9_6_gb() {
    let t4 = card("T4:15GB".parse::<GpuSpec>().expect("a card").total_mb, "9.6GB".parse::<Size>().expect("size").mb);
    let models = ["tiny", "base", "small", "medium", "large-v3"].map(needs);
    assert_eq!(
        told(&plan(&t4, &models, WISH)),
        [
            ("medium", 2, 85, "safe", "recommended"),
            ("large-v3", 1, 93, "tight", "aggressive"),
            ("small", 2, 76, "safe", "conservative"),
            ("base", 2, 72, "safe", "conservative"),
            ("tiny", 2, 71, "safe", "conservative"),
        ]
    );
}

#[test]
fn what_is_recommended_is_safe_and_holds_all_sessions() {
    let models = ["base", "large-v3-turbo", "medium", "large-v3"].map(needs);
    let first = |card: &Card, models: &[Needs]| {
        let options = plan(card, models, WISH);
        (options[0].option.model.clone(), options[0].stance)
    };
    assert_eq!(first(&card(80_000, 0), &models), ("large-v3".to_owned(), Some(Stance::Recommended)));
    // The ladder has turbo above medium, whatever they weigh.
    assert_eq!(first(&card(15_360, 9_830), &models), ("large-v3-turbo".to_owned(), Some(Stance::Recommended)));
    // Where nothing is safe, nothing is recommended.
    let options = plan(&card(10_000, 8_500), &models, WISH);
    assert_eq!(
        (options[0].option.model.as_str(), options[0].stance),
        ("base", Some(Stance::Aggressive)),
        "{options:?}"
    );
    assert!(options[1..].iter().all(|o| o.stance.is_none()));
    // Medium is known to be too slow for four.
    let slow = Needs { realtime_factor: Some(3.0), ..needs("medium") };
    let options = plan(&card(15_360, 9_830), &[slow, needs("base")], WISH);
    assert_eq!(
        told(&options).iter().map(|o| (o.0, o.4)).collect::<Vec<_>>(),
        [("base", "recommended"), ("medium", "conservative")]
    );
}

#[test]
fn better_models_come_first() {
    let mut models =
        ["tiny", "large-v2", "medium.en", "large-v3-q5_0", "micro.en-q8_0", "medium", "large-v3-turbo", "large-v3"]
            .map(needs);
    models.sort_by(|a, b| quality(a).cmp(&quality(b)));
    assert_eq!(
        models.map(|m| m.model),
        ["large-v3", "large-v2", "large-v3-turbo", "large-v3-q5_0", "medium", "medium.en", "tiny", "micro.en-q8_0"]
    );
}

#[test]
fn weights_are_counted_once_and_states_by_number() {
    let used =
        |states, sessions| option(&card(8_000, 0), &needs("small"), Wish { states, sessions, ..WISH }).option.used_mb;
    assert_eq!(used(2, 16), used(2, 1));
    assert_eq!(used(3, 1) - used(2, 1), 386);
}

#[test]
fn measured_figures_win_and_say_so() {
    let (measured, catalog) = (Figure::choose(Some(7), 9), Figure::choose(None, 9));
    assert_eq!((measured.mb, measured.from, catalog.mb, catalog.from), (7, Origin::Measured, 9, Origin::Catalog));
}

proptest! {
    #[test]
    fn nothing_is_over_committed(
        total_mb in 0u64..200_000, tenants_mb in 0u64..200_000, weights_mb in 0u64..5_000, state_mb in 0u64..1_000,
        sessions in 0u64..20_000, states in 0u64..9, session_mb in 0u64..50, host_mb in proptest::option::of(0u64..100_000),
        safe_percent in 1u8..=100, most_percent in 1u8..=100, factor in proptest::option::of(0.0f64..100.0),
    ) {
        let card = Card { safe_percent, most_percent, host_mb, ..card(total_mb, tenants_mb) };
        let figure = |mb| Figure::choose(None, mb);
        let model = Needs {
            model: "m".to_owned(), context: figure(530), weights: figure(weights_mb), state: figure(state_mb),
            session: figure(session_mb), realtime_factor: factor,
        };
        let row = plan(&card, &[model], Wish { sessions, states, host_session_mb: 6 }).remove(0);
        let in_use = tenants_mb + row.option.used_mb;
        prop_assert!(row.option.sessions <= sessions.max(1));
        prop_assert_eq!(row.option.sessions == 0, row.option.risk == Risk::Refuse);
        if row.option.risk != Risk::Refuse {
            prop_assert!(in_use * 100 <= total_mb * u64::from(most_percent), "{row:?}");
            prop_assert!(row.option.sessions as f64 <= factor.unwrap_or(f64::MAX), "{row:?}");
            prop_assert_eq!(row.headroom_mb, total_mb - in_use);
        }
        if row.option.risk == Risk::Safe {
            prop_assert!(in_use * 100 <= total_mb * u64::from(safe_percent), "{row:?}");
        }
    }
}
