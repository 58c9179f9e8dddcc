//! `voxfleet plan --fleet FILE`: what fits where, and what becomes of it when cards fail.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use serde_json::json;
use voxfleet_schema::plan::Risk;
use voxfleet_store::models::plan::{
    GpuSpec, Needs, Wish,
    fleet::{CardUse, Fill, Fleet, FleetFile, How, Kind, Lost, Move, Outcome, Placed, ServiceEntry, outcome, standing},
};

use super::{
    bar::{LEGEND, Row, Stretch, picture},
    figures::{Known, On},
    text::{count, percent},
};
use crate::{
    args::PlanArgs,
    commands::status::table,
    exit::{Exit, OrExit as _, coded},
    transcript::screen::{object, out},
};

/// More pairs than so many are not written one by one.
const MOST_PAIRS: usize = 36;

pub(super) fn run(path: &Path, args: &PlanArgs, known: &Known, wish: Wish) -> anyhow::Result<Exit> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string()).or_exit(Exit::Input)?;
    let fleet = read(&text, known, wish).map_err(|error| error.context(path.display().to_string()))?;
    if args.output.json {
        let (cards, lost) = standing(&fleet);
        object(&json!({"cards": cards, "lost": lost, "failures": outcomes(&fleet, &args.fails)?}))?;
    } else {
        out(&told(&fleet, &args.fails)?)?;
    }
    Ok(Exit::Ok)
}

/// As a person reads it.
pub(super) fn told(fleet: &Fleet, fails: &[String]) -> anyhow::Result<String> {
    let (cards, lost) = standing(fleet);
    Ok(whole(fleet, &cards, &lost, &outcomes(fleet, fails)?))
}

pub(super) fn read(text: &str, known: &Known, wish: Wish) -> anyhow::Result<Fleet> {
    let file = FleetFile::parse(text).or_exit(Exit::Config)?;
    for service in file.services() {
        known.named(&service.models).or_exit(Exit::NotFound)?;
    }
    let needs = |service: &ServiceEntry, gpu: &GpuSpec| -> Vec<Needs> {
        let device = known.described(&gpu.name, gpu.total_mb);
        let models = service.models.iter().filter_map(|name| known.catalog.get(name));
        models.map(|model| known.needs(model, device.as_ref(), On::Gpu)).collect()
    };
    Ok(file.fleet(needs, wish.sessions, wish.states))
}

/// Cards by their names, as `--fail` has them.
fn case(fleet: &Fleet, names: &str) -> anyhow::Result<Vec<usize>> {
    let place = |name: &str| {
        let at = fleet.cards.iter().position(|c| c.id == name);
        at.ok_or_else(|| coded(Exit::Usage, anyhow!("--fail: the fleet has no card {name:?}")))
    };
    names.split(',').map(|name| place(name.trim())).collect()
}

/// The cases asked for; else each card, then each two of them, without the pictures.
fn outcomes(fleet: &Fleet, fails: &[String]) -> anyhow::Result<Vec<Outcome>> {
    if !fails.is_empty() {
        return fails.iter().map(|names| Ok(outcome(fleet, &case(fleet, names)?))).collect();
    }
    let cards = 0..fleet.cards.len();
    let pairs = cards.clone().flat_map(|a| (a + 1..cards.end).map(move |b| vec![a, b]));
    let all = cards.clone().map(|a| vec![a]).chain(pairs);
    Ok(all.map(|case| Outcome { cards: Vec::new(), ..outcome(fleet, &case) }).collect())
}

fn whole(fleet: &Fleet, cards: &[CardUse], lost: &[Lost], outcomes: &[Outcome]) -> String {
    let mut parts = vec![services(fleet, cards), rows(cards), format!("{}{LEGEND}\n", pictures(cards))];
    if !lost.is_empty() {
        parts
            .push(format!("no room for\n{}", lost.iter().map(|l| format!("  {}\n", lost_line(l))).collect::<String>()));
    }
    if outcomes.iter().any(|o| !o.cards.is_empty()) {
        parts.extend(outcomes.iter().map(asked_for));
    } else {
        parts.extend(surveys(outcomes));
    }
    parts.join("\n").trim_end().to_owned()
}

