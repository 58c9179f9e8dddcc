//! What a user would take instead, over the same recordings and with the same two networks: sherpa-onnx's offline diarization
//! (windows ten times as dense as ours, an embedding for each speaker of each, complete linkage), on one thread, in a
//! Python of its own.
//!
//! Its clustering stops at a distance that its user chooses; there is a row for each of several. Where the reference says how
//! many people there are (`ami30_oracle`), it is told.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use voxfleet_eval::rttm;

use super::{Row, progress, sets::Recording};

const SCRIPT: &str = include_str!("peer.py");
/// What the script says where a package is missing.
const MISSING: i32 = 77;

/// How the peer is run.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct PeerArgs {
    /// sherpa-onnx beside ours, where Python has it
    #[arg(long)]
    peers: bool,
    /// With --peers: a Python that has sherpa-onnx, onnx and numpy
    #[arg(long, default_value = "python3", value_name = "FILE", requires = "peers")]
    python: PathBuf,
    /// With --peers: distances at which its clustering stops; 0.5 is its default
    #[arg(long, default_values_t = [0.5, 0.7, 0.9], value_delimiter = ',', value_name = "N", requires = "peers")]
    thresholds: Vec<f64>,
}

impl PeerArgs {
    pub(super) fn wanted(&self) -> bool {
        self.peers
    }
}

/// One recording at one threshold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Run {
    name: String,
    /// None = to be found.
    speakers: Option<usize>,
    threshold: f64,
}

/// What came of it.
#[derive(Debug, Deserialize)]
struct Done {
    #[serde(flatten)]
    run: Run,
    took_s: f64,
    rttm: String,
    version: String,
}

