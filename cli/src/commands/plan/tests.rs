//! What people read, whole: a row that moves or a figure that changes is seen here.

use voxfleet_store::models::plan::{Bound, GpuSpec};

use super::*;

const EIGHT_CARDS: &str = include_str!("../../../../examples/fleet-eight-cards.toml");

/// Published figures alone.
fn published() -> Known {
    Known { catalog: Catalog::built_in().expect("valid"), measured: None, dir: None }
}

const WISH: Wish = Wish { sessions: 4, states: 2, host_session_mb: SESSION_MB };

fn card(gpu: &str, tenants: &[&str]) -> Target {
    let GpuSpec { name, total_mb } = gpu.parse().expect("a card");
    let tenants = tenants.iter().map(|t| t.parse().expect("a tenant")).collect();
    let card = Card { name, total_mb, tenants, safe_percent: 90, most_percent: 95, host_mb: None };
    Target { card, key: None, on: On::Gpu, trouble: None, in_use_may_be_ours: false }
}

#[test]
fn a_t4_beside_voxtral() {
    let found = find(card("T4:15GB", &["voxtral=9.6GB"]), &published(), None, WISH);
    assert_eq!(text::card(&found, WISH), T4);
    assert!(T4.lines().all(|line| line.chars().count() <= 80));
}

#[test]
fn eight_cards_and_two_cases() {
    let fleet = fleet::read(EIGHT_CARDS, &published(), WISH).expect("valid");
    assert_eq!(fleet::told(&fleet, &["gpu-0".to_owned(), "gpu-0,gpu-2".to_owned()]).expect("cards"), EIGHT);
    let survey = fleet::told(&fleet, &[]).expect("all");
    for line in [
        "  gpu-0  safe  whisper -> gpu-5",
        "when two cards fail: of 28 pairs, 28 lose nothing",
        "  gpu-2 gpu-3  safe  llm 1/2 -> gpu-6, llm 2/2 -> gpu-7",
        "  gpu-5 gpu-6  safe  nothing was there; 1 reserve left",
    ] {
        assert!(survey.lines().any(|l| l == line), "{line}\n{survey}");
    }
    assert!([EIGHT, &survey].iter().all(|text| text.lines().all(|line| line.chars().count() <= 88)), "{survey}");
}

