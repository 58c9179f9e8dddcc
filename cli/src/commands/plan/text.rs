//! A plan for one card, as a person reads it.

use voxfleet_schema::plan::Risk;
use voxfleet_store::models::plan::{Bound, Card, Figure, Needs, Origin, Planned, Wish};

use super::{
    Found,
    bar::{LEGEND, Row, Stretch, picture},
};
use crate::commands::status::table;

/// Variants that are named; --json has all of them.
const VARIANTS: usize = 3;

pub(super) fn card(found: &Found, wish: Wish) -> String {
    let Found { card, options, .. } = found;
    if let (Some(trouble), true) = (&found.trouble, options.is_empty()) {
        return format!("{}: {trouble}", card.name);
    }
    let mut parts = vec![head(card, wish), rows(options)];
    if let Some(trouble) = &found.trouble {
        parts.insert(1, format!("it cannot be used now: {trouble}\n"));
    }
    let fitting: Vec<Row> =
        options.iter().filter(|o| o.option.risk != Risk::Refuse).map(|o| picture_row(card, o)).collect();
    if !fitting.is_empty() {
        parts.push(format!("{}{LEGEND}\n", picture(&fitting)));
    }
    parts.push(made_of(options));
    parts.push(notes(found, wish));
    parts.retain(|part| !part.is_empty());
    parts.join("\n").trim_end().to_owned()
}

fn head(card: &Card, wish: Wish) -> String {
    let tenants: Vec<String> = card.tenants.iter().map(|t| format!("{} {} MB", t.name, t.mb)).collect();
    let tenants = if tenants.is_empty() { "no tenants".to_owned() } else { tenants.join(", ") };
    format!(
        "{}: {} MB; {tenants}\n{} to hold, {} at most; safe to {} %, refused above {} %\n",
        card.name,
        card.total_mb,
        count(wish.sessions, "session"),
        count(wish.states, "decode state"),
        card.safe_percent.min(card.most_percent),
        card.most_percent,
    )
}

fn rows(options: &[Planned]) -> String {
    let heads = ["MODEL", "SESSIONS", "STATES", "USED MB", "UTIL.", "HEADROOM", "RISK", "ADVICE"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(options.iter().map(|o| {
        let headroom = if o.option.risk == Risk::Refuse { "-".to_owned() } else { o.headroom_mb.to_string() };
        vec![
            o.option.model.clone(),
            o.option.sessions.to_string(),
            o.states.to_string(),
            o.option.used_mb.to_string(),
            percent(o.option.utilization),
            headroom,
            o.option.risk.as_str().to_owned(),
            o.stance.map_or("", |s| s.as_str()).to_owned(),
        ]
    }));
    table(&rows)
}

fn picture_row(card: &Card, planned: &Planned) -> Row {
    let Planned { option, states, figures, .. } = planned;
    let stretch = |sign, mb| Stretch { sign, mb };
    let stretches = vec![
        stretch('T', card.tenants_mb()),
        stretch('C', figures.context.mb),
        stretch('W', figures.weights.mb),
        stretch('S', figures.state.mb.saturating_mul(*states)),
        stretch('B', figures.session.mb.saturating_mul(option.sessions)),
    ];
    Row { label: option.model.clone(), total_mb: card.total_mb, safe_mb: card.safe_mb(), stretches }
}

/// What the figures are, and where they come from.
fn made_of(options: &[Planned]) -> String {
    let width = options.iter().map(|o| o.option.model.len()).max().unwrap_or(0);
    let line = |o: &Planned| {
        let Needs { context, weights, state, session, .. } = &o.figures;
        let mut sum = format!("weights {} + {} of {}", weights.mb, count(o.states, "state"), state.mb);
        if context.mb > 0 {
            sum = format!("context {} + {sum}", context.mb);
        }
        if session.mb > 0 && o.option.sessions > 0 {
            sum += &format!(" + {} of {}", count(o.option.sessions, "session"), session.mb);
        }
        format!("{:width$}  {sum}: {}\n", o.option.model, origin(&o.figures))
    };
    options.iter().map(line).collect()
}

/// Which of the figures were measured.
fn origin(needs: &Needs) -> String {
    let all =
        [("context", needs.context), ("weights", needs.weights), ("states", needs.state), ("sessions", needs.session)];
    // What costs nothing needs no source.
    let all: Vec<(&str, Figure)> = all.into_iter().filter(|(_, f)| f.mb > 0).collect();
    let measured: Vec<&str> = all.iter().filter(|(_, f)| f.from == Origin::Measured).map(|(name, _)| *name).collect();
    match measured.len() {
        0 => "catalog".to_owned(),
        n if n == all.len() => "measured".to_owned(),
        _ => format!("{} measured, else catalog", measured.join(" and ")),
    }
}

fn notes(found: &Found, wish: Wish) -> String {
    let mut text = String::new();
    if found.in_use_may_be_ours {
        text += "what is in use now may include the models of a running worker: the driver does not tell whose it is\n";
    }
    if !found.variants.is_empty() {
        let best = found.variants.iter().take(VARIANTS);
        let named: Vec<String> =
            best.map(|o| format!("{} {}", o.option.model, percent(o.option.utilization))).collect();
        text += &format!("variants of better models that are safe too (--model NAME):\n  {}\n", named.join(", "));
    }
    for option in found.options.iter().filter(|o| o.option.sessions < wish.sessions) {
        let why = match option.bound {
            Bound::Asked => continue,
            // The table says that already.
            Bound::DeviceMemory if option.option.sessions == 0 => continue,
            Bound::DeviceMemory => "by the memory of the device",
            Bound::HostMemory => "by the memory of the host",
            Bound::DecodeSpeed => "by its measured speed",
        };
        text += &format!("{}: {}, {why}\n", option.option.model, count(option.option.sessions, "session"));
    }
    if found.options.iter().any(|o| o.figures.realtime_factor.is_none()) {
        text += "memory says what fits; whether the device is fast enough, `voxfleet bench` tells\n";
    }
    text
}

pub(super) fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}

pub(super) fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
