//! The tasks at one child's socket and stderr.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    process::ChildStderr,
    sync::mpsc,
};
use voxfleet_schema::{
    fleet::{ModelState, Residency},
    transcript::VadKind,
};

use super::Engine;
use crate::{
    capacity::locked,
    ipc::{
        EngineConfig, FromEngine, ToEngine,
        transport::{AsyncReader, AsyncWriter, TransportError},
    },
};

/// Longest line of the child's stderr passed on in one piece.
const MAX_LINE_BYTES: u64 = 8 * 1024;
/// Lines that are kept to explain an end.
const LAST_LINES: usize = 5;
/// Of each, so many characters.
const MAX_KEPT: usize = 300;

/// A child's last lines.
#[derive(Debug, Clone, Default)]
pub(super) struct LastLines(Arc<Mutex<VecDeque<String>>>);

impl LastLines {
    fn heard(&self, text: &str) {
        let mut lines = locked(&self.0);
        if lines.len() == LAST_LINES {
            lines.pop_front();
        }
        lines.push_back(text.chars().take(MAX_KEPT).collect());
    }

    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *locked(&self.0)).into()
    }
}

/// Writes the configuration, then every frame in order. Returns why it ended.
pub(super) async fn write_frames(
    socket: OwnedWriteHalf,
    config: EngineConfig,
    mut frames: mpsc::Receiver<ToEngine>,
) -> TransportError {
    let mut writer = AsyncWriter::new(socket);
    if let Err(error) = writer.send(&ToEngine::Configure(Box::new(config))).await {
        return error;
    }
    while let Some(frame) = frames.recv().await {
        // A frame over the limit ends the child too: leaving it out would be a hole in a session.
        if let Err(error) = writer.send(&frame).await {
            return error;
        }
    }
    TransportError::Closed
}

/// Reads until the child is gone; its first message must be `Ready`.
pub(super) async fn read_frames(socket: OwnedReadHalf, engine: Engine, ready: mpsc::Sender<VadKind>) -> TransportError {
    let mut reader = AsyncReader::new(BufReader::new(socket));
    let mut is_ready = false;
    loop {
        let message = match reader.next::<FromEngine>().await {
            Ok(message) => message,
            Err(error) => return error,
        };
        match message {
            FromEngine::Ready { vad, speakers, device, engine: name, notes } if !is_ready => {
                is_ready = true;
                for note in &notes {
                    tracing::info!(engine = true, note, "engine notes");
                }
                tracing::info!(vad = vad.as_str(), device, engine_kind = name, "engine ready");
                engine.0.status.send_modify(|status| {
                    (status.vad, status.speakers) = (vad, speakers);
                    status.device = device;
                    status.engine = name;
                });
                // Its life waits for this; when that has ended, so does this task.
                if ready.send(vad).await.is_err() {
                    return TransportError::Closed;
                }
            }
            other => engine.receive(other),
        }
    }
}

/// The child's log lines, and what its libraries print.
pub(super) async fn forward_stderr(pipe: ChildStderr, last: LastLines, gpu: Arc<str>) {
    let mut lines = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) => break,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                let text = text.trim_end();
                tracing::info!(engine = true, %gpu, "{text}");
                if !text.is_empty() {
                    last.heard(text);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "engine stderr cannot be read");
                break;
            }
        }
    }
}

/// What could be loaded before a first child has looked at the files.
pub(super) fn models_of(config: &EngineConfig) -> Vec<ModelState> {
    config
        .models
        .iter()
        .map(|model| ModelState {
            name: model.name.clone(),
            engine: config.engine.told_of(model),
            state: Residency::Available,
            // Weights are most of what a model takes.
            expected_mb: std::fs::metadata(&model.path).map_or(0, |m| m.len().div_ceil(1 << 20)),
            ..ModelState::default()
        })
        .collect()
}