/// What each service is and what it needs of a card.
fn services(fleet: &Fleet, cards: &[CardUse]) -> String {
    let ids = |places: &[usize]| {
        let ids: Vec<&str> = places.iter().map(|at| fleet.cards[*at].id.as_str()).collect();
        if ids.is_empty() { "none".to_owned() } else { ids.join(" ") }
    };
    let mut text =
        format!("{}, {}\n", count(fleet.cards.len() as u64, "card"), count(fleet.services.len() as u64, "service"));
    for service in &fleet.services {
        let what = match &service.kind {
            Kind::Foreign { mb } => format!("not ours, {mb} MB"),
            Kind::Ours { needs, sessions, states } => {
                let names: Vec<&str> = needs.first().into_iter().flatten().map(|m| m.model.as_str()).collect();
                let (sessions, states) = (count(*sessions, "session"), count(*states, "decode state"));
                format!("{}; {sessions}, {states} a card at most", names.join(" + "))
            }
        };
        let held = cards.iter().filter_map(|card| Some((card, card.holds.iter().find(|p| p.service == service.name)?)));
        let held: Vec<(&str, String)> = held.map(|(card, placed)| (card.id.as_str(), made_of(placed))).collect();
        text += &format!("{}: {what}; limit {} %\n", service.name, service.limit_percent);
        text += &format!("  on {}; reserves {}{}\n", ids(&service.gpus), ids(&service.reserves), of_each(&held));
    }
    text
}

/// Once where all cards are alike, else card by card.
fn of_each(held: &[(&str, String)]) -> String {
    match held {
        [] => String::new(),
        [(_, first), rest @ ..] if rest.iter().all(|(_, other)| other == first) => format!("; {first}"),
        several => several.iter().map(|(card, parts)| format!("\n  {card}: {parts}")).collect(),
    }
}

fn made_of(placed: &Placed) -> String {
    let word = |fill| match fill {
        Fill::Tenant => "memory",
        Fill::Context => "context",
        Fill::Weights => "weights",
        Fill::States => "states",
        Fill::Sessions => "sessions",
    };
    let parts: Vec<String> = placed.parts.iter().map(|p| format!("{} {}", word(p.fill), p.mb)).collect();
    parts.join(" + ")
}

