//! Clustering alone, on the x-vectors of a meeting that VBx's authors give with their recipe.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use voxfleet_diarize::{
    cluster::{
        ahc::{self, Ahc, Item},
        vbx::{self, Vbx},
    },
    xvectors::{self, Transform},
};
use voxfleet_eval::{Turn, der, rttm};

use super::sets;
use crate::bench::rounded;

/// As the authors score it: so much around each boundary of the reference is not scored, a quarter of a second on either
/// side, nor is overlapping speech.
const COLLAR_S: f64 = 0.5;
/// Where the clustering stops that VBx begins with: too many speakers are what it wants.
const BEGIN: f32 = 0.5;
/// Dimensions of the projection that count.
const DIMS: usize = 128;

/// The row of this set.
pub(super) fn row() -> Result<Value> {
    let folder = sets::data().join("diarization/vbx");
    let bytes = |name: &str| fs::read(folder.join(name)).with_context(|| folder.join(name).display().to_string());
    let archive = xvectors::archive(&bytes("ES2005a.ark")?)?;
    let transform = Transform::from_hdf5(&bytes("ResNet101_16kHz.transform.h5")?)?;
    let plda = xvectors::plda(&bytes("ResNet101_16kHz.plda")?)?;
    let mut windows = Vec::with_capacity(archive.len());
    for line in String::from_utf8(bytes("ES2005a.seg")?)?.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, start, end, ..] = fields[..] else { anyhow::bail!("a segment without times: {line:?}") };
        windows.push((start.parse::<f64>()?, end.parse::<f64>()?));
    }
    ensure!(windows.len() == archive.len(), "{} segments for {} vectors", windows.len(), archive.len());
    let reference: Vec<Turn> =
        rttm::parse(&String::from_utf8(bytes("ES2005a.rttm")?)?)?.into_iter().map(|entry| entry.turn).collect();

    let reduced: Vec<Vec<f64>> = archive.iter().map(|(_, vector)| transform.apply(vector)).collect();
    let single = |vector: &Vec<f64>| vector.iter().map(|x| *x as f32).collect();
    let items: Vec<Item> = reduced.iter().map(|vector| Item { vector: single(vector), weight_ms: 1_000 }).collect();
    let ahc = Ahc { threshold: BEGIN, doubt_ms: 0.0, min_speakers: 1, max_speakers: None, least_ms: 0 };
    let begin = ahc::cluster(&items, &ahc);
    let projected: Vec<Vec<f64>> = reduced.iter().map(|vector| plda.project(vector, DIMS)).collect();
    let found = vbx::refine(&projected, &plda.psi, &begin, &Vbx::default());
    let turns: Vec<Turn> = xvectors::turns(&windows, &found)
        .into_iter()
        .map(|(start_s, end_s, who)| Turn { start_s, end_s, speaker: who.to_string() })
        .collect();
    let options = der::Options { collar_s: COLLAR_S, skip_overlap: true, regions: None };
    let der = der::score(&reference, &turns, &options);
    let whole = der::score(&reference, &turns, &der::Options::default());
    Ok(json!({
        "set": "vbx",
        "der": rounded(der.rate()),
        "der_no_collar": rounded(whole.rate()),
        "scored": "0.25 s on either side of each boundary and overlapping speech left out",
        "miscounted_speakers": (found.iter().max().map_or(0, |last| last + 1)).abs_diff(4),
        "recordings": 1,
    }))
}
