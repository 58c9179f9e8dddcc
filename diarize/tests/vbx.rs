//! VBx on the authors' own example: real x-vectors of an AMI meeting, their PLDA, and the figure that they report.
//!
//! Scored as they score it: 0.25 s on either side of every reference boundary and all overlapping speech left out. Where
//! the data is not here, the test says so and passes.

use std::{fs, path::PathBuf};

use voxfleet_diarize::{
    cluster::{
        ahc::{self, Ahc, Item},
        vbx::{self, Vbx},
    },
    xvectors::{self, Transform},
};

/// DER in percent that the authors' README reports for this recording, scored as said above.
const REPORTED: f64 = 7.06;

#[test]
fn vbx_is_as_good_as_its_authors_say() {
    let shared = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("VOXFLEET_TEST_DATA").map_or(shared, PathBuf::from).join("diarization/vbx");
    if !folder.join("ES2005a.ark").is_file() {
        println!("skipped: {} is not here (set VOXFLEET_TEST_DATA)", folder.display());
        return;
    }
    let bytes = |name: &str| fs::read(folder.join(name)).unwrap();
    let archive = xvectors::archive(&bytes("ES2005a.ark")).unwrap();
    let transform = Transform::from_hdf5(&bytes("ResNet101_16kHz.transform.h5")).unwrap();
    let plda = xvectors::plda(&bytes("ResNet101_16kHz.plda")).unwrap();
    let segments = String::from_utf8(bytes("ES2005a.seg")).unwrap();
    let windows: Vec<(f64, f64)> = segments
        .lines()
        .zip(&archive)
        .map(|(line, (name, _))| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(fields[0], name);
            (fields[2].parse().unwrap(), fields[3].parse().unwrap())
        })
        .collect();
    assert_eq!(windows.len(), 1_025);

    let reduced: Vec<Vec<f64>> = archive.iter().map(|(_, vector)| transform.apply(vector)).collect();
    let items: Vec<Item> = reduced
        .iter()
        .map(|vector| Item { vector: vector.iter().map(|x| *x as f32).collect(), weight_ms: 1_000 })
        .collect();
    let turns = String::from_utf8(bytes("ES2005a.rttm")).unwrap();
    let reference: Vec<(f64, f64, String)> = turns
        .lines()
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (start, length): (f64, f64) = (fields[3].parse().unwrap(), fields[4].parse().unwrap());
            (start, start + length, fields[7].to_owned())
        })
        .collect();
    let projected: Vec<Vec<f64>> = reduced.iter().map(|vector| plda.project(vector, 128)).collect();
    // It is to begin with too many speakers; how many does not matter much.
    for threshold in [0.4, 0.5, 0.6] {
        let ahc = Ahc { threshold, doubt_ms: 0.0, min_speakers: 1, max_speakers: None, least_ms: 0 };
        let begin = ahc::cluster(&items, &ahc);
        let before = begin.iter().max().unwrap() + 1;
        let found = vbx::refine(&projected, &plda.psi, &begin, &Vbx::default());
        let (from, to) = (
            error_rate(&reference, &xvectors::turns(&windows, &begin)),
            error_rate(&reference, &xvectors::turns(&windows, &found)),
        );
        let speakers = found.iter().max().unwrap() + 1;
        println!("threshold {threshold}: {before} clusters, {from:.2} %; then {speakers} speakers, {to:.2} %");
        assert!(speakers <= 5 && before > 2 * speakers, "{before} clusters, {speakers} speakers");
        assert!(to <= REPORTED + 0.01 && to < from, "threshold {threshold}: {from:.2} %, then {to:.2} %");
    }
}

/// Diarization error rate in percent, frames of 10 ms, the best mapping of speakers.
fn error_rate(reference: &[(f64, f64, String)], found: &[(f64, f64, usize)]) -> f64 {
    let frame = |seconds: f64| (seconds * 100.0).round().max(0.0) as usize;
    let mut names: Vec<&str> = reference.iter().map(|r| r.2.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let frames = frame(reference.iter().map(|r| r.1).chain(found.iter().map(|f| f.1)).fold(0.0, f64::max)) + 30;
    let speakers = found.iter().map(|f| f.2 + 1).max().unwrap_or(0);
    let mut truth = vec![0u32; frames];
    let mut said = vec![None; frames];
    let mut scored = vec![true; frames];
    for (start, end, name) in reference {
        let who = names.iter().position(|n| n == name).unwrap();
        truth[frame(*start)..frame(*end)].iter_mut().for_each(|t| *t |= 1 << who);
        for edge in [start, end] {
            scored[frame(edge - 0.25)..frame(edge + 0.25)].fill(false);
        }
    }
    for (start, end, who) in found {
        said[frame(*start)..frame(*end)].fill(Some(*who));
    }
    let mut common = vec![vec![0usize; speakers]; names.len()];
    let (mut total, mut wrong, mut both) = (0, 0, 0);
    for at in (0..frames).filter(|at| scored[*at] && truth[*at].count_ones() < 2) {
        match (truth[at], said[at]) {
            (0, None) => {}
            (0, Some(_)) => wrong += 1,
            (_, None) => (total, wrong) = (total + 1, wrong + 1),
            (truth, Some(who)) => {
                common[truth.trailing_zeros() as usize][who] += 1;
                (total, both) = (total + 1, both + 1);
            }
        }
    }
    (100 * (wrong + both - best(&common, &mut Vec::new()))) as f64 / total as f64
}

/// The most that a mapping of rows to columns, each once, adds up to; there are few rows.
fn best(common: &[Vec<usize>], taken: &mut Vec<usize>) -> usize {
    let Some(row) = common.get(taken.len()) else { return 0 };
    let unmapped = usize::MAX;
    let columns = (0..row.len()).filter(|c| row[*c] > 0 && !taken.contains(c)).collect::<Vec<_>>();
    columns.into_iter().chain([unmapped]).fold(0, |most, column| {
        taken.push(column);
        let sum = row.get(column).copied().unwrap_or(0) + best(common, taken);
        taken.pop();
        most.max(sum)
    })
}
