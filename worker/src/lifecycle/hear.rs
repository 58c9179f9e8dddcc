//! What a child says, and where it goes: to the session it is about, or into what is known of the engine.

use std::sync::atomic::Ordering;

use tokio::time::Instant;
use voxfleet_schema::{
    SAMPLE_RATE_HZ,
    failure::FailureClass,
    fleet::{ModelState, Residency},
};

use super::{Decoding, Engine, load::Load, suspects::Doing};
use crate::{capacity::locked, ipc::FromEngine};

impl Engine {
    /// Takes one message from the child. Called by its reader only.
    pub(super) fn receive(&self, message: FromEngine) {
        let outbox = |handle: u64| locked(&self.0.outboxes).get(&handle).cloned();
        locked(&self.0.progress).heard();
        match message {
            FromEngine::Began { handle, at } => {
                let name = outbox(handle).map(|outbox| outbox.name.clone());
                let mut decoding = locked(&self.0.decoding);
                let begun = decoding.entry(handle).or_insert(Decoding { name, at, windows: 0 });
                begun.at = at;
                begun.windows += 1;
            }
            FromEngine::Stepping { handle, at } => {
                let name = outbox(handle).map(|outbox| outbox.name.clone());
                *locked(&self.0.stepping) = Some(Doing { name, at, stepping: true });
            }
            FromEngine::Stepped => *locked(&self.0.stepping) = None,
            FromEngine::Over { handle } => {
                let mut decoding = locked(&self.0.decoding);
                if let Some(begun) = decoding.get_mut(&handle) {
                    begun.windows -= 1;
                    if begun.windows == 0 {
                        decoding.remove(&handle);
                    }
                }
            }
            // Hearing it was all.
            FromEngine::Pong { .. } => {}
            // Only the first one counts, and that one was taken by the reader.
            FromEngine::Ready { .. } => tracing::warn!("engine said ready twice"),
            FromEngine::Loaded { model, took_ms, resident_mb } => {
                tracing::info!(model, took_ms, resident_mb, "model loaded");
                locked(&self.0.asked).remove(&model);
                locked(&self.0.loads).insert(model.clone(), Load::Took { ms: took_ms });
                self.has_loaded(&model);
            }
            FromEngine::Models(models) => self.models_are(models),
            FromEngine::Consumed { handle, bytes } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.account.consumed(bytes);
                }
            }
            FromEngine::Note { handle, note } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.note(note);
                }
            }
            FromEngine::Partial { handle, partial } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.partial(*partial);
                }
            }
            FromEngine::Final { handle, draft } => {
                let outbox = outbox(handle);
                if !draft.parked && !outbox.as_ref().is_some_and(|outbox| outbox.scout) {
                    let samples = draft.to_sample.saturating_sub(draft.from_sample);
                    locked(&self.0.progress).covered(Instant::now(), samples * 1_000 / u64::from(SAMPLE_RATE_HZ));
                }
                if let Some(outbox) = outbox {
                    outbox.final_draft(draft);
                }
            }
            FromEngine::Revision { handle, revision } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.revision(revision);
                }
            }
            FromEngine::Heard { handle, heard } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.heard(heard);
                }
            }
            FromEngine::Finished { handle } => {
                if let Some(outbox) = outbox(handle) {
                    outbox.finished();
                }
            }
            FromEngine::Failed { handle, failure } => {
                if let Some(outbox) = outbox(handle) {
                    if failure.class == FailureClass::OutOfMemory {
                        self.has_no_room(&outbox.model);
                    }
                    outbox.failed(failure);
                }
            }
            FromEngine::Progress { decodes, audio_ms, busy_ms, working, neighbour_ms } => {
                let mut progress = locked(&self.0.progress);
                progress.progress(Instant::now(), decodes, audio_ms, busy_ms, working);
                progress.neighbour(neighbour_ms);
                drop(progress);
                self.0.activity.notify_one();
            }
            // On the CPU in place of a GPU it says nothing of that.
            FromEngine::Lived { .. } if self.0.config.use_gpu && self.0.on_cpu.load(Ordering::Relaxed) => {}
            FromEngine::Lived { model, audio_ms, pool_ms } => self.0.lived.send_modify(|lived| {
                let sum = lived.entry(model).or_default();
                *sum = (sum.0 + audio_ms, sum.1 + pool_ms);
            }),
        }
    }

    /// The child's models, and what is new about them.
    fn models_are(&self, models: Vec<ModelState>) {
        let mut was = Vec::new();
        self.files_are(&models);
        self.0.status.send_modify(|status| was = std::mem::replace(&mut status.models, models.clone()));
        for model in &models {
            let before = was.iter().find(|before| before.name == model.name).map(|before| before.state);
            if matches!(model.state, Residency::NoRoom | Residency::Failed | Residency::Missing) {
                // It was answered: whoever takes the last memory from now on is another.
                locked(&self.0.asked).remove(&model.name);
            }
            match (before, model.state) {
                (Some(before), now) if before == now => {}
                (_, Residency::Loading) => {
                    tracing::info!(model = model.name, expected_mb = model.expected_mb, "model load begins");
                    let load = Load::Since { at: Instant::now(), from: self.source_of(&model.name) };
                    locked(&self.0.loads).insert(model.name.clone(), load);
                }
                (_, Residency::NoRoom) => {
                    tracing::warn!(model = model.name, expected_mb = model.expected_mb, "no memory for a model");
                    self.has_no_room(&model.name);
                }
                (_, Residency::Failed | Residency::Missing) => self.cannot_load(&model.name),
                (Some(Residency::Loaded), Residency::Available) => {
                    let freed_mb = was.iter().find(|before| before.name == model.name).map(|was| was.resident_mb);
                    tracing::info!(model = model.name, freed_mb, "model released");
                }
                _ => {}
            }
        }
        self.0.activity.notify_one();
    }
}