#[test]
fn what_is_lost_is_said() {
    let cards = "[[card]]\nid = \"a\"\ngpu = \"T4:15GB\"\n[[card]]\nid = \"b\"\ngpu = \"T4:4GB\"\n[[card]]\nid = \"c\"\ngpu = \"T4:4GB\"\n";
    let asr = "[[service]]\nname = \"asr\"\ngpus = [\"a\"]\nreserves = [\"b\"]\nmodels = [\"large-v3\", \"base\"]\n";
    let large = "[[service]]\nname = \"llm\"\ngpus = [\"c\"]\nmemory = \"5GB\"\n";
    let fleet = fleet::read(&format!("{cards}{asr}{large}"), &published(), WISH).expect("valid");
    let text = fleet::told(&fleet, &[]).expect("all");
    for line in [
        "no room for",
        "  llm of c: it has no room within 90 %",
        "  a  tight  asr -> b without large-v3",
        "when two cards fail: of 3 pairs, 2 lose nothing",
        "  a b  refuse  asr LOST",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
    let text = fleet::told(&fleet, &["a,b".to_owned()]).expect("both");
    assert!(text.contains("when a and b fail: refuse\n  lost: asr of a: all of its reserves failed too"), "{text}");
}

#[test]
fn what_bounds_the_sessions_is_said() {
    let mut found = find(card("L4:24GB", &[]), &published(), None, WISH);
    found.options.retain(|o| o.option.model == "base" || o.option.model == "small");
    (found.options[0].bound, found.options[0].option.sessions) = (Bound::DecodeSpeed, 3);
    found.trouble = Some("device lost".to_owned());
    let text = text::card(&found, WISH);
    assert!(text.contains("small: 3 sessions, by its measured speed") && !text.contains("base: "), "{text}");
    assert!(text.contains("it cannot be used now: device lost"), "{text}");
}

#[test]
fn a_card_of_which_nothing_is_known_is_named_and_not_planned() {
    let mut target = card("a gpu that does not answer:1GB", &[]);
    target.card.total_mb = 0;
    target.trouble = Some("gpu 1: lost".to_owned());
    let found = find(target, &published(), None, WISH);
    assert_eq!(text::card(&found, WISH), "a gpu that does not answer: gpu 1: lost");
    assert_eq!(as_json(&[found], WISH)["options"], json!([]));
}

#[test]
fn what_may_be_counted_twice_is_said() {
    let mut found = find(card("L4:24GB", &["in use now=1GB"]), &published(), None, WISH);
    assert!(!text::card(&found, WISH).contains("a running worker"));
    found.in_use_may_be_ours = true;
    assert!(text::card(&found, WISH).contains("may include the models of a running worker"));
}

#[test]
fn each_card_of_a_fleet_has_its_own_figures() {
    let dir = tempfile::tempdir().expect("folder");
    let known = Known { measured: Some(Measured::in_cache(dir.path())), ..published() };
    let base = known.catalog.get("base").expect("there");
    let key = voxfleet_store::models::measured::ModelKey::of_catalog(base).expect("a key");
    let figures = voxfleet_store::models::measured::Figures { weights_mb: Some(999), ..Default::default() };
    let t4 = DeviceKey { name: "Tesla T4".to_owned(), total_mb: 15_109 };
    known.measured.as_ref().expect("a folder").record(&t4, &key, figures).expect("recorded");
    let fleet = "[[card]]\nid = \"a\"\ngpu = \"L4:24GB\"\n[[card]]\nid = \"b\"\ngpu = \"T4:15GB\"\n
        [[service]]\nname = \"asr\"\ngpus = [\"a\", \"b\"]\nmodels = [\"base\"]\n";
    let text = fleet::told(&fleet::read(fleet, &known, WISH).expect("valid"), &[]).expect("all");
    for line in ["  a: context 530 + weights 142 + states 492", "  b: context 530 + weights 999 + states 492"] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
}

#[test]
fn what_does_not_fit_is_in_no_picture() {
    let found = find(card("a:4GB", &[]), &published(), None, WISH);
    let text = text::card(&found, WISH);
    assert!(text.contains("large-v3  0         1       4430     108 %  -         refuse\n"), "{text}");
    assert!(text.contains("\nsmall  |") && !text.contains("large-v3 |"), "{text}");
}

#[test]
fn the_json_has_the_fields_that_readers_know() {
    let found = find(card("T4:15GB", &["voxtral=9.6GB"]), &published(), None, WISH);
    let json = as_json(&[found], WISH);
    let first = &json["options"][0];
    for (field, wanted) in [
        ("model", json!("medium")),
        ("sessions", json!(4)),
        ("used_mb", json!(3_267)),
        ("utilization", json!(0.8527)),
        ("risk", json!("safe")),
        ("stance", json!("recommended")),
        ("bound", json!("asked")),
        ("headroom_mb", json!(2_263)),
    ] {
        assert_eq!(first[field], wanted, "{field}");
    }
    assert_eq!(first["figures"]["state"], json!({"mb": 637, "from": "catalog"}));
    assert_eq!((&json["card"]["total_mb"], &json["further"]), (&json!(15_360), &json!([])));
}

const T4: &str = r"T4: 15360 MB; voxtral 9830 MB
4 sessions to hold, 2 decode states at most; safe to 90 %, refused above 95 %

MODEL     SESSIONS  STATES  USED MB  UTIL.  HEADROOM  RISK   ADVICE
medium    4         2       3267     85 %   2263      safe   recommended
large-v3  4         1       4430     93 %   1100      tight  aggressive
small     4         2       1768     76 %   3762      safe   conservative
base      4         2       1164     72 %   4366      safe   conservative
tiny      4         2       1001     71 %   4529      safe   conservative

medium   |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTCCWWWWWWSSSSS....rrrrrr|  85 %
large-v3 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTCCWWWWWWWWWWWWSSSSrrrrr|  93 %
small    |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTCCWWSSS..........rrrrrr|  76 %
base     |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTCCWSS............rrrrrr|  72 %
tiny     |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTCCWSS.............rrrrrr|  71 %
T tenants  C context  W weights  S decode states  B sessions  . free  r reserve

medium    context 530 + weights 1463 + 2 states of 637: catalog
large-v3  context 530 + weights 2952 + 1 state of 948: catalog
small     context 530 + weights 466 + 2 states of 386: catalog
base      context 530 + weights 142 + 2 states of 246: catalog
tiny      context 530 + weights 75 + 2 states of 198: catalog

variants of better models that are safe too (--model NAME):
  large-v3-turbo 83 %, large-v3-q5_0 87 %, large-v3-turbo-q8_0 78 %
memory says what fits; whether the device is fast enough, `voxfleet bench` tells";

const EIGHT: &str = r"8 cards, 4 services
whisper: large-v3 + medium; 16 sessions, 2 decode states a card at most; limit 90 %
  on gpu-0; reserves gpu-5 gpu-6 gpu-7; context 530 + weights 4415 + states 3170
llm: not ours, 43008 MB; limit 90 %
  on gpu-2 gpu-3; reserves gpu-6 gpu-7 gpu-5; memory 21504
embedding: not ours, 9216 MB; limit 90 %
  on gpu-1; reserves gpu-7 gpu-6 gpu-5; memory 9216
ocr: not ours, 14336 MB; limit 90 %
  on gpu-4; reserves gpu-7 gpu-6 gpu-5; memory 14336

CARD   GPU  TOTAL MB  USED MB  UTIL.  LIMIT  HEADROOM  RISK  HOLDS
gpu-0  L4   24576     8115     33 %   90 %   14003     safe  whisper
gpu-1  L4   24576     9216     38 %   90 %   12902     safe  embedding
gpu-2  L4   24576     21504    88 %   90 %   614       safe  llm 1/2
gpu-3  L4   24576     21504    88 %   90 %   614       safe  llm 2/2
gpu-4  L4   24576     14336    58 %   90 %   7782      safe  ocr
gpu-5  L4   24576     0        0 %    90 %   22118     safe  reserve
gpu-6  L4   24576     0        0 %    90 %   22118     safe  reserve
gpu-7  L4   24576     0        0 %    90 %   22118     safe  reserve

gpu-0 |CWWWWWWWWWWWWSSSSSSSSS.....................................rrrrrrr|  33 %
gpu-1 |TTTTTTTTTTTTTTTTTTTTTTTTT..................................rrrrrrr|  38 %
gpu-2 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-3 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-4 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT....................rrrrrrr|  58 %
gpu-5 |...........................................................rrrrrrr|   0 %
gpu-6 |...........................................................rrrrrrr|   0 %
gpu-7 |...........................................................rrrrrrr|   0 %
T tenants  C context  W weights  S decode states  B sessions  . free  r reserve

when gpu-0 fails: safe
  whisper: gpu-0 -> gpu-5 (reserve; then 33 % full)
  reserves left: gpu-6 gpu-7
gpu-1 |TTTTTTTTTTTTTTTTTTTTTTTTT..................................rrrrrrr|  38 %
gpu-2 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-3 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-4 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT....................rrrrrrr|  58 %
gpu-5 |CWWWWWWWWWWWWSSSSSSSSS.....................................rrrrrrr|  33 %
gpu-6 |...........................................................rrrrrrr|   0 %
gpu-7 |...........................................................rrrrrrr|   0 %

when gpu-0 and gpu-2 fail: safe
  whisper: gpu-0 -> gpu-5 (reserve; then 33 % full)
  llm 1/2: gpu-2 -> gpu-6 (reserve; then 88 % full)
  reserves left: gpu-7
gpu-1 |TTTTTTTTTTTTTTTTTTTTTTTTT..................................rrrrrrr|  38 %
gpu-3 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-4 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT....................rrrrrrr|  58 %
gpu-5 |CWWWWWWWWWWWWSSSSSSSSS.....................................rrrrrrr|  33 %
gpu-6 |TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTTT.rrrrrrr|  88 %
gpu-7 |...........................................................rrrrrrr|   0 %";
