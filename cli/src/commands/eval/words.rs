//! Word and character error rates.

use serde_json::{Value, json};
use voxfleet_eval::{Edits, Op, align::align, text::Normalise, view};

use super::{
    between,
    files::{Pair, pairs},
    scatter,
};
use crate::{
    args::WordArgs,
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
};

const ENDINGS: [&[&str]; 2] = [&["txt", "json"], &["txt", "json", "jsonl"]];
/// Width of the alignment view: it is read in a terminal, and kept in files.
const WIDTH: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Words,
    Characters,
}

/// Two utterances, or two whole files, laid beside each other.
struct Scored {
    name: String,
    reference: Vec<String>,
    heard: Vec<String>,
    ops: Vec<Op>,
}

impl Scored {
    fn new(name: String, unit: Unit, normalise: Normalise, reference: &str, heard: &str) -> Self {
        let items = |text: &str| match unit {
            Unit::Words => normalise.words(text),
            Unit::Characters => normalise.characters(text).into_iter().map(String::from).collect(),
        };
        let (reference, heard) = (items(reference), items(heard));
        Self { name, ops: align(&reference, &heard), reference, heard }
    }

    fn edits(&self) -> Edits {
        Edits::of(&self.ops)
    }

    fn alignment(&self) -> Vec<Value> {
        let (mut i, mut j) = (0, 0);
        let step = |op: &Op| {
            let said = (*op != Op::Insert).then(|| &self.reference[i]);
            let found = (*op != Op::Delete).then(|| &self.heard[j]);
            i += usize::from(said.is_some());
            j += usize::from(found.is_some());
            let name = match op {
                Op::Equal => "equal",
                Op::Substitute => "substitute",
                Op::Delete => "delete",
                Op::Insert => "insert",
            };
            json!({"op": name, "ref": said, "hyp": found})
        };
        self.ops.iter().map(step).collect()
    }
}

pub(super) fn run(args: &WordArgs, unit: Unit) -> anyhow::Result<Exit> {
    let mut all = Vec::new();
    for pair in pairs(&args.sides, ENDINGS)? {
        score(args, unit, &pair, &mut all)?;
    }
    let edits: Edits = all.iter().map(Scored::edits).sum();
    if edits.reference == 0 {
        return Err(anyhow::anyhow!("{}: no words, so there is no rate", args.sides.reference)).or_exit(Exit::Input);
    }
    let items: Vec<(f64, f64)> =
        all.iter().map(Scored::edits).map(|e| (e.edits() as f64, e.reference as f64)).collect();
    let interval = scatter(&args.bootstrap, &items)?;
    if args.output.json {
        let mut value = measured(edits, unit, args.normalise.by);
        value["interval"] = interval.into();
        if all.len() > 1 {
            let row = |one: &Scored| {
                let mut row = measured(one.edits(), unit, args.normalise.by);
                row["name"] = one.name.as_str().into();
                row
            };
            value["rows"] = all.iter().map(row).collect();
        }
        if args.align {
            value["alignments"] = all.iter().map(Scored::alignment).collect();
        }
        object(&value)?;
        return Ok(Exit::Ok);
    }
    if args.align {
        for one in all.iter().filter(|one| all.len() == 1 || one.edits().edits() > 0) {
            if all.len() > 1 {
                out(&format!("{}: {}", one.name, said(one.edits(), unit)))?;
            }
            out(&view::lines(&one.reference, &one.heard, &one.ops, WIDTH))?;
        }
    }
    out(&format!("{}{}", said(edits, unit), between(interval.as_ref())))?;
    Ok(Exit::Ok)
}

fn score(args: &WordArgs, unit: Unit, pair: &Pair, all: &mut Vec<Scored>) -> anyhow::Result<()> {
    let reference = pair.reference.content.utterances().map_err(|error| pair.reference.refused(error))?;
    let heard = pair.heard.content.utterances().map_err(|error| pair.heard.refused(error))?;
    let by = args.normalise.by;
    if !args.by_line {
        all.push(Scored::new(pair.name.clone(), unit, by, &reference.join("\n"), &heard.join("\n")));
        return Ok(());
    }
    if reference.len() != heard.len() {
        let counts = format!("{} lines where REF has {}", heard.len(), reference.len());
        return Err(pair.heard.refused(anyhow::anyhow!(counts)));
    }
    for (n, (said, found)) in (1..).zip(reference.iter().zip(&heard)) {
        all.push(Scored::new(format!("{} {n}", pair.name), unit, by, said, found));
    }
    Ok(())
}

fn measured(edits: Edits, unit: Unit, by: Normalise) -> Value {
    let (rate, units) = match unit {
        Unit::Words => ("wer", "words"),
        Unit::Characters => ("cer", "characters"),
    };
    json!({
        rate: edits.rate(), "substitutions": edits.substituted, "deletions": edits.deleted,
        "insertions": edits.inserted, "hits": edits.hits(), units: edits.reference, "normalise": by.as_str(),
        "mer": edits.match_error_rate(), "wil": edits.information_lost(), "wip": edits.information_preserved(),
    })
}

fn said(edits: Edits, unit: Unit) -> String {
    let (rate, units) = match unit {
        Unit::Words => ("word error rate", "words"),
        Unit::Characters => ("character error rate", "characters"),
    };
    format!(
        "{rate} {:.2} % ({} of {} {units}: {} wrong, {} missed, {} invented)",
        edits.rate() * 100.0,
        edits.edits(),
        edits.reference,
        edits.substituted,
        edits.deleted,
        edits.inserted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(unit: Unit, reference: &str, heard: &str) -> Scored {
        Scored::new("x".to_owned(), unit, Normalise::Basic, reference, heard)
    }

    #[test]
    fn the_object_has_its_fields() {
        let object = measured(scored(Unit::Words, "a b c d", "a x c d e").edits(), Unit::Words, Normalise::Basic);
        let expected = json!({
            "wer": 0.5, "substitutions": 1, "deletions": 0, "insertions": 1, "hits": 3, "words": 4, "normalise": "basic",
            "mer": 0.4, "wil": 0.55, "wip": 0.45,
        });
        for (name, value) in expected.as_object().expect("an object") {
            let near = |a: &Value, b: &Value| {
                a == b || (a.as_f64().zip(b.as_f64())).is_some_and(|(a, b)| (a - b).abs() < 1e-12)
            };
            assert!(near(&object[name], value), "{name}: {object}");
        }
        let cer = measured(scored(Unit::Characters, "ab c", "ab d").edits(), Unit::Characters, Normalise::None);
        assert_eq!((&cer["cer"], &cer["characters"], &cer["normalise"]), (&json!(0.25), &json!(4), &json!("none")));
    }

    #[test]
    fn an_alignment_names_its_steps() {
        let steps = scored(Unit::Words, "a b c", "x a c").alignment();
        let expected = [
            json!({"op": "insert", "ref": null, "hyp": "x"}),
            json!({"op": "equal", "ref": "a", "hyp": "a"}),
            json!({"op": "delete", "ref": "b", "hyp": null}),
            json!({"op": "equal", "ref": "c", "hyp": "c"}),
        ];
        assert_eq!(steps, expected);
    }
}
