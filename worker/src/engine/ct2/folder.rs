//! The model folder that belongs to a model's file: the folder itself, or one made of a ggml file.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};
use voxfleet_ggml::{
    Error,
    blocks::Kind,
    folder::{PARTIAL, Precision, convert, mark, source_of},
    layout,
};

use super::{ComputeType, Ct2Config};
use crate::engine::{EngineError, checksum};

/// The file with the weights.
pub const MODEL: &str = "model.bin";

/// What the library takes beside weights and windows.
const FIXED_MB: u64 = 32;

/// Up to this a folder of a quantized file is written in float32: small, not medium.
const WHOLE_BYTES: u64 = 1 << 30;

/// What a folder says about its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderFacts {
    pub dir: PathBuf,
    /// Of its weights on disk.
    pub weight_bytes: u64,
}

/// Where `voxfleet models convert` puts the folder of a ggml file.
pub fn beside(file: &Path) -> PathBuf {
    let mut name = file.file_stem().unwrap_or_default().to_owned();
    name.push("-ct2");
    file.with_file_name(name)
}

/// A folder as it is; a ggml file is made into one, once: that beside it is taken, else one in `folders` (none: beside it).
pub fn of(name: &str, path: &Path, folders: Option<&Path>) -> Result<FolderFacts, EngineError> {
    let dir = if path.is_dir() { path.to_owned() } else { converted(name, path, folders)? };
    let model = dir.join(MODEL);
    let failed = |why: String| EngineError::Model { name: name.to_owned(), why };
    let metadata = fs::metadata(&model).map_err(|e| failed(format!("{}: {e}", model.display())))?;
    Ok(FolderFacts { dir, weight_bytes: metadata.len() })
}

/// Bytes of a number as it is computed with; with int8 a scale for each row, and a few tensors that are never rounded.
fn bytes_each(config: &Ct2Config, on_gpu: bool) -> f64 {
    match config.compute_type {
        ComputeType::Float32 => 4.0,
        ComputeType::Float16 => 2.0,
        ComputeType::Auto if on_gpu => 2.0,
        ComputeType::Auto | ComputeType::Int8Float32 | ComputeType::Int8Float16 => 1.2,
    }
}

/// What loading a folder will take, in MB: its numbers as they are computed with, and one window to work on. Batches take what
/// is free when it is loaded. An estimate until then.
pub fn expected_mb(name: &str, dir: &Path, config: &Ct2Config, on_gpu: bool) -> Result<u64, EngineError> {
    let facts = of(name, dir, None)?;
    // Converters write float16 as a rule; of float32 this is twice too much.
    let per_byte = bytes_each(config, on_gpu) / 2.0;
    let weights_mb = ((facts.weight_bytes >> 20) as f64 * per_byte) as u64;
    // A folder does not say its shape: large models have a window in a third of their weights, small ones take more.
    Ok(weights_mb + FIXED_MB + (facts.weight_bytes >> 20) / 3)
}

/// Whether a folder's `config.json` has what finals need; the library asks for it when it is too late.
pub fn has_what_is_needed(name: &str, dir: &Path, multilingual: bool) -> Result<(), EngineError> {
    let path = dir.join("config.json");
    let failed = |why: String| EngineError::Model { name: name.to_owned(), why: format!("{}: {why}", path.display()) };
    let text = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    let config: serde_json::Value = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    let has = |field: &str| config[field].as_array().is_some_and(|list| !list.is_empty());
    if !has("alignment_heads") {
        return Err(failed("no alignment_heads, by which the times of words are found".to_owned()));
    }
    if multilingual && !has("lang_ids") {
        return Err(failed("no lang_ids, by which languages are detected".to_owned()));
    }
    Ok(())
}

/// What loading a ggml file into this engine will take, in MB, by the shape that its header says.
pub fn expected_mb_of(name: &str, file: &Path, config: &Ct2Config, on_gpu: bool) -> Result<u64, EngineError> {
    let layout =
        layout::read(file).map_err(|error| EngineError::Model { name: name.to_owned(), why: error.to_string() })?;
    let numbers: u64 = layout.tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
    let weights_mb = (numbers as f64 * bytes_each(config, on_gpu)) as u64 >> 20;
    Ok(weights_mb + FIXED_MB + window_mb(&layout.header))
}

/// Working memory of one window of the full context: scores of one layer's attention, activations, keys and values of the
/// decoder. An upper estimate; how many windows there really may be is measured when the model is loaded.
fn window_mb(header: &layout::Header) -> u64 {
    let [positions, width, heads, layers, text] =
        [header.audio_ctx, header.width, header.audio_heads, header.text_layers, header.text_ctx].map(u64::from);
    let scores = 2 * heads * positions * positions;
    let activations = 12 * positions * width;
    let cached = 2 * layers * width * (positions + text);
    ((4 * (scores + activations + cached)) >> 20) + 1
}

