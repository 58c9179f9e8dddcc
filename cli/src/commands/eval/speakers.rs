//! Diarization error rates, by time and by words.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use voxfleet_eval::{
    Turn,
    der::{self, Der},
    rttm,
    wder::{self, Wder},
};

use super::{
    between,
    files::{Pair, pairs},
    scatter,
};
use crate::{
    args::{DerArgs, WderArgs},
    exit::{Exit, OrExit as _, coded},
    transcript::screen::{object, out},
};

const TURNS: [&[&str]; 2] = [&["rttm", "json"], &["rttm", "json"]];
const WORDS: [&[&str]; 2] = [&["json"], &["json"]];

/// The turns of one recording on both sides.
#[derive(Debug, Default, PartialEq)]
struct Recording {
    reference: Vec<Turn>,
    heard: Vec<Turn>,
}

/// Start and end in seconds of what is scored, by recording.
type Regions = BTreeMap<String, Vec<(f64, f64)>>;

pub(super) fn der(args: &DerArgs) -> anyhow::Result<Exit> {
    let mut recordings = BTreeMap::new();
    for pair in pairs(&args.sides, TURNS)? {
        collect(&pair, &mut recordings)?;
    }
    let regions = regions(args)?;
    let scored: Vec<(String, Der)> = recordings
        .into_iter()
        .map(|(name, of)| {
            let regions = match &regions {
                Some(map) => Some(
                    map.get(&name)
                        .cloned()
                        .ok_or_else(|| coded(Exit::Input, anyhow::anyhow!("--uem says nothing of {name}")))?,
                ),
                None => None,
            };
            let options = der::Options { collar_s: args.collar, skip_overlap: args.skip_overlap, regions };
            Ok((name, der::score(&of.reference, &of.heard, &options)))
        })
        .collect::<anyhow::Result<_>>()?;
    let sum: Der = scored.iter().map(|(_, der)| der.clone()).sum();
    if sum.total_s <= 0.0 {
        return Err(anyhow::anyhow!("{}: nobody speaks in what is scored", args.sides.reference)).or_exit(Exit::Input);
    }
    let wrong_s = |d: &Der| d.confusion_s + d.missed_s + d.false_alarm_s;
    let items: Vec<(f64, f64)> = scored.iter().map(|(_, d)| (wrong_s(d), d.total_s)).collect();
    let interval = scatter(&args.bootstrap, &items)?;
    if args.output.json {
        let mut value = of_time(&sum);
        value["collar"] = args.collar.into();
        value["skip_overlap"] = args.skip_overlap.into();
        value["interval"] = interval.into();
        let row = |(name, der): &(String, Der)| {
            let mut row = of_time(der);
            row["name"] = name.as_str().into();
            row["mapping"] = mapping(&der.mapping);
            row
        };
        value["rows"] = scored.iter().map(row).collect();
        object(&value)?;
        return Ok(Exit::Ok);
    }
    let share = |seconds: f64| seconds / sum.total_s * 100.0;
    out(&format!(
        "diarization error rate {:.2} % of {:.1} s (missed {:.2}, false alarm {:.2}, confusion {:.2}), Jaccard error rate {:.2} %{}",
        sum.rate() * 100.0,
        sum.total_s,
        share(sum.missed_s),
        share(sum.false_alarm_s),
        share(sum.confusion_s),
        sum.jaccard_rate() * 100.0,
        between(interval.as_ref())
    ))?;
    Ok(Exit::Ok)
}

/// One recording on each side is the same, whatever it is called; of several the names decide.
fn collect(pair: &Pair, recordings: &mut BTreeMap<String, Recording>) -> anyhow::Result<()> {
    let said = pair.reference.content.turns().map_err(|error| pair.reference.refused(error))?;
    let heard = pair.heard.content.turns().map_err(|error| pair.heard.refused(error))?;
    let names = |turns: &[(Option<String>, Turn)]| turns.iter().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
    let (known, found) = (names(&said), names(&heard));
    if known.len() <= 1 && found.len() <= 1 {
        let name = known.into_iter().flatten().next().unwrap_or_else(|| pair.name.clone());
        let of = recordings.entry(name).or_default();
        of.reference.extend(said.into_iter().map(|(_, turn)| turn));
        of.heard.extend(heard.into_iter().map(|(_, turn)| turn));
        return Ok(());
    }
    let strange: Vec<String> = found
        .difference(&known)
        .map(|n| n.clone().unwrap_or_else(|| "a recording without a name".to_owned()))
        .collect();
    if !strange.is_empty() {
        return Err(pair.heard.refused(anyhow::anyhow!("REF does not have {}", strange.join(", "))));
    }
    for (name, turn) in said {
        recordings.entry(name.unwrap_or_default()).or_default().reference.push(turn);
    }
    for (name, turn) in heard {
        recordings.entry(name.unwrap_or_default()).or_default().heard.push(turn);
    }
    Ok(())
}

