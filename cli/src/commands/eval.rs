//! `voxfleet eval`: a transcript measured against what was said. Needs no fleet.

use std::io::Read as _;

use serde_json::{Value, json};

use crate::{
    args::{EvalArgs, EvalCommand, WerArgs},
    exit::{Exit, OrExit as _},
    transcript::screen::{object, out},
    wer::{WordErrors, compare},
};

pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<Exit> {
    match &args.what {
        EvalCommand::Wer(args) => wer(args),
    }
}

fn wer(args: &WerArgs) -> anyhow::Result<Exit> {
    if args.reference == "-" && args.heard == "-" {
        return Err(anyhow::anyhow!("only one of the two texts can come from standard input")).or_exit(Exit::Usage);
    }
    let (reference, heard) = (text(&args.reference)?, text(&args.heard)?);
    let errors = compare(&reference, &heard);
    if errors.reference_words == 0 {
        return Err(anyhow::anyhow!("{}: no words, so there is no rate", args.reference)).or_exit(Exit::Input);
    }
    if args.output.json {
        object(&measured(errors))?;
    } else {
        out(&format!(
            "word error rate {:.2} % ({} of {} words: {} wrong, {} missed, {} invented)",
            errors.rate() * 100.0,
            errors.edits(),
            errors.reference_words,
            errors.substituted,
            errors.deleted,
            errors.inserted
        ))?;
    }
    Ok(Exit::Ok)
}

fn measured(errors: WordErrors) -> Value {
    json!({
        "wer": errors.rate(), "substitutions": errors.substituted, "deletions": errors.deleted,
        "insertions": errors.inserted, "words": errors.reference_words,
    })
}

fn text(path: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = if path == "-" {
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    read.map_err(|error| anyhow::Error::new(error).context(path.to_owned())).or_exit(Exit::Input)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_its_fields() {
        let object = measured(compare("a b c d", "a x c d e"));
        assert_eq!(object, json!({"wer": 0.5, "substitutions": 1, "deletions": 0, "insertions": 1, "words": 4}));
    }
}
