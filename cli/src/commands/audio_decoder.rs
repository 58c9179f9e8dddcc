//! `voxfleet audio-decoder`: the hidden child of a worker that decodes one recording.

use std::time::Duration;

use voxfleet_audio::{Limits, child};

use crate::{args::AudioDecoderArgs, exit::Exit};

pub(crate) fn run(args: &AudioDecoderArgs) -> anyhow::Result<Exit> {
    let limits =
        // The parent keeps the time in which nothing is said.
        Limits { max_seconds: args.max_seconds, memory_mb: args.memory_mb, stall: Duration::MAX };
    let name = args.extension.as_ref().map(|extension| format!(".{extension}"));
    child::main(&child::Task { fd: args.fd, out: args.out, name, limits })?;
    Ok(Exit::Ok)
}
