//! `voxfleet eval`: a transcript measured against what was said. Needs no fleet.
//!
//! | module | holds |
//! |---|---|
//! | [`files`] | which file of one side belongs to which of the other |
//! | [`content`] | what a file says, whatever its form |
//! | [`words`] | wer, cer |
//! | [`speakers`] | der, wder |
//! | [`delay`] | latency |
//!
//! `--json` prints one object; rates are fractions, times seconds, delays milliseconds.

mod content;
mod delay;
mod files;
mod speakers;
mod words;

use serde_json::{Value, json};
use voxfleet_eval::bootstrap::{SEED, interval};

use crate::{
    args::{BootstrapArg, EvalArgs, EvalCommand},
    exit::{Exit, OrExit as _},
};

const CONFIDENCE: f64 = 0.95;

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<Exit> {
    match &args.what {
        EvalCommand::Wer(args) => words::run(args, words::Unit::Words),
        EvalCommand::Cer(args) => words::run(args, words::Unit::Characters),
        EvalCommand::Der(args) => speakers::der(args),
        EvalCommand::Wder(args) => speakers::wder(args),
        EvalCommand::Latency(args) => delay::run(args),
    }
}

/// The interval of a rate that is a sum of what is wrong over a sum of what there is, of the same items.
fn scatter(args: &BootstrapArg, items: &[(f64, f64)]) -> anyhow::Result<Option<Value>> {
    let Some(rounds) = args.rounds else { return Ok(None) };
    let rate = |drawn: &[usize]| {
        let (wrong, all) = drawn.iter().fold((0.0, 0.0), |(wrong, all), n| (wrong + items[*n].0, all + items[*n].1));
        if all > 0.0 { wrong / all } else { 0.0 }
    };
    match interval(items.len(), rounds, CONFIDENCE, SEED, rate) {
        Some(found) => Ok(Some(json!({
            "low": found.low, "high": found.high, "confidence": found.confidence, "rounds": found.rounds,
            "items": items.len(),
        }))),
        None => {
            Err(anyhow::anyhow!("--bootstrap draws from several files or lines, and there is one")).or_exit(Exit::Usage)
        }
    }
}

/// `, 95 % between 1.20 and 3.40 %`, where it was asked for.
fn between(interval: Option<&Value>) -> String {
    let Some((low, high)) = interval.and_then(|i| Some((i["low"].as_f64()?, i["high"].as_f64()?))) else {
        return String::new();
    };
    format!(", {:.0} % between {:.2} and {:.2} %", CONFIDENCE * 100.0, low * 100.0, high * 100.0)
}
