//! Questions as JSON, so that a script in another language can put them. Shared by the example and the tests.

use serde_json::{Value, json};
use voxfleet_eval::{Edits, Turn, align, der, text::Normalise, wder};

/// None for what is no question.
pub(crate) fn answer(question: &Value) -> Option<Value> {
    match question["what"].as_str()? {
        "words" => words(question),
        "speakers" => speakers(question),
        "speaker_words" => speaker_words(question),
        _ => None,
    }
}

fn words(question: &Value) -> Option<Value> {
    let normalise: Normalise = question["normalise"].as_str()?.parse().ok()?;
    let (mut words, mut letters) = (Edits::default(), Edits::default());
    for pair in question["pairs"].as_array()? {
        let (said, heard) = (pair[0].as_str()?, pair[1].as_str()?);
        words += align::edits(&normalise.words(said), &normalise.words(heard));
        letters += align::edits(&normalise.characters(said), &normalise.characters(heard));
    }
    Some(json!({
        "wer": words.rate(), "mer": words.match_error_rate(), "wil": words.information_lost(),
        "wip": words.information_preserved(), "hits": words.hits(), "substitutions": words.substituted,
        "deletions": words.deleted, "insertions": words.inserted, "cer": letters.rate(), "cer_hits": letters.hits(),
    }))
}

fn speakers(question: &Value) -> Option<Value> {
    let pairs = |value: &Value| -> Option<Vec<(f64, f64)>> {
        value.as_array()?.iter().map(|r| Some((r[0].as_f64()?, r[1].as_f64()?))).collect()
    };
    let options = der::Options {
        collar_s: question["collar_s"].as_f64()?,
        skip_overlap: question["skip_overlap"].as_bool()?,
        regions: pairs(&question["regions"]),
    };
    let found = der::score(&turns(&question["reference"])?, &turns(&question["heard"])?, &options);
    Some(json!({
        "der": found.rate(), "total": found.total_s, "correct": found.correct_s, "confusion": found.confusion_s,
        "missed": found.missed_s, "false_alarm": found.false_alarm_s, "jer": found.jaccard_rate(),
    }))
}

fn turns(value: &Value) -> Option<Vec<Turn>> {
    let turn =
        |t: &Value| Some(Turn { start_s: t[0].as_f64()?, end_s: t[1].as_f64()?, speaker: t[2].as_str()?.to_owned() });
    value.as_array()?.iter().map(turn).collect()
}

fn speaker_words(question: &Value) -> Option<Value> {
    let spoken = |value: &Value| -> Option<Vec<wder::Spoken>> {
        let one = |w: &Value| {
            Some(wder::Spoken { word: w[0].as_str()?.to_owned(), speaker: w[1].as_str().map(str::to_owned) })
        };
        value.as_array()?.iter().map(one).collect()
    };
    let found = wder::score(&spoken(&question["reference"])?, &spoken(&question["heard"])?);
    Some(json!({ "wder": found.rate(), "pairs": found.pairs, "wrong": found.wrong }))
}