fn rows(cards: &[CardUse]) -> String {
    let heads = ["CARD", "GPU", "TOTAL MB", "USED MB", "UTIL.", "LIMIT", "HEADROOM", "RISK", "HOLDS"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(cards.iter().map(|c| {
        vec![
            c.id.clone(),
            c.gpu.clone(),
            c.total_mb.to_string(),
            c.used_mb.to_string(),
            percent(c.utilization),
            format!("{} %", c.limit_percent),
            c.headroom_mb.to_string(),
            c.risk.as_str().to_owned(),
            holds(c),
        ]
    }));
    table(&rows)
}

fn holds(card: &CardUse) -> String {
    let services = card.holds.iter().map(|p| part(&p.service, p.share, p.shares));
    let names: Vec<String> = services.chain(card.tenants.iter().map(|t| t.name.clone())).collect();
    match (names.is_empty(), card.reserve_of.is_empty()) {
        (true, true) => "nothing".to_owned(),
        (true, false) => "reserve".to_owned(),
        (false, _) => names.join(", "),
    }
}

/// `llm 1/2`, or the name alone where there is one share.
fn part(service: &str, share: usize, shares: usize) -> String {
    if shares > 1 { format!("{service} {share}/{shares}") } else { service.to_owned() }
}

fn pictures(cards: &[CardUse]) -> String {
    let sign = |fill| match fill {
        Fill::Tenant => 'T',
        Fill::Context => 'C',
        Fill::Weights => 'W',
        Fill::States => 'S',
        Fill::Sessions => 'B',
    };
    let row = |card: &CardUse| {
        let tenants = card.tenants.iter().map(|t| Stretch { sign: 'T', mb: t.mb });
        let held = card.holds.iter().flat_map(|p| &p.parts).map(|p| Stretch { sign: sign(p.fill), mb: p.mb });
        Row {
            label: card.id.clone(),
            total_mb: card.total_mb,
            safe_mb: card.total_mb.saturating_mul(u64::from(card.limit_percent)) / 100,
            stretches: tenants.chain(held).collect(),
        }
    };
    picture(&cards.iter().map(row).collect::<Vec<_>>())
}

/// A case that was asked for, with all that is left.
fn asked_for(case: &Outcome) -> String {
    let mut text = format!("when {}: {}\n", failing(case), case.risk.as_str());
    for step in &case.moves {
        text += &format!("  {}\n", move_line(step));
    }
    for lost in &case.lost {
        text += &format!("  lost: {}\n", lost_line(lost));
    }
    if case.moves.is_empty() && case.lost.is_empty() {
        text += "  nothing was there\n";
    }
    text + &format!("  reserves left: {}\n{}", left(case), pictures(&case.cards))
}

fn failing(case: &Outcome) -> String {
    match &case.failed[..] {
        [one] => format!("{one} fails"),
        several => format!("{} fail", several.join(" and ")),
    }
}

fn left(case: &Outcome) -> String {
    if case.reserves_left.is_empty() { "none".to_owned() } else { case.reserves_left.join(" ") }
}

fn move_line(step: &Move) -> String {
    let how = match step.how {
        How::Reserve => "reserve",
        How::Shared => "shared, if it is fast enough",
    };
    let mut line = format!(
        "{}: {} -> {} ({how}; then {} full)",
        part(&step.service, step.share, step.shares),
        step.from,
        step.to,
        percent(step.utilization)
    );
    if !step.missing.is_empty() {
        line += &format!("; no room for {}", step.missing.join(", "));
    }
    line
}

fn lost_line(lost: &Lost) -> String {
    format!("{} of {}: {}", part(&lost.service, lost.share, lost.shares), lost.from, lost.why)
}

/// Each card, then each two.
fn surveys(outcomes: &[Outcome]) -> Vec<String> {
    let (ones, pairs): (Vec<&Outcome>, Vec<&Outcome>) = outcomes.iter().partition(|o| o.failed.len() == 1);
    let mut parts = vec![format!("when one card fails\n{}", survey(&ones))];
    if !pairs.is_empty() {
        let fine = pairs.iter().filter(|o| o.risk != Risk::Refuse).count();
        let head = format!("when two cards fail: of {}, {fine} lose nothing", count(pairs.len() as u64, "pair"));
        let few = pairs.len() <= MOST_PAIRS;
        let shown: Vec<&Outcome> = pairs.into_iter().filter(|o| few || o.risk != Risk::Safe).collect();
        let which = if few { "" } else { "; the others" };
        parts.push(format!("{head}{which}\n{}", survey(&shown)));
    }
    parts
}

fn survey(cases: &[&Outcome]) -> String {
    let rows: Vec<Vec<String>> = cases
        .iter()
        .map(|case| {
            let moves = case.moves.iter().map(|m| {
                let less =
                    if m.missing.is_empty() { String::new() } else { format!(" without {}", m.missing.join(", ")) };
                format!("{} -> {}{less}", part(&m.service, m.share, m.shares), m.to)
            });
            let lost = case.lost.iter().map(|l| format!("{} LOST", part(&l.service, l.share, l.shares)));
            let mut steps: Vec<String> = moves.chain(lost).collect();
            if steps.is_empty() {
                steps.push(format!("nothing was there; {} left", count(case.reserves_left.len() as u64, "reserve")));
            }
            vec![format!("  {}", case.failed.join(" ")), case.risk.as_str().to_owned(), steps.join(", ")]
        })
        .collect();
    table(&rows)
}
