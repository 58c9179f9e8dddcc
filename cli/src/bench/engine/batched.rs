//! CTranslate2 on batches of one window, with a text of fixed length.

use anyhow::{Context as _, Result, ensure};
use voxfleet_worker::{
    engine::ct2::trial::{Length, Settings, TrialModel},
    ipc::ModelFile,
};

use super::{
    super::{
        engines::{self, Engine},
        models::{Model, micro_copied},
        progress,
    },
    EngineArgs,
    rows::{Row, batches, best_of},
};

/// Appends a row for each compute type, number of threads and batch. The device that they ran on.
pub(super) fn speed(
    args: &EngineArgs,
    (model, file): (Model, &ModelFile),
    samples: &[f32],
    threads: &[u32],
    rows: &mut Vec<Row>,
) -> Result<Vec<&'static str>> {
    let mut devices = Vec::new();
    // Beside the model of the tests is no place for a folder.
    let dir = tempfile::tempdir()?;
    let copy = if model == Model::Micro { Some(micro_copied(dir.path())?) } else { None };
    let file = copy.as_ref().unwrap_or(file);
    // Random weights end where they like, in each kind of numbers elsewhere; a real model ends where the text does.
    let tokens = args.max_tokens as usize;
    let length = if model == Model::Micro { Length::AtMost(tokens) } else { Length::Exactly(tokens) };
    for compute_type in &args.compute_types {
        for threads in threads.iter().map(|n| *n as usize) {
            let mut loaded = TrialModel::load(&file.name, &file.path, *compute_type, threads, args.use_gpu)?;
            devices.push(loaded.device());
            for case in batches(threads, &args.batches) {
                let of = format!("{}, ct2 {}, {case}", file.name, engines::name_of(*compute_type));
                progress(&of);
                let (windows, settings) = (vec![samples; case.batch], Settings { context: case.context, length });
                let audio_s = samples.len() as f64 / 16_000.0 * case.batch as f64;
                let timed = best_of(args.rounds, audio_s, || {
                    let said = loaded.decode(&windows, settings)?;
                    ensure!(said.len() == windows.len(), "{} texts of {} windows", said.len(), windows.len());
                    said.first().map(|said| said.text.split_whitespace().count()).context("no text")
                });
                rows.push(Row {
                    model: file.name.clone(),
                    weights: args.stubs.weights(model),
                    engine: Engine::Ct2,
                    compute_type: engines::name_of(*compute_type),
                    case,
                    positions: case.context.positions(samples.len()),
                    flash_attention: false,
                    timed: timed.context(of)?,
                });
            }
        }
    }
    Ok(devices)
}