/// Rows of the peer for these sets.
pub(super) fn rows(
    args: &PeerArgs,
    segmentation: Option<&Path>,
    encoder: Option<&Path>,
    sets: &[(&str, Vec<Recording>)],
) -> Result<Vec<Value>> {
    let segmentation = segmentation.context("it needs the segmentation network")?;
    let folder = tempfile::tempdir()?;
    let ours = folder.path().join("ours.onnx");
    if encoder.is_none() {
        fs::write(&ours, voxfleet_diarize::ENCODER)?;
    }
    let mut runs = Vec::new();
    let mut of_set: BTreeMap<String, (&str, &Recording)> = BTreeMap::new();
    for (set, recordings) in sets {
        for recording in recordings {
            let name = format!("{set}-{}", recording.name);
            let bytes: Vec<u8> = recording.at_16k()?.into_iter().flat_map(f32::to_le_bytes).collect();
            fs::write(folder.path().join(format!("{name}.f32")), bytes)?;
            let oracle = set.ends_with("oracle");
            let speakers = oracle.then(|| recording.speakers());
            // Told how many there are, it does not look at distances.
            let thresholds = if oracle { &args.thresholds[..1] } else { &args.thresholds };
            runs.extend(thresholds.iter().map(|threshold| Run { name: name.clone(), speakers, threshold: *threshold }));
            of_set.insert(name, (*set, recording));
        }
    }
    fs::write(folder.path().join("runs.json"), serde_json::to_vec(&runs)?)?;
    let script = folder.path().join("peer.py");
    fs::write(&script, SCRIPT)?;
    progress(&format!("sherpa-onnx: {} recordings, {} runs", of_set.len(), runs.len()));
    let output = Command::new(&args.python)
        .arg(&script)
        .args([segmentation, encoder.unwrap_or(&ours), folder.path()])
        .output()
        .with_context(|| args.python.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.trim_end().lines().next_back().unwrap_or_default();
    match output.status.code() {
        Some(0) => {}
        Some(MISSING) => bail!("{last} (pip install sherpa-onnx==2.0.1 onnx==1.23.2 numpy)"),
        _ => bail!("it failed: {last}"),
    }
    let done = String::from_utf8(output.stdout)?;
    let done = done.lines().map(serde_json::from_str).collect::<Result<Vec<Done>, _>>()?;
    let done_runs: Vec<&Run> = done.iter().map(|done| &done.run).collect();
    ensure!(done_runs.iter().copied().eq(&runs), "it left runs out");
    table(&done, &of_set, sets)
}

/// A row for each set and threshold, in the order of the sets.
fn table(
    done: &[Done],
    of_set: &BTreeMap<String, (&str, &Recording)>,
    sets: &[(&str, Vec<Recording>)],
) -> Result<Vec<Value>> {
    let mut rows: Vec<(&str, Option<f64>, Row, &str)> = Vec::new();
    for Done { run, took_s, rttm, version } in done {
        let (set, recording) = of_set.get(&run.name).with_context(|| format!("nobody asked for {}", run.name))?;
        let turns: Vec<_> = rttm::parse(rttm)?.into_iter().map(|entry| entry.turn).collect();
        let threshold = run.speakers.is_none().then_some(run.threshold);
        let known = rows.iter().position(|(name, of, ..)| name == set && *of == threshold);
        let at = known.unwrap_or_else(|| {
            rows.push((set, threshold, Row::default(), version));
            rows.len() - 1
        });
        rows[at].2.add_turns(recording, &turns, *took_s);
    }
    let place = |set: &str| sets.iter().position(|(name, _)| *name == set);
    rows.sort_by(|a, b| place(a.0).cmp(&place(b.0)).then(a.1.unwrap_or(0.0).total_cmp(&b.1.unwrap_or(0.0))));
    let object = |(set, threshold, row, version): &(&str, Option<f64>, Row, &str)| {
        let mut object = row.object(set);
        object["engine"] = format!("sherpa-onnx {version}").into();
        object["threshold"] = json!(threshold);
        object
    };
    Ok(rows.iter().map(object).collect())
}

#[cfg(test)]
mod tests {
    use voxfleet_eval::Turn;

    use super::*;

    #[test]
    fn recordings_of_a_set_are_summed_by_threshold() {
        let turn = |start_s: f64, who: &str| Turn { start_s, end_s: start_s + 1.0, speaker: who.to_owned() };
        let recording = || Recording::of(vec![0; 2 * 16_000], vec![turn(0.0, "a"), turn(1.0, "b")]);
        let sets = [("two", vec![recording(), recording()]), ("one_oracle", vec![recording()])];
        let names = [("two-a", 0, 0), ("two-b", 0, 1), ("one", 1, 0)];
        let of_set = names.iter().map(|(name, set, n)| ((*name).to_owned(), (sets[*set].0, &sets[*set].1[*n])));
        let done = |name: &str, speakers: Option<usize>, threshold: f64, second: &str| Done {
            run: Run { name: name.to_owned(), speakers, threshold },
            took_s: 0.5,
            rttm: format!("SPEAKER x 1 0 1 <NA> <NA> 0 <NA> <NA>\nSPEAKER x 1 1 1 <NA> <NA> {second} <NA> <NA>\n"),
            version: "9".to_owned(),
        };
        let done = [
            done("one", Some(2), 0.5, "1"),
            done("two-a", None, 0.9, "0"),
            done("two-a", None, 0.5, "1"),
            done("two-b", None, 0.9, "1"),
            done("two-b", None, 0.5, "1"),
        ];
        let rows = table(&done, &of_set.collect(), &sets).expect("rows");
        let told = |row: &Value| (row["set"].clone(), row["threshold"].as_f64(), row["der"].as_f64());
        let expected = [("two", Some(0.5), Some(0.0)), ("two", Some(0.9), Some(0.25)), ("one_oracle", None, Some(0.0))];
        let expected = expected.map(|(set, threshold, der)| (Value::from(set), threshold, der));
        assert_eq!(rows.iter().map(told).collect::<Vec<_>>(), expected);
        assert_eq!((rows[0]["realtime_factor"].as_f64(), rows[0]["recordings"].as_u64()), (Some(0.25), Some(2)));
        assert_eq!(
            (rows[0]["engine"].as_str(), rows[1]["miscounted_speakers"].as_u64()),
            (Some("sherpa-onnx 9"), Some(1))
        );
    }
}
