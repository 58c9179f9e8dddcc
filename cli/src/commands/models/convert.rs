//! `voxfleet models convert`: a ggml Whisper file becomes the folder that CTranslate2 takes.

use std::path::{Path, PathBuf};

use serde_json::json;
use voxfleet_ggml::{
    Error,
    folder::{Converted, Precision, convert},
};
use voxfleet_store::models::Step;

use super::progress::{Progress, megabytes};
use crate::{
    Context,
    args::{ConvertArgs, ConvertedPrecision},
    exit::{Exit, OrExit as _, coded},
    transcript::screen::{object, out},
};

pub(super) async fn run(args: &ConvertArgs, context: &Context) -> anyhow::Result<Exit> {
    let dir = args.out.clone().unwrap_or_else(|| beside(&args.file));
    let precision = match args.precision {
        ConvertedPrecision::Float32 => Precision::Float32,
        ConvertedPrecision::Float16 => Precision::Float16,
        ConvertedPrecision::Int8Float32 => Precision::Int8Float32,
        ConvertedPrecision::Int8Float16 => Precision::Int8Float16,
    };
    let (file, stop) = (args.file.clone(), context.shutdown.clone());
    let writing = tokio::task::spawn_blocking(move || {
        let name = dir.display().to_string();
        let mut progress = Progress::new(&name);
        let converted = convert(&file, &dir, precision, &mut |done, all| {
            progress.step(&Step::Got { bytes: done, total: Some(all) });
            !stop.is_cancelled()
        });
        progress.done();
        converted
    });
    // It looks whether it is to stop after each megabyte, and takes what it wrote with it.
    match writing.await.or_exit(Exit::Internal)? {
        Ok(converted) => told(&converted, precision, args.output.json),
        Err(Error::Stopped) => Ok(Exit::Interrupted),
        Err(error) => {
            let exit = match &error {
                Error::Damaged { .. } | Error::Unsupported { .. } => Exit::Input,
                Error::Exists(_) | Error::Io { .. } | Error::Stopped => Exit::Failure,
            };
            Err(coded(exit, error.into()))
        }
    }
}

/// `base.en.bin` becomes `base.en-ct2`.
fn beside(file: &Path) -> PathBuf {
    let mut name = file.file_stem().unwrap_or_default().to_owned();
    name.push("-ct2");
    file.with_file_name(name)
}

fn told(converted: &Converted, precision: Precision, json: bool) -> anyhow::Result<Exit> {
    let Converted { dir, multilingual, bytes } = converted;
    if json {
        let precision = precision.as_str();
        object(&json!({"path": dir, "bytes": bytes, "precision": precision, "multilingual": multilingual}))?;
    } else {
        out(&format!("{} ({}, {})", dir.display(), megabytes(*bytes), precision.as_str()))?;
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_stands_beside_the_file() {
        for (file, dir) in [("/models/base.en.bin", "/models/base.en-ct2"), ("tiny", "tiny-ct2")] {
            assert_eq!(beside(Path::new(file)), Path::new(dir));
        }
    }
}