/// What is scored of each recording, where it is said.
fn regions(args: &DerArgs) -> anyhow::Result<Option<Regions>> {
    let Some(path) = &args.uem else { return Ok(None) };
    let named = |error: anyhow::Error| coded(Exit::Input, error.context(path.display().to_string()));
    let text = std::fs::read_to_string(path).map_err(|error| named(error.into()))?;
    let mut map = Regions::new();
    for region in rttm::parse_uem(&text).map_err(|error| named(error.into()))? {
        map.entry(region.file).or_default().push((region.start_s, region.end_s));
    }
    Ok(Some(map))
}

fn of_time(der: &Der) -> Value {
    json!({
        "der": der.rate(), "total": der.total_s, "correct": der.correct_s, "missed_detection": der.missed_s,
        "false_alarm": der.false_alarm_s, "confusion": der.confusion_s, "jer": der.jaccard_rate(),
        "speakers": der.speakers,
    })
}

/// Speakers of what was heard by those that they were found to be.
fn mapping(pairs: &[(String, String)]) -> Value {
    pairs
        .iter()
        .map(|(heard, said)| (heard.clone(), Value::from(said.as_str())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

pub(super) fn wder(args: &WderArgs) -> anyhow::Result<Exit> {
    let mut scored: Vec<(String, Wder)> = Vec::new();
    for pair in pairs(&args.sides, WORDS)? {
        let by = args.normalise.by;
        let said = pair.reference.content.spoken(by).map_err(|error| pair.reference.refused(error))?;
        let heard = pair.heard.content.spoken(by).map_err(|error| pair.heard.refused(error))?;
        scored.push((pair.name, wder::score(&said, &heard)));
    }
    let sum: Wder = scored.iter().map(|(_, one)| one.clone()).sum();
    if sum.pairs == 0 {
        return Err(anyhow::anyhow!("{}: none of its words is in what was heard", args.sides.reference))
            .or_exit(Exit::Input);
    }
    let items: Vec<(f64, f64)> = scored.iter().map(|(_, one)| (one.wrong as f64, one.pairs as f64)).collect();
    let interval = scatter(&args.bootstrap, &items)?;
    if args.output.json {
        let mut value = of_words(&sum);
        value["normalise"] = args.normalise.by.as_str().into();
        value["interval"] = interval.into();
        let row = |(name, one): &(String, Wder)| {
            let mut row = of_words(one);
            row["name"] = name.as_str().into();
            row["mapping"] = mapping(&one.mapping);
            row
        };
        value["rows"] = scored.iter().map(row).collect();
        object(&value)?;
        return Ok(Exit::Ok);
    }
    out(&format!(
        "word diarization error rate {:.2} % ({} of {} words with the wrong speaker), word error rate {:.2} %{}",
        sum.rate() * 100.0,
        sum.wrong,
        sum.pairs,
        sum.edits.rate() * 100.0,
        between(interval.as_ref())
    ))?;
    Ok(Exit::Ok)
}

fn of_words(one: &Wder) -> Value {
    json!({"wder": one.rate(), "wrong": one.wrong, "words": one.pairs, "wer": one.edits.rate()})
}

#[cfg(test)]
mod tests {
    use super::{
        super::{content::Content, files::File},
        *,
    };

    fn pair(reference: &str, heard: &str) -> Pair {
        let file = |text: &str| File { path: "x".to_owned(), content: Content::of(text).expect("a file") };
        Pair { name: "pair".to_owned(), reference: file(reference), heard: file(heard) }
    }

    fn line(file: &str, who: &str) -> String {
        format!("SPEAKER {file} 1 0 1 <NA> <NA> {who} <NA> <NA>\n")
    }

    #[test]
    fn one_recording_needs_no_name_and_several_do() {
        let mut found = BTreeMap::new();
        collect(&pair(&line("a", "A"), &line("other", "S1")), &mut found).expect("one each");
        assert_eq!((found["a"].reference.len(), found["a"].heard.len()), (1, 1));
        let two = line("a", "A") + &line("b", "B");
        let mut found = BTreeMap::new();
        collect(&pair(&two, &line("b", "S1")), &mut found).expect("nobody was heard in a");
        assert_eq!((found["a"].heard.len(), found["b"].heard.len()), (0, 1));
        let error = collect(&pair(&two, &line("c", "S1")), &mut found).expect_err("what is c?");
        assert_eq!(crate::exit::exit_of(&error), Exit::Input);
        assert!(error.to_string().contains("REF does not have c"), "{error}");
    }

    #[test]
    fn objects_have_their_fields() {
        let turns = |who: &str| vec![Turn { start_s: 0.0, end_s: 2.0, speaker: who.to_owned() }];
        let der = der::score(&turns("A"), &turns("S1"), &der::Options::default());
        let value = of_time(&der);
        assert_eq!(
            (&value["der"], &value["total"], &value["missed_detection"]),
            (&json!(0.0), &json!(2.0), &json!(0.0))
        );
        assert_eq!(mapping(&der.mapping), json!({"S1": "A"}));
        let spoken = |who: &str| vec![wder::Spoken { word: "a".to_owned(), speaker: Some(who.to_owned()) }];
        assert_eq!(
            of_words(&wder::score(&spoken("A"), &spoken("S1"))),
            json!({"wder": 0.0, "wrong": 0, "words": 1, "wer": 0.0})
        );
    }
}
