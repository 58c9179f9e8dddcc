//! A load is seen while it goes on: a real engine reads a file that takes it seconds, and each heartbeat says how far it is.

use std::{
    fs::File,
    io::{Seek as _, SeekFrom, Write as _},
    path::Path,
};

use anyhow::{Result, ensure};
use voxfleet_harness::{fleet, process::Settings};
use voxfleet_schema::{
    failure::FailureClass,
    fleet::{Heartbeat, ModelState, Residency},
};

use crate::worker_supervisor::Alone;

/// `ggml`, little endian.
const MAGIC: u32 = 0x6767_6d6c;

/// A file in the form of a multilingual model with one layer each. Its first tensor is a hole of so many bytes: it takes no
/// room on the disk, and its time to be read.
fn write_model(path: &Path, hole_bytes: u32) -> Result<()> {
    let (vocab, mels) = (51_866u32, 128u32);
    let mut file = File::create(path)?;
    let mut put = |numbers: &[u32]| -> Result<()> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        Ok(file.write_all(&bytes)?)
    };
    put(&[MAGIC, vocab, 1_500, 64, 1, 1, 448, 64, 1, 1, mels, 1, mels, 201])?;
    put(&vec![0; (mels * 201) as usize])?;
    // A vocabulary of a blank, and its length.
    put(&[1, 1])?;
    file.write_all(b" ")?;
    for number in 0..11 + 15 + 24u32 {
        let name = format!("tensor.{number}");
        let elements = if number == 0 { hole_bytes / 4 } else { 64 };
        let head = [1, name.len() as u32, 0, elements].map(u32::to_le_bytes);
        file.write_all(head.as_flattened())?;
        file.write_all(name.as_bytes())?;
        file.seek(SeekFrom::Current(i64::from(elements) * 4))?;
    }
    let end = file.stream_position()?;
    Ok(file.set_len(end)?)
}

fn model(beat: &Heartbeat) -> Option<&ModelState> {
    beat.models.iter().find(|model| model.name == "vast")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_heartbeat_says_how_much_of_the_file_was_read() -> Result<()> {
    let _place = fleet::place().await;
    let models = tempfile::tempdir()?;
    write_model(&models.path().join("vast.bin"), 1 << 30)?;
    // It is read to its end to be compared, and is another.
    std::fs::write(models.path().join("vast.bin.sha256"), "0".repeat(64))?;
    let settings = Settings::new()
        .with("worker.engine", "whisper_cpp")
        .with("worker.models_dir", models.path().display())
        .with("worker.default_model", "vast")
        .with("worker.preload", "vast")
        .with("worker.heartbeat_ms", 100);
    let mut alone = Alone::start(settings).await?;
    let percent = |beat: &Heartbeat| model(beat).and_then(|model| model.load_percent);
    let first = alone.beat("a load", |beat| percent(beat).is_some_and(|percent| percent > 0)).await?;
    let first = percent(&first).unwrap_or_default();
    let later = alone.beat("more of it", |beat| percent(beat).is_some_and(|percent| percent > first)).await?;
    let loading = model(&later).cloned().unwrap_or_default();
    ensure!(loading.state == Residency::Loading && loading.load_ms.is_some_and(|ms| ms > 0), "{loading:?}");
    ensure!(loading.load_percent <= Some(50), "whisper.cpp has not begun: {loading:?}");
    let over = alone.beat("its end", |beat| model(beat).is_some_and(|m| m.state == Residency::Failed)).await?;
    let failed = model(&over).cloned().unwrap_or_default();
    ensure!(failed.load_percent.is_none(), "{failed:?}");
    ensure!(failed.failure.is_some_and(|f| f.class == FailureClass::ModelMissing), "{over:?}");
    println!("seen at {first} % and at {:?} %", loading.load_percent);
    Ok(())
}