fn converted(name: &str, file: &Path, folders: Option<&Path>) -> Result<PathBuf, EngineError> {
    let failed = |why: String| EngineError::Model { name: name.to_owned(), why };
    let unread = |e: io::Error| failed(format!("{}: {e}", file.display()));
    let known = mark(file).map_err(unread)?;
    let beside = beside(file);
    if beside.join(MODEL).is_file() {
        // One that does not say what it was made of is somebody's own, and he knows.
        if source_of(&beside).is_some_and(|source| source != known) {
            return Err(failed(format!("{} was made of another {}; remove it", beside.display(), file.display())));
        }
        return Ok(beside);
    }
    let Some(folders) = folders else { return make(name, file, &beside) };
    let file = fs::canonicalize(file).map_err(unread)?;
    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or("model");
    let of_file = format!("{stem}-{}-", short(&file.display().to_string()));
    let dir = folders.join(format!("{of_file}{}", &known[..SHORT]));
    if dir.join(MODEL).is_file() {
        return Ok(dir);
    }
    fs::create_dir_all(folders).map_err(|e| failed(format!("{}: {e}", folders.display())))?;
    let made = make(name, &file, &dir)?;
    forget_earlier(folders, &of_file, &made);
    Ok(made)
}

/// When a folder that is being made grew last.
static GREW: Mutex<Option<Instant>> = Mutex::new(None);

fn locked() -> MutexGuard<'static, Option<Instant>> {
    GREW.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When a folder of this process grew last: a load that makes one takes as long as the disk needs, and moves.
pub fn grew() -> Option<Instant> {
    *locked()
}

fn make(name: &str, file: &Path, dir: &Path) -> Result<PathBuf, EngineError> {
    tracing::info!(model = name, dir = %dir.display(), "made into a CTranslate2 folder, once");
    let failed = |error: Error| EngineError::Model { name: name.to_owned(), why: error.to_string() };
    let layout = layout::read(file).map_err(failed)?;
    checksum::verify(name, file)?;
    let numbers: u64 = layout.tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum();
    let plain = layout.tensors.iter().all(|tensor| matches!(tensor.kind, Kind::F32 | Kind::F16));
    let mut moves = |_, _| {
        *locked() = Some(Instant::now());
        true
    };
    match convert(file, dir, precision(numbers, plain), &mut moves) {
        Ok(_) => Ok(dir.to_owned()),
        // Another worker was faster.
        Err(_) if dir.join(MODEL).is_file() => Ok(dir.to_owned()),
        Err(error) => Err(failed(error)),
    }
}

/// What a folder is written in. A quantized number has more digits than float16 holds, and the engine rounds once more: small
/// models are kept whole, of large ones the folder and what loading it takes would be too much.
fn precision(numbers: u64, plain: bool) -> Precision {
    if !plain && numbers * 4 <= WHOLE_BYTES { Precision::Float32 } else { Precision::Float16 }
}

/// Whether a folder of this name was made of this file. Those that are still being made are not: another worker writes there,
/// or one was killed over it, and `abandoned` says which.
fn is_made_of(name: &str, of_file: &str, abandoned: bool) -> bool {
    let Some((mark, partial)) = name.strip_prefix(of_file).and_then(|rest| rest.split_at_checked(SHORT)) else {
        return false;
    };
    let whole = partial.is_empty() || (abandoned && partial.ends_with(PARTIAL));
    whole && mark.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Nobody has written into it for an hour.
fn is_abandoned(dir: &Path) -> bool {
    let written = fs::metadata(dir.join(MODEL)).or_else(|_| fs::metadata(dir)).and_then(|m| m.modified());
    written.is_ok_and(|at| at.elapsed().is_ok_and(|since| since > ABANDONED_AFTER))
}

/// Removes what was made of the same file before it changed, and what was left half made.
fn forget_earlier(folders: &Path, of_file: &str, made: &Path) {
    let earlier = fs::read_dir(folders).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|n| n.to_str());
        path != made && name.is_some_and(|name| is_made_of(name, of_file, is_abandoned(path)))
    });
    for path in earlier {
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(dir = %path.display(), %error, "an earlier model folder stays");
        }
    }
}

const ABANDONED_AFTER: Duration = Duration::from_secs(3_600);

/// In the name of a folder.
const SHORT: usize = 16;

fn short(text: &str) -> String {
    Sha256::digest(text).iter().take(SHORT / 2).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use voxfleet_ggml::folder::SOURCE;

    use super::*;

    #[test]
    fn a_file_is_converted_once_and_a_folder_is_taken_as_it_is() {
        let folder = tempfile::tempdir().expect("folder");
        let micro = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin");
        let file = folder.path().join("micro.en.bin");
        fs::copy(&micro, &file).expect("copied");
        let facts = of("micro.en", &file, None).expect("converted");
        assert_eq!(facts.dir, folder.path().join("micro.en-ct2"));
        assert!(facts.weight_bytes > 20 << 20);
        let made = fs::metadata(facts.dir.join("model.bin")).expect("model").modified().expect("time");
        assert_eq!(of("micro.en", &file, None).expect("there"), facts);
        assert_eq!(of("micro.en", &facts.dir, None).expect("a folder"), facts);
        let same = fs::metadata(facts.dir.join("model.bin")).expect("model").modified().expect("time");
        assert_eq!(made, same, "made once");
        // Whoever uses a model marks it so.
        touch(&file);
        assert_eq!(of("micro.en", &file, None).expect("the same file"), facts);
        // Another file under the same name is not passed over in silence.
        change(&file);
        match of("micro.en", &file, None) {
            Err(EngineError::Model { why, .. }) => assert!(why.contains("made of another"), "{why}"),
            other => panic!("{other:?}"),
        }
        fs::remove_file(facts.dir.join(SOURCE)).expect("removed");
        assert_eq!(of("micro.en", &file, None).expect("somebody's own"), facts);
        for nothing in [folder.path().join("absent.bin"), folder.path().to_owned()] {
            assert!(matches!(of("m", &nothing, None), Err(EngineError::Model { .. })), "{}", nothing.display());
        }
    }

    fn touch(file: &Path) {
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        fs::File::options().append(true).open(file).and_then(|f| f.set_modified(later)).expect("touched");
    }

    /// A bit of its last weights, which changes neither its length nor what it says of itself.
    fn change(file: &Path) {
        let mut bytes = fs::read(file).expect("model");
        *bytes.last_mut().expect("weights") ^= 1;
        fs::write(file, bytes).expect("written");
    }

    #[test]
    fn a_folder_without_what_finals_need_is_refused_at_once() {
        let dir = tempfile::tempdir().expect("folder");
        for (config, multilingual, lacks) in [
            (r#"{"alignment_heads": [[0, 1]], "lang_ids": [50259]}"#, true, None),
            (r#"{"alignment_heads": [[0, 1]]}"#, false, None),
            (r#"{"alignment_heads": [[0, 1]], "lang_ids": []}"#, true, Some("lang_ids")),
            (r#"{"alignment_heads": []}"#, false, Some("alignment_heads")),
            ("[]", false, Some("alignment_heads")),
            ("{", false, Some("config.json")),
        ] {
            fs::write(dir.path().join("config.json"), config).expect("written");
            match (has_what_is_needed("m", dir.path(), multilingual), lacks) {
                (Ok(()), None) => {}
                (Err(EngineError::Model { why, .. }), Some(lacks)) => assert!(why.contains(lacks), "{config}: {why}"),
                (found, _) => panic!("{config}: {found:?}"),
            }
        }
    }

    #[test]
    fn what_others_write_is_left_alone() {
        let of_file = "base-0123456789abcdef-";
        for (rest, abandoned, goes) in [
            ("00112233445566ff", false, true),
            ("00112233445566ff.77-1.partial", false, false),
            ("00112233445566ff.77-1.partial", true, true),
            ("00112233445566ff.bak", true, false),
            ("0011", false, false),
            ("something-of-theirs", true, false),
        ] {
            assert_eq!(is_made_of(&format!("{of_file}{rest}"), of_file, abandoned), goes, "{rest}");
        }
        assert!(!is_made_of("base-fedcba9876543210-00112233445566ff", of_file, true));
    }

    #[test]
    fn workers_that_convert_at_once_all_get_their_folder() {
        let (models, cache) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
        let micro = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin");
        let file = models.path().join("micro.en.bin");
        fs::copy(&micro, &file).expect("copied");
        let folders = cache.path().join("ct2");
        let made: Vec<_> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| of("micro.en", &file, Some(&folders)))).collect();
            workers.into_iter().map(|worker| worker.join().expect("worker")).collect()
        });
        assert!(made.iter().all(|made| made.is_ok()), "{made:?}");
        assert_eq!(fs::read_dir(&folders).expect("folder").count(), 1, "nothing is left half made");
    }

    #[test]
    fn small_quantized_models_are_kept_whole() {
        // Numbers, whether they are plain.
        for (numbers, plain, expected) in [
            (8_000_000, false, Precision::Float32),
            (242_000_000, false, Precision::Float32),
            (769_000_000, false, Precision::Float16),
            (8_000_000, true, Precision::Float16),
        ] {
            assert_eq!(precision(numbers, plain), expected, "{numbers}, {plain}");
        }
    }

    #[test]
    fn folders_stand_in_the_cache_and_follow_their_file() {
        let (models, cache) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
        let folders = cache.path().join("ct2");
        let micro = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin");
        let file = models.path().join("micro.en.bin");
        fs::copy(&micro, &file).expect("copied");
        let made = of("micro.en", &file, Some(&folders)).expect("converted");
        assert!(made.dir.starts_with(&folders) && fs::read_dir(models.path()).expect("folder").count() == 1);
        assert_eq!(of("micro.en", &file, Some(&folders)), Ok(made.clone()));
        touch(&file);
        assert_eq!(of("micro.en", &file, Some(&folders)), Ok(made.clone()), "the same file");
        change(&file);
        let again = of("micro.en", &file, Some(&folders)).expect("converted again");
        assert!(again.dir != made.dir && !made.dir.exists() && again.dir.join(MODEL).is_file());
        // One that somebody made beside the file comes first.
        convert(&file, &beside(&file), Precision::Float32, &mut |_, _| true).expect("converted");
        let beside = beside(&file);
        assert_eq!(of("micro.en", &file, Some(&folders)).map(|facts| facts.dir), Ok(beside));
    }
}
